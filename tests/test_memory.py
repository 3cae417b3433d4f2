"""Freed memory stays with a process that asks for it: the system need not clear its pages anew."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = [
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory"),
    pytest.mark.skipif(HUGE.exists() and "[always]" in HUGE.read_text(), reason="pages are of 2 MB here: few to count"),
]

# Takes and frees blocks as a call of a network does, and counts the pages that the system gave for them.
CALLS = """
import resource
import torch
from mmea_calc.fast import machine_code
from mmea_calc.fast import memory

def pages(n_blocks, megabytes):
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(megabytes * 250_000) for _ in range(n_blocks)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults

def in_later_calls(*size):
    pages(*size)
    return min(pages(*size) for _ in range(3))

"""


def printed(code: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", CALLS + code], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_a_large_block_that_was_freed_keeps_small_calls_in_place() -> None:
    code = "print(in_later_calls(20, 1)); memory.keep_small_blocks(); print(in_later_calls(20, 1))"
    runs = [printed(code) for _ in range(5)]
    # 20 MB are some 5,000 pages of 4 kB. Now and then something small lies at the end of the heap, by where the system
    # put it, and keeps what is below it.
    assert max(before for before, _ in runs) > 3000
    assert max(after for _, after in runs) < 300


def test_a_process_that_keeps_all_it_frees_clears_no_page_twice() -> None:
    before, kept, after = printed(
        "print(in_later_calls(4, 60)); print(int(memory.keep_freed_memory()));print(in_later_calls(4, 60))"
    )
    assert before > 30_000
    assert kept == 1
    assert after < 3000


def test_importing_the_package_keeps_nothing() -> None:
    (before,) = printed("import mmea_calc.calculator, mmea_calc.training.finetuning; print(in_later_calls(4, 60))")
    assert before > 30_000


def test_the_command_keeps_what_it_frees() -> None:
    code = """
import sys
from mmea_cli import main as command
sys.argv = ["mmea", "--version"]
try:
    command.main()
except SystemExit:
    pass
print(in_later_calls(4, 60))
"""
    done = subprocess.run([sys.executable, "-c", CALLS + code], capture_output=True, text=True, check=True)
    version, pages = done.stdout.strip().splitlines()
    assert version.startswith("mmea ")
    assert int(pages) < 3000


def test_where_the_library_is_another_one_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmea_calc.fast import memory

    def none_there(name: object) -> object:
        raise OSError("no such library")

    monkeypatch.setattr(memory.ctypes, "CDLL", none_there)
    assert memory.keep_freed_memory.__wrapped__() is False
