"""The key `base` of a configuration file: what a file leaves out comes from another one."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from vim.console import ConfigParser


@dataclass
class Layer:
    """A section."""

    width: int = 1
    """Channels."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keywords."""


@dataclass
class Config:
    """A configuration."""

    layer: Layer = field(default_factory=Layer)
    seed: int = 0
    """Random seed."""
    names: list[str] = field(default_factory=list)
    """Names."""

    def read_from(self, file: Path, given: set[str]) -> None:
        self.file, self.given = file, given


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """Write files: files(a={...}) writes a.yaml; a__b is b.yaml in folder a."""
    monkeypatch.chdir(tmp_path)

    def write(**contents):
        for name, content in contents.items():
            path = Path(f"{name.replace('__', '/')}.yaml")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))

    return write


def parse(*args):
    return ConfigParser(Config, "").parse_config(list(args))[0]


def error_of(capsys, *args):
    with pytest.raises(SystemExit) as exit_:
        parse(*args)
    assert exit_.value.code == 2
    return capsys.readouterr().err.partition("error: ")[2]


def test_a_file_wins_over_its_base_and_an_option_over_both(files):
    files(a={"seed": 1, "layer": {"width": 2}, "names": ["a", "b"]}, b={"base": "a.yaml", "names": ["c"]})
    assert asdict(parse("--config", "b.yaml")) == {
        "seed": 1, "layer": {"width": 2, "kwargs": {}}, "names": ["c"]
    }  # fmt: skip
    assert parse("--seed", "3", "--config", "b.yaml").seed == 3


def test_a_chain_of_bases_is_read_from_its_end_each_path_relative_to_its_file(files, monkeypatch, tmp_path):
    files(
        far__a={"seed": 1, "layer": {"width": 1}, "names": ["a"]},
        far__b={"base": "a.yaml", "layer.width": 2, "names": ["b"]},
        c={"base": "far/b.yaml", "names": ["c"]},
    )
    monkeypatch.chdir(tmp_path / "far")
    config = parse("--config", "../c.yaml")
    assert (config.seed, config.layer.width, config.names) == (1, 2, ["c"])
    assert (config.file, config.given) == (Path("../c.yaml"), {"config"})


def test_a_base_may_be_in_the_home_folder(files, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    files(home__a={"seed": 1}, b={"base": "~/a.yaml"})
    assert parse("--config", "b.yaml").seed == 1


BELOW = {"layer": {"kwargs": {"depth": 1, "rates": {"drop": 0.1, "path": 0.2}, "sizes": [1, 2]}}}
ABOVE = {"layer": {"kwargs": {"width": 9, "rates": {"path": 0.5}, "sizes": [3]}}}
BOTH = {"depth": 1, "width": 9, "rates": {"drop": 0.1, "path": 0.5}, "sizes": [3]}


def test_mappings_merge_key_by_key_with_the_base_and_with_the_file_before(files):
    files(a=BELOW, b=ABOVE, derived={"base": "a.yaml", **ABOVE})
    assert parse("--config", "derived.yaml").layer.kwargs == BOTH
    assert parse("--config", "a.yaml", "--config=b.yaml").layer.kwargs == BOTH
    assert parse("--config", "b.yaml", "--config", "a.yaml").layer.kwargs == BOTH | {
        "rates": {"drop": 0.1, "path": 0.2}, "sizes": [1, 2]
    }  # fmt: skip


def test_an_option_adds_a_keyword_or_replaces_all(files):
    files(a=BELOW, derived={"base": "a.yaml"})
    added = parse("--config", "derived.yaml", "--layer.kwargs.depth", "7").layer.kwargs
    assert added == BELOW["layer"]["kwargs"] | {"depth": 7}
    assert parse("--config", "derived.yaml", "--layer.kwargs", "{}").layer.kwargs == {}


def test_a_file_after_a_derived_one_goes_on_top_of_its_whole_chain(files):
    files(a={"seed": 1, "names": ["a"]}, b={"base": "a.yaml", "names": ["b"]}, c={"seed": 3})
    config = parse("--config", "b.yaml", "--config", "c.yaml")
    assert (config.seed, config.names) == (3, ["b"])
    config = parse("--config", "c.yaml", "--config", "b.yaml")
    assert (config.seed, config.names, config.file) == (1, ["b"], Path("b.yaml"))


def test_a_parser_starts_each_command_line_without_the_files_of_the_last(files):
    files(a={"seed": 1}, b={"names": ["b"]})
    parser = ConfigParser(Config, "")
    parser.parse_config(["--config", "a.yaml"])
    assert parser.parse_config(["--config", "b.yaml"])[0].seed == 0


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            {"a": {"base": "far/b.yaml"}, "far__b": {"base": "../a.yaml"}},
            "circular base: a.yaml -> far/b.yaml -> a.yaml; remove one of these base keys",
        ),
        (
            {"a": {"base": "b.yaml"}, "b": {"base": "b.yaml"}},
            "circular base: b.yaml -> b.yaml; remove one of these base keys",
        ),
        (
            {"a": {"base": "far/b.yaml"}, "far__b": {"base": "c.yaml"}},
            "base 'c.yaml' of far/b.yaml is missing: no file far/c.yaml; give a path relative to far",
        ),
        ({"a": {"base": ["b.yaml"]}}, "base of a.yaml must be the path of one YAML file, got ['b.yaml']"),
        ({"a": {"base": "b.yaml"}, "b": {"sed": 1}}, "unknown key 'sed' in b.yaml; did you mean 'seed'"),
        (
            {"a": {"base": "b.yaml", "layer": {"with": 1}}, "b": {"seed": 1}},
            "unknown key 'layer.with' in a.yaml; did you mean 'layer.width'",
        ),
    ],
)
def test_a_wrong_base_is_an_error_of_one_line(files, capsys, contents, message):
    files(**contents)
    error = error_of(capsys, "--config", "a.yaml")
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", ["seed: fast", "seed: ["])
def test_an_unreadable_base_is_named(files, capsys, content):
    files(a={"base": "b.yaml"}, b=content)
    assert error_of(capsys, "--config", "a.yaml").startswith("b.yaml: ")


def test_base_is_no_option(capsys):
    assert "unknown key 'base'" in error_of(capsys, "--base", "a.yaml")
