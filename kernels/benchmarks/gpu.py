"""Measure the Triton kernels on a GPU against the floors of the card and, where installed, the authors' packages.

    python kernels/benchmarks/gpu.py --output kernels/benchmarks/results/gpu.md

A row is both directions of a Vim block in one call. The scan turns two sets of u, dt, B, C, A, D, dt_bias and one z
into one gated y; the convolution turns one x into two u. Before a shape is timed, outputs and gradients of one batch
entry, of a sequence cut to CHECKED steps, are compared with the fp64 reference; a wrong kernel is not reported. Figures
are medians over rounds of a CUDA graph of many calls, which excludes launches from Python. The authors' CUDA kernels
(packages mamba_ssm and causal_conv1d) take one direction: their figure is two calls, without any flip.
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

from vim_kernels import bidirectional_causal_conv1d, bidirectional_selective_scan

D_STATE, DT_RANK, WIDTH = 16, 12, 4
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
CHECKED = 1537
TOLERANCE = 1e-2  # of the norm, in bf16; fp32 stays under 1e-5 (the tests check it)

Call = Callable[[], object]
Pairs = list[list[Tensor]]


def scan_inputs(batch: int, d_inner: int, length: int) -> tuple[Pairs, Tensor, Tensor]:
    """(u, dt, A, B, C, D, dt_bias) as pairs, z, dy, laid out as in a Vim block: z, B and C are slices of rows."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    pairs: Pairs = [[] for _ in range(7)]
    for _ in range(2):
        row = normal(batch, length, DT_RANK + 2 * D_STATE)
        A = -torch.arange(1.0, D_STATE + 1, device="cuda").repeat(d_inner, 1)
        bias = torch.empty(d_inner, device="cuda").uniform_(-6.9, -2.3, generator=generator)  # steps of 0.001 to 0.1
        B, C = row[..., DT_RANK : DT_RANK + D_STATE], row[..., DT_RANK + D_STATE :]
        new = normal(batch, length, d_inner), normal(batch, length, d_inner), A, B, C, normal(d_inner).float(), bias
        for pair, t in zip(pairs, new, strict=True):
            pair.append(t)
    return pairs, normal(batch, length, 2 * d_inner)[..., d_inner:], normal(batch, length, d_inner)


def scan(pairs: Pairs, z: Tensor, backend: str = "triton") -> Tensor:
    u, dt, A, B, C, D, dt_bias = pairs
    return bidirectional_selective_scan(u, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, backend=backend)


def scan_and_gradients(pairs: Pairs, z: Tensor, dy: Tensor, backend: str = "triton") -> list[Tensor]:
    """y, then the gradients of the pairs' tensors and of z."""
    pairs = [[t.detach().requires_grad_() for t in pair] for pair in pairs]
    z = z.detach().requires_grad_()
    y = scan(pairs, z, backend)
    return [y.detach(), *torch.autograd.grad(y, [t for pair in pairs for t in pair] + [z], dy)]


def conv_and_gradients(x: Tensor, weights: list[Tensor], biases: list[Tensor], dy: Tensor, backend: str = "triton"):
    """Both outputs, then the gradients of x, the weights and the biases."""
    inputs = [t.detach().requires_grad_() for t in (x, *weights, *biases)]
    outputs = bidirectional_causal_conv1d(inputs[0], inputs[1:3], inputs[3:], activation="silu", backend=backend)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, [dy, dy.flip(2)])]


def error_of(gradients: Callable[..., list[Tensor]], sequences: Sequence, dy: Tensor) -> float:
    """Largest error of outputs and gradients as a fraction of their norm, for a loss on batch entry 0 only.

    sequences: arguments of `gradients`, tensors or lists of tensors; three-dimensional ones have a batch.
    """

    def first(t):
        return [first(each) for each in t] if isinstance(t, list) else (t[:1] if t.dim() == 3 else t)

    def double(t):
        return [double(each) for each in t] if isinstance(t, list) else t.double()

    only = torch.zeros_like(dy)
    only[:1] = dy[:1]
    got = gradients(*sequences, only)
    want = gradients(*(double(first(t)) for t in sequences), dy[:1].double(), backend="reference")
    errors = [((first(g).double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]
    return max(errors) if all(e == e for e in errors) else float("nan")


def check(batch: int, d_inner: int, length: int) -> None:
    """Exit if a kernel is wrong."""
    pairs, z, dy = scan_inputs(batch, d_inner, min(length, CHECKED))
    x, weights, biases = conv_inputs(z)
    for name, error in {
        "scan": error_of(scan_and_gradients, (pairs, z), dy),
        "convolution": error_of(conv_and_gradients, (x, weights, biases), dy),
    }.items():
        if not error < TOLERANCE:
            sys.exit(f"{name} at {(batch, d_inner, length)}: error {error:.1e} of the norm: not measured")


def conv_inputs(x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator("cuda").manual_seed(1)
    shape = {"generator": generator, "device": "cuda"}
    return (
        x,
        [torch.randn(x.shape[2], WIDTH, **shape) for _ in range(2)],
        [torch.randn(x.shape[2], **shape) for _ in range(2)],
    )


def kernel_calls(pairs: Pairs, z: Tensor, dy: Tensor) -> dict[str, Call]:
    """The timed calls by row name. With "saving", a forward pass saves the tensors for the backward."""
    columns = [list(pair) for pair in pairs]
    columns = [*columns[:3], *([t.unsqueeze(2) for t in pair] for pair in columns[3:5]), *columns[5:], []]
    options = z, None, [False, True], True, 0.5
    _, _, checkpoints, y_sum = torch.ops.vim_kernels.selective_scan(*columns, *options, True, "triton")
    convolution = *conv_inputs(z), None, None, True, [False, True], "triton"
    return {
        "scan fwd": lambda: scan(pairs, z),
        "scan fwd, saving": lambda: torch.ops.vim_kernels.selective_scan(*columns, *options, True, "triton"),
        "scan bwd": lambda: torch.ops.vim_kernels.selective_scan_backward(
            dy, None, *columns, *options, checkpoints, y_sum, "triton"
        ),
        "conv fwd": lambda: torch.ops.vim_kernels.causal_conv1d(*convolution),
        "conv bwd": lambda: torch.ops.vim_kernels.causal_conv1d_backward([dy, dy], *convolution),
    }


def authors_calls(pairs: Pairs, z: Tensor, dy: Tensor) -> dict[str, Call]:
    """The authors' kernels on the same inputs in their layout, (B, E, L); empty if they are not installed.

    A backward call includes the forward pass; see `authors_milliseconds`.
    """
    try:
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return {}

    def channels_first(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous() if t.dim() == 3 else t

    directions = [[channels_first(pair[i]).detach().requires_grad_() for pair in pairs] for i in range(2)]
    z, dy = channels_first(z).detach().requires_grad_(), channels_first(dy)
    x, weights, biases = conv_inputs(z.detach().transpose(1, 2))
    x = channels_first(x).requires_grad_()

    def scans() -> list[Tensor]:
        return [
            selective_scan_fn(u, dt, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)
            for u, dt, A, B, C, D, bias in directions
        ]

    def convolutions() -> list[Tensor]:
        return [
            causal_conv1d_fn(x, w.bfloat16(), b.bfloat16(), activation="silu")
            for w, b in zip(weights, biases, strict=True)
        ]

    inputs = [t for direction in directions for t in direction] + [z]
    return {
        "scan fwd": scans,
        "scan bwd": lambda: torch.autograd.grad(scans(), inputs, [dy, dy]),
        "conv fwd": convolutions,
        "conv bwd": lambda: torch.autograd.grad(convolutions(), [x], [dy, dy]),
    }


def authors_milliseconds(calls: dict[str, Call]) -> dict[str, float]:
    """Medians by row name. The time of a backward is that of its call minus the forward."""
    found = {}
    for name, call in calls.items():
        times = []
        for _ in range(20):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        found[name] = statistics.median(times[5:])
    return {name: t - found[name.replace("bwd", "fwd")] if "bwd" in name else t for name, t in found.items()}


def milliseconds(function: Call, calls: int, rounds: int = 5) -> list[float]:
    """Time per call in each round, sorted."""
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


def floors(name: str, batch: int, d_inner: int, length: int) -> tuple[float, float]:
    """Milliseconds to move the bytes once, and to compute the exponentials (0 if negligible)."""
    # 16-bit sequences (batch, length, d_inner) that are read or written once.
    sequences = {"scan fwd": 6, "scan fwd, saving": 7, "scan bwd": 12, "conv fwd": 3, "conv bwd": 4}[name]
    moved = sequences * batch * length * d_inner * 2
    steps = 2 * batch * length * d_inner
    if name.startswith("conv"):
        return moved / BYTES_PER_SECOND * 1e3, 0.0
    backward = 2 if name == "scan bwd" else 1  # it recomputes the states, and reads and writes B and C
    moved += backward * 2 * batch * length * 2 * D_STATE * 2
    # A quarter on top for softplus and silu.
    return moved / BYTES_PER_SECOND * 1e3, backward * 1.25 * steps * D_STATE / EXPONENTIALS_PER_SECOND * 1e3


def measure(batch: int, d_inner: int, length: int) -> list[str]:
    """Rows of the table."""
    pairs, z, dy = scan_inputs(batch, d_inner, length)
    authors = authors_milliseconds(authors_calls(pairs, z, dy))
    calls = max(3, min(50, int(2e7 / (batch * d_inner * length))))
    rows = []
    with torch.no_grad():
        for name, call in kernel_calls(pairs, z, dy).items():
            times = milliseconds(call, calls)
            median = statistics.median(times)
            moving, exponentials = floors(name, batch, d_inner, length)
            peer = f"{authors[name]:.3f} ({authors[name] / median:.1f}x)" if name in authors else "-"
            rows.append(
                f"| {batch}, {d_inner}, {length} | {name} | {median:.3f} | {times[0]:.3f}-{times[-1]:.3f} "
                f"| {moving:.3f} | {exponentials:.3f} | {max(moving, exponentials) / median:.0%} | {peer} |"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="measure only this many of the shapes")
    parser.add_argument("--no-check", action="store_true", help="for tuning: skip the comparison with the reference")
    args = parser.parse_args()
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"{datetime.date.today()}, `python kernels/benchmarks/gpu.py`. Milliseconds, bf16, both directions in a call.",
        "",
        "| batch, d_inner, length | pass | ms | spread | bytes floor | exponential floor | of the higher | authors' |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    for shape in SHAPES[: args.shapes]:
        if not args.no_check:
            check(*shape)
        rows = measure(*shape)
        lines += rows
        print(*rows, sep="\n", flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
