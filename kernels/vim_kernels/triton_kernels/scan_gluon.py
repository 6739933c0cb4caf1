# Triton grows a tuple by `tiles + (tile,)` and by nothing else.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""The forward scan in Gluon, for half precision and 16 states: a lane holds two channels with all their states.

No value crosses lanes. A program takes 128 channels of one batch entry in all directions, a warp 64 of them in one
direction. Two directions meet in the middle: up to there each writes its y as a partial sum, from there on each reads
the other's part, adds, gates and stores. The rows of u, dt, z and of the other direction's part come by asynchronous
copies into rings in shared memory, T steps a slot. B and C are converted to fp32 there, and all lanes read them as the
same words.

Gluon is experimental: `scan` imports this only in the versions of Triton in which it was tried.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language import debug_barrier

from ..directions import Direction
from ..rows import columns, cut_bytes, row_arguments, row_arguments_of_eights, row_strides
from .activations import LOG2E
from .scan_plain import INTERVAL

CHANNELS = 128  # of a program
T, SLOTS = 8, 3  # steps of a slot, slots of a ring
# Arguments that compile nothing new: not even if they are 1 or divisible by 16.
SIZES = ["items", "batch", "length", "window", "windows", "started", "d_inner8", "group_size8"]
SIZES += [f"{name}_{size}" for name in ("u", "dt", "B", "C", "z", "dy") for size in ("pitch", "stride", "stride8")]


@gluon.jit
def softplus(x):
    """max(x, 0) + log1p(exp(-|x|)), relative error 1e-6: far below the rounding of x in half precision."""
    e = gl.exp2(gl.abs(x) * -LOG2E)
    # A minimax polynomial of log1p(e) / e on [0, 1], in pairs of terms: so the chain of products is half as long.
    e2 = e * e
    p = 0.014140965417027473 * e2 + (0.14922365546226501 - 0.06640161573886871 * e)
    p = p * e2 + (0.3310944736003876 - 0.23503848910331726 * e)
    p = p * e2 + (0.9999987483024597 - 0.4998696446418762 * e)
    return gl.maximum(x, 0.0) + e * p


@gluon.jit
def reciprocal(x):
    """An approximate one: division would take four more instructions."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def step_size(v, there, SOFTPLUS: gl.constexpr):
    """delta and d(delta) / dv; zeros behind the end."""
    if SOFTPLUS:
        v = gl.where(there, v, float("-inf"))
        delta = softplus(v)
        e = gl.exp2(gl.abs(v) * -LOG2E)  # the compiler has it from the line above
        slope = gl.where(v >= 0, 1.0, e) * reciprocal(1 + e)
    else:
        delta = gl.where(there, v, 0.0)
        slope = gl.where(there, v * 0 + 1, 0.0)
    return delta, slope


@gluon.jit
def pointer_of(pair, d):
    """The pointer of direction d, a scalar."""
    if len(pair) == 1:
        one = pair[0]
    else:
        one = gl.where(d == 0, pair[0], pair[1])
    return one


@gluon.jit(do_not_specialize=SIZES)
def _forward_kernel(
    u,  # (B, L, E), one per direction, as all up to dt_bias
    dt,  # (B, L, E)
    A,  # (E, N)
    B,  # (B, L, G, N)
    C,  # (B, L, G, N)
    D,  # (E,) or None
    dt_bias,  # (E,) or None
    starts,  # (windows, directions, B, E, N), read if started: the state before each window, else zero
    z,  # (B, L, E) or None: the gate
    cuts,  # (B, L + 1) or None: whether packed sequences change before a step
    y,  # (B, L, E); None: only run the recurrence over each window but the last one of its direction, from zero
    y_sum,  # (B, L, E) or None
    last_state,  # (directions, B, E, N); without y (windows, directions, B, E, N), the state after each window
    checkpoints,  # (directions, B, rows, E, N) or None
    totals,  # without y: (windows, directions, B, E), sums of delta; infinite if a sequence begins in the window
    batch, length,
    window, windows,  # steps per window, and their number; see scan_windows
    started,
    d_inner8, group_size8,  # in units of 8, as strides of copied rows: so copies of 16 bytes are known to be aligned
    u_pitch, u_stride8, dt_pitch, dt_stride8,  # see `scan_plain`
    B_pitch, B_stride, C_pitch, C_stride, z_pitch, z_stride8,
    REVERSE: gl.constexpr,  # per direction; the second of two is the reverse one
    SCALE: gl.constexpr, SOFTPLUS: gl.constexpr,
    ADJOINT: gl.constexpr,  # without y: of dy in place of u, gated by z if there is one, and C in place of B
    GROUPS: gl.constexpr,
    K: gl.constexpr,  # steps between checkpoints
    T: gl.constexpr, SLOTS: gl.constexpr, CHANNELS: gl.constexpr,
):  # fmt: skip
    DIRECTIONS: gl.constexpr = len(REVERSE)
    SEGMENTS: gl.constexpr = 1 if y is None else DIRECTIONS
    LAST: gl.constexpr = SEGMENTS - 1
    # Of the states (direction, channel, state), of what belongs to two channels of a lane, and of rows of B and C.
    STATES: gl.constexpr = gl.BlockedLayout([1, 2, 16], [1, 32, 1], [DIRECTIONS, 2, 1], [2, 1, 0])
    PAIRS: gl.constexpr = gl.SliceLayout(2, STATES)
    SHARED: gl.constexpr = gl.SliceLayout(1, STATES)
    # Of copies, (step, direction, channel or state): 16 bytes a lane, or one number.
    COPIES: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [2 // DIRECTIONS, DIRECTIONS, 16], [2 * DIRECTIONS, 1, 1], [2, 1, 0]
    )
    NUMBERS: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 2, 16], [2 * DIRECTIONS, 1, 1], [2, 1, 0])
    SLOT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    d_inner = d_inner8 * 8
    group_size = group_size8 * 8
    pid = gl.program_id(0)
    blocks = gl.cdiv(group_size, CHANNELS)
    group = pid // blocks % GROUPS
    b = (pid // (blocks * GROUPS) % batch).to(gl.int64)
    order = pid // (blocks * GROUPS) // batch  # of the window, in processing order without y
    channels = pid % blocks * CHANNELS
    steps = window if y is None else gl.cdiv(gl.minimum(window, length - order * window), DIRECTIONS)

    d = gl.arange(0, DIRECTIONS, gl.SliceLayout(1, PAIRS))[:, None]
    c = channels + gl.arange(0, CHANNELS, gl.SliceLayout(0, PAIRS))[None, :]
    inside = (c < group_size) & (d >= 0)
    c += group * group_size
    at, sign, first, here, middle = _heading(d, order, window, windows, length, y is None, ADJOINT, REVERSE)
    n = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(0, STATES)))[None, :][None, :, :]
    entry = gl.expand_dims(c, 2) * 16 + n
    inside_n = gl.expand_dims(inside, 2) & (n >= 0)
    A_dn = LOG2E * of_directions(A, entry, inside_n, gl.expand_dims(d, 2))
    bias = of_directions(dt_bias, c, inside, d)
    skip = of_directions(D, c, inside, d)
    row = (at.to(gl.int64) * DIRECTIONS + d) * batch + b
    h = gl.load(starts + gl.expand_dims(row, 2) * (d_inner * 16) + entry, inside_n & (started > 0), 0.0)
    total = gl.zeros([DIRECTIONS, CHANNELS], gl.float32, PAIRS)

    t_r, d_r, c_r = _axes(T, DIRECTIONS, CHANNELS, COPIES)
    inside_r = channels + c_r < group_size
    c_r += channels + group * group_size
    _, sign_r, first_r, here_r, middle_r = _heading(d_r, order, window, windows, length, y is None, ADJOINT, REVERSE)
    row_r = first_r + t_r * sign_r
    sign_r = sign_r.to(gl.int64)
    u_ring = gl.allocate_shared_memory(u[0].dtype.element_ty, [SLOTS, T, DIRECTIONS, CHANNELS], SLOT)
    dt_ring = gl.allocate_shared_memory(dt[0].dtype.element_ty, [SLOTS, T, DIRECTIONS, CHANNELS], SLOT)
    rings = (u_ring, dt_ring)
    sources = (
        u[0] + (d_r * _gap(u, 8) + (b * u_pitch + row_r) * (u_stride8 * 8) + c_r),
        dt[0] + (d_r * _gap(dt, 8) + (b * dt_pitch + row_r) * (dt_stride8 * 8) + c_r),
    )
    strides = (sign_r * (u_stride8 * 8), sign_r * (dt_stride8 * 8))
    us = u_ring._reinterpret(gl.int32, [SLOTS * T, DIRECTIONS, CHANNELS // 2], ROW)
    dts = dt_ring._reinterpret(gl.int32, [SLOTS * T, DIRECTIONS, CHANNELS // 2], ROW)
    if z is not None:
        z_ring = gl.allocate_shared_memory(z.dtype.element_ty, [SLOTS, T, DIRECTIONS, CHANNELS], SLOT)
        zs = z_ring._reinterpret(gl.int32, [SLOTS * T, DIRECTIONS, CHANNELS // 2], ROW)
    if SEGMENTS == 2:
        part_ring = gl.allocate_shared_memory(y.dtype.element_ty, [SLOTS, T, DIRECTIONS, CHANNELS], SLOT)
        parts = part_ring._reinterpret(gl.int32, [SLOTS * T, DIRECTIONS, CHANNELS // 2], ROW)

    t_b, d_b, n_b = _axes(T, DIRECTIONS, 16, NUMBERS)
    n_b += group * 16
    _, sign_b, first_b, here_b, middle_b = _heading(d_b, order, window, windows, length, y is None, ADJOINT, REVERSE)
    row_b = first_b + t_b * sign_b
    B_step = sign_b.to(gl.int64) * B_stride
    C_step = sign_b.to(gl.int64) * C_stride
    B_0 = B[0] + (d_b * _gap(B, 1) + (b * B_pitch + row_b) * B_stride + n_b)
    B_rows = gl.allocate_shared_memory(gl.float32, [2, T, DIRECTIONS, 16], SLOT)
    Bs = B_rows._reinterpret(gl.float32, [2 * T, DIRECTIONS, 16], ROW)
    if y is not None:
        C_0 = C[0] + (d_b * _gap(C, 1) + (b * C_pitch + row_b) * C_stride + n_b)
        C_rows = gl.allocate_shared_memory(gl.float32, [2, T, DIRECTIONS, 16], SLOT)
        Cs = C_rows._reinterpret(gl.float32, [2 * T, DIRECTIONS, 16], ROW)
    out_0 = (b * length + first) * d_inner + c
    out_step = sign.to(gl.int64) * d_inner
    if cuts is not None:
        cuts_0 = cuts + (b * (length + 1) + first + ((sign > 0) if ADJOINT else (sign < 0)))

    for segment in gl.static_range(SEGMENTS):
        # At odd lengths the forward direction reaches the middle step first, and the reverse one finishes it.
        begin, left = segment * middle, (here if segment == LAST else middle) - segment * middle
        begin_r, left_r = segment * middle_r, (here_r if segment == LAST else middle_r) - segment * middle_r - t_r
        begin_b, left_b = segment * middle_b, (here_b if segment == LAST else middle_b) - segment * middle_b - t_b
        left_r = gl.where(inside_r, left_r, 0)
        if segment == LAST:
            # Before the middle the other direction's part does not exist yet, and the gate is not needed.
            if z is not None:
                rings = rings + (z_ring,)
                sources = sources + (z + ((b * z_pitch + row_r) * (z_stride8 * 8) + c_r),)
                strides = strides + (sign_r * (z_stride8 * 8),)
            if SEGMENTS == 2:
                rings = rings + (part_ring,)
                sources = sources + (y + ((b * length + row_r) * d_inner + c_r),)
                strides = strides + (sign_r * d_inner,)
        ahead = ()
        for i in gl.static_range(len(sources)):
            ahead = ahead + (sources[i] + begin_r * strides[i],)
        for slot in gl.static_range(SLOTS - 1):
            ahead = _copy(rings, ahead, strides, slot, left_r > slot * T, T)
        left_r -= (SLOTS - 1) * T
        # The rows of B and C come through registers, one slot before they are needed.
        B_p = B_0 + begin_b * B_step
        B_rows.index(0).store(gl.load(B_p, left_b > 0, 0.0).to(gl.float32))
        B_p += T * B_step
        B_next = gl.load(B_p, left_b > T, 0.0)
        if y is not None:
            C_p = C_0 + begin_b * C_step
            C_rows.index(0).store(gl.load(C_p, left_b > 0, 0.0).to(gl.float32))
            C_p += T * C_step
            C_next = gl.load(C_p, left_b > T, 0.0)
            out = y + (out_0 + begin * out_step)
        left_b -= 2 * T
        if y_sum is not None:
            sum_out = y_sum + (out_0 + begin * out_step)
        if cuts is not None:
            cuts_p = cuts_0 + begin * sign

        for block in range(gl.cdiv(steps, T)):
            if checkpoints is not None:  # noqa: SIM102 (Triton skips a block only for a separate `None` test)
                if block * T % K == 0:
                    rows = DIRECTIONS * gl.cdiv(gl.cdiv(length, DIRECTIONS), K)
                    saved = order * window // K + segment * gl.cdiv(steps, K) + block * T // K
                    saved = (gl.expand_dims(d, 2).to(gl.int64) * batch + b) * rows + saved
                    gl.store(checkpoints + saved * (d_inner * 16) + entry, h, inside_n)
            async_copy.wait_group(SLOTS - 2)
            for k in range(T):  # not unrolled: the compiler would gather the exponentials of all steps
                place = block % SLOTS * T + k
                there = left > k
                u_k = _pair(us, place, u[0].dtype.element_ty, PAIRS)
                delta = _pair(dts, place, dt[0].dtype.element_ty, PAIRS) + bias
                if SOFTPLUS:
                    delta = softplus(delta)
                delta = gl.where(there, delta, 0.0)  # an identity step
                exponent = gl.expand_dims(delta, 2) * A_dn
                if y is None:
                    total += delta
                if cuts is not None:
                    begins = gl.load(cuts_p, there & inside, 0) != 0
                    exponent += gl.expand_dims(gl.where(begins, float("-inf"), 0.0), 2)
                    if y is None:
                        total = gl.where(begins, float("inf"), total)
                    cuts_p += sign
                B_k = gl.expand_dims(Bs.index(block % 2 * T + k).load(SHARED), 1)
                if ADJOINT:
                    x = SCALE * u_k
                    if z is not None:
                        z_k = _pair(zs, place, z.dtype.element_ty, PAIRS)
                        x *= z_k * reciprocal(1 + gl.exp2(z_k * -LOG2E))
                    h = gl.exp2(exponent) * (h + gl.expand_dims(x, 2) * B_k)
                else:
                    h = gl.exp2(exponent) * h + gl.expand_dims(delta * u_k, 2) * B_k
                if y is not None:
                    C_k = gl.expand_dims(Cs.index(block % 2 * T + k).load(SHARED), 1)
                    y_k = gl.sum(h * C_k, 2)
                    if D is not None:
                        y_k += skip * u_k
                    if segment == LAST:
                        if SEGMENTS == 2:
                            y_k += _pair(parts, place, y.dtype.element_ty, PAIRS)
                        if y_sum is not None:
                            gl.store(sum_out, y_k.to(y.dtype.element_ty), inside & there)
                            sum_out += out_step
                        y_k *= SCALE
                        if z is not None:
                            z_k = _pair(zs, place, z.dtype.element_ty, PAIRS)
                            y_k *= z_k * reciprocal(1 + gl.exp2(z_k * -LOG2E))
                    gl.store(out, y_k.to(y.dtype.element_ty), inside & there)
                    out += out_step
            left -= T
            B_rows.index((block + 1) % 2).store(B_next.to(gl.float32))
            if y is not None:
                C_rows.index((block + 1) % 2).store(C_next.to(gl.float32))
            ahead = _copy(rings, ahead, strides, (block + SLOTS - 1) % SLOTS, left_r > 0, T)
            left_r -= T
            B_p += T * B_step
            B_next = gl.load(B_p, left_b > 0, 0.0)
            if y is not None:
                C_p += T * C_step
                C_next = gl.load(C_p, left_b > 0, 0.0)
            left_b -= T
        async_copy.wait_group(0)
        debug_barrier()  # the other direction's partial sums

    if y is None:
        gl.store(last_state + gl.expand_dims(row, 2) * (d_inner * 16) + entry, h, inside_n)
        gl.store(totals + row * d_inner + c, total, inside)
    else:
        ends = gl.where(sign > 0, order * window + here, length - order * window) == length
        row = gl.expand_dims(d.to(gl.int64) * batch + b, 2)
        gl.store(last_state + row * (d_inner * 16) + entry, h, inside_n & gl.expand_dims(ends, 2))


@gluon.jit
def _heading(d, order, window, windows, length, ENDS: gl.constexpr, ADJOINT: gl.constexpr, REVERSE: gl.constexpr):
    """Of each direction: number of the window, sign of a step, first row, steps, and steps before the middle."""
    sign = 1 - 2 * d if len(REVERSE) == 2 else (d - 1 if REVERSE[0] else d + 1)
    sign = -sign if ADJOINT else sign
    at = gl.where(sign > 0, order, windows - 1 - order) if ENDS else order + 0 * d
    here = gl.minimum(window, length - at * window)
    first = at * window + gl.where(sign > 0, 0, here - 1)
    return at, sign, first, here, (here + 1 - d) // 2


@gluon.jit
def _copy(rings, sources, strides, slot, valid, T: gl.constexpr):
    """Start to copy T rows from each source into the slot of its ring; returns the addresses of the next rows."""
    ahead = ()
    for i in gl.static_range(len(rings)):
        async_copy.async_copy_global_to_shared(rings[i].index(slot), sources[i], valid)
        ahead = ahead + (sources[i] + T * strides[i],)
    async_copy.commit_group()
    return ahead


@gluon.jit
def _pair(rows, row, DTYPE: gl.constexpr, PAIRS: gl.constexpr):
    """A row (directions, channels) in fp32. A lane loads its two channels as one word."""
    DIRECTIONS: gl.constexpr = rows.shape[1]
    word = rows.index(row).load(gl.BlockedLayout([1, 1], [1, 32], [DIRECTIONS, 2], [1, 0]))
    if gl.bfloat16 == DTYPE:
        low = (word << 16).to(gl.float32, bitcast=True)
        high = (word & -65536).to(gl.float32, bitcast=True)
    else:
        low = word.to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32)
        high = (word >> 16).to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32)
    pair = gl.join(low, high).reshape([DIRECTIONS, 2 * word.shape[1]])
    return gl.convert_layout(pair, PAIRS, assert_trivial=True)


@gluon.jit
def _axes(X: gl.constexpr, Y: gl.constexpr, Z: gl.constexpr, LAYOUT: gl.constexpr):
    """Indices along the three dimensions of a layout."""
    x = gl.arange(0, X, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None][:, :, None]
    y = gl.arange(0, Y, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :][:, :, None]
    z = gl.arange(0, Z, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, :][:, None, :]
    return x, y, z


@gluon.jit
def _gap(pair, UNIT: gl.constexpr):
    """Elements of 16 bits, a multiple of UNIT, from the first direction's tensor to the second one's."""
    if len(pair) == 2:
        gap = (pair[1].to(gl.int64) - pair[0].to(gl.int64)) // (2 * UNIT) * UNIT
    else:
        gap = 0
    return gap


@gluon.jit
def of_directions(pair, at, inside, d):
    """Elements of each direction's parameter, in fp32; zeros if there is none."""
    if pair is None:
        found = at.to(gl.float32) * 0
    elif len(pair) == 2:
        found = gl.load(pair[0] + at, inside & (d == 0), 0.0).to(gl.float32)
        found += gl.load(pair[1] + at, inside & (d == 1), 0.0).to(gl.float32)
    else:
        found = gl.load(pair[0] + at, inside, 0.0).to(gl.float32)
    return found


def takes(directions: Sequence[Direction], z: Tensor | None) -> bool:
    """Whether the kernel can run a call: 16 states, half precision, whole words of 16 bytes in rows; on Hopper."""
    d = directions[0]
    copied = [t for each in directions for t in (each.u, each.dt)] + ([] if z is None else [z])
    return (
        d.u.is_cuda
        and torch.cuda.get_device_capability(d.u.device) == (9, 0)
        and d.A.dtype == torch.float32
        and d.A.shape[1] == 16
        and all(t.element_size() == 2 for t in (*copied, d.B, d.C))
        and d.u.shape[2] // d.B.shape[2] % 8 == 0
        and all(t.data_ptr() % 16 == 0 and row_strides(t)[1] % 8 == 0 for t in copied)
    )


def launch(
    directions: Sequence[Direction],
    z: Tensor | None,
    starts: Tensor | None,
    outputs: Sequence[Tensor | None],
    window: int,
    *,
    dt_softplus: bool,
    scale: float = 1.0,
    dy: Tensor | None = None,
) -> None:
    """Run the scan, or the recurrence over windows; outputs: y to totals, see `_forward_kernel`.

    With dy: that of the adjoint, if scale * dy, gated by z, is the gradient of the sum of both directions.
    """
    if dy is not None:
        directions = [each._replace(u=dy, B=each.C) for each in directions]
    d = directions[0]
    batch, length, d_inner = d.u.shape
    groups = d.B.shape[2]
    blocks = triton.cdiv(d_inner // groups, CHANNELS) * groups
    windows = triton.cdiv(length, window)
    rows = row_arguments(B=d.B, C=d.C) | row_arguments_of_eights(u=d.u, dt=d.dt, z=z)
    programs = blocks * batch * (windows if outputs[0] is not None else windows - 1)
    _forward_kernel[(programs,)](
        *columns(directions)[:-1], outputs[2] if starts is None else starts, z, cut_bytes(d), *outputs,
        batch, length, window, windows, int(starts is not None), d_inner // 8, d_inner // groups // 8, **rows,
        REVERSE=tuple(each.reverse for each in directions), SCALE=scale, SOFTPLUS=dt_softplus, ADJOINT=dy is not None,
        GROUPS=groups, K=INTERVAL, T=T, SLOTS=SLOTS, CHANNELS=CHANNELS, num_warps=2 * len(directions),
        maxnreg=168,  # three programs of four warps on a multiprocessor
    )  # fmt: skip
