"""Measure speed and memory: ``python -m nvae_lightning.benchmark dataset=… model=…``."""

from __future__ import annotations

import json
import os
from functools import cache, partial
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig
from rich.console import Console

from nvae_lightning.benchmarking import (
    Result,
    Rounds,
    Work,
    compare_speeds,
    cost_of,
    measure_roofline,
    tabulate,
    write_trace,
)
from nvae_lightning.cli.building import save_config
from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.measured import (
    SHARED,
    as_overrides,
    build_work,
    check,
    find_batch,
    run_rounds,
    second_setting,
)
from nvae_lightning.utilities import figures
from nvae_lightning.utilities.environment import device_name, version
from nvae_lightning.utilities.files import write_text

_measure_roofline = cache(measure_roofline)


def describe(
    config: DictConfig, label: str, work: Work, rounds: Rounds, largest_batch: int | None
) -> Result:
    """Summarise the measurements of a setting."""
    precision = "32-true" if config.what == "data" else str(config.trainer.precision)
    cost = cost_of(
        partial(instantiate, config.module, _convert_="all"), config.what,
        batch_size=config.dataset.batch_size, precision=precision,
        num_importance_samples=config.num_importance_samples,
    )  # fmt: skip
    return Result(
        label, device_name(work.device, 1), precision, config.dataset.batch_size, rounds, cost,
        _measure_roofline(work.device, precision), largest_batch,
    )  # fmt: skip


def report(config: DictConfig, results: list[Result], run_dir: Path) -> None:
    """Write ``benchmark.json`` and ``benchmark.png``, and print a table."""
    job = HydraConfig.get()
    ratio = compare_speeds(*results) if len(results) == 2 else None
    found = {
        **{name: config[name] for name in ("what", "num_steps", "num_rounds")},
        **{name: job.runtime.choices[name] for name in ("dataset", "model")},
        "version": version(),
        "torch": torch.__version__,
        "settings": [result.as_dict() for result in results],
        "ratio": ratio,
    }
    file = run_dir / "benchmark.json"
    write_text(file, json.dumps(found, indent=2) + "\n")
    if job.mode is RunMode.MULTIRUN:  # the jobs of a sweep also share a file
        with (Path(job.sweep.dir) / "benchmark.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(found) + "\n")
    bars = [(result.label, result.phases, result.least_ms_per_image) for result in results]
    figure = figures.phases_beside_roofline(*map(list, zip(*bars, strict=True)))
    figures.write(figure, run_dir / "benchmark.png")
    Console().print(tabulate(config.what, results))
    if ratio is not None:
        print(
            f"the second is {ratio['median']:.3f} times as fast as the first, from "
            f"{ratio['min']:.3f} to {ratio['max']:.3f} in {config.num_rounds} rounds"
        )
    print(f"written: '{file}' and benchmark.png")


@command("benchmark")
def main(config: DictConfig) -> float:
    """Measure one setting, or two in alternation; return images per second, for sweeps."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # hides messages about each profile
    check(config)
    given = [o for o in HydraConfig.get().overrides.task if o.partition("=")[0] not in SHARED]
    configs, labels = [config], [" ".join(given) or "defaults"]
    if config.compare is not None:
        configs.append(second_setting(config))
        labels.append(" ".join(as_overrides(config.compare)))
        check(configs[1])
    for name, setting in zip(("config", "config.compare"), configs, strict=False):
        save_config(setting, run_dir / f"{name}.yaml")
    seed_everything(config.seed, workers=True, verbose=False)
    largest = [find_batch(each, run_dir) for each in configs]
    works = [build_work(each, run_dir) for each in configs]
    rounds = run_rounds(works, config)
    if config.trace:  # before the roofline, which changes TF32, so that PyTorch would recompile
        for work, name in zip(works, ("trace", "trace.compare"), strict=False):
            write_trace(work.trace(), work.device, run_dir / f"{name}.json")
    measured = zip(configs, labels, works, rounds, largest, strict=True)
    results = [describe(*each) for each in measured]
    report(config, results, run_dir)
    return results[0].images_per_second


if __name__ == "__main__":
    run(main)
