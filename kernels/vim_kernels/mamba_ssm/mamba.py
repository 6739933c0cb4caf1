"""The Mamba-1 layer with the names, options and caches of mamba_ssm.modules.mamba_simple."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv import causal_conv1d_fn
from .scan import mamba_inner_fn, selective_scan_fn
from .updates import causal_conv1d_update, selective_state_update


class Mamba(nn.Module):
    """Mix a sequence causally, (batch, length, d_model) -> the same shape.

    Args:
        d_model: channels of the sequence. d_state: states per inner channel. d_conv: taps of the convolution.
        expand: inner channels per channel. dt_rank: rank of the step's projection; "auto": ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: the step sizes at the start are log-uniform between the first two, and at least
            the third. dt_init, dt_scale: "random" or "constant" weights of the step's projection, and their scale.
        conv_bias, bias: of the convolution, and of the projections in and out.
        use_fast_path: no effect here; both paths compute the same.
        layer_idx: the key of this layer's states in inference_params.key_value_memory_dict.

    Source: Gu & Dao 2023, arXiv 2312.00752, figure 3.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise NotImplementedError(f"dt_init must be 'random' or 'constant', got {dt_init!r}")
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ValueError(f"dt_rank must be a number or 'auto', got {dt_rank!r}")
        dd = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.activation = "silu"

        d_inner = self.d_inner
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias, **dd)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1, bias=conv_bias, **dd)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner, **dd)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **dd)
        spread = self.dt_rank**-0.5 * dt_scale
        if dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        else:
            nn.init.constant_(self.dt_proj.weight, spread)
        with torch.no_grad():
            low, high = math.log(dt_min), math.log(dt_max)
            dt = (torch.rand(d_inner, **dd) * (high - low) + low).exp().clamp(min=dt_init_floor)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        states = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(states.log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner, device=device))
        # Marks that training code written for mamba_ssm looks for.
        marks = (self.dt_proj.bias, "_no_reinit"), (self.A_log, "_no_weight_decay"), (self.D, "_no_weight_decay")
        for parameter, mark in marks:
            setattr(parameter, mark, True)

    def forward(self, hidden_states: Tensor, inference_params=None) -> Tensor:
        """With inference_params, a first call fills this layer's caches there, and later ones take a step each."""
        A = -torch.exp(self.A_log.float())
        if inference_params is None:
            return mamba_inner_fn(
                self.in_proj(hidden_states).mT,
                self.conv1d.weight,
                self.conv1d.bias,
                self.x_proj.weight,
                self.dt_proj.weight,
                self.out_proj.weight,
                self.out_proj.bias,
                A,
                D=self.D.float(),
                delta_bias=self.dt_proj.bias.float(),
            )
        conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        x, z = self.in_proj(hidden_states).mT.chunk(2, 1)
        conv_state.copy_(F.pad(x.detach(), (self.d_conv - x.shape[-1], 0)))
        u = causal_conv1d_fn(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation=self.activation)
        dt, B, C = self._project(u.mT)
        y, last_state = selective_scan_fn(
            u,
            dt.mT,
            A,
            B.mT,
            C.mT,
            self.D.float(),
            z,
            self.dt_proj.bias.float(),
            delta_softplus=True,
            return_last_state=True,
        )
        ssm_state.copy_(last_state.detach())
        return self.out_proj(y.mT)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step, (batch, 1, d_model). Returns the output and the caches, which are updated in place."""
        if hidden_states.shape[1] != 1:
            raise ValueError(f"hidden_states must be (batch, 1, d_model), one step, got {tuple(hidden_states.shape)}")
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, -1)
        u = causal_conv1d_update(x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        dt, B, C = self._project(u)
        A = -torch.exp(self.A_log.float())
        y = selective_state_update(ssm_state, u, dt, A, B, C, self.D, z, self.dt_proj.bias, dt_softplus=True)
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs) -> tuple[Tensor, Tensor]:
        """conv_state (batch, d_inner, d_conv) and ssm_state (batch, d_inner, d_state), zero, for any max_seqlen."""
        conv, ssm = self.conv1d.weight, self.dt_proj.weight
        return (
            conv.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype),
            ssm.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype),
        )

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt without its bias, B and C of steps (..., d_inner)."""
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        return F.linear(dt, self.dt_proj.weight), B, C

    def _get_states_from_cache(self, inference_params, batch_size: int) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError("layer_idx must be a number to use inference_params, got None; give it to Mamba(...)")
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        return caches[self.layer_idx]
