"""The memory planner: exact bytes for weights, cache and workspace, from numbers alone.

`estimate_plan` needs no TVM and no weights; `static_workspace` reads what the compiler really
planned. They must agree within 5 % (tests/compiler/test_memory.py), and the static plan is the one
that a library carries.

    weights    every stored parameter kv_cache   pages of 16 tokens x layers x 2 x kv heads x head
    dim x bytes, for every sequence of the batch,
               and the cache's own buffers for one prefill chunk (q, k, v, output, log-sum-exp)
    workspace  storages of the transformer stack and of the logits at the declared upper bounds
    reserve    what the runtime takes beside these (per target)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from mlc_compile.compiler.workspace import logits_bytes, stack_workspace
from mlc_compile.config import CompileConfig
from mlc_compile.errors import InputError
from mlc_compile.models.spec import Model
from mlc_compile.quantization.policy import stored_params
from mlc_compile.quantization.scheme import QuantScheme, numpy_dtype
from mlc_compile.targets.profile import TargetProfile

if TYPE_CHECKING:
    from tvm.ir import IRModule

PLANNED = ("prefill_tokens", "decode_tokens", "prefill", "decode", "batch_prefill", "batch_decode")
"""The functions that generation calls. `batch_verify` and `get_logits` return logits of as many
rows as their caller gives them, which is the caller's to plan."""

PAGE_TOKENS = 16  # notes/tvm.md: the page size is fixed in the attention kernels


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device."""

    weights: int
    kv_cache: int
    workspace: int
    reserve: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.workspace + self.reserve

    def with_workspace(self, workspace: int) -> MemoryPlan:
        """The same with another workspace, the compiler's own."""
        return replace(self, workspace=workspace)

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}

    def to_text(self) -> str:
        """A small table, one part a line."""
        rows = [(name.replace("_", " "), size) for name, size in self.to_json().items()]
        return "\n".join(f"  {name:<10} {format_bytes(size):>10}" for name, size in rows)


def weight_bytes(model: Model, scheme: QuantScheme) -> int:
    """Bytes of all stored parameters."""
    return sum(
        stored.nbytes for spec in model.parameters() for stored in stored_params(spec, scheme)
    )


def kv_cache_pages(config: CompileConfig) -> int:
    """Pages that vm.builtin.paged_attention_kv_cache_create makes for these sizes."""
    tokens = config.kv_tokens * config.max_batch_size
    pages = math.ceil(tokens / PAGE_TOKENS) + 1
    if config.sliding_window_size > 0:
        pages += 2 * config.max_batch_size  # first and last page of each window are partly used
    return pages


def largest_binding(model: Model, scheme: QuantScheme, config: CompileConfig) -> tuple[str, int]:
    """(what it is, bytes) of the largest buffer that a kernel binds: a parameter, the cache pages
    of one layer, or an activation of a whole prefill chunk."""
    c, size = model.config, numpy_dtype(scheme.model_dtype).itemsize
    rows = max(config.prefill_chunk_size, config.max_batch_size)
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    inner = 2 * c.intermediate_size
    if c.experts is not None:
        inner = max(inner, 2 * c.experts.per_token * c.experts.intermediate_size)
    widest = max(inner, heads * c.cache_head_dim, c.hidden_size)
    found = {
        f"the parameter {stored.name}": stored.nbytes
        for spec in model.parameters()
        for stored in stored_params(spec, scheme)
    }
    page = 2 * c.num_key_value_heads * PAGE_TOKENS * c.cache_head_dim * size
    found["one layer of the KV cache"] = kv_cache_pages(config) * page
    found["an activation of one prefill chunk"] = rows * widest * size
    return max(found.items(), key=lambda item: item[1])


def check_binding(found: tuple[str, int], limit: int | None, target: str) -> None:
    """Refuse a buffer that a device of the target may not bind (`limit` bytes).

    Raises:
        InputError: says which and what would make it fit.
    """
    what, nbytes = found
    if limit is None or nbytes <= limit:
        return
    raise InputError(
        f"{what} takes {format_bytes(nbytes)}, and a kernel for {target} may bind at most "
        f"{format_bytes(limit)}",
        hint="take a smaller scheme or a smaller context_window_size or prefill_chunk_size; "
        "compile's --max-binding-size states another limit if every device you ship to has it",
    )


def kv_cache_bytes(model: Model, dtype: str, config: CompileConfig) -> int:
    """Pages of all layers, and the buffers that the cache keeps for one prefill chunk."""
    c, size = model.config, numpy_dtype(dtype).itemsize
    page = 2 * c.num_key_value_heads * PAGE_TOKENS * c.cache_head_dim * size
    pages = kv_cache_pages(config) * page * c.num_hidden_layers
    q_and_out = 2 * c.num_attention_heads * c.cache_head_dim * size
    k_and_v = 2 * c.num_key_value_heads * c.cache_head_dim * size
    log_sum_exp = 2 * c.num_attention_heads * 4
    return pages + config.prefill_chunk_size * (q_and_out + k_and_v + log_sum_exp)


def estimate_workspace(model: Model, dtype: str, config: CompileConfig) -> int:
    """What the compiler plans for the largest of the functions in PLANNED, without compiling."""
    c, size = model.config, numpy_dtype(dtype).itemsize
    rows = max(config.prefill_chunk_size, config.max_batch_size)
    row = c.hidden_size * size
    logits = logits_bytes(c, size, model.arch.head_bias is True)
    prefill_tokens = config.prefill_chunk_size * row + row + logits
    batch_prefill = config.max_batch_size * (row + logits)
    return stack_workspace(model, rows, size) + max(prefill_tokens, batch_prefill)


def estimate_plan(
    model: Model, scheme: QuantScheme, config: CompileConfig, profile: TargetProfile
) -> MemoryPlan:
    """The plan from metadata alone, without compiling."""
    return MemoryPlan(
        weights=weight_bytes(model, scheme),
        kv_cache=kv_cache_bytes(model, scheme.model_dtype, config),
        workspace=estimate_workspace(model, scheme.model_dtype, config),
        reserve=profile.runtime_reserve_bytes,
    )


def static_workspace(mod: IRModule, bounds: Mapping[str, int]) -> dict[str, int]:
    """Bytes that each Relax function allocates after the phase plan_memory, callees included.

    Planned storages are constants; results, which are handed out and not planned, are counted at
    `bounds`.
    """
    from tvm import DataType, relax
    from tvm.ir import GlobalVar

    own: dict[str, int] = {}
    calls: dict[str, list[str]] = {}
    functions = {
        gv.name_hint: f for gv, f in mod.functions_items() if isinstance(f, relax.Function)
    }

    def bound_values(sequence: relax.SeqExpr) -> Iterator[relax.Expr]:
        """Every expression that is bound to a variable, also in branches."""
        for block in sequence.blocks:
            for binding in block.bindings:
                yield binding.value
                if isinstance(binding.value, relax.If):
                    yield from bound_values(binding.value.true_branch)
                    yield from bound_values(binding.value.false_branch)

    def global_vars(call: relax.Call) -> Iterator[str]:
        """Functions that a call calls or hands to a builtin, as those of CUDA graphs are."""
        for expr in (call.op, *call.args):
            for part in expr.fields if isinstance(expr, relax.Tuple) else [expr]:
                if isinstance(part, GlobalVar):
                    yield str(part.name_hint)

    for name, func in functions.items():
        sizes: list[int] = []
        callees: list[str] = []
        for value in bound_values(func.body):
            if not isinstance(value, relax.Call):
                continue
            callees += [callee for callee in global_vars(value) if callee in functions]
            operator = getattr(value.op, "name", "")
            if operator == "relax.memory.alloc_storage":
                sizes.append(math.prod(_value(e, bounds) for e in value.args[0].values))
            elif operator == "relax.builtin.alloc_tensor":
                elements = math.prod(_value(e, bounds) for e in value.args[0].values)
                sizes.append(elements * int(DataType(str(value.ty.dtype)).bits) // 8)
        own[name], calls[name] = sum(sizes), callees

    def total(name: str) -> int:
        return own[name] + max((total(callee) for callee in calls[name]), default=0)

    return {name: total(name) for name in own}


def _value(extent: Any, bounds: Mapping[str, int]) -> int:
    """An extent (products and sums of constants and bounded variables) at its largest."""
    from tvm import ir, tirx

    if isinstance(extent, tirx.IntImm):
        return int(extent)
    if isinstance(extent, ir.Var):
        return bounds[str(extent.name)]
    if isinstance(extent, tirx.Mul):
        return _value(extent.a, bounds) * _value(extent.b, bounds)
    if isinstance(extent, tirx.Add):
        return _value(extent.a, bounds) + _value(extent.b, bounds)
    raise TypeError(f"no upper bound for the extent {extent}")


def check_budget(plan: MemoryPlan, budget: int | None, remedy: str | None = None) -> None:
    """Refuse a plan above the budget (bytes). remedy: what would fit, where that is known.

    Raises:
        InputError: says the parts and what would make it fit.
    """
    if budget is None or plan.total <= budget:
        return
    parts = ", ".join(f"{k} {format_bytes(v)}" for k, v in plan.to_json().items() if k != "total")
    raise InputError(
        f"the plan needs {format_bytes(plan.total)} and the budget is {format_bytes(budget)} "
        f"({parts})",
        hint=remedy
        or "lower --context-window-size, --max-batch-size or --prefill-chunk-size, take a "
        "smaller scheme, or let `mlc_compile plan --fit --budget ...` choose",
    )


def format_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"; binary units, one decimal."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError
