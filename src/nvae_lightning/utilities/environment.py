"""Version and device that a run records."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[3]


def version() -> str:
    """Return the package's version; in a checkout also the commit, and ``dirty`` if changed.

    For example ``0.1.0``, ``0.1.0+621a953`` and ``0.1.0+621a953.dirty``.
    """
    number = importlib.metadata.version("nvae-lightning")
    if not (_ROOT / ".git").exists():
        return number
    try:
        commit = subprocess.run(
            ["git", "-C", str(_ROOT), "describe", "--always", "--exclude=*", "--dirty=.dirty"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return number  # no git, or the checkout of another user
    return f"{number}+{commit.stdout.strip()}"


def device_name(device: torch.device, count: int) -> str:
    """Name devices: ``8 x NVIDIA H100 80GB HBM3``, or ``CPU (Intel Xeon), 2 threads``."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"CPU ({_processor()}), {threads} thread{'s' if threads > 1 else ''}"
    else:
        name = device.type
    return name if count == 1 else f"{count} x {name}"


def _processor() -> str:
    """Return the name of the processor, which Python knows only on some systems."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
