"""From the labels of a split to the classes of a model: by name, or by the rules of an ImageNet test set."""

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
from vim.data import ImageSource
from vim.data.loaders import NO_LABEL
from vim.timm_models.create import label_names
from vim.timm_models.timm_model import TimmModel

LabelSet = Literal["folder", "imagenet-v2", "imagenet-real", "imagenet-a", "imagenet-r"]


@dataclass
class LabelMap:
    """images: the images to evaluate on. answers, candidates: meaning of their labels, see `evaluate`."""

    images: ImageSource
    answers: Tensor | None = None
    candidates: Tensor | None = None


class RealImages:
    """Some images of a split. The label of each is its position."""

    shards = None

    def __init__(self, split: ImageSource, chosen: list[int]):
        self.split, self.chosen = split, chosen
        self.path, self.classes = split.path, split.classes

    def __len__(self) -> int:
        return len(self.chosen)

    def name(self, index: int) -> str:
        return self.split.name(self.chosen[index])

    def label(self, index: int) -> int:
        return index

    def load(self, index: int, in_chans: int = 3) -> Any:
        return self.split.load(self.chosen[index], in_chans)


def map_labels(labels: LabelSet, split: ImageSource, where: str, model: TimmModel, name: str) -> LabelMap:
    """Find the classes of a model that the labels of a split stand for.

    Classes are matched by name. The names of a model are its own, or for as many classes as ImageNet has, WordNet's
    numbers (n01440764) in timm's order. Without names, and with classes that are not ImageNet's, they are matched by
    order.

    Args:
        where, name: names of the split and the model, for messages.

    Raises: ConfigError for classes or images that do not fit the model or the test set, with their number and names.
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


def _real_labels(split: ImageSource, where: str, positions: list[int]) -> LabelMap:
    """Beyer et al. 2020, arXiv 2006.07159: a set of correct labels per image of ImageNet's val. Images without any are
    left out.

    Args:
        positions: position of each ImageNet class among the model's classes.
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
            f"{len(others)} of {len(split)} images of {where} have other names: {_some(others)}"
        )
    right = [[positions[label] for label in sets[number - 1]] for number in numbers]
    chosen = [index for index, classes in enumerate(right) if classes]
    most = max(map(len, right))
    answers = [right[index] + [NO_LABEL] * (most - len(right[index])) for index in chosen]
    return LabelMap(RealImages(split, chosen), torch.tensor(answers))


def _check_folders(split: ImageSource, where: str, labels: LabelSet, folders: Iterable[str]) -> None:
    want, have = set(folders), set(split.classes)
    if have != want:
        wrong, missing = sorted(have - want), sorted(want - have)
        raise ConfigError(
            f"{where} is not {labels}, of {len(want)} class folders: "
            f"{len(wrong)} of its folders do not belong to it ({_some(wrong)}), {len(missing)} are missing "
            f"({_some(missing)})"
        )


def _timm_info(name: str) -> str:
    """A file about ImageNet from timm's package."""
    content = pkgutil.get_data("timm.data", f"_info/{name}")
    assert content is not None
    return content.decode()


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest if names else "none"
