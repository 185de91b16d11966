import math

import pytest

from nvae_lightning.objective import (
    annealed_penalty_weight,
    constant,
    kl_warmup,
    warmup_cosine,
)


@pytest.mark.parametrize(
    ("step", "beta"),
    [
        (0, 1e-4),
        (1, 0.01633333333333333),
        (10, 0.16633333333333333),
        (30, 0.49966666666666665),
        (60, 0.9996666666666666),
        (61, 1.0),
        (199, 1.0),
    ],
)
def test_kl_weight_has_the_published_values(step: int, beta: float) -> None:
    assert kl_warmup(step, 200) == pytest.approx(beta, rel=1e-12)


def test_kl_weight_rises_monotonically_over_its_fraction_of_the_training() -> None:
    betas = [kl_warmup(s, 1000, fraction=0.5, constant_fraction=0.1) for s in range(1001)]
    assert betas == sorted(betas)
    assert betas[100] == 1e-4
    assert betas[350] == pytest.approx(0.5)
    assert betas[599] < 1.0
    assert betas[600] == 1.0


def test_kl_weight_starts_at_its_floor() -> None:
    assert kl_warmup(0, 1000, floor=0.25) == 0.25
    assert kl_warmup(0, 1000, floor=0.0) == 0.0


def test_constant_weight_does_not_change() -> None:
    assert {constant(step, 10) for step in range(11)} == {1.0}
    assert {constant(step, 10, value=0.3) for step in range(11)} == {0.3}


def _published(step: int) -> float:
    """20 epochs of 10 steps, 5 of them warm-up; the cosine changes once per epoch."""
    return warmup_cosine(
        step, peak=1e-2, final=1e-4, warmup_steps=50, total_steps=200, interval=10
    )


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (1, 0.0002),
        (25, 0.005),
        (49, 0.0098),
        (50, 0.0098),
        (59, 0.0098),
        (60, 0.009678400374081844),
        (69, 0.009678400374081844),
        (70, 0.009319699009326733),
        (100, 0.007054336134720158),
        (120, 0.00495),
        (150, 0.0019260744609851431),
        (189, 0.00022159962591815493),
        (190, 0.0001),
        (199, 0.0001),
    ],
)
def test_learning_rate_per_epoch_has_the_published_values(step: int, rate: float) -> None:
    assert _published(step) == pytest.approx(rate, rel=1e-12)


def test_textbook_cosine_per_epoch_starts_at_the_peak() -> None:
    textbook = [0.01, 0.009875893165300027, 0.009509795896116974, 0.008920065838216747]
    rates = [
        warmup_cosine(
            10 * epoch, peak=1e-2, final=1e-4, warmup_steps=0, total_steps=150, interval=10
        )
        for epoch in range(15)
    ]
    assert rates[:4] == pytest.approx(textbook, rel=1e-12)
    assert rates[7] == pytest.approx(0.00505)
    assert rates[14] == pytest.approx(1e-4)


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 30, 99])
def test_learning_rate_per_step_rises_then_falls_to_its_final_value(warmup_steps: int) -> None:
    rates = [
        warmup_cosine(step, peak=2e-2, final=1e-3, warmup_steps=warmup_steps, total_steps=300)
        for step in range(300)
    ]
    assert rates[: max(warmup_steps, 1)] == sorted(rates[: max(warmup_steps, 1)])
    assert rates[warmup_steps:] == sorted(rates[warmup_steps:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3)
    assert rates[-2] > 1e-3
    assert max(rates) <= 2e-2


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_warm_up_of_less_than_two_steps_is_none(warmup_steps: int) -> None:
    first = warmup_cosine(0, peak=1e-2, final=1e-4, warmup_steps=warmup_steps, total_steps=50)
    assert first == pytest.approx(1e-2)


def test_learning_rate_stays_at_its_final_value_after_the_last_step() -> None:
    rates = [
        warmup_cosine(step, peak=1e-2, final=1e-4, warmup_steps=5, total_steps=50)
        for step in (49, 50, 51, 500)
    ]
    assert rates == pytest.approx([1e-4] * 4)


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_learning_rate_of_the_shortest_trainings_is_in_range(total_steps: int) -> None:
    for step in range(total_steps + 1):
        rate = warmup_cosine(step, peak=1e-2, final=1e-4, warmup_steps=0, total_steps=total_steps)
        assert 1e-4 <= rate <= 1e-2


@pytest.mark.parametrize(
    ("step", "weight"),
    [
        (0, 0.9995395890030878),
        (1, 0.9275414646251862),
        (10, 0.46487194073008553),
        (30, 0.10015362355313422),
        (60, 0.01001536235531343),
        (61, 0.01),
        (199, 0.01),
    ],
)
def test_annealed_penalty_weight_has_the_published_values(step: int, weight: float) -> None:
    beta = kl_warmup(step, 200)
    assert annealed_penalty_weight(beta, initial=1.0, final=0.01) == pytest.approx(
        weight, rel=1e-12
    )


def test_logarithm_of_the_penalty_weight_is_linear_in_beta() -> None:
    weights = [annealed_penalty_weight(b, initial=2.0, final=0.02) for b in (0.0, 0.25, 0.5, 1.0)]
    assert [math.log10(w / 2) for w in weights] == pytest.approx([0.0, -0.5, -1.0, -2.0])


@pytest.mark.parametrize("beta", [1e-4, 0.5, 1.0])
def test_penalty_weight_without_annealing_is_final_throughout(beta: float) -> None:
    assert annealed_penalty_weight(beta, initial=None, final=0.1) == 0.1
    assert annealed_penalty_weight(beta, initial=None, final=0.0) == 0.0
