"""Several sequences packed into one row: the argument `seq_idx`, and the two forms that the kernels read.

A sequence begins wherever seq_idx changes from one step to the next. Only changes count: a value that comes again later
in the row is another sequence. Both forms serve both directions.
"""

import torch
from torch import Tensor

from .checks import check, check_shape, check_tensors


def check_seq_idx(seq_idx: Tensor | None, name: str, like: Tensor) -> None:
    """Raise unless seq_idx matches `like`, (batch, length, channels), the argument called `name`."""
    if seq_idx is None:
        return
    check_tensors({"seq_idx": seq_idx}, like="seq_idx", dtypes=(torch.int32, torch.int64))
    check(
        seq_idx.device == like.device, "seq_idx", seq_idx, f"be on the device of {name}, {like.device}", seq_idx.device
    )
    check_shape("seq_idx", seq_idx, "(batch, length)", tuple(like.shape[:2]))


def cuts_of(seq_idx: Tensor | None) -> Tensor | None:
    """(B, L + 1) bool, for the scan: entry i tells whether sequences change between steps i - 1 and i.

    The ends of the row are no cuts: the initial state belongs to the first sequence. None also for length 0.
    """
    if seq_idx is None or seq_idx.shape[1] == 0:
        return None
    # No slices of length - 1: at length 2 they would broadcast, so an exported program would refuse that length.
    return torch.cat([seq_idx[:, :1], seq_idx], 1) != torch.cat([seq_idx, seq_idx[:, -1:]], 1)


def segments_of(seq_idx: Tensor | None) -> Tensor | None:
    """(B, L) int32, for the convolution: sequences numbered 0, 1, ... from the left. None also for length 0."""
    cuts = cuts_of(seq_idx)
    return None if cuts is None else cuts[:, :-1].cumsum(1, dtype=torch.int32)


def reached(segments: Tensor, back: int, reverse: bool) -> Tensor:
    """(B, L, 1) bool: whether the step `back` steps earlier, in processing order, is in the same sequence.

    The initial state counts as part of the first sequence processed.
    """
    length = segments.shape[1]
    steps = torch.arange(length, device=segments.device)
    before = (steps + (back if reverse else -back)).clamp(0, length - 1)
    return (segments == segments[:, before]).unsqueeze(-1)
