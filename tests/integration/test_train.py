"""The training command, run as by a user."""

import csv
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from warm_python import run_python

from .conftest import Run

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
QUICK = (
    "trainer=cpu", "logger=csv", "trainer.log_every_n_steps=1", "hydra.run.dir=run",
    "trainer.limit_val_batches=1", "trainer.limit_test_batches=1",
)  # fmt: skip


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def _column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in _rows(folder) if row[name]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a finished run, and the output of its command."""
    folder = tmp_path_factory.mktemp("trained")
    command = ("nvae_lightning.train", *QUICK, "trainer.max_steps=4", "logger=default")
    result = run_python("-m", *command, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "run", result.stdout


def test_a_run_leaves_everything_in_its_folder(trained: tuple[Path, str]) -> None:
    run, output = trained
    for name in ("samples.png", "reconstructions.png", "kl_per_group.png", "kl_heatmap.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) >= 400
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    config = OmegaConf.load(run / "config.yaml")
    assert config.trainer.max_steps == 4
    assert Path(config.run_dir) == run
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    names = set(_rows(run)[0])
    groups = [f"{group:02d}" for group in range(4)]
    expected = {
        *("train/loss", "train/elbo", "train/bpd", "train/distortion", "train/rate"),
        *("train/beta", "train/penalty_weight", "train/spectral", "train/bn_scale"),
        *("train/grad_norm", "train/images_per_second", "test/nll", "test/nll_bpd"),
        *(f"train/kl_balance/{group}" for group in groups),
        *(f"{stage}/kl_group/{group}" for stage in ("train", "test") for group in groups),
        *(f"{stage}/active_channels/{group}" for stage in ("train", "test") for group in groups),
        *(f"test/{name}" for name in ("elbo", "bpd", "distortion", "rate")),
    }
    assert expected <= names
    for name in expected:
        assert all(math.isfinite(value) for value in _column(run, name)), name
    assert len(_column(run, "train/loss")) == 4
    for phrase in ("ELBO", "NLL (10 importance samples)", "active channels", "images per second"):
        assert phrase in output
    assert str(run) in output


def test_logged_terms_add_up(run_train: Run, tmp_path: Path) -> None:
    result = run_train(*QUICK, "trainer.max_steps=3", "kl=constant")
    assert result.returncode == 0, result.stderr
    rows = [row for row in _rows(tmp_path / "run") if row["train/loss"]]
    assert len(rows) == 3
    for row in rows:
        value = {name: float(text) for name, text in row.items() if text}
        assert value["train/elbo"] == pytest.approx(
            -(value["train/distortion"] + value["train/rate"])
        )
        groups = sum(value[f"train/kl_group/{group:02d}"] for group in range(4))
        assert value["train/rate"] == pytest.approx(groups, rel=1e-5)
        assert value["train/bpd"] == pytest.approx(-value["train/elbo"] / (784 * math.log(2)))
        penalties = value["train/spectral"] + value["train/bn_scale"]
        assert value["train/loss"] == pytest.approx(
            -value["train/elbo"] + value["train/penalty_weight"] * penalties, rel=1e-5
        )
        assert value["train/beta"] == 1.0


def test_training_on_a_folder_of_images_lowers_bits_per_dim(
    run_train: Run, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    for index in range(48):
        base = generator.integers(40, 200, 3)
        noise = generator.integers(0, 20, (20, 24, 3))
        folder = tmp_path / "images" / ("a" if index % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((base + noise).astype(np.uint8)).save(folder / f"{index}.png")
    result = run_train(
        *QUICK, "dataset=image_folder", "dataset.root=images", "dataset.image.size=16",
        "dataset.batch_size=8", "trainer.max_steps=40",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    bpd = _column(tmp_path / "run", "train/bpd")
    assert np.mean(bpd[-5:]) < 0.9 * np.mean(bpd[:5])


@pytest.mark.parametrize(
    "data",
    [
        ("dataset=mnist", "mnist"),
        ("dataset=image_folder", "cifar10_jpeg", "dataset.image.size=32"),
    ],
)
@pytest.mark.slow
def test_training_on_real_data_lowers_bits_per_dim(
    run_train: Run, tmp_path: Path, data: tuple[str, ...]
) -> None:
    if not SHARED_DATA.is_dir():
        pytest.skip("requires the real images beside the checkout")
    dataset, folder, *others = data
    result = run_train(
        *QUICK, dataset, f"dataset.root={SHARED_DATA / folder}", *others, "trainer.max_steps=60"
    )
    assert result.returncode == 0, result.stderr
    bpd = _column(tmp_path / "run", "train/bpd")
    assert np.mean(bpd[-5:]) < 0.8 * np.mean(bpd[:5])


def test_a_run_resumes_from_its_last_checkpoint(
    trained: tuple[Path, str], run_train: Run, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    second = run_train(*QUICK, "trainer.max_steps=6", "ckpt_path=last")
    assert second.returncode == 0, second.stderr
    assert [int(row["step"]) for row in _rows(run) if row["train/loss"]] == [0, 1, 2, 3, 4, 5]
    assert "trained          2 steps" in second.stdout
    other = run_train(*QUICK, "model=small", "ckpt_path=run/checkpoints/last.ckpt")
    assert other.returncode == 1
    assert "model: got 'small', but the run in " in other.stderr


SPY = """
import runpy
from lightning.pytorch import Trainer
from nvae_lightning.data import ImageDataModule
load, test = ImageDataModule.load, Trainer.test
def read(data, split):
    print("READS", split, flush=True)
    return load(data, split)
def begin(*arguments, **settings):
    print("TESTS", flush=True)
    return test(*arguments, **settings)
ImageDataModule.load, Trainer.test = read, begin
runpy.run_module("nvae_lightning.train", run_name="__main__", alter_sys=True)
"""


def test_only_the_test_reads_test_images_and_the_best_checkpoint_resumes(
    run_train: Run, tmp_path: Path
) -> None:
    epochs = (
        *QUICK, "trainer.limit_train_batches=2", "trainer.check_val_every_n_epoch=1",
        "~callbacks.pictures", "~callbacks.kl_per_group", "num_importance_samples=1",
        "dataset.batch_size=8",
    )  # fmt: skip
    spied = run_python("-c", SPY, *epochs, "trainer.max_epochs=3", cwd=tmp_path)
    assert spied.returncode == 0, spied.stderr
    read = [line for line in spied.stdout.splitlines() if line.startswith(("READS", "TESTS"))]
    assert "READS train" in read[: read.index("TESTS")]
    run = tmp_path / "run"
    bpds = _column(run, "val/bpd")
    steps = [int(row["step"]) + 1 for row in _rows(run) if row["val/bpd"]]
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == steps[bpds.index(min(bpds))]
    resumed = run_train(*epochs, "trainer.max_epochs=4", "ckpt_path=best")
    assert resumed.returncode == 0, resumed.stderr
    assert f"at step {best['global_step']}" in resumed.stdout
    assert _column(run, "val/bpd")[: len(bpds)] == pytest.approx(bpds)
    assert "READS test" in read[read.index("TESTS") :]
    assert "READS test" not in read[: read.index("TESTS")]


def test_accumulation_flows_and_bf16_work_together(run_train: Run, tmp_path: Path) -> None:
    result = run_train(
        *QUICK, "trainer.max_steps=2", "trainer.accumulate_grad_batches=2", "model.num_flows=1",
        "trainer.precision=bf16-mixed",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    assert sorted({int(row["step"]) for row in _rows(run) if row["train/loss"]}) == [0, 1]
    assert all(math.isfinite(value) for value in _column(run, "train/loss"))
    with Image.open(run / "kl_per_group.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_a_run_without_a_test_succeeds(run_train: Run, tmp_path: Path) -> None:
    result = run_train(*QUICK, "trainer.max_steps=1", "trainer.limit_test_batches=0")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_the_printed_config_is_resolved(run_train: Run) -> None:
    result = run_train("dataset=celeba_hq", "model=large", "--cfg", "job")
    assert result.returncode == 0, result.stderr
    config = OmegaConf.create(result.stdout)
    assert "${" not in result.stdout
    assert config.model.hierarchy.num_groups == [4, 4, 4, 8, 16]
    assert config.model.hierarchy.channels == 30
    assert (config.optimizer.lr, config.optimizer.eps) == (1e-2, 1e-3)
    assert (config.penalty.weight, config.penalty.initial_weight) == (0.01, 1.0)
    assert config.trainer.max_epochs == 300


def test_an_error_is_one_line_and_exit_status_1(run_train: Run) -> None:
    result = run_train("dataset=celeba_hq", "model=large")
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: dataset.root: ")
    assert "nvae_lightning.prepare" in line
