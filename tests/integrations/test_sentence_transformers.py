"""sentence-transformers hands `model_kwargs` on to transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_transformers import NAME, clear

from sage_inductor import Config
from sage_inductor.integrations.transformers import register, unregister
from sage_inductor.testing import relative_l2

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (*SPECIAL, "a", "cat", "sat", "on", "the", "mat", "while", "dogs", "ran", "far", "away")


def test_one_line(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    clear(transformers.BertModel(config)).save_pretrained(tmp_path)
    sentences = ["a cat sat on the mat", "dogs ran far away while a cat sat on the mat"]

    def encoded(**options: object) -> torch.Tensor:
        model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu", **options)
        result: torch.Tensor = model.encode(sentences, convert_to_tensor=True)
        return result

    register(Config(kernel="reference"))
    try:
        ours = encoded(model_kwargs={"attn_implementation": NAME})
    finally:
        unregister()
    assert 1e-4 < relative_l2(ours, encoded()) < 0.04
