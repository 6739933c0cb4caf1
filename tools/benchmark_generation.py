"""Measure how fast a Mamba language model of 130 M parameters generates text, ours and the one in transformers.

python tools/benchmark_generation.py --batch_sizes 1 64 --precision bf16 --output generation.json

Both have the same random weights, and their logits are compared first. They take turns, and the medians of all rounds
count. Without transformers, ours runs alone.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from vim.console.environment import device_name, versions
from vim.console.progress import plain_console
from vim.files import write_json
from vim.models.lm_checkpoint import official_name
from vim.models.mamba_lm import MambaLM
from vim.timm_models.precision import DTYPES

PROMPT = 16
Generate = Callable[[Tensor, int], Tensor]


def transformers_like(model: MambaLM) -> Generate | None:
    """Greedy generation by transformers with the same weights; None without the package.

    Raises: RuntimeError if its logits differ.
    """
    try:
        from transformers import MambaConfig, MambaForCausalLM
    except ModuleNotFoundError:
        return None
    weight = model.embedding.weight
    config = MambaConfig(
        vocab_size=weight.shape[0], hidden_size=weight.shape[1], num_hidden_layers=len(model.blocks), state_size=16
    )
    peer = MambaForCausalLM(config).to(weight.device, weight.dtype).eval()
    names = {"backbone.embedding.weight": "backbone.embeddings.weight"}
    weights = {official_name(name): value for name, value in model.state_dict().items()}
    peer.load_state_dict({names.get(name, name): value for name, value in weights.items()})
    ids = torch.arange(40, device=weight.device).view(2, 20)
    ours, theirs = model(ids).float(), peer(ids).logits[..., : model.vocab_size].float()
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not error < (0.03 if weight.dtype == torch.bfloat16 else 1e-4):
        raise RuntimeError(f"logits differ from those of transformers by {error:.1e} of their norm")
    print(f"logits differ from those of transformers by {error:.1e} of their norm")

    def generate(ids: Tensor, new: int) -> Tensor:
        mask = torch.ones_like(ids)
        return peer.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    return generate


def seconds(generate: Generate, ids: Tensor, new: int) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    generate(ids, new)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1], help="sequences to generate at once")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    parser.add_argument("--tokens", type=int, default=100, help="extra tokens of a long run, which are timed")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, after a warm-up")
    parser.add_argument("--output", type=os.path.expanduser, default=None, help="JSON file to write")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = MambaLM(50277, device=device).to(DTYPES[args.precision]).eval()
    contenders: dict[str, Generate] = {"vim": model.generate}
    if (peer := transformers_like(model)) is not None:
        contenders["transformers"] = peer
    name = device_name(torch.device(device)) + ("" if device == "cuda" else f", {torch.get_num_threads()} threads")
    report = {"device": name, "versions": versions(), "precision": args.precision, "rows": []}
    table = Table("sequences", "", "ms a step", "tokens/s", "prompt, ms", title=f"{name}, {args.precision}")
    for batch in args.batch_sizes:
        ids = torch.randint(50277, (batch, PROMPT), device=device)
        steps: dict[str, list[float]] = {key: [] for key in contenders}
        prompts: dict[str, list[float]] = {key: [] for key in contenders}
        for round_ in range(args.rounds + 1):
            for key, generate in contenders.items():
                # Both runs capture a CUDA graph, so their difference is the time of the steps alone.
                short, long = seconds(generate, ids, 3), seconds(generate, ids, 3 + args.tokens)
                if round_ > 0:  # the first warms up
                    steps[key].append((long - short) / args.tokens)
                    prompts[key].append(seconds(generate, ids, 1))
        for key in contenders:
            step, prompt = statistics.median(steps[key]), statistics.median(prompts[key])
            row = {"batch": batch, "who": key, "step_seconds": step, "prompt_seconds": prompt}
            report["rows"].append(row | {"rounds": steps[key]})
            table.add_row(str(batch), key, f"{1e3 * step:.2f}", f"{batch / step:,.0f}", f"{1e3 * prompt:.1f}")
    plain_console().print(table)
    if args.output is not None:
        write_json(report, Path(args.output))


if __name__ == "__main__":
    main()
