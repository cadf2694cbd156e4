"""How fast the WebGPU matmul kernels are on this machine's GPU, beside what it can copy.

    python benchmarks/kernels_webgpu.py --emit DIR [--sweep q4f16_1]   # needs TVM
    python benchmarks/kernels_webgpu.py --run DIR [--json FILE]        # needs numpy and wgpu
    python benchmarks/kernels_webgpu.py                                # both

`--emit` builds the kernels to WGSL, each with a description (entry point, grid, bindings, scalar
arguments) in DIR/kernels.json; `--run` needs neither TVM nor this package, so that a machine with
Python, numpy and wgpu alone can run it. There:

- Every kernel is checked against numpy first: some rows of the output, all of it for poison.
- Weights lie in a pool larger than the last-level cache; each dispatch takes the next stretch.
- A time is that of one dispatch among many in one pass, by timestamps at its ends (the clock of
  this process where the adapter has none); the median of several passes. Consecutive dispatches
  depend on each other, as in a model, so a launch's latency is part of it.
- A chain is what one token makes of the products of a model, all layers and the head, once with
  every norm, residual sum and gating in the products' kernels and once with kernels of their own
  (attention is left out: its output is taken to be the queries). Both chains meet the same weights,
  and must end in the same numbers.
- Copy bandwidth (bytes read plus bytes written, the better of a kernel and the copy command), read
  bandwidth and the time of an empty dispatch come from the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# name -> (out_features, in_features, how often in one forward pass)
MODELS: dict[str, dict[str, tuple[int, int, int]]] = {
    "smollm2": {
        "qkv": (960, 576, 30),
        "o": (576, 576, 30),
        "gate_up": (3072, 576, 30),
        "down": (576, 1536, 30),
        "lm_head": (49152, 576, 1),
    },
    "llama-1b": {
        "qkv": (3072, 2048, 16),
        "o": (2048, 2048, 16),
        "gate_up": (16384, 2048, 16),
        "down": (2048, 8192, 16),
        "lm_head": (128256, 2048, 1),
    },
    "llama-8b": {
        "qkv": (6144, 4096, 32),
        "o": (4096, 4096, 32),
        "gate_up": (28672, 4096, 32),
        "down": (4096, 14336, 32),
        "lm_head": (128256, 4096, 1),
    },
    "tiny": {"square": (96, 64, 1), "odd": (75, 200, 1)},
}
# What a model asks of each product when all is fused; else of none.
FUSED: dict[str, dict[str, Any]] = {
    "qkv": {"norm_eps": 1e-5},
    "o": {"residual": True},
    "gate_up": {"norm_eps": 1e-5, "activation": "silu"},
    "down": {"residual": True},
    "lm_head": {"norm_eps": 1e-5},
}
WEIGHTS = ("q_weight", "q_scale", "weight")
TOLERANCE = {"float32": 1e-6, "float16": 1e-3}  # of sum |x| |w|
CHECKED_ROWS = 48
# lanes, teams, rows, words, unroll (targets/gpu_kernels/_gemv.py)
GEMV_CANDIDATES: tuple[tuple[Any, ...], ...] = (
    (32, 4, 4, 1, 4),
    (64, 2, 4, 1, 4),
    (64, 2, 4, 2, 2),
    (64, 1, 4, 2, 2),
    (64, 2, 2, 2, 2),
    (64, 2, 4, 4, 1),
    (128, 1, 4, 1, 4),
    (128, 1, 2, 1, 4),
    (128, 1, 4, 2, 2),
    (128, 1, 2, 2, 2),
    (128, 1, 4, 4, 1),
    (128, 2, 4, 2, 2),
    (256, 1, 4, 1, 2),
    (256, 1, 4, 2, 1),
)
# The same for float16 models whose rows are long: loads of 2 or 4 words.
LONG_CANDIDATES: tuple[tuple[int, ...], ...] = (
    (32, 1, 4, 4, 1),
    (32, 1, 8, 4, 1),
    (32, 2, 4, 4, 1),
    (32, 2, 8, 4, 1),
    (32, 2, 2, 4, 2),
    (32, 4, 2, 4, 2),
    (32, 2, 4, 2, 4),
    (64, 1, 2, 4, 1),
    (64, 1, 4, 4, 1),
    (64, 1, 8, 4, 1),
    (64, 2, 4, 4, 1),
    (64, 2, 8, 4, 1),
    (64, 1, 4, 4, 2),
    (64, 2, 2, 4, 4),
    (64, 1, 2, 2, 2),
    (64, 1, 2, 2, 4),
    (64, 1, 4, 2, 2),
    (64, 2, 2, 2, 2),
    (112, 1, 4, 4, 2),
    (112, 1, 8, 4, 1),
    (128, 1, 2, 4, 1),
    (128, 1, 4, 4, 1),
    (128, 1, 8, 4, 1),
    (128, 1, 2, 4, 2),
    (128, 1, 4, 4, 2),
    (128, 1, 2, 2, 1),
    (128, 1, 4, 2, 1),
    (128, 1, 2, 2, 2),
    (128, 1, 4, 2, 2),
    (224, 1, 2, 4, 2),
    (224, 1, 4, 4, 1),
    (224, 1, 4, 4, 2),
    (224, 1, 8, 4, 1),
    (256, 1, 2, 4, 1),
    (256, 1, 4, 4, 1),
)
ITEM = {"float16": 2, "float32": 4, "uint32": 4}


# --------------------------------------------------------------------------- emit: with TVM


class Recorder:
    """Stands for a device: runs a kernel's host code and notes what it would launch."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.tags: dict[int, int] = {}  # handle -> argument
        self.description = "none"
        self._next = 0

    def deviceAllocDataSpace(self, nbytes: int) -> float:
        self._next += 1
        return float(self._next)

    def deviceFreeDataSpace(self, pointer: Any) -> None: ...
    def deviceCopyToGPU(self, *args: Any) -> None: ...
    def deviceCopyFromGPU(self, *args: Any) -> None: ...
    def deviceCopyWithinGPU(self, *args: Any) -> None: ...
    def flush(self) -> None: ...
    def wait(self) -> None: ...

    def create_shader(self, info_json: str, code: str) -> Callable[..., None]:
        info = json.loads(info_json)
        types: list[str] = info["arg_types"]
        axes: list[int] = []
        writes: list[int] = []
        for tag in info["launch_param_tags"]:
            if tag.startswith("blockIdx."):
                axes.append("xyz".index(tag[-1]))
            elif tag.startswith("threadIdx."):
                axes.append(-1)
            else:
                writes = json.loads(tag.partition(":")[2])

        def launch(*args: Any) -> None:
            grid = [1, 1, 1]
            for axis, extent in zip(axes, args[len(types) :], strict=True):
                if axis >= 0:
                    grid[axis] = int(extent)
            handles = [args[i] for i, t in enumerate(types) if t == "handle"]
            numbers = [h if isinstance(h, int) else int(h.value or 0) for h in handles]
            self.launches.append(
                {
                    "entry": info["name"],
                    "wgsl": code,
                    "grid": grid,
                    "bindings": numbers,
                    "writes": writes,
                    "scalars": [int(args[i]) for i, t in enumerate(types) if t != "handle"],
                }
            )

        return launch


class Emitter:
    """Builds kernels and writes their WGSL and descriptions."""

    def __init__(self, folder: Path) -> None:
        import tvm

        from mlc_compile.runtime import webgpu_device

        self.tvm, self.folder = tvm, folder
        self.recorder = Recorder()
        webgpu_device._load_device_api(self.recorder)  # type: ignore[arg-type]
        webgpu_device._installed = self.recorder  # type: ignore[assignment]
        self.load = webgpu_device.load
        self.target = tvm.target.Target({"kind": "webgpu", "host": {"kind": "llvm"}})
        self.kernels: list[dict[str, Any]] = []
        self.chains: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, arguments: Any, func: Any, **extra: Any) -> int:
        """Describe `func`, the kernel of these arguments (role, shape, dtype); its number."""
        tvm = self.tvm
        start = time.perf_counter()
        module = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
        run = self.load(tvm.tirx.build(module, target=self.target))["kernel"]
        seconds = time.perf_counter() - start
        tensors, roles = [], {}
        device = tvm.device("webgpu", 0)
        for role, shape, dtype in arguments:
            tensors.append(tvm.runtime.empty(shape, dtype, device))
            roles[self.recorder._next] = role
        self.recorder.launches.clear()
        run(*tensors)
        for i, launch in enumerate(self.recorder.launches):
            file = f"k{len(self.kernels):04d}_{i}.wgsl"
            (self.folder / file).write_text(launch.pop("wgsl"), encoding="utf-8")
            launch["file"] = file
            launch["bindings"] = [roles[number] for number in launch["bindings"]]
        described = [
            {"role": role, "shape": list(shape), "dtype": dtype} for role, shape, dtype in arguments
        ]
        self.kernels.append(
            {
                "name": name,
                "arguments": described,
                "launches": list(self.recorder.launches),
                "build_s": round(seconds, 3),
                **extra,
            }
        )
        return len(self.kernels) - 1

    def linear(self, name: str, spec: Any, rows: int, label: str, func: Any, **extra: Any) -> int:
        """Describe `func`, the kernel of `spec`, called with `rows` rows."""
        scheme = spec.scheme
        return self.add(
            name,
            spec.arguments(rows),
            func,
            n=spec.out_features,
            k=spec.in_features,
            rows=rows,
            label=label,
            scheme=None
            if scheme is None
            else {
                "name": scheme.name,
                "bits": scheme.bits,
                "group_size": scheme.group_size,
                "layout": scheme.layout,
                "max_int": scheme.max_int,
            },
            norm_eps=spec.norm_eps,
            gated=spec.activation is not None,
            residual=spec.residual,
            **extra,
        )

    def write(self) -> None:
        import tvm

        described = {"tvm": tvm.__version__, "kernels": self.kernels, "chains": self.chains}
        text = json.dumps(described, indent=1) + "\n"
        (self.folder / "kernels.json").write_text(text, encoding="utf-8")


def gemv_candidates(spec: Any, sweep: bool) -> Iterator[Any]:
    """Configurations to time, the chosen one (None) first."""
    from mlc_compile.targets.gpu_kernels._gemv import GemvConfig, _is_long

    yield None
    if not sweep:
        return
    if spec.scheme is not None and spec.scheme.layout == "KN":
        for lanes, teams, rows in ((16, 16, 1), (16, 16, 2), (32, 8, 1), (16, 16, 4), (8, 32, 4)):
            yield GemvConfig(lanes=lanes, teams=teams, rows=rows)
        return
    scheme, n, k = spec.scheme, spec.out_features, spec.in_features
    if scheme is None or not _is_long(scheme, k):
        for cut in GEMV_CANDIDATES:
            yield GemvConfig(*cut)
        return
    chosen = chosen_gemv(spec)
    for cut in LONG_CANDIDATES:
        config = GemvConfig(*cut, decode="halves" if scheme.bits == 4 else "bytes")
        turns, idle = divmod(scheme.num_words(k) // config.words, config.lanes * config.unroll)
        # Those that leave lanes idle or a large GPU without threads, and, of large weights, those
        # that spend many instructions on x, are known to be slow.
        if n * k > 40 << 20:
            slow = config.rows < 4 or config.words < 4
        else:
            slow = n // config.rows * config.lanes < 1 << 15
        if turns and not idle and not slow and config != chosen:
            yield config


def chosen_gemv(spec: Any) -> Any:
    """What the package chooses for one row."""
    from mlc_compile.targets.gpu_kernels import _gemv
    from mlc_compile.targets.gpu_kernels.device import WEBGPU

    n, k, normed = spec.out_features, spec.in_features, spec.norm_eps is not None
    config = _gemv.choose(n, k, spec.scheme, 1, WEBGPU, normed=normed)
    return _gemv.fit(config, 1, WEBGPU, gated=spec.activation is not None)


def gemm_candidates(sweep: bool) -> Iterator[Any]:
    from mlc_compile.targets.gpu_kernels._gemm import GemmConfig

    yield None
    if not sweep:
        return
    for tile_m, tile_n, depth, thread_m, thread_n in (
        (64, 64, 32, 4, 4),
        (64, 64, 16, 4, 4),
        (64, 64, 32, 8, 8),
        (64, 64, 16, 8, 8),
        (32, 64, 32, 8, 4),
        (64, 128, 32, 4, 8),
        (64, 64, 32, 8, 4),
        (128, 64, 32, 8, 4),
        (64, 128, 16, 8, 8),
        (128, 128, 16, 8, 8),
        (128, 128, 32, 8, 8),
        (32, 128, 32, 4, 4),
    ):
        yield GemmConfig(tile_m, tile_n, depth, thread_m, thread_n)


def emit(args: argparse.Namespace, folder: Path) -> None:
    """Write all kernels that the options ask for."""
    from mlc_compile.quantization.scheme import get_scheme
    from mlc_compile.targets.gpu_kernels.device import WEBGPU
    from mlc_compile.targets.gpu_kernels.linear import FEW_ROWS, linear_kernel
    from mlc_compile.targets.kernels import LinearSpec

    emitter = Emitter(folder)

    def spec_of(scheme_name: str, name: str, n: int, k: int, rows: int, **fused: Any) -> LinearSpec:
        scheme = get_scheme(scheme_name)
        dtype = scheme.model_dtype
        return LinearSpec(
            k,
            n,
            None if scheme.is_plain else scheme,
            dtype,
            "float32" if name == "lm_head" else dtype,
            rows=1 if rows == 1 else None,
            weight_dtype=dtype if scheme.is_plain else None,
            **fused,
        )

    cases = [
        (rows, scheme_name, model, name, shape, fused)
        for rows in args.rows
        for scheme_name in args.schemes
        for model in args.models
        for name, shape in MODELS[model].items()
        for fused in ((False, True) if rows == 1 and args.fused else (False,))
        if not args.shapes or name in args.shapes
    ]
    for rows, scheme_name, model, name, (n, k, times), fused in cases:
        if rows > 1 and (name == "lm_head" or scheme_name not in args.prefill_schemes):
            continue
        spec = spec_of(scheme_name, name, n, k, rows, **(FUSED[name] if fused else {}))
        if spec.norm_eps is not None and linear_kernel(spec, device=WEBGPU) is None:
            continue  # the norm stays apart
        few = rows <= FEW_ROWS
        sweep = scheme_name in args.sweep and model in args.sweep_models
        sweep = sweep and (rows == 1 or not few)
        for config in gemv_candidates(spec, sweep) if few else gemm_candidates(sweep):
            chosen = {} if config is None else {"gemv" if few else "gemm": config}
            func = linear_kernel(spec, device=WEBGPU, **chosen)
            if func is not None:
                label = "chosen" if config is None else config.label
                cut = {"config": (config or chosen_gemv(spec)).label} if rows == 1 else {}
                title = f"{model}/{name}" + (" fused" if fused else "")
                emitter.linear(title, spec, rows, label, func, times=times, model=model, **cut)
        print(f"{model}/{name} {scheme_name}, {rows} rows: {len(emitter.kernels)}", flush=True)
    for model in args.chains:
        for scheme_name in args.schemes:
            for fused in (False, True):
                shapes = MODELS[model]
                specs = {
                    name: spec_of(scheme_name, name, n, k, 1, **(FUSED[name] if fused else {}))
                    for name, (n, k, _) in shapes.items()
                }
                for name, spec in specs.items():
                    if linear_kernel(spec, device=WEBGPU) is None:
                        specs[name] = replace(spec, norm_eps=None)
                add_chain(emitter, f"{model} {scheme_name}", specs, shapes["qkv"][2], fused)
    emitter.write()


def add_chain(emitter: Emitter, name: str, specs: dict[str, Any], layers: int, fused: bool) -> None:
    """A chain of the products `specs`: names of buffers for the arguments of each kernel; the
    weights' are their roles, and taken from the pools."""
    from mlc_compile.targets.gpu_kernels import elementwise
    from mlc_compile.targets.gpu_kernels.device import WEBGPU
    from mlc_compile.targets.gpu_kernels.linear import linear_kernel

    dtype, hidden = specs["qkv"].x_dtype, specs["qkv"].in_features
    inner = specs["down"].in_features

    def product(key: str, x: str, out: str, residual: str = "") -> dict[str, Any]:
        spec = specs[key]
        func = linear_kernel(spec, device=WEBGPU)
        number = emitter.linear(f"chain {key}", spec, 1, "chosen", func, only_chain=True)
        buffers = {"x": x, "out": out, "residual": residual, "norm_weight": "norm_weight"}
        bind = {role: buffers.get(role, role) for role, _, _ in spec.arguments(1)}
        return {"kernel": number, "bind": bind, "product": key}

    def other(func: Any, **bind: tuple[str, int]) -> dict[str, Any]:
        arguments = [
            (role, (size,) if role == "norm_weight" else (1, size), dtype)
            for role, (_, size) in bind.items()
        ]
        number = emitter.add("chain", arguments, func, only_chain=True)
        return {"kernel": number, "bind": {role: buffer for role, (buffer, _) in bind.items()}}

    def norm_apart(x: str) -> dict[str, Any]:
        func = elementwise.rms_norm(hidden, dtype, 1e-5, 1, device=WEBGPU)
        return other(
            func, x=(x, hidden), norm_weight=("norm_weight", hidden), out=("normed", hidden)
        )

    def normed(key: str, x: str, out: str) -> list[dict[str, Any]]:
        if specs[key].norm_eps is not None:
            return [product(key, x, out)]
        return [norm_apart(x), product(key, "normed", out)]

    def norm() -> dict[str, Any]:
        func = elementwise.add_rms_norm(hidden, dtype, 1e-5, 1, device=WEBGPU)
        names = {"x": "y", "residual": "h", "norm_weight": "norm_weight"}
        names |= {"normed": "normed", "total": "t"}
        return other(func, **{role: (buffer, hidden) for role, buffer in names.items()})

    if fused:
        layer = [
            *normed("qkv", "h", "qkv"),
            product("o", "qkv", "t", "h"),
            *normed("gate_up", "t", "act"),
            product("down", "act", "h", "t"),
        ]
        head = normed("lm_head", "h", "logits")
    else:
        # The sum of one norm is the other's residual: two buffers, t and h, by turns.
        def swapped(step: dict[str, Any]) -> dict[str, Any]:
            swap = {"t": "h", "h": "t"}
            return {**step, "bind": {r: swap.get(b, b) for r, b in step["bind"].items()}}

        gate = elementwise.gated_activation("silu", inner, dtype, 1, device=WEBGPU)
        arguments = [("gate_up", (1, 2 * inner), dtype), ("out", (1, inner), dtype)]
        number = emitter.add("chain", arguments, gate, only_chain=True)
        gated = {"kernel": number, "bind": {"gate_up": "gate_up", "out": "act"}}
        first = norm()
        layer = [
            first,
            product("qkv", "normed", "qkv"),
            product("o", "qkv", "y"),
            swapped(first),
            product("gate_up", "normed", "gate_up"),
            gated,
            product("down", "act", "y"),
        ]
        head = [first, product("lm_head", "normed", "logits")]
    emitter.chains.append(
        {
            "name": name,
            "fused": fused,
            "layers": layers,
            "layer": layer,
            "head": head,
        }
    )


# ------------------------------------------------------------------ run: numpy and wgpu alone


def numpy_weight(kernel: dict[str, Any], arrays: dict[str, Any], rows: Any) -> Any:
    """Weight rows [len(rows), K] in float64."""
    import numpy as np

    scheme, k = kernel["scheme"], kernel["k"]
    if scheme is None:
        return arrays["weight"][rows].astype(np.float64)
    words, scales = arrays["q_weight"], arrays["q_scale"]
    if scheme["layout"] == "KN":
        words, scales = words[:, rows].T, scales[:, rows].T
    else:
        words, scales = words[rows], scales[rows]
    bits = scheme["bits"]
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    q = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    q = q.reshape(len(rows), -1).astype(np.float64) - scheme["max_int"]
    return (q * np.repeat(scales.astype(np.float64), scheme["group_size"], axis=1))[:, :k]


class Runner:
    """One adapter: pools of weights, pipelines, timing."""

    def __init__(self, args: argparse.Namespace) -> None:
        import numpy as np
        import wgpu

        self.np, self.wgpu, self.args = np, wgpu, args
        adapters = [
            a for a in wgpu.gpu.enumerate_adapters_sync() if a.info["backend_type"] != "OpenGL"
        ]
        if args.adapter:
            adapters = [a for a in adapters if args.adapter.lower() in a.summary.lower()]
        if not adapters:
            sys.exit("no WebGPU adapter")
        ranks = {"DiscreteGPU": 0, "IntegratedGPU": 1, "VirtualGPU": 2, "CPU": 3}
        adapter = min(adapters, key=lambda a: ranks.get(a.info["adapter_type"], 4))
        self.info = {key: str(value) for key, value in adapter.info.items()}
        self.software = adapter.info["adapter_type"] == "CPU"
        wanted = ("shader-f16", "timestamp-query", "subgroup")
        features = [f for f in wanted if f in adapter.features]
        self.timestamps = "timestamp-query" in features and not args.no_timestamps
        names = ("max-buffer-size", "max-storage-buffer-binding-size")
        limits = {n: min(adapter.limits[n], (1 << 31) - 4) for n in names}
        self.device = adapter.request_device_sync(
            required_features=features, required_limits=limits
        )
        usage = wgpu.BufferUsage
        self.usage = usage.STORAGE | usage.COPY_SRC | usage.COPY_DST
        if self.timestamps:
            self.queries = self.device.create_query_set(type="timestamp", count=2)
            self.resolved = self.device.create_buffer(
                size=16, usage=usage.QUERY_RESOLVE | usage.COPY_SRC
            )
        self.rng = np.random.default_rng(0)
        self.pools: dict[str, tuple[Any, Any]] = {}

    def pool(self, dtype: str, nbytes: int) -> tuple[Any, Any]:
        """(buffer, its content) of at least nbytes of random elements of a dtype.

        A pool that was too small is replaced, and lives on in the kernels prepared with it.
        """
        np = self.np
        if dtype in self.pools and self.pools[dtype][1].nbytes >= nbytes:
            return self.pools[dtype]
        count = -(-nbytes // ITEM[dtype])
        if dtype == "uint32":
            content = np.frombuffer(self.rng.bytes(4 * count), np.uint32)
        else:
            content = self.rng.random(count, np.float32)
            content *= np.float32(0.02)
            content -= np.float32(0.005)
            content = content.astype(dtype)
        buffer = self.device.create_buffer(size=-(-content.nbytes // 256) * 256, usage=self.usage)
        step = 64 << 20
        raw = content.view(np.uint8)
        for start in range(0, raw.size, step):
            self.device.queue.write_buffer(buffer, start, raw[start : start + step])
        self.pools[dtype] = (buffer, content)
        return self.pools[dtype]

    def pipeline(self, wgsl: str, entry: str, writes: list[int]) -> tuple[Any, Any]:
        """(pipeline, bind group layout); the scalars come after the storage buffers."""
        stage = self.wgpu.ShaderStage.COMPUTE
        kinds = ["storage" if w else "read-only-storage" for w in writes] + ["uniform"]
        layout = self.device.create_bind_group_layout(
            entries=[
                {"binding": i, "visibility": stage, "buffer": {"type": kind}}
                for i, kind in enumerate(kinds)
            ]
        )
        pipeline = self.device.create_compute_pipeline(
            layout=self.device.create_pipeline_layout(bind_group_layouts=[layout]),
            compute={
                "module": self.device.create_shader_module(code=wgsl),
                "entry_point": entry,
            },
        )
        return pipeline, layout

    def group(self, layout: Any, stretches: list[tuple[Any, int, int]]) -> Any:
        return self.device.create_bind_group(
            layout=layout,
            entries=[
                {"binding": i, "resource": {"buffer": b, "offset": offset, "size": size}}
                for i, (b, offset, size) in enumerate(stretches)
            ],
        )

    def timed(self, record: Callable[[Any, int], None], count: int) -> float:
        """Seconds of one of `count` dispatches that `record(pass, i)` puts into one pass."""
        encoder = self.device.create_command_encoder()
        writes = None
        if self.timestamps:
            writes = {
                "query_set": self.queries,
                "beginning_of_pass_write_index": 0,
                "end_of_pass_write_index": 1,
            }
        compute = encoder.begin_compute_pass(**({"timestamp_writes": writes} if writes else {}))
        for i in range(count):
            record(compute, i)
        compute.end()
        if writes:
            encoder.resolve_query_set(self.queries, 0, 2, self.resolved, 0)
        commands = encoder.finish()
        start = time.perf_counter()
        self.device.queue.submit([commands])
        if writes:
            ticks = self.np.frombuffer(self.device.queue.read_buffer(self.resolved), "<u8")
            return float(ticks[1] - ticks[0]) * 1e-9 / count
        self.sync()
        return (time.perf_counter() - start) / count

    def sync(self) -> None:
        if not hasattr(self, "_probe"):
            self._probe = self.device.create_buffer(size=16, usage=self.usage)
        self.device.queue.read_buffer(self._probe)

    def medians(self, records: list[Callable[[Any, int], None]]) -> list[float]:
        """Seconds of a dispatch of each, the median over rounds in which all take turns.

        A pass takes about --pass-ms, and no pause lies between two: a GPU that waits for its next
        kernel to be compiled lowers its clocks, and a quarter of a second does not bring them back.
        """
        started = time.perf_counter()
        counts = [0] * len(records)
        while not all(counts) or time.perf_counter() - started < self.args.warm_s:
            for i, record in enumerate(records):
                once = max(self.timed(record, max(counts[i], 2)), 1e-7)
                counts[i] = int(min(max(self.args.pass_ms * 1e-3 / once, 2), 2000))
        rounds = [
            [self.timed(record, count) for record, count in zip(records, counts, strict=True)]
            for _ in range(self.args.passes)
        ]
        return [sorted(times)[len(times) // 2] for times in zip(*rounds, strict=True)]

    def median(self, record: Callable[[Any, int], None]) -> float:
        return self.medians([record])[0]

    def bandwidth(self) -> dict[str, float]:
        """Copy and read bandwidth in bytes per second, and seconds of an empty dispatch."""
        nbytes = self.args.copy_mib << 20
        words = nbytes // 16
        source, _ = self.pool("uint32", nbytes)
        target = self.device.create_buffer(size=nbytes, usage=self.usage)
        uniform = self.device.create_buffer(
            size=16, usage=self.wgpu.BufferUsage.UNIFORM | self.wgpu.BufferUsage.COPY_DST
        )
        head = """
@group(0) @binding(0) var<storage, read> a : array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> b : array<vec4<u32>>;
struct P { n: u32 }
@group(0) @binding(2) var<uniform> p : P;
@compute @workgroup_size(256) fn main(@builtin(global_invocation_id) g : vec3<u32>,
  @builtin(num_workgroups) s : vec3<u32>) {
"""
        copy = head + "for (var i = g.x; i < p.n; i += s.x * 256u) { b[i] = a[i]; } }"
        read = head + (
            "var t = vec4<u32>(0u); let step = s.x * 256u; var i = g.x;"
            "for (; i + 3u * step < p.n; i += 4u * step)"
            "{ t += (a[i] + a[i + step]) + (a[i + 2u * step] + a[i + 3u * step]); }"
            "if (t.x == 12345u && t.y == 999u && t.z == p.n) { b[0] = t; } }"
        )
        empty = head + "if (p.n == 0u) { b[g.x] = a[g.x]; } }"
        np = self.np
        self.device.queue.write_buffer(uniform, 0, np.array([words, 0, 0, 0], np.uint32))
        stretches = [(source, 0, nbytes), (target, 0, nbytes), (uniform, 0, 16)]

        def launch(wgsl: str, grid: int) -> float:
            pipeline, layout = self.pipeline(wgsl, "main", [0, 1])
            group = self.group(layout, stretches)

            def record(compute: Any, i: int) -> None:
                compute.set_pipeline(pipeline)
                compute.set_bind_group(0, group)
                compute.dispatch_workgroups(grid)

            return self.median(record)

        grids = (1024, 4096, 16384, 65535) if not self.software else (64,)
        copy_s = min(launch(copy, g) for g in grids)
        read_s = min(launch(read, g) for g in grids)
        empty_s = launch(empty, 1)
        command_s = self._copy_command(source, target, nbytes)
        target.destroy()
        return {
            "copy_kernel": 2 * nbytes / copy_s,
            "copy_command": 2 * nbytes / command_s,
            "copy": 2 * nbytes / min(copy_s, command_s),
            "read": nbytes / read_s,
            "empty_dispatch_s": empty_s,
        }

    def _copy_command(self, source: Any, target: Any, nbytes: int) -> float:
        """Seconds of a buffer-to-buffer copy by this process's clock, latency subtracted."""

        def go(count: int) -> float:
            encoder = self.device.create_command_encoder()
            for _ in range(count):
                encoder.copy_buffer_to_buffer(source, 0, target, 0, nbytes)
            commands = encoder.finish()
            self.sync()
            start = time.perf_counter()
            self.device.queue.submit([commands])
            self.sync()
            return time.perf_counter() - start

        go(1)
        many = 5 if self.software else 41
        found = sorted((go(many) - go(1)) / (many - 1) for _ in range(5))
        return max(found[2], 1e-9)

    def prepare(
        self, folder: Path, kernel: dict[str, Any]
    ) -> tuple[Callable[[Any, int], None], dict[str, Any]]:
        """Check one kernel: what dispatches it, and what is known of it but its time."""
        np = self.np
        shapes = {a["role"]: tuple(a["shape"]) for a in kernel["arguments"]}
        dtypes = {a["role"]: a["dtype"] for a in kernel["arguments"]}
        sizes = {r: math.prod(s) * ITEM[dtypes[r]] for r, s in shapes.items()}
        weights = [r for r in shapes if r in WEIGHTS]
        total = sum(sizes[r] for r in weights)
        copies = min(64, max(2, -(-(self.args.cold_mib << 20) // total)))
        if kernel["rows"] > 8:
            copies = 1  # bound by arithmetic
        strides = {r: -(-sizes[r] // 256) * 256 for r in weights}
        pools = {}
        for dtype in {dtypes[r] for r in weights}:
            need = sum(strides[r] * copies for r in weights if dtypes[r] == dtype)
            # A pool grows in large steps: filling one takes seconds.
            pools[dtype] = self.pool(dtype, -(-need // (64 << 20)) * (64 << 20))
        inputs = {
            r: self.rng.standard_normal(shapes[r]).astype(dtypes[r])
            for r in shapes
            if r not in weights and r != "out"
        }
        own = {r: self.filled(np.frombuffer(a.tobytes(), np.uint8), 0) for r, a in inputs.items()}
        own["out"] = self.filled(np.full(sizes["out"], 0xFF, np.uint8), 0xFF)  # NaN
        # Stretch i of every weight: a pool is cut into `copies` of each, one role after another.
        stretches: list[dict[str, Any]] = [{} for _ in range(copies)]
        used = dict.fromkeys(pools, 0)
        for r in weights:
            for stretch in stretches:
                stretch[r] = (pools[dtypes[r]][0], used[dtypes[r]], -(-sizes[r] // 16) * 16)
                used[dtypes[r]] += strides[r]
        started = time.perf_counter()
        steps = []
        for launch in kernel["launches"]:
            wgsl = (folder / launch["file"]).read_text(encoding="utf-8")
            pipeline, layout = self.pipeline(wgsl, launch["entry"], launch["writes"])
            grid = list(launch["grid"])
            scalars = np.array([*launch["scalars"], grid[0]], np.int32)
            uniform = self.filled(scalars.view(np.uint8), 0, uniform=True)
            while grid[0] > 65535:  # as the web runtime folds it
                grid[0], grid[2] = (grid[0] + 1) // 2, grid[2] * 2
            groups = []
            for stretch in stretches:
                whole = {role: (buffer, 0, buffer.size) for role, buffer in own.items()}
                bound = [{**whole, **stretch}[role] for role in launch["bindings"]]
                groups.append(self.group(layout, [*bound, (uniform, 0, uniform.size)]))
            steps.append((pipeline, groups, grid))
        pipeline_s = time.perf_counter() - started

        def record(compute: Any, i: int) -> None:
            for pipeline, groups, grid in steps:
                compute.set_pipeline(pipeline)
                compute.set_bind_group(0, groups[i % copies])
                compute.dispatch_workgroups(*grid)

        self.timed(record, 1)
        arrays = {}
        for r, (_, start, _) in stretches[0].items():
            raw = pools[dtypes[r]][1].view(np.uint8)[start : start + sizes[r]]
            arrays[r] = raw.view(dtypes[r]).reshape(shapes[r])
        got = np.frombuffer(self.device.queue.read_buffer(own["out"]), np.uint8)[: sizes["out"]]
        out = got.view(dtypes["out"]).reshape(shapes["out"])
        error = self._error(kernel, arrays, inputs, out)
        return record, {
            "name": kernel["name"],
            "scheme": kernel["scheme"]["name"] if kernel["scheme"] else dtypes["weight"],
            "n": kernel["n"],
            "k": kernel["k"],
            "rows": kernel["rows"],
            "label": kernel["label"],
            "config": kernel.get("config"),
            "bytes": total + sum(sizes[r] for r in own),
            "error": error,
            "tolerance": TOLERANCE[dtypes["out"]],
            "ok": bool(error < TOLERANCE[dtypes["out"]]),
            "pipeline_s": round(pipeline_s, 3),
            "copies": copies,
            "times": kernel.get("times", 1),
            "model": kernel.get("model"),
        }

    def filled(self, data: Any, padding: int, uniform: bool = False) -> Any:
        """A buffer of bytes, padded to a multiple of 16 as vectors want it."""
        np = self.np
        content = np.full(-(-data.size // 16) * 16, padding, np.uint8)
        content[: data.size] = data
        usage = self.wgpu.BufferUsage.UNIFORM if uniform else self.usage
        return self.device.create_buffer_with_data(data=content, usage=usage)

    def _error(
        self, kernel: dict[str, Any], arrays: dict[str, Any], inputs: dict[str, Any], out: Any
    ) -> float:
        """Largest error over sum |x| |w| in some columns; inf for poison anywhere."""
        np = self.np
        if not np.isfinite(out).all():
            return math.inf
        n = out.shape[1]
        picks = np.unique(np.concatenate([self.rng.integers(0, n, CHECKED_ROWS), [0, n - 1]]))
        wide = inputs["x"].astype(np.float64)
        if kernel["norm_eps"] is not None:
            mean = np.mean(wide**2, axis=1, keepdims=True)
            wide = wide / np.sqrt(mean + kernel["norm_eps"])
            wide = wide * inputs["norm_weight"].astype(np.float64)
        weight = numpy_weight(kernel, arrays, picks)
        expected, magnitude = wide @ weight.T, np.abs(wide) @ np.abs(weight).T + 1e-9
        if kernel["gated"]:
            weight = numpy_weight(kernel, arrays, picks + n)
            up, its = wide @ weight.T, np.abs(wide) @ np.abs(weight).T
            magnitude = magnitude * (np.abs(up) + 1) + its * np.abs(expected)
            expected = expected / (1 + np.exp(-expected)) * up
        if kernel["residual"]:
            residual = inputs["residual"][:, picks].astype(np.float64)
            expected, magnitude = expected + residual, magnitude + np.abs(residual)
        wrong = np.abs(out[:, picks].astype(np.float64) - expected)
        return float((wrong / magnitude).max())

    def chain(
        self, folder: Path, kernels: list[dict[str, Any]], chain: dict[str, Any]
    ) -> tuple[Callable[[Any, int], None], dict[str, Any]]:
        """What runs all dispatches of one token, and what is known of them; the logits too."""
        np = self.np
        # Weights: one stretch of each product after the other, layer by layer, from the start
        # again where the pools end, so that both chains of a model meet the same ones.
        sizes: dict[str, dict[str, int]] = {}
        buffers: dict[str, int] = {}
        for step in (*chain["layer"], *chain["head"]):
            for a in kernels[step["kernel"]]["arguments"]:
                nbytes = math.prod(a["shape"]) * ITEM[a["dtype"]]
                if a["role"] in WEIGHTS:
                    sizes.setdefault(step["product"], {})[a["role"]] = nbytes
                else:
                    name = step["bind"][a["role"]]
                    buffers[name] = max(buffers.get(name, 0), nbytes)
        dtypes = {
            a["role"]: a["dtype"]
            for step in chain["layer"]
            for a in kernels[step["kernel"]]["arguments"]
        }
        order = ["qkv", "o", "gate_up", "down"]
        run = [(i, key) for i in range(chain["layers"]) for key in order] + [(-1, "lm_head")]
        places: dict[tuple[int, str, str], tuple[Any, int, int]] = {}
        used: dict[str, int] = {}
        pools = {}
        for role in sizes["qkv"]:
            longest = max(s[role] for s in sizes.values())
            need = sum(s[role] + 256 for s in sizes.values()) * 2 + longest
            dtype = dtypes[role]
            pools[role] = self.pool(
                dtype, max(need, self.args.cold_mib << (20 if "q_w" in role else 17))
            )
        for i, key in run:
            for role, nbytes in sizes[key].items():
                buffer, content = pools[role]
                start = used.get(role, 0)
                if start + nbytes + 16 > content.nbytes:
                    start = 0
                places[i, key, role] = (buffer, start, -(-nbytes // 16) * 16)
                used[role] = start + -(-nbytes // 256) * 256
        own = {}
        for name, nbytes in buffers.items():
            dtype = np.float32 if name == "logits" else np.dtype(dtypes["x"])
            content = np.zeros(-(-nbytes // np.dtype(dtype).itemsize), dtype)
            if name == "norm_weight":
                scheme = kernels[chain["head"][-1]["kernel"]]["scheme"]
                # Codes of more bits stand for larger weights here, and float16 ends at 65504.
                content[:] = 7 / scheme["max_int"] if scheme else 1
            own[name] = self.filled(content.view(np.uint8), 0)
        made: dict[tuple[int, int], Any] = {}
        steps = []

        def add(i: int, step: dict[str, Any]) -> None:
            kernel = kernels[step["kernel"]]
            for j, launch in enumerate(kernel["launches"]):
                key = (step["kernel"], j)
                if key not in made:
                    wgsl = (folder / launch["file"]).read_text(encoding="utf-8")
                    scalars = np.array([*launch["scalars"], launch["grid"][0]], np.int32)
                    made[key] = (
                        *self.pipeline(wgsl, launch["entry"], launch["writes"]),
                        self.filled(scalars.view(np.uint8), 0, uniform=True),
                    )
                pipeline, layout, uniform = made[key]
                grid = list(launch["grid"])
                while grid[0] > 65535:
                    grid[0], grid[2] = (grid[0] + 1) // 2, grid[2] * 2
                bound = []
                for role in launch["bindings"]:
                    if role in WEIGHTS:
                        bound.append(places[i, step["product"], role])
                    else:
                        buffer = own[step["bind"][role]]
                        bound.append((buffer, 0, buffer.size))
                bound.append((uniform, 0, uniform.size))
                steps.append((pipeline, self.group(layout, bound), grid))

        for i in range(chain["layers"]):
            for step in chain["layer"]:
                add(i, step)
        for step in chain["head"]:
            add(-1, step)

        def record(compute: Any, i: int) -> None:
            for pipeline, group, grid in steps:
                compute.set_pipeline(pipeline)
                compute.set_bind_group(0, group)
                compute.dispatch_workgroups(*grid)

        first = np.zeros(own["h"].size // np.dtype(dtypes["x"]).itemsize, dtypes["x"])
        first[:] = np.random.default_rng(1).standard_normal(first.size)
        for name in ("h", "y", "t"):
            if name in own:
                value = first if name == "h" else np.zeros_like(first)
                self.device.queue.write_buffer(own[name], 0, value.view(np.uint8))
        self.timed(record, 1)
        logits = np.frombuffer(self.device.queue.read_buffer(own["logits"]), np.float32).copy()
        return record, {
            "name": chain["name"],
            "fused": chain["fused"],
            "dispatches": len(steps),
            "bytes": sum(sum(sizes[key].values()) for _, key in run),
            "logits": logits,
        }


def chains(runner: Runner, folder: Path, described: dict[str, Any], copy: float) -> list[Any]:
    """Time all chains; the two of a model must agree."""
    np = runner.np
    found = [
        runner.chain(folder, described["kernels"], chain) for chain in described.get("chains", [])
    ]
    times = runner.medians([record for record, _ in found]) if found else []
    results, before = [], {}
    for (_, r), seconds in zip(found, times, strict=True):
        logits = r.pop("logits")
        r |= {"seconds": seconds, "bytes_per_s": r["bytes"] / seconds}
        r["of_copy"] = r["bytes_per_s"] / copy
        text = ""
        if r["name"] in before:
            other = before[r["name"]]
            r["difference"] = float(np.abs(logits - other).max() / np.abs(other).max())
            text = f", differs by {r['difference']:.1e} of the largest logit"
        before[r["name"]] = logits
        results.append(r)
        print(
            f"chain {r['name']} {'fused' if r['fused'] else 'apart'}: {r['dispatches']} "
            f"dispatches, {seconds * 1e3:.3f} ms ({1 / seconds:.0f} tok/s), "
            f"{100 * r['of_copy']:.1f} % of copy{text}",
            flush=True,
        )
    return results


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all kernels of `folder` and print the tables."""
    import numpy as np
    import wgpu

    described = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
    runner = Runner(args)
    print(
        f"{runner.info.get('device')} ({runner.info.get('backend_type')}), "
        f"{runner.info.get('description')}; wgpu {wgpu.__version__}, tvm {described['tvm']}; "
        f"timestamps {'on' if runner.timestamps else 'off'}"
    )
    width = runner.bandwidth()
    print(
        f"copy {width['copy'] / 1e9:.0f} GB/s (kernel {width['copy_kernel'] / 1e9:.0f}, command "
        f"{width['copy_command'] / 1e9:.0f}), read {width['read'] / 1e9:.0f} GB/s, "
        f"empty dispatch {width['empty_dispatch_s'] * 1e6:.2f} us",
        flush=True,
    )
    linked = chains(runner, folder, described, width["copy"])
    prepared = []
    stop = time.perf_counter() + args.limit_s
    shown = None
    for kernel in described["kernels"]:
        if kernel.get("only_chain") or (args.only and args.only not in kernel["name"]):
            continue
        if time.perf_counter() > stop:
            print(f"stopped after {args.limit_s} s at {kernel['name']} {kernel['label']}")
            break
        try:
            prepared.append(runner.prepare(folder, kernel))
        except Exception as error:  # one kernel's failure must not cost the remote run
            print(f"FAILED {kernel['name']} {kernel['label']}: {str(error)[:300]}", flush=True)
    times = runner.medians([record for record, _ in prepared]) if prepared else []
    results = []
    for (_, r), seconds in zip(prepared, times, strict=True):
        r |= {"seconds": seconds, "bytes_per_s": r["bytes"] / seconds}
        r["flop_per_s"] = 2.0 * r["n"] * r["k"] * r["rows"] / seconds
        r["of_copy"] = r["bytes_per_s"] / width["copy"]
        results.append(r)
        head = (r["name"], r["scheme"], r["rows"])
        if head != shown:
            print(
                f"\n{r['name']} {r['n']}x{r['k']} {r['scheme']}, {r['rows']} rows, "
                f"{r['copies']} copies of {r['bytes'] / 1e6:.1f} MB"
            )
            shown = head
        rate = (
            f"{r['bytes_per_s'] / 1e9:7.0f} GB/s {100 * r['of_copy']:5.1f} % of copy"
            if r["rows"] <= 8
            else f"{r['flop_per_s'] / 1e12:7.2f} TFLOP/s"
        )
        label = f"chosen {r['config'] or ''}" if r["label"] == "chosen" else r["label"]
        print(
            f"  {label:22} {r['seconds'] * 1e6:9.2f} us {rate}"
            f"  error {r['error']:.1e}{'' if r['ok'] else ' WRONG'}",
            flush=True,
        )
    summary(results)
    return {
        "adapter": runner.info,
        "timestamps": runner.timestamps,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "wgpu": wgpu.__version__,
            "tvm": described["tvm"],
        },
        "bandwidth": width,
        "chains": linked,
        "results": results,
    }


def summary(results: list[dict[str, Any]]) -> None:
    """Best candidate of each shape; time of all matmuls of a token."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    chosen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in results:
        if not r["ok"]:
            continue
        key = (r["model"], r["scheme"], r["rows"], r["name"])
        if key not in best or r["seconds"] < best[key]["seconds"]:
            best[key] = r
        if r["label"] == "chosen":
            chosen[key] = r
    print("\nbest of each shape")
    totals: dict[tuple[Any, ...], list[float]] = {}
    for key, r in best.items():
        mine = chosen.get(key)
        slower = f", chosen {mine['seconds'] / r['seconds']:.2f}x" if mine else ""
        print(
            f"  {r['name']:18} {r['scheme']:8} {r['rows']:4} rows: {r['label']:22} "
            f"{r['seconds'] * 1e6:9.2f} us {100 * r['of_copy']:5.1f} % of copy "
            f"{r['flop_per_s'] / 1e12:6.2f} TFLOP/s{slower}"
        )
        fused = " fused" if r["name"].endswith(" fused") else ""
        total = totals.setdefault((f"{key[0]}{fused}", *key[1:3]), [0.0, 0.0])
        total[0] += r["seconds"] * r["times"]
        total[1] += (mine or r)["seconds"] * r["times"]
    for (model, scheme, rows), (seconds, mine) in totals.items():
        print(
            f"{model} {scheme}, all matmuls of {rows} rows: best {seconds * 1e3:.2f} ms "
            f"({rows / seconds:.0f} tok/s), chosen {mine * 1e3:.2f} ms ({rows / mine:.0f} tok/s)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--emit", type=Path, metavar="DIR", help="only build, into DIR")
    parser.add_argument("--run", type=Path, metavar="DIR", help="only run what is in DIR")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama-1b", "llama-8b"])
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="qkv, o, gate_up, …")
    parser.add_argument("--schemes", nargs="+", default=["q4f16_1", "q4f32_1", "q8f16_1"])
    parser.add_argument("--prefill-schemes", nargs="+", default=["q4f16_1", "q4f32_1"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 128, 512])
    parser.add_argument(
        "--sweep", nargs="*", default=[], metavar="SCHEME", help="several configurations of these"
    )
    parser.add_argument("--sweep-models", nargs="+", choices=MODELS, default=["llama-8b"])
    parser.add_argument("--fused", action="store_true", help="one row: fused products as well")
    parser.add_argument("--chains", nargs="*", choices=MODELS, default=[], help="whole tokens of")
    parser.add_argument("--warm-s", type=float, default=0.5, help="before measuring")
    parser.add_argument("--only", metavar="TEXT", help="run kernels whose name contains TEXT")
    parser.add_argument("--adapter", metavar="TEXT", help="part of the adapter's description")
    parser.add_argument("--cold-mib", type=int, default=512, help="weights to rotate through")
    parser.add_argument("--copy-mib", type=int, default=512, help="bytes of the copy test")
    parser.add_argument("--pass-ms", type=float, default=10.0, help="work in one timed pass")
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--limit-s", type=float, default=540.0, help="stop after this long")
    parser.add_argument("--no-timestamps", action="store_true", help="use this process's clock")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    args = parser.parse_args()
    if args.emit:
        emit(args, args.emit)
        return
    if args.run:
        found = run(args, args.run)
    else:
        with tempfile.TemporaryDirectory(prefix="kernels_webgpu_") as folder:
            emit(args, Path(folder))
            found = run(args, Path(folder))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
