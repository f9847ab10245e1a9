"""The last two files of an artefact, its card and its manifest, and its way into the directory of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

from upq.artifact.card import model_card
from upq.artifact.manifest import MANIFEST, Manifest, write_manifest
from upq.files.atomic import atomic_write, write_errors
from upq.files.digests import TEMPLATES


def describe(directory: Path, manifest: Manifest) -> None:
    """Write the card and then the manifest, whose presence means that the artefact is complete."""
    atomic_write(directory / "README.md", model_card(manifest))
    write_manifest(directory, manifest)


def publish(made: Path, out: Path, manifest: Manifest) -> None:
    """Move the artefact of the directory `made`, with `manifest`, into the directory `out`; the manifest moves last.

    `out` may hold other files. A kill in between leaves no manifest there.
    """
    describe(made, manifest)
    with write_errors(out):
        (out / MANIFEST).unlink(missing_ok=True)  # of an artefact that this one replaces, as are the templates
        if (out / TEMPLATES).is_dir():
            shutil.rmtree(out / TEMPLATES)
        for path in sorted(made.iterdir(), key=lambda path: path.name == MANIFEST):
            path.replace(out / path.name)
