"""Training on Ray Train: pretraining and continual learning."""
