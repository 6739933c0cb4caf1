"""Writers of tar and Parquet shards, and a local server with the API of the Hugging Face hub."""

import io
import json
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def parquet_table(contents: Sequence[bytes | None], labels: Sequence[int | None], classes: Sequence[str]) -> pa.Table:
    """A table with the columns and metadata that the datasets package writes."""
    images = pa.array([{"bytes": content, "path": "x.png"} for content in contents])
    features = {"image": {"_type": "Image"}, "label": {"names": list(classes), "_type": "ClassLabel"}}
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(
    files: Sequence[tuple[Path, int]], classes: Sequence[str], folder: Path, sizes: dict[str, int]
) -> None:
    """Write (image file, label) pairs in order to Parquet shards; sizes: rows by shard name."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = iter(files)
    for name, size in sizes.items():
        pairs = [next(todo) for _ in range(size)]
        table = parquet_table([path.read_bytes() for path, _ in pairs], [label for _, label in pairs], classes)
        pq.write_table(table, folder / name, row_group_size=3)
    assert next(todo, None) is None


class LocalHub(ThreadingHTTPServer):
    """Serves a folder as the data set org/name, by those parts of the hub's API that reading one takes.

    asked: paths that were asked for. failures: of so many files to come. commit: of the branch main. tags: commits by
    name.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.asked, self.failures, self.commit = folder, [], 0, "0123abcd" * 5
        self.tags: dict[str, str] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def do_GET(self) -> None:  # http.server calls it by this name
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        repository, commit = "/datasets/org/name", self.server.commit
        for tagged in self.server.tags.values():
            commit = tagged if f"/{tagged}" in path else commit
        revision = path.removeprefix(f"/api{repository}/revision/")
        if path == f"/api{repository}" or revision in ("main", commit, *self.server.tags):
            sha = self.server.tags.get(revision, commit)
            self._answer(json.dumps({"id": "org/name", "sha": sha}).encode())
        elif path.startswith(tree := f"/api{repository}/tree/{commit}"):
            self._answer(json.dumps(self._listing(self.server.folder / path.removeprefix(tree).strip("/"))).encode())
        elif path.startswith(files := f"{repository}/resolve/{commit}/") and not self.server.failures:
            self._answer((self.server.folder / path.removeprefix(files)).read_bytes())
        elif path.startswith(files):
            self.server.failures -= 1
            self.send_error(503)
        else:
            self.send_error(404)

    def _listing(self, folder: Path) -> list[dict]:
        return [
            {
                "type": "directory" if path.is_dir() else "file",
                "path": path.relative_to(self.server.folder).as_posix(),
                "size": path.stat().st_size,
                "oid": f"blob-{path.name}",
            }
            for path in sorted(folder.iterdir())
        ]

    def _answer(self, content: bytes) -> None:
        status = 200
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            content, status = content[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def local_hub(folder: Path) -> Iterator[LocalHub]:
    hub = LocalHub(folder)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
