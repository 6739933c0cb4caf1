"""Batches of augmented images in uint8, a quarter of the size of fp32, until they reach the device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor


class Erased(NamedTuple):
    """A rectangle of an image, and the normalised noise (C, height, width) to fill it with."""

    rows: slice
    columns: slice
    noise: Tensor


class Augmented(NamedTuple):
    """An augmented image: pixels (H, W, C) in uint8, and the rectangle to erase later."""

    pixels: Tensor
    erased: Erased | None = None


@dataclass
class PackedImages:
    """A batch of augmented images. accelerate moves it with `to`, which normalises and erases on the device."""

    pixels: Tensor  # (B, H, W, C), uint8
    rectangles: list[tuple[int, slice, slice]]  # image, rows and columns
    noise: Tensor  # of all rectangles, (C, height, width) each, flat
    mean: tuple[float, ...]  # per channel, like std
    std: tuple[float, ...]

    @classmethod
    def pack(cls, images: Sequence[Augmented], mean: tuple[float, ...], std: tuple[float, ...]) -> "PackedImages":
        erased = [(index, image.erased) for index, image in enumerate(images) if image.erased is not None]
        # One tensor: each one that a worker hands over costs a file handle.
        noise = torch.cat([e.noise.flatten() for _, e in erased]) if erased else torch.empty(0)
        rectangles = [(index, e.rows, e.columns) for index, e in erased]
        return cls(torch.stack([image.pixels for image in images]), rectangles, noise, mean, std)

    def pin_memory(self) -> "PackedImages":
        """Called by torch's loader."""
        return replace(self, pixels=self.pixels.pin_memory(), noise=self.noise.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tensor:
        """Normalised and erased images (B, C, H, W) on the device, in fp32.

        On a CPU they equal those of timm's ToTensor, Normalize and RandomErasing bit for bit. A GPU rounds divisions
        by constants differently.
        """
        pixels = self.pixels.to(device, non_blocking=non_blocking).permute(0, 3, 1, 2)
        images = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        for channel, mean, std in zip(images.unbind(1), self.mean, self.std, strict=True):
            channel.sub_(mean).div_(std)
        noise, start = self.noise.to(device, non_blocking=non_blocking), 0
        for index, rows, columns in self.rectangles:
            rectangle = images[index, :, rows, columns]
            end = start + rectangle.numel()
            rectangle.copy_(noise[start:end].view(rectangle.shape))
            start = end
        return images


class Erasing:
    """Records what timm's random erasing would write into an image, to apply it after normalisation.

    Args: as timm's RandomErasing.
    """

    def __init__(self, probability: float, mode: str):
        self.draw = RandomErasing(probability, mode=mode, device="cpu")

    def __call__(self, shape: tuple[int, ...]) -> Erased | None:
        """The rectangle for an image of this shape (H, W, C); draws from the global generators."""
        notes = _Notes(shape)
        self.draw(notes)
        return notes.erased


class _Notes:
    """Stands in for the image (C, H, W) that timm's RandomErasing writes to, and records what it writes."""

    dtype = torch.float32

    def __init__(self, shape: tuple[int, ...]):
        self.height, self.width, self.channels = shape
        self.erased: Erased | None = None

    def size(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    def __setitem__(self, place: tuple[slice, slice, slice], noise: Tensor) -> None:
        _, rows, columns = place
        shape = self.channels, rows.stop - rows.start, columns.stop - columns.start
        self.erased = Erased(rows, columns, noise.expand(shape))  # it may have one value per channel
