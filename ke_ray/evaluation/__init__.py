"""What a model knows: probes, downstream tasks, held-out perplexity. No Ray in here."""
