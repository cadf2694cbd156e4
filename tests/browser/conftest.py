"""Fixtures of the browser tests; browser_harness.py says what they are made of."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser_harness import (
    WebModel,
    built,
    chromium,
    install_npm_packages,
    node,
    require,
    swiftshader,
)


@pytest.fixture(scope="session")
def web_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One folder for all processes of this run.

    MLC_COMPILE_BROWSER_FOLDER names one that outlives it, for work on the page and on these tests:
    models and answers that are there are not made again.
    """
    if kept := os.environ.get("MLC_COMPILE_BROWSER_FOLDER"):
        return Path(kept)
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "web"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def npm() -> None:
    """Node with the packages of examples/web and of these tests."""
    node()
    install_npm_packages()


@pytest.fixture(scope="session")
def browser(npm: None) -> str:
    """Chromium and what drives it."""
    return chromium()


@pytest.fixture(scope="session")
def dawn(npm: None) -> dict[str, str]:
    """The environment in which Dawn finds the software adapter."""
    return {"VK_ICD_FILENAMES": str(swiftshader())}


@pytest.fixture(scope="session")
def model(web_folder: Path) -> Callable[[str], WebModel]:
    """Models by name (browser_harness.MAKERS), built once in a run."""
    require(find_spec("ziglang"), "ziglang is not installed (pip install 'mlc-compile[webgpu]')")
    return lambda name: built(name, web_folder)
