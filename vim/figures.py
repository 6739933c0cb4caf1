"""Figures as PNG files. matplotlib is optional, and imported only where a figure is drawn."""

import warnings
from pathlib import Path
from typing import Any

from vim.console.escapes import visible
from vim.files import whole_file

MAX_NAME = 32  # characters of a name in a plot


MAX_LINE = 80  # of a title


def plain_text(text: object, most: int = MAX_NAME) -> str:
    """A name as matplotlib shows it and does not read it: no mathematics between $, one line, at most so many
    characters, and no underscore in front, with which matplotlib marks what a legend leaves out."""
    shown = visible(str(text))
    shown = shown if len(shown) <= most else f"{shown[: most - 1]}…"
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a matplotlib figure as a PNG file.

    Where matplotlib's own font lacks characters of the texts, an installed font that has most of them helps out; what
    no font has becomes a box, without a warning for each.
    """
    from matplotlib import rc_context, rcParams
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    families = [*rcParams["font.family"], *_fonts_for({c for text in texts for c in text.get_text()})]
    with whole_file(path) as unfinished, rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        for text in texts:
            text.set_fontfamily(families)
        figure.savefig(unfinished, dpi=dpi)


def _fonts_for(characters: set[str]) -> list[str]:
    """Name of the installed font with most of the characters that matplotlib's default font lacks; none if it has all,
    or no font has any."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    default = get_font(findfont(FontProperties()))
    lacking = [c for c in characters if c.isprintable() and not default.get_char_index(ord(c))]
    if not lacking:
        return []
    found: tuple[int, str] = (0, "")
    for font in fontManager.ttflist:
        if font.name.startswith("Last Resort"):  # has a box for every character
            continue
        try:
            file = get_font(font.fname)
        except (OSError, RuntimeError):  # removed since matplotlib listed it, or damaged
            continue
        if file.scalable:  # matplotlib cannot draw bitmaps, which colour emoji are
            found = max(found, (sum(bool(file.get_char_index(ord(c))) for c in lacking), font.name))
    return [found[1]] if found[0] else []
