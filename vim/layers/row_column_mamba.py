"""RowColumnMamba: ARM's mixer, selective scans along the rows and the columns of an image, in both directions."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vim_kernels import bidirectional_selective_scan

from .bimamba import scans_of
from .selective_ssm import SelectiveSSM

torch.fx.wrap("bidirectional_selective_scan")

Order = tuple[Tensor, Tensor]  # indices (length,) from the rows to the columns, and back


class RowColumnMamba(nn.Module):
    """Mix a sequence of patches in four directions, (batch, length, d_model) -> the same shape.

    Each direction has its own convolution, projections, A and D. The input projection, the output projection and the
    gate are shared. The gate multiplies the mean of all directions.

    Args:
        d_model: channels of the sequence and of the scans. d_state: states N per channel. d_conv: taps of the
            convolutions.

    Source: Ren et al. 2024, arXiv 2406.07537. Euler's rule for B is as in the released code.
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        sizes = d_model, d_state, d_conv, math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * d_model, bias=False, **dd)
        self.row_forward_ssm = SelectiveSSM(*sizes, **dd)
        self.row_backward_ssm = SelectiveSSM(*sizes, **dd)
        self.column_forward_ssm = SelectiveSSM(*sizes, **dd)
        self.column_backward_ssm = SelectiveSSM(*sizes, **dd)
        self.out_proj = nn.Linear(d_model, d_model, bias=False, **dd)

    def forward(self, x: Tensor, columns: Order) -> Tensor:
        """Args:
        x: (batch, length, d_model), row by row.
        columns: indices (length,) that read x column by column, and back.
        """
        to_columns, to_rows = columns
        xz = self.in_proj(x)
        along_rows = self._scans(self.row_forward_ssm, self.row_backward_ssm, xz)
        along_columns = self._scans(self.column_forward_ssm, self.column_backward_ssm, xz[:, to_columns])
        y = bidirectional_selective_scan(**along_columns)[:, to_rows]
        return self.out_proj(bidirectional_selective_scan(**along_rows) + y)

    def scan_inputs(self, x: Tensor) -> dict[str, Any]:
        """Arguments of `bidirectional_selective_scan` along the rows of a sequence (B, L, d_model)."""
        return self._scans(self.row_forward_ssm, self.row_backward_ssm, self.in_proj(x))

    def _scans(self, forward: SelectiveSSM, backward: SelectiveSSM, xz: Tensor) -> dict[str, Any]:
        x, z = xz.chunk(2, dim=-1)
        return scans_of(forward, backward, x, z, scale=0.25)
