"""How a compiled step lies on a mesh: weights are gathered layer by layer, batches stay split."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxcompress.core.model import Model
from jaxcompress.distillation import distill
from jaxcompress.models import DecoderConfig, abstract_params, functions_of
from jaxcompress.training.collectives import count_collectives
from jaxcompress.training.mesh import make_mesh
from jaxcompress.training.objective import next_token
from jaxcompress.training.optimizers import make_optimizer
from jaxcompress.training.prepare import prepare

# Sizes that no other axis has: layers, vocabulary, width, feed-forward width.
LAYERS, VOCAB, WIDTH, WIDE = 5, 352, 64, 224


def decoder():
    config = DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        windows=(None,) * LAYERS,
        scan_layers=True,
        remat=True,
    )
    functions = functions_of(config)
    return Model(functions.apply, abstract_params(config), functions.blocks, config)


def compiled(objective, mesh):
    prepared = prepare(decoder(), objective, make_optimizer(steps=10), mesh)
    batch = {"ids": jax.ShapeDtypeStruct((16, 32), jnp.int32)}
    parts = prepared.parts
    lowered = prepared.step.lower(parts.state, parts.frozen, objective.constants, batch)
    return lowered.compile().as_text()


def shapes(hlo):
    """Shapes of all arrays of a program, each that of one device's piece."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", hlo)}


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_weights_are_gathered_layer_by_layer(sizes, capfd):
    hlo = compiled(next_token(decoder()), make_mesh(*sizes))
    assert "Involuntary" not in capfd.readouterr().err
    made = shapes(hlo)
    _, fsdp, tensor = sizes
    assert (LAYERS, WIDTH // fsdp, WIDE // tensor) in made  # the stack as it is stored
    assert (LAYERS, WIDTH, WIDE // tensor) not in made
    assert {(WIDTH, WIDE // tensor), (1, WIDTH, WIDE // tensor)} & made  # one layer gathered
    # No device sees the rows of another one.
    rows = 16 // (sizes[0] * sizes[1])
    assert any(shape[:1] == (rows,) and shape[-1] == WIDTH for shape in made)
    assert not any(shape[:1] == (16,) and shape[-1] == WIDTH and len(shape) > 2 for shape in made)
    gathers = count_collectives(hlo)["all-gather"]
    assert gathers.executed >= 2 * 7 * LAYERS  # seven weights a layer, forward and backward


def test_a_teacher_brings_no_resharding(capfd):
    teacher = decoder()
    teacher = teacher.replace(params=jax.tree.map(jnp.zeros_like, teacher.params))
    compiled(distill(decoder(), teacher), make_mesh(2, 2, 2))
    assert "Involuntary" not in capfd.readouterr().err


def test_without_a_mesh_nothing_is_told_to_the_compiler():
    model = decoder()
    ids = jax.ShapeDtypeStruct((16, 32), jnp.int32)
    jaxpr = str(jax.make_jaxpr(model.apply)(model.params, ids))
    assert "sharding_constraint" not in jaxpr
    mesh = make_mesh(2, 2, 2)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert "sharding_constraint" in str(jax.make_jaxpr(model.apply)(model.params, ids))
