"""The mixers of a vision or sequence model, by name."""

import math
from collections.abc import Callable
from typing import Literal

from timm.models import register_notrace_module
from torch import nn

from vim.layers import S4, S4D, S4ND, BiMamba, BiMamba2, GatedConv, Mamba, Mamba2
from vim.layers.checks import check_choice

# Their kernels need the length as a number, which FX does not have.
for _layer in (S4, S4D, S4ND):
    register_notrace_module(_layer)

Mixer = Literal["bimamba", "mamba", "bimamba2", "mamba2", "s4d", "s4", "s4nd", "none"]

# Default values of the options, and the options that some mixers do not have.
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
    """Create a module (batch, tokens, dim) -> the same shape; s4nd takes and returns (batch, height, width, dim).

    Args:
        name: bimamba: Vim's. mamba: causal. bimamba2, mamba2: Mamba-2 in two directions, and causal. s4d, s4:
            time-invariant, in two directions. s4nd: in two directions along each axis of the image. none: convolutions
            without a state space.
        dim: channels. tokens: usual length of the sequence.
        d_state: states per channel, 16 if None; "none" does not have it. d_conv, expand: taps of the convolution and
            d_inner / dim, 4 and 2 if None; only the Mambas and "none" have them.

    Raises: ValueError for another name, or an option that the mixer does not have.
    """
    dd = {"device": device, "dtype": dtype}
    given = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
    for option in LACKS.get(name, ()):
        if given[option] is not None:
            raise ValueError(f"mixer {name!r} has no {option}, got {given[option]}; leave it out")
    d_state, d_conv, expand = (DEFAULTS[option] if value is None else value for option, value in given.items())
    head_dim = math.gcd(expand * dim, 64)  # the authors' 64, or the largest smaller power of two that divides d_inner
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
