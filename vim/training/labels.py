"""What the labels of a split mean to a model: by the names of its folders, or as ImageNet's other test sets have it."""

import json
import pkgutil
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from vim.console.errors import ConfigError
from vim.data import LabelledImages
from vim.data.loaders import NO_LABEL
from vim.timm_models.create import label_names
from vim.timm_models.timm_model import TimmModel

LabelSet = Literal["folder", "imagenet-v2", "imagenet-real", "imagenet-a", "imagenet-r"]


@dataclass
class LabelMap:
    """images: those that count. answers, candidates: what their labels mean, see `evaluate`."""

    images: "LabelledImages | RealImages"
    answers: Tensor | None = None
    candidates: Tensor | None = None


class RealImages:
    """Some of a split's images; the label of each is its position."""

    def __init__(self, split: LabelledImages, chosen: list[int]):
        self.split, self.chosen = split, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def name(self, index: int) -> str:
        return self.split.name(self.chosen[index])

    def load(self, index: int, in_chans: int = 3) -> tuple[Any, int]:
        return self.split.load(self.chosen[index], in_chans)[0], index


def map_labels(labels: LabelSet, split: LabelledImages, where: str, model: TimmModel, name: str) -> LabelMap:
    """What the labels of a split mean to a model.

    Classes are found by their names: those that the model keeps, or WordNet's numbers (n01440764), in timm's order, for
    a model of as many classes as ImageNet. A model without names and folders that are not ImageNet's are matched by
    order.

    Args:
        where, name: of the split and the model, for messages.

    Raises: ConfigError for folders or images that do not fit the model or the set, with their number and names.
    """
    names = label_names(model)
    if names is None and (subset := infer_imagenet_subset({"num_classes": model.num_classes})) is not None:
        names = ImageNetInfo(subset).label_names()
        if labels == "folder" and set(names).isdisjoint(split.classes):
            names = None
    if names is None:
        if labels != "folder":
            raise ConfigError(f"labels {labels} are for models of ImageNet's classes; {name} has {model.num_classes}")
        if model.num_classes != len(split.classes):
            raise ConfigError(f"{name} has {model.num_classes} classes, {where} has {len(split.classes)}")
        return LabelMap(split)
    position = {class_name: index for index, class_name in enumerate(names)}

    def find(classes: list[str]) -> list[int]:
        if unknown := [c for c in classes if c not in position]:
            raise ConfigError(
                f"{name} does not know {len(unknown)} of the {len(classes)} classes of {where}: {_some(unknown)}; it "
                f"has {len(position)}: {_some(position)}"
            )
        return [position[c] for c in classes]

    imagenet = ImageNetInfo().label_names()
    if labels == "imagenet-real":
        return _real_labels(split, where, find(imagenet))
    if labels == "folder":
        return LabelMap(split, torch.tensor(find(split.classes))[:, None])
    if labels == "imagenet-v2":
        _check_folders(split, where, labels, map(str, range(len(imagenet))))
        return LabelMap(split, torch.tensor(find([imagenet[int(number)] for number in split.classes]))[:, None])
    _check_folders(split, where, labels, _timm_info(f"{labels.replace('-', '_')}_synsets.txt").split())
    answers = torch.tensor(find(split.classes))
    candidates = torch.zeros(len(names), dtype=torch.bool)
    candidates[answers] = True
    return LabelMap(split, answers[:, None], candidates)


def _real_labels(split: LabelledImages, where: str, positions: list[int]) -> LabelMap:
    """Beyer et al. 2020, arXiv 2006.07159: a set of right labels for each image of ImageNet's val; images with none do
    not count.

    Args:
        positions: of ImageNet's classes among the model's.
    """
    sets: list[list[int]] = json.loads(_timm_info("imagenet_real_labels.json"))
    numbers, others = [], []
    for index in range(len(split)):
        path = split.name(index)
        found = re.match(r"ILSVRC2012_val_(\d{8})", Path(path).name)
        if found and 1 <= int(found[1]) <= len(sets):
            numbers.append(int(found[1]))
        else:
            others.append(path)
    if others:
        raise ConfigError(
            f"labels imagenet-real are for the {len(sets):,} images ILSVRC2012_val_<number>.JPEG of ImageNet's val; "
            f"{len(others)} of {len(split)} images of {where} are others: {_some(others)}"
        )
    right = [[positions[label] for label in sets[number - 1]] for number in numbers]
    chosen = [index for index, classes in enumerate(right) if classes]
    most = max(map(len, right))
    answers = [right[index] + [NO_LABEL] * (most - len(right[index])) for index in chosen]
    return LabelMap(RealImages(split, chosen), torch.tensor(answers))


def _check_folders(split: LabelledImages, where: str, labels: LabelSet, folders: Iterable[str]) -> None:
    want, have = set(folders), set(split.classes)
    if have != want:
        wrong, missing = sorted(have - want), sorted(want - have)
        raise ConfigError(
            f"{where} is not {labels}, of {len(want)} class folders: "
            f"{len(wrong)} of its folders do not belong to it ({_some(wrong)}), {len(missing)} are missing "
            f"({_some(missing)})"
        )


def _timm_info(name: str) -> str:
    """A file about ImageNet that timm carries."""
    content = pkgutil.get_data("timm.data", f"_info/{name}")
    assert content is not None
    return content.decode()


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest if names else "none"
