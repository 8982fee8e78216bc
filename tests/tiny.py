"""A tiny Hugging Face directory made by transformers itself: random weights, real file formats."""

from __future__ import annotations

import json
import pathlib

TEXT = (
    "Once upon a time there was a small model that wanted to be smaller still. "
    "It asked the river, and the river said: carry less, and you will travel far. "
    "So the model left behind what it did not need, and what it kept it kept in few bits. "
)


def write_text(path: pathlib.Path, repeat: int = 60) -> pathlib.Path:
    """A text file of some thousand tokens."""
    path.write_text("".join(f"{i}. {TEXT}" for i in range(repeat)))
    return path


def write_llama(
    directory: pathlib.Path, *, layers: int = 3, seed: int = 0, **config
) -> pathlib.Path:
    """A Llama of `layers` blocks, width 64, saved by transformers, with a byte-level tokenizer."""
    import torch
    import transformers

    torch.manual_seed(seed)
    fields = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        **config,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: pathlib.Path) -> None:
    """A byte-level BPE tokenizer trained on the text above."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
