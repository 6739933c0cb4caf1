"""The selective scan and the fused Mamba-1 layer, channels first, as in mamba_ssm.ops.selective_scan_interface."""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from ..causal_conv import causal_conv1d
from ..checks import FLOATS, check, check_shape, check_tensors
from ..rms_norm import rms_norm
from ..selective_scan import selective_scan

_log = logging.getLogger("vim_kernels")


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
):
    """`vim_kernels.selective_scan` on sequences with the channels first.

    Args:
        u, delta, z: (batch, dim, length). A: (dim, d_state), fp32 or fp64. D, delta_bias: (dim,).
        B, C: (batch, d_state, length), or (batch, groups, d_state, length); or (dim, d_state), constant in time, which
            runs on the backend `reference`, a Python loop.

    Returns: y (batch, dim, length), contiguous, in u's dtype, or (y, last_state) with last_state (batch, dim, d_state)
        in fp32 (fp64). Unlike the original's, the last state is differentiable.

    Raises: ValueError, TypeError: a wrong shape, device or dtype; complex tensors.
    """
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, backend="auto")


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
):
    """`selective_scan_fn` on the backend `reference`, a Python loop under autograd."""
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, backend="reference")


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, *, backend):
    _check(u, delta, A, B, C, D, z, delta_bias)
    if backend == "auto":
        backend = _backend_of(B, C)
    y, last_state = selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        *_same_groups(_steps(B), _steps(C)),
        D=D,
        z=None if z is None else z.transpose(1, 2),
        dt_bias=delta_bias,
        dt_softplus=bool(delta_softplus),
        return_last_state=True,
        backend=backend,
    )
    y = y.transpose(1, 2).contiguous()  # callers view() the original's output
    return (y, last_state) if return_last_state else y


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba-1 layer after its input projection: convolution, projections, scan, gate, output projection.

    Args:
        xz: (batch, 2 * dim, length). conv1d_weight: (dim, 1, width). x_proj_weight: (rank + 2 * d_state, dim).
        delta_proj_weight: (dim, rank). out_proj_weight: (d_model, dim). A: (dim, d_state).
        B, C: as in `selective_scan_fn`; None takes them from x_proj, plus B_proj_bias and C_proj_bias, (d_state,).
        b_rms_weight, c_rms_weight, dt_rms_weight: normalise B, C and delta; (d_state,), (d_state,) and (dim,). They get
            gradients, which the original's do not.
        checkpoint_lvl: 0 or 1. Both give the same numbers; here neither recomputes anything.

    Returns: (batch, length, d_model).
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl!r}")
    check(xz.dim() == 3, "xz", xz, "be (batch, 2 * dim, length)")
    check(conv1d_weight.dim() == 3, "conv1d_weight", conv1d_weight, "be (dim, 1, width)")
    rank, d_state = delta_proj_weight.shape[1], A.shape[1]
    x, z = xz.transpose(1, 2).chunk(2, -1)
    u = causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    projected = F.linear(u, x_proj_weight)
    delta = F.linear(projected[..., :rank], delta_proj_weight)
    if B is None:
        B = _biased(projected[..., rank : rank + d_state], B_proj_bias).mT
    if C is None:
        C = _biased(projected[..., -d_state:], C_proj_bias).mT
    _check(x.mT, delta.mT, A, B, C, D, z.mT, delta_bias)
    backend = _backend_of(B, C)
    B, C = (_normed(_steps(t), weight, b_c_dt_rms_eps) for t, weight in ((B, b_rms_weight), (C, c_rms_weight)))
    B, C = _same_groups(B, C)
    delta = _normed(delta, dt_rms_weight, b_c_dt_rms_eps)
    y = selective_scan(
        u, delta, A, B, C, D=D, z=z, dt_bias=delta_bias, dt_softplus=bool(delta_softplus), backend=backend
    )
    return F.linear(y, out_proj_weight, out_proj_bias)


def _biased(t: Tensor, bias: Tensor | None) -> Tensor:
    return t if bias is None else t + bias.to(t.dtype)


def _normed(t: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return t if weight is None else rms_norm(t, weight, eps)


def _backend_of(B: Tensor, C: Tensor) -> str:
    """Only `reference` takes B or C that are constant in time, (dim, d_state)."""
    if B.dim() != 2 and C.dim() != 2:
        return "auto"
    _log_constant()
    return "reference"


def _steps(t: Tensor) -> Tensor:
    """B or C with the channels first -> (batch, length, groups, d_state); constant in time, it stays as it is."""
    if t.dim() == 2:
        return t
    return t.mT.unsqueeze(2) if t.dim() == 3 else t.permute(0, 3, 1, 2)


def _same_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One of two may have one group where the other one has several."""
    if B.dim() == 4 == C.dim() and B.shape != C.shape:
        B, C = (t.expand(-1, -1, max(B.shape[2], C.shape[2]), -1) if t.shape[2] == 1 else t for t in (B, C))
    return B, C


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Raise for the first argument that breaks a rule of `selective_scan_fn`, in its names and shapes."""
    named = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    check_tensors(named, like="u", dtypes=(*FLOATS, torch.complex64, torch.complex128))
    for name, t in named.items():
        if t is not None and t.is_complex():
            raise ValueError(
                f"{name} is complex, and selective_scan_fn takes real tensors only; for complex A, B and C call "
                "vim_kernels.selective_scan(..., backend='reference')"
            )
    check(u.dim() == 3, "u", u, "be (batch, dim, length)")
    batch, dim, length = u.shape
    check_shape("delta", delta, "the shape of u, (batch, dim, length)", (batch, dim, length))
    check_shape("z", z, "the shape of u, (batch, dim, length)", (batch, dim, length))
    check(A.dim() == 2 and A.shape[0] == dim, "A", A, f"be (dim, d_state) with dim = {dim}")
    d_state = A.shape[1]
    for name, t in (("B", B), ("C", C)):
        if t.dim() == 2:
            check_shape(name, t, "(dim, d_state), constant in time,", (dim, d_state))
        elif t.dim() == 4:
            groups = t.shape[1]
            check_shape(name, t, "(batch, groups, d_state, length)", (batch, groups, d_state, length))
            check(groups > 0 and dim % groups == 0, name, t, f"have groups that divide dim = {dim}")
        else:
            check_shape(name, t, "(batch, d_state, length)", (batch, d_state, length))
    check_shape("D", D, "(dim,)", (dim,))
    check_shape("delta_bias", delta_bias, "(dim,)", (dim,))


@functools.cache
def _log_constant() -> None:
    _log.warning("selective_scan_fn: B or C is constant in time, so backend 'reference' runs, a Python loop")
