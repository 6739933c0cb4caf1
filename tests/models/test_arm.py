"""ARM: scans along the columns, files of both training stages, and what holds for every timm model."""

import argparse
from fnmatch import fnmatch

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.layers import DropPath, resample_abs_pos_embed
from timm.models import create_feature_extractor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import vim  # noqa: F401 (registers the models)
from vim.layers import RowColumnMamba
from vim.models.arm import ARM, VARIANTS
from vim.models.checkpoint_filter import checkpoint_filter_fn
from vim.timm_models.config import ModelConfig
from vim.timm_models.create import create_model
from vim_kernels import bidirectional_selective_scan

TINY = {"img_size": (24, 16), "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 16, "depth": 2}
SIDES = {"row_forward_ssm": "column_forward_ssm", "row_backward_ssm": "column_backward_ssm"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_entrypoints_cover_the_table():
    assert set(VARIANTS) == set(timm.list_models(module="arm"))


# Scans


def transposed(model: ARM) -> ARM:
    """The model for images with rows and columns exchanged: the scans along them change places."""
    height, width = model.patch_embed.img_size
    other = ARM(**TINY | {"img_size": (width, height)}).eval()
    exchange = SIDES | {column: row for row, column in SIDES.items()}
    weights = {
        ".".join(exchange.get(part, part) for part in key.split(".")): value
        for key, value in model.state_dict().items()
    }
    table = weights["pos_embed"][:, 1:].unflatten(1, model.patch_embed.grid_size).transpose(1, 2).flatten(1, 2)
    weights["pos_embed"] = torch.cat((weights["pos_embed"][:, :1], table), 1)
    weights["pos_embed_grid"] = weights["pos_embed_grid"].flip(0)
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].mT.contiguous()
    other.load_state_dict(weights)
    return other


@pytest.mark.parametrize("size", [(24, 16), (20, 12), (12, 28)])  # even and odd numbers of patches
def test_columns_are_rows_of_the_transposed_image(size):
    """Patch by patch, and the class token too, which stands in the middle in both orders."""
    model = ARM(**TINY | {"img_size": size}).eval()
    x = torch.randn(2, 1, *size)
    other = transposed(model)
    features, (maps,) = model.forward_intermediates(x, 1)
    turned, (turned_maps,) = other.forward_intermediates(x.mT, 1)
    assert_close(turned_maps.mT, maps, atol=1e-5, rtol=1e-4)
    assert_close(turned[:, 0], features[:, 0], atol=1e-5, rtol=1e-4)
    assert_close(other(x.mT), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("direction", [*SIDES, *SIDES.values()])
def test_each_scan_sees_the_tokens_before_it(direction):
    """With the other three closed, a patch depends on those that its scan has passed, and on itself."""
    model = ARM(**TINY | {"depth": 1}).eval()
    mixer = model.blocks[0].mixer
    for name in (*SIDES, *SIDES.values()):
        if name != direction:  # no input reaches its state or its output
            ssm = getattr(mixer, name)
            for p in (ssm.conv1d.weight, ssm.conv1d.bias, ssm.D):
                torch.nn.init.zeros_(p)
    tokens = torch.randn(1, 25, 16, requires_grad=True)
    y = model.blocks[0](tokens, layout=model._layout(torch.zeros(1, 1, 24, 16)))
    at = 2 * 4 + 1  # the third row, the second column; the class token is at 12
    (gradient,) = torch.autograd.grad(y[0, at].square().sum(), tokens)
    seen = model.prefix_first(gradient.abs().sum(2, keepdim=True))[0, 1:, 0].view(6, 4) > 0
    row, column = torch.arange(6)[:, None].expand(6, 4), torch.arange(4).expand(6, 4)
    place, own = (row * 4 + column, 2 * 4 + 1) if direction.startswith("row") else (column * 6 + row, 1 * 6 + 2)
    assert torch.equal(seen, place <= own if "forward" in direction else place >= own)


@torch.no_grad()
def test_scan_inputs_are_those_of_the_rows():
    """Without what the columns put out, they give the output of the mixer."""
    mixer = RowColumnMamba(16)
    for ssm in (mixer.column_forward_ssm, mixer.column_backward_ssm):
        for p in (ssm.conv1d.weight, ssm.conv1d.bias):
            torch.nn.init.zeros_(p)
    x, order = torch.randn(2, 9, 16), torch.randperm(9)
    y = bidirectional_selective_scan(**mixer.scan_inputs(x))
    assert y.abs().max() > 0.01
    assert_close(mixer.out_proj(y), mixer(x, (order, order.argsort())))


def test_every_patch_counts_the_same_on_odd_grids():
    model = ARM(**TINY | {"img_size": 20}).eval()
    x = torch.randn(2, 1, 20, 20)
    features = model.forward_features(x)
    assert_close(model.forward_head(features, pre_logits=True), features[:, 1:].mean(1))


# Files


def training_state(**weights: dict[str, torch.Tensor]) -> dict:
    """As the authors' training writes it, with `model` and after the pretraining `model_ema`."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))]).state_dict()
    rest = {"optimizer": optimizer, "epoch": 99, "scaler": {"scale": 65536.0}, "max_accuracy": 83.0}
    return weights | rest | {"args": argparse.Namespace(model="arm_base_pz16"), "ema_max_accuracy": 83.2}


@pytest.mark.parametrize("by", ["file", "checkpoint_path", "tool", "filter"])
def test_a_released_file_gives_its_average(by, tmp_path, golden, caplog):
    """The model equals one with the golden weights, which stand in model_ema here."""
    options = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_classes": 10}
    t, weights = golden("g10_arm_globalpool_img48"), golden("g10_arm_globalpool_img48", "state_dict.")
    state = training_state(model={k: v + 1 for k, v in weights.items()}, model_ema=weights)
    path = tmp_path / "checkpoint.pth"
    torch.save(state, path)
    if by == "file":
        cfg = {"file": str(path), "num_classes": 10}
        model = timm.create_model("arm_base", pretrained=True, pretrained_cfg_overlay=cfg, **options)
    elif by == "checkpoint_path":
        model = timm.create_model("arm_base", checkpoint_path=str(path), **options)
    elif by == "tool":
        kwargs = {key: value for key, value in options.items() if key != "num_classes"}
        model = create_model(ModelConfig("arm_base", checkpoint=str(path), kwargs=kwargs), num_classes=10)
    else:
        model = timm.create_model("arm_base", **options)
        model.load_state_dict(checkpoint_filter_fn(state, model))
    assert not caplog.text
    assert (model.eval()(t["input"]) - t["logits_f64"]).abs().max() < 2e-5


def test_without_a_file_pretrained_is_refused():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for"):
        timm.create_model("arm_base", pretrained=True, embed_dim=16, depth=1)
    assert "huggingface.co/OliverRen/ARM" in str(timm.get_pretrained_cfg("arm_base").notes)


def pretraining_file(dim: int, grid: int, depth: int) -> dict[str, torch.Tensor]:
    """The tensors of the authors' pretraining model: one direction, a table of patches, a decoder."""
    hidden, rank = dim * 4 * 2 // 3, -(-dim // 16)
    shapes = {
        "pos_embed": (1, grid**2, dim),
        "patch_embed.proj.weight": (dim, 1, 4, 4),
        "patch_embed.proj.bias": (dim,),
        "ar_token": (1, 1, 8),
        "dec_pos_embed": (1, grid**2, 8),
        "enc2dec.weight": (32, 4 * dim),
        "dec_block.0.attn2.q.weight": (8, 8),
        "dec_block.0.mlp.fc1.bias": (32,),
        "norm_1.weight": (dim,),
        "norm_4.bias": (dim,),
        "ar_norm.weight": (8,),
        "ar_pred.bias": (48,),
        "mask": (128, 128),
    }
    block = {
        "mixer.A_log": (dim, 16),
        "mixer.D": (dim,),
        "mixer.in_proj.weight": (2 * dim, dim),
        "mixer.conv1d.weight": (dim, 1, 4),
        "mixer.conv1d.bias": (dim,),
        "mixer.x_proj.weight": (rank + 32, dim),
        "mixer.dt_proj.weight": (dim, rank),
        "mixer.dt_proj.bias": (dim,),
        "mixer.out_proj.weight": (dim, dim),
        "mlp.w1.weight": (hidden, dim),
        "mlp.w1.bias": (hidden,),
        "mlp.w2.weight": (hidden, dim),
        "mlp.w2.bias": (hidden,),
        "mlp.w3.weight": (dim, hidden),
        "mlp.w3.bias": (dim,),
        "norm1.weight": (dim,),
        "norm1.bias": (dim,),
        "norm2.weight": (dim,),
        "norm2.bias": (dim,),
    }
    shapes |= {f"layers.{i}.{key}": shape for i in range(depth) for key, shape in block.items()}
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def test_a_pretraining_file_starts_all_directions_alike(tmp_path):
    """Its table is resampled, with a class entry of 0; class token and last norm stay, and the head is new."""
    path, pretrained = tmp_path / "checkpoint-1599.pth", pretraining_file(16, 3, 2)
    torch.save(training_state(model=pretrained), path)
    kwargs = {key: value for key, value in TINY.items() if key != "num_classes"} | {"img_size": 16}
    torch.manual_seed(1)
    model = create_model(ModelConfig("arm_base", checkpoint=str(path), kwargs=kwargs), num_classes=3)
    torch.manual_seed(1)
    fresh = create_model(ModelConfig("arm_base", kwargs=kwargs), num_classes=3)
    got, before = model.state_dict(), fresh.state_dict()
    for i in range(2):
        for direction in (*SIDES, *SIDES.values()):
            for name, value in getattr(model.blocks[i].mixer, direction).state_dict().items():
                assert torch.equal(value, pretrained[f"layers.{i}.mixer.{name}"])
        assert torch.equal(got[f"blocks.{i}.mixer.in_proj.weight"], pretrained[f"layers.{i}.mixer.in_proj.weight"])
        assert torch.equal(got[f"blocks.{i}.mlp.fc2.bias"], pretrained[f"layers.{i}.mlp.w3.bias"])
        assert torch.equal(got[f"blocks.{i}.norm2.bias"], pretrained[f"layers.{i}.norm2.bias"])
    assert not got["pos_embed"][:, 0].any()
    table = resample_abs_pos_embed(pretrained["pos_embed"], [4, 4], [3, 3], num_prefix_tokens=0)
    assert_close(got["pos_embed"][:, 1:], table)
    for name in ("cls_token", "norm.weight", "norm.bias"):
        assert torch.equal(got[name], before[name])
    by_hand = ARM(**TINY | {"img_size": 12})
    assert by_hand.load_state_dict(pretrained, strict=False).missing_keys == ["head.weight", "head.bias"]
    assert by_hand(torch.randn(1, 1, 12, 12)).isfinite().all()


# Evaluation and training


@pytest.mark.parametrize(
    ("name", "size", "resized"), [("arm_base", 224, 256), ("arm_huge.oliverren_in1k_384", 384, 384)]
)
def test_evaluation_squashes_the_image_to_a_square(name, size, resized):
    cfg = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    resize, *_ = create_transform(**cfg).transforms
    assert (cfg["input_size"], tuple(resize.size)) == ((3, size, size), (resized, resized))
    model = timm.create_model(name, embed_dim=16, depth=1)
    assert model.patch_embed.img_size == (size, size)


def test_stochastic_depth_begins_at_the_third_block():
    model = ARM(**TINY | {"depth": 5}, drop_path_rate=0.4)
    rates = [b.drop_path.drop_prob if isinstance(b.drop_path, DropPath) else 0.0 for b in model.blocks]
    assert rates == pytest.approx([0, 0, 0.1, 0.2, 0.3])


def test_weight_decay_is_for_matrices_and_filters():
    model = ARM(**TINY)
    spared = model.no_weight_decay()
    decayed = {
        name.split(".")[-2]
        for name, p in model.named_parameters()
        if p.dim() > 1 and not any(fnmatch(name, pattern) for pattern in spared)
    }
    mlp, ssm = {"fc1_g", "fc1_x", "fc2"}, {"conv1d", "x_proj", "dt_proj"}
    assert decayed == {"proj", "in_proj", "out_proj", "head"} | mlp | ssm


class Scans(TorchDispatchMode):
    """Counts the scans that run."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.vim_kernels.selective_scan.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_parameter_has_a_gradient_with_and_without_checkpointing(precision):
    """The same gradients, from as many scans: two pairs per block. Mixer and MLP take the low precision."""
    model = ARM(**TINY, drop_path_rate=0.2, drop_rate=0.1).train()
    x, target = torch.randn(4, 1, 24, 16), torch.tensor([0, 1, 2, 0])
    taken = set()
    for block in model.blocks:
        for part in (block.mixer, block.mlp):
            part.register_forward_pre_hook(lambda module, inputs: taken.add(inputs[0].dtype))
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        with Scans() as scans, torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            features = model.forward_features(x)
            loss = torch.nn.functional.cross_entropy(model.forward_head(features), target)
            assert features.dtype == torch.float32
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        assert scans.count == 2 * 2
    assert taken == {precision}
    for (name, _), a, b in zip(model.named_parameters(), *gradients, strict=True):
        assert a.isfinite().all(), name
        assert a.any(), name
        assert torch.equal(a, b), name


def test_without_memory_at_first():
    """Created on the meta device, then allocated and initialised: the same as a model created directly."""
    with torch.device("meta"):
        model = ARM(**TINY)
    model.to_empty(device="cpu")
    model.init_weights()
    other = ARM(**TINY)
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 1, 24, 16)
    assert_close(other(x), model(x), atol=0, rtol=0)
    for name in (*SIDES, *SIDES.values()):
        dt = torch.nn.functional.softplus(getattr(model.blocks[1].mixer, name).dt_proj.bias)
        assert 0.0009 < dt.min() < dt.max() < 0.11
    assert timm.create_model("arm_base", **TINY, device="meta")(x.to("meta")).shape == (1, 3)


# Other forms of the model


def test_other_sizes_give_what_set_input_size_gives():
    model = ARM(**TINY).eval()
    sized = ARM(**TINY, dynamic_img_size=True).eval()
    sized.load_state_dict(model.state_dict())
    model.set_input_size((32, 20))
    x = torch.randn(2, 1, 32, 20)
    for got, want in zip(sized.forward_intermediates(x), model.forward_intermediates(x), strict=True):
        assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_features_for_a_detector_and_by_fx():
    x = torch.randn(1, 1, 24, 16)
    maps = timm.create_model("arm_base", features_only=True, out_indices=(0, 1), **TINY)(x)
    assert [tuple(m.shape) for m in maps] == [(1, 16, 6, 4)] * 2
    model = timm.create_model("arm_base", **TINY).eval()
    last = create_feature_extractor(model, ["blocks.1"])(x)["blocks.1"]
    assert_close(model.forward_head(model.prefix_first(model.norm(last))), model(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:FutureWarning")
def test_traces():
    """FLOP counters use torch.jit.trace."""
    model, x = ARM(**TINY).eval(), torch.randn(2, 1, 24, 16)
    assert_close(torch.jit.trace(model, torch.randn(2, 1, 24, 16))(x), model(x))
