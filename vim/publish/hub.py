"""Pushes a finished run to the Hugging Face hub."""

import shutil
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError  # of whichever HTTP library this version uses
from huggingface_hub.utils import HFValidationError, validate_repo_id

from vim.console.errors import ConfigError, RunError
from vim.files import write_json

from .config import PushConfig
from .model_card import FinishedRun, model_card, read_run


def push_to_hub(config: PushConfig) -> str:
    """Publish a finished run in one commit: weights, model card, configuration, log, results and plots.

    Replaces files of the same names in the repository, including its card; the history keeps the old ones. Checkpoints
    and image names are not published.

    Returns: URL of the repository, or config.output.
    Raises: RunError or ConfigError, with a message for the user.
    """
    try:
        validate_repo_id(config.repo)
    except HFValidationError as error:
        raise ConfigError(f"repo {config.repo!r} is not a valid name on the hub: {error}") from error
    if "/" not in config.repo:  # the card needs the full name
        raise ConfigError(f"repo must be owner/name, got {config.repo!r}; the owner is a user or an organisation")
    run = read_run(config.run_dir, config.weights)
    if config.output is not None:
        output = Path(config.output)
        if output.exists():
            raise RunError(f"{output} exists; choose another --output, or remove it")
        write_files(run, config, output)
        return config.output
    if get_token() is None:
        raise RunError("not logged in to the hub: run `hf auth login`, set HF_TOKEN, or only write files with --output")
    with tempfile.TemporaryDirectory() as folder:
        write_files(run, config, Path(folder) / "files")
        return _push(run, config, Path(folder) / "files")


def write_files(run: FinishedRun, config: PushConfig, folder: Path) -> None:
    """Write all published files to a new folder; timm loads it as local-dir:<folder>."""
    folder.mkdir(parents=True)
    for file in (run.weights / "model.safetensors", run.weights / "config.json", run.folder / "log.jsonl", *run.plots):
        shutil.copyfile(file, folder / file.name)
    (folder / "config.yaml").write_text(yaml.safe_dump(run.config, sort_keys=False))
    write_json(run.summary, folder / "summary.json")
    model_card(run, config).save(folder / "README.md")


def _push(run: FinishedRun, config: PushConfig, folder: Path) -> str:
    api = HfApi()
    try:
        # None, not False: an organisation may make its repositories private by default.
        url = api.create_repo(config.repo, private=config.private or None, exist_ok=True)
        if config.private and not api.model_info(config.repo).private:
            raise RunError(f"{config.repo} exists and is public; make it private on the hub, or set private to false")
        message = f"{run.model['architecture']} after {run.summary['epochs']} epochs"
        api.upload_folder(repo_id=config.repo, folder_path=folder, commit_message=message)
    except (HTTPError, OSError, ValueError) as error:  # ValueError: the hub rejects the card's metadata
        raise RunError(f"cannot push to {config.repo}: {error}") from error
    return str(url)
