"""Compare the speed and memory of detectors in training, on any timm backbones.

python tools/benchmark_detection.py --config configs/benchmark_detection.yaml
python tools/benchmark_detection.py --models '[resnet50]' --workloads '[{mode: train, img_size: 512, batch_size: 2}]'
"""

from functools import partial

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigParser, plain_errors
from vim.console.progress import plain_console
from vim.experiments.benchmark import benchmark, benchmark_table, check_complete
from vim.experiments.detection_benchmark import DetectionBenchmarkConfig, build_detector_step


def main() -> None:
    config, _ = ConfigParser(DetectionBenchmarkConfig, __doc__).parse_config()
    terminal = plain_console().is_terminal
    with plain_errors():
        results = benchmark(config, partial(build_detector_step, config))
        plain_console(width=None if terminal else 120).print(benchmark_table(results))
        check_complete(results)


if __name__ == "__main__":
    main()
