"""Rounds of several works in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from nvae_lightning.benchmarking.memory_use import (
    Memory,
    allocated_bytes,
    peaks,
    profile_steps,
    release_memory,
    restart_peaks,
)
from nvae_lightning.benchmarking.work import Times, Work


@dataclass(frozen=True)
class Rounds:
    """What was measured of one work.

    Args:
        warmup_seconds: of a short round before them, in which all is compiled and tuned.
        first_step_seconds: of its first step, where most of that is done.
        times: of each round.
        memory: the most of all rounds.
    """

    warmup_seconds: float
    first_step_seconds: float
    times: Sequence[Times]
    memory: Memory


def alternate(
    works: Sequence[Work], *, num_rounds: int, num_warmup_steps: int, num_steps: int
) -> list[Rounds]:
    """Run rounds of works in turn, so that a machine that changes does so for all of them.

    Args:
        works: what is measured; all stay in memory.
        num_rounds: of each.
        num_warmup_steps: at the beginning of each round, not measured.
        num_steps: of each round, measured.
    """
    warmups = [_warm_up(work, num_warmup_steps) for work in works]
    times: list[list[Times]] = [[] for _ in works]
    memories: list[list[Memory]] = [[] for _ in works]
    with tqdm(total=num_rounds * len(works), desc="Rounds", leave=False, disable=None) as bar:
        for index in list(range(len(works))) * num_rounds:
            release_memory()
            restart_peaks(works[index].device)
            times[index].append(
                works[index].run(num_warmup_steps=num_warmup_steps, num_steps=num_steps)
            )
            memories[index].append(peaks(works[index]))
            bar.update()
    return [
        Rounds(*seconds, own_times, _most(work, own_memories))
        for work, seconds, own_times, own_memories in zip(
            works, warmups, times, memories, strict=True
        )
    ]


def _warm_up(work: Work, num_warmup_steps: int) -> tuple[float, float]:
    """Return seconds of it all, and of its first step."""
    started = time.perf_counter()
    times = work.run(num_warmup_steps=num_warmup_steps, num_steps=1)
    return time.perf_counter() - started, times.first_step


def _most(work: Work, memories: Sequence[Memory]) -> Memory:
    tensors = max(memory.tensors for memory in memories)
    if work.device.type == "cpu":  # where following tensors takes time
        tensors = work.weight_bytes + allocated_bytes(profile_steps(work))
    return Memory(tensors, memories[-1].kept, max(memory.resident for memory in memories))
