"""Files of ``torch.save`` that anybody may have written."""

from __future__ import annotations

import os
import warnings
from argparse import Namespace
from pathlib import Path

import torch

from nvae_lightning.utilities.archive import check_stored, damage, is_archive, why_unreadable
from nvae_lightning.utilities.plain_data import check_file


def read_torch_file(path: str | os.PathLike[str]) -> object:
    """Read tensors, plain containers and ``argparse.Namespace``; run nothing.

    Args:
        path: File that ``torch.save`` wrote.

    Raises:
        ValueError: If the file holds anything else, is damaged or asks for code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"'{path}' is not a file: give a checkpoint")
    try:
        check_file(path)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error
    try:
        if is_archive(path):
            check_stored(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
            warnings.simplefilter("ignore")  # torch warns about files of older versions
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"'{path}' {why_unreadable(path, error)}") from error
    # torch compares no checksums; older formats have none.
    if is_archive(path) and (damaged := damage(path)) is not None:
        raise ValueError(
            f"'{path}' is damaged, its checksums are wrong ({damaged}): give another file"
        )
    return content
