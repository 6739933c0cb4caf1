"""Inputs of `bimamba_block`, and the operators that it stands for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_kernels import BiMambaBlockWeights, SSMWeights, bidirectional_selective_scan, causal_conv1d


def block_inputs(
    batch: int = 2,
    length: int = 37,
    d_model: int = 12,
    *,
    d_inner: int = 24,
    d_state: int = 5,
    rank: int = 2,
    taps: int = 4,
    conv_bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, BiMambaBlockWeights]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def ssm() -> SSMWeights:
        return SSMWeights(
            conv=normal(d_inner, 1, taps),
            conv_bias=normal(d_inner) if conv_bias else None,
            x_proj=normal(rank + 2 * d_state, d_inner) / d_inner**0.5,
            dt_proj=normal(d_inner, rank) / max(rank, 1) ** 0.5,
            dt_bias=normal(d_inner) - 2,
            A_log=normal(d_inner, d_state),
            D=normal(d_inner),
        )

    in_proj, out_proj = normal(2 * d_inner, d_model) / d_model**0.5, normal(d_model, d_inner) / d_inner**0.5
    weights = BiMambaBlockWeights(1 + normal(d_model) / 4, in_proj, out_proj, ssm(), ssm())
    return normal(batch, length, d_model).to(dtype), weights_to(weights, dtype)


def weights_to(weights: BiMambaBlockWeights, dtype: torch.dtype) -> BiMambaBlockWeights:
    def ssm_to(ssm: SSMWeights) -> SSMWeights:
        return SSMWeights._make(None if t is None else t.to(dtype) for t in ssm)

    norm, in_proj, out_proj, forward, reverse = weights
    return BiMambaBlockWeights(norm.to(dtype), in_proj.to(dtype), out_proj.to(dtype), ssm_to(forward), ssm_to(reverse))


def by_operators(x: Tensor, weights: BiMambaBlockWeights, *, scale: float = 0.5, eps: float = 1e-5) -> Tensor:
    """The block by ATen and the reference loops."""
    u, z = F.linear(F.rms_norm(x, weights.norm.shape, weights.norm, eps), weights.in_proj).chunk(2, -1)
    us, dts, Bs, Cs = [], [], [], []
    for ssm, reverse in ((weights.forward, False), (weights.reverse, True)):
        taps = ssm.conv.squeeze(1)
        v = causal_conv1d(u, taps, ssm.conv_bias, activation="silu", reverse=reverse, backend="reference")
        rank, d_state = ssm.dt_proj.shape[1], ssm.A_log.shape[1]
        dt, B, C = F.linear(v, ssm.x_proj).split([rank, d_state, d_state], -1)
        for kept, t in zip((us, dts, Bs, Cs), (v, F.linear(dt, ssm.dt_proj), B, C), strict=True):
            kept.append(t)
    ssms = weights.forward, weights.reverse
    y = bidirectional_selective_scan(
        us,
        dts,
        [-ssm.A_log.exp() for ssm in ssms],
        Bs,
        Cs,
        D=[ssm.D for ssm in ssms],
        z=z,
        dt_bias=[ssm.dt_bias for ssm in ssms],
        scale=scale,
        backend="reference",
    )
    return x + F.linear(y, weights.out_proj)
