"""Predict classes, maps and nearest neighbours for an image file. matplotlib is optional: imported only here."""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from vim.console.errors import ConfigError
from vim.console.escapes import visible
from vim.data import DataError, EvalDataConfig, ImageSource, eval_transform
from vim.data.decode import decode_image
from vim.features import Features, load
from vim.features.extract import FeatureExtractor, weights_hash
from vim.features.judge import nearest
from vim.timm_models.create import label_names, load_model, weights_from
from vim.timm_models.input import resolve_input
from vim.visualize import CLASS_MAP, as_pixels, block_maps, has_scans

from .config import DemoConfig

NEIGHBOURS = 8
EDGE = 224  # longer edge of shown images, in pixels
MAX_BYTES = 64 * 2**20  # of an image file

Captioned = tuple[Image.Image, str]


@dataclass
class Answer:
    """Predictions for one image.

    classes: name -> probability of all classes, in label order.
    maps: the model input, then the maps on top of it if the model is a Vision Mamba.
    neighbours: images of the export, nearest first, with class and cosine similarity; empty without an export.
    """

    classes: dict[str, float]
    maps: list[Captioned]
    neighbours: list[Captioned]


class Predictor:
    """A classifier on the CPU, and an export of its features if the configuration names one.

    Threads may share it. They decode images in parallel and take turns at the model, because maps use hooks.

    weights: their source. blocks: number of blocks with maps; 0 if the model is no Vision Mamba.

    Raises: ConfigError for an unknown model, one that is no classifier, and features of another model; DataError for a
        folder without features, and if its images have moved.
    """

    def __init__(self, config: DemoConfig):
        self.model = load_model(config).eval()
        self.weights = weights_from(self.model)
        classes = self.model.num_classes
        if not classes:
            raise ConfigError(f"{config.model} has no classes to predict; choose a classifier")
        self.data_config = resolve_input(self.model, config.kwargs, EvalDataConfig())
        self.transform = eval_transform(self.data_config)
        names = label_names(self.model)
        self.names = _labels(names, classes, config.model)
        self.blocks = len(self.model.blocks) if has_scans(self.model) else 0
        self.features: Features | None = None
        self._turn = threading.Lock()
        if config.features is not None:
            self._open_features(config.features, config.model)

    @torch.no_grad()
    def __call__(self, file: str | Path, block: int = -1) -> Answer:
        """Classify an image file of any mode and size, with validation's preprocessing. Maps are those of `block`.

        Raises: DataError for a file that is no image or larger than 64 MiB, and for a block that the model lacks.
        """
        if self.blocks and block not in range(-1, self.blocks):
            raise DataError(f"block must be from 0 to {self.blocks - 1}, got {block!r}")
        if not os.path.isfile(file):  # opening a pipe would block; a device has no end
            raise DataError(f"{Path(file).name} is no file")
        if Path(file).stat().st_size > MAX_BYTES:
            raise DataError(f"{Path(file).name} is larger than {MAX_BYTES // 2**20} MiB; scale it down")
        try:
            image = decode_image(file, self.data_config["input_size"][0], file)
        except DataError as error:  # the page must not show the file's folder
            raise DataError(f"{Path(file).name} cannot be read as an image") from error
        batch = self.transform(image)[None]
        with self._turn:
            return self._answer(batch, block)

    def _answer(self, batch: Tensor, block: int) -> Answer:
        probabilities = self.model(batch).float().softmax(1)[0]
        classes = dict(zip(self.names, probabilities.tolist(), strict=True))
        seen = self._as_seen(batch)
        maps = [(seen, "model input")]
        if has_scans(self.model):
            label = probabilities.argmax()
            for name, values in block_maps(self.model, batch, label[None], int(block)).items():
                caption = f"{name} of “{self.names[int(label)]}”" if name == CLASS_MAP else name
                maps.append((_overlay(seen, values[0]), caption))
        return Answer(classes, maps, [] if self.features is None else self._neighbours(batch))

    def _open_features(self, folder: str, model: str) -> None:
        self.features = features = load(folder)
        manifest = features.manifest
        again = f"export them again: tools/export_features.py --model {model}"
        if manifest["weights_sha256"] != weights_hash(self.model):
            raise ConfigError(f"the features in {folder} are of another model, {manifest['model']}; {again}")
        ours = {k: list(v) if isinstance(v, tuple) else v for k, v in self.data_config.items()}
        if manifest["preprocessing"] != ours:
            was = manifest["preprocessing"]
            raise ConfigError(f"the features in {folder} have another preprocessing: {was}, here {ours}; {again}")
        self.feature_classes = features.classes
        self.source = ImageSource(manifest["images"])
        if [entry.path for entry in self.source.entries] != features.paths:
            raise DataError(f"{manifest['images']} no longer holds the images of {folder}; {again}")
        self.extractor = FeatureExtractor(self.model, manifest["pools"], manifest["blocks"], manifest["l2"])
        self.column = next(iter(features.columns))
        self.bank = torch.from_numpy(features[self.column].copy()).flatten(1).float()

    def _neighbours(self, batch: Tensor) -> list[Captioned]:
        assert self.features is not None
        query = self.extractor(batch)[self.column].flatten(1)
        similarities, found = nearest(self.bank, query, min(NEIGHBOURS, len(self.bank)))
        shown = []
        for similarity, row in zip(similarities[0].tolist(), found[0].tolist(), strict=True):
            label = int(self.features.labels[row])
            name = self.feature_classes[label] if label >= 0 else "no class"
            shown.append((_enlarged(self.source.load(row)), f"{name} ({similarity:.3f})"))
        return shown

    def _as_seen(self, batch: Tensor) -> Image.Image:
        pixels = (as_pixels(batch, self.data_config)[0] * 255).round().byte()
        return _enlarged(Image.fromarray(pixels.numpy()))


def _labels(names: Sequence[str] | None, classes: int, model: str) -> list[str]:
    """A unique name for each class: WordNet has two cranes."""
    if not names:
        return [f"class {i}" for i in range(classes)]
    if len(names) != classes:
        raise ConfigError(f"{model} has {classes} classes and {len(names)} label names in its config.json; repair it")
    texts = list(map(visible, map(str, names)))
    return [f"{name} (class {i})" if texts.count(name) > 1 else name for i, name in enumerate(texts)]


def _enlarged(image: Image.Image) -> Image.Image:
    """RGB, scaled to the size on the page: small images keep sharp pixels, photographs shrink smoothly."""
    method = Image.Resampling.NEAREST if max(image.size) < EDGE else Image.Resampling.BICUBIC
    return ImageOps.contain(image.convert("RGB"), (EDGE, EDGE), method)


def _overlay(image: Image.Image, values: Tensor) -> Image.Image:
    """Blend a map (rows, columns) over an image. Each map has its own scale, from its minimum to its maximum."""
    from matplotlib import colormaps

    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low).clamp(min=1e-12)
    heat = Image.fromarray(colormaps["magma"](scaled.numpy(), bytes=True)).convert("RGB")
    return Image.blend(image, heat.resize(image.size, Image.Resampling.NEAREST), 0.65)
