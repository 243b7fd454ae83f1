"""Measure how fast this fleet is: `python3 -m tests.bench [--quick]` prints one table.

A real master, a real agent and a bare `ThreadingHTTPServer` run as processes of their own on
loopback; the load comes from one more process, a lean client over raw sockets that are kept open.
Every figure stands beside its ratio to the bare server, which the same client has asked right
before: figures of two machines, or of a busy one, cannot be compared, ratios can. Nothing here is
asserted.

`--soak JOBS` puts many jobs through one master instead and sets the last tenth of them beside the
first; `--deep JOBS` sets dispatch with so many jobs queued beside that with 100.
"""
from __future__ import annotations

import argparse
import calendar
import http.server
import json
import multiprocessing
import os
import platform
import re
import resource
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hwdetect
from tests import archive
from tests.fleet import Agent, Master, Program
from tests.support import TOP, call, free_port, need, wait_for

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
        """Answer; /park first waits, as a parked request does."""
        if self.path.startswith("/park"):
            threading.Event().wait(30)
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


def serve_bare(port: int) -> None:
    """Run the bare server until it is told to stop."""
    raise_file_limit()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    BareServer(("127.0.0.1", port), Bare).serve_forever()


def raise_file_limit() -> None:
    """Allow as many open files as this user may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ---- the client

class Link:
    """One connection that is kept open, for one request at a time."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self.node = ""
        self.job: tuple[bytes, bytes] | None = None

    def receive(self) -> bytes | None:
        """Take in what has come; return the body of an answer when it is whole."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return None
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(rest) < length:
            return None
        if head[9:10] != b"2":
            raise RuntimeError(f"refused: {self._buffer[:500]!r}")
        self._buffer = b""
        return rest

    def ask(self, raw: bytes) -> bytes:
        """Send a request and return the body of its answer."""
        self.socket.sendall(raw)
        while True:
            body = self.receive()
            if body is not None:
                return body


def request(method: str, path: str, body: bytes = b"") -> bytes:
    """Return the bytes of a request."""
    length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{length}\r\n".encode() + body


def drive(links: Sequence[Link], think: Callable[[Link, bytes | None], bytes | None]) -> None:
    """Keep all links busy: `think` turns an answer (None at first) into the next request; None ends
    one."""
    poll, by_number, busy = select.epoll(), {link.socket.fileno(): link for link in links}, 0
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
    poll.close()


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """Run a function in a process of its own and return what it returns."""
    ours, theirs = FORK.Pipe()

    def run() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise_file_limit()
        theirs.send(work(*args))
    process = FORK.Process(target=run, daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"the load process of {work.__name__} failed") from None
    finally:
        process.join()


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


def delays(port: int, raw: bytes, count: int) -> list[float]:
    """Return the seconds that each of some requests took, one after the other."""
    link = Link(port)
    found: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        link.ask(raw)
        found.append(time.perf_counter() - began)
    return found


def register(port: int, count: int) -> list[Link]:
    """Register nodes, a link each, as agents do."""
    links = [Link(port) for _ in range(count)]
    for number, link in enumerate(links):
        body = {
            "address": f"bench-{os.getpid()}-{number}",
            "session": "s",
            "protocol": 1,
            "cpu_threads": 2,
            "max_concurrent_jobs": 1000,
        }
        link.node = json.loads(
            link.ask(request("POST", "/nodes/register", json.dumps(body).encode()))
        )["id"]
    return links


def next_job(link: Link, wait_s: float = 0) -> bytes:
    """Return the request of a free node."""
    words = {
        "node_id": link.node,
        "session": "s",
        "claim": os.urandom(8).hex(),
        **({"wait": wait_s} if wait_s else {}),
    }
    return request("GET", f"/jobs/next?{urllib.parse.urlencode(words)}")


_CLAIMED = re.compile(rb'"job": \{"id": "([0-9a-f-]{36})".*?"attempt": (\d+)', re.DOTALL)


def claimed(body: bytes) -> tuple[bytes, bytes] | None:
    """Return id and attempt of a claimed job."""
    match = _CLAIMED.search(body)
    return (match[1], match[2]) if match else None


def report(link: Link, job: tuple[bytes, bytes]) -> bytes:
    """Return the request that ends an attempt."""
    told = {
        **RESULT,
        "job_id": job[0].decode(),
        "attempt": int(job[1]),
        "node_id": link.node,
        "session": "s",
    }
    return request("POST", "/results", json.dumps(told).encode())


def submit_many(link: Link, count: int) -> None:
    """Submit jobs, 10,000 at a time."""
    while count > 0:
        part = min(count, 10_000)
        link.ask(request("POST", "/jobs", b"[" + b",".join([JOB] * part) + b"]"))
        count -= part


def cycles(port: int, depth: int, clients: int, seconds: float) -> float:
    """Return claim + result cycles/s while `depth` jobs or a few more are queued; filling is not
    counted."""
    links, filler = register(port, clients), Link(port)
    a_round, spent, done = 2000 if depth >= 2000 else 500, 0.0, 0
    queued = json.loads(filler.ask(request("GET", "/jobs?status=pending&limit=1")))["total"]
    while spent < seconds:
        submit_many(filler, depth + a_round - queued)
        spent += work_off(links, a_round)
        done, queued = done + a_round, depth
    return done / spent


def cycle_cpu(port: int, pid: int, count: int) -> float:
    """Return the CPU seconds that a master spends on one claim and its result."""
    links, filler = register(port, 8), Link(port)
    submit_many(filler, count + 200)
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
            return report(link, job)
        left -= 1
        return next_job(link) if left >= 0 else None
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
    raw = request("POST", "/", json.dumps(RESULT).encode())
    links, filler, found = register(port, 8), Link(port), []
    for number in range(10):
        began, spent, done, part = time.perf_counter(), 0.0, 0, jobs // 10
        while done < part:
            count = min(2000, part - done)
            submit_many(filler, count)
            spent += work_off(links, count)
            done += count
        took = time.perf_counter() - began
        submit_many(filler, 200)
        alone = statistics.median(work_off(links[:1], 1) for _ in range(200))
        size = sum(path.stat().st_size for path in folder.glob("journal.db*"))
        bare, single = rate(bare_port, 8, raw, 2), statistics.median(delays(bare_port, raw, 200))
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
        print(
            f"  {(number + 1) * part:,} jobs, {part / took:,.0f}/s, "
            f"cycles {found[-1].cycles_ratio:.2f} of "
            f"the bare server, {mib(found[-1].memory)}, journal {mib(size)}",
            file=sys.stderr,
            flush=True,
        )
    return found


def starts(port: int, nodes: int, count: int) -> list[float]:
    """Return the seconds from each submission to its arrival at one of some parked nodes."""
    links, sender = register(port, nodes), Link(port)
    found: list[float] = []
    poll, by_number = select.epoll(), {link.socket.fileno(): link for link in links}
    for number, link in by_number.items():
        poll.register(number, select.EPOLLIN)
        link.socket.sendall(next_job(link, 30))
    raw = request("POST", "/jobs", JOB)
    poll.register(sender.socket.fileno(), select.EPOLLIN)
    time.sleep(1)
    while len(found) < count:
        time.sleep(0.01)
        began, waiting = time.perf_counter(), {"answer", "start"}
        sender.socket.sendall(raw)
        while waiting:
            for number, _ in poll.poll():
                if number == sender.socket.fileno():
                    waiting -= {"answer"} if sender.receive() is not None else set()
                    continue
                link = by_number[number]
                body = link.receive()
                job = claimed(body) if body else None
                if body is None:
                    continue
                if job and "start" in waiting:
                    found.append(time.perf_counter() - began)
                    waiting.remove("start")
                if job:
                    link.ask(report(link, job))
                link.socket.sendall(next_job(link, 30))
    return found


def crowd(port: int, count: int, path: str | None, ready: Any, stop: Any) -> None:
    """Park a crowd until told to stop: nodes that ask for work, or plain requests of a bare
    server."""
    raise_file_limit()
    links = [Link(port) for _ in range(count)] if path else register(port, count)

    def ask(link: Link) -> bytes:
        return request("GET", path) if path else next_job(link, 30)

    def think(link: Link, body: bytes | None) -> bytes | None:
        return None if stop.is_set() else ask(link)
    threading.Timer(2, ready.set).start()
    drive(links, think)


# ---- what a process uses

def memory_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, its children not counted."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS


def watched(pid: int, seconds: float) -> tuple[int, float]:
    """Watch a process; return its memory in bytes and its CPU in % of one core."""
    before, began = cpu_seconds(pid), time.perf_counter()
    time.sleep(seconds)
    return memory_bytes(pid), 100 * (cpu_seconds(pid) - before) / (time.perf_counter() - began)


# ---- the table

class Row(NamedTuple):
    """One line of the table."""

    what: str
    figure: str
    ratio: str
    beside: str


class BenchMaster(Master):
    """A master with its default log, which goes to a file: it is part of the figures, a screen is
    not."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        Program.__init__(
            self,
            [
                sys.executable,
                str(TOP / "ffdist.py"),
                "master",
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--data-dir",
                str(folder / "master"),
                *flags,
            ],
            folder,
            "master",
        )
        wait_for(lambda: answers(self.port) and self.get("/health"), 60, "the master answers")


def answers(port: int) -> bool:
    """Tell whether something listens."""
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


class Bench:
    """The servers under test, and the rows that were measured."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder = folder
        self.quick = quick
        self.rows: list[Row] = []
        self.rounds = 1 if quick else 3
        self.seconds = 1.0 if quick else 3.0
        self.bare_port = free_port()
        self.bare = FORK.Process(target=serve_bare, args=(self.bare_port,), daemon=True)
        self.bare.start()
        wait_for(lambda: answers(self.bare_port), 10, "the bare server")
        self.bare_pid = self.bare.pid or 0
        self.bare_idle_bytes = memory_bytes(self.bare_pid)
        self.master = BenchMaster(folder)
        self.port = self.master.port

    def add(self, what: str, figure: str, ratio: str, beside: str) -> None:
        """Keep a row, and show that it was measured."""
        self.rows.append(Row(what, figure, ratio, beside))
        print(f"  {what}: {figure}", file=sys.stderr, flush=True)

    def paired(self, what: str, ours: Callable[[], float], bare: Callable[[], float],
               weight: float = 1) -> None:
        """Measure a rate in turns with the bare server's; `weight` is its requests for each of
        ours."""
        pairs = [(bare(), ours()) for _ in range(self.rounds)]
        figure = statistics.median(own for _, own in pairs)
        beside = statistics.median(base for base, _ in pairs)
        ratio = statistics.median(weight * own / base for base, own in pairs)
        self.add(what, f"{figure:,.0f}", f"{ratio:.2f}", f"{beside:,.0f} requests/s")

    def submissions(self) -> None:
        """Submissions/s, each on disk before it is answered."""
        for clients in (1, 8):
            raw = request("POST", "/jobs", JOB)
            bare = request("POST", "/", JOB)
            self.paired(f"submissions/s, {clients} client{'s' * (clients > 1)}",
                        partial(apart, rate, self.port, clients, raw, self.seconds),
                        partial(apart, rate, self.bare_port, clients, bare, self.seconds))

    def dispatch(self) -> None:
        """Claim + result cycles/s at several depths of the queue, in a ratio of two requests
        each."""
        raw = request("POST", "/", json.dumps(RESULT).encode())
        for depth in (100, 10_000, 100_000):
            self.restart()
            self.paired(f"claim + result cycles/s, {depth:,} queued",
                        partial(apart, cycles, self.port, depth, 8, self.seconds),
                        partial(apart, rate, self.bare_port, 8, raw, self.seconds), 2)

    def logging(self) -> None:
        """CPU of a claim and its result with the default log, in turns with warnings alone."""
        count = 1000 if self.quick else 5000
        pairs = []
        for _ in range(max(3, self.rounds)):
            pair = []
            for flags in ((), ("--log-level", "warning")):
                self.restart(*flags)
                pair.append(apart(cycle_cpu, self.port, self.master.pid, count))
            pairs.append(pair)
        own, quiet = (statistics.median(pair[n] for pair in pairs) for n in range(2))
        ratio = statistics.median(pair[0] / pair[1] for pair in pairs)
        self.add("CPU of a claim + result cycle", f"{1e6 * own:.0f} µs", f"{ratio:.2f}",
                 f"{1e6 * quiet:.0f} µs when only warnings are logged")

    def restart(self, *flags: str) -> None:
        """Go on with a fresh master on an empty folder."""
        self.master.end()
        self.folder = Path(tempfile.mkdtemp(dir=self.folder.parent))
        self.master = BenchMaster(self.folder, *flags)
        self.port = self.master.port

    def memory(self) -> None:
        """Memory with 100,000 jobs queued, then the time of a start on that journal."""
        self.restart()
        empty = memory_bytes(self.master.pid)
        apart(lambda: submit_many(Link(self.port), 100_000))
        full = memory_bytes(self.master.pid)
        self.add("memory with 100,000 jobs queued", mib(full), f"{full / self.bare_idle_bytes:.1f}",
                 f"{mib(self.bare_idle_bytes)}; {mib(empty)} when empty")
        self.master.end()
        began = time.perf_counter()
        self.master = BenchMaster(self.folder)
        self.port = self.master.port
        self.add("start with 100,000 jobs queued", f"{time.perf_counter() - began:.2f} s", "-", "")

    def latency(self) -> None:
        """Submission to start, with nodes parked."""
        self.restart()
        count = 100 if self.quick else 500
        bare = apart(delays, self.bare_port, request("POST", "/", JOB), count)
        found = apart(starts, self.port, 8, count)
        for name, part in (("p50", 0.5), ("p99", 0.99)):
            own, base = quantile(found, part), quantile(bare, part)
            self.add(f"submission to start {name}, 8 nodes parked", f"{1000 * own:.2f} ms",
                     f"{own / base:.1f}", f"{1000 * base:.2f} ms a request")

    def parked(self) -> None:
        """2,000 agents parked: memory, CPU, and how fast one of them starts a job."""
        self.restart()
        count = 200 if self.quick else 2000
        with self.crowded(self.bare_port, count, "/park"):
            base_bytes, base_cpu = watched(self.bare_pid, 35 if not self.quick else 5)
        with self.crowded(self.port, count, None):
            used, cpu = watched(self.master.pid, 35 if not self.quick else 5)
        self.add(f"memory with {count:,} agents parked", mib(used), f"{used / base_bytes:.2f}",
                 f"{mib(base_bytes)}, as many connections")
        self.add(f"CPU with {count:,} agents parked (30 s)", f"{cpu:.1f} % of a core",
                 f"{cpu / base_cpu:.1f}" if base_cpu else "-", f"{base_cpu:.1f} %")
        self.restart()
        found = apart(starts, self.port, count, 50 if self.quick else 300)
        bare = apart(delays, self.bare_port, request("POST", "/", JOB), 300)
        own, base = quantile(found, 0.99), quantile(bare, 0.99)
        self.add(f"submission to start p99, {count:,} nodes parked", f"{1000 * own:.2f} ms",
                 f"{own / base:.1f}", f"{1000 * base:.2f} ms a request")

    def soak(self, jobs: int, keep: str | None) -> None:
        """Many jobs through one master: the last tenth beside the first."""
        self.restart(*(["--keep", keep] if keep else []))
        tenths = apart(
            soak, self.port, self.bare_port, self.master.pid, self.folder / "master", jobs
        )
        first, last = tenths[0], tenths[-1]
        mean = statistics.harmonic_mean([tenth.rate for tenth in tenths])
        self.add(f"soak: {jobs:,} jobs submitted, claimed, reported", f"{mean:,.0f}/s", "-",
                 f"{first.rate:,.0f}/s in the first tenth, {last.rate:,.0f}/s in the last")
        self.add("soak: claim + result cycles/s, last tenth", f"{last.cycles:,.0f}",
                 f"{last.cycles_ratio:.2f}", f"ratio {first.cycles_ratio:.2f} in the first tenth")
        self.add("soak: one claim + result alone, last tenth", f"{1000 * last.alone:.2f} ms",
                 f"{last.alone_ratio:.1f}", f"ratio {first.alone_ratio:.1f} in the first tenth")
        self.add("soak: memory of the master, last tenth", mib(last.memory),
                 f"{last.memory / first.memory:.2f}", f"{mib(first.memory)} in the first tenth")
        self.add("soak: journal, bytes a job", f"{last.journal / jobs:,.0f}", "-",
                 f"{mib(last.journal)} in all")

    def deep(self, jobs: int) -> None:
        """Dispatch with many jobs queued beside that with 100, in turns, on two masters."""
        self.restart()
        other = BenchMaster(Path(tempfile.mkdtemp(dir=self.folder.parent)))
        try:
            apart(lambda: submit_many(Link(other.port), jobs))
            pairs = [
                (
                    apart(cycles, self.port, 100, 8, self.seconds),
                    apart(cycles, other.port, jobs, 8, self.seconds),
                )
                for _ in range(max(3, self.rounds))
            ]
            few, many = (statistics.median(pair[n] for pair in pairs) for n in range(2))
            self.add(
                f"claim + result cycles/s, {jobs:,} queued",
                f"{many:,.0f}",
                f"{statistics.median(b / a for a, b in pairs):.2f}",
                f"{few:,.0f} with 100 queued",
            )
            self.add(f"memory with {jobs:,} jobs queued", mib(memory_bytes(other.pid)), "-",
                     f"{mib(memory_bytes(self.master.pid))} with 100 queued")
        finally:
            other.end()

    @contextmanager
    def crowded(self, port: int, count: int, path: str | None) -> Iterator[None]:
        """Keep a crowd parked at a server."""
        ready, stop = FORK.Event(), FORK.Event()
        process = FORK.Process(target=crowd, args=(port, count, path, ready, stop), daemon=True)
        process.start()
        try:
            ready.wait(120)
            yield
        finally:
            process.kill()
            process.join()

    def sampling(self) -> None:
        """CPU of the readings that an agent takes once a second while a job runs."""
        count = 50 if self.quick else 500
        archive.unpack(
            (TOP / "tests/hosts/xeon-t4.txt").read_text(encoding="utf-8"), self.folder / "xeon"
        )
        places = {
            "this machine": hwdetect.Host(),
            "two sockets": hwdetect.Host(f"{self.folder}/xeon"),
        }
        for where, host in places.items():
            sampler = hwdetect.Sampler(host, hwdetect.detect(host, probe=False), gpu=False)
            sampler.throttles()
            began = time.process_time()
            for number in range(count):
                sampler.sample(float(number))
                hwdetect.process_group(hwdetect.Host(), os.getpgid(self.master.pid))
            each = (time.process_time() - began) / count
            share = f"{100 * each / hwdetect.SAMPLE_S:.3f} % of a core"
            self.add(f"sampling once a second, {where}", share, "-", "")

    def agent(self) -> None:
        """A real agent: idle, and its wall time over the very same FFmpeg commands run alone."""
        need("ffmpeg", "ffprobe")
        self.restart()
        agent = Agent(self.folder, self.master.url)
        try:
            wait_for(lambda: self.master.get("/nodes")["count"], why="the agent registers")
            time.sleep(2)
            used, cpu = watched(agent.pid, 10 if self.quick else 60)
            self.add("agent idle, memory", mib(used), f"{used / self.bare_idle_bytes:.2f}",
                     mib(self.bare_idle_bytes))
            self.add("agent idle, CPU", f"{cpu:.2f} % of a core", "-", "")
            self.overhead(agent)
        finally:
            agent.end()

    def overhead(self, agent: Agent) -> None:
        """Wall time of a job from claim to report, over FFmpeg alone."""
        length = 10 if self.quick else 40
        pairs = []
        for number in range(self.rounds + 1):
            job = self.master.finished(
                self.master.submit("720p30-h264", duration=length, preset="veryfast", audio=False)[
                    "id"
                ],
                300,
            )
            result = job["result"]
            wall = seconds_between(job["started_at"], job["completed_at"])
            argv = [self.clip(agent) if word.endswith("source.mov") else
                    f"file:{self.folder}/alone" if word.endswith("/output") else word
                    for word in result["encode"]["commands"][0]]
            began = time.perf_counter()
            subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True)
            alone = time.perf_counter() - began
            if number:  # the first one made the generated source
                pairs.append((wall, result["metrics"]["duration"], alone))
        wall, encode, alone = (statistics.median(pair[n] for pair in pairs) for n in range(3))
        self.add(
            "encode under the agent over FFmpeg alone",
            f"{encode:.2f} s",
            f"{encode / alone:.3f}",
            f"{alone:.2f} s FFmpeg alone",
        )
        self.add("claim to report over FFmpeg alone", f"{wall:.2f} s", f"{wall / alone:.3f}",
                 f"{alone:.2f} s FFmpeg alone")

    def clip(self, agent: Agent) -> str:
        """Return the generated source as the agent keeps it."""
        return f"file:{next((agent.work / 'cache').glob('*.mov'))}"

    def end(self) -> None:
        """End the servers."""
        self.master.end()
        self.bare.terminate()
        self.bare.join()


def seconds_between(first: str, last: str) -> float:
    """Return the seconds between two times of the API."""
    def parsed(text: str) -> float:
        whole, _, rest = text.rstrip("Z").partition(".")
        return calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) + float(f"0.{rest or 0}")
    return parsed(last) - parsed(first)


def quantile(values: Sequence[float], part: float) -> float:
    """Return a quantile by rank."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def mib(size: float) -> str:
    """Return bytes in MiB."""
    return f"{size / (1 << 20):.0f} MiB"


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    heads = Row("what", "figure", "ratio", "bare http.server in the same run")
    widths = [max(len(row[n]) for row in (heads, *rows)) for n in range(4)]
    lines = ["| " + " | ".join(cell.ljust(size) for cell, size in zip(row, widths)) + " |"
             for row in (heads, *rows)]
    lines.insert(1, "|" + "|".join("-" * (size + 2) for size in widths) + "|")
    return "\n".join(lines)


PARTS = {
    "submissions": Bench.submissions,
    "dispatch": Bench.dispatch,
    "latency": Bench.latency,
    "logging": Bench.logging,
    "memory": Bench.memory,
    "parked": Bench.parked,
    "agent": Bench.agent,
    "sampling": Bench.sampling,
}


def wanted(args: argparse.Namespace) -> list[tuple[str, Callable[[Bench], None]]]:
    """Return what to measure, by name."""
    found: list[tuple[str, Callable[[Bench], None]]] = [(part, PARTS[part]) for part in args.parts]
    if args.soak:
        found.append(("soak", partial(Bench.soak, jobs=args.soak, keep=args.keep)))
    if args.deep:
        found.append(("deep", partial(Bench.deep, jobs=args.deep)))
    return found or list(PARTS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        "python3 -m tests.bench",
        description="Measure how fast this fleet is.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--quick", action="store_true", help="short rounds, a smaller crowd: about a minute"
    )
    parser.add_argument(
        "--soak", type=int, metavar="JOBS", help="instead: so many jobs through one master"
    )
    parser.add_argument("--keep", help="with --soak: the master's --keep")
    parser.add_argument(
        "--deep", type=int, metavar="JOBS", help="instead: dispatch with so many jobs queued"
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    args = parser.parse_args(argv)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]}; there are {', '.join(PARTS)}")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ffdist-bench-") as top:
        (Path(top) / "first").mkdir()
        bench = Bench(Path(top) / "first", args.quick)
        try:
            assert call(bench.master.url, "GET", "/health").status == 200
            for name, measure in wanted(args):
                print(f"{name} …", file=sys.stderr, flush=True)
                measure(bench)
        finally:
            bench.end()
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"load average {load:.2f} at the start"
        f"{', quick' if args.quick else ''}\n"
    )
    print(table(bench.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
