"""tools/generate.py: the likeliest text, what each option changes, and one plain line for what it cannot do."""

import io
import re
import runpy
import shutil
import sys
import time
from dataclasses import fields
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from vim.models.mamba_lm import MambaLM
from vim.models.text import END_OF_TEXT, GenerateConfig

TOOL = Path(__file__).parents[2] / "tools" / "generate.py"
WORDS = ["Mamba", "is", "a", "snake", "that", "never", "eats"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of seven words, lm and other, and tokenizers: of these words, of fewer and more, with an end, turned."""
    path = tmp_path_factory.mktemp("generate")
    for name, seed in (("lm", 2), ("other", 3)):
        torch.manual_seed(seed)
        model = MambaLM(len(WORDS), 16, 1, tie_embeddings=False)
        with torch.no_grad():  # the likeliest word is another one at each step
            model.embedding.weight.mul_(50)
            model.blocks[0].mixer.out_proj.weight.mul_(8)
            model.head.weight[len(WORDS) :].mul_(10)  # of no word, and likelier than all of them
        model.save_pretrained(path / name)
    tokenizers = {
        "few": WORDS[:3],
        "words": WORDS,
        "more": [*WORDS, "eels"],
        "ends": [END_OF_TEXT if word == "that" else word for word in WORDS],
        "turned": WORDS[::-1],
    }
    for name, words in tokenizers.items():
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


def likeliest(folder, prompt, count=8):
    """Words that follow the prompt, by the whole text for each."""
    model, ids = MambaLM.from_pretrained(folder / "lm"), [WORDS.index(word) for word in prompt.split()]
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return [WORDS[i] for i in ids[-count:]]


def test_the_text_is_the_likeliest(generate, folder):
    """Of one prompt and of several, each of which ends where the tokenizer's end of text comes."""
    prompts = ["Mamba", "Mamba is", "a snake never"]
    words = [likeliest(folder, prompt) for prompt in prompts]
    assert len(set(words[0])) >= 5
    assert generate("--max_new_tokens", 8) == f"{prompts[0]}{' '.join(words[0])}\n"
    texts = [prompt + " ".join(said) for prompt, said in zip(prompts, words, strict=True)]
    assert generate("--max_new_tokens", 8, prompts=str(prompts)) == "".join(f"{text}\n---\n" for text in texts)
    at = [said.index("that") if "that" in said else len(said) for said in words]
    assert min(at) < max(at)
    ended = [prompt + " ".join(said[:end]) for prompt, said, end in zip(prompts, words, at, strict=True)]
    said = generate("--max_new_tokens", 8, prompts=str(prompts), tokenizer="ends")
    assert said == "".join(f"{text}\n---\n" for text in ended)


def test_each_token_is_shown_as_it_comes_and_their_rate_in_the_end(generate, folder, monkeypatch, capsys):
    """On a clock by which a step takes a quarter of a second."""
    shown, report, step = [], io.StringIO(), MambaLM.step

    def timed_step(self, *args):
        shown.append(capsys.readouterr().out)
        return step(self, *args)

    monkeypatch.setattr(MambaLM, "step", timed_step)
    monkeypatch.setattr(time, "perf_counter", lambda: len(shown) / 4)
    monkeypatch.setattr(sys, "stderr", report)
    last = generate("--max_new_tokens", 4)
    first, *others = likeliest(folder, "Mamba", 4)
    assert "|".join([*shown, last]) == f"Mamba{first}| {'| '.join(others)}\n"
    assert report.getvalue() == "4 tokens after each prompt in 0.8 s: 5 tokens/s\n"


HOT = ("--temperature", 9, "--max_new_tokens", 20)
EFFECTS = {  # of each option: what must hold for what the tool says, and the models that it made
    "prompts": lambda say, made: say(prompts="[a]").startswith("a"),
    "model": lambda say, made: say(model="other") != say(),
    "tokenizer": lambda say, made: say(tokenizer="turned", prompts="[eats]") == "eats" + turned(say()),
    "max_new_tokens": lambda say, made: [len(say("--max_new_tokens", n).split()) for n in (1, 5)] == [1, 5],
    "temperature": lambda say, made: say(*HOT) != say(*HOT, "--temperature", 0),
    "top_k": lambda say, made: say(*HOT, "--top_k", 1) == say(*HOT, "--temperature", 0),
    "top_p": lambda say, made: say(*HOT, "--top_p", 1e-6) == say(*HOT, "--temperature", 0),
    "seed": lambda say, made: say(*HOT) == say(*HOT, "--seed", 0) != say(*HOT, "--seed", 1),
    "precision": lambda say, made: say("--precision", "bf16") and made[-1].head.weight.dtype == torch.bfloat16,
    "device": lambda say, made: (
        "'cudaa' is not there" in say("--device", "cudaa", fails=True)
        and say("--device", "cpu")
        and made[-1].head.weight.device.type == "cpu"
    ),
}


def turned(text):
    """What a model says by the names of the tokenizer `turned`, without the prompt."""
    return " ".join(WORDS[::-1][WORDS.index(word)] for word in text.removeprefix("Mamba").split()) + "\n"


@pytest.mark.parametrize("option", [field.name for field in fields(GenerateConfig)])
def test_each_option_has_its_effect(generate, monkeypatch, option):
    made, load = [], MambaLM.from_pretrained
    monkeypatch.setattr(MambaLM, "from_pretrained", lambda *args, **kw: made.append(load(*args, **kw)) or made[-1])
    assert EFFECTS[option](generate, made)


def test_a_tokenizer_is_a_file_or_in_a_folder(generate, folder, monkeypatch):
    """Also in the home folder, as the model; the model's own where none is named, and only there."""
    said = generate()
    assert said.startswith("Mamba")
    assert generate(tokenizer="words") == said
    shutil.copytree(folder / "lm", folder / "both")
    shutil.copy(folder / "words" / "tokenizer.json", folder / "both")
    assert generate(model="both", tokenizer="null") == said
    assert generate(model="both", tokenizer="turned", prompts="[eats]") == "eats" + turned(said)
    monkeypatch.setenv("HOME", str(folder))
    assert generate(model="~/lm", tokenizer="~/words") == said


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"prompts": "[]"}, r"prompts must be one text or more, none of them empty, got \[\]"),
        ({"prompts": '["Mamba", ""]'}, r"prompts must be one text or more, none of them empty"),
        ({"prompts": "[' ']"}, "the prompt ' ' has no tokens; give a longer one"),
        ({"prompts": "[Mamba eels]"}, "the tokenizer cannot encode the prompt 'Mamba eels': .*UNK"),
        ({"prompts": "[eels]", "tokenizer": "more"}, r"prompts hold the token 7, but the model knows 0 \.\. 6; use"),
        ({"prompts": "[is, is]", "tokenizer": "few", "--temperature": 9}, "the tokenizer has no token ., which the"),
        ({"tokenizer": "nowhere/tokenizer.json"}, r"there is no nowhere/tokenizer\.json here, .*; give a file token"),
        ({"tokenizer": "./nowhere/x.json"}, r"there is no \./nowhere/x\.json; give a file tokenizer.json, or a folder"),
        ({"tokenizer": "lm"}, r"there is no tokenizer\.json in lm; give the path"),
        ({"tokenizer": "lm/config.json"}, r"lm/config\.json is not a tokenizer: "),
        ({"tokenizer": "ann/lm"}, r"the hub does not have it \(.*refused\); give a file tokenizer\.json, or a folder"),
        (
            {"tokenizer": "null"},
            r"there is no EleutherAI/gpt-neox-20b here, .*; give a file tokenizer\.json, or a folder",
        ),
        ({"model": "ann/lm"}, r"the hub does not have it \(.*refused\); give a folder with config\.json and"),
        ({"model": "/no/where"}, r"there is no /no/where; give a folder with config\.json and"),
        ({"model": "words"}, r"there is no config\.json in words; a language model needs config\.json and"),
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
