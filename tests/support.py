"""Helpers that test modules share: deadlines for sleeps, raw requests, small disks, films."""
from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import socket
import subprocess
import time
import unittest
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parent.parent
FILM = TOP.parent / "shared" / "media" / "bigbuckbunny.mp4"
PATIENCE_S = 60.0


def wait_for(what: Callable[[], Any], seconds: float = PATIENCE_S, why: str = "") -> Any:
    """Return the first true value of `what`; AssertionError after the deadline, never a short one.

    It looks ever more rarely: looking takes time from what is waited for.
    """
    began, limit = time.monotonic(), max(seconds, PATIENCE_S)
    while True:
        value = what()
        if value:
            return value
        waited = time.monotonic() - began
        if waited > limit:
            raise AssertionError(f"not within {limit} s: {why or what}")
        time.sleep(min(0.15, 0.02 + waited / 20))


def need(*programs: str) -> None:
    """Skip the test unless these programs are on PATH."""
    for program in programs:
        if shutil.which(program) is None:
            raise unittest.SkipTest(f"{program} is not installed")


CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ffdist-tests"


def newer_ffmpeg() -> str | None:
    """Return an FFmpeg with libvmaf and xpsnr: FFDIST_TEST_FFMPEG, else that of --install."""
    found = [os.environ.get("FFDIST_TEST_FFMPEG", ""), *map(str, sorted(CACHE.glob("ffmpeg-*")))]
    return next((path for path in found if path and os.access(path, os.X_OK)), None)


class Answer:
    """An HTTP answer: `status`, `body` (JSON when it is some), `text`."""

    def __init__(self, status: int, raw: bytes) -> None:
        self.status = status
        self.text = raw.decode("utf-8", "replace")
        try:
            self.body: Any = json.loads(raw)
        except ValueError:
            self.body = None

    def __repr__(self) -> str:
        return f"{self.status} {self.text[:300]}"


_OPENER = urllib.request.OpenerDirector()  # no proxies, and no certificates to load at each call
for _handler in (urllib.request.HTTPHandler(), urllib.request.HTTPDefaultErrorHandler(),
                 urllib.request.HTTPErrorProcessor()):
    _OPENER.add_handler(_handler)


def call(url: str, method: str, path: str, body: Any = None, raw: bytes | None = None,
         timeout: float = 90) -> Answer:
    """Send one request on a connection of its own."""
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url + path, data, {"Content-Type": "application/json"}, method=method
    )
    try:
        with _OPENER.open(request, timeout=timeout) as answer:
            return Answer(answer.status, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.read())


def exchange(port: int, raw: bytes, timeout: float = 20, close: bool = False) -> bytes:
    """Send bytes to a port and return all that comes back until the peer closes or time is up."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(raw)
            if close:
                connection.shutdown(socket.SHUT_WR)
        return all_of(connection)


def all_of(connection: socket.socket) -> bytes:
    """Return all that comes until the peer closes or the connection's time is up."""
    received = b""
    with contextlib.suppress(OSError):
        while True:
            data = connection.recv(65536)
            if not data:
                break
            received += data
    return received


def mounted_small(folder: Path, size: str) -> bool:
    """Make a folder and mount a small tmpfs on it; return whether that was possible."""
    folder.mkdir()
    done = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "ffdist-test", str(folder)],
        capture_output=True).returncode == 0
    if not done:
        folder.rmdir()
    return done


def small_disk(case: unittest.TestCase, folder: Path, size: str = "1m") -> Path:
    """Make a folder that is a small file system of its own; skip the test where none can be had."""
    if not mounted_small(folder, size):
        case.skipTest("a small tmpfs cannot be mounted here (it takes root)")
    case.addCleanup(subprocess.run, ["umount", "-l", str(folder)], check=True)
    return folder


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder over HTTP on loopback; gives its URL."""
    import functools
    import http.server
    import threading

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Listener(logging.Handler):
    """Keeps the messages of a logger."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def listening_log(level: int = logging.DEBUG) -> tuple[logging.Logger, list[str]]:
    """Return a logger of its own, and the list to which it appends messages from a level on."""
    log, listener = logging.Logger("test"), _Listener(level)
    log.addHandler(listener)
    return log, listener.messages


def control_groups() -> set[str]:
    """Return the names of the control groups of attempts that are there now."""
    return {
        name
        for _, below, _ in os.walk("/sys/fs/cgroup")
        for name in below
        if name.startswith("ffdist-")
    }


def free_port() -> int:
    """Return a port that was free a moment ago, and that the kernel gives to nobody by itself.

    A server that is started again has to find its port free; so each is given once.
    """
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _GIVEN_PORTS:
                _GIVEN_PORTS.add(port)
                return port


_GIVEN_PORTS: set[int] = set()
