"""Tensors that are computed once and cached in a file."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nvae_lightning.utilities.files import whole_file


def hash_of(settings: object, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of settings, by their ``repr``, and of named tensors."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class TensorCache:
    """A file of tensors, valid for one fingerprint.

    Args:
        file: Path of the file.
        fingerprint: Output of :func:`hash_of` for everything that the tensors depend on.
    """

    file: Path
    fingerprint: str

    def read(self) -> dict[str, Tensor] | None:
        """Return the tensors; None if they are missing, damaged or of another fingerprint."""
        try:
            with safe_open(self.file, "pt") as stored:
                if (stored.metadata() or {}).get("fingerprint") == self.fingerprint:
                    return {key: stored.get_tensor(key) for key in stored.keys()}
        except (OSError, SafetensorError):
            pass
        return None

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the file; only warn on failure, because computing them may have taken hours."""
        content = save(dict(tensors), metadata={"fingerprint": self.fingerprint})
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.file) as partial:
                partial.write_bytes(content)
        except OSError as error:
            message = f"'{self.file}' is not writable ({error}), and will be computed again"
            warnings.warn(message, stacklevel=2)
