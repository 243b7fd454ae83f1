"""Transcripts of the wire: what is sent, what comes back, against real masters.

Each class has one master; a test makes its own nodes and jobs. Only the last class looks inside.
"""
from __future__ import annotations

import json
import logging
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import unittest
import uuid
from pathlib import Path
from typing import Any
from unittest import mock

import ffdist
from tests.fleet import NOBODY, PARK_S, Case, Later, Master, Node, parked
from tests.support import Answer, exchange, need, wait_for


class Served(unittest.TestCase):
    """Tests that share one master."""

    flags: tuple[str, ...] = ()
    master: Master

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.mkdtemp(prefix="ffdist-test-")
        cls.addClassCleanup(shutil.rmtree, folder, ignore_errors=True)
        cls.master = Master(Path(folder), *cls.flags)
        cls.addClassCleanup(cls.master.end)

    def setUp(self) -> None:
        self.addCleanup(self._clear)

    def _clear(self) -> None:
        """Leave nothing in the queue for the next test, and see that nothing went wrong inside."""
        for status in ("running", "pending"):
            for job in self.master.get(f"/jobs?status={status}&limit=1000")["jobs"]:
                self.order(job, "cancel")
        self.assertNotIn("Traceback", self.master.words())
        self.assertNotIn("failed on this request", self.master.words())

    def node(self, name: str = "worker", **more: Any) -> Node:
        return Node(self.master, name, **more)

    def running(self, node: Node, **more: Any) -> Any:
        """Submit a job and let a node claim it."""
        body = {"scenario": "720p30-h264", **more}
        submitted = self.master.call("POST", "/jobs", body)
        self.assertEqual(submitted.status, 201, submitted)
        job = node.claim().body["job"]
        self.assertEqual(job["id"], submitted.body["id"], "another job was in the queue")
        return job

    def job(self, job: Any) -> Any:
        return self.master.get(f"/jobs/{job['id']}")

    def status(self, job: Any) -> str:
        return self.job(job)["status"]

    def order(self, job: Any, verb: str) -> Answer:
        return self.master.call("POST", f"/jobs/{job['id']}/{verb}")

    def refused(self, answer: Answer, status: int, field: str | None = None) -> None:
        self.assertEqual((answer.status, answer.body.get("field")), (status, field), answer)
        self.assertIsInstance(answer.body["error"], str)


NODE_OF_SEED = """{
  "address": "worker-01",
  "type": "server",
  "cpu_threads": 16,
  "cpu_model": "Intel(R) Xeon(R) CPU E5-2680 v4",
  "has_gpu": true,
  "gpu_type": "NVIDIA Tesla T4",
  "ram_bytes": 34359738368,
  "labels": {
    "node_type": "server",
    "os": "linux",
    "arch": "amd64"
  }
}"""
JOB_OF_SEED = """{
  "scenario": "4K60-h264",
  "confidence": "auto",
  "parameters": {
    "duration": 300,
    "bitrate": "15000k"
  }
}"""
RESULT_OF_SEED = """{
  "job_id": "%s",
  "node_id": "%s",
  "status": "completed",
  "metrics": {
    "cpu_usage": 75.5,
    "memory_usage": 2048,
    "duration": 5.0
  },
  "analyzer_output": {
    "scenario": "4K60-h264",
    "recommendation": "optimal"
  },
  "completed_at": "2025-12-29T19:45:00Z"
}"""
CURL_OF_SEED = """curl -X POST http://master-ip:8080/jobs \\
     -H "Content-Type: application/json" \\
     -d '{
       "scenario": "4K60-h264",
       "confidence": "auto"
     }'"""
CURL_TEST_OF_SEED = """curl -X POST http://localhost:8080/jobs \\
  -H "Content-Type: application/json" \\
  -d '{
    "scenario": "test-1080p",
    "confidence": "auto"
  }'"""
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"


class TestSeed(Served):
    """The document that this project grew from: its endpoints, its bodies, its curl lines."""

    flags = ("--log-level", "debug")

    def raw(self, method: str, path: str, text: str = "") -> Answer:
        return self.master.call(method, path, raw=text.encode() or None)

    def curl(self, line: str) -> Any:
        need("curl")
        line = line.replace("master-ip:8080", f"127.0.0.1:{self.master.port}")
        line = line.replace("localhost:8080", f"127.0.0.1:{self.master.port}")
        done = subprocess.run(["sh", "-c", line.replace("curl ", "curl -sS --noproxy '*' ", 1)],
                              capture_output=True, text=True, timeout=60)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done)
        return json.loads(done.stdout)

    def test_the_whole_life_of_a_job_with_the_seeds_own_bodies(self) -> None:
        registered = self.raw("POST", "/nodes/register", NODE_OF_SEED)
        self.assertEqual(registered.status, 201, registered)
        node = registered.body
        for name, value in json.loads(NODE_OF_SEED).items():
            self.assertEqual(node[name], value, name)
        self.assertEqual(node["ram_total_bytes"], 34359738368)
        self.assertEqual((node["status"], str(uuid.UUID(node["id"]))), ("available", node["id"]))
        for name in ("last_heartbeat", "registered_at"):
            self.assertRegex(node[name], f"^{TIME}$")
        again = self.raw("POST", "/nodes/register", NODE_OF_SEED)
        self.assertEqual((again.status, again.body["id"]), (200, node["id"]))

        self.assertIn(node["id"], [known["id"] for known in self.master.get("/nodes")["nodes"]])
        beat = self.raw("POST", f"/nodes/{node['id']}/heartbeat")
        self.assertEqual((beat.status, beat.body), (200, {"status": "ok"}))
        self.assertIn("heartbeat of worker-01", self.master.words())
        self.assertEqual(self.raw("GET", f"/jobs/next?node_id={node['id']}").body, {"job": None})

        created = self.raw("POST", "/jobs", JOB_OF_SEED)
        self.assertEqual(created.status, 201, created)
        job = created.body
        self.assertEqual((job["scenario"], job["confidence"], job["parameters"], job["status"]),
                         ("4K60-h264", "auto", {"duration": 300, "bitrate": "15000k"}, "pending"))
        self.assertEqual(str(uuid.UUID(job["id"])), job["id"])
        self.assertRegex(job["created_at"], f"^{TIME}$")
        given = self.raw("GET", f"/jobs/next?node_id={node['id']}")
        self.assertEqual((given.status, given.body["job"]["id"]), (200, job["id"]))
        self.assertEqual(
            (given.body["job"]["status"], given.body["job"]["node_id"]), ("running", node["id"])
        )

        result = RESULT_OF_SEED % (job["id"], node["id"])
        for _ in range(2):
            taken = self.raw("POST", "/results", result)
            self.assertEqual((taken.status, taken.body), (200, {"status": "success"}))
        shown = self.master.get("/jobs")["jobs"][0]
        self.assertEqual((shown["id"], shown["status"], shown["node_id"]),
                         (job["id"], "completed", node["id"]))
        kept = self.master.get(f"/jobs/{job['id']}")["result"]
        for name, value in json.loads(result).items():
            self.assertEqual(kept[name], value, name)
        self.assertRegex(self.master.words(), rf"result of job {job['id']} .*completed.*optimal")
        health = self.raw("GET", "/health")
        self.assertEqual((health.status, health.body), (200, {"status": "healthy"}))

    def test_lists_are_lists_when_they_are_empty(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="ffdist-test-"))
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        fresh = Master(folder)
        self.addCleanup(fresh.end)
        self.assertEqual(
            fresh.get("/nodes"), {"nodes": [], "count": 0, "total": 0, "next": None}
        )
        self.assertEqual(fresh.get("/jobs"), {"jobs": [], "count": 0, "total": 0, "next": None})
        self.assertEqual(
            fresh.get("/results"), {"results": [], "count": 0, "total": 0, "next": None}
        )

    def test_every_curl_line_of_the_document(self) -> None:
        self.assertEqual(self.curl(CURL_OF_SEED)["scenario"], "4K60-h264")
        self.assertEqual(self.curl(CURL_TEST_OF_SEED)["status"], "pending")
        self.assertEqual(
            self.curl("curl http://master-ip:8080/jobs")["jobs"][0]["scenario"], "test-1080p"
        )
        self.assertIsInstance(self.curl("curl http://localhost:8080/nodes")["nodes"], list)
        self.assertEqual(self.curl("curl http://master-ip:8080/health"), {"status": "healthy"})

    def test_the_later_name_of_memory_is_taken_and_both_are_answered(self) -> None:
        node = self.master.register("later", ram_total_bytes=5)
        self.assertEqual((node["ram_bytes"], node["ram_total_bytes"]), (5, 5))
        node = self.master.register("both", ram_bytes=None, ram_total_bytes=6)
        self.assertEqual((node["ram_bytes"], node["ram_total_bytes"]), (6, 6))

    def test_an_unknown_node_gets_404_and_so_registers_again(self) -> None:
        self.refused(self.master.call("POST", f"/nodes/{NOBODY}/heartbeat"), 404, "node_id")
        self.refused(self.master.call("GET", f"/jobs/next?node_id={NOBODY}"), 404, "node_id")
        self.refused(self.master.call("GET", "/jobs/next"), 400, "node_id")

    def test_address_and_scenario_are_required(self) -> None:
        self.refused(
            self.master.call("POST", "/nodes/register", {"type": "server"}), 400, "address"
        )
        self.refused(self.master.call("POST", "/jobs", {"confidence": "auto"}), 400, "scenario")


class TestRoutes(Served):
    """Every row of the table that is the API document."""

    def test_every_row_answers_as_it_says(self) -> None:
        node = self.node()
        done, canceled = self.running(node), self.master.submit()
        path = f"/jobs/{done['id']}"
        own = {"node_id": node.id, "session": node.session, "attempt": 1}
        transcript = {
            ("POST", "/nodes/register"): ({"address": "row"}, 201),
            ("GET", "/nodes"): (None, 200),
            ("GET", "/nodes/{id}"): (None, 200),
            ("POST", "/nodes/{id}/heartbeat"): (own, 200),
            ("POST", "/jobs"): ({"scenario": "x"}, 201),
            ("GET", "/jobs"): (None, 200),
            ("GET", "/jobs/next"): (None, 200),
            ("GET", "/jobs/{id}"): (None, 200),
            ("POST", "/jobs/{id}/progress"): ({**own, "progress": 50}, 200),
            ("GET", "/jobs/{id}/logs"): (None, 200),
            ("POST", "/jobs/{id}/pause"): (None, 200),
            ("POST", "/jobs/{id}/resume"): (None, 200),
            ("POST", "/nodes/{id}/drain"): (None, 200),
            ("POST", "/nodes/{id}/resume"): (None, 200),
            ("POST", "/results"): ({**own, "job_id": done["id"], "status": "failed"}, 200),
            ("GET", "/results"): (None, 200),
            ("POST", "/jobs/{id}/retry"): (None, 200),
            ("POST", "/jobs/{id}/cancel"): (None, 200),
            ("GET", "/health"): (None, 200),
            ("GET", "/ready"): (None, 200),
            ("GET", "/metrics"): (None, 200),
            ("GET", "/"): (None, 200),
            ("DELETE", "/nodes/{id}"): (None, 200),
        }
        routes = {(route.method, route.path) for route in ffdist.ROUTES}
        self.assertLessEqual(routes, set(transcript), "a route without a row here")
        for (method, route), (body, status) in transcript.items():
            if (method, route) not in routes:
                continue
            with self.subTest(method=method, route=route):
                where = route.replace("/jobs/{id}", path).replace(
                    "/nodes/{id}", f"/nodes/{node.id}"
                )
                if route == "/jobs/next":
                    where += f"?node_id={node.id}&session={node.session}"
                answer = self.master.call(method, where, body)
                self.assertEqual(answer.status, status, answer)
                if route == "/jobs/next":
                    self.assertEqual(answer.body["job"]["id"], canceled["id"])

    def test_a_wrong_method_on_a_known_path_is_405_and_an_unknown_path_404(self) -> None:
        for path in {route.path for route in ffdist.ROUTES}:
            known = {route.method for route in ffdist.ROUTES if route.path == path}
            for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"} - known:
                with self.subTest(method=method, path=path):
                    answer = self.master.call(method, path.replace("{id}", NOBODY))
                    self.assertEqual(answer.status, 405, answer)
                    for word in known:
                        self.assertIn(word, answer.body["error"])
        for path in (
            "/nothing",
            "/jobs/",
            f"/jobs/{NOBODY}/explode",
            f"/jobs/{NOBODY}/cancel/now",
            "//",
            "/JOBS",
            f"/nodes/{NOBODY}/drums",
            "/results/1",
            "/jobs/../nodes",
        ):
            with self.subTest(path=path):
                self.assertEqual(self.master.call("GET", path).status, 404)

    def test_the_root_answers_the_table_of_routes_to_a_program(self) -> None:
        listed = self.accepting("application/json")
        self.assertEqual(
            [
                (row["method"], row["path"], row["about"], tuple(row["query"]))
                for row in listed["routes"]
            ],
            [(route.method, route.path, route.about, route.query) for route in ffdist.ROUTES],
        )
        self.assertEqual(listed["version"], ffdist.VERSION)
        listed = self.accepting("text/csv;q=0.5", "Application/JSON; q=0.9, */*")
        self.assertEqual(
            len(listed["routes"]), len(ffdist.ROUTES), "headers of a list are one list"
        )

    def accepting(self, *kinds: str) -> Any:
        """Return what GET / answers to a request with these Accept headers."""
        lines = "".join(f"Accept: {kind}\r\n" for kind in kinds)
        raw = exchange(self.master.port, f"GET / HTTP/1.0\r\n{lines}\r\n".encode())
        return json.loads(raw.partition(b"\r\n\r\n")[2])

    def test_the_root_is_a_page_for_a_browser_which_lists_the_routes_as_well(self) -> None:
        for accept in (
            "text/html,application/xhtml+xml,*/*;q=0.8",
            "*/*",
            "text/html, application/json",
        ):
            raw = exchange(self.master.port, f"GET / HTTP/1.0\r\nAccept: {accept}\r\n\r\n".encode())
            self.assertIn(b"Content-Type: text/html", raw, accept)
            for route in ffdist.ROUTES:
                self.assertIn(f"<td>{route.method}</td><td>{route.path}</td>".encode(), raw)

    def test_an_unknown_path_is_answered_with_the_way_to_the_known_ones(self) -> None:
        answer = self.master.call("GET", "/nope")
        self.refused(answer, 404)
        self.assertEqual(answer.body["error"], "no such path: /nope (GET / lists the API)")

    def test_a_row_bounds_the_query_and_the_body_of_its_route(self) -> None:
        """Query names and the limit of a body are checked for every row, before a body is read."""
        for route in ffdist.ROUTES:
            path = route.path.replace("{id}", NOBODY)
            with self.subTest(method=route.method, path=path):
                over = route.limit_bytes + 1
                head = (f"{route.method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {over}\r\n"
                        "Content-Type: application/json\r\n\r\n")
                self.assertIn(b" 413 ", exchange(self.master.port, head.encode())[:13])
                if route.strict:
                    answer = self.master.call(route.method, f"{path}?nonsense=1")
                    self.refused(answer, 400, "nonsense")
                    self.assertIn("unknown parameter nonsense", answer.body["error"])

    def test_ready_says_that_the_journal_can_be_written(self) -> None:
        self.assertEqual(self.master.get("/ready")["status"], "ready")

    def test_a_node_is_shown_with_its_jobs_and_can_be_removed(self) -> None:
        node = self.node("removed")
        job = self.running(node)
        self.assertEqual((node.shown()["jobs"], node.shown()["status"]), ([job["id"]], "busy"))
        self.assertEqual(self.master.call("DELETE", f"/nodes/{node.id}").status, 200)
        self.assertEqual(self.job(job)["status"], "pending")
        self.assertEqual(self.master.call("GET", f"/nodes/{node.id}").status, 404)
        self.refused(node.beat(), 404, "node_id")
        self.assertEqual(self.master.call("DELETE", f"/nodes/{node.id}").status, 404)

    def test_the_page_escapes_all_that_came_from_outside(self) -> None:
        hostile = '<script>alert("1")</script>'
        node = self.node(hostile, type="<b>type", gpu_type="<i>'gpu'\"")
        node.report(self.running(node), "failed", error="<img src=x onerror=alert(1)>")
        page = self.master.call("GET", "/").text
        for raw in ("<script", "<img", "<b>", "<i>"):
            self.assertNotIn(raw, page)
        self.assertIn("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;", page)
        self.assertIn("&lt;img src=x onerror=alert(1)&gt;", page)
        head = exchange(self.master.port, b"GET / HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")[0]
        self.assertIn(b"X-Content-Type-Options: nosniff", head)
        self.assertIn(b"Content-Security-Policy: default-src 'none'", head)

    def test_promtool_accepts_the_metrics_with_any_name(self) -> None:
        need("promtool")
        self.node('quote " backslash \\ Ünïcode {x="y"}')
        text = self.master.call("GET", "/metrics").text
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
        )
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""), text)

    def test_metrics_hold_no_job_ids_and_count_what_happened(self) -> None:
        before = self.master.call("GET", "/metrics").text
        job = self.master.submit()
        after = self.master.call("GET", "/metrics").text
        self.assertNotIn(job["id"], after)

        def value(text: str, name: str) -> float:
            return float(re.findall(rf"^{re.escape(name)} (\S+)$", text, re.M)[0])
        for name in ("ffdist_submissions_total", 'ffdist_jobs{status="pending"}'):
            self.assertEqual(value(after, name), value(before, name) + 1, name)
        self.assertEqual(value(after, "ffdist_ready"), 1)
        self.assertTrue(all(line.split("{")[0].split(" ")[0].startswith("ffdist_")
                            for line in after.splitlines() if line and not line.startswith("#")))


class TestSessions(Served):
    """Who a node is, and which start of it speaks."""

    def test_two_nodes_on_one_host_are_two_nodes(self) -> None:
        first, second = self.node("host"), self.node("host")
        self.assertNotEqual(first.id, second.id)
        self.assertEqual({first.shown()["name"], second.shown()["name"]}, {"host"})

    def test_a_restarted_agent_is_the_same_node_with_its_new_hardware(self) -> None:
        node = self.node("changing", cpu_threads=4, max_concurrent_jobs=2)
        answer = node.start_again(cpu_threads=8, name="renamed")
        self.assertEqual(
            (answer.status, answer.body["id"], answer.body["cpu_threads"], answer.body["name"]),
            (200, node.id, 8, "renamed"),
        )
        self.assertEqual(node.shown()["cpu_threads"], 8)

    def test_registration_answers_protocol_node_timeout_and_what_is_held(self) -> None:
        answer = self.node().register().body
        self.assertEqual(
            (answer["protocol"], answer["node_timeout_s"], answer["holding"]), (1, 90, [])
        )

    def test_every_request_of_an_older_session_is_refused_and_changes_nothing(self) -> None:
        node = self.node()
        job = self.running(node)
        old = node.session
        node.start_again(holding=[{"job_id": job["id"], "attempt": 1}])
        new, node.session = node.session, old
        waiting = self.master.submit()
        for answer in (node.register(), node.beat(), node.claim(), node.report(job),
                       node.progress(job, progress=99, lines=["x"])):
            self.refused(answer, 409, "session")
        node.session = new
        shown = self.job(job)
        self.assertEqual((shown["status"], shown["progress"]), ("running", None))
        self.assertEqual(self.status(waiting), "pending")
        self.assertEqual(self.master.get(f"/jobs/{job['id']}/logs")["lines"], [])
        self.assertEqual(node.report(job).status, 200)

    def test_a_newer_session_answers_the_parked_request_of_the_older_one(self) -> None:
        node = self.node()
        waiting = node.park()
        node.start_again()
        self.refused(waiting.answer(), 409, "session")

    def test_the_first_registration_of_a_session_judges_what_is_held(self) -> None:
        node = self.node(max_concurrent_jobs=3)
        kept, lost, other = (self.running(node) for _ in range(3))
        answer = node.start_again(holding=[{"job_id": kept["id"], "attempt": 1},
                                           {"job_id": other["id"], "attempt": 2},
                                           {"job_id": NOBODY, "attempt": 1}])
        self.assertEqual(answer.body["holding"], [{"job_id": kept["id"], "attempt": 1}])
        self.assertEqual(
            [self.status(job) for job in (kept, lost, other)], ["running", "pending", "pending"]
        )
        self.assertEqual([self.job(job)["retry_count"] for job in (kept, lost, other)], [0, 1, 1])
        self.assertEqual(node.report(kept).status, 200)
        self.refused(node.report(lost, attempt=5), 409, "attempt")

    def test_a_repeated_registration_of_a_session_judges_nothing(self) -> None:
        node = self.node()
        job = self.running(node)
        self.assertEqual(node.register(holding=[]).status, 200)
        self.assertEqual((self.status(job), self.job(job)["retry_count"]), ("running", 0))
        answer = node.register(holding=[{"job_id": job["id"], "attempt": 1}])
        self.assertEqual(answer.body["holding"], [{"job_id": job["id"], "attempt": 1}])

    def test_what_another_node_holds_is_not_given_to_one_that_names_it(self) -> None:
        owner, thief = self.node(), self.node()
        job = self.running(owner)
        answer = thief.start_again(holding=[{"job_id": job["id"], "attempt": 1}])
        self.assertEqual(answer.body["holding"], [])
        self.assertEqual(self.job(job)["node_id"], owner.id)

    def test_a_registration_that_is_refused_changes_nothing(self) -> None:
        node = self.node("steady", cpu_threads=4)
        job = self.running(node)
        before = node.shown()
        for field, value in (
            ("cpu_threads", -1),
            ("cpu_threads", "8"),
            ("has_gpu", "yes"),
            ("labels", []),
            ("max_concurrent_jobs", 0),
            ("holding", {}),
            ("holding", [5]),
            ("protocol", "x"),
            ("holding", [{"job_id": job["id"]}, {"attempt": 1}]),
            ("address", ""),
        ):
            session, node.session = node.session, "refused-session"
            answer = node.register(**{field: value})
            node.session = session
            self.assertEqual(answer.status, 400, (field, value, answer))
        after = node.shown()
        self.assertEqual({**after, "last_heartbeat": 0}, {**before, "last_heartbeat": 0})


class TestClaims(Served):
    """Asking for work, parked and not."""

    def test_jobs_are_handed_out_first_in_first_out(self) -> None:
        node = self.node(max_concurrent_jobs=5)
        jobs = [self.master.submit()["id"] for _ in range(5)]
        self.assertEqual([node.claim().body["job"]["id"] for _ in range(5)], jobs)
        self.assertIsNone(node.claim().body["job"])

    def test_a_returned_job_keeps_its_place_in_line(self) -> None:
        node = self.node()
        first = self.running(node)
        later = [self.master.submit()["id"] for _ in range(2)]
        self.assertEqual(node.report(first, "returned").status, 200)
        again = [node.claim().body["job"]["id"] for _ in range(3)]
        self.assertEqual(again, [first["id"], *later])

    def test_a_claimed_job_carries_what_the_agent_needs(self) -> None:
        job = self.running(self.node(), parameters={"bitrate": "5M"})
        self.assertEqual((job["attempt"], job["status"]), (1, "running"))
        self.assertEqual((job["settings"]["bitrate"], job["settings"]["width"]), ("5000k", 1280))

    def test_the_same_claim_word_gets_the_same_job_and_null_after_its_attempt(self) -> None:
        node = self.node(max_concurrent_jobs=2)
        first, second = self.master.submit(), self.master.submit()
        for _ in range(3):
            job = node.claim(claim="word-a").body["job"]
            self.assertEqual((job["id"], job["attempt"]), (first["id"], 1))
        self.assertEqual(node.claim(claim="word-b").body["job"]["id"], second["id"])
        node.report(job)
        self.master.submit()
        self.assertIsNone(node.claim(claim="word-a").body["job"])

    def test_a_submission_wakes_a_parked_claim_and_only_one(self) -> None:
        nodes = [self.node() for _ in range(3)]
        waiting = [node.park() for node in nodes]
        job = self.master.submit()
        wait_for(lambda: any(request.answered for request in waiting))
        self.assertEqual(
            waiting[0].answer().body["job"]["id"], job["id"], "the one that waited longest"
        )
        self.assertEqual([request.answered for request in waiting], [True, False, False])
        jobs = [self.master.submit()["id"] for _ in range(2)]
        self.assertEqual({request.answer().body["job"]["id"] for request in waiting[1:]}, set(jobs))

    def test_an_array_wakes_one_node_for_each_job(self) -> None:
        waiting = [self.node().park() for _ in range(3)]
        made = self.master.call("POST", "/jobs", [{"scenario": "x"}] * 3).body["jobs"]
        self.assertEqual({request.answer().body["job"]["id"] for request in waiting},
                         {job["id"] for job in made})

    def test_a_returned_job_wakes_a_parked_claim(self) -> None:
        node, other = self.node(), self.node()
        job = self.running(node)
        waiting = other.park()
        node.report(job, "returned")
        given = waiting.answer().body["job"]
        self.assertEqual((given["id"], given["attempt"]), (job["id"], 2))

    def test_a_newer_request_answers_the_older_one_empty(self) -> None:
        node = self.node()
        older = node.park()
        self.assertEqual(node.claim().body, {"job": None})
        self.assertEqual(older.answer().body, {"job": None})
        older = node.park()
        self.assertEqual(node.beat().body, {"status": "ok"})
        self.assertEqual(older.answer().body, {"job": None})
        older = node.park_beat()
        newer = Later(self.master, "GET", node.claim_path(wait=PARK_S))
        self.assertEqual(older.answer().body, {"status": "ok"})
        job = self.master.submit()
        self.assertEqual(newer.answer().body["job"]["id"], job["id"])

    def test_a_wait_ends_empty_when_nothing_came(self) -> None:
        node = self.node()
        self.assertEqual(node.claim(wait="0.1").body, {"job": None})
        self.assertEqual(node.beat(wait=0.1).body, {"status": "ok"})

    def test_waits_beyond_their_limits_are_refused(self) -> None:
        node = self.node()
        for wait in ("-1", "61", "nan", "inf", "x", ""):
            self.refused(node.claim(wait=wait), 400, "wait")
        for seen in ("-1", "1.5", "x"):
            self.refused(node.claim(seen=seen), 400, "seen")

    def test_a_client_that_died_while_parked_is_not_given_a_job(self) -> None:
        dead, alive = self.node("dead"), self.node("alive")
        connection = socket.create_connection(("127.0.0.1", self.master.port))
        before = parked(self.master)
        connection.sendall(
            f"GET {dead.claim_path(wait=PARK_S)} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        )
        wait_for(lambda: parked(self.master) > before)
        waiting = alive.park()
        connection.close()
        job = self.master.submit()
        given = waiting.answer().body["job"]
        self.assertEqual(
            (given["id"], given["node_id"], given["attempt"]), (job["id"], alive.id, 1)
        )

    def test_a_job_that_only_a_dead_client_waited_for_stays_pending(self) -> None:
        dead = self.node("dead")
        before = parked(self.master)
        with socket.create_connection(("127.0.0.1", self.master.port)) as connection:
            connection.sendall(
                f"GET {dead.claim_path(wait=PARK_S)} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
            )
            wait_for(lambda: parked(self.master) > before)
        job = self.master.submit()
        wait_for(lambda: parked(self.master) == before, why="the dead request is let go")
        self.assertEqual((self.status(job), self.job(job)["attempt"]), ("pending", 0))
        self.assertEqual(self.node().claim().body["job"]["id"], job["id"])

    def test_a_canceled_job_is_not_handed_out(self) -> None:
        first, second = self.master.submit(), self.master.submit()
        self.order(first, "cancel")
        self.assertEqual(self.node().claim().body["job"]["id"], second["id"])


class TestOrders(Served):
    """Cancelling, and how an agent hears of it."""

    def test_a_pending_job_is_canceled_at_once(self) -> None:
        job = self.master.submit()
        answer = self.order(job, "cancel")
        self.assertEqual((answer.status, answer.body["status"]), (200, "canceled"))
        self.assertRegex(self.job(job)["completed_at"], TIME)

    def test_a_running_job_stays_running_until_its_agent_has_reported(self) -> None:
        node = self.node()
        job = self.running(node)
        for _ in range(2):
            answer = self.order(job, "cancel")
            self.assertEqual(
                (answer.status, answer.body["status"], answer.body["cancel_requested"]),
                (200, "running", True),
            )
        self.assertEqual(node.report(job, "canceled").status, 200)
        self.assertEqual((self.status(job), self.job(job)["cancel_requested"]), ("canceled", False))

    def test_a_job_that_was_faster_than_its_cancel_is_completed(self) -> None:
        node = self.node()
        job = self.running(node)
        self.order(job, "cancel")
        node.report(job, "completed")
        self.assertEqual(self.status(job), "completed")

    def test_a_canceled_job_never_goes_back_to_pending(self) -> None:
        node = self.node()
        for status in ("failed", "returned"):
            job = self.running(node)
            self.order(job, "cancel")
            self.assertEqual(node.report(job, status).status, 200)
            self.assertEqual(self.status(job), "canceled", status)
            self.assertEqual(node.report(job, status).status, 200, "a repeat is answered the same")
        job = self.running(node)
        self.order(job, "cancel")
        node.start_again(holding=[])
        self.assertEqual(self.status(job), "canceled")

    def test_a_final_job_cannot_be_canceled(self) -> None:
        node = self.node()
        for status in ("completed", "failed", "canceled"):
            job = self.running(node)
            node.report(job, status)
            self.refused(self.order(job, "cancel"), 409)
            self.assertEqual(self.status(job), status)
        self.assertEqual(self.order({"id": NOBODY}, "cancel").status, 404)

    def test_a_cancel_reaches_a_parked_heartbeat(self) -> None:
        node = self.node()
        job = self.running(node)
        waiting = node.park_beat()
        self.order(job, "cancel")
        answer = waiting.answer().body
        self.assertEqual(
            answer["actions"], [{"job_id": job["id"], "attempt": 1, "action": "cancel"}]
        )
        self.assertEqual((answer["status"], answer["orders"]), ("ok", 1))

    def test_a_cancel_reaches_a_parked_claim(self) -> None:
        node = self.node(max_concurrent_jobs=2)
        job = self.running(node)
        waiting = node.park()
        self.order(job, "cancel")
        answer = waiting.answer().body
        self.assertEqual((answer["job"], answer["actions"][0]["job_id"]), (None, job["id"]))

    def test_an_order_persists_until_obeyed_but_is_answered_early_only_once(self) -> None:
        node = self.node(max_concurrent_jobs=2)
        first, second = self.running(node), self.running(node)
        self.order(first, "cancel")
        seen = node.beat(wait=PARK_S, seen=0).body["orders"]
        for answer in (node.beat(seen=seen).body, node.claim(seen=seen).body):
            self.assertEqual([action["job_id"] for action in answer["actions"]], [first["id"]])
        waiting = node.park_beat(seen=seen)
        self.assertFalse(waiting.answered, "an order that was seen answers nothing early")
        self.order(second, "cancel")
        answer = waiting.answer().body
        self.assertEqual(
            {action["job_id"] for action in answer["actions"]}, {first["id"], second["id"]}
        )
        self.assertGreater(answer["orders"], seen)
        for job in (first, second):
            self.assertEqual(node.progress(job, progress=1).body["actions"][0]["action"], "cancel")
            node.report(job, "canceled")
        self.assertEqual(node.beat().body, {"status": "ok"})

    def test_retry_by_a_person_makes_a_final_job_pending_again(self) -> None:
        node = self.node()
        for attempt, status in enumerate(("failed", "canceled", "completed"), 1):
            job = self.running(node) if attempt == 1 else node.claim().body["job"]
            self.assertEqual(job["attempt"], attempt)
            node.report(job, status, error="broken")
            answer = self.order(job, "retry")
            self.assertEqual((answer.status, answer.body["status"], answer.body["error"]),
                             (200, "pending", None))
            self.refused(self.order(job, "retry"), 409)
        job = node.claim().body["job"]
        self.assertEqual(job["attempt"], 4)
        self.refused(self.order(job, "retry"), 409)
        self.assertEqual([record["status"] for record in self.job(job)["attempts"]],
                         ["failed", "canceled", "completed", "running"])

    def test_a_leaving_node_gets_nothing_more_and_is_offline_when_it_is_empty(self) -> None:
        node = self.node(max_concurrent_jobs=2)
        job = self.running(node)
        waiting = node.park()
        self.assertEqual(node.beat(leaving=True).body, {"status": "ok"})
        self.assertIsNone(waiting.answer().body["job"])
        left = self.master.submit()
        self.assertIsNone(node.claim().body["job"])
        self.assertEqual(node.shown()["status"], "draining")
        node.report(job)
        self.assertEqual((node.shown()["status"], self.status(left)), ("offline", "pending"))
        node.start_again()
        self.assertEqual(node.shown()["status"], "available")
        self.assertEqual(node.claim().body["job"]["id"], left["id"])

    def test_a_leaving_node_with_nothing_to_do_is_offline_at_once(self) -> None:
        node = self.node()
        node.beat(leaving=True)
        self.assertEqual(node.shown()["status"], "offline")


class TestReports(Served):
    """Progress, log lines and results."""

    def test_a_failure_that_may_pass_is_tried_again_elsewhere_and_only_there(self) -> None:
        for node in self.master.get("/nodes")["nodes"]:
            self.master.call("DELETE", f"/nodes/{node['id']}")
        first, second = self.node("first"), self.node("second")
        job = self.running(first)
        self.assertEqual(
            first.report(job, "failed", error="ended", failure_reason="killed").status, 200
        )
        again = self.job(job)
        self.assertEqual((again["status"], again["retry_count"], again["retry_reason"]),
                         ("pending", 1, "killed"))
        self.assertIsNotNone(again["not_before"])
        later = second.park()
        self.assertEqual(later.answer().body["job"]["id"], job["id"])
        taken = {"id": job["id"], "attempt": 2}
        self.assertEqual(second.report(taken, "returned").status, 200)
        self.assertIsNone(first.claim().body["job"], "it failed there, and there is another node")
        self.assertEqual(self.master.call("POST", f"/nodes/{second.id}/drain").status, 200)
        self.assertEqual(first.claim().body["job"]["attempt"], 3, "there is no other node now")
        self.assertEqual(self.master.call("POST", f"/nodes/{second.id}/resume").status, 200)

    def test_a_failure_that_would_come_again_ends_the_job_at_once(self) -> None:
        node = self.node()
        for reason in ("input", "parameters", "encoder", "timeout"):
            job = self.running(node)
            node.report(job, "failed", error="no", failure_reason=reason)
            self.assertEqual(
                (self.status(job), self.job(job)["failure_reason"]), ("failed", reason)
            )

    def test_a_repeated_result_is_answered_the_same_and_counted_once(self) -> None:
        node = self.node()
        job = self.running(node)
        for _ in range(3):
            answer = node.report(job, metrics={"duration": 1.5})
            self.assertEqual((answer.status, answer.body), (200, {"status": "success"}))
        self.assertEqual(self.master.get(f"/results?node_id={node.id}")["total"], 1)

    def test_a_second_result_of_another_kind_is_late(self) -> None:
        node = self.node()
        job = self.running(node)
        node.report(job, "failed", error="first", failure_reason="bad_input")
        self.refused(node.report(job, "completed"), 409, "attempt")
        shown = self.job(job)
        self.assertEqual((shown["status"], shown["error"], shown["failure_reason"]),
                         ("failed", "first", "bad_input"))

    def test_a_report_of_an_attempt_that_is_over_changes_nothing(self) -> None:
        node, other = self.node(), self.node()
        first = self.running(node)
        node.report(first, "returned")
        second = other.claim().body["job"]
        self.assertEqual((second["id"], second["attempt"]), (first["id"], 2))
        self.assertEqual(
            node.report(first, "returned").status, 200, "the repeat of an accepted report"
        )
        self.refused(node.report(first, "completed"), 409, "attempt")
        self.refused(node.progress(first, progress=50), 409, "attempt")
        self.refused(node.report(second, "completed"), 409, "attempt")
        shown = self.job(second)
        self.assertEqual(
            (shown["status"], shown["node_id"], shown["progress"]), ("running", other.id, None)
        )
        self.assertEqual(other.report(second).status, 200)

    def test_unknown_jobs_are_404_and_unknown_statuses_400(self) -> None:
        node = self.node()
        self.refused(node.report({"id": NOBODY, "attempt": 1}), 404, "job_id")
        self.refused(node.progress({"id": NOBODY, "attempt": 1}, progress=1), 404, "job_id")
        job = self.running(node)
        for status in ("running", "pending", "", "done", None, 5, [], {}):
            answer = self.master.call("POST", "/results", {"job_id": job["id"], "node_id": node.id,
                                                           "status": status})
            self.refused(answer, 400, "status")
        self.assertEqual(self.status(job), "running")

    def test_a_returned_job_is_pending_at_once_and_no_retry_is_counted(self) -> None:
        node = self.node()
        job = self.running(node, max_retries=0)
        self.assertEqual(node.report(job, "returned").status, 200)
        shown = self.job(job)
        self.assertEqual(
            (shown["status"], shown["retry_count"], shown["node_id"]), ("pending", 0, None)
        )
        self.assertEqual(self.master.get(f"/results?node_id={node.id}")["total"], 0)

    def test_the_seeds_agents_report_without_session_and_attempt(self) -> None:
        node = self.node("seed", session=False)
        job = self.running(node)
        answer = self.master.call(
            "POST", "/results", json.loads(RESULT_OF_SEED % (job["id"], node.id))
        )
        self.assertEqual((answer.status, self.status(job)), (200, "completed"))
        other = self.node("seed-2", session=False)
        job = self.running(other)
        self.refused(
            self.master.call("POST", "/results", json.loads(RESULT_OF_SEED % (job["id"], node.id))),
            409,
            "attempt",
        )
        self.assertEqual(self.status(job), "running")

    def test_progress_is_shown_and_its_answer_names_the_time_of_the_next(self) -> None:
        node = self.node()
        job = self.running(node)
        answer = node.progress(job, progress={"percent": 40, "fps": 30.5, "phase": "encoding"})
        self.assertEqual((answer.status, answer.body["status"]), (200, "ok"))
        self.assertGreaterEqual(answer.body["next_s"], 1)
        node.progress(job, progress={"percent": 41})
        self.assertEqual(
            self.job(job)["progress"], {"percent": 41, "fps": 30.5, "phase": "encoding"}
        )
        node.report(job)
        self.refused(node.progress(job, progress=99), 409, "attempt")

    def test_log_lines_are_kept_once_however_often_they_are_sent(self) -> None:
        node = self.node()
        job = self.running(node)
        for lines, first in (
            (["a", "b"], 0),
            (["a", "b"], 0),
            (["b", "c"], 1),
            (["d"], 3),
            (["c", "d"], 2),
        ):
            self.assertEqual(node.progress(job, lines=lines, lines_from=first).status, 200)
        node.report(job, lines=["d", "e"], lines_from=3)
        answer = self.master.get(f"/jobs/{job['id']}/logs")
        self.assertEqual((answer["lines"], answer["next"]), (["a", "b", "c", "d", "e"], 5))
        answer = self.master.get(f"/jobs/{job['id']}/logs?after=3")
        self.assertEqual((answer["lines"], answer["next"]), (["d", "e"], 5))
        self.assertEqual(self.master.get(f"/jobs/{job['id']}/logs?after=5")["lines"], [])

    def test_the_lines_of_every_attempt_are_kept_in_order(self) -> None:
        node = self.node()
        job = self.running(node)
        node.progress(job, lines=["one"], lines_from=0)
        node.report(job, "returned")
        job = node.claim().body["job"]
        node.progress(job, lines=["two"], lines_from=0)
        self.assertEqual(self.master.get(f"/jobs/{job['id']}/logs")["lines"], ["one", "two"])

    def test_waiting_for_log_lines_ends_with_a_line_or_with_the_job(self) -> None:
        node = self.node()
        job = self.running(node)
        path = f"/jobs/{job['id']}/logs"
        waiting = Later(self.master, "GET", f"{path}?after=0&wait={PARK_S}")
        node.progress(job, lines=["first"], lines_from=0)
        self.assertEqual(
            waiting.answer().body, {"lines": ["first"], "next": 1, "status": "running"}
        )
        waiting = Later(self.master, "GET", f"{path}?after=1&wait={PARK_S}")
        node.report(job)
        self.assertEqual(waiting.answer().body, {"lines": [], "next": 1, "status": "completed"})
        for query in ("after=-1", "after=x", "wait=-1", "wait=61"):
            self.assertEqual(self.master.call("GET", f"{path}?{query}").status, 400, query)

    def test_a_line_of_the_log_that_is_too_long_is_cut(self) -> None:
        node = self.node()
        job = self.running(node)
        node.progress(job, lines=["x" * 10_000, "\x1b[31m"], lines_from=0)
        lines = self.master.get(f"/jobs/{job['id']}/logs")["lines"]
        self.assertEqual(len(lines[0]), ffdist.LOG_LINE_CHARS)

    def test_results_are_listed_with_who_and_when(self) -> None:
        node = self.node("listed")
        ended = []
        for status in ("completed", "failed", "canceled"):
            job = self.running(node)
            node.report(
                job, status, error=None if status == "completed" else "why", session_is="kept out"
            )
            ended.append(job["id"])
        page = self.master.get(f"/results?node_id={node.id}")
        self.assertEqual([result["job_id"] for result in page["results"]], ended[::-1])
        self.assertEqual([result["status"] for result in page["results"]],
                         ["canceled", "failed", "completed"])
        self.assertEqual((page["count"], page["total"], page["next"]), (3, 3, None))
        self.assertTrue(all(result["node"] == "listed" and re.match(TIME, result["received_at"])
                            and "session" not in result for result in page["results"]))
        self.assertEqual(self.master.get(f"/results?node_id={node.id}&status=failed")["total"], 1)
        self.assertIsNone(self.master.get(f"/jobs/{self.master.submit()['id']}")["result"])


class TestSubmissions(Served):
    """What is accepted, and how it is found again."""

    def test_a_clients_own_id_makes_a_submission_safe_to_repeat(self) -> None:
        body = {"id": str(uuid.uuid4()), "scenario": "720p30-h264"}
        first, second = (self.master.call("POST", "/jobs", body) for _ in range(2))
        self.assertEqual((first.status, second.status), (201, 200))
        self.assertEqual(first.body, second.body)
        node = self.node()
        node.report(node.claim().body["job"])
        third = self.master.call(
            "POST", "/jobs", {**body, "id": body["id"].upper(), "scenario": "other"}
        )
        self.assertEqual((third.status, third.body["status"], third.body["scenario"]),
                         (200, "completed", "720p30-h264"))
        self.assertIsNone(node.claim().body["job"])

    def test_an_array_makes_many_at_once_in_its_order(self) -> None:
        answer = self.master.call(
            "POST", "/jobs", [{"scenario": f"bulk-{number}"} for number in range(20)]
        )
        self.assertEqual((answer.status, answer.body["count"]), (201, 20))
        self.assertEqual(
            [job["scenario"] for job in answer.body["jobs"]], [f"bulk-{n}" for n in range(20)]
        )
        node = self.node()
        self.assertEqual(node.claim().body["job"]["scenario"], "bulk-0")

    def test_an_array_is_accepted_whole_or_not_at_all(self) -> None:
        total = self.master.get("/jobs")["total"]
        bad = {"scenario": "x", "parameters": {"bitrate": "fast"}}
        answer = self.master.call("POST", "/jobs", [{"scenario": "x"}, {"scenario": "x"}, bad])
        self.refused(answer, 400, "parameters.bitrate")
        self.assertIn("2", answer.body["error"])
        own = str(uuid.uuid4())
        self.refused(
            self.master.call("POST", "/jobs", [{"id": own, "scenario": "x"}] * 2), 400, "id"
        )
        self.refused(self.master.call("POST", "/jobs", [{"scenario": "x"}, 5]), 400)
        self.assertEqual(self.master.get("/jobs")["total"], total)

    def test_an_array_with_known_ids_makes_only_the_others(self) -> None:
        first, second = ({"id": str(uuid.uuid4()), "scenario": "x"} for _ in range(2))
        self.assertEqual(self.master.call("POST", "/jobs", [first]).status, 201)
        total = self.master.get("/jobs")["total"]
        self.assertEqual(self.master.call("POST", "/jobs", [first, second]).status, 201)
        self.assertEqual(self.master.call("POST", "/jobs", [first, second]).status, 200)
        self.assertEqual(self.master.get("/jobs")["total"], total + 1)

    def test_an_empty_array_and_one_over_ten_thousand_are_refused(self) -> None:
        total = self.master.get("/jobs")["total"]
        self.refused(self.master.call("POST", "/jobs", []), 400)
        self.refused(self.master.call("POST", "/jobs", [{"scenario": "x"}] * 10_001), 400)
        self.assertEqual(self.master.get("/jobs")["total"], total)

    def test_a_typo_in_parameters_is_refused_with_the_nearest_name(self) -> None:
        answer = self.master.call(
            "POST", "/jobs", {"scenario": "x", "parameters": {"bitrat": "5M"}}
        )
        self.refused(answer, 400, "parameters.bitrat")
        self.assertRegex(answer.body["error"], r"did you mean .*\bbitrate\b")

    def test_pages_walk_through_all_jobs_newest_first_while_others_arrive(self) -> None:
        made = [self.master.submit("paged")["id"] for _ in range(25)]
        found, after = [], ""
        for _ in range(10):
            page = self.master.get(f"/jobs?scenario=paged&limit=10{after}")
            self.assertEqual(page["count"], len(page["jobs"]))
            found += [job["id"] for job in page["jobs"]]
            self.master.submit("paged")
            if page["next"] is None:
                break
            self.assertRegex(page["next"], r"^[A-Za-z0-9._~-]+$")
            after = f"&after={page['next']}"
        self.assertEqual(found, made[::-1])
        self.assertEqual(self.master.get("/jobs?scenario=paged&limit=1")["total"], 25 + 3)

    def test_jobs_are_filtered_by_status_scenario_and_node(self) -> None:
        node = self.node()
        for status in ("completed", "failed"):
            node.report(self.running(node, scenario="filtered"), status)
        pending = self.master.submit("filtered")
        for query, total in (
            (f"node_id={node.id}", 2),
            ("scenario=filtered", 3),
            ("scenario=filtered&status=pending", 1),
            (f"node_id={node.id}&status=failed", 1),
            (f"node_id={NOBODY}", 0),
            ("scenario=nothing", 0),
        ):
            page = self.master.get(f"/jobs?{query}")
            self.assertEqual(
                (page["total"], page["count"], page["next"]), (total, total, None), query
            )
        self.assertEqual(self.master.get("/jobs?scenario=filtered&status=pending")["jobs"][0]["id"],
                         pending["id"])

    def test_a_page_that_cannot_be_is_refused_by_name(self) -> None:
        for query, field in (("limit=0", "limit"), ("limit=1001", "limit"), ("limit=-1", "limit"),
                             ("limit=x", "limit"), ("limit=1.5", "limit"), ("limit=nan", "limit"),
                             ("after=x", "after"), ("after=-1", "after"), ("after=1e400", "after"),
                             ("status=lost", "status"), (f"scenario={'x' * 300}", "scenario")):
            for path in ("/jobs", "/results"):
                self.refused(self.master.call("GET", f"{path}?{query}"), 400, field)

    def test_a_parameter_that_a_list_does_not_have_is_refused_with_those_that_it_has(self) -> None:
        job = self.master.submit()
        for path, name, known in (
            ("/jobs", "state", "status"),
            ("/results", "Status", "node_id"),
            ("/nodes", "status", "limit, after"),
            (f"/jobs/{job['id']}/logs", "afer", "after"),
        ):
            answer = self.master.call("GET", f"{path}?{name}=failed")
            self.refused(answer, 400, name)
            self.assertIn(known, answer.body["error"])

    def test_a_job_is_found_by_a_prefix_of_four_or_more_characters(self) -> None:
        one, two = "abcd1111-0000-4000-8000-000000000001", "abcd2222-0000-4000-8000-000000000002"
        for job_id in (one, two):
            self.assertEqual(
                self.master.call("POST", "/jobs", {"id": job_id, "scenario": "x"}).status, 201
            )
        for given, found in ((one, one), ("abcd1", one), ("ABCD2", two), (two[:20], two)):
            self.assertEqual(self.master.get(f"/jobs/{given}")["id"], found)
        answer = self.master.call("GET", "/jobs/abcd")
        self.refused(answer, 404, "id")
        self.assertIn("ambiguous", answer.body["error"])
        for given in ("abc", "abcd3", "zzzz", "abcd%25", "%00%00%00%00", "abcd1111'--"):
            self.assertEqual(self.master.call("GET", f"/jobs/{given}").status, 404, given)
        self.assertEqual(self.master.call("POST", "/jobs/abcd/cancel").status, 404)
        self.assertEqual(self.master.call("POST", "/jobs/abcd1/cancel").body["id"], one)
        self.assertEqual(self.master.get("/jobs/abcd1")["status"], "canceled")

    def test_a_job_is_shown_with_its_attempts_and_transitions(self) -> None:
        node = self.node()
        job = self.running(node)
        node.report(job, metrics={"duration": 1.5})
        shown = self.job(job)
        self.assertEqual([change["status"] for change in shown["transitions"]],
                         ["pending", "running", "completed"])
        self.assertEqual([(record["attempt"], record["node_id"], record["status"])
                          for record in shown["attempts"]], [(1, node.id, "completed")])
        self.assertEqual(shown["result"]["metrics"], {"duration": 1.5})
        for name in ("created_at", "started_at", "completed_at"):
            self.assertRegex(shown[name], f"^{TIME}$")


class TestSilence(Served):
    """Nodes that fall silent, and come back."""

    flags = ("--node-timeout", "2s")

    def lost(self, nodes: list[Node], **more: Any) -> list[Any]:
        """Let each node claim a job and fall silent; return the jobs when none is running."""
        jobs = [self.running(node, **more) for node in nodes]
        for node, job in zip(nodes, jobs):
            node.progress(job, lines=["before"], lines_from=0, progress=10)
        wait_for(
            lambda: all(self.status(job) != "running" for job in jobs), 30, "the nodes are lost"
        )
        return jobs

    def test_a_lost_nodes_holding_progress_or_result_takes_its_job_back(self) -> None:
        nodes = [self.node(f"back-{number}") for number in range(3)]
        jobs = self.lost(nodes)
        self.assertEqual([(self.status(job), self.job(job)["retry_count"]) for job in jobs],
                         [("pending", 1)] * 3)
        self.assertEqual([node.shown()["status"] for node in nodes], ["offline"] * 3)
        by_holding, by_progress, by_result = zip(nodes, jobs)
        answer = by_holding[0].register(holding=[{"job_id": by_holding[1]["id"], "attempt": 1}])
        self.assertEqual(answer.body["holding"], [{"job_id": by_holding[1]["id"], "attempt": 1}])
        self.assertEqual(
            by_progress[0].progress(by_progress[1], lines=["after"], lines_from=1).status, 200
        )
        self.assertEqual(by_result[0].report(by_result[1]).status, 200)
        self.assertEqual([self.status(job) for job in jobs], ["running", "running", "completed"])
        for job, node in zip(jobs, nodes):
            shown = self.job(job)
            self.assertEqual(
                (shown["retry_count"], shown["attempt"], shown["node_id"]), (0, 1, node.id)
            )
            self.assertEqual(len(shown["attempts"]), 1)
            self.assertRegex(shown["started_at"] or "", TIME)
            self.assertNotEqual(node.shown()["status"], "offline")
        self.assertEqual(
            self.master.get(f"/jobs/{by_progress[1]['id']}/logs")["lines"],
            ["before", "after"],
            "no line that was acknowledged is lost",
        )
        self.assertIsNone(
            self.node("hungry").claim().body["job"], "what was taken back is in no queue"
        )
        for node, job in (by_holding, by_progress):
            self.assertEqual(node.report(job).status, 200)

    def test_what_another_node_has_claimed_meanwhile_is_not_taken_back(self) -> None:
        nodes = [self.node(f"late-{number}") for number in range(3)]
        jobs = self.lost(nodes)
        other = self.node("other", max_concurrent_jobs=3)
        taken = [
            wait_for(lambda: other.claim().body["job"], why="its backoff is over") for _ in jobs
        ]
        self.assertEqual(
            {(job["id"], job["attempt"]) for job in taken}, {(job["id"], 2) for job in jobs}
        )
        answer = nodes[0].start_again(holding=[{"job_id": jobs[0]["id"], "attempt": 1}])
        self.assertEqual((answer.status, answer.body["holding"]), (200, []))
        self.refused(nodes[1].progress(jobs[1], progress=50), 409, "attempt")
        self.refused(nodes[2].report(jobs[2]), 409, "attempt")
        for job in taken:
            self.assertEqual(other.report(job).status, 200)
            shown = self.job(job)
            self.assertEqual((shown["status"], shown["node_id"], shown["retry_count"]),
                             ("completed", other.id, 1))
            self.assertEqual(
                [record["status"] for record in shown["attempts"]], ["lost", "completed"]
            )

    def test_a_lost_node_ends_what_had_no_retries_left_or_was_being_canceled(self) -> None:
        spent, stopped, waiting = self.node("spent"), self.node("stopped"), self.node("waiting")
        exhausted = self.running(spent, max_retries=0)
        canceling, pending = self.running(stopped), self.running(waiting)
        self.order(canceling, "cancel")
        wait_for(
            lambda: all(self.status(job) != "running" for job in (exhausted, canceling, pending)),
            30,
        )
        shown = self.job(exhausted)
        self.assertEqual((shown["status"], shown["failure_reason"]), ("failed", "node_lost"))
        self.assertIn("spent", shown["error"])
        self.assertEqual((self.status(canceling), self.status(pending)), ("canceled", "pending"))
        for node, job in ((spent, exhausted), (stopped, canceling)):
            self.refused(node.report(job), 409, "attempt")
            answer = node.start_again(holding=[{"job_id": job["id"], "attempt": 1}])
            self.assertEqual(answer.body["holding"], [])
        self.order(pending, "cancel")
        self.refused(waiting.report(pending), 409, "attempt")
        self.assertEqual(self.order(exhausted, "retry").body["status"], "pending")

    def test_a_seeds_agent_that_beats_but_never_reports_loses_its_job_after_the_jobs_timeout(
        self,
    ) -> None:
        node = self.node("seed", session=False)
        job = self.running(node, parameters={"timeout": 1})
        wait_for(lambda: node.beat().status == 200 and self.status(job) == "pending", 30)
        shown = self.job(job)
        self.assertEqual((shown["retry_count"], node.shown()["status"]), (1, "available"))
        self.assertIn("timeout", shown["error"])

    def test_a_node_that_asks_or_reports_is_not_silent(self) -> None:
        asks, beats, reports = self.node("asks"), self.node("beats"), self.node("reports")
        job, silent = self.running(reports), self.node("silent")
        beats_on = (asks.claim, beats.beat, lambda: reports.progress(job, progress=1))
        wait_for(lambda: all(say().status == 200 for say in beats_on)
                 and silent.shown()["status"] == "offline", 30)
        self.assertEqual([node.shown()["status"] for node in (asks, beats, reports)],
                         ["available", "available", "busy"])
        self.assertEqual((self.status(job), self.job(job)["retry_count"]), ("running", 0))
        self.assertEqual((silent.beat().status, silent.shown()["status"]), (200, "available"))


class TestWorkOfAnswers(Case):
    """The JSON of an answer, made by a master in this process: when, and how often."""

    def setUp(self) -> None:
        super().setUp()
        self.state = ffdist.Master(self.folder / "m", ffdist.Settings(), logging.Logger("quiet"))
        self.addCleanup(self.state.close)
        self.node = self.state.register({"address": "worker", "max_concurrent_jobs": 9})[1]["id"]
        self.state.submit([ffdist.draft_of({"scenario": "720p30"}, 3) for _ in range(20)])
        ask = ffdist.Ask(self.node, None, 0.0, 0, None, False)
        for _ in range(3):
            job = self.state.claim(ask)["job"]
            self.state.progress(
                job.id, {"node_id": self.node, "attempt": 1, "progress": {"percent": 5}}
            )

    def calls(self, path: str) -> list[str]:
        """Return the calls of json that an answer takes; none of them may come under the lock."""
        me, found = threading.current_thread(), []

        def watched(name: str, work: Any) -> Any:
            def call(*args: Any, **more: Any) -> Any:
                if threading.current_thread() is me:
                    is_locked = self.state._transactions._lock.locked()
                    self.assertFalse(is_locked, f"{name} under the lock for {path}")
                    found.append(name)
                return work(*args, **more)
            return call
        route, part = ffdist.route_of("GET", path)
        request = ffdist.Request(self.state, part, {}, None)
        with mock.patch.object(json, "loads", watched("loads", json.loads)), \
                mock.patch.object(json, "dumps", watched("dumps", json.dumps)):
            self.assertEqual(route.handler(request)[0], 200)
        return found

    def test_no_json_is_made_under_the_lock(self) -> None:
        job = json.loads(self.state.queries.jobs({}, None, 1).rows[0])
        for path in ("/nodes", f"/nodes/{self.node}", "/jobs", f"/jobs/{job['id']}", "/results",
                     "/", "/metrics"):
            self.calls(path)

    def test_a_list_of_jobs_decodes_and_encodes_each_once(self) -> None:
        found = self.calls("/jobs")
        self.assertEqual(found.count("loads"), 20, "the rows of the journal")
        self.assertLessEqual(
            found.count("dumps"), 20 + 3, "their texts, and the fields beside them"
        )

    def test_a_list_of_jobs_is_what_one_job_says(self) -> None:
        route, _ = ffdist.route_of("GET", "/jobs")
        answer = route.handler(ffdist.Request(self.state, "", {}, None))[1]
        listed = json.loads(answer.text)
        self.assertEqual((listed["count"], listed["total"], listed["next"]), (20, 20, None))
        for job in listed["jobs"]:
            shown = self.state.queries.job(job["id"])
            self.assertEqual(job, {name: shown[name] for name in job})
        self.assertEqual([job["progress"] for job in listed["jobs"]][-3:], [{"percent": 5}] * 3)


if __name__ == "__main__":
    unittest.main()
