"""Renaming the keys of a checkpoint by a table of patterns."""

import re
from collections.abc import Mapping

from torch import Tensor

# Pattern of a whole key -> its new name, a template that may refer to the groups of the pattern.
Names = Mapping[str, str]


def rename(table: Names, key: str) -> str:
    """The new name of a key by the first pattern that matches all of it; without a match the key itself."""
    for pattern, template in table.items():
        if match := re.fullmatch(pattern, key):
            return match.expand(template)
    return key


def rename_keys(table: Names, state_dict: dict[str, Tensor], prefix: str = "") -> None:
    """Rename in place the keys of a state dict that start with `prefix`; patterns match what follows the prefix."""
    for old in [key for key in state_dict if key.startswith(prefix)]:
        new = prefix + rename(table, old.removeprefix(prefix))
        if new != old:
            state_dict[new] = state_dict.pop(old)
