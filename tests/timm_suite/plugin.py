"""pytest plugin: `timm.list_models` returns only our model while timm's test module is collected.

timm decides by hard-coded name lists which models return tokens and which have intermediates; a model from outside is
in none of them. The answers here put ours into both.
"""

import os
import sys

import pytest
import timm
from timm.models import get_arch_pretrained_cfgs, model_entrypoint

import vim  # noqa: F401  (registers the models)

MODEL = os.environ["TIMM_SUITE_MODEL"]
OURS = [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("vim.")]


def pytest_configure(config):
    groups = ["base", "forward", "backward", "cfg", "cfg_nonstd", "features", "torchscript", "fxforward", "fxbackward"]
    for marker in groups:
        config.addinivalue_line("markers", f"{marker}: one of timm's groups")
    if MODEL not in OURS:
        raise pytest.UsageError(f"no model {MODEL!r}; there are {OURS}")
    if depth := os.environ.get("TIMM_SUITE_DEPTH"):
        sys.modules[model_entrypoint(MODEL).__module__].VARIANTS[MODEL]["depth"] = int(depth)
    timm.list_models = list_models
    timm.list_pretrained = lambda *_, **__: []


def list_models(filter="", module="", pretrained=False, exclude_filters="", name_matches_cfg=False, include_tags=None):
    if pretrained or "vit_*" in exclude_filters:  # the lists of pretrained models and of those that return maps
        return []
    return list(get_arch_pretrained_cfgs(MODEL)) if include_tags else [MODEL]


def pytest_collection_modifyitems(config, items):
    """Some tests name timm's models in their parameters; keep only ours."""
    ours = [item for item in items if item.callspec.params["model_name"].split(".")[0] == MODEL]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours
