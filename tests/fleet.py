"""Real processes of a fleet under test: masters, agents, command lines; a node played by a test."""
from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import uuid
from pathlib import Path
from typing import Any, ClassVar

from tests.support import PATIENCE_S, TOP, Answer, call, need, wait_for

PARK_S = 30
NOBODY = "00000000-0000-4000-8000-000000000000"


class Program:
    """A process of ours under test, its stderr in a file; end() leaves nothing behind."""

    known: ClassVar[
        list[Program]
    ] = []  # since the running test began, and those that all tests share

    def __init__(self, argv: list[str], folder: Path, name: str, env: dict[str, str] | None = None,
                 cwd: Path | None = None) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("FFDIST_")}
        self.log = folder / f"{name}.log"
        self._file = open(self.log, "ab")
        self._said = ""  # its last words, once it has ended
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=self._file,
            cwd=cwd or folder,
            env={**clean, "HOME": str(folder), **(env or {})},
        )
        self.known.append(self)

    @property
    def pid(self) -> int:
        return self.process.pid

    def words(self) -> str:
        return self.log.read_text(errors="replace")

    def last_words(self) -> str:
        """Return the end of what it said, also when its folder has gone."""
        with contextlib.suppress(OSError):
            self._said = self.words()
        return "\n".join(self._said.splitlines()[-20:])

    def wait(self, seconds: float = PATIENCE_S) -> int:
        return self.process.wait(max(seconds, PATIENCE_S))

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        self.last_words()
        self._file.close()

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError(
                    f"{self.log.stem} did not end on a signal: {self.words()}"
                ) from None
            finally:
                self._close()
        self._close()


def words_of_programs() -> str:
    """Return the last words of each program that the running test started, or shares."""
    words = {program.log: program.last_words() for program in Program.known}
    return "".join(f"\n-- the end of {log.name}:\n{said}\n" for log, said in words.items() if said)


def forget_programs() -> None:
    """Forget the programs that have ended: the next test begins."""
    Program.known[:] = [program for program in Program.known if program.process.poll() is None]


class Master(Program):
    """A real `ffdist.py master`; Master(folder, port=…) is a restart on the same folder."""

    def __init__(self, folder: Path, *flags: str, port: int = 0, python: str = sys.executable,
                 env: dict[str, str] | None = None) -> None:
        argv = [
            python,
            "-W",
            "error",
            str(TOP / "ffdist.py"),
            "master",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--data-dir",
            str(folder / "master"),
            *flags,
        ]
        start = (folder / "master.log").stat().st_size if (folder / "master.log").exists() else 0
        super().__init__(argv, folder, "master", env)
        found = wait_for(lambda: self._address(start) or self.process.poll() is not None,
                         why="the master's address")
        if not isinstance(found, int) or isinstance(found, bool):
            raise AssertionError(f"the master did not start: {self.words()}")
        self.port = found
        self.url = f"http://127.0.0.1:{self.port}"

    def words(self) -> str:
        """Return its log so far; a line is written up to 50 ms after its event."""
        if self.process.poll() is None:
            time.sleep(0.15)
        return super().words()

    def _address(self, start: int) -> int | None:
        said = self.log.read_bytes()[start:].decode(errors="replace")
        match = re.search(r"master at http://[^ ]*:(\d+),", said)
        return int(match[1]) if match else None

    def call(self, method: str, path: str, body: Any = None, **more: Any) -> Answer:
        return call(self.url, method, path, body, **more)

    def get(self, path: str) -> Any:
        answer = self.call("GET", path)
        assert answer.status == 200, answer
        return answer.body

    def submit(self, scenario: str = "720p30-h264", **parameters: Any) -> Any:
        answer = self.call("POST", "/jobs", {"scenario": scenario, "parameters": parameters})
        assert answer.status == 201, answer
        return answer.body

    def register(self, address: str = "worker", **more: Any) -> Any:
        answer = self.call("POST", "/nodes/register", {"address": address, **more})
        assert answer.status in (200, 201), answer
        return answer.body

    def finished(self, job_id: str, seconds: float = PATIENCE_S) -> Any:
        """Return the job when it is final."""
        def final() -> Any:
            job = self.get(f"/jobs/{job_id}")
            return job if job["status"] in ("completed", "failed", "canceled") else None
        return wait_for(final, seconds, f"the end of job {job_id}")


class Agent(Program):
    """A real `agent.py --register` beside its master; state and films lie under `folder`."""

    def __init__(
        self,
        folder: Path,
        master: str,
        *flags: str,
        name: str = "agent",
        probe: bool = False,
        python: str = sys.executable,
        env: dict[str, str] | None = None,
    ) -> None:
        self.state = folder / f"{name}-state"
        self.work = self.state / "work"
        media = folder / "media"
        media.mkdir(exist_ok=True)
        argv = [
            python,
            "-W",
            "error",
            str(TOP / "agent.py"),
            "--register",
            "--master",
            master,
            "--allow-master-as-worker",
            "--yes",
            "--state-dir",
            str(self.state),
            "--media-root",
            str(media),
            "--name",
            name,
            *([] if probe else ["--no-probe"]),
            *flags,
        ]
        super().__init__(argv, folder, name, {"FFDIST_DRAIN_LIMIT": "0s", **(env or {})})

    def at_rest(self) -> bool:
        """Return whether its work folder holds nothing but the cache."""
        return not self.work.exists() or {path.name for path in self.work.iterdir()} <= {"cache"}


def run(*argv: str, folder: Path, env: dict[str, str] | None = None, timeout: float = 300,
        stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command line of ours to its end."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FFDIST_")}
    return subprocess.run(
        [sys.executable, "-W", "error", *argv],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**clean, "HOME": str(folder), **(env or {})},
        timeout=timeout,
    )


def interruptible() -> None:
    """Let Ctrl-C work in a child even where the tests run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def in_background() -> None:
    """Ignore Ctrl-C in a child, as a shell does for `program &` in a script."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def processes_under(folder: Path) -> set[int]:
    """Processes whose current folder lies under this one: an attempt's FFmpeg runs in its own."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd").startswith(
                str(folder.resolve())
            ):
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def processes_called(word: str) -> set[int]:
    """Processes with this word in their command line."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and word.encode() in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except OSError:
            continue
    return found - {os.getpid()}


def processes_below(pid: int) -> set[int]:
    """Return the children of a process."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(path.parent.name))
    return found


class Case(unittest.TestCase):
    """A test with a folder of its own, and real processes that end with it."""

    def setUp(self) -> None:
        folder = tempfile.mkdtemp(prefix="ffdist-test-")
        self.folder = Path(folder)
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        (self.folder / "media").mkdir()

    def master(self, *flags: str, **more: Any) -> Master:
        master = Master(self.folder, *flags, **more)
        self.addCleanup(master.end)
        return master

    def agent(self, master: Master, *flags: str, **more: Any) -> Agent:
        agent = Agent(self.folder, master.url, *flags, **more)
        self.addCleanup(agent.end)
        return agent

    def fleet(self, *flags: str, **more: Any) -> tuple[Master, Agent]:
        """Start a master and an agent, and wait until it has registered."""
        need("ffmpeg", "ffprobe")
        master = self.master()
        agent = self.agent(master, *flags, **more)
        wait_for(lambda: master.get("/nodes")["count"], why=f"the agent registers: {agent.words()}")
        return master, agent


class FleetCase(Case):
    def encoding(self, agent: Agent) -> set[int]:
        """Wait until the FFmpeg of a live encode runs, not of its source; return its processes."""
        try:
            return wait_for(
                lambda: processes_under(agent.work) & processes_called("\0-re\0"), why="encode"
            )
        except AssertionError as error:
            raise AssertionError(f"{error}; the agent says: {agent.words()}") from None

    def held(self, agent: Agent) -> set[int]:
        """Stop the FFmpeg of a live encode, or it might end before what is to be done meanwhile."""
        pids = self.encoding(agent)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        return pids

    def go_on(self, pids: set[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    def live(self, master: Master, seconds: float, **more: object) -> str:
        """Submit a job that takes so many seconds by the clock; return its id."""
        job = master.submit("64p25-h264", duration=seconds, realtime=True, **more)
        return str(job["id"])

    def film(self, name: str, seconds: float) -> Path:
        """Make a small film in the media root."""
        film = self.folder / "media" / name
        picture = f"testsrc2=size=64x36:rate=25:duration={seconds}"
        subprocess.run(
            ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", picture, str(film)],
            check=True,
            stdin=subprocess.DEVNULL,
        )
        return film

    def short(self, master: Master) -> str:
        """Run a short job; return how it ended."""
        return str(master.finished(master.submit("64p25-h264", duration=0.2)["id"])["status"])

    def nothing_left(self, agent: Agent) -> None:
        self.assertEqual(processes_under(agent.work), set(), "no FFmpeg may be left")
        self.assertTrue(agent.at_rest(), list(agent.work.rglob("*")))
        self.assertEqual(
            list((self.folder / "media").rglob(".ffdist-*")), [], "no hidden output may be left"
        )


class OneFleet(FleetCase):
    """One master and one agent for all tests of a class; each finds them without work."""

    flags: ClassVar[tuple[str, ...]] = ()
    home: ClassVar[Path]
    both: ClassVar[tuple[Master, Agent]]

    @classmethod
    def setUpClass(cls) -> None:
        need("ffmpeg", "ffprobe")
        cls.home = Path(tempfile.mkdtemp(prefix="ffdist-test-"))
        cls.addClassCleanup(shutil.rmtree, cls.home, ignore_errors=True)
        master = Master(cls.home)
        cls.addClassCleanup(master.end)
        cls.both = master, Agent(cls.home, cls.reached(master), *cls.flags)
        cls.addClassCleanup(cls.both[1].end)
        wait_for(lambda: master.get("/nodes")["count"], why="the agent registers")

    @classmethod
    def reached(cls, master: Master) -> str:
        """Return the address at which the agent reaches the master."""
        return master.url

    def setUp(self) -> None:
        self.folder = self.home
        self.addCleanup(self.let_rest)

    def let_rest(self) -> None:
        """Cancel what is still open, let the node work again, and empty the media root."""
        master, _ = self.both
        jobs = [job["id"] for status in ("pending", "running", "paused")
                for job in master.get(f"/jobs?status={status}")["jobs"]]
        for job in jobs:
            master.call("POST", f"/jobs/{job}/cancel")
        for job in jobs:
            master.finished(job)
        master.call("POST", f"/nodes/{master.get('/nodes')['nodes'][0]['id']}/resume")
        for path in (self.folder / "media").iterdir():
            path.unlink()

    def fleet(self, *flags: str, **more: Any) -> tuple[Master, Agent]:
        return self.both


class Later:
    """A request that is on its way in a thread: answer() is what came back."""

    def __init__(self, master: Master, method: str, path: str, body: Any = None) -> None:
        self._answers: list[Answer] = []
        self._thread = threading.Thread(
            target=lambda: self._answers.append(call(master.url, method, path, body)), daemon=True)
        self._thread.start()

    @property
    def answered(self) -> bool:
        return bool(self._answers)

    def answer(self) -> Answer:
        self._thread.join(60)
        assert self._answers, "no answer within 60 s"
        return self._answers[0]


class Node:
    """An agent's side of the wire, spoken by hand; without a session it is one of the seed's."""

    def __init__(
        self, master: Master, name: str = "worker", session: bool = True, **more: Any
    ) -> None:
        self.master, self.name, self.more = master, name, more
        self.id = str(uuid.uuid4()) if session else ""
        self.session = uuid.uuid4().hex if session else None
        self.secret = uuid.uuid4().hex if session else None
        self.id = self.register().body["id"]

    def with_session(self, **fields: Any) -> dict[str, Any]:
        own = {"session": self.session} if self.session else {}
        return {name: value for name, value in {**own, **fields}.items() if value is not None}

    def register(self, **fields: Any) -> Answer:
        own = {
            "id": self.id or None,
            "protocol": 1 if self.session else None,
            "secret": self.secret,
        }
        return self.master.call(
            "POST",
            "/nodes/register",
            self.with_session(**{"address": self.name, **own, **self.more, **fields}),
        )

    def start_again(self, **fields: Any) -> Answer:
        """Register as a new session of the same node."""
        self.session = uuid.uuid4().hex
        return self.register(**fields)

    def claim_path(self, **fields: Any) -> str:
        query = "&".join(f"{name}={value}" for name, value in self.with_session(**fields).items())
        return f"/jobs/next?node_id={self.id}" + (f"&{query}" if query else "")

    def claim(self, **fields: Any) -> Answer:
        return self.master.call("GET", self.claim_path(**fields))

    def park(self, **fields: Any) -> Later:
        """Park a claim, and return when it is parked."""
        return self._parked("GET", self.claim_path(**{"wait": PARK_S, **fields}))

    def beat(self, **fields: Any) -> Answer:
        return self.master.call("POST", f"/nodes/{self.id}/heartbeat", self.with_session(**fields))

    def park_beat(self, **fields: Any) -> Later:
        return self._parked(
            "POST", f"/nodes/{self.id}/heartbeat?wait={PARK_S}", self.with_session(**fields)
        )

    def _parked(self, method: str, path: str, body: Any = None) -> Later:
        before = parked(self.master)
        later = Later(self.master, method, path, body)
        wait_for(
            lambda: later.answered or parked(self.master) > before, why="the request is parked"
        )
        return later

    def progress(self, job: Any, **fields: Any) -> Answer:
        return self.master.call(
            "POST",
            f"/jobs/{job['id']}/progress",
            self.with_session(node_id=self.id, attempt=job["attempt"], **fields),
        )

    def report(self, job: Any, status: str = "completed", **fields: Any) -> Answer:
        own = {"job_id": job["id"], "node_id": self.id, "attempt": job["attempt"], "status": status}
        return self.master.call("POST", "/results", self.with_session(**{**own, **fields}))

    def shown(self) -> Any:
        return self.master.get(f"/nodes/{self.id}")


def parked(master: Master) -> int:
    text = master.call("GET", "/metrics").text
    return int(float(re.findall(r"^ffdist_parked_requests (\S+)$", text, re.M)[0]))
