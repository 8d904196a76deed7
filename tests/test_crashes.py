"""Processes killed by SIGKILL: what is left goes on to the same bytes. ``benchmarks/kills.py``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def kills(*words: str) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "benchmarks/kills.py", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_killed_at_random_moments_it_ends_with_the_same_bytes():
    found = kills("--kills", "4", "--steps", "200")
    assert found["kills"] == 4
    assert found["identical"] == found["runs"]
    assert len(found["ages"]) >= 2  # not all beside a checkpoint


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_killed_in_the_compiled_engine_it_ends_with_the_same_bytes():
    found = kills("--kills", "1", "--steps", "30", "--every", "2", "--engine", "compiled")
    assert found["kills"] == 1
    assert found["engine"].startswith("compiled")
