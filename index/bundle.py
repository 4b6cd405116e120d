"""Open a bundle, and check that it is complete and unaltered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

from core.errors import BundleAltered, BundleIncomplete, BundleMissing
from index.calibration import Calibration, OpenSetModel
from index.embeddings import Embeddings, EmbeddingShards, pooled
from index.manifest import (
    EMBEDDINGS_FOLDER,
    ENTITY_ENCODER_FOLDER,
    INDEX_FILE,
    INDEX_MANIFEST_FILE,
    MANIFEST_FILE,
    OPEN_SET_FILE,
    REMEMBERED_FOLDER,
    STORE_FILE,
    EntityEncoder,
    FileEntry,
    IndexManifest,
    Manifest,
    fingerprint,
)
from index.remembered import Remembered
from index.search import EntityIndex
from index.store import EntityStore

Verify = Literal["quick", "full"]

_SMALL_BYTES = 64 * 1024**2  # a quick check compares only the size of larger files
_HASHED_BYTES = 256 * 1024**2  # of embeddings: hashing those of millions is slow


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A checked bundle. Its methods open a part on each call, which the caller must close."""

    path: Path
    manifest: Manifest
    index_manifest: IndexManifest
    fingerprint: str

    @classmethod
    def open(cls, path: Path, verify: Verify = "quick") -> Bundle:
        """Check a bundle and read its manifests.

        `quick` checks the presence and size of every file, and hashes files up to 64 MiB, but embeddings only if they
        have up to 256 MiB together. `full` hashes every byte. Raise `BundleMissing`, `BundleIncomplete` (a file or the
        manifest is missing), `BundleAltered` (a size or hash differs) or `BundleSchemaMismatch`.
        """
        manifest = open_manifest(path, verify)
        index_manifest_path = path / INDEX_MANIFEST_FILE
        if not index_manifest_path.is_file():
            raise BundleIncomplete(f"{index_manifest_path} is missing; build the index with `wikiclip index`")
        index_manifest = IndexManifest.read(index_manifest_path)
        hashed = verify == "full" or index_manifest.bytes <= _SMALL_BYTES
        index_manifest.file.check(path / INDEX_FILE, "build the index again with `wikiclip index`", hashed=hashed)
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
        """The calibration, or None if the bundle was exported without validation queries."""
        if self.manifest.calibration is None:
            return None
        has_model = OPEN_SET_FILE in self.manifest.files
        model = OpenSetModel.read(self.path / OPEN_SET_FILE) if has_model else None
        return Calibration.from_dict(self.manifest.calibration, model)

    def store(self) -> EntityStore:
        return EntityStore(self.path / STORE_FILE)

    def embeddings(self) -> EmbeddingShards:
        """Open the embeddings of all images."""
        return open_embeddings(self.path, self.manifest)

    def searched(self) -> Embeddings:
        """Open what is searched: the embeddings of all images, or their mean per entity."""
        return pooled(self.embeddings(), self.manifest.pooling)

    def index(self, device: str = "cpu") -> EntityIndex:
        """Open the index on `device` (`auto`, `cpu`, `cuda`). Raise as `EntityIndex.read` does."""
        parameters = self.index_manifest.parameters
        return EntityIndex.read(self.path / INDEX_FILE, self.searched(), parameters, device, self.remembered())

    def remembered(self) -> Remembered | None:
        """Read the remembered vectors, or return None if the bundle has none."""
        entry, vectors = self.manifest.remembered, self.remembered_vectors()
        return None if entry is None or vectors is None else Remembered(vectors, entry.handicap)

    def remembered_vectors(self) -> EmbeddingShards | None:
        """Open the remembered vectors, or return None if the bundle has none."""
        if (entry := self.manifest.remembered) is None:
            return None
        return _open_shards(self.path / REMEMBERED_FOLDER, self.manifest.embedding_dim, entry.entities)

    def entity_encoder(self) -> EntityEncoder | None:
        """Check every byte of the entity encoder and return its manifest, or None if the bundle has none."""
        return EntityEncoder.open(self.path, self.manifest.model.get("checkpoint_sha256"))

    def unlisted_files(self) -> list[str]:
        """Return the files in the folder that are not part of the bundle."""
        listed = {MANIFEST_FILE, INDEX_FILE, INDEX_MANIFEST_FILE, *self.manifest.files}
        present = (file.relative_to(self.path) for file in self.path.rglob("*") if file.is_file())
        return sorted({file.as_posix() for file in present if file.parts[0] != ENTITY_ENCODER_FOLDER} - listed)


def open_manifest(path: Path, verify: Verify = "quick") -> Manifest:
    """Check everything except the index, and read the manifest. Raise as `Bundle.open` does."""
    if not path.is_dir():
        raise BundleMissing(f"bundle {path} does not exist as a folder; check it, or make one with `wikiclip export`")
    if not (path / MANIFEST_FILE).is_file():
        raise BundleIncomplete(
            f"{path} has no {MANIFEST_FILE}: it is not a bundle, or its export was interrupted; finish it with "
            "`wikiclip export --resume`"
        )
    manifest = Manifest.read(path / MANIFEST_FILE)
    check_names(manifest.files, str(path / MANIFEST_FILE))
    hashed = manifest.files.keys() if verify == "full" else _hashed_quickly(manifest.files)
    for name, entry in manifest.files.items():
        entry.check(path / name, "copy or export the bundle again", hashed=name in hashed)
    required = {STORE_FILE, *manifest.image_encoder.files.values()}
    if missing := required - manifest.files.keys():
        raise BundleAltered(f"{path / MANIFEST_FILE} does not list {min(missing)}; export the bundle again")
    return manifest


def check_names(names: Iterable[str], source: str) -> None:
    """Raise `BundleAltered` if a listed file is outside the bundle."""
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BundleAltered(f"{source} names {name}, outside the bundle; export the bundle again")


def open_embeddings(path: Path, manifest: Manifest) -> EmbeddingShards:
    """Open a bundle's embeddings. Raise `BundleAltered` if their number differs from the manifest's."""
    return _open_shards(path / EMBEDDINGS_FOLDER, manifest.embedding_dim, manifest.counts.embeddings)


def _open_shards(folder: Path, dim: int, count: int) -> EmbeddingShards:
    shards = EmbeddingShards(folder, dim)
    if len(shards) != count:
        raise BundleAltered(
            f"{folder} holds {len(shards)} embeddings, {MANIFEST_FILE} says {count}; export the bundle again"
        )
    return shards


def list_files(folder: Path) -> Mapping[str, FileEntry]:
    """Return the manifest's `files`: all but the manifest, the index and the entity encoder."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    separate = (MANIFEST_FILE, INDEX_FILE, INDEX_MANIFEST_FILE)
    names = [name for name in names if name not in separate and not name.startswith(f"{ENTITY_ENCODER_FOLDER}/")]
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return dict(zip(names, pool.map(FileEntry.of, (folder / name for name in names)), strict=True))


def _hashed_quickly(files: Mapping[str, FileEntry]) -> set[str]:
    small = {name for name, entry in files.items() if entry.bytes <= _SMALL_BYTES}
    embeddings = {name for name in files if name.startswith(f"{EMBEDDINGS_FOLDER}/")}
    return small if sum(files[name].bytes for name in embeddings) <= _HASHED_BYTES else small - embeddings
