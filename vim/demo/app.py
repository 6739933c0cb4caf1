"""The page. gradio is optional, and imported only here."""

import base64
import html
import io
from typing import Any

from PIL import Image

from vim.data import DataError
from vim.training.errors import ConfigError

from .config import DemoConfig
from .predict import Captioned, Predictor

TOP = 5
CSS = """
.dropped img { width: 100%; height: 100%; object-fit: contain; }
.html-container { padding: 0 !important; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--wide), 1fr)); gap: 14px; }
.figures figure { margin: 0; }
.figures img { width: 100%; border-radius: 4px; }
.figures figcaption { font-size: 13px; line-height: 1.3; margin-top: 4px; text-align: center; }
"""


def serve(config: DemoConfig) -> None:
    """Show the page until Ctrl-C.

    Raises: ConfigError, DataError, with a message for the user.
    """
    import gradio as gr

    predictor = Predictor(config)
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
            footer_links=[],
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none to fetch
            css=CSS,
        )
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.host}, port {config.port}; choose another --port") from error
    print(f"{config.model}: {url} (Ctrl-C ends it)\nweights: {predictor.weights}", flush=True)
    app.block_thread()


def page(predictor: Predictor, name: str) -> Any:
    """A gradio app of one page, not yet started."""
    import gradio as gr

    if predictor.blocks:
        about_maps = "Bright is much; each map has its own scale. Blocks count from 0."
    else:
        about_maps = f"{name} is no Vision Mamba (vim_*): it has no scan to look into."
    # Uploaded images go within the hour, and when the server ends.
    with gr.Blocks(analytics_enabled=False, title=name, fill_width=True, delete_cache=(600, 3600)) as app:
        gr.Markdown(f"## {name}\nDrop an image to see what the model makes of it.")
        message = gr.Markdown(visible=False)
        with gr.Row():
            image = gr.Image(label="your image", sources=["upload", "clipboard"], height=300, elem_classes="dropped")
            label = gr.Label(label="classes", num_top_classes=TOP)
        with gr.Row():
            gr.Markdown(f"### Maps\n{about_maps}")
            last = max(predictor.blocks - 1, 0)
            block = gr.Slider(0, max(last, 1), last, step=1, label="block", visible=last > 0)
        maps = gr.HTML()
        if predictor.features is not None:
            where = f"{len(predictor.features)} images in {predictor.features.manifest['images']}"
            gr.Markdown(f"### Nearest neighbours\nOf {where}: class, and cosine of the features ({predictor.column}).")
        neighbours = gr.HTML()

        def answer(upload: dict[str, Any] | None, at: int) -> list[Any]:
            if upload is None:
                return [gr.Markdown(visible=False), None, "", ""]
            try:
                found = predictor(upload["path"], int(at))
            except DataError as error:
                return [gr.Markdown(f"**{error}**", visible=True), None, "", ""]
            shown = figures(found.maps, 165), figures(found.neighbours, 120)
            return [gr.Markdown(visible=False), found.classes, *shown]

        # One event, so that gradio runs one at a time: maps hang hooks on the model. And without gradio's reading of
        # the file, which turns and converts images as validation does not, and has no word for one that it cannot read.
        outputs = [message, label, maps, neighbours]
        gr.on([image.change, block.change], answer, [image, block], outputs, preprocess=False)
    return app


def figures(images: list[Captioned], width: int) -> str:
    """HTML of images with captions, each at least so many pixels wide."""
    parts = [
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{_png(image)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for image, caption in images
    ]
    return f'<div class="figures" style="--wide: {width}px">{"".join(parts)}</div>'


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()
