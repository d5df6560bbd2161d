"""The Triton templates: one file a stage. `common.py` holds what their kernels share."""
