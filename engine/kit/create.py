"""Making a kit: wheels, bundles and engines in one folder, with a manifest of every file, signed."""

from __future__ import annotations

import datetime
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..build.key import EngineKey
from ..build.pack import pack_engines
from ..bundle import Bundle
from ..bundle.files import Staging, hash_file, os_errors
from ..bundle.store import DEMO_NAMES
from ..errors import BundleError, EdgeError
from ..runtime.engine_file import SUFFIX, read_header
from . import signing
from .archive import write_installer
from .manifest import FORMAT, INSTALLER, MANIFEST, SIGNATURE, VERSION, Manifest
from .verify import verify
from .wheels import PROJECT, Closure, Target, Wheel, build_project, closure, download, incomplete, read_wheel

_README = """\
Pixano Edge {version} for Linux on {machine} with Python {python}. Made {created}.

Install without a network (Python {python} is all that the machine needs):

    sha256sum install.pyz        # compare with the number that the kit's maker gave you
    python{python} install.pyz --key <the maker's public key>

The number and the key must reach you another way than this folder does. With pixano-edge installed already:

    pixano-edge kit install <this folder> --key <the maker's public key>
"""

_LICENCES = "Each package and each model has a licence of its own; 'pixano-edge bundle inspect' shows a model's."

Say = Callable[[str], None]


@dataclass(frozen=True)
class Made:
    """A finished kit: its folder, what its manifest says, and the SHA-256 of its installer."""

    folder: Path
    manifest: Manifest
    installer: str
    signed: bool


def create(
    out: Path,
    *,
    target: Target,
    extras: Sequence[str] = ("cpu",),
    bundles: Sequence[tuple[str, Path]] = (),
    engines: Path | None = None,
    wheels: Path | None = None,
    own_wheel: Path | None = None,
    more: Sequence[str] = (),
    key: Any = None,
    say: Say = lambda _: None,
) -> Made:
    """Makes a kit.

    Args:
        out: Folder to make; appears whole or not at all.
        target: The box.
        extras: Extras of pixano-edge to bring.
        bundles: Name in the store of the box, and folder here.
        engines: Folder below which engine files lie; those built from the bundles' graphs come along, inside them.
        wheels: Folder of wheels to take everything from; without it pip fetches them.
        own_wheel: pixano-edge's wheel; built from the source checkout if not given.
        more: Further requirements, as in a requirements file.
        key: Private key; None leaves the kit unsigned.
        say: Gets lines for the user.

    Raises:
        EdgeError: Wheels are missing, a bundle is not valid or its name is taken, or the folder cannot be written.
    """
    out = out.expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EdgeError(f"'{out}' exists already.", "Choose another folder with --out.")
    _check_names([name for name, _ in bundles])
    with Staging(out) as staging, os_errors(f"writing '{out}'"):
        root = staging.root
        held, own = _collect(root / "wheels", target, extras, wheels, own_wheel, more, say)
        listed = _copy_bundles(root, bundles, engines, say)
        write_installer(root / INSTALLER)
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        about = {"version": own.version, "machine": target.machine, "python": target.python, "created": created}
        (root / "README.txt").write_text(f"{_README.format(**about)}\n{_LICENCES}\n")
        pins = _pins(root, held)
        space = sum(w.unpacked + w.file.stat().st_size for w in held.wheels.values())
        space += sum(p.stat().st_size for p in (root / "bundles").rglob("*") if p.is_file())
        (root / "requirements.txt").write_text(_requirements(pins))
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "pixano_edge": own.version,
            "extras": sorted(extras),
            "created": created,
            "python": target.python,
            "machine": target.machine,
            "space_bytes": space,
            "pip": f"wheels/{held.wheels['pip'].file.name}",
            "requirements": [{k: pin[k] for k in ("name", "version", "wheel")} for pin in pins],
            "bundles": listed,
            "files": _files(root),
        }
        data = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
        (root / MANIFEST).write_bytes(data)
        if key is not None:
            (root / SIGNATURE).write_text(signing.sign(key, data).hex() + "\n")
        public = bytes.fromhex(signing.public_digits(key)) if key is not None else None
        checked = verify(root, public, allow_unsigned=key is None)
        folder = staging.publish()
    return Made(folder, checked, hash_file(folder / INSTALLER), key is not None)


def source_checkout() -> Path | None:
    """The source checkout that this package runs from, or None."""
    folder = Path(__file__).resolve().parents[2]
    project = folder / "pyproject.toml"
    return folder if project.is_file() and f'name = "{PROJECT}"' in project.read_text() else None


def _check_names(names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise EdgeError(f"Two bundles are called '{twice[0]}'.", "Give one of them another name: NAME=FOLDER.")
    if demo := sorted(set(names) & set(DEMO_NAMES)):
        raise EdgeError(
            f"'{demo[0]}' is in every installation already, and its name is taken.",
            "Leave it out, or give it another name: NAME=FOLDER.",
        )


def _collect(
    folder: Path,
    target: Target,
    extras: Sequence[str],
    wheels: Path | None,
    own_wheel: Path | None,
    more: Sequence[str],
    say: Say,
) -> tuple[Closure, Wheel]:
    """Fills the folder of wheels with exactly what the box needs; returns it, and pixano-edge's own wheel."""
    folder.mkdir()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".wheels-") as scratch:
        work = Path(scratch)
        for file in sorted(wheels.glob("*.whl")) if wheels is not None else ():
            shutil.copyfile(file, work / file.name)
        if own_wheel is not None:
            shutil.copyfile(own_wheel, work / own_wheel.name)
        elif not list(work.glob("pixano_edge-*.whl")):
            source = source_checkout()
            if source is None:
                raise EdgeError(
                    "There is no wheel of pixano-edge, and this is not a source checkout to build one from.",
                    "Name it with --wheel.",
                )
            say("Building pixano-edge's wheel ...")
            build_project(source, work)
        own = read_wheel(max(work.glob("pixano_edge-*.whl"), key=lambda file: file.stat().st_mtime))
        wanted = f"{PROJECT}[{','.join(sorted(extras))}]" if extras else PROJECT
        requirements = [f"{wanted}=={own.version}", "pip", *more]
        if wheels is None:
            say(f"Fetching wheels for Python {target.python} on {target.machine} ...")
            found = download(requirements, work, target)
        else:
            found = closure(requirements, work, target)
            if found.missing:
                raise incomplete(found)
        _check_extras(found, extras)
        kept = {}
        for name, wheel in found.wheels.items():
            place = folder / wheel.file.name
            shutil.move(wheel.file, place)
            kept[name] = read_wheel(place)
    return Closure(kept), kept[PROJECT]


def _check_extras(found: Closure, extras: Sequence[str]) -> None:
    """pip only warns about an extra that does not exist."""
    import email.parser
    import zipfile

    file = found.wheels[PROJECT].file
    with zipfile.ZipFile(file) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        head = email.parser.Parser().parsestr(archive.read(name).decode(), headersonly=True)
    known = set(head.get_all("Provides-Extra") or ())
    if unknown := sorted(set(extras) - known):
        raise EdgeError(f"pixano-edge has no extra '{unknown[0]}'.", f"Known: {', '.join(sorted(known))}.")


def _pins(root: Path, held: Closure) -> list[dict[str, str]]:
    return [
        {
            "name": wheel.name,
            "version": wheel.version,
            "wheel": f"wheels/{wheel.file.name}",
            "sha256": hash_file(root / "wheels" / wheel.file.name),
        }
        for wheel in sorted(held.wheels.values(), key=lambda w: w.name)
    ]


def _requirements(pins: Sequence[dict[str, str]]) -> str:
    """For people and for other tools; the installer takes the same from the manifest."""
    return "".join(f"{pin['name']}=={pin['version']} --hash=sha256:{pin['sha256']}\n" for pin in pins)


def _copy_bundles(
    root: Path, bundles: Sequence[tuple[str, Path]], engines: Path | None, say: Say
) -> list[dict[str, str]]:
    folder = root / "bundles"
    folder.mkdir()
    found = _engine_files(engines) if engines is not None else []
    used: set[Path] = set()
    listed = []
    for name, source in bundles:
        say(f"Bundle {name} ...")
        bundle = Bundle.open(source)
        graphs = {entry.sha256 for entry in bundle.manifest.files.values()}
        fitting = [file for file, graph in found if graph in graphs]
        used |= set(fitting)
        target = folder / name
        if fitting:
            pack_engines(bundle, fitting, target)
        else:
            for rel in bundle.contents():
                (target / rel).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.root / rel, target / rel)
        copy = Bundle.open(target)  # the source may have changed since it was verified
        listed.append({"name": name, "hash": copy.hash, "folder": f"bundles/{name}"})
    if found and not used:
        raise EdgeError(
            f"None of the {len(found)} engines below '{engines}' was built from these bundles.",
            "Name the bundles they belong to with --bundle.",
        )
    if len(used) < len(found):
        say(f"{len(found) - len(used)} engines belong to other bundles and were left out.")
    return listed


def _engine_files(folder: Path) -> list[tuple[Path, str]]:
    """Engine files below a folder, with the SHA-256 of the graph that each was built from."""
    files = sorted(folder.rglob(f"*{SUFFIX}"))
    if not files:
        raise EdgeError(f"There is no engine (*{SUFFIX}) below '{folder}'.", "Build them first: pixano-edge build")
    try:
        return [(file, EngineKey.from_dict(read_header(file).key).graph_sha256) for file in files]
    except BundleError as error:
        raise EdgeError(f"An engine below '{folder}': {error.message}", "Remove it or build it again.") from error


def _files(root: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        found[path.relative_to(root).as_posix()] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    return found
