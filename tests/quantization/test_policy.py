"""What each role is stored as, per scheme."""

from __future__ import annotations

import math

import pytest

from mlc_compile.models.params import ParamSpec, Role, Source
from mlc_compile.quantization.policy import StoredParam, is_quantized, stored_layout, stored_params
from mlc_compile.quantization.scheme import SCHEMES, QuantScheme

schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)


def spec(role: Role, shape: tuple[int, ...] = (48, 100)) -> ParamSpec:
    suffix = "bias" if role == "bias" else "weight"
    return ParamSpec(f"m.{role}.{suffix}", shape, role, (Source("s"),))


@schemes
def test_matrices_are_packed_and_named(scheme: QuantScheme) -> None:
    for role in ("linear", "embedding", "lm_head"):
        stored = stored_params(spec(role), scheme)
        left_out = scheme.name in ("q4f16_2", "q4f16_awq") and role != "linear"
        assert is_quantized(spec(role), scheme) == (not scheme.is_plain and not left_out)
        if not is_quantized(spec(role), scheme):
            assert stored == (StoredParam(f"m.{role}.weight", (48, 100), scheme.model_dtype),)
            continue
        groups = math.ceil(100 / scheme.group_size) if scheme.group_size else 1
        words = groups * (scheme.group_size or 100) // (32 // scheme.bits)
        transposed = scheme.name.endswith("_0") and role != "embedding"
        assert stored_layout(spec(role), scheme) == ("KN" if transposed else "NK")
        q_weight, q_scale, *q_zero = stored
        if scheme.name == "q4f16_awq":
            assert q_zero == [StoredParam(f"m.{role}.q_zero", (48, 1), "uint32", "uint4,NK")]
        else:
            assert q_zero == []
        assert (q_weight.name, q_weight.dtype) == (f"m.{role}.q_weight", "uint32")
        assert (q_scale.name, q_scale.dtype) == (f"m.{role}.q_scale", scheme.model_dtype)
        assert q_weight.shape == ((words, 48) if transposed else (48, words))
        assert q_scale.shape == ((groups, 48) if transposed else (48, groups))


@schemes
def test_vectors_keep_the_model_dtype(scheme: QuantScheme) -> None:
    for role in ("norm", "bias"):
        vector = spec(role, (48,))
        assert not is_quantized(vector, scheme)
        stored = stored_params(vector, scheme)
        assert stored == (StoredParam(vector.name, (48,), scheme.model_dtype),)


@schemes
def test_experts_keep_their_rows_together_and_routers_their_dtype(scheme: QuantScheme) -> None:
    router = spec("router")
    assert stored_params(router, scheme) == (
        StoredParam(router.name, (48, 100), scheme.model_dtype),
    )
    experts = spec("expert", (6, 48, 100))
    shapes = [stored.shape for stored in stored_params(experts, scheme)]
    if scheme.is_plain:
        assert shapes == [(6, 48, 100)]
    else:
        assert stored_layout(experts, scheme) == "NK"
        widths = [scheme.num_words(100), scheme.num_groups(100)]
        widths += [scheme.num_zero_words(100)] if scheme.has_zeros else []
        assert shapes == [(6, 48, width) for width in widths]


def test_bytes_are_exact() -> None:
    words, scales = stored_params(spec("linear", (10, 64)), SCHEMES["q4f16_1"])
    assert (words.nbytes, scales.nbytes) == (10 * 64 // 2, 10 * 2 * 2)
    assert StoredParam("x", (3,), "bfloat16").nbytes == 6


def test_packing_tells_layouts_apart() -> None:
    square = spec("linear", (16, 128))  # [16, 16] words in either layout
    nk, kn = (stored_params(square, SCHEMES[name])[0] for name in ("q4f16_1", "q4f16_0"))
    assert nk.shape == kn.shape
    assert nk != kn
