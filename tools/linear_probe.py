"""Train linear classifiers on exported features, for all inputs and learning rates in one pass.

python tools/linear_probe.py --train runs/features_train --val runs/features_val
python tools/linear_probe.py --train runs/features_train --val runs/features_val --last_blocks [1,4] --shots [1,10]

After an interruption, the same command continues from there.
"""

from rich.table import Table

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigParser, plain_errors
from vim.console.progress import plain_console
from vim.data.names import plain_name
from vim.features import LinearProbeConfig, probe


def main() -> None:
    config, _ = ConfigParser(LinearProbeConfig, __doc__).parse_config()
    with plain_errors():
        report = probe(config)
    table = Table(
        "images a class", "draw", "inputs", "learning rate", "top-1 %", "top-5 %", title=plain_name(config.val)
    )
    for row in report["results"]:
        shots = "all" if row["shots"] is None else str(row["shots"])
        figures = f"{row['lr']:g}", f"{row['top1']:.2f}", f"{row['top5']:.2f}"
        table.add_row(shots, str(row["draw"]), row["inputs"], *figures)
    plain_console().print(table)
    print(f"results and plot: {plain_name(config.output)}")


if __name__ == "__main__":
    main()
