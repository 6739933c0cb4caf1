"""Backend `torch` of `mamba_block_step`: ATen operators only."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_weights import MambaBlockWeights
from .rms_norm import rms_norm
from .state_update import selective_state_update


def block_step(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MambaBlockWeights, eps: float) -> Tensor:
    """See `mamba_block_step`."""
    normed = rms_norm(x, weights.norm, eps, dtype=weights.in_proj.dtype, backend="torch")
    new, z = F.linear(normed, weights.in_proj).chunk(2, -1)
    window = torch.cat((conv_state, new.unsqueeze(1)), 1)  # (batch, W, E)
    conv_state.copy_(window[:, 1:])
    u = F.silu((window * weights.conv.mT).sum(1) + weights.conv_bias)
    rank, d_state = weights.dt_proj.shape[1], weights.A_log.shape[1]
    dt, B, C = F.linear(u, weights.x_proj).split([rank, d_state, d_state], -1)
    A = -torch.exp(weights.A_log.to(ssm_state.dtype))
    y, state = selective_state_update(
        ssm_state, u, F.linear(dt, weights.dt_proj), A, B, C, D=weights.D, z=z, dt_bias=weights.dt_bias
    )
    ssm_state.copy_(state)
    return x + F.linear(y, weights.out_proj)
