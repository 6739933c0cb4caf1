"""The house keeps its rules: who imports whom, no import of Triton without need, no package called `kernels`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# package -> what its files may import besides the standard library and itself. From the bottom up.
NUMERIC = {"torch", "einops", "numpy"}
ALLOWED = {
    "vim_kernels": {"torch", "triton"},
    "vim.layers": {"vim_kernels", *NUMERIC},
    "vim.models": {"vim.layers", "vim.files", "timm", "safetensors", "huggingface_hub", "tokenizers", *NUMERIC},
    "vim.data": {
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
    "vim.training": {
        "vim.files",
        "vim.data",
        "timm",
        "accelerate",
        "huggingface_hub",
        "torchvision",
        "jsonargparse",
        "rich",
        "safetensors",
        "matplotlib",
        "yaml",
        *NUMERIC,
    },
    "vim.features": {
        "vim.files",
        "vim.data",
        "vim.training",
        "timm",
        "accelerate",
        "pyarrow",
        "safetensors",
        "matplotlib",
        "sklearn",
        *NUMERIC,
    },
    "vim.detection": {
        "vim.files",
        "vim.data",
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
    "vim.export": {"vim_kernels", "vim.files", "vim.data", "vim.training", "onnxruntime", *NUMERIC},
    "vim.visualize": {"vim.layers", "vim.files", "vim.data", "vim.training", "timm", "matplotlib", *NUMERIC},
    "vim.demo": {
        "vim.data",
        "vim.features",
        "vim.training",
        "vim.visualize",
        "gradio",
        "matplotlib",
        "PIL",
        *NUMERIC,
    },
}


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
            base = module.rsplit(".", node.level)[0] + "." if node.level else ""
            found.add(base + (node.module or ""))
            if not node.module or node.module == "vim":
                found |= {f"{base}{node.module or ''}.{alias.name}".replace("..", ".") for alias in node.names}
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "kernels" if "vim_kernels" in path.parts else ROOT).with_suffix("").parts
    return ".".join(parts)


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_stands_below_it(package):
    files = package_files(package)
    assert files
    allowed = ALLOWED[package] | {package} | set(sys.stdlib_module_names)
    for path in files:
        for name in imports(path, module_name(path)):
            inside = any(name == a or name.startswith(f"{a}.") for a in allowed)
            assert inside, f"{path.relative_to(ROOT)} imports {name}"


def test_only_triton_files_import_triton():
    for path in package_files("vim_kernels"):
        uses = any(name.split(".")[0] == "triton" for name in imports(path, module_name(path)))
        assert uses == path.name.startswith("triton_"), path.name


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
