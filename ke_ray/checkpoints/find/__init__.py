"""The checkpoints that a SPEC names.

catalog      from a SPEC to a listing: kinds of source, selection, unique names
folder       folders and globs, here and in object stores
hub_series   revisions of a Hugging Face repository
csv_list     lists of step and folder or URL
names        step, tokens and stage in a name
series       which checkpoints make one curve, and notes on a listing
duplicates   checkpoints with the same weights
"""
