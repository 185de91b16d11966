"""What the tabs build their pages from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gradio as gr
import torch

from nvae_lightning.explorer.workspace import Workspace
from nvae_lightning.utilities.plain_data import shown

_MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # one request computes at a time


def received(component: Any, preprocess: Callable[[Any], Any], payload: Any) -> Any:  # noqa: ANN401
    """Return the value of a component; show anything else that was sent as a message.

    It replaces ``preprocess`` of all inputs: gradio lets NaN and fractions pass, and describes
    other mistakes, for example an empty field, by types and components.

    Args:
        component: Component.
        preprocess: Its own function of what was sent.
        payload: What the browser or a client sent.

    Raises:
        gradio.Error: If it is not a value of the component.
    """
    rule = "must be one of its values; choose again"
    try:
        if isinstance(component, gr.Image):
            return None if payload is None else payload.path  # decoded with our limits
        if not isinstance(component, gr.Slider | gr.Number):
            return preprocess(payload)
        low, high = component.minimum, component.maximum
        rule = f"must be a number from {low} to {high}; enter one"
        if low <= payload <= high:
            return round(payload) if component.step == 1 else float(payload)
    except (gr.Error, TypeError):
        pass
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    value = "nothing" if payload is None else shown(payload)
    raise gr.Error(f"{component.label}: got {value}, but it {rule}", print_exception=False)


def answer(
    triggers: Sequence[Any],
    function: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    workspace: Workspace | None = None,
    *,
    name: str | None = None,
) -> None:
    """Call a function on events; show a ValueError as a message on the page.

    Args:
        triggers: Events of components.
        function: Function of the values of `inputs` that returns those of `outputs`.
        inputs: Components.
        outputs: Components.
        workspace: Workspace, if the function uses the model; requests then wait in a queue.
        name: Name for clients; None hides the function from them.
    """

    def call(*values: Any, **more: Any) -> Any:  # noqa: ANN401 -- values of components
        try:
            if workspace is None:
                return function(*values, **more)
            with torch.no_grad(), workspace.precision():
                return function(*values, **more)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    for component in inputs:
        if getattr(component.preprocess, "func", None) is not received:
            component.preprocess = partial(received, component, component.preprocess)
    call.__signature__ = inspect.signature(function)  # pyright: ignore -- read by gradio
    gr.on(
        list(triggers), call, list(inputs), list(outputs), api_name=name,
        api_visibility="private" if name is None else "public",
        show_progress="minimal" if workspace else "hidden", trigger_mode="always_last",
        **(_MODEL if workspace else {}),
    )  # fmt: skip


def picture_box(label: str, **settings: Any) -> gr.Image:
    """Return a place for images, whose pixels stay visible when they are enlarged."""
    return plot_box(label, elem_classes=["pixels", "drawn"], **settings)


def plot_box(label: str, **settings: Any) -> gr.Image:
    """Return a place for a plot, which can be downloaded and enlarged."""
    return gr.Image(
        label=label, format="png", interactive=False, buttons=["download", "fullscreen"],
        **settings,
    )  # fmt: skip


def image_picker(workspace: Workspace, label: str, place: float = 0.0) -> gr.Image:
    """Return an image to upload or to choose from the test images.

    Args:
        workspace: Test images.
        label: Label of the image.
        place: Place of the first choice among the test images, 0 to 1.
    """
    tests = workspace.test_set
    index = 0 if tests is None else int(place * len(tests))
    image = gr.Image(
        None if tests is None else workspace.test_picture(index), type="filepath", format="png",
        image_mode=None, sources=["upload", "clipboard"], label=label, height=240,
        elem_classes="pixels",
    )  # fmt: skip
    if tests is not None and len(tests) > 1:
        number = gr.Slider(0, len(tests) - 1, index, step=1, label=f"{label}: test image")
        answer([number.change], workspace.test_picture, [number], [image])
    return image


def first_shown(workspace: Workspace, tab: gr.Tab) -> list[Any]:
    """Return the event of opening a tab, if there is a test image to begin with."""
    return [] if workspace.test_set is None else [tab.select]


def seed_box() -> gr.Number:
    """Return a seed."""
    return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)


def group_names(workspace: Workspace) -> list[tuple[str, int]]:
    """Return a label for every group."""
    shapes = workspace.model.latent_shapes
    return [(f"{group} ({h}×{w})", group) for group, (_, h, w) in enumerate(shapes)]


def scale_names(workspace: Workspace) -> list[tuple[str, int]]:
    """Return a label for every scale."""
    names: dict[int, str] = {}
    for (scale, _), (_, height, width) in zip(
        workspace.model.hierarchy.groups, workspace.model.latent_shapes, strict=True
    ):
        names[scale] = f"{height}×{width}"
    return [(name, scale) for scale, name in names.items()]
