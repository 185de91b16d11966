"""Training on two hosts with torchrun: equality with one rank, lost links and restarts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from torch import Tensor

from .hosts import NAMES, Host, two_hosts
from .training import (
    TORCHRUN_SCRIPT,
    TWO_RANKS,
    assert_same_weights,
    environment,
    train_on_one_rank,
    wait_for,
)

pytestmark = pytest.mark.cluster

Hosts = tuple[Host, Host]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts(tmp_path) as both:
        yield both


class Training:
    """The documented command on both hosts; the second one cannot write to the run's folder."""

    def __init__(self, hosts: Hosts, folder: Path, *overrides: str, max_restarts: int) -> None:
        run = folder / "run"
        run.mkdir()
        self.logs = [folder / f"{name}.log" for name in NAMES]
        self.stack = ExitStack()
        variables = {
            "NUM_NODES": "2", "NUM_DEVICES": "1", "FIRST": NAMES[0],
            "MAX_RESTARTS": str(max_restarts),
        }  # fmt: skip
        self.processes = [
            self.stack.enter_context(
                host.started(
                    str(TORCHRUN_SCRIPT), *TWO_RANKS, f"hydra.run.dir={run}", *overrides,
                    cwd=folder, env=environment(**variables), log=log, read_only=read_only,
                )
            )
            for host, log, read_only in zip(hosts, self.logs, ("", str(run)), strict=True)
        ]  # fmt: skip

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()
        for log in self.logs:  # shown if the test fails
            print(f"{log.name}:\n{log.read_text()}")

    def wait_for_step(self, folder: Path) -> None:
        """Wait until both ranks hold."""

        def holds() -> bool:
            assert [p.poll() for p in self.processes] == [None, None]
            return len(list(folder.glob("reached.*"))) == 2

        wait_for(holds, "both ranks")

    def wait(self) -> list[int | None]:
        """Wait for the end, and return the exit status of both hosts."""
        wait_for(lambda: None not in [p.poll() for p in self.processes], "both hosts")
        return [process.returncode for process in self.processes]


def test_two_hosts_equal_one_rank_and_one_writes(
    hosts: Hosts, one_rank: dict[str, Tensor], tmp_path: Path
) -> None:
    with Training(hosts, tmp_path, max_restarts=1) as training:
        assert training.wait() == [0, 0]
    assert_same_weights(tmp_path / "run", one_rank)


def test_torchrun_restarts_all_ranks_after_one_is_killed_during_a_slow_write(
    hosts: Hosts, one_rank: dict[str, Tensor], tmp_path: Path
) -> None:
    kill = ("+callbacks.by_image.kill_in=3", "+callbacks.by_image.seconds_per_write=2")
    with Training(hosts, tmp_path, *kill, max_restarts=1) as training:
        assert training.wait() == [0, 0]
        text = training.logs[0].read_text()
        assert "at step 2" in text or "at step 3" in text
    assert_same_weights(tmp_path / "run", one_rank)


def test_a_lost_link_ends_both_hosts_and_the_run_continues_on_one(
    hosts: Hosts, one_rank: dict[str, Tensor], tmp_path: Path
) -> None:
    minutes = 0.25
    with Training(
        hosts, tmp_path, "+callbacks.by_image.hold_before=4", f"trainer.timeout_minutes={minutes}",
        max_restarts=0,
    ) as training:  # fmt: skip
        training.wait_for_step(tmp_path)
        hosts[1].cut()
        (tmp_path / "go").touch()
        for log, other in zip(training.logs, (1, 0), strict=True):
            message = f"error: rank {other} has not answered for {minutes} minutes"
            wait_for(lambda m=message, p=log: m in p.read_text(), message, 60 * (minutes + 1))
            assert log.read_text().count(message) == 1
        # On the host without a link, torchrun itself waits longer for the other one.
        assert training.processes[0].wait(60) != 0
    train_on_one_rank(tmp_path / "run", "ckpt_path=last", "trainer.num_nodes=1")
    assert_same_weights(tmp_path / "run", one_rank)
