"""The trainer of all commands: strategy, devices, and ranks that stop."""

from __future__ import annotations

import threading
from typing import Any, Literal

import pytest
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from nvae_lightning.training.callbacks import Heartbeat
from nvae_lightning.training.callbacks.heartbeat import missing_ranks
from nvae_lightning.training.ranks import make_trainer

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork_find_unused_parameters_true"])
def test_strategies_that_fork_are_refused(strategy: str) -> None:
    with pytest.raises(ValueError, match=rf"trainer.strategy: got {strategy}, .*strategy=ddp"):
        make_trainer(timeout_minutes=1, strategy=strategy, **QUIET)


def test_a_rank_under_torchrun_has_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "RANK": "1",
        "LOCAL_RANK": "1", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)  # the trainer changes it
    trainer = make_trainer(timeout_minutes=40, accelerator="cpu", **QUIET)
    assert (trainer.world_size, trainer.global_rank) == (2, 1)
    assert trainer.strategy.root_device.type == "cpu"
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.strategy._timeout is not None
    assert (
        trainer.strategy._timeout.total_seconds() == 2 * 40 * 60
    )  # Lightning's default is 30 minutes
    assert any(isinstance(callback, Heartbeat) for callback in trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
    message = "trainer.devices: got 1 on .*torchrun has started 2 processes"
    with pytest.raises(ValueError, match=message):
        make_trainer(timeout_minutes=1, accelerator="cpu", devices=1, **QUIET)


def test_one_rank_has_no_heartbeat() -> None:
    trainer = make_trainer(timeout_minutes=1, accelerator="cpu", devices=1, **QUIET)
    assert not any(isinstance(callback, Heartbeat) for callback in trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_timeout_out_of_range_is_refused(value: int | float) -> None:
    with pytest.raises(ValueError, match=r"^trainer.timeout_minutes.*got"):
        make_trainer(timeout_minutes=value, accelerator="cpu", **QUIET)


def test_silent_ranks_are_missing() -> None:
    assert missing_ranks([0, 1, 4, 9], 5, own=0) == [3]
    assert missing_ranks([0, 6, 4, 9], 5, own=2) == [1, 3]
    assert missing_ranks([9, 9, 9, 9], 5, own=2) == [0]  # the store does not answer
    assert missing_ranks([4, 4, 4, 4], 5, own=2) == []


def test_silence_counts_until_a_rank_answers_or_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = Heartbeat(timeout_minutes=0.001)
    heartbeat._rank, heartbeat._num_ranks, heartbeat._silent = 0, 3, [0, 0, 0]
    ended = threading.Event()
    left: list[list[int]] = []

    def leave(missing: list[int]) -> None:
        left.append(missing)
        ended.set()

    monkeypatch.setattr(heartbeat, "_leave", leave)
    counts = iter(range(10**6))
    # Rank 1 has finished; rank 2 has stopped after 3 beats.
    monkeypatch.setattr(
        Heartbeat,
        "_seen",
        property(lambda _: [b"%d" % (n := next(counts)), b"done", b"%d" % min(n, 3)]),
        raising=False,
    )
    heartbeat._watch(ended)
    assert left == [[2]]
    assert heartbeat._silent[:2] == [0, 0]


@pytest.mark.parametrize("scope", ["all", "node"])
def test_nodes_share_no_batch_statistics_on_request(
    scope: Literal["all", "node"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)  # the trainer changes it
    trainer = make_trainer(
        timeout_minutes=1, sync_batchnorm_scope=scope, accelerator="cpu", devices=2, num_nodes=2,
        **QUIET,
    )  # fmt: skip
    names = [type(callback).__name__ for callback in trainer.callbacks]  # pyright: ignore[reportAttributeAccessIssue]
    assert ("_StatisticsPerNode" in names) == (scope == "node")
