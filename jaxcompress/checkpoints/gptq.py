"""GPTQ directories, as AutoGPTQ and GPTQModel write and read them.

A quantized linear module `X` of `[out, in]` is stored as

* `X.qweight` int32 `[in * bits / 32, out]`: the codes u of a column, a bitstream along `in`;
* `X.qzeros` int32 `[groups, out * bits / 32]`: the zeros, a bitstream along `out`;
* `X.scales` float16 `[groups, out]`;
* `X.g_idx` int32 `[in]`: the group of every column;

weight = (u - zero) * scale. In the `checkpoint_format` "gptq" the stored zeros are less by one, in
"gptq_v2" they are themselves. A zero of 0 has no form in the former, so asymmetric leaves are
written in the latter. `quantize_config.json`, and `quantization_config` of config.json, describe
it; what modules have of their own stands under `dynamic` (GPTQModel, vLLM). Source:
https://github.com/ModelCloud/GPTQModel. The codes are those of `Affine`, both ways keep every bit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.checkpoints.bitstreams import dense_in_order, half_scales
from jaxcompress.checkpoints.quantized_modules import (
    QuantizedModules,
    config_dtype,
    modules_with,
)
from jaxcompress.checkpoints.tensors import TensorSource
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import STORED
from jaxcompress.core.errors import InputError
from pallas_kernels.packing import pack, unpack

PARTS = ("qweight", "qzeros", "scales", "g_idx")
CONFIG_FILE = "quantize_config.json"
BITS = (2, 3, 4, 8)
LESS_ONE, AS_THEY_ARE = "gptq", "gptq_v2"
UNIT = 32  # kernels take rows and columns by so many


def refusal(leaf: Any) -> str | None:
    """Why GPTQ cannot hold a leaf (of arrays or of shapes); None: it can."""
    if not isinstance(leaf, Affine):
        return f"gptq has no form for {type(leaf).__name__}"
    if leaf.bits not in BITS or not leaf.has_kernel:
        return "gptq holds integers of 2, 3, 4 or 8 bits, with whole zero points and equal groups"
    if leaf.rows % UNIT or leaf.contracted % UNIT:
        return f"gptq takes multiples of {UNIT}, not a matrix of {leaf.rows} x {leaf.contracted}"
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
    leaf = leaf.with_layout("canonical")
    scales, zeros = half_scales(name, leaf)
    if leaf.symmetric:
        zeros = zeros - 1
    words = np.asarray(pack(np.ascontiguousarray(zeros), leaf.bits))
    tensors = {
        "qweight": np.asarray(leaf.codes).T,
        "qzeros": words[:, : leaf.rows * leaf.bits // 32],
        "scales": scales,
        "g_idx": np.arange(leaf.contracted, dtype=np.int32) // leaf.group_size,
    }
    return {f"{name}.{part}": np.ascontiguousarray(tensors[part]) for part in PARTS}


def quantization_config(leaves: Mapping[str, Any], ignore: Iterable[str]) -> dict[str, Any]:
    """The contents of `quantize_config.json`.

    Args:
      leaves: `Affine`s (of arrays or of shapes) by the names of their modules.
      ignore: dense linear modules, by name.

    Raises:
      InputError: no module is quantized.
    """
    if not leaves:
        raise InputError("gptq: no module is quantized; save as dense")
    own = {name: _own(leaf) for name, leaf in leaves.items()}
    common = dict(Counter(tuple(sorted(x.items())) for x in own.values()).most_common(1)[0][0])
    dynamic: dict[str, Any] = {f"-:^{re.escape(n)}$": {} for n in ignore if n != "lm_head"}
    dynamic |= {f"+:^{re.escape(n)}$": x for n, x in own.items() if x != common}
    symmetric = all(leaf.symmetric for leaf in leaves.values())
    return {
        **common,
        "desc_act": False,
        "static_groups": False,
        "lm_head": "lm_head" in leaves,
        "true_sequential": True,
        "quant_method": "gptq",
        "checkpoint_format": LESS_ONE if symmetric else AS_THEY_ARE,
        "pack_dtype": "int32",
        "dynamic": dynamic or None,
        "meta": {"quantizer": ["jaxcompress"]},
    }


def _own(leaf: Any) -> dict[str, Any]:
    size = leaf.group_size if leaf.groups > 1 else -1
    return {"bits": leaf.bits, "group_size": size, "sym": leaf.symmetric}


class GPTQ(QuantizedModules):
    """A GPTQ checkpoint as the tensors that it stands for.

    Weights are `Affine`; dense where columns were assigned to groups freely (activation order).

    Args:
      checkpoint: the opened directory.
      config: its config.json, with the `quantization_config` in it.

    Raises:
      InputError: a layout of another kernel (Marlin, BitBLAS, planar).
    """

    what = "gptq"

    def __init__(self, checkpoint: TensorSource, config: Mapping[str, Any]) -> None:
        super().__init__(checkpoint, config, modules_with(checkpoint, "qweight"), PARTS)
        said = config["quantization_config"]
        self.format = said.get("checkpoint_format") or said.get("format") or LESS_ONE
        if said.get("is_marlin_format"):
            self.format = "marlin"
        if self.format not in (LESS_ONE, AS_THEY_ARE):
            raise InputError(f"gptq: checkpoint_format {self.format!r}; gptq and gptq_v2 are read")

    def decode(self, module: str, parts: dict[str, np.ndarray]) -> Any:
        """See `QuantizedModules`."""
        qweight, qzeros, scales = (parts[part] for part in PARTS[:3])
        (groups, rows), columns = scales.shape, self.shape(module)[1]
        bits = self._bits(module)
        if bits not in BITS or qweight.dtype != np.int32 or qzeros.dtype != np.int32:
            raise InputError(
                f"{module}: {bits} bits in {qweight.dtype}; 2, 3, 4 and 8 in int32 are"
            )
        if qweight.shape != (-(-columns * bits // 32), rows) or len(qzeros) != groups:
            raise ValueError(f"qweight {qweight.shape} and scales {scales.shape}")
        order = parts.get("g_idx", np.arange(columns) // -(-columns // groups))
        size = max(1, int(np.count_nonzero(order == 0)))
        zeros = self._zeros(qzeros, bits, rows)
        codes = np.pad(qweight.T, ((0, 0), (0, -len(qweight) % bits)))
        leaf = Affine(
            jnp.asarray(codes),
            jnp.asarray(scales.T),
            None if (zeros == 2 ** (bits - 1)).all() else jnp.asarray(zeros.T),
            bits,
            -columns % 32,
            STORED,
            (str(self.dtype(module)),),
            width=size if columns % size else None,
        )
        regular = np.arange(columns) // size
        return leaf if np.array_equal(order, regular) else dense_in_order(leaf, order)

    def shape(self, module: str) -> tuple[int, ...]:
        """Shape of the dense weight of a module."""
        words, rows = self._checkpoint.info(f"{module}.qweight").shape
        if f"{module}.g_idx" in self._stored:
            return rows, self._checkpoint.info(f"{module}.g_idx").shape[0]
        return rows, words * 32 // self._bits(module)

    def dtype(self, module: str) -> np.dtype:
        """Dtype of the dense weight of a module."""
        return config_dtype(self._config, np.float16)

    def _bits(self, module: str) -> int:
        """By the tensors, as modules may have bits of their own; at least 32 rows."""
        rows = self._checkpoint.info(f"{module}.scales").shape[-1]
        return self._checkpoint.info(f"{module}.qzeros").shape[-1] * 32 // max(rows, 1)

    def _zeros(self, words: np.ndarray, bits: int, rows: int) -> np.ndarray:
        """Zero points `[groups, out]`.

        GPTQModel takes one from whole words where no code straddles them, with a borrow where a
        zero is 0, and adds it back likewise.
        """
        whole = 32 % bits == 0
        if self.format == LESS_ONE and whole:
            ones = np.uint32(sum(1 << at for at in range(0, 32, bits)))
            words = (words.view(np.uint32) + ones).view(np.int32)
        period = -words.shape[1] % bits  # of a bitstream, in words
        u = np.asarray(unpack(np.pad(words, ((0, 0), (0, period))), bits, rows))
        if self.format == LESS_ONE and not whole:
            u = (u + 1) & (2**bits - 1)
        return u
