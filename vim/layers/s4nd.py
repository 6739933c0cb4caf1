"""S4ND: S4D over images and volumes, with one kernel per axis."""

from torch import nn

from .discretize import Rule
from .hippo import Diagonal
from .lti_mixer import LTIMixer
from .s4d import DiagonalKernel


class S4ND(LTIMixer):
    """Mix an image along each of its axes, in both directions; see LTIMixer.

    Args:
        d_model: channels. d_state: states N per channel and axis, even. dim: axes, 1 to 3.
        init, rule: see S4D.
        bandlimit: leave out the modes of a kernel that alias at its resolution: those with
            delta |Im A| / 2 pi >= bandlimit / 2. Set it to 0.1 to 1 for a model that will run at other resolutions.
        dropout: before the output projection. dt_min, dt_max: initial step sizes are log-uniform between them.

    Raises: ValueError for an odd d_state, another init or rule, or a dim that is not 1, 2 or 3.
    Source: Nguyen et al. 2022, arXiv 2210.06583. State dicts of state-spaces/s4's s4nd.py load, for diagonal kernels.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        dim: int = 2,
        *,
        init: Diagonal = "lin",
        rule: Rule = "zoh",
        bandlimit: float | None = None,
        dropout: float = 0.0,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device=None,
        dtype=None,
    ):
        if dim not in (1, 2, 3):
            raise ValueError(f"dim must be 1, 2 or 3, got {dim}")
        dd = {"device": device, "dtype": dtype}
        kernels = nn.ModuleList(
            DiagonalKernel(d_model, d_state, init, rule, 2, bandlimit, dt_min=dt_min, dt_max=dt_max, **dd)
            for _ in range(dim)
        )
        super().__init__(d_model, kernels, dropout, **dd)
