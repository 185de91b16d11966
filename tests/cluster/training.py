"""The trainings under test: five steps of a tiny model, on the same images everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SLURM_SCRIPT = ROOT / "conf" / "launcher" / "slurm.sh"
TORCHRUN_SCRIPT = ROOT / "conf" / "launcher" / "torchrun.sh"

NUM_STEPS, GLOBAL_BATCH = 5, 8
PATIENCE = 300.0  # seconds for a start, of which a busy machine needs a minute or two
TINY = (
    "dataset=mnist_5k", "dataset.validation_fraction=0", "model=tiny",
    "model.hierarchy.num_groups=[1,1]", "model.hierarchy.channels=4",
    f"trainer.max_steps={NUM_STEPS}", "trainer.precision=64-true", "trainer.limit_test_batches=1",
    "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false",
    "num_importance_samples=1", "logger=csv", "~callbacks.pictures", "~callbacks.kl_per_group",
    "callbacks.checkpoint.every_n_train_steps=1", "callbacks.preemption.check_every_n_steps=1",
    "+callbacks.by_image._target_=by_image.ByImage",
)  # fmt: skip
TWO_RANKS = (*TINY, f"dataset.batch_size={GLOBAL_BATCH // 2}", "trainer.accelerator=cpu")


# Otherwise every rank would compile all modules again, where Python may not write byte code.
BYTE_CODE = tempfile.TemporaryDirectory(prefix="pycache")


def environment(**changes: str) -> dict[str, str]:
    """Environment of a training, in which `python` is this one and finds the callback."""
    paths = (str(ROOT / "src"), str(Path(__file__).parent))
    return {
        **os.environ,
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONPYCACHEPREFIX": BYTE_CODE.name,
        "PYTHONDONTWRITEBYTECODE": "",
        "OMP_NUM_THREADS": "1",
        **changes,
    }


def wait_for(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait for other processes."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.2)


def train_on_one_rank(run: Path, *overrides: str) -> None:
    """Train with the whole batch on one rank."""
    result = subprocess.run(
        [
            sys.executable, "-m", "nvae_lightning.train", *TINY, "trainer=cpu",
            f"dataset.batch_size={GLOBAL_BATCH}", f"hydra.run.dir={run}", *overrides,
        ],
        env=environment(), cwd=run.parent, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def final_weights(run: Path) -> dict[str, Tensor]:
    """Latest weights, not averaged, in the last checkpoint of a whole run."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == NUM_STEPS
    return checkpoint.get("current_model_state", checkpoint["state_dict"])


def assert_same_weights(run: Path, expected: dict[str, Tensor]) -> None:
    """Compare the final weights with those of one rank."""
    found = final_weights(run)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.0, atol=1e-5, msg=name)
