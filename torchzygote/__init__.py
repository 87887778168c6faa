"""torchzygote: Zygote's utilities for PyTorch."""
