"""The checks of a WebGPU library, on hand-made modules and kernels that each break one rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from web_model import FUNCTIONS, METADATA
from web_module import library

from mlc_compile.errors import CheckFailedError, InputError
from mlc_compile.targets.web import check
from mlc_compile.targets.web.toolchain import EXPORTS

KERNEL = """\
@group(0) @binding(0) var<storage, read> x : array<f32>;
@group(0) @binding(1) var<storage, read_write> y : array<f32>;
@compute @workgroup_size(64, 1, 1)
fn add(@builtin(global_invocation_id) id : vec3<u32>) {
  y[id.x] = x[id.x];
}
"""


@pytest.fixture(autouse=True)
def without_naga(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding an adapter takes long: only tests with `naga` in their name do it."""
    if "naga" not in request.node.name:
        monkeypatch.setattr(check, "_naga", lambda *_, **__: ([], []))


def write(tmp_path: Path, **changes: Any) -> Path:
    """A library that keeps every rule, apart from what `changes` say."""
    parts: dict[str, Any] = {
        "imports": [("env", "TVMFFIWasmSafeCall"), ("wasi_snapshot_preview1", "fd_write")],
        "exports": ["_initialize", *EXPORTS],
        "data": [
            b"\0\0" + json.dumps(METADATA, sort_keys=True).encode() + b"\xff{",
            KERNEL.encode(),
        ],
        **changes,
    }
    path = tmp_path / "model.wasm"
    path.write_bytes(library(**parts))
    return path


def run(path: Path, **changes: Any) -> list[str]:
    arguments: dict[str, Any] = {
        "functions": FUNCTIONS,
        "wgsl": {"add": KERNEL},
        "metadata": METADATA,
        "f16": False,
        "subgroups": False,
        **changes,
    }
    return check.check_library(path, **arguments)


def test_a_library_that_keeps_the_rules_passes(tmp_path: Path) -> None:
    assert run(write(tmp_path)) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"imports": [("env", "sin")]}, r"imports function env\.sin"),
        ({"imports": [("wasi_snapshot_preview1", "path_open")]}, "path_open"),
        ({"exports": ["_initialize", *EXPORTS[1:]]}, f"export the function {EXPORTS[0]}"),
        ({"exports": EXPORTS}, "export the function _initialize"),
        ({"data": [KERNEL.encode()]}, "data does not hold the metadata"),
        ({"data": [b'{"note": {"note": 1}', KERNEL.encode()]}, "data does not hold the metadata"),
        ({"data": [json.dumps(METADATA).encode()]}, "does not hold the source of kernel add"),
        ({"memory": b"\x01\x02\x40"}, "may grow to 64 pages only"),
    ],
)
def test_a_wrong_module_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckFailedError, match=says):
        run(write(tmp_path, **changes))


def test_all_broken_rules_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, imports=[("env", "sin"), ("env", "cos")], data=[])
    with pytest.raises(CheckFailedError) as caught:
        run(path)
    for part in ("env.sin", "env.cos", "metadata", "kernel add"):
        assert part in caught.value.message
    assert caught.value.exit_code == 1


def test_a_file_that_is_no_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.wasm"
    path.write_bytes(b"<html>")
    with pytest.raises(InputError, match="not a WebAssembly module"):
        run(path)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "add_one"])
def test_every_function_that_web_llm_needs_is_asked_for(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckFailedError, match=name):
        run(write(tmp_path), functions=[n for n in FUNCTIONS if n != name])


def test_the_batch_pair_serves_as_well(tmp_path: Path) -> None:
    renamed = {"prefill": "batch_prefill", "decode": "batch_decode"}
    run(write(tmp_path), functions=[renamed.get(name, name) for name in FUNCTIONS])


def changed_metadata(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    metadata = {**METADATA, **changes}
    path = write(tmp_path, data=[json.dumps(metadata).encode(), KERNEL.encode()])
    return {"path": path, "metadata": metadata}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_state_kind": "none"}, "kv_state_kind is 'none'"),
        ({"kv_state_kind": "hybrid"}, "create_rnn_state"),
        ({"prefill_chunk_size": None}, "prefill_chunk_size is missing"),
        ({"params": {}}, "params is missing"),
        (
            {"artifact": {"programs": {"p": {"exports": {"embed_tokens": "emb"}}}}},
            "program p names function emb as embed_tokens",
        ),
    ],
)
def test_metadata_is_held_against_the_rules(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckFailedError, match=says):
        run(**changed_metadata(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"artifact": {"resources": {"max_storage_buffer_binding_size": 2 << 30}}},
            "the largest buffer takes 2,147,483,648 bytes",
        ),
        (
            {"params": [{"name": "big", "shape": [1 << 15, 1 << 14], "dtype": "float32"}]},
            "parameter big takes 2,147,483,648 bytes .* 1,073,741,824; choose a quantization",
        ),
    ],
)
def test_a_buffer_that_no_adapter_binds_is_the_models_fault(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        run(**changed_metadata(tmp_path, **changes))


def test_a_stated_binding_limit_is_kept_and_the_default_one_told(tmp_path: Path) -> None:
    params = [{"name": "big", "shape": [1 << 13, 1 << 14], "dtype": "float16"}]
    given = changed_metadata(tmp_path, params=params)
    (note,) = run(**given, max_storage_buffer_binding_size=1 << 28)
    assert "parameter big takes 268,435,456 bytes" in note
    assert "134,217,728" in note
    with pytest.raises(InputError, match="268,435,455"):
        run(**given, max_storage_buffer_binding_size=(1 << 28) - 1)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 16), ("uint32", 32), ("int8", 8)])
def test_sizes_follow_the_dtype(tmp_path: Path, dtype: str, bits: int) -> None:
    params = [{"name": "big", "shape": [3, 5], "dtype": dtype}]
    given = changed_metadata(tmp_path, params=params)
    assert run(**given, max_storage_buffer_binding_size=15 * bits // 8) == []
    with pytest.raises(InputError, match="parameter big"):
        run(**given, max_storage_buffer_binding_size=15 * bits // 8 - 1)


def problems(kernel: str, **promises: bool) -> list[str]:
    return check.kernel_problems("add", kernel, **{"f16": False, "subgroups": False, **promises})


def with_size(*size: int) -> str:
    return KERNEL.replace("64, 1, 1", ", ".join(map(str, size)))


def with_shared(*variables: str) -> str:
    lines = [f"var<workgroup> s{i} : {kind};" for i, kind in enumerate(variables)]
    return "\n".join([*lines, KERNEL])


@pytest.mark.parametrize(
    "kernel",
    [
        KERNEL,
        with_size(256),
        with_size(4, 1, 64),
        with_shared("array<f32, 8192>"),
        with_shared("array<vec4<f32>, 2047>", "f32"),
        with_shared("array<vec2<f16>, 8192>").replace("@compute", "@compute"),
        "// f16 subgroupAdd var<storage> i64 @workgroup_size(999)\n" + KERNEL,
        KERNEL.replace("id.x", "u32(blockIdx.z * gridDim.x + blockIdx.x)"),
    ],
)
def test_kernels_at_the_limits_pass(kernel: str) -> None:
    assert problems("enable f16;\n" + kernel, f16=True) == []


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (with_size(257), "257 invocations"),
        (with_size(16, 16, 2), "512 invocations"),
        (with_size(1, 1, 128), "128 in z; the limit is 64"),
        (with_size(0), "a workgroup of 0 in x"),
        (KERNEL.replace("64, 1, 1", "size"), "is not one to three numbers"),
        (KERNEL.replace("@compute @workgroup_size(64, 1, 1)", ""), "0 entry points"),
        (KERNEL + KERNEL.replace("fn add", "fn other"), "2 entry points"),
        (with_shared("array<f32, 8193>"), "32784 bytes of workgroup memory"),
        (with_shared("array<f32, 8192>", "atomic<u32>"), "32784 bytes of workgroup memory"),
        (with_shared("array<vec3<f32>, 2049>"), "32784 bytes of workgroup memory"),
        (with_shared("array<array<vec2f, 64>, 65>"), "33280 bytes of workgroup memory"),
        (with_shared("Mystery"), "the type Mystery"),
        ("var<storage> b : array<f32>;\n" * 9 + KERNEL, "11 storage buffers"),
        ("var<uniform> b : Args;\n" * 13 + KERNEL, "13 uniform buffers"),
        ("enable f16;\n" + KERNEL, "enables f16, which the target does not promise"),
        (KERNEL.replace("f32", "f16"), "uses f16 without enabling it"),
        ("enable subgroups;\n" + KERNEL, "uses subgroups"),
        (KERNEL.replace("x[id.x];", "subgroupAdd(x[id.x]);"), "uses subgroups"),
        ("enable dual_source_blending;\n" + KERNEL, "enables dual_source_blending"),
        (KERNEL.replace("x[id.x];", "f32(i64(x[id.x]));"), "uses i64, which WGSL does not have"),
        (KERNEL.replace("id.x", "blockIdx.z"), "uses blockIdx.z"),
        (KERNEL.replace("fn add", "fn lambda"), "no function of its name"),
    ],
)
def test_kernels_beyond_a_limit_are_told(kernel: str, says: str) -> None:
    assert [p for p in problems(kernel) if says in p]


def test_a_kernel_needs_a_name_that_wgsl_allows() -> None:
    kernel = KERNEL.replace("fn add", "fn <lambda>")
    found = check.kernel_problems("<lambda>", kernel, f16=False, subgroups=False)
    assert found == ["its name is not one that WGSL allows"]


def test_promised_features_may_be_used() -> None:
    kernel = "enable f16, subgroups;\n" + KERNEL.replace("f32", "f16")
    kernel = kernel.replace("x[id.x];", "subgroupAdd(x[id.x]);")
    assert problems(kernel, f16=True, subgroups=True) == []


def as_inspected(*kernels: tuple[str, str]) -> str:
    line = "//" + "-" * 40
    return "".join(
        f"// Function: {name}\n{line}\n// Function: {name}\n{line}\n{code}\n"
        for name, code in kernels
    )


def test_kernels_are_split_at_their_headers() -> None:
    second = "// Function: of x\n" + KERNEL
    source = as_inspected(("add", KERNEL), ("add_1", second))
    assert check.split_kernels(source) == {"add": KERNEL, "add_1": second}
    assert check.split_kernels("") == {}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (KERNEL, "does not begin with a kernel's header"),
        (as_inspected(("add", KERNEL), ("add", KERNEL)), "two kernels .* named add"),
    ],
)
def test_other_text_is_not_taken_for_kernels(source: str, says: str) -> None:
    with pytest.raises(CheckFailedError, match=says):
        check.split_kernels(source)


def test_naga_refuses_what_the_limits_allow(tmp_path: Path, webgpu: str) -> None:
    wrong = KERNEL.replace("x[id.x]", "undeclared")
    path = write(tmp_path, data=[json.dumps(METADATA).encode(), wrong.encode()])
    with pytest.raises(CheckFailedError, match="kernel add: refused by naga"):
        run(path, wgsl={"add": wrong})


def test_naga_without_an_adapter_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wgpu")
    monkeypatch.setattr("mlc_compile.targets.web.adapters.adapters", lambda: [])
    assert run(write(tmp_path)) == [
        "kernels were not validated: wgpu offers no adapter on this machine"
    ]


def test_naga_without_wgpu_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wgpu", None)
    assert run(write(tmp_path)) == ["kernels were not validated: the package wgpu is not installed"]
