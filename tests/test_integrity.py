"""Integrity of a converted and configured model: `inspect --check` tells whatever changes in it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import save_tokenizer

from mlc_compile.chat_config import gen_config
from mlc_compile.config import resolve_compile_config
from mlc_compile.errors import InputError, MlcError
from mlc_compile.manifest import check_directory, manifest_bytes, read_manifest
from mlc_compile.models.detect import load_model
from mlc_compile.models.params import expected_shapes
from mlc_compile.models.spec import Model
from mlc_compile.quantization.scheme import get_scheme
from mlc_compile.weights import tensor_cache
from mlc_compile.weights.checkpoint import Checkpoint, open_checkpoint
from mlc_compile.weights.convert import convert_weight

SCHEME = get_scheme("q4f16_1")
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 256,
}
WRITTEN = {
    *("params_shard_0.bin", "params_shard_1.bin", "tensor-cache.json", "manifest.json"),
    *("mlc-model-manifest.json", "mlc-chat-config.json"),
    *("tokenizer.json", "tokenizer_config.json"),
}


def opened(source: Path) -> tuple[Checkpoint, Model]:
    checkpoint = open_checkpoint(source)
    return checkpoint, load_model(checkpoint.config, where="test")


def convert(source: Path, out: Path, *, overwrite: bool = False) -> None:
    convert_weight(*opened(source), SCHEME, out, overwrite=overwrite)


def configure(source: Path, out: Path, *, overwrite: bool = False) -> None:
    checkpoint, model = opened(source)
    config = resolve_compile_config(model.config)
    gen_config(checkpoint, model, SCHEME, config, out, conv_template="raw", overwrite=overwrite)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random numbers."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_tokenizer(folder)
    model = load_model(CONFIG, where="test")
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32)
        for spec in model.parameters()
        for name, shape in expected_shapes(spec).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Converted into two shards of one size, then configured."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_cache.plan_shards, "__defaults__", (24 << 10,))
        convert(source, out)
    configure(source, out)
    assert {path.name for path in out.iterdir()} >= WRITTEN
    assert check_directory(out).ok
    yield out


def found(directory: Path) -> bool:
    """Whether the check tells of damage: by a difference or by refusing what it reads."""
    try:
        return not check_directory(directory).ok
    except MlcError:
        return True


def flips(whole: Path, copy: Path, per_file: int) -> list[str]:
    """Where a flipped bit is not found: in each file its first and last bits and random ones."""
    rng = random.Random(0)
    shutil.copytree(whole, copy)
    missed = []
    for path in sorted(copy.iterdir()):
        data = path.read_bytes()
        bits = 8 * len(data)
        for bit in {0, bits - 1, *(rng.randrange(bits) for _ in range(per_file))}:
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            if not found(copy):
                missed.append(f"{path.name}, bit {bit}")
        path.write_bytes(data)
    assert check_directory(copy).ok
    return missed


def test_a_flipped_bit_is_found_in_every_file(whole: Path, tmp_path: Path) -> None:
    assert flips(whole, tmp_path / "copy", 12) == []


@pytest.mark.slow
def test_many_flipped_bits_are_found(whole: Path, tmp_path: Path) -> None:
    assert flips(whole, tmp_path / "copy", 400) == []


def test_every_bit_of_the_manifest_counts(whole: Path, tmp_path: Path) -> None:
    """The end of it, where its own hash stands."""
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    path = copy / "manifest.json"
    data = path.read_bytes()
    for at in range(len(data) - 90, len(data)):
        for bit in range(0, 8, 3):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            assert found(copy), (at, bit)


def swap(directory: Path) -> None:
    a, b = (directory / f"params_shard_{i}.bin" for i in range(2))
    a.rename(directory / "aside")
    b.rename(a)
    (directory / "aside").rename(b)


def without_seal(directory: Path) -> None:
    document = read_manifest(directory)
    document.pop("manifest_sha256")
    (directory / "manifest.json").write_text(json.dumps(document))


def resealed(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        document = read_manifest(directory)
        change(document)
        (directory / "manifest.json").write_bytes(manifest_bytes(document))

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "an extra shard": lambda d: (d / "params_shard_7.bin").write_bytes(b"x"),
    "an extra tokenizer file": lambda d: (d / "merges.txt").write_bytes(b"a b"),
    "swapped shards": swap,
    "a manifest without its own hash": without_seal,
    "a configuration that is not listed": resealed(lambda m: m.pop("configuration")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_other_damage_is_found(name: str, whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    DAMAGE[name](copy)
    assert not check_directory(copy).ok


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_a_missing_or_cut_file_is_found(name: str, whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    data = (copy / name).read_bytes()
    for kept in (data[:-1], data[: len(data) // 2], b"", data + b"\0"):
        (copy / name).write_bytes(kept)
        assert found(copy), len(kept)
    (copy / name).unlink()
    assert found(copy)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "C:\\x", "/etc/passwd", "a\0b"])
@pytest.mark.parametrize("where", ["files", "configuration"])
def test_files_outside_the_directory_are_refused(
    where: str, name: str, whole: Path, tmp_path: Path
) -> None:
    document = read_manifest(whole)
    section = document["configuration"]["files"] if where == "configuration" else document["files"]
    section[0]["name"] = name
    (tmp_path / "manifest.json").write_bytes(manifest_bytes(document))
    with pytest.raises(InputError, match="outside its directory"):
        check_directory(tmp_path)


def test_either_command_may_be_first(whole: Path, source: Path, tmp_path: Path) -> None:
    """Both orders and repetitions give the same list; the configuration alone has none."""
    configure(source, tmp_path)
    with pytest.raises(InputError, match="not complete"):
        check_directory(tmp_path)
    convert(source, tmp_path)
    assert check_directory(tmp_path).ok
    expected = read_manifest(whole)["configuration"]
    assert read_manifest(tmp_path)["configuration"] == expected
    manifest = (tmp_path / "manifest.json").read_bytes()
    convert(source, tmp_path, overwrite=True)
    configure(source, tmp_path, overwrite=True)
    assert (tmp_path / "manifest.json").read_bytes() == manifest
    (tmp_path / "mlc-chat-config.json").write_text("{}")
    (fault,) = check_directory(tmp_path).differences
    assert fault.startswith("mlc-chat-config.json: has 2 bytes")


def test_a_foreign_manifest_stays(source: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    configure(source, tmp_path)
    assert (tmp_path / "manifest.json").read_text() == '{"name": "a web page"}'
