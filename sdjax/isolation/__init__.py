"""Confined processes for untrusted work, which can be killed.

A job is given by a module name; its input and output are bytes.
"""
