"""A discrete linear time-invariant system, and three equivalent ways to run it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vim_kernels import long_conv
from vim_kernels.long_conv import Method

MATRIX = 256  # up to this length a matrix product is faster than an FFT


class LinearSystem(NamedTuple):
    """x[k] = dA x[k-1] + dB u[k],  y[k] = Re <C, x[k]>, separately for each of H channels.

    A real system of conjugate pairs is kept as one half of each pair, with C doubled.

    dA: (H, N), the diagonal, or (H, N, N). dB, C: (H, N). Real or complex. In shapes: B batch, L length.

    Source: Gu et al. 2022, arXiv 2111.00396, section 2.
    """

    dA: Tensor
    dB: Tensor
    C: Tensor

    def initial_state(self, batch_size: int) -> Tensor:
        """The state before the first step: (B, H, N) zeros."""
        return self.dB.new_zeros(batch_size, *self.dB.shape)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step of input (B, H). Returns: output (B, H) and the new state (B, H, N)."""
        diagonal = self.dA.ndim == self.dB.ndim
        moved = self.dA * state if diagonal else (self.dA @ state.unsqueeze(-1)).squeeze(-1)
        state = moved + self.dB * u.unsqueeze(-1)
        return (self.C * state).sum(-1).real.to(u.dtype), state

    def recurrent(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run input (B, L, H) step by step from a state (B, H, N). Returns: outputs (B, L, H) and the last state."""
        state = self.initial_state(u.shape[0]) if state is None else state
        outputs = []
        for one in u.unbind(1):
            y, state = self.step(one, state)
            outputs.append(y)
        return torch.stack(outputs, 1) if outputs else torch.zeros_like(u), state

    def unrolled(self, u: Tensor) -> Tensor:
        """Sum over the past: input (B, L, H) times a triangular matrix (L, L) of the kernel."""
        return convolve(u, [self.kernel(u.shape[1]).unsqueeze(0)], "matrix")

    def convolution(self, u: Tensor) -> Tensor:
        """Convolve input (B, L, H) with the kernel by FFT."""
        return convolve(u, [self.kernel(u.shape[1]).unsqueeze(0)], "fft")

    def kernel(self, length: int) -> Tensor:
        """The response to an impulse at step 0: Re C dA^k dB for k = 0 .. L - 1, (H, L)."""
        if self.dA.ndim == self.dB.ndim:
            return vandermonde(self.dA.to(self.dA.dtype.to_complex()).log(), self.C * self.dB, length)
        powers, known, states = self.dA, 1, self.dB.unsqueeze(-1)
        while known < length:  # dA^k dB: each round doubles their number
            states, powers, known = torch.cat((states, powers @ states), -1), powers @ powers, 2 * known
        return torch.einsum("hn, hnl -> hl", self.C, states[..., :length]).real


def vandermonde(log_dA: Tensor, weight: Tensor, length: int) -> Tensor:
    """Re sum_n weight_n exp(k log_dA_n) for k = 0 .. L - 1.

    With k = row * columns + column, one product of two matrices with about sqrt(L) columns each gives all powers. It
    takes as many multiplications as computing them one by one, without a tensor of H x N x L.

    Args:
        log_dA: (..., N), with real parts of 0 or less. weight: (..., N).

    Returns: (..., L), real.
    """
    if isinstance(length, Tensor):  # sizes are tensors under torch.jit.trace
        length = int(length)
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


def convolve(u: Tensor, kernels: Sequence[Tensor], method: Method | None = None) -> Tensor:
    """Convolve along each axis: y[k] = sum_j forward[j] u[k - j] + sum_j backward[j] u[k + 1 + j].

    Args:
        u: (B, *sizes, H).
        kernels: for each axis (1, H, size) for the forward direction only, or (2, H, size).
        method: see `long_conv`; None takes the faster one for each axis.

    Returns: (B, *sizes, H) in u's dtype.
    """
    for axis, kernel in enumerate(kernels, 1):
        size, lags, ahead = u.shape[axis], kernel[0], 0
        if len(kernel) == 2:
            lags, ahead = torch.cat((kernel[1, :, : size - 1].flip(-1), lags), -1), size - 1
        # The other axes share the cost of building the matrix. The batch does not count, so that the output for an
        # image does not depend on the size of the batch.
        short = size <= MATRIX and (u.is_cuda or size <= math.prod(u.shape[1:-1]) // size)
        way: Method = method or ("matrix" if short else "fft")
        u = long_conv(u.flatten(0, axis - 1), lags, ahead=ahead, method=way).reshape(u.shape)
    return u
