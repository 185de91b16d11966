"""PyTorch's compiler, imported at first use as that takes seconds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

#: A normalisation reads five tensors. With more than four, the compiler would by default write its
#: result to memory and read it again.
_OPTIONS: dict[str, Any] = {"realize_reads_threshold": 16}


def inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:  # noqa: ANN401
    """Compile a graph; a backend for ``torch.compile``."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, config_patches=_OPTIONS)


def compiled(*, dynamic: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function at its first call, without the type checker's wrapper around it."""
    return lambda function: torch.compile(
        inspect.unwrap(function), dynamic=dynamic, backend=inductor
    )
