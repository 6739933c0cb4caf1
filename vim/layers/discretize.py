"""Discretisation: rules that turn x' = A x + B u into x[k] = dA x[k-1] + dB u[k].

Mamba's kernels discretise within the scan: zero-order hold for A and Euler's rule for B.
"""

from typing import Literal

import torch
from torch import Tensor

from .checks import check_choice

Rule = Literal["zoh", "bilinear", "euler"]
RULES = ("zoh", "bilinear", "euler")


def discretize_diagonal(A: Tensor, B: Tensor, delta: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Discretise systems with diagonal matrices.

        zoh       dA = exp(delta A),                           dB = A^-1 (dA - 1) B
        bilinear  dA = (1 - delta A / 2)^-1 (1 + delta A / 2), dB = (1 - delta A / 2)^-1 delta B
        euler     dA = 1 + delta A,                            dB = delta B

    Zero-order hold is exact for an input that is constant within a step. For an input that changes, sampled in the
    middle of each step, the error at a given time falls as delta^2 with zoh and bilinear, and as delta with euler.

    Args:
        A, B: (..., d_state), real or complex. delta: step sizes in the system's unit of time, broadcast against A.

    Returns: dA and dB, of the shape that A, B and delta broadcast to.
    Raises: ValueError for another rule.
    Source: zoh and bilinear Gu et al. 2022, arXiv 2206.11893, section 2.1. Euler's rule is the first term of both.
    """
    check_choice("rule", rule, RULES)
    step = delta * A
    if rule == "zoh":
        # (e^x - 1) / x goes to 1 as x goes to 0, the case of a pole at zero.
        small = step.abs() < 1e-8
        safe = torch.where(small, torch.ones_like(step), step)
        return step.exp(), torch.where(small, torch.ones_like(step), torch.expm1(safe) / safe) * delta * B
    if rule == "bilinear":
        inverse = 1 / (1 - step / 2)
        return inverse * (1 + step / 2), inverse * delta * B
    return 1 + step, delta * B


def discretize_dense(A: Tensor, B: Tensor, delta: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Discretise systems with full matrices by the same rules; A may be singular.

    Args:
        A: (..., d_state, d_state). B: (..., d_state). delta: (...), step sizes.

    Returns: dA (..., d_state, d_state) and dB (..., d_state).
    Raises: ValueError for another rule.
    Source: see `discretize_diagonal`. Zero-order hold is one exponential of [[A, B], [0, 0]]: Van Loan 1978, IEEE
        Transactions on Automatic Control 23(3).
    """
    check_choice("rule", rule, RULES)
    A, B = delta[..., None, None] * A, delta[..., None] * B
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    if rule == "zoh":
        A, B = A.broadcast_to(*B.shape[:-1], *A.shape[-2:]), B.broadcast_to(*A.shape[:-2], B.shape[-1])
        both = torch.nn.functional.pad(torch.cat((A, B.unsqueeze(-1)), -1), (0, 0, 0, 1))
        both = torch.linalg.matrix_exp(both)
        return both[..., :-1, :-1], both[..., :-1, -1]
    if rule == "bilinear":
        both = torch.linalg.solve(
            identity - A / 2, torch.cat((identity + A / 2, B.unsqueeze(-1).broadcast_to(*A.shape[:-1], 1)), -1)
        )
        return both[..., :-1], both[..., -1]
    return identity + A, B
