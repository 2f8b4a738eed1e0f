"""What this machine is: its fast precision, its hardware, the versions that run on it."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import digitnet
from digitnet.cores import count_cores

CPUINFO = Path("/proc/cpuinfo")


def choose_precision(accelerator: str = "auto") -> tuple[str, str]:
    """The fastest precision that trains as well as float32 here: bfloat16 where the hardware multiplies it natively.

    Elsewhere bfloat16 is slower than float32.

    Args:
        accelerator: as Lightning's Trainer takes it: "auto", "cpu", "gpu", "cuda", "mps".

    Returns:
        A precision for the Trainer, and the reason, to print.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        native = major >= 8
        return "bf16-mixed" if native else "32-true", f"CUDA capability {major}.{minor}"
    if accelerator in ("gpu", "mps") or (accelerator == "auto" and torch.backends.mps.is_available()):
        return "32-true", "no CUDA device"
    flags = set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()
    found = sorted(flags & {"avx512_bf16", "amx_bf16"})
    if accelerator in ("auto", "cpu") and found:
        return "bf16-mixed", f"this CPU has {' and '.join(found)}"
    return "32-true", "no native bfloat16 here"


def keep_freed_memory() -> None:
    """Have the C library keep what a training step frees for the next one, on Linux with glibc.

    Otherwise it gives every large tensor back, and the system hands its pages out again one fault at a time.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # musl has none; some versions of glibc refuse more than 32 MiB. To set one alone would make matters worse.
    if mallopt is not None and (mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)):
        mallopt(trim_threshold, 2**30)


def describe_hardware() -> str:
    """One line: the processor, the cores this process may use, and the GPU if there is one."""
    match = re.search(r"model name\s*:\s*(.+)", CPUINFO.read_text()) if CPUINFO.exists() else None
    name = match[1].strip() if match else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {count_cores()} cores{gpu}"


def list_versions() -> dict[str, str]:
    """Version of Python and of each package that a result depends on."""
    packages = ("torch", "torchvision", "lightning", "torchmetrics", "scikit-learn", "numpy")
    own = {"python": platform.python_version(), "digitnet": digitnet.__version__}
    return own | {package: version(package) for package in packages}


def describe_environment() -> dict[str, Any]:
    """What a record of a result says of the machine: ``hardware``, ``versions`` and the ``date`` now, in UTC."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"hardware": describe_hardware(), "versions": list_versions(), "date": now}
