"""Models and checkpoints as files: architecture, checked weights, folders and hub names."""
