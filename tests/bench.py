"""Measure how fast this fleet is: `python3 -m tests.bench [--quick] [ROW…]` prints one table.

A real master with its default log, a real agent and a bare `ThreadingHTTPServer` run as processes
of their own on loopback; the load comes from further processes (tests/load.py). Every figure stands
beside one that the same load got from the bare server, or from whatever the row names, right before
or after: figures of two machines, or of a busy one, cannot be compared, ratios can. Load and server
share the cores of this machine: on few of them a rate is that of both together. Nothing here is
asserted.

The journals lie in the folder for temporary files: TMPDIR names another disk. `--soak JOBS` puts
many jobs through one master instead and sets the last tenth of them beside the first.
"""
from __future__ import annotations

import argparse
import calendar
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ffdist
import hwdetect
from tests import archive, load
from tests.fleet import Agent, Master, Program
from tests.load import (
    ADDRESSES,
    BARE_JOB,
    BARE_RESULT,
    JOB,
    RESULT,
    Missing,
    answers,
    apart,
    beside,
    crowd,
    heard,
    memory_bytes,
    mib,
    request,
    say,
    watched,
)
from tests.support import FILM, TOP, free_port, need, wait_for

ROW_LIMIT_S = 900.0
# Where a server has lost itself in a crowd, the row ends after so long.
CROWD_LIMIT_S = 120.0


# ---- the table

class Row(NamedTuple):
    """One line of the table."""

    what: str
    figure: str
    ratio: str
    beside: str


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    heads = Row("what", "figure", "ratio", "beside it in the same run")
    widths = [max(len(row[n]) for row in (heads, *rows)) for n in range(4)]
    lines = ["| " + " | ".join(cell.ljust(size) for cell, size in zip(row, widths)) + " |"
             for row in (heads, *rows)]
    lines.insert(1, "|" + "|".join("-" * (size + 2) for size in widths) + "|")
    return "\n".join(lines)


def quantile(values: Sequence[float], part: float) -> float:
    """Return a quantile by rank."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def seconds_between(first: str, last: str) -> float:
    """Return the seconds between two times of the API."""
    def parsed(text: str) -> float:
        whole, _, rest = text.rstrip("Z").partition(".")
        return calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) + float(f"0.{rest or 0}")
    return parsed(last) - parsed(first)


# ---- the servers under test

class Overdue(Exception):
    """A row took longer than its limit; says which."""


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
        try:
            wait_for(lambda: answers(self.port) and self.get("/health"), 60, "the master answers")
        except BaseException:
            self.end()
            raise

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it, by force after 10 s: it may have lost itself in a crowd. Its log is not read."""
        with suppress(subprocess.TimeoutExpired):
            self.process.send_signal(number)
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        self._file.close()


class Bench:
    """The servers under test, and the rows that were measured."""

    def __init__(self, top: Path, quick: bool, stack: ExitStack) -> None:
        self.top = top
        self.quick = quick
        self.rows: list[Row] = []
        self.others: dict[str, float] = {}  # the part of the cores that others used, by row
        self.rounds = 1 if quick else 5
        self.seconds = 1.0 if quick else 3.0
        self.bare_port, self.bare_pid = stack.enter_context(bare_server())
        self.bare_idle_bytes = memory_bytes(self.bare_pid)
        self.folder = self.new_folder()
        self.master = BenchMaster(self.folder)
        stack.callback(lambda: self.master.end())

    @property
    def port(self) -> int:
        """The port of the master under test."""
        return self.master.port

    @property
    def pid(self) -> int:
        """The process of the master under test."""
        return self.master.pid

    def restart(self, *flags: str) -> None:
        """Go on with a fresh master on an empty folder."""
        self.master.end()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder = self.new_folder()
        self.master = BenchMaster(self.folder, *flags)

    def resume(self, *flags: str) -> float:
        """Start the master again on what it has stored; return the seconds that it took."""
        self.master.end()
        began = time.perf_counter()
        self.master = BenchMaster(self.folder, *flags)
        return time.perf_counter() - began

    def new_folder(self) -> Path:
        """Make a folder that goes with the bench."""
        return Path(tempfile.mkdtemp(dir=self.top))

    def add(self, what: str, figure: str, ratio: str, beside: str) -> None:
        """Keep a row, and show that it was measured."""
        self.rows.append(Row(what, figure, ratio, beside))
        say(f"{what}: {figure}, ratio {ratio} ({beside})")

    def paired(self, what: str, ours: Callable[[], float], bare: Callable[[], float],
               weight: float = 1) -> None:
        """Measure a rate in turns with the bare server's; `weight` is its requests for each of
        ours.

        A round stands beside the mean of the bare server's rates before and after it.
        """
        alone = apart(load.commits, self.folder)
        before = bare()
        pairs = []
        for number in range(self.rounds):
            own, after = ours(), bare()
            base = (before + after) / 2
            before = after
            pairs.append((base, own))
            say(f"round {number + 1} of {self.rounds}: {own:,.0f}/s, bare server {base:,.0f}/s, "
                f"ratio {weight * own / base:.2f}")
        figure = statistics.median(own for _, own in pairs)
        beside = statistics.median(base for base, _ in pairs)
        ratio = statistics.median(weight * own / base for base, own in pairs)
        self.add(what, f"{figure:,.0f}", f"{ratio:.2f}",
                 f"bare server {beside:,.0f} requests/s; this disk {alone:,.0f} commits/s alone")

    def sized(self, count: int) -> int:
        """Return the size of a crowd: a tenth for a quick look, no more than files may be open."""
        wanted = count // 10 if self.quick else count
        files = load.raise_file_limit()
        return min(wanted, files - 500)  # the rest is for what a server opens besides

    def measure(self, name: str, row: Callable[[Bench], None], limit_s: float) -> None:
        """Measure a row; one that fails or takes too long says so in the table."""
        print(f"{name} …", file=sys.stderr, flush=True)
        before = self.usage()
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        try:
            row(self)
        except (Overdue, Missing, OSError, RuntimeError, AssertionError) as error:
            self.add(name, "none", "-", str(error))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.restart()
        everybody, own, whole = (b - a for a, b in zip(before, self.usage()))
        self.others[name] = share = max(0.0, everybody - own) / whole
        say(f"other programs used {100 * share:.0f} % of the cores meanwhile")

    def usage(self) -> tuple[float, float, float]:
        """Return the CPU seconds of all programs here, those of the bench alone, and all that there
        were; what the host of a virtual machine takes away counts as used by others."""
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, idle, waiting, irq, softirq, stolen = (int(word) for word in words)
        busy = user + nice + system + irq + softirq + stolen
        own = sum(os.times()[:4]) + load.cpu_seconds(self.pid) + load.cpu_seconds(self.bare_pid)
        return busy / load.TICKS, own, (busy + idle + waiting) / load.TICKS

@contextmanager
def bare_server() -> Iterator[tuple[int, int]]:
    """Run a bare server; gives its port and its process."""
    with beside(load.serve_bare) as pipe:
        yield heard(pipe)


# ---- rows: rates

def submissions(bench: Bench) -> None:
    """Submissions/s, each on disk before it is answered."""
    for clients in (1, 8):
        bench.restart()
        bench.paired(
            f"durable submissions/s, {clients} connection{'s' * (clients > 1)}",
            partial(apart, load.rate, bench.port, clients, request("POST", "/jobs", JOB),
                    bench.seconds),
            partial(apart, load.rate, bench.bare_port, clients, BARE_JOB, bench.seconds),
        )


def dispatch(bench: Bench) -> None:
    """Claim + result cycles/s, each step on disk before it is answered: two requests each."""
    for clients in (8, 64):
        bench.restart()
        bench.paired(
            f"durable claim + result cycles/s, {clients} connections, 2,000 queued",
            partial(apart, load.cycles, bench.port, 2000, clients, bench.seconds),
            partial(apart, load.rate, bench.bare_port, clients, BARE_RESULT, bench.seconds),
            2,
        )


def deep(bench: Bench) -> None:
    """Dispatch with many jobs queued beside that with 2,000, in turns, on two masters."""
    jobs = 100_000 if bench.quick else 1_000_000
    other = BenchMaster(bench.new_folder())
    try:
        began = time.perf_counter()
        apart(load.submit_many, other.port, jobs)
        bench.add(f"{jobs:,} submissions in arrays of 10,000",
                  f"{time.perf_counter() - began:.0f} s", "-", "")
        pairs = []
        for number in range(max(3, bench.rounds)):
            few = apart(load.cycles, bench.port, 2000, 8, bench.seconds)
            many = apart(load.cycles, other.port, jobs, 8, bench.seconds)
            pairs.append((few, many))
            say(f"round {number + 1}: {many:,.0f}/s, with 2,000 queued {few:,.0f}/s")
        few, many = (statistics.median(pair[n] for pair in pairs) for n in range(2))
        ratio = statistics.median(many / few for few, many in pairs)
        bench.add(f"durable claim + result cycles/s, {jobs:,} queued", f"{many:,.0f}",
                  f"{ratio:.2f}", f"{few:,.0f} with 2,000 queued")
        own, base = memory_bytes(other.pid), memory_bytes(bench.pid)
        bench.add(f"memory with {jobs:,} jobs queued", mib(own), f"{own / base:.1f}",
                  f"{mib(base)} with 2,000 queued")
    finally:
        other.end()


def queues(bench: Bench) -> None:
    """Durable done/s in turns with queues that people use, where those can be installed.

    Dramatiq's messages go through redis, which syncs each write, to 8 threads of one process. Huey
    takes its tasks off SQLite in its own process, with no network between.
    """
    names = {
        "dramatiq": "dramatiq on redis, appendfsync always",
        "result": "huey on SQLite with fsync, results kept",
        "none": "huey on SQLite with fsync, no results",
    }
    ours: list[float] = []
    theirs: dict[str, list[float]] = {}
    with ExitStack() as stack:
        programs = peers(bench, stack, names)
        for number in range(bench.rounds):
            ours.append(apart(load.cycles, bench.port, 2000, 8, bench.seconds))
            say(f"round {number + 1} of {bench.rounds}: {ours[-1]:,.0f}/s")
            for name, argv in programs.items():
                theirs.setdefault(name, []).append(float(load.output_of(argv)))
                say(f"{names[name]}: {theirs[name][-1]:,.0f}/s")
    for name, rates in theirs.items():
        ratio = statistics.median(own / rate for own, rate in zip(ours, rates))
        bench.add(f"durable done/s beside {names[name]}", f"{statistics.median(ours):,.0f}",
                  f"{ratio:.2f}", f"{statistics.median(rates):,.0f}/s")


def peers(bench: Bench, stack: ExitStack, names: dict[str, str]) -> dict[str, list[str]]:
    """Return the programs that print the tasks/s of other queues; a row says why one is missing."""
    folder = bench.new_folder()
    count = "1000" if bench.quick else "5000"
    programs = {}
    for name, what in names.items():
        try:
            if name == "dramatiq":
                port = stack.enter_context(load.redis(folder))
                more = [str(port), count]
                programs[name] = load.peer(folder, "dramatiq[redis]", load.DRAMATIQ, more)
            else:
                more = [str(folder / f"{name}.db"), count, name]
                programs[name] = load.peer(folder, "huey", load.HUEY, more)
        except Missing as error:
            bench.add(f"durable done/s beside {what}", "none", "-", str(error))
    return programs


def logging(bench: Bench) -> None:
    """CPU of a claim and its result with the default log, in turns with warnings alone."""
    count = 1000 if bench.quick else 5000
    pairs = []
    for _ in range(max(3, bench.rounds)):
        pair = []
        for flags in ((), ("--log-level", "warning")):
            bench.restart(*flags)
            pair.append(apart(load.cycle_cpu, bench.port, bench.pid, count))
        pairs.append(pair)
    own, quiet = (statistics.median(pair[n] for pair in pairs) for n in range(2))
    ratio = statistics.median(pair[0] / pair[1] for pair in pairs)
    bench.add("CPU of a claim + result cycle", f"{1e6 * own:.0f} µs", f"{ratio:.2f}",
              f"{1e6 * quiet:.0f} µs when only warnings are logged")


# ---- rows: many jobs

def memory(bench: Bench) -> None:
    """Memory with 100,000 jobs queued, then the time of a start on that journal."""
    empty = memory_bytes(bench.pid)
    apart(load.submit_many, bench.port, 100_000)
    full = memory_bytes(bench.pid)
    bench.add("memory with 100,000 jobs queued", mib(full), f"{full / empty:.1f}",
              f"{mib(empty)} when empty")
    bench.add("start with 100,000 jobs queued", f"{bench.resume():.2f} s", "-", "")


# The jobs of a filled journal, by their number i from the oldest on. Each scenario, node and status
# is met alone, and in pairs that are rare or met only among the oldest: a query that walks the jobs
# of one of them from the newest on, looking for the other, walks far.
OLDEST = 80
STATUS = "CASE WHEN i % 50 = 0 OR i <= 30 THEN 'failed' WHEN i % 100 = 1 THEN 'canceled' " \
         "ELSE 'completed' END"
SCENARIO = "CASE WHEN i <= 50 THEN 'bench-oldest' WHEN i % 10 = 3 THEN 'bench-tenth' " \
           "ELSE 'bench-most' END"
NODE = f"CASE WHEN i <= 30 THEN 'node-oldest' WHEN i % 20 = 3 OR i <= {OLDEST} THEN 'node-busy' " \
       "ELSE printf('node-%03d', i % 997) END"
FILTER_VALUES = {
    "status": ("completed", "failed"),
    "scenario": ("bench-oldest", "bench-tenth", "bench-most", "bench-unknown"),
    "node_id": ("node-oldest", "node-busy", "node-500", "node-unknown"),
}


def run_samples(port: int) -> None:
    """Bring one job to each end that a job can have."""
    node = load.register(port, 1)[0]
    job = {**json.loads(JOB), "max_retries": 0}
    for _ in range(3):
        answer = node.ask(request("POST", "/jobs", json.dumps(job).encode()))
    node.ask(request("POST", f"/jobs/{json.loads(answer)['id']}/cancel"))
    for status in ("completed", "failed"):
        found = load.claimed(node.ask(node.next_job()))
        assert found is not None
        report = {**RESULT, "job_id": found[0].decode(), "attempt": int(found[1]),
                  "node_id": node.node, "session": "s", "status": status, "error": "none"}
        node.ask(request("POST", "/results", json.dumps(report).encode()))


def fill(folder: Path, jobs: int) -> None:
    """Fill the journal of a master that ran the samples with copies of them.

    Running a million jobs takes a quarter of an hour, and this less than a minute. The rows are
    those that the master wrote, but for what tells them apart; totals and whatever else derives
    from the rows are computed by ffdist itself, as after a recovery.
    """
    numbers = (f"WITH RECURSIVE numbers(i) AS (VALUES(1) UNION ALL SELECT i + 1 FROM numbers "
               f"WHERE i < {jobs}), made AS (SELECT i, {STATUS} AS status, {SCENARIO} AS scenario, "
               f"{NODE} AS node_id, printf('%08x-0000-4000-8000-%012x', "
               "i * 2654435761 % 4294967296, i) AS id FROM numbers)")
    other = {
        "jobs": {"seq": "made.i + 100", "id": "made.id"},
        "results": {"seq": "made.i + 100",
                    "body": "replace(sample.body, json_extract(sample.body, '$.job_id'), made.id)"},
    }
    with closing(ffdist.connect(folder / "master" / ffdist.JOURNAL)) as connection:
        execute = connection.execute
        execute("PRAGMA synchronous=OFF")
        for table, fields in other.items():
            execute(f"CREATE TEMP TABLE sample_{table} AS SELECT * FROM {table}")
            names = [row[1] for row in execute(f"PRAGMA table_info({table})")]
            own = {**{name: f"made.{name}" for name in ("status", "scenario", "node_id")}, **fields}
            values = [own.get(name, f"sample.{name}") for name in names]
            execute(f"{numbers} INSERT INTO {table}({', '.join(names)}) SELECT {', '.join(values)} "
                    f"FROM made JOIN sample_{table} AS sample USING(status) ORDER BY i")
            say(f"{jobs:,} {table} written")
        execute("DELETE FROM totals")
        ffdist._count_anew(connection)


def queries(bench: Bench) -> None:
    """Lists by each filter, and by all of them together, with many finished jobs in the journal."""
    jobs = 100_000 if bench.quick else 1_000_000
    run_samples(bench.port)
    bench.master.end()
    fill(bench.folder, jobs)
    took = bench.resume("--keep", str(10 * jobs))
    bench.add(f"start with {jobs:,} finished jobs", f"{took:.2f} s", "-",
              mib(memory_bytes(bench.pid)))
    rest(bench.pid)
    for path in ("/jobs", "/results"):
        found = apart(list_times, bench.port, path)
        plain = found.pop("")
        worst = max(found, key=found.__getitem__)
        slow = sum(took > 0.02 for took in found.values())
        bench.add(
            f"GET {path} with {jobs:,} finished, worst of {len(found)} filters",
            f"{1000 * found[worst]:.1f} ms", f"{found[worst] / plain:.1f}",
            f"{1000 * plain:.1f} ms without a filter; {slow} over 20 ms; worst: {worst}")


def rest(pid: int) -> None:
    """Wait until a master has checked its journal, which takes a while after the start."""
    say("waiting until the master rests")
    wait_for(lambda: watched(pid, 1)[1] < 5, 300, "the master rests")


def list_times(port: int, path: str) -> dict[str, float]:
    """Return the seconds of a page of 100 by each query, the median of a few."""
    choices = [[f"{name}={value}" for value in values] for name, values in FILTER_VALUES.items()]
    named = [["", *each] for each in choices]
    found = {}
    for number, parts in enumerate(itertools.product(*named)):
        query = "&".join(part for part in parts if part)
        raw = request("GET", f"{path}?{query}" if query else path)
        first = load.delays(port, raw, 1)
        more = load.delays(port, raw, 4) if first[0] < 0.2 else []
        found[query] = statistics.median([*first, *more])
        if number % 20 == 19:
            say(f"{number + 1} queries of {path}")
    return found


# ---- rows: crowds

def latency(bench: Bench) -> None:
    """Submission to start, with a few nodes parked."""
    count = 100 if bench.quick else 500
    bare = apart(load.delays, bench.bare_port, BARE_JOB, count)
    with crowd(bench.port, 8, 30) as nodes:
        found = load.starts(nodes, count)
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        own, base = quantile(found, part), quantile(bare, part)
        bench.add(f"submission to start {name}, 8 nodes parked", f"{1000 * own:.2f} ms",
                  f"{own / base:.1f}", f"bare server {1000 * base:.2f} ms a request")


def parked(bench: Bench) -> None:
    """Agents parked over two whole waits: memory and CPU, beside connections that wait as long."""
    count, wait_s = bench.sized(8000), 3 if bench.quick else 30
    with bare_server() as (port, pid), crowd(port, count, wait_s, bare=True):
        base_bytes, base_cpu = watched(pid, 2 * wait_s)
    with crowd(bench.port, count, wait_s):
        before = asked(bench)
        used, cpu = watched(bench.pid, 2 * wait_s)
        requests = asked(bench) - before
    bench.add(f"memory with {count:,} agents parked", mib(used), f"{used / base_bytes:.2f}",
              f"bare server {mib(base_bytes)}")
    bench.add(f"CPU with {count:,} agents parked, two waits of {wait_s} s",
              f"{cpu:.1f} % of a core", f"{cpu / base_cpu:.2f}",
              f"bare server {base_cpu:.1f} %; {requests:,} requests")


def asked(bench: Bench) -> int:
    """Return how often nodes have asked for work or sent a heartbeat."""
    text = bench.master.call("GET", "/metrics").text
    return int(float(re.findall(r"^ffdist_heartbeats_total (\S+)$", text, re.MULTILINE)[0]))


def nodes(bench: Bench) -> None:
    """A large fleet, parked and beating by asking again: CPU, memory, and how fast a job starts."""
    count, wait_s = bench.sized(10_000), 3 if bench.quick else 30
    bare = apart(load.delays, bench.bare_port, BARE_JOB, 300)
    idle = memory_bytes(bench.pid)
    with crowd(bench.port, count, wait_s) as pipe:
        before = asked(bench)
        used, cpu = watched(bench.pid, 2 * wait_s)
        requests = asked(bench) - before
        found = load.starts(pipe, 50 if bench.quick else 300)
    bench.add(f"CPU with {count:,} nodes parked and beating", f"{cpu:.1f} % of a core", "-",
              f"two waits of {wait_s} s, every fifth node full; {requests:,} requests")
    bench.add(f"memory with {count:,} nodes parked and beating", mib(used), f"{used / idle:.1f}",
              f"{mib(idle)} without nodes")
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        own, base = quantile(found, part), quantile(bare, part)
        bench.add(f"submission to start {name}, {count:,} nodes", f"{1000 * own:.2f} ms",
                  f"{own / base:.1f}", f"bare server {1000 * base:.2f} ms a request")


def beats(bench: Bench) -> None:
    """CPU of a heartbeat of each of many nodes, all sent at one moment over open connections."""
    count, rounds = bench.sized(4000), 1 if bench.quick else 3
    own = statistics.median(apart(load.burst, bench.port, bench.pid, count, rounds, False))
    with bare_server() as (port, pid):
        base = statistics.median(apart(load.burst, port, pid, count, rounds, True))
    bench.add(f"CPU of {count:,} heartbeats sent at one moment", f"{own:.2f} s",
              f"{own / max(base, 0.01):.2f}", f"bare server {base:.2f} s")


def from_all(stack: ExitStack, work: Callable[..., None], port: int, count: int) -> list[Any]:
    """Run a load in as many processes as there are addresses, each from its own."""
    return [stack.enter_context(beside(work, port, count // ADDRESSES, f"127.0.0.{2 + number}"))
            for number in range(ADDRESSES)]


def each_heard(pipes: Sequence[Any], limit_s: float) -> list[Any]:
    """Return a message of each of some processes; Overdue where one takes too long."""
    deadline = time.perf_counter() + limit_s
    found = []
    for pipe in pipes:
        if not pipe.poll(max(0.0, deadline - time.perf_counter())):
            raise Overdue(f"the server did not let all in within {limit_s:.0f} s")
        found.append(heard(pipe))
    return found


def idle(bench: Bench) -> None:
    """Connections that say nothing: threads, memory, and what /health takes meanwhile."""
    count = bench.sized(20_000)
    alone = quantile(apart(load.visits, bench.port, 300), 0.99)
    empty = memory_bytes(bench.pid)
    with ExitStack() as stack:
        pipes = from_all(stack, load.hold, bench.port, count)
        each_heard(pipes, CROWD_LIMIT_S)
        used, cpu = watched(bench.pid, 2 if bench.quick else 20)
        for pipe in pipes:
            pipe.send("how many?")
        kept = sum(each_heard(pipes, CROWD_LIMIT_S))
        threads = load.thread_count(bench.pid)
        say(f"{kept:,} idle connections, {threads} threads, {mib(used)}")
        found = apart(load.visits, bench.port, 300)
    what = f"with {kept:,} idle connections"
    bench.add(f"threads {what}", f"{threads:,}", "-",
              f"{count:,} opened, {load.raise_file_limit():,} files may be open")
    bench.add(f"memory {what}", mib(used), f"{used / empty:.1f}", f"{mib(empty)} without them")
    bench.add(f"CPU {what}", f"{cpu:.1f} % of a core", "-", "")
    own = max(found) if math.inf in found else quantile(found, 0.99)
    figure = "no answer" if own == math.inf else f"{1000 * own:.1f} ms"
    bench.add(f"/health p99 {what}", figure, f"{own / alone:.1f}",
              f"{1000 * alone:.1f} ms without them")


def storm(bench: Bench) -> None:
    """Connections that open at one moment, and close at one moment: when /health answers again."""
    count = bench.sized(10_000)
    alone = quantile(apart(load.visits, bench.port, 100), 0.5)
    for what in ("open", "close"):
        with ExitStack() as stack:
            pipes = from_all(stack, load.storm, bench.port, count)
            each_heard(pipes, CROWD_LIMIT_S)
            before, began = load.cpu_seconds(bench.pid), time.perf_counter()
            for pipe in pipes:
                pipe.send("open")
            each_heard(pipes, CROWD_LIMIT_S)
            if what == "close":
                time.sleep(5)
                before, began = load.cpu_seconds(bench.pid), time.perf_counter()
                stack.close()
            took = load.settled(bench.port, began, CROWD_LIMIT_S)
        used = load.cpu_seconds(bench.pid) - before
        figure = f"{took:.2f} s" if took is not None else f"not within {CROWD_LIMIT_S:.0f} s"
        bench.add(f"/health again after {count:,} connections {what} at once", figure,
                  f"{took / alone:.0f}" if took is not None else "-",
                  f"{1000 * alone:.1f} ms without them; {used:.1f} s of CPU")
        bench.restart()


# ---- rows: one machine

def command(bench: Bench) -> None:
    """CPU of `ffdist.py jobs`, as a script and as a module, which Python keeps in compiled form.

    Beside it stands Python with the one import that it cannot do without; the median of runs in
    turns.
    """
    load.submit_many(bench.port, 50)
    words = ["jobs", "--master", bench.master.url]
    ours = {
        "ffdist.py jobs": [sys.executable, str(TOP / "ffdist.py"), *words],
        "python3 -m ffdist jobs": [sys.executable, "-m", "ffdist", *words],
    }
    bare = [sys.executable, "-c", "import urllib.request"]
    for name, argv in ours.items():
        cpu_of(argv, bench.folder)  # compiles the modules
        pairs = [(cpu_of(argv, bench.folder), cpu_of(bare, bench.folder))
                 for _ in range(3 if bench.quick else 15)]
        own, base = (statistics.median(pair[n] for pair in pairs) for n in range(2))
        ratio = statistics.median(own / base for own, base in pairs)
        bench.add(f"CPU of `{name}`", f"{1000 * own:.0f} ms", f"{ratio:.1f}",
                  f"`python3 -c 'import urllib.request'` {1000 * base:.0f} ms")


def cpu_of(argv: Sequence[str], cache: Path) -> float:
    """Run a program; return the CPU seconds that it used. Compiled modules go to a folder."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=TOP,
        env={**env, "PYTHONPYCACHEPREFIX": str(cache / "compiled")})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.WEXITSTATUS(status)
    assert status == 0, f"{argv} ended with {status}"
    return usage.ru_utime + usage.ru_stime


def sampling(bench: Bench) -> None:
    """CPU of the readings that an agent takes once a second while a job runs."""
    count = 50 if bench.quick else 500
    archive.unpack(
        (TOP / "tests/hosts/xeon-t4.txt").read_text(encoding="utf-8"), bench.folder / "xeon"
    )
    places = {
        "this machine": hwdetect.Host(),
        "two sockets": hwdetect.Host(f"{bench.folder}/xeon"),
    }
    for where, host in places.items():
        sampler = hwdetect.Sampler(host, hwdetect.detect(host, probe=False), gpu=False)
        sampler.throttles()
        began = time.process_time()
        for number in range(count):
            sampler.sample(float(number))
            hwdetect.process_group(hwdetect.Host(), os.getpgid(bench.pid))
        each = (time.process_time() - began) / count
        share = f"{100 * each / hwdetect.SAMPLE_S:.3f} % of a core"
        bench.add(f"sampling once a second, {where}", share, "-", "")


@contextmanager
def agent_beside(bench: Bench, *flags: str, probe: bool = False) -> Iterator[Agent]:
    """Run an agent beside the master under test."""
    need("ffmpeg", "ffprobe")
    agent = Agent(bench.folder, bench.master.url, *flags, probe=probe)
    try:
        wait_for(
            lambda: "available" in [node["status"] for node in bench.master.get("/nodes")["nodes"]],
            why="the agent registers",
        )
        yield agent
    finally:
        agent.end()


def agent(bench: Bench) -> None:
    """A real agent: idle, and its wall time over the very same FFmpeg commands run alone."""
    with agent_beside(bench) as program:
        time.sleep(2)
        used, cpu = watched(program.pid, 10 if bench.quick else 60)
        bench.add("agent idle, memory", mib(used), f"{used / bench.bare_idle_bytes:.2f}",
                  f"bare server {mib(bench.bare_idle_bytes)}")
        bench.add("agent idle, CPU", f"{cpu:.2f} % of a core", "-", "")
        overhead(bench, program)


def overhead(bench: Bench, program: Agent) -> None:
    """Wall time of a job from claim to report, over FFmpeg alone."""
    length, master = 10 if bench.quick else 40, bench.master
    pairs = []
    for number in range(min(bench.rounds, 3) + 1):
        made = master.submit("720p30-h264", duration=length, preset="veryfast", audio=False)
        job = master.finished(made["id"], 300)
        result = job["result"]
        wall = seconds_between(job["started_at"], job["completed_at"])
        # The generated source lies in the agent's cache.
        source = f"file:{next((program.work / 'cache').glob('*.mov'))}"
        argv = [source if word.endswith("source.mov") else
                f"file:{bench.folder}/alone" if word.endswith("/output") else word
                for word in result["encode"]["commands"][0]]
        began = time.perf_counter()
        subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        alone = time.perf_counter() - began
        if number:  # the first one made the generated source
            pairs.append((wall, result["metrics"]["duration"], alone))
            say(f"job {number}: {wall:.2f} s, FFmpeg alone {alone:.2f} s")
    wall, encode, alone = (statistics.median(pair[n] for pair in pairs) for n in range(3))
    bench.add("encode under the agent over FFmpeg alone", f"{encode:.2f} s",
              f"{encode / alone:.3f}", f"{alone:.2f} s FFmpeg alone")
    bench.add("claim to report over FFmpeg alone", f"{wall:.2f} s", f"{wall / alone:.3f}",
              f"{alone:.2f} s FFmpeg alone")


def films(bench: Bench) -> None:
    """A queue of short films through an agent, beside xargs running the very same commands.

    Submission to the last end, the median of rounds in turns.
    """
    need("ffmpeg", "ffprobe", "xargs")
    names = [f"film-{number}.mp4" for number in range(3 if bench.quick else 8)]
    for slots in (1, 2):
        bench.restart()
        media = bench.folder / "media"
        media.mkdir()
        for name in names:
            make_film(media / name)
        with agent_beside(bench, "--max-concurrent-jobs", str(slots), probe=True):
            films_through(bench, names[:1])  # what the first job of an agent finds out
            pairs = []
            for number in range(min(bench.rounds, 3)):
                took, jobs = films_through(bench, names)
                alone = films_alone(jobs, media, slots)
                pairs.append((took, alone))
                say(f"round {number + 1}: {took:.2f} s, xargs {alone:.2f} s")
        took, alone = (statistics.median(pair[n] for pair in pairs) for n in range(2))
        ratio = statistics.median(took / alone for took, alone in pairs)
        bench.add(f"{len(names)} films of 5 s through {slots} slot{'s' * (slots > 1)}",
                  f"{took:.2f} s", f"{ratio:.2f}", f"xargs -P{slots} {alone:.2f} s")


def make_film(film: Path) -> None:
    """Make a film of 5 s: the tests' own, or a generated one where that is missing."""
    if FILM.exists():
        shutil.copy(FILM, film)
        return
    picture = "testsrc2=size=1280x720:rate=25:duration=5.3"
    subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", picture, "-f", "lavfi", "-i",
                    "sine=duration=5.3", str(film)], check=True, stdin=subprocess.DEVNULL)


def films_through(bench: Bench, names: Sequence[str]) -> tuple[float, list[Any]]:
    """Submit all films at once; return the seconds to the last end, and the jobs."""
    body = [{"scenario": "transcode",
             "parameters": {"input": name, "output": f"out-{name}", "overwrite": True}}
            for name in names]
    began = time.time()
    answer = bench.master.call("POST", "/jobs", body)
    assert answer.status == 201, answer
    while open_jobs(bench):
        time.sleep(0.5)  # rarely: looking takes time from the encodes
    jobs = [bench.master.finished(job["id"], 600) for job in answer.body["jobs"]]
    assert all(job["status"] == "completed" for job in jobs), jobs
    last = max(job["completed_at"] for job in jobs)
    return seconds_between("1970-01-01T00:00:00Z", last) - began, jobs


def open_jobs(bench: Bench) -> int:
    """Return how many jobs wait or run."""
    return sum(bench.master.get(f"/jobs?status={status}&limit=1")["total"]
               for status in ("pending", "running"))


def films_alone(jobs: Sequence[Any], media: Path, slots: int) -> float:
    """Run the commands that the results show by xargs; return the seconds that it took."""
    lines = []
    for job in jobs:
        own = job["parameters"]
        (media / own["output"]).unlink()
        # A shown command has the job's own names of its films, some with a protocol before them.
        places = {f"{before}{own[kind]}": str(media / own[kind])
                  for kind in ("input", "output") for before in ("", "file:", "fd:")}
        lines += [shlex.join(places.get(word, word) for word in argv)
                  for argv in job["result"]["encode"]["commands"]]
    began = time.perf_counter()
    subprocess.run(["xargs", "-P", str(slots), "-d", "\n", "-I", "{}", "nice", "sh", "-c", "{}"],
                   input="\n".join(lines), text=True, check=True, capture_output=True)
    return time.perf_counter() - began


# ---- instead of rows

def soak(bench: Bench, jobs: int, keep: str | None) -> None:
    """Many jobs through one master: the last tenth beside the first."""
    bench.restart(*(["--keep", keep] if keep else []))
    tenths = apart(
        load.soak, bench.port, bench.bare_port, bench.pid, bench.folder / "master", jobs
    )
    first, last = tenths[0], tenths[-1]
    mean = statistics.harmonic_mean([tenth.rate for tenth in tenths])
    bench.add(f"soak: {jobs:,} jobs submitted, claimed, reported", f"{mean:,.0f}/s", "-",
              f"{first.rate:,.0f}/s in the first tenth, {last.rate:,.0f}/s in the last")
    bench.add("soak: claim + result cycles/s, last tenth", f"{last.cycles:,.0f}",
              f"{last.cycles_ratio:.2f}", f"ratio {first.cycles_ratio:.2f} in the first tenth")
    bench.add("soak: one claim + result alone, last tenth", f"{1000 * last.alone:.2f} ms",
              f"{last.alone_ratio:.1f}", f"ratio {first.alone_ratio:.1f} in the first tenth")
    bench.add("soak: memory of the master, last tenth", mib(last.memory),
              f"{last.memory / first.memory:.2f}", f"{mib(first.memory)} in the first tenth")
    bench.add("soak: journal, bytes a job", f"{last.journal / jobs:,.0f}", "-",
              f"{mib(last.journal)} in all")


# What is measured, by name, and the seconds after which it is given up.
ROWS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "dispatch": (dispatch, ROW_LIMIT_S),
    "deep": (deep, ROW_LIMIT_S),
    "queues": (queues, ROW_LIMIT_S),
    "submissions": (submissions, ROW_LIMIT_S),
    "latency": (latency, ROW_LIMIT_S),
    "beats": (beats, ROW_LIMIT_S),
    "parked": (parked, ROW_LIMIT_S),
    "idle": (idle, 2 * CROWD_LIMIT_S),
    "storm": (storm, 6 * CROWD_LIMIT_S),
    "nodes": (nodes, ROW_LIMIT_S),
    "queries": (queries, ROW_LIMIT_S),
    "command": (command, ROW_LIMIT_S),
    "logging": (logging, ROW_LIMIT_S),
    "memory": (memory, ROW_LIMIT_S),
    "agent": (agent, ROW_LIMIT_S),
    "sampling": (sampling, ROW_LIMIT_S),
    "films": (films, ROW_LIMIT_S),
}


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        "python3 -m tests.bench",
        description="Measure how fast this fleet is.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--quick", action="store_true", help="short rounds, a tenth of each crowd"
    )
    parser.add_argument(
        "--soak", type=int, metavar="JOBS", help="instead: so many jobs through one master"
    )
    parser.add_argument("--keep", help="with --soak: the master's --keep")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)} (all)")
    args = parser.parse_args(argv)
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown:
        parser.error(f"unknown row {unknown[0]}: expected {', '.join(ROWS)}")
    return args


def handle_signals() -> None:
    """End on SIGTERM as on Ctrl-C, and a row when its time is up."""
    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def give_up(number: int, frame: object) -> None:
        raise Overdue("the time limit of the row was over")
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGALRM, give_up)


def measure_all(bench: Bench, args: argparse.Namespace) -> int:
    """Measure what was asked for; return the exit code."""
    try:
        if args.soak:
            soak(bench, args.soak, args.keep)
            return 0
        for name in args.rows or ROWS:
            bench.measure(name, *ROWS[name])
    except KeyboardInterrupt:
        return 130
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table; after Ctrl-C that of what was measured until then."""
    args = parsed(argv)
    handle_signals()
    with tempfile.TemporaryDirectory(prefix="ffdist-bench-") as top, ExitStack() as stack:
        bench = Bench(Path(top), args.quick, stack)
        code = measure_all(bench, args)
    cores = f"Python {platform.python_version()}, {os.cpu_count()} cores"
    print(f"{cores}{', quick' if args.quick else ''}")
    for name, share in bench.others.items():
        if share > 0.05:
            print(f"not to be trusted: other programs used {100 * share:.0f} % of the cores "
                  f"during {name}")
    print(f"\n{table(bench.rows)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
