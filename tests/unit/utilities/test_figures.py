"""Figures show the numbers they are given."""

import math

import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from nvae_lightning.utilities import figures


def _meshes(figure: Figure) -> list[QuadMesh]:
    found = [collection for axes in figure.axes[:3] for collection in axes.collections]
    return [collection for collection in found if isinstance(collection, QuadMesh)]


def _values(mesh: QuadMesh) -> np.ma.MaskedArray:
    values = mesh.get_array()
    assert isinstance(values, np.ma.MaskedArray)
    return values


def test_heat_maps_show_groups_over_steps_coarsest_on_top() -> None:
    rates = [[1.0, 20.0, 3.0], [2.0, 0.5, 300.0]]
    balance = [[0.5, 1.0, 1.5], [1.0, 1.0, 1.0]]
    active = [[0.0, 4.0, 8.0], [1.0, 2.0, 3.0]]
    figure = figures.heat_maps_per_group(
        [50, 100], rates, balance, active, scale_of_group=[0, 0, 1], latent_channels=8
    )
    meshes = _meshes(figure)
    for mesh, values in zip(meshes, (rates, balance, active), strict=True):
        assert np.asarray(_values(mesh)) == pytest.approx(np.array(values).T)
    for axes in figure.axes[:3]:
        assert axes.get_ylim() == (2.5, -0.5)
        assert axes.get_xlim() == (0.0, 100.0)
        (line,) = axes.lines  # between two scales
        assert set(np.asarray(line.get_ydata())) == {1.5}
    assert isinstance(meshes[0].norm, LogNorm)
    assert meshes[0].get_clim() == pytest.approx((0.01, 300.0))
    assert meshes[1].get_clim() == (0.0, 1.5)
    assert meshes[2].get_clim() == (0, 8)
    assert [axes.get_ylabel() for axes in figure.axes[3:]] == [
        "KL (nats per image)", "balancing factor", "active channels, of 8"
    ]  # fmt: skip


def test_heat_maps_of_long_trainings_end_at_the_last_step() -> None:
    steps = list(range(10, 25_010, 10))
    values = [[float(step)] for step in steps]
    figure = figures.heat_maps_per_group(
        steps, values, values, values, scale_of_group=[0], latent_channels=8
    )
    columns = _values(_meshes(figure)[0])[0]
    assert 500 < len(columns) <= 1000
    assert columns[-1] == steps[-1]
    assert figure.axes[0].get_xlim()[1] == steps[-1]


def test_collapsed_groups_have_the_lowest_colour_and_unknown_values_none() -> None:
    rates = [[-0.3, 0.0, math.nan, 5.0]]
    unknown = [[math.nan] * 4]
    figure = figures.heat_maps_per_group(
        [7], rates, unknown, unknown, scale_of_group=[0] * 4, latent_channels=8
    )
    kl, balance, _ = map(_values, _meshes(figure))
    assert kl[[0, 1, 3], 0].tolist() == pytest.approx([0.01, 0.01, 5.0])
    assert np.ma.getmaskarray(kl)[:, 0].tolist() == [False, False, True, False]
    assert np.ma.getmaskarray(balance).all()
    assert _meshes(figure)[1].get_clim() == (0.0, 1.0)


def test_each_group_has_its_line() -> None:
    figure = figures.lines_per_group([5, 10], [[1.0, 2.0, 3.0], [4.0, 5.0, -0.1]])
    lines = figure.axes[0].lines
    assert [list(np.asarray(line.get_ydata())) for line in lines] == [
        [1.0, 4.0], [2.0, 5.0], [3.0, -0.1]
    ]  # fmt: skip
    assert all(list(np.asarray(line.get_xdata())) == [5, 10] for line in lines)


def test_measured_and_published_values_have_separate_panels() -> None:
    both = figures.Comparison("NLL", ["a", "b"], [6.0, 5.0], [0.1, math.nan], [3.3, 3.2])
    alone = figures.Comparison(
        "memory", ["a", "b"], [1.0, math.nan], [math.nan] * 2, [math.nan] * 2
    )
    figure = figures.measured_beside_published([both, alone])
    assert [axes.get_title() for axes in figure.axes] == [
        "measured here", "in the paper", "measured here"
    ]  # fmt: skip
    drawn = [list(np.asarray(axes.lines[0].get_ydata())) for axes in figure.axes]
    assert drawn[:2] == [[6.0, 5.0], [3.3, 3.2]]
    assert figure.subfigs[0].get_suptitle() == "NLL"


@pytest.mark.parametrize("binarized", [True, False])
def test_titles_of_likely_images_say_whether_they_were_binarised(binarized: bool) -> None:
    figure = figures.most_and_least_likely(
        lambda indices: torch.zeros(len(indices), 1, 4, 4), torch.arange(6.0), binarized=binarized
    )
    assert [("binarised" in axes.get_title()) for axes in figure.axes] == [binarized] * 2
