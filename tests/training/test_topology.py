"""Pods by name, and a step compiled for pods that are not there."""

import functools
import os
import subprocess
import sys

import pytest

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.distillation import distill
from jaxcompress.methods import compressed_shapes
from jaxcompress.models import DecoderConfig, abstract_params, build_model, functions_of
from jaxcompress.training import aot, topology
from jaxcompress.training.aot import compile_step, token_batch
from jaxcompress.training.mesh import abstract_mesh
from jaxcompress.training.objective import next_token
from jaxcompress.training.plan import plan_stage
from jaxcompress.training.settings import Training


def decoder(width=128, layers=2, **changes):
    config = DecoderConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        windows=(None,) * layers,
        scan_layers=True,
        remat=True,
        dtype="bfloat16",
        **changes,
    )
    functions = functions_of(config)
    return Model(functions.apply, abstract_params(config), functions.blocks, config)


@pytest.mark.parametrize(
    ("name", "chips", "hbm"),
    [("v5p:4x4x4", 64, 95), ("v5e:8x16", 128, 16), ("2*v6e:16x16", 512, 32)],
)
def test_names(name, chips, hbm):
    pod = topology.parse_topology(name)
    assert (pod.chips, pod.hbm, str(pod)) == (chips, hbm * 2**30, name)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5p", "must be KIND:SHAPE such as v5p:4x4x4.*kinds are v5e, v5p, v6e"),
        ("v5p:4x4x", "must be KIND:SHAPE"),
        ("v5x:4x4", "unknown kind of TPU; the nearest are v5p, v5e, v6e"),
        ("v5p:4x4", "a v5p has 3 axes, as in v5p:4x4x4"),
        ("v6e:0x4", "a v6e has 2 axes, as in v6e:4x4"),
        ("0*v6e:4x4", "a v6e has 2 axes"),
    ],
)
def test_wrong_names(name, told):
    with pytest.raises(InputError, match=told):
        topology.parse_topology(name)


def test_without_the_compiler_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'jaxcompress\[tpu\]'"):
        compile_step("v5e:2x4", decoder(), Training(steps=1), next_token, token_batch(16, 64))


def test_what_does_not_fit_is_told_before_compiling():
    settings = Training(steps=1)
    with pytest.raises(InputError, match=r"mesh 3 x 1 x 1 .* there are 8 devices"):
        compile_step("v5e:2x4", decoder(), settings, next_token, token_batch(16, 64), data=3)
    with pytest.raises(InputError, match="batch_size 12: does not divide"):
        compile_step("v5e:2x4", decoder(), settings, next_token, token_batch(12, 64))
    bare = Model(lambda params, ids: ids, {})
    with pytest.raises(InputError, match="model without config"):
        compile_step("v5e:2x4", bare, settings, next_token, token_batch(16, 64))


def test_a_compiler_that_dies_leaves_one_line(monkeypatch):
    died = "noise\nF1121 15:21:29 x.cc:390] Check failed: a == b (1 vs. 2)\n*** stack ***\n at 0\n"

    def run(*args, **kwargs):
        return subprocess.CompletedProcess(args, -6, "", died)

    monkeypatch.setattr(aot, "require_libtpu", lambda: None)
    monkeypatch.setattr(aot.subprocess, "run", run)
    with pytest.raises(InputError, match=r"the compiler stopped: F1121 .* Check failed") as caught:
        compile_step("v5e:2x4", decoder(), Training(steps=1), next_token, token_batch(16, 64))
    assert "\n" not in str(caught.value)


@pytest.mark.aot_tpu
@pytest.mark.slow
def test_twice_the_chips_run_as_many_collectives():
    pytest.importorskip("libtpu")
    student, teacher = decoder(), decoder(256, 3, param_dtype="bfloat16")
    quantized = compressed_shapes(teacher, "rtn", bits=4, group_size=32)
    settings = Training(steps=10)
    compiled = {
        pod: compile_step(
            pod,
            student,
            settings,
            functools.partial(distill, temperature=2.0),
            token_batch(8 * data, 128),
            teachers=(quantized,),
            data=data,
            fsdp=2,
            tensor=2,
        )
        for pod, data in {"v5p:2x2x2": 2, "v5p:2x2x4": 4}.items()
    }
    small, large = compiled.values()
    assert (small.chips, large.chips) == (8, 16)
    assert small.collectives == large.collectives
    assert small.collectives["all-gather"].executed > small.collectives["all-gather"].instructions
    for step, data in zip(compiled.values(), (2, 4), strict=True):
        planned = plan_stage(
            "distill", student, abstract_mesh(4 * data, data, 2, 2),
            settings=settings, teachers=[quantized],
        )  # fmt: skip
        state = planned.weights + planned.moments + planned.teacher
        # The compiler pads small arrays to whole tiles.
        assert state <= step.arguments < 2 * state
        assert 0 < step.temporaries < step.used < step.hbm
        assert step.aliased > 0.9 * step.outputs
        assert step.flops > 0
        assert step.seconds > 0
    assert f"HBM per chip: {small.used / 2**30:.1f} of 95 GiB" in str(small)


@pytest.mark.aot_tpu
@pytest.mark.slow
def test_a_step_that_does_not_fit_is_told():
    pytest.importorskip("libtpu")
    model = decoder(4096, 4)
    with pytest.raises(InputError, match=r"does not fit: uses [\d.]+G of [\d.]+G"):
        compile_step("v5e:2x2", model, Training(steps=1), next_token, token_batch(256, 2049))


@pytest.mark.aot_tpu
def test_pods_that_cannot_be_built():
    pytest.importorskip("libtpu")
    script = (
        "from jaxcompress.training.topology import topology_devices\n"
        "print(len(topology_devices('2*v6e:4x4')))\n"
        "topology_devices('v5e:3x3')\n"
    )
    environment = {**os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "32"
    assert "InputError: topology 'v5e:3x3': there is no such pod" in run.stderr


def test_real_models_may_be_given(monkeypatch):
    """Parameters in memory do not travel to the other process, their shapes do."""
    asked = {}
    config = decoder().config
    monkeypatch.setattr(aot, "require_libtpu", lambda: None)
    monkeypatch.setattr(aot, "CompiledStep", lambda *args, **fields: None)
    monkeypatch.setattr(
        aot, "_in_another_process", lambda request, name: asked.update(request) or {}
    )
    compile_step("v5e:2x4", build_model(config), Training(steps=1), next_token, token_batch(16, 64))
    ((_, shapes),) = asked["models"]
    assert shapes == abstract_params(config)
    assert asked["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
