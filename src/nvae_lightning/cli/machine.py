"""What this machine can compute, and how it is set up for a command."""

from __future__ import annotations

import ctypes
import sys
import warnings

import torch
from lightning.pytorch.utilities import rank_zero_warn

#: Lightning's names of training and inference in float16, with weights in float32.
HALF = ("16-mixed", "16")


def check_precision(name: str, precision: object, accelerator: str) -> None:
    """Check that this machine computes in a precision, and warn if it does so slowly.

    Args:
        name: of the setting.
        precision: Lightning's name of the number format.
        accelerator: what computes: ``cpu``, or anything else for the best that there is.

    Raises:
        ValueError: If it does not.
    """
    best = torch.accelerator.current_accelerator(check_available=True)
    device_type = "cpu" if best is None or accelerator == "cpu" else best.type
    if str(precision) in HALF and device_type != "cuda":
        raise ValueError(
            f"{name}: got {precision}, which takes a GPU; set {name}=bf16-mixed or 32-true"
        )
    if str(precision).startswith("bf16") and device_type == "cpu" and not _cpu_has_bf16():
        rank_zero_warn(
            f"{name}: got {precision}, for which this CPU has no instructions, so that it takes "
            f"several times as long as in 32 bits; set {name}=32-true"
        )


def _cpu_has_bf16() -> bool:
    """Whether oneDNN computes in bf16 here, which on x86 takes AVX-512."""
    has_onednn = torch.backends.mkldnn.is_available()
    return has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def hide_warnings() -> None:
    """Hide warnings of Lightning's about what no user could change."""
    # Lightning 2.6's use of a class that torch deprecates.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")
    # Our loaders read ahead in a thread, which it does not see.
    warnings.filterwarnings("ignore", message="The .* does not have many workers")
    # Hydra has put its own files into the run's folder.
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")
    # DDP's advice on 1x1 kernels, whose two memory formats are one.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Every login node of SLURM has srun, and a run on it needs none.
    warnings.filterwarnings("ignore", message="The `srun` command is available")


def keep_freed_memory() -> None:
    """Let glibc keep memory that is freed rather than give it back to the system.

    It gives every large feature map back, and is given new pages, which the system fills with
    zeros, for the next: a tenth of a training step on a CPU.
    """
    if sys.platform != "linux" or not hasattr(glibc := ctypes.CDLL(None), "mallopt"):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # of malloc.h
    glibc.mallopt(m_mmap_max, 0)
    glibc.mallopt(m_trim_threshold, 2**31 - 1)
    glibc.mallopt(m_top_pad, 2**26)
