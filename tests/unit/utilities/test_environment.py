"""Version and device that are recorded with a run."""

from __future__ import annotations

import os
import re
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from nvae_lightning.utilities import environment

with warnings.catch_warnings():  # beartype's, of omegaconf's DictConfig
    warnings.simplefilter("ignore", DeprecationWarning)
    from nvae_lightning.cli.machine import prepare_process

GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b")


def test_a_checkout_names_its_commit_and_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    number = environment.version()
    assert re.fullmatch(r"\d+\.\d+\.\d+", number)
    (tmp_path / "file").write_text("first")
    for command in (("init", "-q"), ("add", "file"), ("commit", "-q", "-m", "first")):
        subprocess.run([*GIT, *command], cwd=tmp_path, check=True)
    commit = environment.version()
    assert re.fullmatch(rf"{re.escape(number)}\+[0-9a-f]{{7,}}", commit)
    (tmp_path / "file").write_text("second")
    assert environment.version() == f"{commit}.dirty"
    monkeypatch.setenv("PATH", "")  # no git
    assert environment.version() == number


def test_devices_are_named_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert environment.device_name(torch.device("cuda:0"), 1) == "NVIDIA H100"
    assert environment.device_name(torch.device("cuda:0"), 8) == "8 x NVIDIA H100"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert re.fullmatch(r"CPU \(.+\), 3 threads", environment.device_name(torch.device("cpu"), 1))


def test_a_machine_with_srun_warns_neither_in_commands_nor_in_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_process()
        Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
