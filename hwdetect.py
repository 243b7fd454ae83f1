#!/usr/bin/env python3
"""Print what this machine really is, and what power it draws while it works.

It reads /proc, /sys and the text of nvidia-smi, and tries each encoder of FFmpeg on a real frame,
since many that are listed do not work. It knows Linux; elsewhere it answers with less. The agent
imports it for everything that it knows of its machine, and all three files share section Common.

It promises an answer on any machine: a value that cannot be read is null with a reason under
`unknown`, and a detector that fails is named under `problems`. It does not promise figures that the
kernel does not give: virtual machines have no energy counters, and an estimate is never passed off
as a reading.

How a fact comes about: Host reads a file and returns its text, or None and why not. A parser turns
the text into a value. A detector combines values into the fields of Hardware. The table DETECTORS
lists them all, and detect() runs it.

How a power comes about: each PowerSource owns its previous counters and returns the joules since
the start. The table MACHINE_SOURCES lists them, the best first, and the first that answers is used.
So a new source of power is a class in section Power and a row in that table; a new kind of GPU is a
class of GpuSource in section Graphics and a line in GraphicsPower. Sampler takes a reading of all,
and a Meter books what each run used into its Ledger.

Sections (each uses only those above it):
    1 Common     what all three files share: printable text, times, durations, sizes, errors, flags
    2 Facts      dataclasses with units, vendor tables with their kernel document
    3 Host       the only file and program access: one bounded read, None instead of an exception
    4 Archive    what detection reads, written into one text, and unpacked again
    5 Parsers    text to value, pure
    6 Machine    detectors of the name, the processor, memory, control groups, virtual machines
    7 Devices    detectors of GPUs, energy counters, sensors, batteries, disks
    8 Probe      FFmpeg, and its encoders proved by a frame
    9 Detectors  the table of detectors; each isolated, its failure recorded, never fatal
    10 Power     the table of the machine's power sources: counters, meters, batteries, a model
    11 Graphics  power and load of GPUs: nvidia-smi, sysfs
    12 Sampler   sample(now) returns rates, and joules since the start; process groups
    13 Ledger    what each run used, the idle baseline, shares by CPU time
    14 Groups    control groups, and what the processes of a run may use
    15 CLI       the page, --json, --root, --no-probe, --record, --watch

Threads: one gathers the lines of nvidia-smi (Stream), one is the Meter's, which owns its sampler,
and three belong to each Program of a run. There are no locks: queues and events pass things on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import errno
import functools
import json
import math
import os
import queue
import random
import re
import resource
import shutil
import signal
import stat
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Callable, ClassVar, NamedTuple, NoReturn, Optional, TypeVar

if sys.hexversion < 0x3090000:  # the other two files import this one first
    sys.exit("ffdist needs Python 3.9 or newer; this is " + sys.version.split()[0])

# ---- 1 Common ------------------------------------------------------------------------------------

VERSION = "1.0.0"
MINUTE_S = 60
HOUR_S = 3600
DAY_S = 86400
MAX_FLAG_S = 30 * DAY_S  # of a duration on the command line: a longer one is a slip

Json = dict[str, Any]


def printable(text: object) -> str:
    """Return text that cannot steer a terminal: each character that is not printable becomes `?`.

    Unicode counts controls (C0, C1, and with them ANSI and OSC sequences), bidirectional overrides,
    line separators and surrogates as not printable.
    """
    words = str(text)
    if words.isprintable():
        return words
    chars = [char if char.isprintable() else "?" for char in words]
    return "".join(chars)


def text_of(data: bytes) -> str:
    """Decode what a file or a program gave; bytes that are not UTF-8 become U+FFFD."""
    return data.decode("utf-8", "replace")


def utc_text(epoch_s: float | None) -> str | None:
    """Return an RFC 3339 time in UTC with milliseconds, ending in Z (None for None)."""
    # Cut, not rounded, so that a time never lies ahead of its event.
    if epoch_s is None:
        return None
    whole, milli = divmod(int(epoch_s * 1000), 1000)
    return f"{_second_text(whole)}.{milli:03d}Z"


# The many times of one second share their text.
@functools.lru_cache(maxsize=1024)
def _second_text(whole: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))


# Each unit once, the largest first. A bare number is seconds, so it may only be the last ("1m30").
# Milliseconds are missing: whole seconds rule a fleet, and only interval() is for less.
_UNITS = {
    "d": DAY_S,
    "h": HOUR_S,
    "m": MINUTE_S,
    r"(?:s|\Z)": 1.0,
}
# Bounded, for float() of a thousand digits is infinite.
_NUMBER = r"[0-9]{1,9}(?:\.[0-9]{1,9})?"
_PARTS = [rf"(?:({_NUMBER}){unit})?" for unit in _UNITS]
_DURATION = re.compile("".join(_PARTS))


def parse_duration(text: str) -> float:
    """Return the seconds of `10s`, `0.5s`, `1m30s`, `2h`, `90d` or `1.5`; ValueError otherwise."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        raise ValueError(f"invalid duration '{text}': expected 10s, 0.5s, 1m30s or plain seconds")
    total_s = 0.0
    for count, unit_s in zip(match.groups(), _UNITS.values()):
        total_s += float(count or 0) * unit_s
    return total_s


def duration_text(seconds: float | None) -> str:
    """Return seconds for people: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`, `3 d 4 h`."""
    if seconds is None:
        return "unknown"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < MINUTE_S:
        return f"{whole} s"
    if whole < HOUR_S:
        return f"{whole // MINUTE_S} min {whole % MINUTE_S:02d} s"
    if whole < DAY_S:
        return f"{whole // HOUR_S} h {whole % HOUR_S // MINUTE_S:02d} min"
    return f"{whole // DAY_S} d {whole % DAY_S // HOUR_S} h"


def size_text(size_bytes: float | None) -> str:
    """Return bytes for people, in powers of 1024: `812 B`, `3.4 MiB`."""
    if size_bytes is None:
        return "unknown"
    size = float(size_bytes)
    if abs(size) < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if abs(size) < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def count_text(count: int | None, what: str) -> str:
    """Return a number of things for people: `1 job`, `2 jobs`, `? jobs`."""
    if count == 1:
        return f"1 {what}"
    return f"{'?' if count is None else count} {what}s"


def cause_text(reason: object) -> str:
    """Return an error in a few words: the operating system's `strerror`, or else its text."""
    # Python raises it for timeouts of its own too, without a strerror.
    if isinstance(reason, TimeoutError):
        return "timed out"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return str(reason) or type(reason).__name__


def error_words(error: Exception) -> str:
    """Return the cause of an error for the middle of a sentence: "permission denied"."""
    words = cause_text(error)
    return words[0].lower() + words[1:]


class Flag(NamedTuple):
    """One command-line flag; `kind` reads its value, and None means that it takes none.

    Its environment variable is FFDIST_ and its name in capitals. Its value is the default, and a
    flag on the line beats it. An empty variable counts as one that is not set.
    """

    name: str
    default: Any
    kind: Callable[[str], Any] | None
    about: str
    value: str = ""  # what the help calls its value; else its name in capitals

    @property
    def variable(self) -> str:
        """Return its environment variable."""
        return f"FFDIST_{self._capitals}"

    @property
    def metavar(self) -> str:
        """Return what the help calls its value."""
        return self.value or self._capitals

    @property
    def _capitals(self) -> str:
        return self.name.lstrip("-").replace("-", "_").upper()

    @property
    def setting(self) -> Any:
        """Return the text of its environment variable, else its default.

        This is the one place that reads the environment for flags.
        """
        return os.environ.get(self.variable) or self.default


class Parser(argparse.ArgumentParser):
    """A parser that refuses what it does not know, and asks whether a word like it was meant."""

    words: Iterable[str] = ()  # known beside its flags, such as subcommands

    # argparse lets a subcommand's parser pass unknown words on, which only the outer one then
    # refuses, with its own usage.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found, left

    def error(self, message: str) -> NoReturn:
        # argparse has no hook for this: the wrong word is only in its message.
        wrong = re.search(r"(?:choice: |arguments: )'?([\w-]+)", message)
        if wrong is not None:
            flags = re.findall(r"--?\w[\w-]*", self.format_usage())
            near = difflib.get_close_matches(wrong[1], [*self.words, *flags], 1)
            for word in near:
                message += f"; did you mean {word}?"
        flag = re.fullmatch(r"argument (?:\S+/)?(--[\w-]+): expected one argument", message)
        if flag is not None:
            message += f"; write one that begins with a dash as {flag[1]}=-VALUE"
        super().error(message)


class _Switch(argparse.Action):
    """The action of a flag that takes no value.

    Its default is the text of an environment variable. argparse reads a default of type str by
    `type`, and only if the flag is not on the line, so a wrong variable is refused by the command
    that has the flag, and by no other.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **more)

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, True)


def add_flags(parser: argparse.ArgumentParser, flags: Iterable[Flag]) -> None:
    """Add flags to a parser; the environment gives the default, a flag on the line beats it."""
    for flag in flags:
        about = f"{flag.about} [{flag.variable}]"
        about = about.replace("%", "%%")  # argparse formats it
        if flag.kind is None:
            parser.add_argument(
                flag.name,
                action=_Switch,
                type=functools.partial(_switch, flag.variable),
                default=flag.setting,
                help=about)
        else:
            parser.add_argument(
                flag.name,
                type=flag.kind,
                default=flag.setting,
                metavar=flag.metavar,
                help=about)


def _switch(variable: str, text: str) -> bool:
    """Read the environment variable of a flag that takes no value."""
    word = text.strip().lower()
    if word in ("1", "true", "yes", "y", "on"):
        return True
    if word in ("0", "false", "no", "n", "off"):
        return False
    raise argparse.ArgumentTypeError(f"invalid {variable} '{text}': expected 1 or 0")


def seconds(text: str, none: bool = False) -> float:
    """Argument type of a duration of at most 30 days; `none` allows 0s too."""
    # argparse shows the words of an ArgumentTypeError alone, not those of a ValueError.
    try:
        value = parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

    if value > MAX_FLAG_S or not (none or value > 0):
        limits = "0s to 30d" if none else "more than 0s, at most 30d"
        raise argparse.ArgumentTypeError(f"invalid duration '{text}': expected {limits}")
    return value


def size_bytes(text: str) -> int:
    """Argument type of a size: 64M, 1.5G or plain bytes, in powers of 1024; 0 is none."""
    # K, KB and KiB all mean 1024.
    pattern = r"(\d{1,15}(?:\.\d{1,3})?)([KMGT]?)(?:i?B)?"
    match = re.fullmatch(pattern, text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"invalid size '{text}': expected 256M, 2G or 0")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * 1024**power)


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return the argument type of a whole number within limits."""
    def check(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text) or not low <= int(text) <= high:
            expected = f"expected a whole number from {low} to {high}"
            raise argparse.ArgumentTypeError(f"invalid number '{text}': {expected}")
        return int(text)
    return check


def power_model(text: str) -> tuple[float, float]:
    """Argument type of a power model: W of the idle machine and W with all its CPUs busy."""
    number = r"(\d{1,6}(?:\.\d{1,3})?)"
    match = re.fullmatch(f"{number},{number}", text.strip())
    idle_w, busy_w = (0.0, 0.0) if match is None else (float(match[1]), float(match[2]))
    if busy_w <= 0 or busy_w < idle_w:
        expected = "expected W idle,W busy, such as 35,120"
        raise argparse.ArgumentTypeError(f"invalid power model '{text}': {expected}")
    return idle_w, busy_w


def one_of(*words: str) -> Callable[[str], str]:
    """Return the argument type of one word out of a few; it checks an environment variable too."""
    def check(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"unknown '{text}': expected {', '.join(words)}")
        return text
    return check


def state_home() -> Path:
    """Return the folder of this user's own ffdist state."""
    # XDG Base Directory Specification.
    base = os.environ.get("XDG_STATE_HOME")
    if base:
        return Path(base) / "ffdist"
    home = os.path.expanduser("~")
    return Path(home) / ".local" / "state" / "ffdist"


# ---- 2 Facts -------------------------------------------------------------------------------------

GIB = 2**30

# The seed's rule: a laptop has a battery, a server has more than both of these.
SERVER_THREADS = 16
SERVER_RAM_BYTES = 32 * GIB

# uname -m, where Go's name differs: the seed's agents register Go's.
GO_ARCH = {
    "x86_64": "amd64",
    "i386": "386",
    "i686": "386",
    "aarch64": "arm64",
    "armv6l": "arm",
    "armv7l": "arm",
    "armv8l": "arm",
    "loongarch64": "loong64",
}

# CPU features that x264, x265, SVT-AV1, libaom and libvpx have code for.
ENCODER_FLAGS = (
    "sse4_1", "sse4_2", "avx", "avx2", "fma", "bmi2",
    "avx512f", "avx512bw", "avx512vl", "avx512_vbmi", "avx512_vnni", "gfni",
    "neon", "asimd", "asimddp", "i8mm", "sve", "sve2",
    "vsx",
)

# arch/arm64/include/asm/cputype.h: the implementer, and (implementer, part).
ARM_MAKERS = {
    0x41: "Arm",
    0x42: "Broadcom",
    0x43: "Cavium",
    0x46: "Fujitsu",
    0x48: "HiSilicon",
    0x4E: "NVIDIA",
    0x50: "APM",
    0x51: "Qualcomm",
    0x61: "Apple",
    0xC0: "Ampere",
}
ARM_CORES = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x43, 0x0A1): "ThunderX",
    (0x43, 0x0AF): "ThunderX2",
    (0x46, 0x001): "A64FX",
    (0x48, 0xD01): "Kunpeng-920",
    (0x4E, 0x004): "Carmel",
    (0xC0, 0xAC3): "Ampere-1",
    (0xC0, 0xAC4): "Ampere-1a",
}

# PCI class 0x03 is a display. Displays of other makers (ASPEED, Matrox, QEMU) only draw a console.
GPU_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}

# drivers/gpu/drm: GPUs of boards, which are on no PCI bus.
BOARD_GPUS = {
    "v3d": ("Broadcom", "VideoCore"),
    "panfrost": ("Arm", "Mali"),
    "panthor": ("Arm", "Mali"),
    "lima": ("Arm", "Mali"),
    "msm_dpu": ("Qualcomm", "Adreno"),
    "etnaviv": ("Vivante", "GC"),
}

# Words in sys_vendor and product_name of /sys/class/dmi/id, and the virtual machine they mean.
# The first that fits counts: Xen's machines say "HVM domU", Microsoft's just "Virtual Machine".
VIRTUAL_DMI = (
    ("vmware", "vmware"),
    ("virtualbox", "virtualbox"),
    ("innotek", "virtualbox"),
    ("parallels", "parallels"),
    ("xen", "xen"),
    ("hvm domu", "xen"),
    ("bochs", "kvm"),
    ("qemu", "kvm"),
    ("kvm", "kvm"),
    ("openstack", "kvm"),
    ("google compute engine", "kvm"),
    ("amazon ec2", "kvm"),
    ("digitalocean", "kvm"),
    ("hetzner", "kvm"),
    ("apple virtualization", "apple"),
    ("virtual machine", "hyper-v"),
)

# The traces of container engines: a file, or a word in the path of the control group.
CONTAINER_FILES = (("/.dockerenv", "docker"), ("/run/.containerenv", "podman"))
CONTAINER_PATHS = (
    ("kubepods", "kubernetes"),
    ("docker", "docker"),
    ("libpod", "podman"),
    ("lxc", "lxc"),
)

# Documentation/hwmon: chips and thermal zones whose temperature is the processor's.
CPU_TEMPERATURE = (
    "coretemp", "k10temp", "zenpower", "cpu_thermal", "x86_pkg_temp", "cpu-thermal",
    "soc_thermal", "soc-thermal", "apm_xgene",
)

# Sensors that measure the whole machine: (chip, the labels that add up to all of it; none: any).
# Documentation/hwmon/acpi_power_meter.rst is one. Of NVIDIA's modules, VDD_IN alone is the whole;
# those without it have three inputs.
MACHINE_POWER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("power_meter", ()),
    ("ina3221", ("VDD_IN",)),
    ("ina3221", ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")),
)

# Documentation/hwmon/sysfs-interface.rst: kind of file -> unit, and what one count is in it.
SENSOR_UNITS = {
    "temp": ("celsius", 1e-3),
    "power": ("watts", 1e-6),
    "energy": ("joules", 1e-6),
    "fan": ("rpm", 1.0),
}

# File systems whose free space can be asked without hanging: no network and no FUSE.
LOCAL_FILESYSTEMS = (
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs",
    "overlay", "vfat", "exfat", "ntfs3", "jfs", "reiserfs",
)


class Unknown(NamedTuple):
    """A value that could not be found out, and why not."""

    reason: str


@dataclass(frozen=True)
class Gpu:
    """One GPU. `index` is nvidia-smi's; `path` is its device folder in sysfs."""

    vendor: str
    name: str
    index: int | None = None
    driver: str | None = None
    driver_version: str | None = None
    memory_bytes: int | None = None
    power_limit_watts: float | None = None
    uuid: str | None = None
    pci: str | None = None
    render_node: str | None = None
    integrated: bool | None = None
    path: str | None = None

    @property
    def title(self) -> str:
        """Return its name after its maker's, which some names begin with already."""
        if self.name.lower().startswith(self.vendor.lower()):
            return self.name
        return f"{self.vendor} {self.name}"


@dataclass(frozen=True)
class RaplZone:
    """An energy counter of Documentation/power/powercap/powercap.rst.

    `name` is unique on the machine. A counter of µJ starts again at 0 after `range_uj`.
    """

    name: str
    kind: str  # package, core, uncore, dram, psys or other
    zone: str  # its folder, such as intel-rapl:0:1
    range_uj: int | None
    readable: bool
    mirror_of: str | None = None


@dataclass(frozen=True)
class Sensor:
    """One value of Documentation/hwmon/sysfs-interface.rst, or of a thermal zone."""

    chip: str
    label: str
    unit: str
    value: float
    path: str


@dataclass(frozen=True)
class Battery:
    """One battery that can power the machine."""

    name: str
    status: str | None
    charge_percent: int | None


@dataclass(frozen=True)
class Disk:
    """One local file system; sizes that are null have their reason under `unknown`."""

    mount: str
    device: str
    filesystem: str
    size_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True)
class Cgroup:
    """Limits of this process's control group, null where there is none."""

    version: int | None = None
    cpus: float | None = None
    memory_bytes: int | None = None


class Proof(NamedTuple):
    """The result of trying an encoder: `state` is proved, failed or undecided, `why` the reason.

    Undecided means that the time ran out. Such an encoder may work, so it is tried again.
    """

    state: str
    why: str = ""

    @property
    def reason(self) -> str | None:
        """Return None for an encoder that is proved, else why it is not."""
        if self.state == "proved":
            return None
        return self.why


@dataclass(frozen=True)
class Hardware:
    """The answer of detect(). None is unknown, with its reason in `unknown`.

    Except for NONE_IS_AN_ANSWER: there, None means that the machine has none.
    """

    address: str | None = None
    machine: str | None = None
    cpu_model: str | None = None
    cpu_vendor: str | None = None
    cpu_threads: int | None = None  # what this process may use: affinity and quota
    cpu_logical: int | None = None  # what the machine has
    cpu_cores: int | None = None
    cpu_sockets: int | None = None
    cpu_flags: tuple[str, ...] = ()
    cpu_mhz_max: float | None = None
    ram_bytes: int | None = None  # the smaller of the machine's and the control group's
    memory_total_bytes: int | None = None
    memory_available_bytes: int | None = None
    swap_bytes: int | None = None
    has_gpu: bool = False
    gpu_type: str | None = None
    gpus: tuple[Gpu, ...] = ()
    has_battery: bool | None = None
    batteries: tuple[Battery, ...] = ()
    node_type: str = "desktop"
    disks: tuple[Disk, ...] = ()
    rapl: tuple[RaplZone, ...] = ()
    sensors: tuple[Sensor, ...] = ()
    cgroup: Cgroup = Cgroup()
    virtual: str | None = None
    container: str | None = None
    os: str | None = None
    os_name: str | None = None
    kernel: str | None = None
    arch: str | None = None
    ffmpeg: str | None = None
    ffprobe: str | None = None
    ffmpeg_version: str | None = None
    encoders: dict[str, Proof] = field(default_factory=dict)
    filters: tuple[str, ...] = ()
    vaapi_device: str | None = None  # the render node that proved VAAPI
    unknown: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def proved(self) -> tuple[str, ...]:
        """Return the encoders that encoded a real frame here, hardware first."""
        return tuple(name for name, proof in self.encoders.items() if proof.reason is None)

    def encoder_reasons(self) -> dict[str, str | None]:
        """Return each encoder that was tried, with None if it works, else why it does not."""
        return {name: proof.reason for name, proof in self.encoders.items()}

    def registration(self) -> dict[str, object]:
        """Return exactly the fields of the seed's node registration."""
        labels = {"node_type": self.node_type, "os": self.os, "arch": self.arch}
        return {
            "address": self.address,
            "type": self.node_type,
            "cpu_threads": self.cpu_threads,
            "cpu_model": self.cpu_model,
            "has_gpu": self.has_gpu,
            "gpu_type": self.gpu_type,
            "ram_bytes": self.ram_bytes,
            "labels": labels,
        }

    def to_json(self) -> dict[str, object]:
        """Return the fields of a registration first, then the rest, ready for json.dumps."""
        fields = {**dataclasses.asdict(self), "encoders": self.encoder_reasons()}
        answer = self.registration()
        for name, value in fields.items():
            answer.setdefault(name, value)
        return answer


# Fields in which None says "there is none", not "it could not be found out".
NONE_IS_AN_ANSWER = ("gpu_type", "virtual", "container", "vaapi_device")


@dataclass(frozen=True)
class GpuReading:
    """One GPU now: usages in percent, joules since the sampler's start."""

    name: str
    index: int | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    usage: float | None = None
    encoder_usage: float | None = None
    memory_used_bytes: int | None = None
    temperature_c: float | None = None
    source: str | None = None  # nvidia-smi or gpu-hwmon
    in_package: bool = False  # the machine's figure includes it: never add the two
    covered_s: float = 0.0  # the time that energy_joules is of, by the source's own clock
    too_hot: bool | None = None  # slowed down by heat, as nvidia-smi says


@dataclass(frozen=True)
class Reading:
    """One sample. Rates are since the previous one, `energy_joules` and `zones` since the start."""

    time: float  # seconds of the clock that sample() was given
    cpu_usage: float | None = None  # percent of the whole machine
    memory_used_bytes: int | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    covered_s: float = 0.0  # the time that energy_joules is of
    zones: dict[str, float] = field(default_factory=dict)  # joules
    power_source: str | None = None  # rapl, hwmon, battery or model
    gpus: tuple[GpuReading, ...] = ()
    temperature_c: float | None = None
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def total_watts(self) -> float | None:
        """Return the machine's watts and those of the GPUs that they do not include."""
        if self.power_watts is None:
            return None
        apart = [gpu.power_watts for gpu in self.gpus if not gpu.in_package]
        return self.power_watts + sum(watts for watts in apart if watts is not None)


@dataclass(frozen=True)
class ProcessUsage:
    """CPU seconds and resident bytes (shared pages counted in each process) of a process group.

    `gpu_seconds` is of all engines; 0 where the driver does not count them, as NVIDIA's.
    """

    cpu_seconds: float
    rss_bytes: int
    pids: tuple[int, ...]
    gpu_seconds: float = 0.0


# ---- 3 Host --------------------------------------------------------------------------------------

SMALL_READ_BYTES = 64 * 1024  # a file of sysfs is at most a page
# /proc/cpuinfo of hundreds of threads and pci.ids are larger. Below /proc/sys a read of 4 MiB or
# more fails with ENOMEM (KMALLOC_MAX_SIZE in fs/proc/proc_sysctl.c), so stay one byte below it.
LARGE_READ_BYTES = 4 * 2**20 - 1
LARGE_FILES = ("/proc/", "/usr/")
MAX_LINKS = 40  # as the kernel: MAXSYMLINKS of include/linux/namei.h
MAX_STREAM_LINES = 10_000  # that a stream keeps until somebody takes them: the newest
KILL_WAIT_S = 2.0  # a program that hangs in its driver cannot be killed; go on without it
TREE_PATH = ("usr/local/bin", "usr/bin", "bin")  # where a --root tree keeps its programs


NO_ANSWER = "no answer within"


@dataclass(frozen=True)
class Result:
    """What a program printed. `returncode` is None if it did not start or did not end in time."""

    returncode: int | None
    stdout: str
    stderr: str
    timed_out: bool = False


Runner = Callable[[Sequence[str], float], Result]


class Child:
    """A small program, started in a process group of its own so that all of it can be ended."""

    def __init__(self, argv: Sequence[str], stderr: int) -> None:
        """Start it; OSError or ValueError if that is not possible. `stderr` is PIPE or STDOUT."""
        self._popen = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def result(self, timeout_s: float) -> Result:
        """Wait for its end and return what it printed; it is killed after `timeout_s`."""
        try:
            out, err = self._popen.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return Result(None, "", f"{NO_ANSWER} {timeout_s:.1f} s", timed_out=True)
        finally:
            # After its end too, for programs that it started may hold the pipes.
            self.kill()
            self.close_pipes()
        return Result(self._popen.returncode, text_of(out), text_of(err))

    def lines(self) -> Iterator[str]:
        """Read its lines until it closes its output."""
        assert self._popen.stdout is not None
        return lines_of(self._popen.stdout)

    def kill(self) -> None:
        """Kill its process group; wait briefly for the end."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if self._popen.poll() is None:
                os.killpg(self.pid, signal.SIGKILL)
                self._popen.wait(timeout=KILL_WAIT_S)

    def close_pipes(self) -> None:
        for pipe in (self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                pipe.close()


def lines_of(pipe: IO[bytes]) -> Iterator[str]:
    """Read the lines of a pipe to its end; a longer line than SMALL_READ_BYTES comes in pieces."""
    for line in iter(lambda: pipe.readline(SMALL_READ_BYTES), b""):
        yield text_of(line).rstrip("\r\n")


def default_runner(argv: Sequence[str], timeout_s: float) -> Result:
    """Run a program to its end, or kill its group after `timeout_s`."""
    try:
        child = Child(argv, subprocess.PIPE)
    except (OSError, ValueError) as error:
        return Result(None, "", f"{argv[0]} does not start: {error_words(error)}")
    return child.result(timeout_s)


class Stream:
    """A program that goes on printing; a thread gathers its lines, so that its pipe never fills."""

    def __init__(self, argv: Sequence[str]) -> None:
        """Start it; OSError or ValueError if that is not possible."""
        # A deque may be appended to and popped by two threads without a lock.
        self._lines: deque[str] = deque(maxlen=MAX_STREAM_LINES)
        self._child = Child(argv, subprocess.STDOUT)
        self._thread = threading.Thread(target=self._gather, daemon=True, name="stream")
        self._thread.start()

    def _gather(self) -> None:
        for line in self._child.lines():
            self._lines.append(line)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def ended(self) -> bool:
        """Return whether the program has closed its output and all of it has been gathered."""
        return not self._thread.is_alive()

    def lines(self) -> list[str]:
        """Take the lines that came since the last call."""
        count = len(self._lines)
        return [self._lines.popleft() for _ in range(count)]

    def close(self) -> None:
        """End the program and its thread; a second call does nothing."""
        self._child.kill()
        self._thread.join(timeout=KILL_WAIT_S)
        if self.ended:  # else the thread still reads from the pipe
            self._child.close_pipes()


# proc(5): a name in this folder opens the very file that the descriptor has open.
DESCRIPTORS = "/proc/self/fd/"


def descriptor_path(descriptor: int) -> str:
    """Return the path by which a process opens the file behind a descriptor that it inherited."""
    return f"{DESCRIPTORS}{descriptor}"


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Make a folder and each missing parent for its owner alone; OSError if that fails.

    os.makedirs() would give the mode to the last folder only.
    """
    path = os.path.abspath(folder)
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    for name in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.mkdir(name, 0o700)


OPEN_TO_OTHERS = "it is open to other users: close it with chmod 700"


def make_private_folder(folder: str | os.PathLike[str]) -> None:
    """Make a folder as make_folder() does, and check that it is private; OSError says why not."""
    make_folder(folder)
    path = os.path.abspath(folder)
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "it is a file: name a folder", path)

    why = why_shared(path)
    if not why and found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        why = OPEN_TO_OTHERS
    if why:
        raise PermissionError(errno.EPERM, why, path)


def why_shared(path: str) -> str:
    """Return why other users could change a folder or where its path leads, "" if they cannot.

    Root can change everything anyway. A link on the way that belongs to another user could be sent
    elsewhere.
    """
    mine = os.geteuid()
    found = os.stat(path)
    if found.st_uid != mine:
        return f"it belongs to another user (uid {found.st_uid}): make it yours"

    place = ""
    parts = os.path.abspath(path).split("/")[1:]
    for part in parts:
        place += f"/{part}"
        link = os.lstat(place)
        if stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, mine):
            return f"{place} is a link of another user (uid {link.st_uid}): remove it"

    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return OPEN_TO_OTHERS
    return ""


def replace_file(path: str, text: str) -> str | None:
    """Write a file that its owner alone may read, all at once; return None or why that failed.

    The text goes into a new file first, under a name that nobody can guess, and takes the place of
    the old one in one step: a reader never sees half of it, and no link is followed.
    """
    scratch = None
    try:
        folder = os.path.dirname(os.path.abspath(path))
        make_folder(folder)
        handle, scratch = tempfile.mkstemp(".tmp", ".ffdist-", folder)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(scratch, path)
    except (OSError, ValueError) as error:
        if scratch is not None:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
        return f"{error_words(error)}: {path}"
    return None


STDOUT = "standard output"  # its name in errors


def check_stdout() -> None:
    """Raise OSError if this process was started without a stdout: its answer would be lost."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, "it is closed: send it to a file, or to /dev/null", STDOUT)


def write_stdout(text: str = "") -> None:
    """Write text, and what waits in the buffer, at once; an OSError names stdout as its file."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, STDOUT) from None


def discard_stdout() -> None:
    """Send what could not be written to /dev/null: Python would complain of it at its end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key by which card2 comes before card10."""
    # The names in /proc are many and mostly numbers: the same key as below, without the regex.
    if name.isascii() and name.isdigit() and len(name) < 19:
        return [(-1, ""), (int(name), ""), (-1, "")]
    return [_sort_key(part) for part in re.split(r"([0-9]{1,18})", name)]


def _sort_key(part: str) -> tuple[int, str]:
    if part.isascii() and part.isdigit():
        return int(part), ""
    return -1, part


class Tree:
    """The paths of a machine, all under one root, with links followed inside it.

    Another root than "/" is the tree of another machine. open(2) alone would follow its absolute
    links out into this one, so each link on the way is read and resolved here.
    """

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self.foreign = self.root != "/"

    def resolve(self, path: str) -> tuple[str, dict[str, str]]:
        """Follow links inside the root; return the final path and {link: target} met on the way.

        Raises OSError for a loop.
        """
        base = self.root if self.foreign else ""
        todo = path.split("/")[::-1]
        done = ""
        hops = 0
        met: dict[str, str] = {}
        while todo:
            part = todo.pop()
            if part in ("", "."):
                continue
            if part == "..":
                done = done.rpartition("/")[0]
                continue

            place = f"{done}/{part}"
            try:
                target = os.readlink(base + place)
            except FileNotFoundError:
                return place, met  # and there is nothing below it either
            except (OSError, ValueError):
                done = place  # not a link
                continue

            hops += 1
            if hops > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            met[place] = target
            if target.startswith("/"):
                done = ""
            todo += target.split("/")[::-1]
        return done or "/", met

    def real(self, path: str) -> str:
        """Return where a path of the tree is on this machine."""
        if not self.foreign:
            return path
        return self.root + self.resolve(path)[0]

    def beside(self, path: str) -> str:
        """Return where a path is whose last part, a link perhaps, is not to be followed."""
        folder, name = os.path.split(path)
        return os.path.join(self.real(folder), name)


class Host:
    """The machine as files and programs, all under one root.

    With another root than "/" nothing of this machine or process gets into an answer: links are
    followed inside the tree, programs come from it, and a file without any read bit counts as
    refused, even for root (so a recording keeps what could not be read).

    No method raises. A file that cannot be read is None, and why() has the reason.
    """

    def __init__(self, root: str = "/", run: Runner = default_runner) -> None:
        self.tree = Tree(root)
        self.root = self.tree.root
        self.foreign = self.tree.foreign
        self._run = run

    def read(self, path: str) -> str | None:
        """Read a file, bounded; return None if that is not possible."""
        return self._read(path)[0]

    def why(self, path: str) -> str:
        """Return why read() gave None: "missing: PATH", "permission denied: PATH" and the like."""
        return self._read(path)[1]

    def _read(self, path: str) -> tuple[str | None, str]:
        """Read a file; return its text and why that is not what the caller looks for."""
        limit = LARGE_READ_BYTES if path.startswith(LARGE_FILES) else SMALL_READ_BYTES
        try:
            # Without blocking, neither a FIFO in a strange tree nor a driver that answers EAGAIN
            # can hang the caller.
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            handle = os.open(self.tree.real(path), flags)
            try:
                if self.foreign and not os.fstat(handle).st_mode & 0o444:
                    return None, f"permission denied: {path}"
                data = self._read_all(handle, path, limit)
            finally:
                os.close(handle)
        except FileNotFoundError:
            return None, f"missing: {path}"
        except (OSError, ValueError) as error:
            return None, f"{error_words(error)}: {path}"
        return text_of(data), f"not understood: {path}"

    @staticmethod
    def _read_all(handle: int, path: str, limit: int) -> bytes:
        """Read a file's bytes. sysfs gives all at once or nothing; /proc about a page a read."""
        data = os.read(handle, limit)
        while path.startswith("/proc/") and data and len(data) < limit:
            more = os.read(handle, limit - len(data))
            if not more:
                break
            data += more
        return data

    def list(self, path: str) -> list[str]:
        """Return the names in a folder, numbers sorted as numbers; [] if it does not exist."""
        try:
            names = os.listdir(self.tree.real(path))
        except (OSError, ValueError):
            return []
        return sorted(names, key=natural)

    def exists(self, path: str) -> bool:
        """Return whether a path exists, be it a link to nothing."""
        try:
            return os.path.lexists(self.tree.beside(path))
        except (OSError, ValueError):
            return False

    def link(self, path: str) -> str | None:
        """Return the last part of a link's target: a driver's name, a device's address."""
        try:
            target = os.readlink(self.tree.beside(path))
        except (OSError, ValueError):
            return None
        return os.path.basename(target) or None

    def space(self, mount: str) -> tuple[int, int] | None:
        """Return a file system's size, and the bytes that an unprivileged user may still fill."""
        if self.foreign:
            return None
        try:
            found = os.statvfs(mount)
        except OSError:
            return None
        # f_bavail, not f_bfree: ext4 keeps 5 % for root.
        size = found.f_blocks * found.f_frsize
        free = found.f_bavail * found.f_frsize
        return size, free

    def stamp(self, path: str) -> str:
        """Return what identifies a file's content: its real path, size and modification time."""
        with contextlib.suppress(OSError):
            found = os.stat(path)
            return f"{os.path.realpath(path)} {found.st_size} {found.st_mtime_ns}"
        return path

    def usable(self, path: str) -> bool:
        """Return whether this process may use a device node."""
        return os.access(path, os.R_OK | os.W_OK)

    def set(self, path: str, text: str) -> bool:
        """Write into a file of the kernel, which must exist; return whether the kernel took it."""
        try:
            # Without O_CREAT and O_TRUNC: a mistake in the path must not leave a file behind.
            handle = os.open(self.tree.real(path), os.O_WRONLY | os.O_CLOEXEC)
            try:
                return os.write(handle, text.encode()) > 0
            finally:
                os.close(handle)
        except (OSError, ValueError):
            return False

    def make(self, folder: str) -> bool:
        """Make a folder below one that exists; return whether it exists now."""
        with contextlib.suppress(OSError, ValueError):
            os.mkdir(self.tree.real(folder))
        return os.path.isdir(self.tree.real(folder))

    def drop(self, folder: str) -> bool:
        """Remove an empty folder, or a control group without processes; return whether it went."""
        with contextlib.suppress(OSError, ValueError):
            os.rmdir(self.tree.real(folder))
        return not self.exists(folder)

    def kill(self, pid: int) -> None:
        """End a process at once; the number of a process in a foreign tree means nothing here."""
        if not self.foreign:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def group(self, pid: int) -> int | None:
        """Return a process's group, twenty times as quickly as from its stat; None if unknown."""
        if self.foreign:
            return None
        try:
            return os.getpgid(pid)
        except OSError:
            return None

    def uname(self, field: str) -> str | None:
        """Return sysname, nodename, release or machine of the kernel; None for a foreign root."""
        if self.foreign:
            return None
        return getattr(os.uname(), field) or None

    def which(self, name: str) -> str | None:
        """Find a program on PATH, or in the usual folders of a foreign tree; return its path."""
        if not self.foreign:
            return shutil.which(name)
        folders = [f"{self.root}/{folder}" for folder in TREE_PATH]
        return shutil.which(os.path.basename(name), path=os.pathsep.join(folders))

    def run(self, argv: Sequence[str], timeout_s: float) -> Result:
        """Run a program that which() found."""
        return self._run(argv, timeout_s)

    def stream(self, argv: Sequence[str]) -> Stream | None:
        """Start a program whose lines are gathered until it is closed; None if that fails."""
        try:
            return Stream(argv)
        except (OSError, ValueError):
            return None


GRACE_S = 1.0  # between TERM and KILL
LAUNCHER_S = 10.0  # for setpriv to show that it works
REAP_S = 10.0  # a process that was killed is gone at once, unless it hangs in the kernel
DRAIN_S = 2.0  # for the last output of a program, whose pipe a stranger may hold open
# An encode takes what the machine has left, never what its users need.
NICE = ("nice", "-n", "10")
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")  # util-linux 2.33; busybox has none


class Exit(NamedTuple):
    """How a process ended: its status (negative: the signal), CPU seconds and peak memory.

    The last two are of the process and of the children that it waited for.
    """

    returncode: int
    cpu_seconds: float
    peak_rss_bytes: int


class ProgramMissing(Exception):
    """A program does not exist or is not executable; `args[0]` is its name."""


@functools.lru_cache(maxsize=1)
def launcher() -> tuple[str, ...]:
    """Return the words before a command: a low priority, and where possible an end with the agent.

    prctl(2), PR_SET_PDEATHSIG: the parent is the thread that forked, so this thread has to wait for
    the program's end.
    """
    tried = default_runner([*DIE_WITH_PARENT, "true"], LAUNCHER_S)
    words = DIE_WITH_PARENT if tried.returncode == 0 else ()
    if shutil.which(NICE[0]):
        return (*words, *NICE)
    return words


class Program:
    """One program of a run in a process group of its own, niced, both its pipes always drained.

    Four threads know it: two drain its pipes, one waits for its end, and the one that started it.
    The waiting one alone sets `exit` and then `ended`.
    """

    def __init__(self, argv: Sequence[str], folder: Path, on_stdout: Callable[[str], None],
                 on_stderr: Callable[[str], None], descriptors: Iterable[int] = ()) -> None:
        """Start it in a folder; ProgramMissing, OSError or ValueError if that is not possible."""
        # The launcher itself always starts, so the program after it is checked here.
        if shutil.which(argv[0]) is None:
            raise ProgramMissing(argv[0])
        self._popen = subprocess.Popen(
            [*launcher(), *argv],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=tuple(descriptors))
        self.pid = self._popen.pid
        self.ended = threading.Event()
        self.exit: Exit | None = None

        pipes = ((self._popen.stdout, on_stdout), (self._popen.stderr, on_stderr))
        drains = [threading.Thread(target=_drain, args=pipe, daemon=True) for pipe in pipes]
        for drain in drains:
            drain.start()
        threading.Thread(target=self._reap, args=(drains,), daemon=True).start()

    def _reap(self, drains: list[threading.Thread]) -> None:
        # The zombie keeps the group's number from a stranger while the rest of it is killed.
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.signal(signal.SIGKILL)
        for drain in drains:
            drain.join(DRAIN_S)
        _, status, usage = os.wait4(self.pid, 0)
        code = os.WEXITSTATUS(status)
        if os.WIFSIGNALED(status):
            code = -os.WTERMSIG(status)
        self._popen.returncode = code  # or Popen would wait for it again
        cpu_s = usage.ru_utime + usage.ru_stime
        # getrusage(2): ru_maxrss is in KiB on Linux.
        self.exit = Exit(code, cpu_s, usage.ru_maxrss * 1024)
        self.ended.set()

    def signal(self, number: int) -> None:
        """Send a signal to the whole group; a group that is gone already is not an error."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def end(self) -> None:
        """End the group: TERM, then KILL; return when it is gone."""
        if self.ended.is_set():
            return
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)  # a paused process acts on TERM only when it goes on
        if not self.ended.wait(GRACE_S):
            self.signal(signal.SIGKILL)
            self.ended.wait(REAP_S)


def _drain(pipe: IO[bytes], take: Callable[[str], None]) -> None:
    with pipe:
        for line in lines_of(pipe):
            take(line)


# ---- 4 Archive -----------------------------------------------------------------------------------

MAX_ARCHIVE_CHARACTERS = 64 * 2**20  # of a recording: that of a two-socket server has 38,000
RECORDED_FOLDERS = ("/proc/", "/sys/", "/etc/", "/run/", "/usr/lib/")
# Reasons for which a file was not there to be read, rather than refused.
NOT_THERE = ("missing", "not a directory", "too many levels")

Entries = dict[str, tuple[str, str]]  # path -> (kind, text)


class Recorder(Host):
    """A host that writes down what it was asked, under real paths, with the links on the way."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.root)
        self.entries: Entries = {}

    def _enter(self, path: str, kind: str, text: str) -> None:
        """Add an entry under its real path, and the links that lead there."""
        final, links = self.tree.resolve(path)
        for link, target in links.items():
            self.entries[link] = ("link", target)
        # An entry made from the name alone gives way to one with the content.
        known, _ = self.entries.get(final, ("there", ""))
        if known in ("there", "dir"):
            self.entries[final] = (kind, text)

    def read(self, path: str) -> str | None:
        text, why = self._read(path)
        if path.startswith(RECORDED_FOLDERS):
            if text is not None:
                self._enter(path, "file", scrub(path, text))
            elif not why.startswith(NOT_THERE):
                self._enter(path, "refused", "")
        return text

    def list(self, path: str) -> list[str]:
        names = super().list(path)
        if path.startswith("/sys/") and super().exists(path):
            self._enter(path, "dir", "")
            for name in names:  # a name must exist in the copy even when nobody opens it
                self.exists(f"{path}/{name}")
        return names

    def exists(self, path: str) -> bool:
        found = super().exists(path)
        if found and path.startswith(("/sys/", "/run/", "/.dockerenv")):
            self.entries.setdefault(self._own_path(path), ("there", ""))
        return found

    def link(self, path: str) -> str | None:
        target = super().link(path)
        if target is not None:
            self.entries[self._own_path(path)] = ("link", f"../{target}")
        return target

    # The kernel's answers to the next two are not files, so a recording cannot give them. Without
    # them, detection reads what it will read of the recording, such as the size of a disk's device.

    def space(self, mount: str) -> tuple[int, int] | None:
        return None

    def uname(self, field: str) -> str | None:
        return None

    def _own_path(self, path: str) -> str:
        """Return a path whose last part is not followed, below its folder's real path."""
        parent, name = os.path.split(path)
        return f"{self.tree.resolve(parent)[0].rstrip('/')}/{name}"


def scrub(path: str, text: str) -> str:
    """Remove what names this one machine or its owner: serial numbers, UUIDs, network mounts."""
    if path.endswith("/hostname"):
        return "recorded\n"
    if path.endswith(("/mounts", "/mountinfo")):
        # Mounts from elsewhere name other machines and shares.
        kinds = "|".join(("cgroup2?", *LOCAL_FILESYSTEMS))
        lines = [line for line in text.splitlines() if re.search(f" ({kinds}) ", line)]
        return "".join(f"{line}\n" for line in lines)
    text = re.sub(r"(?im)^(serial|machine id|uuid)([\t ]*:).*$", r"\1\2 0", text)
    return re.sub(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "GPU-0", text)


def archive(entries: Mapping[str, tuple[str, str]]) -> str:
    """Write {path: (kind, text)} as one text: before each entry a line "=== KIND PATH".

    Kinds: file; part (a file without a newline at its end); link (the text is its target); dir;
    refused (it could not be read); there (nobody read it). Backslashes, control characters and a
    leading "===" are written as \\xNN.
    """
    lines = []
    for path in sorted(entries, key=natural):
        kind, text = entries[path]
        if kind == "file" and not text.endswith("\n"):
            kind = "part"
        lines.append(f"=== {kind} {path}")
        if kind == "file":
            text = text[:-1]  # its last newline is the line's own
        if text or kind == "file":
            lines += map(_escape, text.split("\n"))
    return "\n".join(lines) + "\n"


def _escape(line: str) -> str:
    """Escape a line, so that it is printable and does not look like the head of an entry."""
    line = "".join(map(_escape_character, line))
    if line.startswith("==="):
        return "\\x3d" + line[1:]
    return line


def _escape_character(char: str) -> str:
    if char == "\t" or (char.isprintable() and char != "\\"):
        return char
    if ord(char) < 256:
        return f"\\x{ord(char):02x}"
    return "?"


def parse_archive(text: str) -> Entries:
    """Read an archive into {path: (kind, text)}; ValueError for other text."""
    pattern = r"^=== (file|part|link|dir|refused|there) (/.*)\n"
    parts = re.split(pattern, text, flags=re.MULTILINE)
    before = parts.pop(0)
    if before.strip() or not parts:
        raise ValueError(f"not an archive of --record: it begins with {before[:40]!r}")

    entries: Entries = {}
    # The rest is kind, path and body, again and again.
    for kind, path, body in zip(parts[0::3], parts[1::3], parts[2::3]):
        plain = re.sub(r"\\x([0-9a-f]{2})", _unescape_character, body)
        if kind != "file":
            plain = plain[:-1]  # the newline before the next entry
        entries[path] = (kind, plain)
    return entries


def _unescape_character(found: re.Match[str]) -> str:
    return chr(int(found.group(1), 16))


FILE_KINDS = ("file", "part")
# Files and folders first: a link made earlier could lead them out of the folder. Names that nobody
# read come last, for a link may have made them already.
UNPACK_ORDER = (
    (*FILE_KINDS, "refused", "dir"),
    ("link",),
    ("there",),
)


def unpack(text: str, folder: str) -> list[str]:
    """Make the tree of an archive; return the paths of its files.

    Nothing is written outside of `folder`. Raises ValueError or OSError for other text.
    """
    entries = parse_archive(text)
    folder = os.path.realpath(folder)
    for kinds in UNPACK_ORDER:
        for path, (kind, body) in entries.items():
            if kind in kinds:
                _unpack_entry(folder, path, kind, body)
    return [path for path, (kind, _) in entries.items() if kind in FILE_KINDS]


def _unpack_entry(folder: str, path: str, kind: str, body: str) -> None:
    """Make one entry, unless its path leads out of the folder."""
    place = folder + path
    # By the links that exist by now, for an archive may have made them.
    parent = os.path.realpath(os.path.dirname(place))
    if not f"{parent}/".startswith(f"{folder}/"):
        return
    if kind == "there" and os.path.lexists(place):
        return

    if kind == "dir":
        os.makedirs(place, exist_ok=True)
        return
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if kind == "link":
        os.symlink(body, place)
        return
    data = body.encode("utf-8", "surrogateescape")
    with open(place, "wb") as file:
        file.write(data)
    os.chmod(place, 0 if kind == "refused" else 0o644)


# ---- 5 Parsers -----------------------------------------------------------------------------------

MAX_CPUS = 65536  # a garbled list must not fill memory; x86 kernels have 8192 at most
MAX_WORD = 200  # characters of a name
MAX_REASON = 160  # characters of a program's own words in a reason

FileText = Optional[str]  # as Host.read() returns it
Block = dict[str, str]  # "key: value" lines up to an empty one, as of one CPU in /proc/cpuinfo


def _find(pattern: str, text: FileText) -> str | None:
    """Return the first group where a pattern matches first; ^ and $ are those of a line."""
    found = re.search(pattern, text or "", re.MULTILINE)
    if found is None:
        return None
    return found.group(1)


def parse_int(text: FileText) -> int | None:
    """Read a decimal number as sysfs prints it; None for anything else."""
    # Up to 2^64. int() alone would also take "1_000", Arabic digits and a megabyte of nines.
    found = re.fullmatch(r"\s*(-?[0-9]{1,20})\s*", text or "", re.ASCII)
    if found is None:
        return None
    return int(found.group(1))


def parse_float(text: FileText) -> float | None:
    """Read a number of nvidia-smi; None for [N/A], [Not Supported] and other words."""
    # float() alone would also take "nan" and "inf", which JSON has no word for.
    found = re.fullmatch(r"\s*(-?[0-9]{1,15}(?:\.[0-9]{1,15})?)\s*", text or "", re.ASCII)
    if found is None:
        return None
    return float(found.group(1))


def parse_mib(text: FileText) -> int | None:
    """Read a size that nvidia-smi prints in MiB; return bytes."""
    mib = parse_float(text)
    if mib is None:
        return None
    return int(mib * 2**20)


def parse_word(text: FileText) -> str | None:
    """Read a name on one line, without the NUL that ends it in a device tree; None for garbage."""
    lines = (text or "").strip("\0\n\t ").split("\n")
    word = lines[0].strip()[:MAX_WORD]
    # U+FFFD came from bytes that are not UTF-8.
    if not word.isprintable() or "\ufffd" in word:
        return None
    return word or None


def parse_cpu_list(text: FileText) -> int | None:
    """Count the CPUs of a list such as "0-3,8,10-11"."""
    cpus: set[int] = set()
    for part in (text or "").strip().split(","):
        found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part, re.ASCII)
        if found is None:
            return None
        first = int(found.group(1))
        last = int(found.group(2) or first)
        if last < first or last >= MAX_CPUS:
            return None
        cpus.update(range(first, last + 1))
    return len(cpus)


def parse_blocks(text: FileText) -> list[Block]:
    """Split "key: value" lines into blocks at the empty lines between them."""
    blocks: list[Block] = [{}]
    for line in (text or "").splitlines():
        key, found, value = line.partition(":")
        if found:
            blocks[-1].setdefault(key.strip(), value.strip())
        elif not line.strip() and blocks[-1]:
            blocks.append({})
    return [block for block in blocks if block]


def merge_blocks(blocks: Sequence[Block]) -> Block:
    """Merge blocks into one; of a key that several have, the first one's value counts."""
    merged: Block = {}
    for block in reversed(blocks):
        merged.update(block)
    return merged


def parse_sizes(text: FileText) -> dict[str, int]:
    """Read the "Name:  123 kB" lines of /proc/meminfo and /proc/PID/status into bytes.

    The kernel writes kB and means 1024 bytes.
    """
    lines = re.compile(r"^(\w+):\s+([0-9]{1,15}) kB$", re.MULTILINE | re.ASCII)
    sizes = {}
    for name, value in lines.findall(text or ""):
        sizes[name] = int(value) * 1024
    return sizes


def parse_arm_core(block: Block) -> tuple[str, str] | None:
    """Name an Arm core's (maker, core) by their numbers: such kernels print no model name."""
    try:
        maker = int(block["CPU implementer"], 16)
        part = int(block["CPU part"], 16)
    except (KeyError, ValueError):
        return None
    maker_name = ARM_MAKERS.get(maker, f"maker {maker:#x}")
    core_name = ARM_CORES.get((maker, part), f"part {part:#x}")
    return maker_name, core_name


def parse_cgroup(text: FileText) -> list[tuple[str, str]]:
    """Read /proc/self/cgroup into (controllers, path); version 2 names no controllers."""
    # "4:cpu,cpuacct:/system.slice", and of version 2 "0::/system.slice".
    return re.findall(r"^[0-9]+:([^:\n]*):(/.*)$", text or "", re.MULTILINE)


def parse_cgroup_mounts(text: FileText) -> list[tuple[str, str, str, str]]:
    """Read (root, mount point, type, super options) of the control group mounts in mountinfo."""
    # proc_pid_mountinfo(5): "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate".
    pattern = r"^(?:\S+ ){3}(\S+) (\S+) .* - (cgroup2?) \S+ (\S+)$"
    return re.findall(pattern, text or "", re.MULTILINE)


def parse_mounts(text: FileText) -> list[tuple[str, str, str]]:
    """Read /proc/self/mounts into (device, mount point, type), without escapes such as \\040."""
    rows = []
    found = re.findall(r"^(\S+) (/\S*) (\S+) ", text or "", re.MULTILINE)
    for device, mount, kind in found:
        rows.append((_unescape(device), _unescape(mount), kind))
    return rows


def _unescape(word: str) -> str:
    """Undo the octal escapes by which the kernel writes spaces, tabs, newlines and backslashes."""
    return re.sub(r"\\([0-3][0-7]{2})", _octal_character, word)


def _octal_character(found: re.Match[str]) -> str:
    return chr(int(found.group(1), 8))


def parse_cpu_times(text: FileText) -> tuple[int, int] | None:
    """Read the first line of /proc/stat into (busy, all) ticks.

    proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal. The guest times that follow
    are part of user and nice already.
    """
    found = re.match(r"cpu +((?:[0-9]{1,18} ){3,9}[0-9]{1,18})\n", text or "", re.ASCII)
    if found is None:
        return None
    words = found.group(1).split()
    ticks = [int(word) for word in words[:8]]
    idle = sum(ticks[3:5])  # waiting for I/O is idle too
    total = sum(ticks)
    return total - idle, total


def parse_process(text: FileText) -> dict[str, int]:
    """Read group, ticks and start from /proc/PID/stat, or nothing.

    The ticks include those of children that were waited for. A command's name may have spaces and
    parentheses: the fields begin after the last one.
    """
    _, _, rest = (text or "").rpartition(")")
    fields = rest.split()[1:20]
    try:
        numbers = [int(field) for field in fields]
        return {
            "group": numbers[1],
            "ticks": sum(numbers[10:14]),  # utime, stime, cutime, cstime
            "start": numbers[18],
        }
    except (ValueError, IndexError):
        return {}


def parse_engines(text: FileText) -> dict[str, int]:
    """Read {client: ns that it kept a GPU's engines busy} from the fdinfo of a descriptor.

    Documentation/gpu/drm-usage-stats.rst. Of xe it is engine cycles, which are as good for shares.
    A file that is not a GPU's gives {}.
    """
    client = _find(r"^drm-client-id:\s*([0-9]{1,18})$", text)
    if client is None:
        return {}

    # Clients are numbered anew on each device.
    device = _find(r"^drm-pdev:\s*(\S+)$", text)
    times = re.compile(r"^drm-engine-(?!capacity-)\S+:\s*([0-9]{1,18}) ns$", re.MULTILINE)
    cycles = re.compile(r"^drm-cycles-\S+:\s*([0-9]{1,18})$", re.MULTILINE)
    busy = times.findall(text or "") or cycles.findall(text or "")
    total = sum(map(int, busy))
    return {f"{device} {client}": total}


def parse_csv(text: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """Read nvidia-smi's csv,noheader,nounits; lines of another shape are left out."""
    rows = []
    for line in text.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) == len(fields):
            rows.append(dict(zip(fields, words)))
    return rows


def parse_refused(text: str) -> str:
    """Return the field that nvidia-smi does not know, "" if it complains of none."""
    # 'Field "utilization.encoder" is not a valid field to query.'
    return _find(r'Field "([\w.]+)" is not a valid field', text) or ""


def parse_pci_address(text: FileText) -> str | None:
    """Return a PCI address as sysfs writes it: nvidia-smi prints 00000000:3B:00.0."""
    pattern = r"([0-9a-f]{4,8}):([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])"
    found = re.fullmatch(pattern, (text or "").lower())
    if found is None:
        return None
    return f"{int(found.group(1), 16):04x}:{found.group(2)}"


def parse_pci_name(text: FileText, vendor: str, device: str) -> str | None:
    """Find a device in pci.ids; the part in brackets is what people call it."""
    # A vendor's line is followed by those of its devices, each with one tab before it. Numbers of
    # devices repeat from vendor to vendor.
    devices = _find(rf"^{re.escape(vendor)}  .*\n((?:[\t#\n].*\n?)*)", text)
    name = _find(rf"^\t{re.escape(device)}  (.+)$", devices)
    if name is None:
        return None
    inner = _find(r"\[([^\]]+)\]", name)
    return parse_word(inner or name)


def parse_time_stamp(text: FileText) -> float | None:
    """Read nvidia-smi's "2023/05/17 14:23:11.123" into seconds.

    It is local time without a zone, so only differences mean anything.
    """
    try:
        moment = datetime.datetime.strptime(text or "", "%Y/%m/%d %H:%M:%S.%f")
    except ValueError:
        return None
    return moment.replace(tzinfo=datetime.timezone.utc).timestamp()


def parse_listed(text: str) -> set[str]:
    """Read the names of `ffmpeg -encoders` or `-filters`: the word after the flags."""
    # " V....D libx264  libx264 H.264 / AVC …" or " T.. psnr  VV->V  Calculate …"
    return set(re.findall(r"^ [A-Z.|]{2,6} +([\w-]+) ", text, re.MULTILINE | re.ASCII))


# Lines that FFmpeg prints after the one that says why.
GENERIC_WORDS = re.compile(
    r"Error (initializing|parsing|while opening|opening|submitting|sending)|Conversion failed"
    r"|Task finished|Nothing was written|Device creation failed|Terminating thread"
    r"|Could not open encoder|\w+ ?\[info\]")


def parse_failure(result: Result) -> str:
    """Choose the line of FFmpeg's own words that says most about why it failed."""
    lines = []
    for line in result.stderr.splitlines():
        words = re.sub(r"^(\[[^\]]*\] *)+", "", line).strip()  # without "[libx264 @ 0x55]"
        if words:
            lines.append(words)
    specific = [line for line in lines if not GENERIC_WORDS.match(line)]
    if lines:
        return [*specific, *lines][0][:MAX_REASON]

    code = result.returncode or 0
    if code < 0:
        return f"ffmpeg was ended by signal {-code}"
    return f"ffmpeg ended with exit code {code} and no message"


# ---- 6 Machine -----------------------------------------------------------------------------------

CPUS = "/sys/devices/system/cpu"
KERNEL = "/proc/sys/kernel"
OS_RELEASES = ("/etc/os-release", "/usr/lib/os-release")  # os-release(5): the first that exists
CGROUPS = "/sys/fs/cgroup"  # where the hierarchies are usually mounted
MAX_CGROUP_DEPTH = 32  # of a path in a strange tree
# Version 1 has no word for "no limit" of memory: it is the largest multiple of a page below 2^63.
NO_MEMORY_LIMIT = 2**62


class Survey(NamedTuple):
    """What a detector works with: the machine, the facts found before it, detect()'s options."""

    host: Host
    hw: Hardware
    probe: bool
    state_dir: str | None
    ffmpeg: str | None


# The answer of a detector: a value for each of its fields, or Unknown. Its keys may also be
# "FIELD.PART" of a part that is Unknown, and "problems", a list of sentences.
Findings = dict[str, Any]


def known(value: object, reason: str) -> object:
    """Return a value, or Unknown if it is None or empty."""
    if value in (None, "", (), {}):
        return Unknown(reason)
    return value


def _word(host: Host, path: str) -> str | None:
    return parse_word(host.read(path))


def _int(host: Host, path: str) -> int | None:
    return parse_int(host.read(path))


def _ints(host: Host, paths: Iterable[str]) -> list[int]:
    """Read the numbers of those files that have one."""
    values = []
    for path in paths:
        value = _int(host, path)
        if value is not None:
            values.append(value)
    return values


def _first(values: Iterable[str | None]) -> str | None:
    """Return the first value that is known."""
    return next((value for value in values if value), None)


def detect_system(survey: Survey) -> Findings:
    """Find name, kernel, operating system and board."""
    host = survey.host
    # /etc/hostname is only what the name is to be after the next start.
    hostname = f"{KERNEL}/hostname"
    name = _word(host, hostname) or _word(host, "/etc/hostname") or host.uname("nodename")
    ostype = f"{KERNEL}/ostype"
    system = _word(host, ostype) or host.uname("sysname") or ""
    release = f"{KERNEL}/osrelease"
    kernel = _word(host, release) or host.uname("release")
    no_board = "neither DMI nor a device tree names the board"
    return {
        "address": known(name, host.why(hostname)),
        "os": known(system.lower(), host.why(ostype)),
        "os_name": known(_os_name(host), host.why(OS_RELEASES[0])),
        "kernel": known(kernel, host.why(release)),
        "machine": known(_board(host), no_board),
    }


def _os_name(host: Host) -> str | None:
    """Return the name that os-release(5) has for people."""
    pretty = re.compile(r"^PRETTY_NAME=([\"']?)(.+)\1\s*$", re.MULTILINE)
    for path in OS_RELEASES:
        match = pretty.search(host.read(path) or "")
        name = parse_word(match.group(2)) if match else None
        if name:
            return name
    return None


def _board(host: Host) -> str | None:
    """Return the board's name: DMI has it on PCs and servers, the device tree elsewhere."""
    vendor = _word(host, "/sys/class/dmi/id/sys_vendor") or ""
    product = _word(host, "/sys/class/dmi/id/product_name") or ""
    name = f"{vendor} {product}".strip()
    return name or _word(host, "/proc/device-tree/model")


def detect_cpu(survey: Survey) -> Findings:
    """Find model, counts, flags and frequency."""
    host = survey.host
    # A block for each CPU, and on Arm boards one for the machine. The CPUs of a machine are alike
    # in all that is asked for here.
    blocks = parse_blocks(host.read("/proc/cpuinfo"))
    merged = merge_blocks(blocks)
    core = parse_arm_core(merged)
    vendor = parse_word(merged.get("vendor_id"))
    if vendor is None and core is not None:
        vendor = core[0]
    cores, sockets = _topology(host, blocks)
    flags = _cpu_flags(merged)

    missing = f"neither /sys nor /proc/cpuinfo has it ({host.why('/proc/cpuinfo')})"
    no_scaling = f"no frequency scaling under {CPUS}/cpufreq"
    return {
        "cpu_model": known(_cpu_model(merged, core), missing),
        "cpu_vendor": known(vendor, missing),
        "cpu_logical": known(_logical_cpus(host, blocks), missing),
        "cpu_cores": known(cores, missing),
        "cpu_sockets": known(sockets, missing),
        "arch": known(_arch(host, merged, flags), missing),
        "cpu_flags": tuple(flag for flag in ENCODER_FLAGS if flag in flags),
        "cpu_mhz_max": known(_max_mhz(host), no_scaling),
    }


def _cpu_model(merged: Block, core: tuple[str, str] | None) -> str | None:
    """Return the model: x86 has "model name", MIPS "cpu model", POWER "cpu", RISC-V "uarch".

    Of Arm, "Processor" is only an architecture ("ARMv8 Processor rev 3"), so the core's name is
    better.
    """
    keys = ["model name", "cpu model", "cpu"]
    if core is None:
        keys += ["Processor", "uarch"]
    model = None
    for key in keys:
        words = merged.get(key, "").split()  # Intel pads its names
        model = model or parse_word(" ".join(words))
    if core is None:
        return model
    if model is None or model.startswith("ARMv"):
        return " ".join(core)
    return model


def _cpu_flags(merged: Block) -> set[str]:
    """Return the processor's features: x86 has "flags", Arm "Features", others "features"."""
    for key in ("flags", "Features", "features"):
        if merged.get(key):
            return set(merged[key].split())
    return set()


def _logical_cpus(host: Host, blocks: Sequence[Block]) -> int | None:
    """Count the CPUs that are online."""
    online = parse_cpu_list(host.read(f"{CPUS}/online"))
    if online:
        return online
    listed = sum("processor" in block for block in blocks)
    if listed:
        return listed
    times = host.read("/proc/stat") or ""
    ticking = re.findall(r"^cpu[0-9]+ ", times, re.MULTILINE)
    return len(ticking) or None


def _topology(host: Host, blocks: Sequence[Block]) -> tuple[int | None, int | None]:
    """Count cores and sockets: the threads of one core name the same siblings."""
    cores: set[str] = set()
    sockets: set[int] = set()
    for name in cpu_folders(host):
        siblings = _word(host, f"{CPUS}/{name}/topology/thread_siblings_list")
        if siblings and parse_cpu_list(siblings):
            cores.add(siblings)
        package = _int(host, f"{CPUS}/{name}/topology/physical_package_id")
        if package is not None and package >= 0:  # -1: the kernel does not know
            sockets.add(package)
    if not (cores and sockets):
        pairs = _numbered_cores(blocks)
        if pairs:
            return len(pairs), len({socket for socket, _ in pairs})
    return len(cores) or None, len(sockets) or None


def _numbered_cores(blocks: Sequence[Block]) -> set[tuple[str, str]]:
    """Return (socket, core) of each core: x86 has them in /proc/cpuinfo, which needs no sysfs."""
    pairs: set[tuple[str, str]] = set()
    for block in blocks:
        if {"physical id", "core id"} <= block.keys():
            pairs.add((block["physical id"], block["core id"]))
    return pairs


def cpu_folders(host: Host) -> list[str]:
    """Return the names of the CPUs in sysfs; beside them are cpufreq, cpuidle and the like."""
    return [name for name in host.list(CPUS) if re.fullmatch(r"cpu[0-9]{1,5}", name, re.ASCII)]


def _arch(host: Host, merged: Block, flags: set[str]) -> str | None:
    """Return Go's name of the architecture.

    /proc/sys/kernel/arch came with Linux 6.1. Of a tree from an older kernel, only the shape of
    cpuinfo shows it.
    """
    word = _word(host, f"{KERNEL}/arch") or host.uname("machine")
    if word:
        return GO_ARCH.get(word, word)
    if "CPU architecture" in merged:  # asimd: AArch64's name for NEON
        return "arm64" if "asimd" in flags else "arm"
    if "fpu" in flags:  # lm: long mode
        return "amd64" if "lm" in flags else "386"
    return None


def _max_mhz(host: Host) -> float | None:
    """Return the highest frequency of any CPU."""
    # A policy is a group of CPUs that change their frequency together.
    policies = host.list(f"{CPUS}/cpufreq")
    paths = [f"{CPUS}/cpufreq/{policy}/cpuinfo_max_freq" for policy in policies]
    max_khz = max(_ints(host, paths), default=0)
    return max_khz / 1000 if max_khz > 0 else None


def detect_limits(survey: Survey) -> Findings:
    """Find memory and the control group, and what they leave to this process."""
    host = survey.host
    info = parse_sizes(host.read("/proc/meminfo"))
    total = info.get("MemTotal")
    group = cgroup_limits(host)
    # A container sees the machine's meminfo, but may use only what its group may.
    ram = total
    if total is not None and group.memory_bytes is not None:
        ram = min(total, group.memory_bytes)
    missing = f"/proc/meminfo does not have it ({host.why('/proc/meminfo')})"
    no_threads = "neither the CPUs nor this process's affinity can be read"
    return {
        "cgroup": group,
        "cpu_threads": known(_usable_cpus(survey, group), no_threads),
        "memory_total_bytes": known(total, missing),
        "memory_available_bytes": known(info.get("MemAvailable"), missing),
        "swap_bytes": known(info.get("SwapTotal"), missing),
        "ram_bytes": known(ram, missing),
    }


def _usable_cpus(survey: Survey, group: Cgroup) -> int | None:
    """Count the CPUs that this process may use, by its affinity and quota."""
    status = merge_blocks(parse_blocks(survey.host.read("/proc/self/status")))
    allowed = parse_cpu_list(status.get("Cpus_allowed_list"))
    # Rounded up: 1.5 CPUs keep two threads busier than one.
    quota = None
    if group.cpus is not None:
        quota = max(1, math.ceil(group.cpus))
    limits = (survey.hw.cpu_logical, allowed, quota)
    counts = [limit for limit in limits if limit is not None]
    return min(counts, default=None)


class Hierarchy(NamedTuple):
    """One hierarchy of control groups as this process sees it.

    Version 1 has one for each few controllers, version 2 a single one that names none. `folders`
    are this process's own group and its parents, the innermost first.
    """

    version: int
    controllers: set[str]
    folders: list[str]


def cgroup_limits(host: Host) -> Cgroup:
    """Return the tightest CPU and memory limits from this process's group up to its root.

    Documentation/admin-guide/cgroup-v2.rst (cpu.max, memory.max), cgroup-v1 (cpu.cfs_quota_us).
    """
    version = None
    quotas: list[float] = []
    amounts: list[int] = []
    for hierarchy in cgroup_hierarchies(host):
        version = max(version or 1, hierarchy.version)
        for folder in hierarchy.folders:
            quota = _cpu_quota(host, folder)
            if quota is not None:
                quotas.append(quota)
            # Version 2's name, and version 1's.
            amounts += _ints(host, [f"{folder}/memory.max", f"{folder}/memory.limit_in_bytes"])
    amounts = [amount for amount in amounts if 0 < amount < NO_MEMORY_LIMIT]
    return Cgroup(version, min(quotas, default=None), min(amounts, default=None))


def cgroup_hierarchies(host: Host) -> Iterator[Hierarchy]:
    """Find the hierarchies that limit CPU or memory of this process."""
    mounts = parse_cgroup_mounts(host.read("/proc/self/mountinfo"))
    for names, path in parse_cgroup(host.read("/proc/self/cgroup")):
        controllers = set(names.split(",")) & {"cpu", "memory"}
        if controllers or not names:
            points = _mount_points(mounts, controllers)
            yield Hierarchy(1 if names else 2, controllers, _group_folders(points, path))


def _mount_points(mounts: Sequence[tuple[str, str, str, str]], controllers: set[str],
                  ) -> list[tuple[str, str]]:
    """Return (root, mount point) of the hierarchy of these controllers; of none, version 2's."""
    points = []
    for root, point, kind, options in mounts:
        # Version 1 has its controllers among the options of the mount.
        is_wanted = bool(controllers & set(options.split(",")))
        if not controllers:
            is_wanted = kind == "cgroup2"
        if is_wanted:
            points.append((root, point))
    if points:
        return points
    if controllers:
        return [("/", f"{CGROUPS}/{name}") for name in sorted(controllers)]
    return [("/", CGROUPS)]


def _group_folders(points: Sequence[tuple[str, str]], path: str) -> list[str]:
    """Return the folders of a control group and its parents, below the mount of its hierarchy."""
    folders = []
    for root, point in points:
        inner = path
        if root != "/" and f"{path}/".startswith(f"{root}/"):
            inner = path[len(root):]
        # In a container the path may be the host's, which does not exist here; its parents do.
        parts = [part for part in inner.split("/") if part not in ("", ".", "..")]
        parts = parts[:MAX_CGROUP_DEPTH]
        while parts:
            folders.append("/".join([point, *parts]))
            parts.pop()
        folders.append(point)
    return folders


def _cpu_quota(host: Host, folder: str) -> float | None:
    """Return a quota in CPUs; "max" and -1 mean none."""
    words = (host.read(f"{folder}/cpu.max") or "").split()
    if len(words) == 2:  # version 2
        quota = parse_int(words[0]) or 0
        period = parse_int(words[1]) or 0
    else:
        quota = _int(host, f"{folder}/cpu.cfs_quota_us") or 0
        period = _int(host, f"{folder}/cpu.cfs_period_us") or 0
    if quota > 0 and period > 0:
        return quota / period
    return None


def detect_virtual(survey: Survey) -> Findings:
    """Find the kinds of virtual machine and container; None if it is neither."""
    host = survey.host
    return {
        "virtual": virtual_kind(host),
        "container": _container_kind(host),
    }


def _container_kind(host: Host) -> str | None:
    # systemd's container interface: the manager writes its own name there.
    name = _word(host, "/run/systemd/container")
    if name:
        return name
    for path, kind in CONTAINER_FILES:
        if host.exists(path):
            return kind
    groups = host.read("/proc/self/cgroup")
    paths = " ".join(path for _, path in parse_cgroup(groups))
    return _first(kind for word, kind in CONTAINER_PATHS if word in paths)


def virtual_kind(host: Host) -> str | None:
    """Return the kind of virtual machine; None is bare metal, as far as the machine shows."""
    # The kernel of WSL is called such as 5.15.90.1-microsoft-standard-WSL2.
    release = host.read(f"{KERNEL}/osrelease") or ""
    if "microsoft" in release.lower():
        return "wsl"
    if host.exists("/proc/device-tree/hypervisor/compatible"):
        return "kvm"

    # x86: bit 31 of CPUID leaf 1, ECX. It decides, for a rented bare machine has the name of its
    # cloud in DMI too.
    merged = merge_blocks(parse_blocks(host.read("/proc/cpuinfo")))
    flags = merged.get("flags")
    if flags is not None and "hypervisor" not in flags.split():
        return None

    board = (_board(host) or "").lower()
    named = _first(kind for words, kind in VIRTUAL_DMI if words in board)
    kind = _word(host, "/sys/hypervisor/type") or named
    if kind is None and flags is not None:
        return "vm"
    return kind


def detect_node_type(survey: Survey) -> Findings:
    """Apply the seed's rule: a laptop has a battery, a server many threads and much memory."""
    hw = survey.hw
    if hw.has_battery:
        return {"node_type": "laptop"}
    if hw.cpu_threads is None or hw.ram_bytes is None:
        return {"node_type": Unknown("called desktop, for threads or memory are unknown")}
    if hw.cpu_threads > SERVER_THREADS and hw.ram_bytes > SERVER_RAM_BYTES:
        return {"node_type": "server"}
    return {"node_type": "desktop"}


# ---- 7 Devices -----------------------------------------------------------------------------------

POWERCAP = "/sys/class/powercap"
SUPPLY = "/sys/class/power_supply"
HWMON = "/sys/class/hwmon"
THERMAL = "/sys/class/thermal"
PCI = "/sys/bus/pci/devices"
DRM = "/sys/class/drm"
SECTOR_BYTES = 512  # of /sys/class/block/*/size, whatever the device's own sectors are
GPU_ORDER = {"NVIDIA": 0, "AMD": 1, "Intel": 2}  # the one that a job would use comes first

PROGRAM_S = 10.0  # nvidia-smi takes 0.1 to 1 s to start; one that hangs must not hold up the rest
SMI_IDENTITY = (
    "index", "name", "uuid", "pci.bus_id", "driver_version", "memory.total", "power.limit",
)
SMI_RECORDED = "/recorded/nvidia-smi"  # in the tree of a recording: what nvidia-smi printed

# Linux 5.10 closed the counters, since they betray what other programs compute (CVE-2020-8694).
RAPL_FIX = (
    "only root may read it since Linux 5.10; to allow it for good: echo 'SUBSYSTEM==\"powercap\", "
    'KERNEL=="intel-rapl*:*", ACTION=="add", RUN+="/bin/chmod a+r /sys%p/energy_uj"\' | sudo tee '
    "/etc/udev/rules.d/60-ffdist-rapl.rules && sudo udevadm control --reload && "
    "sudo udevadm trigger --subsystem-match=powercap --action=add")


def detect_gpus(survey: Survey) -> Findings:
    """Find the GPUs of the PCI bus and of boards, with the facts that nvidia-smi adds."""
    host = survey.host
    gpus = [*_pci_gpus(host), *_board_gpus(host)]
    rows, trouble = _ask_smi(host)
    gpus = _merge_smi(gpus, rows)
    gpus.sort(key=_gpu_rank)

    # Several cards of one kind are named once.
    titles = dict.fromkeys(gpu.title for gpu in gpus)
    found: Findings = {
        "gpus": tuple(gpus),
        "has_gpu": bool(gpus),
        "gpu_type": " + ".join(titles) or None,
    }
    if not gpus and not (host.exists(PCI) or host.exists(DRM)):
        found["gpus"] = Unknown(f"neither {PCI} nor {DRM} exists")
    if trouble and any(gpu.vendor == "NVIDIA" for gpu in gpus):
        found["problems"] = [f"nvidia-smi: {trouble}"]
    return found


def _gpu_rank(gpu: Gpu) -> tuple[int, bool]:
    """Return a sort key: by maker, and a card before what is part of the processor."""
    return GPU_ORDER.get(gpu.vendor, len(GPU_ORDER)), bool(gpu.integrated)


def _pci_gpus(host: Host) -> Iterator[Gpu]:
    """Find displays of those who make encoders."""
    for address in host.list(PCI):
        path = f"{PCI}/{address}"
        kind = host.read(f"{path}/class") or ""
        if not kind.startswith("0x03"):
            continue
        vendor = _word(host, f"{path}/vendor") or ""
        device = _word(host, f"{path}/device") or ""
        driver = host.link(f"{path}/driver")
        # A card with vfio-pci was handed to a virtual machine: it is not ours.
        if vendor in GPU_VENDORS and driver != "vfio-pci":
            gpu = Gpu(
                GPU_VENDORS[vendor],
                f"GPU {vendor[2:]}:{device[2:]}",
                path=path,
                pci=address,
                driver=driver,
                render_node=_render_node(host, path))
            yield _with_sysfs(host, gpu, vendor[2:], device[2:])


def _with_sysfs(host: Host, gpu: Gpu, vendor: str, device: str) -> Gpu:
    """Add the names and sizes that the driver and pci.ids have."""
    # NVIDIA's driver has its name there, amdgpu in sysfs, and for the rest pci.ids.
    information = host.read(f"/proc/driver/nvidia/gpus/{gpu.pci}/information")
    model = merge_blocks(parse_blocks(information)).get("Model")
    names = [parse_word(model), _word(host, f"{gpu.path}/product_name")]
    for folder in ("misc", "hwdata"):  # Debian's place, and Fedora's
        listed = host.read(f"/usr/share/{folder}/pci.ids")
        names.append(parse_pci_name(listed, vendor, device))
    return replace(
        gpu,
        name=_first(names) or gpu.name,
        driver_version=_word(host, f"/sys/module/{gpu.driver}/version"),
        memory_bytes=_int(host, f"{gpu.path}/mem_info_vram_total"),
        integrated=_is_integrated(host, gpu))


def _is_integrated(host: Host, gpu: Gpu) -> bool:
    """Return whether a GPU is part of the processor.

    Documentation/gpu/amdgpu/thermal.rst: in1, the north bridge, exists on APUs alone. Intel's own
    are on the first bus.
    """
    if gpu.vendor == "AMD":
        base = f"{gpu.path}/hwmon"
        volts = [f"{base}/{chip}/in1_input" for chip in host.list(base)]
        return bool(_ints(host, volts))
    return gpu.vendor == "Intel" and str(gpu.pci).startswith("0000:00:")


def _render_node(host: Host, path: str) -> str | None:
    names = host.list(f"{path}/drm")
    return _first(f"/dev/dri/{name}" for name in names if name.startswith("renderD"))


def _board_gpus(host: Host) -> Iterator[Gpu]:
    """Find GPUs that are on no PCI bus by their driver."""
    for card in host.list(DRM):
        if not re.fullmatch(r"card[0-9]+", card, re.ASCII):
            continue
        path = f"{DRM}/{card}/device"
        driver = host.link(f"{path}/driver")
        # Cards of the PCI bus are here too, and were found there.
        if driver in BOARD_GPUS:
            vendor, name = BOARD_GPUS[driver]
            yield Gpu(
                vendor,
                name,
                driver=driver,
                render_node=_render_node(host, path),
                integrated=True,
                path=path)


def smi_argv(program: str, fields: Iterable[str]) -> list[str]:
    """Return the command that asks nvidia-smi for fields, a line of plain values for each GPU."""
    return [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def _ask_smi(host: Host) -> tuple[list[dict[str, str]], str]:
    """Ask nvidia-smi what the GPUs are; return its rows, or why there are none."""
    # A tree may bring a program of its own, as those of the tests do; a recording has its text.
    program = host.which("nvidia-smi")
    if program is None:
        if host.foreign:
            return _recorded_rows(host)
        return [], SMI_MISSING
    result = host.run(smi_argv(program, SMI_IDENTITY), PROGRAM_S)
    rows = parse_csv(result.stdout, SMI_IDENTITY)
    if rows:
        return rows, ""
    # Such as "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver…".
    words = (result.stderr or result.stdout).strip()
    if words:
        return [], words.splitlines()[0][:MAX_REASON]
    return [], f"exit code {result.returncode}"


SMI_MISSING = "not installed, so power, usage and memory of the NVIDIA GPU stay unknown"


def _recorded_rows(host: Host) -> tuple[list[dict[str, str]], str]:
    """Return what nvidia-smi printed on a machine that was recorded."""
    recorded = host.read(SMI_RECORDED) or ""
    head, _, table = recorded.partition("\n")
    fields = head.split(",")
    if set(SMI_IDENTITY) <= set(fields):
        rows = parse_csv(table, fields)
        if rows:
            return rows, ""
    return [], SMI_MISSING


def _merge_smi(gpus: Sequence[Gpu], rows: Iterable[Mapping[str, str]]) -> list[Gpu]:
    """Add what nvidia-smi has of each GPU, and the GPUs that it alone knows."""
    merged = list(gpus)
    for row in rows:
        address = parse_pci_address(row["pci.bus_id"])
        places = [gpu.pci for gpu in merged]
        if address is not None and address in places:
            at = places.index(address)
            merged[at] = _with_smi(merged[at], row)
        else:  # in a container that hides the bus
            gpu = Gpu("NVIDIA", "GPU", driver="nvidia", pci=address)
            merged.append(_with_smi(gpu, row))
    return merged


def _with_smi(gpu: Gpu, row: Mapping[str, str]) -> Gpu:
    return replace(
        gpu,
        name=parse_word(row["name"]) or gpu.name,
        index=parse_int(row["index"]),
        uuid=parse_word(row["uuid"]),
        driver_version=parse_word(row["driver_version"]),
        memory_bytes=parse_mib(row["memory.total"]),
        integrated=False,
        power_limit_watts=parse_float(row["power.limit"]))


def detect_rapl(survey: Survey) -> Findings:
    """Find the energy counters, and whether this process may read them."""
    host = survey.host
    zones = rapl_zones(host)
    if not zones:
        return {"rapl": Unknown(why_no_rapl(host))}

    mirrors: dict[str, str] = {}
    if may_mirror(host, zones):
        first = read_counters(host, zones)
        again = read_counters(host, zones)
        mirrors = mirrored(zones, first, again)

    found: Findings = {}
    rows = []
    # A closed core counter is no loss where its package is open, so each has its own reason.
    for zone in zones:
        rows.append(replace(zone, mirror_of=mirrors.get(zone.name)))
        if not zone.readable:
            found[f"rapl.{zone.name}"] = Unknown(why_closed(host, zone))
    return {**found, "rapl": tuple(rows)}


def why_no_rapl(host: Host) -> str:
    """Return why there is no energy counter at all."""
    kind = virtual_kind(host)
    if kind:
        return f"no RAPL: a virtual machine ({kind})"
    if host.exists(POWERCAP):
        return f"no RAPL: {POWERCAP} holds no intel-rapl zone (load the module intel_rapl_msr)"
    return f"no RAPL: {POWERCAP} is missing (no Intel or AMD processor, or it is hidden from here)"


def why_closed(host: Host, zone: RaplZone) -> str:
    """Return why a counter cannot be read, and how to allow it for good."""
    why = host.why(counter_path(zone))
    if "permission denied" in why:
        return f"{why}; {RAPL_FIX}"
    return why


def counter_path(zone: RaplZone) -> str:
    """Return the file of a zone's counter."""
    return f"{POWERCAP}/{zone.zone}/energy_uj"


# Names of the zones that psys or a package may go by: "package-0-die-1", and psys "psys-1" after
# the socket whose counter has it if that is not the first (intel_rapl_common.c).
_PACKAGE = re.compile(r"package-([0-9]+(?:-die-[0-9]+)?)", re.ASCII)
_PSYS = re.compile(r"psys(?:-[0-9]{1,3})?", re.ASCII)
_ZONE_FOLDER = re.compile(r"(intel-rapl(?:-mmio)?:([0-9]+))(?::[0-9]+)?", re.ASCII)


def rapl_zones(host: Host) -> tuple[RaplZone, ...]:
    """Find the zones, under names of their own: "package-0", "dram-1".

    Each socket has zones of the same names, and intel-rapl-mmio repeats counters of intel-rapl. Of
    a zone that exists twice, the readable one counts, and intel-rapl's before the other.
    """
    # A stable sort: intel-rapl first, and each package before its parts.
    folders = sorted(host.list(POWERCAP), key=_family)
    found: dict[str, RaplZone] = {}
    sockets: dict[str, str] = {}  # folder of a package -> its number, for the names of its parts
    for folder in folders:
        match = _ZONE_FOLDER.fullmatch(folder)
        if match is None:
            continue
        word = _word(host, f"{POWERCAP}/{folder}/name") or "zone"
        package = _PACKAGE.fullmatch(word)
        if package is not None:
            sockets[folder] = package.group(1)

        # A part has only its kind for a name, so its package's number is added.
        kind = _zone_kind(word)
        name = word
        if kind not in ("package", "psys"):
            name = f"{word}-{sockets.get(match.group(1), match.group(2))}"
        if name in found and _family(found[name].zone) == _family(folder):
            name += f"#{folder.partition(':')[2]}"  # not a mirror but another zone of that name

        zone = _read_zone(host, name, kind, folder)
        if name not in found or (zone.readable and not found[name].readable):
            found[name] = zone
    return tuple(found[name] for name in sorted(found, key=natural))


def _zone_kind(word: str) -> str:
    if _PACKAGE.fullmatch(word):
        return "package"
    if _PSYS.fullmatch(word):
        return "psys"
    return word if word in ("core", "uncore", "dram") else "other"


def _family(folder: str) -> str:
    """Return intel-rapl or intel-rapl-mmio."""
    return folder.partition(":")[0]


def _read_zone(host: Host, name: str, kind: str, folder: str) -> RaplZone:
    span = _int(host, f"{POWERCAP}/{folder}/max_energy_range_uj")
    readable = _int(host, f"{POWERCAP}/{folder}/energy_uj") is not None
    return RaplZone(name, kind, folder, span, readable)


def may_mirror(host: Host, zones: Sequence[RaplZone]) -> bool:
    """Return whether packages may repeat each other, as the dies of some of AMD's processors do."""
    packages = [zone for zone in zones if zone.kind == "package"]
    if len(packages) < 2:
        return False
    return "GenuineIntel" not in (host.read("/proc/cpuinfo") or "")


def read_counters(host: Host, zones: Iterable[RaplZone]) -> dict[str, int]:
    """Read each counter that can be read, in µJ."""
    found = {}
    for zone in zones:
        counter = _int(host, counter_path(zone))
        if counter is not None:
            found[zone.name] = counter
    return found


def mirrored(zones: Sequence[RaplZone], first: Mapping[str, int], again: Mapping[str, int],
             ) -> dict[str, str]:
    """Return {zone: the earlier zone of its kind whose counter it shows}, by two readings of all.

    Between the two readings of the earlier zone's counter came the first reading of this one. If
    both are one register, the value lies between those two.
    """
    found: dict[str, str] = {}
    originals: list[RaplZone] = []
    for zone in zones:
        if zone.name not in first or zone.name not in again:
            continue
        for other in originals:
            if zone.kind != other.kind or zone.range_uj != other.range_uj:
                continue
            span = zone.range_uj or 2**63
            begin = first[other.name]
            bracket = (again[other.name] - begin) % span  # modulo, for it may wrap meanwhile
            if (first[zone.name] - begin) % span <= bracket:
                found[zone.name] = other.name
                break
        else:
            originals.append(zone)
    return found


def detect_sensors(survey: Survey) -> Findings:
    """Find temperatures, power meters and fans."""
    host = survey.host
    hwmon = [*_hwmon_sensors(host), *_ina3221_sensors(host)]
    found = (*hwmon, *_thermal_sensors(host))
    nothing = f"neither {HWMON} nor {THERMAL} has a sensor"
    return {"sensors": known(found, nothing)}


_SENSOR_FILE = re.compile(r"((temp|power|fan|energy)[0-9]+)_(input|average)", re.ASCII)


def _hwmon_sensors(host: Host) -> Iterator[Sensor]:
    for entry in host.list(HWMON):
        base = f"{HWMON}/{entry}"
        chip = _word(host, f"{base}/name") or entry
        names = host.list(base)
        # Files such as temp1_max and temp1_crit are limits, not readings.
        for name in names:
            match = _SENSOR_FILE.fullmatch(name)
            if match is None:
                continue
            channel, kind, _ = match.groups()
            if name.endswith("_input") and f"{channel}_average" in names:
                continue  # the same channel, of an instant only
            value = _int(host, f"{base}/{name}")
            if value is not None:
                unit, scale = SENSOR_UNITS[kind]
                label = _word(host, f"{base}/{channel}_label") or channel
                yield Sensor(chip, label, unit, value * scale, f"{base}/{name}")


def _ina3221_sensors(host: Host) -> Iterator[Sensor]:
    """Find the channels of Documentation/hwmon/ina3221.rst, which gives mV and mA of each."""
    for entry in host.list(HWMON):
        base = f"{HWMON}/{entry}"
        if _word(host, f"{base}/name") != "ina3221":
            continue
        for channel in "123":  # a fourth current is the sum of these
            label = _word(host, f"{base}/in{channel}_label")
            current = f"{base}/curr{channel}_input"
            numbers = _ints(host, [current, f"{base}/in{channel}_input"])
            if label and len(numbers) == 2:
                watts = math.prod(numbers) / 1e6
                yield Sensor("ina3221", label, "watts", watts, current)


def _thermal_sensors(host: Host) -> Iterator[Sensor]:
    """Find the thermal zones: Documentation/driver-api/thermal/sysfs-api.rst, in m°C."""
    for zone in host.list(THERMAL):
        if not zone.startswith("thermal_zone"):  # but a cooling device
            continue
        base = f"{THERMAL}/{zone}"
        value = _int(host, f"{base}/temp")
        if value is not None:
            chip = _word(host, f"{base}/type") or zone
            yield Sensor(chip, zone, "celsius", value / 1000, f"{base}/temp")


def whole_machine(sensors: Sequence[Sensor]) -> list[Sensor]:
    """Choose the power sensors that together are the whole machine's; none if that is not known."""
    # All labels of a row must be there: two inputs of three are not the whole.
    for chip, labels in MACHINE_POWER:
        found = [one for one in sensors if one.unit == "watts" and one.chip == chip]
        if labels:
            found = [one for one in found if one.label in labels]
        if found and len(found) >= len(labels):
            return found
    return []


def power_files(sensor: Sensor) -> tuple[str, ...]:
    """Return the files whose product is a sensor's power in µW: power, or mA and mV."""
    folder, name = os.path.split(sensor.path)
    if name.startswith("curr"):
        return sensor.path, f"{folder}/in{name[4:]}"
    return (sensor.path,)


def battery_names(host: Host) -> list[str]:
    """Return the batteries that are present and power the machine: scope Device is a mouse's.

    Documentation/ABI/testing/sysfs-class-power.
    """
    names = []
    for name in host.list(SUPPLY):
        base = f"{SUPPLY}/{name}"
        is_battery = _word(host, f"{base}/type") == "Battery"
        is_own = _word(host, f"{base}/scope") != "Device"
        is_present = _word(host, f"{base}/present") != "0"
        if is_battery and is_own and is_present:
            names.append(name)
    return names


def detect_batteries(survey: Survey) -> Findings:
    """Find the batteries."""
    host = survey.host
    # The folder is empty on a machine without any: then it is known that there is none.
    if not host.exists(SUPPLY):
        return {"has_battery": Unknown(f"missing: {SUPPLY}")}
    found = []
    for name in battery_names(host):
        status = _word(host, f"{SUPPLY}/{name}/status")
        charge = _int(host, f"{SUPPLY}/{name}/capacity")
        found.append(Battery(name, status, charge))
    return {"batteries": tuple(found), "has_battery": bool(found)}


def detect_disks(survey: Survey) -> Findings:
    """Find the local file systems with their free space, one for each device."""
    host = survey.host
    disks = []
    found: Findings = {}
    for mount, device, kind in _local_mounts(host):
        size, free = _space(host, mount, device)
        if free is None:
            why = "another root is read" if host.foreign else "the file system does not answer"
            found[f"disks.{mount}.free_bytes"] = Unknown(why)
        if size is None:
            why = f"no size of {device} under /sys/class/block"
            found[f"disks.{mount}.size_bytes"] = Unknown(why)
        disks.append(Disk(mount, device, kind, size, free))

    missing = f"no local file system among the mounts ({host.why('/proc/self/mounts')})"
    return {**found, "disks": known(tuple(disks), missing)}


def _local_mounts(host: Host) -> list[tuple[str, str, str]]:
    """Return (mount, device, type) of each local file system, once, where its path is shortest.

    Those without a device in /dev, such as overlay, are each one of their own.
    """
    # Bind mounts and containers show one device at many places.
    best: dict[str, tuple[str, str, str]] = {}
    for device, mount, kind in parse_mounts(host.read("/proc/self/mounts")):
        if kind not in LOCAL_FILESYSTEMS:
            continue
        identity = device
        if not device.startswith("/"):
            identity = f"{device} {mount}"
        known_mount, _, _ = best.get(identity, (None, "", ""))
        if known_mount is None or len(mount) < len(known_mount):
            best[identity] = (mount, device, kind)
    return sorted(best.values())


def _space(host: Host, mount: str, device: str) -> tuple[int | None, int | None]:
    """Return a file system's size and free bytes, as far as they can be known."""
    space = host.space(mount)
    if space is not None:
        return space
    # Of another root only the device's size is known.
    name = os.path.basename(device)
    sectors = _int(host, f"/sys/class/block/{name}/size")
    if sectors is None:
        return None, None
    return sectors * SECTOR_BYTES, None


# ---- 8 Probe -------------------------------------------------------------------------------------

# The agent registers only after the probe, so it must not take long. One encoder whose driver hangs
# must leave the others time.
PROBE_TOTAL_S = 4.5
PROBE_EACH_S = 4.0
# At least 4 at once, for hardware encoders wait for their devices and not for a CPU.
MIN_PROBES = 4
MAX_PROBES = 8

NO_FFPROBE = "ffprobe is neither beside ffmpeg nor on PATH"
FOREIGN_FFMPEG = "another root is read: its FFmpeg, run here, would show this machine's encoders"
QUALITY_FILTERS = ("psnr", "ssim", "libvmaf", "xpsnr")
DEFAULT_NODE = "/dev/dri/renderD128"  # render nodes are counted from 128: drivers/gpu/drm/drm_drv.c


class Drive(NamedTuple):
    """The options of FFmpeg before and after its input that drive a kind of encoder."""

    before: tuple[str, ...] = ()  # "{node}" is a render node of /dev/dri
    after: tuple[str, ...] = ()


DRIVES = {
    # Both take frames from memory, and upload them themselves.
    "nvenc": Drive(after=("-pix_fmt", "yuv420p")),
    "qsv": Drive(before=("-init_hw_device", "qsv=hw"), after=("-vf", "format=nv12")),
    # A filter has to upload them.
    "vaapi": Drive(before=("-vaapi_device", "{node}"), after=("-vf", "format=nv12,hwupload")),
    "v4l2m2m": Drive(after=("-pix_fmt", "yuv420p")),
    "software": Drive(after=("-pix_fmt", "yuv420p")),
    "audio": Drive(),
}


class Candidate(NamedTuple):
    """An encoder to try: its kind of drive, and its quickest settings."""

    drive: str
    fast: tuple[str, ...] = ()


# Hardware first. Each that FFmpeg lists is tried. A frame shows only whether the encoder starts, so
# the quickest settings will do.
ENCODERS = {
    "h264_nvenc": Candidate("nvenc"),
    "hevc_nvenc": Candidate("nvenc"),
    "av1_nvenc": Candidate("nvenc"),
    "h264_qsv": Candidate("qsv"),
    "hevc_qsv": Candidate("qsv"),
    "av1_qsv": Candidate("qsv"),
    "vp9_qsv": Candidate("qsv"),
    "h264_vaapi": Candidate("vaapi"),
    "hevc_vaapi": Candidate("vaapi"),
    "av1_vaapi": Candidate("vaapi"),
    "vp9_vaapi": Candidate("vaapi"),
    "h264_v4l2m2m": Candidate("v4l2m2m"),
    "libx264": Candidate("software", ("-preset", "ultrafast")),
    "libx265": Candidate("software", ("-preset", "ultrafast")),
    "libsvtav1": Candidate("software", ("-preset", "10")),
    "libaom-av1": Candidate("software", ("-cpu-used", "8")),
    "librav1e": Candidate("software", ("-speed", "10")),
    "libvpx-vp9": Candidate("software", ("-deadline", "realtime", "-cpu-used", "8")),
    "libopenh264": Candidate("software"),
    "aac": Candidate("audio"),
    "libopus": Candidate("audio"),
    "libmp3lame": Candidate("audio"),
}


class Proofs(NamedTuple):
    """The results of trying the encoders, and the render node that proved VAAPI."""

    encoders: dict[str, Proof]
    vaapi_device: str | None


def detect_ffmpeg(survey: Survey) -> Findings:
    """Find FFmpeg, what it has, and which encoders work here."""
    host = survey.host
    wanted = survey.ffmpeg or "ffmpeg"
    program = host.which(wanted)
    if program is None:
        missing = Unknown(f"{wanted} is not installed or not on PATH")
        lost = dict.fromkeys(("ffmpeg", "ffmpeg_version", "encoders", "filters"), missing)
        return {**lost, "ffprobe": Unknown(NO_FFPROBE)}

    found: Findings = {
        "ffmpeg": _own_path(host, program),
        "ffprobe": _find_ffprobe(host, program),
    }
    version, why = _version(host, program)
    if version is None:
        lost = dict.fromkeys(("ffmpeg_version", "encoders", "filters"), Unknown(why))
        return {**found, **lost}
    filters = _quality_filters(host, program)
    found["ffmpeg_version"] = version.group(1)
    found["filters"] = known(filters, f"{program} has no quality filter")
    proofs = _prove(survey, program, version.string)
    return {**found, **proofs}


def _find_ffprobe(host: Host, ffmpeg: str) -> str | Unknown:
    """Find the ffprobe of the same build, which is beside ffmpeg, or else any."""
    beside = os.path.join(os.path.dirname(ffmpeg), "ffprobe")
    program = host.which(beside) or host.which("ffprobe")
    if program is None:
        return Unknown(NO_FFPROBE)
    return _own_path(host, program)


def _own_path(host: Host, program: str) -> str:
    """Return a program's path inside the root that is read."""
    if host.foreign:
        return program[len(host.root):]
    return program


def _version(host: Host, program: str) -> tuple[re.Match[str] | None, str]:
    """Match FFmpeg's text of its version and build, or return why there is none."""
    # Not run: it may be of another architecture, and its answer would be about this machine.
    if host.foreign:
        return None, FOREIGN_FFMPEG
    result = host.run([program, "-hide_banner", "-version"], PROGRAM_S)
    version = re.match(r"ffmpeg version (\S+)", result.stdout)
    return version, f"{program} prints no version: {parse_failure(result)}"


def _quality_filters(host: Host, program: str) -> tuple[str, ...]:
    result = host.run([program, "-hide_banner", "-filters"], PROGRAM_S)
    listed = parse_listed(result.stdout)
    return tuple(name for name in QUALITY_FILTERS if name in listed)


def _prove(survey: Survey, program: str, version: str) -> Findings:
    """Try the encoders, or recall the results of an earlier start."""
    if not survey.probe:
        return {"encoders": Unknown("not tried: --no-probe")}
    memory = Memory(survey, program, version)
    proofs = memory.recall()
    if proofs is None:
        proofs = probe_encoders(survey.host, program, survey.hw.gpus)
        memory.store(proofs)
    nothing = f"{program} lists none of the known encoders"
    return {
        "encoders": known(proofs.encoders, nothing),
        "vaapi_device": proofs.vaapi_device,
        "problems": memory.problems,
    }


class Memory:
    """The results of a probe, kept for the next start in encoders.json of the state folder.

    It holds for one build of FFmpeg and one set of devices. If anything of its key differs, the
    encoders are tried again. An undecided encoder is not remembered, or it would stay so.
    """

    def __init__(self, survey: Survey, program: str, version: str) -> None:
        self.problems: list[str] = []
        self._host = survey.host
        self._key = self._key_of(survey, program, version)
        self._path = self._path_in(survey.state_dir)

    @staticmethod
    def _key_of(survey: Survey, program: str, version: str) -> Json:
        """Return all that the result of a probe depends on."""
        host = survey.host
        devices = [[node, host.usable(node)] for node in _device_nodes(host)]
        gpus = []
        for gpu in survey.hw.gpus:
            gpus.append([gpu.vendor, gpu.name, gpu.pci, gpu.driver, gpu.driver_version])
        return {
            "ffmpeg": host.stamp(program),
            "version": version,
            "devices": devices,
            "gpus": gpus,
        }

    def _path_in(self, state_dir: str | None) -> str | None:
        """Return the file, None if there is no folder for it or others could write there."""
        if state_dir is None:
            return None
        folder = os.path.abspath(state_dir)
        # A folder that does not exist yet is made by store(), for this user alone.
        why = why_shared(folder) if os.path.isdir(folder) else ""
        if why:
            self.problems.append(f"the encoders found cannot be kept in {folder}: {why}")
            return None
        return os.path.join(folder, "encoders.json")

    def recall(self) -> Proofs | None:
        """Return the results of an earlier probe of the same FFmpeg and devices."""
        if self._path is None:
            return None
        text = self._host.read(self._path) or ""
        try:
            kept = json.loads(text)
            reasons = dict(kept["encoders"])
            device = kept["vaapi_device"]
            same = kept["key"] == self._key
        # Somebody may have edited or cut the file, so it can hold anything.
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        words = [word for word in (*reasons.values(), device) if word is not None]
        if not same or not all(isinstance(word, str) for word in words):
            return None
        encoders = {name: _kept_proof(reason) for name, reason in reasons.items()}
        return Proofs(encoders, device)

    def store(self, proofs: Proofs) -> None:
        """Keep the results of a probe, if all are sure."""
        states = {proof.state for proof in proofs.encoders.values()}
        if self._path is None or not states or "undecided" in states:
            return
        kept = {
            "key": self._key,
            "encoders": {name: proof.reason for name, proof in proofs.encoders.items()},
            "vaapi_device": proofs.vaapi_device,
        }
        text = json.dumps(kept, indent=1)
        trouble = replace_file(self._path, text)
        if trouble:
            self.problems.append(f"the encoders found cannot be kept: {trouble}")


def _device_nodes(host: Host) -> list[str]:
    """Return the devices that an encoder may need: render nodes, NVIDIA's, and those of v4l2."""
    nodes = []
    for name in host.list("/dev/dri"):
        if name.startswith("renderD"):
            nodes.append(f"/dev/dri/{name}")
    for name in host.list("/dev"):
        if re.match(r"nvidia[0-9c]|video[0-9]", name):
            nodes.append(f"/dev/{name}")
    return nodes


def _kept_proof(reason: str | None) -> Proof:
    """Return a proof from its reason in the file, which has no undecided ones."""
    if reason is None:
        return Proof("proved")
    return Proof("failed", reason)


def probe_encoders(host: Host, ffmpeg: str, gpus: Sequence[Gpu]) -> Proofs:
    """Try each candidate that FFmpeg lists, side by side, within PROBE_TOTAL_S."""
    trial = _Trial(host, ffmpeg, gpus)  # its time runs from here
    result = host.run([ffmpeg, "-hide_banner", "-encoders"], PROBE_EACH_S)
    listed = parse_listed(result.stdout)
    names = [name for name in ENCODERS if name in listed]
    cpus = os.cpu_count() or 1
    workers = min(MAX_PROBES, max(MIN_PROBES, cpus))
    with ThreadPoolExecutor(max_workers=workers) as pool:
        proofs = pool.map(trial.prove, names)
        encoders = dict(zip(names, proofs))
    # Several encoders may have proved several nodes: always choose the same.
    return Proofs(encoders, min(trial.proved_on, default=None))


class _Trial:
    """One round of trying encoders; its time runs from when it is made."""

    def __init__(self, host: Host, ffmpeg: str, gpus: Sequence[Gpu]) -> None:
        self._host = host
        self._ffmpeg = ffmpeg
        self._end = time.monotonic() + PROBE_TOTAL_S
        # NVIDIA's driver has no VAAPI encoders.
        nodes = [gpu.render_node for gpu in gpus if gpu.vendor != "NVIDIA"]
        self._nodes = [node for node in nodes if node] or [DEFAULT_NODE]
        self.proved_on: list[str] = []  # render nodes

    def prove(self, name: str) -> Proof:
        """Try an encoder, of VAAPI on each render node until one works."""
        if ENCODERS[name].drive != "vaapi":
            return self._try(name, DEFAULT_NODE)
        proofs = []
        for node in self._nodes:
            proof = self._try(name, node)
            if proof.state == "proved":
                self.proved_on.append(node)
                return proof
            proofs.append(proof)
        # It may still work on a node that had not enough time.
        undecided = [proof for proof in proofs if proof.state == "undecided"]
        return [*undecided, *proofs][0]

    def _try(self, name: str, node: str) -> Proof:
        left_s = min(PROBE_EACH_S, self._end - time.monotonic())
        if left_s <= 0:
            all_of_it = f"{PROBE_TOTAL_S} s for all encoders: try again when less is going on"
            return Proof("undecided", f"{NO_ANSWER} {all_of_it}")
        result = self._host.run(probe_argv(self._ffmpeg, name, node), left_s)
        if result.returncode == 0:
            return Proof("proved")
        state = "undecided" if result.timed_out else "failed"
        return Proof(state, parse_failure(result))


def probe_argv(ffmpeg: str, name: str, node: str = DEFAULT_NODE) -> list[str]:
    """Return the command that encodes one frame, or of an audio encoder a short tone."""
    candidate = ENCODERS[name]
    drive = DRIVES[candidate.drive]
    before = [option.replace("{node}", node) for option in drive.before]
    # NVENC refuses less than 256x256.
    source = "testsrc2=size=640x480"
    encoder = ["-frames:v", "1", "-c:v", name]
    if candidate.drive == "audio":
        source = "sine=duration=0.1"
        encoder = ["-c:a", name]
    return [
        ffmpeg, "-hide_banner", "-nostdin", "-v", "error",
        *before,
        "-f", "lavfi", "-i", source,
        *drive.after,
        *encoder,
        *candidate.fast,
        "-f", "null", "-",
    ]


# ---- 9 Detectors ---------------------------------------------------------------------------------

# The agent has no such flag, but its environment variable names the agent's ffmpeg too.
FFMPEG_FLAG = Flag("--ffmpeg", None, str, "the ffmpeg to use (the one on PATH)", "PROGRAM")
DETECTOR_FAILED = "its detector failed, see problems"


class Detector(NamedTuple):
    """A function that finds some fields of Hardware, which no other detector finds."""

    name: str
    detect: Callable[[Survey], Findings]
    fields: tuple[str, ...]


# In this order: limits needs the CPUs, ffmpeg the GPUs, the node type CPUs, memory and batteries.
# To add a fact, give Hardware a field and put it in a row here.
DETECTORS = (
    Detector(
        "system",
        detect_system,
        ("address", "machine", "os", "os_name", "kernel")),
    Detector(
        "cpu",
        detect_cpu,
        ("cpu_model", "cpu_vendor", "cpu_logical", "cpu_cores", "cpu_sockets", "cpu_flags",
         "cpu_mhz_max", "arch")),
    Detector(
        "limits",
        detect_limits,
        ("cgroup", "cpu_threads", "ram_bytes", "memory_total_bytes", "memory_available_bytes",
         "swap_bytes")),
    Detector("virtual", detect_virtual, ("virtual", "container")),
    Detector("batteries", detect_batteries, ("has_battery", "batteries")),
    Detector("gpus", detect_gpus, ("has_gpu", "gpu_type", "gpus")),
    Detector("rapl", detect_rapl, ("rapl",)),
    Detector("sensors", detect_sensors, ("sensors",)),
    Detector("disks", detect_disks, ("disks",)),
    Detector("node_type", detect_node_type, ("node_type",)),
    Detector(
        "ffmpeg",
        detect_ffmpeg,
        ("ffmpeg", "ffprobe", "ffmpeg_version", "filters", "encoders", "vaapi_device")),
)


def detect(host: Host, probe: bool = True, state_dir: str | None = None,
           ffmpeg: str | None = None) -> Hardware:
    """Find out what the machine is. Never fails: each field that is unknown has its reason.

    `probe` tries each encoder on a real frame (seconds, kept in `state_dir` for the next start);
    `ffmpeg` is a program to use instead of FFDIST_FFMPEG or the one on PATH.
    """
    # The environment is this machine's, and means no program of another root.
    if ffmpeg is None and not host.foreign:
        ffmpeg = FFMPEG_FLAG.setting
    hw = Hardware()
    for detector in DETECTORS:
        survey = Survey(host, hw, probe, state_dir, ffmpeg)
        hw = _with_findings(hw, _findings(detector, survey))
    return hw


def detect_only(host: Host, *names: str) -> Hardware:
    """Run a few detectors, those that need no others."""
    hw = Hardware()
    for detector in DETECTORS:
        if detector.name in names:
            survey = Survey(host, hw, False, None, None)
            hw = _with_findings(hw, _findings(detector, survey))
    return hw


def _findings(detector: Detector, survey: Survey) -> Findings:
    """Run a detector. If it fails, its own fields are unknown, and no others.

    Any exception counts: drivers and firmware fill these files, and a text that nobody foresaw must
    not cost the whole answer.
    """
    try:
        return detector.detect(survey)
    except Exception as error:
        lost = dict.fromkeys(detector.fields, Unknown(DETECTOR_FAILED))
        words = str(error)[:MAX_REASON]
        problem = f"{detector.name}: {type(error).__name__}: {words}"
        return {**lost, "problems": [problem]}


def _with_findings(hw: Hardware, findings: Findings) -> Hardware:
    """Add findings to the facts: a field that is unknown stays at its default, with the reason."""
    values: Findings = {}
    unknown = dict(hw.unknown)
    for name, value in findings.items():
        if isinstance(value, Unknown):
            unknown[name] = value.reason
        elif name != "problems":
            values[name] = value
    problems = [*hw.problems, *findings.get("problems", [])]
    return replace(hw, **values, unknown=unknown, problems=problems)


# ---- 10 Power ------------------------------------------------------------------------------------

FIRST_SAMPLE = "the first sample: a rate needs two"
# A counter that seems to have wrapped at more than this was reset instead: no zone draws as much.
COUNTER_RESET_W = 5_000
# Nor does one draw more than 10 times its highest power so far plus 500 W. Suspending the machine
# resets counters, which then seem to have wrapped.
RESET_FACTOR = 10
RESET_ALLOWANCE_W = 500
# Some kernels and virtual machines show counters that never move. They move every millisecond, so
# after this time without any move since the start they do not count.
STILL_S = 10.0
# A counter must not wrap twice between two readings, so it is read before it could wrap once at
# this power: not more often than POLL_MIN_S, nor, to notice resets, more seldom than POLL_MAX_S.
MAX_ZONE_W = 1_000
POLL_MIN_S = 0.1
POLL_MAX_S = 10.0


class Integral:
    """Joules of a power that is read now and then: trapezoids between neighbours."""

    def __init__(self, most_s: float = math.inf) -> None:
        """Make one; neighbours that are more than `most_s` apart leave a gap between them."""
        self.joules = 0.0
        self.covered_s = 0.0
        self._most_s = most_s
        self._last: tuple[float, float] | None = None

    def add(self, when: float, watts: float | None) -> float:
        """Add a reading and return the joules so far.

        None leaves a gap that has no joules. A reading out of order is ignored, unless it is so
        much older that the clock must have been set.
        """
        if self._last is not None:
            then, before = self._last
            elapsed = when - then
            if -self._most_s <= elapsed < 0:
                return self.joules
            if watts is not None and 0 < elapsed <= self._most_s:
                mean = (watts + before) / 2
                self.joules += mean * elapsed
                self.covered_s += elapsed
        self._last = None if watts is None else (when, watts)
        return self.joules

    def pause(self) -> None:
        """Leave a gap until the next reading."""
        self._last = None


@dataclass(frozen=True)
class PowerReading:
    """The machine's power by one source. Without joules the source has no answer now.

    `why` is the reason that joules are unknown, or watts alone; `notes` are reasons of parts.
    """

    joules: float | None = None  # since the sampler's start
    watts: float | None = None  # since the previous sample
    covered_s: float = 0.0  # the time that the joules are of
    why: str = ""
    source: str | None = None
    zones: dict[str, float] = field(default_factory=dict)  # joules of the parts it is made of
    notes: dict[str, str] = field(default_factory=dict)


class PowerSource:
    """One way to measure the machine's power. It owns its previous readings.

    To write one, name it, look for its files in __init__(), and return from sample() either joules
    since the start with the time that they are of, or the reason why there are none. A source is
    sampled at each sample of the machine, until one before it in MACHINE_SOURCES answers. Then it
    is paused, so that it does not take the time in between for its own.
    """

    name: ClassVar[str]
    resolution: ClassVar[str]  # how finely it measures, for people

    def __init__(self, host: Host, hardware: Hardware) -> None:
        self._host = host

    @property
    def includes_gpus(self) -> bool:
        """Return whether its joules include the GPUs', so that nobody adds the two."""
        return True

    @property
    def patience_s(self) -> float:
        """Return the longest time between two readings of it."""
        return POLL_MAX_S

    def sample(self, now: float, cpu_percent: float | Unknown) -> PowerReading:
        """Take a reading at `now`, in seconds of a monotonic clock."""
        raise NotImplementedError

    def between(self, now: float) -> None:
        """Keep up with its counters between two samples further apart than `patience_s`."""

    def pause(self) -> None:
        """Leave a gap from the last reading to the next."""


PACKAGE_KINDS = ("package", "dram")  # zones that add up: cores are in their package, dram is not


class ZoneCounter:
    """The counter of one RAPL zone: turns its readings into joules."""

    def __init__(self, zone: RaplZone) -> None:
        self.zone = zone
        self.was_read = False
        self._counter = 0
        self._read_at = 0.0
        self._most_w: float | None = None  # seen so far

    def gain(self, counter: int, now: float) -> float | Unknown | None:
        """Return the joules since the previous reading: None without one, Unknown if in doubt."""
        first = not self.was_read
        moved_uj = counter - self._counter
        elapsed = now - self._read_at
        self.was_read = True
        self._counter = counter
        self._read_at = now
        if first:
            return None

        wrapped = moved_uj < 0
        if wrapped:
            moved_uj += self.zone.range_uj or 0
        joules = moved_uj / 1e6
        if joules < 0 or (wrapped and self._is_reset(joules, elapsed)):
            return Unknown("its counter was reset: an interval's joules are missing")
        if self._may_wrap_twice(elapsed):
            return Unknown(f"its counter may have wrapped more than once in {elapsed:.0f} s")

        if elapsed >= POLL_MIN_S / 2:  # the power of a shorter time is mostly noise
            self._most_w = max(self._most_w or 0.0, joules / elapsed)
        return joules

    def _is_reset(self, joules: float, elapsed: float) -> bool:
        """Return whether a counter that wrapped would mean more power than can be."""
        limit_w: float = COUNTER_RESET_W
        if self._most_w is not None:
            likely_w = RESET_ALLOWANCE_W + RESET_FACTOR * self._most_w
            limit_w = min(limit_w, likely_w)
        return joules > limit_w * elapsed > 0

    def _may_wrap_twice(self, elapsed: float) -> bool:
        """Return whether the counter goes round once in this time at the most power seen."""
        if not self.zone.range_uj or self._most_w is None:
            return False
        most_uj = self._most_w * elapsed * 1e6
        return most_uj >= self.zone.range_uj


class ZoneStep(NamedTuple):
    """One reading of the zones, without those that only mirror another."""

    counters: dict[str, int]  # µJ
    moved: dict[str, float]  # joules since the previous reading, where that is known
    new: set[str]  # zones that were read for the first time
    mirrors: set[str]


class RaplSource(PowerSource):
    """The energy counters of the processor: Documentation/power/powercap/powercap.rst.

    They are not simply added up. psys includes the packages, and a package its cores; dram is
    apart. So the total is psys where there is one, else packages and dram. Packages that are dies
    of one processor may all show one counter, which counts once. A counter starts again at 0 when
    it has reached its range, and after a suspend.

    A power is only known between two samples in which every zone that counts was read. The joules
    of an interval with a gap count, but not its time: see `covered_s`.
    """

    name = "rapl"
    resolution = "energy counters that move about every millisecond"

    def __init__(self, host: Host, hardware: Hardware) -> None:
        super().__init__(host, hardware)
        self._counters: dict[str, ZoneCounter] = {}
        self._listed: list[str] = []
        self._may_mirror = False
        self._alike: dict[str, str] = {}  # zones that showed another's counter at the last reading
        self._absence = ""  # why there is no counter at all, once it is known
        self._joules = 0.0
        self._covered_s = 0.0
        self._zones: dict[str, float] = {}  # joules
        self._psys_counts = False
        self._whole_at: float | None = None  # the last sample in which all that count were read
        self._since = 0.0  # joules since then
        self._lost = False  # whether some of them are missing
        self._still_s = 0.0  # how long the counters have not moved since the start
        self._look()

    @property
    def includes_gpus(self) -> bool:
        return self._psys_counts

    @property
    def patience_s(self) -> float:
        """Return how long until a counter may have wrapped, within limits."""
        patience_s = POLL_MAX_S
        for zone in self._all_zones():
            if zone.range_uj:
                wrap_s = zone.range_uj / 1e6 / MAX_ZONE_W
                patience_s = min(patience_s, wrap_s)
        return max(POLL_MIN_S, patience_s)

    def sample(self, now: float, cpu_percent: float | Unknown) -> PowerReading:
        notes: dict[str, str] = {}
        watts = self._advance(now, notes)
        zones = {name: round(joules, 6) for name, joules in self._zones.items()}
        parts = PowerReading(zones=zones, notes=notes)
        why = self._silence()
        if why:
            return replace(parts, why=why)
        if watts is None:
            why = "a counter could not be read" if self._joules else FIRST_SAMPLE
        return replace(
            parts,
            joules=self._joules,
            watts=watts,
            covered_s=self._covered_s,
            why=why)

    def between(self, now: float) -> None:
        self._advance(now, {}, between=True)

    def _look(self) -> None:
        """Find the zones anew when a driver came or went; one that went away is still missed."""
        listed = self._host.list(POWERCAP)
        if listed == self._listed:
            return
        self._listed = listed
        self._absence = ""
        for zone in rapl_zones(self._host):
            counter = self._counters.get(zone.name)
            if counter is None or counter.zone.zone != zone.zone:
                self._counters[zone.name] = ZoneCounter(zone)
            else:
                counter.zone = zone
        self._may_mirror = may_mirror(self._host, self._all_zones())

    def _all_zones(self) -> list[RaplZone]:
        return [counter.zone for counter in self._counters.values()]

    def _advance(self, now: float, notes: dict[str, str], between: bool = False) -> float | None:
        """Add the joules since the previous reading; return the power since the last whole sample.

        A sample is whole if every zone that counts was read. If one is missing, its joules of that
        time come with its next reading, so power is known again after that.
        """
        self._look()
        step = self._read(now, notes)
        gained = self._total(step)
        self._joules += gained
        self._since += gained
        for name in step.counters:
            self._zones[name] = self._zones.get(name, 0.0) + step.moved.get(name, 0.0)

        needed = self._needed(step)
        unread = needed - step.counters.keys()
        self._explain(unread, notes)
        # Read, but without joules: they are of a reset or of the time before a first reading.
        if needed - unread - step.moved.keys():
            self._lost = True

        elapsed = 0.0
        if self._whole_at is not None:
            elapsed = now - self._whole_at
        complete = elapsed > 0 and not self._lost and needed <= step.moved.keys()
        watts = None
        if complete and needed:
            watts = self._since / elapsed

        # A reading between two samples ends no interval; only the first one begins one.
        ends = self._whole_at is None or not between
        if ends and not unread:
            self._end_interval(now, elapsed, complete)
        return watts

    def _end_interval(self, now: float, elapsed: float, complete: bool) -> None:
        """End the interval since the last whole sample, and begin the next."""
        if complete:
            self._covered_s += elapsed
        self._still_s = 0.0 if self._joules else self._still_s + elapsed
        self._whole_at = now
        self._since = 0.0
        self._lost = False

    def _read(self, now: float, notes: dict[str, str]) -> ZoneStep:
        """Read the counters, and leave out those that are another's."""
        zones = self._all_zones()
        counters = read_counters(self._host, zones)
        mirrors = self._find_mirrors(zones, counters)
        step = ZoneStep(dict(counters), {}, set(), set(mirrors))
        # Of mirrors too, so that they go on where they were when they stop being one.
        for name, counter in counters.items():
            gain = self._counters[name].gain(counter, now)
            if gain is None:
                step.new.add(name)
            elif isinstance(gain, Unknown):
                notes[f"zones.{name}"] = gain.reason
            else:
                step.moved[name] = gain

        for name, other in mirrors.items():
            notes[f"zones.{name}"] = f"the same counter as {other}, counted once"
            step.moved.pop(name, None)
            step.counters.pop(name)
            if not self._zones.get(name):
                self._zones.pop(name, None)
        return step

    def _find_mirrors(self, zones: Sequence[RaplZone], counters: Mapping[str, int],
                      ) -> dict[str, str]:
        """Return {zone: the zone whose counter it shows}.

        Two counters that are alike once may be so by chance. Alike at both ends of an interval is
        one counter, seen twice.
        """
        if not self._may_mirror:
            return {}
        again = read_counters(self._host, zones)
        before, self._alike = self._alike, mirrored(zones, counters, again)
        mirrors = {}
        for name, other in self._alike.items():
            if before.get(name) == other:
                mirrors[name] = other
        return mirrors

    def _total(self, step: ZoneStep) -> float:
        """Add up the joules without counting any twice.

        On boards that do not wire psys up it stays at zero, or below what it should include.
        """
        parts = 0.0
        whole = 0.0
        is_wired = False
        for name, joules in step.moved.items():
            kind = self._counters[name].zone.kind
            if kind in PACKAGE_KINDS:
                parts += joules
            elif kind == "psys":
                whole += joules
                is_wired = is_wired or step.counters[name] > 0
        self._psys_counts = is_wired and whole >= parts
        return whole if self._psys_counts else parts

    def _needed(self, step: ZoneStep) -> set[str]:
        """Return the zones without which the total is not whole.

        A package is always one. Other zones count from the second time that they were read.
        """
        kinds = ("psys",) if self._psys_counts else PACKAGE_KINDS
        needed = set()
        for name, counter in self._counters.items():
            counted = counter.was_read and name not in step.new
            if counter.zone.kind in kinds and (counted or counter.zone.kind == "package"):
                needed.add(name)
        return needed - step.mirrors

    def _explain(self, names: Iterable[str], notes: dict[str, str]) -> None:
        """Note why zones could not be read."""
        for name in names:
            notes[f"zones.{name}"] = self._host.why(counter_path(self._counters[name].zone))

    def _silence(self) -> str:
        """Return why there is no total, "" if there is one."""
        if self._still_s >= STILL_S:
            return "the RAPL counters stand still: this kernel or virtual machine does not count"
        totals = [row for row in self._counters.values() if row.zone.kind in ("package", "psys")]
        if not totals:
            # This reads several files, which a machine without counters need not do each second.
            self._absence = self._absence or why_no_rapl(self._host)
            return self._absence

        closed = [row.zone for row in totals if not row.was_read]
        packages = [zone for zone in closed if zone.kind == "package"]
        is_enough = self._psys_counts or not packages
        if is_enough and len(closed) < len(totals):
            return ""
        return why_closed(self._host, closed[0])


class MeterSource(PowerSource):
    """Power meters of the whole machine: Documentation/hwmon/acpi_power_meter.rst, ina3221.rst."""

    name = "hwmon"
    resolution = ("the machine's power meter, asked at each sample; "
                  "it gives the mean of an interval of its own")

    def __init__(self, host: Host, hardware: Hardware) -> None:
        super().__init__(host, hardware)
        self._meters = [power_files(sensor) for sensor in whole_machine(hardware.sensors)]
        self._energy = Integral()
        # For the reason alone: nobody knows what they leave out.
        parts = [one for one in hardware.sensors if one.unit in ("watts", "joules")]
        self._parts = ", ".join(f"{one.chip} {one.label}" for one in parts)

    def sample(self, now: float, cpu_percent: float | Unknown) -> PowerReading:
        watts = self._watts()
        joules = self._energy.add(now, watts)
        if watts is not None:
            return PowerReading(joules, watts, self._energy.covered_s)
        if self._meters:
            return PowerReading(why="the machine's power meter has no reading now")
        if self._parts:
            return PowerReading(why=f"only parts of the machine have sensors: {self._parts}")
        return PowerReading()

    def _watts(self) -> float | None:
        """Return the sum of the meters; None if there are none, or one has no reading or 0."""
        if not self._meters:
            return None
        total = 0.0
        for files in self._meters:
            numbers = _ints(self._host, files)
            microwatts = math.prod(numbers)
            if len(numbers) < len(files) or microwatts <= 0:
                return None  # a machine that is on draws something
            total += microwatts / 1e6
        return total

    def pause(self) -> None:
        self._energy.pause()


class EnergyLeft:
    """Joules that leave batteries which show only their charge, in steps of some joules."""

    def __init__(self) -> None:
        self.joules = 0.0
        self.covered_s = 0.0
        self.watts: float | None = None  # between the last two steps
        self._last: tuple[float, float] | None = None
        self._step: tuple[float, float] | None = None

    def add(self, when: float, left: float | None) -> None:
        """Add how many joules are left; None leaves a gap."""
        if left is None or self._last is None:
            self.watts = None
            self._step = None
        else:
            then, before = self._last
            self.covered_s += when - then
            self.joules += max(0.0, before - left)
            if left != before:
                self._note_step(when, left)
        self._last = None if left is None else (when, left)

    def _note_step(self, when: float, left: float) -> None:
        if self._step is not None and when > self._step[0]:
            then, before = self._step
            watts = max(0.0, before - left) / (when - then)
            self.watts = watts or None
        self._step = (when, left)

    def pause(self) -> None:
        """Leave a gap until the next reading."""
        self.add(0.0, None)


class BatterySource(PowerSource):
    """Batteries, while they alone power the machine: Documentation/power/power_supply_class.rst."""

    name = "battery"
    resolution = ("the battery's discharge, asked at each sample; its own chip renews it every few "
                  "seconds, in steps of some joules where it shows only what is left")

    def __init__(self, host: Host, hardware: Hardware) -> None:
        super().__init__(host, hardware)
        self._batteries = [f"{SUPPLY}/{name}" for name in battery_names(host)]
        self._mains = []
        for name in host.list(SUPPLY):
            if _word(host, f"{SUPPLY}/{name}/type") in ("Mains", "USB"):
                self._mains.append(f"{SUPPLY}/{name}/online")
        self._energy = Integral()
        self._left = EnergyLeft()

    def sample(self, now: float, cpu_percent: float | Unknown) -> PowerReading:
        # All of it is read whatever the state, so that a recording has it.
        watts = self._watts()
        left = self._joules_left()
        if not self._is_alone():
            watts = left = None
        if watts is not None:
            left = None  # a measured power is better than steps
        self._energy.add(now, watts)
        self._left.add(now, left)
        joules = self._energy.joules + self._left.joules
        covered_s = self._energy.covered_s + self._left.covered_s
        if watts is not None:
            return PowerReading(joules, watts, covered_s)
        if left is not None:
            why = "the battery shows only what is left in it, and that in steps"
            return PowerReading(joules, self._left.watts, covered_s, why)
        if self._batteries:
            return PowerReading(why="a battery measures only while it alone powers the machine")
        return PowerReading()

    def _is_alone(self) -> bool:
        """Return whether a battery powers the machine, and no mains do."""
        draining = any(self._is_discharging(base) for base in self._batteries)
        return draining and not any(_ints(self._host, self._mains))

    def _is_discharging(self, base: str) -> bool:
        return _word(self._host, f"{base}/status") == "Discharging"

    def _watts(self) -> float | None:
        """Return what the batteries give; None if one of them has no reading: 0 is not a power."""
        drawn = []
        for base in self._batteries:
            watts = self._battery_watts(base)
            if self._is_discharging(base):
                drawn.append(watts)
        if drawn and all(drawn):
            return sum(drawn)
        return None

    def _battery_watts(self, base: str) -> float:
        """Return what one battery gives: µW, or µA times µV, negative with some drivers."""
        power = _int(self._host, f"{base}/power_now")
        pair = _ints(self._host, [f"{base}/current_now", f"{base}/voltage_now"])
        if power:
            return abs(power) / 1e6
        if len(pair) == 2:
            return abs(math.prod(pair)) / 1e12
        return 0.0

    def _joules_left(self) -> float | None:
        """Return the charge of all batteries, which is in µWh; None if one does not show it."""
        paths = [f"{base}/energy_now" for base in self._batteries]
        microwatt_hours = _ints(self._host, paths)
        if len(microwatt_hours) < len(paths):
            return None
        return sum(microwatt_hours) * HOUR_S / 1e6

    def pause(self) -> None:
        self._energy.pause()
        self._left.pause()


class ModelSource(PowerSource):
    """An estimate for machines that measure nothing, where somebody has given its two powers."""

    name = "model"
    resolution = "an estimate by CPU use between two given powers"

    def __init__(self, idle_w: float, busy_w: float) -> None:
        self._idle_w = idle_w
        self._busy_w = busy_w
        self._joules = 0.0
        self._covered_s = 0.0
        self._last: float | None = None  # when the estimate was brought up to

    @property
    def includes_gpus(self) -> bool:
        return False

    def sample(self, now: float, cpu_percent: float | Unknown) -> PowerReading:
        if self._last is None:
            self._last = now
        if isinstance(cpu_percent, Unknown):
            # The next CPU use is of the time since now and before, so leave the last moment as it
            # is.
            return PowerReading(self._joules, None, self._covered_s, cpu_percent.reason)
        # Linear between the two, for nothing more is known.
        watts = self._idle_w + (self._busy_w - self._idle_w) * cpu_percent / 100
        elapsed = now - self._last
        self._joules += watts * elapsed
        self._covered_s += elapsed
        self._last = now
        return PowerReading(self._joules, watts, self._covered_s)

    def pause(self) -> None:
        self._last = None


# The best first. To add a source, write a class of PowerSource above and put it here.
MACHINE_SOURCES: tuple[type[PowerSource], ...] = (RaplSource, MeterSource, BatterySource)


class MachinePower:
    """The machine's power by the first source that answers."""

    def __init__(self, host: Host, hardware: Hardware, model: tuple[float, float] | None) -> None:
        self._sources = [source(host, hardware) for source in MACHINE_SOURCES]
        if model is not None:
            self._sources.append(ModelSource(*model))
        self.includes_gpus = False

    @property
    def patience_s(self) -> float:
        """Return the longest time between two readings that every source allows."""
        return min(source.patience_s for source in self._sources)

    def between(self, now: float) -> None:
        """Keep up with the counters between two samples."""
        for source in self._sources:
            source.between(now)

    def sample(self, now: float, cpu_percent: float | Unknown) -> PowerReading:
        """Ask the sources in turn; without an answer, `why` has the reasons of all."""
        answer = PowerReading()
        zones: dict[str, float] = {}
        notes: dict[str, str] = {}
        reasons = []
        for source in self._sources:
            if answer.source is not None:
                source.pause()
                continue
            reading = source.sample(now, cpu_percent)
            zones.update(reading.zones)
            notes.update(reading.notes)
            if reading.joules is not None:
                answer = replace(reading, joules=round(reading.joules, 6), source=source.name)
                self.includes_gpus = source.includes_gpus
            elif reading.why:
                reasons.append(reading.why)
        if answer.source is None:
            self.includes_gpus = False
            answer = replace(answer, why="; ".join(reasons))
        return replace(answer, zones=zones, notes=notes)


# ---- 11 Graphics ---------------------------------------------------------------------------------

# On A100 and H100 a reading covers 25 % of the time, so asking more often would show no more.
SMI_INTERVAL_MS = 500
SMI_READING = (
    "timestamp", "index", "power.draw", "utilization.gpu", "utilization.encoder", "memory.used",
    "temperature.gpu", "clocks_throttle_reasons.active", "pci.bus_id",
)
SMI_NEEDED = SMI_READING[:3]  # the others may be missing: older drivers do not know them all
SMI_TOO_HOT = 0x8 | 0x20 | 0x40  # nvml.h: HwSlowdown, SwThermalSlowdown, HwThermalSlowdown
# Between answers that are further apart the clock was set, or nvidia-smi stood still.
MAX_SMI_STEP_S = 10.0
SMI_AGAIN_S = 60.0  # until it is started anew after its end, as when the driver is renewed
SMI_LAST_LINES = 5  # that are kept: they say why it ended


class GpuSource:
    """One way to read one GPU. It owns its previous readings; `key` begins its reasons."""

    name: ClassVar[str]
    resolution: ClassVar[str]

    def __init__(self, gpu: Gpu, key: str) -> None:
        self._gpu = gpu
        self._key = key

    def read(self, now: float, unknown: dict[str, str]) -> GpuReading:
        """Read the GPU; note under `unknown` why its figures are missing."""
        raise NotImplementedError


class SmiStream:
    """The long-running nvidia-smi, integrated over its own time stamps.

    It takes up to a second to start, so one process goes on printing. A driver that does not know
    one of the fields ends it with a complaint; then it is asked again without that field.
    """

    refused: ClassVar[set[tuple[str | None, str]]] = set()  # (program, field that it does not know)

    def __init__(self, host: Host, interval_ms: int) -> None:
        self.reason = "nvidia-smi has not answered yet"
        self.stream: Stream | None = None
        self._host = host
        self._interval_ms = interval_ms
        self._program = host.which("nvidia-smi")
        refused = {field for program, field in self.refused if program == self._program}
        self._fields = [field for field in SMI_READING if field not in refused]
        self._rows: dict[int, dict[str, str]] = {}  # the newest of each GPU, by index
        self._energy: dict[int, Integral] = {}
        self._indexes: dict[str | None, int] = {}  # by PCI address
        self._answered_at = 0.0
        self._last_lines: list[str] = []
        self._start_at = math.inf
        self._start()

    def _start(self) -> None:
        self._start_at = math.inf
        if self._program is None:
            self.reason = "nvidia-smi is not installed"
            return
        argv = smi_argv(self._program, self._fields)
        self.stream = self._host.stream([*argv, "-lms", str(self._interval_ms)])

    def poll(self, now: float) -> None:
        """Take in what nvidia-smi printed since the last time; start it again after its end."""
        if self.stream is None and now >= self._start_at:
            self._start()
        if self.stream is None:
            return
        # Asked before the lines are taken: once it has ended, none can come after them.
        ended = self.stream.ended
        lines = self.stream.lines()
        self._last_lines = [*self._last_lines, *lines][-SMI_LAST_LINES:]
        for row in parse_csv("\n".join(lines), self._fields):
            self._take(row, now)
        if ended:
            self._note_end(now)

        # A driver that hangs prints nothing more. Its last figures must not go on for ever.
        silent_s = now - self._answered_at
        if self._rows and silent_s > MAX_SMI_STEP_S:
            self._rows.clear()
            self.reason = f"nvidia-smi has printed nothing for {silent_s:.0f} s"

    def _take(self, row: dict[str, str], now: float) -> None:
        """Take in one line: the newest figures of one GPU."""
        index = parse_int(row["index"])
        when = parse_time_stamp(row["timestamp"])
        if index is None or when is None:
            return
        self._answered_at = now
        self._rows[index] = row
        address = parse_pci_address(row.get("pci.bus_id"))
        self._indexes[address] = index
        energy = self._energy.setdefault(index, Integral(MAX_SMI_STEP_S))
        energy.add(when, parse_float(row["power.draw"]))

    def _note_end(self, now: float) -> None:
        """Note why nvidia-smi ended, and when it is started again."""
        self.close()
        self._rows.clear()
        last = self._last_lines[-1] if self._last_lines else "no words"
        self.reason = f"nvidia-smi ended: {last[:MAX_REASON]}"
        refused = parse_refused("\n".join(self._last_lines))
        self._last_lines = []
        self._start_at = now + SMI_AGAIN_S
        if refused in self._fields and refused not in SMI_NEEDED:
            self._fields.remove(refused)
            self.refused.add((self._program, refused))  # the next one starts without a detour
            self._start()

    def of(self, gpu: Gpu) -> tuple[dict[str, str] | None, Integral]:
        """Return a GPU's newest row, None if it has none now, and its energy.

        A GPU without an index had no driver when the machine was looked at: its address finds it.
        """
        index = gpu.index
        if index is None:
            index = self._indexes.get(gpu.pci, -1)
        return self._rows.get(index), self._energy.get(index, Integral())

    def close(self) -> None:
        """End nvidia-smi; a second call does nothing."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None


class NvidiaSource(GpuSource):
    """A GPU by the lines of nvidia-smi."""

    name = "nvidia-smi"
    resolution = (f"the GPU's power, asked every {SMI_INTERVAL_MS} ms; "
                  "on some cards it covers a part of the time only")

    def __init__(self, gpu: Gpu, key: str, stream: SmiStream) -> None:
        super().__init__(gpu, key)
        self._stream = stream

    def read(self, now: float, unknown: dict[str, str]) -> GpuReading:
        row, energy = self._stream.of(self._gpu)
        watts = None if row is None else parse_float(row["power.draw"])
        is_measured = watts is not None or energy.covered_s > 0
        reading = GpuReading(
            self._gpu.title,
            self._gpu.index,
            energy_joules=energy.joules if is_measured else None,
            covered_s=energy.covered_s)
        if row is None:
            unknown[self._key] = self._stream.reason
            return reading
        if watts is None:
            words = row["power.draw"] or "nothing"
            unknown[f"{self._key}.power_watts"] = f"nvidia-smi prints {words} for it"
        return replace(
            reading,
            power_watts=watts,
            usage=parse_float(row.get("utilization.gpu")),
            encoder_usage=parse_float(row.get("utilization.encoder")),
            memory_used_bytes=parse_mib(row.get("memory.used")),
            temperature_c=parse_float(row.get("temperature.gpu")),
            source=self.name,
            too_hot=_is_too_hot(row))


def _is_too_hot(row: Mapping[str, str]) -> bool | None:
    """Return whether heat slows a GPU down, None if its driver does not say."""
    reasons = row.get("clocks_throttle_reasons.active", "")
    mask = re.fullmatch(r"0x([0-9a-fA-F]{1,16})", reasons)
    if mask is None:
        return None
    return bool(int(mask.group(1), 16) & SMI_TOO_HOT)


class SysfsSource(GpuSource):
    """An AMD or Intel GPU: Documentation/gpu/amdgpu/thermal.rst, sysfs-driver-intel-i915-hwmon."""

    name = "gpu-hwmon"
    resolution = "the GPU's own sensor, asked at each sample"

    def __init__(self, gpu: Gpu, key: str, host: Host) -> None:
        super().__init__(gpu, key)
        self._host = host
        self._energy = Integral()
        self._counter: tuple[float, int] | None = None  # when it was read, µJ

    def read(self, now: float, unknown: dict[str, str]) -> GpuReading:
        gpu = self._gpu
        watts = self._watts(now)
        if watts is None:
            unknown[f"{self._key}.power_watts"] = self._why_no_watts()
        heat = self._first("temp1_input")  # m°C
        usage = _int(self._host, f"{gpu.path}/gpu_busy_percent")
        reading = GpuReading(
            gpu.title,
            power_watts=watts,
            usage=None if usage is None else float(usage),
            temperature_c=None if heat is None else heat / 1000,
            memory_used_bytes=_int(self._host, f"{gpu.path}/mem_info_vram_used"),
            in_package=bool(gpu.integrated),
            covered_s=self._energy.covered_s)
        if watts is None and self._counter is None:
            return reading
        joules = round(self._energy.joules, 6)
        return replace(reading, energy_joules=joules, source=self.name)

    def _first(self, *names: str) -> int | None:
        """Return the first of these files of the GPU's chips that has a number."""
        base = f"{self._gpu.path}/hwmon"
        for chip in self._host.list(base):
            for name in names:
                value = _int(self._host, f"{base}/{chip}/{name}")
                if value is not None:
                    return value
        return None

    def _watts(self, now: float) -> float | None:
        """Return the power, and add up its energy."""
        microwatts = self._first("power1_average", "power1_input")
        watts = None if microwatts is None else microwatts / 1e6
        # energy1 is the card's, which includes its package. Of some GPUs xe has energy2, the
        # package, alone.
        counter = self._first("energy1_input", "energy2_input")
        if counter is None:
            self._energy.add(now, watts)
            return watts
        # A counter is more exact than an integral of the power.
        counted_watts = self._gain(counter, now)
        return watts if counted_watts is None else counted_watts

    def _gain(self, counter: int, now: float) -> float | None:
        """Add what a counter of µJ gained; return its power, None if that is not known."""
        previous = self._counter
        self._counter = (now, counter)
        if previous is None:
            return None
        then, before = previous
        if counter < before:  # it was reset
            return None
        joules = (counter - before) / 1e6
        elapsed = now - then
        self._energy.joules += joules
        self._energy.covered_s += elapsed
        if elapsed <= 0:
            return None
        return joules / elapsed

    def _why_no_watts(self) -> str:
        if self._counter is not None:
            return FIRST_SAMPLE
        if self._gpu.integrated:
            return "no power sensor of its own: it is inside the processor's package"
        return "no power sensor"


class GraphicsPower:
    """The GPUs of the machine, each by its source."""

    def __init__(self, host: Host, gpus: Sequence[Gpu], smi_interval_ms: int) -> None:
        self.smi: SmiStream | None = None  # one process for all cards
        self._sources: list[GpuSource] = []
        for at, gpu in enumerate(gpus):
            key = f"gpus.{at}"
            if gpu.vendor == "NVIDIA":
                self.smi = self.smi or SmiStream(host, smi_interval_ms)
                self._sources.append(NvidiaSource(gpu, key, self.smi))
            else:
                self._sources.append(SysfsSource(gpu, key, host))

    def sample(self, now: float, unknown: dict[str, str]) -> tuple[GpuReading, ...]:
        """Read every GPU."""
        if self.smi is not None:
            self.smi.poll(now)
        return tuple(source.read(now, unknown) for source in self._sources)

    def close(self) -> None:
        """End nvidia-smi, if it was started."""
        if self.smi is not None:
            self.smi.close()


# Power source -> how finely it measures, for people who read a result.
POWER_SOURCES = {
    **{source.name: source.resolution for source in MACHINE_SOURCES},
    ModelSource.name: ModelSource.resolution,
    NvidiaSource.name: NvidiaSource.resolution,
    SysfsSource.name: SysfsSource.resolution,
}


def smi_table(host: Host) -> str | None:
    """Return what nvidia-smi prints, for a recording: a line of fields that it knows, then rows."""
    program = host.which("nvidia-smi")
    if program is None:
        return None
    names = dict.fromkeys((*SMI_IDENTITY, *SMI_READING))
    fields = list(names)
    while True:
        result = host.run(smi_argv(program, fields), PROGRAM_S)
        words = result.stdout + result.stderr
        refused = parse_refused(words)
        if refused not in fields:
            head = ",".join(fields)
            return f"{head}\n{words}"
        fields.remove(refused)  # an older driver: ask again without it


# ---- 12 Sampler ----------------------------------------------------------------------------------

# Unit of the times in /proc/PID/stat. The kernel's ABI fixes it, whatever CONFIG_HZ is.
USER_HZ = 100


class CpuUsage:
    """How busy the machine is; owns the previous times of /proc/stat."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._last: tuple[int, int] | None = None

    def sample(self) -> float | Unknown:
        """Return the percent of the whole machine that was busy since the previous sample."""
        times = parse_cpu_times(self._host.read("/proc/stat"))
        last = self._last
        self._last = times or last
        if times is None:
            return Unknown(f"no CPU times ({self._host.why('/proc/stat')})")
        if last is None:
            return Unknown(FIRST_SAMPLE)
        busy = times[0] - last[0]
        ticks = times[1] - last[1]
        if ticks <= 0:
            return Unknown("no tick went by since the previous sample")
        # The time spent waiting for I/O may run backwards (proc_stat(5)), so keep within limits.
        percent = min(100.0, max(0.0, 100 * busy / ticks))
        return round(percent, 3)


class Sampler:
    """Takes readings, each over the time since the previous one.

    What a rate needs is kept by its parts: CPU times by CpuUsage, counters and integrals by the
    sources of power. Close it, for nvidia-smi runs until then.
    """

    def __init__(self, host: Host, hardware: Hardware | None = None, gpu: bool = True,
                 smi_interval_ms: int = SMI_INTERVAL_MS, model: tuple[float, float] | None = None,
                 ) -> None:
        """Make one; `model` (W of the idle machine, W with all CPUs busy) estimates the rest."""
        # --watch needs no more of the machine, and should start at once.
        hw = hardware or detect_only(host, "sensors", "gpus")
        self._host = host
        self._cpu = CpuUsage(host)
        self._power = MachinePower(host, hw, model)
        self._graphics = GraphicsPower(host, hw.gpus if gpu else (), smi_interval_ms)
        self._heat = _heat_files(hw.sensors)

    def sample(self, now: float) -> Reading:
        """Read everything once; `now` in seconds of a monotonic clock."""
        # CPU use first, for a power model needs it.
        cpu_usage = self._cpu.sample()
        power = self._power.sample(now, cpu_usage)
        unknown = dict(power.notes)
        if power.watts is None:
            unknown["power_watts"] = power.why
        if power.joules is None:
            unknown["energy_joules"] = power.why

        gpus = self._graphics.sample(now, unknown)
        # Known only now, for it depends on the source that answered.
        if self._power.includes_gpus:
            gpus = tuple(replace(gpu, in_package=True) for gpu in gpus)
        return Reading(
            time=now,
            cpu_usage=_value(cpu_usage, "cpu_usage", unknown),
            memory_used_bytes=_value(self._memory_used(), "memory_used_bytes", unknown),
            power_watts=power.watts,
            energy_joules=power.joules,
            covered_s=power.covered_s,
            power_source=power.source,
            gpus=gpus,
            zones=power.zones,
            temperature_c=_value(self._temperature(), "temperature_c", unknown),
            unknown=unknown)

    @property
    def patience_s(self) -> float:
        """Longest time between two readings; a counter may wrap twice when it is longer."""
        return self._power.patience_s

    def between(self, now: float) -> None:
        """Read the counters between two samples that are further apart than `patience_s`."""
        self._power.between(now)

    def throttles(self) -> int | None:
        """Return how often heat slowed CPUs down since boot; None if the kernel does not count.

        Documentation/ABI/testing/sysfs-devices-system-cpu.
        """
        counts = []
        for name in cpu_folders(self._host):
            base = f"{CPUS}/{name}/thermal_throttle"
            files = [f"{base}/core_throttle_count", f"{base}/package_throttle_count"]
            counts += _ints(self._host, files)
        return sum(counts) if counts else None

    def close(self) -> None:
        """End nvidia-smi, if it was started."""
        self._graphics.close()

    def _memory_used(self) -> int | Unknown:
        """Return the memory that a new program could not have.

        MemAvailable counts caches that can be dropped, which MemFree does not.
        """
        info = parse_sizes(self._host.read("/proc/meminfo"))
        try:
            return info["MemTotal"] - info["MemAvailable"]
        except KeyError:
            return Unknown(f"no MemAvailable ({self._host.why('/proc/meminfo')})")

    def _temperature(self) -> float | Unknown:
        """Return the temperature of the hottest processor in °C; the files are in m°C."""
        heat = _ints(self._host, self._heat)
        if not heat:
            return Unknown("no sensor of the processor's temperature")
        return max(heat) / 1000


T = TypeVar("T", int, float)


def _value(found: T | Unknown, name: str, unknown: dict[str, str]) -> T | None:
    """Return what was found, or note why it is unknown."""
    if isinstance(found, Unknown):
        unknown[name] = found.reason
        return None
    return found


def _heat_files(sensors: Iterable[Sensor]) -> list[str]:
    """Return the files of the processors' temperatures, one of each chip.

    The first of a chip is the whole package's. Asking every core would wake them all.
    """
    first: dict[str, str] = {}
    for sensor in sensors:
        if sensor.unit == "celsius" and sensor.chip in CPU_TEMPERATURE:
            first.setdefault(os.path.dirname(sensor.path), sensor.path)
    return list(first.values())


def process_group(host: Host, pgid: int, gpu: bool = False) -> ProcessUsage:
    """Add up a process group: CPU of its processes and of the children they waited for, memory now.

    `gpu` adds up their time on GPUs too: Documentation/gpu/drm-usage-stats.rst.
    """
    ticks = 0
    rss_bytes = 0
    members = []
    engines: dict[str, int] = {}  # ns by client, which several descriptors may share
    for pid in _process_ids(host):
        # getpgid(2) is quick and sorts out most of them.
        if host.group(pid) not in (None, pgid):
            continue
        found = parse_process(host.read(f"/proc/{pid}/stat"))
        if found.get("group") != pgid:
            continue
        members.append(pid)
        ticks += found["ticks"]
        rss_bytes += parse_sizes(host.read(f"/proc/{pid}/status")).get("VmRSS", 0)
        if gpu:
            engines.update(_engine_times(host, pid))
    return ProcessUsage(ticks / USER_HZ, rss_bytes, tuple(members), sum(engines.values()) / 1e9)


def _process_ids(host: Host) -> list[int]:
    return [int(name) for name in host.list("/proc") if name.isascii() and name.isdigit()]


def _engine_times(host: Host, pid: int) -> dict[str, int]:
    times: dict[str, int] = {}
    for name in host.list(f"/proc/{pid}/fdinfo"):
        times.update(parse_engines(host.read(f"/proc/{pid}/fdinfo/{name}")))
    return times


def process_started(host: Host, pid: int) -> int | None:
    """Return a process's start in clock ticks since boot.

    Together with its number it is a name that is never reused.
    """
    return parse_process(host.read(f"/proc/{pid}/stat")).get("start")


# ---- 13 Ledger -----------------------------------------------------------------------------------

SAMPLE_S = 1.0  # between two readings: energy counters integrate by themselves
MAX_SERIES = 240  # points of a series; even, since neighbours are merged in pairs
MAX_SAMPLES = 600  # of a ledger: ten minutes of them
MAX_ASIDES = 256  # programs beside the runs since the last reading; two or three in a busy second
ORDER_WAIT_S = 10.0  # that a caller waits for the meter's thread, which a sensor may hold up

IDLE_FIRST_S = 3.0  # how long the first idle baseline takes: the first job waits for it
IDLE_S = 10.0  # how long a later one takes
IDLE_REST_S = 30.0  # without an attempt before one
IDLE_EVERY_S = 600.0  # from one to the next
IDLE_RETRY_S = 60.0  # after one that failed, since the machine was busy
IDLE_BUSY_PERCENT = 10.0  # of the machine's CPUs or of a GPU: up to this it is called idle

# Gaps are extrapolated where the readings cover at least these shares of a run. A GPU's power is
# sampled (of A100 and H100 a reading covers 25 % of the time), so it is only an estimate anyway.
MIN_COVERAGE = 0.9
MIN_GPU_COVERAGE = 0.5


class Series:
    """Figures over time in a bounded number of points.

    A full series merges each two neighbours to their mean. From then on a point is of twice the
    time.
    """

    def __init__(self, most: int = MAX_SERIES) -> None:
        self.points: list[tuple[float | None, ...]] = []
        self._most = most
        self._stride = 1  # how many added points make one
        self._waiting: list[tuple[float | None, ...]] = []

    def add(self, *values: float | None) -> None:
        """Add a point: the time in s first."""
        self._waiting.append(values)
        if len(self._waiting) < self._stride:
            return
        if len(self.points) == self._most:
            pairs = zip(self.points[::2], self.points[1::2])
            self.points = [_mean_point(pair) for pair in pairs]
            self._stride *= 2
            return  # until as many wait as make a point now
        self.points.append(_mean_point(self._waiting))
        self._waiting = []


def _mean_point(points: Sequence[tuple[float | None, ...]]) -> tuple[float | None, ...]:
    return tuple(_mean_known(column) for column in zip(*points))


def _mean_known(column: Sequence[float | None]) -> float | None:
    values = [value for value in column if value is not None]
    if not values:
        return None
    return sum(values) / len(values)


class Idle(NamedTuple):
    """The machine at rest: W, their standard deviation from sample to sample, when (epoch s).

    `source` measured it; it includes the power of so many GPUs beside the processor.
    """

    watts: float
    spread: float
    at: float
    source: str | None = None
    gpus: int = 0

    def why_not_of(self, reading: Reading) -> str:
        """Return why this is not the idle share of a reading, "" if it is."""
        if reading.power_source != self.source:
            return f"the idle baseline is of {self.source}, this run of {reading.power_source}"
        if gpus_apart(reading) > self.gpus:
            return "the idle baseline lacks a GPU whose power is known now"
        return ""


def gpus_apart(reading: Reading) -> int:
    """Count the GPUs whose power is known and not in the machine's own figure."""
    apart = [gpu for gpu in reading.gpus if not gpu.in_package]
    return sum(gpu.power_watts is not None for gpu in apart)


class Baseline:
    """When idle power is to be measured, and its result; fed with readings and times, no clock."""

    def __init__(self, now: float) -> None:
        self.idle: Idle | None = None
        self.why = "no idle baseline yet: the node was never idle"
        self._due = now
        self._readings: list[Reading] = []

    def wait_s(self, now: float) -> float:
        """Return how long it needs no reading."""
        if self._readings:
            return SAMPLE_S
        return max(0.0, self._due - now)

    def disturb(self, now: float) -> None:
        """Begin the rest anew: an attempt begins or ends, so a partial measurement is void."""
        self._end(max(self._due, now + IDLE_REST_S))

    def take(self, reading: Reading, epoch_s: float) -> bool:
        """Take a reading of the resting machine; return whether no more is wanted for now."""
        if reading.energy_joules is None:
            self.why = reading.unknown.get("energy_joules") or "no energy counter was read"
            return self._end(reading.time + IDLE_EVERY_S)

        self._readings.append(reading)
        wanted_s = IDLE_S if self.idle else IDLE_FIRST_S
        if reading.time - self._readings[0].time < wanted_s:
            return False

        rows = self._readings[1:]  # the first one's rates are of the time before it
        self.why = _unrest(rows)
        if not self.why:
            idle = _idle_of(rows, epoch_s)
            if idle is not None:
                self.idle = idle
                return self._end(reading.time + IDLE_EVERY_S)
            self.why = "the power was unknown when idle power was due"
        return self._end(reading.time + IDLE_RETRY_S)

    def _end(self, due: float) -> bool:
        self._readings.clear()
        self._due = due
        return True


def _unrest(rows: Sequence[Reading]) -> str:
    """Return why a machine with these readings was not at rest, "" if it was."""
    sources = {str(row.power_source) for row in rows}
    if len(sources) > 1:
        return f"the power source changed meanwhile: {', '.join(sorted(sources))}"
    machine = _mean_known([row.cpu_usage for row in rows])
    if machine is None:
        return "how busy the machine was is unknown"
    means = [("the machine", machine)]
    for at, gpu in enumerate(rows[-1].gpus):
        usage = _mean_known([row.gpus[at].usage for row in rows])
        means.append((gpu.name, usage or 0.0))  # many drivers do not show it
    for name, percent in means:
        if percent > IDLE_BUSY_PERCENT:
            return f"{name} was {percent:.0f} % busy when idle power was due"
    return ""


def _idle_of(rows: Sequence[Reading], epoch_s: float) -> Idle | None:
    """Return the idle power of readings at rest, None if it is unknown.

    nvidia-smi answers late, so the first readings may lack a GPU: only those with the most GPUs
    count.
    """
    gpus = max(gpus_apart(row) for row in rows)
    totals = [row.total_watts for row in rows if gpus_apart(row) == gpus]
    watts = [total for total in totals if total is not None]
    if not watts:
        return None
    spread = 0.0
    if len(watts) > 1:
        spread = statistics.stdev(watts)
    return Idle(
        watts=round(statistics.fmean(watts), 3),
        spread=round(spread, 3),
        at=epoch_s,
        source=rows[-1].power_source,
        gpus=gpus)


class Interval(NamedTuple):
    """The time between two readings."""

    last: Reading
    now: Reading

    @property
    def span_s(self) -> float:
        return self.now.time - self.last.time

    @property
    def joules(self) -> float | None:
        """Return the machine's joules; None if one end lacks them or has another source."""
        before, after = self.last.energy_joules, self.now.energy_joules
        if self.last.power_source != self.now.power_source:
            return None
        if before is None or after is None:
            return None
        return after - before


@dataclass(eq=False)
class Ledger:
    """What one run used, filled by the meter: energy in J, CPU in s, memory in bytes.

    The meter books each interval between two readings: all of it if the run was alone, else its
    share. Times in s say how much of the run each figure is of. `samples` may go on from an earlier
    run's.
    """

    samples: deque[Json] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))
    uses_gpu: bool = False
    pgid: int | None = None  # of the process that runs now
    paused: bool = False
    started: float | None = None  # epoch

    # Of the run's own processes.
    ended_cpu_s: float = 0.0  # of those that have ended
    cpu_s: float = 0.0  # of all, up to the last reading
    gpu_s: float = 0.0
    peak_rss_bytes: int = 0

    # Of the machine.
    measured_s: float = 0.0
    busy_s: float = 0.0  # of them with the machine's CPU use known
    busy_percent_s: float = 0.0
    energy_joules: float | None = None
    energy_s: float = 0.0  # of them with energy known
    idle_joules: float = 0.0
    idle_s: float = 0.0  # of them with an idle baseline
    idle_watts: float | None = None
    power_source: str | None = None
    throttles: int | None = None  # the machine's count at the start
    throttled: bool | None = None
    beside: int = 0  # the most other runs at a time
    unknown: dict[str, str] = field(default_factory=dict)

    # Of its GPUs.
    gpus: dict[int, tuple[float, float]] = field(default_factory=dict)  # J, the s they are of
    gpu_usage_s: float = 0.0
    gpu_seen_s: float = 0.0
    gpu_memory_bytes: int | None = None
    gpu_source: str | None = None
    gpu_inside: bool = False  # the machine's figure includes a GPU's energy
    gpu_silent: str | None = None  # why the energy of a GPU beside the processor is unknown

    series: Series = field(default_factory=Series)  # s, W, % of the machine
    pace: Series = field(default_factory=Series)  # s, frames per second

    def ended(self, cpu_s: float, rss_bytes: int) -> None:
        """Note what a process of this run had used when it ended."""
        self.pgid = None
        self.ended_cpu_s += cpu_s
        self.peak_rss_bytes = max(self.peak_rss_bytes, rss_bytes)

    def heat(self, throttles: int | None) -> None:
        """Note the machine's count of slow-downs by heat, at the start and at the end."""
        if self.started is None:
            self.throttles = throttles
        elif throttles is not None and self.throttles is not None:
            rose = throttles > self.throttles
            self.throttled = bool(self.throttled) or rose

    def book(self, interval: Interval, share: float, baseline: Baseline) -> None:
        """Book one interval; `share` is this run's part of its energy."""
        now, span_s = interval.now, interval.span_s
        self.measured_s += span_s
        if now.cpu_usage is not None:
            self.busy_s += span_s
            self.busy_percent_s += now.cpu_usage * span_s
        joules = interval.joules
        if joules is not None:
            self.energy_joules = (self.energy_joules or 0.0) + share * joules
            self.energy_s += now.covered_s - interval.last.covered_s
        self._book_idle(interval, share, baseline)
        self.series.add(self.measured_s, now.total_watts, now.cpu_usage)
        self.samples.append({
            "time": utc_text(time.time()),
            "cpu_usage": now.cpu_usage,
            "memory_used_bytes": now.memory_used_bytes,
            "power_watts": now.total_watts,
            "power_source": now.power_source,
            "temperature_c": now.temperature_c,
        })

    def _book_idle(self, interval: Interval, share: float, baseline: Baseline) -> None:
        idle = baseline.idle
        if idle is None:
            self.unknown["idle_watts"] = baseline.why
            return
        why = idle.why_not_of(interval.now)
        if why:
            self.unknown["idle_watts"] = why
            return
        self.idle_watts = idle.watts
        self.idle_joules += share * idle.watts * interval.span_s
        self.idle_s += interval.span_s

    def book_gpus(self, interval: Interval, share: float) -> None:
        """Book an interval of the GPUs; those inside the machine's own figure add no energy."""
        for at, (last, gpu) in enumerate(zip(interval.last.gpus, interval.now.gpus)):
            if gpu.in_package:
                self.gpu_inside = self.gpu_inside or gpu.energy_joules is not None
            elif gpu.energy_joules is None:
                unknown = interval.now.unknown
                self.gpu_silent = unknown.get(f"gpus.{at}.power_watts") or unknown.get(f"gpus.{at}")
            else:
                joules, covered_s = self.gpus.get(at, (0.0, 0.0))
                joules += share * (gpu.energy_joules - (last.energy_joules or 0.0))
                covered_s += gpu.covered_s - last.covered_s
                self.gpus[at] = (joules, covered_s)
                self.gpu_source = gpu.source or self.gpu_source
            self._book_gpu_load(gpu, interval.span_s)

    def _book_gpu_load(self, gpu: GpuReading, span_s: float) -> None:
        if gpu.usage is not None:
            self.gpu_usage_s += gpu.usage * span_s
            self.gpu_seen_s += span_s
        if gpu.memory_used_bytes is not None:
            self.gpu_memory_bytes = max(self.gpu_memory_bytes or 0, gpu.memory_used_bytes)
        if gpu.too_hot is not None:
            self.throttled = bool(self.throttled) or gpu.too_hot


class Shares(NamedTuple):
    """One run's part of an interval's energy, and of its GPUs'."""

    machine: float
    gpu: float


def take_shares(host: Host, ledgers: Sequence[Ledger]) -> list[Shares]:
    """Measure what each run used since the previous interval, and return its part of the whole.

    The machine's energy goes by CPU time, the GPUs' by GPU time. A GPU whose driver counts no time
    goes evenly to those who use it, and if nobody does it goes like the rest.
    """
    used, gpu_used = [], []
    for ledger in ledgers:
        cpu_s, gpu_s = ledger.ended_cpu_s, ledger.gpu_s
        if ledger.pgid is not None:
            usage = process_group(host, ledger.pgid, ledger.uses_gpu)
            cpu_s += usage.cpu_seconds
            gpu_s = usage.gpu_seconds
            ledger.peak_rss_bytes = max(ledger.peak_rss_bytes, usage.rss_bytes)
        # A process between its end and ended() is missing from both: then the sum falls for a
        # while.
        used.append(max(0.0, cpu_s - ledger.cpu_s))
        gpu_used.append(max(0.0, gpu_s - ledger.gpu_s))
        ledger.cpu_s = max(ledger.cpu_s, cpu_s)
        ledger.gpu_s = max(ledger.gpu_s, gpu_s)

    users = [float(ledger.uses_gpu) for ledger in ledgers]
    gpu_weights = used
    if any(gpu_used):
        gpu_weights = gpu_used
    elif any(users):
        gpu_weights = users
    parts = zip(_parts(used), _parts(gpu_weights))
    return [Shares(machine, gpu) for machine, gpu in parts]


def _parts(weights: Sequence[float]) -> list[float]:
    """Return each one's part of the whole; equal parts of nothing."""
    whole = sum(weights)
    if not whole:
        return [1 / len(weights) for _ in weights]
    return [weight / whole for weight in weights]


class Order(NamedTuple):
    """What a caller asks of the meter's thread, which sets `done` when it is carried out."""

    verb: str  # join, leave, pause, resume or rest
    ledger: Ledger
    done: threading.Event


class Meter:
    """Samples this machine while an attempt runs, and now and then at rest.

    One thread does it all: it owns the sampler, the ledgers that take part and the baseline, so
    there is no lock. Callers put an order into its queue and wait until it is done. A run joins and
    leaves with a reading, so that its joules begin and end with it. Between two readings they are
    the difference of the counters, whatever the time between them.

    Programs of other attempts may work beside a run: one probes the next film, one checks the last.
    They take their share of the machine's energy, so that no run is booked it, and keep none.
    """

    def __init__(self, host: Host, hardware: Hardware, model: tuple[float, float] | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._host = host
        self._hardware = hardware
        self._model = model
        self._clock = clock
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._ledgers: list[Ledger] = []
        self._asides: deque[Ledger] = deque(maxlen=MAX_ASIDES)  # of programs that are no run
        self._sampler: Sampler | None = None
        self._last: Reading | None = None
        self._baseline = Baseline(clock())
        self._working: set[object] = set()  # attempts, measured or not: the machine is not at rest
        self._worked_at = -math.inf
        self.rested = threading.Event()  # the first idle baseline was tried
        threading.Thread(target=self._loop, name="meter", daemon=True).start()

    @property
    def idle(self) -> Idle | None:
        """The newest idle baseline."""
        return self._baseline.idle

    def facts(self) -> Json:
        """Return the idle baseline as a registration has it."""
        idle = self._baseline.idle
        if idle is None:
            return {
                "idle_watts": None,
                "idle_watts_spread": None,
                "idle_measured_at": None,
                "idle_source": None,
                "idle_estimated": None,
                "idle_unknown": self._baseline.why,
            }
        return {
            "idle_watts": idle.watts,
            "idle_watts_spread": idle.spread,
            "idle_measured_at": utc_text(idle.at),
            "idle_source": idle.source,
            "idle_estimated": idle.source == ModelSource.name,
            "idle_unknown": None,
        }

    def work(self, attempt: object, works: bool) -> None:
        """Note that an attempt begins or has ended: idle power is not measured meanwhile.

        And nvidia-smi, which starts slowly, goes on for a while between two of its encodes.
        """
        if works:
            self._working.add(attempt)
        else:
            self._working.discard(attempt)
        self._worked_at = self._clock()
        if not works:
            self._order("rest", Ledger())

    def join(self, ledger: Ledger) -> None:
        """Begin to measure for a ledger; return when the first reading is taken."""
        self._order("join", ledger)

    def leave(self, ledger: Ledger) -> None:
        """Stop measuring for a ledger; return when the last reading is in it."""
        self._order("leave", ledger)

    def pause(self, ledger: Ledger, paused: bool) -> None:
        """Stop or go on booking to a ledger; when this returns, the time before is booked."""
        self._order("pause" if paused else "resume", ledger)

    def aside(self, ledger: Ledger) -> None:
        """Note a program that is no run: its share of what runs use beside it is nobody's."""
        self._asides.append(ledger)  # one step, so without an order: that would delay a reading

    def _order(self, verb: str, ledger: Ledger) -> None:
        order = Order(verb, ledger, threading.Event())
        self._orders.put(order)
        order.done.wait(ORDER_WAIT_S)

    def _loop(self) -> None:
        while True:
            self._step(self._next_order())

    def _next_order(self) -> Order | None:
        """Wait for an order, or until a reading is due."""
        wait_s = SAMPLE_S
        if not self._ledgers:
            wait_s = self._baseline.wait_s(self._clock())
        if self._sampler is not None:
            wait_s = min(wait_s, self._sampler.patience_s)
        try:
            return self._orders.get(timeout=wait_s)
        except queue.Empty:
            return None

    def _step(self, order: Order | None) -> None:
        """Take a reading, and carry out an order with it."""
        try:
            if order is None:
                self._sample()
            elif order.verb != "rest":
                self._read_for(order.ledger)
        except Exception as error:  # a driver's whim must not end an encode
            self._note_failure(error, order)
        if order is not None:
            self._carry_out(order)
            order.done.set()

    def _note_failure(self, error: Exception, order: Order | None) -> None:
        """Note in every ledger that takes part why its energy is unknown."""
        self._baseline.disturb(self._clock())
        why = f"the sampler failed: {type(error).__name__}: {error}"
        for ledger in self._ledgers:
            ledger.unknown["energy_joules"] = why
        if order is not None:
            order.ledger.unknown["energy_joules"] = why

    def _read_for(self, ledger: Ledger) -> None:
        """Take the reading with which a ledger begins, ends or pauses."""
        sampler, _ = self._read()
        ledger.heat(sampler.throttles())

    def _sample(self) -> None:
        """Take the reading that is due: of the runs, or else of the resting machine."""
        if self._ledgers:
            self._read()
            return
        if self._working or self._clock() < self._worked_at + IDLE_REST_S:
            self._baseline.disturb(self._clock())
            self.rested.set()  # or the first job would wait for a rest that does not come
            self._close()
            return
        _, reading = self._read()
        if self._baseline.take(reading, time.time()):
            self.rested.set()
            self._close()

    def _read(self) -> tuple[Sampler, Reading]:
        """Take a reading and book the interval before it."""
        if self._sampler is None:
            self._sampler = Sampler(self._host, self._hardware, model=self._model)
            self._last = None
        reading = self._sampler.sample(self._clock())
        last, self._last = self._last, reading
        self._book(last, reading)
        return self._sampler, reading

    def _book(self, last: Reading | None, reading: Reading) -> None:
        active = [ledger for ledger in self._ledgers if not ledger.paused]
        asides = [self._asides.popleft() for _ in range(len(self._asides))]
        # One that ends from here on counts in the next interval too.
        going_on = [aside for aside in asides if aside.pgid is not None]
        found = take_shares(self._host, [*active, *asides])
        self._asides.extend(going_on)
        for ledger, shares in zip(active, found):
            ledger.beside = max(ledger.beside, len(active) - 1)
            ledger.unknown.update(reading.unknown)
            ledger.power_source = reading.power_source or ledger.power_source
            if last is not None:
                interval = Interval(last, reading)
                ledger.book(interval, shares.machine, self._baseline)
                ledger.book_gpus(interval, shares.gpu)

    def _close(self) -> None:
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            with contextlib.suppress(Exception):
                sampler.close()

    def _carry_out(self, order: Order) -> None:
        self._baseline.disturb(self._clock())
        self.rested.set()
        ledger = order.ledger
        if order.verb in ("pause", "resume"):
            ledger.paused = order.verb == "pause"
        else:
            self._ledgers = [other for other in self._ledgers if other is not ledger]
        if order.verb == "join":
            ledger.started = time.time()
            self._ledgers.append(ledger)
        if not self._ledgers and not self._working:
            self._close()


class Energy(NamedTuple):
    """Energy of one run: J and its source (both None if unknown), the GPUs' J, and the reason."""

    joules: float | None
    source: str | None
    gpu_joules: float | None
    why: str


def energy_of(ledger: Ledger) -> Energy:
    """Return a run's energy: the machine's figure and the GPUs that it does not include.

    Gaps are extrapolated; below MIN_COVERAGE of the run (of a GPU, MIN_GPU_COVERAGE) it is unknown.
    """
    gpu_joules = _gpu_joules(ledger)
    why = _why_no_energy(ledger, gpu_joules)
    if why or ledger.energy_joules is None:
        return Energy(None, None, gpu_joules, why)

    joules = ledger.energy_joules
    if 0 < ledger.energy_s < ledger.measured_s:
        # The gaps count like the rest.
        joules *= ledger.measured_s / ledger.energy_s
    source = ledger.power_source or "unknown"
    if gpu_joules is not None:
        joules += gpu_joules
        source += f"+{ledger.gpu_source or 'gpu'}"
    return Energy(joules, source, gpu_joules, "")


def _gpu_joules(ledger: Ledger) -> float | None:
    """Return the joules of the GPUs that the machine's figure does not include."""
    if not ledger.gpus or ledger.measured_s <= 0:
        return None
    if least_covered_s(ledger) < MIN_GPU_COVERAGE * ledger.measured_s:
        return None
    total = 0.0
    for joules, covered_s in ledger.gpus.values():
        watts = joules / covered_s
        total += watts * ledger.measured_s
    return total


def _why_no_energy(ledger: Ledger, gpu_joules: float | None) -> str:
    """Return why a run's energy is unknown, "" if it is known."""
    if ledger.energy_joules is None:
        return _why_no_reading(ledger, gpu_joules)
    if ledger.energy_s < MIN_COVERAGE * ledger.measured_s:
        covered = f"{ledger.energy_s:.1f} s of the {ledger.measured_s:.1f} s run"
        return f"power readings cover only {covered}"
    if ledger.energy_joules == 0:
        return f"{ledger.power_source} counted nothing: it stands still, or the run was too short"
    if ledger.gpus and gpu_joules is None:
        return "too little is known of the GPU, see gpu_energy_joules"
    if ledger.uses_gpu and not ledger.gpus and ledger.gpu_silent:
        return f"the job used a GPU whose power is unknown: {ledger.gpu_silent}"
    return ""


def _why_no_reading(ledger: Ledger, gpu_joules: float | None) -> str:
    reasons = (ledger.unknown.get("energy_joules"), ledger.unknown.get("power_watts"))
    why = _first(reasons) or "no energy counter was read"
    if gpu_joules is not None:
        why += "; gpu_energy_joules is known"
    return why


def least_covered_s(ledger: Ledger) -> float:
    """Return the shortest time that a GPU's energy is of."""
    return min((covered_s for _, covered_s in ledger.gpus.values()), default=0.0)


# ---- 14 Groups -----------------------------------------------------------------------------------

GROUP_PREFIX = "ffdist-"  # of the groups that are ours, and may be removed
GROUP_GONE_S = 2.0  # a process that was just killed may still be in its group
GROUP_STEP_S = 0.02  # between two looks whether it has gone
CPU_PERIOD_US = 100_000  # the kernel's own default


class GroupFile(NamedTuple):
    """A file of a control group and what to write; one that is not required may be missing."""

    name: str
    text: str
    required: bool = True


# What to write, in order, for a limit {0}: bytes, or µs of CPU in each period. Without the limits
# of swap, a limit of memory would only move it to the disk; a kernel without swap accounting has
# none.
GROUP_FILES = {
    ("memory", "v1"): (
        GroupFile("memory.limit_in_bytes", "{0}"),
        GroupFile("memory.memsw.limit_in_bytes", "{0}", required=False),
    ),
    ("memory", "v2"): (
        GroupFile("memory.max", "{0}"),
        GroupFile("memory.swap.max", "0", required=False),
    ),
    ("cpu", "v1"): (
        GroupFile("cpu.cfs_period_us", f"{CPU_PERIOD_US}"),
        GroupFile("cpu.cfs_quota_us", "{0}"),
    ),
    ("cpu", "v2"): (GroupFile("cpu.max", f"{{0}} {CPU_PERIOD_US}"),),
}


class ControlGroup:
    """Control groups of one name for a process and its children: their limits, and their end.

    Version 1 has a group for each controller, version 2 one for both; it is made as near to this
    process's own as the kernel lets it be. Documentation/admin-guide/cgroup-v2.rst,
    cgroup-v1/memory.rst.
    """

    def __init__(self, host: Host, name: str) -> None:
        self._host = host
        # Of each controller, where its group may be made and was made: folder, version.
        self._places: dict[str, list[tuple[str, str]]] = {"memory": [], "cpu": []}
        self._made: dict[str, tuple[str, str]] = {}
        for hierarchy in cgroup_hierarchies(host):
            version = f"v{hierarchy.version}"
            for controller in hierarchy.controllers or self._places:
                for folder in hierarchy.folders:
                    place = (f"{folder}/{GROUP_PREFIX}{name}", version)
                    self._places[controller].append(place)

    @property
    def folders(self) -> list[str]:
        """Every folder that may be made, to be remembered before it is."""
        found: dict[str, None] = {}
        for places in self._places.values():
            for folder, _ in places:
                found[folder] = None
        return list(found)

    def limit(self, controller: str, amount: int) -> str | None:
        """Limit memory to bytes, or cpu to µs in each period.

        Return "cgroup v1", "cgroup v2", or None where no group can be made. A group beside this
        process's own is outside of that one's limits, so they are this group's limits too.
        """
        own = cgroup_limits(self._host)
        if controller == "memory" and own.memory_bytes is not None:
            amount = min(amount, own.memory_bytes)
        if controller == "cpu" and own.cpus is not None:
            amount = min(amount, int(own.cpus * CPU_PERIOD_US))
        for folder, version in self._places[controller]:
            if self._make(controller, folder, version, amount):
                self._made[controller] = (folder, version)
                return f"cgroup {version}"
        return None

    def _make(self, controller: str, folder: str, version: str, amount: int) -> bool:
        """Make a group with a limit; return whether the kernel took it. No half of one is left."""
        parent = os.path.dirname(folder)
        if version == "v2" and not self._enable(parent, controller):
            return False
        if self._host.make(folder):
            files = GROUP_FILES[controller, version]
            if self._write(folder, files, amount):
                return True
        # Of version 2 the other controller may have made it, and needs it.
        if (folder, version) not in self._made.values():
            self._host.drop(folder)
        return False

    def _enable(self, parent: str, controller: str) -> bool:
        """Return whether a group's children have a controller; ask for it if it can be had."""
        switch = f"{parent}/cgroup.subtree_control"
        enabled = self._host.read(switch) or ""
        if controller in enabled.split():
            return True
        available = self._host.read(f"{parent}/cgroup.controllers") or ""
        if controller not in available.split():
            return False
        return self._host.set(switch, f"+{controller}")

    def _write(self, folder: str, files: Iterable[GroupFile], amount: int) -> bool:
        for file in files:
            text = file.text.format(amount)
            taken = self._host.set(f"{folder}/{file.name}", text)
            if file.required and not taken:
                return False
        return True

    def take(self, controller: str, pid: int) -> bool:
        """Put a process under a limit that was set; return whether it is."""
        if controller not in self._made:
            return False
        folder, _ = self._made[controller]
        return self._host.set(f"{folder}/cgroup.procs", str(pid))

    def killed(self) -> bool:
        """Return whether the kernel ended a process for its memory.

        Before Linux 4.13 version 1 did not count that, only how often memory was refused.
        """
        if "memory" not in self._made:
            return False
        folder, version = self._made["memory"]
        file = "memory.events" if version == "v2" else "memory.oom_control"
        events = self._host.read(f"{folder}/{file}")
        count = re.search(r"^oom_kill (\d+)$", events or "", re.MULTILINE)
        if count is not None:
            return int(count[1]) > 0
        refusals = _int(self._host, f"{folder}/memory.failcnt")
        return bool(refusals)

    def remove(self) -> None:
        """End what is left in the groups that were made, and remove them."""
        folders = [folder for folder, _ in self._made.values()]
        remove_groups(self._host, folders)
        self._made.clear()


def remove_groups(host: Host, folders: Iterable[str]) -> None:
    """Remove control groups by their folders, with what is left in them; others than ours stay."""
    for folder in folders:
        name = os.path.basename(folder)
        if name.startswith(GROUP_PREFIX) and host.exists(folder):
            _remove_group(host, folder)


def _remove_group(host: Host, folder: str) -> None:
    """Kill what is in a group until it can be removed, for a while."""
    until = time.monotonic() + GROUP_GONE_S
    while not host.drop(folder) and time.monotonic() < until:
        for pid in (host.read(f"{folder}/cgroup.procs") or "").split():
            host.kill(int(pid))
        time.sleep(GROUP_STEP_S)


class LimitsRefused(Exception):
    """The kernel lets this user enforce some limits neither way; `args` are their names."""


class Limits:
    """What the processes of one run may use: by a control group of its own, else by plain limits.

    A control group holds for all processes together and counts pages in use. Where none may be made
    (no delegation, no root) a plain limit of the process takes its place: of address space for
    memory, and of as many CPUs as the quota rounds up to.
    """

    def __init__(self, host: Host, folder: Path, memory_bytes: int, cpu_percent: float) -> None:
        """Make the groups, of the name of the run's own `folder`; a limit of 0 is none."""
        self.memory_bytes = memory_bytes
        self.enforced: dict[str, str] = {}  # limit -> how
        self._percent = cpu_percent
        self._group = ControlGroup(host, folder.name)
        self._grouped: dict[str, str | None] = {}  # limit -> how the group enforces it, if it can
        amounts = {
            "memory": memory_bytes,
            "cpu": int(cpu_percent * CPU_PERIOD_US / 100),
        }
        if any(amounts.values()):
            # Written before a group is made: after a kill the folder says what is to be removed.
            names = "\n".join(self._group.folders)
            (folder / "groups").write_text(names)
        for name, amount in amounts.items():
            if amount:
                self._grouped[name] = self._group.limit(name, amount)

    def take(self, pid: int) -> str:
        """Put a process that was just started under the limits.

        Return in words how they are enforced, "" if the caller knows that already. Raises
        LimitsRefused if one cannot be enforced: rather no process than one without limits.
        """
        before = dict(self.enforced)
        refused = []
        for name, how in self._grouped.items():
            try:
                self.enforced[name] = self._enforce(name, how, pid)
            except ProcessLookupError:
                pass  # it has ended already
            except (OSError, ValueError):
                refused.append(name)
        if refused:
            raise LimitsRefused(*refused)
        if self.enforced == before:
            return ""
        words = [f"{name} by {how}" for name, how in self.enforced.items()]
        return ", ".join(words)

    def _enforce(self, name: str, how: str | None, pid: int) -> str:
        if how and self._group.take(name, pid):
            return how
        if name == "memory":
            return self._limit_memory(pid)
        return self._limit_cpu(pid)

    def _limit_memory(self, pid: int) -> str:
        both = (self.memory_bytes, self.memory_bytes)  # soft and hard: it may not raise it again
        resource.prlimit(pid, resource.RLIMIT_AS, both)
        return "rlimit"

    def _limit_cpu(self, pid: int) -> str:
        # Chosen at random, so that several runs do not meet on the first CPUs.
        mine = sorted(os.sched_getaffinity(0))
        count = min(len(mine), math.ceil(self._percent / 100))
        os.sched_setaffinity(pid, random.sample(mine, count))
        return "affinity"

    def killed(self) -> bool:
        """Return whether the kernel ended a process for the control group's limit of memory."""
        return self._group.killed()

    def lift(self) -> None:
        """Remove the control group."""
        self._group.remove()


# ---- 15 CLI --------------------------------------------------------------------------------------

EXAMPLES = """examples:
  python3 hwdetect.py                        what this machine is and which encoders work on it
  python3 hwdetect.py --json --no-probe      the same for programs, without trying encoders
  python3 hwdetect.py --watch 1s             power and load, once a second, until Ctrl-C
  python3 hwdetect.py --record my.txt        a text archive of this machine, for a bug report

Every flag has an environment variable (--state-dir: FFDIST_STATE_DIR); a flag beats it."""

# More often, the readings themselves are the load; a day between two is no watching.
MIN_INTERVAL_S = 0.01
MAX_INTERVAL_S = DAY_S


def interval(text: str) -> float:
    """Argument type of the time between two readings: a duration, or milliseconds."""
    match = re.fullmatch(rf"({_NUMBER})ms", text.strip())
    value = 0.0
    if match is not None:
        value = float(match[1]) / 1000
    else:
        with contextlib.suppress(ValueError):
            value = parse_duration(text)

    if not MIN_INTERVAL_S <= value <= MAX_INTERVAL_S:
        expected = "expected 10ms to 1d, such as 1s or 500ms"
        raise argparse.ArgumentTypeError(f"invalid interval '{text}': {expected}")
    return value


def existing_place(text: str) -> str:
    """Argument type of a folder or file that exists."""
    if not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"no such folder or archive: {text}")
    return text


def archive_place(text: str) -> str:
    """Argument type of a file to write, whose folder exists."""
    folder = os.path.dirname(os.path.abspath(text))
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"no such folder: {folder}: make it first")
    return text


FLAGS = (
    Flag("--json", False, None, "print JSON; with --watch one object a line"),
    Flag("--root", None, existing_place,
         "read a tree or an archive of --record, not this machine", "PLACE"),
    Flag("--no-probe", False, None, "do not try the encoders"),
    Flag("--record", None, archive_place,
         "write what detection reads into one text archive (- for stdout)", "FILE"),
    Flag("--watch", None, interval,
         "print a reading every so often, such as 1s or 500ms", "INTERVAL"),
    FFMPEG_FLAG,
    Flag("--state-dir", None, str,
         "where the encoders found are kept (~/.local/state/ffdist)", "DIR"),
)


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="hwdetect.py",
        epilog=EXAMPLES,
        description="Print what this machine is, which encoders work on it and its power.",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"ffdist hwdetect {VERSION}")
    add_flags(parser, FLAGS)
    return parser


def _watch(host: Host, interval_s: float, as_json: bool) -> int:
    """Print readings at a fixed pace until interrupted."""
    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # so that nvidia-smi is ended in this case too
    sampler = Sampler(host)
    start = time.monotonic()
    turn = 0
    try:
        while True:
            reading = sampler.sample(time.monotonic())
            line = _watch_json(reading) if as_json else _watch_line(reading, turn == 0)
            print(line, flush=True)
            # Turns that were missed are left out: a rate over microseconds would mean nothing.
            due = math.ceil((time.monotonic() - start) / interval_s)
            turn = max(turn + 1, due)
            _wait_until(start + turn * interval_s, sampler)
    finally:
        sampler.close()


def _wait_until(moment: float, sampler: Sampler) -> None:
    """Sleep until a moment, but read the counters as often as they need it."""
    while (left_s := moment - time.monotonic()) > 0:
        time.sleep(min(left_s, sampler.patience_s))
        if left_s > sampler.patience_s:
            sampler.between(time.monotonic())


# The fields that most programs want come first; the others follow in their own order.
WATCH_FIRST = ("time", "cpu_usage", "power_watts", "energy_joules", "zones", "unknown")


def _watch_json(reading: Reading) -> str:
    """Write a reading as JSON, with the time of day in place of the sampler's clock."""
    fields = dataclasses.asdict(reading)
    fields["time"] = utc_text(time.time())
    names = dict.fromkeys((*WATCH_FIRST, *fields))
    return json.dumps({name: fields[name] for name in names})


def _watch_line(reading: Reading, first: bool) -> str:
    """Write a reading for people, with the reason of unknown power if it is the first."""
    cells = [
        _cell(reading.cpu_usage, "% CPU"),
        _cell(reading.power_watts, "W"),
        _cell(reading.energy_joules, "J"),
    ]
    for gpu in reading.gpus:
        cells.append(_cell(gpu.power_watts, f"W {gpu.name}"))
    line = printable("".join(cells))

    why = reading.unknown.get("energy_joules")
    if first and why:
        line += f"\npower is unknown: {why}"
    return line


def _cell(value: float | None, unit: str) -> str:
    """Write a figure in a column of fixed width, so that lines stand below each other."""
    number = "-" if value is None else f"{value:.1f}"
    return f"{number:>9} {unit}"


class Fact(NamedTuple):
    """Lines of the page with one title. A line without text gets the reason of `field`."""

    title: str
    field: str
    lines: Callable[[Hardware], Sequence[str | None]]


def page(hw: Hardware) -> str:
    """Write what was found for people: a line for each fact, unknown ones with their reason."""
    lines = []
    for fact in FACTS:
        for text in fact.lines(hw):
            text = text or _reason_line(hw, fact.field)
            lines.append(f"{fact.title:<12} {text}")

    if hw.encoders:
        lines += ["", "Encoders"]
        for name, proof in hw.encoders.items():
            state = "works" if proof.reason is None else f"no: {proof.why}"
            lines.append(f"  {name:<14} {state}")
    if hw.problems:
        lines += ["", "Problems"]
        lines += [f"  {problem}" for problem in hw.problems]
    # Names come from firmware, drivers and programs, so they may hold anything.
    return "\n".join(map(printable, lines))


def _reason_line(hw: Hardware, field: str) -> str:
    why = hw.unknown.get(field)
    if why is None:
        return "none"
    return f"unknown: {why}"


def _join(*parts: str | None, by: str = ", ") -> str:
    """Join the parts that are known."""
    return by.join(part for part in parts if part)


def _machine(hw: Hardware) -> list[str]:
    place = _join(hw.container, hw.virtual, by=" in ")  # "docker in kvm"
    kind = _join(hw.node_type, place)
    return [f"{hw.address or '?'} ({kind})"]


def _threads(hw: Hardware) -> list[str]:
    # The machine's, and of those what this process may use.
    counts = _join(
        count_text(hw.cpu_sockets, "socket"),
        count_text(hw.cpu_cores, "core"),
        count_text(hw.cpu_logical, "thread"))
    if hw.cpu_threads == hw.cpu_logical:
        return [counts]
    return [f"{counts}; {hw.cpu_threads} usable here"]


def _frequency(hw: Hardware) -> list[str]:
    if hw.cpu_mhz_max is None:
        return [""]
    return [f"up to {hw.cpu_mhz_max:.0f} MHz"]


def _memory(hw: Hardware) -> list[str]:
    if not hw.ram_bytes:
        return [""]
    return [size_text(hw.ram_bytes)]


def _gpu_list(hw: Hardware) -> list[str]:
    return ["; ".join(map(_gpu_words, hw.gpus))]


def _gpu_words(gpu: Gpu) -> str:
    memory = size_text(gpu.memory_bytes) if gpu.memory_bytes else None
    return _join(gpu.title, memory, gpu.driver or "no driver", gpu.driver_version)


def _battery_list(hw: Hardware) -> list[str]:
    words = []
    for battery in hw.batteries:
        charge = "?" if battery.charge_percent is None else battery.charge_percent
        words.append(f"{battery.name} {battery.status or '?'}, {charge} %")
    return ["; ".join(words)]


def _energy_lines(hw: Hardware) -> list[str]:
    """Write the counters that can be read, and why the others cannot."""
    readable = []
    closed = []
    for zone in hw.rapl:
        if not zone.readable:
            closed.append(zone)
        elif zone.mirror_of:
            readable.append(f"{zone.name} (mirrors {zone.mirror_of})")
        else:
            readable.append(zone.name)

    lines = []
    if readable or not closed:
        lines.append(", ".join(readable))
    if closed:  # all for the same reason
        lines.append(_reason_line(hw, f"rapl.{closed[0].name}"))
    return lines


def _sensor_lines(hw: Hardware) -> list[str]:
    lines = []
    for sensor in hw.sensors:
        name = f"{sensor.chip} {sensor.label}"
        lines.append(f"{name}: {sensor.value:.1f} {sensor.unit}")
    return lines


def _disk_lines(hw: Hardware) -> list[str]:
    lines = []
    for disk in hw.disks:
        free = "?" if disk.free_bytes is None else size_text(disk.free_bytes)
        size = "?" if disk.size_bytes is None else size_text(disk.size_bytes)
        place = f"{disk.mount} ({disk.filesystem} on {disk.device})"
        lines.append(f"{place}: {free} free of {size}")
    return lines


def _no_encoders(hw: Hardware) -> list[str]:
    """Write a line for the reason only if there is no list of encoders below."""
    return [] if hw.encoders else [""]


# The order of the page: the machine, its parts, its programs.
FACTS = (
    Fact("Machine", "address", _machine),
    Fact("Board", "machine", lambda hw: [hw.machine]),
    Fact("System", "os", lambda hw: [_join(hw.os_name, hw.kernel, hw.arch)]),
    Fact("Processor", "cpu_model", lambda hw: [hw.cpu_model]),
    Fact("Threads", "cpu_threads", _threads),
    Fact("Frequency", "cpu_mhz_max", _frequency),
    Fact("Flags", "cpu_model", lambda hw: [" ".join(hw.cpu_flags)]),
    Fact("Memory", "ram_bytes", _memory),
    Fact("GPU", "gpus", _gpu_list),
    Fact("Battery", "has_battery", _battery_list),
    Fact("Energy", "rapl", _energy_lines),
    Fact("Sensor", "sensors", _sensor_lines),
    Fact("Disk", "disks", _disk_lines),
    Fact("FFmpeg", "ffmpeg", lambda hw: [_join(hw.ffmpeg, hw.ffmpeg_version, by=" ")]),
    Fact("ffprobe", "ffprobe", lambda hw: [hw.ffprobe]),
    Fact("Quality", "filters", lambda hw: [" ".join(hw.filters)]),
    Fact("Encoders", "encoders", _no_encoders),
)


def _record(host: Host, file: str) -> int:
    """Detect and sample once, and write down every file that this took."""
    recorder = Recorder(host)
    hardware = detect(recorder, probe=False)
    # A sampler reads files that detection does not: CPU times, counters, batteries.
    Sampler(recorder, hardware, gpu=False).sample(0.0)
    # Programs cannot be recorded, but the text of nvidia-smi can.
    table = smi_table(recorder)
    if table is not None:
        recorder.entries[SMI_RECORDED] = ("file", scrub("", table))

    text = archive(recorder.entries)
    if file == "-":
        print(text, end="")
        return 0
    trouble = replace_file(file, text)
    if trouble:
        print(f"hwdetect.py: cannot write the archive: {trouble}", file=sys.stderr)
        return 1
    count = len(recorder.entries)
    print(f"{file}: {count} files, without serial numbers; have a look before you send it")
    return 0


def _run(options: argparse.Namespace) -> int:
    """Do as the flags say, on this machine, on a tree, or on an archive that is unpacked for it."""
    root = options.root or "/"
    if os.path.isdir(root):
        return _run_on(Host(root), options)
    # Not a folder, so it must be an archive.
    with tempfile.TemporaryDirectory(prefix="ffdist-root-") as folder:
        try:
            with open(root, encoding="utf-8", newline="") as file:
                unpack(file.read(MAX_ARCHIVE_CHARACTERS), folder)
        except (OSError, ValueError) as error:
            print(f"hwdetect.py: cannot read --root {root}: {error_words(error)}", file=sys.stderr)
            return 2
        return _run_on(Host(folder), options)


def _run_on(host: Host, options: argparse.Namespace) -> int:
    if options.record is not None:
        return _record(host, options.record)
    if options.watch is not None:
        return _watch(host, options.watch, options.json)

    state_dir = options.state_dir or str(state_home())
    hw = detect(host, not options.no_probe, state_dir, options.ffmpeg)
    if options.json:
        print(json.dumps(hw.to_json(), indent=2))
    else:
        print(page(hw))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 (not possible), 2 (wrong usage) or 130 (interrupted)."""
    try:
        code = _parse_and_run(argv)
        write_stdout()  # not at the end of Python, where a failure is a traceback
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader went away, as `| head` does
        discard_stdout()
        return 0
    except OSError as error:  # such as a full disk
        discard_stdout()
        place = error.filename or STDOUT
        print(f"hwdetect.py: {printable(place)}: {error_words(error)}", file=sys.stderr)
        return 1


def _parse_and_run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    try:
        options = parser.parse_args(argv)
        if options.record is not None and options.watch is not None:
            parser.error("--record and --watch exclude each other: leave one out")
    except SystemExit as error:  # argparse has printed what is wrong
        return error.code if isinstance(error.code, int) else 2
    check_stdout()
    return _run(options)


if __name__ == "__main__":
    sys.exit(main())
