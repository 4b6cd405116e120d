"""A mkdocs hook that adds the command-line page, pages from outside docs/, and copies of the files that pages link to.

mkdocs reads pages from one folder only. In the repository the same links lead to the files themselves.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from cli_reference import cli_reference  # next to this file: mkdocs finds it there
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "THIRD_PARTY_LICENCES.md": "licences.md",
    "demo/README.md": "demo.md",
    "demo/icon_sets.md": "icon-sets.md",
}
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "cli.md", content=cli_reference()))
    linked = {
        place(in_repository(file.src_uri, target))
        for file in files.documentation_pages()
        for target in LINK.findall(file.content_string)
    }
    for uri in sorted(linked - {file.src_uri for file in files}):
        path = ROOT / uri.removeprefix("repository/")
        if path.is_file():  # otherwise mkdocs reports a broken link
            files.append(File.generated(config, uri, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return LINK.sub(lambda link: place(in_repository(page.file.src_uri, link[1])), markdown)


def in_repository(page: str, target: str) -> str:
    """Return the path in the repository that a link of a page points to."""
    source = next((source for source, own in PAGES.items() if own == page), f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def place(path: str) -> str:
    """Return where a path of the repository is on the site."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}")
