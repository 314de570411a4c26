"""Exchange of weights with PyTorch."""
