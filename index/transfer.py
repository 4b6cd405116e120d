"""Push a bundle to a folder or an object store, and pull it from there. Every file is checked by its SHA-256.

    URI/manifest.json            written last, as on disk: its presence proves that the rest is complete
    URI/...                      the bundle's files under the same names
    URI/.transfer                during a push: identifies the bundle, so that the push can be resumed

A folder that was pushed to is a bundle. A pushed bundle never changes: another one needs another URI.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self

from tqdm import tqdm

from core.errors import BundleAltered, BundleIncomplete, BundleMissing, TransferError, UserError
from core.files import atomic_write, atomic_write_bytes, is_uri, report_disk_full, sha256_file, sync
from index.bundle import Bundle, check_names
from index.entity_encoder import ENTITY_ENCODER_FOLDER, ENTITY_ENCODER_MANIFEST_FILE, EntityEncoder
from index.manifest import (
    INDEX_FILE,
    INDEX_MANIFEST_FILE,
    MANIFEST_FILE,
    FileEntry,
    IndexManifest,
    Manifest,
    fingerprint,
)

MARKER_FILE = ".transfer"
CHUNK_BYTES = 16 * 1024**2  # one request to an object store
_MANIFESTS = (ENTITY_ENCODER_MANIFEST_FILE, INDEX_MANIFEST_FILE, MANIFEST_FILE)  # in the order that they are written
_READ_BYTES = 8 * 1024**2
_EXTRAS = {"s3": "s3", "s3a": "s3"}  # protocol to extra


class Remote:
    """The files below a URI, through fsspec. A file appears only when it is complete.

    Every method raises `TransferError` for whatever goes wrong.
    """

    def __init__(self, uri: str) -> None:
        """`uri` is `file://...`, `s3://bucket/...`, or the path of a folder."""
        # Imported late: a service with a local bundle does not need fsspec.
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        protocol = uri.partition("://")[0] if "://" in uri else "file"
        try:
            # A new instance, because a cached one may have old listings.
            self._filesystem, root = url_to_fs(uri, skip_instance_cache=True)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            install = f"wikiclip-serve[{extra}]" if extra else "the package that fsspec names"
            raise TransferError(f"{uri}: {protocol}:// needs a package ({error}); pip install '{install}'") from error
        except ValueError as error:
            raise TransferError(f"{uri} cannot be used ({error}); give a folder, file://... or s3://...") from error
        self.uri = uri.rstrip("/")
        self._root = root.rstrip("/")
        self._on_disk = isinstance(self._filesystem, LocalFileSystem)

    def sizes(self) -> dict[str, int]:
        """Return the name and size of each file."""
        with self._as_transfer_error():
            self._filesystem.invalidate_cache()
            if not self._filesystem.exists(self._root):
                return {}
            found = self._filesystem.find(self._root, detail=True)
        return {
            path.removeprefix(self._root).lstrip("/"): int(details["size"])
            for path, details in found.items()
            if details["type"] == "file"
        }

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or None if there is none."""
        with self._as_transfer_error():
            try:
                content: bytes = self._filesystem.cat_file(self._path(name))
            except FileNotFoundError:
                return None
        return content

    def write(self, name: str, content: bytes) -> None:
        with self._as_transfer_error(), self._target(name) as path:
            self._filesystem.pipe_file(path, content)

    def put(self, name: str, source: Path) -> None:
        """Copy a local file."""
        with self._as_transfer_error(), self._target(name) as path:
            self._filesystem.put_file(str(source), path)

    def chunks(self, name: str, start: int = 0) -> Iterator[bytes]:
        """Yield the content of a file from `start` on."""
        with self._as_transfer_error():
            opened = self._filesystem.open(self._path(name), "rb", cache_type="none")
        with opened:
            opened.seek(start)
            while True:
                with self._as_transfer_error():
                    chunk: bytes = opened.read(CHUNK_BYTES)
                if not chunk:
                    return
                yield chunk

    def remove(self, name: str) -> None:
        with self._as_transfer_error():
            self._filesystem.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _target(self, name: str) -> Iterator[str]:
        """Yield the path to write to. In a folder, that is a temporary file which is renamed when complete."""
        if not self._on_disk:
            yield self._path(name)
            return
        path = Path(self._path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            yield str(temporary)

    @contextmanager
    def _as_transfer_error(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # each fsspec driver has its own exceptions
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TransferError(
                f"{self.uri} cannot be used ({reason}); check the URI, the network and the credentials, and run it "
                "again: finished files stay"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Release:
    """What a transfer copies: `files`, then `manifests`, each in order, `manifest.json` last."""

    name: str
    fingerprint: str
    files: Mapping[str, FileEntry]
    manifests: Mapping[str, bytes]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifests in a folder."""
        manifests = {name: (folder / name).read_bytes() for name in _MANIFESTS if (folder / name).is_file()}
        manifest = Manifest.read(folder / MANIFEST_FILE)
        index_manifest = IndexManifest.read(folder / INDEX_MANIFEST_FILE)
        encoder_files = (
            EntityEncoder.read(folder / ENTITY_ENCODER_MANIFEST_FILE).files
            if ENTITY_ENCODER_MANIFEST_FILE in manifests
            else {}
        )
        files = {
            **manifest.files,
            INDEX_FILE: index_manifest.file,
            **{f"{ENTITY_ENCODER_FOLDER}/{name}": entry for name, entry in encoder_files.items()},
        }
        check_names(files, f"the manifest of {manifest.name}")
        return cls(
            name=manifest.name, fingerprint=fingerprint(manifest, index_manifest), files=files, manifests=manifests
        )

    @property
    def label(self) -> str:
        return f"{self.name}@{self.fingerprint}"

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    @property
    def marker(self) -> bytes:
        """The content of the marker file: equal only for transfers of the same bytes."""
        listed = {name: entry.model_dump() for name, entry in self.files.items()}
        manifests = {name: hashlib.sha256(content).hexdigest() for name, content in self.manifests.items()}
        return (json.dumps([listed, manifests], sort_keys=True) + "\n").encode()


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """The result of a push or pull. `kept_*` counts what was already there."""

    bundle: str
    files: int
    bytes: int
    kept_files: int
    kept_bytes: int

    @classmethod
    def of(cls, release: Release, moved: list[FileEntry]) -> Self:
        moved_bytes = sum(entry.bytes for entry in moved)
        return cls(
            bundle=release.label,
            files=len(moved),
            bytes=moved_bytes,
            kept_files=len(release.files) - len(moved),
            kept_bytes=release.total_bytes - moved_bytes,
        )


def push(bundle_path: Path, uri: str, *, verify: bool = False, progress: bool = False) -> Transferred:
    """Copy a bundle to a URI, or finish an interrupted push.

    Every byte of the bundle is hashed first. `verify` reads every byte back afterwards. Raise `BundleError` if the
    bundle is incomplete or altered, `TransferError` if the URI holds something else or does not answer.
    """
    bundle = Bundle.open(bundle_path, verify="full")
    bundle.entity_encoder()
    release = Release.read(bundle_path)
    remote = Remote(uri)
    present = remote.sizes()
    _check_target(release, uri, present, remote.read)
    if MANIFEST_FILE not in present:
        remote.write(MARKER_FILE, release.marker)
    sent: list[FileEntry] = []
    with _bar(release, "push", progress) as bar:
        for name, entry in release.files.items():
            if present.get(name) != entry.bytes:
                remote.put(name, bundle.path / name)
                sent.append(entry)
            bar.update(entry.bytes)
    if verify:
        _read_back(release, remote, progress)
    for name, content in release.manifests.items():
        if name not in present:
            remote.write(name, content)
    if MARKER_FILE in remote.sizes():
        remote.remove(MARKER_FILE)
    return Transferred.of(release, sent)


def pull(uri: str, folder: Path, *, progress: bool = False) -> Transferred:
    """Copy a bundle from a URI to a folder, or finish an interrupted pull, also in the middle of a file.

    Every byte is hashed, also of files that were already there. Altered files are fetched again. Raise `BundleMissing`,
    `BundleIncomplete` or `BundleAltered` if the URI has no intact bundle, `TransferError` if the folder holds something
    else or the URI does not answer.
    """
    return _pull(Remote(uri), remote_release(uri), folder, hash_complete=True, progress=progress)


def local_bundle(source: str | Path, cache: Path | None) -> Path:
    """Return the folder of a bundle. Pull it into the cache first if it is given by URI. Raise as `pull` does."""
    if not is_uri(source):
        return Path(source)
    uri = str(source)
    release = remote_release(uri)
    # Named by fingerprint only: another bundle at the same URI gets another folder, and the name is not trusted.
    folder = (cache or default_cache()) / release.fingerprint
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Services may share a cache: one of them pulls, the others wait.
        with folder.with_name(f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _pull(Remote(uri), release, folder, hash_complete=False, progress=False)
    except OSError as error:
        raise TransferError(
            f"{folder.parent} cannot store a bundle ({error.strerror}); choose another folder with "
            "WIKICLIP_BUNDLE_CACHE"
        ) from error
    return folder


def default_cache() -> Path:
    """Return the cache of bundles given by URI: `wikiclip/bundles` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "wikiclip" / "bundles"


def remote_release(uri: str) -> Release:
    """Read the manifests at a URI.

    Raise `BundleMissing`, `BundleIncomplete`, `BundleAltered` or `BundleSchemaMismatch`.
    """
    remote = Remote(uri)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in _MANIFESTS:
            if (content := remote.read(name)) is not None:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
        if not (folder / MANIFEST_FILE).exists():
            if remote.read(MARKER_FILE) is not None:
                raise BundleIncomplete(f"the push to {uri} is not finished; run `wikiclip bundle push` again")
            raise BundleMissing(f"{uri} has no {MANIFEST_FILE}; check the URI, or push a bundle to it")
        if not (folder / INDEX_MANIFEST_FILE).exists():
            raise BundleIncomplete(f"{uri}/{INDEX_MANIFEST_FILE} is missing; push the bundle again")
        return Release.read(folder)


def _pull(remote: Remote, release: Release, folder: Path, *, hash_complete: bool, progress: bool) -> Transferred:
    """Fetch what is missing. Files of a complete bundle are hashed only if asked for: opening it checks them too."""
    present = Remote(str(folder)).sizes() if folder.exists() else {}
    _check_target(release, str(folder), present, lambda name: (folder / name).read_bytes() if name in present else None)
    complete = MANIFEST_FILE in present
    trusted = complete and not hash_complete
    received: list[FileEntry] = []
    with report_disk_full(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not complete:
            atomic_write_bytes(folder / MARKER_FILE, release.marker)
        with _bar(release, "pull", progress) as bar:
            for name, entry in release.files.items():
                if present.get(name) != entry.bytes or not (trusted or sha256_file(folder / name) == entry.sha256):
                    _receive(remote, name, entry, folder / name)
                    received.append(entry)
                bar.update(entry.bytes)
        for name, content in release.manifests.items():
            if name not in present:
                (folder / name).parent.mkdir(exist_ok=True)
                atomic_write_bytes(folder / name, content)
        (folder / MARKER_FILE).unlink(missing_ok=True)
    return Transferred.of(release, received)


def _receive(remote: Remote, name: str, entry: FileEntry, path: Path) -> None:
    """Fetch a file, continuing where an earlier attempt ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    resumed = partial.exists() and 0 < partial.stat().st_size <= entry.bytes
    while True:
        digest = hashlib.sha256()
        with partial.open("r+b" if resumed else "wb") as file:
            if resumed:
                while chunk := file.read(_READ_BYTES):
                    digest.update(chunk)
            for chunk in remote.chunks(name, file.tell()) if file.tell() < entry.bytes else ():
                file.write(chunk)
                digest.update(chunk)
        if digest.hexdigest() == entry.sha256:
            break
        partial.unlink()
        if not resumed:
            raise BundleAltered(f"{remote.uri}/{name} is altered: its SHA-256 differs from the manifest's; push again")
        resumed = False  # the earlier attempt's part may be the altered one: start over
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def _check_target(
    release: Release, target: str, present: Mapping[str, int], read: Callable[[str], bytes | None]
) -> None:
    """Raise `TransferError` unless the target is empty or holds all or part of this release."""
    if MANIFEST_FILE in present:
        for name, content in release.manifests.items():
            if name in present and read(name) != content:
                raise TransferError(
                    f"{target} holds another bundle than {release.label} ({name} differs); a release never changes: "
                    "choose another place"
                )
    elif present and read(MARKER_FILE) != release.marker:
        raise TransferError(
            f"{target} holds other files, or part of another bundle than {release.label}; choose an empty place"
        )


def _read_back(release: Release, remote: Remote, progress: bool) -> None:
    with _bar(release, "verify", progress) as bar:
        for name, entry in release.files.items():
            digest = hashlib.sha256()
            for chunk in remote.chunks(name):
                digest.update(chunk)
                bar.update(len(chunk))
            if digest.hexdigest() != entry.sha256:
                raise BundleAltered(f"{remote.uri}/{name} is altered: remove it there, and push again")


def _bar(release: Release, action: str, progress: bool) -> tqdm[NoReturn]:
    return tqdm(
        total=release.total_bytes, desc=f"{action} {release.label}", unit="B", unit_scale=True, disable=not progress
    )
