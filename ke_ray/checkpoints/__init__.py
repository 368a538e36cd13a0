"""A checkpoint series on disk or on the net: found, fetched, read and written.

``find`` says which checkpoints a SPEC names, ``fetch`` brings one into the node's cache, ``formats``
reads, hashes and writes its files. A model in memory is the subject of ``ke_ray.models``.
"""
