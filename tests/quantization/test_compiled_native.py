"""Kernels kept as machine code: made once, checked before they run, never needed."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy as np
import pytest

from mlc_compile.quantization import native
from mlc_compile.quantization.codec import encode
from mlc_compile.quantization.compiled import CompiledEncoder
from mlc_compile.quantization.scheme import get_scheme

SCHEME = get_scheme("q4f32_1")
linked = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="images are for x86-64 Linux"
)


def check() -> None:
    """A new encoder gives the reference's bytes."""
    w = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    fast = CompiledEncoder()
    assert fast.kernel("float32", SCHEME) is not None
    for one, other in zip(fast(w, SCHEME), encode(w, SCHEME), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mlc-compile" / "encoders"


@linked
def test_later_encoders_need_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check()
    (stored,) = cache.iterdir()
    assert stored.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(native, "_compile", None)  # a call of it would raise
    check()


@linked
@pytest.mark.parametrize("harm", ["flip", "cut", "others may write"])
def test_a_doubtful_image_is_not_run(harm: str, cache: Path) -> None:
    check()
    (stored,) = cache.iterdir()
    content = bytearray(stored.read_bytes())
    good = bytes(content)
    if harm == "flip":
        content[-1] ^= 1
    elif harm == "cut":
        del content[100:]
    stored.write_bytes(content)
    if harm == "others may write":
        stored.chmod(0o666)
    check()
    assert stored.read_bytes() == good
    assert stored.stat().st_mode & 0o077 == 0


@linked
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    check()


def test_machines_without_images(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    check()
    assert not cache.exists()


@linked
def test_foreign_code_is_not_linked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = native._compile("hash", (), "", plain=True)
    code = bytearray(native._object_code(built))
    image, start = native.link(bytes(code), "hash")
    assert 0 <= start < len(image)
    with pytest.raises(native._NotLinkable):
        native.link(bytes(code), "other")
    # With its own convention TVM calls into its runtime.
    whole = native._object_code(native._compile("hash", (), "", plain=False))
    with pytest.raises(native._NotLinkable):
        native.link(whole, "__tvm_ffi_hash")
