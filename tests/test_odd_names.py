"""Class and file names with special characters come through a run unchanged: nothing reads them as markup."""

import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from image_tree import write_image_tree
from PIL import Image
from rich.console import Console
from test_house import imports, package_files
from whole_runs import config, one_thread  # noqa: F401  (the fixture)

from vim.console.progress import Progress
from vim.data import DataConfig
from vim.data.names import plain_name
from vim.publish.config import PushConfig
from vim.publish.model_card import FinishedRun, model_card, read_run
from vim.training import train
from vim.training.averaging import EmaConfig
from vim.training.optim import ScheduleConfig

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
NAMES = ["a$b$", "[red]", "中文", "x\ny", "<b>x<b>", "%s", "_^{", r"\frac", "y" * 200, "\udcff"]


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.usefixtures("no_warnings")
def test_a_whole_run(tmp_path, monkeypatch):
    """Class folders of such names, one unreadable image: results, plots, list of bad images, model card."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    write_image_tree(tmp_path, {"train": 40, "val": 20}, classes=1)
    for split in ("train", "val"):
        for place, file in enumerate(sorted((tmp_path / split / "a").iterdir())):
            folder = tmp_path / split / NAMES[place % len(NAMES)]
            folder.mkdir(exist_ok=True)
            file.rename(folder / file.name)
        (tmp_path / split / "a").rmdir()
    bad = tmp_path / "train" / NAMES[-1] / os.fsdecode(b"\xfe[red].png")
    bad.write_bytes(b"no image")
    data = DataConfig(
        str(tmp_path), batch_size=16, num_workers=0, crop_pct=1.0, mean=(0.3,), std=(0.2,), bad_images="skip"
    )
    run = tmp_path / "run"
    train(config(tmp_path, run, data=data, schedule=ScheduleConfig(epochs=1, warmup_epochs=0), ema=EmaConfig()))
    assert {"learning_curve.png", "confusion_matrix.png", "summary.json"} <= {p.name for p in run.iterdir()}
    assert plain_name(str(bad)) in (run / "bad_images.txt").read_text("utf-8").splitlines()
    names = json.loads((run / "config.json").read_text())["label_names"]
    assert len(set(names)) == len(NAMES)
    card = model_card(read_run(str(run), "last"), PushConfig(str(run), "me/it", "mit"))
    str(card).encode()


def test_pages_of_odd_runs(tmp_path):
    """Names and a command that contain Markdown, a table, HTML or the end of a code block."""
    folder, split = "*x*|<script>_a_", "`v`\n# V"
    run = FinishedRun(
        tmp_path,
        {"data": {"root": folder, "val_split": split}, "model": {"name": "\n  ```\n"}},
        {"parameters": 1, "top1": 50.0, "top5": 60.0, "val_images": 2, "epochs": 1, "updates": 1, "skipped_updates": 0}
        | {"bad_images": 0, "train_seconds": 1.0, "images_per_second": 1.0, "versions": {}, "seed": 0},
        [{"processes": 1, "device": "a|b", "git_revision": None, "command": "train.py '```\n<b>'"}],
        tmp_path,
        {"architecture": "vim_nano", "pretrained_cfg": {"input_size": [1, 2, 3]}, "num_classes": 2},
        "[a](b)",
    )
    text = str(model_card(run, PushConfig("run", "me/it", "mit")))
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.S | re.M)
    assert r"trained on \*x\*\|\<script\>\_a\_." in outside
    assert r"\`v\`\n\# V:" in outside.replace("\\\\n", r"\n")
    assert r"| initial weights | \[a\](b) |" in outside
    assert r"1 x a\|b" in outside
    assert "```" not in outside
    assert "<b>" not in outside


@pytest.mark.usefixtures("no_warnings")
def test_plots_show_names_as_they_are(tmp_path):
    """matplotlib draws each name literally; none is parsed as mathematics."""
    figure_module = pytest.importorskip("matplotlib.figure")
    from vim.figures import plain_text, save_figure

    figure = figure_module.Figure()
    axes = figure.subplots()
    for place, name in enumerate(NAMES):
        axes.plot([0, 1], [place, place], label=plain_text(name))
    axes.set_xticks(range(len(NAMES)), [plain_text(name) for name in NAMES])
    legend = axes.legend()
    save_figure(figure, tmp_path / "plot.png", 50)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    drawn = [text._preprocess_math(text.get_text()) for text in legend.get_texts()]
    assert [is_math for _, is_math in drawn] == [False] * len(NAMES)
    want = ["a$b$", "[red]", "中文", r"x\ny", "<b>x<b>", "%s", " _^{", r"\frac", "y" * 31 + "…", r"\xff"]
    assert [text for text, _ in drawn] == want


def test_plots_take_a_font_that_has_the_characters():
    pytest.importorskip("matplotlib")
    from matplotlib.font_manager import findfont, get_font

    from vim.figures import _fonts_for

    assert _fonts_for(set("abc_1…")) == []
    (name,) = _fonts_for({"a", "ⓐ"})  # matplotlib ships DejaVu Sans, without circled letters, and STIX, with them
    assert get_font(findfont(name)).get_char_index(ord("ⓐ"))
    assert not get_font(findfont("DejaVu Sans")).get_char_index(ord("ⓐ"))
    assert _fonts_for({"\U0010fffd"}) == []  # a private use character


def test_detections_with_odd_names(tmp_path):
    pytest.importorskip("matplotlib")
    from vim.detection.coco import CocoData
    from vim.detection.evaluation import Evaluation
    from vim.detection.sheet import write_sheet

    names = [*NAMES, "[/red]", "\ud800"]
    Image.new("RGB", (20, 12)).save(tmp_path / "$a$中.png")
    box = {"image_id": 1, "bbox": [1, 1, 5, 5]}
    content = {
        "images": [{"id": 1, "file_name": "$a$中.png", "width": 20, "height": 12}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [box | {"id": i, "category_id": i} for i in range(len(names))],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    data = CocoData(tmp_path / "boxes.json", tmp_path)
    found = [box | {"category_id": i, "score": 0.9} for i in range(len(names))]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        write_sheet(data, Evaluation(1, found, {}, {n: {"F1": 0.0} for n in names}), 1, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_progress_on_a_terminal(monkeypatch, capsys):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress()
    assert progress.console.is_terminal
    with progress.bar("[/red] [b]x[/b] :dog:\x1b[2J", 1) as advance:
        advance("[/] a")
    progress.line("[/red] :dog: \x1b[2J\nsecond")
    text = capsys.readouterr().out
    assert r"[/red] [b]x[/b] :dog:\x1b[2J  [/] a" in text
    assert "[/red] :dog: \\x1b[2J\nsecond\n" in text


def test_only_plain_consoles_write():
    """Only vim.console.progress creates rich consoles: rich's default reads [red] and :dog: in names as markup."""
    files = [*package_files("vim"), *(ROOT / "tools").glob("*.py")]
    writers = {f.name for f in files if imports(f, f.stem) & {"rich", "rich.console"}}
    assert writers == {"progress.py"}
    from vim.console.progress import plain_console

    console = plain_console(file=io.StringIO())
    assert isinstance(console, Console)
    console.print("[/red] :dog:")
    assert console.file.getvalue() == "[/red] :dog:\n"  # type: ignore[attr-defined]


def test_visible():
    from vim.console.escapes import visible

    assert visible("a b\t中 é_🐕") == r"a b\t中 é_🐕"
    for text in [*map(chr, range(32)), "\x7f", "\x9b", "\udcff", "\ud800", "\u202e", "\u2028", "\u200b", "\xa0"]:
        assert visible(f"a{text}b").isprintable()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_terminal_that_lacks_the_characters(encoding):
    code = (
        "from vim.console import plain_errors\nfrom vim.console.progress import Progress\n"
        "with plain_errors(): Progress().line('中 \\udcff')\nprint('é \\udcff')"
    )
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    want = "\\u4e2d \\xff\n\\xe9 \\udcff\n" if encoding == "ascii" else "中 \\xff\né \\udcff\n"
    assert done.stdout.decode() == want


def test_benchmarks_and_comparisons_with_odd_names(tmp_path):
    pytest.importorskip("matplotlib")
    from vim.experiments.plots import plot_comparison
    from vim.training.plots import plot_confusion

    result = {"choosing": {"0.001": 5.0, "0.01": 7.0}, "test": [1.0, 2.0], "mean": 1.5}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plot_comparison({"contenders": dict.fromkeys(NAMES, result)}, tmp_path / "comparison.png")
        plot_confusion(torch.ones(len(NAMES), len(NAMES), dtype=torch.int64), NAMES, tmp_path / "matrix.png")
    assert {p.name for p in tmp_path.iterdir()} == {"comparison.png", "matrix.png"}
