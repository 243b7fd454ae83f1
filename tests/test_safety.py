"""What a stranger can't do: whoever reaches the master's port, a web page, another local user.

Each test here was an attack that worked. They run against real masters, agents, FFmpeg and a
browser; the rules behind them have tests of their own in test_jobs (outputs, URLs), test_agent
(addresses) and test_model (who speaks for a node).
"""
from __future__ import annotations

import dataclasses
import http.server
import json
import math
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import agent as wire
import ffdist
from tests.fleet import Agent, Case, Master, Node, OneFleet, processes_under, run
from tests.proxy import Proxy
from tests.support import TOP, call, exchange, need, wait_for
from tests.test_run import RunCase, picture, streams

KEY = "\nssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKstrangerstrangerstrangerstrangerst evil@example\n"
FD = "/proc/self/fd"


def serve(case: unittest.TestCase, handler: type[http.server.BaseHTTPRequestHandler]) -> int:
    """Serve on loopback until the test has ended; return the port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    case.addCleanup(server.server_close)
    case.addCleanup(server.shutdown)
    return int(server.server_address[1])


class Settling(RunCase):
    """Attempts that rest before they encode, so that others have time to swap names."""

    def meanwhile(self, act: Callable[[], object], **parameters: Any) -> wire.Json:
        """Run a job, and act when it has checked its names and not yet begun to encode."""
        attempt = self.attempt(settle=1, preset="ultrafast", **parameters)
        results: list[wire.Json] = []
        worker = threading.Thread(target=lambda: results.append(self.result(attempt)))
        worker.start()
        wait_for(lambda: attempt.progress["phase"] == "settling", why="it rests")
        act()
        worker.join(60)
        return results[0]

    def outside(self, name: str) -> Path:
        """Make a folder outside the media root."""
        folder = self.root / name
        folder.mkdir()
        self.addCleanup(shutil.rmtree, folder)
        return folder


class OpenedNotNamed(Settling):
    def test_an_input_that_is_swapped_for_a_link_after_the_check_is_not_read(self) -> None:
        secret = self.outside("secret") / "film.mp4"
        shutil.copy(self.media / self.film("small.mp4", *picture("64x64")), secret)
        film = self.media / self.film("swapped.mp4")

        def swap() -> None:
            film.rename(film.with_name("moved.mp4"))
            film.symlink_to(secret)
        result = self.meanwhile(swap, input="swapped.mp4", output="read.mp4", quality="psnr")
        self.assertEqual(result["status"], "completed", result["error"])
        self.assertEqual(
            streams(self.media / "read.mp4")[0]["width"], 320, "not the stranger's film"
        )
        self.assertGreater(result["metrics"]["psnr_db"], 28)

    def test_a_folder_that_is_swapped_for_a_link_after_the_check_is_not_written_to(self) -> None:
        target, films = self.outside("target"), self.media / "films"
        films.mkdir()

        def swap() -> None:
            films.rename(self.media / "films-moved")
            films.symlink_to(target)
        result = self.meanwhile(swap, input=self.film("plain.mp4"), output="films/o.mp4")
        self.assertEqual(result["status"], "completed", result["error"])
        self.assertEqual(list(target.iterdir()), [])
        self.assertTrue(
            (self.media / "films-moved" / "o.mp4").exists(), "it is where it was opened"
        )

    def test_a_name_that_is_taken_meanwhile_is_left_alone(self) -> None:
        victim = self.outside("victim") / "keys"
        victim.write_text("mine")
        for name, take in (("linked.mp4", lambda path: path.symlink_to(victim)),
                           ("taken.mp4", lambda path: path.write_text("a film of another")),
                           ("folder.mp4", lambda path: path.mkdir())):
            with self.subTest(name):
                path = self.media / name
                result = self.meanwhile(lambda take=take, path=path: take(path),
                                        input=self.film("plain.mp4"), output=name)
                self.assertEqual((result["status"], result["failure_reason"]), ("failed", "output"))
                self.assertIn(f"output {name} was written by somebody else", str(result["error"]))
        self.assertEqual(victim.read_text(), "mine")
        self.assertEqual((self.media / "taken.mp4").read_text(), "a film of another")

    def test_overwrite_replaces_only_the_film_that_was_there(self) -> None:
        path = self.media / "old.mp4"
        path.write_text("the old one")
        result = self.meanwhile(
            lambda: path.write_text("a newer one"),
            input=self.film("plain.mp4"),
            output="old.mp4",
            overwrite=True,
        )
        self.assertEqual((result["status"], result["failure_reason"]), ("failed", "output"))
        self.assertEqual(path.read_text(), "a newer one")
        result = self.meanwhile(path.unlink, input="plain.mp4", output="old.mp4", overwrite=True)
        self.assertEqual((result["status"], len(streams(path))), ("completed", 1))

    def test_a_file_in_the_place_of_the_hidden_one_is_never_named(self) -> None:
        def swap() -> None:
            hidden = next(self.media.glob(".ffdist-*.part"))
            hidden.unlink()
            hidden.symlink_to("/etc/passwd")
        result = self.meanwhile(swap, input=self.film("plain.mp4"), output="hidden.mp4")
        self.assertEqual(result["status"], "failed", "the film has no name any more")
        self.assertFalse(os.path.lexists(self.media / "hidden.mp4"))
        self.assertTrue(os.path.exists("/etc/passwd"))

    def test_hidden_names_cannot_be_guessed_and_outputs_obey_the_umask(self) -> None:
        names: list[str] = []

        def look() -> None:
            names.extend(path.name for path in self.media.glob(".ffdist-*"))
        before = os.umask(0o027)
        self.addCleanup(os.umask, before)
        for name in ("first.mp4", "second.mp4"):
            self.assertEqual(
                self.meanwhile(look, input=self.film("plain.mp4"), output=name)["status"],
                "completed",
            )
            self.assertEqual(stat.S_IMODE((self.media / name).stat().st_mode), 0o640)
        self.assertEqual(len(set(names)), 2)
        for name in names:
            self.assertRegex(name, r"^\.ffdist-[0-9a-f]{32}\.part$")
            self.assertFalse([folder for folder in self.folders if folder[:8] in name])

    def test_where_there_are_no_hard_links_a_name_is_given_as_safely(self) -> None:
        def no_links(*_: object, **__: object) -> None:
            raise PermissionError(1, "Operation not permitted")
        with mock.patch("agent.os.link", no_links):
            name = self.film("plain.mp4")
            self.completes(input=name, output="soft.mp4")
            self.assertEqual(len(streams(self.media / "soft.mp4")), 1)
            result = self.meanwhile(
                lambda: (self.media / "held.mp4").write_text("held"), input=name, output="held.mp4"
            )
            self.assertEqual(result["failure_reason"], "output")
        self.assertEqual((self.media / "held.mp4").read_text(), "held")

    def test_users_see_their_own_names_and_never_a_descriptor(self) -> None:
        name = self.film("my film 'one'.mkv", *picture(), "-c:v", "libx264")
        attempt = self.attempt(input=name, output="my output.mp4", two_pass=True, bitrate="200k")
        result = self.result(attempt)
        log = "\n".join(line for _, line in attempt.log.lines)
        for text in (json.dumps(result), log):
            self.assertNotIn(FD, text)
            self.assertNotIn(".part", text)
        self.assertIn(f"from '{name}'", log)
        self.assertIn("to 'my output.mp4'", log)
        self.assertIn(f"file:{name}", result["encode"]["commands"][0])
        self.assertEqual(result["encode"]["commands"][1][-1], "file:my output.mp4")
        (self.media / "noise.mkv").write_bytes(os.urandom(9000))
        error = str(self.fails("input", "noise.mkv", input="noise.mkv", output="o.mp4")["error"])
        self.assertNotIn(FD, error)

    def test_a_folder_that_may_be_passed_and_not_listed_is_no_obstacle(self) -> None:
        closed = self.media / "closed"
        (closed / "films").mkdir(parents=True)
        shutil.copy(self.media / self.film("plain.mp4"), closed / "films" / "in.mp4")
        closed.chmod(0o311)
        self.addCleanup(closed.chmod, 0o755)
        self.completes(input="closed/films/in.mp4", output="closed/films/out.mp4")

    def test_two_jobs_whose_ids_begin_alike_write_two_films(self) -> None:
        self.film("plain.mp4")
        start = uuid.uuid4().hex[:8]
        ids = [f"{start}-0000-4000-8000-00000000000{number}" for number in range(2)]
        attempts = [wire.Attempt(wire.Job(job_id, 1, f"{width}p25-h264", {
            "input": "plain.mp4", "output": f"{width}.mp4", "settle": 0.5}), self.place)
            for job_id, width in zip(ids, (90, 180))]
        workers = [threading.Thread(target=attempt.run) for attempt in attempts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        self.assertEqual(
            [streams(self.media / f"{height}.mp4")[0]["height"] for height in (90, 180)], [90, 180]
        )

    def test_the_word_of_the_master_counts_for_a_moment_only(self) -> None:
        """A machine that slept with the right must ask again: the job may be another's by now."""
        asked: list[float] = []

        def confirm(output: wire.OutputFile, made: wire.Json) -> float:
            asked.append(wire.boot_clock())
            return asked[-1] + (10 if len(asked) > 2 else -1)
        parameters = {"input": self.film("plain.mp4"), "output": "late.mp4"}
        attempt = wire.Attempt(wire.Job(str(uuid.uuid4()), 1, "x", parameters), self.place, confirm)
        self.assertEqual((attempt.run().status, len(asked)), ("completed", 3))

    def test_a_film_that_an_earlier_attempt_names_while_a_later_one_runs_gives_way(self) -> None:
        name = self.film("plain.mp4")
        stale = self.media / self.film("stale.mp4")
        with open(stale, "rb") as film:
            published = [wire.fingerprint(film.fileno())]
        for number, mark, status in (
            (2, "", "completed"),
            (2, "{} 1", "completed"),
            (1, "{} 2", "failed"),
            (2, "another 1", "failed"),
            (2, "{} x", "failed"),
        ):
            with self.subTest(mark=mark, number=number):
                parameters = {"input": name, "output": "both.mp4", "settle": 0.5}
                job = wire.Job(str(uuid.uuid4()), number, "x", parameters,
                               published=() if mark else tuple(published))
                attempt = wire.Attempt(job, self.place)
                outcomes: list[wire.Outcome] = []

                def work(
                    attempt: wire.Attempt = attempt, outcomes: list[wire.Outcome] = outcomes
                ) -> None:
                    outcomes.append(attempt.run())
                worker = threading.Thread(target=work)
                worker.start()
                wait_for(
                    lambda attempt=attempt: attempt.progress["phase"] == "settling", why="it rests"
                )
                shutil.copy(stale, self.media / "both.mp4")
                if mark:
                    os.setxattr(
                        self.media / "both.mp4", wire.MARK, mark.format(attempt.job_id).encode()
                    )
                worker.join(60)
                self.assertEqual(outcomes[0].status, status, outcomes[0].error)
                (self.media / "both.mp4").unlink()

    def test_an_attempt_knows_what_an_earlier_one_of_its_job_has_named(self) -> None:
        name = self.film("plain.mp4")
        told: list[wire.Json] = []
        parameters = {"input": name, "output": "again.mp4"}

        def confirm(output: wire.OutputFile, made: wire.Json) -> float:
            told.append(made)
            return math.inf
        first = wire.Attempt(wire.Job(str(uuid.uuid4()), 1, "x", parameters), self.place, confirm)
        self.assertEqual(first.run().status, "completed")
        other = {"bytes": 1, "hash": told[0]["hash"]}
        for published, status in (
            ((), "failed"),
            ((other,), "failed"),
            ((other, told[0]), "completed"),
        ):
            with self.subTest(published):
                job = wire.Job(str(uuid.uuid4()), 2, "x", parameters, published=published)
                again = wire.Attempt(job, self.place)
                self.assertEqual(again.run().status, status)


class Urls(RunCase):
    def local(self) -> wire.Workplace:
        places = dataclasses.replace(self.place.places, allow_address=("127.0.0.1",))
        return dataclasses.replace(self.place, places=places)

    def test_a_redirect_is_not_followed(self) -> None:
        asked: list[str] = []

        class Redirecting(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(302 if self.path == "/film.mp4" else 200)
                self.send_header("Location", "/secret.mp4")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass
        port = serve(self, Redirecting)
        url = f"http://127.0.0.1:{port}/film.mp4"
        self.fails("network", "if it was a redirect", url, place=self.local(), input=url,
                   output="o.mp4")
        self.assertEqual(set(asked), {"/film.mp4"}, "the secret was not asked for")
        self.assertIn("-max_redirects", self.place.machine.http_args)

    def test_a_redirect_of_an_upload_is_not_followed(self) -> None:
        """With a user in the URL FFmpeg asks first, and would send the film where it is told to."""
        asked: list[str] = []

        class Sending(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                asked.append(self.path)
                self.send_response(307)
                self.send_header("Location", "/secret")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def handle_expect_100(self) -> bool:
                self.do_POST()
                return False

            def log_message(self, *_: object) -> None:
                pass
        port = serve(self, Sending)
        url = f"http://user:pass@127.0.0.1:{port}/film.ts"
        attempt = self.attempt("180p25-h264", self.local(), duration=1, output=url)
        self.assertEqual(self.result(attempt)["status"], "failed")
        self.assertEqual(set(asked), {"/film.ts"})

    def test_metadata_addresses_stay_closed(self) -> None:
        for host in (
            "169.254.169.254",
            "[fd00:ec2::254]",
            "168.63.129.16",
            "100.100.100.200",
            "192.0.0.192",
            "2130706433",
            "0x7f.1",
            "[64:ff9b::a9fe:a9fe]",
        ):
            with self.subTest(host):
                self.fails("parameters", "does not open", input=f"http://{host}/latest/film.mp4",
                           output="o.mp4")

    def test_no_port_is_opened_for_srt(self) -> None:
        self.fails(
            "parameters", "caller", input="srt://10.0.0.1:9000?mode=listener", output="o.mp4"
        )


class Paths(OneFleet):
    def refused(self, **parameters: Any) -> str:
        master, _ = self.fleet()
        answer = master.call("POST", "/jobs", {"scenario": "transcode", "parameters": parameters})
        self.assertEqual(answer.status, 400, answer)
        return str(answer.body["field"])

    def test_a_key_in_a_films_title_never_becomes_a_key_file(self) -> None:
        film = self.film("title.mkv", 0.2)
        subprocess.run(
            [
                "ffmpeg",
                "-v",
                "error",
                "-y",
                "-i",
                film,
                "-metadata",
                f"title={KEY}",
                "-c",
                "copy",
                film.with_name("keyed.mkv"),
            ],
            check=True,
            stdin=subprocess.DEVNULL,
        )
        for output in (
            ".ssh/authorized_keys",
            "authorized_keys",
            ".bashrc",
            "hwdetect.py",
            "node.json",
        ):
            with self.subTest(output):
                self.assertEqual(
                    self.refused(input="keyed.mkv", output=output, container="matroska"),
                    "parameters.output",
                )
        self.assertEqual(self.refused(input="keyed.mkv", output=".ssh/authorized_keys.mkv"),
                         "parameters.output")
        self.assertEqual(self.refused(input="keyed.mkv", output="a.mp4", container="matroska"),
                         "parameters.container")

    def test_a_film_that_exists_is_refused_on_the_node_unless_the_job_may_replace_it(self) -> None:
        master, agent = self.fleet()
        mine = self.film("mine.mp4", 0.2)
        before = mine.read_bytes()
        job = master.finished(master.submit("64p25-h264", duration=0.2, output="mine.mp4")["id"])
        self.assertEqual(
            (job["status"], job["failure_reason"], job["attempt"]), ("failed", "output", 1)
        )
        self.assertIn("mine.mp4 exists on agent", job["error"])
        self.assertEqual(mine.read_bytes(), before)
        done = run(
            str(TOP / "ffdist.py"),
            "submit",
            "64p25-h264",
            "-p",
            "duration=0.2",
            "-o",
            "mine.mp4",
            "--overwrite",
            "--wait",
            "--master",
            master.url,
            folder=self.folder,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertNotEqual(mine.read_bytes(), before)
        self.nothing_left(agent)

    def test_a_job_that_a_person_retries_replaces_its_own_film(self) -> None:
        master, _ = self.fleet()
        job = master.finished(master.submit("64p25-h264", duration=0.2, output="own.mp4")["id"])
        self.assertEqual(job["status"], "completed")
        self.assertEqual(master.call("POST", f"/jobs/{job['id']}/retry").status, 200)
        again = wait_for(lambda: (now := master.get(f"/jobs/{job['id']}"))["attempt"] == 2
                         and now["status"] in ("completed", "failed") and now)
        self.assertEqual((again["status"], again["error"]), ("completed", None))

    def test_a_submission_cannot_say_what_was_published(self) -> None:
        master, _ = self.fleet()
        first = master.finished(
            master.submit("64p25-h264", duration=0.2, output="victim.mp4")["id"]
        )
        published = [record["published"] for record in first["attempts"]]
        before = (self.folder / "media" / "victim.mp4").read_bytes()
        job = master.call(
            "POST",
            "/jobs",
            {
                "scenario": "64p25-h264",
                "published": published,
                "parameters": {"duration": 0.4, "output": "victim.mp4"},
            },
        ).body
        self.assertEqual(master.finished(job["id"])["failure_reason"], "output")
        self.assertEqual((self.folder / "media" / "victim.mp4").read_bytes(), before)

    def test_a_session_of_another_and_a_forged_result_harm_no_node_and_no_job(self) -> None:
        master, agent = self.fleet()
        node = master.get("/nodes")["nodes"][0]
        job = self.live(master, 30)
        pids = self.encoding(agent)
        forged = {
            "job_id": job,
            "node_id": node["id"],
            "status": "completed",
            "metrics": {"duration": 1.0},
        }
        register = {"address": "evil", "id": node["id"], "cpu_threads": 1}
        for method, path, body in (
            ("POST", "/nodes/register", register),
            ("POST", "/nodes/register", {**register, "session": "evil"}),
            ("POST", "/nodes/register", {**register, "session": "evil", "secret": "guessed"}),
            ("POST", "/results", forged),
            ("POST", "/results", {**forged, "attempt": 1}),
            ("POST", "/results", {**forged, "attempt": 1, "session": "evil"}),
            (
                "POST",
                f"/jobs/{job}/progress",
                {"node_id": node["id"], "attempt": 1, "progress": 99},
            ),
            ("POST", f"/nodes/{node['id']}/heartbeat", {"leaving": True}),
            ("GET", f"/jobs/next?node_id={node['id']}", None),
            ("GET", f"/jobs/next?node_id={node['id']}&session=evil&leaving=true", None),
        ):
            with self.subTest(path, body=body):
                answer = master.call(method, path, body)
                self.assertEqual(
                    (answer.status, "session" in answer.body["error"]), (409, True), answer
                )
        now = master.get(f"/nodes/{node['id']}")
        for name in ("address", "cpu_threads", "status", "jobs"):
            self.assertEqual(now[name], {**node, "status": "busy", "jobs": [job]}[name])
        self.assertEqual(master.get(f"/jobs/{job}")["status"], "running")
        self.assertTrue(pids <= self.encoding(agent), "the encode goes on")
        self.assertIsNone(agent.process.poll(), "the agent lives")
        self.assertNotIn("secret", json.dumps(now))


class Identity(Case):
    """Who may go on as a node: its secret is proof; without one a node must be offline."""

    def test_a_killed_agent_comes_back_at_once_by_its_secret(self) -> None:
        master, agent = self.fleet()
        kept = json.loads((agent.state / "node.json").read_text())
        self.assertRegex(kept["secret"], "^[0-9a-f]{64}$")
        self.assertEqual((agent.state / "node.json").stat().st_mode & 0o777, 0o600)
        agent.kill()
        again = self.agent(master)
        wait_for(lambda: again.words().count("registered with") == 2, why="it is back")
        nodes = master.get("/nodes")["nodes"]
        self.assertEqual([node["id"] for node in nodes], [kept["id"]])
        self.assertNotIn(kept["secret"], master.words() + json.dumps(nodes))
        database = b"".join(
            path.read_bytes() for path in (self.folder / "master").glob("journal.db*")
        )
        self.assertNotIn(kept["secret"].encode(), database, "only its hash is stored")

    def test_an_older_state_folder_without_a_secret_waits_until_its_node_is_offline(self) -> None:
        need("ffmpeg")
        master = self.master("--node-timeout", "2s")
        node_id = str(uuid.uuid4())
        body = {"address": "agent", "id": node_id, "session": "of the older program", "protocol": 1}
        self.assertEqual(master.call("POST", "/nodes/register", body).status, 201)
        state = self.folder / "agent-state"
        state.mkdir(mode=0o700)
        (state / "node.json").write_text(json.dumps({"id": node_id}))
        beats = threading.Event()

        def older() -> None:
            while not beats.wait(0.3):
                master.call("POST", f"/nodes/{node_id}/heartbeat", {"session": body["session"]})
        threading.Thread(target=older, daemon=True).start()
        self.addCleanup(beats.set)
        agent = self.agent(master)
        wait_for(lambda: "only when it is offline" in agent.words(), why="it is refused, and waits")
        self.assertIsNone(agent.process.poll())
        beats.set()  # the older program ends
        wait_for(lambda: "registered with" in agent.words(), why="it takes over")
        self.assertEqual([node["id"] for node in master.get("/nodes")["nodes"]], [node_id])
        self.assertEqual(len(json.loads((state / "node.json").read_text())["secret"]), 64)

    def test_an_agent_whose_session_a_restored_master_does_not_know_registers_again(self) -> None:
        master, agent = self.fleet()
        copy = self.folder / "copy.db"
        done = run(
            str(TOP / "ffdist.py"),
            "backup",
            str(copy),
            "--data-dir",
            str(self.folder / "master"),
            folder=self.folder,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        agent.end()
        agent = self.agent(master)
        wait_for(lambda: agent.words().count("registered with") == 2, why="it has a new session")
        job = master.submit("64p25-h264", duration=3, realtime=True, output="restored.mp4")
        wait_for(lambda: master.get(f"/jobs/{job['id']}")["status"] == "running", why="it runs")
        master.kill()
        shutil.rmtree(self.folder / "master")
        (self.folder / "master").mkdir(mode=0o700)
        copy.rename(self.folder / "master" / "journal.db")
        restored = self.master(port=master.port)
        wait_for(lambda: agent.words().count("registered with") == 3, why="it registers again")
        self.assertEqual(
            [node["status"] for node in restored.get("/nodes")["nodes"]], ["available"]
        )
        self.assertEqual(
            restored.finished(restored.submit("64p25-h264", duration=0.2)["id"])["status"],
            "completed",
        )

    def test_a_refusal_whose_body_is_cut_off_ends_no_agent(self) -> None:
        for length, raw in ((40, b""), (40, b'{"error": "a newer'), (0, b"")):
            class Cut(http.server.BaseHTTPRequestHandler):
                def do_POST(self, length: int = length, raw: bytes = raw) -> None:
                    self.send_response(409)
                    self.send_header("Content-Length", str(length))
                    self.end_headers()
                    self.wfile.write(raw)

                def log_message(self, *_: object) -> None:
                    pass
            client = wire.Client(f"http://127.0.0.1:{serve(self, Cut)}")
            with self.assertRaises(wire.ApiError) as caught:
                client.register({"address": "a"})
            self.assertEqual(
                (caught.exception.retryable, caught.exception.field), (length > 0, None)
            )
            link = wire.Link(client, wire.State(self.folder / "state"), "worker", mock.Mock())
            hardware = mock.Mock(to_json=dict, address="a")
            slots = mock.Mock(attempts=list)
            session = wire.Session(
                link, mock.Mock(max_concurrent_jobs=1), hardware, mock.Mock(facts=dict), slots
            )
            self.assertGreater(session.step(0.0).seconds, 0, "it tries again")
            self.assertFalse(link.reached)

    def test_a_result_of_the_node_that_a_folder_was_once_stops_no_other(self) -> None:
        master, agent = self.fleet()
        agent.end()
        result = {
            "job_id": str(uuid.uuid4()),
            "attempt": 1,
            "node_id": str(uuid.uuid4()),
            "status": "failed",
        }
        (agent.state / "spool" / f"{0:020d}-00000000.json").write_text(json.dumps(result))
        agent = self.agent(master)
        wait_for(lambda: "is of another node" in agent.words(), why="it is set aside")
        job = master.finished(master.submit("64p25-h264", duration=0.2)["id"])
        self.assertEqual(job["status"], "completed")
        wait_for(
            lambda: [path.suffix for path in (agent.state / "spool").iterdir()] == [".aside"],
            why="only what was set aside is left",
        )

    def test_a_node_with_a_secret_is_not_taken_even_while_it_is_offline(self) -> None:
        master = self.master("--node-timeout", "1s")
        node = Node(master, "worker")
        wait_for(lambda: node.shown()["status"] == "offline", why="it is offline")
        body = {"address": "evil", "id": node.id, "session": "evil"}
        for secret in ({}, {"secret": "guessed"}):
            self.assertEqual(master.call("POST", "/nodes/register", {**body, **secret}).status, 409)
        self.assertEqual(node.start_again().status, 200)

    def test_whoever_removes_a_node_cannot_take_its_place(self) -> None:
        master = self.master()
        node = Node(master, "worker")
        job = master.submit()
        claimed = node.claim().body["job"]
        self.assertEqual(master.call("DELETE", f"/nodes/{node.id}").status, 200)
        evil = {
            "address": "worker",
            "id": node.id,
            "session": "evil",
            "secret": "evil",
            "protocol": 1,
            "holding": [{"job_id": job["id"], "attempt": 1}],
        }
        self.assertEqual(master.call("POST", "/nodes/register", evil).status, 409)
        master.end()
        master = self.master(port=master.port)
        self.assertEqual(
            master.call("POST", "/nodes/register", evil).status, 409, "nor after a restart"
        )
        self.assertEqual(node.register(holding=evil["holding"]).body["holding"], evil["holding"])
        self.assertEqual(node.report(claimed).status, 200, "its work goes on where it was")

    def test_an_odd_hash_of_a_secret_fails_no_request(self) -> None:
        master = self.master()
        odd = {
            "address": "odd",
            "id": str(uuid.uuid4()),
            "session": "one",
            "secret_hash": "\u00e9" * 64,
        }
        self.assertEqual(master.call("POST", "/nodes/register", odd).status, 201)
        again = {**odd, "session": "two", "secret": "\u00e9"}
        self.assertEqual(master.call("POST", "/nodes/register", again).status, 409)

    def test_neither_session_nor_secret_stands_in_the_journal_or_a_backup(self) -> None:
        master = self.master()
        nodes = [Node(master, f"worker{number}") for number in range(2)]
        words = [str(word) for node in nodes for word in (node.session, node.secret)]
        nodes[0].start_again()
        master.end()
        data = b"".join(path.read_bytes() for path in (self.folder / "master").iterdir())
        for word in words:
            self.assertNotIn(word.encode(), data)

    def test_a_secret_is_told_only_to_a_master_that_asks_for_it(self) -> None:
        """An earlier version keeps unknown fields with the node, and shows them to everybody."""
        for answers, wanted in (([{"id": "id"}], [None]),
                                ([wire.ApiError(409, "known", "secret"), {}], [None, "secret"])):
            told: list[str | None] = []

            def register(
                body: wire.Json, told: list[Any] = told, answers: list[Any] = answers
            ) -> wire.Json:
                told.append(body.get("secret"))
                answer = answers[len(told) - 1]
                if isinstance(answer, Exception):
                    raise answer
                return dict(answer)
            session = mock.Mock()
            session._link.client.register = register
            wire.Session._introduce(session, {"address": "a"}, "secret")
            self.assertEqual(told, wanted)

    def test_a_stranger_can_neither_lock_out_a_seeds_node_nor_take_it(self) -> None:
        master = self.master()
        node = Node(master, "seed", session=False)
        job = master.submit()
        self.assertEqual(node.claim().body["job"]["id"], job["id"])
        stolen = {"address": "seed", "id": node.id, "session": "evil", "secret": "evil"}
        self.assertEqual(master.call("POST", "/nodes/register", stolen).status, 409)
        locked = {"address": "seed", "id": node.id, "secret": "evil"}
        self.assertEqual(master.call("POST", "/nodes/register", locked).status, 200)
        self.assertEqual(
            (node.register().status, node.beat().status, node.claim().status), (200, 200, 200)
        )
        named = {"address": "seed", "session": "evil"}
        self.assertNotEqual(master.call("POST", "/nodes/register", named).body["id"], node.id)
        self.assertEqual(node.report({"id": job["id"], "attempt": None}).status, 200)

    def test_the_film_of_an_attempt_whose_node_died_is_the_jobs_own(self) -> None:
        """It was named, the result never sent: the next attempt must not stumble over its film."""
        need("ffmpeg", "ffprobe")
        master = self.master("--retry-delay", "0.1s")
        proxy = Proxy(master.port)
        self.addCleanup(proxy.end)
        proxy.rule = lambda asked, answer: (
            "lose" if asked.line.startswith("POST /results") else "pass"
        )
        agent = Agent(self.folder, proxy.url)
        self.addCleanup(agent.end)
        job = master.submit("64p25-h264", duration=0.3, output="named.mp4")
        film = self.folder / "media" / "named.mp4"
        wait_for(film.exists, why="the output has its name")
        wait_for(lambda: list((agent.state / "spool").iterdir()), why="the result waits")
        agent.kill()
        for path in (agent.state / "spool").iterdir():
            path.unlink()  # as if it had died a moment earlier
        first = film.stat().st_ino
        proxy.rule = lambda asked, answer: "pass"
        again = self.agent(master)
        done = master.finished(job["id"])
        self.assertEqual((done["status"], done["attempt"], done["error"]), ("completed", 2, None),
                         again.words())
        self.assertNotEqual(film.stat().st_ino, first)
        self.assertEqual({"bytes", "hash"}, set(done["attempts"][0]["published"]))


class CutOff(Case):
    """A node that is out of reach when its film is ready: no film is lost, no job fails by it."""

    def cut_off(self, timeout: str) -> tuple[Master, Proxy, Agent, Any, Path]:
        """Start a fleet of one, cut it off while it encodes, and wait for the encode's end."""
        need("ffmpeg", "ffprobe")
        master = self.master("--node-timeout", timeout, "--retry-delay", "0.1s")
        proxy = Proxy(master.port)
        self.addCleanup(proxy.end)
        agent = Agent(self.folder, proxy.url, name="away")
        self.addCleanup(agent.end)
        wait_for(lambda: master.get("/nodes")["count"], why="it registers")
        job = master.submit("64p25-h264", duration=2, realtime=True, output="film.mp4")
        film = self.folder / "media" / "film.mp4"
        wait_for(lambda: list(film.parent.glob(".ffdist-*")), why="it encodes")
        proxy.split()
        wait_for(lambda: not processes_under(agent.work), why="the encode has ended")
        return master, proxy, agent, job, film

    def test_its_job_is_completed_elsewhere_and_its_own_film_gives_way(self) -> None:
        master, proxy, away, job, film = self.cut_off("3s")
        other = Agent(self.folder, master.url, name="near")
        self.addCleanup(other.end)
        done = master.finished(job["id"])
        self.assertEqual((done["status"], done["attempt"], done["error"]), ("completed", 2, None))
        inode = film.stat().st_ino
        proxy.mend()
        wait_for(lambda: not list(film.parent.glob(".ffdist-*")), why="the other film is removed")
        self.assertEqual(film.stat().st_ino, inode)
        self.assertEqual(master.get(f"/jobs/{job['id']}")["status"], "completed")
        self.assertIsNone(away.process.poll())

    def test_its_film_gets_its_name_when_it_is_back_in_time(self) -> None:
        master, proxy, _, job, film = self.cut_off("60s")
        wait_for(film.exists, why="nobody else can have the job: it gets its name at once")
        proxy.mend()
        done = master.finished(job["id"])
        self.assertEqual((done["status"], done["attempt"], film.exists()), ("completed", 1, True))

    def test_a_film_without_a_mark_waits_for_the_masters_word(self) -> None:
        """A film that was named in silence, without a mark, would be in the next attempt's way."""
        attempt, away = (
            mock.Mock(stopping=False, leased_at=wire.boot_clock()),
            wire.ApiError(0, "no answer"),
        )
        answers = [away, away, None]

        def send(attempt: Any, now: float) -> None:
            if answer := answers.pop(0):
                raise answer
        link = mock.Mock(protocol=1, node_timeout_s=90.0, clock=wire.boot_clock)
        link.events.stopping.wait.return_value = False
        reporter = mock.Mock(_link=link, send_progress=send)
        self.assertEqual(wire.Reporter.permit(reporter, attempt, mock.Mock(marked=False), {}),
                         attempt.leased_at + wire.PUBLISH_S)
        self.assertEqual(answers, [], "it asked until it was answered")
        answers = [away]
        self.assertEqual(wire.Reporter.permit(reporter, attempt, mock.Mock(marked=True), {}),
                         attempt.leased_at + 90)

    def test_its_work_counts_though_it_was_removed_meanwhile(self) -> None:
        master, proxy, _, job, film = self.cut_off("60s")
        wait_for(film.exists, why="it has its name")
        node = master.get("/nodes")["nodes"][0]["id"]
        self.assertEqual(master.call("DELETE", f"/nodes/{node}").status, 200)
        proxy.mend()
        done = master.finished(job["id"])
        self.assertEqual((done["status"], done["attempt"], film.exists()), ("completed", 1, True))


class MediaRoots(Case):
    def served(
        self, *flags: str, cwd: Path | None = None, home: Path | None = None
    ) -> tuple[Master, Agent]:
        need("ffmpeg", "ffprobe")
        master = self.master()
        program = Agent.__new__(Agent)
        program.state = self.folder / "agent-state"
        program.work = program.state / "work"
        argv = [
            sys.executable,
            "-W",
            "error",
            str(TOP / "agent.py"),
            "--register",
            "--master",
            master.url,
            "--allow-master-as-worker",
            "--yes",
            "--state-dir",
            str(program.state),
            "--name",
            "agent",
            "--no-probe",
            *flags,
        ]
        super(Agent, program).__init__(
            argv,
            self.folder,
            "agent",
            {"FFDIST_DRAIN_LIMIT": "0s", "HOME": str(home or self.folder)},
            cwd,
        )
        self.addCleanup(program.end)
        return master, program

    def test_in_a_home_folder_an_agent_opens_no_paths_and_works_on(self) -> None:
        home = self.folder / "home"
        home.mkdir()
        (home / "film.mp4").write_bytes(b"film")
        master, agent = self.served(cwd=home, home=home)
        wait_for(lambda: "registered with" in agent.words(), why="it registers")
        self.assertRegex(
            agent.words(), r"opens no paths until it gets --media-root DIR, for \S+ is a home"
        )
        for parameters in ({"input": "film.mp4"}, {"output": "film2.mp4"}):
            job = master.finished(master.submit("64p25-h264", duration=0.2, **parameters)["id"])
            self.assertEqual((job["status"], job["failure_reason"]), ("failed", "no_capability"))
            self.assertIn("--media-root DIR", job["error"])
        job = master.finished(master.submit("64p25-h264", duration=0.2)["id"])
        self.assertEqual(job["status"], "completed")
        self.assertEqual(os.listdir(home), ["film.mp4"])

    def test_such_a_root_that_is_named_needs_a_second_word(self) -> None:
        home = self.folder / "home"
        home.mkdir()
        (self.folder / "way").symlink_to(home)
        env = {"HOME": str(home)}
        agent = str(TOP / "agent.py")
        for root, why in (
            (home, "is a home folder"),
            (self.folder / "way", "is a home folder"),
            (self.folder, f"holds the home folder {home}"),
            (Path("/"), "is the whole machine"),
            (TOP, "holds the agent's own"),
        ):
            with self.subTest(root):
                done = run(
                    agent, "--register", "--media-root", str(root), folder=self.folder, env=env
                )
                self.assertEqual(done.returncode, 2, done.stderr)
                self.assertIn(f"--media-root {root} {why}", done.stderr)
                self.assertIn("--yes-home", done.stderr)
        master, program = self.served("--media-root", str(home), "--yes-home", home=home)
        job = master.finished(master.submit("64p25-h264", duration=0.2, output="film.mp4")["id"])
        self.assertEqual(job["status"], "completed", program.words())
        self.assertTrue((home / "film.mp4").exists())

    def test_what_is_unsafe_and_what_is_not(self) -> None:
        homes, own = (
            ["/home/me", "/var/lib/postgresql"],
            ["/opt/ffdist/agent.py", "/var/lib/ffdist/state"],
        )
        for root in ("/", "/home", "/home/me", "/var", "/opt/ffdist", "/opt", "/var/lib/ffdist",
                     "/var/lib/ffdist/state", "/var/lib/ffdist/state/spool"):
            self.assertTrue(wire.why_unsafe(root, homes, own), root)
        for root in (
            "/home/me/films",
            "/home/metoo",
            "/srv/films",
            "/var/lib/ffdist/films",
            "/opt/films",
        ):
            self.assertEqual(wire.why_unsafe(root, homes, own), "", root)


class Browsers(unittest.TestCase):
    """Pages of strangers in a real browser, and what it sends, byte by byte."""

    folder: ClassVar[Path]
    master: ClassVar[Master]

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = Path(tempfile.mkdtemp(prefix="ffdist-test-"))
        cls.addClassCleanup(shutil.rmtree, cls.folder, ignore_errors=True)
        cls.master = Master(cls.folder, "--allow-host", "Farm.Example, other.example")
        cls.addClassCleanup(cls.master.end)

    def status(self, method: str, path: str, *headers: str, body: str = "", host: str = "") -> int:
        place = host or f"127.0.0.1:{self.master.port}"
        lines = [f"{method} {path} HTTP/1.1", f"Host: {place}", *headers, "Connection: close"]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        raw = exchange(self.master.port, ("\r\n".join(lines) + "\r\n\r\n" + body).encode())
        return int(raw.split(b" ")[1])

    def test_a_foreign_origin_is_refused_and_the_masters_own_is_not(self) -> None:
        own = f"http://127.0.0.1:{self.master.port}"
        kind, job = "Content-Type: application/json", '{"scenario": "x"}'
        for origin, wanted in (
            (own, 201),
            ("null", 403),
            ("http://evil.example", 403),
            (f"http://127.0.0.1:{self.master.port + 1}", 403),
            ("", 403),
            (f"http://localhost:{self.master.port}", 403),
            (f"{own}.evil.example", 403),
        ):
            with self.subTest(origin):
                self.assertEqual(
                    self.status("POST", "/jobs", f"Origin: {origin}", kind, body=job), wanted
                )
        self.assertEqual(self.status("GET", "/nodes", "Origin: http://evil.example"), 403)
        self.assertEqual(self.status("POST", "/jobs", "Origin: http://farm.example", kind, body=job,
                                     host="farm.example:80"), 201)

    def test_other_sites_may_link_to_the_page_and_to_nothing_else(self) -> None:
        for site, page, rest in (
            ("cross-site", 200, 403),
            ("same-site", 200, 403),
            ("same-origin", 200, 200),
            ("none", 200, 200),
        ):
            with self.subTest(site):
                self.assertEqual(self.status("GET", "/", f"Sec-Fetch-Site: {site}"), page)
                self.assertEqual(self.status("GET", "/nodes", f"Sec-Fetch-Site: {site}"), rest)
                self.assertEqual(self.status("HEAD", "/", f"Sec-Fetch-Site: {site}"), page)

    def test_a_browser_never_claims_a_job(self) -> None:
        """An image over plain HTTP has no Origin and no Sec-Fetch-Site, but always these."""
        for sign in (
            "Accept-Language: de",
            "User-Agent: Mozilla/5.0 (X11)",
            "Sec-Fetch-Site: same-origin",
            "Sec-Fetch-Dest: image",
        ):
            self.assertEqual(self.status("GET", "/jobs/next?node_id=x", sign), 403, sign)
        program = ("Accept-Language: *", "Sec-Fetch-Mode: cors", "User-Agent: node")
        self.assertEqual(
            self.status("GET", "/jobs/next?node_id=x", *program), 404, "Node.js is none"
        )
        self.assertEqual(self.status("GET", "/jobs/next?node_id=x"), 404)

    def test_a_body_is_json_or_it_is_refused(self) -> None:
        job, sign = '{"scenario": "x"}', "Sec-Fetch-Site: same-origin"
        for headers, wanted in (((), 201), (("Content-Type: application/json",), 201),
                                (("Content-Type: Application/JSON; charset=utf-8",), 201),
                                (("Content-Type: text/plain",), 415),
                                (("Content-Type: multipart/form-data",), 415),
                                (("Content-Type: application/x-www-form-urlencoded",), 415),
                                (("Content-Type: text/plain; application/json",), 415),
                                ((sign,), 415), ((sign, "Content-Type: application/json"), 201)):
            with self.subTest(headers):
                self.assertEqual(self.status("POST", "/jobs", *headers, body=job), wanted)
        bodiless = self.status("POST", "/nodes/x/heartbeat", "Content-Type: text/plain")
        self.assertEqual(bodiless, 404)

    def test_a_browser_uses_an_address_or_a_name_that_is_known(self) -> None:
        machine = os.uname().nodename.lower()
        for host, wanted in (
            (f"127.0.0.1:{self.master.port}", 200),
            ("localhost", 200),
            ("[::1]:8080", 200),
            ("192.168.1.100:8080", 200),
            ("farm.example:8080", 200),
            ("OTHER.example", 200),
            (machine, 200),
            (f"{machine}.local", 200),
            ("evil.example", 403),
            ("evil.example.:8080", 403),
            ("127.0.0.1.evil.example", 403),
            ("1.2.3", 403),
        ):
            with self.subTest(host):
                self.assertEqual(
                    self.status("GET", "/nodes", "Accept-Language: en", host=host), wanted
                )
                self.assertEqual(self.status("GET", "/nodes", host=host), 200, "no browser")

    def test_every_answer_forbids_frames_sniffing_and_keeping(self) -> None:
        for path in ("/", "/nodes", "/metrics", "/nowhere", "/health"):
            with socket.create_connection(
                ("127.0.0.1", self.master.port), timeout=20
            ) as connection:
                connection.sendall(
                    f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
                )
                head = connection.recv(65536).decode().partition("\r\n\r\n")[0]
            self.assertIn("frame-ancestors 'none'", head)
            self.assertIn("X-Content-Type-Options: nosniff", head)
            self.assertIn("Cache-Control: no-store", head)

    def browse(self, url: str, name: str) -> str:
        """Return what a page has become in a real browser, where evil.example is this machine."""
        need("chromium")
        argv = [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            f"--user-data-dir={self.folder / name}",
            "--host-resolver-rules=MAP *.example 127.0.0.1",
            "--virtual-time-budget=6000",
            "--dump-dom",
            url,
        ]
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=120,
            env={**os.environ, "HOME": str(self.folder)},
        )
        return done.stdout

    def test_a_page_of_a_stranger_changes_nothing_and_reads_nothing(self) -> None:
        node = Node(self.master, "seeds-node", session=False)
        job = self.master.submit("victim")
        port = serve(self, attack(self.master.url, node.id, job["id"]))
        for number, host in enumerate(("127.0.0.1", "evil.example")):
            with self.subTest(host):
                before = self.master.get("/jobs")["total"]
                seen = self.browse(f"http://{host}:{port}/", f"profile{number}")
                self.assertIn("done:", seen, "the page ran to its end")
                self.assertNotIn("seeds-node", seen, "nothing was read")
                self.assertEqual(self.master.get("/jobs")["total"], before, "nothing was submitted")
                self.assertEqual(self.master.get(f"/jobs/{job['id']}")["status"], "pending")
                self.assertEqual(
                    node.shown()["status"], "available", "nothing was drained or claimed"
                )

    def test_a_name_that_was_pointed_to_the_master_opens_nothing(self) -> None:
        self.master.register("rebound-node")
        seen = self.browse(f"http://evil.example:{self.master.port}/nodes", "rebound")
        self.assertIn("--allow-host", seen)
        self.assertNotIn("rebound-node", seen)
        for place in (f"127.0.0.1:{self.master.port}", f"farm.example:{self.master.port}"):
            self.assertIn("rebound-node", self.browse(f"http://{place}/", "known"), place)


ATTACK = """<!doctype html><title>a stranger's page</title><p id=out></p><iframe name=sink></iframe>
<img src="MASTER/jobs/next?node_id=NODE"><img src="MASTER/jobs/next?node_id=NODE"
referrerpolicy=no-referrer> <script src="MASTER/nodes"></script><iframe src="MASTER/"></iframe>
<form id=form method=post enctype=text/plain action="MASTER/jobs" target=sink> <input
name='{"scenario":"form","x":"' value='"}'></form> <script> const job = JSON.stringify({scenario:
"stolen"}); const plain = {method: "POST", mode: "no-cors", headers: {"Content-Type":
"text/plain"}, body: job}; const tries = {
  plain: () => fetch("MASTER/jobs", plain), json: () => fetch("MASTER/jobs", {...plain, mode:
  "cors", headers: {"Content-Type": "application/json"}}), bare: () => fetch("MASTER/jobs",
  {method: "POST", mode: "no-cors", body: new Blob([job])}), beacon: async () =>
  navigator.sendBeacon("MASTER/jobs", job), cancel: () => fetch("MASTER/jobs/JOB/cancel", {method:
  "POST", mode: "no-cors"}), drain: () => fetch("MASTER/nodes/NODE/drain", {method: "POST", mode:
  "no-cors"}), claim: () => fetch("MASTER/jobs/next?node_id=NODE", {mode: "no-cors"}), read: async
  () => (await fetch("MASTER/nodes")).text(),
};
(async () => {
  document.getElementById("form").submit();
  const found = [];
  for (const [name, go] of Object.entries(tries)) {
    try { found.push(name + ": " + await go()); } catch (error) { found.push(name + ": " + error); }
  }
  document.getElementById("out").textContent = "done: " + found.join("; ");
})();
</script>"""


def attack(master: str, node_id: str, job_id: str) -> type[http.server.BaseHTTPRequestHandler]:
    """Return what serves a page that tries all that a page can send."""
    page = ATTACK.replace("MASTER", master).replace("NODE", node_id).replace("JOB", job_id).encode()

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass
    return Page


class OtherUsers(Case):
    def test_folders_that_are_made_are_the_owners_alone_parents_too(self) -> None:
        before = os.umask(0o022)
        self.addCleanup(os.umask, before)
        data = self.folder / "a" / "b" / "data"
        done = run(str(TOP / "hwdetect.py"), "--state-dir", str(self.folder / "c" / "d" / "state"),
                   folder=self.folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        argv = [
            sys.executable,
            str(TOP / "ffdist.py"),
            "master",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--data-dir",
            str(data),
        ]
        with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as master:
            wait_for((data / "journal.db").exists, why="its journal")
            master.send_signal(signal.SIGTERM)
        for name in ("a", "a/b", "a/b/data", "c", "c/d", "c/d/state"):
            self.assertEqual(stat.S_IMODE((self.folder / name).stat().st_mode), 0o700, name)

    def refusal(self, folder: Path) -> list[str]:
        """Return what a master and an agent say of a folder that they do not take."""
        words = []
        agent = (
            str(TOP / "agent.py"),
            "--register",
            "--master",
            "http://127.0.0.1:9",
            "--media-root",
            str(self.folder / "media"),
            "--allow-master-as-worker",
            "--yes",
        )
        for argv in ((str(TOP / "ffdist.py"), "master", "--port", "0", "--data-dir", str(folder)),
                     (*agent, "--state-dir", str(folder)), (*agent, "--work-dir", str(folder))):
            done = run(*argv, folder=self.folder, timeout=60)
            self.assertEqual(done.returncode, 1, (argv, done.stderr))
            self.assertIn(str(folder), done.stderr)
            words.append(done.stderr)
        return words

    def test_a_folder_that_is_open_to_others_is_refused(self) -> None:
        for mode in (0o777, 0o1777, 0o750, 0o702):
            folder = self.folder / f"open{mode:o}"
            folder.mkdir()
            folder.chmod(mode)
            for words in self.refusal(folder):
                self.assertIn("open to other users: close it with chmod 700", words)
            self.assertEqual(list(folder.iterdir()), [])

    def test_a_folder_or_a_link_of_another_user_is_refused(self) -> None:
        if os.geteuid():
            self.skipTest("only root can make a folder that is another user's")
        folder, mine, link = (self.folder / name for name in ("theirs", "mine", "link"))
        folder.mkdir(mode=0o700)
        os.chown(folder, 1, 1)
        mine.mkdir(mode=0o700)
        link.symlink_to(mine)
        os.chown(link, 1, 1, follow_symlinks=False)
        for words in self.refusal(folder):
            self.assertIn("belongs to another user (uid 1)", words)
        for words in self.refusal(link):
            self.assertIn("is a link of another user (uid 1)", words)
        self.assertEqual(list(mine.iterdir()), [])

    def test_a_link_of_another_user_on_the_way_is_refused(self) -> None:
        if os.geteuid():
            self.skipTest("only root can make a link that is another user's")
        mine = self.folder / "mine"
        (mine / "sub").mkdir(parents=True, mode=0o700)
        way = self.folder / "way"
        way.symlink_to(mine)
        os.chown(way, 1, 1, follow_symlinks=False)
        for words in self.refusal(way / "sub"):
            self.assertIn(f"{way} is a link of another user (uid 1)", words)

    def test_what_is_kept_in_a_folder_of_another_user_is_neither_read_nor_written(self) -> None:
        if os.geteuid():
            self.skipTest("only root can make a folder that is another user's")
        theirs = self.folder / "theirs"
        theirs.mkdir(mode=0o755)
        os.chown(theirs, 1, 1)
        done = run(str(TOP / "hwdetect.py"), "--state-dir", str(theirs), folder=self.folder)
        self.assertIn("belongs to another user (uid 1)", done.stdout)
        done = run(str(TOP / "agent.py"), "run", "64p25-h264", "-p", "duration=0.2", "--work-dir",
                   str(theirs), folder=self.folder)
        self.assertEqual((done.returncode, list(theirs.iterdir())), (1, []), done.stderr)
        self.assertIn("belongs to another user (uid 1)", done.stderr)
        (theirs / ".scrape.yml.part").symlink_to(self.folder / "victim")
        (self.folder / "victim").write_text("mine")
        done = run(str(TOP / "ffdist.py"), "monitoring", "files", str(theirs), folder=self.folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual((self.folder / "victim").read_text(), "mine")

    def test_a_run_without_a_master_works_in_a_folder_that_nobody_can_guess(self) -> None:
        need("ffmpeg", "ffprobe")
        place = self.folder / "tmp"
        place.mkdir()
        argv = [sys.executable, str(TOP / "agent.py"), "run", "64p25-h264", "-p", "duration=0.3",
                "--no-probe", "-o", "run.mp4"]
        env = {**os.environ, "TMPDIR": str(place), "HOME": str(self.folder)}
        with subprocess.Popen(
            argv, cwd=self.folder, env=env, stderr=subprocess.PIPE, text=True
        ) as program:
            found = wait_for(lambda: list(place.glob("ffdist-run-*")), why="its folder")
            self.assertNotIn(str(program.pid), found[0].name)
            self.assertEqual(stat.S_IMODE(found[0].stat().st_mode), 0o700)
            _, words = program.communicate(timeout=60)
        self.assertEqual((program.returncode, list(place.iterdir())), (0, []), words)
        again = run(*argv[1:], folder=self.folder)
        self.assertEqual(again.returncode, 2, again.stderr)
        self.assertIn("run.mp4 exists: name another file, or add --overwrite", again.stderr)
        self.assertEqual(run(*argv[1:], "--overwrite", folder=self.folder).returncode, 0)

    def test_a_run_without_a_master_refuses_a_media_root_that_is_not_there(self) -> None:
        done = run(str(TOP / "agent.py"), "run", "--media-root", "nowhere", folder=self.folder)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn(f"--media-root {self.folder}/nowhere is not a folder", done.stderr)

    def test_a_run_without_a_master_takes_the_paths_of_its_shell(self) -> None:
        need("ffmpeg", "ffprobe")
        hidden = self.folder / ".films"
        hidden.mkdir()
        (self.folder / "way").symlink_to(hidden)
        words = ("--no-probe", "-p", "duration=0.2")
        first = run(
            str(TOP / "agent.py"),
            "run",
            "64p25-h264",
            *words,
            "-o",
            "way/a.mkv",
            folder=self.folder,
        )
        self.assertEqual(first.returncode, 0, first.stderr)
        (hidden / "link.mkv").symlink_to("a.mkv")
        again = run(
            str(TOP / "agent.py"),
            "run",
            *words,
            "--input",
            "../way/link.mkv",
            "-o",
            "b.mp4",
            folder=hidden,
        )
        self.assertEqual(again.returncode, 0, again.stderr)
        self.assertTrue((hidden / "b.mp4").exists())

    def test_a_backup_is_written_by_a_name_that_nobody_can_guess(self) -> None:
        master = self.master()
        place = self.folder / "shared"
        place.mkdir()
        (place / ".copy.db.part").symlink_to(self.folder / "victim")
        done = run(str(TOP / "ffdist.py"), "backup", str(place / "copy.db"), "--data-dir",
                   str(self.folder / "master"), folder=self.folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertFalse((self.folder / "victim").exists())
        self.assertEqual(stat.S_IMODE((place / "copy.db").stat().st_mode), 0o600)
        self.assertIn("master at", master.words())


class Terminals(Case):
    """Text of others never steers a terminal: control characters, and marks that turn a line."""

    EVIL = "a\x1b]0;owned\x07\x9b31m\u202eb\u2066c\r\nd\x85"

    def clean(self, text: str) -> None:
        for char in ("\x1b", "\x07", "\x9b", "\u202e", "\u2066", "\x85"):
            self.assertNotIn(char, text)

    def test_what_a_fake_node_sends_is_printable_wherever_it_is_shown(self) -> None:
        master = self.master()
        name = "w\x9b31m\u202eorker"
        node = Node(master, name)
        job = master.submit("x", input="f\u202e\x9bilm.mp4")
        claimed = node.claim().body["job"]
        node.progress(claimed, progress={"phase": self.EVIL, "percent": 5}, lines=[self.EVIL])
        cli = str(TOP / "ffdist.py")
        env = {"FFDIST_MASTER": master.url, "COLUMNS": "200"}
        waiting = subprocess.Popen(
            [sys.executable, cli, "submit", "x", "--wait"],
            cwd=self.folder,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        second = wait_for(lambda: node.claim().body["job"], why="the second job")
        node.progress(second, progress={"phase": self.EVIL, "percent": 5})
        for words in (
            ("nodes",),
            ("jobs",),
            ("show", job["id"]),
            ("logs", job["id"]),
            ("drain", node.id),
            ("undrain", node.id),
            ("jobs", "--scenario", "none"),
        ):
            with self.subTest(words):
                done = run(cli, *words, folder=self.folder, env=env)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.clean(done.stdout + done.stderr)
        time.sleep(1.5)  # `--wait` looks now and then: it has drawn the phase by now, or never will
        for report in (claimed, second):
            node.report(report, "failed", error=self.EVIL, failure_reason="input",
                        analyzer_output={"recommendation": self.EVIL, "reasons": [self.EVIL]})
        out, err = waiting.communicate(timeout=60)
        self.assertIn("a?]0;owned", err)
        self.clean(out + err)
        for words in (("results",), ("show", job["id"]), ("report",), ("retry", job["id"]),
                      ("forget", node.id)):
            done = run(cli, *words, folder=self.folder, env=env)
            self.clean(done.stdout + done.stderr)
        self.clean(master.words())
        self.clean(call(master.url, "GET", "/").text)

    def test_a_report_as_a_page_hides_and_turns_nothing(self) -> None:
        self.clean(ffdist.html_text(self.EVIL))
        self.assertEqual(ffdist.html_text("<b>\u202e"), "&lt;b&gt;?")


if __name__ == "__main__":
    unittest.main()
