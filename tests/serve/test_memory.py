"""What the C library keeps after large blocks are freed, in a process of its own."""

import ctypes
import subprocess
import sys

import pytest

# a large block, a small one behind it, and the large one freed, again and again, as bodies come and go
PROCESS = """
import ctypes, resource, sys
from pathlib import Path
from sala_serve.memory import keep_large_blocks_apart

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

if sys.argv[1] == "apart":
    keep_large_blocks_apart()
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
free(malloc(ctypes.c_size_t(30 * 2**20)))  # raises the bound
before = resident_mib()
large = []
for _ in range(20):
    large.append(malloc(ctypes.c_size_t(4 * 2**20)))
    ctypes.memset(large[-1], 1, 4 * 2**20)
    malloc(ctypes.c_size_t(100 * 1024))  # too large for any gap, so it comes behind
for block in large:
    free(block)
print(resident_mib() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc only")
def test_large_blocks_go_back_to_the_system():
    kept_mib = {
        how: float(subprocess.check_output([sys.executable, "-c", PROCESS, how]))
        for how in ("apart", "as it is")
    }
    assert kept_mib["apart"] < 8
    assert kept_mib["as it is"] > 40


def test_what_is_loaded_at_the_start_is_not_collected_again():
    process = """
import gc
from sala_serve.memory import freeze_what_stays
import sala_serve.app
freeze_what_stays()
print(gc.get_freeze_count(), len(gc.get_objects()))
"""
    frozen, others = map(int, subprocess.check_output([sys.executable, "-c", process]).split())
    assert frozen > 10_000
    assert others < 100
