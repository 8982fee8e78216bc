"""Students made from teachers, and vocabularies that fit or do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Blocks, Model
from jaxcompress.distillation import aligned_vocabulary, distill, resnet_student, student_from
from jaxcompress.distillation.student import evenly_spaced
from jaxcompress.models import DecoderConfig, ResNetConfig, Tokenizer, abstract_params, build_model

CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=5,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


@pytest.mark.parametrize(
    ("count", "total", "want"),
    [
        (1, 5, [0]),
        (2, 5, [0, 4]),
        (3, 5, [0, 2, 4]),
        (4, 5, [0, 1, 3, 4]),
        (5, 5, [0, 1, 2, 3, 4]),
        (6, 12, [0, 2, 4, 7, 9, 11]),
        (1, 1, [0]),
    ],
)
def test_layers_are_evenly_spaced(count, total, want):
    assert evenly_spaced(count, total) == want


def test_every_count_keeps_the_ends_and_no_layer_twice():
    for total in range(2, 40):
        for count in range(2, total + 1):
            taken = evenly_spaced(count, total)
            gaps = np.diff(taken)
            assert (taken[0], taken[-1], len(taken)) == (0, total - 1, count)
            assert gaps.min() >= 1
            assert gaps.max() - gaps.min() <= 1


def drawn(config):
    """Parameters without compiling their initialisation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract_params(config))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_student_is_some_layers_of_its_teacher(scan_layers):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    teacher = build_model(config, drawn(config))
    for layers, taken in ((3, [0, 2, 4]), ([1, -1], [1, 4])):
        student = student_from(teacher, layers)
        assert student.config.num_hidden_layers == len(taken)
        assert student.config.hidden_size == teacher.config.hidden_size
        for mine, theirs in enumerate(taken):
            got, want = (m.blocks.of(m.params)[i] for m, i in ((student, mine), (teacher, theirs)))
            jax.tree.map(np.testing.assert_array_equal, got, want)
        assert student.params["embed"] is teacher.params["embed"]
        assert student.notes == (f"student: layers {', '.join(map(str, taken))} of 5",)


def test_a_stranger_s_blocks_can_be_taken():
    blocks = Blocks(
        embed=lambda params, x: x,
        block=lambda params, x: 2 * x + params["w"],
        head=lambda params, x: x,
    )
    teacher = Model(blocks.run, {"layers": [{"w": jnp.float32(i)} for i in range(4)]}, blocks)
    student = student_from(teacher, 2)
    assert float(student(jnp.float32(1))) == 2 * (2 * 1 + 0) + 3


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (0, "layers 0: the teacher has 5, take 1 to 5"),
        (6, "layers 6: the teacher has 5, take 1 to 5"),
        ([], "at least one layer"),
        ([0, 5], "layer 5 of a model with 5 layers"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers, message):
    with pytest.raises(InputError, match=message):
        student_from(Model(lambda params, ids: ids, {"layers": {}}, config=CONFIG), layers)


def test_a_model_without_layers_is_refused():
    with pytest.raises(InputError, match="neither a config nor blocks"):
        student_from(Model(lambda params, x: x, {}), 2)
    with pytest.raises(InputError, match="cannot be cut in depth"):
        student_from(Model(lambda params, x: x, {}, config=RESNET), 2)
    with pytest.raises(InputError, match="no CIFAR ResNet; use student_from"):
        resnet_student(Model(lambda params, x: x, {}, config=CONFIG), (1, 1, 1))


RESNET = ResNetConfig(stage_sizes=(2, 2), widths=(4, 8), num_classes=7, shortcut="B")


def test_a_smaller_resnet_has_the_classes_of_its_teacher():
    teacher = Model(lambda params, images: images, {}, config=RESNET)
    for stages, widths in (((1,), None), ((1, 1), (4, 4))):
        student = resnet_student(teacher, stages, widths=widths)
        images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
        assert jax.eval_shape(student.apply, student.params, images).shape == (2, 7)
        assert student.config.stage_sizes == stages
        assert student.config.widths == (widths or (4,))
        assert student.config.shortcut == "B"
    assert "batch_stats" in student.params
    with pytest.raises(InputError, match="each stage needs 1 block or more"):
        resnet_student(teacher, (1, 0))
    with pytest.raises(InputError, match="3 stage_sizes but 2 widths"):
        resnet_student(teacher, (1, 1, 1))


# --- Vocabularies -----------------------------------------------------------------------------


def tokenizer(words: int, first: str = "a") -> Tokenizer:
    vocabulary = {f"{first}{i}": i for i in range(words)}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=f"{first}0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(inner)


def sized(vocab_size: int, tokens: Tokenizer | None = None) -> Model:
    config = dataclasses.replace(CONFIG, vocab_size=vocab_size)
    return Model(lambda params, ids: ids, {}, config=config, tokenizer=tokens)


@pytest.mark.parametrize(
    ("student", "teacher", "tokens", "want"),
    [
        (64, 64, None, 64),
        (61, 64, None, 61),
        (64, 61, None, 61),
        (50257, 50304, None, 50257),  # GPT-2, rounded up to a multiple of 64
        (151936, 152064, None, 151936),  # Qwen2.5 0.5B and 7B
        (61, 1000, 60, 61),  # one tokenizer: any padding
        (1000, 60, 60, 60),
    ],
)
def test_padding_is_cut(student, teacher, tokens, want):
    words = None if tokens is None else tokenizer(tokens)
    again = None if tokens is None else tokenizer(tokens)
    assert aligned_vocabulary(sized(student, words), sized(teacher, again)) == want


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (sized(61), sized(70), "61 logits and the teacher 70, more apart than padding"),
        (sized(32000), sized(32768), "more apart than padding"),  # Mistral 0.1 and 0.3
        (
            sized(64, tokenizer(60)),
            sized(64, tokenizer(60, "b")),
            r"different tokenizers \(0 of 60 and 60 tokens are the same\)",
        ),
        (sized(64, tokenizer(60)), sized(64, tokenizer(61)), r"different tokenizers \(60 of 60"),
        (sized(64, tokenizer(62)), sized(61), "teacher's vocabulary has 61 entries.* needs 62"),
        (sized(61), sized(64, tokenizer(62)), "student's vocabulary has 61 entries.* needs 62"),
    ],
)
def test_other_vocabularies_are_refused(student, teacher, message):
    with pytest.raises(InputError, match=message) as refused:
        distill(student, teacher)
    assert "\n" not in str(refused.value)


def test_sizes_that_only_the_logits_tell_are_compared_there():
    def model(vocab):
        params = {"table": jnp.zeros((64, vocab))}
        return Model(lambda params, ids: params["table"][ids], params)

    student, batch = model(61), {"ids": np.zeros((1, 4), np.int32)}
    assert aligned_vocabulary(student, model(70)) is None
    for vocab, fits in ((64, True), (70, False)):
        found = distill(student, model(vocab))
        if fits:
            jax.eval_shape(found.function, student.params, batch, None, found.constants)
        else:
            with pytest.raises(InputError, match="more apart than padding"):
                jax.eval_shape(found.function, student.params, batch, None, found.constants)
