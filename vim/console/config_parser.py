"""Configurations from YAML files and dotted overrides: jsonargparse, with hints for misspelt keys."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from .errors import did_you_mean

# How jsonargparse says that it does not know a key, in YAML and on the command line.
_UNKNOWN_KEY = (
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"Option '(?P<key>[\w.]+)' is not accepted"),
    re.compile(r"unrecognized arguments: --(?P<key>[\w.]+)"),
)


_IN_HOME = re.compile(r"(?P<scheme>(local-dir:|file://)?)(?P<path>~[^/]*(/.*)?)")


class ConfigParser(ArgumentParser):
    """Parser of one configuration dataclass: `--config FILE` and `--section.field VALUE`.

    Args:
        config_class: dataclass, with a docstring under every field. A method `read_from(file, given)` is told the last
            file that was read, and the names of the options on the command line.
        description: first lines of `--help`.
    """

    def __init__(self, config_class: type, description: str):
        set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the help of a field is the string under it
        super().__init__(
            description=description,
            usage="%(prog)s [--config FILE] [--section.field VALUE ...]",
            allow_abbrev=False,  # an abbreviated key would set another field without a word
        )
        self.config_class = config_class
        self.add_argument("--config", action="config", metavar="FILE", help="YAML file; overrides come on top")
        self.add_class_arguments(config_class)

    def parse_config(self, args: Sequence[str] | None = None) -> tuple[Any, Any]:
        """Parse the command line.

        Returns: the configuration, and the namespace with arguments that were added besides.
        """
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

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """A line for each key: argparse's own layout takes three and leaves the screen."""
        lines = [self.format_usage(), self.description or ""]
        for group in self._action_groups:
            lines += ["", f"{group.title}:"] if group._group_actions else []
            for action in group._group_actions:
                # A section can also come from a file or as JSON; its keys are what to look up.
                hidden = action.help == argparse.SUPPRESS or action.dest in _sections(self.config_class)
                if action.option_strings and not hidden:
                    default = "" if action.default in (None, argparse.SUPPRESS) else f"[{action.default}]"
                    option = action.option_strings[-1].removesuffix("+")  # the form that appends to a list
                    lines.append(f"  {option:<26} {action.help} {default}")
        return "\n".join(lines) + "\n"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(self._hint(message) or message, ex)

    def _hint(self, message: str) -> str | None:
        for pattern in _UNKNOWN_KEY:
            if match := pattern.search(message):
                parts = match.groupdict()
                key = f"{parts['group']}.{parts['key']}" if parts.get("group") else parts["key"]
                return f"unknown key {key!r}" + did_you_mean(key, _keys(self.config_class), "see --help")
        return None


def _config_first(args: list[str]) -> list[str]:
    """Move `--config FILE` to the front: jsonargparse would let the file undo what stands before it."""
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


def _expand_home(config: Any) -> None:
    """Put the home folder in place of ~ in all paths of a configuration: what a shell leaves in YAML files and behind
    an equals sign. No other text begins so."""
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            _expand_home(value)
        elif isinstance(value, str) and (path := _IN_HOME.fullmatch(value)):
            setattr(config, f.name, f"{path['scheme']}{os.path.expanduser(path['path'])}")


def _sections(config_class: type) -> list[str]:
    return [f.name for f in fields(config_class) if isinstance(f.type, type) and is_dataclass(f.type)]


def _keys(config_class: type, prefix: str = "") -> list[str]:
    """All keys, with those of sections dotted: optim.lr."""
    keys = []
    for f in fields(config_class):
        keys.append(prefix + f.name)
        if f.name in _sections(config_class):
            keys += _keys(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]
    return keys
