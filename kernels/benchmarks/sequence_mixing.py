"""Measure sequence mixers: the selective scan, state-space duality, and S4D's convolution.

    python kernels/benchmarks/sequence_mixing.py --output sequence_mixing.json

One direction, d_inner 384. The scan has a decay, a step and a bias per channel, duality one per head of 64 channels.
The convolution makes its kernels from S4D's parameters in every call. On a GPU inputs are bf16 (the FFT computes in
fp32) and all lengths are measured; on a CPU inputs are fp32 and only the short lengths are measured. Operators are
called as in a model without CUDA graphs: launches from Python count, and duality has the most of them.

Before a length is timed, output and gradients of every operator, for a batch of one and at most CHECKED steps, are
compared with a plain recurrence in fp64; if one is wrong, nothing is reported. Operators take turns, so a slow period
of the machine hits all of them. Figures are medians over the rounds. On a CPU the machine should be idle, or
OMP_NUM_THREADS be 1: torch's threads spin while they wait.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vim.layers.linear_system import MATRIX
from vim.layers.s4d import DiagonalKernel
from vim_kernels import long_conv, selective_scan, ssd
from vim_kernels.backends import resolve
from vim_kernels.long_conv import Method

D_INNER, HEAD_DIM, D_STATES = 384, 64, (16, 64)
LENGTHS = (197, 1024, 6084, 65536)  # images of 224, 512, 1248 and 4096 pixels in patches of 16
TOKENS = {"cpu": 1576, "cuda": 65536}  # per batch
CHECKED = 4609  # more chunks than duality joins in one product
# As a fraction of each tensor's norm. S4D's fp32 gradients need 1e-4, because its phases grow with the length.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

Run = Callable[..., Tensor]


class Operator(NamedTuple):
    run: Run
    right: Run  # the same as a plain recurrence
    inputs: list[Tensor]


def operators(batch: int, length: int, d_state: int, device: str) -> dict[str, Operator]:
    """Operators with inputs like those of a trained model; outputs of projections have the measured precision."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(*shape, device=device).uniform_(low, high, generator=generator)

    heads = D_INNER // HEAD_DIM
    sequence = batch, length, D_INNER
    scanned = [
        normal(*sequence),
        normal(*sequence),
        -torch.arange(1.0, d_state + 1, device=device).repeat(D_INNER, 1),
        normal(batch, length, d_state),
        normal(batch, length, d_state),
        uniform(-6.9, -2.3, D_INNER),  # steps of 0.001 to 0.1
    ]
    dual = [
        normal(batch, length, heads, HEAD_DIM),
        normal(batch, length, heads),
        uniform(-16, -1, heads),
        normal(batch, length, 1, d_state),
        normal(batch, length, 1, d_state),
        uniform(-6.9, -2.3, heads),
    ]
    torch.manual_seed(0)
    kernel = DiagonalKernel(D_INNER, d_state, device=device)
    names = [name for name, _ in kernel.named_parameters()]

    def convolve(method: Method, u: Tensor, *parameters: Tensor) -> Tensor:
        made = functional_call(kernel, dict(zip(names, parameters, strict=True)), (u.shape[1],))
        return long_conv(u, made[0], method=method)

    def recur(u: Tensor, *parameters: Tensor) -> Tensor:
        system = functional_call(System(kernel), {f"kernel.{n}": p for n, p in zip(names, parameters, strict=True)}, ())
        return system.recurrent(u)[0]

    system = [normal(*sequence), *kernel.parameters()]
    found = {
        "selective_scan": Operator(scan, partial(scan, backend="reference"), scanned),
        "ssd": Operator(lambda *inputs: ssd(*inputs[:5], dt_bias=inputs[5]), scan_by_head, dual),
        "long_conv_fft": Operator(partial(convolve, "fft"), recur, system),
    }
    if length <= MATRIX:
        found["long_conv_matrix"] = Operator(partial(convolve, "matrix"), recur, system)
    return found


class System(nn.Module):
    """A kernel whose forward returns its recurrence."""

    def __init__(self, kernel: DiagonalKernel):
        super().__init__()
        self.kernel = kernel

    def forward(self):
        return self.kernel.system()


def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor, backend: str = "auto") -> Tensor:
    return selective_scan(u, dt, A, B, C, dt_bias=dt_bias, backend=backend)


def scan_by_head(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor) -> Tensor:
    """`ssd` as a selective scan whose channels repeat the values of their head."""
    dt, A, dt_bias = (t.repeat_interleave(x.shape[3], -1) for t in (dt, A, dt_bias))
    A = A.unsqueeze(1).expand(-1, B.shape[3])
    return scan(x.flatten(2), dt, A, B, C, dt_bias, backend="reference").view_as(x)


def check(length: int, d_state: int, device: str) -> dict[str, float]:
    """Largest error of output and gradients by operator, as a fraction of the tensor's norm; exits if one is wrong."""
    found = {}
    for name, (run, right, inputs) in operators(1, min(length, CHECKED), d_state, device).items():

        def results(run: Run, inputs: list[Tensor], dy: Tensor | None = None) -> list[Tensor]:
            leaves = [t.detach().requires_grad_() for t in inputs]
            y = run(*leaves)
            # The gradient of y^2 / 2. With a random dy the terms of dA would nearly cancel.
            dy = y.detach().bfloat16() if dy is None else dy
            return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y)), dy]

        *wanted, dy = results(right, [t.double() for t in inputs])
        *given, _ = results(run, inputs, dy)
        pairs = zip(given, wanted, strict=True)
        errors = [((got - want).norm() / want.norm()).item() for got, want in pairs]
        found[name] = max(errors) if all(e == e for e in errors) else float("nan")
        allowed = TOLERANCE[inputs[0].dtype]
        if not found[name] <= allowed:
            sys.exit(f"{name} is wrong: {found[name]:.1e} of the norm, allowed {allowed:.0e}; nothing reported")
    return found


def milliseconds(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(batch: int, length: int, d_state: int, device: str, rounds: int) -> dict[str, dict]:
    """Times by operator and, on a GPU, the peak memory of a forward + backward beyond the inputs."""
    contenders = operators(batch, length, d_state, device)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contenders}
    memory: dict[str, float] = {}
    for _ in range(rounds + 2):  # the first two compile, plan and fill caches
        for name, (run, _, inputs) in contenders.items():
            leaves = [t.detach().requires_grad_() for t in inputs]
            dy = torch.ones_like(inputs[0])

            def forward(run: Run = run, leaves: list[Tensor] = leaves) -> Tensor:
                return run(*leaves)

            def both(run: Run = run, leaves: list[Tensor] = leaves, dy: Tensor = dy) -> object:
                return torch.autograd.grad(run(*leaves), leaves, dy)

            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            with torch.no_grad():
                times[name][0].append(milliseconds(forward, device))
            times[name][1].append(milliseconds(both, device))
            if device == "cuda":
                memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {
        name: {
            "forward_ms": statistics.median(forward[2:]),
            "forward_range_ms": [min(forward[2:]), max(forward[2:])],
            "forward_backward_ms": statistics.median(both[2:]),
            "forward_backward_range_ms": [min(both[2:]), max(both[2:])],
            "peak_mib": memory.get(name),
        }
        for name, (forward, both) in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", help="sequence lengths; default on a CPU: only short ones")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    lengths = args.lengths or (LENGTHS if args.device == "cuda" else LENGTHS[:2])
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "dtype": "bfloat16" if args.device == "cuda" else "float32",
        "backend": resolve("auto", torch.device(args.device)),
        "torch": torch.__version__,
        "date": str(datetime.date.today()),
        "d_inner": D_INNER,
        "rounds": args.rounds,
        "rows": [],
    }
    print(", ".join(f"{name} {value}" for name, value in report.items() if name != "rows"))
    print("| length, batch, d_state | operator | forward ms | forward + backward ms | of the scan's | MiB | error |")
    print("|---|---|---|---|---|---|---|")
    for length in lengths:
        batch = max(1, TOKENS[args.device] // length)
        for d_state in D_STATES:
            errors = check(length, d_state, args.device)
            found = measure(batch, length, d_state, args.device, args.rounds)
            for name, figures in found.items():
                sizes = {"operator": name, "length": length, "batch": batch, "d_state": d_state}
                report["rows"].append(sizes | figures | {"error": errors[name]})
                both, peak = figures["forward_backward_ms"], figures["peak_mib"]
                print(
                    f"| {length}, {batch}, {d_state} | {name} | {figures['forward_ms']:.3f} | {both:.3f} "
                    f"| {both / found['selective_scan']['forward_backward_ms']:.2f} "
                    f"| {'-' if peak is None else round(peak)} | {errors[name]:.0e} |",
                    flush=True,
                )
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
