"""The manifest of a checkpoint: what makes a folder one, written last."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from data.errors import StoreError
from data.files import Folder

MANIFEST = "manifest.json"
_FORMAT = 1
_FIELDS = {
    "format": int,
    "step": int,
    "kept": bool,
    "world_size": int,
    "files": dict,
    "values": dict,
}


def write_manifest(folder: Folder, fields: dict[str, Any]) -> None:
    """Commits a checkpoint, whose files are there."""
    manifest = {"format": _FORMAT, **fields}
    folder.write_json(MANIFEST, {**manifest, "sha256": manifest_digest(manifest)})


def read_manifest(folder: Folder, step: int) -> dict[str, Any]:
    """The manifest of a whole checkpoint of `step`. Raises `ValueError` naming what is wrong."""
    with _readable(MANIFEST):
        try:
            manifest: dict[str, Any] = folder.read_json(MANIFEST)
        except FileNotFoundError:
            raise ValueError("not whole: a save was interrupted") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"{MANIFEST}: not of format {_FORMAT}")
    digest = manifest.pop("sha256", None)
    if digest != manifest_digest(manifest):
        raise ValueError(f"{MANIFEST} does not match its checksum")
    problem = _problem(manifest, step)
    if problem:
        raise ValueError(f"{MANIFEST}: {problem}")
    for name, digest in manifest["files"].items():
        with _readable(name):
            if "/" in name or not folder.exists(name):
                raise ValueError(f"{name} is missing")
            if folder.digest(name) != digest:
                raise ValueError(f"{name} does not match its checksum")
    return manifest


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """A local file that cannot be read is a damaged one; a store that fails is no fault of it."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def _problem(manifest: dict[str, Any], step: int) -> str:
    """What is not as a save of `step` writes it; empty where nothing is."""
    for key, kind in _FIELDS.items():
        if type(manifest.get(key)) is not kind:
            return f"{key} is not of type {kind.__name__}"
    if manifest["step"] != step:
        return f"of step {manifest['step']}"
    if manifest["world_size"] < 1:
        return f"world_size is {manifest['world_size']}"
    files = manifest["files"]
    if ".metadata" not in files or not all(isinstance(digest, str) for digest in files.values()):
        return "files does not name the checksum of each file"
    return ""


def manifest_digest(manifest: dict[str, Any]) -> str:
    """The SHA-256 over all fields but the digest itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
