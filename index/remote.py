"""Files at a URI: a folder, or an object store through fsspec. What a file is called there is relative to the URI."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from core.errors import TransferError, UserError
from core.files import atomic_write

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
