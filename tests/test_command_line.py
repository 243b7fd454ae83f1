"""The command line and the demo as a user types them: what they print, and how they end."""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Callable, ClassVar
from unittest import mock

import agent
import ffdist
import hwdetect
from tests.fleet import (
    Agent,
    FleetCase,
    Master,
    Node,
    in_background,
    interruptible,
    processes_called,
    run,
)
from tests.support import TOP, free_port, need, served, wait_for


class TheCommandLine(unittest.TestCase):
    """One fleet for all: submit, jobs, show, logs, cancel, nodes, results, as a user types them."""

    @classmethod
    def setUpClass(cls) -> None:
        need("ffmpeg", "ffprobe")
        cls.folder = Path(tempfile.mkdtemp(prefix="ffdist-test-"))
        cls.addClassCleanup(shutil.rmtree, cls.folder, ignore_errors=True)
        cls.master = Master(cls.folder)
        cls.addClassCleanup(cls.master.end)
        cls.agent = Agent(cls.folder, cls.master.url)
        cls.addClassCleanup(cls.agent.end)
        wait_for(lambda: cls.master.get("/nodes")["count"], 30)
        cls.done = cls.master.submit("64p25-h264", duration=0.2)["id"]
        cls.master.finished(cls.done)

    folder: ClassVar[Path]
    master: ClassVar[Master]
    agent: ClassVar[Agent]
    done: ClassVar[str]

    def cli(
        self, *words: str, code: int = 0, url: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = run(str(TOP / "ffdist.py"), *words, folder=self.folder,
                   env={"FFDIST_MASTER": url or self.master.url, "NO_COLOR": "1"})
        self.assertEqual(done.returncode, code, f"{words}: {done.stdout}{done.stderr}")
        self.assertNotIn("Traceback", done.stderr)
        self.assertNotIn("\x1b", done.stdout, "colours only on a terminal")
        return done

    def test_a_film_whose_name_is_not_utf8_is_refused_before_it_is_sent(self) -> None:
        done = self.cli("submit", "--input", os.fsdecode(b"/K\xe4se.mp4"), code=2)
        self.assertEqual(done.stderr, "ffdist: parameters.input is not UTF-8: if it names a file, "
                                      "rename the file\n")

    def test_submit_and_wait_shows_what_came_out(self) -> None:
        shown = self.cli("submit", "64p25-h264", "-p", "duration=0.2", "--wait")
        for word in ("completed", "libx264", "speed", "CPU", "energy", "verdict", "agent"):
            self.assertIn(word, shown.stdout)

    def test_submit_and_wait_with_json_is_one_json_alone_on_stdout(self) -> None:
        job = json.loads(
            self.cli("submit", "64p25-h264", "-p", "duration=0.2", "--wait", "--json").stdout
        )
        self.assertEqual((job["status"], job["result"]["metrics"]["frames"]), ("completed", 5))

    def test_a_failed_job_is_exit_code_1_with_its_reason(self) -> None:
        shown = self.cli("submit", "--input", "none.mp4", "--wait", code=1)
        self.assertIn("none.mp4", shown.stdout)
        self.assertRegex(shown.stdout, r"(?m)^input +none\.mp4$")
        self.assertRegex(shown.stderr, r"its log: python3 ffdist.py logs [0-9a-f]{8}\n$")
        self.assertRegex(
            self.cli("jobs", "--status", "failed").stdout, r"failed .* agent +none\.mp4 "
        )
        job = json.loads(
            self.cli("submit", "--input", "none.mp4", "--wait", "--json", code=1).stdout
        )
        self.assertEqual(job["status"], "failed")

    def test_each_listing_as_a_table_and_as_json(self) -> None:
        for command, word, key in (("jobs", "completed", "jobs"), ("nodes", "available", "nodes"),
                                   ("results", "64p25-h264", "results")):
            with self.subTest(command):
                self.assertIn(word, self.cli(command).stdout)
                page = json.loads(self.cli(command, "--json").stdout)
                self.assertGreater(page["count"], 0)
                self.assertEqual(len(page[key]), page["count"])
        self.assertIn(
            self.done[:8], self.cli("jobs", "--status", "completed", "--limit", "1000").stdout
        )
        self.assertEqual(json.loads(self.cli("jobs", "--limit", "1", "--json").stdout)["count"], 1)

    def test_listings_take_a_node_by_its_name_and_name_the_filter_that_nothing_meets(self) -> None:
        node = self.master.get("/nodes")["nodes"][0]
        for word in (node["name"], node["id"], node["id"][:8]):
            for command in ("jobs", "results", "report"):
                shown = self.cli(command, "--node-id", word, "--limit", "1000").stdout
                self.assertIn(self.done[:8], shown)
        self.assertIn("unknown node nobody", self.cli("jobs", "--node-id", "nobody", code=1).stderr)
        self.assertEqual(
            self.cli("jobs", "--status", "paused").stdout, "no jobs match --status paused\n"
        )
        self.assertEqual(
            self.cli("report", "--status", "failed", "--scenario", "none").stdout,
            "no results match --status failed --scenario none\n",
        )
        self.assertIn("1 of ", self.cli("report", "--limit", "1").stderr)

    def test_a_job_may_be_pinned_and_a_node_forgotten(self) -> None:
        node = self.master.get("/nodes")["nodes"][0]
        self.cli("submit", "64p25-h264", "-p", "duration=0.2", "--node", node["name"], "--wait")
        self.assertIn("nobody", self.cli("submit", "x", "--node", "nobody", code=2).stderr)
        other = self.master.register("spare", name="spare")["id"]
        self.assertIn("removed", self.cli("forget", "spare").stdout)
        self.assertNotIn(other, [node["id"] for node in self.master.get("/nodes")["nodes"]])

    def test_a_port_or_an_address_that_cannot_be_had_says_what_to_do(self) -> None:
        self.assertIn("no address 192.0.2.1: choose another with --host", self.cli(
            "master", "--host", "192.0.2.1", "--data-dir", str(self.folder / "m"), code=1).stderr)

    def test_show_by_a_prefix(self) -> None:
        self.assertIn("completed", self.cli("show", self.done[:8]).stdout)
        self.assertEqual(
            json.loads(self.cli("show", self.done[:8], "--json").stdout)["id"], self.done
        )

    def test_logs_hold_the_command_and_ffmpegs_words(self) -> None:
        words = self.cli("logs", self.done).stdout
        self.assertIn("run: ", words)
        self.assertIn("libx264", words)
        self.assertEqual(self.cli("logs", self.done, "-f").stdout, words)
        self.assertTrue(json.loads(self.cli("logs", self.done, "--json").stdout)["lines"])

    def test_a_log_without_lines_says_so(self) -> None:
        self.master.register("elsewhere", name="elsewhere")
        made = self.cli("submit", "64p25-h264", "--node", "elsewhere", "--json").stdout
        job = json.loads(made)["id"]
        empty = self.cli("logs", job)
        self.assertEqual(empty.stdout, "")
        self.assertIn(f"the job is pending; see: python3 ffdist.py show {job}", empty.stderr)
        self.cli("cancel", job)
        self.cli("forget", "elsewhere")

    def test_nodes_of_one_name_are_shown_with_their_ids(self) -> None:
        ids = [Node(self.master, "twin").id for _ in range(2)]
        shown = self.cli("nodes").stdout
        for node_id in ids:
            self.assertIn(f"twin ({node_id[:8]})", shown)
            self.cli("forget", node_id)
        self.assertNotIn("(", self.cli("nodes").stdout.split("GPU")[0])

    def test_logs_follow_a_job_to_its_end(self) -> None:
        job = self.master.submit("64p25-h264", duration=2, realtime=True)["id"]
        words = self.cli("logs", job, "-f").stdout
        self.assertIn("run: ", words)
        self.assertEqual(
            self.master.get(f"/jobs/{job}")["status"], "completed", "it followed to the end"
        )

    def test_logs_wait_for_a_master_that_is_started_again(self) -> None:
        away = agent.ApiError(0, "no answer from the master")
        parts = [
            agent.LogPart(["one"], 1, "running"),
            away,
            away,
            agent.LogPart(["two"], 2, "running"),
            agent.LogPart([], 2, "completed"),
        ]
        client = mock.Mock(logs=mock.Mock(side_effect=parts))
        out, said = io.StringIO(), io.StringIO()
        with mock.patch.object(ffdist, "_client", lambda args: client), mock.patch.object(
            ffdist, "POLL_S", 0
        ), contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            self.assertEqual(ffdist.main(["logs", "-f", self.done]), 0)
        self.assertEqual(out.getvalue(), "one\ntwo\n")
        self.assertEqual(said.getvalue(), "no answer from the master; waiting\n")
        self.assertEqual([call.args[1] for call in client.logs.call_args_list], [0, 1, 1, 1, 2])

    def test_cancel(self) -> None:
        job = self.master.submit("64p25-h264", duration=60, realtime=True)["id"]
        wait_for(lambda: self.master.get(f"/jobs/{job}")["status"] == "running", 30)
        self.assertIn(job, self.cli("cancel", job[:13]).stdout)
        self.assertEqual(self.master.finished(job)["status"], "canceled")
        self.assertIn("completed", self.cli("cancel", self.done, code=1).stderr)

    def test_cancel_takes_several_jobs_and_goes_on_after_one_that_it_cannot(self) -> None:
        self.master.register("elsewhere", name="elsewhere")
        words = ("submit", "64p25-h264", "--node", "elsewhere", "--json")
        ids = [json.loads(self.cli(*words).stdout)["id"] for _ in range(2)]
        done = self.cli("cancel", ids[0], "ffff0000", ids[1], code=1)
        for job_id in ids:
            self.assertIn(f"job {job_id} is canceled", done.stdout)
        self.assertEqual(done.stderr, "ffdist: unknown job ffff0000\n")
        self.cli("forget", "elsewhere")

    def test_exit_codes_and_sentences(self) -> None:
        nobody = f"http://127.0.0.1:{free_port()}"
        for words, code, said in (
            (("show", "ffff0000"), 1, "unknown job ffff0000: 'python3 ffdist.py jobs' lists them"),
            (("drain", "nobody"), 1, "unknown node nobody: 'python3 ffdist.py nodes' lists them"),
            (("report", "--experiment", "nope"), 1, "'python3 ffdist.py jobs --json'"),
            (("experiment", "none.json"), 2, "name an experiment file"),
            (("logs", "ffff0000"), 1, "unknown job"),
            (("cancel", "ffff0000"), 1, "unknown job"),
            (("submit", "64p25-h264", "-p", "crf=99"), 2, "crf"),
            (("submit", "64p25-h264", "-p", "bitrat=5M"), 2, "bitrate"),
            (("submit", "no spaces"), 2, "scenario"),
            (("submit", "-p", "x"), 2, "name=value"),
            (("jobs", "--limit", "0"), 2, "limit"),
            (("jobs", "--master", "ftp://x"), 2, "master"),
        ):
            with self.subTest(words):
                done = self.cli(*words, code=code)
                self.assertIn(said, done.stderr)
                self.assertEqual(done.stdout, "")
                self.assertEqual(len(done.stderr.strip().splitlines()), 1, done.stderr)
        for command in (
            ("jobs",),
            ("nodes", "--json"),
            ("results",),
            ("show", "abcd"),
            ("cancel", "abcd"),
            ("logs", "abcd"),
            ("submit", "x", "--wait", "--json"),
        ):
            with self.subTest(command):
                done = self.cli(*command, code=3, url=nobody)
                self.assertIn(nobody, done.stderr)
                self.assertIn("start one with 'python3 ffdist.py master'", done.stderr)
                self.assertEqual((done.stdout, len(done.stderr.strip().splitlines())), ("", 1))

    def test_a_reader_that_goes_and_a_terminal_of_few_letters_are_no_errors(self) -> None:
        env = {
            **os.environ,
            "FFDIST_MASTER": self.master.url,
            "PYTHONUNBUFFERED": "",
        }  # or nothing is left
        for program, *words in (
            ("ffdist.py", "jobs"),
            ("ffdist.py", "--help"),
            ("agent.py", "--help"),
        ):
            with self.subTest(words):
                taker, giver = os.pipe()
                os.close(taker)
                done = subprocess.run(
                    [sys.executable, str(TOP / program), *words],
                    env=env,
                    stdout=giver,
                    stderr=subprocess.PIPE,
                    timeout=60,
                    check=False,
                )
                os.close(giver)
                self.assertEqual((done.returncode, done.stderr), (0, b""))
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, str(TOP / "ffdist.py"), "jobs"],
                env=env,
                stdout=full,
                stderr=subprocess.PIPE,
                timeout=60,
                check=False,
            )
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr, b"ffdist: standard output: No space left on device\n")
        for words in (("jobs",), ("nodes",), ("results", "--json"), ("report",),
                      ("show", self.done), ("logs", self.done)):
            with self.subTest(words):
                shell = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable]
                done = subprocess.run([*shell, str(TOP / "ffdist.py"), *words], env=env,
                                      stderr=subprocess.PIPE, timeout=60, check=False)
                self.assertEqual((done.returncode, done.stderr), (0, b""))
        job = self.master.submit("64p25-h264", duration=0.2, input="stra\u00dfe.mp4")["id"]
        self.master.finished(job)
        ascii_only = run(str(TOP / "ffdist.py"), "show", job, folder=self.folder,
                         env={**env, "PYTHONIOENCODING": "ascii"})
        self.assertEqual(ascii_only.returncode, 0, ascii_only.stderr)
        self.assertIn("stra?e.mp4", ascii_only.stdout)

    def test_a_flag_beats_the_environment(self) -> None:
        self.cli("nodes", "--master", self.master.url, url=f"http://127.0.0.1:{free_port()}")
        self.cli("nodes", "--master", self.master.url.replace("http://", ""))

    def test_an_answer_that_is_no_masters_is_told_in_a_sentence(self) -> None:
        with served(self.folder) as url:
            for command in ("jobs", "nodes"):
                done = run(str(TOP / "ffdist.py"), command, "--master", url, folder=self.folder)
                self.assertIn(done.returncode, (1, 3))
                self.assertEqual(len(done.stderr.strip().splitlines()), 1, done.stderr)
                self.assertIn(f"something else answers at {url}: is it the master", done.stderr)
                self.assertNotIn("<", done.stderr, "a page has no sentence to quote")
                self.assertNotIn("start one", done.stderr, "something does listen there")

    def test_unknown_commands_and_no_command_are_wrong_usage(self) -> None:
        for words, said in (((), "usage"), (("dance",), "usage"), (("show",), "usage"),
                            (("jobs", "--dance"), "usage: ffdist.py jobs"),
                            (("experimnt", "x"), "did you mean experiment?"),
                            (("jobs", "--statuss", "x"), "did you mean --status?"),
                            (("show", ""), "invalid ID ''"),
                            (("submit", "--input", "-a.mp4"), "as --input=-VALUE")):
            self.assertIn(said, self.cli(*words, code=2).stderr)
        for program, word in (("agent.py", "runn"), ("agent.py", "--registr")):
            done = run(str(TOP / program), word, folder=self.folder)
            self.assertEqual(
                (done.returncode, "did you mean" in done.stderr), (2, True), done.stderr
            )
        told = run(str(TOP / "hwdetect.py"), "--version", folder=self.folder)
        self.assertIn("ffdist hwdetect", told.stdout)

    def test_it_runs_as_a_module_too(self) -> None:
        done = run("-m", "ffdist", "jobs", "--master", "http://127.0.0.1:9",
                   folder=self.folder, env={"PYTHONPATH": str(TOP)})
        self.assertEqual((done.returncode, done.stdout), (3, ""), done.stderr)


class Flags(unittest.TestCase):
    """One reader of flags and one of durations, whichever program is asked."""

    def parsers(self) -> dict[str, tuple[argparse.ArgumentParser, list[str]]]:
        return {
            "ffdist": (ffdist.build_parser(), ["jobs"]),
            "agent": (agent.build_parser(True), []),
            "hwdetect": (hwdetect.build_parser(), []),
        }

    def test_a_command_gets_the_flags_that_it_has_among_all(self) -> None:
        for name, command in ffdist.COMMANDS.items():
            for example in command.examples:
                words = [name, *shlex.split(example)]
                with self.subTest(words):
                    own = ffdist.build_parser(words).parse_args(words)
                    self.assertEqual(vars(own), vars(ffdist.build_parser().parse_args(words)))

    def test_a_switch_of_the_environment_means_the_same_in_all_three(self) -> None:
        for word, on in (
            ("y", True),
            ("1", True),
            ("On", True),
            ("no", False),
            ("0", False),
            ("", False),
        ):
            with mock.patch.dict(os.environ, FFDIST_JSON=word):
                for name, (parser, words) in self.parsers().items():
                    self.assertIs(parser.parse_args(words).json, on, (name, word))

    def test_a_switch_that_cannot_be_read_is_wrong_usage_where_it_matters(self) -> None:
        with mock.patch.dict(os.environ, FFDIST_JSON="maybe"):
            for name, (parser, words) in self.parsers().items():
                heard = io.StringIO()
                with contextlib.redirect_stderr(heard), self.assertRaises(SystemExit) as caught:
                    parser.parse_args(words)
                self.assertEqual(caught.exception.code, 2, name)
                self.assertIn("invalid FFDIST_JSON 'maybe': expected 1 or 0", heard.getvalue())
                self.assertIs(parser.parse_args([*words, "--json"]).json, True, "a flag beats it")

    def test_a_duration_means_the_same_in_all_three(self) -> None:
        watch = hwdetect.build_parser().parse_args(["--watch", "1d"]).watch
        stall = agent.build_parser(False).parse_args(["--stall-limit", "1d"]).stall_limit
        node = ffdist.build_parser().parse_args(["master", "--node-timeout", "1d"]).node_timeout
        self.assertEqual((watch, stall, node), (86400.0, 86400.0, 86400.0))

    def test_milliseconds_rule_no_timeout(self) -> None:
        for argv in (["master", "--node-timeout", "1ms"], ["master", "--retry-delay", "5ms"]):
            heard = io.StringIO()
            with contextlib.redirect_stderr(heard), self.assertRaises(SystemExit):
                ffdist.build_parser().parse_args(argv)
            self.assertIn("invalid duration '", heard.getvalue())

    def test_a_result_that_cannot_be_printed_is_an_error_in_a_sentence(self) -> None:
        words = f"{sys.executable} {TOP / 'agent.py'} run 64p25-h264 --no-probe -p duration=0.2"
        cases = {
            ">&-": "agent: standard output: it is closed: send it to a file, or to /dev/null\n",
            ">/dev/full": "agent: standard output: No space left on device\n",
        }
        for redirection, sentence in cases.items():
            done = subprocess.run(["sh", "-c", f"exec {words} {redirection}"],
                                  stderr=subprocess.PIPE, text=True, timeout=60)
            self.assertEqual(done.returncode, 1, done.stderr)
            self.assertTrue(done.stderr.endswith(sentence), done.stderr)


class TheDemo(FleetCase):
    def test_the_demo_runs_a_whole_fleet_and_leaves_nothing(self) -> None:
        need("ffmpeg", "ffprobe")
        scratch = self.folder / "tmp"
        scratch.mkdir()
        done = run(
            str(TOP / "ffdist.py"),
            "demo",
            "--json",
            folder=self.folder,
            env={"TMPDIR": str(scratch)},
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        job = json.loads(done.stdout)
        metrics = job["result"]["metrics"]
        self.assertEqual((job["status"], metrics["frames"]), ("completed", 150))
        self.assertGreater(metrics["psnr_db"], 25)
        self.assertTrue(job["result"]["encode"]["reason"])
        self.assertTrue(metrics["energy_joules"] is not None or metrics["unknown"]["energy_joules"])
        self.assertEqual(list(scratch.iterdir()), [])
        self.assertEqual(processes_called(str(scratch)), set())
        self.assertNotIn("Traceback", done.stderr)

    def test_the_demo_takes_a_film_of_the_users_and_shows_a_table(self) -> None:
        need("ffmpeg", "ffprobe")
        film = self.film("my film.mp4", 1)
        done = run(str(TOP / "ffdist.py"), "demo", "--input", str(film), folder=self.folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        for word in (
            "node",
            "encoder",
            "why",
            "speed",
            "CPU",
            "memory",
            "energy",
            "size",
            "PSNR",
            "verdict",
        ):
            self.assertIn(word, done.stdout)
        self.assertEqual([path.name for path in film.parent.iterdir()], [film.name])
        missing = run(str(TOP / "ffdist.py"), "demo", "--input", "none.mp4", folder=self.folder)
        self.assertEqual((missing.returncode, len(missing.stderr.strip().splitlines())), (1, 1))

    def test_ctrl_c_ends_all_of_it_and_says_so(self) -> None:
        self.check_end_by(signal.SIGINT, interruptible)

    def test_sigterm_ends_it_in_the_background_of_a_script_too(self) -> None:
        self.check_end_by(signal.SIGTERM, in_background)

    def check_end_by(self, number: signal.Signals, prepare: Callable[[], None]) -> None:
        need("ffmpeg", "ffprobe")
        scratch = self.folder / "tmp"
        scratch.mkdir()
        demo = subprocess.Popen(
            [sys.executable, str(TOP / "ffdist.py"), "demo"],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,
            env={**os.environ, "TMPDIR": str(scratch), "HOME": str(self.folder)},
        )
        self.addCleanup(demo.kill)
        assert demo.stderr is not None
        said = demo.stderr.readline()
        self.assertIn("a master runs at", said)
        demo.send_signal(number)
        shown, words = demo.communicate(timeout=60)
        self.assertEqual((demo.returncode, shown), (130, ""), words)
        self.assertEqual(
            words.splitlines()[-1:], ["the demo was stopped; nothing is left of it"], words
        )
        self.assertEqual((list(scratch.iterdir()), processes_called(str(scratch))), ([], set()))

    def test_without_ffmpeg_it_names_the_command_that_installs_it(self) -> None:
        empty = self.folder / "bin"
        empty.mkdir()
        done = run(str(TOP / "ffdist.py"), "demo", folder=self.folder, env={"PATH": str(empty)})
        self.assertEqual(done.returncode, 1)
        self.assertIn("ffmpeg", done.stderr)
        (empty / "apt-get").symlink_to("/bin/false")
        done = run(str(TOP / "ffdist.py"), "demo", folder=self.folder, env={"PATH": str(empty)})
        self.assertIsNotNone(re.search(r"apt-get .*install.* ffmpeg", done.stderr), done.stderr)
        self.assertEqual(len(done.stderr.strip().splitlines()), 1)


if __name__ == "__main__":
    unittest.main()
