"""W&B runs that cannot be started are refused before the training."""

from pathlib import Path

import pytest
from lightning.pytorch.loggers import WandbLogger

from nvae_lightning.training.callbacks import start_wandb


@pytest.mark.parametrize(
    ("name", "value"),
    [("WANDB_MODE", "foo"), ("WANDB_BASE_URL", "nonsense"), ("WANDB_INIT_TIMEOUT", "soon")],
)
def test_invalid_wandb_variables_are_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"logger: .*{name}: got '{value}'.*logger=csv"):
        start_wandb([logger])
    assert list(tmp_path.iterdir()) == []


def test_without_a_key_wandb_does_not_ask_for_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for kind in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path))
    logger = WandbLogger(save_dir=tmp_path, offline=False)
    with pytest.raises(ValueError, match=r"logger: .*wandb login.*logger=csv"):
        start_wandb([logger])
