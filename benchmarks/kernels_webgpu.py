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
TOLERANCE = {"float32": 1e-6, "float16": 1e-3}  # of sum |x| |w|
CHECKED_ROWS = 48
WARM_SECONDS = 0.25
# lanes, teams, rows, words, unroll (targets/gpu_kernels/_gemv.py)
GEMV_CANDIDATES: tuple[tuple[Any, ...], ...] = (
    (32, 4, 4, 1, 2),
    (32, 4, 4, 4, 1),
    (32, 8, 4, 4, 1),
    (32, 8, 2, 4, 1),
    (32, 8, 4, 4, 1, "stage"),
    (64, 2, 4, 4, 1),
    (64, 4, 4, 4, 1),
    (64, 4, 2, 4, 1),
    (64, 4, 4, 2, 1),
    (64, 2, 8, 4, 1),
    (64, 4, 4, 4, 1, "mantissa"),
    (128, 1, 4, 4, 1),
    (128, 2, 2, 4, 1),
    (128, 2, 4, 4, 1),
    (128, 2, 4, 2, 1),
    (128, 2, 4, 4, 1, "mantissa"),
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
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, spec: Any, rows: int, label: str, func: Any, **extra: Any) -> None:
        """Describe `func`, the kernel of `spec`, called with `rows` rows."""
        tvm = self.tvm
        start = time.perf_counter()
        module = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
        run = self.load(tvm.tirx.build(module, target=self.target))["kernel"]
        seconds = time.perf_counter() - start
        n, k = spec.out_features, spec.in_features
        arguments = [("x", (rows, k), spec.x_dtype), *spec.weight_shapes()]
        arguments.append(("out", (rows, n), spec.out_dtype))
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
        scheme = spec.scheme
        self.kernels.append(
            {
                "name": name,
                "n": n,
                "k": k,
                "rows": rows,
                "label": label,
                "scheme": None
                if scheme is None
                else {
                    "name": scheme.name,
                    "bits": scheme.bits,
                    "group_size": scheme.group_size,
                    "layout": scheme.layout,
                    "max_int": scheme.max_int,
                },
                "arguments": [
                    {"role": role, "shape": list(shape), "dtype": dtype}
                    for role, shape, dtype in arguments
                ],
                "launches": list(self.recorder.launches),
                "build_s": round(seconds, 3),
                **extra,
            }
        )

    def write(self) -> None:
        import tvm

        described = {"tvm": tvm.__version__, "kernels": self.kernels}
        text = json.dumps(described, indent=1) + "\n"
        (self.folder / "kernels.json").write_text(text, encoding="utf-8")


def gemv_candidates(spec: Any, sweep: bool) -> Iterator[Any]:
    """Configurations to time, the chosen one (None) first."""
    from mlc_compile.targets.gpu_kernels._gemv import GemvConfig

    yield None
    if not sweep:
        return
    if spec.scheme is not None and spec.scheme.layout == "KN":
        for lanes, teams, rows in ((16, 16, 1), (16, 16, 2), (32, 8, 1), (16, 16, 4), (8, 32, 4)):
            yield GemvConfig(lanes=lanes, teams=teams, rows=rows)
        return
    for cut in GEMV_CANDIDATES:
        lanes, teams, rows, words, unroll, *rest = cut
        stage = "stage" in rest
        decode: Any = "mantissa" if "mantissa" in rest else "bytes"
        yield GemvConfig(lanes, teams, rows, words, unroll, stage, decode)


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
    cases = [
        (rows, scheme_name, model, name, shape)
        for rows in args.rows
        for scheme_name in args.schemes
        for model in args.models
        for name, shape in MODELS[model].items()
        if not args.shapes or name in args.shapes
    ]
    for rows, scheme_name, model, name, (n, k, times) in cases:
        if rows > 1 and (name == "lm_head" or scheme_name not in args.prefill_schemes):
            continue
        scheme = get_scheme(scheme_name)
        dtype = scheme.model_dtype
        spec = LinearSpec(
            k,
            n,
            None if scheme.is_plain else scheme,
            dtype,
            "float32" if name == "lm_head" else dtype,
            rows=1 if rows == 1 else None,
            weight_dtype=dtype if scheme.is_plain else None,
        )
        few = rows <= FEW_ROWS
        sweep = scheme_name in args.sweep and model in args.sweep_models
        sweep = sweep and (rows == 1 or not few)
        for config in gemv_candidates(spec, sweep) if few else gemm_candidates(sweep):
            chosen = {} if config is None else {"gemv" if few else "gemm": config}
            func = linear_kernel(spec, device=WEBGPU, **chosen)
            if func is not None:
                label = "chosen" if config is None else config.label
                emitter.add(f"{model}/{name}", spec, rows, label, func, times=times, model=model)
        print(f"{model}/{name} {scheme_name}, {rows} rows: {len(emitter.kernels)}", flush=True)
    emitter.write()


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
        features = [f for f in ("shader-f16", "timestamp-query") if f in adapter.features]
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
        """(buffer, its content) of at least nbytes random elements of a dtype."""
        np = self.np
        if dtype in self.pools and self.pools[dtype][1].nbytes >= nbytes:
            return self.pools[dtype]
        if dtype in self.pools:
            self.pools.pop(dtype)[0].destroy()
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

    def median(self, record: Callable[[Any, int], None]) -> float:
        """Median over passes, each of about --pass-ms."""
        once = max(self.timed(record, 2), 1e-7)
        count = int(min(max(self.args.pass_ms * 1e-3 / once, 2), 2000))
        started = time.perf_counter()
        while time.perf_counter() - started < WARM_SECONDS:  # clocks fall while a kernel compiles
            self.timed(record, count)
        times = sorted(self.timed(record, count) for _ in range(self.args.passes))
        return times[len(times) // 2]

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

    def kernel(self, folder: Path, kernel: dict[str, Any]) -> dict[str, Any]:
        """Check and time one kernel."""
        np = self.np
        shapes = {a["role"]: tuple(a["shape"]) for a in kernel["arguments"]}
        dtypes = {a["role"]: a["dtype"] for a in kernel["arguments"]}
        sizes = {r: math.prod(s) * ITEM[dtypes[r]] for r, s in shapes.items()}
        weights = [r for r in shapes if r not in ("x", "out")]
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
        x = self.rng.standard_normal(shapes["x"]).astype(dtypes["x"])
        own = {
            "x": self.filled(np.frombuffer(x.tobytes(), np.uint8), 0),
            "out": self.filled(np.full(sizes["out"], 0xFF, np.uint8), 0xFF),  # NaN
        }
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
        error = self._error(kernel, arrays, x, out)
        seconds = self.median(record)
        for buffer in own.values():
            buffer.destroy()
        moved = total + sizes["x"] + sizes["out"]
        return {
            "name": kernel["name"],
            "scheme": kernel["scheme"]["name"] if kernel["scheme"] else dtypes["weight"],
            "n": kernel["n"],
            "k": kernel["k"],
            "rows": kernel["rows"],
            "label": kernel["label"],
            "seconds": seconds,
            "bytes": moved,
            "bytes_per_s": moved / seconds,
            "flop_per_s": 2.0 * kernel["n"] * kernel["k"] * kernel["rows"] / seconds,
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

    def _error(self, kernel: dict[str, Any], arrays: dict[str, Any], x: Any, out: Any) -> float:
        """Largest error over sum |x| |w| in some columns; inf for poison anywhere."""
        np = self.np
        if not np.isfinite(out).all():
            return math.inf
        n = kernel["n"]
        picks = np.unique(np.concatenate([self.rng.integers(0, n, CHECKED_ROWS), [0, n - 1]]))
        weight = numpy_weight(kernel, arrays, picks)
        wide = x.astype(np.float64)
        magnitude = np.abs(wide) @ np.abs(weight).T + 1e-9
        wrong = np.abs(out[:, picks].astype(np.float64) - wide @ weight.T)
        return float((wrong / magnitude).max())


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
    results = []
    stop = time.perf_counter() + args.limit_s
    shown = None
    for kernel in described["kernels"]:
        if args.only and args.only not in kernel["name"]:
            continue
        if time.perf_counter() > stop:
            print(f"stopped after {args.limit_s} s: {len(results)} of {len(described['kernels'])}")
            break
        try:
            r = runner.kernel(folder, kernel)
        except Exception as error:  # one kernel's failure must not cost the remote run
            print(f"FAILED {kernel['name']} {kernel['label']}: {str(error)[:300]}", flush=True)
            results.append({"name": kernel["name"], "label": kernel["label"], "failed": str(error)})
            continue
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
        print(
            f"  {r['label']:22} {r['seconds'] * 1e6:9.2f} us {rate}"
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
        "results": results,
    }


def summary(results: list[dict[str, Any]]) -> None:
    """Best candidate of each shape; time of all matmuls of a token."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    chosen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in results:
        if "failed" in r or not r["ok"]:
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
        total = totals.setdefault(key[:3], [0.0, 0.0])
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
