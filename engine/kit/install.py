"""Installing a verified kit without a network: a new environment from its wheels, and its bundles into a store."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .manifest import KitBundle, KitRefused, Manifest
from .verify import Say, check_file, verify

MARKER = ".kit-incomplete"


def default_store() -> Path:
    """Where pixano-edge looks for bundles: ``$PIXANO_EDGE_HOME/bundles`` or ``~/.local/share/pixano-edge/bundles``."""
    home = os.environ.get("PIXANO_EDGE_HOME")
    return Path(home).expanduser() / "bundles" if home else Path.home() / ".local/share/pixano-edge/bundles"


def install(
    kit: Path,
    key: bytes | None,
    *,
    venv: Path | None = None,
    store: Path | None = None,
    allow_unsigned: bool = False,
    system_site_packages: bool = False,
    say: Say = lambda _: None,
) -> tuple[Path, list[str]]:
    """Verifies a kit, installs its wheels into a new environment and copies its bundles into a store.

    Whatever stops it (a full disk, Ctrl-C, a wheel that does not fit), the new environment and the bundles that it
    added are removed again. After a power cut, the next run clears the half-made environment.

    Args:
        kit: The folder.
        key: As in `verify`.
        venv: Folder of the new environment; ``pixano-edge-<version>`` here if not given.
        store: Folder of bundles; `default_store` if not given. Bundles that are there already are left alone.
        allow_unsigned: As in `verify`.
        system_site_packages: The environment sees the system's packages (TensorRT on a Jetson).
        say: Gets lines for the user.

    Returns:
        The environment's folder, and the names of the bundles that were added.

    Raises:
        KitRefused: The kit does not verify, is for another machine or Python, or something is in its way.
    """
    manifest = verify(kit, key, allow_unsigned, say)
    say(f"{len(manifest.files)} files verified: pixano-edge {manifest.pixano_edge}, made {manifest.created}.")
    place = (venv or Path(f"pixano-edge-{manifest.pixano_edge}")).expanduser().absolute()
    root = (store or default_store()).expanduser().absolute()
    _check_machine(manifest)
    try:
        _check_place(place)
        wanted = [bundle for bundle in manifest.bundles if not _has_bundle(root, bundle)]
        _check_space(manifest, place, root)
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, place, ignore_errors=True)
            _fill_venv(kit, manifest, place, system_site_packages, say)
            for bundle in wanted:
                say(f"Bundle {bundle.name} ...")
                _add_bundle(kit, manifest, bundle, root, undo)
            (place / MARKER).unlink()
            undo.pop_all()
    except OSError as error:
        full = " The disk is full." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        message = f"Installation failed: {error}.{full} Nothing was kept."
        raise KitRefused(message, "Make room or check the rights, then try again.") from error
    return place, [bundle.name for bundle in wanted]


def _check_machine(manifest: Manifest) -> None:
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if here != manifest.python:
        raise KitRefused(
            f"The kit is for Python {manifest.python}, this is {here}.",
            f"Run it with python{manifest.python}, or make a kit with --python-version {here}.",
        )
    if platform.machine() != manifest.machine or sys.platform != "linux":
        raise KitRefused(
            f"The kit is for Linux on {manifest.machine}, this is {platform.system()} on {platform.machine()}.",
            "Make a kit for this machine with --platform.",
        )


def _check_place(place: Path) -> None:
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise KitRefused(f"'{place}' is not a folder.", "Choose another place with --venv.")
    if place.is_dir() and any(place.iterdir()) and not (place / MARKER).is_file():
        raise KitRefused(
            f"'{place}' exists already.",
            "Install beside it with --venv and switch over; or remove it first if it is of no use any more.",
        )


def _has_bundle(root: Path, bundle: KitBundle) -> bool:
    manifest = root / bundle.name / "manifest.json"
    if not (root / bundle.name).exists():
        return False
    if manifest.is_file() and hashlib.sha256(manifest.read_bytes()).hexdigest() == bundle.hash:
        return True
    raise KitRefused(
        f"The store '{root}' has another bundle '{bundle.name}' already.",
        f"Remove it first (pixano-edge bundle remove {bundle.name}), or give another store with --store.",
    )


def _check_space(manifest: Manifest, *places: Path) -> None:
    for place in places:
        there = place
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        if free < manifest.space_bytes:
            raise KitRefused(
                f"The kit needs {manifest.space_bytes / 1e6:.0f} MB; '{there}' has {free / 1e6:.0f} MB free.",
                "Make room, or choose another place with --venv and --store.",
            )


def _fill_venv(kit: Path, manifest: Manifest, place: Path, system: bool, say: Say) -> None:
    if place.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True)
    (place / MARKER).touch()
    say(f"Environment {place} ...")
    options = ["--system-site-packages"] if system else []
    # Without pip: Debian keeps what would bring it (ensurepip) in a package of its own; the kit has a pip.
    _run(
        [sys.executable, "-I", "-m", "venv", "--without-pip", *options, str(place)], "The environment could not be made"
    )
    work = place / ".kit"
    work.mkdir()
    wheels = work / "wheels"
    wheels.mkdir()
    for wheel in {manifest.pip, *(pin.wheel for pin in manifest.pins)}:
        check_file(kit, wheel, manifest.files[wheel], wheels / Path(wheel).name)
    requirements = work / "requirements.txt"
    requirements.write_text(requirements_text(manifest))
    say(f"{len(manifest.pins)} packages ...")
    python, pip = str(place / "bin" / "python"), str(wheels / Path(manifest.pip).name / "pip")
    flags = ["--no-index", "--find-links", str(wheels), "--require-hashes", "--no-deps", "--only-binary", ":all:"]
    flags += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--ignore-installed"]
    _run(
        [python, "-I", pip, "--isolated", "install", "-q", *flags, "-r", str(requirements)], "A package did not install"
    )
    shutil.rmtree(work)
    shown = _run([str(place / "bin" / "pixano-edge"), "--version"], "The installed command does not run")
    if manifest.pixano_edge not in shown.split():
        raise KitRefused(f"The installed command says {shown.strip()!r}.", "Report it to whoever made the kit.")


def requirements_text(manifest: Manifest) -> str:
    """The kit's packages as pip's hash-checked requirements."""
    lines = [f"{pin.name}=={pin.version} --hash=sha256:{manifest.files[pin.wheel].sha256}" for pin in manifest.pins]
    return "\n".join(lines) + "\n"


def _run(command: Sequence[str], failure: str) -> str:
    """Runs a command without pip's settings and without Python's paths from outside."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "VIRTUAL_ENV"))}
    env["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-15:])
        message = f"{failure} (exit status {done.returncode}):\n{last}\n"
        raise KitRefused(message, "Nothing was kept. The lines above say what is wrong.")
    return done.stdout


def _add_bundle(kit: Path, manifest: Manifest, bundle: KitBundle, root: Path, undo: contextlib.ExitStack) -> None:
    partial = root / f".{bundle.name}.kit-partial"  # a name with a dot in front is no bundle
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    undo.callback(shutil.rmtree, partial, ignore_errors=True)
    partial.mkdir()
    prefix = f"{bundle.folder}/"
    for name, entry in manifest.files.items():
        if name.startswith(prefix):
            copy = partial / name[len(prefix) :]
            copy.parent.mkdir(parents=True, exist_ok=True)
            check_file(kit, name, entry, copy)
    target = root / bundle.name
    os.rename(partial, target)
    undo.callback(shutil.rmtree, target, ignore_errors=True)
