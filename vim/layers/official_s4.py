"""State dicts of state-spaces/s4: from the authors' names and shapes to ours."""

import torch
from torch import Tensor, nn

from .rename import rename_keys

# Names in s4.py, in s4nd.py (which numbers its kernels) and in s4d.py -> ours.
NAMES = {
    r"(?:layer\.)?D": r"D",
    r"(?:layer\.)?kernel\.(\d+\.)?inv_dt": r"kernel.\1log_dt",
    r"(?:layer\.)?kernel\.(\d+\.)?A_real": r"kernel.\1A_log",
    r"kernel\.log_A_real": r"kernel.A_log",
    r"(?:layer\.)?kernel\.(\d+\.)?(A_imag|B|C|P|l_kernel|log_dt)": r"kernel.\1\2",
    r"output_linear\.0\.(weight|bias)": r"out_proj.\1",
}


def translate(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Load-state-dict pre-hook: convert official names and shapes in place."""
    official = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
    from_s4 = any("inv_dt" in key for key in official)
    from_s4d = "kernel.log_A_real" in official
    if not (from_s4 or from_s4d):
        return
    rename_keys(NAMES, state_dict, prefix)
    wanted = module.state_dict()
    for name, own in wanted.items():
        key = prefix + name
        if key not in state_dict:
            continue
        if from_s4 and name.endswith("A_imag"):
            state_dict[key] = -state_dict[key]  # s4.py has A = -exp(A_real) - i A_imag
        if from_s4 and name.endswith((".A_log", ".A_imag", ".B", ".P")):
            state_dict[key] = _untie(state_dict[key], int(name.endswith((".B", ".P"))), len(wanted["D"]))
        if state_dict[key].numel() == own.numel():
            state_dict[key] = state_dict[key].reshape(own.shape)
    if from_s4d:  # s4d.py has B = 1
        like = state_dict[prefix + "kernel.C"][0]
        one, zero = torch.ones_like(like[..., 0]), torch.zeros_like(like[..., 0])
        state_dict[prefix + "kernel.B"] = torch.stack((one, zero), -1)


def _untie(value: Tensor, axis: int, channels: int) -> Tensor:
    """Repeat along an axis what channels share: of n_ssm systems, channel h has number h mod n_ssm."""
    return torch.cat([value] * max(1, channels // value.shape[axis]), axis)
