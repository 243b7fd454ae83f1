#!/usr/bin/env python3
"""ffdist: the master of an FFmpeg fleet, and the command line to it.

One process keeps the node registry, the job queue and the results of 2 to 10,000 agents. Agents
come to it; it connects to nobody. Every accepted job and result is on disk before it is
acknowledged.

What it does not promise: a job's attempts may overlap in time when a node was out of reach (one
report is accepted, never two); a film is never read or sent by the master.

Sections (each uses only those above it):
   1 Vocabulary   limits with units, the master's settings
   2 Jobs         Job, TRANSITIONS, advance(): pure, no I/O, no clock
   3 Messages     what comes in, checked: drafts, registrations, reports (pure)
   4 Store        the journal's file: schema, salvage, backup (SQL)
   5 Journal      group commit, rows and pages (SQL)
   6 State        nodes, lanes, leases: all that the master knows, and its primitives (pure)
   7 Placement    which node runs which job; which nodes are sick (pure)
   8 Leases       the right of an attempt to report: its beginning and its ends (pure)
   9 Registry     which nodes there are, and who may speak for each (pure)
  10 Fleet        apply(event, now): requests, submissions, all rules as one function (pure)
  11 Transactions  the lock, the clock, the order of commits; queries
  12 Master       what the API asks for, each one transaction; parked requests
  13 Metrics      the one table of metrics: Prometheus text, lines to push (pure)
  14 Tariff       prices and carbon by hour (pure)
  15 Pages        tables, plots, the plain page of nodes and jobs (pure)
  16 API          ROUTES, the API document (a role would be a column of it); admit(), its gate
  17 HTTP         requests parsed and refused, answers encoded (pure)
  18 Connections  one connection, the loop of all of them, a small pool, limits
  19 Edge         from bytes to requests and answers; the server
  20 Push         VictoriaMetrics
  21 Service      the log, background loops, start and stop
  22 Experiments  a matrix of jobs (pure)
  23 Reports      rows over many results, their statistics, BD figures (pure)
  24 Documents    a report as a page, JSON, CSV and a table (pure)
  25 Programs     the package manager and other programs
  26 Dashboards   pictures and alerts over the metrics (pure)
  27 Monitoring   VictoriaMetrics, vmalert and Grafana: their files and processes
  28 Views        words and tables for the person at a terminal
  29 Fleet Commands  those that ask a master
  30 Host Commands   those that run something on this host
  31 CLI          the one table of subcommands, main

A job's life (SHOWN tells how two inner states look from outside):

    blocked ──► pending ──► running ──► completed
                 ▲ │ ▲       │ ▲ │
                 │ │ └─lose──┘ │ └────► failed ──┐ retry (by a person)
                 │ ▼           ▼                 │
                 │ paused ◄─► stopped            │  canceled: from any state that is not final;
                 └───────────────────────────────┘  running goes there through canceling

The way of a change: Edge gathers a request, API checks it by its row of ROUTES and makes a typed
event of it. Master applies the event to the Fleet under the one lock, which takes microseconds, and
lets go. Journal commits what has gathered, with one fsync for all of it; only then are the answers
sent, the notes logged and the waiting agents served. A change that cannot be written is a 503, and
memory is built again from what is on disk.

Threads: one has all connections, and answers what memory knows; a small pool answers the rest; the
journal has one that writes, and sends the answers that waited for it; Service has one for each
loop, and one for the log. So there are as many with 10,000 agents as with one. The archive lock is
taken before the Master's, never inside it. Nothing blocks while that one is held.

Where things go: a role would be one more column of ROUTES (API), checked where a request is
admitted; a rule of dispatch belongs in Placement, Leases, Registry or Fleet; a column of the
journal in Store with a migration; a figure for Prometheus in the table of Metrics; a subcommand in
the table of CLI.
"""
from __future__ import annotations

import argparse
import bisect
import contextlib
import csv
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import heapq
import hmac
import html
import http
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import resource
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
import weakref
from collections import Counter, deque
from collections.abc import (
    Callable,
    Container,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple, Optional, Protocol, TypeVar

import agent as wire
from agent import ApiError, Fields, Flag, Json

# ---- 1 Vocabulary --------------------------------------------------------------------------------

VERSION = wire.VERSION
CONFIDENCES = ("auto", "low", "medium", "high")
JSON_KIND = "application/json"

# Limits of a request. A draft takes about 1 KiB, so a bulk submission fits in its body limit.
MAX_BULK = 10_000
MAX_PAGE = 1000
BODY_LIMIT_BYTES = 1 << 20
BULK_LIMIT_BYTES = 10 << 20
MAX_NESTING = 64  # the recursion of Python's JSON parser ends at about 1,000
MAX_BRACKETS = 200_000  # a submission of MAX_BULK jobs has some 30,000
MAX_AFTER = 1000

# Limits of an attempt's own words: a runaway FFmpeg must not fill the journal.
MAX_LOG_LINES = 20_000
LOG_LINE_CHARS = 4000
MAX_SAMPLES = 50_000
MAX_PROGRESS_FIELDS = 32

LEASE_WITHOUT_SESSION_S = 24 * 3600.0  # of agents that neither heartbeat nor say a timeout
REAP_S = 1.0
MAX_FIGURE = 1e18  # above it no quantity of an encode is a measurement


def finite(values: Mapping[str, Any], name: str) -> float | None:
    """Return a non-negative number of `values`; None where it is missing or not plausible."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not 0 <= value < MAX_FIGURE:  # false for NaN too
        return None
    return float(value)


class Pricing(Protocol):
    """Adds prices to the metrics of a result."""

    def priced(self, metrics: Json, nodes: Sequence[str], start_s: float) -> Json:
        """Return metrics with prices.

        `nodes` are the names of the node, `start_s` is since 1970.
        """


@dataclass(frozen=True)
class Settings:
    """The master's own settings; times in s."""

    node_timeout_s: float = 90.0
    max_retries: int = 3
    retry_delay_s: float = 1.0
    retry_delay_most_s: float = 300.0
    quarantine_after: int = 3  # failures in a row; 0: never
    keep_jobs: float = 1e6
    keep_s: float = math.inf
    tariff: Pricing | None = None  # the service sets one: see Tariff
    allow_hosts: frozenset[str] = frozenset()  # further names by which browsers may reach it


class CommandError(Exception):
    """A command cannot be carried out: one sentence with the next step."""


class Text(NamedTuple):
    """An answer that is text already: a page, metrics, or JSON that needs no second encoding."""

    text: str
    kind: str


# ---- 2 Jobs --------------------------------------------------------------------------------------

FINAL = frozenset(("completed", "failed", "canceled"))
LEASED = frozenset(("running", "stopped", "canceling"))
SHOWN = {"stopped": "paused", "canceling": "running"}
STATUSES = ("blocked", "pending", "running", "paused", "completed", "failed", "canceled")
# A job that is lost again and again must not make its row grow for ever.
MAX_HISTORY = 100
MAX_ATTEMPTS = 50

# All that may happen to a job, as (state, event) -> state; anything else is a 409. `stopped` and
# `canceling` are the paused and the running job whose agent has not yet said that it obeyed.
TRANSITIONS: dict[tuple[str, str], str] = {
    ("blocked", "unblock"): "pending",
    ("blocked", "cancel"): "canceled",
    ("pending", "claim"): "running",
    ("pending", "reclaim"): "running",
    ("pending", "cancel"): "canceled",
    ("pending", "pause"): "paused",
    ("pending", "block"): "blocked",
    ("running", "complete"): "completed",
    ("running", "fail"): "failed",
    ("running", "end"): "canceled",
    ("running", "return"): "pending",
    ("running", "excuse"): "pending",
    ("running", "lose"): "pending",
    ("running", "requeue"): "pending",
    ("running", "exhaust"): "failed",
    ("running", "cancel"): "canceling",
    ("running", "pause"): "stopped",
    ("canceling", "cancel"): "canceling",
    ("canceling", "complete"): "completed",
    ("canceling", "fail"): "canceled",
    ("canceling", "end"): "canceled",
    ("canceling", "return"): "canceled",
    ("canceling", "lose"): "canceled",
    ("canceling", "exhaust"): "canceled",
    ("stopped", "resume"): "running",
    ("stopped", "cancel"): "canceling",
    ("stopped", "complete"): "completed",
    ("stopped", "fail"): "failed",
    ("stopped", "end"): "canceled",
    ("stopped", "return"): "paused",
    ("stopped", "excuse"): "paused",
    ("stopped", "lose"): "paused",
    ("stopped", "requeue"): "paused",
    ("stopped", "exhaust"): "paused",
    ("paused", "resume"): "pending",
    ("paused", "cancel"): "canceled",
    ("completed", "retry"): "pending",
    ("failed", "retry"): "pending",
    ("canceled", "retry"): "pending",
}

# Failure reasons that may pass: the job is tried again.
TRANSIENT = frozenset(
    ("node_lost", "network", "out_of_disk", "out_of_memory", "killed", "stalled", "agent")
)
# Failure reasons that are a fact about one place: the job is tried on nodes where it has not failed
# yet.
ELSEWHERE = frozenset(("no_capability",))
# Failure reasons that never count against a node's health.
JOB_FAULTS = frozenset(("input", "parameters", "output", "timeout"))
# Failure reasons that follow from these parameters, where the job itself has set one.
_FOLLOWS_FROM = {"no_capability": ("encoder", "hwaccel"), "out_of_memory": ("max_memory_mb",)}
# A job that failed on this many nodes is at fault itself.
BLAMELESS_NODES = 3
# Reasons that a transition's history takes from the event's own name.
_NAMED_EVENTS = frozenset(("lose", "reclaim", "retry", "return", "excuse", "unblock"))
EVENT_OF_REPORT = {
    "completed": "complete",
    "failed": "fail",
    "canceled": "end",
    "returned": "return",
}


class Needs(NamedTuple):
    """Requirements on a node, the same for all jobs of a lane.

    `avoid` are nodes where the job failed, `only` is the one node that may run it, and an
    `exclusive` job runs on a node where nothing else runs.
    """

    avoid: frozenset[str] = frozenset()
    only: str | None = None
    exclusive: bool = False


NO_NEEDS = Needs()


class Job(NamedTuple):
    """One piece of work; never changed in place: advance() returns the next one.

    `spec` is the JSON of the submission and the resolved settings. All fields from `created_at` on
    are stored by the journal as one JSON array, so fields may be added at the end only. `node_id`
    holds the lease, or held the last one; `given_up` is the node whose lease ended by its silence
    and may be taken back; `avoid` are the nodes where the job failed; `result_seq` is the number of
    the report that ended it; `only` is the one node that may run it. `after` and `after_ok` are the
    numbers of the jobs that must have ended, or completed, before this one leaves `blocked`. Times
    are seconds since 1970.
    """

    seq: int
    id: str
    scenario: str
    spec: str
    created_at: float
    max_retries: int = 3
    state: str = "pending"
    node_id: str | None = None
    attempt: int = 0
    claim: str | None = None
    retry_count: int = 0
    retry_reason: str | None = None
    not_before: float | None = None
    started_at: float | None = None
    completed_at: float | None = None
    error: str | None = None
    failure_reason: str | None = None
    given_up: str | None = None
    attempts: Sequence[Json] = ()
    history: Sequence[tuple[float, str, str | None]] = ()
    avoid: Sequence[str] = ()
    result_seq: int | None = None
    only: str | None = None
    exclusive: bool = False
    after: Sequence[int] = ()
    after_ok: Sequence[int] = ()

    @property
    def needs(self) -> Needs:
        """The lane that it waits in."""
        if not self.avoid and self.only is None and not self.exclusive:
            return NO_NEEDS
        return Needs(frozenset(self.avoid), self.only, self.exclusive)

    @property
    def status(self) -> str:
        """The state as the API shows it."""
        return SHOWN.get(self.state, self.state)

    def state_json(self) -> str:
        """Return the fields that change over a job's life, as the journal stores them."""
        return json.dumps(self[_STATE_FROM:])


_STATE_FROM = Job._fields.index("created_at")


class Ending(NamedTuple):
    """How an attempt ended: `status` is the agent's own word, None where the agent said nothing."""

    error: str | None = None
    reason: str | None = None
    status: str | None = None
    not_before: float | None = None


def advance(
    job: Job,
    event: str,
    now: float,
    node_id: str | None = None,
    claim: str | None = None,
    *,
    error: str | None = None,
    reason: str | None = None,
    reported: str | None = None,
    not_before: float | None = None,
) -> Job:
    """Return the job after an event at `now`, in s since 1970; ApiError 409 where it is illegal.

    `node_id` and `claim` go with claim; `error` and `reason` (a failure_reason) with an attempt's
    end; `reported` is the status word that the agent sent, `not_before` the end of a retry's
    backoff.
    """
    target = TRANSITIONS.get((job.state, event))
    if target is None:
        raise ApiError(409, f"job {job.id} is {job.status}: {event} is not possible")
    changes: Json = {"state": target, "given_up": None}
    if event == "claim":
        changes.update(_claimed(job, now, node_id, claim))
    elif event == "unblock":
        changes.update(after=(), after_ok=())
    elif event == "reclaim":
        changes.update(_taken_back(job))
    elif job.state in LEASED and target not in LEASED:
        changes.update(_ended(job, event, target, now, Ending(error, reason, reported, not_before)))
    elif event == "retry":
        changes.update(_renewed())
    elif target in FINAL:
        changes.update(completed_at=now, not_before=None, error=error, after=(), after_ok=())
    if target != job.state:
        note = reason or (event if event in _NAMED_EVENTS else None)
        changes["history"] = (*job.history[-MAX_HISTORY:], (now, SHOWN.get(target, target), note))
    return job._replace(**changes)


def _claimed(job: Job, now: float, node_id: str | None, claim: str | None) -> Json:
    """Return the changes of a claim: the next attempt begins, with a record of its own."""
    number = job.attempt + 1
    record = {"attempt": number, "node_id": node_id, "started_at": now, "ended_at": None,
              "status": "running", "error": None}
    return {"attempt": number,
            "node_id": node_id,
            "claim": claim,
            "started_at": now,
            "not_before": None,
            "attempts": (*job.attempts[1 - MAX_ATTEMPTS:], record)}


def _taken_back(job: Job) -> Json:
    """Return the changes when a node comes back with the attempt that its silence had ended.

    The attempt is the same one, its record runs again, and the retry that it cost is not counted.
    """
    last = {
        **job.attempts[-1],
        "ended_at": None,
        "status": "running",
        "error": None,
        "failure_reason": None,
    }
    return {"attempts": (*job.attempts[:-1], last),
            "started_at": last["started_at"],
            "node_id": job.given_up,
            "retry_count": max(0, job.retry_count - 1),
            "retry_reason": None,
            "avoid": tuple(node for node in job.avoid if node != job.given_up),
            "error": None,
            "failure_reason": None,
            "not_before": None}


def _renewed() -> Json:
    """Return the changes when a person asks for a finished job again: all is as new."""
    return {
        "retry_count": 0,
        "retry_reason": "asked for by a person",
        "error": None,
        "failure_reason": None,
        "started_at": None,
        "completed_at": None,
        "node_id": None,
        "avoid": (),
        "result_seq": None,
    }


def _ended(job: Job, event: str, target: str, now: float, ending: Ending) -> Json:
    """Return the changes at the end of an attempt."""
    silent = event in ("lose", "exhaust")
    record = {**job.attempts[-1],
              "ended_at": now,
              "status": ending.status or ("lost" if silent else target),
              "error": ending.error,
              "failure_reason": ending.reason}
    changes: Json = {"attempts": (*job.attempts[:-1], record), "not_before": ending.not_before}
    # A repeated claim finds its attempt again when that is taken back: the word stays. After any
    # other end it must not, or the claim would get a job that is over.
    changes["claim"] = job.claim if event == "lose" else None
    if target == "completed":
        changes.update(completed_at=now, error=None, failure_reason=None)
    elif target in FINAL:
        changes.update(completed_at=now, error=ending.error,
                       failure_reason=ending.reason if target == "failed" else None)
    else:
        changes.update(
            node_id=None, started_at=None, error=ending.error, failure_reason=ending.reason
        )
        changes.update(_next_try(job, event, target, ending))
    return changes


def _next_try(job: Job, event: str, target: str, ending: Ending) -> Json:
    """Return what the end of an attempt means to the next: where not to run, and its cost."""
    avoid = tuple(dict.fromkeys((*job.avoid, job.node_id or "")))
    if event == "excuse":
        return {"avoid": avoid}
    if event == "lose" and target == "pending":
        return {"avoid": avoid, "given_up": job.node_id, "retry_reason": ending.reason,
                "retry_count": job.retry_count + 1}
    if event == "requeue":
        return {"avoid": avoid, "retry_reason": ending.reason, "retry_count": job.retry_count + 1}
    return {}


def after_of(job: Job) -> tuple[list[str], list[str]]:
    """Return the ids in `after` and `after_ok` of a job's submission."""
    if '"after' not in job.spec:  # most have none, and a specification takes a while to decode
        return [], []
    spec = json.loads(job.spec)
    return spec.get("after") or [], spec.get("after_ok") or []


def was_chosen(job: Job, failure_reason: str | None) -> bool:
    """Return whether a failure follows from a parameter that the job itself has set."""
    names = _FOLLOWS_FROM.get(failure_reason or "", ())
    settings = json.loads(job.spec)["settings"] if names else {}
    return any(settings.get(name) for name in names)


def event_of_report(job: Job, status: str, failure_reason: str | None, elsewhere: bool) -> str:
    """Return the event of a report: a failure that may pass is tried again while retries are left.

    `elsewhere` says whether there is a node on which the job has not failed yet.
    """
    if status != "failed" or job.state not in ("running", "stopped"):
        return EVENT_OF_REPORT[status]
    if failure_reason in ELSEWHERE:
        passing = elsewhere
    else:
        passing = failure_reason in TRANSIENT and not was_chosen(job, failure_reason)
    return "requeue" if passing and job.retry_count < job.max_retries else "fail"


def backoff_most_s(retry_count: int, settings: Settings) -> float:
    """Return the longest wait before the next retry, in s: doubling, up to a limit."""
    return min(settings.retry_delay_most_s, settings.retry_delay_s * 2.0 ** min(retry_count, 30))


def blames_node(job: Job, node_id: str, failure_reason: str | None) -> bool:
    """Return whether the node is at fault, not the job.

    It is not where another node failed for the same reason, or where too many nodes failed.
    """
    if failure_reason in JOB_FAULTS or was_chosen(job, failure_reason):
        return False
    others = {record["node_id"]: record.get("failure_reason") for record in job.attempts
              if record["status"] == "failed"}
    others.pop(node_id, None)
    return failure_reason not in others.values() and len(others) + 1 < BLAMELESS_NODES


def job_text(job: Job, progress: Json | None = None) -> str:
    """Return a job as the API shows it, as JSON text, with its agent's last `progress`."""
    # The specification is JSON text already: decoding it only to encode it again would cost more
    # than the rest. Most of the rest is null or a number.
    canceling = "true" if job.state == "canceling" else "false"
    return (
        f'{{"id": "{job.id}", {job.spec[1:-1]}, "status": "{job.status}", '
        f'"node_id": {_json_of(job.node_id)}, "attempt": {job.attempt}, '
        f'"cancel_requested": {canceling}, "progress": {_json_of(progress)}, '
        f'"error": {_json_of(job.error)}, "failure_reason": {_json_of(job.failure_reason)}, '
        f'"retry_count": {job.retry_count}, "max_retries": {job.max_retries}, '
        f'"retry_reason": {_json_of(job.retry_reason)}, '
        f'"not_before": {_json_time(job.not_before)}, "created_at": {_json_time(job.created_at)}, '
        f'"started_at": {_json_time(job.started_at)}, '
        f'"completed_at": {_json_time(job.completed_at)}}}'
    )


def _json_of(value: Any) -> str:
    return "null" if value is None else json.dumps(value)


def _json_time(seconds: float | None) -> str:
    return "null" if seconds is None else f'"{wire.utc_text(seconds)}"'


def claim_text(job: Job) -> str:
    """Return a job as its claim has it: with the fingerprints of the films it has published."""
    text = job_text(job)
    published = [record["published"] for record in job.attempts if record.get("published")]
    return f'{text[:-1]}, "published": {json.dumps(published)}}}' if published else text


def with_published(job: Job, fingerprint: Json) -> Job:
    """Return a job whose running attempt is about to publish a film of this fingerprint."""
    last = {**job.attempts[-1], "published": fingerprint}
    return job._replace(attempts=(*job.attempts[:-1], last))


def with_lines(job: Job, count: int) -> Job:
    """Return a job whose last attempt has `count` log lines, for when it is taken back."""
    last = {**job.attempts[-1], "lines": count}
    return job._replace(attempts=(*job.attempts[:-1], last))


def job_json(job: Job, progress: Json | None = None) -> Json:
    """Return a job as the API shows it, as an object."""
    shown: Json = json.loads(job_text(job, progress))
    return shown


def job_detail_json(job: Job) -> Json:
    """Return what only the page of one job shows: its attempts and its transitions."""
    attempts = []
    for record in job.attempts:
        shown = {name: value for name, value in record.items() if name != "lines"}
        shown.update(
            started_at=wire.utc_text(record["started_at"]),
            ended_at=wire.utc_text(record["ended_at"]),
        )
        attempts.append(shown)
    transitions = [{"time": wire.utc_text(at), "status": status, "reason": reason}
                   for at, status, reason in job.history]
    return {"attempts": attempts, "transitions": transitions}


# ---- 3 Messages ----------------------------------------------------------------------------------

# Every message is read once, field by field, by the reader of Wire; an error names the field.
# Unknown fields are kept or ignored, for a later agent may send more. Inside there is no raw body
# but the one of a result, which is stored as it was sent.

# Fields of a job that a submission does not set: the master's own, as a job shows them when it is
# read.
_JOB_OWN = frozenset(("id", "status", "node_id", "attempt", "cancel_requested", "progress", "error",
                      "failure_reason", "retry_count", "max_retries", "retry_reason", "not_before",
                      "created_at", "started_at", "completed_at", "settings", "attempts",
                      "transitions", "result", "published"))
# Fields of a registration that are not facts about the machine.
_NODE_OWN = frozenset(("id", "session", "secret", "secret_hash", "holding", "protocol", "status",
                       "last_heartbeat", "registered_at", "running", "name", "max_concurrent_jobs"))
_FIELD_CHARS = 64  # of a field that is kept though it is unknown


def digest(word: str | None) -> str | None:
    """Return the SHA-256 of a session or a secret: the master keeps them in no other form."""
    return None if word is None else hashlib.sha256(word.encode()).hexdigest()


class Draft(NamedTuple):
    """A checked submission; `after` and `after_ok` are ids of jobs."""

    id: str | None
    scenario: str
    spec: str
    max_retries: int
    node: str | None
    exclusive: bool = False
    after: tuple[str, ...] = ()
    after_ok: tuple[str, ...] = ()


def draft_of(value: object, max_retries: int) -> Draft:
    """Check one submission; ApiError 400 names the field."""
    fields = Fields(value, "a job")
    job_id = fields.uuid("id")
    confidence = fields.values.get("confidence", "auto")
    if confidence not in CONFIDENCES:
        raise fields.error("confidence", f"must be one of {', '.join(CONFIDENCES)}")
    parameters = fields.values.get("parameters")
    settings = wire.resolve(fields.values.get("scenario"), parameters)
    retries = fields.whole("max_retries", 0, 100)
    spec = _kept(fields, _JOB_OWN)
    spec.update(scenario=settings.scenario, confidence=confidence, parameters=parameters or {},
                settings=settings.to_json())
    text = json.dumps(spec)
    if len(text) > BODY_LIMIT_BYTES:
        raise ApiError(400, f"a job is larger than {wire.size_text(BODY_LIMIT_BYTES)}")
    return Draft(
        id=job_id,
        scenario=settings.scenario,
        spec=text,
        max_retries=max_retries if retries is None else retries,
        node=fields.text("node"),
        exclusive=bool(fields.flag("exclusive")),
        after=_ids_of(fields, "after"),
        after_ok=_ids_of(fields, "after_ok"))


def _kept(fields: Fields, own: Container[str]) -> Json:
    """Return the fields that are passed on as they were sent."""
    return {name: value for name, value in fields.values.items()
            if name not in own and len(name) <= _FIELD_CHARS}


def _ids_of(fields: Fields, field: str) -> tuple[str, ...]:
    """Return a list of jobs' whole ids."""
    given = fields.items(field, "a list of job ids")
    if len(given) > MAX_AFTER:
        raise fields.error(field, f"must not have more than {MAX_AFTER} ids")
    ids = []
    for value in given:
        job_id = Fields({field: value}).uuid(field)
        if job_id is None:
            raise fields.error(field, "must be a list of job ids")
        ids.append(job_id)
    return tuple(ids)


class Ask(NamedTuple):
    """A heartbeat or a claim; `seen` is the number of the last orders that the agent got."""

    node_id: str
    session: str | None
    wait_s: float
    seen: int
    claim: str | None
    leaving: bool


class Registration(NamedTuple):
    """A checked registration."""

    id: str | None
    name: str
    address: str
    facts: str
    session_hash: str | None
    secret_hash: str | None  # of a secret that was sent: a proof
    owner_hash: str | None  # of the secret that the node has: public, no proof
    protocol: int | None
    slots: int
    holding: tuple[tuple[str, int], ...]


def registration_of(value: object) -> Registration:
    """Check a registration; ApiError 400 names the field."""
    fields = Fields(value)
    address = fields.required_text("address")
    node_id = fields.uuid("id")
    slots = fields.whole("max_concurrent_jobs", 1, 10_000) or 1
    proof = digest(fields.text("secret", 128))
    return Registration(
        id=node_id,
        name=fields.text("name") or address,
        address=address,
        facts=_facts_of(fields),
        session_hash=digest(fields.text("session", 128)),
        secret_hash=proof,
        owner_hash=proof or fields.text("secret_hash", 64),
        protocol=fields.whole("protocol", 1, 1000),
        slots=slots,
        holding=_holding_of(fields))


def _facts_of(fields: Fields) -> str:
    """Return the facts about the machine as JSON text; only the known ones are checked."""
    for field, limit in (("type", 64), ("cpu_model", 255), ("gpu_type", 255)):
        if fields.values.get(field) != "":
            fields.text(field, limit)
    for field in ("cpu_threads", "ram_bytes", "ram_total_bytes"):
        fields.whole(field, 0, 1 << 60)
    fields.flag("has_gpu")
    fields.mapping("labels")
    facts = _kept(fields, _NODE_OWN)
    ram_bytes = facts.get("ram_bytes")
    if ram_bytes is None:
        ram_bytes = facts.get("ram_total_bytes")  # its later name in the seed's code
    facts.update(ram_bytes=ram_bytes, ram_total_bytes=ram_bytes)
    return json.dumps(facts, allow_nan=False)


def _holding_of(fields: Fields) -> tuple[tuple[str, int], ...]:
    """Return (job id, attempt) of each attempt that an agent still runs or has in its spool."""
    held = fields.items("holding")
    if len(held) > MAX_BULK:
        raise fields.error("holding", f"must not have more than {MAX_BULK} entries")
    entries = []
    for value in held:
        if not isinstance(value, dict):
            raise fields.error("holding", "must be a list of objects with job_id and attempt")
        entry = Fields(value)
        job_id = entry.required_text("job_id", 64)
        entries.append((job_id.lower(), entry.whole("attempt", 1, 1 << 31) or 1))
    return tuple(entries)


class AttemptReport(NamedTuple):
    """A checked message of an agent about one attempt: progress, or its end."""

    node_id: str
    session: str | None
    attempt: int | None
    status: str
    error: str | None
    failure_reason: str | None
    progress: Json
    lines: list[str]
    lines_from: int | None
    published: Json | None


def report_of(value: object, progress: bool = False) -> AttemptReport:
    """Check progress, or the report that ends an attempt; ApiError 400 names the field."""
    fields = Fields(value)
    node_id = fields.required_text("node_id", 64)
    status = "running" if progress else fields.values.get("status")
    if not progress and status not in wire.CLOSED_STATUSES:
        raise fields.error("status", f"must be one of {', '.join(wire.CLOSED_STATUSES)}")
    fields.mapping("metrics")
    fields.mapping("analyzer_output")
    fields.text("completed_at", 64)
    return AttemptReport(
        node_id=node_id,
        session=fields.text("session", 128),
        attempt=fields.whole("attempt", 1, 1 << 31),
        status=str(status),
        error=fields.words("error", 8000) or None,
        failure_reason=fields.text("failure_reason", 64),
        progress=_progress_of(fields),
        lines=_lines_of(fields),
        lines_from=fields.whole("lines_from", 0, 1 << 40),
        published=_fingerprint_of(fields))


def _lines_of(fields: Fields) -> list[str]:
    lines = fields.items("lines", "a list of texts")
    if not all(isinstance(line, str) for line in lines):
        raise fields.error("lines", "must be a list of texts")
    return [line[:LOG_LINE_CHARS] for line in lines]


def _progress_of(fields: Fields) -> Json:
    """Return the fields of `progress`; a seed's agent sends a number of percent."""
    value = fields.values.get("progress")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"percent": value}
    progress = fields.mapping("progress", "an object or a number of percent")
    if len(progress) > MAX_PROGRESS_FIELDS:
        raise fields.error("progress", f"must not have more than {MAX_PROGRESS_FIELDS} fields")
    return progress


def _fingerprint_of(fields: Fields) -> Json | None:
    """Return size and hash of the film that is about to be published."""
    if fields.values.get("published") is None:
        return None
    fields.mapping("published", "an object with bytes and hash")
    film = fields.inside("published")
    return {"bytes": film.whole("bytes", 0, 1 << 62), "hash": film.required_text("hash", 64)}


# ---- 4 Store -------------------------------------------------------------------------------------

# A master refuses a journal of a later format by its number, for it would not understand what it
# reads. So everything that is stored in a new form, a further field of Job or Node too, is a new
# format: with a migration from the one before, and a small stored journal of that as its test.
# Formats 1 and 2 were made before the first release and have none.
FORMAT = 5
JOURNAL = "journal.db"
DAMAGED = "journal.damaged"  # beside the journal: why it is to be recovered at the next start
RECOVERED = "journal.recovered"  # a whole new one, which replaces the damaged one
APPLYING = "journal.applying"  # the damaged one is set aside, and the new one takes its name
# "ffdi", in the header of the file (sqlite.org/fileformat.html, 1.3.15).
APPLICATION_ID = 0x66666469
BACKUP_PAGES = 1024  # 4 MiB a step: often enough for the progress line
PATIENCE_S = 1.0  # a start that takes longer says why

Say = Callable[[str], object]

_SCHEMA = """
CREATE TABLE jobs(seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, status TEXT NOT NULL,
    scenario TEXT NOT NULL, node_id TEXT, spec TEXT NOT NULL, state TEXT NOT NULL, ended REAL);
CREATE INDEX jobs_by_end ON jobs(ended) WHERE ended IS NOT NULL;
CREATE TABLE results(seq INTEGER PRIMARY KEY, status TEXT NOT NULL, scenario TEXT NOT NULL,
    node_id TEXT NOT NULL, body TEXT NOT NULL, job_seq INTEGER);
CREATE INDEX results_by_job ON results(job_seq);
CREATE TABLE nodes(id TEXT PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE claims(node_id TEXT PRIMARY KEY, words TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE logs(job_seq INTEGER NOT NULL, attempt INTEGER NOT NULL, first INTEGER NOT NULL,
    count INTEGER NOT NULL, lines TEXT NOT NULL,
    PRIMARY KEY(job_seq, attempt, first)) WITHOUT ROWID;
CREATE TABLE totals(kind TEXT, status TEXT, scenario TEXT, node_id TEXT, count INTEGER NOT NULL,
    PRIMARY KEY(kind, status, scenario, node_id)) WITHOUT ROWID;
CREATE TABLE heartbeat(id INTEGER PRIMARY KEY CHECK(id = 1), at REAL);
CREATE TABLE owners(node_id TEXT PRIMARY KEY, secret_hash TEXT NOT NULL);
"""
_LISTS = """
CREATE INDEX jobs_by_status ON jobs(status, seq, scenario, node_id);
CREATE INDEX results_by_status ON results(status, seq, scenario, node_id);
CREATE TABLE blocks(kind TEXT, block INTEGER, scenario TEXT, node_id TEXT, status TEXT,
    parts INTEGER, PRIMARY KEY(kind, block, scenario, node_id, status)) WITHOUT ROWID;
"""

# Lists by scenario or node. An index for each of their filters would cost more than the rest of a
# commit: the jobs that end together have their places far apart in it, and each page of an index
# that a commit touches is 4 KiB to write. So numbers are cut into blocks. When all jobs of a block
# have ended, one statement notes in `blocks` which scenarios, nodes and pairs of them occur there
# ("" is any), with which status, and in which of the block's parts, a bit for each. A list passes
# over the blocks and parts without a match, and looks into the others by the index, which has all
# that is filtered by: 1,000,000 rows without a match take 3 ms, and 100 ms by the index alone. A
# block of which nothing is noted is looked into as a whole.
#
# A result never changes, so a block of them is noted when its last number was given. What a block
# holds no more, after a retry or by expiry, costs a look that finds nothing.
BLOCK = 2048
PART = BLOCK // 32
# A page ends when its rows have so many bytes: with a large specification each, a thousand jobs
# had 143 MiB.
PAGE_BYTES = 4 << 20
MAX_NUMBER = 1 << 62  # above those of all rows

_LIVE_WORDS = ", ".join(f"'{word}'" for word in STATUSES if word not in FINAL)
_FINAL_WORDS = ", ".join(f"'{word}'" for word in sorted(FINAL))


def _list_statement(table: str, block: str, part: str, where: str) -> str:
    """Return the statement that notes what occurs in blocks of jobs or results.

    `block` and `part` are the expressions of a row's place.
    """
    found = (f"SELECT DISTINCT {block} AS block, {part} AS part, scenario, "
             f"ifnull(node_id, '') AS node_id, status FROM {table} INDEXED BY {table}_by_status "
             f"WHERE status IN ({_FINAL_WORDS}) AND {where}")
    kinds = (("scenario", "''"), ("''", "node_id"), ("scenario", "node_id"))
    notes = [f"SELECT '{table}', block, {scenario}, {node_id}, status, sum(DISTINCT 1 << part) "
             "FROM found GROUP BY 2, 3, 4, 5" for scenario, node_id in kinds]
    return f"INSERT OR IGNORE INTO blocks WITH found AS ({found}) {' UNION ALL '.join(notes)}"


def _list_all(table: str) -> str:
    """Return the statement that notes what occurs in all blocks that are complete."""
    block = f"seq / {BLOCK}"
    where = f"{block} < (SELECT max(seq) FROM {table}) / {BLOCK}"
    if table == "jobs":
        where += (f" AND {block} NOT IN (SELECT {block} FROM jobs INDEXED BY jobs_by_status "
                  f"WHERE status IN ({_LIVE_WORDS}))")
    return _list_statement(table, block, f"seq % {BLOCK} / {PART}", where)


# What brings a format to the next one. Of 3: jobs and nodes have got fields at their end, which
# rows without them take from their defaults. Of 4: lists have their blocks, nodes a further field.
_MIGRATIONS = {
    3: "",
    4: "DROP INDEX jobs_by_node; DROP INDEX jobs_by_status;"
       f"{_LISTS}{_list_all('jobs')};{_list_all('results')};",
}


def connect(path: Path) -> sqlite3.Connection:
    """Open a database, made for its owner alone where it is missing; transactions are explicit."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    return sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)


def make_tables(connection: sqlite3.Connection) -> None:
    """Create the tables of this format, all at once."""
    connection.executescript(f"BEGIN;{_SCHEMA}{_LISTS}PRAGMA application_id={APPLICATION_ID};"
                             f"PRAGMA user_version={FORMAT};COMMIT;")


def format_of(connection: sqlite3.Connection, path: Path) -> int:
    """Return the format of a journal, 0 of an empty one; CommandError for any other file."""
    found: int = connection.execute("PRAGMA user_version").fetchone()[0]
    owner = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if owner not in (0, APPLICATION_ID) or (found == 0 and tables):
        raise CommandError(
            f"{path} belongs to another program: name another folder with --data-dir"
        )
    if found > FORMAT:
        raise CommandError(f"{path} has format {found}, made by a newer ffdist than {VERSION}; "
                           "start that one, or name another folder with --data-dir")
    if 0 < found < min(_MIGRATIONS):
        raise CommandError(f"{path} has format {found}, made before the first release: "
                           "start with an empty --data-dir")
    return found


def bring_up_to_date(connection: sqlite3.Connection, found: int, say: Say) -> None:
    """Make the tables of an empty journal, or bring one from its format to this one by steps.

    Each step is one transaction: a kill loses what it has done, and nothing else.
    """
    if found in (0, FORMAT):
        if found == 0:
            make_tables(connection)
        return
    began = time.monotonic()
    is_slow = False

    def look() -> None:
        nonlocal is_slow
        if not is_slow and time.monotonic() - began > PATIENCE_S:
            is_slow = True
            say(f"bringing the journal from format {found} to {FORMAT}: all of its jobs and "
                "results are read once, and the master serves when that is done")

    connection.set_progress_handler(look, 100_000)
    for number in range(found, FORMAT):
        connection.executescript(f"BEGIN;{_MIGRATIONS[number]}"
                                 f"PRAGMA user_version={number + 1};COMMIT;")
    connection.set_progress_handler(None, 0)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the steps may have made a long log
    if is_slow:
        took = wire.duration_text(round(time.monotonic() - began))
        say(f"the journal has format {FORMAT} now, after {took}")


def _last_number(connection: sqlite3.Connection, table: str) -> int:
    """Return the last number of a table; those of a block that is noted were all given."""
    last: int | None = connection.execute(f"SELECT max(seq) FROM {table}").fetchone()[0]
    query = "SELECT max(block) FROM blocks WHERE kind=?"
    block: int | None = connection.execute(query, (table,)).fetchone()[0]
    end = 0 if block is None else (block + 1) * BLOCK - 1
    return max(last or 0, end)


def _page(connection: sqlite3.Connection, table: str, columns: str, filters: Mapping[str, str],
          before: int | None, limit: int) -> tuple[list[Any], bool]:
    """Return columns of matching rows below a number, newest first, and whether there are more.

    The page ends at `limit` rows, or where those that it has reach PAGE_BYTES; no row is read
    beyond that.
    """
    rows: list[Any] = []
    size = 0
    query = f"SELECT {columns} FROM {table} WHERE seq=?"
    connection.execute("BEGIN")  # all reads see one commit
    try:
        below = before or MAX_NUMBER
        with contextlib.closing(_numbers(connection, table, filters, below)) as numbers:
            for number in numbers:
                if len(rows) == limit or size >= PAGE_BYTES:
                    return rows, True
                row = connection.execute(query, (number,)).fetchone()
                rows.append(row)
                size += sum(len(cell) for cell in row if isinstance(cell, str))
        return rows, False
    finally:
        connection.execute("ROLLBACK")


def _numbers(connection: sqlite3.Connection, table: str, filters: Mapping[str, str],
             before: int) -> Generator[int, None, None]:
    """Yield the numbers of the rows that match below a number, newest first."""
    if "scenario" in filters or "node_id" in filters:
        for block in _blocks(connection, table, filters, before):
            for first, end in _spans(connection, table, filters, block):
                if first < before:
                    yield from _numbers_in(connection, table, filters, first, min(end, before))
        return
    names, values = _conditions(filters)
    query = f"SELECT seq FROM {table} WHERE seq<?{names} ORDER BY seq DESC"
    for row in connection.execute(query, (before, *values)):
        yield row[0]


def _blocks(connection: sqlite3.Connection, table: str, filters: Mapping[str, str],
            before: int) -> Iterator[int]:
    """Yield the blocks below a number that may hold matching rows, newest first.

    Numbers without rows are passed over, however many they are.
    """
    names, values = _noted(filters)
    noted = f"SELECT 1 FROM blocks WHERE kind='{table}' AND block"
    query = f"""
        WITH RECURSIVE steps(at) AS (
            SELECT max(seq) / {BLOCK} FROM {table} WHERE seq < ?
            UNION ALL
            SELECT CASE WHEN EXISTS ({noted} = at - 1) THEN at - 1
                   ELSE (SELECT max(seq) / {BLOCK} FROM {table} WHERE seq < at * {BLOCK}) END
            FROM steps WHERE at IS NOT NULL)
        SELECT at FROM steps WHERE at IS NOT NULL
            AND (EXISTS ({noted} = at{names}) OR NOT EXISTS ({noted} = at))"""
    for row in connection.execute(query, (before, *values)):
        yield row[0]


def _spans(connection: sqlite3.Connection, table: str, filters: Mapping[str, str],
           block: int) -> list[tuple[int, int]]:
    """Return (first, end) of the parts of a block that may hold matching rows, newest first."""
    names, values = _noted(filters)
    query = f"SELECT parts FROM blocks WHERE kind='{table}' AND block=?{names}"
    rows = connection.execute(query, (block, *values)).fetchall()
    first = block * BLOCK
    if not rows:
        return [(first, first + BLOCK)]
    spans: list[tuple[int, int]] = []
    for place in range(BLOCK // PART):
        start = first + place * PART
        if not any(parts >> place & 1 for (parts,) in rows):
            continue
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, first + (place + 1) * PART))
    return spans[::-1]


def _noted(filters: Mapping[str, str]) -> tuple[str, list[Any]]:
    """Return what a query asks of `blocks`, and its values."""
    return _conditions({"scenario": "", "node_id": "", **filters})


def _numbers_in(connection: sqlite3.Connection, table: str, filters: Mapping[str, str],
                first: int, end: int) -> list[int]:
    """Return the numbers of matching rows from `first` to below `end`, newest first."""
    names, values = _conditions(filters)
    if "status" not in filters:
        names += f" AND status IN ({_LIVE_WORDS}, {_FINAL_WORDS})"
    query = (f"SELECT seq FROM {table} INDEXED BY {table}_by_status WHERE seq>=? AND seq<?{names} "
             "ORDER BY seq DESC")
    return [row[0] for row in connection.execute(query, (first, end, *values))]


def _conditions(filters: Mapping[str, str]) -> tuple[str, list[Any]]:
    """Return what a query asks of columns, and its values."""
    return "".join(f" AND {name}=?" for name in filters), list(filters.values())


def is_damage(error: Exception) -> bool:
    """Return whether SQLite means that the file is no longer whole: a full disk is not damage."""
    damaged = re.compile(r"malformed|not a database|corrupt|decode")
    return isinstance(error, sqlite3.DatabaseError) and bool(damaged.search(str(error)))


def quick_check(connection: sqlite3.Connection) -> None:
    """Read a whole database; sqlite3.DatabaseError where it is not sound."""
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise sqlite3.DatabaseError(f"malformed: {' '.join(found.split())[:300]}")


def file_size(path: Path) -> int:
    """Return the size of a file in bytes; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def job_of_row(row: Sequence[Any]) -> Job:
    """Return the job of (seq, id, scenario, spec, state); sqlite3.DatabaseError where that is
    malformed."""
    try:
        return Job(row[0], row[1], row[2], row[3], *json.loads(row[4]))
    except (ValueError, TypeError):
        raise sqlite3.DatabaseError(f"the row of job {row[1]} is malformed") from None


# Salvage. A damaged journal is set aside whole, and the rows that can still be read are copied into
# a new one. SQLite stops at the first page that it cannot read, so a stretch of rows that fails is
# halved down to single rows: one bad page then costs the rows on it, not all behind it. Derived
# values (totals, the times by which jobs expire) are computed again. `.recover` of the sqlite3
# program reads more than that: it needs no healthy page above the rows, and works on the file that
# was set aside.

_READ_RANGE = (0, 1 << 40)  # no journal has more rows
# Reads that may fail before the first row is found; each row found allows ten more.
_FIRST_PATIENCE = 2000


class Salvage(NamedTuple):
    """How the rows of one table are read: the column searched, and those that must be JSON."""

    key: str
    json_columns: tuple[str, ...] = ()


_SALVAGE = {
    "jobs": Salvage("seq", ("spec", "state")),
    "results": Salvage("seq", ("body",)),
    "nodes": Salvage("rowid", ("record",)),
    "claims": Salvage("1", ("words",)),
    "logs": Salvage("job_seq", ("lines",)),
    "owners": Salvage("rowid"),
}


def recover_journal(folder: Path) -> tuple[str, str]:
    """Replace a damaged journal by what can be read of it.

    Return the damaged one's new name, and what was kept. A kill between any two lines is made good
    by the next call: the new journal is whole before the damaged one moves, the log of that one
    goes before the new one could take it for its own, and from APPLYING on only the last two lines
    are left.
    """
    path, whole, applying = folder / JOURNAL, folder / RECOVERED, folder / APPLYING
    if not applying.exists():
        if not whole.exists():
            _build_recovered(path, whole)
        aside = folder / f"journal-damaged-{path.stat().st_mtime_ns}.db"
        with contextlib.suppress(FileExistsError):
            os.link(path, aside)
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{path}-wal", f"{aside}-wal")
        Path(f"{path}-shm").unlink(missing_ok=True)
        os.replace(folder / DAMAGED, applying)
    if whole.exists():
        os.replace(whole, path)
    applying.unlink()
    with contextlib.closing(connect(path)) as connection:
        kept = _counts_text(connection, ("jobs", "results"))
    return str(max(folder.glob("journal-damaged-*.db"))), kept


def _build_recovered(path: Path, whole: Path) -> None:
    """Make a new journal of the rows that can be read; it has its name when it is complete."""
    scratch = whole.with_name(f"{RECOVERED}.tmp")
    for name in (scratch, Path(f"{scratch}-journal")):
        name.unlink(missing_ok=True)
    path.touch(0o600)
    with contextlib.closing(connect(scratch)) as target:
        make_tables(target)
        if path.stat().st_size:  # SQLite deletes the log of an empty file when it opens it
            _salvage(path, target)
        _count_anew(target)
    os.replace(scratch, whole)


def _salvage(path: Path, target: sqlite3.Connection) -> None:
    """Copy all rows that can be read."""
    with contextlib.closing(connect(path)) as source:
        # Otherwise SQLite refuses a file that is shorter than its header says, as a whole.
        source.execute("PRAGMA writable_schema=ON")
        for table in _SALVAGE:
            _salvage_table(source, target, table)


def _salvage_table(source: sqlite3.Connection, target: sqlite3.Connection, table: str) -> None:
    """Copy the rows of one table that can be read."""
    key, json_columns = _SALVAGE[table]
    columns = [row[1] for row in target.execute(f"PRAGMA table_info({table})")]
    places = [columns.index(name) + 1 for name in json_columns]
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    query = f"SELECT {key}, {names} FROM {table} WHERE {key} BETWEEN ? AND ? ORDER BY {key}"
    insert = f"INSERT OR IGNORE INTO {table}({names}) VALUES({marks})"
    stretches, patience = [_READ_RANGE], _FIRST_PATIENCE
    target.execute("BEGIN")
    while stretches and patience > 0:
        low, high = stretches.pop()
        try:
            for row in source.execute(query, (low, high)):
                low, patience = row[0] + 1, patience + 10
                if _holds_json(row, places) and (table != "jobs" or _is_job(row[1:])):
                    target.execute(insert, row[1:])
        except sqlite3.DatabaseError as error:
            patience -= 1
            stretches += _halves(low, high) if _is_local(error) else []
    target.execute("COMMIT")


def _is_local(error: sqlite3.DatabaseError) -> bool:
    """Return whether other rows of the file may still be read."""
    return is_damage(error) and "not a database" not in str(error)


def _halves(low: int, high: int) -> list[tuple[int, int]]:
    """Return the halves of a stretch that could not be read, the first one last."""
    middle = (low + high) // 2
    return [(middle + 1, high), (low, middle)] if low < high else []


def _holds_json(row: Sequence[Any], places: Iterable[int]) -> bool:
    try:
        for place in places:
            json.loads(row[place])
    except (ValueError, TypeError):
        return False
    return True


def _is_job(row: Sequence[Any]) -> bool:
    """Return whether a row of the table of jobs makes a Job."""
    seq, job_id, _, scenario, _, spec, state, *_ = row
    try:
        job_of_row((seq, job_id, scenario, spec, state))
    except sqlite3.DatabaseError:
        return False
    return isinstance(json.loads(spec), dict)


_COMPLETED_AT = Job._fields.index("completed_at") - _STATE_FROM


def _ended_at(state: str, status: str) -> float | None:
    ended: float | None = json.loads(state)[_COMPLETED_AT] if status in FINAL else None
    return ended


def _count_anew(connection: sqlite3.Connection) -> None:
    """Fill the derived values.

    Rows that belonged to lost jobs are removed: they must not become those of new ones.
    """
    connection.create_function("ended_at", 2, _ended_at)
    connection.create_function("job_of", 1, lambda body: json.loads(body)["job_id"])
    execute = connection.execute
    execute("BEGIN")
    execute("DELETE FROM blocks")
    execute("UPDATE jobs SET ended=ended_at(state, status)")
    execute("UPDATE results SET job_seq=(SELECT seq FROM jobs WHERE id=job_of(body))")
    execute("DELETE FROM logs WHERE job_seq NOT IN (SELECT seq FROM jobs)")
    for kind in ("jobs", "results"):
        execute("INSERT INTO totals SELECT ?, status, scenario, ifnull(node_id, ''), count(*) "
                f"FROM {kind} GROUP BY 2, 3, 4", (kind,))
        execute(_list_all(kind))
    execute("COMMIT")


def _counts_text(connection: sqlite3.Connection, tables: Sequence[str]) -> str:
    counts = [connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables]
    return ", ".join(wire.count_text(count, table[:-1]) for count, table in zip(counts, tables))


def scratch_file(target: Path) -> Path:
    """Make an empty file beside another, for its owner alone, by a name that cannot be guessed."""
    try:
        descriptor, name = tempfile.mkstemp(".part", f".{target.name}.", target.parent)
    except OSError as error:
        raise CommandError(f"{target} cannot be written: {error.strerror}") from None
    os.close(descriptor)
    return Path(name)


def copy_journal(folder: Path, target: Path, show: Callable[[float], None]) -> str:
    """Copy a journal, in use or not, as of one moment; return the count of what is in the copy.

    `show` gets the part that is done, from 0 to 1. An earlier copy is replaced when the new one is
    whole.
    """
    path = folder / JOURNAL
    _refuse_target(path, target)
    scratch = scratch_file(target)
    try:
        counts = _copy_database(path, scratch, show)
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, target)
    except (sqlite3.Error, OSError) as error:
        raise CommandError(f"{path} cannot be copied to {target}: {error}") from None
    finally:
        for ending in ("", "-journal", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.unlink(f"{scratch}{ending}")
    return counts


def _refuse_target(path: Path, target: Path) -> None:
    """Raise CommandError where a copy is not possible, or would replace another file."""
    if not path.is_file():
        raise CommandError(
            f"there is no journal in {path.parent}: name the master's folder with --data-dir"
        )
    if target.resolve().parent == path.parent.resolve():
        raise CommandError(
            f"{target} is in the data folder, where it could replace the master's own files: "
            "name a file in another folder"
        )
    if not target.exists():
        return
    is_database = False
    if target.is_file():
        with open(target, "rb") as file:
            is_database = file.read(15) == b"SQLite format 3"
    if not is_database:
        raise CommandError(f"{target} exists and is not a copy of a journal: name another file")


def _copy_database(path: Path, scratch: Path, show: Callable[[float], None]) -> str:
    with contextlib.closing(connect(path)) as source, contextlib.closing(connect(scratch)) as copy:
        # A read transaction, begun by the first read, sees one moment however long the copy takes.
        source.execute("BEGIN")
        source.execute("SELECT count(*) FROM heartbeat").fetchone()
        source.backup(copy, pages=BACKUP_PAGES, sleep=0.0,
                      progress=lambda _, left, whole: show(1 - left / max(1, whole)))
        copy.execute("PRAGMA journal_mode=DELETE")
        quick_check(copy)
        return _counts_text(copy, ("jobs", "results", "nodes"))


# ---- 5 Journal -----------------------------------------------------------------------------------

# A write is (kind, values): a row of _WRITES, or a total. The Fleet makes them, one list a step,
# and the list is committed whole or not at all. Readers have connections of their own: in WAL mode
# (sqlite.org/wal.html) they see the last commit while the next one is written.

READERS = 4  # connections for reading: pages are read beside each other, and beside the writer
MAX_LOG_PAGE = 5000  # lines
STALL_S = 5.0  # a commit that takes longer is a trouble of its own
MAX_TRANSACTIONS = 1000  # in one commit: bounds the time that a single answer waits for the others

_WRITES = {
    "job": "INSERT INTO jobs(seq, id, status, scenario, node_id, spec, state) "
           "VALUES(?,?,?,?,?,?,?)",
    "state": "UPDATE jobs SET status=?, node_id=?, state=?, ended=? WHERE seq=?",
    "result": "INSERT INTO results(seq, status, scenario, node_id, body, job_seq) "
              "VALUES(?,?,?,?,?,?)",
    "node": "INSERT INTO nodes(id, record) VALUES(?,?) "
            "ON CONFLICT(id) DO UPDATE SET record=excluded.record",
    "claims": "INSERT OR REPLACE INTO claims(node_id, words) VALUES(?,?)",
    "forget": "DELETE FROM nodes WHERE id=?",
    "owner": "INSERT OR REPLACE INTO owners(node_id, secret_hash) VALUES(?,?)",
    "log": "INSERT OR REPLACE INTO logs(job_seq, attempt, first, count, lines) VALUES(?,?,?,?,?)",
    "alive": "INSERT OR REPLACE INTO heartbeat(id, at) VALUES(1, ?)",
    "drop_job": "DELETE FROM jobs WHERE seq=?",
    "drop_results": "DELETE FROM results WHERE job_seq=?",
    "drop_logs": "DELETE FROM logs WHERE job_seq=?",
    # Of blocks, once the rows are as they will be: see Store.
    "unlist": "DELETE FROM blocks WHERE kind='jobs' AND block=?",
    "list_jobs": _list_statement("jobs", "?", "(seq - ?) / ?", (
        "seq >= ? AND seq < ? AND NOT EXISTS (SELECT 1 FROM jobs INDEXED BY jobs_by_status "
        f"WHERE status IN ({_LIVE_WORDS}) AND seq >= ? AND seq < ?)")),
    "list_results": _list_statement("results", "?", "(seq - ?) / ?", "seq >= ? AND seq < ?"),
    "prune_jobs": "DELETE FROM blocks WHERE kind='jobs' AND block=? AND NOT EXISTS "
                  "(SELECT 1 FROM jobs WHERE seq >= ? AND seq < ?)",
    "prune_results": "DELETE FROM blocks WHERE kind='results' AND block=? AND NOT EXISTS "
                     "(SELECT 1 FROM results WHERE seq >= ? AND seq < ?)",
}
# Only the last of these writes with the same value at this place counts, within one commit.
_KEYED = {"state": 4, "claims": 0, "node": 0, "forget": 0}
_TOTAL = "INSERT OR REPLACE INTO totals(kind, status, scenario, node_id, count) VALUES(?,?,?,?,?)"
_NO_TOTAL = "DELETE FROM totals WHERE kind=? AND status=? AND scenario=? AND node_id=?"

TotalKey = tuple[str, str, str, str]
Write = tuple[str, tuple[Any, ...]]


def _grouped(writes: Iterable[Write]) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """Return statements with their rows: new jobs before their states.

    Of several writes of one total, or with one key, the last counts.
    """
    rows: dict[str, dict[Any, tuple[Any, ...]]] = {kind: {} for kind in _WRITES}
    totals: dict[TotalKey, int] = {}
    for number, (kind, values) in enumerate(writes):
        if kind == "total":
            totals[values[0]] = values[1]
            continue
        key = values[_KEYED[kind]] if kind in _KEYED else number
        rows[kind][key] = values
        if kind == "node":
            rows["forget"].pop(key, None)
        elif kind == "forget":
            rows["node"].pop(key, None)
    groups = [(_WRITES[kind], list(found.values())) for kind, found in rows.items()]
    groups.append((_TOTAL, [(*key, count) for key, count in totals.items() if count]))
    groups.append((_NO_TOTAL, [key for key, count in totals.items() if not count]))
    return [(statement, found) for statement, found in groups if found]


class Ticket:
    """Stands for the commit of all that was written before it.

    One thread may wait for it, and calls follow it, made by the thread that commits: a thread that
    is woken for each answer costs more than the answer.
    """

    __slots__ = ("_calls", "_gate", "error", "is_settled")
    _settling = threading.Lock()  # of all tickets: held for a few instructions

    def __init__(self) -> None:
        self._gate: threading.Lock | None = None
        self._calls: list[Callable[[str | None], None]] = []
        self.error: str | None = None
        self.is_settled = False

    def settle(self, error: str | None = None) -> None:
        """Make the calls and let the waiter go on; `error` is why nothing was committed."""
        with Ticket._settling:
            self.error = error
            self.is_settled = True
        for call in self._calls:
            call(error)
        if self._gate is not None:
            self._gate.release()

    def then(self, call: Callable[[str | None], None]) -> None:
        """Call with the error after the commit, and after earlier calls; at once where it is over.

        The call must not raise.
        """
        with Ticket._settling:
            if not self.is_settled:
                self._calls.append(call)
                return
        call(self.error)

    def wait(self) -> None:
        """Return after the commit; ApiError 503 when it failed."""
        gate = threading.Lock()
        gate.acquire()
        with Ticket._settling:
            if not self.is_settled:
                self._gate = gate
        if self._gate is gate:
            gate.acquire()
        if self.error is not None:
            raise not_committed(self.error)


def not_committed(cause: str) -> ApiError:
    """Return the answer to a request whose commit failed."""
    return ApiError(503, f"nothing was changed, the journal cannot be written: {cause}")


class Reader:
    """What is read of the journal: safe in any thread, and never called under the Master's lock."""

    def __init__(self, path: Path, note_damage: Callable[[Exception], None]) -> None:
        self._path = path
        self._note_damage = note_damage
        self._connections: list[sqlite3.Connection] = []
        self._idle: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()

    def open(self) -> None:
        """Open the connections; sqlite3.Error where the file cannot be read."""
        for _ in range(READERS):
            connection = connect(self._path)
            self._connections.append(connection)
            self._idle.put(connection)

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._idle = queue.LifoQueue()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        connection = self._idle.get()
        try:
            yield connection
        except (sqlite3.Error, ValueError) as error:
            self._note_damage(error)
            raise ApiError(503, f"the journal cannot be read: {self._path}: {error}") from None
        finally:
            self._idle.put(connection)

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._reading() as connection:
            return connection.execute(query, values).fetchall()

    def live_jobs(self) -> list[Job]:
        """Return the jobs that are not final, oldest first."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT seq, id, scenario, spec, state FROM jobs WHERE status IN "
                "('blocked', 'pending', 'running', 'paused') ORDER BY seq"
            )
            return [job_of_row(row) for row in rows]

    def nodes(self) -> list[tuple[str, Json, list[str]]]:
        """Return (id, record, claim words) of every node."""
        rows = self._rows("SELECT id, record, words FROM nodes LEFT JOIN claims ON node_id=id "
                          "ORDER BY nodes.rowid")
        return [(row[0], json.loads(row[1]), json.loads(row[2] or "[]")) for row in rows]

    def owners(self) -> dict[str, str]:
        """Return the hash of the secret of each node that has one, removed nodes included."""
        return dict(self._rows("SELECT node_id, secret_hash FROM owners"))

    def counters(self) -> tuple[int, int, dict[TotalKey, int]]:
        """Return the last sequence numbers of jobs and results, and the totals."""
        rows = self._rows("SELECT kind, status, scenario, node_id, count FROM totals")
        totals = {(row[0], row[1], row[2], row[3]): row[4] for row in rows}
        with self._reading() as connection:
            return _last_number(connection, "jobs"), _last_number(connection, "results"), totals

    def log_counts(self, jobs: Iterable[Job]) -> dict[int, int]:
        """Return how many log lines of the last attempt are kept, by the job's number."""
        counts = {}
        for job in jobs:
            rows = self._rows("SELECT sum(count) FROM logs WHERE job_seq=? AND attempt=?",
                              (job.seq, job.attempt))
            counts[job.seq] = rows[0][0] or 0
        return counts

    def find_ids(self, prefix: str) -> list[str]:
        """Return up to two ids that begin with a prefix; "g" is above every hexadecimal digit."""
        rows = self._rows("SELECT id FROM jobs WHERE id >= ? AND id < ? ORDER BY id LIMIT 2",
                          (prefix, prefix + "g"))
        return [row[0] for row in rows]

    def statuses(self, ids: Sequence[str]) -> dict[str, str]:
        """Return the status of each of many ids that the journal knows."""
        found: dict[str, str] = {}
        for start in range(0, len(ids), 500):  # SQLite before 3.32 takes 999 values in one query
            part = ids[start:start + 500]
            marks = ",".join("?" * len(part))
            found.update(self._rows(f"SELECT id, status FROM jobs WHERE id IN ({marks})", part))
        return found

    def job(self, job_id: str) -> Job | None:
        """Return a job by its whole id."""
        with self._reading() as connection:
            row = connection.execute("SELECT seq, id, scenario, spec, state FROM jobs WHERE id=?",
                                     (job_id,)).fetchone()
            return job_of_row(row) if row else None

    def job_page(self, filters: Mapping[str, str], before: int | None,
                 limit: int) -> tuple[list[Job], bool]:
        """Return jobs, newest first, until PAGE_BYTES are reached, and whether there are more."""
        columns = "seq, id, scenario, spec, state"
        with self._reading() as connection:
            rows, has_more = _page(connection, "jobs", columns, filters, before, limit)
            return [job_of_row(row) for row in rows], has_more

    def result_page(self, filters: Mapping[str, str], before: int | None,
                    limit: int) -> tuple[list[tuple[int, str]], bool]:
        """Return (number, result as JSON text) as job_page() does jobs."""
        with self._reading() as connection:
            return _page(connection, "results", "seq, body", filters, before, limit)

    def ended(self, most: int) -> list[tuple[int, float, TotalKey]]:
        """Return the jobs that ended first, as (number, when, key of their total)."""
        rows = self._rows(
            "SELECT seq, ended, status, scenario, node_id FROM jobs WHERE ended IS NOT NULL "
            "ORDER BY ended LIMIT ?",
            (most,),
        )
        return [(row[0], row[1], ("jobs", row[2], row[3], row[4] or "")) for row in rows]

    def results_of(self, job_seqs: Sequence[int]) -> list[tuple[int, TotalKey]]:
        """Return (number, key of its total) of all results of some jobs."""
        marks = ",".join("?" * len(job_seqs))
        rows = self._rows(
            f"SELECT seq, status, scenario, node_id FROM results WHERE job_seq IN ({marks})",
            list(job_seqs),
        )
        return [(row[0], ("results", row[1], row[2], row[3])) for row in rows]

    def result(self, seq: int) -> Json | None:
        """Return an accepted report by its number."""
        rows = self._rows("SELECT body FROM results WHERE seq=?", (seq,))
        found: Json | None = json.loads(rows[0][0]) if rows else None
        return found

    def results_after(self, seq: int, limit: int) -> list[tuple[int, Json]]:
        """Return (number, result) of those above a number, oldest first, until PAGE_BYTES."""
        found, size = [], 0
        query = "SELECT seq, body FROM results WHERE seq>? ORDER BY seq LIMIT ?"
        with self._reading() as connection:
            rows = connection.execute(query, (seq, limit))
            for number, body in rows:
                found.append((number, json.loads(body)))
                size += len(body)
                if size >= PAGE_BYTES:
                    break
            rows.close()
        return found

    def logs(self, job_seq: int, after: int) -> tuple[list[str], int]:
        """Return log lines from number `after` on, a bounded part, and the number of the next."""
        lines: list[str] = []
        at = size = 0
        with self._reading() as connection:
            parts = connection.execute("SELECT attempt, first, count FROM logs WHERE job_seq=? "
                                       "ORDER BY attempt, first", (job_seq,)).fetchall()
            for attempt, first, count in parts:
                if at + count > after:
                    text = connection.execute(
                        "SELECT lines FROM logs WHERE job_seq=? AND attempt=? AND first=?",
                        (job_seq, attempt, first)).fetchone()[0]
                    for line in json.loads(text)[max(0, after - at):]:
                        if len(lines) == MAX_LOG_PAGE or size >= PAGE_BYTES:
                            return lines, after + len(lines)
                        lines.append(line)
                        size += len(json.dumps(line))
                at += count
        return lines, after + len(lines) if lines else min(after, at)


class Journal:
    """The durable record. One thread writes; the order of writes is the order of write().

    Transactions gather while a commit runs, and the next commit takes all of them (group commit):
    an fsync is shared by every answer that waits for it. A transaction is committed whole or not at
    all. When a commit fails, `on_failure` is called after all tickets were settled with the error:
    with True where memory is ahead of the disk now, and must be rebuilt from it.
    """

    def __init__(
        self, folder: Path, on_failure: Callable[[str, bool], None], say: Say = lambda line: None
    ) -> None:
        self._folder = folder
        self._path = folder / JOURNAL
        self._on_failure = on_failure
        self._say = say  # takes a line about a start that takes long
        self._queue: queue.SimpleQueue[tuple[Sequence[Write], Ticket] | None] = queue.SimpleQueue()
        self._queued = 0
        self._done = 0
        self._closing = False
        self._writer: sqlite3.Connection | None = None
        self._places: dict[str, tuple[int, int]] = {}  # inode and size of the journal and its log
        self.reader = Reader(self._path, self._note_damage)
        self.trouble: str | None = None  # why the last commit failed
        self._began: float | None = None  # when the commit that runs did, by time.monotonic()
        self.damage: str | None = None  # what SQLite says of a file that is no longer whole
        self.recovery: str | None = None  # what was done about it at the start
        self.commits = 0
        self.commit_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._folder_lock = _lock_folder(folder)
        try:
            self._open()
        except CommandError:
            self.close()
            raise
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise CommandError(
                f"{self._path} cannot be used as a journal: {error}; "
                "free or repair it, or name another folder with --data-dir"
            ) from None

    def _open(self) -> None:
        """Open the journal; a damaged one is set aside first, and its readable rows are kept."""
        marker = self._folder / DAMAGED
        if self._path.exists() and not os.access(self._path, os.W_OK):
            raise CommandError(
                f"{self._path} may not be written by this user: give it to the one that "
                "runs the master, or name another folder with --data-dir"
            )
        if (self._folder / APPLYING).exists():
            recover_journal(self._folder)
        if marker.exists():
            self._recover(marker.read_text(errors="replace"))
        elif file_size(self._path) == 0 and file_size(Path(f"{self._path}-wal")):
            self._recover("it is empty or missing, and its log is not")
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            self._recover(str(error))
            self._prepare()

    def _recover(self, why: str) -> None:
        self._disconnect()
        (self._folder / DAMAGED).write_text(why)
        aside, kept = recover_journal(self._folder)
        self.recovery = (
            f"the journal was damaged ({why.strip()}): it was set aside as {aside}, and {kept} "
            f"were recovered; `sqlite3 {aside} .recover` may read more of it"
        )

    def _prepare(self) -> None:
        """Connect, and bring the tables up to date."""
        self._writer = connect(self._path)
        execute = self._writer.execute
        found = format_of(self._writer, self._path)
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA synchronous=FULL")  # acknowledged is durable: each commit is synced
        bring_up_to_date(self._writer, found, self._say)
        execute("BEGIN IMMEDIATE")  # can it be written?
        execute("ROLLBACK")
        execute("SELECT max(seq) FROM jobs").fetchall()
        for name in (f"{self._path}", f"{self._path}-wal"):
            place = os.stat(name)
            self._places[name] = (place.st_ino, place.st_size)
        self.reader.open()

    def _disconnect(self) -> None:
        self.reader.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def start(self) -> None:
        """Begin to commit."""
        self._thread.start()

    def write(self, writes: Sequence[Write]) -> Ticket | None:
        """Queue one transaction; return what waits for it and for all before it.

        None when there is nothing to wait for. Called under the Master's lock, which makes the
        order.
        """
        if not writes and self._queued == self._done:
            return None
        ticket = Ticket()
        self._queued += 1
        self._queue.put((writes, ticket))
        return ticket

    def drop(self, error: str) -> None:
        """Forget what is queued, after a commit that failed; its tickets get the error."""
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if item is None:
                    self._closing = True
                else:
                    self._done += 1
                    item[1].settle(error)

    def _run(self) -> None:
        """Commit what has gathered until close()."""
        while not self._closing:
            self._commit_batch(self._gather())

    def _gather(self) -> list[tuple[Sequence[Write], Ticket]]:
        """Wait for a transaction, and return it with all that are queued behind it."""
        items = [self._queue.get()]
        with contextlib.suppress(queue.Empty):
            while len(items) < MAX_TRANSACTIONS:
                items.append(self._queue.get_nowait())
        self._closing = None in items
        return [item for item in items if item is not None]

    def _commit_batch(self, batch: list[tuple[Sequence[Write], Ticket]]) -> None:
        writes = [write for transaction, _ in batch for write in transaction]
        self._began = time.monotonic()
        error = self._commit(writes) if writes else None
        self._began = None
        if error is not None:
            self.trouble = error
        elif writes:
            self.trouble = None
        self._done += len(batch)
        for _, ticket in batch:
            ticket.settle(error)
        if error is not None:
            is_ahead = any(kind != "alive" for kind, _ in writes)
            if is_ahead:
                self.drop(error)  # at once: somebody may wait for the last of it under the lock
            self._on_failure(error, is_ahead)

    def _commit(self, writes: list[Write]) -> str | None:
        """Commit a batch; return what went wrong."""
        began = time.perf_counter()
        assert self._writer is not None
        execute = self._writer.execute
        try:
            self._check_place()
            execute("BEGIN IMMEDIATE")
            for statement, rows in _grouped(writes):
                self._writer.executemany(statement, rows)
            execute("COMMIT")
        except Exception as error:  # of any kind: this thread must live
            with contextlib.suppress(sqlite3.Error):
                execute("ROLLBACK")
            self._note_damage(error)
            return f"{self._path}: {error}{_file_system_error(self._folder)}"
        self.commits += 1
        self.commit_seconds += time.perf_counter() - began
        return None

    def _check_place(self) -> None:
        """Raise OSError where the journal or its log was removed, replaced or cut.

        Commits would go into a nameless file, or the next start would not find them: until a
        checkpoint copies them into the journal they are in the log alone.
        """
        for name, (inode, size) in self._places.items():
            try:
                found = os.stat(name)
            except FileNotFoundError:
                found = None
            is_log = name.endswith("-wal")
            # VACUUM may make a journal shorter, but never empty; a log is written over from its
            # beginning and stays as long as it was.
            if found is None or found.st_ino != inode or found.st_size < (size if is_log else 1):
                raise OSError(f"{os.path.basename(name)} was removed, replaced or cut while the "
                              "master ran: put it back, or start the master anew on a backup")
            self._places[name] = (inode, found.st_size)

    @property
    def stall(self) -> str | None:
        """Why nothing is committed now: the trouble, or a commit that takes too long."""
        began = self._began
        if self.trouble is None and began is not None:
            seconds = time.monotonic() - began
            if seconds > STALL_S:
                return f"{self._path}: the disk has not answered for {seconds:.0f} s"
        return self.trouble

    def look(self) -> None:
        """Set `trouble` where the journal is not in its place, though nobody writes."""
        try:
            self._check_place()
        except OSError as error:
            if self.trouble is None:
                self.trouble = f"{self._path}: {error}"

    def _note_damage(self, error: Exception) -> None:
        """Mark the journal for recovery at the next start, when it is no longer whole."""
        if self.damage is None and is_damage(error):
            with contextlib.suppress(OSError):
                (self._folder / DAMAGED).write_text(str(error))
            self.damage = str(error)

    def check(self) -> None:
        """Read the whole journal, and set `damage` where it is not sound."""
        if (
            not self._path.exists()
        ):  # connecting would make a new one; the next commit names the fault
            return
        try:
            with contextlib.closing(connect(self._path)) as connection:
                quick_check(connection)
        except sqlite3.Error as error:
            self._note_damage(error)

    def size_bytes(self) -> int:
        """Return the size of the journal's files."""
        total = 0
        for name in (JOURNAL, f"{JOURNAL}-wal"):
            with contextlib.suppress(OSError):
                total += (self._folder / name).stat().st_size
        return total

    def disk_bytes(self) -> tuple[int, int] | None:
        """Return the free and the whole size of the data folder's file system; None without it."""
        try:
            disk = os.statvfs(self._folder)
        except OSError:
            return None
        return disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize

    def close(self) -> None:
        """Commit what is queued, then unlock the folder."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(10)
        self._disconnect()
        os.close(self._folder_lock)


def _file_system_error(folder: Path) -> str:
    """Return the file system's own error: SQLite calls a read-only disk an I/O error."""
    try:
        os.utime(folder)
    except OSError as error:
        return f" ({error.strerror})"
    return ""


def _lock_folder(folder: Path) -> int:
    """Return the descriptor that holds the lock of a data folder; CommandError without it.

    The lock is on the folder itself: no file inside could be removed to get around it.
    """
    try:
        wire.make_private_folder(folder)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.utime(folder)
    except OSError as error:
        raise CommandError(f"data folder {folder} cannot be used: {wire.error_words(error)}; "
                           "--data-dir names another") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise CommandError(f"data folder {folder} is held by another master; stop it, or name "
                           "another folder with --data-dir") from None
    return descriptor


# ---- 6 State -------------------------------------------------------------------------------------

# State is all that the master knows while it runs, and the primitives that change it. Its rules are
# the classes of the next four sections. None of them has a lock, a clock, a file or a log: a step
# gets the moment from outside and leaves behind what has to be done, as Effects.

CLAIMS_KEPT = 16  # claim words of a node: one a slot, and those of repeated requests
SESSIONS_KEPT = 8  # earlier sessions of a node: a late packet of one is told that it is superseded
TRIAL_FIRST_S = 10.0
MAX_TRIAL_S = 600.0
NODE_STATUSES = ("available", "busy", "draining", "quarantined", "offline")


class Moment(NamedTuple):
    """One moment by two clocks, in s: `clock` is monotonic, `wall` is for people."""

    clock: float
    wall: float


class Note(NamedTuple):
    """One line for the log, written once its cause is committed."""

    level: int
    message: str
    values: tuple[Any, ...]


class Effects(NamedTuple):
    """What a step asks of the Master: writes to commit, parked requests to wake, lines to log.

    `wakes` are nodes whose parked request has to look again, `changed` are the numbers of jobs that
    have a new state or new log lines.
    """

    writes: list[Write]
    wakes: list[str]
    changed: list[int]
    notes: list[Note]


class Lanes:
    """The queues of pending jobs: a lane for each Needs, and a heap of those that wait.

    A lane holds numbers of jobs, never records, and the oldest comes first: a job that comes back
    has the place that it had. Cancelling is lazy: a number stays until it is the head, and is
    dropped there when its job is no longer pending in this lane. Lanes that only one node can serve
    stand apart, so that a claim looks at the common ones and its own alone.
    """

    def __init__(self) -> None:
        self._lanes: dict[str | None, dict[Needs, queue.PriorityQueue[int]]] = {}
        self._due: list[tuple[float, int]] = []
        self._waiting: dict[int, float] = {}  # the moment of each number that waits for one

    def put(self, seq: int, needs: Needs) -> None:
        """Put a number at its place in the lane of its needs."""
        self._waiting.pop(seq, None)
        lanes = self._lanes.setdefault(needs.only, {})
        if needs not in lanes:
            lanes[needs] = queue.PriorityQueue()
        lanes[needs].put_nowait(seq)

    def put_later(self, due: float, seq: int) -> None:
        """Keep a number until a moment of the monotonic clock."""
        self._waiting[seq] = due
        heapq.heappush(self._due, (due, seq))

    def due(self, now: float) -> list[int]:
        """Take the numbers whose moment has come."""
        taken = []
        while self._due and self._due[0][0] <= now:
            due, seq = heapq.heappop(self._due)
            if self._waiting.get(seq) == due:  # it has not been put elsewhere since
                del self._waiting[seq]
                taken.append(seq)
        return taken

    def waits(self, seq: int) -> bool:
        """Return whether a number waits for its moment."""
        return seq in self._waiting

    def heads(
        self, node_id: str, is_current: Callable[[int, Needs], bool]
    ) -> list[tuple[int, Needs]]:
        """Return the oldest number of each lane that a node may serve; empty lanes are removed."""
        found = []
        for only in (None, node_id):
            for needs in list(self._lanes.get(only, ())):
                seq = self.head(needs, is_current)
                if seq is not None:
                    found.append((seq, needs))
        return found

    def head(self, needs: Needs, is_current: Callable[[int, Needs], bool]) -> int | None:
        """Return the oldest number of a lane; an empty lane is removed."""
        lanes = self._lanes.get(needs.only, {})
        if needs not in lanes:
            return None
        waiting = lanes[needs].queue
        while waiting:
            if is_current(waiting[0], needs):
                return waiting[0]
            lanes[needs].get_nowait()
        del lanes[needs]
        if not lanes:
            del self._lanes[needs.only]
        return None

    def take(self, needs: Needs) -> int:
        """Take the oldest number of a lane."""
        return self._lanes[needs.only][needs].get_nowait()

    def needs(self) -> list[Needs]:
        """Return the needs of all lanes."""
        return [needs for lanes in self._lanes.values() for needs in lanes]


class Lease:
    """What the master knows of a running attempt beside the journal."""

    __slots__ = ("began", "limit_s", "lines", "progress")

    def __init__(self, began: float, lines: int = 0, limit_s: float = math.inf) -> None:
        self.began = began
        self.lines = lines
        self.limit_s = limit_s
        self.progress: Json | None = None


class Quarantine(NamedTuple):
    """The open circuit of a node: why, since when, its next trial, and how many failed.

    Times are since 1970.
    """

    reason: str
    since: float
    next_trial: float
    trials_failed: int = 0

    def to_json(self) -> Json:
        """Return it as the API shows it."""
        return {"reason": self.reason,
                "since": wire.utc_text(self.since),
                "next_trial": wire.utc_text(self.next_trial),
                "trials_failed": self.trials_failed}


class NodeView(NamedTuple):
    """A node as of one moment: taken under the lock, made into JSON outside of it."""

    id: str
    name: str
    status: str
    facts: str
    last_heartbeat: float
    registered_at: float
    running: int
    slots: int
    protocol: int | None
    drain_until: float | None
    quarantine: Quarantine | None

    def to_json(self) -> Json:
        """Return the node as the API shows it."""
        return {**json.loads(self.facts),
                "id": self.id,
                "name": self.name,
                "status": self.status,
                "last_heartbeat": wire.utc_text(self.last_heartbeat),
                "registered_at": wire.utc_text(self.registered_at),
                "running": self.running,
                "max_concurrent_jobs": self.slots,
                "protocol": self.protocol,
                "drain_deadline": wire.utc_text(self.drain_until),
                "quarantine": None if self.quarantine is None else self.quarantine.to_json()}


class Node:
    """One registered machine. `facts` is the JSON of its registration; the rest is the master's
    own.

    `failures` are those in a row that speak against it, as (number of the job, reason); `trial` is
    the job that tries whether it is well again. `standing` are its leases that may have an order,
    `orders` counts all orders, and `parked` is the serial number of its parked request. `has_run`
    is whether it ever had a lease, and `offline_at` since when it is offline (since 1970), None
    while it is not. `drain_due` and `trial_due` are moments of the monotonic clock.
    """

    __slots__ = (
        "anonymous",
        "claims",
        "drain_due",
        "drain_until",
        "draining",
        "facts",
        "failures",
        "has_run",
        "heard",
        "id",
        "last_heartbeat",
        "leases",
        "leaving",
        "lost",
        "name",
        "offline_at",
        "orders",
        "parked",
        "past",
        "protocol",
        "quarantine",
        "registered_at",
        "session_hash",
        "slots",
        "standing",
        "trial",
        "trial_due",
    )

    DURABLE = (
        "anonymous",
        "drain_until",
        "draining",
        "facts",
        "failures",
        "has_run",
        "last_heartbeat",
        "leaving",
        "name",
        "offline_at",
        "orders",
        "past",
        "protocol",
        "quarantine",
        "registered_at",
        "session_hash",
        "slots",
        "trial",
    )

    def __init__(self, node_id: str, wall: float) -> None:
        self.id = node_id
        self.name = node_id
        self.facts = "{}"
        self.registered_at = self.last_heartbeat = wall
        self.session_hash: str | None = None
        self.past: list[str] = []
        self.protocol: int | None = None
        self.anonymous = False
        self.has_run = False
        self.offline_at: float | None = None
        self.leaving = False
        self.draining = False
        self.drain_until: float | None = None
        self.drain_due = math.inf
        self.quarantine: Quarantine | None = None
        self.trial: int | None = None
        self.trial_due = 0.0
        self.failures: list[tuple[int, str]] = []
        self.orders = 0
        self.slots = 1
        self.claims: deque[str] = deque(maxlen=CLAIMS_KEPT)
        self.heard = 0.0
        self.leases: set[int] = set()
        self.lost: set[int] = set()  # given up by its silence, and not yet anybody else's
        self.standing: set[int] = set()
        self.parked: int | None = None

    def record(self) -> str:
        """Return what the journal keeps."""
        return json.dumps({name: getattr(self, name) for name in self.DURABLE})

    def restore(self, record: Mapping[str, Any], now: Moment) -> None:
        """Take what the journal kept; times since 1970 become moments of the monotonic clock."""
        for name in self.DURABLE:
            if name in record:
                setattr(self, name, record[name])
        if record.get("offline"):  # as format 4 has it
            self.offline_at = self.last_heartbeat
        if self.quarantine is not None:
            self.quarantine = Quarantine(*self.quarantine)
            pause = max(0.0, self.quarantine.next_trial - now.wall)
            self.trial_due = now.clock + min(pause, MAX_TRIAL_S)
        if self.drain_until is not None:
            self.drain_due = now.clock + max(0.0, self.drain_until - now.wall)

    @property
    def offline(self) -> bool:
        """Whether it gave no sign of life, or has left."""
        return self.offline_at is not None

    @property
    def status(self) -> str:
        """One of NODE_STATUSES."""
        if self.offline:
            return "offline"
        if self.draining or self.leaving:
            return "draining"
        if self.quarantine is not None:
            return "quarantined"
        return "busy" if len(self.leases) >= self.slots else "available"

    def view(self) -> NodeView:
        """Return the node as of now."""
        return NodeView(
            self.id,
            self.name,
            self.status,
            self.facts,
            self.last_heartbeat,
            self.registered_at,
            len(self.leases),
            self.slots,
            self.protocol,
            self.drain_until,
            self.quarantine,
        )

    def to_json(self) -> Json:
        """Return the node as the API shows it."""
        return self.view().to_json()


class Stored(NamedTuple):
    """The rows of a journal that make a State."""

    nodes: list[tuple[str, Json, list[str]]]
    owners: dict[str, str]
    last_job: int
    last_result: int
    totals: dict[TotalKey, int]
    live_jobs: list[Job]
    log_counts: dict[int, int]


class Totals:
    """How many jobs and results there are by status, scenario and node: kept, never counted.

    Beside the counts there are their sums by status, and by status with either of the others. So
    the total of each filter is a sum over the few statuses, however many nodes there are.
    """

    def __init__(self, counts: dict[TotalKey, int]) -> None:
        self.counts = counts
        self._sums: dict[tuple[str | None, ...], int] = {}
        for key, count in counts.items():
            self._add_to_sums(key, count)

    def add(self, key: TotalKey, step: int) -> int:
        """Add to a count; return the new one. None is kept of zero."""
        count = self.counts.get(key, 0) + step
        if count:
            self.counts[key] = count
        else:
            self.counts.pop(key, None)
        self._add_to_sums(key, step)
        return count

    def _add_to_sums(self, key: TotalKey, step: int) -> None:
        kind, status, scenario, node_id = key
        sums = self._sums
        for whole in (
            (kind, status, None, None),
            (kind, status, scenario, None),
            (kind, status, None, node_id),
        ):
            count = sums.get(whole, 0) + step
            if count:
                sums[whole] = count
            else:
                del sums[whole]

    def of(self, kind: str, filters: Mapping[str, str]) -> int:
        """Return how many jobs, or results, match filters by `status`, `scenario` and `node_id`."""
        scenario, node_id = filters.get("scenario"), filters.get("node_id")
        statuses = [filters["status"]] if "status" in filters else STATUSES
        if scenario is not None and node_id is not None:
            return sum(self.counts.get((kind, word, scenario, node_id), 0) for word in statuses)
        return sum(self._sums.get((kind, word, scenario, node_id), 0) for word in statuses)


class Ended(NamedTuple):
    """A job that has ended, for those that wait for it."""

    seq: int
    id: str
    status: str


class State:
    """What the master knows: nodes, live jobs, lanes, leases, totals; no lock, clock, I/O or log.

    Finished jobs are not here: they are in the journal, so memory does not grow with history. Every
    change that must outlive the process goes through write(), and `now` is the moment of the step
    that runs.
    """

    def __init__(
        self, settings: Settings, counts: dict[str, int], jitter: Callable[[], float]
    ) -> None:
        self.settings = settings
        self.counts = counts
        self.jitter = jitter  # returns a number from 0 to 1: of the wait before a retry
        self.now = Moment(0.0, 0.0)
        self.effects = Effects([], [], [], [])
        self.nodes: dict[str, Node] = {}
        self.owners: dict[str, str] = {}  # the hash of the secret that an id belongs to
        self.jobs: dict[int, Job] = {}
        self.seq_of: dict[str, int] = {}
        self.lanes = Lanes()
        self.leases: dict[int, Lease] = {}
        self.dependents: dict[int, list[int]] = {}  # a job's number -> those that are blocked by it
        self.blockers: dict[int, set[int]] = {}  # a blocked job's number -> what it waits for
        self.unblocked: list[int] = []  # in this step: blocked jobs that wait for nothing any more
        self.ended: list[Ended] = []  # in this step
        self.idle: dict[str, None] = {}  # nodes whose parked request waits for work, longest first
        self.woken: set[str] = set()  # those of them that were woken for a job
        self.totals = Totals({})
        self.open_in: dict[int, int] = {}  # a block's number -> how many of its jobs have not ended
        self.last_job = 0
        self.last_result = 0
        self.last_serial = 0

    def load(self, stored: Stored) -> None:
        """Fill an empty state from a journal."""
        self.owners = stored.owners
        self.totals = Totals(stored.totals)
        self.last_job, self.last_result = stored.last_job, stored.last_result
        for node_id, record, claims in stored.nodes:
            node = self.nodes[node_id] = Node(node_id, self.now.wall)
            node.restore(record, self.now)
            # Format 4 does not say so.
            node.has_run = node.has_run or bool(claims) or self.has_run(node_id)
            node.claims.extend(claims)
            node.heard = self.now.clock  # its silence before this start does not count
        for job in stored.live_jobs:
            self.jobs[job.seq] = job
            self.seq_of[job.id] = job.seq
            self.open_in[job.seq // BLOCK] = self.open_in.get(job.seq // BLOCK, 0) + 1
        # Once all are known: a blocked job may wait for any of them.
        for job in stored.live_jobs:
            if job.given_up in self.nodes:
                self.nodes[job.given_up].lost.add(job.seq)
            if job.state == "blocked":
                self.block(job)
            elif job.state in LEASED and job.node_id in self.nodes:
                self.lease(self.nodes[job.node_id], job, stored.log_counts.get(job.seq, 0))

    # The primitives of a step: all changes are made by these.

    def write(self, kind: str, *values: Any) -> None:
        """Add one write of the journal's _WRITES, or of a total ("total", key, count)."""
        self.effects.writes.append((kind, values))

    def note(self, message: str, *values: Any, level: int = logging.INFO) -> None:
        """Add a line for the log."""
        self.effects.notes.append(Note(level, message, values))

    def save(self, old: Job | None, job: Job) -> None:
        """Make a job's next record the truth."""
        if old is None:
            self.write("job", job.seq, job.id, job.status, job.scenario, job.node_id, job.spec,
                       job.state_json())
        else:
            ended = job.completed_at if job.state in FINAL else None
            self.write("state", job.status, job.node_id, job.state_json(), ended, job.seq)
            self.count_job(old, -1)
        self.count_job(job, 1)
        self._note_block(old, job)
        if job.state in FINAL:
            # From its commit on it is read from the journal; find() waits for that.
            self.jobs.pop(job.seq, None)
            self.seq_of.pop(job.id, None)
            self.ended.append(Ended(job.seq, job.id, job.status))
        else:
            self.jobs[job.seq] = job
            self.seq_of[job.id] = job.seq
        if job.state not in LEASED and old is not None:
            self._end_lease(old)
        self.effects.changed.append(job.seq)

    def _note_block(self, old: Job | None, job: Job) -> None:
        """Have the journal note what occurs in a block of jobs when the last of them has ended.

        A block that is not full yet waits for the first job of the next one. A retry makes its
        block one of those that are always looked into. The journal itself passes over a block that
        has an open job after all: one commit may hold several of these steps.
        """
        is_open = job.state not in FINAL
        if old is not None and (old.state not in FINAL) == is_open:
            return
        block = job.seq // BLOCK
        left = self.open_in.pop(block, 0) + (1 if is_open else -1)
        if left:
            self.open_in[block] = left
        elif block < self.last_job // BLOCK:
            self.list_block("jobs", block)
        if old is None and job.seq % BLOCK == 0:
            self.list_block("jobs", block - 1)
        elif old is not None and is_open:
            self.write("unlist", block)

    def list_block(self, kind: str, block: int) -> None:
        """Have the journal note what occurs in a block of jobs or results."""
        first, end = block * BLOCK, (block + 1) * BLOCK
        span = (first, end, first, end) if kind == "jobs" else (first, end)
        self.write(f"list_{kind}", block, first, PART, *span)

    def _end_lease(self, job: Job) -> None:
        self.leases.pop(job.seq, None)
        holder = self.nodes.get(job.node_id or "")
        if holder is not None:
            holder.leases.discard(job.seq)

    def lease(self, node: Node, job: Job, lines: int = 0) -> None:
        """Note who holds a job; a node without sessions loses it after the job's own timeout."""
        limit_s = math.inf
        if node.session_hash is None:
            limit_s = json.loads(job.spec)["settings"].get("timeout") or LEASE_WITHOUT_SESSION_S
        if not node.has_run:
            node.has_run = True
            self.write_node(node)
        node.leases.add(job.seq)
        node.standing.add(job.seq)  # looked at once: a loaded or taken back job may have an order
        self.leases[job.seq] = Lease(self.now.clock, lines, limit_s)

    def block(self, job: Job) -> None:
        """Note the jobs that a blocked one waits for.

        What has ended by now, or was lost with a damaged journal, does not count. The record keeps
        all of them: with a thousand of them, writing it for each that ends would cost too much.
        """
        wanted = {*job.after, *job.after_ok}
        waiting = self.blockers[job.seq] = {seq for seq in wanted if seq in self.jobs}
        for seq in waiting:
            self.dependents.setdefault(seq, []).append(job.seq)
        if not waiting:
            self.unblocked.append(job.seq)

    def count_job(self, job: Job, step: int) -> None:
        """Add to the total of a job's status, scenario and node."""
        self.count(("jobs", job.status, job.scenario, job.node_id or ""), step)

    def count(self, key: TotalKey, step: int) -> None:
        """Add to a total."""
        self.write("total", key, self.totals.add(key, step))

    def has_run(self, node_id: str) -> bool:
        """Return whether there are jobs or results of a node."""
        return any(self.totals.of(kind, {"node_id": node_id}) for kind in ("jobs", "results"))

    def write_node(self, node: Node) -> None:
        """Write what the journal keeps of a node."""
        self.write("node", node.id, node.record())

    def park(self, node: Node, for_work: bool) -> int:
        """Return the serial number of a request that waits from now on."""
        self.last_serial += 1
        node.parked = self.last_serial
        if for_work and not node.leaving and not node.draining:
            self.idle[node.id] = None
        return node.parked

    def unpark(self, node: Node) -> bool:
        """Take a node's request from the parked ones; return whether it was woken for a job."""
        was_woken = node.id in self.woken
        node.parked = None
        self.idle.pop(node.id, None)
        self.woken.discard(node.id)
        return was_woken

    def wake(self, node: Node) -> None:
        """Have a node's parked request look again."""
        if node.parked is not None:
            self.effects.wakes.append(node.id)

    def live(self, job_id: str) -> Job | None:
        """Return a job that has not ended, by its whole id."""
        return self.jobs.get(self.seq_of.get(job_id.lower(), 0))


# ---- 7 Placement ---------------------------------------------------------------------------------

# Placement says which node takes which job, Health which nodes are too sick to take any.

FAST_FAILURE_S = 120.0  # a failure after a longer run says little about the health of its node
MAX_FAILURES = 100  # remembered in a row; --quarantine-after may be 0


class Placement:
    """Which node runs which job: first in, first out, through the lanes that a node satisfies."""

    def __init__(self, state: State) -> None:
        self._state = state

    def fits(self, node: Node, needs: Needs) -> bool:
        """Return whether a node may take the jobs of a lane; as a last resort where they failed."""
        # One job at a time tries a node in quarantine, after its pause; a paused one does not.
        trial = self._state.jobs.get(node.trial or 0)
        is_tried = trial is not None and trial.state != "stopped"
        may_try = not is_tried and self._state.now.clock >= node.trial_due
        if node.quarantine is not None and not may_try:
            return False
        if node.id not in needs.avoid or needs.only is not None:
            return True
        return not self.elsewhere(needs)

    def elsewhere(self, needs: Needs) -> bool:
        """Return whether there is a node on which jobs have not failed yet."""
        if needs.only is not None:
            return False
        return any(node.id not in needs.avoid and node.status in ("available", "busy")
                   for node in self._state.nodes.values())

    def has_room(self, node: Node, needs: Needs) -> bool:
        """Return whether a job may begin beside what runs on a node: exclusive ones run alone.

        What a silent node was given up for may still run there: it counts until that node has a new
        session, or another node has claimed the job.
        """
        running = [self._state.jobs[seq] for seq in node.leases]
        for seq in list(node.lost):
            job = self._state.jobs.get(seq)
            if job is not None and job.given_up == node.id:
                running.append(job)
            else:
                node.lost.discard(seq)
        if needs.exclusive and running:
            return False
        return not any(job.exclusive for job in running)

    def next_job(self, node: Node) -> Job | None:
        """Take the oldest job that a node can run from its lane."""
        needs = self._next_lane(node)
        if needs is None:
            return None
        return self._state.jobs[self._state.lanes.take(needs)]

    def _next_lane(self, node: Node) -> Needs | None:
        """Return the lane of the oldest job that a node can run; None where it takes nothing now.

        Where that job is exclusive and something runs, the node takes nothing: as its jobs end it
        becomes free, and the exclusive job cannot starve.
        """
        heads = self._state.lanes.heads(node.id, self._is_current)
        fitting = [head for head in heads if self.fits(node, head[1])]
        if not fitting:
            return None
        _, needs = min(fitting, key=lambda head: head[0])
        return needs if self.has_room(node, needs) else None

    def _is_current(self, seq: int, needs: Needs) -> bool:
        """Return whether a number in a lane still stands for a pending job of that lane."""
        job = self._state.jobs.get(seq)
        return (job is not None and job.state == "pending" and job.needs == needs
                and not self._state.lanes.waits(seq))

    def line_up(self, job: Job) -> None:
        """Put a pending job in its lane, or where it waits for the end of its backoff.

        After a restart the wall clock may have moved: a backoff waits at most its own length.
        """
        state = self._state
        left = (job.not_before or 0.0) - state.now.wall
        if job.not_before is not None and job.attempts and left > 0:
            length = job.not_before - (job.attempts[-1]["ended_at"] or 0.0)
            state.lanes.put_later(state.now.clock + min(left, length), job.seq)
        else:
            state.lanes.put(job.seq, job.needs)

    def pend(self, job: Job) -> None:
        """Line a pending job up and wake one node for it."""
        self.line_up(job)
        self.wake_one((job.needs,))

    def due(self) -> None:
        """Line up the jobs whose moment has come."""
        state = self._state
        for seq in state.lanes.due(state.now.clock):
            if seq in state.jobs:
                needs = state.jobs[seq].needs
                state.lanes.put(seq, needs)
                self.wake_one((needs,))

    def wake_one(self, lanes: Iterable[Needs] | None = None) -> None:
        """Wake the node that has waited longest, where a lane has work that it may take.

        One job wakes one node: thousands of idle agents do not race for it. The last of those that
        were woken wakes the next, so that a burst of jobs wakes as many as it needs.
        """
        state = self._state
        for needs in state.lanes.needs() if lanes is None else lanes:
            node = self._idle_node(needs)
            if node is not None:
                del state.idle[node.id]
                state.woken.add(node.id)
                state.wake(node)
                return

    def _idle_node(self, needs: Needs) -> Node | None:
        """Return the node that has waited longest of those that may take the jobs of a lane.

        Usually it is the first of them all: with thousands of idle nodes a copy would cost more.
        """
        state = self._state
        if state.lanes.head(needs, self._is_current) is None:
            return None
        for node_id in state.idle if needs.only is None else (needs.only,):
            node = state.nodes.get(node_id)
            if node is None or node_id not in state.idle:
                continue
            # It must get a job when it looks: an older exclusive one may keep it from this lane.
            may_take = self.fits(node, needs) and self.has_room(node, needs)
            if may_take and self._next_lane(node) is not None:
                return node
        return None

    def release(self, node: Node) -> None:
        """Answer a node's parked request: something newer is there for it."""
        state = self._state
        state.wake(node)
        if state.unpark(node):
            self.wake_one()

    def order(self, job: Job) -> None:
        """Send a new order for a job to the holder of its lease."""
        node = self._state.nodes.get(job.node_id or "")
        if node is not None:
            node.orders += 1
            node.standing.add(job.seq)
            self._state.write_node(node)
            self._state.wake(node)


def waiting_for(state: State, job: Job) -> str | None:
    """Return what a blocked or pending job waits for, as the end of a sentence."""
    if job.state == "blocked":
        blockers = [state.jobs[seq].id[:8] for seq in sorted(state.blockers.get(job.seq, ()))]
        more = f" and {len(blockers) - 3} more" if len(blockers) > 3 else ""
        return f"the end of job {', '.join(blockers[:3])}{more}"
    if job.state != "pending" or state.lanes.waits(job.seq):
        return None
    if job.only is not None:
        node = state.nodes.get(job.only)
        if node is None:
            return f"node {job.only[:8]}, which was removed"
        return f"node {node.name}, which is {node.status}"
    return "a node on which nothing else runs" if job.exclusive else None


class Health:
    """Which nodes are sick: a circuit breaker for each.

    A node whose jobs fail fast, again and again, for a reason of its own is put in quarantine: its
    circuit opens. After a pause one real job tries it (half-open). Success closes the circuit;
    failure doubles the pause, and the job is not charged: it goes elsewhere, and the attempt does
    not count as a retry.
    """

    def __init__(self, state: State, placement: Placement) -> None:
        self._state = state
        self._placement = placement

    def judge(self, node: Node, job: Job, report: AttemptReport) -> bool:
        """Note what an attempt's end says of its node; return whether the job is excused.

        A network failure says nothing until the job completes elsewhere, for its address may be to
        blame; only a trial that ends so has not shown that its node is well.
        """
        reason = report.failure_reason
        if report.status == "completed":
            self._completed(node, job)
            return False
        if report.status != "failed" or reason is None:
            self.end_trial(node, job)
            return False
        is_at_fault = blames_node(job, node.id, reason)
        if node.trial == job.seq:
            return self._trial_failed(node, job, report, is_at_fault)
        ran_s = self._state.now.clock - self._state.leases[job.seq].began
        if reason == "network":
            return False
        if not is_at_fault:
            self._acquit(job)
        elif ran_s <= FAST_FAILURE_S:
            self._blame(node, job, reason, report.error)
        return False

    def end_trial(self, node: Node, job: Job) -> None:
        """Note that a trial ended without saying anything about its node: the next may begin."""
        if node.trial == job.seq:
            node.trial = None
            node.trial_due = self._state.now.clock
            self._state.write_node(node)

    def close(self, node: Node) -> None:
        """Let a node take all jobs again."""
        node.quarantine, node.trial, node.failures = None, None, []
        self._state.write_node(node)

    def _completed(self, node: Node, job: Job) -> None:
        if node.failures:
            node.failures = []
            self._state.write_node(node)
        if node.quarantine is not None:
            self.close(node)
            self._state.note("node %s is well again: job %s completed on it", node.name, job.id)
            self._placement.release(node)
        for record in job.attempts[-1 - job.retry_count:]:
            other = self._state.nodes.get(record["node_id"])
            if other is None or other is node or record.get("failure_reason") != "network":
                continue
            if record["ended_at"] - record["started_at"] <= FAST_FAILURE_S:
                self._blame(other, job, "network", record["error"])

    def _acquit(self, job: Job) -> None:
        """Take a job's failures from all nodes where it failed: it is at fault itself."""
        for node in self._state.nodes.values():
            kept = [failure for failure in node.failures if failure[0] != job.seq]
            if len(kept) < len(node.failures):
                node.failures = kept
                self._state.write_node(node)

    def _blame(self, node: Node, job: Job, reason: str, error: str | None) -> None:
        node.failures = [*node.failures, (job.seq, reason)][-MAX_FAILURES:]
        limit = self._state.settings.quarantine_after
        has_too_many = 0 < limit <= len(node.failures)
        if node.quarantine is None and has_too_many and not self._most_fail_alike(node, reason):
            self._open(node, f"{len(node.failures)} failures in a row, the last ({reason}): "
                             f"{error or 'without an error message'}")
        else:
            self._state.write_node(node)

    def _most_fail_alike(self, node: Node, reason: str) -> bool:
        """Return whether most other nodes fail alike: then the cause is not this node.

        One failure says little: they must be about to be put in quarantine themselves.
        """
        others = alike = 0
        enough = max(1, self._state.settings.quarantine_after - 1)
        for other in self._state.nodes.values():
            if other is node or other.offline:
                continue
            others += 1
            if len(other.failures) >= enough and other.failures[-1][1] == reason:
                alike += 1
        return alike > others - alike

    def _open(self, node: Node, reason: str) -> None:
        node.failures = []
        self._set_pause(node, reason, 0, self._state.now.wall)
        self._state.note("node %s is in quarantine: %s", node.name, reason, level=logging.WARNING)

    def _trial_failed(self, node: Node, job: Job, report: AttemptReport, at_fault: bool) -> bool:
        """Wait for the next trial, longer where the node was at fault; return whether to excuse.

        A job is excused once by each node, or one that fails everywhere would go round for ever.
        """
        if node.quarantine is None or report.failure_reason in JOB_FAULTS:
            self.end_trial(node, job)
            return False
        node.trial = None
        failed = node.quarantine.trials_failed + at_fault
        error = report.error or "without an error message"
        reason = f"job {job.id} failed ({report.failure_reason}): {error}"
        pause_s = self._set_pause(node, reason, failed, node.quarantine.since)
        self._state.note("node %s stays in quarantine, next try in %s: %s", node.name,
                         wire.duration_text(pause_s), reason, level=logging.WARNING)
        return at_fault and node.id not in job.avoid

    def _set_pause(self, node: Node, reason: str, failed: int, since: float) -> float:
        """Set when the next job may try a node; return the pause in s."""
        now = self._state.now
        pause_s = min(TRIAL_FIRST_S * 2.0 ** min(failed, 30), MAX_TRIAL_S)
        node.quarantine = Quarantine(reason[:1000], since, now.wall + pause_s, failed)
        node.trial_due = now.clock + pause_s
        self._state.write_node(node)
        return pause_s


# ---- 8 Leases ------------------------------------------------------------------------------------

# A lease is the right of one attempt to report. It begins with a claim, and ends by the attempt's
# own report, by the silence of its node, by a new session of the agent that does not hold it, or
# when its node is removed. Nothing else gets the job while the lease lives, so at most one report
# of a job is ever accepted.

class Summary(NamedTuple):
    """A result as one phrase for the log, made only where somebody reads it."""

    status: str
    body: Json

    def __str__(self) -> str:
        return summary_of(self.status, self.body)


def summary_of(status: str, body: Json) -> str:
    """Return a result as one phrase for the log."""
    metrics = body.get("metrics") or {}
    analysis = body.get("analyzer_output") or {}
    joules = "~{:.0f} J" if metrics.get("energy_estimated") else "{:.0f} J"
    forms = (
        ("duration", "{:.1f} s"),
        ("speed", "{:.2f}x real time"),
        ("cpu_usage", "CPU {:.0f} %"),
        ("energy_joules", joules),
    )
    parts = [status]
    for name, form in forms:
        value = metrics.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            parts.append(form.format(value))
    for words in (analysis.get("recommendation"), body.get("error")):
        if words:
            parts.append(str(words)[:200])
    return ", ".join(parts)


_NOT_IN_RESULT = frozenset(("lines", "lines_from", "samples", "session"))  # sent beside a result


class Leases:
    """The right of one attempt to report: from its claim to its end, or its node's silence.

    A lease that ended by its node's silence may be taken back while nobody else has claimed the
    job: the node comes back with the same attempt, in its registration or in a report, and the
    retry is not counted.
    """

    def __init__(self, state: State, placement: Placement, health: Health) -> None:
        self._state = state
        self._placement = placement
        self._health = health

    def claim(self, node: Node, word: str | None) -> Job | None:
        """Hand out the oldest job that a node can run.

        `word` makes a claim safe to repeat: the same word gets the same job while that attempt
        lives, and nothing after it.
        """
        state = self._state
        if word is not None and word in node.claims:
            return self._claimed_by(node, word)
        if node.leaving or node.draining:
            return None
        job = self._placement.next_job(node)
        if job is None:
            return None
        taken = advance(job, "claim", state.now.wall, node.id, word)
        state.save(job, taken)
        state.lease(node, taken)
        if node.quarantine is not None:
            node.trial = job.seq
            state.write_node(node)
            state.note("job %s tries whether node %s is well again", job.id, node.name)
        if word is not None:
            node.claims.append(word)
            state.write("claims", node.id, json.dumps(list(node.claims)))
        state.counts["claims"] += 1
        state.note("job %s attempt %d: %s takes it", job.id, taken.attempt, node.name)
        if job.exclusive:
            # Nodes that were not empty took nothing while it was the oldest.
            self._placement.wake_one()
        return taken

    def _claimed_by(self, node: Node, word: str) -> Job | None:
        for seq in node.leases:
            if self._state.jobs[seq].claim == word:
                return self._state.jobs[seq]
        return None

    def holds(self, job: Job, node: Node, attempt: int | None) -> bool:
        """Return whether an attempt has the lease; one that was only given up takes it back."""
        if attempt is not None and attempt != job.attempt:
            return False
        if job.state in LEASED:
            return job.node_id == node.id
        if job.state != "pending" or job.given_up != node.id:
            return False
        self._take_back(job, node)
        return True

    def _take_back(self, job: Job, node: Node) -> None:
        state = self._state
        # The same attempt, with its number and its log: for its agent nothing has happened.
        back = advance(job, "reclaim", state.now.wall, reason=f"{node.name} came back with it")
        state.save(job, back)
        state.lease(node, back, back.attempts[-1].get("lines", 0))
        if node.offline:  # it was leaving: with something that runs on it, its silence counts again
            node.offline_at = None
            state.write_node(node)
        state.note("job %s attempt %d: %s came back with it", job.id, job.attempt, node.name)

    def held(self, node: Node, holding: Iterable[tuple[str, int]]) -> list[Json]:
        """Return the attempts in `holding` that are still a node's own."""
        own = []
        for job_id, attempt in holding:
            job = self._state.live(job_id)
            if job is not None and self.holds(job, node, attempt):
                own.append({"job_id": job_id, "attempt": attempt})
        return own

    def leased(self, job_id: str, node: Node, attempt: int | None) -> Job | None:
        """Return the job where this attempt has its lease, or takes it back."""
        job = self._state.live(job_id)
        if job is None or not self.holds(job, node, attempt):
            return None
        return self._state.jobs[job.seq]  # as it is after a take-back

    def progress(self, job: Job, report: AttemptReport) -> None:
        """Take progress and log lines of an attempt."""
        state = self._state
        lease = state.leases[job.seq]
        # A message may bring a part of the fields; the others still hold.
        merged = {**(lease.progress or {}), **report.progress}
        lease.progress = merged if len(merged) <= MAX_PROGRESS_FIELDS else report.progress
        self._take_lines(job, report)
        if report.published and report.published != job.attempts[-1].get("published"):
            state.save(job, with_published(job, report.published))

    def _take_lines(self, job: Job, report: AttemptReport) -> None:
        """Keep the log lines that are new; a repeated message brings none twice."""
        lease = self._state.leases[job.seq]
        # A seed's agent does not number its lines: they follow those that are known.
        start = lease.lines if report.lines_from is None else report.lines_from
        lines = report.lines[max(0, lease.lines - start):]
        room = MAX_LOG_LINES - lease.lines
        if not lines or room <= 0:
            return
        kept = lines[:room]
        if len(kept) == room:
            kept[-1] = f"[ffdist keeps {MAX_LOG_LINES} lines of an attempt; the rest is dropped]"
        self._state.write("log", job.seq, job.attempt, lease.lines, len(kept), json.dumps(kept))
        lease.lines += len(lines)
        self._state.effects.changed.append(job.seq)

    def end(self, node: Node, job: Job, report: AttemptReport, body: Json) -> None:
        """End an attempt by its report."""
        state = self._state
        self._take_lines(job, report)
        excused = self._health.judge(node, job, report)
        if report.published:
            job = with_published(job, report.published)
        event = self._event_of(node, job, report, excused)
        ended = advance(
            job,
            event,
            state.now.wall,
            error=report.error,
            reason=report.failure_reason,
            reported=report.status,
            not_before=self._retry_at(job, event),
        )
        if report.status != "returned":
            self._keep_result(node, ended, report, body)
            ended = ended._replace(result_seq=state.last_result if ended.state in FINAL else None)
        state.save(job, ended)
        state.counts["reports"] += 1
        state.note("result of job %s attempt %d from %s: %s", job.id, job.attempt, node.name,
                   Summary(report.status, body))
        if ended.state == "pending":
            self._placement.pend(ended)
        self._after_lease(node)

    def _event_of(self, node: Node, job: Job, report: AttemptReport, excused: bool) -> str:
        if excused and (job.state, "excuse") in TRANSITIONS:
            return "excuse"
        elsewhere = report.status == "failed" and self._placement.elsewhere(
            Needs(frozenset((*job.avoid, node.id)), job.only))
        return event_of_report(job, report.status, report.failure_reason, elsewhere)

    def _after_lease(self, node: Node) -> None:
        """Go on with a node on which something has ended."""
        self.settle_leaving(node)
        if node.parked is None:
            return
        if node.id not in self._state.idle:
            self._placement.release(node)  # it was full: now it has a slot to ask for
        elif not node.leases:
            self._state.wake(node)  # an exclusive job may have waited for this

    def settle_leaving(self, node: Node) -> None:
        """Note that a leaving node is offline when nothing runs on it."""
        if node.leaving and not node.leases and not node.offline:
            node.offline_at = self._state.now.wall
            self._state.write_node(node)

    def _retry_at(self, job: Job, event: str) -> float | None:
        """Return when the backoff of a retry ends, by full jitter; None where there is none."""
        if event != "requeue" and (event, job.state) != ("lose", "running"):
            return None
        state = self._state
        return state.now.wall + state.jitter() * backoff_most_s(job.retry_count, state.settings)

    def _keep_result(self, node: Node, job: Job, report: AttemptReport, body: Json) -> None:
        state = self._state
        state.last_result += 1
        # What the agent says of itself is overwritten by what the master knows.
        kept = {name: value for name, value in body.items() if name not in _NOT_IN_RESULT}
        result = {
            **kept,
            "job_id": job.id,
            "node_id": node.id,
            "node": node.name,
            "attempt": job.attempt,
            "scenario": job.scenario,
            "status": report.status,
            "received_at": wire.utc_text(state.now.wall),
        }
        tariff = state.settings.tariff
        if body.get("metrics") and tariff is not None:
            result["metrics"] = tariff.priced(body["metrics"], (node.name, node.id),
                                              job.attempts[-1]["started_at"])
        state.write(
            "result",
            state.last_result,
            report.status,
            job.scenario,
            node.id,
            json.dumps(result),
            job.seq,
        )
        if state.last_result % BLOCK == 0:
            state.list_block("results", state.last_result // BLOCK - 1)
        state.count(("results", report.status, job.scenario, node.id), 1)

    def lose(self, job: Job, reason: str, at_once: bool = False) -> None:
        """End a lease without a report: the job is pending again while it has retries left."""
        state = self._state
        event = "lose" if job.retry_count < job.max_retries else "exhaust"
        # The attempt may be taken back: its log goes on after the lines that are kept.
        if job.seq in state.leases:
            job = with_lines(job, state.leases[job.seq].lines)
        lost = advance(job, event, state.now.wall, error=reason, reason="node_lost",
                       not_before=None if at_once else self._retry_at(job, event))
        node = state.nodes.get(job.node_id or "")
        state.save(job, lost)
        state.counts["lost_leases"] += 1
        state.note("job %s attempt %d: %s; now %s", job.id, job.attempt, reason, lost.status,
                   level=logging.WARNING)
        if node is not None:
            self._health.end_trial(node, job)
        if node is not None and lost.given_up is not None:
            node.lost.add(lost.seq)
        if lost.state == "pending":
            self._placement.pend(lost)
        if node is not None:
            self.settle_leaving(node)

    def lose_all(self, node: Node, reason: str) -> None:
        """End all leases of a node."""
        for seq in list(node.leases):
            self.lose(self._state.jobs[seq], reason)

    def time_out(self) -> None:
        """End the leases of nodes without sessions whose job is past its own timeout."""
        state = self._state
        for seq, lease in list(state.leases.items()):
            if state.now.clock - lease.began > lease.limit_s:
                limit = wire.duration_text(lease.limit_s)
                self.lose(state.jobs[seq], f"no report within the job's timeout of {limit}")


# ---- 9 Registry ----------------------------------------------------------------------------------

STRANGER_S = 24 * 3600.0  # offline: after it a node that never ran a job is forgotten
STRANGER_SILENCE_S = 3600.0  # of it while this master listened: an agent's pauses are shorter
MAX_STRANGERS = 100  # forgotten in one tick, for its lock


def find_node(
    nodes: Mapping[str, Node], given: str, status: int = 404, field: str = "node_id"
) -> Node:
    """Return a node by its id, a name that is unique, or a prefix of 4 or more characters."""
    if given in nodes:
        return nodes[given]
    found = [node for node in nodes.values() if node.name == given]
    if not found and len(given) >= 4:
        found = [node for node_id, node in nodes.items() if node_id.startswith(given)]
    if len(found) == 1:
        return found[0]
    shown = wire.printable(given[:64])
    if found:
        raise ApiError(status, f"node {shown} is ambiguous: give more of its id", field)
    raise ApiError(status, f"unknown node {shown}: 'python3 ffdist.py nodes' lists them", field)


def refuse_session(node: Node, session_hash: str | None) -> None:
    """Raise ApiError 409 where another session speaks for a node."""
    if session_hash == node.session_hash:
        return
    if session_hash in node.past:
        raise ApiError(
            409, f"a newer start of node {node.name} has taken over; this one must end", "session"
        )
    raise ApiError(
        409, f"node {node.name} has another session, and is heard only with that", "session"
    )


def refuse_stranger(node: Node | None, owner: str | None, checked: Registration) -> None:
    """Raise ApiError 409 where somebody else registers by an id that is, or was, a node's.

    `owner` is the hash of the secret that the id belongs to. It outlives the node: else anybody who
    removes a node could take its place.
    """
    session_hash = checked.session_hash
    if node is not None and session_hash in node.past:
        refuse_session(node, session_hash)
    is_same_session = node is not None and session_hash == node.session_hash
    if owner is None:
        if node is not None and not is_same_session and not node.offline:
            raise ApiError(409, f"node {node.name} is known by another session: a new one takes "
                           "over only when it is offline", "secret")
        return
    # As bytes: compare_digest() takes only ASCII as text.
    is_owner = hmac.compare_digest(owner.encode(), (checked.secret_hash or "").encode())
    if not is_owner and (session_hash is None or not is_same_session):
        raise ApiError(409, f"node {checked.name} is known by its secret: a new session takes over "
                       "only with that", "secret")


def has_ended_alike(job: Job, report: AttemptReport) -> bool:
    """Return whether a report was accepted before: same attempt, same status, same node."""
    for record in job.attempts:
        same_attempt = report.attempt in (None, record["attempt"])
        same_end = record["node_id"] == report.node_id and record["status"] == report.status
        if same_attempt and same_end and record["ended_at"] is not None:
            return True
    return False


class Registry:
    """Which nodes there are, who may speak for each, and whether they are heard.

    An id is public; a session is known to one start of an agent, the secret to its state folder. A
    node with a session is heard only with it, and another session takes over with the secret, or
    while a node without one is offline.
    """

    def __init__(self, state: State, placement: Placement, health: Health, leases: Leases) -> None:
        self._state = state
        self._placement = placement
        self._health = health
        self._leases = leases

    def register(self, checked: Registration, new_id: str) -> tuple[bool, Json]:
        """Take a node in, or back; return whether it is new, and the answer to its agent.

        `new_id` is for one that has no id.
        """
        state = self._state
        node = self._known(checked)
        is_new = node is None
        owner = state.owners.get(node.id if node else checked.id or "")
        refuse_stranger(node, owner, checked)
        if node is None:
            node = Node(checked.id or new_id, state.now.wall)
            node.has_run = state.has_run(node.id)  # before somebody removed it
            state.nodes[node.id] = node
        # Only the first registration of a start judges its leases: a repeat may be a late packet.
        first = checked.session_hash != node.session_hash
        self._take_in(node, checked)
        held = self._leases.held(node, checked.holding)
        if first:
            self._end_others(node, held)
        state.write_node(node)
        state.note(
            "node %s (%s) %s: %s threads, %s",
            node.name,
            node.id,
            "registered" if is_new else "is back",
            json.loads(checked.facts).get("cpu_threads"),
            checked.address,
        )
        answer = {**node.to_json(), "protocol": wire.PROTOCOL,
                  "node_timeout_s": state.settings.node_timeout_s, "holding": held}
        return is_new, answer

    def _known(self, checked: Registration) -> Node | None:
        """Return the node that registers: by id, or by name for a seed's agent, which has none."""
        if checked.id is not None:
            return self._state.nodes.get(checked.id)
        for node in self._state.nodes.values():
            same_session = node.session_hash == checked.session_hash
            if node.anonymous and node.name == checked.name and same_session:
                return node
        return None

    def _take_in(self, node: Node, checked: Registration) -> None:
        state = self._state
        if checked.session_hash != node.session_hash:
            if node.session_hash is not None:
                node.past = [*node.past, node.session_hash][-SESSIONS_KEPT:]
            node.session_hash = checked.session_hash
            node.trial_due = state.now.clock  # whoever restarted it may have repaired it
            node.lost.clear()
            self._placement.release(node)
        if checked.owner_hash and checked.session_hash and node.id not in state.owners:
            state.owners[node.id] = checked.owner_hash
            state.write("owner", node.id, checked.owner_hash)
        node.facts, node.name, node.slots = checked.facts, checked.name, checked.slots
        node.protocol, node.anonymous = checked.protocol, checked.id is None
        node.offline_at, node.leaving = None, False
        self._touch(node)

    def _end_others(self, node: Node, held: Sequence[Json]) -> None:
        """End the leases that a new session does not hold: its start has lost them."""
        own = {(entry["job_id"], entry["attempt"]) for entry in held}
        # A copy: losing a lease changes the set.
        for seq in list(node.leases):
            job = self._state.jobs[seq]
            if (job.id, job.attempt) not in own:
                self._leases.lose(job, f"the agent on {node.name} was started again", at_once=True)

    def hear(self, node_id: str, session_hash: str | None) -> Node:
        """Return the node that speaks, as heard now; ApiError 404 or 409 where it must not."""
        node = self._state.nodes.get(node_id)
        if node is None:
            raise ApiError(
                404, f"unknown node {wire.printable(node_id[:64])}: register first", "node_id"
            )
        refuse_session(node, session_hash)
        self._touch(node)
        return node

    def _touch(self, node: Node) -> None:
        node.heard, node.last_heartbeat = self._state.now
        if node.offline and not node.leaving:
            node.offline_at = None
            self._state.write_node(node)
            self._state.note("node %s is back", node.name)

    def leave(self, node: Node) -> None:
        """Note that a node's agent is stopping."""
        if not node.leaving:
            node.leaving = True
            self._state.note("node %s is leaving", node.name)
            self._leases.settle_leaving(node)
            self._state.write_node(node)

    def forget(self, node: Node) -> Json:
        """Remove a node; its jobs are pending again."""
        self._remove(node)
        self._state.note("node %s (%s) removed", node.name, node.id)
        return {"status": "removed", "id": node.id}

    def _remove(self, node: Node) -> None:
        state = self._state
        self._leases.lose_all(node, f"node {node.name} was removed")
        self._placement.release(node)
        del state.nodes[node.id]
        state.write("forget", node.id)
        state.write("claims", node.id, "[]")  # a later node of that id has claimed nothing yet

    def drain(self, node: Node, deadline_s: float | None) -> Json:
        """Let a node take nothing more; what still runs after `deadline_s` is given back."""
        now = self._state.now
        node.draining = True
        node.drain_until = None if deadline_s is None else now.wall + deadline_s
        node.drain_due = math.inf if deadline_s is None else now.clock + deadline_s
        self._state.write_node(node)
        self._placement.release(node)
        self._state.note("node %s takes no more jobs", node.name)
        return node.to_json()

    def undrain(self, node: Node) -> Json:
        """Let a node work again that was drained or in quarantine."""
        node.draining, node.drain_until, node.drain_due = False, None, math.inf
        self._health.close(node)
        self._placement.release(node)
        self._state.note("node %s works again", node.name)
        return node.to_json()

    def tick(self, late_s: float) -> None:
        """Do what is due for each node: mark it offline, end its drain, remove it.

        Silence counts only while the master listened: where its own timer came late, every node's
        deadline moves by the delay.
        """
        state = self._state
        strangers = []
        for node in state.nodes.values():
            node.heard += late_s
            if node.offline:
                if self._is_stranger(node):
                    strangers.append(node)
            elif state.now.clock - node.heard > state.settings.node_timeout_s:
                self._mark_offline(node)
            if node.leases and -math.inf < node.drain_due <= state.now.clock:
                node.drain_due = -math.inf  # send once: orders persist until acknowledged
                for seq in node.leases:
                    self._placement.order(state.jobs[seq])
        for node in strangers[:MAX_STRANGERS]:
            self._remove(node)
            state.note("node %s (%s) is forgotten: it never ran a job and was offline for %d h",
                       node.name, node.id, STRANGER_S // 3600)

    def _is_stranger(self, node: Node) -> bool:
        """Return whether an offline node never ran a job, and has been away for long enough.

        The wall clock says since when, for that outlives a restart. But it may jump, or the master
        may have been down meanwhile: so the node must have been silent for a while to this one too.
        A drained node stays: a person's order must not be lost.
        """
        now = self._state.now
        if node.has_run or node.draining or node.offline_at is None:
            return False
        is_silent = now.clock - node.heard >= STRANGER_SILENCE_S
        return is_silent and now.wall - node.offline_at >= STRANGER_S

    def _mark_offline(self, node: Node) -> None:
        node.offline_at = self._state.now.wall
        self._state.write_node(node)
        silence = wire.duration_text(self._state.settings.node_timeout_s)
        self._state.note(
            "node %s (%s) is lost: no sign of life for %s",
            node.name,
            node.id,
            silence,
            level=logging.WARNING,
        )
        self._leases.lose_all(node, f"node {node.name} gave no sign of life for {silence}")


# ---- 10 Fleet ------------------------------------------------------------------------------------

# One step of the fleet is Fleet.apply(event, now): the event is one of the tuples below, checked
# before it came here. The step changes the State at once, or refuses the event with an ApiError,
# and returns an Outcome. What it wrote is not yet on disk then: the Master answers after the
# commit.
#
# A new rule belongs in the class whose docstring names it, a new kind of event in Fleet's table.

class Asked(NamedTuple):
    """The fields of a heartbeat, or of a claim where it is `for_work`."""

    node_id: str
    session_hash: str | None
    seen: int
    claim: str | None
    leaving: bool
    for_work: bool


class Arrived(NamedTuple):
    """Event: a heartbeat or a claim has come, which is parked where it `may_wait`."""

    asked: Asked
    may_wait: bool


class Looked(NamedTuple):
    """Event: a parked request looks again; `present` is whether its client is still connected."""

    asked: Asked
    serial: int
    present: bool
    may_wait: bool


class Registered(NamedTuple):
    """Event: an agent registers; `new_id` is for one that has no id."""

    checked: Registration
    new_id: str


class NodeOrder(NamedTuple):
    """Event: a person asks for `forget`, `drain` or `undrain` of a node."""

    verb: str
    node_id: str
    deadline_s: float | None = None


class Submitted(NamedTuple):
    """Event: drafts with ids arrive. `fresh` are ids that no job can have yet.

    `archived` are finished jobs of the ids that were given, `statuses` those of the ids in `after`
    and `after_ok`: None for an id that the journal does not know either.
    """

    drafts: Sequence[Draft]
    fresh: Container[str]
    archived: Mapping[str, Job | None]
    statuses: Mapping[str, str | None]

    def status_of(self, job_id: str) -> str | None:
        """Return the status of a job that has ended; None for one that is unknown."""
        archived = self.archived.get(job_id)
        return self.statuses.get(job_id) if archived is None else archived.status


class Ordered(NamedTuple):
    """Event: a person asks for `cancel`, `pause`, `resume` or `retry` of a job.

    `statuses` are those of the ended jobs that one to be retried came after.
    """

    job: Job
    verb: str
    statuses: Mapping[str, str] = {}


class Progressed(NamedTuple):
    """Event: an agent reports progress of an attempt."""

    job_id: str
    report: AttemptReport


class Finished(NamedTuple):
    """Event: an agent reports the end of an attempt; `body` becomes the result."""

    job_id: str
    report: AttemptReport
    body: Json


class Ticked(NamedTuple):
    """Event: time has passed; `late_s` is how much later than planned the timer came."""

    late_s: float


class Expired(NamedTuple):
    """Event: finished jobs are past their limits: (number, key of its total) of each, and of each
    of their results.
    """

    jobs: Sequence[tuple[int, TotalKey]]
    results: Sequence[tuple[int, TotalKey]]


def writes_nothing(state: State, event: object) -> bool:
    """Return whether an event is no more than a sign of life of a node that is not offline."""
    if not isinstance(event, (Arrived, Looked)):
        return False
    node = state.nodes.get(event.asked.node_id)
    return node is None or not (node.offline or event.asked.leaving or event.asked.for_work)


class Reply(NamedTuple):
    """What a heartbeat or claim gets: an answer, or the serial number under which it waits."""

    answer: Json
    serial: int | None = None


class Accepted(NamedTuple):
    """What a submission gets: its jobs, or the ids that must be looked up in the journal first."""

    jobs: Sequence[Job] = ()
    any_new: bool = False
    unresolved: Sequence[str] = ()


class Requests:
    """Heartbeats and claims: what each gets now, and whether it waits.

    A node has at most one parked request; a newer one answers it. A parked request has a serial
    number: when it looks again and its node has another, it was superseded and is answered empty.
    """

    def __init__(
        self, state: State, placement: Placement, leases: Leases, registry: Registry
    ) -> None:
        self._state = state
        self._placement = placement
        self._leases = leases
        self._registry = registry

    def arrived(self, event: Arrived) -> Reply:
        """Take a heartbeat or claim that has come."""
        state, asked = self._state, event.asked
        node = self._registry.hear(asked.node_id, asked.session_hash)
        state.counts["heartbeats"] += 1
        state.note("heartbeat of %s", node.name, level=logging.DEBUG)
        self._placement.release(node)
        if asked.leaving:
            self._registry.leave(node)
        answer = self._answer(node, asked, asked.for_work)
        return self._reply(node, asked, answer, event.may_wait)

    def looked(self, event: Looked) -> Reply:
        """Look again for a parked request that was woken, or whose time is up."""
        asked = event.asked
        node = self._state.nodes.get(asked.node_id)
        if node is None:
            return Reply({})
        if node.parked != event.serial:
            refuse_session(node, asked.session_hash)
            return Reply({})
        was_woken = self._state.unpark(node)
        answer = self._answer(node, asked, asked.for_work and event.present)
        # Where it found nothing, another took its job. Where it found one and nobody else is on the
        # way, there may be more. It is not yet parked again, so it does not wake itself.
        if was_woken and ("job" not in answer or not self._state.woken):
            self._placement.wake_one()
        return self._reply(node, asked, answer, event.may_wait)

    def _reply(self, node: Node, asked: Asked, answer: Json, may_wait: bool) -> Reply:
        # Orders that the agent has seen persist in every answer, but are no reason for one.
        has_work = "job" in answer or "claim" in answer
        has_news = "actions" in answer and asked.seen < node.orders
        if has_work or has_news or not may_wait:
            return Reply(answer)
        return Reply({}, self._state.park(node, asked.for_work))

    def _answer(self, node: Node, asked: Asked, for_work: bool) -> Json:
        """Return the job and the orders that there are for a node now."""
        state = self._state
        answer: Json = {}
        # Only leases that may have an order are looked at: a node with many slots asks often.
        actions = {seq: self.action(state.jobs[seq]) for seq in sorted(node.standing & node.leases)}
        node.standing = {seq for seq, action in actions.items() if action is not None}
        if node.standing:
            answer = {
                "actions": [actions[seq] for seq in sorted(node.standing)],
                "orders": node.orders,
            }
        if for_work:
            job = self._leases.claim(node, asked.claim)
            if job is not None:
                answer["job"] = job
            elif asked.claim in node.claims:
                answer["claim"] = "spent"
        return answer

    def action(self, job: Job) -> Json | None:
        """Return what the agent must yet do about a job; an order persists until it is done."""
        progress = self._state.leases[job.seq].progress or {}
        holder = self._state.nodes[job.node_id or ""]
        word = None
        if job.state == "canceling":
            word = "cancel"
        elif self._state.now.clock >= holder.drain_due:
            word = "return"
        elif job.state == "stopped":
            word = "pause"
        elif progress.get("paused"):
            word = "resume"
        return {"job_id": job.id, "attempt": job.attempt, "action": word} if word else None


class Intake:
    """Jobs that come in, what people ask of them, and what they wait for.

    A job with `after` or `after_ok` is blocked until all those jobs have ended, however they did;
    where one in `after_ok` did not complete, it is canceled. It can name only jobs that exist or
    stand earlier in its array, so there are no cycles.
    """

    def __init__(self, state: State, placement: Placement) -> None:
        self._state = state
        self._placement = placement

    def submit(self, event: Submitted) -> Accepted:
        """Accept jobs, all or none; ApiError 400 before anything is changed."""
        state = self._state
        unresolved = self._unresolved(event)
        if unresolved:
            return Accepted(unresolved=unresolved)
        known = {draft.id: state.live(draft.id or "") or event.archived.get(draft.id or "")
                 for draft in event.drafts if draft.id not in event.fresh}
        new = [draft for draft in event.drafts if known.get(draft.id) is None]
        placed = [self._placed(draft) for draft in new]
        numbers = {draft.id or "": state.last_job + 1 + place for place, draft in enumerate(new)}
        for draft in placed:
            self._check_after(draft, numbers, event)
        accepted = {draft.id: self._accept(draft, numbers, event) for draft in placed}
        jobs = [accepted.get(draft.id) or known.get(draft.id) for draft in event.drafts]
        return Accepted([job for job in jobs if job is not None], bool(new))

    def _unresolved(self, event: Submitted) -> list[str]:
        """Return the ids that are neither live nor looked up in the journal yet."""
        seq_of = self._state.seq_of
        own = {draft.id for draft in event.drafts}
        wanted: dict[str, None] = {}
        for draft in event.drafts:
            given = draft.id or ""
            if given not in event.fresh and given not in event.archived:
                wanted[given] = None
            for job_id in (*draft.after, *draft.after_ok):
                if job_id not in own and job_id not in event.statuses:
                    wanted[job_id] = None
        return [job_id for job_id in wanted if job_id not in seq_of]

    def _placed(self, draft: Draft) -> Draft:
        """Return a draft with the id of the node that it names."""
        if draft.node is None:
            return draft
        return draft._replace(node=find_node(self._state.nodes, draft.node, 400, "node").id)

    def _check_after(self, draft: Draft, numbers: Mapping[str, int], event: Submitted) -> None:
        """Raise ApiError 400 where a draft names a job that does not stand before it."""
        own = numbers[draft.id or ""]
        for field, ids in (("after", draft.after), ("after_ok", draft.after_ok)):
            for job_id in ids:
                is_earlier = numbers.get(job_id, own) < own
                is_known = job_id in self._state.seq_of or event.status_of(job_id) is not None
                if not is_earlier and not is_known:
                    raise ApiError(400, f"{field} names the unknown job {job_id}: expected one "
                                   "submitted before, or earlier in the array", field)

    def _accept(self, draft: Draft, numbers: Mapping[str, int], event: Submitted) -> Job:
        state = self._state
        state.last_job += 1
        wall = state.now.wall
        after = self._blockers(draft.after, numbers)
        after_ok = self._blockers(draft.after_ok, numbers)
        first = "blocked" if after or after_ok else "pending"
        job = Job(
            state.last_job,
            draft.id or "",
            draft.scenario,
            draft.spec,
            wall,
            draft.max_retries,
            state=first,
            history=((wall, first, None),),
            only=draft.node,
            exclusive=draft.exclusive,
            after=after,
            after_ok=after_ok,
        )
        state.save(None, job)
        state.counts["submitted"] += 1
        state.note("job %s submitted: %s", job.id, job.scenario)
        for job_id in draft.after_ok:
            status = self._final_status(job_id, numbers, event)
            if status not in (None, "completed"):
                return self._cancel_dependent(job, job_id, str(status))
        if first == "blocked":
            state.block(job)
        else:
            self._placement.pend(job)
        return job

    def _final_status(
        self, job_id: str, numbers: Mapping[str, int], event: Submitted
    ) -> str | None:
        """Return how a job has ended; None for one that has not."""
        if job_id in self._state.seq_of:
            return None
        if job_id in numbers:  # of this array: nothing of it has run, so it can only be canceled
            return "canceled"
        return event.status_of(job_id)

    def _blockers(self, ids: Iterable[str], numbers: Mapping[str, int]) -> tuple[int, ...]:
        """Return the numbers of those jobs that have not ended."""
        seq_of = self._state.seq_of
        found = (seq_of.get(job_id) or numbers.get(job_id) for job_id in ids)
        return tuple(sorted({seq for seq in found if seq is not None and seq in self._state.jobs}))

    def order(self, event: Ordered) -> Job | None:
        """Cancel, pause, resume or retry a job; ApiError 409 where its state forbids it.

        None where the job has ended since it was found: it has to be read again.
        """
        state = self._state
        job = state.jobs.get(event.job.seq, event.job)
        if job.seq not in state.jobs and job.state not in FINAL:
            return None
        changed = advance(job, event.verb, state.now.wall, reason=f"{event.verb} was asked for")
        if event.verb == "retry":
            changed = self._blocked_again(changed, event.statuses)
        if changed.state == job.state:
            return changed
        state.save(job, changed)
        if changed.state == "blocked":
            state.block(changed)
        elif changed.state == "pending":
            self._placement.pend(changed)
        elif changed.state in LEASED:
            self._placement.order(changed)
        if job.exclusive and job.state == "pending":
            self._placement.wake_one()  # younger jobs had to wait behind it
        state.note("job %s: %s asked for, now %s", job.id, event.verb, changed.status)
        return changed

    def _blocked_again(self, job: Job, statuses: Mapping[str, str]) -> Job:
        """Return a retried job as it waits for those it comes after, where they run again too.

        ApiError 409 where one in `after_ok` has ended otherwise than completed: it goes first.
        """
        after, after_ok = after_of(job)
        for job_id in after_ok:
            status = "" if job_id in self._state.seq_of else statuses.get(job_id, "completed")
            if status not in ("", "completed"):
                raise ApiError(409, f"job {job.id} needs job {job_id} to be completed (after_ok), "
                               f"which is {status}: retry that one first")
        blockers, blockers_ok = self._blockers(after, {}), self._blockers(after_ok, {})
        if not blockers and not blockers_ok:
            return job
        blocked = advance(job, "block", self._state.now.wall, reason="after")
        return blocked._replace(after=blockers, after_ok=blockers_ok)

    def settle(self) -> None:
        """Unblock or cancel the jobs that waited for the ended ones, and for these in turn."""
        state = self._state
        while state.ended or state.unblocked:
            while state.ended:
                self._settle_dependents(state.ended.pop())
            while state.unblocked:
                self._unblock(state.unblocked.pop(0))

    def _settle_dependents(self, ended: Ended) -> None:
        state = self._state
        state.blockers.pop(ended.seq, None)
        for seq in state.dependents.pop(ended.seq, ()):
            job = state.jobs.get(seq)
            if job is None or seq not in state.blockers:
                continue
            if ended.seq in job.after_ok and ended.status != "completed":
                self._cancel_dependent(job, ended.id, ended.status)
                continue
            state.blockers[seq].discard(ended.seq)
            if not state.blockers[seq]:
                state.unblocked.append(seq)

    def _unblock(self, seq: int) -> None:
        state = self._state
        state.blockers.pop(seq, None)
        job = state.jobs.get(seq)
        if job is not None and job.state == "blocked":
            free = advance(job, "unblock", state.now.wall)
            state.save(job, free)
            self._placement.pend(free)

    def _cancel_dependent(self, job: Job, blocker: str, status: str) -> Job:
        error = f"job {blocker} is {status}, and this one needs it to be completed (after_ok)"
        canceled = advance(job, "cancel", self._state.now.wall, error=error, reason="after_ok")
        self._state.save(job, canceled)
        self._state.note("job %s canceled: %s", job.id, error)
        return canceled


class Outcome(NamedTuple):
    """What a step made: an answer or an error, and what the Master has to do."""

    answer: Any
    error: ApiError | None
    effects: Effects


class Fleet:
    """All that the master knows and all of its rules, as one function of events: apply().

    It has no lock, no clock, no I/O and no log. The same events at the same moments make the same
    state, so that it can be tested by thousands of events a second, and rebuilt from the journal's
    rows at any time: at the start, after a failed commit, or in a standby that takes over.
    """

    def __init__(
        self, settings: Settings, counts: dict[str, int], jitter: Callable[[], float]
    ) -> None:
        self.state = State(settings, counts, jitter)
        placement = Placement(self.state)
        health = Health(self.state, placement)
        leases = Leases(self.state, placement, health)
        registry = Registry(self.state, placement, health, leases)
        requests = Requests(self.state, placement, leases, registry)
        self._intake = Intake(self.state, placement)
        self._leases, self._registry, self._requests = leases, registry, requests
        self._placement = placement
        self._handlers: dict[type, Callable[[Any], Any]] = {
            Arrived: requests.arrived,
            Looked: requests.looked,
            Registered: lambda event: registry.register(event.checked, event.new_id),
            NodeOrder: self._order_node,
            Submitted: self._intake.submit,
            Ordered: self._intake.order,
            Progressed: self._progress,
            Finished: self._finish,
            Ticked: self._tick,
            Expired: self._expire,
        }

    def load(self, stored: Stored, now: Moment) -> None:
        """Fill an empty fleet from a journal; requests that were parked are answered empty."""
        self.state.now = now
        self.state.load(stored)
        for job in stored.live_jobs:
            if job.state == "pending":
                self._placement.line_up(job)

    def apply(self, event: object, now: Moment) -> Outcome:
        """Carry out one event at a moment; a refused one has an error, and has changed no job."""
        state = self.state
        state.now = now
        answer, error = None, None
        try:
            answer = self._handlers[type(event)](event)
        except ApiError as refusal:
            error = refusal
        self._intake.settle()
        effects, state.effects = state.effects, Effects([], [], [], [])
        return Outcome(answer, error, effects)

    def _order_node(self, event: NodeOrder) -> Json:
        node = find_node(self.state.nodes, event.node_id)
        if event.verb == "forget":
            return self._registry.forget(node)
        if event.verb == "drain":
            return self._registry.drain(node, event.deadline_s)
        return self._registry.undrain(node)

    def _progress(self, event: Progressed) -> Json | None:
        """Return the answer to an agent's progress; None where its attempt has no lease."""
        report = event.report
        node = self._registry.hear(report.node_id, digest(report.session))
        job = self._leases.leased(event.job_id, node, report.attempt)
        if job is None:
            return None
        self._leases.progress(job, report)
        # So many running attempts send at most 250 messages a second together.
        next_s = round(max(1.0, len(self.state.leases) / 250), 1)
        answer: Json = {"status": "ok", "next_s": next_s}
        action = self._requests.action(job)
        return {**answer, "actions": [action]} if action else answer

    def _finish(self, event: Finished) -> bool:
        """Return whether a report ended its attempt."""
        report = event.report
        if report.node_id not in self.state.nodes:
            return False
        node = self._registry.hear(report.node_id, digest(report.session))
        job = self._leases.leased(event.job_id, node, report.attempt)
        if job is None:
            return False
        self._leases.end(node, job, report, event.body)
        return True

    def _tick(self, event: Ticked) -> None:
        self._registry.tick(event.late_s)
        self._leases.time_out()
        self._placement.due()
        self._placement.wake_one()  # a node that a job should avoid may be the last one by now

    def _expire(self, event: Expired) -> None:
        state = self.state
        for seq, _ in event.jobs:
            for kind in ("drop_job", "drop_results", "drop_logs"):
                state.write(kind, seq)
        for _, key in (*event.jobs, *event.results):
            state.count(key, -1)
        for kind, rows in (("jobs", event.jobs), ("results", event.results)):
            for block in sorted({seq // BLOCK for seq, _ in rows}):
                state.write(f"prune_{kind}", block, block * BLOCK, (block + 1) * BLOCK)


# ---- 11 Transactions -----------------------------------------------------------------------------

# Transactions is the only place with a lock: every change goes through its apply(), every look at
# the state through reading() or glance(). Queries answers what changes nothing, Master what does.
#
# A parked request (a claim, a heartbeat or a look at a log, with `wait`) is a Turn, not a thread.
# The Fleet knows it by a serial number. Whatever concerns its node names the node in the Effects of
# a step; then the turn is woken, which is a line in a queue, and the request looks again.

CLOCK_JUMP_S = 3600.0  # between the two clocks since the start; by more, no age is trusted
LOCK_S = 0.005  # for the lock, in a thread that must not block; it is held for microseconds


class WouldBlock(Exception):
    """A turn needs the disk, or a lock that is held for long: a thread that may block goes on."""


class Turn:
    """One request at the Master, from its arrival to its answer.

    A step that is given a turn does not wait for its commit: whoever answers does so by
    Transactions.after_commit(). Where the answer is None the request is parked: `wake` is called,
    by any thread and perhaps under the lock, when it should look again; so it must not block.
    """

    __slots__ = ("__weakref__", "alive", "deadline", "may_block", "node_id", "serial", "ticket",
                 "wake")

    def __init__(self, wake: Callable[[Turn], None], alive: Callable[[], bool]) -> None:
        self.wake = wake
        self.alive = alive  # whether its client is still there
        self.may_block = True  # else the steps raise WouldBlock, before they changed anything
        self.deadline: float | None = None  # until when it waits, by the Master's clock
        self.serial: int | None = None
        self.node_id: str | None = None  # the node whose session it came from
        self.ticket: Ticket | None = None

    def has_time(self, now: float, wait_s: float) -> bool:
        """Return whether it may wait, `wait_s` from its first look on."""
        if self.deadline is None:
            self.deadline = now + wait_s
        return now < self.deadline

    def block(self) -> None:
        """Say that what follows may block; WouldBlock where it must not."""
        if not self.may_block:
            raise WouldBlock


class Sampled(NamedTuple):
    """Samples of one message: the node's name and id, the job's id, and what the agent sent."""

    node: str
    node_id: str
    job_id: str
    samples: list[Any]


class Snapshot(NamedTuple):
    """Figures of one moment: totals by (kind, status), nodes as (name, id, status, running)."""

    totals: dict[tuple[str, str], int]
    nodes: list[tuple[str, str, str, int]]
    parked: int
    counts: dict[str, int]
    commits: int
    commit_seconds: float
    journal_bytes: int
    started_at: float
    ready: bool
    disk_free_bytes: int | None  # None while the data folder is away
    disk_bytes: int | None
    last_result: int


class Transactions:
    """The one lock, the clock, and the order of all changes.

    A step holds the lock, applies one event to the Fleet, queues its writes and lets go; then it
    waits for the commit, and only after it are notes logged and the answer returned. Parked
    requests are woken under the lock, but what they see has its own commit to wait for. So no
    answer, order or wake-up leaves before its commit, and nothing blocks while the lock is held.

    When a commit fails, memory is ahead of the disk: it is `stale`, every waiting request gets 503,
    and the next step first rebuilds the Fleet from the journal. The same happens after an error
    inside a step.
    """

    def __init__(self, folder: Path, settings: Settings, log: logging.Logger,
                 clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self.settings = settings
        self.clock = clock
        self.wall = wall
        self.closing = False
        self.counts = dict.fromkeys(COUNTS, 0)
        self.archive_lock = threading.Lock()  # taken before the other, never inside it
        self._log = log
        self._lock = threading.Lock()
        self._stale = False
        self._last_trouble: str | None = None  # why commits fail, as it was last logged
        self._parked: dict[str, Turn] = {}
        self._watchers: dict[int, dict[Turn, None]] = {}
        self.journal = Journal(folder, self._rebuild, log.info)
        self._fleet = Fleet(settings, self.counts, random.random)
        try:
            self._load()
        except BaseException:
            self.journal.close()
            if self.journal.damage is None:
                raise
            # This time it is recovered first.
            self.journal = Journal(folder, self._rebuild, log.info)
            self._load()
        if self.journal.recovery is not None:
            log.error("%s", self.journal.recovery)
        self.journal.start()
        with self._lock:  # so that /ready knows whether it can be written, before anybody asks
            self.journal.write([("alive", (wall(),))])

    def now(self) -> Moment:
        """Return this moment by both clocks."""
        return Moment(self.clock(), self.wall())

    def apply(self, event: object, turn: Turn | None = None, parks: str | None = None) -> Any:
        """Carry out an event, and return its answer; ApiError where it is refused.

        Without a turn it returns after the commit. `parks` is the node whose request the turn is:
        it is kept where the answer says that it waits.
        """
        trouble = self.journal.trouble
        if trouble is not None and not writes_nothing(self._fleet.state, event):
            # It would fail, and cost a look at all that the journal holds. reap() tries on.
            raise not_committed(trouble)
        self._acquire(turn)
        try:
            outcome = self._fleet.apply(event, self.now())
            self._wake(outcome.effects)
            if turn is not None and parks is not None and outcome.error is None:
                turn.serial = outcome.answer.serial
                if turn.serial is not None:
                    self._parked[parks] = turn
            ticket = self.journal.write(outcome.effects.writes)
            # Here, so that the lines have the order of the steps.
            _log_after(self._log, outcome.effects.notes, ticket)
        except BaseException:
            self._stale = True
            raise
        finally:
            self._lock.release()

        if turn is not None:
            turn.ticket = ticket or turn.ticket
        elif ticket is not None:
            ticket.wait()
        if outcome.error is not None:
            raise outcome.error
        return outcome.answer

    def after_commit(self, turn: Turn, call: Callable[[str | None], None]) -> None:
        """Call once all that a turn changed or saw is on disk, with the error of a failed commit.

        The thread that commits makes the call.
        """
        ticket, turn.ticket = turn.ticket, None

        def settled(error: str | None) -> None:
            try:
                call(error)
            except Exception as failure:  # the thread that commits must live
                self._log.error("an answer was lost: %s: %s", type(failure).__name__, failure)

        if ticket is None:
            settled(None)
        else:
            ticket.then(settled)

    @contextlib.contextmanager
    def reading(self) -> Iterator[State]:
        """Give the state to a reader, then wait until all that it saw is on disk."""
        self._acquire()
        try:
            yield self._fleet.state
            ticket = self.journal.write(())
        finally:
            self._lock.release()
        if ticket is not None:
            ticket.wait()

    def node_name(self, node_id: str) -> str:
        """Return a node's name, or its id where it is unknown: one look-up needs no lock."""
        node = self._fleet.state.nodes.get(node_id)
        return node_id if node is None else node.name

    @contextlib.contextmanager
    def glance(self) -> Iterator[State]:
        """Give the state to a reader that needs no commit: of progress, names and figures."""
        with self._lock:
            yield self._fleet.state

    def _acquire(self, turn: Turn | None = None) -> None:
        """Take the lock; ApiError 503 while memory is not what the journal holds."""
        if turn is None or turn.may_block:
            self._lock.acquire()
        elif self._stale or not self._lock.acquire(timeout=LOCK_S):
            raise WouldBlock
        if not self._stale:
            return
        try:
            if turn is not None:
                turn.block()
            self._reload()
        except BaseException:
            self._lock.release()
            raise

    def _reload(self) -> None:
        """Bring memory up to date, under the lock; ApiError 503."""
        try:
            ticket = self.journal.write(())
            if ticket is not None:
                ticket.wait()  # a commit that fails settles all that is queued, and takes no lock
            self._load()
            self._stale = False
            gc.collect()  # the Fleet that was replaced is in cycles
        except ApiError:
            raise
        except Exception as error:
            raise ApiError(503, f"the journal cannot be read: {error}") from None

    def _load(self) -> None:
        """Make the Fleet of what the journal holds: at the start, and after a failed commit."""
        reader = self.journal.reader
        last_job, last_result, totals = reader.counters()
        live_jobs = reader.live_jobs()
        log_counts = reader.log_counts(job for job in live_jobs if job.state in LEASED)
        stored = Stored(
            reader.nodes(), reader.owners(), last_job, last_result, totals, live_jobs, log_counts
        )
        fleet = Fleet(self.settings, self.counts, random.random)
        fleet.load(stored, self.now())
        earlier = self._fleet.state
        # The numbers of requests that are still parked.
        fleet.state.last_serial = earlier.last_serial
        for node_id, node in fleet.state.nodes.items():
            if node_id in earlier.nodes:  # a heartbeat writes nothing to the journal
                node.last_heartbeat = earlier.nodes[node_id].last_heartbeat
        self._fleet = fleet
        self._wake_all()

    def _rebuild(self, error: str, is_ahead: bool) -> None:
        """Called by the journal after a commit that failed; `is_ahead` is of memory."""
        if is_ahead:
            # In one hold: whatever came between would be queued for the thread that is here.
            with self._lock, contextlib.suppress(ApiError):
                self.journal.drop(error)
                self._stale = True
                self._reload()  # where that fails, the next step tries again
        level = logging.DEBUG if error == self._last_trouble else logging.ERROR
        self._log.log(
            level, "the journal cannot be written: %s; nothing is accepted until it can", error
        )
        self._last_trouble = error

    def probe(self) -> None:
        """Try with a small write whether the journal can be written again; ApiError 503."""
        with self._lock:
            ticket = self.journal.write([("alive", (self.wall(),))])
        if ticket is not None:
            ticket.wait()

    def note_recovery(self) -> None:
        """Log once that the journal can be written again."""
        with self._lock:
            recovered = self._last_trouble is not None and self.journal.trouble is None
            if recovered:
                self._last_trouble = None
        if recovered:
            self._log.info("the journal can be written again")

    def _wake(self, effects: Effects) -> None:
        for node_id in effects.wakes:
            turn = self._parked.pop(node_id, None)
            if turn is not None:
                turn.wake(turn)
        if self._watchers:
            for seq in effects.changed:
                for turn in self._watchers.pop(seq, ()):
                    turn.wake(turn)

    def _wake_all(self) -> None:
        turns = [*self._parked.values(), *itertools.chain(*self._watchers.values())]
        self._parked.clear()
        self._watchers.clear()
        for turn in turns:
            turn.wake(turn)

    def watch(self, seq: int, turn: Turn) -> None:
        """Wake a turn, once, when a job has a new state or new log lines."""
        with self._lock:
            self._watchers.setdefault(seq, {})[turn] = None

    def unwatch(self, seq: int, turn: Turn) -> None:
        """Forget a turn that has its answer."""
        with self._lock:
            watchers = self._watchers.get(seq, {})
            watchers.pop(turn, None)
            if not watchers:
                self._watchers.pop(seq, None)

    def count(self, name: str, step: int = 1) -> None:
        """Add to one of COUNTS."""
        with self._lock:
            self.counts[name] += step

    def release(self) -> None:
        """Wake all that is parked: from now on nothing parks."""
        with self._lock:
            self.closing = True
            self._wake_all()

    def close(self) -> None:
        """Commit what is queued, unlock the folder."""
        self.release()
        with self._lock:
            nodes = self._fleet.state.nodes.values()
            self.journal.write([("node", (node.id, node.record())) for node in nodes])
        self.journal.close()


def _log_after(log: logging.Logger, notes: Sequence[Note], ticket: Ticket | None) -> None:
    """Log what a step noted, once it is on disk."""
    if ticket is None:
        _log_notes(log, notes)
    elif notes:
        ticket.then(lambda error: None if error else _log_notes(log, notes))


def _log_notes(log: logging.Logger, notes: Sequence[Note]) -> None:
    for level, message, values in notes:
        if log.isEnabledFor(level):
            # Without the caller's file and line, which Logger.log() would look up.
            log.handle(logging.LogRecord(log.name, level, "", 0, message, values, None))


COUNTS = (
    "submitted",
    "claims",
    "reports",
    "heartbeats",
    "lost_leases",
    "refused_reports",
    "push_lines",
    "push_failures",
    "push_dropped",
)


class JsonPage(NamedTuple):
    """A page of rows as JSON texts, with the total of all pages, and the cursor of the next."""

    rows: list[str]
    total: int
    cursor: str | None

    @classmethod
    def of(cls, rows: Sequence[tuple[object, str]], has_more: bool, total: int) -> JsonPage:
        """Return the page of (key, JSON text); the cursor is the last key."""
        cursor = str(rows[-1][0]) if has_more else None
        return cls([text for _, text in rows], total, cursor)


class Queries:
    """All that is read without a change: pages from the journal, progress from memory."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._started = transactions.now()

    @property
    def _reader(self) -> Reader:
        return self._transactions.journal.reader

    def find(self, given: str) -> Job:
        """Return a job by its id or a prefix of it; ApiError 404."""
        given = given.lower()
        if not re.fullmatch(r"[0-9a-f-]{4,36}", given):
            raise ApiError(404, f"unknown job {wire.printable(given[:64])}: expected a UUID, "
                           "or 4 or more of its first characters", "id")
        with self._transactions.reading() as state:
            job = state.live(given)
        if job is not None:
            return job
        ids = self._reader.find_ids(given)
        if len(ids) > 1:
            raise ApiError(404, f"job {given} is ambiguous: give more of its id", "id")
        if not ids:
            raise ApiError(404, f"unknown job {given}", "id")
        return self.archived(ids[0])

    def archived(self, job_id: str) -> Job:
        """Return a job from the journal by its whole id; ApiError 404."""
        job = self._reader.job(job_id)
        if job is None:
            raise ApiError(404, f"unknown job {job_id[:64]}", "id")
        return job

    def nodes(self, after: tuple[float, str] = (0.0, ""), limit: int | None = None) -> JsonPage:
        """Return a page of nodes in the order of their registration.

        `after` is (when it registered, id) of the last node of the page before: that node itself
        may have been removed.
        """
        views: list[NodeView] = []
        size = 0
        with self._transactions.reading() as state:
            total = len(state.nodes)
            keys = sorted((node.registered_at, node.id) for node in state.nodes.values())
            start = bisect.bisect_right(keys, after)
            for _, node_id in keys[start:]:
                if len(views) == limit or size >= PAGE_BYTES:
                    break
                view = state.nodes[node_id].view()
                views.append(view)
                size += len(view.facts)
        has_more = start + len(views) < total
        # Outside of the lock: 5,000 nodes are 0.1 s of JSON.
        rows = [(f"{view.registered_at}~{view.id}", json.dumps(view.to_json())) for view in views]
        return JsonPage.of(rows, has_more, total)

    def names(self) -> dict[str, str]:
        """Return the names of all nodes by their ids."""
        with self._transactions.glance() as state:
            return {node_id: node.name for node_id, node in state.nodes.items()}

    def node(self, given: str) -> Json:
        """Return one node with the ids of the jobs that it holds."""
        with self._transactions.reading() as state:
            node = find_node(state.nodes, given)
            view, jobs = node.view(), [state.jobs[seq].id for seq in sorted(node.leases)]
        return {**view.to_json(), "jobs": jobs}

    def job(self, given: str) -> Json:
        """Return one job with its attempts, the names of their nodes, transitions and result."""
        job = self.find(given)
        result = None if job.result_seq is None else self._reader.result(job.result_seq)
        if result is not None and result["job_id"] != job.id:
            # It was lost with a damaged journal, and another result has its number now.
            result = None
        detail = job_detail_json(job)
        names = self.names()
        with self._transactions.glance() as state:
            waits = waiting_for(state, state.jobs.get(job.seq, job))
        for record in detail["attempts"]:
            record["node"] = names.get(record["node_id"])
        return {**self.shown(job), **detail, "waiting_for": waits, "result": result}

    def shown(self, job: Job) -> Json:
        """Return a job as the API shows it."""
        return job_json(job, self._with_progress([job])[0][1])

    def _with_progress(self, jobs: Sequence[Job]) -> list[tuple[Job, Json | None]]:
        with self._transactions.glance() as state:
            progress = {job.seq: state.leases[job.seq].progress
                        for job in jobs if job.seq in state.leases}
        return [(job, progress.get(job.seq)) for job in jobs]

    def jobs(self, filters: Mapping[str, str], before: int | None, limit: int) -> JsonPage:
        """Return a page of jobs with their progress, newest first."""
        total = self._total("jobs", filters)
        if not total:
            return JsonPage([], 0, None)  # however many jobs would be searched in vain
        jobs, has_more = self._reader.job_page(filters, before, limit)
        rows: list[tuple[int, str]] = []
        size = 0
        for job, progress in self._with_progress(jobs):
            if size >= PAGE_BYTES:  # by what the journal has not: the progress
                return JsonPage.of(rows, True, total)
            text = job_text(job, progress)
            rows.append((job.seq, text))
            size += len(text)
        return JsonPage.of(rows, has_more, total)

    def results(self, filters: Mapping[str, str], before: int | None, limit: int) -> JsonPage:
        """Return a page of accepted reports, newest first."""
        total = self._total("results", filters)
        if not total:
            return JsonPage([], 0, None)
        rows, has_more = self._reader.result_page(filters, before, limit)
        return JsonPage.of(rows, has_more, total)

    def _total(self, kind: str, filters: Mapping[str, str]) -> int:
        with self._transactions.reading() as state:
            return state.totals.of(kind, filters)

    def logs(
        self, given: str, after: int, wait_s: float, turn: Turn | None = None
    ) -> Json | None:
        """Return log lines from number `after` on.

        With `wait_s` and a turn it is None while there are none: the turn is woken.
        """
        job = self.find(given)
        if turn is None:
            lines, upto = self._reader.logs(job.seq, after)
            return {"lines": lines, "next": upto, "status": job.status}

        transactions = self._transactions
        has_time = turn.has_time(transactions.clock(), wait_s)
        is_parked = False
        transactions.watch(job.seq, turn)
        try:
            job = self.find(given)  # all that happened before the watch began is on disk now
            lines, upto = self._reader.logs(job.seq, after)
            has_ended = job.state in FINAL or transactions.closing
            is_parked = has_time and not lines and not has_ended and turn.alive()
            return None if is_parked else {"lines": lines, "next": upto, "status": job.status}
        finally:
            if not is_parked:
                transactions.unwatch(job.seq, turn)

    def ended_after(self, seq: int, limit: int) -> list[tuple[int, Json, Json]]:
        """Return (number, result, its job's specification) above a number, oldest first."""
        found = []
        for number, result in self._reader.results_after(seq, limit):
            job = self._reader.job(result["job_id"])
            found.append((number, result, json.loads(job.spec) if job else {}))
        return found

    def expired(self, settings: Settings, most: int) -> list[tuple[int, TotalKey]]:
        """Return (number, key of its total) of a few finished jobs past their limits.

        An age is not trusted when the wall clock has jumped since the start.
        """
        now = self._transactions.now()
        jump = (now.wall - self._started.wall) - (now.clock - self._started.clock)
        oldest_end = -math.inf if abs(jump) > CLOCK_JUMP_S else now.wall - settings.keep_s
        with self._transactions.reading() as state:
            finished = sum(state.totals.of("jobs", {"status": status}) for status in FINAL)
        surplus = finished - settings.keep_jobs
        ended = self._reader.ended(most)
        return [(seq, key) for number, (seq, ended_at, key) in enumerate(ended)
                if number < surplus or ended_at < oldest_end]

    def snapshot(self) -> Snapshot:
        """Return the figures of the metrics, as of one moment."""
        journal = self._transactions.journal
        with self._transactions.glance() as state:
            totals = {(kind, status): state.totals.of(kind, {"status": status})
                      for kind in ("jobs", "results") for status in STATUSES}
            nodes = [
                (node.name, node.id, node.status, len(node.leases)) for node in state.nodes.values()
            ]
            parked = sum(node.parked is not None for node in state.nodes.values())
            counts = dict(state.counts)
            last_result = state.last_result
        free_bytes, whole_bytes = journal.disk_bytes() or (None, None)
        return Snapshot(
            totals,
            nodes,
            parked,
            counts,
            journal.commits,
            journal.commit_seconds,
            journal.size_bytes(),
            self._started.wall,
            journal.stall is None,
            free_bytes,
            whole_bytes,
            last_result,
        )


# ---- 12 Master -----------------------------------------------------------------------------------

class Master:
    """The service behind the API: each public method is one transaction.

    `clock` is monotonic and rules leases; `wall` gives the times that people read.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        log: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.wall = wall
        # There is one while somebody takes from it.
        self.samples: queue.Queue[Sampled] | None = None
        self._reaped = clock()
        self._transactions = Transactions(folder, settings, log, clock, wall)
        self.queries = Queries(self._transactions)
        self.count = self._transactions.count
        self.after_commit = self._transactions.after_commit
        self.release = self._transactions.release

    @property
    def journal(self) -> Journal:
        """The durable record."""
        return self._transactions.journal

    def register(self, body: Json, turn: Turn | None = None) -> tuple[bool, Json]:
        """Take a node in, or back; return whether it is new, and the answer to its agent."""
        event = Registered(registration_of(body), str(uuid.uuid4()))
        answer: tuple[bool, Json] = self._transactions.apply(event, turn=turn)
        return answer

    def forget(self, node_id: str) -> Json:
        """Remove a node; its jobs are pending again."""
        answer: Json = self._transactions.apply(NodeOrder("forget", node_id))
        return answer

    def drain(self, node_id: str, deadline_s: float | None) -> Json:
        """Let a node take nothing more; what still runs after `deadline_s` is given back."""
        answer: Json = self._transactions.apply(NodeOrder("drain", node_id, deadline_s))
        return answer

    def resume_node(self, node_id: str) -> Json:
        """Let a node work again that was drained or in quarantine."""
        answer: Json = self._transactions.apply(NodeOrder("undrain", node_id))
        return answer

    def heartbeat(self, ask: Ask, turn: Turn | None = None) -> Json | None:
        """Note a sign of life; with `wait_s` it is None until there are orders."""
        answer = self._ask(ask, turn, for_work=False)
        return None if answer is None else {"status": "ok", **answer}

    def claim(self, ask: Ask, turn: Turn | None = None) -> Json | None:
        """Hand out one Job under `job`; with `wait_s` it is None until there is one, or orders."""
        return self._ask(ask, turn, for_work=True)

    def _ask(self, ask: Ask, turn: Turn | None, for_work: bool) -> Json | None:
        """Answer a heartbeat or claim; None where it is parked.

        A parked request looks again when it is woken and when its time is up; each look is a
        transaction. Without a turn nothing parks.
        """
        trouble = self.journal.trouble if for_work else None
        closing = self._transactions.closing
        asked = Asked(ask.node_id, digest(ask.session), ask.seen, ask.claim, ask.leaving,
                      for_work and trouble is None and not closing)
        event: Arrived | Looked = Arrived(asked, may_wait=False)
        if turn is not None:
            # Asking again is the heartbeat: no request may wait until its node counts as silent.
            wait_s = min(ask.wait_s, self.settings.node_timeout_s / 2)
            has_time = turn.has_time(self.clock(), wait_s)
            event = _event_of(asked, turn, has_time and trouble is None and not closing)
        reply: Reply = self._transactions.apply(event, turn=turn, parks=ask.node_id)
        if turn is not None and ask.session is not None:
            turn.node_id = ask.node_id
        if trouble is not None:
            # It was heard. A job cannot be leased now, and one that was must be asked for again.
            raise not_committed(trouble)
        return reply.answer if reply.serial is None else None

    def submit(
        self, drafts: Sequence[Draft], turn: Turn | None = None
    ) -> tuple[bool, list[Job]]:
        """Accept jobs, all or none; return whether any is new, and the jobs.

        A job by an id of the client's own may be submitted again, and one may name the jobs that it
        comes after. Such ids are looked up in the journal where they are not live: the Fleet asks
        for them. The archive lock keeps the jobs that were found from expiring meanwhile.
        """
        given = [draft.id for draft in drafts if draft.id is not None]
        if len(set(given)) != len(given):
            raise ApiError(400, "id is the same for two jobs of one submission", "id")
        # The Fleet makes no ids: its steps can be repeated with the same outcome.
        named = [
            draft if draft.id is not None else draft._replace(id=str(uuid.uuid4()))
            for draft in drafts
        ]
        fresh = {draft.id or "" for draft in named} - set(given)
        event = Submitted(named, fresh, {}, {})
        if not given and not any(draft.after or draft.after_ok for draft in drafts):
            accepted: Accepted = self._transactions.apply(event, turn=turn)
            return accepted.any_new, list(accepted.jobs)

        if turn is not None:
            turn.block()
        with self._transactions.archive_lock:
            accepted = self._transactions.apply(event)
            while accepted.unresolved:
                event = self._resolved(event, accepted.unresolved)
                accepted = self._transactions.apply(event)
        return accepted.any_new, list(accepted.jobs)

    def _resolved(self, event: Submitted, ids: Sequence[str]) -> Submitted:
        """Return a submission with what the journal knows of some ids."""
        found = self.journal.reader.statuses(ids)
        own = {draft.id for draft in event.drafts}
        archived = dict(event.archived)
        statuses = dict(event.statuses)
        for job_id in ids:
            if job_id in own:
                archived[job_id] = self.queries.archived(job_id) if job_id in found else None
            else:
                statuses[job_id] = found.get(job_id)
        return event._replace(archived=archived, statuses=statuses)

    def order(self, given: str, verb: str) -> Json:
        """Cancel, pause, resume or retry a job; ApiError 409 where its state forbids it."""
        job: Job | None = None
        with self._transactions.archive_lock:
            while job is None:
                found = self.queries.find(given)
                statuses: Mapping[str, str] = {}
                if verb == "retry":
                    after, after_ok = after_of(found)
                    statuses = self.journal.reader.statuses([*after, *after_ok])
                job = self._transactions.apply(Ordered(found, verb, statuses))
        return self.queries.shown(job)

    def progress(self, job_id: str, body: Json, turn: Turn | None = None) -> Json:
        """Take progress and log lines; ApiError 409 tells an agent that it lost the lease."""
        report = report_of(body, progress=True)
        answer: Json | None = self._transactions.apply(Progressed(job_id, report), turn=turn)
        if answer is None:
            raise self._no_lease(job_id, report, turn)
        if turn is not None and report.session is not None:
            turn.node_id = report.node_id
        self._take_samples(report.node_id, job_id, body.get("samples"))
        return answer

    def report(self, body: Json, turn: Turn | None = None) -> Json:
        """Take the report that ends an attempt; a repeat is answered the same."""
        report = report_of(body)
        job_id = Fields(body).required_text("job_id", 64)
        # An agent repeats a report until it is answered, so most that are refused were accepted.
        if self._transactions.apply(Finished(job_id, report, body), turn=turn):
            self._take_samples(report.node_id, job_id, body.get("samples"))
            if turn is not None and report.session is not None:
                turn.node_id = report.node_id
            return {"status": "success"}

        if turn is not None:
            turn.block()
        with self._transactions.reading() as state:
            node_is_known = report.node_id in state.nodes
            job = state.live(job_id)
        if job is None:
            job = self.journal.reader.job(job_id.lower())
        if job is not None and has_ended_alike(job, report):
            return {"status": "success"}
        if job is not None and not node_is_known:
            raise ApiError(
                404, f"unknown node {wire.printable(report.node_id)}: register first", "node_id"
            )
        raise self._no_lease(job_id, report, turn)

    def _no_lease(self, job_id: str, report: AttemptReport, turn: Turn | None) -> ApiError:
        if turn is not None:
            turn.block()
        self.count("refused_reports")
        shown = wire.printable(job_id[:64])
        if not self.journal.reader.statuses([job_id.lower()]):
            return ApiError(404, f"unknown job {shown}", "job_id")
        if report.attempt is None:
            return ApiError(
                409, f"no attempt of job {shown} holds a lease on node {report.node_id}", "attempt"
            )
        return ApiError(
            409, f"attempt {report.attempt} of job {shown} no longer holds the lease", "attempt"
        )

    def _take_samples(self, node_id: str, job_id: str, samples: Any) -> None:
        """Hand an attempt's samples on; where nobody keeps up, the oldest go."""
        if self.samples is None or not isinstance(samples, list) or not samples:
            return
        if self.samples.full():
            with contextlib.suppress(queue.Empty):
                self.count("push_dropped", len(self.samples.get_nowait().samples))
        name = self._transactions.node_name(node_id)
        with contextlib.suppress(queue.Full):
            self.samples.put_nowait(Sampled(name, node_id, job_id.lower(), samples))

    def reap(self) -> None:
        """Do what is due: expire leases of silent nodes, line up jobs after their backoff."""
        now = self.clock()
        late_s = now - self._reaped - REAP_S
        self._reaped = now
        self.journal.look()
        if self.journal.trouble is not None:
            self._transactions.probe()
        self._transactions.apply(Ticked(late_s if late_s > REAP_S else 0.0))
        self._transactions.note_recovery()

    def expire(self, most: int = 200) -> bool:
        """Remove a few finished jobs past their limits; return whether there may be more."""
        with self._transactions.archive_lock:
            gone = self.queries.expired(self.settings, most)
            results = self.journal.reader.results_of([seq for seq, _ in gone])
            if gone:
                self._transactions.apply(Expired(gone, results))
        return len(gone) == most

    def ready(self) -> Json:
        """Return that the journal can be written; ApiError 503 names the cause when not."""
        if self.journal.damage is not None:
            raise ApiError(
                503, f"the journal is damaged: {self.journal.damage}; it is being recovered"
            )
        stall = self.journal.stall
        if stall is not None:
            raise ApiError(503, f"the journal cannot be written: {stall}")
        return {"status": "ready"}

    def close(self) -> None:
        """Commit what is queued, unlock the folder."""
        self._transactions.close()


def _event_of(asked: Asked, turn: Turn, has_time: bool) -> Arrived | Looked:
    """Return the event of a request that arrives, or looks again."""
    if turn.serial is None:
        return Arrived(asked, has_time)
    present = turn.alive()
    return Looked(asked, turn.serial, present, has_time and present)


# ---- 13 Metrics ----------------------------------------------------------------------------------

# METRICS is the one table of time series. A row whose values come from a Snapshot stands on
# /metrics, for any scraper. A row whose values come from a field of a result or of a sample has
# jobs' ids as labels: too many for a page, so it is only pushed, each value with its own time.
# Rows of nodes are both. README, dashboards and alerts name only rows of this table, and tests
# hold them to it.
#
# What a figure of a result means is not written here: wire.METRICS describes it once for the
# agent's measurements, the reports and this export.

FIGURES: Mapping[str, wire.Metric] = {
    name: row for name, row in wire.METRICS.items() if row.table}
TABLES: Mapping[str, tuple[wire.Metric, ...]] = {
    table: tuple(row for row in FIGURES.values() if row.table == table)
    for table in dict.fromkeys(row.table for row in FIGURES.values())}

OF_ENERGY = frozenset(name for name, row in wire.METRICS.items() if row.of_energy)
# Amounts in the tariff's currency. Only these may be below zero: at some hours a kWh is paid for.
PRICES = frozenset(name for name, row in wire.METRICS.items() if row.unit == wire.CURRENCY)

Labels = Mapping[str, Any]
Samples = Callable[[Snapshot], list[tuple[Labels, float]]]


class Metric(NamedTuple):
    """One metric, under its name in Prometheus, with its help.

    `samples` computes its values from a Snapshot; without it the metric is pushed only, and `field`
    is its name in a result's `metrics` or in a sample. `kept`: what /metrics shows is pushed too.
    """

    name: str
    about: str
    samples: Samples | None = None
    field: str = ""
    kept: bool = False

    @property
    def kind(self) -> str:
        """Its type in Prometheus."""
        return "counter" if self.name.endswith("_total") else "gauge"

    @property
    def place(self) -> str:
        """Where it is found: /metrics, pushed, or both."""
        if self.samples is None:
            return "pushed"
        return "both" if self.kept else "/metrics"


def _field_of(name: str) -> Samples:
    """Return the one sample of a metric that is a field of the snapshot; none while unknown."""
    def samples(shot: Snapshot) -> list[tuple[Mapping[str, Any], float]]:
        value = getattr(shot, name)
        return [] if value is None else [({}, float(value))]
    return samples


def _count_of(name: str) -> Samples:
    """Return the one sample of a metric that is one of the master's counters."""
    return lambda shot: [({}, float(shot.counts[name]))]


def _totals_of(kind: str, statuses: Sequence[str]) -> Samples:
    """Return a sample for each status of jobs or results."""
    return lambda shot: [({"status": word}, shot.totals.get((kind, word), 0)) for word in statuses]


def _of_nodes(value: Callable[[str, int], float]) -> Samples:
    """Return a sample for each node, from its status and the number of its running jobs."""
    return lambda shot: [
        ({"node": name, "node_id": node_id}, float(value(status, running)))
        for name, node_id, status, running in shot.nodes]


def _version(shot: Snapshot) -> list[tuple[Labels, float]]:
    return [({"version": VERSION}, 1.0)]


def _nodes_by_status(shot: Snapshot) -> list[tuple[Labels, float]]:
    counts = dict.fromkeys(NODE_STATUSES, 0)
    for _, _, status, _ in shot.nodes:
        counts[status] += 1
    return [({"status": word}, count) for word, count in counts.items()]


_NODE_CODES = ", ".join(f"{code} {word}" for code, word in enumerate(NODE_STATUSES))
_REPORTED = ("completed", "failed", "canceled")

_OF_MASTER = (
    # The master and what it knows.
    Metric("ffdist_build_info",
           "Always 1; the version is in the label.",
           _version),
    Metric("ffdist_start_time_seconds",
           "When this master was started, in seconds since 1970.",
           _field_of("started_at")),
    Metric("ffdist_ready",
           "1 when the journal can be written, else 0.",
           _field_of("ready")),
    Metric("ffdist_jobs",
           "Jobs known to this master, by status.",
           _totals_of("jobs", STATUSES)),
    Metric("ffdist_results",
           "Accepted reports in the journal, by status.",
           _totals_of("results", _REPORTED)),
    Metric("ffdist_nodes",
           "Registered nodes, by status.",
           _nodes_by_status),

    # One series a node: few enough for a page, even with 10,000 of them.
    Metric("ffdist_node_up",
           "1 when the node is not offline, else 0.",
           _of_nodes(lambda status, running: status != "offline"), kept=True),
    Metric("ffdist_node_running_jobs",
           "Jobs that a node holds.",
           _of_nodes(lambda status, running: running), kept=True),
    Metric("ffdist_node_status",
           f"A node's status: {_NODE_CODES}.",
           _of_nodes(lambda status, running: NODE_STATUSES.index(status)), kept=True),
    Metric("ffdist_node_quarantined",
           "1 while a node is in quarantine, else 0.",
           _of_nodes(lambda status, running: status == "quarantined"), kept=True),

    # Requests. The counters begin at 0 with each start, as rate() and increase() expect.
    Metric("ffdist_parked_requests",
           "Agents' requests that wait for work or orders.",
           _field_of("parked")),
    Metric("ffdist_submissions_total",
           "Jobs accepted since the start.",
           _count_of("submitted")),
    Metric("ffdist_claims_total",
           "Attempts handed out since the start.",
           _count_of("claims")),
    Metric("ffdist_reports_total",
           "Attempts ended by a report since the start.",
           _count_of("reports")),
    Metric("ffdist_refused_reports_total",
           "Reports of attempts that held no lease.",
           _count_of("refused_reports")),
    Metric("ffdist_lost_leases_total",
           "Attempts ended without a report.",
           _count_of("lost_leases")),
    Metric("ffdist_heartbeats_total",
           "Signs of life and questions for work.",
           _count_of("heartbeats")),

    # VictoriaMetrics, from the side of Push.
    Metric("ffdist_push_lines_total",
           "Values that VictoriaMetrics took.",
           _count_of("push_lines")),
    Metric("ffdist_push_failures_total",
           "Pushes that VictoriaMetrics did not take.",
           _count_of("push_failures")),
    Metric("ffdist_push_dropped_total",
           "Values dropped in a long outage, or refused.",
           _count_of("push_dropped")),

    # The journal and its disk.
    Metric("ffdist_journal_commits_total",
           "Commits of the journal.",
           _field_of("commits")),
    Metric("ffdist_journal_commit_seconds_total",
           "Time spent in commits of the journal.",
           _field_of("commit_seconds")),
    Metric("ffdist_journal_size_bytes",
           "Size of the journal's files.",
           _field_of("journal_bytes")),
    Metric("ffdist_disk_free_bytes",
           "Free space on the file system of the data folder.",
           _field_of("disk_free_bytes")),
    Metric("ffdist_disk_size_bytes",
           "Size of the file system of the data folder.",
           _field_of("disk_bytes")),
)
# Reported once for each attempt: its result's figures, with job, node and settings as labels.
_OF_RESULTS = (
    Metric("ffdist_job_info",
           "Always 1: one for each accepted report.",
           field="info"),
    *(Metric(f"ffdist_job_{row.series_name}", row.about, field=row.name)
      for row in wire.METRICS.values() if row.exported),
)
# Read once a second on the node, while a job runs.
_OF_SAMPLES = (
    Metric("ffdist_sample_cpu_usage_percent",
           "% of the node's CPU while a job runs.",
           field="cpu_usage"),
    Metric("ffdist_sample_memory_bytes",
           "Memory used on the node while a job runs.",
           field="memory_used_bytes"),
    Metric("ffdist_sample_power_watts",
           "Power of the node while a job runs.",
           field="power_watts"),
    Metric("ffdist_sample_temperature_celsius",
           "Temperature of the node while a job runs.",
           field="temperature_c"),
)
METRICS = (*_OF_MASTER, *_OF_RESULTS, *_OF_SAMPLES)
_BY_NAME = {metric.name: metric for metric in METRICS}

# An agent's clock is trusted when it is at most so far behind the master's, and never ahead of it.
RESULT_LATE_S = 24 * 3600.0
# Names and scenarios are no longer; some other labels are an agent's word.
LABEL_CHARS = 255


def metrics_view(shot: Snapshot) -> Text:
    """Return the Prometheus text format 0.0.4 of a snapshot."""
    lines = []
    for metric in METRICS:
        if metric.samples is None:
            continue
        lines.append(f"# HELP {metric.name} {metric.about}")
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        for labels, value in metric.samples(shot):
            lines.append(_line(metric.name, _labels_text(labels), value))
    return Text("\n".join(lines), "text/plain; version=0.0.4; charset=utf-8")


def node_lines(shot: Snapshot, at: float, known: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Return the lines of the nodes that differ from `known`, which has the last state by id."""
    changed = [node for node in shot.nodes if known.get(node[1]) != node]
    lines = []
    for metric in METRICS:
        if metric.samples is None or not metric.kept:
            continue
        for labels, value in metric.samples(shot._replace(nodes=changed)):
            lines.append(_line(metric.name, _labels_text(labels), value, at))
    return lines


def result_lines(result: Json, spec: Json) -> list[str]:
    """Return the lines of one result, at its `completed_at`; `spec` is the JSON of its job.

    That time is the agent's; where its clock cannot be right, the time of receipt stands in.
    """
    received = epoch_of(result.get("received_at")) or 0.0
    at = epoch_of(result.get("completed_at"))
    if at is None or not received - RESULT_LATE_S < at < received:
        at = received

    metrics, encode = _part(result, "metrics"), _part(result, "encode")
    labels = _labels_text({
        "job_id": result.get("job_id"),
        "node": result.get("node"),
        "node_id": result.get("node_id"),
        "scenario": result.get("scenario"),
        "status": result.get("status"),
        "codec": _part(spec, "settings").get("codec"),
        "encoder": encode.get("encoder"),
        "preset": encode.get("preset"),
        "power_source": metrics.get("power_source"),
        "experiment": _experiment_name(spec),
    })
    return _field_lines(_OF_RESULTS, {**metrics, "info": 1}, labels, at)


def sample_lines(message: Sampled) -> list[str]:
    """Return the lines of the samples of one message, each at its own time."""
    lines = []
    for sample in message.samples:
        if not isinstance(sample, dict):
            continue
        at = epoch_of(sample.get("time"))
        if at is None:
            continue
        labels = _labels_text({
            "node": message.node,
            "node_id": message.node_id,
            "job_id": message.job_id,
            "power_source": sample.get("power_source"),
        })
        lines += _field_lines(_OF_SAMPLES, sample, labels, at)
    return lines


def _experiment_name(spec: Json) -> str | None:
    """Return the name of a job's experiment: an object of ours, or any text that a client sent."""
    experiment = spec.get("experiment")
    if isinstance(experiment, dict):
        return experiment.get("name") or experiment.get("id")
    return experiment if isinstance(experiment, str) else None


def _field_lines(metrics: Iterable[Metric], values: Mapping[str, Any], labels: str,
                 at: float) -> list[str]:
    """Return a line for each field that is a finite number; an unknown figure has none."""
    lines = []
    for metric in metrics:
        value = values.get(metric.field)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue  # a bool is an int to Python
        if abs(value) < MAX_FIGURE:  # false for NaN, and for an int that no float can hold
            lines.append(_line(metric.name, labels, value, at))
    return lines


def _line(name: str, labels: str, value: float, at: float | None = None) -> str:
    """Return one line of the text format; `at` is in s since 1970, the line has ms."""
    # No digit of a float after the 15th is certain; a count of bytes has fewer.
    line = f"{name}{labels} {value:.15g}"
    if at is None:
        return line
    return f"{line} {round(at * 1000)}"


def _labels_text(labels: Labels) -> str:
    """Return labels in braces; empty ones are left out, as Prometheus treats them."""
    pairs = []
    for name, value in labels.items():
        if value is not None and value != "":
            text = wire.printable(str(value)[:LABEL_CHARS])
            text = text.replace("\\", "\\\\").replace('"', '\\"')
            pairs.append(f'{name}="{text}"')
    if not pairs:
        return ""
    return f"{{{','.join(pairs)}}}"


def _part(value: Mapping[str, Any], name: str) -> Json:
    """Return an object inside another; an empty one where there is none."""
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def epoch_of(text: Any) -> float | None:
    """Return the seconds since 1970 of an RFC 3339 time; None for anything else."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, OverflowError):
        # fromisoformat() knows no Z before Python 3.11.
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    return None


# ---- 14 Tariff -----------------------------------------------------------------------------------

# The master prices the energy of each result when it is reported. A price and a carbon intensity
# are rates per kWh: one figure, or one for each hour, and a node may have its own. The energy of a
# job is spread evenly over its run, so a run over the turn of an hour is priced by its share of
# both.

JOULES_PER_WH = 3600.0
MIN_PRICE = -1e6  # at some hours a kWh is paid for
# A longer run is priced by its first month: the walk over hours stays short whatever an agent
# reports.
LONGEST_RUN_S = 31 * 86400.0
PRICED = tuple(name for name, row in wire.METRICS.items() if row.by_master)
_HOUR_S = 3600


class Rate(NamedTuple):
    """A price or a carbon intensity per kWh: `always` one figure, or one for each hour of UTC.

    The keys of `by_hour` are hours of the day where it is `daily`, else hours since 1970.
    """

    always: float | None = None
    by_hour: Mapping[int, float] = {}
    daily: bool = False

    def mean(self, start_s: float, length_s: float) -> float:
        """Return the mean over a stretch of time in s since 1970.

        LookupError names an hour that is missing.
        """
        if self.always is not None:
            return self.always

        # A run of no length still has an hour: one second of it.
        end = start_s + max(length_s, 1.0)
        at, total = start_s, 0.0
        while at < end:
            hour = int(at // _HOUR_S)
            until = min(end, (hour + 1.0) * _HOUR_S)
            total += self._of_hour(hour) * (until - at)
            at = until
        return total / (end - start_s)

    def _of_hour(self, hour: int) -> float:
        key = hour % 24 if self.daily else hour
        if key not in self.by_hour:
            text = wire.utc_text(hour * _HOUR_S) or ""
            raise LookupError(f"{text[:13]}Z")
        return self.by_hour[key]


def hourly_rate_of(text: str, low: float) -> Rate:
    """Return the rate by hour of a CSV file; ValueError names the line.

    Its first line is a header: `time` (the beginning of an hour, RFC 3339) or `hour` (0 to 23, of
    UTC), then a word for the value. Further columns are ignored.
    """
    reader = csv.reader(text.splitlines())
    header = next(reader, [])
    # Spreadsheets put a byte order mark before the first word.
    kind = header[0].strip().lstrip("\ufeff").lower() if header else ""
    if kind not in _HOURS:
        raise ValueError("line 1: invalid header: expected time or hour first, "
                         "such as 'hour,price'")

    values: dict[int, float] = {}
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        try:
            hour, value = _hour_and_value(kind, cells, low)
            if hour in values:
                raise ValueError(f"duplicate hour {cells[0].strip()}")
        except ValueError as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None
        values[hour] = value
    if not values:
        raise ValueError("line 2: missing value: expected at least one line after the header")
    return Rate(None, values, daily=kind == "hour")


def _hour_and_value(kind: str, cells: Sequence[str], low: float) -> tuple[int, float]:
    """Return the hour and the value of one line of a rate file."""
    hour_of, expected = _HOURS[kind]
    try:
        hour, value = hour_of(cells[0].strip()), float(cells[1])
    except (ValueError, IndexError, OverflowError):
        line = ",".join(cells)[:60]
        raise ValueError(f"invalid line {line!r}: expected {expected}, "
                         "a comma and a number") from None
    if not low <= value < math.inf:
        raise ValueError(f"invalid value {value:g}: expected a number from {low:g} on")
    return hour, value


def _hour_of_day(text: str) -> int:
    # int() would also take "+7" and "1_0".
    if not text.isdigit() or int(text) > 23:
        raise ValueError
    return int(text)


def _hour_of_time(text: str) -> int:
    """Return the hour since 1970 of a time with a zone that is the beginning of an hour."""
    at = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text))
    if at.tzinfo is None or at.timestamp() % _HOUR_S:
        raise ValueError
    return int(at.timestamp() // _HOUR_S)


_HOURS: Mapping[str, tuple[Callable[[str], int], str]] = {
    "hour": (_hour_of_day, "an hour from 0 to 23"),
    "time": (_hour_of_time, "a whole hour such as 2025-12-29T19:00:00Z"),
}


def rates_of(text: str, read: Callable[[str], str], low: float = 0.0) -> Mapping[str, Rate]:
    """Return the rates by node ("" is every other) of `0.30,worker-01=0.22,worker-02=prices.csv`.

    `read` returns the text of a file; ValueError says in one sentence what is wrong.
    """
    rates: dict[str, Rate] = {}
    for part in text.split(","):
        node, _, value = part.rpartition("=")
        if node in rates or not value.strip():
            raise ValueError(f"invalid rates '{text}': expected numbers or files with commas "
                             "between, one for each node")
        rates[node] = _node_rate(value, read, low)
    return rates


def _node_rate(value: str, read: Callable[[str], str], low: float) -> Rate:
    """Return the rate of a number, or of the file of that name."""
    try:
        number = float(value)
    except ValueError:
        return _file_rate(value, read, low)
    if not low <= number < math.inf:
        raise ValueError(f"invalid rate '{value}': expected a number from {low:g} on")
    return Rate(number)


def _file_rate(name: str, read: Callable[[str], str], low: float) -> Rate:
    try:
        return hourly_rate_of(read(name), low)
    except OSError as error:
        raise ValueError(f"invalid rate '{name}': expected a number, or a file to read "
                         f"({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


class Energy(NamedTuple):
    """The energy of one run: J from `start_s` (s since 1970) on; `nodes` are its node's names."""

    joules: float
    start_s: float
    length_s: float
    nodes: Sequence[str]


class Amount(NamedTuple):
    """A figure, or the reason why it is unknown."""

    value: float | None
    reason: str = ""

    def per(self, minutes: float) -> Amount:
        """Return this amount for each minute of output."""
        if self.value is None:
            return self
        if minutes <= 0:
            return Amount(None, "the output's length is unknown")
        return Amount(self.value / minutes)


class Tariff(NamedTuple):
    """The rates of energy by node ("" is every other): in a currency and in g CO2e, per kWh."""

    prices: Mapping[str, Rate] = {}
    carbon: Mapping[str, Rate] = {}
    currency: str | None = None

    def priced(self, metrics: Json, nodes: Sequence[str], start_s: float) -> Json:
        """Return metrics with PRICED added; `nodes` are the names of the attempt's node.

        Metrics that do not mention energy stay as they are where nothing is priced.
        """
        if "energy_joules" not in metrics and not self.prices and not self.carbon:
            return metrics

        # An agent's own reasons stay; those of PRICED stand beside them.
        figures: Json = {}
        reasons = dict(_part(metrics, "unknown"))
        for name, amount in self._amounts(metrics, nodes, start_s).items():
            figures[name] = None if amount.value is None else float(f"{amount.value:.6g}")
            if amount.value is None:
                reasons[name] = amount.reason
        if self.currency and figures["energy_cost"] is not None:
            figures["currency"] = self.currency
        return {**metrics, **figures, "unknown": reasons}

    def _amounts(self, metrics: Json, nodes: Sequence[str], start_s: float) -> dict[str, Amount]:
        """Return the amount of each of PRICED, in their order."""
        joules = finite(metrics, "energy_joules")
        if joules is None:
            reason = _part(metrics, "unknown").get("energy_joules") or "the node reports no energy"
            return dict.fromkeys(PRICED, Amount(None, str(reason)[:200]))

        length_s = min(finite(metrics, "duration") or 0.0, LONGEST_RUN_S)
        energy = Energy(joules, start_s, length_s, nodes)
        cost = _amount_at(self.prices, energy, "--energy-price")
        carbon = _amount_at(self.carbon, energy, "--carbon-intensity")
        minutes = (finite(metrics, "output_seconds") or 0.0) / 60
        return {
            "energy_cost": cost,
            "carbon_g": carbon,
            "energy_wh_per_minute": Amount(joules / JOULES_PER_WH).per(minutes),
            "cost_per_minute": cost.per(minutes),
            "carbon_g_per_minute": carbon.per(minutes),
        }


def _amount_at(rates: Mapping[str, Rate], energy: Energy, flag: str) -> Amount:
    """Return the price of some energy at its node's rate; `flag` is where the rates came from."""
    # The node's own rate comes before the one of every other node.
    names = [name for name in (*energy.nodes, "") if name in rates]
    if not names:
        return Amount(None, f"the master has no {flag} for this node")
    try:
        mean = rates[names[0]].mean(energy.start_s, energy.length_s)
    except LookupError as missing:
        return Amount(None, f"the file of {flag} has no {missing.args[0]}")
    return Amount(energy.joules / JOULES_PER_WH / 1000 * mean)


# ---- 15 Pages ------------------------------------------------------------------------------------

# Pages run no script and fetch nothing: tables are HTML, plots are SVG, the style is in the page.
# All text of others passes html_text(). Plots and tables are shared with the reports.

Points = Sequence[tuple[float, float]]


class Overview(NamedTuple):
    """The content of the page of nodes and jobs.

    `names` are those of all nodes by their ids, `routes` rows of the API: four texts each.
    """

    nodes: list[Json]
    node_total: int
    names: Mapping[str, str]
    jobs: list[Json]
    job_total: int
    routes: Sequence[Sequence[str]]


class Curve(NamedTuple):
    """One series of a plot: joined points, or markers alone.

    `spans` are intervals in x, one for a point or None; `hollow` has the numbers of hollow markers.
    """

    label: str
    points: Points
    joined: bool = True
    marked: bool = True
    spans: Sequence[tuple[float, float] | None] = ()
    hollow: frozenset[int] = frozenset()


class Plot(NamedTuple):
    """A plot: title, labels of the axes, curves; with `names` the y axis counts these from the top.

    `zero` names the axis that begins at 0, "x" or "y".
    """

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    names: Sequence[str] = ()
    log: bool = False
    zero: str = ""
    note: str = ""


# Colours of Okabe and Ito (2008), which people with any colour vision tell apart; the last is that
# of the text. Dashes and markers differ too, so that a plot is readable in black and white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "currentColor")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")
# Paths around a point: circle, square, triangle, diamond, triangle, cross, hexagon, star.
_MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.5-3.5h7v7h-7z",
    "M0-5l5 9h-10z",
    "M0-5.5l4.5 5.5l-4.5 5.5l-4.5-5.5z",
    "M0 5l5-9h-10z",
    "M-5-1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z",
    "M-4-2l4-3l4 3l-2 6h-4z",
    "M-4-4l4 2l4-2l-2 4l2 4l-4-2l-4 2l2-4z",
)

# In units of the SVG, which scales with the page.
_WIDTH, _HEIGHT = 480, 300
_TOP, _RIGHT, _BELOW = 10, 14, 44
_NAME_CHARS = 36


class Axis(NamedTuple):
    """One axis of a plot: values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return round(self.start + part * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Return round numbers within its range."""
        return _ticks(self.low, self.high, self.log)


class Frame(NamedTuple):
    """The two axes of a plot."""

    x: Axis
    y: Axis


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Return round numbers within a range: about five, or 1, 2 and 5 of each power of ten."""
    # A range of less than about a power of ten has too few of 1, 2 and 5: even steps serve it.
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [digit * 10.0 ** power for power in powers for digit in (1, 2, 5)]
        found = [value for value in found if low <= value <= high]
        if len(found) > 7:
            return found[::-(-len(found) // 6)]
        if len(found) >= 3:
            return found

    # The least round step that makes at most five, with a hair of tolerance for floats.
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(digit for digit in (1, 2, 2.5, 5, 10) if digit * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _range(values: Sequence[float], zero: bool, log: bool) -> tuple[float, float]:
    """Return a range with some room around the values, or with 0 as its beginning."""
    low, high = min(values), max(values)
    if zero:
        low = 0.0
    if log:  # about the same room on a scale of powers
        return low / 1.12, high * 1.12
    # Equal values have no range: a tenth of the value, or 1 around zero.
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    if zero:
        return 0.0, high + room
    return low - room, high + room


def _frame_of(plot: Plot) -> Frame:
    """Return the axes that all curves of a plot fit on."""
    points = [point for curve in plot.curves for point in curve.points]
    spans = [span for curve in plot.curves for span in curve.spans if span]
    xs = [x for x, _ in points] + [edge for span in spans for edge in span]
    is_log = plot.log and min(xs) > 1e-9
    x_range = _range(xs, plot.zero == "x", is_log)

    # Room for numbers of six digits, or for the longest name at 6.8 units a character.
    left = 58.0
    y_range = _range([y for _, y in points], plot.zero == "y", False)
    bottom = _HEIGHT - _BELOW
    if plot.names:
        left = min(250, 14 + 6.8 * max(len(name) for name in plot.names))
        y_range = (len(plot.names) - 0.5, -0.5)
        bottom = 12 + 22 * len(plot.names)
    return Frame(Axis(*x_range, left, _WIDTH - _RIGHT, is_log), Axis(*y_range, bottom, _TOP))


def html_text(value: object) -> str:
    """Return text as HTML shows it, without characters that turn or hide their neighbours."""
    return html.escape(wire.printable(value))


def plot_svg(plot: Plot) -> str:
    """Return a plot as an SVG of its own size that scales with the page."""
    frame = _frame_of(plot)
    parts = [_axes_svg(plot, frame)]
    parts += [_curve_svg(curve, number, frame) for number, curve in enumerate(plot.curves)]
    return (f'<svg viewBox="0 0 {_WIDTH} {frame.y.start + _BELOW}" role="img" '
            f'aria-label="{html_text(plot.title)}">{"".join(parts)}</svg>')


def _axes_svg(plot: Plot, frame: Frame) -> str:
    """Return both axes with their labels, and the grid."""
    left, right, bottom = frame.x.start, frame.x.end, frame.y.start
    # The grid comes first: SVG draws later parts above earlier ones.
    parts = []
    for tick in frame.x.ticks():
        x = frame.x.at(tick)
        parts.append(f'<path class="grid" d="M{x} {_TOP}V{bottom}"/>'
                     f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{tick:.6g}</text>')
    for tick, label in _y_labels(plot, frame):
        y = frame.y.at(tick)
        parts.append(f'<path class="grid" d="M{left} {y}H{right}"/>'
                     f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">'
                     f'{html_text(label)}</text>')

    parts.append(f'<path class="axis" d="M{left} {_TOP}V{bottom}H{right}"/>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 36}" text-anchor="middle">'
                 f'{html_text(plot.x)}</text>')
    parts.append(f'<text transform="translate(13 {(_TOP + bottom) / 2}) rotate(-90)" '
                 f'text-anchor="middle">{html_text(plot.y)}</text>')
    return "".join(parts)


def _y_labels(plot: Plot, frame: Frame) -> list[tuple[float, str]]:
    """Return the labels of the y axis: names, long ones cut, or numbers."""
    if not plot.names:
        return [(tick, f"{tick:.6g}") for tick in frame.y.ticks()]
    labels = []
    for number, name in enumerate(plot.names):  # the range of the axis turns them: first is top
        if len(name) > _NAME_CHARS:
            name = f"{name[:_NAME_CHARS - 1]}…"
        labels.append((float(number), name))
    return labels


def _curve_svg(curve: Curve, number: int, frame: Frame) -> str:
    """Return one curve: its line, its spans, its markers with their values as tooltips."""
    spots = [(frame.x.at(x), frame.y.at(y)) for x, y in curve.points]
    parts = []
    if curve.joined and len(spots) > 1:
        path = "L".join(f"{x} {y}" for x, y in spots)
        dash = _DASHES[number % len(_DASHES)]
        parts.append(f'<path class="line" stroke-dasharray="{dash}" d="M{path}"/>')
    # A span is drawn as whiskers with an end on both sides.
    for (_, y), span in zip(spots, curve.spans):
        if span:
            low, high = (frame.x.at(edge) for edge in span)
            ends = f"M{low} {y - 4}v8M{high} {y - 4}v8"
            parts.append(f'<path class="line" d="M{low} {y}H{high}{ends}"/>')
    if curve.marked:
        parts += [_marker_svg(curve, number, spot, at) for spot, at in enumerate(spots)]
    return f'<g class="c{number % len(_COLOURS)}">{"".join(parts)}</g>'


def _marker_svg(curve: Curve, number: int, spot: int, at: tuple[float, float]) -> str:
    """Return the marker of a point: its shape is the curve's, its title shows the values."""
    hollow = ' class="hollow"' if spot in curve.hollow else ""
    values = ", ".join(f"{value:.6g}" for value in curve.points[spot])
    return (f'<path{hollow} d="{_MARKERS[number % len(_MARKERS)]}" '
            f'transform="translate({at[0]} {at[1]})">'
            f'<title>{html_text(f"{curve.label}: {values}")}</title></path>')


def _figure_html(plot: Plot) -> str:
    """Return a plot with its title, and a legend where there is more than one curve."""
    keys = [_key_html(curve, number) for number, curve in enumerate(plot.curves)]
    legend = ""
    if len(keys) > 1:
        legend = f'<ul class="keys">{"".join(keys)}</ul>'
    title = f"<figcaption>{html_text(plot.title)}</figcaption>"
    return f"<figure>{title}{plot_svg(plot)}{legend}{_note(plot.note)}</figure>"


def _key_html(curve: Curve, number: int) -> str:
    """Return one row of a legend: a piece of the line, the marker, the label."""
    stroke = 'stroke="none"'
    if curve.joined:
        stroke = f'stroke-dasharray="{_DASHES[number % len(_DASHES)]}"'
    marker = ""
    if curve.marked:
        marker = f'<path d="{_MARKERS[number % len(_MARKERS)]}" transform="translate(17 7)"/>'
    return (f'<li><svg class="key" viewBox="0 0 34 14"><g class="c{number % len(_COLOURS)}">'
            f'<path class="line" {stroke} d="M1 7H33"/>{marker}</g></svg>'
            f'{html_text(curve.label)}</li>')


def _note(text: str) -> str:
    """Return a remark below a plot or a table; nothing for an empty one."""
    if not text:
        return ""
    return f'<p class="note">{html_text(text)}</p>'


def table_html(heads: Iterable[str], rows: Iterable[Sequence[str]], texts: int = 99) -> str:
    """Return a table of cells that are HTML already; columns from `texts` on are figures."""
    head = _row_html(map(html_text, heads), "th", texts)
    body = "".join(_row_html(cells, "td", texts) for cells in rows)
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _row_html(cells: Iterable[str], tag: str, texts: int) -> str:
    parts = []
    for number, cell in enumerate(cells):
        # The class n aligns figures on the right, so that their digits stand in columns.
        kind = "" if number < texts else " class=n"
        parts.append(f"<{tag}{kind}>{cell}</{tag}>")
    return f"<tr>{''.join(parts)}</tr>"


# No fonts, scripts or pictures of elsewhere: the Content-Security-Policy of HTTP forbids them.
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;
  color:#1b1f24;background:#fff}
table{border-collapse:collapse;width:100%;margin:.5rem 0 2rem}
th,td{text-align:left;padding:.3rem .7rem .3rem 0;border-bottom:1px solid #d8dee4;
  vertical-align:top}
th{font-weight:600}
code{font:13px ui-monospace,monospace}
.none{color:#57606a}
@media(prefers-color-scheme:dark){
  body{color:#e6edf3;background:#0d1117}
  th,td{border-color:#30363d}
  a{color:#58a6ff}
  .none{color:#8d96a0}
}
"""
_NODE_HEADS = ("name", "status", "running", "type", "threads", "memory", "GPU", "last heartbeat")
_JOB_HEADS = ("job", "status", "scenario", "node", "done", "error", "created")
_ROUTE_HEADS = ("method", "path", "query", "answers")
_LINKS = ("/nodes", "/jobs", "/results", "/metrics", "/health", "/ready")


def page_view(seen: Overview) -> Text:
    """Return the plain page of nodes, jobs and the API; every text is escaped."""
    links = " ".join(f'<a href="{path}">{path}</a>' for path in _LINKS)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>ffdist</title>",
        f"<style>{_STYLE}</style><h1>ffdist</h1><p>{links}</p>",
        f"<h2>Nodes ({_count_of_all(len(seen.nodes), seen.node_total)})</h2>",
        _list_html(_NODE_HEADS, map(_node_cells, seen.nodes),
                   "No node has registered yet: python3 agent.py --register --master URL"),
        f"<h2>Jobs ({len(seen.jobs)} newest of {seen.job_total})</h2>",
        # Jobs know the ids of their nodes; people know the names. A removed node has none.
        _list_html(_JOB_HEADS, [_job_cells(job, seen.names) for job in seen.jobs],
                   "No job was submitted yet: python3 ffdist.py submit 720p30-h264"),
        "<h2>API</h2>",
        _list_html(_ROUTE_HEADS, [_cells_html(*row) for row in seen.routes], ""),
    ]
    return Text("".join(parts), "text/html; charset=utf-8")


def _count_of_all(count: int, total: int) -> str:
    return f"{total}" if count == total else f"the first {count} of {total}"


def _node_cells(node: Json) -> list[str]:
    running = f"{node['running']} of {node['max_concurrent_jobs']}"
    return _cells_html(
        node["name"], node["status"], running, node.get("type"), node.get("cpu_threads"),
        wire.size_text(node.get("ram_bytes")), node.get("gpu_type") or "none",
        node["last_heartbeat"])


def _job_cells(job: Json, names: Mapping[str, str]) -> list[str]:
    job_id, node_id = html_text(job["id"]), job["node_id"]
    link = f'<a href="/jobs/{job_id}"><code>{job_id[:8]}</code></a>'
    return [link, *_cells_html(
        job["status"], job["scenario"], names.get(node_id, node_id), percent_text(job),
        job["error"], job["created_at"])]


def _list_html(heads: Sequence[str], rows: Iterable[Sequence[str]], empty: str) -> str:
    """Return a table, or a sentence in its place where there are no rows."""
    listed = list(rows)
    if not listed:
        return f"<p class=none>{html_text(empty)}</p>"
    return table_html(heads, listed)


def _cells_html(*cells: Any) -> list[str]:
    """Return values as the cells of a row; an unknown one is empty."""
    return ["" if cell is None else html_text(cell) for cell in cells]


def percent_text(job: Mapping[str, Any]) -> str:
    """Return how much of a job is done; nothing where its agent has not said so."""
    if job.get("status") == "completed":
        return "100 %"
    percent = (job.get("progress") or {}).get("percent")
    return f"{percent:.0f} %" if isinstance(percent, (int, float)) else ""


# ---- 16 API --------------------------------------------------------------------------------------

# ROUTES is the API: each row is a method, a path, the names of its query, the limit of its body
# and what it is for. The same rows answer GET / (as JSON where that is asked for), and README
# lists them.
#
# A request takes four steps. route_of() finds its row, admit() refuses what the row does not take,
# HTTP reads and decodes the body, the row's handler answers. A role would be one more column of
# Route, checked in admit(): the only gate that every request passes, and it stands before any body
# is read.
#
# Handlers hold no rules: they make a typed message (Draft, Ask, …) of a request, and JSON of
# Master's answer. Each call of Master is one transaction, which returns when its commit is on
# disk, or leaves its ticket with the request's turn; so no answer is sent that a crash could make
# untrue. A request with `wait` may be parked: its handler returns None, and is called again with
# the same turn when there may be something to say.
#
# A `quick` row is answered from memory alone, by the thread that has all connections. What may read
# the disk, or takes more than a millisecond, is not quick.

Answer = Optional[tuple[int, Any]]


class Request(NamedTuple):
    """One request as handlers see it: `id` is the `{id}` of its path."""

    master: Master
    id: str
    query: dict[str, str]
    body: Any
    turn: Turn | None = None
    wants_json: bool = False

    @property
    def fields(self) -> Fields:
        """The names of the query and, above them, those of the body: agents may use either."""
        body = self.body if isinstance(self.body, dict) else {}
        return Fields({**self.query, **body}, texts=True)


class Route(NamedTuple):
    """One row of the API: `{id}` stands for the second part of the path.

    Lists and logs are `strict` about their query: a typo in a filter would list everything.
    Elsewhere an unknown name is ignored, so that a newer agent may say more than this master knows.
    """

    method: str
    path: str
    handler: Callable[[Request], Answer]
    about: str
    query: tuple[str, ...] = ()
    strict: bool = False
    limit_bytes: int = BODY_LIMIT_BYTES
    quick: bool = False

    def to_json(self) -> Json:
        """Return the row as GET / lists it."""
        return {
            "method": self.method,
            "path": self.path,
            "query": list(self.query),
            "about": self.about,
        }


def _health(request: Request) -> Answer:
    return 200, {"status": "healthy"}


def _ready(request: Request) -> Answer:
    return 200, request.master.ready()


def _metrics(request: Request) -> Answer:
    return 200, metrics_view(request.master.queries.snapshot())


def _home(request: Request) -> Answer:
    """Answer the table of routes, or the page for people, which ends with that table."""
    if request.wants_json:
        rows = [route.to_json() for route in ROUTES]
        return 200, {"version": VERSION, "routes": rows}

    jobs = request.master.queries.jobs({}, None, HOME_JOBS)
    nodes = request.master.queries.nodes(limit=HOME_NODES)
    routes = [
        (route.method, route.path, ", ".join(route.query), route.about)
        for route in ROUTES]
    return 200, page_view(Overview(
        nodes=[json.loads(text) for text in nodes.rows],
        node_total=nodes.total,
        names=request.master.queries.names(),
        jobs=[json.loads(text) for text in jobs.rows],
        job_total=jobs.total,
        routes=routes))


def _register(request: Request) -> Answer:
    is_new, node = request.master.register(request.body, request.turn)
    return _status(is_new), node


def _status(is_new: bool) -> int:
    """Return the status of an answer to a request that may be repeated."""
    return 201 if is_new else 200


def _nodes(request: Request) -> Answer:
    limit = request.fields.whole("limit", 1, 1 << 31)  # without it, as many as PAGE_BYTES hold
    page = request.master.queries.nodes(_node_cursor(request.fields), limit)
    return 200, _page_text("nodes", page)


def _node_cursor(fields: Fields) -> tuple[float, str]:
    """Return the place in the list of nodes that a cursor stands for; ApiError 400."""
    moment, _, node_id = (fields.text("after") or "0~").partition("~")
    try:
        return float(moment), node_id
    except ValueError:
        raise fields.error("after", "must be the `next` of a page of nodes") from None


def _node(request: Request) -> Answer:
    return 200, request.master.queries.node(request.id)


def _forget(request: Request) -> Answer:
    return 200, request.master.forget(request.id)


def _drain(request: Request) -> Answer:
    deadline_s = request.fields.number("deadline", 0, MAX_DRAIN_S)
    return 200, request.master.drain(request.id, deadline_s)


def _resume_node(request: Request) -> Answer:
    return 200, request.master.resume_node(request.id)


def _heartbeat(request: Request) -> Answer:
    if request.body is not None:
        Fields(request.body)  # refuses all but an object
    answer = request.master.heartbeat(_ask_of(request, request.id), request.turn)
    return None if answer is None else (200, answer)


def _next_job(request: Request) -> Answer:
    node_id = request.fields.required_text("node_id", 64)
    answer = request.master.claim(_ask_of(request, node_id), request.turn)
    if answer is None:
        return None
    job = answer.pop("job", None)
    text = "null"
    if job is not None:
        text = claim_text(job)
    return 200, _object_text({"job": text}, answer)


def _ask_of(request: Request, node_id: str) -> Ask:
    """Return what a node says with a heartbeat or a question for work."""
    fields = request.fields
    leaving = fields.values.get("leaving", False)
    if leaving not in (True, False, "true", "false"):
        raise fields.error("leaving", "must be true or false")
    return Ask(
        node_id,
        session=fields.text("session", 128),
        wait_s=fields.number("wait", 0, wire.WAIT_MAX_S) or 0.0,
        seen=fields.whole("seen", 0, 1 << 53) or 0,
        claim=fields.text("claim", 128),
        leaving=leaving in (True, "true"))


def _submit(request: Request) -> Answer:
    max_retries = request.master.settings.max_retries
    if not isinstance(request.body, list):
        draft = draft_of(request.body, max_retries)
        is_new, [job] = request.master.submit([draft], request.turn)
        return _status(is_new), Text(job_text(job), JSON_KIND)

    drafts = _drafts_of(request.body, max_retries)
    is_new, jobs = request.master.submit(drafts, request.turn)
    texts = _array_text(map(job_text, jobs))
    return _status(is_new), _object_text({"jobs": texts}, {"count": len(jobs)})


def _drafts_of(values: Sequence[Any], max_retries: int) -> list[Draft]:
    """Return the drafts of an array; the error of one names its place, and none is submitted."""
    if not 1 <= len(values) <= MAX_BULK:
        raise ApiError(400, f"invalid array of {len(values)} jobs: expected 1 to {MAX_BULK}")
    drafts = []
    for number, value in enumerate(values):
        try:
            drafts.append(draft_of(value, max_retries))
        except ApiError as error:
            message = f"job {number} of the array: {error.message}"
            raise ApiError(400, message, error.field) from None
    return drafts


def _jobs(request: Request) -> Answer:
    page = request.master.queries.jobs(*_page_of(request))
    return 200, _page_text("jobs", page)


def _results(request: Request) -> Answer:
    page = request.master.queries.results(*_page_of(request))
    return 200, _page_text("results", page)


def _page_of(request: Request) -> tuple[dict[str, str], int | None, int]:
    """Return the filters, the cursor and the length of a page that a request asks for."""
    fields = request.fields
    filters = {}
    for name in FILTERS:
        value = fields.text(name)
        if value is not None:
            filters[name] = value
    if filters.get("status") not in (None, *STATUSES):
        raise fields.error("status", f"must be one of {', '.join(STATUSES)}")
    limit = fields.whole("limit", 1, MAX_PAGE) or PAGE_USUAL
    return filters, fields.whole("after", 1, 1 << 60), limit


def _page_text(field: str, page: JsonPage) -> Text:
    """Return a page with its rows under a field; `next` is the cursor of the page behind it."""
    beside = {"count": len(page.rows), "total": page.total, "next": page.cursor}
    return _object_text({field: _array_text(page.rows)}, beside)


def _job(request: Request) -> Answer:
    return 200, request.master.queries.job(request.id)


def _order(verb: str) -> Callable[[Request], Answer]:
    return lambda request: (200, request.master.order(request.id, verb))


def _progress(request: Request) -> Answer:
    return 200, request.master.progress(request.id, request.body, request.turn)


def _report(request: Request) -> Answer:
    return 200, request.master.report(request.body, request.turn)


def _logs(request: Request) -> Answer:
    after = request.fields.whole("after", 0, 1 << 53) or 0
    wait_s = request.fields.number("wait", 0, wire.WAIT_MAX_S) or 0.0
    answer = request.master.queries.logs(request.id, after, wait_s, request.turn)
    return None if answer is None else (200, answer)


def _array_text(items: Iterable[str]) -> str:
    """Return a JSON array of items that are JSON already."""
    return f"[{', '.join(items)}]"


def _object_text(texts: Mapping[str, str], values: Json) -> Text:
    """Return a JSON object: of fields that are JSON already, and of values that are not."""
    fields = [f'"{name}": {text}' for name, text in texts.items()]
    fields += [f'"{name}": {json.dumps(value)}' for name, value in values.items()]
    return Text(f"{{{', '.join(fields)}}}", JSON_KIND)


FILTERS = ("status", "scenario", "node_id")
PAGE_USUAL = 100
# On the page for people.
HOME_JOBS = 50
HOME_NODES = 1000
MAX_DRAIN_S = 30 * 86400.0  # a month: more is likely a mistake of units
# The names of a list's query, and of a node's question for work or orders.
_LIST = (*FILTERS, "limit", "after")
_ASK = ("session", "wait", "seen", "claim", "leaving")

ROUTES = (
    Route("POST", "/nodes/register", _register,
          "register a node, or take it back",
          quick=True),
    Route("GET", "/nodes", _nodes,
          "nodes, oldest first; after=CURSOR is the `next` of the page before",
          query=("limit", "after"), strict=True),
    Route("GET", "/nodes/{id}", _node,
          "one node with its running jobs"),
    Route("DELETE", "/nodes/{id}", _forget,
          "remove a node; its jobs are pending again"),
    Route("POST", "/nodes/{id}/heartbeat", _heartbeat,
          "a sign of life; wait=S parks it until there are orders",
          query=_ASK, quick=True),
    Route("POST", "/nodes/{id}/drain", _drain,
          "let a node finish its running jobs, for deadline=S at most",
          query=("deadline",)),
    Route("POST", "/nodes/{id}/resume", _resume_node,
          "let a drained node, or one in quarantine, work again"),

    Route("POST", "/jobs", _submit,
          "submit a job, or an array of them, all or none",
          limit_bytes=BULK_LIMIT_BYTES, quick=True),
    Route("GET", "/jobs", _jobs,
          "jobs, newest first; after=CURSOR is the `next` of the page before",
          query=_LIST, strict=True),
    Route("GET", "/jobs/next", _next_job,
          "hand out one job to node_id; wait=S parks until there is one; claim=WORD repeats it",
          query=("node_id", *_ASK), quick=True),
    Route("GET", "/jobs/{id}", _job,
          "one job with attempts, transitions and result"),
    Route("POST", "/jobs/{id}/cancel", _order("cancel"),
          "cancel a job"),
    Route("POST", "/jobs/{id}/pause", _order("pause"),
          "hold a job where it is; its processes stand still until it is resumed"),
    Route("POST", "/jobs/{id}/resume", _order("resume"),
          "let a paused job go on"),
    Route("POST", "/jobs/{id}/retry", _order("retry"),
          "run a finished job again"),
    Route("POST", "/jobs/{id}/progress", _progress,
          "from the agent: progress, samples and log lines of an attempt",
          quick=True),
    Route("GET", "/jobs/{id}/logs", _logs,
          "log lines; after=N, wait=S",
          query=("after", "wait"), strict=True),

    Route("POST", "/results", _report,
          "the report that ends an attempt",
          limit_bytes=BULK_LIMIT_BYTES, quick=True),
    Route("GET", "/results", _results,
          "accepted reports, newest first; filters as in /jobs",
          query=_LIST, strict=True),
    Route("GET", "/health", _health,
          "the process answers",
          quick=True),
    Route("GET", "/ready", _ready,
          "the journal can be written",
          quick=True),
    Route("GET", "/metrics", _metrics,
          "Prometheus text"),
    Route("GET", "/", _home,
          "this table as JSON (Accept: application/json), else a page of nodes and jobs"),
)
# Rows by path and method: a request finds its row by one look-up, not by trying patterns.
_BY_PATH: dict[str, dict[str, Route]] = {}
for _route in ROUTES:
    _BY_PATH.setdefault(_route.path, {})[_route.method] = _route


def route_of(method: str, path: str) -> tuple[Route, str]:
    """Return the route of a request and its `{id}`; ApiError 404 or 405."""
    # A path that is a row's own comes first: "next" in /jobs/next is not an id.
    methods, part = _BY_PATH.get(path), ""
    pieces = path.split("/")
    if methods is None and len(pieces) in (3, 4) and pieces[2]:
        part = urllib.parse.unquote(pieces[2])
        methods = _BY_PATH.get("/".join((*pieces[:2], "{id}", *pieces[3:])))
    if methods is None:
        raise ApiError(404, f"no such path: {printable_path(path)} (GET / lists the API)")

    # HEAD is GET without its body, except where a GET changes something: it would claim a job.
    is_get = method == "HEAD" and path != "/jobs/next"
    route = methods.get("GET" if is_get else method)
    if route is None:
        possible = " or ".join(methods)
        raise ApiError(405, f"invalid method {method} for {printable_path(path)}: use {possible}")
    return route, part


def admit(route: Route, query: Mapping[str, str], length: int) -> None:
    """Refuse a request that its route does not take; `length` is that of its body, still unread."""
    if length > route.limit_bytes:
        raise ApiError(413, f"the body is larger than {wire.size_text(route.limit_bytes)}")
    unknown = [name for name in query if name not in route.query]
    if route.strict and unknown:
        shown = wire.printable(unknown[0][:64])
        known = ", ".join(route.query)
        raise ApiError(400, f"unknown parameter {shown}: expected {known}", shown)


def prefers_json(accept: str) -> bool:
    """Return whether an Accept header names JSON, and not HTML as browsers do."""
    kinds = [kind.partition(";")[0].strip().lower() for kind in accept.split(",")]
    return JSON_KIND in kinds and "text/html" not in kinds


def printable_path(path: str) -> str:
    """Return a path that is safe and short enough for a sentence."""
    return wire.printable(path[:100])


# ---- 17 HTTP -------------------------------------------------------------------------------------

# The messages of HTTP/1.1, without a socket: bytes become a Head and JSON, answers become bytes.
# The standard parser is not used: it takes as long as a commit, and answers garbage as HTTP/0.9.
#
# A web page of somebody else can send requests to any address that its reader reaches: by forms,
# images and scripts, and by a name of its own that it points to an inner address (DNS rebinding).
# So refuse_foreign_page() checks what a browser cannot be made to lie about: the type of a body,
# Origin and Sec-Fetch-Site, and the name in Host. Programs send none of these and pass.

CHUNK_BYTES = 1 << 16
HEAD_LIMIT_BYTES = 32 << 10
MAX_HEADERS = 100
RETRY_AFTER_S = 2  # what every answer 503 asks for

_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) (\S{1,8000}) HTTP/(\d)\.(\d)")
_MAX_REQUEST_LINE = 9000
_HEADER_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADERS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r?(?:\n|\Z))+")
_HEAD_END = re.compile(rb"\r?\n\r?\n")
# Each of these may come once; two that differ would be read one way here and another way elsewhere.
_SINGLE_HEADERS = frozenset((
    b"content-length", b"transfer-encoding", b"host", b"connection", b"expect", b"content-type",
    b"origin", b"sec-fetch-site", b"sec-fetch-mode"))
# Each browser sends one of these, whatever a page wants: script cannot touch Origin and Sec-
# Fetch-*, and of Accept-Language only the value. Over plain HTTP many requests bear no other sign.
_BROWSER_HEADERS = frozenset((
    b"origin", b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest", b"accept-language"))
_TLS_HELLO = b"\x16"  # the type of the record that a TLS client sends first
_NO_HTTP = "invalid request: expected HTTP/1.1"


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _bounded(text: str) -> int:
    # int() takes time that grows with the square of the digits.
    if len(text) > 300:
        raise ValueError(f"{text[:20]}… is too large a number")
    return int(text)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a value of JSON")


_DECODER = json.JSONDecoder(
    parse_float=_finite, parse_int=_bounded, parse_constant=_no_constant)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_AS_SQUARE = bytes.maketrans(b"{}", b"[]")


def decode_json(raw: bytes) -> Any:
    """Return the JSON of a body, None for an empty one; ApiError 400 says what is wrong with it."""
    if not raw.strip():
        return None
    _refuse_brackets(raw)
    try:
        text = raw.decode().lstrip("\ufeff")
        value = _DECODER.decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate cannot be stored
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except UnicodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:100]}") from None
    return value


def _refuse_brackets(raw: bytes) -> None:
    """Raise ApiError 400 for too many brackets, or too deep ones, before anything is made of them.

    10 MiB of them take the decoder and the garbage collector 3 s.
    """
    count = raw.count(b"[") + raw.count(b"{")
    if count > MAX_BRACKETS:
        raise ApiError(400, f"the body has {count:,} brackets: expected {MAX_BRACKETS:,} at most")
    if count <= MAX_NESTING:
        return
    rest = _brackets_of(raw)
    for _ in range(MAX_NESTING):  # each round takes the innermost level away
        rest = rest.replace(b"[]", b"")
    if b"[[" in rest or b"[]" in rest:
        raise ApiError(400, f"the body is nested deeper than {MAX_NESTING} levels")


def _brackets_of(raw: bytes) -> bytes:
    """Return the brackets outside of strings, braces as square ones.

    In pieces: a pattern over a whole body takes a hundred times its memory, and lets no other
    thread run meanwhile.
    """
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # now each quote begins or ends a string
    found = []
    is_inside = False
    for start in range(0, len(plain), CHUNK_BYTES):
        pieces = plain[start:start + CHUNK_BYTES].split(b'"')
        outside = b"".join(pieces[is_inside::2])
        found.append(outside.translate(_AS_SQUARE, _NO_BRACKETS))
        is_inside ^= len(pieces) % 2 == 0
    return b"".join(found)


class Head(NamedTuple):
    """The parsed head of a request; `is_browser` where it bears a sign of one."""

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[bytes, bytes]
    length: int
    keep: bool
    is_browser: bool

    def header(self, name: bytes) -> str:
        """Return a header that is kept, in lower case; "" where there is none."""
        return self.headers.get(name, b"").decode("latin-1").lower()


def parse_head(block: bytes) -> Head:
    """Return the head of a request from its bytes; ApiError 4xx or 505 says what is wrong."""
    first, _, rest = block.partition(b"\n")
    line = _REQUEST_LINE.fullmatch(first.rstrip(b"\r"))
    if line is None:
        raise ApiError(400, _NO_HTTP)
    method, target, major, minor = line.groups()
    if major != b"1":
        raise ApiError(505, "unsupported version of HTTP: expected 1.1 or 1.0")

    headers, is_browser = _known_headers(rest) if len(rest) <= 500 else _headers_of(rest)
    keep = minor != b"0" and headers.get(b"connection", b"").lower() != b"close"
    path, query = _target_of(target)
    length = _length_of(headers)
    return Head(method.decode(), path, query, headers, length, keep, is_browser)


def _headers_of(block: bytes) -> tuple[Mapping[bytes, bytes], bool]:
    """Return the headers that matter, and whether one of all is a browser's."""
    if block and not _HEADERS.fullmatch(block):
        raise ApiError(400, "invalid header: expected a name, a colon and a value on each line")
    if block.count(b"\n") >= MAX_HEADERS:
        raise ApiError(431, f"too many headers: expected {MAX_HEADERS} at most")

    headers: dict[bytes, bytes] = {}
    is_browser = False
    for row in block.split(b"\n"):
        name, _, value = row.partition(b":")
        name = name.lower()
        if name in _BROWSER_HEADERS or (name == b"user-agent" and b"Mozilla/" in value):
            is_browser = True
        if name == b"accept":
            headers[name] = b",".join((headers.get(name, b""), value))
        elif name in _SINGLE_HEADERS:
            if name in headers:
                raise ApiError(400, f"duplicate header {name.decode()}: expected one")
            headers[name] = value.strip()
    return headers, is_browser


# A client sends the same lines with each request, but for the length of its body.
_known_headers = functools.lru_cache(maxsize=1024)(_headers_of)


def _length_of(headers: Mapping[bytes, bytes]) -> int:
    """Return the length of a body; without one it is empty.

    Two lengths, or a length and a transfer coding at once, are refused (RFC 9112, 6.3): a proxy
    that believes the other one would see another request inside the body.
    """
    length = headers.get(b"content-length")
    if b"transfer-encoding" in headers:
        if length is not None:
            raise ApiError(400, "content-length and transfer-encoding exclude one another")
        raise ApiError(411, "missing content-length: transfer codings are not accepted")
    if length is None:
        return 0
    if not length.isdigit() or len(length) > 15:
        raise ApiError(400, "invalid content-length: expected a number of bytes")
    return int(length)


# Most queries: without anything to decode, or to split twice.
_PLAIN_QUERY = re.compile(r"[a-z_]+=[A-Za-z0-9._-]*(?:&[a-z_]+=[A-Za-z0-9._-]*){0,15}")


def _target_of(raw: bytes) -> tuple[str, dict[str, str]]:
    """Return path and query of a request's target, which may be a whole URL (RFC 9112, 3.2)."""
    text = raw.decode("latin-1")
    if not text.startswith("/"):
        text = re.sub(r"^https?://[^/?]*", "", text) or "/"
    path, _, query = text.partition("?")
    if not path.startswith("/"):
        raise ApiError(400, "invalid target: expected a path that begins with /")

    if not query:
        return path, {}
    if _PLAIN_QUERY.fullmatch(query):
        return path, dict(pair.split("=", 1) for pair in query.split("&"))
    try:
        pairs = urllib.parse.parse_qsl(
            query, keep_blank_values=True, max_num_fields=50, errors="strict")
    except ValueError:
        raise ApiError(400, "invalid query: expected at most 50 fields, in UTF-8") from None
    return path, dict(pairs)


def refuse_foreign_page(head: Head, machine: str, allowed: Container[str]) -> None:
    """Raise ApiError where a web page of somebody else may have sent a request.

    `machine` is this machine's name, `allowed` the names beside it that browsers may use.
    """
    kind = head.header(b"content-type").partition(";")[0].strip()
    if head.length and kind != JSON_KIND and (kind or head.is_browser):
        # A form can send text/plain, but no page can send JSON without asking first (CORS).
        raise ApiError(415, "a body must be declared as Content-Type: application/json")
    if head.is_browser:
        _refuse_other_site(head)
        _refuse_claim(head)
        name = _host_name(head.header(b"host"))
        _refuse_other_name(name, {machine, f"{machine}.local"}, allowed)


def _refuse_other_site(head: Head) -> None:
    """Raise ApiError 403 for a page of another site; a link to the page here may stand there."""
    origin = head.header(b"origin")
    if b"origin" in head.headers and not _is_same_place(origin, head.header(b"host")):
        raise ApiError(403, "a page of another origin may not speak to this master")
    is_link = head.path == "/" and head.method in ("GET", "HEAD")
    if not is_link and head.headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site"):
        raise ApiError(403, "a page of another site may not speak to this master")


def _refuse_claim(head: Head) -> None:
    """Raise ApiError 403 where a browser claims a job.

    An image over plain HTTP bears no sign of its page. A request with Sec-Fetch-Mode and without
    Sec-Fetch-Site comes from Node.js, which no page can imitate.
    """
    is_program = b"sec-fetch-mode" in head.headers and b"sec-fetch-site" not in head.headers
    if head.path == "/jobs/next" and not is_program:
        raise ApiError(403, "a browser may not claim jobs: whoever asks gets one to run")


def _refuse_other_name(name: str, own: Container[str], allowed: Container[str]) -> None:
    """Raise ApiError 403 for a name that anybody on the internet could point to this machine."""
    if "." in name and not _is_address(name) and name not in own and name not in allowed:
        shown = wire.printable(name[:100])
        raise ApiError(403, f"a browser may not reach this master as {shown}: allow the name with "
                       "--allow-host")


def _is_same_place(origin: str, host: str) -> bool:
    """Return whether an Origin is of the host and port that the Host header names."""
    scheme, found, place = origin.partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme, "")
    if not (found and port and host):
        return False
    return place.removesuffix(port) == host.removesuffix(port)


def _host_name(host: str) -> str:
    """Return the name in a Host header, without its port and a last dot."""
    end = "]" if host.startswith("[") else ":"
    return host.partition(end)[0].lstrip("[").rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def take_head(buffer: bytearray, start: int = 0) -> bytes | None:
    """Take a head that is whole from a buffer, without its empty line; None where it is not.

    What stands before `start` was searched already. ApiError refuses bytes that can never become a
    request, without waiting for their end.
    """
    while buffer.startswith(b"\r\n"):  # clients of old send one after a body (RFC 9112, 2.2)
        del buffer[:2]
    end = _HEAD_END.search(buffer, max(0, start - 3))
    if end is None or end.start() > HEAD_LIMIT_BYTES or buffer.startswith(_TLS_HELLO):
        _refuse_early(buffer)
        return None
    block = bytes(buffer[:end.start()])
    del buffer[:end.end()]
    return block


def _refuse_early(buffer: bytearray) -> None:
    if not buffer or buffer == b"\r":
        return
    if len(buffer) > HEAD_LIMIT_BYTES:
        limit = wire.size_text(HEAD_LIMIT_BYTES)
        raise ApiError(431, f"the request's head is larger than {limit}")
    if buffer.startswith(_TLS_HELLO):  # its random bytes may hold an empty line
        raise ApiError(400, f"{_NO_HTTP}; this port does not speak TLS")
    line, is_whole, _ = bytes(buffer[:_MAX_REQUEST_LINE]).partition(b"\n")
    if is_whole and not _REQUEST_LINE.fullmatch(line.rstrip(b"\r")):
        raise ApiError(400, _NO_HTTP)
    if not _HEADER_NAME.fullmatch(line[:1]):
        raise ApiError(400, _NO_HTTP)


_STATUS_LINES = {int(status): f"{int(status)} {status.phrase}" for status in http.HTTPStatus}
_ENCODE = json.JSONEncoder(allow_nan=False).encode
_SAFETY = (
    "X-Content-Type-Options: nosniff\r\n"
    "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'\r\n"
    "Cache-Control: no-store\r\n")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def encode_answer(status: int, data: Any, keep: bool = False, with_body: bool = True) -> bytes:
    """Return the bytes of an answer: `data` is a Text, or what becomes JSON."""
    answer = data if isinstance(data, Text) else Text(_ENCODE(data), JSON_KIND)
    body = answer.text.encode("utf-8", "replace") + b"\n"
    closing = "" if keep else "Connection: close\r\n"
    retry = f"Retry-After: {RETRY_AFTER_S}\r\n" if status == 503 else ""
    head = (f"HTTP/1.1 {_STATUS_LINES[status]}\r\n"
            f"Content-Type: {answer.kind}\r\n"
            f"Content-Length: {len(body)}\r\n"
            f"{_SAFETY}{retry}{closing}\r\n").encode()
    return head + body if with_body else head


def encode_error(error: ApiError, keep: bool = False, with_body: bool = True) -> bytes:
    """Return the bytes of a refusal."""
    return encode_answer(error.status, error.to_json(), keep, with_body)


# ---- 18 Connections ------------------------------------------------------------------------------

# One thread, the edge, has all connections in one selector: those that are idle, slow or parked
# cost no thread. It reads, and when a request is whole, head and body, it answers the quick ones
# itself, from memory; the others go to a small pool. An answer that waits for a commit is sent by
# the thread that commits, whole in most cases; what a slow reader leaves goes back to the edge.
#
# A connection has one owner at a time, by its state. The edge owns it but for WORKING and FILING:
# then it belongs to a thread of the pool, or to the commit that it waits for. The state changes
# under the connection's lock. Pipelined requests wait in its buffer, so answers keep their order.
#
#     READING ──► WORKING ──► READING            the whole answer went out, and it is kept
#      │ ▲         │ ▲  └───► SENDING ──► READING or LINGERING
#      ▼ │         ▼ │
#     FILING      PARKED                         woken, due, or its client has hung up
#
# A TLS handshake would be one more state before READING, driven by the same events.
#
# Every wait has an end, and whatever is gathered has a bound: see the constants. A crowd that goes
# over a bound gets 503 with Retry-After, and the connections of nodes' sessions stay.

IDLE_S = 300.0  # between two requests: ten times the usual heartbeat interval of an agent
HEAD_S = 10.0  # from the first byte of a head to its last
BODY_S = 60.0  # for a body, and more for a large one: a peer that drips is given up
MIN_BODY_RATE = 64 << 10  # bytes/s of the large part
SEND_S = 60.0  # for the rest of an answer that did not go out at once
LINGER_S = 2.0  # how long what a refused peer still sends is read, so that it sees the answer
SWEEP_S = 1.0  # between two looks at the times above
MAX_SWEPT = 200  # connections that are ended at once: others wait meanwhile

QUICK_BYTES = 8 << 10  # of the body of a request that the edge answers itself
SMALL_BYTES = 64 << 10  # a larger body gathers in a file without a name
MAX_PIPELINED_BYTES = 64 << 10  # that wait behind a request
UNCOUNTED_BYTES = 1 << 10  # of one connection: they are fewer than its own record has
MAX_HELD_BYTES = 64 << 20  # of all requests that are not whole, in memory
MAX_FILED_BYTES = 512 << 20  # of all bodies that gather in files
MAX_UNSENT_BYTES = 256 << 20  # of all answers that slow readers leave

FEW_CONNECTIONS = 8  # of an address that gets one of the last places
MAX_OF_NODE = 32  # connections of one node that do not count for its address

POOL_THREADS = 4
MAX_WAITING = 1000  # requests, for a thread of the pool
# The kernel cuts the backlog to net.core.somaxconn, which is 4096 since Linux 5.4.
BACKLOG = 4096
FILES_WANTED = 65_536
FILES_KEPT = 256  # for all but connections: the journal, programs, bodies, refusals
MIN_CONNECTIONS = 64  # also where hardly any files may be open
MAX_REFUSED = 100  # connections that are being told so at one moment
WARNING_S = 60.0  # between two lines of the log that say so
ACCEPT_PAUSE_S = 0.2  # when files run out: the connections that are there may end

READING, FILING, WORKING, PARKED, SENDING, LINGERING, CLOSED = range(7)
OF_POOL = frozenset((FILING, WORKING))  # a disk may hold it up, and no deadline ends it


class Bounds:
    """What all connections use together, against its limits; the edge's thread alone counts."""

    def __init__(self, max_connections: int, log: logging.Logger) -> None:
        self._log = log
        self._next_warning = 0.0
        self.max_connections = max_connections
        self.held_bytes = 0
        self.filed_bytes = 0
        self.unsent_bytes = 0
        self._count = 0
        self._of_address: Counter[str] = Counter()
        self._of_node: Counter[str] = Counter()
        self._not_of_nodes: Counter[str] = Counter()  # by address

    def enter(self, address: str) -> bool:
        """Count a connection in; return whether there is room for it.

        The last places are kept for addresses that have next to none.
        """
        left = self.max_connections - self._count
        is_crowd = self._of_address[address] >= FEW_CONNECTIONS
        is_half = self._not_of_nodes[address] >= self.max_connections // 2
        if left <= 0 or is_half or (is_crowd and left <= self.max_connections // 16):
            self._warn(address)
            return False
        self._count += 1
        self._of_address[address] += 1
        self._not_of_nodes[address] += 1
        return True

    def _warn(self, address: str) -> None:
        now = time.monotonic()
        if now >= self._next_warning:
            self._next_warning = now + WARNING_S
            self._log.warning("connections of %s are refused: %d are open of %d at most, and half "
                              "of these for one address", address, self._count,
                              self.max_connections)

    def leave(self, address: str, node_id: str | None) -> None:
        """Count a connection out; `node_id` is what excuse() was told of it."""
        self._count -= 1
        _count_down(self._of_address, address)
        if node_id is None:
            _count_down(self._not_of_nodes, address)
        else:
            _count_down(self._of_node, node_id)

    def excuse(self, address: str, node_id: str) -> bool:
        """Count a connection for a node's session, not its address; False where it has enough."""
        if self._of_node[node_id] >= MAX_OF_NODE:
            return False
        self._of_node[node_id] += 1
        _count_down(self._not_of_nodes, address)
        return True

    def hold(self, step: int) -> None:
        """Count bytes that are not a whole request yet; ApiError 503 where there are too many."""
        self.held_bytes += step
        if step > 0 and self.held_bytes > MAX_HELD_BYTES:
            raise ApiError(503, "too many requests arrive at once: try again in a moment")

    def file(self, step: int) -> None:
        """Count bytes in files; ApiError 503 where there are too many."""
        self.filed_bytes += step
        if step > 0 and self.filed_bytes > MAX_FILED_BYTES:
            raise ApiError(503, "too many large requests arrive at once: try again in a moment")


def _count_down(counts: Counter[str], name: str) -> None:
    counts[name] -= 1
    if counts[name] <= 0:
        del counts[name]


class Connection:
    """One client: what has come of its request, what has not gone of the answer."""

    __slots__ = ("address", "answer", "buffer", "deadline", "filed", "has_hung_up", "head", "held",
                 "is_refused", "is_woken", "keep", "left", "lock", "node_id", "part", "raw",
                 "route", "searched", "sent", "socket", "spool", "state", "timed", "turn", "unsent",
                 "watched")

    def __init__(self, client: socket.socket, address: str, deadline: float) -> None:
        self.socket = client
        self.address = address  # as Bounds counts it
        self.lock = threading.Lock()
        self.state = READING
        self.deadline = deadline
        self.watched = 0  # events that the selector waits for
        self.keep = False  # whether another request may follow
        self.has_hung_up = False
        self.node_id: str | None = None  # the node that it was excused for
        self.is_refused = False
        # The request.
        self.buffer = bytearray()
        self.searched = 0  # bytes of the buffer in which no head ends
        self.head: Head | None = None
        self.route: Route | None = None
        self.part = ""
        self.left = 0  # bytes of the body that are still to come
        self.raw = b""  # a small body
        self.spool: IO[bytes] | None = None  # a large one
        # Its answer.
        self.turn: Turn | None = None
        self.timed: Turn | None = None  # the turn whose deadline the edge knows
        self.is_woken = False  # since the handler was called
        self.answer = b""
        self.sent = 0  # bytes of it
        # Bytes that Bounds counts for this connection.
        self.held = self.filed = self.unsent = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing of a request has come."""
        return self.head is None and not self.buffer

    @property
    def is_large(self) -> bool:
        """Whether its body gathers in a file, and some of it is still to come."""
        return self.left > 0 and self.head is not None and self.head.length > SMALL_BYTES

    @property
    def is_counted(self) -> bool:
        """Whether Bounds counts anything for it."""
        return self.held > 0 or self.filed > 0 or self.unsent > 0

    @property
    def with_body(self) -> bool:
        """Whether the answer has a body."""
        return self.head is None or self.head.method != "HEAD"

    def receive(self) -> bytes | None:
        """Return what has come, b"" at the end, None where nothing has; a reset is an end."""
        try:
            return self.socket.recv(CHUNK_BYTES)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return b""

    def send(self) -> bool:
        """Send as much of the answer as goes at once; return whether nothing is left to send."""
        answer = self.answer
        try:
            part = memoryview(answer)[self.sent:] if self.sent else answer
            self.sent += self.socket.send(part)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            self.keep = False
            self.sent = len(answer)
        if self.sent < len(answer):
            return False
        self.answer = b""
        self.sent = 0
        return True

    def is_alive(self) -> bool:
        """Return whether the peer is still there: a socket that has ended reads as empty."""
        if self.has_hung_up:
            return False
        try:
            seen = self.socket.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        return len(seen) > 0

    def take_small_body(self) -> None:
        """Take the body, if all of it has come."""
        if len(self.buffer) >= self.left:
            self.raw = bytes(self.buffer[:self.left])
            del self.buffer[:self.left]
            self.left = 0

    def file_body(self) -> int:
        """Move what has come of a large body into its file; return how many bytes. ApiError 503."""
        with self.lock:
            part = bytes(self.buffer[:self.left])
            del self.buffer[:len(part)]
        try:
            if self.spool is None:
                self.spool = tempfile.TemporaryFile(prefix="ffdist-", buffering=0)
            written = 0
            while written < len(part):
                written += self.spool.write(part[written:])
        except OSError as error:
            cause = wire.cause_text(error)
            raise ApiError(503, f"the body cannot be kept: {cause}; try again later") from None
        self.left -= len(part)
        return len(part)

    def body(self) -> bytes:
        """Return the whole body."""
        if self.spool is None:
            return self.raw
        self.spool.seek(0)
        return self.spool.read()

    def forget_request(self) -> None:
        """Make room for the next request."""
        if self.spool is not None:
            with contextlib.suppress(OSError):
                self.spool.close()
            self.spool = None
        self.head = self.route = self.turn = self.timed = None
        self.raw = b""
        self.left = self.searched = 0


def guarded(call: Callable[[], object], log: logging.Logger) -> None:
    """Make a call whose errors must not end the thread: they are logged."""
    try:
        call()
    except Exception as error:
        log.error("a connection failed: %s: %s", type(error).__name__, error)
        log.debug("the failure in full", exc_info=True)


class Pool:
    """A few threads for requests that may block; daemons, for a disk may be stuck for ever."""

    def __init__(self, name: str, threads: int, log: logging.Logger) -> None:
        self._log = log
        self._calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        for _ in range(threads):
            threading.Thread(target=self._run, name=name, daemon=True).start()

    def put(self, call: Callable[[], object]) -> None:
        """Queue a call; ApiError 503 where too many wait."""
        if self._calls.qsize() >= MAX_WAITING:
            raise ApiError(503, "too many requests wait for the disk: try again in a moment")
        self._calls.put(call)

    def _run(self) -> None:
        while True:
            guarded(self._calls.get(), self._log)


class EventLoop:
    """Calls made by one thread: when a socket is ready, at a time, or for other threads."""

    def __init__(self, name: str, log: logging.Logger) -> None:
        self._log = log
        self._selector = selectors.DefaultSelector()
        self._calls: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._bell, ear = socket.socketpair()
        self._bell.setblocking(False)
        ear.setblocking(False)
        self._ear = ear
        self._selector.register(ear, selectors.EVENT_READ, lambda: ear.recv(1000))
        self._is_asleep = False
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to make calls."""
        self._thread.start()

    def stop(self) -> None:
        """End after the calls that are due; the sockets stay open."""
        self.call(self._end)
        if self._thread.is_alive():
            self._thread.join(2.0)

    def _end(self) -> None:
        self._is_over = True

    def call(self, call: Callable[[], object]) -> None:
        """Make a call soon; from any thread, and never blocking."""
        self._calls.append(call)
        # Set before the thread looks at the calls for the last time: none is overlooked.
        if self._is_asleep:
            self._is_asleep = False
            with contextlib.suppress(OSError):  # full: it rings already
                self._bell.send(b"!")

    def at(self, when: float, call: Callable[[], object]) -> None:
        """Make a call at a moment of the monotonic clock; for this thread's own calls."""
        heapq.heappush(self._timers, (when, next(self._numbers), call))

    def watch(
        self, client: socket.socket, watched: int, events: int, call: Callable[[], object]
    ) -> None:
        """Make a call whenever a socket has one of some events; `watched` were those before."""
        if not events:
            self._selector.unregister(client)
        elif watched:
            self._selector.modify(client, events, call)
        else:
            self._selector.register(client, events, call)

    def _run(self) -> None:
        while not self._is_over:
            self._is_asleep = True
            ready = self._selector.select(self._rest_s())
            self._is_asleep = False
            for key, _ in ready:
                guarded(key.data, self._log)
            for _ in range(len(self._calls)):
                guarded(self._calls.popleft(), self._log)
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                guarded(heapq.heappop(self._timers)[2], self._log)
        self._selector.close()
        self._bell.close()
        self._ear.close()

    def _rest_s(self) -> float | None:
        if self._calls:
            return 0.0
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - time.monotonic())


# ---- 19 Edge -------------------------------------------------------------------------------------

# What becomes of a connection's bytes. Gathering makes requests of them, Exchange finds the answer
# of a whole one and sends it, Edge takes connections and ends what takes too long. All three are
# the loop's; the methods that other threads may call say so.

class Exchange:
    """From a whole request to its answer: here, in a thread of the pool, or after it was parked."""

    def __init__(
        self, master: Master, loop: EventLoop, edge: Edge, log: logging.Logger
    ) -> None:
        self._master = master
        self._loop = loop
        self._edge = edge
        self._log = log
        self._machine = os.uname().nodename.lower()
        self._pool = Pool("request", POOL_THREADS, log)
        # One at a time: decoded, a body is ten times as large.
        self._large = Pool("large request", 1, log)

    def admit(self, head: Head) -> tuple[Route, str]:
        """Return the route of a request and its `{id}`; ApiError before its body is read."""
        refuse_foreign_page(head, self._machine, self._master.settings.allow_hosts)
        route, part = route_of(head.method, head.path)
        admit(route, head.query, head.length)
        return route, part

    def file(self, connection: Connection) -> None:
        """Move what has come of a large body into its file; the edge goes on after it."""
        connection.state = FILING
        self._large.put(functools.partial(self._file, connection))

    def _file(self, connection: Connection) -> None:
        """In a thread of the pool: the disk may be stuck."""
        moved, error = 0, None
        try:
            moved = connection.file_body()
        except ApiError as refusal:
            error = refusal
        self._loop.call(functools.partial(self._edge.filed, connection, moved, error))

    def begin(self, connection: Connection) -> None:
        """Answer a whole request."""
        connection.turn = Turn(functools.partial(self._wake, connection), connection.is_alive)
        connection.deadline = math.inf
        connection.state = WORKING
        self._dispatch(connection)

    def _dispatch(self, connection: Connection) -> None:
        """Call the handler here where it is quick, else in a thread of the pool."""
        route = connection.route
        is_small = connection.spool is None and len(connection.raw) <= QUICK_BYTES
        if route is not None and route.quick and is_small:
            self._work(connection, may_block=False)
        else:
            self._queue(connection)

    def _queue(self, connection: Connection) -> None:
        pool = self._pool if connection.spool is None else self._large
        try:
            pool.put(functools.partial(self._work, connection, may_block=True))
        except ApiError as error:
            self.refuse(connection, error)

    def _work(self, connection: Connection, may_block: bool) -> None:
        """Call the handler of a request, and see to its answer. For any thread."""
        turn = connection.turn
        if turn is None:  # it was closed meanwhile
            return
        turn.may_block = may_block
        connection.is_woken = False
        try:
            answer = self._answer(connection)
            if turn.node_id is not None and connection.node_id is None:
                self._loop.call(
                    functools.partial(self._edge.excuse, connection, turn.node_id))
            if answer is None:
                self._park(connection, turn)
            else:
                deliver = functools.partial(self._deliver, connection, answer)
                self._master.after_commit(turn, deliver)
        except WouldBlock:
            self._queue(connection)
        except BaseException:
            self._loop.call(functools.partial(self._edge.drop, connection))
            raise

    def _answer(self, connection: Connection) -> bytes | None:
        """Return the answer to a request, None where it is parked. WouldBlock."""
        head, route = connection.head, connection.route
        assert head is not None and route is not None
        keep, with_body = connection.keep, connection.with_body
        try:
            body = decode_json(connection.body()) if head.method == "POST" else None
            wants_json = prefers_json(head.header(b"accept"))
            answer = route.handler(Request(
                self._master, connection.part, head.query, body, connection.turn, wants_json))
            return answer and encode_answer(*answer, keep, with_body)
        except ApiError as error:
            return encode_error(error, keep, with_body)
        except WouldBlock:
            raise
        except Exception as error:
            name = type(error).__name__
            self._log.error("%s failed: %s: %s", head.method, name, error)
            self._log.debug("the failure in full", exc_info=True)
            words = {"error": f"the master failed on this request: {name}"}
            return encode_answer(500, words, keep, with_body)

    def _park(self, connection: Connection, turn: Turn) -> None:
        """Keep a request until it is woken, or its time is up. For any thread."""
        if connection.timed is not turn:
            connection.timed = turn
            # Weak: the timer must not keep what has its answer long before.
            due = functools.partial(_wake_if_there, weakref.ref(turn))
            self._loop.call(functools.partial(self._loop.at, turn.deadline or 0.0, due))
        with connection.lock:
            if connection.is_woken or connection.has_hung_up:
                self._wake(connection, turn)
            connection.state = PARKED

    def _wake(self, connection: Connection, turn: Turn) -> None:
        """Let a parked request look again soon. For any thread."""
        self._loop.call(functools.partial(self.resume, connection, turn))

    def resume(self, connection: Connection, turn: Turn) -> None:
        """Let a parked request look again, unless it has its answer."""
        with connection.lock:
            if connection.turn is not turn:
                return
            connection.is_woken = True
            if connection.state != PARKED:
                return
            connection.state = WORKING
        self._dispatch(connection)

    def refuse(self, connection: Connection, error: ApiError) -> None:
        """Send why a request is not answered."""
        self._deliver(connection, encode_error(error, connection.keep, connection.with_body))

    def _deliver(self, connection: Connection, answer: bytes, error: str | None = None) -> None:
        """Send an answer, or that its commit failed with an error. For any thread."""
        if error is not None:
            answer = encode_error(not_committed(error), connection.keep, connection.with_body)
        with connection.lock:
            if connection.state == CLOSED:
                return
            connection.forget_request()
            connection.answer = answer
            is_over = (connection.send() and connection.keep and not connection.buffer
                       and not connection.has_hung_up and not connection.is_counted)
            connection.deadline = time.monotonic() + (IDLE_S if is_over else SEND_S)
            connection.state = READING if is_over else SENDING
        if not is_over:
            self._loop.call(functools.partial(self._edge.attend, connection))


def _wake_if_there(known: weakref.ref[Turn]) -> None:
    turn = known()
    if turn is not None:
        turn.wake(turn)


class Gathering:
    """From bytes to a whole request: what comes before its time, or too much of it, too."""

    def __init__(self, exchange: Exchange, edge: Edge, bounds: Bounds) -> None:
        self._exchange = exchange
        self._edge = edge
        self._bounds = bounds

    def read(self, connection: Connection) -> None:
        """Take in what has come, in any state but SENDING and CLOSED."""
        data = connection.receive()
        if data is None:
            return
        with connection.lock:
            state = connection.state
            if not data:
                connection.has_hung_up = True
            elif state != LINGERING:
                connection.buffer += data
        if not data:
            self._edge.watch(connection, 0)
        if state == READING:
            self.go_on(connection)
        elif state == LINGERING:
            if not data:
                self._edge.drop(connection)
        else:
            self._keep_for_later(connection, state)

    def _keep_for_later(self, connection: Connection, state: int) -> None:
        """Keep what comes behind a request that is under way; a parked one must not have much."""
        is_too_much = len(connection.buffer) > MAX_PIPELINED_BYTES
        try:
            self.hold(connection)
        except ApiError:
            is_too_much = True
        if is_too_much:
            self._edge.watch(connection, 0)
            connection.has_hung_up |= state == PARKED
        if connection.has_hung_up and state == PARKED and connection.turn is not None:
            self._exchange.resume(connection, connection.turn)

    def hold(self, connection: Connection) -> None:
        """Count what a connection keeps in memory; ApiError 503 where all keep too much."""
        size = len(connection.buffer) + len(connection.raw)
        if size <= UNCOUNTED_BYTES:
            size = 0
        step = size - connection.held
        connection.held = size
        self._bounds.hold(step)

    def go_on(self, connection: Connection) -> None:
        """Begin with the next request, if it is whole."""
        if self._edge.is_stopping:
            return
        try:
            is_whole = self._gather(connection)
            self.hold(connection)
            if is_whole:
                self._exchange.begin(connection)
            elif connection.is_large and connection.buffer:
                self._exchange.file(connection)
            else:
                self._expect_more(connection)
        except ApiError as error:
            self._exchange.refuse(connection, error)

    def filed(self, connection: Connection, moved: int, error: ApiError | None) -> None:
        """Go on with a body of which a part went into its file."""
        if connection.state != FILING:
            return
        connection.state = READING
        connection.filed += moved
        try:
            self._bounds.file(moved)
            if error is not None:
                raise error
        except ApiError as refusal:
            self._exchange.refuse(connection, refusal)
            return
        self._edge.watch(connection, selectors.EVENT_READ)
        self.go_on(connection)

    def _gather(self, connection: Connection) -> bool:
        """Take what has come of a request; return whether it is whole. ApiError."""
        if connection.head is None:
            connection.keep = False
            block = take_head(connection.buffer, connection.searched)
            if block is None:
                if connection.buffer and not connection.searched:
                    connection.deadline = time.monotonic() + HEAD_S
                connection.searched = len(connection.buffer)
                return False
            head = connection.head = parse_head(block)
            # A body that was not read would be taken for the next request.
            connection.keep = head.keep and not head.length
            connection.route, connection.part = self._exchange.admit(head)
            connection.left = head.length
            if head.length:
                self._expect_body(connection, head)
        if connection.left and not connection.is_large:
            connection.take_small_body()
        connection.keep = connection.head.keep and not connection.left
        return not connection.left

    def _expect_body(self, connection: Connection, head: Head) -> None:
        large = max(0, head.length - SMALL_BYTES)
        connection.deadline = time.monotonic() + BODY_S + large / MIN_BODY_RATE
        if head.header(b"expect") == "100-continue":
            with contextlib.suppress(OSError):
                connection.socket.send(CONTINUE)

    def _expect_more(self, connection: Connection) -> None:
        """Wait for the rest of a request. ApiError where there is nobody to send it."""
        if connection.has_hung_up and connection.is_idle:
            self._edge.drop(connection)
        elif connection.has_hung_up:
            raise ApiError(400, "the connection was closed in the middle of a request")


class Edge:
    """All connections: takes them, gathers their requests, and ends them."""

    def __init__(self, master: Master, max_connections: int, log: logging.Logger) -> None:
        self._bounds = Bounds(max_connections, log)
        self._loop = EventLoop("connections", log)
        self._exchange = Exchange(master, self._loop, self, log)
        self._gathering = Gathering(self._exchange, self, self._bounds)
        self._connections: set[Connection] = set()
        self._refused = 0
        self.is_stopping = False

    def start(self) -> None:
        """Begin to serve."""
        self._loop.at(time.monotonic(), self._sweep)
        self._loop.start()

    def end(self) -> None:
        """Begin no request any more; those under way go on. For any thread."""
        self.is_stopping = True

    def close(self, patience_s: float = 2.0) -> None:
        """Wait for the answers that are under way, then close all. For any thread."""
        deadline = time.monotonic() + patience_s
        busy = (FILING, WORKING, PARKED, SENDING)
        while time.monotonic() < deadline:
            if not any(connection.state in busy for connection in list(self._connections)):
                break
            time.sleep(0.01)
        self._loop.stop()
        for connection in list(self._connections):
            connection.socket.close()

    def enter(self, client: socket.socket, address: str) -> None:
        """Take a connection that was accepted. For any thread."""
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop.call(functools.partial(self._enter, client, _network_of(address)))

    def _enter(self, client: socket.socket, address: str) -> None:
        connection = Connection(client, address, time.monotonic() + IDLE_S)
        self._connections.add(connection)
        if self._bounds.enter(address):
            self.watch(connection, selectors.EVENT_READ)
            return
        connection.is_refused = True
        self._refused += 1
        if self._refused > MAX_REFUSED:
            self.drop(connection)
        else:
            words = "too many connections are open: try again in a moment"
            self._exchange.refuse(connection, ApiError(503, words))

    def excuse(self, connection: Connection, node_id: str) -> None:
        """Count a connection no longer for its address: it is that of a node's session."""
        is_open = connection.node_id is None and connection.state != CLOSED
        if is_open and self._bounds.excuse(connection.address, node_id):
            connection.node_id = node_id

    def filed(self, connection: Connection, moved: int, error: ApiError | None) -> None:
        """Go on with a body of which a part went into its file."""
        self._gathering.filed(connection, moved, error)

    def watch(self, connection: Connection, events: int) -> None:
        """Wait for some events of a connection, and for no others."""
        if events != connection.watched:
            self._loop.watch(connection.socket, connection.watched, events,
                             functools.partial(self._ready, connection))
            connection.watched = events

    def _ready(self, connection: Connection) -> None:
        try:
            if connection.state == SENDING:
                self.attend(connection)
            elif connection.state != CLOSED:
                self._gathering.read(connection)
        except Exception:
            self.drop(connection)
            raise

    def attend(self, connection: Connection) -> None:
        """Send what is left of an answer; then go on with the next request, or close."""
        if connection.state != SENDING:
            return
        is_sent = connection.send() if connection.answer else True
        self._settle_bounds(connection)
        if self._bounds.unsent_bytes > MAX_UNSENT_BYTES:
            self.drop(connection)
        elif not is_sent:
            self.watch(connection, selectors.EVENT_WRITE)
        elif not connection.keep or connection.has_hung_up or self.is_stopping:
            self._linger(connection)
        else:
            connection.deadline = time.monotonic() + IDLE_S
            connection.state = READING
            self.watch(connection, selectors.EVENT_READ)
            self._gathering.go_on(connection)

    def _settle_bounds(self, connection: Connection) -> None:
        """Count for a connection no more than an answer that it has not read, and its buffer."""
        bounds = self._bounds
        bounds.file(-connection.filed)
        bounds.unsent_bytes += len(connection.answer) - connection.unsent
        connection.filed = 0
        connection.unsent = len(connection.answer)
        with contextlib.suppress(ApiError):
            self._gathering.hold(connection)

    def _linger(self, connection: Connection) -> None:
        """Read on for a moment before closing: a reset would throw away the answer on its way."""
        try:
            connection.socket.shutdown(socket.SHUT_WR)
        except OSError:
            connection.has_hung_up = True
        if connection.has_hung_up:
            self.drop(connection)
            return
        connection.buffer.clear()
        self._settle_bounds(connection)
        connection.deadline = time.monotonic() + LINGER_S
        connection.state = LINGERING
        self.watch(connection, selectors.EVENT_READ)

    def _sweep(self) -> None:
        """End what has taken too long."""
        now = time.monotonic()
        late = [
            connection for connection in self._connections
            if connection.deadline <= now and connection.state not in OF_POOL
        ]
        for connection in late[:MAX_SWEPT]:
            self._expire(connection)
        self._loop.at(now if len(late) > MAX_SWEPT else now + SWEEP_S, self._sweep)

    def _expire(self, connection: Connection) -> None:
        if connection.state != READING or connection.is_idle:
            self.drop(connection)
            return
        connection.keep = False
        words = f"the request's head did not arrive within {HEAD_S:.0f} s"
        if connection.head is not None:
            length = connection.head.length
            came = length - connection.left + len(connection.buffer)
            words = f"the body did not arrive: {came} of {length} bytes came"
        self._exchange.refuse(connection, ApiError(408, words))

    def drop(self, connection: Connection) -> None:
        """Close a connection."""
        with connection.lock:
            if connection.state == CLOSED:
                return
            connection.state = CLOSED
        self.watch(connection, 0)
        self._connections.discard(connection)
        if connection.is_refused:
            self._refused -= 1
        else:
            self._bounds.leave(connection.address, connection.node_id)
        connection.forget_request()
        connection.buffer.clear()
        connection.answer = b""
        self._settle_bounds(connection)
        connection.socket.close()


def _network_of(address: str) -> str:
    """Return what counts as one address: of IPv6 the first half, which one customer has whole."""
    if ":" not in address:
        return address
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or ipaddress.ip_network((found, 64), strict=False))


class Server(http.server.ThreadingHTTPServer):
    """The listening socket: a long backlog, no look-up of names, a pause when files run out.

    Its thread accepts connections and hands them to the edge.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = BACKLOG
    allow_reuse_address = True

    def __init__(self, host: str, port: int, log: logging.Logger) -> None:
        self.log = log
        self.edge: Edge
        self._next_warning = 0.0
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), http.server.BaseHTTPRequestHandler)

    def server_bind(self) -> None:
        """Bind without asking for the host's full name, which takes seconds without DNS."""
        socketserver.TCPServer.server_bind(self)
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), int(port)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if time.monotonic() >= self._next_warning:
                self._next_warning = time.monotonic() + WARNING_S
                self.log.warning("cannot accept connections for a moment: %s", error.strerror)
            time.sleep(ACCEPT_PAUSE_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        self.edge.enter(request, client_address[0])

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.log.debug("a connection failed", exc_info=True)


def _raise_file_limit() -> int:
    """Allow as many open files as this user may have; return how many may be connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, FILES_WANTED)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(MIN_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - FILES_KEPT)


# ---- 20 Push -------------------------------------------------------------------------------------

# Three kinds of values go to VictoriaMetrics, each with its own time:
#
# Results are read from the journal, from the last one on that was taken. Its number is kept in a
# file of the data folder, so that neither an outage nor a kill -9 loses a result. A value that is
# pushed twice counts once (-dedup.minScrapeInterval).
#
# Samples are known to memory alone. They wait there while VictoriaMetrics is away, up to
# UNSENT_LIMIT_BYTES; then the oldest are dropped and counted. A kill of the master loses them.
#
# States of nodes are pushed when they change, and all of them now and then. In an outage none are
# kept: the next push has the states of its own time.

PUSH_S = 5.0
# So that a panel over a few minutes has points of nodes that did not change.
NODES_AGAIN_S = 30.0
# About 3 MB a request.
MAX_PUSH_LINES = 20_000
MAX_PUSH_RESULTS = 500
# Results from before pushing was switched on; the journal may hold a million.
MAX_BACKFILL = 10_000
# About 400,000 values: 17 minutes of an outage with 100 busy nodes.
UNSENT_LIMIT_BYTES = 64 << 20
# Answers that the same body would get again; every other failure may pass.
REFUSED_STATUSES = (400, 413, 415, 422)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file for the owner alone; readers see the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.part")
    partial.unlink(missing_ok=True)  # a leftover of a kill, or a link of somebody else
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(partial, flags, 0o600), "wb") as file:
        file.write(data)
    os.replace(partial, path)


class Unsent:
    """Bodies of lines that wait in memory for VictoriaMetrics, oldest first, within a limit."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bodies: deque[bytes] = deque()
        self._size = 0

    def add(self, lines: Sequence[str]) -> int:
        """Append lines; return how many values were dropped to make room for them."""
        for start in range(0, len(lines), MAX_PUSH_LINES):
            body = _body(lines[start:start + MAX_PUSH_LINES])
            self._bodies.append(body)
            self._size += len(body)
        dropped = 0
        while self._size > self._limit_bytes:
            dropped += self.pop().count(b"\n")
        return dropped

    def oldest(self) -> bytes | None:
        """Return the body that waits longest; None where none waits."""
        return self._bodies[0] if self._bodies else None

    def pop(self) -> bytes:
        """Remove the body that waits longest, and return it."""
        body = self._bodies.popleft()
        self._size -= len(body)
        return body


class Pusher:
    """Pushes to VictoriaMetrics what a master learns; one thread calls step()."""

    def __init__(self, url: str, cursor: Path, master: Master, log: logging.Logger, *,
                 limit_bytes: int = UNSENT_LIMIT_BYTES) -> None:
        self._url = url
        self._master = master
        self._log = log
        self._stopping = threading.Event()

        self._samples: queue.Queue[Sampled] = queue.Queue(MAX_SAMPLES)
        self._unsent = Unsent(limit_bytes)
        self._node_states: dict[str, tuple[Any, ...]] = {}
        self._all_nodes_at = 0.0
        self._cursor_path = cursor
        self._cursor = self._read_cursor()
        self._write_cursor()

        self._is_away = False
        self._dropped = 0  # in this outage
        master.samples = self._samples

    def step(self, now: float) -> None:
        """Push all there is at this moment of the wall clock: samples, nodes, results."""
        self._take_samples()
        try:
            self._push_unsent()
            self._push_nodes(now)
            self._push_results()
        except (ApiError, OSError) as error:
            self._note_outage(error)
        else:
            self._note_return()

    def stop(self) -> None:
        """Let a step() come to its end soon: the journal keeps the results that it leaves."""
        self._stopping.set()

    def finish(self, now: float) -> None:
        """Push the values of the last seconds after stop(); none while VictoriaMetrics is away."""
        if not self._is_away:
            self.step(now)

    def _take_samples(self) -> None:
        """Turn the samples that came into waiting lines; the oldest go where there are too many."""
        lines: list[str] = []
        with contextlib.suppress(queue.Empty):
            while True:
                lines += sample_lines(self._samples.get_nowait())
        dropped = self._unsent.add(lines)
        if not dropped:
            return
        if not self._dropped:
            self._log.warning("VictoriaMetrics has been away for long: from now on the oldest "
                              "samples are dropped")
        self._dropped += dropped
        self._master.count("push_dropped", dropped)

    def _push_unsent(self) -> None:
        while (body := self._unsent.oldest()) is not None:
            self._push(body)
            self._unsent.pop()

    def _push_nodes(self, now: float) -> None:
        """Push the states of the nodes that changed; of all of them every NODES_AGAIN_S."""
        shot = self._master.queries.snapshot()
        is_due = now - self._all_nodes_at >= NODES_AGAIN_S
        if is_due:
            self._node_states = {}
        lines = node_lines(shot, now, self._node_states)
        for start in range(0, len(lines), MAX_PUSH_LINES):
            self._push(_body(lines[start:start + MAX_PUSH_LINES]))
        self._node_states = {node[1]: node for node in shot.nodes}
        if is_due:
            self._all_nodes_at = now

    def _push_results(self) -> None:
        """Push the results of the journal after the cursor, a page at a time."""
        before, is_full = self._cursor, True
        while is_full and not self._stopping.is_set():
            page = self._master.queries.ended_after(self._cursor, MAX_PUSH_RESULTS)
            is_full = len(page) == MAX_PUSH_RESULTS
            if page:
                self._push(_body([
                    line for _, result, spec in page for line in result_lines(result, spec)]))
                self._cursor = page[-1][0]
                self._write_cursor()
        if self._cursor > before:
            self._flush()

    def _flush(self) -> None:
        """Let queries see new series: VictoriaMetrics looks for them only every 10 s by itself."""
        with contextlib.suppress(ApiError):
            wire.exchange_text(f"{self._url}/internal/force_flush")

    def _push(self, body: bytes) -> None:
        """Push lines. ApiError where they may be taken later; those never taken are dropped."""
        count = body.count(b"\n")
        try:
            wire.exchange_text(f"{self._url}/api/v1/import/prometheus", body)
        except ApiError as error:
            if error.status not in REFUSED_STATUSES:
                raise
            self._master.count("push_dropped", count)
            self._log.error("VictoriaMetrics refuses %d values; they are dropped: %s",
                            count, error.message)
        else:
            self._master.count("push_lines", count)

    def _note_outage(self, error: Exception) -> None:
        """Count a failure; log the first of an outage."""
        self._master.count("push_failures", 1)
        if not self._is_away:
            self._log.warning("nothing is pushed to VictoriaMetrics; results wait in the journal, "
                              "samples in memory: %s", getattr(error, "message", error))
        self._is_away = True

    def _note_return(self) -> None:
        """Log the end of an outage, and what it cost."""
        if self._dropped:
            self._log.warning("%d values of samples were dropped while VictoriaMetrics was away",
                              self._dropped)
        if self._is_away:
            self._log.info("VictoriaMetrics takes values again")
        self._is_away, self._dropped = False, 0

    def _read_cursor(self) -> int:
        """Return the number of the last result that was taken."""
        last = self._master.queries.snapshot().last_result
        try:
            kept = int(self._cursor_path.read_text())
        except (OSError, ValueError):
            return max(0, last - MAX_BACKFILL)
        return min(last, kept)  # a recovered journal may be shorter

    def _write_cursor(self) -> None:
        write_whole(self._cursor_path, b"%d" % self._cursor)


def _body(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")


# ---- 21 Service ----------------------------------------------------------------------------------

# A service starts from the inside out: first the port is bound (a second master on it must not
# touch the journal), then the journal is opened and replayed, then the threads begin, the one that
# accepts connections among them. It stops from the outside in: the socket closes, so that no
# request comes; the loops end; Master wakes what is parked, and the edge sends the last answers;
# Master commits what is queued and closes the journal. The log is written last.
#
# Each loop of the background calls a step() at its interval, in a thread of its own. A step that
# fails is logged and called again: the silent end of a thread would be noticed too late.

HOUSEKEEPING_S = 30.0
# The thread that accepts connections looks so often whether it should end.
ACCEPT_S = 0.2
# Finished jobs are removed a few at a time, with a pause in which others get the lock.
EXPIRY_PAUSE_S = 0.05
# How long a line of the log may wait for others to be written with it, how many may wait for a
# terminal or a pipe that is stuck, and how long the end waits for it.
LOG_DELAY_S = 0.05
LOG_CLOSE_S = 1.0
MAX_LOG_WAITING = 20_000
COLLECT_AFTER = (20_000, 20, 20)  # objects, and rounds of each generation before the next


class LogWriter(logging.Handler):
    """Writes the log from a thread of its own, many lines in one write.

    A request logs its events after their commit and before its answer. Formatting and writing them
    there took 20 % of the CPU of a claim and its result; waking a thread for each line, as
    logging.handlers.QueueListener does, took as much. So emit() appends the record and no more. The
    thread wakes once, waits LOG_DELAY_S for others, and writes them all; after a warning or worse
    it does not wait. Text and order are those of the target. Nobody waits for a terminal or a pipe
    that is stuck: lines that are too many are dropped and counted.
    """

    def __init__(self, target: logging.StreamHandler[Any]) -> None:
        super().__init__()
        self.target = target
        self._records: deque[logging.LogRecord] = deque()
        self._dropped = 0
        self._waiting = threading.Event()
        self._urgent = threading.Event()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._records) >= MAX_LOG_WAITING:
            self._dropped += 1
            return
        self._records.append(record)
        if record.levelno >= logging.WARNING:
            self._urgent.set()
        if not self._waiting.is_set():
            self._waiting.set()

    def flush(self) -> None:
        """Ask the thread to write what waits; not waiting for it."""
        self._urgent.set()
        self._waiting.set()

    def close(self) -> None:
        """Write what waits, and end the thread; a stuck target is waited for LOG_CLOSE_S."""
        self._is_over = True
        self.flush()
        self._thread.join(LOG_CLOSE_S)
        super().close()

    def _run(self) -> None:
        while not self._is_over:
            self._waiting.wait()
            self._urgent.wait(LOG_DELAY_S)
            self._waiting.clear()
            self._urgent.clear()
            self._write()
        self._write()

    def _write(self) -> None:
        """Write all lines that wait."""
        lines = []
        while self._records:
            lines.append(self._line(self._records.popleft()))
        if self._dropped:
            lines.append(f"{self._dropped} lines of the log were dropped{self.target.terminator}")
            self._dropped = 0
        try:
            if lines:
                self.target.stream.write("".join(lines))
                self.target.flush()
        except (OSError, ValueError):
            pass  # the terminal or the disk of the log has gone

    def _line(self, record: logging.LogRecord) -> str:
        try:
            return self.target.format(record) + self.target.terminator
        except Exception:
            self.target.handleError(record)
            return ""


def write_log_behind(log: logging.Logger) -> list[LogWriter]:
    """Put a LogWriter before each handler of a logger that writes to a stream; return them."""
    # No line shows these, and looking them up costs more than the rest of a record.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    writers = []
    for handler in list(log.handlers):
        if isinstance(handler, logging.StreamHandler):
            writer = LogWriter(handler)
            log.removeHandler(handler)
            log.addHandler(writer)
            writers.append(writer)
    return writers


class Loop:
    """Calls a step at once and at its interval, in a thread of its own, until end()."""

    def __init__(self, name: str, interval_s: float, step: Callable[[], object],
                 log: logging.Logger, *, patience_s: float = 1.0) -> None:
        self._name = name
        self._interval_s = interval_s
        self._step = step
        self._log = log
        self._patience_s = patience_s
        self._last_error = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin with the first step."""
        self._thread.start()

    def end(self) -> None:
        """End after the step that is under way."""
        self._stopping.set()

    def join(self) -> None:
        """Wait for the end, `patience_s` at most."""
        if self._thread.is_alive():
            self._thread.join(self._patience_s)

    def _run(self) -> None:
        self.step()
        while not self._stopping.wait(self._interval_s):
            self.step()

    def step(self) -> None:
        """Call the step once; log its error, one like the last for debugging only."""
        try:
            self._step()
        except ApiError as error:
            # Refused while the journal cannot be written: Master has logged that already.
            self._log.debug("%s: %s", self._name, error.message)
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            level = logging.DEBUG if words == self._last_error else logging.ERROR
            self._log.log(level, "%s failed and goes on: %s", self._name, words)
            self._log.debug("the failure in full", exc_info=True)
            self._last_error = words


def _bound(host: str, port: int, log: logging.Logger) -> Server:
    """Return a server that listens; CommandError says why that is not possible."""
    try:
        return Server(host, port, log)
    except (OSError, OverflowError) as error:
        raise CommandError(no_port_text(host, port, error)) from None


def no_port_text(host: str, port: int, error: Exception) -> str:
    """Return why a port cannot be opened, and the next step."""
    code = getattr(error, "errno", None)
    if code == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return f"this machine has no address {host}: choose another with --host"

    cause = getattr(error, "strerror", None) or str(error)
    next_step = f"see who has it with 'lsof -i :{port}', or choose another with --port"
    if code == errno.EACCES:
        next_step = "ports below 1024 need root: choose another with --port"
    return f"port {port} on {host} cannot be opened: {cause}; {next_step}"


def _leave_what_lives_long() -> None:
    """Keep the garbage collector from what lives long: a million jobs take it a second each time.

    Next to nothing here is in cycles, so it may also look less often at what is young.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


class Service:
    """A running master: its socket, its state, the threads of the background."""

    def __init__(self, host: str, port: int, folder: Path, settings: Settings, *,
                 log: logging.Logger, victoriametrics: str | None = None) -> None:
        max_connections = _raise_file_limit()
        self._log = log
        self._server = _bound(host, port, log)
        try:
            settings = replace(settings, tariff=settings.tariff or Tariff())
            self.master = Master(folder, settings, log)
        except BaseException:
            self._server.server_close()
            raise

        self._edge = self._server.edge = Edge(self.master, max_connections, log)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}"
        self._is_checked = False
        self._stopping = threading.Event()
        self._loops = [
            Loop("serving", REAP_S, lambda: self._server.serve_forever(ACCEPT_S), log),
            Loop("expiry of leases", REAP_S, lambda: self.master.reap(), log),
            Loop("housekeeping", HOUSEKEEPING_S, self._keep_house, log),
        ]
        self._pusher: Pusher | None = None
        if victoriametrics is not None:
            pusher = self._pusher = Pusher(victoriametrics, folder / "pushed", self.master, log)
            self._loops.append(Loop("push", PUSH_S, lambda: pusher.step(self.master.wall()), log,
                                    patience_s=wire.CONNECT_S + 2))
        self._writers: list[LogWriter] = []

    def start(self) -> None:
        """Begin to serve, and start the loops."""
        self._writers = write_log_behind(self._log)
        _leave_what_lives_long()
        self._edge.start()
        for loop in self._loops:
            loop.start()

    def stop(self) -> None:
        """Stop in the order that the head of this section gives."""
        self._stopping.set()
        for loop in self._loops:
            loop.end()
        self._server.shutdown()
        self._server.server_close()
        self._edge.end()

        if self._pusher is not None:
            self._pusher.stop()
        for loop in self._loops:
            loop.join()
        if self._pusher is not None:
            self._pusher.finish(self.master.wall())
        self.master.release()
        self._edge.close()
        self.master.close()

        for writer in self._writers:
            self._log.removeHandler(writer)
            self._log.addHandler(writer.target)
            writer.close()

    def _keep_house(self) -> None:
        """Check the journal at first; then remove the jobs past the limits, a few at a time.

        A check reads the whole journal, which may take minutes: stop() does not wait for it.
        """
        if not self._is_checked:
            self.master.journal.check()
            self._is_checked = True
            return
        while self.master.expire() and not self._stopping.wait(EXPIRY_PAUSE_S):
            pass


# ---- 22 Experiments ------------------------------------------------------------------------------

# An experiment is a matrix of jobs, written as a JSON file. It becomes a list of submissions in
# the order in which they are to run; the master keeps that order, so nobody has to stay for it.
# Two fields of a submission say what may run beside what:
#
#   exclusive  a job that rests before or after its encode, or measures the idle machine, has its
#              node to itself
#   after      streams are to run beside each other, so they cannot be exclusive: they wait for all
#              jobs before them on their node, and the jobs behind them wait for all of them
#
# A job's id follows from the experiment's id and from all that the job is, its order aside. So
# the same file means the same jobs: submitting it again runs nothing twice, and a changed line
# runs only its own.

MAX_STREAMS = 256
MAX_REPEATS = 1000

# field of a file, with every value an axis -> parameter of a job
_AXES = {
    "inputs": "input",
    "codecs": "codec",
    "encoders": "encoder",
    "presets": "preset",
}
# bitrates and crfs are one axis: a job has a rate of one kind or the other
_RATES = {"bitrates": "bitrate", "crfs": "crf"}
_RESTS = ("settle", "cooldown")
_SECONDS = ("duration", *_RESTS, "timeout")  # may be written 1m30s here
EXPERIMENT_FIELDS = (
    "name", "id",
    "scenarios", *_AXES, *_RATES, "nodes", "streams", "repeats", "baseline",
    "quality", "confidence", *_RESTS, "parameters",
)

_TYPES = ("single", "multi", "baseline")
_BASELINE_PARAMETERS = ("duration", *_RESTS)
# What an object in `scenarios` says beside parameters; `stabilization` is the seed's word for
# settle.
_ENTRY_WORDS = ("scenario", "name", "type", "count", "stabilization")
_ENTRY_FIELDS = (*_ENTRY_WORDS, "resolution", "frame_rate", "output_mode", "rtmp_url", "stream_key",
                 *wire.PARAMETERS)


class Group(NamedTuple):
    """Submissions that run side by side on one node, or on any ("")."""

    node: str
    jobs: tuple[Json, ...]


class Experiment(NamedTuple):
    """A matrix of jobs, in the order in which they are to run."""

    id: str
    name: str
    groups: tuple[Group, ...]

    @property
    def jobs(self) -> list[Json]:
        """All submissions."""
        return [job for group in self.groups for job in group.jobs]


class _Entry(NamedTuple):
    """One scenario of a file: its place there, its streams, its own parameters.

    `words` has the file's word for a parameter that goes by another name in it.
    """

    place: str
    scenario: str
    name: str | None
    streams: tuple[int, ...]
    parameters: Json
    words: Mapping[str, str] = {}
    is_baseline: bool = False

    def place_of(self, parameter: str) -> str:
        """Return the place of one of its own parameters."""
        return f"{self.place}.{self.words.get(parameter, parameter)}"


class _Cell(NamedTuple):
    """The parameters that axes give to a job, and the place of each in the file."""

    values: Json
    places: Mapping[str, str]


class _Point(NamedTuple):
    """One group of the matrix: its coordinates."""

    entry: _Entry
    cell: _Cell
    node: str | None
    streams: int
    repeat: int | None


@dataclass(frozen=True)
class _Matrix:
    """An experiment file with its fields checked; `file` has the axes."""

    id: str
    name: str
    confidence: str
    nodes: tuple[str | None, ...]
    repeats: int
    entries: tuple[_Entry, ...]
    common: Json   # parameters of all encodes
    quality: Json  # that of all encodes, by its name
    rests: Json    # settle and cooldown of all jobs, in s
    file: Json


def experiment_of(value: Any, stem: str) -> Experiment:
    """Return the experiment of a file's JSON; ValueError names the place of a fault in it.

    `stem` names the experiment where the file does not.
    """
    matrix = _matrix_of(value, stem)
    groups = [_group_of(matrix, point) for point in _points_of(matrix)]
    experiment = Experiment(matrix.id, matrix.name, tuple(_in_order(groups)))
    _refuse_clashes(experiment.jobs)
    return experiment


def _refuse_clashes(jobs: Sequence[Json]) -> None:
    """Refuse jobs that are the same, or that would write the same file."""
    outputs = [job["parameters"].get("output") for job in jobs]
    files = [output for output in outputs if output]
    if len(set(files)) < len(files):
        raise ValueError("parameters.output would be written by several jobs: "
                         "leave it out to discard them")
    ids = {job["id"] for job in jobs}
    if len(ids) < len(jobs):
        raise ValueError("the same job is in the file more than once: "
                         "use repeats to run all of it more than once")


def _matrix_of(value: Any, stem: str) -> _Matrix:
    if not isinstance(value, dict):
        raise ValueError("invalid experiment: expected a JSON object with scenarios")
    _refuse_unknown(value, "", EXPERIMENT_FIELDS)
    if value.get("confidence", "auto") not in CONFIDENCES:
        raise ValueError(f"confidence must be one of {', '.join(CONFIDENCES)}")

    name = _text(value, "name", stem[:64] or "experiment")
    nodes = _list(value, "nodes", str, "names of nodes")
    common = Fields(value).mapping("parameters", "an object of parameters")
    rests = {rest: _seconds(value[rest], rest) for rest in _RESTS if value.get(rest)}
    return _Matrix(
        id=_slug(_text(value, "id", name)),
        name=name,
        confidence=value.get("confidence", "auto"),
        nodes=tuple(nodes) or (None,),
        repeats=_whole(value, "repeats", MAX_REPEATS),
        entries=_entries_of(value),
        common=common,
        quality={"quality": value["quality"]} if "quality" in value else {},
        rests=rests,
        file=value)


def _slug(text: str) -> str:
    """Return a text with a dash for whatever does not belong into an id."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", text)
    return words.strip("-")[:64] or "experiment"


def _entries_of(file: Json) -> tuple[_Entry, ...]:
    """Return the scenarios of a file; the baseline of the whole comes first."""
    streams = _wholes(file, "streams", MAX_STREAMS)
    items = _list(file, "scenarios", (str, dict), "scenarios")
    has_axes = not {*_AXES, *_RATES}.isdisjoint(file)
    if not items and has_axes:
        items = ["transcode"]
    entries = [_entry_of(item, f"scenarios[{number}]", streams)
               for number, item in enumerate(items)]

    length = file.get("baseline")
    if length not in (None, False, 0):
        parameters = {}
        if length is not True:  # true: as long as a baseline is by default
            parameters["duration"] = _seconds(length, "baseline")
        baseline = _Entry("baseline", wire.BASELINE, None, (1,), parameters, is_baseline=True)
        return (baseline, *entries)
    if not entries:
        raise ValueError('scenarios must be a list of at least one, such as ["1080p30"]')
    return tuple(entries)


def _entry_of(item: Any, place: str, streams: tuple[int, ...]) -> _Entry:
    """Return a scenario: a word, or an object with parameters as in the seed's files."""
    if isinstance(item, str):
        return _Entry(place, item, None, streams, {})

    _refuse_unknown(item, f"{place}.", _ENTRY_FIELDS)
    kind = item.get("type", "multi" if "count" in item else "single")
    if kind not in _TYPES:
        raise ValueError(f"{place}.type must be one of {', '.join(_TYPES)}")

    name = _text(item, "name", "", f"{place}.") if "name" in item else None
    entry = _with_parameters(
        _Entry(place, item.get("scenario", "transcode"), name, streams, {}), item)
    if kind == "baseline":
        measured = {name: value for name, value in entry.parameters.items()
                    if name in _BASELINE_PARAMETERS}
        return entry._replace(scenario=wire.BASELINE, streams=(1,), parameters=measured,
                              is_baseline=True)
    if "count" in item:
        return entry._replace(streams=_wholes(item, "count", MAX_STREAMS, f"{place}."))
    return entry


def _with_parameters(entry: _Entry, item: Json) -> _Entry:
    """Return a scenario with the parameters of its object in the file, durations in s."""
    parameters = {name: value for name, value in item.items() if name not in _ENTRY_WORDS}
    if "stabilization" in item and "settle" not in item:
        parameters = {"settle": item["stabilization"], **parameters}
        entry = entry._replace(words={"settle": "stabilization"})

    for name in _SECONDS:
        if name in parameters:
            parameters[name] = _seconds(parameters[name], entry.place_of(name))
    return entry._replace(parameters=parameters)


def _refuse_unknown(value: Json, place: str, names: Sequence[str]) -> None:
    for name in value:
        if name in names:
            continue
        near = difflib.get_close_matches(name, names, 1, 0.6)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
        raise ValueError(f"unknown field {place}{wire.printable(name)[:64]}: {hint}")


def _text(value: Json, name: str, default: str, place: str = "") -> str:
    text = value.get(name, default)
    if isinstance(text, str) and 0 < len(text) <= 64 and wire.printable(text) == text:
        return text
    raise ValueError(f"{place}{name} must be a text of 1 to 64 characters")


def _list(value: Json, name: str, kinds: Any, what: str) -> list[Any]:
    """Return a list of values of some kinds without duplicates; [] where the field is absent."""
    items = value.get(name, [])
    if not isinstance(items, list) or (name in value and not items):
        raise ValueError(f"{name} must be a list of {what}")

    seen: set[str] = set()
    for number, item in enumerate(items):
        text = json.dumps(item, sort_keys=True)
        if not isinstance(item, kinds) or isinstance(item, bool):
            raise ValueError(f"{name}[{number}] must be one of the {what}, not {text[:40]}")
        if text in seen:
            raise ValueError(f"duplicate {name}[{number}]: use repeats to run all of it once more")
        seen.add(text)
    return items


def _wholes(value: Json, name: str, most: int, place: str = "") -> tuple[int, ...]:
    """Return a whole number, or each of a list of them; 1 where there is none."""
    given = value.get(name, 1)
    if isinstance(given, list) and given:
        return tuple(_whole({name: number}, name, most, place) for number in given)
    return (_whole(value, name, most, place),)


def _whole(value: Json, name: str, most: int, place: str = "") -> int:
    number = value.get(name, 1)
    if isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= most:
        return number
    raise ValueError(f"{place}{name} must be a whole number from 1 to {most}")


def _seconds(value: Any, place: str) -> Any:
    """Return the seconds of a duration; any other value stays, for resolve() to check."""
    if not isinstance(value, str):
        return value
    try:
        return wire.parse_duration(value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _points_of(matrix: _Matrix) -> list[_Point]:
    """Return the groups of the matrix in their order: repeats outermost, so that they interleave.

    A node that gets slower in the course of a day slows all cells alike, not the last ones alone.
    """
    cells = []
    jobs = 0
    for entry in matrix.entries:
        for cell in _cells_of(matrix, entry):
            cells.append((entry, cell))
            jobs += sum(entry.streams) * len(matrix.nodes) * matrix.repeats
        if jobs > MAX_BULK:
            raise ValueError(f"the file asks for more than {MAX_BULK} jobs")

    repeats: Iterable[int | None] = (None,)
    if matrix.repeats > 1:
        repeats = range(1, matrix.repeats + 1)
    return [_Point(entry, cell, node, streams, repeat)
            for repeat in repeats for entry, cell in cells for node in matrix.nodes
            for streams in entry.streams]


def _cells_of(matrix: _Matrix, entry: _Entry) -> list[_Cell]:
    """Return the cells of a scenario; a parameter that it sets itself is not an axis for it."""
    if entry.is_baseline:
        return [_Cell({}, {})]

    axes = []
    for plural, name in _AXES.items():
        if name not in entry.parameters:
            values = _axis_of_field(matrix.file, plural, name, plural)
            axes.append(values or [_Cell({}, {})])

    cells: list[_Cell] = []
    for parts in itertools.product(*axes):
        cell = _joined(parts)
        cells += [_joined((cell, rate)) for rate in _rates_of(matrix.file, entry, cell)]
        if len(cells) > MAX_BULK:
            break  # enough to be refused, and a product of long axes never ends
    return cells


def _axis_of_field(file: Json, field: str, name: str, what: str) -> list[_Cell]:
    """Return a cell of one parameter for each value of a field."""
    values = _list(file, field, (str, int, float), what)
    return [_Cell({name: value}, {name: f"{field}[{number}]"})
            for number, value in enumerate(values)]


def _joined(cells: Iterable[_Cell]) -> _Cell:
    values: Json = {}
    places: dict[str, str] = {}
    for cell in cells:
        values.update(cell.values)
        places.update(cell.places)
    return _Cell(values, places)


def _rates_of(file: Json, entry: _Entry, cell: _Cell) -> list[_Cell]:
    """Return the bitrates and crfs at which a cell is encoded; a file may list them by codec."""
    if any(name in entry.parameters for name in _RATES.values()):
        return [_Cell({}, {})]

    rates: list[_Cell] = []
    for plural, name in _RATES.items():
        values, field = file, plural
        by_codec = file.get(plural)
        if isinstance(by_codec, dict):
            _refuse_unknown(by_codec, f"{plural}.", tuple(wire.CODECS))
            parameters = {**entry.parameters, **cell.values}
            codec = _settings_of(entry, parameters, cell.places).codec
            field = f"{plural}.{codec}"
            values = {field: by_codec.get(codec)}
        rates += _axis_of_field(values, field, name, "rates")
    return rates or [_Cell({}, {})]


def _settings_of(entry: _Entry, parameters: Json, places: Mapping[str, str]) -> wire.Settings:
    """Return the settings that a job resolves to; ValueError names the place that is to blame."""
    try:
        return wire.resolve(entry.scenario, parameters)
    except ApiError as error:
        place = _place_of(error.field, entry, places)
        sentence = error.message
        if error.field:
            sentence = sentence.replace(error.field, place, 1)
        if not sentence.startswith(place):
            sentence = f"{place}: {sentence}"
        raise ValueError(sentence) from None


def _place_of(field: str | None, entry: _Entry, places: Mapping[str, str]) -> str:
    """Return the place in the file that a field of a job came from."""
    name = (field or "").replace("parameters.", "", 1)
    if name in places:
        return places[name]
    if name in entry.parameters:
        return entry.place_of(name)
    if not name or name == "scenario":
        return entry.place
    return f"parameters.{name}"


def _group_of(matrix: _Matrix, point: _Point) -> Group:
    """Return the submissions of one point of the matrix: one, or a stream each."""
    entry, streams = point.entry, point.streams
    parameters = _parameters_of(matrix, entry, point.cell)

    places = dict(point.cell.places)
    for name in (*matrix.rests, *matrix.quality):
        if name not in entry.parameters:
            places[name] = name  # a field of the file itself
    settings = _settings_of(entry, parameters, places)

    job: Json = {
        "scenario": entry.scenario,
        "confidence": matrix.confidence,
        "parameters": parameters,
    }
    if point.node:
        job["node"] = point.node

    jobs = [_submission(matrix, job, cell) for cell in _descriptions(point)]
    rests = entry.is_baseline or settings.settle or settings.cooldown
    if rests and streams == 1:
        jobs[0]["exclusive"] = True
    return Group(point.node or "", tuple(jobs))


def _parameters_of(matrix: _Matrix, entry: _Entry, cell: _Cell) -> Json:
    """Return the parameters of a job: those of the scenario override all others."""
    if entry.is_baseline:
        return {**matrix.rests, **entry.parameters}
    return {
        **matrix.common,
        **matrix.quality,
        **matrix.rests,
        **cell.values,
        **entry.parameters,
    }


def _descriptions(point: _Point) -> list[Json]:
    """Return the coordinates of each stream in the matrix: reports group jobs by them."""
    coordinates = {
        "name": point.entry.name,
        "scenario": point.entry.scenario,
        **point.cell.values,
        "node": point.node,
        "repeat": point.repeat,
        "streams": point.streams if point.streams > 1 else None,
    }
    known = {name: value for name, value in coordinates.items() if value is not None}
    if point.streams == 1:
        return [known]
    return [{**known, "stream": number} for number in range(1, point.streams + 1)]


def _submission(matrix: _Matrix, job: Json, cell: Json) -> Json:
    """Return a job with its id, and with its place in the experiment."""
    identity = json.dumps([matrix.id, cell, job], sort_keys=True)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, identity)),
        **job,
        "experiment": {"id": matrix.id, "name": matrix.name, "cell": cell},
    }


def _in_order(groups: Iterable[Group]) -> Iterator[Group]:
    """Yield groups of which streams wait for all before them on their node, others for streams.

    Of more jobs than the master's limit the last are named: the queue is in order, so the others
    began earlier.
    """
    streams: dict[str, list[str]] = {}  # by node: the ids of the last streams …
    since: dict[str, list[str]] = {}    # … and of the jobs since then
    for group in groups:
        node, ids = group.node, [job["id"] for job in group.jobs]
        together = len(group.jobs) > 1
        after = streams.get(node, [])
        if together:
            after = since.get(node) or after
            streams[node], since[node] = ids, []
        else:
            since.setdefault(node, []).extend(ids)

        if after:
            jobs = [{**job, "after": after[-MAX_AFTER:]} for job in group.jobs]
            group = group._replace(jobs=tuple(jobs))
        yield group


def experiment_batches(jobs: Iterable[Json], limit_bytes: int) -> Iterator[list[Json]]:
    """Yield submissions in their order, in as few requests as a limit of their size allows.

    Nearly always that is one, which the master takes whole or not at all. Many streams that wait
    for many others name so many ids that it may be more; submitting again is safe.
    """
    batch: list[Json] = []
    size = 0
    for job in jobs:
        length = len(json.dumps(job)) + 2
        if batch and size + length > limit_bytes:
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += length
    if batch:
        yield batch


def experiment_progress(jobs: Iterable[wire.JobView], total: int) -> Json:
    """Return how far an experiment is, as a job's progress: what ended, what runs, the time left.

    The time left is by the mean of the completed jobs, on as many slots as are at work now.
    """
    jobs = list(jobs)
    counts = dict.fromkeys(STATUSES, 0)
    for job in jobs:
        counts[job.status] = counts.get(job.status, 0) + 1
    ended = sum(counts[status] for status in FINAL)
    parts = [f"{ended} of {wire.count_text(total, 'job')} ended"]
    parts += [f"{counts[status]} {status}" for status in ("running", "paused", "failed", "canceled")
              if counts[status]]

    times_s = [_run_time_s(job) for job in jobs if job.status == "completed"]
    left_s = None
    if times_s:
        mean_s = sum(times_s) / len(times_s)
        left_s = mean_s * (total - ended) / max(1, counts["running"])
    percent = 100 * ended / max(1, total)
    return {"phase": ", ".join(parts), "percent": percent, "eta_s": left_s}


def _run_time_s(job: wire.JobView) -> float:
    started = epoch_of(job.json.get("started_at")) or 0.0
    completed = epoch_of(job.json.get("completed_at")) or 0.0
    return completed - started


# ---- 23 Reports ----------------------------------------------------------------------------------

# A report compares jobs. Each job is a row; rows with the same content are comparable, those with
# the same curve and rate are repeats of each other, and a curve is a line of rates in a plot.
# This section has the rows and their statistics, Documents the forms that a report takes.

# In the order of preference: where one is enough, the first that is known is shown.
QUALITIES = (
    FIGURES["vmaf"],
    FIGURES["xpsnr_db"],
    FIGURES["psnr_db"],
    FIGURES["ssim"],
)
# What an encode costs: BD-rate, BD-energy and BD-time are over these.
COSTS = (
    FIGURES["bitrate_kbps"],
    FIGURES["energy_joules"],
    FIGURES["duration"],
)


def amount_text(value: float | None, unit: str = "", digits: int = 3) -> str | None:
    """Return a value with its unit and without exponent: `0.00123 EUR`, `45.7 Wh`, `12345 J`.

    Whole numbers print whole, however few `digits` count.
    """
    if value is None:
        return None

    magnitude = 0
    if value:
        magnitude = math.floor(math.log10(abs(value)))
    # From 12 places on a double has no digits that mean anything.
    places = min(12, max(0, digits - 1 - magnitude))
    return f"{value:.{places}f} {unit}".rstrip()


def figure_of(metrics: Mapping[str, Any], name: str) -> float | None:
    """Return a metric that may be missing as a finite number; only a price may be below zero."""
    if name not in PRICES:
        return finite(metrics, name)

    value = metrics.get(name)
    if isinstance(value, (int, float)) and abs(value) < MAX_FIGURE:
        return float(value)
    return None


def unit_of(metric: wire.Metric, metrics: Mapping[str, Any]) -> str:
    """Return the unit of a metric; that of a price is the currency of the tariff at that time."""
    if metric.unit == wire.CURRENCY:
        return str(metrics.get("currency") or "")
    return metric.unit


def is_estimated(metrics: Mapping[str, Any], name: str) -> bool:
    """Return whether a metric follows from energy that a power model estimated."""
    return name in OF_ENERGY and bool(metrics.get("energy_estimated"))


def figure_text(metrics: Mapping[str, Any], name: str, unit: str | None = None) -> str | None:
    """Return a metric for people in its own unit, or another; `~` marks an estimate."""
    value = figure_of(metrics, name)
    if value is None:
        return None

    metric = FIGURES[name]
    if name == "output_bytes":
        return wire.size_text(value)
    if unit is None:
        text = _cell_of(metric, value, unit_of(metric, metrics))
    else:
        text = amount_text(value, unit, metric.digits)
    return f"~{text}" if is_estimated(metrics, name) else text


def _cell_of(metric: wire.Metric, value: float, unit: str) -> str | None:
    """Return a figure in the words of `show`, short enough for a table on the terminal."""
    if metric.name == "duration":
        return wire.duration_text(value)
    if metric.short:
        return metric.short.format(value)
    return amount_text(value, unit, metric.digits)


def with_energy_wh(metrics: Mapping[str, Any]) -> Json:
    """Return metrics with energy in Wh too; agents of other programs know joules alone."""
    joules = finite(metrics, "energy_joules")
    if joules is None:
        return dict(metrics)
    return {**metrics, "energy_wh": joules / JOULES_PER_WH}


def cost_text(metrics: Mapping[str, Any]) -> str | None:
    """Return the cost of an attempt's energy as one phrase; None where nothing was priced."""
    known = with_energy_wh(metrics)
    whole = (figure_text(known, "energy_wh"), figure_text(known, "energy_cost"),
             figure_text(known, "carbon_g", "g CO2e"))
    minute = (figure_text(known, "energy_wh_per_minute", "Wh"),
              figure_text(known, "cost_per_minute"),
              figure_text(known, "carbon_g_per_minute", "g CO2e"))
    phrase = ", ".join(filter(None, whole))
    per_minute = ", ".join(filter(None, minute))
    if phrase and per_minute:
        return f"{phrase}; a minute of output: {per_minute}"
    return phrase or None


# A row is plain text and numbers: it goes into JSON and CSV as it is, and results of agents of
# others, which may hold anything, have been made harmless by then.

class Row(NamedTuple):
    """One job and its result, as tables and plots see it.

    `content` is the film as it was encoded, `rendition` its size and frame rate, `curve` the
    encoder and preset, `rate` the quality or bitrate that was asked for, `more` the other
    parameters that change the cost of an encode.
    """

    job: str
    status: str
    node: str
    content: str
    rendition: str
    curve: str
    rate: str
    streams: int
    error: str
    verdict: str
    metrics: Json
    statistics: Json
    series: Json
    more: Mapping[str, str]
    jobs: int = 1  # of which this row is the mean

    @property
    def beside(self) -> str:
        """The number of streams that ran side by side, where there were several."""
        return f" ×{self.streams}" if self.streams > 1 else ""

    @property
    def label(self) -> str:
        """The work, for people."""
        return f"{self.curve} {self.rate}".strip() + self.beside

    def interval(self, name: str) -> tuple[float, float] | None:
        """Return the 95 % interval of a mean; None of a single run."""
        statistic = _part(self.statistics, name)
        low, high = finite(statistic, "ci95_low"), finite(statistic, "ci95_high")
        if low is None or high is None:
            return None
        return low, high

    def figure(self, name: str) -> float | None:
        """Return a metric; None where it is unknown."""
        return figure_of(self.metrics, name)

    def reason(self, name: str) -> str:
        """Return the reason why a metric is unknown."""
        reason = _part(self.metrics, "unknown").get(name) or self.error
        if reason:
            return str(reason)
        # Nobody gave a reason: the metric is of a newer or an older version, or the job has no
        # result.
        return "not measured" if self.status == "completed" else self.status


# Parameters that change the cost of an encode and are neither content, curve nor rate
_MORE = (
    "audio",
    "container",
    "gop",
    "two_pass",
    "realtime",
    "hwaccel",
    "threads",
    "pixel_format",
    "max_memory_mb",
    "max_cpu_percent",
)


def row_of(job: wire.JobView) -> Row:
    """Return the row of a job that the master was asked about alone."""
    result = job.result or wire.ResultView.from_json({})
    content, rendition, curve, rate = _work_of(job, result)
    cell = _part(job.experiment, "cell")
    fields = wire.Fields(job.json, lenient=True)

    more = {}
    for name in _MORE:
        value = job.parameters.get(name)
        if value is not None and value != "":
            more[name] = str(value).lower()

    return Row(
        job=job.short_id,
        status=job.status,
        node=result.node or fields.words("node"),  # without a result: the one that it is pinned to
        content=content,
        rendition=rendition,
        curve=curve,
        rate=rate,
        streams=int(finite(cell, "streams") or 1),
        error=job.error,
        verdict=result.recommendation,
        metrics=with_energy_wh(result.metrics),
        statistics=result.statistics,
        series=result.series,
        more=more)


def _work_of(job: wire.JobView, result: wire.ResultView) -> tuple[str, str, str, str]:
    """Return content, rendition, curve and rate of a job; a baseline has neither film nor rate."""
    seconds = finite(job.settings, "duration")
    length = f"{seconds:g} s" if seconds else ""
    # A baseline has settings of an encode that never ran: two baselines would look different.
    if wire.is_baseline(job.scenario):
        return f"idle machine {length}".rstrip(), "", "idle", ""

    film = str(job.settings.get("input") or "generated source")
    film = re.sub("//[^/@]*@", "//", film)  # a report may be passed on: without passwords
    rendition = _rendition_of(job.settings, _part(result.json, "encode"))
    content = ", ".join(filter(None, (f"{film} {rendition}", length)))
    return content, rendition, _curve_of(job.settings, result), _rate_of(job.settings)


def _rendition_of(settings: Json, encode: Json) -> str:
    """Return size and frame rate: of the output where the agent reported it, else as asked for."""
    size = "size of the input"
    for known in (encode, settings):
        width, height = finite(known, "width"), finite(known, "height")
        if width and height:
            size = f"{width:.0f}x{height:.0f}"
            break

    # Without a rate every frame of the source is kept, and it may change: there is none to name.
    fps = finite(settings, "fps")
    return f"{size} {fps:g} fps" if fps else size


def _curve_of(settings: Json, result: wire.ResultView) -> str:
    encoder = result.encoder or settings.get("encoder") or settings.get("codec")
    preset = result.preset or settings.get("preset")
    return " ".join(str(word) for word in (encoder, preset) if word)


def _rate_of(settings: Json) -> str:
    crf = finite(settings, "crf")
    quality = "" if crf is None else f"crf {crf:g}"
    return f"{quality} {settings.get('bitrate') or ''}".strip()


def distinct_curves(rows: Sequence[Row]) -> list[Row]:
    """Return rows whose curves name every further parameter in which they differ.

    Means are of equals alone: without the name, jobs with other `threads` would count as repeats.
    """
    encodes = [row for row in rows if row.rendition]
    differing = []
    for name in _MORE:
        values = {row.more.get(name) for row in encodes}
        if len(values) > 1:
            differing.append(name)

    def curve(row: Row) -> str:
        words = [f"{name}={row.more[name]}" for name in differing if name in row.more]
        return " ".join((row.curve, *words))
    return [row._replace(curve=curve(row)) for row in rows]


_Item = TypeVar("_Item")


def grouped(items: Iterable[_Item], key: Callable[[_Item], Any]) -> dict[Any, list[_Item]]:
    """Return items by their key, in the order in which the keys first occur."""
    groups: dict[Any, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def rows_with(rows: Iterable[Row], *names: str) -> list[Row]:
    """Return the rows in which all these metrics are known."""
    return [row for row in rows if None not in map(row.figure, names)]


def points_of(rows: Iterable[Row], x: str, y: str) -> Points:
    """Return two metrics of the rows in which both are known."""
    points = []
    for row in rows:
        here, there = row.figure(x), row.figure(y)
        if here is not None and there is not None:
            points.append((here, there))
    return points


def mean_rows(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[Row]:
    """Return one row for each group of equals: means of what is known, with their 95 % intervals.

    A row that is alone in its group keeps the intervals of its own repeats.
    """
    return [_mean_row(group) for group in grouped(rows, key).values()]


def _mean_row(group: Sequence[Row]) -> Row:
    first = group[0]
    metrics, statistics = dict(first.metrics), dict(first.statistics)
    for name in FIGURES:
        figures = [row.figure(name) for row in group]
        values = [figure for figure in figures if figure is not None]
        metrics[name] = sum(values) / len(values) if values else None
        if len(values) > 1:
            statistic = wire.interval(values)
            low = max(0.0, statistic["ci95_low"])  # nothing that is measured here is below zero
            statistics[name] = {**statistic, "ci95_low": low}

    # A mean of which one part is an estimate is an estimate.
    estimates = [row.metrics.get("energy_estimated") for row in group]
    metrics["energy_estimated"] = any(estimates)
    return first._replace(metrics=metrics, statistics=statistics, jobs=len(group))


def curves_of(rows: Iterable[Row], cost: str, quality: str) -> dict[str, Points]:
    """Return the points (cost, quality) of each curve, one for each rate: the mean of its repeats.

    A rate is the same on every node. Time and energy are not: there nodes, and numbers of streams,
    have curves of their own.
    """
    known = rows_with(rows, cost, quality)
    nodes = {row.node for row in known}

    def name(row: Row) -> str:
        if cost == "bitrate_kbps":
            return row.curve
        node = f" on {row.node}" if len(nodes) > 1 else ""
        return f"{row.curve}{row.beside}{node}"

    means = mean_rows(known, lambda row: (name(row), row.rate))
    curves: dict[str, Points] = {}
    for label, group in grouped(means, name).items():
        curves[label] = sorted(points_of(group, cost, quality))
    return curves


MIN_OVERLAP = 0.25     # of the wider range of qualities: less says little about the curves
MIN_POINTS = 4         # as in the JVET common test conditions
MAX_LOG_DISTANCE = 6   # powers of ten; beyond it the costs are not of the same kind of work
MAX_CURVES_PAIRED = 4  # six pairs; of more curves each is compared with the first alone


def bd_percent(anchor: Points, test: Points) -> float:
    """Return by how many percent `test` costs more than `anchor` at equal quality.

    Points are (cost, quality). After G. Bjøntegaard, VCEG-M33 (2001): the mean distance between
    the two curves of log cost over quality, taken where both have points, never outside. The
    curves are piecewise cubic Hermite polynomials (PCHIP), as in JCTVC-L1100 and the JVET common
    test conditions. ValueError says why there is no such figure.
    """
    low, high = _common_range(anchor, test)
    areas = []
    for points in (anchor, test):
        curve = sorted((quality, math.log10(cost)) for cost, quality in points)
        areas.append(_pchip_area(curve, low, high))

    # The mean of the logarithms' distance is that of the ratio between the costs.
    distance = (areas[1] - areas[0]) / (high - low)
    if abs(distance) > MAX_LOG_DISTANCE:
        raise ValueError("the costs differ by more than a factor of a million")
    return (10 ** distance - 1) * 100


def _common_range(anchor: Points, test: Points) -> tuple[float, float]:
    """Return the range of quality that two curves share; ValueError when there is none."""
    ranges = [_quality_range(points) for points in (anchor, test)]
    low = max(first for first, _ in ranges)
    high = min(last for _, last in ranges)

    widest = max(last - first for first, last in ranges)
    if high - low < MIN_OVERLAP * widest:
        raise ValueError("not enough overlap of the qualities")
    return low, high


def _quality_range(points: Points) -> tuple[float, float]:
    """Return the range of quality of a curve; ValueError where no curve goes through its points."""
    if len(points) < MIN_POINTS:
        raise ValueError(f"fewer than {MIN_POINTS} points")

    costs = [cost for cost, _ in points]
    qualities = {quality for _, quality in points}
    if len(qualities) < len(points) or min(costs) <= 0:
        raise ValueError("points of the same quality, or without cost")
    return min(qualities), max(qualities)


class _Piece(NamedTuple):
    """The stretch between two neighbouring points of a curve: its width, and its rise per width."""

    width: float
    rise: float


def _pchip_area(points: Points, low: float, high: float) -> float:
    """Return the area under the monotone cubic through points (x ascending), from low to high.

    Slopes at the inner points are the weighted harmonic means of Fritsch and Butland (1984), which
    keep the curve monotone where the points are (Fritsch and Carlson, 1980).
    """
    pieces = []
    for (x, y), (next_x, next_y) in zip(points, points[1:]):
        width = next_x - x
        pieces.append(_Piece(width, (next_y - y) / width))

    slopes = [_end_slope(pieces[0], pieces[1])]
    slopes += map(_inner_slope, pieces, pieces[1:])
    slopes.append(_end_slope(pieces[-1], pieces[-2]))

    area = 0.0
    for number, piece in enumerate(pieces):
        x, y = points[number]
        cubic = _cubic_of(y, piece, slopes[number], slopes[number + 1])
        begin = _clamped((low - x) / piece.width)
        end = _clamped((high - x) / piece.width)
        for power, factor in enumerate(cubic, 1):  # integrated term by term
            area += piece.width * factor * (end ** power - begin ** power) / power
    return area


def _cubic_of(y: float, piece: _Piece, left: float, right: float) -> tuple[float, ...]:
    """Return the Hermite cubic of a piece over 0 … 1, by ascending powers, from its end slopes."""
    width, rise = piece
    return (
        y,
        left * width,
        (3 * rise - 2 * left - right) * width,
        (left + right - 2 * rise) * width,
    )


def _clamped(part: float) -> float:
    return min(1.0, max(0.0, part))


def _inner_slope(left: _Piece, right: _Piece) -> float:
    """Return the slope between two pieces: 0 at a turn, else their weighted harmonic mean."""
    if left.rise * right.rise <= 0:
        return 0.0

    left_weight = left.width + 2 * right.width
    right_weight = 2 * left.width + right.width
    weights = left_weight + right_weight
    return weights / (left_weight / left.rise + right_weight / right.rise)


def _end_slope(end: _Piece, inner: _Piece) -> float:
    """Return the slope at an end: of the parabola through three points, kept in their shape."""
    both = end.width + inner.width
    slope = ((both + end.width) * end.rise - end.width * inner.rise) / both
    if slope * end.rise <= 0:
        return 0.0

    # The parabola may overshoot where the curve turns: three times the rise is the most that keeps
    # a piece monotone.
    turns = end.rise * inner.rise <= 0
    if turns and abs(slope) > 3 * abs(end.rise):
        return 3 * end.rise
    return slope


class Delta(NamedTuple):
    """By how many percent `test` costs more than `anchor` at equal quality, or `why` unknown."""

    content: str
    cost: str
    quality: str
    anchor: str
    test: str
    percent: float | None = None
    why: str = ""
    estimated: bool = False

    def text(self) -> str | None:
        """Return the figure for people, with `~` where a cost of either curve is an estimate."""
        if self.percent is None:
            return None
        mark = "~" if self.estimated else ""
        return f"{mark}{self.percent:+.1f} %"


def deltas_of(rows: Sequence[Row]) -> list[Delta]:
    """Return BD-rate, BD-energy and BD-time between the curves of each content, pair by pair."""
    deltas = []
    for content, group in grouped(rows, lambda row: row.content).items():
        for cost, quality in itertools.product(COSTS, QUALITIES):
            known = rows_with(group, cost.name, quality.name)
            estimates = [is_estimated(row.metrics, cost.name) for row in known]
            curves = curves_of(known, cost.name, quality.name)
            for anchor, test in _pairs(list(curves)):
                delta = Delta(content, cost.label, quality.name, anchor, test,
                              estimated=any(estimates))
                deltas.append(_computed(delta, curves))
    return deltas


def _computed(delta: Delta, curves: Mapping[str, Points]) -> Delta:
    """Return a difference with its figure, or with the reason why there is none."""
    try:
        percent = bd_percent(curves[delta.anchor], curves[delta.test])
    except ValueError as error:
        return delta._replace(why=str(error))
    return delta._replace(percent=percent)


# The number of pairs grows with the square of the curves: a table of 20 codecs would have 190
# lines.
def _pairs(labels: Sequence[str]) -> list[tuple[str, str]]:
    if len(labels) <= MAX_CURVES_PAIRED:
        return list(itertools.combinations(labels, 2))
    return [(labels[0], label) for label in labels[1:]]


def front_of(points: Sequence[tuple[float, ...]]) -> set[int]:
    """Return the numbers of the points that no other beats; in each dimension less is better.

    In ascending order only an earlier point can beat one, and only those of the front need
    comparing: the point that beats a beaten one beats everything that one beats.
    """
    front: list[int] = []
    for number in sorted(range(len(points)), key=points.__getitem__):
        point = points[number]
        if not any(_beats(points[other], point) for other in front):
            front.append(number)
    return set(front)


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Return whether a point is as good as another in each dimension and better in one."""
    return one != other and all(a <= b for a, b in zip(one, other))


# ---- 24 Documents --------------------------------------------------------------------------------

# A report as a page is one file that is mailed, archived and opened from a disk years later: it
# runs no script and fetches nothing. Curves differ in dash and marker too, for print and for eyes
# that see no difference in their colours. All text in it is text of others and passes
# html_text().

class Document(NamedTuple):
    """A report as it is written down: its title, a row for each job, and when it was made."""

    title: str
    rows: Sequence[Row]
    made_at: str

    @property
    def completed(self) -> list[Row]:
        """The jobs that completed."""
        return [row for row in self.rows if row.status == "completed"]

    @property
    def encodes(self) -> list[Row]:
        """The completed jobs that encoded something: all but baselines."""
        return [row for row in self.completed if row.rendition]


MAX_CONTENTS = 12  # films with plots of their own on one page; the tables have all
MAX_LABELS = 40    # lines of a plot of nodes that can still be read


def _rate_plots(rows: Sequence[Row]) -> list[Plot]:
    """Return quality over rate, for each quality of which a curve has two points."""
    rate = FIGURES["bitrate_kbps"]
    plots = []
    for quality in QUALITIES:
        curves = curves_of(rows, rate.name, quality.name)
        if max(map(len, curves.values()), default=0) < 2:
            continue
        plots.append(Plot(
            title=f"{quality.label} over {rate.label}",
            x=rate.axis,
            y=quality.axis,
            curves=[Curve(label, points) for label, points in curves.items()],
            log=True))  # quality grows about with the logarithm of the rate
    return plots


def _front_plots(rows: Sequence[Row]) -> list[Plot]:
    """Return quality over time and energy; the Pareto front of all three is filled and joined."""
    qualities = [metric for metric in QUALITIES if rows_with(rows, metric.name)]
    times = (FIGURES["duration"], FIGURES["energy_joules"])
    axes = [metric for metric in times if rows_with(rows, metric.name)]
    if not qualities:
        return []

    quality = qualities[0]
    names = [quality.name, *(axis.name for axis in axes)]
    cells = mean_rows(rows_with(rows, *names),
                      lambda row: (row.curve, row.rate, row.streams, row.node))
    if len(cells) < 3:  # two points have no front worth a picture
        return []

    ranks = [_rank(cell, quality, axes) for cell in cells]
    front = front_of(ranks)
    note = ""
    if len(axes) < 2:
        reason = rows[0].reason("energy_joules")
        note = f"energy is unknown, so the front is of quality and time: {reason}"

    plots = []
    for axis in axes:
        curves = _front_curves(cells, front, axis.name, quality.name)
        plots.append(Plot(
            title=f"Pareto front: {quality.label} over {axis.label}",
            x=_axis_of(axis, cells),
            y=quality.axis,
            curves=curves,
            zero="x",
            note=note))
    return plots


def _rank(row: Row, quality: wire.Metric, costs: Iterable[wire.Metric]) -> tuple[float, ...]:
    """Return a row as a point of which less is better in each dimension."""
    rank = [-(row.figure(quality.name) or 0)]
    for cost in costs:
        rank.append(row.figure(cost.name) or 0)
    return tuple(rank)


def _front_curves(cells: Sequence[Row], front: Container[int], x: str, y: str) -> list[Curve]:
    """Return the cells by curve, hollow unless they are of the front, and the front itself."""
    curves = []
    by_curve = grouped(range(len(cells)), lambda number: cells[number].curve)
    for label, numbers in by_curve.items():
        points = points_of([cells[number] for number in numbers], x, y)
        hollow = [at for at, number in enumerate(numbers) if number not in front]
        curves.append(Curve(label, points, joined=False, hollow=frozenset(hollow)))

    best_cells = [cell for number, cell in enumerate(cells) if number in front]
    best = points_of(best_cells, x, y)
    label = "the front (filled): no other is better in all"
    curves.append(Curve(label, sorted(best), marked=False))
    return curves


def _axis_of(metric: wire.Metric, rows: Iterable[Row]) -> str:
    """Return the text at an axis; it says where one of the rows has an estimate."""
    estimated = any(is_estimated(row.metrics, metric.name) for row in rows)
    return f"{metric.axis} (estimated)" if estimated else metric.axis


def _node_plots(rows: Sequence[Row]) -> list[Plot]:
    """Return time and energy of each work, node by node."""
    plots = []
    for name in ("duration", "energy_joules"):
        cells = mean_rows(rows_with(rows, name), lambda row: (row.node, row.label))
        if cells:
            plots.append(_node_plot(FIGURES[name], cells))
    return plots


def _node_plot(metric: wire.Metric, cells: Sequence[Row]) -> Plot:
    """Return a metric of each work as a row of markers, one for each node, with their intervals."""
    labels = list(dict.fromkeys(cell.label for cell in cells))
    names = labels[:MAX_LABELS]
    shown = [cell for cell in cells if cell.label in names]

    curves = []
    for node, group in grouped(shown, lambda cell: cell.node).items():
        points = []
        for cell in group:
            height = float(names.index(cell.label))
            points.append((cell.figure(metric.name) or 0.0, height))
        spans = [cell.interval(metric.name) for cell in group]
        curves.append(Curve(node, points, joined=False, spans=spans))

    # Bars that overlap say that the nodes may well be equal: without them a picture would lie.
    note = "each ran once: no interval is known"
    if any(span for curve in curves for span in curve.spans):
        note = "bars: 95 % interval of the mean"
    if len(labels) > MAX_LABELS:
        note += f"; the first {MAX_LABELS} of {len(labels)}"
    nodes = ", ".join(curve.label for curve in curves)
    return Plot(
        title=f"{metric.label.capitalize()} by node: {nodes}",
        x=_axis_of(metric, cells),
        y="",
        curves=curves,
        names=names,
        zero="x",
        note=note)


# series of a result -> its title and its metric; the first that any job has chooses the job to show
_SAMPLED = {"power_watts": "Power", "cpu_usage": "CPU use"}


def _samples(row: Row, name: str) -> Points:
    """Return (s, value) of the known samples of a job; [] of fewer than two."""
    times, values = row.series.get("seconds"), row.series.get(name)
    if not isinstance(times, list) or not isinstance(values, list):
        return []

    points = []
    for time_s, value in zip(times, values):
        sample = {"time": time_s, "value": value}
        x, y = finite(sample, "time"), finite(sample, "value")
        if x is not None and y is not None:
            points.append((x, y))
    return points if len(points) > 1 else []


def _power_plots(rows: Sequence[Row]) -> tuple[list[Plot], str]:
    """Return power and CPU use over time of the job with the longest series, or why not."""
    for name in _SAMPLED:
        sampled = [row for row in rows if _samples(row, name)]
        if sampled:
            break
    else:
        return [], "no result holds samples"

    row = max(sampled, key=lambda row: _samples(row, name)[-1])
    plots = []
    for name, title in _SAMPLED.items():
        if _samples(row, name):
            plots.append(_series_plot(row, name, title))
    if _samples(row, "power_watts"):
        return plots, ""
    return plots, f"power is unknown: {row.reason('power_watts')}"


def _series_plot(row: Row, name: str, title: str) -> Plot:
    points = _samples(row, name)
    curves = [Curve(title, points, marked=False)]
    idle = row.figure("idle_watts")
    if name == "power_watts" and idle is not None:
        level = [(points[0][0], idle), (points[-1][0], idle)]
        curves.append(Curve("idle", level, marked=False))

    mark = "~ " if is_estimated(row.metrics, name) else ""
    return Plot(
        title=f"{mark}{title} of job {row.job}: {row.label} on {row.node}",
        x="time, s",
        y=_axis_of(FIGURES[name], [row]),
        curves=curves,
        zero="y")


# A reason can be a whole sentence and is often the same for a column: cells refer to it by a
# number.
class _Notes(dict[str, int]):
    """The reasons under a table, numbered in the order in which its cells refer to them."""

    def unknown(self, reason: str) -> str:
        """Return the cell of an unknown figure, with the number of its reason."""
        number = self.setdefault(reason, len(self) + 1)
        return f'<span class="none">unknown<sup>{number}</sup></span>'

    def html(self) -> str:
        """Return the list of the reasons."""
        items = "".join(f"<li>{html_text(reason)}</li>" for reason in self)
        return f'<ol class="note">{items}</ol>' if items else ""


def _wide_table(heads: Iterable[str], rows: Iterable[Sequence[str]], texts: int = 3) -> str:
    """Return a table that scrolls by itself where it is wider than the page."""
    return f'<div class="wide">{table_html(heads, rows, texts)}</div>'


def _metrics_table(lines: Sequence[tuple[Mapping[str, str], Row]],
                   metrics: Sequence[wire.Metric]) -> str:
    """Return a table of rows, each after the words that it begins with, by their heads.

    A metric has a column when it is known of a row, or is unknown though it was wanted.
    """
    rows = [row for _, row in lines]
    known = [metric for metric in metrics if rows_with(rows, metric.name)]
    wanted = [metric for metric in metrics if _is_wanted(metric, rows)]
    shown = [metric for metric in metrics if metric in known or metric in wanted]
    if not known:
        return _reasons_note(rows, shown)

    notes = _Notes()
    cells = []
    for words, row in lines:
        texts = [html_text(word) for word in words.values()]
        figures = [_figure_cell(row, metric, notes) for metric in shown]
        cells.append([*texts, *figures])

    first_words, _ = lines[0]
    heads = [*first_words, *(_column_head(metric, rows) for metric in shown)]
    return _wide_table(heads, cells, len(first_words)) + notes.html()


def _reasons_note(rows: Iterable[Row], metrics: Sequence[wire.Metric]) -> str:
    """Return the reasons why a table has no figure at all; "" where it has no column either."""
    reasons = {row.reason(metric.name): None for row in rows for metric in metrics}
    if not reasons:
        return ""
    return _note(f"unknown: {'; '.join(reasons)}")


def _is_wanted(metric: wire.Metric, rows: Iterable[Row]) -> bool:
    """Return whether a metric is unknown in a row for another reason than that nobody wanted it.

    Scores alone have to be asked for, and the table of metrics has the reason of one that was not.
    """
    not_asked = metric.unknown if metric.table == wire.QUALITY_TABLE else None
    for row in rows:
        reason = _part(row.metrics, "unknown").get(metric.name)
        if reason is not None and reason != not_asked:
            return True
    return False


def _column_head(metric: wire.Metric, rows: Iterable[Row]) -> str:
    """Return the head of a column with the unit that its rows have."""
    if metric.unit != wire.CURRENCY:
        return metric.axis
    # Prices in two currencies cannot stand in one column under one head; a master has one tariff.
    for row in rows:
        currency = unit_of(metric, row.metrics)
        if currency:
            return metric._replace(unit=currency).axis
    return metric._replace(unit="").axis


def _figure_cell(row: Row, metric: wire.Metric, notes: _Notes) -> str:
    text = figure_text(row.metrics, metric.name, unit="")
    if text is None:
        return notes.unknown(row.reason(metric.name))
    return html_text(text)


def _delta_table(deltas: Sequence[Delta]) -> str:
    """Return the differences at equal quality: a row for each cost of a pair of curves."""
    notes = _Notes()
    qualities = list(dict.fromkeys(delta.quality for delta in deltas))
    lines = []
    by_line = grouped(deltas, lambda delta: (delta.cost, delta.test, delta.anchor))
    for (cost, test, anchor), group in by_line.items():
        cells = [f"BD-{cost}", html_text(test), html_text(anchor)]
        by_quality = {delta.quality: delta for delta in group}
        for quality in qualities:
            delta = by_quality.get(quality)
            if delta is None:
                cells.append(notes.unknown("not measured"))
            else:
                cells.append(delta.text() or notes.unknown(delta.why))
        lines.append(cells)

    heads = [f"equal {FIGURES[name].label}" for name in qualities]
    return _wide_table(["", "this", "against", *heads], lines) + notes.html()


_REPORT_STYLE = """
:root{color-scheme:light dark;--text:#1b1f24;--soft:#57606a;--rule:#d8dee4;--back:#fff}
body{font:15px/1.45 system-ui,sans-serif;margin:1.5rem auto;max-width:68rem;padding:0 1rem;
color:var(--text);background:var(--back)}h1{margin:0 0 .2rem}h3{margin:1.4rem 0 .2rem}
h2{margin:2.2rem 0 .6rem;border-bottom:1px solid var(--rule)}
.note,.lead,.none{color:var(--soft);font-size:13px}.none{font-size:12px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));
gap:1.2rem 1.5rem}
figure{margin:0;break-inside:avoid;max-width:36rem}figcaption{font-weight:600}
svg{width:100%;height:auto;display:block}svg text{font:12px system-ui,sans-serif;fill:var(--text)}
.grid{stroke:var(--rule);stroke-width:.7}.axis{stroke:var(--soft);fill:none}
g[class]{stroke:var(--c);fill:var(--c)}g .line{fill:none;stroke-width:2}
g .hollow{fill:var(--back);stroke-width:1.5}
.keys{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;margin:.2rem 0;padding:0;
font-size:13px}
.keys li{display:flex;align-items:center}.key{width:34px;height:14px;margin-right:.4rem;flex:none}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px;margin:.4rem 0}
th,td{text-align:left;padding:.2rem .8rem .2rem 0;border-bottom:1px solid var(--rule);
vertical-align:top}
td{white-space:nowrap}.n{text-align:right;font-variant-numeric:tabular-nums}sup{line-height:0}
@media screen and (prefers-color-scheme:dark){
:root{--text:#e6edf3;--soft:#9aa4ae;--rule:#30363d;--back:#0d1117}}
@media print{@page{margin:14mm}:root{color-scheme:light}
body{margin:0;max-width:none;font-size:11px}
table{font-size:8.5px}th,td{padding:.1rem .4rem .1rem 0}tr{break-inside:avoid}
.wide{overflow:visible}
.plots{grid-template-columns:1fr 1fr}h2,h3{break-after:avoid}
.keys,.note,.lead,.none{font-size:8.5px}}
""" + "".join(f".c{number}{{--c:{colour}}}" for number, colour in enumerate(_COLOURS))


def report_html(document: Document) -> str:
    """Return the whole report as one page that fetches nothing and runs no script."""
    title = html_text(document.title)
    sampled = document.encodes or document.completed
    body = [
        _lead_html(document),
        *_contents_html(document.encodes),
        _plots_html("Power over time", *_power_plots(sampled)),
        *_tables_html(document),
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_REPORT_STYLE}</style>{''.join(body)}</html>\n"
    )


def _lead_html(document: Document) -> str:
    """Return the title of a report and how many jobs of which nodes it is about."""
    rows = document.rows
    by_status = grouped(rows, lambda row: row.status)
    counts = ", ".join(f"{len(group)} {status}" for status, group in by_status.items())
    nodes = ", ".join(dict.fromkeys(row.node for row in rows if row.node))
    lead = (f"{counts or 'no jobs'} on {nodes or 'no node'}; "
            f"made {document.made_at} by ffdist {VERSION}")

    parts = [f"<h1>{html_text(document.title)}</h1>", _lead(lead)]
    if any(row.metrics.get("energy_estimated") for row in rows):
        parts.append(_lead("~ marks energy that is estimated by a power model, not measured."))
    return "".join(parts)


def _lead(text: str) -> str:
    return f'<p class="lead">{html_text(text)}</p>'


def _contents_html(encodes: Sequence[Row]) -> list[str]:
    """Return the plots and the differences of each content."""
    contents = grouped(encodes, lambda row: row.content)
    parts = []
    for content, group in list(contents.items())[:MAX_CONTENTS]:
        plots = [*_rate_plots(group), *_front_plots(group), *_node_plots(group)]
        parts.append(_plots_html(content, plots))
        deltas = deltas_of(group)
        if deltas:
            parts.append("<h3>What one costs more or less than another, at equal quality</h3>")
            parts.append(_delta_table(deltas))

    left = len(contents) - MAX_CONTENTS
    if left > 0:
        parts.append(_note(f"{left} more are only in the tables."))
    return parts


def _plots_html(title: str, plots: Iterable[Plot], note: str = "") -> str:
    figures = "".join(map(_figure_html, plots))
    return f'<h2>{html_text(title)}</h2><div class="plots">{figures}</div>{_note(note)}'


def _tables_html(document: Document) -> list[str]:
    """Return the tables of a report under their titles: means, all metrics, incomplete jobs."""
    encodes = document.encodes
    means = []
    for mean in mean_rows(encodes, lambda row: (row.rendition, row.curve)):
        words = {"rendition": mean.rendition, "encoder": mean.curve, "jobs": str(mean.jobs)}
        means.append((words, mean))
    lines = [(_words_of(row, encodes), row) for row in document.completed]

    tables = {"Means by rendition": _metrics_table(means, TABLES[wire.MONEY_TABLE])}
    for name, columns in TABLES.items():
        tables[name] = _metrics_table(lines, columns)
    tables["Not completed"] = _incomplete_table(document.rows)
    return [f"<h2>{name}</h2>{table}" for name, table in tables.items() if table]


def _incomplete_table(rows: Iterable[Row]) -> str:
    """Return the jobs that did not complete, with their errors; "" without any."""
    heads = ("film", "what", "node", "job", "status", "error")
    cells = []
    for row in rows:
        if row.status != "completed":
            texts = (row.content, row.label, row.node, row.job, row.status, row.error)
            cells.append([html_text(text) for text in texts])
    return _wide_table(heads, cells, len(heads)) if cells else ""


def _words_of(row: Row, encodes: Iterable[Row]) -> dict[str, str]:
    """Return the words that a line begins with, by their heads; films only where they differ."""
    words = {"what": row.label, "node": row.node, "job": row.job}
    contents = {encode.content for encode in encodes}
    if len(contents) > 1:
        return {"film": row.content, **words}
    return words


def report_json(document: Document) -> str:
    """Return the report as JSON: rows with all metrics, and the differences at equal quality."""
    made = {
        "title": document.title,
        "made_at": document.made_at,
        "rows": [row._asdict() for row in document.rows],
        "deltas": [delta._asdict() for delta in deltas_of(document.completed)],
    }
    return json.dumps(made, indent=2) + "\n"


_CSV_WORDS = Row._fields[:Row._fields.index("metrics")]
_CSV_MARKS = ("currency", "power_source", "energy_estimated")
# A spreadsheet runs a cell that begins with one of these, and names of nodes and films are of
# others.
_FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r", "\n")


def report_csv(document: Document) -> str:
    """Return the rows as CSV; an unknown figure is empty, and the last column has the reasons."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_CSV_WORDS, *FIGURES, *_CSV_MARKS, "unknown"])
    for row in document.rows:
        words = [_plain(getattr(row, name)) for name in _CSV_WORDS]
        figures = {name: row.figure(name) for name in FIGURES}
        marks = [_plain(row.metrics.get(name)) for name in _CSV_MARKS]
        unknown = [name for name, figure in figures.items() if figure is None]
        reasons = json.dumps({name: row.reason(name) for name in unknown})
        writer.writerow([*words, *figures.values(), *marks, reasons])
    return out.getvalue()


def _plain(value: Any) -> str:
    """Return a cell that no spreadsheet takes for a formula; "" for None."""
    if value is None:
        return ""
    word = wire.printable(value)
    if word.startswith(_FORMULA_SIGNS):
        return f"'{word}"
    return word


_TERMINAL_HEADS = ("JOB", "STATUS", "NODE", "TIME", "SPEED", "RATE", "QUALITY", "ENERGY", "COST",
                   "CO2E", "WHAT")


def report_rows(rows: Iterable[Row]) -> list[tuple[Any, ...]]:
    """Return the rows as a table for a terminal, without the columns of which nothing is known."""
    rows = list(rows)
    contents = {row.content for row in rows if row.rendition}
    lines = [_terminal_line(row, len(contents) > 1) for row in rows]
    # A terminal is narrow: a column that is empty in all lines gives its room to the others.
    columns = [column for column in zip(_TERMINAL_HEADS, *lines) if any(column[1:])]
    return list(zip(*columns)) or [_TERMINAL_HEADS]


def _terminal_line(row: Row, several: bool) -> tuple[str | None, ...]:
    """Return the cells of a row; `several` films are named."""
    def figures(*names: str) -> list[str | None]:
        return [figure_text(row.metrics, name) for name in names]

    film = f"{row.content}: " if several else ""
    error = f": {row.error}" if row.error else ""
    return (row.job, row.status, row.node, *figures("duration", "speed", "bitrate_kbps"),
            _best_quality(row), *figures("energy_wh", "energy_cost", "carbon_g"),
            f"{film}{row.label}{error}")


def _best_quality(row: Row) -> str | None:
    """Return the first known metric of quality, with its name and without its unit."""
    for metric in QUALITIES:
        text = figure_text(row.metrics, metric.name, unit="")
        if text is not None:
            return f"{metric.label} {text}"
    return None


# the ending of a report's file -> what makes its text
REPORT_KINDS: Mapping[str, Callable[[Document], str]] = {
    ".html": report_html,
    ".htm": report_html,
    ".csv": report_csv,
    ".json": report_json,
}


# ---- 25 Programs ---------------------------------------------------------------------------------

Process = subprocess.Popen[bytes]
Packages = Mapping[str, Mapping[str, str]]


class Manager(NamedTuple):
    """One package manager: how its index is refreshed, and how it installs."""

    refresh: tuple[str, ...]
    install: tuple[str, ...]


# In the order of looking: the first that is on PATH is used. None may ask anything, for nobody
# may be there to answer.
MANAGERS = {
    "apt-get": Manager(
        refresh=("apt-get", "update", "-q"),
        install=("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "-q",
                 "--no-install-recommends")),
    "dnf": Manager((), ("dnf", "install", "-y")),
    "apk": Manager((), ("apk", "add", "--no-cache")),
    "pacman": Manager(("pacman", "-Sy"), ("pacman", "-S", "--noconfirm", "--needed")),
    "zypper": Manager((), ("zypper", "--non-interactive", "install")),
}
# program -> the package that has it, by package manager ("": of any other) where the names differ
PACKAGES: Packages = {
    "ffmpeg": {"dnf": "ffmpeg-free"},
    "ffprobe": {"": "ffmpeg", "dnf": "ffmpeg-free"},
}


def start_again() -> None:
    """Replace this process by a fresh start of the same program with the same arguments."""
    arguments = getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:]  # 3.10 and newer
    os.execv(sys.executable, [sys.executable, *arguments])


def end_on_sigterm() -> None:
    """Let SIGTERM unwind as Ctrl-C does, also where SIGINT is ignored, as after `&` in a script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM to the end of the block.

    Else a program that was just started would be left behind.
    """
    received: list[int] = []  # a handler can only note the signal: it must not raise in the block
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler):  # one that raises; a signal that is ignored stays so
            before[number] = handler
            signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    if received:
        raise KeyboardInterrupt


def start_program(argv: Sequence[str], output: Any = None) -> Process:
    """Start another program; its stdout and stderr go to `output`. ffdist starts none elsewhere.

    It gets a session of its own, so that Ctrl-C on the terminal reaches ffdist alone, which then
    ends its programs in order. Our own environment variables are not passed on: FFDIST_MASTER,
    say, would turn the demo's agent to another master.
    """
    env = {name: value for name, value in os.environ.items()
           if not name.startswith("FFDIST_")}
    return subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        env=env)


def end_program(process: Process, limit_s: float) -> None:
    """End a program of start_program(): SIGTERM, after the limit SIGKILL to its whole group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(limit_s)

    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def await_start(process: Process, ready: Callable[[], Any], doing: str,
                limit_s: float = math.inf) -> Any:
    """Return the first true value of ready(); None when the process or the time ends before."""
    began = time.monotonic()
    with contextlib.closing(wire.ProgressLine()) as bar:
        while process.poll() is None:
            waited = time.monotonic() - began
            if waited >= limit_s:
                break

            found = ready()
            if found:
                return found
            bar.show(f"{doing} … {waited:.0f} s")
            time.sleep(0.1)
    return None


def last_line(output: Path) -> str:
    """Return the last line of the file that a program writes to."""
    text = output.read_text(errors="replace").strip()
    return text.rpartition("\n")[2].replace("\t", " ")


def install_commands(programs: Iterable[str],
                     packages: Packages = PACKAGES) -> list[tuple[str, ...]]:
    """Return the commands that install programs with this host's manager; [] without one."""
    manager = next((name for name in MANAGERS if shutil.which(name)), None)
    if manager is None:
        return []

    needs_sudo = os.geteuid() != 0 and shutil.which("sudo") is not None
    sudo = ("sudo", "-n") if needs_sudo else ()  # -n: fail rather than ask for a password
    refresh, install = MANAGERS[manager]
    names = dict.fromkeys(_package_of(program, manager, packages) for program in programs)

    commands = [(*sudo, *install, *names)]
    if refresh:
        commands.insert(0, (*sudo, *refresh))
    return commands


def _package_of(program: str, manager: str, packages: Packages) -> str:
    names = packages.get(program, {})
    return names.get(manager) or names.get("") or program


def provide(programs: Iterable[str], install: bool,
            packages: Packages = PACKAGES) -> None:
    """Make sure that programs are on PATH, installing them where `install` allows it.

    CommandError names what is missing and the command that brings it.
    """
    missing = [program for program in programs if shutil.which(program) is None]
    if not missing:
        return

    names = ", ".join(missing)
    commands = install_commands(missing, packages)
    if not commands:
        raise CommandError(f"{names} is missing and this host has no known package manager: "
                           "ask the administrator to install it")
    advice = _command_line(commands)
    if not install:
        raise CommandError(f"{names} is missing: install it with '{advice}', or add --install")
    if os.geteuid() != 0 and commands[0][0] != "sudo":
        raise CommandError(f"{names} is missing and only root may install it: "
                           f"ask the administrator to run '{advice}'")

    for command in commands:
        _install(command, advice)
    if any(shutil.which(program) is None for program in missing):
        raise CommandError(f"{names} is still missing after '{advice}'")


def _command_line(commands: Iterable[Sequence[str]]) -> str:
    """Return commands as a person types them: sudo may ask, so without its -n."""
    lines = []
    for command in commands:
        words = [word for word in command if word != "-n"]
        lines.append(shlex.join(words))
    return " && ".join(lines)


def _install(command: Sequence[str], advice: str) -> None:
    print(f"+ {shlex.join(command)}", file=sys.stderr, flush=True)
    if start_program(command, sys.stderr).wait() != 0:
        raise CommandError(f"'{shlex.join(command)}' failed: "
                           f"ask the administrator to run '{advice}'")


# ---- 26 Dashboards -------------------------------------------------------------------------------

# Expressions are MetricsQL, in which `@name` stands for the metric ffdist_name of the one table.
# promql() refuses a name that is not in it, so a renamed metric cannot leave an empty picture
# behind.

def promql(text: str) -> str:
    """Return an expression with the full name for each `@name`; KeyError for an unknown metric."""
    return re.sub(r"@(\w+)", lambda match: _BY_NAME[f"ffdist_{match[1]}"].name, text)


class Panel(NamedTuple):
    """One picture: kind, title, unit as Grafana calls it, expressions and their legends.

    `kind` is timeseries, stat or table. A table has a row for each set of labels, and a column for
    each expression, under the names of `legend`.
    """

    kind: str
    title: str
    unit: str
    exprs: tuple[str, ...]
    legend: tuple[str, ...] = ("",)


def _graph(title: str, unit: str, expr: str, *labels: str) -> Panel:
    """Return a graph of one expression, with a line for each value of its labels."""
    legend = " ".join(f"{{{{{label}}}}}" for label in labels)
    return Panel("timeseries", title, unit, (expr,), (legend,))


# Results are single values at the time when they were completed, not series that go on: an
# expression without a range would mostly find none. $__interval is the width of a point, $__range
# that of the page.

def _over_interval(name: str, by: str, function: str = "avg") -> str:
    """Return the expression of a result's metric by labels, for each interval of a graph."""
    outer = "sum" if function == "count" else function
    return f'{outer} by ({by}) ({function}_over_time(@job_{name}{{node=~"$node"}}[$__interval]))'


def _graphs(by: str, *rows: tuple[str, str, str]) -> tuple[Panel, ...]:
    """Return graphs of results' metrics, as (title, unit, name), by labels."""
    labels = by.split(", ")
    return tuple(_graph(f"{title} by {labels[0]}", unit, _over_interval(name, by), *labels)
                 for title, unit, name in rows)


def _total(title: str, unit: str, name: str) -> Panel:
    """Return the sum of a metric over all results in the range of a page."""
    expr = f'sum(sum_over_time(@job_{name}{{node=~"$node"}}[$__range]))'
    return Panel("stat", title, unit, (expr,))


def _estimated_total(title: str, unit: str, name: str) -> Panel:
    """Return the sum of a metric over the results whose energy a model estimated; 0 without any."""
    labels = 'node=~"$node",power_source=~".*model.*"'
    expr = f"sum(sum_over_time(@job_{name}{{{labels}}}[$__range])) or vector(0)"
    return Panel("stat", title, unit, (expr,))


def _count(title: str, status: str) -> Panel:
    """Return the number of results of a status in the range of a page; 0 without any."""
    labels = f'node=~"$node",status="{status}"'
    expr = f"sum(count_over_time(@job_info{{{labels}}}[$__range])) or vector(0)"
    return Panel("stat", title, "short", (expr,))


def _results_table(**columns: str) -> Panel:
    """Return a table of results in the range of a page: name of the metric, head of its column."""
    by = "job_id, node, scenario, encoder, power_source, status"
    exprs = [f'max by ({by}) (last_over_time(@job_{name}{{node=~"$node"}}[$__range]))'
             for name in columns]
    return Panel("table", "Results", "short", tuple(exprs), tuple(columns.values()))


def _now(name: str, by: str = "node") -> str:
    """Return the expression of a node's metric as it is now.

    `max`: the same metric may be there twice, scraped from /metrics and pushed.
    """
    return f'max by ({by}) (@{name}{{node=~"$node"}})'


_SOURCED = "node, power_source"  # an estimate has `model` in its power_source
_ENDED = _graph("Results in each interval", "short",
                _over_interval("info", "status", "count"), "status")

_FLEET = (
    Panel("stat", "Nodes up", "short", ("sum(max by (node_id) (@node_up))",)),
    Panel("stat", "Nodes offline", "short",
          ("count(max by (node_id) (@node_up) == 0) or vector(0)",)),
    Panel("stat", "Jobs waiting", "short", ('max(@jobs{status="pending"})',)),
    Panel("stat", "Jobs running", "short", ('max(@jobs{status="running"})',)),
    _graph("Open jobs", "short",
           'max by (status) (@jobs{status=~"blocked|pending|running|paused"})', "status"),
    _ENDED,
    _graph("Running jobs", "short", _now("node_running_jobs"), "node"),
    _graph("Nodes by status", "short", "max by (status) (@nodes)", "status"),
    Panel("timeseries", "Submissions, claims and reports per second", "reqps",
          tuple(f"max(rate(@{name}_total[5m]))" for name in ("submissions", "claims", "reports")),
          ("submissions", "claims", "reports")),
    Panel("timeseries", "Lost leases and refused reports in an hour", "short",
          ("max(increase(@lost_leases_total[1h]))", "max(increase(@refused_reports_total[1h]))"),
          ("lost leases", "refused reports")),
    Panel("timeseries", "The master's disk", "bytes",
          ("max(@disk_free_bytes)", "max(@journal_size_bytes)"),
          ("free", "journal")),
    _graph("Mean commit of the journal", "s",
           "max(rate(@journal_commit_seconds_total[5m])) / max(rate(@journal_commits_total[5m]))"),
    Panel("table", "Nodes", "short",
          (_now("node_status", "node, node_id"), _now("node_running_jobs", "node, node_id")),
          ("status", "running")),
)

_JOBS = (
    _count("Completed", "completed"),
    _count("Failed", "failed"),
    _total("Film encoded", "s", "output_seconds"),
    _total("CPU time", "s", "cpu_seconds"),
    *_graphs("scenario",
             ("Wall time", "s", "duration_seconds"),
             ("CPU %", "percent", "cpu_usage"),
             ("Peak memory", "mbytes", "memory_mib")),
    *_graphs("encoder",
             ("Speed", "x", "speed"),
             ("Frames per second", "short", "fps")),
    _ENDED,
    _results_table(duration_seconds="s", speed="speed", fps="fps", cpu_usage="CPU %",
                   output_bytes="bytes"),
)

_ENERGY = (
    _total("Energy", "joule", "energy_joules"),
    _total("Above idle", "joule", "net_energy_joules"),
    _total("Cost", "short", "energy_cost"),
    _total("Carbon, gCO2e", "short", "carbon_g"),
    _estimated_total("Energy that is estimated", "joule", "energy_joules"),
    _graph("Power while jobs run", "watt", _now("sample_power_watts", _SOURCED),
           *_SOURCED.split(", ")),
    _graph("Energy by node", "joule", _over_interval("energy_joules", _SOURCED, "sum"),
           *_SOURCED.split(", ")),
    *_graphs("encoder, power_source",
             ("Joules per frame", "joule", "joules_per_frame"),
             ("Pixels per joule", "short", "pixels_per_joule")),
    *_graphs("scenario, power_source",
             ("Wh per minute of output", "watth", "energy_wh_per_minute"),
             ("Cost per minute of output", "short", "cost_per_minute")),
    _results_table(energy_joules="J", net_energy_joules="J above idle", power_watts="W",
                   energy_cost="cost", carbon_g="gCO2e"),
)

_QUALITY = (
    *_graphs("encoder",
             *((figure.label, figure.unit or "short", figure.name) for figure in TABLES["Quality"]),
             ("Bitrate", "Kbits", "bitrate_kbps"),
             ("Bits per pixel", "short", "bits_per_pixel")),
    _results_table(psnr_db="PSNR dB", ssim="SSIM", vmaf="VMAF", bitrate_kbps="kbit/s",
                   energy_joules="J"),
)

_ONE_NODE = (
    Panel("stat", "Status", "short", (_now("node_status"),)),
    Panel("stat", "In quarantine", "short", (_now("node_quarantined"),)),
    Panel("stat", "Running jobs", "short", (_now("node_running_jobs"),)),
    _count("Failed jobs", "failed"),
    _graph("CPU", "percent", _now("sample_cpu_usage_percent"), "node"),
    _graph("Memory", "bytes", _now("sample_memory_bytes"), "node"),
    Panel("timeseries", "Power", "watt",
          (_now("sample_power_watts", _SOURCED), _now("job_idle_watts", _SOURCED)),
          ("{{node}} {{power_source}}", "{{node}} {{power_source}}, idle")),
    _graph("Temperature", "celsius", _now("sample_temperature_celsius"), "node"),
    _graph("Up", "short", _now("node_up"), "node"),
    *_graphs("node", ("CPU that others used during jobs", "percent", "background_cpu_percent")),
    _results_table(duration_seconds="s", speed="speed", energy_joules="J"),
)

DASHBOARDS: Mapping[str, tuple[Panel, ...]] = {
    "Fleet": _FLEET, "Jobs": _JOBS, "Energy & cost": _ENERGY, "Quality": _QUALITY,
    "One node": _ONE_NODE,
}

# Grafana's grid has 24 columns; width and height of a panel by its kind
GRID_COLUMNS = 24
_SIZES = {"stat": (6, 4), "timeseries": (12, 8), "table": (GRID_COLUMNS, 10)}
# The data source has a fixed uid, so that pages find it in whatever Grafana they are loaded into.
_SOURCE: Json = {"type": "prometheus", "uid": "ffdist"}


def _panel_json(panel: Panel, number: int, place: Json) -> Json:
    """Return one panel as Grafana reads it; the kinds differ in their options alone."""
    made: Json = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "datasource": _SOURCE,
        "gridPos": place,
        "targets": _targets(panel),
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {},
    }
    if panel.kind == "timeseries":
        # Jobs come and go: lines are drawn over the gaps between them.
        made["fieldConfig"]["defaults"]["custom"] = {"spanNulls": True, "showPoints": "auto"}
        made["options"] = {
            "legend": {"showLegend": True, "displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"}}
    if panel.kind == "table":
        made["transformations"] = _joined_columns(panel)
    if any("node_status" in expr for expr in panel.exprs):
        _name_statuses(made)
    return made


def _targets(panel: Panel) -> list[Json]:
    """Return the queries of a panel: of a graph over its range, of the others at this moment."""
    is_graph = panel.kind == "timeseries"
    form = "table" if panel.kind == "table" else "time_series"
    targets: list[Json] = []
    for number, (expr, legend) in enumerate(zip(panel.exprs, panel.legend)):
        targets.append({
            "refId": _ref(number),
            "datasource": _SOURCE,
            "expr": promql(expr),
            "legendFormat": legend,
            "instant": not is_graph,
            "range": is_graph,
            "format": form,
        })
    return targets


def _ref(number: int) -> str:
    """Return the letter by which Grafana names a panel's query: A, B, …"""
    return chr(ord("A") + number)


def _joined_columns(panel: Panel) -> list[Json]:
    """Return the transformations that join a table's queries by label, and name its columns."""
    names = {f"Value #{_ref(number)}": legend for number, legend in enumerate(panel.legend)}
    return [{"id": "merge", "options": {}},
            {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": names}}]


def _name_statuses(panel: Json) -> None:
    """Let a panel show words for the numbers that stand for a node's status."""
    words = {str(code): {"text": word, "index": code} for code, word in enumerate(NODE_STATUSES)}
    mappings = [{"type": "value", "options": words}]
    if panel["type"] == "table":
        panel["fieldConfig"]["overrides"] = [{
            "matcher": {"id": "byName", "options": "status"},
            "properties": [{"id": "mappings", "value": mappings}]}]
    else:
        panel["fieldConfig"]["defaults"]["mappings"] = mappings


def _places(panels: Iterable[Panel]) -> Iterator[Json]:
    """Yield the place of each panel on the grid: from left to right, a new row when one is full."""
    x = y = row_height = 0
    for panel in panels:
        width, height = _SIZES[panel.kind]
        if x + width > GRID_COLUMNS:
            x, y, row_height = 0, y + row_height, 0

        yield {"x": x, "y": y, "w": width, "h": height}
        x, row_height = x + width, max(row_height, height)


# A menu of the other dashboards on each page; the choice of nodes and the time go along.
_LINK_TO_OTHERS: Json = {
    "title": "ffdist",
    "type": "dashboards",
    "tags": ["ffdist"],
    "asDropdown": True,
    "icon": "external link",
    "includeVars": True,
    "keepTime": True,
    "targetBlank": False,
    "tooltip": "",
    "url": "",
}


def dashboard_json(title: str) -> Json:
    """Return one of DASHBOARDS as Grafana reads it."""
    board = DASHBOARDS[title]
    panels = [_panel_json(panel, number, place)
              for number, (panel, place) in enumerate(zip(board, _places(board)), 1)]
    return {
        "uid": dashboard_uid(title),
        "title": f"ffdist: {title}",
        "tags": ["ffdist"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "timezone": "browser",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [_node_variable(several=title != "One node")]},
        "links": [_LINK_TO_OTHERS],
        "panels": panels,
    }


def _node_variable(several: bool) -> Json:
    """Return the choice of nodes at the top of a page: one, or `several` up to all of them."""
    made: Json = {
        "type": "query",
        "name": "node",
        "label": "Node",
        "datasource": _SOURCE,
        "query": {"query": promql("label_values(@node_up, node)"), "refId": "node"},
        "refresh": 2,  # when the time range changes: nodes come and go
        "sort": 1,     # by the alphabet
        "options": [],
        "multi": several,
        "includeAll": several,
    }
    if several:
        made["allValue"] = ".*"
        made["current"] = {"selected": True, "text": ["All"], "value": ["$__all"]}
    return made


def dashboard_uid(title: str) -> str:
    """Return the name of a dashboard in addresses and of its file."""
    return "ffdist-" + re.sub(r"\W+", "-", title.lower())


class Rule(NamedTuple):
    """One alert: its condition, for how long it must last, and one sentence with the next step."""

    name: str
    expr: str
    lasts: str
    severity: str
    summary: str


# POWER_LIMIT stands for --power-limit. The power must stay above it for longer than the 2 min of
# its mean, so that one short job raises no alert.
RULES = (
    Rule("NodeOffline", "max by (node, node_id) (@node_up) == 0", "1m", "warning",
         "Node {{ $labels.node }} is offline: see whether its machine and its agent run."),
    Rule("NodeQuarantined", "max by (node, node_id) (@node_quarantined) == 1", "1m", "warning",
         "Node {{ $labels.node }} is in quarantine: 'python3 ffdist.py nodes' has the reason."),
    Rule("QueueGrowing",
         'max(@jobs{status="pending"}) > 100 '
         'and max(delta(@jobs{status="pending"}[15m])) > 0', "15m", "warning",
         "{{ $value }} jobs wait and their number grows: add nodes, or see which are away."),
    Rule("FailuresInARow",
         'sum by (node, node_id) (count_over_time(@job_info{status="failed"}[15m])) >= 5 unless '
         'sum by (node, node_id) (count_over_time(@job_info{status="completed"}[15m])) > 0',
         "0s", "warning",
         "{{ $value }} jobs failed on {{ $labels.node }} in 15 min and none was completed: "
         "drain it, and read 'python3 ffdist.py logs' of one."),
    Rule("PowerOverLimit",
         "max by (node, node_id) (avg_over_time(@sample_power_watts[2m])) > POWER_LIMIT",
         "3m", "warning",
         "Node {{ $labels.node }} draws {{ $value }} W, more than the limit of POWER_LIMIT W."),
    Rule("MasterDiskFilling",
         "max(@disk_free_bytes) < 1e9 or max(@disk_free_bytes / @disk_size_bytes) < 0.05",
         "5m", "critical",
         "The disk of the master's data folder is nearly full: make room, or nothing more is "
         "accepted."),
    Rule("MasterCannotWrite", "max(@ready) == 0", "30s", "critical",
         "The master's journal cannot be written: GET /ready names the cause."),
    Rule("MasterAway", "absent(@ready)", "2m", "critical",
         "No metrics come from the master: see whether it runs, and whether /metrics is scraped."),
    Rule("PushDropping", "max(increase(@push_dropped_total[15m])) > 0", "0s", "warning",
         "Values for VictoriaMetrics were given up in the last 15 min: see the master's log."),
)


def rules_json(power_limit_w: float) -> Json:
    """Return the alerts as Prometheus and vmalert read them."""
    limit = f"{power_limit_w:g}"
    rules = [{"alert": f"Ffdist{rule.name}",
              "expr": promql(rule.expr).replace("POWER_LIMIT", limit),
              "for": rule.lasts,
              "labels": {"severity": rule.severity},
              "annotations": {"summary": rule.summary.replace("POWER_LIMIT", limit)}}
             for rule in RULES]
    return {"groups": [{"name": "ffdist", "interval": "15s", "rules": rules}]}


# ---- 27 Monitoring -------------------------------------------------------------------------------

# `monitoring up` holds its programs: they live as long as it does. It starts them one after the
# other, each when the one before answers, prints the addresses and stays in the foreground;
# Ctrl-C, SIGTERM or the end of any of them ends all. So there is no record of processes that
# could be stale, and a service manager can run it.

class Site(NamedTuple):
    """Where the parts of the monitoring are.

    `vmalert` and `grafana` are host:port. Without a password Grafana keeps its own.
    """

    folder: str
    master: str
    victoriametrics: str
    vmalert: str
    grafana: str
    power_limit_w: float
    alertmanager: str | None = None
    password: str | None = None


def monitoring_files(site: Site) -> dict[str, str]:
    """Return the files of the monitoring by their path under its folder; YAML files hold JSON."""
    values = {
        "scrape.yml": _scrape_config(site.master),
        "alerts.yml": rules_json(site.power_limit_w),
        "notifier.yml": {"static_configs": []},
        "grafana/provisioning/datasources/ffdist.yml": _datasource(site),
        "grafana/provisioning/dashboards/ffdist.yml": _dashboard_provider(site),
    }
    for title in DASHBOARDS:
        values[f"grafana/dashboards/{dashboard_uid(title)}.json"] = dashboard_json(title)

    files = {path: json.dumps(value, indent=2) + "\n" for path, value in values.items()}
    files["grafana/grafana.ini"] = _grafana_ini(site)
    return files


def _scrape_config(master: str) -> Json:
    parts = urllib.parse.urlsplit(master)
    job = {"job_name": "ffdist", "scrape_interval": "15s", "scheme": parts.scheme,
           "metrics_path": f"{parts.path.rstrip('/')}/metrics",
           "static_configs": [{"targets": [parts.netloc]}]}
    return {"scrape_configs": [job]}


def _datasource(site: Site) -> Json:
    source = {"name": "ffdist", "uid": "ffdist", "type": "prometheus", "access": "proxy",
              "isDefault": True, "url": site.victoriametrics,
              "jsonData": {"httpMethod": "POST", "timeInterval": "15s"}}
    return {"apiVersion": 1, "datasources": [source]}


def _dashboard_provider(site: Site) -> Json:
    provider = {"name": "ffdist", "folder": "ffdist", "type": "file", "updateIntervalSeconds": 60,
                "options": {"path": f"{site.folder}/grafana/dashboards"}}
    return {"apiVersion": 1, "providers": [provider]}


def _grafana_ini(site: Site) -> str:
    """Return Grafana's own settings; it sends nothing home."""
    host, _, port = site.grafana.rpartition(":")
    base = f"{site.folder}/grafana"
    sections = {
        "server": {"http_addr": host.strip("[]"), "http_port": port},
        "paths": {name: f"{base}/{name}" for name in ("data", "logs", "plugins", "provisioning")},
        "analytics": {"reporting_enabled": "false", "check_for_updates": "false"},
        "security": {"admin_password": site.password} if site.password else {},
    }
    lines = []
    for name, settings in sections.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {value}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


HEALTHY_S = 60.0  # within which a part must answer
ENDING_S = 20.0   # VictoriaMetrics writes what it holds in memory before it ends
GRAFANA_HOMES = ("/usr/share/grafana", "/usr/local/share/grafana", "/opt/grafana")
_RELEASES = ("with 'apt-get install victoria-metrics', or from "
             "github.com/VictoriaMetrics/VictoriaMetrics/releases")


class Part(NamedTuple):
    """One program of the monitoring: its path (None: not installed), arguments, addresses.

    `flag` chooses another address for it; `source` is where to get it. The first part is needed,
    the others are not.
    """

    name: str
    program: str | None
    arguments: tuple[str, ...]
    url: str
    health: str
    flag: str
    source: str


def parts_of(site: Site) -> tuple[Part, ...]:
    """Return the programs of the monitoring."""
    return _victoria_metrics(site), _vmalert(site), _grafana(site)


def _victoria_metrics(site: Site) -> Part:
    """Return the part that keeps the figures.

    Deduplication drops a value that was pushed twice because an answer was lost. With the default
    latency offset of 30 s a dashboard would show a result half a minute after its job.
    """
    url = site.victoriametrics
    arguments = (
        f"-httpListenAddr={urllib.parse.urlsplit(url).netloc}",
        f"-storageDataPath={site.folder}/victoria-metrics",
        "-retentionPeriod=12",  # months
        "-dedup.minScrapeInterval=1ms",
        "-search.latencyOffset=1ms",
        f"-promscrape.config={site.folder}/scrape.yml",
    )
    program = _first_on_path("victoria-metrics", "victoria-metrics-prod")
    return Part("victoria-metrics", program, arguments, url, f"{url}/health", "--victoriametrics",
                _RELEASES)


def _vmalert(site: Site) -> Part:
    """Return the part that watches the figures; it keeps its alerts' state in VictoriaMetrics."""
    url, store = f"http://{site.vmalert}", site.victoriametrics
    notifier = f"-notifier.config={site.folder}/notifier.yml"
    if site.alertmanager:
        notifier = f"-notifier.url={site.alertmanager}"
    arguments = (
        f"-rule={site.folder}/alerts.yml",
        notifier,
        f"-datasource.url={store}",
        f"-remoteWrite.url={store}",
        f"-remoteRead.url={store}",
        f"-httpListenAddr={site.vmalert}",
    )
    program = _first_on_path("vmalert", "vmalert-prod")
    return Part("vmalert", program, arguments, url, f"{url}/health", "--vmalert-port", _RELEASES)


def _grafana(site: Site) -> Part:
    """Return the part that shows the figures: `grafana-server`, or `grafana server`."""
    url = f"http://{site.grafana}"
    home = next((path for path in GRAFANA_HOMES if os.path.isdir(path)), GRAFANA_HOMES[0])
    config = f"{site.folder}/grafana/grafana.ini"
    arguments: tuple[str, ...] = ("--homepath", home, "--config", config)
    program = _first_on_path("grafana-server", "grafana")
    if program is None or not program.endswith("-server"):
        arguments = ("server", *arguments)
    return Part("grafana", program, arguments, url, f"{url}/api/health", "--grafana-port",
                "from grafana.com/grafana/download")


def _first_on_path(*programs: str) -> str | None:
    return next(filter(None, map(shutil.which, programs)), None)


def write_monitoring(site: Site) -> list[Path]:
    """Write the files of the monitoring; return their paths."""
    written = []
    for name, text in monitoring_files(site).items():
        path = Path(site.folder, name)
        wire.make_folder(path.parent)
        write_whole(path, text.encode())
        written.append(path)
    return written


def answers(url: str, healthy: bool = False) -> bool:
    """Return whether a server answers at an address, whatever it says, or that it is `healthy`."""
    try:
        wire.exchange_text(url, timeout_s=2)
    except ApiError as error:
        return error.status != 0 and not healthy
    return True


class Running(NamedTuple):
    """A part that was started, and the file that it writes to."""

    part: Part
    process: Process
    log: Path

    def failure(self, how: str) -> CommandError:
        """Return the error of a part that did not do what it should, with its last words."""
        words = last_line(self.log) or "it printed nothing"
        return CommandError(f"{self.part.name} {how}: {words} ({self.log})")


@contextlib.contextmanager
def running_monitoring(site: Site) -> Iterator[list[Running]]:
    """Start the installed parts and wait until each is healthy; end all of them with the block."""
    parts = parts_of(site)
    if parts[0].program is None:
        raise CommandError(f"{parts[0].name} is missing: install it {parts[0].source}")

    # Before any is started: two of them at one address would both look well, one by the other's
    # answer.
    installed = [part for part in parts if part.program]
    for part in installed:
        if answers(part.health):
            raise CommandError(f"something else answers at {part.url} already: end it, or choose "
                               f"another address with {part.flag}")

    # In the order of parts_of(): vmalert reads the state of its alerts from VictoriaMetrics.
    running: list[Running] = []
    try:
        for part in installed:
            with uninterrupted():
                running.append(_start_part(site, part))
            _await_health(running[-1])
        yield running
    finally:
        with uninterrupted():
            for started in reversed(running):
                end_program(started.process, ENDING_S)


def _start_part(site: Site, part: Part) -> Running:
    log = Path(site.folder, f"{part.name}.log")
    with open(log, "wb") as output:
        process = start_program((part.program or part.name, *part.arguments), output)
    return Running(part, process, log)


def _await_health(started: Running) -> None:
    """Wait until a part that was just started is healthy; CommandError when it is not in time."""
    health = started.part.health
    if await_start(started.process, lambda: answers(health, healthy=True),
                   f"{started.part.name} starts", HEALTHY_S):
        return
    if started.process.poll() is None:
        raise started.failure(f"does not answer at {health}")
    raise started.failure("ended")


def await_end(running: Sequence[Running]) -> Running:
    """Return the first part that ends by itself."""
    while True:
        for started in running:
            if started.process.poll() is not None:
                return started
        time.sleep(0.2)


# ---- 28 Views ------------------------------------------------------------------------------------

# Words for the person at a terminal. Answers come as the Client's views; a job, a node and a
# result have one line for lists and one block of rows for a single one, whichever command shows
# them.

COLOURS = {
    "completed": "32", "available": "32", "optimal": "32",  # green
    "running": "36", "busy": "36",                          # cyan
    "canceled": "33", "paused": "33", "draining": "33",     # yellow
    "failed": "31", "offline": "31",                        # red
}


def _say(line: str) -> None:
    """Print a line on stderr: all that is not the answer itself."""
    print(wire.printable(line), file=sys.stderr, flush=True)


def _show(line: str) -> None:
    """Print a line on stdout."""
    wire.write_stdout(f"{wire.printable(line)}\n")


def _print_json(value: Any) -> None:
    wire.write_stdout(json.dumps(value, indent=2) + "\n")


def _print_table(rows: Iterable[Sequence[Any]], heads: bool = True) -> None:
    """Print rows as a table as wide as the terminal; an empty cell is `-`."""
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ  # see no-color.org
    width = shutil.get_terminal_size((100, 24)).columns
    texts = [[_cell_text(cell) for cell in row] for row in rows]
    table = wire.table_text(texts, width, COLOURS if in_colour else None, heads)
    wire.write_stdout(f"{table}\n")


def _cell_text(cell: Any) -> str:
    return "-" if cell is None or cell == "" else str(cell)


class Page(NamedTuple):
    """One page of a listing: its kind, its table, and the answer with `next`, `count` and `total`.

    The first line of the table are its heads. `hint` is the next step where there is nothing at
    all, `filters` are the words that chose the lines.
    """

    kind: str
    hint: str
    table: Sequence[Sequence[Any]]
    answer: Json
    filters: str = ""


def show_page(page: Page) -> None:
    """Show a page of a listing, and how to get the next one."""
    if len(page.table) > 1:
        _print_table(page.table)
    elif page.filters:
        _show(f"no {page.kind} match {page.filters}")
    else:
        _show(f"no {page.kind}; {page.hint}")

    cursor = page.answer.get("next")
    if cursor:
        _show(f"{page.answer['count']} of {page.answer['total']} {page.kind}; "
              f"the next with --after {cursor}")


# seconds of a unit -> its name, the largest first
_AGES = {86400: "d", 3600: "h", 60: "min", 1: "s"}


def _ago(text: str | None) -> str | None:
    """Return how long ago a time of the API was, in one unit."""
    at = epoch_of(text)
    if at is None:
        return text

    age_s = max(0.0, time.time() - at)  # the clocks of two machines may differ a little
    size = next((size for size in _AGES if age_s >= size), 1)
    return f"{age_s // size:.0f} {_AGES[size]} ago"


def waiting_text(job: wire.JobView, nodes: Sequence[wire.NodeView], now: float,
                 room: int = 79) -> str:
    """Return the state of a job that has not ended: its progress, or the reason why it waits."""
    if job.status == "running":
        return wire.progress_text(job.progress or {"phase": "starting"}, room)
    if job.waiting_for:
        return f"{job.status}: waits for {job.waiting_for}"
    if job.status != "pending":
        return job.status

    due = epoch_of(job.not_before) or 0.0
    if due > now:
        clock = time.strftime("%H:%M:%S", time.localtime(due))
        return f"pending: waits until {clock} to try again"
    if not nodes:
        return "no node yet; start one with: python3 agent.py --register --master URL"

    busy = sum(node.running >= node.slots for node in nodes)
    if busy:
        verb = "is" if busy == 1 else "are"
        return f"pending: {busy} of {wire.count_text(len(nodes), 'node')} {verb} busy"
    return f"pending: attempt {job.attempt + 1} waits for a node"


JOB_HEADS = ("JOB", "STATUS", "DONE", "CREATED", "NODE", "FILM", "WHAT")


def job_line(job: wire.JobView, names: Mapping[str, str]) -> tuple[Any, ...]:
    """Return the line of a job under JOB_HEADS; `names` are those of the nodes by their ids."""
    source = job.settings.get("input") or "generated"
    path = urllib.parse.urlsplit(source).path
    film = path.rpartition("/")[2] or source
    return (
        job.short_id,
        job.status,
        percent_text(job.json),
        _ago(job.created_at),
        names.get(job.node_id, job.node_id[:8]),
        film,
        job.error or wire.settings_text(job.settings),
    )


def show_job(job: wire.JobView) -> None:
    """Show one job: what was asked for, its errors and attempts, and its result."""
    result = job.result
    if job.status != "completed" or result is None or not result.metrics:
        result = None  # a job that ran again may still have the result of a failure

    rows: list[tuple[str, str | None]] = [
        ("job", job.id),
        ("status", job.status),
        ("scenario", job.scenario),
        ("node", _node_of(job)),
        ("created", _ago(job.created_at)),
        ("input", job.settings.get("input") or "generated"),
    ]
    if result is None or not result.output:
        rows.append(("output", job.settings.get("output")))
    rows += _error_rows(job)
    rows += attempt_rows(job)
    rows += _state_rows(job)

    if result is None:
        rows.append(("settings", wire.settings_text(job.settings)))
    else:
        rows += result_rows(result)
    _print_table([row for row in rows if row[1] or row[0] == "node"], heads=False)


def _state_rows(job: wire.JobView) -> list[tuple[str, str | None]]:
    """Return how often a job was retried, and how far it is."""
    rows: list[tuple[str, str | None]] = []
    if job.waiting_for:
        rows.append(("waits for", job.waiting_for))
    if job.retry_count:
        rows.append(("retries", f"{job.retry_count} of {job.max_retries}: {job.retry_reason}"))
    if job.status == "running":
        progress = job.progress or {"phase": "starting"}
        rows.append(("progress", wire.progress_text(progress)))
    return rows


def _node_of(job: wire.JobView) -> str:
    """Return the node of a job by name, of its result or last attempt, else by id."""
    if job.result is not None and job.result.node:
        return job.result.node
    if job.attempts and job.attempts[-1].node:
        return job.attempts[-1].node
    return job.node_id


def _error_rows(job: wire.JobView) -> list[tuple[str, str | None]]:
    if not job.error:
        return []
    return [("error", _with_reason(job.error, job.failure_reason))]


def _with_reason(error: str, reason: str) -> str:
    return f"{error} ({reason})" if reason else error


def attempt_rows(job: wire.JobView) -> list[tuple[str, str | None]]:
    """Return the attempts that ended and did not complete.

    The last one is left out where its error is the job's own, which is shown already.
    """
    ended = [attempt for attempt in job.attempts if attempt.ended_at]
    rows: list[tuple[str, str | None]] = []
    for attempt in ended:
        is_last = attempt is ended[-1]
        if attempt.status == "completed":
            continue
        if is_last and attempt.error and attempt.error == job.error:
            continue

        where = f"{attempt.status} on {attempt.node or attempt.node_id[:8]}"
        text = f"{where}: {attempt.error}" if attempt.error else where
        rows.append((f"attempt {attempt.number}", _with_reason(text, attempt.failure_reason)))
    return rows


def result_rows(result: wire.ResultView) -> list[tuple[str, str | None]]:
    """Return the rows of a result, with the cost that the master added to it."""
    rows: list[tuple[str, str | None]] = [*wire.result_rows(result.json)]
    cost = cost_text(result.metrics)
    if cost:
        rows.append(("cost", cost))
    return rows


# metric of a result -> the head of its column
_RESULT_FIGURES = {
    "duration": "TIME",
    "speed": "SPEED",
    "cpu_usage": "CPU",
    "energy_wh": "ENERGY",
    "energy_cost": "COST",
    "carbon_g": "CO2E",
    "output_bytes": "SIZE",
}
RESULT_HEADS = ("JOB", "STATUS", "NODE", *_RESULT_FIGURES.values(), "SCENARIO", "VERDICT")


def result_line(result: wire.ResultView) -> tuple[Any, ...]:
    """Return the line of a result under RESULT_HEADS."""
    metrics = with_energy_wh(result.metrics)
    return (
        result.job_id[:8],
        result.status,
        result.node,
        *(figure_text(metrics, name) for name in _RESULT_FIGURES),
        result.scenario,
        result.recommendation or result.error,
    )


NODE_HEADS = ("NODE", "STATUS", "JOBS", "TYPE", "THREADS", "MEMORY", "HEARD", "GPU", "CPU")


def node_line(node: wire.NodeView, word: str) -> tuple[Any, ...]:
    """Return the line of a node under NODE_HEADS, where `word` names it."""
    return (
        word,
        node.status,
        f"{node.running}/{node.slots}",
        node.type,
        node.cpu_threads,
        wire.size_text(node.ram_bytes),
        _ago(node.last_heartbeat),
        _gpu_text(node),
        node.cpu_model,
    )


def _gpu_text(node: wire.NodeView) -> str:
    """Return the GPU of a node, `none` where it has said that there is none."""
    if node.gpu_type or not node.cpu_model:
        return node.gpu_type
    return "none"


def show_nodes(nodes: Sequence[wire.NodeView]) -> None:
    """List nodes, and say why one is in quarantine."""
    hint = "register one with: python3 agent.py --register --master URL"
    names = Counter(node.name for node in nodes)
    lines = []
    for node in nodes:
        word = node.name if names[node.name] == 1 else f"{node.name} ({node.short_id})"
        lines.append(node_line(node, word))
    show_page(Page("nodes", hint, [NODE_HEADS, *lines], {}))

    for node in nodes:
        if node.quarantine:
            word = node.name if names[node.name] == 1 else node.short_id
            _show(f"{node.name} is in quarantine: {node.quarantine}; "
                  f"'python3 ffdist.py undrain {shlex.quote(word)}' lets it work at once")


def show_ordered_job(job: wire.JobView) -> None:
    """Say what an order made of a job."""
    doing = " (its node was ordered to stop it)" if job.cancel_requested else ""
    _show(f"job {job.id} is {job.status}{doing}")


def show_ordered_node(node: wire.NodeView) -> None:
    """Say what an order made of a node."""
    _show(f"node {node.name} is {node.status}, {wire.count_text(node.running, 'job')} on it")


def show_monitoring(site: Site, secret: Path) -> None:
    """Show where the parts of the monitoring answer, which are missing, and the next command."""
    parts = parts_of(site)
    rows = []
    for part in parts:
        missing = f"is not installed: get it {part.source}"
        rows.append((part.name, part.url if part.program else missing))
    if parts[-1].program:
        rows.append(("its user", f"admin, with the password in {secret}"))
    command = f"python3 ffdist.py master --victoriametrics {site.victoriametrics}"
    rows += [("the master", command), ("to end all", "Ctrl-C")]
    _print_table(rows, heads=False)


def show_report(rows: Sequence[Row], filters: str) -> None:
    """Show a report as a table, with the differences at equal quality below it."""
    show_page(Page("results", "they come when jobs have run", report_rows(rows), {}, filters))
    deltas = deltas_of([row for row in rows if row.status == "completed"])
    if not deltas:
        return

    lines: list[tuple[Any, ...]] = [("BD", "AT EQUAL", "COSTS", "THIS", "AGAINST", "WHAT")]
    for delta in deltas:
        lines.append((delta.cost, delta.quality, delta.text(), delta.test, delta.anchor,
                      delta.why or delta.content))
    wire.write_stdout("\n")
    _print_table(lines)


def show_plan(experiment: Experiment) -> None:
    """Show the jobs of an experiment, of which none was submitted."""
    rows: list[tuple[Any, ...]] = [("JOB", "NODE", "STREAMS", "REPEAT", "WHAT")]
    for group in experiment.groups:
        job = group.jobs[0]
        cell = job["experiment"]["cell"]
        settings = wire.resolve(job["scenario"], job["parameters"]).to_json()
        words = (cell.get("name"), job["scenario"], settings["input"], settings["encoder"],
                 settings["preset"], wire.settings_text(settings))
        rows.append((job["id"][:8], group.node or "any", len(group.jobs), cell.get("repeat"),
                     " ".join(str(word) for word in words if word)))
    _print_table(rows)
    _say(f"experiment {experiment.id}: {wire.count_text(len(experiment.jobs), 'job')}; "
         "nothing was submitted")


# ---- 29 Fleet Commands ---------------------------------------------------------------------------

# Commands that ask a master. Each takes the parsed words, prints its answer and returns an exit
# code; what goes wrong is raised and becomes one sentence in CLI.

Args = argparse.Namespace
Jobs = Mapping[str, wire.JobView]  # by their ids

POLL_S = 0.4     # between two questions about a job that someone waits for
FOLLOW_S = 20.0  # for which the master parks a request for new lines of a log
NODES_S = 5.0    # between two questions about the nodes that it may be waiting for


def _client(args: Args) -> wire.Client:
    client = wire.Client(args.master)
    args.client = client  # main() closes it
    return client


def cmd_submit(args: Args) -> int:
    """Submit one job, and wait for it where asked to."""
    client = _client(args)
    job = client.submit(_job_of(args))
    if args.wait:
        return _wait_and_advise(client, job, args.json)
    if args.json:
        _print_json(job.json)
        return 0

    _show(f"job {job.id} submitted: {wire.settings_text(job.settings)}")
    _say(f"follow it with: python3 ffdist.py logs {job.short_id} -f")
    return 0


def _job_of(args: Args) -> Json:
    """Return the submission that the words of a command ask for.

    It has an id of its own, so that a request that is repeated after a lost answer counts once.
    """
    parameters = dict(wire.parameters_of(args.parameters))
    if args.overwrite:
        parameters["overwrite"] = True
    if args.input is not None:
        parameters["input"] = args.input
    if args.output is not None:
        parameters["output"] = args.output
    Fields(parameters, prefix="parameters.").check_utf8()

    job: Json = {
        "id": str(uuid.uuid4()),
        "scenario": args.scenario,
        "confidence": args.confidence,
        "parameters": parameters,
    }
    if args.node:
        job["node"] = args.node
    return job


def _wait_and_advise(client: wire.Client, job: wire.JobView, as_json: bool) -> int:
    """Wait for a job; say how to stop it after Ctrl-C, and where its log is after a failure."""
    try:
        code = wait_for_job(client, job, as_json)
    except KeyboardInterrupt:
        _say(f"the job goes on; stop it with: python3 ffdist.py cancel {job.short_id}")
        return 130

    if code:
        _say(f"its log: python3 ffdist.py logs {job.short_id}")
    return code


def wait_for_job(client: wire.Client, job: wire.JobView, as_json: bool) -> int:
    """Show progress until a job has ended, then its result; return the exit code.

    An absent master is waited for: the job goes on without it.
    """
    _say(f"job {job.id}")
    nodes: Sequence[wire.NodeView] = ()
    ask_nodes_at = 0.0
    with contextlib.closing(wire.ProgressLine()) as bar:
        while job.status not in FINAL:
            time.sleep(POLL_S)
            try:
                job = client.job(job.id)
                if job.status == "pending" and time.monotonic() >= ask_nodes_at:
                    nodes = client.nodes().items
                    ask_nodes_at = time.monotonic() + NODES_S
            except ApiError as error:
                if not error.retryable:
                    raise
                bar.show(f"{error.message}; waiting")
                continue

            if job.status not in FINAL:
                bar.show(waiting_text(job, nodes, time.time(), bar.room()))

    job = client.job(job.id)
    if as_json:
        _print_json(job.json)
    else:
        show_job(job)
    return 0 if job.status == "completed" else 1


def cmd_show(args: Args) -> int:
    """Show one job."""
    job = _client(args).job(args.id)
    if args.json:
        _print_json(job.json)
    else:
        show_job(job)
    return 0


def cmd_order(args: Args) -> int:
    """Pause, resume or retry a job: the command's own name is the order."""
    job = _client(args).order(args.id, args.command)
    if args.json:
        _print_json(job.json)
    else:
        show_ordered_job(job)
    return 0


def cmd_cancel(args: Args) -> int:
    """Cancel jobs; one that cannot be canceled does not keep the others from it."""
    jobs, refusals = _cancel_each(_client(args), args.id)
    if args.json:
        _print_json(jobs[0].json if len(args.id) == 1 else {"jobs": [job.json for job in jobs]})
    else:
        for job in jobs:
            show_ordered_job(job)
    for refusal in refusals:
        _say(f"ffdist: {refusal}")
    return 1 if refusals else 0


def _cancel_each(client: wire.Client, ids: Sequence[str]) -> tuple[list[wire.JobView], list[str]]:
    """Cancel each of some jobs; return those, and the sentences about the others.

    The refusal of a single one is raised.
    """
    jobs, refusals = [], []
    for job_id in ids:
        try:
            jobs.append(client.order(job_id, "cancel"))
        except ApiError as error:
            if error.retryable or len(ids) == 1:
                raise
            refusals.append(error.message)
    return jobs, refusals


def cmd_logs(args: Args) -> int:
    """Print the log of a job; -f follows it to its end."""
    kept: list[str] = []
    upto, status = 0, ""
    for part in _log_parts(_client(args), args.id, args.follow):
        upto, status = part.next, part.status
        if args.json:
            kept += part.lines
        else:
            wire.write_stdout("".join(f"{wire.printable(line)}\n" for line in part.lines))

    if args.json:
        _print_json({"lines": kept, "next": upto})
    elif upto == 0:
        _say(f"no lines: the job is {status}; see: python3 ffdist.py show {args.id}")
    return 0


def _log_parts(client: wire.Client, job_id: str, follow: bool) -> Iterator[wire.LogPart]:
    """Yield the parts of a job's log; to its end where it is followed.

    A master that goes away meanwhile is waited for: the job goes on without it.
    """
    after = 0
    is_known = is_away = False
    while True:
        try:
            part = client.logs(job_id, after, FOLLOW_S if follow else None)
        except ApiError as error:
            if not (follow and is_known and error.retryable):
                raise
            if not is_away:
                _say(f"{error.message}; waiting")
            is_away = True
            time.sleep(POLL_S)
            continue
        is_known, is_away = True, False
        after = part.next
        yield part
        if not part.lines and (not follow or part.status in FINAL):
            return


def _page_query(client: wire.Client, args: Args) -> Json:
    """Return the query of a listing; a node is asked for by its id, whatever word was typed."""
    query = {name: getattr(args, name) for name in ("status", "scenario", "limit", "after")}
    if args.node_id:
        query["node_id"] = node_id_of(args.node_id, client.nodes().items)
    return query


def _filters_of(args: Args) -> str:
    """Return the filters of a listing as they were typed."""
    words = []
    for name in ("status", "scenario", "node_id", "after"):
        value = getattr(args, name)
        if value:
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


def node_id_of(word: str, nodes: Sequence[wire.NodeView]) -> str:
    """Return the id of a node by its name, its id, or the beginning of one of them."""
    exact = [node.id for node in nodes if word in (node.id, node.name)]
    beginning = [node.id for node in nodes
                 if node.id.startswith(word.lower()) or node.name.startswith(word)]
    found = exact or beginning  # "rack" is that node, also where there is a "rack-2"
    if len(found) == 1:
        return found[0]
    if found:
        raise CommandError(f"{len(found)} nodes begin with {wire.printable(word)}: "
                           "write more of the name or id")

    try:
        return str(uuid.UUID(word))  # results outlive a node that was forgotten
    except ValueError:
        raise CommandError(f"unknown node {wire.printable(word)}: "
                           "'python3 ffdist.py nodes' lists them") from None


def cmd_jobs(args: Args) -> int:
    """List jobs, newest first."""
    client = _client(args)
    page = client.jobs(_page_query(client, args))
    if args.json:
        _print_json(page.json)
        return 0

    # Jobs have the ids of their nodes; people know the names.
    nodes = client.nodes().items if page.items else ()
    names = {node.id: node.name for node in nodes}
    lines = [job_line(job, names) for job in page.items]
    hint = "submit one with: python3 ffdist.py submit 720p30-h264"
    show_page(Page("jobs", hint, [JOB_HEADS, *lines], page.json, _filters_of(args)))
    return 0


def cmd_results(args: Args) -> int:
    """List results, newest first."""
    client = _client(args)
    page = client.results(_page_query(client, args))
    if args.json:
        _print_json(page.json)
        return 0

    lines = [result_line(result) for result in page.items]
    hint = "they come when jobs have run"
    show_page(Page("results", hint, [RESULT_HEADS, *lines], page.json, _filters_of(args)))
    return 0


def cmd_nodes(args: Args) -> int:
    """List nodes."""
    page = _client(args).nodes()
    if args.json:
        _print_json(page.json)
    else:
        show_nodes(page.items)
    return 0


def cmd_drain(args: Args) -> int:
    """Let a node finish what runs and take nothing more."""
    node = _client(args).order_node(args.id, "drain", args.deadline)
    return _show_node_answer(node, args.json)


def cmd_undrain(args: Args) -> int:
    """Let a node work again that was drained or in quarantine."""
    node = _client(args).order_node(args.id, "resume")
    return _show_node_answer(node, args.json)


def _show_node_answer(node: wire.NodeView, as_json: bool) -> int:
    if as_json:
        _print_json(node.json)
    else:
        show_ordered_node(node)
    return 0


def cmd_forget(args: Args) -> int:
    """Remove a node."""
    node = _client(args).forget_node(args.id)
    if args.json:
        _print_json(node.json)
    else:
        _show(f"node {node.id} is {node.status}")
    return 0


def _unique_names(pairs: list[tuple[str, Any]]) -> Json:
    """Return an object of a file; ValueError for a duplicate name: JSON would keep the last."""
    found: Json = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"duplicate {name}: expected each name once in an object")
        found[name] = value
    return found


def load_experiment(path: str) -> Experiment:
    """Return the experiment of a file; ValueError says what is wrong with it, and where."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # editors on Windows write a mark first
        value = json.loads(text, object_pairs_hook=_unique_names)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: name an experiment file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None

    try:
        return experiment_of(value, Path(path).stem)
    except (ValueError, ApiError) as error:
        raise ValueError(f"{path}: {error}") from None


def cmd_experiment(args: Args) -> int:
    """Submit all jobs of an experiment, follow them to the end, and show what came out."""
    experiment = load_experiment(args.file)
    if args.dry_run:
        if args.json:
            _print_json({"experiment": experiment.id, "jobs": experiment.jobs})
        else:
            show_plan(experiment)
        return 0

    client = _client(args)
    nodes = client.nodes().items
    _refuse_unknown_nodes(experiment, nodes)
    _warn_of_nodes(experiment, nodes)
    again = f"python3 ffdist.py experiment {shlex.quote(args.file)}"
    if args.retry_failed:
        again += " --retry-failed"
    try:
        jobs = _run_experiment(client, experiment, args)
    except KeyboardInterrupt:
        _say(f"the jobs go on without this command; follow them with: {again}")
        return 130
    return _show_experiment(client, experiment, jobs, args)


def _run_experiment(client: wire.Client, experiment: Experiment,
                    args: Args) -> list[wire.JobView]:
    """Submit an experiment and, unless with --no-wait, watch it to its end."""
    count = wire.count_text(len(experiment.jobs), "job")
    _say(f"experiment {experiment.id}: {count}")
    jobs = _submit_experiment(client, experiment)
    if args.retry_failed:
        jobs = _retry_failed(client, experiment, jobs)
    if args.no_wait:
        return list(jobs.values())
    return _watch(client, jobs)


def _show_experiment(client: wire.Client, experiment: Experiment, jobs: Sequence[wire.JobView],
                     args: Args) -> int:
    """Show the results of an experiment and the next step; return the exit code."""
    details = [_detail_of(client, job) for job in jobs]
    if args.json:
        _print_json({"experiment": experiment.id, "jobs": [job.json for job in details]})
    else:
        _print_table(report_rows(distinct_curves(list(map(row_of, details)))))
        _say_next_of(details, shlex.quote(args.file))

    broken = sum(job.status in BROKEN for job in details)
    if broken:
        _say(f"{wire.count_text(broken, 'job')} did not complete; once more with: "
             f"python3 ffdist.py experiment {shlex.quote(args.file)} --retry-failed")
    return 1 if broken else 0


def _say_next_of(jobs: Sequence[wire.JobView], file: str) -> None:
    """Say how to see the plots of an experiment, or how to follow and stop what is still open."""
    if all(job.status in FINAL for job in jobs):
        _say(f"plots: python3 ffdist.py report --experiment {file} -o report.html")
        return
    _say(f"follow it with: python3 ffdist.py experiment {file}")
    _say("stop jobs of it with: python3 ffdist.py cancel ID...")


def _detail_of(client: wire.Client, job: wire.JobView) -> wire.JobView:
    """Return an ended job with its result, which lists leave out."""
    if job.status not in FINAL or job.result is not None:
        return job
    return client.job(job.id)


def _refuse_unknown_nodes(experiment: Experiment, nodes: Sequence[wire.NodeView]) -> None:
    """Refuse a node that is not registered: jobs would wait for it for ever."""
    known = {key for node in nodes for key in (node.id, node.name)}
    for group in experiment.groups:
        if not group.node or group.node in known:
            continue
        near = difflib.get_close_matches(group.node, known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "'python3 ffdist.py nodes' lists them"
        raise CommandError(f"unknown node {wire.printable(group.node)} in nodes: {hint}")


def _warn_of_nodes(experiment: Experiment, nodes: Sequence[wire.NodeView]) -> None:
    """Warn of nodes that are away, and of streams that cannot run side by side as asked."""
    if not nodes:
        _say("no node is there yet: jobs wait for one; see: python3 ffdist.py nodes")
    wanted = {group.node for group in experiment.groups}
    away = [f"{node.name} is {node.status}" for node in nodes
            if node.status in AWAY and not wanted.isdisjoint((node.id, node.name))]
    if away:
        _say(f"{', '.join(away)}: jobs wait for it; see: python3 ffdist.py nodes")

    slots = {"": sum(node.slots for node in nodes)}
    for node in nodes:
        slots[node.id] = slots[node.name] = node.slots
    wishes = {(group.node, len(group.jobs)) for group in experiment.groups}
    for name, streams in sorted(wishes):
        if streams > slots[name] > 0:
            room = wire.count_text(slots[name], "slot")
            _say(f"{name or 'the fleet'} has {room}, so {streams} streams cannot run side by side "
                 "there: start its agent with --max-concurrent-jobs")


# Jobs that are pinned to such a node wait: a warning, for it may come back before they are done.
AWAY = tuple(status for status in NODE_STATUSES if status not in ("available", "busy"))
BROKEN = ("failed", "canceled")


def _submit_experiment(client: wire.Client, experiment: Experiment) -> dict[str, wire.JobView]:
    """Submit all jobs in their order; return them by id, also those that were there before."""
    jobs: dict[str, wire.JobView] = {}
    for batch in experiment_batches(experiment.jobs, BULK_LIMIT_BYTES):
        jobs.update((job.id, job) for job in client.submit_all(batch))
    return jobs


def _retry_failed(
    client: wire.Client, experiment: Experiment, jobs: Jobs
) -> dict[str, wire.JobView]:
    """Run again the groups of which a job failed or was canceled, streams with all beside them.

    They are asked for in their order: at the master each waits again for those of its `after` that
    run again before it, so that nobody has to stay for that.
    """
    known = dict(jobs)
    for group in experiment.groups:
        beside = [jobs[job["id"]] for job in group.jobs]
        if any(job.status in BROKEN for job in beside):
            known.update(_retry_group(client, beside))
    return known


def _retry_group(client: wire.Client, jobs: Iterable[wire.JobView]) -> dict[str, wire.JobView]:
    """Run again the jobs of a group that have ended; return all of it.

    Those that did complete come first. So a group of which only a part was reached before Ctrl-C
    still has its failed job, and is found by the next try.
    """
    known = {}
    for job in sorted(jobs, key=lambda job: job.status in BROKEN):
        known[job.id] = job
        if job.status in FINAL:
            known[job.id] = client.order(job.id, "retry")
    return known


def _watch(client: wire.Client, jobs: Jobs) -> list[wire.JobView]:
    """Show progress until all jobs have ended; return them with their results.

    A look asks about so many of the open jobs, and the next one about those behind them: its cost
    does not grow with the experiment, nor with what else the master has to do. An absent master
    is waited for.
    """
    known = {job_id: _detail_of(client, job) for job_id, job in jobs.items()}
    waiting = deque(job_id for job_id, job in known.items() if job.status not in FINAL)
    with contextlib.closing(wire.ProgressLine()) as bar:
        while waiting:
            progress = experiment_progress(known.values(), len(jobs))
            bar.show(wire.progress_text(progress, bar.room()))
            time.sleep(POLL_S)
            try:
                _look(client, known, waiting)
            except ApiError as error:
                if not error.retryable:
                    raise
                bar.show(f"{error.message}; waiting")
    return list(known.values())


LOOK_JOBS = 100  # requests of one look, each POLL_S: watching must not be a load of its own


def _look(client: wire.Client, known: dict[str, wire.JobView], waiting: deque[str]) -> None:
    """Ask about the first of the open jobs; those that have not ended go to the end of the line."""
    for _ in range(min(len(waiting), LOOK_JOBS)):
        job_id = waiting[0]
        try:
            known[job_id] = client.job(job_id)
        except ApiError as error:
            if error.status != 404:
                raise
            del known[job_id]  # ended, and removed by --keep

        waiting.popleft()
        if job_id in known and known[job_id].status not in FINAL:
            waiting.append(job_id)


def cmd_report(args: Args) -> int:
    """Report on an experiment, or on all accepted results: a table, or a file."""
    ending = Path(args.output).suffix.lower() if args.output else ""
    if args.output and ending not in REPORT_KINDS:
        raise ValueError(f"invalid --output {args.output}: expected a name that ends with "
                         f"{', '.join(REPORT_KINDS)}")

    client = _client(args)
    title, ids = _jobs_to_report(client, args)
    rows = _rows_of(client, ids)
    if not args.output and not args.json:
        show_report(rows, _filters_of(args))
        return 0

    make = REPORT_KINDS[".json" if args.json else ending]
    text = make(Document(title, rows, wire.utc_text(time.time()) or ""))
    if not args.output:  # --json without a file
        wire.write_stdout(text)
        return 0
    Path(args.output).write_text(text, encoding="utf-8", errors="replace")
    _say(f"{args.output}: {title}, {wire.count_text(len(rows), 'job')}")
    return 0


def _rows_of(client: wire.Client, ids: Sequence[str]) -> list[Row]:
    """Return the rows of the jobs that the master knows, and say how many it does not know."""
    rows = []
    for job_id in ids:
        try:
            rows.append(row_of(client.job(job_id)))
        except ApiError as error:
            if error.status != 404:
                raise

    missing = len(ids) - len(rows)
    if missing:
        _say(f"{missing} of {wire.count_text(len(ids), 'job')} are unknown to the master: "
             "not submitted yet, or no longer kept")
    return distinct_curves(rows)


def _jobs_to_report(client: wire.Client, args: Args) -> tuple[str, list[str]]:
    """Return the title of a report and the ids of its jobs, oldest first."""
    if not args.experiment:
        return "Results", _reported_results(client, args)

    filters = _filters_of(args)
    if filters:
        raise ValueError(f"a report on an experiment is on all of it: leave out {filters}")
    if Path(args.experiment).is_file():
        experiment = load_experiment(args.experiment)
        return f"Experiment {experiment.name}", [job["id"] for job in experiment.jobs]

    ids = _jobs_of_experiment(client, args.experiment)
    if not ids:
        raise CommandError(f"no job belongs to an experiment {wire.printable(args.experiment)}, "
                           "and there is no such file: 'python3 ffdist.py jobs --json' has the "
                           "names")
    return f"Experiment {args.experiment}", ids


def _reported_results(client: wire.Client, args: Args) -> list[str]:
    """Return the ids of the jobs of a page of results; say so where there are more pages."""
    page = client.results(_page_query(client, args))
    if page.next:
        _say(f"these are {page.count} of {page.total} results; the next with --after {page.next}")

    # A job that a person retried has several results, but is one row.
    ids = [result.job_id for result in reversed(page.items)]
    return list(dict.fromkeys(ids))


def _jobs_of_experiment(client: wire.Client, name: str) -> list[str]:
    """Return the ids of an experiment's jobs, oldest first, from all that the master keeps."""
    ids: list[str] = []
    query: Json = {"limit": MAX_PAGE}
    while True:
        page = client.jobs(query)
        ids += [job.id for job in page.items if job.experiment.get("id") == name]
        if not page.next:
            return ids[::-1]
        query["after"] = page.next


# ---- 30 Host Commands ----------------------------------------------------------------------------

# Commands that run something on this host, or touch the files of a master here.

def _data_dir(args: Args) -> Path:
    return Path(args.data_dir or wire.state_home() / "master").absolute()


def keep_of(text: str) -> tuple[float, float]:
    """Argument type of --keep: most finished jobs, and their most age in s; inf is no limit."""
    jobs = age_s = math.inf
    for part in text.split(","):
        word = part.strip()
        if re.fullmatch(r"\d{1,12}", word):
            jobs = float(word)
        elif word != "forever":
            age_s = _age_of(word, text)
    return jobs, age_s


def _age_of(word: str, text: str) -> float:
    """Return the seconds of an age; it needs a unit, for a number alone is one of jobs."""
    if word[-1:].isalpha():
        with contextlib.suppress(ValueError):
            return wire.parse_duration(word)
    raise argparse.ArgumentTypeError(
        f"invalid limit '{text}': expected a job count, an age such as 90d, both with a comma, "
        "or forever")


def cmd_backup(args: Args) -> int:
    """Copy the journal of a master, which may be running, to a file."""
    target = Path(args.file).absolute()
    with contextlib.closing(wire.ProgressLine()) as bar:
        counts = copy_journal(_data_dir(args), target,
                              lambda part: bar.show(f"copying the journal … {100 * part:.0f} %"))
    _show(f"{target}: {counts}, {wire.size_text(target.stat().st_size)}")
    return 0


def cmd_master(args: Args) -> int:
    """Run the master until Ctrl-C or SIGTERM."""
    log = wire.setup_logging(args.log_level, args.log_format, "ffdist.master")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    folder = _data_dir(args)
    service = Service(args.host, args.port, folder, settings_of(args), log=log,
                      victoriametrics=args.victoriametrics)
    _start_and_log(service, folder, log)

    # Python runs a handler in this thread alone, and only when it wakes: so it does not wait for
    # ever.
    while not stop.wait(0.5) and service.master.journal.damage is None:
        pass
    service.stop()
    if not stop.is_set():
        log.error("the journal is damaged: %s; starting again to recover what can be read",
                  service.master.journal.damage)
        start_again()
    log.info("stopped; nothing is lost: agents work on and wait for the next start")
    return 0


def settings_of(args: Args) -> Settings:
    """Return the master's settings out of its flags; ValueError for a bad file of prices."""
    max_jobs, max_age_s = args.keep
    tariff = Tariff(
        prices=_rates("--energy-price", args.energy_price, MIN_PRICE),
        carbon=_rates("--carbon-intensity", args.carbon_intensity, 0),
        currency=args.currency)
    names = (name.strip().lower() for name in args.allow_host.split(","))
    return Settings(
        node_timeout_s=args.node_timeout,
        max_retries=args.max_retries,
        retry_delay_s=args.retry_delay,
        retry_delay_most_s=args.retry_delay_most,
        quarantine_after=args.quarantine_after,
        keep_jobs=max_jobs,
        keep_s=max_age_s,
        tariff=tariff,
        allow_hosts=frozenset(names))


def _rates(flag: str, text: str | None, low: float) -> Mapping[str, Rate]:
    if not text:
        return {}
    try:
        return rates_of(text, lambda name: Path(name).read_text(encoding="utf-8"), low)
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from None


def _start_and_log(service: Service, folder: Path, log: logging.Logger) -> None:
    """Start the service and log its address and its open work; the count is of before the start."""
    shot = service.master.queries.snapshot()
    open_jobs = sum(shot.totals.get(("jobs", status), 0) for status in STATUSES
                    if status not in FINAL)
    service.start()
    log.info("ffdist %s master at %s, data in %s: %s, %s", VERSION, service.url, folder,
             wire.count_text(len(shot.nodes), "node"), wire.count_text(open_jobs, "open job"))
    log.warning("plain HTTP without tokens: anybody who reaches this port may submit jobs")


DEMO_S = 5         # of the generated source
DEMO_FILM_S = 30   # of a film: long enough for figures, short enough to wait for
DEMO_END_S = 15.0  # an agent needs a moment to end FFmpeg and remove its files


def cmd_demo(args: Args) -> int:
    """Run a whole fleet of one on this machine: a master, an agent, a real encode."""
    provide(("ffmpeg", "ffprobe"), args.install)
    film = Path(args.input).resolve() if args.input else None
    if film is not None and not film.is_file():
        raise CommandError(f"unknown input {film}: expected a file on this machine")

    # SIGTERM unwinds like Ctrl-C, so that agent, master and folder are gone in every case.
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="ffdist-demo-") as name:
        folder = Path(name)
        log = wire.setup_logging("error", "text", "ffdist.master")
        service = Service("127.0.0.1", 0, folder / "master", Settings(), log=log)
        service.start()
        try:
            return _demo_with_agent(args, service.url, film, folder)
        except KeyboardInterrupt:
            pass  # said below, when agent, master and folder are gone
        finally:
            service.stop()
    _say("the demo was stopped; nothing is left of it")
    return 130


def _demo_with_agent(args: Args, url: str, film: Path | None, folder: Path) -> int:
    """Run an agent beside the demo's master until one job has ended."""
    _say(f"a master runs at {url}")
    log = folder / "agent.log"
    process: Process | None = None
    try:
        # Else Ctrl-C could come between the start and the assignment: nobody would end the agent.
        with open(log, "wb") as output, uninterrupted():
            process = start_program(_demo_agent(url, film, folder), output)
        client = args.client = wire.Client(url)
        nodes = await_start(process, lambda: client.nodes().items,
                            "the agent looks at this machine and tries its encoders")
        if not nodes:
            raise CommandError(f"the agent ended: {last_line(log) or 'it printed nothing'}")

        job = client.submit(_demo_job(args.scenario, film))
        if not args.json:
            show_nodes(nodes)
        return wait_for_job(client, job, args.json)
    finally:
        if process is not None:
            end_program(process, DEMO_END_S)


def _demo_agent(url: str, film: Path | None, folder: Path) -> list[str]:
    """Return the command of the demo's agent.

    Its media root may be a home folder (--yes-home), where a film of the user's mostly is: the
    master listens on loopback, and only while the demo runs.
    """
    media = folder / "media"
    media.mkdir()
    root = film.parent if film else media
    return [sys.executable, str(Path(__file__).resolve().parent / "agent.py"),
            "--register", "--master", url, "--allow-master-as-worker", "--yes",
            "--state-dir", str(folder / "agent"), "--media-root", str(root), "--yes-home",
            "--log-format", "text", "--drain-limit", "0s"]


def _demo_job(scenario: str | None, film: Path | None) -> Json:
    """Return the demo's job: the generated source, or the beginning of a film."""
    parameters: Json = {"quality": ["psnr", "ssim"], "duration": DEMO_S}
    if film is None:
        return {"scenario": scenario or "720p30-h264", "parameters": parameters}

    parameters.update(input=film.name, duration=DEMO_FILM_S)
    _say(f"the first {DEMO_FILM_S} s of {film.name} are encoded; nothing is written beside it")
    return {"scenario": scenario or "transcode", "parameters": parameters}


def cmd_monitoring(args: Args) -> int:
    """Run VictoriaMetrics, vmalert and Grafana until Ctrl-C, or write their files."""
    if (args.action == "files") != (args.folder is not None):
        raise ValueError("invalid arguments: expected 'monitoring up' or 'monitoring files DIR'")

    folder = Path(args.folder) if args.folder else _data_dir(args) / "monitoring"
    site = _site_of(args, folder.absolute())
    if args.action == "files":
        _print_table([(path,) for path in write_monitoring(site)], heads=False)
        return 0
    return _monitoring_up(site, _data_dir(args))


def _site_of(args: Args, folder: Path) -> Site:
    listen = f"[{args.listen}]" if ":" in args.listen else args.listen
    master = args.master if "://" in args.master else f"http://{args.master}"
    return Site(
        folder=str(folder),
        master=master,
        victoriametrics=args.victoriametrics,
        vmalert=f"127.0.0.1:{args.vmalert_port}",
        grafana=f"{listen}:{args.grafana_port}",
        power_limit_w=args.power_limit,
        alertmanager=args.alertmanager)


def _monitoring_up(site: Site, data: Path) -> int:
    """Start the parts, show their addresses, and stay until a signal or the end of one of them."""
    secret = Path(site.folder, "grafana", "password")
    wire.make_private_folder(data)
    wire.make_folder(secret.parent)
    if not secret.exists():
        write_whole(secret, uuid.uuid4().hex.encode())
    site = site._replace(password=secret.read_text())
    write_monitoring(site)

    end_on_sigterm()
    try:
        with running_monitoring(site) as running:
            show_monitoring(site, secret)
            raise await_end(running).failure("ended, so the others were ended too")
    except KeyboardInterrupt:
        _say(f"the monitoring has ended; its data stays in {site.folder}")
    return 0


# ---- 31 CLI --------------------------------------------------------------------------------------

# COMMANDS has a row for each subcommand: name, function, help, examples, words, flags. The
# parser, --help, the environment variables and the tables of README (by a test) all derive from
# it.

class Word(NamedTuple):
    """A positional argument, or a flag without an environment variable, as argparse takes it."""

    names: tuple[str, ...]
    options: Json


def _word(name: str, metavar: str, about: str, **more: Any) -> Word:
    return Word((name,), {"metavar": metavar, "help": about, **more})



def _id_word(text: str) -> str:
    """Argument type of an id or a name, which is one part of a path of the API."""
    if not text.strip():
        raise argparse.ArgumentTypeError("invalid ID '': expected one, as the listings show it")
    return text


_JOB_WORD = _word("id", "ID", "a job's id, or 4 or more of its first characters", type=_id_word)
_NODE_WORD = _word("id", "NODE", "a node's name or id", type=_id_word)
_OUTPUT_WORD = Word(("-o",), {"metavar": "OUTPUT", "dest": "output", "help": "short for --output"})
_PARAMETER_WORD = Word(("-p",), {
    "metavar": "NAME=VALUE", "dest": "parameters", "action": "append", "default": [],
    "help": "a parameter, such as -p bitrate=5M; may be repeated"})


class Command(NamedTuple):
    """One subcommand."""

    name: str
    run: Callable[[Args], int]
    about: str
    examples: tuple[str, ...]
    words: tuple[Word, ...] = ()
    flags: tuple[Flag, ...] = ()

    @property
    def description(self) -> str:
        """The help as a sentence."""
        return f"{self.about[0].upper()}{self.about[1:]}."


def _currency(text: str) -> str:
    if 0 < len(text) <= 16 and wire.printable(text) == text:
        return text
    raise argparse.ArgumentTypeError(
        f"invalid currency '{text}': expected a word of at most 16 characters, such as EUR")


_MASTER_FLAG = Flag("--master", "http://localhost:8080", str,
                    "the master's address (http://localhost:8080)")
_JSON_FLAG = Flag("--json", False, None, "print the API's own JSON")
_ASK_FLAGS = (_MASTER_FLAG, _JSON_FLAG)
_DATA_FLAG = Flag("--data-dir", None, Path, "folder of the journal (~/.local/state/ffdist/master)")


def _page_flags(limit: int) -> tuple[Flag, ...]:
    """Return the flags of a listing with a default limit; the master checks the values."""
    return (
        Flag("--status", None, str, "only of this status"),
        Flag("--scenario", None, str, "only of this scenario"),
        Flag("--node-id", None, str, "only of this node, by name or id"),
        Flag("--limit", str(limit), str, f"at most so many ({limit})"),
        Flag("--after", None, str, "the cursor that the page before ended with"),
    )


_MASTER = Command(
    "master", cmd_master, "run the master",
    examples=("--port 8080", "--energy-price 0.30 --currency EUR"),
    flags=(
        Flag("--port", "8080", wire.whole_number(0, 65535),
             "port to listen on (8080; 0: any free one)"),
        Flag("--host", "0.0.0.0", str, "address to listen on (0.0.0.0: all)"),
        Flag("--allow-host", "", str,
             "names by which browsers may reach it beside the host name, comma-separated (none)"),
        _DATA_FLAG,
        Flag("--node-timeout", "90s", wire.seconds, "silence after which a node is lost (90s)"),
        Flag("--max-retries", "3", wire.whole_number(0, 100),
             "how often a job is tried again after a lost node or a failure that may pass (3)"),
        Flag("--retry-delay", "1s", wire.seconds,
             "longest wait before the first retry, doubling then (1s)"),
        Flag("--retry-delay-most", "5m", wire.seconds, "longest wait before any retry (5m)"),
        Flag("--quarantine-after", "3", wire.whole_number(0, 1000),
             "failures in a row that put a node in quarantine (3; 0: never)"),
        Flag("--keep", "1000000", keep_of,
             "finished jobs to keep: a number, an age such as 90d, both, or forever (1000000)"),
        Flag("--victoriametrics", None, wire.web_address,
             "address of a VictoriaMetrics to push to (none)"),
        Flag("--energy-price", None, str, "price of a kWh, or a CSV file by hour"),
        Flag("--carbon-intensity", None, str, "g CO2e of a kWh, or a CSV file by hour"),
        Flag("--currency", None, _currency, "what the price is in, such as EUR"),
        Flag("--log-level", "info", wire.one_of("debug", "info", "warning", "error"),
             "debug, info, warning or error"),
        Flag("--log-format", "text", wire.one_of("text", "json"), "text or json"),
    ),
)

_BACKUP = Command(
    "backup", cmd_backup, "copy the journal of a master, running or not, to a file",
    examples=("ffdist-copy.db",),
    words=(_word("file", "FILE", "the copy; an earlier one is replaced"),),
    flags=(_DATA_FLAG,),
)

_DEMO = Command(
    "demo", cmd_demo, "a master, an agent and a real encode, here and now",
    examples=("--install",),
    flags=(
        Flag("--install", False, None, "install ffmpeg where it is missing"),
        Flag("--input", None, str, "a film of yours (a generated source)"),
        Flag("--scenario", None, str, "what to encode (720p30-h264; with a film: transcode)"),
        _JSON_FLAG,
    ),
)

_SUBMIT = Command(
    "submit", cmd_submit, "submit a job",
    examples=("4K60-h264 -p duration=300 -p bitrate=15000k --wait",
              "1080p30-h264 --input movie.mov -o movie.mp4 --wait"),
    words=(
        _word("scenario", "SCENARIO", "such as 1080p30-h264 (transcode)", nargs="?",
              default="transcode"),
        _PARAMETER_WORD,
        _OUTPUT_WORD,
    ),
    flags=(
        Flag("--input", None, str,
             "path under the agents' media root, or URL (a generated source)"),
        Flag("--output", None, str, "path or URL (encoded, measured, discarded)"),
        Flag("--overwrite", False, None, "replace an output that exists"),
        Flag("--confidence", "auto", wire.one_of(*CONFIDENCES), "auto, low, medium or high"),
        Flag("--node", None, str, "the node that is to run it, by name or id (any)"),
        Flag("--wait", False, None, "show progress until the job ends"),
        *_ASK_FLAGS,
    ),
)

_LOGS = Command(
    "logs", cmd_logs, "print the log of a job",
    examples=("550e8400 -f",),
    words=(_JOB_WORD,
           Word(("-f", "--follow"), {"action": "store_true", "help": "follow it to its end"})),
    flags=_ASK_FLAGS,
)

_EXPERIMENT = Command(
    "experiment", cmd_experiment,
    "run a matrix of jobs from a file, or follow it again",
    examples=("codecs.json --dry-run", "codecs.json", "codecs.json --retry-failed"),
    words=(_word("file", "FILE", "an experiment, as JSON"),),
    flags=(
        Flag("--dry-run", False, None, "check the file and show the jobs; submit nothing"),
        Flag("--no-wait", False, None, "submit the jobs, and do not follow them"),
        Flag("--retry-failed", False, None,
             "run again what failed or was canceled before, with its streams"),
        *_ASK_FLAGS,
    ),
)

_REPORT = Command(
    "report", cmd_report, "tables and plots over many results",
    examples=("--experiment codecs.json -o report.html", "--scenario 1080p30-h264 -o results.csv"),
    words=(_OUTPUT_WORD,),
    flags=(
        Flag("--experiment", None, str, "an experiment's file or id (all results)"),
        Flag("--output", None, str,
             "a file to write: .html, .csv or .json (a table on the terminal)"),
        *_page_flags(MAX_PAGE),
        *_ASK_FLAGS,
    ),
)

_DRAIN = Command(
    "drain", cmd_drain, "let a node finish what runs and take nothing more",
    examples=("worker-01 --deadline 10m",),
    words=(_NODE_WORD,),
    flags=(
        Flag("--deadline", None, wire.seconds,
             "what still runs then is given back to other nodes (never)"),
        *_ASK_FLAGS,
    ),
)

_MONITORING = Command(
    "monitoring", cmd_monitoring,
    "run VictoriaMetrics, vmalert and Grafana until Ctrl-C",
    examples=("up", "files DIR"),
    words=(
        _word("action", "ACTION", "up, or files with a folder", choices=("up", "files")),
        _word("folder", "DIR", "where 'files' writes to", nargs="?"),
    ),
    flags=(
        _DATA_FLAG,
        Flag("--victoriametrics", "http://127.0.0.1:8428", wire.web_address,
             "where VictoriaMetrics listens (http://127.0.0.1:8428)"),
        Flag("--listen", "127.0.0.1", str,
             "address that Grafana listens on (127.0.0.1; 0.0.0.0: all)"),
        Flag("--grafana-port", "3000", wire.whole_number(1, 65535), "port of Grafana (3000)"),
        Flag("--vmalert-port", "8880", wire.whole_number(1, 65535),
             "port of vmalert on 127.0.0.1 (8880)"),
        Flag("--alertmanager", None, wire.web_address, "address that alerts are sent to (none)"),
        Flag("--power-limit", "1000", wire.whole_number(1, 1_000_000),
             "W of one node that raise an alert (1000)"),
        _MASTER_FLAG,
    ),
)


def _about_job(name: str, run: Callable[[Args], int], about: str) -> Command:
    """Return a command about one job."""
    return Command(name, run, about, ("550e8400",), (_JOB_WORD,), _ASK_FLAGS)


def _about_node(name: str, run: Callable[[Args], int], about: str) -> Command:
    """Return a command about one node."""
    return Command(name, run, about, ("worker-01",), (_NODE_WORD,), _ASK_FLAGS)


COMMANDS: Mapping[str, Command] = {command.name: command for command in (
    _MASTER,
    _BACKUP,
    _DEMO,
    _SUBMIT,
    Command("jobs", cmd_jobs, "list jobs", ("--status running",),
            flags=(*_page_flags(20), *_ASK_FLAGS)),
    _about_job("show", cmd_show, "show one job"),
    _LOGS,
    Command("cancel", cmd_cancel, "cancel jobs", ("550e8400", "550e8400 7c9e6679"),
            words=(_word("id", "ID", "ids of jobs, or 4 or more of their first characters",
                         type=_id_word, nargs="+"),),
            flags=_ASK_FLAGS),
    _about_job("pause", cmd_order,
               "hold a job where it is; its processes stand still until it is resumed"),
    _about_job("resume", cmd_order, "let a paused job go on"),
    _about_job("retry", cmd_order, "run a finished job again"),
    _EXPERIMENT,
    _REPORT,
    Command("nodes", cmd_nodes, "list nodes", ("",), flags=_ASK_FLAGS),
    _DRAIN,
    _about_node("undrain", cmd_undrain, "let a node work again that was drained or in quarantine"),
    _about_node("forget", cmd_forget, "remove a node; its jobs are pending again"),
    Command("results", cmd_results, "list results", ("--json",),
            flags=(*_page_flags(20), *_ASK_FLAGS)),
    _MONITORING,
)}


def epilog_of(*names: str) -> str:
    """Return examples of subcommands, and the meaning of the exit codes."""
    lines = [f"  python3 ffdist.py {name} {example}".rstrip()
             for name in names for example in COMMANDS[name].examples]
    examples = "\n".join(lines)
    return f"""examples:
{examples}
exit codes: 0 done; 1 the job failed, or it does not exist; 2 wrong usage;
            3 no master there; 130 interrupted
"""


def build_parser(words: Container[str] = COMMANDS) -> argparse.ArgumentParser:
    """Return the parser of a command line, made from COMMANDS.

    Only the commands that are among its words get their flags: all of them together take longer
    than most commands.
    """
    parser = wire.Parser("ffdist.py", description="FFmpeg on a fleet of bare servers.",
                         epilog=epilog_of("demo", "master", "submit", "jobs", "results"),
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.words = COMMANDS  # it names the nearest of them for a mistyped one
    parser.add_argument("--version", action="version", version=f"ffdist {VERSION}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.about, description=command.description,
                                    epilog=epilog_of(name),
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
        if name not in words:
            continue
        for word in command.words:
            sub.add_argument(*word.names, **word.options)
        wire.add_flags(sub, command.flags)
    return parser


def exit_code_of(error: ApiError) -> int:
    """Return the exit code of a refused request."""
    if error.status in (0, 401, 403):  # 0: no answer
        return 3
    if error.status in (400, 413):
        return 2
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    wire.open_output()
    if sys.stdout is None:  # closed by `>&-`: as if its reader had gone; a master needs none
        sys.stdout = wire.open_nowhere()
    try:
        words = sys.argv[1:] if argv is None else argv
        parser = build_parser(words)
        args = parser.parse_args(words)
        if args.command is None:
            parser.print_help(sys.stderr)
            return 2
        return _run(args)
    finally:
        wire.close_output()


def _run(args: Args) -> int:
    """Run a command; turn what it raises into one sentence and an exit code."""
    try:
        code = COMMANDS[args.command].run(args)
        wire.write_stdout()  # here, where a reader that has gone is no error
        return code
    except BrokenPipeError:
        return 0  # `ffdist.py jobs | head`: the reader has what it wanted
    except KeyboardInterrupt:
        return 130
    except (ApiError, CommandError, ValueError, OSError) as error:
        code, sentence = _failure_of(error)
        _say(f"ffdist: {sentence}")
        return code
    finally:
        client = getattr(args, "client", None)
        if client is not None:
            client.close()


def _failure_of(error: Exception) -> tuple[int, str]:
    """Return the exit code and the sentence of what a command raised."""
    if isinstance(error, ApiError):
        return exit_code_of(error), error.message + _hint_of(error)
    if isinstance(error, CommandError):
        return 1, str(error)
    if isinstance(error, OSError):
        return 1, f"{error.filename or 'this machine'}: {error.strerror or error}"
    return 2, str(error)  # ValueError: wrong usage or input


def _hint_of(error: ApiError) -> str:
    """Return the next step where nothing listens at the master's address, or a job is unknown."""
    if error.nobody_listens:
        return ("; start one with 'python3 ffdist.py master', or name it with --master or "
                "FFDIST_MASTER")
    if error.status == 404 and error.field == "id":
        mark = ";" if ":" in error.message else ":"
        return f"{mark} 'python3 ffdist.py jobs' lists them"
    return ""


if __name__ == "__main__":
    sys.exit(main())
