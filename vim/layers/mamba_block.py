"""MambaBlock: a Mamba in a residual block, as in language models."""

import torch
from torch import Tensor, nn

from vim_kernels import MambaBlockWeights, mamba_block_step

from .mamba import Mamba, MambaCache
from .norm import LayerNorm, RMSNorm
from .plain import is_plain
from .residual import add_branch, pre_norm


class MambaBlock(nn.Module):
    """x + mixer(norm(x)), (batch, length, d_model) -> the same shape.

    The residual stream may have a wider dtype than the weights: fp32 keeps digits that bf16 would lose layer by layer.

    Args: see `Mamba`. norm_eps: epsilon of the norm. rms_norm: an RMS norm; False: a LayerNorm with a bias.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        d_conv: int,
        expand: float,
        dt_rank: int | None = None,
        *,
        norm_eps: float = 1e-5,
        rms_norm: bool = True,
        bias: bool = False,
        conv_bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        norm = RMSNorm if rms_norm else LayerNorm
        self.norm: RMSNorm | LayerNorm = norm(d_model, eps=norm_eps, **dd)
        self.mixer = Mamba(d_model, d_state, d_conv, expand, dt_rank, bias=bias, conv_bias=conv_bias, **dd)

    def forward(
        self,
        x: Tensor,
        cache: MambaCache | None = None,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        """x: (batch, length, d_model). cache, mask, seq_idx: see `Mamba.forward`."""
        x, normed = pre_norm(self.norm, x)
        return add_branch(x, self.mixer(normed, cache, mask, seq_idx))

    @torch.no_grad()
    def step(self, x: Tensor, cache: MambaCache) -> Tensor:
        """One step, x: (batch, d_model) -> (batch, d_model), without gradients. The cache is updated in place."""
        if not self._is_plain():
            return x + self.mixer.step(self.norm(x), cache)
        mixer, ssm, eps = self.mixer, self.mixer.ssm, self.norm.eps
        assert ssm.conv1d.bias is not None
        assert eps is not None
        weights = MambaBlockWeights(
            norm=self.norm.weight,
            in_proj=mixer.in_proj.weight,
            conv=ssm.conv1d.weight.squeeze(1),
            conv_bias=ssm.conv1d.bias,
            x_proj=ssm.x_proj.weight,
            dt_proj=ssm.dt_proj.weight,
            dt_bias=ssm.dt_proj.bias,
            A_log=ssm.A_log,
            D=ssm.D,
            out_proj=mixer.out_proj.weight,
        )
        return mamba_block_step(x, cache.conv_state, cache.ssm_state, weights, eps=eps)

    def _is_plain(self) -> bool:
        if type(self.mixer) is not Mamba:
            return False
        mixer, ssm = self.mixer, self.mixer.ssm
        without_bias, with_bias = (self.norm, mixer.in_proj, ssm.x_proj, mixer.out_proj), (ssm.conv1d, ssm.dt_proj)
        return all(is_plain(module, bias=False) for module in without_bias) and all(
            is_plain(module, bias=True) for module in with_bias
        )
