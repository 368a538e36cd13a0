"""Corpora packed on Ray Data."""
