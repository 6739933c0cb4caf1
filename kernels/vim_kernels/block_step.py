"""One decoding step of a whole Mamba block: public function, validation, dispatch."""

import torch
from torch import Tensor

from . import backends, torch_step
from .block_weights import MambaBlockWeights, direction_shapes
from .checks import check, check_shape, check_tensors


def mamba_block_step(
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: MambaBlockWeights,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Advance a residual stream through a Mamba block by one step: x + mixer(norm(x)). No gradients.

    On a GPU a few sequences take four kernels, which read each weight once; many sequences take seven. In a CUDA graph
    the kernels read their weights before the preceding kernel has ended, so that kernel must not write them.

    Args:
        x: (batch, d_model), the stream, fp32 or the weights' dtype.
        conv_state: (batch, W - 1, d_inner), the last inputs of the convolution, oldest first; updated in place.
        ssm_state: (batch, d_inner, d_state), fp32 (fp64 for fp64 weights); updated in place.
        weights: the block's parameters.
        eps: of the norm.
        backend: "auto", "triton" or "torch". A named backend runs or raises. "triton" takes CUDA tensors that are
            contiguous and not fp64.

    Returns: (batch, d_model) in x's dtype.

    Raises: ValueError, TypeError: a wrong shape, device, dtype or backend name. RuntimeError: a named backend that
        cannot run here.

    Source: Gu & Dao 2023, arXiv 2312.00752, figure 3 and algorithm 2, for one step.
    """
    check_tensors({"x": x, "conv_state": conv_state, "ssm_state": ssm_state, **weights._asdict()}, like="x")
    check(x.dim() == 2, "x", x, "be (batch, d_model)")
    batch, d_model = x.shape
    d_inner, d_state = weights.A_log.shape
    taps, rank = weights.conv.shape[1], weights.dt_proj.shape[1]
    shapes = {
        "norm": (d_model,),
        "in_proj": (2 * d_inner, d_model),
        "conv": (d_inner, taps),
        **direction_shapes(d_inner, d_state, rank),
        "out_proj": (d_model, d_inner),
    }
    for name, shape in shapes.items():
        check_shape(f"weights.{name}", getattr(weights, name), "of the block's sizes", shape)
    check_shape("conv_state", conv_state, "(batch, taps - 1, d_inner)", (batch, taps - 1, d_inner))
    check_shape("ssm_state", ssm_state, "(batch, d_inner, d_state)", (batch, d_inner, d_state))

    def limit() -> str | None:
        if torch.float64 in (ssm_state.dtype, weights.in_proj.dtype):
            return "it has no fp64"
        if not all(t.is_contiguous() for t in (conv_state, ssm_state, *weights)):
            return "conv_state, ssm_state and weights must be contiguous"
        return None

    chosen = backends.kernels_or_torch("mamba_block_step", backend, x.device, limit=limit)
    with torch.no_grad():
        if chosen == "triton" and batch:  # a grid cannot be empty
            from .triton_kernels import step as triton_step  # imports triton, which not every platform has

            return triton_step.block_step(x, conv_state, ssm_state, weights, eps)
        return torch_step.block_step(x, conv_state, ssm_state, weights, eps)
