"""Checks of the supported precisions, and settings of a command's process."""

from __future__ import annotations

import ctypes
import sys
import warnings

import torch
from lightning.pytorch.utilities import rank_zero_warn

#: Lightning's names of training and inference in float16, with weights in float32.
HALF = ("16-mixed", "16")


def check_precision(name: str, precision: object, accelerator: str) -> None:
    """Check that the device supports a precision, and warn if it only emulates it.

    Args:
        name: Name of the setting.
        precision: Lightning's name of the precision.
        accelerator: Lightning's name of the accelerator; any but ``cpu`` means the best one here.

    Raises:
        ValueError: If the device does not support it.
    """
    best = torch.accelerator.current_accelerator(check_available=True)
    device_type = "cpu" if best is None or accelerator == "cpu" else best.type
    if str(precision) in HALF and device_type != "cuda":
        raise ValueError(
            f"{name}: got {precision}, which requires a CUDA GPU; set {name}=bf16-mixed or 32-true"
        )
    if str(precision).startswith("bf16") and device_type == "cpu" and not _cpu_has_bf16():
        rank_zero_warn(
            f"{name}: got {precision}, which this CPU emulates at a fraction of the speed of 32 "
            f"bits; set {name}=32-true"
        )


def _cpu_has_bf16() -> bool:
    """Return whether oneDNN computes in bf16 here; on x86 this requires AVX-512."""
    has_onednn = torch.backends.mkldnn.is_available()
    return has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def prepare_process() -> None:
    """Hide warnings that users can do nothing about, and keep freed memory."""
    # Lightning 2.6 uses a class that torch deprecates.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")
    # Our loaders read ahead in a thread, which Lightning does not see.
    warnings.filterwarnings("ignore", message="The .* does not have many workers")
    # Hydra has put its own files into the run's folder.
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")
    # DDP's advice on 1x1 kernels, whose two memory formats are one.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Every login node of SLURM has srun, but a run there does not need it.
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system.

    Otherwise the system clears new pages for every large feature map, which takes a tenth of a
    training step on a CPU.
    """
    if sys.platform != "linux" or not hasattr(glibc := ctypes.CDLL(None), "mallopt"):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # of malloc.h
    glibc.mallopt(m_mmap_max, 0)
    glibc.mallopt(m_trim_threshold, 2**31 - 1)
    glibc.mallopt(m_top_pad, 2**26)
