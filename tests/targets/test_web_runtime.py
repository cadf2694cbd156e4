"""The runtime's object cache, with a toolchain that copies files in place of compiling them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.targets.web import runtime, toolchain
from mlc_compile.targets.web.runtime import Sources, cache_key, runtime_objects

# "Compiles" a unit: notes it in LOG, obeys a first word WAIT (until the file GO is there) or FAIL.
COMPILER = """
import os, pathlib, sys, time
args = sys.argv[1:]
unit, output = pathlib.Path(args[-3]), pathlib.Path(args[-1])
text = unit.read_text()
with open(os.environ["LOG"], "a") as log:
    log.write(unit.name + "\\n")
if text.startswith("WAIT"):
    while not os.path.exists(os.environ["GO"]):
        time.sleep(0.02)
if text.startswith("FAIL"):
    sys.exit("a first line\\n" + "x" * 5000 + "\\na last line")
output.write_bytes(b"object of " + text.encode())
"""


class Copier:
    """A `Toolchain` of COMPILER."""

    name = "copier"

    def __init__(self, folder: Path, version: str = "1") -> None:
        self.folder = folder
        self.version = version

    def units(self, sources: Path) -> list[Path]:
        return sorted(sources.glob("*.cc"))

    def compile_flags(self, sources: Path, language: str) -> list[str]:
        return []

    def compiler(self, language: str) -> list[str]:
        return [sys.executable, str(self.folder / "compiler.py")]

    def link_flags(self, exports: Sequence[str]) -> list[str]:
        return ["-x"]

    def variables(self, cache: Path, scratch: Path) -> Mapping[str, str]:
        return {"LOG": str(self.folder / "log"), "GO": str(self.folder / "go")}

    def compiled(self) -> list[str]:
        """The units compiled so far, in any order; the empty link left out."""
        log = self.folder / "log"
        lines = log.read_text().split() if log.exists() else []
        return sorted(line for line in lines if line != "empty.cc")


def fake(folder: Path, texts: Mapping[str, str] | None = None) -> tuple[Copier, Sources]:
    """A toolchain and a tiny source list in `folder`; existing files stay."""
    (folder / "src").mkdir(parents=True, exist_ok=True)
    (folder / "compiler.py").write_text(COMPILER)
    for name, text in (texts or {}).items():
        (folder / "src" / name).write_text(text)
    tools = Copier(folder)
    units = tuple(tools.units(folder / "src"))
    return tools, Sources(units, (("mlc_compile", folder / "src"),))


TWO = {"a.cc": "first", "b.cc": "second"}


def in_another_process(folder: Path, cache: Path) -> subprocess.Popen[str]:
    """Asks for the objects, writing what it reports, then their names."""
    code = (
        "import sys, pathlib; import test_web_runtime as t\n"
        "tools, sources = t.fake(pathlib.Path(sys.argv[1]))\n"
        "say = lambda what, done, total: print(what, flush=True)\n"
        "made = t.runtime_objects("
        "tools, cache=pathlib.Path(sys.argv[2]), sources=sources, progress=say)\n"
        "print([file.name for file in made])\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(cache)],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.02)


def test_objects_are_built_once_and_in_order(tmp_path: Path) -> None:
    tools, sources = fake(tmp_path, TWO)
    cache = tmp_path / "cache"
    steps: list[tuple[str, int, int]] = []
    for _ in range(2):
        steps.clear()
        made = runtime_objects(
            tools, cache=cache, sources=sources, progress=lambda *step: steps.append(step)
        )
        assert [file.name for file in made] == ["a.o", "b.o"]
        assert made[1].read_bytes() == b"object of second"
        assert tools.compiled() == ["a.cc", "b.cc"]
        assert steps[-1] == ("runtime", 3, 3)
    assert len(steps) == 1
    assert sorted(p.name for p in made[0].parent.iterdir()) == ["a.o", "b.o", "objects.json"]


def test_progress_counts_every_step(tmp_path: Path) -> None:
    tools, sources = fake(tmp_path, TWO)
    steps: list[tuple[str, int, int]] = []
    runtime_objects(
        tools,
        cache=tmp_path / "cache",
        sources=sources,
        progress=lambda *step: steps.append(step),
    )
    assert [done for _, done, _ in steps] == [0, 1, 2, 3, 3]
    assert {total for _, _, total in steps} == {3}
    assert {what for what, _, _ in steps[1:4]} == {"a.cc", "b.cc", "C and C++ library"}


def test_the_key_follows_contents_versions_and_labels_not_paths(tmp_path: Path) -> None:
    tools, sources = fake(tmp_path / "one", TWO)
    other_tools, other = fake(tmp_path / "two", TWO)
    key = cache_key(tools, sources)
    assert cache_key(other_tools, other) == key
    assert cache_key(Copier(tmp_path / "one", version="2"), sources) != key
    changed = Sources(sources.units, sources.roots, defines=("A=1",))
    assert cache_key(tools, changed) != key
    (tmp_path / "two" / "src" / "extra.h").write_text("")
    assert cache_key(other_tools, other) != key


@pytest.mark.parametrize("damage", ["shorter", "other", "gone", "list", "list of lists"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: str) -> None:
    tools, sources = fake(tmp_path, TWO)
    cache = tmp_path / "cache"
    first, *_ = runtime_objects(tools, cache=cache, sources=sources)
    whole = first.read_bytes()
    listed = first.parent / "objects.json"
    if damage == "shorter":
        first.write_bytes(whole[:-1])
    elif damage == "other":
        first.write_bytes(b"X" + whole[1:])
    elif damage == "gone":
        first.unlink()
    else:
        listed.write_text('{"a.o' if damage == "list" else "[[]]")
    again = runtime_objects(tools, cache=cache, sources=sources)
    assert again[0].read_bytes() == whole
    assert tools.compiled() == ["a.cc", "a.cc", "b.cc", "b.cc"]


def test_the_second_process_waits_and_says_so(tmp_path: Path) -> None:
    tools, _ = fake(tmp_path, {"a.cc": "WAIT", "b.cc": "second"})
    first = in_another_process(tmp_path, tmp_path / "cache")
    wait_until(lambda: "a.cc" in tools.compiled())
    second = in_another_process(tmp_path, tmp_path / "cache")
    assert second.stdout is not None
    assert second.stdout.readline() == "waiting for another process to build the runtime\n"
    (tmp_path / "go").write_text("")
    for process in (first, second):
        out, _ = process.communicate(timeout=60)
        assert out.splitlines()[-1] == "['a.o', 'b.o']"
    assert tools.compiled() == ["a.cc", "b.cc"]


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process group")
def test_a_killed_build_blocks_nobody_and_leaves_no_entry(tmp_path: Path) -> None:
    tools, sources = fake(tmp_path, {"a.cc": "WAIT", "b.cc": "second"})
    cache = tmp_path / "cache"
    killed = in_another_process(tmp_path, cache)
    wait_until(lambda: tools.compiled() == ["a.cc", "b.cc"])
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    left = list((cache / "web-runtime").glob("*.tmp"))
    assert len(left) == 1
    (tmp_path / "go").write_text("")
    made = runtime_objects(tools, cache=cache, sources=sources)
    assert [file.name for file in made] == ["a.o", "b.o"]
    assert not list((cache / "web-runtime").glob("*.tmp"))


def test_a_failed_build_says_all_the_compiler_said_and_is_tried_again(tmp_path: Path) -> None:
    tools, sources = fake(tmp_path, {**TWO, "b.cc": "FAIL"})
    cache = tmp_path / "cache"
    with pytest.raises(EnvironmentLacksError) as caught:
        runtime_objects(tools, cache=cache, sources=sources)
    assert f"a first line\n{'x' * 5000}\na last line" in caught.value.message
    assert [p.suffix for p in (cache / "web-runtime").iterdir()] == [".lock"]
    (tmp_path / "src" / "b.cc").write_text("mended")
    made = runtime_objects(tools, cache=cache, sources=sources)
    assert made[1].read_bytes() == b"object of mended"


def test_an_unwritable_cache_is_named_with_the_remedy(tmp_path: Path) -> None:
    tools, sources = fake(tmp_path, TWO)
    (tmp_path / "file").write_text("")  # a folder's permissions would not stop root
    with pytest.raises(EnvironmentLacksError, match=r"cannot be written.*set MLC_COMPILE_CACHE"):
        runtime_objects(tools, cache=tmp_path / "file" / "cache", sources=sources)


def test_a_cache_that_has_the_objects_need_not_be_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools, sources = fake(tmp_path, TWO)
    made = runtime_objects(tools, cache=tmp_path / "cache", sources=sources)

    def refuse(folder: Path) -> None:
        raise AssertionError(f"{folder} was to be written")

    monkeypatch.setattr(runtime, "_make_writable", refuse)
    assert runtime_objects(tools, cache=tmp_path / "cache", sources=sources) == made


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLC_COMPILE_CACHE", str(tmp_path / "named"))
    assert runtime.cache_folder() == tmp_path / "named"
    monkeypatch.delenv("MLC_COMPILE_CACHE")
    if sys.platform == "win32":
        return
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.cache_folder() == tmp_path / "mlc-compile"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert runtime.cache_folder() == tmp_path / "home" / ".cache" / "mlc-compile"


def test_wheels_without_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tvm").mkdir()
    monkeypatch.setattr(runtime, "_package", lambda name: tmp_path / name)
    with pytest.raises(EnvironmentLacksError, match=r"lack the C\+\+ sources of tvm/src/runtime"):
        runtime.wheel_sources(Copier(tmp_path))


def test_every_unit_of_both_toolchains_is_there() -> None:
    own = Path(runtime.__file__).parent / "runtime" / "src"
    zig = object.__new__(toolchain.Zig).units(own)
    emscripten = object.__new__(toolchain.Emscripten).units(own)
    assert all(unit.is_file() for unit in zig)
    assert set(emscripten) < set(zig)
    assert {*own.glob("pack/*.cc"), *own.glob("wasi/*.c*")} == set(zig)


def test_missing_ziglang_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(toolchain.metadata, "version", missing)
    with pytest.raises(
        EnvironmentLacksError, match=r"pip install 'mlc-compile\[webgpu\]'"
    ) as caught:
        toolchain.get_toolchain("zig")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_missing_emscripten_is_told_and_unknown_names_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentLacksError, match=r"emcc and em\+\+ not found"):
        toolchain.get_toolchain("emscripten")
    with pytest.raises(InputError, match="choose from zig, emscripten"):
        toolchain.get_toolchain("gcc")


@pytest.mark.skipif(sys.platform == "win32", reason="the tools are shell scripts")
def test_emscripten_on_the_path_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("emcc", "em++"):
        script = tmp_path / name
        script.write_text("#!/bin/sh\necho 'emcc 3.1.56 (abc)'\necho more\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    tools = toolchain.get_toolchain("emscripten")
    assert tools.version == "emcc 3.1.56 (abc)"
    assert tools.compiler("c++") == [str(tmp_path / "em++")]
    (exported,) = [f for f in tools.link_flags(["malloc", "free"]) if "EXPORTED" in f]
    assert exported == "-sEXPORTED_FUNCTIONS=_malloc,_free"


def test_a_command_that_cannot_start_is_told() -> None:
    with pytest.raises(EnvironmentLacksError, match="cannot run /nowhere/at/all"):
        toolchain.run(["/nowhere/at/all"], {})


def test_the_list_of_an_entry_is_json_with_hashes(tmp_path: Path) -> None:
    tools, sources = fake(tmp_path, TWO)
    made = runtime_objects(tools, cache=tmp_path / "cache", sources=sources)
    listed = json.loads((made[0].parent / "objects.json").read_text())
    assert list(listed) == ["a.o", "b.o"]
    assert all(len(value) == 64 for value in listed.values())
