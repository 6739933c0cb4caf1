"""SwiGLU: a gated MLP."""

import torch
from torch import Tensor, nn

from vim_kernels import swiglu

torch.fx.wrap("swiglu")  # FX keeps the call as a leaf; inside, it branches on device and dtype


class SwiGLU(nn.Module):
    """fc2(silu(fc1_g(x)) * fc1_x(x)), (..., dim) -> the same shape. Parameters have the names of timm's SwiGLU.

    Args: dim: channels. hidden: channels of the activation.

    Source: Shazeer 2020, arXiv 2002.05202, equation 6, with biases.
    """

    def __init__(self, dim: int, hidden: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1_g = nn.Linear(dim, hidden, **dd)
        self.fc1_x = nn.Linear(dim, hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(swiglu(self.fc1_g(x), self.fc1_x(x)))
