"""What the tests of recipes run: a toy language model that compiles at once, and its config."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxcompress.core.model import Blocks, Model
from jaxcompress.core.paths import path_str
from jaxcompress.data.bpe import train_tokenizer
from jaxcompress.models import Tokenizer
from jaxcompress.training.checkpoints import load_params

VOCAB, WIDTH, CTX = 280, 32, 16


class Killed(BaseException):
    """Stands for a signal: nothing in the package may catch it."""


def write_texts(folder: pathlib.Path) -> dict[str, str]:
    return {
        "train": str(tiny.write_text(folder / "train.txt", 20)),
        "heldout": str(tiny.write_text(folder / "heldout.txt", 5)),
    }


def toy(layers: int = 3) -> Model:
    """Blocks without attention, no config, and a tokenizer."""

    def block(params, hidden):
        past = jnp.cumsum(hidden, 1) / jnp.arange(1, hidden.shape[1] + 1)[:, None]
        return hidden + jnp.tanh(past @ params["kernel"])

    blocks = Blocks(
        embed=lambda params, ids: params["embed"][ids],
        block=block,
        head=lambda params, hidden: hidden @ params["head"]["kernel"],
    )
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)

    params = {
        "embed": drawn(VOCAB, WIDTH),
        "layers": {str(i): {"kernel": drawn(WIDTH, WIDTH)} for i in range(layers)},
        "head": {"kernel": drawn(WIDTH, VOCAB)},
    }
    tokenizer = Tokenizer(train_tokenizer([tiny.TEXT], VOCAB), 0, (0,))
    return Model(blocks.run, params, blocks=blocks, tokenizer=tokenizer)


def config(texts: dict[str, str], *stages: dict[str, Any], **sections: Any) -> dict[str, Any]:
    data = {**texts, "ctx": CTX, "tokens": 512, "slices": 3}
    return {"name": "toy", "seed": 5, "data": data, "stages": stages, **sections}


def training(method: str = "finetune", **options: Any) -> dict[str, Any]:
    return {"method": method, "steps": 3, "batch_size": 8, "learning_rate": 1e-2, **options}


def kept(root: pathlib.Path, stage: str) -> dict[str, np.ndarray]:
    """Every buffer of the parameters that a stage kept, by path."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(
        root / "stages" / stage / "params", lambda shapes: jax.tree.map(lambda _: one, shapes)
    )
    return buffers(params)


def buffers(params: Any) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {path_str(path): np.asarray(leaf) for path, leaf in flat}


def assert_same(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert mine.keys() == theirs.keys()
    for path, value in mine.items():
        assert value.dtype == theirs[path].dtype, path
        assert value.shape == theirs[path].shape, path
        assert value.tobytes() == theirs[path].tobytes(), path


def files(root: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@contextmanager
def killed(owner: Any, name: str, call: int, *, after: bool = False) -> Iterator[list[int]]:
    """`owner.name` ends the run in its `call`-th call (counted from 1), before it or behind it."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = [0]

    def stopping(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            raise Killed
        result = original(*args, **options)
        if calls[0] == call:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stopping)
        with pytest.raises(Killed):
            yield calls
