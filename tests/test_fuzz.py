"""Bad input, seeded.

The invariant: whatever bytes come, the master answers each request with exactly one well-formed
HTTP answer whose body is JSON (or, to a peer that sent nothing, with nothing). What cannot be
understood or done gets a 4xx with one sentence under `error` (505 for another HTTP); never a 5xx of
its own making. It does not matter in what pieces the bytes come. After all of it nothing has
changed: the same jobs, nodes and results as before, the next honest request is served, and the log
holds no traceback.
"""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import socket
import tempfile
import threading
import time
import unittest
import uuid
from pathlib import Path
from typing import Any

import ffdist
from agent import PARAMETERS
from tests.fleet import NOBODY, Master, Node
from tests.support import Answer, all_of, call, exchange, wait_for

SEED = int(os.environ.get("FFDIST_TEST_SEED", "20251229"))
HUGE = 10 ** 400


def answers_of(raw: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Split what came back into answers: (status, headers, body); AssertionError when it is no
    HTTP."""
    found = []
    while raw:
        head, gap, rest = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.1 (\d{3}) [A-Za-z' -]*", lines[0])
        assert match and gap, f"no status line: {raw[:200]!r}"
        headers = dict(line.lower().split(": ", 1) for line in lines[1:])
        length = int(headers["content-length"])
        assert len(rest) >= length, f"the body is cut: {raw[:200]!r}"
        found.append((int(match[1]), headers, rest[:length]))
        raw = rest[length:]
    return found


def request(
    method: str, path: str, body: bytes = b"", *headers: str, version: str = "1.1"
) -> bytes:
    length = [f"Content-Length: {len(body)}"] if body else []
    lines = [f"{method} {path} HTTP/{version}", "Host: x", *length, *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Fuzz(unittest.TestCase):
    """One master with two nodes and jobs in several states; nothing may move them."""

    master: Master
    node: Node
    running: Any

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.mkdtemp(prefix="ffdist-test-")
        cls.addClassCleanup(shutil.rmtree, folder, ignore_errors=True)
        cls.master = Master(Path(folder))
        cls.addClassCleanup(cls.master.end)
        cls.node, other = Node(cls.master, "busy"), Node(cls.master, "idle")
        cls.master.submit()
        done = cls.node.claim().body["job"]
        cls.node.report(done, metrics={"duration": 1})
        cls.master.submit()
        cls.running = cls.node.claim().body["job"]
        cls.node.progress(cls.running, progress=10, lines=["a line"], lines_from=0)
        cls.pending = cls.master.submit()
        cls.idle = other
        cls.before = cls.state()

    @classmethod
    def state(cls) -> dict[str, Any]:
        nodes = [{**node, "last_heartbeat": None} for node in cls.master.get("/nodes")["nodes"]]
        jobs = cls.master.get("/jobs?limit=1000")["jobs"]
        return {"jobs": jobs, "nodes": nodes, "results": cls.master.get("/results"),
                "job": cls.master.get(f"/jobs/{cls.running['id']}"),
                "lines": cls.master.get(f"/jobs/{cls.running['id']}/logs")}

    def tearDown(self) -> None:
        self.assertEqual(self.state(), self.before, "something has changed")
        words = self.master.words()
        for word in ("Traceback", "failed on this request", " error "):
            self.assertNotIn(word, words)
        self.assertIsNone(self.master.process.poll())

    def send(self, raw: bytes, close: bool = True, timeout: float = 30) -> bytes:
        return exchange(self.master.port, raw, timeout, close)

    def refused_raw(self, raw: bytes, *statuses: int, close: bool = True) -> str:
        """Send bytes that must be refused, with one answer; return its sentence."""
        found = answers_of(self.send(raw, close))
        self.assertEqual(len(found), 1, (raw[:200], found))
        status, headers, body = found[0]
        self.assertTrue(status in statuses if statuses else 400 <= status < 500, (raw[:200], found))
        self.assertEqual(headers["content-type"], "application/json")
        return self.sentence(json.loads(body))

    def sentence(self, body: Any) -> str:
        self.assertIsInstance(body.get("error"), str, body)
        self.assertLess(len(body["error"]), 2000)
        self.assertNotIn("\n", body["error"])
        return body["error"]

    def refused(self, answer: Answer, what: object = None) -> Answer:
        self.assertTrue(400 <= answer.status < 500, (str(what)[:300], answer))
        self.sentence(answer.body)
        return answer

    def path(self, route: ffdist.Route) -> str:
        part = self.node.id if route.path.startswith("/nodes") else self.running["id"]
        return route.path.replace("{id}", part)


TEXT = (5, 1.5, True, [], {}, ["x"], "\0", "a\nb", "\x7f", "x" * 100_000)
WHOLE = ("x", True, [], {}, -1, 1.5, 1e300, HUGE, -HUGE, "nan", 1 << 62)
FLAG = (5, "yes", [], {}, 2.5)
WRONG_FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "/nodes/register": {
        "address": (*TEXT, None, ""),
        "type": TEXT,
        "cpu_model": TEXT,
        "gpu_type": TEXT,
        "name": TEXT,
        "session": TEXT,
        "id": (*TEXT, "no-uuid"),
        "cpu_threads": WHOLE,
        "ram_bytes": WHOLE,
        "ram_total_bytes": WHOLE,
        "has_gpu": FLAG,
        "labels": (5, "x", [], True),
        "max_concurrent_jobs": (*WHOLE, 0),
        "protocol": (*WHOLE, 0),
        "holding": (
            5,
            "x",
            {},
            True,
            [5],
            [[]],
            [{}],
            [{"job_id": 5, "attempt": 1}],
            [{"job_id": NOBODY, "attempt": -1}],
            [{"job_id": NOBODY, "attempt": "x"}],
            [{"job_id": NOBODY, "attempt": HUGE}],
        ),
    },
    "/jobs": {
        "scenario": (*TEXT, None, "", "a b", "../x", "ünï"),
        "confidence": (*TEXT, None, "sure"),
        "id": (*TEXT, "no-uuid"),
        "max_retries": (*WHOLE, 101),
        "parameters": (5, "x", [], True),
    },
    "/nodes/{id}/heartbeat": {
        "wait": ("x", True, [], {}, -1, 61, 1e300, HUGE),
        "seen": WHOLE,
        "claim": TEXT,
        "session": TEXT,
        "leaving": FLAG,
    },
    "/jobs/{id}/progress": {
        "node_id": (*TEXT, None, "", NOBODY),
        "session": TEXT,
        "attempt": (*WHOLE, 0, 2),
        "progress": ("x", [], True, {str(number): 1 for number in range(100)}, HUGE),
        "lines": (5, "x", {}, True, [5], [None], [["x"]]),
        "lines_from": WHOLE,
    },
    "/results": {
        "job_id": (*TEXT, None, "", NOBODY),
        "node_id": (*TEXT, None, ""),
        "session": TEXT,
        "attempt": (*WHOLE, 0, 2),
        "status": (*TEXT, None, "", "running", "done"),
        "metrics": (5, "x", [], True),
        "analyzer_output": (5, "x", [], True),
        "error": (5, [], {}, True),
        "failure_reason": TEXT,
        "completed_at": TEXT,
        "lines": (5, "x", {}, [5]),
        "lines_from": WHOLE,
    },
}


class TestBodies(Fuzz):
    """JSON that is none, and JSON that says what cannot be."""

    def test_a_body_that_is_not_json_is_refused_on_every_route(self) -> None:
        bodies = (
            b"{",
            b"}",
            b"nul",
            b"{'a': 1}",
            b"[1,]",
            b'{"a" 1}',
            b"\xff\xfe\x00",
            b"\x80",
            b"NaN",
            b"\0",
            b'{"scenario": NaN}',
            b'{"address": Infinity}',
            b'{"wait": -Infinity}',
            b'{"wait": 1e400}',
            b'{"attempt": -1e999}',
            b"[" * 100_000,
            b'{"a":' * 5000,
            b'["' * 70 + b"[" * 70,
            b'{"scenario": "\\ud800"}',
            b'{"address": "\\udfff x"}',
            b'{"a": "\xed\xa0\x80"}',
            '{"scenario": "x"}'.encode("utf-16"),
            b'{"a": 1}{"a": 1}',
            b'"' + b"\\" * 999,
            b'{"a":\x0b1}',
            b'{"attempt": ' + b"9" * 5000 + b"}",
        )
        for route in ffdist.ROUTES:
            if route.method != "POST":
                continue
            for body in bodies:
                with self.subTest(route=route.path, body=body[:30]):
                    answer = self.refused(
                        self.master.call("POST", self.path(route), raw=body), body
                    )
                    self.assertEqual(answer.status, 400)

    def test_json_that_is_not_an_object_is_refused_where_one_is_needed(self) -> None:
        for route in (
            "/nodes/register",
            "/jobs",
            "/results",
            f"/jobs/{self.running['id']}/progress",
            f"/nodes/{self.node.id}/heartbeat",
        ):
            for value in (5, "text", True, 1.5, [[]], [None], [5], ["x"]):
                with self.subTest(route=route, value=value):
                    self.refused(call(self.master.url, "POST", route, value), value)
        for route in ("/nodes/register", "/jobs", "/results"):
            self.refused(self.master.call("POST", route, raw=b"null"))
            self.refused(self.master.call("POST", route))

    def test_every_field_of_a_wrong_type_or_size_is_refused_by_name(self) -> None:
        own = {"node_id": self.node.id, "session": self.node.session, "attempt": 1}
        good = {
            "/nodes/register": {"address": "x", "id": self.node.id, "session": self.node.session},
            "/jobs": {"scenario": "x"},
            "/nodes/{id}/heartbeat": {"session": self.node.session},
            "/jobs/{id}/progress": own,
            "/results": {**own, "job_id": self.running["id"], "status": "completed"},
        }
        for route, fields in WRONG_FIELDS.items():
            path = route.replace("/nodes/{id}", f"/nodes/{self.node.id}")
            path = path.replace("/jobs/{id}", f"/jobs/{self.running['id']}")
            for field, values in fields.items():
                for value in values:
                    with self.subTest(route=route, field=field, value=str(value)[:40]):
                        body = {**good[route], field: value}
                        answer = self.refused(self.master.call("POST", path, body), value)
                        inner = ("job_id", "attempt") if field == "holding" else ()
                        if answer.status == 400 and "is not JSON" not in answer.body["error"]:
                            self.assertIn(answer.body.get("field"), (field, *inner), answer)

    def test_every_parameter_of_a_wrong_type_or_size_is_refused_by_name(self) -> None:
        for name in PARAMETERS:
            for value in (
                [[]],
                {},
                {"a": 1},
                "\0",
                "x" * 100_000,
                HUGE,
                -HUGE,
                -1e300,
                [5],
                [None],
            ):
                with self.subTest(parameter=name, value=str(value)[:40]):
                    answer = self.refused(self.master.call(
                        "POST", "/jobs", {"scenario": "x", "parameters": {name: value}}), value)
                    self.assertEqual(
                        answer.body.get("field", f"parameters.{name}"), f"parameters.{name}"
                    )

    def test_random_json_is_never_more_than_refused(self) -> None:
        source = random.Random(SEED)
        names = [name for fields in WRONG_FIELDS.values() for name in fields] + list(PARAMETERS)
        for number in range(400):
            body = self.random_json(source, names, 4)
            if isinstance(body, dict):
                body.pop("scenario", None)  # so that none of it can be a job
                body.pop("address", None)
            elif isinstance(body, list):
                body = [body]
            for path in (
                "/jobs",
                "/nodes/register",
                "/results",
                f"/jobs/{self.running['id']}/progress",
            ):
                with self.subTest(seed=SEED, number=number, path=path):
                    self.refused(self.master.call("POST", path, body), body)

    def random_json(self, source: random.Random, names: list[str], depth: int) -> Any:
        kind = source.randrange(9 if depth else 6)
        if kind < 6:
            text = "".join(chr(source.randrange(1, 0xD800)) for _ in range(9))
            number = source.choice((0, -1, 5, HUGE, 1 << 63, 2.5, -1e300))
            return (None, source.random() < 0.5, number, source.choice(names), text, "")[kind]
        if kind == 6:
            return [self.random_json(source, names, depth - 1) for _ in range(source.randrange(5))]
        return {source.choice(names): self.random_json(source, names, depth - 1)
                for _ in range(source.randrange(6))}

    def test_numbers_of_any_size_in_fields_that_are_only_kept_break_nothing(self) -> None:
        body = {"node_id": self.idle.id, "status": "completed", "job_id": NOBODY,
                "metrics": {"duration": HUGE, "speed": -HUGE}, "progress": {"percent": HUGE}}
        self.refused(self.master.call("POST", "/results", body))
        self.refused(self.master.call("POST", f"/jobs/{self.running['id']}/progress", body))
        self.assertEqual(self.master.call("GET", "/").status, 200)

    def test_an_unclosed_string_of_escapes_is_refused_while_others_are_served(self) -> None:
        for body in (b"[" * 65 + b'"' + b'\\"' * 250_000, b"[" * 65 + b'"\\\n' * 200_000,
                     b"[" * 65 + b'""' * 250_000 + b'"'):
            self.refused(self.master.call("POST", "/jobs", raw=body, timeout=30))

    def test_a_frame_rate_with_a_huge_exponent_is_refused_while_others_are_served(self) -> None:
        for rate in ("1e999999999", "1e-999999999", "9" * 5000, "1/" + "9" * 5000, "1_0e9999999/3"):
            body = {"scenario": "x", "parameters": {"fps": rate}}
            answer = self.master.call("POST", "/jobs", body, timeout=30)
            self.assertEqual(self.refused(answer, rate).body["field"], "parameters.fps")

    def test_bodies_over_the_limit_are_refused(self) -> None:
        small, large = b" " * (1 << 20), b" " * (10 << 20)
        heartbeat = f"/nodes/{self.node.id}/heartbeat"
        session = f"?session={self.node.session}"
        self.assertEqual(self.master.call("POST", heartbeat + session, raw=small).status, 200)
        self.assertEqual(self.refused(self.master.call("POST", "/jobs", raw=large)).status, 400)
        for path, body in ((heartbeat, small), ("/nodes/register", small), ("/jobs", large),
                           ("/results", large)):
            self.refused_raw(request("POST", path, body + b" "), 413)
        for path in (heartbeat, "/jobs"):
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n"
            self.refused_raw(head.encode(), 413, close=False)


class TestPaths(Fuzz):
    """Paths, methods and ids that do not exist."""

    def test_unknown_and_strange_ids_are_refused_on_every_route(self) -> None:
        ids = (
            NOBODY,
            "abc",
            "none",
            "%00",
            "%ff%fe",
            "..",
            "%2e%2e%2f",
            "a" * 5000,
            "%F0%9F%8E%AC",
            "next",
            "0" * 36,
            "'%20OR%201=1--",
            "-----",
            "%",
            "{id}",
            "*",
            str(HUGE),
            "%0d%0aX:%20y",
        )
        for route in ffdist.ROUTES:
            if "{id}" not in route.path:
                continue
            for given in ids:
                if (route.method, route.path, given) == ("GET", "/jobs/{id}", "next"):
                    continue
                with self.subTest(route=route.path, method=route.method, id=given[:40]):
                    own = {"node_id": self.node.id, "session": self.node.session, "attempt": 1}
                    body = json.dumps(own).encode()
                    raw = request(route.method, route.path.replace("{id}", given),
                                  body if route.method == "POST" else b"")
                    self.refused_raw(raw, 400, 404)

    def test_wrong_methods_are_405(self) -> None:
        for method in ("PUT", "PATCH", "BREW", "get", "M-SEARCH", "CONNECT", "OPTIONS", "TRACE"):
            for route in ffdist.ROUTES:
                with self.subTest(method=method, path=route.path):
                    self.refused_raw(request(method, self.path(route)), 405)
        self.refused_raw(request("DELETE", f"/jobs/{self.running['id']}"), 405)
        self.refused_raw(request("GET", f"/jobs/{self.running['id']}/cancel"), 405)

    def test_wrong_paths_are_404_and_strange_targets_4xx(self) -> None:
        for path in (
            "/x",
            "/jobs/",
            "/nodes//heartbeat",
            "//jobs",
            "/jobs/x/y/z",
            "/%6aobs",
            "/jobs%00",
            "/.",
            "/jobs;x",
            "/results/",
            "/metrics/1",
            "/" + "x/" * 2000,
            "/\xe9\xff",
            "/nodes/register/x",
        ):
            with self.subTest(path=path[:40]):
                raw = request("GET", "@").replace(b"@", path.encode("latin-1"))
                self.refused_raw(raw, 404)
        for target in ("jobs", "*", "?x", "", "x:y", "ftp://x/jobs", "/a b", "/" + "x" * 9000):
            with self.subTest(target=target[:40]):
                self.refused_raw(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    def test_queries_that_say_what_cannot_be_are_refused(self) -> None:
        node = f"node_id={self.idle.id}"
        for path in (
            "/jobs?limit=0",
            "/jobs?limit=-5",
            "/jobs?limit=1e9",
            "/jobs?limit=NaN",
            "/jobs?after=%00",
            f"/jobs?after={HUGE}",
            f"/jobs?limit={HUGE}",
            "/jobs?status=%00",
            "/jobs?scenario=%ED%A0%80",
            "/jobs?scenario=%ff",
            "/jobs?status=x&" + "a=1&" * 60,
            "/results?limit=x",
            "/jobs/next",
            "/jobs/next?node_id=",
            "/jobs/next?node_id=%00",
            f"/jobs/next?{node}&wait=1e400",
            f"/jobs/next?{node}&wait=-0.1",
            f"/jobs/next?{node}&wait={HUGE}",
            f"/jobs/next?{node}&seen=-1",
            f"/jobs/next?{node}&claim={'x' * 200}",
            f"/jobs/next?{node}&leaving=perhaps",
            f"/jobs/next?{node}&session=other",
            f"/jobs/{self.running['id']}/logs?after=-1",
            f"/jobs/{self.running['id']}/logs?wait=nan",
        ):
            with self.subTest(path=path[:60]):
                self.refused_raw(request("GET", path))

    def test_head_answers_as_get_without_a_body_and_changes_nothing(self) -> None:
        for path in ("/health", "/jobs", "/nodes", "/metrics", "/", f"/jobs/{self.running['id']}"):
            raw = self.send(request("HEAD", path, b"", "Connection: close"))
            head, gap, rest = raw.partition(b"\r\n\r\n")
            self.assertEqual((head[:15], gap, rest), (b"HTTP/1.1 200 OK", b"\r\n\r\n", b""), path)
            self.assertIn(b"Content-Length: ", head)
        for path in (
            f"/jobs/next?node_id={self.idle.id}",
            f"/jobs/{self.running['id']}/cancel",
            "/nothing",
        ):
            raw = self.send(request("HEAD", path, b"", "Connection: close"))
            self.assertTrue(raw.endswith(b"\r\n\r\n"), raw)
            self.assertIn(b" " + (b"404" if path == "/nothing" else b"405"), raw[:13], path)


class TestHttp(Fuzz):
    """Bytes that are no request, or half of one, or more than one."""

    def test_bytes_that_are_not_http_are_refused_with_a_sentence(self) -> None:
        for raw in (
            b"hello\r\n\r\n",
            b"\0\0\0\0",
            b"GET\r\n\r\n",
            b"GET /\r\n\r\n",
            b"GET / \r\n\r\n",
            b"\r\r\n\r\n",
            b"GET  / HTTP/1.1\r\n\r\n",
            b"GET / http/1.1\r\n\r\n",
            b" ",
            b"GET / HTTP/11\r\n\r\n",
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"EHLO x\r\n",
            b"\x80\x2e\x01\x03",
            b"{}\n\n",
            b"GET / HTTP/1.1 x\r\n",
        ):
            with self.subTest(raw=raw):
                self.assertIn("HTTP", self.refused_raw(raw, 400))
        hello = bytes.fromhex("16030100c8010000c40303")
        for rest in (
            bytes(range(16, 206)),
            bytes(range(190)),
            b"\r\n\r\n" + bytes(186),
            b"\n" * 190,
        ):
            self.assertIn("TLS", self.refused_raw(hello + rest, 400, close=False))

    def test_other_versions_of_http(self) -> None:
        self.refused_raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505)
        self.refused_raw(request("GET", "/health", version="2.0"), 505)
        self.refused_raw(request("GET", "/health", version="0.9"), 505)
        for raw in (request("GET", "/health", version="1.0"), b"GET /health HTTP/1.0\n\n",
                    request("GET", "http://x:8080/health", version="1.0")):
            found = answers_of(self.send(raw, close=False))
            self.assertEqual([(status, headers["connection"]) for status, headers, _ in found],
                             [(200, "close")])

    def test_lengths_that_contradict_one_another_are_refused(self) -> None:
        for status, headers in (
            (400, ("Content-Length: 2", "Content-Length: 2")),
            (400, ("Content-Length: 2", "content-length: 3")),
            (400, ("Content-Length: 2", "Transfer-Encoding: chunked")),
            (400, ("Transfer-Encoding: chunked", "Content-Length: 2")),
            (411, ("Transfer-Encoding: chunked",)),
            (411, ("Transfer-Encoding: identity",)),
            (400, ("Content-Length: -1",)),
            (400, ("Content-Length: +2",)),
            (400, ("Content-Length:",)),
            (400, ("Content-Length: 0x2",)),
            (400, ("Content-Length: 2, 2",)),
            (400, ("Content-Length: 2.0",)),
            (400, ("Content-Length: " + "9" * 30,)),
            (400, ("Content-Length : 2",)),
            (400, ("Host: y",)),
            (400, (" folded: x",)),
            (400, ("no colon",)),
            (400, (": no name",)),
        ):
            with self.subTest(headers=headers):
                raw = request("POST", "/jobs", b"", *headers) + b"{}"
                self.refused_raw(
                    raw + request("POST", "/jobs", b'{"scenario": "smuggled"}'), status
                )

    def test_heads_that_are_too_large_are_refused_without_waiting_for_their_end(self) -> None:
        many = b"".join(b"h%d: x\r\n" % number for number in range(500))
        self.refused_raw(b"GET /health HTTP/1.1\r\n" + many + b"\r\n", 431)
        self.refused_raw(b"GET /health HTTP/1.1\r\na: " + b"x" * 100_000, 431, close=False)
        self.refused_raw(b"GET /health HTTP/1.1\r\na: " + b"x" * 40_000 + b"\r\n\r\n", 431)
        self.refused_raw(b"GET /health HTTP/1.1\r\n" + many * 20, 431, close=False)
        self.refused_raw(b"G" * 100_000, close=False)
        self.refused_raw(b"GET /" + b"x" * 100_000, close=False)

    def test_a_request_cut_anywhere_is_refused_and_makes_no_job(self) -> None:
        whole = request("POST", "/jobs", b'{"scenario": "cut", "parameters": {"bitrate": "5M"}}')
        self.assertEqual(self.send(b""), b"")
        for end in range(1, len(whole)):
            with self.subTest(end=end):
                self.refused_raw(whole[:end], 400)

    def test_requests_in_one_stream_get_the_same_answers_in_any_pieces(self) -> None:
        bad = request("POST", "/jobs", b'{"scenario": 5}')
        stream = b"".join(
            (
                request("GET", "/health"),
                bad,
                b"\r\n",
                request("GET", f"/jobs/{NOBODY}"),
                request("GET", "/nodes"),
                request("POST", "/results", b"{nonsense"),
                request("BREW", "/jobs"),
                request("GET", "/jobs?limit=0"),
                b"GET /jobs HTTP/1.1\nHost: x\n\n",
                request("GET", "/ready", b"", "X-Other: y"),
                bad,
                request("GET", "/jobs", b"", "Connection: close"),
                request("GET", "/health"),
            )
        )
        whole = self.send(stream, close=False)
        statuses = [status for status, _, _ in answers_of(whole)]
        self.assertEqual(statuses, [200, 400, 404, 200, 400, 405, 400, 200, 200, 400, 200])
        self.assertEqual(self.in_pieces(stream, [1] * len(stream), 0.002), whole)
        for number in range(5):
            source = random.Random(SEED + number)
            sizes = [source.randrange(1, 200) for _ in range(len(stream))]
            self.assertEqual(self.in_pieces(stream, sizes), whole, f"seed {SEED + number}")

    def in_pieces(self, stream: bytes, sizes: list[int], pause_s: float = 0) -> bytes:
        """Send a stream piece by piece; the pause lets the master see each by itself."""
        with socket.create_connection(("127.0.0.1", self.master.port), timeout=30) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for size in sizes:
                connection.sendall(stream[:size])
                stream = stream[size:]
                if not stream:
                    break
                time.sleep(pause_s)
            return all_of(connection)

    def test_garbage_gets_one_well_formed_answer_or_several(self) -> None:
        for number in range(400):
            source = random.Random(SEED + number)
            raw = self.garbage(source)
            by_byte = number % 4 == 0
            with self.subTest(seed=SEED + number, by_byte=by_byte):
                found = answers_of(self.byte_by_byte(raw) if by_byte else self.send(raw))
                self.assertTrue(found, raw)
                for status, headers, body in found:
                    self.assertTrue(status < 500 or status == 505, (status, raw))
                    if headers["content-type"] == "application/json" and body:
                        json.loads(body)

    def byte_by_byte(self, raw: bytes) -> bytes:
        """Send bytes one at a time until they are refused; return what came back."""
        with socket.create_connection(("127.0.0.1", self.master.port), timeout=30) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError):
                for number in range(len(raw)):
                    connection.sendall(raw[number:number + 1])
                connection.shutdown(socket.SHUT_WR)
            return all_of(connection)

    @staticmethod
    def garbage(source: random.Random) -> bytes:
        """Return noise, or a request that cannot be fulfilled with some bytes of it changed."""
        if source.random() < 0.3:
            return b"\1" + bytes(source.randrange(256) for _ in range(source.randrange(400)))
        raw = bytearray(request(source.choice(("GET", "POST", "PUT")),
                                source.choice(("/jobs", "/nodes/register")),
                                b'{"parameters": [[[5]]]}', "X-Y: z"))
        for _ in range(source.randrange(1, 8)):
            at = source.randrange(len(raw))
            kind = source.randrange(3)
            if kind == 0:
                raw[at] = source.randrange(256)
            elif kind == 1:
                del raw[at:at + source.randrange(1, 9)]
            else:
                raw[at:at] = bytes(source.randrange(256) for _ in range(source.randrange(1, 9)))
        return b"X" + bytes(raw) if not raw.strip() else bytes(raw)

    def test_a_head_that_drips_is_given_up_while_others_are_served(self) -> None:
        ends: dict[str, list[tuple[int, dict[str, str], bytes]]] = {}
        starts = {"silent": b"G", "drips": b"GET /health HTTP/1.1\r\nHost: x\r\n"}
        threads = [threading.Thread(target=self._drip, args=(name, start, ends))
                   for name, start in starts.items()]
        for thread in threads:
            thread.start()
        wait_for(lambda: self.master.get("/health") and len(ends) == len(starts), 40)
        for name, found in ends.items():
            self.assertEqual([status for status, _, _ in found], [408], name)

    def _drip(self, name: str, start: bytes, ends: dict[str, Any]) -> None:
        with socket.create_connection(("127.0.0.1", self.master.port), timeout=0.5) as connection:
            connection.sendall(start)
            received = b""
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                try:
                    data = connection.recv(65536)
                    received += data
                    if not data:
                        break
                except (TimeoutError, socket.timeout):
                    if name == "drips":
                        connection.sendall(b"x")
                except OSError:
                    break
        ends[name] = answers_of(received)

    def test_many_broken_connections_at_once_leave_room_for_an_honest_one(self) -> None:
        with contextlib.ExitStack() as stack:
            for number in range(300):
                connection = stack.enter_context(
                    socket.create_connection(("127.0.0.1", self.master.port))
                )
                connection.sendall(request("POST", "/jobs", b'{"scenario": "x"}')[:number % 60])
            self.assertEqual(self.master.get("/health"), {"status": "healthy"})

    def test_an_honest_client_is_served_on_one_connection_between_refusals(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.master.port, timeout=30)
        self.addCleanup(connection.close)
        for method, path, body, status in (
            ("GET", "/health", None, 200),
            ("POST", "/jobs", "{", 400),
            ("GET", "/nothing", None, 404),
            ("PUT", "/jobs", None, 405),
            ("POST", "/jobs", "[]", 400),
            ("GET", "/health", None, 200),
        ):
            connection.request(method, path, body, {"X-Id": uuid.uuid4().hex})
            answer = connection.getresponse()
            answer.read()
            self.assertEqual(answer.status, status)


if __name__ == "__main__":
    unittest.main()
