"""What `mkdocs build` adds to the pages in docs/: the pages at the root of the repository and the API reference.

All pages link to each other by their place in the repository, so that the links also work on a code host. The site
keeps those places, except that docs/ is its root.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Pages and pictures outside docs/ that belong to the site.
OUTSIDE = (
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "kernels/README.md",
    "kernels/LOG.md",
    *(f"kernels/benchmarks/results/{name}.md" for name in ("cpu_scan", "gpu", "sequence_mixing")),
    "kernels/benchmarks/results/end_to_end.png",
)
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
# In a docstring's text, outside backticks: a placeholder, as <folder>, or the middle of what Markdown reads as a link.
NOT_MARKUP = re.compile(r"(`[^`]*`)|<(?=/?\w)|\](?=\[)")


class PlainDocstrings(griffe.Extension):
    """Docstrings are plain text: no placeholder of theirs is markup. mkdocs.yml names this class."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = NOT_MARKUP.sub(_escape, obj.docstring.value)


def _escape(match: re.Match[str]) -> str:
    return match[1] or {"<": "&lt;", "]": "\\]"}[match[0]]


def reference_pages() -> dict[str, str]:
    """Pages of the API reference by module: packages, and the modules of a package that exports little itself."""
    pages = {}
    kernels = ["vim_kernels", "vim_kernels.mamba_ssm"]
    for package in [*kernels, *sorted(f"vim.{path.parent.name}" for path in (ROOT / "vim").glob("*/__init__.py"))]:
        modules = [package] if package != "vim.models" and _public_names(package) else _modules(package)
        for module in modules:
            if names := _public_names(module):
                about = ast.get_docstring(ast.parse(_source(module).read_text())) or ""
                pages[module] = "\n\n".join([f"# {module}", about, *(f"::: {name}" for name in names)]) + "\n"
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the API reference into the navigation."""
    pages = [{module: f"reference/{module}.md"} for module in reference_pages()]
    config.nav = [*(config.nav or []), {"API reference": pages}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and those of the API reference."""
    for path in OUTSIDE:
        if (ROOT / path).exists():
            files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    for module, text in reference_pages().items():
        files.append(File.generated(config, f"reference/{module}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between places in the repository into links between pages; unlink what is not on the site."""
    here = page.file.src_uri

    def link(match: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(posixpath.dirname(_in_repository(here)), match["target"]))
        target = files.get_file_from_path("index.md" if place == "README.md" else place.removeprefix("docs/"))
        if target is None:
            return match["text"] if (ROOT / place).exists() else match[0]
        url = posixpath.relpath(target.src_uri, posixpath.dirname(here) or ".")
        return f"{match['picture']}[{match['text']}]({url}{match['anchor'] or ''})"

    return LINK.sub(link, markdown)


def _in_repository(uri: str) -> str:
    return uri if uri in OUTSIDE else f"docs/{uri}"


def _source(module: str) -> Path:
    path = ROOT / ("kernels" if module.startswith("vim_kernels") else ".") / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _modules(package: str) -> list[str]:
    return sorted(f"{package}.{path.stem}" for path in _source(package).parent.glob("[!_]*.py"))


def _public_names(module: str) -> list[str]:
    """Full names, each with the module that defines it: of a package all that its __init__.py imports, of a module its
    documented classes and functions."""
    names = []
    for node in ast.parse(_source(module).read_text()).body:
        if isinstance(node, ast.ImportFrom) and _source(module).name == "__init__.py":
            origin = f"{module}.{node.module}" if node.level else node.module
            names += [f"{origin}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            names.append(f"{module}.{node.name}")
    public = [name for name in names if not name.rpartition(".")[2].startswith("_")]
    return sorted(public, key=lambda name: name.rpartition(".")[2].lower())
