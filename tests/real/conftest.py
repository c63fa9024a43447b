"""Where the real targets are."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_targets() -> Path:
    """The folder that `PPOW_REAL_TARGETS` names, with a target in each of its folders; else the test is skipped."""
    if "PPOW_REAL_TARGETS" not in os.environ:
        pytest.skip("PPOW_REAL_TARGETS names no folder of real targets")
    return Path(os.environ["PPOW_REAL_TARGETS"])
