"""Folders of runs as read by the report command, and the paper's values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from nvae_lightning import reporting
from nvae_lightning.benchmarking import cost_of
from nvae_lightning.cli.runs import load_runs
from nvae_lightning.report import load_layout
from nvae_lightning.reporting import report
from nvae_lightning.reporting.run import Quantity
from nvae_lightning.training.module import NVAEModule

TABLES = sorted(path.stem for path in (Path(reporting.__file__).parent / "tables").glob("*.yaml"))

# As the paper prints them, row by row.
PUBLISHED: dict[str, list[list[float | None]]] = {
    "table1": [[78.01, 2.93, None, 2.04, None, 0.71], [78.19, 2.91, 3.92, 2.03, 0.70, 0.69]],
    "table2": [[3.36, 3.27, 3.31], [3.36, 3.26, 3.22], [3.34, 3.23, 3.16]],
    "table3": [[3.11, 43.3, 6.3], [3.12, 49.0, 10.6], [3.07, 48.0, 10.7], [3.07, 50.4, 14.9]],
    "table4": [[53, 1.32, 1.80, 3.12, 3.16], [54, 1.36, 1.80, 3.16, 3.19]],
    "table5": [[3.16], [3.18], [3.22], [None]],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_match_the_paper(name: str) -> None:
    layout = load_layout(name.removeprefix("table"))
    columns = [column.published for column in layout.columns]
    assert [list(row) for row in zip(*columns, strict=True)] == PUBLISHED[name]


@pytest.mark.parametrize("name", TABLES)
def test_labels_of_rows_and_columns_are_unique(name: str) -> None:
    layout = load_layout(name)
    for entries in (layout.rows, layout.columns):
        labels = [entry.label for entry in entries]
        assert len(set(labels)) == len(labels)


def test_tables_load_by_number_and_name() -> None:
    assert load_layout(3) == load_layout("3") == load_layout("table3")
    with pytest.raises(ValueError, match=r"table: got 6, .* set one of figure5, memory, .*, 1, 2"):
        load_layout(6)


def _write(folder: Path, seed: int, *, spectral: bool = True, rows: str) -> None:
    folder.mkdir(parents=True)
    hierarchy = {"channels": 8, "width": 1.0, "num_groups": [4], "max_groups_per_scale": None}
    settings: dict[str, Any] = {
        "seed": seed,
        "run_dir": str(folder),
        "num_devices": 1,
        "num_importance_samples": 10,
        "choices": {"dataset": "image_folder", "model": "tiny"},
        "dataset": {"batch_size": 8, "image": {"size": 32, "channels": 3, "bits": 8}},
        "model": {"hierarchy": hierarchy, "squeeze_excitation": True},
        "penalty": {"spectral": spectral},
        "trainer": {"precision": "32-true", "accumulate_grad_batches": 1},
        "callbacks": {"checkpoint": {"dirpath": f"{folder}/checkpoints"}},
    }
    OmegaConf.save(OmegaConf.create(settings), folder / "config.yaml")
    # Hydra's and W&B's files are not runs.
    for other in (".hydra", "wandb/run/files"):
        (folder / other).mkdir(parents=True)
        (folder / other / "config.yaml").write_text("seed: 3\n")
    (folder / "metrics.csv").write_text(rows)


HEADER = "lr-Adamax,step,test/nll,test/nll_bpd,test/num_images,train/loss\n"


def _metrics(bpd: float) -> str:
    return f"{HEADER}0.01,9,,,,7000.5\n,10,5000.0,{bpd},2000.0,\n"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Eleven finished runs and a killed one."""
    folder = tmp_path / "sweeps" / "first"
    for seed in range(11):
        _write(folder / str(seed), seed, rows=_metrics(6.0 + seed / 10))
    _write(folder / "11", 0, spectral=False, rows=f"{HEADER}0.01,9,,,,7000.5\n")
    return folder


def test_runs_of_a_sweep_are_named_by_their_number(sweep: Path) -> None:
    runs = load_runs([str(sweep)])
    assert [run.name for run in runs] == [str(number) for number in range(12)]
    assert [run.is_finished for run in runs] == [True] * 11 + [False]
    assert runs[3].setting("seed") == 3
    assert runs[3].rows == [
        {"lr-Adamax": 0.01, "step": 9.0, "train/loss": 7000.5},
        {"step": 10.0, "test/nll": 5000.0, "test/nll_bpd": 6.3, "test/num_images": 2000.0},
    ]
    assert (runs[3].num_steps, runs[11].num_steps) == (10, 10)
    text = report(load_layout(5), runs).markdown
    assert "| NVAE | 6.500 ± 0.100 (11) | 3.16 |" in text
    assert "| without SR | – | 3.18 |" in text
    assert "- 11 is left out: its training or test has not finished" in text


def test_runs_may_be_single_or_in_several_folders(sweep: Path, tmp_path: Path) -> None:
    other = tmp_path / "sweeps" / "second" / "0"
    _write(other, 0, spectral=False, rows=_metrics(7.0))
    assert [run.name for run in load_runs([str(other)])] == ["0"]
    both = load_runs([str(other), str(sweep / "2"), str(sweep / "2")])
    assert [run.name for run in both] == ["second/0", "first/2"]
    assert len(load_runs([str(tmp_path)])) == 13


def test_computation_is_counted_from_the_checkpoint(sweep: Path, build_nvae: Any) -> None:
    module = NVAEModule(build_nvae())
    content = {"state_dict": module.state_dict(), "global_step": 10}
    module.on_save_checkpoint(content)
    (sweep / "0" / "checkpoints").mkdir()
    torch.save(content, sweep / "0" / "checkpoints" / "step0000010.ckpt")
    with_checkpoint, without = load_runs([str(sweep / "0"), str(sweep / "1")])
    assert without.value(Quantity("teraflop")) is None
    step = cost_of(lambda: NVAEModule(build_nvae()), "train", batch_size=8, precision="32-true")
    assert step.flops > 1e6
    assert with_checkpoint.value(Quantity("teraflop")) == pytest.approx(10 * step.flops / 1e12)


def test_folder_without_runs_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            ValueError, match=r"runs: no run in '.*', a folder with a config\.yaml"
        ):
            load_runs([str(folder)])


@pytest.mark.parametrize(
    "rows",
    ["lr,test/nll\n0.1,5\n", "step,test/nll\n1,five\n", "step\n1,2\n", 'step\n"1\n', "step\n\0\n"],
    ids=["no step", "text", "too many columns", "open quotation", "binary"],
)
def test_damaged_metrics_are_named_in_one_line(tmp_path: Path, rows: str) -> None:
    _write(tmp_path / "0", 0, rows=rows)
    with pytest.raises(ValueError, match=r"runs: row 1 of '.*0/metrics\.csv' is damaged") as found:
        load_runs([str(tmp_path)])
    assert "\n" not in str(found.value)
