"""Observes one frame of the walk for `capture` and `contractions`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn

from jaxcompress.core.arrays.base import dense, is_compressed
from jaxcompress.core.errors import InputError
from jaxcompress.core.readers import unofficial
from jaxcompress.core.readers.observations import Entry, Observations, Settings, Use, View
from jaxcompress.core.readers.origins import (
    VIEWS,
    Axis,
    Given,
    Origin,
    Origins,
    Tag,
    compose,
    identity,
)


class ShardMap(NamedTuple):
    """A shard_map being walked: does it check varying axes, what are its inputs split over."""

    check_vma: bool
    inputs_over: frozenset[str]


class Recorder:
    """What is observed in one body.

    Products that read one value share its statistic: values are told apart by identity, and views
    of one value are made once. In the body of a call, a value that is an argument of it is left to
    the caller, so that calls that read one value share its statistic too.
    """

    def __init__(
        self, settings: Settings, mask: Any, defer: bool, shard_map: ShardMap | None
    ) -> None:
        self.settings, self.mask, self.defer, self.shard_map = settings, mask, defer, shard_map
        self.observations = Observations()
        self.largest = 0  # entries of the largest value observed
        self._entry: dict[Any, int] = {}
        self._views: dict[Any, list[Any]] = {}
        self._arguments: dict[int, int] = {}
        self._alive: list[Any] = []  # identities must not be used again

    def enter(self, args: Sequence[Any], given: Sequence[Given]) -> list[Origins]:
        """Origins of the body's arguments."""
        if self.defer:
            self._arguments = {id(x): i for i, x in enumerate(args) if given[i] is None}
        out: list[Origins] = []
        for i, (x, tag) in enumerate(zip(args, given, strict=True)):
            if isinstance(tag, Tag):
                out.append((identity(i, x.shape, tag),))
            else:
                out.append(None if tag is None else ())
        return out

    def view_again(self, eqn: JaxprEqn, operands: list[Any], origins: list[Origins]) -> Any:
        """The outputs of a view made before of the same value, or None."""
        if not self._is_view_of_activation(eqn, operands, origins):
            return None
        return self._views.get(self._view_key(eqn, operands))

    def made(
        self, eqn: JaxprEqn, operands: list[Any], origins: list[Origins], outputs: list[Any]
    ) -> None:
        """Remember a view."""
        if self._is_view_of_activation(eqn, operands, origins):
            self._alive += operands
            self._views[self._view_key(eqn, operands)] = outputs

    def _is_view_of_activation(
        self, eqn: JaxprEqn, operands: list[Any], origins: list[Origins]
    ) -> bool:
        name = eqn.primitive.name
        is_view = name in VIEWS or name == "convert_element_type"
        return (
            is_view and len(operands) == 1 and origins[0] is None and not is_compressed(operands[0])
        )

    @staticmethod
    def _view_key(eqn: JaxprEqn, operands: list[Any]) -> Any:
        return eqn.primitive.name, str(eqn.params), id(operands[0])

    def see(self, eqn: JaxprEqn, operands: list[Any], origins: list[Origins]) -> None:
        """Observe what an equation reads, if it is a product with a weight or a name."""
        name = eqn.primitive.name
        if name == "dot_general":
            self._dot_general(eqn, operands, origins)
        elif name == "conv_general_dilated" and origins[1] and origins[0] is None:
            self._convolution(eqn, operands[0], origins[1])
        elif name == "gather" and origins[0] and origins[1] is None and self.settings.gathers:
            self._gather(eqn, operands[0], origins[0])
        elif name == "name" and eqn.params["name"] in self.settings.names:
            (value,) = operands
            use = Use(eqn.params["name"], unofficial.source_line(eqn))
            self.record(value, View((value.ndim - 1,) if value.ndim else ()), [use])

    def _dot_general(self, eqn: JaxprEqn, operands: list[Any], origins: list[Origins]) -> None:
        for side in (0, 1):
            weights = origins[side]
            if not weights or origins[1 - side] is not None:
                continue
            contract, batch = eqn.params["dimension_numbers"]
            pairs = sorted(
                zip(contract[side], contract[1 - side], strict=True),
                # Features in the order of the parameter's own axes.
                key=lambda pair: [atom.axis for atom in weights[0].axes[pair[0]]],
            )
            mine = tuple(axis for axis, _ in pairs)
            uses = [self._use(eqn, w, mine, tuple(batch[side])) for w in weights]
            features = tuple(axis for _, axis in pairs)
            view = View(features, tuple(batch[1 - side]), *self._mesh_axes(weights[0], mine))
            self.record(operands[1 - side], view, uses)

    def _use(
        self, eqn: JaxprEqn, origin: Origin, contracted: Sequence[int], batch: Sequence[int]
    ) -> Use:
        def atoms(axes: Sequence[int]) -> Axis:
            return tuple(atom for axis in axes for atom in origin.axes[axis])

        free = [i for i in range(len(origin.axes)) if i not in contracted and i not in batch]
        line = unofficial.source_line(eqn)
        return Use(origin.arg, line, atoms(contracted), atoms(batch), atoms(free))

    @staticmethod
    def _mesh_axes(
        origin: Origin, contracted: Sequence[int]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Mesh axes of the contracted axes of a weight, and of its others."""
        split: tuple[list[str], list[str]] = ([], [])
        for i, axis in enumerate(origin.axes):
            split[i not in contracted].extend(name for atom in axis for name in atom.mesh)
        return tuple(split[0]), tuple(split[1])

    def _convolution(self, eqn: JaxprEqn, x: Any, weights: tuple[Origin, ...]) -> None:
        """Patches of x as rows: features in the order of the kernel's own axes."""
        p = eqn.params
        spec = p["dimension_numbers"]
        kernel = unofficial.aval(eqn.invars[1]).shape
        in_axis, *spatial = spec.rhs_spec[1:]
        contracted = tuple(sorted([in_axis, *spatial]))
        uses = [self._use(eqn, w, contracted, ()) for w in weights]
        if not self.settings.statistics or p["batch_group_count"] != 1:
            self.record(x, View((x.ndim - 1,)), uses)
            return
        groups, channels = p["feature_group_count"], x.shape[spec.lhs_spec[1]]
        window = tuple(kernel[axis] for axis in spatial)
        patches = lax.conv_general_dilated_patches(
            lax.stop_gradient(dense(x)),
            window,
            p["window_strides"],
            p["padding"],
            lhs_dilation=p["lhs_dilation"],
            rhs_dilation=p["rhs_dilation"],
            dimension_numbers=lax.ConvDimensionNumbers(
                spec.lhs_spec, tuple(range(len(spec.rhs_spec))), spec.lhs_spec
            ),
            precision=lax.Precision.HIGHEST,
        )
        # [batch, *places, groups, inputs of a group, *window]
        patches = jnp.moveaxis(patches, (spec.lhs_spec[0], spec.lhs_spec[1]), (0, -1))
        patches = patches.reshape(*patches.shape[:-1], groups, channels // groups, *window)
        first = x.ndim - 1
        place = {in_axis: first + 1, **{axis: first + 2 + i for i, axis in enumerate(spatial)}}
        features = tuple(place[axis] for axis in contracted)
        view = View(features, (first,) if groups > 1 else ())
        if groups == 1:
            patches = patches.reshape(*patches.shape[:first], *patches.shape[first + 1 :])
            view = View(tuple(axis - 1 for axis in features))
        self.record(patches, view, uses)

    def _gather(self, eqn: JaxprEqn, table: Any, weights: tuple[Origin, ...]) -> None:
        sizes = eqn.params["slice_sizes"]
        features = tuple(i for i, size in enumerate(table.shape) if sizes[i] == size)
        for origin in weights:
            use = self._use(eqn, origin, features, ())
            self.observations.entries.append(
                Entry((Use(use.origin, use.line, use.contracted, (), use.free, False),))
            )
            self.observations.statistics.append({})

    def record(self, value: Any, view: View, uses: Sequence[Use]) -> None:
        """Note uses of a value; its statistic is computed at the first."""
        key = (id(value), view)
        self._alive.append(value)
        entries = self.observations.entries
        if key in self._entry:
            i = self._entry[key]
            entries[i] = Entry((*entries[i].uses, *uses), entries[i].later, entries[i].rows_over)
            return
        self._entry[key] = len(entries)
        if id(value) in self._arguments:
            entries.append(Entry(tuple(uses), (self._arguments[id(value)], view)))
            self.observations.statistics.append(None)
            return
        entries.append(Entry(tuple(uses), None, self._rows_over(value, view)))
        self.observations.statistics.append(self._statistic(value, view, uses))

    def _statistic(self, value: Any, view: View, uses: Sequence[Use]) -> dict[str, Any]:
        if not self.settings.statistics:
            return {}
        x = dense(value)
        for name in view.gather:
            x = lax.all_gather(x, name, axis=view.features[0], tiled=True)
        outer = [axis for axis in range(x.ndim) if axis not in view.features]
        rows = [axis for axis in outer if axis not in view.batch]
        weight = self._weights([x.shape[axis] for axis in outer], uses)
        weight = weight.transpose([outer.index(axis) for axis in (*view.batch, *rows)])
        batch = weight.shape[: len(view.batch)]
        count = math.prod(weight.shape[len(view.batch) :])
        x = x.transpose(*view.batch, *rows, *view.features)
        self.largest = max(self.largest, x.size)
        features = math.prod(x.shape[len(outer) :])
        return self.settings.compute(
            x.reshape(*batch, count, features), weight.reshape(*batch, count)
        )

    def _weights(self, shape: Sequence[int], uses: Sequence[Use]) -> Any:
        """Weight of every row, given the shape of all axes but the features."""
        mask, shape = self.mask, tuple(shape)
        if mask is None:
            return jnp.ones(shape, jnp.float32)
        mask = jnp.asarray(mask, jnp.float32)
        if shape[: mask.ndim] == mask.shape:  # [batch, tokens, ...]
            pass
        elif shape[:1] == (mask.size,):  # tokens of the batch in one axis
            mask = mask.reshape(-1)
        elif shape[:1] == mask.shape[:1]:  # one row of a sequence
            mask = mask.reshape(mask.shape[0], -1).max(axis=1)
        else:
            raise InputError(
                f"token_mask of shape {mask.shape} does not fit a value with rows {shape}, read at "
                f"{uses[0].line}; leave that weight out with exclude=, or pass no token_mask"
            )
        return jnp.broadcast_to(mask.reshape(*mask.shape, *(1,) * (len(shape) - mask.ndim)), shape)

    def _rows_over(self, value: Any, view: View) -> tuple[str, ...]:
        """Mesh axes, inside shard_map, over which the rows of a value are split."""
        split = set(jax.sharding.get_abstract_mesh().manual_axes)
        if self.shard_map is None or self.shard_map.check_vma:
            leaves = jax.tree.leaves(value)
            split &= {n for leaf in leaves for n in jax.typeof(leaf).manual_axis_type.varying}
        else:
            split &= self.shard_map.inputs_over
        return tuple(sorted(split - {*view.gather, *view.copies}))

    def absorb(
        self,
        seen: Observations,
        args: Sequence[Any],
        origins: Sequence[Origins],
        scanned_from: int | None = None,
    ) -> None:
        """Take over what an inner body observed.

        Args:
          seen: in terms of the body's arguments.
          args: what they are here.
          origins: of `args`.
          scanned_from: position of the first argument that the body saw one item of.
        """
        for entry, statistic in zip(seen.entries, seen.statistics, strict=True):
            uses = [u for use in entry.uses for u in self._mapped(use, args, origins, scanned_from)]
            if entry.later is not None:
                arg, view = entry.later
                self.record(args[arg], view, uses)
            elif uses:
                self.observations.entries.append(Entry(tuple(uses), None, entry.rows_over))
                self.observations.statistics.append(statistic)

    @staticmethod
    def _mapped(
        use: Use, args: Sequence[Any], origins: Sequence[Origins], scanned_from: int | None
    ) -> list[Use]:
        if isinstance(use.origin, str):
            return [use]
        skip = int(scanned_from is not None and use.origin >= scanned_from)
        shape = args[use.origin].shape[skip:]
        return [use.seen_from(origin, shape, skip) for origin in origins[use.origin] or ()]

    def returned(
        self, seen: Observations, args: Sequence[Any], origins: Sequence[Origins]
    ) -> list[Origins] | None:
        """Origins of the outputs of a call, given those of its arguments."""
        if not seen.returns:
            return None
        out: list[Origins] = []
        for inner in seen.returns:
            if inner is None:
                out.append(None)
                continue
            made: list[Origin] = []
            for part in inner:
                shape = args[part.arg].shape
                for outer in origins[part.arg] or ():
                    axes = tuple(compose(axis, outer, shape, 0) for axis in part.axes)
                    made.append(Origin(outer.arg, axes))
            out.append(tuple(made))
        return out

    def named_inside(self, eqn: JaxprEqn) -> bool:
        """Whether a name that is asked for stands in the bodies of an equation."""
        return bool(self.settings.names) and any(
            not _names(getattr(j, "jaxpr", j)).isdisjoint(self.settings.names)
            for j in jex.jaxprs_in_params(eqn.params)
        )


@functools.lru_cache(maxsize=1024)
def _names(jaxpr: Jaxpr) -> frozenset[str]:
    """Names of `checkpoint_name` in a jaxpr and the jaxprs in it."""
    found = {eqn.params["name"] for eqn in jaxpr.eqns if eqn.primitive.name == "name"}
    for eqn in jaxpr.eqns:
        for inner in jex.jaxprs_in_params(eqn.params):
            found |= _names(getattr(inner, "jaxpr", inner))
    return frozenset(found)
