"""Publish a finished run of tools/train.py on the Hugging Face hub, with a model card from the run's records.

python tools/push_to_hub.py --run_dir runs/quickstart --repo me/vim-digits --license apache-2.0 --output runs/look
python tools/push_to_hub.py --run_dir runs/quickstart --repo me/vim-digits --license apache-2.0 --private true

The first command only writes the files to a folder. The second needs `hf auth login`, or HF_TOKEN.
"""

from vim.console import ConfigParser, plain_errors
from vim.publish import PushConfig, push_to_hub


def main() -> None:
    config, _ = ConfigParser(PushConfig, __doc__).parse_config()
    with plain_errors():
        where = push_to_hub(config)
    print(f"written to {where}, nothing was pushed" if config.output else f"pushed to {where}")


if __name__ == "__main__":
    main()
