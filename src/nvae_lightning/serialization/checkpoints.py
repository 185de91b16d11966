"""Files of ``torch.save``, such as training checkpoints, that anybody may have written."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from nvae_lightning.utilities.plain_data import check_file, shown
from nvae_lightning.utilities.signals import is_first_rank

#: Name of the link to the latest checkpoint, and of the checkpoint with the best validation.
LAST, BEST = "last.ckpt", "best.ckpt"
#: Key of the latest weights in a checkpoint whose other weights are averaged, by Lightning.
LATEST_WEIGHTS = "current_model_state"
_NAME = re.compile(r"step(\d+)\.ckpt")


def read_torch_file(path: str | os.PathLike[str]) -> object:
    """Read tensors, plain containers and ``argparse.Namespace``; run nothing.

    Args:
        path: File that ``torch.save`` wrote.

    Raises:
        ValueError: If the file holds anything else, is damaged or asks for code to be run.
    """
    path = Path(path)
    try:
        check_file(path)
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"
    except OSError as error:
        raise ValueError(f"'{path}' does not exist; give a checkpoint file") from error
    except ValueError as error:
        raise ValueError(f"'{path}' is not a checkpoint ({error}); give another file") from error
    # torch compares no checksums; its older formats have none.
    if is_archive and (damaged := damage(path)) is not None:
        raise ValueError(f"'{path}' is damaged ({damaged}); give another file")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
            warnings.simplefilter("ignore")  # torch warns about files of older versions
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # not in torch's words, which advise to trust the file
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"'{path}' is damaged or not a checkpoint"
            f"{f' (it asks for {asked[1]})' if asked else ''}: only tensors, plain containers and "
            "argparse.Namespace are read, nothing in it was run; give another file"
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a training to the CPU.

    Raises:
        ValueError: If it is missing, damaged, or contains anything but tensors and plain values.
    """
    try:
        checkpoint = read_torch_file(path)
    except ValueError as error:
        raise ValueError(f"ckpt_path: {error}, or last") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(
            f"ckpt_path: '{path}' is not the checkpoint of a training; give one that is"
        )
    return checkpoint


def damage(path: Path) -> str | None:
    """Describe the damage of an archive that ``torch.save`` wrote; None if it is intact."""
    try:
        check_stored(path)
        with zipfile.ZipFile(path) as archive:
            name = archive.testzip()
    except Exception as error:  # zipfile's own errors are of many kinds
        return " ".join(str(error).split()) or repr(error)
    return None if name is None else f"wrong checksum of {shown(name)}"


def check_stored(path: Path) -> None:
    """Check that an archive holds no more than its file, before any of it is read.

    A few compressed bytes, or members that share them, may expand to more than a machine's
    memory. PyTorch neither compresses nor shares, but reads archives that do.

    Raises:
        OSError: If the file does not exist.
        ValueError: If it is not a regular file, or holds more.
        zipfile.BadZipFile: If it is not an archive.
    """
    check_file(path)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    is_compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if is_compressed or sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members are compressed, which torch.save does not do")


def step_of(path: Path) -> int:
    """Return the number of optimiser steps of a checkpoint; -1 if it is not readable.

    File times are unreliable: clocks are set back, and a copy is newer than its original.
    """
    if named := _NAME.fullmatch(path.name):
        return int(named[1])
    try:
        check_stored(path)
        return int(
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        )
    except Exception:  # pickle raises many kinds
        return -1


def last_checkpoint(folder: Path) -> Path | None:
    """Return the intact checkpoint with the most steps; warn about later ones that are damaged."""
    paths = {path.resolve() for path in folder.glob("[!.]*.ckpt") if path.exists()}
    # Of several with the same step, prefer the one named after it.
    order = {path: (step_of(path), _NAME.fullmatch(path.name) is not None) for path in paths}
    for path in sorted(paths, key=order.__getitem__, reverse=True):
        damaged = damage(path)
        if damaged is None:
            return path
        if is_first_rank():
            message = f"ckpt_path: '{path}' is damaged ({damaged}); an older one is used"
            warnings.warn(message, stacklevel=2)
    return None
