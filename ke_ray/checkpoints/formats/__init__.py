"""Checkpoint files, Hugging Face and native OLMo: layout, tensors, hash, writing."""
