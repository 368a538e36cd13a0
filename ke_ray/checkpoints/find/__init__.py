"""The checkpoints that a SPEC names.

catalog      from a SPEC to a listing: kinds of source, selection, unique names
folder       folders and globs, here and in object stores
hub_series   revisions of a Hugging Face repository
hub_places   its subfolders and commits; repositories of an organisation
csv_list     lists of step and folder, URL or repository
names        step, tokens and stage in a name
series       which checkpoints make one curve, and notes on a listing
duplicates   checkpoints with the same weights
"""
