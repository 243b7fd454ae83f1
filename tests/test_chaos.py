"""A fleet under random faults, with a seed: whatever happens at whatever moment, the promises hold.

One master and four agents, each behind a proxy that loses, cuts, delays and repeats messages. At
random: kill -9 of agents, of FFmpeg, of the master; SIGSTOP and SIGCONT of all three; SIGTERM of
agents and of the master; a split network; a full disk under one agent's work folder (as root);
cancel, pause, resume and retry of jobs.

Invariants, checked when the faults are over: every acknowledged job reaches its end, and none
fails; each completed one has exactly one accepted result for each time it was asked for, with the
right number of frames in the report and in the film; no job that was canceled left an output; no
agent ended by itself; no process, no temporary file, no report in a spool is left.

`python3 -m tests.test_chaos --minutes 30 --seed 7 --slots 2` runs it for long.
"""
from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import random
import signal
import subprocess
import sys
import threading
import time
import unittest
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.fleet import Agent, Case, Master
from tests.proxy import Proxy, Sometimes, passing
from tests.support import call, free_port, mounted_small, need, wait_for

AGENTS = 4
FRAMES = 20
PARAMETERS = {"width": 64, "height": 64, "fps": 20, "duration": 1, "preset": "ultrafast"}
# What the hand does, and how often beside the others.
FAULTS = {"agent_kill": 3, "agent_term": 2, "agent_stop": 2, "ffmpeg_kill": 4, "ffmpeg_stop": 2,
          "master_kill": 2, "master_stop": 1, "master_term": 1, "split": 3, "disk": 2,
          "cancel": 4, "pause": 4, "resume": 3, "retry": 2}
ORDERS = {"cancel": ("running", "pending", "paused"), "pause": ("running", "running", "pending"),
          "resume": ("paused",), "retry": ("completed", "canceled")}
DISK_BYTES = 4 << 20
SAMPLE = 25
BACKLOG = 10
NO_ANSWER = (OSError, http.client.HTTPException, AssertionError)


class Fleet:
    """One master, some agents, and a hand that breaks them; a thread heals what is broken."""

    def __init__(self, folder: Path, slots: int, seed: int, seconds: float) -> None:
        self.folder = folder
        self.slots = slots
        self.chance = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.jobs: dict[str, bool] = {}  # id -> acknowledged
        self.retried: set[str] = set()
        self.problems: list[str] = []
        self.healing: list[tuple[float, Callable[[], object]]] = []
        self.lock = threading.Lock()  # guards healing
        self.over = threading.Event()
        self.port = free_port()
        self.master = self.start_master()
        self.proxies = [
            Proxy(self.port, Sometimes(0.08, seed + number)) for number in range(AGENTS)
        ]
        self.disk = self.mount()
        self.agents = [self.start_agent(number) for number in range(AGENTS)]
        self.weights = {
            fault: weight for fault, weight in FAULTS.items() if fault != "disk" or self.disk
        }
        threading.Thread(target=self.heal, daemon=True).start()

    # -- starting

    def mount(self) -> Path | None:
        """Return the first agent's work folder on a disk of a few MB, where that can be had."""
        disk = self.folder / "small-disk"
        if not mounted_small(disk, str(DISK_BYTES)):
            print(
                "chaos: no full disk among the faults: mounting a small one takes root",
                file=sys.stderr,
            )
            return None
        return disk

    def start_master(self) -> Master:
        return Master(self.folder, "--node-timeout", "3s", port=self.port,
                      env={"FFDIST_RETRY_DELAY_MOST": "3s"})

    def start_agent(self, number: int) -> Agent:
        work = ["--work-dir", str(self.disk)] if self.disk and number == 0 else []
        agent = Agent(self.folder, self.proxies[number].url, "--heartbeat-interval", "1s",
                      "--max-concurrent-jobs", str(self.slots), *work, name=f"agent{number}",
                      env={"FFDIST_MIN_FREE": "0", "FFDIST_DRAIN_LIMIT": f"{number % 2 * 3}s"})
        agent.work = Path(work[1]) if work else agent.work
        return agent

    # -- work

    def submit(self, count: int) -> None:
        """Submit jobs through the bad network, each under an id of its own."""
        for _ in range(count):
            job_id, number = (
                str(uuid.UUID(int=self.chance.getrandbits(128), version=4)),
                len(self.jobs),
            )
            parameters = {**PARAMETERS, "realtime": self.chance.random() < 0.4}
            if self.chance.random() < 0.8:
                parameters["output"] = f"{number}.mkv"
            body = {"id": job_id, "scenario": "chaos", "max_retries": 100, "parameters": parameters}
            self.jobs[job_id] = False
            for proxy in self.proxies[:3]:
                with contextlib.suppress(*NO_ANSWER):
                    self.jobs[job_id] = (
                        call(proxy.url, "POST", "/jobs", body, timeout=10).status < 300
                    )
                    break

    def page(self, status: str) -> Any:
        """Return the newest jobs of a status, or none where the master is away."""
        with contextlib.suppress(*NO_ANSWER):
            return call(self.master.url, "GET", f"/jobs?limit=20&status={status}", timeout=5).body
        return {"jobs": [], "total": 0}

    # -- faults

    def break_something(self) -> None:
        fault = self.chance.choices(list(self.weights), list(self.weights.values()))[0]
        number = self.chance.randrange(AGENTS)
        if getattr(self, f"do_{fault}", self.do_order)(*((number,) if fault in DOES else (fault,))):
            self.faults[fault] += 1

    def heal_later(self, seconds: float, heal: Callable[[], object]) -> bool:
        with self.lock:
            self.healing.append((time.monotonic() + seconds, heal))
        return True

    def heal(self) -> None:
        """Heal what is due, until settle(); then all."""
        while self.healing or not self.over.is_set():
            now = time.monotonic()
            with self.lock:
                due = [entry for entry in self.healing if entry[0] <= now or self.over.is_set()]
                for entry in due:
                    entry[1]()
                    self.healing.remove(entry)
            self.over.wait(0.05)

    def hold(self, pid: int, seconds: float) -> bool:
        """Stop a process, and its group where it leads one, for a while."""
        def send(number: int) -> None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        send(signal.SIGSTOP)
        return self.heal_later(seconds, lambda: send(signal.SIGCONT))

    def alive(self, number: int) -> None:
        """Note an agent that ended by itself; wake one that is held."""
        agent = self.agents[number]
        if agent.process.poll() is not None:
            self.problems.append(f"agent{number} ended by itself: {agent.words()[-600:]}")
        else:
            agent.process.send_signal(signal.SIGCONT)

    def do_agent_kill(self, number: int) -> bool:
        self.alive(number)
        self.agents[number].kill()
        time.sleep(self.chance.random() * 0.5)
        self.agents[number] = self.start_agent(number)
        return True

    def do_agent_term(self, number: int) -> bool:
        self.alive(number)
        self.agents[number].end()
        self.agents[number] = self.start_agent(number)
        return True

    def do_agent_stop(self, number: int) -> bool:
        """Hold an agent, at times for longer than the master's patience."""
        return self.hold(self.agents[number].pid, self.chance.choice((0.3, 1.5, 4.5, 6.0)))

    def ffmpegs(self) -> list[int]:
        """Return the pids of this fleet's FFmpegs."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes()
                if str(self.folder).encode() in words and b"ffmpeg" in words.split(b"\0")[0]:
                    found.append(int(path.name))
        return found

    def do_ffmpeg_kill(self, number: int) -> bool:
        running = self.ffmpegs()
        if running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.chance.choice(running), signal.SIGKILL)
        return bool(running)

    def do_ffmpeg_stop(self, number: int) -> bool:
        running = self.ffmpegs()
        return bool(running) and self.hold(self.chance.choice(running), self.chance.uniform(0.2, 3))

    def do_master_kill(self, number: int) -> bool:
        self.master.kill()
        time.sleep(self.chance.choice((0.0, 0.5, 4.0)))
        self.master = self.start_master()
        return True

    def do_master_term(self, number: int) -> bool:
        self.master.process.send_signal(signal.SIGCONT)
        self.master.end()
        self.master = self.start_master()
        return True

    def do_master_stop(self, number: int) -> bool:
        return self.hold(self.master.pid, self.chance.choice((0.5, 4.0)))

    def do_split(self, number: int) -> bool:
        self.proxies[number].split()
        return self.heal_later(self.chance.choice((0.5, 2.0, 6.0)), self.proxies[number].mend)

    def do_disk(self, number: int) -> bool:
        """Fill the small disk for a while."""
        assert self.disk is not None
        ballast = self.disk / "cache" / "ballast"
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 65536)
        return self.heal_later(self.chance.uniform(1, 4), lambda: ballast.unlink(missing_ok=True))

    def do_order(self, verb: str) -> bool:
        jobs = self.page(self.chance.choice(ORDERS[verb]))["jobs"]
        with contextlib.suppress(*NO_ANSWER):
            if jobs:
                job_id = self.chance.choice(jobs)["id"]
                if verb == "retry":
                    self.retried.add(job_id)
                return (
                    call(self.master.url, "POST", f"/jobs/{job_id}/{verb}", timeout=10).status
                    == 200
                )
        return False

    # -- the end

    def settle(self) -> None:
        """Let all faults end, and every agent be alive."""
        self.over.set()
        wait_for(lambda: not self.healing)
        for number, proxy in enumerate(self.proxies):
            proxy.rule = passing
            proxy.mend()
            self.alive(number)

    def open_jobs(self) -> int:
        """Resume what is paused; return how many jobs are not final."""
        total = 0
        for status in ("pending", "running", "paused"):
            page = self.master.get(f"/jobs?limit=1000&status={status}")
            total += page["total"]
            for job in page["jobs"] if status == "paused" else ():
                self.master.call("POST", f"/jobs/{job['id']}/resume")
        return total

    def told(self) -> str:
        network: Counter[str] = sum((proxy.counts for proxy in self.proxies), Counter())
        network.pop("split", None)
        return (
            f"{len(self.jobs)} jobs, {sum(self.faults.values()) + sum(network.values())} faults: "
            f"{dict(sorted(self.faults.items()))}, messages {dict(sorted(network.items()))}"
        )

    def end(self) -> None:
        self.over.set()
        for agent in self.agents:
            with contextlib.suppress(OSError):
                agent.process.send_signal(signal.SIGCONT)
            agent.end()
        with contextlib.suppress(OSError):
            self.master.process.send_signal(signal.SIGCONT)
        self.master.end()
        for proxy in self.proxies:
            proxy.end()
        if self.disk:
            subprocess.run(["umount", "-l", str(self.disk)], check=True)


DOES = frozenset(name[3:] for name in dir(Fleet) if name.startswith("do_")) - {"order"}


class TestChaos(Case):
    seconds = 25.0
    seed = 20261123
    slots = 1

    def test_every_job_ends_once_whatever_is_broken(self) -> None:
        need("ffmpeg", "ffprobe")
        fleet = Fleet(self.folder, self.slots, self.seed, self.seconds)
        self.addCleanup(fleet.end)
        try:
            self.storm(fleet)
            fleet.settle()
            wait_for(lambda: fleet.open_jobs() == 0, 240, "every job ends")
            self.check_jobs(fleet)
            wait_for(lambda: not self.left(fleet), 60, "nothing is left")
        except AssertionError as error:
            with contextlib.suppress(*NO_ANSWER):
                self.keep(fleet)
            raise AssertionError(
                f"seed {self.seed}, {fleet.told()}: {error}; left: {self.left(fleet)}; "
                f"{fleet.problems}"
            ) from error
        finally:
            print(f"chaos: seed {self.seed}, {self.slots} slots, {fleet.told()}", file=sys.stderr)
        self.assertEqual(fleet.problems, [], f"seed {self.seed}, {fleet.told()}")

    def storm(self, fleet: Fleet) -> None:
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:
            if fleet.page("pending")["total"] < BACKLOG:
                fleet.submit(fleet.chance.randrange(1, 5))
            time.sleep(fleet.chance.random() * 0.6)
            fleet.break_something()

    def keep(self, fleet: Fleet) -> None:
        """Show what the jobs that are not final look like."""
        for status in ("pending", "running", "paused"):
            for job in fleet.master.get(f"/jobs?limit=1000&status={status}")["jobs"]:
                fleet.problems.append(str(fleet.master.get(f"/jobs/{job['id']}"))[:3000])
        fleet.problems.append(str(fleet.master.get("/nodes"))[:3000])

    def left(self, fleet: Fleet) -> list[str]:
        """Return what should not be there at rest."""
        found = [f"FFmpeg {pid}" for pid in fleet.ffmpegs()]
        found += [
            str(path)
            for agent in fleet.agents
            if agent.work.exists()
            for path in agent.work.iterdir()
            if path.name != "cache"
        ]
        found += [str(path) for agent in fleet.agents for path in (agent.state / "spool").iterdir()]
        return found + [
            path.name for path in (self.folder / "media").iterdir() if path.name[0] == "."
        ]

    def check_jobs(self, fleet: Fleet) -> None:
        accepted = self.accepted(fleet.master)
        films = []
        for job_id, acknowledged in fleet.jobs.items():
            answer = fleet.master.call("GET", f"/jobs/{job_id}")
            if answer.status == 404 and not acknowledged:
                continue
            if answer.status != 200:
                fleet.problems.append(f"{job_id} is lost: {answer}")
                continue
            job = answer.body
            for wrong in self.wrongs(job, accepted[job_id], job_id in fleet.retried):
                fleet.problems.append(f"{wrong}: {job}"[:4000])
            film = self.folder / "media" / job["parameters"].get("output", ".")
            if job["status"] == "completed" and film.name != "media":
                films.append(film)
        for film in fleet.chance.sample(films, min(SAMPLE, len(films))):
            if frames_of(film) != str(FRAMES):
                fleet.problems.append(f"{film} has {frames_of(film)} frames")

    def accepted(self, master: Master) -> Counter[str]:
        """Count the completed reports of each job; no attempt may have two."""
        found: Counter[tuple[str, int]] = Counter()
        page = master.get("/results?limit=1000&status=completed")
        while True:
            found.update((result["job_id"], result["attempt"]) for result in page["results"])
            if page["next"] is None:
                break
            page = master.get(f"/results?limit=1000&status=completed&after={page['next']}")
        self.assertEqual([key for key, count in found.items() if count > 1], [], "accepted twice")
        return Counter(job_id for job_id, _ in found)

    def wrongs(self, job: Any, results: int, retried: bool) -> list[str]:
        """Return each promise that a job at its end breaks."""
        completed = sum(record["status"] == "completed" for record in job["attempts"])
        reached = sum(change["status"] == "completed" for change in job["transitions"])
        exists = (self.folder / "media" / job["parameters"].get("output", "none")).is_file()
        lost = any(record["status"] == "lost" for record in job["attempts"])
        last = job["status"]
        return [
            wrong
            for wrong, broken in {
                "is not at its end, or failed": last not in ("completed", "canceled"),
                "has not one result for each completion": not results == completed == reached,
                "was accepted more than once": completed > 1 and not retried,
                "is completed without a result": last == "completed"
                and not (completed and job["result"]),
                "has the wrong number of frames": last == "completed"
                and (job["result"] or {}).get("metrics", {}).get("frames") != FRAMES,
                "is completed without its film": last == "completed"
                and "output" in job["parameters"]
                and not exists,
                "was canceled and left a film": last == "canceled"
                and exists
                and not retried
                and not lost,
            }.items()
            if broken
        ]


def frames_of(film: Path) -> str:
    """Count the frames that are really in a film."""
    done = subprocess.run(["ffprobe", "-v", "error", "-count_frames", "-select_streams", "v:0",
                           "-show_entries", "stream=nb_read_frames", "-of", "csv=p=0", str(film)],
                          capture_output=True, text=True)
    return done.stdout.strip().rstrip(",")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=TestChaos.seconds / 60)
    parser.add_argument("--seed", type=int, default=TestChaos.seed)
    parser.add_argument("--slots", type=int, default=TestChaos.slots, help="of each agent")
    given, rest = parser.parse_known_args()
    TestChaos.seconds, TestChaos.seed, TestChaos.slots = given.minutes * 60, given.seed, given.slots
    unittest.main(argv=[sys.argv[0], *rest])
