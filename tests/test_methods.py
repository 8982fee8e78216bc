"""Methods over parameter trees: selection, layouts, scopes, and what stays exact."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.convert import convert
from jaxcompress.core.arrays.affine import Affine
from jaxcompress.core.arrays.sparse import NMSparse, UnstructuredSparse
from jaxcompress.methods import METHODS, best_method, compress


def tree(seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    return {
        "a": {"kernel": jax.random.normal(next(keys), (64, 32)), "bias": jnp.zeros(32)},
        "layers": {"kernel": jax.random.normal(next(keys), (3, 32, 16))},
        "conv": {"kernel": jax.random.normal(next(keys), (3, 3, 8, 16))},
        "table": jax.random.normal(next(keys), (10, 64)),
    }


def test_kernels_are_in_by_out_by_default():
    out = jc.quantize(tree(), bits=8, group_size=8, include=["a/kernel", "layers/kernel"])
    assert out["a"]["kernel"].scale.shape == (32, 64 // 8)
    assert out["layers"]["kernel"].scale.shape == (3, 16, 32 // 8)
    assert out["a"]["kernel"].shape == (64, 32)
    np.testing.assert_allclose(
        out["a"]["kernel"].dense(),
        tree()["a"]["kernel"],
        atol=float(out["a"]["kernel"].scale.max()),
    )
    assert isinstance(out["table"], jax.Array)


def test_what_cannot_be_compressed_is_told():
    with pytest.raises(jc.InputError, match="b: has dtype int32"):
        jc.quantize({"b": jnp.ones((8, 64), jnp.int32)}, include="b", group_size=8)
    model = jc.Model(lambda params, x: x, tree())
    with pytest.raises(jc.InputError, match="takes the whole model"):
        compress(model, "depth", calibration=np.zeros((1, 4)), include="a/kernel")


def test_contracted_axes_decide_the_layout():
    def fn(params, x):
        rows = jnp.einsum("td,vd->tv", x, params["table"])
        return rows + (x @ params["a"]["kernel"]).sum()

    params, x = tree(), jnp.ones((5, 64))
    axes = jc.contractions(fn)(params, x)
    assert axes["table"] == (1,)
    assert axes["a/kernel"] == (0,)
    out = jc.quantize(params, bits=4, group_size=16, include=["table", "a/kernel"], axes=axes)
    assert out["table"].scale.shape == (10, 4)
    np.testing.assert_allclose(jc.lift(fn)(out, x), fn(jc.densify(out), x), rtol=1e-4, atol=1e-4)


def test_convolution_kernels_contract_all_but_the_last_axis():
    def fn(params, x):
        return jax.lax.conv_general_dilated(
            x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    params, x = tree(), jnp.ones((2, 5, 5, 8))
    axes = jc.contractions(fn)(params, x)
    assert axes["conv/kernel"] == (0, 1, 2)
    out = jc.quantize(params, bits=8, group_size=-1, include="conv/kernel", axes=axes)
    assert out["conv"]["kernel"].scale.shape == (16, 1)
    assert out["conv"]["kernel"].shape == (3, 3, 8, 16)


@pytest.mark.parametrize("scope", ["layer", "row", "global"])
def test_exactly_the_asked_fraction_goes(scope):
    params = tree()
    names = ["a/kernel", "layers/kernel"]
    out = jc.prune(params, sparsity=0.37, scope=scope, include=names)
    zeros = {n: np.array(_at(out, n) == 0) for n in names}
    sizes = {n: z.size for n, z in zeros.items()}
    if scope == "global":
        assert sum(z.sum() for z in zeros.values()) == 37 * sum(sizes.values()) // 100
        assert len({z.mean() for z in zeros.values()}) == 2
    elif scope == "layer":
        assert zeros["a/kernel"].sum() == 37 * 64 * 32 // 100
        assert [z.sum() for z in zeros["layers/kernel"]] == [37 * 32 * 16 // 100] * 3
    else:
        assert set(zeros["a/kernel"].sum(0)) == {37 * 64 // 100}
    kept = np.array(_at(out, "a/kernel") != 0)
    original = np.array(params["a"]["kernel"])
    np.testing.assert_array_equal(np.array(_at(out, "a/kernel"))[kept], original[kept])


def test_global_scope_of_one_matrix_is_that_matrix():
    w = jax.random.normal(jax.random.key(1), (2, 4, 8))
    out = METHODS["magnitude"].function(w, sparsity=0.5, scope="global")
    assert (np.array(out) == 0).sum() == 32
    assert np.abs(np.array(w))[np.array(out) == 0].max() < np.abs(np.array(out)[out != 0]).min()


def test_n_of_m_holds_along_the_contracted_axis():
    out = jc.prune(tree(), pattern="2:4", include=["a/kernel", "layers/kernel"])
    kept = np.array(out["a"]["kernel"] != 0).reshape(16, 4, 32)
    assert set(kept.sum(1).ravel()) == {2}


@pytest.mark.parametrize(
    ("store", "pattern", "kind"),
    [("sparse", "2:4", NMSparse), ("sparse", "unstructured", UnstructuredSparse)],
)
def test_stored_sparse_is_the_same_matrix_in_fewer_bytes(store, pattern, kind):
    plain = jc.prune(tree(), pattern=pattern, sparsity=0.6, include="a/kernel")
    out = jc.prune(tree(), pattern=pattern, sparsity=0.6, include="a/kernel", store=store)
    leaf = out["a"]["kernel"]
    assert isinstance(leaf, kind)
    np.testing.assert_array_equal(leaf.dense(), plain["a"]["kernel"])
    assert leaf.nbytes < plain["a"]["kernel"].nbytes


def test_methods_compose_and_zeros_stay():
    sparse = jc.prune(tree(), pattern="2:4", include="a/kernel")
    both = jc.quantize(sparse, bits=4, group_size=16, include="a/kernel")
    np.testing.assert_array_equal(
        np.array(both["a"]["kernel"].dense())[np.array(sparse["a"]["kernel"]) == 0], 0
    )
    other = jc.quantize(tree(), bits=4, group_size=16, include="a/kernel")
    other = jc.prune(other, pattern="2:4", include="a/kernel")
    leaf = other["a"]["kernel"]
    assert isinstance(leaf, Affine)
    assert set((np.array(leaf.dense()) != 0).reshape(16, 4, 32).sum(1).ravel()) <= {0, 1, 2}


def test_a_quantized_matrix_is_stored_sparse_where_its_groups_stay_even():
    small = jc.quantize(tree(), bits=4, group_size=16, include="a/kernel")
    zeros = jc.prune(small, pattern="2:4", include="a/kernel")["a"]["kernel"]
    packed = jc.prune(small, pattern="2:4", include="a/kernel", store="sparse")["a"]["kernel"]
    assert isinstance(packed, NMSparse)
    assert packed.nbytes < zeros.nbytes
    np.testing.assert_array_equal(packed.dense(), zeros.dense())
    with pytest.raises(jc.InputError, match="store sparse"):
        jc.prune(small, include="a/kernel", store="sparse")


def test_overrides_by_pattern():
    model = jc.Model(lambda params, x: x, tree())
    out = compress(
        model,
        "rtn",
        include=["a/kernel", "layers/kernel"],
        bits=4,
        group_size=16,
        overrides={"layers/*": {"bits": 8}},
    )
    assert out.params["a"]["kernel"].bits == 4
    assert out.params["layers"]["kernel"].bits == 8


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: jc.quantize(tree(), include="nothing/**"), "nearest"),
        (lambda: jc.quantize(tree(), include="a/kernel", group_size=48), "a/kernel: group size 48"),
        (lambda: jc.quantize(tree(), include="a/bias"), "a/bias"),
        (lambda: jc.quantize(tree(), include="a/kernel", bits=12), "bits 12"),
        (lambda: jc.prune(tree(), include="a/kernel", sparsity=1.5), "sparsity 1.5"),
        (lambda: compress(jc.Model(None, tree()), "rtm"), "rtn"),
        (lambda: compress(jc.Model(None, tree()), "rtn", bitz=4), "bits"),
        (lambda: compress(jc.Model(None, tree()), "rtn", bits="four"), "type int"),
        (lambda: compress(jc.Model(None, tree()), "rtn", range="best"), "use one of minmax"),
        (lambda: compress(jc.Model(None, tree()), "depth"), "calibration"),
        (
            lambda: jc.quantize({"kernel": jnp.full((32, 4), jnp.nan)}, include="kernel"),
            "128 weights are NaN",
        ),
    ],
)
def test_bad_input_is_one_clear_line(call, words):
    with pytest.raises(jc.InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_every_method_documents_itself():
    for name, method in METHODS.items():
        assert method.summary.endswith("."), name
        for option in method.options.values():
            assert option.help, f"{name}: --{option.name} has no help text"


def _at(params, path):
    for key in path.split("/"):
        params = params[key]
    return params


def test_no_option_is_called_like_a_parameter_of_all_methods():
    """Else the command line would give one the other's value."""
    common = {*inspect.signature(compress).parameters, *inspect.signature(convert).parameters}
    for name, method in METHODS.items():
        assert not common & set(method.options), name


def test_auto_trains_no_scales_of_a_model_that_is_large():
    found = [best_method({"bits": 4}, "text", parameters=10**n) for n in (9, 10)]
    joint = best_method({"bits": 4, "pattern": "2:4"}, "text", parameters=10**10)
    assert joint == "kronecker"
    assert found == ["coordinate+tune", "coordinate"]


@pytest.mark.parametrize(
    ("options", "data", "name"),
    [
        ({}, None, "rtn"),
        ({"bits": 4}, None, "rtn"),
        ({"bits": 4}, "text", "coordinate+tune"),
        ({"bits": 4, "activations": "int8"}, "text", "coordinate+tune"),
        ({"bits": 4, "scales": "updated"}, "text", "gptq"),
        ({"bits": 4, "granularity": "tensor"}, "text", "rtn"),
        ({"sparsity": 0.5}, None, "magnitude"),
        ({"sparsity": 0.5, "bits": None}, "text", "kronecker"),
        ({"pattern": "2:4", "bits": 4}, "text", "kronecker+tune"),
        ({"sparsity": 0.5, "allocation": "owl"}, "text", "wanda"),
        ({"pattern": "block:4x4"}, "text", "wanda"),
        ({"sparsity": 0.5, "seed": 3, "include": ()}, "text", "kronecker"),
    ],
)
def test_auto_is_the_best_that_can_do_it(options, data, name):
    assert best_method(options, data) == name
