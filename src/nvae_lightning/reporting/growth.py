"""Growth of a step's time and memory with the sizes of model and batch, as straight lines."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import linregress

from nvae_lightning.utilities.figures import Line

#: Powers of the settings to which lines are fitted, by label.
_LABELS = {
    "model.hierarchy.num_groups": {"groups": 1},
    "model.hierarchy.channels": {"channels": 1, "channels²": 2},
    "dataset.image.size": {"pixels": 2},
    "dataset.batch_size": {"batch size": 1},
}
_TOLERANCE = 0.1  # relative deviation up to which growth counts as linear

_EXPLANATION = f"""\
Ordinary least squares. The time is the median over rounds of the ratio to the common model, which
was measured in alternation, times the median of that model's times. The memory is the peak of the
tensors. Activations grow with the channels, convolutions and weights with their square, so both
lines are given. Deviations are relative to the measured value. The last column has the first value
that deviates by more than {_TOLERANCE:.0%} from the line through all smaller ones."""


def growth(jobs: Sequence[Mapping[str, Any]]) -> tuple[str, list[Line]]:
    """Fit lines to the time and memory of a step, for each setting that the jobs change.

    Args:
        jobs: Lines of a ``benchmark.jsonl``, each a common model compared with the same model
            with one number changed; of repeated jobs the last counts.

    Returns:
        Report in Markdown, and the lines: those of time, then those of memory.

    Raises:
        ValueError: If a job does not change one number, if the common model or the device differ,
            or if a setting has fewer than three values.
    """
    conditions = {_conditions(job) for job in jobs}
    if len(conditions) != 1:
        raise ValueError(
            f"runs: got {len(conditions)} common models or devices, "
            f"{' and '.join(sorted(conditions))}; report them one by one"
        )
    common_ms = statistics.median(_step_ms(job["settings"][0]) for job in jobs)
    times: dict[str, dict[float, float]] = defaultdict(dict)
    memory: dict[str, dict[float, float]] = defaultdict(dict)
    rows = []
    for job in jobs:
        common, changed = job["settings"]
        setting, value = _number(changed["setting"])
        images = changed["batch_size"] / common["batch_size"]
        ratio, low, high = (images / job["ratio"][name] for name in ("median", "max", "min"))
        times[setting][value] = common_ms * ratio
        memory[setting][value] = changed["memory"]["peak_tensor_bytes"] / 2**20
        row = f"`{changed['setting']}` | {ratio:.3f} ({low:.3f} to {high:.3f})"
        rows.append(f"| {row} | {memory[setting][value]:.4g} |")
    lines = [*_lines(times, "time (ms per step)"), *_lines(memory, "peak memory (MiB)")]
    report = [
        "# Growth of a step", "", *conditions, "",
        "| | slope | intercept | largest deviation | R² | stops being linear at |",
        "|---|---:|---:|---:|---:|---:|", *map(_row, lines), "", _EXPLANATION, "",
        "## Measurements", "", f"The common model takes {common_ms:.4g} ms per step.", "",
        "| changed setting | time over the common model's (range of the rounds) | peak MiB |",
        "|---|---:|---:|", *rows,
    ]  # fmt: skip
    return "\n".join(report) + "\n", lines


def _conditions(job: Mapping[str, Any]) -> str:
    common = job["settings"][0]
    names = [common["device"], common["precision"], f"torch {job['torch']}"]
    names += [job["what"], job["dataset"], job["model"], f"`{common['setting']}`"]
    return ", ".join(names)


def _step_ms(setting: Mapping[str, Any]) -> float:
    return setting["ms_per_image"] * setting["batch_size"]


def _number(override: str) -> tuple[str, float]:
    """Return the setting of an override, and its number or the sum of its list of numbers."""
    found = re.fullmatch(r"([\w.]+)=\[?(\d+(?:[.,]\d+)*)\]?", override)
    if found is None:
        raise ValueError(
            f"runs: a job has compare={{{override}}}, which does not change one number; "
            "give the folder of a sweep of experiment=step_growth"
        )
    return found[1], sum(map(float, found[2].split(",")))


def _lines(found: Mapping[str, Mapping[float, float]], y_label: str) -> list[Line]:
    lines = []
    for setting, values in found.items():
        if len(values) < 3:
            raise ValueError(f"runs: {setting} has {len(values)} values; measure at least 3")
        for x_label, power in _LABELS.get(setting, {setting: 1}).items():
            x, y = zip(*sorted((value**power, y) for value, y in values.items()), strict=True)
            fit: Any = linregress(x, y)
            lines.append(Line(x_label, y_label, x, y, fit.slope, fit.intercept, _bend(x, y)))
    return lines


def _bend(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return the first value that deviates from the line through all smaller ones."""
    for i in range(2, len(x)):
        fit: Any = linregress(x[:i], y[:i])
        if abs(fit.intercept + fit.slope * x[i] - y[i]) > _TOLERANCE * y[i]:
            return x[i]
    return None


def _row(line: Line) -> str:
    fit: Any = linregress(line.x, line.y)
    errors = [line.at(x) / y - 1 for x, y in zip(line.x, line.y, strict=True)]
    bend = "–" if line.bend is None else f"{line.bend:,g}"
    return (
        f"| {line.y_label} against {line.x_label} | {line.slope:.3g} | {line.intercept:.3g} | "
        f"{max(map(abs, errors)):.1%} | {fit.rvalue**2:.4f} | {bend} |"
    )
