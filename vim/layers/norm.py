"""Normalisation in front of a mixer."""

import torch
from torch import Tensor, nn

from vim_kernels import rms_norm

# FX keeps the call as a leaf; inside, it asks for the device.
torch.fx.wrap("norm_for_autocast")


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over the last dimension that hands on the dtype of the layers behind it: that of autocast, where
    torch's returns fp32, or else that of the weight, where a residual stream may be wider."""

    def forward(self, x: Tensor) -> Tensor:
        return norm_for_autocast(x, self.weight, self.eps)


def norm_for_autocast(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """`rms_norm` in the dtype that a Linear behind it would cast to."""
    device = x.device.type
    low = device != "meta" and torch.is_autocast_enabled(device)  # for meta tensors torch raises
    assert eps is not None
    return rms_norm(x, weight, eps, dtype=torch.get_autocast_dtype(device) if low else weight.dtype)
