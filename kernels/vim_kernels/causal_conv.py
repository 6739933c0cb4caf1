"""The depthwise causal convolution in front of the scan: public function, validation and operator."""

import torch
from torch import Tensor

from . import backends, cpu_conv, reference, torch_conv
from .checks import check, check_shape, check_tensors


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
):
    """Convolve each channel with its own filter over the present and past steps, channel-last.

        y[t] = activation(bias + sum_k weight[:, k] * x[t - (width - 1) + k])

    Args:
        x: (batch, length, channels), any float dtype, may be strided; the sum runs in fp32 (fp64 for fp64 inputs).
        weight: (channels, width), the last tap meets the present step. bias: (channels,).
        activation: None or "silu".
        reverse: the past of step t is t+1, t+2, ...: equal to flipping x and y along the length.
        initial_state: (batch, width - 1, channels), the steps in front of the first one processed, oldest first;
            zeros if not given.
        return_final_state: also return the last width - 1 steps processed, in the form of `initial_state`.
        backend: "auto", "triton", "cpu", "torch" or "reference". A backend asked for by name runs or raises.

    Returns: y (batch, length, channels) in x's dtype, or (y, final_state) with final_state in x's dtype.

    Raises: ValueError, TypeError: a wrong shape, device, dtype or option. RuntimeError: a named backend that cannot
        run here.
    """
    backends.check_name(backend)
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    check_tensors({"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}, like="x")
    check(x.dim() == 3, "x", x, "be (batch, length, channels)")
    batch, _, channels = x.shape
    check(
        weight.dim() == 2 and weight.shape[0] == channels and weight.shape[1] > 0,
        "weight",
        weight,
        f"be (channels, width) with channels = {channels} and width >= 1",
    )
    past = weight.shape[1] - 1
    check_shape("bias", bias, "(channels,)", (channels,))
    check_shape("initial_state", initial_state, "(batch, width - 1, channels)", (batch, past, channels))

    silu = activation == "silu"
    if backend == "reference":
        y = reference.causal_conv1d(x, weight, bias, initial_state, silu=silu, reverse=reverse).to(x.dtype)
    else:
        y = torch.ops.vim_kernels.causal_conv1d(x, weight, bias, initial_state, silu, reverse, backend)
    return (y, _final_state(x, past, reverse, initial_state)) if return_final_state else y


def _final_state(x: Tensor, past: int, reverse: bool, initial_state: Tensor | None) -> Tensor:
    """The last `past` steps processed, oldest first; short sequences leave part of the initial state in it."""
    recent = x[:, :past].flip(1) if reverse else x[:, x.shape[1] - min(past, x.shape[1]) :]
    older = x.new_zeros(x.shape[0], past, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    return torch.cat([older[:, recent.shape[1] :], recent], 1)


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, bool silu, bool reverse, str backend"


def _implementation(backend: str, x: Tensor):
    backend = backends.resolve(backend, x.device)
    if x.numel() == 0:
        return torch_conv  # a grid cannot be empty
    if backend == "triton":
        from . import triton_conv  # imports triton, which not every platform has

        return triton_conv
    return cpu_conv if backend == "cpu" else torch_conv


@torch.library.custom_op("vim_kernels::causal_conv1d", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _forward_op(x, weight, bias, initial_state, silu, reverse, backend):
    return _implementation(backend, x).forward(x, weight, bias, initial_state, silu=silu, reverse=reverse)


@_forward_op.register_fake
def _(x, weight, bias, initial_state, silu, reverse, backend):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "vim_kernels::causal_conv1d_backward", mutates_args=(), schema=f"(Tensor dy, {_INPUTS}) -> Tensor[]"
)
def _backward_op(dy, x, weight, bias, initial_state, silu, reverse, backend):
    """Gradients of x, weight, and of bias and initial_state where they are given; contiguous, in their dtypes."""
    run = _implementation(backend, x).backward
    grads = run(dy, x, weight, bias, initial_state, silu=silu, reverse=reverse)
    return [g for g in grads if g is not None]


@_backward_op.register_fake
def _(dy, x, weight, bias, initial_state, silu, reverse, backend):
    return [t.new_empty(t.shape) for t in (x, weight, bias, initial_state) if t is not None]


def _setup_context(ctx, inputs, output):
    *tensors, silu, reverse, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = silu, reverse, backend


def _backward(ctx, dy):
    tensors = ctx.saved_tensors
    grads = iter(torch.ops.vim_kernels.causal_conv1d_backward(dy, *tensors, *ctx.options))
    return *(None if t is None else next(grads) for t in tensors), None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
