"""Checkpoint files of Hugging Face and of OLMo.

layout        the files that make a checkpoint, by their names
weights       tensors by name, without executing or copying anything
olmo          OLMo's fused tensors to transformers' and back
olmo_config   OLMo's config.yaml to a transformers configuration and back
fingerprint   the canonical hash of weights
foreign       formats of other programs, and how to convert them
"""
