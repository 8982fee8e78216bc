"""One training loop for pretraining, fine-tuning, distilling and sparse training."""
