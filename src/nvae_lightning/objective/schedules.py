"""Schedules: pure functions of the step."""

from __future__ import annotations

import math


def kl_warmup(
    step: int,
    total_steps: int,
    *,
    fraction: float = 0.3,
    constant_fraction: float = 1e-4,
    floor: float = 1e-4,
) -> float:
    r"""Weight of the KL term: :math:`\beta = clip((s - cT) / (aT), floor, 1)`.

    Source: Vahdat & Kautz 2020, Sec. A.

    Args:
        step: Number s of optimiser steps taken.
        total_steps: Number T of steps of the training.
        fraction: Fraction a of the training over which the weight rises; 0 for no warm-up.
        constant_fraction: Fraction c of the training before the rise.
        floor: Smallest value.

    Raises:
        ValueError: If a number is outside [0, 1].

    >>> kl_warmup(0, 1000), kl_warmup(1000, 1000)
    (0.0001, 1.0)
    """
    for name, share in (
        ("fraction", fraction),
        ("constant_fraction", constant_fraction),
        ("floor", floor),
    ):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"kl.beta.{name} must be from 0 to 1, got {share}")
    rise = fraction * total_steps
    done = step - constant_fraction * total_steps
    return max(min(done / rise, 1.0), floor) if rise else 1.0


def constant(step: int, total_steps: int, *, value: float = 1.0) -> float:
    """Return one value at every step.

    Raises:
        ValueError: If the value is negative or not finite.
    """
    del step, total_steps
    if not 0.0 <= value < math.inf:
        raise ValueError(f"kl.beta.value must be at least 0 and finite, got {value}")
    return value


def warmup_cosine(
    step: int,
    *,
    peak: float,
    final: float,
    warmup_steps: int,
    total_steps: int,
    interval: int = 1,
) -> float:
    r"""Learning rate: linear warm-up, then a cosine decay to ``final``.

    Before step W it is :math:`peak \, s / W`. Then, with p the learning rate of the last warm-up
    step and n the number of intervals since,

    .. math::
        final + \tfrac12 (p - final) (1 + \cos(\pi n / (N - 1)))

    The published recipe has an ``interval`` of one epoch.

    Source: Vahdat & Kautz 2020, Sec. A.

    Args:
        step: Number s of optimiser steps taken.
        peak: Learning rate at the end of the warm-up.
        final: Learning rate of the last interval.
        warmup_steps: Number W of warm-up steps; 1 means none, because its rate would be 0.
        total_steps: Number of steps of the training.
        interval: Number of steps between changes of the cosine.
    """
    if warmup_steps < 2:
        warmup_steps = 0
    if step < warmup_steps:
        return peak * step / warmup_steps
    if warmup_steps:
        peak = peak * (warmup_steps - 1) / warmup_steps
    last = max((total_steps - warmup_steps) // interval - 1, 1)
    done = min((step - warmup_steps) // interval, last)
    return final + 0.5 * (peak - final) * (1.0 + math.cos(math.pi * done / last))


def annealed_penalty_weight(beta: float, *, initial: float | None, final: float) -> float:
    r"""Weight of the penalties: :math:`\log\lambda` is linear in β from initial to final.

    Source: Vahdat & Kautz 2020, Sec. A. ``initial=None`` means ``final`` throughout.
    """
    if initial is None:
        return final
    return math.exp((1.0 - beta) * math.log(initial) + beta * math.log(final))
