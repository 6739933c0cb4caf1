"""State-space layers: sequence mixers on tensors (batch, length, channels)."""

from .bimamba import BiMamba
from .mamba import Mamba, MambaCache
from .norm import RMSNorm
from .recompute import recompute_all_but_scans
from .selective_ssm import SelectiveSSM

__all__ = ["BiMamba", "Mamba", "MambaCache", "RMSNorm", "SelectiveSSM", "recompute_all_but_scans"]
