"""The search loop, its store, baselines and preference pairs."""
