"""Floating-point operations of the operators, as torch.utils.flop_counter.FlopCounterMode counts them.

A multiply-add is two operations, as in torch's own formulas; masks, padding and recomputation do not count. A backward
costs twice its forward, as that of a matrix product does, unless a formula says otherwise. The formulas depend on
shapes alone, so a call costs the same on every device and backend, and on `meta`, where nothing is computed.

In shapes: B batch, L length, E d_inner or channels, N d_state, K width, H heads, P head_dim, G groups.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import _FlopCounterMode, register_flop_formula

Shape = Sequence[int]

# The registered operators: shapes in place of tensors, in the order of their schemas.


def selective_scan(
    u: list[Shape],  # (B, L, E) for each direction
    dt: list[Shape],
    A: list[Shape],  # (E, N)
    B: list[Shape],
    C: list[Shape],
    D: list[Shape],  # (E,); empty without
    dt_bias: list[Shape],
    initial_state: list[Shape],
    z: Shape | None,  # (B, L, E)
    *_,
    **__,
) -> int:
    """9 B L E N for each direction, B L E for each D, and B L E for z.

    It is the convention of the field. As arithmetic: exp(delta A) and delta B u take four operations per state, one
    step of the recurrence and its output five. Softplus, the sum of two directions and the silu of the gate do not
    count.

    Source: the answer of Mamba's author in github.com/state-spaces/mamba/issues/110; VMamba's code adds D and z.
    """
    elements = math.prod(u[0])
    return elements * (9 * A[0][1] * len(u) + len(D) + (z is not None))


def selective_scan_backward(dy: Shape, d_last_state: Shape | None, *inputs, **_) -> int:
    return 2 * selective_scan(*inputs)


def causal_conv1d(x: Shape, weight: list[Shape], *_, **__) -> int:
    """2 B L E K for each filter. The bias and the silu do not count."""
    return sum(2 * math.prod(x) * width for _, width in weight)


def causal_conv1d_backward(dy: list[Shape], x: Shape, weight: list[Shape], *_, **__) -> int:
    return 2 * causal_conv1d(x, weight)


# The operators that are ATen operators on one device and Triton kernels on another: a counter sees each as one.


def ssd(x: Shape, B: Shape, chunk_size: int, *, skip: bool) -> tuple[int, int]:
    """Operations of the forward and of the backward, by the products of a chunk of Q = chunk_size steps.

    2 B L (Q (G N + H P) + 2 H P N), and B L H P for D (`skip`): each step has Q scores over N for each group and Q
    weights over P for each head, writes to the state of P N and reads from it. The carry from chunk to chunk does not
    count. Scores count in full, as those of a causal attention do.

    Args: x: (B, L, H, P). B: (B, L, G, N).

    Source: Dao & Gu 2024, arXiv 2405.21060, section 6.
    """
    batch, length, heads, head_dim = x
    groups, d_state = B[2:]
    within = min(chunk_size, length) * (groups * d_state + heads * head_dim)
    forward = batch * length * (2 * (within + 2 * heads * head_dim * d_state) + skip * heads * head_dim)
    return forward, 2 * forward


def long_conv(u: Shape, points: int | None) -> tuple[int, int]:
    """Operations of the forward and of the backward.

    A real FFT of n points takes 2.5 n log2 n, a product of two spectra 6 (n / 2 + 1). The sequences have one FFT each
    way, a kernel has one. In the backward too: its FFTs are those of dy, and back to both gradients; only the products
    are two. Without FFT, a product with a matrix takes 2 L^2 for each sequence.

    Args: u: (B, L, ..., E). points: n, the size of the FFT; None: by matrix.

    Source: the operation count of benchFFT, fftw.org/speed.
    """
    rows, length = math.prod(u) // u[1], u[1]
    if points is None:
        return 2 * rows * length**2, 4 * rows * length**2
    transforms = round(2.5 * points * math.log2(points) * (2 * rows + u[-1]))
    products = 6 * (points // 2 + 1) * rows
    return transforms + products, transforms + 2 * products


def counting() -> bool:
    """Whether a FlopCounterMode counts this call."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0:
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False  # `as_one` has only a backward
    return any(isinstance(mode, _FlopCounterMode) for mode in _get_current_dispatch_mode_stack())


def as_one(operator: str, flops: tuple[int, int], run: Callable, *inputs: Tensor | None):
    """run(*inputs), which a counter sees as one operator, count_<operator>, with these counts forward and backward.

    The backward runs the forward again: the graph of what the counter must not see cannot be part of the one it sees.
    """
    return _AsOne.apply(getattr(torch.ops.vim_kernels, f"count_{operator}"), flops, run, *inputs)


class _AsOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx, report, flops, run, *inputs):
        ctx.report, ctx.flops, ctx.run = report, flops, run
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        report(flops[0])
        with _unseen():
            return run(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        ctx.report(ctx.flops[1])
        learns = ctx.needs_input_grad[3:]
        with _unseen(), torch.enable_grad():
            inputs = [
                None if t is None else t.detach().requires_grad_(learn)
                for t, learn in zip(ctx.saved_tensors, learns, strict=True)
            ]
            y = ctx.run(*inputs)
            outputs = y if isinstance(y, tuple) else (y,)
            used = [i for i, dy in enumerate(grads) if dy is not None]
            torch.autograd.backward([outputs[i] for i in used], [grads[i] for i in used])
        return None, None, None, *(None if t is None else t.grad for t in inputs)


@contextmanager
def _unseen() -> Iterator[None]:
    """Counters do not see what runs in here; other dispatch modes, such as fake tensors, do."""
    with _disable_current_modes() as modes, ExitStack() as others:
        for mode in reversed(modes):  # the innermost comes first
            if not isinstance(mode, _FlopCounterMode):
                others.enter_context(mode)
        yield


def _report(flops: int) -> None:
    """Computes nothing: a counter reads the argument."""


for _operator in ("ssd", "long_conv"):
    _op = torch.library.custom_op(
        f"vim_kernels::count_{_operator}", _report, mutates_args=(), schema="(int flops) -> ()"
    )
    _op.register_fake(_report)
    register_flop_formula(getattr(torch.ops.vim_kernels, f"count_{_operator}"))(lambda flops, **_: flops)
