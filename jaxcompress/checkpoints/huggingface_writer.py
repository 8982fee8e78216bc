"""Writes a Hugging Face directory in sharded safetensors: streamed, resumable, verified.

Everything grows in `OUT.partial` and is renamed to `OUT` at the very end, so a run killed at any
moment leaves nothing that looks finished. Tensors are appended to the data of the current shard
as they come, and noted in a journal; a full shard becomes a safetensors file.

Resuming: where the caller gives a `fingerprint` of its command (a digest of everything that
decides the output), the same fingerprint takes up what a killed run left: complete shards stay,
and tensors of the unfinished shard as far as their bytes read back right. `OUT.partial` of another
fingerprint is refused, or begun afresh with `overwrite=True`. Without a fingerprint a run always
begins afresh, but not over the work of a run that can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxcompress.checkpoints.huggingface import (
    STEM,
    companions_of,
    index_name,
    open_checkpoint,
    single_name,
)
from jaxcompress.checkpoints.safetensors import DTYPES, NAMES, build_header
from jaxcompress.checkpoints.tensors import (
    CHUNK_BYTES,
    TensorChunks,
    TensorInfo,
    atomic_file,
    file_errors,
    raw_bytes,
    row_chunks,
    sync_directory,
)
from jaxcompress.core.errors import InputError

JOURNAL = ".journal.jsonl"
SPOOL = ".shard.data"  # tensors of the current shard, one after the other, without a header

Value = np.ndarray | TensorChunks


class Entry(NamedTuple):
    """A tensor that was written, and the digest of its bytes."""

    name: str
    info: TensorInfo
    digest: str
    shard: int
    offset: int  # in the spool, while the shard is being collected


class CheckpointWriter:
    """Collects tensors into the shards of a model directory.

        with CheckpointWriter("out", config, fingerprint=digest) as writer:
            for name in names:
                if name not in writer:          # else: written by the run that was killed
                    writer.add(name, compute(name))

    Leaving the block without an error finishes: the last shard, the index, config.json, the
    companions, reading every tensor back, and the rename. An error leaves `OUT.partial`, which
    a run of the same fingerprint takes up (without a fingerprint it is removed).

    Args:
      directory: the directory to make.
      config: contents of config.json; None: no config.json.
      companions_from: directory whose companions (tokenizer, ...) are copied along, or None.
      max_shard_bytes: shards are closed before they would grow beyond this.
      fingerprint: see the module's text.
      overwrite: replace an existing checkpoint, or begin over another run's partial one.
      metadata: text by text, for the header of every shard.
      check: called with the complete directory before it takes its name; raises `InputError` to
        refuse it, and then nothing is kept.
      stem: how the names of the weight files begin.

    Raises:
      InputError: the directory exists, is no checkpoint, belongs to another run, or cannot be
        written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: Mapping[str, Any] | None,
        *,
        companions_from: str | os.PathLike[str] | None = None,
        max_shard_bytes: float = 5e9,
        fingerprint: str | None = None,
        overwrite: bool = False,
        metadata: Mapping[str, str] | None = None,
        check: Callable[[Path], None] | None = None,
        stem: str = STEM,
    ) -> None:
        self._stem = stem
        self.directory = Path(os.path.abspath(directory))
        self.partial = self.directory.with_name(self.directory.name + ".partial")
        self.entries: dict[str, Entry] = {}
        self._config = config
        self._companions = None if companions_from is None else Path(companions_from)
        self._metadata = {"format": "pt", **(metadata or {})}  # transformers wants the format
        self._max = max_shard_bytes
        self._check = check
        self._abandoned = False
        self._resumable = fingerprint is not None
        check_replaceable(self.directory, overwrite)
        with file_errors("write", self.partial):
            found = _take_up(self.partial, fingerprint, overwrite, stem)
            if found is None:
                discard(self.partial)
                self.partial.mkdir(parents=True)
            self._write_journal(fingerprint, found or [])
            self._journal = open(self.partial / JOURNAL, "ab")  # noqa: SIM115 (closed on exit)
            self._spool = open(self.partial / SPOOL, "ab+")  # noqa: SIM115 (closed on exit)
        self._shard = max((entry.shard for entry in self.entries.values()), default=0)
        self._shard += _shard_path(self.partial, self._shard, stem).exists()
        self._spooled = sum(e.info.nbytes for e in self.entries.values() if e.shard == self._shard)
        self._spool.truncate(self._spooled)

    def __contains__(self, name: str) -> bool:
        """Whether the tensor is written already, by this run or the one it resumes."""
        return name in self.entries

    def add(self, name: str, value: Value) -> None:
        """Append a tensor, whole or in pieces.

        Raises:
          InputError: a dtype that safetensors lacks, or a full disk.
          ValueError: the name was written before, or the pieces do not make up the shape.
        """
        if name in self.entries:
            raise ValueError(f"{name}: written twice")
        if not isinstance(value, TensorChunks):
            array = np.asarray(value)
            value = TensorChunks(array.shape, array.dtype, [array])
        info = TensorInfo(tuple(int(n) for n in value.shape), np.dtype(value.dtype))
        if info.dtype not in NAMES:
            raise InputError(f"{self.directory}: {name}: safetensors has no dtype {info.dtype}")
        if self._spooled and self._spooled + info.nbytes > self._max:
            self._close_shard()
        digest, written = _new_digest(), 0
        self._spool.truncate(self._spooled)  # what a failed `add` may have left
        for chunk in value.chunks:
            if chunk.dtype != info.dtype:
                raise ValueError(f"{name}: a piece of {chunk.dtype} in a tensor of {info.dtype}")
            data = raw_bytes(chunk)
            digest.update(data)
            with file_errors("write", self.partial):
                written += self._spool.write(data)
        if written != info.nbytes:
            raise ValueError(f"{name}: {written} bytes came, its shape needs {info.nbytes}")
        entry = Entry(name, info, digest.hexdigest(), self._shard, self._spooled)
        with file_errors("write", self.partial):
            self._spool.flush()
            self._journal.write(_journal_line(entry))
            self._journal.flush()
        self.entries[name] = entry
        self._spooled += info.nbytes

    def abandon(self) -> None:
        """Leave nothing behind when the block ends: this work is not worth taking up again."""
        self._resumable = False

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._journal.close()
            self._spool.close()
            if kind is not None and not self._resumable:
                discard(self.partial)

    def _write_journal(self, fingerprint: str | None, entries: Iterable[Entry]) -> None:
        with atomic_file(self.partial / JOURNAL) as file:
            file.write(json.dumps({"fingerprint": fingerprint}).encode() + b"\n")
            for entry in entries:
                file.write(_journal_line(entry))
                self.entries[entry.name] = entry

    def _close_shard(self) -> None:
        """Turn the spool into a safetensors file."""
        entries = {e.name: e for e in self.entries.values() if e.shard == self._shard}
        infos = {name: entry.info for name, entry in entries.items()}
        header, offsets = build_header(infos, self._metadata, str(self.directory))
        with file_errors("write", self.partial):
            os.fsync(self._journal.fileno())
        with atomic_file(_shard_path(self.partial, self._shard, self._stem)) as out:
            out.write(header)
            for name in offsets:  # in the order of their bytes
                for chunk in _pieces(self._spool, entries[name].offset, infos[name].nbytes):
                    out.write(chunk)
        self._spool.truncate(0)
        self._shard, self._spooled = self._shard + 1, 0

    def _finish(self) -> None:
        if not self._shard or any(e.shard == self._shard for e in self.entries.values()):
            self._close_shard()
        with file_errors("write", self.partial):
            names = self._name_shards()
            if self._companions is not None:
                for path in companions_of(self._companions):
                    (self.partial / path).parent.mkdir(exist_ok=True)
                    shutil.copyfile(self._companions / path, self.partial / path)
            if self._config is not None:
                write_json(self.partial / "config.json", self._config)
            if len(names) > 1:
                total = sum(entry.info.nbytes for entry in self.entries.values())
                weights = {name: names[e.shard] for name, e in sorted(self.entries.items())}
                index = {"metadata": {"total_size": total}, "weight_map": weights}
                write_json(self.partial / index_name(self._stem), index)
        verify_checkpoint(self.partial, {e.name: e.digest for e in self.entries.values()})
        if self._check is not None:
            try:
                self._check(self.partial)
            except InputError:
                discard(self.partial)  # a resumed run would only come to this point again
                raise
        with file_errors("write", self.directory):
            replace_directory(self.partial, self.directory)
            (self.directory / SPOOL).unlink()
            (self.directory / JOURNAL).unlink()

    def _name_shards(self) -> list[str]:
        count = self._shard
        names = [f"{self._stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        names = names if len(names) > 1 else [single_name(self._stem)]
        for shard, name in enumerate(names):
            os.replace(_shard_path(self.partial, shard, self._stem), self.partial / name)
        return names


def write_checkpoint(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any] | None,
    tensors: Iterable[tuple[str, Value | Callable[[], Value]]],
    *,
    companions_from: str | os.PathLike[str] | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    fingerprint: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a model directory; memory for one tensor, or one piece of one, is needed at a time.

    Args:
      directory: the directory to make; it appears, complete and verified, at the very end.
      config: contents of config.json; None: no config.json.
      tensors: (name, value); a value is an array, `TensorChunks`, or a function of no arguments
        that returns one of them and is not called where a killed run wrote the tensor already.
      companions_from: see `CheckpointWriter`, like the rest.

    Returns:
      The directory.

    Raises:
      InputError: see `CheckpointWriter`.
    """
    with CheckpointWriter(
        directory,
        config,
        companions_from=companions_from,
        max_shard_bytes=max_shard_bytes,
        fingerprint=fingerprint,
        overwrite=overwrite,
        metadata=metadata,
    ) as writer:
        for name, value in tensors:
            if name not in writer:
                writer.add(name, value() if callable(value) else value)
    return writer.directory


def verify_checkpoint(directory: str | os.PathLike[str], digests: Mapping[str, str]) -> None:
    """Read every tensor back, in pieces, and compare.

    Args:
      directory: a model directory.
      digests: `tensor_digest` of every tensor that it must hold.

    Raises:
      InputError: a tensor is missing, surplus or different.
    """
    checkpoint = open_checkpoint(directory)
    if set(checkpoint.keys()) != set(digests):
        odd = sorted(set(checkpoint.keys()) ^ set(digests))
        raise InputError(f"{directory}: missing or surplus tensors: {', '.join(odd[:5])}")
    for name, expected in digests.items():
        if tensor_digest(row_chunks(checkpoint, name)) != expected:
            raise InputError(f"{directory}: {name} reads back otherwise than it was written")


def tensor_digest(chunks: Iterable[np.ndarray]) -> str:
    """Digest (BLAKE2b, 128 bits) of a tensor's row-major bytes, given whole or in pieces."""
    digest = _new_digest()
    for chunk in chunks:
        digest.update(raw_bytes(chunk))
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, atomically, indented as transformers does."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def check_replaceable(directory: Path, overwrite: bool) -> None:
    """Raise `InputError` unless a checkpoint may be written at `directory`."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InputError(f"{directory}: is a file; give a directory that does not exist yet")
    with file_errors("read", directory):
        files = {path.name for path in directory.iterdir()}
    if files and not overwrite:
        raise InputError(f"{directory}: exists; choose another name, or --overwrite")
    if files and not any(n == "config.json" or n.endswith(".safetensors") for n in files):
        raise InputError(f"{directory}: holds no checkpoint, so it is not overwritten")


def replace_directory(source: Path, target: Path) -> None:
    """Rename `source` to `target`, in place of a directory that may be there."""
    removed = _moved_away(target)
    os.replace(source, target)
    sync_directory(target.parent)
    shutil.rmtree(removed, ignore_errors=True)


def discard(directory: Path) -> None:
    """Remove a directory that may be there, so that none is ever half removed under its name."""
    shutil.rmtree(_moved_away(directory), ignore_errors=True)


def _moved_away(directory: Path) -> Path:
    removed = directory.with_name(f".{directory.name}.jaxcompress-removed")
    shutil.rmtree(removed, ignore_errors=True)
    if directory.exists():
        os.replace(directory, removed)
    return removed


def _shard_path(partial: Path, shard: int, stem: str) -> Path:
    """A closed shard, also under the name that a run killed while finishing had given it."""
    number = f"{stem}-{shard + 1:05d}"
    named = [*partial.glob(f"{number}-of-*.safetensors")]
    if shard == 0 and (partial / single_name(stem)).exists():
        named.append(partial / single_name(stem))
    return named[0] if named else partial / f"{number}.safetensors"


def _take_up(
    partial: Path, fingerprint: str | None, overwrite: bool, stem: str
) -> list[Entry] | None:
    """What a killed run of this fingerprint wrote; None: begin afresh, nothing is lost."""
    if not partial.exists() or {p.name for p in partial.iterdir()} <= {JOURNAL + ".partial"}:
        return None
    try:
        head, *lines = (partial / JOURNAL).read_bytes().splitlines()
        theirs = json.loads(head)["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        if overwrite:
            return None
        raise InputError(f"{partial}: is in the way and no unfinished export; remove it") from None
    if theirs is None:
        return None
    if theirs != fingerprint:
        if overwrite:
            return None
        raise InputError(
            f"{partial}: left unfinished by another command; run that one again to finish it, or "
            "begin afresh with --overwrite"
        )
    entries = []
    (partial / SPOOL).touch()
    with open(partial / SPOOL, "rb") as spool:
        for line in lines:
            entry = _parse_line(line)
            if entry is None:
                break
            if not _shard_path(partial, entry.shard, stem).exists():
                digest = _new_digest()
                for piece in _pieces(spool, entry.offset, entry.info.nbytes):
                    digest.update(piece)
                if digest.hexdigest() != entry.digest:
                    break
            entries.append(entry)
    return entries


def _journal_line(entry: Entry) -> bytes:
    (shape, dtype), rest = entry.info, entry[2:]
    return json.dumps([entry.name, shape, NAMES[dtype], *rest]).encode() + b"\n"


def _parse_line(line: bytes) -> Entry | None:
    try:
        name, shape, dtype, digest, shard, offset = json.loads(line)
        return Entry(name, TensorInfo(tuple(shape), DTYPES[dtype]), digest, shard, offset)
    except (ValueError, KeyError, TypeError):
        return None  # the run was killed while it wrote this line


def _pieces(file: BinaryIO, offset: int, length: int) -> Iterator[bytes]:
    file.seek(offset)
    while length:
        piece = file.read(min(length, CHUNK_BYTES))
        if not piece:
            return
        length -= len(piece)
        yield piece


def _new_digest() -> Any:
    return hashlib.blake2b(digest_size=16)
