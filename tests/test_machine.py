"""The choice of precision on machines that this one is not, and how many cores there are."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from digitnet import machine


@pytest.mark.parametrize(
    ("cpu_flags", "capability", "accelerator", "expected"),
    [
        ("avx2 avx512f avx512_bf16", None, "auto", "bf16-mixed"),
        ("avx2 amx_bf16", None, "cpu", "bf16-mixed"),
        ("avx2 avx512f", None, "auto", "32-true"),
        ("avx2", (9, 0), "auto", "bf16-mixed"),
        ("avx2", (8, 0), "gpu", "bf16-mixed"),
        ("avx512_bf16", (7, 5), "gpu", "32-true"),
        ("avx2", (9, 0), "cpu", "32-true"),
    ],
)
def test_bfloat16_only_where_it_is_native(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cpu_flags: str,
    capability: tuple[int, int] | None,
    accelerator: str,
    expected: str,
) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name : Some CPU\nflags : fpu {cpu_flags} sse\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    precision, reason = machine.choose_precision(accelerator)
    assert precision == expected
    assert reason


FAULTS = """
import resource
import torch
from digitnet.machine import keep_freed_memory

def count_faults():
    for _ in range(20):
        torch.ones(16_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

without = count_faults()
keep_freed_memory()
print(without, count_faults())
"""


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(2**31, {-3: 2**30, -1: 2**30}), (2**25, {-3: 2**25, -1: 2**30}), (0, {})],  # what mallopt takes; what is set
)
def test_freed_memory_is_kept_as_far_as_the_c_library_lets_one(
    monkeypatch: pytest.MonkeyPatch, limit: int, expected: dict[int, int]
) -> None:
    options: dict[int, int] = {}

    def mallopt(option: int, value: int) -> int:
        if option == -3 and value > limit:
            return 0
        options[option] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(sys, "platform", "linux")
    machine.keep_freed_memory()
    assert options == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_"))}
    run = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True, env=environment)
    faults = [int(number) for number in run.stdout.split()]
    assert faults[0] > 10 * 64_000_000 / 65_536  # at the least, with pages of 64 KiB
    assert faults[1] < faults[0] / 20


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_cores_are_those_this_process_may_use() -> None:
    script = """
import os
from digitnet.cores import count_cores
print(count_cores() == len(os.sched_getaffinity(0)))
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
print(count_cores())
del os.sched_getaffinity
print(count_cores() == os.cpu_count())
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["True", "1", "True"]
