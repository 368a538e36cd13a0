"""Checkpoints and the models in them: where each architecture keeps its memories, and scoring."""

from __future__ import annotations
