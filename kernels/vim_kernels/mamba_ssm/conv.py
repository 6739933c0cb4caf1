"""The causal convolution with the channels first, as in causal_conv1d.causal_conv1d_interface."""

from torch import Tensor

from ..causal_conv import causal_conv1d
from ..checks import check, check_shape, check_tensors


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
):
    """`vim_kernels.causal_conv1d` on sequences with the channels first.

    Args:
        x: (batch, dim, length). weight: (dim, width), any width. bias: (dim,).
        seq_idx: (batch, length), int32 or int64, the sequence of each step if a row packs several; a step below 0 is
            padding, and its output 0. Only changes count: a value that comes again later is another sequence.
        initial_states: (batch, dim, width - 1), the steps before the first one, oldest first.
        return_final_states: also return the last width - 1 steps in this form; not with seq_idx.
        final_states_out: takes the final states, if they are returned.
        activation: None, "silu" or "swish".

    Returns: y (batch, dim, length) in x's dtype, or (y, final_states). y has the channels last in memory if x has.

    Raises: ValueError, TypeError: a wrong shape, device or dtype. NotImplementedError: another activation.
    """
    silu = is_silu(activation)
    if seq_idx is not None and return_final_states:
        raise ValueError("return_final_states=True does not go together with seq_idx, as in causal_conv1d; drop one")
    check_tensors({"x": x, "weight": weight, "bias": bias, "initial_states": initial_states}, like="x")
    check_conv(x, weight, bias)
    batch, dim, _ = x.shape
    past = (batch, dim, weight.shape[1] - 1)
    check_shape("initial_states", initial_states, "(batch, dim, width - 1)", past)
    check_shape("final_states_out", final_states_out, "(batch, dim, width - 1)", past)
    found = causal_conv1d(
        x.mT,
        weight,
        bias,
        activation="silu" if silu else None,
        initial_state=None if initial_states is None else initial_states.mT,
        return_final_state=bool(return_final_states),
        seq_idx=seq_idx,
    )
    y, final = found if return_final_states else (found, None)
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0).unsqueeze(-1), 0)
    y = y.mT if x.stride(1) == 1 else y.mT.contiguous()
    if final is None:
        return y
    return y, final.mT if final_states_out is None else final_states_out.copy_(final.mT)


def is_silu(activation: str | None) -> bool:
    """Raises: NotImplementedError for an activation that causal_conv1d does not have either."""
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def check_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless x, (batch, dim, length), and its filters fit."""
    check(x.dim() == 3, "x", x, "be (batch, dim, length)")
    dim = x.shape[1]
    filters = weight.dim() == 2 and weight.shape[0] == dim and weight.shape[1] > 0
    check(filters, "weight", weight, f"be (dim, width) with dim = {dim}")
    check_shape("bias", bias, "(dim,)", (dim,))
