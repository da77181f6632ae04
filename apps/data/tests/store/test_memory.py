"""Freed memory stays with the process: large blocks are faulted in once, not at every allocation."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from app_data.store.memory import keep_freed_memory
kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray(64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


def run() -> tuple[bool, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


def test_large_blocks_are_reused():
    kept, faults = run()
    if not kept:
        pytest.skip("the C library is not glibc")
    assert faults < 100
