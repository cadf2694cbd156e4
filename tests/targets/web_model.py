"""A tiny model for web tests: what a library needs in names, with one kernel."""

from __future__ import annotations

import json
from typing import Any

METADATA: dict[str, Any] = {
    "model_type": "tiny",
    "kv_state_kind": "kv_cache",
    "prefill_chunk_size": 8,
    "params": [{"name": "w", "shape": [4, 8], "dtype": "float32"}],
    "note": "Grüße, \u4f60\u597d",
}
FUNCTIONS = [
    "_metadata",
    "add_one",
    "apply_bitmask_inplace",
    "apply_logit_bias_inplace",
    "apply_penalty_inplace",
    "argsort_probs",
    "create_tir_paged_kv_cache",
    "decode",
    "embed",
    "prefill",
    "sample_with_top_p",
    "softmax_with_temperature",
]


def build_executable(dtype: str = "float32") -> Any:
    """`add_one(x dtype[n])` as a kernel, `_metadata()`, and every other function as a copy."""
    from tvm import ir, relax, tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.target import Target
    from tvm.tirx.script.builder import ir as T

    n = tirx.Var("n", "int32")
    with IRBuilder() as built, T.prim_func(is_private=False, s_tir=False):
        T.func_name("add_one_tir")
        T.func_attr({"global_symbol": "add_one_tir", "tirx.is_scheduled": True})
        x = T.arg("x", T.buffer((n,), dtype))
        y = T.arg("y", T.buffer((n,), dtype))
        with (
            T.launch_thread("blockIdx.x", tirx.ceildiv(n, tirx.const(64, "int32"))) as block,
            T.launch_thread("threadIdx.x", tirx.const(64, "int32")) as thread,
        ):
            i = block * 64 + thread
            with T.If(i < n), T.Then():
                T.buffer_store(y, tirx.BufferLoad(x, [i]) + tirx.const(1, dtype), [i])
    length = tirx.Var("n", "int64")
    builder = relax.BlockBuilder()
    kernel = builder.add_func(built.get(), "add_one_tir")
    for name in FUNCTIONS:
        if name == "_metadata":
            with builder.function(name, []):
                builder.emit_func_output(ir.StringImm(json.dumps(METADATA)))
            continue
        value = relax.Var("x", relax.TensorType((length,), dtype))
        with builder.function(name, [value]):
            result = relax.call_tir(kernel, [value], relax.TensorType((length,), dtype))
            builder.emit_func_output(builder.emit(result))
    target = Target(
        {"kind": "webgpu", "host": {"kind": "llvm", "mtriple": "wasm32-unknown-unknown-wasm"}}
    )
    return relax.build(builder.get(), target, system_lib=True)
