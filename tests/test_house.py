"""The house keeps its rules: who imports whom, no circles, no large files, no import of Triton without need."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# room -> what its files may import besides the standard library and itself. From the bottom up.
NUMERIC = {"torch", "einops", "numpy"}
GROUND = {"vim.console", "vim.files", "vim.checkpoint", "vim.figures"}
BELOW_TRAINING = {*GROUND, "vim.data", "vim.timm_models"}
ALLOWED = {
    "vim_kernels": {"torch", "triton"},
    "vim.layers": {"vim_kernels", *NUMERIC},
    "vim.models": {"vim.layers", "vim.files", "timm", "safetensors", "huggingface_hub", "tokenizers", *NUMERIC},
    "vim.console": {"vim.files", "jsonargparse", "rich", "yaml", *NUMERIC},
    "vim.data": {
        "vim.console",
        "vim.files",
        "timm",
        "accelerate",
        "torchvision",
        "PIL",
        "rich",
        "mlxtend",
        "huggingface_hub",
        "fsspec",
        "filelock",
        "pyarrow",
        *NUMERIC,
    },
    "vim.timm_models": {*GROUND, "vim.data", "timm", "accelerate", "huggingface_hub", *NUMERIC},
    "vim.training": {
        *BELOW_TRAINING,
        "timm",
        "accelerate",
        "safetensors",
        "matplotlib",
        "yaml",
        *NUMERIC,
    },
    "vim.detection": {
        *BELOW_TRAINING,
        "vim.training",
        "timm",
        "torchvision",
        "accelerate",
        "safetensors",
        "matplotlib",
        "PIL",
        "faster_coco_eval",
        *NUMERIC,
    },
    # These train nothing: they must not import vim.training.
    "vim.features": {
        *BELOW_TRAINING,
        "timm",
        "accelerate",
        "pyarrow",
        "safetensors",
        "matplotlib",
        "sklearn",
        *NUMERIC,
    },
    "vim.export": {"vim_kernels", *BELOW_TRAINING, "onnxruntime", *NUMERIC},
    "vim.visualize": {"vim.layers", *BELOW_TRAINING, "timm", "matplotlib", *NUMERIC},
    "vim.demo": {*BELOW_TRAINING, "vim.features", "vim.visualize", "gradio", "matplotlib", "PIL", *NUMERIC},
    # These stand above training.
    "vim.experiments": {
        *BELOW_TRAINING,
        "vim_kernels",
        "vim.training",
        "vim.detection",
        "timm",
        "jsonargparse",
        "rich",
        "matplotlib",
        "yaml",
        *NUMERIC,
    },
    "vim.publish": {*BELOW_TRAINING, "vim.training", "timm", "huggingface_hub", "yaml", *NUMERIC},
}
MOST_FILES = 30
MOST_LINES = 500


def package_files(package: str) -> list[Path]:
    folder = ROOT / ("kernels/vim_kernels" if package == "vim_kernels" else package.replace(".", "/"))
    return sorted(folder.rglob("*.py"))


def imports(path: Path, module: str) -> set[str]:
    """Absolute names of all modules that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # A name may be a module, too.
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return found


def module_name(path: Path) -> str:
    """With __init__ for the face of a package, so that relative imports have one depth."""
    return ".".join(path.relative_to(ROOT / "kernels" if "vim_kernels" in path.parts else ROOT).with_suffix("").parts)


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_stands_below_it(package):
    files = package_files(package)
    assert files
    allowed = ALLOWED[package] | {package} | set(sys.stdlib_module_names)
    for path in files:
        for name in imports(path, module_name(path)):
            inside = any(name == a or name.startswith(f"{a}.") for a in allowed)
            assert inside, f"{path.relative_to(ROOT)} imports {name}"


def test_every_package_has_its_rule():
    packages = {f"vim.{path.parent.name}" for path in (ROOT / "vim").glob("*/__init__.py")}
    assert packages == ALLOWED.keys() - {"vim_kernels"}


def test_no_files_import_each_other_in_a_circle():
    files = {module_name(path): path for path in [*package_files("vim"), *package_files("vim_kernels")]}
    arrows = {}
    for module, path in files.items():
        # A package's __init__ is not in here under the package's name: its submodules may import each other through it.
        arrows[module] = {name for name in imports(path, module) & files.keys() if name != module}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(f"files import each other: {' <- '.join(error.args[1])}")


def test_packages_and_files_stay_small():
    for folder in [path for room in ("vim", "kernels", "tools") for path in (ROOT / room).rglob("*") if path.is_dir()]:
        files = sorted(folder.glob("*.py"))
        assert len(files) <= MOST_FILES, f"{folder} has {len(files)} files; does it hold a second subject?"
        for path in files:
            name, lines = str(path.relative_to(ROOT)), path.read_text().count("\n")
            assert lines <= MOST_LINES, f"{name} has {lines} lines; split it at a seam"


def test_no_function_hides_its_module():
    """`vim.training.train` is a function; a module of that name could not be imported by name."""
    for package in ALLOWED.keys() - {"vim_kernels"}:  # there a file is named after its operator
        face = next(path for path in package_files(package) if path.name == "__init__.py")
        taken = {
            alias.asname or alias.name
            for node in ast.walk(ast.parse(face.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        modules = {path.stem for path in package_files(package)}
        assert not taken & modules, f"{package} exports {taken & modules}, the names of its own modules"


def test_only_triton_files_import_triton():
    for path in package_files("vim_kernels"):
        uses = any(name.split(".")[0] == "triton" for name in imports(path, module_name(path)))
        assert uses == (path.parent.name == "triton_kernels" and path.name != "__init__.py"), path.name


def test_tools_do_not_import_each_other():
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    for path in (ROOT / "tools").glob("*.py"):
        assert not imports(path, path.stem) & tools, path.name


def test_no_package_is_called_kernels():
    """Hugging Face has one; a kernels/__init__.py would shadow it in a clone."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_needs_no_triton_and_registers_the_models():
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import timm, vim
assert not any(name.startswith("triton.") for name in sys.modules)
assert "vim_small" in timm.list_models("vim_*")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
