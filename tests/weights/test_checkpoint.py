"""Hugging Face directories and our safetensors parser, the friendly and the hostile."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from mlc_compile.errors import InputError
from mlc_compile.weights.checkpoint import SOURCE_FORMATS, open_checkpoint
from mlc_compile.weights.files import MappedFile
from mlc_compile.weights.reader import numpy_dtype
from mlc_compile.weights.st import DTYPES, SafetensorsFile

sys.path.insert(0, str(Path(__file__).parent))
from hf_files import entry, f32, header_bytes, make_dir, st_bytes

# --- reading what is right ---------------------------------------------------------------------


@pytest.mark.parametrize(("code", "name"), DTYPES.items())
def test_every_dtype_reads_back_bit_for_bit(tmp_path: Path, code: str, name: str) -> None:
    dtype = numpy_dtype(name)
    raw = np.random.default_rng(1).integers(0, 2, 12 * dtype.itemsize, np.uint8)
    array = raw.view(dtype).reshape(4, 3)
    file = tmp_path / "x.safetensors"
    file.write_bytes(st_bytes({"a": (code, array), "empty": (code, array[:0])}))
    reader = SafetensorsFile(file)
    info = reader.tensors["a"]
    assert (info.shape, info.dtype, info.nbytes, info.file) == ((4, 3), name, raw.size, file.name)
    got = reader.read("a")
    assert got.dtype == dtype
    assert got.tobytes() == array.tobytes()
    assert reader.read("a", slice(1, 3)).tobytes() == array[1:3].tobytes()
    assert reader.read("empty").shape == (0, 3)


@pytest.mark.parametrize("code", ["F32", "F16", "I64", "U8", "BOOL"])
def test_the_reference_library_agrees_with_our_writer_of_test_files(
    tmp_path: Path, code: str
) -> None:
    array = np.arange(6).reshape(2, 3).astype(numpy_dtype(DTYPES[code]))
    file = tmp_path / "x.safetensors"
    file.write_bytes(st_bytes({"a": (code, array)}))
    with safe_open(file, "np") as theirs:
        np.testing.assert_array_equal(theirs.get_tensor("a"), array)
    np.testing.assert_array_equal(SafetensorsFile(file).read("a"), array)


@pytest.fixture(scope="module")
def tiny_llama():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard", ["10GB", "12KB"])
def test_what_transformers_saves(tiny_llama, tmp_path: Path, dtype: str, shard: str) -> None:
    torch = pytest.importorskip("torch")
    model = tiny_llama.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    sharded = (tmp_path / "model.safetensors.index.json").exists()
    assert sharded == (shard == "12KB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "safetensors"
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.generation_config["bos_token_id"] == 1
    state = model.state_dict()
    assert set(checkpoint.tensors) == set(state)
    for name, expected in state.items():
        assert checkpoint.tensors[name].dtype == dtype
        # bf16 by its bits: torch and ml_dtypes share no numpy type
        got = checkpoint.read(name)
        assert got.dtype == numpy_dtype(dtype)
        bits = {2: np.uint16, 4: np.uint32}[got.dtype.itemsize]
        wanted = expected.view(getattr(torch, bits.__name__)).numpy()
        np.testing.assert_array_equal(got.view(bits), wanted)
    files = {path.name for path in checkpoint.source_files}
    assert "config.json" in files
    assert ("model.safetensors.index.json" in files) == sharded
    assert len([name for name in files if name.endswith(".safetensors")]) == (
        len(list(tmp_path.glob("*.safetensors")))
    )


def test_reads_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    array = f32(64, 16)
    make_dir(tmp_path, {"model.safetensors": st_bytes({"a": ("F32", array)})})
    checkpoint = open_checkpoint(tmp_path)
    rows = checkpoint.read("a", slice(8, 24))
    assert np.shares_memory(rows, checkpoint.read("a"))
    assert not rows.flags.writeable
    checkpoint.release()
    np.testing.assert_array_equal(rows, array[8:24])  # a view outlives the release of its pages


def test_unaligned_data_is_read_correctly(tmp_path: Path) -> None:
    array = f32(5, 3)
    raw = array.tobytes()
    header = {"b": entry("U8", [1], 0, 1), "a": entry("F32", [5, 3], 1, 61)}
    file = tmp_path / "x.safetensors"
    file.write_bytes(header_bytes(header) + b"\x07" + raw)
    np.testing.assert_array_equal(SafetensorsFile(file).read("a"), array)


def test_scalars_and_row_ranges(tmp_path: Path) -> None:
    arrays = {"s": ("F32", np.float32(3.5).reshape(())), "v": ("F32", f32(6))}
    file = tmp_path / "x.safetensors"
    file.write_bytes(st_bytes(arrays))
    reader = SafetensorsFile(file)
    assert reader.read("s").shape == ()
    assert reader.read("v", slice(4, 99)).shape == (2,)
    assert reader.read("v", slice(5, 2)).shape == (0,)
    with pytest.raises(ValueError, match="step 2"):
        reader.read("v", slice(0, 6, 2))
    with pytest.raises(ValueError, match="no rows"):
        reader.read("s", slice(0, 1))


def test_one_file_of_another_name_and_a_file_given_directly(tmp_path: Path) -> None:
    data = st_bytes({"a": ("F32", f32(2, 2))})
    make_dir(tmp_path, {"weights-final.safetensors": data})
    for path in (tmp_path, tmp_path / "weights-final.safetensors"):
        assert list(open_checkpoint(path).tensors) == ["a"]


# --- hostile and damaged files -----------------------------------------------------------------

A = entry("F32", [2], 0, 8)
HOSTILE_HEADERS = {
    "nothing": (b"", "cannot read"),
    "seven bytes": (b"1234567", "truncated"),
    "absurd length": ((2**63).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "length past the end": ((50).to_bytes(8, "little") + b"{}", "truncated"),
    "not JSON": (header_bytes(b"{'a': 1}"), "not valid JSON"),
    "not an object": (header_bytes([1]), "expected a JSON object"),
    "not UTF-8": (header_bytes(b'{"\xff": 1}'), "not UTF-8"),
    "nested too deep": (header_bytes(b'{"a":' * 100_000), "JSON"),
    "a key twice": (
        header_bytes(b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(A).encode() + b"}")
        + bytes(8),
        "appears twice",
    ),
    "entry is no object": (header_bytes({"a": 5}), "must state exactly"),
    "key missing": (header_bytes({"a": {"dtype": "F32", "shape": [2]}}), "must state exactly"),
    "key too many": (header_bytes({"a": {**A, "x": 1}}) + bytes(8), "must state exactly"),
    "unknown dtype": (header_bytes({"a": entry("F4", [2], 0, 8)}) + bytes(8), "dtype 'F4'"),
    "dtype no text": (header_bytes({"a": {**A, "dtype": []}}) + bytes(8), "dtype"),
    "negative dimension": (header_bytes({"a": entry("F32", [-2], 0, 8)}) + bytes(8), "shape"),
    "boolean dimension": (header_bytes({"a": entry("F32", [True, 2], 0, 8)}) + bytes(8), "shape"),
    "fractional dimension": (header_bytes({"a": entry("F32", [2.0], 0, 8)}) + bytes(8), "shape"),
    "offsets reversed": (header_bytes({"a": entry("F32", [2], 8, 0)}) + bytes(8), "data_offsets"),
    "three offsets": (
        header_bytes({"a": {**A, "data_offsets": [0, 4, 8]}}) + bytes(8),
        "data_offsets",
    ),
    "size not the shape's": (header_bytes({"a": entry("F32", [3], 0, 8)}) + bytes(8), "12 bytes"),
    "shape overflows": (
        header_bytes({"a": entry("F32", [2**62, 2**62], 0, 8)}) + bytes(8),
        "bytes by its shape",
    ),
    "past the end": (header_bytes({"a": entry("F32", [2**40], 0, 2**42)}) + bytes(8), "truncated"),
    "one byte short": (header_bytes({"a": A}) + bytes(7), "truncated"),
    "one byte too many": (header_bytes({"a": A}) + bytes(9), "after its last tensor"),
    "overlap": (header_bytes({"a": A, "b": entry("F32", [2], 4, 12)}) + bytes(12), "overlaps"),
    "the same bytes twice": (header_bytes({"a": A, "b": A}) + bytes(8), "overlaps"),
    "gap": (header_bytes({"a": A, "b": entry("F32", [1], 12, 16)}) + bytes(16), "leaves a gap"),
    "gap at the start": (header_bytes({"a": entry("F32", [1], 4, 8)}) + bytes(8), "leaves a gap"),
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_hostile_safetensors_are_one_clear_error(tmp_path: Path, case: str) -> None:
    data, message = HOSTILE_HEADERS[case]
    file = make_dir(tmp_path, {"model.safetensors": data}) / "model.safetensors"
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(tmp_path)
    text = str(caught.value)
    assert str(file) in text
    assert "\n" not in text


def test_damage_anywhere_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Random cuts and byte changes: InputError or a file that can be read, never another error."""
    good = st_bytes({"a": ("F32", f32(4, 4)), "b": ("BF16", f32(3).astype(ml_dtypes.bfloat16))})
    chooser = random.Random(7)
    file, refused = tmp_path / "x.safetensors", 0
    for _ in range(400):
        bad = bytearray(good)
        if chooser.random() < 0.3:
            bad = bad[: chooser.randrange(len(bad))]
        else:
            bad[chooser.randrange(200)] = chooser.randrange(256)
        file.write_bytes(bad)
        try:
            reader = SafetensorsFile(file)
            for name in reader.tensors:
                reader.read(name)
        except InputError:
            refused += 1
    assert refused > 200


def index(weight_map: object) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


ONE = st_bytes({"a": ("F32", f32(2))})
TWO = st_bytes({"b": ("F32", f32(2))})
HOSTILE_INDEXES = {
    "not JSON": (b"{", "not valid JSON"),
    "no map": (b"{}", "no weight_map"),
    "map of numbers": (index({"a": 1}), "no weight_map"),
    "missing shard": (index({"a": "gone.safetensors"}), "'gone.safetensors', which is not there"),
    "parent folder": (index({"a": "../x/one.safetensors"}), "not the name of a .safetensors file"),
    "absolute": (index({"a": "/etc/passwd"}), "not the name of a .safetensors file"),
    "backslashes": (index({"a": "..\\one.safetensors"}), "not the name of a .safetensors file"),
    "a pickle": (index({"a": "pytorch_model.bin"}), "not the name of a .safetensors file"),
    "tensor not there": (
        index({"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}),
        "'c' in one.safetensors, which doesn't have it",
    ),
    "tensor in the other": (
        index({"a": "two.safetensors", "b": "one.safetensors"}),
        "doesn't have it",
    ),
    "unlisted": (index({"a": "one.safetensors", "z": "three.safetensors"}), "doesn't list"),
    "twice": (index({"a": "one.safetensors", "b": "four.safetensors"}), "is both in"),
}


@pytest.mark.parametrize("case", HOSTILE_INDEXES)
def test_hostile_indexes_are_one_clear_error(tmp_path: Path, case: str) -> None:
    data, message = HOSTILE_INDEXES[case]
    make_dir(
        tmp_path,
        {
            "model.safetensors.index.json": data,
            "one.safetensors": ONE,
            "two.safetensors": TWO,
            "three.safetensors": st_bytes({"z": ("F32", f32(1)), "y": ("F32", f32(1))}),
            "four.safetensors": st_bytes({"b": ("F32", f32(1)), "a": ("F32", f32(1))}),
        },
    )
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path)


def test_single_file_and_unrelated_index(tmp_path: Path) -> None:
    files = {
        "model.safetensors.index.json": index({"a": "one.safetensors"}),
        "one.safetensors": ONE,
        "model.safetensors": TWO,
    }
    with pytest.raises(InputError, match="doesn't name it"):
        open_checkpoint(make_dir(tmp_path, files))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no .safetensors or .bin file"),
        ({"x.safetensors": ONE, "y.safetensors": TWO}, "2 safetensors files and no"),
        ({"model.safetensors": ONE, "generation_config.json": b"[]"}, "generation_config.json"),
    ],
)
def test_unusable_directories(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_checkpoint(make_dir(tmp_path, files))


def test_paths_that_are_not_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file or directory"):
        open_checkpoint(tmp_path / "gone")
    with pytest.raises(InputError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"no config\.json"):
        open_checkpoint(tmp_path, "safetensors")
    with pytest.raises(InputError, match=r"no \.gguf file"):
        open_checkpoint(tmp_path, "gguf")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"neither a \.safetensors nor a torch nor a GGUF"):
        open_checkpoint(tmp_path / "notes.txt")
    (tmp_path / "lone.safetensors").write_bytes(ONE)
    with pytest.raises(InputError, match=r"no config\.json beside"):
        open_checkpoint(tmp_path / "lone.safetensors")
    with pytest.raises(InputError, match=f"supported: {', '.join(SOURCE_FORMATS)}"):
        open_checkpoint(tmp_path, "tensorflow")


@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "loop"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.gguf"])
def test_special_files_are_refused_without_hanging(tmp_path: Path, kind: str, name: str) -> None:
    make_dir(tmp_path, {})
    path = tmp_path / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    for where in (tmp_path, path):
        with pytest.raises(InputError):
            open_checkpoint(where)
    with pytest.raises(InputError):
        MappedFile(path)
    index = {"weight_map": {"a": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError):
        open_checkpoint(tmp_path)


def test_links_to_files_elsewhere_are_followed(tmp_path: Path) -> None:
    """As the cache of Hugging Face's hub has them."""
    blobs = make_dir(tmp_path / "blobs", {"0123": ONE})
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(Path("../../blobs/config.json"))
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/0123"))
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.tensors["a"].file == "model.safetensors"
    assert list(checkpoint.source_files) == [
        snapshot / "config.json",
        snapshot / "model.safetensors",
    ]
    assert blobs.is_dir()


def test_sources_are_read_and_watched(tmp_path: Path) -> None:
    make_dir(tmp_path, {"model.safetensors": ONE})
    config, weights = open_checkpoint(tmp_path).sources
    assert (config.name, weights.name, weights.size) == (
        "config.json",
        "model.safetensors",
        len(ONE),
    )
    buffer = memoryview(bytearray(7))
    read = b""
    while count := weights.readinto(len(read), buffer):
        read += buffer[:count]
    assert read == ONE
    weights.check()
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    with pytest.raises(InputError, match="was changed while it was read"):
        weights.check()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot read"):
        weights.check()


def test_an_unknown_tensor_name_is_an_input_error(tmp_path: Path) -> None:
    make_dir(tmp_path, {"model.safetensors": ONE})
    with pytest.raises(InputError, match="no tensor 'lm_head'"):
        open_checkpoint(tmp_path).read("lm_head")


# --- tokenizer files of a directory -------------------------------------------------------------


def test_chat_template_files(tmp_path: Path) -> None:
    make_dir(tmp_path, {"model.safetensors": ONE})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tokenizer_config() == {}
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "</s>", "chat_template": "in config"}))
    assert checkpoint.tokenizer_config()["chat_template"] == "in config"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert checkpoint.tokenizer_config()["chat_template"] == "d"
    config.write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(InputError, match="tool_use and none called 'default'"):
        checkpoint.tokenizer_config()
    (tmp_path / "chat_template.jinja").write_text("own file", encoding="utf-8")
    assert checkpoint.tokenizer_config()["chat_template"] == "own file"
    config.write_text(json.dumps({"chat_template": 5}))
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="not text"):
        checkpoint.tokenizer_config()


def test_a_missing_tokenizer_says_what_is_there(tmp_path: Path) -> None:
    make_dir(tmp_path, {"model.safetensors": ONE, "tokenizer.model": b"x"})
    with pytest.raises(InputError, match=r"only tokenizer\.model; make one with transformers"):
        open_checkpoint(tmp_path).tokenizer_json()
