"""PyTorch alone opens what leaves: stock transformers, and modules written beside weights."""

import importlib.util

import jax
import numpy as np
import pytest
import structured_cases as cases
import tiny
from marks import slow_but

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.pruning.structured import filters, heads, neurons, units, width
from jaxcompress.pruning.structured.torch_module import write_torch_module

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Hugging Face Llama: 4 heads, 2 of keys, width 64, 128 neurons."""
    return tiny.write_llama(tmp_path_factory.mktemp("llama"), layers=2)


def theirs(directory, ids):
    """Logits of stock transformers."""
    import transformers

    model, said = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(said.values())
    with torch.no_grad():
        return model.eval(), model(torch.from_numpy(ids.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize(
    ("method", "options", "shapes"),
    [
        (heads, {"sparsity": 0.5, "score": "gate"}, {"num_key_value_heads": 1}),
        (neurons, {"sparsity": 0.25, "score": "wanda", "multiple": 32}, {"intermediate_size": 96}),
        (width, {"sparsity": 0.25, "multiple": 16}, {"hidden_size": 48}),
    ],
)
def test_stock_transformers_loads_a_smaller_llama(llama, tmp_path, method, options, shapes):
    model = jc.load(llama)
    ids = np.random.default_rng(0).integers(0, 300, (4, 24)).astype(np.int32)
    small = method(model, calibration=ids, **options)
    jc.save(small, tmp_path / "out")
    loaded, logits = theirs(tmp_path / "out", ids)
    for name, value in shapes.items():
        assert getattr(loaded.config, name) == value
    cases.close(np.asarray(small(ids)), logits, 1e-4)


def test_three_kinds_one_after_another(llama, tmp_path):
    model = jc.load(llama, scan_layers=True)
    ids = np.random.default_rng(0).integers(0, 300, (4, 24)).astype(np.int32)
    small = width(neurons(heads(model, sparsity=0.5), sparsity=0.5), calibration=ids, sparsity=0.25)
    jc.save(small, tmp_path / "out")
    _, logits = theirs(tmp_path / "out", ids)
    cases.close(np.asarray(small(ids)), logits, 1e-4)


def run_module(model, folder, inputs, channels_last=True):
    """Logits of the module file, imported as a stranger would."""
    _, module = write_torch_module(model, folder)
    spec = importlib.util.spec_from_file_location("network", module)
    network = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(network)
    inputs = np.moveaxis(inputs, -1, 1) if channels_last else inputs.astype(np.int64)
    with torch.no_grad():
        return network.load()(torch.from_numpy(np.ascontiguousarray(inputs))).numpy()


@pytest.mark.parametrize("name", ["resnet_a", "resnet_b", "vgg", "mobilenet"])
@pytest.mark.parametrize("allocation", slow_but(["uniform", "global"], ["global"]))
def test_a_smaller_cnn_in_pytorch(name, allocation, tmp_path):
    model = cases.reference(name)
    images = cases.inputs_of(model)
    residual = name != "vgg" and allocation == "uniform"
    small = filters(model, sparsity=0.5, allocation=allocation, residual=residual)
    assert small.config != model.config
    logits = run_module(small, tmp_path, images)
    cases.close(np.asarray(jax.jit(small.apply)(small.params, images)), logits, 1e-4)


def test_a_smaller_lstm_in_pytorch(tmp_path):
    model = cases.reference("lstm")
    ids = cases.inputs_of(model)
    small = units(model, sparsity=0.25)
    logits = run_module(small, tmp_path, ids, channels_last=False)
    cases.close(np.asarray(small(ids)), logits, 1e-4)


def test_what_has_no_module_is_refused(tmp_path):
    with pytest.raises(InputError, match="written for cifar_resnet, lstm, mobilenet, vgg"):
        write_torch_module(cases.reference("llama"), tmp_path)
    with pytest.raises(InputError, match="no name that Python can import"):
        write_torch_module(cases.reference("vgg"), tmp_path, "a-b")
