"""The durable record: real masters killed at any moment, full disks, folders that cannot be used.

What was acknowledged is there after `kill -9`; what was not may be there or not, but never in part.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
import unittest
import uuid
from pathlib import Path
from typing import Any
from unittest import mock

import ffdist
from tests.fleet import Case, Master, Node, run
from tests.support import TOP, call, free_port, listening_log, small_disk, wait_for

LOG = logging.getLogger("ffdist.test-journal")
LOG.addHandler(logging.NullHandler())
LOG.propagate = False
SEED = int(os.environ.get("FFDIST_TEST_SEED", "20251229"))


def record_of(master: Master) -> dict[str, Any]:
    """Return all that a master tells, without what lives in memory only (progress, heartbeats)."""
    jobs = master.get("/jobs?limit=1000")
    details = {}
    for job in jobs["jobs"]:
        detail = master.get(f"/jobs/{job['id']}")
        detail["lines"] = master.get(f"/jobs/{job['id']}/logs")["lines"]
        details[job["id"]] = {**detail, "progress": None}
    nodes = {
        node["id"]: {
            **node,
            "last_heartbeat": None,
            "jobs": master.get(f"/nodes/{node['id']}")["jobs"],
        }
        for node in master.get("/nodes")["nodes"]
    }
    counts = {
        path: master.get(path)["total"]
        for path in (
            "/jobs",
            "/results",
            "/jobs?status=pending",
            "/jobs?status=completed",
            "/jobs?scenario=a",
        )
    }
    return {
        "order": [job["id"] for job in jobs["jobs"]],
        "jobs": details,
        "nodes": nodes,
        "counts": counts,
        "results": master.get("/results?limit=1000")["results"],
    }


class TestKill(Case):
    """kill -9, and the same state again."""

    def test_jobs_results_nodes_leases_and_orders_are_as_acknowledged(self) -> None:
        master = self.master()
        worker, other = (
            Node(master, "worker", max_concurrent_jobs=4, cpu_threads=8),
            Node(master, "other"),
        )
        gone = Node(master, "gone")
        first = [master.submit("a", bitrate="5M") for _ in range(8)]
        done, failed, canceling, running = (
            worker.claim(claim=f"word-{n}").body["job"] for n in range(4)
        )
        returned = other.claim(claim="returned").body["job"]
        worker.progress(running, lines=["one", "two"], lines_from=0, progress=12)
        worker.report(
            done,
            metrics={"duration": 1.5, "unknown": {"vmaf": "not asked for"}},
            lines=["end"],
            lines_from=0,
        )
        worker.report(failed, "failed", error="no such file\nat all", failure_reason="bad_input")
        other.report(returned, "returned")
        master.call("POST", f"/jobs/{canceling['id']}/cancel")
        master.call("POST", f"/jobs/{first[7]['id']}/cancel")
        gone.beat(leaving=True)
        before = record_of(master)
        master.kill()

        master = self.master(port=master.port)
        self.assertEqual(record_of(master), before)
        for node in (worker, other, gone):
            node.master = master
        self.assertEqual(worker.claim(claim="word-3").body["job"]["id"], running["id"],
                         "a claim is safe to repeat")
        self.assertIsNone(worker.claim(claim="word-0").body["job"])
        answer = worker.beat(seen=0).body
        self.assertEqual((answer["actions"], answer["orders"]),
                         ([{"job_id": canceling["id"], "attempt": 1, "action": "cancel"}], 1))
        self.assertEqual(worker.report(done).body, {"status": "success"})
        self.assertEqual(worker.progress(running, lines=["two", "three"], lines_from=1).status, 200)
        self.assertEqual(
            master.get(f"/jobs/{running['id']}/logs")["lines"], ["one", "two", "three"]
        )
        self.assertEqual(worker.report(canceling, "canceled").status, 200)
        self.assertEqual(worker.report(running).status, 200)
        again = other.claim().body["job"]
        self.assertEqual(
            (again["id"], again["attempt"]), (returned["id"], 2), "the place in line is kept"
        )
        self.assertEqual(other.claim().body["job"]["id"], first[5]["id"])

    def test_a_stop_and_a_kill_leave_the_same(self) -> None:
        master = self.master()
        node = Node(master)
        master.submit("a")
        node.claim()
        before = record_of(master)
        for end in (master.end, None, None):
            end() if end else master.kill()
            master = self.master(port=master.port)
            self.assertEqual(record_of(master), before)

    def test_a_job_taken_back_after_a_restart_keeps_its_lines_and_its_attempt(self) -> None:
        master = self.master("--node-timeout", "1s")
        node = Node(master)
        job = master.submit("a")
        job = node.claim().body["job"]
        node.progress(job, lines=["before"], lines_from=0)
        wait_for(lambda: master.get(f"/jobs/{job['id']}")["status"] == "pending")
        master.kill()
        node.master = master = self.master(port=master.port)
        answer = node.register(holding=[{"job_id": job["id"], "attempt": 1}])
        self.assertEqual(answer.body["holding"], [{"job_id": job["id"], "attempt": 1}])
        self.assertEqual(node.progress(job, lines=["after"], lines_from=1).status, 200)
        self.assertEqual(master.get(f"/jobs/{job['id']}/logs")["lines"], ["before", "after"])
        self.assertEqual(
            (node.report(job).status, master.get(f"/jobs/{job['id']}")["retry_count"]), (200, 0)
        )

    def test_silence_counts_only_while_the_master_listened(self) -> None:
        master = self.master("--node-timeout", "2s")
        node = Node(master)
        job = master.submit("a")
        node.claim()
        os.kill(master.pid, signal.SIGSTOP)
        time.sleep(3)  # the silence itself: longer than the node's time
        os.kill(master.pid, signal.SIGCONT)
        master.submit("b")
        self.assertEqual(master.get(f"/jobs/{job['id']}")["status"], "running")
        master.kill()
        master = self.master("--node-timeout", "2s", port=master.port)
        self.assertEqual(master.get(f"/nodes/{node.id}")["status"], "busy")

    def test_what_was_acknowledged_in_a_storm_is_there_after_the_kill(self) -> None:
        for number in range(2):
            with self.subTest(seed=SEED + number):
                self._storm(random.Random(SEED + number))

    def _storm(self, source: random.Random) -> None:
        master = self.master()
        nodes = [Node(master, f"n{number}") for number in range(2)]
        submitted: set[str] = set()
        ended: dict[str, str] = {}
        claimed: dict[str, tuple[int, str]] = {}
        canceled: set[str] = set()
        threads = [threading.Thread(target=self._until_it_dies, args=(step,)) for step in (
            *(lambda: self._submit(master, submitted) for _ in range(2)),
            *(lambda node=node: self._work(node, claimed, ended, canceled) for node in nodes))]
        for thread in threads:
            thread.start()
        goal = source.randrange(30, 150)
        wait_for(lambda: len(ended) > goal, why="some work is done")
        master.kill()
        for thread in threads:
            thread.join(30)
        master = self.master(port=master.port)
        found = {}
        after = ""
        while after is not None:
            page = master.get(f"/jobs?limit=1000{after}")
            found.update({job["id"]: job for job in page["jobs"]})
            after = page["next"] and f"&after={page['next']}"
        self.assertLessEqual(submitted, set(found))
        for job_id, status in ended.items():
            self.assertEqual(found[job_id]["status"], status)
        for job_id, (attempt, node_id) in claimed.items():
            if job_id not in ended and found[job_id]["attempt"] == attempt:
                self.assertEqual(found[job_id]["node_id"], node_id, found[job_id])
            self.assertGreaterEqual(found[job_id]["attempt"], attempt)
        results = master.get("/results?limit=1000")
        numbers = [(result["job_id"], result["attempt"]) for result in results["results"]]
        self.assertEqual(len(numbers), len(set(numbers)), "one accepted report for an attempt")
        for job_id in canceled - set(ended):
            self.assertTrue(
                found[job_id]["cancel_requested"] or found[job_id]["status"] == "canceled"
            )
        master.kill()

    @staticmethod
    def _until_it_dies(step: Any) -> None:
        while True:
            try:
                step()
            except (OSError, ValueError):
                return

    @staticmethod
    def _submit(master: Master, submitted: set[str]) -> None:
        answer = call(master.url, "POST", "/jobs", [{"scenario": "a"}, {"scenario": "b"}])
        if answer.status == 201:
            submitted.update(job["id"] for job in answer.body["jobs"])

    @staticmethod
    def _work(node: Node, claimed: dict[str, tuple[int, str]], ended: dict[str, str],
              canceled: set[str]) -> None:
        job = (node.claim(claim=uuid.uuid4().hex).body or {}).get("job")
        if job is None:
            return
        claimed[job["id"]] = (job["attempt"], node.id)
        if len(claimed) % 3 == 0:
            if node.master.call("POST", f"/jobs/{job['id']}/cancel").status == 200:
                canceled.add(job["id"])
            status = "canceled"
        else:
            status = "completed"
        if node.report(job, status).status == 200:
            ended[job["id"]] = status

    def test_an_array_is_on_disk_whole_or_not_at_all(self) -> None:
        master = self.master()
        jobs = [{"scenario": "x"}] * 6000
        answers: list[Any] = []

        def submit() -> None:
            try:
                answers.append(call(master.url, "POST", "/jobs", jobs).status)
            except (OSError, ValueError) as error:
                answers.append(error)
        disk = sqlite3.connect(self.folder / "master" / "journal.db")
        self.addCleanup(disk.close)
        sender = threading.Thread(target=submit)
        sender.start()
        seen = set()
        while not answers:
            seen.add(disk.execute("SELECT count(*) FROM jobs").fetchone()[0])
        sender.join()
        self.assertEqual(answers, [201])
        self.assertLessEqual(seen, {0, 6000}, "a part of an array was on disk")
        answers.clear()
        sender = threading.Thread(target=submit)
        sender.start()
        wait_for(lambda: answers or disk.execute("SELECT count(*) FROM jobs").fetchone()[0] != 6000)
        master.kill()
        sender.join()
        self.assertIn(self.master(port=master.port).get("/jobs")["total"], (6000, 12000))

    def test_a_master_starts_on_a_hundred_thousand_finished_jobs(self) -> None:
        folder = self.folder / "master"
        journal = ffdist.Journal(folder, lambda error: self.fail(error))
        journal.start()
        draft = ffdist.draft_of({"scenario": "720p30-h264"}, 3)
        many, node = 100_000, str(uuid.uuid4())
        new = ffdist.Job(1, "", draft.scenario, draft.spec, 1e9)
        done = ffdist.advance(ffdist.advance(new, "claim", 1e9 + 1, node), "complete", 1e9 + 9,
                              reported="completed")
        state = done.state_json()
        ids = [str(uuid.UUID(int=random.getrandbits(128), version=4)) for _ in range(many)]
        for start in range(0, many, 20_000):
            writes = [
                ("job", (seq, ids[seq - 1], "completed", draft.scenario, node, draft.spec, state))
                for seq in range(start + 1, start + 20_001)
            ]
            total = ("jobs", "completed", draft.scenario, node)
            ticket = journal.write([*writes, ("total", (total, start + 20_000))])
            assert ticket is not None
            ticket.wait()
        journal.close()

        master = self.master()
        for path, total in (
            ("/jobs", many),
            ("/jobs?status=completed", many),
            ("/jobs?status=pending", 0),
            (f"/jobs?node_id={node}", many),
            ("/jobs?scenario=720p30-h264&limit=1", many),
        ):
            self.assertEqual(master.get(path)["total"], total, path)
        self.assertEqual([job["id"] for job in master.get("/jobs?limit=3")["jobs"]], ids[:-4:-1])
        self.assertEqual(master.get(f"/jobs/{ids[50_000]}")["status"], "completed")
        worker = Node(master)
        job = master.submit("a")
        self.assertEqual(worker.claim().body["job"]["id"], job["id"])
        retried = master.call("POST", f"/jobs/{ids[0]}/retry")
        self.assertEqual((retried.status, worker.claim().body["job"]["id"]), (200, ids[0]))
        self.assertEqual(master.get("/jobs?status=completed")["total"], many - 1)


class TestRefusal(Case):
    """A folder or a port that cannot be used: one clear line, exit code 1, nothing touched."""

    def refused(self, *flags: str, folder: Path | None = None, port: int = 0) -> str:
        before = self.files()
        data = folder or self.folder / "master"
        done = run(str(TOP / "ffdist.py"), "master", "--host", "127.0.0.1", "--port", str(port),
                   "--data-dir", str(data), *flags, folder=self.folder, timeout=60)
        self.assertEqual((done.returncode, done.stdout), (1, ""), done.stderr)
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assertTrue(done.stderr.startswith("ffdist: "), done.stderr)
        self.assertEqual(self.files(), before, "a trace was left")
        return done.stderr

    def files(self) -> dict[str, bytes]:
        return {
            str(path): path.read_bytes() if path.is_file() else b""
            for path in self.folder.rglob("*")
            if not path.name.endswith((".log", "-shm"))
        }

    def stopped(self, jobs: int = 3) -> Path:
        """Return the journal of a master that ran and was stopped."""
        master = self.master()
        master.call("POST", "/jobs", [{"scenario": "x"}] * jobs)
        master.end()
        return self.folder / "master" / "journal.db"

    def test_a_journal_of_a_newer_format(self) -> None:
        path = self.stopped()
        with sqlite3.connect(path) as journal:
            journal.execute("PRAGMA journal_mode=DELETE")
            journal.execute(f"PRAGMA user_version={ffdist.FORMAT + 1}")
        journal.close()
        words = self.refused()
        for word in (str(path), f"format {ffdist.FORMAT + 1}", "newer", "--data-dir"):
            self.assertIn(word, words)

    def test_a_journal_of_before_the_first_release(self) -> None:
        path = self.stopped()
        for number in (1, 2):
            with contextlib.closing(sqlite3.connect(path)) as journal:
                journal.execute("PRAGMA journal_mode=DELETE")
                journal.execute(f"PRAGMA user_version={number}")
            words = self.refused()
            for word in (
                str(path),
                f"format {number}",
                "before the first release",
                "empty --data-dir",
            ):
                self.assertIn(word, words)

    def test_a_folder_that_another_master_holds(self) -> None:
        master = self.master()
        words = self.refused()
        for word in (str(self.folder / "master"), "held by another master", "--data-dir"):
            self.assertIn(word, words)
        for file in {*(self.folder / "master").iterdir()} - {
            *(self.folder / "master").glob("journal*")
        }:
            file.unlink()
        self.assertIn(
            "held by another master", self.refused(), "no file that somebody may remove says so"
        )
        self.assertEqual(master.submit()["status"], "pending")

    def test_a_folder_that_cannot_be_written(self) -> None:
        (self.folder / "file").write_text("a file, no folder")
        self.assertIn("it is a file: name a folder; --data-dir names another",
                      self.refused(folder=self.folder / "file"))
        self.assertIn("cannot be used: no such file or directory; --data-dir",
                      self.refused(folder=Path("/proc/none")))
        words = self.refused(folder=self.folder / "file" / "data")
        for word in (str(self.folder / "file" / "data"), "--data-dir"):
            self.assertIn(word, words)
        if os.geteuid() != 0:
            (self.folder / "closed").mkdir(mode=0o500)
            self.assertIn("closed", self.refused(folder=self.folder / "closed" / "data"))

    def test_a_journal_that_may_only_be_read(self) -> None:
        path = self.stopped()
        path.chmod(0o400)
        if os.geteuid() == 0:
            for mount in (("--bind", str(path), str(path)), ("-o", "remount,bind,ro", str(path))):
                if subprocess.run(["mount", *mount], capture_output=True).returncode:
                    self.skipTest("a file cannot be mounted read-only here")
            self.addCleanup(subprocess.run, ["umount", "-l", str(path)], check=True)
        self.assertIn("may not be written", self.refused())

    def test_a_port_that_is_taken(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            words = self.refused(port=port)
        for word in (f"port {port}", "--port", "lsof"):
            self.assertIn(word, words)
        self.assertFalse((self.folder / "master").exists())

    def test_a_database_of_another_program_is_left_alone(self) -> None:
        folder = self.folder / "master"
        folder.mkdir(mode=0o700)
        with sqlite3.connect(folder / "journal.db") as other:
            other.execute("CREATE TABLE recipes(name TEXT)")
        other.close()
        self.assertIn("journal.db", self.refused())

    def test_an_empty_journal_is_a_new_one(self) -> None:
        (self.folder / "master").mkdir(mode=0o700)
        (self.folder / "master" / "journal.db").touch()
        self.assertEqual(self.master().get("/jobs")["total"], 0)

    def test_what_the_master_writes_is_its_own_alone(self) -> None:
        self.master().submit()
        for path in (self.folder / "master", *(self.folder / "master").iterdir()):
            self.assertEqual(path.stat().st_mode & 0o077, 0, path)


class TestRecovery(Case):
    """A damaged journal is set aside, and what can be read of it goes on."""

    def filled(self, jobs: int) -> tuple[Path, Master]:
        """Return the journal of a stopped master, with a result for each second job."""
        master = self.master()
        worker = Node(master, "worker")
        master.call("POST", "/jobs", [{"scenario": "a", "parameters": {"input": f"film-{n}.mov"}}
                                      for n in range(jobs)])
        for _ in range(jobs // 2):
            worker.report(
                worker.claim().body["job"], metrics={"duration": 1.5}, lines=["end"], lines_from=0
            )
        master.end()
        return self.folder / "master" / "journal.db", master

    def recovered(self, path: Path) -> Master:
        """Start a master on what is left of a journal; check what it says and that it works."""
        before = path.read_bytes()
        master = self.master(port=0)
        words = wait_for(
            lambda: "".join(line for line in master.words().splitlines() if "set aside" in line),
            why=master.words(),
        )
        aside = Path(words.split("set aside as ")[1].split(",")[0])
        self.assertEqual(aside.read_bytes(), before)
        self.assertEqual(master.get("/ready"), {"status": "ready"})
        jobs, results = master.get("/jobs?limit=1000"), master.get("/results?limit=1000")
        self.assertEqual((jobs["total"], results["total"]), (jobs["count"], results["count"]))
        self.assertIn(f"{jobs['total']} jobs, {results['total']} results were recovered", words)
        self.assertEqual(master.submit()["status"], "pending")
        return master

    def test_what_is_no_database_is_set_aside(self) -> None:
        path = self.folder / "master" / "journal.db"
        path.parent.mkdir(mode=0o700)
        path.write_bytes(b"a letter, no database\n" * 99)
        self.assertEqual(self.recovered(path).get("/jobs")["total"], 1)

    def test_what_stands_in_whole_pages_of_a_damaged_one_goes_on(self) -> None:
        path, _ = self.filled(600)
        whole = path.read_bytes()
        damaged = {"one page": whole[:4096],
                   "all but the first": whole[:4096] + b"\xff" * (len(whole) - 4096),
                   "cut": whole[:len(whole) // 2]}
        for name, content in damaged.items():
            with self.subTest(name):
                for old in path.parent.iterdir():
                    old.unlink()
                path.write_bytes(content)
                (path.parent.parent / "master.log").unlink()
                self.recovered(path).end()

    def test_a_lost_end_costs_no_more_than_what_stood_there(self) -> None:
        path, _ = self.filled(200)
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole) * 3 // 4])
        master = self.recovered(path)
        self.assertGreaterEqual(master.get("/jobs?limit=1")["total"], 100 + 1)
        self.assertEqual({file.name for file in path.parent.glob("*recovered*")}, set())

    def test_a_lost_first_page_costs_the_rows_and_leaves_them_to_sqlite3(self) -> None:
        path, _ = self.filled(200)
        whole = path.read_bytes()
        path.write_bytes(bytes(4096) + whole[4096:])
        master = self.recovered(path)
        self.assertEqual(master.get("/jobs?limit=1")["total"], 1)
        aside = next(path.parent.glob("journal-damaged-*.db"))
        self.assertIn(f"sqlite3 {aside} .recover", master.words())

    def test_the_log_of_an_empty_or_missing_journal_is_not_thrown_away(self) -> None:
        master = self.master()
        for _ in range(3):
            master.submit()
        master.kill()
        path = self.folder / "master" / "journal.db"
        log = Path(f"{path}-wal").read_bytes()
        for leave in (path.unlink, lambda: os.truncate(path, 0)):
            for old in path.parent.glob("journal*"):
                old.unlink()
            path.touch()
            leave()
            Path(f"{path}-wal").write_bytes(log)
            master = self.master()
            self.assertIn("its log is not", master.words())
            self.assertEqual(
                [file.read_bytes() for file in path.parent.glob("journal-damaged-*-wal")], [log]
            )
            self.assertEqual(master.submit()["status"], "pending")
            master.kill()

    def test_nothing_is_acknowledged_when_the_log_is_gone_or_the_journal_emptied(self) -> None:
        def cut(path: Path) -> None:
            os.truncate(path, path.stat().st_size // 2)

        def empty(path: Path) -> None:
            os.truncate(path, 0)
        for name, do in (("journal.db-wal", os.unlink), ("journal.db-wal", cut),
                         ("journal.db", empty)):
            with self.subTest(f"{do.__name__} {name}"):
                master = self.master(port=free_port())
                for _ in range(3):
                    master.submit()
                do(self.folder / "master" / name)
                refused = master.call("POST", "/jobs", {"scenario": "x"})
                self.assertEqual(refused.status, 503)
                self.assertIn(f"{name} was removed, replaced or cut", refused.body["error"])
                master.kill()
                shutil.rmtree(self.folder / "master")

    def test_a_journal_that_is_away_is_seen_though_nobody_writes(self) -> None:
        master = self.master()
        (self.folder / "master").rename(self.folder / "away")
        wait_for(lambda: master.call("GET", "/ready").status == 503, 10, "it is seen")
        self.assertEqual(call(master.url, "GET", "/metrics").status, 200)
        (self.folder / "away").rename(self.folder / "master")
        wait_for(lambda: master.call("GET", "/ready").status == 200, 10, "it is well again")

    def test_a_row_that_makes_no_job_is_left_out(self) -> None:
        path, _ = self.filled(4)
        with contextlib.closing(sqlite3.connect(path)) as journal:
            journal.execute("UPDATE jobs SET state='[]' WHERE seq=3")
            journal.execute("UPDATE jobs SET spec='[1]' WHERE seq=4")
            journal.commit()
        (path.parent / ffdist.DAMAGED).write_text("the test says so")
        self.assertEqual(self.recovered(path).get("/jobs?limit=1")["total"], 2 + 1)

    def test_nothing_is_acknowledged_while_the_journal_is_removed(self) -> None:
        master = self.master()
        before = master.submit()["id"]
        path = self.folder / "master" / "journal.db"
        path.rename(self.folder / "kept.db")
        refused = master.call("POST", "/jobs", {"scenario": "x"})
        self.assertEqual(refused.status, 503)
        self.assertIn("removed", refused.body["error"])
        self.assertIn("removed", master.call("GET", "/ready").body["error"])
        self.assertEqual(master.get(f"/jobs/{before}")["status"], "pending", "it can still be read")
        self.assertFalse(path.exists(), "no new file takes its place")
        (self.folder / "kept.db").rename(path)
        after = wait_for(lambda: master.call("POST", "/jobs", {"scenario": "x"}).body.get("id"))
        master.kill()
        self.assertEqual({job["id"] for job in self.master().get("/jobs")["jobs"]}, {before, after})


    def test_nothing_is_acknowledged_while_another_file_is_in_the_place_of_the_journal(
        self,
    ) -> None:
        master = self.master()
        master.submit()
        path = self.folder / "master" / "journal.db"
        (self.folder / "other.db").write_bytes(path.read_bytes())
        path.rename(self.folder / "kept.db")
        (self.folder / "other.db").rename(path)
        self.assertEqual(master.call("POST", "/jobs", {"scenario": "x"}).status, 503)
        self.assertIn("replaced", master.call("GET", "/ready").body["error"])
        (self.folder / "kept.db").rename(path)
        wait_for(lambda: master.call("POST", "/jobs", {"scenario": "x"}).status == 201)

    def test_what_is_left_of_lost_jobs_is_no_new_ones(self) -> None:
        path, _ = self.filled(60)
        with contextlib.closing(
            sqlite3.connect(path)
        ) as journal:  # as if the newest rows could not be read
            journal.execute("DELETE FROM jobs WHERE seq > 20")
            journal.execute("DELETE FROM results WHERE job_seq BETWEEN 11 AND 20")
            journal.execute("UPDATE results SET seq = seq - 10 WHERE job_seq > 20")
            journal.commit()
        (path.parent / ffdist.DAMAGED).write_text("the test says so")
        lost = self.recovered(path)
        self.assertEqual(lost.get("/results?limit=1")["total"], 20)
        newest = lost.get("/jobs?limit=1")["jobs"][0]["id"]
        self.assertEqual(lost.get(f"/jobs/{newest}/logs")["lines"], [])
        for job in lost.get("/jobs?limit=1000")["jobs"]:
            result = lost.get(f"/jobs/{job['id']}")["result"]
            self.assertIn(result and result["job_id"], (None, job["id"]))
        with contextlib.closing(sqlite3.connect(path)) as journal:
            orphans = "SELECT count(*) FROM results WHERE job_seq > 20"
            self.assertEqual(journal.execute(orphans).fetchone(), (0,))

    def test_single_damaged_pages_cost_no_more_than_what_stood_on_them(self) -> None:
        path, _ = self.filled(900)
        whole = bytearray(path.read_bytes())
        pages = [number for number in range(2, len(whole) // 4096)
                 if b"film-" in whole[number * 4096:number * 4096 + 4096]]
        chance = random.Random(SEED)
        for number in chance.sample(pages, 3):
            whole[number * 4096:number * 4096 + 4096] = b"\xff" * 4096
        path.write_bytes(whole)
        master = self.recovered(path)
        total = master.get("/jobs?limit=1")["total"] - 1
        self.assertGreater(total, 850)
        self.assertLess(total, 900)
        worker = Node(master, "worker")
        self.assertIsNotNone(worker.claim().body["job"])

    def test_damage_found_while_it_runs_is_recovered_by_a_new_start_in_place(self) -> None:
        path, _ = self.filled(400)
        whole = bytearray(path.read_bytes())
        page = next(
            number
            for number in range(2, len(whole) // 4096)
            if b'"metrics": {"duration": 1.5}' in whole[number * 4096 : number * 4096 + 4096]
        )
        whole[page * 4096:page * 4096 + 4096] = b"\xff" * 4096
        path.write_bytes(whole)
        master = self.master(port=free_port())  # its start reads no finished results
        pid = master.pid
        wait_for(lambda: "set aside as" in master.words(), why=master.words())
        self.assertIn("starting again to recover", master.words())

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return bool(master.call("GET", "/ready").status == 200)
            return False
        wait_for(answers, why=master.words())
        self.assertEqual((master.pid, master.process.poll()), (pid, None))
        self.assertEqual(master.get("/jobs?limit=1")["total"], 400)
        self.assertTrue(150 < master.get("/results?limit=1")["total"] < 200)

    def test_a_kill_between_any_two_lines_of_a_recovery_is_made_good_by_the_next(self) -> None:
        path, _ = self.filled(60)
        whole = bytearray(path.read_bytes())
        page = next(number for number in range(2, len(whole) // 4096) if b"film-" in
                    whole[number * 4096:number * 4096 + 4096])
        whole[page * 4096:page * 4096 + 4096] = b"\xff" * 4096
        outcomes = []
        for number in range(1, 14):
            folder = self.folder / f"kill-{number}"
            folder.mkdir(mode=0o700)
            (folder / "journal.db").write_bytes(whole)
            (folder / ffdist.DAMAGED).write_text("the test says so")
            left = [number]

            def killed(real: Any, left: list[int] = left) -> Any:
                def step(*args: Any, **more: Any) -> Any:
                    left[0] -= 1
                    if left[0] == 0:
                        raise KeyboardInterrupt
                    return real(*args, **more)
                return step
            names = (
                "os.replace",
                "os.link",
                "ffdist.Path.unlink",
                "ffdist._salvage",
                "ffdist._count_anew",
            )
            with contextlib.ExitStack() as stack:
                for name in names:
                    module, _, attribute = name.rpartition(".")
                    real = getattr(eval(module, {"os": os, "ffdist": ffdist}), attribute)
                    stack.enter_context(mock.patch(name, killed(real)))
                with contextlib.suppress(KeyboardInterrupt):
                    ffdist.recover_journal(folder)
            if (folder / ffdist.DAMAGED).exists() or (folder / ffdist.APPLYING).exists():
                ffdist.recover_journal(folder)
            with contextlib.closing(sqlite3.connect(folder / "journal.db")) as journal:
                counts = "SELECT count(*), sum(ended IS NOT NULL) FROM jobs"
                outcomes.append(journal.execute(counts).fetchone())
            aside = list(folder.glob("journal-damaged-*.db"))
            self.assertEqual([file.read_bytes() for file in aside], [bytes(whole)], number)
            self.assertEqual(
                {file.name for file in folder.iterdir()} - {"journal.db", aside[0].name}, set()
            )
        self.assertEqual(len(set(outcomes)), 1, outcomes)
        self.assertGreater(outcomes[0][0], 30)


class TestBackup(Case):
    def backup(self, file: Path, *flags: str) -> Any:
        return run(
            str(TOP / "ffdist.py"),
            "backup",
            str(file),
            "--data-dir",
            str(self.folder / "master"),
            *flags,
            folder=self.folder,
        )

    def test_a_copy_of_a_master_at_work_is_whole_and_starts(self) -> None:
        master = self.master()
        stop = threading.Event()
        acknowledged: list[str] = []

        def submit() -> None:
            while not stop.is_set():
                acknowledged.append(master.submit()["id"])
        workers = [threading.Thread(target=submit) for _ in range(2)]
        for worker in workers:
            worker.start()
        wait_for(lambda: len(acknowledged) > 200)
        before = set(acknowledged)
        done = self.backup(self.folder / "copy.db")
        stop.set()
        for worker in workers:
            worker.join()
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"copy\.db: \d+ jobs, 0 results, 0 nodes, ")
        self.assertEqual((self.folder / "copy.db").stat().st_mode & 0o077, 0)
        other = self.folder / "other"
        ffdist.wire.make_folder(other / "master")
        (self.folder / "copy.db").rename(other / "master" / "journal.db")
        copy = Master(other)
        self.addCleanup(copy.end)
        ids, after = set(), ""
        while after is not None:
            page = copy.get(f"/jobs?limit=1000{after and '&after=' + after}")
            ids |= {job["id"] for job in page["jobs"]}
            after = page["next"]
        self.assertLessEqual(before, ids)
        self.assertLessEqual(ids, set(acknowledged))

    def test_a_copy_that_cannot_be_made_leaves_the_earlier_one(self) -> None:
        self.master().end()
        file = self.folder / "copy.db"
        file.write_text("the earlier one")
        (self.folder / "master" / "journal.db").rename(self.folder / "gone.db")
        done = self.backup(file)
        self.assertEqual((done.returncode, file.read_text()), (1, "the earlier one"))
        self.assertIn("--data-dir", done.stderr)
        (self.folder / "gone.db").rename(self.folder / "master" / "journal.db")
        done = self.backup(file)
        self.assertEqual(
            (done.returncode, file.read_text()), (1, "the earlier one"), "what is no copy stays"
        )
        self.assertIn("not a copy of a journal", done.stderr)
        file.unlink()
        for _ in range(2):
            self.assertEqual(
                self.backup(file).returncode, 0, "a copy takes the place of an earlier one"
            )
        done = self.backup(self.folder / "nowhere" / "copy.db")
        self.assertEqual((done.returncode, len(done.stderr.splitlines())), (1, 1), done.stderr)
        self.assertEqual(
            [path.name for path in self.folder.iterdir() if path.name.endswith(".part")], []
        )

    def test_a_full_disk_is_told_and_nothing_is_left_on_it(self) -> None:
        small = small_disk(self, self.folder / "small", "64k")
        self.master().end()
        done = self.backup(small / "copy.db")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertEqual(list(small.iterdir()), [])

    def test_a_copy_never_takes_the_place_of_what_a_master_works_with(self) -> None:
        master = self.master()
        job = master.submit()["id"]
        (self.folder / "link.db").symlink_to(self.folder / "master" / "journal.db")
        for file in (self.folder / "master" / "journal.db", self.folder / "master" / "copy.db",
                     self.folder / "link.db"):
            done = self.backup(file)
            self.assertEqual((done.returncode, len(done.stderr.splitlines())), (1, 1), done.stderr)
            self.assertIn("data folder", done.stderr)
        later = master.submit()["id"]
        master.kill()
        master = self.master()
        self.assertEqual({found["id"] for found in master.get("/jobs")["jobs"]}, {job, later})


class TestRetention(Case):
    """What is past the limits goes, oldest first; memory, pages and totals agree, also after a
    restart."""

    def setUp(self) -> None:
        super().setUp()
        self.now, self.wall = 100.0, 1e9
        self.master_of = ffdist.Master(self.folder / "m", ffdist.Settings(), LOG, lambda: self.now,
                                       lambda: self.wall)
        self.addCleanup(lambda: self.master_of.close())
        self.node = self.master_of.register({"address": "worker"})[1]["id"]

    def finish(self, count: int, status: str = "completed") -> list[str]:
        ids = []
        for _ in range(count):
            self.now, self.wall = self.now + 10, self.wall + 10
            job = self.master_of.submit([ffdist.draft_of({"scenario": "a", "max_retries": 0}, 0)])[
                1
            ][0]
            ask = ffdist.Ask(self.node, None, 0, 0, None, False)
            self.assertEqual(self.master_of.claim(ask)["job"].id, job.id)
            self.master_of.report({"job_id": job.id, "node_id": self.node, "status": status,
                                   "lines": ["a line"]})
            ids.append(job.id)
        return ids

    def keep(self, **limits: float) -> None:
        self.master_of.settings = ffdist.Settings(**limits)  # type: ignore[arg-type]
        while self.master_of.expire(3):
            pass
        self.check()
        self.master_of.close()
        self.master_of = ffdist.Master(self.folder / "m", ffdist.Settings(), LOG, lambda: self.now,
                                       lambda: self.wall)
        self.check()

    def check(self) -> None:
        for find in (self.master_of.queries.jobs, self.master_of.queries.results):
            page = find({}, None, 1000)
            self.assertEqual(len(page.rows), page.total)
        results = {json.loads(text)["job_id"]
                   for text in self.master_of.queries.results({}, None, 1000).rows}
        self.assertLessEqual(results, set(self.ids()))

    def ids(self) -> list[str]:
        rows = self.master_of.queries.jobs({}, None, 1000).rows
        return [json.loads(text)["id"] for text in rows][::-1]

    def test_the_newest_so_many_stay_and_open_jobs_always(self) -> None:
        waiting = self.master_of.submit([ffdist.draft_of({"scenario": "b", "node": self.node}, 0)])[
            1
        ][0]
        self.master_of.order(waiting.id, "pause")
        ids = self.finish(10) + self.finish(2, "failed")
        self.keep(keep_jobs=5)
        self.assertEqual(self.ids(), [waiting.id, *ids[-5:]])
        with self.assertRaises(ffdist.ApiError):
            self.master_of.order(ids[0], "retry")

    def test_what_ended_long_ago_goes(self) -> None:
        ids = self.finish(10)
        self.keep(keep_s=45.0)
        self.assertEqual(self.ids(), ids[-5:])

    def test_a_wall_clock_that_jumps_removes_nothing(self) -> None:
        ids = self.finish(4)
        self.wall += 400 * 86400
        self.keep(keep_s=86400.0)
        self.assertEqual(self.ids(), ids)

    def test_a_job_that_runs_again_is_no_longer_finished(self) -> None:
        ids = self.finish(4)
        self.master_of.order(ids[0], "retry")
        self.keep(keep_jobs=1)
        self.assertEqual(self.ids(), [ids[0], ids[-1]])

    def test_a_master_keeps_house_by_itself(self) -> None:
        with mock.patch.object(ffdist, "HOUSEKEEPING_S", 0.05):
            service = ffdist.Service(
                "127.0.0.1", 0, self.folder / "s", ffdist.Settings(keep_jobs=2), log=LOG
            )
            service.start()
            self.addCleanup(service.stop)
            self.master_of.close()
            self.addCleanup(setattr, self, "master_of", mock.Mock())
            self.master_of = service.master
            self.node = self.master_of.register({"address": "worker"})[1]["id"]
            ids = self.finish(6)
            wait_for(lambda: self.ids() == ids[-2:])

    def test_what_the_flag_means(self) -> None:
        inf = math.inf
        for text, limits in (
            ("1000", (1000, inf)),
            ("90d", (inf, 90 * 86400)),
            ("500, 12h", (500, 43200)),
            ("forever", (inf, inf)),
        ):
            self.assertEqual(ffdist.keep_of(text), limits)
        for text in ("a while", "1.5", "1000.", "90d,", ""):
            with self.subTest(text), self.assertRaises(argparse.ArgumentTypeError):
                ffdist.keep_of(text)


class TestErrorsOfItsOwn(Case):
    """What nobody foresaw freezes nothing: it is said, and the master goes on."""

    def test_memory_that_cannot_be_rebuilt_is_not_served_and_comes_back(self) -> None:
        master = ffdist.Master(self.folder / "m", ffdist.Settings(), LOG)
        self.addCleanup(master.close)
        node = master.register({"address": "worker"})[1]["id"]
        waiting = master.submit([ffdist.draft_of({"scenario": "a"}, 0)])[1][0]
        ask = ffdist.Ask(node, None, 0.0, 0, None, False)
        with mock.patch.object(
            master.journal.reader, "live_jobs", side_effect=MemoryError("no room")
        ):
            broken = sqlite3.OperationalError("disk I/O error")
            with (
                mock.patch.object(ffdist, "_grouped", side_effect=broken),
                mock.patch.object(os, "utime", side_effect=OSError(30, "Read-only file system")),
                self.assertRaisesRegex(
                    ffdist.ApiError, r"disk I/O error \(Read-only file system\)"
                ),
            ):
                master.submit([ffdist.draft_of({"scenario": "b"}, 0)])
            for work in (lambda: master.claim(ask), master.queries.nodes, master.reap):
                with self.assertRaisesRegex(ffdist.ApiError, "cannot be read: no room") as refused:
                    work()
                self.assertEqual(refused.exception.status, 503)
        self.assertEqual(master.claim(ask)["job"].id, waiting.id)

    def test_whether_it_can_be_written_is_known_before_anybody_writes(self) -> None:
        with mock.patch.object(ffdist, "_grouped", side_effect=OSError(28, "no space left")):
            master = ffdist.Master(self.folder / "m", ffdist.Settings(), LOG)
            self.addCleanup(master.close)
            wait_for(lambda: master.journal.trouble, 20)
            self.assertRaisesRegex(ffdist.ApiError, "no space left", master.ready)
        master.reap()
        self.assertEqual(master.ready(), {"status": "ready"})

    def test_no_thread_of_the_service_ends_by_an_error(self) -> None:
        log, said = listening_log(logging.ERROR)
        with (
            mock.patch.object(ffdist, "REAP_S", 0.02),
            mock.patch.object(ffdist, "HOUSEKEEPING_S", 0.02),
        ):
            service = ffdist.Service("127.0.0.1", 0, self.folder / "s", ffdist.Settings(), log=log,
                                     victoriametrics="http://127.0.0.1:9")
            broken = {
                "reap": service.master,
                "expire": service.master,
                "snapshot": service.master.queries,
                "_handle_request_noblock": service._server,
            }
            whole = {name: getattr(thing, name) for name, thing in broken.items()}
            for name, thing in broken.items():
                setattr(thing, name, mock.Mock(side_effect=KeyError(name)))
            service.start()
            self.addCleanup(service.stop)
            answered: list[int] = []
            threading.Thread(target=lambda: answered.append(
                call(service.url, "GET", "/health").status), daemon=True).start()
            for name in broken:
                wait_for(
                    lambda name=name: any(f"KeyError: '{name}'" in words for words in said),
                    20,
                    name,
                )
            calls = {name: mock.Mock(wraps=work) for name, work in whole.items()}
            for name, thing in broken.items():
                setattr(thing, name, calls[name])
            wait_for(lambda: answered == [200] and all(work.called for work in calls.values()), 20,
                     "all go on")
        self.assertEqual(len(said), len(broken), "each is told once")


class TestFormats(Case):
    """A journal of each earlier format since the first release goes on: tests/journals."""

    def test_there_is_a_stored_journal_of_each_earlier_format(self) -> None:
        names = {path.name for path in (TOP / "tests" / "journals").iterdir()}
        self.assertEqual(names, {f"format-{number}.sql" for number in range(3, ffdist.FORMAT)})

    def test_a_stored_journal_goes_on(self) -> None:
        for path in sorted((TOP / "tests" / "journals").iterdir()):
            with self.subTest(path.name):
                self.goes_on(path)

    def goes_on(self, path: Path) -> None:
        """Two jobs were completed or running, one was pending, one paused."""
        folder = self.folder / path.stem / "master"
        ffdist.wire.make_private_folder(folder)
        with contextlib.closing(sqlite3.connect(folder / "journal.db")) as journal:
            journal.executescript(path.read_text(encoding="utf-8"))
        master = Master(folder.parent)
        self.addCleanup(master.end)
        self.assertNotIn("damaged", master.words())
        with contextlib.closing(sqlite3.connect(folder / "journal.db")) as journal:
            found = journal.execute("PRAGMA user_version").fetchone()
        self.assertEqual(found, (ffdist.FORMAT,))
        jobs = master.get("/jobs")["jobs"][::-1]
        self.assertEqual([job["status"] for job in jobs],
                         ["completed", "running", "pending", "paused"])
        self.assertEqual(
            master.get(f"/jobs/{jobs[0]['id']}")["result"]["metrics"], {"duration": 9.0}
        )
        self.assertEqual(master.get(f"/jobs/{jobs[0]['id']}/logs")["lines"], ["one", "two"])
        node = master.get("/nodes")["nodes"][0]
        self.assertEqual(master.get(f"/jobs?node_id={node['id']}")["total"], 2)
        own = {"node_id": node["id"], "session": "a session"}
        query = f"node_id={node['id']}&session=a%20session"
        again = master.get(f"/jobs/next?{query}&claim=word-2")["job"]
        self.assertEqual(again["id"], jobs[1]["id"], "its claim is known")
        report = {"job_id": again["id"], "attempt": 1, "status": "completed", **own}
        self.assertEqual(master.call("POST", "/results", report).status, 200)
        self.assertEqual(master.get(f"/jobs/next?{query}&claim=new")["job"]["id"], jobs[2]["id"])


class TestFullDisk(Case):
    """A disk of 1 MB that fills up, and is freed again."""

    def setUp(self) -> None:
        super().setUp()
        self.ballast = small_disk(self, self.folder / "master") / "ballast"
        self.ballast.write_bytes(b"\0" * 500_000)

    def fill(self, master: Master) -> tuple[set[str], set[str]]:
        """Submit from four clients until each is refused; return the accepted and the refused
        ids."""
        accepted: set[str] = set()
        refused: set[str] = set()

        def submit() -> None:
            for _ in range(500):
                own = str(uuid.uuid4())
                answer = call(master.url, "POST", "/jobs", {"id": own, "scenario": "x"})
                (accepted if answer.status == 201 else refused).add(own)
                if answer.status != 201:
                    assert answer.status == 503 and "journal" in answer.body["error"], answer
                    return
        threads = [threading.Thread(target=submit, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual(len(refused), 4, "a full disk refused nothing")
        return accepted, refused

    @staticmethod
    def known(master: Master) -> set[str]:
        return {job["id"] for job in master.get("/jobs?limit=1000")["jobs"]}

    def test_a_full_disk_refuses_and_loses_nothing_and_goes_on_when_space_is_freed(self) -> None:
        master = self.master()
        node = Node(master)
        first = master.submit("a")
        job = node.claim().body["job"]
        accepted, _ = self.fill(master)
        accepted.add(first["id"])
        ready = master.call("GET", "/ready")
        self.assertEqual(ready.status, 503)
        for word in ("journal.db", "full"):
            self.assertIn(word, ready.body["error"])
        self.assertEqual(master.call("GET", "/health").status, 200)
        self.assertEqual(self.known(master), accepted, "refused means: nothing was changed")
        self.assertEqual(master.get("/jobs")["total"], len(accepted))
        self.assertEqual(node.report(job).status, 503)
        self.assertEqual(master.get(f"/jobs/{job['id']}")["status"], "running")
        self.assertEqual(master.call("POST", "/jobs", [{"scenario": "x"}] * 3000).status, 503)
        self.assertEqual(master.get("/jobs")["total"], len(accepted))

        self.ballast.unlink()
        wait_for(lambda: master.call("GET", "/ready").status == 200, why="it is ready again")
        self.assertEqual(node.report(job).status, 200)
        accepted.add(master.submit()["id"])
        again = node.claim().body["job"]
        self.assertIn(again["id"], accepted)
        self.assertEqual(self.known(master), accepted)
        self.assertNotIn("Traceback", master.words())
        self.assertEqual(master.words().count("database or disk is full"), 1, "it is said once")
        wait_for(lambda: "can be written again" in master.words(), why="its end is said too")
        before = record_of(master)
        master.kill()
        self.assertEqual(record_of(self.master(port=master.port)), before)

    def test_a_full_disk_at_the_kill_loses_nothing(self) -> None:
        master = self.master()
        accepted, _ = self.fill(master)
        master.kill()
        self.ballast.unlink()
        self.assertEqual(self.known(self.master(port=master.port)), accepted)

    def test_a_parked_claim_survives_a_failed_commit(self) -> None:
        master = self.master()
        node = Node(master)
        self.fill(master)
        for job in master.get("/jobs?limit=1000&status=pending")["jobs"]:
            master.call("POST", f"/jobs/{job['id']}/cancel")
        self.ballast.unlink()
        wait_for(lambda: master.call("GET", "/ready").status == 200)
        for job in master.get("/jobs?limit=1000&status=pending")["jobs"]:
            master.call("POST", f"/jobs/{job['id']}/cancel")
        waiting = node.park()
        job = master.submit()
        self.assertEqual(waiting.answer().body["job"]["id"], job["id"])


if __name__ == "__main__":
    unittest.main()
