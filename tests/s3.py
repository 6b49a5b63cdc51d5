"""An S3 server on loopback, and a proxy before it that fails as networks and servers do.

moto by default; with TOMBOLA_TEST_S3, the endpoint URL of another server, and its credentials in
the usual AWS_ variables, that one (Ceph's radosgw). Tests that need it are skipped where moto or
s3fs are not installed.
"""

import contextlib
import http.client
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

_CLIENT = {
    "AWS_ACCESS_KEY_ID": "tombola",
    "AWS_SECRET_ACCESS_KEY": "tombola-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class Bucket:
    """An empty bucket on a server."""

    url: str
    """s3://..."""
    environment: dict[str, str]
    """the variables with which a process finds the server"""

    def client(self) -> Any:
        """A file system of fsspec on this server, whatever this process's environment says."""
        import s3fs

        return s3fs.S3FileSystem(
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            key=self.environment["AWS_ACCESS_KEY_ID"],
            secret=self.environment["AWS_SECRET_ACCESS_KEY"],
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def download(self, name: str, folder: os.PathLike[str]) -> None:
        """Copies all that lies below `name` into a local folder."""
        client = self.client()
        for path in client.find(f"{self.url}/{name}"):
            inside = path.split("/", 1)[1].removeprefix(f"{name}/")
            target = os.path.join(folder, inside)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            client.get_file(path, target)


@contextlib.contextmanager
def s3_server() -> Iterator[Bucket]:
    """An empty bucket, which `Folder("s3://...")` finds in this process.

    In the processes of `run_ranks`, through `with_environment`.
    """
    pytest.importorskip("s3fs", reason="needs s3fs: pip install 'tombola[test]'")
    with _endpoint() as endpoint:
        environment = {**_CLIENT, **_given(), "AWS_ENDPOINT_URL": endpoint}
        bucket = Bucket(f"s3://tombola-{uuid.uuid4().hex[:12]}", environment)
        client = bucket.client()
        client.mkdir(bucket.url)
        try:
            with environment_of(bucket.environment):
                yield bucket
        finally:
            client.rm(bucket.url, recursive=True)


def _given() -> dict[str, str]:
    """The credentials of the server that the tests were given, if there is one."""
    if "TOMBOLA_TEST_S3" not in os.environ:
        return {}
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


@contextlib.contextmanager
def _endpoint() -> Iterator[str]:
    given = os.environ.get("TOMBOLA_TEST_S3")
    if given is not None:
        yield given
        return
    server = pytest.importorskip(
        "moto.server", reason="needs moto: pip install 'tombola[test]'"
    ).ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextlib.contextmanager
def environment_of(environment: dict[str, str]) -> Iterator[None]:
    """This process with other variables; what S3 clients it has are forgotten, before and after."""
    import s3fs

    before = dict(os.environ)
    os.environ |= environment
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
        s3fs.S3FileSystem.clear_instance_cache()


def with_environment(
    environment: dict[str, str], target: Callable[..., None], *arguments: Any
) -> None:
    """Calls `target(*arguments)` under other variables: the target of a `run_ranks`."""
    os.environ |= environment
    target(*arguments)


# Faults ----------------------------------------------------------------------------------


@dataclass
class _Fault:
    """One way to fail, for the requests of a method whose path contains a text."""

    method: str
    containing: str
    left: float
    """requests to refuse, or bytes to let through"""

    def meets(self, method: str, path: str) -> bool:
        return method == self.method and self.containing in path


@dataclass
class Proxy:
    """Passes HTTP requests on to a server; fails as it is told, until it is healed."""

    url: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    """method and path of each that came"""
    _refuse: _Fault | None = None
    _cut: _Fault | None = None
    _status: int = 500
    _seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(
        self, count: float = 1, *, method: str = "PUT", containing: str = "", status: int = 500
    ) -> None:
        """Answers the next `count` requests (`inf`: all) with an error; the server sees none."""
        self._status, self._refuse = status, _Fault(method, containing, count)

    def cut(self, after: int, *, method: str = "PUT", containing: str = "") -> None:
        """Cuts the connection when that many bytes of bodies have passed, and each one after.

        Of a PUT the bytes that it sends, of a GET those that come back.
        """
        self._cut = _Fault(method, containing, after)

    def delay(self, seconds: float) -> None:
        """Holds each request back."""
        self._seconds = seconds

    def heal(self) -> None:
        """Fails no more."""
        self._refuse, self._cut, self._seconds = None, None, 0.0

    def refuses(self, method: str, path: str) -> int | None:
        """The status to answer with, or `None` to pass a request on."""
        with self._lock:
            self.requests.append((method, path))
            fault = self._refuse
            if fault is None or not fault.meets(method, path) or fault.left < 1:
                return None
            fault.left -= 1
            return self._status

    def passes(self, method: str, path: str, size: int) -> int:
        """How many of the `size` bytes of a body get through."""
        time.sleep(self._seconds)
        with self._lock:
            fault = self._cut
            if fault is None or not fault.meets(method, path):
                return size
            let = int(min(size, fault.left))
            fault.left -= let
            return let


@contextlib.contextmanager
def faulty(bucket: Bucket) -> Iterator[tuple[Proxy, Bucket]]:
    """A proxy before a bucket's server, and the bucket as it is seen through the proxy.

    In this process, too, `Folder("s3://...")` goes through the proxy. A 500 is not tried again.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    upstream = urlsplit(bucket.environment["AWS_ENDPOINT_URL"])
    proxy = Proxy(f"http://127.0.0.1:{server.server_port}")
    server.proxy, server.upstream = proxy, (upstream.hostname, upstream.port)  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    seen = Bucket(
        bucket.url,
        {**bucket.environment, "AWS_ENDPOINT_URL": proxy.url, "AWS_MAX_ATTEMPTS": "1"},
    )
    try:
        with environment_of(seen.environment):
            yield proxy, seen
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _relay(self) -> None:
        proxy: Proxy = self.server.proxy  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status = proxy.refuses(self.command, self.path)
        if status is not None:
            error = b"<Error><Code>InternalError</Code><Message>made to fail</Message></Error>"
            self._answer(status, [("Content-Type", "application/xml")], error, len(error))
            return
        sends = self.command in ("PUT", "POST")
        let = proxy.passes(self.command, self.path, len(body)) if sends else len(body)
        upstream = http.client.HTTPConnection(*self.server.upstream, timeout=60)  # type: ignore[attr-defined]
        try:
            self._ask(upstream, body[:let])
            if let < len(body):
                self._hang_up()
                return
            answer = upstream.getresponse()
            content = answer.read()
            let = len(content) if sends else proxy.passes(self.command, self.path, len(content))
            self._answer(answer.status, answer.getheaders(), content[:let], len(content))
            if let < len(content):
                self._hang_up()
        finally:
            upstream.close()

    def _ask(self, upstream: http.client.HTTPConnection, body: bytes) -> None:
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                upstream.putheader(name, value)
        upstream.endheaders()
        upstream.send(body)

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, size: int
    ) -> None:
        self.send_response_only(status)
        dropped = {"transfer-encoding", "connection", "content-length"}
        length = {n.lower(): v for n, v in headers}.get("content-length", str(size))
        for name, value in headers:
            if name.lower() not in dropped:
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(size))
        self.end_headers()
        self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _relay  # noqa: N815

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
