"""`package`, and the real model's library for an iPhone: what is in it and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lief
import numpy as np
import pytest
from compiler_configs import read_inputs, write_config

from mlc_compile.compiler import package as package_module
from mlc_compile.compiler.build import CompileReport, compile_library
from mlc_compile.compiler.inputs import load_inputs
from mlc_compile.compiler.memory import estimate_plan
from mlc_compile.compiler.package import APP_CONFIG, LIBRARY, package, read_package_config
from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.targets.embedded import read_metadata
from mlc_compile.targets.profile import get_target

MODELS = {"tiny-llama": ("llama", "q4f16_1"), "tiny-qwen3": ("qwen3", "q3f16_1")}


def write_model(folder: Path, model_type: str, quantization: str, **config: Any) -> Path:
    """A directory as convert_weight and gen_config leave it, with parameters of zeros."""
    from mlc_compile.manifest import MANIFEST, SCHEMA, hash_file, parameter_schema_id
    from mlc_compile.quantization.policy import stored_params
    from mlc_compile.weights.tensor_cache import TensorCacheWriter

    folder.mkdir(parents=True)
    write_config(folder, model_type, quantization, **config)
    inputs = read_inputs(folder)
    params = [s for spec in inputs.model.parameters() for s in stored_params(spec, inputs.scheme)]
    with TensorCacheWriter(folder, params) as writer:
        for param in params:
            writer.write(param.name, np.zeros(param.shape, param.dtype), 0)
        writer.finish(writer.seal(range(len(writer.shards))), source_elements=1)
    files = [hash_file(path, path.name) for path in folder.iterdir() if path.suffix == ".bin"]
    document = {
        "schema": SCHEMA,
        "format_version": 1,
        "parameter_schema_id": parameter_schema_id(params),
        "files": [{"name": f.name, "nbytes": f.nbytes, "sha256": f.sha256} for f in files],
        "tensors": [],
    }
    (folder / MANIFEST).write_text(json.dumps(document))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.so").write_text("a library for this machine")
    return folder


def write_package(folder: Path, *entries: dict[str, Any], **top: Any) -> Path:
    path = folder / "mlc-package-config.json"
    path.write_text(json.dumps({"device": "iphone", "model_list": list(entries), **top}))
    return path


def entry(model_id: str, **more: Any) -> dict[str, Any]:
    return {"model": model_id, "model_id": model_id, "bundle_weight": True, **more}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one directory for each of MODELS."""
    folder = tmp_path_factory.mktemp("models")
    for name, (model_type, quantization) in MODELS.items():
        write_model(folder / name, model_type, quantization)
    return folder


@pytest.fixture(scope="module")
def compiled(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """compile_library, which compiles each library once and then copies it."""
    cache: dict[Any, tuple[Path, CompileReport]] = {}
    folder = tmp_path_factory.mktemp("compiled")

    def cached(source: Path, target: str, output: Path, **options: Any) -> CompileReport:
        options.pop("progress", None)
        key = (source, target, json.dumps(options, sort_keys=True))
        if key not in cache:
            kept = folder / f"{len(cache)}.tar"
            cache[key] = (kept, compile_library(source, target, kept, **options))
        kept, report = cache[key]
        shutil.copyfile(kept, output)
        return report

    return cached


@pytest.fixture(scope="module")
def packaged(
    models: Path, compiled: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """(dist, report) of both models."""
    dist = tmp_path_factory.mktemp("packaged") / "dist"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package_module, "compile_library", compiled)
        config = write_package(
            models,
            entry("tiny-llama", estimated_vram_bytes=1),
            entry("tiny-qwen3", model_lib="my-qwen3-model", overrides={"context_window_size": 64}),
            {**entry("again"), "model": "tiny-llama"},
        )
        report = package(config, dist)
    return dist, report


def test_the_app_finds_what_was_made(models: Path, packaged: tuple[Path, Any]) -> None:
    dist, report = packaged
    found = sorted(str(p.relative_to(dist)) for p in dist.rglob("*") if p.is_file())
    folder = models / "tiny-llama"
    files = {p.name for p in folder.iterdir()} - {"model.so"}
    assert {f"bundle/tiny-llama/{name}" for name in files} <= set(found)
    assert len(found) == 2 + 3 * len(files) and f"lib/{LIBRARY}" in found
    for name in files:
        assert (dist / "bundle" / "again" / name).read_bytes() == (folder / name).read_bytes()
    # What MLC's app decodes: AppConfig.ModelRecord
    document = json.loads((dist / "bundle" / APP_CONFIG).read_text())
    assert list(document) == ["model_list"]
    records = {record["model_id"]: record for record in document["model_list"]}
    assert list(records) == ["tiny-llama", "tiny-qwen3", "again"]
    for model_id, record in records.items():
        assert record.keys() == {"model_id", "model_lib", "model_path", "estimated_vram_bytes"}
        assert record["model_path"] == model_id
    assert records["tiny-qwen3"]["model_lib"] == "my-qwen3-model"
    assert records["again"]["model_lib"] == records["tiny-llama"]["model_lib"], "one library"
    assert any("estimated_vram_bytes is 1 in the file" in note for note in report.notes)
    assert any(
        "tiny-qwen3" in line and "64 tokens" in line for line in report.to_text().split("\n")
    )


def test_the_memory_is_the_plan_of_the_library(packaged: tuple[Path, Any], models: Path) -> None:
    dist, _ = packaged
    metadata = read_metadata(dist / "lib" / LIBRARY)  # the first of both
    records = json.loads((dist / "bundle" / APP_CONFIG).read_text())["model_list"]
    name = metadata["mlc_compile"]["system_lib_prefix"].removesuffix("_")
    (record,) = {
        r["estimated_vram_bytes"]: r for r in records if r["model_lib"].replace("-", "_") == name
    }.values()
    assert record["estimated_vram_bytes"] == metadata["mlc_compile"]["memory_plan"]["total"]
    profile, _ = get_target("iphone")
    inputs = load_inputs(models / "tiny-llama", profile, {})
    estimate = estimate_plan(inputs.model, inputs.scheme, inputs.config, profile)
    assert abs(records[0]["estimated_vram_bytes"] - estimate.total) <= 0.05 * estimate.total


def test_the_archive_holds_both_models_for_ios(packaged: tuple[Path, Any], tmp_path: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "targets"))
    from apple_objects import lld

    from mlc_compile.targets.apple.check import RUNTIME_SYMBOLS, SYSTEM_SYMBOLS

    dist, report = packaged
    archive = dist / "lib" / LIBRARY
    command = [sys.executable, "-m", "ziglang", "ar", "x", str(archive)]
    subprocess.run(command, cwd=tmp_path, check=True)
    objects = sorted(tmp_path.iterdir())
    assert len(objects) == 4
    prefixes = {m.model_lib.replace("-", "_") + "_" for m in report.models}
    defined: set[str] = set()
    for path in objects:
        fat = lief.MachO.parse(str(path))
        assert fat is not None
        binary = fat.at(0)
        assert binary.build_version.platform.name == "IOS"
        assert list(binary.build_version.minos)[:2] == [16, 0]
        external = [s for s in binary.symbols if int(s.raw_type) & 1]
        undefined = {str(s.name) for s in external if not int(s.raw_type) & 0x0E}
        assert undefined <= RUNTIME_SYMBOLS | SYSTEM_SYMBOLS
        defined |= {str(s.name) for s in external} - undefined
    for prefix in prefixes:
        # MLC: system://NAME -> NAME with _ for -, and one _ more
        assert f"_{prefix}__tvm_ffi__library_bin" in defined
        assert f"___tvm_ffi_{prefix}softmax_with_temperature" not in defined  # in the bytecode
    lld("ios", [archive], tmp_path / "app.dylib")


def test_a_second_package_has_the_same_bytes_and_replaces_the_first(
    models: Path,
    packaged: tuple[Path, Any],
    compiled: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(package_module, "compile_library", compiled)
    dist = tmp_path / "dist"
    (dist / "lib").mkdir(parents=True)
    (dist / "lib" / "libmlc_llm.a").write_text("another tool's")
    first = entry("tiny-llama"), {**entry("gone"), "model": "tiny-llama"}
    package(write_package(models, *first), dist)
    before = (dist / "lib" / LIBRARY).read_bytes()
    package(write_package(models, *first), tmp_path / "again")
    assert (tmp_path / "again" / "lib" / LIBRARY).read_bytes() == before
    app = f"bundle/{APP_CONFIG}"
    assert (tmp_path / "again" / app).read_bytes() == (dist / app).read_bytes()

    url = "https://example.org/tiny"
    package(
        write_package(models, {"model": "tiny-llama", "model_id": "far", "model_url": url}), dist
    )
    assert sorted(p.name for p in dist.iterdir()) == ["bundle", "lib"]
    assert [p.name for p in (dist / "bundle").iterdir()] == [APP_CONFIG]
    assert (dist / "lib" / LIBRARY).read_bytes() == before
    assert (dist / "lib" / "libmlc_llm.a").read_text() == "another tool's"
    (record,) = json.loads((dist / app).read_text())["model_list"]
    assert record["model_url"] == url and "model_path" not in record


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(28, "No space left on device"), InputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failed_move_brings_the_old_package_back(
    error: BaseException,
    seen: type[BaseException],
    models: Path,
    compiled: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(package_module, "compile_library", compiled)
    config, dist = write_package(models, entry("tiny-llama")), tmp_path / "dist"
    package(config, dist)

    def state() -> dict[str, bytes]:
        return {str(p.relative_to(dist)): p.read_bytes() for p in dist.rglob("*") if p.is_file()}

    before = state()
    real = package_module.os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == APP_CONFIG and Path(source).parts[-3:-2] == ("new",):
            raise error
        real(source, target)

    monkeypatch.setattr(package_module.os, "replace", failing)
    with pytest.raises(seen, match="No space left" if seen is InputError else None):
        package(config, dist)
    assert state() == before
    assert sorted(p.name for p in dist.iterdir()) == ["bundle", "lib"]


def test_a_library_made_before_is_taken(
    models: Path, compiled: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package_module, "compile_library", compiled)
    library = tmp_path / "mine.tar"
    options = {"overrides": {}, "opt": "O2", "budget": 2_800_000_000}
    compiled(models / "tiny-llama", "iphone", library, system_lib_prefix="my_llama_", **options)
    monkeypatch.setattr(package_module, "compile_library", None)  # a call would fail
    mine = {"model_lib_path_for_prepare_libs": {"my-llama": str(library)}}
    report = package(
        write_package(models, entry("tiny-llama", model_lib="my-llama"), **mine), tmp_path / "dist"
    )
    assert report.models[0].vram == read_metadata(library)["mlc_compile"]["memory_plan"]["total"]
    with pytest.raises(InputError, match="its list of parameters is sha256:"):
        package(
            write_package(models, entry("tiny-qwen3", model_lib="my-llama"), **mine),
            tmp_path / "wrong",
        )
    other = {"model_lib_path_for_prepare_libs": {"my-other-llama": str(library)}}
    with pytest.raises(InputError, match="prefix is my_llama_, and tiny-llama needs my_other"):
        package(
            write_package(models, entry("tiny-llama", model_lib="my-other-llama"), **other),
            tmp_path / "wrong",
        )
    assert not (tmp_path / "wrong").exists()


REFUSED = {
    "unknown key": (
        [entry("tiny-llama", quantization="q4f16_1")],
        {},
        "unknown key 'quantization'",
    ),
    "unknown top key": ([entry("tiny-llama")], {"models": []}, "unknown key 'models'"),
    "android": ([entry("tiny-llama")], {"device": "android"}, "device is 'android'"),
    "no models": ([], {}, "at least one model"),
    "no id": ([{"model": "tiny-llama"}], {}, "needs both model and model_id"),
    "remote": ([entry("x", model="HF://mlc-ai/x")], {}, "is remote"),
    "remote url": ([entry("x", model="https://example.org/x")], {}, "is remote"),
    "no directory": ([entry("absent")], {}, "gen_config"),
    "bad id": ([entry("../tiny-llama")], {}, "becomes a folder's name"),
    "same id": ([entry("tiny-llama"), entry("tiny-llama")], {}, "two models have the model_id"),
    "no weights": ([{"model": "tiny-llama", "model_id": "a"}], {}, '"bundle_weight": true'),
    "both": ([entry("tiny-llama", model_url="https://a.example/")], {}, "not both"),
    "bad size": ([entry("tiny-llama", overrides={"context": 1})], {}, "overrides: context = 1"),
    "not a size": ([entry("tiny-llama", overrides={"max_batch_size": "1"})], {}, "whole numbers"),
    "short prefix": ([entry("tiny-llama", model_lib="abc")], {}, "8 are the least"),
    "bad prefix": ([entry("tiny-llama", model_lib="llama 3.2")], {}, "only letters, digits"),
    "same prefix": (
        [entry("tiny-llama", model_lib="one-model"), entry("tiny-qwen3", model_lib="one_model")],
        {},
        "tiny-llama and tiny-qwen3 both have the model_lib 'one_model'",
    ),
    "prefix of a prefix": (
        [entry("tiny-llama", model_lib="one-model"), entry("tiny-qwen3", model_lib="one-model-b")],
        {},
        "is the beginning of that of tiny-qwen3",
    ),
    "unused library": (
        [entry("tiny-llama")],
        {"model_lib_path_for_prepare_libs": {"a": "mlc-package-config.json"}},
        "no model's model_lib",
    ),
    "no library": (
        [entry("tiny-llama", model_lib="some-model")],
        {"model_lib_path_for_prepare_libs": {"some-model": "absent.tar"}},
        "there is no file 'absent.tar'",
    ),
    "too long": (
        [entry("tiny-llama", overrides={"context_window_size": 512})],
        {},
        "context_window_size",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_configurations_are_refused_before_the_work(
    case: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, top, message = REFUSED[case]
    monkeypatch.setattr(package_module, "compile_library", None)  # a call would fail
    config = write_package(models, *entries, **top)
    with pytest.raises(InputError) as caught:
        package(config, tmp_path / "dist")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "dist").exists()


def test_parameters_of_another_scheme_or_cut_are_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package_module, "compile_library", None)
    mixed = shutil.copytree(models / "tiny-llama", tmp_path / "mixed")
    write_config(mixed, "llama", "q3f16_1")
    with pytest.raises(InputError, match="are not those of its configuration"):
        package(write_package(tmp_path, entry("mixed")), tmp_path / "dist")
    cut = shutil.copytree(models / "tiny-llama", tmp_path / "cut")
    shard = cut / "params_shard_0.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match="another size than manifest"):
        package(write_package(tmp_path, entry("cut")), tmp_path / "dist")


def test_a_missing_tool_is_said_before_the_work(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlc_compile.targets.apple import tools

    def missing(name: str) -> str:
        raise tools.metadata.PackageNotFoundError(name)

    config = write_package(models, entry("tiny-llama"))
    monkeypatch.setattr(package_module, "compile_library", None)
    monkeypatch.setattr(package_module, "require_tvm", lambda: None)  # asks for versions too
    monkeypatch.setattr(tools.metadata, "version", missing)
    with pytest.raises(EnvironmentLacksError, match=r"mlc-compile\[metal\]") as caught:
        package(config, tmp_path / "dist")
    assert caught.value.exit_code == 3 and not (tmp_path / "dist").exists()


def test_the_context_is_lowered_to_what_fits_unless_it_is_asked_for(
    models: Path, compiled: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def noting(source: Path, target: str, output: Path, **options: Any) -> CompileReport:
        asked.append(options["overrides"])
        return compiled(source, target, output, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(package_module, "compile_library", noting)
    profile, _ = get_target("iphone")

    def total(context: int) -> int:
        inputs = load_inputs(models / "tiny-llama", profile, {"context_window_size": context})
        return estimate_plan(inputs.model, inputs.scheme, inputs.config, profile).total

    full, budget = total(128), total(80)
    assert budget < full
    config = write_package(models, entry("tiny-llama"))
    report = package(config, tmp_path / "fits", budget=budget)
    assert asked == [{"context_window_size": 80}] and report.models[0].context == 80
    assert report.models[0].vram <= budget < total(96)
    assert any("the largest that fits" in note for note in report.notes)
    explicit = write_package(models, entry("tiny-llama", overrides={"context_window_size": 128}))
    with pytest.raises(InputError, match="what fits: q4f16_1 with a context of 80, or q3f16_1"):
        package(explicit, tmp_path / "refused", budget=budget)
    with pytest.raises(InputError, match="nothing fits: q3f16_1 with a context of 16 tokens"):
        package(config, tmp_path / "refused", budget=1000)


def test_paths_are_relative_to_the_configuration(models: Path) -> None:
    path = write_package(models, entry("tiny-llama"))
    assert read_package_config(path).entries[0].source == models / "tiny-llama"
    assert read_package_config(models).entries == read_package_config(path).entries


def test_compile_refuses_a_prefix_that_no_app_could_use(models: Path, tmp_path: Path) -> None:
    source = models / "tiny-llama"
    with pytest.raises(InputError, match="8 are the least"):
        compile_library(source, "iphone", tmp_path / "x.a", system_lib_prefix="abc_")
    with pytest.raises(InputError, match=r"a \.so for iphone is none"):
        compile_library(source, "iphone", tmp_path / "x.so", system_lib_prefix="abcdefgh_")
    with pytest.raises(InputError, match=r"ends in \.tar or \.a or \.so"):
        compile_library(source, "iphone", tmp_path / "x.dylib")
    with pytest.raises(InputError, match=r"bfloat16, which iphone cannot"):
        write_config(tmp_path, "llama", "q0bf16")
        compile_library(tmp_path, "iphone", tmp_path / "x.a")
    assert [p.name for p in tmp_path.iterdir()] == ["mlc-chat-config.json"]


def test_a_whole_compilation_is_reproducible(
    models: Path, packaged: tuple[Path, Any], tmp_path: Path
) -> None:
    """A compilation of its own, to a file of another name, gives the objects of the package."""
    from mlc_compile.runtime.inspect import inspect_artifact
    from mlc_compile.targets.apple.macho import parse_archive

    path = tmp_path / "another_name.a"
    report = compile_library(models / "tiny-llama", "iphone", path)
    assert report.nbytes == path.stat().st_size
    metadata = read_metadata(path)
    assert metadata["prefill_chunk_size"] <= 128 and metadata["max_batch_size"] == 1
    prefix = metadata["mlc_compile"]["system_lib_prefix"]
    assert re.fullmatch(r"llama_q4f16_1_[0-9a-f]{16}_", prefix)
    text = inspect_artifact(path).to_text()
    assert "static library (archive)" in text and f"{prefix[:-1]} (prefix {prefix})" in text
    both = parse_archive((packaged[0] / "lib" / LIBRARY).read_bytes(), LIBRARY)
    first = {name: data for _, name, data in both.members if name.startswith(prefix)}
    own = {name: data for _, name, data in parse_archive(path.read_bytes(), "x.a").members}
    assert len(own) == 2 and own == first


def test_plan_says_where_it_fits_and_what_would(tmp_path: Path) -> None:
    """The command, on the shape of Llama-3.2-3B: too much for a phone of 4 GB."""
    from click.testing import CliRunner

    from mlc_compile.cli import main

    write_config(
        tmp_path,
        "llama",
        "q4f16_1",
        sizes={"context_window_size": 2048, "prefill_chunk_size": 1024},
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
    )
    words = ["plan", str(tmp_path), "--target", "iphone"]
    plain = CliRunner().invoke(main, words)
    assert plain.exit_code == 0, plain.stderr
    assert "fits iphone-6gb," in plain.stderr and "not iphone-4gb," in plain.stderr
    words += ["--budget", "iphone-4gb"]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 2
    found = re.search(r"what fits: (\w+) with a context of (\d+)", refused.stderr)
    assert found, refused.stderr
    words += ["--quantization", found[1], "--overrides", f"context_window_size={found[2]}"]
    assert CliRunner().invoke(main, words).exit_code == 0


def test_no_buffer_above_a_gigabyte(tmp_path: Path) -> None:
    """A phone of 8 GB refused one of 2.25 GB; the embedding of this one is 1.05 GB."""
    from click.testing import CliRunner

    from mlc_compile.cli import main

    wide = {"hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 128256}
    write_config(tmp_path, "llama", "q0f16", **wide)
    with pytest.raises(InputError, match=r"embed_tokens.weight takes .* at most 953\.7 MiB"):
        compile_library(tmp_path, "iphone", tmp_path / "x.a")
    planned = CliRunner().invoke(main, ["plan", str(tmp_path), "--target", "iphone"])
    assert planned.exit_code == 2 and "embed_tokens.weight takes" in planned.stderr
    assert CliRunner().invoke(main, ["plan", str(tmp_path), "--target", "macos"]).exit_code == 0
