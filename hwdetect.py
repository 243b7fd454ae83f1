#!/usr/bin/env python3
"""Say what this machine really is, and what it draws while it works.

Reads /proc, /sys and the text of nvidia-smi, and tries each encoder of FFmpeg on a real frame: one that
is listed is not yet one that works. It knows Linux; elsewhere it answers with less.

It promises an answer on any machine: what cannot be read is null with a reason under `unknown`, and a
detector that fails is named under `problems`. It does not promise figures that the kernel does not give:
virtual machines have no energy counters, and an estimate is never passed off as a reading.

Sections:
    1 Common     what all three files share: printable text, times, durations, sizes, flags
    2 Facts      dataclasses with units, vendor tables with their kernel document
    3 Host       the only file and program access: one bounded read, None instead of an exception; Program
    4 Archive    what detection reads, written into one text, and unpacked again
    5 Parsers    text to value, pure
    6 Detectors  a table; each isolated, its failure recorded in the answer, never fatal
    7 Probe      encoders proved by a frame; detect(), which asks them all
    8 Power      counters, integrals and streams that tell energy
    9 Sampler    owns the previous counters: sample(now) gives rates, and joules since the start
    10 Ledger    what each run used, the idle baseline, shares by CPU time
    11 Groups    control groups, and what the processes of a run may use
    12 CLI       the page, --json, --root, --no-probe, --record, --watch
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
from typing import Any, Callable, ClassVar, NamedTuple, NoReturn

if sys.hexversion < 0x3090000:  # the other two files import this one first
    sys.exit("ffdist needs Python 3.9 or newer; this is " + sys.version.split()[0])

# ---- 1 Common -------------------------------------------------------------------------------------

VERSION = "1.0.0"
DAY_S = 86400

Json = dict[str, Any]


def printable(text: object) -> str:
    """Return text that cannot steer a terminal: each character that is not printable becomes `?`.

    Unicode counts controls (C0, C1, and with them ANSI and OSC sequences), bidirectional overrides,
    line separators and surrogates as not printable.
    """
    words = str(text)
    if words.isprintable():
        return words
    return "".join(char if char.isprintable() else "?" for char in words)


def utc_text(epoch_s: float | None) -> str | None:
    """Return an RFC 3339 time in UTC with milliseconds, ending in Z (None for None)."""
    if epoch_s is None:
        return None
    whole, milli = divmod(int(epoch_s * 1000), 1000)
    return f"{_second_text(whole)}.{milli:03d}Z"


@functools.lru_cache(maxsize=1024)
def _second_text(whole: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))


# Each unit once, the largest first; a bare number is seconds, and may stand at the end only ("1m30").
_DURATION = re.compile(
    "".join(rf"(?:([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?){unit})?" for unit in ("d", "h", "m", r"(?:s|\Z)", "ms")))


def parse_duration(text: str) -> float:
    """Return the seconds of `10s`, `500ms`, `1m30s`, `2h`, `90d` or plain seconds; ValueError otherwise."""
    match = _DURATION.fullmatch(text.strip())
    if not match or not any(match.groups()):
        raise ValueError(f"invalid duration '{text}': expected 10s, 0.5s, 1m30s or plain seconds")
    days, hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
    return days * DAY_S + hours * 3600 + minutes * 60 + seconds + milliseconds / 1000


def duration_text(seconds: float | None) -> str:
    """Return seconds for people: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`, `3 d 4 h`."""
    if seconds is None:
        return "unknown"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < DAY_S:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // DAY_S} d {whole % DAY_S // 3600} h"


def size_text(size_bytes: float | None) -> str:
    """Return bytes for people, in powers of 1024: `812 B`, `3.4 MiB`."""
    if size_bytes is None:
        return "unknown"
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def count_text(count: int, what: str) -> str:
    """Return a number of things for people: `1 job`, `2 jobs`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def cause_text(reason: object) -> str:
    """Return an error of the operating system in a few words: its `strerror`, or what else it says."""
    if isinstance(reason, TimeoutError):
        return "timed out"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return str(reason) or type(reason).__name__


class Flag(NamedTuple):
    """One command-line flag; its environment variable is FFDIST_ and its name in capitals."""

    name: str
    default: Any
    kind: Callable[[str], Any] | None
    about: str


class Parser(argparse.ArgumentParser):
    """A parser that refuses by itself what it does not know, and asks whether a word like it was meant."""

    words: Iterable[str] = ()  # beside its flags

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found, left

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"(?:choice: |arguments: )'?([\w-]+)", message)
        known = (*self.words, *re.findall(r"--?\w[\w-]*", self.format_usage()))
        near = difflib.get_close_matches(wrong[1], known, 1) if wrong else ()
        super().error(message + "".join(f"; did you mean {word}?" for word in near))


def add_flags(parser: argparse.ArgumentParser, flags: Iterable[Flag]) -> None:
    """Add flags to a parser; the environment gives the default, a flag on the line beats it."""
    for flag in flags:
        variable = "FFDIST_" + flag.name.lstrip("-").replace("-", "_").upper()
        value = os.environ.get(variable)
        shown = f"{flag.about} [{variable}]".replace("%", "%%")
        if flag.kind is None:
            parser.add_argument(flag.name, action="store_true", help=shown,
                                default=(value or "").lower() in ("1", "true", "yes", "on"))
        else:
            default = flag.default if value is None else value
            parser.add_argument(flag.name, type=flag.kind, default=default, help=shown,
                                metavar=flag.name.lstrip("-").upper().replace("-", "_"))


def seconds(text: str, none: bool = False) -> float:
    """Argument type of a duration that is more than nothing, unless `none` allows for 0s too."""
    try:
        value = parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not (none or value > 0) or value > 30 * DAY_S:
        raise argparse.ArgumentTypeError(f"'{text}' must be {'' if none else 'longer than nothing and '}"
                                         "at most 30 days")
    return value


def size_bytes(text: str) -> int:
    """Argument type of a size: 64M, 1.5G or plain bytes, in powers of 1024; 0 is none."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is no size: write 256M, 2G or 0")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Argument type of a whole number within limits."""
    def check(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {low} to {high}")
        return int(text)
    return check


def power_model(text: str) -> tuple[float, float]:
    """Argument type of a power model: W of the idle machine and W with all its CPUs busy."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?),(\d{1,6}(?:\.\d{1,3})?)", text.strip())
    if not match or not 0 < float(match[2]) >= float(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is no power model: write W idle,W busy, as 35,120")
    return float(match[1]), float(match[2])


def one_of(*words: str) -> Callable[[str], str]:
    """Argument type of one word out of a few; checks values of the environment too."""
    def check(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"'{text}' is none of {', '.join(words)}")
        return text
    return check


def state_home() -> Path:
    """Return the folder of this user's own ffdist state."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(base) / "ffdist"


# ---- 2 Facts --------------------------------------------------------------------------------------

GIB = 2**30
SMALL_READ_BYTES = 64 * 1024  # a file of sysfs is at most a page
LARGE_READ_BYTES = 4 * 2**20  # /proc/cpuinfo of hundreds of threads, pci.ids
ARCHIVE_MOST = 64 * 2**20  # characters of a recording
SERVER_THREADS = 16  # a server has more (the seed's rule)
SERVER_RAM_BYTES = 32 * GIB  # and more than this
MAX_CPUS = 65536  # a garbled list must not fill memory
USER_HZ = 100  # unit of the times in /proc/PID/stat, fixed by the kernel's ABI
PROBE_TOTAL_S = 4.5
PROBE_EACH_S = 4.0
PROGRAM_S = 10.0
SMI_INTERVAL_MS = 500
SMI_STEP_MOST_S = 10.0  # its clock was set, or it stood still, where two answers are further apart
SMI_AGAIN_S = 60.0  # after its end, as when the driver is renewed
COUNTER_RESET_W = 5_000  # a counter that "wrapped" at more than this was reset: no zone draws as much
STILL_S = 10.0  # counters that have not moved for so long since the start do not count
ZONE_MOST_W = 1_000  # how quickly a counter may go round: it is read before it can do so twice
POLL_S = (0.1, 10.0)  # but not more often, and for the sake of resets not more seldom, than this
POWERCAP = "/sys/class/powercap"
SUPPLY = "/sys/class/power_supply"
CPUS = "/sys/devices/system/cpu"
TREE_PATH = ("usr/local/bin", "usr/bin", "bin")  # where a --root tree keeps its programs
QUALITY_FILTERS = ("psnr", "ssim", "libvmaf", "xpsnr")

RAPL_FIX = (
    "only root may read it since Linux 5.10; to allow it for good: echo 'SUBSYSTEM==\"powercap\", "
    'KERNEL=="intel-rapl*:*", ACTION=="add", RUN+="/bin/chmod a+r /sys%p/energy_uj"\' | sudo tee '
    "/etc/udev/rules.d/60-ffdist-rapl.rules && sudo udevadm control --reload && "
    "sudo udevadm trigger --subsystem-match=powercap --action=add")

# uname -m, where Go's name differs (the seed's agents register Go's)
GO_ARCH = {"x86_64": "amd64", "i386": "386", "i686": "386", "aarch64": "arm64", "armv6l": "arm",
           "armv7l": "arm", "armv8l": "arm", "loongarch64": "loong64"}

# What x264, x265, SVT-AV1, libaom and libvpx have code for
ENCODER_FLAGS = ("sse4_1", "sse4_2", "avx", "avx2", "fma", "bmi2", "avx512f", "avx512bw", "avx512vl",
                 "avx512_vbmi", "avx512_vnni", "gfni", "neon", "asimd", "asimddp", "i8mm", "sve", "sve2",
                 "vsx")

# arch/arm64/include/asm/cputype.h: implementer and (implementer, part)
ARM_MAKERS = {0x41: "Arm", 0x42: "Broadcom", 0x43: "Cavium", 0x46: "Fujitsu", 0x48: "HiSilicon",
              0x4E: "NVIDIA", 0x50: "APM", 0x51: "Qualcomm", 0x61: "Apple", 0xC0: "Ampere"}
ARM_CORES = {
    (0x41, 0xD03): "Cortex-A53", (0x41, 0xD05): "Cortex-A55", (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72", (0x41, 0xD09): "Cortex-A73", (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76", (0x41, 0xD0C): "Neoverse-N1", (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD40): "Neoverse-V1", (0x41, 0xD41): "Cortex-A78", (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD47): "Cortex-A710", (0x41, 0xD49): "Neoverse-N2", (0x41, 0xD4F): "Neoverse-V2",
    (0x43, 0x0A1): "ThunderX", (0x43, 0x0AF): "ThunderX2", (0x46, 0x001): "A64FX",
    (0x48, 0xD01): "Kunpeng-920", (0x4E, 0x004): "Carmel", (0xC0, 0xAC3): "Ampere-1",
    (0xC0, 0xAC4): "Ampere-1a"}

# PCI class 0x03 is a display; those of other makers (ASPEED, Matrox, QEMU) only draw a console
GPU_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
# drivers/gpu/drm: GPUs of boards, which sit on no PCI bus
BOARD_GPUS = {"v3d": ("Broadcom", "VideoCore"), "panfrost": ("Arm", "Mali"), "panthor": ("Arm", "Mali"),
              "lima": ("Arm", "Mali"), "msm_dpu": ("Qualcomm", "Adreno"), "etnaviv": ("Vivante", "GC")}

# words in sys_vendor and product_name of /sys/class/dmi/id -> kind of virtual machine
VIRTUAL_DMI = (
    ("vmware", "vmware"), ("virtualbox", "virtualbox"), ("innotek", "virtualbox"), ("parallels", "parallels"),
    ("xen", "xen"), ("hvm domu", "xen"), ("bochs", "kvm"), ("qemu", "kvm"), ("kvm", "kvm"),
    ("openstack", "kvm"), ("google compute engine", "kvm"), ("amazon ec2", "kvm"), ("digitalocean", "kvm"),
    ("hetzner", "kvm"), ("apple virtualization", "apple"), ("virtual machine", "hyper-v"))
CONTAINER_FILES = (("/.dockerenv", "docker"), ("/run/.containerenv", "podman"))
CONTAINER_PATHS = (("kubepods", "kubernetes"), ("docker", "docker"), ("libpod", "podman"), ("lxc", "lxc"))

# Documentation/hwmon: chips whose temperature is the processor's
CPU_TEMPERATURE = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "x86_pkg_temp", "cpu-thermal",
                   "soc_thermal", "soc-thermal", "apm_xgene")
# Those that measure the whole machine (acpi_power_meter.rst), or the labels that are all of it together: of
# NVIDIA's modules VDD_IN alone, or the three inputs of those that have none.
MACHINE_POWER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("power_meter", ()), ("ina3221", ("VDD_IN",)),
    ("ina3221", ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")))
SENSOR_UNITS = {"temp": ("celsius", 1e-3), "power": ("watts", 1e-6), "energy": ("joules", 1e-6),
                "fan": ("rpm", 1.0)}

# Those whose free space can be asked without hanging: no network, no FUSE
LOCAL_FILESYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "overlay", "vfat",
                     "exfat", "ntfs3", "jfs", "reiserfs")

SMI_IDENTITY = ("index", "name", "uuid", "pci.bus_id", "driver_version", "memory.total", "power.limit")
SMI_READING = ("timestamp", "index", "power.draw", "utilization.gpu", "utilization.encoder", "memory.used",
               "temperature.gpu", "clocks_throttle_reasons.active", "pci.bus_id")
SMI_TOO_HOT = 0x8 | 0x20 | 0x40  # nvml.h: HwSlowdown, SwThermalSlowdown, HwThermalSlowdown

# power source -> how finely it tells
POWER_SOURCES = {
    "rapl": "energy counters that move about every millisecond",
    "hwmon": "the machine's power meter, asked at each sample; it tells the mean of an interval of its own",
    "battery": "the battery's discharge, asked at each sample; its own chip renews it every few seconds, in "
               "steps of some joules where it tells only what is left",
    "nvidia-smi": f"the GPU's power, asked every {SMI_INTERVAL_MS} ms; on some cards it covers a part of "
                  "the time only",
    "gpu-hwmon": "the GPU's own sensor, asked at each sample",
    "model": "an estimate by CPU use between two given powers"}

# drive -> (options before the input, options after it); {node} is a render node of /dev/dri
DRIVES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "nvenc": ((), ("-pix_fmt", "yuv420p")),
    "qsv": (("-init_hw_device", "qsv=hw"), ("-vf", "format=nv12")),
    "vaapi": (("-vaapi_device", "{node}"), ("-vf", "format=nv12,hwupload")),
    "v4l2m2m": ((), ("-pix_fmt", "yuv420p")),
    "software": ((), ("-pix_fmt", "yuv420p")),
    "audio": ((), ())}

# candidate -> (drive, its quickest settings), hardware first
ENCODERS: dict[str, tuple[str, tuple[str, ...]]] = {
    **{f"{codec}_{drive}": (drive, ()) for drive, codecs in (
        ("nvenc", ("h264", "hevc", "av1")), ("qsv", ("h264", "hevc", "av1", "vp9")),
        ("vaapi", ("h264", "hevc", "av1", "vp9")), ("v4l2m2m", ("h264",))) for codec in codecs},
    "libx264": ("software", ("-preset", "ultrafast")),
    "libx265": ("software", ("-preset", "ultrafast")),
    "libsvtav1": ("software", ("-preset", "10")),
    "libaom-av1": ("software", ("-cpu-used", "8")),
    "librav1e": ("software", ("-speed", "10")),
    "libvpx-vp9": ("software", ("-deadline", "realtime", "-cpu-used", "8")),
    "libopenh264": ("software", ()),
    "aac": ("audio", ()), "libopus": ("audio", ()), "libmp3lame": ("audio", ())}


@dataclass(frozen=True)
class Result:
    """What a program said. `returncode` is None when it did not start or did not end in time."""

    returncode: int | None
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Gpu:
    """One GPU. `index` is nvidia-smi's; `path` its device folder in sysfs."""

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
        """Its name with its maker's before it, once."""
        known = self.name.lower().startswith(self.vendor.lower())
        return self.name if known else f"{self.vendor} {self.name}"


@dataclass(frozen=True)
class RaplZone:
    """An energy counter of Documentation/power/powercap/powercap.rst; `name` is unique on the machine."""

    name: str
    kind: str  # package, core, uncore, dram, psys or other
    zone: str  # intel-rapl:0:1
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
    """One local file system; null sizes have their reason under `unknown`."""

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


@dataclass(frozen=True)
class Hardware:
    """What detect() found. None is unknown, its reason in `unknown`, but in NONE_IS_AN_ANSWER."""

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
    encoders: dict[str, str | None] = field(default_factory=dict)  # None: proved; else why not
    filters: tuple[str, ...] = ()
    vaapi_device: str | None = None  # the render node that proved VAAPI
    unknown: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def proved(self) -> tuple[str, ...]:
        """Name the encoders that encoded a real frame here, hardware first."""
        return tuple(name for name, reason in self.encoders.items() if reason is None)

    def registration(self) -> dict[str, object]:
        """Give exactly the fields of the seed's node registration."""
        return {"address": self.address, "type": self.node_type, "cpu_threads": self.cpu_threads,
                "cpu_model": self.cpu_model, "has_gpu": self.has_gpu, "gpu_type": self.gpu_type,
                "ram_bytes": self.ram_bytes,
                "labels": {"node_type": self.node_type, "os": self.os, "arch": self.arch}}

    def to_json(self) -> dict[str, object]:
        """Give the fields of a registration first, then the rest, ready for json.dumps."""
        answer = self.registration()
        for name, value in dataclasses.asdict(self).items():
            answer.setdefault(name, value)
        return answer


# Fields in which None says "there is none", not "could not be found out"
NONE_IS_AN_ANSWER = ("gpu_type", "virtual", "container", "vaapi_device")


@dataclass(frozen=True)
class GpuReading:
    """One GPU now; usages in percent, joules since the sampler's start."""

    name: str
    index: int | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    usage: float | None = None
    encoder_usage: float | None = None
    memory_used_bytes: int | None = None
    temperature_c: float | None = None
    source: str | None = None  # nvidia-smi or gpu-hwmon
    in_package: bool = False  # True: the machine's figure holds it already, never add the two
    covered_s: float = 0.0  # time that energy_joules is of, by the source's own clock
    too_hot: bool | None = None  # slowed down by heat, as nvidia-smi says


@dataclass(frozen=True)
class Reading:
    """One sample. Rates are since the previous one, `energy_joules` and `zones` since the start."""

    time: float  # seconds of the clock that sample() was given
    cpu_usage: float | None = None  # percent of the whole machine
    memory_used_bytes: int | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    covered_s: float = 0.0  # time that energy_joules is of
    zones: dict[str, float] = field(default_factory=dict)  # joules
    power_source: str | None = None  # rapl, hwmon, battery or model
    gpus: tuple[GpuReading, ...] = ()
    temperature_c: float | None = None
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def total_watts(self) -> float | None:
        """Watts of the machine with the GPUs that its own figure does not hold."""
        apart = [gpu.power_watts for gpu in self.gpus if not gpu.in_package and gpu.power_watts is not None]
        return None if self.power_watts is None else self.power_watts + sum(apart)


@dataclass(frozen=True)
class ProcessUsage:
    """CPU seconds and resident bytes (shared pages counted in each process) of a process group.

    `gpu_seconds` is of all engines; 0 where the driver does not count them, as NVIDIA's.
    """

    cpu_seconds: float
    rss_bytes: int
    pids: tuple[int, ...]
    gpu_seconds: float = 0.0


# ---- 3 Host ---------------------------------------------------------------------------------------

Runner = Callable[[Sequence[str], float], Result]


def _spawn(argv: Sequence[str], errors: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                            start_new_session=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a program's group. Wait only briefly: one that hangs in its driver can't be killed."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=2)


def default_runner(argv: Sequence[str], timeout_s: float) -> Result:
    """Run a program to its end, or kill its group after `timeout_s`."""
    try:
        process = _spawn(argv, subprocess.PIPE)
    except (OSError, ValueError) as error:
        return Result(None, "", f"{argv[0]} does not start: {_words(error)}")
    try:
        out, err = process.communicate(timeout=timeout_s)
        return Result(process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))
    except subprocess.TimeoutExpired:
        return Result(None, "", f"no answer within {timeout_s:.1f} s")
    finally:
        _end(process)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _words(error: Exception) -> str:
    """Turn an error of the operating system into a few lower-case words."""
    words = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
    return words[0].lower() + words[1:]


class Stream:
    """A program that goes on talking; a thread gathers its lines, so that its pipe never fills."""

    def __init__(self, argv: Sequence[str]) -> None:
        """Start it; raises OSError when that can't be done. Only the newest lines are kept."""
        self._lines: deque[str] = deque(maxlen=10_000)
        self._process = _spawn(argv, subprocess.STDOUT)
        self._thread = threading.Thread(target=self._gather, daemon=True, name="stream")
        self._thread.start()

    def _gather(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        for line in iter(lambda: pipe.readline(SMALL_READ_BYTES), b""):
            self._lines.append(line.decode("utf-8", "replace").rstrip("\r\n"))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Say whether the program has closed its output and all of that has been gathered."""
        return not self._thread.is_alive()

    def lines(self) -> list[str]:
        """Take the lines that came since the last call."""
        return [self._lines.popleft() for _ in range(len(self._lines))]

    def close(self) -> None:
        """End the program and its thread; a second call does nothing."""
        _end(self._process)
        self._thread.join(timeout=2)
        if self._process.stdout is not None and not self._thread.is_alive():
            self._process.stdout.close()


DESCRIPTORS = "/proc/self/fd/"  # proc(5): opening a name in it opens the very file that the descriptor has


def descriptor_path(descriptor: int) -> str:
    """Return the path by which a process opens the file behind a descriptor that it inherited."""
    return f"{DESCRIPTORS}{descriptor}"


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Make a folder, and each parent that is missing, for the owner alone; OSError where that fails."""
    path, missing = os.path.abspath(folder), []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    for name in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700)


def make_private_folder(folder: str | os.PathLike[str]) -> None:
    """Make a folder as make_folder() does, and check that it is this user's alone; OSError says why not."""
    make_folder(folder)
    path = os.path.abspath(folder)
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "it is a file: remove it", path)
    why = why_shared(path)
    if not why and found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        why = "it is open to other users: close it with chmod 700"
    if why:
        raise PermissionError(errno.EPERM, why, path)


def why_shared(path: str) -> str:
    """Return why others may change what a folder holds or where its path leads, "" where they may not.

    Root may anyhow. A link on the way that belongs to another user could be sent elsewhere.
    """
    found, mine = os.stat(path), os.geteuid()
    if found.st_uid != mine:
        return f"it belongs to another user (uid {found.st_uid}): make it yours"
    place = ""
    for part in os.path.abspath(path).split("/")[1:]:
        place += f"/{part}"
        link = os.lstat(place)
        if stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, mine):
            return f"{place} is a link of another user (uid {link.st_uid}): remove it"
    return "it is open to other users: close it with chmod 700" if found.st_mode & 0o022 else ""


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that counts: card2 before card10."""
    if name.isascii() and name.isdigit() and len(name) < 19:  # a process: there are hundreds
        return [(-1, ""), (int(name), ""), (-1, "")]
    parts = re.split(r"([0-9]{1,18})", name)
    return [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in parts]


class Host:
    """The machine as files and programs, all under one root.

    With a root other than "/" nothing of this machine or process gets into an answer: links are followed
    inside the tree, programs come from it, and a file without any read bit counts as refused, even for
    root (so a recording keeps what could not be read).
    """

    def __init__(self, root: str = "/", run: Runner = default_runner) -> None:
        self.root = os.path.abspath(root)
        self.foreign = self.root != "/"
        self._run = run

    def resolve(self, path: str) -> tuple[str, dict[str, str]]:
        """Follow links inside the root: gives the final path and {link: target} met on the way.

        Raises OSError for a loop.
        """
        todo, done, hops = path.split("/")[::-1], "", 0
        met: dict[str, str] = {}
        while todo:
            part = todo.pop()
            if part in ("", ".", ".."):
                done = done.rpartition("/")[0] if part == ".." else done
                continue
            try:
                target = os.readlink((self.root if self.foreign else "") + f"{done}/{part}")
            except FileNotFoundError:
                return f"{done}/{part}", met  # nor is there anything below it
            except (OSError, ValueError):
                done = f"{done}/{part}"
                continue
            hops += 1
            if hops > 40:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            met[f"{done}/{part}"] = target
            done = "" if target.startswith("/") else done
            todo += target.split("/")[::-1]
        return done or "/", met

    def _real(self, path: str) -> str:
        return self.root + self.resolve(path)[0] if self.foreign else path

    def _beside(self, path: str) -> str:
        """Map a path whose last part, a link perhaps, is not to be followed."""
        return os.path.join(self._real(os.path.dirname(path)), os.path.basename(path))

    def read(self, path: str) -> str | None:
        """Read a file, bounded; None when that can't be done (`why` has the reason)."""
        return self._read(path)[0]

    def why(self, path: str) -> str:
        """Say why read() gave None: "missing: PATH", "permission denied: PATH" and the like."""
        return self._read(path)[1]

    def _read(self, path: str) -> tuple[str | None, str]:
        limit = LARGE_READ_BYTES if path.startswith(("/proc/", "/usr/")) else SMALL_READ_BYTES
        try:
            # Not blocking: neither a FIFO in a strange tree nor a driver that says EAGAIN may hang us.
            handle = os.open(self._real(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if self.foreign and not os.fstat(handle).st_mode & 0o444:
                    return None, f"permission denied: {path}"
                data = os.read(handle, limit)
                # sysfs gives all at once or nothing; /proc a page or so for each read.
                while path.startswith("/proc/") and data and len(data) < limit:
                    more = os.read(handle, limit - len(data))
                    if not more:
                        break
                    data += more
            finally:
                os.close(handle)
        except FileNotFoundError:
            return None, f"missing: {path}"
        except (OSError, ValueError) as error:
            return None, f"{_words(error)}: {path}"
        return data.decode("utf-8", "replace"), f"not understood: {path}"

    def list(self, path: str) -> list[str]:
        """Name what a folder holds, numbers sorted as numbers; [] when there is none."""
        try:
            return sorted(os.listdir(self._real(path)), key=natural)
        except (OSError, ValueError):
            return []

    def exists(self, path: str) -> bool:
        try:
            return os.path.lexists(self._beside(path))
        except (OSError, ValueError):
            return False

    def link(self, path: str) -> str | None:
        """Give the last part of a link's target: a driver's name, a device's address."""
        try:
            return os.path.basename(os.readlink(self._beside(path))) or None
        except (OSError, ValueError):
            return None

    def space(self, mount: str) -> tuple[int, int] | None:
        """Size of a file system, and the bytes that an unprivileged user may still fill."""
        try:
            found = None if self.foreign else os.statvfs(mount)
        except OSError:
            return None
        return (found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize) if found else None

    def stamp(self, path: str) -> str:
        """Identify a file's present content: its real path, size and modification time."""
        with contextlib.suppress(OSError):
            found = os.stat(path)
            return f"{os.path.realpath(path)} {found.st_size} {found.st_mtime_ns}"
        return path

    def usable(self, path: str) -> bool:
        """Say whether this process may use a device node."""
        return os.access(path, os.R_OK | os.W_OK)

    def write(self, path: str, text: str) -> str | None:
        """Replace a file at once, for its owner alone. Gives None, or why that could not be done."""
        scratch = path
        try:
            folder = os.path.dirname(os.path.abspath(path))
            make_folder(folder)
            handle, scratch = tempfile.mkstemp(".tmp", ".ffdist-", folder)  # a name that nobody guesses
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(scratch, path)
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError, ValueError):
                if scratch != path:
                    os.unlink(scratch)
            return f"{_words(error)}: {path}"
        return None

    def set(self, path: str, text: str) -> bool:
        """Write into a file of the kernel, which must be there; say whether it was taken."""
        try:
            handle = os.open(self._real(path), os.O_WRONLY | os.O_CLOEXEC)
            try:
                return os.write(handle, text.encode()) > 0
            finally:
                os.close(handle)
        except (OSError, ValueError):
            return False

    def make(self, folder: str) -> bool:
        """Make a folder below one that is there; say whether it is there now."""
        with contextlib.suppress(OSError, ValueError):
            os.mkdir(self._real(folder))
        return os.path.isdir(self._real(folder))

    def drop(self, folder: str) -> bool:
        """Remove an empty folder, or a control group without processes; say whether it is gone."""
        with contextlib.suppress(OSError, ValueError):
            os.rmdir(self._real(folder))
        return not self.exists(folder)

    def kill(self, pid: int) -> None:
        """End a process at once; one of a foreign root is not ours."""
        with contextlib.suppress(OSError):
            if not self.foreign:
                os.kill(pid, signal.SIGKILL)

    def which(self, name: str) -> str | None:
        """Find a program, on PATH or in the usual folders of a foreign tree. Gives a path to run."""
        if not self.foreign:
            return shutil.which(name)
        folders = os.pathsep.join(f"{self.root}/{folder}" for folder in TREE_PATH)
        return shutil.which(os.path.basename(name), path=folders)

    def run(self, argv: Sequence[str], timeout_s: float) -> Result:
        """Run a program that which() found; never raises."""
        return self._run(argv, timeout_s)

    def stream(self, argv: Sequence[str]) -> Stream | None:
        """Start a program whose lines are gathered until it is closed; None when it does not start."""
        try:
            return Stream(argv)
        except (OSError, ValueError):
            return None

    def uname(self, what: str) -> str | None:
        """Ask the kernel for sysname, nodename, release or machine; None for a foreign root."""
        return None if self.foreign else getattr(os.uname(), what, None) or None

    def group(self, pid: int) -> int | None:
        """Ask for a process's group, twenty times as quick as its stat; None when that can't be asked."""
        try:
            return None if self.foreign else os.getpgid(pid)
        except OSError:
            return None


GRACE_S = 1.0  # between TERM and KILL
# An encode takes what the machine has left, never what its users need.
NICE = ("nice", "-n", "10")
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")  # util-linux 2.33; busybox has none

class Exit(NamedTuple):
    """How a process ended: status (negative: the signal), CPU s and peak memory of it and its children."""

    returncode: int
    cpu_seconds: float
    peak_rss_bytes: int


class ProgramMissing(Exception):
    """A program is not there or not executable; `args[0]` is its name."""


@functools.lru_cache(maxsize=1)
def launcher() -> tuple[str, ...]:
    """Return the words before a command: low priority, and where possible an end with the agent's own."""
    words: tuple[str, ...] = ()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        tried = subprocess.run([*DIE_WITH_PARENT, "true"], stdin=subprocess.DEVNULL, capture_output=True,
                               timeout=10)
        words = DIE_WITH_PARENT if tried.returncode == 0 else ()
    return (*words, *NICE) if shutil.which(NICE[0]) else words


class Program:
    """One program in a process group of its own, niced, both its pipes always drained."""

    def __init__(self, argv: Sequence[str], folder: Path, on_stdout: Callable[[str], None],
                 on_stderr: Callable[[str], None], descriptors: Iterable[int] = ()) -> None:
        if shutil.which(argv[0]) is None:
            raise ProgramMissing(argv[0])
        self._popen = subprocess.Popen([*launcher(), *argv], cwd=folder, stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                                       pass_fds=tuple(descriptors))
        self.pid = self._popen.pid
        self.ended = threading.Event()
        self.exit: Exit | None = None
        drains = [threading.Thread(target=_drain, args=pair, daemon=True)
                  for pair in ((self._popen.stdout, on_stdout), (self._popen.stderr, on_stderr))]
        for drain in drains:
            drain.start()
        threading.Thread(target=self._reap, args=(drains,), daemon=True).start()

    def _reap(self, drains: list[threading.Thread]) -> None:
        # The zombie keeps the group's number from being given to a stranger while the rest is killed.
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.signal(signal.SIGKILL)
        for drain in drains:
            drain.join(2)
        _, status, usage = os.wait4(self.pid, 0)
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        self._popen.returncode = code
        self.exit = Exit(code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
        self.ended.set()

    def signal(self, number: int) -> None:
        """Send a signal to the whole group; one that has gone already is no error."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def end(self) -> None:
        """End the group: TERM, then KILL; returns when it is gone."""
        if self.ended.is_set():
            return
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        if not self.ended.wait(GRACE_S):
            self.signal(signal.SIGKILL)
            self.ended.wait(10)


def _drain(pipe: Any, take: Callable[[str], None]) -> None:
    with pipe:
        for line in iter(lambda: pipe.readline(1 << 16), b""):
            take(line.decode("utf-8", "replace").rstrip("\r\n"))


# ---- 4 Archive ------------------------------------------------------------------------------------

class Recorder(Host):
    """A host that writes down what it was asked, under real paths, with the links on the way."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.root)
        self.entries: dict[str, tuple[str, str]] = {}

    def _enter(self, path: str, kind: str, text: str) -> None:
        final, links = self.resolve(path)
        self.entries.update({link: ("link", target) for link, target in links.items()})
        if self.entries.get(final, ("there",))[0] in ("there", "dir"):
            self.entries[final] = (kind, text)

    def read(self, path: str) -> str | None:
        text, why = self._read(path)
        if path.startswith(("/proc/", "/sys/", "/etc/", "/run/", "/usr/lib/")):
            if text is not None:
                self._enter(path, "file", scrub(path, text))
            elif not why.startswith(("missing", "not a directory", "too many levels")):
                self._enter(path, "refused", "")
        return text

    def list(self, path: str) -> list[str]:
        names = super().list(path)
        if path.startswith("/sys/") and super().exists(path):
            self._enter(path, "dir", "")
            for name in names:  # a name must be there again even when nobody opens it
                self.exists(f"{path}/{name}")
        return names

    def exists(self, path: str) -> bool:
        found = super().exists(path)
        if found and path.startswith(("/sys/", "/run/", "/.dockerenv")):
            parent, name = os.path.split(path)
            self.entries.setdefault(f"{self.resolve(parent)[0].rstrip('/')}/{name}", ("there", ""))
        return found

    def link(self, path: str) -> str | None:
        target = super().link(path)
        if target is not None:
            parent, name = os.path.split(path)
            self.entries[f"{self.resolve(parent)[0]}/{name}"] = ("link", f"../{target}")
        return target


def scrub(path: str, text: str) -> str:
    """Take out what names this one machine or its owner: serial numbers, UUIDs, mounts of others."""
    if path.endswith("/hostname"):
        return "recorded\n"
    if path.endswith(("/mounts", "/mountinfo")):
        keep = re.compile(rf" (cgroup2?|{'|'.join(LOCAL_FILESYSTEMS)}) ")
        return "".join(line + "\n" for line in text.splitlines() if keep.search(line))
    text = re.sub(r"(?im)^(serial|machine id|uuid)([\t ]*:).*$", r"\1\2 0", text)
    return re.sub(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "GPU-0", text)


def archive(entries: Mapping[str, tuple[str, str]]) -> str:
    """Write {path: (kind, text)} as one text: before each entry a line "=== KIND PATH".

    Kinds: file; part (a file without a newline at its end); link (the text is its target); dir; refused
    (it could not be read); there (nobody read it). Backslashes, control characters and a leading "==="
    are written as \\xNN.
    """
    lines = []
    for path, (kind, text) in sorted(entries.items(), key=lambda item: natural(item[0])):
        kind = "part" if kind == "file" and not text.endswith("\n") else kind
        lines.append(f"=== {kind} {path}")
        if text or kind == "file":
            lines += [_escape(line) for line in (text[:-1] if kind == "file" else text).split("\n")]
    return "\n".join(lines) + "\n"


def _escape(line: str) -> str:
    line = "".join(char if (char.isprintable() and char != "\\") or char == "\t"
                   else f"\\x{ord(char):02x}" if ord(char) < 256 else "?" for char in line)
    return "\\x3d" + line[1:] if line.startswith("===") else line


def parse_archive(text: str) -> dict[str, tuple[str, str]]:
    """Read an archive into {path: (kind, text)}; ValueError for what is none."""
    entries: dict[str, tuple[str, str]] = {}
    parts = re.split(r"^=== (file|part|link|dir|refused|there) (/.*)\n", text, flags=re.MULTILINE)
    if parts[0].strip() or len(parts) == 1:
        raise ValueError(f"no archive of --record: it begins with {parts[0][:40]!r}")
    for kind, path, body in zip(parts[1::3], parts[2::3], parts[3::3]):
        plain = re.sub(r"\\x([0-9a-f]{2})", lambda found: chr(int(found.group(1), 16)), body)
        entries[path] = (kind, plain if kind == "file" else plain[:-1])
    return entries


def unpack(text: str, folder: str) -> list[str]:
    """Make the tree of an archive; gives the paths of its files. ValueError or OSError for what is none.

    Nothing is written outside of `folder`.
    """
    entries, folder = parse_archive(text), os.path.realpath(folder)
    for kinds in (("file", "part", "refused", "dir"), ("link",), ("there",)):
        for path, (kind, body) in entries.items():
            place = folder + path
            if kind not in kinds or not f"{os.path.realpath(os.path.dirname(place))}/".startswith(
                    f"{folder}/") or (kind == "there" and os.path.lexists(place)):
                continue
            os.makedirs(place if kind == "dir" else os.path.dirname(place), exist_ok=True)
            if kind == "link":
                os.symlink(body, place)
            elif kind != "dir":
                with open(place, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                    file.write(body)
                os.chmod(place, 0 if kind == "refused" else 0o644)
    return [path for path, (kind, _) in entries.items() if kind in ("file", "part")]


# ---- 5 Parsers ------------------------------------------------------------------------------------

def parse_int(text: str | None) -> int | None:
    """Read a decimal number as sysfs prints it; None for anything else."""
    found = re.fullmatch(r"\s*(-?[0-9]{1,20})\s*", text or "", re.ASCII)
    return int(found.group(1)) if found else None


def parse_float(text: str | None) -> float | None:
    """Read a number of nvidia-smi; None for [N/A], [Not Supported] and other words."""
    found = re.fullmatch(r"\s*(-?[0-9]{1,15}(?:\.[0-9]{1,15})?)\s*", text or "", re.ASCII)
    return float(found.group(1)) if found else None


def parse_word(text: str | None) -> str | None:
    """Read a name on one line, without the NUL that ends it in a device tree; None when it is garbage."""
    line = (text or "").strip("\0\n\t ").split("\n")[0].strip()[:200]
    return line if line and line.isprintable() and "\ufffd" not in line else None


def parse_cpu_list(text: str | None) -> int | None:
    """Count the CPUs of a list such as "0-3,8,10-11"."""
    cpus: set[int] = set()
    for part in (text or "").strip().split(","):
        found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part, re.ASCII)
        first, last = (int(found.group(1)), int(found.group(2) or found.group(1))) if found else (1, 0)
        if not first <= last < MAX_CPUS:
            return None
        cpus.update(range(first, last + 1))
    return len(cpus)


def parse_blocks(text: str | None) -> list[dict[str, str]]:
    """Split "key: value" lines into blocks at the empty lines between them."""
    blocks: list[dict[str, str]] = [{}]
    for line in (text or "").splitlines():
        key, found, value = line.partition(":")
        if found:
            blocks[-1].setdefault(key.strip(), value.strip())
        elif not line.strip() and blocks[-1]:
            blocks.append({})
    return [block for block in blocks if block]


def parse_sizes(text: str | None) -> dict[str, int]:
    """Read the "Name:  123 kB" lines of /proc/meminfo and /proc/PID/status into bytes."""
    found = re.findall(r"^(\w+):\s+([0-9]{1,15}) kB$", text or "", re.MULTILINE | re.ASCII)
    return {name: int(value) * 1024 for name, value in found}


def parse_arm_core(block: Mapping[str, str]) -> tuple[str, str] | None:
    """Name an Arm core's (maker, core) by their numbers, for such kernels print no model name."""
    try:
        maker, part = int(block["CPU implementer"], 16), int(block["CPU part"], 16)
    except (KeyError, ValueError):
        return None
    return ARM_MAKERS.get(maker, f"maker {maker:#x}"), ARM_CORES.get((maker, part), f"part {part:#x}")


def parse_cgroup(text: str | None) -> list[tuple[str, str]]:
    """Read /proc/self/cgroup into (controllers, path); version 2 names no controllers."""
    return re.findall(r"^[0-9]+:([^:\n]*):(/.*)$", text or "", re.MULTILINE)


def parse_cgroup_mounts(text: str | None) -> list[tuple[str, str, str, str]]:
    """Read (root, mount point, type, super options) of the control group mounts in mountinfo."""
    return re.findall(r"^(?:\S+ ){3}(\S+) (\S+) .* - (cgroup2?) \S+ (\S+)$", text or "", re.MULTILINE)


def parse_mounts(text: str | None) -> list[tuple[str, str, str]]:
    """Read /proc/self/mounts into (device, mount point, type), escapes such as \\040 undone."""
    def plain(word: str) -> str:
        return re.sub(r"\\([0-3][0-7]{2})", lambda found: chr(int(found.group(1), 8)), word)

    found = re.findall(r"^(\S+) (/\S*) (\S+) ", text or "", re.MULTILINE)
    return [(plain(device), plain(mount), kind) for device, mount, kind in found]


def parse_cpu_times(text: str | None) -> tuple[int, int] | None:
    """Read the first line of /proc/stat into (busy, all) ticks; guest time is inside user time."""
    found = re.match(r"cpu +((?:[0-9]{1,18} ){3,9}[0-9]{1,18})\n", text or "", re.ASCII)
    ticks = [int(word) for word in found.group(1).split()][:8] if found else []
    return (sum(ticks) - sum(ticks[3:5]), sum(ticks)) if ticks else None  # 3 and 4: idle, waiting for I/O


def parse_process(text: str | None) -> dict[str, int]:
    """Read group, ticks (with those of children waited for) and start from /proc/PID/stat, or nothing.

    A command's name may hold spaces and parentheses: the fields begin after the last one.
    """
    try:
        numbers = [int(word) for word in (text or "").rpartition(")")[2].split()[1:20]]
        return {"group": numbers[1], "ticks": sum(numbers[10:14]), "start": numbers[18]}
    except (ValueError, IndexError):
        return {}


def parse_engines(text: str | None) -> dict[str, int]:
    """Give {client: ns that it kept a GPU's engines busy} of a descriptor's fdinfo, {} of another file's.

    Of xe it is their cycles, which are as good for shares.
    """
    client = re.search(r"^drm-client-id:\s*([0-9]{1,18})$", text or "", re.MULTILINE)
    device = re.search(r"^drm-pdev:\s*(\S+)$", text or "", re.MULTILINE)
    busy = (re.findall(r"^drm-engine-(?!capacity-)\S+:\s*([0-9]{1,18}) ns$", text or "", re.MULTILINE)
            or re.findall(r"^drm-cycles-\S+:\s*([0-9]{1,18})$", text or "", re.MULTILINE))
    return {f"{device and device.group(1)} {client.group(1)}": sum(map(int, busy))} if client else {}


def parse_csv(text: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """Read nvidia-smi's csv,noheader,nounits; lines of another shape are left out."""
    rows = [[word.strip() for word in line.split(",")] for line in text.splitlines()]
    return [dict(zip(fields, row)) for row in rows if len(row) == len(fields)]


def parse_refused(text: str) -> str:
    """Name the field that nvidia-smi does not know, "" where it complains of none."""
    found = re.search(r'Field "([\w.]+)" is not a valid field', text)
    return found.group(1) if found else ""


def parse_pci_address(text: str | None) -> str | None:
    """Write a PCI address as sysfs does: nvidia-smi says 00000000:3B:00.0."""
    found = re.fullmatch(r"([0-9a-f]{4,8}):([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", (text or "").lower())
    return f"{int(found.group(1), 16):04x}:{found.group(2)}" if found else None


def parse_pci_name(text: str | None, vendor: str, device: str) -> str | None:
    """Find a device in pci.ids; the part in brackets is what people call it."""
    block = re.search(rf"^{re.escape(vendor)}  .*\n((?:[\t#\n].*\n?)*)", text or "", re.MULTILINE)
    found = re.search(rf"^\t{re.escape(device)}  (.+)$", block.group(1) if block else "", re.MULTILINE)
    name = found.group(1) if found else ""
    inner = re.search(r"\[([^\]]+)\]", name)
    return parse_word(inner.group(1) if inner else name)


def parse_time_stamp(text: str | None) -> float | None:
    """Read nvidia-smi's "2023/05/17 14:23:11.123" into seconds; only differences mean anything."""
    with contextlib.suppress(ValueError):
        moment = datetime.datetime.strptime(text or "", "%Y/%m/%d %H:%M:%S.%f")
        return moment.replace(tzinfo=datetime.timezone.utc).timestamp()
    return None


def parse_listed(text: str) -> set[str]:
    """Read the names of `ffmpeg -encoders` or `-filters`: the word after the flags."""
    return set(re.findall(r"^ [A-Z.|]{2,6} +([\w-]+) ", text, re.MULTILINE | re.ASCII))


GENERIC_WORDS = re.compile(
    r"Error (initializing|parsing|while opening|opening|submitting|sending)|Conversion failed|Task finished"
    r"|Nothing was written|Device creation failed|Terminating thread|Could not open encoder|\w+ ?\[info\]")


def parse_failure(result: Result) -> str:
    """Choose the line of FFmpeg's own words that says most about why it failed."""
    lines = [re.sub(r"^(\[[^\]]*\] *)+", "", line).strip() for line in result.stderr.splitlines()]
    telling = [line for line in lines if line and not GENERIC_WORDS.match(line)]
    code = result.returncode or 0
    end = f"ffmpeg was ended by signal {-code}" if code < 0 else f"ffmpeg gave exit code {code} and no words"
    return next(iter([*telling, *filter(None, lines)]), end)[:160]


# ---- 6 Detectors ----------------------------------------------------------------------------------

def _word(host: Host, path: str) -> str | None:
    return parse_word(host.read(path))


def _int(host: Host, path: str) -> int | None:
    return parse_int(host.read(path))


def _first(values: Iterable[str | None]) -> str | None:
    return next(filter(None, values), None)


def _system(host: Host, hw: Hardware) -> Hardware:
    """Name, kernel, operating system and board."""
    base, releases = "/proc/sys/kernel/", ("/etc/os-release", "/usr/lib/os-release")
    pretty = [re.search(r"^PRETTY_NAME=([\"']?)(.+)\1\s*$", host.read(path) or "", re.MULTILINE)
              for path in releases]
    kind = _word(host, base + "ostype") or host.uname("sysname")
    hw.unknown.update(address=host.why(base + "hostname"), os=host.why(base + "ostype"),
                      os_name=host.why(releases[0]), kernel=host.why(base + "osrelease"),
                      machine="neither DMI nor a device tree names the board")
    name = _word(host, base + "hostname") or _word(host, "/etc/hostname") or host.uname("nodename")
    return replace(hw, address=name, os=kind.lower() if kind else None, machine=_board(host),
                   os_name=_first(parse_word(one.group(2)) for one in pretty if one),
                   kernel=_word(host, base + "osrelease") or host.uname("release"))


def _board(host: Host) -> str | None:
    """Name the board: DMI knows on PCs and servers, the device tree elsewhere."""
    dmi = [_word(host, f"/sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name")]
    return " ".join(filter(None, dmi)) or _word(host, "/proc/device-tree/model")


def _cpu(host: Host, hw: Hardware) -> Hardware:
    """Model, counts, flags, frequency."""
    blocks = parse_blocks(host.read("/proc/cpuinfo"))
    merged = {key: value for block in reversed(blocks) for key, value in block.items()}
    cores, sockets = _topology(host, blocks)
    counted = sum("processor" in block for block in blocks)
    ticking = len(re.findall(r"^cpu[0-9]+ ", host.read("/proc/stat") or "", re.MULTILINE))
    flags = set((merged.get("flags") or merged.get("Features") or merged.get("features") or "").split())
    speeds = [_int(host, f"{CPUS}/cpufreq/{name}/cpuinfo_max_freq") for name in host.list(f"{CPUS}/cpufreq")]
    core = parse_arm_core(merged)
    model = _first(parse_word(" ".join(merged.get(key, "").split()))
                   for key in ("model name", "cpu model", "cpu", *([] if core else ["Processor", "uarch"])))
    if core and (model is None or model.startswith("ARMv")):
        model = " ".join(core)
    why = host.why("/proc/cpuinfo")
    names = ("cpu_model", "cpu_vendor", "cpu_logical", "cpu_cores", "cpu_sockets", "arch")
    hw.unknown.update({name: f"neither /sys nor /proc/cpuinfo says it ({why})" for name in names})
    hw.unknown["cpu_mhz_max"] = f"no frequency scaling under {CPUS}/cpufreq"
    return replace(
        hw, cpu_model=model, cpu_vendor=parse_word(merged.get("vendor_id")) or (core[0] if core else None),
        cpu_logical=parse_cpu_list(host.read(f"{CPUS}/online")) or counted or ticking or None,
        cpu_cores=cores, cpu_sockets=sockets, arch=_arch(host, merged, flags),
        cpu_flags=tuple(flag for flag in ENCODER_FLAGS if flag in flags),
        cpu_mhz_max=max((khz / 1000 for khz in speeds if khz and khz > 0), default=None))


def _arch(host: Host, merged: Mapping[str, str], flags: set[str]) -> str | None:
    """Give Go's name of the architecture; before Linux 6.1 only the shape of cpuinfo tells it."""
    word = _word(host, "/proc/sys/kernel/arch") or host.uname("machine")
    if word:
        return GO_ARCH.get(word, word)
    if "CPU architecture" in merged:
        return "arm64" if "asimd" in flags else "arm"
    return ("amd64" if "lm" in flags else "386") if "fpu" in flags else None


def _topology(host: Host, blocks: Sequence[Mapping[str, str]]) -> tuple[int | None, int | None]:
    """Count cores and sockets: the threads of one core name the same siblings."""
    names = (name for name in host.list(CPUS) if re.fullmatch(r"cpu[0-9]+", name, re.ASCII))
    cpus = [f"{CPUS}/{name}/topology" for name in names]
    siblings = (_word(host, f"{cpu}/thread_siblings_list") for cpu in cpus)
    packages = (_int(host, f"{cpu}/physical_package_id") for cpu in cpus)
    cores = {word for word in siblings if parse_cpu_list(word)}
    sockets = {number for number in packages if number is not None and number >= 0}
    pairs = {(b["physical id"], b["core id"]) for b in blocks if "physical id" in b and "core id" in b}
    if pairs and not (cores and sockets):
        return len(pairs), len({socket for socket, _ in pairs})
    return len(cores) or None, len(sockets) or None


def _limits(host: Host, hw: Hardware) -> Hardware:
    """Memory and control group, and what they leave to this process."""
    info, group = parse_sizes(host.read("/proc/meminfo")), cgroup_limits(host)
    total = info.get("MemTotal")
    status = {k: v for block in parse_blocks(host.read("/proc/self/status")) for k, v in block.items()}
    allowed = parse_cpu_list(status.get("Cpus_allowed_list"))
    threads = [hw.cpu_logical, allowed, None if group.cpus is None else max(1, math.ceil(group.cpus))]
    for name in ("ram_bytes", "memory_total_bytes", "memory_available_bytes", "swap_bytes"):
        hw.unknown[name] = f"/proc/meminfo does not say it ({host.why('/proc/meminfo')})"
    hw.unknown["cpu_threads"] = "neither the CPUs nor this process's affinity can be read"
    return replace(
        hw, cgroup=group, memory_total_bytes=total, memory_available_bytes=info.get("MemAvailable"),
        swap_bytes=info.get("SwapTotal"),
        cpu_threads=min((count for count in threads if count is not None), default=None),
        ram_bytes=total if total is None or group.memory_bytes is None else min(total, group.memory_bytes))


def cgroup_limits(host: Host) -> Cgroup:
    """Find the tightest CPU and memory limits from this process's control group up to its root.

    Documentation/admin-guide/cgroup-v2.rst (cpu.max, memory.max), cgroup-v1 (cpu.cfs_quota_us).
    """
    version, cpus, memory = 0, [], []
    for _, its_version, folders in _groups(host):
        version = max(version, its_version)
        for folder in folders:
            cpus.append(_cpu_quota(host, folder))
            memory += [_int(host, f"{folder}/memory.{name}") for name in ("max", "limit_in_bytes")]
    # Version 1 says "no limit" with the largest multiple of a page below 2^63.
    bounded = min((n for n in memory if n is not None and 0 < n < 2**62), default=None)
    return Cgroup(version or None, min((n for n in cpus if n is not None), default=None), bounded)


def _groups(host: Host) -> Iterator[tuple[set[str], int, list[str]]]:
    """Give (controllers, version, folders) of each hierarchy that limits CPU or memory of this process."""
    mounts = parse_cgroup_mounts(host.read("/proc/self/mountinfo"))
    for names, path in parse_cgroup(host.read("/proc/self/cgroup")):
        controllers = set(names.split(",")) & {"cpu", "memory"}
        if controllers or not names:
            yield controllers, 1 if names else 2, _cgroup_folders(mounts, controllers, path)


def _cgroup_folders(mounts: Sequence[tuple[str, str, str, str]], controllers: set[str],
                    path: str) -> list[str]:
    """List the folders of a control group and its parents, below where its hierarchy is mounted."""
    points = [(root, point) for root, point, kind, options in mounts
              if (controllers & set(options.split(",")) if controllers else kind == "cgroup2")]
    usual = [("/", f"/sys/fs/cgroup/{name}") for name in sorted(controllers)] or [("/", "/sys/fs/cgroup")]
    folders = []
    for root, point in points or usual:
        inner = path[len(root):] if root != "/" and (path + "/").startswith(root + "/") else path
        # Inside a container the path may be the host's, which does not exist here: its parents still do.
        parts = [part for part in inner.split("/") if part not in ("", ".", "..")][:32]
        folders += ["/".join([point, *parts[:depth]]) for depth in range(len(parts), -1, -1)]
    return folders


def _cpu_quota(host: Host, folder: str) -> float | None:
    """Read a quota in CPUs; "max" and -1 mean none."""
    words = (host.read(f"{folder}/cpu.max") or "").split()
    words = words or [host.read(f"{folder}/cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    quota, period = (parse_int(word) or 0 for word in words) if len(words) == 2 else (0, 0)
    return quota / period if quota > 0 and period > 0 else None


def _virtual(host: Host, hw: Hardware) -> Hardware:
    """Virtual machine and container, null when it is neither."""
    paths = " ".join(path for _, path in parse_cgroup(host.read("/proc/self/cgroup")))
    container = _first([_word(host, "/run/systemd/container"),
                        *(kind for path, kind in CONTAINER_FILES if host.exists(path)),
                        *(kind for word, kind in CONTAINER_PATHS if word in paths)])
    return replace(hw, virtual=virtual_kind(host), container=container)


def virtual_kind(host: Host) -> str | None:
    """Name the kind of virtual machine; None is bare metal, as far as the machine says."""
    if "microsoft" in (host.read("/proc/sys/kernel/osrelease") or "").lower():
        return "wsl"
    if host.exists("/proc/device-tree/hypervisor/compatible"):
        return "kvm"
    blocks = parse_blocks(host.read("/proc/cpuinfo"))
    flags = [block["flags"].split() for block in blocks if "flags" in block][:1]
    if flags and "hypervisor" not in flags[0]:
        return None  # a rented bare machine has its cloud's name in DMI too
    board = (_board(host) or "").lower()
    named = (kind for words, kind in VIRTUAL_DMI if words in board)
    return _word(host, "/sys/hypervisor/type") or next(named, None) or ("vm" if flags else None)


def battery_names(host: Host) -> list[str]:
    """Name the batteries that are there and power the machine; scope Device is a mouse's.

    Documentation/ABI/testing/sysfs-class-power.
    """
    rows = {name: [_word(host, f"{SUPPLY}/{name}/{file}") for file in ("type", "scope", "present")]
            for name in host.list(SUPPLY)}
    return [name for name, (kind, scope, present) in rows.items()
            if kind == "Battery" and scope != "Device" and present != "0"]


def _batteries(host: Host, hw: Hardware) -> Hardware:
    found = tuple(
        Battery(name, _word(host, f"{SUPPLY}/{name}/status"), _int(host, f"{SUPPLY}/{name}/capacity"))
        for name in battery_names(host))
    hw.unknown["has_battery"] = f"missing: {SUPPLY}"
    return replace(hw, batteries=found, has_battery=bool(found) if host.exists(SUPPLY) else None)


def _disks(host: Host, hw: Hardware) -> Hardware:
    """Local file systems with their room, one for each device."""
    best: dict[str, tuple[str, str, str]] = {}
    mounts = [row for row in parse_mounts(host.read("/proc/self/mounts")) if row[2] in LOCAL_FILESYSTEMS]
    for device, mount, kind in sorted(mounts, key=lambda row: len(row[1])):
        best.setdefault(device if device.startswith("/") else f"{device} {mount}", (mount, device, kind))
    disks = []
    for mount, device, kind in sorted(best.values()):
        sectors = _int(host, f"/sys/class/block/{os.path.basename(device)}/size")  # always of 512 bytes
        size, free = host.space(mount) or (None if sectors is None else sectors * 512, None)
        if free is None:
            why = "another root is read" if host.foreign else "it can't be asked"
            hw.unknown[f"disks.{mount}.free_bytes"] = why
        if size is None:
            hw.unknown[f"disks.{mount}.size_bytes"] = f"no size of {device} under /sys/class/block"
        disks.append(Disk(mount, device, kind, size, free))
    if not disks:
        hw.unknown["disks"] = f"no local file system among the mounts ({host.why('/proc/self/mounts')})"
    return replace(hw, disks=tuple(disks))


def _gpus(host: Host, hw: Hardware) -> Hardware:
    """GPUs of the PCI bus and of boards, told more of by nvidia-smi."""
    gpus = [*_pci_gpus(host), *_board_gpus(host)]
    rows, trouble = _ask_smi(host)
    for row in rows:
        address = parse_pci_address(row["pci.bus_id"])
        at = next((at for at, gpu in enumerate(gpus) if gpu.pci and gpu.pci == address), None)
        if at is None:
            gpus.append(_with_smi(Gpu("NVIDIA", "GPU", driver="nvidia", pci=address), row))
        else:
            gpus[at] = _with_smi(gpus[at], row)
    if trouble and any(gpu.vendor == "NVIDIA" for gpu in gpus):
        hw.problems.append(f"nvidia-smi: {trouble}")
    order = {"NVIDIA": 0, "AMD": 1, "Intel": 2}
    gpus.sort(key=lambda gpu: (order.get(gpu.vendor, 3), bool(gpu.integrated)))
    if not gpus and not (host.exists("/sys/bus/pci/devices") or host.exists("/sys/class/drm")):
        hw.unknown["gpus"] = "neither /sys/bus/pci nor /sys/class/drm is here"
    titles = dict.fromkeys(gpu.title for gpu in gpus)
    return replace(hw, gpus=tuple(gpus), has_gpu=bool(gpus), gpu_type=" + ".join(titles) or None)


def _pci_gpus(host: Host) -> Iterator[Gpu]:
    """Find displays of those who make encoders; one that was handed to a guest is not ours."""
    for address in host.list("/sys/bus/pci/devices"):
        path = f"/sys/bus/pci/devices/{address}"
        if not (host.read(f"{path}/class") or "").startswith("0x03"):
            continue
        vendor, device = (_word(host, f"{path}/{name}") or "" for name in ("vendor", "device"))
        if vendor in GPU_VENDORS and host.link(f"{path}/driver") != "vfio-pci":
            gpu = Gpu(GPU_VENDORS[vendor], f"GPU {vendor[2:]}:{device[2:]}", path=path, pci=address,
                      driver=host.link(f"{path}/driver"), render_node=_render_node(host, path))
            yield _with_sysfs(host, gpu, vendor[2:], device[2:])


def _with_sysfs(host: Host, gpu: Gpu, vendor: str, device: str) -> Gpu:
    """Add the names and sizes that the driver and pci.ids know."""
    told = parse_blocks(host.read(f"/proc/driver/nvidia/gpus/{gpu.pci}/information")) or [{}]
    lists = (host.read(f"/usr/share/{folder}/pci.ids") for folder in ("misc", "hwdata"))
    names = [parse_word(told[0].get("Model")), _word(host, f"{gpu.path}/product_name")]
    # Documentation/gpu/amdgpu/thermal.rst: in1, the north bridge, is there on APUs alone.
    bridges = (_int(host, f"{gpu.path}/hwmon/{chip}/in1_input") for chip in host.list(f"{gpu.path}/hwmon"))
    apu = gpu.vendor == "AMD" and any(volts is not None for volts in bridges)
    return replace(
        gpu, name=_first([*names, *(parse_pci_name(text, vendor, device) for text in lists)]) or gpu.name,
        driver_version=_word(host, f"/sys/module/{gpu.driver}/version"),
        memory_bytes=_int(host, f"{gpu.path}/mem_info_vram_total"),
        integrated=apu or (gpu.vendor == "Intel" and str(gpu.pci).startswith("0000:00:")))


def _render_node(host: Host, path: str) -> str | None:
    return _first(f"/dev/dri/{name}" for name in host.list(f"{path}/drm") if name.startswith("renderD"))


def _board_gpus(host: Host) -> Iterator[Gpu]:
    """Find GPUs that sit on no PCI bus by their driver."""
    for card in host.list("/sys/class/drm"):
        path = f"/sys/class/drm/{card}/device"
        driver = host.link(f"{path}/driver") if re.fullmatch(r"card[0-9]+", card, re.ASCII) else None
        if driver in BOARD_GPUS:
            yield Gpu(*BOARD_GPUS[driver], driver=driver, render_node=_render_node(host, path),
                      integrated=True, path=path)


def smi_argv(program: str, fields: Iterable[str]) -> list[str]:
    """Give the command that asks nvidia-smi for fields, one line of plain values a GPU."""
    return [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def _ask_smi(host: Host) -> tuple[list[dict[str, str]], str | None]:
    """Ask nvidia-smi what the GPUs are. Gives its rows, or what went wrong."""
    program = host.which("nvidia-smi")
    if program is None and host.foreign:  # of a recording its words are kept
        fields, _, words = (host.read("/recorded/nvidia-smi") or "").partition("\n")
        told = [row for row in parse_csv(words, fields.split(",")) if set(SMI_IDENTITY) <= set(row)]
        if told:
            return told, None
    if program is None:
        return [], "not installed, so power, usage and memory of the NVIDIA GPU stay unknown"
    result = host.run(smi_argv(program, SMI_IDENTITY), PROGRAM_S)
    rows = parse_csv(result.stdout, SMI_IDENTITY)
    said = (result.stderr or result.stdout).strip().splitlines() or [f"exit code {result.returncode}"]
    return rows, None if rows else said[0][:160]


def _with_smi(gpu: Gpu, row: Mapping[str, str]) -> Gpu:
    """Add what nvidia-smi says of a GPU."""
    mib = parse_float(row["memory.total"])
    return replace(
        gpu, name=parse_word(row["name"]) or gpu.name, index=parse_int(row["index"]),
        uuid=parse_word(row["uuid"]), driver_version=parse_word(row["driver_version"]),
        memory_bytes=None if mib is None else int(mib * 2**20), integrated=False,
        power_limit_watts=parse_float(row["power.limit"]))


def _rapl(host: Host, hw: Hardware) -> Hardware:
    """Energy counters, and whether this process may read them."""
    zones = rapl_zones(host)
    if not zones:
        hw.unknown["rapl"] = why_no_rapl(host)
    hw.unknown.update({f"rapl.{zone.name}": why_closed(host, zone) for zone in zones if not zone.readable})
    mirrors = mirrored(zones, *read_counters(host, zones)) if may_mirror(host, zones) else {}
    return replace(hw, rapl=tuple(replace(zone, mirror_of=mirrors.get(zone.name)) for zone in zones))


def why_no_rapl(host: Host) -> str:
    """Say why there is no energy counter at all."""
    kind = virtual_kind(host)
    if kind:
        return f"no RAPL: a virtual machine ({kind})"
    if host.exists(POWERCAP):
        return f"no RAPL: {POWERCAP} holds no intel-rapl zone (load the module intel_rapl_msr)"
    return f"no RAPL: {POWERCAP} is missing (no Intel or AMD processor, or it is hidden from here)"


def why_closed(host: Host, zone: RaplZone) -> str:
    """Say why a counter can't be read, and how to allow it for good."""
    why = host.why(f"{POWERCAP}/{zone.zone}/energy_uj")
    return f"{why}; {RAPL_FIX}" if "permission denied" in why else why


def rapl_zones(host: Host) -> tuple[RaplZone, ...]:
    """Find the zones, under names of their own: "package-0", "dram-1".

    Each socket has zones of the same names, and intel-rapl-mmio repeats counters of intel-rapl: of a zone
    that is there twice, the readable one counts, intel-rapl's first.
    """
    found: dict[str, RaplZone] = {}
    suffix: dict[str, str] = {}  # package's zone -> what the names of its parts end in
    for zone in sorted(host.list(POWERCAP), key=lambda zone: zone.startswith("intel-rapl-mmio")):
        match = re.fullmatch(r"(intel-rapl(?:-mmio)?:([0-9]+))(?::[0-9]+)?", zone, re.ASCII)
        if match is None:
            continue
        word = _word(host, f"{POWERCAP}/{zone}/name") or "zone"
        package = re.fullmatch(r"package-([0-9]+(?:-die-[0-9]+)?)", word, re.ASCII)
        part = "package" if package else re.sub(r"^psys-[0-9]{1,3}$", "psys", word)  # named by its socket
        kind = part if part in ("package", "core", "uncore", "dram", "psys") else "other"
        if package:
            suffix[zone] = package.group(1)
        whole = kind in ("package", "psys")
        name = word if whole else f"{word}-{suffix.get(match.group(1), match.group(2))}"
        old = found.get(name)
        if old and old.zone.partition(":")[0] == zone.partition(":")[0]:  # no mirror: another of that name
            name, old = f"{name}#{zone.partition(':')[2]}", None
        readable = _int(host, f"{POWERCAP}/{zone}/energy_uj") is not None
        if old is None or (readable and not old.readable):
            span = _int(host, f"{POWERCAP}/{zone}/max_energy_range_uj")
            found[name] = RaplZone(name, kind, zone, span, readable)
    return tuple(sorted(found.values(), key=lambda zone: natural(zone.name)))


def may_mirror(host: Host, zones: Sequence[RaplZone]) -> bool:
    """Say whether packages may repeat each other, as AMD's dies may: there are several, not Intel's."""
    several = sum(zone.kind == "package" for zone in zones) > 1
    return several and "GenuineIntel" not in (host.read("/proc/cpuinfo") or "")


def read_counters(host: Host, zones: Iterable[RaplZone], twice: bool = True,
                  ) -> tuple[dict[str, int], dict[str, int]]:
    """Read each counter (µJ) in turn, then all again: only the same register stays inside that bracket.

    Where they are not to be read `twice` the second reading is the first.
    """
    names = [(zone.name, f"{POWERCAP}/{zone.zone}/energy_uj") for zone in zones]

    def read() -> dict[str, int]:
        return {name: uj for name, path in names if (uj := _int(host, path)) is not None}

    first = read()
    return first, read() if twice else dict(first)


def mirrored(zones: Sequence[RaplZone], first: Mapping[str, int], again: Mapping[str, int]) -> dict[str, str]:
    """Give {zone: the earlier zone of its kind whose counter it shows}, by two readings of all."""
    found: dict[str, str] = {}
    there = [zone for zone in zones if zone.name in first and zone.name in again]
    for at, zone in enumerate(there):
        for other in there[:at]:
            span = zone.range_uj or 2**63
            bracket = (again[other.name] - first[other.name]) % span
            same = (zone.kind, zone.range_uj) == (other.kind, other.range_uj) and other.name not in found
            if same and (first[zone.name] - first[other.name]) % span <= bracket:
                found[zone.name] = other.name
                break
    return found


def _sensors(host: Host, hw: Hardware) -> Hardware:
    """Temperatures, power meters and fans."""
    found = (*_hwmon(host), *_ina3221(host), *_thermal(host))
    if not found:
        hw.unknown["sensors"] = "neither /sys/class/hwmon nor /sys/class/thermal has a sensor"
    return replace(hw, sensors=found)


def _hwmon(host: Host) -> Iterator[Sensor]:
    for entry in host.list("/sys/class/hwmon"):
        base = f"/sys/class/hwmon/{entry}"
        chip, names = _word(host, f"{base}/name") or entry, host.list(base)
        for name in names:
            match = re.fullmatch(r"((temp|power|fan|energy)[0-9]+)_(input|average)", name, re.ASCII)
            if match is None or (name.endswith("_input") and f"{match.group(1)}_average" in names):
                continue
            value, (unit, scale) = _int(host, f"{base}/{name}"), SENSOR_UNITS[match.group(2)]
            label = _word(host, f"{base}/{match.group(1)}_label") or match.group(1)
            if value is not None:
                yield Sensor(chip, label, unit, value * scale, f"{base}/{name}")


def _ina3221(host: Host) -> Iterator[Sensor]:
    """Find the channels of ina3221.rst, which gives mV and mA; the fourth would be the sum of the others."""
    for base in (f"/sys/class/hwmon/{entry}" for entry in host.list("/sys/class/hwmon")):
        for channel in "123" if _word(host, f"{base}/name") == "ina3221" else "":
            label, path = _word(host, f"{base}/in{channel}_label"), f"{base}/curr{channel}_input"
            ma, mv = _int(host, path), _int(host, f"{base}/in{channel}_input")
            if label and ma is not None and mv is not None:
                yield Sensor("ina3221", label, "watts", ma * mv / 1e6, path)


def whole_machine(sensors: Sequence[Sensor]) -> list[Sensor]:
    """Choose the power sensors that together are the whole machine's; none where that is not known."""
    for chip, labels in MACHINE_POWER:
        found = [one for one in sensors if one.unit == "watts" and one.chip == chip
                 and (not labels or one.label in labels)]
        if found and len(found) >= len(labels):
            return found
    return []


def paths_of_power(sensor: Sensor) -> tuple[str, ...]:
    """Name the files whose product is a sensor's power in µW."""
    folder, name = os.path.split(sensor.path)
    return (sensor.path, f"{folder}/in{name[4:]}") if name.startswith("curr") else (sensor.path,)


def _thermal(host: Host) -> Iterator[Sensor]:
    for entry in (name for name in host.list("/sys/class/thermal") if name.startswith("thermal_zone")):
        value = _int(host, f"/sys/class/thermal/{entry}/temp")
        if value is not None:
            chip = _word(host, f"/sys/class/thermal/{entry}/type") or entry
            yield Sensor(chip, entry, "celsius", value / 1000, f"/sys/class/thermal/{entry}/temp")


def _node_type(host: Host, hw: Hardware) -> Hardware:
    """Apply the seed's rule: laptop has a battery; server many threads and much memory; else desktop."""
    big = (hw.cpu_threads or 0) > SERVER_THREADS and (hw.ram_bytes or 0) > SERVER_RAM_BYTES
    if not hw.has_battery and (hw.cpu_threads is None or hw.ram_bytes is None):
        hw.unknown["node_type"] = "called desktop, for threads or memory are unknown"
    return replace(hw, node_type="laptop" if hw.has_battery else "server" if big else "desktop")


# In this order: limits needs the CPUs, the node type nearly all. Each notes under `unknown` why a field
# of its own may be missing; detect() drops the notes of those that were found.
DETECTORS: tuple[Callable[[Host, Hardware], Hardware], ...] = (
    _system, _cpu, _limits, _virtual, _batteries, _gpus, _rapl, _sensors, _disks, _node_type)


# ---- 7 Probe --------------------------------------------------------------------------------------

def detect(host: Host, probe: bool = True, state_dir: str | None = None,
           ffmpeg: str | None = None) -> Hardware:
    """Find out what the machine is. Never fails: what could not be found out has its reason.

    `probe` tries each encoder on a real frame (seconds, kept in `state_dir` for the next start); `ffmpeg`
    is a program to use instead of FFDIST_FFMPEG or the one on PATH.
    """
    def _ffmpeg(host: Host, hw: Hardware) -> Hardware:
        return _media(host, hw, probe, state_dir, ffmpeg)

    hw = Hardware()
    for detector in (*DETECTORS, _ffmpeg):
        try:
            hw = detector(host, hw)
        except Exception as error:  # isolated: one strange file must not cost the whole answer
            name = detector.__name__.strip("_")
            hw.problems.append(f"{name}: {type(error).__name__}: {str(error)[:160]}")
    for one in dataclasses.fields(hw):
        value = getattr(hw, one.name)
        if value is None and one.name not in NONE_IS_AN_ANSWER:
            hw.unknown.setdefault(one.name, "its detector failed, see problems")
        elif value not in (None, (), {}) and one.name != "node_type":
            hw.unknown.pop(one.name, None)
    return hw


def _media(host: Host, hw: Hardware, probe: bool, state_dir: str | None,
           wanted: str | None) -> Hardware:
    """FFmpeg, what it has, and which encoders work here."""
    wanted = wanted or (None if host.foreign else os.environ.get("FFDIST_FFMPEG")) or "ffmpeg"
    program = host.which(wanted)
    fields = ("ffmpeg", "ffmpeg_version", "encoders", "filters")
    hw.unknown.update(dict.fromkeys(fields, f"{wanted} is not installed or not on PATH"))
    hw.unknown["ffprobe"] = "ffprobe is neither beside ffmpeg nor on PATH"
    if program is None:
        return hw
    cut = len(host.root) if host.foreign else 0
    beside = host.which(os.path.join(os.path.dirname(program), "ffprobe")) or host.which("ffprobe")
    hw = replace(hw, ffmpeg=program[cut:], ffprobe=beside[cut:] if beside else None)
    version_argv = [program, "-hide_banner", "-version"]
    told = Result(None, "", "") if host.foreign else host.run(version_argv, PROGRAM_S)
    version = re.match(r"ffmpeg version (\S+)", told.stdout)
    if version is None:
        reason = ("another root is read: trying its FFmpeg here would tell of this machine" if host.foreign
                  else f"{program} does not tell its version: {parse_failure(told)}")
        hw.unknown.update(dict.fromkeys(fields[1:], reason))
        return hw
    filters = parse_listed(host.run([program, "-hide_banner", "-filters"], PROGRAM_S).stdout)
    hw.unknown["filters"] = f"{program} has no quality filter"
    hw = replace(hw, ffmpeg_version=version.group(1),
                 filters=tuple(name for name in QUALITY_FILTERS if name in filters))
    if not probe:
        hw.unknown["encoders"] = "not tried: --no-probe"
        return hw
    hw.unknown["encoders"] = f"{program} lists none of the known encoders"
    encoders, device = _encoders(host, hw, program, told.stdout, state_dir)
    return replace(hw, encoders=encoders, vaapi_device=device)


Proofs = tuple[dict[str, "str | None"], "str | None"]  # {encoder: None or why not}, render node
UNDECIDED = "no answer within"  # how a reason begins that may not be remembered


def _encoders(host: Host, hw: Hardware, program: str, version: str, state_dir: str | None) -> Proofs:
    """Probe once for each FFmpeg build and set of devices."""
    nodes = [f"/dev/dri/{name}" for name in host.list("/dev/dri") if name.startswith("renderD")]
    nodes += [f"/dev/{name}" for name in host.list("/dev") if re.match(r"nvidia[0-9c]|video[0-9]", name)]
    key = {"ffmpeg": host.stamp(program), "version": version,
           "devices": [[node, host.usable(node)] for node in nodes],
           "gpus": [[gpu.vendor, gpu.name, gpu.pci, gpu.driver, gpu.driver_version] for gpu in hw.gpus]}
    path = os.path.join(os.path.abspath(state_dir), "encoders.json") if state_dir else None
    if path and os.path.isdir(os.path.dirname(path)) and why_shared(os.path.dirname(path)):
        why = why_shared(os.path.dirname(path))
        hw.problems.append(f"the encoders found can't be kept in {os.path.dirname(path)}: {why}")
        path = None
    kept = _kept(host.read(path), key) if path else None
    if kept is not None:
        return kept
    encoders, device = probe_encoders(host, program, hw.gpus)
    if path and encoders and not any((reason or "").startswith(UNDECIDED) for reason in encoders.values()):
        text = json.dumps({"key": key, "encoders": encoders, "vaapi_device": device}, indent=1)
        trouble = host.write(path, text)
        hw.problems.extend([f"the encoders found can't be kept: {trouble}"] if trouble else [])
    return encoders, device


def _kept(text: str | None, key: object) -> Proofs | None:
    """Read what an earlier probe found, if it was of the same FFmpeg and devices."""
    try:
        kept = json.loads(text or "")
        encoders, device = dict(kept["encoders"]), kept["vaapi_device"]
        sound = all(isinstance(word, (str, type(None))) for word in (*encoders.values(), device))
        return (encoders, device) if sound and kept["key"] == key else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def probe_encoders(host: Host, ffmpeg: str, gpus: Sequence[Gpu]) -> Proofs:
    """Encode one frame with each candidate that FFmpeg lists, side by side, within PROBE_TOTAL_S."""
    end = time.monotonic() + PROBE_TOTAL_S
    listed = parse_listed(host.run([ffmpeg, "-hide_banner", "-encoders"], PROBE_EACH_S).stdout)
    names = [name for name in ENCODERS if name in listed]
    nodes = [gpu.render_node for gpu in gpus if gpu.render_node and gpu.vendor != "NVIDIA"]
    proved_on: list[str] = []

    def attempt(name: str) -> str | None:
        reasons = []
        for node in (nodes or ["/dev/dri/renderD128"]) if ENCODERS[name][0] == "vaapi" else [""]:
            left = min(PROBE_EACH_S, end - time.monotonic())
            if left <= 0:
                return f"{UNDECIDED} {PROBE_TOTAL_S} s for all encoders: try again when less is going on"
            result = host.run(probe_argv(ffmpeg, name, node), left)
            if result.returncode == 0:
                proved_on.extend(filter(None, [node]))
                return None
            reasons.append(parse_failure(result))
        return reasons[0]

    with ThreadPoolExecutor(max_workers=max(4, min(8, os.cpu_count() or 4))) as pool:
        return dict(zip(names, pool.map(attempt, names))), min(proved_on, default=None)


def probe_argv(ffmpeg: str, name: str, node: str = "/dev/dri/renderD128") -> list[str]:
    """Build the command that encodes one frame (NVENC refuses less than 256x256), or a short tone."""
    drive, fast = ENCODERS[name]
    before, after = ([option.replace("{node}", node) for option in part] for part in DRIVES[drive])
    source, kind = ("sine=duration=0.1", "-c:a") if drive == "audio" else ("testsrc2=size=640x480", "-c:v")
    frame = [] if drive == "audio" else ["-frames:v", "1"]
    return [ffmpeg, "-hide_banner", "-nostdin", "-v", "error", *before, "-f", "lavfi", "-i", source,
            *after, kind, name, *fast, *frame, "-f", "null", "-"]


# ---- 8 Power --------------------------------------------------------------------------------------

FIRST_SAMPLE = "the first sample: a rate needs two"


class _Integral:
    """Joules of a power that is read now and then: the mean of two neighbours times their distance."""

    def __init__(self, most_s: float = math.inf) -> None:
        """Make one; neighbours that are more than `most_s` apart leave a gap between them."""
        self.joules = self.covered_s = 0.0
        self._most_s = most_s
        self._last: tuple[float, float] | None = None

    def add(self, when: float, watts: float | None) -> float:
        """Add a reading; None leaves a gap that nothing is booked for, one out of order is left out."""
        if self._last is not None and self._last[0] - self._most_s <= when < self._last[0]:
            return self.joules
        if self._last is not None and watts is not None and 0 < when - self._last[0] <= self._most_s:
            self.joules += (when - self._last[0]) * (watts + self._last[1]) / 2
            self.covered_s += when - self._last[0]
        self._last = None if watts is None else (when, watts)
        return self.joules


class _Store:
    """Joules that go out of batteries which tell only what is left in them, in steps of some joules."""

    def __init__(self) -> None:
        self.joules = self.covered_s = 0.0
        self.watts: float | None = None  # between the last two steps
        self._last: tuple[float, float] | None = None
        self._step: tuple[float, float] | None = None

    def add(self, when: float, left: float | None) -> None:
        """Add how many joules are left; None leaves a gap."""
        if left is None or self._last is None:
            self.watts = self._step = None
        else:
            self.covered_s += when - self._last[0]
            self.joules += max(0.0, self._last[1] - left)
            if left != self._last[1]:
                if self._step is not None and when > self._step[0]:
                    self.watts = max(0.0, self._step[1] - left) / (when - self._step[0]) or None
                self._step = when, left
        self._last = None if left is None else (when, left)


class _Rapl:
    """Previous counters of the zones, and the joules that they gave since the start."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._zones: dict[str, RaplZone] = {}
        self._listed: list[str] = []
        self._may_mirror = False
        self._counters: dict[str, int] = {}
        self._read_at: dict[str, float] = {}
        self._most_w: dict[str, float] = {}  # by zone, seen so far
        self._alike: dict[str, str] = {}  # zones that showed another's counter at the previous sample
        self._whole_at: float | None = None  # time of the last sample in which all that count were read
        self._since = 0.0  # joules since then
        self._lost = False  # some of what came since then
        self._still_s = 0.0  # how long the counters have stood where they were at the start
        self.zones: dict[str, float] = {}
        self.joules = self.covered_s = 0.0
        self.whole = False  # psys counts: it holds the GPUs too
        self._look()

    def _look(self) -> None:
        """Find the zones, anew when a driver came or went; one that went away is still missed."""
        listed = self._host.list(POWERCAP)
        if listed != self._listed:
            self._listed = listed
            for zone in rapl_zones(self._host):
                if zone.zone != self._zones.get(zone.name, zone).zone:
                    self._counters.pop(zone.name, None)
                self._zones[zone.name] = zone
            self._may_mirror = may_mirror(self._host, list(self._zones.values()))

    @property
    def patience_s(self) -> float:
        """How long the counters may be left alone: until one may have wrapped, within POLL_S."""
        spans = [zone.range_uj / 1e6 / ZONE_MOST_W for zone in self._zones.values() if zone.range_uj]
        return min(POLL_S[1], max(POLL_S[0], min(spans, default=POLL_S[1])))

    def sample(self, now: float, unknown: dict[str, str], between: bool = False) -> float | None:
        """Add what came since the previous sample. Gives its watts, None when there is none yet.

        A reading `between` two samples only sees to it that no counter wraps twice.
        """
        self._look()
        counters, again = read_counters(self._host, self._zones.values(), self._may_mirror)
        zones = [zone for name, zone in self._zones.items() if name in counters]
        elapsed = 0.0 if self._whole_at is None else now - self._whole_at
        deltas = {zone.name: self._delta(zone, counters[zone.name], now, unknown) for zone in zones}
        moved = {name: joules for name, joules in deltas.items() if joules is not None}
        alike = mirrored(zones, counters, again) if self._may_mirror else {}
        twins = [name for name in alike if alike[name] == self._alike.get(name)]
        for name in twins:
            # Alike at both ends of an interval is no chance: one counter, seen twice.
            unknown[f"zones.{name}"] = f"the same counter as {alike[name]}, counted once"
            moved.pop(name, None)
            counters.pop(name)
            if not self.zones.get(name):
                self.zones.pop(name, None)
        for name in counters:
            self.zones[name] = self.zones.get(name, 0.0) + moved.get(name, 0.0)
        gained = self._total(moved, counters)
        self.joules += gained
        self._since += gained
        needed = self._needed(unknown, counters, twins)
        self._lost |= any(name in counters and name not in moved for name in needed)
        told = elapsed > 0 and not self._lost and set(needed) <= set(moved)
        watts = self._since / elapsed if told and needed else None
        self._counters.update(again)
        self._read_at.update(dict.fromkeys(again, now))
        self._alike = alike
        if set(needed) <= set(counters) and not (between and self._whole_at is not None):
            self.covered_s += elapsed if told else 0.0
            self._still_s = 0.0 if self.joules else self._still_s + elapsed
            self._whole_at, self._since, self._lost = now, 0.0, False
        return watts

    def _needed(self, unknown: dict[str, str], counters: Mapping[str, int], twins: Sequence[str],
                ) -> list[str]:
        """Name the zones without which the total is not whole; notes why one cannot be read now."""
        kinds = ("psys",) if self.whole else ("package", "dram")
        needed = [name for name, zone in self._zones.items() if zone.kind in kinds and name not in twins
                  and (name in self._counters or zone.kind == "package")]
        for name in needed:
            if name not in counters:
                unknown[f"zones.{name}"] = self._host.why(f"{POWERCAP}/{self._zones[name].zone}/energy_uj")
        return needed

    def _delta(self, zone: RaplZone, counter: int, now: float, unknown: dict[str, str]) -> float | None:
        """Joules since the zone's previous reading; None without one, or where the counter can't tell.

        It is reset by suspending the machine: it then seems to have wrapped at a power beyond all before.
        """
        if zone.name not in self._counters:
            return None
        moved, elapsed = counter - self._counters[zone.name], now - self._read_at[zone.name]
        span, seen_w = zone.range_uj or 0, self._most_w.get(zone.name)
        likely_w = COUNTER_RESET_W if seen_w is None else min(COUNTER_RESET_W, 500 + 10 * seen_w)
        wrapped = moved < 0
        moved += span if wrapped else 0
        if moved < 0 or (wrapped and elapsed > 0 and moved / 1e6 / elapsed > likely_w):
            unknown[f"zones.{zone.name}"] = "its counter was reset: an interval's joules are missing"
            return None
        if span and (seen_w or 0.0) * 1e6 * elapsed >= span:
            unknown[f"zones.{zone.name}"] = f"its counter may have wrapped more than once in {elapsed:.0f} s"
            return None
        if elapsed >= POLL_S[0] / 2:
            self._most_w[zone.name] = max(seen_w or 0.0, moved / 1e6 / elapsed)
        return moved / 1e6

    def _total(self, moved: Mapping[str, float], counters: Mapping[str, int]) -> float:
        """Add up without counting twice: psys holds the packages, a package its cores; DRAM is apart.

        On boards that do not wire psys up it stands at zero for ever, or below what it should hold.
        """
        kinds = {name: self._zones[name].kind for name in moved}
        wired = any(kind == "psys" and counters[name] > 0 for name, kind in kinds.items())
        sums = [sum(joules for name, joules in moved.items() if kinds[name] in counted)
                for counted in (("package", "dram"), ("psys",))]
        self.whole = wired and sums[1] >= sums[0]
        return sums[self.whole]

    def reason(self) -> str | None:
        """Say why there is no total; None when there is one."""
        whole = [zone for zone in self._zones.values() if zone.kind in ("package", "psys")]
        closed = [zone for zone in whole if zone.name not in self._counters]
        if self._still_s >= STILL_S:
            return "the RAPL counters stand still: this kernel or virtual machine does not count"
        if whole and (self.whole or not any(zone.kind == "package" for zone in closed)):
            return None if len(closed) < len(whole) else why_closed(self._host, whole[0])
        return why_closed(self._host, closed[0]) if whole else why_no_rapl(self._host)


class _Smi:
    """The long-running nvidia-smi, integrated over its own time stamps."""

    refused: ClassVar[set[tuple[str | None, str]]] = set()  # (program, field that it does not know)

    def __init__(self, host: Host, interval_ms: int) -> None:
        self._host, self._interval_ms = host, interval_ms
        self._program = host.which("nvidia-smi")
        self._fields = [name for name in SMI_READING if (self._program, name) not in self.refused]
        self._energy: dict[int, _Integral] = {}
        self._rows: dict[int, dict[str, str]] = {}
        self._places: dict[str | None, int] = {}  # PCI address -> index
        self._told_at = self._now = 0.0
        self._said: list[str] = []
        self._reason = "nvidia-smi has not answered yet" if self._program else "nvidia-smi is not installed"
        self.stream: Stream | None = None
        self._again = math.inf  # when to start it anew
        self._start()

    def _start(self) -> None:
        if self._program is not None:
            argv = [*smi_argv(self._program, self._fields), "-lms", str(self._interval_ms)]
            self.stream = self._host.stream(argv)

    def poll(self, now: float) -> None:
        """Take in what nvidia-smi said since the last time; start it anew a while after its end."""
        self._now = now
        if self.stream is None and now >= self._again:
            self._again = math.inf
            self._start()
        if self.stream is None:
            return
        ended, lines = self.stream.ended, self.stream.lines()
        self._said = [*self._said, *lines][-5:]  # its last words may come a while before its end
        for row in parse_csv("\n".join(lines), self._fields):
            index, when, watts = (parse_int(row["index"]), parse_time_stamp(row["timestamp"]),
                                  parse_float(row["power.draw"]))
            if index is not None and when is not None:
                self._rows[index], self._told_at = row, now
                self._places[parse_pci_address(row.get("pci.bus_id"))] = index
                self._energy.setdefault(index, _Integral(SMI_STEP_MOST_S)).add(when, watts)
        if ended:
            self._ended(now)

    def _ended(self, now: float) -> None:
        self.close()
        self._again = now + SMI_AGAIN_S
        self._rows.clear()
        refused = parse_refused("\n".join(self._said))
        self._reason = f"nvidia-smi ended: {(self._said or ['no words'])[-1][:160]}"
        self._said = []
        if refused in self._fields[3:]:  # an older driver: ask again without it
            self._fields.remove(refused)
            self.refused.add((self._program, refused))  # the next one starts without a detour
            self._start()
            self._again = math.inf

    def reading(self, gpu: Gpu, key: str, unknown: dict[str, str]) -> GpuReading:
        found = self._places.get(gpu.pci, -1)  # its driver was not there when the machine was looked at
        index = found if gpu.index is None else gpu.index
        silent_s = self._now - self._told_at
        if self._rows and silent_s > SMI_STEP_MOST_S:
            self._rows.clear()
            self._reason = f"nvidia-smi has said nothing for {silent_s:.0f} s"
        row, energy = self._rows.get(index), self._energy.get(index, _Integral())
        watts = parse_float(row["power.draw"]) if row else None
        joules = energy.joules if energy.covered_s or watts is not None else None
        if row is None:
            unknown[key] = self._reason
            return GpuReading(gpu.title, gpu.index, energy_joules=joules, covered_s=energy.covered_s)
        used, heat, mib, coding = (parse_float(row.get(name)) for name in (
            "utilization.gpu", "temperature.gpu", "memory.used", "utilization.encoder"))
        slowed = re.fullmatch(r"0x([0-9a-fA-F]{1,16})", row.get("clocks_throttle_reasons.active", ""))
        if watts is None:
            unknown[f"{key}.power_watts"] = f"nvidia-smi says {row['power.draw'] or 'nothing'}"
        return GpuReading(gpu.title, gpu.index, watts, joules, used, coding,
                          None if mib is None else int(mib * 2**20), heat, "nvidia-smi",
                          covered_s=energy.covered_s,
                          too_hot=bool(int(slowed.group(1), 16) & SMI_TOO_HOT) if slowed else None)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None


# ---- 9 Sampler ------------------------------------------------------------------------------------

class Sampler:
    """Takes readings, each over the time since the previous one. Close it: nvidia-smi runs until then."""

    def __init__(self, host: Host, hardware: Hardware | None = None, gpu: bool = True,
                 smi_interval_ms: int = SMI_INTERVAL_MS, model: tuple[float, float] | None = None) -> None:
        """Make one; `model` (W of the idle machine, W with all CPUs busy) stands in where nothing tells."""
        self._host, self._model = host, model
        hw = hardware or _sensors(host, Hardware(rapl=rapl_zones(host)))
        hw = _gpus(host, hw) if gpu and hardware is None else hw
        self._gpus = hw.gpus if gpu else ()
        self._smi = _Smi(host, smi_interval_ms) if any(g.vendor == "NVIDIA" for g in self._gpus) else None
        self._rapl = _Rapl(host)
        self._meters = [paths_of_power(sensor) for sensor in whole_machine(hw.sensors)]
        self._parts = ", ".join(f"{s.chip} {s.label}" for s in hw.sensors if s.unit in ("watts", "joules"))
        heat = [s for s in hw.sensors if s.unit == "celsius" and s.chip in CPU_TEMPERATURE]
        # The first of each chip is the package's; asking every core would wake them all.
        self._heat = list({os.path.dirname(s.path): s.path for s in reversed(heat)}.values())
        self._batteries = battery_names(host)
        self._mains = [f"{SUPPLY}/{name}/online" for name in host.list(SUPPLY)
                       if _word(host, f"{SUPPLY}/{name}/type") in ("Mains", "USB")]
        self._store = _Store()
        self._measured = {"hwmon": _Integral(), "battery": _Integral()}
        self._modelled: tuple[float, float, float] | None = None  # when; joules by then, and seconds
        self._gpu_energy = [_Integral() for _ in self._gpus]
        self._gpu_counters: dict[int, tuple[float, int]] = {}
        self._cpu: tuple[int, int] | None = None

    def sample(self, now: float) -> Reading:
        """Read everything once; `now` in seconds of a monotonic clock."""
        unknown: dict[str, str] = {}
        usage = self._usage(unknown)
        source, watts, joules, covered_s = self._power(now, usage, unknown)
        gpus = self._read_gpus(now, unknown)
        if self._rapl.whole or source in self._measured:  # what measures the machine holds its GPUs
            gpus = tuple(replace(gpu, in_package=True) for gpu in gpus)
        info = parse_sizes(self._host.read("/proc/meminfo"))
        used = info["MemTotal"] - info["MemAvailable"] if {"MemTotal", "MemAvailable"} <= set(info) else None
        if used is None:
            unknown["memory_used_bytes"] = f"no MemAvailable ({self._host.why('/proc/meminfo')})"
        heat = [value / 1000 for value in self._numbers(self._heat)]
        if not heat:
            unknown["temperature_c"] = "no sensor of the processor's temperature"
        return Reading(
            time=now, cpu_usage=usage, memory_used_bytes=used, power_watts=watts,
            energy_joules=joules, covered_s=covered_s, power_source=source, gpus=gpus,
            zones={name: round(value, 6) for name, value in self._rapl.zones.items()},
            temperature_c=max(heat, default=None), unknown=unknown)

    @property
    def patience_s(self) -> float:
        """Longest time between two readings; a counter may wrap twice when it is longer."""
        return self._rapl.patience_s

    def between(self, now: float) -> None:
        """Read the counters between two samples that are further apart than `patience_s`."""
        self._rapl.sample(now, {}, between=True)

    def throttles(self) -> int | None:
        """How often CPUs were slowed down by heat since boot; None where the kernel does not count it."""
        counted = self._numbers(f"{CPUS}/{name}/thermal_throttle/{what}_throttle_count"
                                for name in self._host.list(CPUS) if re.fullmatch("cpu[0-9]{1,5}", name)
                                for what in ("core", "package"))
        return sum(counted) if counted else None

    def close(self) -> None:
        """End nvidia-smi, if it was started."""
        if self._smi is not None:
            self._smi.close()

    def _numbers(self, paths: Iterable[str]) -> list[int]:
        return [value for value in (_int(self._host, path) for path in paths) if value is not None]

    def _usage(self, unknown: dict[str, str]) -> float | None:
        times = parse_cpu_times(self._host.read("/proc/stat"))
        before, self._cpu = self._cpu, times or self._cpu
        if times is None:
            unknown["cpu_usage"] = f"no CPU times ({self._host.why('/proc/stat')})"
        elif before is None:
            unknown["cpu_usage"] = FIRST_SAMPLE
        elif times[1] <= before[1]:
            unknown["cpu_usage"] = "no tick went by since the previous sample"
        else:  # time spent waiting for I/O may run backwards
            return round(min(100.0, max(0.0, 100 * (times[0] - before[0]) / (times[1] - before[1]))), 3)
        return None

    def _power(self, now: float, usage: float | None, unknown: dict[str, str],
               ) -> tuple[str | None, float | None, float | None, float]:
        """Give (source, watts, joules, s that these are of) of the machine, from the best source there is."""
        watts, reason = self._rapl.sample(now, unknown), self._rapl.reason()
        if reason is None:
            if watts is None:
                unknown["power_watts"] = "not all counters told of it" if self._rapl.joules else FIRST_SAMPLE
            return "rapl", watts, round(self._rapl.joules, 6), self._rapl.covered_s
        sources = {"hwmon": self._metered(), "battery": self._discharge()}
        left = self._left() if sources["battery"] is None else None
        self._store.add(now, left)
        for source, drawn in sources.items():
            self._measured[source].add(now, drawn)
        for source, drawn in sources.items():
            if drawn is not None or (left is not None and source == "battery"):
                known: list[_Integral | _Store] = [self._measured[source]]
                known += [self._store] if source == "battery" else []
                watts = self._store.watts if drawn is None else drawn
                if watts is None:
                    unknown["power_watts"] = "the battery tells only what is left in it, and that in steps"
                return (source, watts, round(sum(one.joules for one in known), 6),
                        sum(one.covered_s for one in known))
        if self._model is not None:
            return self._estimate(self._model, now, usage, unknown)
        battery = "; the battery tells only while it alone feeds the machine"
        parts = f"; of parts, as far as is known, are {self._parts}" if self._parts else ""
        reason += (battery if self._batteries else "") + (
            "; the machine's power meter does not tell now" if self._meters else parts)
        unknown["power_watts"] = unknown["energy_joules"] = reason
        return None, None, None, 0.0

    def _estimate(self, model: tuple[float, float], now: float, usage: float | None, unknown: dict[str, str],
                  ) -> tuple[str, float | None, float, float]:
        """Give (source, watts, joules, their s) by the CPU use since the previous sample."""
        then, joules, covered_s = self._modelled or (now, 0.0, 0.0)
        watts = None if usage is None else model[0] + (model[1] - model[0]) * usage / 100
        if watts is None:
            unknown["power_watts"] = unknown["cpu_usage"]
        else:
            joules += watts * (now - then)
            covered_s += now - then
        if watts is not None or self._modelled is None:
            self._modelled = (now, joules, covered_s)
        return "model", watts, round(joules, 6), covered_s

    def _metered(self) -> float | None:
        """Watts of the machine's power meters: µW, or mA times mV; None where one tells nothing or 0."""
        drawn = [math.prod(found) if len(found := self._numbers(paths)) == len(paths) else 0
                 for paths in self._meters]
        return sum(drawn) / 1e6 if drawn and min(drawn) > 0 else None

    def _discharge(self) -> float | None:
        """Watts that the batteries give: µW, or µA times µV.

        None while mains feed the machine too, and where one of them does not tell: 0 is no power.
        """
        drawn = []
        for base in (f"{SUPPLY}/{name}" for name in self._batteries):
            power = self._numbers([f"{base}/power_now"])
            pair = self._numbers([f"{base}/current_now", f"{base}/voltage_now"])
            if _word(self._host, f"{base}/status") == "Discharging":
                drawn.append(abs(power[0]) / 1e6 if any(power) else
                             abs(pair[0] * pair[1]) / 1e12 if len(pair) == 2 else 0.0)
        return sum(drawn) if drawn and all(drawn) and not any(self._numbers(self._mains)) else None

    def _left(self) -> float | None:
        """Joules left in batteries that tell no power: µWh. None as for their power."""
        bases = [f"{SUPPLY}/{name}" for name in self._batteries]
        told = self._numbers(f"{base}/energy_now" for base in bases)
        drained = any(_word(self._host, f"{base}/status") == "Discharging" for base in bases)
        alone = drained and len(told) == len(bases) and not any(self._numbers(self._mains))
        return 3.6e-3 * sum(told) if alone else None

    def _read_gpus(self, now: float, unknown: dict[str, str]) -> tuple[GpuReading, ...]:
        if self._smi is not None:
            self._smi.poll(now)
        return tuple(
            self._smi.reading(gpu, f"gpus.{at}", unknown) if self._smi and gpu.vendor == "NVIDIA"
            else self._hwmon_gpu(at, gpu, now, unknown) for at, gpu in enumerate(self._gpus))

    def _hwmon_gpu(self, at: int, gpu: Gpu, now: float, unknown: dict[str, str]) -> GpuReading:
        """Read an AMD or Intel GPU: Documentation/gpu/amdgpu/thermal.rst, sysfs-driver-intel-i915-hwmon."""
        chips = [f"{gpu.path}/hwmon/{chip}" for chip in self._host.list(f"{gpu.path}/hwmon")]

        def first(*names: str) -> int | None:
            return next(iter(self._numbers(f"{chip}/{name}" for chip in chips for name in names)), None)

        micro = first("power1_average", "power1_input")
        counter = first("energy1_input", "energy2_input")  # the card's, or where xe has none its package's
        heat, usage = first("temp1_input"), self._numbers([f"{gpu.path}/gpu_busy_percent"])
        watts, energy = None if micro is None else micro / 1e6, self._gpu_energy[at]
        if counter is not None:  # a counter knows better than an integral
            then, before = self._gpu_counters.get(at, (now, counter))
            if counter >= before:  # else it was reset
                energy.joules += (counter - before) / 1e6
                energy.covered_s += now - then
            watts = (counter - before) / 1e6 / (now - then) if now > then and counter >= before else watts
            self._gpu_counters[at] = (now, counter)
        else:
            energy.add(now, watts)
        if watts is None:
            inside = " of its own: it is inside the processor's package" if gpu.integrated else ""
            reason = FIRST_SAMPLE if counter is not None else f"no power sensor{inside}"
            unknown[f"gpus.{at}.power_watts"] = reason
        told = counter is not None or watts is not None
        return GpuReading(
            gpu.title, power_watts=watts, energy_joules=round(energy.joules, 6) if told else None,
            usage=float(usage[0]) if usage else None, temperature_c=None if heat is None else heat / 1000,
            memory_used_bytes=_int(self._host, f"{gpu.path}/mem_info_vram_used"),
            source="gpu-hwmon" if told else None, in_package=bool(gpu.integrated), covered_s=energy.covered_s)


def process_group(host: Host, pgid: int, gpu: bool = False) -> ProcessUsage:
    """Add up a process group: CPU of its processes and of the children they waited for, memory now.

    `gpu` asks for their time on GPUs too: Documentation/gpu/drm-usage-stats.rst.
    """
    ticks, rss, pids = 0, 0, []
    engines: dict[str, int] = {}  # ns by client, which several descriptors may stand for
    for pid in (int(name) for name in host.list("/proc") if name.isascii() and name.isdigit()):
        if host.group(pid) not in (None, pgid):
            continue
        found = parse_process(host.read(f"/proc/{pid}/stat"))
        if found.get("group") == pgid:
            pids.append(pid)
            ticks += found["ticks"]
            rss += parse_sizes(host.read(f"/proc/{pid}/status")).get("VmRSS", 0)
            for name in host.list(f"/proc/{pid}/fdinfo") if gpu else ():
                engines.update(parse_engines(host.read(f"/proc/{pid}/fdinfo/{name}")))
    return ProcessUsage(ticks / USER_HZ, rss, tuple(pids), sum(engines.values()) / 1e9)


# ---- 10 Ledger ------------------------------------------------------------------------------------

SAMPLE_S = 1.0
SERIES_MOST = 240  # points; even
IDLE_FIRST_S = 3.0  # the first idle baseline, at the start
IDLE_S = 10.0  # a later one
IDLE_REST_S = 30.0  # without an attempt before one
IDLE_EVERY_S = 600.0
IDLE_RETRY_S = 60.0
IDLE_BUSY_PERCENT = 10.0  # of the machine's CPUs: what is still called idle


class Series:
    """Figures over time in a bounded number of points: when it is full, neighbours become their mean."""

    def __init__(self, most: int = SERIES_MOST) -> None:
        self.points: list[tuple[float | None, ...]] = []
        self._most = most
        self._stride = 1
        self._waiting: list[tuple[float | None, ...]] = []

    def add(self, *values: float | None) -> None:
        """Add a point: the time in s first."""
        self._waiting.append(values)
        if len(self._waiting) < self._stride:
            return
        if len(self.points) == self._most:
            self.points = [_middle(self.points[at:at + 2]) for at in range(0, self._most, 2)]
            self._stride *= 2
            return
        self.points.append(_middle(self._waiting))
        self._waiting = []


def _middle(points: Sequence[tuple[float | None, ...]]) -> tuple[float | None, ...]:
    known = [[value for value in column if value is not None] for column in zip(*points)]
    return tuple(sum(column) / len(column) if column else None for column in known)


@dataclass(eq=False)
class Ledger:
    """What one run used, filled by the meter: energy in J, CPU in s, memory in bytes.

    `uses_gpu` says that it works with the GPU; its `samples` may go on from an earlier run's.
    """

    samples: deque[Json] = field(default_factory=lambda: deque(maxlen=600))
    uses_gpu: bool = False
    pgid: int | None = None
    paused: bool = False
    ended_cpu_s: float = 0.0
    peak_rss_bytes: int = 0
    cpu_s: float = 0.0
    started: float | None = None  # epoch
    measured_s: float = 0.0
    busy_s: float = 0.0  # of them with the machine's CPU use known
    busy_percent_s: float = 0.0
    energy_joules: float | None = None
    energy_s: float = 0.0  # of them with energy known
    idle_joules: float = 0.0
    idle_s: float = 0.0
    idle_watts: float | None = None
    gpus: dict[int, tuple[float, float]] = field(default_factory=dict)  # told J, s they are of
    gpu_s: float = 0.0
    gpu_usage_s: float = 0.0
    gpu_seen_s: float = 0.0
    gpu_memory_bytes: int | None = None
    power_source: str | None = None
    gpu_source: str | None = None
    gpu_inside: bool = False  # the machine's figure holds a GPU's energy
    gpu_silent: str | None = None  # why the energy of a GPU beside the processor is unknown
    throttles: int | None = None  # the machine's count at the start
    throttled: bool | None = None
    beside: int = 0
    unknown: dict[str, str] = field(default_factory=dict)
    series: Series = field(default_factory=Series)  # s, W, % of the machine
    pace: Series = field(default_factory=Series)  # s, frames per second

    def ended(self, cpu_s: float, rss_bytes: int) -> None:
        """Note what a process of this attempt had used when it ended."""
        self.pgid = None
        self.ended_cpu_s += cpu_s
        self.peak_rss_bytes = max(self.peak_rss_bytes, rss_bytes)

    def heat(self, throttles: int | None) -> None:
        """Note the machine's count of slow-downs by heat, at the start and at the end."""
        if self.started is None:
            self.throttles = throttles
        elif throttles is not None and self.throttles is not None:
            self.throttled = bool(self.throttled) or throttles > self.throttles


class Idle(NamedTuple):
    """Power of the machine at rest in W, its standard deviation from sample to sample, when (epoch s).

    And where it was read, with the power of how many GPUs beside the processor.
    """

    watts: float
    spread: float
    at: float
    source: str | None = None
    gpus: int = 0

    def why_not_of(self, reading: Reading) -> str:
        """Return why this is not the idle share of a reading, "" where it is."""
        if reading.power_source != self.source:
            return f"the idle baseline is of {self.source}, this run of {reading.power_source}"
        return "the idle baseline lacks a GPU whose power is known now" if gpus_beside(
            reading) > self.gpus else ""


def gpus_beside(reading: Reading) -> int:
    """Return of how many GPUs the power is known beside the machine's own figure."""
    return sum(gpu.power_watts is not None and not gpu.in_package for gpu in reading.gpus)


class Baseline:
    """When idle power is to be measured, and what came of it; fed with readings and times, no clock."""

    def __init__(self, now: float) -> None:
        self.idle: Idle | None = None
        self.why = "no idle baseline yet: the node had no rest"
        self._due = now
        self._readings: list[Reading] = []

    def wait_s(self, now: float) -> float:
        """Return how long it needs no reading."""
        return SAMPLE_S if self._readings else max(0.0, self._due - now)

    def disturb(self, now: float) -> None:
        """Begin the rest anew: an attempt begins or ends, so what was taken in part is void."""
        self._end(max(self._due, now + IDLE_REST_S))

    def take(self, reading: Reading, epoch_s: float) -> bool:
        """Take a reading of the resting machine; return whether no more is wanted for now."""
        if reading.energy_joules is None:
            self.why = reading.unknown.get("energy_joules") or "no energy counter was read"
            return self._end(reading.time + IDLE_EVERY_S)
        self._readings.append(reading)
        if reading.time - self._readings[0].time < (IDLE_S if self.idle else IDLE_FIRST_S):
            return False
        rows = self._readings[1:]
        told = [gpus_beside(row) for row in rows]
        watts = [row.total_watts for row, known in zip(rows, told)
                 if row.total_watts is not None and known == max(told)]  # nvidia-smi speaks up late
        self.why = _unrest(rows) or ("" if watts else "its power was not told when its idle power was due")
        if self.why:
            return self._end(reading.time + IDLE_RETRY_S)
        spread = statistics.stdev(watts) if len(watts) > 1 else 0.0
        self.idle = Idle(round(statistics.fmean(watts), 3), round(spread, 3), epoch_s, reading.power_source,
                         max(told))
        return self._end(reading.time + IDLE_EVERY_S)

    def _end(self, due: float) -> bool:
        self._readings.clear()
        self._due = due
        return True


def _unrest(rows: Sequence[Reading]) -> str:
    """Return why a machine of which these readings were taken was not at rest, "" where it was."""
    sources = {row.power_source for row in rows}
    if len(sources) > 1:
        return f"its source changed meanwhile: {', '.join(sorted(map(str, sources)))}"
    uses = [("the machine", [row.cpu_usage for row in rows])]
    uses += [(gpu.name, [row.gpus[at].usage for row in rows]) for at, gpu in enumerate(rows[-1].gpus)]
    for what, column in uses:
        known = [value for value in column if value is not None]
        if known and statistics.fmean(known) > IDLE_BUSY_PERCENT:
            return f"{what} was {statistics.fmean(known):.0f} % busy when its idle power was due"
        if not known and what == "the machine":
            return "how busy the machine was is unknown"
    return ""


class Meter:
    """Samples this machine while an attempt runs, and now and then at rest; one thread does it all."""

    def __init__(self, host: Host, hardware: Hardware,
                 model: tuple[float, float] | None = None, clock: Callable[[], float] = time.monotonic,
                 ) -> None:
        self._host = host
        self._hardware = hardware
        self._model = model
        self._clock = clock
        self._messages: queue.SimpleQueue[tuple[str, Ledger, threading.Event]] = queue.SimpleQueue()
        self._ledgers: list[Ledger] = []
        self._sampler: Sampler | None = None
        self._last: Reading | None = None
        self._baseline = Baseline(clock())
        self._working: set[object] = set()  # measured or not: the machine is not at rest
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
        return {"idle_watts": idle and idle.watts, "idle_watts_spread": idle and idle.spread,
                "idle_measured_at": idle and utc_text(idle.at), "idle_source": idle and idle.source,
                "idle_estimated": idle and idle.source == "model",
                "idle_unknown": None if idle else self._baseline.why}

    def work(self, attempt: object, works: bool) -> None:
        """Note that an attempt begins or has ended: idle power is not measured meanwhile.

        And nvidia-smi, which starts slowly, goes on for a while between two of its encodes.
        """
        (self._working.add if works else self._working.discard)(attempt)
        self._worked_at = self._clock()
        if not works:
            self._tell("rest", Ledger())

    def join(self, ledger: Ledger) -> None:
        """Begin to measure for a ledger; returns when the first reading is taken."""
        self._tell("join", ledger)

    def leave(self, ledger: Ledger) -> None:
        """Stop measuring for a ledger; returns when the last reading is in it."""
        self._tell("leave", ledger)

    def pause(self, ledger: Ledger, paused: bool) -> None:
        """Stop or go on booking to a ledger; what came before is booked when this returns."""
        self._tell("pause" if paused else "resume", ledger)

    def _tell(self, what: str, ledger: Ledger) -> None:
        done = threading.Event()
        self._messages.put((what, ledger, done))
        done.wait(10)

    def _loop(self) -> None:
        while True:
            message = None
            wait_s = SAMPLE_S if self._ledgers else self._baseline.wait_s(self._clock())
            if self._sampler is not None:
                wait_s = min(wait_s, self._sampler.patience_s)
            with contextlib.suppress(queue.Empty):
                message = self._messages.get(timeout=wait_s)
            what, told, done = message or ("", None, None)
            try:
                if what != "rest":
                    self._sample(told)
            except Exception as error:  # a driver's whim must not end an encode
                self._baseline.disturb(self._clock())
                for ledger in filter(None, (*self._ledgers, told)):
                    ledger.unknown["energy_joules"] = f"the sampler failed: {type(error).__name__}: {error}"
            if told and done:
                self._admit(what, told)
                done.set()

    def _sample(self, told: Ledger | None) -> None:
        """Take a reading; a ledger that was told of joins or leaves with it."""
        if told is None and not self._ledgers and (
                self._working or self._clock() < self._worked_at + IDLE_REST_S):
            self._baseline.disturb(self._clock())
            self.rested.set()
            return self._close()
        if self._sampler is None:
            self._sampler = Sampler(self._host, self._hardware, model=self._model)
            self._last = None
        reading = self._sampler.sample(self._clock())
        self._tick(reading)
        if told:
            told.heat(self._sampler.throttles())
        elif not self._ledgers and self._baseline.take(reading, time.time()):
            self.rested.set()
            self._close()

    def _close(self) -> None:
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            with contextlib.suppress(Exception):
                sampler.close()

    def _admit(self, what: str, ledger: Ledger) -> None:
        self._baseline.disturb(self._clock())
        self.rested.set()
        if what in ("pause", "resume"):
            ledger.paused = what == "pause"
        else:
            self._ledgers = [other for other in self._ledgers if other is not ledger]
        if what == "join":
            ledger.started = time.time()
            self._ledgers.append(ledger)
        if not self._ledgers and not self._working:
            self._close()

    def _tick(self, reading: Reading) -> None:
        last, self._last = self._last, reading
        active = [ledger for ledger in self._ledgers if not ledger.paused]
        for ledger, (share, gpu_share) in zip(active, self._shares(active)):
            ledger.beside = max(ledger.beside, len(active) - 1)
            ledger.unknown.update(reading.unknown)
            ledger.power_source = reading.power_source or ledger.power_source
            if last is not None:
                _book(ledger, last, reading, share, self._baseline)
                _book_gpus(ledger, last, reading, gpu_share)

    def _shares(self, ledgers: Sequence[Ledger]) -> list[tuple[float, float]]:
        """Return each ledger's part of this interval, and of its GPUs': by CPU and by GPU time.

        A GPU whose driver counts no time goes evenly to those who use it, like the rest if nobody does.
        """
        used, gpu_used = [], []
        for ledger in ledgers:
            total, gpu_total = ledger.ended_cpu_s, ledger.gpu_s
            if ledger.pgid is not None:
                usage = process_group(self._host, ledger.pgid, ledger.uses_gpu)
                total, gpu_total = total + usage.cpu_seconds, usage.gpu_seconds
                ledger.peak_rss_bytes = max(ledger.peak_rss_bytes, usage.rss_bytes)
            used.append(max(0.0, total - ledger.cpu_s))
            gpu_used.append(max(0.0, gpu_total - ledger.gpu_s))
            ledger.cpu_s, ledger.gpu_s = max(ledger.cpu_s, total), max(ledger.gpu_s, gpu_total)
        users = [float(ledger.uses_gpu) for ledger in ledgers]
        return list(zip(_parts(used), _parts(next(filter(any, (gpu_used, users)), used))))


def _parts(used: Sequence[float]) -> list[float]:
    """Return each one's part of the whole; equal parts of nothing."""
    whole = sum(used)
    return [part / whole if whole else 1 / len(used) for part in used]


def _book(ledger: Ledger, last: Reading, now: Reading, share: float,
          baseline: Baseline) -> None:
    """Book one interval between two readings; `share` is this attempt's part of the energy."""
    span = now.time - last.time
    ledger.measured_s += span
    if now.cpu_usage is not None:
        ledger.busy_s += span
        ledger.busy_percent_s += now.cpu_usage * span
    alike = now.power_source == last.power_source
    if now.energy_joules is not None and last.energy_joules is not None and alike:
        used = share * (now.energy_joules - last.energy_joules)
        ledger.energy_joules = (ledger.energy_joules or 0.0) + used
        ledger.energy_s += now.covered_s - last.covered_s
    why = baseline.idle.why_not_of(now) if baseline.idle else baseline.why
    if baseline.idle is None or why:
        ledger.unknown["idle_watts"] = why
    else:
        ledger.idle_watts = baseline.idle.watts
        ledger.idle_joules += share * baseline.idle.watts * span
        ledger.idle_s += span
    ledger.series.add(ledger.measured_s, now.total_watts, now.cpu_usage)
    ledger.samples.append({"time": utc_text(time.time()), "cpu_usage": now.cpu_usage,
                           "memory_used_bytes": now.memory_used_bytes, "power_watts": now.total_watts,
                           "power_source": now.power_source, "temperature_c": now.temperature_c})


def _book_gpus(ledger: Ledger, last: Reading, now: Reading, share: float) -> None:
    """Book what the GPUs did in an interval; those inside the machine's own figure add no energy."""
    span = now.time - last.time
    for at, (gpu, before) in enumerate(zip(now.gpus, last.gpus)):
        if gpu.energy_joules is not None and not gpu.in_package:
            joules, covered_s = ledger.gpus.get(at, (0.0, 0.0))
            ledger.gpus[at] = (joules + share * (gpu.energy_joules - (before.energy_joules or 0.0)),
                               covered_s + gpu.covered_s - before.covered_s)
            ledger.gpu_source = gpu.source or ledger.gpu_source
        elif not gpu.in_package:
            ledger.gpu_silent = now.unknown.get(f"gpus.{at}.power_watts") or now.unknown.get(f"gpus.{at}")
        elif gpu.energy_joules is not None:
            ledger.gpu_inside = True
        if gpu.usage is not None:
            ledger.gpu_usage_s += gpu.usage * span
            ledger.gpu_seen_s += span
        if gpu.memory_used_bytes is not None:
            ledger.gpu_memory_bytes = max(ledger.gpu_memory_bytes or 0, gpu.memory_used_bytes)
        if gpu.too_hot is not None:
            ledger.throttled = bool(ledger.throttled) or gpu.too_hot


class Energy(NamedTuple):
    """Energy of one run: J, where it was read (both None where unknown), and why it is unknown."""

    joules: float | None
    source: str | None
    gpu_joules: float | None
    why: str


def energy_of(ledger: Ledger) -> Energy:
    """Return a run's energy: the machine's figure and the GPUs that it does not hold.

    What was not told of counts like the rest; but a figure of less than 90 % of the run (of a GPU, which is
    sampled: half) is none of the run.
    """
    told = bool(ledger.gpus) and 0 < ledger.measured_s <= 2 * least_covered_s(ledger)
    gpu = sum(joules / s * ledger.measured_s for joules, s in ledger.gpus.values()) if told else None
    why = ""
    if ledger.energy_joules is None:
        why = (ledger.unknown.get("energy_joules") or ledger.unknown.get("power_watts")
               or "no energy counter was read") + ("; gpu_energy_joules is known" if told else "")
    elif ledger.energy_s < 0.9 * ledger.measured_s:
        why = f"its source told for {ledger.energy_s:.1f} s of {ledger.measured_s:.1f} s only"
    elif ledger.energy_joules == 0:
        why = f"{ledger.power_source} counted nothing: it stands still, or the run was too short"
    elif ledger.gpus and not told:
        why = "of the GPU too little is known, see gpu_energy_joules"
    elif ledger.uses_gpu and not ledger.gpus and ledger.gpu_silent:
        why = f"the job used a GPU whose power is unknown: {ledger.gpu_silent}"
    if why:
        return Energy(None, None, gpu, why)
    sources = [ledger.power_source or "unknown", *([ledger.gpu_source or "gpu"] if told else [])]
    whole = ledger.measured_s / ledger.energy_s if 0 < ledger.energy_s < ledger.measured_s else 1.0
    return Energy((ledger.energy_joules or 0.0) * whole + (gpu or 0.0), "+".join(sources), gpu, "")


def least_covered_s(ledger: Ledger) -> float:
    """Return for how long that GPU told its energy that told it least."""
    return min((covered_s for _, covered_s in ledger.gpus.values()), default=0.0)


# ---- 11 Groups ------------------------------------------------------------------------------------

GROUP_PREFIX = "ffdist-"
GROUP_GONE_S = 2.0  # a process that was just killed may still stand in its group
CPU_PERIOD_US = 100_000
# controller -> (version, what to write in order; a "?" file may be missing), with the limit in its unit:
# bytes, or µs of CPU in each period. Without swap, or a limit of memory would only move it to the disk.
GROUP_FILES: Mapping[str, tuple[tuple[str, tuple[tuple[str, str], ...]], ...]] = {
    "memory": (("v1", (("memory.limit_in_bytes", "{0}"), ("?memory.memsw.limit_in_bytes", "{0}"))),
               ("v2", (("memory.max", "{0}"), ("?memory.swap.max", "0")))),
    "cpu": (("v1", (("cpu.cfs_period_us", f"{CPU_PERIOD_US}"), ("cpu.cfs_quota_us", "{0}"))),
            ("v2", (("cpu.max", f"{{0}} {CPU_PERIOD_US}"),))),
}


class ControlGroup:
    """Control groups of one name for a process and its children: what they may use, what befell them.

    Version 1 has a group for each controller, version 2 one for both; it is made as near to this
    process's own as the kernel lets it be. Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst.
    """

    def __init__(self, host: Host, name: str) -> None:
        self._host = host
        self._made: dict[str, tuple[str, str]] = {}  # controller -> folder, version
        self._places: dict[str, list[tuple[str, str]]] = {controller: [] for controller in GROUP_FILES}
        for controllers, version, folders in _groups(host):
            for controller in controllers or self._places:
                self._places[controller] += [(f"{folder}/{GROUP_PREFIX}{name}", f"v{version}")
                                             for folder in folders]

    @property
    def folders(self) -> list[str]:
        """Every folder that may be made, to be remembered before it is."""
        return list(dict.fromkeys(folder for places in self._places.values() for folder, _ in places))

    def limit(self, controller: str, amount: int) -> str | None:
        """Limit memory to bytes, or cpu to µs in each period; return "cgroup v1", "cgroup v2" or None.

        A group beside this process's own is outside of that one's limits, so these hold for it too.
        """
        have = cgroup_limits(self._host)
        most = have.memory_bytes if controller == "memory" else have.cpus and have.cpus * CPU_PERIOD_US
        amount = min(amount, int(most or amount))
        for folder, version in self._places[controller]:
            parent = os.path.dirname(folder)
            if version == "v2" and not self._enabled(parent, controller):
                continue
            known = folder in (made for made, _ in self._made.values())
            files = dict(GROUP_FILES[controller])[version]
            if self._host.make(folder) and self._written(folder, files, amount):
                self._made[controller] = (folder, version)
                return f"cgroup {version}"
            if not known:
                self._host.drop(folder)
        return None

    def _enabled(self, parent: str, controller: str) -> bool:
        """Say whether a group's children have a controller; it is asked for where it may be."""
        switch = f"{parent}/cgroup.subtree_control"
        return controller in (self._host.read(switch) or "").split() or (
            controller in (self._host.read(f"{parent}/cgroup.controllers") or "").split()
            and self._host.set(switch, f"+{controller}"))

    def _written(self, folder: str, files: Sequence[tuple[str, str]], amount: int) -> bool:
        return all([self._host.set(f"{folder}/{name.lstrip('?')}", text.format(amount)) or name[0] == "?"
                    for name, text in files])

    def take(self, controller: str, pid: int) -> bool:
        """Put a process under a limit that was set; say whether it is."""
        folder = self._made.get(controller, ("",))[0]
        return bool(folder) and self._host.set(f"{folder}/cgroup.procs", str(pid))

    def killed(self) -> bool:
        """Say whether the kernel ended a process for its memory (before Linux 4.13: refused it some)."""
        folder, version = self._made.get("memory", ("", ""))
        told = self._host.read(f"{folder}/{'memory.events' if version == 'v2' else 'memory.oom_control'}")
        count = re.search(r"^oom_kill (\d+)$", told or "", re.MULTILINE)
        return bool(int(count[1]) if count else parse_int(self._host.read(f"{folder}/memory.failcnt")))

    def remove(self) -> None:
        """End what is left in the groups that were made, and remove them."""
        remove_groups(self._host, [folder for folder, _ in self._made.values()])
        self._made.clear()


def remove_groups(host: Host, folders: Iterable[str]) -> None:
    """Remove control groups by their folders, with what is left in them; others than ours stay."""
    for folder in folders:
        until = time.monotonic() + GROUP_GONE_S
        if not os.path.basename(folder).startswith(GROUP_PREFIX) or not host.exists(folder):
            continue
        while not host.drop(folder) and time.monotonic() < until:
            for pid in (host.read(f"{folder}/cgroup.procs") or "").split():
                host.kill(int(pid))
            time.sleep(0.02)


def process_started(host: Host, pid: int) -> int | None:
    """Give a process's start in clock ticks since boot; with its pid it is a name that is never reused."""
    return parse_process(host.read(f"/proc/{pid}/stat")).get("start")


class LimitsRefused(Exception):
    """The kernel lets this user enforce some limits neither way; `args` are their names."""


class Limits:
    """What the processes of one run may use: by a control group of its own, else by plain limits.

    A control group holds for all processes together and counts pages in use. Where none may be made (no
    delegation, no root) a plain limit of the process takes its place: of address space for memory, and of
    as many CPUs as the quota rounds up to.
    """

    def __init__(self, host: Host, folder: Path, memory_bytes: int, cpu_percent: float) -> None:
        """Make the groups; a limit of 0 is none. `folder` is the run's own, its name the groups'."""
        self.memory_bytes = memory_bytes
        self.enforced: dict[str, str] = {}  # limit -> how
        self._percent = cpu_percent
        self._group = ControlGroup(host, folder.name)
        asked = {"memory": memory_bytes, "cpu": int(cpu_percent * CPU_PERIOD_US / 100)}
        amounts = {name: amount for name, amount in asked.items() if amount}
        if amounts:
            # Written before a group is made: after a kill the folder says what is to be removed.
            (folder / "groups").write_text("\n".join(self._group.folders))
        # How the group enforces each limit, None where it cannot.
        self._grouped = {name: self._group.limit(name, amount) for name, amount in amounts.items()}

    def take(self, pid: int) -> str:
        """Put a process that was just started under the limits; return how, in words, when that is news.

        Raises LimitsRefused where one cannot be enforced: rather no process than one without limits.
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
        return ", ".join(f"{name} by {how}" for name, how in self.enforced.items())

    def _enforce(self, name: str, how: str | None, pid: int) -> str:
        if how and self._group.take(name, pid):
            return how
        return self._limit_memory(pid) if name == "memory" else self._limit_cpu(pid)

    def _limit_memory(self, pid: int) -> str:
        resource.prlimit(pid, resource.RLIMIT_AS, (self.memory_bytes, self.memory_bytes))
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


# ---- 12 CLI ---------------------------------------------------------------------------------------

EXAMPLES = """examples:
  python3 hwdetect.py                        what this machine is and which encoders work on it
  python3 hwdetect.py --json --no-probe      the same for programs, without trying encoders
  python3 hwdetect.py --watch 1s             power and load, once a second, until Ctrl-C
  python3 hwdetect.py --record my.txt        a text archive of this machine, for a bug report

Every flag has an environment variable (--state-dir: FFDIST_STATE_DIR); a flag beats it."""

# flag, what it takes (None: a switch), help
FLAGS: tuple[tuple[str, str | None, str], ...] = (
    ("--json", None, "print JSON; with --watch one object a line"),
    ("--root", "PLACE", "read a tree instead of this machine, or what --record wrote"),
    ("--no-probe", None, "do not try the encoders"),
    ("--record", "FILE", "write the files that detection reads into one text archive (- for stdout)"),
    ("--watch", "INTERVAL", "print a reading every INTERVAL, such as 1s or 500ms"),
    ("--ffmpeg", "PROGRAM", "the ffmpeg to use (default: the one on PATH)"),
    ("--state-dir", "DIR", "where the encoders found are kept (default: ~/.local/state/ffdist)"))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hwdetect.py", epilog=EXAMPLES,
        description="Say what this machine is, which encoders work on it and what it draws.",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"ffdist hwdetect {VERSION}")
    for flag, takes, text in FLAGS:
        value = os.environ.get("FFDIST_" + flag.strip("-").replace("-", "_").upper(), "")
        if takes is None:
            on = value.lower() not in ("", "0", "no", "false", "off")
            parser.add_argument(flag, action="store_true", default=on, help=text)
        else:
            parser.add_argument(flag, metavar=takes, default=value or None, help=text)
    options = parser.parse_args(argv)
    try:
        options.interval_s = None if options.watch is None else parse_duration(options.watch)
    except ValueError as error:
        parser.error(f"--watch: {error}")
    if options.interval_s is not None and not 0.01 <= options.interval_s <= 86_400:
        parser.error(f"--watch: {options.watch} is not between 10ms and 24h")
    if options.root is not None and not os.path.exists(options.root):
        parser.error(f"--root: {options.root} is neither a folder nor an archive of --record")
    return options


def _watch(host: Host, interval_s: float, as_json: bool) -> int:
    """Print readings at a fixed pace until interrupted."""
    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # so that nvidia-smi is ended then too
    sampler = Sampler(host)
    try:
        turn, start = 0, time.monotonic()
        while True:
            reading = sampler.sample(time.monotonic())
            print(_watch_json(reading) if as_json else _watch_line(reading, turn), flush=True)
            # Turns that were missed are left out: a rate of microseconds would tell nothing.
            turn = max(turn + 1, math.ceil((time.monotonic() - start) / interval_s))
            while (left_s := start + turn * interval_s - time.monotonic()) > 0:
                time.sleep(min(left_s, sampler.patience_s))
                if left_s > sampler.patience_s:
                    sampler.between(time.monotonic())
    finally:
        sampler.close()


def _watch_json(reading: Reading) -> str:
    moment = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    answer = {**dataclasses.asdict(reading), "time": moment.replace("+00:00", "Z")}
    first = ("time", "cpu_usage", "power_watts", "energy_joules", "zones", "unknown")
    return json.dumps({name: answer[name] for name in dict.fromkeys((*first, *answer))})


def _watch_line(reading: Reading, turn: int) -> str:
    cells = [(reading.cpu_usage, "% CPU"), (reading.power_watts, "W"), (reading.energy_joules, "J")]
    cells += [(gpu.power_watts, printable(f"W {gpu.name}")) for gpu in reading.gpus]
    why = reading.unknown.get("energy_joules") if turn == 0 else None
    line = "".join(f"{'-' if value is None else format(value, '.1f'):>9} {unit}" for value, unit in cells)
    return line + (f"\npower is unknown: {why}" if why else "")


def page(hw: Hardware) -> str:
    """Write what was found for people: a line for each fact, unknown ones with their reason."""
    lines = []
    for title, name, text in _facts(hw):
        why = hw.unknown.get(name)
        lines.append(f"{title:<12} {text or ('unknown: ' + why if why else 'none')}")
    rows = [f"{name:<14} {'works' if why is None else 'no: ' + why}" for name, why in hw.encoders.items()]
    for title, body in (("Encoders", rows), ("Problems", hw.problems)):
        lines += ["", title, *(f"  {row}" for row in body)] if body else []
    return "\n".join(map(printable, lines))


def _facts(hw: Hardware) -> Iterator[tuple[str, str, str | None]]:
    """Give (title, field whose reason counts, text) for each line of the page."""
    counts = [(hw.cpu_sockets, "socket"), (hw.cpu_cores, "core"), (hw.cpu_logical, "thread")]
    usable = f"; {hw.cpu_threads} usable here" if hw.cpu_threads != hw.cpu_logical else ""
    kind = " in ".join(filter(None, (hw.container, hw.virtual)))
    yield "Machine", "address", f"{hw.address or '?'} ({hw.node_type}{', ' + kind if kind else ''})"
    yield "Board", "machine", hw.machine
    yield "System", "os", ", ".join(filter(None, (hw.os_name, hw.kernel, hw.arch)))
    yield "Processor", "cpu_model", hw.cpu_model
    yield "Threads", "cpu_threads", ", ".join(f"{'?' if n is None else n} {word}{'' if n == 1 else 's'}"
                                              for n, word in counts) + usable
    yield "Frequency", "cpu_mhz_max", f"up to {hw.cpu_mhz_max:.0f} MHz" if hw.cpu_mhz_max else None
    yield "Flags", "cpu_model", " ".join(hw.cpu_flags)
    yield "Memory", "ram_bytes", _size(hw.ram_bytes) if hw.ram_bytes else None
    yield "GPU", "gpus", "; ".join(", ".join(filter(None, (
        gpu.title, _size(gpu.memory_bytes) if gpu.memory_bytes else None, gpu.driver or "no driver",
        gpu.driver_version))) for gpu in hw.gpus)
    yield "Battery", "has_battery", "; ".join(
        f"{one.name} {one.status or '?'}, {'?' if one.charge_percent is None else one.charge_percent} %"
        for one in hw.batteries)
    open_zones = [f"{zone.name} (mirrors {zone.mirror_of})" if zone.mirror_of else zone.name
                  for zone in hw.rapl if zone.readable]
    closed = [f"rapl.{zone.name}" for zone in hw.rapl if not zone.readable]
    if open_zones or not closed:
        yield "Energy", "rapl", ", ".join(open_zones)
    if closed:  # the others have the same reason
        yield "Energy", closed[0], None
    for sensor in hw.sensors:
        yield "Sensor", "sensors", f"{sensor.chip} {sensor.label}: {sensor.value:.1f} {sensor.unit}"
    for disk in hw.disks:
        free, size = (None if n is None else _size(n) for n in (disk.free_bytes, disk.size_bytes))
        room = f"{free or '?'} free of {size or '?'}"
        yield "Disk", "disks", f"{disk.mount} ({disk.filesystem} on {disk.device}): {room}"
    yield "FFmpeg", "ffmpeg", f"{hw.ffmpeg} {hw.ffmpeg_version or ''}" if hw.ffmpeg else None
    yield "ffprobe", "ffprobe", hw.ffprobe
    yield "Quality", "filters", " ".join(hw.filters)
    if not hw.encoders:
        yield "Encoders", "encoders", None


def _size(number: float) -> str:
    """Write bytes in the largest binary unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            return f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} PiB"


def _record(host: Host, file: str) -> int:
    """Detect and sample once, and write down every file that this took."""
    recorder = Recorder(host)
    Sampler(recorder, detect(recorder, probe=False), gpu=False).sample(0.0)
    program, fields = recorder.which("nvidia-smi"), list(dict.fromkeys((*SMI_IDENTITY, *SMI_READING)))
    if program is not None:
        said = recorder.run(smi_argv(program, fields), PROGRAM_S)
        while parse_refused(said.stdout + said.stderr) in fields:
            fields.remove(parse_refused(said.stdout + said.stderr))
            said = recorder.run(smi_argv(program, fields), PROGRAM_S)
        recorder.entries["/recorded/nvidia-smi"] = (
            "file", f"{','.join(fields)}\n{scrub('', said.stdout)}{said.stderr}")
    text = archive(recorder.entries)
    if file == "-":
        print(text, end="")
        return 0
    trouble = host.write(file, text)
    if trouble:
        print(f"hwdetect.py: the archive can't be written: {trouble}", file=sys.stderr)
        return 1
    print(f"{file}: {len(recorder.entries)} files, without serial numbers; have a look before you send it")
    return 0


def _command(options: argparse.Namespace) -> int:
    if options.root is None or os.path.isdir(options.root):
        return _carry_out(Host(options.root or "/"), options)
    with tempfile.TemporaryDirectory(prefix="ffdist-root-") as folder:
        try:
            with open(options.root, encoding="utf-8", newline="") as file:
                unpack(file.read(ARCHIVE_MOST), folder)
        except (OSError, ValueError) as error:
            print(f"hwdetect.py: --root: {options.root} cannot be read: {_words(error)}", file=sys.stderr)
            return 2
        return _carry_out(Host(folder), options)


def _carry_out(host: Host, options: argparse.Namespace) -> int:
    if options.record is not None:
        return _record(host, options.record)
    if options.interval_s is not None:
        return _watch(host, options.interval_s, options.json)
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    state_dir = options.state_dir or os.path.join(home, "ffdist")
    hw = detect(host, not options.no_probe, state_dir, options.ffmpeg)
    print(json.dumps(hw.to_json(), indent=2) if options.json else page(hw))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Gives the exit code: 0, 1 not possible, 2 wrong usage, 130 interrupted."""
    try:
        code = _command(_options(argv))
        sys.stdout.flush()
        return code
    except SystemExit as error:  # argparse has said what is wrong
        return error.code if isinstance(error.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
