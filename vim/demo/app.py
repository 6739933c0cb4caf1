"""The web page. gradio is optional: imported only here."""

import base64
import html
import io
import os
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from vim.console.errors import ConfigError
from vim.console.escapes import visible
from vim.data import DataError

from .config import DemoConfig
from .predict import MAX_BYTES, Captioned, Predictor

TOP = 5
AT_ONCE, WAITING = 4, 64  # requests: running, queued
CSS = """
.dropped img { width: 100%; height: 100%; object-fit: contain; }
.html-container { padding: 0 !important; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--wide), 1fr)); gap: 14px; }
.figures figure { margin: 0; }
.figures img { width: 100%; border-radius: 4px; }
.figures figcaption { font-size: 13px; line-height: 1.3; margin-top: 4px; text-align: center; }
"""


def serve(config: DemoConfig) -> None:
    """Serve the page until Ctrl-C.

    Raises: ConfigError, DataError, with a message for the user.
    """
    predictor = Predictor(config)
    # gradio serves all files in its upload folder, and by default shares the folder with other apps and users.
    with tempfile.TemporaryDirectory(prefix="vim-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        _serve(predictor, config)


def _serve(predictor: Predictor, config: DemoConfig) -> None:
    import gradio as gr

    app = page(predictor, config.model)
    try:
        _, url, _ = app.launch(
            server_name=config.host,
            server_port=config.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            run_history=False,
            max_file_size=MAX_BYTES,
            footer_links=[],
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # no web fonts
            css=CSS,
        )
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.host}, port {config.port}; choose another --port") from error
    about = f"{visible(config.model)}: {url} (Ctrl-C to stop)"
    print(f"{about}\nweights: {visible(str(predictor.weights))}", flush=True)
    app.block_thread()


def page(predictor: Predictor, name: str) -> Any:
    """The page as a gradio app, not yet started."""
    import gradio as gr

    if predictor.blocks:
        about_maps = "Bright means high. Each map has its own scale. Block 0 is the first."
    else:
        about_maps = f"{name} is no Vision Mamba: it has no scans to show."
    # Check every 10 minutes for uploads older than an hour, and delete them. All go when the server ends.
    with gr.Blocks(analytics_enabled=False, title=visible(name), fill_width=True, delete_cache=(600, 3600)) as app:
        _section("h2", name, "Drop an image to classify it.")
        message = gr.HTML()
        with gr.Row():
            image = gr.Image(label="your image", sources=["upload", "clipboard"], height=300, elem_classes="dropped")
            _refuse_urls(image)
            label = gr.Label(label="classes", num_top_classes=TOP)
        with gr.Row():
            _section("h3", "Maps", about_maps)
            last = max(predictor.blocks - 1, 0)
            block = gr.Slider(0, max(last, 1), last, step=1, label="block", visible=last > 0)
        maps = gr.HTML()
        if predictor.features is not None:
            where = f"{len(predictor.features)} images in {predictor.features.manifest['images']}"
            about = f"Among {where}: class and cosine similarity of the features ({predictor.column})."
            _section("h3", "Nearest neighbours", about)
        neighbours = gr.HTML()

        def answer(upload: dict[str, Any] | None, at: int) -> list[Any]:
            if upload is None:
                return ["", None, "", ""]
            try:
                found = predictor(uploaded(upload["path"], Path(image.GRADIO_CACHE)), at)
            except DataError as error:
                return [f"<b>{html.escape(visible(str(error)))}</b>", None, "", ""]
            return ["", found.classes, figures(found.maps, 165), figures(found.neighbours, 120)]

        # Without gradio's preprocessing. It rotates and converts images, which validation does not, gives no message
        # for unreadable files, and does not check the location of a file that a request names by path.
        outputs = [message, label, maps, neighbours]
        gr.on([image.change, block.change], answer, [image, block], outputs, preprocess=False)
    return app.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE)


def uploaded(path: str | None, folder: Path) -> Path:
    """The file at a path, with links resolved.

    Raises: DataError unless it lies in the folder.
    """
    try:
        file = Path(path or "").resolve(strict=True)
        inside = file.is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # no such file, circular links, a null byte
        inside = False
    if not inside:  # the message must not reveal whether the file exists
        raise DataError("this image is not, or no longer, among the uploads; drop it again")
    return file


def _refuse_urls(image: Any) -> None:
    """Make an image component refuse URLs: the server would download a file of any size from them.

    It is patched in place because gradio writes a file for each subclass of a component.
    """
    import gradio as gr

    keep = image.async_move_resource_to_block_cache

    async def keep_file(path: str | Path | None) -> str | None:
        if str(path).lower().startswith(("http:", "https:")):
            raise gr.Error("this page takes files, not URLs", print_exception=False)
        return await keep(path)

    image.async_move_resource_to_block_cache = keep_file


def _section(heading: str, title: str, text: str) -> None:
    """A heading and a line, escaped: gr.Markdown would interpret names as markup."""
    import gradio as gr

    title, text = (html.escape(visible(part)) for part in (title, text))
    gr.HTML(f"<{heading}>{title}</{heading}><p>{text}</p>")


def figures(images: list[Captioned], width: int) -> str:
    """HTML of images with captions, each at least `width` pixels wide."""
    parts = [
        f'<figure><img alt="{caption}" src="data:image/png;base64,{_png(image)}">'
        f"<figcaption>{caption}</figcaption></figure>"
        for image, caption in ((image, html.escape(visible(caption))) for image, caption in images)
    ]
    return f'<div class="figures" style="--wide: {width}px">{"".join(parts)}</div>'


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()
