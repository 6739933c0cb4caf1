"""The convolution of each channel with a kernel that may be as long as the sequence: public function and dispatch."""

from typing import Literal, get_args

from torch import Tensor

from . import backends, flops, torch_long_conv
from .checks import check, check_tensors
from .precision import own_precision

Method = Literal["fft", "matrix"]


def long_conv(u: Tensor, kernel: Tensor, *, ahead: int = 0, method: Method = "fft", backend: str = "auto") -> Tensor:
    """Convolve each channel with its own kernel: y[k] = sum_m kernel[m] u[k + ahead - m], with u zero outside.

    Args:
        u: (batch, length, *others, channels), any float dtype. The dimensions `others` act like a batch.
        kernel: (channels, lags), for lags from -ahead to less than the length.
        ahead: number of negative lags, which look at later steps; less than both the length and the lags.
        method: "fft" computes in fp32, or fp64 if u or the kernel is. "matrix" multiplies by a Toeplitz matrix for each
            channel, in u's dtype, and sums in fp32 at least: length^2 numbers, for short sequences.
        backend: "auto", "triton" or "torch". A named backend runs or raises.

    Returns: y like u. On a GPU the backward keeps little more than u and the kernel, and has no second derivatives.

    Raises: ValueError, TypeError: a wrong shape, device, dtype, number of lags, method or backend name. RuntimeError: a
        named backend that cannot run here.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    check_tensors({"u": u, "kernel": kernel}, like="u")
    check(u.dim() >= 3, "u", u, "be (batch, length, ..., channels)")
    check(kernel.dim() == 2 and len(kernel) == u.shape[-1], "kernel", kernel, f"be ({u.shape[-1]} channels, lags)")
    chosen = backends.kernels_or_torch("long_conv", backend, u.device)
    if u.numel() == 0:
        return u.clone()
    length, lags = u.shape[1], kernel.shape[1]
    check(0 <= ahead < length, "ahead", u, f"be from 0 to {length - 1} for a length of {length}", got=ahead)
    check(ahead < lags <= ahead + length, "kernel", kernel, f"have {ahead + 1} to {ahead + length} lags", got=lags)

    def run(u: Tensor, kernel: Tensor) -> Tensor:
        with own_precision(u.device.type):  # there is no FFT in half precision
            if chosen == "triton":
                # This imports triton, which not every platform has.
                from .triton_kernels import long_conv as triton_long_conv

                return triton_long_conv.long_conv(u, kernel, ahead, method)
            return torch_long_conv.long_conv(u, kernel, ahead, method)

    if flops.counting():
        points = torch_long_conv.fft_points(length) if method == "fft" else None
        return flops.as_one("long_conv", flops.long_conv(u.shape, points), run, u, kernel)
    return run(u, kernel)
