"""A checkpoint series on disk or on the net: found, fetched, read and written.

``find`` says which checkpoints a SPEC names, ``fetch`` brings one into the node's cache, and
``formats`` reads, hashes and writes its files. Models in memory are the subject of
``ke_ray.models``.
"""
