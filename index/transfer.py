"""Push a bundle to a folder or an object store, and pull it from there. Every file is checked by its SHA-256.

    URI/manifest.json            written last, as on disk: its presence proves that the rest is complete
    URI/...                      the bundle's files under the same names
    URI/.transfer                during a push: identifies the bundle, so that the push can be resumed

A folder that was pushed to is a bundle. A pushed bundle never changes: another one needs another URI.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Self

from tqdm import tqdm

from core.errors import BundleAltered, BundleIncomplete, BundleMissing, TransferError, UserError, missing_extra
from core.files import atomic_write, is_uri, locked, report_disk_full, sha256_file, sync
from index.bundle import Bundle, check_names
from index.manifest import (
    ENTITY_ENCODER_FOLDER,
    ENTITY_ENCODER_MANIFEST_FILE,
    INDEX_FILE,
    INDEX_MANIFEST_FILE,
    MANIFEST_FILE,
    EntityEncoder,
    FileEntry,
    IndexManifest,
    Manifest,
    fingerprint,
)

MARKER_FILE = ".transfer"
_SCHEMES = ("file", "s3", "s3a")
CHUNK_BYTES = 16 * 1024**2  # one request to an object store
FILES_AT_ONCE = 16  # of those up to a chunk. Larger ones go one by one: s3fs may hold 500 MB of each in memory
_MANIFESTS = (ENTITY_ENCODER_MANIFEST_FILE, INDEX_MANIFEST_FILE, MANIFEST_FILE)  # in the order that they are written


class Remote:
    """The files below a URI, through fsspec. A file appears only when it is complete.

    Every method raises `TransferError` for whatever goes wrong, `MissingExtra` if the URI needs a package.
    """

    def __init__(self, uri: str) -> None:
        """`uri` is `file://...`, `s3://bucket/...`, or the path of a folder."""
        scheme = uri.partition("://")[0] if is_uri(uri) else "file"
        if scheme not in _SCHEMES or "::" in uri:  # fsspec would chain several
            raise TransferError(
                f"{uri} is not a place for bundles; give a folder, file://... or s3://... (which needs the extra s3)"
            )
        # Imported late: a service with a local bundle does not need fsspec.
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        try:
            # A new instance, because a cached one may have old listings.
            options = {"config_kwargs": {"max_pool_connections": FILES_AT_ONCE}} if scheme.startswith("s3") else {}
            self._filesystem, root = url_to_fs(uri, skip_instance_cache=True, **options)
        except ImportError as error:
            raise missing_extra(uri, "s3fs") from error
        except Exception as error:  # each fsspec driver has its own exceptions
            raise TransferError(f"{uri} cannot be used ({error}); give a folder, file://... or s3://...") from error
        self.uri = uri.rstrip("/")
        self._root = root.rstrip("/")
        self._on_disk = isinstance(self._filesystem, LocalFileSystem)

    def sizes(self) -> dict[str, int]:
        """Return the name and size of each file."""
        with self._as_transfer_error():
            if not self._filesystem.exists(self._root):
                return {}
            found = self._filesystem.find(self._root, detail=True)
        return {path.removeprefix(self._root).lstrip("/"): int(details["size"]) for path, details in found.items()}

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or None if there is none."""
        with self._as_transfer_error(), suppress(FileNotFoundError):
            content: bytes = self._filesystem.cat_file(self._path(name))
            return content
        return None

    def write(self, name: str, content: bytes) -> None:
        with self._as_transfer_error(), self._target(name) as path:
            self._filesystem.pipe_file(path, content)

    def put(self, name: str, source: Path) -> None:
        """Copy a local file."""
        with self._as_transfer_error(name), self._target(name) as path:
            self._filesystem.put_file(str(source), path)

    def chunks(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the content of a file between two positions."""
        for position in range(start, end, CHUNK_BYTES):
            until = min(position + CHUNK_BYTES, end)
            with self._as_transfer_error(name):
                chunk: bytes = self._filesystem.cat_file(self._path(name), start=position, end=until)
            yield chunk

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        with self._as_transfer_error(), suppress(FileNotFoundError):
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
        with report_disk_full(path), atomic_write(path) as temporary:
            yield str(temporary)

    @contextmanager
    def _as_transfer_error(self, name: str = "") -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # each fsspec driver has its own exceptions
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TransferError(
                f"{self.uri}/{name} cannot be used ({reason}); check the URI, the network and the credentials, and run "
                "it again: finished files stay"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Release:
    """What a transfer copies: `files`, then `manifests`, each in order, `manifest.json` last."""

    name: str
    fingerprint: str
    files: Mapping[str, FileEntry]
    manifests: Mapping[str, bytes]

    @classmethod
    def read(cls, remote: Remote) -> Self:
        """Read the manifests at a URI.

        Raise `BundleMissing`, `BundleIncomplete`, `BundleAltered` or `BundleSchemaMismatch`.
        """
        manifests = {name: content for name in _MANIFESTS if (content := remote.read(name)) is not None}
        if MANIFEST_FILE not in manifests:
            if remote.read(MARKER_FILE) is not None:
                raise BundleIncomplete(f"the push to {remote.uri} is not finished; run `wikiclip bundle push` again")
            raise BundleMissing(f"{remote.uri} has no {MANIFEST_FILE}; check the URI, or push a bundle to it")
        if INDEX_MANIFEST_FILE not in manifests:
            raise BundleIncomplete(f"{remote.uri}/{INDEX_MANIFEST_FILE} is missing; push the bundle again")
        manifest = Manifest.parse(manifests[MANIFEST_FILE], f"{remote.uri}/{MANIFEST_FILE}")
        index_manifest = IndexManifest.parse(manifests[INDEX_MANIFEST_FILE], f"{remote.uri}/{INDEX_MANIFEST_FILE}")
        encoder_files: Mapping[str, FileEntry] = {}
        if (content := manifests.get(ENTITY_ENCODER_MANIFEST_FILE)) is not None:
            encoder_files = EntityEncoder.parse(content, f"{remote.uri}/{ENTITY_ENCODER_MANIFEST_FILE}").files
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


def push(bundle_path: Path, uri: str, *, verify: bool = False, progress: bool = False) -> Transferred:
    """Copy a bundle to a URI, or finish an interrupted push.

    Every byte of the bundle is hashed first. `verify` reads every byte back afterwards. Raise `BundleError` if the
    bundle is incomplete or altered, `TransferError` if the URI holds something else or does not answer.
    """
    Bundle.open(bundle_path, verify="full").entity_encoder()
    release = Release.read(Remote(str(bundle_path)))
    remote = Remote(uri)
    with _unfinished(release, remote) as present:

        def send(name: str, entry: FileEntry) -> bool:
            if present.get(name) == entry.bytes:
                return False
            remote.put(name, bundle_path / name)
            return True

        def check(name: str, entry: FileEntry) -> bool:
            digest = hashlib.sha256()
            for chunk in remote.chunks(name, 0, entry.bytes):
                digest.update(chunk)
            if digest.hexdigest() != entry.sha256:
                raise BundleAltered(f"{uri}/{name} is altered: remove it there, and push again")
            return True

        sent = _for_each_file(release, send, "push", progress)
        if verify:
            _for_each_file(release, check, "verify", progress)
    return sent


def pull(uri: str, folder: Path, *, progress: bool = False) -> Transferred:
    """Copy a bundle from a URI to a folder, or finish an interrupted pull, also in the middle of a file.

    Every byte is hashed, also of files that were already there. Altered files are fetched again. Raise `BundleMissing`,
    `BundleIncomplete` or `BundleAltered` if the URI has no intact bundle, `TransferError` if the folder holds something
    else or the URI does not answer.
    """
    remote = Remote(uri)
    return _pull(remote, Release.read(remote), folder, hash_complete=True, progress=progress)


def local_bundle(source: str | Path, cache: Path | None) -> Path:
    """Return the folder of a bundle. Pull it into the cache first if it is given by URI. Raise as `pull` does.

    The default cache is `wikiclip/bundles` in the user's cache folder.
    """
    if not is_uri(source):
        return Path(source)
    remote = Remote(str(source))
    release = Release.read(remote)
    # Named by fingerprint only: another bundle at the same URI gets another folder, and the name is not trusted.
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (cache or user_cache / "wikiclip" / "bundles") / release.fingerprint
    try:
        with locked(folder):  # services may share a cache: one of them pulls, the others wait
            _pull(remote, release, folder, hash_complete=False, progress=False)
    except OSError as error:
        raise TransferError(
            f"{folder.parent} cannot store a bundle ({error.strerror}); choose another folder with "
            "WIKICLIP_BUNDLE_CACHE"
        ) from error
    return folder


def _pull(remote: Remote, release: Release, folder: Path, *, hash_complete: bool, progress: bool) -> Transferred:
    """Fetch what is missing. Files of a complete bundle are hashed only if asked for: opening it checks them too."""
    with report_disk_full(folder), _unfinished(release, Remote(str(folder))) as present:
        trusted = MANIFEST_FILE in present and not hash_complete

        def receive(name: str, entry: FileEntry) -> bool:
            if present.get(name) == entry.bytes and (trusted or sha256_file(folder / name) == entry.sha256):
                return False
            _receive(remote, name, entry, folder / name)
            return True

        received = _for_each_file(release, receive, "pull", progress)
    return received


def _receive(remote: Remote, name: str, entry: FileEntry, path: Path) -> None:
    """Fetch a file, continuing where an earlier attempt ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    resumed = partial.exists()
    with partial.open("ab") as file:
        for chunk in remote.chunks(name, file.tell(), entry.bytes):
            file.write(chunk)
    if sha256_file(partial) == entry.sha256:
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
        return
    partial.unlink()
    if not resumed:
        raise BundleAltered(f"{remote.uri}/{name} is altered: its SHA-256 differs from the manifest's; push again")
    _receive(remote, name, entry, path)  # the earlier attempt's part may be the altered one


@contextmanager
def _unfinished(release: Release, target: Remote) -> Iterator[Mapping[str, int]]:
    """Yield the sizes of the target's files. Write the marker file first if it is new, and the manifests at the end.

    Raise `TransferError` unless the target is empty or holds all or part of this release.
    """
    present = target.sizes()
    if MANIFEST_FILE in present:
        for name, content in release.manifests.items():
            if name in present and target.read(name) != content:
                raise TransferError(
                    f"{target.uri} holds another bundle than {release.label} ({name} differs); a release never "
                    "changes: choose another place"
                )
    else:
        if present and target.read(MARKER_FILE) != release.marker:
            raise TransferError(
                f"{target.uri} holds other files, or part of another bundle than {release.label}; choose an empty place"
            )
        target.write(MARKER_FILE, release.marker)
    yield present
    for name, content in release.manifests.items():
        if name not in present:
            target.write(name, content)
    target.remove(MARKER_FILE)


def _for_each_file(
    release: Release, transfer: Callable[[str, FileEntry], bool], action: str, progress: bool
) -> Transferred:
    """Call `transfer` for every file, many small ones at a time. It returns whether the file was not there.

    After an error, no transfer is running. After Ctrl-C, they run until the process ends: its threads are daemons.
    """
    files = moved_bytes = 0
    large = [file for file in release.files.items() if file[1].bytes > CHUNK_BYTES]
    small = [file for file in release.files.items() if file[1].bytes <= CHUNK_BYTES]
    description = f"{action} {release.label}"
    with (
        tqdm(total=release.total_bytes, desc=description, unit="B", unit_scale=True, disable=not progress) as bar,
        ThreadPool(FILES_AT_ONCE) as pool,
    ):

        def run(file: tuple[str, FileEntry]) -> tuple[FileEntry, bool]:
            return file[1], transfer(*file)

        try:
            for entry, is_moved in chain(pool.imap_unordered(run, small), map(run, large)):
                bar.update(entry.bytes)
                files += is_moved
                moved_bytes += is_moved * entry.bytes
        except Exception:
            pool.terminate()
            pool.join()
            raise
    return Transferred(
        bundle=release.label,
        files=files,
        bytes=moved_bytes,
        kept_files=len(release.files) - files,
        kept_bytes=release.total_bytes - moved_bytes,
    )
