"""Checkpoints of the authors' code: which weights of a file to take, and how Vim's are named here.

The other families share Vim's names in part; each has its own table, next to its model.

A released file is a training state with two sets of weights: `model`, and its EMA `model_ema`. The pretrained cfg of a
variant says which set gave the reported accuracy: `model_ema` if its `notes` hold EMA_NOTE, `model` if not. With
ONE_SET_NOTE the files have `model` only.
`pretrained=True`, a `file` in the cfg, `checkpoint_filter_fn` and our tools take that set.

timm's `checkpoint_path=` and `load_checkpoint` unwrap a file before the model sees it. They take `model_ema` whenever
the file has it; `load_checkpoint(model, path, use_ema=False)` takes `model`. To load a released file from disk use
`timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path})`.
"""

import re
from typing import Any

import torch
from timm.models import clean_state_dict, load_state_dict
from torch import Tensor

from vim.layers.rename import rename

# Official name -> ours. The authors mark parameters of the backward direction with `_b`: conv1d_b.weight, A_b_log, D_b.
NAMES = {
    r"layers\.(\d+)\.norm\.(.*)": r"blocks.\1.norm.\2",
    r"layers\.(\d+)\.mixer\.(in_proj|out_proj)\.(.*)": r"blocks.\1.mixer.\2.\3",
    r"layers\.(\d+)\.mixer\.(A|D|conv1d|x_proj|dt_proj)_b(|_log|\..*)": r"blocks.\1.mixer.backward_ssm.\2\3",
    r"layers\.(\d+)\.mixer\.(A|D|conv1d|x_proj|dt_proj)(|_log|\..*)": r"blocks.\1.mixer.forward_ssm.\2\3",
    r"norm_f\.(.*)": r"norm.\1",
}
# Adventurer and ARM share the names of all but their mixers.
NAMES_WITH_MLP = {
    r"layers\.(\d+)\.mlp\.w1\.(.*)": r"blocks.\1.mlp.fc1_g.\2",
    r"layers\.(\d+)\.mlp\.w2\.(.*)": r"blocks.\1.mlp.fc1_x.\2",
    r"layers\.(\d+)\.mlp\.w3\.(.*)": r"blocks.\1.mlp.fc2.\2",
    r"layers\.(\d+)\.(.*)": r"blocks.\1.\2",
    r"norm_f\.(.*)": r"norm.\1",
}

# Class tokens in a file -> the values of class_token whose models can load it.
_CLASS_TOKENS = {
    (): ("none",),
    ("cls_token",): ("middle", "first"),
    ("cls_token_head", "cls_token_tail"): ("both",),
}

# PretrainedCfg has no field for this, and timm refuses unknown ones.
EMA_NOTE = "weights: model_ema"
ONE_SET_NOTE = "weights: one set"  # the released files have no EMA


def is_official(state_dict: dict[str, Tensor]) -> bool:
    # By name: the tensors have the same shapes in both layouts.
    return any(re.match(r"layers\.\d+\.mixer\.", key) for key in state_dict)


def to_native(state_dict: dict[str, Tensor], class_token: str = "middle") -> dict[str, Tensor]:
    """Convert an official state dict, with its keys in any order.

    The official position table is in the order of the sequence; here its class entries come first, as timm expects.

    Args:
        class_token: of the model, see VisionMamba. "middle" and "first" have the same names and shapes. A model with
            "none" takes any file; a single class token is then taken to be in the middle.

    Raises: ValueError for a file with other class tokens.
    """
    out = {rename(NAMES, key): value for key, value in state_dict.items()}
    tokens = [name for name in ("cls_token", "cls_token_head", "cls_token_tail") if name in out]
    fitting = _CLASS_TOKENS.get(tuple(tokens), ())
    fits = class_token in fitting or (class_token == "none" and bool(fitting))
    if not fits and (tokens or "pos_embed" in out):
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


def takes_ema(cfg: dict[str, Any]) -> bool:
    """Whether a pretrained cfg asks for `model_ema`."""
    return EMA_NOTE in (cfg.get("notes") or ())


def may_be_ema(cfg: dict[str, Any]) -> bool:
    """Whether weights without their training state may be an EMA that the pretrained cfg does not ask for."""
    return bool(cfg.get("hf_hub_id")) and not {EMA_NOTE, ONE_SET_NOTE} & set(cfg.get("notes") or ())


def select_weights(checkpoint: dict[str, Any], cfg: dict[str, Any]) -> dict[str, Tensor]:
    """The set of weights that the cfg asks for, from a training state. A state dict comes back unchanged."""
    for key in ("model_ema" if takes_ema(cfg) else "model", "model", "state_dict"):
        if isinstance(checkpoint.get(key), dict):
            return clean_state_dict(checkpoint[key])
    return checkpoint


def reload_file(state_dict: dict[str, Tensor], cfg: dict[str, Any]) -> dict[str, Tensor]:
    """Official weights that timm read from the cfg's `file`: replaced by `model` if the cfg asks for that.

    timm takes `model_ema` from a `file`, but passes on the whole training state of a download.
    """
    file, elsewhere = cfg.get("file"), cfg.get("source") in ("local-dir", "hf-hub") or cfg.get("state_dict")
    if elsewhere or not file or str(file).endswith(".safetensors") or takes_ema(cfg) or not is_official(state_dict):
        return state_dict
    again = load_state_dict(str(file), use_ema=False)
    return again if again.keys() == state_dict.keys() else state_dict  # other keys: the caller removed a wrapper
