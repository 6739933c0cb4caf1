"""Put these functions in the place of packages that are not installed."""

import importlib.util
import logging
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from . import chunk_scan, conv, extensions, mamba, norms, scan, updates

_log = logging.getLogger("vim_kernels")

_SCAN: dict[str, object] = {
    "selective_scan_fn": scan.selective_scan_fn,
    "selective_scan_ref": scan.selective_scan_ref,
    "mamba_inner_fn": scan.mamba_inner_fn,
}
_CONV: dict[str, object] = {
    "causal_conv1d_fn": conv.causal_conv1d_fn,
    "causal_conv1d_update": updates.causal_conv1d_update,
}
_NORMS: dict[str, object] = {
    "RMSNorm": norms.RMSNorm,
    "rms_norm_fn": norms.rms_norm_fn,
    "layer_norm_fn": norms.layer_norm_fn,
}
_GATED: dict[str, object] = {
    "RMSNorm": norms.RMSNormGated,
    "rmsnorm_fn": norms.rmsnorm_fn,
    "layernorm_fn": norms.layernorm_fn,
}
# Every module that can be imported after `install`, and what it has.
MODULES: dict[str, dict[str, object]] = {
    "mamba_ssm": {
        "selective_scan_fn": scan.selective_scan_fn,
        "mamba_inner_fn": scan.mamba_inner_fn,
        "Mamba": mamba.Mamba,
    },
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": {"Mamba": mamba.Mamba},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": _SCAN,
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": _NORMS,
    "mamba_ssm.ops.triton.layernorm": _NORMS,  # its older name
    "mamba_ssm.ops.triton.layernorm_gated": _GATED,
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": updates.selective_state_update},
    "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": chunk_scan.mamba_chunk_scan_combined},
    "causal_conv1d": _CONV,
    "causal_conv1d.causal_conv1d_interface": _CONV,
    "selective_scan_cuda": {"fwd": extensions.mamba_fwd, "bwd": extensions.mamba_bwd},
    "selective_scan_cuda_core": {"fwd": extensions.core_fwd, "bwd": extensions.core_bwd},
    "selective_scan_cuda_oflex": {"fwd": extensions.oflex_fwd, "bwd": extensions.core_bwd},
}


def install() -> tuple[str, ...]:
    """Make imports of mamba_ssm, causal_conv1d and their compiled modules find this package where they are missing.

    Call it before the code that imports them. A package that is installed stays, and nothing of it changes. One line of
    the log (logger `vim_kernels`) says which ones are replaced. A second call changes nothing.

    Returns: the names of the packages in whose place this one stands.
    """
    packages = [name for name in MODULES if "." not in name]
    mine = [name for name in packages if _is_ours(name)]
    if mine:
        return tuple(mine)
    free = [name for name in packages if not _installed(name)]
    for name, content in MODULES.items():
        if name.split(".")[0] in free:
            _register(name, content)
    sys.meta_path.append(_Refusal())
    kept = [name for name in packages if name not in free]
    _log.warning(
        "vim_kernels.mamba_ssm stands in for %s%s",
        ", ".join(free) or "nothing",
        f"; installed, and unchanged: {', '.join(kept)}" if kept else "",
    )
    return tuple(free)


def _installed(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _is_ours(module: str) -> bool:
    return getattr(sys.modules.get(module), "__vim_kernels__", False)


def _register(name: str, content: dict[str, object]) -> None:
    module = ModuleType(name, f"A stand-in of vim_kernels.mamba_ssm for {name}.")
    module.__spec__ = ModuleSpec(name, None, origin=__file__, is_package=True)
    module.__path__ = []  # it is a package, and none of its modules are files
    module.__file__ = __file__
    module.__dict__.update(content, __all__=list(content), __vim_kernels__=True)
    sys.modules[name] = module
    package, _, last = name.rpartition(".")
    if package:
        setattr(sys.modules[package], last, module)


class _Refusal(MetaPathFinder):
    """Asked last, when an import of a submodule or a name fails: says what there is, as Python would not."""

    def find_spec(self, fullname, path, target=None):
        module, _, name = fullname.rpartition(".")
        if not _is_ours(module):
            return None
        inside = [other.removeprefix(f"{module}.") for other in MODULES if other.startswith(f"{module}.")]
        raise ModuleNotFoundError(
            f"vim_kernels.mamba_ssm stands in for {module} and has no {name}, only {[*MODULES[module], *inside]}; "
            f"install the package {module.split('.')[0]} for it"
        )
