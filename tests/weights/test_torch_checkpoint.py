"""Checkpoints written by torch.save, read without pickle: what is right, damaged and hostile."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import random
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlc_compile.errors import InputError
from mlc_compile.weights import torch_file, torch_pickle
from mlc_compile.weights.checkpoint import open_checkpoint
from mlc_compile.weights.reader import numpy_dtype
from mlc_compile.weights.torch_file import TorchFile
from mlc_compile.weights.torch_pickle import TorchTensor, unpickle

sys.path.insert(0, str(Path(__file__).parent))
from hf_files import f32, make_dir, st_bytes

torch = pytest.importorskip("torch")


def raw(tensor: Any) -> bytes:
    """A tensor's bytes, row by row."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def tensors() -> dict[str, Any]:
    torch.manual_seed(1)
    base = torch.randn(6, 8)
    return {
        "float32": base,
        "parameter": torch.nn.Parameter(torch.randn(5, 3)),
        "half": torch.randn(4, 4).half(),
        "bfloat16": torch.randn(7, 5).bfloat16(),
        "double": torch.randn(2, 2).double(),
        "float8": torch.randn(3, 3).to(torch.float8_e4m3fn),
        "int64": torch.arange(5),
        "uint16": torch.arange(5).to(torch.uint16),
        "bool": torch.tensor([True, False]),
        "transposed": torch.randn(4, 9).bfloat16().t(),
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "same storage": base.view(8, 6),
        "part of it": base[2:4],
        "columns": base[:, 3:5],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
    }


SAVED = {
    "zip": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "protocol 3": {"pickle_protocol": 3},
    "protocol 4": {"pickle_protocol": 4},
    "protocol 5": {"pickle_protocol": 5},
    "legacy, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}


@pytest.mark.parametrize("how", SAVED)
def test_tensors_are_those_that_torch_loads(tmp_path: Path, how: str) -> None:
    file = tmp_path / "x.pt"
    state = tensors()
    if "legacy" in how:  # for which torch.load knows no newer dtypes
        del state["float8"], state["uint16"]
    torch.save(state, file, **SAVED[how])
    # Its own safe reader doesn't know protocol 4.
    ours, theirs = TorchFile(file), torch.load(file, weights_only=how in ("zip", "legacy"))
    assert list(ours.tensors) == list(theirs)
    for name, expected in theirs.items():
        info, got = ours.tensors[name], ours.read(name)
        assert info.shape == got.shape == tuple(expected.shape)
        assert info.dtype == str(expected.dtype).removeprefix("torch.")
        assert got.dtype == numpy_dtype(info.dtype)
        assert got.tobytes() == raw(expected), name
        assert not got.flags.writeable or got.size == 0
        if expected.ndim and len(expected):
            rows = ours.read(name, slice(1, 3))
            assert rows.tobytes() == raw(expected[1:3]), name
    ours.release()


def test_shared_and_transposed_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save(tensors(), file)
    ours = TorchFile(file)
    assert np.shares_memory(ours.read("float32"), ours.read("same storage"))
    assert np.shares_memory(ours.read("transposed", slice(2, 5)), ours.read("transposed"))


def test_module_state_with_metadata(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    file = tmp_path / "x.pt"
    torch.save(module.state_dict(), file)  # an OrderedDict with an attribute, `_metadata`
    ours = TorchFile(file)
    assert set(ours.tensors) == set(module.state_dict())
    assert ours.read("0.weight").tobytes() == raw(module[0].weight)


@pytest.mark.parametrize("key", torch_file.WRAPPERS)
def test_a_dict_of_tensors_under_a_usual_name(tmp_path: Path, key: str) -> None:
    file = tmp_path / "x.pt"
    state = {"a": torch.ones(2)}
    torch.save({key: state, "epoch": 3, "lr": 0.5, "name": "x", "none": None}, file)
    assert list(TorchFile(file).tensors) == ["a"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": {"a": 1}, "ema": {"a": 2}}, "several sets of tensors: 'model', 'ema'"),
        ({"weird": {"a": 1}}, "its tensors under 'weird'"),
        ({"model": {"state_dict": {"a": 1}}}, "among its tensors, which is no tensor"),
        ({"epoch": 0}, "among its tensors, which is no tensor"),
        ({}, "no dict of tensors"),
        ([1], "no dict of tensors"),
        ({"a": 1, "b": None}, "'b' among its tensors"),
    ],
)
def test_what_is_no_dict_of_tensors(tmp_path: Path, state: Any, message: str) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        return torch.ones(2) if value else value

    file = tmp_path / "x.pt"
    torch.save(filled(state), file)
    with pytest.raises(InputError, match=message):
        TorchFile(file)


def test_a_long_legacy_file(tmp_path: Path) -> None:
    state = {f"model.layers.{i}.mlp.down_proj.weight": torch.full((2,), i) for i in range(1000)}
    torch.save(state, tmp_path / "x", _use_new_zipfile_serialization=False)
    ours = TorchFile(tmp_path / "x")
    assert list(ours.tensors) == list(state)
    assert ours.read("model.layers.999.mlp.down_proj.weight").tolist() == [999, 999]


# --- directories --------------------------------------------------------------------------------


def save(directory: Path, name: str, state: dict[str, Any]) -> Path:
    make_dir(directory, {})
    torch.save(state, directory / name)
    return directory


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_directory_and_a_file_of_it(tmp_path: Path, name: str) -> None:
    save(tmp_path, name, {"a": torch.ones(2, 3)})
    torch.save({"args": 1}, tmp_path / "training_args.bin")  # what transformers leaves there
    torch.save({"state": 1}, tmp_path / "optimizer.pt")
    for path in (tmp_path, tmp_path / name):
        for source_format in ("auto", "torch"):
            checkpoint = open_checkpoint(path, source_format)
            assert checkpoint.format == "torch"
            assert list(checkpoint.tensors) == ["a"]
            assert {f.name for f in checkpoint.source_files} == {"config.json", name}


def test_safetensors_are_preferred_and_torch_can_be_asked_for(tmp_path: Path) -> None:
    save(tmp_path, "pytorch_model.bin", {"b": torch.ones(2)})
    (tmp_path / "model.safetensors").write_bytes(st_bytes({"a": ("F32", f32(2))}))
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]
    assert list(open_checkpoint(tmp_path, "torch").tensors) == ["b"]
    with pytest.raises(InputError, match="not a file of the format safetensors"):
        open_checkpoint(tmp_path / "pytorch_model.bin", "safetensors")


def sharded(directory: Path, weight_map: Any) -> Path:
    save(directory, "one.bin", {"a": torch.ones(2)})
    save(directory, "two.bin", {"b": torch.zeros(3), "c": torch.zeros(1)})
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


def test_shards_by_their_index(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one.bin", "b": "two.bin", "c": "two.bin"})
    checkpoint = open_checkpoint(tmp_path)
    assert {name: info.file for name, info in checkpoint.tensors.items()} == {
        "a": "one.bin",
        "b": "two.bin",
        "c": "two.bin",
    }
    assert checkpoint.read("b").shape == (3,)
    assert "pytorch_model.bin.index.json" in {f.name for f in checkpoint.source_files}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../one.bin"}, "not the name of a .bin file"),
        ({"a": "/etc/passwd"}, "not the name of a .bin file"),
        ({"a": "one.safetensors"}, "not the name of a .bin file"),
        ({"a": "gone.bin"}, "which is not there"),
        ({"a": "one.bin", "b": "one.bin"}, "which doesn't have it"),
        ({"a": "one.bin", "b": "two.bin"}, "doesn't list"),
    ],
)
def test_hostile_indexes(tmp_path: Path, weight_map: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_checkpoint(sharded(tmp_path, weight_map))


def test_several_files_without_index(tmp_path: Path) -> None:
    save(tmp_path, "one.bin", {"a": torch.ones(2)})
    save(tmp_path, "two.pt", {"b": torch.ones(2)})
    with pytest.raises(InputError, match=r"2 torch files and no pytorch_model\.bin\.index\.json"):
        open_checkpoint(tmp_path)


# --- what would run code ------------------------------------------------------------------------


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["zip", "legacy", "protocol 4"])
def test_a_malicious_checkpoint_does_nothing(tmp_path: Path, how: str) -> None:
    proof = tmp_path / "proof"
    file = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2), "b": Evil(f"touch {proof}")}, file, **SAVED[how])
    with pytest.raises(InputError, match=r"would run code: it asks for '(posix|nt)\.system'") as e:
        TorchFile(file)
    assert "\n" not in str(e.value)
    assert not proof.exists()
    torch.load(file, weights_only=False)  # and it does where pickle is used
    assert proof.exists()


def machine(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


PROGRAMS = {
    "import": (machine(b"cos\nsystem\n"), "asks for 'os.system'"),
    "builtins": (machine(b"cbuiltins\neval\n"), "asks for 'builtins.eval'"),
    "getattr": (machine(b"c__builtin__\ngetattr\n"), "asks for '__builtin__.getattr'"),
    "near the list": (
        machine(b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n"),
        "would run code",
    ),
    "stack global": (machine(word("os"), word("system"), b"\x93"), "asks for 'os.system'"),
    "a module with a space": (machine(b"ctorch x\nFloatStorage\n"), "would run code"),
    "inst": (machine(b"(ios\nsystem\n"), "instruction INST"),
    "obj": (machine(b"(ctorch\nSize\no"), "instruction OBJ"),
    "newobj": (machine(b"ctorch\nSize\n)\x81"), "instruction NEWOBJ"),
    "extension": (machine(b"\x82\x01"), "instruction EXT1"),
    "out of band": (machine(b"\x97"), "instruction NEXT_BUFFER"),
    "set": (machine(b"\x8f"), "instruction EMPTY_SET"),
    "call of text": (machine(word("a"), b")R"), "calls what is no function"),
    "call of a storage": (machine(b"ctorch\nFloatStorage\n)R"), "calls torch.FloatStorage"),
    "call of a dtype": (machine(b"ctorch\nfloat32\n)R"), "calls torch.float32"),
    "dict of arguments": (machine(b"ccollections\nOrderedDict\nK\x01\x85R"), "with 1 arguments"),
    "state of a list": (machine(b"]}b"), "sets the state"),
    "keys of tuples": (machine(b"})Ns"), "keys of the type tuple"),
    "a key twice": (machine(b"}", word("a"), b"N", b"s", word("a"), b"N", b"s"), "'a' twice"),
    "underflow": (machine(b"\x85"), "damaged"),
    "no mark": (machine(b"NNt"), "damaged"),
    "mark as a value": (machine(b"(\x85"), "damaged"),
    "memo": (machine(b"h\x07"), "damaged"),
    "full stack": (machine(b"NN"), "damaged"),
    "append to a dict": (machine(b"}Na"), "damaged"),
    "item of a list": (machine(b"]NNs"), "damaged"),
    "persistent id": (machine(word("storage"), b"Q"), "damaged"),
    "a size of text": (
        machine(
            b"((" + word("storage") + b"ctorch\nFloatStorage\n",
            word("0") + word("cpu") + word("9") + b"tQ",
        ),
        "damaged",
    ),
    "text past the end": (b"\x80\x02X\xff\xff\xff\x7fabc", "damaged"),
    "bytes of 2^62": (b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little"), "damaged"),
    "unknown opcode": (b"\x80\x02\xff.", "damaged"),
    "no end": (b"\x80\x02N", "damaged|truncated"),
    "nothing": (b"", "damaged|truncated"),
    "a long number": (machine(b"I" + b"9" * 100_000 + b"\n"), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROGRAMS)
def test_programs_are_refused_in_one_line(case: str) -> None:
    program, message = PROGRAMS[case]
    with pytest.raises(InputError, match=message) as caught:
        unpickle(program, "x: data.pkl")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_containers_that_hold_themselves_and_deep_ones_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, _ = unpickle(machine(b"]q\x00h\x00a"), "x")  # l = []; l.append(l)
    assert found[0] is found
    with pytest.raises(InputError, match="no dict of tensors"):
        torch_file._state_dict(found, "x")
    deep, _ = unpickle(machine(b"]" * 100_000, b"a" * 99_999), "x")
    assert torch_file._tensors_in(deep) == []
    monkeypatch.setattr(torch_pickle, "_MAX_INSTRUCTIONS", 1000)
    with pytest.raises(InputError, match="too many instructions"):
        unpickle(machine(b"N" * 1000), "x")


def test_every_instruction_is_handled_or_refused() -> None:
    """No opcode of pickletools makes another error, whatever the stack is."""
    chooser = random.Random(3)
    codes = [op.code.encode("latin-1") for op in pickletools.opcodes]
    refused = 0
    for _ in range(3000):
        program = b"".join(
            chooser.choice(codes) + bytes(chooser.choices(range(4), k=chooser.randrange(4)))
            for _ in range(chooser.randrange(1, 12))
        )
        try:
            unpickle(program, "x")
        except InputError:
            refused += 1
    assert refused > 2000


# --- damaged files ------------------------------------------------------------------------------


def rewritten(source: Path, target: Path, change: Any, **options: Any) -> Path:
    """The archive written again, its records (name -> bytes) changed."""
    with zipfile.ZipFile(source) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    change(records)
    with zipfile.ZipFile(target, "w", **options) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return target


def without(name: str) -> Any:
    return lambda records: records.pop(name)


def with_data(name: str, data: bytes) -> Any:
    return lambda records: records.__setitem__(name, data)


ARCHIVES = {
    "compressed": (lambda r: None, {"compression": zipfile.ZIP_DEFLATED}, "is compressed"),
    "no pickle": (without("x/data.pkl"), {}, "torch.save has not written"),
    "two pickles": (with_data("y/data.pkl", b""), {}, "torch.save has not written"),
    "no storage": (without("x/data/0"), {}, "lacks the storage '0'"),
    "short storage": (with_data("x/data/0", bytes(8)), {}, "has 8 bytes, its tensors say 24"),
    "TorchScript": (with_data("x/constants.pkl", b""), {}, "TorchScript"),
    "big-endian": (with_data("x/byteorder", b"big"), {}, "little-endian"),
    "rest after the pickle": (
        lambda r: r.__setitem__("x/data.pkl", r["x/data.pkl"] + b"N."),
        {},
        "after its end",
    ),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_that_torch_did_not_write(tmp_path: Path, case: str) -> None:
    change, options, message = ARCHIVES[case]
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "x.pt")
    same = rewritten(tmp_path / "x.pt", tmp_path / "same.pt", lambda records: None)
    assert TorchFile(same).read("a").sum() == 6
    with pytest.raises(InputError, match=message):
        TorchFile(rewritten(tmp_path / "x.pt", tmp_path / "bad.pt", change, **options))


def pickled_tensor(**changes: Any) -> bytes:
    """data.pkl of one float32 tensor "a", some of its numbers others."""
    number = {"numel": 6, "offset": 0, "shape": (2, 3), "stride": (3, 1)} | changes

    class Storage: ...

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, Storage):
                return "storage", torch.FloatStorage, "0", "cpu", number["numel"]
            return None

    class Tensor:
        def __reduce__(self) -> Any:
            arguments = (Storage(), number["offset"], number["shape"], number["stride"], False, {})
            return torch._utils._rebuild_tensor_v2, arguments

    import io

    out = io.BytesIO()
    Pickler(out, 2).dump({"a": Tensor()})
    return out.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": 1}, "does not lie in its storage"),
        ({"offset": -1}, "damaged"),
        ({"shape": (2**40, 3), "stride": (0, 1)}, "does not lie in its storage"),
        ({"shape": (2**62, 2**62)}, "does not lie in its storage"),
        ({"shape": (2, 3), "stride": (2**62, 1)}, "does not lie in its storage"),
        ({"shape": (2, 3), "stride": (-3, 1)}, "damaged"),
        ({"shape": (2, 3), "stride": (3,)}, "damaged"),
        ({"shape": (2, True)}, "damaged"),
        ({"shape": (1,) * 40, "stride": (1,) * 40}, "damaged"),
        ({"numel": 2**62}, "has 24 bytes, its tensors say"),
        ({"numel": 5}, "does not lie in its storage"),
    ],
)
def test_tensors_outside_their_storage(tmp_path: Path, changes: Any, message: str) -> None:
    torch.save({"a": torch.arange(6).float().view(2, 3)}, tmp_path / "x.pt")

    def tampered(name: str, **numbers: Any) -> Path:
        change = with_data("x/data.pkl", pickled_tensor(**numbers))
        return rewritten(tmp_path / "x.pt", tmp_path / name, change)

    assert TorchFile(tampered("same.pt")).read("a").tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(InputError, match=message):
        TorchFile(tampered("bad.pt", **changes))


@pytest.mark.parametrize("how", ["zip", "legacy"])
def test_truncated_and_changed_files(tmp_path: Path, how: str) -> None:
    """Every cut is noticed; a changed byte is noticed or gives tensors, never another error."""
    torch.save({"a": torch.ones(40), "b": torch.zeros(3).bfloat16()}, tmp_path / "x", **SAVED[how])
    good, bad = (tmp_path / "x").read_bytes(), tmp_path / "bad.pt"
    chooser = random.Random(5)
    for cut in {chooser.randrange(len(good)) for _ in range(60)}:
        bad.write_bytes(good[:cut])
        with pytest.raises(InputError):
            TorchFile(bad)
    bad.write_bytes(good + b"x")
    with pytest.raises(InputError):
        TorchFile(bad)
    refused = 0
    for _ in range(200):
        changed = bytearray(good)
        changed[chooser.randrange(len(good))] ^= 1 << chooser.randrange(8)
        bad.write_bytes(changed)
        try:
            reader = TorchFile(bad)
            for name in reader.tensors:
                reader.read(name)
        except InputError:
            refused += 1
    assert refused > 20


def test_a_directory_of_many_records_is_refused_unread(tmp_path: Path) -> None:
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1 << 60, 1 << 60, 1 << 62, 4)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 4, 1)
    file = tmp_path / "x.pt"
    file.write_bytes(b"PK\x03\x04" + end64 + locator + end)
    with pytest.raises(InputError, match="truncated or damaged"):
        TorchFile(file)


def test_other_files_under_these_names(tmp_path: Path) -> None:
    for data, message in (
        (b"version https://git-lfs.github.com/spec/v1\n", "not a file that torch.save"),
        (b"\x80\x02N.", "not a file that torch.save"),
        (b"PK\x03\x04" + bytes(100), "no directory at its end"),
        (b"x", "not a file that torch.save"),
    ):
        file = tmp_path / "x.bin"
        file.write_bytes(data)
        with pytest.raises(InputError, match=message):
            TorchFile(file)


def test_expanded_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1, 3).expand(5, 3)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="does not lie in its storage"):
        TorchFile(tmp_path / "x.pt")
    assert isinstance(unpickle(pickled_tensor(), "x")[0]["a"], TorchTensor)
