"""Generation with a cache equals decoding without one, and transformers."""

import jax
import numpy as np
import pytest
import torch
import transformers
from decoder_variants import ours, token_ids, torch_model
from torch_twins import LSTMModel, run, scramble

from jaxcompress.core.errors import InputError
from jaxcompress.models import (
    GPT2Config,
    from_state_dict,
    generate,
    load,
    model_from_tensors,
)


def gpt2():
    sizes = {"vocab_size": 97, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4}
    twin = scramble(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))
    tensors = {name: value.numpy() for name, value in twin.state_dict().items()}
    config = GPT2Config.from_hf(twin.config.to_dict())
    return twin, model_from_tensors(config, tensors.__getitem__, tensors)


def without_cache(model, prompt, count):
    """Greedy decoding by the whole sequence at every step."""
    ids = np.asarray(prompt)
    apply = jax.jit(model.apply)
    for _ in range(count):
        padded = np.pad(ids, ((0, 0), (0, prompt.shape[1] + count - ids.shape[1])))
        logits = apply(model.params, padded)[:, ids.shape[1] - 1]
        ids = np.concatenate([ids, np.asarray(logits.argmax(-1))[:, None]], axis=1)
    return ids


def greedy_of_transformers(twin, prompt, count):
    ids = torch.from_numpy(np.asarray(prompt))
    out = twin.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out.numpy()


@pytest.mark.parametrize(
    ("variant", "scan_layers"),
    [("llama3", False), ("mistral", True), ("qwen2_mixed", False), ("qwen3", True)],
)
def test_greedy_equals_no_cache_and_transformers(variant, scan_layers):
    twin, prompt = torch_model(variant), token_ids(9)
    model = ours(twin, scan_layers=scan_layers)
    got = generate(model, prompt, 12)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, without_cache(model, prompt, 12))
    np.testing.assert_array_equal(got, greedy_of_transformers(twin, prompt, 12))


def test_greedy_gpt2():
    (twin, model), prompt = gpt2(), token_ids(9)
    got = generate(model, prompt, 12)
    np.testing.assert_array_equal(got, without_cache(model, prompt, 12))
    np.testing.assert_array_equal(got, greedy_of_transformers(twin, prompt, 12))


def test_one_prompt_comes_back_without_batch_axis():
    model, prompt = ours(torch_model("llama3")), token_ids(9)
    one, both = generate(model, prompt[1], 12), generate(model, prompt, 12)
    assert one.shape == (21,)
    np.testing.assert_array_equal(one, both[1])


def test_draws_follow_the_seed_and_top_k():
    model, prompt = ours(torch_model("llama3")), token_ids(9)
    greedy = generate(model, prompt, 12)
    np.testing.assert_array_equal(generate(model, prompt, 12, temperature=2.0, top_k=1), greedy)
    one = generate(model, prompt, 12, temperature=2.0, seed=1)
    np.testing.assert_array_equal(generate(model, prompt, 12, temperature=2.0, seed=1), one)
    assert (generate(model, prompt, 12, temperature=2.0, seed=2) != one).any()


def test_draws_have_the_probabilities_of_the_model():
    """2,000 first tokens against softmax(logits / temperature), the top 3 only."""
    model = ours(torch_model("llama3"))
    prompt = np.repeat(token_ids(6, batch=1), 2000, axis=0)
    drawn = generate(model, prompt, 1, temperature=1.5, top_k=3, seed=5)[:, -1]
    logits = np.asarray(run(model, prompt[:1])[0, -1], np.float64) / 1.5
    top = np.argsort(logits)[-3:]
    want = np.exp(logits[top]) / np.exp(logits[top]).sum()
    found = np.array([(drawn == token).mean() for token in top])
    assert found.sum() == 1
    # Five standard deviations of a binomial share.
    assert (np.abs(found - want) < 5 * np.sqrt(want * (1 - want) / 2000)).all()


def test_a_text_ends_at_its_end_token():
    model, prompt = ours(torch_model("llama3")), token_ids(9)
    free = generate(model, prompt, 12)
    end = int(free[0, 9 + 4])
    first = [list(row[9:]).index(end) if end in row[9:] else 12 for row in free]
    ended = generate(model, prompt, 12, eos_ids=(end,))
    for row, want, position in zip(ended, free, first):
        np.testing.assert_array_equal(row[: 9 + position], want[: 9 + position])
        assert (row[9 + position :] == end).all()


def test_refusals():
    model, prompt = gpt2()[1], token_ids(9)
    with pytest.raises(InputError, match=r"9 \+ 24 tokens exceed the model's 32"):
        generate(model, prompt, 24)
    with pytest.raises(InputError, match="lstm cannot decode with a cache"):
        generate(from_state_dict(LSTMModel().state_dict(), "lstm"), prompt, 4)
    with pytest.raises(InputError, match="prompt of shape"):
        generate(model, np.zeros((0,), int), 4)
    with pytest.raises(InputError, match="temperature >= 0"):
        generate(model, prompt, 4, temperature=-1.0)


def test_tinystories_tells_a_story_as_transformers_does(assets):
    path = assets / "tinystories-656k"
    model = load(path)
    twin = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = np.asarray(model.tokenizer.encode("Once upon a time"))[None]
    got = generate(model, prompt, 40)
    np.testing.assert_array_equal(got, greedy_of_transformers(twin, prompt, 40))
    assert model.tokenizer.decode(got[0]).startswith("Once upon a time")
