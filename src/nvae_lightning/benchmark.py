"""Measure speed and memory: ``python -m nvae_lightning.benchmark dataset=… model=…``."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Column, Table

from nvae_lightning.backends import GraphedSampler
from nvae_lightning.benchmarking import (
    Loading,
    RandomImages,
    Ratio,
    Repetition,
    Result,
    Training,
    Work,
    alternate,
    cost_of,
    largest_batch,
    measure_roof,
    profile_steps,
)
from nvae_lightning.cli.building import build_module, build_trainer, save_config
from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.machine import hide_warnings, keep_freed_memory
from nvae_lightning.cli.setting_types import check_seed, check_type, check_types
from nvae_lightning.data import ImageDataModule
from nvae_lightning.utilities import figures
from nvae_lightning.utilities.environment import device_name, version
from nvae_lightning.utilities.files import whole_file, write_text

#: What two settings have in common.
_SHARED = (
    "what", "compare", "images", "num_steps", "num_warmup_steps", "num_rounds", "find_batch",
    "trace",
)  # fmt: skip


def check_settings(config: DictConfig) -> None:
    """Check the settings that are not a class of this package's.

    Raises:
        ValueError: If one is of another type than it should be, or out of range.
    """
    check_types(config)
    check_seed(config.seed)
    for name in ("compile", "cuda_graphs", "find_batch", "trace"):
        check_type(name, config[name], bool)
    check_type("temperature", config.temperature, float | list[float])
    for name, allowed in (
        ("what", ("train", "sample", "evaluate", "data")),
        ("images", ("random", "dataset")),
    ):
        if config[name] not in allowed:
            raise ValueError(
                f"{name}: got {config[name]!r}, but it must be {', '.join(allowed[:-1])} or "
                f"{allowed[-1]}; set {name} accordingly"
            )
    for name in ("num_steps", "num_warmup_steps", "num_rounds", "num_importance_samples"):
        check_type(name, config[name], int)
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    if config.cuda_graphs and config.what not in ("train", "sample"):
        raise ValueError(
            f"cuda_graphs: got true, which what={config.what} has no use for; set what=train or "
            "sample, or leave it out"
        )
    if not (config.compare is None or isinstance(config.compare, DictConfig)):
        raise ValueError(
            f"compare: got {config.compare!r}, but it must be overrides; "
            "write compare={key:value}"
        )
    if config.trainer.fast_dev_run:
        raise ValueError(
            f"trainer.fast_dev_run: got {config.trainer.fast_dev_run}, but num_steps says how "
            "many steps are measured; set num_steps=1 num_rounds=1 instead"
        )
    if config.trainer.max_steps != -1 or config.trainer.max_epochs < config.num_rounds + 2:
        raise ValueError(
            f"trainer.max_steps and trainer.max_epochs: got {config.trainer.max_steps} and "
            f"{config.trainer.max_epochs}, which would end a round too early; leave them, and "
            "set num_steps and num_rounds"
        )


def as_overrides(settings: DictConfig, prefix: str = "") -> list[str]:
    """Write a mapping as overrides of Hydra's.

    >>> as_overrides(OmegaConf.create({"compile": True, "model": {"num_flows": 1}}))
    ['compile=true', 'model.num_flows=1']
    """
    found = []
    for key, value in settings.items():
        if isinstance(value, DictConfig):
            found += as_overrides(value, f"{prefix}{key}.")
        else:
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            is_name = isinstance(plain, str)
            written = plain if is_name else json.dumps(plain, separators=(",", ":"))
            found.append(f"{prefix}{key}={written}")
    return found


def second_setting(config: DictConfig) -> DictConfig:
    """Compose the setting to compare with: by this job's overrides, then those of ``compare``.

    Raises:
        ValueError: If it differs in what both have in common.
    """
    job = HydraConfig.get()
    assert job.job.config_name is not None
    other = compose(job.job.config_name, [*job.overrides.task, *as_overrides(config.compare)])
    for name in _SHARED:
        if other[name] != config[name]:
            raise ValueError(
                f"compare: got {name}={other[name]}, but both settings have one {name}; set it "
                "outside of compare"
            )
    return other


def build_data(config: DictConfig, num_batches: int) -> ImageDataModule:
    """Build the images to measure with.

    Raises:
        ValueError: If they are not there, or too few.
    """
    if config.images == "random" and config.what != "data":
        target = f"{RandomImages.__module__}.{RandomImages.__name__}"
        return instantiate(config.dataset.datamodule, _target_=target, num_batches=num_batches)
    datamodule = instantiate(config.dataset.datamodule, verify=False)
    datamodule.prepare_data()
    datamodule.setup("fit")
    available = len(datamodule.train_dataloader())
    if config.what == "train" and available < num_batches:
        raise ValueError(
            f"num_steps: got {config.num_steps}, for which an epoch must have {num_batches} "
            f"batches, but it has {available}; set a smaller one, or images=random"
        )
    return datamodule


def build_work(config: DictConfig, run_dir: Path) -> Work:
    """Build what is measured.

    Raises:
        ValueError: If a setting cannot be had on this machine, or there are not the images for it.
    """
    trainer = build_trainer(config, run_dir)
    if trainer.world_size > 1:
        raise ValueError(
            f"trainer.devices: got {trainer.world_size} devices, but only one is measured; set "
            "trainer.devices=1"
        )
    datamodule = build_data(config, config.num_warmup_steps + 2 * config.num_steps)
    if config.what == "data":
        return Loading(datamodule.train_dataloader())
    module = build_module(config)
    if config.what == "train":
        return Training(trainer, module, datamodule)
    model, batch_size = module.model, config.dataset.batch_size
    if config.what == "sample":
        given = config.temperature
        temperature = given if isinstance(given, int | float) else list(given)

        def build_draw() -> Callable[[], torch.Tensor]:
            if config.cuda_graphs:
                return GraphedSampler(model, batch_size, temperature)
            return lambda: model.sample(batch_size, temperature).mean

        return Repetition(trainer, module, "sample", build_draw)
    x = datamodule.to_input(next(iter(datamodule.train_dataloader())), train=False)

    def evaluate() -> torch.Tensor:
        images = x.to(next(model.parameters()), memory_format=torch.channels_last)
        return model.log_weights(images, config.num_importance_samples)

    return Repetition(trainer, module, "evaluate", lambda: evaluate)


def find_batch(config: DictConfig, run_dir: Path) -> int:
    """Find the largest batch that fits.

    Raises:
        ValueError: If it is not on a GPU: a system ends processes that take too much memory.
    """
    device = build_trainer(config, run_dir).strategy.root_device
    if device.type == "cpu" or config.what == "data":
        raise ValueError("find_batch: got true, which takes a GPU and a model; leave it out")
    config = copy.deepcopy(config)
    config.num_steps = config.num_warmup_steps = 1

    def attempt(batch_size: int) -> None:
        config.dataset.batch_size = batch_size
        build_work(config, run_dir).run(num_warmup_steps=1, num_steps=1)

    return largest_batch(attempt, config.dataset.batch_size)


def measure(configs: list[DictConfig], labels: list[str], run_dir: Path) -> list[Result]:
    """Measure settings in alternation.

    Raises:
        ValueError: If one cannot be had on this machine, or there is not the memory for it.
    """
    first = configs[0]
    largest = [find_batch(config, run_dir) if config.find_batch else None for config in configs]
    works = [build_work(config, run_dir) for config in configs]
    rounds = None
    try:
        rounds = alternate(
            works,
            num_rounds=first.num_rounds,
            num_warmup_steps=first.num_warmup_steps,
            num_steps=first.num_steps,
        )
    except torch.OutOfMemoryError:
        pass  # said below, where the error does not keep what it was raised from in memory
    if rounds is None:
        sizes = " and ".join(str(config.dataset.batch_size) for config in configs)
        raise ValueError(
            f"dataset.batch_size: got {sizes}, for which the device's memory is not enough; set "
            "a smaller one"
        )
    if first.trace:  # now, as PyTorch compiles anew once the roof's measurement has changed TF32
        for work, name in zip(works, ("trace", "trace.compare"), strict=False):
            keep_trace(work, run_dir, name)
    roof_of = cache(measure_roof)
    results = []
    for index, (config, work) in enumerate(zip(configs, works, strict=True)):
        precision = "32-true" if config.what == "data" else str(config.trainer.precision)
        cost = cost_of(
            partial(instantiate, config.module, _convert_="all"),
            config.what,
            batch_size=config.dataset.batch_size,
            precision=precision,
            num_importance_samples=config.num_importance_samples,
        )
        result = Result(
            label=labels[index],
            device=device_name(work.device, 1),
            precision=precision,
            batch_size=config.dataset.batch_size,
            rounds=rounds[index],
            cost=cost,
            roof=roof_of(work.device, precision),
            largest_batch=largest[index],
        )
        results.append(result)
    return results


def keep_trace(work: Work, run_dir: Path, name: str) -> None:
    """Write a trace of two steps for chrome://tracing, and a table of what took longest."""
    profiled = profile_steps(work)
    with whole_file(run_dir / f"{name}.json") as partial:
        profiled.export_chrome_trace(str(partial))
    order = "self_cpu_time_total" if work.device.type == "cpu" else "self_device_time_total"
    table = profiled.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=80)
    write_text(run_dir / f"{name}.txt", table)


def table_of(what: str, results: list[Result]) -> Table:
    """Lay the results out, a column per setting."""
    columns = [Column(result.label, overflow="fold") for result in results]
    table = Table(f"{what}, {results[0].device}", *columns)
    rows: dict[str, Callable[[Result], str]] = {
        "images a second": lambda r: f"{r.images_per_second:.4g}",
        "ms per image": lambda r: f"{r.ms_per_image:.4g}",
        **{
            f"  {phase}": lambda r, phase=phase: f"{r.phases[phase]:.4g}"
            for phase in results[0].phases
        },
        "floor, ms per image": lambda r: f"{r.floor:.4g}",
        "share of the floor": lambda r: f"{r.fraction:.1%}",
        "MiB per image": lambda r: f"{r.bytes_per_image / 2**20:.4g}",
        "MiB kept": lambda r: f"{r.rounds.memory.kept / 2**20:.4g}",
        "MiB resident": lambda r: f"{r.rounds.memory.resident / 2**20:.4g}",
        "warm-up, s": lambda r: f"{r.rounds.warmup_seconds:.3g}",
    }
    if results[0].largest_batch is not None:
        rows["largest batch"] = lambda r: str(r.largest_batch)
    for name, cell in rows.items():
        table.add_row(name, *map(cell, results))
    return table


def report(config: DictConfig, results: list[Result], run_dir: Path) -> None:
    """Write ``benchmark.json`` and ``benchmark.png``, and print a table."""
    job = HydraConfig.get()
    ratio = Ratio.of(*results).as_dict() if len(results) == 2 else None
    found = {
        "what": config.what,
        "dataset": job.runtime.choices["dataset"],
        "model": job.runtime.choices["model"],
        "version": version(),
        "torch": torch.__version__,
        "num_steps": config.num_steps,
        "num_rounds": config.num_rounds,
        "settings": [result.as_dict() for result in results],
        "ratio": ratio,
    }
    file = run_dir / "benchmark.json"
    write_text(file, json.dumps(found, indent=2) + "\n")
    if job.mode is RunMode.MULTIRUN:  # all jobs of a sweep in one file, too
        with (Path(job.sweep.dir) / "benchmark.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(found) + "\n")
    figure = figures.phases_beside_floor(
        [result.label for result in results],
        [result.phases for result in results],
        [result.floor for result in results],
    )
    figures.write(figure, run_dir / "benchmark.png")
    Console().print(table_of(config.what, results))
    if ratio is not None:
        print(
            f"the second is {ratio['median']:.3f} times as fast as the first, from "
            f"{ratio['min']:.3f} to {ratio['max']:.3f} in {config.num_rounds} rounds"
        )
    print(f"written: '{file}' and benchmark.png")


@command("benchmark")
def main(config: DictConfig) -> float:
    """Measure one setting, or two in alternation; return images a second, for sweeps."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    hide_warnings()
    keep_freed_memory()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # that a profile begins and ends is no news
    check_settings(config)
    given = [o for o in HydraConfig.get().overrides.task if o.partition("=")[0] not in _SHARED]
    configs, labels = [config], [" ".join(given) or "defaults"]
    if config.compare is not None:
        configs.append(second_setting(config))
        labels.append(" ".join(as_overrides(config.compare)))
        check_settings(configs[1])
    for name, setting in zip(("config", "config.compare"), configs, strict=False):
        resolved = OmegaConf.to_container(setting, resolve=True)
        assert isinstance(resolved, dict)
        save_config(resolved, run_dir / f"{name}.yaml")
    seed_everything(config.seed, workers=True, verbose=False)
    results = measure(configs, labels, run_dir)
    report(config, results, run_dir)
    return results[0].images_per_second


if __name__ == "__main__":
    run(main)
