"""The parameters of a Mamba block, as `mamba_block_step` takes them, and the shapes of a direction's."""

from typing import NamedTuple

from torch import Tensor


class MambaBlockWeights(NamedTuple):
    """The parameters of x + out_proj(ssm(in_proj(norm(x)))). All have one dtype; A_log and D may be fp32.

    Shapes: D d_model, E d_inner, N d_state, R dt_rank, W taps.
    """

    norm: Tensor  # (D,)
    in_proj: Tensor  # (2 E, D): the rows of x, then those of z
    conv: Tensor  # (E, W)
    conv_bias: Tensor  # (E,)
    x_proj: Tensor  # (R + 2 N, E): the rows of dt, B and C
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor  # (E,)
    A_log: Tensor  # (E, N)
    D: Tensor  # (E,)
    out_proj: Tensor  # (D, E)


def direction_shapes(d_inner: int, d_state: int, dt_rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one direction's parameters, all but the convolution's weight, by name."""
    return {
        "conv_bias": (d_inner,),
        "x_proj": (dt_rank + 2 * d_state, d_inner),
        "dt_proj": (d_inner, dt_rank),
        "dt_bias": (d_inner,),
        "A_log": (d_inner, d_state),
        "D": (d_inner,),
    }
