"""The pieces of a model: what a calibrated method walks through, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Blocks, Model
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.core.readers.parts import parts


@dataclass(frozen=True)
class Piece:
    """A part of a model that takes a hidden state and gives the next one.

    Attributes:
      name: for messages: `embed`, `layers/3`, `head`, `model`.
      function: `function(params, hidden) -> hidden`; equal blocks share one function, so that it
        is compiled once.
      params: its parameters.
      selected: `{path within params: path in the model}` of what is to be compressed in it, with
        the index of a stacked block behind: `layers/up/kernel[3]`.
    """

    name: str
    function: Callable[[Any, Any], Any]
    params: Any
    selected: Mapping[str, str] = field(default_factory=dict)


class Pieces:
    """A model taken apart, and put together again.

    `embed`, the blocks and `head` where it has `blocks`; otherwise one piece, the whole.
    """

    def __init__(self, model: Model, chosen: Collection[str]) -> None:
        self.model = model
        walk = model.blocks
        if walk is None:
            whole = {path: path for path in chosen}
            self.pieces = [Piece("model", _unpacked(model.apply), model.params, whole)]
            return
        inside = {path for path in chosen if path.startswith(walk.where + "/")}
        outside = {path: path for path in chosen if path not in inside}
        blocks = walk.of(model.params)
        stacked = not _one_by_one(walk, model.params)
        self.pieces = [
            Piece("embed", _unpacked(walk.embed), model.params),
            *(
                Piece(f"{walk.where}/{i}", walk.block, block, _within(walk, i, inside, stacked))
                for i, block in enumerate(blocks)
            ),
            Piece("head", walk.head, model.params, outside),
        ]

    def assemble(self, leaves: Mapping[str, Any]) -> Any:
        """The model's parameters with the leaves of these paths (as `Piece.selected` has them)."""
        walk = self.model.blocks
        params = map_with_paths(lambda path, leaf: leaves.get(path, leaf), self.model.params)
        if walk is None or not any(leaf for piece in self.pieces[1:-1] for leaf in piece.selected):
            return params
        blocks = [
            with_leaves(piece.params, {p: leaves[full] for p, full in piece.selected.items()})
            for piece in self.pieces[1:-1]
        ]
        try:
            return walk.put(params, blocks)
        except (TypeError, ValueError) as error:
            raise InputError(
                "the compressed layers differ in format and cannot be stacked; load the model with "
                "scan_layers=False"
            ) from error


class Cutter:
    """Cuts pieces into parts, see `core.readers.parts`; pieces that are alike share functions."""

    def __init__(self) -> None:
        self.known: dict[Any, list[tuple[Callable[[Any, Any], Any], list[str]]]] = {}

    def __call__(
        self, piece: Piece, hidden: Any, groups: Callable[[], Sequence[Sequence[str]]]
    ) -> list[Piece]:
        """The parts, each with all parameters of the piece and the selected ones that it reads.

        Args:
          piece: of which some are selected.
          hidden: shapes of what it is given.
          groups: the selected paths that belong together, in the order of the program.
        """
        key = id(piece.function), tuple(piece.selected), _types((piece.params, hidden))
        if key not in self.known:
            paths = groups()
            self.known[key] = [
                (part.function, [path for i in part.groups for path in paths[i]])
                for part in parts(piece.function, piece.params, hidden, paths)
            ]
        return [
            replace(piece, function=function, selected={p: piece.selected[p] for p in inside})
            for function, inside in self.known[key]
        ]


def _types(tree: Any) -> Any:
    """What trees have in common that one program serves."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(x), str(getattr(x, "dtype", type(x)))) for x in leaves)


def with_leaves(params: Any, leaves: Mapping[str, Any]) -> Any:
    """`params` with other leaves under these paths."""
    return map_with_paths(lambda path, leaf: leaves.get(path, leaf), params)


def _unpacked(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda params, inputs: function(params, *inputs)


def _one_by_one(walk: Blocks, params: Any) -> bool:
    stored = params
    for key in walk.where.split("/"):
        stored = stored[key]
    return isinstance(stored, Sequence) or all(str(key).isdigit() for key in stored)


def _within(walk: Blocks, index: int, chosen: set[str], stacked: bool) -> dict[str, str]:
    prefix = f"{walk.where}/" if stacked else f"{walk.where}/{index}/"
    end = f"[{index}]" if stacked else ""
    return {
        path.removeprefix(prefix): path + end for path in sorted(chosen) if path.startswith(prefix)
    }


def shapes_by_path(params: Any) -> dict[str, Any]:
    """Array leaves by path."""
    return {path: leaf for path, leaf in leaves_with_paths(params) if hasattr(leaf, "ndim")}
