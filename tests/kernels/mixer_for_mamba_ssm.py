"""A mixer as vision models write them for mamba_ssm: half of the channels are scanned, the others only convolved."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import nn


class Mixer(nn.Module):
    def __init__(self, d_model, d_state=8, d_conv=3):
        super().__init__()
        self.half, self.rank, self.d_state = d_model // 2, math.ceil(d_model / 16), d_state
        self.in_proj = nn.Linear(d_model, d_model, bias=False)
        self.conv_x, self.conv_z = (nn.Conv1d(self.half, self.half, d_conv, groups=self.half) for _ in range(2))
        self.x_proj = nn.Linear(self.half, self.rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.half)
        self.A_log = nn.Parameter(repeat(torch.arange(1, d_state + 1).float().log(), "n -> d n", d=self.half).clone())
        self.D = nn.Parameter(torch.ones(self.half))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, tokens):
        length = tokens.shape[1]
        x, z = rearrange(self.in_proj(tokens), "b l d -> b d l").chunk(2, dim=1)
        x, z = (
            F.silu(F.conv1d(t, conv.weight, conv.bias, padding="same", groups=self.half))
            for t, conv in ((x, self.conv_x), (z, self.conv_z))
        )
        dt, B, C = self.x_proj(rearrange(x, "b d l -> (b l) d")).split([self.rank, self.d_state, self.d_state], -1)
        dt = rearrange(F.linear(dt, self.dt_proj.weight), "(b l) d -> b d l", l=length)
        B, C = (rearrange(t, "(b l) n -> b n l", l=length).contiguous() for t in (B, C))
        y = selective_scan_fn(
            x,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D.float(),
            z=None,
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
            return_last_state=None,
        )
        y = y.view(-1, self.half, length)  # the original's output is contiguous
        return self.out_proj(rearrange(torch.cat([y, z], 1), "b d l -> b l d"))


class Classifier(nn.Module):
    def __init__(self, patch_size, d_model=32, classes=4):
        super().__init__()
        self.patches = nn.Conv2d(3, d_model, patch_size, patch_size)
        self.norm, self.mixer, self.head = nn.LayerNorm(d_model), Mixer(d_model), nn.Linear(d_model, classes)

    def forward(self, images):
        tokens = rearrange(self.patches(images), "b d h w -> b (h w) d")
        return self.head((tokens + self.mixer(self.norm(tokens))).mean(1))
