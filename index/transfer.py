"""A bundle as a release: pushed to a folder or an object store, pulled from it, each file checked by its SHA-256.

    URI/manifest.json            written last, as on disk: its presence proves the rest
    URI/...                      the bundle's files under the names that they have on disk
    URI/.transfer                while a push is under way: what is being pushed, so that it can go on

A folder that was pushed to is a bundle itself. A release never changes: another bundle needs another URI.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, Self

from tqdm import tqdm

from core.errors import BundleAltered, BundleIncomplete, BundleMissing, TransferError, UserError
from core.files import atomic_write, atomic_write_bytes, is_uri, report_disk_full, sha256_file, sync
from index.bundle import Bundle
from index.entity_encoder import ENTITY_ENCODER_FOLDER, EntityEncoder
from index.manifest import (
    INDEX_FILE,
    INDEX_MANIFEST_FILE,
    MANIFEST_FILE,
    FileEntry,
    IndexManifest,
    Manifest,
    fingerprint,
)

ENTITY_ENCODER_MANIFEST_FILE = f"{ENTITY_ENCODER_FOLDER}/manifest.json"
MARKER_FILE = ".transfer"

_READ_BYTES = 8 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Release:
    """What a transfer has to bring over: `files` in this order, then `manifests` in theirs, `manifest.json` last."""

    name: str
    fingerprint: str
    files: Mapping[str, FileEntry]
    manifests: Mapping[str, bytes]

    @property
    def label(self) -> str:
        return f"{self.name}@{self.fingerprint}"

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    @property
    def marker(self) -> bytes:
        """Equal for two transfers only if they bring over the same bytes."""
        listed = {name: asdict(entry) for name, entry in self.files.items()}
        manifests = {name: hashlib.sha256(content).hexdigest() for name, content in self.manifests.items()}
        return (json.dumps([listed, manifests], sort_keys=True) + "\n").encode()


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """What came of a push or a pull. `kept_*` was there already."""

    bundle: str
    files: int
    bytes: int
    kept_files: int
    kept_bytes: int


def push(bundle_path: Path, uri: str, *, verify: bool = False, progress: bool = False) -> Transferred:
    """Bring a bundle to a URI, or finish doing so: what is there of the same bundle already is not sent again.

    Every byte of the bundle is checked before; `verify` reads every byte back afterwards. Raises `BundleError` for a
    bundle that is not whole, `TransferError` where the URI holds something else or does not answer.
    """
    bundle = Bundle.open(bundle_path, verify="full")
    bundle.entity_encoder()
    release = _local_release(bundle)
    remote = Remote.open(uri)
    there = remote.sizes()
    _check_place(release, uri, there, remote.read)
    if MANIFEST_FILE not in there:
        remote.write(MARKER_FILE, release.marker)
    sent: dict[str, FileEntry] = {}
    with _bar(release, "push", progress) as bar:
        for name, entry in release.files.items():
            if there.get(name) != entry.bytes:
                remote.put(name, bundle.path / name)
                sent[name] = entry
            bar.update(entry.bytes)
    if verify:
        _read_back(release, remote, progress)
    for name, content in release.manifests.items():
        if name not in there:
            remote.write(name, content)
    if MARKER_FILE in remote.sizes():
        remote.remove(MARKER_FILE)
    return _transferred(release, sent)


def pull(uri: str, folder: Path, *, progress: bool = False) -> Transferred:
    """Bring a bundle from a URI into a folder, or finish doing so, within a file too. Every byte is hashed, of
    what is there already too; a file that is not what it should be is brought anew.

    Raises `BundleMissing`, `BundleIncomplete` or `BundleAltered` for what the URI holds, `TransferError` where the
    folder holds something else or the URI does not answer.
    """
    return _pull(Remote.open(uri), remote_release(uri), folder, hash_whole=True, progress=progress)


def local_bundle(source: str | Path, cache: Path | None) -> Path:
    """The folder of a bundle that is given as a folder or by URI; what a URI names is pulled into the cache folder
    first, unless it is there. Raises as `pull` does."""
    if not is_uri(source):
        return Path(source)
    uri = str(source)
    release = remote_release(uri)
    # By fingerprint: another bundle under the same URI is another folder, and the name comes from elsewhere.
    folder = (cache or default_cache()) / release.fingerprint
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder.with_name(f"{folder.name}.lock")):
            _pull(Remote.open(uri), release, folder, hash_whole=False, progress=False)
    except OSError as error:
        raise TransferError(
            f"{folder.parent} cannot keep a bundle ({error.strerror}); name another folder with WIKICLIP_BUNDLE_CACHE"
        ) from error
    return folder


def default_cache() -> Path:
    """Where bundles that were named by URI are kept: `wikiclip/bundles` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "wikiclip" / "bundles"


def remote_release(uri: str) -> Release:
    """What lies at a URI. Raises `BundleMissing`, `BundleIncomplete`, `BundleAltered` or `BundleSchemaMismatch`."""
    remote = Remote.open(uri)
    manifests = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in (ENTITY_ENCODER_MANIFEST_FILE, INDEX_MANIFEST_FILE, MANIFEST_FILE):
            content = remote.read(name)
            if content is not None:
                manifests[name] = content
                (Path(scratch) / name).parent.mkdir(exist_ok=True)
                (Path(scratch) / name).write_bytes(content)
        if MANIFEST_FILE not in manifests:
            if remote.read(MARKER_FILE) is not None:
                raise BundleIncomplete(f"{uri} is not pushed to its end; run `wikiclip bundle push` again")
            raise BundleMissing(f"{uri} has no {MANIFEST_FILE}; check the URI, or push a bundle to it")
        if INDEX_MANIFEST_FILE not in manifests:
            raise BundleIncomplete(f"{uri}/{INDEX_MANIFEST_FILE} is missing; push the bundle again")
        manifest = Manifest.read(Path(scratch) / MANIFEST_FILE)
        index_manifest = IndexManifest.read(Path(scratch) / INDEX_MANIFEST_FILE)
        side_files = EntityEncoder.read(Path(scratch)).files if ENTITY_ENCODER_MANIFEST_FILE in manifests else {}
    return _release(manifest, index_manifest, side_files, manifests)


def _local_release(bundle: Bundle) -> Release:
    side = bundle.entity_encoder()
    names = (ENTITY_ENCODER_MANIFEST_FILE, INDEX_MANIFEST_FILE, MANIFEST_FILE)
    manifests = {name: (bundle.path / name).read_bytes() for name in names if (bundle.path / name).is_file()}
    return _release(bundle.manifest, bundle.index_manifest, {} if side is None else side.files, manifests)


def _release(
    manifest: Manifest,
    index_manifest: IndexManifest,
    side_files: Mapping[str, FileEntry],
    manifests: Mapping[str, bytes],
) -> Release:
    files = {
        **manifest.files,
        INDEX_FILE: FileEntry(bytes=index_manifest.bytes, sha256=index_manifest.sha256),
        **{f"{ENTITY_ENCODER_FOLDER}/{name}": entry for name, entry in side_files.items()},
    }
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BundleAltered(f"the manifest of {manifest.name} names {name}, outside the bundle; export it again")
    return Release(
        name=manifest.name, fingerprint=fingerprint(manifest, index_manifest), files=files, manifests=manifests
    )


def _pull(remote: Remote, release: Release, folder: Path, *, hash_whole: bool, progress: bool) -> Transferred:
    there = {} if not folder.exists() else Remote.open(str(folder)).sizes()
    _check_place(release, str(folder), there, lambda name: (folder / name).read_bytes() if name in there else None)
    # What an attempt that was cut off has left is hashed; a whole bundle is checked when it is opened, too.
    whole = MANIFEST_FILE in there
    trusted = whole and not hash_whole
    with report_disk_full(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not whole:
            atomic_write_bytes(folder / MARKER_FILE, release.marker)
        received: dict[str, FileEntry] = {}
        with _bar(release, "pull", progress) as bar:
            for name, entry in release.files.items():
                if there.get(name) != entry.bytes or not (trusted or sha256_file(folder / name) == entry.sha256):
                    _receive(remote, name, entry, folder / name)
                    received[name] = entry
                bar.update(entry.bytes)
        for name, content in release.manifests.items():
            if name not in there:
                (folder / name).parent.mkdir(exist_ok=True)
                atomic_write_bytes(folder / name, content)
        (folder / MARKER_FILE).unlink(missing_ok=True)
    return _transferred(release, received)


def _receive(remote: Remote, name: str, entry: FileEntry, path: Path) -> None:
    """Bring over one file, going on where an earlier attempt ended."""
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
            raise BundleAltered(f"{remote.uri}/{name} is altered: its SHA-256 is not the manifest's; push it again")
        resumed = False  # what was left of the earlier attempt may be what is wrong
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def _check_place(release: Release, place: str, there: Mapping[str, int], read: Callable[[str], bytes | None]) -> None:
    """Raise `TransferError` unless the place is empty, or holds this release or a part of it."""
    if MANIFEST_FILE in there:
        for name, content in release.manifests.items():
            if name in there and read(name) != content:
                raise TransferError(
                    f"{place} holds another bundle than {release.label} ({name} differs); a release never changes: "
                    "choose another place"
                )
    elif there and read(MARKER_FILE) != release.marker:
        raise TransferError(
            f"{place} holds other files, or a part of another bundle than {release.label}; choose an empty place"
        )


def _read_back(release: Release, remote: Remote, progress: bool) -> None:
    with _bar(release, "verify", progress) as bar:
        for name, entry in release.files.items():
            if remote.sha256(name, bar.update) != entry.sha256:
                raise BundleAltered(f"{remote.uri}/{name} is altered: remove it there, and push again")


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Several services may share a cache folder: one pulls, the others wait and find it there."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _bar(release: Release, what: str, progress: bool) -> tqdm[NoReturn]:
    return tqdm(
        total=release.total_bytes,
        desc=f"{what} {release.label}",
        unit="B",
        unit_scale=True,
        disable=not progress,
    )


def _transferred(release: Release, moved: Mapping[str, FileEntry]) -> Transferred:
    moved_bytes = sum(entry.bytes for entry in moved.values())
    return Transferred(
        bundle=release.label,
        files=len(moved),
        bytes=moved_bytes,
        kept_files=len(release.files) - len(moved),
        kept_bytes=release.total_bytes - moved_bytes,
    )


CHUNK_BYTES = 16 * 1024**2  # one request to an object store
_EXTRAS = {"s3": "s3", "s3a": "s3"}


class Remote:
    """The files below a URI. A file appears there whole: it is renamed in a folder, and completed in an object store.

    Every method raises `TransferError`, one line, where the place does not answer as it should.
    """

    def __init__(self, uri: str, filesystem: Any, root: str, *, on_disk: bool) -> None:
        self.uri = uri
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._on_disk = on_disk  # where a file shows before it is whole, unless it is renamed

    @classmethod
    def open(cls, uri: str) -> Self:
        """`file://...`, `s3://bucket/...`, or the path of a folder."""
        # Imported late: a service that is given a folder starts without it.
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        protocol = uri.partition("://")[0] if "://" in uri else "file"
        try:
            # An instance of its own: listings that another has cached may be old.
            filesystem, root = url_to_fs(uri, skip_instance_cache=True)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            install = f"wikiclip-serve[{extra}]" if extra else "what fsspec wants for it"
            raise TransferError(f"{uri}: {protocol}:// needs a package ({error}); pip install '{install}'") from error
        except ValueError as error:
            raise TransferError(f"{uri} cannot be used ({error}); give a folder, file://... or s3://...") from error
        return cls(uri.rstrip("/"), filesystem, root, on_disk=isinstance(filesystem, LocalFileSystem))

    def sizes(self) -> dict[str, int]:
        """What is there now: each file's name and bytes."""
        with self._told():
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
        """The bytes of a small file; None where there is none."""
        with self._told():
            try:
                content: bytes = self._filesystem.cat_file(self._path(name))
            except FileNotFoundError:
                return None
        return content

    def write(self, name: str, content: bytes) -> None:
        with self._told():
            if self._on_disk:
                with atomic_write(self._folder_of(name)) as temporary:
                    temporary.write_bytes(content)
            else:
                self._filesystem.pipe_file(self._path(name), content)

    def put(self, name: str, source: Path) -> None:
        with self._told():
            if self._on_disk:
                with atomic_write(self._folder_of(name)) as temporary:
                    shutil.copyfile(source, temporary)
            else:
                self._filesystem.put_file(str(source), self._path(name))

    def chunks(self, name: str, start: int = 0) -> Iterator[bytes]:
        """The bytes of a file from `start` on."""
        with self._told():
            opened = self._filesystem.open(self._path(name), "rb", cache_type="none")
        with opened:
            opened.seek(start)
            while True:
                with self._told():
                    chunk: bytes = opened.read(CHUNK_BYTES)
                if not chunk:
                    return
                yield chunk

    def sha256(self, name: str, on_bytes: Callable[[int], object]) -> str:
        """The SHA-256 of what lies there: every byte is read back."""
        digest = hashlib.sha256()
        for chunk in self.chunks(name):
            digest.update(chunk)
            on_bytes(len(chunk))
        return digest.hexdigest()

    def remove(self, name: str) -> None:
        with self._told():
            self._filesystem.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _folder_of(self, name: str) -> Path:
        path = Path(self._path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever a driver raises (each has errors of its own) becomes one line that names the place."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TransferError(
                f"{self.uri} cannot be used ({reason}); check the URI, the network and the credentials, and run it "
                "again: what is there already stays"
            ) from error
