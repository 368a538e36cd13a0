"""The step loop and what surrounds it. No Ray here: workers see a small context instead."""
