"""The sections data and augment refuse values that mean nothing, and take the ends of each range."""

import pytest

from vim.data import AugmentConfig, DataConfig

PROBABILITY = [-0.1, 1.1], [0.0, 1.0]
BELOW_ONE = [-0.1, 1.0], [0.0, 0.99]
NOT_NEGATIVE = [-0.1], [0.0, 100.0]
RANGE = [(0.0, 1.0), (0.5, 0.4)], [(0.4, 0.4), (0.1, 1.0)]


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("batch_size", [0], [1]),
        ("num_workers", [-1], [0]),
        ("cache_gib", [0.0, -1.0], [1e-9, None]),
        ("img_size", [0], [1, None]),
        ("crop_pct", [0.0, 1.01], [0.01, 1.0, None]),
        ("std", [(0.0,), (0.2, -0.1, 0.2)], [(1e-3,), None]),
        ("window", [0], [1]),
        ("progressive", [[(0, 1)], [(16, 1), (20, 0)]], [[(1, 1)], []]),
    ],
)
def test_data(name, wrong, right):
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^data\.{name}\b.* got "):
            DataConfig("x", **{name: value})
    for value in right:
        assert getattr(DataConfig("x", **{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        *((name, *PROBABILITY) for name in ("hflip", "vflip", "erasing", "mix_prob", "mix_switch_prob")),
        *((name, *BELOW_ONE) for name in ("affine_translate", "affine_scale", "smoothing")),
        *((name, *NOT_NEGATIVE) for name in ("affine_degrees", "affine_shear", "color_jitter", "mixup", "cutmix")),
        ("scale", *RANGE),
        ("ratio", *RANGE),
        ("repeats", [0], [1]),
    ],
)
def test_augment(name, wrong, right):
    others = {"mixup": 0.1} if name.startswith("mix_") else {}
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^augment\.{name}\b.* got "):
            AugmentConfig(**others, **{name: value})
    for value in right:
        assert getattr(AugmentConfig(**others, **{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "enough"),
    [
        ("erasing_mode", "const", ("erasing",)),
        ("mix_prob", 0.5, ("mixup", "cutmix")),
        ("mix_switch_prob", 0.2, ("mixup", "cutmix")),
    ],
)
def test_what_would_have_no_effect_is_refused(name, value, enough):
    with pytest.raises(ValueError, match=rf"^augment\.{name} has no effect without augment\.{enough[0]}"):
        AugmentConfig(**{name: value})
    for other in enough:
        AugmentConfig(**{name: value, other: 0.5})
