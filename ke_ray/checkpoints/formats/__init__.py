"""Checkpoint files of Hugging Face, of OLMo and of training tools.

layout        the files that make a checkpoint, by their names
local         the layout of a folder or file on this machine
weights       tensors by name, without executing or copying anything
olmo          OLMo's fused tensors to transformers' and back
olmo_config   OLMo's config.yaml to a transformers configuration and back
dcp           folders of torch.distributed.checkpoint
tool_names    names of tensors in checkpoints of training tools
nanochat      nanochat's configuration
fingerprint   the canonical hash of weights
foreign       formats of other programs, and how to convert them
"""
