"""Random checkpoints of Mamba language models in both formats, and their logits by a loop over the steps."""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

TRANSFORMERS = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "state_size": 4,
    "conv_kernel": 4,
    "expand": 2,
    "time_step_rank": 1,
    "layer_norm_epsilon": 1e-5,
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_min": 0.01,  # for initial values only
    "eos_token_id": 0,
}


def random_weights(options, rms_norm=True):
    """By name, without the prefix `backbone.`; options: those of transformers."""
    d, inner, rank = options["hidden_size"], options["intermediate_size"], options["time_step_rank"]
    shapes = {"embeddings.weight": (options["vocab_size"], d), "norm_f.weight": (d,), "norm_f.bias": (d,)}
    for i in range(options["num_hidden_layers"]):
        shapes |= {
            f"layers.{i}.norm.weight": (d,),
            f"layers.{i}.norm.bias": (d,),
            f"layers.{i}.mixer.in_proj.weight": (2 * inner, d),
            f"layers.{i}.mixer.in_proj.bias": (2 * inner,),
            f"layers.{i}.mixer.conv1d.weight": (inner, 1, options["conv_kernel"]),
            f"layers.{i}.mixer.conv1d.bias": (inner,),
            f"layers.{i}.mixer.x_proj.weight": (rank + 2 * options["state_size"], inner),
            f"layers.{i}.mixer.dt_proj.weight": (inner, rank),
            f"layers.{i}.mixer.dt_proj.bias": (inner,),
            f"layers.{i}.mixer.A_log": (inner, options["state_size"]),
            f"layers.{i}.mixer.D": (inner,),
            f"layers.{i}.mixer.out_proj.weight": (d, inner),
            f"layers.{i}.mixer.out_proj.bias": (d,),
        }
    absent = tuple(
        ending
        for ending, there in (
            (("norm.bias", "norm_f.bias"), not rms_norm),
            (("in_proj.bias", "out_proj.bias"), options["use_bias"]),
            (("conv1d.bias",), options["use_conv_bias"]),
        )
        if not there
        for ending in ending
    )
    return {name: 0.4 * torch.randn(shape) for name, shape in shapes.items() if not name.endswith(absent)}


def write_transformers(folder, **changes):
    """Write a random checkpoint in the format of transformers. Returns: the weights in fp64 and the options."""
    options = TRANSFORMERS | changes
    weights = random_weights(options)
    folder.mkdir(exist_ok=True)
    save_file({f"backbone.{name}": value for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(options))
    return {name: value.double() for name, value in weights.items()}, options


def write_authors(folder, *, rms_norm, ssm_cfg, **changes):
    """The same in the format of the authors' repositories, with tied embeddings.

    ssm_cfg: the authors' options of a mixer. changes: the other options, under the names of transformers.
    """
    names = {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "dt_rank": "time_step_rank"}
    names |= {"bias": "use_bias", "conv_bias": "use_conv_bias"}
    options = TRANSFORMERS | changes | {names[name]: value for name, value in ssm_cfg.items() if name in names}
    options["intermediate_size"] = int(options["expand"] * options["hidden_size"])
    weights = random_weights(options, rms_norm)
    official = {f"backbone.{name.replace('embeddings', 'embedding')}": value for name, value in weights.items()}
    official["lm_head.weight"] = weights["embeddings.weight"]
    folder.mkdir(exist_ok=True)
    torch.save(official, folder / "pytorch_model.bin")
    config = {
        "d_model": options["hidden_size"],
        "n_layer": options["num_hidden_layers"],
        "vocab_size": options["vocab_size"],
        "ssm_cfg": {"d_state": options["state_size"], "dt_rank": options["time_step_rank"]} | ssm_cfg,
        "rms_norm": rms_norm,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return {name: value.double() for name, value in weights.items()}, options


def by_hand(weights, options, ids, rms_norm=True):
    """Logits in fp64, by a loop over the steps."""

    def norm(x, name):
        x = x if rms_norm else x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + options["layer_norm_epsilon"]).sqrt()
        return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)

    def linear(x, w, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    n, rank, taps = options["state_size"], options["time_step_rank"], options["conv_kernel"]
    x = weights["embeddings.weight"][ids]
    for i in range(options["num_hidden_layers"]):
        w = {name.split(".", 3)[-1]: v for name, v in weights.items() if name.startswith(f"layers.{i}.mixer.")}
        u, z = linear(norm(x, f"layers.{i}.norm"), w, "in_proj").chunk(2, -1)
        windows = F.pad(u, (0, 0, taps - 1, 0)).unfold(1, taps, 1)
        u = F.silu((windows * w["conv1d.weight"][:, 0]).sum(-1) + w.get("conv1d.bias", 0))
        dt, B, C = (u @ w["x_proj.weight"].T).split([rank, n, n], -1)
        dt = F.softplus(linear(dt, w, "dt_proj"))
        h, ys = torch.zeros(*u[:, 0].shape, n, dtype=u.dtype), []
        for t in range(u.shape[1]):
            step = dt[:, t, :, None]
            h = (step * -w["A_log"].exp()).exp() * h + step * B[:, t, None] * u[:, t, :, None]
            ys.append((h * C[:, t, None]).sum(-1))
        x = x + linear((torch.stack(ys, 1) + w["D"] * u) * F.silu(z), w, "out_proj")
    return norm(x, "norm_f") @ weights.get("lm_head.weight", weights["embeddings.weight"]).T
