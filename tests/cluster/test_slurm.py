"""Training under SLURM: two nodes, requeueing before the time limit, cancelling, sweeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from .slurm import ACTIVE, Slurm
from .training import (
    PATIENCE,
    SLURM_SCRIPT,
    TWO_RANKS,
    assert_same_weights,
    final_weights,
    wait_for,
)

pytestmark = pytest.mark.cluster

HOLD = "+callbacks.by_image.hold_before=3"


def start_and_wait(slurm: Slurm, folder: Path) -> str:
    """Submit the documented script, and wait until both ranks are about to train step 3."""
    job = slurm.submit(
        "--nodes=2", "--ntasks-per-node=1", "--time=60", str(SLURM_SCRIPT),
        *TWO_RANKS,
        "hydra.run.dir=run", HOLD, cwd=folder,
    )  # fmt: skip

    def holds() -> bool:
        assert slurm.state(job)["JobState"] in ACTIVE, log(folder, job)
        return len(list(folder.glob("reached.*"))) == 2

    wait_for(holds, "both ranks")
    return job


def log(folder: Path, job: str) -> str:
    return (folder / f"slurm-{job}.log").read_text()


def test_srun_on_two_nodes_equals_one_rank(
    slurm: Slurm, one_rank: dict[str, Tensor], tmp_path: Path
) -> None:
    slurm.run(
        "srun", "--nodes=2", "--ntasks-per-node=1", "python", "-m", "nvae_lightning.train",
        *TWO_RANKS, "trainer=multinode", "trainer.num_nodes=2", "trainer.devices=1",
        "hydra.run.dir=run",
        cwd=tmp_path, timeout=PATIENCE,
    )  # fmt: skip
    assert_same_weights(tmp_path / "run", one_rank)
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["num_devices"] == 2


def test_a_job_is_requeued_before_its_time_limit_and_resumes(
    slurm: Slurm, one_rank: dict[str, Tensor], tmp_path: Path
) -> None:
    job = start_and_wait(slurm, tmp_path)
    slurm.shorten(job)
    wait_for(lambda: slurm.state(job)["Restarts"] == "1", "the job to be requeued")
    slurm.wait_for(job, "PENDING")
    slurm.start_now(job)
    slurm.wait_for(job, "COMPLETED")
    text = log(tmp_path, job)
    assert text.count("ended by SIGUSR1: everything is saved") == 1
    assert "at step 3" in text
    assert "Traceback" not in text
    assert "not requeued" not in text
    assert_same_weights(tmp_path / "run", one_rank)


def test_scancel_saves_and_ends_the_job(slurm: Slurm, tmp_path: Path) -> None:
    job = start_and_wait(slurm, tmp_path)
    slurm.run("scancel", job)
    slurm.wait_for(job, "CANCELLED")
    wait_for(lambda: not slurm.run("squeue", "--noheader", f"--jobs={job}").strip(), "the end")
    text = log(tmp_path, job)
    assert text.count("ended by SIGTERM: everything is saved") == 1
    assert "Traceback" not in text
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3


def test_a_sweep_submits_jobs_of_two_ranks(slurm: Slurm, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    slurm.run(
        "python", "-m", "nvae_lightning.train", "-m", *TWO_RANKS, "launcher=submitit_slurm",
        "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=30", "trainer.devices=2",
        "trainer.strategy=ddp", "optimizer.lr=0.002,0.003", "hydra.sweep.dir=sweep",
        cwd=tmp_path, timeout=PATIENCE,
    )  # fmt: skip
    for number, rate in enumerate((0.002, 0.003)):
        run = tmp_path / "sweep" / str(number)
        settings = yaml.safe_load((run / "config.yaml").read_text())
        assert settings["num_devices"] == 2
        assert settings["optimizer"]["lr"] == rate
        final_weights(run)
