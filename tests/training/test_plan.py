"""What a plan says that devices hold against what they hold."""

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.methods import compress
from jaxcompress.models import DecoderConfig, abstract_params, build_model, functions_of
from jaxcompress.models.rope import RopeConfig
from jaxcompress.training.mesh import abstract_mesh, make_mesh, param_shardings, spread
from jaxcompress.training.plan import plan_stage, plan_table
from jaxcompress.training.prepare import parts_of
from jaxcompress.training.settings import Training


def config(**changes):
    fields = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "windows": (None, None),
        "scan_layers": True,
    }
    return DecoderConfig(**(fields | changes))


def held(tree):
    """Bytes of a tree on every device; all hold as much."""
    sizes = {}
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            sizes[shard.device] = sizes.get(shard.device, 0) + shard.data.nbytes
    (size,) = set(sizes.values())
    return size


def scalars(tree):
    """Bytes of the counters of an optimizer."""
    return sum(x.nbytes for x in jax.tree.leaves(tree) if not x.ndim)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (8, 1, 1)])
def test_bytes_are_those_of_the_shards(sizes, optimizer):
    mesh = make_mesh(*sizes)
    model = build_model(config())
    teacher = compress(build_model(config(num_hidden_layers=3, windows=(None,) * 3)), "rtn",
                       group_size=32)  # fmt: skip
    settings = Training(steps=10, optimizer=optimizer)
    planned = plan_stage("distill", model, mesh, settings=settings, teachers=[teacher])

    parts = parts_of(model, settings.make_optimizer(), mesh)
    state = jax.jit(parts.init, out_shardings=parts.state_at)(parts.trainable)
    assert planned.weights == planned.gradients == held(state.trainable)
    assert planned.moments == held(state.optimizer)
    assert planned.teacher == held(spread(teacher.params, param_shardings(teacher, mesh)))
    assert (
        planned.trained == planned.parameters == sum(x.size for x in jax.tree.leaves(model.params))
    )
    assert planned.total == 2 * planned.weights + planned.moments + planned.teacher


def test_what_is_frozen_has_neither_moments_nor_gradients():
    mesh = make_mesh(2, 2, 2)
    model = compress(build_model(config()), "rtn", group_size=32)
    planned = plan_stage("scales", model, mesh, settings=Training(steps=10, train="scales"))
    parts = parts_of(model, Training(steps=10).make_optimizer(), mesh, train="scales")
    state = jax.jit(parts.init, out_shardings=parts.state_at)(parts.trainable)
    frozen = spread(parts.frozen, parts.frozen_at)
    assert planned.gradients == held(state.trainable)
    assert planned.weights == held(state.trainable) + held(frozen)
    # Two moments, and the counters of the schedule and of Adam.
    assert planned.moments == 2 * planned.gradients + scalars(state.optimizer)
    assert planned.trained < planned.parameters / 20
    still = plan_stage("evaluate", model, mesh)
    assert still.weights == held(spread(model.params, param_shardings(model, mesh)))
    assert still.trained == still.moments == still.gradients == 0


def test_half_precision_has_float32_masters():
    model = build_model(config(param_dtype="bfloat16"))
    planned = plan_stage("finetune", model, make_mesh(1, 8), settings=Training(steps=10))
    still = plan_stage("evaluate", model, make_mesh(1, 8))
    assert planned.weights == planned.gradients == 2 * still.weights


def test_a_plan_needs_no_devices():
    """Llama 3 70B over 512 chips, from shapes alone."""
    big = config(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        windows=(None,) * 80,
        rope=RopeConfig(rope_theta=500000.0),
        param_dtype="bfloat16",
    )
    model = Model(functions_of(big).apply, abstract_params(big), config=big)
    mesh = abstract_mesh(512, fsdp=16, tensor=4)
    assert dict(mesh.shape) == {"data": 8, "fsdp": 16, "tensor": 4}
    planned = plan_stage("evaluate", model, mesh)
    assert planned.parameters == 70_553_706_496
    norms = 161 * 8192  # whole on every device
    assert planned.weights == 2 * ((70_553_706_496 - norms) // 64 + norms)
    table = plan_table([planned], mesh)
    assert table.splitlines()[0] == (
        "On each of 512 devices (data 8, fsdp 16, tensor 4), activations not counted:"
    )
    assert table.splitlines()[2].split() == [
        "evaluate", "71B", "-", "2.1", "GiB", "-", "-", "-", "2.1", "GiB"
    ]  # fmt: skip


def test_a_mesh_without_devices_is_checked_like_one_with():
    with pytest.raises(InputError, match=r"there are 64 devices; mesh\.data=16"):
        abstract_mesh(64, 3, 1, 4)


def test_vectors_stay_whole_and_matrices_do_not():
    mesh = make_mesh(1, 4, 2)
    found = param_shardings(build_model(config()), mesh)
    assert found["final_norm"]["scale"] == NamedSharding(mesh, P(None))
    assert found["layers"]["input_norm"]["scale"] == NamedSharding(mesh, P(None, None))
    assert found["lm_head"]["kernel"] == NamedSharding(mesh, P("fsdp", "tensor"))
