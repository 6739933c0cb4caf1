"""The released vision Mambas: golden numbers of the authors' code, and their tensors."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch

import vim  # noqa: F401  (registers the models)

FIXTURES = Path(__file__).parent.parent / "fixtures"
# fixture -> entry point and arguments
GOLDEN = {
    "g6_mambar_base_r12n4_img64": (
        "mambar_tiny",
        {"img_size": 64, "patch_size": 8, "embed_dim": 40, "depth": 4, "register_dim": 10},
    ),
    "g6_mambar_large_r16n8_img56": (
        "mambar_large",
        {"img_size": 56, "patch_size": 8, "embed_dim": 32, "depth": 3, "register_dim": 4},
    ),
    "g7_videomamba_p16_img64": ("videomamba_tiny", {"img_size": 64, "embed_dim": 32, "depth": 4}),
    "g8_adventurer_hd16_img48": (
        "adventurer_tiny",
        {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 7, "d_state": 16, "head_dim": 16},
    ),
    "g8_adventurer_hd64_img32": (
        "adventurer_tiny",
        {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3},
    ),
    "g10_arm_globalpool_img48": ("arm_base", {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 3}),
}


def golden_model(golden, name: str, device: str = "cpu"):
    variant, arguments = GOLDEN[name]
    model = timm.create_model(variant, num_classes=10, **arguments).to(device).eval()
    weights = golden(name, "state_dict.")  # official names: the pre-hook converts, also within a model
    torch.nn.Sequential(model).load_state_dict({f"0.{key}": value for key, value in weights.items()})
    return model


def in_sequence(model, tokens):
    """Class tokens first -> the order of the sequence."""
    length = tokens.shape[1]
    order = model.prefix_first(torch.arange(length)[None, :, None])[0, :, 0]
    return tokens[:, order.argsort()]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_model(name, golden, relative_error, mixer_backend):
    device, limit = mixer_backend
    t, model = golden(name, device=device), golden_model(golden, name, device)
    x = t["input"].requires_grad_()
    features, blocks = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
    logits = model.forward_head(features)
    assert (logits - t["logits_f64"]).abs().max() < 2e-5 * limit
    assert (model.forward_head(features, pre_logits=True) - t["pooled_f64"]).abs().max() < 2e-5 * limit
    assert (in_sequence(model, features) - t["features_f64"]).abs().max() < 5e-5 * limit
    assert (model._embed(x) - t["tokens_in"]).abs().max() < 5e-5 * limit
    streams = [in_sequence(model, torch.cat((prefix, patches), 1)) for patches, prefix in blocks]
    # The official residual after block i holds the mixer outputs of the blocks before it.
    residuals = [t[key] for i in range(1, len(blocks)) if (key := f"block{i}.residual") in t]
    outputs = [t[key] for i in range(len(blocks)) if (key := f"block{i}.output") in t]
    assert len(residuals) + len(outputs) >= len(blocks) - 1
    for got, want in zip(streams, residuals or outputs, strict=False):
        assert (got - want).abs().max() < 5e-5 * limit

    (logits * t["loss_weight"]).sum().backward()
    want = golden(name, "grad.")
    assert relative_error(x.grad, want.pop("input")) < 1e-4 * limit
    want = model.to_native(want)
    parameters = dict(model.named_parameters())
    for key, gradient in want.items():  # large fixtures hold some of them
        assert relative_error(parameters[key].grad, gradient) < 1e-4 * limit, key  # exactly 0 must be 0 here


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_model_in_bf16_autocast(name, golden, mixer_backend):
    device, _ = mixer_backend
    t, model = golden(name, device=device), golden_model(golden, name, device)
    with torch.autocast(device, torch.bfloat16):
        features = model.forward_features(t["input"])
        logits = model.forward_head(features)
    assert features.dtype == torch.float32, "the residual stream stays in fp32"
    assert (logits - t["logits"]).norm() / t["logits"].norm() < 4e-2


def layout(family: str) -> dict[str, dict]:
    """For each official variant of a family: shapes of its tensors by name, image size and number of parameters."""
    variants = json.loads((FIXTURES / f"{family}_state_dict_layout.json").read_text())["variants"]
    out = {}
    for name, entry in variants.items():
        block = entry["each_block (prefix layers.<i>.)"]
        shapes = entry["top_level"] | {
            f"layers.{i}.{key}": shape for i in range(entry["num_blocks"]) for key, shape in block.items()
        }
        out[name] = {"shapes": shapes, "img_size": entry["img_size"], "num_params": entry["num_params"]}
        assert len(shapes) == entry["num_tensors"]
    return out


FAMILIES = ("mambar", "videomamba", "adventurer", "arm")
LAYOUTS = {(family, name): entry for family in FAMILIES for name, entry in layout(family).items()}


@pytest.mark.parametrize(("family", "name"), LAYOUTS)
def test_variants_have_the_official_tensors(family, name):
    """Names, shapes and numbers of parameters; every tensor of the official layout has its place."""
    entry = LAYOUTS[family, name]
    variant = re.sub(r"_patch16|_pz16|_224|@\d+", "", name)
    model = timm.create_model(variant, img_size=entry["img_size"], device="meta")
    official = {key: torch.empty(shape, device="meta") for key, shape in entry["shapes"].items()}
    native = model.to_native(official)
    assert {key: p.shape for key, p in native.items()} == {key: p.shape for key, p in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == entry["num_params"]
    model.load_state_dict(official)
