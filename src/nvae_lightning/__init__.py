"""NVAE (Vahdat & Kautz, NeurIPS 2020): a deep hierarchical VAE for images."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nvae_lightning.cli.startup import begin_command

if TYPE_CHECKING:
    from nvae_lightning.inference import load_model
    from nvae_lightning.model import NVAE
    from nvae_lightning.training import NVAEModule

    __version__: str

__all__ = ["NVAE", "NVAEModule", "__version__", "load_model"]

#: Module of each public name, imported on first use, so that commands start without PyTorch.
_ROOMS = {"NVAE": "model", "NVAEModule": "training", "load_model": "inference"}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name == "__version__":
        return import_module("importlib.metadata").version("nvae-lightning")
    if name in _ROOMS:
        return getattr(import_module(f"nvae_lightning.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'nvae_lightning' has no attribute '{name}'")


begin_command()
