"""The exact pair of TVM packages, checked before TVM is imported.

The TVM wheel declares only a lower bound on its FFI package, but the ABI between the two is not
stable: with a newer FFI, scheduling a tensor intrinsic (as matmuls for cuda and metal do) ends
the process with a segmentation fault, which no `except` can catch. So both are pinned exactly
and a wrong pair is refused from its metadata alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from mlc_compile.errors import EnvironmentLacksError

# The same pins as in pyproject.toml; a test compares them.
PINS: Mapping[str, str] = {
    "apache-tvm": "0.27.0.post1",
    "apache-tvm-ffi": "0.1.14.post0",
}

RUNTIME_ONLY = "TVM_USE_RUNTIME_LIB"


def require_tvm(*, compiling: bool = True) -> None:
    """Check that the pinned pair is installed, without importing it; cheap, call it first.

    compiling: also refuse the environment variable that makes TVM load its runtime alone, with
    which graphs cannot be built. Loading and running a library works either way.
    Raises EnvironmentLacksError, with the pip command that mends it.
    """
    wrong = []
    for package, pinned in PINS.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "none"
        if found != pinned:
            wrong.append(f"{package} {found} is installed where {pinned} is needed")
    if wrong:
        pins = " ".join(f'"{package}=={pinned}"' for package, pinned in PINS.items())
        raise EnvironmentLacksError(
            " and ".join(wrong), hint=f"the two work only as this pair: pip install {pins}"
        )
    # TVM compares with "1" and takes every other value as unset.
    if compiling and os.environ.get(RUNTIME_ONLY) == "1":
        raise EnvironmentLacksError(
            f"{RUNTIME_ONLY}=1 in the environment leaves TVM without its compiler",
            hint=f"unset {RUNTIME_ONLY}",
        )
