"""The table between parameters and checkpoint tensors, both ways and lazily."""

import dataclasses

import jax
import numpy as np
import pytest
from decoder_variants import ours, torch_model
from flax.traverse_util import flatten_dict
from torch_twins import DecoderModel, LSTMModel, ResNetModel

from jaxcompress.core.errors import InputError
from jaxcompress.models import (
    DecoderConfig,
    EncoderConfig,
    GPT2Config,
    MobileNetConfig,
    VGGConfig,
    abstract_params,
    build_model,
    from_state_dict,
    linear_paths,
    logical_axes,
    model_from_tensors,
    name_map_of,
    to_checkpoint_tensors,
)


def tensors_of(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def config_of(twin, **changes):
    return dataclasses.replace(DecoderConfig.from_hf(twin.config.to_dict()), **changes)


def every_config():
    small_gpt2 = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    yield "gpt2", small_gpt2
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 2}
    yield "bert", EncoderConfig(vocab_size=11, intermediate_size=9, **sizes)
    yield "bert_alone", EncoderConfig(vocab_size=11, intermediate_size=9, pooler=False, **sizes)
    yield "gpt2_untied", dataclasses.replace(small_gpt2, tie_word_embeddings=False)
    yield "resnet", from_state_dict(ResNetModel().state_dict(), "cifar_resnet").config
    yield "resnet_b", from_state_dict(ResNetModel(option="B").state_dict(), "cifar_resnet").config
    yield "vgg", VGGConfig(layers=(4, "M", 5), hidden=(6,), pool_size=2)
    small = MobileNetConfig(expanded=(0, 9), widths=(4, 5), strides=(1, 2), last_width=7)
    yield "mobilenet", small
    yield "lstm", from_state_dict(LSTMModel().state_dict(), "lstm").config
    state = DecoderModel(final_norm=True).state_dict()
    yield "tutorial", from_state_dict(state, "transformer_decoder", num_heads=4).config
    for variant in ("llama3", "llama_bias", "qwen2", "qwen3"):
        yield variant, config_of(torch_model(variant))


@pytest.mark.parametrize(
    ("name", "config"), list(every_config()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_the_table_is_the_parameters(name, config):
    """Same paths, and as many logical axes as axes, unrolled and scanned."""
    layouts = [False] if name.startswith(("resnet", "lstm", "vgg", "mobilenet")) else [False, True]
    for scan_layers in layouts:
        config = dataclasses.replace(config, scan_layers=scan_layers)
        shapes = flatten_dict(abstract_params(config), sep="/")
        axes = flatten_dict(logical_axes(config), sep="/")
        assert axes.keys() == shapes.keys()
        for path, shape in shapes.items():
            assert len(axes[path]) == len(shape.shape), path
            assert (axes[path][0] == "layers") == (scan_layers and path.startswith("layers/"))


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("variant", ["llama3", "llama_bias", "mistral", "qwen2", "qwen3"])
def test_tensors_leave_as_they_came(variant, scan_layers):
    twin = torch_model(variant)
    model = ours(twin, scan_layers=scan_layers)
    out, want = dict(to_checkpoint_tensors(model)), tensors_of(twin)
    if twin.config.tie_word_embeddings:
        want.pop("lm_head.weight")
    assert out.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(out[name], want[name])


def test_names_and_paths():
    names = name_map_of(config_of(torch_model("qwen3")))
    q = "model.layers.1.self_attn.q_proj.weight"
    assert names.paths(q) == ("layers/1/attn/q_proj/kernel",)
    assert names.names("layers/1/attn/q_proj/kernel") == (q,)
    assert names.names("layers/attn/q_proj/kernel") == tuple(
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)
    )
    assert names.paths("layers.1.self_attn.q_proj.weight") == names.paths(q)
    assert names.paths("module." + q) == names.paths(q)
    assert names.paths("lm_head.weight") == ("embed/embedding",)
    assert names.paths("model.layers.1.self_attn.rotary_emb.inv_freq") == ()
    assert names.unmapped([q, "other"]) == ["other"]


def test_one_tensor_that_fills_several_parameters():
    model = from_state_dict(DecoderModel().state_dict(), "transformer_decoder", num_heads=4)
    names = name_map_of(model.config)
    fused = "transformer_decoder.layers.0.multihead_attn.in_proj_weight"
    assert names.paths(fused) == tuple(f"layers/0/cross_attn/{p}_proj/kernel" for p in "qkv")
    assert names.names("layers/0/cross_attn/k_proj/kernel") == (fused,)


def test_linear_paths_are_the_products_without_embedding_norms_and_output():
    twin = torch_model("qwen2")
    linears = {
        name.removeprefix("model.").removesuffix(".weight")
        for name, module in ((n + ".weight", m) for n, m in twin.named_modules())
        if type(module).__name__ == "Linear" and "lm_head" not in name
    }
    found = linear_paths(ours(twin))
    assert len(found) == len(linears) == 21
    assert all(path.endswith("_proj/kernel") for path in found)
    assert len(linear_paths(ours(twin, scan_layers=True))) == 7
    resnet = from_state_dict(ResNetModel().state_dict(), "cifar_resnet")
    assert len(linear_paths(resnet)) == 19


@pytest.mark.parametrize("names", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_table_is_found_under_either_name(names):
    twin = torch_model("llama3")
    tensors = tensors_of(twin)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} - {names}:
        del tensors[name]
    model = model_from_tensors(config_of(twin), tensors.__getitem__, tensors)
    np.testing.assert_array_equal(model.params["embed"]["embedding"], tensors[names])


def test_the_base_model_alone_and_wrapped_names_load():
    twin = torch_model("llama3")
    want = ours(twin)
    base = {n.removeprefix("model."): v for n, v in tensors_of(twin).items() if "lm_head" not in n}
    for tensors in (base, {f"module.{n}": v for n, v in tensors_of(twin).items()}):
        model = model_from_tensors(config_of(twin), tensors.__getitem__, tensors)
        jax.tree.map(np.testing.assert_array_equal, model.params, want.params)


def test_missing_and_misshapen_tensors_are_named():
    twin = torch_model("llama2")
    tensors = tensors_of(twin)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(InputError, match=r"'model\.layers\.2\.mlp\.up_proj\.weight'.*missing"):
        model_from_tensors(config_of(twin), tensors.__getitem__, tensors)
    tensors = tensors_of(twin)
    tensors["model.norm.weight"] = np.ones(5, np.float32)
    with pytest.raises(InputError, match=r"final_norm/scale the shape \(5,\).*\(48,\)"):
        model_from_tensors(config_of(twin), tensors.__getitem__, tensors)


def test_each_tensor_is_read_once():
    twin = torch_model("llama2")
    tensors, read = tensors_of(twin), []

    def reader(name):
        read.append(name)
        return tensors[name]

    for scan_layers in (False, True):
        read.clear()
        config = config_of(twin, scan_layers=scan_layers)
        model_from_tensors(config, reader, tensors)
        assert sorted(read) == sorted(tensors)


def test_dtype_casts_floats_but_not_running_statistics():
    state = {n: v.numpy() for n, v in ResNetModel().state_dict().items()}
    names = name_map_of(from_state_dict(state, "cifar_resnet").config)
    params = names.load(state.__getitem__, state, dtype="float16")
    assert params["params"]["bn1"]["scale"].dtype == np.float16
    assert params["batch_stats"]["bn1"]["var"].dtype == np.float32


def test_fresh_parameters_depend_on_the_seed():
    config = config_of(torch_model("llama3"))
    one, same, other = (build_model(config, seed=s).params for s in (0, 0, 1))
    kernel = lambda params: params["layers"]["0"]["mlp"]["up_proj"]["kernel"]  # noqa: E731
    np.testing.assert_array_equal(kernel(one), kernel(same))
    assert np.abs(kernel(one) - kernel(other)).max() > 0.1
