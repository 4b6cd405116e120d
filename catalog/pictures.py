"""Find the files in a folder, and check which of them are pictures that decode.

Nothing is skipped silently: each other file becomes a `Rejected`. Its reason is a kind, or `KIND: what to do`.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from catalog.images import ImageReader, UnusableImage, image_checker
from core.errors import TooLarge, UndecodableImage
from core.lines import Rejected
from core.runtime import usable_cores
from imaging import Decoder, readable_types, sniff

_HEAD_BYTES = 512
_TEXT_NAMES = ("text.txt", "text.md")
_MAX_TEXT_BYTES = 2**20
_ARCHIVES = (".zip", ".rar", ".7z", ".tar", ".tgz", ".gz", ".bz2", ".xz")


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder. `name` is its path below the root in Unicode's form NFC, and `texts` are the texts in it."""

    path: Path
    name: str
    files: list[Path] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


class FolderReader:
    """Reads the folders in `root`, and collects what cannot be used in `rejected`, with paths below `root`.

    Files in `ours` were written by this program and are left out. Without `with_texts`, a text is a file like others.
    """

    def __init__(self, root: Path, ours: Iterable[Path], *, with_texts: bool) -> None:
        self.rejected: list[Rejected] = []
        self._root = root
        self._real_root = Path(os.path.realpath(root))
        self._ours = {os.path.realpath(path) for path in ours}
        self._text_names: Collection[str] = _TEXT_NAMES if with_texts else ()
        self._linked: set[Path] = set()

    def reject(self, path: Path, reason: str, *, line: int = 0) -> None:
        """Record a file or folder that is not used. `line` is that of the table."""
        self.rejected.append(Rejected(line=line, reason=reason, record=self.name_of(path)))

    def name_of(self, path: Path) -> str:
        """Return a path below the root, with slashes."""
        return path.relative_to(self._root).as_posix()

    def folders(self) -> Iterator[Folder]:
        """Yield the root, then the folders in it at any depth, sorted by name."""
        for name, subfolders, names in os.walk(self._root, onerror=self._cannot_list, followlinks=True):
            path = Path(name)
            if not subfolders and not names:
                self.reject(path, "empty folder")
            subfolders[:] = [each for each in sorted(subfolders) if self._enters(path / each)]
            folder = Folder(path=path, name=unicodedata.normalize("NFC", self.name_of(path)))
            for each in sorted(names):
                if not self._counts(path / each):
                    continue
                if each.casefold() not in self._text_names or path == self._root:
                    folder.files.append(path / each)
                elif text := self._read_text(path / each):
                    folder.texts.append(text)
            yield folder

    def _cannot_list(self, error: OSError) -> None:
        self.reject(Path(error.filename), f"cannot be read: {error.strerror}")

    def _counts(self, path: Path) -> bool:
        if os.path.realpath(path) in self._ours:
            return False
        if path.name.startswith("."):
            self.reject(path, "hidden")
            return False
        try:
            path.name.encode()
        except UnicodeEncodeError:
            self.reject(path, "name that is not UTF-8: rename it")
            return False
        if not path.name.strip():
            self.reject(path, "blank name: rename it")
            return False
        return True

    def _enters(self, path: Path) -> bool:
        if not self._counts(path):
            return False
        if path.is_symlink():
            real = Path(os.path.realpath(path))
            inside = real.is_relative_to(self._real_root) or self._real_root.is_relative_to(real)
            if inside or real in self._linked:
                self.reject(path, "link to a folder that is read anyway")
                return False
            self._linked.add(real)
        return True

    def _read_text(self, path: Path) -> str:
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_TEXT_BYTES + 1)
            text = data.decode("utf-8-sig").strip()
        except OSError as error:
            self.reject(path, f"cannot be read: {error.strerror}")
            return ""
        except UnicodeDecodeError:
            self.reject(path, "text that is not UTF-8: save it again with that encoding")
            return ""
        if len(data) > _MAX_TEXT_BYTES:
            self.reject(path, f"text that is too long: shorten it to {_MAX_TEXT_BYTES} bytes")
            return ""
        if not text:
            self.reject(path, "empty file")
        return text


def check_pictures(paths: Collection[Path], *, progress: bool) -> dict[Path, str | UnusableImage]:
    """Return the SHA-256 of each picture that decodes, and why each other file cannot be used, in order.

    Raises `CatalogError` if the disk fails.
    """
    decoder = image_checker()

    def check(path: Path) -> str | UnusableImage:
        try:
            return _check_picture(path, decoder)
        except UnusableImage as error:
            return error

    with closing(decoder), ThreadPoolExecutor(usable_cores()) as pool:
        hidden = None if progress else True  # None: shown on terminals only
        checked = tqdm(pool.map(check, paths), desc="pictures", unit="file", total=len(paths), disable=hidden)
        return dict(zip(paths, checked, strict=True))


def _check_picture(path: Path, decoder: Decoder) -> str:
    if not path.is_file():
        raise UnusableImage("link that leads nowhere" if path.is_symlink() else "not a file")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise UnusableImage(f"cannot be read: {error.strerror}") from error
    if not head:
        raise UnusableImage("empty file")
    kind = sniff(head)
    if kind is None:
        is_archive = path.suffix.lower() in _ARCHIVES
        raise UnusableImage("archive: unpack it into a folder" if is_archive else "not a picture")
    if kind not in readable_types():
        install = "pip install 'wikiclip-serve[heic]', or " if kind == "image/heic" else ""
        raise UnusableImage(f"{kind} that cannot be read here: {install}convert it to JPEG")
    data = ImageReader().read(str(path))
    try:
        decoder.check(data)
    except (UndecodableImage, TooLarge) as error:
        raise UnusableImage(f"broken picture: {error}") from error
    return hashlib.sha256(data).hexdigest()
