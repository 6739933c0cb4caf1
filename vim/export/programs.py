"""Export models to programs, write programs to files, and read them. Input "images" (B, C, H, W), any B >= 1."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vim.console.errors import ConfigError
from vim_kernels.decompositions import decompositions

Runner = Callable[[Tensor], Tensor]


class _Named(nn.Module):
    """Names the model's input "images": users of the exported program see the name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def export_program(model: nn.Module, image_shape: Sequence[int], *, loop: bool) -> ExportedProgram:
    """Export the model in eval mode to ATen operators, for any number of images (C, H, W).

    This freezes the model's parameters. Otherwise each call of the program would keep all states for a backward pass.

    Args: loop: export each scan as one loop, which ONNX needs; otherwise only ATen operators.
    """
    example = torch.zeros(2, *image_shape)  # torch.export specialises on sizes 0 and 1
    with torch.no_grad():
        program = torch.export.export(
            _Named(model.eval().requires_grad_(False)), (example,), dynamic_shapes={"images": {0: Dim("batch", min=1)}}
        )
        return program.run_decompositions(decompositions(loop=loop))


def write_pt2(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def write_onnx(program: ExportedProgram, path: Path) -> None:
    _require("onnx", "onnxscript", "onnxruntime")
    exported = torch.onnx.export(
        program, dynamo=True, input_names=["images"], output_names=["output"], verbose=False, external_data=False
    )
    assert exported is not None
    exported.save(path)


def write_aoti(program: ExportedProgram, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def read_pt2(path: Path) -> Runner:
    return torch.export.load(path).module()


def read_onnx(path: Path, threads: int) -> Runner:
    """For ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Dynamic block sizes balance the threads, which synchronise after every short step of a scan.
    options.add_session_config_entry("session.dynamic_block_base", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def read_aoti(path: Path) -> Runner:
    return torch._inductor.aoti_load_package(str(path))


class Format(NamedTuple):
    """A file format. loop: as in `export_program`. read: takes the path and the number of threads for calls."""

    file: str
    loop: bool
    write: Callable[[ExportedProgram, Path], None]
    read: Callable[[Path, int], Runner]


FORMATS = {
    "pt2": Format("model.pt2", False, write_pt2, lambda path, threads: read_pt2(path)),
    "onnx": Format("model.onnx", True, write_onnx, read_onnx),
    "aoti": Format("model_aoti.pt2", False, write_aoti, lambda path, threads: read_aoti(path)),
}


def _require(*packages: str) -> None:
    import importlib.util

    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"ONNX needs {', '.join(missing)}: pip install 'vim-mamba[export]'")
