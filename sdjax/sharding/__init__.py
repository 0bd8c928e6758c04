"""Meshes, axis rules and multi-host set-up."""
