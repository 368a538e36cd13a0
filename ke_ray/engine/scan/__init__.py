"""Scans on Ray Data."""
