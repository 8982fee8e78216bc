"""Text and images for calibration and evaluation."""
