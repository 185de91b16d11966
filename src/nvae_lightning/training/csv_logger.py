"""One metrics.csv over all interruptions of a run."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from nvae_lightning.utilities.files import check_not_deleted, whole_file


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSVLogger, which deletes the metrics of the run that is gone on with.

    This one keeps the rows before `first_step` and drops the others, which the run will log again.
    The step is known only when a checkpoint has been read: :meth:`resume` is called then.

    Args:
        save_dir: the run's folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=1)
        self._earlier: list[dict[str, str]] = []

    def resume(
        self, first_step: int, last_row: dict[str, float], *, is_validated: bool = True
    ) -> None:
        """Continue the metrics in the folder.

        Args:
            first_step: Step that the run resumes from, counted from 0.
            last_row: Metrics of the step before, if any were logged at it: they are written after
                the checkpoint, so that a kill may come between.
            is_validated: Whether the checkpoint was made after the validation that may follow the
                step before. If not, the run validates again, and its earlier rows are dropped.
        """
        path = Path(self.log_dir, ExperimentWriter.NAME_METRICS_FILE)
        rows = _whole_rows(path) if path.exists() else []
        step = str(first_step - 1)
        name = next(iter(last_row), None)
        self._earlier = [row for row in rows if int(row["step"]) < first_step]
        if not is_validated:
            after = [i for i, row in enumerate(self._earlier) if row["step"] == step]
            if name:  # what was logged before the step was made stays
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
        """The writer; made without the deletion of metrics that its class begins with."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir)
        return self._experiment  # pyright: ignore[reportReturnType] -- of fabric's class there

    def finalize(self, status: str) -> None:
        """Save what is left, unless the training failed as its folder is gone."""
        if status != "failed" or Path(self.log_dir).is_dir():
            super().finalize(status)


class _Writer(ExperimentWriter):
    """Rewrites the file, which a new column takes, in one step."""

    def save(self) -> None:
        """Append the rows that are not in the file yet.

        Raises:
            ValueError: If the folder has been deleted.
        """
        if self.metrics:
            check_not_deleted(Path(self.log_dir))
        super().save()

    def _check_log_dir_exists(self) -> None:
        """Nothing is deleted: the folder is the run's, which others write to."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        _write(path, fieldnames, _whole_rows(path))


def _whole_rows(path: Path) -> list[dict[str, str]]:
    """Read all rows but a last one that was cut off."""
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
