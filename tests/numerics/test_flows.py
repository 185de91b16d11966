import pytest
import torch
from torch import Tensor, nn

from nvae_lightning.model import FlowPair
from nvae_lightning.model.flows import AutoregressiveFlow, causal_mask
from nvae_lightning.model.layers import MaskedConv2d

CHANNELS, SIDE = 3, 4


def _strong(flow: nn.Module) -> nn.Module:
    """Move the flow away from the identity, close to which it starts."""
    for module in flow.modules():
        if isinstance(module, MaskedConv2d):
            module.log_gain.data.normal_(0.5, 0.2)
            if module.bias is not None:
                module.bias.data.normal_()
    return flow.double()


def _jacobian(flow: nn.Module) -> Tensor:
    """Jacobian with rows and columns in raster order, channels running fastest."""
    z = torch.randn(CHANNELS, SIDE, SIDE, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda one: flow(one[None])[0], z)
    assert isinstance(jacobian, Tensor)
    return jacobian.permute(1, 2, 0, 4, 5, 3).reshape(z.numel(), z.numel())


def _assert_unit_lower_triangular(jacobian: Tensor) -> None:
    assert (jacobian.triu(1) == 0.0).all()
    assert (jacobian.diagonal() == 1.0).all()


def test_jacobian_is_unit_triangular_in_raster_then_channel_order() -> None:
    jacobian = _jacobian(_strong(AutoregressiveFlow(CHANNELS, reverse=False)))
    _assert_unit_lower_triangular(jacobian)


def test_reversed_jacobian_is_unit_triangular_in_reversed_raster_but_same_channel_order() -> None:
    jacobian = _jacobian(_strong(AutoregressiveFlow(CHANNELS, reverse=True)))
    order = torch.arange(SIDE**2 * CHANNELS).view(SIDE**2, CHANNELS).flip(0).flatten()
    _assert_unit_lower_triangular(jacobian[order][:, order])


@pytest.mark.parametrize("reverse", [False, True])
def test_elements_depend_on_earlier_channels_and_on_earlier_pixels_in_reach(reverse: bool) -> None:
    jacobian = _jacobian(_strong(AutoregressiveFlow(CHANNELS, reverse=reverse)))
    blocks = jacobian.view(SIDE, SIDE, CHANNELS, SIDE, SIDE, CHANNELS)
    if reverse:
        blocks = blocks.flip((0, 1, 3, 4))
    within = blocks[2, 2, :, 2, 2, :]
    assert (within[1, 0] != 0) & (within[2, 0] != 0) & (within[2, 1] != 0)
    for row, column in ((2, 1), (1, 1), (1, 2), (1, 3), (0, 0)):
        assert (blocks[2, 2, :, row, column, :] != 0).all()


def test_pair_preserves_volume_and_depends_on_both_sides() -> None:
    jacobian = _jacobian(_strong(FlowPair(CHANNELS)))
    sign, log_determinant = torch.linalg.slogdet(jacobian)
    assert sign == 1.0
    assert log_determinant.abs() < 1e-9
    assert jacobian.triu(1).abs().max() > 1e-3
    assert jacobian.tril(-1).abs().max() > 1e-3


def test_flow_starts_close_to_but_not_at_the_identity() -> None:
    z = torch.randn(8, 4, 8, 8, dtype=torch.float64)
    flow = AutoregressiveFlow(4, reverse=False).double()
    assert flow.project.bias is not None
    flow.project.bias.data.zero_()
    shift = (flow(z) - z).std()
    assert 1e-4 < shift < 0.1


def test_one_flow_can_be_inverted_element_by_element() -> None:
    flow = _strong(AutoregressiveFlow(2, reverse=False))
    z = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        image = flow(z)
        found = torch.zeros_like(z)
        for _ in range(z.numel()):  # each round fixes at least one more element
            found = image + (found - flow(found))
    torch.testing.assert_close(found, z)


def _centre(mask: Tensor) -> list[list[float]]:
    middle = mask.shape[-1] // 2
    return mask[:, :, middle, middle].tolist()


def test_strict_mask_sees_the_earlier_channels_of_its_pixel() -> None:
    mask = causal_mask(3, 3, 1, strict=True)
    assert _centre(mask) == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]


def test_non_strict_mask_also_sees_its_own_channel() -> None:
    mask = causal_mask(3, 3, 1, strict=False)
    assert _centre(mask) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_mask_to_more_channels_treats_them_in_blocks() -> None:
    assert _centre(causal_mask(4, 2, 1, strict=True)) == [[0, 0], [0, 0], [1, 0], [1, 0]]
    assert _centre(causal_mask(4, 2, 1, strict=False)) == [[1, 0], [1, 0], [1, 1], [1, 1]]


def test_mask_to_fewer_channels_sees_them_in_blocks() -> None:
    assert _centre(causal_mask(2, 4, 1, strict=True)) == [[0, 0, 0, 0], [1, 1, 0, 0]]
    assert _centre(causal_mask(2, 4, 1, strict=False)) == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_mask_sees_the_rows_above_and_the_pixels_to_the_left() -> None:
    mask = causal_mask(1, 1, 3, strict=True)
    assert mask[0, 0].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]


def test_reversed_mask_sees_the_rows_below_and_the_pixels_to_the_right() -> None:
    mask = causal_mask(2, 2, 3, strict=True, reverse=True)
    assert mask[0, 0].tolist() == [[0, 0, 0], [0, 0, 1], [1, 1, 1]]
    assert _centre(mask) == [[0, 0], [1, 0]]


@pytest.mark.parametrize(("strict", "centre"), [(True, 0.0), (False, 1.0)])
def test_depthwise_mask_has_one_input_and_sees_its_own_pixel_unless_strict(
    strict: bool, centre: float
) -> None:
    mask = causal_mask(4, 4, 3, strict=strict, depthwise=True)
    assert mask.shape == (4, 1, 3, 3)
    for channel in mask[:, 0]:
        assert channel.tolist() == [[1, 1, 1], [1, centre, 0], [0, 0, 0]]
