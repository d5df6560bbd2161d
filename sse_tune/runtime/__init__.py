"""Running a problem: which plan (`dispatch.py`), its launches (`pipeline.py`) and the public operation (`ops.py`)."""
