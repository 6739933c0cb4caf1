"""The short causal convolution in front of a scan: a depthwise Conv1d, followed by silu.

Kernels read the weights of a plain Conv1d. Another module is called, on a sequence padded by d_conv - 1 steps in front.
"""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim_kernels import bidirectional_causal_conv1d, causal_conv1d
from vim_kernels.packing import segments_of

from .cache import before_update
from .plain import is_plain

# FX keeps these calls as leaves; inside, they branch on shapes.
torch.fx.wrap("bidirectional_causal_conv1d")
torch.fx.wrap("causal_conv1d")


def convolve(
    conv: nn.Module, d_conv: int, x: Tensor, *, conv_state: Tensor | None = None, seq_idx: Tensor | None = None
) -> Tensor:
    """Convolve (B, L, E) -> the same shape, in the forward direction.

    conv, d_conv: a depthwise Conv1d without padding, or a module in its place, and its number of taps.
    conv_state: (B, d_conv - 1, E), the steps in front of x; updated in place to the last steps.
    seq_idx: (B, L), for several sequences packed into a row: the sequence of each step.
    """
    if not is_plain_conv(conv):
        return _call(conv, d_conv, x, conv_state, seq_idx)
    u = causal_conv1d(
        x,
        conv.weight.squeeze(1),
        conv.bias,
        activation="silu",
        initial_state=None if conv_state is None else before_update(conv_state),
        return_final_state=conv_state is not None,
        seq_idx=seq_idx,
    )
    if conv_state is not None:
        u, final_state = u
        conv_state.copy_(final_state.detach())
    return u


def convolve_both(
    convolutions: tuple[nn.Module, nn.Module], d_conv: int, x: Tensor, *, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve (B, L, E) -> the same shape twice: forward by the first convolution, backward by the second."""
    forward, reverse = convolutions
    # The kernel for both directions takes two biases or none.
    if is_plain_conv(forward) and is_plain_conv(reverse) and (forward.bias is None) == (reverse.bias is None):
        return bidirectional_causal_conv1d(
            x,
            [forward.weight.squeeze(1), reverse.weight.squeeze(1)],
            [bias for bias in (forward.bias, reverse.bias) if bias is not None] or None,
            activation="silu",
            seq_idx=seq_idx,
        )
    flipped = None if seq_idx is None else seq_idx.flip(1)
    y = convolve(reverse, d_conv, x.flip(1), seq_idx=flipped).flip(1)
    return convolve(forward, d_conv, x, seq_idx=seq_idx), y


def is_plain_conv(conv: nn.Module) -> TypeGuard[nn.Conv1d]:
    """Whether a kernel may read the weights of a convolution without padding instead of calling it."""
    # A FLOP counter must see the kernel: torch 2.10 to 2.14 count the weight gradient of a depthwise Conv1d as that of
    # a dense one.
    return is_plain(conv, tracked=True) and (conv.stride, conv.padding, conv.dilation) == ((1,), (0,), (1,))


def _call(conv: nn.Module, d_conv: int, x: Tensor, conv_state: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """`convolve` for a module that must be called."""
    past = d_conv - 1
    whole = F.pad(x, (0, 0, past, 0)) if conv_state is None else torch.cat((conv_state.to(x.dtype), x), 1)
    segments = segments_of(seq_idx)
    if segments is None:
        y, last = conv(whole.mT).mT, whole[:, x.shape[1] :]
    else:  # one window per step, without other sequences; conv_state belongs to the first sequence
        segments = torch.cat((segments[:, :1].expand(-1, past), segments), 1)
        same = segments.unfold(1, d_conv, 1) == segments[:, past:, None]  # (B, L, d_conv)
        windows = whole.unfold(1, d_conv, 1).masked_fill(~same.unsqueeze(2), 0)  # (B, L, E, d_conv)
        y = conv(windows.flatten(0, 1)).view(x.shape)
        last = whole[:, x.shape[1] :].masked_fill((segments[:, x.shape[1] :] != segments[:, -1:]).unsqueeze(-1), 0)
    if conv_state is not None:
        conv_state.copy_(last.detach())
    return F.silu(y).contiguous()
