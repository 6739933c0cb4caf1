"""Run timm's own tests/test_models.py on our models, one after the other.

The tests come from the source distribution of the installed timm; the wheel has none. `plugin.py` aims them.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import timm

HERE = Path(__file__).parent
TESTS = [  # those that are parametrised by model name and apply to models that return tokens
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs_non_std",
    "test_model_forward_intermediates_features",
    "test_model_forward_intermediates",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_fx",
    "test_model_backward_fx",
]


def fetch_tests(folder: Path) -> Path:
    """timm's tests of the installed version, downloaded once."""
    tests = folder / f"timm-{timm.__version__}" / "tests"
    if not tests.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(folder), f"timm=={timm.__version__}"], check=True)
        with tarfile.open(folder / f"timm-{timm.__version__}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return tests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="names of registered models, e.g. vim_nano")
    parser.add_argument("--depth", help="number of blocks; some tests take a time that is quadratic in it")
    args = parser.parse_args()
    tests = fetch_tests(Path(sys.prefix) / "timm_suite")
    source = (tests / "test_models.py").read_text()
    missing = [name for name in TESTS if f"def {name}(" not in source]
    if missing:
        print(f"timm {timm.__version__} does not have {missing}")
    chosen = [f"{tests / 'test_models.py'}::{name}" for name in TESTS if name not in missing]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TIMM_SUITE_DEPTH": args.depth or "", "CUDA_VISIBLE_DEVICES": ""}
    options = ["-p", "plugin", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull, "-ra"]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(tests), *chosen]
    runs = [
        subprocess.run(command, env=environment | {"TIMM_SUITE_MODEL": model}, check=False) for model in args.models
    ]
    return max(run.returncode for run in runs)


if __name__ == "__main__":
    sys.exit(main())
