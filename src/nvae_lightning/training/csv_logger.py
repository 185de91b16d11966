"""metrics.csv: one file per run, continued after interruptions."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from nvae_lightning.utilities.files import whole_file


class ResumableCSVLogger(CSVLogger):
    """CSVLogger that continues the metrics of a resumed run; Lightning's deletes them.

    It keeps the rows before the step from which the run resumes and drops the others, which will
    be logged again. Call :meth:`resume` once the checkpoint is loaded.

    Args:
        save_dir: Folder of the run.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=1)
        self._earlier: list[dict[str, str]] = []

    def resume(
        self, first_step: int, last_row: dict[str, float], *, is_validated: bool = True
    ) -> None:
        """Continue the metrics in the folder.

        Args:
            first_step: Step from which the run resumes, counted from 0.
            last_row: Metrics of the previous step, if it was a logging step. They are written
                after the checkpoint, and are missing if the run was killed in between.
            is_validated: Whether the checkpoint was written after the validation, if any, that
                follows the previous step. If not, the run validates again, and the earlier rows
                are dropped.
        """
        path = Path(self.log_dir, ExperimentWriter.NAME_METRICS_FILE)
        rows = _whole_rows(path) if path.exists() else []
        step = str(first_step - 1)
        name = next(iter(last_row), None)
        self._earlier = [row for row in rows if int(row["step"]) < first_step]
        if not is_validated:
            after = [i for i, row in enumerate(self._earlier) if row["step"] == step]
            if name:  # rows logged before the step stay
                after = [i for i in after if self._earlier[i].get(name)]
            self._earlier = self._earlier[: min(after, default=len(self._earlier))]
        if name and not any(row["step"] == step and row.get(name) for row in self._earlier):
            self._earlier.append({**{k: str(v) for k, v in last_row.items()}, "step": step})
        writer = self.experiment
        keys = sorted({key for row in self._earlier for key in row})
        writer.metrics_keys = keys
        if keys:
            _write(path, keys, self._earlier)
        else:
            path.unlink(missing_ok=True)

    @property
    def experiment(self) -> ExperimentWriter:
        """The writer, created without deleting any metrics."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir)
        return self._experiment  # pyright: ignore[reportReturnType] -- of fabric's class there


class _Writer(ExperimentWriter):
    """Writer that rewrites the file atomically when a new column appears."""

    def _check_log_dir_exists(self) -> None:
        """Do nothing: the folder belongs to the run, whose files must not be deleted."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        _write(path, fieldnames, _whole_rows(path))


@rank_zero_only
def set_aside(metrics: Path, *, move: bool) -> None:
    """Move or copy an existing metrics file to a numbered one before rows are dropped."""
    if metrics.exists():
        number = len(list(metrics.parent.glob("metrics.*.csv")))
        copy = metrics.with_name(f"metrics.{number}.csv")
        metrics.rename(copy) if move else shutil.copyfile(metrics, copy)


def _whole_rows(path: Path) -> list[dict[str, str]]:
    """Read all rows except a truncated last one."""
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [row for row in csv.DictReader(lines) if (row.get("step") or "").isdecimal()]


def _write(path: Path, keys: list[str], rows: list[dict[str, str]]) -> None:
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())
