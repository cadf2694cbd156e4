"""What a WebGPU library must keep to, checked on the linked module before anybody sees it.

The rules are those of stock npm @mlc-ai/web-llm 0.2.86, which bundles @mlc-ai/web-runtime
0.28.0-dev0. Where a number or list comes from is said beside it; "web-runtime" is the source code
of that package (tvm/web/src in the apache-tvm wheel is the same code), "web-llm" that of web-llm.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlc_compile.errors import CheckFailedError, InputError
from mlc_compile.targets.web import adapters, wasm
from mlc_compile.targets.web.toolchain import EXPORTS

# web-runtime, tvmjs_runtime_wasi.js: `wasmImports`, given both as env and as
# wasi_snapshot_preview1 …
_HOST_CALLS = (
    "clock_time_get",
    "emscripten_notify_memory_growth",
    "environ_get",
    "environ_sizes_get",
    "fd_close",
    "fd_read",
    "fd_seek",
    "fd_write",
    "proc_exit",
)
# … and environment.ts: `defaultEnv` and `newEnv`, added to env.
_ENV_CALLS = (
    "TVMFFIWasmFunctionDeleter",
    "TVMFFIWasmSafeCall",
    "__console_log",
    "__cxa_thread_atexit",
)
IMPORTS = frozenset(
    [(module, name) for module in ("env", "wasi_snapshot_preview1") for name in _HOST_CALLS]
    + [("env", name) for name in _ENV_CALLS]
)
"""(module, name) of every function that the JavaScript side provides."""

# web-llm, llm_chat.ts: the constructor of LLMChatPipeline and resolveModelABI.
_ALWAYS = (
    "_metadata",
    "apply_bitmask_inplace",
    "apply_logit_bias_inplace",
    "apply_penalty_inplace",
    "argsort_probs",
    "embed",
    "sample_with_top_p",
    "softmax_with_temperature",
)
_BY_STATE: Mapping[str, tuple[tuple[str, ...], ...]] = {
    # Each entry: the alternatives of which one must be there whole.
    "kv_cache": (
        ("prefill", "decode", "create_tir_paged_kv_cache"),
        ("batch_prefill", "batch_decode", "create_tir_paged_kv_cache"),
    ),
    "rnn_state": (
        ("prefill", "decode", "create_rnn_state"),
        ("batch_prefill", "batch_decode", "create_rnn_state"),
    ),
    "hybrid": (("batch_prefill", "batch_decode", "create_tir_paged_kv_cache", "create_rnn_state"),),
}

# web-runtime, webgpu.ts, detectGPUDevice: what is asked of the adapter. It asks for 1024
# invocations too but falls back to 256, which every adapter has.
MAX_BINDING_BYTES = 1 << 30
"""`max_storage_buffer_binding_size`: what web-llm asks an adapter for."""
DEFAULT_BINDING_BYTES = 1 << 27
"""What every WebGPU adapter has (W3C WebGPU, 3.6.2 limits); web-llm falls back to it."""
MAX_SHARED_BYTES = 32 << 10
MAX_STORAGE_BUFFERS = 10
# W3C WebGPU, 3.6.2 limits, defaults: web-runtime asks for no more.
MAX_INVOCATIONS = 256
MAX_GROUP_SIZE = (256, 256, 64)
MAX_UNIFORM_BUFFERS = 12

_HEADER = re.compile(
    r"^// Function: (?P<name>\S+)\n//-+\n// Function: (?P=name)\n//-+\n", re.MULTILINE
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# WGSL 17.13 and 17.14, and the built-in values subgroup_size, subgroup_invocation_id.
_SUBGROUP = re.compile(r"\b(subgroup[A-Z_]\w*|quad(Broadcast|Swap[A-Z])\w*)")
# How TVM's code generator rebuilds blockIdx.x from a grid that web-runtime folded into z.
_FOLDED = re.compile(r"blockIdx\.z \* gridDim\.x \+ blockIdx\.x")


def check_library(
    path: Path,
    *,
    functions: Collection[str],
    wgsl: Mapping[str, str],
    metadata: Mapping[str, Any],
    f16: bool,
    subgroups: bool,
    max_storage_buffer_binding_size: int = MAX_BINDING_BYTES,
) -> list[str]:
    """Check the library at `path`; what a user should know though nothing is wrong.

    functions: names of the virtual machine's functions. wgsl: kernel name -> source. metadata:
    what `_metadata()` says. f16, subgroups: whether the target promises that adapters have them.
    max_storage_buffer_binding_size: bytes of the largest buffer that the target allows.

    Raises:
        CheckFailedError: the library breaks a rule; all broken rules are in the message.
        InputError: a buffer of the model's exceeds `max_storage_buffer_binding_size`, or `path` is
            no WebAssembly module.
    """
    largest, what = _largest_binding(metadata)
    if largest > max_storage_buffer_binding_size:
        raise InputError(
            f"{what} takes {largest:,} bytes in one buffer; web-llm asks a GPU for"
            f" {max_storage_buffer_binding_size:,}",
            hint="choose a quantization that makes it smaller, or a smaller model",
        )
    module = wasm.read(path)
    problems = [
        *_module_problems(module, metadata, wgsl),
        *_function_problems(functions, metadata),
    ]
    for name, source in wgsl.items():
        found = kernel_problems(name, source, f16=f16, subgroups=subgroups)
        problems += [f"kernel {name}: {problem}" for problem in found]
    refused, notes = _naga(wgsl, f16=f16, subgroups=subgroups)
    problems += refused
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:40])
        more = f"\n  … and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise CheckFailedError(
            f"the WebGPU library would not work, so it was not written:\n{shown}{more}\n"
            "This is not the model's fault but a bug of mlc-compile: please report it"
        )
    if largest > DEFAULT_BINDING_BYTES:
        notes.append(
            f"{what} takes {largest:,} bytes in one buffer: a GPU that offers only WebGPU's default"
            f" of {DEFAULT_BINDING_BYTES:,} can't run this library"
        )
    return notes


def split_kernels(source: str) -> dict[str, str]:
    """Kernel name -> WGSL, from `inspect_source()` of TVM's webgpu module.

    Raises:
        CheckFailedError: the text is not of that form, or two kernels have one name.
    """
    heads = list(_HEADER.finditer(source))
    if source[: heads[0].start() if heads else None].strip():
        raise CheckFailedError("the webgpu module's source does not begin with a kernel's header")
    kernels: dict[str, str] = {}
    for i, head in enumerate(heads):
        name = head["name"]
        end = heads[i + 1].start() if i + 1 < len(heads) else len(source)
        if name in kernels:
            raise CheckFailedError(f"two kernels of the webgpu module are named {name}")
        kernels[name] = source[head.end() : end].strip() + "\n"
    return kernels


def kernel_problems(name: str, source: str, *, f16: bool, subgroups: bool) -> list[str]:
    """The limits that one kernel breaks, in words."""
    code = _COMMENT.sub("", source)
    found = []
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        found.append("its name is not one that WGSL allows")
    elif not re.search(rf"\bfn\s+{name}\s*\(", code):
        found.append("no function of its name")
    return [
        *found,
        *_group_problems(code),
        *_memory_problems(code),
        *_feature_problems(code, f16=f16, subgroups=subgroups),
    ]


def _module_problems(
    module: wasm.Module, metadata: Mapping[str, Any], wgsl: Mapping[str, str]
) -> Iterator[str]:
    for item in module.imports:
        if item.kind != "function" or (item.module, item.name) not in IMPORTS:
            yield f"imports {item.kind} {item.module}.{item.name}, which web-runtime does not have"
    offered = {(item.name, item.kind) for item in module.exports}
    wanted = [("memory", "memory"), *((n, "function") for n in ("_initialize", *EXPORTS))]
    for name, kind in wanted:
        if (name, kind) not in offered:
            yield f"does not export the {kind} {name}"
    for memory in module.memories:
        if memory.imported:
            yield "imports its memory instead of exporting it"
        # web-runtime copies parameters through this memory, a shard at a time.
        if memory.maximum is not None and memory.maximum < 1 << 14:
            yield f"its memory may grow to {memory.maximum} pages only (1 GiB is {1 << 14})"
    if not _holds(module, metadata):
        yield "its data does not hold the metadata that `_metadata()` is to return"
    for name, source in wgsl.items():
        if not any(source.strip().encode() in segment for segment in module.data):
            yield f"its data does not hold the source of kernel {name}"


def _holds(module: wasm.Module, metadata: Mapping[str, Any]) -> bool:
    """Whether some data segment holds JSON that equals `metadata`."""
    if not metadata:
        return False
    # Which key comes first is the writer's choice.
    keys = "|".join(re.escape(json.dumps(key)) for key in metadata)
    start = re.compile(rf"\{{\s*(?:{keys})\s*:".encode())
    wanted = json.loads(json.dumps(metadata))
    decoder = json.JSONDecoder()
    for segment in module.data:
        for match in start.finditer(segment):
            # JSON of this compiler's is ASCII or UTF-8; what follows it need not be text.
            text = segment[match.start() :].decode("utf-8", errors="replace")
            try:
                found, _ = decoder.raw_decode(text)
            except ValueError:
                continue
            if found == wanted:
                return True
    return False


def _function_problems(functions: Collection[str], metadata: Mapping[str, Any]) -> Iterator[str]:
    for name in _ALWAYS:
        if name not in functions:
            yield f"has no function {name}, which web-llm needs"
    state = metadata.get("kv_state_kind")
    choices = _BY_STATE.get(str(state))
    if choices is None:
        yield f"metadata: kv_state_kind is {state!r}; web-llm runs {', '.join(_BY_STATE)}"
    elif not any(all(name in functions for name in choice) for choice in choices):
        yield f"web-llm needs {' or '.join(' + '.join(choice) for choice in choices)}"
    for key, kind in (("prefill_chunk_size", int), ("params", list)):
        if not isinstance(metadata.get(key), kind):
            yield f"metadata: {key} is missing"
    programs = metadata.get("artifact", {}).get("programs", {})
    for program, content in programs.items():
        for role, name in content.get("exports", {}).items():
            if name not in functions:
                yield f"metadata: program {program} names function {name} as {role}; there is none"


def _param_bytes(param: Mapping[str, Any]) -> int:
    bits = re.search(r"\d+", str(param["dtype"]).removeprefix("b"))
    elements = int(math.prod(param["shape"]))
    return elements * (int(bits[0]) if bits else 8) // 8


def _largest_binding(metadata: Mapping[str, Any]) -> tuple[int, str]:
    """Bytes and name of the largest buffer that the metadata speak of."""
    resources = metadata.get("artifact", {}).get("resources", {})
    found = [(resources.get("max_storage_buffer_binding_size", 0), "the largest buffer")]
    for param in metadata.get("params") or ():
        found.append((_param_bytes(param), f"parameter {param['name']}"))
    # Of two as large, the parameter says more.
    return max(found, key=lambda item: (item[0], item[1].startswith("parameter")))


def _group_problems(code: str) -> Iterator[str]:
    found = re.findall(r"@workgroup_size\s*\(([^)]*)\)", code)
    if len(found) != 1:
        yield f"{len(found)} entry points with a @workgroup_size instead of one"
        return
    parts = [part.strip().rstrip("iu") for part in found[0].split(",") if part.strip()]
    if not 1 <= len(parts) <= 3 or not all(part.isdigit() for part in parts):
        yield f"@workgroup_size({found[0]}) is not one to three numbers"
        return
    size = [int(part) for part in parts] + [1] * (3 - len(parts))
    if math.prod(size) > MAX_INVOCATIONS:
        yield f"{math.prod(size)} invocations a workgroup; the limit is {MAX_INVOCATIONS}"
    for axis, threads, limit in zip("xyz", size, MAX_GROUP_SIZE, strict=True):
        if not 1 <= threads <= limit:
            yield f"a workgroup of {threads} in {axis}; the limit is {limit}"
    if "blockIdx.z" in _FOLDED.sub("", code):
        yield "uses blockIdx.z, which web-runtime keeps for itself"


def _memory_problems(code: str) -> Iterator[str]:
    storage = len(re.findall(r"\bvar\s*<\s*storage\b", code))
    if storage > MAX_STORAGE_BUFFERS:
        yield f"{storage} storage buffers; the limit is {MAX_STORAGE_BUFFERS}"
    uniform = len(re.findall(r"\bvar\s*<\s*uniform\b", code))
    if uniform > MAX_UNIFORM_BUFFERS:
        yield f"{uniform} uniform buffers; the limit is {MAX_UNIFORM_BUFFERS}"
    shared = 0
    for name, kind in re.findall(r"\bvar\s*<\s*workgroup\s*>\s*(\w+)\s*:\s*([^;=]+?)\s*;", code):
        layout = _layout(kind)
        if layout is None:
            yield f"workgroup variable {name} has the type {kind}, whose size is not known here"
        else:
            # W3C WebGPU, 23.1 (validating GPUProgrammableStage): each variable rounded up to 16.
            shared += _round_up(layout[0], 16)
    if shared > MAX_SHARED_BYTES:
        yield f"{shared} bytes of workgroup memory; the limit is {MAX_SHARED_BYTES}"


def _feature_problems(code: str, *, f16: bool, subgroups: bool) -> Iterator[str]:
    enabled = {
        name.strip()
        for names in re.findall(r"\benable\s+([^;]+);", code)
        for name in names.split(",")
        if name.strip()
    }
    for name in sorted(enabled - {"f16", "subgroups"}):
        yield f"enables {name}, which this compiler does not know"
    if not f16 and "f16" in enabled:
        yield "enables f16, which the target does not promise"
    if re.search(r"\bf16\b", re.sub(r"\benable\s[^;]*;", "", code)) and "f16" not in enabled:
        yield "uses f16 without enabling it"
    if not subgroups and ("subgroups" in enabled or _SUBGROUP.search(code)):
        yield "uses subgroups, which the target does not promise"
    wide = sorted(set(re.findall(r"\b[iuf]64\b", code)))
    if wide:
        yield f"uses {', '.join(wide)}, which WGSL does not have"


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _layout(kind: str) -> tuple[int, int] | None:
    """Size and alignment in bytes of a WGSL type (WGSL, 14.4.1); None when not known."""
    kind = re.sub(r"\s+", "", kind)
    scalars = {"f32": 4, "i32": 4, "u32": 4, "bool": 4, "f16": 2}
    if kind in scalars:
        return scalars[kind], scalars[kind]
    if match := re.fullmatch(r"atomic<([iu]32)>", kind):
        return scalars[match[1]], scalars[match[1]]
    if match := re.fullmatch(r"vec([234])(?:<(\w+)>|([fiuh]))", kind):
        scalar = match[2] or {"f": "f32", "i": "i32", "u": "u32", "h": "f16"}[match[3]]
        width = scalars.get(scalar)
        lanes = int(match[1])
        return None if width is None else (lanes * width, (4 if lanes == 3 else lanes) * width)
    if match := re.fullmatch(r"array<(.+),(\d+)[iu]?>", kind):
        inner = _layout(match[1])
        if inner is not None:
            return int(match[2]) * _round_up(*inner), inner[1]
    return None


def _naga(wgsl: Mapping[str, str], *, f16: bool, subgroups: bool) -> tuple[list[str], list[str]]:
    """What naga (in PyPI's wgpu) refuses, and notes on what it could not look at.

    wgpu offers naga through a device only, so there must be some adapter, a software one at least.
    """
    if not wgsl:
        return [], []
    try:
        import wgpu
    except ImportError:
        return [], ["kernels were not validated: the package wgpu is not installed"]
    try:
        found = adapters.adapters()
    except Exception as error:  # whatever a graphics driver makes of a machine without one
        return [], [f"kernels were not validated: wgpu found no adapter ({error})"]
    wanted = {name for name, on in (("shader-f16", f16), ("subgroup", subgroups)) if on}
    fit = [adapter for adapter in found if wanted <= set(adapter.features)]
    if not fit:
        lacks = f" with {' and '.join(sorted(wanted))}" if found else ""
        return [], [f"kernels were not validated: wgpu offers no adapter{lacks} on this machine"]
    device = fit[0].request_device_sync(required_features=sorted(wanted))
    problems = []
    for name, source in wgsl.items():
        try:
            device.create_shader_module(code=source)
        except wgpu.GPUError as error:
            problems.append(f"kernel {name}: refused by naga: {str(error).strip()}")
    return problems, []
