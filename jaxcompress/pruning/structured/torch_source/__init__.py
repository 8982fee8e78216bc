"""PyTorch networks as source text: `torch_module` writes them beside their weights.

Nothing here is imported by the package. In each file CONFIG is replaced by the model's own.
"""
