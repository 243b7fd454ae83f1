#!/usr/bin/env python3
"""ffdist agent: the worker that runs on every server of the fleet.

It finds out what the machine can really do (hwdetect), registers with a master, asks for jobs, runs
FFmpeg with parameters fit to this machine, measures while it runs, judges and reports the result.
`agent.py run` does the same job on this machine without a master.

What it does not promise: it never opens a port, never runs a shell, and reads and writes films
only under its media root. An attempt may be run again elsewhere when this node was out of reach
for long; the master accepts one report only.

Sections (each uses only those above it):
  1 Wire        protocol, ApiError, Failure, Fields: the one reader of JSON
  2 Metrics     every figure of a result: meaning, formula, how it is shown and exported
  3 Messages    the master's answers as types: Job, Answer, Registered, views for people
  4 Words       text for people: result rows, tables, the progress line, log lines
  5 Client      the only urllib and the only sockets: one connection per thread, typed methods
  6 Catalogue   only tables: parameters, codecs, containers, encoders, presets, ladder
  7 Scenario    scenario and parameters -> resolved Settings (pure; the master uses it too)
  8 Choices     settings + machine + source -> encoder, preset, picture, rate (pure)
  9 Command     those choices -> Plan: the commands of FFmpeg and ffprobe (pure)
 10 Output      what FFmpeg and ffprobe say: progress, probe, damage, last words, scores (pure)
 11 Statistics  intervals, outliers, confidence (pure)
 12 Places      what a job may touch: paths, hosts, room on disk; kinds of input
 13 Publishing  how an output gets its name; kinds of output
 14 Run         one program at a time: the clock, the limits, stop verbs
 15 Stages      the stages of an attempt: probe, encode, inspect, compare
 16 Attempt     one attempt from its job to its outcome; what a killed one left
 17 Analysis    metrics, verdict, suggestion (pure)
 18 State       spool, identity, folder locks
 19 Session     the talk with the master: registration, claims, progress, results
 20 Agent       slots, threads, drain
 21 CLI         flags, the single-node workflow, main

Threads: the main thread waits for signals; the poller holds the parked request; the reporter sends
progress and empties the spool; each attempt has a thread, and needs one of the node's slots only
while it encodes. Two locks: Agent's guards which attempts run, a Stopwatch's guards an attempt's
clock and pause; nothing blocks while holding one.

Where things go: a kind of output is a class in Publishing and a line in output_of(), a kind of
input the same in Places; a parameter is a row of PARAMETERS and an encoder one of ENCODERS
(Catalogue), a figure of a result a row of METRICS, a recommendation a row of VERDICTS (Analysis),
a step of an attempt a function in Stages and its call in Attempt.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import fractions
import functools
import hashlib
import http.client
import ipaddress
import itertools
import json
import logging
import math
import os
import pwd
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import stat
import statistics
import sys
import tempfile
import textwrap
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Optional, Protocol, TextIO, TypeVar

import hwdetect

# ffdist never imports hwdetect: it reaches what all three files share through these names.
from hwdetect import DAY_S as DAY_S
from hwdetect import Flag as Flag
from hwdetect import Json as Json
from hwdetect import Parser as Parser
from hwdetect import add_flags as add_flags
from hwdetect import cause_text as cause_text
from hwdetect import count_text as count_text
from hwdetect import duration_text as duration_text
from hwdetect import error_words as error_words
from hwdetect import make_folder as make_folder
from hwdetect import make_private_folder as make_private_folder
from hwdetect import one_of as one_of
from hwdetect import parse_duration as parse_duration
from hwdetect import power_model as power_model
from hwdetect import printable as printable
from hwdetect import seconds as seconds
from hwdetect import size_bytes as size_bytes
from hwdetect import size_text as size_text
from hwdetect import state_home as state_home
from hwdetect import utc_text as utc_text
from hwdetect import whole_number as whole_number
from hwdetect import write_stdout as write_stdout

# ---- 1 Wire --------------------------------------------------------------------------------------

VERSION = hwdetect.VERSION
PROTOCOL = 1  # sessions, parked requests, orders; the seed's master and agents have none
WAIT_MAX_S = 60.0  # the longest time that a request may be parked
NODE_TIMEOUT_S = 90.0  # the silence after which a master without an own word takes a node for lost
CLOSED_STATUSES = ("completed", "failed", "canceled", "returned")  # they end an attempt


class ApiError(Exception):
    """A request that was refused, or that never got an answer.

    `status` is the HTTP status (0: no answer at all), `field` the field to blame, `retryable`
    whether the same request may succeed later, and not before `retry_after_s`, which a server that
    has too much to do asks for. `nobody_listens`: the connection was refused.
    """

    def __init__(self, status: int, message: str, field: str | None = None, *,
                 nobody_listens: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.field = field
        self.nobody_listens = nobody_listens
        self.retry_after_s = retry_after_s

    @property
    def retryable(self) -> bool:
        """Whether it may pass: no answer, a fault of the server, a timeout, too many requests."""
        return self.status == 0 or self.status >= 500 or self.status in (408, 429)

    def to_json(self) -> Json:
        if self.field is None:
            return {"error": self.message}
        return {"error": self.message, "field": self.field}


class Failure(Exception):
    """The failure of an attempt: a `failure_reason`, and a sentence that names file or field."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


_CONTROL = re.compile("[\x00-\x1f\x7f]")
# Halves of a character, which UTF-8 cannot carry. Python makes them of the other bytes of a name.
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_UTF8 = "is not UTF-8: if it names a file, rename the file"


class Fields:
    """The fields of one JSON object, each checked as it is read: the edge's one reader of JSON.

    It reads messages to the master, parameters of a job and answers to the Client. A method returns
    None (`words` "", lists and objects empty ones) where the field is absent or null. A value of
    another kind, or outside its limits, raises ApiError with `status` (400 for a request, 0 for an
    answer that makes no sense), which names the field as `prefix` and its name: `parameters.crf`. A
    `lenient` reader takes such a value for an absent one: a strange result that another program
    stored must not hide everything beside it.

    With `texts` a number may be a text, as all values of a query are. Unknown fields are ignored,
    for later versions may send more.
    """

    def __init__(self, value: object, name: str = "the body", *, prefix: str = "",
                 status: int = 400, texts: bool = False, lenient: bool = False) -> None:
        self._prefix = prefix
        self._status = status
        self._texts = texts
        self._lenient = lenient
        self.values: Json = {}  # for fields that are passed on unchecked
        if isinstance(value, dict):
            self.values = value
        elif not lenient:
            raise ApiError(status, f"{name} must be a JSON object", prefix.rstrip(".") or None)

    def error(self, field: str, message: str) -> ApiError:
        """Return the refusal of a field: a sentence that begins with its name."""
        name = self._prefix + field
        return ApiError(self._status, f"{name} {message}", name)

    def _refuse(self, field: str, message: str) -> None:
        if not self._lenient:
            raise self.error(field, message)

    def text(self, field: str, limit: int = 255) -> str | None:
        """Return a printable text of 1 to `limit` characters."""
        value = self.values.get(field)
        if value is None:
            return None
        if not isinstance(value, str) or not 0 < len(value) <= limit:
            self._refuse(field, f"must be a text of 1 to {limit} characters")
            return None
        if _CONTROL.search(value):
            self._refuse(field, "must not hold control characters")
            return None
        if _SURROGATE.search(value):
            self._refuse(field, _NOT_UTF8)
            return None
        return value

    def check_utf8(self) -> None:
        """Refuse a text that cannot be sent: the master could not say which field it is."""
        for field, value in self.values.items():
            if isinstance(value, str) and _SURROGATE.search(value):
                self._refuse(field, _NOT_UTF8)

    def required_text(self, field: str, limit: int = 255) -> str:
        """Return a printable text; one that is missing is refused, of a lenient reader too."""
        value = self.text(field, limit)
        if value is None:
            raise self.error(field, f"is required: a text of 1 to {limit} characters")
        return value

    def words(self, field: str, limit: int = 1 << 16) -> str:
        """Return a text of any characters, cut to `limit`."""
        value = self.values.get(field)
        if isinstance(value, str):
            return value[:limit]
        if value is not None:
            self._refuse(field, "must be a text")
        return ""

    def number(self, field: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        """Return a finite number within limits (inclusive)."""
        value: object = self.values.get(field)
        if value is None:
            return None
        if self._texts and isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
        if not isinstance(value, (int, float)) or not is_number(value):  # the first for mypy alone
            self._refuse(field, "must be a number")
            return None
        if not low <= value <= high:
            self._refuse(field, f"must be {_limits_text(low, high)}")
            return None
        return value

    def whole(self, field: str, low: float = -math.inf, high: float = math.inf) -> int | None:
        """Return a whole number within limits (inclusive); 3.0 is one."""
        value = self.number(field, low, high)
        if value is None:
            return None
        if value != int(value):
            self._refuse(field, "must be a whole number")
            return None
        return int(value)

    def flag(self, field: str) -> bool | None:
        """Return true or false."""
        value = self.values.get(field)
        if value is not None and not isinstance(value, bool):
            self._refuse(field, "must be true or false")
            return None
        return value

    def uuid(self, field: str) -> str | None:
        """Return a UUID in its usual form."""
        value = self.text(field, 45)
        if value is None:
            return None
        try:
            return str(uuid.UUID(value))
        except ValueError:
            self._refuse(field, "must be a UUID")
            return None

    def items(self, field: str, kind: str = "a list") -> list[Any]:
        """Return the entries of a list, unchecked."""
        value = self.values.get(field)
        if isinstance(value, list):
            return value
        if value is not None:
            self._refuse(field, f"must be {kind}")
        return []

    def mapping(self, field: str, kind: str = "an object") -> Json:
        """Return an object, unchecked."""
        value = self.values.get(field)
        if isinstance(value, dict):
            return value
        if value is not None:
            self._refuse(field, f"must be {kind}")
        return {}

    def inside(self, field: str) -> Fields:
        """Return the reader of an object."""
        return self._reader(self.mapping(field), field)

    def entries(self, field: str, kind: str = "a list of objects") -> list[Fields]:
        """Return the readers of a list of objects."""
        found = []
        for number, value in enumerate(self.items(field, kind)):
            if isinstance(value, dict):
                found.append(self._reader(value, f"{field}[{number}]"))
            else:
                self._refuse(field, f"must be {kind}")
        return found

    def _reader(self, value: Json, name: str) -> Fields:
        prefix = f"{self._prefix}{name}."
        return Fields(value, name, prefix=prefix, status=self._status, lenient=self._lenient)


def _limits_text(low: float, high: float) -> str:
    """Return limits for people; whole numbers print whole: `from 1 to 2592000`."""
    texts = [str(int(limit)) if limit % 1 == 0 else f"{limit:g}" for limit in (low, high)]
    if high == math.inf:
        return f"at least {texts[0]}"
    return f"from {texts[0]} to {texts[1]}"


def is_number(value: object) -> bool:
    """Return whether a value of JSON is a finite number: true, false, NaN and infinity are not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # more digits than a float has room for
        return False


def answer_fields(value: object) -> Fields:
    """Return the fields of an answer of the master."""
    return Fields(value, "the master's answer", status=0)


# ---- 2 Metrics -----------------------------------------------------------------------------------

# The tables of a report, in their order.
SPEED_TABLE = "Speed and size"
QUALITY_TABLE = "Quality"
MONEY_TABLE = "Energy, money and carbon"
POWER_TABLE = "Power"
CURRENCY = "currency"  # the unit of a price: what the tariff names


class Metric(NamedTuple):
    """One row of METRICS: a figure of a result, its meaning, how it is merged, exported and shown.

    Agent: `repeats` says how figures of several runs merge: their `mean`, the `most`, or the `last`
    run's. `formula` is given where the figure follows from others. `unknown` is the reason beside a
    null; a word in braces is replaced by a cause that is known only after the run. A metric of the
    machine (`of_machine`) exists without a film too, as in a baseline.

    Shown: `phrase` formats the value for a result on the terminal, `short` for a cell of a table
    there; `table` is the table of a report with a column for it, under `label` and `unit`, with
    `digits` that count, which also print a cell without a `short`. One with `of_energy` is an
    estimate when energy is.

    Exported: where `exported`, its time series is `series`, or else its name.
    """

    name: str
    about: str
    unit: str = ""
    label: str = ""
    digits: int = 3
    table: str = ""
    phrase: str = ""
    short: str = ""
    repeats: str = "last"
    formula: str = ""
    unknown: str = "not measured"
    of_machine: bool = False
    of_energy: bool = False
    exported: bool = True
    series: str = ""
    by_master: bool = False

    @property
    def series_name(self) -> str:
        """Its time series after `ffdist_job_`."""
        return self.series or self.name

    @property
    def axis(self) -> str:
        """The text at an axis, or above a column."""
        return f"{self.label}, {self.unit}" if self.unit not in ("", CURRENCY) else self.label


def _score_rows(metric: str, label: str, unit: str, digits: int, phrase: str) -> tuple[Metric, ...]:
    """Return the three rows of a quality metric: its mean, the worst frame, the harmonic mean."""
    suffix = "_db" if unit else ""
    rows = (("", "against the source, mean.", ""), ("_min", "of the worst frame.", " least"),
            ("_harmonic", "against the source, harmonic mean.", " harmonic mean"))
    return tuple(
        Metric(f"{metric}{part}{suffix}", f"{label} {about}", unit, label + words, digits,
               QUALITY_TABLE, phrase, unknown="not asked for")
        for part, about, words in rows)


_TOO_SHORT = "the run was too short to sample"
_NO_SIZE = "the output's size is unknown"
_NO_LENGTH = "the length is unknown"

# Every figure of a result's `metrics`, in the order of reports and exports. Analysis computes by
# it; the rows of a result, the reports and the export of ffdist show by it; README lists it.
METRICS: Mapping[str, Metric] = {row.name: row for row in (
    Metric("duration", "Wall time of the encode.",
           "s", "time", table=SPEED_TABLE,
           repeats="mean", series="duration_seconds"),
    Metric("speed", "Seconds of film per second of wall time.",
           "x", "speed", table=SPEED_TABLE,
           phrase="{:.2f}x real time", short="{:.2f}x", formula="output_seconds / duration",
           unknown=_NO_LENGTH),
    Metric("fps", "Frames per second of wall time.",
           "", "frames/s", table=SPEED_TABLE,
           phrase="{:.1f} fps", formula="frames / duration"),
    Metric("cpu_usage", "% of the whole machine, mean over the run.",
           "%", "CPU", table=SPEED_TABLE,
           phrase="{:.0f} % of the machine", short="{:.0f} %",
           repeats="mean", unknown=_TOO_SHORT, of_machine=True),
    Metric("memory_usage", "Peak memory of the job's processes.",
           "MiB", "memory", table=SPEED_TABLE,
           phrase="{:.0f} MiB peak",
           repeats="most", series="memory_mib"),
    Metric("bitrate_kbps", "kbit/s of the whole output.",
           "kbit/s", "rate", 4, SPEED_TABLE,
           phrase="{:.0f} kbit/s", short="{:.0f} kbit/s",
           formula="8 * output_bytes / (1000 * output_seconds)",
           unknown=_NO_SIZE),
    Metric("bits_per_pixel", "Bits for each pixel of the output.",
           "", "bit/pixel", table=SPEED_TABLE,
           formula="8 * output_bytes / (width * height * frames)",
           unknown=_NO_SIZE),
    Metric("output_bytes", "Size of the output.",
           "", "size", table=SPEED_TABLE,
           unknown="the output went to a stream"),

    *_score_rows("psnr", "PSNR", "dB", 4, "{:.2f} dB"),
    *_score_rows("ssim", "SSIM", "", 5, "{:.4f}"),
    *_score_rows("vmaf", "VMAF", "", 4, "{:.1f}"),
    *_score_rows("xpsnr", "XPSNR", "dB", 4, "{:.2f} dB"),

    Metric("energy_joules", "Energy, this job's share of the machine.",
           "J", "energy", table=MONEY_TABLE,
           phrase="{:.0f} J",
           repeats="mean", of_energy=True),
    Metric("net_energy_joules", "Energy above that of the idle machine.",
           "J", "above idle", table=MONEY_TABLE,
           phrase="{:.0f} J above idle", formula="energy_joules - idle_joules",
           unknown="{idle}", of_machine=True, of_energy=True),
    Metric("energy_wh", "Energy in Wh.",
           "Wh", "energy", table=MONEY_TABLE,
           formula="energy_joules / 3600",
           unknown="{energy}", of_machine=True, of_energy=True, exported=False),
    Metric("energy_cost", "Price of the energy, in the tariff's currency.",
           CURRENCY, "cost", table=MONEY_TABLE,
           of_energy=True, by_master=True),
    Metric("carbon_g", "gCO2e of the energy.",
           "g", "CO2e", table=MONEY_TABLE,
           of_energy=True, by_master=True),
    Metric("energy_wh_per_minute", "Wh for each minute of output.",
           "", "Wh a minute", table=MONEY_TABLE,
           of_energy=True, by_master=True),
    Metric("cost_per_minute", "Price of the energy for each minute of output.",
           CURRENCY, "cost a minute", table=MONEY_TABLE,
           of_energy=True, by_master=True),
    Metric("carbon_g_per_minute", "gCO2e for each minute of output.",
           "", "g CO2e a minute", table=MONEY_TABLE,
           of_energy=True, by_master=True),

    Metric("power_watts", "Mean power while it ran.",
           "W", "power", table=POWER_TABLE,
           phrase="{:.1f} W", formula="energy_joules / duration",
           unknown="{energy}", of_machine=True, of_energy=True),
    Metric("idle_watts", "Power of the idle machine.",
           "W", "idle", table=POWER_TABLE,
           phrase="{:.1f} W",
           repeats="mean", unknown="{idle}", of_machine=True, of_energy=True),
    Metric("joules_per_frame", "Energy for each frame.",
           "J", "a frame", table=POWER_TABLE,
           phrase="{:.3g} J a frame", formula="energy_joules / frames",
           unknown="{energy}", of_energy=True),
    Metric("pixels_per_joule", "Pixels encoded for each joule.",
           "", "pixels/J", 4, POWER_TABLE,
           formula="width * height * frames / energy_joules",
           unknown="{energy}", of_energy=True),

    Metric("frames", "Frames encoded.",
           phrase="{:.0f}"),
    Metric("dropped_frames", "Frames that FFmpeg dropped."),
    Metric("output_seconds", "Length of the output.",
           "s"),
    Metric("cpu_seconds", "CPU time of the job's processes.",
           "s",
           phrase="{:.1f} CPU s",
           repeats="mean"),
    Metric("background_cpu_percent", "% of the machine that others used meanwhile.",
           "%",
           repeats="mean", unknown=_TOO_SHORT, of_machine=True),
    Metric("gpu_usage", "% of the GPU.",
           "%",
           repeats="mean", unknown="{gpu}", of_machine=True),
    Metric("gpu_memory_usage", "Peak memory used on the GPU.",
           "MiB",
           unknown="{gpu}", of_machine=True, series="gpu_memory_mib"),
    Metric("gpu_energy_joules", "Energy of the GPU.",
           "J",
           repeats="mean", unknown="{gpu_energy}", of_machine=True),

    Metric("duplicated_frames", "Frames that FFmpeg doubled.",
           exported=False),
    Metric("damaged_packets", "Signs of damage in the input that FFmpeg logged.",
           exported=False),
    Metric("headroom_percent", "Share of the film's length by which the encode was faster.",
           "%",
           formula="100 - 100 * duration / output_seconds",
           unknown=_NO_LENGTH, exported=False),
    Metric("idle_joules", "Energy of the idle machine in the same time.",
           "J",
           repeats="mean", unknown="{idle}", of_machine=True, exported=False),
    Metric("quality_per_wh", "Quality for each Wh: the first known of vmaf, psnr_db and xpsnr_db.",
           formula="quality / energy_wh",
           unknown="{quality}", exported=False),
    Metric("power_source", "Where the energy was read.",
           unknown="{energy}", of_machine=True, exported=False),
    Metric("power_resolution", "How fine its readings are.",
           unknown="{energy}", of_machine=True, exported=False),
    Metric("energy_estimated", "Whether a power model estimated the energy.",
           unknown="{energy}", of_machine=True, exported=False),
    Metric("throttled", "Whether heat slowed down a processor or GPU.",
           repeats="most", unknown="the kernel does not count it here", of_machine=True,
           exported=False),
    Metric("jobs_beside", "Jobs that ran at the same time.",
           repeats="most", exported=False),
)}
# Figures that follow from others. `quality` is the first known of vmaf, psnr_db and xpsnr_db.
FORMULAS = {row.name: row.formula for row in METRICS.values() if row.formula}


# ---- 3 Messages ----------------------------------------------------------------------------------

# Answers of the master become values here, once: inside there is no raw JSON. Answers that the
# agent acts on are read strictly, and one that makes no sense counts as none: the agent asks again
# and does not work on half an order. Views for people are lenient, for they also show what programs
# of others have stored; only a job or a node without an id is refused. The seed's master sends
# fewer fields than this one: what may be missing has a default.

@dataclass(frozen=True)
class Job:
    """A job that this node has claimed: the attempt, and what is asked for.

    `scenario` and `parameters` are as they were given: resolve() checks them, and its error is the
    attempt's. `published` are the fingerprints of the films that earlier attempts have named.
    """

    id: str
    attempt: int
    scenario: object
    parameters: object
    confidence: str = "auto"
    published: tuple[Json, ...] = ()

    @classmethod
    def from_json(cls, value: object) -> Job:
        """Return a claimed job; the seed's master numbers no attempts, and may send less."""
        fields = Fields(value, "the claimed job", prefix="job.", status=0)
        return cls(
            id=fields.required_text("id", 64),
            attempt=fields.whole("attempt", 1) or 1,
            scenario=fields.values.get("scenario"),
            parameters=fields.values.get("parameters"),
            confidence=fields.text("confidence") or "auto",
            published=tuple(entry.values for entry in fields.entries("published")))

    @property
    def key(self) -> tuple[str, int]:
        """The job and the number of this attempt."""
        return self.id, self.attempt


class Order(NamedTuple):
    """An order of the master about one attempt: cancel, return, pause or resume."""

    action: str
    job_id: str
    attempt: int


@dataclass(frozen=True)
class Answer:
    """The master's answer to a claim, a heartbeat or progress.

    Orders stand until they are obeyed; `seen` is the number of the newest, which the next request
    sends back. `claim` is true where the claim word was used up: the next claim needs a new one.
    `next_s` is when the master wants the next progress, in s from now.
    """

    job: Job | None = None
    orders: tuple[Order, ...] = ()
    seen: int | None = None
    claim: bool = False
    next_s: float | None = None

    @classmethod
    def from_json(cls, value: object) -> Answer:
        """Return the answer; the seed's master may send the bare job for a claim."""
        fields = answer_fields(value)
        job = fields.mapping("job")
        if "job" not in fields.values and "scenario" in fields.values:
            job = fields.values  # the bare job
        # The field is called `actions`; `orders` is the number of the newest.
        orders = [
            Order(entry.required_text("action"), entry.required_text("job_id"),
                  entry.whole("attempt", 1) or 1)
            for entry in fields.entries("actions")]
        return cls(
            job=Job.from_json(job) if job else None,
            orders=tuple(orders),
            seen=fields.whole("orders"),
            claim=bool(job or fields.values.get("claim")),
            next_s=fields.number("next_s"))


@dataclass(frozen=True)
class Registered:
    """The master's answer to a registration.

    `protocol` is None for the seed's master, which knows no sessions and parks no requests.
    `holding` has the attempts, by job and number, that are still this node's.
    """

    id: str | None
    protocol: int | None = None
    node_timeout_s: float = NODE_TIMEOUT_S
    holding: frozenset[tuple[str, int]] = frozenset()

    @classmethod
    def from_json(cls, value: object) -> Registered:
        """Return the answer; the seed's master sends only the node."""
        fields = answer_fields(value)
        # Attempts that are not among these were given to another node, or ended.
        holding = [(entry.required_text("job_id"), entry.whole("attempt", 1) or 1)
                   for entry in fields.entries("holding")]
        return cls(
            id=fields.text("id"),
            protocol=fields.whole("protocol"),
            node_timeout_s=fields.number("node_timeout_s", 0) or NODE_TIMEOUT_S,
            holding=frozenset(holding))


@dataclass(frozen=True)
class ResultView:
    """A result for people; `json` is the whole of it, and absent texts are empty.

    METRICS describes the figures of `metrics`. Results of foreign agents are kept as they were
    sent: a field that makes no sense counts as absent.
    """

    json: Json
    job_id: str
    status: str
    node: str
    scenario: str
    error: str
    output: str
    encoder: str
    preset: str
    reason: str
    settings: str
    metrics: Json
    unknown: Json
    recommendation: str
    reasons: tuple[str, ...]
    confidence: str
    statistics: Json
    series: Json
    repeats: tuple[Json, ...]  # the runs of a job that was repeated

    @classmethod
    def from_json(cls, value: object) -> ResultView:
        """Return the view of a result."""
        fields = Fields(value, lenient=True)
        encode = fields.inside("encode")
        metrics = fields.inside("metrics")
        analysis = fields.inside("analyzer_output")
        return cls(
            json=fields.values,
            job_id=fields.words("job_id"),
            status=fields.words("status"),
            node=fields.words("node"),
            scenario=fields.words("scenario"),
            error=fields.words("error"),
            output=fields.words("output"),
            encoder=encode.words("encoder"),
            preset=encode.words("preset"),
            reason=encode.words("reason"),
            settings=encode.words("settings"),
            metrics=metrics.values,
            unknown=metrics.mapping("unknown"),
            recommendation=analysis.words("recommendation"),
            reasons=tuple(map(str, analysis.items("reasons"))),
            confidence=analysis.words("confidence"),
            statistics=fields.mapping("statistics"), series=fields.mapping("series"),
            repeats=tuple(entry.values for entry in fields.entries("repeats")))

    def why_unknown(self, metric: str) -> str:
        """Return the reason why a metric has no figure."""
        return str(self.unknown.get(metric) or "not measured")

    def phrase(self, metric: str) -> str:
        """Return a figure as METRICS phrases it, or `unknown` with the reason."""
        value = self.metrics.get(metric)
        if not is_number(value):
            return f"unknown ({self.why_unknown(metric)})"
        return METRICS[metric].phrase.format(value)


@dataclass(frozen=True)
class AttemptView:
    """One attempt of a job, for people."""

    number: int
    status: str
    node: str
    node_id: str
    error: str
    failure_reason: str
    ended_at: str | None

    @classmethod
    def of_fields(cls, fields: Fields) -> AttemptView:
        """Return the view of one record of a job's `attempts`."""
        return cls(
            number=fields.whole("attempt") or 1,
            status=fields.words("status"),
            node=fields.words("node"),
            node_id=fields.words("node_id"),
            error=fields.words("error"),
            failure_reason=fields.words("failure_reason"),
            ended_at=fields.text("ended_at"))


@dataclass(frozen=True)
class JobView:
    """A job for people; `json` is the whole answer, and absent texts are empty.

    `settings` are the resolved ones, `parameters` those that were given. Only the answer about one
    job has `result` and `attempts`. A job of the seed's master may lack all but its id.
    """

    json: Json
    id: str
    status: str
    scenario: str
    node_id: str
    attempt: int
    progress: Json
    error: str
    failure_reason: str
    retry_count: int
    max_retries: int
    retry_reason: str
    waiting_for: str
    cancel_requested: bool
    not_before: str | None
    created_at: str | None
    settings: Json
    parameters: Json
    experiment: Json
    attempts: tuple[AttemptView, ...]
    result: ResultView | None

    @classmethod
    def from_json(cls, value: object) -> JobView:
        """Return the view of a job; ApiError where it has no id."""
        fields = Fields(value, prefix="job.", status=0, lenient=True)
        result = fields.mapping("result")
        progress = fields.mapping("progress")
        percent = fields.number("progress")  # a number alone is the percent of a seed's agent
        if percent is not None:
            progress = {"percent": percent}
        return cls(
            json=fields.values,
            id=fields.required_text("id"), status=fields.words("status"),
            scenario=fields.words("scenario"), node_id=fields.words("node_id"),
            attempt=fields.whole("attempt") or 0, progress=progress,
            error=fields.words("error"), failure_reason=fields.words("failure_reason"),
            retry_count=fields.whole("retry_count") or 0,
            max_retries=fields.whole("max_retries") or 0,
            retry_reason=fields.words("retry_reason"), waiting_for=fields.words("waiting_for"),
            cancel_requested=bool(fields.flag("cancel_requested")),
            not_before=fields.text("not_before"), created_at=fields.text("created_at"),
            settings=fields.mapping("settings"), parameters=fields.mapping("parameters"),
            experiment=fields.mapping("experiment"),
            attempts=tuple(map(AttemptView.of_fields, fields.entries("attempts"))),
            result=ResultView.from_json(result) if result else None)

    @property
    def short_id(self) -> str:
        """The first characters of its id: lists show them, commands take them."""
        return self.id[:8]


@dataclass(frozen=True)
class NodeView:
    """A node for people; `json` is the whole answer, and absent texts are empty.

    A node of the seed's master has its address for a name, and one slot.
    """

    json: Json
    id: str
    name: str
    status: str
    type: str
    running: int
    slots: int
    cpu_threads: int | None
    ram_bytes: int | None
    last_heartbeat: str | None
    cpu_model: str
    gpu_type: str
    quarantine: str

    @classmethod
    def from_json(cls, value: object) -> NodeView:
        """Return the view of a node; ApiError where it has no id."""
        fields = Fields(value, prefix="node.", status=0, lenient=True)
        node_id = fields.required_text("id")
        return cls(
            json=fields.values, id=node_id,
            name=fields.words("name") or fields.words("address") or node_id,
            status=fields.words("status"), type=fields.words("type"),
            running=fields.whole("running") or 0, slots=fields.whole("max_concurrent_jobs") or 1,
            cpu_threads=fields.whole("cpu_threads"), ram_bytes=fields.whole("ram_bytes"),
            last_heartbeat=fields.text("last_heartbeat"), cpu_model=fields.words("cpu_model"),
            gpu_type=fields.words("gpu_type"),
            quarantine=fields.inside("quarantine").words("reason"))

    @property
    def short_id(self) -> str:
        """The first characters of its id: lists show them, commands take them."""
        return self.id[:8]


View = TypeVar("View", JobView, NodeView, ResultView)


@dataclass(frozen=True)
class Listing(Generic[View]):
    """A page of views; `json` is the whole answer.

    `count` is of this page, `total` of all that match; `next` is the cursor of the page after it.
    """

    json: Json
    items: tuple[View, ...]
    count: int
    total: int
    next: str | None

    @classmethod
    def from_json(cls, value: object, field: str, kind: type[View]) -> Listing[View]:
        """Return the listing under a field; the seed's master sends neither total nor cursor."""
        fields = answer_fields(value)
        items = tuple(map(kind.from_json, fields.items(field)))
        count = fields.whole("count")
        total = fields.whole("total")  # the master keeps it; it is never counted by a scan
        return cls(
            json=fields.values,
            items=items,
            count=len(items) if count is None else count,
            total=len(items) if total is None else total,
            next=fields.text("next", 4096))

    @classmethod
    def joined(cls, pages: Sequence[Listing[View]], field: str) -> Listing[View]:
        """Return the listing of pages that follow each other, with its rows under a field."""
        if len(pages) == 1:
            return pages[0]
        items = tuple(item for page in pages for item in page.items)
        last = pages[-1]
        rows = [row for page in pages for row in page.json[field]]
        beside = {**last.json, field: rows, "count": len(items)}
        return cls(beside, items, len(items), last.total, last.next)


@dataclass(frozen=True)
class LogPart:
    """Some lines of a job's log, the number of the next one, and the job's status."""

    lines: tuple[str, ...]
    next: int
    status: str

    @classmethod
    def from_json(cls, value: object) -> LogPart:
        """Return the part of a log."""
        fields = answer_fields(value)
        lines = [str(line) for line in fields.items("lines")]
        return cls(tuple(lines), fields.whole("next") or 0, fields.words("status"))


# ---- 4 Words -------------------------------------------------------------------------------------

NOTHING_ENCODED = "nothing was encoded"  # the reason of a baseline for each figure of a film
MAX_BAR_CHARS = 24
MIN_BAR_CHARS = 4
MIN_LAST_COLUMN = 20  # characters; a last column with less room stands below its row
QUIET_LINE_S = 10  # between two lines of progress where stderr is not a terminal


def progress_text(progress: Mapping[str, Any], room: int = 79) -> str:
    """Return progress for people: a bar, percent, fps, speed, time left.

    The bar gives way to the figures where the line has less than its full room.
    """
    known = {name: value for name, value in progress.items() if is_number(value)}
    parts = [printable(progress.get("phase") or "encoding")]
    percent = known.get("percent")
    if percent is not None:
        parts.append(f"{percent:3.0f} %")
    fps, speed = known.get("fps", 0), known.get("speed", 0)
    if fps > 0 and speed > 0:  # 0: FFmpeg has not counted yet
        parts += [f"{fps:.0f} fps", f"{speed:.2f}x"]
    if "eta_s" in known:
        parts.append(f"{duration_text(known['eta_s'])} left")
    # Last, for it takes what room the figures leave; it stands before the percent.
    taken = len("  ".join(parts))
    bar = _bar(percent, room - taken - len("[]  "))
    if bar:
        parts[1] = f"{bar} {parts[1]}"
    return "  ".join(parts)


def _bar(percent: float | None, room: int) -> str:
    """Return a bar that fits, "" where there is no room or nothing to show."""
    width = min(MAX_BAR_CHARS, room - 1)
    if percent is None or width < MIN_BAR_CHARS:
        return ""
    full = round(width * min(100.0, max(0.0, percent)) / 100)
    return f"[{'#' * full}{'.' * (width - full)}]"


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return resolved settings as a short phrase: `h264 1920x1080 30 fps 5000k`."""
    width, height = settings.get("width"), settings.get("height")
    crf = settings.get("crf")
    parts = [settings.get("codec")]
    if width or height:
        parts.append(f"{width or '?'}x{height or '?'}")
    if settings.get("fps"):
        parts.append(f"{settings['fps']:g} fps")
    parts.append(settings.get("bitrate"))
    if crf is not None:
        parts.append(f"crf {crf:g}")
    if settings.get("duration"):
        parts.append(duration_text(settings["duration"]))
    return " ".join(printable(part) for part in parts if part)


def result_rows(result: object) -> list[tuple[str, str]]:
    """Return a result for people: rows of a name and figures, or the reason where one is unknown.

    Figures of a film are left out where nothing was encoded.
    """
    view = ResultView.from_json(result)
    wall_s = view.metrics.get("duration")
    rows = [
        ("encoder", view.encoder),
        ("why", view.reason),
        ("settings", view.settings),
        ("output", view.output),
        ("time", duration_text(wall_s if is_number(wall_s) else None)),
        ("frames", _figures_text(view, "frames", "fps")),
        ("speed", _figures_text(view, "speed")),
        ("CPU", _figures_text(view, "cpu_usage", "cpu_seconds")),
        ("memory", _figures_text(view, "memory_usage")),
        ("energy", _energy_text(view)),
        ("size", _size_text(view)),
        ("quality", _quality_text(view)),
        *_runs_rows(view),
        ("verdict", _verdict_text(view)),
    ]
    return [(name, text) for name, text in rows if text]


def _figures_text(view: ResultView, *names: str) -> str:
    """Return some figures as one phrase, without those of a film where there is none."""
    return ", ".join(view.phrase(name) for name in names
                     if view.why_unknown(name) != NOTHING_ENCODED)


def _size_text(view: ResultView) -> str:
    size = view.metrics.get("output_bytes")
    if not is_number(size):
        return _figures_text(view, "output_bytes")
    return f"{size_text(size)}, {view.phrase('bitrate_kbps')}"


def _energy_text(view: ResultView) -> str:
    """Return energy for people: gross, net of the idle machine's, mean power; estimates say so."""
    metrics = view.metrics
    if metrics.get("energy_joules") is None:
        return _figures_text(view, "energy_joules")
    # Figures of a power model look like readings: each is marked as an estimate.
    is_estimate = bool(metrics.get("energy_estimated"))
    about = "about " if is_estimate else ""
    gross = about + view.phrase("energy_joules")
    if metrics.get("net_energy_joules") is not None:
        idle_watts = metrics.get("idle_watts") or 0.0
        gross += f" ({about}{view.phrase('net_energy_joules')} at {idle_watts:.1f} W)"
    parts = [gross]
    for name in ("power_watts", "joules_per_frame"):
        if metrics.get(name) is not None:
            parts.append(about + view.phrase(name))
    source = "estimated by CPU use" if is_estimate else metrics.get("power_source")
    if source:
        parts.append(str(source))
    return ", ".join(parts)


_SCORES = (  # a mean, and the score of the worst frame
    ("psnr_db", "psnr_min_db"),
    ("ssim", "ssim_min"),
    ("vmaf", "vmaf_min"),
    ("xpsnr_db", "xpsnr_min_db"))


def _quality_text(view: ResultView) -> str:
    """Return the scores, with those of the worst frames, and why one is unknown."""
    known, missed = [], []
    for name, lowest in _SCORES:
        label, why = METRICS[name].label, view.why_unknown(name)
        dull = (METRICS[name].unknown, NOTHING_ENCODED)  # nobody asked for it
        if view.metrics.get(name) is not None:
            text = f"{label} {view.phrase(name)}"
            if view.metrics.get(lowest) is not None:
                text += f" (lowest {view.phrase(lowest)})"
            known.append(text)
        elif name in view.unknown and why not in dull:
            missed.append(f"{label} unknown ({why})")
    if not known and view.why_unknown("psnr_db") == NOTHING_ENCODED:
        return ""
    return ", ".join([*known, *missed]) or "unknown (not asked for)"


def _runs_rows(view: ResultView) -> list[tuple[str, str]]:
    """Return the rows of a job that was repeated, and of the confidence that was reached."""
    rows = []
    if len(view.repeats) > 1:
        runs = [_run_text(run) for run in view.repeats]
        rows.append(("runs", ", ".join(runs)))
    for name, row in view.statistics.items():
        fields = Fields(row, lenient=True)
        low, high = fields.number("ci95_low"), fields.number("ci95_high")
        if name in METRICS and low is not None and high is not None:
            rows.append((f"mean {METRICS[name].label}",
                         f"{low:.2f} to {high:.2f} {METRICS[name].unit} with 95 % certainty"))
    rows.append(("confidence", view.confidence))
    return rows


def _run_text(run: Json) -> str:
    """Return the time of one run, with what sets it apart from those that count."""
    wall_s = Fields(run, lenient=True).number("duration")
    text = "unknown" if wall_s is None else f"{wall_s:.2f} s"
    if run.get("warm_up"):
        text += " (warm-up)"
    if run.get("outlier"):
        text += " (outlier)"
    return text


def _verdict_text(view: ResultView) -> str:
    if not view.recommendation or not view.reasons:
        return view.recommendation
    return f"{view.recommendation}: {'; '.join(view.reasons)}"


@dataclass(frozen=True)
class _Layout:
    """Where the cells of a table stand.

    `beside` cells stand side by side; the rest stands beside them in `room` characters (0: there is
    none), or below them in the whole width.
    """

    widths: Sequence[int]
    beside: int
    room: int
    width: int

    @property
    def indent(self) -> int:
        """The width of the cells that stand side by side, with the gaps behind them."""
        return sum(self.widths[:self.beside]) + len(GAP) * self.beside


GAP = "  "  # between two columns


def table_text(rows: Sequence[Sequence[str]], width: int, colours: Mapping[str, str] | None = None,
               heads: bool = False) -> str:
    """Return rows as aligned columns that fit `width`; the last column is wrapped to its room.

    Where the first row holds heads, columns without a known cell ("-") are left out, and cells that
    have no room in their row stand below it. `colours` maps texts of cells to ANSI codes.
    """
    if not rows:
        return ""
    cells = [[printable(cell) for cell in row] for row in rows]
    if heads:
        cells = _known_columns(cells)
    layout = _layout_of(cells, width, heads)
    lines = []
    for row in cells:
        lines += _row_lines(row, layout, colours or {})
    return "\n".join(lines)


def _known_columns(rows: list[list[str]]) -> list[list[str]]:
    """Return the columns with a known cell below their head, all where none has any."""
    columns = list(zip(*rows))
    known = []
    for column in columns:
        if set(column[1:]) - {"", "-"}:
            known.append(column)
    kept = known or columns
    return [list(row) for row in zip(*kept)]


def _layout_of(rows: Sequence[Sequence[str]], width: int, heads: bool) -> _Layout:
    widths = [max(map(len, column)) for column in zip(*rows)]
    beside = len(widths) - 1
    room = width - sum(widths[:-1]) - len(GAP) * beside
    if not heads:
        return _Layout(widths, beside, max(MIN_LAST_COLUMN, room), width)
    if room >= min(MIN_LAST_COLUMN, widths[-1]):
        return _Layout(widths, beside, room, width)
    ends = itertools.accumulate(size + len(GAP) for size in widths[:-1])
    fitting = sum(end <= width + len(GAP) for end in ends)
    return _Layout(widths, max(1, fitting), 0, width)


def _row_lines(row: Sequence[str], layout: _Layout, colours: Mapping[str, str]) -> list[str]:
    """Return the lines of one row."""
    head = rest = ""
    for cell, size in zip(row[:layout.beside], layout.widths):
        # Padded by the length of the plain text: a colour takes no room on the screen.
        head += _painted(cell, colours) + " " * (size - len(cell)) + GAP
    for cell, size in zip(row[layout.beside:-1], layout.widths[layout.beside:]):
        rest += cell.ljust(size) + GAP
    rest += row[-1]

    # A path is not broken: one that is too long for its room gets a line of its own.
    longest = max(map(len, rest.split()), default=0)
    fits_below_only = layout.room < longest < layout.width - len(GAP)
    if fits_below_only or not layout.room:
        room = max(MIN_LAST_COLUMN, layout.width - len(GAP))
        lines = [head, *(GAP + line for line in _wrapped(rest, room))]
    else:
        first, *others = _wrapped(rest, layout.room)
        lines = [head + first, *(" " * layout.indent + line for line in others)]
    return [line.rstrip() for line in lines]


def _wrapped(text: str, room: int) -> list[str]:
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]


def _painted(cell: str, colours: Mapping[str, str]) -> str:
    code = colours.get(cell)
    return f"\x1b[{code}m{cell}\x1b[0m" if code else cell


class ProgressLine:
    """One line of progress on stderr: redrawn in place on a terminal, now and then elsewhere."""

    def __init__(self) -> None:
        self._drawn = 0
        self._last = ""
        self._next = 0.0

    def room(self) -> int:
        """Return how many characters the line may have."""
        try:
            return (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
        except (OSError, ValueError, AttributeError):  # not a terminal; no stderr
            return 79

    def show(self, line: str) -> None:
        """Show the line; where stderr is not a terminal, at most one every ten seconds."""
        now, line = time.monotonic(), printable(line)
        if line == self._last or now < self._next:
            return
        self._last = line
        if not sys.stderr.isatty():
            self._next = now + QUIET_LINE_S
            print(line, file=sys.stderr, flush=True)
            return
        room = self.room()
        # Spaces over the rest of a longer line before; one that wraps could not be drawn over.
        shown = line[:room]
        sys.stderr.write("\r" + shown.ljust(min(self._drawn, room)))
        sys.stderr.flush()
        self._drawn = len(shown)

    def close(self) -> None:
        """Wipe the line."""
        if self._drawn:
            sys.stderr.write("\r" + " " * self._drawn + "\r")
            sys.stderr.flush()
        self._drawn = 0


def open_output() -> None:
    """Make stdout and stderr write `?` for characters that their encoding lacks, not raise.

    A stderr that was closed (`2>&-`) is None: print() would write its lines to stdout.
    """
    if sys.stderr is None:
        sys.stderr = open_nowhere()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def open_nowhere() -> TextIO:
    """Return a stream to /dev/null, which stays open to the end of the process."""
    return open(os.devnull, "w", encoding="utf-8")


def close_output() -> None:
    """Send output that nobody reads to /dev/null: Python would complain of it at its end."""
    try:
        print(end="", flush=True)
    except (OSError, ValueError):
        hwdetect.discard_stdout()


def setup_logging(level: str, form: str, name: str) -> logging.Logger:
    """Make the one logger of a process: stderr, a line per event, as text or as JSON."""
    logger = logging.getLogger(name)
    logger.setLevel(level.upper())
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if form == "json" else _TextLines())
    logger.handlers[:] = [handler]  # a second call replaces the first
    logging.raiseExceptions = False  # a closed stderr must not stop the work
    return logger


class _TextLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = (utc_text(record.created) or "")[:len("2025-12-29T19:45:00")]
        return f"{stamp}Z {record.levelname.lower():7s} {printable(record.getMessage())}"


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({
            "time": utc_text(record.created),
            "level": record.levelname.lower(),
            "message": record.getMessage()})


# ---- 5 Client ------------------------------------------------------------------------------------

MASTER_PORT = 8080
CONNECT_S = 10.0
ANSWER_S = 30.0  # patience for an answer, beside the time that the request asked to wait
SUBMIT_WAIT_S = 90.0  # more patience: up to 10,000 jobs at once are checked and committed
ANSWER_LIMIT_BYTES = 256 << 20
REFUSAL_LIMIT_BYTES = 1 << 20
HTTP_SCHEMES = ("http", "https")
SECONDS = re.compile(r"[0-9]{1,6}")  # of a Retry-After header

# A GET that changes something: each claim may take a job. A master that knows no claim words (the
# seed's) would hand out a second one when it is repeated.
CLAIM_PATH = "/jobs/next"


class _Request(urllib.request.Request):
    """A request to the master; a `repeatable` one may be sent twice."""

    repeatable = False


class _KeepAlive(urllib.request.HTTPHandler):
    """Keeps one connection for each thread; urllib by itself closes each after its answer.

    A server may close a connection while it is idle. One that is found closed before a request is
    replaced: nothing was sent yet. One that breaks afterwards is an error, for the master may have
    acted on the request; only a `repeatable` one is sent once more, on a new connection.
    """

    def __init__(self) -> None:
        super().__init__()
        self._local = threading.local()

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        kept = self._kept(request.host)
        if kept is not None:
            try:
                return self._exchange(kept, request)
            except (http.client.BadStatusLine, ConnectionError):
                if not getattr(request, "repeatable", False):
                    raise
        fresh = http.client.HTTPConnection(request.host, timeout=CONNECT_S)
        return self._exchange(fresh, request)

    def _kept(self, host: str) -> http.client.HTTPConnection | None:
        """Return this thread's connection if it is one to this host and still open."""
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None or connection.sock is None or self._local.host != host:
            return None
        poll = select.poll()
        poll.register(connection.sock, select.POLLIN)
        if poll.poll(0):  # its end, or bytes that nobody asked for: of no use either way
            connection.close()
            return None
        return connection

    def _exchange(self, connection: http.client.HTTPConnection,
                  request: urllib.request.Request) -> http.client.HTTPResponse:
        """Send a request and read the head of its answer; a connection that fails is closed."""
        headers = {**request.headers, **request.unredirected_hdrs}
        try:
            if connection.sock is None:
                connection.connect()
            connection.sock.settimeout(request.timeout or CONNECT_S)
            connection.request(request.get_method(), request.selector, request.data, headers)
            answer = connection.getresponse()
        except BaseException:
            connection.close()
            raise
        self._local.connection, self._local.host = connection, request.host
        answer.msg = answer.reason  # type: ignore[assignment]  # as urllib's own handler does
        return answer

    def close(self) -> None:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()


class Client:
    """Talks to one master: a typed method for each route. Every method raises ApiError.

    No request that changes something is ever sent twice by the client itself. The caller knows
    whether it may be repeated, as a claim may by its word and a report by its attempt number;
    `ApiError.retryable` says whether that may help. A request that only reads is sent once more
    when the idle connection that it went out on turns out to be closed.
    """

    def __init__(self, url: str) -> None:
        self.url, self.host, self.port = _master_address(url)
        self.patience_s = ANSWER_S  # a leaving agent has less
        self._handler = _KeepAlive()
        # Without urllib's other handlers: no proxies, no redirects, no certificates to load.
        self._opener = _opener_with(self._handler)

    def _call(self, method: str, path: str, body: Any = None,
              query: Mapping[str, Any] | None = None, wait_s: float | None = None) -> Json:
        url = self.url + path + _query_text(query or {})
        data = None
        if body is not None:
            data = json.dumps(body, allow_nan=False).encode()  # NaN is not JSON: ValueError here
        request = _Request(url, data, {"Content-Type": "application/json"}, method=method)
        request.repeatable = method == "GET" and path != CLAIM_PATH
        timeout_s = self.patience_s + (wait_s or 0)
        server = f"the master at {self.url}"
        try:
            reply = _reply_to(request, self._opener, timeout_s, server, ANSWER_LIMIT_BYTES)
        except ApiError:
            self.close()  # the rest of a late answer would be taken for that to the next request
            raise
        if not reply.is_success:
            raise _refusal(reply, self.url)
        return _decode(reply.raw, self.url)

    def close(self) -> None:
        """Close this thread's connection."""
        self._handler.close()

    def register(self, registration: Json) -> Registered:
        answer = self._call("POST", "/nodes/register", registration)
        return Registered.from_json(answer)

    def heartbeat(self, node_id: str, body: Json, wait_s: float | None = None) -> Answer:
        path = f"/nodes/{_quoted(node_id)}/heartbeat"
        answer = self._call("POST", path, body, {"wait": wait_s}, wait_s)
        return Answer.from_json(answer)

    def claim(self, query: Json, wait_s: float | None = None) -> Answer:
        query = {**query, "wait": wait_s}
        answer = self._call("GET", CLAIM_PATH, None, query, wait_s)
        return Answer.from_json(answer)

    def progress(self, job_id: str, body: Json) -> Answer:
        path = f"/jobs/{_quoted(job_id)}/progress"
        answer = self._call("POST", path, body)
        return Answer.from_json(answer)

    def report(self, result: Json) -> None:
        self._call("POST", "/results", result)

    def submit(self, job: Json) -> JobView:
        answer = self._call("POST", "/jobs", job)
        return JobView.from_json(answer)

    def submit_all(self, jobs: Sequence[Json]) -> tuple[JobView, ...]:
        answer = self._call("POST", "/jobs", list(jobs), wait_s=SUBMIT_WAIT_S)
        return Listing.from_json(answer, "jobs", JobView).items

    def nodes(self) -> Listing[NodeView]:
        return self._listing("nodes", NodeView, {}, math.inf)

    def jobs(self, query: Json) -> Listing[JobView]:
        return self._listing("jobs", JobView, query, query.get("limit") or 0)

    def results(self, query: Json) -> Listing[ResultView]:
        return self._listing("results", ResultView, query, query.get("limit") or 0)

    def _listing(
        self, kind: str, view: type[View], query: Json, most: str | float
    ) -> Listing[View]:
        """Return a page, or more of them as one: a page may end by its size before `most` rows."""
        pages: list[Listing[View]] = []
        count = 0
        while True:
            page = Listing.from_json(self._call("GET", f"/{kind}", None, query), kind, view)
            pages.append(page)
            count += len(page.items)
            if not page.next or not page.items or count >= float(most):
                return Listing.joined(pages, kind)
            query = {**query, "after": page.next}
            if most != math.inf:
                query["limit"] = int(most) - count

    def job(self, job_id: str) -> JobView:
        answer = self._call("GET", f"/jobs/{_quoted(job_id)}")
        return JobView.from_json(answer)

    def order(self, job_id: str, verb: str) -> JobView:
        answer = self._call("POST", f"/jobs/{_quoted(job_id)}/{verb}")
        return JobView.from_json(answer)

    def order_node(self, node_id: str, verb: str, deadline_s: float | None = None) -> NodeView:
        path = f"/nodes/{_quoted(node_id)}/{verb}"
        answer = self._call("POST", path, None, {"deadline": deadline_s})
        return NodeView.from_json(answer)

    def forget_node(self, node_id: str) -> NodeView:
        answer = self._call("DELETE", f"/nodes/{_quoted(node_id)}")
        return NodeView.from_json(answer)

    def logs(self, job_id: str, after: int, wait_s: float | None = None) -> LogPart:
        path = f"/jobs/{_quoted(job_id)}/logs"
        query = {"after": after, "wait": wait_s}
        answer = self._call("GET", path, None, query, wait_s)
        return LogPart.from_json(answer)


def _query_text(query: Mapping[str, Any]) -> str:
    """Return the query of a URL, without the names that have no value."""
    known = {name: value for name, value in query.items() if value is not None}
    return "?" + urllib.parse.urlencode(known) if known else ""


def _master_address(url: str) -> tuple[str, str, int]:
    """Return the base URL, host and port of a master's address; ValueError for any other text."""
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"invalid address of a master '{url}': expected http://host:8080")
    try:
        port = parts.port or MASTER_PORT
    except ValueError:
        raise ValueError(f"invalid port in '{url}': expected http://host:8080") from None
    place = parts.netloc if parts.port else f"{parts.netloc.rstrip(':')}:{port}"
    return f"{parts.scheme}://{place}{parts.path.rstrip('/')}", parts.hostname, port


def _opener_with(*handlers: urllib.request.BaseHandler) -> urllib.request.OpenerDirector:
    """Return an opener of these handlers that raises HTTPError for a refusal."""
    opener = urllib.request.OpenerDirector()
    for handler in handlers:
        opener.add_handler(handler)
    opener.add_handler(urllib.request.HTTPDefaultErrorHandler())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    return opener


@functools.lru_cache(maxsize=1)
def _plain_opener() -> urllib.request.OpenerDirector:
    """Return an opener of http and https without proxies and redirects.

    It is made once, for it loads certificates.
    """
    return _opener_with(urllib.request.HTTPHandler(), urllib.request.HTTPSHandler())


def exchange_text(url: str, text: bytes | None = None, timeout_s: float = CONNECT_S) -> str:
    """GET an address of another server, such as VictoriaMetrics, or POST text there.

    Return its answer; ApiError. A user and a password in the address become basic authentication
    and appear in no message.
    """
    parts = urllib.parse.urlsplit(url)
    user, _, place = parts.netloc.rpartition("@")
    shown = urllib.parse.urlunsplit((parts.scheme, place, *parts[2:]))
    request = urllib.request.Request(shown, text, {"Content-Type": "text/plain; charset=utf-8"})
    if user:
        plain = urllib.parse.unquote(user).encode()
        credentials = base64.b64encode(plain).decode()
        request.add_header("Authorization", f"Basic {credentials}")
    opener = _plain_opener()
    reply = _reply_to(request, opener, timeout_s, shown, REFUSAL_LIMIT_BYTES)
    if not reply.is_success:
        words = reply.raw[:1 << 10].decode(errors="replace").strip()
        raise ApiError(reply.status, f"{shown} answers {reply.status}: {words or reply.reason}")
    return reply.raw.decode(errors="replace")


class _Reply(NamedTuple):
    """What a server answered; `retry_after_s` is 0 where it names no pause."""

    status: int
    reason: str
    raw: bytes
    retry_after_s: float

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


def _reply_to(request: urllib.request.Request, opener: urllib.request.OpenerDirector,
              timeout_s: float, server: str, limit_bytes: int) -> _Reply:
    """Return the answer to a request, a refusal too; ApiError where none came."""
    try:
        try:
            answer = opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:  # a refusal is an answer too, which urllib raises
            answer, limit_bytes = error, min(limit_bytes, REFUSAL_LIMIT_BYTES)
        with answer:
            pause = answer.headers.get("Retry-After") or ""
            pause_s = float(pause) if SECONDS.fullmatch(pause) else 0.0  # it may be a date, too
            return _Reply(answer.code, answer.reason, _body_of(answer, limit_bytes), pause_s)
    except (OSError, http.client.HTTPException, ValueError) as error:
        # The text of a bad status line is whatever came, an ssh banner or control characters.
        reason = getattr(error, "reason", error)
        cause = printable(cause_text(reason))
        if type(error) is http.client.BadStatusLine:
            cause = "it does not speak HTTP"
        raise ApiError(0, f"no answer from {server}: {cause}",
                       nobody_listens=isinstance(reason, ConnectionRefusedError)) from None


def _body_of(answer: Any, limit_bytes: int) -> bytes:
    """Return the whole body of an answer, up to the limit; ConnectionError where it was cut off."""
    length: int | None = getattr(answer, "length", None)
    if length is None:
        return bytes(answer.read(limit_bytes))
    wanted = min(limit_bytes, length)  # Python 3.9 fills a buffer of as much as it may read
    raw = bytes(answer.read(wanted))
    if len(raw) < wanted:  # half a refusal would lose its field
        raise ConnectionError("the answer was cut off")
    return raw


def web_address(text: str) -> str:
    """Argument type of an http or https address, with or without a path."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(text)
        is_web = parts.scheme in HTTP_SCHEMES and bool(parts.hostname) and parts.port != 0
        is_plain = not parts.query and not parts.fragment
        is_word = text.isprintable() and " " not in text
        if is_web and is_plain and is_word:
            return text.rstrip("/")
    raise argparse.ArgumentTypeError(f"invalid address '{text}': expected http://host:8428")


def _quoted(part: str) -> str:
    return urllib.parse.quote(part, safe="")


def _decode(raw: bytes, url: str) -> Json:
    """Return the JSON object of an answer."""
    try:
        value = json.loads(raw) if raw else {}
    except (ValueError, RecursionError):
        raise ApiError(0, f"the server at {url} is not an ffdist master: its answer is not JSON") \
            from None
    return answer_fields(value).values


def _refusal(reply: _Reply, url: str) -> ApiError:
    """Return the error of a refusal; that of a proxy, say, has neither sentence nor field."""
    status, pause_s = reply.status, reply.retry_after_s
    with contextlib.suppress(ValueError, RecursionError):
        body = Fields(json.loads(reply.raw), lenient=True)
        if body.values:
            message = body.words("error") or f"HTTP {status}"
            return ApiError(status, message, body.text("field"), retry_after_s=pause_s)
    words = reply.raw[:200].decode(errors="replace").strip()
    answer = f"HTTP {status}"
    if words and not words.startswith("<"):  # a page has no sentence to quote
        answer += f": {words}"
    return ApiError(
        status, f"something else answers at {url}: is it the master's address? ({answer})",
        retry_after_s=pause_s)


def host_addresses(host: str) -> list[str]:
    """Return the addresses of a host name, none where it has none."""
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return []
    return sorted({str(address[0]) for *_, address in found})


def is_this_machine(host: str) -> bool:
    """Return whether a host name is this machine's: binding to its address succeeds only here."""
    for address in host_addresses(host):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        # A datagram socket on any port: nothing is sent, and no firewall asks.
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
            return True
    return False


# ---- 6 Catalogue ---------------------------------------------------------------------------------

class Parameter(NamedTuple):
    """One row of the parameter table: its kind, its meaning, its limits (inclusive) or words."""

    kind: str
    about: str
    low: float = 0
    high: float = 0
    words: tuple[str, ...] = ()


PRESET_WORDS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower",
                "veryslow")
CODECS = ("h264", "h265", "av1", "vp9")
CODEC_ALIASES = {"hevc": "h265", "x264": "h264", "x265": "h265", "avc": "h264"}
CONTAINERS = ("mp4", "mov", "matroska", "webm", "flv", "mpegts")
CONTAINER_ALIASES = {"mkv": "matroska", "ts": "mpegts", "m4v": "mp4"}
QUALITY_METRICS = ("psnr", "ssim", "vmaf", "xpsnr")

PARAMETERS: dict[str, Parameter] = {
    "input": Parameter("place", "path under the media root, or URL; none: a generated source"),
    "output": Parameter("place", "path, or rtmp/srt/http URL; none: encoded, measured, discarded"),
    "duration": Parameter("number", "seconds; of a real input its first so many", 0.04, 30 * DAY_S),
    "bitrate": Parameter("bitrate", "video bit/s: 15000k, 5M or a number", 1000, 2e9),
    "crf": Parameter("number", "constant quality, lower is better (with bitrate: its ceiling)",
                     0, 63),
    "codec": Parameter("word", "h264, h265, av1 or vp9", words=CODECS),
    "encoder": Parameter("name", "FFmpeg's name of an encoder, chosen by the agent unless said"),
    "preset": Parameter("preset", "ultrafast … veryslow for every codec, or the encoder's own",
                        0, 13),
    "width": Parameter("size", "pixels, even", 16, 16384),
    "height": Parameter("size", "pixels, even", 16, 16384),
    "fps": Parameter("rate", "frames per second: 30, 29.97 or 30000/1001", 1, 480),
    "pixel_format": Parameter("name", "FFmpeg's name, such as yuv420p10le"),
    "audio": Parameter("bool", "false drops the sound"),
    "container": Parameter("word", "mp4, mov, matroska, webm, flv or mpegts", words=CONTAINERS),
    "gop": Parameter("whole", "frames from one key frame to the next, at most", 1, 100000),
    "two_pass": Parameter("bool", "two passes; needs a bitrate"),
    "realtime": Parameter("bool", "read the input at its own speed"),
    "hwaccel": Parameter("name", "FFmpeg's name of a hardware decoder, such as cuda or vaapi"),
    "threads": Parameter("whole", "encoder threads", 1, 1024),
    "overwrite": Parameter("bool", "true replaces an output that exists; else it is refused"),
    "max_memory_mb": Parameter("whole", "MiB that the job's processes may use", 16, 1 << 24),
    "max_cpu_percent": Parameter("number", "CPU time that they may use; 100 is one core",
                                 1, 102400),
    "quality": Parameter("words", "metrics to take: psnr, ssim, vmaf, xpsnr",
                         words=QUALITY_METRICS),
    "settle": Parameter("number", "seconds of rest before each encode, not measured", 0, DAY_S),
    "cooldown": Parameter("number", "seconds of rest after each encode, not measured", 0, DAY_S),
    "timeout": Parameter("number", "seconds the whole job may take", 1, 30 * DAY_S),
    "extra_args": Parameter("words", "more FFmpeg arguments; only where the master allows it"),
}
INPUT_SCHEMES = ("http", "https", "rtmp", "rtmps", "srt")
OUTPUT_SCHEMES = ("rtmp", "rtmps", "srt", "http", "https")
LIVE_SCHEMES = ("rtmp", "rtmps", "srt")  # they carry a stream at its own speed

CONTAINER_OF_SUFFIX = {
    ".mp4": "mp4", ".m4v": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "webm",
    ".flv": "flv",
    ".ts": "mpegts", ".m2ts": "mpegts",
}
CONTAINER_OF_SCHEME = {
    "rtmp": "flv", "rtmps": "flv",  # the protocol carries nothing else
    "srt": "mpegts", "http": "mpegts", "https": "mpegts",
}
# The codecs that a container can hold, as FFmpeg writes it; one without a row holds all.
CONTAINER_CODECS = {
    "webm": ("vp9", "av1"),
    "flv": ("h264",),
    "mpegts": ("h264", "h265"),
    "mov": ("h264", "h265", "av1"),
}


class Sound(NamedTuple):
    """How the sound of a container is encoded; `sample_rate` where the container needs one."""

    encoder: str
    bitrate: str
    sample_rate: str = ""


SOUNDS = {"webm": Sound("libopus", "96k"), "flv": Sound("aac", "128k", "44100")}
USUAL_SOUND = Sound("aac", "128k")


class Encoder(NamedTuple):
    """One row of the encoder table; argument templates take the fields of `_video_args`.

    `presets` are the encoder's own words for PRESET_WORDS, `own` a pattern of all its own words.
    `cost` is its work per pixel against libx264 at the same preset word, roughly. `upload` is the
    format in which frames go up to a device: such an encoder gets no other, whatever is asked for.
    """

    codec: str
    hardware: bool = False
    cost: float = 1
    presets: tuple[str, ...] = ()
    own: str = ""
    preset_args: tuple[str, ...] = ("-preset", "{preset}")
    crf: int | None = None
    crf_args: tuple[str, ...] = ("-crf", "{crf}")
    bitrate_args: tuple[str, ...] = ("-b:v", "{bitrate}")
    thread_args: tuple[str, ...] = ()
    two_pass: bool = False
    pass_args: tuple[str, ...] = ("-pass", "{number}", "-passlogfile", "pass")
    ten_bit: str | None = "yuv420p10le"
    upload: str = ""

    def takes(self, pixel_format: str) -> bool:
        """Return whether it can encode frames of a format; a software encoder converts."""
        return not self.hardware or pixel_format in ("yuv420p", "nv12", self.ten_bit)


_X_OWN = "|".join((*PRESET_WORDS, "placebo"))
_NVENC_WORDS = ("p1", "p1", "p2", "p3", "p4", "p4", "p5", "p6", "p7")
_QSV_WORDS = ("veryfast", "veryfast", "veryfast", "faster", "fast", "medium", "slow", "slower",
              "veryslow")
_SVT_WORDS = ("12", "11", "10", "9", "8", "7", "6", "5", "4")
_AOM_WORDS = ("8", "8", "8", "7", "6", "5", "4", "3", "2")
_VPX_WORDS = ("8", "7", "6", "5", "4", "3", "2", "1", "0")
_RAV1E_WORDS = ("10", "10", "9", "8", "8", "6", "5", "3", "2")
_VBV = ("-b:v", "{bitrate}", "-maxrate", "{maxrate}", "-bufsize", "{bufsize}")
# libvpx and libaom take crf for constant quality only beside a bitrate of 0: else it is a ceiling.
_CRF_ALONE = ("-crf", "{crf}", "-b:v", "0")
_THREADS = ("-threads", "{threads}")
_ROWS = (*_THREADS, "-row-mt", "1")
_P010 = {"h264": None, "h265": "p010le", "av1": "p010le", "vp9": "p010le"}
_WORDS = {"h264": "h264", "hevc": "h265", "av1": "av1", "vp9": "vp9"}  # FFmpeg's word -> ours


def _nvenc(codec: str) -> Encoder:
    return Encoder(
        codec, hardware=True, cost=0,
        presets=_NVENC_WORDS, own="p[1-7]",
        crf=28 if codec == "h265" else 23,
        crf_args=("-rc", "vbr", "-cq", "{crf}", "-b:v", "0"),
        bitrate_args=("-rc", "vbr", *_VBV),
        ten_bit=_P010[codec])


def _qsv(codec: str) -> Encoder:
    return Encoder(
        codec, hardware=True, cost=0,
        presets=_QSV_WORDS, own="|".join(_QSV_WORDS),
        crf=25, crf_args=("-global_quality", "{crf}"),
        bitrate_args=_VBV,
        ten_bit=_P010[codec])


def _vaapi(codec: str) -> Encoder:
    return Encoder(
        codec, hardware=True, cost=0,
        crf=25, crf_args=("-rc_mode", "CQP", "-qp", "{crf}"),
        bitrate_args=_VBV,
        ten_bit=None, upload="nv12")


# The first of a codec that was proved here is used: hardware first, then the usual software.
ENCODERS: dict[str, Encoder] = {
    **{f"{word}_nvenc": _nvenc(codec) for word, codec in _WORDS.items() if codec != "vp9"},
    **{f"{word}_qsv": _qsv(codec) for word, codec in _WORDS.items()},
    **{f"{word}_vaapi": _vaapi(codec) for word, codec in _WORDS.items()},
    "h264_v4l2m2m": Encoder("h264", hardware=True, cost=0, ten_bit=None),
    "libx264": Encoder(
        "h264", cost=1,
        presets=PRESET_WORDS, own=_X_OWN,
        crf=23, bitrate_args=_VBV,
        thread_args=_THREADS, two_pass=True),
    # x265 reads its passes, and its pool of threads, from parameters of its own.
    "libx265": Encoder(
        "h265", cost=4,
        presets=PRESET_WORDS, own=_X_OWN,
        crf=28, bitrate_args=_VBV,
        thread_args=("-x265-params", "pools={threads}:log-level=warning{stats}"),
        two_pass=True, pass_args=()),
    # Its words are numbers, as those of all encoders of av1 and vp9: the higher the faster.
    "libsvtav1": Encoder(
        "av1", cost=3,
        presets=_SVT_WORDS, own=r"\d|1[0-3]",
        crf=35,
        thread_args=("-svtav1-params", "lp={threads}")),
    "libaom-av1": Encoder(
        "av1", cost=12,
        presets=_AOM_WORDS, own="[0-8]", preset_args=("-cpu-used", "{preset}"),
        crf=32, crf_args=_CRF_ALONE,
        thread_args=_ROWS, two_pass=True),
    "libvpx-vp9": Encoder(
        "vp9", cost=5,
        presets=_VPX_WORDS, own="[0-8]",
        preset_args=("-deadline", "{deadline}", "-cpu-used", "{preset}"),
        crf=33, crf_args=_CRF_ALONE,
        thread_args=(*_ROWS, "-tile-columns", "{tile_columns}"), two_pass=True),
    "librav1e": Encoder(
        "av1", cost=15,
        presets=_RAV1E_WORDS, own=r"\d|10", preset_args=("-speed", "{preset}"),
        crf=100, crf_args=("-qp", "{crf}")),  # a quantiser of 0 to 255, not a crf
    "libopenh264": Encoder("h264", thread_args=_THREADS, ten_bit=None),
}
# Where a job names no rate: kbit/s of h264 for a picture of at least so many lines.
LADDER_KBPS = (
    (2160, 12000),
    (1440, 8000),
    (1080, 5000),
    (720, 2500),
    (480, 1200),
    (0, 700),
)
LADDER_FAST_FPS = 40  # above it the rate is half as much again
CODEC_SAVING = {"h264": 1.0, "h265": 0.6, "vp9": 0.6, "av1": 0.5}  # of the rate of h264

# Threads that a picture of at least so many lines keeps busy.
THREADS_WORTH = (
    (2160, 32),
    (1080, 16),
    (720, 8),
    (0, 4),
)


class PresetLoad(NamedTuple):
    """The most pixels per second and thread at which a preset word is still fast enough.

    They are weighed by the encoder's cost. `batch` leaves an encode at a bearable speed, `live` one
    above the clock.
    """

    word: str
    batch: float
    live: float


PRESET_LOADS = (
    PresetLoad("medium", 8e6, 3e6),
    PresetLoad("fast", 16e6, 5e6),
    PresetLoad("veryfast", 48e6, 12e6),
    PresetLoad("superfast", 96e6, 24e6),
    PresetLoad("ultrafast", math.inf, math.inf),
)

# The protocols that an input may use, by its scheme: a local film cannot lead to the network.
PROTOCOLS = {
    None: "file,crypto",
    "http": "http,https,tls,tcp,crypto",
    "https": "https,tls,tcp,crypto",
    "rtmp": "rtmp,tcp",
    "rtmps": "rtmps,tls,tcp",
    "srt": "srt,udp",
}
# Playlists and concat files are not films: they could name other files and hosts.
FILM_FORMATS = ",".join((
    "matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,mxf,nut",
    "rm,dv,gxf,wtv,gif,apng,yuv4mpegpipe",
    "m4v,h264,hevc,av1,obu,ivf,vc1,mjpeg",  # streams without a container
    "wav,mp3,flac,aac"))


# ---- 7 Scenario ----------------------------------------------------------------------------------

BASELINE = "baseline"  # the word of a scenario that measures the idle machine and encodes nothing
BASELINE_S = 60
GENERATED = {"width": 1280, "height": 720, "fps": 30, "duration": 10}  # a job without an input
MAX_CRF = {"h264": 51, "h265": 51}  # their scale ends there; that of av1 and vp9 at 63
MAX_RATE_CHARS = 24  # of a bitrate as a text: more digits are not a rate
HEIGHTS = (16, 8640)  # of a scenario: 8640 lines are 16K

# Each pattern bounds the digits that it takes: int() and Fraction() of a million of them take long.
_SCENARIO = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SIZE_WORD = re.compile(r"(?:([248])K|(\d{2,5})p)(\d{1,4})?", re.IGNORECASE)
_K_SIZES = {"2": (2560, 1440), "4": (3840, 2160), "8": (7680, 4320)}
_BITRATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?)(?:bps|bit/s)?")
_BITRATE_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}
_RATE = re.compile(r"\d{1,12}(?:\.\d{1,9}|/\d{1,12})?")
_NAME = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
_OWN_PRESET = re.compile(r"p[1-7]|\d|1[0-3]|placebo")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Settings:
    """The resolved wishes of a job; None means: as the input is, or as the agent chooses.

    duration and timeout in s, bitrate in bit/s, width and height in pixels, fps in 1/s,
    max_cpu_percent of one core.
    """

    scenario: str
    codec: str
    container: str
    input: str | None = None
    output: str | None = None
    duration: float | None = None
    bitrate: int | None = None
    crf: float | None = None
    encoder: str | None = None
    preset: str | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    pixel_format: str | None = None
    audio: bool = True
    gop: int | None = None
    two_pass: bool = False
    realtime: bool = False
    hwaccel: str | None = None
    threads: int | None = None
    max_memory_mb: int | None = None
    max_cpu_percent: float | None = None
    quality: tuple[str, ...] = ()
    settle: float = 0.0
    cooldown: float = 0.0
    timeout: float | None = None
    overwrite: bool = False

    @property
    def baseline(self) -> bool:
        """Whether the idle machine is to be measured, and nothing encoded."""
        return is_baseline(self.scenario)

    @property
    def live(self) -> bool:
        """Whether frames must keep up with the clock: a stream out, or a source read so."""
        return self.realtime or scheme_of(self.output) in LIVE_SCHEMES

    def to_json(self) -> Json:
        """Return all fields by name; a baseline has none of a film's."""
        fields = dict(vars(self))
        fields["bitrate"] = None if self.bitrate is None else bitrate_text(self.bitrate)
        if self.baseline:
            kept = ("scenario", "duration", "settle", "cooldown", "timeout")
            return {name: value if name in kept else None for name, value in fields.items()}
        return fields


def is_baseline(scenario: str) -> bool:
    """Return whether a scenario measures the idle machine: `baseline` is one of its words."""
    return BASELINE in scenario.lower().split("-")


def bitrate_text(bits: int) -> str:
    """Return bit/s in FFmpeg's short form: 15000k, or plain where they are not whole kilobits."""
    return f"{bits // 1000}k" if bits % 1000 == 0 else str(bits)


def scheme_of(place: str | None) -> str | None:
    """Return the scheme of a URL in lower case, None for a path."""
    if not place or not _URL.match(place):
        return None
    return place.split("://", 1)[0].lower()


class Url(NamedTuple):
    """A URL in the parts that were checked; `rest` is path, query and fragment as given."""

    scheme: str
    user: str | None
    host: str
    port: int | None
    rest: str

    def __str__(self) -> str:
        user = "" if self.user is None else f"{self.user}@"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"{self.scheme}://{user}{host}{port}{self.rest}"


# Before the path no character is allowed that a parser might take for the end of the host.
_URL_PARTS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(?:([^/?#@\\\[\]\s]*)@)?"
                        r"(\[[0-9A-Fa-f:.]+\]|[^/?#@\\\[\]:\s]+)(?::(\d{0,5}))?((?:[/?#].*)?)")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}")


def parse_url(text: str) -> Url:
    """Return the parts of a URL that every parser reads alike; ValueError for any other.

    Python and FFmpeg see different hosts in `http://169.254.169.254:80[2001:db8::1]/`. FFmpeg gets
    the text of the result, never the text that was given, so that it opens the host that was
    checked.
    """
    match = _URL_PARTS.fullmatch(text)
    if match is None:
        raise ValueError("expected scheme://host:port/path")
    scheme, user, host, port, rest = match.groups()
    if host.startswith("["):
        host = str(ipaddress.IPv6Address(host[1:-1]))  # its one usual form
    elif not host.isascii():
        host = host.encode("idna").decode()  # UnicodeError is a ValueError
    if ":" not in host and not _HOST.fullmatch(host):
        raise ValueError("its host is not a name or an address")
    number = int(port) if port else None
    if number is not None and not 0 < number < 65536:
        raise ValueError("its port is not from 1 to 65535")
    return Url(scheme.lower(), user, host.lower(), number, rest)


def resolve(scenario: object, parameters: object = None, own_paths: bool = False) -> Settings:
    """Return the settings of a job; ApiError 400 names the field that is to blame.

    Parameters override the words of the scenario. With `own_paths` the paths are those of the
    caller's own shell: they may have hidden parts.
    """
    values: Json = {**_scenario_values(scenario), **_checked_parameters(parameters)}
    # The name of an encoder implies the codec.
    encoder = ENCODERS.get(values.get("encoder", ""))
    values.setdefault("codec", encoder.codec if encoder else "h264")
    if is_baseline(str(scenario)):
        values.setdefault("duration", BASELINE_S)
    if values.get("input") is None:
        _complete_size(values)  # of a real film the other side follows from its shape
        values = {**GENERATED, **values}
    values["container"] = _container(values)
    if not own_paths:
        _refuse_hidden(values.get("output"))
    settings = Settings(scenario=str(scenario), **values)
    _refuse_impossible(settings)
    return settings


def _complete_size(values: Json) -> None:
    """Give a picture with one known side the other one of 16:9."""
    if "height" in values:
        values.setdefault("width", 2 * round(values["height"] * 16 / 9 / 2))
    elif "width" in values:
        values["height"] = 2 * round(values["width"] * 9 / 16 / 2)


def _scenario_values(scenario: object) -> Json:
    """Return the values that the words of a scenario name: one size with a rate, one codec."""
    if scenario is None:
        raise _bad_scenario("is required: a short name such as 1080p30-h264")
    if not isinstance(scenario, str) or not _SCENARIO.fullmatch(scenario):
        raise _bad_scenario("must be 1 to 64 letters, digits, dots, underscores or dashes, such as "
                            "1080p30-h264")
    values: Json = {}
    for word in scenario.split("-"):
        size = _SIZE_WORD.fullmatch(word)
        codec = CODEC_ALIASES.get(word.lower(), word.lower())
        if size:
            if "height" in values:
                raise _bad_scenario(f"{scenario} names two sizes")
            values.update(_size_values(size, word))
        elif codec in CODECS:
            if "codec" in values:
                raise _bad_scenario(f"{scenario} names two codecs")
            values["codec"] = codec
        # Any other word is a label of the user's own.
    return values


def _bad_scenario(message: str) -> ApiError:
    """Return the refusal of a scenario."""
    return ApiError(400, f"scenario {message}", "scenario")


def _size_values(match: re.Match[str], word: str) -> Json:
    """Return width, height and, where it has one, the frame rate of a word such as 4K60 or 720p."""
    thousands, lines, rate = match.groups()
    values: Json = {}
    if thousands:
        values["width"], values["height"] = _K_SIZES[thousands]
    else:
        values["height"] = int(lines)
    low, high = HEIGHTS
    height = values["height"]
    if not low <= height <= high or height % 2:
        raise _bad_scenario(f"asks for {word}: a height must be even, from {low} to {high}")
    if rate and not 1 <= int(rate) <= PARAMETERS["fps"].high:
        raise _bad_scenario(f"asks for {word}: a frame rate is from 1 to 480")
    _complete_size(values)
    if rate:
        values["fps"] = int(rate)
    return values


def _checked_parameters(parameters: object) -> Json:
    """Return parameters of their own types, without those that are null."""
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise ApiError(400, "parameters must be an object", "parameters")
    fields = Fields(_without_aliases(parameters), prefix="parameters.")
    values: Json = {}
    for name, value in fields.values.items():
        if value is None:
            continue
        if name not in PARAMETERS:  # a typo there costs hours of encoding
            raise _bad(str(name)[:64], f"is unknown; {_nearest(str(name), PARAMETERS)}")
        rule = PARAMETERS[name]
        values[name] = _CHECKS[rule.kind](fields, name, rule)
    if values.pop("extra_args", None):
        raise _bad("extra_args", "are not allowed on this fleet")
    return values


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint: the nearest known name, both where two are equally near."""
    names, name = list(known), name[:64]
    near = difflib.get_close_matches(name, names, 2)
    if not near:
        return f"known are {', '.join(names)}"
    likeness = [difflib.SequenceMatcher(None, other, name).ratio() for other in near]
    alike = [other for other, value in zip(near, likeness) if value == likeness[0]]  # best first
    return f"did you mean {' or '.join(alike)}?"


def _without_aliases(parameters: Json) -> Json:
    """Translate the names of the seed's code; a parameter of ours beside one wins."""
    values = dict(parameters)
    if "frame_rate" in values:
        values.setdefault("fps", values.pop("frame_rate"))
    resolution = values.pop("resolution", None)
    if resolution is not None:
        values = {**_resolution_values(resolution), **values}
    mode = values.pop("output_mode", None)
    url = values.pop("rtmp_url", None)
    key = values.pop("stream_key", None)
    output = _seed_output(mode, url, key)
    if mode == "rtmp" and output is None and not values.get("output"):
        raise _bad("rtmp_url", "is required where output_mode is rtmp")
    if output is not None:
        values.setdefault("output", output)
    return values


def _resolution_values(resolution: object) -> Json:
    """Return the size, and the rate where it has one, of 1920x1080 or 1080p60."""
    text = resolution if isinstance(resolution, str) else ""
    sides = re.fullmatch(r"(\d{2,5})[xX](\d{2,5})", text)
    if sides:
        return {"width": int(sides[1]), "height": int(sides[2])}
    word = _SIZE_WORD.fullmatch(text)
    if word:
        return _size_values(word, text)
    raise _bad("resolution", "must be like 1920x1080 or 1080p")


def _seed_output(mode: object, url: object, key: object) -> str | None:
    """Return the output that output_mode, rtmp_url and stream_key name, if any."""
    if mode not in (None, "file", "rtmp", "null", "none"):
        raise _bad("output_mode", "must be file, rtmp or none")
    if mode not in (None, "rtmp") or url is None:
        return None
    if not isinstance(url, str) or not isinstance(key or "", str):
        raise _bad("rtmp_url", "and stream_key must be texts")
    if mode == "rtmp" and not url:
        return None
    return f"{url.rstrip('/')}/{key}" if key else url


def _bad(name: str, message: str) -> ApiError:
    """Return the refusal of a parameter."""
    return ApiError(400, f"parameters.{name} {message}", f"parameters.{name}")


# The checks of the kinds of parameters: each returns the value in its own type.

def _number(fields: Fields, name: str, rule: Parameter) -> float | None:
    return fields.number(name, rule.low, rule.high)


def _whole(fields: Fields, name: str, rule: Parameter) -> int | None:
    return fields.whole(name, rule.low, rule.high)


def _even(fields: Fields, name: str, rule: Parameter) -> int | None:
    number = _whole(fields, name, rule)
    if number is not None and number % 2:
        raise _bad(name, "must be even")
    return number


def _one_field(name: str, value: object) -> Fields:
    """Return the reader of a value that was made from the one that was given."""
    return Fields({name: value}, prefix="parameters.")


def _rate(fields: Fields, name: str, rule: Parameter) -> float | None:
    value = fields.values[name]
    if isinstance(value, str):
        number = _fraction(value.strip())
        if number is None:
            raise _bad(name, "must be a number or a fraction such as 30000/1001")
        fields = _one_field(name, number)
    return _number(fields, name, rule)


def _fraction(text: str) -> float | None:
    """Return the number of `25`, `29.97` or `30000/1001`; None for anything else."""
    found = _exact(text)
    return None if found is None else float(found)


def _exact(text: str) -> fractions.Fraction | None:
    """Return the exact number of a rate, None for anything else."""
    if not _RATE.fullmatch(text):
        return None
    try:
        return fractions.Fraction(text)
    except ZeroDivisionError:
        return None


def _bits(fields: Fields, name: str, rule: Parameter) -> int:
    value = fields.values[name]
    if isinstance(value, str):
        match = _BITRATE.fullmatch(value.strip())
        if not match or len(value) > MAX_RATE_CHARS:
            raise _bad(name, "must be bits per second, such as 15000k or 5M")
        unit = match[2].lower()
        fields = _one_field(name, float(match[1]) * _BITRATE_UNITS[unit])
    return int(_number(fields, name, rule) or 0)


def _bool(fields: Fields, name: str, rule: Parameter) -> bool | None:
    return fields.flag(name)


def _word(fields: Fields, name: str, rule: Parameter) -> str:
    text = fields.required_text(name, 32).lower()
    # One table of aliases for all words: no codec and container share one.
    text = CODEC_ALIASES.get(text, CONTAINER_ALIASES.get(text, text))
    if text not in rule.words:
        raise _bad(name, f"must be one of {', '.join(rule.words)}")
    return text


def _words(fields: Fields, name: str, rule: Parameter) -> tuple[str, ...]:
    """Return the words of a list, or of a text with commas, each once."""
    items = fields.values[name]
    if isinstance(items, str):
        items = [item.strip() for item in items.split(",")]
    if not isinstance(items, list):
        choice = f" of {', '.join(rule.words)}" if rule.words else ""
        raise _bad(name, f"must be a list{choice}")
    found: dict[str, None] = {}
    for item in items:
        entry = _one_field(name, item)
        word = _word(entry, name, rule) if rule.words else entry.required_text(name, 4096)
        found[word] = None
    return tuple(found)


def _plain_name(fields: Fields, name: str, rule: Parameter) -> str:
    text = fields.required_text(name, 64)
    if not _NAME.fullmatch(text):
        raise _bad(name, "must be a name of letters, digits, dots, dashes and underscores")
    return text


def _preset(fields: Fields, name: str, rule: Parameter) -> str:
    value = fields.values[name]
    if isinstance(value, int) and not isinstance(value, bool):  # True is an int
        return str(_whole(fields, name, rule))
    text = fields.required_text(name, 16).lower()
    if text in PRESET_WORDS or _OWN_PRESET.fullmatch(text):
        return text
    raise _bad(name, f"must be one of {', '.join(PRESET_WORDS)}, or the encoder's own: 0 to 13, "
               "p1 to p7")


_LISTENS = re.compile(r"[?&]mode=(?!caller(?:&|$))", re.IGNORECASE)  # it would open a port


def _place(fields: Fields, name: str, rule: Parameter) -> str:
    """Return a path as given, or a URL rebuilt from its checked parts."""
    text = fields.required_text(name, 4096)
    scheme = scheme_of(text)
    known = INPUT_SCHEMES if name == "input" else OUTPUT_SCHEMES
    if scheme is None:
        return text
    if scheme not in known:
        raise _bad(name, f"must be a path, or a URL of {', '.join(known)}")
    try:
        url = parse_url(text)
    except ValueError as error:
        raise _bad(name, f"is not a URL with a valid host and port: {error}") from None
    if scheme == "srt" and _LISTENS.search(url.rest):
        raise _bad(name, "must call another host: mode=caller is the only mode of srt")
    return str(url)


_CHECKS: dict[str, Callable[[Fields, str, Parameter], Any]] = {
    "number": _number, "whole": _whole, "size": _even, "rate": _rate, "bitrate": _bits,
    "bool": _bool, "word": _word, "words": _words, "name": _plain_name, "preset": _preset,
    "place": _place,
}


def parameters_of(pairs: Iterable[str]) -> Json:
    """Return the parameters of `-p name=value` words; ValueError names the word that is not one."""
    values: Json = {}
    for pair in pairs:
        name, found, text = pair.partition("=")
        if not found or not name:
            raise ValueError(f"invalid parameter '{pair}': expected -p name=value")
        kind = PARAMETERS[name].kind if name in PARAMETERS else "word"
        values[name] = _typed(kind, text)
    return values


_TRUTHS = {
    "true": True, "yes": True, "1": True,
    "false": False, "no": False, "0": False}


def _typed(kind: str, text: str) -> Any:
    """Return a word of the command line as JSON has it; resolve() refuses what stays a text."""
    if kind in ("word", "name", "place"):
        return text
    if kind == "words":
        return [item for item in text.split(",") if item]
    if kind == "bool":
        return _TRUTHS.get(text.lower(), text)
    numbers: list[Callable[[str], float]] = [int, float]
    if kind == "number":
        numbers.append(parse_duration)  # 1m30s
    for number in numbers:
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def _container(values: Json) -> str:
    """Return the container: that of the output's suffix, with which `container` may only agree."""
    output, named = values.get("output"), values.get("container")
    if output is None:
        return str(named or "matroska")
    scheme = scheme_of(output)
    if scheme is not None:
        return str(named or CONTAINER_OF_SCHEME[scheme])
    suffix = os.path.splitext(output)[1]
    suffix = suffix.lower() if suffix.isascii() else ""  # the Kelvin sign is a k in lower case
    if suffix not in CONTAINER_OF_SUFFIX:  # a job may not write a script, or a file of a web server
        known = ", ".join(CONTAINER_OF_SUFFIX)
        raise _bad("output", f"must end with the suffix of a container: {known}")
    container = CONTAINER_OF_SUFFIX[suffix]
    if named and named != container:
        raise _bad("container",
                   f"is {named}, but the output ends with {suffix}, which is {container}")
    return container


def _refuse_hidden(output: str | None) -> None:
    """Refuse an output with a hidden part, or one that leads up: `.ssh/film.mkv`, `../film.mkv`."""
    parts = output.split("/") if output and not scheme_of(output) else ()
    hidden = [part for part in parts if part.startswith(".")]
    if any(part != "." for part in hidden):
        raise _bad("output", "must not have a part that begins with a dot")


class Refusal(NamedTuple):
    """Settings that cannot be: the parameter that is to blame, when, and the reason."""

    field: str
    applies: Callable[[Settings, Encoder], bool]
    reason: Callable[[Settings, Encoder], str]


def _is_held(settings: Settings) -> bool:
    """Return whether the container can hold the codec."""
    return settings.codec in CONTAINER_CODECS.get(settings.container, CODECS)


def _why_not_held(settings: Settings, encoder: Encoder) -> str:
    holds = ", ".join(CONTAINER_CODECS[settings.container])
    return f"cannot be {settings.codec} in {settings.container}: it holds {holds}"


def _is_other_format(settings: Settings, encoder: Encoder) -> bool:
    """Return whether frames would go up to a device in another format than the one asked for."""
    wanted = settings.pixel_format
    return wanted is not None and bool(encoder.upload) and not encoder.takes(wanted)


# A row that can do everything, for a job of a codec that names no encoder.
ANY_ENCODER = {codec: Encoder(codec, presets=PRESET_WORDS, two_pass=True) for codec in CODECS}
# The first that applies is the reason.
REFUSALS = (
    Refusal("container", lambda job, row: not _is_held(job) and not job.output, _why_not_held),
    Refusal("codec", lambda job, row: not _is_held(job), _why_not_held),
    Refusal("encoder", lambda job, row: job.encoder not in (None, *ENCODERS),
            lambda job, row: f"{job.encoder} is unknown; {_nearest(str(job.encoder), ENCODERS)}"),
    Refusal("encoder", lambda job, row: row.codec != job.codec,
            lambda job, row: f"{job.encoder} makes {row.codec}, the job asks for {job.codec}"),
    Refusal("crf", lambda job, row: (job.crf or 0) > MAX_CRF.get(job.codec, math.inf),
            lambda job, row: f"of {job.codec} is from 0 to {MAX_CRF[job.codec]}"),
    Refusal("two_pass", lambda job, row: job.two_pass and job.crf is not None,
            lambda job, row: "needs a bitrate, and goes without crf"),
    Refusal("two_pass", lambda job, row: job.two_pass and not row.two_pass,
            lambda job, row: f"is not possible with {job.encoder}"),
    Refusal("preset", lambda job, row: job.preset is not None and not row.presets,
            lambda job, row: f"is not possible with {job.encoder}: it has no presets"),
    Refusal("pixel_format", _is_other_format,
            lambda job, row: f"{job.pixel_format} is not possible with {job.encoder}: it takes "
                             "yuv420p or nv12"),
)


def _refuse_impossible(settings: Settings) -> None:
    """Raise the first refusal of the table that applies."""
    encoder = ENCODERS.get(settings.encoder or "") or ANY_ENCODER[settings.codec]
    for refusal in REFUSALS:
        if refusal.applies(settings, encoder):
            raise _bad(refusal.field, refusal.reason(settings, encoder))


# ---- 8 Choices -----------------------------------------------------------------------------------

FALLBACK_FPS = 25.0  # for a film without a rate of its own
NOT_BUILT_IN = "not built into this FFmpeg"


@dataclass(frozen=True)
class Machine:
    """The facts of this machine that planning needs.

    `encoders` has the proofs of those that were tried, of sound too; empty where none was tried.
    `http_args` keep FFmpeg from following a redirect, where this one can; `rate_mode` is its option
    that keeps the input's own frames.
    """

    name: str
    ffmpeg: str
    threads: int
    slots: int = 1
    encoders: Mapping[str, hwdetect.Proof] = dataclasses.field(default_factory=dict)
    vaapi_device: str = "/dev/dri/renderD128"
    rate_mode: str = "-fps_mode"
    http_args: tuple[str, ...] = ()

    def is_proved(self, encoder: str) -> bool:
        """Return whether an encoder has encoded a frame here."""
        proof = self.encoders.get(encoder)
        return proof is not None and proof.state == "proved"

    def why_undecided(self, encoder: str) -> str:
        """Return why the trial of an encoder came to no answer, "" where it did or never was."""
        proof = self.encoders.get(encoder)
        if proof is None or proof.state != "undecided":
            return ""
        return proof.why

    def why_broken(self, encoder: str) -> str:
        """Return why an encoder does not work here, "" where it may: one that was not tried may."""
        if not self.encoders:
            return ""
        proof = self.encoders.get(encoder)
        if proof is None:
            return NOT_BUILT_IN
        return proof.why if proof.state == "failed" else ""

    def hardware(self, codec: str) -> list[str]:
        """Return the hardware encoders of a codec that were tried here."""
        found = []
        for name in self.encoders:
            row = ENCODERS.get(name)  # an encoder of sound has none
            if row is not None and row.hardware and row.codec == codec:
                found.append(name)
        return found


@dataclass(frozen=True)
class Source:
    """The input as ffprobe saw it; sizes after rotation, `loop` for a clip to be repeated.

    `url` is the name by which FFmpeg opens it: a URL, or the path of a descriptor or of a file of
    the attempt's own. `demuxer` is FFmpeg's name of the format, as ffprobe found it. `duration_s`
    is the picture's, which begins `start_s` after the film. `base_fps` is the rate (a fraction) to
    whose beat FFmpeg puts the frames, where it is not the mean: a film of changing rate. `steady`
    tells that the rate is known to be constant.
    """

    url: str
    width: int
    height: int
    fps: float
    duration_s: float | None
    pixel_format: str = "yuv420p"
    has_audio: bool = False
    square_pixels: bool = True
    loop: bool = False
    codec: str = ""
    start_s: float = 0.0
    base_fps: str = ""
    steady: bool = False
    demuxer: str = ""


class Picture(NamedTuple):
    """Size, rate and pixel format of a picture."""

    width: int
    height: int
    fps: float
    pixel_format: str = "yuv420p"


class Rate(NamedTuple):
    """The rule for the size of an output: in words, and as FFmpeg's arguments."""

    words: str
    args: list[str]


class Choice(NamedTuple):
    """A decision, and its reason."""

    name: str
    reason: str


def choose_encoder(settings: Settings, machine: Machine) -> Choice:
    """Return the encoder of a job on this machine, and why; Failure where none works.

    The first rule that has an answer decides.
    """
    # An encoder that is listed may be of no use here: one counts only after it has encoded a frame
    # on this machine, which the probe of hwdetect tries at the agent's start.
    if settings.encoder is not None:
        return _named_encoder(settings.encoder, machine)
    fitting = _fitting_encoders(settings)
    for rule in (_unprobed_encoder, _proved_encoder, _undecided_encoder):
        choice = rule(settings, machine, fitting)
        if choice is not None:
            return choice

    # Hardware is left out: most machines have none, and its reasons would hide those that help.
    software = [name for name in fitting if not ENCODERS[name].hardware]
    tried = [f"{name}: {machine.why_broken(name)}" for name in software]
    twice = " in two passes" if settings.two_pass else ""
    raise Failure("no_capability", f"no encoder for {settings.codec}{twice} works on "
                  f"{machine.name} ({'; '.join(tried) or 'none is known'})")


def _named_encoder(name: str, machine: Machine) -> Choice:
    why = machine.why_broken(name)
    if why:
        raise Failure("no_capability", f"encoder {name} does not work on {machine.name}: {why}")
    return Choice(name, f"{name} as the job asks")


def _fitting_encoders(settings: Settings) -> list[str]:
    """Return the encoders that can do what the job asks for, best first."""
    fitting = []
    for name, row in ENCODERS.items():
        has_passes = row.two_pass or not settings.two_pass
        has_format = settings.pixel_format is None or row.takes(settings.pixel_format)
        if row.codec == settings.codec and has_passes and has_format:
            fitting.append(name)
    return fitting


def _unprobed_encoder(settings: Settings, machine: Machine,
                      fitting: Sequence[str]) -> Choice | None:
    """Return the first software encoder of a machine on which none was tried."""
    if machine.encoders:
        return None
    name = next(name for name in fitting if not ENCODERS[name].hardware)
    return Choice(name, f"{name}, unproved: encoders were not probed")


def _proved_encoder(settings: Settings, machine: Machine, fitting: Sequence[str]) -> Choice | None:
    """Return the first encoder that has encoded a frame here."""
    for name in fitting:
        if machine.is_proved(name):
            return Choice(name, _why_proved(settings, machine, name))
    return None


def _undecided_encoder(settings: Settings, machine: Machine,
                       fitting: Sequence[str]) -> Choice | None:
    """Return the first software encoder whose trial took too long: a machine under load."""
    for name in fitting:
        why = machine.why_undecided(name)
        if why and not ENCODERS[name].hardware:
            return Choice(name, f"{name}, unproved: {why}")
    return None


def _why_proved(settings: Settings, machine: Machine, name: str) -> str:
    if ENCODERS[name].hardware:
        return f"{name}: the hardware encoder was proved on this machine"
    if settings.two_pass:
        return f"{name}: two passes need a software encoder"
    hardware = machine.hardware(settings.codec)
    failed = [other for other in hardware if not machine.is_proved(other)]
    tried = f" ({', '.join(failed)} tried)" if failed else ""
    return f"{name}: no hardware encoder for {settings.codec} works here{tried}"


def choose_preset(settings: Settings, name: str, pixels_per_s: float,
                  threads: int) -> tuple[str | None, str]:
    """Return the preset in the encoder's own words (None where it has none), and why."""
    encoder, asked = ENCODERS[name], settings.preset
    if not encoder.presets:
        return None, f"preset {asked} is ignored: {name} has no presets" if asked else ""
    if asked is not None:
        return _own_preset(encoder, name, asked), f"preset {asked} as the job asks"
    if encoder.hardware:
        return encoder.presets[PRESET_WORDS.index("medium")], ""
    load = pixels_per_s * encoder.cost / threads
    word = _preset_for(load, settings.live)
    reason = f"preset {word} for {load / 1e6:.0f} Mpixel/s a thread"
    if settings.live:
        reason += ", live"
    if encoder.cost > 1:
        reason += f" ({name}: {encoder.cost:g} times the work of libx264)"
    return encoder.presets[PRESET_WORDS.index(word)], reason


def _own_preset(encoder: Encoder, name: str, asked: str) -> str:
    """Return a common preset word in the encoder's own, or its own word as it is."""
    if asked in PRESET_WORDS:
        return encoder.presets[PRESET_WORDS.index(asked)]
    # resolve() cannot refuse it: the encoder may be chosen only here.
    if not re.fullmatch(encoder.own, asked):
        known = ", ".join(dict.fromkeys(encoder.presets))
        raise Failure("parameters",
                      f"invalid parameters.preset {asked} for {name}: expected {known}")
    return asked


def _preset_for(load: float, live: bool) -> str:
    """Return the slowest preset word that keeps up with a load, in pixel/s a thread."""
    for row in PRESET_LOADS:
        if load <= (row.live if live else row.batch):
            return row.word
    return PRESET_LOADS[-1].word


MIN_SIDE = 16  # pixels, as PARAMETERS has it


def _even_side(pixels: float) -> int:
    """Return the nearest even number of pixels."""
    return max(MIN_SIDE, 2 * round(pixels / 2))


def _picture(settings: Settings, source: Source, encoder: Encoder) -> Picture:
    """Return the output's picture: as the job asks, the rest as the film is."""
    width, height = settings.width, settings.height
    if width and not height:
        height = _even_side(source.height * width / max(1, source.width))
    elif height and not width:
        width = _even_side(source.width * height / max(1, source.height))
    return Picture(
        width or source.width // 2 * 2,
        height or source.height // 2 * 2,
        settings.fps or source.fps or FALLBACK_FPS,
        _pixel_format(settings, encoder, source))


_DEEP = re.compile(r"(10|12|16)(le|be)$|^p010")  # more than 8 bit


def _pixel_format(settings: Settings, encoder: Encoder, source: Source) -> str:
    """Return the format that is encoded: as asked, else 10 bit for a deep film if possible."""
    if settings.pixel_format:
        return settings.pixel_format
    if encoder.ten_bit and _DEEP.search(source.pixel_format):
        return encoder.ten_bit
    return "yuv420p"


def _threads(machine: Machine, height: int, quota_percent: float | None) -> int:
    """Return the threads that a picture can feed, within the slot's share and the CPU limit."""
    worth = next(count for lines, count in THREADS_WORTH if height >= lines)
    quota = math.ceil(quota_percent / 100) if quota_percent else worth
    share = machine.threads // max(1, machine.slots)
    return max(1, min(worth, quota, share))


def _rate_control(settings: Settings, name: str, height: int, fps: float) -> Rate:
    """Return the rule for the output's size: a crf, a bitrate, or a crf up to a bitrate."""
    encoder, crf = ENCODERS[name], settings.crf
    if crf is not None and encoder.crf is None:  # known only now, as with a preset
        raise Failure("parameters", f"parameters.crf is not possible with {name}: give a bitrate")
    bitrate = settings.bitrate
    # A stream must fit its line, and a first pass is of use only towards a size.
    needs_bitrate = settings.live or settings.two_pass or encoder.crf is None
    if bitrate is None and needs_bitrate:
        bitrate = ladder_bitrate(settings.codec, height, fps)
    if bitrate is None:
        words = f"{encoder.crf if crf is None else crf:g}"
        return Rate(f"crf {words}", _filled(encoder.crf_args, crf=words))
    if crf is None:
        # A stream has no room for peaks; a file may use half as much again where it needs it.
        most = bitrate if settings.live else bitrate * 3 // 2
        args = _filled(encoder.bitrate_args, bitrate=bitrate_text(bitrate),
                       maxrate=bitrate_text(most), bufsize=bitrate_text(2 * bitrate))
        return Rate(bitrate_text(bitrate), args)
    return Rate(f"crf {crf:g} up to {bitrate_text(bitrate)}", _capped_crf(encoder, crf, bitrate))


def _capped_crf(encoder: Encoder, crf: float, bitrate: int) -> list[str]:
    """Return the arguments of a constant quality with a ceiling."""
    constant = _filled(encoder.crf_args, crf=f"{crf:g}")
    if encoder.crf_args == _CRF_ALONE:  # its -b:v is the ceiling, where it is not 0
        return [*constant[:-1], bitrate_text(bitrate)]
    ceiling, buffer = bitrate_text(bitrate), bitrate_text(2 * bitrate)
    return [*constant, "-maxrate", ceiling, "-bufsize", buffer]


def ladder_bitrate(codec: str, height: int, fps: float) -> int:
    """Return bit/s that a picture of this size needs where the job names none."""
    kbps = next(rate for lines, rate in LADDER_KBPS if height >= lines)
    faster = 1.5 if fps > LADDER_FAST_FPS else 1
    return round(kbps * faster * CODEC_SAVING[codec]) * 1000


def _filled(template: Sequence[str], **values: object) -> list[str]:
    return [part.format(**values) for part in template]


# ---- 9 Command -----------------------------------------------------------------------------------

# Without -nostdin FFmpeg reads keys from a terminal, and stops when it is in the background.
QUIET = ("-hide_banner", "-nostdin")
PROGRESS_ARGS = ("-nostats", "-progress", "pipe:1")
# Each line with its level in front, and repeated ones again: damage is counted by them.
LOG_ARGS = ("-loglevel", "repeat+level+info")
READ_TIMEOUT_ARGS = ("-rw_timeout", "30000000")  # µs without a byte from the network
GENERATED_CLIP_S = 2  # it is looped: a longer one takes more time to make and room in the cache
TONE = "sine=frequency=440:sample_rate=48000"
FINEST_FPS = 480  # the shortest frame that a film of changing rate may keep, as PARAMETERS allows
LIVE_GOP_S = 2.0  # a viewer who joins a stream waits for the next key frame


@dataclass(frozen=True)
class Plan:
    """The commands of one encode, in order, and what they will do, in numbers and in words."""

    passes: tuple[tuple[str, ...], ...]
    encoder: str
    preset: str | None
    threads: int | None
    pixel_format: str
    width: int
    height: int
    fps: float
    duration_s: float | None
    rate: str
    reason: str
    filters: str
    target: str
    container: str


@dataclass(frozen=True)
class _Encode:
    """All decisions about one encode; its arguments follow from them."""

    settings: Settings
    machine: Machine
    source: Source
    target: str
    name: str
    picture: Picture
    threads: int
    preset: str | None
    rate: Rate
    filters: list[str]

    @property
    def encoder(self) -> Encoder:
        return ENCODERS[self.name]


def plan(settings: Settings, machine: Machine, source: Source, target: str) -> Plan:
    """Return the commands that encode `source` to `target` on this machine; Failure says why not.

    `target` is the path or URL that FFmpeg writes to. The decisions come first, each with its
    reason, then the arguments, which hold no decision of their own.
    """
    name, why = choose_encoder(settings, machine)
    encoder = ENCODERS[name]
    picture = _picture(settings, source, encoder)
    width, height, fps, pixel_format = picture
    # Threads before the preset: a preset is chosen by the load on each of them.
    threads = settings.threads or _threads(machine, height, settings.max_cpu_percent)
    preset, why_preset = choose_preset(settings, name, width * height * fps, threads)
    rate = _rate_control(settings, name, height, fps)
    filters = _filters(settings, source, picture)
    encode = _Encode(
        settings, machine, source, target,
        name=name, picture=picture, threads=threads, preset=preset, rate=rate, filters=filters)

    why_size = ""
    if not encoder.hardware:
        room = count_text(threads, "thread")
        why_size = f"{width}x{height} at {fps:g} fps with {room}"
    return Plan(
        passes=_passes(encode),
        encoder=name,
        preset=preset,
        threads=None if encoder.hardware else threads,
        pixel_format=pixel_format,
        width=width,
        height=height,
        fps=fps,
        duration_s=_expected_s(settings, source),
        rate=rate.words,
        reason="; ".join(part for part in (why, why_preset, why_size) if part),
        filters=",".join(filters),
        target=target,
        container=settings.container)


def _expected_s(settings: Settings, source: Source) -> float | None:
    """Return how long the output's picture will be: of a film, at most as long as there is one."""
    if source.duration_s is None or source.loop:
        return settings.duration
    asked_s = math.inf if settings.duration is None else settings.duration
    return max(0.0, min(asked_s - source.start_s, source.duration_s))


def _filters(settings: Settings, source: Source, picture: Picture) -> list[str]:
    """Return the filters from the input's frames to the output's; the picture keeps its shape."""
    # Square pixels first, so that all sizes below are those that a viewer sees.
    filters = [] if source.square_pixels else ["scale=trunc(iw*sar/2)*2:ih", "setsar=1"]
    if settings.width or settings.height:
        width, height = picture.width, picture.height
        # Another shape gets bars at its sides: nothing is cut off, nothing is stretched.
        if (width, height) != (source.width, source.height):
            filters += [
                f"scale={width}:{height}:force_original_aspect_ratio=decrease:flags=bicubic",
                f"pad={width}:{height}:(ow-iw)/2:(oh-ih)/2",
                "setsar=1"]
    elif source.width % 2 or source.height % 2:
        # 4:2:0 has one sample of colour for two pixels: a row is lost rather than all resampled.
        filters.append("crop=trunc(iw/2)*2:trunc(ih/2)*2")
    return filters + _rate_filters(settings, source)


SAME_FPS = 1e-3  # 29.97 is 30000/1001


def _rate_filters(settings: Settings, source: Source) -> list[str]:
    """Return the filters to the frame rate asked for, none for a steady film of that rate.

    With its first frame on the beat a film gives the same frames wherever FFmpeg lets it begin: a
    comparison without the sound may begin it earlier.
    """
    if settings.fps is None:
        return []
    if source.steady and abs(settings.fps - source.fps) < SAME_FPS:
        return []
    rate = rational(settings.fps)
    return [f"setpts=PTS-STARTPTS+round(STARTPTS*TB*{rate})/({rate})/TB", f"fps={rate}"]


def rational(fps: float) -> str:
    """Return a frame rate as FFmpeg takes it without drift: 30, 30000/1001, 12.5."""
    if fps == int(fps):
        return str(int(fps))
    # The rates of NTSC are n * 1000 / 1001: people write them rounded, and a film would drift.
    thousands = round(fps * 1.001) * 1000
    if abs(thousands / 1001 - fps) < 5e-3:
        return f"{thousands}/1001"
    return f"{fps:.6g}"


def _passes(encode: _Encode) -> tuple[tuple[str, ...], ...]:
    """Return one command, or two; they run in the attempt's folder: their log has a plain name."""
    tail = [*_audio_args(encode), *_container_args(encode)]
    if not encode.settings.two_pass:
        return ((*_head_args(encode), *_video_args(encode), *tail),)
    # The first pass only looks at the picture: without sound, as fast as it can, to nowhere.
    nowhere = ["-an", "-f", "null", *PROGRESS_ARGS, "-"]
    first = (*_head_args(encode, paced=False), *_video_args(encode, 1), *nowhere)
    second = (*_head_args(encode), *_video_args(encode, 2), *tail)
    return first, second


def _head_args(encode: _Encode, paced: bool = True) -> list[str]:
    """Return a command up to its inputs; `paced` reads a live job's input at its own speed."""
    machine, settings, source = encode.machine, encode.settings, encode.source
    scheme = scheme_of(source.url)
    args = [machine.ffmpeg, *QUIET, "-y", *LOG_ARGS]  # -y: the target was made for it
    if encode.encoder.upload:
        args += ["-vaapi_device", machine.vaapi_device]
    if paced and settings.live and scheme not in LIVE_SCHEMES:  # a live source has its own clock
        args.append("-re")
    if source.loop:
        args += ["-stream_loop", "-1"]  # without end: -t ends the output
    if settings.hwaccel:
        args += ["-hwaccel", settings.hwaccel]
    if scheme in ("http", "https", "rtmp"):
        args += READ_TIMEOUT_ARGS
    args += open_args(source.url, source.demuxer, machine.http_args)
    if source.loop and settings.audio:  # the generated clip is silent
        args += ["-f", "lavfi", "-i", TONE]
    return args


def _video_args(encode: _Encode, number: int = 0) -> list[str]:
    """Return how the picture is filtered and encoded; `number` of the pass, 0: the only one."""
    settings, encoder, picture = encode.settings, encode.encoder, encode.picture
    upload = [f"format={picture.pixel_format}"]
    if encoder.upload:
        upload = [f"format={encoder.upload}", "hwupload"]
    # V is a moving picture: v would take a cover.
    filters = ",".join([*encode.filters, *upload])
    args = ["-map", "0:V:0", "-vf", filters, "-c:v", encode.name]
    if encode.preset is not None:
        deadline = "realtime" if settings.live else "good"
        args += _filled(encoder.preset_args, preset=encode.preset, deadline=deadline)
    # vfr keeps the input's own frames: by default FFmpeg doubles and drops some for a steady rate.
    args += [*encode.rate.args, encode.machine.rate_mode, "vfr", *_clock_args(encode)]
    stats = f":pass={number}:stats=pass.log" if number else ""
    tiles = min(4, max(0, picture.width.bit_length() - 9))  # log2 of columns of 256 pixels or more
    args += _filled(encoder.thread_args, threads=encode.threads, tile_columns=tiles, stats=stats)
    gop = settings.gop
    if gop is None and settings.live:
        gop = max(1, round(LIVE_GOP_S * picture.fps))
    if gop is not None:
        args += ["-g", str(gop)]
    if settings.duration:
        args += ["-t", f"{settings.duration:.6f}".rstrip("0").rstrip(".")]
    if number:
        args += _filled(encoder.pass_args, number=number)
    return args


def _clock_args(encode: _Encode) -> list[str]:
    """Return a time base for a film of changing rate, which would lose what is faster than its
    beat.

    It is a whole part of the beat, so that frames which keep to it stay exact.
    """
    beat = _exact(encode.source.base_fps)
    if encode.settings.fps or not beat:
        return []
    parts = max(1, math.ceil(FINEST_FPS / beat))
    tick = (1 / (beat * parts)).limit_denominator(1_000_000)
    return ["-enc_time_base", f"{tick.numerator}/{tick.denominator}"] if tick else []


def _audio_args(encode: _Encode) -> list[str]:
    """Return how the sound is encoded; Failure where the encoder of its codec is broken here."""
    settings, source, machine = encode.settings, encode.source, encode.machine
    if not settings.audio or not source.has_audio:
        return ["-an"]
    sound = SOUNDS.get(settings.container, USUAL_SOUND)
    proof = machine.encoders.get(sound.encoder)
    if proof is not None and proof.state == "failed":
        raise Failure("no_capability", f"audio encoder {sound.encoder} does not work on "
                      f"{machine.name}: {proof.why}; audio=false encodes the picture alone")
    track = "1:a:0" if source.loop else "0:a:0"
    args = ["-map", track, "-c:a", sound.encoder, "-b:a", sound.bitrate]
    args += ["-ac", "2"]  # what every player can play
    if sound.sample_rate:
        args += ["-ar", sound.sample_rate]
    return args


def _container_args(encode: _Encode) -> list[str]:
    """Return how the output is written, and where."""
    container, scheme = encode.settings.container, scheme_of(encode.target)
    args = []
    if container in ("mp4", "mov") and scheme is None:
        # The index goes to the front, so that a player can begin before it has the whole file.
        args += ["-movflags", "+faststart"]
    if scheme in HTTP_SCHEMES:
        args += encode.machine.http_args
    return [*args, "-f", container, *PROGRESS_ARGS, named_file(encode.target)]


def rate_mode_of(version: str | None) -> str:
    """Return the option that keeps the input's own frames, by FFmpeg's version text."""
    match = re.search(r"(\d+)\.(\d+)", version or "")
    if match is None:  # built from a commit: as new as can be
        return "-fps_mode"
    number = int(match[1]), int(match[2])
    return "-vsync" if number < (5, 1) else "-fps_mode"


def open_args(url: str, demuxer: str, http_args: Sequence[str]) -> list[str]:
    """Return the options that open an input: allowed protocols and formats, its own if known."""
    scheme = scheme_of(url)
    args = []
    # Both lists hold for everything that the input names: a playlist of files cannot reach a host.
    if scheme in PROTOCOLS:
        args += ["-protocol_whitelist", PROTOCOLS[scheme]]
    if scheme in HTTP_SCHEMES:
        args += http_args
    args += ["-format_whitelist", FILM_FORMATS]
    if demuxer:
        args += ["-f", demuxer]
    return [*args, "-i", named_file(url)]


def named_file(place: str) -> str:
    """Return a path as FFmpeg takes it whatever it begins with; URLs stay."""
    return place if scheme_of(place) else f"file:{place}"


def clip_command(ffmpeg: str, picture: Picture, encoder: str, target: str) -> list[str]:
    """Return the command that makes the generated source: a moving test picture.

    It has no sound, and a container with an exact clock: only so does FFmpeg loop it without a
    slip.
    """
    size, rate = f"{picture.width}x{picture.height}", rational(picture.fps)
    quality = ["-q:v", "2"]  # of mpeg4, where there is no libx264
    if encoder == "libx264":
        quality = ["-preset", "ultrafast", "-crf", "18", "-g", "30"]
    return [ffmpeg, *QUIET, "-y", "-loglevel", "repeat+level+warning",
            "-f", "lavfi", "-i", f"testsrc2=size={size}:rate={rate}",
            "-frames:v", str(clip_frames(picture.fps)), "-pix_fmt", picture.pixel_format,
            "-c:v", encoder, *quality, "-f", "mov", *PROGRESS_ARGS, named_file(target)]


def clip_frames(fps: float) -> int:
    """Return the length of the generated clip."""
    return max(2, round(GENERATED_CLIP_S * fps))


def comparison_format(source: str) -> str:
    """Return the pixel format to compare in: the source's own depth and chroma, planar."""
    chroma = re.match(r"yuvj?(422|444)p", source)
    depth = re.search(r"(\d\d)(?:le|be)$", source)
    bits = ""
    if depth:
        bits = "10le" if int(depth[1]) <= 10 else "12le"
    return f"yuv{chroma[1] if chroma else '420'}p{bits}"


FRAME_LOG = "frames.log"
WINDOW = 16  # pixels; of a smaller plane, which has no two windows, FFmpeg's SSIM is not a number


def quality_command(machine: Machine, metric: str, source: Source, made: Plan) -> list[str]:
    """Return the command that compares an output with its source, filtered as it was to encode it.

    Frames are paired by their number: so a film of changing rate, or one that begins late, is too.
    Each frame's score goes to FRAME_LOG in the current folder.
    """
    threads = max(1, machine.threads // machine.slots)  # the other slots are at work
    log = f"{metric}=stats_file={FRAME_LOG}"
    if metric == "vmaf":
        log = f"libvmaf=n_threads={threads}:log_fmt=csv:log_path={FRAME_LOG}"
    # Each frame gets a time by its number alone; the filters pair frames by time.
    number = f"settb=AVTB,setpts=N/(25*TB),format={comparison_format(source.pixel_format)}"
    reference = f"{made.filters},{number}" if made.filters else number
    graph = f"[0:V:0]{number}[a];[1:V:0]{reference}[b];[a][b]{log}:shortest=1"
    loop = ["-stream_loop", "-1"] if source.loop else []
    return [machine.ffmpeg, *QUIET, *LOG_ARGS, "-threads", str(threads),
            *open_args(made.target, made.container, machine.http_args),
            *loop, *open_args(source.url, source.demuxer, machine.http_args),
            "-lavfi", graph, "-an", "-sn", "-dn", "-f", "null", *PROGRESS_ARGS, "-"]


def probe_command(ffprobe: str, url: str, demuxer: str = "",
                  http_args: Sequence[str] = ()) -> list[str]:
    """Return the command that describes a film as JSON; ffprobe finds an unknown format."""
    return [ffprobe, "-hide_banner", "-v", "error", "-print_format", "json", "-show_format",
            "-show_streams", *open_args(url, demuxer, http_args)]


# ---- 10 Output -----------------------------------------------------------------------------------

# FFmpeg has no other interface than its words. All patterns for them are here; the sections below
# see a Progress, a Source, a failure class or a score.

# With `-loglevel repeat+level` FFmpeg writes `[h264 @ 0x55…] [error] …`; x264 and x265 write their
# name.
_LEVEL = re.compile(r"^(?:\[[^\]]*\] |x26[45] )?\[(fatal|error|panic|warning)\]:? ")
_PREFIX = re.compile(r"\[(?:[^\]\s]+ @ 0x[0-9a-f]+|fatal|error|panic|warning|info)\]:? ?")
UNWRITTEN = re.compile(r"No space left on device|Disk quota exceeded|Error closing file|"
                       r"Error writing trailer|File too large", re.IGNORECASE)
DAMAGE = re.compile(r"error while decoding|Invalid data found|corrupt|Invalid NAL|partial file|"
                    r"concealing|missing picture|truncat|Error submitting packet to decoder|"
                    r"non-existing PPS|no frame!|invalid as first byte|bytestream", re.IGNORECASE)
MAX_BLOCK_KEYS = 200  # of one block of progress: FFmpeg writes about 12


@dataclass(frozen=True)
class Progress:
    """One block of -progress; None for an N/A of FFmpeg. out_time in s of film."""

    frame: int = 0
    fps: float | None = None
    speed: float | None = None
    out_time_s: float | None = None
    total_bytes: int | None = None
    dropped_frames: int = 0
    duplicated_frames: int = 0
    ended: bool = False


class ProgressParser:
    """Takes the lines of -progress one by one; gives a Progress at the end of each block."""

    def __init__(self) -> None:
        self._block: dict[str, str] = {}

    def feed(self, line: str) -> Progress | None:
        key, found, value = line.strip().partition("=")
        if not found or len(self._block) > MAX_BLOCK_KEYS:
            return None
        if key != "progress":
            self._block[key] = value.strip()
            return None
        block, self._block = self._block, {}
        return _progress_of(block, ended=value.strip() == "end")


def _progress_of(block: Mapping[str, str], ended: bool) -> Progress:
    micros = _decimal(block.get("out_time_us"))  # out_time_ms is in microseconds too
    size = _decimal(block.get("total_size"))
    return Progress(
        frame=int(_decimal(block.get("frame")) or 0),
        fps=_decimal(block.get("fps")) or None,  # 0.00 until it has counted some
        speed=_decimal(block.get("speed", "").rstrip("x")),
        out_time_s=None if micros is None else micros / 1e6,
        total_bytes=None if size is None else int(size),
        dropped_frames=int(_decimal(block.get("drop_frames")) or 0),
        duplicated_frames=int(_decimal(block.get("dup_frames")) or 0),
        ended=ended)


def _decimal(text: str | None) -> float | None:
    """Return a number of 0 or more; None for N/A, garbage, huge negatives of first blocks."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def progress_json(done: Progress, expected_s: float | None, step: int, steps: int,
                  phase: str) -> Json:
    """Return progress as the wire has it.

    The percent spans all passes; `eta_s` is the time for this one and those after it.
    """
    percent = eta_s = None
    if expected_s and done.out_time_s is not None:
        part = min(1.0, done.out_time_s / expected_s)
        percent = round(100 * (step + part) / steps, 1)
        if done.speed:
            left_s = expected_s * (steps - step) - done.out_time_s
            eta_s = max(0.0, round(left_s / done.speed, 1))
    return {
        **phase_json(phase, percent),
        "frame": done.frame,
        "fps": done.fps,
        "speed": done.speed,
        "out_time_s": done.out_time_s,
        "eta_s": eta_s}


def phase_json(phase: str, percent: float | None) -> Json:
    """Return progress of a phase without frames and speed."""
    unknown = dict.fromkeys(("frame", "fps", "speed", "out_time_s", "eta_s"))
    return {"phase": phase, "percent": percent, **unknown}


STALL_FRAMES = 60  # a slow encoder may take the time of so many of its frames
STALL_FIRST = 6  # times the limit before the first frame: slow encoders look far ahead


def stall_limit_s(frames: int, elapsed_s: float, limit_s: float = 300.0) -> float:
    """Return how long an encode may show no new frame."""
    if frames == 0:
        return STALL_FIRST * limit_s
    return max(limit_s, STALL_FRAMES * elapsed_s / frames)


_DULL = ("Conversion failed!", "Error opening output files", "Error opening input files",
         "Error while processing", "Nothing was written")


def last_words(lines: Iterable[str], most: int = 3) -> str:
    """Return FFmpeg's own reason from its last lines: errors first, without prefixes, each once."""
    all_lines = list(lines)
    candidates = telling_lines(all_lines) or all_lines
    # Warnings come by the dozen before an error, and seldom are its reason.
    errors = []
    for line in candidates:
        level = _LEVEL.search(line)
        if level and level[1] != "warning":
            errors.append(line)
    chosen = [_PREFIX.sub("", line).strip() for line in errors or candidates[-most:]]
    telling = [line for line in chosen if line and not line.startswith(_DULL)]
    different = list(dict.fromkeys(telling or chosen))
    return "; ".join(different[:most])


SIGNALLED = "Exiting normally, received signal"  # FFmpeg's word, as info, when it is asked to end
SIGNALLED_STATUSES = (128 + signal.SIGKILL, 255)
NOT_STARTED_STATUSES = (126, 127)  # a shell's, of a program that cannot be run or is not there

# Words of FFmpeg and the kernel -> failure_reason; the first match wins.
_REASON_WORDS = (
    (r"No space left on device|Disk quota exceeded|File too large", "out_of_disk"),
    (r"Cannot allocate memory|out of memory|malloc .*failed|failed to map segment|"
     r"opening (?:de|en)coder.*Resource temporarily unavailable", "out_of_memory"),
    (r"Unknown encoder|Encoder not found|Cannot load lib|No capable devices|No device available|"
     r"Device creation failed|Failed to initialise VAAPI|unsupported \(-3\)", "no_capability"),
    (r"Unable to parse option|Error setting (?:option|preset)|Unrecognized|"
     r"Invalid argument.*option|Undefined constant|Option .* not found|"
     r"incompatible pixel format|(?:Unknown|Invalid) pixel format", "parameters"),
    (r"Connection refused|Connection reset|(?:Connection|Operation) timed out|Broken pipe|"
     r"(?:Network|Host) is (?:unreachable|down)|No route to host|://.*: Input/output error|"
     r"(?:Server returned|HTTP error) (?:5|4XX|408|429)|Failed to resolve|Stream ends prematurely|"
     r"://.*: End of file", "network"),
    (r"Invalid data found|moov atom not found|does not contain any stream|matches no streams|"
     r"No such file|Server returned 4|HTTP error 4|Protocol .* not on whitelist|Is a directory|"
     r"EBML header parsing failed|could not find codec parameters", "input"),
    (r"Permission denied|Read-only file system|Could not write header", "output"),
    (r"Error (?:while opening|initializing) encoder|Error opening encoder", "encoder"),
)
FAILURE_WORDS = tuple((re.compile(pattern, re.IGNORECASE), reason)
                      for pattern, reason in _REASON_WORDS)


def failure_reason(returncode: int, words: str) -> str:
    """Return the class of a failure from the exit status and FFmpeg's words.

    Of a process that a signal ended only words about memory count: others may be stale. A program
    that could not be started, or fails without a word, is not an FFmpeg that works.
    """
    found = next((reason for pattern, reason in FAILURE_WORDS if pattern.search(words)), None)
    if found == "out_of_memory":  # the kernel's killer sends a signal: these words come first
        return found
    silent = not words.strip()
    by_signal = returncode < 0 or SIGNALLED in words
    if by_signal or (not words and returncode in SIGNALLED_STATUSES):
        return "killed"
    if silent or returncode in NOT_STARTED_STATUSES:
        return "no_capability"
    return found or "encoder"


def telling_lines(lines: Iterable[str]) -> list[str]:
    """Return the lines about trouble: of a level above info or of none at all, and a signal's."""
    return [line for line in lines if "[info]" not in line[:60] or SIGNALLED in line]


def parse_probe(text: str, url: str) -> Source:
    """Return a film's description from ffprobe's JSON; Failure(input) where it holds no video."""
    try:
        film = Fields(json.loads(text), lenient=True)
    except (ValueError, RecursionError):
        raise Failure("input", f"{url}: ffprobe's answer cannot be read") from None
    streams = film.entries("streams")
    container = film.inside("format")
    video = next((stream for stream in streams if _is_picture(stream)), Fields({}))
    width, height, is_square = _size_of(video, url)
    fps, base_fps = _rates_of(video)
    return Source(
        url=url,
        width=width,
        height=height,
        fps=fps,
        duration_s=_length(video, container),
        pixel_format=video.words("pix_fmt") or "yuv420p",
        has_audio=any(stream.words("codec_type") == "audio" for stream in streams),
        square_pixels=is_square,
        codec=video.words("codec_name") or "video",
        start_s=max(0.0, _start(video) - _start(container)),
        base_fps=base_fps,
        # A mean rate is exact only where the container counts its frames.
        steady=not base_fps and bool(_figure(video, "nb_frames")),
        demuxer=_demuxer(container))


def _is_picture(stream: Fields) -> bool:
    """Return whether a stream is a moving picture, not a cover."""
    is_cover = bool(stream.inside("disposition").values.get("attached_pic"))
    return stream.words("codec_type") == "video" and not is_cover


def _figure(fields: Fields, name: str) -> float | None:
    """Return a figure of ffprobe, which writes some as numbers, some as texts."""
    return _decimal(str(fields.values.get(name)))


def _size_of(video: Fields, url: str) -> tuple[int, int, bool]:
    """Return width and height as they are shown, and whether pixels are square."""
    width = int(_figure(video, "width") or 0)
    height = int(_figure(video, "height") or 0)
    if not width or not height:
        raise Failure("input", f"{url} holds no video that this FFmpeg can read")
    if min(width, height) < 2:
        raise Failure("input", f"{url} is {width}x{height} pixels: too small for any encoder")
    shape = _fraction(video.words("sample_aspect_ratio").replace(":", "/")) or 1.0  # 0:1 is unknown
    if _rotation(video) % 180 == 90:  # FFmpeg turns the frames before any filter sees them
        width, height, shape = height, width, 1 / shape
    if shape != 1:
        width = max(2, int(width * shape / 2) * 2)
    return width, height, shape == 1


def _rates_of(video: Fields) -> tuple[float, str]:
    """Return the mean frame rate, and the beat of a film whose rate changes, else ""."""
    beat = video.words("r_frame_rate")  # ffprobe's guess of the rate that holds all time stamps
    beat_fps = _fraction(beat)
    fps = _fraction(video.words("avg_frame_rate")) or beat_fps or FALLBACK_FPS
    is_changing = abs((beat_fps or fps) - fps) > 0.01 * fps
    return fps, beat if is_changing else ""


def _demuxer(container: Fields) -> str:
    """Return FFmpeg's name of the demuxer that ffprobe found, "" where it is none for films."""
    name = container.words("format_name").split(",")[0]
    return name if name in FILM_FORMATS.split(",") else ""


def _rotation(video: Fields) -> int:
    """Return by how many degrees the picture is turned, by its side data or an older tag."""
    turns = [side.values.get("rotation") for side in video.entries("side_data_list")]
    turns.append(video.inside("tags").values.get("rotate"))
    turn = next((turn for turn in turns if turn is not None), 0)
    return int(_decimal(str(turn).lstrip("-")) or 0)


def _start(part: Fields) -> float:
    """Return when a stream or a film begins, in s; 0 where that is unknown."""
    text = str(part.values.get("start_time") or "")
    sign = -1 if text.startswith("-") else 1
    return sign * (_decimal(text.lstrip("-")) or 0.0)


_CLOCK = re.compile(r"(\d{1,6}):(\d\d):(\d\d(?:\.\d{1,9})?)")


def _length(video: Fields, container: Fields) -> float | None:
    """Return the picture's length in s: its own, its tag in Matroska, else the container's.

    Matroska and Flash call the time of the end a duration.
    """
    own = _figure(video, "duration")
    if own:
        return own
    end = _figure(container, "duration") or 0.0
    clock = _CLOCK.fullmatch(video.inside("tags").words("DURATION"))
    if clock:
        hours, minutes, seconds = clock.groups()
        end = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    late = 0.0
    if container.words("format_name").startswith(("matroska", "flv")):
        late = max(0.0, _start(video))
    return end - late if end > late else end or None


class Score(NamedTuple):
    """One row of the table of quality metrics; the patterns are FFmpeg's words.

    `mean` is found in the summary, `frame` in a line of FRAME_LOG. `ease` is added to each score
    for the harmonic mean, as libvmaf pools, so that one black frame is not all.
    """

    name: str
    lowest: str
    harmonic: str
    mean: re.Pattern[str]
    frame: re.Pattern[str]
    ease: int = 0


def _score_row(metric: str, unit: str, mean: str, frame: str, ease: int = 0) -> Score:
    return Score(f"{metric}{unit}", f"{metric}_min{unit}", f"{metric}_harmonic{unit}",
                 re.compile(mean), re.compile(frame), ease)


SCORES = {
    "psnr": _score_row("psnr", "_db", r"PSNR .*average:(inf|[\d.]+)", r"psnr_avg:(inf|[\d.]+)"),
    "ssim": _score_row("ssim", "", r"SSIM .*All:(-?[\d.]+)", r"All:(-?[\d.]+)"),
    "vmaf": _score_row("vmaf", "", r"VMAF score: ([\d.]+)", r",([\d.]+),?$", ease=1),
    "xpsnr": _score_row("xpsnr", "_db", r"XPSNR .*y: *(inf|[\d.]+)", r"XPSNR y: *(inf|[\d.]+)"),
}
SCORE_NAMES = tuple(name for row in SCORES.values() for name in row[:3])
PERFECT_PSNR_DB = 100.0  # inf: identical pictures; one sample of a large one already has more


def _score(text: str) -> float:
    """Return a score, of which none is above that of identical pictures."""
    return min(PERFECT_PSNR_DB, float(text))


def parse_scores(metric: str, words: Iterable[str],
                 frames: Iterable[str]) -> tuple[dict[str, float], int]:
    """Return a quality metric's mean, minimum and harmonic mean by name, and the frames compared.

    `words` are FFmpeg's at the end, `frames` its log of each frame, read line by line. Identical
    pictures have a PSNR of 100 dB here, and none has more. Unreadable lines are left out.
    """
    row = SCORES[metric]
    means = [_score(match[1]) for match in map(row.mean.search, words) if match]
    count, lowest, inverse = 0, math.inf, 0.0
    for line in frames:
        match = row.frame.search(line.rstrip())
        if match:
            value = _score(match[1])
            eased = value + row.ease
            count += 1
            lowest = min(lowest, value)
            inverse += 1 / eased if eased > 0 else math.inf  # one frame of 0: their mean is 0
    found = {row.name: means[-1]} if means else {}
    if count:
        found[row.lowest] = lowest
        found[row.harmonic] = round(count / inverse - row.ease, 6)
    return found, count


# ---- 11 Statistics -------------------------------------------------------------------------------

# Student's t, 97.5 %, for 1 to 10 degrees of freedom.
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
_NORMAL = 1.959964  # the same of a normal distribution, to which it tends
_MAD_SCALE = 1.4826  # makes a median absolute deviation comparable with a standard deviation

# Half the 95 % interval over the mean, at most, as README promises. The best comes first.
MAX_INTERVAL = {"high": 0.02, "medium": 0.05}
MIN_RUNS = 3  # without the warm-up: an interval of two is several times too wide
OUTLIER_DEVIATIONS = 3
EQUAL_PART = 0.001  # a hair's difference among equal values does not make an outlier
BATCHES = 10
MIN_BATCH_SAMPLES = 3


def interval(values: Sequence[float]) -> Json:
    """Return n, mean, stdev and the 95 % interval of the mean by Student's t, of two values or
    more.

    `relative` is half the interval over the mean, None where the mean is 0.
    """
    count = len(values)
    mean = statistics.fmean(values)
    stdev = statistics.stdev(values)
    half = _student(count - 1) * stdev / math.sqrt(count)
    return {
        "n": count,
        "mean": mean,
        "stdev": stdev,
        "ci95_low": mean - half,
        "ci95_high": mean + half,
        "relative": half / abs(mean) if mean else None}


def _student(free: int) -> float:
    """Return Student's t, 97.5 %; beyond the table by Abramowitz & Stegun 26.7.5."""
    if free <= len(_STUDENT):
        return _STUDENT[free - 1]
    z = _NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / free + second / free**2 + third / free**3


def confidence_of(intervals: Iterable[Mapping[str, Any]]) -> str:
    """Return low, medium or high: the best that all these intervals are narrow enough for."""
    widest = -1.0
    for row in intervals:
        relative = row["relative"]
        widest = max(widest, math.inf if relative is None else relative)
    if widest < 0:
        return "low"
    return next((word for word, most in MAX_INTERVAL.items() if widest <= most), "low")


def outliers(values: Sequence[float]) -> list[bool]:
    """Return for each value whether it is an outlier, beyond 3 scaled median absolute deviations.

    Among few values none is.
    """
    if len(values) <= MIN_RUNS:
        return [False] * len(values)
    # Medians, for a mean and a standard deviation would be moved by the outlier itself.
    middle = statistics.median(values)
    distances = [abs(value - middle) for value in values]
    spread = _MAD_SCALE * statistics.median(distances)
    limit = max(OUTLIER_DEVIATIONS * spread, EQUAL_PART * abs(middle))
    return [distance > limit for distance in distances]


def batch_means(values: Sequence[float]) -> list[float]:
    """Return the means of ten equal stretches of a run, [] of too few samples.

    Neighbouring samples are alike: an interval of the samples themselves would be too narrow.
    """
    if len(values) < MIN_BATCH_SAMPLES * BATCHES:
        return []
    means = []
    for batch in range(BATCHES):
        first = len(values) * batch // BATCHES
        end = len(values) * (batch + 1) // BATCHES
        means.append(statistics.fmean(values[first:end]))
    return means


# ---- 12 Places -----------------------------------------------------------------------------------

# Where clouds hand out a machine's credentials, beside the link-local addresses most of them use.
METADATA = frozenset(map(ipaddress.ip_address, (
    "fd00:ec2::254", "fd00:ec2::23",  # Amazon: EC2, EKS
    "100.100.100.200", "fd00:100::100:200",  # Alibaba
    "168.63.129.16",  # Azure
    "fd20:ce::254",  # Google
    "192.0.0.192", "fd00:c1::a9fe:a9fe",  # Oracle
    "fd00:a9fe:a9fe::1",  # Linode
    "fd00:42::42",  # Scaleway
)))
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
# The names of unfinished outputs: after a kill, nothing else is removed under a media root.
HIDDEN = re.compile(r"\.ffdist-[0-9a-f]{32}\.part")
# failure_reason of an error of the operating system; any other error is "output" at the output and
# "agent" elsewhere.
ERRNO_REASONS = {
    errno.ENOSPC: "out_of_disk",
    errno.EDQUOT: "out_of_disk",
    errno.EFBIG: "out_of_disk",
    errno.ENOMEM: "out_of_memory",
}
# With O_PATH a folder that one may enter but not list can be passed through. macOS has no O_PATH,
# and the command line runs there too.
_FOLDER = getattr(os, "O_PATH", 0) | os.O_DIRECTORY | os.O_CLOEXEC
MAX_NAME_BYTES = 255  # NAME_MAX of Linux
SPACE_EVERY_S = 1.0  # between two looks at the free space


def _meanings(address: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Return an address and the IPv4 addresses that it may stand for."""
    # ::ffff:127.0.0.1, 2002:7f00:1:: and 64:ff9b::127.0.0.1 all lead to this machine.
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return [ip]
    low = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    embedded = [ip.ipv4_mapped, ip.sixtofour, low if ip in NAT64 else None]
    return [ip, *(other for other in embedded if other is not None)]


def _is_own_address(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether an address is the machine's own, link-local, unspecified or metadata."""
    return ip.is_loopback or ip.is_link_local or ip.is_unspecified or ip in METADATA


def address_allowed(address: str, host: str, allowed: Sequence[str]) -> bool:
    """Return whether a job may open an address: the machine's own and metadata ones only if listed.

    Servers that listen on loopback (databases, admin pages) often trust whoever reaches them.
    `allowed` holds addresses, networks such as 127.0.0.0/8, or host names.
    """
    meanings = _meanings(address)
    if not any(map(_is_own_address, meanings)):
        return True

    for entry in allowed:
        if entry.lower() == host.lower():
            return True
        with contextlib.suppress(ValueError):
            network = ipaddress.ip_network(entry, strict=False)
            if any(ip in network for ip in meanings):
                return True
    return False


def write_json(path: Path, value: Json) -> None:
    """Replace a file, for its owner alone, so that it survives a kill and a power cut.

    The content is on the disk before the name is given, and the folder is synchronised after it:
    else a power cut may leave the name with no content, or the old file.
    """
    partial = path.with_suffix(".tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        with open(os.open(partial, flags, 0o600), "w") as file:
            json.dump(value, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except Exception:
        # What a full disk left of it would fill the disk further.
        with contextlib.suppress(OSError):
            partial.unlink()
        raise

    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Link(OSError):
    """A part of a path is a symbolic link."""


def _open_below(folder: int, part: str, flags: int) -> int:
    """Open one part of a path in a folder; OSError, and _Link where it is a symbolic link."""
    try:
        return os.open(part, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        # With O_PATH a link gives ENOTDIR instead of ELOOP.
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            found = os.stat(part, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                words = "links under the media root are not followed"
                raise _Link(errno.ELOOP, words, part) from None
        raise


class MediaRoot:
    """The folder under which jobs name films.

    Each path is opened part by part, and no link is followed. FFmpeg inherits the descriptors that
    were opened here. So the file that was checked is the file that it reads or writes, whatever
    others move or link under the root in the meantime. Links in the path of the root itself are
    the operator's own.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def parts(self, place: str) -> list[str] | None:
        """Return the parts of a path below the root; None where it leads out."""
        below = self._below(place)
        if below is None:
            return None

        found: list[str] = []
        for part in below.split("/"):
            if part in ("", "."):
                continue
            if part != "..":
                found.append(part)
            elif found:
                found.pop()
            else:
                return None
        return found

    def _below(self, place: str) -> str | None:
        """Return the rest of a path below the root; None of an absolute path elsewhere."""
        if not place.startswith("/"):
            return place
        for root in (self.path.rstrip("/"), os.path.realpath(self.path).rstrip("/")):
            if f"{place}/".startswith(f"{root}/"):
                return place[len(root):]
        return None

    def folder(self, parts: Sequence[str]) -> int:
        """Return a descriptor of a folder below the root; OSError."""
        current = os.open(self.path, _FOLDER)
        # Part by part, for Python has no openat2(RESOLVE_BENEATH).
        for part in parts:
            try:
                below = _open_below(current, part, _FOLDER)
            finally:
                os.close(current)
            current = below
        return current

    def file(self, parts: Sequence[str]) -> int:
        """Return a descriptor to read a file below the root; OSError."""
        folder = self.folder(parts[:-1])
        try:
            # O_NONBLOCK: opening a FIFO must not wait for its writer.
            return _open_below(folder, parts[-1] if parts else ".", os.O_RDONLY | os.O_NONBLOCK)
        finally:
            os.close(folder)

    def clear(self, note: Json) -> None:
        """Remove a killed attempt's unfinished output, by the note of its OutputFile; OSError."""
        folder = self.folder(note["parts"])
        try:
            if HIDDEN.fullmatch(note["hidden"]):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(note["hidden"], dir_fd=folder)
            if "taken" in note:
                self._clear_taken(folder, note)
        finally:
            os.close(folder)

    def _clear_taken(self, folder: int, note: Json) -> None:
        """Remove the empty file that reserved the final name, unless another file has it now."""
        found = os.stat(note["taken"], dir_fd=folder, follow_symlinks=False)
        if found.st_size == 0 and _identity_of(found) == tuple(note["identity"]):
            os.unlink(note["taken"], dir_fd=folder)


def _identity_of(found: os.stat_result) -> tuple[int, int, int]:
    """Return device, inode and modification time: together they name one state of one file."""
    return found.st_dev, found.st_ino, found.st_mtime_ns


class OutputFolder(NamedTuple):
    """Where an output goes: a folder and the name in it; `note` is for MediaRoot.clear()."""

    descriptor: int
    path: str
    name: str
    note: Json


@dataclass(frozen=True)
class Places:
    """What jobs may touch from this node; without a `root` they open no paths at all.

    With `own_paths` the paths are those of the shell that started the job, not of a stranger.
    """

    node: str
    root: str | None
    allow_address: tuple[str, ...] = ()
    own_paths: bool = False

    def allow(self, url: str, field: str) -> None:
        """Raise a Failure where a URL leads to a host that a job may not reach, or to none."""
        host = parse_url(url).host
        # Every address of the name: FFmpeg may take any of them.
        addresses = host_addresses(host)
        if not addresses:
            raise Failure("network", f"{field} {url}: host {host} is unknown on {self.node}")
        for address in addresses:
            if not address_allowed(address, host, self.allow_address):
                raise Failure("parameters",
                              f"{field} {url} leads to {address}, which the agent on {self.node} "
                              f"does not open; allow it there with --allow-address {address}")

    def _root(self, place: str, field: str) -> tuple[MediaRoot, list[str]]:
        """Return the media root and the parts of a path below it; Failure where there is none."""
        if self.root is None:
            raise Failure("no_capability", f"{field} {place}: the agent on {self.node} opens no "
                          "paths; start it with --media-root DIR")
        if not os.path.isdir(self.root):
            # Not the film's fault: another node may have the films mounted.
            raise Failure("agent", f"media root {self.root} is not there on {self.node}: "
                          "is it mounted?")
        root = MediaRoot(self.root)
        parts = root.parts(place)
        if parts is None:
            raise Failure("parameters", f"{field} {place} is outside the media root {self.root} "
                          f"of {self.node}")
        return root, parts

    def _link_text(self, field: str, place: str, link: OSError) -> str:
        return (f"{field} {place} leads through the link {link.filename} on {self.node}: "
                f"links under the media root {self.root} are not followed")

    def open_input(self, place: str) -> int:
        """Return a descriptor of the film at a path; Failure where there is no film to read."""
        root, parts = self._root(place, "input")
        try:
            film = root.file(parts)
        except OSError as error:
            raise self._input_failure(place, error) from None
        # Looked at after it was opened: the name may be another file's by now, the descriptor not.
        found = os.fstat(film)
        if stat.S_ISREG(found.st_mode) and found.st_size:
            return film

        os.close(film)
        wrong = "is empty (0 bytes)" if stat.S_ISREG(found.st_mode) else "is not a regular file"
        raise Failure("input", f"input {place} {wrong} on {self.node}")

    def _input_failure(self, place: str, error: OSError) -> Failure:
        """Return the failure that an error of opening an input means."""
        if isinstance(error, _Link):
            return Failure("input", self._link_text("input", place, error))
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return Failure("input", f"input {place} does not exist on {self.node} "
                           f"(media root {self.root})")
        if isinstance(error, PermissionError):
            return Failure("input", f"input {place} may not be read by the agent on {self.node}: "
                           "permission denied")
        if error.errno == errno.ENAMETOOLONG:
            reason = "input"
        else:
            reason = ERRNO_REASONS.get(error.errno or 0, "agent")
        return Failure(reason, f"input {place} cannot be read on {self.node}: {cause_text(error)}")

    def open_folder(self, place: str) -> OutputFolder:
        """Return the folder of an output and the name in it; Failure if there is no such folder."""
        root, parts = self._root(place, "output")
        if not parts:
            raise Failure("output", f"output {place} is a folder on {self.node}: name a file in it")
        if len(os.fsencode(parts[-1])) > MAX_NAME_BYTES:
            raise Failure("output", f"output {place} has a name that is longer than "
                          f"{MAX_NAME_BYTES} bytes")

        above = "/".join((root.path.rstrip("/"), *parts[:-1])) or "/"
        try:
            folder = root.folder(parts[:-1])
        except _Link as error:
            raise Failure("output", self._link_text("output", place, error)) from None
        except OSError as error:
            missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
            why = f"there is no folder {above}" if missing else f"{cause_text(error)} in {above}"
            raise Failure("output",
                          f"output {place} cannot be written on {self.node}: {why}") from None
        note = {"root": root.path, "parts": parts[:-1]}
        return OutputFolder(folder, above, parts[-1], note)


def why_unsafe(root: str, homes: Iterable[str], own: Iterable[str]) -> str:
    """Return why a folder is unsafe as a media root, "" where it is safe; all paths are real.

    It must not be or hold a home folder, nor hold one of the agent's `own` files and folders, nor
    lie in one of them.
    """
    if root == "/":
        return "is the whole machine"
    for home in homes:
        if home == root:
            return "is a home folder"
        if _is_within(home, root):
            return f"holds the home folder {home}"
    for file in own:
        if _is_within(file, root):
            return f"holds the agent's own {file}"
        if _is_within(root, file):
            return f"lies in the agent's own {file}"
    return ""


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def home_folders() -> list[str]:
    """Return the home folders of all who may log in on this machine."""
    # Shells that let nobody in: the homes of such accounts are folders of the system.
    closed = ("nologin", "false", "sync", "shutdown", "halt")
    homes = [os.path.expanduser("~")]
    for account in pwd.getpwall():
        if os.path.basename(account.pw_shell) not in closed or account.pw_uid == os.geteuid():
            homes.append(account.pw_dir)
    real = {os.path.realpath(home) for home in homes if os.path.isabs(home)}
    return sorted(real - {"/"})


_OPENED = re.compile(rf"(?:file:)?{re.escape(hwdetect.DESCRIPTORS)}(\d+)")


class OpenFiles:
    """Descriptors that the programs of one attempt inherit, and the user's names for them.

    FFmpeg opens /proc/self/fd/N and says so in its words; sentences and logs need the user's name.
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def add(self, descriptor: int, name: str) -> str:
        """Let the programs inherit a descriptor; return the path by which they open it."""
        self._names[descriptor] = name
        return hwdetect.descriptor_path(descriptor)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The descriptors to pass on."""
        return tuple(self._names)

    def name_in(self, text: str) -> str:
        """Return text with the user's names for the paths of descriptors."""
        return _OPENED.sub(lambda match: self._names.get(int(match[1]), match[0]), text)

    def name_in_command(self, argv: Sequence[str]) -> tuple[str, ...]:
        """Return a command as it would be for the user's own names."""
        return tuple(named_file(self.name_in(word)) if _OPENED.fullmatch(word) else word
                     for word in argv)


class FreeSpace:
    """What the file systems of one attempt must keep free: a full disk harms more than this job."""

    def __init__(self, host: hwdetect.Host, node: str, min_free_bytes: int) -> None:
        self._host = host
        self._node = node
        self._min_free_bytes = min_free_bytes
        self._wanted: dict[str, tuple[str, float]] = {}  # path -> name for people, bytes
        self._looked = -math.inf

    def want(self, path: str, shown: str, output_bytes: float = 0) -> None:
        """From now on a file system must have room; Failure where it has not.

        It must have room for all of the output now, and later for the usual reserve only: by then
        the output itself has taken its part.
        """
        self._wanted[path] = shown, self._min_free_bytes + output_bytes
        self._look()
        self._wanted[path] = shown, self._min_free_bytes

    def check(self, now: float) -> None:
        """Raise a Failure where a file system is too full; looks at most once a second."""
        if now - self._looked > SPACE_EVERY_S:
            self._looked = now
            self._look()

    def _look(self) -> None:
        if not self._min_free_bytes:
            return
        for path, (shown, wanted) in self._wanted.items():
            space = self._host.space(path)
            if space is not None and space[1] < wanted:
                free = f"{size_text(space[1])} free and {size_text(wanted)} are wanted"
                raise Failure("out_of_disk", f"{shown} on {self._node} has {free}: make room "
                              "there, or set that agent's --min-free")


class Input(Protocol):
    """A kind of input. `name` is the user's, for sentences; `descriptor` that of an open file."""

    name: str
    descriptor: int | None

    def open(self, files: OpenFiles) -> str:
        """Return the path or URL that FFmpeg reads; Failure where it may not, or there is none."""

    def close(self) -> None:
        """Close what open() opened."""


class GeneratedInput:
    """The generated source: a clip in the attempt's own folder, which make_clip() puts there."""

    def __init__(self, folder: Path) -> None:
        self.name = "the generated source"
        self.descriptor: int | None = None
        self.path = folder / "source.mov"

    def open(self, files: OpenFiles) -> str:
        return str(self.path)

    def close(self) -> None:
        pass


class UrlInput:
    """A film that FFmpeg fetches or receives by itself."""

    def __init__(self, places: Places, url: str) -> None:
        self.name = url
        self.descriptor: int | None = None
        self._places = places

    def open(self, files: OpenFiles) -> str:
        self._places.allow(self.name, "input")
        return self.name

    def close(self) -> None:
        pass


class FileInput:
    """A film under the media root; FFmpeg inherits the descriptor and opens no path."""

    def __init__(self, places: Places, path: str) -> None:
        self.name = path
        self.descriptor: int | None = None
        self._places = places

    def open(self, files: OpenFiles) -> str:
        self.descriptor = self._places.open_input(self.name)
        return files.add(self.descriptor, self.name)

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def input_of(place: str | None, places: Places, folder: Path) -> Input:
    """Return the input of its kind: a new kind of input is a class above and a line here."""
    if place is None:
        return GeneratedInput(folder)
    if scheme_of(place):
        return UrlInput(places, place)
    return FileInput(places, place)


# ---- 13 Publishing -------------------------------------------------------------------------------

# How a finished film gets its final name. Several attempts of one job may run at once (a node was
# out of reach and its job went elsewhere), and other people write to the same folder. So FFmpeg
# writes to a hidden file; when it is complete, the agent asks the master whether this attempt
# still holds the lease; within the seconds for which the answer counts, the name is given by a
# call that refuses an existing file. The master keeps the film's fingerprint from before it is
# named: a later attempt recognises a film of an earlier one by it, and replaces it instead of
# failing because the output exists.

FINGERPRINT_BYTES = 1 << 20  # at each end of a film
# An extended attribute of outputs, where the file system has such: the job and attempt that made
# it.
MARK = "user.ffdist.attempt"
# Errors of link(2) where the file system has no hard links (vfat, exFAT, some network and FUSE
# ones).
NO_LINKS = frozenset((
    errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL))
HIDDEN_NOTE = "hidden"  # in an attempt's folder: where its output is, which has no name yet


def boot_clock() -> float:
    """Return s of a clock that goes on while the machine is suspended, as CLOCK_MONOTONIC does not.

    A permission of the master (to name an output) expires by this clock: a laptop that slept
    through it must not use it after waking.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def fingerprint(file: int) -> Json:
    """Return what identifies a film: its bytes, and a SHA-256 of its first and last MiB.

    Two encodes differ in the container's index, which is at one of the ends; hashing all of a film
    of 100 GB would take minutes.
    """
    size = os.fstat(file).st_size
    starts = (0, max(0, size - FINGERPRINT_BYTES))
    ends = b"".join(os.pread(file, FINGERPRINT_BYTES, at) for at in starts)
    return {"bytes": size, "hash": hashlib.sha256(ends).hexdigest()}


class Ownership(NamedTuple):
    """Which attempt makes a film, and the fingerprints of films that earlier ones of its job named.

    The master keeps the fingerprints. A mark on the file itself also identifies a film that was
    named while the master was away.
    """

    job_id: str
    attempt: int
    published: Sequence[Json] = ()

    def mark(self, film: int) -> bool:
        """Mark a film as this attempt's; return whether its file system takes a mark."""
        with contextlib.suppress(OSError, AttributeError):
            os.setxattr(film, MARK, f"{self.job_id} {self.attempt}".encode())
            return True
        return False

    def made(self, film: int) -> bool:
        """Return whether this attempt or an earlier one of its job made a film."""
        with contextlib.suppress(OSError, AttributeError, ValueError):
            job_id, _, attempt = os.getxattr(film, MARK).decode().partition(" ")
            if job_id == self.job_id:
                return int(attempt) <= self.attempt
        return bool(self.published) and fingerprint(film) in self.published


class OutputFile:
    """A film in the making: a hidden file in its final folder, which is named when complete.

    Publishing must never lose somebody else's film, whoever writes to that folder meanwhile.
    link(2) gives the name because it refuses one that exists. Where the file system has no links,
    an empty file created with O_EXCL reserves the name, and the film is renamed over it. A film
    that was there before is replaced only where the job may replace it, and only in the state that
    check() saw.
    """

    def __init__(self, place: str, node: str, folder: int, above: str, name: str) -> None:
        """Take over the descriptor of the folder, which is called `above`."""
        self.above = above
        self.marked = False  # whether the file alone shows a later attempt whose film it is
        # Random, so that nobody can wait at this name with a link.
        self._hidden = f".ffdist-{secrets.token_hex(16)}.part"
        self._shown = f"output {place}"
        self._node = node
        self._folder = folder
        self._final = name
        self._file: int | None = None
        self._before: tuple[int, int, int] | None = None
        self._owner = Ownership("", 0)
        self._keep_note: Callable[[Json], None] = lambda note: None

    def check(self, source: int | None, overwrite: bool, owner: Ownership) -> None:
        """Refuse a name that is the source itself, not a file, or taken; Failure and OSError.

        A film is replaced where the job says `overwrite`, or where it is the job's own: an earlier
        attempt had named it before its node was lost.
        """
        self._owner = owner
        try:
            found = os.stat(self._final, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(found.st_mode):
            raise self._failure("is a folder", "name a file in it")
        if not stat.S_ISREG(found.st_mode):
            raise self._failure("is a link or a device", "name another file")
        if source is not None and os.path.samestat(found, os.fstat(source)):
            raise Failure("parameters", f"{self._shown} is the input itself: name another file")
        if not overwrite and not self._is_own():
            raise self._failure("exists", "name another file, or submit the job with overwrite")
        self._before = _identity_of(found)

    def _is_own(self) -> bool:
        """Return whether an earlier attempt of this job made the film that has the final name."""
        there = _open_below(self._folder, self._final, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return self._owner.made(there)
        finally:
            os.close(there)

    def create(self, keep_note: Callable[[Json], None]) -> int:
        """Make the hidden file, readable as the umask allows; return its descriptor. OSError.

        `keep_note` gets what MediaRoot.clear() needs after a kill, before there is anything to
        clear.
        """
        self._keep_note = keep_note
        keep_note({"hidden": self._hidden})
        # 0666: the umask decides who may read a film. O_RDWR: fingerprint() reads it, and so does
        # FFmpeg to move the index of an mp4 to the front.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(self._hidden, flags, 0o666, dir_fd=self._folder)
        self.marked = self._owner.mark(self._file)
        return self._file

    def sync(self) -> Json:
        """Bring the film to the disk; return its fingerprint. OSError."""
        # Before it has its name: a power cut must not leave a final name with half a film.
        assert self._file is not None
        os.fsync(self._file)
        return fingerprint(self._file)

    def publish(self) -> None:
        """Give the film its name; Failure if another file has it, or it cannot be given."""
        try:
            found = self._identity()
            if found is None:
                self._link()
            elif found == self._before or self._is_own():
                self._rename()
            else:
                raise FileExistsError
        except (FileExistsError, IsADirectoryError, _Link):
            raise self._failure("was written by somebody else while the job ran",
                                "nothing was replaced") from None

    def _identity(self) -> tuple[int, int, int] | None:
        """Return the identity of the file that has the final name; None where there is none."""
        try:
            return _identity_of(os.stat(self._final, dir_fd=self._folder, follow_symlinks=False))
        except FileNotFoundError:
            return None

    def _link(self) -> None:
        """Name the file behind the descriptor, whatever has the hidden name by now."""
        assert self._file is not None
        try:
            os.link(hwdetect.descriptor_path(self._file), self._final, dst_dir_fd=self._folder)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            self._reserve_and_rename()

    def _reserve_and_rename(self) -> None:
        """Name the file where there are no hard links: O_EXCL also refuses a name that is taken."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(self._final, flags, 0o666, dir_fd=self._folder))
        reserved = self._identity()
        # After a kill here, clear() removes the empty file.
        self._keep_note({"hidden": self._hidden, "taken": self._final, "identity": reserved})
        try:
            if self._identity() != reserved:
                raise FileExistsError
            self._rename()
        except BaseException:
            if self._identity() == reserved:
                os.unlink(self._final, dir_fd=self._folder)
            raise

    def _rename(self) -> None:
        assert self._file is not None
        # rename() takes a name, not a descriptor: it must still be the name of our file.
        found = os.stat(self._hidden, dir_fd=self._folder, follow_symlinks=False)
        if not os.path.samestat(found, os.fstat(self._file)):
            raise self._failure("is lost", "its hidden file was replaced by somebody else")
        os.rename(self._hidden, self._final, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def _failure(self, what: str, advice: str) -> Failure:
        return Failure("output", f"{self._shown} {what} on {self._node}: {advice}")

    def failure_of(self, error: OSError) -> Failure:
        """Return the failure that an error of the operating system means for this output."""
        reason = ERRNO_REASONS.get(error.errno or 0, "output")
        return Failure(reason, f"{self._shown} cannot be written on {self._node}: "
                       f"{cause_text(error)} (in {self.above})")

    def close(self) -> None:
        """Remove the hidden name, where it is still there, and close the descriptors."""
        with contextlib.suppress(OSError):
            os.unlink(self._hidden, dir_fd=self._folder)
        for descriptor in (self._file, self._folder):
            if descriptor is not None:
                os.close(descriptor)
        self._file = None


Permit = Callable[[OutputFile, Json], float]


class Output(Protocol):
    """A kind of output. A stream is sent once, while it is made, and cannot be read back."""

    is_stream: bool

    def open(self, files: OpenFiles, source: int | None) -> str:
        """Return the path or URL that FFmpeg writes to; `source` is the input's descriptor."""

    def room(self) -> tuple[str, str] | None:
        """Return a path on the file system that it fills, and its name for people; or None."""

    def deliver(self, permit: Permit) -> None:
        """Hand the film to the user, who then owns it; Failure where that is not possible."""

    def close(self) -> None:
        """Remove an output that was not delivered, and close what open() opened."""


class DiscardedOutput:
    """A film that is only measured: it lies in the attempt's folder and goes with it."""

    def __init__(self, folder: Path) -> None:
        self.is_stream = False
        self._folder = folder

    def open(self, files: OpenFiles, source: int | None) -> str:
        return str(self._folder / "output")

    def room(self) -> tuple[str, str] | None:
        return str(self._folder), str(self._folder)

    def deliver(self, permit: Permit) -> None:
        pass

    def close(self) -> None:
        pass


class StreamOutput:
    """A film that is sent to a server while it is made."""

    def __init__(self, places: Places, url: str) -> None:
        self.is_stream = True
        self._places = places
        self._url = url

    def open(self, files: OpenFiles, source: int | None) -> str:
        self._places.allow(self._url, "output")
        return self._url

    def room(self) -> tuple[str, str] | None:
        return None

    def deliver(self, permit: Permit) -> None:
        pass

    def close(self) -> None:
        pass


class FileOutput:
    """A film under the media root: hidden while it is made, named when it is complete."""

    def __init__(self, settings: Settings, places: Places, folder: Path, owner: Ownership) -> None:
        self.is_stream = False
        self._place = settings.output or ""
        self._overwrite = settings.overwrite
        self._places = places
        self._note_file = folder / HIDDEN_NOTE
        self._owner = owner
        self._target = ""
        self._file: OutputFile | None = None

    def open(self, files: OpenFiles, source: int | None) -> str:
        above = self._places.open_folder(self._place)
        file = OutputFile(self._place, self._places.node, above.descriptor, above.path, above.name)
        self._file = file
        try:
            file.check(source, self._overwrite, self._owner)
            made = file.create(lambda note: write_json(self._note_file, {**above.note, **note}))
        except OSError as error:
            raise file.failure_of(error) from None
        self._target = files.add(made, self._place)
        return self._target

    def room(self) -> tuple[str, str] | None:
        return (self._target, self._file.above) if self._file else None

    def deliver(self, permit: Permit) -> None:
        """Name the film while the permission counts; ask again for one that expired meanwhile."""
        file = self._file
        assert file is not None
        try:
            made = file.sync()
            while permit(file, made) <= boot_clock():
                pass  # the process stood still in between: ask again
            file.publish()
        except OSError as error:
            raise file.failure_of(error) from None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def output_of(settings: Settings, places: Places, folder: Path, owner: Ownership) -> Output:
    """Return the output of its kind: a new kind of output is a class above and a line here."""
    if settings.output is None:
        return DiscardedOutput(folder)
    if scheme_of(settings.output):
        return StreamOutput(places, settings.output)
    return FileOutput(settings, places, folder, owner)


# ---- 14 Run --------------------------------------------------------------------------------------

# One attempt has one Runner, which runs one program at a time in the attempt's own thread. Other
# threads (the poller and the reporter, into whose answers the master puts its orders) only ask:
# stop() leaves a word that the attempt's thread finds within a slice of time, pause() and resume()
# stop and start the clock and the processes at once. Everything else, the meter's booking too, is
# done by the attempt's thread, so that no two threads carry out the same order.

KEPT_LINES = 60  # FFmpeg's last words, which hold the reason of a failure
MAX_LOG_LINES = 10_000  # a film that is damaged throughout logs without end
MAX_LINE_CHARS = 2000
MAX_SAMPLES = 600  # ten minutes of readings, for a master that is away
PROBE_S = 60.0  # for ffprobe to read a film, also on a slow share; one that hangs must end
SLICE_S = 0.25  # between two looks at orders and limits; short, for a cancel waits for it
# How an encoder may end that gets no memory under a plain limit.
CRASHES = tuple(-number for number in (
    signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGTRAP))
LIMIT_PARAMETERS = {"memory": "max_memory_mb", "cpu": "max_cpu_percent"}
_PAUSED = "paused"
_READING = "reading"
_IN_LINE = "in line"
# The longest wait for a slot. A job that was claimed ahead waits for the end of an encode that was
# near; where that does not come (it was paused, say), another node may have the job.
MAX_IN_LINE_S = 5.0


class Stopped(Exception):
    """The attempt was ordered to stop; `args[0]` is canceled, returned or lost."""


class FreeSlots:
    """The slots of a node that no attempt has; attempts take them in their own threads."""

    def __init__(self, count: int = 1) -> None:
        self._count = threading.Semaphore(count)

    def take(self, wait_s: float) -> bool:
        """Take one, and wait so long for it; return whether there was one."""
        return self._count.acquire(timeout=wait_s)

    def put_back(self) -> None:
        """Have one more."""
        self._count.release()


@dataclass(frozen=True)
class Workplace:
    """What the attempts on this node share; paths are absolute, `filters` FFmpeg's for quality."""

    machine: Machine
    ffprobe: str
    host: hwdetect.Host
    meter: hwdetect.Meter
    work_dir: Path
    places: Places
    filters: tuple[str, ...] = ()
    min_free_bytes: int = 0
    stall_limit_s: float = 300.0
    slots: FreeSlots = dataclasses.field(default_factory=FreeSlots)
    making: dict[str, Slot] = dataclasses.field(default_factory=dict)  # whose output has what name

    @property
    def node(self) -> str:
        """This node's name, for sentences."""
        return self.machine.name


class Stopwatch:
    """Counts an attempt's working time, which stands still in a pause and while the meter reads.

    The job's timeout, the stall limit, rests and the wall time of an encode all read this one
    clock, so they cannot disagree about a pause. Pauses come from several threads, may come twice
    and may overlap with a reading: the clock runs while nothing holds it. `act` sends the signal
    to the processes under the lock, so that signals arrive in the order of the changes; it must
    not block.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._holds: set[str] = set()
        self._counted_s = 0.0
        self._since = clock()

    def elapsed_s(self) -> float:
        """Return the working time so far."""
        with self._lock:
            return self._elapsed_s()

    def _elapsed_s(self) -> float:
        """As elapsed_s(), with the lock held."""
        if self._holds:
            return self._counted_s
        return self._counted_s + self._clock() - self._since

    @property
    def paused(self) -> bool:
        """Whether a pause was ordered and no resume since."""
        with self._lock:
            return _PAUSED in self._holds

    def pause(self, act: Callable[[], None]) -> None:
        """Stop the clock and call `act`; a repeat changes nothing."""
        with self._lock:
            if _PAUSED not in self._holds:
                self._hold(_PAUSED)
                act()

    def resume(self, act: Callable[[], None]) -> None:
        """Start the clock and call `act`; a repeat changes nothing."""
        with self._lock:
            if _PAUSED in self._holds:
                self._release(_PAUSED)
                act()

    def repeat_pause(self, act: Callable[[], None]) -> bool:
        """Call `act` if paused, for processes that started since; return whether paused."""
        with self._lock:
            if _PAUSED not in self._holds:
                return False
            act()
            return True

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Stop the clock while the meter reads: sensors may take half a second."""
        return self._standing(_READING)

    def in_line(self) -> contextlib.AbstractContextManager[None]:
        """Stop the clock while the attempt waits for its slot: others work meanwhile."""
        return self._standing(_IN_LINE)

    @contextlib.contextmanager
    def _standing(self, why: str) -> Iterator[None]:
        with self._lock:
            self._hold(why)
        try:
            yield
        finally:
            with self._lock:
                self._release(why)

    def _hold(self, why: str) -> None:
        self._counted_s = self._elapsed_s()
        self._holds.add(why)

    def _release(self, why: str) -> None:
        self._holds.discard(why)
        if not self._holds:
            self._since = self._clock()


class Watchdog:
    """Ends an attempt that takes too long: by the job's timeout, or without a new frame."""

    def __init__(self, watch: Stopwatch, node: str) -> None:
        self._watch = watch
        self._node = node
        self._timeout_s: float | None = None
        self._deadline_s = math.inf  # like all times here, of the stopwatch
        self._frame_s = math.inf  # when the last new frame came; inf: none is expected
        self._stall_limit_s = math.inf

    def start(self, timeout_s: float | None) -> None:
        """Let the job's timeout, if it has one, run from now."""
        self._timeout_s = timeout_s
        self._deadline_s = self._watch.elapsed_s() + (timeout_s or math.inf)

    def lift_timeout(self) -> None:
        """End the timeout: waiting for the master's permission is not the job's time."""
        self._deadline_s = math.inf

    def left_s(self) -> float:
        """Return how much of the timeout is left; inf without one."""
        return self._deadline_s - self._watch.elapsed_s()

    def note_frame(self) -> None:
        """Note a new frame, or a start from which the first one is expected."""
        self._frame_s = self._watch.elapsed_s()

    def expect_frames(self, limit_s: float) -> None:
        """Set the longest time between two new frames."""
        self._stall_limit_s = limit_s

    def expect_no_frames(self) -> None:
        """Let the stall limit rest until the next note_frame()."""
        self._frame_s = math.inf

    def check(self, subject: str) -> None:
        """Raise a Failure where a limit is passed; `subject` is the input's name."""
        now = self._watch.elapsed_s()
        if now > self._deadline_s:
            raise Failure("timeout", f"the job took longer than its timeout of "
                          f"{duration_text(self._timeout_s)} on {self._node}")
        if now - self._frame_s > self._stall_limit_s:
            raise Failure("stalled", f"{subject}: ffmpeg gave no new frame for "
                          f"{duration_text(self._stall_limit_s)} on {self._node}")


class Slot:
    """An attempt's right to encode: no more attempts have one at a time than the node has slots.

    An attempt needs none before and after its encodes. It probes its input while another encodes,
    and checks and publishes its output while the next one does: so short films keep the machine
    busy, and still no encode is measured beside more of them than there are slots.

    The attempt's own thread takes it and gives it; others only look. `changed` is called when it
    is free for another job, or will be in a moment.
    """

    def __init__(self, free: FreeSlots, changed: Callable[[], None]) -> None:
        self.wanted = True  # until the encodes are over
        self.in_line = False
        self.over = threading.Event()  # the attempt has ended
        self.ends_soon = False  # for the agent to claim a job ahead, which clears it
        self._free = free
        self._changed = changed
        self._held = False

    def take(self, look: Callable[[], None]) -> None:
        """Wait for it, and `look` in each slice of time; Stopped where it does not come."""
        until = time.monotonic() + MAX_IN_LINE_S
        self.in_line = not self._held
        while self.in_line:
            self._held = self._free.take(SLICE_S)
            self.in_line = not self._held
            if self.in_line:
                look()
                if time.monotonic() > until:
                    raise Stopped("returned")

    def foresee_end(self) -> None:
        """Note that its encodes end in a moment."""
        self.ends_soon = True
        self._changed()

    def give(self) -> None:
        """Leave it to another attempt; a repeat changes nothing."""
        self.wanted = self.in_line = self.ends_soon = False
        if self._held:
            self._held = False
            self._free.put_back()
            self._changed()


class Log:
    """Numbered lines that the master has not acknowledged; of too many the later are dropped."""

    def __init__(self) -> None:
        self.lines: deque[tuple[int, str]] = deque()  # numbered from 0
        self._count = 0

    def add(self, line: str) -> None:
        if len(self.lines) < MAX_LOG_LINES:
            self.lines.append((self._count, line[:MAX_LINE_CHARS]))
            self._count += 1

    def take(self, most: int) -> tuple[int, list[str]]:
        """Return the oldest lines that were not acknowledged, and the number of the first."""
        taken = list(self.lines)[:most]
        first = taken[0][0] if taken else self._count
        return first, [line for _, line in taken]

    def drop(self, upto: int) -> None:
        """Forget the lines before a number: the master has them."""
        while self.lines and self.lines[0][0] < upto:
            self.lines.popleft()


class Samples:
    """The meter's readings that were not sent yet; of too many the oldest are dropped."""

    def __init__(self) -> None:
        self.rows: deque[Json] = deque(maxlen=MAX_SAMPLES)  # each Ledger of the attempt fills it

    def take(self) -> list[Json]:
        """Return the readings that nobody has confirmed; they stay until drop()."""
        return list(self.rows)

    def drop(self, rows: list[Json]) -> None:
        """Forget readings that the master has; another sender may have dropped some of them."""
        confirmed = {id(row) for row in rows}
        while self.rows and id(self.rows[0]) in confirmed:
            self.rows.popleft()


class Runner:
    """Runs the programs of one attempt, one at a time: limited, measured, watched until they end.

    Other threads may read `progress` and `slot`, take from `log` and `samples`, and call stop(),
    pause() and resume(); the rest is for the attempt's own thread.
    """

    def __init__(self, place: Workplace, folder: Path,
                 slot_changed: Callable[[], None] = lambda: None) -> None:
        self.place = place
        self.folder = folder
        self.slot = Slot(place.slots, slot_changed)
        self.watch = Stopwatch()
        self.watchdog = Watchdog(self.watch, place.node)
        self.space = FreeSpace(place.host, place.node, place.min_free_bytes)
        self.files = OpenFiles()
        self.log = Log()
        self.samples = Samples()
        self.ledger = hwdetect.Ledger(self.samples.rows)
        self.limits: hwdetect.Limits | None = None
        self.progress = phase_json("preparing", 0.0)
        self.subject = ""  # the input's name, for sentences
        self.tail: deque[str] = deque(maxlen=KEPT_LINES)  # of the program that ran last
        self.damaged = 0
        self.stop_word: str | None = None
        self._process: hwdetect.Program | None = None
        self._metering = False  # whether the meter knows of `ledger`
        self._aside = hwdetect.Ledger()  # of a program that runs outside of that

    def stop(self, word: str) -> None:
        """Order the end as canceled, returned or lost; the first order counts."""
        self.stop_word = self.stop_word or word

    def pause(self) -> None:
        """Stop the attempt's clock and its processes."""
        self.watch.pause(lambda: self._signal(signal.SIGSTOP))

    def resume(self) -> None:
        """Start both again after a pause."""
        self.watch.resume(lambda: self._signal(signal.SIGCONT))

    def _signal(self, number: int) -> None:
        process = self._process
        if process is not None:
            process.signal(number)

    def show(self, phase: str, percent: float | None = None) -> None:
        """Show a phase without frames; the percentage stays unless one is given."""
        if percent is None:
            percent = self.progress["percent"]
        self.progress = phase_json(phase, percent)

    def check(self) -> None:
        """Obey orders and hold the limits of time and room: called once in each slice of time."""
        if self.stop_word:
            raise Stopped(self.stop_word)
        paused = self._repeat_pause()
        if self._metering and self.ledger.paused != paused:
            self.place.meter.pause(self.ledger, paused)
        if not paused:
            self.watchdog.check(self.subject)
            self.space.check(time.monotonic())

    def _repeat_pause(self) -> bool:
        """Stop the processes again if paused, for children that were just made; return whether."""
        return self.watch.repeat_pause(lambda: self._signal(signal.SIGSTOP))

    def take_slot(self) -> None:
        """Wait for the right to encode, unless the attempt has it; Stopped."""
        with self.watch.in_line():
            self.slot.take(self._look_in_line)

    def _look_in_line(self) -> None:
        self.show("waiting for a slot")
        self.check()

    def rest(self, seconds: float, phase: str) -> None:
        """Wait without any work; a pause makes it longer."""
        self.watchdog.expect_no_frames()
        until_s = self.watch.elapsed_s() + seconds
        while (left_s := until_s - self.watch.elapsed_s()) > 0:
            self.show(phase)
            self.check()
            time.sleep(min(SLICE_S, left_s))

    @contextlib.contextmanager
    def metered(self) -> Iterator[None]:
        """Book to the ledger meanwhile; the meter's readings are not the encode's time."""
        self.ledger.paused = False
        with self.watch.reading():
            self.place.meter.join(self.ledger)
        self._metering = True
        try:
            yield
        finally:
            self._metering = False
            with self.watch.reading():
                self.place.meter.leave(self.ledger)

    def execute(self, argv: Sequence[str], on_stdout: Callable[[str], None] = lambda line: None,
                limit_s: float = math.inf) -> hwdetect.Exit:
        """Run one program to its end; Stopped or Failure is raised when its group is gone."""
        self._await_resume()
        self.tail.clear()
        try:
            self._start(argv, on_stdout)
            self._wait(limit_s)
        finally:
            ended = self._end()
        self.check()
        return ended

    def execute_metered(self, argv: Sequence[str],
                        on_stdout: Callable[[str], None] = lambda line: None) -> hwdetect.Exit:
        """Run one program as execute() does, measured from before its start.

        The start counts: it is much of a short run.
        """
        self._await_resume()
        with self.metered():
            return self.execute(argv, on_stdout)

    def _await_resume(self) -> None:
        """Wait for the end of a pause: no program starts in one."""
        self.check()
        while self.watch.paused:
            time.sleep(SLICE_S)
            self.check()

    def _start(self, argv: Sequence[str], on_stdout: Callable[[str], None]) -> None:
        try:
            process = hwdetect.Program(argv, self.folder, on_stdout, self._hear,
                                       self.files.descriptors)
        except hwdetect.ProgramMissing as missing:
            raise Failure("no_capability",
                          f"{missing} is not there or not executable on this node") from None
        self._process = process
        self._repeat_pause()  # one that was ordered just before had no process to stop
        if self._metering:
            self.ledger.pgid = process.pid
        else:
            self._aside = hwdetect.Ledger(pgid=process.pid)
            self.place.meter.aside(self._aside)
        self._limit(process.pid)
        # For clear_work(), should this agent be killed: with its start time a pid is never
        # another's.
        started = hwdetect.process_started(self.place.host, process.pid)
        (self.folder / "process").write_text(f"{process.pid} {started}")

    def _limit(self, pid: int) -> None:
        if self.limits is None:
            return
        try:
            news = self.limits.take(pid)
        except hwdetect.LimitsRefused as refused:
            parameters = " and ".join(LIMIT_PARAMETERS[name] for name in refused.args)
            raise Failure("no_capability",
                          f"{parameters} cannot be enforced on {self.place.node}: neither a "
                          "control group nor a plain limit is allowed to the agent") from None
        if news:
            self.log.add(f"limits: {news}")

    def _wait(self, limit_s: float) -> None:
        assert self._process is not None
        until_s = self.watch.elapsed_s() + limit_s
        while not self._process.ended.wait(SLICE_S):
            self.check()
            if self.watch.elapsed_s() > until_s:
                reason = "network" if scheme_of(self.subject) else "timeout"
                raise Failure(reason, f"{self.subject}: no answer from ffprobe in {limit_s:.0f} s "
                              f"on {self.place.node}")

    def _end(self) -> hwdetect.Exit:
        """End what is left of the program and book what it used; return how it ended."""
        # First nobody may signal it any more: its number may soon be another process's.
        process, self._process = self._process, None
        ended = None
        if process is not None:
            process.end()
            ended = process.exit
        if ended is None:
            ended = hwdetect.Exit(-signal.SIGKILL, 0.0, 0)
        booked = self.ledger if self._metering else self._aside
        booked.ended(ended.cpu_seconds, ended.peak_rss_bytes)
        return ended

    def _hear(self, line: str) -> None:
        self.tail.append(line)
        if DAMAGE.search(line):
            self.damaged += 1
        self.log.add(self.files.name_in(line))


# ---- 15 Stages -----------------------------------------------------------------------------------

# An attempt goes through these stages in its own thread: find the source, plan, repeat (encode
# and inspect, until the requested confidence is reached), compare, deliver. Each is a function of
# a Task, returns what it found and raises the Failure that ends the attempt; none catches
# another's.

CONFIDENCES = ("auto", "low", "medium", "high")
# With a machine that is too restless for its interval a job must still end.
MAX_RUNS = {"high": 20, "medium": 10}
REPEATS_S = 3600.0  # no run begins that would end after so long
CACHE_LIMIT_BYTES = 1 << 30  # of generated clips, which are kept for each size and rate
# An output that holds a smaller part of the bytes that FFmpeg counted was cut off as it was
# written: by a full disk, or over a quota.
MIN_WRITTEN = 0.99
# An output that is shorter than this part of the plan (less a frame and the slack) means a damaged
# input: the lengths that containers state are not exact.
MIN_LENGTH = 0.95
LENGTH_SLACK_S = 0.1
# A comparison of less than this part of the frames (less one) says nothing of the film.
MIN_COMPARED = 0.98
# When the next job may be claimed ahead. It is not for other nodes then, so the time is short:
# FFmpeg writes its progress each 0.5 s, and it takes 0.1 to 0.3 s to claim a job and to probe its
# input, so that a node which becomes free meanwhile would hardly begin the job earlier.
AHEAD_S = 0.75
# Progress shows what FFmpeg has read. The 20 to 60 frames that an encoder still holds come on top:
# where they are slow, the job would wait for long.
MIN_AHEAD_FPS = 20.0
MAX_AHEAD_RUN_S = 60.0  # beside a longer encode, what it takes to begin the next is nothing
# All that FFmpeg says of a redirect that it may not follow, and of some other troubles.
_UNSAID = re.compile(r"(?:https?://\S+|Error opening input): Input/output error"
                     r"(?:; Error opening input .*)?")


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `status` is completed, failed, canceled, returned or lost."""

    status: str
    settings: Settings | None = None
    plan: Plan | None = None
    ledger: hwdetect.Ledger = dataclasses.field(default_factory=hwdetect.Ledger)
    progress: Progress = Progress()
    wall_s: float = 0.0
    output_bytes: int | None = None
    output_s: float | None = None
    runs: tuple[Outcome, ...] = ()  # of a job that was repeated: all, the warm-up first
    confidence: str = "low"  # as requested
    quality: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    unknown: Mapping[str, str] = dataclasses.field(default_factory=dict)
    damaged: int = 0
    error: str | None = None
    failure_reason: str | None = None
    limits: Mapping[str, str] = dataclasses.field(default_factory=dict)


class ProbeReasons(NamedTuple):
    """The classes that failures of ffprobe keep, and the class of any other."""

    kept: tuple[str, ...]
    otherwise: str


INPUT_REASONS = ProbeReasons(("network", "killed", "no_capability"), "input")
# An output that cannot be read back is the encoder's fault: the film was just written here.
OUTPUT_REASONS = ProbeReasons(("killed",), "encoder")


def runs_most(confidence: str) -> int:
    """Return how often a job of this confidence is encoded at most, with the warm-up."""
    return MAX_RUNS[confidence] + 1 if confidence in MAX_RUNS else 1


def measured_runs(runs: Sequence[Outcome]) -> list[Outcome]:
    """Return the runs that count: the first of several is a warm-up."""
    return list(runs[1:] or runs)


def intervals_of(runs: Sequence[Outcome]) -> dict[str, Json]:
    """Return the statistics of time and, where it is known, of energy, of runs that count."""
    if len(runs) < 2:
        return {}
    times = [run.wall_s for run in runs]
    found = {"duration": interval(times)}
    energies = [hwdetect.energy_of(run.ledger).joules for run in runs]
    if None not in energies:
        found["energy_joules"] = interval([joules or 0.0 for joules in energies])
    return found


def wants_another(confidence: str, runs: Sequence[Outcome], elapsed_s: float,
                  left_s: float) -> bool:
    """Return whether to encode once more.

    `elapsed_s` is the time of all runs so far, `left_s` the time until the job's timeout.
    """
    one_s = elapsed_s / len(runs)
    if len(runs) >= runs_most(confidence):
        return False
    # A run that takes a tenth longer than the mean must still fit.
    if elapsed_s + one_s > REPEATS_S or one_s * 1.1 > left_s:
        return False

    counted = measured_runs(runs) if len(runs) > 1 else []
    reached = "low"
    if len(counted) >= MIN_RUNS:
        reached = confidence_of(intervals_of(counted).values())
    return CONFIDENCES.index(reached) < CONFIDENCES.index(confidence)


class Task:
    """What the stages of one attempt share: job, settings, runner, input, output and plan."""

    def __init__(self, job: Job, place: Workplace, runner: Runner, settings: Settings) -> None:
        self.job = job
        self.place = place
        self.runner = runner
        self.settings = settings
        self.input = input_of(settings.input, place.places, runner.folder)
        owner = Ownership(job.id, job.attempt, job.published)
        self.output = output_of(settings, place.places, runner.folder, owner)
        self.plan: Plan | None = None
        runner.subject = self.input.name

    @property
    def output_name(self) -> str:
        """The user's name of the output, for sentences."""
        return self.settings.output or "the output"

    def close(self) -> None:
        """Close input and output; an output that was not delivered is removed."""
        self.output.close()
        self.input.close()


def make_folder_of(runner: Runner) -> None:
    """Make the attempt's own folder, empty, under the work folder."""
    work_dir = runner.place.work_dir
    shutil.rmtree(runner.folder, ignore_errors=True)
    make_folder(work_dir)
    runner.folder.mkdir(mode=0o700)
    runner.space.want(str(work_dir), str(work_dir))


def limits_of(settings: Settings, runner: Runner) -> hwdetect.Limits:
    """Return the limits of memory and CPU that the job asks for."""
    memory_bytes = (settings.max_memory_mb or 0) << 20
    percent = settings.max_cpu_percent or 0
    return hwdetect.Limits(runner.place.host, runner.folder, memory_bytes, percent)


def measure_idle(runner: Runner, settings: Settings) -> Outcome:
    """Measure the machine for a while without any work of this job."""
    runner.rest(settings.settle, "settling")
    with runner.metered():
        runner.rest(settings.duration or BASELINE_S, "measuring the idle machine")
    runner.rest(settings.cooldown, "cooling down")

    ledger = runner.ledger
    joules = hwdetect.energy_of(ledger).joules
    busy = ledger.busy_percent_s / ledger.busy_s if ledger.busy_s else 0.0
    if busy > hwdetect.IDLE_BUSY_PERCENT:
        ledger.idle_s, ledger.idle_watts = 0.0, None
        ledger.unknown["idle_watts"] = f"the machine was not idle: {busy:.0f} % of it was busy"
    elif joules is not None:
        # This measurement is the idle power, whatever the node's own baseline says.
        ledger.idle_joules = joules
        ledger.idle_s = ledger.measured_s
        ledger.idle_watts = joules / ledger.measured_s
    return Outcome("completed", wall_s=ledger.measured_s)


def memory_burst(limits: hwdetect.Limits, ended: hwdetect.Exit, reason: str) -> str:
    """Return in words that a process failed for its limit of memory, "" where it did not.

    Encoders that get no memory under a plain limit may fail without a word of it, or crash.
    """
    how = limits.enforced.get("memory")
    if how is None:
        return ""
    if how == "rlimit":
        silent = reason in ("encoder", "no_capability") or ended.returncode in CRASHES
        burst = silent and ended.returncode != 0
        counts = ", which counts addresses, not pages in use"
    else:
        burst = limits.killed()
        counts = ""
    if not burst and reason != "out_of_memory":
        return ""
    return f"max_memory_mb of {limits.memory_bytes >> 20} ({how}{counts}) is too little for it"


def reason_of(task: Task, ended: hwdetect.Exit) -> tuple[str, str]:
    """Return the class of a program's failure, and words if a limit of the job caused it."""
    runner = task.runner
    words = "\n".join(telling_lines(runner.tail))
    reason = failure_reason(ended.returncode, words)
    burst = ""
    if runner.limits is not None:
        burst = memory_burst(runner.limits, ended, reason)
    if burst:
        return "out_of_memory", burst
    # FFmpeg says "No such file" of an output too, for instance.
    if reason == "input" and task.plan is not None and _names_target(words, task.plan.target):
        return "output", ""
    return reason, ""


def _names_target(words: str, target: str) -> bool:
    """Return whether FFmpeg's words name the target, such as /proc/self/fd/3 (but not 31)."""
    return re.search(rf"{re.escape(target)}(?!\d)", words) is not None


def last_words_of(task: Task) -> str:
    """Return FFmpeg's reason with the user's names for paths of the agent's own."""
    runner = task.runner
    words = runner.files.name_in(last_words(runner.tail))
    words = words.replace(f"Format not on whitelist '{FILM_FORMATS}'", "it is not a film")
    discarded = str(runner.folder / "output")
    words = words.replace(f"file:{discarded}", discarded).replace(discarded, "the output")
    if task.place.machine.http_args and _UNSAID.fullmatch(words):
        return f"{words} (if it was a redirect: they are not followed)"
    return words


def require_success(task: Task, ended: hwdetect.Exit) -> None:
    """Raise a Failure in FFmpeg's own words unless it ended well and wrote all that it had."""
    # FFmpeg may exit with 0 although it could not write the end.
    heard = telling_lines(task.runner.tail)
    unwritten = any(map(UNWRITTEN.search, heard))
    if ended.returncode == 0 and not unwritten:
        return

    reason, burst = reason_of(task, ended)
    words = last_words_of(task)
    # Of a process that was killed the last words are stale.
    if burst and words and ended.returncode > 0:
        words = f"{burst}: {words}"
    elif burst:
        words = burst

    if ended.returncode < 0:
        how = f"was killed by {signal.Signals(-ended.returncode).name}"
    else:
        how = f"ended with status {ended.returncode}"
    names = task.input.name
    if task.settings.output:
        names += f" and {task.settings.output}"
    tail = f": {words}" if words else " without a word"
    raise Failure(reason, f"{names}: ffmpeg {how} on {task.place.node}{tail}")


def probe_film(task: Task, url: str, trouble: str, reasons: ProbeReasons, demuxer: str = "") -> str:
    """Return ffprobe's text about a film; a Failure begins with `trouble`."""
    answer: list[str] = []
    argv = probe_command(task.place.ffprobe, url, demuxer, task.place.machine.http_args)
    ended = task.runner.execute(argv, answer.append, PROBE_S)
    if ended.returncode == 0:
        return "\n".join(answer)

    reason, burst = reason_of(task, ended)
    words = burst or last_words_of(task) or f"ffprobe ended with status {ended.returncode}"
    if not burst and reason not in reasons.kept:
        reason = reasons.otherwise
    raise Failure(reason, f"{trouble}: {words}")


def find_source(task: Task) -> Source:
    """Open the input and return its Source."""
    url = task.input.open(task.runner.files)
    if task.settings.input is None:
        return make_clip(task, url)
    text = probe_input(task, url)
    try:
        source = parse_probe(text, task.settings.input)
    except Failure as failure:
        raise Failure(failure.reason, f"{failure.message} (on {task.place.node})") from None
    return dataclasses.replace(source, url=url)


def probe_input(task: Task, url: str) -> str:
    """Return ffprobe's text about the input: by its content, else as the format of its suffix.

    Some films are not recognised by their content; for a damaged one the format's own words say
    more.
    """
    name = task.input.name
    trouble = f"input {name} cannot be read on {task.place.node}"
    suffix = os.path.splitext(name)[1].lower()
    try:
        return probe_film(task, url, trouble, INPUT_REASONS)
    except Failure as failure:
        by_suffix = failure.reason == "input" and suffix in CONTAINER_OF_SUFFIX
        if scheme_of(name) or not by_suffix:
            raise
    return probe_film(task, url, trouble, INPUT_REASONS, CONTAINER_OF_SUFFIX[suffix])


def make_clip(task: Task, path: str) -> Source:
    """Make the generated source: a short clip, kept for each size and rate, to be looped."""
    settings, machine = task.settings, task.place.machine
    width = settings.width or GENERATED["width"]
    height = settings.height or GENERATED["height"]
    fps = float(settings.fps or GENERATED["fps"])
    cache = task.place.work_dir / "cache"
    cache.mkdir(mode=0o700, exist_ok=True)
    kept = cache / f"clip-{width}x{height}-{rational(fps).replace('/', '_')}.mov"
    # A link of its own: bound_cache() of another attempt may remove the kept one meanwhile.
    try:
        os.link(kept, path)
        os.utime(kept)
    except OSError:
        task.runner.show("making the generated source", 0.0)
        # mpeg4 is part of every FFmpeg.
        encoder = "libx264" if machine.is_proved("libx264") else "mpeg4"
        argv = clip_command(machine.ffmpeg, Picture(width, height, fps), encoder, path)
        require_success(task, task.runner.execute(argv))
        with contextlib.suppress(OSError):
            os.link(path, kept)
    bound_cache(cache, CACHE_LIMIT_BYTES)
    duration_s = clip_frames(fps) / fps
    return Source(path, width, height, fps, duration_s,
                  has_audio=True, loop=True, steady=True, demuxer="mov")


def bound_cache(cache: Path, limit_bytes: int) -> None:
    """Remove the clips that were not used for longest until the rest is within the limit."""
    clips = []
    for path in cache.iterdir():
        with contextlib.suppress(OSError):
            found = path.stat()
            clips.append((found.st_mtime, found.st_size, path))
    total = sum(size for _, size, _ in clips)
    for _, size, path in sorted(clips)[:-1]:  # the newest is in use
        if total <= limit_bytes:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


def reserve_room(task: Task, made: Plan) -> None:
    """Refuse an output that will not fit on its file system."""
    room = task.output.room()
    if room is None:
        return
    output_bytes = 0.0
    # With crf the bitrate is only a ceiling.
    if task.settings.bitrate and task.settings.crf is None:
        output_bytes = task.settings.bitrate / 8 * (made.duration_s or 0)
    task.runner.space.want(*room, output_bytes)


class Follower:
    """Follows FFmpeg's progress through the passes of one encode.

    `foresees` says whether the last pass ends the job's use of its slot.
    """

    def __init__(self, runner: Runner, made: Plan, steps: int, foresees: bool = False) -> None:
        self.latest = Progress()
        self._runner = runner
        self._expected_s = made.duration_s
        self._steps = steps  # of all runs of the job
        self._foresees = foresees
        self._parser = ProgressParser()
        self._began_s = self._shown_s = self._pass_s = runner.watch.elapsed_s()
        self._step = 0
        self._phase = ""

    def begin(self, step: int, phase: str) -> None:
        """Begin a pass; its first frame is expected from now on."""
        self._step, self._phase = step, phase
        self._pass_s = self._runner.watch.elapsed_s()
        self._runner.show(phase, 100.0 * step / self._steps)
        self._runner.watchdog.note_frame()
        self._expect_frames(0, 0.0)

    def _expect_frames(self, frames: int, elapsed_s: float) -> None:
        limit_s = stall_limit_s(frames, elapsed_s, self._runner.place.stall_limit_s)
        self._runner.watchdog.expect_frames(limit_s)

    def read(self, line: str) -> None:
        """Take one line of -progress; called in the thread that drains FFmpeg's output."""
        block = self._parser.feed(line)
        if block is None:
            return
        now = self._runner.watch.elapsed_s()
        before = self.latest
        # The time moves without frames too where FFmpeg drops or copies them.
        if (block.frame, block.out_time_s) != (before.frame, before.out_time_s):
            self._runner.watchdog.note_frame()
        frames, span_s = block.frame - before.frame, now - self._shown_s
        if frames > 0 and span_s > 0:
            self._runner.ledger.pace.add(now - self._began_s, frames / span_s)
        self.latest, self._shown_s = block, now
        self._expect_frames(block.frame, now - self._began_s)
        self._runner.progress = progress_json(block, self._expected_s, self._step, self._steps,
                                              self._phase)
        is_last = self._foresees and self._step == self._steps - 1
        if is_last and ends_soon(block, now - self._pass_s, self._expected_s):
            self._foresees = False  # once
            self._runner.slot.foresee_end()


def ends_soon(done: Progress, elapsed_s: float, expected_s: float | None) -> bool:
    """Return whether a pass that got so far in `elapsed_s` is near its end, of `expected_s`."""
    if not expected_s or not done.out_time_s or elapsed_s > MAX_AHEAD_RUN_S:
        return False
    left_s = (expected_s - done.out_time_s) * elapsed_s / done.out_time_s
    return left_s < AHEAD_S and done.frame >= MIN_AHEAD_FPS * elapsed_s


def phase_name(step: int, passes: int, run: int, most: int) -> str:
    """Return the name of a pass, counted from 0, of a run, of at most `most`."""
    name = "encoding" if passes == 1 else f"pass {step + 1} of {passes}"
    if most == 1:
        return name
    warm_up = " (warm-up)" if run == 0 else ""
    return f"run {run + 1}{warm_up}, {name}"


def encode_once(task: Task, made: Plan, run: int, most: int) -> Outcome:
    """Run the commands of one encode, the `run`-th from 0 of at most `most`."""
    runner, passes = task.runner, len(made.passes)
    began_s = runner.watch.elapsed_s()
    settings = task.settings
    # After these the slot is still needed.
    more = most > 1 or settings.quality or settings.cooldown
    follower = Follower(runner, made, most * passes, foresees=not more)
    for step, argv in enumerate(made.passes):
        phase = phase_name(step, passes, run, most)
        follower.begin(run * passes + step, phase)
        command = runner.files.name_in_command(argv)
        runner.log.add(f"run: {shlex.join(command)}")
        ended = runner.execute_metered(argv, follower.read)
        require_success(task, ended)
    runner.watchdog.expect_no_frames()
    wall_s = runner.watch.elapsed_s() - began_s
    return Outcome("completed", wall_s=wall_s, progress=follower.latest)


def inspect_output(task: Task, made: Plan, outcome: Outcome) -> Outcome:
    """Look at the output with ffprobe: FFmpeg's own word for success is not enough.

    Once: what was looked at before, or went to a stream, is returned as it is.
    """
    if task.output.is_stream or outcome.output_bytes is not None:
        return outcome
    size = 0
    if os.path.exists(made.target):
        size = os.path.getsize(made.target)
    if not size or not outcome.progress.frame:
        raise nothing_encoded(task)
    require_bytes(task, size, outcome.progress.total_bytes or 0)

    # Before ffprobe runs: its words replace FFmpeg's.
    heard = telling_lines(task.runner.tail)
    trouble = f"{task.output_name} cannot be read back on {task.place.node}"
    text = probe_film(task, made.target, trouble, OUTPUT_REASONS, made.container)
    length_s = parse_probe(text, task.output_name).duration_s
    reached_s = length_s
    if reached_s is None:  # some containers do not say
        reached_s = outcome.progress.frame / made.fps
    require_length(task, made, reached_s, heard)
    return dataclasses.replace(outcome, output_bytes=size, output_s=length_s)


def nothing_encoded(task: Task) -> Failure:
    """Return the failure of an encode that wrote nothing or no frame: its input has no picture."""
    words = ""
    if telling_lines(task.runner.tail):
        words = last_words_of(task)
    why = f": {words}" if words else ""
    return Failure("input", f"{task.input.name} gave no frame on {task.place.node}{why}")


def require_bytes(task: Task, size: int, written: int) -> None:
    """Raise a Failure where the file is shorter than FFmpeg wrote, as over a quota."""
    if size < MIN_WRITTEN * written:
        raise Failure("out_of_disk", f"{task.output_name} has {size} of the {written} bytes that "
                      f"ffmpeg wrote on {task.place.node}: is its disk full?")


def require_length(task: Task, made: Plan, reached_s: float, heard: Sequence[str]) -> None:
    """Raise a Failure where the output ends too early; `heard` are FFmpeg's lines."""
    if not made.duration_s:
        return
    shortest_s = made.duration_s * MIN_LENGTH - 1.0 / made.fps - LENGTH_SLACK_S
    if reached_s >= shortest_s:
        return

    damage = [line for line in heard if DAMAGE.search(line)]
    words = last_words(damage)
    why = f" ({words})" if words else ""
    # FFmpeg ends well when a server breaks off: only its words say that the film goes on there.
    lost = failure_reason(1, "\n".join(heard)) == "network"
    reason = "network" if lost and scheme_of(task.settings.input) else "input"
    raise Failure(reason, f"{task.input.name} ends after {reached_s:.1f} s of "
                  f"{made.duration_s:.1f} s on {task.place.node}: it is cut or damaged{why}")


def repeat_encode(task: Task, made: Plan) -> Outcome:
    """Encode until the requested confidence is reached; each output replaces the one before.

    Return the last run. One that has to be repeated is inspected before the next.
    """
    runner, settings = task.runner, task.settings
    confidence = task.job.confidence
    if confidence not in CONFIDENCES:
        confidence = "auto"
    once = task.output.is_stream
    most = 1 if once else runs_most(confidence)
    uses_gpu = ENCODERS[made.encoder].hardware or bool(settings.hwaccel)
    runs: list[Outcome] = []
    began_s = runner.watch.elapsed_s()
    while True:
        runner.rest(settings.settle, "settling")
        # A ledger for each run: the statistics compare them.
        runner.ledger = hwdetect.Ledger(runner.samples.rows, uses_gpu)
        outcome = encode_once(task, made, len(runs), most)
        if most > 1:
            outcome = inspect_output(task, made, outcome)
        outcome = dataclasses.replace(outcome, ledger=runner.ledger, confidence=confidence)
        runs.append(outcome)
        runner.rest(settings.cooldown, "cooling down")

        elapsed_s = runner.watch.elapsed_s() - began_s
        left_s = runner.watchdog.left_s()
        if once or not wants_another(confidence, runs, elapsed_s, left_s):
            return dataclasses.replace(outcome, runs=tuple(runs))


def compare_quality(task: Task, made: Plan, source: Source, outcome: Outcome) -> Outcome:
    """Take the quality metrics that the job names, after the encode and apart from its energy."""
    scores: dict[str, float | None] = {}
    unknown: dict[str, str] = {}
    done = outcome.progress
    unpaired = done.dropped_frames + done.duplicated_frames
    for metric in task.settings.quality:
        task.runner.show(f"measuring {metric}")
        found: dict[str, float] = {}
        # The filters pair frames by their number: after one that is missing, no pair fits.
        if unpaired:
            why = f"ffmpeg dropped or doubled {unpaired} frames: they have no pairs"
        else:
            found, why = compare_by(metric, task, made, source, done.frame)
        for name in SCORES[metric][:3]:
            scores[name] = found.get(name)
            if scores[name] is None:
                unknown[name] = why or "FFmpeg gave no score"
    return dataclasses.replace(outcome, quality=scores, unknown=unknown)


def compare_by(metric: str, task: Task, made: Plan, source: Source,
               frames: int) -> tuple[dict[str, float], str]:
    """Return the scores of one comparison by name, or why there are none."""
    runner = task.runner
    why = why_not_comparable(metric, task.place, made)
    if why:
        return {}, why

    argv = quality_command(task.place.machine, metric, source, made)
    # A ledger of its own, so that no job beside this one is booked its energy.
    kept, runner.ledger = runner.ledger, hwdetect.Ledger()
    try:
        ended = runner.execute_metered(argv)
    finally:
        runner.ledger = kept

    found: dict[str, float] = {}
    count = 0
    log = runner.folder / FRAME_LOG
    with contextlib.suppress(FileNotFoundError), open(log, encoding="utf-8") as lines:
        found, count = parse_scores(metric, runner.tail, lines)
        log.unlink()
    if ended.returncode != 0 or not found:
        return {}, f"the comparison failed: {last_words(runner.tail)}"
    if count < MIN_COMPARED * frames - 1:
        return {}, f"the source gave {count} frames to compare with the output's {frames}"
    return found, ""


def why_not_comparable(metric: str, place: Workplace, made: Plan) -> str:
    """Return why a metric cannot be taken here, "" where it can."""
    needed = {"vmaf": "libvmaf"}.get(metric, metric)
    if needed not in place.filters:
        return f"this FFmpeg has no {metric} filter"
    if metric != "psnr" and min(made.width, made.height) < WINDOW:
        return (f"{metric} needs {WINDOW}x{WINDOW} pixels, the picture has "
                f"{made.width}x{made.height}")
    return ""


# ---- 16 Attempt ----------------------------------------------------------------------------------

# Asks whether an output may get its name: returns until when (boot_clock) it may, or None.
Confirm = Callable[[OutputFile, Json], Optional[float]]


class Attempt:
    """One attempt of a job on this machine: its input, its encodes, its output, its outcome.

    run() is called once, in a thread of the attempt's own. Other threads may call stop(), pause()
    and resume(), read `progress` and `paused`, and take from `log` and `samples`.
    """

    def __init__(self, job: Job, place: Workplace,
                 confirm: Confirm = lambda output, made: math.inf,
                 slot_changed: Callable[[], None] = lambda: None) -> None:
        """Prepare; `confirm` asks whether the output may be named.

        `slot_changed` is called when its slot is free for another job, or will be in a moment.
        """
        self.job_id, self.number = self.key = job.key
        self.parameters: Json = {}  # as given
        if isinstance(job.parameters, dict):
            self.parameters = job.parameters
        self.published: Json | None = None  # the output's fingerprint, once it may get its name
        self.leased_at = -math.inf  # when the master last confirmed the lease (boot_clock)
        self.has_ended = False  # its report says the rest
        self._job = job
        self._place = place
        self._confirm = confirm
        # A foreign master's id need not be a UUID, nor a file name.
        name = re.sub(r"[^A-Za-z0-9-]", "_", self.job_id)[:64]
        self._runner = Runner(place, place.work_dir / f"{name}-{self.number}", slot_changed)
        self._task: Task | None = None

    @property
    def progress(self) -> Json:
        """The progress as the wire has it."""
        return self._runner.progress

    @property
    def log(self) -> Log:
        """The log lines that the master has not acknowledged."""
        return self._runner.log

    @property
    def samples(self) -> Samples:
        """The readings that were not sent."""
        return self._runner.samples

    @property
    def slot(self) -> Slot:
        """Its right to encode."""
        return self._runner.slot

    @property
    def stopping(self) -> bool:
        """Whether stop() was called."""
        return self._runner.stop_word is not None

    @property
    def paused(self) -> bool:
        """Whether it is paused."""
        return self._runner.watch.paused

    def stop(self, word: str) -> None:
        """End it as canceled, returned or lost; run() returns when nothing is left of it."""
        self._runner.stop(word)

    def pause(self) -> None:
        """Stop its processes and its clock."""
        self._runner.pause()

    def resume(self) -> None:
        """Start both again after a pause."""
        self._runner.resume()

    def run(self) -> Outcome:
        """Do all the work and return its outcome; nothing is left but a completed output."""
        runner, meter = self._runner, self._place.meter
        # From here on the machine is not idle, also while nothing is measured.
        meter.work(self, True)
        try:
            outcome = self._work()
        except (Stopped, Failure, ApiError, OSError) as error:
            outcome = self._outcome_of(error)
        finally:
            runner.slot.give()
            self._clean()
            runner.slot.over.set()
            meter.work(self, False)
        if runner.limits is not None:
            outcome = dataclasses.replace(outcome, limits=runner.limits.enforced)
        if self._task is not None:
            outcome = dataclasses.replace(outcome, settings=self._task.settings)
        return dataclasses.replace(
            outcome,
            wall_s=outcome.wall_s or runner.watch.elapsed_s(),
            plan=self._plan_as_named(),
            ledger=runner.ledger,
            damaged=runner.damaged)

    def _work(self) -> Outcome:
        """Carry out the stages in their order; Stopped and Failure end them.

        Those before and after the encodes run beside another attempt's encode.
        """
        runner = self._runner
        settings = resolve(self._job.scenario, self._job.parameters, self._place.places.own_paths)
        task = self._task = Task(self._job, self._place, runner, settings)
        runner.watchdog.start(settings.timeout)
        make_folder_of(runner)
        runner.limits = limits_of(settings, runner)
        if settings.baseline:
            runner.take_slot()
            return measure_idle(runner, settings)

        self._follow(settings)
        if settings.input is None:
            runner.take_slot()  # to make the source is an encode too
        source = find_source(task)
        target = task.output.open(runner.files, task.input.descriptor)
        made = task.plan = plan(settings, self._place.machine, source, target)
        runner.log.add(f"plan: {made.reason}")
        reserve_room(task, made)

        runner.take_slot()
        outcome = repeat_encode(task, made)
        if settings.quality and not task.output.is_stream:
            outcome = inspect_output(task, made, outcome)
            outcome = compare_quality(task, made, source, outcome)
        runner.slot.give()

        runner.show("finishing")
        outcome = inspect_output(task, made, outcome)
        # How long the master is away is not the job's time.
        runner.watchdog.lift_timeout()
        task.output.deliver(self._permit)
        return outcome

    def _follow(self, settings: Settings) -> None:
        """Wait for the end of an attempt whose output this job reads or replaces.

        On one slot the jobs of a queue follow each other, and what one writes the next may read.
        That one must find it, though it begins before the other has named its output.
        """
        runner, making = self._runner, self._place.making
        places = [os.path.normpath(place) for place in (settings.input, settings.output) if place]
        for place in places:
            other = making.get(place)
            if other is None:
                continue
            runner.take_slot()
            with runner.watch.in_line():
                while not other.wanted and not other.over.wait(SLICE_S):
                    runner.show(f"waiting for {place}")
                    runner.check()
        if settings.output:
            making[places[-1]] = runner.slot

    def _permit(self, output: OutputFile, made: Json) -> float:
        """Return until when (boot_clock) the output may be named; Stopped where it may not."""
        until = self._confirm(output, made)
        if until is None:
            raise Stopped(self._runner.stop_word or "lost")
        # A cancel may have come while the master was asked.
        self._runner.check()
        return until

    def _outcome_of(self, error: Exception) -> Outcome:
        """Return the outcome that an error means."""
        node, folder = self._place.node, self._runner.folder
        if isinstance(error, Stopped):
            return Outcome(str(error.args[0]))
        if isinstance(error, ApiError):
            return Outcome("failed", error=error.message, failure_reason="parameters")
        if isinstance(error, OSError):
            words = f"{error.filename or folder} on {node}: {cause_text(error)}"
            reason = ERRNO_REASONS.get(error.errno or 0, "agent")
            return Outcome("failed", error=words, failure_reason=reason)

        assert isinstance(error, Failure)
        if folder.is_dir():
            return Outcome("failed", error=error.message, failure_reason=error.reason)
        # Somebody removed the work folder: any failure after that is not the film's fault.
        words = f"{folder} on {node} was removed while the job ran: {error.message}"
        return Outcome("failed", error=words, failure_reason="agent")

    def _plan_as_named(self) -> Plan | None:
        """Return the plan with the user's names in its commands."""
        if self._task is None or self._task.plan is None:
            return None
        made = self._task.plan
        commands = tuple(map(self._runner.files.name_in_command, made.passes))
        return dataclasses.replace(made, passes=commands)

    def _clean(self) -> None:
        """Leave nothing behind: only then may the attempt be reported."""
        if self._task is not None:
            self._task.close()
            place = os.path.normpath(self._task.settings.output or "")
            if self._place.making.get(place) is self._runner.slot:
                del self._place.making[place]
        if self._runner.limits is not None:
            self._runner.limits.lift()
        shutil.rmtree(self._runner.folder, ignore_errors=True)


def clear_work(work_dir: Path, host: hwdetect.Host) -> int:
    """Remove what a killed agent left in its work folder; return how many attempts it was."""
    left = [folder for folder in work_dir.iterdir() if folder.is_dir() and folder.name != "cache"]
    for folder in left:
        _kill_left(folder, host)
        hwdetect.remove_groups(host, _read_words(folder / "groups"))
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads((folder / HIDDEN_NOTE).read_text())
            MediaRoot(note["root"]).clear(note)
        shutil.rmtree(folder, ignore_errors=True)
    return len(left)


def _kill_left(folder: Path, host: hwdetect.Host) -> None:
    """Kill the process group of an attempt, unless its number is another process's by now."""
    words = _read_words(folder / "process")
    if len(words) != 2 or not words[0].isdigit():
        return
    pid, started = int(words[0]), words[1]
    # killpg(0) and killpg(1) would reach the agent itself and everything.
    if pid > 1 and str(hwdetect.process_started(host, pid)) == started:
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, ValueError):
        return []


# ---- 17 Analysis ---------------------------------------------------------------------------------

# From the figures of a run to its report. Unknown is null, with a reason, never 0 and never a guess
# passed off as a reading; a figure that follows from others does so by its formula in METRICS,
# so that README, report and result cannot disagree.

# The recommendations of an analysis: README lists them.
RECOMMENDATIONS = {
    "optimal": "nothing cheaper or faster was found in this run",
    "faster_preset": "the encode was slower than real time: a faster preset would keep up",
    "other_node":
        "it was slower than real time with the fastest preset: this machine cannot keep up",
    "hardware_encoder": "a hardware encoder was proved on this machine and not used",
    "more_threads": "the machine was mostly idle while few threads were asked for",
    "fewer_threads": "many of the threads had nothing to do: fewer are as fast",
    "check_input": "FFmpeg found damage in the input",
    "not_enough_evidence": "the run was too short, disturbed or slowed down by heat: measure again",
}

SHORT_S = 1.0  # the speed of a shorter run means nothing: FFmpeg's start is a large part of it
LIVE_LATE_S = 1.0  # a live encode ends later than its film by FFmpeg's start alone
REAL_TIME = 0.98  # a lower speed does not keep up; the rest is the start again
BACKGROUND_PERCENT = 20.0  # more than this of the machine used by others disturbs a run
MOSTLY_IDLE_PERCENT = 40.0
MIN_COVERED = 0.9  # of a run: gaps up to the rest of it are extrapolated
MAX_SIGNIFICANT = 1e6  # from here on six digits would cut whole ones


def evaluate(formula: str, facts: Mapping[str, Any]) -> float | None:
    """Return the value of a formula: differences of products over products; None of an unknown."""
    total: float | None = None
    flat = formula.replace("(", "").replace(")", "")  # of a denominator: it is one product
    for term in flat.split(" - "):
        value = _quotient(term, facts)
        if value is None:
            return None
        total = value if total is None else total - value
    return total


def _quotient(term: str, facts: Mapping[str, Any]) -> float | None:
    above, _, below = term.partition(" / ")
    numerator, denominator = _product(above, facts), _product(below or "1", facts)
    if numerator is None or not denominator:
        return None
    return numerator / denominator


def _product(term: str, facts: Mapping[str, Any]) -> float | None:
    value = 1.0
    for word in term.split(" * "):
        factor = float(word) if word[0].isdigit() else facts.get(word)
        if factor is None:
            return None
        value *= factor
    return value


def metrics_of(outcome: Outcome) -> Json:
    """Return the metrics of an outcome; an unknown one is null, with a reason in `unknown`."""
    runs = measured_runs(outcome.runs or (outcome,))
    measured = [_measured(run) for run in runs]
    facts: Json = {}
    for name in measured[-1]:
        values = [row[name] for row in measured]
        facts[name] = _merged(values, METRICS[name].repeats)
    facts.update(_film_figures(outcome))
    for name, formula in FORMULAS.items():  # in their order: a later one may use an earlier one
        facts[name] = evaluate(formula, facts)

    own = [name for name, row in METRICS.items() if not row.by_master]
    metrics = {name: _rounded(facts[name]) for name in own}
    known = dict(outcome.unknown)
    for run in runs:
        known.update(_energy_reasons(run.ledger))
    return {**metrics, "unknown": _reasons(metrics, known, outcome)}


def _film_figures(outcome: Outcome) -> Json:
    """Return the figures of the film that was made, and the values that only formulas use."""
    done = outcome.progress
    counted = done.frame > 0
    figures: Json = {
        **dict.fromkeys(SCORE_NAMES), **outcome.quality,
        "frames": done.frame or None,
        "dropped_frames": done.dropped_frames if counted else None,
        "duplicated_frames": done.duplicated_frames if counted else None,
        "output_bytes": outcome.output_bytes,
        "output_seconds": outcome.output_s or done.out_time_s,
        "damaged_packets": outcome.damaged,
    }
    # vmaf is nearest to what people see; the others stand in for it.
    scores = [figures[name] for name in ("vmaf", "psnr_db", "xpsnr_db")]
    figures["quality"] = next((score for score in scores if score is not None), None)
    if outcome.plan is not None:
        figures.update(width=outcome.plan.width, height=outcome.plan.height)
    return figures


def _merged(values: Sequence[Any], how: str) -> Any:
    """Return one figure for those of several runs; None where a run has none."""
    if how == "last":
        return values[-1]
    if any(value is None for value in values):
        return None
    return max(values) if how == "most" else statistics.fmean(values)


def _rounded(value: Any) -> Any:
    """Return a figure with 6 significant digits, but none of its whole ones lost."""
    if not isinstance(value, float):
        return value
    if abs(value) < MAX_SIGNIFICANT:
        return float(f"{value:.6g}")
    return round(value, 1)


def _measured(run: Outcome) -> Json:
    """Return the figures that were measured of one run."""
    ledger, energy = run.ledger, hwdetect.energy_of(run.ledger)
    cpu_usage, background = _cpu_usage(ledger, run.wall_s)
    figures: Json = {
        "duration": run.wall_s,
        "cpu_usage": cpu_usage,
        "background_cpu_percent": background,
        "cpu_seconds": ledger.ended_cpu_s or None,
        "memory_usage": ledger.peak_rss_bytes / 2**20 or None,
        "energy_joules": energy.joules,
        "power_source": energy.source,
        "power_resolution": None,
        "energy_estimated": None,
        "idle_watts": None,
        "idle_joules": None,
        "gpu_usage": None,
        "gpu_memory_usage": None,
        "gpu_energy_joules": energy.gpu_joules,
        "throttled": ledger.throttled,
        "jobs_beside": ledger.beside,
    }
    if energy.source is not None:
        sources = energy.source.split("+")
        figures["power_resolution"] = "; ".join(
            hwdetect.POWER_SOURCES.get(name, name) for name in sources)
        figures["energy_estimated"] = "model" in energy.source
    has_idle = 0 < ledger.idle_s >= MIN_COVERED * ledger.measured_s
    # Without the whole run's idle share, net energy would be too high.
    if energy.joules is not None and has_idle:
        figures.update(idle_watts=ledger.idle_watts, idle_joules=ledger.idle_joules)
    if ledger.gpu_seen_s:
        figures["gpu_usage"] = ledger.gpu_usage_s / ledger.gpu_seen_s
    if ledger.gpu_memory_bytes is not None:
        figures["gpu_memory_usage"] = ledger.gpu_memory_bytes / 2**20
    return figures


def _cpu_usage(ledger: hwdetect.Ledger, wall_s: float) -> tuple[float | None, float | None]:
    """Return % of the whole machine, and how much of that other programs used.

    A run that was too short to sample has only the job's own CPU time.
    """
    capacity = os.cpu_count() or 1  # of the whole machine, whatever this process may use
    if ledger.busy_s > 0:
        usage = ledger.busy_percent_s / ledger.busy_s
        own = 100 * ledger.cpu_s / (capacity * ledger.measured_s)
        return usage, max(0.0, usage - own)
    if not wall_s:
        return None, None
    own = 100 * ledger.ended_cpu_s / (wall_s * capacity)
    return min(100.0, own) or None, None


def _energy_reasons(ledger: hwdetect.Ledger) -> dict[str, str]:
    """Return why energy, or that of a GPU, is unknown of one run."""
    energy, reasons = hwdetect.energy_of(ledger), {}
    if energy.why:
        reasons["energy_joules"] = energy.why
    if ledger.gpus and energy.gpu_joules is None:
        covered_s = hwdetect.least_covered_s(ledger)
        reasons["gpu_energy_joules"] = (
            f"readings of {ledger.gpu_source} cover only {covered_s:.1f} s of "
            f"{ledger.measured_s:.1f} s")
    return reasons


def _reasons(metrics: Json, known: Mapping[str, str], outcome: Outcome) -> dict[str, str]:
    """Return a reason for every figure that is null: one of the machine, or one of the film.

    `known` are the reasons that were found while it ran; METRICS has the rest.
    """
    has_energy = metrics["energy_joules"] is not None
    causes = _causes(known.get("energy_joules", "unknown energy"), has_energy, outcome.ledger)
    no_film = ""
    if not metrics["frames"]:
        baseline = outcome.settings is not None and outcome.settings.baseline
        no_film = NOTHING_ENCODED if baseline else "the attempt failed"

    reasons = {}
    for name, value in metrics.items():
        if value is not None:
            continue
        row = METRICS[name]
        usual = row.unknown.format(**causes)
        if no_film and not row.of_machine:
            usual = no_film
        reasons[name] = known.get(name, usual)  # the more exact one first
    return reasons


def _causes(no_energy: str, has_energy: bool, ledger: hwdetect.Ledger) -> dict[str, str]:
    """Return the causes that METRICS names in braces."""
    # `gpus.0` is the reason of a whole card, `gpus.0.power_watts` of one of its readings.
    gpus = {key: why for key, why in ledger.unknown.items() if key.startswith("gpus.")}
    whole = [why for key, why in gpus.items() if re.fullmatch(r"gpus\.\d+", key)]
    no_gpu = "no GPU with readings"
    gpu_energy = next(iter(gpus.values()), no_gpu)
    if ledger.gpu_inside:
        gpu_energy = "energy_joules includes it"
    if ledger.gpu_silent:
        gpu_energy = ledger.gpu_silent
    causes = {"energy": no_energy, "idle": no_energy, "quality": no_energy,
              "gpu": next(iter(whole), no_gpu), "gpu_energy": gpu_energy}
    if has_energy:
        causes["idle"] = ledger.unknown.get("idle_watts", "no idle baseline of this run")
        causes["quality"] = "no quality was measured"
    return causes


def confidence_reached(outcome: Outcome) -> tuple[str, list[str]]:
    """Return the confidence that the runs, or one run's samples, are good for, and why."""
    runs = measured_runs(outcome.runs)
    if len(runs) > 1:
        return _confidence_of_runs(runs, outcome.confidence)
    if outcome.confidence == "low":
        return "low", []
    return _confidence_of_samples(outcome.ledger)


def _confidence_of_runs(runs: Sequence[Outcome], asked: str) -> tuple[str, list[str]]:
    found = intervals_of(runs)
    word = confidence_of(found.values()) if len(runs) >= MIN_RUNS else "low"
    reasons = [_interval_words(f"{len(runs)} runs and a warm-up", found)]
    if asked not in ("auto", word) and word != "high":
        reasons.append(f"{asked} confidence was not reached")
    return word, reasons


def _confidence_of_samples(ledger: hwdetect.Ledger) -> tuple[str, list[str]]:
    """Return the confidence of one run by how steady its speed and its power were."""
    found = {}
    for name, points in (("speed", ledger.pace.points), ("power", ledger.series.points)):
        values = [point[1] for point in points if point[1] is not None]
        batches = batch_means(values)
        if batches:
            found[name] = interval(batches)
    if "speed" not in found:
        return "low", ["one run, with too few samples to tell how steady it was"]
    return confidence_of(found.values()), [_interval_words("one run, its samples", found)]


def _interval_words(subject: str, found: Mapping[str, Json]) -> str:
    """Return how sure the figures are: `5 runs and a warm-up: duration ±1.2 % at 95 %`."""
    widths = []
    for name, row in found.items():
        percent = 100 * (row["relative"] or 0)
        widths.append(f"{name.split('_')[0]} ±{percent:.1f} %")
    return f"{subject}: {', '.join(widths)} at 95 %"


@dataclass(frozen=True)
class _Case:
    """An encode to be judged: what was asked for, what was done, what was measured, and where."""

    settings: Settings
    made: Plan
    metrics: Json
    machine: Machine

    @property
    def encoder(self) -> Encoder:
        return ENCODERS[self.made.encoder]

    @property
    def speed(self) -> float | None:
        return self.metrics.get("speed")

    @property
    def cpu_percent(self) -> float | None:
        return self.metrics.get("cpu_usage")

    @property
    def doubts(self) -> list[str]:
        """Why the speed proves nothing."""
        if self.speed is None:
            return disturbances(self.metrics) or ["the speed is unknown"]
        return disturbances(self.metrics)

    @property
    def is_slow(self) -> bool:
        """Whether it did not keep up; a live encode may end late by FFmpeg's start."""
        if self.speed is None or self.speed >= REAL_TIME:
            return False
        if not self.settings.live:
            return True
        wall_s = self.metrics.get("duration") or 0.0
        film_s = self.metrics.get("output_seconds") or 0.0
        return wall_s - film_s >= LIVE_LATE_S

    @property
    def slowness(self) -> list[str]:
        work = "live" if self.settings.live else "encoding"
        preset = f" with preset {self.made.preset}" if self.made.preset else ""
        return [f"{work} at {self.speed:.2f}x real time{preset}"]

    @property
    def unused_hardware(self) -> str | None:
        """A proved hardware encoder that could do this very job, where it was not used."""
        if self.encoder.hardware or self.settings.two_pass:
            return None
        for name in self.machine.hardware(self.encoder.codec):
            row = ENCODERS[name]
            has_rate = self.settings.crf is None or row.crf is not None
            has_format = row.takes(self.settings.pixel_format or "yuv420p")
            if self.machine.is_proved(name) and has_rate and has_format:
                return name
        return None

    @property
    def faster_preset(self) -> str | None:
        """The next faster preset word; from a strange own word, such as placebo, the middle one."""
        own, presets = self.made.preset or "", self.encoder.presets
        if not own:
            return None
        faster = ["medium"]
        if own.isdigit():  # the higher the faster, for all encoders that count
            faster = [word for word, other in zip(PRESET_WORDS, presets) if int(other) > int(own)]
        elif own in presets:
            faster = list(PRESET_WORDS[:presets.index(own)])
        return faster[-1] if faster else None

    @property
    def same_preset(self) -> Json:
        """The preset that was used, to be named beside other threads: they would decide it anew."""
        if not self.made.preset:
            return {}
        # Several words may be one of the encoder's own; from behind, the fastest of them stays.
        words = dict(zip(self.encoder.presets[::-1], PRESET_WORDS[::-1]))
        return {"preset": words.get(self.made.preset, self.made.preset)}

    @property
    def wants_threads(self) -> bool:
        """Whether the job asked for few threads of a machine that was mostly idle."""
        asked, usage = self.settings.threads, self.cpu_percent
        if asked is None or usage is None or self.settings.live:
            return False
        return usage < MOSTLY_IDLE_PERCENT and asked < self.machine.threads // 2

    @property
    def busy_threads(self) -> float:
        """How many threads had work, in the mean."""
        wall_s = self.metrics.get("duration")
        return (self.metrics.get("cpu_seconds") or 0.0) / wall_s if wall_s else 0.0

    @property
    def enough_threads(self) -> int:
        return math.ceil(self.busy_threads) + 1

    @property
    def has_idle_threads(self) -> bool:
        if self.settings.live or not self.busy_threads:
            return False
        return 2 * self.enough_threads <= (self.made.threads or 0)

    @property
    def praise(self) -> list[str]:
        usage = "CPU use is unknown"
        if self.cpu_percent is not None:
            usage = f"{self.cpu_percent:.0f} % of the machine busy"
        return [f"{self.speed or 0.0:.2f}x real time", usage]


class Verdict(NamedTuple):
    """One rule of judging: a recommendation, when it applies, the reasons, the change."""

    recommendation: str
    applies: Callable[[_Case], bool]
    reasons: Callable[[_Case], list[str]]
    change: Callable[[_Case], Json] = lambda case: {}


# The first that applies is the verdict.
VERDICTS = (
    Verdict("check_input", lambda case: bool(case.metrics.get("damaged_packets")),
            lambda case: [f"FFmpeg logged damage {case.metrics['damaged_packets']} times"]),
    Verdict("hardware_encoder", lambda case: case.unused_hardware is not None,
            lambda case: [f"{case.unused_hardware} was proved on this machine"],
            lambda case: {"encoder": case.unused_hardware}),
    Verdict("not_enough_evidence", lambda case: bool(case.doubts), lambda case: case.doubts),
    Verdict("faster_preset", lambda case: case.is_slow and case.faster_preset is not None,
            lambda case: case.slowness, lambda case: {"preset": case.faster_preset}),
    Verdict("other_node", lambda case: case.is_slow, lambda case: case.slowness),
    Verdict("more_threads", lambda case: case.wants_threads,
            lambda case: [f"{case.cpu_percent:.0f} % of the machine was busy with "
                          f"{case.settings.threads} of {case.machine.threads} threads"],
            lambda case: {"threads": case.machine.threads, **case.same_preset}),
    Verdict("fewer_threads", lambda case: case.has_idle_threads,
            lambda case: [f"{case.busy_threads:.1f} of {case.made.threads} threads were busy"],
            lambda case: {"threads": case.enough_threads, **case.same_preset}),
    Verdict("optimal", lambda case: True, lambda case: case.praise),
)


def analyze(settings: Settings, made: Plan, metrics: Json, machine: Machine, given: Json) -> Json:
    """Return scenario, recommendation (a word of RECOMMENDATIONS), reasons and a suggestion.

    A suggestion is the job's own parameters, `given`, with a change, to be submitted as it is; None
    where there is none.
    """
    case = _Case(settings, made, metrics, machine)
    verdict = next(rule for rule in VERDICTS if rule.applies(case))  # the last one always does
    change = verdict.change(case)
    suggestion = None
    if change:
        suggestion = {"scenario": settings.scenario, "parameters": _changed(given, change)}
    return {"scenario": settings.scenario, "recommendation": verdict.recommendation,
            "reasons": verdict.reasons(case), "suggestion": suggestion}


def _changed(given: Json, change: Json) -> Json:
    """Return parameters with a change; the words of one encoder mean nothing to another."""
    kept = dict(given)
    if "encoder" in change:
        kept.pop("threads", None)  # hardware takes none
        has_presets = bool(ENCODERS[change["encoder"]].presets)
        if not has_presets or kept.get("preset") not in PRESET_WORDS:
            kept.pop("preset", None)
    return {**kept, **change}


def disturbances(metrics: Json) -> list[str]:
    """Return what makes a run's figures doubtful."""
    wall_s, background = metrics.get("duration"), metrics.get("background_cpu_percent")
    found = []
    if wall_s is not None and wall_s < SHORT_S:
        found.append(f"the run took only {wall_s:.1f} s")
    if background is not None and background > BACKGROUND_PERCENT:
        found.append(f"{background:.0f} % of the machine worked for others")
    if metrics.get("throttled"):
        found.append("the processor or GPU was slowed down by heat")
    return found


def result_of(attempt: Attempt, outcome: Outcome, machine: Machine, ended_at: float) -> Json:
    """Return the report of an attempt as the wire has it, but for the node's own fields.

    `ended_at` is in seconds since 1970.
    """
    settings, made = outcome.settings, outcome.plan
    result: Json = {
        "job_id": attempt.job_id, "attempt": attempt.number, "status": outcome.status,
        "completed_at": utc_text(ended_at), "error": outcome.error,
        "failure_reason": outcome.failure_reason}
    if made and settings:
        result["encode"] = _encode_json(settings, made, outcome.limits)
        result["output"] = settings.output or "none (encoded, measured, discarded)"
    # A failed attempt has metrics too: what it cost. One that was stopped proves nothing.
    if outcome.status in ("completed", "failed"):
        result["metrics"] = metrics_of(outcome)
        result.update(_history(outcome))
    if outcome.status == "completed" and made and settings:
        analysis = analyze(settings, made, result["metrics"], machine, attempt.parameters)
        result["analyzer_output"] = _whole_analysis(analysis, outcome, result)
    return result


def _encode_json(settings: Settings, made: Plan, limits: Mapping[str, str]) -> Json:
    """Return what was done, in the settings' own terms."""
    # `rate` is the rule that was used in the end: it takes the place of bitrate and crf.
    done = {
        **settings.to_json(),
        "width": made.width, "height": made.height, "fps": made.fps,
        "bitrate": None, "crf": None,
        "duration": made.duration_s}
    encode: Json = {
        "encoder": made.encoder, "preset": made.preset, "threads": made.threads,
        "width": made.width, "height": made.height,
        "pixel_format": made.pixel_format, "rate": made.rate, "reason": made.reason,
        "settings": f"{settings_text(done)} {made.rate}",
        "commands": [list(argv) for argv in made.passes]}
    if limits:
        encode["limits"] = dict(limits)
    return encode


def _whole_analysis(analysis: Json, outcome: Outcome, result: Json) -> Json:
    """Return an analysis with the doubts about the figures, and the confidence that was reached."""
    word, why = confidence_reached(outcome)
    found = analysis["reasons"]
    doubts = [words for words in disturbances(result["metrics"]) if words not in found]
    reasons = [*found, *doubts, *why]
    strays = sum(row["outlier"] for row in result["repeats"])
    if strays:
        reasons.append(f"{count_text(strays, 'run')} far from the others")
    runs = max(1, len(outcome.runs))
    return {**analysis, "reasons": reasons, "confidence": word, "runs": runs}


def _history(outcome: Outcome) -> Json:
    """Return the runs of an outcome, their statistics, and the samples of the last one."""
    ledger = outcome.ledger
    points = list(zip(*ledger.series.points)) or [(), (), ()]  # rows of points to columns
    series: Json = {"start": utc_text(ledger.started), "power_source": ledger.power_source}
    for name, column in zip(("seconds", "power_watts", "cpu_usage"), points):
        series[name] = [_rounded(value) for value in column]
    figures = {}
    for name, row in intervals_of(measured_runs(outcome.runs)).items():
        figures[name] = {key: _rounded(value) for key, value in row.items()}
    return {"repeats": _repeats_json(outcome.runs), "statistics": figures, "series": series}


def _repeats_json(runs: Sequence[Outcome]) -> list[Json]:
    """Return a row for each run; an outlier is one in time or, where all have it, in energy."""
    warm = len(runs) - len(measured_runs(runs))
    energies = [hwdetect.energy_of(run.ledger).joules for run in runs]
    strays = outliers([run.wall_s for run in runs[warm:]])
    known = [joules for joules in energies if joules is not None]
    if len(known) == len(runs):  # else the figures of some are compared with nothing
        by_energy = outliers(known[warm:])
        strays = [either or other for either, other in zip(strays, by_energy)]
    return [{"duration": _rounded(run.wall_s),
             "energy_joules": _rounded(joules),
             "cpu_usage": _rounded(_cpu_usage(run.ledger, run.wall_s)[0]),
             "warm_up": at < warm,
             "outlier": at >= warm and strays[at - warm]}
            for at, (run, joules) in enumerate(zip(runs, energies))]


# ---- 18 State ------------------------------------------------------------------------------------

# A report must survive a kill and a power cut between the end of an attempt and the master's
# answer: without it the work is done again. So it goes to the spool first, synchronised to the
# disk, and leaves it only when the master has judged it. Reports are numbered, not dated: a clock
# that is set back must not change their order.

SPOOL_NAME = re.compile(r"(\d{1,20})-")


class Spool:
    """Reports on disk, from before the first try until the master has judged them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        make_folder(folder)
        for path in folder.glob("*.tmp"):
            path.unlink()
        matches = [SPOOL_NAME.match(path.name) for path in folder.iterdir()]
        numbers = [int(match[1]) for match in matches if match]
        self._numbers = itertools.count(1 + max(numbers, default=0))

    def put(self, result: Json) -> None:
        """Write a report so that it survives a kill; raises OSError when the disk is full."""
        # Again, for a slot would wait for ever where somebody removed the folder.
        make_folder(self._folder)
        name = f"{next(self._numbers):020d}-{uuid.uuid4().hex[:8]}.json"
        write_json(self._folder / name, result)

    def entries(self) -> list[tuple[Path, Json]]:
        """Return the reports that wait, oldest first; unreadable ones are set aside."""
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
                key = {"job_id": result["job_id"], "attempt": result["attempt"]}
                found.append((path, {**key, **result}))
            except OSError:
                continue
            except (ValueError, KeyError, TypeError):
                self.set_aside(path)
        return found

    def set_aside(self, path: Path) -> Path:
        """Keep a report that cannot be delivered out of the way; return where."""
        return path.rename(path.with_suffix(".aside"))

    def waiting(self) -> list[tuple[str, int]]:
        """Return job and attempt of each report that waits."""
        return [(result["job_id"], result["attempt"]) for _, result in self.entries()]


class Identity(NamedTuple):
    """Who this node is: its id, which everybody may know, and the secret that proves it."""

    id: str
    secret: str


def new_identity() -> Identity:
    """Return the identity of a node that no master knows."""
    return Identity(str(uuid.uuid4()), secrets.token_hex(32))


def read_identity(path: Path) -> Identity | None:
    """Return the identity in a file, with a new secret if it has none; None without an id."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        node_id, secret = str(uuid.UUID(str(kept["id"]))), kept.get("secret")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(secret, str) or not secret:
        secret = new_identity().secret
    return Identity(node_id, secret)


class State:
    """A node's state folder: who it is, and the reports that the master has not judged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spool = Spool(folder / "spool")
        self.node_file = folder / "node.json"
        self.identity = read_identity(self.node_file)

    @property
    def node_id(self) -> str | None:
        """This node's id; None before its first registration."""
        return self.identity.id if self.identity else None

    def keep(self, identity: Identity) -> None:
        """Adopt an identity and write it to the disk, unless it is there already; OSError."""
        self.identity = identity
        if read_identity(self.node_file) != identity:
            write_json(self.node_file, identity._asdict())


def locked_folder(folder: Path, what: str) -> int:
    """Make a folder that is ours alone and lock it; return the descriptor that holds the lock.

    SystemExit with a sentence when another agent holds it or it cannot be used.
    """
    flag = f"--{what.replace(' folder', '').replace(' ', '-')}-dir"
    try:
        make_private_folder(folder)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "permission denied", str(folder))
    except BlockingIOError:
        raise SystemExit(f"agent: {what} {folder} is in use by another agent on this machine; "
                         f"give this one its own with {flag}") from None
    except OSError as error:
        raise SystemExit(f"agent: {what} {folder} cannot be used: {error_words(error)}; "
                         f"{flag} names another") from None
    return descriptor


# ---- 19 Session ----------------------------------------------------------------------------------

# The agent's talk with the master, in two threads: the poller steps a Session (registration, then
# one parked request after another), the reporter steps a Reporter (results, then progress). Each
# step makes its requests and returns how long to rest. A step never raises for a master that is
# away: work goes on, and the rests grow.
#
# A session is one start of an agent. The master listens to one session of a node only, so that an
# agent that was believed dead cannot report beside its successor; it answers 409 to any other, and
# that agent registers again. When the refusal comes even so, another start has taken over, and
# this one ends.
#
# The master judges at registration: `holding` lists the attempts that this node still runs or has
# in its spool; whatever it does not confirm was given to another node (a lost lease), and is
# stopped here.

BACKOFF_FIRST_S = 0.5
MAX_BACKOFF_S = 15.0  # a master that comes back has all of its nodes again within this
PROGRESS_S = 2.0  # unless the master says when it wants the next
PROGRESS_RANGE_S = (0.2, 60.0)  # whatever it says
LINES_A_REPORT = 500  # with MAX_LINE_CHARS at most 1 MB
PUBLISH_S = 10.0  # how long the master's permission to name an output counts, from its request
# Fields of refusals that concern the node, not the job: the poller registers again, or ends.
STRANGER = ("node_id", "session")
LEAST_WAIT = 0.75  # of the longest time that a request may be parked
MAX_HASTY = 5  # early, empty answers in a row: the master says that it parks and does not
HASTY_REST_S = 1.0
RETRY_S = 1.0  # while an attempt's own thread waits for a full disk
PERMIT_REST_S = 5.0  # the longest rest of one that waits for a master that is away
IDLE_PROGRESS_S = 60.0  # without attempts; an event wakes the reporter


@dataclass(frozen=True)
class Options:
    """The agent's flags, checked."""

    master: str
    register: bool
    poll_interval_s: float
    heartbeat_interval_s: float
    max_concurrent_jobs: int
    state_dir: Path
    work_dir: Path
    media_root: str | None
    name: str | None
    allow_address: tuple[str, ...]
    min_free_bytes: int = 0
    stall_limit_s: float = 300.0
    drain_limit_s: float = 30.0
    power_model: tuple[float, float] | None = None
    own_paths: bool = False


class Superseded(Exception):
    """A newer start of this node has taken over: this one ends."""


def own_failure(job_id: str, number: int, name: str, error: Exception) -> Json:
    """Return the report of an attempt that an error of the agent's own ended."""
    return {"job_id": job_id, "attempt": number, "status": "failed", "failure_reason": "agent",
            "error": f"the agent on {name} failed itself: {type(error).__name__}: {error}"}


class Rest(NamedTuple):
    """How long a loop rests, and whether an event (a slot is free, there is news) ends it early."""

    seconds: float = 0.0
    wakeable: bool = False


class Backoff:
    """Rests between tries, each at most twice as long as the one before.

    By full jitter: a switch that starts again brings thousands of agents back at one moment, and
    any part of a rest that is the same for all would keep them together.
    """

    def __init__(self) -> None:
        self._next_s = BACKOFF_FIRST_S

    def rest_s(self, error: ApiError, most_s: float = MAX_BACKOFF_S) -> float:
        """Return how long to rest after an error; the rest after that is longer.

        A pause that the server asks for is kept, up to `most_s`, and the crowd that it refused
        spreads over as long again.
        """
        pause_s = min(error.retry_after_s, most_s)
        rest_s = pause_s + random.uniform(0.0, max(pause_s, self._next_s))
        self._next_s = min(MAX_BACKOFF_S, most_s, self._next_s * 2)
        return rest_s

    def reset(self) -> None:
        """Begin anew: a try succeeded."""
        self._next_s = BACKOFF_FIRST_S


class Events:
    """What the agent's threads wait for."""

    def __init__(self) -> None:
        self.stopping = threading.Event()  # the agent ends
        self.leaving = threading.Event()  # it takes nothing more
        self.freed = threading.Event()  # an attempt has ended
        self.news = threading.Event()  # the reporter has something to send
        self.room = threading.Event()  # a slot is free, or will be in a moment: the poller may ask


class Slots(Protocol):
    """The attempts of this node, as its talk with the master sees them."""

    def attempts(self) -> list[Attempt]:
        """Return the attempts that run."""

    def has_room(self) -> bool:
        """Return whether another job may begin."""

    def will_have_room(self) -> bool:
        """Return whether a slot will be free in a moment; true once for each time."""

    def start(self, job: Job, asked: float) -> None:
        """Begin an attempt of a job that was claimed by a request of this moment (boot_clock)."""

    def abandon(self, lost: Iterable[Attempt]) -> None:
        """Stop attempts whose lease is lost."""

    def obey(self, answer: Answer) -> None:
        """Carry out the orders of an answer; twice is the same as once."""


class Link:
    """What an agent knows of its master, shared by the poller, the reporter and the attempts.

    There is no lock: each field is a single value that is written whole, and no reader needs two
    of them to agree.
    """

    def __init__(self, client: Client, state: State, name: str, log: logging.Logger,
                 clock: Callable[[], float] = boot_clock) -> None:
        self.clock = clock
        self.client = client
        self.state = state
        self.name = name
        self.log = log
        self.events = Events()
        self.session = uuid.uuid4().hex
        self.protocol: int | None = None  # None: a seed's master, or not registered yet
        self.node_timeout_s = 90.0
        self.seen = 0  # the number of the newest orders; the master answers early for newer ones
        self.reached = False  # has answered this start
        self.full = False  # the poller's request is parked, and no job will answer it
        self._away_since: float | None = None

    @property
    def node_id(self) -> str:
        """This node's id; "" before its first registration."""
        return self.state.node_id or ""

    @property
    def patience_s(self) -> float:
        """The longest time without a request: after three of them the node would be lost."""
        return self.node_timeout_s / 3

    def note_answer(self) -> None:
        """Note that the master answers."""
        self.reached = True
        # Taken in one step: poller and reporter may both have an answer.
        since, self._away_since = self._away_since, None
        if since is not None:
            away_s = time.monotonic() - since
            self.log.info("the master answers again after %s", duration_text(away_s))
            self.events.news.set()

    def note_silence(self, error: ApiError) -> None:
        """Note that the master is away or refuses this node; logged once."""
        if self._away_since is not None or self.events.stopping.is_set():
            return
        self._away_since = time.monotonic()
        advice = ""
        if error.field == "secret":
            advice = f" (to become a new node, remove {self.state.node_file})"
        self.log.warning("%s; work goes on, trying again until it answers%s", error.message, advice)


class Session:
    """Registers this node, then asks for work and orders: one request a step, by the poller."""

    def __init__(self, link: Link, options: Options, hardware: hwdetect.Hardware,
                 meter: hwdetect.Meter, slots: Slots) -> None:
        self._link = link
        self._options = options
        self._hardware = hardware
        self._meter = meter
        self._slots = slots
        self._backoff = Backoff()
        self._registered = False
        self._idle: hwdetect.Idle | None = None  # the baseline that the master knows
        self._beat_at = link.clock()  # the last heartbeat to a seed's master
        # A claim is safe to repeat: the same word gets the same job. A new word only after an
        # answer that used it up; else a copy of the request that is still on its way could get a
        # second job.
        self._claim_word = uuid.uuid4().hex
        self._hasty = 0

    def step(self, now: float) -> Rest:
        """Make one request at this moment (boot_clock); return how long to rest. Superseded."""
        try:
            if not self._registered or self._has_new_baseline():
                self._register()
                return Rest()
            rest = self._ask(now)
            self._backoff.reset()
            return rest
        except ApiError as error:
            return self._rest_after(error)

    def _has_new_baseline(self) -> bool:
        return bool(self._link.protocol) and self._meter.idle is not self._idle

    def _rest_after(self, error: ApiError) -> Rest:
        """Note a refusal or a silence; return how long to rest."""
        link = self._link
        if error.status in (404, 409) and self._registered:
            self._registered = False
            unknown = "node" if error.status == 404 else "session"
            link.log.warning("the master does not know this %s: registering again", unknown)
            if error.status == 404:
                return Rest()
        elif error.status == 409 and error.field == "session":
            raise Superseded(f"node {link.name} ends: {error.message}")
        else:
            link.note_silence(error)
            if error.status == 404:
                return Rest(MAX_BACKOFF_S)
        return Rest(self._backoff.rest_s(error, link.patience_s))

    def _register(self) -> None:
        link, state = self._link, self._link.state
        idle = self._meter.idle
        # Attempts first: one that ends meanwhile moves from there into the spool, and is seen
        # there.
        running = [attempt.key for attempt in self._slots.attempts()]
        holding = dict.fromkeys([*running, *state.spool.waiting()])
        identity = state.identity or new_identity()
        # On the disk before the master knows it: else a kill in between makes a second node.
        state.keep(identity)
        registered = self._introduce(self._registration(identity, holding), identity.secret)

        link.protocol = registered.protocol
        link.node_timeout_s = registered.node_timeout_s
        state.keep(identity._replace(id=registered.id or identity.id))
        # Last, for the reporter begins with it: without the session its reports would be refused.
        link.note_answer()
        self._idle = idle
        self._registered = True
        link.log.info("registered with %s as %s, node %s", link.client.url, link.name,
                      state.node_id)
        if link.protocol:
            self._slots.abandon(attempt for attempt in self._slots.attempts()
                                if attempt.key not in registered.holding)
        link.events.news.set()

    def _registration(self, identity: Identity, holding: Iterable[tuple[str, int]]) -> Json:
        name = self._link.name
        return {
            **self._hardware.to_json(),
            **self._meter.facts(),
            "id": identity.id,
            "secret_hash": hashlib.sha256(identity.secret.encode()).hexdigest(),
            "session": self._link.session,
            "protocol": PROTOCOL,
            "version": VERSION,
            "name": name,
            "address": self._hardware.address or name,
            "max_concurrent_jobs": self._options.max_concurrent_jobs,
            "holding": [{"job_id": job_id, "attempt": number} for job_id, number in holding],
        }

    def _introduce(self, body: Json, secret: str) -> Registered:
        """Register; return the master's answer. ApiError.

        The secret goes only to a master that asks for it, to keep another from taking the node's
        place with the id alone; a master of an earlier version would show it to everybody.
        """
        try:
            return self._link.client.register(body)
        except ApiError as error:
            if error.field != "secret":
                raise
        return self._link.client.register({**body, "secret": secret})

    def _ask(self, now: float) -> Rest:
        """Ask for work and orders."""
        leaving = self._link.events.leaving.is_set()
        free = not leaving and self._slots.has_room()
        if not self._link.protocol:
            return self._ask_seed(now, free)

        # No longer than the heartbeat interval: so asking again is the heartbeat.
        wait_s = min(self._options.heartbeat_interval_s, WAIT_MAX_S, self._link.patience_s)
        # A crowd that came at one moment must not do so again and again.
        wait_s = random.uniform(wait_s * LEAST_WAIT, wait_s)
        # Ahead only what no other node has taken: one that waits for work has a slot now.
        ahead = not leaving and not free and self._slots.will_have_room()
        if ahead:
            wait_s = 0.0
        answer = self._claim(wait_s) if free or ahead else self._heartbeat(leaving, wait_s)
        self._link.note_answer()
        self._link.log.debug("heartbeat: the master answers (%s)", "free" if free else "busy")
        if answer.job is not None:
            self._slots.start(answer.job, now)
        self._slots.obey(answer)  # after the start: an order may be for this very job
        return self._rest_between(answer, self._link.clock() - now, wait_s)

    def _claim(self, wait_s: float) -> Answer:
        query = {"session": self._link.session, "seen": self._link.seen,
                 "node_id": self._link.node_id, "claim": self._claim_word}
        answer = self._link.client.claim(query, wait_s)
        if answer.claim:
            self._claim_word = uuid.uuid4().hex
        return answer

    def _heartbeat(self, leaving: bool, wait_s: float) -> Answer:
        link = self._link
        body = {"session": link.session, "seen": link.seen, "leaving": leaving}
        link.full = True
        try:
            return link.client.heartbeat(link.node_id, body, wait_s)
        finally:
            link.full = False

    def _rest_between(self, answer: Answer, took_s: float, wait_s: float) -> Rest:
        """Return how long to rest after an answer: not at all, unless the master does not park."""
        if answer.job is None and not answer.orders and took_s < wait_s / 10:
            self._hasty += 1
        else:
            self._hasty = 0
        if self._hasty > MAX_HASTY:
            return Rest(min(HASTY_REST_S, wait_s / 10))
        return Rest()

    def _ask_seed(self, now: float, free: bool) -> Rest:
        """Talk to a master that parks no requests: heartbeats and polls by the clock."""
        options, client, node_id = self._options, self._link.client, self._link.node_id
        if now - self._beat_at >= options.heartbeat_interval_s:
            client.heartbeat(node_id, {})
            self._beat_at = now
            self._link.note_answer()
            self._link.log.debug("heartbeat: the master answers")
        if free:
            job = client.claim({"node_id": node_id}).job
            if job is not None:
                self._slots.start(job, now)
                return Rest()
        return Rest(min(options.poll_interval_s, options.heartbeat_interval_s), wakeable=True)

    def leave(self) -> bool:
        """Say that this node takes nothing more; return whether the master heard it.

        It answers the parked request empty, and takes the node offline when nothing runs on it.
        """
        if not self._link.protocol:
            return False
        with contextlib.suppress(ApiError):
            self._link.client.heartbeat(self._link.node_id,
                                        {"session": self._link.session, "leaving": True})
            return True
        return False


class Reporter:
    """Sends progress and empties the spool, a round of requests a step; for the reporter's thread.

    An attempt's own thread calls keep() and permit(), which wait as long as they must.
    """

    def __init__(self, link: Link, slots: Slots) -> None:
        self._link = link
        self._slots = slots
        self._backoff = Backoff()
        self._refused: set[Path] = set()  # logged already

    def step(self, now: float) -> Rest:
        """Send what there is at this moment (boot_clock); return how long to rest."""
        try:
            rest = Rest(PROGRESS_S, wakeable=True)
            if self._link.reached:
                self._wake_poller()
                self.deliver()
                rest = Rest(self._send_all_progress(now), wakeable=True)
            self._backoff.reset()
            return rest
        except ApiError as error:
            self._link.log.debug("report: %s", error.message)
            return Rest(self._backoff.rest_s(error, self._link.patience_s))

    def _wake_poller(self) -> None:
        """Have the poller ask again where there is room now. ApiError.

        Its request may be parked, for the node was full: a newer one of the node answers it.
        """
        link = self._link
        if not link.events.room.is_set():
            return
        link.events.room.clear()
        if link.protocol and link.full:
            body = {"session": link.session, "seen": link.seen}
            self._slots.obey(link.client.heartbeat(link.node_id, body))

    def deliver(self) -> None:
        """Send what the spool holds, oldest first; a report that was judged leaves it. ApiError."""
        for path, result in self._link.state.spool.entries():
            if result.get("node_id") not in (None, self._link.node_id):
                aside = self._link.state.spool.set_aside(path)
                self._link.log.warning("the result of job %s is of another node, which this folder "
                                       "was once; it is set aside as %s", result["job_id"], aside)
            elif self._send(path, result):
                path.unlink(missing_ok=True)
                self._link.note_answer()

    def _send(self, path: Path, result: Json) -> bool:
        """Send one report; return whether it was judged. ApiError where it is to be sent again."""
        link, job_id = self._link, result["job_id"]
        # With the session of this start: the result may be of an earlier one.
        if link.protocol:
            result = {**result, "session": link.session}
        try:
            link.client.report(result)
        except ApiError as error:
            if error.field in STRANGER or error.retryable:
                raise
            if error.status in (404, 409):
                link.log.warning("job %s attempt %s: result not taken: %s", job_id,
                                 result["attempt"], error.message)
                return True
            # It stays: a newer master may take it. The others must not wait for it.
            if path not in self._refused:
                link.log.error("job %s: the master refuses the result: %s", job_id, error.message)
            self._refused.add(path)
            return False
        link.log.info("job %s: result delivered (%s)", job_id, result["status"])
        return True

    def _send_all_progress(self, now: float) -> float:
        """Send the progress of all attempts; return in how many s the next is wanted. ApiError."""
        if not self._link.protocol:
            return PROGRESS_S
        # After its report, which may be delivered by now, progress would be that of no lease.
        waits = [
            self.send_progress(attempt, now) for attempt in self._slots.attempts()
            if not attempt.has_ended
        ]
        return min(waits, default=IDLE_PROGRESS_S)

    def send_progress(self, attempt: Attempt, now: float) -> float:
        """Send one attempt's progress; return in how many s the next is wanted. ApiError.

        An answer renews the lease, from the moment of the request.
        """
        first, lines = attempt.log.take(LINES_A_REPORT)
        samples = attempt.samples.take()
        try:
            answer = self._link.client.progress(
                attempt.job_id, self._progress_of(attempt, samples, first, lines))
        except ApiError as error:
            if error.status in (404, 409) and error.field not in STRANGER:
                self._slots.abandon([attempt])
                return PROGRESS_S
            raise

        self._link.note_answer()
        attempt.leased_at = max(attempt.leased_at, now)
        # A master that was started again learns only from this report which attempts are paused.
        self._slots.obey(answer)
        attempt.log.drop(first + len(lines))
        attempt.samples.drop(samples)
        if len(lines) == LINES_A_REPORT:
            return 0.0
        low, high = PROGRESS_RANGE_S
        return max(low, min(high, answer.next_s or PROGRESS_S))

    def _progress_of(self, attempt: Attempt, samples: list[Json], first: int,
                     lines: list[str]) -> Json:
        body: Json = {
            "node_id": self._link.node_id,
            "session": self._link.session,
            "attempt": attempt.number,
            "progress": {**attempt.progress, "paused": attempt.paused},
            "samples": samples,
            "lines": lines,
            "lines_from": first,
        }
        if attempt.published:
            body["published"] = attempt.published
        return body

    def keep(self, result: Json) -> None:
        """Put a report into the spool; waits while the disk is full."""
        link = self._link
        result = {**result, "node_id": link.node_id}
        logged = False
        while True:
            try:
                link.state.spool.put(result)
                link.events.news.set()
                return
            except OSError as error:
                if not logged:
                    link.log.error("the result of job %s cannot be kept in %s: %s; trying again",
                                   result["job_id"], link.state.folder, cause_text(error))
                logged = True
                if link.events.stopping.wait(RETRY_S):
                    return
            except (TypeError, ValueError) as error:
                # No JSON. Unreported, the attempt would hold its lease for ever.
                result = {"node_id": link.node_id,
                          **own_failure(result["job_id"], result["attempt"], link.name, error)}

    def permit(self, attempt: Attempt, output: OutputFile, made: Json) -> float | None:
        """Ask the master whether an attempt may name its output; `made` is the film's fingerprint.

        Return until when (boot_clock) it may, None when it may not. The master keeps the
        fingerprint: by it a later attempt recognises the film as the job's own, and replaces it.
        While the master is away, a film that has a mark, by which it is recognised too, may get
        its name as long as nobody else can have the job; any other waits.
        """
        link, backoff = self._link, Backoff()
        attempt.published = made
        while link.protocol and not attempt.stopping:
            try:
                self.send_progress(attempt, link.clock())
                # The lease lasts longer than the permission, so that both cannot end between the
                # last look at the clock and the call that gives the name.
                valid_s = min(PUBLISH_S, link.node_timeout_s / 2)
                return None if attempt.stopping else attempt.leased_at + valid_s
            except ApiError as error:
                sure_until = attempt.leased_at + link.node_timeout_s
                unknown = error.field in STRANGER
                if output.marked and not unknown and link.clock() < sure_until:
                    return sure_until
                if not self._rest(attempt, backoff.rest_s(error, PERMIT_REST_S)):
                    return None
        return None if link.protocol else math.inf

    def _rest(self, attempt: Attempt, seconds: float) -> bool:
        """Rest, in the thread of an attempt; return whether it still wants to go on."""
        until = time.monotonic() + seconds
        while not attempt.stopping:
            left_s = until - time.monotonic()
            if left_s <= 0:
                return True
            if self._link.events.stopping.wait(min(SLICE_S, left_s)):
                return False
        return False


# ---- 20 Agent ------------------------------------------------------------------------------------

LEAVE_S = 5.0  # for a master that answers slowly to hear that this node leaves
# Between two looks of the main thread: Python handles a signal only when that thread wakes.
LOOK_S = 0.1
HELP_S = 10.0  # for FFmpeg to print its options
# Orders that end an attempt, and the status that it ends with.
ENDING_ORDERS = {"cancel": "canceled", "return": "returned"}


class Agent:
    """One node of a fleet: its slots, and the threads that talk with the master.

    The main thread waits in run(); the poller steps the Session, the reporter the Reporter, and
    each attempt has a thread. The lock guards `_running` alone and is never held during I/O.
    """

    def __init__(self, options: Options, hardware: hwdetect.Hardware, host: hwdetect.Host,
                 log: logging.Logger) -> None:
        name = options.name or hardware.address or os.uname().nodename
        self._options = options
        self._log = log
        self._client = Client(options.master)
        self._place = workplace(options, hardware, host, name)
        self._link = Link(self._client, State(options.state_dir), name, log)
        self._events = self._link.events
        self._session = Session(self._link, options, hardware, self._place.meter, self)
        self._reporter = Reporter(self._link, self)
        self._lock = threading.Lock()
        self._running: dict[tuple[str, int], Attempt] = {}
        self._signals = 0
        self._over: str | None = None  # why this agent ends by itself

    def run(self) -> int:
        """Serve until stop() is called or the node is taken over; return the exit code."""
        threads = [_start_thread("poller", self._guarded, self._poll),
                   _start_thread("reporter", self._guarded, self._report)]
        while not self._signals and not self._events.stopping.wait(LOOK_S):
            pass
        if not self._over:
            self._drain()
        self._events.stopping.set()
        self._give_back(threads)
        if not self._over:
            return 0
        self._log.error("%s", self._over)
        return 1

    def stop(self) -> None:
        """Ask for the end; a second time for an end at once. Safe in a signal handler."""
        self._signals += 1

    def _guarded(self, loop: Callable[[], object]) -> None:
        """Run a thread of the agent; if it fails the agent ends, for without it the node hangs."""
        try:
            loop()
        except Superseded as error:
            self._over = str(error)
            self._events.stopping.set()
        except Exception as error:
            self._log.debug("the thread of %s ended", loop.__name__, exc_info=True)
            words = f"{type(error).__name__}: {error}"
            self._over = f"the agent ends after an error of its own: {words}"
            self._events.stopping.set()
        finally:
            self._client.close()

    def _poll(self) -> None:
        self._place.meter.rested.wait(hwdetect.IDLE_FIRST_S + 2)  # to register with idle power
        self._repeat(self._session.step, self._events.freed)

    def _report(self) -> None:
        self._repeat(self._reporter.step, self._events.news)

    def _repeat(self, step: Callable[[float], Rest], wake: threading.Event) -> None:
        """Step until the agent ends, with the rests that each step wants."""
        while not self._events.stopping.is_set():
            rest = step(boot_clock())
            if rest.wakeable:
                wake.wait(rest.seconds)
                wake.clear()
            else:
                self._events.stopping.wait(rest.seconds)

    def _drain(self) -> None:
        """Take nothing more and finish what runs, until the limit or a second signal."""
        self._events.leaving.set()
        for attempt in self.attempts():
            if attempt.slot.in_line:  # not begun: another node may have it
                attempt.stop("returned")
        limit_s = self._options.drain_limit_s
        count = len(self.attempts())
        if count and limit_s:
            self._log.info("finishing %s, for at most %s; a second signal gives %s back at once",
                           count_text(count, "job"), duration_text(limit_s),
                           "it" if count == 1 else "them")
            # In a thread: the master may be slow, and a second signal must be seen.
            _start_thread("leaving", self._guarded, self._session.leave)
        until = time.monotonic() + limit_s
        while self.attempts() and self._signals < 2 and time.monotonic() < until:
            if self._events.stopping.wait(LOOK_S):
                return

    def _give_back(self, threads: Sequence[threading.Thread]) -> None:
        """Stop what runs, say that it is given back and that this node leaves; bounded in time."""
        until = time.monotonic() + 2 * LEAVE_S
        attempts = self.attempts()
        # A node that was taken over has nothing left to report.
        word = "lost" if self._over else "returned"
        for attempt in attempts:
            attempt.stop(word)
        self._client.patience_s = LEAVE_S
        reached = not self._over and self._session.leave()

        self._events.news.set()
        self._events.freed.set()
        # The poller may just have been handed a job.
        for thread in threads:
            left_s = until - time.monotonic()
            thread.join(max(0.0, min(1.0, left_s)))
        while self.attempts() and time.monotonic() < until:
            self._events.freed.wait(LOOK_S)
            self._events.freed.clear()

        if reached:
            with contextlib.suppress(ApiError):
                self._reporter.deliver()
                self._log.info("left the fleet; %s given back", count_text(len(attempts), "job"))
        self._client.close()

    def attempts(self) -> list[Attempt]:
        """Return the attempts that run."""
        with self._lock:
            return list(self._running.values())

    def has_room(self) -> bool:
        """Return whether another job may begin.

        An attempt that only finishes needs no slot; but where many do, the master is away or the
        disk is slow, and more work would pile up.
        """
        attempts = self.attempts()
        slots = self._options.max_concurrent_jobs
        wanting = sum(attempt.slot.wanted for attempt in attempts)
        return wanting < slots and len(attempts) < 2 * slots

    def will_have_room(self) -> bool:
        """Return whether a slot will be free in a moment; true once for each time."""
        wanting = [attempt for attempt in self.attempts() if attempt.slot.wanted]
        if len(wanting) > self._options.max_concurrent_jobs:
            return False  # one waits for it
        for attempt in wanting:
            if attempt.slot.ends_soon and not attempt.paused:
                attempt.slot.ends_soon = False
                return True
        return False

    def _slot_changed(self) -> None:
        """Have the poller ask for a job, by way of the reporter where it is parked."""
        self._events.freed.set()
        ending = any(attempt.slot.ends_soon for attempt in self.attempts())
        if ending or self.has_room():
            self._events.room.set()
            self._events.news.set()

    def start(self, job: Job, asked: float) -> None:
        """Begin an attempt of a job that was claimed by a request of this moment (boot_clock)."""
        attempt = Attempt(job, self._place,
                          lambda output, made: self._reporter.permit(attempt, output, made),
                          self._slot_changed)
        attempt.leased_at = asked
        with self._lock:
            if attempt.key in self._running:
                return  # the claim was repeated
            self._running[attempt.key] = attempt
        if self._events.leaving.is_set():
            # The claim crossed with the word that this node takes nothing more.
            attempt.stop("returned")
        self._log.info("job %s attempt %d: %s begins", *attempt.key, job.scenario)
        _start_thread(f"job-{job.id[:8]}", self._work, attempt)
        # The master wants to hear at once that the attempt has begun.
        self._events.news.set()

    def _work(self, attempt: Attempt) -> None:
        """Carry out an attempt and put its report into the spool before it leaves `_running`."""
        outcome, result = carry_out(attempt, self._place.machine, self._log)
        attempt.has_ended = True
        # Another node has the job of a lost attempt: a report of it would be refused.
        if outcome.status != "lost":
            self._reporter.keep(_with_leftovers(attempt, result))
        # In this order a registration in between finds it here or in the spool.
        with self._lock:
            self._running.pop(attempt.key, None)
        words = f": {outcome.error}" if outcome.error else ""
        self._log.info("job %s attempt %d: %s%s", *attempt.key, outcome.status, words)
        self._events.freed.set()
        self._events.news.set()

    def abandon(self, lost: Iterable[Attempt]) -> None:
        """Stop attempts whose lease is lost."""
        for attempt in lost:
            self._log.warning("job %s attempt %d: the master gave it to another node or ended it",
                              *attempt.key)
            attempt.stop("lost")

    def obey(self, answer: Answer) -> None:
        """Carry out the orders of an answer; twice is the same as once."""
        if answer.seen is not None:
            self._link.seen = answer.seen
        for order in answer.orders:
            key = (order.job_id, order.attempt)
            with self._lock:
                attempt = self._running.get(key)
            # By job and number: an order for an earlier attempt must not end a later one.
            if attempt is None:
                self._refuse(order)
            elif order.action in ENDING_ORDERS:
                attempt.stop(ENDING_ORDERS[order.action])
            else:
                self._pause_or_resume(attempt, order.action)

    def _refuse(self, order: Order) -> None:
        """Report an attempt that is not here as ended, unless its report is on its way."""
        status = ENDING_ORDERS.get(order.action)
        if status is None:
            return
        waiting = self._link.state.spool.waiting()
        if (order.job_id, order.attempt) not in waiting:
            self._reporter.keep({
                "job_id": order.job_id,
                "attempt": order.attempt,
                "status": status,
                "error": "this node does not hold the job",
            })

    def _pause_or_resume(self, attempt: Attempt, action: str) -> None:
        before = attempt.paused
        if action == "pause":
            attempt.pause()
        elif action == "resume":
            attempt.resume()
        if attempt.paused != before:
            self._events.news.set()


def _start_thread(name: str, target: Callable[..., object], *args: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    return thread


def _with_leftovers(attempt: Attempt, result: Json) -> Json:
    """Return a report with the log lines and readings that no progress has sent."""
    first, lines = attempt.log.take(MAX_LOG_LINES)
    report = dict(result)
    report["lines"] = lines
    report["lines_from"] = first
    report["samples"] = attempt.samples.take()
    if attempt.published:
        report["published"] = attempt.published
    return report


def carry_out(attempt: Attempt, machine: Machine, log: logging.Logger) -> tuple[Outcome, Json]:
    """Run an attempt; return its outcome and its report, of an error of the agent's own too."""
    try:
        outcome = attempt.run()
        return outcome, result_of(attempt, outcome, machine, time.time())
    except Exception as error:
        # Unreported, the attempt would hold its lease for ever.
        log.debug("job %s", attempt.job_id, exc_info=True)
        failure = own_failure(attempt.job_id, attempt.number, machine.name, error)
        return Outcome("failed"), failure


def workplace(options: Options, hardware: hwdetect.Hardware, host: hwdetect.Host,
              name: str) -> Workplace:
    """Return what attempts on this node share."""
    ffmpeg = hardware.ffmpeg or "ffmpeg"
    http_args: tuple[str, ...] = ()
    if hardware.ffmpeg:
        http_args = http_args_of(host, ffmpeg)
    threads = hardware.cpu_threads or os.cpu_count() or 1
    machine = Machine(name, ffmpeg, threads, options.max_concurrent_jobs,
                      hardware.encoders, hardware.vaapi_device or Machine.vaapi_device,
                      rate_mode_of(hardware.ffmpeg_version), http_args)
    meter = hwdetect.Meter(host, hardware, options.power_model)
    places = Places(name, options.media_root, options.allow_address, options.own_paths)
    return Workplace(machine, hardware.ffprobe or "ffprobe", host, meter, options.work_dir, places,
                     hardware.filters, options.min_free_bytes, options.stall_limit_s,
                     FreeSlots(options.max_concurrent_jobs))


def http_args_of(host: hwdetect.Host, ffmpeg: str) -> tuple[str, ...]:
    """Return what keeps FFmpeg from following redirects; before 5.1 it has no such option."""
    options = host.run([ffmpeg, "-hide_banner", "-h", "protocol=http"], HELP_S).stdout
    if "max_redirects" in options:
        return ("-max_redirects", "0")
    return ()


# ---- 21 CLI --------------------------------------------------------------------------------------

MAX_NAME_CHARS = 200

# Each flag has an environment variable, FFDIST_ and its name. The default is in brackets at the end
# of the help.
COMMON_FLAGS = (
    Flag("--max-concurrent-jobs", "1", whole_number(1, 256), "jobs to run side by side (1)"),
    Flag("--state-dir", None, Path,
         "folder of this node's identity and spool (~/.local/state/ffdist/agent)"),
    Flag("--work-dir", None, Path, "folder of temporary files (work/ in the state folder)"),
    Flag("--media-root", None, str,
         "inputs and outputs lie under this folder (where it is started, unless that is a home "
         "folder or the agent's own)"),
    Flag("--name", None, str, "the node's name (the host name)"),
    Flag("--allow-address", "", str,
         "loopback or link-local addresses that jobs may open, comma-separated"),
    Flag("--min-free", "64M", size_bytes,
         "bytes that a job's file systems must keep free (64M; 0: any)"),
    Flag("--stall-limit", "5m", seconds,
         "longest time without a new frame; slow encoders get more (5m)"),
    Flag("--power-model", None, power_model,
         "W idle,W busy: estimate power by CPU use where nothing can be read (none)"),
    Flag("--log-level", "info", one_of("debug", "info", "warning", "error"),
         "debug, info, warning or error"),
    Flag("--log-format", "text", one_of("text", "json"), "text or json"),
)
AGENT_FLAGS = (
    Flag("--master", "http://localhost:8080", str, "the master's address (http://localhost:8080)"),
    Flag("--register", False, None, "register this machine as a node of the master"),
    Flag("--poll-interval", "10s", seconds,
         "how often to ask a master that cannot park requests (10s)"),
    Flag("--heartbeat-interval", "30s", seconds, "longest silence towards the master (30s)"),
    Flag("--drain-limit", "30s", functools.partial(seconds, none=True),
         "how long to go on with jobs after SIGTERM before they are given back (30s)"),
    Flag("--allow-master-as-worker", False, None, "work on the master's own machine (development)"),
    Flag("--yes", False, None, "answer the question of --allow-master-as-worker"),
    Flag("--yes-home", False, None,
         "let --media-root be a home folder, or one with the agent's own files"),
    Flag("--no-probe", False, None, "do not prove the encoders by encoding a frame each"),
)
RUN_FLAGS = (
    Flag("--input", None, str, "film or URL (a generated source)"),
    Flag("--output", None, str, "file or URL (encoded, measured, discarded)"),
    Flag("--overwrite", False, None, "replace an output that exists"),
    Flag("--confidence", "auto", one_of(*CONFIDENCES),
         "auto, low, medium or high: how often to repeat"),
    Flag("--json", False, None, "print the result as JSON"),
    Flag("--no-probe", False, None, "do not prove the encoders by encoding a frame each"),
)
ABOUT = """The ffdist agent: registers with a master, runs its jobs, measures and reports.
`agent.py run --help` explains how to run one job without a master."""
ABOUT_RUN = "Run one job on this machine, without a master."
EPILOG = """examples:
  python3 agent.py --register --master http://192.168.1.100:8080 --media-root /srv/films
  python3 agent.py --register --allow-master-as-worker --yes  # beside a master
  python3 agent.py run 720p30-h264 -p duration=5              # without a master
  python3 agent.py run --input film.mov --output film.mp4 -p crf=21
"""
# What `run` has no flags for: nobody is asked, and nothing is drained.
RUN_DEFAULTS: Json = {
    "master": "", "register": False, "poll_interval": 10.0, "heartbeat_interval": 30.0,
    "drain_limit": 0.0,
}


def build_parser(run: bool) -> argparse.ArgumentParser:
    """Return the parser of `agent.py`, or of `agent.py run`."""
    return _run_parser() if run else _agent_parser()


def _agent_parser() -> argparse.ArgumentParser:
    parser = _parser("agent.py", ABOUT)
    parser.words = ("run",)
    add_flags(parser, (*COMMON_FLAGS, *AGENT_FLAGS))
    return parser


def _run_parser() -> argparse.ArgumentParser:
    parser = _parser("agent.py run", ABOUT_RUN)
    parser.add_argument("scenario", nargs="?", default="transcode",
                        help="such as 1080p30-h264 (transcode)")
    parser.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE",
                        help="a parameter, such as -p bitrate=5M; may be repeated")
    parser.add_argument("-o", dest="output_short", metavar="OUTPUT", help="short for --output")
    parser.set_defaults(**RUN_DEFAULTS)
    add_flags(parser, (*COMMON_FLAGS, *RUN_FLAGS))
    return parser


def _parser(program: str, about: str) -> Parser:
    parser = Parser(program, description=about, epilog=EPILOG,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"ffdist agent {VERSION}")
    return parser


def _options(args: argparse.Namespace) -> Options:
    """Return the flags, checked; the media root is not decided yet."""
    # Absolute, for FFmpeg runs in another folder.
    state = Path(args.state_dir or state_home() / "agent").absolute()
    work = Path(args.work_dir or state / "work").absolute()
    if args.name is not None and not _is_name(args.name):
        raise ValueError(f"invalid --name: expected 1 to {MAX_NAME_CHARS} printable characters")
    addresses = (entry.strip() for entry in args.allow_address.split(","))
    return Options(
        master=args.master, register=args.register,
        poll_interval_s=args.poll_interval, heartbeat_interval_s=args.heartbeat_interval,
        max_concurrent_jobs=args.max_concurrent_jobs,
        state_dir=state, work_dir=work, media_root=None, name=args.name,
        allow_address=tuple(filter(None, addresses)),
        min_free_bytes=args.min_free, stall_limit_s=args.stall_limit,
        drain_limit_s=args.drain_limit, power_model=args.power_model)


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME_CHARS and name.isprintable()


def _folder(path: str) -> str:
    """Return the absolute path of a media root; ValueError where it is not a folder."""
    root = os.path.abspath(path)
    if not os.path.isdir(root):
        raise ValueError(f"--media-root {root} is not a folder")
    return root


def _media_root(args: argparse.Namespace, options: Options) -> tuple[str | None, str]:
    """Return the media root and "", or None and why the folder of the start is unsafe.

    Strangers name what an agent opens; in a home folder that would be keys and start-up files.
    ValueError where a folder that was named is unsafe.
    """
    root = _folder(args.media_root or os.getcwd())
    beside = os.path.join(os.path.dirname(__file__), "hwdetect.py")
    # A job that could write there could replace the agent's program, or read its secret.
    own = [__file__, beside, str(options.state_dir), str(options.work_dir)]
    # A home folder may be reached by a bind mount, under another path.
    homes = [root if _is_same_folder(home, root) else home for home in home_folders()]
    real = os.path.realpath
    why = why_unsafe(real(root), map(real, homes), [real(path) for path in own])
    if not why:
        return root, ""
    if not args.media_root:
        return None, f"{root} {why}"
    if args.yes_home:
        return root, ""
    raise ValueError(f"--media-root {root} {why}: name the films' own folder, or add --yes-home")


def _is_same_folder(one: str, other: str) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return False


def _may_work_here(args: argparse.Namespace, client: Client) -> str | None:
    """Return why this machine may not be a worker of its own master, or None when it may."""
    # By its addresses, not by its name: a machine has several names.
    if not is_this_machine(client.host):
        return None
    if not args.allow_master_as_worker:
        return (f"the master at {client.url} is on this machine, and the two would compete for its "
                "resources; for development, add --allow-master-as-worker")
    print("Warning: master and worker on one machine compete for its resources; figures will "
          "suffer. For development only.", file=sys.stderr, flush=True)
    if args.yes:
        return None
    if not sys.stdin or not sys.stdin.isatty():
        return "there is no terminal to confirm on: add --yes to work beside the master"
    print("Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return None
    return "not confirmed"


def serve(args: argparse.Namespace) -> int:
    """Be a node of a fleet until stopped; return the exit code."""
    log = setup_logging(args.log_level, args.log_format, "ffdist.agent")
    options = _options(args)
    root, why = _media_root(args, options)
    options = dataclasses.replace(options, media_root=root)
    refusal = _may_work_here(args, Client(options.master))
    if refusal:
        print(f"agent: {refusal}", file=sys.stderr)
        return 2

    # One agent a folder: two would send each other's reports and clear each other's work.
    held = [locked_folder(options.state_dir, "state folder"),
            locked_folder(options.work_dir, "work folder")]
    if not options.register and read_identity(options.state_dir / "node.json") is None:
        print(f"agent: {options.state_dir} remembers no node of this machine: add --register",
              file=sys.stderr)
        return 1
    if root is None:
        log.warning("this agent opens no paths until it gets --media-root DIR, for %s; URLs and "
                    "generated sources work", why)
    agent = _prepare_agent(args, options, log)
    # Only from here on: until now a signal may end this process as it is.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    code = agent.run()
    # Not before everything is over: another agent would clear the work of this one.
    for descriptor in held:
        os.close(descriptor)
    return code


def _prepare_agent(args: argparse.Namespace, options: Options, log: logging.Logger) -> Agent:
    """Clear what an earlier start left, look at the machine, and return its agent."""
    host = hwdetect.Host()
    cleared = clear_work(options.work_dir, host)
    if cleared:
        log.warning("cleared what an earlier run left of %s", count_text(cleared, "attempt"))
    trying = "" if args.no_probe else " and trying its encoders"
    log.info("looking at this machine%s", trying)
    hardware = hwdetect.detect(host, not args.no_probe, str(options.state_dir))
    if not hardware.ffmpeg:
        log.warning("ffmpeg is not on PATH: every job will fail here until it is installed")
    return Agent(options, hardware, host, log)


def run_here(args: argparse.Namespace) -> int:
    """Run one job on this machine, without a master; progress on stderr, the result on stdout."""
    # A handler only notes its signal; _run_and_print() obeys it.
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: signals.append(received))
    parameters = _own_parameters(args)
    job = Job(str(uuid.uuid4()), 1, args.scenario, parameters, args.confidence)
    settings = resolve(job.scenario, parameters, own_paths=True)
    root = _folder(args.media_root or "/")
    if settings.output and not settings.overwrite and os.path.lexists(settings.output):
        raise ValueError(f"output {settings.output} exists: name another file, or add --overwrite")

    if args.work_dir is not None:
        # Another owner of the folder could exchange what is made in it.
        make_private_folder(args.work_dir)
    # A folder of this run alone: it may run beside an agent, or another run.
    args.work_dir = tempfile.mkdtemp(prefix="ffdist-run-", dir=args.work_dir)
    try:
        # This shell may open anything already, so nothing is refused to its job.
        options = dataclasses.replace(_options(args), media_root=root, own_paths=True,
                                      allow_address=("0.0.0.0/0", "::/0"))
        return _run_and_print(args, job, options, signals)
    finally:
        shutil.rmtree(args.work_dir, ignore_errors=True)


def _own_parameters(args: argparse.Namespace) -> Json:
    """Return the parameters of a job of this shell's own, with its paths made absolute."""
    parameters = dict(parameters_of(args.parameters))
    if args.overwrite:
        parameters["overwrite"] = True
    if args.input:
        parameters["input"] = _own_place(args.input, os.path.realpath)
    output = args.output_short or args.output
    if output:
        parameters["output"] = _own_place(output, _real_folder)
    return parameters


def _own_place(place: str, real: Callable[[str], str]) -> str:
    """Return a URL as it is, or a path without links, which are not followed under a media root."""
    if scheme_of(place):
        return place
    return real(os.path.abspath(place))


def _real_folder(path: str) -> str:
    """Return a path whose folder is without links; a link as the output itself is refused later."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _run_and_print(args: argparse.Namespace, job: Job, options: Options, signals: list[int]) -> int:
    """Run the job, draw its progress and print its result; return the exit code."""
    log = setup_logging("warning", args.log_format, "ffdist.agent")
    host = hwdetect.Host()
    print("looking at this machine …", file=sys.stderr)
    hardware = hwdetect.detect(host, not args.no_probe, str(options.state_dir))
    name = options.name or hardware.address or "this machine"
    place = workplace(options, hardware, host, name)
    # For the idle share of the energy.
    place.meter.rested.wait(hwdetect.IDLE_FIRST_S + 2)
    attempt = Attempt(job, place)
    results: list[Json] = []

    def work() -> None:
        results.append(carry_out(attempt, place.machine, log)[1])
    # In a thread, for Python handles signals in the main one.
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    bar = ProgressLine()
    while worker.is_alive():
        worker.join(0.2)
        bar.show(progress_text(attempt.progress, bar.room()))
        if signals:
            attempt.stop("canceled")
    bar.close()

    if signals and results[0]["status"] == "canceled":
        print("agent: stopped; nothing is left of it", file=sys.stderr)
        return 130 if signals[0] == signal.SIGINT else 1
    return _print_result(args, results[0])


def _print_result(args: argparse.Namespace, result: Json) -> int:
    completed = result["status"] == "completed"
    if args.json:
        write_stdout(json.dumps(result, indent=2) + "\n")
    elif completed:
        # 100 columns where stdout is not a terminal.
        width = shutil.get_terminal_size((100, 24)).columns
        write_stdout(table_text(result_rows(result), width) + "\n")
    else:
        error = printable(result["error"] or "")
        print(f"agent: the job {result['status']}: {error}", file=sys.stderr)
    return 0 if completed else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    run = words[:1] == ["run"]
    try:
        if run:
            # Before the encode, whose result would be lost; an agent prints nothing.
            hwdetect.check_stdout()
        open_output()
        if run:
            code = run_here(build_parser(True).parse_args(words[1:]))
        else:
            code = serve(build_parser(False).parse_args(words))
        # Here, not at the end of Python, a reader that went away is noticed in time.
        write_stdout()
        return code
    except BrokenPipeError:
        return 0
    except (ValueError, ApiError) as error:
        print(f"agent: {printable(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or "this machine"
        print(printable(f"agent: {where}: {cause_text(error)}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        close_output()


if __name__ == "__main__":
    sys.exit(main())
