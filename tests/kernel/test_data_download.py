"""Downloads are kept only if they are, byte for byte, what was pinned. The web is a server on this machine."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from workbench.data._download import Remote, fetch
from workbench.errors import Cancelled, DataError
from workbench.jobs import on_progress

CONTENT = bytes(range(256)) * 10_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Web(ThreadingHTTPServer):
    """Answers good, wrong, short, long and cut content by path, 404 for the rest; remembers what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: list[str] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class _Answers(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.server.asked.append(name)
        body = {
            "good": CONTENT,
            "wrong": CONTENT[::-1],
            "short": CONTENT[:-1],
            "long": CONTENT * 2,
            "cut": CONTENT[:9],
        }.get(name)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        # a connection cut short: more is announced than is sent
        self.send_header("Content-Length", str(len(CONTENT) if name == "cut" else len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except ConnectionError:
            self.close_connection = True  # the client had seen enough

    def log_message(self, *_: object) -> None:
        """The tests' output is no place for an access log."""


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Web()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def remote(*urls: str) -> Remote:
    return Remote("data.bin", urls, len(CONTENT), SHA256)


def test_a_good_download_arrives_whole_and_alone(web: Web, tmp_path: Path):
    path = fetch(remote(web.url("good")), tmp_path / "new" / "folder")
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_what_is_there_is_not_downloaded_again(web: Web, tmp_path: Path):
    (tmp_path / "data.bin").write_bytes(CONTENT)
    fetch(remote(web.url("good")), tmp_path)
    assert web.asked == []


def test_a_damaged_file_is_downloaded_again(web: Web, tmp_path: Path):
    (tmp_path / "data.bin").write_bytes(CONTENT[:-5])
    assert fetch(remote(web.url("good")), tmp_path).read_bytes() == CONTENT


def refused_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/good"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("wrong", f"has the SHA-256 .* instead of {SHA256}"),
        ("short", f"ended after {len(CONTENT) - 1} of {len(CONTENT)} bytes"),
        ("cut", "ended after 9 of|cannot be read"),
        ("long", f"is longer than the {len(CONTENT)} bytes"),
        ("missing", "cannot be read .*404"),
    ],
)
def test_a_bad_download_is_refused_and_leaves_nothing(web: Web, tmp_path: Path, path: str, said: str):
    with pytest.raises(DataError, match=said) as error:
        fetch(remote(web.url(path)), tmp_path)
    assert str(tmp_path / "data.bin") in str(error.value)  # where to place it by hand
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_error_says_where_to_place_the_file(tmp_path: Path):
    with pytest.raises(DataError, match=rf"cannot be read.*Check the network, or place the file .*{SHA256} at "):
        fetch(remote(refused_port()), tmp_path)


def test_a_bad_download_keeps_the_file_that_was_there(web: Web, tmp_path: Path):
    (tmp_path / "data.bin").write_bytes(b"old")
    with pytest.raises(DataError):
        fetch(remote(web.url("wrong")), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == b"old"


def test_the_next_mirror_is_tried_and_the_first_good_one_wins(web: Web, tmp_path: Path):
    urls = [web.url(path) for path in ("missing", "wrong", "good", "long")]
    assert fetch(remote(refused_port(), *urls), tmp_path).read_bytes() == CONTENT
    assert web.asked == ["missing", "wrong", "good"]


def test_progress_is_told_and_can_cancel(web: Web, tmp_path: Path):
    told: list[float] = []

    def listen(fraction: float, message: str) -> None:
        told.append(fraction)
        if len(told) == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        fetch(remote(web.url("good")), tmp_path, on_progress(listen))
    assert 0 < told[0] < told[1] <= 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be used for downloads"):
        fetch(remote("http://127.0.0.1:9/good"), tmp_path / "file" / "folder")
