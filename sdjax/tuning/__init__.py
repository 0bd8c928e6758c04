"""Tuning of a merge's constants, by gradient through the merge or by CMA-ES."""
