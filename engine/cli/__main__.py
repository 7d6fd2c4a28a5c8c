"""``python -m pixano_edge.engine.cli``: the command where no console script was installed."""

from .main import main

if __name__ == "__main__":
    main()
