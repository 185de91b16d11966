"""Recorded values of the published networks: small copies here, the originals where they exist.

The files in `reference/` contain only recorded numbers. They leave out two parts of the originals:
weights that a file repeats under a second name, and all but every fourth row and column of large
`logits` (`logits[::4,::4]`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

COPIES = Path(__file__).parent / "reference"
ORIGINALS = Path(__file__).parents[3] / "shared" / "reference"


@dataclass(frozen=True)
class Recorded:
    """One recorded file: its tensors by name, and the metadata of the JSON file beside it."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names begin with the prefix, without it."""
        start = len(prefix)
        return {name[start:]: v for name, v in self.tensors.items() if name.startswith(prefix)}

    def series(self, prefix: str) -> list[Tensor]:
        """Numbered tensors in order."""
        return [value for _, value in sorted(self.under(prefix).items())]

    def check(self, name: str, got: Tensor, tolerance: float = 1e-5) -> None:
        """Compare by the largest difference over the largest recorded value."""
        if f"{name}[::4,::4]" in self.tensors:
            name, got = f"{name}[::4,::4]", got[..., ::4, ::4]
        expected = self[name]
        assert got.shape == expected.shape, name
        error = float((got.detach() - expected).abs().max() / expected.abs().max())
        assert error <= tolerance, f"{name}: error {error:.2e}"

    def checkpoint(self) -> dict[str, Any]:
        """Checkpoint as saved by the published code."""
        return {
            "state_dict": self.under("state/"),
            "args": argparse.Namespace(**self.facts["config"]),
            "epoch": 1,
            "global_step": self.facts["global_step"],
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-2, "betas": (0.9, 0.999)}]},
            "scheduler": {"T_max": 194.0, "base_lrs": [1e-2], "last_epoch": 0},
            "grad_scalar": {"scale": 1024.0, "growth_interval": 2000, "_growth_tracker": 0},
            "arch_instance": self.facts["config"]["arch_instance"],
        }


def _read(folder: Path, name: str) -> Recorded:
    file = folder / f"{name}.json"
    facts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return Recorded(load_file(folder / f"{name}.safetensors"), facts)


@pytest.fixture(scope="session", params=[COPIES, ORIGINALS], ids=["copy", "original"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Folder of recorded files."""
    if not request.param.is_dir():
        pytest.skip("requires the originals beside the checkout")
    return request.param


@pytest.fixture(
    scope="session", params=["a_cifar_nf0", "b_cifar_nf1", "c_mnist", "d_bnelu_nores_nose"]
)
def network(request: pytest.FixtureRequest, folder: Path) -> Recorded:
    """Each recorded network in turn."""
    return _read(folder, request.param)


@pytest.fixture(scope="session")
def checkpoint(network: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Checkpoint file of the network."""
    path = tmp_path_factory.mktemp("published") / "checkpoint.pt"
    torch.save(network.checkpoint(), path)
    yield path
    path.unlink()


@pytest.fixture(scope="session")
def adamax() -> Recorded:
    """Trace of an optimiser."""
    return _read(COPIES, "adamax")


@pytest.fixture(scope="session")
def flow() -> Recorded:
    """A pair of flows, with its masks."""
    return _read(COPIES, "ar_flow")


@pytest.fixture(scope="session")
def mixture() -> Recorded:
    """Every level at 8 and 5 bits under mixtures of logistics."""
    return _read(COPIES, "dml")


@pytest.fixture(scope="session")
def schedules() -> dict[str, Any]:
    """Learning rate, beta, lambda and balancing factors."""
    return json.loads((COPIES / "schedules.json").read_text(encoding="utf-8"))
