"""How fast the CUDA products are: chains of one token, and many rows; beside kernels_webgpu.py.

    python benchmarks/kernels_cuda.py --emit DIR    # needs all of TVM and nvcc, no GPU
    python benchmarks/kernels_cuda.py --run DIR     # needs TVM's runtime and an NVIDIA GPU

A chain is as in kernels_webgpu.py: the products of all layers and the head with norms, residuals
and gating inside, without attention. Launches depend on each other as in a model; the host asks for
a layer at a time, and the time is that of this process from the first launch to the end of the
last. Weights differ from layer to layer as far as --weights-mib goes. Nothing is checked here: the
tests compare these kernels with numpy.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernels_webgpu import FUSED, ITEM, MODELS, WEIGHTS

SCHEME = "q4f16_1"
ROWS = 512
LAYER = ("qkv", "o", "gate_up", "down")
# Buffers of a chain by product and role; the others are weights.
BUFFERS: dict[str, dict[str, str]] = {
    "qkv": {"x": "h", "out": "qkv"},
    "o": {"x": "attended", "out": "t", "residual": "h"},
    "gate_up": {"x": "t", "out": "act"},
    "down": {"x": "act", "out": "h", "residual": "t"},
    "lm_head": {"x": "h", "out": "logits"},
}


def buffer_name(product: str, role: str) -> str:
    return BUFFERS[product].get(role) or (role if role not in WEIGHTS else f"{product}.{role}")


def emit(folder: Path, models: list[str]) -> None:
    """Write kernels.so for sm_90 and a description of its functions."""
    import tvm

    from mlc_compile.quantization.scheme import get_scheme
    from mlc_compile.targets.cuda import BACKEND
    from mlc_compile.targets.cuda_kernels import gemv
    from mlc_compile.targets.cuda_kernels._arch import CudaArchs
    from mlc_compile.targets.cuda_kernels.kernels import CudaKernels
    from mlc_compile.targets.gpu_kernels._emit import build_kernel
    from mlc_compile.targets.kernels import LinearSpec
    from mlc_compile.targets.nvidia.export import export_library, source_modules
    from mlc_compile.targets.nvidia.toolchain import find_nvcc

    archs, scheme = CudaArchs((90,)), get_scheme(SCHEME)
    functions: dict[str, Any] = {}
    described: dict[str, Any] = {}

    def chain(name: str, specs: dict[str, LinearSpec]) -> None:
        arguments = {
            buffer_name(product, role): (shape, dtype)
            for product, spec in specs.items()
            for role, shape, dtype in spec.arguments(1)
        }
        listed = [(name.replace(".", "_"), *a) for name, a in arguments.items()]

        def body(*buffers: Any) -> None:
            named = dict(zip(arguments, buffers, strict=True))
            for product, spec in specs.items():
                roles = [role for role, _, _ in spec.arguments(1)]
                gemv.emit_gemv(spec, {r: named[buffer_name(product, r)] for r in roles}, archs)

        functions[name] = build_kernel(name, listed, body, private=False)
        described[name] = [(key, *a) for key, a in arguments.items()]

    for model in models:
        short = model.replace("-", "_")
        specs = {
            product: LinearSpec(
                k, n, scheme, "float16", "float32" if product == "lm_head" else "float16", rows=1,
                **FUSED[product],
            )
            for product, (n, k, _) in MODELS[model].items()
        }  # fmt: skip
        chain(f"layer_{short}", {product: specs[product] for product in LAYER})
        chain(f"head_{short}", {"lm_head": specs["lm_head"]})
        for product in LAYER:
            n, k, _ = MODELS[model][product]
            spec = LinearSpec(k, n, scheme, "float16", "float16")
            name = f"rows_{short}_{product}"
            kernel = CudaKernels(archs).linear(spec)
            assert kernel is not None
            functions[name] = kernel.with_attr("global_symbol", name)
            described[name] = spec.arguments(ROWS)
    target = BACKEND.tvm_target("sm_90", ".so")
    with source_modules(), target:
        built = tvm.tirx.build(tvm.IRModule(functions), target=target)
    folder.mkdir(parents=True, exist_ok=True)
    export_library(built, folder / "kernels.so", (90,), find_nvcc())
    text = json.dumps({"models": models, "functions": described}) + "\n"
    (folder / "kernels.json").write_text(text, encoding="utf-8")


def run(folder: Path, weights_mib: int) -> dict[str, Any]:
    """Time everything in `folder` and print it."""
    import numpy as np
    import tvm

    from mlc_compile.runtime import cuda_device

    gpu = cuda_device.install()
    described = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
    functions = described["functions"]
    library, device = tvm.runtime.load_module(str(folder / "kernels.so")), tvm.device("cuda", 0)
    rng = np.random.default_rng(0)
    noise = np.frombuffer(rng.bytes(64 << 20), np.uint32)
    scales = (rng.random(1 << 20, np.float32) * 0.02 - 0.005).astype(np.float16)

    def tensor(shape: list[int], dtype: str) -> Any:
        content = {"uint32": noise, "float16": scales, "float32": np.zeros(1, np.float32)}[dtype]
        filled = np.resize(content, math.prod(shape)).reshape(shape)
        return tvm.runtime.tensor(np.ascontiguousarray(filled), device)

    def seconds(work: Callable[[], Any], count: int, passes: int = 5) -> float:
        """Of one call among `count`, after a warm-up; the median."""
        started = time.perf_counter()
        while time.perf_counter() - started < 0.2:
            work()
            device.sync()
        times = []
        for _ in range(passes):
            begun = time.perf_counter()
            for _ in range(count):
                work()
            device.sync()
            times.append((time.perf_counter() - begun) / count)
        return sorted(times)[passes // 2]

    size = 512 << 20
    source, copied = (tvm.runtime.empty((size,), "uint8", device) for _ in range(2))
    copy = 2 * size / seconds(lambda: source.copyto(copied), 20)
    print(f"{gpu.name}: copy {copy / 1e9:.0f} GB/s")

    def weights(arguments: list[Any]) -> int:
        """Bytes."""
        sizes = [math.prod(shape) * ITEM[dtype] for name, shape, dtype in arguments if "." in name]
        return sum(sizes)

    def chain(model: str) -> dict[str, Any]:
        short, layers = model.replace("-", "_"), MODELS[model]["qkv"][2]
        layer, head = (functions[f"{part}_{short}"] for part in ("layer", "head"))
        own = {name: tensor(shape, dtype) for name, shape, dtype in layer if "." not in name}

        def arguments(listed: list[Any]) -> list[Any]:
            return [own[n] if n in own else tensor(shape, dtype) for n, shape, dtype in listed]

        distinct = min(layers, max(2, (weights_mib << 20) // weights(layer)))
        sets, last = [arguments(layer) for _ in range(distinct)], arguments(head)
        run_layer, run_head = library[f"layer_{short}"], library[f"head_{short}"]

        def token() -> None:
            for i in range(layers):
                run_layer(*sets[i % distinct])
            run_head(*last)

        taken, moved = seconds(token, 20), weights(layer) * layers + weights(head)
        share = moved / taken / copy
        print(
            f"{model} chain, all fused: {taken * 1e3:.3f} ms ({1 / taken:.0f} tok/s), "
            f"{100 * share:.1f} % of copy"
        )
        return {"model": model, "seconds": taken, "bytes": moved, "of_copy": share}

    def many_rows(model: str, product: str) -> dict[str, Any]:
        name = f"rows_{model.replace('-', '_')}_{product}"
        arguments = [tensor(shape, dtype) for _, shape, dtype in functions[name]]
        product_run = library[name]
        n, k, _ = MODELS[model][product]
        taken = seconds(lambda: product_run(*arguments), 50)
        rate = 2.0 * ROWS * n * k / taken
        print(f"  {product}, {ROWS} rows: {taken * 1e6:.1f} us, {rate / 1e12:.0f} TFLOP/s")
        return {"model": model, "product": product, "seconds": taken, "flop_per_s": rate}

    results: dict[str, Any] = {"device": gpu.name, "copy": copy, "chains": [], "rows": []}
    for model in described["models"]:
        results["chains"].append(chain(model))
        found = [many_rows(model, product) for product in LAYER]
        whole = sum(r["seconds"] for r in found)
        flop = sum(r["seconds"] * r["flop_per_s"] for r in found)
        print(f"  a layer: {whole * 1e6:.0f} us, {flop / whole / 1e12:.0f} TFLOP/s")
        results["rows"] += found
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--emit", type=Path, metavar="DIR", help="build into DIR")
    parser.add_argument("--run", type=Path, metavar="DIR", help="time what is in DIR")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama-1b", "llama-8b"])
    parser.add_argument("--weights-mib", type=int, default=700, help="layers to rotate through")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    args = parser.parse_args()
    if args.emit:
        emit(args.emit, args.models)
    if args.run:
        found = run(args.run, args.weights_mib)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
