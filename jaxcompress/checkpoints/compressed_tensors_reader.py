"""Reads compressed-tensors directories onto compressed arrays, bit for bit.

| on disk | becomes |
|---|---|
| `pack-quantized`, 1 to 8 bits, also in the layout of before June 2026 | `Affine` |
| the same with `weight_g_idx` (columns assigned to groups freely) | dense |
| `int-quantized` | `Affine` |
| `float-quantized`, `naive-quantized`, `mxfp8`, `mxfp6`, `mxfp4`, `nvfp4` | `Float` |
| inputs that are rounded per tensor, token or group | `QuantizedInput` around the weight |
| inputs rounded to codes with coded scales (NVFP4, MXFP4, ... of both) | the weight alone |
| `sparse-bitmask`, `sparse-24-bitmask` (up to compressed-tensors 0.14) | dense |
| `dense` | dense |
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxcompress.checkpoints.bitstreams import dense_in_order, dense_stream, is_padded
from jaxcompress.checkpoints.compressed_tensors_sparse import decode_bitmask
from jaxcompress.checkpoints.quantized_modules import (
    QuantizedModules,
    config_dtype,
    modules_with,
)
from jaxcompress.checkpoints.tensors import TensorSource, unknown_tensor
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import STORED, Dims
from jaxcompress.core.arrays.floats import Float
from jaxcompress.core.arrays.inputs import QuantizedInput
from jaxcompress.core.arrays.shared_rows import share_rows
from jaxcompress.core.errors import InputError
from pallas_kernels.packing import pack, packed_words, unpack

# Tensors that say how another one is stored; the module's `weight` stands for all of them.
PARTS = (
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale",
    "output_scale", "output_zero_point", "compressed", "bitmask", "shape", "row_offsets",
)  # fmt: skip
WHOLE = ("weight_packed", "weight", "compressed")
_SCALES = {np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
ELEMENTS = {4: "e2m1", 6: "e2m3", 8: "e4m3fn"}  # by bits
SCALE_FORMATS = {np.dtype(np.uint8): "e8m0", _FLOAT8: "e4m3fn"}  # by dtype; others are "float"


class CompressedTensors(QuantizedModules):
    """A compressed-tensors checkpoint as the tensors that it stands for.

    Args:
      checkpoint: the opened directory.
      config: its config.json, with the `quantization_config` in it. Where no scale says the dtype
        that a weight stands for, it is that of config.json, bfloat16 where that says nothing.
      dims: how the axes of what `read` gives factor over the stored matrix [out, in].
    """

    what = "compressed-tensors"

    def __init__(
        self, checkpoint: TensorSource, config: Mapping[str, Any], dims: Dims = STORED
    ) -> None:
        modules = modules_with(checkpoint, "weight_packed", "weight_scale", "bitmask")
        super().__init__(checkpoint, config, modules, PARTS)
        self._dims = dims

    def decode(self, module: str, parts: dict[str, np.ndarray]) -> Any:
        """See `QuantizedModules`."""
        whole = next((part for part in WHOLE if part in parts), None)
        if whole is None:
            raise unknown_tensor(self.what, f"{module}.weight", self._stored)
        if whole == "compressed":
            return decode_bitmask(parts)
        if "weight_scale" not in parts:
            return parts["weight"]
        group = _group(self._config, module)
        decode = DECODERS.get((whole, parts[whole].dtype))
        if decode is None:
            raise ValueError(f"{whole} in {parts[whole].dtype}")
        weight = decode(parts, group["weights"], self.dtype(module), self._dims)
        return _with_input(weight, parts, group.get("input_activations"))

    def is_compressed(self, name: str) -> bool:
        """Whether `read` may give a compressed array."""
        return f"{self._modules.get(name)}.weight_scale" in self._stored

    def shape(self, module: str) -> tuple[int, ...]:
        """Shape of the dense weight of a module."""
        for part in ("weight_shape", "shape"):
            if f"{module}.{part}" in self._stored:
                said = self._checkpoint.read(f"{module}.{part}").reshape(-1)
                return tuple(int(n) for n in said)
        whole = next(part for part in WHOLE if f"{module}.{part}" in self._stored)
        rows, columns = self._checkpoint.info(f"{module}.{whole}").shape
        bits = _group(self._config, module)["weights"]["num_bits"]
        return rows, columns * 8 // bits if whole == "weight_packed" else columns

    def dtype(self, module: str) -> np.dtype:
        """Dtype of the dense weight of a module."""
        if f"{module}.weight_scale" not in self._stored:
            return self._checkpoint.info(f"{module}.compressed").dtype
        scale = self._checkpoint.info(f"{module}.weight_scale").dtype
        return scale if scale in _SCALES else config_dtype(self._config, ml_dtypes.bfloat16)


def decode_module(
    reader: TensorSource, name: str, config: Mapping[str, Any], *, dims: Dims = STORED
) -> Any:
    """The weight of one module; see `CompressedTensors`, like `reader`, `config` and `dims`.

    Args:
      name: of the module, without `.weight`.

    Raises:
      InputError: no such module, parts that are missing or contradict each other, or a format
        that is not read here.
    """
    return CompressedTensors(reader, config, dims).read(f"{name}.weight")


def _group(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config group that a module belongs to.

    Exact names and regular expressions go before class names, of which `Linear` goes first.

    Raises:
      InputError: there is none.
    """
    for key in ("quantization_config", "compression_config"):
        config = config.get(key) or config
    groups = [g for g in (config.get("config_groups") or {}).values() if isinstance(g, dict)]

    def precedence(group: dict[str, Any]) -> int:
        targets = [t for t in group.get("targets", []) if isinstance(t, str)]
        if name in targets:
            return 0
        if any(t.startswith("re:") and re.match(t[3:], name) for t in targets):
            return 1
        return 2 if "Linear" in targets else 3

    usable = [group for group in groups if isinstance(group.get("weights"), dict)]
    if not usable:
        raise InputError(f"{name}: quantized, but no group of quantization_config describes it")
    return min(usable, key=precedence)


def _packed_integers(
    parts: dict[str, np.ndarray], arguments: dict[str, Any], logical: np.dtype, dims: Dims
) -> Any:
    """`Affine` from the words of `weight_packed`; dense where groups are not in order."""
    bits, packed = _bits(arguments), parts["weight_packed"]
    rows, columns = (int(n) for n in parts["weight_shape"])
    if packed.shape[:1] != (rows,) or packed.ndim != 2 or columns < 1:
        raise ValueError(f"weight_packed {packed.shape} for a weight of {(rows, columns)}")
    scale, _ = _shared(parts["weight_scale"], (rows, columns), {})
    padded = is_padded(packed, columns, bits)
    zero = None
    if not arguments.get("symmetric", True):
        stored = np.ascontiguousarray(parts["weight_zero_point"].T)
        if stored.dtype == np.int8:
            zero = _unsigned(stored, bits).reshape(scale.shape)
        else:
            padded = is_padded(stored, len(scale), bits) if padded is None else padded
            words = dense_stream(stored, len(scale), bits, padded)
            zero = np.asarray(unpack(words, bits, len(scale))).T.reshape(scale.shape)
    codes = dense_stream(packed, columns, bits, padded)
    leaf = _affine(codes, scale, zero, bits, columns, dims, None)
    order = parts.get("weight_g_idx")
    if order is not None and (order >= 0).all():
        regular = np.arange(columns) // (columns // scale.shape[1])
        if not np.array_equal(order, regular):
            return dense_in_order(leaf, order)
    return leaf


def _shared(
    scale: np.ndarray, shape: tuple[int, int], arguments: Mapping[str, Any]
) -> tuple[Any, int | None]:
    """A scale (or zero point) of any strategy as [rows or 1, groups], compressed where of blocks.

    Besides, the columns of a group where the last one has fewer.
    """
    rows, columns = shape
    if arguments.get("strategy") == "block":
        high, wide = (int(n) for n in arguments["block_structure"])
        if min(high, wide) < 1 or scale.shape != (-(-rows // high), -(-columns // wide)):
            raise ValueError(f"weight_scale {scale.shape} for a weight of {shape}")
        width = wide if columns > wide and columns % wide else None
        return share_rows(jnp.asarray(scale), rows, high), width
    if scale.size == 1:
        return scale.reshape(1, 1), None
    scale = scale.reshape(len(scale), -1)
    if scale.shape[0] != rows or columns % scale.shape[1]:
        raise ValueError(f"weight_scale {scale.shape} for a weight of {shape}")
    return scale, None


def _bits(arguments: dict[str, Any]) -> int:
    bits = arguments["num_bits"]
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"num_bits {bits!r}, not 1 to 8")
    return bits


def _unsigned(signed: np.ndarray, bits: int) -> np.ndarray:
    return (signed.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)


def _affine(
    codes: np.ndarray,
    scale: Any,
    zero: Any,
    bits: int,
    columns: int,
    dims: Dims,
    width: int | None,
) -> Affine:
    if isinstance(scale, np.ndarray):
        scale, zero = jnp.asarray(scale), None if zero is None else jnp.asarray(zero)
    casts = (str(scale.dtype),)
    return Affine(jnp.asarray(codes), scale, zero, bits, -columns % 32, dims, casts, width=width)


def _integers(
    parts: dict[str, np.ndarray], arguments: dict[str, Any], logical: np.dtype, dims: Dims
) -> Affine:
    """`Affine` from int8 values."""
    weight, bits = parts["weight"], _bits(arguments)
    shape = (weight.shape[0], weight.shape[1])
    scale, width = _shared(parts["weight_scale"], shape, arguments)
    zero = None
    if not arguments.get("symmetric", True):
        zero = _shared(_unsigned(parts["weight_zero_point"], bits), shape, arguments)[0]
        if zero.shape != scale.shape:
            raise ValueError(f"weight_zero_point {zero.shape} beside scales {scale.shape}")
    u = weight.astype(np.int16) + 2 ** (bits - 1)
    if u.min(initial=0) < 0 or u.max(initial=0) >= 2**bits:
        raise ValueError(f"values beyond {bits} bits")
    codes = np.asarray(pack(u.astype(np.uint8), bits))
    return _affine(codes, scale, zero, bits, shape[1], dims, width)


def _floats(
    parts: dict[str, np.ndarray], arguments: dict[str, Any], logical: np.dtype, dims: Dims
) -> Float:
    """`Float` from codes: bytes, or a bitstream along a row, the first one lowest."""
    bits, whole = arguments["num_bits"], parts.get("weight_packed", parts.get("weight"))
    assert whole is not None
    if bits not in ELEMENTS or arguments.get("type") != "float" or whole.ndim != 2:
        raise ValueError(f"{arguments.get('type')} of {bits} bits in {whole.dtype} {whole.shape}")
    stream = whole.view(np.uint8)
    columns = stream.shape[1] * 8 // bits
    if not arguments.get("symmetric", True):
        raise ValueError("floats with a zero point")
    scale, width = _shared(parts["weight_scale"], (len(stream), columns), arguments)
    scale_format = SCALE_FORMATS.get(scale.dtype, "float")
    if scale_format == "e4m3fn":
        scale = scale.view(np.uint8)
    share = parts["weight_global_scale"] if scale_format == "e4m3fn" else None
    stream = np.pad(stream, ((0, 0), (0, 4 * packed_words(columns, bits) - stream.shape[1])))
    return Float(
        jnp.asarray(np.ascontiguousarray(stream).view(np.int32)),
        jnp.asarray(scale) if isinstance(scale, np.ndarray) else scale,
        None if share is None else jnp.asarray(share.astype(np.float32).reshape(1, 1)),
        ELEMENTS[bits],
        scale_format,
        -columns % 32,
        dims,
        (str(logical),),
        width,
    )


DECODERS: dict[tuple[str, np.dtype], Any] = {
    ("weight_packed", np.dtype(np.int32)): _packed_integers,
    ("weight_packed", np.dtype(np.uint8)): _floats,
    ("weight", np.dtype(np.int8)): _integers,
    ("weight", _FLOAT8): _floats,
}


def _with_input(weight: Any, parts: dict[str, np.ndarray], arguments: Any) -> Any:
    """`weight` with what is said of its input, as far as `QuantizedInput` can do it."""
    if not arguments:
        return weight
    bits, kind, strategy = (arguments[key] for key in ("num_bits", "type", "strategy"))
    dynamic, symmetric = arguments.get("dynamic", False), arguments.get("symmetric", True)
    known = ("token", "tensor", "group") if dynamic is True else ("tensor",)
    whole_floats = kind == "float" and bits == 8 and symmetric
    integers = kind == "int" and 2 <= bits <= 8
    coded = arguments.get("scale_dtype") is not None
    if strategy not in known or coded or not (whole_floats or integers):
        warnings.warn(
            f"compressed-tensors: inputs of {bits} bits ({kind}, {strategy}) are not rounded here",
            stacklevel=2,
        )
        return weight
    scale = zero = None
    if not dynamic:
        scale = jnp.asarray(parts["input_scale"]).reshape(1, 1)
        if not symmetric:
            zero = jnp.asarray(_unsigned(parts["input_zero_point"], bits)).reshape(1, 1)
    return QuantizedInput.of(
        weight if isinstance(weight, (Affine, Float)) else jnp.asarray(weight),
        input_scale=scale,
        input_zero_point=zero,
        input_dtype=f"int{bits}" if kind == "int" else "fp8",
        symmetric=symmetric,
        granularity=strategy,
        group_size=arguments.get("group_size") if strategy == "group" else None,
    )
