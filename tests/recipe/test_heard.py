"""What a stage hears of its method's decisions: one matrix of each kind, also after a kill."""

import jax.numpy as jnp
import numpy as np
from recipe_cases import config

from jaxcompress import recipe
from jaxcompress.core.decisions import Decision
from jaxcompress.recipe.heard import MATRICES, Heard


def params(layers=5, kinds=("up", "down")):
    return {
        "layers": {str(i): {kind: {"kernel": jnp.ones((4, 4))} for kind in kinds}
                   for i in range(layers)},
        "head": jnp.ones((4, 8)),
        "norm": jnp.ones(4),
    }  # fmt: skip


def decision(path, what="weights"):
    scores = np.random.default_rng(len(path)).random((4, 4))
    return Decision.of(what, path, "wanda", scores, scores > 0.5)


def test_the_middle_matrix_of_each_kind_is_wanted(tmp_path):
    heard = Heard(tmp_path, params())
    every = [f"layers/{i}/{kind}/kernel" for i in range(5) for kind in ("up", "down")]
    wanted = [path for path in [*every, "head", "norm"] if heard.wanted(path)]
    assert wanted == ["layers/2/up/kernel", "layers/2/down/kernel", "head"]


def test_of_stacked_layers_the_middle_one_is(tmp_path):
    heard = Heard(tmp_path, {"layers": {"up": {"kernel": jnp.ones((5, 4, 4))}}})
    found = [i for i in range(5) if heard.wanted(f"layers/up/kernel[{i}]")]
    assert found == [2]
    assert heard.wanted("layers/up/kernel")


def test_no_more_than_so_many_matrices(tmp_path):
    kinds = [f"kind{chr(97 + i)}" for i in range(MATRICES + 2)]
    heard = Heard(tmp_path, params(3, kinds))
    for kind in kinds:
        if heard.wanted(f"layers/1/{kind}/kernel"):
            heard(decision(f"layers/1/{kind}/kernel"))
    heard(decision("heads", "heads"))
    assert len(heard.records) == MATRICES + 1
    assert heard.wanted("layers/1/kinda/kernel")  # done again after a kill, it is told again


def test_a_killed_stage_finds_what_it_heard(tmp_path):
    first = Heard(tmp_path, params())
    first(decision("layers/2/up/kernel"))
    again = Heard(tmp_path, params())
    again(decision("layers/2/down/kernel"))
    again(decision("layers/2/up/kernel"))  # its result was lost, and made once more
    assert [row["where"] for row in again.records] == ["layers/2/up/kernel", "layers/2/down/kernel"]
    assert Heard(tmp_path, params()).records == again.records


def test_the_record_of_a_run_has_them(texts, toy, tmp_path):
    stages = (
        {"method": "magnitude", "include": "layers/**", "sparsity": 0.75},
        {"method": "depth", "drop": 1, "calibration_samples": 4},
    )
    found = recipe.run(config(texts, *stages), tmp_path / "out", model=toy)
    start, pruned, cut = found["stages"]
    assert "decisions" not in start
    (told,) = map(Decision.read, pruned["decisions"])
    assert (told.where, told.by) == ("layers/1/kernel", "magnitude")
    weight = np.abs(np.asarray(toy.params["layers"]["1"]["kernel"]).T)
    least = np.sort(weight.reshape(-1))[weight.size * 3 // 4]
    np.testing.assert_array_equal(told.kept, weight >= least)
    (layers,) = map(Decision.read, cut["decisions"])
    assert (layers.what, layers.size, layers.kept.sum()) == ("layers", (1, 3), 2)
    assert not list((tmp_path / "out").rglob("decisions*"))
