"""S4ND: S4D or S4 over images and volumes, with one kernel per axis."""

from collections.abc import Sequence

from torch import nn

from .discretize import Rule
from .hippo import Diagonal, Measure
from .lti_mixer import LTIMixer
from .s4 import DPLRKernel
from .s4d import DiagonalKernel
from .state_kernel import StateKernel


class S4ND(LTIMixer):
    """Mix an image along each of its axes, in both directions; see LTIMixer.

    Args:
        d_model: channels. d_state: states N per channel and axis, even. dim: axes, 1 to 3.
        measure: S4's kernels, see S4; None for S4D's. The authors' code has S4's with "legs" by default.
        init, rule: of S4D's kernels, see S4D.
        bandlimit: of S4D's kernels: leave out the modes that alias at the resolution of training: those with
            delta |Im A| / 2 pi >= bandlimit / 2. Set it to 0.1 to 1 for a model that will run at other resolutions.
        l_max: of S4's kernels: the largest size, or one per axis; see S4. A larger image makes the kernels longer; the
            authors' code cuts them at l_max.
        dropout: before the output projection. dt_min, dt_max: initial step sizes are log-uniform between them.

    Raises: ValueError for an odd d_state, another measure, init or rule, an option of the other kind of kernels, a dim
        that is not 1, 2 or 3, or another number of sizes in l_max.
    Source: Nguyen et al. 2022, arXiv 2210.06583. State dicts of state-spaces/s4's s4nd.py load.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        dim: int = 2,
        *,
        measure: Measure | None = None,
        init: Diagonal = "lin",
        rule: Rule = "zoh",
        bandlimit: float | None = None,
        l_max: int | Sequence[int] | None = None,
        dropout: float = 0.0,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device=None,
        dtype=None,
    ):
        if dim not in (1, 2, 3):
            raise ValueError(f"dim must be 1, 2 or 3, got {dim}")
        if measure is None and l_max is not None:
            raise ValueError(f"S4D's kernels have no l_max, got {l_max}; leave it out, or give S4's measure")
        # A band limit would leave out entries of the diagonal, which are not the modes of S4's matrices.
        given = {"init": (init, "lin"), "rule": (rule, "zoh"), "bandlimit": (bandlimit, None)}
        for name, (value, default) in given.items():
            if measure is not None and value != default:
                raise ValueError(f"S4's kernels have no {name}, got {value!r}; leave it out, or leave measure out")
        sizes = [l_max] * dim if l_max is None or isinstance(l_max, int) else list(l_max)
        if len(sizes) != dim:
            raise ValueError(f"l_max must be one size or {dim}, one per axis, got {l_max}")
        dd = {"device": device, "dtype": dtype}

        def kernel(size: int | None) -> StateKernel:
            if measure is None:
                return DiagonalKernel(d_model, d_state, init, rule, 2, bandlimit, dt_min=dt_min, dt_max=dt_max, **dd)
            return DPLRKernel(d_model, d_state, measure, 2, size, dt_min=dt_min, dt_max=dt_max, **dd)

        super().__init__(d_model, nn.ModuleList(kernel(size) for size in sizes), dropout, **dd)
