"""A linear time-invariant system in steps, and three ways to run it that give the same."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
        length = u.shape[1]
        lag = torch.arange(length, device=u.device)
        lag = lag[:, None] - lag
        kernel = self.kernel(length)[:, lag.clamp(min=0)].tril()
        return torch.einsum("hij, bjh -> bih", kernel, u)

    def convolution(self, u: Tensor) -> Tensor:
        """By one FFT, of input (B, L, H)."""
        return fft_convolve(u, [self.kernel(u.shape[1]).unsqueeze(0)])

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


def fft_convolve(u: Tensor, kernels: Sequence[Tensor]) -> Tensor:
    """Convolve along each axis: y[k] = sum_j forward[j] u[k - j] + sum_j backward[j] u[k + 1 + j].

    Args:
        u: (B, *sizes, H).
        kernels: for each axis (1, H, size), forward alone, or (2, H, size).

    Returns: (B, *sizes, H) in u's dtype; half precision is computed in fp32.
    """
    sizes, axes = u.shape[1:-1], tuple(range(1, u.ndim - 1))
    wide = torch.promote_types(u.dtype, torch.float32)
    padded = [fast_length(2 * size) for size in sizes]
    spectrum = torch.fft.rfftn(u.to(wide), padded, axes)
    for axis, kernel in zip(axes, kernels, strict=True):
        room = padded[axis - 1] - sizes[axis - 1]
        lags = F.pad(kernel[0], (0, room))
        if len(kernel) == 2:  # negative lags stand at the end
            lags = lags + F.pad(kernel[1].flip(-1), (room, 0))
        transform = torch.fft.rfft if axis == axes[-1] else torch.fft.fft
        factor = transform(lags.to(wide)).mT  # (frequencies, H)
        spectrum = spectrum * factor.reshape(-1, *[1] * (len(axes) - axis), factor.shape[-1])
    y = torch.fft.irfftn(spectrum, padded, axes)
    for axis in axes:
        y = y.narrow(axis, 0, sizes[axis - 1])
    return y.to(u.dtype)


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
