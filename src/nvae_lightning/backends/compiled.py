"""Kernels that torch's compiler generates from formulas, each on first use."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, library
from torch.utils._pytree import tree_leaves

from nvae_lightning.backends.convolution import Convolution, depthwise_kernel_gradient
from nvae_lightning.backends.kernels import Normalization, Share, TorchKernels, widened
from nvae_lightning.model.likelihood import (
    DiscretizedLogisticMixture,
    DiscretizedLogisticMixtureLikelihood,
    mixture_log_prob,
)
from nvae_lightning.model.shapes import FeatureMap, PerChannel

Rows = Float[Tensor, "batch pixel channel"]

#: A normalisation reads five tensors. By default the compiler would write its result to memory and
#: read it again, as it does beyond four.
_OPTIONS: dict[str, Any] = {"realize_reads_threshold": 16}


def inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:  # noqa: ANN401
    """Compile a graph; a backend for ``torch.compile``, which takes seconds to import."""
    from torch._inductor.compile_fx import compile_fx

    # The key in the compiler's cache includes the traced gradients of our functions. By default
    # their graphs are not cached, and traced again in every process.
    with torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=True):
        return compile_fx(graph, inputs, config_patches=_OPTIONS)


def _compiled(*, dynamic: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function at its first call, without the type checker's wrapper."""
    return lambda function: torch.compile(
        inspect.unwrap(function), dynamic=dynamic, backend=inductor
    )


def for_any_batch(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Let compiled code serve every batch size, where no gradients are computed.

    Evaluations and samples have many batch sizes. A training has one, for which its code is
    specialised.
    """

    def call(*arguments: Any, **settings: Any) -> Any:  # noqa: ANN401
        if not torch.is_grad_enabled():
            for value in tree_leaves((arguments, settings)):
                if isinstance(value, Tensor) and value.ndim > 3:
                    torch._dynamo.maybe_mark_dynamic(value, 0)
        return compiled(*arguments, **settings)

    return call


class CompiledMixture(DiscretizedLogisticMixture):
    """Mixture of logistics with compiled log probabilities."""

    log_prob_of_levels = staticmethod(for_any_batch(_compiled(dynamic=False)(mixture_log_prob)))


class CompiledMixtureLikelihood(DiscretizedLogisticMixtureLikelihood):
    """Likelihood with compiled log probabilities."""

    distribution = CompiledMixture


class CompiledKernels(TorchKernels):
    """Compiled normalisation, swish and depthwise gradients."""

    def statistics(self, x: FeatureMap) -> tuple[PerChannel, PerChannel]:
        """Return mean and biased variance of each channel."""
        return _statistics(_rows(x))

    def normalize(self, x: FeatureMap, normalization: Normalization) -> FeatureMap:
        """Compute the activations a."""
        return _as_map(_normalize(_rows(x), *normalization), x)

    def normalize_gradients(
        self, gradient: FeatureMap, x: FeatureMap, normalization: Normalization, share: Share
    ) -> tuple[FeatureMap, PerChannel, PerChannel]:
        """See :meth:`TorchKernels.normalize_gradients`."""
        rows, gradients = _rows(x), _rows(gradient)
        mean, inverse_std, weight, bias, swish = normalization
        if swish and x.device.type == "cpu":
            gradients, sums = swish_gradient_and_sums(
                gradients, rows, mean, inverse_std, weight, bias
            )
        else:
            if swish:
                gradients = _swish_gradient(gradients, rows, mean, inverse_std, weight, bias)
            sums = _sums(gradients, rows, mean, inverse_std)
        grad_bias, grad_weight = sums
        grad_x = _normalize_gradient(gradients, rows, mean, inverse_std, weight, share(sums))
        return _as_map(grad_x, x), grad_weight, grad_bias

    @staticmethod
    def depthwise_kernel_gradient(
        gradient: FeatureMap, x: FeatureMap, convolution: Convolution
    ) -> Tensor:
        """Return the gradient of a depthwise kernel; on a CPU, with all taps in one loop."""
        if x.device.type != "cpu":
            return depthwise_kernel_gradient(gradient, x, convolution)
        taps = depthwise_taps_gradient(gradient, x, convolution.kernel.shape[-1])
        return taps.view_as(convolution.kernel).to(convolution.kernel.dtype)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _rows(x: FeatureMap) -> Rows:
    """Flatten the pixels, so that one compiled loop serves all heights and widths."""
    return _channels_last(x).permute(0, 2, 3, 1).flatten(1, 2)


def _as_map(rows: Rows, like: FeatureMap) -> FeatureMap:
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def _sum(values: Tensor) -> Tensor:  # untyped shapes: the compiler cannot trace their check
    # Per image first: loops over the columns of all images would miss the caches.
    return values.sum(1).sum(0)


@_compiled(dynamic=True)
def _statistics(x: Rows) -> tuple[PerChannel, PerChannel]:
    values, count = widened(x), x.shape[0] * x.shape[1]
    mean = _sum(values) / count
    return mean, _sum((values - mean).square()) / count


@_compiled(dynamic=True)
def _normalize(
    x: Rows, mean: PerChannel, inverse_std: PerChannel, weight: PerChannel, bias: PerChannel,
    swish: bool,
) -> Rows:  # fmt: skip
    u = (widened(x) - mean) * (inverse_std * weight) + bias
    return (F.silu(u) if swish else u).to(x.dtype)


@_compiled(dynamic=True)
def _swish_gradient(
    gradient: Rows, x: Rows, mean: PerChannel, inverse_std: PerChannel, weight: PerChannel,
    bias: PerChannel,
) -> Rows:  # fmt: skip
    u = (widened(x) - mean) * (inverse_std * weight) + bias
    sigmoid = torch.sigmoid(u)
    return (widened(gradient) * sigmoid * (1.0 + u * (1.0 - sigmoid))).to(x.dtype)


@_compiled(dynamic=True)
def _sums(
    gradient: Rows, x: Rows, mean: PerChannel, inverse_std: PerChannel
) -> Float[Tensor, "2 channel"]:
    grad = widened(gradient)
    return torch.stack([_sum(grad), _sum(grad * (widened(x) - mean)) * inverse_std])


@_compiled(dynamic=True)
def _normalize_gradient(
    gradient: Rows, x: Rows, mean: PerChannel, inverse_std: PerChannel, weight: PerChannel,
    means: Float[Tensor, "2 channel"],
) -> Rows:  # fmt: skip
    normalized = (widened(x) - mean) * inverse_std
    along_one, along_normalized = means
    grad_x = widened(gradient) - along_one - normalized * along_normalized
    return (grad_x * (weight * inverse_std)).to(x.dtype)


@library.custom_op(
    "nvae_lightning::swish_gradient_and_sums",
    mutates_args=(),
    schema="(Tensor gradient, Tensor x, Tensor mean, Tensor inverse_std, Tensor weight, "
    "Tensor bias) -> (Tensor, Tensor)",
)
def swish_gradient_and_sums(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of u and its sums, as one opaque operation.

    A compiler would compute the exponentials twice, for the sums and for the gradient of x. On a
    CPU they cost more than memory traffic.
    """
    grad_u = _swish_gradient(gradient, x, mean, inverse_std, weight, bias)
    return grad_u, _sums(grad_u, x, mean, inverse_std)


@swish_gradient_and_sums.register_fake
def _(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), mean.new_empty(2, len(mean))


@library.custom_op(
    "nvae_lightning::depthwise_taps_gradient",
    mutates_args=(),
    schema="(Tensor gradient, Tensor x, int size) -> Tensor",
)
def depthwise_taps_gradient(gradient: Tensor, x: Tensor, size: int) -> Tensor:
    """Return the gradient (channel, tap) of a depthwise kernel, as one opaque operation.

    A compiler would fuse the computation of x into the loop and repeat it for each tap.
    """
    # One loop per shape; there are more shapes than torch's default limit of eight.
    with torch._dynamo.config.patch(recompile_limit=256):
        return _taps_gradient(_channels_last(gradient), _channels_last(x), size)


@depthwise_taps_gradient.register_fake
def _(gradient: Tensor, x: Tensor, size: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((x.shape[1], size * size), dtype=dtype)


@_compiled(dynamic=False)
def _taps_gradient(gradient: FeatureMap, x: FeatureMap, size: int) -> Float[Tensor, "channel tap"]:
    padded = widened(F.pad(x, (size // 2,) * 4))
    rows, columns = gradient.shape[2:]
    return torch.stack(
        [
            # Per image first, as in _sum.
            (padded[:, :, i : i + rows, j : j + columns] * widened(gradient)).sum((2, 3)).sum(0)
            for i in range(size)
            for j in range(size)
        ],
        1,
    )
