"""Parameterised kernels, stage by stage, in one folder a backend; `stages.py` is the contract they share."""
