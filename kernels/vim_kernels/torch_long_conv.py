"""Backend `torch` of `long_conv`: ATen operators only; and the Toeplitz matrix and FFT sizes of both backends."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import state_dtype


def long_conv(u: Tensor, kernel: Tensor, ahead: int, method: str) -> Tensor:
    """See `vim_kernels.long_conv`."""
    return (_by_matrix if method == "matrix" else _by_fft)(u, kernel, ahead)


def hankel(kernel: Tensor, ahead: int, length: int, width: int | None = None) -> Tensor:
    """A Toeplitz matrix with its columns reversed, (channels, width, width), as a view of the padded kernel.

    Row i, column j holds kernel[i + j - (length - 1) + ahead], or 0 outside the kernel.
    """
    width = length if width is None else width
    before = length - 1 - ahead
    return F.pad(kernel, (before, 2 * width - 1 - before - kernel.shape[1])).unfold(-1, width, 1)


def fft_points(length: int) -> int:
    """Size of an FFT whose wrap-around misses the `length` steps that are kept.

    The smallest multiple of 16 from 2 * length - 1 on with no prime factor above 5. Large prime factors make an FFT
    several times slower; multiples of 16 give all rows the same alignment.
    """
    blocks = -(-(2 * length - 1) // 16)
    while True:
        rest = blocks
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest = rest // prime  # not in place: in torch.jit.trace sizes are tensors
        if rest == 1:
            return 16 * blocks
        blocks += 1


def _by_matrix(u: Tensor, kernel: Tensor, ahead: int) -> Tensor:
    length = u.shape[1]
    # (channels, length, length), lag i - j at row i and column j. Rounded late, so that gradients are summed in fp32.
    matrix = hankel(kernel, ahead, length).to(u.dtype).flip(-1)
    return torch.einsum("hij, bj...h -> bi...h", matrix, u)


def _by_fft(u: Tensor, kernel: Tensor, ahead: int) -> Tensor:
    length, wide = u.shape[1], state_dtype(u, kernel)
    points = fft_points(length)
    rows = u.movedim(1, -1).to(wide)
    y = torch.fft.irfft(torch.fft.rfft(rows, points) * torch.fft.rfft(kernel.to(wide), points), points)
    return y.narrow(-1, ahead, length).movedim(-1, 1).to(u.dtype).contiguous()
