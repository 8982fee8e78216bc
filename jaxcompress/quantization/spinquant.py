"""Learned rotations folded into the weights: those under which rounding costs the loss least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model, of_arrays
from jaxcompress.core.paths import map_with_paths
from jaxcompress.layerwise.calibrate import Calibration
from jaxcompress.layerwise.grid import Grid, grid_of, on_grid
from jaxcompress.layerwise.losses import loss_of, mean_loss
from jaxcompress.layerwise.problem import StoredMatrix
from jaxcompress.progress import progress
from jaxcompress.quantization.folds import Network
from jaxcompress.quantization.rotations import Rotation, rotatable, rotate


def spinquant(
    model: Model,
    *,
    calibration: Any,
    dtype: str = "int",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    steps: int = 50,
    learning_rate: float = 0.3,
    random_seed: int = 0,
) -> Model:
    """Learn the rotations of `quarot`, so that the loss with rounded weights is least; fold them.

    From Hadamard matrices on, each step takes the gradient of the model's loss on a batch, with
    weights rounded to nearest (the gradient passes straight through), and turns every rotation
    against it by a Cayley transform (Li et al., arXiv:2002.01113, section 4), so that it stays
    orthogonal. Of start and end, what has the lower loss on all calibration data is taken.

    Source: Liu et al., "SpinQuant", arXiv:2405.16406, section 3.2 (R1 and R2).

    Args:
      model: any model that has a loss; a tied output layer gets weights of its own.
      calibration: token ids `[samples, seq]`, or a tuple of inputs and labels.
      dtype: number format that the weights will be rounded to, see `layerwise.grid.grid_of`.
      bits: bits of an integer weight.
      group_size: contracted columns that share a scale; -1: one scale per row.
      symmetric: fixed zero in the middle of the codes; otherwise a zero point per group.
      steps: batches learned from.
      learning_rate: of the first step, falling to 0: by how much the fastest plane turns, in
        radians.
      random_seed: of the rotations at the start.

    Returns:
      The dense model of the same function, whose weights are easier to round.

    Raises:
      InputError: no such format, no loss for such data, or a group size that does not divide the
        inputs of a matrix.
    """
    if steps < 0 or learning_rate <= 0:
        raise InputError(f"steps {steps}, learning_rate {learning_rate}: must be positive")
    grid = grid_of(dtype, bits=bits, group_size=group_size, symmetric=symmetric)
    model, restored = of_arrays(model)
    network, rotations, notes = rotatable(model, calibration, what="spinquant")
    rng = np.random.default_rng(random_seed)
    start = [rotation.start(rng) for rotation in rotations]
    batches = Calibration.of(calibration, model, samples=1, ctx=1, seed=0).batches()
    best = _learned(network, rotations, start, batches, grid, steps, learning_rate)
    params = rotate(network, rotations, best)
    return restored(network.model.replace(params=params, notes=(*model.notes, *notes)))


def _learned(
    network: Network,
    rotations: Sequence[Rotation],
    start: Sequence[np.ndarray],
    batches: Sequence[Any],
    grid: Grid,
    steps: int,
    learning_rate: float,
) -> list[np.ndarray]:
    """The rotations after all steps, or those of the start where these are better."""
    rounded = _rounded(network, rotations, grid)
    loss = loss_of(network.model, batches[0])

    @jax.jit
    def measure(given: Any, batch: Any) -> tuple[Array, Array]:
        params, free = given
        return loss(rounded(params, free), batch)

    def mean(free: list[Array], params: Any, batch: Any) -> Array:
        total, count = loss(rounded(params, free), batch)
        return total / count

    @jax.jit
    def step(free: list[Array], params: Any, batch: Any, angle: Array) -> list[Array]:
        slopes = jax.grad(mean)(free, params, batch)
        return [turned(r, slope, angle) for r, slope in zip(free, slopes, strict=True)]

    params = network.model.params
    free = [jnp.asarray(matrix, jnp.float32) for matrix in start]
    for i in progress(range(steps), "spinquant", unit="step"):
        angle = learning_rate * (1 - i / steps)
        free = step(free, params, batches[i % len(batches)], angle)
    found = [orthogonal(np.asarray(matrix, np.float64)) for matrix in free]
    before, after = (
        mean_loss(measure, (params, [jnp.asarray(r, jnp.float32) for r in some]), batches)
        for some in (start, found)
    )
    return found if after < before else list(start)


def _rounded(
    network: Network, rotations: Sequence[Rotation], grid: Grid
) -> Callable[[Any, Sequence[Array]], Any]:
    """`(params, R's) -> params`, rotated, the targets rounded with straight-through gradients."""

    def one(path: str, leaf: Any) -> Any:
        if path not in network.targets:
            return leaf
        stored = StoredMatrix.of(path, leaf, network.axes)
        matrix = stored.matrix()
        error = on_grid(grid, matrix) - matrix
        return stored.put_back(matrix + jax.lax.stop_gradient(error).astype(matrix.dtype))

    def function(params: Any, free: Sequence[Array]) -> Any:
        for rotation, matrix in zip(rotations, free, strict=True):
            params = rotation.apply(params, matrix)
        return map_with_paths(one, params)

    return function


def turned(rotation: Array, slope: Array, angle: Any) -> Array:
    """R turned against the gradient, by so many radians in the plane that turns fastest.

    R' = (1 + Y/2)^-1 (1 - Y/2) R with Y = c (G R' - R G'), Li et al., equations 3 and 5.

    Args:
      rotation: orthogonal `[..., n, n]`.
      slope: G, the gradient of the loss by R.
      angle: largest angle.
    """
    skew = slope @ rotation.mT - rotation @ slope.mT
    size = jnp.linalg.norm(skew, axis=(-2, -1), keepdims=True) / np.sqrt(2)  # one plane: its angle
    skew = skew * (angle / jnp.maximum(size, 1e-30))
    one = jnp.eye(skew.shape[-1])
    return jnp.linalg.solve(one + skew / 2, (one - skew / 2) @ rotation)


def orthogonal(matrix: np.ndarray) -> np.ndarray:
    """The orthogonal matrix nearest to a float64 one `[..., n, n]`."""
    u, _, v = np.linalg.svd(matrix)
    return u @ v
