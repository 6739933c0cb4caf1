# mypy: disable-error-code="assignment"
"""The kernels of `mamba_block_step`.

A step of a few sequences does next to nothing but read the weights, so what counts is that each is read once, by
enough programs to fill the chip, in as few launches as the order of things allows. The norm and the convolution are
cheap and are computed again by every program that needs them; what all programs read must not be changed by one of
them, so the states are moved by the only kernel that owns them, `_state_kernel`.

    _norm_project   xz = in_proj norm(x)                                     rows of in_proj over programs
    _conv_project   (dt, B, C) = x_proj silu(conv(xz))                       rows of x_proj
    _state_kernel   dt_proj, softplus, recurrence, D, gate; moves the states channels, batch
    _project_add    x + out_proj y                                           rows of out_proj

Many sequences are matrix products, which cuBLAS does better: then only the convolution and the state are kernels here.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .block_step import MambaBlockWeights
from .rms_norm import rms_norm
from .rows import on_device_of

FEW = 4  # sequences whose products are done here


@triton.jit
def _norm_project(
    x,  # (batch, K)
    norm,  # (K,)
    weight,  # (rows, K)
    out,  # (batch, rows)
    batch,
    rows,
    K,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, BATCH)
    total = tl.zeros([ROWS, BATCH], tl.float32)
    squares = tl.zeros([BATCH], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x_k = tl.load(x + b[:, None] * K + k[None, :], (b[:, None] < batch) & (k[None, :] < K), 0.0).to(tl.float32)
        n_k = tl.load(norm + k, k < K, 0.0).to(tl.float32)
        w_k = tl.load(weight + row[:, None] * K + k[None, :], (row[:, None] < rows) & (k[None, :] < K), 0.0)
        squares += tl.sum(x_k * x_k, 1)
        total += tl.sum(w_k.to(tl.float32)[:, None, :] * (x_k * n_k[None, :])[None, :, :], 2)
    total *= (1 / tl.sqrt(squares / K + EPS))[None, :]
    tl.store(out + b[None, :] * rows + row[:, None], total, (row[:, None] < rows) & (b[None, :] < batch))


@triton.jit
def _convolved(xz, conv_state, conv, conv_bias, b, e, inside, E, W: tl.constexpr):
    """silu of the convolution at batch entries b and channels e, which broadcast against each other."""
    total = tl.load(conv_bias + e, inside, 0.0).to(tl.float32)
    for tap in tl.static_range(W - 1):
        past = tl.load(conv_state + (b * (W - 1) + tap) * E + e, inside, 0.0).to(tl.float32)
        total += past * tl.load(conv + e * W + tap, inside, 0.0).to(tl.float32)
    new = tl.load(xz + b * 2 * E + e, inside, 0.0).to(tl.float32)
    total += new * tl.load(conv + e * W + W - 1, inside, 0.0).to(tl.float32)
    return total / (1 + tl.exp(-total))


@triton.jit
def _conv_project(
    xz,  # (batch, 2 E)
    conv_state,  # (batch, W - 1, E)
    conv,  # (E, W)
    conv_bias,  # (E,)
    weight,  # (rows, E)
    out,  # (batch, rows)
    batch,
    rows,
    E,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, BATCH)
    total = tl.zeros([ROWS, BATCH], tl.float32)
    for start in range(0, E, BLOCK):
        e = start + tl.arange(0, BLOCK)
        inside = (b[:, None] < batch) & (e[None, :] < E)
        u = _convolved(xz, conv_state, conv, conv_bias, b[:, None], e[None, :], inside, E, W)
        w = tl.load(weight + row[:, None] * E + e[None, :], (row[:, None] < rows) & (e[None, :] < E), 0.0)
        total += tl.sum(w.to(tl.float32)[:, None, :] * u[None, :, :], 2)
    tl.store(out + b[None, :] * rows + row[:, None], total, (row[:, None] < rows) & (b[None, :] < batch))


@triton.jit
def _convolve(xz, conv_state, conv, conv_bias, u, E, W: tl.constexpr, BLOCK: tl.constexpr):
    b, e = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(u + b * E + e, _convolved(xz, conv_state, conv, conv_bias, b, e, e < E, E, W), e < E)


@triton.jit
def _state_kernel(
    xz,  # (batch, 2 E)
    conv_state,  # (batch, W - 1, E), moved
    conv,  # (E, W)
    conv_bias,  # (E,)
    projected,  # (batch, R + 2 N): dt, B, C
    dt_proj,  # (E, R)
    dt_bias,  # (E,)
    A_log,  # (E, N)
    D,  # (E,)
    state,  # (batch, E, N), moved
    y,  # (batch, E)
    E,
    R,
    W: tl.constexpr,
    N: tl.constexpr,
    STATES: tl.constexpr,  # a power of two, N at least
    RANK: tl.constexpr,  # a power of two, R at least
    BLOCK: tl.constexpr,
):
    b, e = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    u = _convolved(xz, conv_state, conv, conv_bias, b, e, inside, E, W)
    r, n = tl.arange(0, RANK), tl.arange(0, STATES)
    row = projected + b * (R + 2 * N)
    low = tl.load(row + r, r < R, 0.0).to(tl.float32)
    w = tl.load(dt_proj + e[:, None] * R + r[None, :], inside[:, None] & (r[None, :] < R), 0.0).to(tl.float32)
    dt = tl.sum(w * low[None, :], 1) + tl.load(dt_bias + e, inside, 0.0).to(tl.float32)
    delta = tl.where(dt > 20, dt, tl.log(1 + tl.exp(tl.minimum(dt, 20))))
    each = inside[:, None] & (n[None, :] < N)
    A = -tl.exp(tl.load(A_log + e[:, None] * N + n[None, :], each, 0.0).to(tl.float32))
    B = tl.load(row + R + n, n < N, 0.0).to(tl.float32)
    C = tl.load(row + R + N + n, n < N, 0.0).to(tl.float32)
    at = state + (b * E + e[:, None]) * N + n[None, :]
    h = tl.exp(delta[:, None] * A) * tl.load(at, each, 0.0) + (delta * u)[:, None] * B[None, :]
    tl.store(at, h, each)
    out = tl.sum(h * C[None, :], 1) + tl.load(D + e, inside, 0.0).to(tl.float32) * u
    z = tl.load(xz + b * 2 * E + E + e, inside, 0.0).to(tl.float32)
    tl.store(y + b * E + e, out * z / (1 + tl.exp(-z)), inside)
    for tap in tl.static_range(W - 1):  # oldest first: a tap is read before it is written
        if tap < W - 2:
            later = tl.load(conv_state + (b * (W - 1) + tap + 1) * E + e, inside, 0.0)
        else:
            later = tl.load(xz + b * 2 * E + e, inside, 0.0)
        tl.store(conv_state + (b * (W - 1) + tap) * E + e, later, inside)


@triton.jit
def _project_add(
    x,  # (batch, rows)
    y,  # (batch, K)
    weight,  # (rows, K)
    out,  # (batch, rows)
    batch,
    rows,
    K,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, BATCH)
    total = tl.zeros([ROWS, BATCH], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        y_k = tl.load(y + b[:, None] * K + k[None, :], (b[:, None] < batch) & (k[None, :] < K), 0.0).to(tl.float32)
        w_k = tl.load(weight + row[:, None] * K + k[None, :], (row[:, None] < rows) & (k[None, :] < K), 0.0)
        total += tl.sum(w_k.to(tl.float32)[:, None, :] * y_k[None, :, :], 2)
    at = b[None, :] * rows + row[:, None]
    inside = (row[:, None] < rows) & (b[None, :] < batch)
    tl.store(out + at, tl.load(x + at, inside, 0.0).to(tl.float32) + total, inside)


def block_step(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MambaBlockWeights, eps: float) -> Tensor:
    """See `mamba_block_step`."""
    batch, d_model = x.shape
    d_inner, d_state = weights.A_log.shape
    rank, taps = weights.dt_proj.shape[1], weights.conv.shape[1]
    few, dtype = batch <= FEW, weights.in_proj.dtype
    x = x.contiguous()
    convolution = conv_state, weights.conv, weights.conv_bias
    columns = {"BATCH": triton.next_power_of_2(batch), "BLOCK": 512, "num_warps": 4}
    with on_device_of(x):
        if few:
            xz = x.new_empty(batch, 2 * d_inner, dtype=dtype)
            grid = (triton.cdiv(2 * d_inner, 8),)
            _norm_project[grid](
                x, weights.norm, weights.in_proj, xz, batch, 2 * d_inner, d_model, EPS=eps, ROWS=8, **columns
            )
            projected = x.new_empty(batch, rank + 2 * d_state, dtype=dtype)
            _conv_project[(rank + 2 * d_state,)](
                xz,
                *convolution,
                weights.x_proj,
                projected,
                batch,
                rank + 2 * d_state,
                d_inner,
                W=taps,
                ROWS=1,
                **columns,
            )
        else:
            xz = F.linear(rms_norm(x, weights.norm, eps, dtype=dtype), weights.in_proj)
            u = xz.new_empty(batch, d_inner)
            _convolve[(triton.cdiv(d_inner, 256), batch)](xz, *convolution, u, d_inner, W=taps, BLOCK=256)
            projected = F.linear(u, weights.x_proj)
        y = xz.new_empty(batch, d_inner)
        _state_kernel[(triton.cdiv(d_inner, 16), batch)](
            xz,
            *convolution,
            projected,
            weights.dt_proj,
            weights.dt_bias,
            weights.A_log,
            weights.D,
            ssm_state,
            y,
            d_inner,
            rank,
            W=taps,
            N=d_state,
            STATES=triton.next_power_of_2(d_state),
            RANK=triton.next_power_of_2(rank),
            BLOCK=16,
            num_warps=2,
        )
        if not few:
            return x + F.linear(y, weights.out_proj)
        out = torch.empty_like(x)
        _project_add[(triton.cdiv(d_model, 4),)](
            x, y, weights.out_proj, out, batch, d_model, d_inner, ROWS=4, **columns
        )
        return out
