"""Rounds of several works in alternation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from nvae_lightning.benchmarking.memory_use import (
    Memory,
    allocated_bytes,
    peaks,
    release_memory,
    reset_peaks,
)
from nvae_lightning.benchmarking.work import Times, Work


@dataclass(frozen=True)
class Rounds:
    """Measurements of one work.

    Args:
        warmup_seconds: Duration of a short round before the others, which compiles and tunes.
        first_step_seconds: Duration of the first step, which does most of that work.
        times: Times of each round.
        memory: Peak over all rounds.
    """

    warmup_seconds: float
    first_step_seconds: float
    times: Sequence[Times]
    memory: Memory


def alternate(
    works: Sequence[Work], *, num_rounds: int, num_warmup_steps: int, num_steps: int
) -> list[Rounds]:
    """Run rounds of several works in turn, so that machine drift affects all alike.

    Args:
        works: Works to measure; all stay in memory.
        num_rounds: Number of rounds of each work.
        num_warmup_steps: Number of unmeasured steps at the start of each round.
        num_steps: Number of measured steps per round.
    """
    warmups: list[tuple[float, float]] = []
    for work in works:
        started = time.perf_counter()
        first_step = work.run(num_warmup_steps=num_warmup_steps, num_steps=1).first_step
        warmups.append((time.perf_counter() - started, first_step))
    times: list[list[Times]] = [[] for _ in works]
    memories: list[list[Memory]] = [[] for _ in works]
    with tqdm(total=num_rounds * len(works), desc="Rounds", leave=False, disable=None) as bar:
        for index in list(range(len(works))) * num_rounds:
            release_memory()
            reset_peaks(works[index].device)
            times[index].append(
                works[index].run(num_warmup_steps=num_warmup_steps, num_steps=num_steps)
            )
            memories[index].append(peaks(works[index]))
            bar.update()
    return [
        Rounds(*seconds, own_times, _peak(work, own_memories))
        for work, seconds, own_times, own_memories in zip(
            works, warmups, times, memories, strict=True
        )
    ]


def _peak(work: Work, memories: Sequence[Memory]) -> Memory:
    tensors = max(memory.tensors for memory in memories)
    if work.device.type == "cpu":  # counting slows steps down, so it comes after the rounds
        tensors = work.weight_bytes + allocated_bytes(work.trace())
    return Memory(tensors, memories[-1].kept, max(memory.resident for memory in memories))
