"""The convolution of each channel with a kernel that may be as long as the sequence."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .checks import check, check_tensors
from .precision import own_precision
from .reference import state_dtype

Method = Literal["fft", "matrix"]


def long_conv(u: Tensor, kernel: Tensor, *, ahead: int = 0, method: Method = "fft") -> Tensor:
    """Convolve each channel with a kernel of its own: y[k] = sum_m kernel[m] u[k + ahead - m], u being zero outside.

    Args:
        u: (batch, length, *others, channels), any float dtype. What stands between is convolved alike.
        kernel: (channels, lags), for lags from -ahead to less than the length.
        ahead: lags below zero, which look at what comes after; less than both the length and the lags.
        method: "fft" computes in fp32, or fp64 if u or the kernel is. "matrix" multiplies in u's dtype by a Toeplitz
            matrix for each channel, and sums in fp32 at least: length^2 numbers, for short sequences.

    Returns: y like u. On a GPU the backward keeps little more than u and the kernel, and has no second derivatives.

    Raises: ValueError, TypeError: a wrong shape, device, dtype, number of lags or method.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    check_tensors({"u": u, "kernel": kernel}, like="u")
    check(u.dim() >= 3, "u", u, "be (batch, length, ..., channels)")
    check(kernel.dim() == 2 and len(kernel) == u.shape[-1], "kernel", kernel, f"be ({u.shape[-1]} channels, lags)")
    if u.numel() == 0:
        return u.clone()
    length, lags = u.shape[1], kernel.shape[1]
    check(0 <= ahead < length, "ahead", u, f"be from 0 to {length - 1} for a length of {length}", got=ahead)
    check(ahead < lags <= ahead + length, "kernel", kernel, f"have {ahead + 1} to {ahead + length} lags", got=lags)
    with own_precision(u.device.type):  # half precision has no FFT
        if backends.takes_triton(u.device):
            from . import triton_long_conv  # imports triton, which not every platform has

            return triton_long_conv.long_conv(u, kernel, ahead, method)
        return (_by_matrix if method == "matrix" else _by_fft)(u, kernel, ahead)


def _by_matrix(u: Tensor, kernel: Tensor, ahead: int) -> Tensor:
    """By ATen operators, for every device."""
    length = u.shape[1]
    # (channels, length, length), lag i - j at row i and column j. Rounded late, so that gradients are summed in fp32.
    matrix = hankel(kernel, ahead, length).to(u.dtype).flip(-1)
    return torch.einsum("hij, bj...h -> bi...h", matrix, u)


def hankel(kernel: Tensor, ahead: int, length: int, width: int | None = None) -> Tensor:
    """(channels, width, width), a view, with kernel[i + j - (length - 1) + ahead] at row i and column j, 0 where it has
    none: a Toeplitz matrix whose columns are in reverse."""
    width = length if width is None else width
    before = length - 1 - ahead
    return F.pad(kernel, (before, 2 * width - 1 - before - kernel.shape[1])).unfold(-1, width, 1)


def _by_fft(u: Tensor, kernel: Tensor, ahead: int) -> Tensor:
    """By ATen operators, for every device."""
    length, wide = u.shape[1], state_dtype(u, kernel)
    points = fft_points(length)
    rows = u.movedim(1, -1).to(wide)
    y = torch.fft.irfft(torch.fft.rfft(rows, points) * torch.fft.rfft(kernel.to(wide), points), points)
    return y.narrow(-1, ahead, length).movedim(-1, 1).to(u.dtype).contiguous()


def fft_points(length: int) -> int:
    """Of an FFT in which what wraps around falls beside the `length` steps that are kept, 2 * length - 1 at least: the
    smallest multiple of 16 with no prime factor above 5. Other sizes take longer, by several times where the factor is
    large; of 16, so that all rows are aligned alike."""
    blocks = -(-(2 * length - 1) // 16)
    while True:
        rest = blocks
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest = rest // prime  # not in place: in torch.jit.trace sizes are tensors
        if rest == 1:
            return 16 * blocks
        blocks += 1
