"""Writing a model as a directory: which container, which tensors, verified before it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.checkpoints import (
    awq,
    bitsandbytes,
    compressed_tensors,
    compressed_tensors_sparse,
    gptq,
    native,
)
from jaxcompress.checkpoints.huggingface import NATIVE_STEM, STEM
from jaxcompress.checkpoints.huggingface_writer import CheckpointWriter
from jaxcompress.checkpoints.prune import pruned_state
from jaxcompress.checkpoints.tensors import TensorChunks, write_json
from jaxcompress.checkpoints.torch_writer import write_state_directory
from jaxcompress.core.arrays.base import STORED, densify, is_compressed
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.readers.lift import lift
from jaxcompress.factorization.torch_linear import write_two_linear
from jaxcompress.models import (
    FAMILIES,
    EncoderConfig,
    load,
    model_from_tensors,
    name_map_of,
    quantize_kv_cache,
    stock_form,
    unshare_layers,
)
from jaxcompress.progress import progress

ARCHIVES = compressed_tensors_sparse.FORMATS
TORCH = ("two-linear", "torch-prune")
# Each has `refusal(leaf)`, `names_of_module(name, leaf)`, `encode_module(name, leaf)`.
QUANTIZED: dict[str, Any] = {
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
}
CONTAINERS = ("auto", *QUANTIZED, "dense", "native", *ARCHIVES, *TORCH)
VERIFY_TOKENS = 64
VERIFY_MEMORY = 2_000_000_000  # bytes of the dense model up to which logits are compared too


def save(
    model: Model,
    out: str | os.PathLike[str],
    format: str = "auto",  # noqa: A002 (the user's word)
    *,
    overwrite: bool = False,
    verify_memory: int = VERIFY_MEMORY,
) -> list[str]:
    """Write a model as a directory; returns what there is to say of it, line by line.

    Args:
      model: a reference model goes under the names of its Hugging Face checkpoint, config
        rewritten, tokenizer carried along; any other by the paths of its parameters, native.
      out: the directory to make; appears complete and verified, or not at all.
      format: "auto" (compressed-tensors or bitsandbytes where transformers loads it, dense where
        nothing is compressed, otherwise native), "compressed-tensors", "dense" or "native"; "gptq"
        and "awq", as GPTQModel and AutoAWQ read them; "bitsandbytes", of NF4 and FP4;
        "sparse-bitmask" and "sparse-24-bitmask": archives of pruned weights; for PyTorch
        "two-linear": a state dict with two linear layers for one of low rank, and a module file;
        and "torch-prune": a state dict for modules under `torch.nn.utils.prune`.
      overwrite: replace `out`.
      verify_memory: bytes of the dense model up to which logits are compared as well.

    Raises:
      InputError: `out` exists, or the format has no form for a leaf.
    """
    if model.config is None:
        if format not in ("auto", "native"):
            raise InputError(f"format {format}: the model has no config; only native can hold it")
        native.write_native(out, model.params, overwrite=overwrite)
        return [f"{out}: native, verified tensor by tensor"]
    told: tuple[str, ...] = ()
    if format != "native" and model.config.stock_refusal is not None:
        if format == "auto" and isinstance(model.config, EncoderConfig):
            format = "native"  # noqa: A001 (as zeros what was cut would take room again)
        else:
            model = stock_form(model)
            told = model.notes[-1:]
    if model.config.layer_map and format == "auto":
        format = "native"  # noqa: A001 (elsewhere, shared layers take room again)
    elif model.config.layer_map and format != "native":
        model = unshare_layers(model)
        told = (*told, "layers that share their weights are written out, each with its own")
    if format == "two-linear":
        return [*write_two_linear(model, out, overwrite=overwrite), *told]
    if format == "torch-prune":
        return [*_write_pruned(model, out, overwrite), *told]
    table = name_map_of(model.config)
    tensors = dict(table.tensors(model.params))
    linear = {row.name for row in table.of_kind("linear", "head") if row.axes == (1, 0)}
    parts = {name: Piece(value, name in linear) for name, value in tensors.items()}
    export = Export(
        model.config.to_hf(),
        model.source,
        parts,
        container_for(format, parts, model.config.to_hf()),
    )
    return [*export.write(out, overwrite=overwrite, verify_memory=verify_memory), *told]


def _write_pruned(model: Model, out: str | os.PathLike[str], overwrite: bool) -> list[str]:
    assert model.config is not None
    state, count = pruned_state(dict(name_map_of(model.config).tensors(model.params)))
    config = model.config.to_hf()
    size = write_state_directory(out, "pruned.pth", state, config, overwrite=overwrite)
    return [f"{out}: pruned.pth, {count} weights with their masks, {size:,} bytes"]


@dataclass(frozen=True)
class Piece:
    """One tensor of an export.

    Attributes:
      value: an array, a compressed array, chunks, or a function of no arguments that gives one.
      linear: whether it is the `[out, in]` weight of a linear module.
      like: for a function: what it will give, as a compressed array of shapes, or the shape of a
        dense one.
    """

    value: Any
    linear: bool
    like: Any = None

    @property
    def form(self) -> Any:
        """The compressed array (of arrays or of shapes), or None where it is dense."""
        return next((x for x in (self.value, self.like) if is_compressed(x)), None)

    def get(self) -> Any:
        """The tensor itself."""
        return self.value() if callable(self.value) else self.value


def container_for(asked: str, pieces: Mapping[str, Piece], config: Mapping[str, Any]) -> str:
    """The container: the one asked for, or what `auto` makes of these tensors.

    Raises:
      InputError: an unknown container, or one that has no form for a tensor.
    """
    if asked not in CONTAINERS:
        raise InputError(f"format {asked!r}: use one of {', '.join(CONTAINERS)}")
    forms = {name: piece.form for name, piece in pieces.items() if piece.form is not None}
    if asked in QUANTIZED:
        for name, form in forms.items():
            why = None
            if not pieces[name].linear and asked != "compressed-tensors":
                why = f"is no linear module, of which alone {asked} has quantized weights"
            elif not pieces[name].linear and form.dims != STORED:
                why = f"is stored [in, out], {asked} holds [out, in]"
            why = why or QUANTIZED[asked].refusal(form)
            if why is not None:
                raise InputError(f"{name}: {why}; use --format native or dense")
    if asked != "auto":
        return asked
    if not forms:
        return "dense"
    if "model_type" not in config or not all(pieces[name].linear for name in forms):
        return "native"
    if all(
        compressed_tensors.refusal(form) is None
        and compressed_tensors.objection_of_transformers(form) is None
        for form in forms.values()
    ):
        return "compressed-tensors"
    held = all(bitsandbytes.refusal(form) is None for form in forms.values())
    return "bitsandbytes" if held else "native"


@dataclass
class Export:
    """The directory to be written.

    Attributes:
      config: contents of config.json, without a `quantization_config`.
      companions: directory whose tokenizer and so on are carried along, or None.
      pieces: tensors by checkpoint name.
      container: "dense", "native", or one of `QUANTIZED` or `ARCHIVES`.
      fingerprint: of the command, so that a killed run can be taken up; None: not.
    """

    config: dict[str, Any]
    companions: str | None
    pieces: dict[str, Piece]
    container: str
    fingerprint: str | None = None
    what: str = "write"
    kept: dict[str, Any] = field(default_factory=dict)
    global_scales: dict[str, float] = field(default_factory=dict)  # of NVFP4, by module

    def write(
        self, out: str | os.PathLike[str], *, overwrite: bool, verify_memory: int
    ) -> Iterator[str]:
        """Write, verify, rename; yields what there is to say."""
        fits = self._dense_bytes() <= verify_memory and self._has_logits()
        with CheckpointWriter(
            out,
            self._config_json(),
            companions_from=self.companions,
            fingerprint=self.fingerprint,
            overwrite=overwrite,
            check=partial(self._complete, fits=fits),
            stem=NATIVE_STEM if self.container == "native" else STEM,
        ) as writer:
            for name, piece in progress(self.pieces.items(), self.what, unit="tensor"):
                self._add(writer, name, piece, keep=fits)
        yield self._summary(out, fits)
        if self.container == "compressed-tensors":
            forms = self._forms().values()
            for said in compressed_tensors.warnings_of(forms, self.global_scales):
                yield f"warning: {said}"
        if self.container == "compressed-tensors" and self._embeds_compressed():
            yield "warning: transformers loads no compressed embedding; use --format native"
        if self.container in ARCHIVES:
            yield f"warning: {self.container} {compressed_tensors_sparse.WARNING}"

    @cached_property
    def _archived(self) -> set[str]:
        """Linear weights that an archive holds sparse: the selected ones, or those that pay."""
        if self.container not in ARCHIVES:
            return set()
        return {
            name
            for name, piece in self.pieces.items()
            if piece.linear
            and not isinstance(piece.value, TensorChunks)
            and (
                callable(piece.value) or compressed_tensors_sparse.pays(piece.value, self.container)
            )
        }

    def _embeds_compressed(self) -> bool:
        return any(p.form is not None and not p.linear for p in self.pieces.values())

    def _add(self, writer: CheckpointWriter, name: str, piece: Piece, keep: bool) -> None:
        names = self._names(name, piece)
        if not keep and all(n in writer for n in names):
            return
        try:
            value = piece.get()
            if keep and isinstance(value, TensorChunks):
                value = (
                    np.concatenate(list(value.chunks)) if value.shape else next(iter(value.chunks))
                )
            tensors = self._tensors(name, value)
        except InputError:  # bad input stays bad: there is nothing to take up again
            writer.abandon()
            raise
        if keep:
            self.kept[name] = value
        for tensor_name, tensor in tensors.items():
            if tensor_name not in writer:
                writer.add(tensor_name, tensor)

    def _tensors(self, name: str, value: Any) -> dict[str, Any]:
        if self.container == "native" and is_compressed(value):
            return native.encode_leaf(name, value)
        if self.container in QUANTIZED and is_compressed(value):
            module = name.removesuffix(".weight")
            tensors = QUANTIZED[self.container].encode_module(module, value)
            if f"{module}.weight_global_scale" in tensors:
                self.global_scales[module] = float(tensors[f"{module}.weight_global_scale"][0])
            return tensors
        if name in self._archived:
            module = name.removesuffix(".weight")
            return compressed_tensors_sparse.encode_sparse_module(module, value, self.container)
        return {name: np.asarray(densify(value)) if not isinstance(value, TensorChunks) else value}

    def _names(self, name: str, piece: Piece) -> list[str]:
        """Names of the tensors that a piece becomes."""
        form = piece.form
        if name in self._archived:
            module = name.removesuffix(".weight")
            return compressed_tensors_sparse.names_of_sparse_module(module, self.container)
        if form is None or self.container not in ("native", *QUANTIZED):
            return [name]
        if self.container == "native":
            return native.names_of_leaf(name, form)
        return QUANTIZED[self.container].names_of_module(name.removesuffix(".weight"), form)

    def _forms(self) -> dict[str, Any]:
        """Compressed pieces by the names of their modules."""
        pieces = self.pieces.items()
        return {n.removesuffix(".weight"): p.form for n, p in pieces if p.form is not None}

    def _config_json(self) -> dict[str, Any]:
        config = {k: v for k, v in self.config.items() if k != "quantization_config"}
        if self.container in ARCHIVES:
            modules = [name.removesuffix(".weight") for name in self._archived]
            entry = compressed_tensors_sparse.sparsity_config(modules, self.container)
            return config | {"quantization_config": entry}
        if self.container not in QUANTIZED:
            return config
        forms = self._forms()
        ignore = [
            name.removesuffix(".weight")
            for name, piece in self.pieces.items()
            if piece.linear and piece.form is None
        ]
        if config.get("tie_word_embeddings") and "lm_head" not in forms:
            ignore.append("lm_head")
        if self.container == "compressed-tensors":
            schemes = {module: compressed_tensors.scheme_of(form) for module, form in forms.items()}
            config["quantization_config"] = compressed_tensors.quantization_config(
                schemes, ignore=ignore, by_name=self._embeds_compressed()
            )
        else:
            entry = QUANTIZED[self.container].quantization_config(forms, ignore)
            config["quantization_config"] = entry
        return config

    def _complete(self, directory: Path, *, fits: bool) -> None:
        """What a directory has besides, and whether it computes what is in memory."""
        if self.container == "gptq":
            write_json(directory / gptq.CONFIG_FILE, self._config_json()["quantization_config"])
        if fits:
            self._check_logits(directory)

    def _has_logits(self) -> bool:
        """Whether a reference model turns token ids into logits with these tensors."""
        family = FAMILIES.get(self.config.get("model_type", ""))
        return family is not None and hasattr(family.config, "vocab_size")

    def _dense_bytes(self) -> int:
        total = 0
        for piece in self.pieces.values():
            form = piece.form
            if form is not None:
                total += form.size * jnp.dtype(form.dtype).itemsize
            elif piece.like is not None:
                total += piece.like.size * jnp.dtype(piece.like.dtype).itemsize
            elif hasattr(piece.value, "nbytes"):
                total += piece.value.nbytes
        return total

    def _check_logits(self, directory: Path) -> None:
        """Raise unless the written directory computes what the model in memory computes."""
        reread = load(directory)
        if getattr(reread.config, "kv_cache_dtype", None) is not None:
            reread = quantize_kv_cache(reread, None)  # rounding makes large of the last bit
        names, kept, self.kept = list(self.kept), self.kept, {}
        memory = model_from_tensors(reread.config, kept.__getitem__, names)
        length = min(VERIFY_TOKENS, reread.config.max_length or VERIFY_TOKENS)
        ids = np.arange(length, dtype=np.int32)[None] % reread.config.vocab_size
        apply = jax.jit(lift(reread.apply))  # equal configs give the same function: one program
        want, got = (np.asarray(apply(m.params, ids), np.float32) for m in (memory, reread))
        worst = float(np.abs(got - want).max())
        if not worst <= 1e-5 * max(float(np.ptp(want)), 1e-30):
            raise InputError(
                f"{directory}: logits of the written model differ by {worst:.3g} from those in "
                "memory; nothing was kept"
            )

    def _summary(self, out: Any, logits: bool) -> str:
        count = sum(piece.form is not None for piece in self.pieces.values())
        held = f"{count} of {len(self.pieces)} tensors compressed"
        if self.container == "dense":
            held = f"{len(self.pieces)} tensors"
        elif self.container in ARCHIVES:
            held = f"{len(self._archived)} of {len(self.pieces)} tensors sparse"
        size = sum(f.stat().st_size for f in Path(out).iterdir())
        compared = (
            f"tensors and logits of {VERIFY_TOKENS} tokens verified"
            if logits
            else "tensors verified, logits not (the dense model exceeds --verify-memory, or its "
            "model_type has no reference model)"
        )
        return f"{out}: {self.container}, {held}, {size:,} bytes; {compared}"
