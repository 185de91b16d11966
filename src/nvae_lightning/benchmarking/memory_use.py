"""Memory use of steps."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import profile

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """Peak memory of steps, in bytes.

    Args:
        tensors: Peak of the tensors on the device.
        kept: Part of it that outlives a step: weights, buffers, gradients, optimiser state.
        resident: Peak resident set of the process, other settings in memory included.
    """

    tensors: int
    kept: int
    resident: int


def allocated_bytes(profiled: profile) -> int:
    """Return the peak of CPU memory from PyTorch's allocator during a profile.

    Compiled code allocates there too; oneDNN's internal buffers are not included.
    """
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type().name == "CPU":
            live += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, live)
    return peak


def largest_batch(attempt: Callable[[int], object], first: int) -> int:
    """Double the batch size until the accelerator runs out of memory.

    Args:
        attempt: Function that runs steps with a batch size.
        first: Batch size to start from.

    Returns:
        The last batch size that fitted; 0 if the first did not.
    """
    fitted, size = 0, first
    while True:
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            break
        fitted, size = size, 2 * size
        release_memory()
    release_memory()
    return fitted


def release_memory() -> None:
    """Return freed memory to the system, so that it does not hide the needs of the next work."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def reset_peaks(device: torch.device) -> None:
    """Reset the peaks, where the system supports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")


def peaks(device: torch.device, kept_bytes: int) -> Memory:
    """Return the peaks since their last reset; tensors on a CPU are not counted."""
    on_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Memory(on_gpu, kept_bytes, _resident_bytes())


def _resident_bytes() -> int:
    """Return the peak resident set; outside Linux, since the process started."""
    if _STATUS.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
        assert found is not None
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
