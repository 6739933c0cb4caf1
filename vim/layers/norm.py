"""Norms in front of a mixer, and a gated RMS norm within one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim_kernels import rms_norm

# FX keeps these calls as leaves; inside, they branch on device and dtype.
torch.fx.wrap("layer_norm_for_autocast")
torch.fx.wrap("norm_for_autocast")
torch.fx.wrap("rms_norm")


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over the last dimension that returns the dtype of the layers behind it.

    That is autocast's dtype (torch's norm returns fp32), or without autocast the dtype of the weight, even if the
    residual stream is wider.
    """

    def forward(self, x: Tensor) -> Tensor:
        return norm_for_autocast(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last dimension, with a bias, that returns the same dtype as RMSNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm_for_autocast(x, self.weight, self.bias, self.eps)


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
    assert eps is not None
    return rms_norm(x, weight, eps, dtype=dtype_behind(x, weight))


def layer_norm_for_autocast(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The same for a layer norm. It is computed in the wider dtype of x and the weights, and rounded once."""
    wide = torch.promote_types(x.dtype, weight.dtype)
    y = F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return y.to(dtype_behind(x, weight))


def dtype_behind(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of a Linear behind a norm with this weight."""
    device = x.device.type
    low = device != "meta" and torch.is_autocast_enabled(device)  # torch raises for meta tensors
    return torch.get_autocast_dtype(device) if low else weight.dtype
