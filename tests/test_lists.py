"""Lists of jobs, results, nodes and log lines: every filter, every cursor, and a size that is
bounded.

What a list shows is compared with a plain search of the journal's rows, while jobs come, run, end,
are retried and expire, and masters end and start. Blocks are made small, so that there are many.
"""
from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import sqlite3
import tempfile
import unittest
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import ffdist
from agent import Client
from tests.fleet import Case, Node, run
from tests.support import TOP

LOG = logging.getLogger("ffdist.test-lists")
LOG.addHandler(logging.NullHandler())
LOG.propagate = False
SEED = int(os.environ.get("FFDIST_TEST_SEED", "20251229"))
SCENARIOS = ("a", "b", "rare")
NOWHERE = "00000000-0000-4000-8000-000000000000"


class Journaled(unittest.TestCase):
    """A master in this process, with small blocks; time is a number that the test moves."""

    BLOCK, PART = 16, 2

    def setUp(self) -> None:
        self.now = 1000.0
        patch = mock.patch.multiple(ffdist, BLOCK=self.BLOCK, PART=self.PART)
        patch.start()
        self.addCleanup(patch.stop)
        place = tempfile.TemporaryDirectory(prefix="ffdist-lists-")
        self.addCleanup(place.cleanup)
        self.folder = Path(place.name) / "m"
        self.start()
        self.addCleanup(lambda: self.master.close())
        self.nodes = [self.register(f"n{number}") for number in range(3)]

    def start(self) -> None:
        self.master = ffdist.Master(self.folder, ffdist.Settings(), LOG, lambda: self.now,
                                    lambda: self.now + 1e9)

    def register(self, name: str, **more: str) -> str:
        self.now += 1
        body = {"address": name, "max_concurrent_jobs": 4, **more}
        return str(self.master.register(body)[1]["id"])

    def submit(self, *scenarios: str) -> list[str]:
        drafts = [ffdist.draft_of({"scenario": word}, 3) for word in scenarios]
        return [job.id for job in self.master.submit(drafts)[1]]

    def claim(self, node_id: str) -> ffdist.Job | None:
        asked = ffdist.Ask(node_id, None, 0.0, 0, None, False)
        job: ffdist.Job | None = self.master.claim(asked).get("job")
        return job

    def report(self, job: ffdist.Job, node_id: str, status: str = "completed") -> None:
        body = {"job_id": job.id, "node_id": node_id, "attempt": job.attempt, "status": status}
        if status == "failed":
            body.update(error="no film", failure_reason="input")
        self.master.report(body)

    def finish(self, count: int, scenario: str = "a", status: str = "completed") -> None:
        for _ in range(count):
            self.submit(scenario)
            job = self.claim(self.nodes[0])
            assert job is not None
            self.report(job, self.nodes[0], status)

    @contextlib.contextmanager
    def disk(self) -> Iterator[sqlite3.Connection]:
        path = self.folder / ffdist.JOURNAL
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            yield connection

    def noted(self, kind: str) -> list[int]:
        with self.disk() as connection:
            query = "SELECT DISTINCT block FROM blocks WHERE kind=? ORDER BY block"
            return [row[0] for row in connection.execute(query, (kind,))]

    def listed(self, kind: str, filters: Mapping[str, str], limit: int) -> tuple[list[str], int]:
        """Return the ids of the jobs of all pages, and the total."""
        found: list[str] = []
        before: int | None = None
        while True:
            page = getattr(self.master.queries, kind)(filters, before, limit)
            found += [json.loads(text)["id" if kind == "jobs" else "job_id"] for text in page.rows]
            if page.cursor is None:
                return found, page.total
            self.assertEqual(len(page.rows), limit)
            before = int(page.cursor)

    def rows(self, kind: str) -> list[tuple[str, str, str, str]]:
        """Return (id, status, scenario, node id) of each row, newest first."""
        column = "id" if kind == "jobs" else "json_extract(body, '$.job_id')"
        query = (f"SELECT {column}, status, scenario, node_id FROM {kind} NOT INDEXED "
                 "ORDER BY seq DESC")
        with self.disk() as connection:
            return connection.execute(query).fetchall()

    def filters(self) -> Iterator[dict[str, str]]:
        for status in (None, *ffdist.STATUSES):
            for scenario in (None, "nothing", *SCENARIOS):
                for node_id in (None, NOWHERE, *self.nodes):
                    words = {"status": status, "scenario": scenario, "node_id": node_id}
                    yield {name: word for name, word in words.items() if word is not None}

    def check(self, source: random.Random) -> None:
        for kind in ("jobs", "results"):
            rows = self.rows(kind)
            for filters in self.filters():
                expected = [
                    row[0] for row in rows
                    if filters.items() <= dict(zip(ffdist.FILTERS, row[1:])).items()]
                found, total = self.listed(kind, filters, source.choice((1, 3, 7, 100)))
                self.assertEqual((found, total), (expected, len(expected)), (kind, filters))


class TestWalk(Journaled):
    """Each list is what a search of all rows finds, whatever happened before."""

    BLOCK, PART = 8, 1

    def test_lists_agree_with_the_rows_whatever_happens(self) -> None:
        for seed in (SEED, SEED + 1):
            with self.subTest(seed=seed):
                self.walk(random.Random(seed))

    def walk(self, source: random.Random) -> None:
        for number in range(1, 501):
            self.step(source)
            if number % 100 == 0:
                self.check(source)
        self.assertGreater(len(self.noted("jobs")), 1)
        self.assertGreater(len(self.noted("results")), 1)

    def step(self, source: random.Random) -> None:
        self.now += 1
        choice = source.random()
        if choice < 0.2:
            words = source.choices(SCENARIOS, (10, 10, 1), k=source.randrange(1, 4))
            self.submit(*words)
        elif choice < 0.9:
            node = source.choice(self.nodes)
            job = self.claim(node)
            if job is not None and source.random() < 0.9:
                status = source.choices(("completed", "failed", "returned"), (8, 1, 1))[0]
                self.report(job, node, status)
        elif choice < 0.98:
            self.order(source)
        elif choice < 0.99:
            self.master.settings = ffdist.Settings(keep_jobs=source.choice((50, 150)))
            while self.master.expire(7):
                pass
        else:
            self.master.close()
            self.start()

    def order(self, source: random.Random) -> None:
        rows = self.rows("jobs")
        verbs = ("retry", "cancel", "pause", "resume", "resume")
        if rows:
            with contextlib.suppress(ffdist.ApiError):
                self.master.order(source.choice(rows)[0], source.choice(verbs))


class TestBlocks(Journaled):
    """Which blocks of numbers are noted, and passed over."""

    def test_a_list_passes_over_the_blocks_and_parts_without_a_match(self) -> None:
        self.finish(40)
        self.finish(1, "rare")
        self.finish(60)
        self.submit("a")
        found: dict[str, list[int]] = {}
        with self.disk() as connection:
            for word in ("rare", "nothing", "a"):
                found[word] = list(ffdist._blocks(connection, "jobs", {"scenario": word}, 1 << 60))
            spans = ffdist._spans(connection, "jobs", {"scenario": "rare"}, 2)
        self.assertEqual(found, {"rare": [6, 2], "nothing": [6], "a": [6, 5, 4, 3, 2, 1, 0]})
        self.assertEqual(spans, [(40, 42)])

    def test_where_the_total_is_none_nothing_is_read(self) -> None:
        self.finish(3)
        reader = self.master.journal.reader
        with mock.patch.object(reader, "job_page") as jobs, \
                mock.patch.object(reader, "result_page") as results:
            self.assertEqual(self.listed("jobs", {"scenario": "b"}, 5), ([], 0))
            self.assertEqual(self.listed("results", {"status": "failed"}, 5), ([], 0))
        self.assertEqual((jobs.called, results.called), (False, False))

    def test_a_block_is_noted_when_its_last_job_has_ended_and_not_after_a_retry(self) -> None:
        first, *_ = self.submit(*["a"] * 40)
        for _ in range(36):
            job = self.claim(self.nodes[0])
            assert job is not None
            if job.id != first:
                self.report(job, self.nodes[0])
            else:
                open_one = job
        self.assertEqual((self.noted("jobs"), self.noted("results")), ([1], [0, 1]))
        self.report(open_one, self.nodes[0])
        self.assertEqual(self.noted("jobs"), [0, 1])
        self.master.order(first, "retry")
        self.assertEqual(self.noted("jobs"), [1])

    def test_after_a_restart_the_end_of_the_last_open_job_is_known_too(self) -> None:
        open_one = self.submit("a")[0]
        self.master.order(open_one, "pause")
        self.finish(20)
        self.master.close()
        self.start()
        self.assertEqual(self.noted("jobs"), [])
        self.master.order(open_one, "cancel")
        self.assertEqual(self.noted("jobs"), [0])

    def test_a_block_with_an_open_job_is_not_noted_whatever_the_order_in_one_commit(self) -> None:
        self.finish(20)
        self.assertEqual(self.noted("jobs"), [0])
        id_of_third = self.rows("jobs")[-3][0]
        job = self.master.queries.find(id_of_third)
        again = ffdist.advance(job, "retry", 1e9)
        step = self.master._transactions._fleet.state
        step.list_block("jobs", 0)
        step.write("state", again.status, None, again.state_json(), None, again.seq)
        step.write("unlist", 0)
        ticket = self.master.journal.write(step.effects.writes)
        assert ticket is not None
        ticket.wait()
        self.assertEqual(self.noted("jobs"), [])

    def test_numbers_of_a_noted_block_are_not_given_again(self) -> None:
        self.finish(40)
        with self.disk() as connection:
            connection.execute("DELETE FROM jobs WHERE seq > 20")
            connection.execute("DELETE FROM results WHERE seq > 20")
        self.master.close()
        self.start()
        self.submit("b")
        self.finish(1)
        with self.disk() as connection:
            last = [connection.execute(f"SELECT max(seq) FROM {kind}").fetchone()[0]
                    for kind in ("jobs", "results")]
        self.assertEqual(last, [33, 32])

    def test_what_is_noted_goes_with_the_last_row_of_its_block(self) -> None:
        self.finish(60)
        self.assertEqual((self.noted("jobs"), self.noted("results")), ([0, 1, 2], [0, 1, 2]))
        self.master.settings = ffdist.Settings(keep_jobs=20)
        while self.master.expire(7):
            pass
        self.assertEqual((self.noted("jobs"), self.noted("results")), ([2], [2]))

    def test_a_recovered_journal_notes_its_blocks_anew(self) -> None:
        self.finish(60)
        open_one = self.submit("b")[0]
        self.master.close()
        (self.folder / ffdist.DAMAGED).write_text("the test says so")
        self.start()
        self.assertEqual((self.noted("jobs"), self.noted("results")), ([0, 1, 2], [0, 1, 2]))
        self.assertEqual(self.listed("jobs", {"scenario": "b"}, 9), ([open_one], 1))
        self.check(random.Random(SEED))


class TestTotals(unittest.TestCase):
    def test_totals_are_the_sums_of_the_counts(self) -> None:
        source = random.Random(SEED)
        totals = ffdist.Totals({("jobs", "failed", "a", "n1"): 2})
        keys = [("jobs", status, scenario, node) for status in ("completed", "failed")
                for scenario in ("a", "b") for node in ("", "n1", "n2")]
        for _ in range(500):
            key = source.choice(keys)
            step = source.choice((1, -1)) if totals.counts.get(key, 0) > 0 else 1
            self.assertEqual(totals.add(key, step), totals.counts.get(key, 0))
        self.assertNotIn(0, [*totals.counts.values(), *totals._sums.values()])
        for filters in ({}, {"status": "failed"}, {"scenario": "b"}, {"node_id": "n2"},
                        {"scenario": "b", "node_id": "n2"}, {"status": "failed", "node_id": "n1"}):
            expected = sum(count for (_, status, scenario, node), count in totals.counts.items()
                           if filters.items() <= {"status": status, "scenario": scenario,
                                                  "node_id": node}.items())
            self.assertEqual(totals.of("jobs", filters), expected, filters)
        self.assertEqual(totals.of("results", {}), 0)


class TestFormerLists(Case):
    """Journals of a format without blocks."""

    def former(self, jobs: int) -> Path:
        """Return the folder of a journal of format 4, with so many ended jobs more."""
        folder = self.folder / "master"
        ffdist.wire.make_private_folder(folder)
        text = (TOP / "tests" / "journals" / "format-4.sql").read_text(encoding="utf-8")
        with contextlib.closing(sqlite3.connect(folder / ffdist.JOURNAL)) as journal:
            journal.executescript(text)
            numbers = range(10, 10 + jobs)
            journal.executemany(
                "INSERT INTO jobs SELECT ?, ?, status, ?, node_id, spec, state, ended FROM jobs "
                "WHERE seq=1", [(n, str(uuid.UUID(int=n)), f"s{n % 7}") for n in numbers])
            journal.executemany(
                "INSERT INTO results SELECT ?, status, ?, node_id, body, ? FROM results "
                "WHERE seq=1", [(n, f"s{n % 7}", n) for n in numbers])
            journal.commit()
        return folder

    def test_all_blocks_but_those_of_open_jobs_are_noted(self) -> None:
        folder = self.former(9 * ffdist.BLOCK)
        journal = ffdist.Journal(folder, self.fail)
        self.addCleanup(journal.close)
        with contextlib.closing(sqlite3.connect(folder / ffdist.JOURNAL)) as connection:
            found = {kind: [row[0] for row in connection.execute(
                "SELECT DISTINCT block FROM blocks WHERE kind=? ORDER BY block", (kind,))]
                for kind in ("jobs", "results")}
        # The first block has the jobs that are open, the last one is not full.
        self.assertEqual(found, {"jobs": [*range(1, 9)], "results": [*range(9)]})
        page, has_more = journal.reader.job_page({"scenario": "s3"}, 3000, 500)
        self.assertEqual([job.seq for job in page], [n for n in range(2999, 9, -1) if n % 7 == 3])
        self.assertFalse(has_more)

    def test_a_start_that_takes_long_says_why(self) -> None:
        for patience_s, count in ((60.0, 0), (0.0, 2)):
            with self.subTest(patience_s), mock.patch.object(ffdist, "PATIENCE_S", patience_s):
                folder = self.former(5000)
                lines: list[str] = []
                ffdist.Journal(folder, self.fail, lines.append).close()
                self.assertEqual(len(lines), count, lines)
                if lines:
                    self.assertIn(f"from format 4 to {ffdist.FORMAT}", lines[0])
                    self.assertIn(f"format {ffdist.FORMAT} now", lines[1])
                (folder / ffdist.JOURNAL).unlink()


class TestBytes(Journaled):
    """A page ends when its rows reach a bound; the next one goes on there."""

    def setUp(self) -> None:
        super().setUp()
        patch = mock.patch.object(ffdist, "PAGE_BYTES", 20_000)
        patch.start()
        self.addCleanup(patch.stop)

    def pages(self, path: str, field: str, query: Mapping[str, str]) -> list[Any]:
        """Return the answers to a list, page by page, as a client follows them."""
        route, _ = ffdist.route_of("GET", path)
        found: list[Any] = []
        after: dict[str, str] = {}
        while True:
            request = ffdist.Request(self.master, "", {**query, **after}, None)
            answer = route.handler(request)
            assert answer is not None
            page = json.loads(answer[1].text)
            self.assertEqual(page["count"], len(page[field]))
            found.append((len(answer[1].text), page[field], page["total"]))
            if page["next"] is None:
                return found
            after = {"after": page["next"]}

    def test_a_page_of_large_jobs_ends_early_and_no_job_is_lost(self) -> None:
        drafts = [ffdist.draft_of({"scenario": "a", "note": f"{number} " * 1000}, 3)
                  for number in range(30)]
        ids = [job.id for job in self.master.submit(drafts)[1]]
        pages = self.pages("/jobs", "jobs", {"limit": "1000"})
        self.assertEqual([job["id"] for page in pages for job in page[1]], ids[::-1])
        self.assertGreater(len(pages), 3)
        for size, _, total in pages:
            self.assertLess(size, 2 * ffdist.PAGE_BYTES)
            self.assertEqual(total, 30)

    def test_a_job_larger_than_a_page_is_a_page(self) -> None:
        for _ in range(3):
            draft = ffdist.draft_of({"scenario": "a", "note": "x" * 50_000}, 3)
            self.master.submit([draft])
        self.assertEqual([len(page[1]) for page in self.pages("/jobs", "jobs", {})], [1, 1, 1])

    def test_progress_counts_too(self) -> None:
        self.submit(*["a"] * 4)
        for _ in range(4):
            job = self.claim(self.nodes[0])
            assert job is not None
            body = {"node_id": self.nodes[0], "attempt": 1, "progress": {"phase": "x" * 15_000}}
            self.master.progress(job.id, body)
        self.assertEqual([len(page[1]) for page in self.pages("/jobs", "jobs", {})], [2, 2])

    def test_results(self) -> None:
        for _ in range(8):
            self.submit("a")
            job = self.claim(self.nodes[0])
            assert job is not None
            self.master.report({"job_id": job.id, "node_id": self.nodes[0], "attempt": 1,
                                "status": "completed", "note": "x" * 9000})
        pages = self.pages("/results", "results", {"scenario": "a"})
        self.assertEqual([len(page[1]) for page in pages], [3, 3, 2])
        self.assertEqual([number for number, _, _ in self.master.queries.ended_after(0, 100)],
                         [1, 2, 3], "what is pushed is read by such pages too")

    def test_no_row_is_read_beyond_the_page(self) -> None:
        self.submit(*["a"] * 50)
        read: list[str] = []
        with self.disk() as connection:
            connection.set_trace_callback(read.append)
            rows, has_more = ffdist._page(connection, "jobs", "spec", {"status": "pending"}, None,
                                          1000)
        rows_read = [words for words in read if words.startswith("SELECT spec")]
        self.assertEqual((len(rows_read), has_more), (len(rows), True))

    def test_nodes_go_on_also_where_the_last_of_a_page_is_removed(self) -> None:
        ids = [self.register(f"m{number}", note="x" * 6000) for number in range(9)]
        found = self.pages("/nodes", "nodes", {})
        self.assertEqual([node["id"] for page in found for node in page[1]], [*self.nodes, *ids])
        self.assertEqual([len(page[1]) for page in found], [7, 4, 1])
        found = self.pages("/nodes", "nodes", {"limit": "5"})
        self.assertEqual([len(page[1]) for page in found], [5, 4, 3])

        first = self.master.queries.nodes(limit=5)
        last = json.loads(first.rows[-1])["id"]
        self.master.forget(last)
        request = ffdist.Request(self.master, "", {"after": str(first.cursor)}, None)
        answer = ffdist._nodes(request)
        assert answer is not None
        page = json.loads(answer[1].text)
        self.assertEqual(page["nodes"][0]["id"], ids[2])
        self.assertEqual(page["total"], 11)

    def test_a_cursor_that_is_none_is_refused(self) -> None:
        request = ffdist.Request(self.master, "", {"after": "yesterday"}, None)
        with self.assertRaises(ffdist.ApiError) as refused:
            ffdist._nodes(request)
        self.assertEqual((refused.exception.status, refused.exception.field), (400, "after"))

    def test_log_lines_are_cut_anywhere(self) -> None:
        job_id = self.submit("a")[0]
        job = self.claim(self.nodes[0])
        assert job is not None
        lines = [f"{number} {'x' * (number % 3 * 900)}" for number in range(100)]
        for start in range(0, 100, 25):
            self.master.progress(job.id, {
                "node_id": self.nodes[0], "attempt": 1, "lines": lines[start:start + 25],
                "lines_from": start})
        found: list[str] = []
        parts = 0
        while True:
            part = self.master.queries.logs(job_id, len(found), 0.0)
            assert part is not None
            if not part["lines"]:
                break
            found += part["lines"]
            parts += 1
            self.assertEqual(part["next"], len(found))
            self.assertLess(len(json.dumps(part["lines"])), 2 * ffdist.PAGE_BYTES)
        self.assertEqual(found, lines)
        self.assertGreater(parts, 3)

    def test_the_page_for_people_has_a_part_of_a_large_fleet(self) -> None:
        with mock.patch.object(ffdist, "HOME_NODES", 2):
            route, _ = ffdist.route_of("GET", "/")
            answer = route.handler(ffdist.Request(self.master, "", {}, None))
        assert answer is not None
        self.assertIn("<h2>Nodes (the first 2 of 3)</h2>", answer[1].text)


class TestClients(Case):
    """What the client and the command line show is not cut: they go on to the next page."""

    def test_large_jobs_and_nodes(self) -> None:
        master = self.master()
        for number in range(12):
            Node(master, f"n{number}", note="x" * 600_000)
            body = {"scenario": "a", "note": "x" * 600_000}
            self.assertEqual(master.call("POST", "/jobs", body).status, 201)
        page = master.get("/jobs?limit=1000")
        self.assertTrue(0 < page["count"] < 12 and page["next"], page["count"])
        with contextlib.closing(Client(master.url)) as client:
            nodes = client.nodes()
            jobs = client.jobs({"limit": "10"})
            every = client.jobs({"limit": 1000})
        self.assertEqual((len(nodes.items), nodes.next), (12, None))
        self.assertEqual((len(jobs.items), jobs.count, jobs.total), (10, 10, 12))
        self.assertEqual((len({job.id for job in every.items}), every.next), (12, None))
        self.assertEqual(len(every.json["jobs"]), 12)

        done = run(str(TOP / "ffdist.py"), "jobs", "--limit", "10", "--json", "--master",
                   master.url, folder=self.folder)
        shown = json.loads(done.stdout)
        self.assertEqual((len(shown["jobs"]), shown["next"]), (10, jobs.next))
        done = run(str(TOP / "ffdist.py"), "nodes", "--master", master.url, folder=self.folder)
        self.assertEqual(len(done.stdout.splitlines()), 1 + 12)


if __name__ == "__main__":
    unittest.main()
