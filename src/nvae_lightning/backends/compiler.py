"""PyTorch's compiler, which takes seconds to import, and is so when it is first used."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

#: What is normalised is read from five tensors; more than four, and the compiler would write it to
#: memory to read it again.
_OPTIONS: dict[str, Any] = {"realize_reads_threshold": 16}


def inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:  # noqa: ANN401
    """Compile a graph, as a backend of ``torch.compile``."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, config_patches=_OPTIONS)


def compiled(*, dynamic: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function at its first call; a type checker's wrapper around it is taken off."""
    return lambda function: torch.compile(
        inspect.unwrap(function), dynamic=dynamic, backend=inductor
    )
