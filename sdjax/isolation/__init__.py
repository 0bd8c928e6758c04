"""Run untrusted work in confined processes that can be killed.

Knows nothing of the work itself: a job is a module name, its input and output are bytes.
"""
