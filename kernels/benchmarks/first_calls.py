"""Measure the first calls of a model on a GPU: a forward and a training step, each in a process of its own with an
empty cache of Triton's, and the seconds that each kernel takes to compile.

    python kernels/benchmarks/first_calls.py --model vim_tiny --img_size 224 --batch_size 128

The clock starts when model and images are on the GPU, and stops when the GPU is done. Seconds outside of compilations
are those of the C compiler, which Triton runs for each launcher, of libraries that start, and of the work itself. A
kernel with several lines was compiled for several types, alignments or constants; the end of a line shows in what they
differ.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable

MODES = ("forward", "training step")


def measure(model_name: str, img_size: int, batch_size: int, mode: str) -> dict:
    """Seconds of the first and the second call, and the kernels that the first one compiled. In a fresh process."""
    import timm
    import torch
    import torch.nn.functional as F
    import triton

    import vim  # noqa: F401  (registers the models)

    compiled: list[dict] = []

    def listen(*, src, metadata, metadata_group, times, cache_hit) -> None:
        if cache_hit:
            raise RuntimeError(f"{src.name} came from Triton's cache, which must be empty")
        names = src.fn.arg_names
        given = {name: str(kind) for name, kind in src.signature.items() if kind != "constexpr"}
        given |= {f"{names[path[0]]}%16": "yes" for path, attr in src.attrs.items() if attr}
        constants = {names[path[0]]: str(value) for path, value in src.constants.items()}
        name = f"{src.fn.__module__.rpartition('.')[2]}.{src.name}"
        stages = {stage: duration / 1e6 for stage, duration in times.lowering_stages}
        compiled.append({"name": name, "seconds": times.total / 1e6, "stages": stages, "given": given | constants})

    triton.knobs.compilation.listener = listen
    model = timm.create_model(model_name, img_size=img_size).cuda().train(mode == "training step")
    images = torch.randn(batch_size, 3, img_size, img_size, device="cuda")
    labels = torch.randint(1000, (batch_size,), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def forward() -> None:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            model(images)

    def training_step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def seconds(call: Callable[[], None]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    call = forward if mode == "forward" else training_step
    first = seconds(call)
    versions = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    return {"first": first, "compiled": compiled, "second": seconds(call), "about": versions}


def in_fresh_process(arguments: argparse.Namespace, mode: str) -> dict:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--measure", mode, "--model", arguments.model]
        command += ["--img_size", str(arguments.img_size), "--batch_size", str(arguments.batch_size)]
        env = os.environ | {"TRITON_CACHE_DIR": cache}
        done = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"the {mode} failed with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def report(found: dict, mode: str) -> str:
    """A line with the seconds, and a table of the kernels, those that took longest first."""
    by_name: dict[str, list[dict]] = defaultdict(list)
    for kernel in found["compiled"]:
        by_name[kernel["name"]].append(kernel)
    total = sum(kernel["seconds"] for kernel in found["compiled"])
    lines = [
        f"first {mode}: {found['first']:.2f} s, {total:.2f} s of it in {len(found['compiled'])} compilations; "
        f"second: {found['second']:.3f} s"
    ]
    for name, kernels in sorted(by_name.items(), key=lambda item: -sum(k["seconds"] for k in item[1])):
        fields = {field for kernel in kernels for field in kernel["given"]}
        differ = sorted(field for field in fields if len({kernel["given"].get(field) for kernel in kernels}) > 1)
        for kernel in kernels:
            shown = ", ".join(f"{field}={kernel['given'].get(field, '-')}" for field in differ)
            stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in kernel["stages"].items())
            lines.append(f"{kernel['seconds']:6.2f} s  {name}  ({stages})  {shown}".rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vim_tiny", help="a timm model")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--measure", choices=MODES, help="measure in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.model, arguments.img_size, arguments.batch_size, arguments.measure)))
        return
    for mode in MODES:
        found = in_fresh_process(arguments, mode)
        print(found["about"] if mode == MODES[0] else "", report(found, mode), sep="\n")


if __name__ == "__main__":
    main()
