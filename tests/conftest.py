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
        metafunc.parametrize("target_name", chosen or list(TARGETS))
