"""Random calls of the C kernels under AddressSanitizer and UndefinedBehaviorSanitizer, against the fp64 reference.

    make sanitize                                                    (or:)
    python tests/kernels/sanitize.py --cases 600 --seed 0

It needs gcc and its libasan. The exit status is not 0 after a report of a sanitizer or a wrong value, and the case is
named; `--first N --cases 1` with the same seed runs it alone. Scans and convolutions, one direction and both, and
state-space duality, forward and backward: any sizes (also none), dtypes mixed, tensors strided, sequences packed, with
and without what is optional. Blocks forward.
"""

import argparse
import ctypes
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from block_inputs import block_inputs, by_operators, weights_to
from ssd_inputs import recurrence
from torch import Tensor

from vim_kernels import (
    bidirectional_causal_conv1d,
    bidirectional_selective_scan,
    bimamba_block,
    causal_conv1d,
    selective_scan,
    ssd,
)

# -O1 overrides the builder's flags: at -O3 the sanitizers take minutes to compile.
SANITIZERS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
COMPILER = f"""sh -c 'env -u LD_PRELOAD gcc "$@" {SANITIZERS}' gcc"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    return run_cases(options) if options.inside else start(options)


def start(options: argparse.Namespace) -> int:
    """Run the cases in a process with the sanitizers loaded, and report progress."""
    if shutil.which("gcc") is None:
        sys.exit("the sanitizers need gcc, which is not on PATH; install it")
    environment = os.environ | {
        "CC": COMPILER,
        # libstdc++ too: ASan looks up its exceptions at startup.
        "LD_PRELOAD": f"{library_of_gcc('libasan.so')} {library_of_gcc('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # those of the Python interpreter are not ours
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    begin, last = time.monotonic(), "none: it did not get to one"
    command = [sys.executable, __file__, *sys.argv[1:], "--inside"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for done, line in enumerate(process.stdout):
            last = line.strip()
            if done % 50 == 0:
                print(f"{done} of {options.cases} cases, {time.monotonic() - begin:.0f} s", flush=True)
    if process.returncode != 0:
        print(f"failed (exit status {process.returncode}) with seed {options.seed} in case {last}")
        return 1
    print(f"{options.cases} cases are clean and right (seed {options.seed}, {time.monotonic() - begin:.0f} s)")
    return 0


def library_of_gcc(name: str) -> str:
    done = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    if not path.is_absolute():
        sys.exit(f"gcc has no {name}; install its sanitizers")
    return str(path)


def run_cases(options: argparse.Namespace) -> int:
    if not hasattr(ctypes.CDLL(None), "__asan_region_is_poisoned"):
        sys.exit("AddressSanitizer is not in this process")
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # fills new memory with NaN, so that unwritten elements show
    for number in range(options.first, options.first + options.cases):
        case, (function, tensors, settings) = draw(options.seed, number)
        described = {name: [(*t.shape, str(t.dtype)[6:], t.stride()) for t in ts] for name, ts in tensors.items()}
        print(number, function.__name__, described, settings.keys(), flush=True)
        if (wrong := case.compare(function, tensors, settings)) is not None:
            sys.exit(wrong)
    return 0


Tensors = dict[str, list[Tensor]]  # by argument: one tensor or a pair
Call = tuple[Callable, Tensors, dict[str, Any]]


def draw(seed: int, number: int) -> tuple["Case", Call]:
    case = Case(f"{seed} {number}")
    return case, (scan, scans, convolution, convolutions, duality, block)[number % 6](case)


class Case:
    """The random choices of one call."""

    def __init__(self, seed: str):
        self.chance = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.chance.getrandbits(32))
        torch.set_num_threads(self.chance.choice((1, 2, 3)))
        self.batch = self.chance.choice((0, 1, 1, 2, 2, 3, 5))
        # Lengths at and around the ends of chunks of 32, 48 and 128 steps, and any others.
        edges = (0, 1, 2, 3, 31, 32, 33, 47, 48, 49, 64, 65, 97, 127, 128, 129)
        self.length = self.chance.choice(edges) if self.often(0.5) else self.chance.randint(1, 90)
        floats = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        usual = self.chance.choice(floats)
        self.dtypes = (usual,) if self.often(0.3) else (usual, *self.chance.choices(floats, k=2))

    def often(self, share: float) -> bool:
        return self.chance.random() < share

    def normal(self, *shape: int, rates: bool = False) -> Tensor:
        """A tensor of any dtype and layout; for A (`rates`), negative and in fp32 or fp64."""
        t = torch.randn(shape, generator=self.generator).to(self.chance.choice(self.dtypes))
        return self.laid_out(-0.1 - t.to(torch.promote_types(t.dtype, torch.float32)).abs() if rates else t)

    def laid_out(self, t: Tensor) -> Tensor:
        """The same values, strided. A slice ends where its buffer ends, so that reading past it is caught."""
        layout = self.chance.choice(("whole", "last of the rows", "every second", "turned", "expanded"))
        if layout == "last of the rows":
            return torch.cat([t, t], -1)[..., t.shape[-1] :]
        if layout == "every second":
            return torch.stack([t, t], 1).flatten(0, 1)[1::2]
        if layout == "turned":
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "expanded" and t.numel() > 0:
            return t.narrow(self.chance.randrange(t.dim()), 0, 1).clone().expand(t.shape)
        return t

    def packed(self) -> dict[str, Any]:
        """The argument seq_idx, or no argument."""
        if self.often(0.5):
            return {}
        cuts = torch.rand(self.batch, self.length, generator=self.generator) < self.chance.choice((0.02, 0.3))
        return {"seq_idx": self.laid_out(cuts.cumsum(1).to(self.chance.choice((torch.int32, torch.int64))))}

    def without(self, tensors: Tensors, *optional: str) -> Tensors:
        """The arguments without some of the optional ones."""
        return {name: ts for name, ts in tensors.items() if name not in optional or self.often(0.6)}

    def compare(self, function: Callable, tensors: Tensors, settings: dict[str, Any]) -> str | None:
        """The wrong output or gradient and its error; None if all are right."""
        learned = [self.often(0.8) for ts in tensors.values() for _ in ts]
        right, exact = outputs(function, tensors, settings, learned, "reference", torch.float64)
        dys = [self.laid_out(torch.randn(t.shape, generator=self.generator).bfloat16()) for t in right]
        found, leaves = outputs(function, tensors, settings, learned, "cpu", None)
        want, got = right + gradients(right, exact, dys), found + gradients(found, leaves, dys)
        low = max(torch.finfo(t.dtype).eps for ts in tensors.values() for t in ts)
        double = any(t.dtype == torch.float64 for ts in tensors.values() for t in ts)
        limit = 4 * low + (1e-11 if double else 3e-5)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            error = (g - w).abs().max() / w.abs().max().clamp(min=1) if w.numel() else torch.zeros(())
            if g.shape != w.shape or not error <= limit:
                return f"output or gradient {i} is wrong by {error:.1e} of its largest value, allowed {limit:.1e}"
        return None


def outputs(
    function: Callable,
    tensors: Tensors,
    settings: dict[str, Any],
    learned: list[bool],
    backend: str,
    dtype: torch.dtype | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of the function, and its leaves with gradients; tensors are in `dtype` if given."""
    leaves = [t.detach().to(dtype or t.dtype) for ts in tensors.values() for t in ts]
    learners = [leaf.requires_grad_() for leaf, wanted in zip(leaves, learned, strict=True) if wanted]
    rest = iter(leaves)
    given = {name: next(rest) if len(ts) == 1 else (next(rest), next(rest)) for name, ts in tensors.items()}
    found = function(**given, **settings, backend=backend)
    return list(found) if isinstance(found, tuple) else [found], learners


def gradients(found: list[Tensor], leaves: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    pairs = [(t, dy.to(t.dtype)) for t, dy in zip(found, dys, strict=True) if t.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    ys, dys = map(list, zip(*pairs, strict=True))
    return list(torch.autograd.grad(ys, leaves, dys, allow_unused=True, materialize_grads=True))


def scan_tensors(case: Case, directions: int) -> Tensors:
    groups, states = case.chance.choice((1, 1, 2, 3)), case.chance.choice((1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24))
    channels = groups * (case.chance.choice((1, 2, 3, 5, 8, 15, 16, 17, 33)) if case.often(0.9) else 200)
    rows = case.batch, case.length
    shared = (*rows, states) if groups == 1 and case.often(0.5) else (*rows, groups, states)
    shapes = {"u": (*rows, channels), "dt": (*rows, channels), "A": (channels, states), "B": shared, "C": shared}
    shapes |= {"D": (channels,), "dt_bias": (channels,)}
    tensors = {name: [case.normal(*s, rates=name == "A") for _ in range(directions)] for name, s in shapes.items()}
    tensors["z"] = [case.normal(*rows, channels)]
    if directions == 1:
        tensors["initial_state"] = [case.normal(case.batch, channels, states)]
    return case.without(tensors, "D", "dt_bias", "z", "initial_state")


def scan(case: Case) -> Call:
    settings = {"reverse": case.often(0.5), "return_last_state": case.often(0.5)}
    tensors = scan_tensors(case, 1)
    if case.often(0.2):  # steps as they are: negative ones would grow a state beyond what fp16 holds
        settings["dt_softplus"] = False
        tensors["dt"] = [t.abs() for t in tensors["dt"]]
        tensors.pop("dt_bias", None)
    return selective_scan, tensors, settings | case.packed()


def scans(case: Case) -> Call:
    return (
        bidirectional_selective_scan,
        scan_tensors(case, 2),
        {"scale": case.chance.choice((0.5, 1.0))} | case.packed(),
    )


def convolution_tensors(case: Case, directions: int) -> Tensors:
    channels, width = case.chance.choice((1, 2, 3, 8, 15, 16, 17, 33, 70)), case.chance.choice((1, 2, 3, 4, 4, 7, 40))
    tensors = {
        "x": [case.normal(case.batch, case.length, channels)],
        "weight": [case.normal(channels, width) for _ in range(directions)],
        "bias": [case.normal(channels) for _ in range(directions)],
    }
    if directions == 1:
        tensors["initial_state"] = [case.normal(case.batch, width - 1, channels)]
    return case.without(tensors, "bias", "initial_state")


def convolution(case: Case) -> Call:
    settings = {"reverse": case.often(0.5), "return_final_state": case.often(0.5)}
    return causal_conv1d, convolution_tensors(case, 1), settings | activation(case) | case.packed()


def convolutions(case: Case) -> Call:
    return bidirectional_causal_conv1d, convolution_tensors(case, 2), activation(case) | case.packed()


def block(case: Case) -> Call:
    sizes = {"d_inner": case.chance.choice((1, 2, 15, 16, 17, 33, 70)), "d_model": case.chance.choice((1, 5, 16, 33))}
    sizes |= {"d_state": case.chance.choice((1, 2, 7, 16, 17)), "rank": case.chance.choice((0, 1, 3, 12))}
    sizes |= {"taps": case.chance.choice((1, 4, 7)), "conv_bias": case.often(0.5)}
    return block_or_operators, {"x": [case.normal(case.batch, case.length, sizes["d_model"])]}, {"sizes": sizes}


def block_or_operators(x: Tensor, *, sizes: dict[str, int], backend: str) -> Tensor:
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    _, weights = block_inputs(**sizes)
    return (by_operators if backend == "reference" else bimamba_block)(x, weights_to(weights, x.dtype))


def duality(case: Case) -> Call:
    groups, states, head_dim = case.chance.choice((1, 1, 2, 3)), *case.chance.choices((1, 2, 5, 8, 15, 16, 17, 33), k=2)
    heads = groups * case.chance.choice((1, 2, 3, 5))
    rows = case.batch, case.length
    shapes = {"x": (*rows, heads, head_dim), "dt": (*rows, heads), "A": (heads,), "B": (*rows, groups, states)}
    shapes |= {"C": shapes["B"], "D": (heads,), "dt_bias": (heads,)}
    shapes["initial_state"] = (case.batch, heads, head_dim, states)
    tensors = {name: [case.normal(*shape, rates=name == "A")] for name, shape in shapes.items()}
    settings = {"reverse": case.often(0.5), "return_last_state": True}
    if case.often(0.2):  # see `scan`
        settings["dt_softplus"] = False
        tensors["dt"] = [t.abs() for t in tensors["dt"]]
        tensors.pop("dt_bias")
    return ssd_or_recurrence, case.without(tensors, "D", "dt_bias", "initial_state"), settings


def ssd_or_recurrence(*, backend: str, return_last_state: bool, **given: Any) -> tuple[Tensor, Tensor]:
    """`ssd`, which has no backend "reference"."""
    if backend != "reference":
        return ssd(**given, backend=backend, return_last_state=return_last_state)
    (batch, _, heads, head_dim), d_state = given["x"].shape, given["B"].shape[3]
    shapes = {"D": (heads,), "dt_bias": (heads,), "initial_state": (batch, heads, head_dim, d_state)}
    zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return recurrence(**zeros | given)


def activation(case: Case) -> dict[str, Any]:
    return {"activation": case.chance.choice((None, "silu"))}


if __name__ == "__main__":
    sys.exit(main())
