"""Mamba: the causal selective mixer, over whole sequences or step by step."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vim_kernels import selective_scan, selective_state_update

from .cache import before_update
from .rename import rename_keys
from .selective_ssm import SelectiveSSM
from .short_conv import convolve

torch.fx.wrap("selective_scan")

OFFICIAL_NAMES = {r"((?:conv1d|x_proj|dt_proj)\..*|A_log|D)": r"ssm.\1"}  # the authors' Mamba -> ours
NO_STEP = -1e4  # its softplus is 0, with any bias and in half precision


class MambaCache(NamedTuple):
    """The state of a Mamba layer after the steps so far. The layer updates it in place.

    It carries no gradients: those of a call do not reach the calls before it.
    """

    conv_state: Tensor  # (batch, d_conv - 1, d_inner), the last inputs of the convolution, oldest first
    ssm_state: Tensor  # (batch, d_inner, d_state), fp32


class Mamba(nn.Module):
    """Mix a sequence causally, (batch, length, d_model) -> the same shape.

    With a cache, a call continues the sequence. One call, several pieces and single steps give the same outputs:

        cache = mixer.allocate_cache(batch_size)
        y = mixer(prompt, cache)            # (batch, length, d_model)
        y_next = mixer.step(x_next, cache)  # (batch, d_model)

    Args:
        d_model: channels of the sequence. d_state: states N per inner channel. d_conv: taps of the convolution.
        expand: d_inner = expand * d_model, rounded down. dt_rank: rank of the step's projection, ceil(d_model / 16) if
            None.
        bias: whether input and output projection have biases. conv_bias: whether the convolution has one.

    Source: Gu & Dao 2023, arXiv 2312.00752, figure 3. State dicts of the authors' Mamba load: in_proj and out_proj keep
    their names; the others are in `ssm` here.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        *,
        bias: bool = False,
        conv_bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        d_inner = int(expand * d_model)
        dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias, **dd)
        self.ssm = SelectiveSSM(d_inner, d_state, d_conv, dt_rank, conv_bias=conv_bias, **dd)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **dd)
        self.register_load_state_dict_pre_hook(_translate_official)

    def allocate_cache(self, batch_size: int) -> MambaCache:
        """A cache for the start of a sequence, on the layer's device. conv_state has the dtype of the weights."""
        ssm = self.ssm
        return MambaCache(
            ssm.conv_state(batch_size), ssm.A_log.new_zeros(batch_size, *ssm.A_log.shape, dtype=torch.float32)
        )

    def forward(
        self,
        x: Tensor,
        cache: MambaCache | None = None,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        """Args:
        x: (batch, length, d_model).
        cache: continues the sequence; updated in place.
        mask: (batch, length) of bool, False for padding, at any place. Outputs and cache are as if the padding were not
            there. Outputs at the padding are meaningless.
        seq_idx: (batch, length), int32 or int64, for several sequences packed into a row: the sequence of each step.
            Each is mixed as if it were alone. A new sequence begins wherever the value changes. The cache continues
            the first one and then holds the last one. Not with a mask.

        Raises: ValueError for a mask of another shape or dtype, or together with seq_idx.
        """
        if mask is None:
            return self._mix(x, cache, seq_idx=seq_idx)
        if seq_idx is not None:
            raise ValueError("mask and seq_idx do not go together; give padding its own seq_idx instead of a mask")
        if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            raise ValueError(
                f"mask must be bool and (batch, length) = {tuple(x.shape[:2])}, got {mask.dtype}, {tuple(mask.shape)}"
            )
        # Padding moves behind all steps, where neither they nor the convolution see it.
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True).unsqueeze(-1)
        y = self._mix(x.take_along_dim(order, 1), cache, mask.sum(1))
        return y.take_along_dim(order.argsort(1), 1)

    def _mix(
        self, x: Tensor, cache: MambaCache | None, lengths: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> Tensor:
        """See `forward`. lengths: (batch,), steps in front of each row's padding; None without padding."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        ssm = self.ssm
        if lengths is not None:
            padding = (torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(-1)).unsqueeze(-1)
            x = x.masked_fill(padding, 0)
        conv_state = None if cache is None else cache.conv_state
        if lengths is not None and conv_state is not None:
            window = torch.cat((conv_state, x.detach()), 1)
        u = convolve(ssm.conv1d, ssm.d_conv, x, conv_state=conv_state, seq_idx=seq_idx)
        dt, A, B, C, dt_bias = ssm.project(u)
        if lengths is not None:
            dt = dt.masked_fill(padding, NO_STEP)
        if lengths is not None and conv_state is not None:
            taps = lengths.unsqueeze(-1) + torch.arange(conv_state.shape[1], device=x.device)
            conv_state.copy_(window.take_along_dim(taps.unsqueeze(-1), 1))
        y = selective_scan(
            u,
            dt,
            A,
            B,
            C,
            D=ssm.D,
            z=z,
            dt_bias=dt_bias,
            initial_state=None if cache is None else before_update(cache.ssm_state),
            return_last_state=cache is not None,
            seq_idx=seq_idx,
        )
        if cache is not None:
            y, last_state = y
            cache.ssm_state.copy_(last_state.detach())
        return self.out_proj(y)

    def step(self, x: Tensor, cache: MambaCache) -> Tensor:
        """One step, x: (batch, d_model) -> (batch, d_model). The cache is updated in place."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        u = convolve(self.ssm.conv1d, self.ssm.d_conv, x.unsqueeze(1), conv_state=cache.conv_state)
        dt, A, B, C, dt_bias = self.ssm.project(u)
        y, state = selective_state_update(
            before_update(cache.ssm_state),
            u.squeeze(1),
            dt.squeeze(1),
            A,
            B.squeeze(1),
            C.squeeze(1),
            D=self.ssm.D,
            z=z,
            dt_bias=dt_bias,
        )
        cache.ssm_state.copy_(state.detach())
        return self.out_proj(y)


def _translate_official(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Load-state-dict pre-hook: rename official keys in place."""
    rename_keys(OFFICIAL_NAMES, state_dict, prefix)
