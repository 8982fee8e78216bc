"""Small models, data and objectives that the tests of training share."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxcompress.core.model import Model
from jaxcompress.models import DecoderConfig, build_model
from jaxcompress.training.loop import fit
from jaxcompress.training.objective import Objective
from jaxcompress.training.optimizers import make_optimizer

VOCAB = 64
CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
    tie_word_embeddings=False,
)


class Drawn:
    """Batches drawn anew from their number: what the contract of `data.batches` asks for."""

    def __init__(self, make, rows: int = 16, *, poisoned: int | None = None) -> None:
        self.make, self.rows, self.poisoned, self.given = make, rows, poisoned, 0

    def __next__(self):
        batch = self.make(np.random.default_rng(self.given), self.rows)
        if self.given == self.poisoned:
            batch = {k: np.full_like(x, np.nan) for k, x in batch.items()}
        self.given += 1
        share = self.rows // jax.process_count()
        first = share * jax.process_index()
        return {name: rows[first : first + share] for name, rows in batch.items()}

    def state(self):
        return {"given": self.given}

    def restore(self, state) -> None:
        self.given = state["given"]


def points(rng, rows: int) -> dict[str, np.ndarray]:
    """Inputs [rows, 64] and targets [rows, 32] of a regression."""
    x = rng.normal(size=(rows, 64)).astype(np.float32)
    return {"x": x, "y": np.tanh(x[:, :32] + x[:, 32:])}


def sentences(rng, rows: int) -> dict[str, np.ndarray]:
    """Ids [rows, 9], each token mostly the one before plus 1."""
    steps = (rng.random((rows, 9)) < 0.2) * rng.integers(0, VOCAB, (rows, 9)) + 1
    return {"ids": (steps.cumsum(1) % VOCAB).astype(np.int32)}


def perceptron(seed: int = 0) -> Model:
    """[rows, 64] to [rows, 32] through 64 hidden units."""
    rng = np.random.default_rng(seed)
    params = {
        "norm": {"scale": jnp.ones(64)},
        "first": {"kernel": _normal(rng, 64, 64), "bias": jnp.zeros(64)},
        "second": {"kernel": _normal(rng, 64, 32), "bias": jnp.zeros(32)},
    }

    def apply(params, x):
        h = x * params["norm"]["scale"]
        h = jnp.tanh(h @ params["first"]["kernel"] + params["first"]["bias"])
        return h @ params["second"]["kernel"] + params["second"]["bias"]

    return Model(apply, params)


def decoder(seed: int = 0, **changes) -> Model:
    """A Llama of one block, width 64, 8 heads."""
    import dataclasses

    return build_model(dataclasses.replace(CONFIG, **changes), seed=seed)


def squared_error(model: Model) -> Objective:
    """Mean squared error per row, over batches of `points`; rows may have weights."""
    from jaxcompress.core.readers.lift import lift

    apply = lift(model.apply)

    def function(params, batch, key, constants):
        error = jnp.square(apply(params, batch["x"]) - batch["y"]).sum(-1).astype(jnp.float32)
        weights = batch.get("weights", jnp.ones(error.shape))
        return {"loss": ((weights * error).sum(), weights.sum())}

    return Objective(function)


def train(model: Model, workdir: pathlib.Path, **options) -> Model:
    """`fit` of the regression for a few steps; options of `fit`, and `batches`, `optimizer`."""
    options = {"steps": 8, "log_every": 2, "checkpoint_every": 3, **options}
    optimizer = {"learning_rate": 0.01, "weight_decay": 0.1, **options.pop("optimizer", {})}
    return fit(
        model,
        options.pop("objective", None) or squared_error(model),
        options.pop("batches", None) or Drawn(points),
        make_optimizer(steps=options["steps"], **optimizer),
        workdir=workdir,
        **options,
    )


def same(a, b) -> bool:
    """Whether two trees hold the same bits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def whole(tree):
    """NumPy arrays of a tree, also where no process has all of it."""

    def gathered(x):
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(gathered, tree)


def _normal(rng, rows: int, columns: int):
    return jnp.asarray(rng.normal(size=(rows, columns)) / rows**0.5, jnp.float32)
