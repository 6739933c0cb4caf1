"""vim_kernels.mamba_ssm.install: which names it takes, and a model written for mamba_ssm that trains on them."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).parent


def run(code, *paths):
    """Run code with `paths` before everything on sys.path. Returns its output."""
    path = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_install_takes_the_names_of_absent_packages():
    run("""
        import importlib, logging, sys
        sys.modules["triton"] = None  # importing it raises ImportError
        import vim_kernels
        assert not any("mamba_ssm" in name for name in sys.modules)  # only who asks pays for it

        lines = []
        class Keep(logging.Handler):
            def emit(self, record):
                lines.append(record.getMessage())
        logging.getLogger("vim_kernels").addHandler(Keep())

        from vim_kernels import mamba_ssm as shim
        assert "mamba_ssm" not in sys.modules  # importing is not installing
        packages = "mamba_ssm", "causal_conv1d", *(f"selective_scan_cuda{kind}" for kind in ("", "_core", "_oflex"))
        assert shim.install() == packages
        assert lines == [f"vim_kernels.mamba_ssm stands in for {', '.join(packages)}"], lines
        assert shim.install() == packages
        assert len(lines) == 1

        import causal_conv1d, mamba_ssm
        import mamba_ssm.ops.selective_scan_interface as interface
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
        from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn as again
        from mamba_ssm import Mamba
        from mamba_ssm.modules.mamba_simple import Mamba as simple
        from mamba_ssm.ops import triton
        from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn, selective_scan_ref
        from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
        from mamba_ssm.ops.triton.layernorm import RMSNorm as older
        from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as RMSNormGated, rmsnorm_fn
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
        names = (
            "causal_conv1d_fn", "causal_conv1d_update", "Mamba", "mamba_inner_fn", "selective_scan_fn", "RMSNorm",
            "layer_norm_fn", "rms_norm_fn", "RMSNormGated", "rmsnorm_fn", "selective_state_update",
            "selective_scan_ref", "mamba_chunk_scan_combined",
        )
        for name in names:
            assert globals()[name] is getattr(shim, name), name
        assert (again, older, simple) == (causal_conv1d_fn, RMSNorm, Mamba)
        assert interface.selective_scan_fn is mamba_ssm.ops.selective_scan_interface.selective_scan_fn
        assert importlib.util.find_spec("mamba_ssm") is not None

        # What is not there is refused by name, where it is imported.
        assert not hasattr(mamba_ssm, "__version__")
        assert getattr(mamba_ssm, "Mamba2", None) is None
        has = "['selective_scan_fn', 'mamba_inner_fn', 'Mamba', 'modules', 'modules.mamba_simple', 'ops',"
        for line, name in ("from mamba_ssm import Mamba2", "Mamba2"), ("import mamba_ssm.utils.generation", "utils"):
            try:
                exec(line)
            except ImportError as error:
                message = str(error)
            assert f"vim_kernels.mamba_ssm stands in for mamba_ssm and has no {name}, only {has}" in message, message
            assert "install the package mamba_ssm for it" in message
        assert importlib.util.find_spec("no_such_package") is None
    """)


def test_install_leaves_an_installed_package_alone(tmp_path):
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("selective_scan_fn = 'theirs'\n")
    (tmp_path / "other").mkdir()
    rest = "causal_conv1d", "selective_scan_cuda", "selective_scan_cuda_core", "selective_scan_cuda_oflex"
    for name in rest:
        (tmp_path / "other" / f"{name}.py").write_text("causal_conv1d_fn = 'theirs'\n")
    code = """
        import logging, sys
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        from vim_kernels.mamba_ssm import install
        print(*install())
        import causal_conv1d, mamba_ssm
        print(mamba_ssm.selective_scan_fn, "mamba_ssm.ops" in sys.modules, causal_conv1d.causal_conv1d_fn)
    """
    said, returned, names = run(code, tmp_path).splitlines()
    assert said == f"vim_kernels.mamba_ssm stands in for {', '.join(rest)}; installed, and unchanged: mamba_ssm"
    assert returned == " ".join(rest)
    assert names.startswith("theirs False <function causal_conv1d_fn")
    said, returned, names = run(code, tmp_path, tmp_path / "other").splitlines()
    assert said.startswith("vim_kernels.mamba_ssm stands in for nothing; installed, and unchanged: mamba_ssm, causal")
    assert (returned, names) == ("", "theirs False theirs")


def test_a_model_written_for_mamba_ssm_trains():
    """The class of an image is the quadrant of its bright spot. mixer_for_mamba_ssm.py imports mamba_ssm and einops."""
    out = run(
        """
        import torch
        from vim_kernels.mamba_ssm import install
        install()
        from mixer_for_mamba_ssm import Classifier

        torch.manual_seed(0)
        images, labels = torch.randn(64, 3, 16, 16) / 4, torch.arange(64) % 4
        for image, label in zip(images, labels.tolist()):
            image[:, 8 * (label // 2) + 2 :, 8 * (label % 2) + 2 :][:, :4, :4] += 2
        model = Classifier(patch_size=4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(60):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(loss.item())
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not without, without
        """,
        HERE,
    )
    losses = [float(line) for line in out.split()]
    assert losses[0] > 1.2
    assert losses[-1] < 0.3
