"""State-space duality: the recurrence of Mamba-2 as matrix products over chunks; public function and dispatch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import backends, flops, torch_ssd
from .checks import check, check_shape, check_tensors
from .cpu_kernels import ssd as cpu_ssd
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
        x: (batch, length, heads, head_dim), any float dtype, may be strided. The products are in this dtype (on "cpu"
            in fp32), the decays and the states in fp32; everything is in fp64 if any tensor is.
        dt: (batch, length, heads). A: (heads,), negative.
        B, C: (batch, length, groups, d_state); group g serves the heads
            [g * heads / groups, (g + 1) * heads / groups).
        D, dt_bias: (heads,).
        dt_softplus: False takes dt + dt_bias as the step size.
        chunk_size: the longest chunk, in steps. A chunk stores chunk_size decays for each step; at about
            sqrt(head_dim * d_state) they take no more memory than its state. "triton" rounds it down to 16, 32 or 64;
            "cpu" has chunks of its own.
        initial_state: (batch, heads, head_dim, d_state), the state before the first step processed.
        return_last_state: also return the state after the last step processed (step 0 in reverse).
        reverse: run from the last step to the first.
        backend: "auto", "triton", "cpu" or "torch". A named backend runs or raises. "triton" takes CUDA tensors with x
            in bf16 or fp16, none in fp64, head_dim up to 128 and d_state up to 256.

    Returns: y like x, or (y, last_state) with last_state (batch, heads, head_dim, d_state) in fp32 (fp64). Length 0
        gives an empty y and the initial state.

    Raises: ValueError, TypeError: a wrong shape, device, dtype, chunk size or backend name. RuntimeError: a named
        backend that cannot run here.

    Source: Dao & Gu 2024, arXiv 2405.21060, section 6. B is discretised by Euler's rule, as in the authors' code.
    """
    inputs = x, dt, A, B, C, D, dt_bias, initial_state
    _check(*inputs)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    chosen = backends.kernels_or_torch(
        "ssd", backend, x.device, backends.COMPILED_OR_TORCH, limit=lambda: _triton_limit(*inputs), registered=True
    )

    def run(*inputs: Any) -> tuple[Tensor, Tensor]:
        if chosen == "torch" or x.numel() == 0:  # a grid cannot be empty
            return torch_ssd.ssd(*inputs, dt_softplus=dt_softplus, chunk_size=chunk_size, reverse=reverse)
        return torch.ops.vim_kernels.ssd(*inputs, dt_softplus, reverse, chunk_size, chosen, return_last_state)

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
) -> None:
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "initial_state": initial_state}
    check_tensors(tensors, like="x")
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


# The operator of the compiled backends, so that traced, compiled and exported programs keep it. Programs of earlier
# versions end with `reverse`.

_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_state, "
    "bool dt_softplus, bool reverse, int chunk_size=64, str backend='cpu'"
)


class Settings(NamedTuple):
    """Of the operator, with the schema's defaults: the dispatcher drops arguments that equal them."""

    dt_softplus: bool
    reverse: bool
    chunk_size: int = 64
    backend: str = "cpu"
    last: bool = True  # whether the last state is wanted; else it is empty

    def of_module(self) -> tuple[Any, dict[str, Any]]:
        """The backend's module and the options of its functions."""
        options = {"dt_softplus": self.dt_softplus, "reverse": self.reverse}
        if self.backend == "cpu":
            return cpu_ssd, options
        from .triton_kernels import ssd as triton_ssd  # imports triton, which not every platform has

        return triton_ssd, options | {"chunk_size": self.chunk_size}


@torch.library.custom_op("vim_kernels::ssd", mutates_args=(), schema=f"({_INPUTS}, bool last=True) -> (Tensor, Tensor)")
def _forward_op(*args):
    backends.check_no_tangents()
    inputs, settings = args[:8], Settings(*args[8:])
    _check(*inputs)  # traced programs call the operator directly
    if settings.backend == "triton" and (reason := _triton_limit(*inputs)) is not None:
        raise RuntimeError(f"this traced program has backend 'triton' of ssd, which cannot run this call: {reason}")
    module, options = settings.of_module()
    if module is not cpu_ssd:
        options["last"] = settings.last
    y, state = module.forward(*inputs, **options)
    return y, state if settings.last else state.new_empty(0)


@_forward_op.register_fake
def _(*args):
    x, _, _, B, *_ = inputs = args[:8]
    batch, _, heads, head_dim = x.shape
    state = (batch, heads, head_dim, B.shape[3]) if Settings(*args[8:]).last else (0,)
    return x.new_empty(x.shape), x.new_empty(state, dtype=state_dtype(*inputs))


@torch.library.custom_op(
    "vim_kernels::ssd_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? d_last_state, {_INPUTS}) -> Tensor[]",
)
def _backward_op(dy, d_last_state, *args):
    """Gradients of the tensors that are given, in their order."""
    backends.check_no_tangents()
    module, options = Settings(*args[8:]).of_module()
    return [g for g in module.backward(dy, d_last_state, tuple(args[:8]), **options) if g is not None]


@_backward_op.register_fake
def _(dy, d_last_state, *args):
    return [t.new_empty(t.shape) for t in args[:8] if t is not None]


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8])
    ctx.settings, ctx.last = inputs[8:-1], inputs[-1]


def _backward(ctx, dy, d_last_state):
    inputs = ctx.saved_tensors
    dy = torch.zeros_like(inputs[0]) if dy is None else dy
    d_last_state = d_last_state if ctx.last else None
    grads = iter(torch.ops.vim_kernels.ssd_backward(dy, d_last_state, *inputs, *ctx.settings))
    return *(None if t is None else next(grads) for t in inputs), *[None] * 5


_forward_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(backends.refuse_transform)
for _op in (_forward_op, _backward_op):
    _op.register_vmap(backends.refuse_transform)


@register_flop_formula(torch.ops.vim_kernels.ssd)
def _forward_flops(*args, **_) -> int:
    x, B, D = args[0], args[3], args[5]
    return flops.ssd(x, B, Settings(*args[8:]).chunk_size, skip=D is not None)[0]


@register_flop_formula(torch.ops.vim_kernels.ssd_backward)
def _backward_flops(dy, d_last_state, *inputs, **_) -> int:
    return 2 * _forward_flops(*inputs)
