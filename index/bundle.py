"""Opening a bundle: what it holds, and that it is whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Literal

from core.errors import BundleAltered, BundleIncomplete, BundleMissing
from core.files import sha256_file
from index.calibration import Calibration, OpenSetModel
from index.embeddings import EmbeddingShards
from index.entity_encoder import ENTITY_ENCODER_FOLDER, EntityEncoder
from index.manifest import (
    EMBEDDINGS_FOLDER,
    INDEX_FILE,
    INDEX_MANIFEST_FILE,
    MANIFEST_FILE,
    OPEN_SET_FILE,
    STORE_FILE,
    FileEntry,
    IndexManifest,
    Manifest,
    fingerprint,
)
from index.search import EntityIndex
from index.store import EntityStore

Verify = Literal["quick", "full"]

_SMALL_BYTES = 64 * 1024 * 1024  # hashed at every start; of larger files a quick check compares the size only
_HASHED_BYTES = 256 * 1024 * 1024  # in all: shards are small files, and hashing all of millions of embeddings is slow


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle that has been checked. Its parts are opened anew by each call; the caller owns what it gets."""

    path: Path
    manifest: Manifest
    index_manifest: IndexManifest
    fingerprint: str

    @classmethod
    def open(cls, path: Path, verify: Verify = "quick") -> Bundle:
        """Check a bundle and read its manifests.

        `quick` checks that every file is there, its size, and the hash of those up to 64 MiB, embeddings last, until
        256 MiB are hashed; `full` hashes every byte. Raises `BundleMissing`, `BundleIncomplete` (a file or the
        manifest is missing), `BundleAltered` (a size or hash differs) or `BundleSchemaMismatch`, naming the file.
        """
        manifest = open_manifest(path, verify)
        index_manifest_path = path / INDEX_MANIFEST_FILE
        if not index_manifest_path.is_file():
            raise BundleIncomplete(f"{index_manifest_path} is missing; build the index with `wikiclip index`")
        index_manifest = IndexManifest.read(index_manifest_path)
        entry = FileEntry(bytes=index_manifest.bytes, sha256=index_manifest.sha256)
        hashed = verify == "full" or entry.bytes <= _SMALL_BYTES
        _check_file(path / INDEX_FILE, entry, "build the index again with `wikiclip index`", hashed=hashed)
        return cls(
            path=path,
            manifest=manifest,
            index_manifest=index_manifest,
            fingerprint=fingerprint(manifest, index_manifest),
        )

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def image_encoder_path(self) -> Path:
        return self.path / self.manifest.image_encoder.file

    @cached_property
    def calibration(self) -> Calibration | None:
        """None where the bundle was exported without validation queries."""
        if self.manifest.calibration is None:
            return None
        has_model = OPEN_SET_FILE in self.manifest.files
        model = OpenSetModel.read(self.path / OPEN_SET_FILE) if has_model else None
        return Calibration.from_dict(self.manifest.calibration, model)

    def store(self) -> EntityStore:
        return EntityStore(self.path / STORE_FILE)

    def embeddings(self) -> EmbeddingShards:
        return open_embeddings(self.path, self.manifest)

    def index(self, device: str = "cpu") -> EntityIndex:
        """The index, mapped, or on GPUs where `device` (`auto`, `cpu`, `cuda`) says so. Raises as its `read` does."""
        return EntityIndex.read(self.path / INDEX_FILE, self.embeddings(), self.index_manifest.parameters, device)

    def entity_encoder(self) -> EntityEncoder | None:
        """What embeds entities that are put while serving, every byte checked; None where there is none."""
        return EntityEncoder.open(self.path, self.manifest.model.get("checkpoint_sha256"))

    def unlisted_files(self) -> list[str]:
        """Files in the bundle's folder that are no part of it, as relative paths in order."""
        listed = {MANIFEST_FILE, INDEX_FILE, INDEX_MANIFEST_FILE, *self.manifest.files}
        present = (file.relative_to(self.path) for file in self.path.rglob("*") if file.is_file())
        names = {file.as_posix() for file in present if file.parts[0] != ENTITY_ENCODER_FOLDER}
        return sorted(names - listed)


def open_manifest(path: Path, verify: Verify = "quick") -> Manifest:
    """Check a bundle without its index, and read its manifest. Raises as `Bundle.open` does."""
    if not path.exists():
        raise BundleMissing(f"bundle {path} does not exist; check the path, or make one with `wikiclip export`")
    if not path.is_dir():
        raise BundleMissing(f"{path} is no bundle: a bundle is a folder; give the folder that holds {MANIFEST_FILE}")
    if not (path / MANIFEST_FILE).is_file():
        raise BundleIncomplete(
            f"{path} has no {MANIFEST_FILE}: no bundle, or its export did not end; finish it with "
            "`wikiclip export --resume`"
        )
    manifest = Manifest.read(path / MANIFEST_FILE)
    hashed = manifest.files.keys() if verify == "full" else _hashed_quickly(manifest.files)
    for name, entry in manifest.files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BundleAltered(f"{path / MANIFEST_FILE} names {name}, outside the bundle; export the bundle again")
        _check_file(path / name, entry, "copy or export the bundle again", hashed=name in hashed)
    wanted = {STORE_FILE, *manifest.image_encoder.files.values()}
    if missing := wanted - manifest.files.keys():
        raise BundleAltered(f"{path / MANIFEST_FILE} does not list {min(missing)}; export the bundle again")
    return manifest


def open_embeddings(path: Path, manifest: Manifest) -> EmbeddingShards:
    """The embeddings of a bundle. Raises `BundleAltered` if they are not as many as its manifest says."""
    embeddings = EmbeddingShards(path / EMBEDDINGS_FOLDER, manifest.embedding_dim)
    if len(embeddings) != manifest.counts.embeddings:
        raise BundleAltered(
            f"{path / EMBEDDINGS_FOLDER} holds {len(embeddings)} embeddings, {MANIFEST_FILE} says "
            f"{manifest.counts.embeddings}; export the bundle again"
        )
    return embeddings


def list_files(folder: Path) -> Mapping[str, FileEntry]:
    """The manifest's `files` of a bundle being made: everything in `folder` but the manifest, the index and
    the entity side."""
    names = sorted(_content_files(folder))
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        return dict(zip(names, pool.map(FileEntry.of, (folder / name for name in names)), strict=True))


def _content_files(folder: Path) -> Iterator[str]:
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        apart = name in (MANIFEST_FILE, INDEX_FILE, INDEX_MANIFEST_FILE) or name.startswith(f"{ENTITY_ENCODER_FOLDER}/")
        if file.is_file() and not apart:
            yield name


def _hashed_quickly(files: Mapping[str, FileEntry]) -> set[str]:
    """The small files, as many as are soon hashed: embeddings come last, which are many, and larger files after."""

    def order(name: str) -> tuple[bool, int]:
        return name.startswith(f"{EMBEDDINGS_FOLDER}/"), files[name].bytes

    small = sorted((name for name, entry in files.items() if entry.bytes <= _SMALL_BYTES), key=order)
    total = accumulate(files[name].bytes for name in small)
    return {name for name, until in zip(small, total, strict=True) if until <= _HASHED_BYTES}


def _check_file(path: Path, entry: FileEntry, remedy: str, *, hashed: bool) -> None:
    if not path.is_file():
        raise BundleIncomplete(f"{path} is missing; {remedy}")
    size_bytes = path.stat().st_size
    if size_bytes != entry.bytes:
        raise BundleAltered(f"{path} has {size_bytes} bytes, the manifest says {entry.bytes}; {remedy}")
    if hashed and sha256_file(path) != entry.sha256:
        raise BundleAltered(f"{path} is altered: its SHA-256 is not the manifest's; {remedy}")
