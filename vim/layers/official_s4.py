"""Names and layouts of state-spaces/s4's layers, and what they are here."""

import re

import torch
from torch import Tensor, nn

# Official name -> ours, of s4.py (and s4nd.py, whose kernels are numbered) and of s4d.py.
NAMES = {
    r"(?:layer\.)?D": "D",
    r"(?:layer\.)?kernel\.(\d+\.)?inv_dt": r"kernel.\1log_dt",
    r"(?:layer\.)?kernel\.(\d+\.)?A_real": r"kernel.\1A_log",
    r"kernel\.log_A_real": "kernel.A_log",
    r"(?:layer\.)?kernel\.(\d+\.)?(A_imag|B|C|P|l_kernel|log_dt)": r"kernel.\1\2",
    r"output_linear\.0\.(weight|bias)": r"out_proj.\1",
}


def translate(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Load-state-dict hook: official names and shapes become ours in place."""
    mine = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    block, minimal = any("inv_dt" in key for key in mine), "kernel.log_A_real" in mine
    if not (block or minimal):
        return
    for name, value in mine.items():
        del state_dict[prefix + name]
        for pattern, replacement in NAMES.items():
            if match := re.fullmatch(pattern, name):
                name = match.expand(replacement)
                break
        if block and name.endswith("A_imag"):
            value = -value  # s4.py has A = -exp(A_real) - i A_imag
        state_dict[prefix + name] = value
    for name, own in module.state_dict().items():
        if prefix + name in state_dict and state_dict[prefix + name].numel() == own.numel():
            state_dict[prefix + name] = state_dict[prefix + name].reshape(own.shape)
    if minimal:  # s4d.py has B = 1
        like = state_dict[prefix + "kernel.C"][0]
        state_dict[prefix + "kernel.B"] = torch.stack(
            (torch.ones_like(like[..., 0]), torch.zeros_like(like[..., 0])), -1
        )
