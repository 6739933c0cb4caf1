"""The accelerator of a tool."""

from collections.abc import Sequence

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin

from vim.console.errors import ConfigError

from .precision import Precision


def create_accelerator(
    precision: Precision, accumulate: int = 1, trackers: Sequence[str] = (), run_dir: str | None = None
) -> Accelerator:
    """An accelerator for these options.

    Args:
        trackers: names of accelerate's; they write below `run_dir`.

    Raises: ConfigError for what this machine has not.
    """
    available = [str(tracker.value) for tracker in get_available_trackers()]
    for name in trackers:
        if name not in available:
            have = ", ".join(available) or "none"
            raise ConfigError(f"no tracker {name!r}: installed are {have}; pip install its package")
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        # As a plugin, for a number alone gives way to the variable ACCELERATE_GRADIENT_ACCUMULATION_STEPS.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulate),
        log_with=list(trackers) or None,
        project_dir=run_dir,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU; on a CPU accelerate would run fp32 without a word; choose bf16")
    return accelerator
