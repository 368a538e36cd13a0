"""Schemas of the study files in ``sweeps/``: one module for each kind of study."""
