"""Small things that many rooms need: files that are never half written, and nested dicts with dotted names.

A path is local, or an object store's (gs://...), which `etils.epath` reads and writes in the same words as pathlib.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from etils import epath


def is_remote(path: str | os.PathLike) -> bool:
    """gs://bucket/... and the like: whole objects that are put and fetched, not files that can be appended to or locked."""
    return "://" in str(path)


def as_path(path: str | os.PathLike) -> Path:
    """A pathlib path, or for a remote one epath's, which has the same methods but no links, locks or appending."""
    return cast(Path, epath.Path(path)) if is_remote(path) else local_path(path)


def local_path(path: str | os.PathLike) -> Path:
    """A pathlib path, `~` being the home folder; ~nobody stays as it is."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """What can be made again and takes long lies here: $THERAPY_JAX_CACHE, or else ~/.cache/therapy_jax."""
    return local_path(os.environ.get("THERAPY_JAX_CACHE") or "~/.cache/therapy_jax")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write by rename, so that a reader never sees half a file. (An object store's objects come into being whole.)"""
    path = as_path(path)
    partial = path if is_remote(path) else path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    if partial != path:
        os.replace(partial, path)


def write_json(path: str | os.PathLike, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def share(path: Path) -> None:
    """Give a file the rights that any new file gets: safetensors writes for its owner alone, and others are to load it."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextlib.contextmanager
def staged(folder: str | os.PathLike, last: str) -> Iterator[Path]:
    """A local folder to write files into: the folder itself, or for a remote one a stand-in whose files are copied there at
    the end, `last` last: what has it is whole."""
    if not is_remote(folder):
        as_path(folder).mkdir(parents=True, exist_ok=True)
        yield as_path(folder)
        return
    with tempfile.TemporaryDirectory() as here:
        yield Path(here)
        as_path(folder).mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(here).iterdir(), key=lambda path: path.name == last):
            (as_path(folder) / path.name).write_bytes(path.read_bytes())


def fetched(folder: str | os.PathLike) -> Path:
    """A folder's files on this machine: itself, or for a remote one a copy in a folder that is gone when the process ends."""
    if not is_remote(folder):
        return as_path(folder)
    here = tempfile.TemporaryDirectory(prefix="therapy_jax_")
    atexit.register(here.cleanup)
    for path in as_path(folder).iterdir():
        if path.is_file():
            (Path(here.name) / path.name).write_bytes(path.read_bytes())
    return Path(here.name)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
