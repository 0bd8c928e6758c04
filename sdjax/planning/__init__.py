"""Compile-only checks for accelerator topologies: what a program would need, without the device."""
