"""Build a W&B workspace: ``python -m nvae_lightning.dashboard entity=… project=…``."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.setting_types import check_type


@command("dashboard")
def main(config: DictConfig) -> None:
    """Write the workspace as JSON and save it to W&B."""
    check_type("entity", config.entity, str | None)
    if config.save and config.entity is None:
        raise ValueError(
            "entity: got null, but W&B saves a workspace under a user or team; set "
            "entity=NAME, or save=false to write only workspace.json"
        )
    try:
        from nvae_lightning.training import wandb_workspace as workspaces
    except ImportError as error:
        raise ValueError(
            f"the dashboard requires the package wandb-workspaces ({error}); install it with "
            "pip install 'nvae-lightning[dashboard]'"
        ) from error
    workspace = workspaces.build_workspace(config.entity or "", config.project, config.name)
    path = Path(HydraConfig.get().runtime.output_dir) / "workspace.json"
    workspaces.write_workspace(workspace, path)
    print(f"written: '{path}'")
    if config.save:
        workspaces.save_workspace(workspace)


if __name__ == "__main__":
    run(main)
