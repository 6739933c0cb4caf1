"""Random inputs of `ssd`, and its recurrence step by step."""

import torch
import torch.nn.functional as F

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


def inputs(length, batch=2, heads=4, head_dim=3, groups=2, d_state=5, dtype=torch.float64):
    """Inputs like those of a trained layer: A of 1 to 16, steps around 0.1."""
    shapes = {
        "x": (batch, length, heads, head_dim),
        "dt": (batch, length, heads),
        "A": (heads,),
        "B": (batch, length, groups, d_state),
        "C": (batch, length, groups, d_state),
        "D": (heads,),
        "dt_bias": (heads,),
        "initial_state": (batch, heads, head_dim, d_state),
    }
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["A"] = -15 * torch.rand(heads, dtype=torch.float64) - 1
    tensors["dt_bias"] = tensors["dt_bias"] - 2
    return {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}


def recurrence(x, dt, A, B, C, D, dt_bias, initial_state, reverse=False, dt_softplus=True):
    """Step by step; the state is (batch, heads, head_dim, d_state)."""
    each = x.shape[2] // B.shape[2]
    delta = F.softplus(dt + dt_bias) if dt_softplus else dt + dt_bias
    h, outputs = initial_state, {}
    steps = range(x.shape[1])
    for t in reversed(steps) if reverse else steps:
        B_t, C_t = (m[:, t].repeat_interleave(each, 1) for m in (B, C))
        added = torch.einsum("bh, bhn, bhp -> bhpn", delta[:, t], B_t, x[:, t])
        h = (delta[:, t] * A).exp()[..., None, None] * h + added
        outputs[t] = torch.einsum("bhpn, bhn -> bhp", h, C_t) + D[:, None] * x[:, t]
    return torch.stack([outputs[t] for t in steps], 1) if outputs else x, h
