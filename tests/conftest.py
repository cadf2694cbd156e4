"""What all tests share: threads per process, and the choice of target.

A test that asks for the fixture `target_name` runs once for each registered target, or only for
those given with `--target`; CI runs one job for each.
"""

from __future__ import annotations

import os

import pytest

# Under xdist each worker would otherwise start a thread per core in every numeric library. They
# read these when they are imported, which is after this file.
if "PYTEST_XDIST_WORKER" in os.environ:
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TVM_NUM_THREADS"):
        os.environ.setdefault(variable, "1")


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
