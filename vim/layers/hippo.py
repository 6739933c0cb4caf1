"""Initial matrices of state-space layers: HiPPO's, and diagonal ones that approximate or imitate them.

x' = A x + B u keeps the past as coefficients in a basis. Everything is in double precision.

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

    legs: Legendre polynomials over the whole past, stretched as it grows. legt: over a sliding window. fout: a Fourier
    basis over a sliding window.

    Raises: ValueError for another measure, or for an odd d_state with fout, which pairs sines and cosines.
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
    """P (rank, d_state) such that A + P^T P is normal, with A from `hippo`. The rank is 1, and 2 for legt."""
    check_choice("measure", measure, MEASURES)
    n = torch.arange(d_state, dtype=torch.float64)
    if measure == "legs":
        return (n + 0.5).sqrt()[None]
    if measure == "legt":
        root = (n + 0.5).sqrt()
        return torch.stack((root * (n % 2 == 0), root * (n % 2 == 1)))
    return hippo(measure, d_state)[1][None]


class NPLR(NamedTuple):
    """A system in the basis that diagonalises its normal part: A = diag(w) - sum_r P_r P_r^H.

    Of each conjugate pair it holds the half with negative imaginary part.
    """

    w: Tensor  # (d_state / 2,) complex
    P: Tensor  # (rank, d_state / 2)
    B: Tensor  # (d_state / 2,)


def nplr(measure: Measure, d_state: int) -> NPLR:
    """`hippo` as normal plus low rank.

    The imaginary part of B is clipped to -2 .. 2, as in the authors' code, so the fastest modes start with less input.

    Raises: ValueError for another measure or an odd d_state.
    """
    check_even(d_state)
    A, B = hippo(measure, d_state)
    P = low_rank(measure, d_state)
    normal = A + P.T @ P
    real = normal.diagonal().mean()  # normal = a multiple of the identity + a skew matrix
    imaginary, V = torch.linalg.eigh(-1j * (normal - real * torch.eye(d_state, dtype=A.dtype)))
    imaginary, V = imaginary[: d_state // 2], V[:, : d_state // 2]  # eigh sorts
    if measure == "fout":  # it has the eigenvalue 0 twice, for which eigh returns no conjugate pair
        V[:, -1] = 0
        V[0, -1], V[1, -1] = 2**-0.5, 2**-0.5 * 1j
    # Eigenvectors have an arbitrary phase. Clipping assumes the one with a real first entry, if that is not zero.
    V = V * torch.where(V[0].abs() < 1e-9, 1.0, V[0].sgn().conj())
    B = V.mH @ B.to(V)
    return NPLR(real + 1j * imaginary, P.to(V) @ V.conj(), torch.complex(B.real, B.imag.clamp(-2, 2)))


def diagonal(name: Diagonal, d_state: int) -> tuple[Tensor, Tensor]:
    """Complex A and B (d_state / 2,) for S4D: of each conjugate pair the half with negative imaginary part.

    lin: frequencies n pi. quad: quadratic frequencies. inv: LegS's frequencies in closed form. real: no frequencies,
    decays 1, 2, ... legs: `nplr` without the low-rank part.

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
