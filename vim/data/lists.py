"""Lists of images: text files with the path of an image per line, and after a tab its label."""

from pathlib import Path

from .errors import DataError
from .image_files import no_images
from .local_images import CLASS_NAMES, LocalImages, classes_of_numbers
from .names import parse_label, plain_name, read_lines

LIST_SUFFIXES = (".txt", ".tsv")


def read_list(file: Path, labelled: bool = False) -> LocalImages:
    """Images of a list. Paths are relative to the list, labels are numbers from 0 up.

    classnames.txt in the folder of the list, if it exists, has the names of the classes, one per line.

    Args:
        labelled: require a label for every image.

    Raises: DataError for a list that is empty or cannot be read, and a label that is missing or no number.
    """
    paths: list[str] = []
    labels: list[int | None] = []
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        path, tab, label = line.removesuffix("\r").partition("\t")
        if labelled and not tab:
            raise DataError(
                f"{file}, line {number}: no label after {plain_name(path)!r}; want a path, a tab and a number per line"
            )
        paths.append(path)
        labels.append(parse_label(label, f"{file}, line {number}") if tab else None)
    if not paths:
        raise no_images(file, [], "files")
    classes = classes_of_numbers(paths, labels, file.parent / CLASS_NAMES, file)
    return LocalImages(file, paths, labels, classes, file.parent)
