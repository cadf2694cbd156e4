"""The quick reading of versions against `importlib.metadata`."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from mlc_compile.versions import version


def test_installed_packages_have_the_versions_that_the_library_gives() -> None:
    names = {found.metadata["Name"] for found in metadata.distributions()}
    assert {"mlc-compile", "apache-tvm", "numpy"} <= names
    for name in names:
        assert version(name) == metadata.version(name)
        assert version(name.replace("-", "_").upper()) == metadata.version(name)


def test_what_is_not_installed_is_the_librarys_error() -> None:
    with pytest.raises(metadata.PackageNotFoundError, match="no-such-package"):
        version("no-such-package")


@pytest.mark.parametrize(
    "files",
    [
        {"Some_pkg-1.0.dist-info/METADATA": "Name: some.pkg\nVersion:  1.0+b \n\nVersion: 2\n"},
        {"some.pkg-3.1.egg-info/PKG-INFO": "Name: some.pkg\nVersion: 3.1\n"},
        {
            "some_pkg-1.dist-info/METADATA": "Version: 1\n",
            "some_pkg-2.dist-info/METADATA": "Version: 2\n",
        },
        {"some_pkg-1.dist-info/METADATA": "Description: text\n and\nversion: 4\n\nVersion: 5\n"},
    ],
    ids=["plain", "egg", "twice", "unusual"],
)
def test_unusual_installations(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "missing"), str(tmp_path), *sys.path])
    assert version("some-pkg") == metadata.version("some-pkg")
