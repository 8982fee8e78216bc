"""Rotations that can be folded into the weights: found in the function, Hadamard to begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers.coupling import Diagonal, Group, Groups, Matrices
from jaxcompress.core.readers.coupling.matrices import GENERAL, ORTHOGONAL
from jaxcompress.core.readers.coupling.program import Program, Record, Value
from jaxcompress.core.readers.coupling.semantics import names
from jaxcompress.layerwise.calibrate import Calibration
from jaxcompress.models.tying import untie
from jaxcompress.quantization.folds import Network

_MOVES = names("broadcast_in_dim convert_element_type copy reshape scan_slice squeeze transpose")


@dataclass(frozen=True)
class Rotation:
    """An orthogonal T that may act along one axis of the function.

    Where T must leave the ones as they are (behind a layer norm), T = B diag(1, R) B' with a fixed
    orthonormal B whose first column is proportional to the ones; elsewhere T = R. R is free.

    Attributes:
      matrices: the parameters that T transforms, all by T itself: it is its inverse transpose.
    """

    matrices: Matrices

    @property
    def name(self) -> str:
        """Of the axis, for messages."""
        return self.matrices.group.name

    @property
    def size(self) -> int:
        """Rows of R."""
        return self.matrices.group.size - self.matrices.fixes_ones

    def start(self, rng: np.random.Generator) -> np.ndarray:
        """A randomized Hadamard R, float64 `[size, size]`; `[steps, size, size]` per layer."""
        steps = self.matrices.steps
        if not steps:
            return randomized_hadamard(self.size, rng)
        return np.stack([randomized_hadamard(self.size, rng) for _ in range(steps)])

    def apply(self, params: Any, free: Any) -> Any:
        """Parameters rotated by T of R; differentiable where R is an array of JAX."""
        if not self.matrices.fixes_ones:
            return self.matrices.apply(params, free)
        basis = _basis_of_ones(self.size + 1)
        inner = basis[:, 1:] @ free @ basis[:, 1:].T
        return self.matrices.apply(params, inner + 1 / (self.size + 1))


def rotatable(
    model: Model, calibration: Any, *, what: str
) -> tuple[Network, list[Rotation], list[str]]:
    """A model made ready to be rotated, with what can be rotated.

    Output layers are untied from embeddings, and the gains of norms go into the matrices behind.

    Args:
      model: whose leaves are all arrays.
      calibration: some inputs `[samples, ...]`; None: as the config says.
      what: name of the method, for notes.
    """
    loose = untie(model)
    notes = [] if loose is model else [f"{what}: the output layer has weights of its own now"]
    inputs = None
    if calibration is not None:
        inputs = Calibration.of(calibration, loose, samples=1, ctx=1, seed=0).inputs
    network = Network.of(loose, inputs)
    params, uniform = fold_gains(network.groups, network.model.params)
    network.model = network.model.replace(params=params)
    targets = set(network.targets)
    found, reached = [], set()
    for group in network.groups:
        for matrices in group.matrices(uniform=uniform):
            paths = {member.path for member in matrices.signs}
            free = matrices.level in (ORTHOGONAL, GENERAL) and group.size > 1
            if free and targets & paths:
                signs = dict.fromkeys(matrices.signs, 1)  # an orthogonal T is its own
                found.append(Rotation(replace(matrices, signs=signs)))
                reached |= targets & paths
    if left := [path for path in network.targets if path not in reached]:
        notes.append(f"{what}: nothing can be rotated in {', '.join(left)}")
    return network, found, notes


# ---------------------------------------------------------------------------- gains


def fold_gains(groups: Groups, params: Any) -> tuple[Any, set[str]]:
    """Parameters with all gains that allow it at 1, and their paths.

    A gain is a parameter that does nothing but multiply values index by index. Its own diagonal
    symmetry moves it into the matrices behind it; with gains of 1 a norm commutes with rotations.
    """
    gains = _gains(groups.program)
    done: set[str] = set()
    for group in groups:
        for diagonal in group.diagonals() if group.atom is not None else ():
            own = [m for m in diagonal.exponents if m[0].path in gains]
            if len(own) != 1 or own[0][0].path in done or diagonal.exponents[own[0]] != 1:
                continue
            leaf = dict(leaves_with_paths(params))[own[0][0].path]
            gain = _along(group, diagonal, own[0][0], leaf)
            if gain is not None and np.all(gain != 0):
                params = diagonal.apply(params, 1 / gain)
                done.add(own[0][0].path)
    return params, done


def _along(group: Group, diagonal: Diagonal, member: Any, leaf: Any) -> np.ndarray | None:
    """The gain's values, float64 `[size]` or `[steps, size]`; None if it has others besides."""
    values = np.asarray(leaf).astype(np.float64)
    shape = (diagonal.steps, group.size) if diagonal.steps else (group.size,)
    if values.shape != shape or member.axis != len(shape) - 1:
        return None
    order = np.argsort(group.labels(member))
    return values[..., order]


def _gains(program: Program) -> set[str]:
    """Paths of parameters whose only use is in products index by index."""
    found = set()
    for parameter in program.parameters:
        known: set[Value] = {parameter}
        uses: set[str] = set()
        for record in program.records:
            touched = [value for value in record.operands if value in known]
            if not touched:
                continue
            if record.primitive in _MOVES:
                known.update(record.results)
            else:
                uses.add(record.primitive if _is_gain(record, known) else "other")
        if uses == {"mul"}:
            found.add(parameter.name)
    return found


def _is_gain(record: Record, known: set[Value]) -> bool:
    return record.primitive == "mul" and sum(value in known for value in record.operands) == 1


# ---------------------------------------------------------------------------- Hadamard


def randomized_hadamard(size: int, rng: np.random.Generator) -> np.ndarray:
    """An orthogonal matrix H diag(+-1), float64 `[size, size]`.

    H is the product of Sylvester's matrix of a power of 2 and Paley's of the least fitting order
    (Hedayat and Wallis 1978, "Hadamard matrices and their applications", section 2), so that all
    entries have one size; where there is none, of Sylvester's and a random orthogonal matrix.
    """
    odd = size // (size & -size)
    rest = odd
    while odd > 1 and size % rest == 0 and not _is_paley(rest):
        rest *= 2
    if odd == 1:
        base = np.ones((1, 1))
    elif size % rest == 0:
        base = _paley(rest) / np.sqrt(rest)
    else:
        rest = odd
        base = random_orthogonal(odd, rng)
    while len(base) < size:
        base = np.block([[base, base], [base, -base]]) / np.sqrt(2)
    return base * rng.choice([-1.0, 1.0], size)


def random_orthogonal(size: int, rng: np.random.Generator) -> np.ndarray:
    """A matrix drawn uniformly from the orthogonal ones (Mezzadri, arXiv:math-ph/0609050)."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return q * np.sign(np.diag(r))


def _is_paley(order: int) -> bool:
    q = order - 1
    return q % 4 == 3 and all(q % k for k in range(2, int(q**0.5) + 1))


def _paley(order: int) -> np.ndarray:
    """Hadamard's matrix of order q + 1, q a prime of 4 k + 3 (Paley 1933, construction I)."""
    q = order - 1
    character = np.full(q, -1.0)
    character[np.arange(1, q) ** 2 % q] = 1.0
    character[0] = 0.0
    differences = (np.arange(q)[:, None] - np.arange(q)) % q
    made = np.eye(order)
    made[0, 1:] += 1.0
    made[1:, 0] -= 1.0
    made[1:, 1:] += character[differences]
    return made


def _basis_of_ones(size: int) -> np.ndarray:
    """An orthonormal basis, float64 `[size, size]`, whose first vector is 1 / sqrt(size): H - I."""
    first = np.full(size, size**-0.5)
    first[0] -= 1.0
    return np.eye(size) - 2 * np.outer(first, first) / (first @ first)


def rotate(network: Network, rotations: Sequence[Rotation], free: Sequence[Any]) -> Any:
    """The network's parameters under all rotations; the matrices are made in float64."""
    params = network.model.params
    for rotation, matrix in zip(rotations, free, strict=True):
        params = rotation.apply(params, np.asarray(matrix, np.float64))
    return jax.tree.map(jnp.asarray, params)
