"""accelerate's Accelerator, configured for a tool."""

from collections.abc import Sequence

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin

from vim.console.errors import ConfigError

from .precision import Precision


def create_accelerator(
    precision: Precision, accumulate: int = 1, trackers: Sequence[str] = (), run_dir: str | None = None
) -> Accelerator:
    """Create the accelerator of a tool.

    Args:
        accumulate: steps per update.
        trackers: names of accelerate's trackers, which write below `run_dir`.

    Raises: ConfigError if a tracker is not installed, and for fp16 on a CPU.
    """
    available = [str(tracker.value) for tracker in get_available_trackers()]
    for name in trackers:
        if name not in available:
            have = ", ".join(available) or "none"
            raise ConfigError(f"no tracker {name!r}: installed are {have}; pip install its package")
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        # A plugin, because ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment overrides a plain number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulate),
        log_with=list(trackers) or None,
        project_dir=run_dir,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU: on a CPU accelerate silently runs fp32; choose bf16")
    return accelerator
