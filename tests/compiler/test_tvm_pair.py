"""The pair of TVM packages is checked from metadata, before TVM is imported."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from mlc_compile.compiler import tvm_pair
from mlc_compile.compiler.tvm_pair import PINS, RUNTIME_ONLY, require_tvm
from mlc_compile.errors import EnvironmentLacksError


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUNTIME_ONLY, raising=False)


def install(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that these versions are installed (None: not at all); others as pinned."""
    found = {**PINS, **{name.replace("_", "-"): v for name, v in versions.items()}}

    def version(package: str) -> str:
        value = found[package]
        if value is None:
            raise PackageNotFoundError(package)
        return value

    monkeypatch.setattr(tvm_pair, "version", version)


def test_this_environment_has_the_pair() -> None:
    require_tvm()


@pytest.mark.parametrize("package", PINS)
@pytest.mark.parametrize("found", ["0.99.0", None])
def test_a_wrong_or_missing_half_is_named_with_the_remedy(
    package: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, **{package.replace("-", "_"): found})
    with pytest.raises(EnvironmentLacksError) as caught:
        require_tvm()
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert f"{package} {found or 'none'} is installed where {PINS[package]} is needed" in message
    # Both pins, whichever is wrong: they are only right together.
    assert all(f'"{name}=={pin}"' in message for name, pin in PINS.items())
    assert "\n" not in message


def test_runtime_alone_cannot_compile_but_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUNTIME_ONLY, "1")
    require_tvm(compiling=False)
    with pytest.raises(EnvironmentLacksError, match=f"unset {RUNTIME_ONLY}"):
        require_tvm()


def test_the_check_itself_does_not_import_tvm() -> None:
    code = (
        "import sys; from mlc_compile.compiler.tvm_pair import require_tvm; require_tvm()\n"
        "assert not {'tvm', 'tvm_ffi'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
