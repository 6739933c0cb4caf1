"""The depthwise causal convolution before the scan: public functions, validation and operator."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import backends, cpu_conv, flops, reference, torch_conv
from .checks import check, check_shape, check_tensors, shape_of
from .packing import check_seq_idx, segments_of
from .precision import state_dtype


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
):
    """Convolve each channel with its own filter over the current and past steps, channel-last.

        y[t] = activation(bias + sum_k weight[:, k] * x[t - (width - 1) + k])

    Args:
        x: (batch, length, channels), any float dtype, may be strided; the sum runs in fp32 (fp64 for fp64 inputs).
        weight: (channels, width); the last tap applies to the current step. bias: (channels,).
        activation: None or "silu".
        reverse: the past of step t is t+1, t+2, ...: the same as flipping x and y along the length.
        initial_state: (batch, width - 1, channels), the steps before the first one processed, oldest first; default
            zeros.
        return_final_state: also return the last width - 1 steps processed, in the form of `initial_state`.
        seq_idx: (batch, length), int32 or int64, the sequence of each step if a row packs several. Steps of other
            sequences count as zero. Only changes count: a value that comes again later is another sequence. The initial
            state belongs to the first sequence processed, the final state to the last one.
        backend: "auto", "triton", "cpu", "torch" or "reference". A named backend runs or raises.

    Returns: y (batch, length, channels) in x's dtype, or (y, final_state) with final_state in x's dtype.

    Raises: ValueError, TypeError: a wrong shape, device, dtype or option. RuntimeError: a named backend that cannot
        run here.
    """
    _check(x, weight, bias, initial_state, activation, backend)
    check_seq_idx(seq_idx, "x", x)
    segments = segments_of(seq_idx)
    biases = None if bias is None else [bias]
    y = _convolve(x, [weight], biases, initial_state, segments, activation, [reverse], backend)[0]
    past = weight.shape[1] - 1
    return (y, _final_state(x, past, reverse, initial_state, segments)) if return_final_state else y


def bidirectional_causal_conv1d(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None = None,
    *,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` of x with one filter forward and another in reverse, reading x once for both.

    Args: as `causal_conv1d`; weight and bias are pairs (forward, reverse).

    Returns: the pair of outputs, (batch, length, channels) in x's dtype.

    Raises: as `causal_conv1d`.
    """
    for name, pair in {"weight": weight, "bias": bias}.items():
        if pair is not None and (isinstance(pair, Tensor) or len(pair) != 2 or any(t is None for t in pair)):
            got = f"a tensor of shape {shape_of(pair)}" if isinstance(pair, Tensor) else f"{len(pair)} items: {pair}"
            raise ValueError(f"{name} must be a pair of tensors (forward, reverse), got {got}")
    for i in range(2):
        _check(x, weight[i], None if bias is None else bias[i], None, activation, backend)
    check_shape("weight[1]", weight[1], "the shape of weight[0]", tuple(weight[0].shape))
    check_seq_idx(seq_idx, "x", x)
    forward, reverse = _convolve(x, weight, bias, None, segments_of(seq_idx), activation, [False, True], backend)
    return forward, reverse


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: str | None, backend: str
) -> None:
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
    check_shape("bias", bias, "(channels,)", (channels,))
    check_shape("initial_state", initial_state, "(batch, width - 1, channels)", (batch, weight.shape[1] - 1, channels))


def _convolve(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    activation: str | None,
    reverse: list[bool],
    backend: str,
) -> list[Tensor]:
    silu = activation == "silu"
    backend = backends.under_transforms(backend)
    dtype = state_dtype(x, *weight, *(bias or []), initial_state)
    if dtype == torch.float64:
        weight = [w.to(dtype) for w in weight]  # backends compute a direction in fp64 if x or its weight is
    if backend == "reference":
        biases = [None] * len(weight) if bias is None else bias
        return [
            reference.causal_conv1d(x, w, b, initial_state, segments, silu=silu, reverse=r).to(x.dtype)
            for w, b, r in zip(weight, biases, reverse, strict=True)
        ]
    biases = list(bias or [])
    return torch.ops.vim_kernels.causal_conv1d(x, list(weight), biases, initial_state, segments, silu, reverse, backend)


def _final_state(x: Tensor, past: int, reverse: bool, initial_state: Tensor | None, segments: Tensor | None) -> Tensor:
    """The last `past` steps processed, oldest first; after a short sequence part of the initial state remains.

    For packed sequences: the steps of the last one, with zeros before it.
    """
    recent = x[:, :past].flip(1) if reverse else x[:, x.shape[1] - min(past, x.shape[1]) :]
    older = x.new_zeros(x.shape[0], past, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    state = torch.cat([older[:, recent.shape[1] :], recent], 1)
    if segments is None:
        return state
    segments = segments.flip(1) if reverse else segments
    before = torch.arange(-past, 0, device=x.device) + x.shape[1]
    of_last = segments[:, before.clamp(min=0)] == segments[:, -1:]
    return state.masked_fill(~of_last.unsqueeze(-1), 0)


# The operator: one direction, or two over the same x, whose gradients with respect to x are summed.

_INPUTS = (
    "Tensor x, Tensor[] weight, Tensor[]? bias, Tensor? initial_state, Tensor? segments, "
    "bool silu, int[] reverse, str backend"
)


def _check_sizes(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
) -> None:
    """Raise unless all tensors have the sizes that a kernel assumes: traced programs call the operator directly."""
    batch, length, channels = x.shape
    width = weight[0].shape[1]
    for name, tensors, size in (("weight", weight, (channels, width)), ("bias", bias or (), (channels,))):
        for t in tensors:
            if t.shape != size:
                raise ValueError(f"{name} must be {size} in this call, got {shape_of(t)}")
    if initial_state is not None and initial_state.shape != (batch, width - 1, channels):
        raise ValueError(f"initial_state must be {(batch, width - 1, channels)} here, got {shape_of(initial_state)}")
    if segments is not None and segments.shape != (batch, length):
        raise ValueError(f"segments must be {(batch, length)} in this call, got {shape_of(segments)}")


def _triton(backend: str, x: Tensor):
    """The module that takes all directions at once; None if `_one_direction` runs them one by one."""
    if x.numel() == 0 or backends.resolve(backend, x.device) != "triton":  # a grid cannot be empty
        return None
    from .triton_kernels import conv as triton_conv  # imports triton, which not every platform has

    return triton_conv


def _one_direction(backend: str, x: Tensor):
    return cpu_conv if x.numel() > 0 and backends.resolve(backend, x.device) == "cpu" else torch_conv


@torch.library.custom_op("vim_kernels::causal_conv1d", mutates_args=(), schema=f"({_INPUTS}) -> Tensor[]")
def _forward_op(x, weight, bias, initial_state, segments, silu, reverse, backend):
    backends.check_no_tangents()
    _check_sizes(x, weight, bias, initial_state, segments)
    reverse = [bool(r) for r in reverse]
    if (triton := _triton(backend, x)) is not None:
        return triton.forward(x, weight, bias or None, initial_state, segments, silu=silu, reverse=reverse)
    run = _one_direction(backend, x).forward
    directions = zip(weight, bias or [None] * len(weight), reverse, strict=True)
    found = [run(x, w, b, initial_state, segments, silu=silu, reverse=r) for w, b, r in directions]
    return [y.contiguous() for y in found]  # as the fake promises, for any strides of x


@_forward_op.register_fake
def _(x, weight, bias, initial_state, segments, silu, reverse, backend):
    return [x.new_empty(x.shape) for _ in weight]


@torch.library.custom_op(
    "vim_kernels::causal_conv1d_backward", mutates_args=(), schema=f"(Tensor[] dy, {_INPUTS}) -> Tensor[]"
)
def _backward_op(dy, x, weight, bias, initial_state, segments, silu, reverse, backend):
    """Gradients of x, the weights, and any biases and initial_state; contiguous, in their tensors' dtypes."""
    backends.check_no_tangents()
    reverse = [bool(r) for r in reverse]
    if (triton := _triton(backend, x)) is not None:
        run = triton.backward
        dx, d_weight, d_bias, d_initial = run(
            dy, x, weight, bias or None, initial_state, segments, silu=silu, reverse=reverse
        )
        return [dx, *d_weight, *(d_bias or []), *([] if d_initial is None else [d_initial])]
    run = _one_direction(backend, x).backward
    directions = zip(dy, weight, bias or [None] * len(weight), reverse, strict=True)
    found = [run(d, x, w, b, initial_state, segments, silu=silu, reverse=r) for d, w, b, r in directions]
    dxs, d_weight, d_bias, d_initial = zip(*found, strict=True)
    # Two directions have no initial state.
    grads = [sum(dxs[1:], dxs[0]), *d_weight, *(d_bias if bias else []), *([] if initial_state is None else d_initial)]
    inputs = [x, *weight, *bias, *([] if initial_state is None else [initial_state])]
    return [g.to(t.dtype).contiguous() for g, t in zip(grads, inputs, strict=True)]


@_backward_op.register_fake
def _(dy, x, weight, bias, initial_state, segments, silu, reverse, backend):
    return [t.new_empty(t.shape) for t in (x, *weight, *bias, *([] if initial_state is None else [initial_state]))]


def _setup_context(ctx, inputs, output):
    x, weight, bias, initial_state, segments, silu, reverse, backend = inputs
    ctx.save_for_backward(x, *weight, *bias, initial_state, segments)
    ctx.counts = len(weight), len(bias)
    ctx.options = silu, reverse, backend


def _backward(ctx, dy):
    x, *arrays, initial_state, segments = ctx.saved_tensors
    weights, biases = ctx.counts
    weight, bias = arrays[:weights], arrays[weights:]
    dy = [torch.zeros_like(x) if g is None else g for g in dy]
    grads = torch.ops.vim_kernels.causal_conv1d_backward(dy, x, weight, bias, initial_state, segments, *ctx.options)
    dx, *rest = grads
    d_initial = None if initial_state is None else rest[-1]
    return dx, rest[:weights], rest[weights : weights + biases], d_initial, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(backends.refuse_transform)
for _op in (_forward_op, _backward_op):
    _op.register_vmap(backends.refuse_transform)
register_flop_formula(torch.ops.vim_kernels.causal_conv1d)(flops.causal_conv1d)
register_flop_formula(torch.ops.vim_kernels.causal_conv1d_backward)(flops.causal_conv1d_backward)
