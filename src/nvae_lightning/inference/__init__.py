"""What is done with a trained model: loading, evaluation, sampling, anomaly scores."""
