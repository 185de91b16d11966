"""The Triton kernels against PyTorch's layers; without a GPU Triton's interpreter runs them.

As a script this file compiles them for an H100, without a GPU, and prints their resources.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from nvae_lightning.backends import triton_kernels
from nvae_lightning.backends import triton_operations as kernels
from nvae_lightning.backends.kernels import Normalization, TorchKernels

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="requires Triton"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = kernels.TritonKernels()
EPS = 1e-5
SWISH = pytest.mark.parametrize("swish", [False, True])
SHAPES_AND_SIZES = pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 1, 1, 1), 5),  # one pixel
        ((1, 3, 2, 7), 5),  # smaller than the kernel, not a multiple of a patch
        ((2, 5, 5, 6), 3),
        ((1, 40, 3, 9), 3),  # two blocks of channels, the second with idle lanes
        ((2, 64, 4, 4), 5),
    ],
)
# Small enough for a second in the interpreter, large enough for many programs on a GPU.
ORDINARY = (8, 96, 32, 32) if DEVICE.type == "cuda" else (2, 5, 4, 4)


class Problem(NamedTuple):
    """A feature map with mean and variance far from 0 and 1, and the operations' parameters."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    kernel: Tensor
    gradient: Tensor  # with respect to the output

    def to(self, dtype: torch.dtype) -> "Problem":
        return Problem(*(tensor.to(dtype) for tensor in self))

    def normalization(self, swish: bool) -> Normalization:
        mean, var = TRITON.statistics(self.x)
        return Normalization(mean, (var + EPS).rsqrt(), self.weight, self.bias, swish)


def problem(shape: tuple[int, ...] = ORDINARY, size: int = 3) -> Problem:
    """Draw a problem in float64."""
    channels = shape[1]
    x, gradient = torch.randn(2, *shape, dtype=torch.float64, device=DEVICE)
    weight, bias = torch.randn(2, channels, dtype=torch.float64, device=DEVICE)
    kernel = torch.randn(channels, 1, size, size, dtype=torch.float64, device=DEVICE)
    x = (3 * x + 2).contiguous(memory_format=torch.channels_last)
    return Problem(x, weight.abs() + 0.5, bias, kernel, gradient)


def by_torch(given: Problem, swish: bool) -> tuple[Tensor, ...]:
    """Output of torch's layers, and gradients of feature map, weight and bias."""
    inputs = [tensor.detach().requires_grad_() for tensor in given[:3]]
    x, weight, bias = inputs
    result = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    result = F.silu(result) if swish else result
    return result.detach(), *torch.autograd.grad(result, inputs, given.gradient)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernels, "is_available", lambda device: True)


def by_kernels(given: Problem, swish: bool) -> tuple[Tensor, ...]:
    """Output and gradients of the kernels, like :func:`by_torch`."""
    normalization, num_values = given.normalization(swish), given.x[:, 0].numel()
    result = TRITON.normalize(given.x, normalization)
    return result, *TRITON.normalize_gradients(
        given.gradient, given.x, normalization, lambda sums: sums / num_values
    )


@SHAPES_AND_SIZES
def test_statistics_agree_with_torch(shape: tuple[int, ...], size: int) -> None:
    x = problem(shape, size).x
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    torch.testing.assert_close(TRITON.statistics(x), (mean, var))


@SWISH
@SHAPES_AND_SIZES
def test_normalization_agrees_with_torch(shape: tuple[int, ...], size: int, swish: bool) -> None:
    given = problem(shape, size)
    torch.testing.assert_close(by_kernels(given, swish), by_torch(given, swish))


@SHAPES_AND_SIZES
def test_convolution_agrees_with_torch(shape: tuple[int, ...], size: int) -> None:
    x, _, _, kernel, gradient = problem(shape, size)
    expected = F.conv2d(x.requires_grad_(), kernel, padding=size // 2, groups=len(kernel))
    (grad_x,) = torch.autograd.grad(expected, x, gradient)
    torch.testing.assert_close(TRITON.depthwise(x.detach(), kernel), expected.detach())
    torch.testing.assert_close(TRITON.depthwise(gradient, kernel.flip(2, 3)), grad_x)


@pytest.mark.parametrize("least", [0, 10**9])
def test_results_do_not_depend_on_the_size_of_patches_and_parts(
    least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The largest patches, then the smallest; and two programs, each of which sums many tiles.
    monkeypatch.setattr(kernels, "MIN_PATCH_PROGRAMS", least)
    monkeypatch.setattr(kernels, "MAX_REDUCING_PROGRAMS", 2)
    given = problem((2, 3, 18, 5))
    torch.testing.assert_close(by_kernels(given, True), by_torch(given, True))
    expected = F.conv2d(given.x, given.kernel, padding=1, groups=3)
    torch.testing.assert_close(TRITON.depthwise(given.x, given.kernel), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    given = problem().to(dtype)
    exact = given.to(torch.float64)
    # Half a unit in the last place; a whole one in the interpreter, which truncates.
    rtol = max(torch.finfo(dtype).eps * (0.5 if DEVICE.type == "cuda" else 1.0), 1e-5)
    result, grad_x, *sums = by_kernels(given, True)
    expected, expected_for_x, *expected_sums = by_torch(exact, True)
    convolved = TRITON.depthwise(given.x, given.kernel)
    expected_convolved = F.conv2d(exact.x, exact.kernel, padding=1, groups=len(exact.kernel))
    for got, right in [
        (result, expected), (grad_x, expected_for_x), (convolved, expected_convolved)
    ]:  # fmt: skip
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), right, rtol=rtol, atol=1e-5)
    for sum_, expected_sum in zip(sums, expected_sums, strict=True):
        assert sum_.dtype == torch.float32
        torch.testing.assert_close(sum_.double(), expected_sum, rtol=1e-5, atol=1e-3)


def test_equal_inputs_give_equal_bits_in_any_layout() -> None:
    given = problem().to(torch.float32)
    x, weight, bias, kernel, gradient = given
    assert x.is_contiguous(memory_format=torch.channels_last)
    transposed = kernel.transpose(2, 3).contiguous().transpose(2, 3)
    other = Problem(
        x.contiguous(), weight.repeat_interleave(2)[::2], bias, transposed,
        gradient.contiguous(memory_format=torch.channels_last),
    )  # fmt: skip

    def results(one: Problem) -> tuple[Tensor, ...]:
        return *by_kernels(one, True), TRITON.depthwise(one.x, one.kernel)

    expected = results(given)
    for again in (given, other):
        for result, same in zip(expected, results(again), strict=True):
            assert torch.equal(result, same)
            if same.shape == x.shape:
                assert same.is_contiguous(memory_format=torch.channels_last)


def test_dtypes_may_differ_as_under_autocast() -> None:
    given = problem().to(torch.float32)
    low = given._replace(kernel=given.kernel.bfloat16(), gradient=given.gradient.bfloat16())
    grad_x = by_kernels(low, True)[1]
    convolved = TRITON.depthwise(low.x, low.kernel)
    assert (grad_x.dtype, convolved.dtype) == (torch.float32, torch.bfloat16)
    exact = low.to(torch.float64)
    torch.testing.assert_close(grad_x.double(), by_torch(exact, True)[1], rtol=1e-4, atol=1e-5)
    expected = F.conv2d(exact.x, exact.kernel, padding=1, groups=len(exact.kernel))
    torch.testing.assert_close(convolved.double(), expected, rtol=2**-7, atol=1e-5)


def test_a_large_mean_loses_no_precision() -> None:
    given = problem().to(torch.float32)
    given = given._replace(x=given.x / 30 + 1000)
    var, mean = torch.var_mean(given.x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(
        [values.double() for values in TRITON.statistics(given.x)], [mean, var],
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    normalization = given.normalization(False)
    mean, inverse_std, weight, bias = (
        tensor.double()[:, None, None] for tensor in normalization[:4]
    )
    expected = (given.x.double() - mean) * inverse_std * weight + bias
    result = TRITON.normalize(given.x, normalization)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-5)


def test_operations_pass_opcheck() -> None:
    x, weight, bias, kernel, gradient = problem().to(torch.float32)
    mean, inverse_std = torch.randn(2, len(weight), device=DEVICE)
    affine, means = [mean, inverse_std, weight, bias], torch.stack([mean, bias])
    for operation, arguments in [
        (kernels._statistics, (x,)),
        (kernels._normalize, (x, affine, True)),
        (kernels._normalize_sums, (gradient, x, affine, True)),
        (kernels._normalize_gradient, (gradient, x, affine, means, True)),
        (kernels._depthwise, (gradient, kernel)),
    ]:
        library.opcheck(operation, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_float32_for_any_mean(dtype: torch.dtype) -> None:
    x = problem((8, 3, 16, 16)).x.float().add(300.0).to(dtype)
    mean, var = TorchKernels().statistics(x)
    assert mean.dtype == var.dtype == torch.float32
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-4, atol=0.0)


def test_swish_of_large_values_does_not_overflow() -> None:
    given = problem((1, 2, 3, 3)).to(torch.float32)
    given = given._replace(bias=torch.tensor([-200.0, 200.0], device=DEVICE))
    with np.errstate(over="ignore"):  # in the exponential, which the interpreter takes from NumPy
        results = by_kernels(given, True)
    expected = by_torch(given.to(torch.float64), True)
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), right, rtol=1e-5, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cpu", reason="requires a GPU with 24 GB")
def test_maps_may_have_more_than_2_to_the_31_values() -> None:
    last = problem((1, 64, 256, 256)).to(torch.bfloat16)
    x = torch.zeros(600, 64, 256, 256, dtype=torch.bfloat16, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    x[-1:] = last.x
    normalization = last.normalization(True)
    result = TRITON.normalize(x, normalization)[-1:]
    assert torch.equal(result, TRITON.normalize(last.x, normalization))
    result = TRITON.depthwise(x, last.kernel)[-1:]
    assert torch.equal(result, TRITON.depthwise(last.x, last.kernel))
    # The gradient is zero except for the last image.
    _, *result = TRITON.normalize_gradients(x, x, normalization, torch.zeros_like)
    _, *expected = TRITON.normalize_gradients(last.x, last.x, normalization, torch.zeros_like)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1.0)


# --------------------------------------------------------------------------------------------
# Compilation


@pytest.mark.slow
def test_kernels_compile_for_an_h100_and_spill_no_registers(tmp_path: Path) -> None:
    folder = _tools()
    if not (folder / "ptxas").exists():
        pytest.skip("this Triton has no ptxas")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = subprocess.run(
        [sys.executable, __file__], env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        check=True, stdout=subprocess.PIPE, text=True, timeout=300,
    ).stdout  # fmt: skip
    compiled = [json.loads(line) for line in output.splitlines()]
    names = {name for name in vars(triton_kernels) if name.endswith("_kernel")}
    assert {kernel["name"] for kernel in compiled} == names
    for kernel in compiled:
        assert kernel["spilled_bytes"] == 0, kernel
        # Three concurrent programs, as MAX_REDUCING_PROGRAMS assumes.
        assert 3 * 32 * kernels.NUM_WARPS * kernel["registers"] <= 65536, kernel


def _tools() -> Path:
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "backends/nvidia/bin"


def _compile(kernel: Any, _: int, *arguments: Any, **constants: Any) -> None:
    """Compile a kernel as its launch would, and print its resources."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = {
                torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"
            }[value.dtype]  # fmt: skip
        elif value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (value is not None and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options=kernels.OPTIONS,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_tools() / "cuobjdump", "-res-usage", file.name],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = map(int, found.groups())
    name = kernel.__name__
    print(json.dumps({"name": name, "registers": registers, "spilled_bytes": stack}))


def _compile_all() -> None:
    kernels._launch = _compile
    shape = (32, 192, 32, 32)
    for dtype, size in [(torch.float32, 5), (torch.bfloat16, 5), (torch.bfloat16, 3)]:
        x = torch.empty(shape, dtype=dtype, device="meta")
        channels = torch.empty(shape[1], device="meta")
        kernel = torch.empty(shape[1], 1, size, size, dtype=dtype, device="meta")
        affine = [channels] * 4
        means = torch.empty(2, shape[1], device="meta")
        kernels._statistics._init_fn(x)
        kernels._normalize._init_fn(x, affine, True)
        kernels._normalize_sums._init_fn(x, x, affine, True)
        kernels._normalize_gradient._init_fn(x, x, affine, means, True)
        kernels._depthwise._init_fn(x, kernel)


if __name__ == "__main__":
    _compile_all()
