"""Fréchet distance of samples to training images. As a script this file tests on two ranks."""

import importlib.util
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from nvae_lightning.data import ImageDataModule
from nvae_lightning.data.readers import ArraySource, Splits
from nvae_lightning.inference.evaluation import EvaluationModule
from nvae_lightning.model import (
    NVAE,
    DiscretizedLogisticMixtureLikelihood,
    Hierarchy,
    Image,
    RegularCell,
)
from nvae_lightning.training.callbacks import FrechetDistance
from nvae_lightning.utilities.image import Image as ImageFormat

CONFIG = Path(__file__).parents[4] / "conf" / "fid" / "inception.yaml"
NUM_IMAGES, NUM_SAMPLES, NUM_FEATURES = 50, 40, 5
NAME = "test/frechet_distance_Projection"


class Projection(nn.Module):
    """Fixed random linear features of the pixels; remembers the images it has seen."""

    projection: Tensor

    def __init__(self, size: int = 8, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(3 * size**2, NUM_FEATURES, generator=generator)
        self.register_buffer("projection", projection, persistent=False)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        assert not self.training
        self.seen.append(images.clone())
        return images.flatten(1).float() / 255 @ self.projection

    def images(self) -> Tensor:
        """All images except those for measuring the number of features."""
        return torch.cat(self.seen[1:])

    def real(self) -> Tensor:
        return self.images()[:-NUM_SAMPLES]

    def fake(self) -> Tensor:
        return self.images()[-NUM_SAMPLES:]


class Arrays(ImageDataModule):
    """Random images, determined by `seed`; `root` is not read."""

    array_seed = 0

    @cached_property
    def _sources(self) -> Splits:
        shape = (NUM_IMAGES, self.image.size, self.image.size, self.image.channels)
        rng = np.random.default_rng(self.array_seed)
        images = rng.integers(0, 256, shape, dtype=np.uint8)
        return Splits("arrays", {"train": ArraySource(images), "test": ArraySource(images[:4])})


def make_data(seed: int = 0, **overrides: Any) -> Arrays:
    settings: dict[str, Any] = {
        "batch_size": 4, "image": ImageFormat(3, 8, 8), "flip": True, "num_workers": 0,
        "validation_fraction": 0,
    }  # fmt: skip
    data = Arrays(**{**settings, **overrides})
    data.array_seed = seed
    return data


def run_test(
    model: NVAE, data: ImageDataModule, *callbacks: Callback, **overrides: Any
) -> dict[str, float]:
    """Test with the callbacks and return what was logged."""
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    trainer = Trainer(
        **{**settings, **overrides}, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.test(EvaluationModule(model, num_importance_samples=1), data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


Measure = Callable[..., dict[str, float]]


@pytest.fixture
def measure(tmp_path: Path, colour_nvae: NVAE) -> Measure:
    """Measure the distance with a feature extractor, by default on colour images."""

    def run(
        extractor: nn.Module,
        model: NVAE = colour_nvae,
        data: ImageDataModule | None = None,
        **settings: Any,
    ) -> dict[str, float]:
        settings = {"num_samples": NUM_SAMPLES, "batch_size": 16, **settings}
        fid = FrechetDistance(feature_extractor=extractor, cache=tmp_path / "cache", **settings)
        return run_test(model, make_data() if data is None else data, fid)

    return run


def features(images: Tensor, projection: Tensor) -> np.ndarray:
    return (images.flatten(1).double() / 255 @ projection.double()).numpy()


def closed_form(first: np.ndarray, second: np.ndarray) -> float:
    """Return the distance of two Gaussians, computed with symmetric square roots."""
    values, vectors = np.linalg.eigh(np.cov(first.T))
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    inner = np.linalg.eigvalsh(root @ np.cov(second.T) @ root).clip(0)
    shift = first.mean(0) - second.mean(0)
    traces = np.trace(np.cov(first.T)) + np.trace(np.cov(second.T))
    return float(shift @ shift + traces - 2 * np.sqrt(inner).sum())


def test_distance_is_between_the_gaussians_of_training_images_and_samples(
    measure: Measure,
) -> None:
    network, data = Projection(), make_data()
    metrics = measure(network, data=data)
    images = torch.from_numpy(data.train_set.images).permute(0, 3, 1, 2)
    assert torch.equal(network.real(), images)  # not flipped
    real, fake = (features(x, network.projection) for x in (images, network.fake()))
    assert metrics[NAME] == pytest.approx(closed_form(real, fake), rel=1e-5)


def test_the_distance_of_another_network_is_never_called_fid(measure: Measure) -> None:
    metrics = measure(Projection())
    assert [name for name in metrics if "fid" in name.lower()] == []
    assert NAME in metrics


def test_samples_are_the_means_of_the_likelihood_rounded_to_eight_bits(
    measure: Measure, colour_nvae: NVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, means = Projection(), []
    sample = colour_nvae.sample

    def remember(*args: Any) -> Any:
        likelihood = sample(*args)
        means.append(likelihood.mean)
        return likelihood

    monkeypatch.setattr(colour_nvae, "sample", remember)
    measure(network)
    assert [len(mean) for mean in means] == [16, 16, 8]
    torch.testing.assert_close(network.fake() / 255, torch.cat(means), rtol=0, atol=0.5 / 254)


def test_statistics_of_training_images_are_cached(measure: Measure) -> None:
    networks = [Projection(), Projection()]
    first, second = (measure(network) for network in networks)
    assert [len(network.images()) - NUM_SAMPLES for network in networks] == [NUM_IMAGES, 0]
    assert first[NAME] == second[NAME]


@pytest.mark.parametrize(
    ("network", "data"),
    [
        (Projection(seed=1), {}),
        (nn.Sequential(Projection()), {}),
        (Projection(), {"seed": 1}),
        (Projection(), {"image": ImageFormat(3, 8, 4)}),
        (Projection(), {"image": ImageFormat(3, 8, 1)}),
    ],
)
def test_other_images_or_another_network_have_their_own_cache(
    measure: Measure, network: nn.Module, data: dict[str, Any], tmp_path: Path
) -> None:
    measure(Projection())
    measure(network, data=make_data(**data))
    projection = network[0] if isinstance(network, nn.Sequential) else network
    assert isinstance(projection, Projection)
    assert len(projection.images()) == NUM_IMAGES + NUM_SAMPLES
    files = sorted((tmp_path / "cache").iterdir())
    assert [len(path.name) for path in files] == [64 + len(".safetensors")] * 2


@pytest.mark.parametrize("length", [-8, 0])
def test_a_damaged_cache_is_replaced(measure: Measure, tmp_path: Path, length: int) -> None:
    before = measure(Projection())
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:length])
    network = Projection()
    after = measure(network)
    assert len(network.images()) == NUM_IMAGES + NUM_SAMPLES
    assert after[NAME] == before[NAME]
    assert file.read_bytes() == whole


def test_an_unwritable_cache_is_a_warning(measure: Measure, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match=r"cache/.*\.safetensors' is not writable"):
        metrics = measure(Projection())
    assert metrics[NAME] > 0


def _num_different(images: Tensor) -> int:
    return len(images.flatten(1).unique(dim=0))


def test_temperature_applies_to_the_samples(measure: Measure) -> None:
    networks = {t: Projection() for t in (0, 0.5, 1.0)}
    distances = {t: measure(n, temperature=t)[NAME] for t, n in networks.items()}
    assert _num_different(networks[0].fake()) == 1
    assert _num_different(networks[1.0].fake()) > 1
    assert not torch.equal(networks[0.5].fake(), networks[1.0].fake())
    assert len(set(distances.values())) == 3


def test_each_scale_may_have_its_temperature(measure: Measure) -> None:
    temperatures = [1.0, [1.0, 1.0], [0, 1.0], [1.0, 0], (0, 0)]
    networks = [Projection() for _ in temperatures]
    for network, temperature in zip(networks, temperatures, strict=True):
        measure(network, temperature=temperature)
    one, ones, fine, coarse, none = (network.fake() for network in networks)
    assert torch.equal(one, ones)
    assert _num_different(none) == 1
    assert not torch.equal(fine, ones)
    assert not torch.equal(coarse, ones)
    assert not torch.equal(coarse, fine)


def test_seed_determines_the_samples(measure: Measure) -> None:
    networks = [Projection() for _ in range(3)]
    for network, seed in zip(networks, (1, 1, 2), strict=True):
        measure(network, seed=seed)
    first, again, other = (network.fake() for network in networks)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_grey_binary_images_become_three_equal_colours(
    measure: Measure, grey_nvae: NVAE, tmp_path: Path
) -> None:
    networks = [Projection(6), Projection(6)]
    distances = []
    for network in networks:
        distances.append(measure(network, grey_nvae, make_data(image=ImageFormat(1, 6, 1)))[NAME])
        (file,) = (tmp_path / "cache").iterdir()
        file.unlink()
    first, second = (network.real() for network in networks)
    assert torch.equal(first, second)  # random, but always the same
    assert first.unique().tolist() == [0, 255]
    for images in (first, networks[0].fake()):
        assert torch.equal(images, images[:, :1].expand_as(images))
    assert distances[0] == distances[1]


class State(Callback):
    """Record the state that a callback must not change."""

    def __init__(self) -> None:
        self.random: Tensor | None = None
        self.training: list[bool] = []

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.random = torch.get_rng_state()
        self.training = [module.training for module in pl_module.model.modules()]  # pyright: ignore


def test_random_numbers_and_model_are_unchanged(tmp_path: Path, colour_nvae: NVAE) -> None:
    before, after = State(), State()
    weights = {name: value.clone() for name, value in colour_nvae.state_dict().items()}
    fid = FrechetDistance(feature_extractor=Projection(), num_samples=4, cache=tmp_path)
    run_test(colour_nvae, make_data(), before, fid, after)
    assert before.random is not None
    assert after.random is not None
    assert torch.equal(before.random, after.random)
    assert before.training == after.training
    torch.testing.assert_close(dict(colour_nvae.state_dict()), weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"fid\.weights: got None.*inception-2015-12-05-6726825d.*fid\.feature_extractor"),
        ({"weights": "nowhere.pth"}, r"fid\.weights: '.*nowhere\.pth' is not a file; set fid"),
        (
            {"weights": "x", "feature_extractor": nn.Identity()},
            r"fid\.weights: got x.*one of the two",
        ),
        ({"num_samples": 1}, r"fid\.num_samples must be .* at least 2, got 1"),
        ({"num_samples": True}, r"fid\.num_samples must be an integer.*got True"),
        ({"batch_size": 0}, r"fid\.batch_size must be .* at least 1, got 0"),
        ({"seed": -1}, r"fid\.seed must be .* at least 0, got -1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    if "weights" not in settings and settings:
        settings = {"feature_extractor": nn.Identity(), **settings}
    with pytest.raises(ValueError, match=message):
        FrechetDistance(**cast(Any, settings))


def test_missing_torch_fidelity_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights.pth"
    weights.touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install \"nvae-lightning\[fid\]\""):
        FrechetDistance(weights=weights)


class Maps(nn.Module):
    """Network that returns feature maps instead of features."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float()


@pytest.mark.parametrize(
    ("network", "settings", "message"),
    [
        (Projection(), {"temperature": [1.0]}, r"fid\.temperature .* each of 2 scales, got 1"),
        (Projection(), {"temperature": -0.5}, r"fid\.temperature must be finite and not negative"),
        (Maps(), {}, r"fid\.feature_extractor must map .* \(2, 3, 8, 8\) .* got \(2, 3, 8, 8\)"),
    ],
)
def test_settings_that_do_not_fit_the_model_fail_before_the_test(
    measure: Measure, colour_nvae: NVAE, monkeypatch: pytest.MonkeyPatch,
    network: nn.Module, settings: dict[str, Any], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(colour_nvae, "forward", lambda *args: pytest.fail("the test has begun"))
    with pytest.raises(ValueError, match=message):
        measure(network, **settings)


def test_samples_that_are_not_finite_are_an_error(
    measure: Measure, colour_nvae: NVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Projection()
    sample = colour_nvae.sample

    def broken(*args: Any) -> Any:
        likelihood = sample(*args)
        likelihood.logits.fill_(torch.nan)
        return likelihood

    monkeypatch.setattr(colour_nvae, "sample", broken)
    with pytest.raises(ValueError, match=r"fid: samples at fid\.temperature=1\.0 are not finite"):
        measure(network)


def test_config_has_the_defaults_of_the_class() -> None:
    settings = yaml.safe_load(CONFIG.read_text())
    assert settings.pop("_target_") == "nvae_lightning.training.callbacks.FrechetDistance"
    parameters = inspect.signature(FrechetDistance).parameters.values()
    assert settings == {parameter.name: parameter.default for parameter in parameters}


def _forbid_downloads(*args: object, **kwargs: object) -> None:
    pytest.fail("weights are about to be downloaded")


@pytest.fixture
def _no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    monkeypatch.setattr(name, _forbid_downloads)


@pytest.mark.usefixtures("_no_downloads")
def test_inception_network_of_a_file_gives_the_fid(
    tmp_path: Path, colour_nvae: NVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    weights = tmp_path / "weights.pth"
    with monkeypatch.context() as patch:  # a network with random weights
        name = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
        patch.setattr(name, lambda *args, **kwargs: {})
        patch.setattr(Network, "load_state_dict", lambda self, state: None)
        torch.save(Network("inception-v3-compat", ["2048"]).state_dict(), weights)

    monkeypatch.setattr(sys.modules[__name__], "NUM_IMAGES", 4)
    fid = FrechetDistance(weights=weights, num_samples=2, cache=tmp_path / "cache")
    with pytest.warns(UserWarning, match=r"is not the published weights-inception"):
        metrics = run_test(colour_nvae, make_data(), fid)
    assert metrics["test/fid"] > 0


@pytest.mark.usefixtures("_no_downloads")
@pytest.mark.parametrize("content", ["damaged", "code", "other weights"])
def test_files_that_are_not_the_inception_network_are_refused(
    tmp_path: Path, colour_nvae: NVAE, content: str
) -> None:
    weights = tmp_path / "weights.pth"
    if content == "damaged":
        weights.write_bytes(b"PK")
    else:
        torch.save(partial(print, "run") if content == "code" else {"x": torch.ones(1)}, weights)
    fid = FrechetDistance(weights=weights, num_samples=2, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"fid\.weights: '.*' does not hold the weights"):
        run_test(colour_nvae, make_data(), fid)


# On ranks -----------------------------------------------------------------------------------


class Recorder(FrechetDistance):
    """Record the counts of each rank and of all ranks."""

    folder: Path

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_epoch_end(trainer, pl_module)
        metric = self._metric
        assert metric is not None
        apart = [int(metric.real_features_num_samples), int(metric.fake_features_num_samples)]
        features = metric.fake_features_sum.tolist()
        with metric.sync_context():
            together = [
                int(metric.real_features_num_samples), int(metric.fake_features_num_samples)
            ]  # fmt: skip
        record = {
            "apart": apart,
            "together": together,
            "features": features,
            "distance": float(trainer.callback_metrics[self.name]),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(record))


def main(folder: Path, num_ranks: int, temperature: float, cache: Path) -> None:
    """Test a model on some ranks."""
    torch.manual_seed(0)
    model = NVAE(
        Image(channels=3, size=8, bits=8),
        Hierarchy.doubling(channels=4, num_groups=[1, 1], downsample=2, latent_channels=2),
        encoder_cell=RegularCell, decoder_cell=RegularCell,
        preprocess_cell=RegularCell, postprocess_cell=RegularCell,
        likelihood=partial(DiscretizedLogisticMixtureLikelihood, num_mixtures=2),
        num_preprocess_cells=1, num_postprocess_cells=1,
    )  # fmt: skip
    callback = Recorder(
        feature_extractor=Projection(), num_samples=NUM_SAMPLES + 1, batch_size=8,
        temperature=temperature, cache=cache,
    )  # fmt: skip
    callback.folder = folder
    strategy = "ddp_fork" if num_ranks > 1 else "auto"
    run_test(model, make_data(), callback, devices=num_ranks, strategy=strategy)


@pytest.fixture(scope="module")
def ranks(written_by_this_file: Path) -> Path:
    """Folder of the records of all ranks, which run in a separate process."""
    return written_by_this_file


def _records(folder: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


@pytest.mark.slow
def test_two_ranks_count_every_image_once_and_find_the_same_distance_as_one(ranks: Path) -> None:
    (alone,) = _records(ranks / "alone")
    computed, cached = _records(ranks / "computed"), _records(ranks / "cached")
    for rank in (alone, *computed, *cached):
        assert rank["together"] == [NUM_IMAGES, NUM_SAMPLES + 1]
        assert rank["distance"] == pytest.approx(alone["distance"], rel=1e-6)
    assert [rank["apart"] for rank in computed] == [[26, 21], [24, 20]]
    assert [rank["apart"] for rank in cached] == [[NUM_IMAGES, 21], [0, 20]]


@pytest.mark.slow
def test_ranks_draw_different_samples(ranks: Path) -> None:
    first, second = _records(ranks / "warm")
    means = [np.array(rank["features"]) / rank["apart"][1] for rank in (first, second)]
    assert not np.allclose(*means)
    assert first["distance"] == second["distance"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    place = Path(sys.argv[1])
    for name, num_ranks, temperature, cache in (
        ("computed", 2, 0.0, "shared"),  # all samples are equal
        ("cached", 2, 0.0, "shared"),
        ("warm", 2, 1.0, "shared"),
        ("alone", 1, 0.0, "own"),
    ):
        main(place / name, num_ranks, temperature, place / "caches" / cache)
