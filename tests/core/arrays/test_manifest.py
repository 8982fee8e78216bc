"""The manifest names what a checkpointer would restore wrongly without a word."""

import copy
import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxcompress.core.arrays.affine import Affine, encode_affine, minmax_range
from jaxcompress.core.arrays.base import STORED, Partition
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.arrays.manifest import abstract, check_manifest, from_manifest, manifest
from jaxcompress.core.errors import InputError


def affine(*shape, symmetric=False):
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    scale, zero = minmax_range(matrix, bits=4, groups=2, symmetric=symmetric)
    return encode_affine(matrix, scale, zero, bits=4)


@jax.tree_util.register_dataclass
@dataclass
class Block:
    kernel: Any
    bias: Any


def tree():
    low_rank = LowRank(jnp.ones((8, 2)), jnp.ones((2, 64)))
    return {
        "layers": [
            {"w": affine(8, 64), "bias": jnp.ones(3, jnp.bfloat16)},
            {"w": affine(2, 8, 64, symmetric=True)},
        ],
        "sum": Sum.of(low_rank, affine(8, 64)),
        "0": {"a/b": jnp.arange(3)},
        "scalar": jnp.float32(2),
    }


def saved_of(params):
    return json.loads(json.dumps(manifest(params)))


def assert_same(mine, theirs):
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)


def test_an_entry_says_class_spec_and_buffers():
    entry = saved_of(tree())["leaves"]["layers/0/w"]
    assert entry == {
        "keys": ["layers", 0, "w"],
        "class": "Affine",
        "static": {
            "bits": 4,
            "pad": 0,
            "dims": [["k", -1], ["n", -1]],
            "casts": ["float32"],
            "layout": "canonical",
            "width": None,
        },
        "buffers": {
            "codes": {"shape": [8, 8], "dtype": "int32"},
            "scale": {"shape": [8, 2], "dtype": "float32"},
            "zero_point": {"shape": [8, 2], "dtype": "uint8"},
        },
    }
    assert saved_of(tree())["versions"]["jax"] == jax.__version__


def test_orbax_accepts_wrong_bits_and_the_manifest_does_not(tmp_path):
    params = tree()
    saved = saved_of(params)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "c", params)
    checkpointer.wait_until_finished()
    wrong = copy.deepcopy(params)
    wrong["layers"][0]["w"] = wrong["layers"][0]["w"].replace(bits=8)
    restored = checkpointer.restore(tmp_path / "c", wrong)
    assert restored["layers"][0]["w"].bits == 8  # the reason for the manifest
    with pytest.raises(InputError, match=r"^layers/0/w: bits is 8 here, 4 in the checkpoint$"):
        check_manifest(restored, saved)
    assert_same(from_manifest(saved, checkpointer.restore(tmp_path / "c")), params)


def change(path, **static):
    def apply(params):
        parts = path.split("/")
        parent = params
        for part in parts[:-1]:
            parent = parent[int(part) if isinstance(parent, list) else part]
        parent[parts[-1]] = parent[parts[-1]].replace(**static)

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("layers/0/w", dims=STORED), "layers/0/w: dims is"),
        (change("layers/0/w", pad=3), "layers/0/w: pad is 3 here, 0 in"),
        (
            change("layers/0/w", zero_point=None),
            "layers/0/w: has a zero_point in the checkpoint only",
        ),
        (change("layers/0/w", layout="tpu"), "layers/0/w: layout is 'tpu' here"),
        (change("layers/0/w", scale=jnp.ones((8, 1))), r"layers/0/w/scale: shape is \[8, 1\] here"),
        (
            change("layers/0/w", scale=jnp.ones((8, 2), jnp.bfloat16)),
            "layers/0/w/scale: dtype is bfloat16 here, float32 in",
        ),
        (lambda p: p["layers"][0].update(w=jnp.ones(3)), "layers/0/w: class is a plain array here"),
        (
            lambda p: p["layers"][0].update(bias=affine(8, 64)),
            "bias: class is Affine here, a plain",
        ),
        (lambda p: p["layers"][0].pop("bias"), "layers/0/bias: in the checkpoint, but not here"),
        (lambda p: p.update(more=jnp.ones(2)), "more: not in the checkpoint"),
        (
            lambda p: p.update(sum=p["sum"].replace(second=p["sum"].second.replace(bits=2))),
            "sum/second: bits is 2 here",
        ),
    ],
)
def test_the_first_difference_is_named(edit, message):
    params = tree()
    saved = saved_of(params)
    check_manifest(params, saved)
    edit(params)
    with pytest.raises(InputError, match=message) as caught:
        check_manifest(params, saved)
    assert "\n" not in str(caught.value)


def test_where_an_array_lies_does_not_matter():
    params = {"w": affine(8, 64)}
    placed = {"w": params["w"].replace(partition=Partition(None, ("x",)))}
    assert manifest(placed) == manifest(params)
    check_manifest(placed, saved_of(params))


def test_an_abstract_tree_has_the_structure_and_is_checked_too():
    params = tree()
    shapes = abstract(saved_of(params))
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    assert jax.tree.leaves(shapes) == jax.tree.leaves(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    )
    check_manifest(shapes, saved_of(params))


def test_objects_and_a_leaf_alone():
    params = Block(affine(8, 64), jnp.ones(3))
    plain = {"kernel": vars(params.kernel), "bias": params.bias}
    rebuilt = from_manifest(saved_of(params), plain)
    assert_same(rebuilt, {"kernel": params.kernel, "bias": params.bias})
    assert_same(from_manifest(saved_of(params), params), rebuilt)
    alone = affine(8, 64)
    assert_same(from_manifest(saved_of(alone), vars(alone)), alone)


def test_what_does_not_fit_the_manifest_is_refused():
    params = {"w": affine(8, 64)}
    saved = saved_of(params)
    plain = {"w": vars(params["w"])}
    with pytest.raises(InputError, match="w: 'w' is missing"):
        from_manifest(saved, {})
    with pytest.raises(InputError, match=r"w/codes: shape is \[2\], \[8, 8\] in the manifest"):
        from_manifest(saved, {"w": {**plain["w"], "codes": jnp.ones(2, jnp.int32)}})
    with pytest.raises(InputError, match="version 7"):
        abstract({**saved, "version": 7})
    saved["leaves"]["w"]["class"] = "Affin"
    with pytest.raises(InputError, match="w: class 'Affin' is unknown"):
        abstract(saved)
    with pytest.raises(InputError, match="name: a leaf that is no array"):
        manifest({"name": "text"})
    with pytest.raises(InputError, match="w: casts: a static field of type set"):
        manifest({"w": params["w"].replace(casts={1})})


def test_a_manifest_names_classes_and_never_code():
    saved = saved_of({"w": affine(8, 64)})
    saved["leaves"]["w"]["class"] = "CompressedArray"
    with pytest.raises(InputError, match="unknown"):
        abstract(saved)
    assert type(abstract(saved_of({"w": affine(8, 64)}))["w"]) is Affine
