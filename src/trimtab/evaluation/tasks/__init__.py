"""Tasks: one file each, found by name (see `base.py`)."""
