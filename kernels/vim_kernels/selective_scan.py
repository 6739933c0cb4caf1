"""The selective scan: public functions, validation and the torch.library operator behind them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import backends, cpu_scan, flops, reference, torch_scan
from .checks import FLOATS, check, check_shape, check_tensors, shape_of
from .directions import Direction, DirectionGrads, ScanOutput
from .packing import check_seq_idx, cuts_of
from .precision import state_dtype


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
):
    """Run the selective state-space recurrence along a sequence.

        delta[t] = softplus(dt[t] + dt_bias)
        h[t] = exp(delta[t] * A) * h[t-1] + delta[t] * B[t] * u[t]
        y[t] = (<C[t], h[t]> + D * u[t]) * silu(z[t])

    Args:
        u, dt: (batch, length, d_inner). Float tensors may be strided and of different dtypes; the recurrence runs in
            fp32, or in fp64 if any tensor is fp64.
        A: (d_inner, d_state), fp32 or fp64, negative for a stable system. `reference` also takes complex A: each entry
            represents a conjugate pair, and y is twice the real part.
        B, C: (batch, length, d_state), or (batch, length, groups, d_state) where group g serves the channels
            [g * d_inner / groups, (g + 1) * d_inner / groups). `reference` also takes them constant in time,
            (d_inner, d_state).
        D, dt_bias: (d_inner,). z: (batch, length, d_inner), the gate.
        dt_softplus: False takes dt + dt_bias as the step size.
        reverse: run from the last step to the first.
        initial_state: (batch, d_inner, d_state), the state before the first step processed.
        return_last_state: also return the state after the last step processed (step 0 in reverse).
        seq_idx: (batch, length), int32 or int64, the sequence of each step if a row packs several. If it differs from
            that of the step processed before, h[t-1] is zero. Only changes count: a value that comes again later is
            another sequence. The initial state belongs to the first sequence processed, the last state to the last one.
        backend: "auto", "triton", "cpu", "torch" or "reference". A named backend runs or raises.

    Returns:
        y (batch, length, d_inner) in u's dtype, or (y, last_state) with last_state (batch, d_inner, d_state) in fp32
        (fp64). Both are differentiable. Length 0 gives an empty y and the initial state.

    Raises:
        ValueError, TypeError: a wrong shape, device, dtype or backend name. RuntimeError: a named backend that cannot
        run here.

    Source: Gu & Dao 2023, arXiv 2312.00752, Algorithm 2. B is discretised by Euler's rule, as in the authors' code.
    """
    direction = Direction(u, dt, A, B, C, D, dt_bias, initial_state, reverse)
    y, last_state = _scan([direction], z, seq_idx, dt_softplus=dt_softplus, scale=1.0, backend=backend)
    return (y, last_state[0]) if return_last_state else y


def bidirectional_selective_scan(
    u: Sequence[Tensor],
    dt: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    *,
    D: Sequence[Tensor | None] | None = None,
    z: Tensor | None = None,
    dt_bias: Sequence[Tensor | None] | None = None,
    dt_softplus: bool = True,
    scale: float = 0.5,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Run one scan forward and one in reverse over the same sequence and gate their sum once.

        y = scale * (y_forward + y_reverse) * silu(z)

    Args:
        u, dt, A, B, C, D, dt_bias: pairs (forward, reverse) of what `selective_scan` takes, of the same sizes. If any
            tensor is fp64, both directions run in fp64.
        z: (batch, length, d_inner), the shared gate.
        scale: factor of the sum; Vim takes the mean, 0.5.
        seq_idx: (batch, length), the sequence of each step if a row packs several. Neither direction carries its state
            from one sequence into another. See `selective_scan`.

    Returns: y (batch, length, d_inner) in the dtype of u[0].

    Raises: as `selective_scan`.

    Source: Zhu et al. 2024, arXiv 2401.09417, Algorithm 1 (the mean is the released code's).
    """
    pairs: dict[str, Sequence | None] = {"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias}
    for name, pair in pairs.items():
        if pair is not None and (isinstance(pair, Tensor) or len(pair) != 2 or any(t is None for t in pair)):
            got = f"a tensor of shape {shape_of(pair)}" if isinstance(pair, Tensor) else f"{len(pair)} items: {pair}"
            raise ValueError(f"{name} must be a pair of tensors (forward, reverse), got {got}")
    D = (None, None) if D is None else D
    dt_bias = (None, None) if dt_bias is None else dt_bias
    directions = [Direction(u[i], dt[i], A[i], B[i], C[i], D[i], dt_bias[i], None, reverse=i == 1) for i in range(2)]
    y, _ = _scan(directions, z, seq_idx, dt_softplus=dt_softplus, scale=scale, backend=backend)
    return y


def _scan(
    directions: list[Direction],
    z: Tensor | None,
    seq_idx: Tensor | None,
    *,
    dt_softplus: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Check, bring the tensors into the form of `Direction`, and run: y, last_state (directions, B, E, N)."""
    backends.check_name(backend)
    for i, d in enumerate(directions):
        _check(d, z, backend, suffix=f"[{i}]" if len(directions) > 1 else "")
    check_seq_idx(seq_idx, "u", directions[0].u)
    backend = backends.under_transforms(backend)
    cuts = cuts_of(seq_idx)
    present = [t for d in directions for t in d.tensors() if t is not None] + ([] if z is None else [z])
    dtype = state_dtype(*present)  # the same for both directions, which share outputs and a kernel call
    directions = [
        d._replace(
            A=d.A.to(dtype.to_complex() if d.A.is_complex() else dtype),
            B=d.B.unsqueeze(2) if d.B.dim() == 3 else d.B,
            C=d.C.unsqueeze(2) if d.C.dim() == 3 else d.C,
            cuts=cuts,
        )
        for d in directions
    ]
    _check_pair(directions)
    if backend == "reference":
        ys, states = zip(*(reference.scan(d, dt_softplus=dt_softplus) for d in directions), strict=True)
        y = scale * sum(ys)
        if z is not None:
            y = y * torch.nn.functional.silu(z.to(y.dtype))
        return y.to(directions[0].u.dtype), torch.stack(states)
    out = torch.ops.vim_kernels.selective_scan(
        *_columns(directions),
        z,
        cuts,
        [d.reverse for d in directions],
        dt_softplus,
        scale,
        # torch.jit.trace checks a trace without gradients; it must not differ, and the trace may be trained.
        torch.jit.is_tracing() or (torch.is_grad_enabled() and any(t.requires_grad for t in present)),
        backend,
    )
    return out[0], out[1]


def _check(d: Direction, z: Tensor | None, backend: str, suffix: str) -> None:
    """Raise for the first argument that breaks a rule of `selective_scan`."""
    given = {f"{name}{suffix}": t for name, t in zip(DirectionGrads._fields, d.tensors(), strict=True)}
    every = given | {"z": z}
    check_tensors(every, like=f"u{suffix}", dtypes=(*FLOATS, torch.complex64, torch.complex128))
    for name, t in every.items():
        if t is not None and t.is_complex() and not (name[0] in "ABCi" and backend == "reference"):
            raise ValueError(
                f"{name} is complex: only A, B, C and initial_state may be, and only with backend='reference'; "
                f"got backend={backend!r}"
            )
    u, dt, A, B, C, D, dt_bias, initial_state, *_ = d
    check(u.dim() == 3, f"u{suffix}", u, "be (batch, length, d_inner)")
    batch, length, d_inner = u.shape
    check_shape(f"dt{suffix}", dt, "the shape of u, (batch, length, d_inner)", shape_of(u))
    check(A.dim() == 2 and A.shape[0] == d_inner, f"A{suffix}", A, f"be (d_inner, d_state) with d_inner = {d_inner}")
    if A.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(f"A{suffix} must be fp32 or fp64 (exp(delta * A) needs the precision), got {A.dtype}")
    d_state = A.shape[1]
    check(d_state > 0, f"A{suffix}", A, "have at least one state a channel")
    for name, t in ((f"B{suffix}", B), (f"C{suffix}", C)):
        if t.dim() == 2:
            check_shape(name, t, "(d_inner, d_state), constant in time,", (d_inner, d_state))
            if backend != "reference":
                raise ValueError(
                    f"{name} is constant in time, {shape_of(t)}, which only backend='reference' takes, got "
                    f"backend={backend!r}; expand it to (batch, length, groups, d_state)"
                )
        elif t.dim() == 4:
            groups = t.shape[2]
            check_shape(name, t, "(batch, length, groups, d_state)", (batch, length, groups, d_state))
            check(groups > 0 and d_inner % groups == 0, name, t, f"have groups that divide d_inner = {d_inner} evenly")
        else:
            check_shape(name, t, "(batch, length, d_state)", (batch, length, d_state))
    if B.dim() != 2 and C.dim() != 2:
        check(B.shape == C.shape, f"C{suffix}", C, f"have the shape of B, {shape_of(B)}")
    check_shape(f"D{suffix}", D, "(d_inner,)", (d_inner,))
    check_shape(f"dt_bias{suffix}", dt_bias, "(d_inner,)", (d_inner,))
    check_shape("z", z, "the shape of u, (batch, length, d_inner)", shape_of(u))
    check_shape("initial_state", initial_state, "(batch, d_inner, d_state)", (batch, d_inner, d_state))


def _check_pair(directions: list[Direction]) -> None:
    """Raise unless both directions have the same sizes, because a kernel gets one set."""
    first, *others = directions
    for d in others:
        for name, t, like in (("u", d.u, first.u), ("A", d.A, first.A), ("B", d.B, first.B)):
            if t.shape != like.shape:
                want, got = shape_of(like), shape_of(t)
                raise ValueError(f"{name}[1] must have the shape of {name}[0], {want}, got {got}")


# The operator. Its schema has no `Direction`, so it takes the fields as columns; an absent field is an empty list
# (None in a compiled package, whose caller has no empty lists).
# `reverse` is a list of integers, because torch.jit.trace has no lists of booleans.

_COLUMNS = (
    "Tensor[] u, Tensor[] dt, Tensor[] A, Tensor[] B, Tensor[] C, "
    "Tensor[]? D, Tensor[]? dt_bias, Tensor[]? initial_state"
)
_INPUTS = f"{_COLUMNS}, Tensor? z, Tensor? cuts, int[] reverse, bool dt_softplus, float scale"


def _columns(directions: Sequence[Direction]) -> list[list[Tensor]]:
    fields = zip(*(d.tensors() for d in directions), strict=True)
    return [[t for t in column if t is not None] for column in fields]


def _directions(columns: Sequence[Sequence[Tensor]], cuts: Tensor | None, reverse: Sequence[int]) -> list[Direction]:
    absent = [None] * len(reverse)
    rows = zip(*(column or absent for column in columns), map(bool, reverse), strict=True)
    return [Direction._make((*row, cuts)) for row in rows]


def _check_sizes(directions: Sequence[Direction], z: Tensor | None, cuts: Tensor | None) -> None:
    """Raise unless all tensors have the sizes that a kernel assumes: traced programs call the operator directly."""
    first = directions[0]
    row, steps = shape_of(first.u), shape_of(first.B)
    batch, length, d_inner = row
    *_, groups, d_state = steps
    sizes = (
        row,
        row,
        (d_inner, d_state),
        (batch, length, groups, d_state),
        steps,
        (d_inner,),
        (d_inner,),
        (batch, d_inner, d_state),
    )
    for d in directions:
        for name, t, size in zip(DirectionGrads._fields, d.tensors(), sizes, strict=True):
            if t is not None and t.shape != size:
                raise ValueError(f"{name} must be {size} in this call, got {shape_of(t)}")
    if d_inner % groups:
        raise ValueError(f"B must have groups that divide d_inner = {d_inner} evenly, got {shape_of(first.B)}")
    if z is not None and z.shape != row:
        raise ValueError(f"z must be {row} in this call, got {shape_of(z)}")
    if cuts is not None and cuts.shape != (batch, length + 1):
        raise ValueError(f"cuts must be {(batch, length + 1)} in this call, got {shape_of(cuts)}")


def _implementation(backend: str, u: Tensor):
    module = _module(backend, u)
    return module if u.numel() > 0 else torch_scan  # unlike a loop, a grid cannot be empty


def _module(backend: str, u: Tensor):
    backend = backends.resolve(backend, u.device)
    if backend == "triton":
        from .triton_kernels import scan as triton_scan  # imports triton, which not every platform has

        return triton_scan
    return cpu_scan if backend == "cpu" else torch_scan


@torch.library.custom_op(
    "vim_kernels::selective_scan",
    mutates_args=(),
    schema=f"({_INPUTS}, bool save, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward_op(*args):
    backends.check_no_tangents()
    *columns, z, cuts, reverse, dt_softplus, scale, save, backend = args
    directions = _directions(columns, cuts, reverse)
    _check_sizes(directions, z, cuts)
    run = _implementation(backend, directions[0].u).forward
    found = run(directions, z, dt_softplus=dt_softplus, scale=scale, save=save)
    return ScanOutput._make(t.contiguous() for t in found)  # as the fake promises, for any strides


@_forward_op.register_fake
def _(u, dt, A, *args):
    *_, z, _cuts, _reverse, _dt_softplus, _scale, save, backend = args
    batch, length, d_inner = u[0].shape
    rows = _module(backend, u[0]).checkpoint_rows(length, len(u))
    d_state = A[0].shape[1]
    return ScanOutput(
        u[0].new_empty(u[0].shape),
        A[0].new_empty(len(u), batch, d_inner, d_state),
        A[0].new_empty((len(u), batch, rows, d_inner, d_state) if save else (0,)),
        u[0].new_empty(u[0].shape if save and z is not None else (0,)),
    )


@torch.library.custom_op(
    "vim_kernels::selective_scan_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? d_last_state, {_INPUTS}, Tensor checkpoints, Tensor y_sum, str backend) -> Tensor[]",
)
def _backward_op(dy, d_last_state, *args):
    """Gradients of the columns' tensors in the order of the arguments, then of z if given; all contiguous."""
    backends.check_no_tangents()
    *columns, z, cuts, reverse, dt_softplus, scale, checkpoints, y_sum, backend = args
    directions = _directions(columns, cuts, reverse)
    run = _implementation(backend, dy).backward
    grads, dz = run(dy, d_last_state, directions, z, checkpoints, y_sum, dt_softplus=dt_softplus, scale=scale)
    found = [t for column in zip(*grads, strict=True) for t in column if t is not None] + ([] if z is None else [dz])
    return [t.contiguous() for t in found]


@_backward_op.register_fake
def _(dy, d_last_state, *args):
    *columns, z, _cuts, _reverse, _dt_softplus, _scale, _checkpoints, _y_sum, _backend = args
    return [t.new_empty(t.shape) for column in (*columns, [] if z is None else [z]) for t in column]


def _setup_context(ctx, inputs, output):
    *columns, z, cuts, reverse, dt_softplus, scale, _save, backend = inputs
    _, _, checkpoints, y_sum = output
    ctx.mark_non_differentiable(checkpoints, y_sum)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(t for column in columns for t in column), z, cuts, checkpoints, y_sum)
    ctx.lengths = [len(column) for column in columns]
    ctx.options = reverse, dt_softplus, scale, backend


def _backward(ctx, dy, d_last_state, _checkpoints, _y_sum):
    *flat, z, cuts, checkpoints, y_sum = ctx.saved_tensors
    reverse, dt_softplus, scale, backend = ctx.options
    columns = _split(flat, ctx.lengths)
    if checkpoints.numel() == 0 < columns[0][0].numel():
        raise RuntimeError(
            "the scan was exported without gradients and saved nothing for the backward; export it with gradients"
        )
    if dy is None:
        dy = torch.zeros_like(columns[0][0])
    grads = torch.ops.vim_kernels.selective_scan_backward(
        dy, d_last_state, *columns, z, cuts, reverse, dt_softplus, scale, checkpoints, y_sum, backend
    )
    dz = None if z is None else grads.pop()
    return *_split(grads, ctx.lengths), dz, None, None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(backends.refuse_transform)
for _op in (_forward_op, _backward_op):
    _op.register_vmap(backends.refuse_transform)
register_flop_formula(torch.ops.vim_kernels.selective_scan)(flops.selective_scan)
register_flop_formula(torch.ops.vim_kernels.selective_scan_backward)(flops.selective_scan_backward)


def _split(flat: Sequence[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    items = iter(flat)
    return [[next(items) for _ in range(n)] for n in lengths]
