from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvae_lightning.inference.recalibration import (
    cached_recalibration,
    recalibrate,
    recalibrated,
    with_statistics,
)
from nvae_lightning.inference.sampling import (
    Settings,
    interpolate,
    prior,
    reconstruct,
    resample,
)
from nvae_lightning.model import NVAE
from nvae_lightning.model.normalization import BatchNorm

Draw = Callable[..., Settings]


@pytest.fixture
def settings(colour_nvae: NVAE) -> Draw:
    """Settings of a model in evaluation mode."""

    def build(num_samples: int = 4, **overrides: Any) -> Settings:
        arguments: dict[str, Any] = {"temperature": 1.0, "batch_size": 3, "load": _images}
        return Settings(colour_nvae.eval(), num_samples, **{**arguments, **overrides})

    return build


def _images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 8, 8), generator=generator).float() / 255


def _state(model: NVAE) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- batch normalisation ----------------------------------------------------------------------


def test_recalibration_does_not_change_the_model_or_random_numbers(nvae: NVAE) -> None:
    nvae.eval()
    before, flags = _state(nvae), [module.training for module in nvae.modules()]
    torch.manual_seed(2)
    expected = torch.rand(3)
    torch.manual_seed(2)
    statistics = recalibrate(nvae, 0.5, num_passes=3, batch_size=2)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in nvae.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in nvae.state_dict().items())
    with suppress(RuntimeError), with_statistics(nvae, statistics):
        assert any(not torch.equal(v, before[n]) for n, v in nvae.state_dict().items())
        raise RuntimeError
    assert all(torch.equal(value, before[name]) for name, value in nvae.state_dict().items())


def test_recalibration_gives_the_running_statistics_of_samples(nvae: NVAE) -> None:
    trained = copy.deepcopy(nvae).eval()
    for module in trained.decoder.modules():
        if isinstance(module, BatchNorm):
            module.train()
    torch.manual_seed(7)
    for _ in range(4):
        trained.sample(2, 0.6)
    statistics = recalibrate(nvae.eval(), 0.6, num_passes=4, batch_size=2, seed=7)
    decoder = trained.decoder.state_dict()
    assert len(statistics) == 3 * sum(isinstance(m, BatchNorm) for m in trained.decoder.modules())
    for name, value in statistics.items():
        assert torch.equal(value, decoder[name]), name


def test_a_recalibrated_model_shares_the_weights_of_an_unchanged_one(nvae: NVAE) -> None:
    before = _state(nvae.eval())
    other = recalibrated(nvae, 0.6, num_passes=3, batch_size=2)
    assert all(torch.equal(value, before[name]) for name, value in nvae.state_dict().items())
    for own, shared in zip(nvae.parameters(), other.parameters(), strict=True):
        assert own is shared
    statistics = recalibrate(nvae, 0.6, num_passes=3, batch_size=2)
    noise = [torch.randn(2, *shape) for shape in nvae.latent_shapes]
    with with_statistics(nvae, statistics):
        expected = nvae.sample(2, 0.6, noise).mean
    assert torch.equal(other.sample(2, 0.6, noise).mean, expected)


def test_recalibrated_samples_have_activations_of_mean_zero_and_variance_one(nvae: NVAE) -> None:
    nvae.eval()
    norm = next(m for m in reversed([*nvae.decoder.modules()]) if isinstance(m, BatchNorm))
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))

    def deviation() -> float:
        seen.clear()
        torch.manual_seed(0)
        nvae.sample(256, 0.3)
        var, mean = torch.var_mean(seen[0], (0, 2, 3))
        assert norm.running_mean is not None
        assert norm.running_var is not None
        gap = (mean - norm.running_mean).square() + (var / norm.running_var).log().square()
        return float(gap.mean())

    without = deviation()
    with with_statistics(nvae, recalibrate(nvae, 0.3, num_passes=150, batch_size=16)):
        assert deviation() < 0.05 * without


@pytest.mark.parametrize(
    "change", ["weights", "temperature", "passes", "precision", "damaged", "nothing"]
)
def test_statistics_are_measured_once_per_model_and_settings(
    colour_nvae: NVAE, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = colour_nvae.eval()
    arguments: dict[str, Any] = {"temperature": 0.5, "num_passes": 2, "batch_size": 2}
    first = cached_recalibration(model, tmp_path, "last", **arguments)
    (file,) = tmp_path.iterdir()
    assert file.name == "last.bn-t0.5.safetensors"
    calls = []
    sample = NVAE.sample
    monkeypatch.setattr(NVAE, "sample", lambda *a, **k: (calls.append(1), sample(*a, **k))[1])
    match change:
        case "weights":
            with torch.no_grad():
                model.decoder.initial_state.add_(1)
        case "temperature":
            arguments["temperature"] = [0.5, 0.6]
        case "passes":
            arguments["num_passes"] = 3
        case "damaged":
            file.write_bytes(file.read_bytes()[:100])
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "precision"):
        again = cached_recalibration(model, tmp_path, "last", **arguments)
    assert len(calls) == {"nothing": 0, "passes": 3}.get(change, 2)
    same = all(torch.equal(value, again[name]) for name, value in first.items())
    assert same == (change in ("nothing", "damaged"))
    names = sorted(path.name for path in tmp_path.iterdir())
    other = {"temperature": "-0.6", "precision": "-bfloat16"}.get(change)
    new = [] if other is None else [f"last.bn-t0.5{other}.safetensors"]
    assert names == [*new, "last.bn-t0.5.safetensors"]


@pytest.mark.parametrize("setting", ["num_passes", "batch_size"])
def test_recalibration_numbers_below_one_are_refused(nvae: NVAE, setting: str) -> None:
    arguments: dict[str, Any] = {"num_passes": 1, "batch_size": 1, setting: 0}
    with pytest.raises(
        ValueError, match=f"recalibration.{setting} must be an integer of at least 1, got 0"
    ):
        recalibrate(nvae, **arguments)


# --- pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [prior, reconstruct, interpolate, resample])
def test_the_batch_size_changes_only_the_random_numbers(draw: Any, settings: Draw) -> None:
    drawings = [draw(settings(batch_size=size, temperature=0.0)) for size in (1, 3, 64)]
    for drawing in drawings:
        assert len(drawing.images) % drawing.num_columns in (0, 4)
        if draw in (prior, resample):
            continue
        assert drawing.images.shape == drawings[0].images.shape
    if draw is prior:  # at temperature 0 all samples are equal
        torch.testing.assert_close(drawings[0].images, drawings[2].images)


def test_reconstructions_follow_their_images(settings: Draw) -> None:
    drawing = reconstruct(settings(5), num_pairs_per_row=2)
    assert drawing.num_columns == 4
    assert torch.equal(drawing.images[0::2], _images(5))
    assert (drawing.images[1::2] != drawing.images[0::2]).any()


def test_an_interpolation_begins_and_ends_with_reconstructions(
    settings: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(2)
    x = _images(4)
    monkeypatch.setattr(torch, "randn", lambda shape, **kind: torch.full(shape, 0.2, **kind))
    drawing = interpolate(given, num_steps=5)
    assert drawing.num_columns == 7
    rows = drawing.images.unflatten(0, (2, 7))
    assert torch.equal(rows[:, 0], x[0::2])
    assert torch.equal(rows[:, -1], x[1::2])
    with torch.no_grad():
        ends = given.model.decode(given.model.encode(x)).mean
    torch.testing.assert_close(rows[:, 1], ends[0::2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rows[:, 5], ends[1::2], rtol=1e-3, atol=1e-4)
    steps = (rows[:, 2:6] - rows[:, 1:5]).flatten(2).norm(dim=2)
    assert (steps > 0).all()


def test_rows_that_keep_all_groups_are_equal_and_rows_that_keep_none_differ(
    settings: Draw,
) -> None:
    given = settings(4)
    drawing = resample(given)
    rows = drawing.images.unflatten(0, (given.model.hierarchy.num_groups + 1, 5))
    assert torch.equal(rows[:, 0], _images(1).expand(len(rows), -1, -1, -1))
    spread = rows[:, 1:].var(1).flatten(1).mean(1)
    assert spread[-1] < 1e-10
    assert (spread[:-1] > 1e-8).all()
    few = resample(given, keep=[2]).images
    assert len(few) == 5


def test_temperature_zero_gives_one_image(settings: Draw) -> None:
    images = prior(settings(5, temperature=0.0)).images
    torch.testing.assert_close(images, images[:1].expand(5, -1, -1, -1))
    assert (prior(settings(5)).images.var(0) > 0).any()
    assert prior(settings(5)).num_columns == math.ceil(math.sqrt(5))


def test_only_samples_of_all_groups_use_the_statistics_of_samples(
    settings: Draw,
) -> None:
    model = settings().model
    other = recalibrate(model, 0.3, num_passes=20, batch_size=4)

    def drawn(draw: Any, *, recalibrated: bool, **arguments: Any) -> Tensor:
        torch.manual_seed(0)
        statistics = (lambda: other) if recalibrated else None
        return draw(settings(3, statistics=statistics), **arguments).images

    for draw, arguments, same in (
        (prior, {}, False),
        (resample, {"keep": [0]}, False),
        (resample, {"keep": [1, 3]}, True),
        (interpolate, {"num_steps": 3}, True),
        (reconstruct, {}, True),
    ):
        one = drawn(draw, recalibrated=True, **arguments)
        assert torch.equal(one, drawn(draw, recalibrated=False, **arguments)) == same


@pytest.mark.parametrize(
    ("draw", "arguments", "message"),
    [
        (prior, {"cuda_graphs": True}, "cuda_graphs: got true, but the model is on 'cpu'"),
        (resample, {"keep": [4]}, "mode.keep: got 4, but the model has 3 groups"),
        (resample, {"keep": [-1]}, "mode.keep: got -1"),
        (interpolate, {"num_steps": 1}, "mode.num_steps must be an integer of at least 2, got 1"),
        (
            reconstruct,
            {"num_pairs_per_row": 0},
            "mode.num_pairs_per_row must be an integer of at least 1",
        ),
    ],
)
def test_settings_of_pictures_are_checked(
    draw: Any, arguments: dict[str, Any], message: str, settings: Draw
) -> None:
    with pytest.raises(ValueError, match=message):
        draw(settings(), **arguments)


@pytest.mark.parametrize("setting", ["num_samples", "batch_size"])
def test_zero_images_are_refused(settings: Draw, setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be an integer of at least 1, got 0"):
        settings(**{setting: 0})
