"""The load of the bench: a bare server, a lean client, crowds, and queues that people use.

Each load runs in a process of its own. The client speaks raw HTTP over sockets that are kept open
and makes its requests by joining bytes, because it shares the cores with the server under test:
what it uses is missing there. A crowd comes from several loopback addresses, as a fleet does, so
that a limit per address does not meet it.
"""
from __future__ import annotations

import http.server
import json
import math
import multiprocessing
import os
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import free_port, wait_for

FORK = multiprocessing.get_context("fork")
JOB = json.dumps(
    {"scenario": "720p30-h264", "parameters": {"duration": 10, "bitrate": "2500k"}}
).encode()
RESULT = {
    "status": "completed",
    "metrics": {
        "cpu_usage": 75.5,
        "memory_usage": 2048,
        "duration": 5.0,
        "frames": 300,
        "fps": 60.0,
        "speed": 2.0,
    },
    "analyzer_output": {"scenario": "720p30-h264", "recommendation": "optimal"},
    "completed_at": "2025-12-29T19:45:00Z",
}
TICKS = os.sysconf("SC_CLK_TCK")
ADDRESSES = 8  # a crowd comes from 127.0.0.2 to 127.0.0.9
# One in so many nodes of a crowd has no free slot: it parks a heartbeat, the others a claim.
FULL_NODES = 5
PAUSE_S = 0.01  # between two submissions whose start is measured


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"  {text}", file=sys.stderr, flush=True)


# ---- processes

def raise_file_limit() -> int:
    """Allow as many open files as this user may have, and return that number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


@contextmanager
def beside(work: Callable[..., Any], *args: Any) -> Iterator[Connection]:
    """Run a function in a process of its own, which is killed at the end; gives a pipe to it."""
    ours, theirs = FORK.Pipe()

    def run() -> None:
        ours.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the bench ends what it started
        raise_file_limit()
        work(theirs, *args)
    process = FORK.Process(target=run, daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()
        ours.close()


def heard(pipe: Connection) -> Any:
    """Return the next message of a process beside this one."""
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError("the load failed; its error stands above") from None


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """Run a function in a process of its own and return what it returns."""
    def send(pipe: Connection) -> None:
        pipe.send(work(*args))
    with beside(send) as pipe:
        return heard(pipe)


def memory_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, its children not counted."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS


def thread_count(pid: int) -> int:
    """Return the number of threads of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[17])


def watched(pid: int, seconds: float) -> tuple[int, float]:
    """Watch a process; return its memory in bytes and its CPU in % of one core."""
    if seconds > 1:
        say(f"watching for {seconds:.0f} s")
    before, began = cpu_seconds(pid), time.perf_counter()
    time.sleep(seconds)
    return memory_bytes(pid), 100 * (cpu_seconds(pid) - before) / (time.perf_counter() - began)


# ---- the bare server

class Bare(http.server.BaseHTTPRequestHandler):
    """What http.server can do at best: keep-alive, no stalls, a small JSON answer, nothing else."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    ANSWER = b'{"status": "success"}'

    def do_POST(self) -> None:
        """Read the body and answer."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def do_GET(self) -> None:
        """Answer; /park/S first waits so many seconds, as a parked request does."""
        if self.path.startswith("/park/"):
            threading.Event().wait(float(self.path[6:]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.ANSWER)))
        self.end_headers()
        self.wfile.write(self.ANSWER)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class BareServer(http.server.ThreadingHTTPServer):
    """The bare server, with a backlog that lets a crowd in."""

    daemon_threads = True
    request_queue_size = 4096

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a crowd that was killed."""


def serve_bare(pipe: Connection) -> None:
    """Run the bare server; send its port and process id."""
    server = BareServer(("127.0.0.1", 0), Bare)
    pipe.send((server.server_address[1], os.getpid()))
    server.serve_forever()


# ---- the client

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class Link:
    """One connection that is kept open, for one request at a time; a node where it has an id."""

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection(
            ("127.0.0.1", port), timeout=60, source_address=(source, 0)
        )
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self.node = ""

    def become(self, node: str) -> None:
        """Be a node from now on."""
        self.node = node
        self._question = f"GET /jobs/next?node_id={node}&session=s&claim=".encode()
        told = {**RESULT, "node_id": node, "session": "s", "job_id": ""}
        self._report = json.dumps(told).encode()[:-2]  # the id of a job goes to its end

    def receive(self) -> bytes | None:
        """Take in what has come; return the body of an answer when it is whole."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer = self._buffer + data if self._buffer else data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        length = _LENGTH.search(self._buffer)
        if length is None or len(self._buffer) < end + 4 + int(length[1]):
            return None
        if self._buffer[9:10] != b"2":
            raise RuntimeError(f"refused: {self._buffer[:500]!r}")
        body, self._buffer = self._buffer[end + 4:], b""
        return body

    def ask(self, raw: bytes) -> bytes:
        """Send a request and return the body of its answer."""
        self.socket.sendall(raw)
        while True:
            body = self.receive()
            if body is not None:
                return body

    def next_job(self, wait_s: float = 0) -> bytes:
        """Return the request of a free node."""
        wait = b"&wait=%g" % wait_s if wait_s else b""
        word = os.urandom(8).hex().encode()
        return b"%b%b%b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % (self._question, word, wait)

    def beat(self, wait_s: float = 0) -> bytes:
        """Return the request of a node that has no free slot."""
        wait = f"?wait={wait_s:g}" if wait_s else ""
        return request("POST", f"/nodes/{self.node}/heartbeat{wait}", b'{"session": "s"}')

    def report(self, job: tuple[bytes, bytes]) -> bytes:
        """Return the request that ends an attempt."""
        body = b'%b%b", "attempt": %b}' % (self._report, *job)
        return (b"POST /results HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body))


def request(method: str, path: str, body: bytes = b"") -> bytes:
    """Return the bytes of a request."""
    length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{length}\r\n".encode() + body


# What a report looks like to the bare server, which does not read it.
BARE_RESULT = request("POST", "/", json.dumps(RESULT).encode())
BARE_JOB = request("POST", "/", JOB)
HEALTH = request("GET", "/health")
_CLAIMED = re.compile(rb'"job": \{"id": "([0-9a-f-]{36})".*?"attempt": (\d+)', re.DOTALL)


def claimed(body: bytes) -> tuple[bytes, bytes] | None:
    """Return id and attempt of a claimed job."""
    match = _CLAIMED.search(body)
    return (match[1], match[2]) if match else None


def links_to(port: int, count: int) -> list[Link]:
    """Open connections, a crowd's from several addresses."""
    if count <= 256:
        return [Link(port) for _ in range(count)]
    return [Link(port, f"127.0.0.{2 + number % ADDRESSES}") for number in range(count)]


def register(port: int, count: int) -> list[Link]:
    """Register nodes, a link each, as agents do."""
    links = links_to(port, count)
    for number, link in enumerate(links):
        body = {
            "address": f"bench-{os.getpid()}-{number}",
            "session": "s",
            "protocol": 1,
            "cpu_threads": 2,
            "max_concurrent_jobs": 1000,
        }
        raw = request("POST", "/nodes/register", json.dumps(body).encode())
        link.become(json.loads(link.ask(raw))["id"])
        if number % 2000 == 1999:
            say(f"{number + 1:,} nodes registered")
    return links


def drive(links: Sequence[Link], think: Callable[[Link, bytes | None], bytes | None]) -> None:
    """Keep all links busy: `think` turns an answer (None at first) into the next request; None ends
    one."""
    by_number = {link.socket.fileno(): link for link in links}
    busy = 0
    with closing(select.epoll()) as poll:
        for number, link in by_number.items():
            raw = think(link, None)
            if raw is not None:
                poll.register(number, select.EPOLLIN)
                link.socket.sendall(raw)
                busy += 1
        while busy:
            for number, _ in poll.poll():
                link = by_number[number]
                body = link.receive()
                if body is None:
                    continue
                raw = think(link, body)
                if raw is None:
                    poll.unregister(number)
                    busy -= 1
                else:
                    link.socket.sendall(raw)


def rate(port: int, clients: int, raw: bytes, seconds: float) -> float:
    """Return requests/s of the same request from some clients."""
    links = [Link(port) for _ in range(clients)]
    for link in links:
        link.ask(raw)
    began, count = time.perf_counter(), 0
    deadline = began + seconds

    def think(link: Link, body: bytes | None) -> bytes | None:
        nonlocal count
        count += body is not None
        return raw if time.perf_counter() < deadline else None
    drive(links, think)
    return count / (time.perf_counter() - began)


def commits(folder: Path, seconds: float = 1) -> float:
    """Return how often SQLite alone can sync a small row to the disk, in commits/s.

    A core that others use is given back to a thread that waited for the disk some milliseconds
    late: then this falls from thousands to hundreds, and with it whatever is durable.
    """
    with closing(sqlite3.connect(folder / "commits.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE IF NOT EXISTS rows(text TEXT)")
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            connection.execute("INSERT INTO rows VALUES(?)", ("x" * 500,))
            count += 1
        return count / (time.perf_counter() - began)


def delays(port: int, raw: bytes, count: int) -> list[float]:
    """Return the seconds that each of some requests took, one after the other."""
    link = Link(port)
    found: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        link.ask(raw)
        found.append(time.perf_counter() - began)
    return found


def visits(port: int, count: int, limit_s: float = 30) -> list[float]:
    """Return the seconds that each of some /health took on a connection of its own, 10 ms apart.

    Infinity for one that is not answered in time; it is the last.
    """
    found: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        try:
            link = Link(port)
            link.socket.settimeout(limit_s)
            link.ask(HEALTH)
        except (OSError, RuntimeError) as error:
            say(f"/health: {error}")
            return [*found, math.inf]
        found.append(time.perf_counter() - began)
        link.socket.close()
        time.sleep(PAUSE_S)
    return found


# ---- jobs

def submit_many(port: int, count: int) -> None:
    """Submit jobs, 10,000 at a time."""
    link, left = Link(port), count
    link.socket.settimeout(300)
    while left > 0:
        part = min(left, 10_000)
        link.ask(request("POST", "/jobs", b"[" + b",".join([JOB] * part) + b"]"))
        left -= part
        if left and left % 100_000 == 0:
            say(f"{count - left:,} jobs submitted")
    link.socket.close()


def cycles(port: int, depth: int, clients: int, seconds: float) -> float:
    """Return claim + result cycles/s while `depth` jobs or a few more are queued; filling is not
    counted."""
    links, filler = register(port, clients), Link(port)
    a_round, spent, done = 2000 if depth >= 2000 else 500, 0.0, 0
    queued = json.loads(filler.ask(request("GET", "/jobs?status=pending&limit=1")))["total"]
    while spent < seconds:
        submit_many(port, depth + a_round - queued)
        spent += work_off(links, a_round)
        done, queued = done + a_round, depth
    return done / spent


def cycle_cpu(port: int, pid: int, count: int) -> float:
    """Return the CPU seconds that a master spends on one claim and its result."""
    links = register(port, 8)
    submit_many(port, count + 200)
    work_off(links, 200)
    before = cpu_seconds(pid)
    work_off(links, count)
    return (cpu_seconds(pid) - before) / count


def work_off(links: Sequence[Link], count: int) -> float:
    """Claim and report so many jobs; return the seconds that it took."""
    left = count

    def think(link: Link, body: bytes | None) -> bytes | None:
        nonlocal left
        job = claimed(body) if body else None
        if job:
            return link.report(job)
        left -= 1
        return link.next_job() if left >= 0 else None
    began = time.perf_counter()
    drive(links, think)
    return time.perf_counter() - began


class Tenth(NamedTuple):
    """One tenth of a soak: jobs/s in all; claim + result cycles/s and the s of one alone, each also
    as a ratio to the requests of the bare server right after it; bytes."""

    rate: float
    cycles: float
    cycles_ratio: float
    alone: float
    alone_ratio: float
    memory: int
    journal: int


def soak(port: int, bare_port: int, pid: int, folder: Path, jobs: int) -> list[Tenth]:
    """Put jobs through a master by eight stand-in agents, 2,000 queued at a time; tell each
    tenth."""
    links, found = register(port, 8), []
    for number in range(10):
        began, spent, done, part = time.perf_counter(), 0.0, 0, jobs // 10
        while done < part:
            count = min(2000, part - done)
            submit_many(port, count)
            spent += work_off(links, count)
            done += count
        took = time.perf_counter() - began
        submit_many(port, 200)
        alone = statistics.median(work_off(links[:1], 1) for _ in range(200))
        size = sum(path.stat().st_size for path in folder.glob("journal.db*"))
        bare = rate(bare_port, 8, BARE_RESULT, 2)
        single = statistics.median(delays(bare_port, BARE_RESULT, 200))
        found.append(
            Tenth(
                part / took,
                part / spent,
                2 * part / spent / bare,
                alone,
                alone / (2 * single),
                memory_bytes(pid),
                size,
            )
        )
        say(
            f"{(number + 1) * part:,} jobs, {part / took:,.0f}/s, cycles "
            f"{found[-1].cycles_ratio:.2f} of the bare server, "
            f"{mib(found[-1].memory)}, journal {mib(size)}"
        )
    return found


def mib(size: float) -> str:
    """Return bytes in MiB."""
    return f"{size / (1 << 20):.0f} MiB"


# ---- crowds

def burst(port: int, pid: int, count: int, rounds: int, bare: bool) -> list[float]:
    """Return the CPU seconds of a server for a heartbeat of each of many nodes, all sent at once.

    The bare server gets the same requests over as many connections, from nodes of no name.
    """
    links = links_to(port, count) if bare else register(port, count)
    for link in links:
        if bare:
            link.become("bare")
    found = []
    for number in range(rounds):
        time.sleep(1)
        before = cpu_seconds(pid)
        drive(links, lambda link, body: link.beat() if body is None else None)
        time.sleep(0.5)  # what is left to do after the last answer counts too
        found.append(cpu_seconds(pid) - before)
        say(f"burst {number + 1} of {rounds}: {found[-1]:.2f} s of CPU")
    return found


class Crowd:
    """Parked requests, in a process of their own: nodes, or plain connections to the bare server.

    Sends "parked", then for each number n that it gets the seconds from each of n submissions to
    the arrival of its job at one of the nodes.
    """

    def __init__(self, pipe: Connection, port: int, count: int, wait_s: float, bare: bool) -> None:
        self._pipe = pipe
        self._bare = request("GET", f"/park/{wait_s:g}") if bare else b""
        self._wait_s = wait_s
        self._links = links_to(port, count) if bare else register(port, count)
        self._numbers = {link.socket.fileno(): n for n, link in enumerate(self._links)}
        self._sender = Link(port)
        self._left = 0
        self._found: list[float] = []
        self._began = 0.0
        self._outstanding: set[str] = set()
        self._due = 0.0

    def run(self) -> None:
        """Stay parked until the process is killed."""
        poll = select.epoll()
        for number in (self._pipe.fileno(), self._sender.socket.fileno(), *self._numbers):
            poll.register(number, select.EPOLLIN)
        for n, link in enumerate(self._links):
            link.socket.sendall(self._question(n))
        time.sleep(2)
        self._pipe.send("parked")
        while True:
            for number, _ in poll.poll(PAUSE_S if self._left else None):
                self._take(number)
            if self._left and not self._outstanding and time.perf_counter() >= self._due:
                self._outstanding = {"answer", "start"}
                self._began = time.perf_counter()
                self._sender.socket.sendall(request("POST", "/jobs", JOB))

    def _question(self, n: int) -> bytes:
        """Return what a link sends to be parked."""
        if self._bare:
            return self._bare
        # A node alone, or one of few, is free.
        if n % FULL_NODES == FULL_NODES - 1 and len(self._links) >= 100:
            return self._links[n].beat(self._wait_s)
        return self._links[n].next_job(self._wait_s)

    def _take(self, number: int) -> None:
        """Take in what has come on a descriptor."""
        if number == self._pipe.fileno():
            self._left = self._pipe.recv()
            return
        if number == self._sender.socket.fileno():
            if self._sender.receive() is not None:
                self._arrived("answer")
            return
        n = self._numbers[number]
        link = self._links[n]
        body = link.receive()
        if body is None:
            return
        job = claimed(body)
        if job is None:
            link.socket.sendall(self._question(n))
            return
        self._found.append(time.perf_counter() - self._began)
        link.socket.sendall(link.report(job))
        self._arrived("start")

    def _arrived(self, what: str) -> None:
        """Go on when both the answer to a submission and its start have come."""
        self._outstanding.discard(what)
        if self._outstanding:
            return
        self._left -= 1
        self._due = time.perf_counter() + PAUSE_S
        if self._left == 0:
            self._pipe.send(self._found)
            self._found = []


@contextmanager
def crowd(port: int, count: int, wait_s: float, bare: bool = False) -> Iterator[Connection]:
    """Keep a crowd parked at a server."""
    def park(pipe: Connection) -> None:
        Crowd(pipe, port, count, wait_s, bare).run()
    with beside(park) as pipe:
        heard(pipe)
        yield pipe


def starts(pipe: Connection, count: int) -> list[float]:
    """Return the seconds from each of some submissions to its start at a node of a crowd."""
    pipe.send(count)
    found: list[float] = heard(pipe)
    return found


def hold(pipe: Connection, port: int, count: int, source: str) -> None:
    """Open connections that say nothing; send how many the server keeps, each time it is asked."""
    sockets = []
    with suppress(OSError):  # the server lets no more in
        for _ in range(count):
            sockets.append(socket.create_connection(
                ("127.0.0.1", port), timeout=20, source_address=(source, 0)))
    while True:
        poll = select.poll()
        for each in sockets:
            poll.register(each, select.POLLIN)
        pipe.send(len(sockets) - len(poll.poll(0)))  # an answer or an end: it was refused
        pipe.recv()


def storm(pipe: Connection, port: int, count: int, source: str) -> None:
    """Open connections at one moment when told to; they close at one moment when this is killed."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.setblocking(False)
        each.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT: connect() chooses it
        each.bind((source, 0))
    pipe.send("ready")
    pipe.recv()
    for each in sockets:
        each.connect_ex(("127.0.0.1", port))
    pipe.send("opened")
    pipe.recv()


def settled(port: int, began: float, limit_s: float) -> float | None:
    """Return the seconds until /health answers again on a new connection, ten times in a row within
    0.1 s; None when that takes longer than the limit."""
    first, streak = 0.0, 0
    while time.perf_counter() - began < limit_s:
        sent = time.perf_counter()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                answer.read()
        except OSError:
            streak = 0
            continue
        now = time.perf_counter()
        streak = streak + 1 if now - sent < 0.1 else 0
        if streak == 1:
            first = now
        if streak == 10:
            return first - began
    return None


# ---- queues that people use

DRAMATIQ = """
import sys, time
import dramatiq
from dramatiq.brokers.redis import RedisBroker

port, count = map(int, sys.argv[1:])
broker = RedisBroker(url=f"redis://127.0.0.1:{port}/0")
dramatiq.set_broker(broker)
ends = []

@dramatiq.actor
def work(number):
    ends.append(time.perf_counter())

for number in range(count):
    work.send(number)
worker = dramatiq.Worker(broker, worker_threads=8)
worker.start()
broker.join(work.queue_name)
worker.join()
warm = count // 10
print((count - warm - 1) / (ends[-1] - ends[warm]))
worker.stop()
"""
HUEY = """
import sys, time
from huey import SqliteHuey

path, count, keeps_result = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "result"
huey = SqliteHuey(filename=path, fsync=True)

@huey.task()
def work(number):
    return {"status": "completed", "frames": 300} if keeps_result else None

for number in range(count):
    work(number)
began = time.perf_counter()
for _ in range(count):
    huey.execute(huey.dequeue())
print(count / (time.perf_counter() - began))
"""


class Missing(Exception):
    """A program or a package of others is not to be had here; says which, and why."""


def output_of(argv: Sequence[str], limit_s: float = 180) -> str:
    """Run a program of others; return its output, Missing where that fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=limit_s,
                              stdin=subprocess.DEVNULL, check=True)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or f"exit code {error.returncode}").splitlines()[-1]
        raise Missing(f"{argv[0]} failed: {last[:150]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{argv[0]} failed: {str(error)[:150]}") from None
    return done.stdout


def peer(folder: Path, package: str, script: str, more: Sequence[str]) -> list[str]:
    """Install a package into an environment below a folder; return how a script runs with it."""
    place = folder / re.sub(r"\W.*", "", package)
    python = str(place / "bin" / "python")
    if not place.exists():
        say(f"installing {package} into a temporary environment")
        output_of([sys.executable, "-m", "venv", str(place)])
        output_of([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                   package])
    path = place / "peer.py"
    path.write_text(script)
    return [python, str(path), *more]


def redis_program(folder: Path) -> tuple[str, dict[str, str]]:
    """Return the program redis-server and what it needs in its environment.

    Where it is not installed, apt's packages are unpacked into the folder: nothing is installed.
    """
    found = shutil.which("redis-server")
    if found:
        return found, {}
    if not shutil.which("apt-get"):
        raise Missing("redis-server is not installed")
    say("unpacking apt's redis-server into a temporary folder")
    plan = output_of(["apt-get", "install", "--simulate", "redis-server"])
    names = re.findall(r"^Inst (\S+)", plan, re.MULTILINE)
    root = folder / "redis"
    root.mkdir()
    output_of(["sh", "-c", 'cd "$0" && apt-get download "$@"', str(root), *names])
    for package in root.glob("*.deb"):
        output_of(["dpkg", "-x", str(package), str(root)])
    libraries = {str(path.parent) for path in root.glob("usr/lib/**/*.so*")}
    program = root / "usr/bin/redis-server"
    return str(program), {"LD_LIBRARY_PATH": ":".join(sorted(libraries))}


@contextmanager
def redis(folder: Path) -> Iterator[int]:
    """Run a redis that syncs each write before it answers; gives its port."""
    program, more = redis_program(folder)
    port = free_port()
    argv = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    argv += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
    with open(folder / "redis.log", "wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   env={**os.environ, **more})
    try:
        wait_for(lambda: answers(port) or process.poll() is not None, why="redis answers")
        if process.poll() is not None:
            raise Missing(f"redis-server ended with exit code {process.returncode}")
        yield port
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    """Return whether something listens on a port."""
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False
