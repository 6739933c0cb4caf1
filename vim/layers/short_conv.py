"""The short causal convolution in front of a scan, with the weights of a depthwise Conv1d, followed by silu."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vim_kernels import bidirectional_causal_conv1d, causal_conv1d

# FX keeps these calls as leaves; inside, they branch on shapes.
torch.fx.wrap("bidirectional_causal_conv1d")
torch.fx.wrap("causal_conv1d")


def convolve(conv: nn.Conv1d, x: Tensor, *, conv_state: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
    """(B, L, E) -> the same shape, in the forward direction.

    conv_state: (B, d_conv - 1, E), the steps in front of x; updated in place to the last steps of x.
    seq_idx: (B, L), which of several sequences packed into a row a step belongs to.
    """
    u = causal_conv1d(
        x,
        conv.weight.squeeze(1),
        conv.bias,
        activation="silu",
        initial_state=conv_state,
        return_final_state=conv_state is not None,
        seq_idx=seq_idx,
    )
    if conv_state is not None:
        u, final_state = u
        conv_state.copy_(final_state.detach())
    return u


def convolve_both(
    convolutions: Sequence[nn.Conv1d], x: Tensor, *, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(B, L, E) -> the same shape twice, by the first in the forward direction and by the second in the other."""
    return bidirectional_causal_conv1d(
        x,
        [conv.weight.squeeze(1) for conv in convolutions],
        [conv.bias for conv in convolutions if conv.bias is not None],
        activation="silu",
        seq_idx=seq_idx,
    )
