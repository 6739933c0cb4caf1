"""Compare the speed and memory of image classifiers: any timm models.

python tools/benchmark.py --config configs/benchmark.yaml
python tools/benchmark.py --config configs/benchmark_cpu.yaml --models '[vim_tiny, resnet18]'
"""

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigParser, plain_errors
from vim.console.progress import plain_console
from vim.experiments.benchmark import benchmark, benchmark_table, check_complete
from vim.experiments.benchmark_config import BenchmarkConfig


def main() -> None:
    config, _ = ConfigParser(BenchmarkConfig, __doc__).parse_config()
    terminal = plain_console().is_terminal
    with plain_errors():
        results = benchmark(config)
        plain_console(width=None if terminal else 120).print(benchmark_table(results))
        check_complete(results)


if __name__ == "__main__":
    main()
