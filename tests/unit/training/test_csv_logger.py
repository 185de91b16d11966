"""One metrics.csv per run, continued after interruptions."""

from __future__ import annotations

import csv
from pathlib import Path

from nvae_lightning.training.csv_logger import ResumableCSVLogger


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def write(folder: Path, num_rows: int) -> None:
    logger = ResumableCSVLogger(str(folder))
    for step in range(num_rows):
        logger.log_metrics({"train/loss": step / 3}, step)
        logger.log_metrics({"val/loss": 1.0}, step)
    logger.finalize("success")


def losses(folder: Path) -> dict[str, float]:
    return {row["step"]: float(row["train/loss"]) for row in rows(folder) if "train/loss" in row}


def test_rows_before_the_step_stay_and_later_ones_are_logged_again(tmp_path: Path) -> None:
    write(tmp_path, 6)
    (tmp_path / "config.yaml").touch()
    before = rows(tmp_path)
    logger = ResumableCSVLogger(str(tmp_path))
    logger.resume(4, {"train/loss": 1.0})
    assert rows(tmp_path) == before[:8]
    logger.log_metrics({"train/loss": 4 / 3}, 4)
    logger.log_metrics({"val/loss": 1.0}, 4)
    logger.log_metrics({"train/loss": 5 / 3}, 5)
    logger.log_metrics({"val/loss": 1.0}, 5)
    logger.finalize("success")
    assert rows(tmp_path) == before
    assert (tmp_path / "config.yaml").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.csv"]


def test_a_truncated_last_line_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 3)
    whole = (tmp_path / "metrics.csv").read_text()
    before = rows(tmp_path)
    for length in range(len(whole)):
        (tmp_path / "metrics.csv").write_text(whole[:length])
        logger = ResumableCSVLogger(str(tmp_path))
        logger.resume(10, {})
        logger.log_metrics({"val/loss": 2.0}, 10)
        logger.finalize("success")
        found = rows(tmp_path)
        assert found[-1] == {"step": "10", "val/loss": "2.0"}
        assert found[:-1] == before[: len(found) - 1]
        assert len(found) - 1 == max(whole[:length].count("\n") - 1, 0)


def test_the_row_missing_after_the_checkpoint_is_added_once(tmp_path: Path) -> None:
    write(tmp_path, 2)
    for _ in range(2):
        ResumableCSVLogger(str(tmp_path)).resume(3, {"train/loss": 2 / 3, "epoch": 0})
        assert losses(tmp_path) == {"0": 0.0, "1": 1 / 3, "2": 2 / 3}
        assert rows(tmp_path)[-1]["epoch"] == "0"
    ResumableCSVLogger(str(tmp_path)).resume(4, {})
    assert len(losses(tmp_path)) == 3


def test_a_resume_in_an_empty_folder_begins_with_the_last_row(tmp_path: Path) -> None:
    ResumableCSVLogger(str(tmp_path)).resume(3, {"train/loss": 0.5})
    assert rows(tmp_path) == [{"step": "2", "train/loss": "0.5"}]


def test_a_resume_before_all_rows_drops_them(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n9,0.5\n")
    logger = ResumableCSVLogger(str(tmp_path))
    logger.resume(5, {})
    logger.log_metrics({"train/loss": 0.25}, 9)
    logger.finalize("success")
    assert rows(tmp_path) == [{"step": "9", "train/loss": "0.25"}]


def test_new_columns_are_added(tmp_path: Path) -> None:
    write(tmp_path, 2)
    logger = ResumableCSVLogger(str(tmp_path))
    logger.resume(2, {"train/loss": 1 / 3})
    logger.log_metrics({"train/loss": 2 / 3, "train/new": 7.0}, 2)
    logger.finalize("success")
    assert losses(tmp_path) == {"0": 0.0, "1": 1 / 3, "2": 2 / 3}
    assert rows(tmp_path)[-1] == {"step": "2", "train/loss": str(2 / 3), "train/new": "7.0"}
