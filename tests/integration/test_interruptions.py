"""Ending a training at any moment, and going on: the same weights, bit for bit, and metrics."""

from __future__ import annotations

import csv
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

if not hasattr(os, "fork"):
    pytest.skip("attempts are forks of one process", allow_module_level=True)

NUM_STEPS = 36
# Pictures take half of the time, and are no part of what is resumed.
TINY = (
    "dataset=image_folder", "dataset.image.size=16", "dataset.batch_size=8", "model=tiny",
    "model.hierarchy.num_groups=[1,1]", "trainer=cpu", "logger=csv", "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1", "trainer.check_val_every_n_epoch=1",
    "num_importance_samples=2", "~callbacks.pictures", "~callbacks.kl_per_group",
    "~callbacks.progress_bar", "+trainer.enable_progress_bar=false",
    "callbacks.checkpoint.every_n_train_steps=1",
)  # fmt: skip

# Imports once for all attempts: a fork starts in no time.
SERVER = """
import json, os, sys, traceback
import torch
torch.set_num_threads(1)
from nvae_lightning.cli import run
from nvae_lightning.train import main
for line in sys.stdin:
    attempt = json.loads(line)
    pid = os.fork()
    if pid == 0:
        log = os.open(attempt["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(attempt["environment"])
        sys.argv = ["train", *attempt["overrides"]]
        status = 1
        try:
            exec(attempt["sabotage"])
            run(main)
            status = 0
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else print(exit.code) or 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Attempt:
    """A training in a process of its own."""

    def __init__(self, server: subprocess.Popen[bytes], log: Path) -> None:
        self._server, self._log = server, log
        self.pid = self._read_number()
        self._status: int | None = None

    def _read_number(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())

    def ends_within(self, seconds: float) -> bool:
        """Wait that long; whether it has ended by then."""
        if self._status is None and select.select([self._server.stdout], [], [], seconds)[0]:
            self._status = self._read_number()
        return self._status is not None

    def end(self) -> tuple[int, str]:
        """Return the exit status, negative for a signal, and what was printed."""
        assert self.ends_within(100)
        assert self._status is not None
        return self._status, self._log.read_text()

    def kill(self) -> None:
        """Kill it, and see it ended."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.end()


Start = Callable[..., Attempt]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 96 images to train with and 20 to test with."""
    folder = tmp_path_factory.mktemp("interruptions")
    generator = np.random.default_rng(0)
    for split, num_images in (("train", 96), ("test", 20)):
        (folder / "images" / split).mkdir(parents=True)
        for index in range(num_images):
            pixels = generator.integers(40, 200, 3) + generator.integers(0, 30, (16, 16, 3))
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(folder / "images" / split / f"{index:03}.png")
    return folder


@pytest.fixture(scope="module")
def start(root: Path) -> Iterator[Start]:
    """Start a training in a folder, with code that harms it."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        bufsize=0,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def start(folder: str, *overrides: str, sabotage: str = "", **environment: str) -> Attempt:
        assert server.stdin is not None
        log = root / f"{folder}.log"
        attempt = {
            "overrides": [*TINY, "dataset.root=images", f"hydra.run.dir={folder}", *overrides],
            "sabotage": sabotage,
            "environment": environment,
            "log": str(log),
        }
        server.stdin.write(json.dumps(attempt).encode() + b"\n")
        return Attempt(server, log)

    yield start
    server.stdin.close()
    server.wait(100)
    server.stdout.close()


def finish(attempt: Attempt) -> str:
    status, text = attempt.end()
    assert status == 0, text
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def whole(root: Path, start: Start) -> Path:
    """The run that nothing interrupts."""
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
    return ["ckpt_path=last"] if list(folder.glob("checkpoints/*.ckpt")) else []


def newest(folder: Path) -> int:
    """Step of the newest checkpoint."""
    return max((int(path.name[4:11]) for path in folder.glob("checkpoints/step*.ckpt")), default=0)


def test_twenty_kills_at_random_moments_change_nothing(
    root: Path, start: Start, whole: Path
) -> None:
    folder = root / "killed"
    generator = random.Random(0)
    steps_at_kills = []
    while len(steps_at_kills) < 20:
        before = newest(folder)
        interval = generator.choice([1, 1, 1, 2, 5])
        attempt = start(
            "killed", *resumption(folder), f"callbacks.checkpoint.every_n_train_steps={interval}"
        )
        kind = generator.choice(["starting", "writing", "later", "later"])
        if kind == "starting":
            ended = attempt.ends_within(generator.uniform(0.1, 1.0))
        else:
            wanted = ".step*.partial" if kind == "writing" else "step*.ckpt"
            known = set(folder.glob(f"checkpoints/{wanted}"))
            while not (ended := attempt.ends_within(0.0005)):
                if set(folder.glob(f"checkpoints/{wanted}")) - known:
                    break
            if kind == "later" and not ended:
                ended = attempt.ends_within(generator.uniform(0.0, 0.15))
        if ended:
            finish(attempt)
            break
        attempt.kill()
        steps_at_kills.append(newest(folder))
        assert steps_at_kills[-1] >= before
    finish(start("killed", *resumption(folder)))
    print("kills at", steps_at_kills)
    assert len(steps_at_kills) >= 15
    assert len(set(steps_at_kills)) >= 8
    assert_same_training(whole, folder)
