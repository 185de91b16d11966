"""Checkpoints of the published code."""
