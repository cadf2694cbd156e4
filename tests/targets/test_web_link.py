"""A small module through the real toolchain. The first run compiles TVM's runtime: a minute or two,
afterwards the objects come from the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from web_model import FUNCTIONS, METADATA, build_executable

from mlc_compile.errors import CheckFailedError, EnvironmentLacksError, InputError
from mlc_compile.targets.web import wasm
from mlc_compile.targets.web.export import export_wasm, kernels
from mlc_compile.targets.web.link import fcompile, link
from mlc_compile.targets.web.runtime import Sources, _compile, wheel_sources
from mlc_compile.targets.web.toolchain import EXPORTS, Zig, run


def export(executable: Any, output: Path) -> list[str]:
    return export_wasm(
        executable,
        output,
        metadata=METADATA,
        functions=FUNCTIONS,
        f16=False,
        subgroups=False,
    )


@pytest.fixture(scope="module")
def executable() -> Any:
    pytest.importorskip("ziglang")
    return build_executable()


@pytest.fixture(scope="module")
def library(executable: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("library") / "model.wasm"
    export(executable, output)
    return output


@pytest.mark.slow
def test_imports_and_exports_are_exactly_these(library: Path) -> None:
    module = wasm.read(library)
    assert sorted((i.module, i.name) for i in module.imports) == [
        ("env", "TVMFFIWasmFunctionDeleter"),
        ("env", "TVMFFIWasmSafeCall"),
        ("env", "emscripten_notify_memory_growth"),
        ("wasi_snapshot_preview1", "clock_time_get"),
        ("wasi_snapshot_preview1", "fd_close"),
        ("wasi_snapshot_preview1", "fd_write"),
        ("wasi_snapshot_preview1", "proc_exit"),
    ]
    assert {e.name for e in module.exports} == {"memory", "_initialize", *EXPORTS}
    (memory,) = module.memories
    assert not memory.imported
    assert memory.maximum is None


@pytest.mark.slow
def test_the_library_is_alone_in_its_folder_and_holds_no_path(library: Path) -> None:
    assert [p.name for p in library.parent.iterdir()] == ["model.wasm"]
    content = library.read_bytes()
    for folder in (
        Path.home(),
        Path(wasm.__file__).parents[2],
        Path(sys.prefix),
        library.parents[1],
    ):
        assert str(folder) + "/" not in content.decode("latin-1")


@pytest.mark.slow
def test_two_links_in_two_processes_are_byte_identical(library: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, test_web_link as t\n"
        "t.export(t.build_executable(), pathlib.Path(sys.argv[1]))\n"
    )
    again = tmp_path / "elsewhere" / "again.wasm"
    again.parent.mkdir()
    subprocess.run(
        [sys.executable, "-c", code, str(again)],
        check=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "1", "TMPDIR": str(again.parent)},
    )
    assert again.read_bytes() == library.read_bytes()


@pytest.mark.slow
def test_nothing_is_written_when_a_check_fails(executable: Any, tmp_path: Path) -> None:
    output = tmp_path / "model.wasm"
    output.write_bytes(b"an older library")
    with pytest.raises(CheckFailedError, match="embed"):
        export_wasm(
            executable,
            output,
            metadata=METADATA,
            functions=[name for name in FUNCTIONS if name != "embed"],
            f16=False,
            subgroups=False,
        )
    assert [p.name for p in tmp_path.iterdir()] == ["model.wasm"]
    assert output.read_bytes() == b"an older library"


@pytest.mark.slow
def test_f16_kernels_need_the_targets_promise(tmp_path: Path) -> None:
    half = build_executable("float16")
    assert "f16" in kernels(half)["add_one_tir_kernel"]
    with pytest.raises(CheckFailedError, match="enables f16, which the target does not promise"):
        export(half, tmp_path / "model.wasm")


@pytest.mark.slow
def test_the_linkers_words_reach_the_user(library: Path, tmp_path: Path) -> None:
    source = tmp_path / "asks.c"
    source.write_text(
        "void not_there(void);\n__attribute__((constructor)) void f(void) { not_there(); }\n"
    )
    run([*Zig().compiler("c"), "-c", str(source), "-o", str(tmp_path / "asks.o")], {})
    with pytest.raises(EnvironmentLacksError, match="undefined symbol: not_there"):
        link([tmp_path / "asks.o"], tmp_path / "model.wasm")
    assert not (tmp_path / "model.wasm").exists()


@pytest.mark.slow
def test_an_object_does_not_depend_on_where_its_sources_lie(tmp_path: Path) -> None:
    import shutil

    tools = Zig()
    sources = wheel_sources(tools)
    (unit,) = [u for u in sources.units if u.stem == "platform"]
    made = []
    own = dict(sources.roots)["mlc_compile"]
    for name in ("one", "another"):
        copy = tmp_path / name / "src"
        shutil.copytree(own, copy)
        moved = Sources(
            (copy / unit.relative_to(own),),
            (("mlc_compile", copy), *sources.roots[1:]),
            tuple(copy / f.relative_to(own) if own in f.parents else f for f in sources.quoted),
            tuple(copy / f.relative_to(own) if own in f.parents else f for f in sources.angled),
            sources.defines,
        )
        made.append(tmp_path / f"{name}.o")
        run(_compile(tools, moved, moved.units[0], made[-1]), {}, cwd=tmp_path)
    assert made[0].read_bytes() == made[1].read_bytes()


def test_the_same_executable_gives_the_same_objects(executable: Any, tmp_path: Path) -> None:
    seen = []
    for turn in range(2):

        def keep(output: str, objects: list[str], *_: Any, **__: Any) -> None:
            seen.append({Path(name).name: Path(name).read_bytes() for name in objects})
            Path(output).write_bytes(b"")

        keep.object_format = "o"  # type: ignore[attr-defined]
        executable.export_library(str(tmp_path / f"{turn}.wasm"), fcompile=keep)
    assert seen[0] == seen[1]
    assert any(b"@compute" in content for content in seen[0].values())


def test_objects_are_linked_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def note(objects: list[Path], output: Path, **_: Any) -> None:
        asked.append([file.name for file in objects])

    monkeypatch.setattr("mlc_compile.targets.web.link.link", note)
    fcompile()(str(tmp_path / "m.wasm"), ["/z/devc.o", "/a/lib1.o", "/y/lib0.o"], options=[])
    assert asked == [["devc.o", "lib0.o", "lib1.o"]]


def test_a_missing_object_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.o: no such object file"):
        link([tmp_path / "none.o"], tmp_path / "model.wasm")


def test_kernels_of_an_executable_are_found_by_name(executable: Any) -> None:
    assert list(kernels(executable)) == ["add_one_tir_kernel"]
