"""A series of checkpoints on disk or on the net.

    reference    one checkpoint: its location, and what its name tells
    find/        the checkpoints that a SPEC names: one module per kind of source, names, duplicates
    fetch/       one checkpoint into the node's cache, within a budget and under a lease
    formats/     checkpoint files of Hugging Face, OLMo and training tools: layout, tensors, hash
    transfer     files over HTTP, for ``find`` and ``fetch``
    pieces       files that arrive in ranges over several connections; ``retries`` of each
    hub          the Hugging Face Hub, for both too; ``hub_api`` makes its requests

Models in memory are the subject of ``ke_ray.models``.
"""
