"""Compare runs with the paper: ``python -m nvae_lightning.report runs=FOLDER table=2``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from nvae_lightning import reporting
from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.runs import load_comparisons, load_runs
from nvae_lightning.cli.setting_types import check_type, plain
from nvae_lightning.reporting import Layout, as_layout, growth, report
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
            f"{', '.join(known.removeprefix('table') for known in names)}, or step_growth"
        )
    values: Any = OmegaConf.to_container(OmegaConf.load(_LAYOUTS / f"{name}.yaml"))
    return as_layout(values)


@command("report")
def main(config: Any) -> None:  # noqa: ANN401 -- beartype warns of DictConfig's own bases
    """Write ``report.md`` and ``report.png``, and print the report."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    runs = plain(config.runs)
    check_type("runs", runs, str | list[str])
    check_type("table", config.table, int | str)
    folders = [runs] if isinstance(runs, str) else runs
    if config.table == "step_growth":
        markdown, lines = growth(load_comparisons(folders))
        figure = figures.fitted_lines(lines)
    else:
        made = report(
            load_layout(config.table),
            load_runs(folders),
            allow_different_budgets=config.allow_different_budgets,
        )
        markdown, figure = made.markdown, figures.measured_beside_published(made.comparisons)
    figures.write(figure, run_dir / "report.png")
    write_text(run_dir / "report.md", markdown)
    print(markdown)
    print(f"written: '{run_dir / 'report.md'}' and report.png")


if __name__ == "__main__":
    run(main)
