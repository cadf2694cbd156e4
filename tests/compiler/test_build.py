"""`compile`: the library's bytes, its metadata, what each pass may change, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiler_configs import read_inputs, write_config
from fused_kernels import WITHOUT_KERNELS

from mlc_compile.compiler.build import compile_library
from mlc_compile.compiler.opt import FUSIONS
from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.manifest import parameter_schema_id
from mlc_compile.quantization.codec import encode
from mlc_compile.quantization.policy import is_quantized, stored_layout, stored_params
from mlc_compile.targets.profile import TARGETS, ExportRequest

MakeConfig = Callable[..., Path]
ABI = {
    "embed",
    "get_logits",
    "batch_select_last_hidden_states",
    "prefill",
    "decode",
    "batch_prefill",
    "batch_decode",
    "batch_verify",
    "prefill_to_last_hidden_states",
    "decode_to_last_hidden_states",
    "batch_prefill_to_last_hidden_states",
    "batch_decode_to_last_hidden_states",
    "batch_verify_to_last_hidden_states",
    "prefill_tokens",
    "decode_tokens",
    "create_tir_paged_kv_cache",
    "softmax_with_temperature",
    "apply_logit_bias_inplace",
    "apply_penalty_inplace",
    "apply_bitmask_inplace",
    "argsort_probs",
    "sample_with_top_p",
    "multinomial_from_uniform",
    "sampler_take_probs",
    "sampler_verify_draft_tokens",
    "renormalize_by_top_p",
    "scatter_probs",
    "gather_probs",
}


def random_params(library: Any, folder: Path) -> list[Any]:
    """Seeded parameters for a library, quantised by the reference where the scheme packs them."""
    inputs = read_inputs(folder)
    rng = np.random.default_rng(0)
    arrays = []
    for spec in inputs.model.parameters():
        weight = rng.standard_normal(spec.shape).astype(np.float32) * 0.2
        if spec.role == "norm":
            weight = 1 + weight
        if is_quantized(spec, inputs.scheme):
            layout = stored_layout(spec, inputs.scheme)
            arrays += list(encode(weight, inputs.scheme, layout=layout, name=spec.name))
        else:
            (stored,) = stored_params(spec, inputs.scheme)
            arrays.append(weight.astype(stored.dtype))
    return [library.tensor(array) for array in arrays]


def logits(path: Path, folder: Path) -> np.ndarray[Any, Any]:
    """Logits of two prefill chunks and some decode steps, in one array."""
    from mlc_compile.runtime.engine import Engine, Library

    library = Library(path)
    engine = Engine.with_params(library, random_params(library, folder))
    engine.add_sequence(0)
    rows = [engine.prefill(0, list(range(3, 60)))]
    rows += [engine.decode(0, token) for token in (7, 90, 5)]
    engine.add_sequence(1)
    rows += list(engine.batch_prefill({1: [4, 5, 6]}))
    rows += list(engine.batch_decode({0: 11, 1: 12}))
    return np.stack(rows)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, library) of a tiny qwen3 in q4f32_1, which every fusing pass touches."""
    folder = tmp_path_factory.mktemp("built")
    return folder, compile_qwen(folder, "O2")


def compile_qwen(folder: Path, opt: str) -> Path:
    if not (folder / "mlc-chat-config.json").exists():
        write_config(folder, "qwen3", "q4f32_1", head_dim=32, tie_word_embeddings=False)
    output = folder / f"{opt.replace('=', '_')}.so"
    compile_library(folder, "cpu", output, opt=opt)
    return output


def test_abi_and_metadata(built: tuple[Path, Path]) -> None:
    from mlc_compile.runtime.engine import Library

    folder, path = built
    library = Library(path)
    meta = library.metadata
    assert set(meta["mlc_compile"]["functions"]) == ABI
    assert all(library.function(name) is not None for name in ABI)  # AttributeError when missing
    inputs = read_inputs(folder)
    stored = [s for spec in inputs.model.parameters() for s in stored_params(spec, inputs.scheme)]
    assert [p["name"] for p in meta["params"]] == [s.name for s in stored]
    artifact = meta["artifact"]
    assert artifact["parameter_schema_id"] == parameter_schema_id(stored)
    assert artifact["programs"]["default"]["exports"].keys() >= {"embed_tokens", "create_kv_cache"}
    assert set(artifact["programs"]["default"]["exports"].values()) <= ABI
    resources = artifact["resources"]
    assert resources["estimated_device_memory_bytes"] == meta["mlc_compile"]["memory_plan"]["total"]
    assert resources["max_storage_buffer_binding_size"] >= max(s.nbytes for s in stored)
    assert meta["prefill_chunk_size"] == inputs.config.prefill_chunk_size
    for name in ("prefill", "decode", "batch_decode"):
        assert meta["memory_usage"][name] > 0


def test_two_compilations_give_the_same_bytes(built: tuple[Path, Path], tmp_path: Path) -> None:
    folder, path = built
    again = tmp_path / "again" / "other_name.so"
    again.parent.mkdir()
    compile_library(folder, "cpu", again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "opt",
    [
        *(
            pytest.param(f"{switch}=0", marks=pytest.mark.slow)
            for switch in FUSIONS
            if switch not in WITHOUT_KERNELS
        ),
        "O0",
    ],
)
def test_every_optimisation_can_be_switched_off(built: tuple[Path, Path], opt: str) -> None:
    folder, path = built
    fused, plain = logits(path, folder), logits(compile_qwen(folder, opt), folder)
    assert np.isfinite(fused).all()
    scale = np.abs(plain).max()
    # Two float32 routes that add in another order; logits here are of order `scale`.
    assert np.abs(fused - plain).max() <= 1e-4 * scale, (opt, scale)


def test_debug_dump_has_every_phase(config_dir: MakeConfig, tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    compile_library(config_dir(), "cpu", tmp_path / "x.so", debug_dump=dump)
    names = [path.stem.split("_", 1)[1] for path in sorted(dump.iterdir())]
    assert names == ["export", "bind", "fuse", "legalize", "plan_memory", "lower"]
    assert "dequantize" in (dump / "01_export.py").read_text()
    fused = (dump / "03_fuse.py").read_text()
    assert "add_rms_norm" in fused and "dequantize" not in fused.split("def ")[0]


def refused(source: Path, output: Path, **options: Any) -> str:
    """The message of a compilation that must be refused and must leave no file."""
    before = sorted(output.parent.iterdir()) if output.parent.is_dir() else []
    with pytest.raises(InputError) as caught:
        compile_library(source, options.pop("target", "cpu"), output, **options)
    assert (sorted(output.parent.iterdir()) if output.parent.is_dir() else []) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_bad_requests_are_refused_before_the_work(config_dir: MakeConfig, tmp_path: Path) -> None:
    folder = config_dir()
    out = tmp_path / "out"
    out.mkdir()
    assert "closest: cpu" in refused(folder, out / "x.so", target="cpus")
    assert "ends in .so" in refused(folder, out / "x.wasm")
    assert "--opt" in refused(folder, out / "x.so", opt="O9")
    assert "the budget is 1.0 MiB" in refused(folder, out / "x.so", budget=1 << 20)
    assert "context_windows" in refused(folder, out / "x.so", overrides={"context_windows": 1})
    assert "prefill_chunk_size" in refused(
        folder, out / "x.so", overrides={"prefill_chunk_size": 4096}
    )
    assert "at most 1" in refused(folder, out / "x.so", overrides={"tensor_parallel_shards": 2})
    assert "does not exist" in refused(folder, out / "missing" / "x.so")
    assert "gen_config" in refused(tmp_path, out / "x.so")
    (tmp_path / "file").write_text("")
    assert "--debug-dump" in refused(folder, out / "x.so", debug_dump=tmp_path / "file" / "d")
    (out / "dir.so").mkdir()
    assert "is a directory" in refused(folder, out / "dir.so")
    assert "no such CPU" in refused(folder, out / "x.so", target="cpu:z80")


def test_a_failed_compilation_keeps_the_old_library(
    config_dir: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlc_compile.targets import cpu

    folder, output = config_dir(), tmp_path / "x.so"
    output.write_bytes(b"old")

    def broken() -> list[str]:
        raise EnvironmentLacksError("no linker for shared libraries")

    monkeypatch.setattr(cpu, "linker", broken)
    with pytest.raises(EnvironmentLacksError, match="no linker"):
        compile_library(folder, "cpu", output)
    assert output.read_bytes() == b"old"
    assert not list(tmp_path.glob(".*"))


def test_no_linker_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from mlc_compile.targets import cpu

    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(EnvironmentLacksError, match="pip install ziglang") as caught:
        cpu.linker()
    assert caught.value.exit_code == 3


def test_mismatched_parameters_are_refused(built: tuple[Path, Path], tmp_path: Path) -> None:
    from mlc_compile.runtime.engine import Library, bind_params
    from mlc_compile.weights.tensor_cache import TensorCacheWriter

    _, path = built
    library = Library(path)
    wanted = library.params
    odd = [*wanted[1:]]
    with TensorCacheWriter(tmp_path, odd) as writer:
        for param in odd:
            writer.write(param.name, np.zeros(param.shape, param.dtype), 0)
        writer.finish(writer.seal(range(len(writer.shards))), source_elements=1)
    with pytest.raises(InputError, match="do not belong together: 1 parameters differ, first"):
        bind_params(library, tmp_path)


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    from mlc_compile.runtime.engine import Library

    path = tmp_path / "x.so"
    path.write_bytes(b"\x7fELF not really")
    with pytest.raises(InputError, match="not a loadable model library"):
        Library(path)
    with pytest.raises(InputError, match="no such library"):
        Library(tmp_path / "y.so")


def test_metadata_is_json_with_sorted_keys(built: tuple[Path, Path]) -> None:
    from mlc_compile.runtime.engine import Library

    text = str(Library(built[1]).vm["_metadata"]())
    assert json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) == text


@pytest.mark.parametrize("name", [n for n, p in TARGETS.items() if p.max_windowed_sequences])
def test_windowed_sequences_are_limited_where_the_runtime_limits_them(
    tmp_path: Path, name: str
) -> None:
    folder = write_config(tmp_path, "mistral", sliding_window=32)
    sizes = {"sliding_window_size": 32, "max_batch_size": 2}
    with pytest.raises(InputError, match=r"with a sliding window .* serves 1 sequence at a time"):
        compile_library(folder, name, tmp_path / "model.so", overrides=sizes)
    assert not (tmp_path / "model.so").exists()


def test_a_web_tool_chain_is_for_wasm(tmp_path: Path) -> None:
    folder = write_config(tmp_path)
    for target in ("cpu", "webgpu"):
        with pytest.raises(InputError, match=r"--web-toolchain emscripten is for \.wasm libraries"):
            compile_library(folder, target, tmp_path / "model.so", web_toolchain="emscripten")


def test_the_stated_binding_limit_reaches_the_exporter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is checked against it again after linking."""
    from mlc_compile.targets import webgpu

    class StopError(Exception):
        pass

    def export(self: object, mod: object, target: object, request: ExportRequest) -> list[str]:
        raise StopError(request.max_binding_bytes)

    monkeypatch.setattr(webgpu.WebGPUBackend, "export", export)
    folder = write_config(tmp_path)
    for given, reached in ((None, 1 << 30), (3 << 30, 3 << 30)):
        with pytest.raises(StopError, match=str(reached)):
            compile_library(folder, "webgpu", tmp_path / "m.so", max_binding_bytes=given)
