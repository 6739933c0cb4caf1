"""Look inside a Vision Mamba: PNG sheets of step sizes, reads of the class token, class maps and receptive fields.

python tools/visualize.py --model runs/quickstart --images data/mnist5k/val
python tools/visualize.py --model vim_small --images photographs/ --blocks [5,11,17,23] --count 8
"""

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigParser, plain_errors
from vim.visualize import VisualizeConfig, visualize


def main() -> None:
    config, _ = ConfigParser(VisualizeConfig, __doc__).parse_config()
    with plain_errors():
        files = visualize(config)
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    main()
