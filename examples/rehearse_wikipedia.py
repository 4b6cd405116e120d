"""Rehearse docs/wikipedia.md on made-up dumps.

    python examples/rehearse_wikipedia.py rehearsal --articles 6000

writes dumps in Wikimedia's formats, starts a server with their images and the API of two wikis, and runs every command
of the page in the folder `rehearsal`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import re
import shlex
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import click
import numpy as np
from PIL import Image

from wikiclip.cli import load, run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "wikipedia.md"
ENCODER = "hf:google/siglip2-base-patch16-224"
WIKIS = ("https://en.wikipedia.org", "https://commons.wikimedia.org")
NOT_AN_ENTITY = 4167410  # the class of disambiguation pages
WORDS = ("an", "old", "new", "red", "green", "large", "small", "river", "bird", "house", "song", "of", "near", "saint")


def commands() -> list[list[str]]:
    """Return the words of each `wikiclip` command in the page's blocks, in order."""
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("wikiclip ")]


def write_dumps(folder: Path, date: str, numbers: range, *, rewritten: int = -1) -> None:
    """Write the dumps of articles about Q1000 and so on: a third have a free image, a ninth one on Commons."""
    (folder / "enwiki_content").mkdir(parents=True)
    documents, images, items = [], [], []
    for number in numbers:
        random = np.random.default_rng(number)
        text = f"Thing {number} is {' '.join(random.choice(WORDS, 60))}." + " Rewritten." * (number == rewritten)
        documents += [
            {"index": {"_id": number}},
            {
                "wiki": "enwiki",
                "language": "en",
                "namespace": 0,
                "title": f"Thing {number}",
                "text": text,
                "opening_text": text,
                "incoming_links": int(random.integers(100)),
                "wikibase_item": f"Q{1000 + number}",
            },
        ]
        if number % 3 == 0:
            images.append(f"({number},'page_image_free','Thing_{number}.jpg',NULL)")
        claims = {"P31": [_statement({"numeric-id": NOT_AN_ENTITY if number % 50 == 49 else 1, "id": "Q1"})]}
        if number % 9 == 0:
            claims["P18"] = [_statement(f"Other {number}.jpg")]
        label = {"de": {"language": "de", "value": f"Ding {number}"}}
        items.append({"type": "item", "id": f"Q{1000 + number}", "labels": label, "descriptions": [], "claims": claims})
    half = len(documents) // 4 * 2
    for part, lines in enumerate((documents[:half], documents[half:])):
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        (folder / "enwiki_content" / f"enwiki_content-{date}-0000{part}.json.bz2").write_bytes(bz2.compress(data))
    head = "-- MariaDB dump 10.19\n-- Host: db1    Database: enwiki\nCREATE TABLE `page_props` (\n"
    sql = f"{head}INSERT INTO `page_props` VALUES {','.join(images)};\n"
    (folder / f"enwiki-{date}-page_props.sql.gz").write_bytes(gzip.compress(sql.encode()))
    array = "[\n" + ",\n".join(map(json.dumps, items)) + "\n]\n"
    (folder / "latest-all.json.gz").write_bytes(gzip.compress(array.replace('": ', '":').encode()))


def _statement(value: Any) -> dict[str, Any]:
    return {"rank": "normal", "mainsnak": {"snaktype": "value", "datavalue": {"value": value}}}


def save_encoder(folder: Path) -> None:
    """Save a small SigLIP 2 of random weights as the hub has it: at fixed resolutions it is a `SiglipModel`."""
    import torch
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    vision = {**layers, "image_size": 64, "patch_size": 16}
    SiglipModel(SiglipConfig(vision_config=vision, text_config={**layers, "vocab_size": 40})).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)


def draw(name: str) -> bytes:
    """Return a JPEG that depends on the name."""
    coarse = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((500, 400), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


class Wiki(BaseHTTPRequestHandler):
    """A wiki: `Special:Redirect/file/NAME` has the image, and the API says who made it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/w/api.php":
            pages = [
                {
                    "title": title,
                    "imageinfo": [
                        {
                            "descriptionurl": f"https://commons.wikimedia.org/wiki/{title.replace(' ', '_')}",
                            "extmetadata": {
                                "Artist": {"value": f"<b>Author of {title}</b>"},
                                "LicenseShortName": {"value": "CC BY-SA 4.0"},
                            },
                        }
                    ],
                }
                for title in dict(parse_qsl(url.query))["titles"].split("|")
            ]
            body = json.dumps({"query": {"pages": pages}}).encode()
        else:
            body = draw(unquote(url.path.rpartition("/")[2]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def wikis() -> Iterator[dict[str, str]]:
    """Serve the wikis. Yields the address of each by its real one."""
    with ExitStack() as stack:
        addresses = {}
        for wiki in WIKIS:
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Wiki))
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            addresses[wiki] = f"http://127.0.0.1:{server.server_port}"
        yield addresses


def change_hosts(catalog: Path, hosts: Mapping[str, str]) -> None:
    """Change the hosts of a catalog's images."""
    text = gzip.decompress(catalog.read_bytes()).decode()
    for old, new in hosts.items():
        text = text.replace(f'"{old}/wiki/Special:', f'"{new}/wiki/Special:')
    catalog.write_bytes(gzip.compress(text.encode(), mtime=0))


def adapt(words: list[str], folder: Path, entities: int) -> list[str]:
    """Return a command of the page with paths in the folder and what a rehearsal needs."""
    paths = {"--catalog", "--content", "--page-props", "--wikidata", "--base", "--images", "--checkpoint", "--bundle"}
    adapted = list(words)
    for place, word in enumerate(words):
        if words[place - 1] in {*paths, "--cache-dir", "--out"} or (words[1] == "inspect" and place == 2):
            adapted[place] = str(folder / word)
        elif word == ENCODER:
            adapted[place] = f"hf:{folder / 'siglip2'}"
        elif words[place - 1] == "--max-entities":
            adapted[place] = str(entities)
    if words[1] in ("fetch-images", "credits"):
        adapted += ["--allow-private", "--rate", "1000"]
    if "--checkpoint" in words:  # which knows models of the hub by name, but no folders of this machine
        adapted += ["--image-encoder", f"hf:{folder / 'siglip2'}"]
    return adapted


def rehearse(folder: Path, articles: int) -> None:
    """Run every command of the page but `serve`."""
    write_dumps(folder / "dumps", "20261101", range(articles))
    write_dumps(folder / "later", "20261201", range(5, articles + 5), rewritten=articles // 2)
    save_encoder(folder / "siglip2")
    with wikis() as local:
        real = {new: old for old, new in local.items()}
        for words in commands():
            if words[1] == "serve":
                continue
            click.echo(f"$ {shlex.join(words)}", err=True)
            _, name, *arguments = adapt(words, folder, entities=max(articles // 60, 10))
            options = dict(pairwise(words))
            if name == "catalog" and "--base" in options:
                change_hosts(folder / options["--base"], real)
            run(load(name), arguments, name=f"wikiclip {name}")
            if name == "catalog":
                change_hosts(folder / options["--out"], local)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--articles", type=click.IntRange(min=60), default=6000, show_default=True, help="Articles in the dumps.")
def main(folder: Path, articles: int) -> None:
    """Write made-up dumps into FOLDER, which must not exist, and run the commands of docs/wikipedia.md on them."""
    if folder.exists():
        raise click.UsageError(f"{folder} exists; name a new folder")
    rehearse(folder, articles)
    click.echo(f"every command ran; serve the result with: wikiclip serve --bundle {folder / 'bundle'}")


if __name__ == "__main__":
    run(main)
