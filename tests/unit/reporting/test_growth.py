"""Lines fitted to made-up measurements have the slopes that these were made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from warm_python import run_python

from nvae_lightning.benchmarking import (
    Cost,
    Memory,
    Result,
    Roofline,
    Rounds,
    Times,
    compare_speeds,
)
from nvae_lightning.cli.runs import load_comparisons
from nvae_lightning.reporting import growth
from nvae_lightning.utilities import figures

GROUPS, CHANNELS = "model.hierarchy.num_groups", "model.hierarchy.channels"
SIZE, BATCH = "dataset.image.size", "dataset.batch_size"


def _result(label: str, step: float, *, mib: float = 64.0, batch: int = 8) -> Result:
    memory = Memory(tensors=int(mib * 2**20), kept=0, resident=0)
    times = [Times(0.0, factor * step, {"forward": step}) for factor in (0.9, 1.0, 1.5)]
    rounds = Rounds(0.0, 0.0, times, memory)
    return Result(label, "CPU", "32-true", batch, rounds, Cost(1, 1), Roofline(1.0, 1.0), None)


def _job(
    setting: str, value: object, step: float, *, drift: float = 1.0, common: str = "a=1", **of: Any
) -> dict[str, Any]:
    """A line of ``benchmark.jsonl``; the common model takes 0.2 seconds."""
    results = [_result(common, drift * 0.2), _result(f"{setting}={value}", drift * step, **of)]
    made = {"what": "train", "dataset": "cifar10", "model": "tiny", "torch": "2.9"}
    return {
        **made,
        "settings": [result.as_dict() for result in results],
        "ratio": compare_speeds(*results),
    }


JOBS = [
    *(_job(GROUPS, f"[{n}]", 0.1 + 0.02 * n, mib=10 + 5 * n) for n in (2, 4, 8, 16)),
    *(_job(CHANNELS, c, 0.03 + 1e-4 * c**2, mib=4 * c) for c in (8, 16, 32, 64)),
    *(_job(SIZE, s, 0.01 + 1e-5 * s**2, mib=s**2) for s in (16, 32, 64)),
    *(_job(BATCH, b, 0.02 * b * (2 if b == 64 else 1), batch=b) for b in (16, 32, 64, 8)),
]


def test_lines_have_slope_intercept_and_first_bend() -> None:
    markdown, lines = growth(JOBS)
    labels = ["groups", "channels", "channels²", "pixels", "batch size"]
    assert [line.x_label for line in lines] == labels * 2
    found = {(line.y_label, line.x_label): line for line in lines}
    expected = {
        ("time (ms per step)", "groups"): (20.0, 100.0, None),
        ("time (ms per step)", "channels²"): (0.1, 30.0, None),
        ("time (ms per step)", "pixels"): (0.01, 10.0, None),
        ("peak memory (MiB)", "groups"): (5.0, 10.0, None),
        ("peak memory (MiB)", "channels"): (4.0, 0.0, None),
        ("peak memory (MiB)", "pixels"): (1.0, 0.0, None),
        ("peak memory (MiB)", "batch size"): (0.0, 64.0, None),
    }
    for key, (slope, intercept, bend) in expected.items():
        line = found[key]
        assert (line.slope, line.intercept) == pytest.approx((slope, intercept), abs=1e-6), key
        assert line.bend is bend
    # Times through 8 and 16 are 36.4 and 55.6 ms, whose line predicts 94 of 132.4 ms at 32.
    assert found["time (ms per step)", "channels"].bend == 32
    batch = found["time (ms per step)", "batch size"]
    assert (batch.x, batch.bend) == ((8, 16, 32, 64), 64)  # by size
    assert "against groups | 20 | 100 | 0.0% | 1.0000 | – |" in markdown
    assert "CPU, 32-true, torch 2.9, train, cifar10, tiny, `a=1`" in markdown
    assert f"| `{GROUPS}=[16]` | 2.100 (2.100 to 2.100) | 90 |" in markdown


def test_drift_of_the_machine_between_jobs_cancels() -> None:
    jobs = [
        _job(GROUPS, f"[{n},{n}]", 0.1 * n, drift=d) for n, d in ((1, 1.0), (2, 1.4), (3, 0.7))
    ]
    _, (time, _) = growth(jobs)
    assert (time.slope, time.intercept) == pytest.approx((50.0, 0.0), abs=1e-9)
    assert time.x == (2, 4, 6)  # groups of all scales


def test_the_last_of_repeated_jobs_counts() -> None:
    _, (time, *_) = growth([_job(GROUPS, "[8]", 9.0), *JOBS[:4]])
    assert time.slope == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        (JOBS[:2], r"runs: model.hierarchy.num_groups has 2 values; measure at least 3"),
        ([*JOBS, _job(GROUPS, "[9]", 1.0, common="b=2")], r"2 common models .*`a=1` and .*`b=2`"),
        ([_job("compile", "true", 1.0)], r"compare=\{compile=true\}, which does not change one"),
        ([_job(GROUPS, "[9] b=2", 1.0)], r"which does not change one number"),
    ],
)
def test_measurements_of_something_else_are_refused(
    jobs: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        growth(jobs)


def test_panels_show_points_line_and_bend() -> None:
    _, lines = growth(JOBS)
    all_axes = figures.fitted_lines(lines).axes
    assert [axes.get_xlabel() for axes in all_axes] == [line.x_label for line in lines]
    fitted, points, bend = all_axes[4].lines
    assert list(np.asarray(points.get_xdata())) == [8, 16, 32, 64]
    assert np.asarray(points.get_ydata()) == pytest.approx([160.0, 320.0, 640.0, 2560.0])
    ends = [lines[4].at(0.0), lines[4].at(64.0)]
    assert np.asarray(fitted.get_ydata()) == pytest.approx(ends)
    assert set(np.asarray(bend.get_xdata())) == {64}
    assert len(all_axes[0].lines) == 2


def test_report_reads_the_file_of_a_sweep(tmp_path: Path) -> None:
    for name, jobs in (("a", JOBS[:6]), ("b", JOBS[6:])):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(job) + "\n" for job in jobs)
        (tmp_path / name / "benchmark.jsonl").write_text(lines)
    command = ("-m", "nvae_lightning.report", "table=step_growth", "hydra.run.dir=out")
    result = run_python(*command, "runs=[a,b]", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "report.md").read_text() == growth(JOBS)[0]
    with Image.open(tmp_path / "out" / "report.png") as picture:
        assert picture.width > picture.height > 400
    result = run_python(*command, "runs=[c]", cwd=tmp_path)
    assert result.returncode == 1
    assert "c/benchmark.jsonl" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("line", ['{"what": 1', '{"what": 1}', '{"settings": [1]}', "[]"])
def test_lines_that_compare_nothing_are_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "benchmark.jsonl").write_text(f"{json.dumps(JOBS[0])}\n{line}\n")
    with pytest.raises(
        ValueError, match=r"^runs: line 2 of '.*' is no comparison of two settings"
    ):
        load_comparisons([str(tmp_path)])
