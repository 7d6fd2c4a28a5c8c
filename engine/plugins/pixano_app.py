"""Starts Pixano with the provider ``edge`` registered: ``python -m pixano_edge.engine.plugins.pixano_app server run``.

Pixano looks providers up in its registry and never searches installed packages for them. Arguments are those of the
``pixano`` command.
"""

from __future__ import annotations


def main() -> None:
    """Registers the provider and hands over to Pixano's command."""
    from ..provider.pixano import register

    register()
    from pixano.cli import main as pixano

    pixano()


if __name__ == "__main__":
    main()
