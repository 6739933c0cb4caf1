"""SwiGLU: a gated MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim_kernels import add_branch, biased_swiglu, swiglu

from .plain import is_plain

# FX keeps these calls as leaves; inside, they branch on device and dtype.
torch.fx.wrap("_add_product")
torch.fx.wrap("_hidden")
torch.fx.wrap("add_branch")
torch.fx.wrap("swiglu")


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
        return self.fc2(self.activated(x))

    def activated(self, x: Tensor) -> Tensor:
        """What fc2 reads."""
        if is_plain(self.fc1_g, bias=True) and is_plain(self.fc1_x, bias=True):
            return _hidden(x, self.fc1_g.weight, self.fc1_g.bias, self.fc1_x.weight, self.fc1_x.bias)
        return swiglu(self.fc1_g(x), self.fc1_x(x))


def add_mlp(stream: Tensor, mlp: SwiGLU, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """stream + mlp(x) * scale, (batch, length, dim); scale: (batch,)."""
    if is_plain(mlp, kinds=(SwiGLU,)) and is_plain(mlp.fc2, bias=True):
        return _add_product(stream, mlp.activated(x), mlp.fc2.weight, mlp.fc2.bias, scale)
    return add_branch(stream, mlp(x), scale=scale)


def _add_product(stream: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
    """stream + (x weight^T + bias) * scale"""
    if x.is_cuda:  # one kernel adds bias and stream, and finds the gradient of the bias
        return add_branch(stream, F.linear(x, weight), bias, scale=scale)
    return add_branch(stream, F.linear(x, weight, bias), scale=scale)


def _hidden(x: Tensor, gate_weight: Tensor, gate_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(x gate_weight^T + gate_bias) * (x weight^T + bias)"""
    if x.is_cuda:  # one product; joining the weights costs little beside it
        return biased_swiglu(F.linear(x, torch.cat((gate_weight, weight))), torch.cat((gate_bias, bias)))
    return swiglu(F.linear(x, gate_weight, gate_bias), F.linear(x, weight, bias))
