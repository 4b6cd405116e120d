"""Recognising many files: finding them, asking a bundle or a service, and telling the answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

import click
import orjson
from tqdm import tqdm

from core.errors import BadRequest, UserError
from wikiclip.answers import Explanation, Recognition, RecognizeOptions

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"))
_ASKED_AT_ONCE = 4
_SHADES = " ░▒▓█"

Answer = tuple[Path, Recognition | UserError]


def find_images(paths: Sequence[str]) -> list[Path]:
    """The files named, and the image files in the folders named, in a fixed order. Raises `UserError` if none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            for folder, subfolders, names in os.walk(path):
                subfolders.sort()
                found += [Path(folder, name) for name in sorted(names) if Path(name).suffix.lower() in _SUFFIXES]
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path} does not exist; check the path")
    if not found:
        raise UserError(f"no image files in {', '.join(paths)}; give files, or a folder that holds some")
    return found


def answers_from_bundle(
    images: Sequence[Path], bundle: str, options: RecognizeOptions, *, device: str, chunk_images: int
) -> Iterator[Answer]:
    """Recognise files in batches with a bundle, in order."""
    from service.recognizer import Recognizer
    from service.settings import load_settings

    with Recognizer.open(bundle, load_settings(device=device, cache="off", redis_url=None)) as recognizer:
        for start in range(0, len(images), chunk_images):
            chunk = images[start : start + chunk_images]
            contents = [_read(path) for path in chunk]
            readable = [content for content in contents if isinstance(content, bytes)]
            recognized = iter(recognizer.recognize_many(readable, options))
            for path, content in zip(chunk, contents, strict=True):
                yield path, content if isinstance(content, UserError) else next(recognized)


def answers_from_service(
    images: Sequence[Path], url: str, options: RecognizeOptions, *, api_key: str | None = None
) -> Iterator[Answer]:
    """Recognise files through a service, a few at a time, in order."""
    from wikiclip.client import Client

    with Client(url, api_key=api_key) as client, ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:

        def ask(path: Path) -> Answer:
            content = _read(path)
            if isinstance(content, UserError):
                return path, content
            try:
                return path, client.recognize(content, options)
            except UserError as error:
                return path, error

        for start in range(0, len(images), 16 * _ASKED_AT_ONCE):
            yield from pool.map(ask, images[start : start + 16 * _ASKED_AT_ONCE])


def _read(path: Path) -> bytes | UserError:
    try:
        return path.read_bytes() or BadRequest("the file is empty; give an image")
    except OSError as error:
        return UserError(f"the file cannot be read ({error.strerror}); check its permissions")


class Printer:
    """Tells answers as they come: to a file, as JSON or as text, with a progress bar where a person watches."""

    def __init__(self, *, total: int, out: str | None, as_json: bool) -> None:
        self.recognized = 0
        self.failed = 0
        self._as_json = as_json
        self._closing = ExitStack()
        self._out: IO[bytes] | None = None
        if out is not None:
            try:
                self._out = self._closing.enter_context(Path(out).open("wb"))  # noqa: SIM115 - the stack closes it
            except OSError as error:
                raise UserError(f"{out} cannot be written ({error.strerror}); choose another --out") from error
        self._bar = self._closing.enter_context(tqdm(total=total, unit="image", disable=None, leave=False))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._closing.close()
        if kind is not None and not self.recognized + self.failed:
            return  # nothing was begun: the error says all there is to say
        where = f", answers in {self._out.name}" if self._out else ""
        click.echo(f"{self.recognized} recognised, {self.failed} failed{where}", err=True)

    def take(self, path: Path, answer: Recognition | UserError) -> None:
        """Tell one answer."""
        row = orjson.dumps(_row(path, answer))
        if self._out is not None:
            self._out.write(row + b"\n")
        if isinstance(answer, UserError):
            self.failed += 1
            self._say(f"{path}: {answer.detail}", sys.stderr)
        else:
            self.recognized += 1
        if self._as_json:
            self._say(row.decode(), sys.stdout)
        elif self._out is None and isinstance(answer, Recognition):
            self._say("\n".join(_lines(path, answer)), sys.stdout)
        self._bar.update()

    def _say(self, text: str, stream: Any) -> None:
        self._bar.write(text, file=stream)


def _row(path: Path, answer: Recognition | UserError) -> dict[str, Any]:
    if isinstance(answer, UserError):
        return {"image": str(path), "error": {"title": answer.title, "status": answer.status, "detail": answer.detail}}
    return {"image": str(path), **answer.model_dump(exclude={"request_id"})}


def _lines(path: Path, answer: Recognition) -> Iterator[str]:
    doubt = "   (probably not in the catalog)" if answer.abstained else ""
    yield f"{path}{doubt}"
    if not answer.predictions:
        yield "   no entity passes"
    for each in answer.predictions:
        sure = "" if each.confidence is None or answer.abstained else f"  {100 * each.confidence:3.0f} %"
        yield f"  {each.rank:3d}  {each.score:.3f}{sure}  {each.symbol or ' '} {each.title}  [{each.entity_id}]"
        if each.explanation is not None:
            yield from _why(each.explanation)


def _why(explanation: Explanation) -> Iterator[str]:
    """The heat map as shades, the darkest where it matches best, and the words."""
    if explanation.heat_map is not None:
        low = min(map(min, explanation.heat_map))
        step = (max(map(max, explanation.heat_map)) - low) / (len(_SHADES) - 1) or 1.0
        for row in explanation.heat_map:
            yield "       " + "".join(2 * _SHADES[round((value - low) / step)] for value in row)
    if explanation.words is not None:
        yield "       words: " + ", ".join(f"{each.word} {100 * each.weight:.0f} %" for each in explanation.words[:6])
