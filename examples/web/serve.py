#!/usr/bin/env python3
"""Serves the chat page and compiled models to browsers on this machine.

    python examples/web/serve.py DIR [DIR ...] [--lib MODEL.wasm ...] [--port 8000]

- A DIR is what convert_weight and gen_config wrote, flat; the library is DIR's one *.wasm, or the
  --lib in the same place of the list.
- /models.json lists the models with web-llm's model records, made from the library's `_metadata`.
- /models/ID/resolve/VERSION/FILE maps web-llm's layout onto DIR. VERSION is a hash of the files,
  since web-llm keeps what it has fetched by URL for ever: what was compiled anew has a new URL.
- Nothing else is readable: the page's own files, one file of npm's @mlc-ai/web-llm, and the files
  of a model, all by exact name. It listens on the loopback interface only and refuses the host
  names of others (DNS rebinding).

Only Python's standard library is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import threading
import webbrowser
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
HOST = "127.0.0.1"
WEB_LLM = HERE / "node_modules" / "@mlc-ai" / "web-llm" / "lib" / "index.js"

PAGE = {
    "/": HERE / "index.html",
    "/favicon.svg": HERE / "favicon.svg",
    "/style.css": HERE / "style.css",
    **{
        f"/{name}.js": HERE / f"{name}.js"
        for name in ("app", "device", "engine", "markdown", "speak", "worker")
    },
    "/web-llm.js": WEB_LLM,
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json; charset=utf-8",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
    ".bin": "application/octet-stream",
}
# Isolation lets the page measure its memory. 'unsafe-eval' would let scripts make scripts; WASM
# needs only its own permission. data: is how web-llm carries the tokenizer's WASM.
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; "
    "connect-src 'self' data:; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
}
CHAT_CONFIG = "mlc-chat-config.json"
MODEL_MANIFEST = "mlc-model-manifest.json"
TENSOR_CACHE = "tensor-cache.json"
LIBRARY = "model.wasm"  # its name in URLs, whatever the file is called
METADATA_START = b'{"active_vocab_size":'  # its keys are sorted
SHARD = re.compile(r"params_shard_\d+\.bin")
# Files up to this size enter the version by content, larger ones by size and time of change.
HASHED = 16 << 20


class UsageError(Exception):
    """What is wrong with what was asked for; one line."""


def library_metadata(data: bytes) -> dict[str, Any]:
    """`_metadata` of a library of mlc_compile, which keeps it as one string; {} if it has none."""
    at = -1
    while (at := data.find(METADATA_START, at + 1)) >= 0:
        text = data[at : data.find(b"\0", at) % (len(data) + 1)].decode("latin-1")
        try:
            found, _ = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("mlc_compile"), dict):
            return found
    return {}


@lru_cache(maxsize=64)
def _digest(path: Path, size: int, changed: int) -> str:
    """Of a file as it is now; the arguments beside `path` say when it is another one."""
    if size > HASHED:
        return f"{size}:{changed}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


@lru_cache(maxsize=16)
def _metadata(path: Path, size: int, changed: int) -> dict[str, Any]:
    return library_metadata(path.read_bytes())


@dataclass(frozen=True)
class Model:
    """One directory of parameters with its library."""

    name: str
    directory: Path
    library: Path

    @classmethod
    def open(cls, directory: Path, library: Path | None) -> Model:
        """Raises UsageError when a part is missing."""
        directory = directory.resolve()
        for needed, command in ((TENSOR_CACHE, "convert_weight"), (CHAT_CONFIG, "gen_config")):
            if not (directory / needed).is_file():
                raise UsageError(f"{directory} has no {needed}: run mlc_compile {command}")
        if library is None:
            found = sorted(directory.glob("*.wasm"))
            if len(found) != 1:
                many = "no" if not found else f"{len(found)} *.wasm files and not one"
                raise UsageError(
                    f"{directory} has {many} library: run mlc_compile compile {directory} "
                    f"--target webgpu -o {directory / LIBRARY}, or name one with --lib"
                )
            library = found[0]
        if not library.is_file():
            raise UsageError(f"there is no library {library}")
        if library.read_bytes()[:4] != b"\0asm":
            raise UsageError(f"{library} is not a WebAssembly module: compile for webgpu")
        return cls(directory.name, directory, library.resolve())

    def files(self) -> dict[str, Path]:
        """What browsers may read, by the name in the URL."""
        config = json.loads((self.directory / CHAT_CONFIG).read_text(encoding="utf-8"))
        names = [CHAT_CONFIG, TENSOR_CACHE, MODEL_MANIFEST]
        names += [n for n in config.get("tokenizer_files", []) if "/" not in n and "\\" not in n]
        names += [p.name for p in self.directory.iterdir() if SHARD.fullmatch(p.name)]
        found = {n: self.directory / n for n in names if (self.directory / n).is_file()}
        return found | {LIBRARY: self.library}

    def version(self) -> str:
        """A hash over all files that changes when one of them does."""
        total = hashlib.sha256()
        for name, path in sorted(self.files().items()):
            state = path.stat()
            total.update(f"{name}={_digest(path, state.st_size, state.st_mtime_ns)}\n".encode())
        return total.hexdigest()[:16]

    def metadata(self) -> dict[str, Any]:
        """The library's own description."""
        state = self.library.stat()
        return _metadata(self.library, state.st_size, state.st_mtime_ns)

    def entry(self, model_id: str, *, manifest: bool = True) -> dict[str, Any]:
        """web-llm's record of the model, with relative URLs, and what the page shows about it.

        manifest: whether web-llm is to check the two halves of the package manifest.
        """
        files, metadata = self.files(), self.metadata()
        config = json.loads((self.directory / CHAT_CONFIG).read_text(encoding="utf-8"))
        artifact: Mapping[str, Any] = metadata.get("artifact", {})
        resources: Mapping[str, Any] = artifact.get("resources", {})
        base = f"/models/{model_id}/resolve/{self.version()}/"
        record: dict[str, Any] = {
            "model_id": model_id,
            "model": base,
            "model_lib": base + LIBRARY,
            "required_features": list(resources.get("required_features", [])),
        }
        if manifest and artifact and MODEL_MANIFEST in files:
            record["model_manifest"] = MODEL_MANIFEST
        if memory := resources.get("estimated_device_memory_bytes"):
            record["vram_required_MB"] = round(memory / 1e6, 2)
        if binding := resources.get("max_storage_buffer_binding_size"):
            record["buffer_size_required_bytes"] = binding
        weights = sum(p.stat().st_size for n, p in files.items() if SHARD.fullmatch(n))
        return {
            "record": record,
            "about": {
                "name": self.name,
                "model_type": config.get("model_type"),
                "quantization": config.get("quantization"),
                "context_window_size": config.get("context_window_size"),
                "sliding_window_size": config.get("sliding_window_size"),
                "prefill_chunk_size": config.get("prefill_chunk_size"),
                "temperature": config.get("temperature"),
                "top_p": config.get("top_p"),
                "system_message": config.get("conv_template", {}).get("system_message", ""),
                "takes_system": "{system_message}"
                in config.get("conv_template", {}).get("system_template", ""),
                "weights_bytes": weights,
                "library_bytes": files[LIBRARY].stat().st_size,
                "memory_plan": metadata.get("mlc_compile", {}).get("memory_plan"),
            },
        }


def name_models(models: Iterable[Model]) -> dict[str, Model]:
    """The models by an id that is plain in a URL and unique."""
    named: dict[str, Model] = {}
    for model in models:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", model.name).strip(".-") or "model"
        name, count = plain, 1
        while name in named:
            count += 1
            name = f"{plain}-{count}"
        named[name] = model
    return named


class Server(ThreadingHTTPServer):
    """The page and `models` on the loopback interface. port: 0 for any free one."""

    daemon_threads = True

    def __init__(
        self, models: Mapping[str, Model], port: int, *, manifest: bool = True, quiet: bool = False
    ) -> None:
        self.models = models
        self.manifest = manifest
        self.quiet = quiet
        super().__init__((HOST, port), Handler)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of the files that Server lists."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "mlc-compile-chat"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: Any) -> None:
        if not self.server.quiet:
            super().log_message(format, *args)

    def _answer(self, *, body: bool) -> None:
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if host not in (HOST, "localhost"):
            self._fail(HTTPStatus.FORBIDDEN, "this server answers to this machine only")
            return
        path = unquote(urlsplit(self.path).path)
        try:
            if path == "/models.json":
                self._send_bytes(json.dumps(self._list()).encode(), TYPES[".json"], body=body)
            elif path in PAGE:
                self._send_file(PAGE[path], body=body, keep=False)
            elif path.startswith("/models/"):
                self._send_model(path, body=body)
            else:
                self._fail(HTTPStatus.NOT_FOUND, "no such file")
        except OSError as error:
            # A page that is closed while loading ends its connection in the middle of a file.
            if isinstance(error, BrokenPipeError | ConnectionError):
                self.close_connection = True
                return
            self._fail(HTTPStatus.NOT_FOUND, f"cannot be read: {error.strerror}")

    def _list(self) -> dict[str, Any]:
        return {
            "models": [
                model.entry(name, manifest=self.server.manifest)
                for name, model in self.server.models.items()
            ]
        }

    def _send_model(self, path: str, *, body: bool) -> None:
        match = re.fullmatch(r"/models/([^/]+)/resolve/([^/]+)/([^/]+)", path)
        model = self.server.models.get(match[1]) if match else None
        if match is None or model is None:
            self._fail(HTTPStatus.NOT_FOUND, "no such model")
        elif match[2] != model.version():
            self._fail(HTTPStatus.GONE, "the model has changed on disk: reload the page")
        elif (file := model.files().get(match[3])) is None:
            self._fail(HTTPStatus.NOT_FOUND, f"the model has no {match[3]}")
        else:
            self._send_file(file, body=body, keep=True)

    def _send_file(self, path: Path, *, body: bool, keep: bool) -> None:
        with path.open("rb") as file:
            size = path.stat().st_size
            kind = TYPES.get(path.suffix, "application/octet-stream")
            self._headers(HTTPStatus.OK, kind, size, keep=keep)
            if body:
                shutil.copyfileobj(file, self.wfile, 1 << 20)

    def _send_bytes(self, data: bytes, kind: str, *, body: bool) -> None:
        self._headers(HTTPStatus.OK, kind, len(data), keep=False)
        if body:
            self.wfile.write(data)

    def _headers(self, status: HTTPStatus, kind: str, size: int, *, keep: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        # web-llm has a cache of its own, so that a model's files need no second copy.
        self.send_header("Cache-Control", "no-store" if keep else "no-cache")
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def _fail(self, status: HTTPStatus, reason: str) -> None:
        data = (reason + "\n").encode()
        self._headers(status, "text/plain; charset=utf-8", len(data), keep=False)
        if self.command != "HEAD":
            self.wfile.write(data)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").strip().splitlines()[0]
    parser = argparse.ArgumentParser(prog="serve.py", description=summary)
    parser.add_argument(
        "directories", nargs="+", type=Path, metavar="DIR", help="what convert_weight wrote"
    )
    parser.add_argument(
        "--lib",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="the library of the DIR in the same place of the list (default: DIR's *.wasm)",
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    parser.add_argument("--open", action="store_true", help="open the page in the default browser")
    parser.add_argument(
        "--no-manifest", action="store_true", help="leave the package manifest out of the records"
    )
    parser.add_argument("--quiet", action="store_true", help="don't print requests")
    return parser.parse_args(words)


def make_server(options: argparse.Namespace) -> Server:
    """Raises UsageError when something is missing."""
    if not WEB_LLM.is_file():
        raise UsageError(f"@mlc-ai/web-llm is not installed: run `npm ci` in {HERE}")
    if len(options.lib) > len(options.directories):
        raise UsageError("there are more --lib than directories")
    libraries = options.lib + [None] * (len(options.directories) - len(options.lib))
    models = [
        Model.open(directory, library)
        for directory, library in zip(options.directories, libraries, strict=True)
    ]
    try:
        return Server(
            name_models(models),
            options.port,
            manifest=not options.no_manifest,
            quiet=options.quiet,
        )
    except OSError as error:
        reason = f"port {options.port} cannot be used: {error.strerror}"
        raise UsageError(f"{reason}; name another with --port") from error


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    try:
        server = make_server(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{server.url}  ({', '.join(server.models)}; Ctrl-C ends it)", flush=True)
    if options.open:
        threading.Timer(0.3, webbrowser.open, [server.url]).start()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
