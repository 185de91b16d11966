import pytest

from nvae_lightning.objective import Penalty


@pytest.mark.parametrize(
    ("weight", "initial_weight", "setting"),
    [
        (-0.1, None, r"penalty\.weight"),
        (0.0, 1.0, r"penalty\.initial_weight"),
        (0.1, 0.0, r"penalty\.initial_weight"),
        (0.1, -1.0, r"penalty\.initial_weight"),
    ],
)
def test_penalty_weight_out_of_range_is_refused(
    weight: float, initial_weight: float | None, setting: str
) -> None:
    with pytest.raises(ValueError, match=setting):
        Penalty(weight=weight, initial_weight=initial_weight)


def test_zero_penalty_weight_is_accepted_without_annealing() -> None:
    assert Penalty(weight=0.0).weight == 0.0
    assert Penalty(weight=0.1, initial_weight=1.0).initial_weight == 1.0
