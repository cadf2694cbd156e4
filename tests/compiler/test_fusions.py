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


@pytest.mark.parametrize("opt", ["O2", *(f"{switch}=0" for switch in WITHOUT_KERNELS)])
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
