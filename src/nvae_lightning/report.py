"""Compare runs with the paper: ``python -m nvae_lightning.report runs=FOLDER table=2``."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from nvae_lightning import reporting
from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.plain_yaml import read_yaml
from nvae_lightning.cli.setting_types import check_type, plain
from nvae_lightning.reporting import Layout, Run, as_layout, report
from nvae_lightning.utilities import figures
from nvae_lightning.utilities.files import write_text

_LAYOUTS = Path(reporting.__file__).parent / "tables"


def load_layout(table: object) -> Layout:
    """Load a table of the paper by its number or name.

    Raises:
        ValueError: If the table is unknown.
    """
    name = f"table{table}" if str(table).isdecimal() else str(table)
    names = sorted(path.stem for path in _LAYOUTS.glob("*.yaml"))
    if name not in names:
        raise ValueError(
            f"table: got {table!r}, for which the paper has no numbers; set one of "
            f"{', '.join(known.removeprefix('table') for known in names)}"
        )
    values: Any = OmegaConf.to_container(OmegaConf.load(_LAYOUTS / f"{name}.yaml"))
    return as_layout(values)


def find_runs(folder: Path) -> Iterator[Path]:
    """Find the folders of runs in a folder, sorted by their numbers."""
    if (folder / "config.yaml").is_file():
        yield folder
        return
    children = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    for child in sorted(children, key=lambda p: (not p.name.isdecimal(), p.name.zfill(9))):
        yield from find_runs(child)


def load_runs(folders: Sequence[str]) -> list[Run]:
    """Load all runs of folders, each with a name that distinguishes it.

    Raises:
        ValueError: If a folder has no runs, or a run's files are damaged.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        runs = list(find_runs(folder.absolute())) if folder.is_dir() else []
        if not runs:
            raise ValueError(
                f"runs: no run in '{folder}', a folder with a config.yaml; give the folder of a "
                "run or of a sweep"
            )
        found += [path for path in runs if path not in found]
    # The parent of each, so that a single run has a name too.
    root = os.path.commonpath([path.parent for path in found])
    return [load_run(path, str(path.relative_to(root))) for path in found]


def load_run(folder: Path, name: str) -> Run:
    """Load settings and metrics of a run."""
    settings = read_yaml(folder / "config.yaml")
    metrics = folder / "metrics.csv"
    rows: list[dict[str, float]] = []
    if metrics.is_file():
        try:
            with metrics.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file, strict=True):
                    values = {key: float(value) for key, value in row.items() if value}
                    rows.append({"step": values["step"], **values})
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise ValueError(
                f"runs: row {len(rows) + 1} of '{metrics}' is damaged ({error}); leave this run "
                "out, or restore the file"
            ) from error
    return Run(name, settings, rows)


@command("report")
def main(config: Any) -> None:  # noqa: ANN401 -- beartype warns of DictConfig's own bases
    """Write ``report.md`` and ``report.png``, and print the report."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    runs = plain(config.runs)
    check_type("runs", runs, str | list[str])
    check_type("table", config.table, int | str)
    made = report(
        load_layout(config.table),
        load_runs([runs] if isinstance(runs, str) else runs),
        allow_different_budgets=config.allow_different_budgets,
    )
    figures.write(figures.measured_beside_published(made.comparisons), run_dir / "report.png")
    write_text(run_dir / "report.md", made.markdown)
    print(made.markdown)
    print(f"written: '{run_dir / 'report.md'}' and report.png")


if __name__ == "__main__":
    run(main)
