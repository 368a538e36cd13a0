"""Models in memory: architectures, loading and saving, capture of coefficients, scoring."""
