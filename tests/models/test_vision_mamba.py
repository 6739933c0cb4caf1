"""VisionMamba: golden numbers of the authors' code, their checkpoints, and timm's contract beyond timm's own tests."""

import argparse
import json
import math
import pickle
from pathlib import Path

import pytest
import timm.optim
import torch
from timm.models import load_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import vim  # noqa: F401  (registers the models)
from vim.layers.rename import rename
from vim.models import official
from vim.models.vision_mamba import VARIANTS, VisionMamba, checkpoint_filter_fn
from vim.timm_models.config import ModelConfig
from vim.timm_models.create import create_model

FIXTURES = Path(__file__).parent.parent / "fixtures"
MIDDLE = {"img_size": 64, "embed_dim": 48, "num_classes": 10}
OTHERS = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_classes": 8}
GOLDEN = {
    "g1_midcls_p16_img64": MIDDLE | {"depth": 3},
    "g2_midcls_p16_stride8_img64": MIDDLE | {"depth": 2, "patch_stride": 8},
    "g9_vim_firstcls_img48": OTHERS | {"img_size": 48, "class_token": "first"},
    "g9_vim_doublecls_img40": OTHERS | {"img_size": 40, "class_token": "both"},
}


def golden_model(golden, name: str, device: str = "cpu") -> VisionMamba:
    model = VisionMamba(**GOLDEN[name], device=device).eval()
    weights = golden(name, "state_dict.")  # official names: the pre-hook converts, also within a model
    torch.nn.Sequential(model).load_state_dict({f"0.{key}": value for key, value in weights.items()})
    return model


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_model(name, golden, relative_error, mixer_backend):
    device, limit = mixer_backend
    t, model = golden(name, device=device), golden_model(golden, name, device)
    x = t["input"].requires_grad_()
    features, blocks = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
    logits = model.forward_head(features)
    assert (logits - t["logits_f64"]).abs().max() < 2e-5 * limit
    assert (model.forward_head(features, pre_logits=True) - t["pooled"]).abs().max() < 2e-5 * limit

    def in_sequence(patches, cls):
        start = {"middle": patches.shape[1] // 2}.get(model.class_token, 0)
        return torch.cat([patches[:, :start], cls[:, :1], patches[:, start:], cls[:, 1:]], 1)

    prefix = model.num_prefix_tokens
    assert (in_sequence(features[:, prefix:], features[:, :prefix]) - t["features_f64"]).abs().max() < 5e-5 * limit
    # The official residual after block i holds the mixer outputs of the blocks before it.
    for i, block in enumerate(blocks[:-1]):
        assert (in_sequence(*block) - t[f"block{i + 1}.residual"]).abs().max() < 5e-5 * limit

    (logits * t["loss_weight"]).sum().backward()
    want = golden(name, "grad.")
    assert relative_error(x.grad, want.pop("input")) < 1e-4 * limit
    want = official.to_native(want, model.class_token)
    for key, p in model.named_parameters():
        assert relative_error(p.grad, want[key]) < 1e-4 * limit, key  # a gradient of exactly 0 must be 0 here


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_model_in_bf16_autocast(name, golden, mixer_backend):
    device, _ = mixer_backend
    t, model = golden(name, device=device), golden_model(golden, name, device)
    with torch.autocast(device, torch.bfloat16):
        features = model.forward_features(t["input"])
        logits = model.forward_head(features)
    assert features.dtype == torch.float32, "the residual stream stays in fp32"
    assert (logits - t["logits"]).norm() / t["logits"].norm() < 4e-2


def test_released_variants_have_the_official_tensors():
    layout = official_layout()
    assert len(layout) == 5
    for name, shapes in layout.items():
        variant = f"vim_{name.split('_')[1]}" + ("_stride8" if "stride8" in name else "")
        state_dict = timm.create_model(variant, device="meta").state_dict()
        want = {rename(official.NAMES, key): tuple(shape) for key, shape in shapes.items()}
        assert {key: tuple(t.shape) for key, t in state_dict.items()} == want


def official_layout() -> dict[str, dict[str, list[int]]]:
    """Shapes of every tensor of the released models, by official variant and tensor name."""
    variants = json.loads((FIXTURES / "official_state_dict_layout.json").read_text())["variants"]
    return {
        name: entry["top_level"]
        | {
            f"layers.{i}.{key}": shape
            for i in range(entry["num_blocks"])
            for key, shape in entry["each_block (prefix layers.<i>.)"].items()
        }
        for name, entry in variants.items()
    }


@pytest.mark.parametrize(
    ("name", "parameters", "gmac"),
    [
        ("vim_tiny", 7_148_008, 1.293),
        ("vim_tiny_stride8", 7_250_344, 4.790),
        ("vim_small", 25_796_584, 4.851),
        ("vim_small_stride8", 26_001_256, 17.976),
        ("vim_base", 97_598_440, 18.766),
    ],
)
def test_parameters_and_cost(name, parameters, gmac):
    """Counts of the authors' models; linear and convolution multiply-adds within 1 %."""
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    length = model.patch_embed.num_patches + 1
    macs = model.patch_embed.num_patches * model.patch_embed.proj.weight.numel() + model.head.weight.numel()
    for key, p in model.named_parameters():
        if key.startswith("blocks.") and p.dim() > 1 and not key.endswith("A_log"):
            macs += length * p.numel()
    assert abs(macs / 1e9 / gmac - 1) < 0.01


# Official checkpoints


class Hostile:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.fixture
def official_files(tmp_path, golden):
    """A training state as the authors save it, with different weights in `model` and `model_ema`."""

    def native_to_official(model, shift):
        """Invert the table of names by trying every official name."""
        state_dict, names = model.state_dict(), next(iter(official_layout().values()))
        pairs = {key: rename(official.NAMES, key) for key in names}
        out = {key: state_dict[native] + shift for key, native in pairs.items() if native in state_dict}
        assert len(out) == len(state_dict)
        table, middle = out["pos_embed"], (out["pos_embed"].shape[1] - 1) // 2
        out["pos_embed"] = torch.cat([table[:, 1 : middle + 1], table[:, :1], table[:, middle + 1 :]], 1)
        return out

    def write(variant, **kwargs):
        torch.manual_seed(0)
        model = timm.create_model(variant, **kwargs)
        state = {
            "model": native_to_official(model, 0.0),
            "model_ema": native_to_official(model, 1.0),
            "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
            "lr_scheduler": {"last_epoch": 299},
            "epoch": 299,
            "scaler": "none",
            "args": argparse.Namespace(model=variant, lr=1e-3),
        }
        path = tmp_path / f"{variant}.pth"
        torch.save(state, path)
        return model, path

    return write


def difference(a, b) -> float:
    return max(
        (x - y).abs().max().item() for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def shifted(model, shift):
    with torch.no_grad():
        for p in model.parameters():
            p += shift
    return model


@pytest.mark.parametrize(
    ("variant", "shift"), [("vim_tiny", 0.0), ("vim_base", 1.0)], ids=["tiny takes model", "base takes model_ema"]
)
def test_official_weights_are_those_that_the_cfg_names(variant, shift, official_files, monkeypatch):
    kwargs = {"depth": 2, "embed_dim": 32}
    model, path = official_files(variant, **kwargs)
    model = shifted(model, shift)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", fake_download(path))
    by_hub = timm.create_model(variant, pretrained=True, **kwargs)
    assert difference(by_hub, model) == 0

    by_file = timm.create_model(variant, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)
    assert difference(by_file, model) == 0

    by_tool = create_model(ModelConfig(variant, checkpoint=str(path), kwargs=kwargs), num_classes=1000)
    assert difference(by_tool, model) == 0

    by_filter = timm.create_model(variant, **kwargs)
    with torch.serialization.safe_globals([argparse.Namespace]):
        by_filter.load_state_dict(checkpoint_filter_fn(torch.load(path), by_filter))
    assert difference(by_filter, model) == 0


def test_a_cfg_may_ask_for_the_average(official_files):
    kwargs = {"depth": 1, "embed_dim": 16}
    model, path = official_files("vim_tiny", **kwargs)
    overlay = {"file": str(path), "notes": (official.EMA_NOTE,)}
    made = timm.create_model("vim_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    assert difference(made, shifted(model, 1.0)) == 0


@pytest.mark.parametrize("variant", ["vim_tiny", "vim_base"])
def test_timms_loaders_take_the_average_unless_they_are_told_otherwise(variant, official_files, caplog):
    """They unwrap the file before the model sees it, so a variant whose cfg asks for `model` warns."""
    kwargs = {"depth": 1, "embed_dim": 16}
    model, path = official_files(variant, **kwargs)
    made = timm.create_model(variant, **kwargs)
    load_checkpoint(made, str(path), use_ema=False)
    assert difference(made, model) == 0
    caplog.clear()
    made = timm.create_model(variant, checkpoint_path=str(path), **kwargs)
    assert difference(made, shifted(model, 1.0)) == 0
    assert ("the accuracy of vim_tiny was reported for its other weights" in caplog.text) == (variant == "vim_tiny")
    caplog.clear()
    timm.create_model(variant, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)
    assert not caplog.text


def fake_download(path):
    """A stand-in for the hub, with the .pth file and no safetensors."""
    from huggingface_hub.errors import EntryNotFoundError

    def download(repo_id, filename, **_):
        assert repo_id.startswith("hustvl/Vim-")
        if not filename.endswith(".pth"):
            raise EntryNotFoundError(filename)
        return str(path)

    return download


def test_official_weights_for_other_sizes_classes_and_channels(official_files):
    kwargs = {"depth": 2, "embed_dim": 32}
    model, path = official_files("vim_tiny", **kwargs)
    overlay = {"file": str(path)}
    other = timm.create_model(
        "vim_tiny",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        img_size=(160, 256),
        num_classes=7,
        in_chans=1,
        **kwargs,
    )
    assert other(torch.randn(1, 1, 160, 256)).shape == (1, 7)
    assert torch.equal(other.pos_embed[:, 0], model.pos_embed[:, 0]), "the class entry is not part of the grid"
    same = timm.create_model("vim_tiny", **kwargs)
    same.load_state_dict(model.state_dict())
    same.set_input_size((160, 256))
    assert torch.allclose(other.pos_embed, same.pos_embed, atol=1e-6)
    assert torch.allclose(
        other.patch_embed.proj.weight, model.patch_embed.proj.weight.sum(1, keepdim=True), atol=1e-6
    ), "grey filters are the sum over the colours"


def test_hostile_checkpoint_is_refused(tmp_path, capsys):
    path = tmp_path / "hostile.pth"
    torch.save({"model": {}, "args": Hostile()}, path)
    with pytest.raises(RuntimeError, match="weights_only=True blocked"):
        timm.create_model("vim_nano", checkpoint_path=str(path))
    assert "must never run" not in capsys.readouterr().out
    assert pickle.dumps(Hostile())  # the file is hostile: a plain unpickler would call print


def test_native_checkpoints_pass_through():
    model = timm.create_model("vim_nano", img_size=32)
    native = model.state_dict()
    backwards = dict(reversed(native.items()))
    assert all(torch.equal(checkpoint_filter_fn(backwards, model)[k], v) for k, v in native.items())
    headless = {k: v for k, v in native.items() if not k.startswith("head.")}
    assert checkpoint_filter_fn(headless, model).keys() == headless.keys()
    assert all(torch.equal(v, native[k]) for k, v in checkpoint_filter_fn({"state_dict": native}, model).items())


@pytest.mark.parametrize("variant", ["vim_tiny", "vim_base"])
def test_a_training_state_of_several_processes_without_an_average(variant):
    model = timm.create_model(variant, depth=1, embed_dim=16, num_classes=3, img_size=32)
    native = model.state_dict()
    state = {"model": {f"module.{name}": value for name, value in native.items()}, "epoch": 3}
    assert checkpoint_filter_fn(state, model).keys() == native.keys()


def test_native_table_is_recognised_by_name_not_shape():
    """Official and native tables have the same shape; a native one must not be reordered."""
    a, b = (timm.create_model("vim_nano", img_size=32) for _ in range(2))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.pos_embed, b.pos_embed)


# Options and sizes


@pytest.mark.parametrize("class_token", ["middle", "first", "both", "none"])
@pytest.mark.parametrize("global_pool", ["token", "avg", "max", "avgmax"])
@pytest.mark.parametrize("patch_stride", [None, 5])
def test_class_tokens_and_pooling(class_token, global_pool, patch_stride):
    kwargs = {"img_size": (37, 24), "patch_size": 8, "patch_stride": patch_stride, "depth": 2, "embed_dim": 16}
    if (class_token, global_pool) == ("none", "token"):
        with pytest.raises(ValueError, match="global_pool='token' needs a class token, got class_token='none'"):
            VisionMamba(class_token=class_token, global_pool=global_pool, **kwargs)
        return
    model = VisionMamba(num_classes=3, class_token=class_token, global_pool=global_pool, **kwargs).eval()
    x = torch.randn(2, 3, 37, 24)
    features, (last,) = model.forward_intermediates(x, indices=1, norm=True)
    stride = patch_stride or 8
    grid = ((37 - 8) // stride + 1, (24 - 8) // stride + 1)
    assert last.shape == (2, 16, *grid)
    prefix = {"middle": 1, "first": 1, "both": 2, "none": 0}[class_token]
    assert features.shape == (2, prefix + math.prod(grid), 16)
    assert torch.allclose(features[:, prefix:].transpose(1, 2).unflatten(2, grid), last, atol=1e-6)
    if global_pool == "token":
        want = features[:, :prefix].mean(1)
    else:
        patches = features[:, prefix:]
        want = {"avg": patches.mean(1), "max": patches.amax(1), "avgmax": (patches.mean(1) + patches.amax(1)) / 2}
        want = want[global_pool]
    assert torch.allclose(model.forward_head(features, pre_logits=True), want, atol=1e-6)
    assert torch.allclose(model(x), model.head(want), atol=1e-6)


def test_class_token_stands_in_the_middle():
    """The class token's features see patches on both sides, but the sequence has it at P // 2."""
    model = VisionMamba(img_size=48, depth=1, embed_dim=16)
    tokens = model._embed(torch.zeros(1, 3, 48, 48))
    assert torch.allclose(tokens[0, 4], (model.cls_token + model.pos_embed[:, :1])[0, 0])
    assert torch.allclose(tokens[0, 3], model.patch_embed.proj.bias + model.pos_embed[0, 4])
    assert torch.allclose(tokens[0, 5], model.patch_embed.proj.bias + model.pos_embed[0, 5])


def test_dynamic_size_equals_set_input_size():
    model = VisionMamba(img_size=64, depth=2, embed_dim=16, dynamic_img_size=True).eval()
    x = torch.randn(1, 3, 96, 72)
    want, maps = model.forward_intermediates(x)
    model.set_input_size((96, 72))
    for got, expected in zip(model.forward_intermediates(x), (want, maps), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert maps[0].shape == (1, 16, 6, 4)
    fixed = VisionMamba(img_size=64, depth=2, embed_dim=16)
    with pytest.raises(AssertionError, match="input height must be img_size's 64, got 96"):
        fixed(x)
    with pytest.raises(AssertionError, match="input width must be img_size's 64, got 65"):
        fixed(torch.randn(1, 3, 64, 65))  # the same number of patches


def test_set_patch_size():
    model = VisionMamba(img_size=64, patch_size=16, depth=1, embed_dim=16)
    model.set_input_size(patch_size=8)
    assert model.patch_embed.grid_size == (8, 8)
    assert model.feature_info[0]["reduction"] == 8
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"img_size \(64, 64\) must be at least the patch_size \(65, 65\)"):
        model.set_input_size(patch_size=65)
    model.patch_embed.proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"patch_size cannot change while patch_embed\.proj is wrapped or has hooks"):
        model.set_input_size(patch_size=16)
    with pytest.raises(ValueError, match=r"img_size \(4, 4\) must be at least the patch_size \(8, 8\)"):
        model.set_input_size(4)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000), "a size that is refused changes nothing"
    assert model.patch_embed.grid_size == (8, 8)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"class_token": "centre"}, "class_token must be one of .*'middle'.*, got 'centre'"),
        ({"global_pool": "mean"}, "global_pool must be one of .*'avg'.*, got 'mean'"),
        ({"img_size": 8}, r"img_size \(8, 8\) must be at least the patch_size \(16, 16\)"),
        ({"patch_stride": 0}, "patch_size and patch_stride must be positive"),
        ({"weight_init": "xavier"}, "weight_init must be one of '', 'skip', got 'xavier'"),
    ],
)
def test_bad_options_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("vim_nano", **kwargs)


# Initialisation, meta, training


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context")  # the hooks do not see the kept scans
def test_checkpointing_keeps_no_more_than_the_inputs_and_the_scans_of_the_blocks():
    model = timm.create_model("vim_nano", img_size=64, patch_size=8, num_classes=5).train()
    x = torch.randn(4, 3, 64, 64)
    kept = []
    for checkpointing in (False, True, False):
        model.set_grad_checkpointing(checkpointing)
        kept.append(0)

        def note(t):
            kept[-1] += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model(x).sum()
    tokens = 4 * 65 * model.embed_dim
    assert kept[1] < 3 * len(model.blocks) * tokens
    assert kept[0] > 10 * kept[1]
    assert kept[2] == kept[0], "it is off again"


class Scans(TorchDispatchMode):
    """Counts the scans that run."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.vim_kernels.selective_scan.default
        return function(*args, **(kwargs or {}))


def test_checkpointing_runs_no_scan_again():
    model = timm.create_model("vim_nano", img_size=32, num_classes=5).train()
    model.set_grad_checkpointing()
    with Scans() as scans:
        model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert scans.count == len(model.blocks)


def test_trains_compiled_in_one_graph_with_checkpointing():
    torch.manual_seed(0)
    model = timm.create_model("vim_nano", img_size=32, depth=2, num_classes=5).train()
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for checkpointing, step in (False, model), (True, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.set_grad_checkpointing(checkpointing)
        with torch.autocast("cpu", torch.bfloat16):
            loss = step(x).square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 0.05 * a.norm()


def test_entrypoints_cover_the_table():
    assert set(VARIANTS) == set(timm.list_models(module="vision_mamba"))
