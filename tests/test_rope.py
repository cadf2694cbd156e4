"""RoPE tables against transformers, live and stored, and against the papers' properties."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import pytest

from mlc_compile.config import ConfigReader, RopeConfig, read_rope
from mlc_compile.errors import InputError
from mlc_compile.rope import ROPE_KINDS

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is an optional extra"
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def longrope(pairs: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": [1 + 0.05 * i for i in range(pairs)],
        "long_factor": [1 + 0.9 * i for i in range(pairs)],
        "original_max_position_embeddings": 4096,
        **more,
    }


def rope(settings: dict[str, Any], *, head_dim: int = 64, trained: int = 2048) -> RopeConfig:
    reader = ConfigReader({"rope_parameters": settings}, where="test")
    return read_rope(reader, head_dim=head_dim, max_position_embeddings=trained)


# (kind's settings, max_position_embeddings, context windows)
CASES: list[tuple[str, dict[str, Any], int, tuple[int, ...]]] = [
    ("default", {"rope_type": "default"}, 2048, (512, 2048)),
    ("linear", {"rope_type": "linear", "factor": 4.0}, 2048, (2048, 8192)),
    ("dynamic", {"rope_type": "dynamic", "factor": 2.0}, 2048, (512, 2048, 2049, 8192)),
    ("llama3", LLAMA3, 131072, (4096, 131072)),
    ("llama3 of 3.2", {**LLAMA3, "factor": 32.0}, 131072, (4096,)),
    ("yarn", YARN, 32768, (4096, 131072)),
    ("yarn without a factor", {**YARN, "factor": None}, 65536, (4096,)),
    ("yarn, attention_factor", {**YARN, "attention_factor": 0.75}, 32768, (4096,)),
    ("yarn, mscale", {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}, 32768, (4096,)),
    ("yarn, mscale_all_dim 0", {**YARN, "mscale": 0.707, "mscale_all_dim": 0.0}, 32768, (4096,)),
    ("yarn, not truncated", {**YARN, "truncate": False}, 32768, (4096,)),
    ("yarn, betas", {**YARN, "beta_fast": 8, "beta_slow": 2}, 32768, (4096,)),
    ("yarn, short original", {**YARN, "original_max_position_embeddings": 64}, 256, (256,)),
    ("longrope", longrope(32), 131072, (4095, 4096, 4097, 131072)),
    ("longrope, factor", longrope(32, factor=2.0), 131072, (4096, 8192)),
    ("longrope, attention_factor", longrope(32, attention_factor=1.5), 131072, (8192,)),
]
assert {settings["rope_type"] for _, settings, _, _ in CASES} == set(ROPE_KINDS)


@needs_transformers
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1e7])
@pytest.mark.parametrize(
    ("settings", "trained", "windows"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_table_equals_transformers(
    settings: dict[str, Any], trained: int, windows: tuple[int, ...], theta: float
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    settings = {**settings, "rope_theta": theta}
    reference = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=trained,
        rope_parameters=dict(settings),
    )
    ours = rope(settings, trained=trained)
    for window in windows:
        if settings["rope_type"] == "default":
            embedding = LlamaRotaryEmbedding(reference)
            expected, scaling = embedding.inv_freq, embedding.attention_scaling
        else:
            formula = ROPE_INIT_FUNCTIONS[settings["rope_type"]]
            expected, scaling = formula(reference, None, seq_len=window)
        inv_freq, attention_factor = ours.table(window)
        assert inv_freq.dtype == np.float32 and inv_freq.shape == (32,)
        # Units in the last place: torch's own float32 power is good to about one.
        np.testing.assert_array_max_ulp(inv_freq, expected.numpy(), maxulp=4)
        assert attention_factor == pytest.approx(scaling, rel=1e-12)


SHORT = [1.0, 1.02, 1.1, 1.3, 1.5, 2.0, 2.5, 3.0]
LONG = [1.0, 1.5, 2.5, 5.0, 12.0, 24.0, 40.0, 64.0]
# transformers 5.23, heads of 16: (settings, theta, max positions, window, inv_freq, factor)
GOLDEN: dict[str, tuple[dict[str, Any], float, int, int, list[float], float]] = {
    "default": (
        {"rope_type": "default"}, 1e4, 2048, 1024,
        [1.0, 0.316227764, 0.100000001, 0.0316227786, 0.00999999978, 0.00316227786,
         0.00100000005, 0.000316227786], 1.0,
    ),
    "linear": (
        {"rope_type": "linear", "factor": 4.0}, 1e4, 2048, 8192,
        [0.25, 0.079056941, 0.0250000004, 0.00790569466, 0.00249999994, 0.000790569466,
         0.000250000012, 7.90569466e-05], 1.0,
    ),
    "dynamic": (
        {"rope_type": "dynamic", "factor": 2.0}, 1e4, 2048, 4096,
        [1.0, 0.270296127, 0.0730599985, 0.0197478328, 0.00533776265, 0.00144277664,
         0.000389976922, 0.000105409257], 1.0,
    ),
    "llama3": (
        LLAMA3, 5e5, 131072, 4096,
        [1.0, 0.193922758, 0.0376060307, 0.00729266508, 0.000524846022, 3.42810235e-05,
         6.64786967e-06, 1.28917316e-06], 1.0,
    ),
    "yarn": (
        YARN, 1e4, 32768, 131072,
        [1.0, 0.316227764, 0.100000001, 0.0316227786, 0.00999999978, 0.00256935088,
         0.000625000044, 0.000138349656], 1.138629436111989,
    ),
    "longrope": (
        {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
         "original_max_position_embeddings": 4096}, 1e4, 131072, 8192,
        [1.0, 0.210818499, 0.0399999991, 0.00632455572, 0.000833333354, 0.000131761582,
         2.49999994e-05, 4.94105916e-06], 1.1902380714238083,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_table_equals_stored_values(kind: str) -> None:
    settings, theta, trained, window, expected, factor = GOLDEN[kind]
    inv_freq, attention_factor = rope(
        {**settings, "rope_theta": theta}, head_dim=16, trained=trained
    ).table(window)
    np.testing.assert_array_max_ulp(inv_freq, np.array(expected, np.float32), maxulp=4)
    assert attention_factor == pytest.approx(factor, rel=1e-12)


def test_dynamic_is_plain_up_to_the_trained_length() -> None:
    plain, _ = rope({"rope_type": "default"}).table(1)
    dynamic = rope({"rope_type": "dynamic", "factor": 2.0})
    for window in (1, 2047, 2048):
        np.testing.assert_array_equal(dynamic.table(window)[0], plain)
    grown, _ = dynamic.table(4096)
    assert grown[0] == plain[0] and (grown[1:] < plain[1:]).all()
    # NTK-aware: the slowest pair is interpolated by exactly factor * L / L0 - (factor - 1) = 3.
    assert plain[-1] / grown[-1] == pytest.approx(3.0, rel=1e-5)


def test_longrope_switches_exactly_above_the_original_length() -> None:
    config = rope(longrope(32), trained=131072)
    np.testing.assert_array_equal(config.table(1)[0], config.table(4096)[0])
    np.testing.assert_array_equal(config.table(4097)[0], config.table(131072)[0])
    ratio = config.table(4096)[0] / config.table(4097)[0]
    values = dict(config.params)
    expected = np.array(values["long_factor"]) / np.array(values["short_factor"])
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)


def test_llama3_leaves_fast_pairs_and_divides_slow_ones() -> None:
    plain, _ = rope({"rope_type": "default", "rope_theta": 5e5}).table(1)
    scaled, _ = rope({**LLAMA3, "rope_theta": 5e5}, trained=131072).table(1)
    wavelength = 2 * math.pi / plain
    fast, slow = wavelength < 8192 / 4, wavelength > 8192 / 1
    assert fast.any() and slow.any() and not (fast | slow).all()
    np.testing.assert_array_equal(scaled[fast], plain[fast])
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8, rtol=1e-6)
    middle = ~(fast | slow)
    assert (scaled[middle] < plain[middle]).all() and (scaled[middle] > plain[middle] / 8).all()


@pytest.mark.parametrize(
    ("settings", "trained", "limit"),
    [
        ({"rope_type": "default"}, 2048, 2048),
        ({"rope_type": "linear", "factor": 4.0}, 2048, 8192),
        ({"rope_type": "dynamic", "factor": 2.0}, 2048, 4096),
        (LLAMA3, 131072, 131072),
        (YARN, 32768, 131072),
        (YARN, 131072, 131072),
        (longrope(32), 131072, 131072),
    ],
)
def test_max_context(settings: dict[str, Any], trained: int, limit: int) -> None:
    assert rope(settings, trained=trained).max_context(trained) == limit


def test_only_kinds_that_depend_on_the_window_have_a_note() -> None:
    for name, settings, trained, windows in CASES:
        config = rope(settings, trained=trained)
        tables = {config.table(window)[0].tobytes() for window in (16, *windows, 2**20)}
        assert (len(tables) > 1) == config.depends_on_window, name
        for window in windows:
            note = config.window_note(window)
            assert (note is not None) == config.depends_on_window, name
            if note is not None:
                assert note.startswith("RoPE (") and note.endswith(".")


def test_longrope_note_names_the_factors_it_takes() -> None:
    config = rope(longrope(32), trained=131072)
    assert "the short factors" in (config.window_note(4096) or "")
    assert "the long factors" in (config.window_note(4097) or "")


@pytest.mark.parametrize("window", [0, -1])
def test_table_needs_a_positive_window(window: int) -> None:
    with pytest.raises(InputError, match="positive context window"):
        rope({"rope_type": "default"}).table(window)


def test_unknown_kind_is_an_input_error() -> None:
    with pytest.raises(InputError, match="unknown RoPE kind 'spiral'"):
        RopeConfig(theta=1e4, rotary_dim=64, kind="spiral").table(16)


def test_config_is_a_value() -> None:
    assert rope(longrope(32)) == rope(longrope(32))
    assert hash(rope(YARN)) == hash(rope(dict(reversed(YARN.items()))))
    assert rope(YARN) != rope({**YARN, "factor": 8.0})


# ---------------------------------------------------------------------------------------------
# Reading


def read(config: dict[str, Any], head_dim: int = 64) -> RopeConfig:
    return read_rope(
        ConfigReader(config, where="c.json"), head_dim=head_dim, max_position_embeddings=2048
    )


@pytest.mark.parametrize("kind", [name for name, *_ in CASES])
def test_old_and_new_spelling_read_the_same(kind: str) -> None:
    settings = next(case[1] for case in CASES if case[0] == kind)
    new = read({"rope_parameters": {**settings, "rope_theta": 5e5}})
    old = read({"rope_theta": 5e5, "rope_scaling": dict(settings)})
    renamed = {("type" if k == "rope_type" else k): v for k, v in settings.items()}
    assert new == old == read({"rope_theta": 500000, "rope_scaling": renamed})
    # transformers 5 keeps a checkpoint's old `type` beside the new name.
    both = {**settings, "type": settings["rope_type"], "rope_theta": 5e5}
    assert read({"rope_parameters": both}) == new
    assert new.theta == 5e5


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {}, "rope_theta": 10000},
        {"rope_parameters": {"rope_theta": 10000.0}, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 10000.0},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "rope_theta": 10000},
        {"partial_rotary_factor": 1.0},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
    ],
)
def test_plain_rope_in_every_spelling(config: dict[str, Any]) -> None:
    assert read(config) == RopeConfig(theta=10_000.0, rotary_dim=64)


def test_original_length_beside_max_position_embeddings_has_priority() -> None:
    config = {"rope_scaling": dict(YARN), "original_max_position_embeddings": 1024}
    assert dict(read(config).params)["original_max_position_embeddings"] == 1024


def test_original_length_defaults_to_max_position_embeddings() -> None:
    assert dict(read({"rope_scaling": {"type": "yarn", "factor": 2.0}}).params) == {
        "factor": 2.0,
        "original_max_position_embeddings": 2048,
        "truncate": True,
    }


def test_phi3_spelling_of_longrope_and_early_yarn_remark() -> None:
    assert read({"rope_scaling": {**longrope(32), "rope_type": "su"}}).kind == "longrope"
    assert read({"rope_scaling": {"type": "yarn", "factor": 2.0, "finetuned": True}}).kind == "yarn"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "mrope"}}, "rope_scaling.rope_type is 'mrope'; supported: d"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "is 'proportional'"),
        ({"rope_scaling": {"rope_type": "yarn", "type": "linear"}}, "type is 'linear'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.rope_type is missing"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "at least 1"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "must be a number, not true/false"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "must be a number, not a string"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 9}}, "rope_scaling.alpha = 9"),
        ({"rope_scaling": {"type": "default", "factor": 2.0}}, "unknown key rope_scaling.factor"),
        ({"rope_scaling": [1]}, "must be an object, not a list"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "above low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 0}}, "low_freq_factor is 0"),
        ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_fast must not be below"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate must be true or false"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 1}}, "range 2 to"),
        ({"rope_scaling": longrope(31)}, "short_factor has 31 numbers; one per rotated pair is 32"),
        ({"rope_scaling": longrope(32, long_factor=[0] * 32)}, "every factor must be above 0"),
        ({"rope_scaling": longrope(32, long_factor=None)}, "long_factor must be a list"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": 1.0}, "rope_theta is 1; it must be above 1"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "is 1e"),
        ({"partial_rotary_factor": 0.5}, "rotates whole heads"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "makes 16"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer kind"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": dict(YARN)},
            "both given and differ",
        ),
    ],
)
def test_bad_settings_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(config)
    assert message in str(caught.value)
    assert str(caught.value).startswith("c.json: ")
    assert "\n" not in str(caught.value)


def test_dynamic_needs_more_than_one_pair() -> None:
    with pytest.raises(InputError, match="above 2 for dynamic"):
        read({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, head_dim=2)
