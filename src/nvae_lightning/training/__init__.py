"""Training by Lightning: the module, its callbacks, checkpoints and ranks."""
