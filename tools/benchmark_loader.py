"""Measure how fast training images are read, decoded and augmented, by the number of workers.

python tools/benchmark_loader.py --config configs/vim_tiny_in1k.yaml --data.root data/jpegs --workers 1 2 4 8
"""

from rich.table import Table

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigParser, plain_errors
from vim.console.progress import plain_console
from vim.experiments.loader_speed import loader_speed
from vim.training import TrainConfig


def main() -> None:
    parser = ConfigParser(TrainConfig, __doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="numbers of workers to try")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement")
    config, arguments = parser.parse_config()
    table = Table("workers", "images/s", "images/s a worker")
    with plain_errors():
        for workers in arguments.workers:
            rate = loader_speed(config, workers, arguments.seconds)
            table.add_row(str(workers), f"{rate:.0f}", f"{rate / max(workers, 1):.0f}")
    plain_console().print(table)


if __name__ == "__main__":
    main()
