"""Teacher and student on one mesh of eight devices, each split in its own way."""

import subprocess
import sys

import pytest

SCRIPT = """
import re
import jax, jax.numpy as jnp, numpy as np
import jaxcompress as jc
from jaxcompress.distillation import distill, resnet_student
from jaxcompress.models import DecoderConfig, ResNetConfig, build_model
from jaxcompress.training.mesh import dense_shardings, global_batch, make_mesh

assert len(jax.devices()) == 8
mesh = make_mesh(data=2, fsdp=2, tensor=2)

def value_and_gradient(objective, params, constants, batch, mesh):
    def mean(params, constants, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            sums = objective.function(params, batch, None, constants)
        return sums["loss"][0] / sums["loss"][1]
    program = jax.jit(jax.value_and_grad(mean)).lower(params, constants, batch).compile()
    return program(params, constants, batch), program.as_text()

def difference(got, want):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(np.abs(np.asarray(g) - np.asarray(w)).max() for g, w in pairs) / scale

def compare(name, student, teacher, batch, rules, **options):
    objective = distill(student, teacher, **options)
    alone = make_mesh(devices=jax.devices()[:1])
    want, _ = value_and_gradient(objective, student.params, teacher.params, batch, alone)
    placed = [
        jc.place(model.params, dense_shardings(model, mesh, rule), batch=("data", "fsdp"))
        for model, rule in zip((student, teacher), rules)
    ]
    got, text = value_and_gradient(objective, *placed, global_batch(batch, mesh), mesh)
    print(name, difference(got[0], want[0]), difference(got[1], want[1]))
    # Shapes that travel, of three axes and more: hidden states, but never logits.
    sent = re.findall(r"= (.*?) (?:all|collective|reduce)-[a-z]+(?:-start)?\\(", text)
    shapes = {s for line in sent for s in re.findall(r"\\[(\\d+,\\d+,[\\d,]+)\\]", line)}
    assert "images" in name or shapes
    assert not any(s.split(",")[-1] in ("80", "160") for s in shapes), shapes
    return placed

config = DecoderConfig(
    model_type="llama", vocab_size=160, hidden_size=64, intermediate_size=128,
    num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    tie_word_embeddings=False,
)
dense = build_model(config)
teacher = dense.replace(params=jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, dense.params))
student = build_model(config, seed=1)
ids = np.random.default_rng(0).integers(0, 160, (8, 24)).astype(np.int32)
tensor = {name: "tensor" for name in ("vocab", "heads", "kv_heads", "mlp")}
fsdp = {"embed": "fsdp"}
for name, model in (
    ("dense", teacher), ("quantized", jc.compress(teacher, "rtn", bits=4, group_size=32)),
):
    placed = compare(name, student, model, {"ids": ids}, (fsdp, tensor), chunk=8)
specs = [p["layers"]["0"]["mlp"]["up_proj"]["kernel"] for p in placed]
print("specs", specs[0].sharding.spec, specs[1].codes.sharding.spec)

cnn = build_model(ResNetConfig(stage_sizes=(1, 1), widths=(8, 16)))
images = np.random.default_rng(0).normal(size=(16, 16, 16, 3)).astype(np.float32)
labels = (np.arange(16) % 10).astype(np.int32)
small = resnet_student(cnn, (1,), seed=1)
compare("images", small, cnn, {"images": images, "labels": labels}, (fsdp, tensor))
"""


@pytest.mark.slow
def test_two_models_split_differently_agree_with_one_device():
    """In a process of its own, so that the mesh is over fresh devices."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = dict(line.split(" ", 1) for line in run.stdout.splitlines())
    for name in ("dense", "quantized", "images"):
        value, gradient = map(float, lines[name].split())
        assert value < 1e-5
        assert gradient < 3e-5
    assert "'fsdp'" in lines["specs"]
    assert "'tensor'" in lines["specs"]
