"""State-space layers: mixers of sequences (batch, length, channels)."""

from .bimamba import BiMamba
from .gated_conv import GatedConv
from .mamba import Mamba, MambaCache
from .mamba2 import BiMamba2, Mamba2, Mamba2Cache
from .mamba_block import MambaBlock
from .norm import GatedRMSNorm, LayerNorm, RMSNorm
from .recompute import recompute_all_but_scans
from .residual import add_and_norm, add_branch, pre_norm
from .row_column_mamba import RowColumnMamba
from .s4 import S4
from .s4d import S4D
from .s4nd import S4ND
from .selective_ssm import SelectiveSSM
from .swiglu import SwiGLU, add_mlp

__all__ = [
    "S4",
    "S4D",
    "S4ND",
    "BiMamba",
    "BiMamba2",
    "GatedConv",
    "GatedRMSNorm",
    "LayerNorm",
    "Mamba",
    "Mamba2",
    "Mamba2Cache",
    "MambaBlock",
    "MambaCache",
    "RMSNorm",
    "RowColumnMamba",
    "SelectiveSSM",
    "SwiGLU",
    "add_and_norm",
    "add_branch",
    "add_mlp",
    "pre_norm",
    "recompute_all_but_scans",
]
