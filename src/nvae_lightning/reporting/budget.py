"""Budgets of runs, and their differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from nvae_lightning.reporting.layout import Layout
from nvae_lightning.reporting.run import Quantity, Run, listed, shown

#: Settings that do not affect the results of a run.
_IRRELEVANT = (
    "seed", "dataset.seed", "run_dir", "run_id", "ckpt_path", "version", "logger",
    "module", "choices.experiment", "callbacks.checkpoint", "callbacks.progress_bar",
    "dataset.verify", "overrides", "trainer.enable_progress_bar",
    "trainer.profiler", "trainer.detect_anomaly", "trainer.inference_mode",
    "trainer.fast_dev_run", "trainer.use_distributed_sampler", "trainer.timeout_minutes",
    "trainer._target_",
)  # fmt: skip
#: Settings that only affect time and memory.
_COST = (
    "device", "num_devices", "compile", "compute", "dataset.num_workers",
)  # fmt: skip


def _settings(run: Run) -> Iterator[tuple[str, object]]:
    """Yield the settings and the work done, by name."""

    def leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
        if isinstance(value, Mapping) and value:
            for key, child in value.items():
                yield from leaves(child, f"{path}.{key}".lstrip("."))
        else:
            own = run.settings.get("run_dir")
            is_path = isinstance(value, str) and own and value.startswith(own)
            yield path, "of the run" if is_path else value

    yield from leaves(run.settings, "")
    if run.is_finished:
        yield "steps trained", run.num_steps
        yield "images tested", run.value(Quantity("test/num_images"))


def differences(runs: Sequence[Run], layout: Layout) -> dict[str, list[tuple[object, list[str]]]]:
    """Find settings that differ and that the table does not compare: values and names of runs."""
    ignored = [*_IRRELEVANT, *layout.varies, *(() if layout.compares_cost else _COST)]
    settings = [dict(_settings(run)) for run in runs]
    found = {}
    for path in dict.fromkeys(path for each in settings for path in each):
        if any(path == prefix or path.startswith(f"{prefix}.") for prefix in ignored):
            continue
        is_work = path in ("steps trained", "images tested")
        values: list[tuple[object, list[str]]] = []
        for run, each in zip(runs, settings, strict=True):
            if is_work and path not in each:
                continue  # a run that diverged was not tested
            value = each.get(path)
            same = [names for other, names in values if other == value]
            if same:
                same[0].append(run.name)
            else:
                values.append((value, [run.name]))
        if len(values) > 1:
            found[path] = values
    return found


def describe(path: str, values: list[tuple[object, list[str]]]) -> str:
    """Describe a difference in one line."""
    return f"{path} is " + ", ".join(
        f"{shown(value)} in {listed(names)}" for value, names in values
    )


def budget(runs: Sequence[Run]) -> Iterator[str]:
    """Describe the data, model, training and test of runs, line by line."""

    def all_of(show: Callable[[Run], object]) -> str:
        return " or ".join(dict.fromkeys(str(show(run)) for run in runs))

    def image(run: Run) -> str:
        at = {key: run.setting(f"dataset.image.{key}") for key in ("size", "channels", "bits")}
        return f"{at['size']}x{at['size']}x{at['channels']}, {at['bits']}-bit"

    def groups(run: Run) -> str:
        most = run.setting("model.hierarchy.max_groups_per_scale") or math.inf
        scales = run.setting("model.hierarchy.num_groups")
        return " + ".join(str(min(number, most)) for number in scales)

    def channels(run: Run) -> str:
        hierarchy = run.settings["model"]["hierarchy"]
        return f"{hierarchy['channels'] * hierarchy['width']:g}"

    def training(run: Run) -> str:
        steps = f"{run.num_steps:,} steps of {run.images_per_step} images"
        return f"{steps}, {run.num_images:,} images seen, {run.setting('trainer.precision')}"

    def test(run: Run) -> str:
        num_images = run.value(Quantity("test/num_images"))
        images = "all" if num_images is None else f"{num_images:,.0f}"
        return f"{images} images, {run.setting('num_importance_samples')} importance samples"

    finished = [run for run in runs if run.is_finished]
    yield f"data: {all_of(lambda run: run.setting('choices.dataset'))}, {all_of(image)}"
    yield (
        f"model: {all_of(lambda run: run.setting('choices.model'))}, {all_of(channels)} channels, "
        f"{all_of(groups)} groups"
    )
    yield f"training: {all_of(training)}"
    if finished:
        yield "test: " + " or ".join(dict.fromkeys(map(test, finished)))
    yield f"seeds: {listed(sorted({run.setting('seed') for run in runs}))}"
    yield f"device: {all_of(lambda run: run.setting('device') or 'not recorded')}"
    yield f"version: {all_of(lambda run: run.setting('version') or 'not recorded')}"
    hours = [hours for run in runs if (hours := run.value(Quantity("hours"))) is not None]
    seconds = 3600 * sum(hours)
    time = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.2f} hours"
    yield f"time: {time} of training steps in all {len(runs)} runs"
