"""`wikiclip serve` and `wikiclip recognize`."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

import click

from core.errors import UserError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_CHUNK_IMAGES = 64


class ServeCommand(click.Command):
    """Its flags are the fields of `Settings`, read only when they are needed: importing them takes time."""

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
        # Left out here, so that the environment and then the default of `Settings` decide.
        default=None,
        help=f"{field.description}  [env: WIKICLIP_{name.upper()}; default: {default}]",
    )


def _metavar(field: FieldInfo) -> str:
    from typing import get_args

    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
    if choices:
        return f"[{'|'.join(choices)}]"
    return "INTEGER" if field.annotation is int else "TEXT"


@click.command(cls=ServeCommand)
def serve(**given: Any) -> None:
    """Serve a bundle over HTTP.

    Every flag can be set as an environment variable too; a flag wins over the environment.
    """
    from service.server import run_server
    from service.settings import load_settings

    run_server(load_settings(**{name: value for name, value in given.items() if value is not None}))


@click.command()
@click.argument("paths", metavar="IMAGE_OR_FOLDER...", nargs=-1, required=True, type=click.Path())
@click.option("--bundle", type=click.Path(), help="The bundle to recognise with, a folder or a URI.")
@click.option("--url", help="The service to ask instead, as http://127.0.0.1:8000.")
@click.option("--api-key-file", type=click.File(), help="File with the API key, where the service at --url wants one.")
@click.option(
    "--top-k", type=click.IntRange(1, 100), default=5, show_default=True, help="Predictions an image, at most."
)
@click.option("--types", default="", help="Only entities with any of these types, separated by commas.  [default: all]")
@click.option("--lang", help="Titles in this language where there are, as fr.  [default: the catalog's own]")
@click.option(
    "--explain", is_flag=True, help="Say of each prediction where in the image it matches, and by which words."
)
@click.option("--out", type=click.Path(dir_okay=False), help="Write JSON Lines to this file, an image a line.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the image encoder runs, with --bundle.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON Lines, an image a line.")
def recognize(
    *,
    paths: tuple[str, ...],
    bundle: str | None,
    url: str | None,
    api_key_file: IO[str] | None,
    top_k: int,
    types: str,
    lang: str | None,
    explain: bool,
    out: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Name the entities in images, without a service (--bundle) or through one (--url).

    A folder is searched for images at any depth. An image that cannot be recognised is reported and skipped.
    """
    if (bundle is None) == (url is None):
        raise click.UsageError("give one of --bundle and --url")
    from service.batch import Printer, answers_from_bundle, answers_from_service, find_images
    from wikiclip.answers import RecognizeOptions

    wanted_types = tuple(sorted({part.strip() for part in types.split(",") if part.strip()}))
    options = RecognizeOptions(top_k=top_k, types=wanted_types, lang=lang, explain=explain)
    images = find_images(paths)
    if bundle is not None:
        answers = answers_from_bundle(images, bundle, options, device=device, chunk_images=_CHUNK_IMAGES)
    else:
        assert url is not None
        api_key = None if api_key_file is None else api_key_file.read().strip()
        answers = answers_from_service(images, url, options, api_key=api_key)
    with Printer(total=len(images), out=out, as_json=as_json) as printer:
        for path, answer in answers:
            printer.take(path, answer)
    if printer.recognized == 0:
        raise UserError(f"none of {len(images)} image(s) was recognised; the reasons stand above")
