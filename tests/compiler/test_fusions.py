"""The passes that need kernels which the cpu target lacks, on a whole tiny decoder with stand-ins
for those kernels: each changes the graph, each can be switched off, the logits stay."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiler_configs import write_config
from decoders import Decoder, kernel_names, planned_decoder
from fused_kernels import WITHOUT_KERNELS, FusedKernels
from tvm.ir import IRModule

ENTRIES = ("decode_tokens", "create_tir_paged_kv_cache")
TOKENS = (3, 90, 7, 7, 41)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen2, whose projections have biases, and a head of its own."""
    return write_config(
        tmp_path_factory.mktemp("fusions"), "qwen2", "q4f32_1", tie_word_embeddings=False
    )


@cache
def planned(folder: Path, opt: str) -> IRModule:
    return planned_decoder(folder, opt, kernels=FusedKernels(), entries=ENTRIES)


def logits(folder: Path, opt: str) -> np.ndarray[Any, Any]:
    decoder = Decoder.build(folder, opt, kernels=FusedKernels(), entries=ENTRIES)
    decoder.add(0)
    rows = [decoder.forward("decode_tokens", [0], [1], decoder.ids([t])) for t in TOKENS]
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def reference(folder: Path) -> np.ndarray[Any, Any]:
    return logits(folder, "O0")


@pytest.mark.parametrize(
    "opt",
    ["O2", *(pytest.param(f"{s}=0", marks=pytest.mark.slow) for s in WITHOUT_KERNELS)],
)
def test_each_can_be_switched_off_and_the_logits_stay(
    folder: Path, reference: np.ndarray[Any, Any], opt: str
) -> None:
    found = logits(folder, opt)
    assert np.isfinite(found).all()
    # Two float32 routes that add in another order.
    assert np.abs(found - reference).max() <= 1e-4 * np.abs(reference).max()


@pytest.mark.parametrize("switch", WITHOUT_KERNELS)
def test_each_changes_the_graph(folder: Path, switch: str) -> None:
    def linears(opt: str) -> str:
        names = kernel_names(planned(folder, opt), "transformer_one")
        return " ".join(name for name in names if "linear" in name)

    part = WITHOUT_KERNELS[switch]
    assert part in linears("O2")
    assert part not in linears(f"{switch}=0")
    assert part not in linears("O1")
    assert part in linears(f"O1;{switch}=1")


def test_a_layer_is_four_products_and_its_attention(folder: Path) -> None:
    mod = planned(folder, "O2")
    layer = [
        "linear_128x64_gemv_norm",
        "linear_64x64_gemv_residual",
        "linear_192x64_gemv_norm_gated",
        "linear_64x96_gemv_residual",
    ]
    *layers, last = kernel_names(mod, "transformer_one")
    assert layers == 2 * layer
    assert last.startswith("rms_norm")
    # The kernels that were widened are gone, not only unused.
    kernels = {gv.name_hint for gv in mod.get_global_vars()}
    assert not kernels & {"linear_128x64_gemv", "linear_192x64_gemv", "linear_64x96_gemv"}


def test_the_cpu_has_no_kernels_for_them(folder: Path) -> None:
    off = ";".join(f"{switch}=0" for switch in WITHOUT_KERNELS)
    modules = [planned_decoder(folder, opt, entries=ENTRIES) for opt in ("O2", off)]
    assert modules[0].script() == modules[1].script()


@pytest.mark.parametrize("target", ["webgpu", "iphone", "macos"])
def test_portable_gpus_have_them_all(folder: Path, target: str) -> None:
    mod = planned_decoder(folder, "O2", target=target, entries=ENTRIES)
    layer = [
        "linear_128x64_gemv_norm",
        "linear_64x64_gemv_residual",
        "linear_192x64_gemv_norm_gated",
        "linear_64x96_gemv_residual",
    ]
    *layers, last = kernel_names(mod, "transformer_one")
    assert layers == 2 * layer
    assert last.startswith("rms_norm")


def test_a_transposed_scheme_keeps_them_apart(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "qwen2", "q4f16_0")
    names = kernel_names(
        planned_decoder(folder, "O2", target="webgpu", entries=ENTRIES), "transformer_one"
    )
    products = " ".join(name for name in names if "linear" in name)
    assert "gemv" in products
    assert not any(part in products for part in WITHOUT_KERNELS.values())


@pytest.fixture(scope="module")
def layer_norm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stablelm: LayerNorm with biases, before attention and before the MLP."""
    return write_config(
        tmp_path_factory.mktemp("layer_norm"), "stablelm", "q4f32_1", layer_norm_eps=1e-5
    )


@pytest.mark.parametrize("target", ["cpu", "webgpu", "cuda"])
def test_layer_norms_take_the_sum_before_them(layer_norm_folder: Path, target: str) -> None:
    def norms(opt: str) -> list[str]:
        mod = planned_decoder(layer_norm_folder, opt, target=target, entries=ENTRIES)
        names = kernel_names(mod, "transformer_one")
        return [name.rstrip("0123456789") for name in names if "norm" in name or "add" in name]

    # on GPUs, products for one row add the residual themselves
    fused = ["layer_norm", *4 * ["add_layer_norm"]] if target == "cpu" else 5 * ["layer_norm"]
    assert norms("O2") == fused
    assert norms("O2;fuse_residual=0") == ["layer_norm", *4 * ["add_layer_norm"]]
    assert "add_layer_norm" not in norms("fuse_norm=0")


@pytest.mark.slow
def test_layer_norm_kernels_leave_the_logits(layer_norm_folder: Path) -> None:
    plain, fused = (logits(layer_norm_folder, opt) for opt in ("O0", "O2"))
    assert np.isfinite(fused).all()
    # Two float32 routes that add in another order.
    assert np.abs(fused - plain).max() <= 1e-4 * np.abs(plain).max()
