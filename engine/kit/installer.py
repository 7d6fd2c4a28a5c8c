"""The command line of ``install.pyz``, the installer that lies in every kit; standard library alone.

    python3 install.pyz --key PUBLIC_KEY [--venv FOLDER] [--store FOLDER]

The archive holds this file and the modules that it imports, so ``pixano-edge kit install`` and the installer are one
implementation. The alternative to `ed25519` was to install the kit's own ``cryptography`` wheel and verify with it,
which runs code from the kit before the kit is verified. For the same reason an installer that came *with* a kit proves
nothing by itself: whoever altered the kit could have altered it. Compare its SHA-256 with the one that ``kit create``
printed, which like the public key must come another way than the kit does, or keep the installer on the machine from
the first time. An archive and not a plain script, because Python looks for modules in a script's folder first: a
``json.py`` put beside the script would run before anything is verified.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from .install import install
from .manifest import KitRefused
from .verify import read_public_key, verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``install.pyz``; returns the exit status."""
    parser = argparse.ArgumentParser(description="Verify a Pixano Edge kit and install it without a network.")
    parser.add_argument(
        "kit", nargs="?", type=Path, default=Path(sys.argv[0]).absolute().parent, help="default: where this file is"
    )
    parser.add_argument("--key", help="the maker's public key: 64 hexadecimal digits or a file")
    parser.add_argument("--allow-unsigned", action="store_true", help="check the checksums alone, if there is no key")
    parser.add_argument("--venv", type=Path, help="folder of the new environment (default: pixano-edge-<version>)")
    parser.add_argument("--store", type=Path, help="folder for the bundles (default: pixano-edge's own)")
    parser.add_argument("--system-site-packages", action="store_true", help="for TensorRT of a Jetson's system")
    parser.add_argument("--verify-only", action="store_true", help="check the kit and stop")
    args = parser.parse_args(arguments)

    def say(text: str) -> None:
        sys.stderr.write(text + "\n")

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, stop)
        key = read_public_key(args.key) if args.key else None
        if args.verify_only:
            manifest = verify(args.kit, key, args.allow_unsigned, say)
            say(f"{len(manifest.files)} files verified: pixano-edge {manifest.pixano_edge}, made {manifest.created}.")
            return 0
        place, added = install(
            args.kit,
            key,
            venv=args.venv,
            store=args.store,
            allow_unsigned=args.allow_unsigned,
            system_site_packages=args.system_site_packages,
            say=say,
        )
    except KitRefused as error:
        say(f"Error: {error.message}\n{error.action}")
        return 1
    except KeyboardInterrupt:
        say("Stopped. Nothing was kept.")
        return 130
    say(f"Installed. Bundles added: {', '.join(added) or 'none'}. Next: {place}/bin/pixano-edge doctor")
    return 0
