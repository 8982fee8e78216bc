"""A bare PyTorch state dict: the language model that tutorials build on `nn.TransformerDecoder`."""

import json
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.utils.prune

import jaxcompress as jc
from jaxcompress.checkpoints.native import write_native
from jaxcompress.checkpoints.prune import unfold_pruned
from jaxcompress.cli import main

WIDTH, HEADS, VOCAB, LENGTH = 64, 4, 512, 32


class TutorialModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, WIDTH)
        self.positions = torch.nn.Embedding(LENGTH, WIDTH)
        layer = torch.nn.TransformerDecoderLayer(WIDTH, HEADS, 128, batch_first=True)
        self.decoder = torch.nn.TransformerDecoder(layer, 2)
        self.fc = torch.nn.Linear(WIDTH, VOCAB)

    def forward(self, ids):
        steps = ids.shape[1]
        x = self.embedding(ids) + self.positions(torch.arange(steps))
        mask = torch.nn.Transformer.generate_square_subsequent_mask(steps)
        return self.fc(self.decoder(x, x, tgt_mask=mask, memory_mask=mask))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = TutorialModel().eval()
    torch.save(model.state_dict(), tmp_path / "lm.pth")
    return model, tmp_path / "lm.pth"


def test_inspected(saved, capsys):
    model, path = saved
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(path), "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert {row["name"] for row in found["tensors"]} == set(model.state_dict())


def test_comes_in_as_a_plain_pytree(saved):
    model, path = saved
    state = jc.load_params(path)
    np.testing.assert_array_equal(state["fc"]["weight"], model.fc.weight.detach().numpy())
    assert len(state["decoder"]["layers"]) == 2


def test_same_logits_as_pytorch(saved):
    model, path = saved
    ours = jc.load(
        path, arch="transformer_decoder", config={"num_heads": HEADS, "causal_memory": True}
    )
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, 16))
    with torch.no_grad():
        want = model(torch.tensor(ids)).numpy()
    got = np.asarray(ours(ids.astype(np.int32)))
    assert np.abs(got - want).max() < 1e-4 * np.ptp(want)


def test_leftovers_of_prune_are_the_pruned_weight(saved, tmp_path):
    model, _ = saved
    torch.nn.utils.prune.l1_unstructured(model.fc, "weight", 0.5)
    torch.save(model.state_dict(), tmp_path / "pruned.pth")
    state = jc.load_params(tmp_path / "pruned.pth")
    np.testing.assert_array_equal(state["fc"]["weight"], model.fc.weight.detach().numpy())
    assert "weight_orig" not in state["fc"]


def test_half_of_fc_pruned_and_stored_three_ways(saved, tmp_path):
    model, path = saved
    state = jc.load_params(path)
    axes = {"fc/weight": (1,)}
    options = {"sparsity": 0.5, "include": "fc/weight", "axes": axes}
    zeros = jc.prune(state, **options)
    sparse = jc.prune(state, store="sparse", **options)
    theirs = torch.nn.Linear(WIDTH, VOCAB)
    theirs.load_state_dict(model.fc.state_dict())
    torch.nn.utils.prune.l1_unstructured(theirs, "weight", 0.5)
    np.testing.assert_array_equal(zeros["fc"]["weight"], theirs.weight.detach().numpy())

    flat = {f"fc.{name}": np.asarray(value) for name, value in zeros["fc"].items()}
    mask = {"fc.weight": flat["fc.weight"] != 0}
    jc.save_state_dict(tmp_path / "masks.pth", unfold_pruned(flat, mask))
    jc.save_state_dict(tmp_path / "zeros.pth", flat)
    write_native(tmp_path / "sparse", sparse["fc"])
    sizes = {
        "masks": (tmp_path / "masks.pth").stat().st_size,
        "zeros": (tmp_path / "zeros.pth").stat().st_size,
        "sparse": sum(f.stat().st_size for f in pathlib.Path(tmp_path / "sparse").iterdir()),
    }
    assert sizes["sparse"] < 0.85 * sizes["zeros"] < 0.6 * sizes["masks"]

    again = torch.load(tmp_path / "zeros.pth", weights_only=True)
    fresh = torch.nn.Linear(WIDTH, VOCAB)
    fresh.load_state_dict({name.removeprefix("fc."): value for name, value in again.items()})
    np.testing.assert_array_equal(fresh.weight.detach().numpy(), zeros["fc"]["weight"])


def test_accuracy_of_the_real_resnet(assets):
    model = jc.load(assets / "cifar-resnet20" / "resnet20-12fca82f.th", arch="resnet20")
    with pytest.raises(jc.InputError, match="those of resnet20"):
        jc.load(assets / "cifar-resnet20" / "resnet20-12fca82f.th", arch="resnet32")
    images = assets / "cifar10" / "test.parquet"
    found = jc.evaluate(model, images=images, limit=1000)
    assert 0.8 < found["accuracy"] < 0.86
    small = jc.compress(model, "rtn", bits=8, group_size=-1)
    against = jc.evaluate(small, images=images, limit=1000, against=model)
    assert against["agreement"] > 0.98
    assert against["bytes"] < 0.4 * found["bytes"]
