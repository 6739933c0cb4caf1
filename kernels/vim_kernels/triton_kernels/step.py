# mypy: disable-error-code="assignment"
"""Backend `triton` of `mamba_block_step`.

A step of a few sequences mostly reads weights. So each weight is read once, by enough programs to fill the chip:

    _in_project     (u, z) = in_proj norm(x), u = silu(conv(u))    programs over rows of in_proj; shifts the windows
    _project        (dt, B, C) = x_proj u                          programs over rows of x_proj
    _state_kernel   dt_proj, softplus, recurrence, D, gate         programs over channels, batch; updates the states
    _project        x + out_proj y                                 programs over rows of out_proj

Each kernel takes 2 us, mostly waiting for memory and for the preceding kernel. If the hardware has programmatic
dependent launch, all programs of a kernel start as soon as those of the preceding kernel have started, read their
weights, and then wait for its results.

Many sequences make matrix products, which cuBLAS does better: then only the convolution and the state are kernels here.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..block_weights import MambaBlockWeights
from ..rms_norm import rms_norm
from ..rows import on_device_of
from .activations import sigmoid, softplus

FEW = 4  # most sequences whose products are done here
TILE = 16384  # most weights that a program holds


@triton.jit
def _start(PDL: tl.constexpr):
    """Let the next kernel start, and wait for the preceding one. Before this call a kernel may only read weights."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _rows_of(weight, row, rows, k, K):
    return tl.load(weight + row[:, None] * K + k[None, :], (row[:, None] < rows) & (k[None, :] < K), 0.0)


@triton.jit
def _in_project(
    x,  # (batch, K)
    norm,  # (K,)
    weight,  # (2 E, K)
    conv_state,  # (batch, W - 1, E), shifted by a step
    conv,  # (E, W)
    conv_bias,  # (E,)
    uz,  # (batch, 2 E)
    rows,
    K,
    EPS: tl.constexpr,
    W: tl.constexpr,
    TAPS: tl.constexpr,  # a power of two, at least W
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least K
    PDL: tl.constexpr,
):
    row, k, tap = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, TAPS)
    E = rows // 2
    w = _rows_of(weight, row, rows, k, K)
    n = tl.load(norm + k, k < K, 0.0).to(tl.float32)
    of_x, before = row < E, (row[:, None] < E) & (tap[None, :] < W - 1)
    c = tl.load(conv + row[:, None] * W + tap[None, :], before, 0.0).to(tl.float32)
    c_new = tl.load(conv + row * W + W - 1, of_x, 0.0).to(tl.float32)
    bias = tl.load(conv_bias + row, of_x, 0.0).to(tl.float32)
    _start(PDL)
    for b in tl.static_range(BATCH):
        x_b = tl.load(x + b * K + k, k < K, 0.0).to(tl.float32)
        at = conv_state + (b * (W - 1) + tap[None, :]) * E + row[:, None]
        past = tl.load(at, before, 0.0)
        scale = 1 / tl.sqrt(tl.sum(x_b * x_b, 0) / K + EPS)
        total = tl.sum(w.to(tl.float32) * (x_b * n)[None, :], 1) * scale
        v = tl.sum(past.to(tl.float32) * c, 1) + total * c_new + bias
        tl.store(uz + b * rows + row, tl.where(of_x, v * sigmoid(v), total), row < rows)
        if W > 1:
            tl.debug_barrier()  # all threads have read the taps
            tl.store(at - E, past, before & (tap[None, :] > 0))
            tl.store(conv_state + (b * (W - 1) + W - 2) * E + row, total, of_x)


@triton.jit
def _project(
    v,  # (batch, STRIDE); the first K columns are read
    weight,  # (rows, K)
    residual,  # (batch, rows) or None
    out,  # (batch, rows)
    rows,
    K,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least K
    PDL: tl.constexpr,
):
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    w = _rows_of(weight, row, rows, k, K)
    _start(PDL)
    for b in tl.static_range(BATCH):
        v_b = tl.load(v + b * STRIDE + k, k < K, 0.0).to(tl.float32)
        total = tl.sum(w.to(tl.float32) * v_b[None, :], 1)
        if residual is not None:
            total += tl.load(residual + b * rows + row, row < rows, 0.0).to(tl.float32)
        tl.store(out + b * rows + row, total, row < rows)


@triton.jit
def _convolve(uz, conv_state, conv, conv_bias, E, W: tl.constexpr, BLOCK: tl.constexpr):
    """Replace x by silu of its convolution, and shift the window."""
    b, e = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, at = e < E, conv_state + b * (W - 1) * E + e
    new = tl.load(uz + b * 2 * E + e, inside, 0.0)
    v = tl.load(conv_bias + e, inside, 0.0).to(tl.float32)
    v += new.to(tl.float32) * tl.load(conv + e * W + W - 1, inside, 0.0).to(tl.float32)
    for tap in tl.static_range(W - 1):  # oldest first: a tap is read before it is written
        past = tl.load(at + tap * E, inside, 0.0)
        v += past.to(tl.float32) * tl.load(conv + e * W + tap, inside, 0.0).to(tl.float32)
        if tap > 0:
            tl.store(at + (tap - 1) * E, past, inside)
    if W > 1:
        tl.store(at + (W - 2) * E, new, inside)
    tl.store(uz + b * 2 * E + e, v * sigmoid(v), inside)


@triton.jit
def _state_kernel(
    uz,  # (batch, 2 E)
    projected,  # (batch, R + 2 N): dt, B, C
    dt_proj,  # (E, R)
    dt_bias,  # (E,)
    A_log,  # (E, N)
    D,  # (E,)
    state,  # (batch, E, N), updated
    y,  # (batch, E)
    E,
    R,
    N: tl.constexpr,
    STATES: tl.constexpr,  # a power of two, at least N
    RANK: tl.constexpr,  # a power of two, at least R
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    b, e = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    r, n = tl.arange(0, RANK), tl.arange(0, STATES)
    each = inside[:, None] & (n[None, :] < N)
    w = tl.load(dt_proj + e[:, None] * R + r[None, :], inside[:, None] & (r[None, :] < R), 0.0).to(tl.float32)
    bias = tl.load(dt_bias + e, inside, 0.0).to(tl.float32)
    A = -tl.exp(tl.load(A_log + e[:, None] * N + n[None, :], each, 0.0).to(tl.float32))
    d = tl.load(D + e, inside, 0.0).to(tl.float32)
    _start(PDL)
    at = state + (b * E + e[:, None]) * N + n[None, :]
    h = tl.load(at, each, 0.0)
    row = projected + b * (R + 2 * N)
    u = tl.load(uz + b * 2 * E + e, inside, 0.0).to(tl.float32)
    z = tl.load(uz + b * 2 * E + E + e, inside, 0.0).to(tl.float32)
    B = tl.load(row + R + n, n < N, 0.0).to(tl.float32)
    C = tl.load(row + R + N + n, n < N, 0.0).to(tl.float32)
    delta = softplus(tl.sum(w * tl.load(row + r, r < R, 0.0).to(tl.float32)[None, :], 1) + bias)
    h = tl.exp(delta[:, None] * A) * h + (delta * u)[:, None] * B[None, :]
    tl.store(at, h, each)
    out = tl.sum(h * C[None, :], 1) + d * u
    tl.store(y + b * E + e, out * z * sigmoid(z), inside)


def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may read its weights before the preceding kernel has ended.

    Only during CUDA graph capture. Otherwise launches from Python are slower than the kernels, so there is nothing to
    gain, and the preceding kernel may write the weights.
    """
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.is_current_stream_capturing()
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def block_step(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MambaBlockWeights, eps: float) -> Tensor:
    """See `mamba_block_step`. States and weights are contiguous."""
    batch = len(x)
    d_inner, d_state = weights.A_log.shape
    rank, taps = weights.dt_proj.shape[1], weights.conv.shape[1]
    few, dtype = batch <= FEW, weights.in_proj.dtype
    x = x.contiguous()
    convolution = conv_state, weights.conv, weights.conv_bias
    overlap = {"PDL": True, "launch_pdl": True} if few and _overlaps(x.device) else {"PDL": False}

    def product(kernel, shape: torch.Size, *tensors: Tensor | None, each: int, **constants) -> None:
        """Launch over the rows of a weight of this shape, `each` rows per program."""
        rows, columns = shape
        block = triton.next_power_of_2(columns)
        each = max(1, min(each, TILE // block))
        kernel[(triton.cdiv(rows, each),)](
            *tensors,
            rows,
            columns,
            ROWS=each,
            BATCH=batch,
            BLOCK=block,
            num_warps=4 if each * block < TILE else 8,
            **constants,
            **overlap,
        )

    with on_device_of(x):
        if few:
            uz = x.new_empty(batch, 2 * d_inner, dtype=dtype)
            inputs = x, weights.norm, weights.in_proj, *convolution, uz
            taps_block = triton.next_power_of_2(taps)
            product(_in_project, weights.in_proj.shape, *inputs, each=8, EPS=eps, W=taps, TAPS=taps_block)
            projected = x.new_empty(batch, rank + 2 * d_state, dtype=dtype)
            inputs = uz, weights.x_proj, None, projected
            product(_project, weights.x_proj.shape, *inputs, each=1, STRIDE=2 * d_inner)
        else:
            uz = F.linear(rms_norm(x, weights.norm, eps, dtype=dtype), weights.in_proj)
            _convolve[(triton.cdiv(d_inner, 256), batch)](uz, *convolution, d_inner, W=taps, BLOCK=256)
            projected = F.linear(uz[:, :d_inner], weights.x_proj)
        y = uz.new_empty(batch, d_inner)
        _state_kernel[(triton.cdiv(d_inner, 16), batch)](
            uz,
            projected,
            weights.dt_proj,
            weights.dt_bias,
            weights.A_log,
            weights.D,
            ssm_state,
            y,
            d_inner,
            rank,
            N=d_state,
            STATES=triton.next_power_of_2(d_state),
            RANK=triton.next_power_of_2(rank),
            BLOCK=16,
            num_warps=2,
            **overlap,
        )
        if not few:
            return x + F.linear(y, weights.out_proj)
        out = torch.empty_like(x)
        product(_project, weights.out_proj.shape, y, weights.out_proj, x, out, each=8, STRIDE=d_inner)
        return out
