"""State-space kernels: the scan, its single step and its dual, short and long convolutions, the norm, and a gate."""

from .backends import available_backends
from .bimamba_block import BiMambaBlockWeights, SSMWeights, bimamba_block, bimamba_block_serves
from .block_step import mamba_block_step
from .block_weights import MambaBlockWeights
from .causal_conv import bidirectional_causal_conv1d, causal_conv1d
from .long_conv import long_conv
from .rms_norm import rms_norm
from .selective_scan import bidirectional_selective_scan, selective_scan
from .ssd import ssd
from .state_update import selective_state_update
from .swiglu import swiglu

__all__ = [
    "BiMambaBlockWeights",
    "MambaBlockWeights",
    "SSMWeights",
    "available_backends",
    "bidirectional_causal_conv1d",
    "bidirectional_selective_scan",
    "bimamba_block",
    "bimamba_block_serves",
    "causal_conv1d",
    "long_conv",
    "mamba_block_step",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "swiglu",
]
