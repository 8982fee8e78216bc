"""The product as a JAX primitive: differentiation, batching, and the choice when it is lowered.

The product is linear in x and in the scale. So two primitives are closed under differentiation of
any order, forward and reverse:

  product(x, scale):        y = x @ W^T, or x @ W
  scale_gradient(a, b):     the gradient of sum(a * (b @ W^T)) with respect to the scale

and what they keep for the reverse pass are their operands: x, scale and codes, no dense weight. As
a primitive is opaque until it is lowered, each platform gets its own implementation, be it the
host's or one that is only compiled for, and no other platform's is traced.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from pallas_kernels import wna16_reference, wna16_xla
from pallas_kernels.wna16_reference import Spec

# Tried first where the caller names none; "xla" takes every input.
DEFAULT_KERNELS = {"tpu": "mosaic_tpu", "cuda": "mosaic_gpu"}
IMPLEMENTATIONS = ("reference", "xla", "mosaic_tpu", "mosaic_gpu")

product_p = Primitive("wna16_product")
scale_gradient_p = Primitive("wna16_scale_gradient")


def _lowered_product(
    *operands: jax.Array, spec: Spec, platform: str, partitioned: bool
) -> jax.Array:
    """Runs the implementation that was named, or the first that supports the operands."""
    forms: dict[str, Callable[..., jax.Array]] = {
        "reference": wna16_reference.product,
        "xla": functools.partial(wna16_xla.product, platform=platform),
        "mosaic_tpu": functools.partial(_pallas_product, "wna16_tpu"),
        "mosaic_gpu": functools.partial(_pallas_product, "wna16_gpu"),
    }
    if spec.implementation is not None:
        return forms[spec.implementation](*operands, spec=spec)
    if platform in DEFAULT_KERNELS and not partitioned:
        try:
            return forms[DEFAULT_KERNELS[platform]](*operands, spec=spec)
        except NotImplementedError:
            pass  # the kernel says so of operands that it does not take
    return forms["xla"](*operands, spec=spec)


def _pallas_product(module: str, *operands: jax.Array, spec: Spec) -> jax.Array:
    # Pallas takes 0.4 s to import, which a process without such a device need not pay.
    return importlib.import_module(f"pallas_kernels.{module}").product(*operands, spec=spec)


def _lowered_scale_gradient(*operands: jax.Array, spec: Spec, groups: int) -> jax.Array:
    if spec.implementation == "reference":
        return wna16_reference.scale_gradient(*operands, spec=spec, groups=groups)
    return wna16_xla.scale_gradient(*operands, spec=spec, groups=groups)


def _auto_partitioned(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether the program runs on several devices and this part is not under a full shard_map."""
    context = ctx.module_context.axis_context
    mesh = getattr(context, "mesh", None)
    if mesh is None:
        return getattr(context, "num_devices", 1) not in (None, 1)
    manual = getattr(context, "manual_axes", frozenset()) | set(getattr(mesh, "manual_axes", ()))
    return mesh.size > 1 and manual != frozenset(mesh.axis_names)


def _product_rule(platform: str) -> Callable[..., Any]:
    def rule(ctx: mlir.LoweringRuleContext, *operands: Any, spec: Spec) -> Any:
        partitioned = spec.partitioned
        if partitioned is None:
            partitioned = _auto_partitioned(ctx)
        function = functools.partial(
            _lowered_product, spec=spec, platform=platform, partitioned=partitioned
        )
        return mlir.lower_fun(function, multiple_results=False)(ctx, *operands)

    return rule


def _product_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, spec: Spec) -> tuple[Any, Any]:
    x, scale, *codes = primals
    dx, dscale = tangents[:2]
    y = product_p.bind(*primals, spec=spec)
    terms = []
    if type(dx) is not ad.Zero:
        terms.append(product_p.bind(dx, scale, *codes, spec=spec))
    if type(dscale) is not ad.Zero:
        terms.append(product_p.bind(x, dscale, *codes, spec=spec))
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


def _product_transpose(
    ct: Any, x: Any, scale: Any, *codes: Any, spec: Spec
) -> tuple[Any | None, ...]:
    nothing = (None,) * len(codes)
    if type(ct) is ad.Zero:
        return None, None, *nothing
    if ad.is_undefined_primal(x):
        back = dataclasses.replace(
            _derived(spec), transpose=not spec.transpose, out_dtype=x.aval.dtype.name
        )
        return product_p.bind(ct, scale, *codes, spec=back), None, *nothing
    a, b = (x, ct) if spec.transpose else (ct, x)
    back = dataclasses.replace(_derived(spec), out_dtype=scale.aval.dtype.name)
    groups = scale.aval.shape[-1]
    return None, scale_gradient_p.bind(a, b, *codes, spec=back, groups=groups), *nothing


def _scale_gradient_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[Any, Any]:
    a, b, *codes = primals
    da, db = tangents[:2]
    gradient = scale_gradient_p.bind(*primals, **params)
    terms = []
    if type(da) is not ad.Zero:
        terms.append(scale_gradient_p.bind(da, b, *codes, **params))
    if type(db) is not ad.Zero:
        terms.append(scale_gradient_p.bind(a, db, *codes, **params))
    return gradient, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(gradient)


def _scale_gradient_transpose(
    ct: Any, a: Any, b: Any, *codes: Any, spec: Spec, groups: int
) -> tuple[Any | None, ...]:
    nothing = (None,) * len(codes)
    if type(ct) is ad.Zero:
        return None, None, *nothing
    linear = a if ad.is_undefined_primal(a) else b
    other = b if linear is a else a
    # b @ W^T has the shape of a, and a @ W that of b; here the scale of W is the cotangent.
    forward = dataclasses.replace(
        _derived(spec), transpose=linear is b, out_dtype=linear.aval.dtype.name
    )
    y = product_p.bind(other, ct, *codes, spec=forward)
    return (y, None, *nothing) if linear is a else (None, y, *nothing)


def _derived(spec: Spec) -> Spec:
    """The spec of a product that differentiation made: a kernel named for another is no order."""
    if spec.implementation in ("mosaic_tpu", "mosaic_gpu"):
        return dataclasses.replace(spec, implementation=None)
    return spec


def _product_batch(
    operands: Sequence[jax.Array], axes: Sequence[int | None], *, spec: Spec
) -> tuple[jax.Array, int]:
    axis, *weight_axes = axes
    if axis is not None and all(a is None for a in weight_axes):  # more rows, the same weight
        x = jnp.moveaxis(operands[0], axis, 1)
        b, v, m, _ = x.shape
        y = product_p.bind(x.reshape(b, v * m, -1), *operands[1:], spec=spec)
        return y.reshape(b, v, m, -1), 1
    return _batched_together(functools.partial(product_p.bind, spec=spec), operands, axes)


def _scale_gradient_batch(
    operands: Sequence[jax.Array], axes: Sequence[int | None], **params: Any
) -> tuple[jax.Array, int]:
    return _batched_together(functools.partial(scale_gradient_p.bind, **params), operands, axes)


def _batched_together(
    function: Callable[..., jax.Array], operands: Sequence[jax.Array], axes: Sequence[int | None]
) -> tuple[jax.Array, int]:
    """Folds the mapped axis of every operand into its leading axis B."""
    size = next(v.shape[a] for v, a in zip(operands, axes, strict=True) if a is not None)
    folded = []
    for v, axis in zip(operands, axes, strict=True):
        if axis is None:
            v = jnp.broadcast_to(v, (size, *v.shape))
        else:
            v = jnp.moveaxis(v, axis, 0)
        folded.append(v.reshape(-1, *v.shape[2:]))
    y = function(*folded)
    return y.reshape(size, -1, *y.shape[1:]), 0


@functools.lru_cache(maxsize=4096)
def _result_type(function: Callable[..., jax.Array], params: tuple, *avals: Any) -> Any:
    return jax.make_jaxpr(functools.partial(function, **dict(params)))(*avals).out_avals[0]


def _define(primitive: Primitive, function: Callable[..., jax.Array]) -> None:
    """The reference, traced on abstract operands, gives the result's type: dtype, shape, and the
    mesh axes over which it varies."""
    primitive.def_abstract_eval(
        lambda *avals, **params: _result_type(function, tuple(params.items()), *avals)
    )
    bind = jax.jit(primitive.bind, static_argnames=("spec", "groups"))

    def run(*operands: Any, **params: Any) -> Any:
        with jax.disable_jit(False):
            return bind(*operands, **params)

    primitive.def_impl(run)


_define(product_p, wna16_reference.product)
_define(scale_gradient_p, wna16_reference.scale_gradient)
ad.primitive_jvps[product_p] = _product_jvp
ad.primitive_jvps[scale_gradient_p] = _scale_gradient_jvp
ad.primitive_transposes[product_p] = _product_transpose
ad.primitive_transposes[scale_gradient_p] = _scale_gradient_transpose
batching.primitive_batchers[product_p] = _product_batch
batching.primitive_batchers[scale_gradient_p] = _scale_gradient_batch
mlir.register_lowering(product_p, _product_rule("cpu"))
for _platform in ("tpu", "cuda", "rocm"):
    mlir.register_lowering(product_p, _product_rule(_platform), platform=_platform)
mlir.register_lowering(
    scale_gradient_p, mlir.lower_fun(_lowered_scale_gradient, multiple_results=False)
)
