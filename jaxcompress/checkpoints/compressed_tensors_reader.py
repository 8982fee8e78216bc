"""Reads compressed-tensors directories: integers onto `Affine`, everything else onto dense arrays.

| on disk | becomes |
|---|---|
| `pack-quantized`, 1 to 8 bits, also in the layout of before June 2026 | `Affine`, bit for bit |
| the same with `weight_g_idx` (columns assigned to groups freely) | dense |
| `int-quantized` (W8A8, W4A8 weights) | `Affine` |
| `float-quantized`, `naive-quantized`, `mxfp8`, `mxfp4`, `nvfp4` | dense |
| `sparse-bitmask`, `sparse-24-bitmask` (up to compressed-tensors 0.14) | dense |
| `dense` | dense |
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxcompress.checkpoints.tensors import TensorInfo, TensorSource, check_rows, unknown_tensor
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import STORED, Dims, dense
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
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


class CompressedTensors:
    """A compressed-tensors checkpoint as the tensors that it stands for.

    Names and shapes are those of the dense checkpoint; `read` gives an `Affine` (of `dims`
    `STORED`, that is [out, in]) where the tensor is kept in integers.

    Args:
      checkpoint: the opened directory.
      config: its config.json, with the `quantization_config` in it.
    """

    def __init__(self, checkpoint: TensorSource, config: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._config = config
        stored = checkpoint.keys()
        self._stored = set(stored)
        modules = {_module(name) for name in stored if _part(name) in ("weight_packed", "bitmask")}
        modules |= {_module(name) for name in stored if _part(name) == "weight_scale"}
        self._modules = {f"{module}.weight": module for module in modules}
        belong = {f"{module}.{part}" for module in modules for part in PARTS}
        self._names = [
            name for name in stored if name not in belong and name not in self._modules
        ] + sorted(self._modules)

    def keys(self) -> list[str]:
        """Names of the tensors of the dense checkpoint."""
        return list(self._names)

    def read(self, name: str) -> Any:
        """A tensor: `Affine`, or a dense array.

        Raises:
          InputError: no such tensor, or its parts contradict each other.
        """
        if name in self._modules:
            module = self._modules[name]
            return _decode(self._checkpoint, self._stored, module, self._config, STORED)
        if name not in self._names:
            raise unknown_tensor("compressed-tensors", name, self._names)
        return self._checkpoint.read(name)

    def is_compressed(self, name: str) -> bool:
        """Whether `read` may give an `Affine`."""
        module = self._modules.get(name)
        parts = ("weight_packed", "weight") if f"{module}.weight_scale" in self._stored else ()
        return any(
            f"{module}.{part}" in self._stored
            and self._checkpoint.info(f"{module}.{part}").dtype in (np.int32, np.int8)
            for part in parts
        )

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a dense tensor. What is not stored dense is decoded whole for it."""
        if name not in self._modules:
            return self._checkpoint.read_rows(name, start, stop)
        dense_rows = np.asarray(dense(self.read(name)))
        check_rows("compressed-tensors", name, dense_rows.shape, start, stop)
        return dense_rows[start:stop]

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of the dense tensor."""
        module = self._modules.get(name)
        if module is None:
            return self._checkpoint.info(name)
        stored, about = self._stored, self._checkpoint.info
        for part in ("weight_shape", "shape"):
            if f"{module}.{part}" in stored:
                shape = tuple(int(n) for n in self._checkpoint.read(f"{module}.{part}").reshape(-1))
                break
        else:
            whole = next(part for part in WHOLE if f"{module}.{part}" in stored)
            rows, columns = about(f"{module}.{whole}").shape
            shape = (rows, columns * (2 if whole == "weight_packed" else 1))  # two FP4 a byte
        if f"{module}.weight_scale" not in stored:
            return TensorInfo(shape, about(f"{module}.compressed").dtype)
        scale = about(f"{module}.weight_scale").dtype
        return TensorInfo(shape, scale if scale in _SCALES else np.dtype(ml_dtypes.bfloat16))


def decode_module(
    reader: TensorSource, name: str, config: Mapping[str, Any], *, dims: Dims = STORED
) -> Any:
    """The weight of one module.

    Args:
      reader: the opened checkpoint.
      name: of the module, without `.weight`.
      config: config.json, or the `quantization_config` out of it.
      dims: how the axes of the result factor over the stored matrix [out, in].

    Returns:
      `Affine` for integers, else a dense array [out, in] (see the table above).

    Raises:
      InputError: no such module, parts that are missing or contradict each other, or a format
        that is not read here.
    """
    return _decode(reader, set(reader.keys()), name, config, dims)


def _decode(
    reader: TensorSource, stored: set[str], name: str, config: Mapping[str, Any], dims: Dims
) -> Any:
    parts = {
        part: reader.read(f"{name}.{part}")
        for part in (*PARTS, "weight")
        if f"{name}.{part}" in stored and not part.startswith(("input_", "output_"))
    }
    if not any(part in parts for part in WHOLE):
        raise unknown_tensor("compressed-tensors", f"{name}.weight", stored)
    try:
        if "compressed" in parts:
            parts["weight"] = _decode_bitmask(parts)
        if "weight_scale" not in parts:
            return parts["weight"]
        arguments = weight_arguments(config, name)
        if "weight_packed" in parts and arguments.get("type") == "float":
            return _decode_fp4(parts, arguments)
        if "weight_packed" in parts:
            return _decode_packed(parts, arguments, dims)
        if parts["weight"].dtype == np.int8:
            return _decode_int8(parts, arguments, dims)
        return _decode_float(parts, arguments)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: its tensors contradict each other ({error})") from None


def weight_arguments(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The `weights` entry of the config group that a module belongs to.

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
    return min(usable, key=precedence)["weights"]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _part(name: str) -> str:
    return name.rpartition(".")[2]


def _decode_packed(parts: dict[str, np.ndarray], arguments: dict[str, Any], dims: Dims) -> Any:
    bits, packed = _bits(arguments), parts["weight_packed"]
    rows, columns = (int(n) for n in parts["weight_shape"])
    if packed.shape[:1] != (rows,) or packed.ndim != 2 or packed.dtype != np.int32 or columns < 1:
        raise ValueError(
            f"weight_packed {packed.shape} {packed.dtype} for a weight of {(rows, columns)}"
        )
    scale = _matrix_scale(parts["weight_scale"], rows, columns)
    padded = _is_padded(packed, columns, bits)
    zero = None
    if not arguments.get("symmetric", True):
        stored = np.ascontiguousarray(parts["weight_zero_point"].T)
        if stored.dtype == np.int8:
            zero = _unsigned(stored, bits).reshape(scale.shape)
        else:
            padded = _is_padded(stored, len(scale), bits) if padded is None else padded
            words = _dense_stream(stored, len(scale), bits, padded)
            zero = np.asarray(unpack(words, bits, len(scale))).T.reshape(scale.shape)
    codes = _dense_stream(packed, columns, bits, padded)
    order = parts.get("weight_g_idx")
    if order is not None and (order >= 0).all():
        regular = np.arange(columns) // (columns // scale.shape[1])
        if not np.array_equal(order, regular):
            u = np.asarray(unpack(codes, bits, columns))
            signed = u.astype(scale.dtype) - scale.dtype.type(2 ** (bits - 1))
            if zero is not None:
                signed = u.astype(scale.dtype) - zero.astype(scale.dtype)[:, order]
            return signed * scale[:, order]
    return _affine(codes, scale, zero, bits, columns, dims)


def _is_padded(packed: np.ndarray, count: int, bits: int) -> bool | None:
    """Whether `packed` `[rows, words]` is in the layout of before June 2026; None: cannot be told.

    Before pull request 732 of compressed-tensors a word held 32 // bits whole codes; this differs
    from a dense stream for 3, 5, 6 and 7 bits. The widths tell the two apart, except for some
    narrow matrices: there it is the older one if there are bits beyond the end of a dense stream.
    """
    width, dense, padded = packed.shape[1], -(-count * bits // 32), -(-count // (32 // bits))
    if width not in (dense, padded):
        raise ValueError(f"{width} words for {count} codes of {bits} bits")
    if width != dense or width != padded:
        return width != dense
    used = count * bits % 32
    return True if used and (packed[:, -1].view(np.uint32) >> np.uint32(used)).any() else None


def _dense_stream(packed: np.ndarray, count: int, bits: int, padded: bool | None) -> np.ndarray:
    """Words `[rows, w]` holding `count` codes a row, as whole periods of a dense bitstream."""
    width, per_word = packed.shape[1], 32 // bits
    words = packed.view(np.uint32)
    if padded:
        shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
        codes = (words[:, :, None] >> shifts) & np.uint32(2**bits - 1)
        return np.asarray(pack(codes.reshape(len(packed), -1)[:, :count].astype(np.uint8), bits))
    return np.pad(packed, ((0, 0), (0, packed_words(count, bits) - width)))


def _matrix_scale(scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A scale of any strategy as [rows or 1, groups]."""
    if scale.size == 1:
        return scale.reshape(1, 1)
    scale = scale.reshape(len(scale), -1)
    if scale.shape[0] != rows or columns % scale.shape[1]:
        raise ValueError(f"weight_scale {scale.shape} for a weight of {(rows, columns)}")
    return scale


def _bits(arguments: dict[str, Any]) -> int:
    bits = arguments["num_bits"]
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"num_bits {bits!r}, not 1 to 8")
    return bits


def _unsigned(signed: np.ndarray, bits: int) -> np.ndarray:
    return (signed.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)


def _affine(
    codes: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    bits: int,
    columns: int,
    dims: Dims,
) -> Affine:
    return Affine(
        jnp.asarray(codes),
        jnp.asarray(scale),
        None if zero is None else jnp.asarray(zero),
        bits,
        -columns % 32,
        dims,
        (str(scale.dtype),),
    )


def _decode_int8(parts: dict[str, np.ndarray], arguments: dict[str, Any], dims: Dims) -> Any:
    weight, bits = parts["weight"], _bits(arguments)
    if arguments.get("strategy") == "block":
        return _decode_float(parts, arguments)
    rows, columns = weight.shape
    scale = _matrix_scale(parts["weight_scale"], rows, columns)
    zero = None
    if not arguments.get("symmetric", True):
        zero = _unsigned(parts["weight_zero_point"], bits).reshape(scale.shape)
    u = weight.astype(np.int16) + 2 ** (bits - 1)
    if u.min(initial=0) < 0 or u.max(initial=0) >= 2**bits:
        raise ValueError(f"values beyond {bits} bits")
    codes = np.asarray(pack(u.astype(np.uint8), bits))
    return _affine(codes, scale, zero, bits, columns, dims)


def _decode_float(parts: dict[str, np.ndarray], arguments: dict[str, Any]) -> np.ndarray:
    weight, scale = parts["weight"], parts["weight_scale"]
    if scale.dtype == np.uint8:  # E8M0: powers of two
        scale = np.exp2(scale.astype(np.float32) - 127).astype(ml_dtypes.bfloat16)
    block = arguments.get("block_structure") if arguments.get("strategy") == "block" else None
    scale = _spread(scale, weight.shape, block)
    values = weight.astype(scale.dtype)
    if not arguments.get("symmetric", True) and "weight_zero_point" in parts:
        zero = _spread(parts["weight_zero_point"], weight.shape, block)
        values = values - zero.astype(scale.dtype)
    return values * scale


def _spread(scale: np.ndarray, shape: tuple[int, ...], block: Any) -> np.ndarray:
    """A scale of any strategy at the shape of the weight, or at one that broadcasts to it."""
    if scale.size == 1:
        return scale.reshape(1, 1)
    scale = scale.reshape(len(scale), -1)
    for axis, size in enumerate(shape):
        step = int(block[axis]) if block else math.ceil(size / scale.shape[axis])
        if math.ceil(size / step) != scale.shape[axis]:
            raise ValueError(f"weight_scale {scale.shape} for a weight of {shape}")
        if scale.shape[axis] > 1:
            scale = np.repeat(scale, step, axis).take(range(size), axis)
    return scale


def _decode_fp4(parts: dict[str, np.ndarray], arguments: dict[str, Any]) -> np.ndarray:
    """NVFP4 and MXFP4: two codes (sign, index into E2M1) a byte, the even column low."""
    packed, scale = parts["weight_packed"], parts["weight_scale"]
    if packed.dtype != np.uint8 or arguments.get("num_bits") != 4:
        raise ValueError(f"floats of {arguments.get('num_bits')} bits in {packed.dtype}")
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    values = np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7])
    if scale.dtype == np.uint8:
        scale = np.exp2(scale.astype(np.float32) - 127)
    elif "weight_global_scale" in parts:
        scale = scale.astype(np.float32) / parts["weight_global_scale"].astype(np.float32)
    scale = _spread(scale, values.shape, None).astype(np.float32)
    return (values * scale).astype(ml_dtypes.bfloat16)


def _decode_bitmask(parts: dict[str, np.ndarray]) -> np.ndarray:
    """Values of a row where its bits are set; bit j of byte b is column 8 b + j."""
    rows, columns = (int(n) for n in parts["shape"].reshape(-1))
    values = parts["compressed"].reshape(-1)
    bitmask = parts["bitmask"]
    if bitmask.shape != (rows, -(-columns // 8)):
        raise ValueError(f"bitmask {bitmask.shape} for a weight of {(rows, columns)}")
    kept = np.unpackbits(bitmask, axis=1, count=columns, bitorder="little").astype(bool)
    if kept.sum() != values.size:
        raise ValueError(f"{values.size} values for {kept.sum()} set bits")
    dense = np.zeros((rows, columns), values.dtype)
    dense[kept] = values
    return dense
