"""Masked equals shrunk, the smaller config equals the cut program, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import structured_cases as cases
from marks import slow_but

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.readers.coupling import coupling
from jaxcompress.core.readers.cut import combine, cut, masked
from jaxcompress.models import build_model
from jaxcompress.pruning.structured import (
    decide,
    filters,
    heads,
    neurons,
    of_kind,
    queries,
    roles,
    shapes_of,
    units,
    width,
)
from jaxcompress.pruning.structured.cutting import Settings

METHODS = {"heads": heads, "neurons": neurons, "filters": filters, "units": units, "width": width}
KINDS = {
    "llama": ("heads", "queries", "channels", "neurons"),
    "llama_scan": ("heads", "queries", "neurons"),
    "gpt2": ("heads", "channels", "neurons"),
    "decoder": ("heads", "neurons"),
    "encoder": ("heads", "neurons"),
    "lstm": ("units", "embedding"),
    "resnet_a": ("filters",),
    "resnet_b": ("filters",),
    "vgg": ("filters", "neurons"),
    "mobilenet": ("filters",),
}


def halves(model, kinds, *inputs):
    """A record that keeps half of every group of these kinds, other indices in each."""
    rng = np.random.default_rng(0)
    found = roles(coupling(model.apply)(model.params, *inputs))
    records = []
    for kind in kinds:
        for role in of_kind(found, kind):
            group = role.group
            if kind == "filters" and group.size < 8:
                continue
            rows = [
                np.sort(rng.permutation(group.size)[: max(group.size // 2, 1)])
                for _ in range(group.steps or 1)
            ]
            records.append(group.keep(np.stack(rows) if group.steps else rows[0]))
    return combine(*records)


def check_masked_is_shrunk(model, kinds, *inputs):
    kept = halves(model, kinds, *inputs)
    small, function = cut(model.apply, model.params, kept, *inputs)
    expected = jax.jit(model.apply)(masked(model.params, kept), *inputs)
    cases.close(jax.jit(function)(small, *inputs), expected, 1e-5)
    before = sum(x.size for x in jax.tree.leaves(model.params))
    assert sum(x.size for x in jax.tree.leaves(small)) < 0.9 * before


@pytest.mark.parametrize("name", slow_but(KINDS, list(KINDS)[::2]))
def test_masked_is_shrunk(name):
    model = cases.reference(name)
    check_masked_is_shrunk(model, KINDS[name], cases.inputs_of(model))


def test_masked_is_shrunk_in_strangers_networks():
    ids = np.random.default_rng(0).integers(0, cases.VOCAB, (3, 6)).astype(np.int32)
    check_masked_is_shrunk(cases.plain_model(), ("heads", "neurons"), ids)
    x = np.random.default_rng(0).standard_normal((3, 6, 5)).astype(np.float32)
    check_masked_is_shrunk(cases.equinox_model(), ("heads", "neurons"), x)


# What each method leaves of the config.
CONFIGS = {
    ("llama", "heads"): {"num_attention_heads": 3, "num_key_value_heads": 1},
    ("llama", "neurons"): {"intermediate_size": 20},
    ("llama", "width"): {"hidden_size": 12},
    ("llama_scan", "heads"): {"num_attention_heads": 3, "num_key_value_heads": 1},
    ("llama_scan", "neurons"): {"intermediate_size": 20},
    ("llama_scan", "width"): {"hidden_size": 12},
    ("gpt2", "neurons"): {"n_inner": 48},
    ("gpt2", "width"): {"n_embd": 12, "n_head": 2, "n_inner": 96},
    ("decoder", "neurons"): {"dim_feedforward": 20},
    ("decoder", "width"): {"d_model": 12, "num_heads": 2},
    ("encoder", "heads"): {"num_attention_heads": 2},
    ("encoder", "neurons"): {"intermediate_size": 20},
    ("lstm", "units"): {"hidden_size": 6},
    ("resnet_a", "filters"): {"inner_widths": (4, 8, 8)},
    ("resnet_b", "filters"): {"inner_widths": (4, 8, 8)},
    ("vgg", "filters"): {"layers": (4, "M", 6, "M")},
    ("vgg", "neurons"): {"hidden": (8,)},
    ("mobilenet", "filters"): {"expanded": (0, 12, 12), "last_width": 10},
}


# The slower half of these and of the other matrices runs where slow tests do.
QUICK = {
    ("llama", "heads"),
    ("llama_scan", "neurons"),
    ("llama_scan", "width"),
    ("gpt2", "width"),
    ("encoder", "heads"),
    ("lstm", "units"),
    ("resnet_a", "filters"),
}


def quick_first(cases_of, quick):
    return [c if c in quick else pytest.param(*c, marks=pytest.mark.slow) for c in cases_of]


@pytest.mark.parametrize(("name", "kind"), quick_first(CONFIGS, QUICK))
def test_the_result_is_a_smaller_config(name, kind):
    """Parameters fit the new config, and the model computes what the masked network does."""
    model = cases.reference(name)
    inputs = cases.inputs_of(model)
    small = METHODS[kind](model, calibration=inputs, sparsity=0.5, score="magnitude")
    changed = {
        n: getattr(small.config, n)
        for n in small.config.architecture()
        if getattr(small.config, n) != getattr(model.config, n)
    }
    assert changed == CONFIGS[name, kind]
    assert any("kept" in note for note in small.notes)
    if kind != "width":  # there norms divide by what is left
        settings = Settings(sparsity=0.5)
        residual = False if kind == "filters" else None
        made = decide(model, kind, inputs, settings, residual=residual)
        kept = combine(*(g.keep(i) for g, i in zip(made.groups, made.kept, strict=True)))
        expected = jax.jit(model.apply)(masked(model.params, kept), inputs)
        cases.close(jax.jit(small.apply)(small.params, inputs), expected)


def test_blocks_of_the_result_walk():
    model = cases.reference("llama_scan")
    ids = cases.inputs_of(model)
    small = neurons(model, sparsity=0.5)
    cases.close(small.blocks.run(small.params, ids), small(ids))


@pytest.mark.parametrize("option", ["a", "b"])
def test_residual_filters_too(option):
    model = cases.reference(f"resnet_{option}")
    small = filters(model, sparsity=0.5, residual=True)
    assert small.config.widths == (4, 8)
    if option == "a":
        assert small.config.stages()[1][0].front == 2


def test_filters_of_all_layers_together():
    model = cases.reference("resnet_b")
    small = filters(model, sparsity=0.5, allocation="global")
    assert sum(small.config.inner_widths) == 20
    assert small(cases.inputs_of(model)).shape == (4, 10)


def test_every_layer_keeps_its_own_best():
    """Uniform counts, other indices in each layer, stacked or not."""
    ids = cases.inputs_of(cases.reference("llama"))
    whole, stacked = (cases.reference(name) for name in ("llama", "llama_scan"))
    stacked = stacked.replace(params=jc.models.stack_layers(whole.params))
    a = neurons(whole, calibration=ids, sparsity=0.5, score="activation")
    b = neurons(stacked, calibration=ids, sparsity=0.5, score="activation")
    cases.close(b(ids), a(ids))
    ups = [a.params["layers"][str(i)]["mlp"]["up_proj"]["kernel"] for i in range(2)]
    full = [whole.params["layers"][str(i)]["mlp"]["up_proj"]["kernel"] for i in range(2)]
    chosen = [
        {int(np.argmax((np.asarray(f) == np.asarray(u)[:, [k]]).all(0))) for k in range(20)}
        for u, f in zip(ups, full)
    ]
    assert chosen[0] != chosen[1]


def test_a_strangers_network_keeps_its_function():
    """It computes the same on smaller arrays, so nothing but the arrays changes."""
    model = cases.plain_model()
    ids = np.random.default_rng(0).integers(0, cases.VOCAB, (4, 6)).astype(np.int32)
    small = neurons(model, calibration=ids, sparsity=0.5)
    assert small.apply is model.apply
    assert small.params["layers"][0]["w1"].shape == (12, 10)
    small = heads(small, calibration=ids, sparsity=0.3, score="entropy")
    assert small.params["layers"][1]["wo"].shape == (12, 12)  # floor(0.3 * 3) go
    small = heads(small, calibration=ids, sparsity=0.4, score="entropy")
    assert small.params["layers"][1]["wo"].shape == (8, 12)
    assert np.isfinite(np.asarray(small(ids))).all()


def test_a_function_with_written_sizes_runs_the_cut_program():
    def written(p, x):
        return jax.nn.relu((x @ p["a"]).reshape(-1, 2, 4)).reshape(-1, 8) @ p["b"]

    model = Model(written, cases.drawn({"a": (5, 8), "b": (8, 3)}))
    x = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    small = neurons(model, calibration=x, sparsity=0.5)
    assert small.apply is not written
    assert small.config is None
    assert small.params["a"].shape[1] < 8
    assert any("its own program" in note for note in small.notes)
    assert jax.jit(small.apply)(small.params, x[:5]).shape == (5, 3)


def test_layers_that_differ_are_refused_where_the_format_has_one_size():
    model = cases.reference("llama")
    ids = cases.inputs_of(model)
    params = jax.tree.map(lambda x: x, model.params)
    first = params["layers"]["0"]["mlp"]
    first["down_proj"] = {"kernel": first["down_proj"]["kernel"].at[:10].set(1e-6)}
    model = model.replace(params=params)
    options = {"calibration": ids, "sparsity": 0.4, "allocation": "global", "score": "magnitude"}
    with pytest.raises(InputError, match="one size for all layers, here they differ"):
        neurons(model, **options)
    free = neurons(model, **options, form="function")
    assert free.config is None
    assert free(ids).shape == (4, 7, cases.VOCAB)
    with pytest.raises(InputError, match="scan_layers=False"):
        neurons(cases.reference("llama_scan"), **options)


def test_heads_that_the_format_ties_to_the_width_are_refused():
    model = cases.reference("gpt2")
    with pytest.raises(InputError, match="method width"):
        heads(model, sparsity=0.5)
    free = heads(model, sparsity=0.5, form="function")
    assert free.params["layers"]["0"]["attn"]["c_proj"]["kernel"].shape == (12, 24)


def test_multiples():
    model = cases.reference("llama")
    assert neurons(model, sparsity=0.5, multiple=8).config.intermediate_size == 24
    assert neurons(model, sparsity=0.9, minimum=10).config.intermediate_size == 10
    with pytest.raises(InputError, match="multiple 0"):
        neurons(model, multiple=0)


def shapes_alone(model, kind):
    """(config, shapes) of a cut of half, as a dry run has them."""
    made = []

    def shapes(params):
        made.append(shapes_of(kind)(model.replace(params=params), sparsity=0.5))
        return made[-1].params

    found = jax.eval_shape(shapes, model.params)
    return made[-1].config, jax.tree.map(jnp.shape, found)


@pytest.mark.parametrize(("name", "kind"), quick_first(CONFIGS, {("gpt2", "width")}))
def test_shapes_alone_are_those_of_the_cut(name, kind):
    model = cases.reference(name)
    method, inputs = METHODS[kind], cases.inputs_of(model)
    small = method(model, calibration=inputs, sparsity=0.5, score="magnitude")
    assert shapes_alone(model, kind) == (small.config, jax.tree.map(jnp.shape, small.params))


def test_width_of_a_tied_model_and_in_half_precision():
    config = dataclasses.replace(
        cases.CONFIGS["llama"], tie_word_embeddings=True, dtype="bfloat16", param_dtype="bfloat16"
    )
    model = build_model(config)
    ids = cases.inputs_of(model)
    small = width(model, calibration=ids, sparsity=0.25, multiple=8)
    assert small.config.hidden_size == 24  # 18 is no multiple of 8: rounded up
    small = width(model, calibration=ids, sparsity=0.5, multiple=8)
    assert small.config.hidden_size == 16
    assert small.params["embed"]["embedding"].shape == (cases.VOCAB, 16)


def test_settings_are_those_of_the_methods():
    """One record of options, one docstring: they must not drift apart."""
    import inspect

    fields = {f.name: f.default for f in dataclasses.fields(Settings)}
    for method in (heads, neurons, filters, units, width):
        for name, parameter in inspect.signature(method).parameters.items():
            if name in fields and (method, name) not in {(width, "score"), (width, "reduce")}:
                assert parameter.default == fields[name], (method.__name__, name)


@pytest.mark.parametrize("name", ["llama", "llama_scan"])
def test_query_heads_go_under_each_key_head(name):
    """Against the network whose output rows of the lowest query heads are zero."""
    model = cases.reference(name)
    ids = cases.inputs_of(model)
    small = queries(model, calibration=ids, sparsity=0.34, score="magnitude")
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (4, 2)
    layers = model.params["layers"]
    layers = (
        [layers[str(i)] for i in range(2)] if name == "llama" else model.blocks.of(model.params)
    )
    masked_layers = []
    for layer in layers:
        q, o = (np.asarray(layer["attn"][n]["kernel"]) for n in ("q_proj", "o_proj"))
        # [in, key head, query head, head_dim] and [key head, query head, head_dim, out]
        scores = np.abs(q.reshape(24, 2, 3, 4)).sum((0, 3))
        scores = scores + np.abs(o.reshape(2, 3, 4, 24)).sum((2, 3))
        gone = scores.argmin(1)
        assert len(set(gone)) > 0
        o = o.reshape(2, 3, 4, 24).copy()
        o[np.arange(2), gone] = 0
        attn = {**layer["attn"], "o_proj": {"kernel": jnp.asarray(o.reshape(24, 24))}}
        masked_layers.append({**layer, "attn": attn})
    expected = model.blocks.run(model.blocks.put(model.params, masked_layers), ids)
    cases.close(small(ids), expected, 1e-4)
    with pytest.raises(InputError, match="queries: gpt2 has none"):
        queries(cases.reference("gpt2"), sparsity=0.5)
