"""Modules and trainers of a config."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from nvae_lightning.cli import building


@pytest.mark.parametrize(("num", "end"), [(10, "w8, w9"), (1010, "w8, w9 and 1,000 more")])
def test_at_most_ten_weights_with_initial_values_are_listed(
    monkeypatch: pytest.MonkeyPatch, num: int, end: str
) -> None:
    names = [f"w{i}" for i in range(num)]
    monkeypatch.setattr(building, "initialize_from", lambda *args, **kwargs: names)
    config: Any = SimpleNamespace(init_from="run", init_strict=False)
    with pytest.warns(UserWarning, match=r"init_from: [\d,]+ weights") as warned:
        inspect.unwrap(building.initialize)(config, SimpleNamespace(model=None))
    assert str(warned[0].message).endswith(end)


@pytest.mark.parametrize("is_compiled", [True, False])
def test_the_wait_for_the_compiler_is_announced(
    monkeypatch: pytest.MonkeyPatch, is_compiled: bool
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(building, "rank_zero_info", messages.append)
    identity = {"_target_": "torch.nn.Identity"}
    config = {
        "module": {"_target_": "types.SimpleNamespace", "model": identity},
        "compute": {"_target_": "nvae_lightning.backends.Compute"},
        "compile": is_compiled,
    }
    inspect.unwrap(building.build_module)(OmegaConf.create(config))
    assert [message.partition(":")[0] for message in messages] == ["compile"] * is_compiled
