"""Evaluation of a model in memory: probes, downstream tasks, held-out perplexity (no Ray)."""
