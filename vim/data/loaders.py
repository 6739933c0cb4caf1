"""Data sets of tensors, and the loaders that accelerate prepares."""

import os
import signal
import threading

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .folder import ImageFolder
from .randomness import derive_seed, preserved_generators, seed_cpu_generators
from .sampler import KeyedSampler, SampleKey
from .transforms import Transform


class TrainImages(Dataset[tuple[Tensor, int]]):
    """Augmented images (in_chans, H, W): a SampleKey gives the same tensor in any process and order."""

    def __init__(self, folder: ImageFolder, transform: Transform, seed: int, in_chans: int = 3):
        self.folder, self.transform, self.seed, self.in_chans = folder, transform, seed, in_chans

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[tuple[Tensor, int]]:
        # torch's loader asks for a batch at once: saving the generators costs as much as augmenting a small image.
        with preserved_generators():
            return [self._augmented(key) for key in keys]

    def _augmented(self, key: SampleKey) -> tuple[Tensor, int]:
        image, label = self.folder.load(key.image, self.in_chans)
        seed_cpu_generators(derive_seed("augment", self.seed, *key))
        return self.transform(image), label


class EvalImages(Dataset[tuple[Tensor, int]]):
    """Images (in_chans, H, W) in the order of the folder."""

    def __init__(self, folder: ImageFolder, transform: Transform, in_chans: int = 3):
        self.folder, self.transform, self.in_chans = folder, transform, in_chans

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.folder.load(index, self.in_chans)
        return self.transform(image), label


def train_loader(images: TrainImages, sampler: KeyedSampler, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Batches ((B, C, H, W), (B,)) in the sampler's order. `accelerator.prepare` deals them out to the processes."""
    return loader(images, batch_size, num_workers, sampler=sampler)


def eval_loader(images: EvalImages, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Batches ((B, C, H, W), (B,)) in the folder's order, the last one as small as it is."""
    return loader(images, batch_size, num_workers, shuffle=False)


def loader(images: Dataset, batch_size: int, num_workers: int, **options) -> DataLoader:
    """torch's loader; `options` are its own, order among them."""
    return DataLoader(
        images,
        batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_parent,
        **options,
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a group, and the parent still needs its loaders to end
    the step that it is in. A worker ends when its parent says so, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
