"""The cost of models: published figures, counts by hooks and by hand, the README's table."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vim  # noqa: F401  (registers the models)
import vim.experiments.profile as profiling
from vim.console.errors import ConfigError
from vim.experiments.profile import ProfileConfig, cost, profile

ROOT = Path(__file__).parents[2]
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)
SCAN_BLOCK = 9 * 16 * 384 * 2 + 2 * 384 + 384  # Vim-Ti, operations per token: 16 states, 384 channels, two D, one z


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


@pytest.mark.parametrize(
    ("name", "gmac", "activations"),
    [
        ("resnet50", 4.1, 11.1),
        ("deit_tiny_patch16_224", 1.26, 5.97),  # with its layer norms, which fvcore counts
        ("vit_base_patch16_224", 17.58, 23.90),
    ],
)
def test_published_costs(name, gmac, activations):
    """As in timm's table of results, which fvcore counted."""
    found = cost(on_meta(name), (3, 224, 224))
    assert found["macs"] / 1e9 == pytest.approx(gmac, rel=0.01)
    assert found["activations"] / 1e6 == pytest.approx(activations, rel=0.005)
    assert found["macs_with_scan"] == found["macs"]


@pytest.mark.parametrize("mixer", ["bimamba", "mamba", "bimamba2", "mamba2", "none"])
def test_costs_equal_those_of_hooks_on_every_module(mixer):
    """A counter in the manner of thop: a module multiplies each element of its output by a row of its weight."""
    model, macs, activations = on_meta("vim_nano", mixer=mixer), [], []

    def count(module: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
        macs.append(y.numel() * module.weight[0].numel())
        activations.append(y.numel())

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, WEIGHTED)]
    with torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    for handle in handles:
        handle.remove()
    found = cost(model, (3, 224, 224))
    assert (found["macs"], found["activations"]) == (sum(macs), sum(activations))


@pytest.mark.parametrize(("kwargs", "length"), [({}, 197), ({"img_size": 1248}, 78**2 + 1)])
def test_the_scan(kwargs, length):
    model = on_meta("vim_tiny", **kwargs)
    found = cost(model, (3, *model.patch_embed.img_size))
    assert 2 * (found["macs_with_scan"] - found["macs"]) == 24 * length * SCAN_BLOCK


@pytest.mark.parametrize("mixer", ["bimamba2", "s4d"])
def test_other_state_spaces_count_with_the_scan(mixer):
    found = cost(on_meta("vim_nano", mixer=mixer), (3, 224, 224))
    assert found["macs_with_scan"] > 1.1 * found["macs"]


@pytest.mark.parametrize("mixer", ["bimamba", "bimamba2"])
def test_a_backward_costs_twice_its_forward(mixer):
    """Except for the first layer: the image needs no gradient."""
    model = on_meta("vim_nano", mixer=mixer)
    with FlopCounterMode(display=False) as counter:
        y = model(torch.empty(2, 3, 224, 224, device="meta"))
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    first_layer = 2 * 2 * model.patch_embed.num_patches * model.patch_embed.proj.weight.numel()
    assert counter.get_total_flops() == 2 * forward - first_layer


@pytest.mark.parametrize(("mixer", "runs"), [("bimamba", 2), ("bimamba2", 3)])
def test_recomputed_operations_count(mixer, runs):
    """Checkpointing keeps the scans of Mamba and repeats all else. Backwards count as two runs."""
    model = on_meta("vim_nano", mixer=mixer).train()
    model.set_grad_checkpointing()
    name = {"bimamba": "selective_scan", "bimamba2": "count_ssd"}[mixer]
    found = []
    y = torch.empty(2, 3, 224, 224, device="meta")
    for run in (model, lambda y: y.sum().backward()):
        with FlopCounterMode(display=False) as counter:
            y = run(y)
        by_name = {str(op).removeprefix("vim_kernels."): n for op, n in counter.get_flop_counts()["Global"].items()}
        found.append((by_name.get(name, 0) + by_name.get(f"{name}_backward", 0), by_name["causal_conv1d"]))
    (scan, convolution), (backward_scan, repeated) = found
    assert (backward_scan, repeated) == (runs * scan, convolution)


def rows_of_models(page: str) -> dict[str, list[str]]:
    lines = (ROOT / page).read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in cells if timm.is_model(row[0].strip("`"))}


@pytest.mark.parametrize(("page", "least"), [("README.md", 8), ("docs/models.md", 32)])
def test_the_tables_of_models(page, least, tmp_path):
    table = rows_of_models(page)
    assert len(table) >= least
    rows = profile(ProfileConfig(list(table), output=str(tmp_path / "profile.json")))
    assert json.loads((tmp_path / "profile.json").read_text()) == rows
    for row in rows:
        cells = table[row["model"]]
        size = int(cells.pop(0)) if page == "docs/models.md" else 224
        assert row["input_size"] == [3, size, size]
        parameters, gmac, with_scan, activations, *_ = cells
        assert parameters == f"{row['parameters'] / 1e6:.1f} M"
        if page == "docs/models.md":
            assert activations == f"{row['activations'] / 1e6:.1f} M"
        for shown, key in ((gmac, "macs"), (with_scan, "macs_with_scan")):
            digits = len(shown.partition(".")[2])
            assert re.fullmatch(r"\d+\.\d+", shown)
            assert shown == f"{row[key] / 1e9:.{digits}f}"


def test_nothing_is_computed(tmp_path, monkeypatch):
    """Neither models nor images have memory, and released weights are not fetched."""
    devices = []

    def spy(model, size):
        devices.extend(t.device.type for t in model.state_dict().values())
        return cost(model, size)

    monkeypatch.setattr(profiling, "cost", spy)
    names = ["vim_base.hustvl_in1k", "resnet18.a1_in1k"]
    first, second = profile(ProfileConfig(names, img_size=640, output=str(tmp_path / "sub" / "p.json")))
    assert set(devices) == {"meta"}
    assert (first["input_size"], second["input_size"]) == ([3, 640, 640], [3, 640, 640])
    assert (first["kwargs"], second["kwargs"]) == ({"img_size": 640}, {})  # a ResNet has no such argument


def test_keywords_reach_the_model(tmp_path):
    kwargs = {"in_chans": 1, "num_classes": 7, "depth": 2, "embed_dim": 16, "img_size": 32}
    (row,) = profile(ProfileConfig(["vim_nano"], kwargs=kwargs, output=str(tmp_path / "p.json")))
    assert row["input_size"] == [1, 32, 32]
    assert row["parameters"] == sum(p.numel() for p in timm.create_model("vim_nano", **kwargs).parameters())


def test_run_folders_have_their_own_size_and_classes(tmp_path):
    about = {
        "architecture": "vim_nano",
        "num_classes": 5,
        "model_args": {"depth": 1, "img_size": 32},
        "pretrained_cfg": {"input_size": [3, 32, 32], "num_classes": 5},
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    (row,) = profile(ProfileConfig([str(tmp_path)], output=str(tmp_path / "p.json")))
    want = timm.create_model("vim_nano", num_classes=5, depth=1, img_size=32)
    assert row["parameters"] == sum(p.numel() for p in want.parameters())
    assert row["input_size"] == [3, 32, 32]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": []}, "models must name at least one"),
        ({"img_size": 0}, "img_size must be at least 1, got 0"),
        ({"models": ["vim_tini"]}, "no model 'vim_tini' in timm.*vim_tiny"),
        ({"kwargs": {"mixerr": "mamba"}}, "^kwargs do not fit vim_tiny: .*mixerr"),
        ({"models": ["levit_128s"], "img_size": 230}, "levit_128s cannot take images of 230 x 230 pixels: "),
    ],
)
def test_wrong_arguments(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        profile(ProfileConfig(**{"models": ["vim_tiny"], "output": str(tmp_path / "p.json")} | options))
