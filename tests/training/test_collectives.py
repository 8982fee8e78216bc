"""Collectives counted in programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxcompress.training.collectives import KINDS, Count, count_collectives

# As a TPU's compiler writes it: no trip counts, counters through copies, starts and their ends,
# a reduce-scatter as a fusion, a collective in two pieces, and a layout with parentheses.
TPU = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %p = f32[8]{0:T(128)} parameter(0)
  %all-reduce.9 = f32[8]{0:T(128)} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[2]{0:T(128)} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={2}
}

%inner_condition (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(8)
  %at = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%inner (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%s), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%at, %two)
  %v = f32[8]{0:T(128)} get-tuple-element(%s), index=1
  %permute = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}) collective-permute-start(%v), channel_id=1
  %permuted = f32[8]{0:T(128)} collective-permute-done(%permute)
  ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%next, %permuted)
}

%outer_condition (s: (f32[8], s32[])) -> pred[] {
  %s = (f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%s), index=1
  %limit = s32[]{:T(128)} constant(32)
  ROOT %lt = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%outer (s: (f32[8], s32[])) -> (f32[8], s32[]) {
  %s = (f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %v = f32[8]{0:T(128)} get-tuple-element(%s), index=0
  %at = s32[]{:T(128)} get-tuple-element(%s), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%one, %at)
  %gathered = f32[32]{0:T(128)} all-gather(%v), replica_groups=[4,16]<=[16,4]T(1,0), dimensions={0}
  %zero = s32[]{:T(128)} constant(0)
  %copied = s32[]{:T(128)} copy(%zero)
  %begin = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(128)}) tuple(%copied, %v)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%begin), condition=%inner_condition, body=%inner
  %w = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
  ROOT %out = (f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%w, %next)
}

%piece.1 (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %a2a.1 = f32[8]{0:T(128)} all-to-all(%p), channel_id=7, dimensions={0}
}

%piece.2 (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %a2a.2 = f32[8]{0:T(128)} all-to-all(%p), channel_id=7, dimensions={0}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  %scattered = f32[2]{0:T(128)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %begun = f32[8]{0:T(128)} fusion(%p), kind=kCustom, calls=%piece.1
  %ended = f32[8]{0:T(128)} fusion(%begun), kind=kCustom, calls=%piece.2
  %reduced = (f32[8]{0:T(128)}, f32[8]{0:T(128)}) all-reduce(%p, %p), to_apply=%add
  %first = s32[]{:T(128)} constant(0)
  %begin = (f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%p, %first)
  %loop = (f32[8]{0:T(128)}, s32[]{:T(128)}) while(%begin), condition=%outer_condition, body=%outer
  ROOT %v = f32[8]{0:T(128)} get-tuple-element(%loop), index=0
}
"""


def test_loops_are_followed_where_no_trip_count_is_written():
    counts = count_collectives(TPU)
    assert list(counts) == list(KINDS)
    assert counts["all-gather"] == Count(1, 32)
    assert counts["collective-permute"] == Count(1, 32 * 4)
    assert counts["all-reduce"] == Count(1, 1)
    assert counts["reduce-scatter"] == Count(1, 1)
    assert counts["all-to-all"] == Count(1, 1)  # in two pieces


def test_a_loop_that_cannot_be_followed_is_told():
    endless = TPU.replace("%copied = s32[]{:T(128)} copy(%zero)", "%copied = s32[] rng(%zero)")
    with pytest.raises(ValueError, match="trips of the loop over inner cannot be told"):
        count_collectives(endless)


def test_a_compiled_program_with_known_collectives():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def inner(x, _):
        return lax.ppermute(x, "x", ring) * 2, None

    def outer(x, _):
        x, _ = lax.scan(inner, x, None, length=3)
        gathered = lax.all_gather(x, "x", tiled=True)
        return lax.psum_scatter(gathered, "x", tiled=True), None

    def local(x):
        x = lax.all_to_all(x.reshape(4, -1), "x", 0, 1, tiled=True).reshape(-1)
        x, _ = lax.scan(outer, x, None, length=5)
        return x + lax.psum(x, "x").sum()

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    text = run.lower(jnp.zeros(64)).compile().as_text()
    assert count_collectives(text) == {
        "all-gather": Count(1, 5),
        "reduce-scatter": Count(1, 5),
        "all-reduce": Count(1, 1),
        "all-to-all": Count(1, 1),
        "collective-permute": Count(1, 15),
    }
