"""The matrices that state-space layers start from: HiPPO's, and diagonals that approximate or imitate them.

Memories of the past as coefficients in a basis: x' = A x + B u. All in double precision.

Source: Gu et al. 2020, arXiv 2008.07669 (LegS, LegT); Gu et al. 2022, arXiv 2206.12037 (FouT); Gu et al. 2022,
arXiv 2111.00396, theorem 1 (normal plus low rank); Gu et al. 2022, arXiv 2206.11893, section 4 (diagonals).
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .checks import check_choice, check_even

Measure = Literal["legs", "legt", "fout"]
MEASURES = ("legs", "legt", "fout")
Diagonal = Literal["lin", "inv", "real", "quad", "legs"]
DIAGONALS = ("lin", "inv", "real", "quad", "legs")


def hippo(measure: Measure, d_state: int) -> tuple[Tensor, Tensor]:
    """A (d_state, d_state) and B (d_state,).

    legs: Legendre polynomials over all of the past, stretched as it grows. legt: over a window that slides. fout: a
    Fourier basis over a window.

    Raises: ValueError for another measure, or an odd d_state with fout, which has sines and cosines.
    """
    check_choice("measure", measure, MEASURES)
    n = torch.arange(d_state, dtype=torch.float64)
    if measure == "legs":
        root = (2 * n + 1).sqrt()
        return -(torch.outer(root, root).tril(-1) + torch.diag(n + 1)), root
    if measure == "legt":
        root = (2 * n + 1).sqrt()
        sign = 1 - 2 * ((n[:, None] - n) % 2)
        return -0.5 * torch.outer(root, root) * torch.where(n[:, None] < n, sign, 1.0), 0.5 * root
    check_even(d_state)
    frequency = torch.stack((torch.zeros(d_state // 2), torch.arange(d_state // 2))).T.reshape(-1)[1:].double()
    B = torch.zeros(d_state, dtype=torch.float64)
    B[::2] = math.sqrt(2)
    B[0] = 1
    A = math.pi * (frequency.diag(-1) - frequency.diag(1))
    return A - torch.outer(B, B), B


def low_rank(measure: Measure, d_state: int) -> Tensor:
    """P (rank, d_state), so that A + P^T P of `hippo` is normal. The rank is 1, for legt 2."""
    check_choice("measure", measure, MEASURES)
    n = torch.arange(d_state, dtype=torch.float64)
    if measure == "legs":
        return (n + 0.5).sqrt()[None]
    if measure == "legt":
        root = (n + 0.5).sqrt()
        return torch.stack((root * (n % 2 == 0), root * (n % 2 == 1)))
    return hippo(measure, d_state)[1][None]


class NPLR(NamedTuple):
    """A system in the basis in which its normal part is diagonal: A = diag(w) - sum_r P_r P_r^H, of each conjugate
    pair the half with negative imaginary part."""

    w: Tensor  # (d_state / 2,) complex
    P: Tensor  # (rank, d_state / 2)
    B: Tensor  # (d_state / 2,)


def nplr(measure: Measure, d_state: int) -> NPLR:
    """`hippo` as normal plus low rank, with the imaginary part of B clipped to -2 .. 2, as the authors' code has it:
    the fastest modes start with less input.

    Raises: ValueError for another measure or an odd d_state.
    """
    check_even(d_state)
    A, B = hippo(measure, d_state)
    P = low_rank(measure, d_state)
    normal = A + P.T @ P
    real = normal.diagonal().mean()  # it is a multiple of the identity and something skew
    imaginary, V = torch.linalg.eigh(-1j * (normal - real * torch.eye(d_state, dtype=A.dtype)))
    imaginary, V = imaginary[: d_state // 2], V[:, : d_state // 2]  # eigh sorts
    if measure == "fout":  # which has zero twice: eigh's vectors are no conjugate pair
        V[:, -1] = 0
        V[0, -1], V[1, -1] = 2**-0.5, 2**-0.5 * 1j
    # Eigenvectors have any phase; the clipping means the one in which their first entry is real, if it is not zero.
    V = V * torch.where(V[0].abs() < 1e-9, 1.0, V[0].sgn().conj())
    B = V.mH @ B.to(V)
    return NPLR(real + 1j * imaginary, P.to(V) @ V.conj(), torch.complex(B.real, B.imag.clamp(-2, 2)))


def diagonal(name: Diagonal, d_state: int) -> tuple[Tensor, Tensor]:
    """A and B (d_state / 2,), complex, for S4D: of each conjugate pair the half with negative imaginary part.

    lin: frequencies n pi. quad: as the squares. inv: as LegS's, in closed form. real: none, decays of 1, 2, ... legs:
    of `nplr`, whose low rank is left out.

    Raises: ValueError for another name or an odd d_state.
    """
    check_choice("init", name, DIAGONALS)
    check_even(d_state)
    if name == "legs":
        system = nplr("legs", d_state)
        return system.w, system.B
    n = torch.arange(d_state // 2, dtype=torch.float64)
    zero, half = torch.zeros_like(n), torch.full_like(n, 0.5)
    real, imaginary = {
        "lin": (half, math.pi * n),
        "inv": (half, d_state / math.pi * (d_state / (2 * n + 1) - 1)),
        "real": (n + 1, zero),
        "quad": (half, (1 + 2 * n) ** 2 / math.pi),
    }[name]
    return torch.complex(-real, -imaginary), torch.ones_like(n, dtype=torch.complex128)
