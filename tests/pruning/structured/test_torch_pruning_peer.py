"""The same channels as Torch-Pruning cuts, with the same scores on the same weights."""

import importlib.util

import jax
import numpy as np
import pytest
import structured_cases as cases
from marks import slow_but

from jaxcompress.models import name_map_of
from jaxcompress.pruning.structured import filters
from jaxcompress.pruning.structured.torch_module import write_torch_module

torch = pytest.importorskip("torch")
peer = pytest.importorskip("torch_pruning")


def network_of(model, folder):
    _, module = write_torch_module(model, folder)
    spec = importlib.util.spec_from_file_location("network", module)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made.load()


def scored_alike(model):
    """The model with tiny depthwise kernels: Torch-Pruning leaves them out of a group's score."""

    def tiny(leaf):
        return 1e-6 * leaf if leaf.ndim == 4 and leaf.shape[2] == 1 else leaf

    return model.replace(params=jax.tree.map(tiny, model.params))


@pytest.mark.parametrize("name", ["resnet_b", "vgg", "mobilenet"])
@pytest.mark.parametrize("allocation", slow_but(["uniform", "global"], ["global"]))
def test_the_same_channels_stay(name, allocation, tmp_path):
    model = scored_alike(cases.reference(name))
    network = network_of(model, tmp_path)
    heads = [m for m in network.modules() if isinstance(m, torch.nn.Linear)]
    importance = peer.importance.GroupMagnitudeImportance(
        p=1,
        group_reduction="sum",
        normalizer="mean" if allocation == "global" else None,
        target_types=[torch.nn.Conv2d, torch.nn.Linear],
    )
    peer.pruner.MetaPruner(
        network,
        torch.zeros(1, 3, 8, 8),
        importance=importance,
        pruning_ratio=0.5,
        global_pruning=allocation == "global",
        ignored_layers=heads,
    ).step()
    small = filters(model, sparsity=0.5, residual=True, allocation=allocation, score="magnitude")
    theirs = network.state_dict()
    for key, ours in name_map_of(small.config).tensors(small.params):
        np.testing.assert_array_equal(np.asarray(ours), theirs[key].numpy(), err_msg=key)
