"""A web server on this machine with the faults that a real one may have, for the remote tests."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What the server has and how it behaves.

    Attributes:
        files: by path, such as "/model/config.json".
        ranges: whether it serves them.
        tags: whether it sends an ETag.
        conditional: whether it knows If-Match; otherwise it refuses any.
        cut: so many answers from now on end early.
        fail: so many answers from now on are "503 Service Unavailable".
        token: the query that every request must have.
        requests: (path, first, last) of the answered GETs; None, None for whole files.
    """

    files: dict[str, bytes]
    ranges: bool = True
    tags: bool = True
    conditional: bool = True
    cut: int = 0
    fail: int = 0
    token: str = ""
    requests: list[tuple[str, int | None, int | None]] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def sent(self) -> int:
        """Bytes of the ranges that were asked for."""
        return sum(last - first + 1 for _, first, last in self.requests if first is not None)


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """The site under `site.url`, http://127.0.0.1:PORT."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path, _, query = self.path.partition("?")
            data = site.files.get(path)
            if query != site.token:
                return self.refuse(403)
            if data is None:
                return self.refuse(404)
            with site.lock:
                failing, site.fail = site.fail > 0, max(0, site.fail - 1)
            if failing:
                return self.refuse(503)
            tag = f'"{hashlib.sha1(data).hexdigest()}"'
            condition = self.headers.get("If-Match", tag)
            if site.tags and (
                condition != tag
                or (with_body and not site.conditional and "If-Match" in self.headers)
            ):
                return self.refuse(412)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first = last = None
            body = data
            if wanted and site.ranges:
                first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
                body = data[first : last + 1]
            self.send_response(200 if first is None else 206)
            self.send_header("Content-Length", str(len(body)))
            if first is not None:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            if site.tags:
                self.send_header("ETag", tag)
            self.end_headers()
            if not with_body:
                return None
            with site.lock:
                cutting, site.cut = site.cut > 0, max(0, site.cut - 1)
                site.requests.append((path, first, last))
            if cutting:
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            else:
                self.wfile.write(body)
            return None

        def refuse(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
