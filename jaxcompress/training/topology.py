"""TPU pods by name, without a TPU: `v5p:4x4x4` is 64 chips of a v5p in a torus of 4 x 4 x 4."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from jaxcompress.core.errors import InputError
from jaxcompress.core.selection import nearest

GIB = 2**30
# HBM of a chip, from the "System architecture" pages of the Cloud TPU documentation
# (https://cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e).
HBM = {"v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}
AXES = {"v5e": 2, "v5p": 3, "v6e": 2}
_FORM = re.compile(r"(?:(\d+)\*)?([a-z0-9]+):(\d+(?:x\d+)*)")


@dataclass(frozen=True)
class Topology:
    """A pod, or several slices of one joined by a slower network.

    Attributes:
      kind: of the chips, a key of `HBM`.
      shape: chips along each axis of a slice.
      slices: how many.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """In all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def hbm(self) -> int:
        """Bytes of a chip's memory."""
        return HBM[self.kind]

    def __str__(self) -> str:
        """The name, as `parse_topology` reads it."""
        shape = "x".join(map(str, self.shape))
        return f"{f'{self.slices}*' * (self.slices > 1)}{self.kind}:{shape}"


def parse_topology(name: str) -> Topology:
    """The pod of a name such as `v5p:4x4x4`, or `2*v6e:16x16` for two slices.

    Raises:
      InputError: not of this form, an unknown kind, or another number of axes than the kind has.
    """
    found = _FORM.fullmatch(name)
    if found is None:
        raise InputError(
            f"topology {name!r}: must be KIND:SHAPE such as v5p:4x4x4, or N*KIND:SHAPE for N "
            f"slices; kinds are {', '.join(HBM)}"
        )
    kind, shape = found[2], tuple(map(int, found[3].split("x")))
    if kind not in HBM:
        raise InputError(f"topology {name!r}: unknown kind of TPU; {nearest(kind, HBM)}")
    if len(shape) != AXES[kind] or 0 in shape or found[1] == "0":
        example = "x".join("4" * AXES[kind])
        raise InputError(
            f"topology {name!r}: a {kind} has {AXES[kind]} axes, as in {kind}:{example}"
        )
    return Topology(kind, shape, int(found[1] or 1))


def topology_devices(name: str) -> list[Any]:
    """The devices of a pod that is not there, to compile for.

    Raises:
      InputError: a name that is wrong, a pod that cannot be built, or libtpu is not installed.
    """
    topology = parse_topology(name)
    require_libtpu()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    shape = str(Topology(topology.kind, topology.shape))
    try:
        return list(topologies.get_topology_desc(shape, platform="tpu", **slices).devices)
    except Exception as error:  # of several types, by the version of libtpu
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"topology {name!r}: there is no such pod: {reason}") from None


def require_libtpu() -> None:
    """Raise `InputError` unless the TPU compiler is installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "topology: the TPU compiler is not installed; pip install 'jaxcompress[tpu]'"
        )
