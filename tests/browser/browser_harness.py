"""What the browser tests share: the tools they need, models built once, the drivers in Node.

The drivers (run.mjs, page.mjs, dawn.mjs) take a request as JSON and answer in JSON; what the answer
must be is said in Python, with the `cpu` library or numpy as the reference.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_models import save_checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WEB = ROOT / "examples" / "web"
WEB_LLM = WEB / "node_modules" / "@mlc-ai" / "web-llm" / "lib" / "index.js"
TINY_CHECKPOINT = ROOT / "examples" / "tiny_model"
SIZES = {"context_window_size": 512, "prefill_chunk_size": 64, "max_batch_size": 1}

BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def require(found: Any, what: str) -> Any:
    """`found`; without it the test skips, or fails where MLC_COMPILE_REQUIRE_BROWSER is set."""
    if not found:
        if os.environ.get("MLC_COMPILE_REQUIRE_BROWSER"):
            pytest.fail(f"{what}, and MLC_COMPILE_REQUIRE_BROWSER is set")
        pytest.skip(what)
    return found


def chromium() -> str:
    """The browser: $MLC_COMPILE_CHROMIUM or the first of BROWSERS."""
    named = os.environ.get("MLC_COMPILE_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    return str(require(found, "there is no Chromium (Debian: chromium)"))


def swiftshader() -> Path:
    """The Vulkan driver description of Chromium's software adapter."""
    browser = Path(chromium()).resolve()
    folders = (browser.parent, Path("/usr/lib/chromium"), Path("/opt/google/chrome"))
    files = (folder / "vk_swiftshader_icd.json" for folder in folders)
    return Path(require(next(filter(Path.is_file, files), None), "Chromium has no SwiftShader"))


def node() -> str:
    """Node 20 or newer."""
    found = require(shutil.which("node"), "there is no node (20 or newer)")
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    major = int(version.lstrip("v").split(".")[0])
    require(major >= 20, f"node is {version.strip()}, and 20 is needed")
    return str(found)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time: xdist runs several."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def install_npm_packages() -> None:
    """`npm ci` in examples/web and here, where what is installed is not what the lock file says."""
    for folder in (WEB, HERE):
        stamp = folder / "node_modules" / ".installed"
        lock = (folder / "package-lock.json").read_text()
        with locked(folder / "node_modules.lock"):
            if stamp.is_file() and stamp.read_text() == lock:
                continue
            npm = require(shutil.which("npm"), "there is no npm")
            done = subprocess.run(
                [npm, "ci", "--ignore-scripts"], cwd=folder, capture_output=True, text=True
            )
            require(done.returncode == 0, f"npm ci failed in {folder}: {done.stderr[-600:]}")
            stamp.write_text(lock)


def drive(
    script: str, request: Mapping[str, Any], seconds: int, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The answer of a driver, which is killed after `seconds`."""
    done = subprocess.run(
        [node(), str(HERE / script)],
        input=json.dumps({**request, "seconds": seconds}),
        capture_output=True,
        text=True,
        timeout=seconds + 30,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def drive_browser(script: str, request: Mapping[str, Any], seconds: int) -> dict[str, Any]:
    """`drive`, with the browser's path in the request."""
    return drive(script, {"chromium": chromium(), **request}, seconds)


def run_steps(
    url: str, steps: Sequence[Mapping[str, Any]], seconds: int, **more: Any
) -> list[dict[str, Any]]:
    """The answers of run.mjs. Nothing but the local server may have been asked for anything."""
    answer = drive_browser("run.mjs", {"url": url, "steps": list(steps), **more}, seconds)
    assert answer["strangers"] == []
    found: list[dict[str, Any]] = answer["steps"]
    return found


# ---------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class WebModel:
    """A directory of parameters with model.wasm and, for comparison, model.so in it."""

    checkpoint: Path
    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def wasm(self) -> Path:
        return self.directory / "model.wasm"

    @property
    def cpu(self) -> Path:
        return self.directory / "model.so"


def command(*words: str | Path) -> str:
    """Run mlc_compile in a process of its own; its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "mlc_compile.cli", *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, (words, done.stdout[-1500:], done.stderr[-3000:])
    return done.stdout


def convert(checkpoint: Path, scheme: str, out: Path) -> None:
    """Parameters and configuration, as the commands make them."""
    common = (checkpoint, "--quantization", scheme, "-o", out)
    command("convert_weight", *common)
    sizes = [w for k, v in SIZES.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    command("gen_config", *common, *sizes, "--conv-template", "raw")


def compile_web(directory: Path) -> None:
    """model.wasm."""
    command("compile", directory, "--target", "webgpu", "-o", directory / "model.wasm")


def random_checkpoint(path: Path) -> Path:
    """Random weights; query groups of four, head size 64, norms on q and k, untied head."""
    return save_checkpoint(
        path,
        "qwen3",
        seed=5,
        hidden_size=128,
        head_dim=64,
        num_attention_heads=8,
        num_key_value_heads=2,
    )


def make_tiny(out: Path) -> WebModel:
    """The bundled trained model: q4f32_1, head size 64, tied head."""
    convert(TINY_CHECKPOINT, "q4f32_1", out)
    compile_web(out)
    command("compile", out, "-o", out / "model.so")
    return WebModel(TINY_CHECKPOINT, out)


def make_random(out: Path) -> WebModel:
    """Random weights that are not quantised."""
    checkpoint = random_checkpoint(out.with_name(f"{out.name}-checkpoint"))
    convert(checkpoint, "q0f32", out)
    compile_web(out)
    command("compile", out, "-o", out / "model.so")
    return WebModel(checkpoint, out)


def make_half(out: Path) -> WebModel:
    """16-bit floats, which the software adapter lacks."""
    convert(TINY_CHECKPOINT, "q4f16_1", out)
    compile_web(out)
    return WebModel(TINY_CHECKPOINT, out)


MAKERS: Mapping[str, Callable[[Path], WebModel]] = {
    "tiny": make_tiny,
    "random": make_random,
    "half": make_half,
}


def built(name: str, folder: Path) -> WebModel:
    """A model of MAKERS below `folder`, made by the first process that asks for it."""
    out, done = folder / name, folder / f"{name}.done"
    with locked(folder / f"{name}.lock"):
        if not done.is_file():
            MAKERS[name](out)
            done.touch()
    checkpoint = folder / f"{name}-checkpoint"
    return WebModel(checkpoint if checkpoint.is_dir() else TINY_CHECKPOINT, out)


# ---------------------------------------------------------------------------------------------
# The server of examples/web


def load_server_module() -> ModuleType:
    """examples/web/serve.py."""
    spec = importlib.util.spec_from_file_location("web_example_serve", WEB / "serve.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def served(
    *models: Path | tuple[Path, Path], manifest: bool = True, port: int = 0
) -> Iterator[str]:
    """The address of a server of these directories, or (directory, library)."""
    serve = load_server_module()
    opened = [
        serve.Model.open(*model) if isinstance(model, tuple) else serve.Model.open(model, None)
        for model in models
    ]
    server = serve.Server(serve.name_models(opened), port, manifest=manifest, quiet=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def shared_json(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, made by the first process of this run that asks for it."""
    file = folder / f"{name}.json"
    with locked(folder / f"{name}.json.lock"):
        if not file.is_file():
            data = json.dumps(make())
            file.write_text(data)
    return json.loads(file.read_text())
