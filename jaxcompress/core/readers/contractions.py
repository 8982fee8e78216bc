"""`contractions(fn)`: which axes of each parameter are contracted, read off the jaxpr."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxcompress.core.readers.capture import Observed
from jaxcompress.core.readers.observations import Settings, Use
from jaxcompress.core.readers.origins import whole_axes


class ContractedAxes(tuple[int, ...]):
    """Contracted axes of a dense parameter, ascending; compares equal to a plain tuple.

    Attributes:
      lead: number of leading axes of which each entry is a weight of its own: axes of a scan
        (layers), batch axes of the product (experts), indexed axes.
    """

    lead: int

    def __new__(cls, axes: tuple[int, ...], lead: int = 0) -> ContractedAxes:
        made = super().__new__(cls, axes)
        made.lead = lead
        return made

    def __repr__(self) -> str:
        """Axes and lead."""
        return f"ContractedAxes({tuple(self)}, lead={self.lead})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles with `lead`."""
        return ContractedAxes, (tuple(self), self.lead)


def contractions(fn: Callable[..., Any]) -> Callable[..., dict[str, ContractedAxes]]:
    """`contractions(fn)(params, *args)`: the contracted axes of each parameter, by path.

    `[in, out]` and `[out, in]` kernels, convolutions, heads x head_dim, stacked layers and experts
    alike. A table that is only gathered from counts its features as contracted. Parameters that no
    product reads (biases, gains) are absent, and so are those of which only a part of an axis is
    contracted. Where several products read one parameter, the first counts. Shapes are enough:
    `jax.ShapeDtypeStruct` leaves will do.

    Args:
      fn: any JAX function whose first argument is a pytree of parameters.
    """
    observed = Observed(fn, Settings((), gathers=True), None, None)

    def run(params: Any, *args: Any, **kwargs: Any) -> dict[str, ContractedAxes]:
        seen, parameters = observed.observe(params, args, kwargs)
        found: dict[str, ContractedAxes] = {}
        uses = [use for entry in seen.entries for use in entry.uses]
        for use in sorted(uses, key=lambda use: not use.product):
            assert isinstance(use.origin, int)
            path, leaf = parameters[use.origin]
            axes = _contracted(use, leaf.shape)
            if axes and path not in found:
                found[path] = axes
        return {path: found[path] for path, _ in parameters if path in found}

    return run


def _contracted(use: Use, shape: tuple[int, ...]) -> ContractedAxes | None:
    axes = whole_axes(use.contracted, shape)
    if not axes:
        return None
    inner = {atom.axis for atom in (*use.contracted, *use.free)}
    lead = 0
    while lead < len(shape) and lead not in inner and lead not in axes:
        lead += 1
    return ContractedAxes(tuple(sorted(axes)), lead)
