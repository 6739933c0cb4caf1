"""What every family has from its base class: sizes, intermediates, heads, training, compilation, saving.

A new family is a line of FAMILIES.
"""

import copy
import pickle
from fnmatch import fnmatch
from typing import NamedTuple

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from timm.models import create_feature_extractor, load_checkpoint
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.testing import assert_close

import vim  # noqa: F401  (registers the models)
from vim.models.vision_mamba import checkpoint_filter_fn

# 6 x 4 patches.
TINY = {"img_size": (24, 16), "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 16, "depth": 2}


class Family(NamedTuple):
    """A model to test. places: of its class tokens in a sequence with 24 patches; matrices: weights of a block."""

    name: str
    options: dict
    places: list[int]
    matrices: tuple[str, ...]


TWO_SCANS = (
    "in_proj",
    "out_proj",
    *(f"{way}_ssm.{name}" for way in ("forward", "backward") for name in ("conv1d", "x_proj", "dt_proj")),
)
BIMAMBA = tuple(f"mixer.{name}.weight" for name in TWO_SCANS)
MAMBA2 = ("mixer.in_proj.weight", "mixer.out_proj.weight", "mixer.ssm.conv1d.weight")
SWIGLU = ("mlp.fc1_g.weight", "mlp.fc1_x.weight", "mlp.fc2.weight")
FOUR_SCANS = tuple(
    f"mixer.{axis}_{way}_ssm.{name}.weight"
    for axis in ("row", "column")
    for way in ("forward", "backward")
    for name in ("conv1d", "x_proj", "dt_proj")
)
FAMILIES = {
    "vim": Family("vim_nano", {}, [12], BIMAMBA),
    "mambar": Family("mambar_small", {"num_registers": 4, "register_dim": 6}, [4, 9, 14, 19], BIMAMBA),
    "videomamba": Family("videomamba_tiny", {}, [0], BIMAMBA),
    "adventurer": Family(
        "adventurer_tiny", {"d_state": 6, "head_dim": 8, "flipped_blocks": (0,)}, [24], (*MAMBA2, *SWIGLU)
    ),
    "arm": Family("arm_base", {}, [12], ("mixer.in_proj.weight", "mixer.out_proj.weight", *FOUR_SCANS, *SWIGLU)),
}
PLACES = FAMILIES | {
    "vim, both ends": Family("vim_nano", {"class_token": "both"}, [0, 25], BIMAMBA),
    "vim, no class token": Family("vim_nano", {"class_token": "none", "global_pool": "avg"}, [], BIMAMBA),
}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
each_place = pytest.mark.parametrize("family", PLACES.values(), ids=PLACES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(family: Family, **options):
    """A model with random offsets on all parameters: a bias of 0 would hide errors."""
    model = timm.create_model(family.name, **TINY | family.options | options)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def like(family: Family, model, **options):
    """A model with the same weights."""
    other = timm.create_model(family.name, **TINY | family.options | options)
    other.load_state_dict(model.state_dict())
    return other.eval()


def images(*size: int) -> Tensor:
    return torch.randn(*size)


# Tokens


@each_place
def test_without_its_blocks_a_model_has_normalised_patches_and_class_tokens(family):
    """Patches row by row; the class entries of the tables first, or in a table of their own."""
    model, x = tiny(family).eval(), images(2, 1, 24, 16)
    model.blocks = nn.Sequential()
    tokens, count = model.forward_features(x), len(family.places)
    table, own = model.pos_embed, getattr(model, "pos_embed_cls", None)
    patches = F.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=4)
    want = patches.flatten(2).mT + table[:, -24:]
    if count:
        entries = table[:, :count] if own is None else own
        want = torch.cat(((model.cls_token + entries).expand(2, -1, -1), want), 1)
    if family.name == "arm_base":
        want = F.layer_norm(want, (16,), model.norm.weight, model.norm.bias, 1e-5)
    else:
        want = F.rms_norm(want, (16,), model.norm.weight, 1e-5)
    assert_close(tokens, want, atol=1e-5, rtol=1e-4)
    sequence = model._embed(x)
    assert_close(model.norm(sequence[:, family.places]), tokens[:, :count], atol=1e-5, rtol=1e-4)


@each_place
def test_pooling_of_patches(family):
    """avg, max and avgmax leave the class tokens out; "" leaves all tokens."""
    model, x = tiny(family).eval(), images(2, 1, 24, 16)
    tokens = model.forward_features(x)
    patches = tokens[:, len(family.places) :]
    assert patches.shape == (2, 24, 16)
    mean, highest = patches.mean(1), patches.amax(1)
    for pool, want in {"avg": mean, "max": highest, "avgmax": (mean + highest) / 2, "": tokens}.items():
        model.reset_classifier(5, pool)
        assert_close(model(x), F.linear(want, model.head.weight, model.head.bias), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"global_pool must be one of .*'avg'.*, got 'mean'"):
        tiny(family, global_pool="mean")


# Sizes


def by_set_input_size(family, model, path):
    model.set_input_size((16, 28))
    return model


def by_dynamic_size(family, model, path):
    return like(family, model, dynamic_img_size=True)


def by_filter(family, model, path):
    other = tiny(family, img_size=(16, 28))
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))
    return other


def by_checkpoint(family, model, path):
    torch.save({"state_dict": model.state_dict()}, path / "weights.pth")
    other = tiny(family, img_size=(16, 28))
    load_checkpoint(other, str(path / "weights.pth"), filter_fn=checkpoint_filter_fn)
    return other


def by_pretrained_cfg(family, model, path):
    torch.save(model.state_dict(), path / "weights.pth")
    overlay = {"file": str(path / "weights.pth"), "num_classes": 3, "input_size": (1, 24, 16)}
    return tiny_pretrained(family, overlay, img_size=(16, 28))


def tiny_pretrained(family, overlay, **options):
    arguments = TINY | family.options | options
    return timm.create_model(family.name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


@each_place
@pytest.mark.parametrize("resize", [by_set_input_size, by_dynamic_size, by_filter, by_checkpoint, by_pretrained_cfg])
def test_another_size_resamples_the_patches_and_keeps_the_class_entries(resize, family, tmp_path):
    """From 6 x 4 to 4 x 7 patches; equals a model of that size with a table resampled by hand."""
    model = tiny(family)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    table = weights["pos_embed"]
    entries, patches = table.split([table.shape[1] - 24, 24], 1)
    grid = patches.unflatten(1, (6, 4)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (4, 7), mode="bicubic", antialias=True, align_corners=False)
    weights |= {
        "pos_embed": torch.cat((entries, grid.flatten(2).mT), 1),
        "pos_embed_grid": torch.tensor([4, 7]),
    }
    want = tiny(family, img_size=(16, 28)).eval()
    want.load_state_dict(weights)
    x = images(1, 1, 16, 28)
    assert_close(resize(family, model, tmp_path).eval()(x), want(x), atol=1e-5, rtol=1e-4)


@each_family
def test_other_patches_channels_and_classes(family, tmp_path):
    """Filters are resampled and their channels added or repeated; another head is new."""
    model = tiny(family, in_chans=3).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 3}
    grey = tiny_pretrained(family, overlay, in_chans=1, num_classes=7, img_size=(24, 24), patch_size=6).eval()
    x = images(2, 1, 24, 24)
    assert grey(x).shape == (2, 7)
    model.set_input_size((24, 24), patch_size=6)
    assert model.patch_embed.grid_size == (4, 4)
    assert [info["reduction"] for info in model.feature_info] == [6, 6]
    got, want = grey.forward_features(x), model.forward_features(x.expand(-1, 3, -1, -1))
    assert_close(got, want, atol=1e-5, rtol=1e-4)


@each_family
@pytest.mark.parametrize("learns", [True, False])
def test_what_is_frozen_stays_frozen_at_another_size(family, learns):
    model = tiny(family)
    model.pos_embed.requires_grad_(learns)
    model.patch_embed.proj.weight.requires_grad_(learns)
    model.set_input_size((24, 24), patch_size=6)
    assert model.patch_embed.proj.weight.shape == (16, 1, 6, 6)
    assert model.pos_embed.requires_grad is learns
    assert model.patch_embed.proj.weight.requires_grad is learns
    assert model.patch_embed.proj.bias.requires_grad


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_keeps_its_dtype_at_another_size(family, dtype):
    """Filters and table are resampled as in fp32, then rounded to the dtype."""
    model, wide = tiny(family).to(dtype), tiny(family)
    wide.load_state_dict(model.state_dict())
    for one in (model, wide):
        one.set_input_size((24, 24), patch_size=6)
    assert {p.dtype for p in model.parameters()} == {dtype}
    for name, value in wide.state_dict().items():
        assert_close(model.state_dict()[name].to(value.dtype), value, atol=1e-6, rtol=2**-8)
    assert model(images(1, 1, 24, 24).to(dtype)).dtype == dtype


# Intermediates


@each_place
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("stop_early", [False, True])
def test_intermediates_are_what_the_blocks_put_out(family, norm, stop_early):
    """Blocks 0 and 2 of 4; every format, and the methods of DINO's tools."""
    model, x = tiny(family, depth=4).eval(), images(2, 1, 24, 16)
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, y: outputs.append(y))
    others = [i for i in range(24 + len(family.places)) if i not in family.places]

    def split(tokens, normed):
        tokens = model.norm(tokens) if normed else tokens
        return tokens[:, others], tokens[:, family.places]

    features, both = model.forward_intermediates(x, [0, 2], True, norm, stop_early, "NLC")
    assert len(outputs) == (3 if stop_early else 4)
    want = [split(outputs[i], norm) for i in (0, 2)]
    assert_close(both, want, atol=0, rtol=0)
    patches, prefix = split(outputs[-1], True)
    assert_close(features, torch.cat((prefix, patches), 1), atol=0, rtol=0)
    maps = model.forward_intermediates(x, [0, 2], norm=norm, intermediates_only=True)
    assert_close(maps, [patches.mT.unflatten(2, (6, 4)) for patches, _ in want], atol=0, rtol=0)
    assert_close(model.get_intermediate_layers(x, [0, 2], False, True, norm), want, atol=0, rtol=0)
    assert_close(model.get_intermediate_layers(x, [0, 2], True, norm=norm), maps, atol=0, rtol=0)
    last = model.forward_intermediates(x, 2, norm=True, intermediates_only=True)[1]
    assert_close(last, split(outputs[-1], True)[0].mT.unflatten(2, (6, 4)), atol=0, rtol=0)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


@each_family
@pytest.mark.parametrize(("prune_norm", "prune_head"), [(False, True), (True, False), (True, True)])
def test_a_pruned_model_keeps_what_its_intermediates_need(family, prune_norm, prune_head):
    model, x = tiny(family, depth=4).eval(), images(2, 1, 24, 16)
    want = model.forward_intermediates(x, [0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2], prune_norm, prune_head) == [0, 2]
    assert len(model.blocks) == 3
    assert_close(model.forward_intermediates(x, [0, 2], intermediates_only=True), want, atol=0, rtol=0)
    assert isinstance(model.norm, nn.Identity) is prune_norm
    assert model(x).shape == ((2, 24 + len(family.places), 16) if prune_head else (2, 3))


@each_family
def test_features_only_for_a_detector(family):
    """The maps of the chosen blocks, unnormalised; by default the last three."""
    arguments = TINY | family.options | {"depth": 4}
    backbone = timm.create_model(family.name, features_only=True, out_indices=(1, 3), **arguments).eval()
    model = timm.create_model(family.name, **arguments).eval()
    x = images(1, 1, 24, 16)
    wanting = model.load_state_dict(backbone.model.state_dict(), strict=False).missing_keys
    assert {name.split(".")[0] for name in wanting} <= {"head", "neck", "norm_neck", "norm"}
    first, last = backbone(x)
    assert_close(last.flatten(2).mT, model.forward_intermediates(x, [3], output_fmt="NLC")[1][0])
    patches = model.forward_features(x)[:, len(family.places) :]
    assert_close(model.norm(last.flatten(2).mT), patches)
    assert first.shape == (1, 16, 6, 4)
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == ([16, 16], [4, 4])
    assert len(timm.create_model(family.name, features_only=True, **arguments)(x)) == 3


@each_family
def test_features_by_fx_and_shapes_on_meta(family):
    """With timm's feature extractor."""
    model, x = tiny(family).eval(), images(1, 1, 24, 16)
    nodes = create_feature_extractor(model, ["blocks.1"])
    assert_close(model.forward_head(model.prefix_first(model.norm(nodes(x)["blocks.1"]))), model(x))
    assert timm.create_model(family.name, **TINY | family.options, device="meta")(x.to("meta")).shape == (1, 3)


# Heads


@each_place
def test_a_new_classifier(family):
    """It keeps the pooling unless another is given, and has the mode and dtype of the model."""
    model = tiny(family).double().eval()
    x = images(2, 1, 24, 16).double()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    assert (model.num_classes, model.head.training) == (7, False)
    assert_close(model(x), F.linear(pooled, model.head.weight, model.head.bias))
    assert (model.num_features, model.head_hidden_size) == (16, pooled.shape[1])
    model.reset_classifier(0)
    assert_close(model(x), pooled)
    model.reset_classifier(0, "avgmax")
    patches = model.forward_features(x)[:, model.num_prefix_tokens :]
    assert_close(model(x), (patches.mean(1) + patches.amax(1)) / 2)
    model.reset_classifier(0, "")
    assert_close(model(x), model.forward_features(x))
    if family.places:
        model.reset_classifier(7, "token")
        assert (model(x).shape, model(x).dtype) == ((2, 7), torch.float64)


@each_place
def test_a_model_without_classes_says_how_wide_its_features_are(family):
    """As timm's models do: num_features is for a head of one's own."""
    model = tiny(family, num_classes=0)
    assert model(images(2, 1, 24, 16)).shape == (2, model.num_features) == (2, model.head_hidden_size)
    assert model.embed_dim == 16


@each_family
def test_dropout_stands_in_front_of_the_head(family):
    model, x = tiny(family, drop_rate=1.0), images(2, 1, 24, 16)
    assert_close(model.train()(x), model.head.bias.expand(2, 3))
    assert not model.forward_head(model.forward_features(x), pre_logits=True).any()
    want = model.eval()(x)
    model.head_drop = nn.Identity()
    assert_close(want, model(x))


# Training


@pytest.mark.parametrize(
    ("family", "rates"),
    [(FAMILIES[name], [0, 0.1, 0.2, 0.3, 0.4]) for name in ("vim", "mambar", "videomamba")]
    + [(FAMILIES[name], [0, 0, 0.1, 0.2, 0.3]) for name in ("adventurer", "arm")],
    ids=["vim", "mambar", "videomamba", "adventurer", "arm"],
)
def test_drop_path_rises_linearly_from_nothing(family, rates):
    """Adventurer's and ARM's are those of the released code: a block late."""
    blocks = tiny(family, depth=5, drop_path_rate=0.4).blocks
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks] == pytest.approx(rates)
    assert tiny(family, depth=1, drop_path_rate=0.4)(images(1, 1, 24, 16)).isfinite().all()


@each_family
def test_stochastic_depth_drops_branches_of_samples(family):
    """The residual stream stays, and so does the mean over all samples."""
    model, x = tiny(family, depth=3, drop_path_rate=1.0), images(1, 24 + len(family.places), 16)
    block, layout = model.blocks[-1], model._layout(images(1, 1, 24, 16))
    block.drop_path.drop_prob = 0.5
    whole, kept = block.eval()(x, layout=layout) - x, block.train()(x.expand(512, -1, -1), layout=layout) - x
    added = kept.flatten(1).any(1)
    branches = 2 if hasattr(block, "mlp") else 1
    assert abs(added.float().mean() - (1 - 0.5**branches)) < 0.1
    if branches == 1:
        assert_close(kept[added].mean(0), 2 * whole[0])


@each_family
def test_learning_rates_by_layer(family):
    """Scales rise from the stem over the blocks to 1 for the head; the last norm has that of the last block."""
    model = tiny(family, depth=3)
    scales = {
        name: group["lr_scale"]
        for group in param_groups_layer_decay(model, 0.05, layer_decay=0.5)
        for name, p in model.named_parameters()
        if any(p is other for other in group["params"])
    }

    def expected(name):
        if name.startswith("blocks."):
            return 0.5 ** (3 - int(name.split(".")[1]))
        return {"norm": 0.5, "head": 1, "neck": 1, "norm_neck": 1}.get(name.split(".")[0], 0.5**4)

    assert scales == {name: expected(name) for name, _ in model.named_parameters()}


@each_family
def test_weight_decay_is_for_matrices(family):
    """Tables, tokens, norms, biases, decay rates and skips have none."""
    model = tiny(family)
    groups = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    decayed = {name for name, p in model.named_parameters() if decay[id(p)] > 0}
    neck = {"neck.weight"} if "register_dim" in family.options else set()
    blocks = {f"blocks.{i}.{name}" for i in range(2) for name in family.matrices}
    assert decayed == {"patch_embed.proj.weight", "head.weight"} | neck | blocks
    spared = model.no_weight_decay()
    for name, _ in model.named_parameters():  # also for optimizers that decay vectors
        if name.split(".")[-1] in ("pos_embed", "pos_embed_cls", "cls_token", "A_log", "D", "dt_bias"):
            assert any(fnmatch(name, pattern) for pattern in spared), name
        assert not any(fnmatch(name, pattern) for pattern in spared) or name not in decayed


@each_family
def test_trains_in_bf16_autocast_with_drop_path_and_gradient_checkpointing(family):
    """Finite gradients for every parameter, the same with and without checkpointing; the residual stream is fp32."""
    model = tiny(family, drop_path_rate=0.2, drop_rate=0.1).train()
    x, target = images(4, 1, 24, 16), torch.tensor([0, 1, 2, 0])
    streams: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda _module, _inputs, y: streams.append(y))
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert [stream.dtype for stream in streams] == [torch.float32] * 2
    for (name, _), a, b in zip(model.named_parameters(), *gradients, strict=True):
        assert a.isfinite().all(), name
        # The state before the first token is 0, whatever its decay.
        assert a.any() or (family.places == [0] and name == "blocks.1.mixer.forward_ssm.A_log"), name
        assert torch.equal(a, b), name


@each_family
def test_compiles_in_one_graph(family):
    """The outputs are the model's; in training with checkpointing also its gradients."""
    model, x = tiny(family, depth=1).eval(), images(2, 1, 24, 16)
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x), atol=1e-5, rtol=1e-4)
    model.train()
    y = model(x)
    want = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert_close(compiled, y, atol=1e-5, rtol=1e-4)
    got = torch.autograd.grad(compiled.square().sum(), list(model.parameters()))
    assert_close(got, want, atol=1e-4, rtol=1e-3)


@each_family
def test_exports_with_a_dynamic_batch(family):
    model = tiny(family, depth=1).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(2, 1, 24, 16),), dynamic_shapes=({0: batch},))
    for size in (1, 5):
        x = images(size, 1, 24, 16)
        assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-4)


# Creation and copies


@each_family
def test_init_weights_after_to_empty(family):
    """The same distributions as in a model that is created directly; step sizes between 0.001 and 0.1."""
    arguments = TINY | family.options | {"embed_dim": 64, "num_classes": 40}
    model = timm.create_model(family.name, **arguments, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    model.init_weights()
    fresh = timm.create_model(family.name, **arguments)
    assert torch.equal(model.pos_embed_grid, torch.tensor([6, 4]))
    for (name, p), q in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert p.isfinite().all(), name
        assert abs(p.std() - q[1].std()) < 0.4 * q[1].std() + 1e-6, name
        if name in ("pos_embed", "pos_embed_cls", "cls_token", "head.weight", "neck.weight"):
            assert 0.014 < p.std() < 0.026, name
        if name.endswith(("dt_proj.bias", "dt_bias")):
            steps = F.softplus(p)
            assert 0.0009 < steps.min() < steps.max() < 0.11, name
        if name.endswith("mixer.out_proj.weight"):  # Kaiming uniform over the inputs, over sqrt(depth)
            bound = (1 / p.shape[1]) ** 0.5 / 2**0.5
            assert bound * 0.95 < p.abs().max() <= bound, name
        if name.startswith("head.bias") or (".mlp." in name and name.endswith(".bias")):
            assert not p.any(), name


@each_family
def test_a_saved_model_loads_from_a_folder(family, tmp_path):
    arguments = TINY | family.options
    model = tiny(family).eval()
    timm.models.save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(1, 1, 24, 16)
    assert torch.equal(again(x), model(x))


@each_family
def test_a_folder_has_the_size_that_the_model_was_set_to(family, tmp_path):
    """For versions of timm that record the size."""
    pytest.importorskip("timm.models._input")
    model = tiny(family).eval()
    model.set_input_size((16, 28), patch_size=2)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    x = images(1, 1, 16, 28)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))


@each_family
def test_copies(family):
    model, x = tiny(family).eval(), images(1, 1, 24, 16)
    want = model(x)
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    model.cls_token.data += 1
    for other in others:
        assert torch.equal(other(x), want)


@each_family
def test_unknown_options_are_refused(family):
    with pytest.raises(TypeError, match="unexpected keyword argument 'drop_path'"):
        tiny(family, drop_path=0.1)
    with pytest.raises(ValueError, match="weight_init must be one of '', 'skip', got 'xavier'"):
        tiny(family, weight_init="xavier")
    with pytest.raises(ValueError, match="mode must be '', got 'jax'"):
        tiny(family).init_weights("jax")


@pytest.mark.parametrize("block", [-1, 2])
def test_flipped_blocks_are_blocks_of_the_model(block):
    with pytest.raises(ValueError, match=rf"flipped_blocks must be from 0 to depth - 1 = 1, got \[{block}\]"):
        tiny(FAMILIES["adventurer"], flipped_blocks=[block])
