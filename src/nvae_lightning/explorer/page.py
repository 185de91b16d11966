"""The page: tabs of a model and of runs, and its server."""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

import gradio as gr

from nvae_lightning.explorer import between, fill_in, groups, likelihood, sample, training
from nvae_lightning.explorer.training import Runs
from nvae_lightning.explorer.workspace import MOST_UPLOADED_BYTES, Workspace

_MOST_WAITING = 100  # requests in the queue
_SECONDS_KEPT = 3600  # of pictures that were served

#: Small images fill their place, pixel by pixel, below the label; wide tables are scrolled.
_CSS = """
.pixels img { image-rendering: pixelated; }
.pixels .image-frame, .pixels .image-frame img {
    width: 100%; height: 100%; object-fit: contain;
}
.drawn .image-container { padding-top: 28px; background: black; }
.differing { overflow-x: auto; }
.differing td, .differing th { white-space: nowrap; }
"""
#: Tabs of a model.
_TABS = {
    "Sample": sample,
    "Groups": groups,
    "Between two images": between,
    "How likely": likelihood,
    "Fill in": fill_in,
}


def build_page(workspace: Workspace | None, runs: Runs | None = None) -> gr.Blocks:
    """Build the page, with a tab for each use of a model and one for runs.

    Args:
        workspace: Model, test images and limits; None for runs only.
        runs: Runs to compare; None for a model only.

    Raises:
        ValueError: If the memory budget is too small for the tabs.
    """
    if workspace is not None and workspace.most_images < groups.NUM_DRAWS:
        raise ValueError(
            f"memory_budget: got {workspace.memory_budget:,} bytes, but it must be enough for "
            f"{groups.NUM_DRAWS} images, and {max(0, workspace.most_images)} fit; set for example "
            "memory_budget=2e9"
        )
    page = gr.Blocks(
        title="NVAE", analytics_enabled=False, delete_cache=(_SECONDS_KEPT, _SECONDS_KEPT)
    )
    with page:
        if workspace is not None:
            for title, module in _TABS.items():
                with gr.Tab(title) as tab:
                    module.build(workspace, page, tab)
        if runs is not None:
            with gr.Tab("Training"):
                training.build(runs, page)
    return page.queue(max_size=_MOST_WAITING, api_open=False)  # no request passes the queue


def serve(page: gr.Blocks, server_name: str, server_port: int | None = None) -> str:
    """Serve a page, without sharing, analytics or files of this machine; return its address.

    Args:
        page: Page.
        server_name: Address to listen on.
        server_port: Port to listen on; None for a free one.

    Raises:
        ValueError: If the page cannot listen there.
    """
    try:
        _, address, _ = page.launch(
            server_name=server_name, server_port=server_port, share=False, quiet=True,
            inbrowser=False, prevent_thread_lock=True, show_error=True, allowed_paths=[],
            max_file_size=MOST_UPLOADED_BYTES, ssr_mode=False, enable_monitoring=False,
            footer_links=[], theme=_theme(), css=_CSS,
        )  # fmt: skip
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"server_port: got {server_port}, which is in use or no port, or {server_name} is no "
            "address of this machine; set another server_port from 1024 to 65535, or server_name"
        ) from error
    return address


def _theme() -> gr.themes.Base:
    """Return the default theme with fonts of the system, which need no network."""
    return gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
