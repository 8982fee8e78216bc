"""Every method by its name, and `compress`: a method run over a model or a parameter tree."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxcompress import factorization, pruning, quantization
from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Chain, Link, Method
from jaxcompress.core.model import Model, of_arrays
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.core.selection import Selection, nearest
from jaxcompress.layerwise.calibrate import Calibration, compress_calibrated, contracted_axes
from jaxcompress.layerwise.problem import Problem, StoredMatrix
from jaxcompress.layerwise.run import Run
from jaxcompress.layerwise.walk import Journal, Sequential, Settings
from jaxcompress.models import linear_paths
from jaxcompress.progress import progress

FOLDS = quantization.FOLDS
# Gradients of the whole model ask for several times the memory of a walk through its blocks.
TUNED_AT_MOST = 2_000_000_000
METHODS: dict[str, Method] = {
    **quantization.METHODS,
    **pruning.METHODS,
    **factorization.METHODS,
}

DEFAULT_INCLUDE = "**/kernel"


def method_named(name: str) -> Method:
    """The method of this name, or the chain of several joined by "+", such as "quarot+gptq".

    In a chain the names of `quantization.FOLDS` mean the fold alone.

    Raises:
      InputError: there is none; names the nearest.
    """
    *first, last = name.split("+")
    known = {**METHODS, **FOLDS} if first else METHODS
    for part in (*first, last):
        if part not in known:
            raise InputError(f"method {part!r}: unknown; {nearest(part, known)}")
    if not first:
        return METHODS[name]
    ending = METHODS[last]  # a fold at the end is followed by its rounding
    return Chain.of(*(Link(part, known[part]) for part in first), Link(last, ending))


def is_method(name: str) -> bool:
    """Whether `method_named` knows this name."""
    *first, last = name.split("+")
    return last in METHODS and all(part in METHODS or part in FOLDS for part in first)


def best_method(
    options: Mapping[str, Any], calibration: Any = None, parameters: int | None = None
) -> str:
    """The name behind "auto": the best method known here that can do what is asked.

    Args:
      options: those that were given; a `sparsity` or a `pattern` asks for pruning.
      calibration: data, or None.
      parameters: how many the model has; of more than `TUNED_AT_MOST` no scales are trained.
    """
    known = {option for method in METHODS.values() for option in method.options}
    asked = {name for name, given in options.items() if given is not None} & known
    whole = parameters is None or parameters <= TUNED_AT_MOST
    if {"sparsity", "pattern"} & asked:
        best = ["magnitude"]
        if calibration is not None:
            whole_blocks = str(options.get("pattern")).startswith("block:")
            best = ["wanda"] if whole_blocks else ["kronecker", "sparsegpt", "wanda"]
            if "bits" in asked and whole:
                best = ["kronecker+tune", *best]
    else:
        rounding = "coordinate+tune" if whole else "coordinate"
        best = ["rtn"] if calibration is None else [rounding, "gptq", "rtn"]
    asked.discard("activations")  # which makes a link of its own
    able = (name for name in best if asked <= set(method_named(name).options))
    return next(able, best[0])


def resolved(
    name: str,
    options: Mapping[str, Any],
    calibration: Any = None,
    parameters: int | None = None,
) -> tuple[str, Method]:
    """The method that a person means by a name and options.

    "auto" is `best_method`; with an option `activations`, a method of weights is followed by the
    one of that name.

    Args:
      name: see `method_named`, or "auto".
      options: those that were given.
      calibration: data, or None.
      parameters: see `best_method`.

    Raises:
      InputError: there is no such method.
    """
    if name == "auto":
        name = best_method(options, calibration, parameters)
    method = method_named(name)
    if options.get("activations") is not None and "activations" not in method.options:
        name += "+activations"
        method = Chain.of(Link(name, method), Link("activations", METHODS["activations"]))
    return name, method


def compress(
    model: Model,
    method: str | Method = "auto",
    *,
    include: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    axes: Mapping[str, tuple[int, ...]] | None = None,
    calibration: Any = None,
    calibration_samples: int = 32,
    ctx: int = 512,
    seed: int = 0,
    sequential: Sequential | None = None,
    dense_target: float | None = None,
    mesh: Mesh | None = None,
    journal: Journal | None = None,
    dense: Model | None = None,
    **options: Any,
) -> Model:
    """`model` compressed by a method; the parameters change, the function does not.

    Args:
      model: what is compressed.
      method: a name of `METHODS`, several joined by "+", a `Method` of one's own, or "auto": see
        `best_method`.
      include: patterns of the paths to compress (`core.selection`); by default the linear weights
        of the reference models, elsewhere every `kernel`.
      exclude: patterns of paths left alone.
      overrides: options by pattern, such as `{"layers/0/**": {"bits": 8}}`.
      axes: contracted axes by path, from `contractions`; by default kernels are `[in, out]`.
        Methods that need data read them off the model, and so do others where data are given.
      calibration: for methods that need data: a text file, a text, token ids `[samples, ctx]`;
        other inputs; see `layerwise.calibrate.Calibration.of`.
      calibration_samples: windows drawn from the text.
      ctx: tokens in a window.
      seed: of the draw.
      sequential: of methods of matrices that need data: where a matrix's inputs come from. "none":
        the dense model; "block": the blocks compressed before it; "matrix": also the matrices
        before it in its block.
      dense_target: 0: a matrix is to do what it did, to the inputs that it gets now; 1: to give
        what the dense model gives in its place; between them, a mix.
      mesh: the calibration data are split over its "data" and "fsdp", the matrices over all of it.
      journal: keeps the result of each matrix, so that a killed run need not do it again.
      dense: the model that methods such as "tune" are to come near to; in a chain, what came.
      **options: the method's own; `METHODS[name].options` lists them.

    Raises:
      InputError: an unknown method, option, pattern, or an option out of its range.
    """
    if isinstance(method, Method):
        chosen, method = method, method.function.__name__
    else:
        count = sum(getattr(leaf, "size", 0) for _, leaf in leaves_with_paths(model.params))
        method, chosen = resolved(method, options, calibration, count)
    used, unused = chosen.accepted(options)
    if unused:
        raise InputError(f"{method}: no option {unused[0]!r}; {nearest(unused[0], chosen.options)}")
    if not chosen.selects and (include or exclude or overrides or axes):
        raise InputError(f"{method}: takes the whole model; no include, exclude, overrides or axes")
    if chosen.needs == "calibration" and calibration is None:
        raise InputError(
            f"{method}: needs calibration data; pass calibration='text.txt' "
            f"(command line: --calibration text.txt)"
        )
    model, restored = of_arrays(model)
    data = None
    if calibration is not None and (chosen.needs != "nothing" or chosen.survey is not None):
        data = Calibration.of(calibration, model, samples=calibration_samples, ctx=ctx, seed=seed)
    if isinstance(chosen, Chain):
        general: dict[str, Any] = {"include": include, "exclude": exclude, "overrides": overrides}
        general |= {"axes": axes, "sequential": sequential, "dense_target": dense_target}
        general |= {"mesh": mesh, "journal": journal}
        inputs = None if data is None else data.all()
        return restored(_chained(model, chosen, used, general, inputs))
    if not chosen.per_matrix:
        if data is not None:
            used["calibration"] = data.all()
        if "dense" in chosen.parameters:
            if dense is None:
                raise InputError(
                    f"{method}: needs the dense model; use it behind a method: 'gptq+{method}'"
                )
            used["dense"] = dense
        return restored(chosen.function(model, **used))
    default = linear_paths(model)
    selection = Selection(include or default or DEFAULT_INCLUDE, exclude, overrides or {})
    if data is None:
        if axes is None and not default and calibration is not None:
            # No name tells which axes of somebody else's parameters are contracted.
            some = Calibration.of(calibration, model, samples=1, ctx=ctx, seed=seed)
            axes = contracted_axes(model, some)
        params = compress_params(
            model.params, chosen, selection, axes=axes, journal=journal, **used
        )
        return restored(model.replace(params=params))
    settings = Settings(
        chosen.statistics,
        sequential or chosen.sequential,  # type: ignore[arg-type]
        chosen.dense_target if dense_target is None else dense_target,
        mesh=mesh,
    )
    leaves = {path: leaf for path, leaf in leaves_with_paths(model.params) if hasattr(leaf, "ndim")}
    own = selection.resolve(leaves)
    run = Run(chosen, used)
    found = compress_calibrated(model, run, own, data, settings, journal=journal, what=method)
    return restored(model.replace(params=found.params, notes=(*model.notes, *found.notes)))


def _chained(
    model: Model, chain: Chain, used: Mapping[str, Any], general: Mapping[str, Any], data: Any
) -> Model:
    """The links one after the other; the last one of matrices keeps a journal."""
    start, journaled = model, max(
        (i for i, link in enumerate(chain.links) if link.method.per_matrix), default=-1
    )  # fmt: skip
    for i, link in enumerate(chain.links):
        following = chain.links[i + 1].method if i + 1 < len(chain.links) else None
        own = {**link.defaults, **{n: v for n, v in used.items() if n in link.method.options}}
        if link.method.produces == "sparse" and any(map(_rounds, chain.links[i + 1 :])):
            own.pop("bits", None)  # meant for the link that rounds, which keeps the mask
        if link.method.per_matrix:
            own |= {**general, "journal": general["journal"] if i == journaled else None}
        if "dense" in link.method.parameters:
            own["dense"] = start
        own["calibration"] = data
        if link.method.plan is not None and following is not None and following.per_matrix:
            planned = link.method.plan(model, list(_selection(model, general)), **own)
            general = {
                **general,
                "overrides": {**planned.overrides(), **(general["overrides"] or {})},
                "exclude": [*_patterns(general["exclude"]), *planned.dense()] or None,
            }
            continue
        model = compress(model, link.method, **own)
    return model


def _rounds(link: Link) -> bool:
    """Whether a link rounds weights to a number of bits that can be chosen."""
    return link.method.produces == "quantized" and "bits" in link.method.options


def _patterns(given: str | list[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or [])


def _selection(model: Model, general: Mapping[str, Any]) -> Mapping[str, Any]:
    """The selected paths of a model."""
    include = general["include"] or linear_paths(model) or DEFAULT_INCLUDE
    leaves = {path: leaf for path, leaf in leaves_with_paths(model.params) if hasattr(leaf, "ndim")}
    return Selection(include, general["exclude"], {}).resolve(leaves)


def quantize(
    params: Any,
    *,
    bits: int = 4,
    group_size: int = 128,
    include: str | list[str] = DEFAULT_INCLUDE,
    exclude: str | list[str] | None = None,
    axes: Mapping[str, tuple[int, ...]] | None = None,
    **options: Any,
) -> Any:
    """`params` with the selected leaves rounded to nearest. Options are those of `rtn`."""
    selection = Selection(include, exclude, {})
    return compress_params(
        params, "rtn", selection, axes=axes, bits=bits, group_size=group_size, **options
    )


def prune(
    params: Any,
    *,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    include: str | list[str] = DEFAULT_INCLUDE,
    exclude: str | list[str] | None = None,
    axes: Mapping[str, tuple[int, ...]] | None = None,
    **options: Any,
) -> Any:
    """`params` with the selected leaves pruned by magnitude. Options are those of `magnitude`."""
    selection = Selection(include, exclude, {})
    return compress_params(
        params, "magnitude", selection, axes=axes, sparsity=sparsity, pattern=pattern, **options
    )


def compress_params(
    params: Any,
    method: str | Method,
    selection: Selection,
    *,
    axes: Mapping[str, tuple[int, ...]] | None = None,
    journal: Journal | None = None,
    **options: Any,
) -> Any:
    """`params` with the selected leaves run through a per-matrix method, one after the other."""
    leaves = {path: leaf for path, leaf in leaves_with_paths(params) if hasattr(leaf, "ndim")}
    chosen = selection.resolve(leaves)
    matrices = {path: StoredMatrix.of(path, leaves[path], axes) for path in chosen}
    chosen_method = method if isinstance(method, Method) else method_named(method)
    run = Run(chosen_method, options)
    run.survey(
        lambda: ((path, m.matrix(), {"window": m.window}) for path, m in matrices.items()), chosen
    )
    done = {}
    for path, own in progress(chosen.items(), chosen_method.function.__name__, unit="matrix"):
        done[path] = None if journal is None else journal.get(path)
        if done[path] is None:
            start = time.perf_counter()
            result = run(Problem(path, matrices[path].matrix(), {}, own))
            done[path] = jax.block_until_ready(matrices[path].put_back(result))
            if journal is not None:
                journal.put(path, done[path], time.perf_counter() - start, **run.told[path])
    return map_with_paths(lambda path, leaf: done.get(path, leaf), params)


def compressed_shapes(
    model: Model,
    method: str,
    *,
    include: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Model | None:
    """What `compress` would give, with shapes for parameters; nothing is computed.

    Args:
      model: its parameters may be `jax.ShapeDtypeStruct`s.
      method: see `compress`, like the rest.

    Returns:
      The model; None where only the data can tell its shapes.

    Raises:
      InputError: what `compress` would raise, as far as shapes tell.
    """
    _, chosen = resolved(method, options)
    used, _ = chosen.accepted(options)
    if not chosen.per_matrix:
        shapes = chosen.shapes
        return None if shapes is None else on_shapes(lambda m: shapes(m, **used), model)
    selection = Selection(
        include or linear_paths(model) or DEFAULT_INCLUDE, exclude, overrides or {}
    )
    leaves = {path: leaf for path, leaf in leaves_with_paths(model.params) if hasattr(leaf, "ndim")}
    own = selection.resolve(leaves)
    run = Run(chosen, used)

    def shapes_of(path: str, leaf: Any) -> Any:
        if path not in own:
            return leaf
        return jax.eval_shape(lambda x: run.of_leaf(path, x, own[path]), leaf)

    return model.replace(params=map_with_paths(shapes_of, model.params))


def on_shapes(function: Callable[[Model], Model], model: Model) -> Model:
    """`function(model)`, with shapes for parameters; nothing is computed."""
    made: list[Model] = []
    leaves, tree = jax.tree.flatten(model.params)
    is_array = [hasattr(leaf, "dtype") for leaf in leaves]

    def traced(arrays: list[Any]) -> Any:
        given = iter(arrays)
        params = [next(given) if here else leaf for here, leaf in zip(is_array, leaves)]
        made.append(function(model.replace(params=jax.tree.unflatten(tree, params))))
        return made[-1].params

    params = jax.eval_shape(traced, [x for here, x in zip(is_array, leaves) if here])
    return made[-1].replace(params=params)
