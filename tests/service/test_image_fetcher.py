"""Images by URL: which are fetched and which are refused. DNS is fake, the HTTP server is real."""

from __future__ import annotations

import asyncio
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpcore
import pytest

from core.errors import BadRequest, FetchFailed, Forbidden, TooLarge
from core.network import PublicNetwork, is_public
from service.image_fetcher import ImageFetcher, host_allowed, host_pattern

PUBLIC = "93.184.215.14"
NAMES = {
    "images.test": [PUBLIC],
    "a.many.test": [PUBLIC],
    "inside.test": ["10.0.0.1"],
    "half-inside.test": [PUBLIC, "127.0.0.1"],
    "elsewhere.test": [PUBLIC],
}
ALLOWED = ("images.test", "*.many.test", "inside.test", "half-inside.test", "nowhere.test", "127.0.0.1")
MAX_BYTES = 1000


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.headers["Host"], self.path, dict(self.headers)))
        path, _, argument = self.path.partition("?to=")
        body = {"/big": bytes(MAX_BYTES + 1), "/empty": b"", "/full": bytes(MAX_BYTES)}.get(path, b"image")
        self.send_response({"/redirect": 302, "/loop": 302, "/missing": 404}.get(path, 200))
        if path == "/loop":
            self.send_header("Location", "/loop")
        if argument:
            self.send_header("Location", argument)
        if path == "/zipped":
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Connection", "close")
        self.end_headers()
        if path == "/slow":
            for _ in range(40):
                self.wfile.write(b".")
                self.wfile.flush()
                time.sleep(0.05)
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_):
        pass  # some tests disconnect early


class Network(httpcore.AsyncNetworkBackend):
    """Connects every connection to the test's server and records the intended address."""

    def __init__(self, port: int):
        self.port = port
        self.intended: list[tuple[str, int]] = []

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self.intended.append((host, port))
        return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", self.port, timeout)


@pytest.fixture(scope="module")
def server():
    with QuietServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def network(server):
    server.asked.clear()
    return Network(server.server_port)


def fetcher_over(network, *, allowlist=ALLOWED, timeout_s=5.0, max_bytes=MAX_BYTES):
    async def resolver(host, port):
        return NAMES.get(host, [host] if host[0].isdigit() else [])

    return ImageFetcher(allowlist, max_bytes=max_bytes, timeout_s=timeout_s, resolver=resolver, network=network)


def fetch(network, url, **given):
    return asyncio.run(fetcher_over(network, **given).fetch(url))


def test_an_image_is_fetched_from_the_checked_address(network, server):
    assert fetch(network, "http://IMAGES.test/a.png?b=1#c") == b"image"
    assert network.intended == [(PUBLIC, 80)]
    ((host, path, headers),) = server.asked
    assert (host, path) == ("images.test", "/a.png?b=1")
    assert not {"Cookie", "Authorization"} & set(headers)
    assert fetch(network, "http://a.many.test") == b"image"
    assert len(fetch(network, "http://images.test/full")) == MAX_BYTES


def test_proxies_in_the_environment_are_ignored(network, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch(network, "http://images.test/") == b"image"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://images.test/a",
        "file:///etc/passwd",
        "//images.test/a",
        "http://user@images.test/",
        "http://user:password@images.test/",
        "http://images.test:8080/",
        "http://images.test:22/",
        "http://other.test/",
        "http://many.test/",
        "http://many.test.evil.test/",
        "http://xmany.test/",
        "http://images.test./",
        "http://images.test@evil.test/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://127.0.0.1/",
        "http://2130706433/",
        "http:///a",
        "http://inside.test/",
        "http://half-inside.test/",
    ],
)
def test_forbidden_urls_are_not_requested(network, url):
    with pytest.raises(Forbidden) as refused:
        fetch(network, url)
    assert network.intended == []
    assert "10.0.0.1" not in str(refused.value)  # internal addresses are not revealed


@pytest.mark.parametrize(
    "url",
    [
        "http://images.test\\@evil.test/",
        "http://images.test/a b",
        "http://images.test/\r\nX: y",
        "http://images.test:x/",
        "http://[/",
        "http://images.test/ü",
        "http://images.test/" + "a" * 5000,
    ],
)
def test_malformed_urls_are_refused(network, url):
    with pytest.raises(BadRequest):
        fetch(network, url)
    assert network.intended == []


def test_without_an_allow_list_nothing_is_fetched(network):
    with pytest.raises(Forbidden, match="disabled"):
        fetch(network, "http://images.test/", allowlist=())


@pytest.mark.parametrize(
    "to",
    [
        "http://inside.test/",
        "http://elsewhere.test/",
        "http://127.0.0.1/",
        "file:///etc/passwd",
        "http://a:b@images.test/",
        "http://images.test:8080/",
        "//elsewhere.test/",
    ],
)
def test_each_redirect_is_checked_again(network, to):
    with pytest.raises(Forbidden):
        fetch(network, f"http://images.test/redirect?to={to}")
    assert network.intended == [(PUBLIC, 80)]


def test_redirects_to_allowed_hosts_are_followed_up_to_a_limit(network):
    assert fetch(network, "http://images.test/redirect?to=http://a.many.test/x") == b"image"
    assert fetch(network, "http://images.test/redirect?to=/x") == b"image"
    network.intended.clear()
    with pytest.raises(FetchFailed, match="more than 3"):
        fetch(network, "http://images.test/loop")
    assert len(network.intended) == 4


def test_each_hop_resolves_its_name_once(network):
    answers = iter([[PUBLIC], ["127.0.0.1"]])

    async def rebinding(host, port):
        return next(answers)

    fetcher = ImageFetcher(ALLOWED, max_bytes=MAX_BYTES, timeout_s=5, resolver=rebinding, network=network)
    assert asyncio.run(fetcher.fetch("http://images.test/")) == b"image"
    assert network.intended == [(PUBLIC, 80)]
    with pytest.raises(Forbidden):
        asyncio.run(fetcher.fetch("http://images.test/"))


def test_images_over_the_limit_are_refused(network):
    with pytest.raises(TooLarge):
        fetch(network, "http://images.test/big")


@pytest.mark.parametrize(
    "url",
    [
        "http://images.test/missing",
        "http://images.test/empty",
        "http://images.test/zipped",
        "http://nowhere.test/",
        "http://images.test/redirect?to=http://[",
        "https://images.test/",
    ],
)
def test_failed_fetches_raise(network, url):
    with pytest.raises(FetchFailed):
        fetch(network, url)


def test_an_unreachable_server_raises(network):
    network.port = 1
    with pytest.raises(FetchFailed):
        fetch(network, "http://images.test/")


def test_a_slow_server_times_out(network):
    started_at = time.monotonic()
    with pytest.raises(FetchFailed, match=r"within 0\.3 s"):
        fetch(network, "http://images.test/slow", timeout_s=0.3)
    assert time.monotonic() - started_at < 1.5


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "198.18.0.1",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:8.8.8.8",
        "::ffff:127.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:1::",
        "2001:db8::1",
        "fec0::1",
        "no address",
        "168.63.129.16",  # Azure's metadata service
        "2a00:1450::a83f:8110",  # the same through NAT64 with a network's own prefix
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",  # AWS, Azure, GCP, Oracle
        "168.63.129.16",  # Azure
        "100.100.100.200",  # Alibaba
        "192.0.0.192",  # Oracle
        "fd00:ec2::254",  # AWS
        "fd20:ce::254",  # GCP
        "::ffff:169.254.169.254",
        "64:ff9b::a83f:8110",
        "64:ff9b:1::6464:64c8",
        "2002:a9fe:a9fe::",
        "2001:0:1::5601:5601",  # Teredo inverts the client's address
    ],
)
def test_metadata_services_are_refused_even_where_private_addresses_are_allowed(network, address):
    async def resolver(host, port):
        return [host]

    async def connect(host):
        stream = await PublicNetwork(network, resolver=resolver, allow_private=True).connect_tcp(host, 80)
        await stream.aclose()

    asyncio.run(connect("10.1.2.3"))
    with pytest.raises(Forbidden):
        asyncio.run(connect(address))
    assert network.intended == [("10.1.2.3", 80)]


@pytest.mark.parametrize("address", ["8.8.8.8", PUBLIC, "2606:4700::1111"])
def test_addresses_that_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "text", ["https://a.org", "a.org/x", "a.org:80", "*", "*.", "a.*", "*.*.org", "[::1]", "a..org", ""]
)
def test_invalid_host_patterns_are_refused(text):
    with pytest.raises(ValueError, match="without scheme"):
        host_pattern(text)


def test_hosts_match_whole_labels():
    assert host_allowed("b.a.org", (host_pattern("*.A.org"),))
    assert not host_allowed("ba.org", ("*.a.org",))
    assert not host_allowed(".a.org", ("*.a.org",))


def test_an_image_by_url_is_recognised_over_http(serve, small_bundle, small_images, server):
    network = Network(server.server_port)
    image = small_images["Q15083"]

    class Images(Handler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(image)

    server.RequestHandlerClass = Images
    try:
        with serve(small_bundle, fetcher=fetcher_over(network, max_bytes=2**20)) as service:
            answer = service.post("/recognize", json={"image": {"url": "http://images.test/giraffe.png"}})
            refused = service.post("/recognize", json={"image": {"url": "http://169.254.169.254/latest"}})
            missing = service.post("/recognize", json={"image": {"url": "http://nowhere.test/"}})
    finally:
        server.RequestHandlerClass = Handler
    assert answer.json()["predictions"][0]["entity_id"] == "Q15083"
    assert (refused.status_code, missing.status_code) == (403, 422)
    assert missing.json()["type"] == "/docs#problem-fetch-failed"
