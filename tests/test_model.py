"""A real master against a model of what is promised: random events, crashes after any commit, odd
clocks.

The model (Promises) is written from the words of the contract, not from the code: it knows jobs as
people see them, never an inner state. After each random event, legal or not, it must agree with the
Master class (with a clock of the test's own, in this process), with a real master process over
HTTP, and with the pure advance(). A list of events that breaks the agreement is made shorter before
it is reported.

`FFDIST_TEST_SEED=N` chooses the walks; `python3 -m tests.test_model --walks 500` takes many of
them.
"""
from __future__ import annotations

import argparse
import calendar
import contextlib
import http.client
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ffdist
from agent import ApiError
from tests.fleet import Case, Master
from tests.support import call

SEED = int(os.environ.get("FFDIST_TEST_SEED", "20251229"))
WALKS = 6
EVENTS = 250
NODES = 4
JOBS_MOST = 40
TIMEOUT_S = 10.0
TICK_S = ffdist.REAP_S
JOB_TIMEOUT_S = 15
RETRIES = 3
SHRINK_S = 60.0
ENDS = ("completed", "failed", "canceled", "returned")
FINAL = ("completed", "failed", "canceled")
TRANSIENT = ("node_lost", "network", "out_of_disk", "killed")
PERMANENT = ("input", "parameters", None)
Told = dict[str, Any]
Event = tuple[str, Told]


def uuid_of(kind: str, number: int) -> str:
    """Return the id of a job or a node, the same in every run."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{kind}/{number}"))


class Disagreement(AssertionError):
    """The model and the master say different things."""


def agree(what: str, model: object, master: object) -> None:
    """Demand that both say the same."""
    if model != master:
        raise Disagreement(f"{what}: the model says {model!r}, the master {master!r}")


# ---- what is promised

@dataclass
class Work:
    """A job as it is promised; `holder` is the node of its live attempt.

    `due` is the end of its backoff of `length` s (0 for none); `uncertain` tells that the wall
    clock jumped since: then it may be shorter, and after a restart or a pause begin again, but
    never be longer.
    """

    number: int
    most: int
    timeout: float | None
    pin: int | None = None
    status: str = "pending"
    holder: int | None = None
    canceling: bool = False
    attempt: int = 0
    retries: int = 0
    gave_up: int | None = None
    failed_on: set[int] = field(default_factory=set)
    due: float = 0.0
    length: float = 0.0
    uncertain: bool = False
    began: float = 0.0
    limit: float = float("inf")
    word: str | None = None
    told_paused: bool = False
    reported: bool = False  # a report ended it, and is shown as its result
    reason: str | None = None
    shown_node: int | None = None
    records: list[list[Any]] = field(default_factory=list)


@dataclass
class Machine:
    """A node as it is promised."""

    number: int
    session: str | None = None
    past: list[str] = field(default_factory=list)
    slots: int = 1
    heard: float = 0.0
    silent: bool = False
    leaving: bool = False
    draining: bool = False
    words: list[str] = field(default_factory=list)


class Promises:
    """The model: each event is judged by the master's answer, and followed; `slack_s` forgives real
    time."""

    def __init__(self, slack_s: float = 0.002, wall_slack_s: float = 0.002) -> None:
        self.jobs: dict[int, Work] = {}
        self.nodes: dict[int, Machine] = {}
        self.owners: dict[int, str] = {}  # the secrets of nodes, also of those that were forgotten
        self.now = 0.0
        self.wall = 0.0
        self.slack_s = slack_s
        self.wall_slack_s = wall_slack_s
        self.results = 0
        # Tried again: at once? and since when.
        self.fresh: dict[int, tuple[bool, float, float]] = {}
        self.pure = Pure()

    def judge(self, kind: str, told: Told, status: int, body: Any) -> None:
        """Follow one event, and compare its answer."""
        wanted = getattr(self, f"_{kind}")(told, body if status < 300 else {})
        agree(f"the status of the answer {body}", wanted, status)

    # -- nodes

    def leases(self, node: Machine) -> list[Work]:
        return [work for work in self.jobs.values() if work.holder == node.number]

    def node_status(self, node: Machine) -> str:
        if node.silent or (node.leaving and not self.leases(node)):
            return "offline"
        if node.draining or node.leaving:
            return "draining"
        return "busy" if len(self.leases(node)) >= node.slots else "available"

    def _hear(self, told: Told) -> tuple[int, Machine | None]:
        node = self.nodes.get(told["node"])
        if node is None:
            return 404, None
        if told["session"] != node.session:
            return 409, None
        node.heard, node.silent = self.now, False
        return 200, node

    def _register(self, told: Told, body: Any) -> int:
        node = self.nodes.get(told["node"])
        code = 201 if node is None else 200
        session = told["session"]
        if not self._may_speak_for(node, told):
            return 409
        if node is None:
            node = self.nodes[told["node"]] = Machine(told["node"])
        first = session != node.session
        if first:
            node.past += [node.session] if node.session else []
            node.session = session
        if session and told["secret"]:
            self.owners.setdefault(node.number, told["secret"])
        node.heard, node.silent, node.leaving, node.slots = self.now, False, False, told["slots"]
        held = [entry for entry in told["holding"] if self._holds(node, *entry)]
        if first:
            for work in self.leases(node):
                if (work.number, work.attempt) not in [tuple(entry) for entry in held]:
                    self._lose(work, at_once=True)
        agree(
            "what a registration may keep",
            [(uuid_of("job", job), attempt) for job, attempt in held],
            [(entry["job_id"], entry["attempt"]) for entry in body.get("holding", ())],
        )
        return code

    def _may_speak_for(self, node: Machine | None, told: Told) -> bool:
        """Return whether a registration is of the node itself, and not of a stranger who knows its
        id."""
        session, owner = told["session"], self.owners.get(told["node"])
        if node is not None and session and session in node.past:
            return False
        same = node is not None and session == node.session
        if owner:
            return told["secret"] == owner or bool(same and session)
        return node is None or same or self.node_status(node) == "offline"

    def _holds(self, node: Machine, number: int, attempt: int | None) -> bool:
        work = self.jobs.get(number)
        if work is None or attempt not in (None, work.attempt):
            return False
        if work.holder is None and work.status == "pending" and work.gave_up == node.number:
            self._take_back(work, node)
        return work.holder == node.number

    def _take_back(self, work: Work, node: Machine) -> None:
        work.status, work.holder, work.shown_node, work.gave_up = (
            "running",
            node.number,
            node.number,
            None,
        )
        work.retries = max(0, work.retries - 1)
        work.failed_on.discard(node.number)
        work.due, work.uncertain = 0.0, False
        work.records[-1][2] = "running"
        self._lease(work, node)
        self.pure.follow(work, "reclaim")

    def _lease(self, work: Work, node: Machine) -> None:
        day = 24 * 3600.0
        work.began, work.told_paused = self.now, False
        work.limit = float("inf") if node.session else work.timeout or day

    def _forget(self, told: Told, body: Any) -> int:
        node = self.nodes.get(told["node"])
        if node is None:
            return 404
        for work in self.leases(node):
            self._lose(work)
        del self.nodes[node.number]
        return 200

    def _drain(self, told: Told, body: Any) -> int:
        node = self.nodes.get(told["node"])
        if node is None:
            return 404
        node.draining = told["draining"]
        return 200

    def _heartbeat(self, told: Told, body: Any) -> int:
        code, node = self._hear(told)
        if node is not None:
            node.leaving |= told["leaving"]
            self._check_orders(node, body)
        return code

    def _check_orders(self, node: Machine, body: Any) -> None:
        """Orders stand until obeyed; what a late word about a pause brings is left open."""
        wanted = {
            (uuid_of("job", work.number), work.attempt, "cancel" if work.canceling else "pause")
            for work in self.leases(node)
            if work.canceling or work.status == "paused"
        }
        given = {
            (entry["job_id"], entry["attempt"], entry["action"])
            for entry in body.get("actions", ())
        }
        agree("the orders", wanted, {entry for entry in given if entry[2] != "resume"})

    # -- work

    def _submit(self, told: Told, body: Any) -> int:
        numbers = [entry[0] for entry in told["jobs"]]
        new = [entry for entry in told["jobs"] if entry[0] not in self.jobs]
        pins = {pin for entry in new for pin in entry[3:]}
        if len(set(numbers)) != len(numbers) or not pins <= set(self.nodes):
            return 400
        for number, most, timeout, *pin in new:
            work = self.jobs[number] = Work(
                number, RETRIES if most is None else most, timeout, *pin
            )
            self.pure.begin(work)
        found = body.get("jobs", []) if told["bulk"] else [body] if body else []
        agree("the jobs of the answer", [uuid_of("job", number) for number in numbers],
              [job["id"] for job in found])
        return 201 if new else 200

    def _claim(self, told: Told, body: Any) -> int:
        code, node = self._hear(told)
        if node is None:
            return code
        node.leaving |= told["leaving"]
        self._check_orders(node, body)
        given, word = body["job"], told["word"]
        if word in node.words:
            found = [(uuid_of("job", work.number), work.attempt) for work in self.leases(node)
                     if work.word == word]
            agree(
                "the job of a repeated claim",
                found,
                [(given["id"], given["attempt"])] if given else [],
            )
            return code
        self._check_choice(node, given)
        if given:
            self._hand_out(self._named(given["id"]), node, word)
            agree("the attempt handed out", self._named(given["id"]).attempt, given["attempt"])
        return code

    def _named(self, job_id: str) -> Work:
        return next(work for work in self.jobs.values() if uuid_of("job", work.number) == job_id)

    def waiting(self, node: Machine, at: float) -> list[Work]:
        """Return what a node may get when it is that late, in the order of submission."""
        if node.leaving or node.draining:
            return []
        return [
            work
            for work in self.jobs.values()
            if work.status == "pending"
            and self._fits(work, node)
            and (work.due <= at or work.uncertain)
        ]

    def _fits(self, work: Work, node: Machine) -> bool:
        if work.pin is not None:
            return node.number == work.pin
        return node.number not in work.failed_on or not any(
            other.number not in work.failed_on and self.node_status(other) in ("available", "busy")
            for other in self.nodes.values())

    def _check_choice(self, node: Machine, given: Any) -> None:
        """First submitted, first served; a backoff that is surely over is no reason to wait."""
        may = [uuid_of("job", work.number) for work in self.waiting(node, self.now + self.slack_s)]
        must = [uuid_of("job", work.number) for work in self.waiting(node, self.now - self.slack_s)
                if work.due <= self.now - self.slack_s]
        if given is None:
            agree("what must be handed out", must, [])
        elif given["id"] not in may:
            raise Disagreement(
                f"job {given['id']} was handed out, which this node may not have now: {may}"
            )
        else:
            agree("what was submitted before and left out", [], [
                job for job in must if job in may[:may.index(given["id"])]])

    def _hand_out(self, work: Work, node: Machine, word: str | None) -> None:
        work.status, work.holder, work.shown_node, work.gave_up = (
            "running",
            node.number,
            node.number,
            None,
        )
        work.attempt += 1
        work.word, work.due, work.uncertain = word, 0.0, False
        work.records.append([work.attempt, node.number, "running"])
        node.words += [word] if word else []
        self._lease(work, node)
        self.pure.follow(work, "claim", node_id=uuid_of("node", node.number), claim=word)

    def _progress(self, told: Told, body: Any) -> int:
        code, node = self._hear(told)
        if node is None:
            return code
        if not self._holds(node, told["job"], told["attempt"]):
            return 409 if told["job"] in self.jobs else 404
        work = self.jobs[told["job"]]
        work.told_paused = told["paused"]
        word = "cancel" if work.canceling else "pause" if work.status == "paused" else \
            "resume" if work.told_paused else None
        agree("the order in the answer to progress", [word] if word else [],
              [entry["action"] for entry in body.get("actions", ())])
        return code

    def _report(self, told: Told, body: Any) -> int:
        work, node = self.jobs.get(told["job"]), self.nodes.get(told["node"])
        if told["status"] not in ENDS:
            return 400
        if node is not None:
            code, heard = self._hear(told)
            if heard is None:
                return code
            if work is not None and self._holds(node, work.number, told["attempt"]):
                self._end(work, told["status"], told["reason"])
                return 200
        if work is None:
            return 404
        repeat = any(
            told["attempt"] in (None, attempt)
            and (holder, status) == (told["node"], told["status"])
            for attempt, holder, status in work.records
        )
        return 200 if repeat else 404 if node is None else 409

    def _end(self, work: Work, status: str, reason: str | None) -> None:
        """An accepted report: the end of an attempt, of the job too unless it is tried again."""
        self.results += status != "returned"
        again = status == "failed" and reason in TRANSIENT and work.retries < work.most
        event = {
            "completed": "complete",
            "failed": "fail",
            "canceled": "end",
            "returned": "return",
        }[status]
        if status == "returned" and not work.canceling:
            target = "paused" if work.status == "paused" else "pending"
        elif again and not work.canceling:
            target, event = "paused" if work.status == "paused" else "pending", "requeue"
            self._count_retry(work)
        elif status == "completed" or (status == "failed" and not work.canceling):
            target = status
        else:
            target = "canceled"
        self._let_go(work, target, status, reason)
        work.reported = target in FINAL and status != "returned"
        self.pure.follow(work, event, reported=status, reason=reason)

    def _count_retry(self, work: Work, at_once: bool = False) -> None:
        work.retries += 1
        work.failed_on.add(work.holder if work.holder is not None else -1)
        self.fresh[work.number] = at_once, self.now, self.wall

    def _let_go(self, work: Work, target: str, record: str, reason: str | None) -> None:
        work.records[-1][2] = record
        work.reason = reason if target == "failed" else None
        work.shown_node = work.holder if target in FINAL else None
        work.status, work.holder, work.canceling = target, None, False

    def _lose(self, work: Work, at_once: bool = False) -> None:
        """A lease ends without a report; only a restarted agent's job is tried again without a
        wait."""
        node = work.holder
        left = work.retries < work.most
        if work.canceling:
            target = "canceled"
        elif work.status == "paused":
            target = "paused"
        else:
            target = "pending" if left else "failed"
        if target == "pending":
            self._count_retry(work, at_once)
        self._let_go(work, target, "lost", "node_lost")
        work.gave_up = node if target == "pending" else None
        self.pure.follow(work, "lose" if left else "exhaust", reason="node_lost")

    def _order(self, told: Told, body: Any) -> int:
        work = self.jobs.get(told["job"])
        if work is None:
            return 404
        changed = getattr(self, f"_{told['verb']}")(work)
        if not changed:
            self.pure.refuse(work, told["verb"])
            return 409
        self.pure.follow(work, told["verb"])
        return 200

    def _cancel(self, work: Work) -> bool:
        if work.status in FINAL:
            return False
        if work.holder is None:
            work.status = "canceled"
        else:
            work.status, work.canceling = "running", True
        work.gave_up = None
        return True

    def _pause(self, work: Work) -> bool:
        if work.status not in ("pending", "running") or work.canceling:
            return False
        work.status, work.gave_up = "paused", None
        return True

    def _resume(self, work: Work) -> bool:
        if work.status != "paused":
            return False
        work.status = "pending" if work.holder is None else "running"
        self._begin_again(work)
        return True

    def _begin_again(self, work: Work) -> None:
        if work.uncertain:
            work.due = max(work.due, self.now + work.length)

    def _retry(self, work: Work) -> bool:
        if work.status not in FINAL:
            return False
        work.status, work.retries, work.due, work.shown_node, work.reason = (
            "pending",
            0,
            0.0,
            None,
            None,
        )
        work.reported = work.uncertain = False
        work.failed_on.clear()
        return True

    def _nonsense(self, told: Told, body: Any) -> int:
        return told["code"]

    # -- time

    def tick(self, now: float, wall: float, late_s: float) -> None:
        """Silence counts only while the master listened: a late timer forgives what it did not
        hear."""
        self.now, self.wall = now, wall
        for node in self.nodes.values():
            node.heard += late_s
            if self.node_status(node) != "offline" and now - node.heard > TIMEOUT_S:
                node.silent = True
                for work in self.leases(node):
                    self._lose(work)
        for work in self.jobs.values():
            if work.holder is not None and now - work.began > work.limit:
                self._lose(work)

    def restarted(self) -> None:
        """A new master has heard nobody yet, and gives every lease its time again."""
        for node in self.nodes.values():
            node.heard = self.now
        for work in self.jobs.values():
            self._begin_again(work)
            if work.holder is not None:
                self._lease(work, self.nodes[work.holder])

    def jumped(self) -> None:
        """The wall clock was set: no backoff may become longer by that."""
        for work in self.jobs.values():
            work.uncertain |= work.due > 0.0

    # -- comparison

    def compare(self, jobs: Sequence[Any], nodes: Sequence[Any], results: int) -> None:
        """Compare all that is shown of jobs and nodes."""
        agree(
            "the jobs, newest first",
            [uuid_of("job", number) for number in reversed(list(self.jobs))],
            [job["id"] for job in jobs],
        )
        for job, work in zip(jobs, reversed(list(self.jobs.values()))):
            self._adopt_backoff(work, job)
            model = (work.status, work.attempt, None if work.shown_node is None else
                     uuid_of("node", work.shown_node), work.retries, work.canceling, work.reason)
            agree(
                f"job {work.number} (status, attempt, node, retries, cancel requested, reason)",
                model,
                (
                    job["status"],
                    job["attempt"],
                    job["node_id"],
                    job["retry_count"],
                    job["cancel_requested"],
                    job["failure_reason"] if job["status"] == "failed" else None,
                ),
            )
        agree(
            "the nodes",
            {
                uuid_of("node", node.number): (self.node_status(node), len(self.leases(node)))
                for node in self.nodes.values()
            },
            {node["id"]: (node["status"], node["running"]) for node in nodes},
        )
        agree("the number of results", self.results, results)

    def _adopt_backoff(self, work: Work, job: Any) -> None:
        """Take over a backoff's length, which is the master's to draw, after a look at its
        limits."""
        if work.number not in self.fresh:
            return
        at_once, now, wall = self.fresh.pop(work.number)
        work.due, work.uncertain = 0.0, False
        agree(f"whether retry {work.retries} of job {work.number} may begin at once", at_once,
              job["not_before"] is None)
        if not at_once:
            length = seconds_of(job["not_before"]) - wall
            most = min(300.0, 2.0 ** (work.retries - 1))
            if not -self.wall_slack_s <= length <= most + self.wall_slack_s:
                raise Disagreement(
                    f"retry {work.retries} of job {work.number} waits {length} s of {most}"
                )
            work.due, work.length = now + length, length

    def compare_detail(self, work: Work, job: Any) -> None:
        """Compare the attempts of a job, and what its last report was."""
        agree(
            f"the attempts of job {work.number}",
            [(attempt, uuid_of("node", node), status) for attempt, node, status in work.records],
            [
                (record["attempt"], record["node_id"], record["status"])
                for record in job["attempts"]
            ],
        )
        agree(f"whether job {work.number} has a result", work.reported, job["result"] is not None)
        changes = [entry["status"] for entry in job["transitions"]]
        agree(f"the last transition of job {work.number}", work.status, changes[-1])


def seconds_of(text: str) -> float:
    """Return the seconds since 1970 of a time of the API."""
    whole, _, rest = text.rstrip("Z").partition(".")
    parsed = time.strptime(whole, "%Y-%m-%dT%H:%M:%S")
    return calendar.timegm(parsed) + float(f"0.{rest or 0}")


class Pure:
    """The pure lifecycle, driven by what the model saw."""

    def __init__(self) -> None:
        self.jobs: dict[int, ffdist.Job] = {}
        self.at = 0.0

    def begin(self, work: Work) -> None:
        self.jobs[work.number] = ffdist.Job(
            work.number, uuid_of("job", work.number), "model", "{}", 0.0, work.most
        )

    def follow(self, work: Work, event: str, **told: Any) -> None:
        """An event that is legal; afterwards both stand where the other does."""
        self.at += 1
        job = self.jobs[work.number] = ffdist.advance(
            self.jobs[work.number], event, self.at, **told
        )
        agree(f"advance() of job {work.number} by {event}",
              (work.status, work.attempt, None if work.shown_node is None else
               uuid_of("node", work.shown_node), work.retries, work.canceling),
              (job.status, job.attempt, job.node_id, job.retry_count, job.state == "canceling"))

    def refuse(self, work: Work, event: str) -> None:
        """An event that is illegal."""
        with contextlib.suppress(ApiError):
            ffdist.advance(self.jobs[work.number], event, self.at)
            raise Disagreement(f"advance() allows {event} where job {work.number} is {work.status}")


# ---- the events

NONSENSE = (
    ("POST", "/jobs", {"scenario": "../x"}, 400),
    ("POST", "/jobs", [], 400),
    ("POST", "/jobs", None, 400),
    ("POST", "/jobs", [{"scenario": "model"}, {"scenario": "model", "id": "x"}], 400),
    ("POST", "/results", {"job_id": uuid_of("job", 0)}, 400),
    ("GET", "/jobs/next", None, 400),
    ("GET", "/jobs?status=odd", None, 400),
    ("DELETE", "/jobs", None, 405),
    ("GET", "/odd", None, 404),
    ("POST", "/nodes/register", {"id": uuid_of("node", 0)}, 400),
    ("GET", "/jobs/xyz", None, 404),
)


def request_of(kind: str, told: Told) -> tuple[str, str, Any]:
    """Return method, path and body of an event."""
    own = {name: told[name] for name in ("session", "secret", "attempt", "status")
           if told.get(name) is not None}
    job, node = uuid_of("job", told.get("job", 0)), uuid_of("node", told.get("node", 0))
    if kind == "submit":
        bodies = [{"scenario": "model", "id": uuid_of("job", number),
                   **({} if most is None else {"max_retries": most}),
                   "parameters": {} if timeout is None else {"timeout": timeout},
                   **({"node": uuid_of("node", pin[0])} if pin else {})}
                  for number, most, timeout, *pin in told["jobs"]]
        return "POST", "/jobs", bodies if told["bulk"] else bodies[0]
    if kind == "register":
        holding = [{"job_id": uuid_of("job", number), "attempt": attempt} for number, attempt in
                   told["holding"]]
        return (
            "POST",
            "/nodes/register",
            {
                "address": f"worker{told['node']}",
                "id": node,
                "protocol": 1,
                "max_concurrent_jobs": told["slots"],
                "holding": holding,
                **own,
            },
        )
    if kind == "claim":
        words = {"node_id": node, **own, **({"claim": told["word"]} if told["word"] else {}),
                 **({"leaving": "true"} if told["leaving"] else {})}
        return "GET", f"/jobs/next?{urllib.parse.urlencode(words)}", None
    if kind == "heartbeat":
        return "POST", f"/nodes/{node}/heartbeat", {**own, "leaving": told["leaving"]}
    if kind == "progress":
        return "POST", f"/jobs/{job}/progress", {**own, "node_id": node, "lines": told["lines"],
                                                 "progress": {"paused": told["paused"]}}
    if kind == "report":
        return (
            "POST",
            "/results",
            {
                **own,
                "job_id": job,
                "node_id": node,
                "failure_reason": told["reason"],
                "metrics": {"duration": 1.0},
            },
        )
    if kind == "nonsense":
        return NONSENSE[told["row"]][:3]
    return {
        "forget": ("DELETE", f"/nodes/{node}", None),
        "order": ("POST", f"/jobs/{job}/{told.get('verb')}", None),
        "drain": ("POST", f"/nodes/{node}/{'drain' if told.get('draining') else 'resume'}", None),
    }[kind]


def event(kind: str, **told: Any) -> Event:
    """Return an event of node 0 and job 0 where nothing else is said."""
    own: Told = {
        "node": 0,
        "job": 0,
        "session": "one",
        "secret": "mine",
        "attempt": 1,
        "leaving": False,
        "word": None,
        "paused": False,
        "lines": [],
        "reason": None,
        "bulk": False,
        "holding": [],
        "slots": 2,
    }
    return kind, {**own, **told}


WEIGHTS = {"submit": 10, "claim": 24, "progress": 10, "report": 22, "order": 12, "register": 7,
           "heartbeat": 6, "drain": 4, "forget": 1, "nonsense": 2, "pass": 6, "stall": 1, "wall": 2,
           "restart": 1}
TIMED = ("pass", "stall", "wall")


class Chooser:
    """Draws events: most are what a fleet would do next, some are wrong, late or from nowhere."""

    def __init__(self, source: random.Random, model: Promises, timed: bool) -> None:
        self.source = source
        self.model = model
        self.timed = timed
        self.kinds = [kind for kind in WEIGHTS if timed or kind not in TIMED]
        self.count = 0

    def next(self) -> Event:
        """Return an event that is likely to mean something now."""
        self.count += 1
        kind = (
            "register"
            if len(self.model.nodes) < self.source.choice((1, 2))
            else self.source.choices(self.kinds, [WEIGHTS[kind] for kind in self.kinds])[0]
        )
        return kind, getattr(self, f"_{kind}")()

    def _one(self, *values: Any) -> Any:
        return self.source.choice(values)

    def _likely(self, chance: float) -> bool:
        return self.source.random() < chance

    def _node(self) -> int:
        return self.source.randrange(NODES)

    def _session(self, number: int) -> str | None:
        node = self.model.nodes.get(number)
        if node is None or self._likely(0.85):
            return node.session if node else None
        return self.source.choice([*node.past[-3:], None])

    def _submit(self) -> Told:
        bulk, known = self._likely(0.3), list(self.model.jobs)
        entries = []
        for at in range(self._one(1, 2, 5) if bulk else 1):
            fresh = len(known) < JOBS_MOST and self._likely(0.85)
            number = len(known) + at if fresh or not known else self.source.choice(known)
            entries.append(
                [
                    number,
                    self._one(None, 0, 1, 5),
                    self._one(None, None, JOB_TIMEOUT_S) if self.timed else None,
                    *([self._node()] if self._likely(0.15) else []),
                ]
            )
        return {"jobs": entries, "bulk": bulk}

    def _claim(self) -> Told:
        number = self._node()
        node = self.model.nodes.get(number)
        repeat = node is not None and node.words and self._likely(0.2)
        word = self.source.choice(node.words[-8:]) if node and repeat else self._one(None, *[
            f"word{self.count}"] * 4)
        return {"node": number, "session": self._session(number), "word": word,
                "leaving": self._likely(0.02)}

    def _heartbeat(self) -> Told:
        number = self._node()
        return {"node": number, "session": self._session(number), "leaving": self._likely(0.15)}

    def _attempt_of(self) -> tuple[int, int, int | None]:
        """Return a job, a node and an attempt that mostly belong together."""
        works = list(self.model.jobs.values())
        live = [work for work in works if work.holder is not None or work.gave_up is not None]
        if not works or self._likely(0.03):
            return 900, self._node(), 1
        work = self.source.choice(live if live and self._likely(0.8) else works)
        owner = work.holder if work.holder is not None else work.gave_up
        if owner is None and work.records:
            owner = work.records[-1][1]
        node = self._node() if owner is None or self._likely(0.1) else owner
        wrong = max(1, work.attempt + self._one(-1, 1)), None
        return work.number, node, max(1, work.attempt) if self._likely(0.85) else self._one(*wrong)

    def _progress(self) -> Told:
        job, node, attempt = self._attempt_of()
        work = self.model.jobs.get(job)
        paused = bool(work and work.status == "paused") or self._likely(0.05)
        return {"job": job, "node": node, "attempt": attempt, "session": self._session(node),
                "paused": paused, "lines": [f"line {self.count}"]}

    def _report(self) -> Told:
        job, node, attempt = self._attempt_of()
        status = self._one(
            "completed",
            "completed",
            "failed",
            "failed",
            "failed",
            "canceled",
            "returned",
            "returned",
            "done",
        )
        reason = self._one(*TRANSIENT, *PERMANENT) if status == "failed" else None
        return {"job": job, "node": node, "attempt": attempt, "session": self._session(node),
                "status": status, "reason": reason}

    def _order(self) -> Told:
        verb = self._one("cancel", "pause", "pause", "resume", "resume", "retry")
        fit = {"cancel": ("pending", "running", "paused"), "pause": ("pending", "running"),
               "resume": ("paused",), "retry": FINAL}[verb]
        likely = [work.number for work in self.model.jobs.values() if work.status in fit]
        known = likely if likely and self._likely(0.7) else [*self.model.jobs, 900]
        return {"job": self.source.choice(known), "verb": verb}

    def _register(self) -> Told:
        number = self._node()
        node = self.model.nodes.get(number)
        works = self.model.jobs.values()
        holding = [
            [work.number, max(1, work.attempt + (self._likely(0.1)))]
            for work in works
            if (number in (work.holder, work.gave_up) and self._likely(0.6)) or self._likely(0.03)
        ]
        session = f"session{self.count}" if self._likely(0.6) else None
        if node is not None and node.session and self._likely(0.4):
            session = self.source.choice([node.session, *node.past[-3:]])
        secret = self._one(None, "wrong", *[f"secret{number}"] * 5)
        return {"node": number, "session": session, "secret": secret, "holding": holding,
                "slots": self._one(1, 2)}

    def _drain(self) -> Told:
        return {"node": self._node(), "draining": self._likely(0.4)}

    def _forget(self) -> Told:
        return {"node": self._node()}

    def _nonsense(self) -> Told:
        row = self.source.randrange(len(NONSENSE))
        return {"row": row, "code": NONSENSE[row][3]}

    def _pass(self) -> Told:
        return {"seconds": self._one(1, 1, 2, 3, 6, 11)}

    def _stall(self) -> Told:
        return {"seconds": self._one(5, 30, 120)}

    def _wall(self) -> Told:
        return {"seconds": self._one(-86400, 86400, -3600, 400)}

    def _restart(self) -> Told:
        return {}


# ---- the masters

class System(Protocol):
    """A master under test, with the time that it lives in."""

    timed: bool

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Send a request; return status and body."""

    def times(self) -> tuple[float, float]:
        """Return the moment on the monotonic and on the wall clock."""

    def restart(self) -> None:
        """Kill it, and start it again on its journal."""

    def close(self) -> None:
        """End it."""


# These masters are never cut off from their power: memory spares the disk.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
QUIET = logging.getLogger("ffdist.test")
QUIET.addHandler(logging.NullHandler())
QUIET.propagate = False
QUIET.setLevel(logging.CRITICAL)


class InProcess:
    """The Master class behind its own routes, with clocks that the test holds."""

    timed = True

    def __init__(self, folder: Path) -> None:
        self.clock = 1000.0
        self.wall = 1_766_000_000.0
        self._folder = folder
        self._starts = 0
        self.master = self.open(folder / "0")

    @property
    def journal_folder(self) -> Path:
        return self._folder / str(self._starts)

    def open(self, folder: Path) -> ffdist.Master:
        """Open a master on a folder, on the same clocks."""
        return ffdist.Master(folder, ffdist.Settings(TIMEOUT_S, RETRIES, quarantine_after=0), QUIET,
                             lambda: self.clock, lambda: self.wall)

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return send_to(self.master, method, path, body)

    def times(self) -> tuple[float, float]:
        return self.clock, self.wall

    def pass_(self, seconds: float) -> None:
        """Let time pass on both clocks, then let the master look."""
        self.clock += seconds
        self.wall += seconds
        self.master.reap()

    def copied(self, name: str) -> Path:
        """Return a copy of what is on disk now, as a kill would leave it."""
        folder = self._folder / name
        folder.mkdir(mode=0o700)
        for path in self.journal_folder.glob("journal.db*"):
            if not path.name.endswith("-shm"):
                shutil.copy(path, folder / path.name)
        return folder

    def restart(self) -> None:
        copy = self.copied(str(self._starts + 1))
        self.master.close()
        self._starts += 1
        self.master = self.open(copy)

    def close(self) -> None:
        self.master.close()


def send_to(master: ffdist.Master, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Send a request to a Master by its routes, without a socket."""
    bare, _, query = path.partition("?")
    try:
        route, part = ffdist.route_of(method, bare)
        fields = dict(urllib.parse.parse_qsl(query))
        sent = json.loads(json.dumps(body))
        status, data = route.handler(ffdist.Request(master, part, fields, sent))
    except ApiError as error:
        return error.status, error.to_json()
    return status, json.loads(data.text) if isinstance(data, ffdist.Text) else data


class Served:
    """A real master process, asked over one connection that is kept open."""

    timed = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.master = Master(folder)
        self._connect()

    def _connect(self) -> None:
        self._link = http.client.HTTPConnection("127.0.0.1", self.master.port, timeout=60)

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        self._link.request(method, path, None if body is None else json.dumps(body))
        answer = self._link.getresponse()
        return answer.status, json.loads(answer.read())

    def times(self) -> tuple[float, float]:
        return time.monotonic(), time.time()

    def restart(self) -> None:
        self._link.close()
        self.master.kill()
        self.master = Master(self._folder, port=self.master.port)
        self._connect()

    def close(self) -> None:
        self._link.close()
        self.master.end()


# ---- the walk

def play(system: System, model: Promises, events: Iterable[Event], done: list[Event]) -> None:
    """Give events to the master and to the model; Disagreement where they part. `done` is what was
    given."""
    for event in events:
        done.append(event)
        step(system, model, *event)
        model.now, model.wall = system.times()
        compare(system, model)
    compare_all(system, model)


def step(system: System, model: Promises, kind: str, told: Told) -> None:
    """Do one event on both sides."""
    model.now, model.wall = system.times()
    if kind == "restart":
        system.restart()
        model.restarted()
    elif isinstance(system, InProcess) and kind == "wall":
        system.wall += told["seconds"]
        model.jumped()
    elif isinstance(system, InProcess) and kind in ("pass", "stall"):
        size = TICK_S if kind == "pass" else told["seconds"]
        for _ in range(round(told["seconds"] / size)):
            system.pass_(size)
            model.tick(system.clock, system.wall, size - TICK_S)
    else:
        status, body = system.send(*request_of(kind, told))
        model.judge(kind, told, status, body)


def compare(system: System, model: Promises) -> None:
    """Compare what a list of jobs and of nodes shows."""
    jobs, nodes = system.send("GET", "/jobs?limit=1000")[1], system.send("GET", "/nodes")[1]
    model.compare(jobs["jobs"], nodes["nodes"], system.send("GET", "/results?limit=1")[1]["total"])


def compare_all(system: System, model: Promises) -> None:
    """Compare each job's attempts, the totals, and the pages with one another."""
    for work in model.jobs.values():
        model.compare_detail(work, system.send("GET", f"/jobs/{uuid_of('job', work.number)}")[1])
    counts = Counter(work.status for work in model.jobs.values())
    for status in ffdist.STATUSES:
        agree(f"how many jobs are {status}", counts[status],
              system.send("GET", f"/jobs?status={status}&limit=1")[1]["total"])
    for name in ("jobs", "results"):
        agree(f"the pages of /{name}", system.send("GET", f"/{name}?limit=1000")[1][name],
              [entry for page in pages(system.send, f"/{name}?limit=7") for entry in page[name]])


def pages(send: Callable[[str, str], tuple[int, Any]], path: str) -> Iterator[Any]:
    """Return the pages of a list, by its cursors."""
    cursor = ""
    while True:
        page = send("GET", f"{path}{cursor}")[1]
        yield page
        if page["next"] is None:
            return
        cursor = f"&after={page['next']}"


def outcome(make: Callable[[Path], System], events: Callable[[Promises, System], Iterable[Event]],
            seed: int) -> tuple[list[Event], BaseException | None]:
    """Play events on a fresh master; return what was given, and what went wrong."""
    random.seed(seed)  # the master's jitter, where it runs in this process
    folder, done = Path(tempfile.mkdtemp(prefix="ffdist-model-", dir=MEMORY)), list[Event]()
    system = make(folder)
    model = Promises() if system.timed else Promises(30.0, 5.0)
    try:
        play(system, model, events(model, system), done)
        return done, None
    except Exception as error:  # whatever it is, the events that led to it are what is wanted
        return done, error
    finally:
        system.close()
        shutil.rmtree(folder, ignore_errors=True)


def shrink(
    events: list[Event], fails: Callable[[list[Event]], bool], seconds: float
) -> list[Event]:
    """Drop events, many at once at first, as long as it still fails."""
    deadline, size = time.monotonic() + seconds, len(events) // 2
    while size:
        at = 0
        while at < len(events) and time.monotonic() < deadline:
            fewer = events[:at] + events[at + size:]
            if fails(fewer):
                events = fewer
            else:
                at += size
        size //= 2
    return events


def walk(make: Callable[[Path], System], seed: int, count: int) -> int:
    """Take one random walk; AssertionError with seed and events, made fewer, when it fails."""
    def drawn(model: Promises, system: System) -> Iterator[Event]:
        chooser = Chooser(random.Random(seed), model, system.timed)
        return (chooser.next() for _ in range(count))
    done, error = outcome(make, drawn, seed)
    if error is None:
        return len(done)
    fewer = shrink(
        done, lambda events: outcome(make, lambda *_: events, seed)[1] is not None, SHRINK_S
    )
    last = outcome(make, lambda *_: fewer, seed)[1] or error
    shown = "\n".join(f"    {event!r}," for event in fewer)
    raise AssertionError(f"seed {seed}, event {len(done)}: {type(error).__name__}: {error}\n"
                         f"made fewer, {len(fewer)} events: {type(last).__name__}: {last}\n{shown}"
                         ) from error


LOST = (event("register"), event("submit", jobs=[[0, 5, None]]), event("claim", word="w"),
        event("pass", seconds=11))
BACK = event("progress")
FOUND: dict[str, Sequence[Event]] = {
    "a claim that is repeated after its attempt was taken back finds it": (
        *LOST,
        BACK,
        event("claim", word="w"),
    ),
    "a job that was taken back and fails then waits for its backoff": (
        *LOST,
        event("register", node=1, session="two"),
        BACK,
        event("report", status="failed", reason="network"),
        event("claim", node=1, session="two"),
    ),
    "a job that was paused, resumed and fails then waits too, and avoids the node of its failure": (
        event("register"),
        event("register", node=1, session="two"),
        event("submit", jobs=[[0, 5, None]]),
        event("order", verb="pause"),
        event("order", verb="resume"),
        event("claim"),
        event("report", status="failed", reason="network"),
        event("claim", node=1, session="two"),
        event("pass", seconds=2),
        event("claim"),
        event("claim", node=1, session="two"),
    ),
    "a job that was given up waits for its backoff, and one of a restarted agent does not": (
        *LOST,
        event("register", node=1, session="two"),
        event("claim", node=1, session="two"),
        event("pass", seconds=1),
        event("claim", node=1, session="two"),
        event("register", node=1, session="three"),
        event("claim", node=1, session="three"),
    ),
    "a node that leaves and takes a job back is not offline, and lost when it falls silent": (
        *LOST,
        event("heartbeat", leaving=True),
        BACK,
        event("pass", seconds=11),
    ),
    "a node that was removed and comes back has claimed nothing, after a restart either": (
        *LOST[:3],
        event("forget"),
        event("register"),
        event("restart"),
        event("submit", jobs=[[1, 0, None]]),
        event("claim", word="w"),
    ),
    "a job that was pinned to a node is submitted again, after the node was removed": (
        event("register"),
        event("submit", jobs=[[0, 5, None, 0]]),
        event("forget"),
        event("submit", jobs=[[0, 5, None, 0]]),
        event("submit", jobs=[[1, 5, None, 0]]),
    ),
    "a paused attempt that is killed leaves its job paused, to be tried again": (
        event("register"),
        event("submit", jobs=[[0, 5, None]]),
        event("claim"),
        event("order", verb="pause"),
        event("report", status="failed", reason="killed"),
        event("order", verb="resume"),
        event("claim"),
        event("pass", seconds=2),
        event("claim"),
    ),
    "a backoff does not grow by a restart after the wall clock was set back": (
        event("register"),
        event("submit", jobs=[[0, 5, None]]),
        event("claim"),
        event("report", status="failed", reason="network"),
        event("wall", seconds=-86400),
        event("restart"),
        event("pass", seconds=2),
        event("claim"),
    ),
}


class TestFound(unittest.TestCase):
    """Lists of events by which the model and the master once parted."""

    def test_they_agree_on_what_they_once_parted_by(self) -> None:
        for name, events in FOUND.items():
            with self.subTest(name):
                done, error = outcome(InProcess, lambda *_, events=events: events, SEED)
                self.assertIsNone(error, f"event {len(done)}: {error}")


class TestWalk(unittest.TestCase):
    """Random events, legal and illegal, given to the model and to a real master: both agree."""

    def test_the_master_keeps_every_promise_on_random_walks(self) -> None:
        for number in range(WALKS):
            with self.subTest(seed=SEED + number):
                self.assertEqual(walk(InProcess, SEED + number, EVENTS), EVENTS)

    def test_a_master_process_keeps_them_over_http_and_over_kills(self) -> None:
        self.assertEqual(walk(Served, SEED, 300), 300)

    def test_a_walk_meets_every_kind_of_event_and_every_status(self) -> None:
        kinds: Counter[str] = Counter()
        statuses: Counter[str] = Counter()
        source, model = random.Random(SEED), Promises()
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            system = InProcess(Path(folder))
            chooser = Chooser(source, model, True)
            for _ in range(600):
                kind, told = chooser.next()
                step(system, model, kind, told)
                kinds[kind] += 1
                statuses.update(work.status for work in model.jobs.values())
                model.now, model.wall = system.times()
                compare(system, model)
            system.close()
        self.assertEqual(set(kinds), set(WEIGHTS))
        self.assertEqual(set(statuses), set(ffdist.STATUSES) - {"blocked"})

    def test_a_failing_list_is_made_fewer(self) -> None:
        events: list[Event] = [("submit", {"number": number}) for number in range(60)]
        fewer = shrink(
            events, lambda some: sum(told["number"] in (7, 41) for _, told in some) == 2, 60
        )
        self.assertEqual([told["number"] for _, told in fewer], [7, 41])


# ---- killed after any commit

def state_of(master: ffdist.Master) -> dict[str, Any]:
    """Return all that a master tells and all that it must know again after a kill, progress
    aside."""
    def send(method: str, path: str) -> tuple[int, Any]:
        return send_to(master, method, path)
    jobs = {job["id"]: {**send("GET", f"/jobs/{job['id']}")[1], "progress": None,
                        "lines": send("GET", f"/jobs/{job['id']}/logs")[1]["lines"]}
            for page in pages(send, "/jobs?limit=7") for job in page["jobs"]}
    nodes = send("GET", "/nodes")[1]["nodes"]
    totals = {f"/{kind}?{query}": send("GET", f"/{kind}?limit=1{query}")[1]["total"]
              for kind in ("jobs", "results")
              for query in ("", *(f"&status={word}" for word in ffdist.STATUSES),
                            *(f"&node_id={node['id']}" for node in nodes))}
    with master._transactions.glance() as state:
        words = {node.id: list(node.claims) for node in state.nodes.values()}
        sessions = {
            node.id: (node.session_hash, node.past, node.orders) for node in state.nodes.values()
        }
    return {
        "jobs": jobs,
        "order": list(jobs),
        "totals": totals,
        "nodes": [{**node, "last_heartbeat": None} for node in nodes],
        "leases": {node["id"]: send("GET", f"/nodes/{node['id']}")[1]["jobs"] for node in nodes},
        "words": words,
        "sessions": sessions,
        "results": [entry for page in pages(send, "/results?limit=7") for entry in page["results"]],
        "metrics": master.queries.snapshot().totals,
    }


class TestCrash(unittest.TestCase):
    """Killed after any commit, a restarted master equals the live state then."""

    def test_a_copy_of_the_journal_after_any_commit_is_the_live_state(self) -> None:
        for number in range(2):
            with self.subTest(seed=SEED + number):
                self._walk(SEED + number)

    def _walk(self, seed: int) -> None:
        with tempfile.TemporaryDirectory(dir=MEMORY) as name:
            system, model = InProcess(Path(name)), Promises()
            chooser, commits, compared = Chooser(random.Random(seed), model, True), 0, 0
            self.addCleanup(system.close)
            for at in range(100):
                kind, told = chooser.next()
                step(system, model, kind, told)
                model.now, model.wall = system.times()
                compare(system, model)
                if system.master.journal.commits != commits:
                    commits = system.master.journal.commits
                    compared += 1
                    self._compare(system, model, f"seed {seed}, event {at}: {kind} {told}", at)
            self.assertGreater(compared, 20)

    def _compare(self, system: InProcess, model: Promises, why: str, at: int) -> None:
        again = system.open(system.copied(f"copy{at}"))
        try:
            live = state_of(system.master)
            for name, value in state_of(again).items():
                self.assertEqual(value, live[name], f"{name}: {why}")
            self._check_lanes(again, model, why)
        finally:
            again.close()

    def _check_lanes(self, master: ffdist.Master, model: Promises, why: str) -> None:
        """A new node gets all that waits, in the order of submission, and nothing that it may not
        have."""
        send_to(master, *request_of(*event("register", node=99, session="new")))
        sure = [
            work
            for work in model.jobs.values()
            if work.status == "pending" and not work.uncertain and work.pin is None
        ]
        wanted = [
            uuid_of("job", work.number) for work in sure if work.due <= model.now - model.slack_s
        ]
        later = [
            uuid_of("job", work.number) for work in sure if work.due > model.now + model.slack_s
        ]
        got = []
        while True:
            job = send_to(master, *request_of(*event("claim", node=99, session="new")))[1]["job"]
            if job is None:
                break
            got.append(job["id"])
        self.assertEqual([job for job in got if job in wanted], wanted, why)
        self.assertFalse(set(got) & set(later), why)


class Load:
    """Clients that submit, claim and report, and note what was acknowledged."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.over = threading.Event()
        self.submitted: set[str] = set()
        self.claimed: dict[str, tuple[str, int]] = {}
        self.reported: set[tuple[str, int]] = set()
        self.odd: list[object] = []
        self.nodes = [uuid_of("node", number) for number in range(3)]
        self.lock = threading.Lock()

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Ask until there is an answer: what was sent before a kill is sent again, as an agent
        does."""
        while True:
            try:
                return call(self.url, method, path, body, timeout=10)
            except (OSError, http.client.HTTPException):
                if self.over.wait(0.02):
                    return None

    def register(self) -> None:
        for number, node in enumerate(self.nodes):
            self.ask(
                "POST",
                "/nodes/register",
                {
                    "address": f"worker{number}",
                    "id": node,
                    "session": "one",
                    "max_concurrent_jobs": 4,
                },
            )

    def submit(self) -> None:
        """Submit, one or many at a time, with ids of its own."""
        while not self.over.is_set():
            ids = [str(uuid.uuid4()) for _ in range(random.choice((1, 1, 10)))]
            answer = self.ask(
                "POST", "/jobs", [{"scenario": "load", "id": job_id} for job_id in ids]
            )
            if answer is not None:
                self._check(answer.status in (200, 201), answer)
                self.submitted |= set(ids)

    def work(self, node: str) -> None:
        """Claim with a word, report, and sometimes report twice."""
        while not self.over.is_set():
            word = uuid.uuid4().hex
            answer = self.ask("GET", f"/jobs/next?node_id={node}&session=one&claim={word}&wait=1")
            job = answer and answer.body["job"]
            if not job:
                continue
            with self.lock:
                self._check(
                    (job["id"], job["attempt"]) not in self.claimed.values(),
                    "handed out twice",
                    job,
                )
                self.claimed[word] = job["id"], job["attempt"]
            told = {
                "job_id": job["id"],
                "attempt": job["attempt"],
                "node_id": node,
                "session": "one",
                "status": "completed",
                "metrics": {"duration": 1.0},
            }
            for _ in range(random.choice((1, 1, 2))):
                answer = self.ask("POST", "/results", told)
                if answer is not None:
                    self._check(answer.status == 200, answer, told)
                    self.reported.add((job["id"], job["attempt"]))

    def _check(self, well: bool, *words: object) -> None:
        if not well:
            self.odd.append(words)


class TestKillUnderLoad(Case):
    """kill -9 of a real master at random moments, with several clients at work."""

    def test_what_was_acknowledged_is_there_and_nothing_is_there_twice(self) -> None:
        master = self.master()
        load, source = Load(master.url), random.Random(SEED)
        load.register()
        threads = [threading.Thread(target=load.submit)] + [
            threading.Thread(target=load.work, args=(node,))
            for node in load.nodes
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in range(4):
                time.sleep(0.1 + source.random() * 0.5)  # a kill at a random moment
                master.kill()
                master = self.master(port=master.port)
        finally:
            load.over.set()
            for thread in threads:
                thread.join()
        self.assertEqual(load.odd, [], f"seed {SEED}")
        self._check(master, load)

    def _check(self, master: Master, load: Load) -> None:
        def send(method: str, path: str) -> tuple[int, Any]:
            return 200, master.get(path)
        jobs = [job for page in pages(send, "/jobs?limit=1000") for job in page["jobs"]]
        results = [
            entry for page in pages(send, "/results?limit=1000") for entry in page["results"]
        ]
        known = {job["id"]: job for job in jobs}
        self.assertEqual(len(known), len(jobs))
        self.assertLessEqual(load.submitted, set(known), "what was acknowledged is there")
        accepted = Counter((entry["job_id"], entry["attempt"]) for entry in results)
        self.assertEqual(
            [key for key, count in accepted.items() if count > 1], [], "nothing is there twice"
        )
        self.assertLessEqual(load.reported, set(accepted))
        self.assertEqual({job_id for job_id, _ in accepted},
                         {job["id"] for job in jobs if job["status"] == "completed"})
        self.assertEqual(
            [job for job in jobs if job["attempt"] > 1], [], "no attempt was lost by a kill"
        )
        totals = Counter(job["status"] for job in jobs)
        for status in ffdist.STATUSES:
            self.assertEqual(
                master.get(f"/jobs?status={status}&limit=1")["total"], totals[status], status
            )
        self.assertGreater(len(load.reported), 50)


# ---- odd clocks

DAY_S = 86400.0


class TestClock(unittest.TestCase):
    """Leases and backoff go by the monotonic clock; a wall clock that jumps a day changes
    nothing."""

    def setUp(self) -> None:
        folder = tempfile.mkdtemp(prefix="ffdist-model-", dir=MEMORY)
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        self.system = InProcess(Path(folder))
        self.addCleanup(lambda: self.system.close())
        self.ask("register", slots=4)

    def ask(self, kind: str, **told: Any) -> Any:
        status, body = self.system.send(*request_of(*event(kind, **told)))
        self.assertLess(status, 300, body)
        return body

    def submit(self, number: int) -> None:
        self.ask("submit", jobs=[[number, None, None]])

    def shown(self, number: int) -> Any:
        return self.system.send("GET", f"/jobs/{uuid_of('job', number)}")[1]

    def test_no_lease_is_lost_and_none_kept_by_a_jump_of_the_wall_clock(self) -> None:
        self.submit(0)
        self.ask("claim")
        for jump in (DAY_S, -2 * DAY_S, DAY_S):
            self.system.wall += jump
            self.system.pass_(1)
            self.assertEqual(self.shown(0)["status"], "running", jump)
            self.assertEqual(
                self.system.send("GET", "/nodes")[1]["nodes"][0]["status"], "available", jump
            )
        for _ in range(int(TIMEOUT_S)):
            self.system.wall -= DAY_S
            self.system.pass_(1)
        self.assertEqual(
            self.shown(0)["status"], "pending", "silence is silence, whatever the wall says"
        )

    def test_a_lease_without_session_ends_after_the_jobs_timeout_of_real_time(self) -> None:
        self.ask("register", node=1, session=None)
        self.ask("submit", jobs=[[0, None, 15]])
        self.ask("claim", node=1, session=None)
        for second in range(16):
            self.system.wall += DAY_S * (-1) ** second
            self.ask("heartbeat", node=1, session=None)
            self.assertEqual(self.shown(0)["status"], "running", second)
            self.system.pass_(1)
        self.assertEqual(self.shown(0)["status"], "pending")

    def fail(self, number: int) -> float:  # type: ignore[override]
        """Let an attempt fail in a way that is tried again; return the length of its backoff."""
        self.submit(number)
        self.ask("claim")
        self.ask("report", job=number, attempt=1, status="failed", reason="network")
        return seconds_of(self.shown(number)["not_before"]) - self.system.wall

    def test_no_backoff_waits_longer_than_its_own_length(self) -> None:
        for number, jump in enumerate((-DAY_S, DAY_S, 0.0)):
            length = self.fail(number)
            self.system.wall += jump
            self.assertLessEqual(length, ffdist.backoff_most_s(0, ffdist.Settings()))
            if jump == 0:
                self.assertIsNone(self.ask("claim")["job"], "it is not over yet")
            self.system.pass_(length + 0.01)
            self.assertEqual(self.ask("claim")["job"]["id"], uuid_of("job", number), jump)

    def test_nor_does_it_after_a_restart_or_a_pause(self) -> None:
        length = self.fail(0)
        self.system.wall -= DAY_S
        self.system.restart()
        self.system.pass_(length + 0.01)
        self.assertEqual(self.ask("claim")["job"]["id"], uuid_of("job", 0))
        length = self.fail(1)
        self.ask("order", job=1, verb="pause")
        self.system.wall -= DAY_S
        self.ask("order", job=1, verb="resume")
        self.system.pass_(length + 0.01)
        self.assertEqual(self.ask("claim")["job"]["id"], uuid_of("job", 1))

    def test_history_pages_and_cursors_follow_what_happened_not_what_the_clock_said(self) -> None:
        for number in range(20):
            self.system.wall += DAY_S * (-1) ** number * (number % 3)
            self.submit(number)
            if number % 2:
                self.ask("claim")
                self.system.wall -= 3600
                self.ask("report", job=number // 2, attempt=1, status="completed")
        order = [uuid_of("job", number) for number in reversed(range(20))]
        self.assertEqual([job["id"] for page in pages(self.system.send, "/jobs?limit=3")
                          for job in page["jobs"]], order)
        done = [entry["job_id"] for page in pages(self.system.send, "/results?limit=3")
                for entry in page["results"]]
        self.assertEqual(done, [uuid_of("job", number) for number in reversed(range(10))])
        for number in range(10):
            self.assertEqual([entry["status"] for entry in self.shown(number)["transitions"]],
                             ["pending", "running", "completed"])
        self.system.restart()
        self.assertEqual([job["id"] for job in self.system.send("GET", "/jobs")[1]["jobs"]], order)


def main() -> int:
    """Take many walks, and say what they met."""
    parser = argparse.ArgumentParser("python3 -m tests.test_model", description=main.__doc__)
    parser.add_argument("--walks", type=int, default=100)
    parser.add_argument("--events", type=int, default=EVENTS)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    for number in range(args.walks):
        walk(InProcess, args.seed + number, args.events)
        print(f"seed {args.seed + number}: {args.events} events agree", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
