"""Pictures, tables and pages made from result files alone (no torch, no Ray, no MLflow)."""

from __future__ import annotations
