"""`pixano-edge kit`: everything that a box without a network needs in one signed folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..bundle import Bundle
from ..errors import EdgeError
from ..kit import install as installing
from ..kit import verify as verifying
from ..kit.manifest import INSTALLER, KitRefused
from .options import resolve_bundle
from .output import JsonOption, bytes_text, note, print_facts, print_json

app = typer.Typer(help="Make, verify and install kits for boxes without a network.", no_args_is_help=True)

KitFolder = Annotated[Path, typer.Argument(help="The kit's folder.")]
KeyOption = Annotated[
    str | None, typer.Option("--key", help="The maker's public key: its 64 hexadecimal digits, or the .pub file.")
]
UnsignedOption = Annotated[
    bool,
    typer.Option(
        "--allow-unsigned",
        help="Without a key: compare checksums alone. They find damage, but do not tell who made the kit.",
    ),
]


@app.command()
def keygen(
    file: Annotated[Path, typer.Argument(help="Private key to write; the public one gets the suffix .pub.")],
    passphrase: Annotated[bool, typer.Option(help="Ask for a passphrase and encrypt the private key.")] = True,
) -> None:
    """Make a key pair for signing kits."""
    from ..kit.signing import generate

    secret = None
    if passphrase:
        secret = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)
    public, digits = generate(file.expanduser(), secret)
    note(f"Private key: {file}. Keep it off the boxes. Public key: {public}. Give it, or these digits, to them:")
    typer.echo(digits)


@app.command()
def create(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make.")],
    bundles: Annotated[
        list[str] | None,
        typer.Option("--bundle", "--bundles", "-b", help="Bundle by name or folder, or NAME=FOLDER. Repeat for more."),
    ] = None,
    engines: Annotated[
        Path | None, typer.Option(help="Folder with TensorRT engines of these bundles (pixano-edge build).")
    ] = None,
    extras: Annotated[str, typer.Option(help="Extras of pixano-edge, separated by commas.")] = "cpu,detection,server",
    more: Annotated[
        list[str] | None, typer.Option("--with", help="Another requirement, such as 'cuda-bindings<13'. Repeatable.")
    ] = None,
    platform: Annotated[
        str | None,
        typer.Option(help="Box it is for: manylinux_2_35_aarch64 (glibc 2.35) and so on; default: this machine."),
    ] = None,
    python_version: Annotated[str | None, typer.Option(help="Its Python, such as 3.10; default: this one's.")] = None,
    wheels: Annotated[
        Path | None, typer.Option(help="Take all wheels from this folder instead of fetching them.")
    ] = None,
    wheel: Annotated[
        Path | None, typer.Option(help="pixano-edge's own wheel; a source checkout builds it if absent.")
    ] = None,
    sign: Annotated[Path | None, typer.Option(help="Private key to sign with (pixano-edge kit keygen).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a kit. Fetching wheels needs a network; installing the kit does not."""
    from ..kit.create import create as make
    from ..kit.signing import load, public_digits
    from ..kit.wheels import Target

    key = load(sign.expanduser(), lambda: str(typer.prompt("Passphrase", hide_input=True, err=True))) if sign else None
    with _refused():
        made = make(
            out,
            target=Target.of(platform, python_version),
            extras=[name.strip() for name in extras.split(",") if name.strip()],
            bundles=[_named(text) for text in bundles or ()],
            engines=engines,
            wheels=wheels,
            own_wheel=wheel,
            more=more or (),
            key=key,
            say=note,
        )
    signer = public_digits(key) if key is not None else None
    size = sum(entry.size for entry in made.manifest.files.values())
    names = [bundle.name for bundle in made.manifest.bundles]
    facts = {
        "kit": str(made.folder),
        "pixano-edge": made.manifest.pixano_edge,
        "for": f"Python {made.manifest.python} on {made.manifest.machine}",
        "files": len(made.manifest.files),
    }
    if as_json:
        print_json({**facts, "bytes": size, "bundles": names, "signed by": signer, INSTALLER: made.installer})
        return
    shown = {"size": bytes_text(size), "bundles": ", ".join(names) or "none", "signed by": signer or "nobody"}
    print_facts("Kit", {**facts, **shown, INSTALLER: f"sha256 {made.installer}"})
    if key is None:
        note("This kit is not signed, and installs only with --allow-unsigned. Sign it with --sign.")
    else:
        note("Give the two numbers (signed by, install.pyz) to the box's operator another way than the kit.")


@app.command()
def verify(
    kit: KitFolder, key: KeyOption = None, allow_unsigned: UnsignedOption = False, as_json: JsonOption = False
) -> None:
    """Check a kit: its signature, every file's size and SHA-256, nothing missing, nothing added."""
    with _refused():
        manifest = verifying.verify(kit, _key(key), allow_unsigned, note)
    facts = {
        "kit": str(kit),
        "signature": "verified" if key is not None else "NOT CHECKED",
        "pixano-edge": manifest.pixano_edge,
        "for": f"Python {manifest.python} on {manifest.machine}",
        "created": manifest.created,
        "files": len(manifest.files),
    }
    bundles = {bundle.name: bundle.hash for bundle in manifest.bundles}
    packages = {pin.name: pin.version for pin in manifest.pins}
    if as_json:
        print_json({**facts, "extras": manifest.extras, "bundles": bundles, "packages": packages})
        return
    shown = {
        "extras": ", ".join(manifest.extras),
        "bundles": ", ".join(bundles) or "none",
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }
    print_facts("Kit", {**facts, **shown})


@app.command()
def install(
    kit: KitFolder,
    key: KeyOption = None,
    venv: Annotated[
        Path | None, typer.Option(help="Folder of the new environment; pixano-edge-<version> if absent.")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Folder for the bundles; the local store if absent.")] = None,
    allow_unsigned: UnsignedOption = False,
    system_site_packages: Annotated[
        bool, typer.Option("--system-site-packages", help="See the system's packages: TensorRT on a Jetson.")
    ] = False,
) -> None:
    """Verify a kit and install it without a network, into a new environment."""
    with _refused():
        place, added = installing.install(
            kit,
            _key(key),
            venv=venv,
            store=store,
            allow_unsigned=allow_unsigned,
            system_site_packages=system_site_packages,
            say=note,
        )
    note(f"Bundles added: {', '.join(added) or 'none'}. Next: {place}/bin/pixano-edge doctor")
    typer.echo(str(place))


def _key(text: str | None) -> bytes | None:
    return verifying.read_public_key(text) if text else None


def _named(text: str) -> tuple[str, Path]:
    """``NAME=FOLDER``, a folder (its own name), or a name in the store."""
    name, equals, folder = text.partition("=")
    if equals and name and not Path(text).exists():
        return name, Path(folder).expanduser()
    path = resolve_bundle(text)
    return (Bundle.open(path, verify=False).manifest.name if Path(text).expanduser().is_dir() else text), path


@contextmanager
def _refused() -> Iterator[None]:
    """The installer stands alone and has an error of its own."""
    try:
        yield
    except KitRefused as error:
        raise EdgeError(error.message, error.action) from error
