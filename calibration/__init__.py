"""Build time of Pixano Edge: smaller and faster variants of a bundle within an accuracy budget. Needs no torch."""
