"""Settings of speed and memory change neither numbers nor names.

As a script this file compiles a model, out of the sight of the type checker under which tests
run, and prints what it finds: ``test_compute.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from nvae_lightning.model import NVAE, Compute
from nvae_lightning.model.normalization import BatchNorm

NOTHING = Compute(recompute="nothing")
SETTINGS = [
    Compute(recompute=recompute, checkpoint_min_size=size)
    for recompute in ("nothing", "normalization", "activation")
    for size in (None, 1, 4)
]


def batch(model: NVAE) -> tuple[Tensor, list[Tensor]]:
    """Images, and the noise of their latents."""
    dtype = next(model.parameters()).dtype
    size = model.image.size
    x = torch.rand(2, model.image.channels, size, size, dtype=dtype).mul(255).round() / 255
    return x, [torch.randn(2, *shape, dtype=dtype) for shape in model.latent_shapes]


def loss_of(model: NVAE, x: Tensor, noise: list[Tensor]) -> Tensor:
    inference = model(x, noise)
    rate = torch.stack([latent.kl for latent in inference.latents]).sum(0)
    return (rate - inference.likelihood.log_prob(x)).mean()


def step(model: NVAE, compute: Compute) -> dict[str, Tensor]:
    """Loss, gradients and buffers of a copy of a model, after two steps without an optimiser."""
    model = copy.deepcopy(model).train()
    compute.apply(model)
    found = {}
    torch.manual_seed(1)
    for number in range(2):
        loss = loss_of(model, *batch(model))
        loss.backward()
        found[f"loss {number}"] = loss.detach()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[f"gradient of {name}"] = parameter.grad
    return {**found, **dict(model.named_buffers())}


@pytest.mark.parametrize("compute", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["colour_nvae", "flow_nvae"])
def test_what_is_recomputed_changes_no_number(
    compute: Compute, name: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name).double()
    found = step(model, compute)
    torch.testing.assert_close(found, step(model, NOTHING), rtol=1e-9, atol=1e-9)
    counts = {int(value) for key, value in found.items() if key.endswith("num_batches_tracked")}
    assert counts == {2}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "torch", "compiled", "triton"])
@pytest.mark.parametrize("compute", SETTINGS, ids=str)
def test_state_dict_knows_nothing_of_it(
    compute: Compute, kernels: str, compile: bool, colour_nvae: NVAE
) -> None:
    before = {name: value.clone() for name, value in colour_nvae.state_dict().items()}
    Compute(
        compile=compile, kernels=kernels, recompute=compute.recompute,  # pyright: ignore[reportArgumentType]
        checkpoint_min_size=compute.checkpoint_min_size,
    ).apply(colour_nvae)  # fmt: skip
    after = colour_nvae.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@contextmanager
def counting(kept: dict[int, int]) -> Iterator[None]:
    """Collect the storages that are kept for the backward pass, and their bytes."""

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def bytes_kept(model: NVAE, compute: Compute) -> int:
    compute.apply(model.train())
    kept: dict[int, int] = {}
    with counting(kept):
        loss = loss_of(model, *batch(model))
    loss.backward()
    return sum(kept.values())


def test_the_more_is_recomputed_the_less_is_kept(build_nvae: Callable[..., NVAE]) -> None:
    model = build_nvae()
    nothing, normalization, activation, wide_cells, all_cells = [
        bytes_kept(model, compute)
        for compute in (
            NOTHING,
            Compute(recompute="normalization"),
            Compute(recompute="activation"),
            Compute(checkpoint_min_size=8),
            Compute(checkpoint_min_size=1),
        )
    ]
    assert nothing > normalization > activation > wide_cells > all_cells


def test_kernels_are_those_that_were_asked_for(colour_nvae: NVAE) -> None:
    norms = [module for module in colour_nvae.modules() if isinstance(module, BatchNorm)]
    for compute, expected in (
        (Compute(), "TorchKernels"),
        (Compute(compile=True), "CompiledKernels"),
        (Compute(compile=True, kernels="torch"), "TorchKernels"),
        (Compute(kernels="compiled"), "CompiledKernels"),
        (Compute(kernels="triton"), "TritonKernels"),
    ):
        compute.apply(colour_nvae)
        assert {type(norm.kernels).__name__ for norm in norms} == {expected}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kernels": "cuda"},
            r"compute\.kernels must be auto, torch, compiled, triton, got 'cuda'",
        ),
        ({"recompute": "all"}, r"compute\.recompute must be nothing, .* got 'all'"),
        ({"checkpoint_min_size": 0}, r"compute\.checkpoint_min_size must be at least 1.* got 0"),
        ({"checkpoint_min_size": -8}, r"compute\.checkpoint_min_size must be .* got -8"),
    ],
)
def test_a_setting_that_there_is_not_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Compute(**settings)


def test_triton_on_a_cpu_is_refused(build_nvae: Callable[..., NVAE]) -> None:
    model = build_nvae().train()
    Compute(kernels="triton").apply(model)
    with pytest.raises(ValueError, match=r"compute\.kernels: got triton, .*'cpu'.*kernels=auto"):
        model(batch(model)[0])
