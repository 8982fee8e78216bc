"""Statistics of the gradient against PyTorch's autograd in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.layerwise.gradients import GRADIENTS, gradient_statistics
from jaxcompress.layerwise.losses import loss_of, mean_loss

VOCAB, WIDTH = 11, 8
PATHS = ["layers/0/kernel", "layers/1/kernel", "head/kernel"]


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "table": rng.normal(size=(VOCAB, WIDTH)),
        "layers/0/kernel": rng.normal(size=(WIDTH, WIDTH)) / 2,
        "layers/1/kernel": rng.normal(size=(WIDTH, WIDTH)) / 2,
        "head/kernel": rng.normal(size=(WIDTH, VOCAB)) / 2,
    }


def model(with_blocks=True):
    """Residual blocks that mix in the token before, each an ordinary dense layer."""
    values = {path: jnp.asarray(w, jnp.float32) for path, w in weights().items()}
    params = {
        "table": values["table"],
        "layers": {str(i): {"kernel": values[f"layers/{i}/kernel"]} for i in range(2)},
        "head": {"kernel": values["head/kernel"]},
    }
    if not with_blocks:
        params["activation"] = (
            jax.nn.softplus
        )  # some libraries keep such things among the parameters

    def block(params, x):
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return x + jax.nn.softplus((x + before) @ params["kernel"])

    walk = jc.Blocks(
        embed=lambda params, ids: params["table"][ids],
        block=block,
        head=lambda params, x: x @ params["head"]["kernel"],
    )
    return jc.Model(walk.run, params, walk if with_blocks else None)


def torch_outputs(values, x):
    for i in range(2):
        before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        x = x + torch.nn.functional.softplus((x + before) @ values[f"layers/{i}/kernel"])
    return x @ values["head/kernel"]


def torch_loss(values, ids):
    ids = torch.from_numpy(ids).long()
    logits = torch_outputs(values, values["table"][ids[:, :-1]])
    return torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1))


def torch_weights(absolute=False):
    return {
        path: torch.from_numpy(np.abs(w) if absolute else w).requires_grad_()
        for path, w in weights().items()
    }


def batches():
    rng = np.random.default_rng(1)
    # More positions than one chunk of the loss holds, and not a multiple of it.
    return [rng.integers(0, VOCAB, (3, 151)).astype(np.int32) for _ in range(4)]


def expected():
    values = torch_weights()
    leaves = [values[path] for path in PATHS]

    def gradient(ids, **kwargs):
        return torch.autograd.grad(torch_loss(values, ids), leaves, **kwargs)

    of_batches = [gradient(ids) for ids in batches()]
    of_sequences = [gradient(ids[i : i + 1]) for ids in batches() for i in range(3)]
    found = {path: {} for path in PATHS}
    everything = np.concatenate(batches())
    whole = gradient(everything, create_graph=True)
    inner = sum((g * g.detach()).sum() for g in whole)
    product = torch.autograd.grad(inner, leaves)
    absolute = torch_weights(absolute=True)
    flow = torch_outputs(absolute, torch.ones(1, 151, WIDTH, dtype=torch.float64)).sum()
    synflow = torch.autograd.grad(flow, [absolute[path] for path in PATHS])
    for i, path in enumerate(PATHS):
        found[path] = {
            "gradient": whole[i].detach(),
            "squared_gradient": torch.stack([g[i] ** 2 for g in of_sequences]).mean(0),
            "gradient_variance": torch.stack([g[i] for g in of_batches]).var(0, correction=0),
            "hessian_gradient": product[i],
            "synflow": synflow[i],
        }
    return found


@pytest.mark.parametrize("with_blocks", [True, False])
def test_statistics_are_those_of_autograd(with_blocks):
    wanted = [n for n in GRADIENTS if with_blocks or n != "synflow"]
    found = gradient_statistics(model(with_blocks), PATHS, wanted, batches())
    for path, by_name in expected().items():
        for name in wanted:
            assert found[path][name].dtype == jnp.float32
            truth = by_name[name].numpy()
            scale = np.abs(truth).max()
            np.testing.assert_allclose(
                np.array(found[path][name]) / scale, truth / scale, atol=2e-5, err_msg=name
            )


def test_one_statistic_alone_is_the_same():
    """Without squares a batch goes as a whole."""
    data, path = batches(), PATHS[0]
    alone = gradient_statistics(model(with_blocks=False), [path], ["gradient"], data)[path]
    assert list(alone) == ["gradient"]
    truth = expected()[path]["gradient"].numpy()
    np.testing.assert_allclose(alone["gradient"], truth, atol=2e-5 * np.abs(truth).max())


def test_compressed_leaves_give_the_gradient_of_what_they_stand_for():
    dense = model()
    params = jc.quantize(dense.params, bits=4, group_size=8, include="layers/*/kernel")
    small = dense.replace(params=params)
    opened = dense.replace(params=jc.densify(params))
    found = gradient_statistics(small, PATHS, ["gradient"], batches())
    truth = gradient_statistics(opened, PATHS, ["gradient"], batches())
    for path in PATHS:
        assert found[path]["gradient"].shape == weights()[path].shape
        np.testing.assert_allclose(
            found[path]["gradient"], truth[path]["gradient"], rtol=1e-4, atol=1e-6
        )
    # The other way round: the compressed leaves are not asked for, and stay compressed.
    found = gradient_statistics(small, ["head/kernel"], ["gradient"], batches())
    np.testing.assert_allclose(
        found["head/kernel"]["gradient"], truth["head/kernel"]["gradient"], rtol=1e-4, atol=1e-6
    )


def test_half_precision_weights_have_float32_statistics():
    half = model().replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), model().params))
    found = gradient_statistics(half, PATHS, ["gradient"], batches())
    for path, truth in expected().items():
        assert found[path]["gradient"].dtype == jnp.float32
        a, b = np.array(found[path]["gradient"]).ravel(), truth["gradient"].numpy().ravel()
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.995


def images_model():
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 4)) / 3, jnp.float32)},
        "head": {"kernel": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)},
    }

    def apply(params, images):
        x = jax.lax.conv_general_dilated(
            images,
            params["conv"]["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(x).mean((1, 2)) @ params["head"]["kernel"]

    return jc.Model(apply, params)


def test_images_have_the_loss_of_their_class():
    rng = np.random.default_rng(2)
    data = [
        (rng.normal(size=(n, 6, 6, 2)).astype(np.float32), rng.integers(0, 5, n)) for n in (4, 2)
    ]
    network, paths = images_model(), ["conv/kernel", "head/kernel"]
    found = gradient_statistics(network, paths, ["gradient", "squared_gradient", "synflow"], data)

    def outputs(conv, head, images):
        x = torch.nn.functional.conv2d(images.permute(0, 3, 1, 2), conv, padding=1)
        return torch.relu(x).mean((2, 3)) @ head

    def leaves(transform):
        conv = transform(np.array(network.params["conv"]["kernel"], np.float64))
        head = transform(np.array(network.params["head"]["kernel"], np.float64))
        conv = torch.from_numpy(conv.transpose(3, 2, 0, 1).copy())
        return conv.requires_grad_(), torch.from_numpy(head).requires_grad_()

    conv, head = leaves(lambda w: w)
    images = torch.from_numpy(np.concatenate([x for x, _ in data])).double()
    labels = torch.from_numpy(np.concatenate([y for _, y in data]))

    def gradient(images, labels):
        loss = torch.nn.functional.cross_entropy(outputs(conv, head, images), labels)
        return torch.autograd.grad(loss, (conv, head))

    truth = dict(zip(paths, gradient(images, labels), strict=True))
    each = [gradient(images[i : i + 1], labels[i : i + 1]) for i in range(6)]
    squares = dict(zip(paths, (sum(g[i] ** 2 for g in each) / 6 for i in (0, 1)), strict=True))
    positive = leaves(np.abs)
    flow = outputs(*positive, torch.ones(1, 6, 6, 2, dtype=torch.float64)).sum()
    flows = dict(zip(paths, torch.autograd.grad(flow, positive), strict=True))
    for path in paths:
        for name, by_path in (
            ("gradient", truth), ("squared_gradient", squares), ("synflow", flows)
        ):  # fmt: skip
            wanted = by_path[path].numpy()
            wanted = wanted.transpose(2, 3, 1, 0) if path == "conv/kernel" else wanted
            np.testing.assert_allclose(found[path][name], wanted, rtol=1e-4, atol=1e-6)


def test_mean_loss_is_that_of_the_whole_text():
    loss = jax.jit(loss_of(model(), batches()[0]))
    found = mean_loss(loss, model().params, [*batches(), batches()[0][:1]])
    values = torch_weights()
    ids = np.concatenate([*batches(), batches()[0][:1]])
    assert found == pytest.approx(torch_loss(values, ids).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("wanted", "data", "words"),
    [
        (["curvature"], batches(), "statistic 'curvature'"),
        (["gradient"], [], "0 batches"),
        (["gradient_variance"], batches()[:1], "1 batches"),
        (["gradient"], [np.ones((2, 3), np.float32)], "needs token ids"),
    ],
)
def test_bad_input_is_one_clear_line(wanted, data, words):
    with pytest.raises(InputError, match=words) as caught:
        gradient_statistics(model(), PATHS, wanted, data)
    assert "\n" not in str(caught.value)


def test_unknown_paths_and_ids_without_blocks_are_told():
    with pytest.raises(InputError, match="layers/9: no such parameter"):
        gradient_statistics(model(), ["layers/9"], ["gradient"], batches())
    with pytest.raises(InputError, match="needs Blocks"):
        gradient_statistics(model(with_blocks=False), PATHS, ["synflow"], batches())


def test_overflow_is_told():
    network = model()
    huge = network.replace(
        params={**network.params, "head": {"kernel": network.params["head"]["kernel"] * 3e38}}
    )
    with pytest.raises(InputError, match="synflow: overflows"):
        gradient_statistics(huge, PATHS, ["synflow"], batches())
