"""AWQ directories in the layout "gemm", as AutoAWQ writes and reads them.

A quantized linear module `X` of `[out, in]` is stored as

* `X.qweight` int32 `[in, out / 8]`: 4-bit codes u, eight of a row in a word, the lowest first in
  the order 0 2 4 6 1 3 5 7;
* `X.qzeros` int32 `[groups, out / 8]`: the zeros likewise;
* `X.scales` float16 `[groups, out]`;

weight = (u - zero) * scale; described in config.json under `quantization_config`. Source:
https://github.com/casper-hansen/AutoAWQ. Both ways keep every bit of an `Affine`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.checkpoints.bitstreams import half_scales
from jaxcompress.checkpoints.quantized_modules import (
    QuantizedModules,
    config_dtype,
    modules_with,
)
from jaxcompress.checkpoints.tensors import TensorSource
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import STORED
from jaxcompress.core.errors import InputError
from pallas_kernels.packing import pack

PARTS = ("qweight", "qzeros", "scales")
BITS, PER_WORD = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns lies in the i-th nibble of a word
VERSION = "gemm"


def refusal(leaf: Any) -> str | None:
    """Why AWQ cannot hold a leaf (of arrays or of shapes); None: it can."""
    if not isinstance(leaf, Affine):
        return f"awq has no form for {type(leaf).__name__}"
    if leaf.bits != BITS or not leaf.has_kernel:
        return "awq holds integers of 4 bits, with whole zero points and equal groups"
    if leaf.rows % PER_WORD:
        return f"awq packs rows by {PER_WORD}, not a matrix of {leaf.rows} x {leaf.contracted}"
    return None


def names_of_module(name: str, leaf: Any) -> list[str]:
    """Names of the tensors of `encode_module`."""
    return [f"{name}.{part}" for part in PARTS]


def encode_module(name: str, leaf: Any) -> dict[str, np.ndarray]:
    """The tensors of one module.

    Args:
      name: of the module, `model.layers.0.mlp.up_proj`.
      leaf: an `Affine` of one matrix; its stored matrix [N, K] is [out, in].

    Raises:
      InputError: see `refusal`; or a scale that is no float16 number.
    """
    why = refusal(leaf)
    if why is not None:
        raise InputError(f"{name}: {why}; save as native, or dense")
    scales, zeros = half_scales(name, leaf.with_layout("canonical"))
    tensors = {
        "qweight": _pack(np.asarray(leaf.integers()).T),
        "qzeros": _pack(zeros),
        "scales": np.ascontiguousarray(scales),
    }
    return {f"{name}.{part}": tensors[part] for part in PARTS}


def quantization_config(leaves: Mapping[str, Any], ignore: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` entry of config.json.

    Args:
      leaves: `Affine`s (of arrays or of shapes) by the names of their modules.
      ignore: dense linear modules, by name.

    Raises:
      InputError: no module is quantized, or groups of several sizes.
    """
    if not leaves:
        raise InputError("awq: no module is quantized; save as dense")
    sizes = {leaf.group_size if leaf.groups > 1 else -1 for leaf in leaves.values()}
    if len(sizes) > 1:
        raise InputError(
            f"awq: one group size for all modules, not {', '.join(map(str, sorted(sizes)))} "
            "(-1: whole rows); use --format compressed-tensors"
        )
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": sizes.pop(),
        "zero_point": True,  # symmetric leaves have zeros, too: all of them 8
        "version": VERSION,
        "modules_to_not_convert": sorted(set(ignore)) or None,
    }


class AWQ(QuantizedModules):
    """An AWQ checkpoint as the tensors that it stands for; weights are `Affine`.

    Args:
      checkpoint: the opened directory.
      config: its config.json, with the `quantization_config` in it.

    Raises:
      InputError: another layout, or not 4 bits.
    """

    what = "awq"

    def __init__(self, checkpoint: TensorSource, config: Mapping[str, Any]) -> None:
        super().__init__(checkpoint, config, modules_with(checkpoint, "qweight"), PARTS)
        said = config["quantization_config"]
        version, bits = str(said.get("version", VERSION)).lower(), said.get("bits", BITS)
        if version != VERSION or bits != BITS:
            raise InputError(f"awq: version {version!r} of {bits} bits; gemm of 4 bits is read")

    def decode(self, module: str, parts: dict[str, np.ndarray]) -> Any:
        """See `QuantizedModules`."""
        scales, u = parts["scales"], _unpack(parts["qweight"])
        (groups, rows), columns = scales.shape, len(u)
        middle = np.full(scales.shape, 2 ** (BITS - 1), np.uint8)
        zeros = _unpack(parts["qzeros"]) if "qzeros" in parts else middle
        if u.shape[1] != rows or zeros.shape != scales.shape or columns % groups:
            raise ValueError(f"codes {u.shape}, zeros {zeros.shape}, scales {scales.shape}")
        return Affine(
            jnp.asarray(pack(np.ascontiguousarray(u.T), BITS)),
            jnp.asarray(scales.T),
            None if np.array_equal(zeros, middle) else jnp.asarray(zeros.T),
            BITS,
            -columns % 32,
            STORED,
            (str(self.dtype(module)),),
        )

    def shape(self, module: str) -> tuple[int, ...]:
        """Shape of the dense weight of a module."""
        columns, words = self._checkpoint.info(f"{module}.qweight").shape
        return words * PER_WORD, columns

    def dtype(self, module: str) -> np.dtype:
        """Dtype of the dense weight of a module."""
        return config_dtype(self._config, np.float16)


def _pack(u: np.ndarray) -> np.ndarray:
    """Codes uint8 `[n, out]` as words `[n, out / 8]`."""
    nibbles = u.reshape(len(u), -1, PER_WORD)[..., ORDER].astype(np.uint32)
    words = (nibbles << (BITS * np.arange(PER_WORD, dtype=np.uint32))).sum(-1, np.uint32)
    return np.ascontiguousarray(words).view("<i4")


def _unpack(words: np.ndarray) -> np.ndarray:
    """The inverse of `_pack`."""
    if words.dtype != np.int32:
        raise ValueError(f"words of {words.dtype}")
    shifts = BITS * np.arange(PER_WORD, dtype=np.uint32)
    nibbles = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**BITS - 1)
    return nibbles[..., np.argsort(ORDER)].reshape(len(words), -1).astype(np.uint8)
