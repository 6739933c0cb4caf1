"""Text with escapes for characters that do not show."""

import re

_UNPRINTABLE = re.compile(r"[^\S ]|[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""One line, with escapes as in \n, \u202e, \xff for what does not show: line breaks, control characters (which a
    terminal would obey), marks that turn the direction of text, and bytes of file names that are not UTF-8."""
    return _UNPRINTABLE.sub(as_escape, text)


def as_escape(found: re.Match[str]) -> str:
    """The matched character as Python escapes it; a byte that is not UTF-8 as that byte."""
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else found[0].encode("unicode_escape").decode()
