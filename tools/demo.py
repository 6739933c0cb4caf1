"""Try a trained classifier in the browser: drop an image, see its classes, maps and nearest neighbours.

python tools/demo.py --model runs/quickstart
python tools/demo.py --model runs/quickstart --features runs/features_train --port 8000
"""

import signal
import sys

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigParser, plain_errors
from vim.demo import DemoConfig, serve


def main() -> None:
    config, _ = ConfigParser(DemoConfig, __doc__).parse_config()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # removes uploaded images, too
    with plain_errors():
        serve(config)


if __name__ == "__main__":
    main()
