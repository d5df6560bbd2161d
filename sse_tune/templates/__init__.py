"""Parameterised kernels, stage by stage, a folder for each backend; their contract: `buffers.py` and `stages.py`."""
