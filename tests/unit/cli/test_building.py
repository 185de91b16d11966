"""Modules and trainers of a config."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

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
