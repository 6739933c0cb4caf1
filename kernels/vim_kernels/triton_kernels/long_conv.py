# mypy: disable-error-code="assignment"
"""Backend `triton` of `long_conv`: cuFFT or cuBLAS between two kernels that change the layout.

Sequences are channel-last, but FFTs and matrix products want the steps contiguous. ATen would transpose, widen, pad and
crop in separate passes, each at a fraction of the memory's speed. Here one pass goes in and one comes out.

The gradients are convolutions too: of dy with the reversed kernel, and of dy with the reversed u.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import check_no_tangents
from ..precision import own_precision, state_dtype
from ..rows import on_device_of
from ..torch_long_conv import fft_points, hankel


@triton.jit(do_not_specialize=["first", "steps", "width", "tiles", "x_batch", "out_batch"])
def _transpose(
    x,  # element (b, k, c) at b * x_batch + k * x_step + c * x_channel
    out,  # element (b, i, c) likewise; every element is written
    first,  # out[i] = x[first + sign i], 0 outside x
    steps,  # of x
    width,  # of out
    channels,
    tiles,  # of i
    x_batch,
    x_step,
    x_channel,
    out_batch,
    out_step,
    out_channel,
    SIGN: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles * STEPS + tl.arange(0, STEPS))[:, None]
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    k, inside = first + SIGN * i, (i < width) & (c < channels)
    at = x + b * x_batch + k.to(tl.int64) * x_step + c.to(tl.int64) * x_channel
    value = tl.load(at, inside & (k >= 0) & (k < steps), 0.0)
    at = out + b * out_batch + i.to(tl.int64) * out_step + c.to(tl.int64) * out_channel
    tl.store(at, value, inside)


def _copy(x: Tensor, out: Tensor, first: int = 0, sign: int = 1) -> None:
    """out[:, i] = x[:, first + sign * i], both as (batch, steps, channels)."""
    (batch, steps, channels), width = x.shape, out.shape[1]
    STEPS = min(64, triton.next_power_of_2(width))
    tiles, CHANNELS = triton.cdiv(width, STEPS), 4096 // STEPS
    with on_device_of(x):
        _transpose[(batch * tiles, triton.cdiv(channels, CHANNELS))](
            x, out, first, steps, width, channels, tiles, *x.stride(), *out.stride(),
            SIGN=sign, STEPS=STEPS, CHANNELS=CHANNELS,
        )  # fmt: skip


def _rows(x: Tensor, channels: int, width: int, dtype: torch.dtype, *, turned: bool = False) -> Tensor:
    """(batch, steps, ..., channels) -> (batch * ..., channels, width), padded with zeros. `turned`: steps reversed."""
    x = x.flatten(2)
    rows = x.new_empty(len(x), x.shape[2], width, dtype=dtype)
    _copy(x, rows.mT, x.shape[1] - 1 if turned else 0, -1 if turned else 1)
    return rows.view(-1, channels, width)


def _sequence(rows: Tensor, like: Tensor, first: int = 0, *, turned: bool = False) -> Tensor:
    """The inverse of `_rows`, in the layout of `like`: its steps from column `first` on or, if `turned`, reversed."""
    out = like.new_empty(like.shape)
    rows = rows.view(len(like), -1, rows.shape[2]).mT
    _copy(rows, out.flatten(2), like.shape[1] - 1 if turned else first, -1 if turned else 1)
    return out


class _ByFFT(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, kernel, ahead):
        ctx.save_for_backward(u, kernel)
        ctx.ahead = ahead
        points, wide = fft_points(u.shape[1]), state_dtype(u, kernel)
        spectrum = torch.fft.rfft(_rows(u, len(kernel), points, wide))
        return _sequence(_inverse(spectrum * _scaled(kernel.to(wide), points), points), u, ahead)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        check_no_tangents()
        u, kernel = ctx.saved_tensors
        (length, lags), wide = (u.shape[1], kernel.shape[1]), state_dtype(u, kernel)
        points, du, d_kernel = fft_points(length), None, None
        spectrum = torch.fft.rfft(_rows(dy, len(kernel), points, wide))
        if ctx.needs_input_grad[1]:
            turned = torch.fft.rfft(_rows(u, len(kernel), points, wide, turned=True))
            d_kernel = torch.fft.irfft(turned.mul_(spectrum).sum(0), points)
            d_kernel = d_kernel.narrow(1, length - 1 - ctx.ahead, lags).to(kernel.dtype)
            del turned
        if ctx.needs_input_grad[0]:
            spectrum *= _scaled(kernel.to(wide).flip(1), points)
            du = _sequence(_inverse(spectrum, points), u, lags - 1 - ctx.ahead)
        return du, d_kernel, None


def _scaled(kernel: Tensor, points: int) -> Tensor:
    """The spectrum divided by the number of points; otherwise `_inverse` would divide all sequences in a pass."""
    return torch.fft.rfft(kernel, points, norm="forward")


def _inverse(spectrum: Tensor, points: int) -> Tensor:
    return torch.fft.irfft(spectrum, points, norm="forward")


class _ByMatrix(torch.autograd.Function):
    """Reverses u, so that the matrix is a view of the kernel."""

    @staticmethod
    def forward(ctx, u, kernel, ahead):
        ctx.save_for_backward(u, kernel)
        ctx.ahead = ahead
        rows = _rows(u, len(kernel), _width(u), u.dtype, turned=True)
        return _sequence(_product(rows, _matrix(u, kernel, ahead).mT), u)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        check_no_tangents()
        u, kernel = ctx.saved_tensors
        width, du, d_kernel = _width(u), None, None
        d_rows = _rows(dy, len(kernel), width, u.dtype)
        if ctx.needs_input_grad[0]:
            du = _sequence(_product(d_rows, _matrix(u, kernel, ctx.ahead)), u, turned=True)
        if ctx.needs_input_grad[1]:
            rows = _rows(u, len(kernel), width, u.dtype, turned=True)
            with own_precision(u.device.type):  # `vim_kernels.long_conv` does so for the forward
                d_matrix = torch.bmm(d_rows.permute(1, 2, 0), rows.transpose(0, 1))
            d_matrix = d_matrix.to(state_dtype(u, kernel))
            lags = 2 * width - 1
            d_kernel = torch.ops.aten.unfold_backward(d_matrix, [len(kernel), lags], 1, width, 1)
            d_kernel = d_kernel.narrow(1, u.shape[1] - 1 - ctx.ahead, kernel.shape[1]).to(kernel.dtype)
        return du, d_kernel, None


def _width(u: Tensor) -> int:
    """Width of rows and matrix: cuBLAS takes its fast paths for multiples of 8."""
    return triton.cdiv(u.shape[1], 8) * 8


def _matrix(u: Tensor, kernel: Tensor, ahead: int) -> Tensor:
    """In u's dtype. Entries beyond the length only multiply zeros."""
    return hankel(kernel, ahead, u.shape[1], _width(u)).to(u.dtype)


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """(n, channels, width) times (channels, width, width)."""
    out = torch.empty_like(rows)
    torch.bmm(rows.transpose(0, 1), matrix, out=out.transpose(0, 1))
    return out


def long_conv(u: Tensor, kernel: Tensor, ahead: int, method: str) -> Tensor:
    """See `vim_kernels.long_conv`."""
    return (_ByMatrix if method == "matrix" else _ByFFT).apply(u, kernel, ahead)
