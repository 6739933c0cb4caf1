"""The functions of mamba_ssm and causal_conv1d, written from their mathematics as loops in fp64, and random calls.

Sequences of the scan and the convolution are (batch, dim, length), those of the chunk scan (batch, length, heads, ...).
"""

import random

import torch


def silu(x):
    return x / (1 + torch.exp(-x))


def softplus(x):
    return torch.log1p(torch.exp(x))


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    batch, dim, length = u.shape
    h, outputs = torch.zeros(batch, dim, A.shape[1], dtype=torch.float64), []
    for t in range(length):
        step = delta[:, :, t] if delta_bias is None else delta[:, :, t] + delta_bias
        step = (softplus(step) if delta_softplus else step).unsqueeze(-1)
        h = torch.exp(step * A) * h + step * _at(B, t, dim) * u[:, :, t].unsqueeze(-1)
        y = (h * _at(C, t, dim)).sum(-1)
        y = y if D is None else y + D * u[:, :, t]
        outputs.append(y if z is None else y * silu(z[:, :, t]))
    return torch.stack(outputs, -1), h


def _at(B, t, dim):
    """B at step t for each channel, (batch or 1, dim or 1, d_state)."""
    if B.dim() == 2:
        return B.unsqueeze(0)
    if B.dim() == 3:
        return B[:, None, :, t]
    return torch.stack([B[:, channel * B.shape[1] // dim, :, t] for channel in range(dim)], 1)


def conv(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None, **_):
    """The output, and the last width - 1 steps."""
    batch, dim, length = x.shape
    past = weight.shape[1] - 1
    before = torch.zeros(batch, dim, past, dtype=x.dtype) if initial_states is None else initial_states
    steps, rows = torch.cat([before, x], -1), []
    for b in range(batch):
        row = []
        for t in range(length):
            y = torch.zeros(dim, dtype=x.dtype) if bias is None else bias
            for back in range(past + 1):
                same = seq_idx is None or seq_idx[b, t] == seq_idx[b, max(t - back, 0)]
                y = y + weight[:, past - back] * steps[b, :, past + t - back] * float(same)
            y = y if activation is None else silu(y)
            row.append(y * float(seq_idx is None or seq_idx[b, t] >= 0))
        rows.append(torch.stack(row, -1))
    return torch.stack(rows), steps[..., length:]


def chunk_scan(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    dt_softplus=False,
    dt_limit=None,
    **_,
):
    batch, length, heads, head_dim = x.shape
    low, high = (0.0, float("inf")) if dt_limit is None else dt_limit
    group = [head * B.shape[2] // heads for head in range(heads)]
    ys, states = [], []
    for b in range(batch):
        h, row = torch.zeros(heads, head_dim, B.shape[3], dtype=torch.float64), []
        if initial_states is not None and (seq_idx is None or seq_idx[b, 0] == 0):
            h = initial_states[b]
        for t in range(length):
            if seq_idx is not None and t > 0 and seq_idx[b, t] != seq_idx[b, t - 1]:
                h = torch.zeros_like(h)
            step = dt[b, t] if dt_bias is None else dt[b, t] + dt_bias
            step = (softplus(step) if dt_softplus else step).clamp(low, high)
            B_t, C_t = B[b, t, group], C[b, t, group]  # (heads, d_state)
            h = torch.exp(step * A)[:, None, None] * h + step[:, None, None] * x[b, t].unsqueeze(-1) * B_t.unsqueeze(1)
            y = (h * C_t.unsqueeze(1)).sum(-1)
            if D is not None:
                y = y + (D if D.dim() == 2 else D.unsqueeze(-1)) * x[b, t]
            row.append(y if z is None else y * silu(z[b, t]))
        ys.append(torch.stack(row))
        states.append(h)
    return torch.stack(ys), torch.stack(states)


def norm(x, weight, bias=None, eps=1e-6, *, rms, group_size=None):
    blocks = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    blocks = blocks if rms else blocks - blocks.mean(-1, keepdim=True)
    y = (blocks / (blocks.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight
    return y if bias is None else y + bias


class Draw:
    """Random options and tensors: a call of one of the functions by its seed."""

    def __init__(self, seed, device="cpu", half=False):
        self.choose = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.narrow = device, torch.bfloat16 if half else torch.float32

    def one(self, *options):
        return self.choose.choice(options)

    def tensor(self, *shape, like=torch.randn, wide=False):
        t = like(*shape, generator=self.generator)
        return t.to(self.device, torch.float32 if wide else self.narrow).requires_grad_()

    def maybe(self, *shape, wide=False):
        return self.tensor(*shape, wide=wide) if self.one(True, False) else None

    def decays(self, *shape, most=4):
        t = -most * torch.rand(*shape, generator=self.generator) - 0.1
        return t.to(self.device).requires_grad_()

    def packed(self, batch, length, first=0):
        changes = torch.rand(batch, length, generator=self.generator) < 0.25
        changes[:, 0] = False
        return (changes.cumsum(1) + first).to(self.device, self.one(torch.int32, torch.int64))

    def scan(self):
        batch, groups, length = self.one(1, 2, 3), self.one(1, 2, 3), self.one(1, 2, 5, 17, 33)
        dim, d_state = groups * self.one(1, 4), self.one(1, 3, 16)
        shapes = {2: (dim, d_state), 3: (batch, d_state, length), 4: (batch, groups, d_state, length)}
        softplus = self.one(True, True, False)
        return {
            "u": self.tensor(batch, dim, length),
            "delta": self.tensor(batch, dim, length, like=torch.randn if softplus else torch.rand),
            "A": self.decays(dim, d_state),
            "B": self.tensor(*shapes[self.one(2, 3, 4, 4)]),
            "C": self.tensor(*shapes[self.one(2, 3, 4, 4)]),
            "D": self.maybe(dim, wide=True),
            "z": self.maybe(batch, dim, length),
            "delta_bias": self.maybe(dim, wide=True) if softplus else None,
            "delta_softplus": softplus,
            "return_last_state": self.one(True, False),
        }

    def conv(self):
        batch, dim, length, width = self.one(1, 2, 3), self.one(1, 4, 5), self.one(1, 2, 5, 17), self.one(2, 3, 4)
        packed = self.one(True, False)
        x = self.tensor(batch, dim, length)
        return {
            "x": x.detach().mT.contiguous().mT.requires_grad_() if self.one(True, False) else x,
            "weight": self.tensor(dim, width),
            "bias": self.maybe(dim),
            "seq_idx": self.packed(batch, length, first=self.one(-1, 0)) if packed else None,
            "initial_states": self.maybe(batch, dim, width - 1),
            "return_final_states": not packed and self.one(True, False),
            "activation": self.one(None, "silu", "swish"),
        }

    def chunk_scan(self):
        batch, groups, length = self.one(1, 2, 3), self.one(1, 2), self.one(1, 2, 7, 33)
        heads, head_dim, d_state = groups * self.one(1, 2), self.one(1, 4), self.one(1, 3, 16)
        softplus, packed = self.one(True, True, False), self.one(True, False)
        row = batch, length, heads
        return {
            "x": self.tensor(*row, head_dim),
            "dt": self.tensor(*row),  # below 0 at times, which is clamped
            "A": self.decays(heads),
            "B": self.tensor(batch, length, groups, d_state),
            "C": self.tensor(batch, length, groups, d_state),
            "chunk_size": self.one(1, 4, 16, 256),
            "D": self.one(None, self.tensor(heads, wide=True), self.tensor(heads, head_dim, wide=True)),
            "z": self.maybe(*row, head_dim),
            "dt_bias": self.maybe(heads, wide=True),
            "initial_states": self.maybe(batch, heads, head_dim, d_state, wide=True),
            "seq_idx": self.packed(batch, length, first=self.one(0, 0, 1)) if packed else None,
            "dt_softplus": softplus,
            "dt_limit": self.one((0.0, float("inf")), (0.3, 0.9)),
            "return_final_states": self.one(True, False),
        }
