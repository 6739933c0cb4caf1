"""The README and docs/: commands, snippets, links and paths hold; the check of them fails for those that do not."""

import re
import subprocess
import tomllib
from pathlib import Path

import docs_check
import pytest
import yaml
from docs_check import PAGES, ROOT, Block, blocks

import vim

LINKED = (*PAGES, "CHANGELOG.md")


def read(page):
    return (ROOT / page).read_text()


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150
    assert len(read("README.md").split()) <= 1500


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_snippet_is_sound(page):
    for block in blocks(page, read(page)):
        docs_check.check(block)


def test_every_page_is_checked_and_on_the_site():
    guides = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert guides == {page for page in PAGES if page.startswith("docs/")}
    nav = {f"docs/{name}" for name in re.findall(r": ([\w./]+\.md)$", read("mkdocs.yml"), re.MULTILINE)}
    assert guides <= nav


@pytest.mark.parametrize("page", LINKED)
def test_links_and_paths_exist(page):
    text = read(page)
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    named = re.findall(r"`((?:vim|kernels|tools|configs|tests|docs)/[\w./]*\w)`", text)
    assert not [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_version_stands_in_one_place():
    project = tomllib.loads(read("pyproject.toml"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "vim/__init__.py"
    assert re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[0] == vim.__version__
    assert "version" not in yaml.safe_load(read("CITATION.cff"))


@pytest.mark.parametrize("begun", [False, True])
def test_quickstart_writes_where_the_readme_looks_and_resumes(tmp_path, begun):
    (tmp_path / "pyproject.toml").touch()
    if begun:
        (tmp_path / "runs/quickstart").mkdir(parents=True)
        (tmp_path / "runs/quickstart/config.yaml").touch()
    make = ["make", "-n", "-f", str(ROOT / "Makefile"), "quickstart"]
    done = subprocess.run(make, cwd=tmp_path, check=True, text=True, capture_output=True)
    (command,) = [line.split() for line in done.stdout.splitlines() if "tools/train.py" in line]
    assert command[command.index("--run_dir") + 1] == "runs/quickstart"
    assert ("--resume" in command) == begun
    assert "runs/quickstart" in read("README.md")


@pytest.mark.parametrize("index", ["", "https://example.org/cpu"])
def test_torch_can_come_from_another_index_than_the_rest(tmp_path, index):
    (tmp_path / "pyproject.toml").touch()
    make = ["make", "-n", "-f", str(ROOT / "Makefile"), "install", f"TORCH_INDEX={index}"]
    done = subprocess.run(make, cwd=tmp_path, check=True, text=True, capture_output=True)
    installs = [line for line in done.stdout.splitlines() if "pip install" in line and "--upgrade pip" not in line]
    assert "--index-url" not in installs[-1]
    assert [line.endswith(f" torch torchvision --index-url {index}") for line in installs[:-1]] == [True] * bool(index)


PAGE = """Use `make docs` or `build/site`.
<!-- docs-check: needs gpu, hub -->
```bash
python tools/train.py \\
    --steps 3
```

```python
import vim
```

```text
not run
```
"""


def test_blocks_have_their_needs_and_lines():
    assert list(blocks("a.md", PAGE)) == [
        Block("a.md", 1, "bash", "make docs", docs_check.INLINE_NEEDS),
        Block("a.md", 3, "bash", "python tools/train.py \\\n    --steps 3", ("gpu", "hub")),
        Block("a.md", 8, "python", "import vim", ()),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [("```\nls\n```", "a.md:1: a block is bash"), ("<!-- docs-check: needs luck -->\n```bash\nls\n```", "luck")],
)
def test_a_block_in_no_language_or_with_an_unknown_need_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        list(blocks("a.md", text))


def bash(text):
    return Block("a.md", 1, "bash", text, ())


def test_commands_are_those_that_bash_would_run():
    text = 'for x in 1 "2 3"; do\n    python a.py \\\n        "$x"  # a comment\ndone\nsource nowhere && make docs\n'
    assert docs_check.commands(bash(text)) == [["python", "a.py", "1"], ["python", "a.py", "2 3"], ["make", "docs"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python tools/train.py --optim.lrr 3", "tools/train.py refuses its arguments"),
        ("accelerate launch tools/train.py --schedule.epochs 0", "refuses its arguments"),
        ("python tools/train.py --config configs/none.yaml", "there is no configs/none.yaml"),
        ("python tools/split_folder.py data --part x", "refuses its arguments"),
        ("python tools/none.py", "there is no tools/none.py"),
        ("pytest tests/test_none.py", "there is no tests/test_none.py"),
        ("make quickstat", "the Makefile has no target quickstat"),
        ("pip install -e '.[demo,nothing]'", "no extra nothing"),
        ("frobnicate", "frobnicate: command not found"),
        ("python tools/train.py '", "unexpected EOF"),
    ],
)
def test_a_command_that_does_not_exist_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        docs_check.check(bash(text))


@pytest.mark.parametrize(
    ("text", "error"),
    [("import vim.nothing", ImportError), ("from vim_kernels import nothing", ImportError), ("a = ", SyntaxError)],
)
def test_a_snippet_that_cannot_run_is_refused(text, error):
    with pytest.raises(error):
        docs_check.check(Block("a.md", 1, "python", text, ()))


def test_running_a_block_fails_with_its_first_failing_command(tmp_path):
    docs_check.run(bash("echo 1 > one\ntest -f one"), tmp_path)
    docs_check.run(Block("a.md", 1, "python", "open('two', 'w').write(open('one').read())", ()), tmp_path)
    assert (tmp_path / "two").read_text() == "1\n"
    for text in ("false\ntrue", "false | true", "echo $nothing"):
        with pytest.raises(subprocess.CalledProcessError):
            docs_check.run(bash(text), tmp_path)


def test_a_copy_has_the_files_of_git_and_the_environment(tmp_path):
    docs_check.copy_repository(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()
    assert (tmp_path / "pyproject.toml").stat().st_mtime == (ROOT / "pyproject.toml").stat().st_mtime
    assert (tmp_path / ".venv/bin/python").exists()
    assert not (tmp_path / "build").exists()
    assert Path(tmp_path / "vim/__init__.py").is_file()
