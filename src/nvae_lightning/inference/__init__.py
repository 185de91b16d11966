"""Use of trained models: loading, evaluation, sampling, anomaly scores."""

from nvae_lightning.inference.loading import load_model

__all__ = ["load_model"]
