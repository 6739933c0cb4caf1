"""State-space duality: the recurrence of Mamba-2 as matrix products over chunks; public function and dispatch."""

from typing import Any

import torch
from torch import Tensor

from . import backends, flops, torch_ssd
from .checks import check, check_shape, check_tensors
from .precision import state_dtype

MAX_HEAD_DIM, MAX_STATES = 128, 256  # of the Triton kernels


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
):
    """Run the state-space recurrence of heads whose states all decay alike.

        delta[t] = softplus(dt[t] + dt_bias)
        h[t] = exp(delta[t] * A) * h[t-1] + delta[t] * x[t] B[t]^T
        y[t] = h[t] C[t] + D * x[t]

    It is `selective_scan` with the same A, dt, D and dt_bias for all channels of a head. Within a chunk of steps
    y = (decays * C B^T) x, as in linear attention; the state carries the past from chunk to chunk. Work and memory grow
    linearly with the length.

    Args:
        x: (batch, length, heads, head_dim), any float dtype, may be strided. The products are in this dtype, the
            decays and the states in fp32; everything is in fp64 if any tensor is.
        dt: (batch, length, heads). A: (heads,), negative.
        B, C: (batch, length, groups, d_state); group g serves the heads
            [g * heads / groups, (g + 1) * heads / groups).
        D, dt_bias: (heads,).
        dt_softplus: False takes dt + dt_bias as the step size.
        chunk_size: the longest chunk, in steps. A chunk stores chunk_size decays for each step; at about
            sqrt(head_dim * d_state) they take no more memory than its state. The Triton kernels round it down to 16, 32
            or 64.
        initial_state: (batch, heads, head_dim, d_state), the state before the first step processed.
        return_last_state: also return the state after the last step processed (step 0 in reverse).
        reverse: run from the last step to the first.
        backend: "auto", "triton" or "torch". A named backend runs or raises. "triton" takes CUDA tensors with x in bf16
            or fp16, none in fp64, head_dim up to 128 and d_state up to 256.

    Returns: y like x, or (y, last_state) with last_state (batch, heads, head_dim, d_state) in fp32 (fp64). Length 0
        gives an empty y and the initial state.

    Raises: ValueError, TypeError: a wrong shape, device, dtype, chunk size or backend name. RuntimeError: a named
        backend that cannot run here.

    Source: Dao & Gu 2024, arXiv 2405.21060, section 6. B is discretised by Euler's rule, as in the authors' code.
    """
    _check(x, dt, A, B, C, D, dt_bias, initial_state, chunk_size)
    inputs = x, dt, A, B, C, D, dt_bias, initial_state
    options: dict[str, Any] = {"dt_softplus": dt_softplus, "chunk_size": chunk_size, "reverse": reverse}
    chosen = backends.triton_or_torch("ssd", backend, x.device, lambda: _triton_limit(*inputs))

    def run(*inputs: Any) -> tuple[Tensor, Tensor]:
        if chosen == "triton" and x.numel() > 0:  # a grid cannot be empty
            from .triton_kernels import ssd as triton_ssd  # imports triton, which not every platform has

            return triton_ssd.ssd(*inputs, **options)
        return torch_ssd.ssd(*inputs, **options)

    if x.numel() > 0 and flops.counting():
        y, last_state = flops.as_one("ssd", flops.ssd(x.shape, B.shape, chunk_size, skip=D is not None), run, *inputs)
    else:
        y, last_state = run(*inputs)
    return (y, last_state) if return_last_state else y


def _triton_limit(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others: Tensor | None) -> str | None:
    """Why the Triton kernels, whose matrix products are in half precision, cannot take a call; None if they can."""
    head_dim, d_state = x.shape[3], B.shape[3]
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"x must be bf16 or fp16, got {x.dtype}"
    if state_dtype(dt, A, B, *others) == torch.float64:
        return "it has no fp64"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}"
    if not 0 < d_state <= MAX_STATES:
        return f"d_state must be from 1 to {MAX_STATES}, got {d_state}"
    return None


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> None:
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "initial_state": initial_state}
    check_tensors(tensors, like="x")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    check(x.dim() == 4, "x", x, "be (batch, length, heads, head_dim)")
    batch, length, heads, head_dim = x.shape
    check_shape("dt", dt, "(batch, length, heads)", (batch, length, heads))
    check_shape("A", A, "(heads,)", (heads,))
    check(B.dim() == 4 and B.shape[:2] == x.shape[:2], "B", B, f"be ({batch}, {length}, groups, d_state)")
    groups, d_state = B.shape[2:]
    check(groups > 0 and heads % groups == 0, "B", B, f"have groups that divide heads = {heads}")
    check_shape("C", C, "the shape of B", tuple(B.shape))
    check_shape("D", D, "(heads,)", (heads,))
    check_shape("dt_bias", dt_bias, "(heads,)", (heads,))
    want = (batch, heads, head_dim, d_state)
    check_shape("initial_state", initial_state, "(batch, heads, head_dim, d_state)", want)
