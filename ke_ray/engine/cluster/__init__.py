"""Ray itself: the session, what nodes share, jobs, metrics."""
