"""Classify exported features by their nearest neighbours, with weighted votes as in DINO.

python tools/knn.py --train runs/features_train --val runs/features_val
python tools/knn.py --train runs/features_train --val runs/features_val --column block23.token --shots [1,10]
"""

from rich.table import Table

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigParser, plain_errors
from vim.console.progress import plain_console
from vim.data.names import plain_name
from vim.features import KnnConfig, knn


def main() -> None:
    config, _ = ConfigParser(KnnConfig, __doc__).parse_config()
    with plain_errors():
        report = knn(config)
    table = Table(
        "images a class", "draw", "k", "top-1 %", "top-5 %", title=f"{plain_name(config.val)}: {report['column']}"
    )
    for row in report["results"]:
        shots = "all" if row["shots"] is None else str(row["shots"])
        table.add_row(shots, str(row["draw"]), str(row["k"]), f"{row['top1']:.2f}", f"{row['top5']:.2f}")
    plain_console().print(table)
    print(f"results and plots: {plain_name(config.output)}")


if __name__ == "__main__":
    main()
