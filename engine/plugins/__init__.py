"""Modules that run inside other programs: Pixano itself, and its inference server on Ray."""
