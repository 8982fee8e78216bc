"""Text and images: sources, tokens, windows and batches for training, calibration, evaluation."""
