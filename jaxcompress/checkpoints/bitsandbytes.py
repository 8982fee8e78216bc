"""bitsandbytes directories of 4 bits (NF4, FP4), as transformers writes and reads them.

A quantized linear module `X` of `[out, in]` is stored as

* `X.weight` uint8 `[out * in / 2, 1]`: the codes of all rows, one after the other, two in a byte,
  the first one in the high half;
* `X.weight.absmax` float32 `[blocks]`: the scale of every block of (64) codes;
* `X.weight.quant_map` float32 `[16]`: the table;
* `X.weight.quant_state.bitsandbytes__nf4` (or `__fp4`): JSON in uint8: shape, dtype, block size;

weight = table[code] * absmax. Of double quantization `absmax` is uint8, and there are besides

* `X.weight.nested_absmax` float32 `[blocks / 256]` and `X.weight.nested_quant_map` float32 `[256]`;

absmax = map[code] * nested_absmax + nested_offset, the last of which stands in the JSON. Blocks run
on from row to row. config.json describes it under `quantization_config`. Source:
https://github.com/bitsandbytes-foundation/bitsandbytes. Both ways keep every bit of a `Codebook`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.checkpoints.quantized_modules import DTYPES, QuantizedModules, modules_with
from jaxcompress.checkpoints.tensors import TensorSource
from jaxcompress.core.arrays.affine import plain
from jaxcompress.core.arrays.base import KERNEL, STORED, is_compressed
from jaxcompress.core.arrays.codebook import Codebook
from jaxcompress.core.arrays.shared_rows import SharedRows, share_rows
from jaxcompress.core.arrays.tables import TABLES
from jaxcompress.core.errors import InputError
from pallas_kernels.packing import pack

STATE = "weight.quant_state.bitsandbytes__"  # and the name of the table
PLAIN = ("weight.absmax", "weight.quant_map")
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # codes that may share a scale
NESTED_BLOCK = 256  # scales that share a scale of theirs
BITS = 4
# Modules of GPT-2 whose dense weights are [in, out]; quantized they are [out, in] like all others.
CONV1D = ("c_attn", "q_attn", "c_fc", "c_proj")
# Their code of each of our entries, which ascend. FP4's are a sign, two bits and one; of its two
# zeros theirs takes the second for what is above 0.
CODES = {
    "nf4": np.arange(16, dtype=np.uint8),
    "fp4": np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8),
}


def refusal(leaf: Any) -> str | None:
    """Why bitsandbytes cannot hold a leaf (of arrays or of shapes); None: it can.

    Of quantized scales on shapes alone: that their groups lie as they must, `encode_module` sees.
    """
    if not isinstance(leaf, Codebook):
        return f"bitsandbytes has no form for {type(leaf).__name__}"
    if leaf.lead:
        return f"{leaf.lead} stacked matrices; a module of bitsandbytes holds one, index it"
    if not _has_table(leaf) or leaf.offset is not None:
        return "bitsandbytes has the tables nf4 and fp4, none of a matrix's own"
    if leaf.casts[-1] not in DTYPES or set(leaf.casts[:-1]) - {"float32"}:
        return f"bitsandbytes decodes to one of {', '.join(DTYPES)}, not to {leaf.casts}"
    if leaf.scale is None or leaf.scale.shape[-2] != leaf.rows:
        return "bitsandbytes has scales of some columns of a row, not of a matrix"
    size = leaf.group_size
    if size not in BLOCKS:
        return f"bitsandbytes has a scale for {BLOCKS[0]}, 64, ... {BLOCKS[-1]} columns, not {size}"
    if not is_compressed(leaf.scale):
        if leaf.scale.dtype == np.float32:
            return None
        return f"bitsandbytes stores float32 scales, not {leaf.scale.dtype}"
    return _nested_refusal(leaf.scale)


def _has_table(leaf: Codebook) -> bool:
    """Whether the table is that of its format still: as a value it may have been trained."""
    if leaf.fixed not in TABLES:
        return False
    if isinstance(leaf.table, jax.ShapeDtypeStruct):
        return True
    return np.array_equal(np.asarray(leaf.table), _table(leaf.fixed)[None])


def _nested_refusal(scale: Any) -> str | None:
    if not isinstance(scale, Codebook) or not scale.unpacked or scale.table.shape[-2] != 1:
        return "bitsandbytes has scales in float32 or of 8 bits"
    if scale.scale is None or scale.offset is None:
        return "bitsandbytes has scales of 8 bits about their mean, with scales of their own"
    values = scale.scale.values if isinstance(scale.scale, SharedRows) else scale.scale
    width = scale.group_size
    if values.size > 1 and NESTED_BLOCK % width:
        return (
            f"groups of {width} quantized scales end with a row, those of bitsandbytes run on, "
            f"{NESTED_BLOCK} by {NESTED_BLOCK}; quantize without --scale-bits"
        )
    return None


def names_of_module(name: str, leaf: Any) -> list[str]:
    """Names of the tensors of `encode_module`."""
    nested = NESTED if is_compressed(leaf.scale) else ()
    return [f"{name}.{part}" for part in ("weight", *PLAIN, *nested, STATE + leaf.fixed)]


def encode_module(name: str, leaf: Any) -> dict[str, np.ndarray]:
    """The tensors of one module.

    Args:
      name: of the module, `model.layers.0.mlp.up_proj`.
      leaf: a `Codebook` of one matrix; its stored matrix [N, K] is [out, in].

    Raises:
      InputError: see `refusal`; or groups of quantized scales that are not bitsandbytes'.
    """
    why = refusal(leaf)
    if why is not None:
        raise InputError(f"{name}: {why}; save as native, or dense")
    codes = CODES[leaf.fixed][np.asarray(leaf.integers())].reshape(-1)
    state: dict[str, Any] = {
        "quant_type": leaf.fixed,
        "blocksize": leaf.group_size,
        "dtype": str(leaf.dtype),
        "shape": [leaf.rows, leaf.contracted],
    }
    tensors = {"weight": (codes[::2] << BITS | codes[1::2])[:, None]}
    tensors["weight.quant_map"] = _table(leaf.fixed)[np.argsort(CODES[leaf.fixed])]
    if is_compressed(leaf.scale):
        scale: Codebook = leaf.scale
        assert scale.offset is not None
        tensors["weight.absmax"] = np.asarray(scale.codes).reshape(-1)
        tensors["weight.nested_absmax"] = _running_on(name, scale)
        tensors["weight.nested_quant_map"] = np.asarray(scale.table, np.float32).reshape(-1)
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(np.asarray(scale.offset).item()),
        }
    else:
        tensors["weight.absmax"] = np.asarray(leaf.scale).reshape(-1)
    tensors[STATE + leaf.fixed] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}


def _running_on(name: str, scale: Codebook) -> np.ndarray:
    """The scales of quantized scales, one for every 256 of these from row to row."""
    own = np.asarray(plain(scale.scale), np.float32)
    each = np.repeat(own, scale.group_size, axis=-1)
    flat = np.broadcast_to(each, (scale.rows, scale.contracted)).reshape(-1)
    blocks = np.pad(flat, (0, -flat.size % NESTED_BLOCK), mode="edge").reshape(-1, NESTED_BLOCK)
    if (blocks != blocks[:, :1]).any():
        raise InputError(
            f"{name}: groups of quantized scales are not bitsandbytes', {NESTED_BLOCK} by "
            f"{NESTED_BLOCK} from row to row; save as native, or dense"
        )
    return np.ascontiguousarray(blocks[:, 0])


def quantization_config(leaves: Mapping[str, Any], ignore: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` entry of config.json.

    It has one table and one dtype; where modules differ, their own JSON counts.

    Args:
      leaves: `Codebook`s (of arrays or of shapes) by the names of their modules.
      ignore: dense linear modules, by name.

    Raises:
      InputError: no module is quantized.
    """
    if not leaves:
        raise InputError("bitsandbytes: no module is quantized; save as dense")
    kinds = Counter((leaf.fixed, str(leaf.dtype)) for leaf in leaves.values())
    kind, dtype = kinds.most_common(1)[0][0]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": any(is_compressed(leaf.scale) for leaf in leaves.values()),
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        # Without a list transformers leaves the head alone, quantized or not.
        "llm_int8_skip_modules": sorted(set(ignore)),
    }


class BitsAndBytes(QuantizedModules):
    """A bitsandbytes checkpoint as the tensors that it stands for; weights are `Codebook`.

    Where blocks run on from row to row, every run of columns that lies in one block has a scale:
    more of them than there are in the file, the same weights.

    Args:
      checkpoint: the opened directory.
      config: its config.json, with the `quantization_config` in it.

    Raises:
      InputError: weights of 8 bits (LLM.int8).
    """

    what = "bitsandbytes"

    def __init__(self, checkpoint: TensorSource, config: Mapping[str, Any]) -> None:
        states = modules_with(checkpoint, *(f"bitsandbytes__{kind}" for kind in TABLES))
        end = ".weight.quant_state"
        modules = {name.removesuffix(end) for name in states if name.endswith(end)}
        parts = (*PLAIN, *NESTED, *(STATE + kind for kind in TABLES))
        super().__init__(checkpoint, config, modules, parts)
        said = config["quantization_config"]
        if said.get("load_in_8bit") or modules_with(checkpoint, "SCB"):
            raise InputError("bitsandbytes: weights of 8 bits (LLM.int8); 4 bits are read")
        self._states: dict[str, dict[str, Any]] = {}

    def decode(self, module: str, parts: dict[str, np.ndarray]) -> Any:
        """See `QuantizedModules`."""
        state = self._state(module)
        (rows, columns), kind = state["shape"], state["quant_type"]
        table = _table(kind)
        if not np.allclose(parts["weight.quant_map"][CODES[kind]], table, atol=1e-6):
            raise InputError(f"{module}: quant_map is not the table of {kind}")
        # Where they are to be sharded, the bytes go under another dtype (bnb_4bit_quant_storage).
        pairs = np.ascontiguousarray(parts["weight"]).reshape(-1).view(np.uint8)
        if pairs.size != -(-rows * columns // 2):
            raise ValueError(f"{pairs.size} bytes for {rows} x {columns} codes of {BITS} bits")
        theirs = np.stack([pairs >> BITS, pairs & 15], axis=-1).reshape(-1)[: rows * columns]
        codes = np.argsort(CODES[kind]).astype(np.uint8)[theirs].reshape(rows, columns)
        return Codebook(
            jnp.asarray(pack(codes, BITS)),
            jnp.asarray(table[None]),
            self._scale(module, parts, _runs(rows, columns, state["blocksize"])),
            BITS,
            -columns % 32,
            KERNEL if self._is_turned(module) else STORED,
            (str(self.dtype(module)),),
            fixed=kind,
        )

    def _scale(self, module: str, parts: dict[str, np.ndarray], blocks: np.ndarray) -> Any:
        """The scales `[N, groups]` of these blocks: float32, or a `Codebook` of 8 bits."""
        absmax, state = parts["weight.absmax"], self._state(module)
        if absmax.shape != (blocks[-1, -1] + 1,):
            raise ValueError(f"absmax {absmax.shape} for {blocks[-1, -1] + 1} blocks")
        if "weight.nested_absmax" not in parts:
            if absmax.dtype != np.float32:
                raise ValueError(f"absmax in {absmax.dtype} without nested_absmax")
            return jnp.asarray(absmax[blocks])
        size, (rows, groups) = state["nested_blocksize"], blocks.shape
        nested, table = parts["weight.nested_absmax"], parts["weight.nested_quant_map"]
        if (
            absmax.dtype != np.uint8
            or table.shape != (256,)
            or len(nested) != -(-len(absmax) // size)
        ):
            raise ValueError(f"absmax {absmax.dtype} {absmax.shape}, nested_absmax {nested.shape}")
        own: Any
        if len(absmax) == blocks.size and size % groups == 0 and min(size // groups, rows) > 1:
            own = share_rows(jnp.asarray(nested[:, None]), rows, min(size // groups, rows))
        else:
            step = math.gcd(groups, size) if len(absmax) == blocks.size else 1
            own = jnp.asarray(nested[blocks[:, ::step] // size])
        offset = jnp.full((1, 1), state["nested_offset"], jnp.float32)
        codes, values = jnp.asarray(absmax[blocks]), jnp.asarray(table[None])
        return Codebook(codes, values, own, 8, 0, STORED, ("float32",), offset)

    def shape(self, module: str) -> tuple[int, ...]:
        """Shape of the dense weight of a module."""
        rows, columns = self._state(module)["shape"]
        return (columns, rows) if self._is_turned(module) else (rows, columns)

    def dtype(self, module: str) -> np.dtype:
        """Dtype of the dense weight of a module."""
        return DTYPES[self._state(module)["dtype"]]

    def _is_turned(self, module: str) -> bool:
        return self._config.get("model_type") == "gpt2" and module.endswith(CONV1D)

    def _state(self, module: str) -> dict[str, Any]:
        """What the JSON of a module says."""
        if module not in self._states:
            names = (f"{module}.{STATE}{kind}" for kind in TABLES)
            name = next(name for name in names if name in self._stored)
            try:
                state = json.loads(self._checkpoint.read(name).tobytes())
                rows, columns = state["shape"]
                nested = state.get("nested_blocksize", NESTED_BLOCK)
                sizes = (rows, columns, state["blocksize"], nested)
                good = all(isinstance(size, int) and size > 0 for size in sizes)
                good = good and state["quant_type"] in TABLES and state["dtype"] in DTYPES
            except (ValueError, KeyError, TypeError, AttributeError):
                good = False
            if not good:
                raise InputError(f"{name}: does not describe a matrix of nf4 or fp4")
            self._states[module] = state
        return self._states[module]


def _table(kind: str) -> np.ndarray:
    return np.asarray(TABLES[kind], np.float32)


def _runs(rows: int, columns: int, size: int) -> np.ndarray:
    """In which block of `size` entries each run of columns lies, blocks running on: `[rows, runs]`.

    A run is as long as it can be for all rows: the greatest common divisor of row and block.
    """
    starts = np.arange(0, columns, math.gcd(columns, size))
    return (np.arange(rows)[:, None] * columns + starts) // size
