"""The whole operation in plain PyTorch: the backend of CPUs, differentiable by autograd."""
