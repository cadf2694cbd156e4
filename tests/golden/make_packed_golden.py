"""Packed weights made by the packages that define the formats, and what those dequantise them to.

`python tests/golden/make_packed_golden.py DIR` writes packed/*.npz again. DIR holds the packages'
own sources, unpacked: `awq` (AutoAWQ 0.2.9), `auto_gptq` (0.7.1), `gptqmodel` (7.7.0) and
`compressed_tensors` (0.20.0, with pydantic and loguru importable); e4m3 blocks are transformers'.
Needed only when a case is added; the tests read the files alone.

An .npz holds, for each case, `case|config` (JSON of quantization_config) and `case|tensor|dtype`,
with safetensors' names of the dtypes; bfloat16 and fp8 as raw bits. The tensor `=` is the weight
[N, K] that the package dequantises the others to.
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent / "packed"
Case = tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]

N, K = 32, 32


def bare_package(name: str, folder: Path) -> None:
    """Makes a package importable without running its __init__, which needs GPUs and more."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def codes_and_scales(
    bits: int, groups: int, *, zeros: bool, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random codes [N, K], scales [groups, N] and zero points [groups, N]."""
    codes = torch.randint(0, 1 << bits, (N, K))
    scales = (torch.rand(groups, N) * 0.05 + 0.001).to(dtype)
    middle = torch.full((groups, N), 1 << (bits - 1))
    return codes, scales, torch.randint(1, 1 << bits, (groups, N)) if zeros else middle


def awq_cases(root: Path) -> Iterator[tuple[str, Case]]:
    bare_package("awq", root / "awq")
    bare_package("awq.modules.linear", root / "awq/modules/linear")
    sys.modules["accelerate"] = types.ModuleType("accelerate")  # imported, not used for packing
    gemm = importlib.import_module("awq.modules.linear.gemm")
    del sys.modules["accelerate"]
    unpack = importlib.import_module("awq.utils.packing_utils")
    for size in (8, -1):
        real = size if size > 0 else K
        codes, scales, zeros = codes_and_scales(4, K // real, zeros=True)
        linear = torch.nn.Linear(K, N, bias=False)
        index = torch.arange(K) // real
        scale, zero = scales.float()[index].T, zeros[index].T
        linear.weight.data = (codes - zero) * scale
        packed = gemm.WQLinear_GEMM.from_linear(
            linear, 4, real, scales=scales.float(), zeros=zeros.float()
        )
        tensors = {key: getattr(packed, key) for key in ("qweight", "qzeros", "scales")}
        found = unpack.dequantize_gemm(*tensors.values(), 4, real)
        assert found.dtype == torch.float16 and torch.allclose(
            found.float(), linear.weight.data.T, rtol=2e-3
        )
        config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True}
        config |= {"version": "gemm", "modules_to_not_convert": None}
        yield f"g{size}", (config, tensors, found.T)


def gptq_cases(root: Path) -> Iterator[tuple[str, Case]]:
    for name in ("", ".nn_modules", ".nn_modules.qlinear"):
        bare_package(f"auto_gptq{name}", root / f"auto_gptq{name}".replace(".", "/"))
    module = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    settings = [(bits, 16, sym, False) for bits in (3, 4, 8) for sym in (True, False)]
    settings += [
        (2, 16, False, False),
        (4, -1, True, False),
        (4, 16, False, True),
        (3, 16, True, True),
    ]
    for bits, size, sym, ordered in settings:
        real = size if size > 0 else K
        codes, scales, zeros = codes_and_scales(bits, K // real, zeros=not sym)
        index = torch.arange(K) // real
        index = index[torch.randperm(K)] if ordered else index
        linear = torch.nn.Linear(K, N, bias=False).half()
        linear.weight.data = (codes - zeros[index].T) * scales.float()[index].T
        layer = module.QuantLinear(bits, size, K, N, False)
        layer.pack(linear, scales.float().T, zeros.T.clone(), index.to(torch.int32))
        layer.scales = scales
        found = layer(torch.eye(K, dtype=torch.float16))
        assert torch.allclose(found.float(), linear.weight.data.T.float(), rtol=2e-3)
        tensors = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
        config = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": sym}
        config |= {"desc_act": ordered, "damp_percent": 0.01, "true_sequential": True}
        name = f"b{bits}-g{size}-{'sym' if sym else 'asym'}{'-desc_act' if ordered else ''}"
        yield name, (config, tensors, found.T)


def gptq_v2_cases(root: Path) -> Iterator[tuple[str, Case]]:
    """GPTQModel's own dequantize_weight, taken out of its module, which imports half a system."""
    text = (root / "gptqmodel/nn_modules/qlinear/__init__.py").read_text()
    wanted = {"_torch_right_shift", "_torch_left_shift"}
    methods = {"dequantize_weight", "_dequantize_from_codes"}
    space: dict[str, Any] = {"t": torch}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name in wanted | methods:
            exec(compile(ast.Module([node], []), node.name, "exec"), space)
    for bits, dtype in ((4, torch.float16), (4, torch.bfloat16), (3, torch.float16)):
        groups = K // 16
        scales = (torch.rand(groups, N) * 0.05 + 0.001).to(dtype)
        words = torch.iinfo(torch.int32)
        wf = torch.arange(0, 32, bits, dtype=torch.int32)
        if bits == 3:
            wf = torch.tensor(
                [
                    [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0],
                    [0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31],
                    [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0],
                ],
                dtype=torch.int32,
            ).reshape(1, 3, 12)
        layer = types.SimpleNamespace(
            planar=False,
            bits=bits,
            maxq=(1 << bits) - 1,
            pack_factor=32 // bits,
            dequant_dtype=torch.int8,
            in_features=K,
            qweight=torch.randint(words.min, words.max, (K * bits // 32, N), dtype=torch.int32),
            qzeros=torch.randint(words.min, words.max, (groups, N * bits // 32), dtype=torch.int32),
            scales=scales,
            g_idx=(torch.arange(K) // 16).to(torch.int32),
            wf_unsqueeze_zero=wf.reshape(1, 1, -1) if bits != 3 else wf.unsqueeze(0),
            wf_unsqueeze_neg_one=wf.reshape(1, -1, 1) if bits != 3 else wf.unsqueeze(-1),
            _init_wf_unsqueeze_buffers=lambda: None,
        )
        layer._dequantize_from_codes = types.MethodType(space["_dequantize_from_codes"], layer)
        found = space["dequantize_weight"](layer)
        tensors = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
        config = {"quant_method": "gptq", "bits": bits, "group_size": 16, "sym": False}
        config |= {"desc_act": False, "checkpoint_format": "gptq_v2", "pack_dtype": "int32"}
        yield f"v2-b{bits}-{str(dtype).removeprefix('torch.')}", (config, tensors, found.T)


def compressed_cases(root: Path) -> Iterator[tuple[str, Case]]:
    sys.path.insert(0, str(root))
    base = importlib.import_module("compressed_tensors.compressors.base")
    importlib.import_module("compressed_tensors.compressors")
    quantization = importlib.import_module("compressed_tensors.quantization")
    group = {"strategy": "group", "group_size": 16}
    channel, tensor = {"strategy": "channel"}, {"strategy": "tensor"}
    block = {"strategy": "block", "block_structure": [16, 16]}
    cases: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
        ("pack-quantized", {"num_bits": 4, **group}, (16, K)),
        ("pack-quantized", {"num_bits": 4, "symmetric": False, **group}, (12, K)),
        ("pack-quantized", {"num_bits": 4, **channel}, (16, 50)),
        ("pack-quantized", {"num_bits": 4, "symmetric": False, **channel}, (16, K)),
        ("pack-quantized", {"num_bits": 8, **group}, (16, K)),
        ("int-quantized", {"num_bits": 8, **channel}, (16, K)),
        ("int-quantized", {"num_bits": 8, "symmetric": False, **channel}, (16, K)),
        ("float-quantized", {"num_bits": 8, "type": "float", **tensor}, (16, K)),
        ("float-quantized", {"num_bits": 8, "type": "float", **channel}, (16, K)),
        ("float-quantized", {"num_bits": 8, "type": "float", **block}, (N, K)),
        ("naive-quantized", {"num_bits": 4, "symmetric": False, **group}, (16, K)),
    ]
    for form, settings, (n, k) in cases:
        args = quantization.QuantizationArgs(**settings)
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, format=form)
        shape = {
            "group": (n, k // 16),
            "channel": (n, 1),
            "tensor": (1,),
            "block": (n // 16, k // 16),
        }[settings["strategy"]]
        scale = (torch.rand(shape) * 0.05 + 0.001).to(torch.bfloat16)
        state = {"weight": (torch.randn(n, k) * 0.2).to(torch.bfloat16), "weight_scale": scale}
        if not args.symmetric:
            half = 1 << (args.num_bits - 1)
            state["weight_zero_point"] = torch.randint(-half, half, shape).to(torch.int8)
        compressor = base.BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(state, scheme)
        found = compressor.decompress(stored, scheme)["weight"]
        weights = json.loads(args.model_dump_json())
        config = {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": None,
                    "output_activations": None,
                }
            },
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        kind = f"{args.num_bits}{settings.get('type', '')}-{settings['strategy']}"
        name = f"{form}-{kind}-{'sym' if args.symmetric else 'asym'}"
        yield name, (config, dict(stored), found)


def fp8_cases(root: Path) -> Iterator[tuple[str, Case]]:
    del root
    module = importlib.import_module("transformers.integrations.finegrained_fp8")
    dequantise = module.Fp8Dequantize(None)._dequantize_one
    weight = (torch.randn(N, K) * 30).to(torch.float8_e4m3fn)
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e8m0fnu):
        scales = (torch.rand(N // 16, K // 16) * 0.01 + 1e-4).to(dtype)
        config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
        config |= {"weight_block_size": [16, 16]}
        name = f"blocks-{str(dtype).removeprefix('torch.')}"
        yield (
            name,
            (
                config,
                {"weight": weight, "weight_scale_inv": scales},
                dequantise(weight, scales),
            ),
        )


_RAW = {
    torch.float16: ("F16", None),
    torch.float32: ("F32", None),
    torch.bfloat16: ("BF16", torch.uint16),
    torch.float8_e4m3fn: ("F8_E4M3", torch.uint8),
    torch.float8_e8m0fnu: ("F8_E8M0", torch.uint8),
    torch.int8: ("I8", None),
    torch.int32: ("I32", None),
    torch.int64: ("I64", None),
}


def write(path: Path, cases: Iterator[tuple[str, Case]]) -> None:
    arrays: dict[str, Any] = {}
    for name, (config, tensors, expected) in cases:
        arrays[f"{name}|config"] = np.array(json.dumps(config))
        for tensor, value in {"=": expected, **tensors}.items():
            dtype, raw = _RAW[value.dtype]
            value = value.detach().contiguous()
            arrays[f"{name}|{tensor}|{dtype}"] = (value.view(raw) if raw else value).numpy()
    np.savez_compressed(path, **arrays)
    print(path.name, path.stat().st_size, "bytes:", *{key.split("|")[0]: 0 for key in arrays})


def main() -> None:
    root = Path(sys.argv[1])
    HERE.mkdir(exist_ok=True)
    for name, make in (
        ("awq", awq_cases),
        ("gptq", gptq_cases),
        ("gptq_v2", gptq_v2_cases),
        ("compressed_tensors", compressed_cases),
        ("fp8", fp8_cases),
    ):
        torch.manual_seed(0)
        write(HERE / f"{name}.npz", make(root))


if __name__ == "__main__":
    main()
