"""Resumed trainings have the weights, bit for bit, and the metrics of an uninterrupted one."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from warm_python import Process, start_python

if not hasattr(os, "fork"):
    pytest.skip("requires fork", allow_module_level=True)

NUM_STEPS = 36
# Pictures take half of the time and do not affect the resumed state.
TINY = (
    "dataset=image_folder", "dataset.image.size=16", "dataset.batch_size=8", "model=tiny",
    "model.hierarchy.num_groups=[1,1]", "trainer=cpu", "logger=csv", "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1", "trainer.check_val_every_n_epoch=1",
    "num_importance_samples=2", "~callbacks.pictures", "~callbacks.kl_per_group",
    "~callbacks.progress_bar", "trainer.enable_progress_bar=false",
    "callbacks.checkpoint.every_n_train_steps=1",
)  # fmt: skip

CODE = """
import sys, torch
sabotage, *overrides = sys.argv[1:]
sys.argv = ["train", *overrides]
from nvae_lightning.cli.command import run
from nvae_lightning.train import main
exec(sabotage)
run(main)
"""


class Attempt(NamedTuple):
    """A training in its own process, and its output."""

    process: Process
    log: Path

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit status, negative for a signal, and the output."""
        assert self.process.ends_within(100)
        assert self.process.returncode is not None
        return self.process.returncode, self.log.read_text()


Start = Callable[..., Attempt]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 96 images to train, 20 to validate and 20 to test with."""
    folder = tmp_path_factory.mktemp("interruptions")
    generator = np.random.default_rng(0)
    for split, num_images in (("train", 96), ("val", 20), ("test", 20)):
        (folder / "images" / split).mkdir(parents=True)
        for index in range(num_images):
            pixels = generator.integers(40, 200, 3) + generator.integers(0, 30, (16, 16, 3))
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(folder / "images" / split / f"{index:03}.png")
    return folder


@pytest.fixture(scope="module")
def start(root: Path) -> Start:
    """Start a training in a folder, with code that interrupts it."""

    def start(folder: str, *overrides: str, sabotage: str = "", **environment: str) -> Attempt:
        log = root / f"{folder}.log"
        given = [*TINY, "dataset.root=images", f"hydra.run.dir={folder}", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", **environment}
        process = start_python(
            "-c", CODE, sabotage, *given, cwd=root, stdout=log, stderr=log, env=environment
        )
        return Attempt(process, log)

    return start


def finish(attempt: Attempt) -> str:
    status, text = attempt.end()
    assert status == 0, text
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def whole(root: Path, start: Start) -> Path:
    """The uninterrupted run."""
    finish(start("whole"))
    return root / "whole"


def load(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [
            {name: value for name, value in row.items() if name != "train/images_per_second"}
            for row in csv.DictReader(file)
        ]


def learning_rates(folder: Path) -> list[str]:
    return [row["lr-Adamax"] for row in rows(folder) if row["lr-Adamax"]]


def assert_equal(left: Any, right: Any, place: str) -> None:
    """Compare nested values, tensors bit by bit."""
    assert type(left) is type(right), place
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), place
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_equal(left[key], right[key], f"{place}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), place
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_equal(*pair, f"{place}/{index}")
    else:
        assert left == right, place


def assert_same_training(whole: Path, other: Path) -> None:
    ours, theirs = load(whole), load(other)
    assert theirs["global_step"] == NUM_STEPS
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "factors", "loops"):
        assert_equal(ours[key], theirs[key], key)
    assert rows(whole) == rows(other)


def resumption(folder: Path) -> list[str]:
    return ["ckpt_path=last"] if list(folder.glob("checkpoints/[!.]*.ckpt")) else []


def newest(folder: Path) -> int:
    """Step of the newest checkpoint."""
    return max((int(path.name[4:11]) for path in folder.glob("checkpoints/step*.ckpt")), default=0)


@pytest.mark.parametrize("num_kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_times_do_not_change_the_result(
    root: Path, start: Start, whole: Path, num_kills: int
) -> None:
    folder = root / f"killed-{num_kills}"
    generator = random.Random(int(os.environ.get("NVAE_TEST_SEED", "0")))
    steps_at_kills: list[int] = []
    while len(steps_at_kills) < num_kills:
        before = newest(folder)
        # Later on average with each kill.
        due = round((len(steps_at_kills) + generator.uniform(0, 3)) * NUM_STEPS / num_kills)
        interval = generator.choice([1, 1, 1, 2, 3])
        attempt = start(
            folder.name,
            *resumption(folder),
            f"callbacks.checkpoint.every_n_train_steps={interval}",
        )
        kind = generator.choice(["starting", "writing", "later", "later", "later"])
        if kind == "starting":
            ended = attempt.process.ends_within(generator.uniform(0.1, 1.0))
        else:
            due = min(max(due, before + 1), NUM_STEPS)
            pattern = ".step*.partial.ckpt" if kind == "writing" else "step*.ckpt"
            while not (ended := attempt.process.ends_within(0.0005)):
                steps = [
                    int(p.name.strip(".")[4:11]) for p in folder.glob(f"checkpoints/{pattern}")
                ]
                if max(steps, default=0) >= due:
                    break
            if kind == "later" and not ended:
                ended = attempt.process.ends_within(generator.uniform(0.0, 0.15))
        if ended:
            finish(attempt)
            break
        attempt.process.kill()
        steps_at_kills.append(newest(folder))
        assert steps_at_kills[-1] >= before
    finish(start(folder.name, *resumption(folder)))
    print("kills at", steps_at_kills)
    assert len(steps_at_kills) >= 0.6 * num_kills
    assert len(set(steps_at_kills)) >= 0.4 * num_kills
    assert_same_training(whole, folder)


# Code that interrupts the process at a step.
KILL_WITHIN_CHECKPOINT = """
import io, os
save = torch.save
def save_half(values, file):
    if values["global_step"] == {step}:
        buffer = io.BytesIO()
        save(values, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        os.kill(os.getpid(), 9)
    save(values, file)
torch.save = save_half
"""
KILL_AFTER_CHECKPOINT = """
import os, pathlib
replace = pathlib.Path.replace
def replace_and_die(path, target):
    replace(path, target)
    if pathlib.Path(target).name == "step{step:07d}.ckpt":
        os.kill(os.getpid(), 9)
pathlib.Path.replace = replace_and_die
"""
KILL_AFTER_LINK = """
import os, pathlib
replace = pathlib.Path.replace
def replace_and_die(path, target):
    replace(path, target)
    link = pathlib.Path(target)
    if link.name == "last.ckpt" and link.resolve().name == "step{step:07d}.ckpt":
        os.kill(os.getpid(), 9)
pathlib.Path.replace = replace_and_die
"""
KILL_WITHIN_ROW = """
import os
from nvae_lightning.training import csv_logger
save = csv_logger._Writer.save
def save_half(writer):
    if any("train/loss" in row and row["step"] == {step} - 1 for row in writer.metrics):
        with open(writer.metrics_file_path, "a") as file:
            file.write("1,0.00")
        os.kill(os.getpid(), 9)
    save(writer)
csv_logger._Writer.save = save_half
"""
SIGNAL = """
import os
from nvae_lightning.training.module import NVAEModule
before = NVAEModule.on_before_optimizer_step
def send(module, optimizer):
    before(module, optimizer)
    if module.global_step == {step} - 1:
        os.kill(os.getpid(), {number})
NVAEModule.on_before_optimizer_step = send
"""
SIGNAL_WITHIN_ACCUMULATION = """
import os
from nvae_lightning.training.module import NVAEModule
step = NVAEModule.training_step
def send(module, batch, batch_idx):
    if module.global_step == {step} and batch_idx == 2 * ({step} % 6):
        os.kill(os.getpid(), {number})
    return step(module, batch, batch_idx)
NVAEModule.training_step = send
"""
SIGNAL_IN_TEST = """
import os
from nvae_lightning.training.module import NVAEModule
step = NVAEModule.test_step
def send(module, batch, batch_idx):
    if batch_idx == 1:
        os.kill(os.getpid(), {number})
    return step(module, batch, batch_idx)
NVAEModule.test_step = send
"""
TWO_SIGNALS = """
import os
from nvae_lightning.training.module import NVAEModule
step = NVAEModule.training_step
def send(module, batch, batch_idx):
    if module.global_step == 7:
        os.kill(os.getpid(), {number})
        os.kill(os.getpid(), {number})
    return step(module, batch, batch_idx)
NVAEModule.training_step = send
"""


KILLS = {
    "each kind": (
        (5, KILL_WITHIN_ROW), (6, KILL_AFTER_CHECKPOINT), (12, KILL_WITHIN_CHECKPOINT),
        (24, KILL_AFTER_LINK),
    ),
    "ends of epochs": (
        (1, KILL_WITHIN_CHECKPOINT), (12, KILL_AFTER_CHECKPOINT), (13, KILL_AFTER_LINK),
        (23, KILL_AFTER_LINK), (36, KILL_WITHIN_CHECKPOINT), (36, KILL_AFTER_LINK),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "kills", ["each kind", pytest.param("ends of epochs", marks=pytest.mark.slow)]
)
def test_kills_around_a_checkpoint_do_not_change_the_result(
    root: Path, start: Start, whole: Path, kills: str
) -> None:
    folder = root / kills.replace(" ", "-")
    for step, sabotage in KILLS[kills]:
        attempt = start(folder.name, *resumption(folder), sabotage=sabotage.format(step=step))
        status, text = attempt.end()
        assert status == -signal.SIGKILL, text
        if sabotage is KILL_WITHIN_CHECKPOINT:
            assert newest(folder) == step - 1
            assert list(folder.glob("checkpoints/.*.partial.ckpt"))
        else:
            assert newest(folder) == step
    finish(start(folder.name, *resumption(folder)))
    assert not list(folder.glob("checkpoints/.*"))
    assert_same_training(whole, folder)


def test_a_signal_saves_the_current_step_and_the_run_resumes(
    root: Path, start: Start, whole: Path
) -> None:
    folder = root / "signals"
    rarely = "callbacks.checkpoint.every_n_train_steps=1000"
    for name, step in (("SIGTERM", 5), ("SIGINT", 12), ("SIGUSR1", 24), ("SIGTERM", 36)):
        number = getattr(signal, name)
        sabotage = SIGNAL.format(step=step, number=int(number))
        attempt = start(folder.name, rarely, *resumption(folder), sabotage=sabotage)
        status, text = attempt.end()
        assert status == 128 + number, text
        assert f"ended by {name}" in text
        assert f"ckpt_path=last hydra.run.dir={folder}" in text
        assert "Traceback" not in text
        assert load(folder)["global_step"] == newest(folder) == step
    finish(start(folder.name, rarely, "ckpt_path=last"))
    assert_same_training(whole, folder)


def test_a_signal_during_the_test_fails_and_a_resume_runs_the_test(
    root: Path, start: Start, whole: Path
) -> None:
    folder = root / "in-test"
    for name in ("SIGTERM", "SIGINT"):
        sabotage = SIGNAL_IN_TEST.format(number=int(getattr(signal, name)))
        status, text = start(folder.name, *resumption(folder), sabotage=sabotage).end()
        assert status == 128 + getattr(signal, name), text
        assert f"ended by {name}: the training is saved, its test has no results" in text
        assert "Traceback" not in text
    finish(start(folder.name, "ckpt_path=last"))
    assert_same_training(whole, folder)


def test_a_second_ctrl_c_ends_within_the_step_without_saving(root: Path, start: Start) -> None:
    sabotage = TWO_SIGNALS.format(number=int(signal.SIGINT))
    rarely = "callbacks.checkpoint.every_n_train_steps=5"
    status, text = start("twice", rarely, sabotage=sabotage).end()
    assert status == 130, text
    assert "ended by SIGINT: steps after the last checkpoint are not saved" in text
    assert "Traceback" not in text
    assert newest(root / "twice") == 5


@pytest.mark.slow
def test_the_real_command_saves_at_a_signal(root: Path) -> None:
    log = root / "command.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "nvae_lightning.train", *TINY, "dataset.root=images"),
                *("hydra.run.dir=command", "trainer.max_epochs=1000"),
                "callbacks.checkpoint.every_n_train_steps=2",
            ],
            cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=file,
        )  # fmt: skip
    while newest(root / "command") < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    text = log.read_text()
    assert text.count("ckpt_path=last") == 1
    assert "Traceback" not in text
    assert load(root / "command")["global_step"] == newest(root / "command")


@pytest.mark.parametrize("job_name", [pytest.param("bash", marks=pytest.mark.slow), "train"])
def test_slurm_requeues_the_job(root: Path, start: Start, whole: Path, job_name: str) -> None:
    folder = root / f"slurm-{job_name}"
    programs = root / f"programs-{job_name}"
    programs.mkdir()
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {programs}/calls\n')
    (programs / "scontrol").chmod(0o755)
    environment = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NAME": job_name,
        "SLURM_NTASKS": "1",
    }
    sabotage = SIGNAL.format(step=7, number=int(signal.SIGUSR1))
    status, text = start(folder.name, sabotage=sabotage, **environment).end()
    assert status == 128 + signal.SIGUSR1, text
    assert (programs / "calls").read_text() == "requeue 123\n"
    finish(start(folder.name, **environment, SLURM_RESTART_COUNT="1"))
    assert (programs / "calls").read_text() == "requeue 123\n"
    assert_same_training(whole, folder)


def test_slurm_requeues_a_job_interrupted_in_its_test(
    root: Path, start: Start, whole: Path
) -> None:
    folder, programs = root / "slurm-test", root / "programs-test"
    programs.mkdir()
    # SLURM also kills scontrol once it has requeued the job.
    (programs / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> {programs}/calls\nkill -TERM $$\n'
    )
    (programs / "scontrol").chmod(0o755)
    environment = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "123", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1",
    }  # fmt: skip
    sabotage = SIGNAL_IN_TEST.format(number=int(signal.SIGUSR1))
    status, text = start(folder.name, sabotage=sabotage, **environment).end()
    assert status == 128 + signal.SIGUSR1, text
    assert "Traceback" not in text
    assert "not requeued" not in text
    assert (programs / "calls").read_text() == "requeue 123\n"
    finish(start(folder.name, **environment, SLURM_RESTART_COUNT="1"))
    assert_same_training(whole, folder)


def test_a_missing_scontrol_gives_a_warning(root: Path, start: Start) -> None:
    sabotage = SIGNAL.format(step=2, number=int(signal.SIGUSR1))
    status, text = start(
        "no-scontrol", sabotage=sabotage, SLURM_JOB_ID="123", SLURM_JOB_NAME="bash"
    ).end()
    assert status == 128 + signal.SIGUSR1, text
    assert "scontrol requeue 123" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_accumulated_gradients_are_not_lost(root: Path, start: Start) -> None:
    accumulate = "trainer.accumulate_grad_batches=2"
    finish(start("accumulated", accumulate))
    folder = root / "accumulated-killed"
    number = int(signal.SIGTERM)
    for step, sabotage in (
        (4, SIGNAL.format(step=4, number=number)),
        (4, SIGNAL_WITHIN_ACCUMULATION.format(step=4, number=int(signal.SIGKILL))),
        (5, SIGNAL_WITHIN_ACCUMULATION.format(step=4, number=number)),
        (8, SIGNAL_WITHIN_ACCUMULATION.format(step=7, number=number)),
    ):
        status, text = start(folder.name, accumulate, *resumption(folder), sabotage=sabotage).end()
        assert status in (128 + number, -signal.SIGKILL), text
        assert newest(folder) == step
    finish(start(folder.name, accumulate, "ckpt_path=last"))
    for key in ("state_dict", "optimizer_states"):
        assert_equal(load(root / "accumulated")[key], load(folder)[key], key)
    assert rows(root / "accumulated") == rows(folder)


@pytest.mark.slow
def test_averaged_weights_resume_exactly_and_do_not_change_the_training(
    root: Path, start: Start, whole: Path
) -> None:
    averaged = ("callbacks=ema", "callbacks.ema.decay=0.9", "callbacks.checkpoint.keep=99")
    finish(start("averaged", *averaged))
    saved = [
        torch.load(path, weights_only=True)
        for path in sorted((root / "averaged" / "checkpoints").glob("step*.ckpt"))
    ]
    assert [checkpoint["global_step"] for checkpoint in saved] == list(range(1, NUM_STEPS + 1))
    assert_equal(load(whole)["state_dict"], saved[-1]["current_model_state"], "weights")
    weights = [name for name in saved[0]["state_dict"] if name.endswith(("weight", "bias"))]
    assert weights
    average = {name: saved[0]["current_model_state"][name] for name in weights}
    for step, checkpoint in enumerate(saved[1:], 1):
        latest, decay = checkpoint["current_model_state"], min(0.9, (1 + step) / (10 + step))
        for name in weights:
            average[name] = decay * average[name] + (1 - decay) * latest[name]
            torch.testing.assert_close(checkpoint["state_dict"][name], average[name])

    folder = root / "averaged-killed"
    for step in (5, 12, 24):
        sabotage = SIGNAL.format(step=step, number=int(signal.SIGTERM))
        status, text = start(folder.name, *averaged, *resumption(folder), sabotage=sabotage).end()
        assert status == 128 + signal.SIGTERM, text
    finish(start(folder.name, *averaged, "ckpt_path=last"))
    assert_same_training(root / "averaged", folder)
    assert_equal(saved[-1]["current_model_state"], load(folder)["current_model_state"], "weights")


@pytest.mark.slow
def test_a_resumed_run_keeps_its_wandb_id(root: Path, start: Start) -> None:
    folder = root / "named"
    logger = ("logger=default", "trainer.max_epochs=1")
    sabotage = SIGNAL.format(step=3, number=int(signal.SIGTERM))
    status, text = start(folder.name, *logger, sabotage=sabotage).end()
    assert status == 128 + signal.SIGTERM, text
    name = OmegaConf.load(folder / "config.yaml").run_id
    finish(start(folder.name, *logger, "ckpt_path=last"))
    assert OmegaConf.load(folder / "config.yaml").run_id == name
    runs = list((folder / "wandb").glob("offline-run-*"))
    assert runs
    assert all(run.name.endswith(f"-{name}") for run in runs)
