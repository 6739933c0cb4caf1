"""S4: a linear state-space layer with diagonal plus low-rank matrices."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .discretize import discretize_dense
from .hippo import Measure, nplr
from .linear_system import LinearSystem
from .lti_mixer import SequenceLTIMixer
from .precision import at_least_fp32
from .state_kernel import StateKernel

# Elements of a tensor H x N / 2 x frequencies. Larger ones are computed in chunks, with gradient checkpointing.
MAX_ELEMENTS = 2**24


class DPLRKernel(StateKernel):
    """Convolution kernels of systems A = diag(w) - P P^H by the bilinear rule, each with its own step size.

    A kernel of L steps comes from its generating function at the L-th roots of unity, where that is cheap. For this the
    parameter C holds C (I - dA^L). A longer sequence changes C in place; a shorter one takes the first steps of the
    kernel.

    Args:
        d_model: kernels H. d_state: N; one half is kept, the other is its conjugate.
        measure, l_max: see S4. directions: 1, or 2 with one C each.
    """

    l_kernel: Tensor

    def __init__(
        self,
        d_model: int,
        d_state: int,
        measure: Measure = "legs",
        directions: int = 1,
        l_max: int | None = None,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(d_model, d_state, directions, dt_min, dt_max, **dd)
        self.measure, self.l_max = measure, l_max
        rank = nplr(measure, d_state).P.shape[0]
        self.P = nn.Parameter(torch.empty(rank, *self.B.shape, **dd))
        self.register_buffer("l_kernel", torch.zeros((), dtype=torch.int64, device=device))
        self.length = 0  # equals l_kernel, which a CUDA graph cannot read
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "length", int(module.l_kernel)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        w, P, B = nplr(self.measure, 2 * self.A_log.shape[1])
        self._start(w, B)
        self.P.copy_(torch.view_as_real(P).unsqueeze(1).expand_as(self.P))
        self._set_length(0)
        if self.l_max is not None:
            self.lengthen(self.l_max)

    def forward(self, length: int, rate: float = 1.0) -> Tensor:
        """(directions, H, L)."""
        self.lengthen(math.ceil(length * rate))
        size = round(self.length / rate)  # the same time span in steps of another length
        wide = at_least_fp32(self.log_dt)
        turn = torch.arange(size // 2 + 1, device=wide.device, dtype=wide.dtype) * (-2 * math.pi / size)
        chunk = max(1, MAX_ELEMENTS // self.A_log.numel())
        if len(turn) <= chunk:
            spectrum = self._generating_function(turn, rate)
        else:
            parts = (checkpoint(self._generating_function, p, rate, use_reentrant=False) for p in turn.split(chunk))
            spectrum = torch.cat(list(parts), -1)
        return torch.fft.irfft(spectrum, n=size)[..., :length]

    def _generating_function(self, turn: Tensor, rate: float) -> Tensor:
        """sum_k kernel[k] z^k at z = exp(i turn), L-th roots of unity (F,), as (directions, H, F).

        With d = (1 - z) - (1 + z) delta / 2 w and s = (1 + z) delta / 2,
            delta C (diag(d) + s P P^H)^-1 B = delta (C d^-1 B - s C d^-1 P (1 + s P^H d^-1 P)^-1 P^H d^-1 B).
        Unlike the form with (1 - z) / (1 + z), this is finite at z = -1.
        """
        delta = rate * at_least_fp32(self.log_dt).exp()[:, None, None]
        w = torch.complex(-at_least_fp32(self.A_log).exp(), at_least_fp32(self.A_imag)).unsqueeze(-1)  # (H, N / 2, 1)
        P, B, C = (torch.view_as_complex(at_least_fp32(value)) for value in (self.P, self.B, self.C))
        # 1 - z and 1 + z from half the angle: near z = 1 and -1 the differences themselves would lose all digits.
        sine, cosine = (turn / 2).sin(), (turn / 2).cos()
        one = 2 * torch.complex(sine.square(), -sine * cosine)  # (F,)
        s = torch.complex(cosine.square(), sine * cosine) * delta  # (H, 1, F)
        inverse = 1 / ((one - s * w) * (one - s * w.conj()))  # (H, N / 2, F)
        # Sums over n of left_n right_n / d_n, plus the conjugate of each. With v = left_n right_n and the common
        # denominator, each pair has the numerator 2 Re(v) (1 - z) - 2 Re(v conj(w)) s, so the products are real.
        left, right = torch.cat((C, P.conj())), torch.cat((B.unsqueeze(0), P))
        v = (left.unsqueeze(1) * right).flatten(0, 1)  # ((directions + rank) x (1 + rank), H, N / 2)
        v = 2 * torch.cat((v.real, (v * w.squeeze(-1).conj()).real)).transpose(0, 1)
        sums = torch.complex(v @ inverse.real, v @ inverse.imag)
        plain, turned = rearrange(sums, "h (part l r) f -> part l r h f", part=2, l=len(left))
        sums, s = one * plain - s.squeeze(1) * turned, s.squeeze(1)  # (directions + rank, 1 + rank, H, F)
        through, back = sums[: len(C), 1:], sums[len(C) :, 0]
        middle = s * sums[len(C) :, 1:] + torch.eye(len(P), device=s.device)[:, :, None, None]
        if len(P) == 1:
            back = back / middle[0]
        else:
            back = torch.linalg.solve(rearrange(middle, "r q h f -> h f r q"), rearrange(back, "r h f -> h f r 1"))
            back = rearrange(back, "h f r 1 -> r h f")
        return delta.squeeze(-1) * (sums[: len(C), 0] - s * (through * back).sum(1))

    def system(self, rate: float = 1.0) -> LinearSystem:
        """The systems with all N states and a full dA."""
        dA, dB, C = self._dense(rate)
        C = self._cut(dA if rate == 1 else self._dense(1.0)[0], C, self.length, 0)
        kept = at_least_fp32(self.log_dt).dtype.to_complex()
        return LinearSystem(dA.to(kept), dB.to(kept), C[0].to(kept))

    @torch.no_grad()
    def lengthen(self, length: int) -> None:
        """Convert C for kernels of `length` steps, unless it is for longer ones already."""
        if length > self.length:
            dA, _, C = self._dense(1.0)
            C = self._cut(dA, C, self.length, length)
            self.C.copy_(torch.view_as_real(C[..., : self.C.shape[2]]))
            self._set_length(length)

    def _set_length(self, length: int) -> None:
        self.length = length
        self.l_kernel.fill_(length)

    @staticmethod
    def _cut(dA: Tensor, C: Tensor, old: int, new: int) -> Tensor:
        """From C (I - dA^old) to C (I - dA^new); 0 stands for C itself."""
        identity = torch.eye(dA.shape[-1], dtype=dA.dtype, device=dA.device)
        if old:
            C = torch.linalg.solve(identity - torch.linalg.matrix_power(dA, old), C.unsqueeze(-2), left=False).squeeze(
                -2
            )
        if new:
            C = C - (C.unsqueeze(-2) @ torch.linalg.matrix_power(dA, new)).squeeze(-2)
        return C

    def _dense(self, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """dA (H, N, N), dB (H, N) and the kept C (directions, H, N), for all N states, in double precision."""
        w = torch.complex(-self.A_log.double().exp(), self.A_imag.double())
        w, P, B, C = (
            torch.cat((half, half.conj()), -1)
            for half in (w, *(torch.view_as_complex(value.double()) for value in (self.P, self.B, self.C)))
        )
        A = torch.diag_embed(w) - torch.einsum("rhn, rhm -> hnm", P, P.conj())
        dA, dB = discretize_dense(A, B, rate * self.log_dt.double().exp(), "bilinear")
        return dA, dB, C


class S4(SequenceLTIMixer):
    """Mix a sequence by linear systems that start as HiPPO's; see SequenceLTIMixer.

    Args:
        d_model: channels. d_state: states N per channel, even.
        measure: "legs", "legt" or "fout", see `hippo.hippo`.
        l_max: length of the longest sequence; None lets the first forward pass set it. Setting it changes C in place,
            as does a longer sequence. Give it if weights are averaged or shared from the start.
        bidirectional: add a kernel for the steps that follow.
        dropout: before the output projection. dt_min, dt_max: initial step sizes are log-uniform between them.

    Raises: ValueError for an odd d_state or another measure.
    Source: Gu et al. 2022, arXiv 2111.00396, Algorithm 1. State dicts of state-spaces/s4's s4.py load.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        measure: Measure = "legs",
        l_max: int | None = None,
        bidirectional: bool = False,
        dropout: float = 0.0,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        kernel = DPLRKernel(d_model, d_state, measure, 1 + bidirectional, l_max, dt_min=dt_min, dt_max=dt_max, **dd)
        super().__init__(d_model, kernel, dropout, **dd)
