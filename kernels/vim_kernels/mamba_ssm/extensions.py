"""The compiled modules that VMamba and mamba_ssm call: a forward and a backward without autograd, channels first.

`selective_scan_cuda` is mamba_ssm's, `selective_scan_cuda_oflex` and `selective_scan_cuda_core` are VMamba's. Here a
backward runs the forward again, because the modules hand over nothing that could keep what it saved.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan import selective_scan_fn


def mamba_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """[y, states], and the gated output with z. Of the states only the last one is right: states[:, :, -1, 1::2]."""
    y, states = core_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, 1)
    return [y, states] if z is None else [y, states, _gated(y, z)]


def mamba_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """The gradients of u, delta, A, B, C, D and delta_bias; with z also that of z, written into dz if it is given, and
    the gated output if it is asked for. x and out, results of the forward, are not needed.
    """
    *grads, d_gate, y = _gradients((u, delta, A, B, C, D, delta_bias, z), dout, delta_softplus)
    if z is None:
        return grads
    grads.append(d_gate if dz is None else dz.copy_(d_gate))
    return [*grads, y] if recompute_out_z else grads


def core_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int,
) -> list[Tensor]:
    """[y, states] as `mamba_fwd`. nrows, rows per thread block of the original, has no effect."""
    y, last_state = selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus, True)
    return [y, torch.stack((torch.zeros_like(last_state), last_state), -1).flatten(2).unsqueeze(2)]


def oflex_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int,
    out_float: bool,
) -> list[Tensor]:
    """`core_fwd`; with out_float, y is in fp32 for u in half precision."""
    return core_fwd(u.float() if out_float else u, delta, A, B, C, D, delta_bias, delta_softplus, nrows)


def core_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int,
) -> list[Tensor | None]:
    """The gradients of u, delta, A, B, C, D and delta_bias. x, a result of the forward, is not needed."""
    return _gradients((u, delta, A, B, C, D, delta_bias, None), dout, delta_softplus)[:7]


def _gradients(inputs: tuple, dout: Tensor, delta_softplus: bool) -> list:
    """The gradients of (u, delta, A, B, C, D, delta_bias, z), None where one is absent, and the output."""
    leaves: list = [None if t is None else t.detach().requires_grad_() for t in inputs]
    u, delta, A, B, C, D, delta_bias, z = leaves
    with torch.enable_grad():
        # dout is in fp32 after `oflex_fwd` with out_float.
        y = selective_scan_fn(u.to(dout.dtype), delta, A, B, C, D, z, delta_bias, delta_softplus)
        found = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dout))
    return [*(None if t is None else next(found) for t in leaves), y.detach()]


def _gated(y: Tensor, z: Tensor) -> Tensor:
    return (y.float() * F.silu(z.float())).to(y.dtype)
