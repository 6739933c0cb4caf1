"""Measure the CPU backends of the scan and the convolution against plain PyTorch, in one run.

    python kernels/benchmarks/cpu_scan.py --output kernels/benchmarks/results/cpu_scan.md

Every contender is first checked against the fp64 reference; if one is wrong, nothing is reported. Contenders take
turns, so a slow period of the machine hits all of them. Figures are medians over the rounds. The machine should be
idle: torch's threads spin while they wait, so another busy process multiplies the time of the small operators of
`reference` and `torch`.
"""

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_kernels import bidirectional_selective_scan, causal_conv1d, selective_scan
from vim_kernels.cpu_kernels import library as cpu

BATCH, D_INNER, D_STATE = 8, 384, 16  # Vim-Ti
LENGTHS = (197, 785, 3137)  # images of 224, 448 and 896 pixels in patches of 16
SMALL = ((64, 17, 128), (64, 50, 192))  # batch, length, d_inner of the quick-start models
TOLERANCE = 1e-5  # of the largest value of each tensor


def scan_inputs(batch: int, length: int, d_inner: int = D_INNER) -> list[Tensor]:
    """u, dt, A, B, C, D, z, dt_bias with the values of a trained model."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    A = -torch.arange(1.0, D_STATE + 1).repeat(d_inner, 1)
    sequence, states = (batch, length, d_inner), (batch, length, D_STATE)
    bias = torch.empty(d_inner).uniform_(-6.9, -2.3, generator=generator)  # steps of 0.001 to 0.1
    tensors = normal(*sequence), normal(*sequence), A, normal(*states), normal(*states), normal(d_inner)
    return [t.requires_grad_() for t in (*tensors, normal(*sequence), bias)]


def scan(tensors: list[Tensor], backend: str) -> Tensor:
    u, dt, A, B, C, D, z, dt_bias = tensors
    return selective_scan(u, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, backend=backend)


def pair_inputs(batch: int, length: int, d_inner: int = D_INNER) -> list[Tensor]:
    """The tensors of the first direction, then those of the second, which shares z."""
    first, second = (scan_inputs(batch, length, d_inner) for _ in range(2))
    return [*first, *second[:6], second[7]]


def both_scans(tensors: list[Tensor], backend: str) -> Tensor:
    """Both directions of a Vim block."""
    *first, z, first_bias = tensors[:8]
    u, dt, A, B, C, D, dt_bias = zip([*first, first_bias], tensors[8:], strict=True)
    return bidirectional_selective_scan(u, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, backend=backend)


def conv_inputs(batch: int, length: int, d_inner: int = D_INNER) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, length, d_inner), (d_inner, 4), (d_inner,)
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


def conv(tensors: list[Tensor], backend: str) -> Tensor:
    return causal_conv1d(*tensors, activation="silu", backend=backend)


def conv1d(tensors: list[Tensor]) -> Tensor:
    """The same by F.conv1d, which is channel-first."""
    x, weight, bias = tensors
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[2])).transpose(1, 2)


Contender = Callable[[list[Tensor]], Tensor]


def check(name: str, run: Contender, right: Contender, inputs: list[Tensor]) -> float:
    """Largest error of output and gradients, relative to the largest value of the tensor; exits if it is too large."""

    def results(run: Contender, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        y = run(leaves)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    pairs = zip(results(run, torch.float32), results(right, torch.float64), strict=True)
    worst = max(((got - want).abs().max() / want.abs().max()).item() for got, want in pairs)
    if not worst <= TOLERANCE:
        sys.exit(f"{name} is wrong: error {worst:.1e} of the largest value, allowed {TOLERANCE:.0e}; nothing reported")
    return worst


def measure(contenders: dict[str, Contender], inputs: list[Tensor], rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of forward without gradients, and of forward + backward."""
    with torch.no_grad():
        dy = torch.randn_like(next(iter(contenders.values()))(inputs))
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            with torch.no_grad():
                run(inputs)
            middle = time.perf_counter()
            torch.autograd.grad(run(inputs), inputs, dy)
            end = time.perf_counter()
            times[name][0].append((middle - start) * 1e3)
            times[name][1].append((end - middle) * 1e3)
    return {name: (statistics.median(f[1:]), statistics.median(fb[1:])) for name, (f, fb) in times.items()}


def table(contenders: dict[str, tuple[float, float]], peer: str) -> str:
    rows = [f"| | forward ms | forward + backward ms | times faster than {peer} |", "|---|---|---|---|"]
    for name, (forward, both) in contenders.items():
        rows.append(f"| {name} | {forward:.2f} | {both:.2f} | {contenders[peer][1] / both:.1f} |")
    return "\n".join(rows)


def machine() -> str:
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), model)
    command, _ = cpu._compiler([])
    compiler = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    date = datetime.datetime.now(datetime.UTC).date()
    return (
        f"{model}, {torch.get_num_threads()} threads; torch {torch.__version__}, {compiler.splitlines()[0]}, "
        f"Python {platform.python_version()}; OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'not set')}, "
        f"load average at the start {os.getloadavg()[0]:.1f}; {date}; fp32, d_state {D_STATE}"
    )


def report(rounds: int) -> str:
    backends: dict[str, Contender] = {
        name: (lambda tensors, name=name: scan(tensors, name)) for name in ("reference", "torch", "cpu")
    }
    two: dict[str, Contender] = {name: (lambda t, name=name: both_scans(t, name)) for name in ("reference", "cpu")}
    convs: dict[str, Contender] = {"F.conv1d": conv1d, "cpu": lambda tensors: conv(tensors, "cpu")}
    error = max(
        *(check(name, run, backends["reference"], scan_inputs(2, LENGTHS[0])) for name, run in backends.items()),
        check("cpu", backends["cpu"], backends["reference"], scan_inputs(1, LENGTHS[-1], 32)),
        check("cpu, two directions", two["cpu"], two["reference"], pair_inputs(2, LENGTHS[0])),
        *(check(name, run, lambda t: conv(t, "reference"), conv_inputs(2, LENGTHS[0])) for name, run in convs.items()),
    )

    parts = [
        "# CPU backends of the scan and the convolution",
        f"{machine()}. Medians of {rounds} rounds in which the contenders take turns. "
        f"Errors against the fp64 reference, gradients included: at most {error:.0e} of the largest value.",
    ]
    at = f"batch {BATCH}, length {LENGTHS[0]}, d_inner {D_INNER}"
    parts += [f"## Scan with D, z, dt_bias and softplus: {at}"]
    parts += [table(measure(backends, scan_inputs(BATCH, LENGTHS[0]), rounds), "reference")]
    parts += [
        "Bar: `cpu` 5 times faster than `reference` (stretch 10), `torch` no slower.",
        "Both directions in one call:",
    ]
    parts += [table(measure(two, pair_inputs(BATCH, LENGTHS[0]), rounds), "reference")]

    growth = {n: measure({"cpu": backends["cpu"]}, scan_inputs(BATCH, n), rounds)["cpu"] for n in LENGTHS}
    rows = ["| length | forward ms | forward + backward ms | time's growth / length's growth |", "|---|---|---|---|"]
    for n, (forward, both) in growth.items():
        ratio = both / growth[LENGTHS[0]][1] / (n / LENGTHS[0])
        rows.append(f"| {n} | {forward:.2f} | {both:.2f} | {ratio:.2f} |")
    parts += ["## Growth of `cpu` with the length", "\n".join(rows), "Bar: 1.3 (stretch 1.1)."]

    parts += ["## Small sizes, both directions, and the overhead of a call"]
    small = {f"{b} x {n} x {e}": measure({"cpu": two["cpu"]}, pair_inputs(b, n, e), rounds)["cpu"] for b, n, e in SMALL}
    small["1 x 1 x 1"] = measure({"cpu": two["cpu"]}, pair_inputs(1, 1, 1), 10 * rounds)["cpu"]
    rows = ["| batch x length x d_inner | forward ms | forward + backward ms |", "|---|---|---|"]
    parts += ["\n".join([*rows, *(f"| {name} | {f:.2f} | {fb:.2f} |" for name, (f, fb) in small.items())])]

    parts += [f"## Causal convolution, width 4, bias and silu: {at}"]
    parts += [table(measure(convs, conv_inputs(BATCH, LENGTHS[0]), rounds), "F.conv1d")]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = report(options.rounds)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)


if __name__ == "__main__":
    main()
