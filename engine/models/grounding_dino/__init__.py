"""Grounding DINO: boxes for class names, with text features kept per list of classes."""
