"""Module files that are written beside weights for PyTorch; none of them is imported here."""
