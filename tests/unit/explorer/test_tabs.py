"""What the tabs of the page compute, without a browser or a server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from gradio.data_classes import ImageData
from omegaconf import OmegaConf
from PIL import Image

from nvae_lightning import explore
from nvae_lightning.cli.runs import find_runs, load_run
from nvae_lightning.data import MNIST
from nvae_lightning.data.dataset import ImageDataset
from nvae_lightning.explorer import between, fill_in, groups, likelihood, plots, sample, training
from nvae_lightning.explorer.page import build_page
from nvae_lightning.explorer.training import Runs
from nvae_lightning.explorer.widgets import answer
from nvae_lightning.explorer.workspace import Workspace, generator
from nvae_lightning.inference.latents import draw_noise
from nvae_lightning.inference.recalibration import recalibrated
from nvae_lightning.model import NVAE
from nvae_lightning.reporting import Run
from nvae_lightning.utilities.images import as_pixels


@pytest.fixture
def workspace(colour_nvae: NVAE) -> Workspace:
    """A tiny model and six test images."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    return Workspace(colour_nvae, ImageDataset(pixels), num_passes=2)


@pytest.fixture
def file(workspace: Workspace, tmp_path: Path) -> str:
    """A test image as a file."""
    Image.fromarray(workspace.test_picture(2)).save(tmp_path / "2.png")
    return str(tmp_path / "2.png")


def test_a_test_image_is_read_as_the_models_input(workspace: Workspace, file: str) -> None:
    assert workspace.test_set is not None
    expected = workspace.test_set.__getitems__([2]).float() / 255
    assert torch.equal(workspace.read(file, generator(0)), expected)


def test_binary_images_depend_on_the_seed(grey_nvae: NVAE, tmp_path: Path) -> None:
    workspace = Workspace(grey_nvae)
    Image.new("L", (6, 6), 128).save(tmp_path / "grey.png")
    x, again, other = (workspace.read(str(tmp_path / "grey.png"), generator(s)) for s in (1, 1, 2))
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert set(x.unique().tolist()) == {0.0, 1.0}


def test_samples_are_those_of_the_model_for_the_same_noise(workspace: Workspace) -> None:
    model = workspace.model
    noise = draw_noise(model, 3, generator(4))
    expected = model.sample(3, [0.5, 0.7], noise).mean
    assert torch.equal(sample.draw(workspace, [0.5, 0.7], 3, 4), expected)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = recalibrated(model, [0.5, 0.7], num_passes=2)
    expected = other.sample(3, [0.5, 0.7], noise).mean
    shown: list[range] = []

    def progress(steps: range) -> range:
        shown.append(steps)
        return steps

    for _ in range(2):  # the second time from the cache
        assert torch.equal(sample.draw(workspace, [0.5, 0.7], 3, 4, True, progress), expected)
    assert shown == [range(2)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_downloads_lie_in_one_folder_that_is_deleted_at_the_end() -> None:
    images = torch.rand(2, 3, 4, 4)
    files = [Path(sample.write_npz(images)) for _ in range(2)]
    assert files[0] != files[1]
    for file in files:
        assert file.name == "samples.npz"
        assert (np.load(file)["images"] == as_pixels(images).numpy()).all()
    sample.downloads().cleanup()
    sample.downloads.cache_clear()
    assert not any(file.exists() for file in files)


def test_requests_beyond_the_memory_budget_are_refused(workspace: Workspace) -> None:
    small = Workspace(workspace.model, memory_budget=workspace.memory_budget // 2**14)
    most = small.most_images
    assert 1 < most < 1_000
    assert len(sample.draw(small, [1.0, 1.0], most, 0)) == most
    with pytest.raises(ValueError, match=rf"must be from 1 to {most}, which fit into memory_budg"):
        sample.draw(small, [1.0, 1.0], most + 1, 0)


@torch.no_grad()
def test_kept_groups_give_the_reconstruction_and_redrawn_ones_differ(
    workspace: Workspace, file: str
) -> None:
    pair, images, rates = groups.explain(workspace, file, [0, 1, 2], 1.0, 0)
    torch.testing.assert_close(images, pair[1:].expand_as(images), rtol=1e-3, atol=1e-4)
    assert len(rates) == 3
    _, redrawn, _ = groups.explain(workspace, file, [0, 2], 1.0, 0)
    assert bool((redrawn.std(0) > 0).any())


@torch.no_grad()
def test_an_image_between_equal_images_is_its_reconstruction(
    workspace: Workspace, file: str
) -> None:
    pair, _, _ = groups.explain(workspace, file, [], 1.0, 3)
    image, row = between.interpolate(workspace, file, file, 0.4, [0, 1], 3)
    torch.testing.assert_close(image, pair[1:], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(row, pair[1:].expand_as(row), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_scores_agree_with_the_place_among_test_images(workspace: Workspace, file: str) -> None:
    scores = likelihood.score(workspace, file, 0)
    assert np.isfinite([scores.log_likelihood, scores.bpd, *scores.ratios.values()]).all()
    x = workspace.read(file, generator(0))
    assert float(workspace.log_likelihood(x, 0)) == pytest.approx(scores.log_likelihood)
    found = likelihood.place(workspace, file, 0)
    assert found is not None
    assert "of 6 test images" in found[0]
    assert likelihood.place(Workspace(workspace.model), file, 0) is None


def test_painted_pixels_are_missing_if_a_quarter_is_covered() -> None:
    painted = np.zeros((80, 80))
    painted[:20] = 1.0
    painted[20:23] = 1.0  # 3 of 10 rows of the third pixel
    painted[40, 40] = 1.0
    known = fill_in.known_pixels(painted, 8)
    assert torch.equal(known, (torch.arange(8) > 2)[:, None].expand(8, 8))
    for nothing in (None, np.zeros((80, 80))):
        with pytest.raises(ValueError, match="nothing is painted"):
            fill_in.known_pixels(nothing, 8)


def test_layers_of_the_editor_are_combined(tmp_path: Path) -> None:
    paths = []
    for name, box in (("a", (0, 0, 2, 4)), ("b", (2, 0, 4, 4))):
        layer = Image.new("RGBA", (4, 4))
        layer.paste((255, 0, 0, 255), box)
        layer.save(tmp_path / f"{name}.png")
        paths.append(SimpleNamespace(path=str(tmp_path / f"{name}.png")))
    canvas = gr.ImageEditor()
    found = fill_in.opacities(canvas, SimpleNamespace(id=None, layers=paths))
    assert found is not None
    assert (found == 1.0).all()
    blobs = SimpleNamespace(layers=[Path(paths[0].path).read_bytes(), None])
    storage: dict[str, Any] = {str(number): blobs for number in range(70)}
    canvas.blob_storage = storage
    found = fill_in.opacities(canvas, SimpleNamespace(id="69", layers=[]))
    assert found is not None
    assert found.mean() == 0.5
    assert len(canvas.blob_storage) == 64
    assert fill_in.opacities(canvas, None) is None


@torch.no_grad()
def test_known_pixels_are_kept(workspace: Workspace, file: str) -> None:
    known = torch.ones(8, 8, dtype=torch.bool)
    known[4:] = False
    x, restored = fill_in.complete(workspace, file, known, 2, 1.0, 0)
    assert torch.equal(restored.images[:, :, :4], x[:, :, :4].expand(4, -1, -1, -1))
    with pytest.raises(ValueError, match="rounds: got 201"):
        fill_in.complete(workspace, file, known, 201, 1.0, 0)


def _write(folder: Path, name: str) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed: 0\nkl:\n  beta: {name}\nrun_dir: {folder}\n")
    (folder / "metrics.csv").write_text(
        "step,train/elbo,val/elbo,train/kl_group/00,train/kl_group/01\n"
        "0,-500,,5.0,0.0\n1,-120.5,-130,4.0,1e-3\n2,-1"
    )
    Image.new("RGB", (20, 10 + len(name))).save(folder / "samples.png")


def test_runs_are_compared_while_they_write(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    _write(root / "a", "one")
    _write(root / "b", "three")
    _write(tmp_path / "outside", "secret")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "b" / "samples.png").unlink()
    (root / "b" / "samples.png").symlink_to(tmp_path / "outside" / "samples.png")
    runs = Runs(root, lambda path: [*find_runs(path)], load_run)
    assert [*runs.paths()] == ["runs/a", "runs/b"]
    text, table, curves, maps, pictures = training.compare(runs, ["runs/a", "runs/b", "runs/c"])
    assert "runs/a: 2 steps, training" in text
    assert table.splitlines()[2:] == ["| `kl.beta` | one | three |"]
    assert curves is not None
    assert maps is not None
    assert maps.shape[0] > curves.shape[0]
    assert pictures is not None
    assert pictures.shape == (13, 28, 3)  # of the first run only
    before = runs.stamps()
    assert runs.stamps() == before
    (root / "a" / "metrics.csv").write_text("step\n0\n")
    assert runs.stamps() != before
    assert training.compare(runs, [])[1:] == ("", None, None, None)


def test_bounds_of_a_run_are_its_logged_values() -> None:
    rows = [{"step": 0.0, "train/elbo": -5.0}, {"step": 3.0, "val/elbo": -4.0}]
    found = training.bounds(Run("one", {}, rows))
    assert found == {"train": ([0.0], [-5.0]), "val": ([3.0], [-4.0])}
    assert plots.curves({"one": found}, "bound").ndim == 3


def in_event_loop(build: Callable[[], Any]) -> Any:
    """Build a page in an event loop; otherwise gradio leaves one open."""

    async def built() -> Any:
        return build()

    return asyncio.run(built())


def test_values_that_clients_send_are_checked() -> None:
    count, scale = gr.Slider(1, 8, 4, step=1, label="Count"), gr.Slider(0.0, 1.5, 1.0, label="T")
    seed, image = gr.Number(0, minimum=0, maximum=9, label="Seed"), gr.Image()
    choice = gr.Radio([1], label="Choice")
    inputs = {"count": count, "scale": scale, "seed": seed, "image": image, "choice": choice}

    def build() -> None:
        with gr.Blocks():
            for _ in range(2):  # as inputs of two functions
                event = gr.Button().click
                answer([event], lambda *values: values, [*inputs.values()], [gr.State()])

    in_event_loop(build)
    assert count.preprocess(2.6) == 3
    assert scale.preprocess(1) == 1.0
    assert image.preprocess(ImageData(path="a/text.png")) == "a/text.png"
    assert image.preprocess(None) is None
    wrong = {
        "count": (0, 1e9, math.nan, None, "4"),
        "scale": (-0.1, math.inf, math.nan, [1]),
        "seed": (-1, 1e30, math.nan, None),
        "choice": (2, "..", [1]),
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(gr.Error) as found:
                inputs[name].preprocess(value)
            message = str(found.value.message)
            assert message.startswith(f"{inputs[name].label}: got ")
            assert "\n" not in message


def test_damaged_paintings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    for size in (4, 5):
        Image.new("RGBA", (size, size)).save(tmp_path / f"{size}.png")
    for names in (["text.png"], ["4.png", "5.png"], ["none.png"]):
        layers = [SimpleNamespace(path=str(tmp_path / name)) for name in names]
        with pytest.raises(ValueError, match="mask: the painted layers"):
            fill_in.opacities(gr.ImageEditor(), SimpleNamespace(id=None, layers=layers))


def test_a_budget_below_eight_images_is_refused(workspace: Workspace) -> None:
    with pytest.raises(ValueError, match=r"memory_budget: got 1 bytes.* 8 images, and 0 fit"):
        build_page(Workspace(workspace.model, memory_budget=1))


def test_a_single_test_image_is_shown_without_a_choice(workspace: Workspace) -> None:
    one = Workspace(workspace.model, ImageDataset(np.zeros((1, 8, 8, 3), np.uint8)))
    page = in_event_loop(lambda: build_page(one))
    labels = [getattr(block, "label", None) for block in page.blocks.values()]
    assert "Image" in labels
    assert "Image: test image" not in labels
    assert not page.api_open  # requests that passed the queue would compute at the same time


@pytest.mark.parametrize("name", [None, "mnist"])
def test_only_a_named_dataset_is_downloaded(
    colour_nvae: NVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    asked: list[Path] = []
    choices = SimpleNamespace(runtime=SimpleNamespace(choices={"dataset": name}))
    monkeypatch.setattr(explore.HydraConfig, "get", lambda: choices)
    monkeypatch.setattr(explore, "training_data", lambda *_: MNIST(str(tmp_path)))
    monkeypatch.setattr(MNIST, "fetch", lambda _, root: asked.append(root))
    if name is None:
        assert explore.load_test_set(OmegaConf.create(), colour_nvae) is None
    else:
        with pytest.raises(ValueError, match=r"dataset\.root"):
            explore.load_test_set(OmegaConf.create(), colour_nvae)
    assert asked == ([] if name is None else [tmp_path])
