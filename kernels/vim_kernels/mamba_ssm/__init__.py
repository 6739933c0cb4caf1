"""The functions of mamba_ssm and causal_conv1d on the operators of this package: no nvcc, and on the CPU, too.

They have the originals' arguments, layouts and results, with gradients. `install()` puts them in the place of packages
that are not installed, for code that imports these:

    import vim_kernels.mamba_ssm
    vim_kernels.mamba_ssm.install()
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

Source: the published reference functions of mamba-ssm 2.3.2 and causal-conv1d 1.7.0, which these functions equal.
"""

from .chunk_scan import mamba_chunk_scan_combined
from .conv import causal_conv1d_fn
from .install import install
from .mamba import Mamba
from .norms import RMSNorm, RMSNormGated, layer_norm_fn, layernorm_fn, rms_norm_fn, rmsnorm_fn
from .scan import mamba_inner_fn, selective_scan_fn, selective_scan_ref
from .updates import causal_conv1d_update, selective_state_update

__all__ = [
    "Mamba",
    "RMSNorm",
    "RMSNormGated",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "install",
    "layer_norm_fn",
    "layernorm_fn",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "rms_norm_fn",
    "rmsnorm_fn",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
]
