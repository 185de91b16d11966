"""Memory that steps take."""

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

from nvae_lightning.benchmarking.work import Work

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """Most bytes at one time while steps are made.

    Args:
        tensors: of tensors on the device.
        kept: of them, what outlives a step: weights, buffers, gradients, the optimiser's state.
        resident: of all that the process has in main memory, what other settings keep included.
    """

    tensors: int
    kept: int
    resident: int


def profile_steps(work: Work) -> profile:
    """Profile two steps."""
    with profile(profile_memory=True, acc_events=True) as profiled:
        work.run(num_warmup_steps=1, num_steps=1)
    return profiled


def allocated_bytes(profiled: profile) -> int:
    """Return the most bytes on a CPU that were allocated at one time since a profile began.

    They are those that PyTorch's allocator gave out, to compiled code, too. Buffers that oneDNN
    makes for itself are not among them.
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
    """Double a batch until it does not fit into an accelerator's memory any more.

    Args:
        attempt: makes steps of so many images.
        first: images to begin with.

    Returns:
        The last number that fitted; 0 if the first did not.
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
    """Give freed memory back to the system, or what one work frees hides what another takes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def restart_peaks(device: torch.device) -> None:
    """Forget what there was before, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")


def peaks(work: Work) -> Memory:
    """Return the peaks since their last restart; tensors on a CPU are not counted."""
    on_gpu = torch.cuda.max_memory_allocated(work.device) if work.device.type == "cuda" else 0
    return Memory(on_gpu, work.kept_bytes, _resident_bytes())


def _resident_bytes() -> int:
    """Peak of the resident set; on systems other than Linux since the process began."""
    if _STATUS.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
        assert found is not None
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
