"""A linear time-invariant system in steps, and three ways to run it that give the same."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_fp32

MATRIX = 256  # longest axis that is convolved by a matrix


class LinearSystem(NamedTuple):
    """x[k] = dA x[k-1] + dB u[k],  y[k] = Re <C, x[k]>, for each of H channels by itself.

    A real system of conjugate pairs is kept as one half of them, with C doubled.

    dA: (H, N), the diagonal, or (H, N, N). dB, C: (H, N). Real or complex. In shapes, B is the batch, L the length.

    Source: Gu et al. 2022, arXiv 2111.00396, section 2.
    """

    dA: Tensor
    dB: Tensor
    C: Tensor

    def initial_state(self, batch_size: int) -> Tensor:
        """Nothing seen yet: (B, H, N) zeros."""
        return self.dB.new_zeros(batch_size, *self.dB.shape)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step of input (B, H). Returns: output (B, H) and the new state (B, H, N)."""
        diagonal = self.dA.ndim == self.dB.ndim
        moved = self.dA * state if diagonal else (self.dA @ state.unsqueeze(-1)).squeeze(-1)
        state = moved + self.dB * u.unsqueeze(-1)
        return (self.C * state).sum(-1).real.to(u.dtype), state

    def recurrent(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Step by step, of input (B, L, H) from a state (B, H, N). Returns: outputs (B, L, H) and the last state."""
        state = self.initial_state(u.shape[0]) if state is None else state
        outputs = []
        for one in u.unbind(1):
            y, state = self.step(one, state)
            outputs.append(y)
        return torch.stack(outputs, 1) if outputs else torch.zeros_like(u), state

    def unrolled(self, u: Tensor) -> Tensor:
        """As a sum over the past, written out: input (B, L, H) times a triangular matrix (L, L) of the kernel."""
        return convolve_by_matrix(u, self.kernel(u.shape[1]).unsqueeze(0), 1)

    def convolution(self, u: Tensor) -> Tensor:
        """By FFT, of input (B, L, H)."""
        return convolve_by_fft(u, self.kernel(u.shape[1]).unsqueeze(0), 1)

    def kernel(self, length: int) -> Tensor:
        """What an impulse at step 0 puts out: Re C dA^k dB for k = 0 .. L - 1, as (H, L)."""
        if self.dA.ndim == self.dB.ndim:
            return vandermonde(self.dA.to(self.dA.dtype.to_complex()).log(), self.C * self.dB, length)
        powers, known, states = self.dA, 1, self.dB.unsqueeze(-1)
        while known < length:  # dA^k dB: twice as many at each turn
            states, powers, known = torch.cat((states, powers @ states), -1), powers @ powers, 2 * known
        return torch.einsum("hn, hnl -> hl", self.C, states[..., :length]).real


def vandermonde(log_dA: Tensor, weight: Tensor, length: int) -> Tensor:
    """Re sum_n weight_n exp(k log_dA_n) for k = 0 .. L - 1.

    k is written as row * columns + column, so that a product of two matrices of some sqrt(L) columns each makes all
    powers: as many multiplications as one by one, without a tensor of H x N x L.

    Args:
        log_dA: (..., N), real parts not above 0. weight: (..., N).

    Returns: (..., L), real.
    """
    columns = max(1, round(length**0.5))
    rows = -(-length // columns)
    place = torch.arange(columns, device=log_dA.device)
    fine = (log_dA.unsqueeze(-1) * place).exp()  # (..., N, columns)
    place = torch.arange(rows, device=log_dA.device) * columns
    coarse = weight.unsqueeze(-1) * (log_dA.unsqueeze(-1) * place).exp()  # (..., N, rows)
    # Re(a b) as one real product over 2 N.
    coarse = torch.cat((coarse.real, -coarse.imag), -2)
    fine = torch.cat((fine.real, fine.imag), -2)
    return (coarse.mT @ fine).flatten(-2)[..., :length]


def convolve(u: Tensor, kernels: Sequence[Tensor]) -> Tensor:
    """Convolve along each axis: y[k] = sum_j forward[j] u[k - j] + sum_j backward[j] u[k + 1 + j].

    A short axis is a product of matrices on a GPU, and elsewhere if there is as much across it; any other goes by FFT.

    Args:
        u: (B, *sizes, H).
        kernels: for each axis (1, H, size), forward alone, or (2, H, size).

    Returns: (B, *sizes, H) in u's dtype; half precision is multiplied in it and summed in fp32.
    """
    for axis, kernel in enumerate(kernels, 1):
        # A matrix has size^2 numbers for each channel, to make and to multiply by, but makes them once for all columns.
        # The batch does not count: an image's output does not depend on how many there are.
        size, columns = u.shape[axis], math.prod(u.shape[1:-1]) // u.shape[axis]
        by_matrix = size <= MATRIX and (u.is_cuda or size <= columns)
        u = (convolve_by_matrix if by_matrix else convolve_by_fft)(u, kernel, axis)
    return u


def convolve_by_matrix(u: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """`convolve` along one axis, by a Toeplitz matrix for each channel."""
    size = u.shape[axis]
    # (H, size, size): lag i - j at row i and column j.
    matrix = _by_lag(kernel).unfold(-1, size, 1).to(u.dtype).flip(-1)
    rows = u.reshape(math.prod(u.shape[:axis]), size, -1, u.shape[-1])
    return torch.einsum("hij, bjrh -> birh", matrix, rows).reshape(u.shape)


def convolve_by_fft(u: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """`convolve` along one axis, in fp32 at least."""
    size, wide = u.shape[axis], at_least_fp32(u)
    padded = fast_length(2 * size)
    factor = torch.fft.rfft(_by_lag(kernel).to(wide.dtype), padded).mT  # (frequencies, H)
    factor = factor.reshape(-1, *[1] * (u.ndim - 2 - axis), factor.shape[-1])
    y = torch.fft.irfft(torch.fft.rfft(wide, padded, axis) * factor, padded, axis)
    return y.narrow(axis, size - 1, size).to(u.dtype)  # what wraps around falls in front


def _by_lag(kernel: Tensor) -> Tensor:
    """(1 or 2, H, size) as in `convolve` -> (H, 2 size - 1), for lags from -(size - 1) to size - 1."""
    size = kernel.shape[-1]
    lags = F.pad(kernel[0], (size - 1, 0))
    return lags + F.pad(kernel[1, :, : size - 1].flip(-1), (0, size)) if len(kernel) == 2 else lags


def fast_length(length: int) -> int:
    """The smallest even number not below `length` with no prime factor above 5: other sizes of an FFT take longer, by
    several times where the factor is large."""
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1 and length % 2 == 0:
            return length
        length += 1
