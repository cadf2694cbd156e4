"""Every reader of files that users bring, with a small valid file for each of them.

A parser is a folder of valid files, the one of them that is fuzzed, and what is read of the folder.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from mutations import Mutation, mutate_bytes, mutate_json, mutate_safetensors

sys.path.append(str(Path(__file__).parents[1] / "weights"))
from hf_files import f32, st_bytes
from packed_files import KINDS, pack_model

from mlc_compile.models.detect import load_model
from mlc_compile.models.params import expected_shapes

Mutate = Callable[[bytes, Sequence[Mutation]], bytes]

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [256],
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
}


@dataclass(frozen=True)
class Parser:
    """`read` reads the folder `files` are in; `victim` names the file that `mutate` changes."""

    name: str
    files: dict[str, bytes]
    victim: str
    mutate: Mutate
    read: Callable[[Path], object]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _every_tensor(folder: Path, name: str = "", **options: Any) -> None:
    """Opens a checkpoint as convert_weight does, and reads all that it then reads."""
    from mlc_compile.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(folder / name if name else folder, **options)
    for tensor in checkpoint.tensors:
        checkpoint.read(tensor)
        checkpoint.read(tensor, slice(0, 1)) if checkpoint.tensors[tensor].shape else None
        if tensor in checkpoint.reader.packed:
            checkpoint.reader.read_packed(tensor, slice(0, 1))


def _tokenizer(folder: Path, name: str = "") -> None:
    from mlc_compile.chat_config import build_config
    from mlc_compile.config import resolve_compile_config
    from mlc_compile.quantization.scheme import get_scheme
    from mlc_compile.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(folder / name if name else folder)
    files = checkpoint.tokenizer_files()
    checkpoint.tokenizer_config()
    model = load_model(checkpoint.config, where="config.json")
    sizes = resolve_compile_config(model.config)
    build_config(checkpoint, model, get_scheme("q4f16_1"), sizes, files, conv_template="raw")


def _config(folder: Path) -> None:
    from mlc_compile.config import read_json_strict, resolve_compile_config

    model = load_model(read_json_strict(folder / "config.json"), where="config.json")
    model.parameters()
    resolve_compile_config(model.config)


def _chat_config(folder: Path) -> None:
    from mlc_compile.chat_config import ChatConfig

    ChatConfig.read(folder / "mlc-chat-config.json").model().parameters()


def _cache(folder: Path) -> None:
    from mlc_compile.weights.tensor_cache import open_tensor_cache

    found = open_tensor_cache(folder, check_md5=False)
    for name in found.records:
        found.tensor(name)


def _check(folder: Path) -> None:
    from mlc_compile.runtime.inspect import inspect_artifact

    report = inspect_artifact(folder, check=True)
    report.to_text()
    report.to_json()


def _inspect(folder: Path, name: str) -> None:
    from mlc_compile.runtime.inspect import inspect_artifact

    report = inspect_artifact(folder / name)
    report.to_text()
    report.to_json()


# ---------------------------------------------------------------------------------------------
# Valid files


@cache
def tensors() -> dict[str, np.ndarray]:
    """All of CONFIG's model."""
    model = load_model(CONFIG, where="config.json")
    return {
        name: f32(*shape, seed=i)
        for i, spec in enumerate(model.parameters())
        for name, shape in expected_shapes(spec).items()
    }


def _st(arrays: Mapping[str, Any]) -> bytes:
    names = {"float32": "F32", "float16": "F16", "int32": "I32", "int8": "I8", "bfloat16": "BF16"}
    names |= {"uint8": "U8", "float8_e4m3fn": "F8_E4M3", "int64": "I64"}
    return st_bytes(
        {
            name: array if isinstance(array, tuple) else (names[array.dtype.name], array)
            for name, array in arrays.items()
        }
    )


def _tokenizer_files() -> dict[str, bytes]:
    import tempfile

    from tiny_models import save_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _gguf() -> bytes:
    import tempfile

    import gguf
    from tokenizers import pre_tokenizers

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in (
            ("block_count", 1),
            ("context_length", 64),
            ("embedding_length", 64),
            ("feed_forward_length", 64),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
            ("vocab_size", 259),
        ):
            writer.add_uint32(f"llama.{key}", value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_float32("llama.rope.freq_base", 1e4)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        writer.add_token_list([*alphabet, "ab", "<|im_start|>", "<|im_end|>"])
        writer.add_token_types([1] * 257 + [3, 3])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(257)
        writer.add_eos_token_id(258)
        writer.add_chat_template("{{ messages[0]['content'] }}")
        kinds = ("Q4_0", "Q8_0", "F16")
        for i, (name, shape) in enumerate(
            {
                "token_embd.weight": (259, 64),
                "output_norm.weight": (64,),
                "blk.0.attn_norm.weight": (64,),
                "blk.0.ffn_norm.weight": (64,),
                "blk.0.attn_q.weight": (64, 64),
                "blk.0.attn_k.weight": (32, 64),
                "blk.0.attn_v.weight": (32, 64),
                "blk.0.attn_output.weight": (64, 64),
                "blk.0.ffn_gate.weight": (64, 64),
                "blk.0.ffn_up.weight": (64, 64),
                "blk.0.ffn_down.weight": (64, 64),
            }.items()
        ):
            value, kind = f32(*shape, seed=i), gguf.GGMLQuantizationType[kinds[i % 3]]
            if len(shape) == 1:
                writer.add_tensor(name, value)
            else:
                writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _torch(**options: Any) -> bytes:
    import torch

    file = io.BytesIO()
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {"a.weight": base, "b.weight": base.t(), "c.bias": torch.ones(3).bfloat16()}
    torch.save(state, file, **options)
    return file.getvalue()


def _packed(kind: str) -> dict[str, bytes]:
    names = [n for n, a in tensors().items() if "proj" in n]
    written = pack_model(kind, {name: tensors()[name] for name in names})
    plain = {name: array for name, array in tensors().items() if name not in names}
    config = {**CONFIG, "quantization_config": written.config}
    return {"config.json": _json(config), "model.safetensors": _st({**plain, **written.tensors})}


def _adapter() -> dict[str, bytes]:
    config = {
        **{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
        **{"bias": "none", "task_type": "CAUSAL_LM", "rank_pattern": {"v_proj": 4}},
        "use_rslora": False,
    }
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    weights = {f"{stem}A.weight": f32(2, 64), f"{stem}B.weight": f32(64, 2)}
    return {"adapter_config.json": _json(config), "adapter_model.safetensors": _st(weights)}


@cache
def _converted() -> dict[str, bytes]:
    """What convert_weight and gen_config write."""
    import tempfile

    from mlc_compile.chat_config import gen_config
    from mlc_compile.config import resolve_compile_config
    from mlc_compile.quantization.scheme import get_scheme
    from mlc_compile.weights.checkpoint import open_checkpoint
    from mlc_compile.weights.convert import convert_weight

    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        source.mkdir()
        for name, data in {**_hf(), **_tokenizer_files()}.items():
            (source / name).write_bytes(data)
        checkpoint, scheme = open_checkpoint(source), get_scheme("q4f16_1")
        model = load_model(checkpoint.config, where="config.json")
        convert_weight(checkpoint, model, scheme, out)
        sizes = resolve_compile_config(model.config)
        gen_config(checkpoint, model, scheme, sizes, out, conv_template="raw")
        return {path.name: path.read_bytes() for path in out.iterdir()}


def _hf() -> dict[str, bytes]:
    return {"config.json": _json(CONFIG), "model.safetensors": _st(tensors())}


def _library() -> bytes:
    """What inspect reads of one: metadata with sorted keys between zero bytes."""
    plan = {"weights": 1, "kv_cache": 2, "workspace": 3, "reserve": 4, "total": 10}
    metadata = {
        "active_vocab_size": 10,
        "artifact": {},
        "context_window_size": 64,
        "mlc_compile": {
            **{"architecture_label": "stable", "functions": ["decode"], "memory_plan": plan},
            **{"parameter_schema_id": "x", "target": "cpu", "tvm": "1", "tvm_ffi": "1"},
            "version": "0",
        },
        "model_type": "llama",
        "params": [{"name": "a", "shape": [2, 3], "dtype": "float16", "preprocs": []}],
        "quantization": "q4f16_1",
    }
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()
    return b"\0\0" + text + b"\0\0"


def _tar(data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("lib0.o")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _metadata(data: bytes, changes: Sequence[Mutation]) -> bytes:
    """Changes of the metadata's JSON, or of all bytes."""
    if changes[0][2] % 4 == 0:
        return mutate_bytes(data, changes)
    text = _library().strip(b"\0")
    return data.replace(text, mutate_json(text, changes))


def _parsers() -> list[Parser]:
    config = {"config.json": _json(CONFIG)}
    split = sorted(tensors())
    halves = {
        "model-1-of-2.safetensors": _st({n: tensors()[n] for n in split[:5]}),
        "model-2-of-2.safetensors": _st({n: tensors()[n] for n in split[5:]}),
    }
    index = {n: list(halves)[i >= 5] for i, n in enumerate(split)}
    halves["model.safetensors.index.json"] = _json({"metadata": {}, "weight_map": index})
    bins = {
        "pytorch_model-1-of-1.bin": _torch(),
    }
    bins["pytorch_model.bin.index.json"] = _json(
        {
            "weight_map": dict.fromkeys(
                ("a.weight", "b.weight", "c.bias"), "pytorch_model-1-of-1.bin"
            )
        }
    )
    both = {**_hf(), **_tokenizer_files()}
    lora = {**_hf(), **{f"adapter/{name}": data for name, data in _adapter().items()}}
    found = [
        Parser("config", config, "config.json", mutate_json, _config),
        Parser("safetensors", _hf(), "model.safetensors", mutate_safetensors, _every_tensor),
        Parser(
            "safetensors index",
            {**config, **halves},
            "model.safetensors.index.json",
            mutate_json,
            _every_tensor,
        ),
        Parser(
            "torch index",
            {**config, **bins},
            "pytorch_model.bin.index.json",
            mutate_json,
            _every_tensor,
        ),
        Parser("tokenizer.json", both, "tokenizer.json", mutate_json, _tokenizer),
        Parser("tokenizer_config", both, "tokenizer_config.json", mutate_json, _tokenizer),
        Parser("adapter_config", lora, "adapter/adapter_config.json", mutate_json, _with_adapter),
        Parser(
            "adapter weights",
            lora,
            "adapter/adapter_model.safetensors",
            mutate_safetensors,
            _with_adapter,
        ),
        Parser("tensor-cache.json", _converted(), "tensor-cache.json", mutate_json, _cache),
        Parser("manifest.json", _converted(), "manifest.json", mutate_json, _check),
        Parser(
            "mlc-chat-config.json",
            _converted(),
            "mlc-chat-config.json",
            mutate_json,
            _chat_config,
        ),
    ]
    gguf_bytes = {"m.gguf": _gguf()}
    start = gguf_bytes["m.gguf"].index(b"output_norm.weight") + 900
    in_header = partial(mutate_bytes, within=start)
    found += [
        Parser("gguf", gguf_bytes, "m.gguf", in_header, partial(_every_tensor, name="m.gguf")),
        Parser(
            "gguf tokenizer", gguf_bytes, "m.gguf", in_header, partial(_tokenizer, name="m.gguf")
        ),
    ]
    for label, options in (("zip", {}), ("legacy", {"_use_new_zipfile_serialization": False})):
        files = {**config, "pytorch_model.bin": _torch(**options)}
        found.append(
            Parser(f"torch {label}", files, "pytorch_model.bin", mutate_bytes, _every_tensor)
        )
    for kind in KINDS:
        files = _packed(kind)
        found.append(Parser(f"{kind} config", files, "config.json", _section, _every_tensor))
    found.append(
        Parser("awq", _packed("awq"), "model.safetensors", mutate_safetensors, _every_tensor)
    )
    for suffix, data in (
        (".so", b"\x7fELF" + struct.pack("<Q", 7) + _library()),
        (".wasm", b"\0asm\1\0\0\0" + _library()),
        (".tar", _tar(_library())),
    ):
        name = f"model{suffix}"
        found.append(
            Parser(
                f"library {suffix}",
                {name: data},
                name,
                _metadata,
                partial(_inspect, name=name),
            )
        )
    return found


def _with_adapter(folder: Path) -> None:
    _every_tensor(folder, lora=[folder / "adapter"])


def _section(data: bytes, changes: Sequence[Mutation]) -> bytes:
    """Changes of `quantization_config` alone."""
    config = json.loads(data)
    section = mutate_json(json.dumps(config.pop("quantization_config")).encode(), changes)
    return json.dumps(config).encode()[:-1] + b', "quantization_config": ' + section + b"}"


@cache
def parsers() -> dict[str, Parser]:
    """By name."""
    return {parser.name: parser for parser in _parsers()}


NAMES = (
    *("config", "safetensors", "safetensors index", "torch index", "tokenizer.json"),
    *("tokenizer_config", "adapter_config", "adapter weights", "tensor-cache.json"),
    *("manifest.json", "mlc-chat-config.json", "gguf", "gguf tokenizer", "torch zip"),
    *("torch legacy", *(f"{kind} config" for kind in KINDS), "awq"),
    *("library .so", "library .wasm", "library .tar"),
)
