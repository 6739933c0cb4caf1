"""The benchmark: what it runs, what it writes, what stops it."""

import json
import runpy
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from option_effects import Seen
from rich.console import Console
from torch.testing import assert_close

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigError, ConfigParser, InterruptedRunError, RunError
from vim.experiments import benchmark as module
from vim.experiments.benchmark import benchmark, benchmark_table, check_complete
from vim.experiments.benchmark_config import BenchmarkConfig, Contender, Workload
from vim.experiments.plots import plot_benchmark
from vim.files import whole_file

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
sees = Seen()
INFERENCE, TRAIN = Workload("inference", 32, 2), Workload("train", 32, 3)
SPEEDS = {
    "images_per_second": 20.0,
    "min": 19.0,
    "max": 22.0,
    "peak_mib": 3.0,
    "reserved_mib": 4.0,
    "setup_seconds": 1.0,
}


def config(output, *models, workloads=(INFERENCE,), **kwargs):
    settings = {"device": "cpu", "precision": "fp32", "rounds": 3, "seconds": 0.01}
    return BenchmarkConfig(list(models), list(workloads), output=str(output), **(settings | kwargs))


def saved(folder):
    return json.loads((folder / "benchmark.json").read_text())


def parse(*args):
    return ConfigParser(BenchmarkConfig, "").parse_config([str(arg) for arg in args])[0]


def test_every_field_has_a_test_that_sees_its_effect():
    assert {(kind, f.name) for kind in (BenchmarkConfig, Workload) for f in fields(kind)} == sees


def test_options_follow_the_model_name():
    contender = Contender.parse("deit_tiny_patch16_224+compile+graph")
    assert contender == Contender("deit_tiny_patch16_224", ("compile", "graph"))
    assert str(contender) == "deit_tiny_patch16_224+compile+graph"
    assert Contender.parse("vim_tiny") == Contender("vim_tiny")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--models", "[vim_tiny+grap]"], "unknown option 'grap' in 'vim_tiny+grap'; did you mean 'graph'?"),
        (
            ["--models", "[vim_tiny+x]"],
            "unknown option 'x' in 'vim_tiny+x'; options are checkpoint, compile, graph, m",
        ),
        (["--models", "[vim_tiny+graph+graph]"], "duplicate option in 'vim_tiny+graph+graph'"),
        (["--models", "[vim_tiny, vim_tiny]"], "models: duplicate 'vim_tiny'"),
        (["--models", "[]"], "models and workloads must name at least one each"),
        (["--workloads", "[{mode: trian}]"], "mode must be inference or train, got 'trian'"),
        (["--workloads", "[{img_sise: 32}]"], "unknown key 'img_sise'; did you mean 'img_size'?"),
        (["--workloads", "[{batch_size: 0}]"], "batch_size must be an integer of at least 1, got 0"),
        (["--workloads", "[{img_size: big}]"], "img_size must be an integer of at least 1, got 'big'"),
        (["--workloads", "[{models: [vim_tyny]}]"], "unknown model 'vim_tyny'; did you mean 'vim_tiny'?"),
        (["--workloads", "[{models: []}]"], "models must be a list of names, or null for all, got []"),
        (["--precision", "fp16"], "precision fp16 is for inference"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--seconds", "0"], "seconds must be positive, got 0"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
    ],
)
def test_a_bad_configuration_fails_with_its_reason(capsys, args, message):
    with pytest.raises(SystemExit):
        parse(*args)
    assert message in capsys.readouterr().err


@sees(Workload, "models")
def test_workloads_come_in_order_and_may_be_restricted():
    chosen = Workload("train", 64, 1, models=["b", "c"])
    plan = BenchmarkConfig(["a", "b+graph", "b", "c"], [INFERENCE, chosen]).plan()
    assert [str(contender) for workload, contender in plan if workload is INFERENCE] == ["a", "b+graph", "b", "c"]
    assert [(workload, str(contender)) for workload, contender in plan[4:]] == [(chosen, "b"), (chosen, "c")]


def test_defaults_and_help_are_those_of_the_dataclass():
    assert parse() == BenchmarkConfig()
    lines = ConfigParser(BenchmarkConfig, "").format_help().splitlines()
    for field in fields(BenchmarkConfig):
        line = next(line for line in lines if line.startswith((f"  --{field.name} ", f"  --{field.name}+ ")))
        assert len(line.split()) > 4, f"{field.name} has no docstring"


@pytest.mark.parametrize("name", ["benchmark", "benchmark_cpu"])
def test_the_configurations_parse_and_their_models_exist(name):
    config = parse("--config", ROOT / "configs" / f"{name}.yaml")
    assert {contender.model for _, contender in config.plan()} == config.top1.keys()
    assert config.output == f"runs/{name}"
    assert all(timm.is_model(contender.model) for _, contender in config.plan())
    assert {workload.mode for workload in config.workloads} == {"inference", "train"}


@sees(BenchmarkConfig, "output")
def test_a_run_writes_every_number_and_the_plot(tmp_path):
    given = config(tmp_path, "vim_nano", "test_vit+materialised", "test_convnext", workloads=(INFERENCE, TRAIN))
    results = benchmark(given)
    assert results == saved(tmp_path)
    assert results["config"] == asdict(given)
    assert {"command", "date", "device", "threads", "versions", "config", "rows"} == set(results)
    assert results["versions"]["torch"] == torch.__version__
    assert {"torch", "timm", "triton", "python", "vim"} == set(results["versions"])
    done = [(row["mode"], row["batch_size"], row["model"], row["options"]) for row in results["rows"]]
    models = [("vim_nano", []), ("test_vit", ["materialised"]), ("test_convnext", [])]
    assert done == [(w.mode, w.batch_size, *model) for w in (INFERENCE, TRAIN) for model in models]
    for row in results["rows"]:
        assert 0 < row["min"] <= row["images_per_second"] <= row["max"]
        assert row["setup_seconds"] > 0
        assert (row["img_size"], row["peak_mib"], row["reserved_mib"], row["error"]) == (32, None, None, None)
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.json", "benchmark.png"]


@sees(BenchmarkConfig, "rounds", "seconds")
@sees(Workload, "batch_size")
@pytest.mark.parametrize(("rounds", "want"), [(5, (200, 50, 400)), (2, (300, 200, 400)), (1, (400, 400, 400))])
def test_images_per_second_are_the_median_of_the_rounds(monkeypatch, rounds, want):
    """A round should take 0.4 s, at 10 ms per step. With this fake clock, steps take longer in some rounds."""
    now, steps, before = 0.0, 0, module.WARM_UP_STEPS + (1 + 2 + 4 + 8 + 16)  # until they take 1/4 of a round

    def step():
        nonlocal now, steps
        now += 0.01 * (1, 2, 4, 1, 8)[max(0, steps - before) // 40]
        steps += 1
        return torch.zeros(())

    monkeypatch.setattr(module, "build_step", lambda *args: step)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    measured = module.measure(
        Contender("any"), Workload(batch_size=4), config("", "any", seconds=0.4, rounds=rounds), CPU
    )
    assert [measured[name] for name in ("images_per_second", "min", "max")] == pytest.approx(want)
    assert measured["setup_seconds"] == pytest.approx(0.01 * module.WARM_UP_STEPS)
    assert steps == before + 40 * rounds


@sees(BenchmarkConfig, "models", "workloads", "precision")
@sees(Workload, "mode", "img_size")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_model_is_timed_on_every_workload_in_the_precision(tmp_path, monkeypatch, precision):
    monkeypatch.setattr(module, "plot_benchmark", lambda results, path: path.touch())
    built = []

    def build(*args):
        built.append(args)
        return lambda: torch.ones(())

    short = {"rounds": 1, "seconds": 1e-5, "precision": precision}
    benchmark(config(tmp_path, "vim_nano", "test_vit+checkpoint", workloads=(INFERENCE, TRAIN), **short), build)
    contenders = Contender("vim_nano"), Contender("test_vit", ("checkpoint",))
    assert built == [(contender, w, precision, CPU) for w in (INFERENCE, TRAIN) for contender in contenders]


@sees(BenchmarkConfig, "device", "threads")
@pytest.mark.parametrize(
    ("device", "cuda", "want"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cuda", True, "cuda"), ("cpu", True, "cpu")],
)
@pytest.mark.parametrize("threads", [3, None])
def test_a_benchmark_has_its_device_and_its_threads(tmp_path, monkeypatch, device, cuda, want, threads):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(module, "_free", lambda *_: 0.0)
    monkeypatch.setattr(module, "plot_benchmark", lambda results, path: path.touch())
    before, seen = torch.get_num_threads(), []

    def measure(contender, workload, config, device, build):
        seen.append((device.type, torch.get_num_threads()))
        return dict(SPEEDS)

    monkeypatch.setattr(module, "measure", measure)
    try:
        results = benchmark(config(tmp_path, "vim_nano", device=device, threads=threads))
    finally:
        torch.set_num_threads(before)
    assert seen == [(want, threads or before)]
    assert results["threads"] == (threads or before)
    assert (results["device"] == "a card") == (want == "cuda")


def test_a_model_with_wrong_outputs_has_no_speed(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "build_step", lambda *args: lambda: torch.tensor([1.0, float("nan")]))
    results = benchmark(config(tmp_path, "vim_nano"))
    assert results["rows"][0]["images_per_second"] is None
    with pytest.raises(RunError, match=r"1 of 1 measurements failed, first vim_nano, inference, .*logits not finite"):
        check_complete(results)


@pytest.fixture
def model_of(monkeypatch):
    """model_of(contender, workload, precision) -> the step and its model."""

    create = module.create_contender

    def build(contender, workload, precision="fp32"):
        models = []
        monkeypatch.setattr(module, "create_contender", lambda *args: models.append(create(*args)) or models[-1])
        return module.build_step(Contender.parse(contender), workload, precision, CPU), models[0]

    return build


@pytest.mark.parametrize("name", ["vim_nano", "test_vit"])
def test_a_training_step_trains(name, model_of):
    step, model = model_of(name, TRAIN, "bf16")
    before = {key: value.clone() for key, value in model.named_parameters()}
    losses = [step() for _ in range(20)]
    assert all(not torch.equal(value, before[key]) for key, value in model.named_parameters())
    assert losses[-1] < losses[0]
    assert model.training
    assert not losses[0].requires_grad
    assert all(value.grad is None and value.dtype == torch.float32 for value in model.parameters())


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_an_inference_step_only_infers(precision, dtype, model_of):
    step, model = model_of("test_vit", INFERENCE, precision)
    logits = step()
    assert (logits.shape, logits.dtype) == ((2, module.CLASSES), dtype)
    assert logits.std() > 0  # inputs are not zeros
    assert not torch.equal(logits[0], logits[1])
    assert not model.training
    assert not logits.requires_grad


def test_materialised_attention_runs_without_flash_and_gives_the_same(model_of, monkeypatch):
    calls = []
    flash = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or flash(*a, **k))
    fused = model_of("test_vit", INFERENCE)[0]()
    assert len(calls) == 6
    materialised = model_of("test_vit+materialised", INFERENCE)[0]()
    assert len(calls) == 6
    assert_close(materialised, fused, rtol=1e-4, atol=1e-5)


def test_options_are_checked_and_img_size_is_optional():
    with pytest.raises(ConfigError, match="test_convnext has no fused attention to turn off; leave out"):
        module.create_contender(Contender("test_convnext", ("materialised",)), 32)
    assert module.create_contender(Contender("vim_nano", ("checkpoint",)), 32).grad_checkpointing
    assert module.create_contender(Contender("test_vit"), 48).patch_embed.img_size == (48, 48)


def test_compile_compiles_the_model(monkeypatch, model_of):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    _, model = model_of("test_vit+compile", INFERENCE)
    assert compiled == [model]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vim_nano+graph", r"vim_nano\+graph: a CUDA graph needs a GPU"),
        ("vim_nanno", "no model 'vim_nanno' in timm.*did you mean 'vim_nano'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path, model, message):
    with pytest.raises(ConfigError, match=message):
        benchmark(config(tmp_path / "new", "vim_nano", model))
    assert not (tmp_path / "new").exists()


def test_a_missing_gpu_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device cuda: torch finds no CUDA device here"):
        benchmark(config(tmp_path, "vim_nano", device="cuda"))


@pytest.fixture
def fake(monkeypatch):
    """fake(test_vit=error): measure() raises these errors and otherwise returns SPEEDS, without building anything."""

    def install(**errors):
        def measure(contender, workload, config, device, build):
            if contender.model in errors:
                raise errors[contender.model]
            return dict(SPEEDS)

        monkeypatch.setattr(module, "measure", measure)

    return install


def late(error, first):
    """`error`, raised while `first` was handled, as after a failed capture."""
    error.__context__ = first
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        late(RuntimeError("operation failed due to a previous error during capture"), torch.OutOfMemoryError("x")),
    ],
)
def test_out_of_memory_is_a_result(tmp_path, fake, error):
    fake(test_vit=error)
    results = benchmark(config(tmp_path, "test_vit", "vim_nano", workloads=(INFERENCE, TRAIN)))
    assert [row["error"] for row in results["rows"]] == ["out of memory", None] * 2
    assert results["rows"][0]["images_per_second"] is None
    assert results["rows"][1] | SPEEDS == results["rows"][1]
    assert saved(tmp_path) == results
    assert (tmp_path / "benchmark.png").is_file()


@pytest.mark.parametrize(
    ("error", "want"),
    [
        (ValueError("boom\nand more"), "ValueError: boom"),
        (ConfigError("cannot make test_vit at this size"), "cannot make test_vit at this size"),
    ],
)
def test_a_model_that_fails_does_not_stop_the_others(tmp_path, fake, error, want):
    fake(test_vit=error)
    results = benchmark(config(tmp_path, "vim_nano", "test_vit", "test_convnext"))
    assert results == saved(tmp_path)
    assert [row["error"] for row in results["rows"]] == [None, want, None]
    assert (tmp_path / "benchmark.png").is_file()
    assert ["test_vit", "-", *want.split()] in printed(results)
    with pytest.raises(RunError, match=f"1 of 3 measurements failed, first test_vit, inference, .*: {want}$"):
        check_complete(results)
    fake()
    check_complete(benchmark(config(tmp_path, "vim_nano", "test_vit")))


def test_an_interrupted_run_loses_nothing(tmp_path, fake):
    (tmp_path / "benchmark.png").write_bytes(b"of an earlier benchmark")
    fake(test_vit=KeyboardInterrupt())
    with pytest.raises(InterruptedRunError, match=r"interrupted at test_vit, inference.*; 1 measurements are in"):
        benchmark(config(tmp_path, "vim_nano", "test_vit", "test_convnext"))
    kept = saved(tmp_path)["rows"]
    assert [row["model"] for row in kept] == ["vim_nano"]
    assert kept[0]["images_per_second"] == SPEEDS["images_per_second"]
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]


@sees(BenchmarkConfig, "resume")
def test_parts_of_a_benchmark_come_together(tmp_path, fake, monkeypatch):
    """A resumed run measures what is missing or failed; lack of memory is a result."""
    fake(test_vit=torch.OutOfMemoryError("x"), vim_nano=ValueError("x"))
    benchmark(config(tmp_path, "test_convnext", "test_vit", "vim_nano", rounds=1))
    seen = []
    monkeypatch.setattr(module, "measure", lambda contender, w, *_: seen.append((str(contender), w)) or dict(SPEEDS))
    names = ["vim_nano", "test_vit", "test_vit+checkpoint"]
    results = benchmark(config(tmp_path, *names, workloads=(INFERENCE, TRAIN), resume=True))
    new = [("vim_nano", INFERENCE), ("test_vit+checkpoint", INFERENCE), *((name, TRAIN) for name in names)]
    assert seen == new
    rows = [("test_convnext", INFERENCE), ("test_vit", INFERENCE), *new]
    found = [("+".join([row["model"], *row["options"]]), row["mode"], row["batch_size"]) for row in results["rows"]]
    assert found == [(name, w.mode, w.batch_size) for name, w in rows]
    assert [row["error"] for row in results["rows"]] == [None, "out of memory", *[None] * 5]
    assert saved(tmp_path) == results
    assert benchmark(config(tmp_path, *names, workloads=(INFERENCE, TRAIN), resume=True))["rows"] == results["rows"]
    assert len(seen) == len(new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda earlier: earlier | {"device": "another"}, "was measured with device another, and this run has .*;"),
        (
            lambda earlier: earlier | {"versions": earlier["versions"] | {"torch": "1"}},
            "was measured with torch 1, and",
        ),
        (
            lambda earlier: earlier | {"config": earlier["config"] | {"precision": "bf16"}},
            "was measured with precision bf16, and",
        ),
        (lambda earlier: earlier | {"threads": 99}, "was measured with threads 99, and"),
        (lambda earlier: {"rows": []}, "is no result of this benchmark"),
        (lambda earlier: [], "is no result of this benchmark"),
    ],
)
def test_measurements_of_another_machine_or_setting_are_no_part(tmp_path, fake, change, message):
    fake()
    benchmark(config(tmp_path, "vim_nano"))
    text = json.dumps(change(saved(tmp_path)))
    (tmp_path / "benchmark.json").write_text(text)
    with pytest.raises(ConfigError, match=f"benchmark.json {message}.*choose another output"):
        benchmark(config(tmp_path, "test_vit", resume=True))
    assert (tmp_path / "benchmark.json").read_text() == text
    (tmp_path / "benchmark.json").write_text(text[:5])
    with pytest.raises(ConfigError, match=r"benchmark\.json is no result of this benchmark"):
        benchmark(config(tmp_path, "test_vit", resume=True))


def test_results_are_on_disk_after_each_contender_and_replace_those_of_an_earlier_run(tmp_path, monkeypatch):
    (tmp_path / "benchmark.json").write_text('{"rows": ["old"]}')
    seen = []
    monkeypatch.setattr(module, "measure", lambda *args: seen.append(len(saved(tmp_path)["rows"])) or dict(SPEEDS))
    monkeypatch.setattr(module, "plot_benchmark", lambda results, path: path.touch())
    for _ in range(2):
        benchmark(config(tmp_path, "vim_nano", "test_vit", "test_convnext"))
    assert seen == [0, 1, 2] * 2
    assert len(saved(tmp_path)["rows"]) == 3


def test_a_half_written_file_does_not_replace_a_whole_one(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("whole")

    def write():
        with whole_file(path) as unfinished:
            unfinished.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
    assert path.read_text() == "whole"


def results_of(*speeds, models=("vim_nano", "test_vit+graph"), workloads=(INFERENCE,), peer=None):
    """Content of benchmark.json with these images/s; None: out of memory."""
    rows = []
    contenders = [(workload, *name.split("+")) for workload in workloads for name in models]
    for (workload, model, *options), speed in zip(contenders, speeds, strict=True):
        numbers = {"images_per_second": speed, "min": speed and speed * 0.9, "max": speed and speed * 1.1}
        row = {"model": model, "options": options, **asdict(workload), **SPEEDS, **numbers}
        rows.append(row | {"error": None if speed else "out of memory"})
    settings = {"precision": "bf16", "peer": peer, "top1": {"test_vit": 70.25}}
    return {"device": "a card", "versions": {"torch": "2"}, "config": settings, "rows": rows}


def printed(results):
    console = Console(width=120, record=True, file=sys.stderr)
    console.print(benchmark_table(results))
    return [line.split() for line in console.export_text().replace("│", " ").splitlines()]


def test_the_table_has_a_block_for_each_workload_with_ratios_to_its_first_row():
    lines = printed(results_of(1000.0, 2500.0, 10.0, 5.0, workloads=(INFERENCE, TRAIN)))
    names = [line[0] for line in lines if line]
    start = names.index("inference,")
    assert lines[start + 1] == ["vim_nano", "-", "1,000", "(900", "-", "1,100)", "1.00", "3"]
    assert lines[start + 2] == ["test_vit+graph", "70.2", "2,500", "(2,250", "-", "2,750)", "2.50", "3"]
    assert lines[start + 4] == ["train,", "32", "pixels,", "batch", "3"]
    assert lines[start + 6] == ["test_vit+graph", "70.2", "5.0", "(4.5", "-", "5.5)", "0.50", "3"]


def test_the_table_has_no_ratio_to_a_first_row_without_memory():
    lines = printed(results_of(None, 2500.0))
    assert ["vim_nano", "-", "out", "of", "memory"] in lines
    assert ["test_vit+graph", "70.2", "2,500", "(2,250", "-", "2,750)", "-", "3"] in lines


@sees(BenchmarkConfig, "peer")
def test_ratios_are_relative_to_the_fastest_row_of_the_peer(tmp_path):
    """In a block of rows that came in parts, too."""
    models = ("vim_nano", "test_vit+graph", "test_vit+compile")
    results = results_of(
        50.0, 200.0, 100.0, None, 8.0, 7.0, workloads=(INFERENCE, TRAIN), models=models, peer="test_vit"
    )
    results["rows"].append(results["rows"].pop(0))
    lines = printed(results)
    ratios = [line[-2] for line in lines if "3" in line[-1:] and "(" in "".join(line)]
    assert ratios == ["1.00", "0.50", "0.25", "1.00", "0.88"]
    results["config"]["peer"] = "vim_nano"
    assert [line[-2] for line in printed(results) if "3" in line[-1:] and "(" in "".join(line)][-2:] == ["-", "-"]
    for wrong in ({"peer": "test_vitt"}, {"top1": {"test_vitt": 70.0}}):
        with pytest.raises(ConfigError, match=r"no model 'test_vitt' in timm.*did you mean"):
            benchmark(config(tmp_path, "test_vit", **wrong))


@sees(BenchmarkConfig, "top1")
def test_the_plot_has_a_line_for_each_model_through_its_fastest_contenders(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure))
    models = ("vim_nano", "test_vit+graph", "test_vit+compile", "test_convnext")
    sizes = [Workload("inference", 64, 2), INFERENCE, Workload("train", 32, 2)]
    speeds = [(9.0, 5.0, 6.0, None), (30.0, 20.0, 10.0, None), (4.0, None, None, None)]
    plot_benchmark(results_of(*sum(speeds, ()), models=models, workloads=sizes), tmp_path / "plot.png")
    inference, training = figures[0].axes
    assert (inference.get_title(), training.get_title()) == ("inference", "training")
    for axes, want in (
        (inference, {"vim_nano": [(32, 30), (64, 9)], "test_vit, 70.2 %": [(32, 20), (64, 6)]}),
        (training, {"vim_nano": [(32, 4)], "test_vit, 70.2 %": []}),
    ):
        assert {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.get_lines()} == want
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        styles = {line.get_label(): (line.get_linestyle(), line.get_marker()) for line in axes.get_lines()}
        assert styles == {"vim_nano": ("-", "o"), "test_vit, 70.2 %": ("--", "s")}
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["test_vit, 70.2 %", "vim_nano"]


def test_a_benchmark_without_any_speed_has_a_plot(tmp_path):
    plot_benchmark(results_of(None, None), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_tool_prints_the_table(tmp_path, monkeypatch, capsys):
    tiny = ["--config", ROOT / "configs/benchmark_cpu.yaml", "--output", tmp_path, "--threads", "null"]
    tiny += ["--workloads", "[{mode: inference, img_size: 32, batch_size: 1}]", "--models", "[vim_nano]"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, tiny), "--seconds", "0.01"])
    runpy.run_path(str(ROOT / "tools" / "benchmark.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert f"results: {tmp_path / 'benchmark.json'}" in out
    assert "inference, 32 pixels, batch 1 " in out
    assert "\x1b" not in out
    assert saved(tmp_path)["command"].endswith("--seconds 0.01")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vim_nano", "test_vit"])
def test_a_captured_training_step_trains_like_the_plain_one(name):
    device, workload = torch.device("cuda"), Workload("train", 32, 8)
    plain = module.build_step(Contender(name), workload, "fp32", device)
    losses = torch.stack([plain() for _ in range(module.WARM_UP_STEPS + 5)])
    graph = module.build_step(Contender(name, ("graph",)), workload, "fp32", device)
    replayed = torch.stack([graph().clone() for _ in range(5)])
    assert replayed.unique().numel() == 5
    assert_close(replayed, losses[-5:], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("workload", [INFERENCE, TRAIN], ids=lambda workload: workload.mode)
def test_every_option_runs_and_memory_is_counted_and_given_back(workload, tmp_path, capsys):
    models = ["test_vit", "test_vit+graph", "test_vit+compile", "test_vit+compile+graph", "vim_nano", "vim_nano+graph"]
    rows = benchmark(config(tmp_path, *models, workloads=[workload], device="cuda", precision="bf16"))["rows"]
    assert all(row["images_per_second"] > 0 and row["reserved_mib"] >= row["peak_mib"] for row in rows)
    weights = 4 * sum(p.numel() for p in timm.create_model("test_vit", num_classes=1000).parameters()) / 2**20
    assert all(row["peak_mib"] > weights * (3 if workload.mode == "train" else 1) for row in rows[:4])
    assert "warning" not in capsys.readouterr().out
