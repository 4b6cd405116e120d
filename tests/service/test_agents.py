"""`wikiclip mcp`, asked by the protocol's own client over stdio and HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from mcp import Client, StdioServerParameters

from service import agents
from service.settings import Settings
from tests.commands import run_wikiclip
from wikiclip.client import AsyncClient

COMMAND = ["-m", "wikiclip", "mcp"]
TIMEOUT_S = 120  # generous: a busy machine is no failure
INPUTS = {"base64", "url", "top_k", "types", "lang"}  # of the tool `recognise`
OTHER_TOOLS = {"describe_entity": {"entity_id"}, "search_titles": {"query", "limit"}}
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}},
}


def stdio(*arguments: str, **env: str) -> StdioServerParameters:
    return StdioServerParameters(command=sys.executable, args=[*COMMAND, *arguments], env=env)


async def answers_in(client: Client, calls: Sequence[tuple[str, dict]]) -> list:
    results = [await client.call_tool(name, arguments) for name, arguments in calls]
    return [each.content[0].text if each.is_error else each.structured_content for each in results]


async def answers_of(server, calls: Sequence[tuple[str, dict]]) -> list:
    async with Client(server, read_timeout_seconds=TIMEOUT_S) as client:
        return await answers_in(client, calls)


def call(server, *calls: tuple[str, dict]) -> list:
    """Call tools one after the other, in one session. Returns structured answers, and texts of errors."""
    return asyncio.run(answers_of(server, calls))


def list_and_call(server, *calls: tuple[str, dict]) -> tuple[dict[str, set[str]], list]:
    """List the tools and call some, in one session. Returns the names of each tool's parameters, and the answers."""

    async def ask() -> tuple[list, list]:
        async with Client(server, read_timeout_seconds=TIMEOUT_S) as client:
            return (await client.list_tools()).tools, await answers_in(client, calls)

    tools, answers = asyncio.run(ask())
    assert all(tool.description and tool.output_schema and tool.annotations.read_only_hint for tool in tools)
    return {tool.name: set(tool.input_schema["properties"]) for tool in tools}, answers


@contextmanager
def over_http(*arguments: str) -> Iterator[str]:
    """Run the command with `--http 0`; yields its URL."""
    command = [sys.executable, *COMMAND, *arguments, "--http", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            messages = (json.loads(line)["message"] for line in process.stderr)
            yield next(message for message in messages if message.startswith("serving agents")).rpartition(" ")[2]
        finally:
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (130, "")


@pytest.fixture
def picture(tmp_path, giraffe) -> Path:
    path = tmp_path / "giraffe.png"
    path.write_bytes(giraffe)
    return path


@pytest.fixture(params=["bundle", "service"])
def source(request, small_bundle) -> list[str]:
    """What answers: a bundle, or a service over HTTP."""
    if request.param == "bundle":
        return ["--bundle", str(small_bundle)]
    return ["--url", str(request.getfixturevalue("service").base_url)]


def test_tools_answer_over_stdio(source, picture, giraffe):
    encoded = base64.b64encode(giraffe).decode()
    parameters, (by_path, by_base64, fruit, entity, found) = list_and_call(
        stdio(*source),
        ("recognise", {"path": str(picture)}),
        ("recognise", {"base64": encoded, "top_k": 1, "lang": "fr"}),
        ("recognise", {"base64": f"data:image/png;base64,{encoded}", "types": ["fruit", "flag"]}),
        ("describe_entity", {"entity_id": "Q15083"}),
        ("search_titles", {"query": "giraf", "limit": 3}),
    )
    assert parameters == {"recognise": {*INPUTS, "path"}, **OTHER_TOOLS}
    assert set(by_path) == {"predictions", "known", "abstained"}
    assert by_path["abstained"] is False
    best = by_path["predictions"][0]
    assert set(best) == {"entity_id", "title", "description", "url", "score", "confidence"}
    assert (best["entity_id"], best["title"]) == ("Q15083", "Giraffe")
    assert best["score"] > 0.99
    assert len(by_path["predictions"]) == 5
    assert [each["title"] for each in by_base64["predictions"]] == ["Girafe"]
    expected = {"Q89", "Q503", "Q13191", "flag:CI", "flag:JP", "flag:BR"}
    assert {each["entity_id"] for each in fruit["predictions"]} <= expected
    assert (entity["titles"]["zh"], entity["image_credits"][0]["author"]) == ("长颈鹿", "Ann")
    assert [(each["title"], each["types"]) for each in found["entities"]] == [("Giraffe", ["animal"])]


def test_bad_input_is_a_tool_error_and_the_next_call_works(source, picture, tmp_path):
    (tmp_path / "notes.txt").write_text("a secret")
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:60])
    (tmp_path / "empty.png").touch()
    wrong: list[tuple[str, dict, str]] = [
        ("recognise", {"path": str(tmp_path / "missing.png")}, "missing.png is not a file; check the path"),
        ("recognise", {"path": str(tmp_path)}, "is not a file; check the path"),
        ("recognise", {"path": "/dev/zero"}, "is not a file; check the path"),
        ("recognise", {"path": "x" * 5000}, "cannot be read (File name too long)"),
        ("recognise", {"path": str(tmp_path / "notes.txt")}, "notes.txt is not an image; give another file"),
        ("recognise", {"path": str(tmp_path / "empty.png")}, "empty.png is not an image; give another file"),
        ("recognise", {"path": str(tmp_path / "broken.png")}, "data is truncated or damaged"),
        ("recognise", {"base64": "no base64!"}, "base64 is malformed"),
        ("recognise", {"base64": base64.b64encode(b"no image").decode()}, "the bytes are not an image"),
        ("recognise", {"url": "https://example.org/giraffe.png"}, "URL input is disabled"),
        ("recognise", {"url": str(picture)}, "the URL must begin with http:// or https://"),
        ("recognise", {"url": f"file://{picture}"}, "the URL must begin with http:// or https://"),
        ("recognise", {}, "give exactly one image"),
        ("recognise", {"path": str(picture), "base64": "aGFsbG8="}, "give exactly one image"),
        ("recognise", {"path": str(picture), "top_k": 0}, "top_k"),
        ("recognise", {"path": str(picture), "top_k": 101}, "top_k"),
        ("recognise", {"path": str(picture), "top_k": "many"}, "top_k"),
        ("describe_entity", {"entity_id": "Q0"}, "no entity 'Q0' in this bundle"),
        ("describe_entity", {}, "entity_id"),
        ("search_titles", {"query": ""}, "query"),
        ("no_such_tool", {}, "no_such_tool"),
    ]
    right = ("search_titles", {"query": "lion"})
    calls = [each for name, arguments, _ in wrong for each in ((name, arguments), right)]
    answers = call(stdio(*source), *calls)
    for (name, arguments, expected), error, found in zip(wrong, answers[::2], answers[1::2], strict=True):
        assert expected in error, (name, arguments)
        assert "Traceback" not in error
        assert found["entities"][0]["title"] == "Lion"


def test_an_image_over_the_limit_is_refused(small_bundle, picture):
    server = stdio("--bundle", str(small_bundle), WIKICLIP_MAX_BODY_BYTES="100")
    encoded = base64.b64encode(picture.read_bytes()).decode()
    for error in call(server, ("recognise", {"path": str(picture)}), ("recognise", {"base64": encoded})):
        assert "the image has over 100 bytes; give a smaller one" in error


@pytest.fixture(scope="module")
def bundle_over_http(small_bundle) -> Iterator[str]:
    """The URL of the command with a bundle."""
    with over_http("--bundle", str(small_bundle)) as url:
        yield url


@pytest.fixture(scope="module")
def service_over_http(service) -> Iterator[str]:
    """The URL of the command with a service."""
    with over_http("--url", str(service.base_url)) as url:
        yield url


@pytest.mark.parametrize("source", ["bundle_over_http", "service_over_http"])
def test_over_http_no_path_is_read(source, request, picture, giraffe):
    encoded = base64.b64encode(giraffe).decode()
    paths = [{"path": str(picture)}, {"url": str(picture)}, {"url": f"file://{picture}"}, {"base64": str(picture)}]
    parameters, (*errors, answer, entity) = list_and_call(
        request.getfixturevalue(source),
        *(("recognise", given) for given in paths),
        ("recognise", {"base64": encoded, "path": "/etc/passwd", "top_k": 1}),
        ("describe_entity", {"entity_id": "flag:JP"}),
    )
    assert parameters == {"recognise": INPUTS, **OTHER_TOOLS}
    assert [type(error) for error in errors] == [str] * len(paths)
    assert [each["entity_id"] for each in answer["predictions"]] == ["Q15083"]
    assert entity["title"] == "Flag of Japan"


def test_over_http_pages_of_other_sites_are_refused(bundle_over_http):
    accept = {"Accept": "application/json, text/event-stream"}
    for headers, status in (({}, 200), ({"Origin": "http://evil.example"}, 403), ({"Host": "evil.example"}, 421)):
        assert httpx.post(bundle_over_http, json=INITIALIZE, headers=accept | headers).status_code == status
    headers = {"Content-Type": "application/json", **accept}
    assert httpx.post(bundle_over_http, content=b"x" * 32_000_000, headers=headers).status_code == 413


def test_an_image_by_url_where_the_service_allows_it(serve, small_bundle, giraffe, monkeypatch):
    class Fetcher:
        def __init__(self, *_, **__) -> None: ...

        async def fetch(self, url: str) -> bytes:
            assert url == "https://example.org/giraffe.png"
            return giraffe

    question = ("recognise", {"url": "https://example.org/giraffe.png", "top_k": 1})
    monkeypatch.setattr(agents, "ImageFetcher", Fetcher)
    with serve(small_bundle, fetcher=Fetcher()) as service:
        for answers in (
            AsyncClient(str(service.base_url)),
            agents.BundleAnswers(str(small_bundle), Settings(threads=1)),
        ):

            async def ask(answers=answers) -> list:
                try:
                    return await answers_of(agents.create_server(answers, 10_000, local_files=False), [question])
                finally:
                    await answers.close()

            (answer,) = asyncio.run(ask())
            assert [each["title"] for each in answer["predictions"]] == ["Giraffe"]


def test_an_api_key_is_sent(serve, small_bundle, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    question = ("search_titles", {"query": "lion"})
    with serve(small_bundle, api_keys=("secret",)) as service:
        source = ["--url", str(service.base_url)]
        (error,) = call(stdio(*source), question)
        (found,) = call(stdio(*source, "--api-key-file", str(tmp_path / "key")), question)
    assert "API key" in error
    assert found["entities"][0]["title"] == "Lion"


def test_stdout_has_only_the_protocol_and_the_end_of_stdin_ends_it(small_bundle, picture):
    initialized = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    calls = [("recognise", {"path": str(picture)}), ("recognise", {"path": "missing"}), ("search_titles", {})]
    requests = [
        {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls, 2)
    ]
    sent = [*map(json.dumps, [INITIALIZE, initialized]), "not JSON", *map(json.dumps, requests)]
    command = [sys.executable, *COMMAND, "--bundle", str(small_bundle)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdin.write("".join(line + "\n" for line in sent))
        process.stdin.flush()
        answered: dict[int, dict] = {}
        while not {1, 2, 3, 4} <= set(answered):
            message = json.loads(process.stdout.readline())
            assert message["jsonrpc"] == "2.0"
            answered[message.get("id")] = message
        rest, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, rest) == (0, "")
    assert [answered[number]["result"].get("isError", False) for number in (2, 3, 4)] == [False, True, True]


def test_ctrl_c_ends_it(small_bundle):
    command = [sys.executable, *COMMAND, "--bundle", str(small_bundle)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdin.write(json.dumps(INITIALIZE) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 130


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give one of --bundle and --url"),
        (["--bundle", "a", "--url", "http://127.0.0.1:1"], "give one of --bundle and --url"),
        (["--bundle", "missing"], "missing"),
        (["--url", "http://127.0.0.1:1", "--http", "{port}"], "cannot listen on 127.0.0.1 port {port}"),
    ],
    ids=["no-source", "two-sources", "no-bundle", "used-port"],
)
def test_bad_usage_is_one_line_and_exit_2(arguments, reason, service):
    port = str(service.base_url.port)
    done = run_wikiclip("mcp", *(each.format(port=port) for each in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .+\n", done.stderr)
    assert reason.format(port=port) in done.stderr
