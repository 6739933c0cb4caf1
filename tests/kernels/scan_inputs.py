"""Random inputs of the scan, for tests and their subprocesses."""

import torch
from torch import Tensor


def scan_inputs(
    batch=2, length=37, d_inner=24, d_state=16, groups=None, *, absent=(), dtype=torch.float64, device="cpu", seed=0
) -> dict[str, Tensor]:
    """Keyword arguments of `selective_scan` without those named in `absent`; leaves that require gradients.

    Every tensor differs from every other, the steps span small and large ones, and A is in fp32 at least.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    grouped = (batch, length, d_state) if groups is None else (batch, length, groups, d_state)
    tensors = {
        "u": normal(batch, length, d_inner),
        "dt": normal(batch, length, d_inner) - 1,
        "A": -torch.rand(d_inner, d_state, generator=generator, dtype=torch.float64) * 4 - 0.1,
        "B": normal(*grouped),
        "C": normal(*grouped),
        "D": normal(d_inner),
        "z": normal(batch, length, d_inner),
        "dt_bias": normal(d_inner),
        "initial_state": normal(batch, d_inner, d_state),
    }
    keep_precision = {"A", "D", "dt_bias", "initial_state"}
    full = torch.promote_types(dtype, torch.float32)
    return {
        name: t.to(device, full if name in keep_precision else dtype).requires_grad_()
        for name, t in tensors.items()
        if name not in absent
    }


def pair_inputs(**kwargs) -> dict[str, tuple[Tensor, Tensor] | Tensor]:
    """Keyword arguments of `bidirectional_selective_scan`."""
    first, second = (scan_inputs(**kwargs, seed=seed) for seed in (1, 2))
    pairs = {name: (first[name], second[name]) for name in first if name not in ("z", "initial_state")}
    return pairs | ({"z": first["z"]} if "z" in first else {})
