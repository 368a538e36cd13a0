"""Which checkpoints a SPEC names: one module per kind of source, names and duplicates."""
