"""A series of checkpoints on disk or on the net.

    reference    one checkpoint: its location, and what its name tells
    find/        the checkpoints that a SPEC names: one module per kind of source, names, duplicates
    fetch/       one checkpoint into the node's cache, within a budget and under a lease
    formats/     checkpoint files, Hugging Face and native OLMo: layout, tensors, hash, writing
    transfer     HTTP and retries, for ``find`` and ``fetch``
    hub          the client of the Hugging Face Hub, for both too

Models in memory are the subject of ``ke_ray.models``.
"""
