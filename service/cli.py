"""`wikiclip serve`, `wikiclip recognize`, `wikiclip embed` and `wikiclip mcp`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self, TypeVar

import click
import orjson
from tqdm import tqdm

from core.errors import BadRequest, UserError, WikiclipError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from service.recognizer import Recognizer
    from wikiclip.answers import Embedding, Explanation, Recognition, RecognizeOptions
    from wikiclip.client import Client

T = TypeVar("T")

_CHUNK_IMAGES = 64
_CONCURRENT_REQUESTS = 4
_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"))
_SHADES = " ░▒▓█"

_bundle_option = click.option("--bundle", type=click.Path(), help="The bundle to answer from, a folder or a URI.")
_url_option = click.option("--url", help="The service to use instead of a bundle, such as http://127.0.0.1:8000.")
_key_option = click.option(
    "--api-key-file",
    "api_key",
    type=click.File(),
    callback=lambda context, parameter, file: file and file.read().strip(),
    help="File with the API key for the service at --url.",
)
_device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where the image encoder runs, with --bundle.",
)


class ServeCommand(click.Command):
    """A command whose flags are the fields of `Settings`. Importing them is slow and happens only when needed."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not self.params:
            from service.settings import Settings

            self.params = [_flag(name, field) for name, field in Settings.model_fields.items()]
        return super().get_params(ctx)


def _flag(name: str, field: FieldInfo) -> click.Option:
    default = "none" if field.default in (None, ()) else field.default
    return click.Option(
        [f"--{name.replace('_', '-')}", name],
        metavar=_metavar(field),
        default=None,  # a flag that is not given leaves the value to the environment, then to `Settings`
        help=f"{field.description}  [env: WIKICLIP_{name.upper()}; default: {default}]",
    )


def _metavar(field: FieldInfo) -> str:
    from typing import get_args

    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
    if choices:
        return f"[{'|'.join(choices)}]"
    return "INTEGER" if field.annotation is int else "TEXT"


@click.command(cls=ServeCommand)
def serve(**flags: Any) -> None:
    """Serve a bundle over HTTP.

    Each flag can also be set as an environment variable. A flag takes precedence.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it can be remembered; no bundle has been read yet

    from service.server import run_server
    from service.settings import load_settings

    run_server(load_settings(**{name: value for name, value in flags.items() if value is not None}))


@click.command()
@click.argument("paths", metavar="IMAGE_OR_FOLDER...", nargs=-1, required=True, type=click.Path())
@_bundle_option
@_url_option
@_key_option
@click.option(
    "--top-k",
    type=click.IntRange(1, 100),
    default=5,
    help="Maximum number of predictions for an image.",
)
@click.option(
    "--types",
    default="",
    help="Only entities with any of these types or their descendants; use commas.  [default: all]",
)
@click.option(
    "--lang", help="Language of the titles, such as fr, where the catalog has it.  [default: the catalog's own]"
)
@click.option(
    "--explain", is_flag=True, help="Explain each prediction: where in the image it matches, and which words matter."
)
@click.option("--regions", is_flag=True, help="Find the things in each image, and name each of them, too.")
@click.option("--together", is_flag=True, help="All images show one thing: give one answer.")
@click.option("--out", type=click.Path(dir_okay=False), help="Write JSON Lines to this file, one line per image.")
@_device_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON Lines, one line per image.")
def recognize(
    *,
    paths: tuple[str, ...],
    bundle: str | None,
    url: str | None,
    api_key: str | None,
    regions: bool,
    together: bool,
    out: str | None,
    device: str,
    as_json: bool,
    **others: Any,
) -> None:
    """Name the entities in images, with a bundle (--bundle) or through a service (--url).

    A folder is searched for images at any depth. An image that cannot be recognised is reported and skipped.
    """
    from pydantic import ValidationError

    from wikiclip.answers import RecognizeOptions

    try:
        options = RecognizeOptions.model_validate({**others, "regions": "auto" if regions else None})
    except ValidationError as error:
        first = error.errors()[0]
        raise click.UsageError(f"{first['loc'][0]}: {first['msg']}") from error
    _check_source(bundle, url)
    images = find_images(paths)
    with (
        _Printer(total=1 if together else len(images), out=out, as_json=as_json) as printer,
        _opened(bundle, url, api_key, device) as source,
    ):
        if together:
            printer.print_together(images, source.recognize_together(list(map(_contents, images)), options))
            return
        for path, outcome in _outcomes(images, lambda contents: source.recognize_many(contents, options)):
            printer.print(path, outcome)
    if printer.recognized == 0:
        raise UserError(f"none of {len(images)} image(s) was recognised; see the reasons above")


@click.command()
@click.argument("paths", metavar="FILES...", nargs=-1, required=True, type=click.Path())
@_bundle_option
@_url_option
@_key_option
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File of the embeddings, such as X.npy.")
@_device_option
@click.option("--json", "as_json", is_flag=True, help="Print the counts as one JSON object.")
def embed(
    *,
    paths: tuple[str, ...],
    bundle: str | None,
    url: str | None,
    api_key: str | None,
    out: Path,
    device: str,
    as_json: bool,
) -> None:
    """Write the query embeddings of images, with a bundle (--bundle) or through a service (--url).

    X.npy has float32 [N, D], each of length 1, and X.jsonl a line per row: file, encoder (its content hash), error. The
    row of an image that cannot be embedded is NaN. A folder is searched for images at any depth.
    """
    import numpy as np

    from core.files import atomic_write

    _check_source(bundle, url)
    if out.suffix != ".npy":
        raise UserError(f"{out} does not end in .npy, as files of arrays do; choose another --out")
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} does not exist; make it, or choose another --out")
    images = find_images(paths)
    embeddings_ND: np.ndarray[Any, np.dtype[np.float32]] | None = None
    failed = 0
    with atomic_write(out) as array_file, atomic_write(out.with_suffix(".jsonl")) as lines_file:
        with (
            lines_file.open("wb") as lines,
            tqdm(total=len(images), unit="image", disable=None, leave=False) as bar,
            _opened(bundle, url, api_key, device) as source,
        ):
            for row, (path, outcome) in enumerate(_outcomes(images, source.embed_many)):
                line: dict[str, Any] = {"file": str(path), "encoder": None, "error": None}
                if isinstance(outcome, WikiclipError):
                    failed += 1
                    line["error"] = outcome.detail
                    bar.write(f"{path}: {outcome.detail}", file=sys.stderr)
                else:
                    line["encoder"] = outcome.encoder
                    if embeddings_ND is None:
                        shape = (len(images), outcome.dim)
                        embeddings_ND = np.lib.format.open_memmap(array_file, "w+", np.float32, shape)
                        embeddings_ND[:] = np.nan
                    embeddings_ND[row] = outcome.embedding
                lines.write(orjson.dumps(line) + b"\n")
                bar.update()
        if embeddings_ND is None:
            raise UserError(f"none of {len(images)} image(s) can be embedded; see the reasons above")
    counts = {"out": str(out), "images": len(images), "failed": failed, "dim": embeddings_ND.shape[1]}
    text = f"{len(images) - failed} embedded, {failed} failed, embeddings in {out}"
    click.echo(json.dumps(counts) if as_json else text, err=not as_json)


@click.command()
@_bundle_option
@_url_option
@_key_option
@click.option(
    "--http",
    "http_port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    help="Serve on this TCP port of 127.0.0.1, without paths of files; 0 picks a free one.  [default: stdio]",
)
def mcp(*, bundle: str | None, url: str | None, api_key: str | None, http_port: int | None) -> None:
    """Let agents recognise images, describe entities and search titles (Model Context Protocol).

    The answers come from a bundle (--bundle) or a service (--url). The settings WIKICLIP_* of `wikiclip serve` apply.
    """
    _check_source(bundle, url)

    from service.agents import serve_agents

    serve_agents(bundle=bundle, url=url, api_key=api_key, http_port=http_port)


def find_images(paths: Sequence[str]) -> list[Path]:
    """Return the files, and the image files in the folders, in a fixed order. Raises `UserError` if there are none."""
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
        raise UserError(f"no image files in {', '.join(paths)}; give files, or a folder that contains some")
    return found


def _check_source(bundle: str | None, url: str | None) -> None:
    if (bundle is None) == (url is None):
        raise click.UsageError("give one of --bundle and --url")


@contextmanager
def _opened(bundle: str | None, url: str | None, api_key: str | None, device: str) -> Iterator[Recognizer | _Service]:
    """Yield what answers: the bundle, or the service at the URL."""
    if bundle is not None:
        from service.recognizer import Recognizer
        from service.settings import load_settings

        with Recognizer.open(bundle, load_settings(device=device, cache="off", redis_url=None)) as recognizer:
            yield recognizer
    else:
        from wikiclip.client import Client

        assert url is not None
        with Client(url, api_key=api_key) as client:
            yield _Service(client)


class _Service:
    """The methods of `Recognizer` that the commands call, through a service."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def recognize_together(self, images: Sequence[bytes], options: RecognizeOptions) -> Recognition:
        return self._client.recognize_views(images, options)

    def recognize_many(
        self, images: Sequence[bytes], options: RecognizeOptions
    ) -> Iterator[Recognition | WikiclipError]:
        return self._map(lambda image: self._client.recognize(image, options), images)

    def embed_many(self, images: Sequence[bytes]) -> Iterator[Embedding | WikiclipError]:
        return self._map(self._client.embed, images)

    def _map(self, ask: Callable[[bytes], T], images: Sequence[bytes]) -> Iterator[T | WikiclipError]:
        def outcome(image: bytes) -> T | WikiclipError:
            try:
                return ask(image)
            except WikiclipError as error:
                return error

        with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
            yield from pool.map(outcome, images)


def _outcomes(
    images: Sequence[Path], answer: Callable[[Sequence[bytes]], Iterable[T | WikiclipError]]
) -> Iterator[tuple[Path, T | WikiclipError]]:
    """Yield each image and its answer, or why there is none, in order."""
    for start in range(0, len(images), _CHUNK_IMAGES):
        chunk = images[start : start + _CHUNK_IMAGES]
        contents = [_read(path) for path in chunk]
        answers = iter(answer([content for content in contents if isinstance(content, bytes)]))
        for path, content in zip(chunk, contents, strict=True):
            yield path, content if isinstance(content, UserError) else next(answers)


def _contents(path: Path) -> bytes:
    """Return the bytes of a file, none for an empty one. Raises `UserError` if it cannot be read."""
    content = _read(path)
    if isinstance(content, BadRequest):
        return b""
    if isinstance(content, UserError):
        raise UserError(f"{path}: {content.detail}")
    return content


def _read(path: Path) -> bytes | UserError:
    try:
        return path.read_bytes() or BadRequest("the file is empty; give an image")
    except OSError as error:
        return UserError(f"the file cannot be read ({error.strerror}); check its permissions")


class _Printer:
    """Prints outcomes as text or JSON, or writes them to a file, with a progress bar on a terminal."""

    def __init__(self, *, total: int, out: str | None, as_json: bool) -> None:
        self.recognized = self.failed = 0
        self._summary = "{} recognised, {} failed"
        self._as_json = as_json
        self._out: IO[bytes] | None = None
        if out is not None:
            try:
                self._out = Path(out).open("wb")  # noqa: SIM115 - closed at the end
            except OSError as error:
                raise UserError(f"{out} cannot be written ({error.strerror}); choose another --out") from error
        self._bar = tqdm(total=total, unit="image", disable=None, leave=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        where = ""
        if self._out is not None:
            self._out.close()
            where = f", answers in {self._out.name}"
        if kind is None or self.recognized + self.failed:
            click.echo(self._summary.format(self.recognized, self.failed) + where, err=True)

    def print_together(self, paths: Sequence[Path], recognition: Recognition) -> None:
        """Print the one answer to several images."""
        skipped = recognition.skipped or ()
        for each in skipped:
            self._bar.write(f"{paths[each.index]}: {each.detail}", file=sys.stderr)
        self._summary = "{} images recognised together, {} skipped"
        self.recognized, self.failed = len(paths) - len(skipped), len(skipped)
        name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        self._write({"images": list(map(str, paths))}, name, recognition)

    def print(self, path: Path, outcome: Recognition | WikiclipError) -> None:
        if isinstance(outcome, WikiclipError):
            self.failed += 1
            error = {"title": outcome.title, "status": outcome.status, "detail": outcome.detail}
            self._bar.write(f"{path}: {outcome.detail}", file=sys.stderr)
            self._write_line({"image": str(path), "error": error})
        else:
            self.recognized += 1
            self._write({"image": str(path)}, str(path), outcome)

    def _write(self, row: dict[str, Any], name: str, recognition: Recognition) -> None:
        if self._out is None and not self._as_json:
            self._bar.write("\n".join(_lines(name, recognition)), file=sys.stdout)
        self._write_line({**row, **recognition.model_dump(exclude={"request_id"})})

    def _write_line(self, row: dict[str, Any]) -> None:
        line = orjson.dumps(row)
        if self._out is not None:
            self._out.write(line + b"\n")
        if self._as_json:
            self._bar.write(line.decode(), file=sys.stdout)
        self._bar.update()


def _lines(name: str, recognition: Recognition) -> Iterator[str]:
    yield f"{name}{'   (probably not in the catalog)' if recognition.abstained else ''}"
    if not recognition.predictions:
        yield "   no entity passes the filters"
    for each in recognition.predictions:
        shows_confidence = each.confidence is not None and not recognition.abstained
        confidence = f"  {100 * (each.confidence or 0):3.0f} %" if shows_confidence else ""
        yield f"  {each.rank:3d}  {each.score:.3f}{confidence}  {each.symbol or ' '} {each.title}  [{each.entity_id}]"
        if each.explanation is not None:
            yield from _explanation_lines(each.explanation)
    if recognition.level is not None:
        yield f"       surely: {recognition.level.title}"
    for region in recognition.regions or ():
        best, box = region.predictions[0], ",".join(f"{side:.2f}" for side in region.box)
        yield f"  at {box}  {best.score:.3f}  {best.symbol or ' '} {best.title}  [{best.entity_id}]"


def _explanation_lines(explanation: Explanation) -> Iterator[str]:
    """Yield the heat map as shades, the darkest where it matches best, and the words."""
    if explanation.heat_map is not None:
        low = min(map(min, explanation.heat_map))
        step = (max(map(max, explanation.heat_map)) - low) / (len(_SHADES) - 1) or 1.0
        for row in explanation.heat_map:
            yield "       " + "".join(2 * _SHADES[round((value - low) / step)] for value in row)
    if explanation.words is not None:
        yield "       words: " + ", ".join(f"{each.word} {100 * each.weight:.0f} %" for each in explanation.words[:6])
