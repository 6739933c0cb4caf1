"""Streamed text equals the decoding of all tokens together, with a tokenizer of bytes."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from vim.models.mamba_lm import MambaLM
from vim.models.text import END_OF_TEXT, load_tokenizer, stream_text


@pytest.fixture
def tokenizer():
    """One token per byte, so that non-ASCII characters have several, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END_OF_TEXT])
    return made


class Script(MambaLM):
    """A stand-in for a model that streams given rows of tokens."""

    def __init__(self, rows):
        super().__init__(300, 16, 1)
        self.rows = rows

    def stream(self, prompts, max_new_tokens, **options):
        self.heard, self.eos = [list(prompt) for prompt in prompts], options["eos"]
        yield from torch.tensor(self.rows).T[:max_new_tokens]


def test_characters_of_several_tokens_come_whole(tokenizer):
    said = ["naïve… 蛇!", "short"]
    eos = tokenizer.token_to_id(END_OF_TEXT)
    rows = [tokenizer.encode(text).ids for text in said]
    length = max(map(len, rows))
    model = Script([row + [eos] * (length - len(row)) for row in rows])
    pieces = list(stream_text(model, tokenizer, ["Say ", "ä"], 99))
    assert ["".join(column) for column in zip(*pieces, strict=True)] == said
    assert model.heard == [tokenizer.encode("Say ").ids, tokenizer.encode("ä").ids]
    assert model.eos == eos
    assert len(model.heard[1]) == 2
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for column in pieces for piece in column)


def test_a_real_model_speaks(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    model = MambaLM(again.get_vocab_size(), 16, 1).eval()
    texts = list(stream_text(model, again, ["a", "bcd"], 5, temperature=1.0))
    assert len(texts) <= 5
    assert all(len(pieces) == 2 for pieces in texts)


def test_a_file_that_is_no_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(str(path))
