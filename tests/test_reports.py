"""What jobs cost, experiments and reports: pure functions, then real masters and encodes."""
from __future__ import annotations

import contextlib
import csv
import errno
import html.parser
import io
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import unittest
import xml.etree.ElementTree
from typing import Any

import agent
import ffdist
from ffdist import PRICED, Experiment, Rate, Row, Tariff, experiment_of, rates_of
from tests.fleet import Case, Node, interruptible, run
from tests.support import PATIENCE_S, TOP, wait_for

NOON = 1_767_009_600.0  # 2025-12-29T12:00:00Z
METRICS = {"energy_joules": 7200.0, "duration": 60.0, "output_seconds": 120.0}


def no_file(name: str) -> str:
    raise FileNotFoundError(2, "No such file or directory")


class TestRates(unittest.TestCase):
    """Prices and carbon intensities by hour and node."""

    def test_a_number_is_of_every_hour(self) -> None:
        self.assertEqual(Rate(0.3).mean(NOON, 1e6), 0.3)

    def test_hours_count_by_their_share_of_the_time(self) -> None:
        rate = ffdist.hourly_rate_of("hour,price\n12,1\n13,4\n", 0)
        self.assertAlmostEqual(rate.mean(NOON + 1800, 3600), 2.5)
        self.assertAlmostEqual(rate.mean(NOON + 3000, 1200), 2.5)
        self.assertAlmostEqual(rate.mean(NOON + 2700, 3600), 1 * 0.25 + 4 * 0.75)
        self.assertEqual(rate.mean(NOON, 0), 1)

    def test_an_hour_of_the_day_is_that_of_every_day_and_a_dated_one_is_not(self) -> None:
        self.assertEqual(ffdist.hourly_rate_of("hour,x\n12,7", 0).mean(NOON + 86400 * 40, 5), 7)
        dated = ffdist.hourly_rate_of("time,g,note\n2025-12-29T13:00:00+01:00,7,cold\n\n"
                                      "2025-12-29T13:00:00Z,9\n", 0)
        self.assertEqual((dated.mean(NOON, 5), dated.mean(NOON + 3600, 5)), (7, 9))
        with self.assertRaisesRegex(LookupError, "2025-12-30T12Z"):
            dated.mean(NOON + 86400, 5)

    def test_a_bad_file_is_one_sentence_with_its_line(self) -> None:
        for text, words in (
            ("", "line 1: invalid header"),
            ("price\n0.3\n", "line 1: invalid header"),
            ("0,0.3\n", "line 1: invalid header"),
            ("hour,price\n", "line 2: missing value"),
            ("hour,price\n24,1\n", "line 2: invalid line '24,1': expected an hour from 0 to 23"),
            ("hour,price\n-1,1\n", "line 2"),
            ("hour,price\n0,1\n\n0,2\n", "line 4: duplicate hour 0"),
            ("hour,price\n1,free\n", "line 2"),
            ("hour,price\n1\n", "line 2"),
            ("hour,price\n1,nan\n", "line 2: invalid value nan"),
            ("hour,price\n1,inf\n", "line 2"),
            ("hour,price\n1,-2\n", "line 2: invalid value -2: expected a number from 0"),
            ("time,price\n2025-12-29T12:30:00Z,1\n", "line 2.*whole hour"),
            ("time,price\n2025-12-29T12:00:00,1\n", "line 2"),
            ("time,price\nnoon,1\n", "line 2"),
        ):
            with self.subTest(text), self.assertRaisesRegex(ValueError, words):
                ffdist.hourly_rate_of(text, 0)

    def test_a_price_may_be_below_nothing(self) -> None:
        rate = ffdist.hourly_rate_of("hour,price\n1,-0.02", ffdist.MIN_PRICE)
        self.assertEqual(rate.by_hour, {1: -0.02})

    def test_rates_by_node(self) -> None:
        rates = rates_of("0.30,worker-01=0.22,b=day.csv", {"day.csv": "hour,p\n3,9\n"}.__getitem__)
        self.assertEqual((rates[""], rates["worker-01"]), (Rate(0.3), Rate(0.22)))
        self.assertEqual(rates["b"].by_hour, {3: 9.0})

    def test_bad_rates_are_one_sentence(self) -> None:
        for text, words in (
            ("0.3,0.4", "one for each node"),
            ("a=", "numbers or files"),
            ("", "numbers"),
            ("gone.csv", "invalid rate 'gone.csv': .* file to read .No such"),
            ("-3", "'-3': expected a number from 0"),
            ("nan", "'nan': expected a number"),
        ):
            with self.subTest(text), self.assertRaisesRegex(ValueError, words):
                rates_of(text, no_file)
        with self.assertRaisesRegex(ValueError, "^day.csv: line 2: "):
            rates_of("day.csv", lambda name: "hour,p\nx,1\n")


class TestPriced(unittest.TestCase):
    """What the master adds to the metrics of a result."""

    def test_cost_and_carbon_of_known_joules(self) -> None:
        made = Tariff({"": Rate(0.3)}, {"": Rate(400.0)}, "EUR").priced(METRICS, ("w", "id"), NOON)
        self.assertEqual(
            {name: made[name] for name in PRICED},
            {
                "energy_cost": 0.0006,
                "carbon_g": 0.8,
                "energy_wh_per_minute": 1.0,
                "cost_per_minute": 0.0003,
                "carbon_g_per_minute": 0.4,
            },
        )
        self.assertEqual((made["currency"], made["unknown"]), ("EUR", {}))
        self.assertEqual({name: made[name] for name in METRICS}, METRICS)

    def test_a_node_has_its_own_price_by_name_or_id(self) -> None:
        tariff = Tariff({"": Rate(0.3), "w": Rate(0.1), "id": Rate(0.2)})
        costs = [tariff.priced(METRICS, names, NOON)["energy_cost"]
                 for names in (("w", "other"), ("x", "id"), ("x", "y"))]
        self.assertEqual(costs, [0.0002, 0.0004, 0.0006])

    def test_unknown_is_null_with_a_reason(self) -> None:
        tariff = Tariff({"": Rate(None, {1: 1.0}, True)})
        sent = {
            **METRICS,
            "output_seconds": None,
            "unknown": {"output_seconds": "the attempt failed"},
        }
        made = tariff.priced(sent, ("w",), NOON)
        self.assertEqual([made[name] for name in PRICED], [None] * 5)
        self.assertEqual(made["unknown"], {
            "output_seconds": "the attempt failed",
            "energy_cost": "the file of --energy-price has no 2025-12-29T12Z",
            "carbon_g": "the master has no --carbon-intensity for this node",
            "energy_wh_per_minute": "the output's length is unknown",
            "cost_per_minute": "the file of --energy-price has no 2025-12-29T12Z",
            "carbon_g_per_minute": "the master has no --carbon-intensity for this node"})
        self.assertEqual(sent["unknown"], {"output_seconds": "the attempt failed"})

    def test_unknown_energy_gives_its_own_reason(self) -> None:
        made = Tariff().priced(
            {"energy_joules": None, "unknown": {"energy_joules": "no RAPL"}}, (), NOON
        )
        self.assertEqual(made["unknown"], dict.fromkeys(("energy_joules", *PRICED), "no RAPL"))

    def test_the_small_metrics_of_a_seed_agent_stay_as_they_are_without_a_tariff(self) -> None:
        sent = {"cpu_usage": 75.5, "memory_usage": 2048, "duration": 5.0}
        self.assertEqual(Tariff().priced(sent, ("w",), NOON), sent)
        made = Tariff({"": Rate(1.0)}).priced(sent, ("w",), NOON)
        self.assertEqual(made["unknown"]["energy_cost"], "the node reports no energy")

    def test_nonsense_of_an_agent_does_no_harm(self) -> None:
        tariff = Tariff({"": Rate(None, dict.fromkeys(range(24), 1.0), True)})
        for name, value in (("duration", 1e300), ("duration", "long"), ("energy_joules", -1),
                            ("energy_joules", True), ("output_seconds", []), ("unknown", "all")):
            with self.subTest(name=name, value=value):
                made = tariff.priced({**METRICS, name: value}, ("w",), NOON)
                self.assertLessEqual(set(PRICED), set(made))
                self.assertIsInstance(made["unknown"], dict)


def job_view(**fields: Any) -> agent.JobView:
    """Return a job as the command line sees it."""
    return agent.JobView.from_json({"id": "x", **fields})


class TestWords(unittest.TestCase):
    def test_amounts_have_three_digits_and_no_exponent(self) -> None:
        for value, text in ((0.0000123, "0.0000123 EUR"), (0.5, "0.500 EUR"), (12.34, "12.3 EUR"),
                            (12345.6, "12346 EUR"), (0, "0.00 EUR"), (-0.02, "-0.0200 EUR")):
            self.assertEqual(ffdist.amount_text(value, "EUR"), text)
        self.assertIsNone(ffdist.amount_text(None, "EUR"))

    def test_a_table_says_a_figure_as_show_does(self) -> None:
        metrics = {"duration": 0.189, "speed": 3.6421, "cpu_usage": 99.12, "bitrate_kbps": 715.04,
                   "output_bytes": 2048}
        shown = dict(agent.result_rows({"metrics": metrics}))
        for name, row, text in (
            ("duration", "time", "0.2 s"),
            ("speed", "speed", "3.64x"),
            ("cpu_usage", "CPU", "99 %"),
            ("bitrate_kbps", "size", "715 kbit/s"),
            ("output_bytes", "size", "2.0 KiB"),
        ):
            self.assertEqual(ffdist.figure_text(metrics, name), text)
            self.assertIn(text, shown[row])
        self.assertEqual(ffdist.figure_text(metrics, "duration", unit=""), "0.189")

    def test_the_cost_of_a_job_is_one_phrase(self) -> None:
        made = Tariff({"": Rate(0.3)}, {"": Rate(400.0)}, "EUR").priced(METRICS, ("w",), NOON)
        self.assertEqual(
            ffdist.cost_text(made),
            "2.00 Wh, 0.000600 EUR, 0.800 g CO2e; a minute of output: "
            "1.00 Wh, 0.000300 EUR, 0.400 g CO2e",
        )
        self.assertTrue(
            (ffdist.cost_text({**made, "energy_estimated": True}) or "").startswith("~2.00 Wh")
        )
        self.assertIsNone(ffdist.cost_text({"cpu_usage": 3}))


class TestWordsOfTheCommandLine(unittest.TestCase):
    def test_a_pending_job_tells_why_it_does_not_run(self) -> None:
        def said(nodes: list[Any], now: float = 0, **fields: Any) -> str:
            job = job_view(**{"status": "pending", "attempt": 1, **fields})
            return ffdist.waiting_text(job, list(map(agent.NodeView.from_json, nodes)), now)
        free, full = ({"id": "n", "running": count, "max_concurrent_jobs": 2} for count in (1, 2))
        self.assertIn("agent.py --register", said([]))
        self.assertEqual(said([free]), "pending: attempt 2 waits for a node")
        self.assertEqual(said([full]), "pending: 1 of 1 node is busy")
        self.assertEqual(said([full, full, free]), "pending: 2 of 3 nodes are busy")
        later = "2026-01-01T00:00:10Z"
        due = ffdist.epoch_of(later) or 0.0
        self.assertRegex(
            said([free], due - 1, not_before=later), r"^pending: waits until \d\d:\d\d:10 "
        )
        self.assertIn("waits for a node", said([free], due + 1, not_before=later))
        self.assertEqual(said([], status="paused"), "paused")
        self.assertEqual(
            said([], status="blocked", waiting_for="2 jobs"), "blocked: waits for 2 jobs"
        )

    def test_a_quarantine_names_the_command_that_ends_it(self) -> None:
        def said(*names: str) -> str:
            nodes = []
            for at, name in enumerate(names):
                nodes.append(agent.NodeView.from_json({
                    "id": f"{at}7bef775-0", "name": name, "cpu_model": "x",
                    "quarantine": {"reason": "3 failures"}}))
            with contextlib.redirect_stdout(io.StringIO()) as out:
                ffdist.show_nodes(nodes)
            return out.getvalue()
        self.assertIn("'python3 ffdist.py undrain rack' lets it work at once", said("rack"))
        self.assertIn("'python3 ffdist.py undrain 17bef775' lets", said("twin", "twin"))
        self.assertRegex(said("rack"), r"GPU +CPU\n.* none +x\n")

    def test_attempts_tell_what_the_job_does_not(self) -> None:
        def record(
            number: int, status: str, error: str | None, node: str | None = "n1"
        ) -> dict[str, Any]:
            return {
                "attempt": number,
                "status": status,
                "error": error,
                "failure_reason": None,
                "node": node,
                "node_id": "0123456789abcdef",
                "ended_at": "2026-01-01T00:00:10Z",
            }

        def shown(*attempts: Any, **fields: Any) -> Any:
            return ffdist.attempt_rows(job_view(attempts=list(attempts), **fields))
        lost = record(1, "failed", "gone")
        self.assertEqual(
            shown(lost, {**lost, "ended_at": None}), [("attempt 1", "failed on n1: gone")]
        )
        self.assertEqual(shown(lost, error="gone"), [])
        self.assertEqual(shown({**record(1, "failed", "gone", None), "failure_reason": "stalled"},
                               record(2, "failed", "bad"), error="bad"),
                         [("attempt 1", "failed on 01234567: gone (stalled)")])
        self.assertEqual(shown(record(1, "completed", None)), [])

    def test_a_port_that_cannot_be_opened_names_the_next_step(self) -> None:
        for code, step in ((errno.EADDRNOTAVAIL, "--host"), (errno.EACCES, "need root"),
                           (errno.EADDRINUSE, "lsof -i :80'")):
            self.assertIn(
                step, ffdist.no_port_text("1.2.3.4", 80, OSError(code, os.strerror(code)))
            )
        self.assertIn(
            "--host", ffdist.no_port_text("nowhere", 80, socket.gaierror(-2, "not known"))
        )

    def test_a_node_is_meant_by_its_name_its_id_or_how_one_begins(self) -> None:
        nodes = [agent.NodeView.from_json({"id": key, "name": name})
                 for key, name in (("aaaa1111", "rack"), ("aaaa2222", "rack-2"))]
        for word, key in (("rack", "aaaa1111"), ("rack-", "aaaa2222"), ("AAAA2", "aaaa2222")):
            self.assertEqual(ffdist.node_id_of(word, nodes), key)
        for word in ("aaaa", "nobody"):
            with self.assertRaisesRegex(ffdist.CommandError, word):
                ffdist.node_id_of(word, nodes)
        gone = "12345678-1234-4234-8234-123456789abc"
        self.assertEqual(ffdist.node_id_of(gone, nodes), gone, "results outlive their node")


class TestPricesOfARealMaster(Case):
    def finish(self, master: Any, metrics: Any) -> str:
        """Let a node that a test plays run a job, and return the job's id."""
        node = master.register("worker-01")
        master.submit("720p30-h264")
        job = master.get(f"/jobs/next?node_id={node['id']}")["job"]
        answer = master.call(
            "POST",
            "/results",
            {"job_id": job["id"], "node_id": node["id"], "status": "completed", "metrics": metrics},
        )
        self.assertEqual(answer.status, 200, answer)
        return job["id"]

    def test_a_result_is_priced_when_it_is_accepted_and_people_see_it(self) -> None:
        (self.folder / "day.csv").write_text(
            "hour,price\n" + "".join(f"{hour},0.5\n" for hour in range(24))
        )
        master = self.master("--energy-price", f"0.1,worker-01={self.folder / 'day.csv'}",
                             "--carbon-intensity", "400", "--currency", "EUR")
        job_id = self.finish(master, METRICS)
        kept = master.get(f"/jobs/{job_id}")["result"]["metrics"]
        self.assertEqual([kept[name] for name in (*PRICED, "currency")],
                         [0.001, 0.8, 1.0, 0.0005, 0.4, "EUR"])
        shown = run(
            str(TOP / "ffdist.py"), "show", job_id, "--master", master.url, folder=self.folder
        ).stdout
        self.assertIn("0.00100 EUR, 0.800 g CO2e", shown)
        shown = run(
            str(TOP / "ffdist.py"), "results", "--master", master.url, folder=self.folder
        ).stdout
        self.assertRegex(shown, r"2\.00 Wh +0\.00100 EUR +0\.800 g")

    def test_without_a_tariff_small_metrics_are_kept_as_they_came(self) -> None:
        master = self.master()
        sent = {"cpu_usage": 75.5, "memory_usage": 2048, "duration": 5.0}
        job_id = self.finish(master, sent)
        self.assertEqual(master.get(f"/jobs/{job_id}")["result"]["metrics"], sent)

    def test_a_bad_file_stops_the_master_at_its_start(self) -> None:
        (self.folder / "day.csv").write_text("hour,price\n0,0.5\n1,cheap\n")
        made = run(str(TOP / "ffdist.py"), "master", "--energy-price", "day.csv", "--port", "0",
                   folder=self.folder)
        self.assertEqual(made.returncode, 2)
        self.assertRegex(
            made.stderr,
            r"^ffdist: --energy-price day.csv: line 3: invalid line '1,cheap': "
            r"expected .*\n$",
        )


SEED_FILE = {
    "scenarios": [
        {"type": "baseline", "name": "idle", "duration": 5},
        {
            "type": "multi",
            "name": "2 streams at 500k",
            "count": 2,
            "bitrate": "500k",
            "resolution": "320x180",
            "fps": 25,
            "stabilization": 3,
            "duration": 2,
            "cooldown": "4s",
        },
    ]
}


def cells_of(experiment: Experiment) -> list[Any]:
    return [job["experiment"]["cell"] for job in experiment.jobs]


ONE = {"scenarios": ["360p"]}
# a file that is wrong -> what the sentence about it must say, most with the place
BAD_FILES: tuple[tuple[Any, str], ...] = (
    ([], "invalid experiment: expected a JSON object"),
    ({}, "scenarios must be a list of at least one"),
    ({"scenarios": []}, "scenarios must be a list"),
    ({"scenarios": "360p"}, "scenarios must be"),
    ({"scenarios": [3]}, r"scenarios\[0\] must be one of the scenarios, not 3"),
    ({"scenarios": ["360p", "720p-1080p"]}, r"^scenarios\[1\].* names two sizes"),
    ({**ONE, "codec": ["h264"]}, "^unknown field codec: did you mean codecs?"),
    (
        {"scenarios": [{"bitrat": "1M"}]},
        r"^unknown field scenarios\[0\].bitrat: .* bitrate",
    ),
    ({"scenarios": ["360p", {}, {"bitrate": "fast"}]}, r"^scenarios\[2\].bitrate must be"),
    (
        {"scenarios": [{"type": "mutli"}]},
        r"^scenarios\[0\].type must be one of single, multi",
    ),
    ({"scenarios": [{"count": 0}]}, r"^scenarios\[0\].count must be a whole number from 1"),
    (
        {"scenarios": [{"stabilization": "soon"}]},
        r"^scenarios\[0\].stabilization: invalid d",
    ),
    (
        {"scenarios": [{"stabilization": -1}]},
        r"^scenarios\[0\].stabilization must be from 0 to",
    ),
    ({**ONE, "codecs": ["h264", "x26"]}, r"^codecs\[1\] must be one of h264"),
    ({**ONE, "crfs": [20, 99]}, r"^crfs\[1\] must be from 0 to 63"),
    ({**ONE, "codecs": ["av1"], "crfs": {"av1": [64]}}, r"^crfs.av1\[0\] must be"),
    ({**ONE, "crfs": {"x264": [20]}}, "^unknown field crfs.x264"),
    ({**ONE, "presets": [[]]}, r"^presets\[0\] must be one of the presets, not \[\]"),
    ({**ONE, "quality": ["x"]}, "^quality must be"),
    ({**ONE, "cooldown": [1]}, "^cooldown must"),
    (
        {"scenarios": [{"quality": ["x"]}], "quality": ["psnr"]},
        r"^scenarios\[0\].quality must",
    ),
    ({**ONE, "parameters": {"duraton": 3}}, "^parameters.duraton .*duration"),
    ({**ONE, "parameters": 3}, "parameters must be an object"),
    ({**ONE, "confidence": "very"}, "confidence must be one of auto"),
    ({**ONE, "repeats": 0}, "repeats must be a whole number"),
    ({**ONE, "streams": [1, True]}, "streams must be a whole number"),
    ({**ONE, "nodes": [1]}, r"nodes\[0\] must be one of the names of nodes"),
    ({**ONE, "name": ""}, "name must be a text"),
    ({**ONE, "settle": "x"}, "settle: invalid d"),
    ({**ONE, "crfs": [20, 20]}, r"duplicate crfs\[1\]: use repeats"),
    ({**ONE, "nodes": ["a", "b", "a"]}, r"duplicate nodes\[2\]"),
    (
        {"scenarios": ["360p", {"scenario": "360p"}]},
        "the same job is in the file more than once",
    ),
    ({**ONE, "repeats": [2, 3]}, "repeats must be a whole number"),
    (
        {**ONE, "crfs": [20, 30], "parameters": {"output": "a.mp4"}},
        "written by several jobs",
    ),
    ({**ONE, "bitrates": list(range(1000, 2000)), "repeats": 1000}, "more than 10000 jobs"),
)


class TestExperimentFiles(unittest.TestCase):
    """A file of JSON becomes groups of submissions, or a sentence that names the place."""

    def test_a_matrix_is_the_product_of_its_axes_in_order(self) -> None:
        made = experiment_of({"scenarios": ["360p25"], "codecs": ["h264", "vp9"], "crfs": [20, 30],
                              "presets": ["fast"], "nodes": ["a", "b"], "quality": ["psnr"],
                              "parameters": {"duration": 1}}, "mine")
        self.assertEqual((made.id, made.name, len(made.groups)), ("mine", "mine", 8))
        self.assertEqual([(cell["codec"], cell["crf"], cell["node"]) for cell in cells_of(made)],
                         [(codec, crf, node) for codec in ("h264", "vp9") for crf in (20, 30)
                          for node in ("a", "b")])
        first = made.jobs[0]
        self.assertEqual(first["parameters"], {"duration": 1, "quality": ["psnr"], "codec": "h264",
                                               "preset": "fast", "crf": 20})
        self.assertEqual(
            (first["node"], first["scenario"], first["confidence"]), ("a", "360p25", "auto")
        )
        for job in made.jobs:
            self.assertEqual(ffdist.draft_of(job, 3).id, job["id"])

    def test_bitrates_and_crfs_are_one_axis_and_may_stand_by_codec(self) -> None:
        made = experiment_of({"scenarios": ["360p"], "codecs": ["h264", "av1"], "bitrates": ["1M"],
                              "crfs": {"h264": [20], "av1": [30, 40]}}, "x")
        self.assertEqual(
            [(cell["codec"], cell.get("bitrate"), cell.get("crf")) for cell in cells_of(made)],
            [
                ("h264", "1M", None),
                ("h264", None, 20),
                ("av1", "1M", None),
                ("av1", None, 30),
                ("av1", None, 40),
            ],
        )

    def test_axes_alone_are_enough(self) -> None:
        self.assertEqual([job["scenario"] for job in experiment_of({"crfs": [20, 30]}, "x").jobs],
                         ["transcode"] * 2)

    def test_what_a_scenario_says_itself_is_no_axis_for_it(self) -> None:
        made = experiment_of({"scenarios": [{"scenario": "360p", "bitrate": "1M"}, "480p"],
                              "crfs": [20, 30]}, "x")
        self.assertEqual([(cell["scenario"], cell.get("crf")) for cell in cells_of(made)],
                         [("360p", None), ("480p", 20), ("480p", 30)])

    def test_files_of_the_seed(self) -> None:
        made = experiment_of(SEED_FILE, "batch")
        idle, first, second = made.jobs
        self.assertEqual((idle["scenario"], idle["parameters"]), ("baseline", {"duration": 5}))
        self.assertEqual(first["scenario"], "transcode")
        self.assertEqual(
            first["parameters"],
            {
                "settle": 3,
                "bitrate": "500k",
                "resolution": "320x180",
                "fps": 25,
                "duration": 2,
                "cooldown": 4.0,
            },
        )
        self.assertEqual(first["parameters"], second["parameters"])
        self.assertEqual([cell["stream"] for cell in cells_of(made)[1:]], [1, 2])
        self.assertEqual([len(group.jobs) for group in made.groups], [1, 2])
        self.assertEqual([job.get("exclusive") for job in made.jobs], [True, None, None])

    def test_streams_settle_repeats_and_an_idle_baseline(self) -> None:
        made = experiment_of(
            {
                "scenarios": ["360p"],
                "streams": [1, 3],
                "settle": "2s",
                "cooldown": 1,
                "repeats": 2,
                "baseline": 10,
                "nodes": ["a", "b"],
            },
            "x",
        )
        cells = [group.jobs[0]["experiment"]["cell"] for group in made.groups]
        self.assertEqual(
            [
                (group.node, len(group.jobs), cell["scenario"], cell["repeat"])
                for group, cell in zip(made.groups, cells)
            ],
            [
                (node, size, scenario, repeat)
                for repeat in (1, 2)
                for scenario, node, size in (
                    ("baseline", "a", 1),
                    ("baseline", "b", 1),
                    ("360p", "a", 1),
                    ("360p", "a", 3),
                    ("360p", "b", 1),
                    ("360p", "b", 3),
                )
            ],
        )
        self.assertEqual(made.groups[2].jobs[0]["parameters"], {"settle": 2.0, "cooldown": 1})

    def test_ids_follow_from_what_a_job_is(self) -> None:
        file = {"scenarios": ["360p"], "crfs": [20, 30]}
        ids = [job["id"] for job in experiment_of(file, "x").jobs]
        self.assertEqual(ids, [job["id"] for job in experiment_of(file, "x").jobs])
        self.assertEqual(len({*ids, *(job["id"] for job in experiment_of(file, "y").jobs)}), 4)
        more = [job["id"] for job in experiment_of({**file, "crfs": [20, 25, 30]}, "x").jobs]
        self.assertEqual([ids[0], ids[1]], [more[0], more[2]])
        other = [
            job["id"] for job in experiment_of({**file, "parameters": {"duration": 3}}, "x").jobs
        ]
        self.assertFalse(set(ids) & set(other))

    def test_a_bad_file_is_a_sentence_with_the_place(self) -> None:
        for file, words in BAD_FILES:
            with (
                self.subTest(str(file)[:90]),
                self.assertRaisesRegex((ValueError, agent.ApiError), words),
            ):
                experiment_of(file, "x")


class TestOrder(unittest.TestCase):
    """What runs beside what is in the submissions, for the master to keep."""

    def waits(self, **file: Any) -> list[Any]:
        """Return for each job whether it is exclusive, and the numbers of those it waits for."""
        jobs = experiment_of({"scenarios": ["360p"], **file}, "x").jobs
        number = {job["id"]: at for at, job in enumerate(jobs)}
        return [(job.get("exclusive", False), [number[other] for other in job.get("after", ())])
                for job in jobs]

    def test_plain_jobs_run_as_they_fit(self) -> None:
        self.assertEqual(self.waits(crfs=[20, 30], nodes=["a", "b"]), [(False, [])] * 4)

    def test_jobs_that_rest_and_baselines_have_their_node_to_themselves(self) -> None:
        self.assertEqual(self.waits(crfs=[20, 30], nodes=["a", "b"], settle=1), [(True, [])] * 4)
        self.assertEqual(self.waits(crfs=[20, 30], baseline=5),
                         [(True, []), (False, []), (False, [])])
        self.assertEqual(
            self.waits(scenarios=["360p", {"scenario": "720p", "cooldown": 1}, "1080p"]),
            [(False, []), (True, []), (False, [])],
        )

    def test_streams_wait_for_all_before_them_and_are_waited_for(self) -> None:
        self.assertEqual(self.waits(crfs=[20, 30], streams=2),
                         [(False, []), (False, []), (False, [0, 1]), (False, [0, 1])])
        self.assertEqual(
            self.waits(scenarios=["360p", "480p", {"scenario": "720p", "count": 2}, "1080p"]),
            [(False, []), (False, []), (False, [0, 1]), (False, [0, 1]), (False, [2, 3])],
        )
        self.assertEqual(self.waits(crfs=[20], streams=[2, 1], repeats=2, settle=1),
                         [(False, []), (False, []), (True, [0, 1]), (False, [2]), (False, [2]),
                          (True, [3, 4])])

    def test_streams_of_one_node_do_not_wait_for_those_of_another(self) -> None:
        self.assertEqual(self.waits(crfs=[20, 30], streams=2, nodes=["a", "b"]),
                         [(False, [])] * 4 + [(False, [0, 1])] * 2 + [(False, [2, 3])] * 2)

    def test_repeats_interleave(self) -> None:
        jobs = experiment_of({"scenarios": ["360p"], "crfs": [20, 30], "repeats": 2}, "x").jobs
        self.assertEqual([(job["experiment"]["cell"]["repeat"], job["experiment"]["cell"]["crf"])
                          for job in jobs], [(1, 20), (1, 30), (2, 20), (2, 30)])

    def test_no_job_names_more_others_than_the_master_takes(self) -> None:
        jobs = experiment_of({"scenarios": ["360p", {"scenario": "720p", "count": 2, "crf": 30}],
                              "bitrates": list(range(1000, 2500))}, "x").jobs
        self.assertEqual([len(job.get("after", ())) for job in jobs[-3:]], [0, 1000, 1000])
        self.assertEqual(jobs[-1]["after"][-1], jobs[-3]["id"])

    def test_all_go_in_one_request_unless_its_limit_is_reached(self) -> None:
        jobs = experiment_of(
            {"scenarios": ["360p"], "crfs": list(range(20, 40)), "streams": 20}, "x"
        ).jobs
        batches = list(ffdist.experiment_batches(jobs, ffdist.BULK_LIMIT_BYTES))
        self.assertEqual(batches, [jobs])
        batches = list(ffdist.experiment_batches(jobs, 100_000))
        self.assertEqual([job for batch in batches for job in batch], jobs)
        self.assertGreater(len(batches), 3)
        self.assertLess(max(len(json.dumps(batch)) for batch in batches), 100_000)

    def test_progress_counts_and_tells_the_time_left(self) -> None:
        def seen(*jobs: Any, total: int) -> Any:
            return ffdist.experiment_progress([job_view(**job) for job in jobs], total)
        done = {"status": "completed", "started_at": "2025-12-29T12:00:00.000Z",
                "completed_at": "2025-12-29T12:00:10.000Z"}
        self.assertEqual(
            seen(done, {"status": "running"}, {"status": "failed"}, total=10),
            {"phase": "2 of 10 jobs ended, 1 running, 1 failed", "percent": 20.0, "eta_s": 80.0},
        )
        self.assertIsNone(seen({"status": "pending"}, total=2)["eta_s"])


class TestRealExperiment(Case):
    """The command line with a real master, a real agent and real encodes."""

    def write(self, **file: Any) -> str:
        (self.folder / "mine.json").write_text(json.dumps(file))
        return "mine.json"

    def ffdist(self, *words: str, url: str = "") -> Any:
        return run(
            str(TOP / "ffdist.py"), *words, *(("--master", url) if url else ()), folder=self.folder
        )

    def test_it_runs_once_however_often_it_is_asked_for(self) -> None:
        master, _ = self.fleet()
        name = self.write(scenarios=["144p25"], codecs=["h264", "vp9"], crfs=[30, 40], streams=2,
                          quality=["psnr"], parameters={"duration": 0.2}, nodes=["agent"])
        begun = self.ffdist("experiment", name, "--no-wait", url=master.url)
        self.assertEqual(begun.returncode, 0)
        self.assertIn("follow it with: python3 ffdist.py experiment mine.json\n", begun.stderr)
        self.assertIn("stop jobs of it with: python3 ffdist.py cancel ID...\n", begun.stderr)
        self.assertNotIn("plots:", begun.stderr, "all is pending")
        self.assertEqual(
            master.get("/jobs")["total"], 8, "all are submitted, and run without the command"
        )
        made = self.ffdist("report", "--experiment", name, "--json", url=master.url)
        self.assertEqual((made.returncode, len(json.loads(made.stdout)["rows"])), (0, 8))
        made = self.ffdist("experiment", name, url=master.url)
        self.assertEqual(made.returncode, 0, made.stderr)
        self.assertEqual(made.stdout.count("completed"), 8)
        self.assertIn("agent has 1 slot, so 2 streams cannot run side by side", made.stderr)
        self.assertEqual(master.get("/jobs")["total"], 8)
        again = self.ffdist("experiment", name, "--json", url=master.url)
        jobs = json.loads(again.stdout)["jobs"]
        self.assertEqual((master.get("/results")["total"], len(jobs)), (8, 8))
        self.assertGreater(jobs[0]["result"]["metrics"]["psnr_db"], 20)
        for words in (
            ("--experiment", "mine.json"),
            ("--experiment", "mine"),
            ("--scenario", "144p25"),
        ):
            said = self.ffdist("report", *words, "-o", "r.html", url=master.url)
            self.assertEqual(said.returncode, 0, said.stderr)
            self.assertIn("8 completed", (self.folder / "r.html").read_text())
        shown = self.ffdist("report", "--experiment", "mine", url=master.url).stdout
        self.assertEqual(
            len(re.findall("^[0-9a-f]{8} +completed +agent ", shown, re.MULTILINE)), 8, shown
        )
        self.assertIn("fewer than 4 points", shown)
        made = self.ffdist("report", "--experiment", "other", url=master.url)
        self.assertEqual((made.returncode, "no such file" in made.stderr), (1, True))
        made = self.ffdist("report", "--experiment", "mine", "--status", "failed", url=master.url)
        self.assertEqual((made.returncode, "leave out --status failed" in made.stderr), (2, True))
        made = self.ffdist("report", "-o", "r.pdf", url=master.url)
        self.assertEqual((made.returncode, "that ends with .html" in made.stderr), (2, True))
        self.assertEqual(jobs[0]["experiment"]["cell"]["node"], "agent")

    def test_the_master_keeps_the_order_while_nobody_watches(self) -> None:
        master = self.master()
        node = Node(master, "agent", max_concurrent_jobs=4)

        def claims(*report: Any) -> list[Any]:
            """Report jobs, and return those that a node with free slots gets then."""
            for job in report:
                node.report(job)
            return list(iter(lambda: node.claim().body["job"], None))

        self.ffdist(
            "experiment",
            self.write(scenarios=["144p25"], crfs=[30, 40], streams=2),
            "--no-wait",
            url=master.url,
        )
        self.assertEqual(master.get("/jobs?status=blocked")["count"], 2)
        one, other = claims()
        self.assertEqual(claims(one), [], "the next streams wait for both")
        self.assertEqual([job["experiment"]["cell"]["crf"] for job in claims(other)], [40, 40])

    def test_a_job_that_rests_has_its_node_to_itself(self) -> None:
        master = self.master()
        node = Node(master, "agent", max_concurrent_jobs=4)
        self.ffdist(
            "experiment",
            self.write(scenarios=["144p25"], crfs=[30, 40], settle=1),
            "--no-wait",
            url=master.url,
        )
        for crf in (30, 40):
            job = node.claim().body["job"]
            self.assertEqual(job["experiment"]["cell"]["crf"], crf)
            self.assertIsNone(node.claim().body["job"], "nothing else begins beside it")
            node.report(job)

    def test_what_failed_runs_again_with_the_streams_beside_it(self) -> None:
        master = self.master()
        node = Node(master, "agent")
        name = self.write(scenarios=["144p25"], crfs=[30, 40], streams=2)

        def work(*statuses: str) -> None:
            for status in statuses:
                job = wait_for(lambda: node.claim().body["job"])
                node.report(job, status, error="why", failure_reason="encoder")
        argv = [sys.executable, str(TOP / "ffdist.py"), "experiment", name, "--master", master.url]
        for words, statuses, code in (((), ("completed", "failed", "completed", "completed"), 1),
                                      (("--retry-failed",), ("completed",) * 2, 0),
                                      (("--retry-failed",), (), 0)):
            with subprocess.Popen([*argv, *words], cwd=self.folder, stderr=subprocess.PIPE,
                                  stdout=subprocess.DEVNULL, text=True) as process:
                work(*statuses)
                said = process.communicate(timeout=30)[1]
            self.assertEqual(process.returncode, code, said)
            self.assertEqual("experiment mine.json --retry-failed" in said, bool(code), said)
        self.assertEqual((master.get("/jobs")["total"], master.get("/results")["total"]), (4, 6))

    def test_streams_that_failed_run_again_group_by_group(self) -> None:
        master = self.master("--quarantine-after", "0")
        node = Node(master, "agent", max_concurrent_jobs=4)
        name = self.write(scenarios=["144p25"], crfs=[30, 40], streams=2)
        self.ffdist("experiment", name, "--no-wait", url=master.url)
        for _ in range(4):
            node.report(node.claim().body["job"], "failed", error="why", failure_reason="encoder")
        left = self.ffdist("experiment", name, "--retry-failed", "--no-wait", url=master.url)
        self.assertEqual(left.returncode, 0, left.stderr)
        for crf in (30, 40):
            jobs = [wait_for(lambda: node.claim().body["job"]) for _ in range(2)]
            self.assertEqual([job["experiment"]["cell"]["crf"] for job in jobs], [crf, crf])
            self.assertIsNone(node.claim().body["job"], "the master keeps the order")
            for job in jobs:
                node.report(job)
        self.assertEqual(master.get("/jobs?status=completed")["total"], 4)

    def test_ctrl_c_leaves_the_jobs_and_says_how_to_go_on(self) -> None:
        master = self.master()
        master.register("idle")
        name = self.write(scenarios=["144p25"], crfs=[20, 30])
        argv = [sys.executable, str(TOP / "ffdist.py"), "experiment", name, "--master", master.url]
        process = subprocess.Popen(argv, cwd=self.folder, stderr=subprocess.PIPE, text=True,
                                   preexec_fn=interruptible)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        wait_for(lambda: master.get("/jobs")["total"] == 2)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=PATIENCE_S)[1]
        self.assertEqual(process.returncode, 130)
        self.assertIn("the jobs go on without this command; follow them with: "
                      "python3 ffdist.py experiment mine.json", said)
        self.assertEqual(master.get("/jobs?status=pending")["count"], 2)

    def test_what_is_wrong_is_found_before_anything_is_submitted(self) -> None:
        master = self.master()
        master.register("worker-01")
        for file, code, words in (
            (
                {"scenarios": ["144p25", {"crf": "x"}]},
                2,
                r"^ffdist: mine.json: scenarios\[1\].crf must",
            ),
            (
                {"scenarios": ["144p25"], "nodes": ["worker-1"]},
                1,
                "unknown node worker-1 in nodes: did you mean worker-01",
            ),
        ):
            made = self.ffdist("experiment", self.write(**file), url=master.url)
            self.assertEqual(made.returncode, code)
            self.assertRegex(made.stderr, words)
        (self.folder / "mine.json").write_text("{")
        self.assertRegex(
            self.ffdist("experiment", "mine.json").stderr, "^ffdist: mine.json is not valid J"
        )
        (self.folder / "mine.json").write_text('{"scenarios": ["144p25"], "scenarios": ["288p25"]}')
        self.assertRegex(
            self.ffdist("experiment", "mine.json").stderr, "duplicate scenarios: expected"
        )
        (self.folder / "mine.json").write_text('\ufeff{"scenarios": ["144p25"]}')
        self.assertEqual(self.ffdist("experiment", "mine.json", "--dry-run").returncode, 0)
        self.assertRegex(
            self.ffdist("experiment", "gone.json").stderr, "^ffdist: gone.json: No such file"
        )
        self.assertEqual(master.get("/jobs")["total"], 0)

    def test_nodes_that_are_away_are_told(self) -> None:
        def said(*nodes: Any, **file: Any) -> str:
            heard = io.StringIO()
            with contextlib.redirect_stderr(heard):
                ffdist._warn_of_nodes(experiment_of({"scenarios": ["144p25"], **file}, "x"), [
                    agent.NodeView.from_json({"id": name, "name": name, "status": status})
                    for name, status in nodes])
            return heard.getvalue()
        self.assertIn("no node is there yet", said())
        here, gone = ("a", "busy"), ("b", "offline")
        self.assertIn("b is offline: jobs wait for it", said(here, gone, nodes=["a", "b"]))
        self.assertEqual(said(here, gone, nodes=["a"]), "")

    def test_a_dry_run_needs_no_master_and_shows_every_job(self) -> None:
        made = self.ffdist("experiment", self.write(**SEED_FILE), "--dry-run")
        self.assertEqual(made.returncode, 0, made.stderr)
        self.assertRegex(
            made.stdout, r"any +2 +2 streams at 500k transcode h264 320x180 25 fps 500k"
        )


# Rates and PSNR that implementations of BD-rate have long been tried with (Anserw/
# Bjontegaard_metric), and the example of FAU-LMS/bjontegaard, whose PCHIP agrees with the JVET's
# sheet. The results below were computed with that package, and once more with numpy and scipy.
CLASSIC = ([(686.76, 40.28), (309.58, 37.18), (157.11, 34.24), (85.95, 31.42)],
           [(893.34, 40.39), (407.8, 37.21), (204.93, 34.17), (112.75, 31.24)])
PUBLISHED = ([(9487.76, 40.037), (4593.60, 38.615), (2486.44, 36.845), (1358.24, 34.851)],
             [(9787.80, 40.121), (4469.00, 38.651), (2451.52, 36.970), (1356.24, 34.987)])


def pchip(points: list[tuple[float, float]], x: float) -> float:
    """Return the value at x by the Hermite basis, with the slopes of scipy's PchipInterpolator."""
    xs, ys = zip(*points)
    h = [b - a for a, b in zip(xs, xs[1:])]
    d = [(b - a) / step for a, b, step in zip(ys, ys[1:], h)]

    def end(h0: float, h1: float, d0: float, d1: float) -> float:
        slope = ((2 * h0 + h1) * d0 - h0 * d1) / (h0 + h1)
        if (slope > 0) != (d0 > 0):
            return 0.0
        return 3 * d0 if (d0 > 0) != (d1 > 0) and abs(slope) > 3 * abs(d0) else slope
    m = [end(h[0], h[1], d[0], d[1])]
    for k in range(1, len(h)):
        w1, w2 = 2 * h[k] + h[k - 1], h[k] + 2 * h[k - 1]
        turns = (d[k - 1] > 0) != (d[k] > 0)
        m.append(0.0 if turns else 1 / ((w1 / d[k - 1] + w2 / d[k]) / (w1 + w2)))
    m.append(end(h[-1], h[-2], d[-1], d[-2]))
    k = max(number for number in range(len(h)) if number == 0 or xs[number] <= x)
    t = (x - xs[k]) / h[k]
    return ((1 + 2 * t) * (1 - t) ** 2 * ys[k] + t * (1 - t) ** 2 * h[k] * m[k]
            + t * t * (3 - 2 * t) * ys[k + 1] + t * t * (t - 1) * h[k] * m[k + 1])


def bd_by_sums(anchor: Any, test: Any, steps: int = 20_000) -> float:
    """Return the BD figure by adding up the distance of the two curves at many qualities."""
    curves = [
        sorted((quality, math.log10(cost)) for cost, quality in points) for points in (anchor, test)
    ]
    low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    at = [low + (high - low) * (step + 0.5) / steps for step in range(steps)]
    mean = sum(pchip(curves[1], x) - pchip(curves[0], x) for x in at) / steps
    return float((10 ** mean - 1) * 100)


class TestBdRate(unittest.TestCase):
    """The mean difference in cost at equal quality."""

    def test_published_examples(self) -> None:
        for curves, found in ((CLASSIC, 31.379878202398), (PUBLISHED, -4.417485350589)):
            self.assertAlmostEqual(ffdist.bd_percent(*curves), found, 7)
            self.assertAlmostEqual(
                ffdist.bd_percent(*(points[::-1] for points in curves)), found, 7
            )

    def test_curves_that_turn_are_as_scipy_has_them(self) -> None:
        qualities = (30, 33, 36, 37, 41)
        for one, found in (((100, 80, 300, 500, 900), -4.215925023538),
                           ((500, 10, 300, 310, 305), 115.708171645683)):
            pair = [list(zip(costs, qualities)) for costs in (one, (200, 210, 190, 220, 400))]
            self.assertAlmostEqual(ffdist.bd_percent(pair[0], pair[1]), found, 7)

    def test_random_curves_are_as_another_computation_has_them(self) -> None:
        chance = random.Random(7)
        for turn in range(20):
            pair = []
            for _ in range(2):
                qualities = sorted(30 + 12 * chance.random() for _ in range(chance.randint(4, 8)))
                pair.append([(100 * 2 ** (quality / 3 - 10) * chance.uniform(0.5, 2), quality)
                             for quality in qualities])
            try:
                found = ffdist.bd_percent(pair[0], pair[1])
            except ValueError as error:
                self.assertIn("overlap", str(error))
                continue
            with self.subTest(turn):
                self.assertAlmostEqual(found / bd_by_sums(pair[0], pair[1]), 1, 4)

    def test_a_constant_factor_is_found_exactly_and_the_other_way_round_is_its_inverse(
        self,
    ) -> None:
        points = [(100 * 2.0 ** n, 30 + 3 * n + 0.1 * n * n) for n in range(6)]
        dearer = [(cost * 1.25, quality) for cost, quality in points]
        self.assertAlmostEqual(ffdist.bd_percent(points, dearer), 25)
        self.assertAlmostEqual(ffdist.bd_percent(dearer, points), -20)
        self.assertAlmostEqual(ffdist.bd_percent(points, points), 0)

    def test_it_says_why_not_rather_than_extrapolate(self) -> None:
        points = CLASSIC[0]
        for other, words in (
                ([(cost, quality + 8) for cost, quality in points], "not enough overlap"),
                ([(cost, quality + 20) for cost, quality in points], "not enough overlap"),
                (points[:3], "fewer than 4 points"), ([], "fewer than 4 points"),
                ([*points[:3], (90.0, points[0][1])], "same quality"),
                ([(0, 50.0), *points[1:]], "without cost")):
            for pair in ((points, other), (other, points)):
                with self.subTest(words), self.assertRaisesRegex(ValueError, words):
                    ffdist.bd_percent(*pair)


def job_of(
    encoder: str = "libx264",
    crf: float = 20,
    node: str = "worker-01",
    joules: float | None = 100.0,
    **more: Any,
) -> Any:
    """Return a job with a result, as GET /jobs/{id} does: dearer and better with a lower crf."""
    seconds = 10 + (35 - crf) / 5
    metrics = {
        "duration": seconds,
        "bitrate_kbps": 8000 * 2 ** ((20 - crf) / 6),
        "psnr_db": 45 - crf / 2,
        "output_seconds": 10.0,
        "energy_joules": None if joules is None else joules * seconds,
        "unknown": {"vmaf": "not asked for", "psnr_min_db": "no <log> of frames"},
    }
    if joules is None:
        metrics["unknown"]["energy_joules"] = "no RAPL: a virtual machine"
    metrics.update(more.pop("metrics", {}))
    job = {
        "id": "550e8400-e29b-41d4-a716-446655440000",
        "status": "completed",
        "scenario": "transcode",
        "settings": {
            "input": "films/a.mov",
            "codec": "h264",
            "crf": crf,
            "fps": 25,
            "duration": 10,
        },
        "result": {
            "node": node,
            "metrics": metrics,
            "statistics": more.pop("statistics", {}),
            "series": more.pop("series", {}),
            "encode": {"encoder": encoder, "preset": "fast", "width": 1280, "height": 720},
        },
        "experiment": {"id": "x", "cell": more.pop("cell", {})},
    }
    return {**job, **more}


def rows_of(*jobs: Any) -> list[Row]:
    return list(map(row_of, jobs))


def document(rows: list[Row]) -> ffdist.Document:
    return ffdist.Document("x", rows, "now")


def row_of(job: Any) -> Row:
    return ffdist.row_of(agent.JobView.from_json(job))


class TestRows(unittest.TestCase):
    """What reports compare: what was encoded, how, at which rate, and on which node."""

    def test_a_job_is_told_by_content_curve_and_rate(self) -> None:
        row = row_of(job_of(cell={"streams": 3, "repeat": 2}))
        self.assertEqual(
            (row.content, row.rendition, row.curve, row.rate, row.label),
            (
                "films/a.mov 1280x720 25 fps, 10 s",
                "1280x720 25 fps",
                "libx264 fast",
                "crf 20",
                "libx264 fast crf 20 ×3",
            ),
        )
        self.assertEqual(row.metrics["energy_wh"], 1300 / 3600)

    def test_a_job_without_a_result_or_with_nonsense_in_it_is_a_row_too(self) -> None:
        row = row_of({"id": "x", "status": "failed", "error": "no such film", "result": None})
        self.assertEqual((row.figure("duration"), row.reason("duration")), (None, "no such film"))
        row = row_of(job_of(series=[1], statistics=3, metrics={"duration": "long", "unknown": 3}))
        self.assertEqual((row.series, row.statistics, row.figure("duration")), ({}, {}, None))

    def test_what_was_asked_for_otherwise_is_no_repeat(self) -> None:
        rows = ffdist.distinct_curves(rows_of(
            job_of(parameters={"threads": 1, "audio": False}), job_of(parameters={"audio": False}),
            job_of(parameters={"audio": False, "two_pass": True}), job_of(scenario="baseline")))
        self.assertEqual([row.curve for row in rows], ["libx264 fast threads=1", "libx264 fast",
                                                       "libx264 fast two_pass=true", "idle"])
        self.assertEqual(len(ffdist.curves_of(rows, "duration", "psnr_db")), 4)

    def test_films_of_one_name_in_two_folders_are_two(self) -> None:
        contents = {row_of(job_of(settings={"input": film})).content for film in
                    ("a/film.mov", "b/film.mov", "http://user:word@host/film.mov")}
        self.assertEqual(len(contents), 3)
        self.assertNotIn("word", str(contents))

    def test_figures_beyond_all_measure_are_unknown(self) -> None:
        for value in (10 ** 299, 1e308, -1e308, 5e-324, 1e17):
            for name in ("duration", "bitrate_kbps", "energy_joules", "energy_cost", "psnr_db"):
                rows = rows_of(
                    *(
                        job_of(encoder, crf, metrics={name: value})
                        for crf in (20, 25, 30, 35)
                        for encoder in ("libx264", "libx265")
                    )
                )
                with self.subTest(name, value=value):
                    self.assertNotRegex(ffdist.report_html(document(rows)), r"\b(nan|inf)\b")
                    ffdist.report_csv(document(rows))

    def test_repeats_are_one_point_and_nodes_are_apart_where_they_matter(self) -> None:
        rows = rows_of(
            job_of(metrics={"bitrate_kbps": 100.0}),
            job_of(metrics={"bitrate_kbps": 300.0}),
            job_of(crf=30, node="worker-02"),
        )
        self.assertEqual(ffdist.curves_of(rows, "bitrate_kbps", "psnr_db"),
                         {"libx264 fast": [(200.0, 35.0), (8000 * 2 ** (-10 / 6), 30.0)]})
        self.assertEqual(set(ffdist.curves_of(rows, "duration", "psnr_db")),
                         {"libx264 fast on worker-01", "libx264 fast on worker-02"})

    def test_deltas_of_rate_energy_and_time(self) -> None:
        rows = rows_of(*(job_of(crf=crf) for crf in (20, 25, 30, 35)),
                       *(job_of("libx265", crf, joules=200.0, metrics={"bitrate_kbps": 4000 * 2 ** (
                           (20 - crf) / 6)}) for crf in (20, 25, 30, 35)))
        found = {delta.cost: delta for delta in ffdist.deltas_of(rows)}
        self.assertEqual({cost: round(delta.percent or 0, 6) for cost, delta in found.items()},
                         {"rate": -50, "energy": 100, "time": 0})
        self.assertEqual(
            (found["rate"].anchor, found["rate"].test), ("libx264 fast", "libx265 fast")
        )
        short = ffdist.deltas_of(rows[:3] + rows[4:])
        self.assertEqual({delta.why for delta in short}, {"fewer than 4 points"})

    def test_the_front_holds_what_no_other_beats(self) -> None:
        self.assertEqual(
            ffdist.front_of([(1, 5), (2, 2), (3, 3), (5, 1), (2, 2), (5, 2)]), {0, 1, 3, 4}
        )
        self.assertEqual(ffdist.front_of([(1, 2, 3), (1, 2, 2), (0, 9, 9)]), {1, 2})
        self.assertEqual(ffdist.front_of([]), set())

    def test_intervals_of_repeats_and_of_a_jobs_own_runs(self) -> None:
        rows = rows_of(*(job_of(metrics={"duration": value}) for value in (9.0, 10.0, 11.0)))
        mean, = ffdist.mean_rows(rows, lambda row: row.label)
        low, high = mean.interval("duration") or (0, 0)
        self.assertEqual((mean.figure("duration"), mean.jobs), (10, 3))
        self.assertAlmostEqual(low, 10 - 4.303 / 3 ** 0.5, 3)
        self.assertAlmostEqual(high, 10 + 4.303 / 3 ** 0.5, 3)
        told = rows_of(
            job_of(statistics={"duration": {"n": 5, "ci95_low": 9.5, "ci95_high": 10.5}})
        )
        self.assertEqual(
            ffdist.mean_rows(told, lambda row: row.label)[0].interval("duration"), (9.5, 10.5)
        )
        self.assertIsNone(ffdist.mean_rows(rows[:1], lambda row: row.label)[0].interval("duration"))

    def test_ticks_are_round_and_within(self) -> None:
        self.assertEqual(ffdist._ticks(0, 22, False), [0, 5, 10, 15, 20])
        self.assertEqual(ffdist._ticks(900, 12000, True), [1000, 2000, 5000, 10000])
        for low, high in ((0.9851, 0.9952), (33.9, 45.3), (1e-6, 3e-6), (0, 1), (7, 7.0001)):
            ticks = ffdist._ticks(low, high, False)
            self.assertTrue(2 <= len(ticks) <= 7, ticks)
            self.assertTrue(low <= ticks[0] and ticks[-1] <= high * (1 + 1e-9), ticks)


class Page(html.parser.HTMLParser):
    """The tags and the text of a page, and whether every tag is closed in its order."""

    VOID = ("meta", "!doctype")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


class TestPages(unittest.TestCase):
    def ladder(self, **more: Any) -> list[Row]:
        return rows_of(*(job_of(encoder, crf, node, joules * (1 + crf / 100), **more)
                         for encoder, joules in (("libx264", 90.0), ("libx265", 150.0))
                         for node in ("worker-01", "worker-02") for crf in (20, 25, 30, 35)))

    def test_a_page_holds_every_plot_and_table_and_fetches_nothing(self) -> None:
        series = {
            "seconds": [0, 1, 2, 3],
            "power_watts": [90, None, 100.5, 95],
            "cpu_usage": [5, 6, 7, 8],
        }
        rows = self.ladder(series=series, metrics={"idle_watts": 30.0})
        text = ffdist.report_html(document(rows))
        page = Page(text)
        said = " ".join(page.text)
        for words in (
            "PSNR over rate",
            "Pareto front: PSNR over time",
            "Pareto front: PSNR over energy",
            "Time by node: worker-01, worker-02",
            "Energy by node",
            "Power of job 550e8400",
            "CPU use of job",
            "Means by rendition",
            "Speed and size",
            "Quality",
            "Energy, money and carbon",
            "BD-rate",
            "BD-energy",
            "BD-time",
            "no <log> of frames",
            "16 completed",
        ):
            self.assertIn(words, said)
        self.assertEqual(
            set(page.tags) & {"script", "link", "img", "iframe", "object", "base"}, set()
        )
        self.assertEqual(re.findall(r"https?://|url\(|@import|src=", text), [])

    def test_plots_are_well_formed_and_told_apart_without_colour(self) -> None:
        text = ffdist.report_html(document(self.ladder()))
        for svg in re.findall(r"<svg.*?</svg>", text):
            xml.etree.ElementTree.fromstring(svg)
            self.assertNotRegex(svg, "nan|inf")
        plot = re.findall(r"<svg viewBox=\"0 0 480.*?</svg>", text)[0]
        lines = re.findall(r'stroke-dasharray="(.*?)"', plot)
        marks = set(re.findall(r'<path d="(.*?)" transform', plot))
        self.assertEqual((len(lines), len(set(lines)), len(marks)), (2, 2, 2))

    def test_every_text_is_escaped(self) -> None:
        evil = "<script>alert(1)</script>&"
        text = ffdist.report_html(
            ffdist.Document(
                evil,
                rows_of(
                    *(
                        job_of(
                            evil,
                            crf,
                            evil,
                            metrics={"currency": evil, "energy_cost": 1, "unknown": {"ssim": evil}},
                        )
                        for crf in (20, 25, 30, 35)
                    ),
                    job_of(status="failed", error=evil),
                    job_of(settings={"input": evil, "codec": evil}),
                ),
                evil,
            )
        )
        self.assertNotIn("<script", text)
        self.assertNotIn("script", Page(text).tags)
        self.assertGreater(text.count("&lt;script&gt;alert(1)"), 20)

    def test_unknown_energy_is_shown_with_its_reason(self) -> None:
        rows = rows_of(
            *(
                job_of(crf=crf, joules=None, series={"seconds": [0, 1], "cpu_usage": [3, 4]})
                for crf in (20, 25, 30)
            )
        )
        said = " ".join(Page(ffdist.report_html(document(rows))).text)
        self.assertIn("so the front is of quality and time: no RAPL: a virtual machine", said)
        self.assertIn("power is unknown: ", said)
        self.assertNotIn("Energy by node", said)

    def test_an_estimate_is_marked_wherever_it_stands(self) -> None:
        rows = rows_of(job_of(metrics={"energy_estimated": True}))
        text = ffdist.report_html(document(rows))
        self.assertIn("~ marks energy that is estimated", text)
        self.assertIn(">~1300<", text)
        self.assertIn("~0.361 Wh", str(ffdist.report_rows(rows)))
        line, = csv.DictReader(io.StringIO(ffdist.report_csv(document(rows))))
        self.assertEqual(line["energy_estimated"], "True")
        self.assertEqual(
            ffdist.figure_text(
                {"energy_estimated": True, "carbon_g": 2, "duration": 3}, "carbon_g"
            ),
            "~2.00 g",
        )
        both = self.ladder(metrics={"energy_estimated": True, "power_source": "model"},
                           series={"seconds": [0, 1], "power_watts": [9, 8]})
        said = Page(ffdist.report_html(document(both))).text
        self.assertEqual(said.count("power, W (estimated)"), 1)
        self.assertEqual(sum(text.startswith("~ Power of job") for text in said), 1)
        self.assertGreater(said.count("energy, J (estimated)"), 1)
        self.assertNotIn("time, s (estimated)", said)
        self.assertEqual(
            {
                (delta.cost, (delta.text() or "")[0])
                for delta in ffdist.deltas_of(both)
                if delta.percent is not None
            },
            {("rate", "+"), ("energy", "~"), ("time", "+")},
        )

    def test_a_mean_of_which_a_part_is_estimated_is_marked(self) -> None:
        rows = rows_of(job_of(), job_of(node="worker-02", metrics={"energy_estimated": True}))
        mean, = ffdist.mean_rows(rows, lambda row: row.curve)
        self.assertEqual(ffdist.figure_text(mean.metrics, "energy_joules"), "~1300 J")

    def test_tables_over_several_films_name_them(self) -> None:
        rows = rows_of(job_of(), job_of(settings={"input": "b/a.mov"}))
        for one, words in ((rows[:1], 0), (rows, 1)):
            said = " ".join(Page(ffdist.report_html(document(one))).text)
            self.assertEqual("film what node job time, s" in said, bool(words))
            self.assertEqual("b/a.mov" in str(ffdist.report_rows(one)), bool(words))

    def test_few_or_no_results_make_a_page_too(self) -> None:
        for rows in (
            [],
            rows_of(job_of()),
            rows_of(job_of(joules=None)),
            rows_of(job_of(metrics={"duration": 0, "bitrate_kbps": 0, "psnr_db": 0})),
            rows_of(job_of(scenario="baseline")),
        ):
            Page(ffdist.report_html(document(rows)))

    def test_csv_has_every_figure_and_no_formula(self) -> None:
        rows = rows_of(job_of("=cmd()", joules=None, metrics={"currency": "=1+1"}, error="\t=1"))
        line, = csv.DictReader(io.StringIO(ffdist.report_csv(document(rows))))
        self.assertEqual((line["curve"], line["psnr_db"], line["currency"]),
                         ("'=cmd() fast", "35.0", "'=1+1"))
        self.assertEqual((line["energy_joules"], line["error"]), ("", "?=1"))
        self.assertEqual(json.loads(line["unknown"])["energy_joules"], "no RAPL: a virtual machine")

    def test_json_has_rows_and_deltas(self) -> None:
        made = json.loads(ffdist.report_json(document(self.ladder())))
        self.assertEqual((len(made["rows"]), made["rows"][0]["metrics"]["psnr_db"]), (16, 35.0))
        self.assertIn("rate", {delta["cost"] for delta in made["deltas"]})

    def test_the_terminal_has_no_column_that_nothing_is_known_for(self) -> None:
        heads = ffdist.report_rows(rows_of(job_of(joules=None)))[0]
        self.assertEqual(heads, ("JOB", "STATUS", "NODE", "TIME", "RATE", "QUALITY", "WHAT"))


if __name__ == "__main__":
    unittest.main()
