"""Configurations from YAML files and dotted overrides: jsonargparse, with bases and hints for misspelt keys."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from .errors import did_you_mean

# jsonargparse's messages for an unknown key, in YAML and on the command line.
_UNKNOWN_KEY = (
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"Option '(?P<key>[\w.]+)' is not accepted"),
    re.compile(r"unrecognized arguments: --(?P<key>[\w.]+)"),
)

_IN_HOME = re.compile(r"(?P<scheme>(local-dir:|file://)?)(?P<path>~[^/]*(/.*)?)")


class ConfigParser(ArgumentParser):
    """Parser of one configuration dataclass: `--config FILE` and `--section.field VALUE`.

    A file may derive from another one: `base: other.yaml`, a path relative to the file, holds what the file leaves out.
    A second `--config` goes on top of the first in the same way. Mappings merge key by key, model.kwargs included;
    other values, lists included, replace the former one. An option replaces its field: `--model.kwargs "{}"` clears it.

    Args:
        config_class: dataclass with a docstring under every field. If it has a method `read_from(file, given)`, the
            parser passes it the last `--config` file and the names of the options on the command line.
        description: first lines of `--help`.
    """

    def __init__(self, config_class: type, description: str):
        set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the help of a field is the string under it
        super().__init__(
            description=description,
            usage="%(prog)s [--config FILE] [--section.field VALUE ...]",
            allow_abbrev=False,  # an abbreviated key would silently set another field
        )
        self.config_class = config_class
        self._files: dict[Path, Namespace] = {}  # content of each file
        self._merged = Namespace()
        self._reading: Path | None = None
        about = "YAML file, which may name a base; overrides come on top"
        self.add_argument("--config", action="config", metavar="FILE", help=about)
        self.add_class_arguments(config_class)

    def parse_config(self, args: Sequence[str] | None = None) -> tuple[Any, Any]:
        """Parse the command line.

        Returns: the configuration, and the namespace, which also holds arguments added to the parser.
        """
        self._files, self._merged = {}, Namespace()
        words = sys.argv[1:] if args is None else list(args)
        namespace = self.parse_args(_config_first(list(words)))
        try:
            built = self.instantiate(namespace)
            config = self.config_class(**{f.name: getattr(built, f.name) for f in fields(self.config_class)})
        except ValueError as error:
            self.error(str(error))
        _expand_home(config)
        if built.config and hasattr(config, "read_from"):
            given = {word.split("=")[0].removeprefix("--") for word in words if word.startswith("--")}
            config.read_from(Path(str(built.config[-1])), given)
        return config, built

    def parse_path(self, path: str | os.PathLike, *args: Any, **options: Any) -> Namespace:
        """Read a file and its bases on top of the files before; jsonargparse calls this for `--config`."""
        self._add_file([Path(path)], *args, **options)
        return self._merged

    def _add_file(self, chain: list[Path], *args: Any, **options: Any) -> None:
        """Merge the last file of a chain, which is the base of the one before, and so on."""
        self._reading = file = chain[-1]
        self._files[file] = content = super().parse_path(file, *args, **options)
        self._reading = None
        if (base := content.pop("base", None)) is not None:
            self._add_file([*chain, self._base_path(base, chain)], *args, **options)
        self._merged = _merge(self._merged, content)

    def _base_path(self, base: Any, chain: list[Path]) -> Path:
        file = chain[-1]
        if not isinstance(base, str):
            self.error(f"base of {file} must be the path of one YAML file, got {base!r}")
        path = Path(os.path.normpath(file.parent / Path(base).expanduser()))
        if not path.is_file():
            self.error(f"base {base!r} of {file} is missing: no file {path}; give a path relative to {file.parent}")
        for i, former in enumerate(chain):
            if path.samefile(former):
                circle = " -> ".join(map(str, [*chain[i:], former]))
                self.error(f"circular base: {circle}; remove one of these base keys")
        return path

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """One line per key: argparse's own layout takes three."""
        sections = {f.name for f in fields(self.config_class) if section_of(f)}
        lines = [self.format_usage(), (self.description or "").strip()]
        for group in self._action_groups:
            lines += ["", f"{group.title}:"] if group._group_actions else []
            for action in group._group_actions:
                # jsonargparse also takes a whole section, as a file or JSON; the help shows its keys alone.
                hidden = action.help == argparse.SUPPRESS or action.dest in sections
                if action.option_strings and not hidden:
                    default = "" if action.default in (None, argparse.SUPPRESS) else f"[{action.default}]"
                    option = action.option_strings[-1].removesuffix("+")  # the form that appends to a list
                    lines.append(f"  {option:<26} {' '.join(str(action.help).split())} {default}".rstrip())
        return "\n".join(lines) + "\n"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        where = f"{self._reading}: " if self._reading else ""
        super().error(self._hint(message) or where + message, ex)

    def _hint(self, message: str) -> str | None:
        for pattern in _UNKNOWN_KEY:
            if match := pattern.search(message):
                parts = match.groupdict()
                key = f"{parts['group']}.{parts['key']}" if parts.get("group") else parts["key"]
                where = next((f" in {file}" for file, content in self._files.items() if key in content), "")
                return f"unknown key {key!r}{where}" + did_you_mean(key, _keys(self.config_class), "see --help")
        return None


def _config_first(args: list[str]) -> list[str]:
    """Move `--config FILE` to the front: jsonargparse would let the file override the options before it."""
    front: list[str] = []
    rest: list[str] = []
    while args:
        arg = args.pop(0)
        if arg == "--config":
            front += [arg, *args[:1]]
            del args[:1]
        else:
            (front if arg.startswith("--config=") else rest).append(arg)
    return front + rest


def _merge(below: Namespace, content: Namespace) -> Namespace:
    merged = below.clone()
    for key, value in content.items():
        merged[key] = _on_top(below.get(key), value)
    return merged


def _on_top(below: Any, value: Any) -> Any:
    """The value; mappings merge key by key."""
    if not (isinstance(below, dict) and isinstance(value, dict)):
        return value
    return below | {key: _on_top(below.get(key), new) for key, new in value.items()}


def _expand_home(config: Any) -> None:
    """Replace ~ by the home folder in every path: a shell does not, in YAML files and after an equals sign. No other
    text starts with ~."""
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            _expand_home(value)
        elif isinstance(value, str) and (path := _IN_HOME.fullmatch(value)):
            setattr(config, f.name, f"{path['scheme']}{os.path.expanduser(path['path'])}")


def section_of(f: Field) -> type | None:
    """The dataclass of a field that is a section."""
    return f.type if isinstance(f.type, type) and is_dataclass(f.type) else None


def _keys(config_class: type, prefix: str = "") -> list[str]:
    """All keys; keys of sections are dotted: optim.lr."""
    keys = []
    for f in fields(config_class):
        keys.append(prefix + f.name)
        if section := section_of(f):
            keys += _keys(section, f"{prefix}{f.name}.")
    return keys
