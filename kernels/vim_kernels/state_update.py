"""One step of the recurrence, for decoding, in ATen operators."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import FLOATS, check, check_shape, check_tensors, shape_of
from .precision import state_dtype


def selective_state_update(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
) -> tuple[Tensor, Tensor]:
    """Advance the recurrence of `selective_scan` by one step. All steps together equal the scan of the sequence.

    Args:
        state: (batch, d_inner, d_state), not modified. u, dt, z: (batch, d_inner). A: (d_inner, d_state).
        B, C: (batch, d_state) or (batch, groups, d_state). D, dt_bias: (d_inner,).

    Returns: y (batch, d_inner) in u's dtype and the new state in the state's dtype. ATen operators on any device;
        differentiable.

    Raises: ValueError, TypeError: a wrong shape, device or dtype.

    Source: Gu & Dao 2023, arXiv 2312.00752, equation 2a with Algorithm 2's discretisation.
    """
    named = {"state": state, "u": u, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    check_tensors(named, like="u", dtypes=FLOATS)
    check(u.dim() == 2, "u", u, "be (batch, d_inner)")
    batch, d_inner = u.shape
    check(A.dim() == 2 and A.shape[0] == d_inner, "A", A, f"be (d_inner, d_state) with d_inner = {d_inner}")
    d_state = A.shape[1]
    check_shape("state", state, "(batch, d_inner, d_state)", (batch, d_inner, d_state))
    check_shape("dt", dt, "the shape of u, (batch, d_inner)", shape_of(u))
    check_shape("z", z, "the shape of u, (batch, d_inner)", shape_of(u))
    for name, t in (("B", B), ("C", C)):
        groups = t.shape[1] if t.dim() == 3 else 1
        want = (batch, groups, d_state) if t.dim() == 3 else (batch, d_state)
        check(shape_of(t) == want, name, t, f"be (batch[, groups], d_state) = {want}")
        check(groups > 0 and d_inner % groups == 0, name, t, f"have groups that divide d_inner = {d_inner} evenly")
    check_shape("D", D, "(d_inner,)", (d_inner,))
    check_shape("dt_bias", dt_bias, "(d_inner,)", (d_inner,))

    dtype = state_dtype(*named.values())
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    delta = F.softplus(delta) if dt_softplus else delta
    x = u.to(dtype)
    B, C = _per_channel(B.to(dtype), d_inner), _per_channel(C.to(dtype), d_inner)
    h = torch.exp(delta.unsqueeze(-1) * A.to(dtype)) * state.to(dtype) + (delta * x).unsqueeze(-1) * B
    y = (h * C).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), h.to(state.dtype)


def _per_channel(x: Tensor, d_inner: int) -> Tensor:
    """(batch, N) or (batch, G, N) -> (batch, d_inner or 1, N)"""
    return x.unsqueeze(1) if x.dim() == 2 else x.repeat_interleave(d_inner // x.shape[1], dim=1)
