"""Checkpoints of the authors' code (hustvl/Vim): which weights of a file to take, and their names here."""

import re
import sys
from pathlib import Path
from types import FrameType

import torch
from timm.models import clean_state_dict, load_state_dict
from torch import Tensor, nn

# The one table of names, as (pattern, replacement) for a whole key. In the authors' code the backward direction's
# parameters carry a `_b`: conv1d_b.weight, A_b_log, D_b.
_NAMES = [
    (r"layers\.(\d+)\.norm\.(.*)", r"blocks.\1.norm.\2"),
    (r"layers\.(\d+)\.mixer\.(in_proj|out_proj)\.(.*)", r"blocks.\1.mixer.\2.\3"),
    (r"layers\.(\d+)\.mixer\.(A|D|conv1d|x_proj|dt_proj)_b(|_log|\..*)", r"blocks.\1.mixer.backward_ssm.\2\3"),
    (r"layers\.(\d+)\.mixer\.(A|D|conv1d|x_proj|dt_proj)(|_log|\..*)", r"blocks.\1.mixer.forward_ssm.\2\3"),
    (r"norm_f\.(.*)", r"norm.\1"),
]

# Class tokens of the authors' files, and the class_token of models that have them.
_CLASS_TOKENS = {
    (): ("none",),
    ("cls_token",): ("middle", "first"),
    ("cls_token_head", "cls_token_tail"): ("both",),
}


def is_official(state_dict: dict[str, Tensor]) -> bool:
    # By name: the tensors have the same shapes in both layouts.
    return any(re.match(r"layers\.\d+\.mixer\.", key) for key in state_dict)


def native_name(key: str) -> str:
    """The name here of an official parameter; names that both share come back unchanged."""
    for pattern, replacement in _NAMES:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, replacement, key)
    return key


def to_native(state_dict: dict[str, Tensor], class_token: str = "middle") -> dict[str, Tensor]:
    """An official state dict under our names, with the class entries of the position table, which is in the order of
    the sequence, moved to the front, where timm expects them. The order of the keys does not matter.

    Args:
        class_token: where the model has its class tokens, see VisionMamba. The middle and the beginning have the same
            names and shapes. A model of "none" takes any file; one class token is then in the middle.

    Raises: ValueError for a file whose class tokens stand elsewhere.
    """
    out = {native_name(key): value for key, value in state_dict.items()}
    tokens = [name for name in ("cls_token", "cls_token_head", "cls_token_tail") if name in out]
    fitting = _CLASS_TOKENS.get(tuple(tokens), ())
    anything = class_token == "none" and fitting
    if not anything and class_token not in fitting and (tokens or "pos_embed" in out):
        raise ValueError(
            f"the checkpoint has {' and '.join(tokens) or 'no class token'}, the model class_token={class_token!r}; "
            f"create it with {' or '.join(map(repr, fitting)) or 'the one of the checkpoint'}"
        )
    if tokens:
        out["cls_token"] = torch.cat([out.pop(name) for name in tokens], 1)
    if "pos_embed" in out:
        table = out["pos_embed"]
        last = table.shape[1] - 1
        places = {0: [], 1: [0 if class_token == "first" else last // 2], 2: [0, last]}[len(tokens)]
        out["pos_embed"] = table[:, places + [i for i in range(last + 1) if i not in places]]
    return out


def select_weights(checkpoint: dict, model: nn.Module) -> dict[str, Tensor]:
    """The weights to take from a training state: `model_ema` for vim_base, `model` for the others.

    These are the ones behind the reported accuracy (for base, a third party found). A state dict comes back unchanged.
    """
    for key in ("model_ema" if _prefers_ema(model) else "model", "model", "state_dict"):
        if isinstance(checkpoint.get(key), dict):
            return clean_state_dict(checkpoint[key])
    return checkpoint


def reselect_weights(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official weights that timm read from a file, exchanged for those that `select_weights` takes of it.

    timm's file loaders (`checkpoint_path=`, a cfg's `file`) take `model_ema` and hand over nothing else, while
    `pretrained=True` hands over the whole training state: the same file would give two different models. What they
    hand over does not tell where it comes from, so the path is read off the loader that is calling.
    """
    path = _file_being_loaded()
    if path is None or path.suffix == ".safetensors":
        return state_dict
    again = load_state_dict(str(path), use_ema=_prefers_ema(model))
    return again if again.keys() == state_dict.keys() else state_dict  # others: the caller has unwrapped them


def _prefers_ema(model: nn.Module) -> bool:
    return getattr(model, "pretrained_cfg", {}).get("architecture") == "vim_base"


def _file_being_loaded() -> Path | None:
    loaders = {
        ("timm.models._helpers", "load_checkpoint"): "checkpoint_path",
        ("timm.models._builder", "load_pretrained"): "pretrained_loc",
    }
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        local = loaders.get((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        if local is not None:
            source = frame.f_locals[local]
            return Path(source) if isinstance(source, (str, Path)) and Path(source).is_file() else None
        frame = frame.f_back
    return None
