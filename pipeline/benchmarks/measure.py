"""Time, memory and the machine's ceilings."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from pipeline.code import code_version
from pipeline.errors import ClusterError
from pipeline.model.implementations.blocked import product

GIB = 1 << 30


def wait(device: torch.device) -> None:
    """Let a GPU come to the end of what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long one call takes."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of several calls, after one that is not counted."""
    work()
    return statistics.median(seconds(work, device) for _ in range(repeats))


def peak_extra_bytes(work: Callable[[], object], device: torch.device) -> int:
    """How far one call takes memory above where it was: of the GPU's allocator, or of the whole process.

    Raises:
        ClusterError: the system does not let a process reset its peak.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError as error:
        raise ClusterError(f"peak memory cannot be measured here ({error}); it takes Linux") from None
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def ceilings(device: torch.device, precision: torch.dtype, repeats: int = 5) -> dict[str, float]:
    """FLOP/s of a large matrix product in `precision`, by torch and by what tiles use; bytes/s of a large copy.

    `matmul_flops` is the better of the two.
    """
    size = 4096 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(precision) for _ in range(2))
    by_torch, by_tiles = (median_seconds(work, device, repeats) for work in (lambda: a @ b, lambda: product(a, b)))
    source = torch.ones(GIB // 16 if device.type == "cpu" else GIB // 2, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device, repeats)
    return {
        "matmul_flops": 2 * size**3 / min(by_torch, by_tiles),
        "matmul_flops_torch": 2 * size**3 / by_torch,
        "matmul_flops_tiles": 2 * size**3 / by_tiles,
        "copy_bytes": 2 * source.numel() * source.itemsize / copy,
    }


def machine(device: torch.device) -> dict[str, str | int]:
    """What was measured on."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "code": code_version(),
    }


def free_bytes(device: torch.device) -> int:
    """Memory that is free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _status(key: str) -> int:
    """Bytes of one line of this process's status."""
    (line,) = (line for line in _lines("/proc/self/status") if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
