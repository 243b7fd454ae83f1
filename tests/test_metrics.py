"""What is pushed is there and right: the table of metrics, real VictoriaMetrics and vmalert."""
from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import http.server
import json
import logging
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import agent as wire
import ffdist
from tests.fleet import (
    Case,
    Master,
    Node,
    Program,
    in_background,
    interruptible,
    processes_below,
    run,
)
from tests.support import TOP, call, free_port, listening_log, need, wait_for

RECEIVED = "2026-05-04T10:00:30.250Z"
COMPLETED = "2026-05-04T10:00:29.125Z"
SITE = ffdist.Site("/srv/m", "http://127.0.0.1:8080", "http://127.0.0.1:8428", "127.0.0.1:8880",
                   "127.0.0.1:3000", 1000)
NODES = [("a", "id-a", "busy", 1), ('b "quoted" \\ back', "id-b", "offline", 0)]
SHOT = ffdist.Snapshot({}, NODES, 0, dict.fromkeys(
    ("submitted", "claims", "reports", "heartbeats", "lost_leases", "refused_reports", "push_lines",
     "push_failures", "push_dropped"), 0), 0, 0.0, 0, 0.0, True, 1, 2, 0)
TARIFF = ("--energy-price", "0.3", "--carbon-intensity", "400")
EVERY_FIELD = {metric.field: 10.0 + number / 4 for number, metric in enumerate(ffdist.METRICS)
               if metric.name.startswith("ffdist_job_") and metric.field != "info"}


def expressions() -> Iterator[tuple[str, str]]:
    """Yield (where, expression) of every panel, every variable and every alert, from the files."""
    for path, text in ffdist.monitoring_files(SITE).items():
        if path.startswith("grafana/dashboards/"):
            board = json.loads(text)
            for panel in board["panels"]:
                for target in panel["targets"]:
                    yield f"{board['title']}, {panel['title']}", target["expr"]
            for variable in board["templating"]["list"]:
                yield f"{board['title']}, ${variable['name']}", variable["query"]["query"]
    for rule in ffdist.rules_json(1000)["groups"][0]["rules"]:
        yield rule["alert"], rule["expr"]


def sample_at(text: str, number: int) -> dict[str, Any]:
    """Return a sample as an agent sends it; each is a little different."""
    return {
        "time": text,
        "cpu_usage": 10.5 + number,
        "power_watts": 100 + number,
        "temperature_c": 40,
        "memory_used_bytes": 1 << 30,
    }


def epoch_ms(text: str) -> int:
    return round((ffdist.epoch_of(text) or 0) * 1000)


class Table(unittest.TestCase):
    def test_every_name_in_every_expression_is_in_the_table(self) -> None:
        known, seen = {metric.name for metric in ffdist.METRICS}, set()
        for where, expression in expressions():
            names = set(re.findall(r"\bffdist_\w+", expression))
            self.assertTrue(names, where)
            self.assertEqual(names - known, set(), where)
            seen |= names
        self.assertGreater(len(seen), 40)

    def test_an_expression_cannot_name_what_is_not_there(self) -> None:
        self.assertEqual(
            ffdist.promql("max(@node_up) + @jobs"), "max(ffdist_node_up) + ffdist_jobs"
        )
        with self.assertRaises(KeyError):
            ffdist.promql("max(@node_upp)")

    def test_names_follow_the_habits_of_prometheus(self) -> None:
        names = [metric.name for metric in ffdist.METRICS]
        self.assertEqual(len(names), len(set(names)))
        for metric in ffdist.METRICS:
            self.assertRegex(metric.name, r"\Affdist_[a-z0-9_]+\Z")
            self.assertEqual(metric.kind == "counter", metric.name.endswith("_total"), metric.name)
            self.assertTrue(metric.about.endswith("."), metric.name)
            self.assertNotEqual(metric.samples is None, metric.field == "", metric.name)

    def test_every_figure_of_quality_has_a_metric(self) -> None:
        known = {metric.field for metric in ffdist.METRICS if metric.name.startswith("ffdist_job_")}
        self.assertEqual(set(wire.SCORE_NAMES) - known, set())
        self.assertEqual(
            set(wire.SCORE_NAMES), {figure.name for figure in ffdist.TABLES["Quality"]}
        )

    def test_what_is_pushed_alone_is_not_on_the_page_of_metrics(self) -> None:
        text = ffdist.metrics_view(SHOT).text
        shown = set(re.findall(r"^# TYPE (\w+)", text, re.M))
        self.assertEqual(
            shown, {metric.name for metric in ffdist.METRICS if metric.place != "pushed"}
        )
        self.assertNotIn("job_id", text)
        self.assertIn('ffdist_node_up{node="b \\"quoted\\" \\\\ back",node_id="id-b"} 0', text)

    def test_panels_stand_side_by_side_and_nothing_overlaps(self) -> None:
        for title in ffdist.DASHBOARDS:
            taken: set[tuple[int, int]] = set()
            for panel in ffdist.dashboard_json(title)["panels"]:
                place = panel["gridPos"]
                cells = {(place["x"] + x, place["y"] + y)
                         for x in range(place["w"]) for y in range(place["h"])}
                self.assertLess(max(x for x, _ in cells), 24, title)
                self.assertEqual(cells & taken, set(), panel["title"])
                self.assertEqual(
                    len(panel["targets"]), len({target["refId"] for target in panel["targets"]})
                )
                taken |= cells


class Lines(unittest.TestCase):
    """Import answers 204 whatever it is sent, so each line must be right by itself."""

    RESULT: Mapping[str, Any] = {
        "job_id": "j1",
        "node": 'n "1"\\',
        "node_id": "i1",
        "scenario": "720p",
        "status": "completed",
        "received_at": RECEIVED,
        "completed_at": COMPLETED,
        "encode": {"encoder": "libx264", "preset": 0},
        "metrics": {
            "duration": 2.5,
            "fps": None,
            "speed": True,
            "vmaf": "93",
            "ssim": float("nan"),
            "energy_joules": 10**400,
            "frames": 75,
            "power_source": "model",
            "unknown": {"fps": "no"},
        },
    }
    SPEC: Mapping[str, Any] = {
        "settings": {"codec": "h264"},
        "experiment": {"id": "e1", "name": "presets"},
    }

    def lines(self, **more: Any) -> list[str]:
        return ffdist.result_lines({**self.RESULT, **more}, dict(self.SPEC))

    def test_a_result_has_a_line_for_each_finite_number(self) -> None:
        labels = (
            '{job_id="j1",node="n \\"1\\"\\\\",node_id="i1",scenario="720p",status="completed",'
            'codec="h264",encoder="libx264",preset="0",power_source="model",experiment="presets"}'
        )
        at = epoch_ms(COMPLETED)
        self.assertEqual(at % 1000, 125)
        self.assertEqual(self.lines(), [f"ffdist_job_info{labels} 1 {at}",
                                        f"ffdist_job_duration_seconds{labels} 2.5 {at}",
                                        f"ffdist_job_frames{labels} 75 {at}"])

    def test_an_estimate_is_marked_in_the_log(self) -> None:
        for estimated, word in ((True, "~12 J"), (False, " 12 J")):
            metrics = {"energy_joules": 12.0, "energy_estimated": estimated}
            self.assertIn(word, ffdist.summary_of("completed", {"metrics": metrics}))

    def test_a_clock_that_is_off_gives_way_to_the_masters(self) -> None:
        for word, want in (
            ("2026-05-04T10:00:31.000Z", RECEIVED),
            ("2026-05-01T10:00:00Z", RECEIVED),
            ("yesterday", RECEIVED),
            (None, RECEIVED),
            (7, RECEIVED),
            (COMPLETED, COMPLETED),
            ("2026-05-03T11:00:00Z", "2026-05-03T11:00:00Z"),
        ):
            with self.subTest(word):
                self.assertEqual({line.split()[-1] for line in self.lines(completed_at=word)},
                                 {str(epoch_ms(want))})

    def test_bad_shapes_cost_nothing_but_their_labels(self) -> None:
        for more in ({"encode": "x"}, {"encode": None}, {"metrics": None}, {"node": None}):
            self.assertTrue(self.lines(**more))
        plain = ffdist.result_lines(dict(self.RESULT), {"experiment": "plain"})
        self.assertIn('experiment="plain"', plain[0])

    def test_samples_have_their_own_times(self) -> None:
        samples = [
            {
                "time": COMPLETED,
                "cpu_usage": 50.5,
                "power_watts": None,
                "memory_used_bytes": 1 << 40,
            },
            {"time": COMPLETED, "power_watts": 9, "power_source": "model"},
            {"time": RECEIVED, "temperature_c": -3},
            {"time": "never", "cpu_usage": 1},
            "x",
            {},
        ]
        labels = '{node="n",node_id="i",job_id="j"}'
        self.assertEqual(
            ffdist.sample_lines(ffdist.Sampled("n", "i", "j", samples)),
            [
                f"ffdist_sample_cpu_usage_percent{labels} 50.5 {epoch_ms(COMPLETED)}",
                f"ffdist_sample_memory_bytes{labels} {1 << 40} {epoch_ms(COMPLETED)}",
                f'ffdist_sample_power_watts{labels[:-1]},power_source="model"}} 9 '
                f"{epoch_ms(COMPLETED)}",
                f"ffdist_sample_temperature_celsius{labels} -3 {epoch_ms(RECEIVED)}",
            ],
        )

    def test_only_nodes_that_changed_have_lines(self) -> None:
        self.assertEqual(len(ffdist.node_lines(SHOT, 5.0, {})), 8)
        lines = ffdist.node_lines(SHOT, 5.0, {"id-a": NODES[0]})
        self.assertEqual([line.split()[-2:] for line in lines],
                         [["0", "5000"], ["0", "5000"], ["4", "5000"], ["0", "5000"]])
        self.assertEqual(ffdist.node_lines(SHOT, 5.0, {node[1]: node for node in NODES}), [])


class Store:
    """A stand-in of VictoriaMetrics that misbehaves: answers `status`, keeps what it was sent."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.status = 204
        self.bodies: list[str] = []
        self.asked: list[str] = []
        self.heads: list[tuple[str, str | None]] = []
        store = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                store.asked.append(self.path)
                self.send_error(404)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                store.heads.append((self.path, self.headers["Authorization"]))
                if store.status == 204:
                    store.bodies.append(body)
                self.send_response(store.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.place = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def lines(self) -> list[str]:
        return "".join(self.bodies).splitlines()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Pushing(unittest.TestCase):
    """The pusher alone, its step called by hand, beside a master in this process."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ffdist-test-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.log, self.said = listening_log()
        self.store = Store()
        self.addCleanup(self.store.close)
        self.open()
        self.addCleanup(lambda: self.master.close())
        self.node = self.master.register({"address": "w", "session": "s", "protocol": 1})[1]

    def open(self, **more: Any) -> None:
        quiet = logging.getLogger("ffdist.quiet")
        quiet.setLevel(100)
        self.master = ffdist.Master(self.folder, ffdist.Settings(), quiet)
        self.pusher = self.made(**more)

    def made(self, **more: Any) -> ffdist.Pusher:
        return ffdist.Pusher(
            f"http://{self.store.place}", self.folder / "pushed", self.master, self.log, **more
        )

    def again(self) -> None:
        """Restart the master: memory is gone, the folder stays."""
        self.master.close()
        self.open()

    def job(self, samples: int = 0, last: Sequence[Any] = (), **metrics: Any) -> str:
        """Let a job run on the node, with some samples, the last with its result."""
        self.master.submit([ffdist.draft_of({"scenario": "720p30"}, 3)])
        ask = ffdist.Ask(self.node["id"], "s", 0, 0, uuid.uuid4().hex, False)
        job = self.master.claim(ask)["job"]
        told = {"node_id": self.node["id"], "session": "s", "attempt": job.attempt}
        self.master.progress(
            job.id,
            {
                **told,
                "samples": [
                    {"time": f"2026-05-04T10:00:{number:02d}Z", "cpu_usage": number}
                    for number in range(samples)
                ],
            },
        )
        self.master.report({**told, "job_id": job.id, "status": "completed", "metrics": metrics,
                            "samples": last})
        return str(job.id)

    def count(self, name: str) -> int:
        return self.master.queries.snapshot().counts[f"push_{name}"]

    def test_results_samples_and_nodes_are_pushed_once(self) -> None:
        first = self.job(samples=2, duration=1.5)
        self.pusher.step(1000.0)
        lines = self.store.lines()
        names = [re.split(r"[ {]", line)[0] for line in lines]
        self.assertEqual(
            names,
            ["ffdist_sample_cpu_usage_percent"] * 2
            + [
                "ffdist_node_up",
                "ffdist_node_running_jobs",
                "ffdist_node_status",
                "ffdist_node_quarantined",
                "ffdist_job_info",
                "ffdist_job_duration_seconds",
            ],
        )
        self.assertEqual(sum(first in line for line in lines), 4)
        self.assertEqual(self.count("lines"), len(lines))
        self.pusher.step(1005.0)
        self.assertEqual(self.store.lines(), lines)
        self.pusher.step(1031.0)
        self.assertEqual(len(self.store.lines()), len(lines) + 4)
        self.assertEqual((self.said, self.store.asked), ([], ["/internal/force_flush"]))

    def test_the_last_samples_come_with_the_result_and_are_not_kept_in_it(self) -> None:
        job = self.job(last=[{"time": "2026-05-04T10:00:59Z", "cpu_usage": 9}])
        self.pusher.step(1000.0)
        self.assertEqual(
            sum("sample_cpu" in line and job in line for line in self.store.lines()), 1
        )
        self.assertNotIn("samples", self.master.queries.job(job)["result"])

    def test_an_outage_is_logged_once_and_loses_nothing(self) -> None:
        self.store.status = 503
        first = self.job(samples=1)
        self.pusher.step(1000.0)
        second = self.job(samples=1)
        self.pusher.step(1005.0)
        self.assertEqual((self.count("failures"), self.count("lines"), len(self.said)), (2, 0, 1))
        self.assertIn("503", self.said[0])
        self.store.status = 204
        self.pusher.step(1010.0)
        text = "".join(self.store.bodies)
        order = [
            text.index(f'cpu_usage_percent{{node="w",node_id="{self.node["id"]}",job_id="{job}"')
            for job in (first, second)
        ]
        self.assertEqual(order, sorted(order))
        self.assertEqual(
            [text.count(f'ffdist_job_info{{job_id="{job}"') for job in (first, second)], [1, 1]
        )
        states = [line for line in self.store.lines() if line.startswith("ffdist_node_up")]
        self.assertEqual(
            [line.split()[-1] for line in states], ["1010000"], "states of now, none of then"
        )
        self.assertEqual((self.count("dropped"), len(self.said)), (0, 2))

    def test_samples_of_a_long_outage_are_dropped_and_counted_and_results_are_not(self) -> None:
        self.store.status = 500
        self.pusher = self.made(limit_bytes=1000)
        jobs = []
        for number in range(6):
            jobs.append(self.job(samples=3))
            self.pusher.step(1001.0 + number)
        self.assertEqual(
            len(self.said), 2, "a line when the outage begins, one when it costs values"
        )
        self.assertIn("from now on the oldest samples are dropped", self.said[1])
        dropped = self.count("dropped")
        self.store.status = 204
        self.pusher.step(1010.0)
        text = "".join(self.store.bodies)
        samples = [line for line in text.splitlines() if line.startswith("ffdist_sample")]
        self.assertLessEqual(sum(len(line) + 1 for line in samples), 1000)
        self.assertEqual((dropped + len(samples), self.count("dropped")), (6 * 3, dropped))
        self.assertGreater(dropped, 0)
        self.assertIn(jobs[-1], "".join(samples), "the newest are kept")
        self.assertNotIn(jobs[0], "".join(samples))
        self.assertEqual([job for job in jobs if f'ffdist_job_info{{job_id="{job}"' in text], jobs)
        self.assertIn(f"{dropped} values of samples were dropped", "".join(self.said))
        self.pusher.step(1015.0)
        self.assertEqual(len(self.said), 4, "and two when it has ended")

    def test_a_restart_goes_on_with_the_results_that_were_not_taken(self) -> None:
        done = self.job(samples=1)
        self.pusher.step(1000.0)
        self.store.status = 500
        waiting = self.job(samples=1)
        self.pusher.step(1005.0)
        last = self.job(samples=1)
        self.store.bodies.clear()
        self.store.status = 204
        self.again()
        self.pusher.step(1010.0)
        text = "".join(self.store.bodies)
        self.assertNotIn(done, text)
        self.assertEqual(
            [text.count(f'ffdist_job_info{{job_id="{job}"') for job in (waiting, last)], [1, 1]
        )

    def test_a_stop_pushes_the_last_seconds_unless_it_would_wait(self) -> None:
        self.pusher.step(1000.0)
        last = self.job(samples=1)
        self.pusher.stop()
        self.pusher.finish(1002.0)
        self.assertIn(f'job_id="{last}"', "".join(self.store.bodies))
        self.store.status = 500
        self.pusher.step(1003.0)
        failures = self.count("failures")
        self.pusher.finish(1004.0)
        self.assertEqual(self.count("failures"), failures)

    def test_counters_change_only_under_the_masters_lock(self) -> None:
        """An addition beside one of the Master's would lose one of both."""
        master = self.master

        class Guarded(dict[str, int]):
            def __setitem__(self, name: str, value: int) -> None:
                assert master._transactions._lock.locked(), f"{name} changed without the lock"
                super().__setitem__(name, value)
        transactions = master._transactions
        transactions.counts = transactions._fleet.state.counts = Guarded(transactions.counts)
        self.job(samples=1)
        self.pusher.step(1000.0)
        for status in (400, 500):
            self.store.status = status
            self.job(samples=1)
            self.pusher.step(1005.0)
        self.assertEqual((self.count("failures") > 0, self.count("dropped") > 0), (True, True))

    def test_lines_that_can_never_be_taken_are_given_up(self) -> None:
        self.store.status = 400
        self.job(samples=2)
        self.pusher.step(1000.0)
        self.assertEqual(self.count("dropped"), 2 + 4 + 1)

    def test_nobody_waits_for_a_pusher_that_does_not_keep_up(self) -> None:
        assert self.master.samples is not None
        self.master.samples.maxsize = 2
        jobs = [self.job(samples=3) for _ in range(4)]
        self.assertEqual(self.count("dropped"), 6)
        self.pusher.step(1000.0)
        lines = [line for line in self.store.lines() if line.startswith("ffdist_sample")]
        self.assertEqual({job for job in jobs if any(job in line for line in lines)}, set(jobs[2:]))

    def test_a_cursor_that_cannot_be_written_costs_no_values(self) -> None:
        (self.folder / "pushed").unlink()
        (self.folder / "pushed").mkdir()
        job = self.job(samples=1)
        self.pusher.step(1000.0)
        self.assertEqual((self.count("dropped"), self.count("failures")), (0, 1))
        self.pusher.step(1005.0)
        self.assertEqual("".join(self.store.bodies).count(f'ffdist_job_info{{job_id="{job}"'), 1)

    def test_the_newest_results_are_pushed_when_it_is_switched_on(self) -> None:
        jobs = [self.job() for _ in range(5)]
        (self.folder / "pushed").unlink()
        most, ffdist.MAX_BACKFILL = ffdist.MAX_BACKFILL, 3
        self.addCleanup(setattr, ffdist, "MAX_BACKFILL", most)
        self.made().step(1000.0)
        self.assertEqual([job for job in jobs if job in "".join(self.store.bodies)], jobs[2:])


class Addresses(unittest.TestCase):
    def test_what_an_address_may_be(self) -> None:
        for text in ("http://a:8428", "https://u:p@a/vm/", "http://[::1]:1/x"):
            self.assertEqual(wire.web_address(text), text.rstrip("/"))
        for text in (
            "a:8428",
            "ftp://a",
            "http://",
            "http://a:99999",
            "http://a?x=1",
            "http://a b",
        ):
            with self.assertRaises(argparse.ArgumentTypeError, msg=text):
                wire.web_address(text)

    def test_a_path_and_a_password_are_sent_and_stand_in_no_message(self) -> None:
        store = Store()
        self.addCleanup(store.close)
        url = f"http://me:p%40ss@{store.place}/vm/api"
        wire.exchange_text(url, b"x 1\n")
        word = base64.b64encode(b"me:p@ss").decode()
        self.assertEqual(store.heads, [("/vm/api", f"Basic {word}")])
        store.status = 401
        with self.assertRaises(wire.ApiError) as caught:
            wire.exchange_text(url, b"x 1\n")
        self.assertEqual(caught.exception.status, 401)
        self.assertNotIn("ss@", caught.exception.message)

    def test_https_is_checked(self) -> None:
        need("openssl")
        folder = Path(tempfile.mkdtemp(prefix="ffdist-test-"))
        self.addCleanup(shutil.rmtree, folder)
        made = folder / "both.pem"
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=127.0.0.1",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
                "-keyout",
                str(made),
                "-out",
                str(folder / "cert.pem"),
            ],
            check=True,
            capture_output=True,
        )
        made.write_text(made.read_text() + (folder / "cert.pem").read_text())
        store = Store(made)
        self.addCleanup(store.close)
        self.addCleanup(wire._plain_opener.cache_clear)
        wire._plain_opener.cache_clear()
        with self.assertRaisesRegex(wire.ApiError, "(?i)certificate"):
            wire.exchange_text(f"https://{store.place}/x", b"x 1\n", 5)
        wire._plain_opener.cache_clear()
        with unittest.mock.patch.dict(os.environ, {"SSL_CERT_FILE": str(folder / "cert.pem")}):
            wire.exchange_text(f"https://{store.place}/x", b"x 1\n", 5)
        self.assertEqual(store.lines(), ["x 1"])


class Victoria(Program):
    """A real victoria-metrics; queries are made on it by hand."""

    def __init__(self, folder: Path, port: int, *flags: str) -> None:
        super().__init__(["victoria-metrics", f"-httpListenAddr=127.0.0.1:{port}",
                          f"-storageDataPath={folder}/victoria", "-dedup.minScrapeInterval=1ms",
                          "-search.latencyOffset=1ms", *flags], folder, "victoria")
        self.url = f"http://127.0.0.1:{port}"
        wait_for(
            lambda: ffdist.answers(f"{self.url}/health"), why=f"VictoriaMetrics: {self.words()}"
        )

    def query(self, expression: str, at: float | None = None) -> list[Any]:
        """Return the vector of an expression at a moment (now); new series are seen at once."""
        call(self.url, "GET", "/internal/force_flush")
        told = urllib.parse.urlencode(
            {"query": expression, "time": time.time() if at is None else at, "nocache": 1}
        )
        answer = call(self.url, "GET", f"/api/v1/query?{told}")
        assert answer.status == 200, f"{expression}: {answer}"
        return answer.body["data"]["result"]

    def stored(self, match: str) -> dict[str, tuple[dict[str, str], dict[int, float]]]:
        """Return by name the labels and the raw values by time of the series that match."""
        told = urllib.parse.urlencode({"match[]": match})
        call(self.url, "GET", "/internal/force_flush")
        series = map(json.loads, call(self.url, "GET", f"/api/v1/export?{told}").text.splitlines())
        return {
            one["metric"].pop("__name__"): (
                one["metric"],
                dict(zip(one["timestamps"], one["values"])),
            )
            for one in series
        }


def metric(master: Master, name: str) -> float:
    """Return one of the master's counters from /metrics."""
    text = master.call("GET", "/metrics").text
    return float(re.findall(rf"^{name} (\S+)$", text, re.M)[0])


class Real(Case):
    def setUp(self) -> None:
        need("victoria-metrics")
        super().setUp()

    def victoria(self, port: int, *flags: str) -> Victoria:
        victoria = Victoria(self.folder, port, *flags)
        self.addCleanup(victoria.end)
        return victoria

    def test_an_outage_loses_nothing_and_a_kill_in_it_no_result(self) -> None:
        port = free_port()
        flags = ("--victoriametrics", f"http://127.0.0.1:{port}", *TARIFF)
        master = self.master(*flags)
        node = Node(master, 'w "1" \\ ü')
        job = master.submit("720p30-h264", codec="h264")
        claimed = node.claim().body["job"]
        now = time.time()
        times = [wire.utc_text(now - 20 + number) or "" for number in range(3)]
        node.progress(claimed, samples=[sample_at(text, at) for at, text in enumerate(times)])
        completed = wire.utc_text(now - 5) or ""
        answer = node.report(claimed, metrics=EVERY_FIELD, completed_at=completed,
                             encode={"encoder": "libx264", "preset": "fast"})
        self.assertEqual(answer.status, 200)
        kept = master.get("/results")["results"][0]["metrics"]
        wait_for(lambda: metric(master, "ffdist_push_failures_total"), why="the outage is noticed")
        victoria = self.victoria(port)
        vmaf = f'ffdist_job_vmaf{{job_id="{job["id"]}"}}'
        wait_for(lambda: victoria.query(vmaf, now), why=victoria.words())
        count = len(EVERY_FIELD) + 1 + 4
        wait_for(lambda: len(victoria.stored(f'{{job_id="{job["id"]}"}}')) == count)
        found = victoria.stored(f'{{job_id="{job["id"]}"}}')
        results = {name: values for name, values in found.items() if name.startswith("ffdist_job_")}
        labels = {
            "job_id": job["id"],
            "node": node.name,
            "node_id": node.id,
            "scenario": "720p30-h264",
            "status": "completed",
            "codec": "h264",
            "encoder": "libx264",
            "preset": "fast",
        }
        self.assertEqual(results, {
            metric.name: (labels, {epoch_ms(completed): {**kept, "info": 1}[metric.field]})
            for metric in ffdist.METRICS if metric.name.startswith("ffdist_job_")})
        self.assertEqual(found["ffdist_sample_power_watts"], (
            {"node": node.name, "node_id": node.id, "job_id": job["id"]},
            {epoch_ms(text): 100 + number for number, text in enumerate(times)}))
        match = f'{{__name__="ffdist_node_up",node_id="{node.id}"}}'
        up = wait_for(lambda: victoria.stored(match), why="the node's state")["ffdist_node_up"][1]
        self.assertEqual(set(up.values()), {1})

        victoria.end()
        taken = metric(master, "ffdist_push_failures_total")
        master.submit("720p30-h264", codec="h264")
        late = node.claim().body["job"]
        self.assertEqual(node.report(late, metrics=EVERY_FIELD).status, 200)
        wait_for(
            lambda: metric(master, "ffdist_push_failures_total") > taken, why="the second outage"
        )
        master.kill()
        cursor = self.folder / "master" / "pushed"
        self.assertEqual(oct(cursor.stat().st_mode)[-3:], "600")
        victoria = self.victoria(port)
        self.master(*flags, port=master.port)
        wait_for(
            lambda: victoria.query(f'ffdist_job_vmaf{{job_id="{late["id"]}"}}'),
            why=victoria.words(),
        )

    def test_a_value_that_is_pushed_twice_counts_once(self) -> None:
        victoria = self.victoria(free_port())
        at = round(time.time() * 1000) - 1000
        for _ in range(2):
            wire.exchange_text(f"{victoria.url}/api/v1/import/prometheus",
                               f'ffdist_job_info{{job_id="x"}} 1 {at}\n'.encode())
        wait_for(lambda: victoria.query("ffdist_job_info"))
        self.assertEqual(
            victoria.query("sum(count_over_time(ffdist_job_info[1m]))")[0]["value"][1], "1"
        )


class Fleet(Case):
    """Every panel has data and alerts fire, on a fleet whose results came by the API."""

    def setUp(self) -> None:
        need("victoria-metrics", "vmalert")
        super().setUp()
        port, store = free_port(), free_port()
        rules = ffdist.rules_json(1000)
        rules["groups"][0]["interval"] = "1s"
        for rule in rules["groups"][0]["rules"]:
            rule["for"] = "0s"  # how long each lasts is promtool's part, below
        files = ffdist.monitoring_files(SITE._replace(master=f"http://127.0.0.1:{port}"))
        scrape = files["scrape.yml"].replace('"15s"', '"1s"')
        for name, text in (("scrape.yml", scrape), ("alerts.yml", json.dumps(rules)),
                           ("notifier.yml", files["notifier.yml"])):
            (self.folder / name).write_text(text)
        self.victoria = Victoria(self.folder, store, f"-promscrape.config={self.folder}/scrape.yml")
        self.addCleanup(self.victoria.end)
        alerts = free_port()
        self.alerts = f"http://127.0.0.1:{alerts}"
        vmalert = Program(
            [
                "vmalert",
                f"-rule={self.folder}/alerts.yml",
                f"-datasource.url={self.victoria.url}",
                f"-httpListenAddr=127.0.0.1:{alerts}",
                f"-notifier.config={self.folder}/notifier.yml",
            ],
            self.folder,
            "vmalert",
        )
        self.addCleanup(vmalert.end)
        self.fed = self.master(
            "--victoriametrics",
            self.victoria.url,
            *TARIFF,
            "--node-timeout",
            "2s",
            "--quarantine-after",
            "6",
            port=port,
        )

    def feed(self) -> None:
        """Let nodes do their work: good results, one that fails all, one that falls silent."""
        now = time.time()
        for number, name in enumerate(("fast", "slow", "sick")):
            node = Node(self.fed, name)
            for turn in range(6):
                self.fed.submit("720p30-h264" if turn % 2 else "1080p30-av1")
                job = node.claim().body["job"]
                node.progress(
                    job,
                    samples=[
                        {
                            "time": wire.utc_text(now - 30 + second),
                            "cpu_usage": 50 + second,
                            "temperature_c": 60,
                            "power_watts": 90 + 1000 * number,
                            "memory_used_bytes": 1 << 30,
                        }
                        for second in range(30)
                    ],
                )
                status = "failed" if name == "sick" else "completed"
                answer = node.report(
                    job,
                    status,
                    metrics=EVERY_FIELD,
                    completed_at=wire.utc_text(now - turn),
                    encode={"encoder": f"lib{turn % 2}", "preset": "fast"},
                    error="why",
                    failure_reason="encoder",
                )
                self.assertEqual(answer.status, 200)

    def firing(self) -> set[str]:
        answer = call(self.alerts, "GET", "/api/v1/alerts")
        return {
            alert["name"]
            for alert in answer.body["data"]["alerts"] or ()
            if alert["state"] == "firing"
        }

    def test_every_expression_returns_data_and_alerts_fire(self) -> None:
        wait_for(lambda: self.victoria.query("ffdist_ready"), why="the first scrape")
        self.feed()
        self.fed.call("POST", "/jobs", [{"scenario": "720p30"}] * 150)
        real = {
            "FfdistNodeOffline",
            "FfdistQueueGrowing",
            "FfdistFailuresInARow",
            "FfdistPowerOverLimit",
        }
        wait_for(lambda: self.firing() >= real, why=f"alerts that fire: {self.firing()}")
        panels = {where: text for where, text in expressions() if not where.startswith("Ffdist")}
        self.assertGreater(len(panels), 50)
        for where, expression in panels.items():
            text = (expression.replace("$__range", "1h").replace("$__interval", "2m")
                    .replace("$node", "slow" if "One node" in where else ".*"))
            with self.subTest(where):
                if text.startswith("label_values("):
                    name, label = text[len("label_values("):-1].split(", ")
                    text = f"count by ({label}) ({name})"
                found = wait_for(functools.partial(self.victoria.query, text), 15, text)
                self.assertTrue(all(one["value"][1] not in ("NaN", "+Inf") for one in found), found)
        self.fed.end()
        wait_for(lambda: "FfdistMasterAway" in self.firing(), why="the master's silence")
        self.made_up()

    def made_up(self) -> None:
        """Check the alerts whose cause cannot be had here, on values that a master would send."""
        url = f"{self.victoria.url}/api/v1/import/prometheus"
        now = round(time.time() * 1000)
        wire.exchange_text(
            url,
            (
                f"ffdist_ready 0 {now}\n"
                f"ffdist_disk_free_bytes 5 {now}\nffdist_disk_size_bytes 500 {now}\n"
                f"ffdist_push_dropped_total 0 {now - 5000}\nffdist_push_dropped_total 9 {now}\n"
                f'ffdist_node_quarantined{{node="x",node_id="y"}} 1 {now}\n'
            ).encode(),
        )
        rest = {"FfdistMasterCannotWrite", "FfdistMasterDiskFilling", "FfdistNodeQuarantined",
                "FfdistPushDropping"}
        wait_for(lambda: self.firing() >= rest, why=f"alerts that fire: {self.firing()}")
        names = {rule["alert"] for rule in ffdist.rules_json(1)["groups"][0]["rules"]}
        self.assertLessEqual(rest | self.firing(), names)


NODE = {"node": "a", "node_id": "1"}
_OF_A = '{node="a",node_id="1"}'
# Of each alert: series every 15 s, when it is still quiet, when it fires, its labels, its $value.
CASES: tuple[tuple[str, dict[str, str], str, str, dict[str, str], str], ...] = (
    ("NodeOffline", {f"ffdist_node_up{_OF_A}": "1x3 0x40"}, "1m45s", "2m15s", NODE, ""),
    (
        "NodeQuarantined",
        {f"ffdist_node_quarantined{_OF_A}": "0x3 1x40"},
        "1m45s",
        "2m15s",
        NODE,
        "",
    ),
    ("QueueGrowing", {'ffdist_jobs{status="pending"}': "0+10x200"}, "15m", "20m", {}, "800"),
    (
        "FailuresInARow",
        {'ffdist_job_info{node="a",node_id="1",status="failed"}': "1x4"},
        "45s",
        "2m",
        NODE,
        "5",
    ),
    (
        "PowerOverLimit",
        {f"ffdist_sample_power_watts{_OF_A}": "1200x40"},
        "2m30s",
        "4m",
        NODE,
        "1200",
    ),
    (
        "MasterDiskFilling",
        {"ffdist_disk_free_bytes": "2e9x40", "ffdist_disk_size_bytes": "1e11x40"},
        "4m",
        "6m",
        {},
        "",
    ),
    (
        "MasterDiskFilling",
        {"ffdist_disk_free_bytes": "9e8x40", "ffdist_disk_size_bytes": "1e9x40"},
        "4m",
        "6m",
        {},
        "",
    ),
    ("MasterCannotWrite", {"ffdist_ready": "1x3 0x40"}, "1m15s", "1m45s", {}, ""),
    ("MasterAway", {"ffdist_ready": "1x4 stale"}, "2m", "4m", {}, ""),
    ("PushDropping", {"ffdist_push_dropped_total": "0x8 50x20"}, "1m", "3m", {}, ""),
)
# What must stay quiet: a queue that shrinks, failures among successes, power below the limit.
QUIET: tuple[tuple[str, dict[str, str]], ...] = (
    ("QueueGrowing", {'ffdist_jobs{status="pending"}': "5000-10x200"}),
    ("FailuresInARow", {'ffdist_job_info{node="a",node_id="1",status="failed"}': "1x9",
                        'ffdist_job_info{node="a",node_id="1",status="completed"}': "_ _ 1"}),
    ("PowerOverLimit", {f"ffdist_sample_power_watts{_OF_A}": "999x40"}),
    ("PowerOverLimit", {f"ffdist_sample_power_watts{_OF_A}": "1200 1200"}),
)


class Rules(Case):
    def promtool(self, *words: str) -> None:
        need("promtool")
        done = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=60,
                              cwd=self.folder)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_each_alert_fires_when_it_should_and_not_before(self) -> None:
        (self.folder / "alerts.yml").write_text(json.dumps(ffdist.rules_json(1000)))
        known = {rule.name: rule for rule in ffdist.RULES}
        self.assertEqual({case[0] for case in CASES}, set(known))
        tests = [self.case(series, name, {"2m": [], "4m": [], "18m": []}) for name, series in QUIET]
        for name, series, quiet, firing, labels, value in CASES:
            rule = known[name]
            said = (rule.summary.replace("{{ $value }}", value).replace("{{ $labels.node }}", "a")
                    .replace("POWER_LIMIT", "1000"))
            alert = {"exp_labels": {"severity": rule.severity, **labels},
                     "exp_annotations": {"summary": said}}
            tests.append(self.case(series, name, {quiet: [], firing: [alert]}))
        (self.folder / "tests.yml").write_text(json.dumps(
            {"rule_files": ["alerts.yml"], "evaluation_interval": "15s", "tests": tests}))
        self.promtool("check", "rules", "alerts.yml")
        self.promtool("test", "rules", "tests.yml")

    def case(
        self, series: Mapping[str, str], name: str, moments: Mapping[str, list[Any]]
    ) -> dict[str, Any]:
        return {
            "interval": "15s",
            "input_series": [{"series": key, "values": values} for key, values in series.items()],
            "alert_rule_test": [
                {"eval_time": at, "alertname": f"Ffdist{name}", "exp_alerts": alerts}
                for at, alerts in moments.items()
            ],
        }


class Monitoring(Case):
    """`monitoring up|files` on real programs."""

    def monitoring(self, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return run(
            str(TOP / "ffdist.py"),
            "monitoring",
            *words,
            "--data-dir",
            str(self.folder / "master"),
            folder=self.folder,
            **more,
        )

    def ports(self) -> list[str]:
        self.url = f"http://127.0.0.1:{free_port()}"
        return ["--victoriametrics", self.url, "--vmalert-port", str(free_port())]

    def up(self, *words: str,
           prepare: Callable[[], None] = interruptible) -> subprocess.Popen[str]:
        """Start `monitoring up`, and return it when it has printed its addresses."""
        argv = [sys.executable, str(TOP / "ffdist.py"), "monitoring", "up", *words, "--data-dir",
                str(self.folder / "master")]
        process = subprocess.Popen(argv, cwd=self.folder, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, preexec_fn=prepare)
        self.addCleanup(process.communicate)
        self.addCleanup(process.terminate)
        assert process.stdout is not None
        self.shown = "".join(iter(process.stdout.readline, "to end all        Ctrl-C\n"))
        self.parts = processes_below(process.pid)
        return process

    def test_up_runs_its_programs_until_ctrl_c_and_leaves_the_data(self) -> None:
        need("victoria-metrics", "vmalert")
        ports, home = self.ports(), self.folder / "master" / "monitoring"
        process = self.up(*ports, "--alertmanager", "http://127.0.0.1:9/am/")
        self.assertIn(f"master --victoriametrics {self.url}", self.shown)
        for path in (self.folder / "master", home):
            self.assertEqual(oct(path.stat().st_mode)[-3:], "700")
        wire.exchange_text(f"{self.url}/api/v1/import/prometheus", b"ffdist_kept 7\n")
        self.assertEqual(len(self.parts), 2)
        words = "".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in self.parts)
        self.assertIn("-notifier.url=http://127.0.0.1:9/am\0", words)
        again = self.monitoring("up", *ports)
        self.assertEqual(again.returncode, 1)
        self.assertIn("something else answers", again.stderr)
        self.assertTrue(ffdist.answers(f"{self.url}/health", healthy=True))
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        self.assertEqual(process.returncode, 0)
        self.assertTrue(
            said.endswith(f"\nthe monitoring has ended; its data stays in {home}\n"), said
        )
        self.assertTrue(all(map(ended, self.parts)))
        self.assertTrue((home / "victoria-metrics").is_dir())

    def test_sigterm_ends_it_in_the_background_of_a_script_too(self) -> None:
        need("victoria-metrics")
        process = self.up(*self.ports(), prepare=in_background)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
        self.assertEqual(process.returncode, 0, said)
        self.assertTrue(all(map(ended, self.parts)))

    def test_a_part_that_ends_by_itself_ends_the_others(self) -> None:
        need("victoria-metrics", "vmalert")
        process = self.up(*self.ports())
        (alert,) = (
            pid for pid in self.parts if b"vmalert" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(alert, signal.SIGKILL)
        said = process.communicate(timeout=60)[1]
        self.assertEqual(process.returncode, 1)
        self.assertIn("ffdist: vmalert ended, so the others were ended too: ", said)
        self.assertTrue(all(map(ended, self.parts)))

    def test_what_is_missing_or_taken_is_said(self) -> None:
        bare = self.monitoring("up", env={"PATH": str(self.folder)})
        self.assertEqual(bare.returncode, 1)
        self.assertIn("victoria-metrics is missing: install it with", bare.stderr)
        need("victoria-metrics")
        store = Store()
        self.addCleanup(store.close)
        taken = self.monitoring("up", "--victoriametrics", f"http://{store.place}")
        self.assertEqual(taken.returncode, 1)
        self.assertIn("something else answers", taken.stderr)

    def test_a_part_that_fails_takes_the_others_with_it(self) -> None:
        need("victoria-metrics", "vmalert")
        broken = self.folder / "bin"
        broken.mkdir()
        (broken / "vmalert").write_text("#!/bin/sh\nprintf 'it\\tis broken\\n'\nexit 3\n")
        (broken / "vmalert").chmod(0o755)
        done = self.monitoring("up", *self.ports(), env={"PATH": f"{broken}:{os.environ['PATH']}"})
        self.assertEqual(done.returncode, 1)
        self.assertIn("vmalert ended: it is broken", done.stderr)
        self.assertFalse(ffdist.answers(f"{self.url}/health"))

    def test_files_are_written_where_asked_and_read_by_their_programs(self) -> None:
        done = self.monitoring("files", "made", "--listen", "0.0.0.0", "--power-limit", "250")
        self.assertEqual(done.returncode, 0, done.stderr)
        made = self.folder / "made"
        paths = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
        self.assertEqual(paths, set(ffdist.monitoring_files(SITE)))
        self.assertIn("http_addr = 0.0.0.0", (made / "grafana/grafana.ini").read_text())
        self.assertNotIn("password", (made / "grafana/grafana.ini").read_text())
        self.assertIn("> 250", (made / "alerts.yml").read_text())
        provider = json.loads((made / "grafana/provisioning/dashboards/ffdist.yml").read_text())
        self.assertEqual(len(list(Path(provider["providers"][0]["options"]["path"]).iterdir())), 5)
        self.assertEqual(self.monitoring("files").returncode, 2)
        self.assertEqual(self.monitoring("up", "made").returncode, 2)
        need("victoria-metrics", "vmalert")
        for words in (["victoria-metrics", f"-promscrape.config={made}/scrape.yml",
                       "-promscrape.config.dryRun"],
                      ["vmalert", f"-rule={made}/alerts.yml", "-dryRun",
                       "-datasource.url=http://127.0.0.1:1"]):
            self.assertEqual(
                subprocess.run(words, capture_output=True, timeout=60).returncode, 0, words
            )


def ended(pid: int) -> bool:
    """Return whether a process has ended, buried or not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


if __name__ == "__main__":
    unittest.main()
