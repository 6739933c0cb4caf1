"""The demo: its predictions against the model, and the page in a headless browser."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_tree import write_image_tree
from PIL import Image
from processes import outputs
from safetensors.torch import save_file
from torch.testing import assert_close

import vim.features
from vim.console import ConfigError
from vim.data import DataError
from vim.demo import DemoConfig, Predictor
from vim.features import FeaturesConfig, export_features
from vim.training.run_folder import RunFolder
from vim.visualize import class_map, image_maps, implicit_attention, scan_of_block, step_sizes

colormaps = pytest.importorskip("matplotlib").colormaps
ROOT = Path(__file__).parents[2]
KWARGS = {"img_size": 12, "patch_size": 4, "in_chans": 1, "depth": 3, "num_classes": 3}
INPUT = {"input_size": (1, 12, 12), "mean": (0.4,), "std": (0.2,), "crop_pct": 1.0, "interpolation": "bilinear"}
MAPS = ["step size, forward", "step size, backward", "class token reads, forward", "class token reads, backward"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A run folder whose model recognises bright corners, 24 images of three classes, and their features."""
    path = tmp_path_factory.mktemp("demo")
    write_image_tree(path, {"val": 24}, classes=3, size=14)
    torch.manual_seed(0)
    model = timm.create_model("vim_nano", **KWARGS).eval()
    run = RunFolder(path / "run", "tools/train.py")
    run.path.mkdir()
    run.export(model, KWARGS, INPUT, ["a", "b", "c"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        given = {"images": str(path / "val"), "format": "npz", "batch_size": 8, "num_workers": 0}
        export_features(FeaturesConfig(str(run.path), output=str(path / "untrained"), **given))
        # No training: the head prefers the class whose mean feature is nearest.
        features = vim.features.load(path / "untrained")
        means = torch.stack([torch.from_numpy(features["token"][features.labels == i]).mean(0) for i in range(3)])
        with torch.no_grad():
            model.head.weight.copy_(20 * means)
            model.head.bias.copy_(-10 * means.square().sum(1))
        run.export(model, KWARGS, INPUT, ["a", "b", "c"])
        export_features(FeaturesConfig(str(run.path), output=str(path / "features"), **given))
    return path


@pytest.fixture(scope="module")
def predictor(setting):
    return Predictor(DemoConfig(str(setting / "run"), features=str(setting / "features")))


def by_hand(setting, name: str):
    """The model, and an image as its input (1, 1, 12, 12)."""
    image = Image.open(setting / "val" / name).resize((12, 12), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image) / np.float32(255))
    model = timm.create_model(f"local-dir:{setting / 'run'}", pretrained=True).eval()
    return model, (pixels[None, None] - 0.4) / 0.2


@torch.no_grad()
def test_classes_are_the_softmax_of_the_logits(setting, predictor):
    for name in ("a/0.png", "b/13.png", "c/23.png"):
        model, batch = by_hand(setting, name)
        got = predictor(setting / "val" / name).classes
        assert list(got) == ["a", "b", "c"]
        assert_close(torch.tensor(list(got.values())), model(batch).softmax(1)[0], rtol=1e-4, atol=1e-5)
        assert max(got, key=got.__getitem__) == name[0]


def test_an_image_of_the_export_is_its_own_nearest_neighbour(setting, predictor):
    features = vim.features.load(setting / "features")
    for row in (0, 11, 23):
        found = predictor(setting / "val" / features.paths[row]).neighbours
        assert len(found) == 8
        assert found[0][1] == f"{'abc'[features.labels[row]]} (1.000)"
        want = Image.open(setting / "val" / features.paths[row]).convert("RGB")
        assert np.array_equal(np.asarray(found[0][0].resize(want.size, Image.Resampling.NEAREST)), np.asarray(want))


@pytest.mark.parametrize("options", [{}, {"blocks": [0, 2], "pools": ["avg", "token"]}, {"pools": ["map"]}], ids=str)
def test_neighbours_are_of_any_export(setting, tmp_path, monkeypatch, options):
    """An export of six images, one of them wide, with other classes than the model's; the last has no class."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    Image.fromarray(np.indices((224, 448)).sum(0).astype(np.uint8) % 2 * 255).save(tmp_path / "wide.png")
    paths = [*(setting / "val" / name for name in ("a/0.png", "a/3.png", "b/1.png", "c/2.png")), tmp_path / "wide.png"]
    (tmp_path / "list.txt").write_text("".join(f"{path}\t5\n" for path in paths) + f"{setting}/val/b/4.png\n")
    given = {"images": str(tmp_path / "list.txt"), "output": str(tmp_path / "out"), "num_workers": 0, "format": "npz"}
    export_features(FeaturesConfig(str(setting / "run"), **given | options))
    features = vim.features.load(tmp_path / "out")
    rows = next(iter(features.columns.values())).reshape(6, -1)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    predictor = Predictor(DemoConfig(str(setting / "run"), features=str(tmp_path / "out")))
    for query, path in {5: setting / "val" / "b" / "4.png", 4: tmp_path / "wide.png"}.items():
        found = predictor(path).neighbours
        cosines = rows @ rows[query]
        order = np.argsort(-cosines)
        assert [text.split(" (")[0] for _, text in found] == ["no class" if row == 5 else "5" for row in order]
        shown = [float(text.split("(")[1].strip(")")) for _, text in found]
        assert shown == pytest.approx(cosines[order].tolist(), abs=1e-3)
    small = found[0][0]  # a checkerboard of single pixels becomes grey and keeps its aspect ratio
    assert small.size == (224, 112)
    assert np.abs(np.asarray(small)[8:-8, 8:-8] - 127.5).max() < 32


def test_threads_take_turns_at_the_model(setting, predictor):
    """A second image would trigger the hooks of the first one's maps."""
    file, other = setting / "val" / "b" / "1.png", threading.Event()
    thread, together = threading.Thread(target=predictor, args=(file,)), []

    def enter(*args):
        if threading.current_thread() is thread:
            other.set()
        elif not together:
            thread.start()
            together.append(other.wait(0.3))

    handle = predictor.model.register_forward_pre_hook(enter)
    try:
        predictor(file)
    finally:
        thread.join()
        handle.remove()
    assert (together, other.is_set()) == ([False], True)


@torch.no_grad()
@pytest.mark.parametrize("block", range(3))
def test_maps_of_a_block(setting, predictor, block):
    model, batch = by_hand(setting, "b/1.png")
    scan = scan_of_block(model, batch, block)
    reads = [t[:, 0].abs().mean(2) for t in implicit_attention(scan, [4])]  # the class token among nine patches
    want = [image_maps(model, values) for values in (*(delta.mean(2) for delta in step_sizes(scan)), *reads)]
    want.append(class_map(model, batch, torch.tensor([1]), block))
    (seen, first), *maps = predictor(setting / "val" / "b" / "1.png", block).maps
    assert (first, [name for _, name in maps]) == ("model input", [*MAPS, "class map of “b”"])
    assert (np.array(seen)[9::19, 9::19][:12, :12, 0] / 255 - 0.4) / 0.2 == pytest.approx(batch[0, 0].numpy(), abs=0.02)
    middles = np.s_[37::75, 37::75]  # centres of the patches in 224 pixels
    for (image, _), values in zip(maps, want, strict=True):
        assert image.size == (224, 224)
        heat = (np.array(image)[middles] - 0.35 * np.array(seen)[middles]) / (0.65 * 255)
        scaled = (values[0] - values.min()) / (values.max() - values.min())
        assert heat == pytest.approx(colormaps["magma"](scaled.numpy())[..., :3], abs=0.02)


@pytest.mark.parametrize(
    ("mode", "size"), [("1", (30, 20)), ("P", (9, 31)), ("RGBA", (1, 1)), ("CMYK", (40, 40)), ("I;16", (2, 900))]
)
def test_images_of_any_mode_and_size(predictor, tmp_path, mode, size):
    Image.new(mode, size).save(tmp_path / "odd.tiff")
    answer = predictor(tmp_path / "odd.tiff")
    assert sum(answer.classes.values()) == pytest.approx(1, abs=1e-5)
    assert len(answer.maps) == 6


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_a_file_that_is_no_image(predictor, tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(DataError, match=r"^broken\.png cannot be read as an image$"):
        predictor(tmp_path / "broken.png")


def test_another_timm_model_has_no_maps(setting, tmp_path):
    pytest.importorskip("gradio")
    from vim.demo.app import page

    model = timm.create_model("resnet10t", num_classes=4)
    save_file(model.state_dict(), tmp_path / "resnet.safetensors")
    predictor = Predictor(DemoConfig("resnet10t", str(tmp_path / "resnet.safetensors"), {"num_classes": 4}))
    answer = predictor(setting / "val" / "b" / "1.png")
    assert list(answer.classes) == ["class 0", "class 1", "class 2", "class 3"]
    assert ([name for _, name in answer.maps], answer.neighbours) == (["model input"], [])
    texts = [str(getattr(part, "value", "")) for part in page(predictor, "resnet10t").blocks.values()]
    assert any("resnet10t is no Vision Mamba: it has no scans to show." in text for text in texts)


def test_the_page_begins_with_the_last_of_all_blocks(predictor):
    pytest.importorskip("gradio")
    from vim.demo.app import page

    (slider,) = (part for part in page(predictor, "run").blocks.values() if part.get_block_name() == "slider")
    assert (slider.minimum, slider.maximum, slider.value, slider.visible) == (0, 2, 2, True)


def test_the_server_listens_where_the_options_say(setting, monkeypatch):
    pytest.importorskip("gradio")
    from vim.demo import app

    asked = []

    class Page:
        def launch(self, **options):
            asked.append((options["server_name"], options["server_port"], options["share"]))
            if options["server_port"] == 7:
                raise OSError
            return None, "an address", None

        def block_thread(self):
            pass

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # undo what serve sets
    monkeypatch.setattr(app, "page", lambda *args: Page())
    app.serve(DemoConfig(str(setting / "run"), host="127.0.0.9", port=8))
    with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1, port 7; choose another --port"):
        app.serve(DemoConfig(str(setting / "run"), port=7))
    assert asked == [("127.0.0.9", 8, False), ("127.0.0.1", 7, False)]


def test_what_it_refuses(setting, tmp_path):
    run, features = str(setting / "run"), str(setting / "features")
    with pytest.raises(ConfigError, match="no model 'vim_nan' in timm, and no run folder of that name; did you mean"):
        Predictor(DemoConfig("vim_nan"))
    with pytest.raises(DataError, match="no features in"):
        Predictor(DemoConfig(run, features=str(tmp_path)))
    with pytest.raises(
        ConfigError, match=r"untrained are of another model, .*; export them again: tools/export_features"
    ):
        Predictor(DemoConfig(run, features=str(setting / "untrained")))
    wrong = DemoConfig(run, kwargs={"pretrained_cfg_overlay": {"crop_pct": 0.9}}, features=features)
    with pytest.raises(ConfigError, match=r"have another preprocessing: .*'mean': \[0.4\].*, here .*'crop_pct': 0.9"):
        Predictor(wrong)
    shutil.copytree(setting, tmp_path / "moved")
    manifest = tmp_path / "moved" / "features" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(setting), str(tmp_path / "moved")))
    (tmp_path / "moved" / "val" / "c" / "2.png").unlink()
    with pytest.raises(DataError, match="no longer holds the images of"):
        Predictor(DemoConfig(run, features=str(manifest.parent)))
    for name, kwargs, message in [
        ("classes", KWARGS | {"num_classes": 0}, "has no classes to predict; choose a classifier"),
        ("channels", KWARGS | {"in_chans": 2}, "takes 2 channels; images have 1 or 3"),
    ]:
        save_file(timm.create_model("vim_nano", **kwargs).state_dict(), tmp_path / f"{name}.safetensors")
        with pytest.raises(ConfigError, match=message):
            Predictor(DemoConfig("vim_nano", str(tmp_path / f"{name}.safetensors"), kwargs))
    for port in (0, 65536):
        with pytest.raises(ValueError, match=f"port must be from 1 to 65535, got {port}"):
            DemoConfig(port=port)


@pytest.mark.parametrize("block", [3, -2, 10**400, 0.5, float("nan"), "1", None, [0]])
def test_a_block_that_the_model_lacks(setting, predictor, block):
    with pytest.raises(DataError, match="block must be from 0 to 2, got"):
        predictor(setting / "val" / "b" / "1.png", block)


def test_files_that_are_no_images_to_open(predictor, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    for file, message in {
        tmp_path / "pipe.png": "pipe.png is no file",
        tmp_path / "none.png": "none.png is no file",
        tmp_path / (300 * "a"): f"{300 * 'a'} is no file",
        Path("/dev/zero"): "zero is no file",
        tmp_path / "huge.png": "huge.png is larger than 64 MiB; scale it down",
    }.items():
        with pytest.raises(DataError, match=f"^{message}$"):
            predictor(file)


def test_label_names_are_shown_as_they_are(tmp_path):
    """None is lost: neither duplicates nor markup nor invalid UTF-8."""
    pytest.importorskip("gradio")
    from vim.demo.app import figures

    run = RunFolder(tmp_path / "run", "tools/train.py")
    run.path.mkdir()
    model = timm.create_model("vim_nano", **KWARGS | {"num_classes": 5})
    run.export(model, KWARGS | {"num_classes": 5}, INPUT, ["crane", "crane", "<b>x</b>", "x\ny", "\udcff"])
    image = Image.new("L", (12, 12))
    image.save(tmp_path / "a.png")
    answer = Predictor(DemoConfig(str(run.path)))(tmp_path / "a.png")
    assert list(answer.classes) == ["crane (class 0)", "crane (class 1)", "<b>x</b>", r"x\ny", r"\xff"]
    json.dumps(answer.classes, ensure_ascii=False).encode()
    assert "<figcaption>&lt;b&gt;x</figcaption>" in figures([(image, "<b>x")], 9)
    run.export(model, KWARGS | {"num_classes": 5}, INPUT, ["a"])
    with pytest.raises(ConfigError, match=r"run has 5 classes and 1 label names in its config\.json; repair it"):
        Predictor(DemoConfig(str(run.path)))


class Api:
    """A client of the server without a browser."""

    def __init__(self, url: str):
        self.url = f"{url}gradio_api/"

    def post(self, what: str, body: bytes, kind: str = "application/json"):
        with urllib.request.urlopen(urllib.request.Request(self.url + what, body, {"Content-Type": kind})) as f:
            return json.load(f)

    def upload(self, content: bytes, name: str = "a.png") -> dict:
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        (path,) = self.post("upload", head.encode() + content + b"\r\n--x--\r\n", "multipart/form-data; boundary=x")
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    def ask(self, upload, block=0) -> str:
        return self.post("call/answer", json.dumps({"data": [upload, block]}).encode())["event_id"]

    def answer(self, event: str) -> str:
        with urllib.request.urlopen(f"{self.url}call/answer/{event}") as f:
            return f.read().decode()


NOT_UPLOADED = "this image is not, or no longer, among the uploads; drop it again"


def test_only_uploaded_files_are_read(setting, url, uploads):
    api, image = Api(url), setting / "val" / "b" / "1.png"
    ours = api.upload(image.read_bytes())
    (folder,) = uploads.glob("vim-demo-*")
    assert Path(ours["path"]).is_relative_to(folder)
    (folder / "link.png").symlink_to(image)
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    outside = [image, "/dev/zero", folder / "link.png", folder / "zero.png", folder / "loop.png", "a\0b", None]
    outside += [f"{folder}/../{image.relative_to('/')}", folder.parent, ""]
    for path in outside:
        # Without "meta", gradio does not treat it as a file and does not check its location.
        for upload in ({"path": path and str(path)}, {"path": path and str(path), "url": ours["path"]}):
            found = api.answer(api.ask(upload))
            assert "base64" not in found, path
            assert NOT_UPLOADED in found or "event: error" in found, found
    for upload in ({"path": "http://127.0.0.1:1/a.png", "meta": ours["meta"]}, "a", [1], {"url": str(image)}):
        found = api.answer(api.ask(upload))
        assert "base64" not in found
        assert ("this page takes files, not URLs" in found) == ("http:" in str(upload))
    assert "pipe.png is no file" in api.answer(api.ask({"path": str(folder / "pipe.png")}))
    (folder / "<b>x.png").write_bytes(b"no image")
    assert "&lt;b&gt;x.png cannot be read as an image" in api.answer(api.ask({"path": str(folder / "<b>x.png")}))
    assert "block must be from 0 to 2, got 7" in api.answer(api.ask(ours, 7))
    with pytest.raises(urllib.error.HTTPError) as refused:
        api.upload(bytes(64 * 2**20 + 1))
    assert refused.value.code == 413
    assert "class map of" in api.answer(api.ask(ours))  # none of these block other requests


def test_a_slow_image_holds_up_nobody(monkeypatch, tmp_path):
    pytest.importorskip("gradio")
    from vim.demo.app import page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    done = threading.Event()

    class Stub:
        blocks, features = 0, None

        def __call__(self, file, block):
            if Path(file).name == "slow.png":
                done.wait()
            raise DataError(f"{Path(file).name} is read")

    app = page(Stub(), "stub")
    try:
        api = Api(app.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)[1])
        slow = api.ask(api.upload(b"x", "slow.png"))
        assert "quick.png is read" in api.answer(api.ask(api.upload(b"x", "quick.png")))
        done.set()
        assert "slow.png is read" in api.answer(slow)
    finally:
        done.set()
        app.close()


@pytest.fixture
def browser_page():
    """A page in headless Chromium: the installed one, or playwright's."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        path = shutil.which("chromium") or shutil.which("google-chrome") or running.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no chromium")
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(0)  # pytest has a limit
        yield page
        browser.close()


@pytest.fixture
def uploads(tmp_path):
    """Temporary folder of the running tool, where its folder of uploads is."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    return folder


@pytest.fixture
def url(setting, uploads):
    """Address of the running tool."""
    pytest.importorskip("gradio")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--port", str(port)]
    command += ["--model", str(setting / "run"), "--features", str(setting / "features")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(uploads)}
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said = []
        while not said or f"http://127.0.0.1:{port}/" not in said[-1]:
            said.append(process.stdout.readline())
            assert said[-1], "".join(said)  # empty: the tool has ended
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        outputs(process)
    assert not list(uploads.glob("vim-demo-*"))


def drop(page, file: Path) -> None:
    """Drop a file on the zone with the browser's drop event."""
    build = "bytes => { const t = new DataTransfer();" + (
        "t.items.add(new File([new Uint8Array(bytes)], 'dropped.png', {type: 'image/png'})); return t }"
    )
    data = page.evaluate_handle(build, list(file.read_bytes()))
    page.get_by_text("Drop Image Here").dispatch_event("drop", {"dataTransfer": data})


def test_the_page_in_a_browser(setting, url, browser_page, tmp_path):
    page = browser_page
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    for name in "bc":
        drop(page, setting / "val" / name / ("1.png" if name == "b" else "2.png"))
        page.get_by_text(f"class map of “{name}”").wait_for()
        assert page.get_by_test_id("label-output-value").inner_text().strip() == name
        images = page.locator(".figures img")
        assert images.count() == 6 + 8
        assert all(images.nth(i).evaluate("image => image.complete && image.naturalWidth > 0") for i in range(14))
        assert page.locator("figcaption").all_inner_texts()[6] == f"{name} (1.000)"
        before = images.nth(1).get_attribute("src")
        page.get_by_role("spinbutton").fill("0" if name == "b" else "1")
        changed = "before => { const i = document.querySelectorAll('.figures img')[1]; return i && i.src != before }"
        page.wait_for_function(changed, arg=before)
        page.get_by_label("Remove Image").click()
        images.first.wait_for(state="detached")
    (tmp_path / "broken.png").write_bytes(b"no image")
    drop(page, tmp_path / "broken.png")
    page.get_by_text("dropped.png cannot be read as an image").wait_for()
    assert page.locator(".figures img").count() == 0
    outside = [address for address in asked if not address.startswith((url, "data:", "blob:"))]
    assert not outside  # the page works without a network
