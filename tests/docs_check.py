"""Run the commands and snippets of the documentation, in order, in a copy of the repository (`make docs-check`).

    python tests/docs_check.py                # all pages
    python tests/docs_check.py docs/data.md   # this page; earlier pages may have made what it needs
    python tests/docs_check.py --with gpu     # also run what needs a GPU

A block that cannot run everywhere has a comment in front of it, `<!-- docs-check: needs gpu, hub -->`. Of such a block
only the form is checked: programs, options, files of configuration, extras, imports.
"""

import argparse
import ast
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
GUIDES = (
    "index",
    "models",
    "data",
    "training",
    "features",
    "detection",
    "export",
    "state_spaces",
    "kernels",
    "mamba_ssm",
    "benchmarks",
)
PAGES = ("README.md", *(f"docs/{name}.md" for name in GUIDES), "ARCHITECTURE.md", "CONTRIBUTING.md")
NEEDS = ("browser", "coco", "gpu", "hub", "imagenet", "network", "time")
MARKER = re.compile(r"<!-- docs-check: needs (?P<needs>[\w, ]+?)( \([\w ]+\))? -->")
# A command within a sentence. Only its form is checked: it never runs.
INLINE_NEEDS = ("a block",)
INLINE = re.compile(r"`((?:accelerate launch|make|pip install|pytest|python) [^`]+)`")
FENCE = re.compile(r"```(?P<language>\w*)")
# Programs that a check of the form calls in place of the real ones: each notes its arguments.
STUBS = ("accelerate", "cp", "hf", "make", "pip", "pre-commit", "pytest", "python", "python3", "tar")
STUB = '#!/bin/sh\nprintf "%s\\0" "$(basename "$0")" "$@" >> "$RECORD"\nprintf "\\n\\0" >> "$RECORD"\n'


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    needs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str) -> Iterator[Block]:
    """The blocks in bash and Python, and the commands within sentences.

    Raises: ValueError for a block in no known language, or an unknown need.
    """
    lines = text.splitlines()
    start = language = None
    for number, line in enumerate(lines, 1):
        if start is None:
            if (fence := FENCE.match(line)) is None:
                yield from (Block(page, number, "bash", text, INLINE_NEEDS) for text in INLINE.findall(line))
                continue
            start, language = number, fence["language"]
            if language not in ("bash", "python", "text", "yaml"):
                raise ValueError(f"{page}:{number}: a block is bash, python, text or yaml, got {language!r}")
        elif line == "```":
            if language in ("bash", "python"):
                marker = MARKER.fullmatch(lines[start - 2])
                needs = tuple(marker["needs"].split(", ")) if marker else ()
                if unknown := set(needs) - set(NEEDS):
                    raise ValueError(f"{page}:{start}: a block needs some of {NEEDS}, got {unknown}")
                yield Block(page, start, language, "\n".join(lines[start : number - 1]), needs)
            start = None


def check(block: Block) -> None:
    """Check what can be checked without running the block. Raises: ValueError, SyntaxError, ImportError."""
    if block.language == "python":
        check_imports(ast.parse(block.text, str(block)))
        return
    for command in commands(block):
        try:
            check_command(command)
        except ValueError as error:
            raise ValueError(f"{block}: {shlex.join(command)}: {error}") from error


def check_imports(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    raise ImportError(f"{node.module} has no {alias.name}")


def commands(block: Block) -> list[list[str]]:
    """The commands that bash would run for a block, by their words. Raises: ValueError for an unknown one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bin").mkdir()
        for stub in STUBS:
            (folder / "bin" / stub).write_text(STUB)
            (folder / "bin" / stub).chmod(0o755)
        for real in ("basename", "cat", "dirname", "mkdir", "sh"):
            (folder / "bin" / real).symlink_to(shutil.which(real) or real)
        record = folder / "record"
        record.touch()
        bash = shutil.which("bash") or "bash"
        script = f"set -euo pipefail\nsource() {{ :; }}\n{block.text}"
        env = {"PATH": str(folder / "bin"), "RECORD": str(record)}
        done = subprocess.run([bash, "-c", script], cwd=folder, env=env, text=True, capture_output=True)
        if done.returncode:
            raise ValueError(f"{block}: {done.stderr.strip()}")
        words = record.read_text().split("\0")[:-1]
    found: list[list[str]] = [[]]
    for word in words:
        found[-1].append(word) if word != "\n" else found.append([])
    return found[:-1]


def check_command(words: list[str]) -> None:
    """Raises: ValueError for files that are not there and options that a program does not have."""
    if words[:2] == ["accelerate", "launch"]:
        words = ["python", *words[2:]]
    program, *arguments = words
    for path in arguments:
        if re.fullmatch(r"(configs|kernels|tests|tools)/[\w/.]+", path) and not (ROOT / path).exists():
            raise ValueError(f"there is no {path}")
    if program == "python" and arguments[0].endswith(".py"):
        parse(*arguments)
    elif program == "pip":
        extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
        for argument in arguments:
            if (named := re.fullmatch(r"\.\[([\w,]+)\]", argument)) and (unknown := {*named[1].split(",")} - extras):
                raise ValueError(f"pyproject.toml has no extra {', '.join(unknown)}")
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        if unknown := [word for word in arguments if "=" not in word and word not in targets]:
            raise ValueError(f"the Makefile has no target {unknown[0]}")


class _ParsedError(Exception):
    pass


def parse(script: str, *arguments: str) -> None:
    """Read a script's command line, and nothing more, in this process. Raises: ValueError if it is refused."""
    from vim.console import ConfigParser

    words = list(arguments)
    for i, word in enumerate(words):
        if word == "--config" and words[i + 1].startswith("runs/"):  # the configuration of a run that is not there yet
            words[i : i + 2] = []
            break

    def stop_after(method):
        def call(self, *args, **kwargs):
            method(self, *args, **kwargs)
            raise _ParsedError

        return call

    parsers = (ConfigParser, "parse_config"), (argparse.ArgumentParser, "parse_args")
    patches = [patch.object(cls, name, stop_after(getattr(cls, name))) for cls, name in parsers]
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        with patch.object(sys, "argv", [script, *words]), patches[0], patches[1]:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except _ParsedError:
        return
    except SystemExit as error:
        raise ValueError(f"{script} refuses its arguments (its message is on stderr)") from error
    finally:
        os.chdir(here)
    raise ValueError(f"{script} reads no command line")


def run(block: Block, folder: Path) -> None:
    """Raises: subprocess.CalledProcessError."""
    program = ["python", "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    env = os.environ | {
        "PATH": f"{folder / '.venv/bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'kernels'}",  # before the clone that .venv has installed
    }
    subprocess.run([*program, block.text], cwd=folder, env=env, check=True)


def copy_repository(folder: Path) -> None:
    """All files that git knows or would add, with their times, so that make installs nothing; .venv is a link."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")[:-1]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="all if left out")
    parser.add_argument("--with", dest="have", nargs="+", choices=NEEDS, default=[], help="needs that are met here")
    parser.add_argument("--folder", type=Path, help="copy of the repository to make, or to go on with; stays")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if args.folder is None else args.folder.absolute()
        if not (folder / "Makefile").exists():
            copy_repository(folder)
        start = time.perf_counter()
        for page in args.pages or PAGES:
            for block in blocks(page, (ROOT / page).read_text()):
                check(block)
                if missing := [need for need in block.needs if need not in args.have]:
                    if block.needs != INLINE_NEEDS:
                        print(f"== {block} checked, not run: needs {', '.join(missing)}", flush=True)
                    continue
                print(f"== {block}", flush=True)
                begin = time.perf_counter()
                try:
                    run(block, folder)
                except subprocess.CalledProcessError as error:
                    sys.exit(f"== {block} failed with exit code {error.returncode}")
                print(f"== {block} took {time.perf_counter() - begin:.0f} s", flush=True)
    print(f"every block of {', '.join(args.pages or PAGES)} is sound; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
