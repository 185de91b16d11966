"""A page to explore a model and runs; requires the extra ``explore`` (gradio)."""
