"""What all tests share: threads per process, and the choice of target.

A test that asks for the fixture `target_name` runs once for each registered target, or only for
those given with `--target`; CI runs one job for each.
"""

from __future__ import annotations

import os
import re

import pytest

# Under xdist each worker would otherwise start a thread per core in every numeric library. They
# read these when they are imported, which is after this file.
if "PYTEST_XDIST_WORKER" in os.environ:
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TVM_NUM_THREADS"):
        os.environ.setdefault(variable, "1")


# Tests that take seconds each and have a quick sibling; .ci/run does all.
SLOW = re.compile(
    "|".join(
        (
            r"test_nvcc_compiles",
            r"test_cuda_\w+\.py::test_compiles",
            r"test_errors_of_nvcc_reach_the_user",
            r"test_cuda_cache\.py::\w+\[(80|90)-",
            r"test_gpu_attention\.py::test_(prefill_decode_and_batches|attention_sinks|fork|trees_and_"
            r"their_commit|windows_of_several_sequences)\[(cuda|metal)",
            r"test_gpu_attention\.py::test_launches_keep_to_the_limits\[.*'(softcap|attention_sink)'",
            r"test_gpu_(elementwise|sampling)\.py::test_(launches_keep_to_the_device|small_groups|"
            r"smaller_devices_get_smaller_groups)\[.*(cuda|metal)",
            r"test_gpu_linear\.py::test_(a_smaller_device|gemm_cuts|group_of_more_words)",
            r"test_cpu_attention\.py::test_(windowed_layers_beside_full_ones|uncommon_head_sizes_with|"
            r"windowed_layers_over_a_shared_prefix|sliding_cache_without_rotation.*shape1)",
            r"test_cpu_attention\.py::test_prefill_decode_and_batches\[(mha-d64|gqa7|gqa4|gqa8)",
            r"test_cpu_attention\.py::test_window_is_exact_far_past_the_wrap\[window33",
            r"test_(gpu|cpu)_experts\.py::test_(routes|odd_shapes|activation_and_output_dtypes)",
            r"test_gpu_targets\.py::\w+\[webgpu-qwen3",
            r"test_build\.py::test_(debug_dump|two_compilations_give_the_same_bytes)",
            r"test_fusions\.py::test_each_can_be_switched_off_and_the_logits_stay",
            r"test_gpu_sampling\.py::test_softmax\[(cuda|metal)",
            r"test_fusions\.py::test_each_changes_the_graph",
            r"test_fusions\.py::test_layer_norms_take_the_sum_before_them\[(webgpu|cuda)",
            r"test_renamed_classes\.py",
            r"test_convert\.py::test_memory_is_bounded.*\[(?!llama)",
            r"test_convert\.py::test_every_architecture\[\w+-",
            r"test_reference\.py::test_numpy_equals_transformers_for_every_architecture\[\w+-",
        )
    )
)


@pytest.hookimpl(tryfirst=True)  # before -m looks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--target",
        action="append",
        default=[],
        metavar="NAME",
        help="run tests that need a target for this one only (repeatable)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target_name" in metafunc.fixturenames:
        from mlc_compile.targets.profile import TARGETS, get_target

        chosen = metafunc.config.getoption("--target")
        for name in chosen:
            get_target(name)
        # One of each back end: the others of Apple's platforms differ in their host code alone.
        kinds = {p.backend_module.partition(":")[0]: name for name, p in reversed(TARGETS.items())}
        metafunc.parametrize("target_name", chosen or [n for n in TARGETS if n in kinds.values()])


@pytest.fixture(scope="session")
def webgpu() -> str:
    """A native `webgpu` device; the adapter's description.

    Without an adapter the test is skipped, or fails where MLC_COMPILE_REQUIRE_VULKAN is set.
    """
    from mlc_compile.errors import EnvironmentLacksError
    from mlc_compile.runtime.webgpu_device import install

    try:
        return install()
    except EnvironmentLacksError as error:
        if os.environ.get("MLC_COMPILE_REQUIRE_VULKAN"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cuda() -> str:
    """The name of this machine's NVIDIA GPU.

    Without one the test is skipped, or fails where MLC_COMPILE_REQUIRE_CUDA is set.
    """
    from mlc_compile.errors import EnvironmentLacksError
    from mlc_compile.runtime.cuda_device import install

    try:
        return install().name
    except EnvironmentLacksError as error:
        if os.environ.get("MLC_COMPILE_REQUIRE_CUDA"):
            raise
        pytest.skip(str(error))
