"""Real masters, real agents, the real FFmpeg and real kills: what a user of a fleet relies on."""
from __future__ import annotations

import contextlib
import http.server
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import unittest
from pathlib import Path
from typing import Any, ClassVar

from tests.fleet import (
    Agent,
    FleetCase,
    Master,
    OneFleet,
    Program,
    processes_called,
    processes_under,
    run,
)
from tests.support import PATIENCE_S, TOP, control_groups, free_port, need, small_disk, wait_for

CANCEL_DEADLINE_S = 10.0
GPU = {  # what the stand-in of nvidia-smi is asked for, and answers
    "timestamp": "now",
    "index": "0",
    "name": "Tesla T4",
    "uuid": "GPU-0",
    "driver_version": "535.129.03",
    "pci.bus_id": "00000000:FF:1E.0",
    "memory.total": "15360",
    "memory.used": "512",
    "power.draw": "70.00",
    "power.limit": "70.00",
    "utilization.gpu": "42",
    "utilization.encoder": "30",
    "temperature.gpu": "55",
    "clocks_throttle_reasons.active": "0x0000000000000001",
}
SEED_FIELDS = (
    "address",
    "type",
    "cpu_threads",
    "cpu_model",
    "has_gpu",
    "gpu_type",
    "ram_bytes",
    "labels",
)


class ARunningFleet(OneFleet):
    def test_a_job_is_registered_dispatched_run_and_its_result_seen_in_the_masters_log(
        self,
    ) -> None:
        master, agent = self.fleet()
        job = master.finished(master.submit("64p25-h264", duration=0.4, output="o.mp4")["id"])
        self.assertEqual((job["status"], job["attempt"], job["error"]), ("completed", 1, None))
        for name in ("cpu_usage", "memory_usage", "duration"):
            self.assertIsNotNone(job["result"]["metrics"][name])
        self.assertEqual(job["result"]["analyzer_output"]["scenario"], "64p25-h264")
        self.assertTrue((self.folder / "media" / "o.mp4").exists())
        for word in (
            "registered",
            f"job {job['id']} submitted",
            f"result of job {job['id']}",
            "completed",
        ):
            wait_for(lambda word=word: word in master.words(), why=word)
        self.assertIn("registered with", agent.words())
        self.nothing_left(agent)

    def test_a_failed_job_says_why_everywhere(self) -> None:
        master, agent = self.fleet()
        job = master.finished(master.submit("64p25-h264", input="none.mp4")["id"])
        self.assertEqual(
            (job["status"], job["failure_reason"], job["attempt"]), ("failed", "input", 1)
        )
        for words in (job["error"], master.words(), agent.words()):
            self.assertIn("none.mp4", words)
        self.assertNotIn("Traceback", master.words() + agent.words())

    def test_a_cancelled_encode_is_gone_with_its_files_before_it_is_reported(self) -> None:
        master, agent = self.fleet()
        job = self.live(master, 60, output="o.mp4")
        pids = self.encoding(agent)
        wait_for(lambda: list((self.folder / "media").glob(".ffdist-*")), 20, "the hidden output")
        self.assertEqual(master.call("POST", f"/jobs/{job}/cancel").status, 200)
        ended = master.finished(job, CANCEL_DEADLINE_S)
        self.assertFalse(pids & processes_under(agent.work))
        self.nothing_left(agent)
        self.assertEqual((ended["status"], ended["attempt"]), ("canceled", 1))
        self.assertEqual(list((self.folder / "media").iterdir()), [])
        self.assertEqual(self.short(master), "completed", "the slot is free again")

    def test_a_paused_encode_stands_still_and_a_resumed_one_goes_on(self) -> None:
        master, agent = self.fleet()
        job = self.live(master, 4)
        pids = self.encoding(agent)

        def states() -> set[str]:
            return {Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] for pid in pids}
        paused = master.call("POST", f"/jobs/{job}/pause")
        self.assertEqual((paused.status, paused.body["status"]), (200, "paused"))
        wait_for(lambda: states() == {"T"}, 10, "FFmpeg stands still")
        self.assertEqual(master.call("POST", f"/jobs/{job}/resume").body["status"], "running")
        wait_for(lambda: "T" not in states(), 10, "FFmpeg goes on")
        done = master.finished(job)
        self.assertEqual((done["status"], done["attempt"]), ("completed", 1))
        self.assertEqual(done["result"]["metrics"]["frames"], 100)

    def test_a_drained_node_finishes_what_runs_and_takes_nothing_more(self) -> None:
        master, agent = self.fleet()
        node = master.get("/nodes")["nodes"][0]["id"]
        running = self.live(master, 1)
        pids = self.held(agent)
        self.assertEqual(master.call("POST", f"/nodes/{node}/drain").body["status"], "draining")
        waiting = master.submit("64p25-h264", duration=0.2)["id"]
        self.go_on(pids)
        self.assertEqual(master.finished(running)["status"], "completed")
        self.assertEqual(master.get(f"/jobs/{waiting}")["status"], "pending")
        self.assertEqual(master.call("POST", f"/nodes/{node}/resume").status, 200)
        self.assertEqual(master.finished(waiting)["status"], "completed")

    def test_what_a_drained_node_has_not_done_by_the_deadline_is_given_back(self) -> None:
        master, agent = self.fleet()
        node = master.get("/nodes")["nodes"][0]["id"]
        job = self.live(master, 60, output="o.mp4")
        self.encoding(agent)
        self.assertEqual(master.call("POST", f"/nodes/{node}/drain?deadline=1").status, 200)
        state = wait_for(lambda: [found for found in [master.get(f"/jobs/{job}")]
                                  if found["status"] == "pending"], 20)[0]
        self.assertEqual(state["retry_count"], 0)
        self.nothing_left(agent)

    def test_progress_and_log_lines_arrive_while_it_runs(self) -> None:
        master, _ = self.fleet()
        job = self.live(master, 6)
        shown = wait_for(
            lambda: (master.get(f"/jobs/{job}").get("progress") or {}).get("frame"), 30
        )
        self.assertGreater(shown, 0)
        lines = wait_for(lambda: master.get(f"/jobs/{job}/logs")["lines"], 30)
        self.assertTrue(any("run: " in line for line in lines), lines)
        self.assertEqual(master.get(f"/jobs/{job}")["status"], "running")
        master.call("POST", f"/jobs/{job}/cancel")
        master.finished(job)


class MoreSlotsOrNodes(FleetCase):
    def test_two_jobs_run_side_by_side_where_two_may_and_heartbeats_show_at_debug_level(
        self,
    ) -> None:
        need("ffmpeg", "ffprobe")
        master = self.master("--log-level", "debug")
        agent = self.agent(master, "--max-concurrent-jobs", "2", "--heartbeat-interval", "0.2s",
                           "--log-level", "debug")
        jobs = [self.live(master, 2) for _ in range(3)]

        def states() -> list[str]:
            return [job["status"] for job in reversed(master.get("/jobs")["jobs"])]

        wait_for(
            lambda: states() == ["running", "running", "pending"],
            why="two run, and the third waits",
        )
        self.assertEqual([master.finished(job)["status"] for job in jobs], ["completed"] * 3)
        wait_for(
            lambda: master.words().count("heartbeat of agent") >= 3, why="the master tells of them"
        )
        self.assertIn("heartbeat", agent.words())
        self.nothing_left(agent)

    def test_a_job_whose_ffmpeg_was_killed_is_done_on_the_other_node(self) -> None:
        need("ffmpeg", "ffprobe")
        master = self.master("--retry-delay", "0.1s")
        agents = {name: self.agent(master, name=name) for name in ("one", "other")}
        wait_for(lambda: master.get("/nodes")["count"] == 2, why="both register")
        job = self.live(master, 4)
        first = wait_for(
            lambda: [name for name, agent in agents.items() if processes_under(agent.work)]
        )[0]
        for pid in self.encoding(agents.pop(first)):
            os.kill(pid, signal.SIGKILL)
        done = master.finished(job)
        self.assertEqual(
            (done["status"], done["attempt"], done["retry_count"]), ("completed", 2, 1)
        )
        self.assertEqual(done["attempts"][0]["failure_reason"], "killed")
        self.assertIn("SIGKILL", done["attempts"][0]["error"])
        self.assertEqual([done["result"]["node"]], list(agents))


class AQueueOfShortFilms(FleetCase):
    """On one slot: while an encode is near its end, the next job is claimed and probed."""

    # FFmpeg that is near its end until the file `go` is there. Its probes and its trials are real.
    NEAR_ITS_END = """#!/bin/sh
case "$*" in *-progress*)
    printf 'frame=1000\\nout_time_us=990000\\nprogress=continue\\n'
    while [ ! -e '{go}' ]; do sleep 0.05; done
esac
exec '{ffmpeg}' "$@"
"""

    def two_begun(self, *flags: str) -> tuple[Master, Agent, list[str]]:
        """Submit three films to one slot; return their ids when two are claimed."""
        need("ffmpeg", "ffprobe")
        self.go = self.folder / "go"
        programs = self.folder / "bin"
        programs.mkdir()
        real = str(shutil.which("ffmpeg"))
        (programs / "ffmpeg").write_text(self.NEAR_ITS_END.format(go=self.go, ffmpeg=real))
        (programs / "ffmpeg").chmod(0o755)
        self.path = {"PATH": f"{programs}:{os.environ['PATH']}"}
        self.film("in.mp4", 1)
        master, agent = self.fleet(*flags, env=self.path)
        ids = [master.submit("64p25-h264", input="in.mp4", output=f"{number}.mp4")["id"]
               for number in range(3)]
        self.addCleanup(self.go.touch)
        wait_for(lambda: self.phase_of(master, ids[1]) == "waiting for a slot",
                 why=f"the second one is in line; {agent.words()}")
        return master, agent, ids

    def phase_of(self, master: Master, job_id: str) -> str | None:
        return (master.get(f"/jobs/{job_id}")["progress"] or {}).get("phase")

    def states(self, master: Master, ids: list[str]) -> list[str]:
        return [master.get(f"/jobs/{job_id}")["status"] for job_id in ids]

    def all_completed(self, master: Master, ids: list[str]) -> None:
        self.go.touch()
        for job_id in ids:
            done = master.finished(job_id)
            self.assertEqual((done["status"], done["attempt"], done["retry_count"]),
                             ("completed", 1, 0), done["error"])
            self.assertEqual(done["result"]["metrics"]["jobs_beside"], 0)
        outputs = sorted(path.name for path in (self.folder / "media").iterdir())
        self.assertEqual(outputs, ["0.mp4", "1.mp4", "2.mp4", "in.mp4"])

    def test_one_job_is_claimed_ahead_and_no_more(self) -> None:
        master, agent, ids = self.two_begun()
        self.assertEqual(self.states(master, ids), ["running", "running", "pending"])
        encodes = processes_called("-progress") & processes_under(agent.work)
        folders = {os.readlink(f"/proc/{pid}/cwd") for pid in encodes}
        self.assertEqual([Path(folder).name for folder in folders], [f"{ids[0]}-1"])
        self.all_completed(master, ids)
        self.nothing_left(agent)

    def test_each_finds_what_the_one_before_it_wrote(self) -> None:
        need("ffmpeg", "ffprobe")
        self.film("0.mp4", 1)
        master, agent = self.fleet()
        ids = [master.submit("64p25-h264", input=f"{number}.mp4", output=f"{number + 1}.mp4")["id"]
               for number in range(4)]
        self.assertEqual([master.finished(job_id)["status"] for job_id in ids], ["completed"] * 4)
        self.nothing_left(agent)

    def test_a_node_with_a_slot_takes_what_is_not_yet_claimed(self) -> None:
        master, _, ids = self.two_begun()
        other = self.agent(master, name="other", env=self.path)
        wait_for(lambda: processes_under(other.work), why=f"the other works: {other.words()}")
        wait_for(lambda: master.get(f"/jobs/{ids[2]}")["status"] == "running")
        self.all_completed(master, ids)

    def test_a_job_whose_slot_does_not_come_is_given_back_and_done_elsewhere(self) -> None:
        master, agent, ids = self.two_begun()
        given = wait_for(lambda: [job for job in [master.get(f"/jobs/{ids[1]}")]
                                  if job["status"] == "pending"], why="it is given back")[0]
        self.assertEqual([attempt["status"] for attempt in given["attempts"]], ["returned"])
        self.assertEqual((given["retry_count"], given["error"]), (0, None))
        self.assertEqual(processes_under(agent.work / f"{ids[1]}-1"), set())
        other = self.agent(master, name="other", env=self.path)
        wait_for(lambda: master.get(f"/jobs/{ids[1]}")["status"] == "running", why=other.words())
        self.go.touch()
        self.assertEqual([master.finished(job_id)["status"] for job_id in ids], ["completed"] * 3)
        self.assertEqual(master.get(f"/jobs/{ids[1]}")["attempt"], 2)

    def test_a_cancel_of_the_one_in_line_leaves_nothing_and_the_queue_goes_on(self) -> None:
        master, agent, ids = self.two_begun()
        self.assertEqual(master.call("POST", f"/jobs/{ids[1]}/cancel").status, 200)
        self.assertEqual(master.finished(ids[1], CANCEL_DEADLINE_S)["status"], "canceled")
        self.go.touch()
        ends = [master.finished(job_id)["status"] for job_id in ids]
        self.assertEqual(ends, ["completed", "canceled", "completed"])
        self.nothing_left(agent)
        self.assertFalse((self.folder / "media" / "1.mp4").exists())

    def test_an_agent_that_stops_gives_the_one_in_line_back_at_once(self) -> None:
        master, agent, ids = self.two_begun("--drain-limit", "60s")
        agent.process.send_signal(signal.SIGTERM)
        wait_for(lambda: self.states(master, ids)[1] == "pending", why=agent.words())
        self.assertEqual(self.states(master, ids), ["running", "pending", "pending"])
        self.go.touch()
        self.assertEqual(agent.wait(30), 0, agent.words())
        self.assertEqual(self.states(master, ids), ["completed", "pending", "pending"])
        self.nothing_left(agent)

    def test_both_go_on_while_their_master_is_dead(self) -> None:
        master, agent, ids = self.two_begun()
        master.kill()
        self.go.touch()
        wait_for(lambda: processes_under(agent.work / f"{ids[1]}-1"), why=agent.words())
        master = self.master(port=master.port)
        self.all_completed(master, ids)
        self.nothing_left(agent)


class ASickNode(FleetCase):
    def test_a_node_whose_disk_is_full_is_taken_out_and_comes_back_when_it_is_well(self) -> None:
        master = self.master("--retry-delay", "0.2s", "--retry-delay-most", "1s")
        disk = small_disk(self, self.folder / "disk", "8m")
        ballast = disk / "ballast"
        with contextlib.suppress(OSError):
            ballast.write_bytes(bytes(16 << 20))
        self.agent(master, "--work-dir", str(disk / "work"), "--min-free", "4M", name="sick")

        def node(name: str) -> Any:
            return next(
                (node for node in master.get("/nodes")["nodes"] if node["name"] == name), None
            )
        jobs = [master.submit("64p25-h264", duration=0.2)["id"] for _ in range(5)]
        wait_for(
            lambda: node("sick") and node("sick")["status"] == "quarantined", why="three failures"
        )
        self.agent(master, name="well")
        for job in jobs:
            done = master.finished(job)
            self.assertEqual((done["status"], done["result"]["node"]), ("completed", "well"))
        sick = node("sick")
        self.assertIn("out_of_disk", sick["quarantine"]["reason"])
        self.assertIn(str(disk), sick["quarantine"]["reason"])
        shown = run(
            str(TOP / "ffdist.py"), "nodes", "--master", master.url, folder=self.folder
        ).stdout
        self.assertRegex(shown, "sick is in quarantine: .*out_of_disk")
        ballast.unlink()
        for _ in range(60):  # real jobs try whether it is well again, one after each pause
            master.finished(master.submit("64p25-h264", duration=0.2)["id"])
            if node("sick")["status"] == "available":
                return
            time.sleep(1)
        self.fail(f"it stays in quarantine: {node('sick')}")


class Kills(FleetCase):
    def restarted(self, master: Master) -> Master:
        again = Master(self.folder, port=master.port)
        self.addCleanup(again.end)
        return again

    def test_a_killed_master_comes_back_and_the_encode_has_gone_on(self) -> None:
        master, agent = self.fleet()
        job = self.live(master, 2)
        pids = self.held(agent)
        master.kill()
        wait_for(lambda: "work goes on" in agent.words(), why="the agent has noticed")
        master = self.restarted(master)
        self.assertTrue(pids & processes_under(agent.work), "the encode goes on")
        self.go_on(pids)
        ended = master.finished(job)
        end = ended["status"], ended["attempt"], ended["retry_count"]
        self.assertEqual(end, ("completed", 1, 0))
        self.assertEqual(master.get("/results")["total"], 1)
        self.assertEqual(master.get("/nodes")["count"], 1)
        self.nothing_left(agent)

    def test_a_result_that_finds_no_master_waits_on_disk_and_is_delivered_once(self) -> None:
        master, agent = self.fleet()
        job = self.live(master, 1, output="o.mp4")
        pids = self.held(agent)
        master.kill()
        self.go_on(pids)
        spool = agent.state / "spool"
        wait_for(lambda: list(spool.glob("*.json")), 30, f"the spool: {agent.words()}")
        self.assertTrue((self.folder / "media" / "o.mp4").exists())
        master = self.restarted(master)
        ended = master.finished(job)
        self.assertEqual((ended["status"], ended["attempt"]), ("completed", 1))
        wait_for(lambda: not list(spool.glob("*.json")), 30, "the spool empties")
        self.assertEqual(master.get("/results")["total"], 1)
        self.assertEqual(
            agent.words().count("work goes on"), 1, "an absent master is told once, not per try"
        )
        self.assertIn("answers again", agent.words())

    def test_a_spooled_result_survives_the_agents_own_death(self) -> None:
        master, agent = self.fleet()
        job = self.live(master, 1)
        pids = self.held(agent)
        master.kill()
        self.go_on(pids)
        wait_for(lambda: list((agent.state / "spool").glob("*.json")), 30, "the spool")
        agent.kill()
        master = self.restarted(master)
        self.agent(master)
        ended = master.finished(job)
        self.assertEqual(
            (ended["status"], ended["attempt"], ended["retry_count"]), ("completed", 1, 0)
        )

    def taken_up_again(self, leaves_orphan: bool, **more: Any) -> None:
        """Kill an agent hard in mid-job, start it again: the job is done by the next attempt."""
        master, agent = self.fleet(**more)
        film = self.film("in.mp4", 60)
        job = self.live(master, 60, input=film.name, output="o.mp4", max_memory_mb=4000)
        pids = self.encoding(agent)
        wait_for(lambda: list((self.folder / "media").glob(".ffdist-*")), 20, "the hidden output")
        agent.kill()
        if leaves_orphan:
            self.assertLessEqual(pids, processes_under(agent.work))
        os.replace(self.film("short.mp4", 0.4), film)  # an orphan would go on with the long one
        again = self.agent(master, **more)
        wait_for(lambda: not pids & processes_under(agent.work), 20, "the orphan is ended")
        ended = master.finished(job)
        self.assertEqual(
            (ended["status"], ended["attempt"], ended["retry_count"]), ("completed", 2, 1)
        )
        self.assertEqual(master.get("/nodes")["count"], 1, "it is the same node")
        self.assertEqual({name for name in control_groups() if job in name}, set())
        self.nothing_left(again)

    def test_a_killed_agent_leaves_no_orphan_and_its_job_is_done_by_the_next_attempt(self) -> None:
        self.taken_up_again(leaves_orphan=False)

    def test_where_an_orphan_can_outlive_its_agent_the_next_start_ends_it(self) -> None:
        need("ffmpeg", "ffprobe", "nice")
        few = self.folder / "few-programs"
        few.mkdir()
        for name in ("ffmpeg", "ffprobe", "nice"):
            (few / name).symlink_to(str(shutil.which(name)))
        self.taken_up_again(leaves_orphan=True, env={"PATH": str(few)})

    def test_an_agent_that_is_told_to_stop_gives_its_job_back_and_leaves(self) -> None:
        master, agent = self.fleet()
        job = self.live(master, 60, output="o.mp4")
        self.encoding(agent)
        agent.end()
        self.assertEqual(agent.process.returncode, 0, agent.words())
        self.nothing_left(agent)
        state = master.get(f"/jobs/{job}")
        found = state["status"], state["retry_count"], state["error"]
        self.assertEqual(found, ("pending", 0, None))
        self.assertEqual(master.get("/nodes")["nodes"][0]["status"], "offline")
        self.assertEqual(list((self.folder / "media").iterdir()), [])

    def test_five_results_of_a_dead_master_survive_the_agent_and_arrive_once_in_order(self) -> None:
        master, agent = self.fleet("--max-concurrent-jobs", "5")
        jobs = [
            self.live(master, seconds) for seconds in (6, 5.5, 5, 6.5, 4.5)
        ]  # none ends before the kill
        wait_for(
            lambda: master.get("/jobs?status=running")["total"] == 5, 30, "all five are claimed"
        )
        master.kill()
        spool = agent.state / "spool"
        wait_for(
            lambda: len(list(spool.glob("*.json"))) == 5, 60, f"five in the spool: {agent.words()}"
        )
        agent.kill()
        order = [json.loads(path.read_text())["job_id"] for path in sorted(spool.glob("*.json"))]
        self.assertEqual(sorted(order), sorted(jobs))
        master = self.restarted(master)
        self.agent(master)
        wait_for(lambda: not list(spool.glob("*.json")), 30, "the spool empties")
        results = master.get("/results")
        self.assertEqual([result["job_id"] for result in results["results"]], order[::-1])
        for job in jobs:
            told = master.get(f"/jobs/{job}")
            self.assertEqual(
                (told["status"], told["attempt"], told["retry_count"]), ("completed", 1, 0)
            )
            lines = master.get(f"/jobs/{job}/logs")["lines"]
            self.assertEqual(
                len([line for line in lines if "kb/s:" in line]), 1, "its last lines, once"
            )

    def test_a_killed_ffmpeg_ends_only_its_attempt(self) -> None:
        master, agent = self.fleet()
        job = self.live(master, 60)
        for pid in self.encoding(agent):
            os.kill(pid, signal.SIGKILL)
        retried = wait_for(lambda: [found for found in [master.get(f"/jobs/{job}")]
                                    if found["retry_count"]], 30)[0]
        self.assertIn("SIGKILL", retried["attempts"][0]["error"])
        self.assertEqual(retried["attempts"][0]["failure_reason"], "killed")
        master.call("POST", f"/jobs/{job}/cancel")
        self.assertEqual(master.finished(job)["status"], "canceled")
        self.assertEqual(self.short(master), "completed")


class Leaving(FleetCase):
    """SIGTERM of an agent: it finishes what runs, within a limit, and gives back the rest."""

    def told(
        self, limit: str, *flags: str, seconds: float = 60
    ) -> tuple[Master, Agent, str, set[int]]:
        """Start a fleet with a live job that is held, end its agent, and wait for its word."""
        master, agent = self.fleet("--drain-limit", limit, *flags)
        job = self.live(master, seconds, output="o.mp4")
        pids = self.held(agent)
        agent.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "finishing 1 job, for at most" in agent.words(), 10, agent.words())
        self.assertIn("a second signal gives it back at once", agent.words())
        return master, agent, job, pids

    def given_back(self, master: Master, agent: Agent, job: str, pids: set[int]) -> None:
        self.assertEqual(agent.wait(20), 0, agent.words())
        state = master.get(f"/jobs/{job}")
        self.assertEqual(
            (state["status"], state["retry_count"], state["error"]), ("pending", 0, None)
        )
        self.assertEqual(master.get("/nodes")["nodes"][0]["status"], "offline")
        self.nothing_left(agent)

    def test_what_runs_is_finished_and_nothing_more_is_taken(self) -> None:
        master, agent, job, pids = self.told("60s", seconds=2)
        waiting = wait_for(
            lambda: (
                master.get("/nodes")["nodes"][0]["status"] == "draining"
                and master.submit("64p25-h264", duration=0.2)
            ),
            10,
            "the master knows at once",
        )["id"]
        self.go_on(pids)
        self.assertEqual(agent.wait(30), 0, agent.words())
        done = master.get(f"/jobs/{job}")
        self.assertEqual((done["status"], done["attempt"], done["result"]["metrics"]["frames"]),
                         ("completed", 1, 50))
        self.assertEqual(master.get(f"/jobs/{waiting}")["status"], "pending")
        self.assertEqual(master.get("/nodes")["nodes"][0]["status"], "offline")
        self.nothing_left(agent)

    def test_what_is_not_done_within_the_limit_is_given_back(self) -> None:
        self.given_back(*self.told("1s"))

    def test_a_second_signal_gives_back_at_once(self) -> None:
        told = self.told("10m")
        told[1].process.send_signal(signal.SIGINT)
        self.given_back(*told)

    def test_a_slot_that_is_free_is_not_filled_while_another_finishes(self) -> None:
        master, agent, job, pids = self.told("60s", "--max-concurrent-jobs", "2", seconds=1)
        waiting = master.submit("64p25-h264", duration=0.2)["id"]
        self.go_on(pids)
        self.assertEqual(agent.wait(30), 0, agent.words())
        states = [master.get(f"/jobs/{one}")["status"] for one in (job, waiting)]
        self.assertEqual(states, ["completed", "pending"])

    def test_orders_are_obeyed_until_the_end(self) -> None:
        master, agent, job, pids = self.told("10m")
        self.go_on(pids)
        self.assertEqual(master.call("POST", f"/jobs/{job}/cancel").status, 200)
        self.assertEqual(master.finished(job, CANCEL_DEADLINE_S)["status"], "canceled")
        self.assertEqual(agent.wait(20), 0, agent.words())
        self.nothing_left(agent)

    def without_its_master(self, seconds: float, limit: str) -> tuple[Any, ...]:
        """Kill the master while an agent leaves; return the job's end when both are back."""
        master, agent, job, pids = self.told(limit, seconds=seconds)
        master.kill()
        if seconds < 60:
            self.go_on(pids)
        self.assertEqual(agent.wait(60), 0, agent.words())
        spool = agent.state / "spool"
        self.assertEqual(len(list(spool.glob("*.json"))), 1)
        self.nothing_left(agent)
        master = Master(self.folder, port=master.port)
        self.addCleanup(master.end)
        master.call("POST", f"/nodes/{master.get('/nodes')['nodes'][0]['id']}/drain")
        self.agent(master)
        wait_for(lambda: not list(spool.glob("*.json")), 30, "it is delivered")
        state = master.get(f"/jobs/{job}")
        return state["status"], state["attempt"], state["retry_count"]

    def test_without_its_master_it_finishes_too_and_keeps_the_result(self) -> None:
        self.assertEqual(self.without_its_master(1, "60s"), ("completed", 1, 0))

    def test_without_its_master_it_ends_in_time_and_gives_back_later(self) -> None:
        self.assertEqual(self.without_its_master(60, "1s"), ("pending", 1, 0))


class Starting(FleetCase):
    def words(self, state: Path, master: str, *more: str) -> list[str]:
        return [
            str(TOP / "agent.py"),
            "--master",
            master,
            "--state-dir",
            str(state),
            "--media-root",
            str(self.folder / "media"),
            "--no-probe",
            *more,
        ]

    def refused(self, *words: str, code: int, said: str, **more: Any) -> None:
        done = run(*words, folder=self.folder, timeout=30, **more)
        self.assertEqual(done.returncode, code, done.stderr)
        lines = [line for line in done.stderr.splitlines() if line.startswith("agent:")]
        self.assertEqual(len(lines), 1, done.stderr)
        self.assertIn(said, lines[0])
        self.assertNotIn("Traceback", done.stderr)

    def test_a_second_agent_on_the_same_state_folder_is_refused(self) -> None:
        master, agent = self.fleet()
        words = self.words(
            agent.state, master.url, "--register", "--allow-master-as-worker", "--yes"
        )
        self.refused(*words, code=1, said="in use by another agent")
        self.assertEqual(master.get("/nodes")["count"], 1)
        self.assertIsNone(agent.process.poll())

    def test_without_register_an_agent_goes_on_as_the_node_it_was(self) -> None:
        master = self.master()
        words = self.words(
            self.folder / "agent-state", master.url, "--allow-master-as-worker", "--yes"
        )
        self.refused(*words, code=1, said="--register")
        self.assertEqual(master.get("/nodes")["count"], 0)
        agent = self.agent(master)
        node = wait_for(lambda: master.get("/nodes")["nodes"], 30)[0]["id"]
        agent.end()
        again = Program([sys.executable, "-W", "error", *words], self.folder, "again")
        self.addCleanup(again.end)
        wait_for(lambda: master.get(f"/nodes/{node}")["status"] == "available", 30)
        self.assertEqual(master.get("/nodes")["count"], 1)

    def test_a_node_that_the_master_has_forgotten_registers_again(self) -> None:
        master, agent = self.fleet("--heartbeat-interval", "0.3s")
        node = master.get("/nodes")["nodes"][0]["id"]
        self.assertEqual(master.call("DELETE", f"/nodes/{node}").status, 200)
        wait_for(lambda: master.get("/nodes")["count"], 30, agent.words())
        self.assertEqual(self.short(master), "completed")

    def test_an_agent_started_before_its_master_waits_for_it(self) -> None:
        need("ffmpeg", "ffprobe")
        port = free_port()
        agent = Agent(self.folder, f"http://127.0.0.1:{port}")
        self.addCleanup(agent.end)
        wait_for(lambda: "no answer" in agent.words(), 30)
        master = self.master(port=port)
        wait_for(lambda: master.get("/nodes")["count"], 40, agent.words())

    def test_the_masters_own_machine_is_no_worker_unless_told(self) -> None:
        master = self.master()
        words = self.words(self.folder / "s", master.url, "--register")
        self.refused(*words, code=2, said="--allow-master-as-worker")
        self.refused(*words, "--allow-master-as-worker", code=2, said="--yes")
        self.assertEqual(master.get("/nodes")["count"], 0)

    def terminal(self, answer: bytes, *words: str) -> tuple[subprocess.Popen[bytes], str]:
        """Start on a terminal, wait for the question, answer it."""
        parent, child = pty.openpty()
        env = {name: value for name, value in os.environ.items() if not name.startswith("FFDIST_")}
        process = subprocess.Popen(
            [sys.executable, *words],
            stdin=child,
            stdout=child,
            stderr=child,
            cwd=self.folder,
            env={**env, "HOME": str(self.folder)},
            start_new_session=True,
        )
        os.close(child)
        self.addCleanup(os.close, parent)
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)
        said = b""
        limit = time.monotonic() + PATIENCE_S
        while b"[y/N]" not in said and time.monotonic() < limit:
            if select.select([parent], [], [], 0.2)[0]:
                said += os.read(parent, 4096)
        os.write(parent, answer)
        return process, said.decode()

    def test_on_a_terminal_it_warns_and_asks(self) -> None:
        need("ffmpeg", "ffprobe")
        master = self.master()
        words = self.words(self.folder / "s", master.url, "--register", "--allow-master-as-worker")
        process, said = self.terminal(b"no\n", *words)
        self.assertRegex(said, r"(?i)warning.*compete")
        self.assertEqual(process.wait(PATIENCE_S), 2)
        self.assertEqual(master.get("/nodes")["count"], 0)
        process, _ = self.terminal(b"yes\n", *words)
        wait_for(lambda: master.get("/nodes")["count"], 30)

    def test_wrong_flags_are_one_sentence_each(self) -> None:
        cases = (
            ("--master", "ftp://x"),
            ("--poll-interval", "soon"),
            ("--max-concurrent-jobs", "x"),
            ("--media-root", "/none"),
            ("--min-free", "lots"),
            ("--drain-limit", "soon"),
            ("--stall-limit", "0s"),
            ("--name", ""),
            ("--what", "--what"),
            ("--log-level", "loud"),
        )
        for words in cases:
            with self.subTest(words):
                done = run(
                    str(TOP / "agent.py"), "--register", *words, folder=self.folder, timeout=30
                )
                self.assertEqual(done.returncode, 2, done.stderr)
                self.assertIn(words[0].lstrip("-"), done.stderr)
                self.assertNotIn("Traceback", done.stderr)

    def test_samplers_run_only_while_a_job_runs(self) -> None:
        stand_in = TOP / "tests" / "bin" / "nvidia-smi"
        if not stand_in.exists():
            self.skipTest(f"{stand_in} is not there")
        need("ffmpeg", "ffprobe")
        folder = self.folder / "bin"
        folder.mkdir()
        (folder / "nvidia-smi").symlink_to(stand_in)
        table = self.folder / "gpu.csv"
        table.write_text(f"{','.join(GPU)}\n{', '.join(GPU.values())}\n")
        called = f"{folder}/nvidia-smi"
        master = self.master()
        path = f"{folder}:{os.environ['PATH']}"
        self.agent(master, env={"PATH": path, "FFDIST_TEST_NVIDIA_SMI": str(table)})
        node = wait_for(lambda: master.get("/nodes")["nodes"], 40)[0]
        self.assertTrue(node["has_gpu"], node)
        self.assertEqual(processes_called(called), set(), "nothing samples an idle machine")
        for _ in range(2):
            job = self.live(master, 2)
            wait_for(lambda: processes_called(called), 30, "the sampler starts with the job")
            metrics = master.finished(job)["result"]["metrics"]
            self.assertEqual(processes_called(called), set(), "it ends with the job")
            self.assertEqual((metrics["gpu_usage"], metrics["gpu_memory_usage"]), (42.0, 512.0))
            if metrics["gpu_energy_joules"] is None:  # a busy machine starts even a stand-in late
                self.assertIn(
                    "readings of nvidia-smi cover", metrics["unknown"]["gpu_energy_joules"]
                )
            else:
                self.assertGreater(metrics["gpu_energy_joules"], 0)


SEED_NODE = "660e8400-e29b-41d4-a716-446655440001"


class SeedMaster(http.server.BaseHTTPRequestHandler):
    """A stand-in of the seed's master: its eight endpoints and nothing else, no `protocol`."""

    protocol_version = "HTTP/1.1"
    calls: ClassVar[list[tuple[str, str, Any]]] = []
    queue: ClassVar[list[dict[str, Any]]] = []

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        self.calls.append(("GET", self.path, None))
        if self.path.startswith("/jobs/next?"):
            self.answer(200, {"job": self.queue.pop(0) if self.queue else None})
        else:
            self.answer(404, {"error": "not found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        value = json.loads(body) if body else None
        self.calls.append(("POST", self.path, value))
        if self.path == "/nodes/register":
            known = {name: value.get(name) for name in SEED_FIELDS}
            self.answer(201, {**known, "id": SEED_NODE, "status": "available"})
        elif self.path.endswith("/heartbeat"):
            self.answer(200, {"status": "ok"})
        elif self.path == "/results":
            self.answer(200, {"status": "success"})
        else:
            self.answer(404, {"error": "not found"})


class OrderingMaster(SeedMaster):
    """A stand-in master that orders a running job, and one that the agent lacks, to be returned."""

    calls: ClassVar[list[tuple[str, str, Any]]] = []
    queue: ClassVar[list[dict[str, Any]]] = []
    actions: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.path = self.path.split("?")[0].replace("/progress", "/heartbeat")
        super().do_POST()

    def answer(self, status: int, body: Any) -> None:
        more = {"protocol": 1} if status == 201 else {}
        if "status" in body or "job" in body:
            more = {**more, "actions": self.actions, "orders": 1}
        time.sleep(0.05)  # it parks no request
        super().answer(status, {**body, **more})


class AnOrderToReturn(FleetCase):
    def test_what_runs_and_what_is_not_held_is_reported_returned_once(self) -> None:
        need("ffmpeg", "ffprobe")
        ids = [f"550e8400-e29b-41d4-a716-44665544000{number}" for number in range(2)]
        OrderingMaster.queue[:] = [
            {
                "id": ids[0],
                "attempt": 3,
                "scenario": "64p25-h264",
                "parameters": {"duration": 60, "realtime": True, "output": "o.mp4"},
            }
        ]
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OrderingMaster)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # an agent that leaves
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        agent = Agent(self.folder, f"http://127.0.0.1:{server.server_address[1]}")
        self.addCleanup(agent.end)
        self.encoding(agent)
        OrderingMaster.actions[:] = [{"job_id": ids[0], "attempt": 3, "action": "return"},
                                     {"job_id": ids[1], "attempt": 7, "action": "return"}]

        def results() -> list[Any]:
            return [body for _, path, body in OrderingMaster.calls if path == "/results"]
        wait_for(lambda: {body["job_id"] for body in results()} == set(ids), 30, agent.words())
        OrderingMaster.actions.clear()
        told = {(body["job_id"], body["attempt"], body["status"]) for body in results()}
        self.assertEqual(told, {(ids[0], 3, "returned"), (ids[1], 7, "returned")})
        self.nothing_left(agent)


class TheSeedsMaster(FleetCase):
    def test_this_agent_works_for_a_seed_master_by_plain_polling(self) -> None:
        need("ffmpeg", "ffprobe")
        SeedMaster.calls.clear()
        SeedMaster.queue[:] = [
            {
                "id": f"550e8400-e29b-41d4-a716-44665544000{number}",
                "scenario": "64p25-h264",
                "confidence": "auto",
                "parameters": {"duration": 0.2},
                "status": "running",
                "engine": "auto",
            }
            for number in range(2)
        ]
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SeedMaster)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # an agent that leaves
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        agent = Agent(
            self.folder,
            f"http://127.0.0.1:{server.server_address[1]}",
            "--poll-interval",
            "0.2s",
            "--heartbeat-interval",
            "0.3s",
        )
        self.addCleanup(agent.end)

        def results() -> list[Any]:
            return [body for _, path, body in SeedMaster.calls if path == "/results"]
        wait_for(lambda: len(results()) == 2, 60, f"two results: {agent.words()}")
        wait_for(
            lambda: sum(path.endswith("/heartbeat") for _, path, _ in SeedMaster.calls) >= 2, 30
        )
        for result in results():
            self.assertEqual((result["status"], result["node_id"]), ("completed", SEED_NODE))
            self.assertLessEqual({"cpu_usage", "memory_usage", "duration"}, set(result["metrics"]))
            self.assertLessEqual({"scenario", "recommendation"}, set(result["analyzer_output"]))
            self.assertRegex(result["completed_at"], r"^\d{4}-\d\d-\d\dT[\d:.]+Z$")
        register = next(body for _, path, body in SeedMaster.calls if path == "/nodes/register")
        self.assertLessEqual(set(SEED_FIELDS), set(register))
        known = r"/nodes/register|/nodes/[0-9a-f-]+/heartbeat|/jobs/next\?node_id=[^&]+.*|/results"
        for _, path, _ in SeedMaster.calls:
            self.assertRegex(path, f"^(?:{known})$")
        agent.end()
        self.assertEqual(agent.process.returncode, 0, agent.words())


if __name__ == "__main__":
    unittest.main()
