"""The layers that a vision or sequence model can mix its tokens with."""

import math
from collections.abc import Callable
from typing import Literal

from timm.models import register_notrace_module
from torch import nn

from vim.layers import S4, S4D, S4ND, BiMamba, BiMamba2, GatedConv, Mamba, Mamba2
from vim.layers.checks import check_choice

# Their kernels are made for a length, which FX has no number for.
for _layer in (S4, S4D, S4ND):
    register_notrace_module(_layer)

Mixer = Literal["bimamba", "mamba", "bimamba2", "mamba2", "s4d", "s4", "s4nd", "none"]

# Options and their values where none are given, and the mixers that have not all of them.
DEFAULTS = {"d_state": 16, "d_conv": 4, "expand": 2}
LACKS = {"s4d": ("d_conv", "expand"), "s4": ("d_conv", "expand"), "s4nd": ("d_conv", "expand"), "none": ("d_state",)}


def create_mixer(
    name: Mixer,
    dim: int,
    tokens: int,
    *,
    d_state: int | None = None,
    d_conv: int | None = None,
    expand: int | None = None,
    device=None,
    dtype=None,
) -> nn.Module:
    """A module (batch, tokens, dim) -> the same shape; S4ND's is (batch, height, width, dim) -> the same shape.

    Args:
        name: bimamba: Vim's. mamba: one direction, each token sees those before it. bimamba2, mamba2: Mamba-2's in two
            directions and in one. s4d, s4: time-invariant, both directions. s4nd: both directions along each axis of
            the image. none: no state space, convolutions alone.
        dim: channels. tokens: in a sequence of the usual length.
        d_state: states of a channel, 16 if None; "none" has no such option. d_conv, expand: taps of the convolution and
            d_inner / dim, 4 and 2 if None; of the Mambas and of "none" alone.

    Raises: ValueError for another name, or an option that the mixer does not have.
    """
    dd = {"device": device, "dtype": dtype}
    given = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
    for option in LACKS.get(name, ()):
        if given[option] is not None:
            raise ValueError(f"mixer {name!r} has no {option}, got {given[option]}; leave it out")
    d_state, d_conv, expand = (DEFAULTS[option] if value is None else value for option, value in given.items())
    head_dim = math.gcd(expand * dim, 64)  # the authors' 64, or the largest power of two below that divides d_inner
    makers: dict[str, Callable[[], nn.Module]] = {
        "bimamba": lambda: BiMamba(dim, d_state, d_conv, expand, **dd),
        "mamba": lambda: Mamba(dim, d_state, d_conv, expand, **dd),
        "bimamba2": lambda: BiMamba2(dim, d_state, d_conv, expand, head_dim, **dd),
        "mamba2": lambda: Mamba2(dim, d_state, d_conv, expand, head_dim, **dd),
        "s4d": lambda: S4D(dim, d_state, bidirectional=True, **dd),
        "s4": lambda: S4(dim, d_state, bidirectional=True, l_max=tokens, **dd),
        "s4nd": lambda: S4ND(dim, d_state, **dd),
        "none": lambda: GatedConv(dim, d_conv, expand, **dd),
    }
    check_choice("mixer", name, makers)
    return makers[name]()
