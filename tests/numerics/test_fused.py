"""Fused normalisation, swish and convolution against PyTorch's three operations."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from nvae_lightning.backends import Compute, triton_operations
from nvae_lightning.backends.compiled import (
    CompiledKernels,
    depthwise_taps_gradient,
    swish_gradient_and_sums,
)
from nvae_lightning.backends.convolution import Convolution
from nvae_lightning.backends.kernels import TorchKernels, normalize
from nvae_lightning.backends.triton_operations import TritonKernels
from nvae_lightning.model.layers import NormActConv
from nvae_lightning.model.normalization import BatchNorm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (3, 4, 5, 6)
CHANNELS = SHAPE[1]
SWISH = pytest.mark.parametrize("swish", [False, True])
#: Dynamo reads the ``.grad`` of its inputs, and hides this warning only if it is not an error.
LOOKED_AT = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d] | None] = {
    "none": None,
    "1x1": partial(nn.Conv2d, CHANNELS, 3, 1, bias=False),
    "3x3 of stride 2": partial(nn.Conv2d, CHANNELS, 3, 3, stride=2, padding=1),
    "dilated": partial(nn.Conv2d, CHANNELS, 3, 3, padding=2, dilation=2),
    "depthwise": partial(nn.Conv2d, CHANNELS, CHANNELS, 5, padding=2, groups=4, bias=False),
    "depthwise with bias": partial(nn.Conv2d, CHANNELS, CHANNELS, 5, padding=2, groups=4),
    "depthwise of stride 2": partial(
        nn.Conv2d, CHANNELS, CHANNELS, 3, stride=2, padding=1, groups=4
    ),
}
FOLLOWED_BY = pytest.mark.parametrize("name", CONVOLUTIONS)


class Problem(NamedTuple):
    """A normalisation and the convolution after it, if any."""

    norm: BatchNorm
    swish: bool
    convolution: nn.Conv2d | None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        of_convolution = (
            {} if self.convolution is None else dict(self.convolution.named_parameters())
        )
        return {
            **dict(self.norm.named_parameters()),
            **{f"convolution.{name}": value for name, value in of_convolution.items()},
        }

    def ours(self, x: Tensor, chosen: TorchKernels | None = None) -> Tensor:
        known = None if self.convolution is None else Convolution.of(self.convolution)
        chosen = chosen or TorchKernels()
        return normalize(self.norm, x, chosen, swish=self.swish, convolution=known)

    def theirs(self, x: Tensor) -> Tensor:
        norm = self.norm
        x = F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.05, 1e-5
        )
        x = F.silu(x) if self.swish else x
        return x if self.convolution is None else self.convolution(x)


def problem(name: str, swish: bool, dtype: torch.dtype = torch.float64) -> Problem:
    """Draw a problem, the same at each call."""
    torch.manual_seed(1)
    norm = BatchNorm(CHANNELS)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    build = CONVOLUTIONS[name]
    convolution = None if build is None else build().to(DEVICE, dtype)
    return Problem(norm.to(DEVICE, dtype), swish, convolution)


def batch(shape: tuple[int, ...] = SHAPE) -> Tensor:
    """A batch whose mean and variance are far from 0 and 1."""
    return 3 * torch.randn(shape, dtype=torch.float64, device=DEVICE) + 2


class Result(NamedTuple):
    """Output and gradients of a pass; gradients by the names of their tensors."""

    output: Tensor
    gradients: dict[str, Tensor]


def run(given: Problem, function: Callable[[Tensor], Tensor], x: Tensor) -> Result:
    """Run forward and backward, with a different weight for each output."""
    x = x.detach().requires_grad_()
    output = function(x)
    torch.manual_seed(2)
    upstream = torch.randn(output.shape, dtype=torch.float64).to(output)
    variables = {"x": x, **given.parameters}
    gradients = torch.autograd.grad(output, list(variables.values()), upstream)
    return Result(output.detach(), dict(zip(variables, gradients, strict=True)))


def assert_equal_to_torch(
    chosen: TorchKernels, name: str, swish: bool, shape: tuple[int, ...] = SHAPE
) -> None:
    """Compare two passes in each memory layout; the second starts from the first's statistics."""
    ours, theirs = problem(name, swish), problem(name, swish)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = batch(shape).contiguous(memory_format=layout)
        torch.testing.assert_close(
            run(ours, partial(ours.ours, chosen=chosen), x), run(theirs, theirs.theirs, x)
        )
    statistics = [
        {key: value for key, value in one.norm.state_dict().items() if key.startswith("running")}
        for one in (ours, theirs)
    ]
    torch.testing.assert_close(*statistics)
    assert ours.norm.num_batches_tracked == 2


@SWISH
@FOLLOWED_BY
def test_gradient_agrees_with_finite_differences(name: str, swish: bool) -> None:
    given = problem(name, swish)
    geometry = None
    if given.convolution is not None:
        known = Convolution.of(given.convolution)
        assert known is not None
        geometry = known.geometry

    def function(x: Tensor, weight: Tensor, bias: Tensor, *of_convolution: Tensor) -> Tensor:
        known = None
        if geometry is not None:
            kernel, kernel_bias = (*of_convolution, None)[:2]
            assert kernel is not None
            known = Convolution(kernel, kernel_bias, geometry)
        norm = given.norm
        for name, value in (("weight", weight), ("bias", bias)):
            delattr(norm, name)
            setattr(norm, name, value)  # not a parameter: it would stop the gradient
        return normalize(norm, x, TorchKernels(), swish=swish, convolution=known)

    inputs = [batch((2, CHANNELS, 3, 4)), *given.parameters.values()]
    assert torch.autograd.gradcheck(function, [t.detach().requires_grad_() for t in inputs])


@SWISH
@FOLLOWED_BY
def test_torch_kernels_agree_with_torch_layers(name: str, swish: bool) -> None:
    assert_equal_to_torch(TorchKernels(), name, swish)


@SWISH
@pytest.mark.parametrize("name", ["3x3 of stride 2", "dilated"])
def test_channels_padded_for_tensor_cores_do_not_change_the_results(
    name: str, swish: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "nvae_lightning.backends.convolution._has_tensor_cores", lambda device, dtype: True
    )
    kernels_used = []

    def conv2d(x: Tensor, kernel: Tensor, *others: object) -> Tensor:
        kernels_used.append(kernel.shape)
        return torch.conv2d(x, kernel, *others)  # pyright: ignore[reportCallIssue, reportArgumentType]

    monkeypatch.setattr(F, "conv2d", conv2d)
    assert_equal_to_torch(TorchKernels(), name, swish)
    assert (8, 8, 3, 3) in kernels_used


@pytest.mark.slow
@LOOKED_AT
@SWISH
@FOLLOWED_BY
def test_compiled_kernels_agree_with_torch_layers(name: str, swish: bool) -> None:
    assert_equal_to_torch(CompiledKernels(), name, swish)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="requires Triton")
@SWISH
@pytest.mark.parametrize("name", ["none", "1x1", "depthwise", "depthwise with bias"])
def test_triton_kernels_agree_with_torch_layers(
    name: str, swish: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        triton_operations, "is_available", lambda device: True
    )  # in the interpreter
    # Few pixels, because the interpreter is slow.
    assert_equal_to_torch(TritonKernels(), name, swish, shape=(2, CHANNELS, 3, 2))


@LOOKED_AT
@SWISH
@FOLLOWED_BY
@pytest.mark.parametrize(
    "chosen", [TorchKernels, pytest.param(CompiledKernels, marks=pytest.mark.slow)]
)
def test_sixteen_bit_error_is_within_rounding(
    chosen: type[TorchKernels], name: str, swish: bool
) -> None:
    given, exact = problem(name, swish, torch.float32), problem(name, swish)
    x = batch().bfloat16()

    def function(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return given.ours(x, chosen())

    result, expected = run(given, function, x), run(exact, exact.theirs, x.double())
    assert result.output.dtype == torch.bfloat16
    for key, parameter in given.parameters.items():
        assert result.gradients[key].dtype == parameter.dtype
    found = {"output": result.output, **result.gradients}
    for key, value in {"output": expected.output, **expected.gradients}.items():
        # Each rounding changes a number by at most 2^-9 of it, and several rounding steps follow.
        error = (found[key] - value).abs().max() / value.abs().max()
        assert error < 2**-6, key


@pytest.mark.parametrize(("sides", "size"), [((7, 5), 3), ((1, 3), 5)])
def test_gradient_of_depthwise_taps_agrees_with_autograd(
    sides: tuple[int, int], size: int
) -> None:
    x, upstream = batch((2, CHANNELS, *sides)), batch((2, CHANNELS, *sides))
    kernel = torch.zeros(CHANNELS, 1, size, size, dtype=torch.float64, device=DEVICE)
    kernel.requires_grad_()
    output = F.conv2d(x, kernel, padding=size // 2, groups=CHANNELS)
    expected = torch.autograd.grad(output, kernel, upstream)[0].flatten(1)
    torch.testing.assert_close(depthwise_taps_gradient(upstream, x, size), expected)


@pytest.mark.slow
def test_custom_operations_have_correct_fake_tensors() -> None:
    x = batch((2, 6, CHANNELS)).float()
    affine = [torch.rand(CHANNELS, device=DEVICE) + 0.5 for _ in range(4)]
    maps = batch().float(), batch().float()
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (x.to(dtype), x.to(dtype), *affine)
        library.opcheck(
            swish_gradient_and_sums, arguments, test_utils=("test_schema", "test_faketensor")
        )
        arguments = (maps[0].to(dtype), maps[1].to(dtype), 3)
        library.opcheck(
            depthwise_taps_gradient, arguments, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("recompute", ["nothing", "normalization", "activation"])
def test_float64_stays_float64_under_autocast(recompute: Any) -> None:
    given = problem("1x1", True)
    assert given.convolution is not None
    unit = NormActConv(given.norm, nn.SiLU(), given.convolution)
    Compute(recompute=recompute).apply(unit)
    with torch.autocast("cpu", torch.bfloat16):
        assert unit(batch()).dtype == torch.float64
