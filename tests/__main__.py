"""Run the tests: `python3 -m tests`, a process for each module, two at a time.

Names choose modules, classes or tests (`test_jobs`, `test_jobs.TestLife`); none means all. Each
module prints a line with its seconds when it ends; `--slow` lists the slowest tests after that. A
test that needs a missing program skips and names it; `--install` fetches such programs first,
`--strict` (or FFDIST_TESTS_STRICT=1) makes every skip a failure. The last line is always
`N passed, N failed, N skipped`; the exit code is 0 when nothing failed, 1 when something did, 2 for
wrong usage.
"""
from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ffdist
from tests.fleet import forget_programs, words_of_programs
from tests.support import CACHE, newer_ffmpeg

TOP = Path(__file__).resolve().parent.parent
NEWER_FFMPEG = "imageio-ffmpeg==0.8.1"  # its wheel carries a static binary
MODULE_S = 1500.0  # most of it is for slow and busy machines
MAX_SLOW = 20  # tests that --slow lists
# These begin first and in this order: the longest, beside one that waits much one that works much.
SLOW = (
    "test_end_to_end",
    "test_run",
    "test_protocol",
    "test_safety",
    "test_command_line",
    "test_journal",
    "test_reports",
    "test_chaos",
    "test_hwdetect",
    "test_metrics",
)

# Programs that the tests drive -> the package that brings each, by package manager; "" is any other
# manager, None means that its repositories have no such package.
PACKAGES: Mapping[str, Mapping[str, str | None]] = {
    "ffmpeg": {"dnf": "ffmpeg-free"},
    "ffprobe": {"": "ffmpeg", "dnf": "ffmpeg-free"},
    "curl": {},
    "chromium": {},
    "nginx": {"apt-get": "nginx-light"},
    "nginx-rtmp": {"apt-get": "libnginx-mod-rtmp", "apk": "nginx-mod-rtmp", "": None},
    "promtool": {"apt-get": "prometheus", "apk": "prometheus", "pacman": "prometheus", "": None},
    "openssl": {},
    "victoria-metrics": {"apt-get": "victoria-metrics", "": None},
    "vmalert": {"apt-get": "victoria-metrics", "": None},
}
# What a package may start or enable when it is installed, and the tests do not want to run.
SERVICES = {"nginx": "nginx", "nginx-rtmp": "nginx", "promtool": "prometheus",
            "victoria-metrics": "victoria-metrics"}
RTMP_MODULES = (
    "/usr/lib/nginx/modules/ngx_rtmp_module.so",
    "/usr/lib64/nginx/modules/ngx_rtmp_module.so",
    "/usr/share/nginx/modules/ngx_rtmp_module.so",
)


# ---- programs

def present(program: str) -> bool:
    """Return whether a program (or nginx's RTMP module) is there."""
    if program == "nginx-rtmp":
        return any(os.path.exists(path) for path in RTMP_MODULES)
    return shutil.which(program) is not None


def install() -> None:
    """Install what is missing with the host's package manager; name what has no package."""
    manager = next((name for name in ffdist.MANAGERS if shutil.which(name)), "")
    missing = [program for program in PACKAGES if not present(program)]
    names = {program: PACKAGES[program].get(manager, PACKAGES[program].get("", program))
             for program in missing}
    for program in (program for program, package in names.items() if package is None):
        say(f"{program}: {manager or 'this host'} has no package of it; what needs it is skipped")
    wanted = [program for program, package in names.items() if package is not None]
    plain = {
        program: {manager: package} for program, package in names.items() if package is not None
    }
    try:
        # The RTMP module is not a program on PATH, so provide() cannot look for it.
        ffdist.provide([program for program in wanted if program != "nginx-rtmp"], True, plain)
        if "nginx-rtmp" in wanted:
            for command in ffdist.install_commands(["nginx-rtmp"], plain):
                say(f"+ {' '.join(command)}")
                ffdist.start_program(command, sys.stderr).wait()
    except ffdist.CommandError as error:
        say(f"{error}")
    install_newer_ffmpeg()
    stop_services({SERVICES[program] for program in wanted if program in SERVICES})


def install_newer_ffmpeg() -> None:
    """Fetch an FFmpeg with libvmaf and xpsnr, which few hosts have, into a cache of our own."""
    if newer_ffmpeg() is not None:
        return
    with tempfile.TemporaryDirectory(prefix="ffdist-tests-") as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--python-version",
            "3.13",
            "--dest",
            folder,
            NEWER_FFMPEG,
        ]  # its binary is the same for every Python
        say(f"+ {' '.join(command)}")
        with contextlib.suppress(OSError):
            ffdist.start_program(command, sys.stderr).wait()
        for wheel in Path(folder).glob("*.whl"):
            CACHE.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(wheel) as archive:
                for name in (name for name in archive.namelist() if "/binaries/ffmpeg-" in name):
                    partial = CACHE / f".{os.getpid()}.part"
                    with archive.open(name) as packed, open(partial, "wb") as unpacked:
                        shutil.copyfileobj(packed, unpacked)
                    partial.chmod(0o755)
                    os.replace(partial, CACHE / Path(name).name)
    if newer_ffmpeg() is None:
        say(f"{NEWER_FFMPEG}: not to be had; tests that need libvmaf and xpsnr are skipped")


def stop_services(names: set[str]) -> None:
    """Stop and disable the services that came with packages just installed."""
    for name in sorted(names):
        if os.path.isdir("/run/systemd/system") and shutil.which("systemctl"):
            commands = [["systemctl", "disable", "--now", name]]
        elif shutil.which("service") and os.path.exists(f"/etc/init.d/{name}"):
            commands = [["service", name, "stop"]]
        else:
            continue
        sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
        for command in commands:
            with contextlib.suppress(OSError):
                ffdist.start_program([*sudo, *command], subprocess.DEVNULL).wait(60)


def say_missing() -> None:
    """Name the programs that are missing, and what to do."""
    missing = [program for program in PACKAGES if not present(program)]
    missing += [] if newer_ffmpeg() else ["an ffmpeg with libvmaf and xpsnr"]
    if missing:
        say(
            f"missing: {', '.join(missing)}; "
            "tests that need them are skipped (--install fetches them)"
        )


# ---- one module, in a process of its own

def trace_of(error: Any) -> str:
    """Return the traceback of an error, without the frames of unittest itself."""
    found = traceback.TracebackException(*error)
    found.stack = traceback.StackSummary.from_list(
        [frame for frame in found.stack if f"{os.sep}unittest{os.sep}" not in frame.filename])
    return "".join(found.format())


class Recorder(unittest.TestResult):
    """Writes JSON lines: when a test begins, and its outcome, words and seconds when it ends."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output
        self._problems: list[str] = []
        self._skips: list[str] = []
        self._inside = False
        self._began = 0.0

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        forget_programs()
        self._begin(True)
        self._write({"begins": test.id()})

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        self._end(test)
        self._inside = False

    def _begin(self, inside: bool) -> None:
        self._problems, self._skips, self._inside = [], [], inside
        self._began = time.monotonic()

    def _end(self, test: Any) -> None:
        outcome, words = "passed", ""
        if self._problems:
            outcome = "failed"
            words = "\n".join(self._problems) + words_of_programs()
        elif self._skips:
            outcome = "skipped"
            words = "; ".join(dict.fromkeys(self._skips))
        self._write({"test": test.id(), "outcome": outcome, "words": words,
                     "seconds": time.monotonic() - self._began})

    def _write(self, line: dict[str, Any]) -> None:
        self._output.write(json.dumps(line) + "\n")
        self._output.flush()

    @contextlib.contextmanager
    def _noting(self, test: Any) -> Iterator[None]:
        """Note something about a test; outside of one (setUpClass, an import) write a line."""
        if self._inside:
            yield
            return
        self._begin(False)
        yield
        self._end(test)

    def addError(self, test: Any, err: Any) -> None:
        with self._noting(test):
            self._problems.append(trace_of(err))

    addFailure = addError

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._problems.append(f"{subtest.id()}\n{trace_of(err)}")

    def addSkip(self, test: Any, reason: str) -> None:
        with self._noting(test):
            self._skips.append(reason)

    def addUnexpectedSuccess(self, test: Any) -> None:
        self._problems.append("this test was expected to fail, and passed")


def run_module(names: Sequence[str], descriptor: int) -> int:
    """Run tests here; their outcomes go to a file descriptor. SIGABRT prints the stacks."""
    faulthandler.enable()
    os.set_inheritable(descriptor, False)
    with os.fdopen(descriptor, "w") as output:
        suite = unittest.defaultTestLoader.loadTestsFromNames([f"tests.{name}" for name in names])
        suite.run(Recorder(output))
        output.write(json.dumps({"done": True}) + "\n")
    return 0


# ---- all modules

@dataclass
class Tally:
    """The outcomes of one module; `times` are the seconds of its tests."""

    module: str
    counts: dict[str, int] = field(default_factory=lambda: {"passed": 0, "failed": 0, "skipped": 0})
    failures: list[tuple[str, str]] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    current: str | None = None
    finished: bool = False


_screen = threading.Lock()


def say(line: str) -> None:
    """Print a line, whole, at once."""
    with _screen:
        print(line, flush=True)


def note(tally: Tally, line: str, strict: bool) -> None:
    """Add one line of a module's process to its tally."""
    try:
        message = json.loads(line)
    except ValueError:
        return
    if "outcome" not in message:
        tally.current = message.get("begins")
        tally.finished = "done" in message
        return

    test, outcome, words = (
        message["test"].replace("tests.", "", 1),
        message["outcome"],
        message["words"],
    )
    if outcome == "skipped" and strict:
        outcome, words = "failed", f"skipped, which strict mode forbids: {words}"
    tally.counts[outcome] += 1
    tally.times[test] = message["seconds"]
    if outcome == "failed":
        tally.failures.append((test, words))
        say(f"FAIL {test} ({message['seconds']:.1f} s)")
    elif outcome == "skipped":
        say(f"skip {test}: {words}")


class Modules:
    """The processes that run; end() ends them all."""

    def __init__(self, strict: bool, folder: str) -> None:
        self._strict = strict
        self._folder = folder
        self._running: set[int] = set()
        self._ending = False

    def run(self, module: str, names: Sequence[str]) -> Tally:
        """Run the tests of one module to their end, or to the time limit."""
        tally, began = Tally(module), time.monotonic()
        if self._ending:
            return tally
        reader, writer = os.pipe()
        words = Path(self._folder) / f"{module}.output"
        # Imports are compiled once for all programs of a run, and the working tree stays clean.
        env = {
            **os.environ,
            "TMPDIR": self._folder,
            "PYTHONPYCACHEPREFIX": f"{self._folder}/pycache",
        }
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        with open(words, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests", "--outcomes-to", str(writer), *names], cwd=TOP,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                pass_fds=[writer], env=env)
        self._running.add(process.pid)
        os.close(writer)
        timer = threading.Timer(MODULE_S, process.send_signal, (signal.SIGABRT,))
        timer.start()
        with os.fdopen(reader) as lines:
            for line in lines:
                note(tally, line, self._strict)
        code = process.wait()
        timer.cancel()
        self._running.discard(process.pid)
        if end_group(process.pid, 5.0 if self._ending else 0.0) and not self._ending:
            say(f"note {module} left processes behind; they were ended")
        tally.seconds = time.monotonic() - began
        self._judge_end(tally, code, words)
        return tally

    def _judge_end(self, tally: Tally, code: int, words: Path) -> None:
        """Say what came of a module; one that ended early has failed."""
        if not tally.finished and not self._ending:
            how = f"after {MODULE_S:.0f} s" if tally.seconds >= MODULE_S else f"with status {code}"
            tally.counts["failed"] += 1
            name = tally.current or tally.module
            tally.failures.append((name, f"the tests of {tally.module} ended early, {how}:\n"
                                   + words.read_text(errors="replace")[-8000:]))
            say(f"FAIL {name} ({tally.module} ended early, {how})")
        if not self._ending:
            shown = ", ".join(f"{count} {word}" for word, count in tally.counts.items() if count)
            say(f"{'ok  ' if not tally.counts['failed'] else 'FAIL'} {tally.module}: "
                f"{shown or 'no tests'} in {tally.seconds:.1f} s")

    def end(self) -> None:
        """Ask all that runs to end; run() kills what does not."""
        self._ending = True
        for pid in list(self._running):
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGTERM)


def end_group(pid: int, grace_s: float) -> bool:
    """Kill what is left of a process group after a grace; return whether there was anything."""
    deadline = time.monotonic() + grace_s
    try:
        os.killpg(pid, 0)
        while time.monotonic() < deadline:
            time.sleep(0.1)
            os.killpg(pid, 0)
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        return grace_s > 0
    return True


def chosen(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names to run by module, the slowest first; ValueError for an unknown one."""
    sizes = {path.stem: path.stat().st_size for path in (TOP / "tests").glob("test_*.py")}
    if not names:
        order = {name: number for number, name in enumerate(SLOW)}
        return {
            name: [name]
            for name in sorted(sizes, key=lambda name: (order.get(name, 99), -sizes[name]))
        }
    found: dict[str, list[str]] = {}
    for name in names:
        plain = name[:-3].replace("/", ".") if name.endswith(".py") else name
        plain = plain[6:] if plain.startswith("tests.") else plain
        module = plain.split(".")[0]
        if module not in sizes and f"test_{module}" in sizes:
            module, plain = f"test_{module}", f"test_{plain}"
        if module not in sizes:
            raise ValueError(f"unknown tests {name}: expected one of {', '.join(sorted(sizes))}")
        found.setdefault(module, []).append(plain)
    return found


def run_all(plan: Mapping[str, Sequence[str]], jobs: int, strict: bool) -> list[Tally]:
    """Run modules side by side, to their end."""
    tallies: list[Tally] = []
    with tempfile.TemporaryDirectory(prefix="ffdist-tests-") as folder:
        modules = Modules(strict, folder)
        with ThreadPoolExecutor(jobs) as pool:
            waiting = {pool.submit(modules.run, module, names) for module, names in plan.items()}
            try:
                while (
                    waiting
                ):  # timed, or a signal that another thread takes would not be heard here
                    done, waiting = wait(waiting, 0.5, FIRST_COMPLETED)
                    tallies += [future.result() for future in done]
            except KeyboardInterrupt:
                modules.end()
                raise
    return tallies


def print_failures(tallies: Sequence[Tally]) -> None:
    """Print each test that failed, with its words."""
    for tally in tallies:
        for test, words in tally.failures:
            print(f"\n{'=' * 78}\n{test}\n{'-' * 78}\n{words.rstrip()}")


def print_slowest(tallies: Sequence[Tally]) -> None:
    """Print the slowest tests; the time of a class's setUp is in none of them."""
    times = {test: seconds for tally in tallies for test, seconds in tally.times.items()}
    slowest = sorted(times, key=lambda test: times[test], reverse=True)[:MAX_SLOW]
    print("\nthe slowest tests:")
    for test in slowest:
        print(f"{times[test]:8.1f} s  {test}")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `python3 -m tests`."""
    parser = argparse.ArgumentParser("python3 -m tests", description="Run the tests of ffdist.",
                                     epilog="the last line is: N passed, N failed, N skipped",
                                     allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help="module, class or test, such as test_jobs (all)")
    parser.add_argument("--install", action="store_true", help="install missing programs first")
    strict = os.environ.get("FFDIST_TESTS_STRICT", "").lower() in ("1", "true", "yes", "on")
    parser.add_argument("--strict", action="store_true", default=strict,
                        help="a skipped test is a failed one [FFDIST_TESTS_STRICT]")
    parser.add_argument(
        "--slow", action="store_true", help=f"list the {MAX_SLOW} slowest tests at the end"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="modules to run side by side (2)"
    )
    parser.add_argument("--outcomes-to", type=int, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.outcomes_to is not None:
        return run_module(args.names, args.outcomes_to)
    try:
        plan = chosen(args.names)
    except ValueError as error:
        parser.error(str(error))
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    servers = [
        folder for folder in ("/usr/local/sbin", "/usr/sbin", "/sbin") if folder not in folders
    ]
    os.environ["PATH"] = os.pathsep.join(
        [*folders, *servers]
    )  # where nginx stands, and few users look
    if args.install:
        install()
    else:
        say_missing()
    modules = "1 module" if len(plan) == 1 else f"{len(plan)} modules"
    say(f"Python {sys.version.split()[0]}, {modules}, {args.jobs} at a time"
        f"{', strict' if args.strict else ''}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        tallies = run_all(plan, max(1, args.jobs), args.strict)
    except KeyboardInterrupt:
        return 130
    print_failures(tallies)
    if args.slow:
        print_slowest(tallies)
    total = {
        word: sum(tally.counts[word] for tally in tallies)
        for word in ("passed", "failed", "skipped")
    }
    good = not total["failed"] and sum(total.values()) > 0
    print(
        f"\n{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped",
        flush=True,
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
