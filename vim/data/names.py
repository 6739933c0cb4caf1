"""Names of files and classes: their order, and how they are written."""

import re
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path

from vim.console.escapes import as_escape

from .errors import DataError

MOST_CLASSES = 1_000_000
LONGEST_LABEL = 20  # digits

# Line ends of every kind, other control characters, and bytes of file names that are no UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def natural_order(name: str) -> tuple[list[str | Decimal], str]:
    """Key of the one order of classes and files: timm's natural order, and the name itself where that has a tie.

    Numbers count as numbers, and case does not matter: 01, 1, 2, 10, A, a, B. timm's own key leaves 01 and 1, or A and
    a, to the chance of a set's order, and stops at digits that are no decimals, as in `m²`.
    """
    parts = re.split(r"(\d+)", name.lower())
    # Decimal, because int refuses more than 4300 digits.
    return [Decimal(part) if i % 2 else part for i, part in enumerate(parts)], name


def plain_name(name: str) -> str:
    r"""A name as UTF-8 text in one line: other bytes and control characters are written \xe9, \n, \u2028."""

    return _UNPRINTABLE.sub(as_escape, name)


def class_positions(names: Iterable[str], where: str | Path) -> tuple[list[str], dict[str, int]]:
    """Classes in label order, as they are written, and the label of each name.

    Raises: DataError for two names that are written alike.
    """
    ordered = sorted(set(names), key=natural_order)
    classes = [plain_name(name) for name in ordered]
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise DataError(f"{where} has two classes that are written {twice!r}; rename one")
    return classes, {name: label for label, name in enumerate(ordered)}


def numbered_classes(highest: int, where: str) -> list[str]:
    """Names of classes that have none but their numbers: "0" up to the highest.

    Raises: DataError for a number that no set of images reaches; a damaged one would fill the memory with names.
    """
    if highest >= MOST_CLASSES:
        raise DataError(f"{where} has the label {highest}; labels are numbers from 0 up, below {MOST_CLASSES}")
    return [str(label) for label in range(highest + 1)]


def parse_label(text: str, where: str) -> int:
    """The number of a class.

    Raises: DataError for a text that is none.
    """
    if len(text.strip()) > LONGEST_LABEL or not text.strip().isdecimal():
        raise DataError(f"{where}: a label is a number from 0 up, got {text[: LONGEST_LABEL + 1]!r}")
    return int(text)


def read_lines(file: Path) -> list[str]:
    """Lines of a text in UTF-8. Bytes that are none stay as Python has them in file names, so that they find theirs.

    Raises: DataError for a file that cannot be read, or is of another encoding.
    """
    try:
        text = file.read_text("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    if "\0" in text:
        raise DataError(f"{file} is no text in UTF-8: it has null bytes, as UTF-16 has; save it as UTF-8")
    return text.removesuffix("\n").split("\n")  # str.splitlines would cut names at characters that they may have
