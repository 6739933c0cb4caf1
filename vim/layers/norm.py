"""RMS norms: in front of a mixer, and gated within one."""

import torch
from torch import Tensor, nn

from vim_kernels import rms_norm

# FX keeps these calls as leaves; inside, they branch on device and dtype.
torch.fx.wrap("norm_for_autocast")
torch.fx.wrap("rms_norm")


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over the last dimension that returns the dtype of the layers behind it.

    That is autocast's dtype (torch's norm returns fp32), or without autocast the dtype of the weight, even if the
    residual stream is wider.
    """

    def forward(self, x: Tensor) -> Tensor:
        return norm_for_autocast(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """RMS norm of y * silu(z), (..., channels) -> the same shape in y's dtype, computed in fp32 at least.

    Args: channels: of y and z. groups: number of blocks of channels, each normalised separately.

    Source: Dao & Gu 2024, arXiv 2405.21060, section 7.
    """

    def __init__(self, channels: int, groups: int, *, device=None, dtype=None):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return rms_norm(y, self.weight, 1e-5, gate=z, groups=self.groups)


def norm_for_autocast(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """`rms_norm` in the dtype to which a Linear behind it would cast."""
    device = x.device.type
    low = device != "meta" and torch.is_autocast_enabled(device)  # torch raises for meta tensors
    assert eps is not None
    return rms_norm(x, weight, eps, dtype=torch.get_autocast_dtype(device) if low else weight.dtype)
