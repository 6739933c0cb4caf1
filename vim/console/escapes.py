"""Text in which every character shows."""

import re

_UNPRINTABLE = re.compile(r"[^\S ]|[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""One line in which each character shows: line breaks, control characters (a terminal would obey them), marks that
    turn the direction of text, and bytes of file names that are no UTF-8, become escapes as in \n, \u202e, \xff."""
    return _UNPRINTABLE.sub(as_escape, text)


def as_escape(found: re.Match[str]) -> str:
    """A character that was found, written as in Python; a byte that is no UTF-8 as that byte."""
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else found[0].encode("unicode_escape").decode()
