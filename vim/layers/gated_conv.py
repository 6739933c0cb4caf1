"""GatedConv: BiMamba without the scan, to measure what the scan contributes."""

from torch import Tensor, nn

from .short_conv import convolve_both


class GatedConv(nn.Module):
    """Mix each token with its neighbours, (batch, length, d_model) -> the same shape.

    The mean of one convolution per direction, with BiMamba's gate and projections.

    Args:
        d_model: channels of the sequence. d_conv: taps of each convolution. expand: d_inner = expand * d_model.

    Source: the ablation of Yu & Wang 2024, arXiv 2405.07992 (MambaOut), on a sequence.
    """

    def __init__(self, d_model: int, d_conv: int = 4, expand: int = 2, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        d_inner = expand * d_model
        self.d_conv = d_conv
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False, **dd)
        self.forward_conv = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, **dd)
        self.backward_conv = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, **dd)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        forward, backward = convolve_both((self.forward_conv, self.backward_conv), self.d_conv, x)
        return self.out_proj(0.5 * (forward + backward) * nn.functional.silu(z))
