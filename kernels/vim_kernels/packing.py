"""Several sequences packed into one row: the argument `seq_idx`, and the two forms in which the kernels take it.

A sequence begins wherever seq_idx changes from one step to the next, so only changes count: a value that comes again
later in the row is another sequence. Both forms serve both directions.
"""

import torch
from torch import Tensor

from .checks import check, check_shape, check_tensors


def check_seq_idx(seq_idx: Tensor | None, name: str, like: Tensor) -> None:
    """Raise unless seq_idx fits to the sequences of the argument `name`, (batch, length, channels)."""
    if seq_idx is None:
        return
    check_tensors({"seq_idx": seq_idx}, like="seq_idx", dtypes=(torch.int32, torch.int64))
    check(
        seq_idx.device == like.device, "seq_idx", seq_idx, f"be on the device of {name}, {like.device}", seq_idx.device
    )
    check_shape("seq_idx", seq_idx, "(batch, length)", tuple(like.shape[:2]))


def cuts_of(seq_idx: Tensor | None) -> Tensor | None:
    """(B, L + 1) bool, for the scan: whether one sequence ends and another begins in front of step i, or behind i - 1.

    The ends of the row are no cuts: what is in front of it belongs to its first sequence. None for no steps too.
    """
    if seq_idx is None or seq_idx.shape[1] == 0:
        return None
    # Not by slices of length - 1: an exported program would refuse a length of 2, where those broadcast.
    return torch.cat([seq_idx[:, :1], seq_idx], 1) != torch.cat([seq_idx, seq_idx[:, -1:]], 1)


def segments_of(seq_idx: Tensor | None) -> Tensor | None:
    """(B, L) int32, for the convolution: the sequences numbered 0, 1, ... from the left. None for no steps too."""
    cuts = cuts_of(seq_idx)
    return None if cuts is None else cuts[:, :-1].cumsum(1, dtype=torch.int32)


def reached(segments: Tensor, back: int, reverse: bool) -> Tensor:
    """(B, L, 1) bool: whether the step `back` steps before, in processing order, is of the same sequence.

    What lies in front of the first step processed is of its sequence.
    """
    length = segments.shape[1]
    steps = torch.arange(length, device=segments.device)
    before = (steps + (back if reverse else -back)).clamp(0, length - 1)
    return (segments == segments[:, before]).unsqueeze(-1)
