"""The reference data of tests/targets serves the emulated device as well."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "targets"))
