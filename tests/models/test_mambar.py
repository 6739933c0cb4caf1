"""Mamba-R: where registers stand, and how they reach the head."""

import pytest
import timm
import torch
from torch.testing import assert_close

from vim.models.mambar import MambaR
from vim.models.token_layout import TokenLayout

TINY = {"img_size": (24, 16), "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 16, "depth": 2}


@pytest.mark.parametrize(
    ("patches", "registers", "places"),
    [
        (196, 12, list(range(15, 192, 16))),  # 224 px; 16 patches follow the last register
        (196, 16, list(range(11, 192, 12))),
        (24, 1, [12]),
        (24, 4, [4, 9, 14, 19]),
        (3, 5, [0, 1, 2, 3, 4]),  # fewer patches than gaps: all registers first
    ],
)
def test_the_patches_that_do_not_divide_follow_the_last_register(patches, registers, places):
    layout = TokenLayout("registers", num_registers=registers)
    assert list(layout.places(patches)) == places
    sequence = layout.insert(torch.arange(patches).view(1, -1, 1), -1 - torch.arange(registers).view(1, -1, 1))
    assert sequence[0, places, 0].tolist() == [-1 - i for i in range(registers)]
    assert layout.prefix_first(sequence)[0, :, 0].tolist() == [*(-1 - i for i in range(registers)), *range(patches)]


def test_registers_move_with_the_size_of_the_image():
    """Their table does not change, and equals one set by hand; the patches' is resampled."""
    torch.manual_seed(0)
    model = MambaR(**TINY, num_registers=4, register_dim=6).eval()
    wide = MambaR(**TINY | {"img_size": (24, 28)}, num_registers=4, register_dim=6).eval()
    weights = model.state_dict()
    model.set_input_size((24, 28))
    wide.load_state_dict(weights | {name: model.state_dict()[name] for name in ("pos_embed", "pos_embed_grid")})
    assert model.pos_embed.shape == (1, 42, 16)
    assert torch.equal(model.pos_embed_cls, weights["pos_embed_cls"])
    x = torch.randn(2, 1, 24, 28)
    assert_close(model(x), wide(x))
    tokens = model._embed(x)[0, [8, 17, 26, 35]]
    assert_close(tokens, (model.cls_token + model.pos_embed_cls)[0])


def test_registers_through_a_neck():
    """Each is projected, all of them are joined register by register, one norm covers them."""
    model = MambaR(**TINY, num_registers=4, register_dim=6)
    x = torch.randn(2, 1, 24, 16)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, 24) == (2, model.head_hidden_size)
    each = features[:, :4] @ model.neck.weight.T
    assert_close(pooled, torch.nn.functional.rms_norm(each.flatten(1), (24,), model.norm_neck.weight, 1e-5))
    model.reset_classifier(5, "avg")
    assert (model.head.in_features, model(x).shape) == (16, (2, 5))
    assert not any("neck" in name for name in model.state_dict())
    model.double().reset_classifier(5, "token")
    assert (model.head.in_features, model(x.double()).shape) == (24, (2, 5))
    assert model.neck.weight.std().item() == pytest.approx(0.02, rel=0.3)
    plain = MambaR(**TINY, num_registers=4)
    features = plain.forward_features(x)
    assert_close(plain.forward_head(features, pre_logits=True), features[:, :4].flatten(1))


@pytest.mark.parametrize("option", ["num_registers", "register_dim"])
def test_bad_options(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        MambaR(**TINY, **{option: 0})


def test_the_old_name_says_what_it_is_now():
    with pytest.warns(UserWarning, match="deprecated model name vim_small_registers to current mambar_small"):
        model = timm.create_model("vim_small_registers", device="meta")
    assert isinstance(model, MambaR)
    assert model.cls_token.shape == (1, 12, 384)
    assert model.neck.weight.shape == (192, 384)


def test_weights_with_evenly_spread_registers_are_refused():
    """vim_small_registers once had one table for registers and patches, and other places."""
    model = MambaR(**TINY, num_registers=4)
    weights = model.state_dict()
    weights["pos_embed"] = torch.cat((weights.pop("pos_embed_cls"), weights["pos_embed"]), 1)
    with pytest.raises(ValueError, match="no pos_embed_cls: they are not of Mamba-R, or of vim_small_registers"):
        model.load_state_dict(weights)
