"""Settings of speed and memory change neither numbers nor names.

Run as a script, ``test_compute.py FOLDER``, this file compiles models without the tests' runtime
type checker and writes its findings.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from nvae_lightning.backends import Compute, triton_operations
from nvae_lightning.backends import compute as implementation
from nvae_lightning.backends.compiled import CompiledKernels
from nvae_lightning.backends.kernels import TorchKernels
from nvae_lightning.backends.triton_operations import TritonKernels
from nvae_lightning.backends.units import FusedBatchNorm, FusedUnit
from nvae_lightning.model import NVAE, DepthwiseCell, RegularCell

NOTHING = Compute(recompute="nothing")
SETTINGS = [
    Compute(recompute="nothing", checkpoint_min_size=1),
    Compute(recompute="normalization"),
    Compute(recompute="normalization", checkpoint_min_size=1),
    Compute(recompute="activation"),
    Compute(recompute="activation", checkpoint_min_size=4),
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
def test_recomputation_does_not_change_losses_and_gradients(
    compute: Compute, name: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name).double()
    found = step(model, compute)
    torch.testing.assert_close(found, step(model, NOTHING), rtol=1e-9, atol=1e-9)
    counts = {int(value) for key, value in found.items() if key.endswith("num_batches_tracked")}
    assert counts == {2}


def test_the_state_dict_does_not_depend_on_the_settings(colour_nvae: NVAE) -> None:
    before = {name: value.clone() for name, value in colour_nvae.state_dict().items()}
    plain = [type(module) for module in colour_nvae.modules()]
    for compute in (
        *SETTINGS,
        *(Compute(kernels=kernels) for kernels in ("torch", "compiled", "triton")),
        Compute(compile=True),
        Compute(compile=True, checkpoint_min_size=1),
    ):
        compute.apply(colour_nvae)  # on top of the previous settings
        after = colour_nvae.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())
    NOTHING.apply(colour_nvae)
    kinds = [type(module) for module in colour_nvae.modules()]
    assert [nn.Sequential if k.__name__ == "FoldingSequential" else k for k in kinds] == plain
    assert not any(module._compiled_call_impl for module in colour_nvae.modules())


@contextmanager
def counting(kept: dict[int, int]) -> Iterator[None]:
    """Collect the storages kept for the backward pass, and their bytes."""

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


def test_more_recomputation_keeps_fewer_bytes(build_nvae: Callable[..., NVAE]) -> None:
    model = build_nvae()
    nothing, normalization, activation, wide_cells, all_cells = [
        bytes_kept(model, compute)
        for compute in (
            NOTHING,
            Compute(recompute="normalization"),
            Compute(recompute="activation"),
            Compute(recompute="activation", checkpoint_min_size=8),
            Compute(recompute="activation", checkpoint_min_size=1),
        )
    ]
    assert nothing > normalization > activation > wide_cells > all_cells


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        (Compute(recompute="activation"), TorchKernels),
        (Compute(compile=True), CompiledKernels),
        (Compute(compile=True, kernels="torch"), TorchKernels),
        (Compute(kernels="compiled"), CompiledKernels),
        (Compute(kernels="triton"), TritonKernels),
    ],
)
def test_kernels_follow_the_settings(
    compute: Compute, expected: type[TorchKernels], colour_nvae: NVAE
) -> None:
    compute.apply(colour_nvae)
    kinds = (FusedBatchNorm, FusedUnit)
    layers = [module for module in colour_nvae.modules() if isinstance(module, kinds)]
    assert {type(layer.kernels) for layer in layers} == {expected}


def test_a_machine_without_compiler_is_named(
    grey_nvae: NVAE, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    Compute().apply(grey_nvae)
    with pytest.raises(ValueError, match=r"^compile: .* install one .* or set compile=false$"):
        Compute(compile=True).apply(grey_nvae)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_nothing_is_recomputed_by_default_without_a_compiler(
    kernels: Any, colour_nvae: NVAE
) -> None:
    Compute(kernels=kernels).apply(colour_nvae)
    assert not any(isinstance(m, FusedBatchNorm | FusedUnit) for m in colour_nvae.modules())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"kernels": "cuda"}, "compute.kernels must be auto, torch, compiled, triton, got 'cuda'"),
    (
        {"recompute": "all"},
        "compute.recompute must be auto, nothing, normalization or activation, got 'all'",
    ),
    (
        {"checkpoint_min_size": 0},
        "compute.checkpoint_min_size must be at least 1, or null for no checkpointing, got 0",
    ),
    (
        {"recompute": "nothing", "kernels": "triton"},
        "compute.kernels: got triton, which compute.recompute=nothing does not use; set "
        "compute.recompute=normalization or activation, or compute.kernels=auto",
    ),
]


@pytest.mark.slow
def test_unknown_settings_are_refused(findings: dict[Any, Any]) -> None:
    assert findings["refusals"] == [message for _, message in REFUSED]


def test_triton_on_a_cpu_is_refused(build_nvae: Callable[..., NVAE]) -> None:
    model = build_nvae().train()
    Compute(kernels="triton").apply(model)
    with pytest.raises(ValueError, match=r"compute\.kernels: got triton, .*'cpu'.*kernels=auto"):
        model(batch(model)[0])


@pytest.fixture(scope="module")
def findings(written_by_this_file: Path) -> dict[Any, Any]:
    """Findings of the script."""
    return torch.load(written_by_this_file / "findings.pt")


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPILED = {
    "plain": Compute(compile=True),
    "checkpointed": Compute(compile=True, checkpoint_min_size=1),
    # In the interpreter if there is no GPU.
    **(
        {"triton": Compute(compile=True, kernels="triton")}
        if importlib.util.find_spec("triton")
        else {}
    ),
}
BY_SETTING = pytest.mark.parametrize("name", COMPILED)
CELLS: list[Callable[[], nn.Module]] = [
    partial(RegularCell, 4, 4),
    partial(DepthwiseCell, 4, 4, expansion=2.0),
]


@pytest.mark.slow
@BY_SETTING
def test_compiling_does_not_change_the_results(name: str, findings: dict[Any, Any]) -> None:
    found = findings[name]
    torch.testing.assert_close(found["compiled"], found["plain"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@BY_SETTING
def test_cells_of_one_shape_share_compiled_code(name: str, findings: dict[Any, Any]) -> None:
    first, second, copied = findings[name]["graphs"]
    assert first > 0
    assert first == second
    assert first == copied


@pytest.mark.slow
@BY_SETTING
def test_compiled_code_without_gradients_serves_every_batch_size(
    name: str, findings: dict[Any, Any]
) -> None:
    found = findings[name]
    assert found["graphs of batches"] == 0
    torch.testing.assert_close(*found["batches"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@BY_SETTING
def test_cells_that_share_compiled_code_use_their_own_weights(
    name: str, findings: dict[Any, Any]
) -> None:
    found = findings[name]["copy of zeros"]
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.slow
@BY_SETTING
def test_all_compiled_code_is_cached_for_later_processes(
    name: str, findings: dict[Any, Any]
) -> None:
    cache = findings[name]["cache"]
    assert cache["autograd_cache_hit"] + cache["autograd_cache_miss"] > 0
    assert cache["autograd_cache_bypass"] == 0


def _passes(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of training; outputs of evaluation, also without gradients."""
    x = x.detach().requires_grad_()
    output = model.train()(x)
    inputs = {"x": x, **dict(model.named_parameters())}
    gradients = torch.autograd.grad(output.square().mean(), list(inputs.values()))
    found = {"output": output.detach(), **dict(zip(inputs, gradients, strict=True))}
    found.update({name: value.clone() for name, value in model.named_buffers()})
    model.eval()
    found["evaluated"] = model(x).detach()
    with torch.no_grad():
        found["without gradients"] = model(x)
    return found


def _compare(compute: Compute) -> dict[str, Any]:
    """Run two cells of each shape through all kinds of passes, compiled and not."""
    graphs: list[None] = []
    recomputing = implementation._recomputing

    def count(*arguments: Any) -> Callable[..., Any]:
        graphs.append(None)
        return recomputing(*arguments)

    implementation._recomputing = count
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    ones = nn.ModuleList(build() for build in CELLS).to(DEVICE)
    others = nn.ModuleList(build() for build in CELLS).to(DEVICE)
    x = torch.randn(2, 4, 8, 8, device=DEVICE)
    plain = [_passes(copy.deepcopy(cell), x) for cell in (*ones, *others)]
    numbers, found = [], []
    for cells in (ones, others):
        compute.apply(cells)
        found += [_passes(cell, x) for cell in cells]
        numbers.append(len(graphs))
    with torch.no_grad():
        sizes = [x.repeat(number, 1, 1, 1)[1:].requires_grad_() for number in (2, 3)]
        batches = [others[0](inputs)[0] for inputs in sizes]
    of_batches = len(graphs) - numbers[-1]
    zeros = copy.deepcopy(others)
    compute.apply(zeros)
    with torch.no_grad():
        for parameter in zeros.parameters():
            parameter.zero_()
    of_copy = torch.stack([_passes(cell, x)["output"] - x for cell in zeros])
    implementation._recomputing = recomputing
    return {
        "plain": plain, "compiled": found, "graphs": [*numbers, len(graphs)],
        "copy of zeros": of_copy, "cache": counters["aot_autograd"],
        "batches": batches, "graphs of batches": of_batches,
    }  # fmt: skip


def _refusal(settings: dict[str, Any]) -> str:
    try:
        Compute(**settings)
    except ValueError as error:
        return str(error)
    return "none"


if __name__ == "__main__":
    refusals = [_refusal(settings) for settings, _ in REFUSED]
    compared, known = {}, triton_operations.is_available
    for name, compute in COMPILED.items():
        triton_operations.is_available = (lambda device: True) if name == "triton" else known
        compared[name] = _compare(compute)
    everything = {"refusals": refusals, **compared}
    torch.save(everything, Path(sys.argv[1]) / "findings.pt")
