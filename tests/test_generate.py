"""tools/generate.py, told what it cannot do: each time one plain line."""

import re
import runpy
import shutil
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from vim.models.mamba_lm import MambaLM

TOOL = Path(__file__).parent.parent / "tools" / "generate.py"
WORDS = ["Mamba", "is", "a", "snake", "that", "never", "eats"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of seven words in lm/, and beside it tokenizers of these words, of fewer and of more."""
    path = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    MambaLM(len(WORDS), 16, 1).save_pretrained(path / "lm")
    for name, words in (("few", WORDS[:3]), ("words", WORDS), ("more", [*WORDS, "eels"])):
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        (path / name).mkdir()
        tokenizer.save(str(path / name / "tokenizer.json"))
    return path


@pytest.fixture
def generate(folder, monkeypatch, capsys):
    """generate(*args): what the tool says; with fails=True the one line that it ends with instead."""

    def generate(*args, fails=False, model="lm", tokenizer="words/tokenizer.json", prompts="[Mamba]"):
        options = ["--model", model, "--tokenizer", tokenizer, "--prompts", prompts, "--max_new_tokens", "3", *args]
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, options)])
        monkeypatch.chdir(folder)
        if not fails:
            runpy.run_path(str(TOOL), run_name="__main__")
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(TOOL), run_name="__main__")
        assert exit_.value.code in (1, 2)
        captured = capsys.readouterr()
        *usage, line = captured.err.splitlines()
        assert not usage or [start.split(":")[0] for start in usage] == ["usage", "tip"]
        assert captured.out == ""
        return line.removeprefix("error: ")

    return generate


def test_a_tokenizer_is_a_file_or_in_a_folder(generate, folder, monkeypatch):
    """Also in the home folder, as the model; the model's own where none is named."""
    said = generate()
    assert said.startswith("Mamba")
    assert generate(tokenizer="words") == said
    shutil.copytree(folder / "lm", folder / "both")
    shutil.copy(folder / "words" / "tokenizer.json", folder / "both")
    assert generate(model="both", tokenizer="null") == said
    monkeypatch.setenv("HOME", str(folder))
    assert generate(model="~/lm", tokenizer="~/words") == said


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"prompts": "[]"}, r"prompts must be one text or more, none of them empty, got \[\]"),
        ({"prompts": '["Mamba", ""]'}, r"prompts must be one text or more, none of them empty"),
        ({"prompts": "[' ']"}, "the tokenizer makes no tokens of the prompt ' '; give another"),
        ({"prompts": "[Mamba eels]"}, "the tokenizer does not know all of the prompt 'Mamba eels': .*UNK"),
        ({"prompts": "[eels]", "tokenizer": "more"}, r"prompts hold the token 7, but the model knows 0 \.\. 6; take"),
        ({"prompts": "[is, is]", "tokenizer": "few", "--temperature": 9}, "the tokenizer has no token . that the"),
        ({"tokenizer": "nowhere/tokenizer.json"}, r"there is no nowhere/tokenizer\.json here, .*; give a file token"),
        ({"tokenizer": "./nowhere/x.json"}, r"there is no \./nowhere/x\.json; give a file tokenizer.json, or a folder"),
        ({"tokenizer": "lm"}, r"there is no tokenizer\.json in lm; give a file"),
        ({"tokenizer": "lm/config.json"}, r"lm/config\.json is no tokenizer: "),
        ({"tokenizer": "ann/lm"}, r"the hub does not give it \(.*refused\); give a file tokenizer\.json, or a folder"),
        (
            {"tokenizer": "null"},
            r"there is no EleutherAI/gpt-neox-20b here, .*; give a file tokenizer\.json, or a folder",
        ),
        ({"model": "ann/lm"}, r"the hub does not give it \(.*refused\); give a folder with config\.json and"),
        ({"model": "/no/where"}, r"there is no /no/where; give a folder with config\.json and"),
        ({"model": "words"}, r"there is no config\.json in words; a language model has config\.json and"),
        ({"model": "lm/config.json"}, r"lm/config\.json is a file; give its folder"),
        ({"--device": "cudaa"}, r"device 'cudaa' is not there; choose one of cpu"),
        ({"--device": "cuda:99"}, r"device 'cuda:99' is not there; choose one of cpu"),
        ({"--max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"--temperature": -1}, r"temperature must be 0 or more, got -1\.0"),
        ({"--temperature": ".nan"}, "temperature must be 0 or more, got nan"),
        ({"--top_k": 0}, "top_k must be at least 1, or null for all tokens, got 0"),
        ({"--top_p": 1.5}, r"top_p must be above 0 and at most 1, or null for all tokens, got 1\.5"),
        ({"--seed": -1}, r"seed must be in 0 \.\. "),
    ],
    ids=str,
)
def test_one_line_says_what_is_wrong(options, line, generate, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    args = [part for pair in options.items() if pair[0].startswith("--") for part in pair]
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("the hub's client waits and tries again"))
    said = generate(*args, fails=True, **{key: value for key, value in options.items() if not key.startswith("--")})
    assert re.search(line, said), said


def test_a_model_that_is_damaged(generate, folder, tmp_path):
    shutil.copytree(folder / "lm", tmp_path / "lm")
    weights = tmp_path / "lm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert re.match(r".*model\.safetensors is damaged: ", generate(fails=True, model=tmp_path / "lm"))
    (tmp_path / "lm" / "config.json").write_text("{")
    assert re.match(r".*config\.json is damaged: ", generate(fails=True, model=tmp_path / "lm"))
