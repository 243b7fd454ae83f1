"""A bad network on loopback: a proxy between agents and a master that loses, cuts, delays, repeats.

It understands requests and answers that have lengths, which all of ffdist's have, and keeps
connections alive. For each request a rule is asked twice: before the master sees it (pass, delay,
lose, twice) and when the master has answered (pass, mute, cut). split() is a network that is
down; mend() ends it.
"""
from __future__ import annotations

import contextlib
import json
import random
import re
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

BEFORE = ("delay", "lose", "twice")
AFTER = ("mute", "cut")
DELAY_S = 0.5
ANSWER_S = 120.0


class Message(NamedTuple):
    """A request or an answer: its first line, its body as JSON, and all its bytes."""

    line: str
    body: Any
    raw: bytes

    @property
    def status(self) -> int:
        """The status of an answer."""
        return int(self.line.split(" ")[1])


class Seen(NamedTuple):
    """A request, what was done to it, and the answer (None: the master never saw it)."""

    asked: Message
    faults: tuple[str, ...]
    answer: Message | None


Rule = Callable[[Message, "Message | None"], str]


def passing(asked: Message, answer: Message | None) -> str:
    """The rule of a good network."""
    return "pass"


class Sometimes:
    """A rule with a seed: each request and each answer meets one of the faults with this chance."""

    def __init__(self, chance: float, seed: int) -> None:
        self.chance = chance
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def __call__(self, asked: Message, answer: Message | None) -> str:
        with self._lock:
            if self._random.random() >= self.chance:
                return "pass"
            return self._random.choice(BEFORE if answer is None else AFTER)


class Once:
    """A rule that does one thing to the first message that it is meant for; `hit` is set then."""

    def __init__(
        self, fault: str, line: str, meant: Callable[[Any], Any] = lambda answer: True
    ) -> None:
        self.fault = fault
        self.hit = threading.Event()
        self._line = re.compile(line)
        self._meant = meant

    def __call__(self, asked: Message, answer: Message | None) -> str:
        if self.hit.is_set() or not self._line.match(asked.line):
            return "pass"
        if (answer is None) != (self.fault in BEFORE):
            return "pass"
        if answer is not None and not self._meant(answer.body):
            return "pass"
        self.hit.set()
        return self.fault


class Gone(Exception):
    """One of the two sides has hung up."""


class Line:
    """One side's connection: whole messages come out of it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self._buffer = b""

    def message(self, other: Line | None = None) -> Message:
        """Return the next message; Gone when this side, or the other one meanwhile, hangs up."""
        while b"\r\n\r\n" not in self._buffer:
            self._receive(other)
        head, _, rest = self._buffer.partition(b"\r\n\r\n")
        found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        length = int(found[1]) if found else 0
        while len(rest) < length:
            self._receive(other)
            rest = self._buffer[len(head) + 4:]
        whole = len(head) + 4 + length
        raw, self._buffer = self._buffer[:whole], self._buffer[whole:]
        body = None
        with contextlib.suppress(ValueError):
            body = json.loads(raw[len(head) + 4:])
        return Message(head.split(b"\r\n")[0].decode("latin-1"), body, raw)

    def _receive(self, other: Line | None) -> None:
        limit = time.monotonic() + ANSWER_S
        watched = [side.connection for side in (self, other) if side is not None]
        while time.monotonic() < limit:
            ready = select.select(watched, [], [], 1.0)[0]
            if other is not None and other.connection in ready:
                if other.connection.recv(1, socket.MSG_PEEK) == b"":
                    raise Gone
                watched.remove(other.connection)  # its next request; it waits its turn
            if self.connection in ready:
                data = self.connection.recv(1 << 16)
                if not data:
                    break
                self._buffer += data
                return
        raise Gone

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class Proxy:
    """Stands before the master at a port of loopback, which may come and go; end() it."""

    def __init__(self, master_port: int, rule: Rule = passing) -> None:
        self.rule = rule
        self.seen: list[Seen] = []
        self.counts: Counter[str] = Counter()
        self._master = ("127.0.0.1", master_port)
        self._down = False
        self._lock = threading.Lock()  # guards _lines and _down
        self._lines: set[Line] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def split(self) -> None:
        """Cut what is open and let nothing through."""
        with self._lock:
            self._down = True
            lines, self._lines = self._lines, set()
        self.counts["split"] += 1
        for line in lines:
            with contextlib.suppress(OSError):
                line.connection.shutdown(socket.SHUT_RDWR)  # its own thread closes it

    def mend(self) -> None:
        """Let requests through again."""
        with self._lock:
            self._down = False

    def end(self) -> None:
        """Close all."""
        self.split()
        self.counts["split"] -= 1
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client = self._open(self._listener.accept()[0])
            except Gone:
                continue
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _open(self, connection: socket.socket) -> Line:
        line = Line(connection)
        with self._lock:
            if not self._down:
                self._lines.add(line)
                return line
        line.close()
        raise Gone

    def _shut(self, line: Line) -> None:
        with self._lock:
            self._lines.discard(line)
        line.close()

    def _to_master(self) -> Line:
        return self._open(socket.create_connection(self._master, 10))

    def _serve(self, client: Line) -> None:
        master: Line | None = None
        with contextlib.suppress(Gone, OSError, ValueError):
            while True:
                asked = client.message()
                fault = self._count(self.rule(asked, None))
                if fault == "lose":
                    self.seen.append(Seen(asked, (fault,), None))
                    break
                if fault == "delay":
                    time.sleep(random.uniform(0, DELAY_S))
                master = master or self._to_master()
                master.connection.sendall(asked.raw)
                answer = master.message(client)
                if fault == "twice":
                    threading.Thread(target=self._again, args=(asked,), daemon=True).start()
                after = self._count(self.rule(asked, answer))
                self.seen.append(Seen(asked, (fault, after), answer))
                if after == "cut":
                    client.connection.sendall(answer.raw[:len(answer.raw) // 2])
                if after != "pass":
                    break
                client.connection.sendall(answer.raw)
        for line in (client, master):
            if line is not None:
                self._shut(line)

    def _count(self, fault: str) -> str:
        if fault != "pass":
            self.counts[fault] += 1
        return fault

    def _again(self, asked: Message) -> None:
        """Send a request once more, late, on a connection of its own; nobody hears the answer."""
        with contextlib.suppress(Gone, OSError):
            line = self._to_master()
            with contextlib.suppress(Gone, OSError):
                line.connection.sendall(asked.raw)
                line.message()
            self._shut(line)
