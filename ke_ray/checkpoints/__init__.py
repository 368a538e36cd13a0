"""A checkpoint series on disk or on the net: found, fetched, read and written.

``find`` says which checkpoints a SPEC names, ``fetch`` brings one into the node's cache, ``formats``
reads, hashes and writes its files. What happens to a model in memory stands in ``ke_ray.models``.
"""
