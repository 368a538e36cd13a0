"""Text and token ids: where they come from and how they become instances of T tokens."""
