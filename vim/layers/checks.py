"""Argument checks that several layers share."""

from collections.abc import Iterable


def check_choice(what: str, value: str, allowed: Iterable[str]) -> None:
    """Raises: ValueError for any other value."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_even(d_state: int) -> None:
    """Raises: ValueError for an odd number of states, or for 0."""
    if d_state < 2 or d_state % 2:
        raise ValueError(f"d_state must be even and positive, for conjugate pairs, got {d_state}")
