"""The interface of the scan backends: what they take and return.

A scan runs along one or two directions and sums their outputs before the gate, so a backend takes a sequence of
`Direction`s and one `z`. Shapes: B batch, L length, E d_inner, G groups of channels that share B and C, N d_state.
"""

from typing import NamedTuple

from torch import Tensor

# A forward pass with gradients saves the state before every K-th step (in processing order), and the backward
# recomputes the states in between. This is K on the CPU: the states of a chunk fit in its cache.
CHECKPOINT_INTERVAL = 32


def checkpoint_rows(length: int, directions: int) -> int:
    """Number of states that the CPU backends save per direction."""
    return -(-length // CHECKPOINT_INTERVAL)


class Direction(NamedTuple):
    """One pass over the sequence. Sequences may be strided and of any float dtype; A is in the state's dtype."""

    u: Tensor  # (B, L, E)
    dt: Tensor  # (B, L, E), before bias and softplus
    A: Tensor  # (E, N)
    B: Tensor  # (B, L, G, N)
    C: Tensor  # (B, L, G, N)
    D: Tensor | None  # (E,)
    dt_bias: Tensor | None  # (E,)
    initial_state: Tensor | None  # (B, E, N), the state before the first step processed
    reverse: bool  # process step L-1 first
    cuts: Tensor | None = None  # (B, L + 1) bool, see `packing.cuts_of`; the same for both directions

    # Methods, because torch.compile of torch 2.10 cannot read properties of a named tuple.
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors with gradients, in the order of `DirectionGrads`."""
        return self.u, self.dt, self.A, self.B, self.C, self.D, self.dt_bias, self.initial_state

    def starts(self) -> Tensor | None:
        """(B, L) bool: whether a new sequence begins at a step, so that the state before it is zero."""
        if self.cuts is None:
            return None
        return self.cuts[:, 1:] if self.reverse else self.cuts[:, :-1]


class ScanOutput(NamedTuple):
    """y = scale * sum(y_d) * silu(z), and the tensors that the backward needs."""

    y: Tensor  # (B, L, E), u's dtype
    last_state: Tensor  # (directions, B, E, N), the state's dtype
    # (directions, B, rows, E, N), the state's dtype; empty if nothing is saved. The layout of the rows differs between
    # backends, so only the one that wrote them may read them.
    checkpoints: Tensor
    y_sum: Tensor  # (B, L, E), u's dtype: sum(y_d) ungated; empty if nothing is saved or there is no z


class DirectionGrads(NamedTuple):
    """Gradients in the dtype of their tensor; None where the tensor is absent."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
