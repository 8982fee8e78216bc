"""Quantized leaves as compressed-tensors stores them: what transformers and vLLM load.

A quantized module `X` of `[out, in]` is stored in one of the formats of `FORMATS`:

| format | of | `X.weight_packed` or `X.weight` | `X.weight_scale` |
|---|---|---|---|
| `pack-quantized` | `Affine` | int32 `[out, ceil(in * bits / 32)]`, codes q + 2^(bits-1) | float |
| `int-quantized` | `Affine` whose input is rounded | int8 `[out, in]`, q | float |
| `float-quantized` | `Float` | float8_e4m3fn `[out, in]` | float |
| `mxfp8-quantized` | `Float`, E8M0 scales | float8_e4m3fn `[out, in]` | uint8 `[out, in / 32]` |
| `mxfp6-`, `mxfp4-pack-quantized` | the same | uint8 `[out, in * bits / 8]` | the same |
| `nvfp4-pack-quantized` | `Float`, two scales | the same | float8_e4m3fn `[out, in / 16]` |

Packed codes are dense bitstreams along `in`, least significant bit first: those in memory. Scales
are `[out, groups]`, `[out, 1]` per channel, `[1]` per tensor, `[out / 128, in / 128]` of blocks.
Besides: `X.weight_shape` int64 `[2]` of `pack-quantized`; `X.weight_global_scale` float32 `[1]` of
NVFP4, by which scales are divided; `X.weight_zero_point` where asymmetric, int8 of the shape of the
scale, or packed along `out` in int32; `X.input_scale` `[1]` and `X.input_zero_point` where the
input's scale is static. config.json describes it under `quantization_config`.

Source: https://github.com/vllm-project/compressed-tensors. Both ways keep every bit;
`compressed_tensors_reader.py` is the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.arrays.floats import Float
from jaxcompress.core.arrays.inputs import FLOATS, INTEGERS, QuantizedInput
from jaxcompress.core.arrays.shared_rows import SharedRows, share_rows
from jaxcompress.core.errors import InputError
from pallas_kernels.packing import pack

VERSION = "0.20.0"  # of compressed-tensors, whose layout this is: dense bitstreams for all widths
BLOCK = 128  # the side of a block, where shapes do not tell
PACKED, SIGNED = "pack-quantized", "int-quantized"
MIXED = "mixed-precision"

# By (element, scale_format) of `Float`.
FLOAT_FORMATS = {
    ("e4m3fn", "float"): "float-quantized",
    ("e4m3fn", "e8m0"): "mxfp8-quantized",
    ("e2m3", "e8m0"): "mxfp6-pack-quantized",
    ("e2m1", "e8m0"): "mxfp4-pack-quantized",
    ("e2m1", "e4m3fn"): "nvfp4-pack-quantized",
}
SCALE_DTYPES = {"float": None, "e8m0": "torch.uint8", "e4m3fn": "torch.float8_e4m3fn"}

ASYMMETRIC_WARNING = (
    "asymmetric zero points: vLLM and compressed-tensors itself read them, but transformers 5.23 "
    "with compressed-tensors 0.20 fails to load such a directory; quantize symmetrically for it"
)
BFLOAT16_WARNING = (
    "compressed-tensors 0.20 decodes scales that are codes to bfloat16 whatever the model is in: "
    "transformers runs such a directory with dtype='bfloat16' only"
)
GLOBAL_SCALE_WARNING = (
    "global scales of NVFP4 differ within {}: transformers takes them as they are, servers that "
    "fuse these matrices (vLLM) want one"
)
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by servers, into one matrix


@dataclass(frozen=True)
class Arguments:
    """How weights or inputs are quantized: an entry of a config group, in its own words.

    Attributes:
      num_bits: of a code.
      type: "int" or "float".
      symmetric: no zero point.
      strategy: what shares a scale: "tensor", "channel", "group", "tensor_group" (NVFP4), "block";
        of inputs "tensor", "token" or "group".
      group_size: columns of a group.
      block_structure: rows and columns of a block.
      scale_dtype: PyTorch's name of the dtype of scales that are codes.
      dynamic: of inputs: scales are found anew.
    """

    num_bits: int
    type: str = "int"
    symmetric: bool = True
    strategy: str = "group"
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    scale_dtype: str | None = None
    dynamic: bool = False

    def as_json(self) -> dict[str, Any]:
        """The entry of the config group."""
        entry = asdict(self) | {"zp_dtype": self.scale_dtype}
        return {k: v for k, v in entry.items() if v is not None or k == "group_size"}


@dataclass(frozen=True)
class Scheme:
    """How a module is quantized: a config group without its targets.

    Attributes:
      format: a name of `FORMATS`.
      weights: of the weight.
      inputs: of what it is multiplied with; None: that is not rounded.
    """

    format: str
    weights: Arguments
    inputs: Arguments | None = None

    @property
    def parts(self) -> list[str]:
        """Names of the tensors, without the module's."""
        names = list(FORMATS[self.format].parts)
        names += [] if self.weights.symmetric else ["weight_zero_point"]
        if self.inputs is not None and not self.inputs.dynamic:
            names += ["input_scale"] + ([] if self.inputs.symmetric else ["input_zero_point"])
        return names


def refusal(leaf: Any) -> str | None:
    """Why compressed-tensors cannot hold a leaf (of arrays or of shapes); None: it can."""
    weight = leaf.weight if isinstance(leaf, QuantizedInput) else leaf
    if isinstance(leaf, QuantizedInput) and leaf.input_dtype not in ("fp8", *INTEGERS):
        return f"compressed-tensors has no form for inputs in {leaf.input_dtype}"
    if isinstance(weight, Affine):
        if weight.has_kernel:
            return None
        return (
            "compressed-tensors packs integers of 1 to 8 bits, with whole zero points and equal "
            "groups"
        )
    if isinstance(weight, Float):
        form = (weight.element, weight.scale_format)
        if form not in FLOAT_FORMATS:
            return f"compressed-tensors has no form for {weight.element} with {form[1]} scales"
        if weight.contracted % weight.group_size and not isinstance(weight.scale, SharedRows):
            return "compressed-tensors has groups of equal size"
        return None
    return f"compressed-tensors has no form for {type(weight).__name__}"


def scheme_of(leaf: Any) -> Scheme:
    """The scheme that a config group must state for `leaf` (of arrays or of shapes).

    Raises:
      InputError: there is none; see `refusal`.
    """
    why = refusal(leaf)
    if why is not None:
        raise InputError(f"{why}; save as native, or dense")
    inputs = None
    if isinstance(leaf, QuantizedInput):
        inputs, leaf = _input_arguments(leaf), leaf.bare()
    if isinstance(leaf, Float):
        form = FLOAT_FORMATS[leaf.element, leaf.scale_format]
        weights = Arguments(
            leaf.bits, "float", scale_dtype=SCALE_DTYPES[leaf.scale_format], **_sharing(leaf, True)
        )
        return Scheme(form, weights, inputs)
    form = PACKED if inputs is None else SIGNED
    leaf = jax.eval_shape(lambda x: x.with_layout("canonical"), leaf)
    sharing = _sharing(leaf, form == SIGNED)
    return Scheme(form, Arguments(leaf.bits, symmetric=leaf.symmetric, **sharing), inputs)


def objection_of_transformers(leaf: Any) -> str | None:
    """Why transformers 5.23 does not run a directory with `leaf`; None: it does."""
    scheme = scheme_of(leaf)
    if scheme.format == PACKED and not scheme.weights.symmetric:
        return ASYMMETRIC_WARNING
    if scheme.weights.scale_dtype is not None and leaf.dtype != jnp.bfloat16:
        return BFLOAT16_WARNING
    return None


def encode_module(name: str, leaf: Any) -> dict[str, np.ndarray]:
    """The tensors of one module.

    Args:
      name: of the module, `model.layers.0.mlp.up_proj`.
      leaf: a compressed array of one matrix, whatever its `dims`: its stored matrix [N, K] is
        [out, in]; or a dense array, which becomes `X.weight` as it is.

    Returns:
      Tensors by name.

    Raises:
      InputError: an array that has no form (`refusal`), or leading axes (index it first).
    """
    if not is_compressed(leaf):
        return {f"{name}.weight": np.asarray(leaf)}
    try:
        scheme = scheme_of(leaf)
        if leaf.lead:
            raise InputError(f"{leaf.lead} stacked matrices; a module holds one, index it")
        parts = _input_parts(leaf) if isinstance(leaf, QuantizedInput) else {}
        weight = leaf.bare() if isinstance(leaf, QuantizedInput) else leaf
        parts = FORMATS[scheme.format].encode(weight, scheme.weights) | parts
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return {f"{name}.{part}": np.ascontiguousarray(parts[part]) for part in scheme.parts}


def names_of_module(name: str, leaf: Any) -> list[str]:
    """Names of the tensors of `encode_module`; `leaf` may be of shapes."""
    return [f"{name}.{part}" for part in scheme_of(leaf).parts]


def quantization_config(
    schemes: Mapping[str, Scheme], *, ignore: Iterable[str] = (), by_name: bool = False
) -> dict[str, Any]:
    """The `quantization_config` entry of config.json.

    Args:
      schemes: the scheme of every quantized module, by its name.
      ignore: dense linear modules, by name (the head, for instance).
      by_name: name every module. Otherwise a single scheme targets the class `Linear`, which is
        wrong where embeddings are quantized too. Several schemes are always told apart by name.

    Raises:
      InputError: no module is quantized.
    """
    distinct = sorted(set(schemes.values()), key=str)
    if not distinct:
        raise InputError("compressed-tensors: no module is quantized; save as dense")
    by_name = by_name or len(distinct) > 1
    groups = {}
    for i, scheme in enumerate(distinct):
        names = sorted(name for name, its in schemes.items() if its == scheme)
        groups[f"group_{i}"] = {
            "targets": names if by_name else ["Linear"],
            "format": scheme.format,
            "weights": scheme.weights.as_json(),
            "input_activations": None if scheme.inputs is None else scheme.inputs.as_json(),
            "output_activations": None,
        }
    formats = {scheme.format for scheme in distinct}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(set(ignore) - set(schemes)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": VERSION,
    }


def warnings_of(leaves: Iterable[Any], global_scales: Mapping[str, float]) -> list[str]:
    """What there is to say of a directory.

    Args:
      leaves: of its modules (of arrays or of shapes).
      global_scales: of NVFP4, by module.
    """
    objections = (objection_of_transformers(leaf) for leaf in leaves)
    said = list(dict.fromkeys(why for why in objections if why is not None))
    parents = {name.rpartition(".")[0] for name in global_scales}
    for together in FUSED:
        sets = [{global_scales.get(f"{p}.{name}") for name in together} for p in parents]
        if any(len(values - {None}) > 1 for values in sets):
            said.append(GLOBAL_SCALE_WARNING.format(", ".join(together)))
    return said


def _sharing(leaf: Any, blocks: bool) -> dict[str, Any]:
    """What shares a scale: strategy, and the size of a group or block."""
    if isinstance(leaf.scale, SharedRows) and blocks:
        side = leaf.group_size if leaf.groups > 1 else _side(leaf)
        return {"strategy": "block", "block_structure": (side, side)}
    if isinstance(leaf, Float) and leaf.scale_format != "float":
        strategy = "group" if leaf.global_scale is None else "tensor_group"
        return {"strategy": strategy, "group_size": leaf.group_size}
    if leaf.groups > 1:
        return {"strategy": "group", "group_size": leaf.group_size}
    return {"strategy": "tensor" if leaf.scale.shape[-2] == 1 < leaf.rows else "channel"}


def _side(leaf: Any) -> int:
    """Of blocks that are as wide as the matrix or wider: a side that makes as many of them."""
    count = leaf.scale.values.shape[-2]
    sides = (BLOCK, leaf.contracted, -(-leaf.rows // count))
    fits = (s for s in sides if s >= leaf.contracted and -(-leaf.rows // s) == count)
    return next(fits, sides[-1])


def _stored_scale(leaf: Any, scale: Any, arguments: Arguments) -> np.ndarray:
    """A scale or zero point (an array or compressed) in the shape of its strategy."""
    if arguments.strategy == "block":
        assert arguments.block_structure is not None
        like = share_rows(scale.values, leaf.rows, arguments.block_structure[0])
        if not np.array_equal(like.index, scale.index):
            raise InputError("compressed-tensors has square blocks; save as native, or dense")
        return np.asarray(scale.values)
    whole = np.asarray(scale.matrix() if is_compressed(scale) else scale)
    return whole.reshape(1) if arguments.strategy == "tensor" else whole


def _integer_parts(leaf: Affine, arguments: Arguments) -> dict[str, np.ndarray]:
    """Scale, and the signed zero point where there is one."""
    wide = leaf.quantities()[0].dtype
    scale = _stored_scale(leaf, leaf.scale, arguments).astype(wide)
    if leaf.zero_point is None:
        return {"weight_scale": scale}
    zero = _stored_scale(leaf, leaf.zero_point, arguments).astype(np.int16)
    return {
        "weight_scale": scale,
        "weight_zero_point": (zero - 2 ** (leaf.bits - 1)).astype(np.int8),
    }


def _packed_integers(leaf: Affine, arguments: Arguments) -> dict[str, np.ndarray]:
    leaf = leaf.with_layout("canonical")
    rows, columns, bits = leaf.rows, leaf.contracted, leaf.bits
    parts = _integer_parts(leaf, arguments)
    if leaf.zero_point is not None and arguments.strategy != "tensor":
        unsigned = _stored_scale(leaf, leaf.zero_point, arguments).astype(np.uint8)
        packed = np.asarray(pack(unsigned.T, bits))[:, : -(-rows * bits // 32)]
        parts["weight_zero_point"] = packed.T
    return parts | {
        "weight_packed": np.asarray(leaf.codes)[:, : -(-columns * bits // 32)],
        "weight_shape": np.array([rows, columns], np.int64),
    }


def _integers(leaf: Affine, arguments: Arguments) -> dict[str, np.ndarray]:
    leaf = leaf.with_layout("canonical")
    signed = np.asarray(leaf.integers()).astype(np.int16) - 2 ** (leaf.bits - 1)
    return _integer_parts(leaf, arguments) | {"weight": signed.astype(np.int8)}


def _floats(leaf: Float, arguments: Arguments) -> dict[str, np.ndarray]:
    stream = np.ascontiguousarray(leaf.codes).view(np.uint8)
    codes = np.ascontiguousarray(stream[:, : leaf.contracted * leaf.bits // 8])
    parts: dict[str, np.ndarray] = {"weight_packed": codes}
    if leaf.bits == 8:
        parts = {"weight": codes.view(ml_dtypes.float8_e4m3fn)}
    scale = _stored_scale(leaf, leaf.scale, arguments)
    if leaf.scale_format == "float":
        scale = scale.astype(leaf.scales().dtype)
    elif leaf.scale_format == "e4m3fn":
        scale = scale.view(ml_dtypes.float8_e4m3fn)
    parts["weight_scale"] = scale
    if leaf.global_scale is not None:
        parts["weight_global_scale"] = np.asarray(leaf.global_scale, np.float32).reshape(1)
    return parts


def _input_arguments(leaf: QuantizedInput) -> Arguments:
    kind = "float" if leaf.input_dtype in FLOATS else "int"
    bits = INTEGERS.get(leaf.input_dtype, 8)
    if leaf.static:
        return Arguments(bits, kind, leaf.input_zero_point is None, "tensor")
    return Arguments(
        bits, kind, leaf.symmetric, leaf.granularity, group_size=leaf.group_size, dynamic=True
    )


def _input_parts(leaf: QuantizedInput) -> dict[str, np.ndarray]:
    """The static scale of the input, and its signed zero point."""
    parts = {}
    if leaf.input_scale is not None:
        parts["input_scale"] = np.asarray(leaf.input_scale).reshape(1)
    if leaf.input_zero_point is not None:
        middle = 2 ** (INTEGERS[leaf.input_dtype] - 1)
        zero = np.asarray(leaf.input_zero_point).astype(np.int16).reshape(1) - middle
        parts["input_zero_point"] = zero.astype(np.int8)
    return parts


class Layout(NamedTuple):
    """A format: the tensors that every module has, and how a weight becomes them."""

    parts: tuple[str, ...]
    encode: Callable[[Any, Arguments], dict[str, np.ndarray]]


FORMATS = {
    PACKED: Layout(("weight_packed", "weight_scale", "weight_shape"), _packed_integers),
    SIGNED: Layout(("weight", "weight_scale"), _integers),
    "float-quantized": Layout(("weight", "weight_scale"), _floats),
    "mxfp8-quantized": Layout(("weight", "weight_scale"), _floats),
    "mxfp6-pack-quantized": Layout(("weight_packed", "weight_scale"), _floats),
    "mxfp4-pack-quantized": Layout(("weight_packed", "weight_scale"), _floats),
    "nvfp4-pack-quantized": Layout(
        ("weight_packed", "weight_scale", "weight_global_scale"), _floats
    ),
}
