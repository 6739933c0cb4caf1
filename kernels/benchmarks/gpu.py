"""Measure the Triton kernels on a GPU against the floors of the card and, where it is installed, the authors' package.

    python kernels/benchmarks/gpu.py --output kernels/benchmarks/results/gpu.md

A row is both directions of a Vim block in one call: two u, dt, B, C, A, D, dt_bias and one z give one gated y. Before a
row is timed, outputs and gradients of one batch entry are compared with the fp64 reference; a wrong kernel is not
reported. A figure is the median over rounds of a CUDA graph of many calls, so that launches from Python do not count.
"""

import argparse
import datetime
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
from torch import Tensor

from vim_kernels import bidirectional_selective_scan

D_STATE, DT_RANK = 16, 12
SHAPES = (  # batch, d_inner, length
    (128, 384, 197),
    (64, 768, 197),
    (32, 384, 1025),
    (8, 384, 6085),
    (8, 768, 6085),
    (4, 384, 6085),
    (4, 384, 16385),
    (1, 384, 6085),
    (1, 384, 65536),
)
# Ceilings of an H100 SXM: measured copy bandwidth, and 16 exponentials a clock from each of 132 multiprocessors.
BYTES_PER_SECOND, EXPONENTIALS_PER_SECOND = 3.02e12, 3.7e12
TOLERANCE = 1e-2  # of the norm, in bf16; fp32 stays under 1e-5 (the tests check it)
NAMES = ("u", "dt", "A", "B", "C", "D", "dt_bias")


def scan_inputs(batch: int, d_inner: int, length: int) -> tuple[list[list[Tensor]], Tensor, Tensor]:
    """(u, dt, A, B, C, D, dt_bias) as pairs, z, dy: laid out as a Vim block has them, z and B, C slices of a row."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    pairs: list[list[Tensor]] = [[] for _ in NAMES]
    for _ in range(2):
        row = normal(batch, length, DT_RANK + 2 * D_STATE)
        A = -torch.arange(1.0, D_STATE + 1, device="cuda").repeat(d_inner, 1)
        bias = torch.empty(d_inner, device="cuda").uniform_(-6.9, -2.3, generator=generator)  # steps of 0.001 to 0.1
        B, C = row[..., DT_RANK : DT_RANK + D_STATE], row[..., DT_RANK + D_STATE :]
        new = normal(batch, length, d_inner), normal(batch, length, d_inner), A, B, C, normal(d_inner).float(), bias
        for pair, t in zip(pairs, new, strict=True):
            pair.append(t)
    return pairs, normal(batch, length, 2 * d_inner)[..., d_inner:], normal(batch, length, d_inner)


def forward(pairs: Sequence[Sequence[Tensor]], z: Tensor, backend: str = "triton") -> Tensor:
    u, dt, A, B, C, D, dt_bias = pairs
    return bidirectional_selective_scan(u, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, backend=backend)


def gradients(pairs, z: Tensor, dy: Tensor, backend: str = "triton") -> list[Tensor]:
    """y, then the gradients of the pairs' tensors and of z."""
    pairs = [[t.detach().requires_grad_() for t in pair] for pair in pairs]
    z = z.detach().requires_grad_()
    y = forward(pairs, z, backend)
    return [y.detach(), *torch.autograd.grad(y, [t for pair in pairs for t in pair] + [z], dy)]


def check(pairs, z: Tensor, dy: Tensor) -> float:
    """Largest relative error of y and of the gradients, for a loss of batch entry 0 alone."""
    only = torch.zeros_like(dy)
    only[:1] = dy[:1]
    got = gradients(pairs, z, only)
    entry = [[t[:1] if t.dim() == 3 else t for t in pair] for pair in pairs]
    want = gradients(
        [[t.double() for t in pair] for pair in entry], z[:1].double(), dy[:1].double(), backend="reference"
    )
    errors = []
    for g, w in zip(got, want, strict=True):
        g = g[:1] if g.dim() == 3 else g
        errors.append(((g.double() - w).norm() / w.norm()).item())
    return max(errors) if all(e == e for e in errors) else float("nan")


def milliseconds(function: Callable[[], object], calls: int, rounds: int = 5) -> list[float]:
    """Time of a call in each round, sorted."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / calls)
    return sorted(times)


def measure(batch: int, d_inner: int, length: int, compare: bool) -> list[str]:
    """Cells of the rows: forward and backward."""
    pairs, z, dy = scan_inputs(batch, d_inner, length)
    if compare and not (error := check(pairs, z, dy)) < TOLERANCE:
        sys.exit(f"{(batch, d_inner, length)}: relative error {error:.1e} against the fp64 reference: not measured")
    columns = [list(pair) for pair in pairs]
    columns = [*columns[:3], *([t.unsqueeze(2) for t in pair] for pair in columns[3:5]), *columns[5:], []]
    options = z, [False, True], True, 0.5
    _, _, checkpoints, y_sum = torch.ops.vim_kernels.selective_scan(*columns, *options, True, "triton")
    calls = {
        "fwd": lambda: forward(pairs, z),
        "fwd, saving": lambda: torch.ops.vim_kernels.selective_scan(*columns, *options, True, "triton"),
        "bwd": lambda: torch.ops.vim_kernels.selective_scan_backward(
            dy, None, *columns, *options, checkpoints, y_sum, "triton"
        ),
    }
    elements = 2 * batch * d_inner * length
    exponentials = 1.25 * elements * D_STATE / EXPONENTIALS_PER_SECOND * 1e3
    row_bytes = 2 * batch * length * 2 * D_STATE * 2
    sequences = {"fwd": 6, "fwd, saving": 7, "bwd": 12}  # of (batch, length, d_inner), read or written once
    rows = []
    with torch.no_grad():
        for name, call in calls.items():
            times = milliseconds(call, calls=max(3, min(50, int(2e9 / elements / 50))))
            floor = exponentials * (2 if name == "bwd" else 1)
            moved = (sequences[name] * elements + row_bytes * (2 if name == "bwd" else 1)) / BYTES_PER_SECOND * 1e3
            median = statistics.median(times)
            rows.append(
                f"| {batch}, {d_inner}, {length} | {name} | {median:.3f} | {times[0]:.3f}-{times[-1]:.3f} "
                f"| {moved:.3f} | {floor:.3f} | {floor / median:.0%} |"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="Markdown file for the table, besides the screen")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    parser.add_argument("--no-check", action="store_true", help="while tuning: time without comparing")
    args = parser.parse_args()
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"{datetime.date.today()}",
        "",
        "| batch, d_inner, length | pass | ms | spread | bytes floor | exponential floor | of it reached |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES[: args.shapes]:
        lines += measure(*shape, compare=not args.no_check)
        print(*lines, sep="\n", flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
