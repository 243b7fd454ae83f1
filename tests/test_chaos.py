"""A fleet under random faults: kill -9 of agents, of FFmpeg, of the master; SIGSTOP; agents that come back.

Invariant: whatever is killed at whatever moment, every acknowledged job reaches its end, each completed
one has exactly one accepted result with the right number of frames, no two attempts of a job were
accepted, and when all is over no process and no temporary file is left.

`python3 -m tests.test_chaos --minutes 30 --seed 7` runs it for long.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.support import Agent, Case, Master, free_port, need, wait_for

FRAMES = 20
JOB = {"scenario": "chaos", "max_retries": 100, "parameters": {
    "width": 64, "height": 64, "fps": 20, "duration": 1, "preset": "ultrafast", "output": ""}}


class Fleet:
    """One master, some agents, and a hand that breaks them."""

    def __init__(self, folder: Path, agents: int, chance: random.Random) -> None:
        self.folder = folder
        self.chance = chance
        self.faults: Counter[str] = Counter()
        self.port = free_port()
        self.master = self.start_master()
        self.agents = [self.start_agent(number) for number in range(agents)]
        self.names = [f"agent{number}" for number in range(agents)]
        self.submitted: list[str] = []

    def start_master(self) -> Master:
        return Master(self.folder, "--node-timeout", "3s", port=self.port)

    def start_agent(self, number: int) -> Agent:
        return Agent(self.folder, f"http://127.0.0.1:{self.port}", "--heartbeat-interval", "1s",
                     "--max-concurrent-jobs", str(1 + number % 2), name=f"agent{number}")

    def submit(self, count: int) -> None:
        """Submit jobs one by one; what was not acknowledged does not count."""
        for _ in range(count):
            body = {**JOB, "parameters": {**JOB["parameters"], "output": f"{len(self.submitted)}.mkv"}}  # type: ignore[dict-item]
            with contextlib.suppress(OSError):
                answer = self.master.call("POST", "/jobs", body, timeout=10)
                if answer.status == 201:
                    self.submitted.append(answer.body["id"])

    def ffmpegs(self) -> list[int]:
        """Return the pids of this fleet's FFmpegs."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(self.folder).encode() in (path / "cmdline").read_bytes() and b"ffmpeg" in (
                        path / "cmdline").read_bytes().split(b"\0")[0]:
                    found.append(int(path.name))
        return found

    def break_something(self) -> None:
        fault = self.chance.choice(("agent", "agent", "ffmpeg", "ffmpeg", "master", "stop", "term"))
        number = self.chance.randrange(len(self.agents))
        getattr(self, f"break_{fault}")(number)
        self.faults[fault] += 1

    def break_agent(self, number: int) -> None:
        self.agents[number].kill()
        time.sleep(self.chance.random() * 0.5)
        self.agents[number] = self.start_agent(number)

    def break_term(self, number: int) -> None:
        self.agents[number].end()
        self.agents[number] = self.start_agent(number)

    def break_ffmpeg(self, number: int) -> None:
        running = self.ffmpegs()
        if running:
            with contextlib.suppress(OSError):
                os.kill(self.chance.choice(running), signal.SIGKILL)

    def break_master(self, number: int) -> None:
        self.master.kill()
        time.sleep(self.chance.random())
        self.master = self.start_master()

    def break_stop(self, number: int) -> None:
        """Hold an agent for longer than the master's patience, at times."""
        process = self.agents[number].process
        process.send_signal(signal.SIGSTOP)
        time.sleep(self.chance.choice((0.3, 4.5)))
        process.send_signal(signal.SIGCONT)

    def open_jobs(self) -> int:
        total = 0
        for status in ("pending", "running", "paused"):
            total += self.master.get(f"/jobs?limit=1&status={status}")["total"]
        return total

    def end(self) -> None:
        for agent in self.agents:
            with contextlib.suppress(OSError):
                agent.process.send_signal(signal.SIGCONT)
            agent.end()
        self.master.end()


class TestChaos(Case):
    seconds = 25.0
    seed = 20261123
    agents = 3

    def test_every_job_ends_once_whatever_is_killed(self) -> None:
        need("ffmpeg", "ffprobe")
        chance = random.Random(self.seed)
        fleet = Fleet(self.folder, self.agents, chance)
        self.addCleanup(fleet.end)
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:
            fleet.submit(chance.randrange(1, 6))
            time.sleep(chance.random())
            fleet.break_something()
        why = f"seed {self.seed}, faults {dict(fleet.faults)}"
        wait_for(lambda: fleet.open_jobs() == 0, 120 + self.seconds, why)
        for job_id in fleet.submitted:
            self.check(fleet.master, job_id, why)
        wait_for(lambda: not fleet.ffmpegs(), 10, f"no FFmpeg is left: {why}")
        wait_for(lambda: all(agent.at_rest() for agent in fleet.agents), 10, f"nothing is left: {why}")
        left = [path.name for path in (self.folder / "media").iterdir() if path.name.startswith(".")]
        self.assertEqual(left, [], why)
        print(f"chaos: {len(fleet.submitted)} jobs, faults {dict(sorted(fleet.faults.items()))}",
              file=sys.stderr)

    def check(self, master: Master, job_id: str, why: str) -> None:
        job: Any = master.get(f"/jobs/{job_id}")
        note = f"{why}: {job}"
        self.assertEqual(job["status"], "completed", note)
        self.assertEqual(job["result"]["metrics"]["frames"], FRAMES, note)
        accepted = [attempt for attempt in job["attempts"] if attempt["status"] == "completed"]
        self.assertEqual(len(accepted), 1, note)
        self.assertTrue((self.folder / "media" / job["parameters"]["output"]).is_file(), note)


if __name__ == "__main__":
    import unittest
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=TestChaos.seconds / 60)
    parser.add_argument("--seed", type=int, default=TestChaos.seed)
    given, rest = parser.parse_known_args()
    TestChaos.seconds, TestChaos.seed = given.minutes * 60, given.seed
    unittest.main(argv=[sys.argv[0], *rest])
