"""Tests of tests/targets lend their reference data, and what they need to find it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "targets"))
