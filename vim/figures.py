"""Figures as PNG files. matplotlib is optional: it is imported only where a figure is drawn."""

import warnings
from pathlib import Path
from typing import Any

from vim.console.escapes import visible
from vim.files import whole_file

# Characters in a plot.
MAX_NAME = 32
MAX_LINE = 80


def plain_text(text: object, most: int = MAX_NAME) -> str:
    """A name for matplotlib to show literally: one line of at most `most` characters.

    $ is escaped, because matplotlib typesets mathematics between two. A leading underscore gets a space in front,
    because matplotlib leaves such labels out of legends.
    """
    shown = visible(str(text))
    shown = shown if len(shown) <= most else f"{shown[: most - 1]}…"
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a matplotlib figure as a PNG file.

    If matplotlib's default font lacks characters of the texts, the installed font with most of them is the fallback.
    Characters that neither has become boxes, without warnings.
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
    """Name of the installed font with most of the characters that matplotlib's default font lacks.

    Empty if the default font has all, or no font has any.
    """
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    default = get_font(findfont(FontProperties()))
    lacking = [c for c in characters if c.isprintable() and not default.get_char_index(ord(c))]
    if not lacking:
        return []
    found: tuple[int, str] = (0, "")
    for font in fontManager.ttflist:
        if font.name.startswith("Last Resort"):  # draws a box for every character
            continue
        try:
            file = get_font(font.fname)
        except (OSError, RuntimeError):  # damaged, or removed since matplotlib listed it
            continue
        if file.scalable:  # matplotlib cannot draw bitmap fonts such as colour emoji
            found = max(found, (sum(bool(file.get_char_index(ord(c))) for c in lacking), font.name))
    return [found[1]] if found[0] else []
