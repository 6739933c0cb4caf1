"""Lists of images: text files with the path of an image per line, and after a tab its label."""

from pathlib import Path

from .entries import CLASS_NAMES, EntryImages, ImageEntry, classes_of_numbers
from .errors import DataError
from .image_files import no_images
from .names import parse_label, plain_name, read_lines

LIST_SUFFIXES = (".txt", ".tsv")


def read_list(file: Path, labelled: bool = False) -> EntryImages:
    """Images of a list. Paths are relative to the list, labels are numbers from 0 up.

    The lines of classnames.txt beside the list are the names of the classes, if that file exists.

    Args:
        labelled: require a label for every image.

    Raises: DataError for a list that is empty or cannot be read, and a label that is missing or no number.
    """
    entries = []
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        path, tab, label = line.removesuffix("\r").partition("\t")
        if labelled and not tab:
            raise DataError(
                f"{file}, line {number}: no label after {plain_name(path)!r}; want a path, a tab and a number per line"
            )
        entries.append(ImageEntry(path, parse_label(label, f"{file}, line {number}") if tab else None))
    if not entries:
        raise no_images(file, [], "files")
    return EntryImages(file, entries, classes_of_numbers(entries, file.parent / CLASS_NAMES, file), file.parent)
