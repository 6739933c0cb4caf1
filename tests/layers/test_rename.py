"""Renaming by a table of patterns."""

import pytest
import torch

from vim.layers.rename import rename, rename_keys

TABLE = {r"a\.(\d+)\.x": r"first.\1", r"a\.(.*)": r"second.\1", r"b(_log)?\.y": r"third\1"}


@pytest.mark.parametrize(
    ("key", "want"),
    [
        ("a.3.x", "first.3"),
        ("a.3.xy", "second.3.xy"),
        ("b.y", "third"),
        ("b_log.y", "third_log"),
        ("b.y.z", "b.y.z"),
        ("c.a.3.x", "c.a.3.x"),
    ],
)
def test_the_first_pattern_that_matches_the_whole_key_renames_it(key, want):
    assert rename(TABLE, key) == want


def test_keys_outside_the_prefix_stay():
    state_dict = {name: torch.tensor(i) for i, name in enumerate(("m.a.3.x", "a.3.x", "m.c", "m.b.y"))}
    rename_keys(TABLE, state_dict, "m.")
    found = {name: value.item() for name, value in state_dict.items()}
    assert found == {
        "m.first.3": 0,
        "a.3.x": 1,
        "m.c": 2,
        "m.third": 3,
    }
