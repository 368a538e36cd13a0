"""Fetching of checkpoints to this node.

checkpoint   one checkpoint, from its source into a local folder
cache        the folders of a node, shared by its processes, within a byte budget
leases       which cached checkpoints are in use
"""
