"""Kits: one folder with wheels, bundles and engines that installs without a network.

`create` packs one and signs it. `verify` and `install` need the standard library alone: they are also the installer
that lies in a kit (`installer`, `archive`), for a box that has Python and nothing else.
"""
