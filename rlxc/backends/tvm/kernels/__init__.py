"""Kernels: templates with knobs, one idea in each file."""
