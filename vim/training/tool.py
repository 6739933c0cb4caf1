"""The command line of all training tools."""

from vim.console.config_parser import ConfigParser
from vim.console.exits import plain_errors

from .config import RunConfig
from .dry_run import dry_run, find_batch_size
from .run import train
from .trainer import Trainer


def training_tool(config_class: type[RunConfig], task: type[Trainer], description: str) -> None:
    """Read the configuration; then train, do a dry run or find a batch size.

    Args:
        description: first lines of `--help`.
    """
    parser = ConfigParser(config_class, description)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--resume", action="store_true", help="resume the run in run_dir from its last checkpoint")
    what.add_argument("--steps", type=int, metavar="N", help="dry run: measure speed and memory over N updates")
    what.add_argument("--find_batch_size", action="store_true", help="find the largest data.batch_size for this GPU")
    config, arguments = parser.parse_config()
    with plain_errors():
        if arguments.steps is not None:
            dry_run(config, arguments.steps, task)
        elif arguments.find_batch_size:
            find_batch_size(config, task)
        else:
            train(config, arguments.resume, task)
