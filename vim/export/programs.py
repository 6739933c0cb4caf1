"""Export models to programs, write programs to files, and read them. Input "images" (B, C, H, W), any B >= 1."""

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from vim.checkpoint import one_line
from vim.console.errors import ConfigError, RunError
from vim.timm_models.precision import DTYPES, Precision
from vim_kernels.decompositions import decompositions

Runner = Callable[[Tensor], Tensor]


class _Named(nn.Module):
    """Names the model's input "images": users of the exported program see the name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class _Autocast(nn.Module):
    """Runs a model in a precision. The export keeps the casts."""

    def __init__(self, model: nn.Module, precision: Precision):
        super().__init__()
        self.model, self.dtype = model, DTYPES[precision]

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.dtype):
            return self.model(images).float()


def in_precision(model: nn.Module, precision: Precision) -> nn.Module:
    """The model under autocast, with outputs in fp32."""
    return model if precision == "fp32" else _Autocast(model, precision)


def export_program(model: nn.Module, image_shape: Sequence[int], *, loop: bool) -> ExportedProgram:
    """Export the model in eval mode to ATen operators, for any number of images (C, H, W). Freezes its parameters.

    Args: loop: export each scan as one loop, which ONNX needs; otherwise only ATen operators.
    """
    program = export_with_operators(model, torch.zeros(2, *image_shape))
    with torch.no_grad():
        return program.run_decompositions(decompositions(loop=loop))


def export_with_operators(model: nn.Module, example: Tensor) -> ExportedProgram:
    """Export the model in eval mode for any number of images, with the operators of vim_kernels as they are.

    This freezes the model's parameters. Otherwise each call of the program would keep all states for a backward pass.

    Args: example: at least two images, because torch.export specialises on sizes 0 and 1; on the model's device.
    """
    with torch.no_grad():
        return torch.export.export(
            _Named(model.eval().requires_grad_(False)), (example,), dynamic_shapes={"images": {0: Dim("batch", min=1)}}
        )


def without_empty_lists(program: ExportedProgram) -> ExportedProgram:
    """Replace empty lists of tensors by None in calls of vim_kernels, in place.

    AOTInductor passes None for an empty list, which operators refuse (seen with torch 2.10 and 2.11) unless their
    schema and the exported call allow it.
    """
    for graph in program.graph_module.modules():  # autocast has a graph of its own
        for node in graph.graph.nodes if isinstance(graph, GraphModule) else ():
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "vim_kernels":
                node.args = tuple(None if isinstance(a, list | tuple) and not a else a for a in node.args)
    return program


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
    made_with = {"torch": torch.__version__}
    torch._inductor.aoti_compile_and_package(
        without_empty_lists(program), package_path=str(path), inductor_configs={"aot_inductor.metadata": made_with}
    )


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


def load_compiled(path: str | Path) -> Runner:
    """Load a package of TorchInductor, for the CPU or the GPU that it was compiled for.

    A package is native code: load only one that you trust. What the file says about itself is checked before any of its
    code runs.

    Raises: RunError for a file that is damaged or no package, and one for another version of torch or another GPU.
    """
    path = Path(path)
    made = _made_with(path)
    if made.get("torch", torch.__version__) != torch.__version__:
        raise RunError(f"{path} was compiled with torch {made['torch']}, this is {torch.__version__}; export it again")
    if made["AOTI_DEVICE_KEY"] == "cuda":
        if not torch.cuda.is_available():
            raise RunError(f"{path} was compiled for a GPU, but torch finds no CUDA device here; export another format")
        here = "{}{}".format(*torch.cuda.get_device_capability())
        if made.get("AOTI_COMPUTE_CAPABILITY", here) != here:
            capability = made["AOTI_COMPUTE_CAPABILITY"]
            raise RunError(
                f"{path} was compiled for compute capability {capability}, this GPU has {here}; export it again"
            )
    from torch._inductor import codecache  # noqa: F401  (torch 2.10 does not import it itself)

    import vim_kernels  # noqa: F401  (registers the operators in the package)

    try:
        return torch._inductor.aoti_load_package(str(path))
    except RuntimeError as error:
        raise RunError(f"cannot load {path}: {one_line(error)}; export it again") from error


def _made_with(path: Path) -> dict[str, str]:
    """What a package says about itself, without running any of its code."""
    found: dict[str, str] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("_metadata.json"):
                    found |= json.loads(archive.read(name))
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise RunError(
            f"cannot read {path}: {one_line(error)}; give a package that tools/export_model.py wrote"
        ) from error
    if "AOTI_DEVICE_KEY" not in found:
        raise RunError(f"{path} holds no compiled model; give a package that tools/export_model.py wrote")
    return found


class Format(NamedTuple):
    """A file format.

    Attributes:
        loop: as in `export_program`.
        read: takes the path and the number of threads for calls.
        operators: whether the operators of vim_kernels stay in it. Then it has the precision of the configuration.
        device: where it runs.
    """

    file: str
    loop: bool
    write: Callable[[ExportedProgram, Path], None]
    read: Callable[[Path, int], Runner]
    operators: bool = False
    device: str = "cpu"


FORMATS = {
    "pt2": Format("model.pt2", False, write_pt2, lambda path, threads: read_pt2(path)),
    "onnx": Format("model.onnx", True, write_onnx, read_onnx),
    "aoti": Format("model_aoti.pt2", False, write_aoti, lambda path, threads: load_compiled(path)),
    "aoti_cuda": Format("model_cuda.pt2", False, write_aoti, lambda path, threads: load_compiled(path), True, "cuda"),
}


def _require(*packages: str) -> None:
    import importlib.util

    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"ONNX needs {', '.join(missing)}: pip install 'vim-mamba[export]'")
