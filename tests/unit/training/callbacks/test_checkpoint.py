"""Checkpoints are written atomically, and damaged ones are refused."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from nvae_lightning.serialization.checkpoints import (
    last_checkpoint,
    read_checkpoint,
)
from nvae_lightning.training.callbacks import Checkpoint
from nvae_lightning.training.checkpoints import AtomicCheckpointIO, checkpoint_to_resume

CONTENT = {"state_dict": {"weight": torch.arange(300.0), "bias": torch.ones(5)}, "global_step": 7}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints."""
    for age, name in ((1, "step0000007.ckpt"), (0, "step0000008.ckpt")):
        AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / name)
        os.utime(tmp_path / name, ns=(0, (10 - age) * 10**9))
    (tmp_path / "last.ckpt").symlink_to("step0000008.ckpt")
    return tmp_path


def change(path: Path, content: bytes) -> None:
    """Overwrite a file without changing its times, as a failing disk would."""
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_truncated_checkpoint_is_refused_and_the_previous_one_used(
    folder: Path,
) -> None:
    path = folder / "step0000008.ckpt"
    content = path.read_bytes()
    assert last_checkpoint(folder) == path
    assert read_checkpoint(path)["state_dict"]["weight"].equal(CONTENT["state_dict"]["weight"])
    for length in [0, len(content) - 1, *random.Random(0).sample(range(1, len(content) - 1), 50)]:
        change(path, content[:length])
        for refuse in (read_checkpoint, AtomicCheckpointIO().load_checkpoint):
            with pytest.raises(ValueError, match=r"^ckpt_path: '.*0008.ckpt' is damaged") as error:
                refuse(path)
            assert "\n" not in str(error.value)
            assert "give another file, or last" in str(error.value)
        with pytest.raises(ValueError, match="damaged"):
            checkpoint_to_resume(str(path), folder)
        with pytest.warns(UserWarning, match=r"0008.ckpt' is damaged .*an older one is used"):
            assert checkpoint_to_resume("last", folder) == folder / "step0000007.ckpt"


def test_changed_bytes_are_refused_or_harmless(folder: Path) -> None:
    path = folder / "step0000008.ckpt"
    content = path.read_bytes()
    generator = random.Random(0)
    num_refused = 0
    for position in generator.sample(range(len(content)), 200):
        byte = content[position] ^ generator.randrange(1, 256)
        change(path, content[:position] + bytes([byte]) + content[position + 1 :])
        with suppress(ValueError):
            found = read_checkpoint(path)
            # Not refused: padding between tensors, or an unused field of the format.
            for name, value in CONTENT["state_dict"].items():
                assert value.equal(found["state_dict"][name])
            continue
        with pytest.raises(ValueError, match=r"^ckpt_path: [^\n]*$"):
            read_checkpoint(path)
        num_refused += 1
    assert num_refused > 50


class Harmful:
    """Object that creates a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_a_pickle_that_runs_code_is_refused_and_not_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    torch.save({"state_dict": Harmful()}, "zipped.ckpt")
    torch.save({"state_dict": Harmful()}, "old.ckpt", _use_new_zipfile_serialization=False)
    Path("plain.ckpt").write_bytes(pickle.dumps(Harmful()))
    for name in ("zipped.ckpt", "old.ckpt", "plain.ckpt"):
        with pytest.raises(ValueError, match=f"^ckpt_path: '{name}' is damaged") as error:
            read_checkpoint(Path(name))
        assert "\n" not in str(error.value)
        assert not Path("harm").exists()


def test_other_files_are_refused_as_checkpoints(tmp_path: Path) -> None:
    zipped = tmp_path / "zipped.ckpt"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("readme.txt", "hello")
    values = tmp_path / "values.ckpt"
    torch.save([1, 2], values)
    (tmp_path / "folder.ckpt").mkdir()
    for name, message in (
        ("zipped.ckpt", "is damaged"),
        ("values.ckpt", "is not the checkpoint of a training"),
        ("folder.ckpt", "is not a checkpoint .it is not a regular file."),
        ("missing.ckpt", "does not exist"),
    ):
        with pytest.raises(ValueError, match=rf"^ckpt_path: '.*{name}' {message}.*; give"):
            read_checkpoint(tmp_path / name)


def test_last_without_an_intact_checkpoint_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"ckpt_path=last: no intact checkpoint in .*hydra.run.dir"
    ):
        checkpoint_to_resume("last", tmp_path / "nowhere")
    (tmp_path / "last.ckpt").symlink_to("gone.ckpt")
    assert last_checkpoint(tmp_path) is None
    assert checkpoint_to_resume(None, tmp_path) is None


def test_restarts_by_torchrun_need_no_other_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert checkpoint_to_resume("last", tmp_path / "new") is None
    assert checkpoint_to_resume("last", folder) == folder / "step0000008.ckpt"


def test_a_requeued_job_resumes_from_its_own_checkpoint(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path_factory.mktemp("other") / "step.ckpt"
    shutil.copy(folder / "step0000007.ckpt", other)
    newest = folder / "step0000008.ckpt"
    assert checkpoint_to_resume(None, folder) is None
    assert checkpoint_to_resume(str(other), folder) == other
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert checkpoint_to_resume(None, folder) == newest
    assert checkpoint_to_resume(str(other), folder) == newest
    assert checkpoint_to_resume(str(other), other.parent / "nowhere") == other
    assert checkpoint_to_resume(None, folder / "nowhere") is None


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync"])
def test_a_full_disk_does_not_change_earlier_checkpoints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*arguments: object) -> None:
        if failing == "torch.save":
            arguments[1].write(b"PK half of it")  # pyright: ignore
        raise OSError(28, "No space left on device")

    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(failing, fail)
    for name in ("step0000008.ckpt", "step0000009.ckpt"):
        with pytest.raises(OSError, match="No space left"):
            AtomicCheckpointIO().save_checkpoint(CONTENT, folder / name)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


class Line(LightningModule):
    """Module with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture
def train(tmp_path: Path) -> Any:
    """Train a line for some steps, 4 per epoch."""

    def train(num_steps: int, ckpt_path: Path | None = None, **settings: Any) -> Path:
        folder = tmp_path / "checkpoints"
        Trainer(
            accelerator="cpu", max_steps=num_steps, logger=False, plugins=[AtomicCheckpointIO()],
            callbacks=[Checkpoint(str(folder), **settings)], enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Line(), DataLoader(torch.ones(4, 1)), ckpt_path=ckpt_path)  # pyright: ignore  # fmt: skip
        return folder

    return train


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_last_is_the_newest(train: Any) -> None:
    folder = train(11, every_n_train_steps=2, keep=3)
    kept = [f"step{step:07d}.ckpt" for step in (8, 10, 11)]
    assert names(folder) == ["last.ckpt", *kept]
    assert os.readlink(folder / "last.ckpt") == kept[-1]
    for step, name in zip((8, 10, 11), kept, strict=True):
        assert torch.load(folder / name, weights_only=True)["global_step"] == step


def test_last_is_a_copy_on_file_systems_without_links(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("no links")

    monkeypatch.setattr(Path, "symlink_to", fail)
    folder = train(3, every_n_train_steps=1, keep=1)
    assert names(folder) == ["last.ckpt", "step0000003.ckpt"]
    assert not (folder / "last.ckpt").is_symlink()
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 3


def test_a_clock_set_back_does_not_change_the_order(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, times = AtomicCheckpointIO.save_checkpoint, itertools.count(10**10, -(10**9))

    def save_earlier(io: Any, checkpoint: Any, path: str, **settings: Any) -> None:
        save(io, checkpoint, path, **settings)
        os.utime(path, ns=(now := next(times), now))

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save_earlier)
    folder = train(6, every_n_train_steps=1, keep=2)
    assert names(folder) == ["last.ckpt", "step0000005.ckpt", "step0000006.ckpt"]
    assert last_checkpoint(folder) == folder / "step0000006.ckpt"


def test_the_last_checkpoint_has_the_most_steps(folder: Path) -> None:
    newest = folder / "step0000008.ckpt"
    os.utime(folder / "step0000007.ckpt")  # as copying the folder may do
    assert last_checkpoint(folder) == newest
    (folder / "last.ckpt").unlink()
    shutil.copy(folder / "step0000007.ckpt", folder / "last.ckpt")
    assert last_checkpoint(folder) == newest
    (folder / "notes.ckpt").write_text("no checkpoint")
    (folder / "step.ckpt").mkdir()
    assert last_checkpoint(folder) == newest
    AtomicCheckpointIO().save_checkpoint(CONTENT | {"global_step": 9}, folder / "best~.ckpt")
    assert last_checkpoint(folder) == folder / "best~.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, folder / "step10000000.ckpt")
    assert last_checkpoint(folder) == folder / "step10000000.ckpt"


def test_checkpoints_of_an_earlier_run_are_moved(train: Any) -> None:
    folder = train(9, every_n_train_steps=1)
    train(2, every_n_train_steps=1)
    assert names(folder) == ["earlier.0", "last.ckpt", "step0000001.ckpt", "step0000002.ckpt"]
    assert names(folder / "earlier.0") == ["last.ckpt", "step0000008.ckpt", "step0000009.ckpt"]
    assert last_checkpoint(folder) == folder / "step0000002.ckpt"


def test_checkpoints_after_the_resumed_one_are_moved(train: Any) -> None:
    folder = train(12, every_n_train_steps=4, keep=9)
    train(8, folder / "step0000004.ckpt", every_n_train_steps=1, keep=2)
    assert names(folder) == ["earlier.0", "last.ckpt", "step0000007.ckpt", "step0000008.ckpt"]
    assert names(folder / "earlier.0") == ["step0000008.ckpt", "step0000012.ckpt"]
    train(9, folder / "last.ckpt", every_n_train_steps=1, keep=2)
    assert names(folder) == ["earlier.0", "last.ckpt", "step0000008.ckpt", "step0000009.ckpt"]


def test_a_missing_link_is_restored_by_a_resume(train: Any) -> None:
    folder = train(2, every_n_train_steps=1)
    (folder / "last.ckpt").unlink()
    train(2, folder / "step0000002.ckpt")
    assert os.readlink(folder / "last.ckpt") == "step0000002.ckpt"


def test_leftovers_of_interrupted_writes_are_removed(train: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".step0000009.partial.ckpt").write_bytes(b"half")
    (folder / ".last.partial.ckpt").symlink_to("gone")
    train(1)
    assert names(folder) == ["last.ckpt", "step0000001.ckpt"]


@pytest.mark.parametrize("setting", ["every_n_train_steps", "keep"])
@pytest.mark.parametrize("value", [0, -1, True])
def test_numbers_out_of_range_are_refused(setting: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"callbacks.checkpoint.{setting} must .* got {value}"):
        Checkpoint("folder", **{setting: value})
