"""Single steps that update their caches in place, as in causal_conv1d and mamba_ssm.ops.triton.selective_state_update.

Neither has gradients, here or in the originals.
"""

import torch
from torch import Tensor

from .. import state_update
from ..causal_conv import causal_conv1d
from ..checks import check, check_shape, check_tensors, shape_of
from .conv import check_conv, is_silu

INDICES = (torch.int32, torch.int64)


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve the next steps of sequences, whose last steps are in conv_state.

    Args:
        x: (batch, dim) or (batch, dim, length). weight: (dim, width). bias: (dim,). activation: None, "silu", "swish".
        conv_state: (batch, dim, state_len) with state_len >= width - 1, oldest first; updated in place.
        cache_seqlens: (batch,), int32 or int64: conv_state is a ring, and the next step goes to cache_seqlens %
            state_len.
        conv_state_indices: (batch,), int32 or int64, the row of conv_state of each sequence. A row below 0 is padding:
            its output is 0, and no state changes.

    Returns: like x.

    Raises: ValueError, TypeError: a wrong shape, device or dtype. NotImplementedError: another activation.
    """
    silu = is_silu(activation)
    check_tensors({"x": x, "conv_state": conv_state, "weight": weight, "bias": bias}, like="x")
    steps = x.unsqueeze(-1) if x.dim() == 2 else x
    check_conv(steps, weight, bias)
    (batch, dim, length), past = steps.shape, weight.shape[1] - 1
    holds = conv_state.dim() == 3 and conv_state.shape[1] == dim and conv_state.shape[2] >= past
    check(holds, "conv_state", conv_state, f"be (batch, dim, state_len) with dim = {dim} and state_len >= {past}")
    state_len = conv_state.shape[2]
    _check_indices("cache_seqlens", cache_seqlens, x)
    old = _rows(conv_state, conv_state_indices, "conv_state", x)
    if cache_seqlens is None:
        new = torch.cat((old, steps.to(old.dtype)), -1)[..., length:]
        before = old[..., state_len - past :]
    else:
        next_place = cache_seqlens.long().view(batch, 1, 1)
        back = torch.arange(-past, 0, device=x.device)
        before = old.take_along_dim((next_place + back) % state_len, -1)
        kept = torch.arange(max(0, length - state_len), length, device=x.device)  # no place is written twice
        places = ((next_place + kept) % state_len).expand(batch, dim, -1)
        new = old.scatter(-1, places, steps[..., kept].to(old.dtype))
    y = causal_conv1d(steps.mT, weight, bias, activation="silu" if silu else None, initial_state=before.mT)
    y = _write(conv_state, conv_state_indices, new, y.mT)
    return y.squeeze(-1) if x.dim() == 2 else y.contiguous()


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Advance the recurrence by one step; `vim_kernels.selective_state_update` in place, with or without heads.

    Args:
        state: (batch, dim, d_state) or (batch, heads, dim, d_state); updated in place.
        x, dt, z: (batch, dim) or (batch, heads, dim). A: (dim, d_state) or (heads, dim, d_state).
        B, C: (batch, d_state) or (batch, groups, d_state); groups divide the heads. D, dt_bias: (dim,) or (heads, dim).
        state_batch_indices: (batch,), int32 or int64, the row of `state` of each sequence. A row below 0 is padding:
            its output is 0, and no state changes.

    Returns: like x.

    Raises: ValueError, TypeError: a wrong shape, device or dtype.
    """
    named = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    check_tensors(named, like="x")
    check(state.dim() in (3, 4), "state", state, "be (batch, dim, d_state) or (batch, heads, dim, d_state)")
    heads, dim, d_state = state.shape[1:] if state.dim() == 4 else (1, *state.shape[1:])
    each, batch = heads * dim, x.shape[0]
    channels = {}
    for name, t in (("x", x), ("dt", dt), ("z", z)):
        if t is not None:
            fits = shape_of(t) == (batch, heads, dim) or (heads == 1 and shape_of(t) == (batch, dim))
            check(fits, name, t, f"be (batch, heads, dim) = {(batch, heads, dim)}")
            channels[name] = t.reshape(batch, each)
    for name, t, last in (("A", A, (d_state,)), ("D", D, ()), ("dt_bias", dt_bias, ())):
        if t is not None:
            fits = shape_of(t) == (heads, dim, *last) or (heads == 1 and shape_of(t) == (dim, *last))
            check(fits, name, t, f"be (heads, dim{', d_state' if last else ''}) = {(heads, dim, *last)}")
            channels[name] = t.reshape(each, *last)
    for name, t in (("B", B), ("C", C)):
        groups = t.shape[1] if t.dim() == 3 else 1
        fits = shape_of(t) in ((batch, groups, d_state), (batch, d_state)) and groups > 0 and heads % groups == 0
        check(fits, name, t, f"be (batch, groups, d_state) with groups that divide heads = {heads}")
    old = _rows(state, state_batch_indices, "state", x)
    y, new = state_update.selective_state_update(
        old.reshape(batch, each, d_state),
        channels["x"],
        channels["dt"],
        channels["A"],
        B,
        C,
        D=channels.get("D"),
        z=channels.get("z"),
        dt_bias=channels.get("dt_bias"),
        dt_softplus=bool(dt_softplus),
    )
    return _write(state, state_batch_indices, new.reshape(old.shape), y.reshape(x.shape))


def _check_indices(name: str, t: Tensor | None, x: Tensor) -> None:
    if t is not None:
        check_tensors({name: t}, like=name, dtypes=INDICES)
        check_shape(name, t, "(batch,)", (x.shape[0],))
        check(t.device == x.device, name, t, f"be on the device of x, {x.device}", t.device)


def _rows(cache: Tensor, indices: Tensor | None, name: str, x: Tensor) -> Tensor:
    """The rows of a cache that serve the batch of x; any row for padding."""
    _check_indices(f"{name}_indices" if name == "conv_state" else f"{name}_batch_indices", indices, x)
    if indices is not None:
        return cache[indices.long().clamp(min=0)]
    check(cache.shape[0] == x.shape[0], name, cache, f"have the batch of x, {x.shape[0]}")
    return cache


def _write(cache: Tensor, indices: Tensor | None, new: Tensor, y: Tensor) -> Tensor:
    """Write the new rows into the cache. Returns y, 0 for padding."""
    if indices is None:
        cache.copy_(new)
        return y
    there = indices >= 0
    cache[indices[there].long()] = new[there].to(cache.dtype)
    return y.masked_fill(~there.view(-1, *[1] * (y.dim() - 1)), 0)
