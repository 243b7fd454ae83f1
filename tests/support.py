"""What the tests share: real masters and agents on free ports, raw requests, deadlines, films."""
from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

TOP = Path(__file__).resolve().parent.parent
FILM = TOP.parent / "shared" / "media" / "bigbuckbunny.mp4"
PATIENCE_S = 60.0


def wait_for(what: Callable[[], Any], seconds: float = PATIENCE_S, why: str = "") -> Any:
    """Return the first true value of `what`; AssertionError after the deadline, which is never a short one.

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
    """Return an FFmpeg with libvmaf and xpsnr: FFDIST_TEST_FFMPEG, else the one that --install fetched."""
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
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"}, method=method)
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


class Program:
    """A process of ours under test, its stderr in a file; end() leaves nothing behind."""

    known: ClassVar[list[Program]] = []  # since the running test began, and those that all tests share

    def __init__(self, argv: list[str], folder: Path, name: str, env: dict[str, str] | None = None,
                 cwd: Path | None = None) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("FFDIST_")}
        self.log = folder / f"{name}.log"
        self._file = open(self.log, "ab")
        self._said = ""  # its last words, once it has ended
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self._file, stderr=self._file,
                                        cwd=cwd or folder, env={**clean, "HOME": str(folder), **(env or {})})
        self.known.append(self)

    @property
    def pid(self) -> int:
        return self.process.pid

    def words(self) -> str:
        return self.log.read_text(errors="replace")

    def last_words(self) -> str:
        """Return the end of what it said, also when its folder has gone."""
        with contextlib.suppress(OSError):
            self._said = self.words()
        return "\n".join(self._said.splitlines()[-20:])

    def wait(self, seconds: float = PATIENCE_S) -> int:
        return self.process.wait(max(seconds, PATIENCE_S))

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        self.last_words()
        self._file.close()

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"{self.log.stem} did not end on a signal: {self.words()}") from None
            finally:
                self._close()
        self._close()


def told_by_programs() -> str:
    """Return the last words of each program that the running test started, or shares."""
    words = {program.log: program.last_words() for program in Program.known}
    return "".join(f"\n-- the end of {log.name}:\n{said}\n" for log, said in words.items() if said)


def forget_programs() -> None:
    """Forget the programs that have ended: the next test begins."""
    Program.known[:] = [program for program in Program.known if program.process.poll() is None]


class Master(Program):
    """A real `ffdist.py master`; a restart on the same folder and port is Master(folder, port=…)."""

    def __init__(self, folder: Path, *flags: str, port: int = 0, python: str = sys.executable,
                 env: dict[str, str] | None = None) -> None:
        argv = [python, "-W", "error", str(TOP / "ffdist.py"), "master", "--host", "127.0.0.1", "--port",
                str(port), "--data-dir", str(folder / "master"), *flags]
        start = (folder / "master.log").stat().st_size if (folder / "master.log").exists() else 0
        super().__init__(argv, folder, "master", env)
        found = wait_for(lambda: self._address(start) or self.process.poll() is not None,
                         why="the master's address")
        if not isinstance(found, int) or isinstance(found, bool):
            raise AssertionError(f"the master did not start: {self.words()}")
        self.port = found
        self.url = f"http://127.0.0.1:{self.port}"

    def words(self) -> str:
        """Return its log so far; a line is written up to 50 ms after its event."""
        if self.process.poll() is None:
            time.sleep(0.15)
        return super().words()

    def _address(self, start: int) -> int | None:
        said = self.log.read_bytes()[start:].decode(errors="replace")
        match = re.search(r"master at http://[^ ]*:(\d+),", said)
        return int(match[1]) if match else None

    def call(self, method: str, path: str, body: Any = None, **more: Any) -> Answer:
        return call(self.url, method, path, body, **more)

    def get(self, path: str) -> Any:
        answer = self.call("GET", path)
        assert answer.status == 200, answer
        return answer.body

    def submit(self, scenario: str = "720p30-h264", **parameters: Any) -> Any:
        answer = self.call("POST", "/jobs", {"scenario": scenario, "parameters": parameters})
        assert answer.status == 201, answer
        return answer.body

    def register(self, address: str = "worker", **more: Any) -> Any:
        answer = self.call("POST", "/nodes/register", {"address": address, **more})
        assert answer.status in (200, 201), answer
        return answer.body

    def finished(self, job_id: str, seconds: float = PATIENCE_S) -> Any:
        """Return the job when it is final."""
        def final() -> Any:
            job = self.get(f"/jobs/{job_id}")
            return job if job["status"] in ("completed", "failed", "canceled") else None
        return wait_for(final, seconds, f"the end of job {job_id}")


class Agent(Program):
    """A real `agent.py --register` beside its master; state and films lie under `folder`."""

    def __init__(self, folder: Path, master: str, *flags: str, name: str = "agent", probe: bool = False,
                 python: str = sys.executable, env: dict[str, str] | None = None) -> None:
        self.state = folder / f"{name}-state"
        self.work = self.state / "work"
        media = folder / "media"
        media.mkdir(exist_ok=True)
        argv = [python, "-W", "error", str(TOP / "agent.py"), "--register", "--master", master,
                "--allow-master-as-worker", "--yes", "--state-dir", str(self.state),
                "--media-root", str(media), "--name", name, *([] if probe else ["--no-probe"]), *flags]
        super().__init__(argv, folder, name, {"FFDIST_DRAIN_LIMIT": "0s", **(env or {})})

    def at_rest(self) -> bool:
        """Tell whether its work folder holds nothing but the cache."""
        return not self.work.exists() or {path.name for path in self.work.iterdir()} <= {"cache"}


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
    """Make a folder that is a small file system of its own for a test; skip where that cannot be had."""
    if not mounted_small(folder, size):
        case.skipTest("a small tmpfs cannot be mounted here (it takes root)")
    case.addCleanup(subprocess.run, ["umount", "-l", str(folder)], check=True)
    return folder


class Case(unittest.TestCase):
    """A test with a folder of its own, and real processes that end with it."""

    def setUp(self) -> None:
        folder = tempfile.mkdtemp(prefix="ffdist-test-")
        self.folder = Path(folder)
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        (self.folder / "media").mkdir()

    def master(self, *flags: str, **more: Any) -> Master:
        master = Master(self.folder, *flags, **more)
        self.addCleanup(master.end)
        return master

    def agent(self, master: Master, *flags: str, **more: Any) -> Agent:
        agent = Agent(self.folder, master.url, *flags, **more)
        self.addCleanup(agent.end)
        return agent

    def fleet(self, *flags: str, **more: Any) -> tuple[Master, Agent]:
        """Start a master and an agent, and wait until it has registered."""
        need("ffmpeg", "ffprobe")
        master = self.master()
        agent = self.agent(master, *flags, **more)
        wait_for(lambda: master.get("/nodes")["count"], why=f"the agent registers: {agent.words()}")
        return master, agent


def run(*argv: str, folder: Path, env: dict[str, str] | None = None, timeout: float = 300,
        stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command line of ours to its end."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FFDIST_")}
    return subprocess.run([sys.executable, "-W", "error", *argv], input=stdin, capture_output=True, text=True,
                          cwd=folder, env={**clean, "HOME": str(folder), **(env or {})}, timeout=timeout)


def interruptible() -> None:
    """Let Ctrl-C work in a child even where the tests run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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
    """Return a logger of its own, and the list that its messages from a level on are appended to."""
    log, listener = logging.Logger("test"), _Listener(level)
    log.addHandler(listener)
    return log, listener.messages


def control_groups() -> set[str]:
    """Return the names of the control groups of attempts that are there now."""
    return {name for _, below, _ in os.walk("/sys/fs/cgroup") for name in below if name.startswith("ffdist-")}


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
