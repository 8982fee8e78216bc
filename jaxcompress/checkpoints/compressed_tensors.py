"""compressed-tensors `pack-quantized`: affine leaves to what transformers and vLLM load.

A quantized module `X` of `[out, in]` is stored as

* `X.weight_packed` int32 `[out, ceil(in * bits / 32)]`, a dense bitstream along `in`, least
  significant bit first, of q + 2^(bits-1);
* `X.weight_scale` `[out, groups]`, `[out, 1]` per channel, `[1]` per tensor;
* `X.weight_shape` int64 `[2]` = (out, in);
* asymmetric only: `X.weight_zero_point`, a bitstream along `out`: `[ceil(out * bits / 32), groups]`
  int32 (per tensor: int8 `[1]`);

and described in config.json under `quantization_config`. Format:
https://github.com/vllm-project/compressed-tensors. The words are those of `Affine.codes`, so both
ways keep every bit. `compressed_tensors_reader.py` is the way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.errors import InputError
from pallas_kernels.packing import pack

FORMAT = "pack-quantized"
VERSION = "0.20.0"  # of compressed-tensors, whose layout this is: dense bitstreams for all widths

ASYMMETRIC_WARNING = (
    "asymmetric zero points: vLLM and compressed-tensors itself read them, but transformers 5.23 "
    "with compressed-tensors 0.20 fails to load such a directory; quantize symmetrically for it"
)


class Scheme(NamedTuple):
    """How the weight of a module is quantized; `strategy` is tensor, channel or group."""

    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None

    @property
    def arguments(self) -> dict[str, Any]:
        """The `weights` entry of a config group."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": self.strategy,
            "group_size": self.group_size,
            "dynamic": False,
        }


def scheme_of(leaf: Affine) -> Scheme:
    """The scheme that a config group must state for `leaf`."""
    leaf = leaf.with_layout("canonical")
    if leaf.scale.shape[-1] > 1:
        return Scheme(leaf.bits, leaf.symmetric, "group", leaf.group_size)
    per_tensor = leaf.scale.shape[-2] == 1 < leaf.rows
    return Scheme(leaf.bits, leaf.symmetric, "tensor" if per_tensor else "channel", None)


def encode_module(name: str, leaf: Any) -> dict[str, np.ndarray]:
    """The tensors of one module.

    Args:
      name: of the module, `model.layers.0.mlp.up_proj`.
      leaf: an `Affine` of one matrix, whatever its `dims`: its stored matrix [N, K] is
        [out, in]; or a dense array, which becomes `X.weight` as it is.

    Returns:
      Tensors by name.

    Raises:
      InputError: another compressed array, or one with leading axes (index it first).
    """
    if not is_compressed(leaf):
        return {f"{name}.weight": np.asarray(leaf)}
    if not isinstance(leaf, Affine):
        raise InputError(
            f"{name}: compressed-tensors has no form for {type(leaf).__name__}; "
            "save as native, or dense"
        )
    if leaf.lead:
        raise InputError(f"{name}: {leaf.lead} stacked matrices; a module holds one, index it")
    if not leaf.has_kernel:
        raise InputError(
            f"{name}: compressed-tensors packs integers of 1 to 8 bits, with whole zero points and "
            "equal groups; save as native, or dense"
        )
    leaf = leaf.with_layout("canonical")
    rows, columns, bits = leaf.rows, leaf.contracted, leaf.bits
    scheme = scheme_of(leaf)
    scale, zero = (x if x is None else np.asarray(x) for x in leaf.quantities())
    tensors = {
        f"{name}.weight_packed": np.asarray(leaf.codes)[:, : -(-columns * bits // 32)],
        f"{name}.weight_scale": scale.reshape(1) if scheme.strategy == "tensor" else scale,
        f"{name}.weight_shape": np.array([rows, columns], np.int64),
    }
    if zero is not None:
        if scheme.strategy == "tensor":
            signed = zero.astype(np.int16) - 2 ** (bits - 1)
            packed = signed.astype(np.int8).reshape(1)
        else:
            packed = np.asarray(pack(zero.T, bits))[:, : -(-rows * bits // 32)].T
        tensors[f"{name}.weight_zero_point"] = np.ascontiguousarray(packed)
    return tensors


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
            "format": FORMAT,
            "weights": scheme.arguments,
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(set(ignore) - set(schemes)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": VERSION,
    }
