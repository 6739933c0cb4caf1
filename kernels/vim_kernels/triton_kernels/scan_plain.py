"""The scan in plain Triton, for any number of states, any dtype and any GPU: one direction a launch.

A program is one warp and takes a block of channels of one batch entry, as a tile (channels, states) of 512 numbers in
registers. Triton gives a lane neighbouring states of several channels, so sums in both directions take few shuffles.
The second launch of a pair adds its y to the first one's and gates the sum.

The backward (formulas in kernels/README.md) walks through the chunks whose initial states the forward saved, the last
chunk first. It runs forward through a chunk and keeps the state before every T-th step in scratch memory. Then it takes
these blocks of T steps from last to first: it runs forward again, keeps the state before each step, and runs the
adjoint backwards. Scratch memory is private to a program and reused at once, so it stays in the caches. Each block of
channels writes its part of dB and dC, and each window of a batch entry its part of the gradients of parameters.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..directions import Direction
from ..rows import cut_bytes, row_arguments, sizes
from .activations import LN2, LOG2E, sigmoid, softplus

INTERVAL = 64  # steps between saved states: they take an eighth of the memory of xz (a Vim-Ti block)
T = 8  # steps between the states that the backward keeps in scratch memory
REGISTERS = 2048  # that a multiprocessor has for each lane of a warp


def checkpoint_rows(length: int, directions: int) -> int:
    """States saved per direction. Those of two begin anew in the middle, where the directions of `scan_gluon` meet."""
    return directions * triton.cdiv(triton.cdiv(length, directions), INTERVAL)


# Arguments that change with the length: a kernel is not compiled for their values.
RUNTIME = [
    "batch", "length", "window", "windows", "sign", "started", "start_pitch", "items", "is_first",
    "u_pitch", "dt_pitch", "B_pitch", "C_pitch", "z_pitch", "dy_pitch",
]  # fmt: skip


@triton.jit
def _place(
    item, sign, batch, length, window, windows, group_size,
    GROUPS: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Place of a program: batch entry, group, window, its first row and steps; channels, states, entries; masks."""
    blocks = tl.cdiv(group_size, CHANNELS)
    group = item // blocks % GROUPS
    b = (item // (blocks * GROUPS) % batch).to(tl.int64)
    order = item // (blocks * GROUPS) // batch  # of the window, in the order of processing
    at = tl.where(sign > 0, order, windows - 1 - order)
    here = tl.minimum(window, length - at * window)
    first = at * window + tl.where(sign > 0, 0, here - 1)
    c = item % blocks * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    inside = c < group_size
    c += group * group_size
    entries = (c * N)[:, None] + n[None, :]
    return b, group, at.to(tl.int64), first, here, c, n, entries, inside, inside[:, None] & (n < N)[None, :]


@triton.jit
def _values(row, at, stride, i, mask):
    """Elements i of the row `at` rows further. The product of two numbers of 32 bits takes one instruction."""
    return tl.load(row + at.to(tl.int64) * stride + i, mask, 0.0)


@triton.jit
def _parameters(values, c, inside, S: tl.constexpr):
    """A parameter of each channel; zeros if there is none."""
    found = tl.zeros(c.shape, S)
    if values is not None:
        found += tl.load(values + c, inside, 0.0).to(S)
    return found


@triton.jit
def _decay(dt_t, bias, A, cuts, at, SOFTPLUS: tl.constexpr):
    """Delta, and the factor of the state before a step: zero if a sequence begins."""
    delta = dt_t.to(A.dtype) + bias
    if SOFTPLUS:
        delta = softplus(delta)
    decay = tl.exp2(delta[:, None] * A)
    if cuts is not None:
        decay = tl.where(tl.load(cuts + at) != 0, 0.0, decay)
    return delta, decay


@triton.jit(do_not_specialize=RUNTIME)
def _forward_kernel(
    u,  # (B, L, E); for the ends of the adjoint dy
    dt,  # (B, L, E)
    A,  # (E, N)
    B,  # (B, L, G, N); for the ends of the adjoint C
    C,  # (B, L, G, N)
    D,  # (E,) or None
    dt_bias,  # (E,) or None
    cuts,  # (B, L + 1) or None: whether packed sequences change before a step
    z,  # (B, L, E) or None: the gate
    starts,  # (windows, B, E, N), read if started: the state before each window, else zero
    y,  # (B, L, E); None: only run the recurrence over each window but the last one, from zero
    y_sum,  # (B, L, E) or None
    last_state,  # (B, E, N); without y (windows, B, E, N), the state after each window
    checkpoints,  # (B, rows, E, N) or None
    totals,  # without y: (windows, B, E), sums of delta; infinite if a sequence begins in the window
    batch, length, d_inner,
    group_size,  # E / G
    window,  # steps per window; see scan_windows
    windows,
    sign,  # -1 in reverse
    started,
    start_pitch,  # entries (E, N) from a window to the next one
    # The rows (b, t) of a tensor are `stride` elements apart, its batch entries `pitch` rows apart.
    u_pitch, u_stride, dt_pitch, dt_stride, B_pitch, B_stride, C_pitch, C_stride, z_pitch, z_stride,
    ADJOINT: tl.constexpr,
    ADD: tl.constexpr,  # whether y has the other direction's part
    HALVES: tl.constexpr,  # of a window; saved states begin anew in each
    K: tl.constexpr,  # steps between saved states
    STATES: tl.constexpr,  # the power of two from N on
    CHANNELS: tl.constexpr,
    SCALE: tl.constexpr, SOFTPLUS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = last_state.dtype.element_ty
    b, group, at, first, here, c, n, entries, inside, inside_n = _place(
        tl.program_id(0), sign, batch, length, window, windows, group_size, GROUPS, N, STATES, CHANNELS
    )
    A_n = LOG2E * tl.load(A + entries, inside_n, 0.0)
    bias = _parameters(dt_bias, c, inside, S)
    skip = _parameters(D, c, inside, S)
    u += (b * u_pitch + first) * u_stride
    dt += (b * dt_pitch + first) * dt_stride
    B += (b * B_pitch + first) * B_stride + group * N
    if z is not None:
        z += (b * z_pitch + first) * z_stride
    if cuts is not None:
        cuts += b * (length + 1) + first + (sign > 0 if ADJOINT else sign < 0)
    if y is not None:
        C += (b * C_pitch + first) * C_stride + group * N
        y += (b * length + first) * d_inner
        if y_sum is not None:
            y_sum += (b * length + first) * d_inner
    start = (at * start_pitch + b) * d_inner * N + entries
    h = tl.load(starts + start, inside_n & (started > 0), 0.0)
    total = tl.zeros([CHANNELS], S)
    half = tl.cdiv(here, HALVES)
    middle = tl.where(sign > 0, half, here // HALVES)

    u_next = tl.load(u + c, inside, 0.0)
    dt_next = tl.load(dt + c, inside, 0.0)
    B_next = tl.load(B + n, n < N, 0.0)
    if z is not None:
        z_next = tl.load(z + c, inside, 0.0)
    if y is not None:
        C_next = tl.load(C + n, n < N, 0.0)
        if ADD:
            y_next = tl.load(y + c, inside, 0.0)
    for step in range(here):
        if checkpoints is not None:
            second = step >= middle
            since = step - tl.where(second, middle, 0)
            if since % K == 0:
                rows = HALVES * tl.cdiv(tl.cdiv(length, HALVES), K)
                row = b * rows + at * (window // K) + tl.where(second, tl.cdiv(half, K), 0) + since // K
                tl.store(checkpoints + row * d_inner * N + entries, h, inside_n)
        row = step * sign
        u_t, dt_t, B_t = u_next.to(S), dt_next, B_next.to(S)[None, :]
        # Load the next step's rows before this one's are done, those of B and C as soon as their registers are free.
        ahead = tl.minimum(step + 1, here - 1) * sign
        u_next = _values(u, ahead, u_stride, c, inside)
        dt_next = _values(dt, ahead, dt_stride, c, inside)
        gate = 1.0
        if z is not None:
            z_t = z_next.to(S)
            gate = z_t * sigmoid(z_t)
            z_next = _values(z, ahead, z_stride, c, inside)
        delta, decay = _decay(dt_t, bias, A_n, cuts, row, SOFTPLUS)
        if ADJOINT:
            d_sum = SCALE * u_t * gate
            h = decay * (h + d_sum[:, None] * B_t)
        else:
            h = decay * h + (delta * u_t)[:, None] * B_t
        B_next = _values(B, ahead, B_stride, n, n < N)
        if y is None:
            total += delta
            if cuts is not None:
                total = tl.where(tl.load(cuts + row) != 0, float("inf"), total)
        else:
            y_t = tl.sum(h * C_next.to(S)[None, :], 1) + skip * u_t
            C_next = _values(C, ahead, C_stride, n, n < N)
            if ADD:
                y_t += y_next.to(S)
                y_next = _values(y, ahead, d_inner, c, inside)
            if y_sum is not None:
                tl.store(y_sum + row.to(tl.int64) * d_inner + c, y_t, inside)
            tl.store(y + row.to(tl.int64) * d_inner + c, SCALE * y_t * gate, inside)
    if y is None:
        tl.store(last_state + start, h, inside_n)
        tl.store(totals + (at * start_pitch + b) * d_inner + c, total, inside)
    else:
        ends = tl.where(sign > 0, at * window + here, length - at * window) == length
        tl.store(last_state + b * d_inner * N + entries, h, inside_n & ends)


@triton.jit
def _run(
    h, kept, begin, end, u, u_stride, dt, dt_stride, B, B_stride, cuts, sign, c, n, inside, bias, A,
    EVERY: tl.constexpr, SOFTPLUS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Run the recurrence from step `begin` to `end` and keep the state before every EVERY-th step."""
    some = begin < end  # else the first row may lie outside
    u_next = _values(u, begin * sign, u_stride, c, inside & some)
    dt_next = _values(dt, begin * sign, dt_stride, c, inside & some)
    B_next = _values(B, begin * sign, B_stride, n, (n < N) & some)
    for step in range(begin, end):
        if (step - begin) % EVERY == 0:
            tl.store(kept + (step - begin) // EVERY * (h.shape[0] * h.shape[1]), h)
        u_t, dt_t = u_next.to(A.dtype), dt_next
        ahead = tl.minimum(step + 1, end - 1) * sign
        u_next = _values(u, ahead, u_stride, c, inside)
        dt_next = _values(dt, ahead, dt_stride, c, inside)
        delta, decay = _decay(dt_t, bias, A, cuts, step * sign, SOFTPLUS)
        h = decay * h + (delta * u_t)[:, None] * B_next.to(A.dtype)[None, :]
        B_next = _values(B, ahead, B_stride, n, n < N)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_kernel(
    u,  # (B, L, E)
    dt,  # (B, L, E)
    A,  # (E, N)
    B,  # (B, L, G, N)
    C,  # (B, L, G, N)
    D,  # (E,) or None
    dt_bias,  # (E,) or None
    cuts,  # see the forward, as all arguments that have no comment
    z,
    dy,  # (B, L, E)
    y_sum,  # (B, L, E), read for dz
    starts,  # (windows, B, E, N), read if started: the adjoint after each window, else zero
    checkpoints,  # (B, rows, E, N)
    du,  # (B, L, E)
    ddt,  # (B, L, E)
    dA,  # (windows, B, E, N)
    dD,  # (windows, B, E) or None
    d_bias,  # (windows, B, E) or None
    dB,  # (blocks, B, L, G, N)
    dC,  # (blocks, B, L, G, N)
    d_h0,  # (B, E, N) or None
    dz,  # (B, L, E)
    scratch,  # (programs, K / T + T, CHANNELS, STATES)
    items,  # blocks of channels over all batch entries and windows
    is_first,  # of the directions: writes dz
    batch, length, d_inner, group_size, window, windows, sign, started, start_pitch,
    u_pitch, u_stride, dt_pitch, dt_stride, B_pitch, B_stride, C_pitch, C_stride, z_pitch, z_stride,
    dy_pitch, dy_stride,
    HALVES: tl.constexpr, K: tl.constexpr, T: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
    SCALE: tl.constexpr, SOFTPLUS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = scratch.dtype.element_ty
    SIZE: tl.constexpr = CHANNELS * STATES
    own = tl.arange(0, CHANNELS)[:, None] * STATES + tl.arange(0, STATES)[None, :]
    blocks_kept = scratch + tl.program_id(0).to(tl.int64) * ((K // T + T) * SIZE) + own
    steps_kept = blocks_kept + K // T * SIZE
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        b, group, at, first, here, c, n, entries, inside, inside_n = _place(
            item, sign, batch, length, window, windows, group_size, GROUPS, N, STATES, CHANNELS
        )
        A_n = LOG2E * tl.load(A + entries, inside_n, 0.0)
        bias = _parameters(dt_bias, c, inside, S)
        skip = _parameters(D, c, inside, S)
        u_0 = u + (b * u_pitch + first) * u_stride
        dt_0 = dt + (b * dt_pitch + first) * dt_stride
        B_0 = B + (b * B_pitch + first) * B_stride + group * N
        C_0 = C + (b * C_pitch + first) * C_stride + group * N
        dy_0 = dy + (b * dy_pitch + first) * dy_stride
        z_0 = z
        cuts_0 = cuts
        if z is not None:
            z_0 = z + (b * z_pitch + first) * z_stride
        if cuts is not None:
            cuts_0 = cuts + b * (length + 1) + first + (sign < 0)
        out = (b * length + first) * d_inner
        part = (((item % tl.cdiv(group_size, CHANNELS) * batch + b) * length + first) * GROUPS + group) * N
        g = tl.load(starts + (at * start_pitch + b) * d_inner * N + entries, inside_n & (started > 0), 0.0)
        sum_A = tl.zeros([CHANNELS, STATES], S)
        sum_D = tl.zeros([CHANNELS], S)
        sum_bias = tl.zeros([CHANNELS], S)
        half = tl.cdiv(here, HALVES)
        middle = tl.where(sign > 0, half, here // HALVES)
        chunks = tl.cdiv(half, K)
        rows = b * (HALVES * tl.cdiv(tl.cdiv(length, HALVES), K)) + at * (window // K)

        for chunk in range(HALVES * chunks - 1, -1, -1):
            begin = tl.where(chunk < chunks, chunk * K, middle + (chunk - chunks) * K)
            end = tl.minimum(begin + K, tl.where(chunk < (HALVES - 1) * chunks, middle, here))
            h = tl.load(checkpoints + (rows + chunk) * d_inner * N + entries, inside_n, 0.0)
            _run(
                h, blocks_kept, begin, end, u_0, u_stride, dt_0, dt_stride, B_0, B_stride, cuts_0,
                sign, c, n, inside, bias, A_n, T, SOFTPLUS, N,
            )  # fmt: skip
            for block in range(tl.cdiv(end - begin, T) - 1, -1, -1):
                block_begin = begin + block * T
                block_end = tl.minimum(block_begin + T, end)
                tl.debug_barrier()  # all lanes have stored
                h = tl.load(blocks_kept + block * SIZE)
                _run(
                    h, steps_kept, block_begin, block_end, u_0, u_stride, dt_0, dt_stride, B_0, B_stride, cuts_0, sign,
                    c, n, inside, bias, A_n, 1, SOFTPLUS, N,
                )  # fmt: skip
                tl.debug_barrier()
                for step in range(block_end - 1, block_begin - 1, -1):
                    row = step * sign
                    u_t = _values(u_0, row, u_stride, c, inside).to(S)
                    dt_t = _values(dt_0, row, dt_stride, c, inside).to(S)
                    B_t = _values(B_0, row, B_stride, n, n < N).to(S)[None, :]
                    C_t = _values(C_0, row, C_stride, n, n < N).to(S)[None, :]
                    h = tl.load(steps_kept + (step - block_begin) * SIZE)
                    delta, decay = _decay(dt_t, bias, A_n, cuts_0, row, SOFTPLUS)
                    at_c = out + row.to(tl.int64) * d_inner + c
                    dy_t = SCALE * _values(dy_0, row, dy_stride, c, inside).to(S)
                    if z is not None:
                        z_t = _values(z_0, row, z_stride, c, inside).to(S)
                        gate = sigmoid(z_t)
                        owned = inside & (is_first > 0)
                        y_t = tl.load(y_sum + at_c, owned, 0.0).to(S)
                        tl.store(dz + at_c, dy_t * y_t * gate * (1 + z_t * (1 - gate)), owned)
                        dy_t *= z_t * gate

                    x = (delta * u_t)[:, None]
                    g += dy_t[:, None] * C_t
                    at_n = part + row.to(tl.int64) * (GROUPS * N) + n
                    tl.store(dB + at_n, tl.sum(g * x, 0), n < N)
                    tl.store(dC + at_n, tl.sum(dy_t[:, None] * (decay * h + x * B_t), 0), n < N)
                    gB = tl.sum(g * B_t, 1)
                    g *= decay
                    q = g * h
                    sum_A += q * delta[:, None]
                    ddt_t = LN2 * tl.sum(q * A_n, 1) + u_t * gB
                    if SOFTPLUS:
                        ddt_t *= sigmoid(dt_t + bias)
                    sum_D += dy_t * u_t
                    sum_bias += ddt_t
                    tl.store(du + at_c, delta * gB + skip * dy_t, inside)
                    tl.store(ddt + at_c, ddt_t, inside)

        entry = (at * batch + b) * d_inner
        tl.store(dA + entry * N + entries, sum_A, inside_n)
        if dD is not None:
            tl.store(dD + entry + c, sum_D, inside)
        if d_bias is not None:
            tl.store(d_bias + entry + c, sum_bias, inside)
        if d_h0 is not None:
            foremost = tl.where(sign > 0, length - at * window, at * window + here) == length
            tl.store(d_h0 + b * d_inner * N + entries, g, inside_n & foremost)


def launch(
    directions: Sequence[Direction],
    z: Tensor | None,
    starts: Tensor | None,
    outputs: tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None],
    window: int,
    *,
    dt_softplus: bool,
    scale: float = 1.0,
    dy: Tensor | None = None,
) -> None:
    """Run the scan, or the recurrence over windows (with dy the adjoint's); outputs: y to totals, see the kernel."""
    y, y_sum, last_state, checkpoints, totals = outputs
    for i, d in enumerate(directions):
        final = i == len(directions) - 1 or dy is not None
        x, B = (d.u, d.B) if dy is None else (dy, d.C)
        gate = z if final else None
        grid, arguments = _arguments(directions, i, window, starts, u=x, dt=d.dt, B=B, C=d.C, z=gate)
        if dy is not None:
            arguments["sign"] *= -1
        if y is None:
            grid -= grid // arguments["windows"]
        _forward_kernel[(grid,)](
            x, d.dt, d.A, B, d.C, d.D, d.dt_bias, cut_bytes(d), gate,
            last_state if starts is None else starts[0, i], y, y_sum if final else None,
            last_state[i] if totals is None else last_state[0, i],
            None if checkpoints is None else checkpoints[i],
            None if totals is None else totals[0, i],
            **arguments, ADJOINT=dy is not None, ADD=i > 0 and totals is None, SCALE=scale if final else 1.0,
            SOFTPLUS=dt_softplus, num_warps=1,
        )  # fmt: skip


def launch_backward(
    dy: Tensor,
    directions: Sequence[Direction],
    z: Tensor | None,
    starts: Tensor | None,
    checkpoints: Tensor,
    y_sum: Tensor,
    window: int,
    *,
    dt_softplus: bool,
    scale: float,
) -> tuple[list[tuple[Tensor | None, ...]], Tensor | None]:
    """Gradients of each direction, in the order of `DirectionGrads`, some in the precision of the states; and of z."""
    dz = None if z is None else z.new_empty(z.shape)
    grads: list[tuple[Tensor | None, ...]] = []
    for i, d in enumerate(directions):
        items, arguments = _arguments(directions, i, window, starts, u=d.u, dt=d.dt, B=d.B, C=d.C, z=z, dy=dy)
        windows, channels, states = (arguments[name] for name in ("windows", "CHANNELS", "STATES"))
        # As many programs as run at once: more would only need more scratch memory.
        registers = 255 if d.A.dtype == torch.float64 else 168 if channels == 32 else 200
        programs = min(items, _multiprocessors(dy.device) * (REGISTERS // registers))
        scratch = d.A.new_empty(programs, INTERVAL // T + T, channels, states)
        du, ddt = d.u.new_empty(d.u.shape), d.dt.new_empty(d.dt.shape)
        parts = [None if t is None else d.A.new_empty(windows, len(dy), *t.shape) for t in (d.A, d.D, d.dt_bias)]
        blocks = triton.cdiv(arguments["group_size"], channels)
        dB, dC = (d.A.new_empty(blocks, *d.B.shape) for _ in range(2))
        d_h0 = None if d.initial_state is None else d.A.new_empty(d.initial_state.shape)
        _backward_kernel[(programs,)](
            d.u, d.dt, d.A, d.B, d.C, d.D, d.dt_bias, cut_bytes(d), z, dy, y_sum,
            scratch if starts is None else starts[0, i],
            checkpoints[i], du, ddt, *parts, dB, dC, d_h0, dz, scratch, items, int(i == 0),
            **arguments, T=T, SCALE=scale, SOFTPLUS=dt_softplus, num_warps=1, maxnreg=registers,
        )  # fmt: skip
        dA, dD, d_bias = (None if t is None else t.sum((0, 1)) for t in parts)
        grads.append((du, ddt, dA, dB.sum(0), dC.sum(0), dD, d_bias, d_h0))
    return grads, dz


def _arguments(
    directions: Sequence[Direction], i: int, window: int, starts: Tensor | None, **rows: Tensor | None
) -> tuple[int, dict[str, Any]]:
    """Blocks of channels over all groups, batch entries and windows of direction i, and arguments of both kernels.

    Blocks are functions of shapes and dtypes only, so that a call gives the same bits everywhere.
    """
    d, count = directions[i], len(directions)
    batch, length, d_inner = d.u.shape
    groups, windows, states = d.B.shape[2], triton.cdiv(length, window), triton.next_power_of_2(d.A.shape[1])
    channels = min(32, max(1, 512 // states))
    return triton.cdiv(d_inner // groups, channels) * groups * batch * windows, {
        **sizes(d),
        **row_arguments(**rows),
        "window": window,
        "windows": windows,
        "sign": -1 if d.reverse else 1,
        "started": int(starts is not None),
        "start_pitch": count * batch,
        "HALVES": count,
        "K": INTERVAL,
        "STATES": states,
        "CHANNELS": channels,
    }


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
