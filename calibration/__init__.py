"""Build time of Pixano Edge: smaller variants of a bundle within an accuracy budget (not there yet)."""
