"""Compare how well models learn, each at its best learning rate of a grid, chosen on one split and tested on another.

python tools/compare.py --config configs/compare_mnist5k.yaml
"""

from rich.table import Table

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigParser, plain_errors
from vim.console.progress import plain_console
from vim.experiments.comparison import CompareConfig, compare


def main() -> None:
    config, _ = ConfigParser(CompareConfig, __doc__).parse_config()
    with plain_errors():
        report = compare(config)
    table = Table("", "parameters", "learning rate", "top-1 % by seed", "mean", "deviation", title=config.test_split)
    for name, result in report["contenders"].items():
        edge = " (end of the grid)" if result["lr"] in (min(config.lrs), max(config.lrs)) else ""
        table.add_row(
            name,
            f"{result['parameters']:,}",
            f"{result['lr']:g}{edge}",
            ", ".join(f"{top1:.2f}" for top1 in result["test"]),
            f"{result['mean']:.2f}",
            f"{result['deviation']:.2f}" if len(config.seeds) > 1 else "",
        )
    plain_console().print(table)


if __name__ == "__main__":
    main()
