"""Large arrays that are freed and asked for again are not mapped anew."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from pvae.allocation import keep_large_blocks

def faults():
    def step():
        torch.empty(10_000_000).fill_(1.0)
    for _ in range(10):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_large_blocks(), faults())
"""


def _run(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True,
        env={**{k: v for k, v in os.environ.items() if "MALLOC" not in k and "THP" not in k},
             **environment},
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is tuned")
def test_pages_are_mapped_once():
    before, told, after = _run()
    assert told == "True"
    assert int(before) > 50_000, "ten arrays of 40 MB were to be mapped ten times"
    assert int(after) < int(before) / 10


def test_the_users_own_settings_stay():
    _, told, _ = _run(MALLOC_ARENA_MAX="2")
    assert told == "False"
