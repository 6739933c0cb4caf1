"""Draw docs/state_spaces.png: linear state spaces at their start, run in three ways, and discretised.

python tools/plot_state_spaces.py --output docs/state_spaces.png
"""

import argparse
import os

from vim.visualize.state_spaces import plot_state_spaces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=os.path.expanduser, default="docs/state_spaces.png", help="PNG file to write")
    print(plot_state_spaces(parser.parse_args().output))


if __name__ == "__main__":
    main()
