"""Errors, configuration, logging and progress bars, shared by all other packages."""
