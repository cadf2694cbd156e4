"""The library's `_metadata`: MLC's fields, the compiled-program artifact, and ours
(notes/mlc-format.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mlc_compile.chat_config import OVERRIDES_KEY
from mlc_compile.compiler.memory import MemoryPlan
from mlc_compile.config import CompileConfig
from mlc_compile.manifest import CHAT_TASKS, interface_id, parameter_schema_id
from mlc_compile.models.spec import Model
from mlc_compile.quantization.policy import StoredParam
from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.targets.profile import TargetProfile

if TYPE_CHECKING:
    from tvm.ir import IRModule

FORMAT_VERSION = 1
# web-llm's other pair, prefill_tokens and decode_tokens, takes embeddings, ids and modalities at
# once: it is not the pair of functions that we export under these names (see nn/export.py).
PROGRAM_EXPORTS = {
    "embed_tokens": "embed",
    "create_kv_cache": "create_tir_paged_kv_cache",
    "prefill_embeds": "prefill",
    "decode_embeds": "decode",
}


def build_metadata(
    model: Model,
    scheme: QuantScheme,
    config: CompileConfig,
    params: Sequence[StoredParam],
    profile: TargetProfile,
    plan: MemoryPlan,
    memory_usage: Mapping[str, int],
    active_vocab_size: int,
    required_features: Sequence[str],
    largest_binding: int,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """What `_metadata()` returns, as a JSON object."""
    c = model.config
    schema = parameter_schema_id(params)
    return {
        "model_type": model.arch.name,
        "quantization": scheme.name,
        **({OVERRIDES_KEY: scheme.overrides_json()} if scheme.overrides else {}),
        "context_window_size": config.context_window_size,
        "sliding_window_size": config.sliding_window_size,
        "attention_sink_size": config.attention_sink_size,
        "prefill_chunk_size": config.prefill_chunk_size,
        "tensor_parallel_shards": config.tensor_parallel_shards,
        "pipeline_parallel_stages": 1,
        "disaggregation": False,
        "kv_state_kind": "kv_cache",
        "max_batch_size": config.max_batch_size,
        "active_vocab_size": active_vocab_size,
        "model_task": "chat",
        "params": [
            {
                "name": p.name,
                "shape": list(p.shape),
                "dtype": p.dtype,
                "preprocs": [],
                "pipeline_stages": [0],
            }
            for p in params
        ],
        "kv_cache": {
            "num_hidden_layers": c.num_hidden_layers,
            "num_attention_heads": c.num_attention_heads,
            "num_key_value_heads": c.num_key_value_heads,
            "head_dim": c.head_dim,
        },
        "memory_usage": dict(sorted(memory_usage.items())),
        "artifact": {
            "schema": "mlc.compiled-program",
            "schema_version": 1,
            "interface_id": interface_id(CHAT_TASKS),
            "parameter_schema_id": schema,
            "programs": {"default": {"kind": "token_generation", "exports": PROGRAM_EXPORTS}},
            "resources": {
                "required_features": list(required_features),
                "max_storage_buffer_binding_size": largest_binding,
                "estimated_device_memory_bytes": plan.total,
            },
        },
        "mlc_compile": {
            "format_version": FORMAT_VERSION,
            "version": version("mlc-compile"),
            "tvm": version("apache-tvm"),
            "tvm_ffi": version("apache-tvm-ffi"),
            "target": profile.name,
            "architecture_label": model.label,
            "architecture": model.identity(),
            "config_fingerprint": config_fingerprint(model, scheme),
            "parameter_schema_id": schema,
            "memory_plan": plan.to_json(),
            **extra,
        },
    }


def config_fingerprint(model: Model, scheme: QuantScheme) -> str:
    """sha256 over everything that fixes the graph's shapes and numbers, window sizes apart."""
    numbers = {
        "scheme": scheme.name,
        **({"overrides": scheme.overrides_json()} if scheme.overrides else {}),
        **{k: v for k, v in asdict(model.config).items() if k != "raw"},
        "structure": repr(model.arch.structure),
    }
    text = json.dumps(numbers, sort_keys=True, separators=(",", ":"), default=list)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def attach_metadata(mod: IRModule, metadata: Mapping[str, Any]) -> IRModule:
    """The module with `_metadata() -> str` added."""
    from tvm import ir, relax

    builder = relax.BlockBuilder(mod)
    with builder.function("_metadata", []):
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
        builder.emit_func_output(ir.StringImm(text))
    return builder.get()
