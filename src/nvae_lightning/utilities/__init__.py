"""What several rooms share: files written whole, signals, figures, data read safely."""
