"""The example's server: the layout that web-llm wants, and nothing else readable. No browser."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser_harness import WEB, load_server_module, served

serve = load_server_module()
METADATA = {
    "active_vocab_size": 7,
    "artifact": {
        "resources": {
            "estimated_device_memory_bytes": 123_456_789,
            "max_storage_buffer_binding_size": 4096,
            "required_features": ["shader-f16"],
        }
    },
    "mlc_compile": {"memory_plan": {"total": 123_456_789}},
    "params": [],
}
WASM = b"\0asm\1\0\0\0" + b'{"active_vocab_size":1}\0'  # something that only looks like it


def library(metadata: Any = METADATA) -> bytes:
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    return WASM + text.encode() + b"\x05\0more\0"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What a compiled model consists of, in a folder with other things."""
    folder = tmp_path / "a model (1)"
    folder.mkdir()
    config = {"quantization": "q4f16_1", "tokenizer_files": ["tokenizer.json", "../secret.json"],
              "conv_template": {"system_template": "{system_message}"}}  # fmt: skip
    (folder / "mlc-chat-config.json").write_text(json.dumps(config))
    for name in ("tensor-cache.json", "mlc-model-manifest.json", "tokenizer.json", "secret.json"):
        (folder / name).write_text(json.dumps({"I am": name}))
    (tmp_path / "secret.json").write_text("{}")
    (folder / "params_shard_0.bin").write_bytes(bytes(range(256)) * 5)
    (folder / "params_shard_0.bin.bak").write_bytes(b"old")
    (folder / "model.wasm").write_bytes(library())
    return folder


@pytest.fixture
def url(directory: Path) -> Iterator[str]:
    with served(directory) as address:
        yield address


def get(
    url: str, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """The path goes out as it is, dots included."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def entry(url: str) -> dict[str, Any]:
    status, _, data = get(url, "/models.json")
    assert status == 200
    (found,) = json.loads(data)["models"]
    return dict(found)


def test_the_record(url: str) -> None:
    found = entry(url)
    record = found["record"]
    assert record["model_id"] == "a-model-1"
    assert record["model"].startswith("/models/a-model-1/resolve/") and record["model"][-1] == "/"
    assert record["model_lib"] == f"{record['model']}model.wasm"
    assert record["model_manifest"] == "mlc-model-manifest.json"
    assert record["required_features"] == ["shader-f16"]
    assert record["vram_required_MB"] == 123.46
    assert record["buffer_size_required_bytes"] == 4096
    assert found["about"]["weights_bytes"] == 1280
    assert found["about"]["memory_plan"] == {"total": 123_456_789}


def test_no_manifest_where_there_is_none(directory: Path) -> None:
    with served(directory, manifest=False) as url:
        assert "model_manifest" not in entry(url)["record"]
    (directory / "mlc-model-manifest.json").unlink()
    with served(directory) as url:
        assert "model_manifest" not in entry(url)["record"]


@pytest.mark.parametrize("data", [WASM, WASM + b'{"active_vocab_size":[[[', library({"x": 1})])
def test_a_library_of_others_has_a_record_too(directory: Path, data: bytes) -> None:
    (directory / "model.wasm").write_bytes(data)
    with served(directory) as url:
        record = entry(url)["record"]
    assert record.keys() == {"model_id", "model", "model_lib", "required_features"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mlc-chat-config.json", "application/json"),
        ("tensor-cache.json", "application/json"),
        ("tokenizer.json", "application/json"),
        ("mlc-model-manifest.json", "application/json"),
        ("params_shard_0.bin", "application/octet-stream"),
        ("model.wasm", "application/wasm"),
    ],
)
def test_files_of_the_model(url: str, directory: Path, name: str, kind: str) -> None:
    path = entry(url)["record"]["model"] + name
    status, headers, data = get(url, path)
    assert status == 200 and data == (directory / name).read_bytes()
    assert headers["Content-Type"].split(";")[0] == kind
    status, headers, data = get(url, path, "HEAD")
    assert status == 200 and data == b"" and int(headers["Content-Length"]) > 0


@pytest.mark.browser
@pytest.mark.usefixtures("npm")
@pytest.mark.parametrize("path", sorted(serve.PAGE))
def test_files_of_the_page(url: str, path: str) -> None:
    status, headers, data = get(url, path)
    assert status == 200 and data
    assert headers["Content-Type"].split(";")[0] in ("text/html", "text/css", "text/javascript",
                                                     "image/svg+xml")  # fmt: skip
    # Isolation measures memory; no script or request of others is let through.
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_every_module_of_the_page_is_served() -> None:
    names = {f"/{p.name}" for p in WEB.glob("*.js")} | {"/style.css", "/favicon.svg"}
    assert names <= serve.PAGE.keys()
    for path in (*WEB.glob("*.js"), WEB / "index.html", WEB / "style.css"):
        text = path.read_text()
        assert "http://" not in text and "https://" not in text, f"{path.name}: only the server"


@pytest.mark.parametrize(
    "path",
    [
        "/serve.py", "/package.json", "/node_modules/x", "/..", "/../serve.py", "/%2e%2e/serve.py",
        "//etc/passwd", "/models", "/models/", "/models/a-model-1", "/models/a-model-1/resolve/",
        "/models/other/resolve/{version}/model.wasm",
        "/models/a-model-1/resolve/{version}/../../../../etc/passwd",
        "/models/a-model-1/resolve/{version}/..%2fsecret.json",
        "/models/a-model-1/resolve/{version}/%2e%2e%2fsecret.json",
        "/models/a-model-1/resolve/{version}/..%5csecret.json",
        "/models/a-model-1/resolve/{version}/secret.json",
        "/models/a-model-1/resolve/{version}/params_shard_0.bin.bak",
        "/models/a-model-1/resolve/{version}/params_shard_0.bin%00.json",
        "/models/a-model-1/resolve/{version}/",
    ],
)  # fmt: skip
def test_nothing_else_is_readable(url: str, path: str) -> None:
    version = entry(url)["record"]["model"].split("/")[-2]
    status, _, data = get(url, path.format(version=version))
    assert status == 404, data


def test_other_methods_and_other_hosts_are_refused(url: str) -> None:
    assert get(url, "/", "POST")[0] == 501
    assert get(url, "/models.json", Host="example.org")[0] == 403
    assert get(url, "/models.json", Host="localhost:1")[0] == 200
    assert url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("name", ["params_shard_0.bin", "model.wasm", "mlc-chat-config.json"])
def test_a_change_gives_new_addresses(url: str, directory: Path, name: str) -> None:
    before = entry(url)["record"]["model"]
    assert entry(url)["record"]["model"] == before
    data = (directory / name).read_bytes()
    (directory / name).write_bytes(
        data.replace(b"q4f16_1", b"q4f16_0") if name.endswith("json") else data[:-1] + b"!"
    )
    after = entry(url)["record"]["model"]
    assert after != before
    assert get(url, before + name)[0] == 410
    assert get(url, after + name)[0] == 200


def test_same_names_get_different_ids(directory: Path, tmp_path: Path) -> None:
    with served(directory, directory) as url:
        data = json.loads(get(url, "/models.json")[2])
    assert [m["record"]["model_id"] for m in data["models"]] == ["a-model-1", "a-model-1-2"]


@pytest.mark.browser
@pytest.mark.usefixtures("npm")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: (d / "tensor-cache.json").unlink(), "run mlc_compile convert_weight"),
        (lambda d: (d / "mlc-chat-config.json").unlink(), "run mlc_compile gen_config"),
        (lambda d: (d / "model.wasm").unlink(), "--target webgpu"),
        (lambda d: (d / "second.wasm").write_bytes(WASM), "2 *.wasm"),
        (lambda d: (d / "model.wasm").write_bytes(b"\x7fELF"), "not a WebAssembly module"),
    ],
)
def test_what_is_missing_is_named(directory: Path, change: Any, says: str) -> None:
    change(directory)
    done = subprocess.run(
        [sys.executable, str(WEB / "serve.py"), str(directory), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert says in done.stderr and len(done.stderr.splitlines()) == 1


def test_lock_files_name_no_registry() -> None:
    for folder in (WEB, Path(__file__).parent):
        lock = json.loads((folder / "package-lock.json").read_text())
        assert not [n for n, p in lock["packages"].items() if "resolved" in p]
        wanted = json.loads((folder / "package.json").read_text())["dependencies"]
        assert all(v[0].isdigit() for v in wanted.values()), "versions are pinned exactly"
