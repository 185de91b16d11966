"""The folder of the configs, the group ``experiment``, and the configs' resolvers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import OmegaConf

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parents[1]

#: Folder that holds ``conf/`` and ``experiments/``: the checkout, or the installed package's copy.
CONFIG_ROOT = _CHECKOUT if (_CHECKOUT / "conf").is_dir() else _PACKAGE / "_configs"


class ExperimentsSource(FileConfigSource):
    """The files of ``experiments/`` as the group ``experiment``."""

    @staticmethod
    def scheme() -> str:
        """Return the prefix of the search path."""
        return "experiments"

    def load_config(self, config_path: str) -> ConfigResult:
        """Load an experiment."""
        return super().load_config(config_path.removeprefix("experiment/"))

    def is_group(self, config_path: str) -> bool:
        """Return whether a path is the group."""
        return config_path in ("", "experiment")

    def is_config(self, config_path: str) -> bool:
        """Return whether a path is an experiment."""
        group, _, name = config_path.partition("/")
        return group == "experiment" and super().is_config(name)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List the group, or its files."""
        if config_path == "":
            return [] if results_filter is ObjectType.CONFIG else ["experiment"]
        if config_path != "experiment" or results_filter is ObjectType.GROUP:
            return []
        return sorted(file.stem for file in Path(self.path).glob("*.yaml"))


class ExperimentsSearchPath(SearchPathPlugin):
    """Find ``experiment=NAME`` in the folder beside ``conf/``."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder to the user's own search path."""
        search_path.append("nvae_lightning", f"experiments://{CONFIG_ROOT / 'experiments'}")


Plugins.instance().register(ExperimentsSource)
Plugins.instance().register(ExperimentsSearchPath)


def _continue_searches() -> None:
    """Make Optuna's searches, if the plugin is installed, continue after failed trials."""
    store = ConfigStore.instance()
    if "optuna.yaml" in store.list("hydra/sweeper"):
        node = store.load("hydra/sweeper/optuna.yaml").node
        node.max_failure_rate = 1.0
        store.store(name="optuna", node=node, group="hydra/sweeper", provider="nvae_lightning")


_continue_searches()


def _auto_precision() -> str:
    if not torch.cuda.is_available():
        return "32-true"
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if native else "16-mixed"


def _auto_compile(accelerator: object) -> bool:
    return accelerator in ("gpu", "cuda")


def _auto_epochs(max_steps: object, epochs: object) -> object:
    # Wrong types are refused later, with all others.
    return -1 if isinstance(max_steps, int) and max_steps > 0 else epochs


def _run_name(now: str) -> str:
    """Return the name of a run's folder, the same in all of its processes."""
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    if job and step:  # started by srun; the same when the job is requeued
        return f"slurm-{job}.{step}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError(
            "hydra.run.dir: torchrun's processes would each choose another folder; "
            "set hydra.run.dir=FOLDER"
        )
    return now


def _sweep_name() -> str | None:
    """Return the name of a sweep's folder, with which W&B groups its runs."""
    config = HydraConfig.get()
    if config.mode is not RunMode.MULTIRUN or OmegaConf.is_missing(config.runtime, "output_dir"):
        return None  # no sweep, or a config that is only printed
    return Path(config.sweep.dir).name


def _chosen(*groups: str) -> Any:  # noqa: ANN401 -- beartype warns of ListConfig's own bases
    """Return the chosen options of some groups, without groups that have none."""
    choices = HydraConfig.get().runtime.choices
    return OmegaConf.create([choices[group] for group in groups if choices.get(group)])


def _help_of(name: str) -> str:
    """Describe a command by the comments, groups and settings in its config."""
    text = (CONFIG_ROOT / "conf" / f"{name}.yaml").read_text(encoding="utf-8")
    purpose, _, rest = text.removeprefix("# ").partition("\n")
    settings = rest.partition("\n\n")[2].partition("\nhydra:\n")[0]
    groups = []
    for entry in yaml.safe_load(text)["defaults"]:
        for group, default in entry.items() if isinstance(entry, dict) else ():
            if not group.startswith("override "):
                options = GlobalHydra.instance().config_loader().get_group_options(group)
                groups.append(f"{group}: {', '.join(options)} (default: {default or 'none'})")
    parts = [
        purpose,
        "",
        *(["GROUPS", *groups, ""] if groups else []),
        "SETTINGS",
        settings.strip(),
    ]
    return "\n".join(parts).replace("$", "$$")


OmegaConf.register_new_resolver("help_of", _help_of, replace=True)
OmegaConf.register_new_resolver("auto_precision", _auto_precision, replace=True)
OmegaConf.register_new_resolver("auto_compile", _auto_compile, replace=True)
OmegaConf.register_new_resolver("auto_epochs", _auto_epochs, replace=True)
OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True)
OmegaConf.register_new_resolver("chosen", _chosen, replace=True)
