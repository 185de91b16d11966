"""The roofline: the minimum time of a step on a device, given its operations and traffic."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nvae_lightning.benchmarking.work import synchronize
from nvae_lightning.objective import elbo
from nvae_lightning.training.module import NVAEModule

#: Dtypes of the weights and of autocast, by precision.
_DTYPES = {
    "64-true": (torch.float64, None),
    "32-true": (torch.float32, None),
    "16-true": (torch.float16, None),
    "bf16-true": (torch.bfloat16, None),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-mixed": (torch.float32, torch.bfloat16),
}
_ROUNDS = 5
_LONGEST_SECONDS = 5.0  # no further round starts after it


@dataclass(frozen=True)
class Cost:
    """Cost of a step, independent of the device.

    Args:
        flops: Floating-point operations of convolutions and matrix products; multiply and add
            are two.
        bytes: Memory traffic if each convolution and matrix product reads its inputs and writes
            its result once, all elementwise work is fused into them, and the optimiser reads
            weight, gradient and state and writes weight and state.
    """

    flops: int
    bytes: int


@dataclass(frozen=True)
class Roofline:
    """Measured peak performance of a device.

    Args:
        flops_per_second: Speed of a large square matrix product or a large 3x3 convolution,
            whichever is faster: on AMD CPUs, products in float32 run at half of a core's peak.
        bytes_per_second: Reads and writes of a large copy.
    """

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, cost: Cost) -> float:
        """Return the minimum time for a cost.

        Tensors that stay in caches between two operations are not moved, so that a network small
        enough for the caches can be faster than its bytes suggest.
        """
        return max(cost.flops / self.flops_per_second, cost.bytes / self.bytes_per_second)


class _Counter(TorchDispatchMode):
    """Count operations and memory traffic of convolutions and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operation = func._overloadpacket
        if operation in flop_registry:
            if operation is torch.ops.aten.convolution_backward:
                # PyTorch ignores groups here: too many by the channels if depthwise.
                gradient, _, kernel, *_, (grad_input, grad_kernel, _) = args
                num_gradients = grad_input + grad_kernel
                self.flops += 2 * gradient.numel() * kernel[0].numel() * num_gradients
            else:
                self.flops += flop_registry[operation](*args, **kwargs, out_val=result)
            leaves = tree_leaves((args, kwargs, result))
            self.bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return result


def cost_of(
    build: Callable[[], NVAEModule],
    what: str,
    *,
    batch_size: int,
    precision: str,
    num_importance_samples: int = 1,
) -> Cost:
    """Count the cost of a step with fake tensors, which occupy no memory.

    Args:
        build: Function that builds the module.
        what: Kind of step: train, sample, evaluate or data.
        batch_size: Number of images per step.
        precision: Lightning's name of the precision.
        num_importance_samples: Number of importance samples per evaluated image.

    Raises:
        ValueError: If the dtypes of the precision are unknown.
    """
    if precision not in _DTYPES:
        raise ValueError(
            f"trainer.precision: got {precision}, whose roofline is unknown; "
            f"set one of {', '.join(_DTYPES)}"
        )
    weights, computed = _DTYPES[precision]
    with torch.device("meta"):
        module = build().to(weights)
    model, image = module.model, module.model.image
    if what == "data":
        return Cost(0, 2 * batch_size * image.channels * image.size**2)
    autocast = nullcontext() if computed is None else torch.autocast("cpu", computed)
    # Fake CPU tensors, because the meta device has no autocast.
    with FakeTensorMode(allow_non_fake_inputs=True), _Counter() as counter:
        module.to_empty(device="cpu")
        x = torch.empty(batch_size, image.channels, image.size, image.size, dtype=weights)
        if what == "train":
            with autocast:
                inference = model.train().infer(x)
                loss = -elbo(inference, x).value.mean()
                if module.spectral_penalty is not None:
                    module.spectral_penalty.converged = True
                    loss = loss + module.spectral_penalty()
            loss.backward()
        with torch.no_grad(), autocast:
            if what == "sample":
                model.eval().sample(batch_size)
            if what == "evaluate":
                features = model.eval().encoder(image.pad(x))
                model.decoder(batch_size * num_importance_samples, features=features)
    return Cost(
        counter.flops, counter.bytes + (_optimizer_bytes(module) if what == "train" else 0)
    )


def _optimizer_bytes(module: NVAEModule) -> int:
    """Count reads of weight, gradient and state, and writes of weight and state."""
    example = nn.Parameter(torch.zeros(2))
    example.grad = torch.zeros(2)
    optimizer = module.optimizer([example])
    optimizer.step()
    states = [s for s in optimizer.state[example].values() if s.shape == example.shape]
    num_bytes = sum(parameter.nbytes for parameter in module.model.parameters())
    return num_bytes * (3 + 2 * len(states))


def measure_roofline(
    device: torch.device,
    precision: str,
    *,
    side: int | None = None,
    channels: int | None = None,
    num_bytes: int | None = None,
) -> Roofline:
    """Measure the peak performance of a device, the best of several trials.

    Args:
        device: Device to measure.
        precision: Lightning's name of the precision.
        side: Side of the matrices; None for 2048 on a CPU and 8192 elsewhere.
        channels: Channels of the convolution; None for 128 on a CPU and 512 elsewhere.
        num_bytes: Size of the copy; None for 256 MiB on a CPU and 1 GiB elsewhere.
    """
    is_cpu = device.type == "cpu"
    weights, computed = _DTYPES[precision]
    side = side or (2048 if is_cpu else 8192)
    dtype = computed or weights
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    channels = channels or (128 if is_cpu else 512)
    maps, kernel = (
        torch.randn(*shape, device=device).to(dtype, memory_format=torch.channels_last)
        for shape in ((32, channels, 16, 16), (channels, channels, 3, 3))
    )
    source = torch.zeros(
        num_bytes or (1 << 28 if is_cpu else 1 << 30), device=device, dtype=torch.uint8
    )
    target = torch.zeros_like(source)
    # By default convolutions in float32 may use TF32, matrix products may not.
    matmul = torch.backends.cuda.matmul
    usual, matmul.allow_tf32 = matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        product = _best_seconds(lambda: left @ right, device)
    finally:
        matmul.allow_tf32 = usual
    with torch.no_grad():
        convolution = _best_seconds(lambda: F.conv2d(maps, kernel, padding=1), device)
    flops = max(2 * side**3 / product, 2 * maps.numel() * kernel[0].numel() / convolution)
    copy = _best_seconds(lambda: target.copy_(source), device)
    return Roofline(flops, 2 * source.nbytes / copy)


def _best_seconds(function: Callable[[], object], device: torch.device) -> float:
    seconds = []
    while len(seconds) < _ROUNDS and sum(seconds) < _LONGEST_SECONDS:
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
