"""The Hopper kernel without a GPU: what it lowers to, computes interpreted, and refuses.

On a CUDA device the tests marked ``gpu`` run it for real: see ``launch/gpu_check.sh``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from wna16_cases import Weight, assert_close

from pallas_kernels import wna16, wna16_gpu

HAS_INTERPRETER = jax.__version_info__ >= (0, 11)  # of what this kernel uses


def lowered(m=16, n=256, k=512, group=128, bits=4, zero=False, layout="gpu", dtype="bfloat16"):
    """StableHLO for CUDA, with Mosaic's serialized kernels inside."""
    scale = (k // group, 1, n) if layout == "gpu" else (n, k // group)
    operands = [((m, k), dtype), ((n, k * bits // 32), "int32"), (scale, dtype)]
    if zero:
        operands.append((scale, "uint8"))
    matmul = jax.jit(lambda *a: wna16.wna16_matmul(*a, bits=bits, layout=layout))
    structs = [jax.ShapeDtypeStruct(*v) for v in operands]
    return matmul.trace(*structs).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "case",
    [
        {"m": 1},
        {"m": 128, "n": 14336, "k": 4096},
        {"m": 33, "k": 11008, "n": 4096, "zero": True},
        {"group": 64},
        {"group": 512},
        {"bits": 8},
        {"layout": "canonical"},
    ],
    ids=str,
)
def test_cuda_gets_the_kernel_by_default(case):
    text = lowered(**case)
    assert text.count("mosaic_gpu_v2") + text.count("custom_call @mosaic_gpu") >= 1
    assert "wgmma" in text or "nvvm" in text
    # The weight meets no other operation than a change of type: nothing of its size is computed.
    n, k, bits = case.get("n", 256), case.get("k", 512), case.get("bits", 4)
    for line in text.splitlines():
        if f"tensor<{n}x{k}x" in line or f"tensor<{n}x{k * bits // 32}x{32 // bits}x" in line:
            allowed = ("bitcast_convert", "reshape", "custom_call", "func.func", "return", "call @")
            assert any(word in line for word in allowed), line[:300]


@pytest.mark.parametrize(
    "case",
    [
        {"m": 129},
        {"n": 192},
        {"group": 32},
        {"bits": 2},
        {"dtype": "float32"},
    ],
    ids=str,
)
def test_what_the_kernel_does_not_take_falls_through_to_xla(case):
    text = lowered(**case)
    assert "mosaic" not in text
    assert "dot_general" in text


def test_a_named_kernel_says_what_it_does_not_take():
    weight = Weight(192, 128, 4, dtype="bfloat16")
    x = jax.ShapeDtypeStruct((1, 128), jnp.bfloat16)
    matmul = jax.jit(lambda x: weight.matmul(x, implementation="mosaic_gpu"))
    with pytest.raises(NotImplementedError, match=r"W \[192, 128\] .* not in whole blocks"):
        matmul.trace(x).lower(lowering_platforms=("cuda",))


def test_every_block_is_covered_and_the_gpu_filled():
    spec = Weight(1, 1, 4).spec
    for n, k in ((4096, 4096), (4096, 11008), (11008, 4096), (14336, 4096), (4096, 14336)):
        x, scale, codes = (
            jax.ShapeDtypeStruct((1, *shape), dtype)
            for shape, dtype in (
                ((16, k), jnp.bfloat16),
                ((n, k // 128), jnp.bfloat16),
                ((n, k // 8), jnp.int32),
            )
        )
        steps = wna16_gpu._checked_steps(x, scale, codes, spec(k=k, out_dtype="bfloat16"))
        assert k <= steps.per_block * steps.splits * steps.depth < 1.2 * k
        blocks = steps.splits * n // wna16_gpu.BLOCK_ROWS
        assert 0.6 * wna16_gpu.MULTIPROCESSORS < blocks <= wna16_gpu.MULTIPROCESSORS


@pytest.mark.skipif(not HAS_INTERPRETER, reason="Mosaic GPU's interpreter needs jax 0.11")
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "m", "k", "groups"),
    [(4, 3, 512, 4), (4, 16, 256, 4), (8, 8, 256, 1), (4, 8, 1408, 11)],
)
def test_the_kernel_interpreted(monkeypatch, bits, m, k, groups, asymmetric):
    """The interpreter takes both operands of wgmma from shared memory only: W is put there."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    real_kernel, real_wgmma, rooms = plgpu.kernel, plgpu.wgmma, []

    def kernel(body, *, scratch_types, **options):
        def with_room(*refs, w_smem, **scratch):
            rooms.append(w_smem)
            body(*refs, **scratch)

        shape = (wna16_gpu.COMPUTING_WARPGROUPS, wna16_gpu.WARPGROUP_ROWS, 128)
        scratch_types = {**scratch_types, "w_smem": plgpu.SMEM(shape, jnp.bfloat16)}
        options |= {"scratch_types": scratch_types, "interpret": InterpretGPUParams()}
        return real_kernel(with_room, **options)

    def wgmma(sum_ref, w, x_ref):
        room = rooms[-1].at[jax.lax.axis_index("warpgroup"), :, : w.shape[1]]
        room[...] = w
        plgpu.commit_smem()
        real_wgmma(sum_ref, room, x_ref)

    monkeypatch.setattr(wna16_gpu, "MULTIPROCESSORS", 4)  # so that steps reach beyond K
    monkeypatch.setattr(plgpu, "wgmma", wgmma)
    monkeypatch.setattr(plgpu, "kernel", kernel)
    weight = Weight(128, k, bits, groups, "bfloat16", asymmetric)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(m, k)), jnp.bfloat16)
    y = wna16_gpu.product(x[None], *weight.batch_of_one(), spec=weight.spec())[0]
    assert_close(y, np.asarray(x, np.float64) @ weight.dense().T, 1e-5)
