#!/usr/bin/env python3
"""Say what this machine really is, and what it draws while it works.

Reads /proc, /sys and the text of nvidia-smi, and tries each encoder of FFmpeg on a real frame, for an
encoder that is listed is not yet one that works. Linux is what it knows; elsewhere it answers with less.

It promises an answer on any machine: what cannot be read is null with a reason under `unknown`, a
detector that fails is named under `problems`. It does not promise figures that the kernel does not give:
virtual machines have no energy counters, and an estimate is never passed off as a reading.

Sections:
    1 Facts      dataclasses with units, vendor tables with their kernel document
    2 Host       the only file and program access; one bounded read, a reason instead of an exception
    3 Parsers    text to value, pure
    4 Detectors  a table; each isolated, its failure recorded in the answer, never fatal
    5 Sampler    owns the previous counters; sample(now) gives rates and joules since the start
    6 CLI        the page, --json, --root, --no-probe, --record, --watch
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import errno
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Callable

# ---- 1 Facts --------------------------------------------------------------------------------------------

GIB = 2**30
SMALL_READ_BYTES = 64 * 1024  # a sysfs file is at most a page
LARGE_READ_BYTES = 4 * 2**20  # /proc/cpuinfo of a machine with hundreds of threads, pci.ids
SERVER_THREADS = 16  # a server has more (the seed's rule)
SERVER_RAM_BYTES = 32 * GIB  # and more than this
MAX_CPUS = 65536  # no machine has more: a garbled list must not fill memory
USER_HZ = 100  # unit of /proc/PID/stat times, fixed by the kernel's ABI
PROBE_TOTAL_S = 4.5
PROBE_EACH_S = 4.0
PROGRAM_S = 10.0
SMI_INTERVAL_MS = 500
COUNTER_RESET_W = 50_000  # a counter that "wrapped" at more than this was reset
TREE_PATH = ("usr/local/bin", "usr/bin", "bin")  # where a --root tree keeps its programs

RAPL_FIX = (
    "only root may read it since Linux 5.10; to allow it for good: echo 'SUBSYSTEM==\"powercap\", "
    'KERNEL=="intel-rapl*:*", ACTION=="add", RUN+="/bin/chmod a+r /sys%p/energy_uj"\' | sudo tee '
    "/etc/udev/rules.d/60-ffdist-rapl.rules && sudo udevadm control --reload && "
    "sudo udevadm trigger --subsystem-match=powercap --action=add"
)

# uname -m -> the name that Go gives it, as the seed's agents register
GO_ARCH = {
    "x86_64": "amd64", "amd64": "amd64", "i386": "386", "i686": "386", "aarch64": "arm64", "arm64": "arm64",
    "armv6l": "arm", "armv7l": "arm", "armv8l": "arm", "ppc64le": "ppc64le", "ppc64": "ppc64",
    "riscv64": "riscv64", "s390x": "s390x", "loongarch64": "loong64", "mips64": "mips64",
}  # fmt: skip

# What x264, x265, SVT-AV1, dav1d and libvpx have code paths for
ENCODER_FLAGS = (
    "sse4_1", "sse4_2", "avx", "avx2", "fma", "bmi2", "avx512f", "avx512bw", "avx512vl", "avx512_vbmi",
    "avx512_vnni", "gfni", "neon", "asimd", "asimddp", "i8mm", "sve", "sve2", "vx", "vsx",
)  # fmt: skip

# arch/arm64/include/asm/cputype.h: (implementer, part) -> core
ARM_CORES = {
    (0x41, 0xD03): "Arm Cortex-A53", (0x41, 0xD05): "Arm Cortex-A55", (0x41, 0xD07): "Arm Cortex-A57",
    (0x41, 0xD08): "Arm Cortex-A72", (0x41, 0xD09): "Arm Cortex-A73", (0x41, 0xD0A): "Arm Cortex-A75",
    (0x41, 0xD0B): "Arm Cortex-A76", (0x41, 0xD0C): "Arm Neoverse-N1", (0x41, 0xD0D): "Arm Cortex-A77",
    (0x41, 0xD40): "Arm Neoverse-V1", (0x41, 0xD41): "Arm Cortex-A78", (0x41, 0xD44): "Arm Cortex-X1",
    (0x41, 0xD47): "Arm Cortex-A710", (0x41, 0xD49): "Arm Neoverse-N2", (0x41, 0xD4F): "Arm Neoverse-V2",
    (0x41, 0xD84): "Arm Neoverse-V3", (0x41, 0xD8E): "Arm Neoverse-N3", (0x42, 0x516): "Broadcom Vulcan",
    (0x43, 0x0A1): "Cavium ThunderX", (0x43, 0x0AF): "Cavium ThunderX2", (0x46, 0x001): "Fujitsu A64FX",
    (0x48, 0xD01): "HiSilicon Kunpeng-920", (0x4E, 0x004): "NVIDIA Carmel", (0xC0, 0xAC3): "Ampere-1",
    (0xC0, 0xAC4): "Ampere-1a",
}  # fmt: skip
ARM_MAKERS = {0x41: "Arm", 0x42: "Broadcom", 0x43: "Cavium", 0x46: "Fujitsu", 0x48: "HiSilicon",
              0x4E: "NVIDIA", 0x50: "APM", 0x51: "Qualcomm", 0x61: "Apple", 0xC0: "Ampere"}  # fmt: skip

# Documentation/PCI/: display class 0x03xxxx; other vendors (ASPEED, Matrox, QEMU) only draw a console
GPU_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
# drivers/gpu/drm: GPUs of boards, which sit on no PCI bus
BOARD_GPUS = {"v3d": ("Broadcom", "VideoCore"), "panfrost": ("Arm", "Mali"), "panthor": ("Arm", "Mali"),
              "lima": ("Arm", "Mali"), "msm_dpu": ("Qualcomm", "Adreno"), "etnaviv": ("Vivante", "GC")}  # fmt: skip

# (words in sys_vendor and product_name of /sys/class/dmi/id) -> kind of virtual machine
VIRTUAL_DMI = (
    ("vmware", "vmware"), ("virtualbox", "virtualbox"), ("innotek", "virtualbox"), ("parallels", "parallels"),
    ("xen", "xen"), ("hvm domu", "xen"), ("bochs", "kvm"), ("qemu", "kvm"), ("kvm", "kvm"),
    ("openstack", "kvm"), ("google compute engine", "kvm"), ("amazon ec2", "kvm"), ("digitalocean", "kvm"),
    ("hetzner", "kvm"), ("apple virtualization", "apple"), ("virtual machine", "hyper-v"),
)  # fmt: skip
CONTAINER_FILES = (("/.dockerenv", "docker"), ("/run/.containerenv", "podman"))
CONTAINER_PATHS = (("kubepods", "kubernetes"), ("docker", "docker"), ("libpod", "podman"), ("lxc", "lxc"),
                   ("garden", "garden"), ("nspawn", "systemd-nspawn"))  # fmt: skip

# Documentation/hwmon/: chips whose temperature is the processor's
CPU_TEMPERATURE = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "x86_pkg_temp", "cpu-thermal",
                   "soc_thermal", "soc-thermal", "apm_xgene")  # fmt: skip
# Documentation/hwmon/acpi_power_meter.rst: the one chip that measures the whole machine
MACHINE_POWER = ("power_meter",)
SENSOR_UNITS = {"temp": ("celsius", 1e-3), "power": ("watts", 1e-6), "fan": ("rpm", 1.0)}

# Those whose free space can be asked without hanging: no network, no FUSE
LOCAL_FILESYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "overlay", "vfat",
                     "exfat", "ntfs3", "jfs", "reiserfs")  # fmt: skip

QUALITY_FILTERS = ("psnr", "ssim", "libvmaf", "xpsnr")

SMI_IDENTITY = ("index", "name", "uuid", "pci.bus_id", "driver_version", "memory.total", "power.limit")
SMI_READING = ("timestamp", "index", "power.draw", "utilization.gpu", "utilization.encoder", "memory.used",
               "temperature.gpu")  # fmt: skip


@dataclass(frozen=True)
class Encoder:
    """A candidate: FFmpeg's name, its codec, how it is driven (a key of DRIVES), its quickest setting."""

    name: str
    codec: str
    drive: str
    fast: tuple[str, ...] = ()


# drive -> (options before the input, options after it); {node} is a render node of /dev/dri.
DRIVES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "nvenc": ((), ("-pix_fmt", "yuv420p")),
    "qsv": (("-init_hw_device", "qsv=hw"), ("-vf", "format=nv12")),
    "vaapi": (("-vaapi_device", "{node}"), ("-vf", "format=nv12,hwupload")),
    "v4l2m2m": ((), ("-pix_fmt", "yuv420p")),
    "software": ((), ("-pix_fmt", "yuv420p")),
    "audio": ((), ()),
}

ENCODERS = (
    Encoder("h264_nvenc", "h264", "nvenc"),
    Encoder("hevc_nvenc", "hevc", "nvenc"),
    Encoder("av1_nvenc", "av1", "nvenc"),
    Encoder("h264_qsv", "h264", "qsv"),
    Encoder("hevc_qsv", "hevc", "qsv"),
    Encoder("av1_qsv", "av1", "qsv"),
    Encoder("vp9_qsv", "vp9", "qsv"),
    Encoder("h264_vaapi", "h264", "vaapi"),
    Encoder("hevc_vaapi", "hevc", "vaapi"),
    Encoder("av1_vaapi", "av1", "vaapi"),
    Encoder("vp9_vaapi", "vp9", "vaapi"),
    Encoder("h264_v4l2m2m", "h264", "v4l2m2m"),
    Encoder("libx264", "h264", "software", ("-preset", "ultrafast")),
    Encoder("libx265", "hevc", "software", ("-preset", "ultrafast")),
    Encoder("libsvtav1", "av1", "software", ("-preset", "10")),
    Encoder("libaom-av1", "av1", "software", ("-cpu-used", "8")),
    Encoder("librav1e", "av1", "software", ("-speed", "10")),
    Encoder("libvpx-vp9", "vp9", "software", ("-deadline", "realtime", "-cpu-used", "8")),
    Encoder("libopenh264", "h264", "software"),
    Encoder("aac", "aac", "audio"),
    Encoder("libopus", "opus", "audio"),
    Encoder("libmp3lame", "mp3", "audio"),
)


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


@dataclass(frozen=True)
class RaplZone:
    """One energy counter of Documentation/power/powercap/powercap.rst; `name` is unique on the machine."""

    name: str
    kind: str  # package, core, uncore, dram, psys or other
    zone: str  # intel-rapl:0:1
    range_uj: int | None
    readable: bool
    mirror_of: str | None = None


@dataclass(frozen=True)
class Sensor:
    """One value of Documentation/hwmon/sysfs-interface.rst or a thermal zone, in `unit`."""

    chip: str
    label: str
    unit: str
    value: float
    path: str


@dataclass(frozen=True)
class Battery:
    name: str
    status: str | None
    charge_percent: int | None


@dataclass(frozen=True)
class Disk:
    """One local file system. Null sizes have their reason under `unknown`."""

    mount: str
    device: str
    filesystem: str
    size_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True)
class Memory:
    total_bytes: int | None = None
    available_bytes: int | None = None
    swap_bytes: int | None = None


@dataclass(frozen=True)
class Cgroup:
    """Limits of the control group of this process: CPUs and bytes, null where there is none."""

    version: int | None = None
    cpus: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Hardware:
    """What detect() found out. None is unknown, with a reason in `unknown`, unless NONE_IS_AN_ANSWER."""

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
    memory: Memory = Memory()
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
    vaapi_device: str | None = None  # the render node that proved a VAAPI encoder
    unknown: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def proved(self) -> tuple[str, ...]:
        """Name the encoders that encoded a real frame here, hardware first."""
        return tuple(name for name, reason in self.encoders.items() if reason is None)

    def registration(self) -> dict[str, object]:
        """Give exactly the fields of the seed's node registration."""
        return {
            "address": self.address,
            "type": self.node_type,
            "cpu_threads": self.cpu_threads,
            "cpu_model": self.cpu_model,
            "has_gpu": self.has_gpu,
            "gpu_type": self.gpu_type,
            "ram_bytes": self.ram_bytes,
            "labels": {"node_type": self.node_type, "os": self.os, "arch": self.arch},
        }

    def to_json(self) -> dict[str, object]:
        """Give the fields of a registration first, then the rest; ready for json.dumps."""
        answer = self.registration()
        for name, value in dataclasses.asdict(self).items():
            answer.setdefault(name, value)
        return answer


# Fields in which None says "there is none" or "not asked", not "could not be found out"
NONE_IS_AN_ANSWER = ("gpu_type", "virtual", "container", "vaapi_device")


@dataclass(frozen=True)
class GpuReading:
    """One GPU now. Joules are since the sampler's start, over nvidia-smi's own time stamps there."""

    name: str
    index: int | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    usage: float | None = None  # percent
    encoder_usage: float | None = None  # percent
    memory_used_bytes: int | None = None
    temperature_c: float | None = None
    source: str | None = None  # nvidia-smi or hwmon
    in_package: bool = False  # True: RAPL's package holds it already, never add the two


@dataclass(frozen=True)
class Reading:
    """One sample. Rates are means since the previous one; `energy_joules` and `zones` since the start."""

    time: float  # seconds of the clock that sample() was given
    cpu_usage: float | None = None  # percent of the whole machine
    memory_used_bytes: int | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    zones: dict[str, float] = field(default_factory=dict)  # joules
    power_source: str | None = None  # rapl, hwmon or battery
    gpus: tuple[GpuReading, ...] = ()
    temperature_c: float | None = None
    unknown: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ProcessUsage:
    """CPU seconds and resident bytes (shared pages counted in each process) of a process group."""

    cpu_seconds: float
    rss_bytes: int
    pids: tuple[int, ...]


# ---- 2 Host ---------------------------------------------------------------------------------------------

Runner = Callable[[Sequence[str], float], Result]


def default_runner(argv: Sequence[str], timeout_s: float) -> Result:
    """Run a program to its end, or kill its group after `timeout_s`."""
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return Result(None, "", f"{argv[0]} does not start: {_os_words(error)}")
    try:
        out, err = process.communicate(timeout=timeout_s)
        return Result(process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))
    except subprocess.TimeoutExpired:
        return Result(None, "", f"no answer within {timeout_s:.1f} s")
    finally:
        _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a program's group; wait only briefly, for a hung driver can't be killed."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=2)
    except (OSError, subprocess.TimeoutExpired):
        pass
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _os_words(error: Exception) -> str:
    """Turn an error of the operating system into a few lower-case words."""
    words = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
    return words[0].lower() + words[1:]


class Stream:
    """A program that goes on talking; a thread gathers its lines so that its pipe never fills."""

    def __init__(self, argv: Sequence[str]) -> None:
        # Raises OSError when the program can't be started. Only the newest lines are kept.
        self._lines: collections.deque[str] = collections.deque(maxlen=10_000)
        self._process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
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
        """Say whether the program has ended and all that it said has been gathered."""
        return not self._thread.is_alive()

    def lines(self) -> list[str]:
        """Take the lines that came since the last call."""
        taken = []
        while self._lines:
            taken.append(self._lines.popleft())
        return taken

    def close(self) -> None:
        """End the program and its thread; a second call does nothing."""
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(timeout=2)
            except (OSError, subprocess.TimeoutExpired):
                pass  # hung in its driver: it ends when the driver lets go
        self._thread.join(timeout=2)
        if self._process.stdout is not None and not self._thread.is_alive():
            self._process.stdout.close()


class Host:
    """The machine as files and programs, all under one root.

    With a root other than "/" nothing of this machine or process gets into the answer: links are
    followed inside the tree, programs come from the tree, and a file without any read bit counts as
    refused (a recording keeps it so) even for root.
    """

    def __init__(self, root: str = "/", run: Runner = default_runner) -> None:
        self.root = os.path.abspath(root)
        self.foreign = self.root != "/"
        self._run = run

    # Paths

    def _real(self, path: str) -> str:
        """Map a path of the machine to one of this process; links stay inside a foreign root."""
        if not self.foreign:
            return path
        return self.root + self.resolve(path)[0]

    def resolve(self, path: str) -> tuple[str, tuple[tuple[str, str], ...]]:
        """Follow links inside the root. Gives the final path and each (link, target) met on the way."""
        todo, done, met = [part for part in path.split("/") if part][::-1], "", []
        while todo:
            if len(met) > 40:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            part = todo.pop()
            if part in (".", ".."):
                done = os.path.dirname(done).rstrip("/") if part == ".." else done
                continue
            step = f"{done}/{part}"
            try:
                target = os.readlink((self.root if self.foreign else "") + step)
            except (OSError, ValueError):
                done = step
                continue
            met.append((step, target))
            done = "" if target.startswith("/") else done
            todo.extend([piece for piece in target.split("/") if piece][::-1])
        return done or "/", tuple(met)

    # Files

    def read(self, path: str) -> str | None:
        """Read a file once, bounded; None when that can't be done (`why` has the reason)."""
        return self._attempt(path)[0]

    def why(self, path: str) -> str:
        """Say why read() gave None: "missing: PATH", "permission denied: PATH" and the like."""
        return self._attempt(path)[1]

    def _attempt(self, path: str) -> tuple[str | None, str]:
        limit = LARGE_READ_BYTES if path.startswith(("/proc/", "/usr/")) else SMALL_READ_BYTES
        try:
            # Not blocking: a FIFO in a strange tree, or a driver that says EAGAIN, must not hang us.
            handle = os.open(self._real(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if self.foreign and not os.fstat(handle).st_mode & 0o444:
                    return None, f"permission denied: {path}"
                data = os.read(handle, limit)
                # /proc gives a page or so for each read, sysfs everything at once or nothing at all.
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
            return None, f"{_os_words(error)}: {path}"
        return data.decode("utf-8", "replace"), f"unreadable content: {path}"

    def list(self, path: str) -> list[str]:
        """Name what a folder holds, sorted with numbers as numbers; [] when there is none."""
        try:
            return sorted(os.listdir(self._real(path)), key=natural)
        except (OSError, ValueError):
            return []

    def exists(self, path: str) -> bool:
        try:
            return os.path.lexists(self._real(path))
        except ValueError:
            return False

    def link(self, path: str) -> str | None:
        """Give the last part of a link's target: a driver's name, a device's address."""
        try:
            parent, name = os.path.split(path)
            return os.path.basename(os.readlink(os.path.join(self._real(parent), name))) or None
        except (OSError, ValueError):
            return None

    def space(self, mount: str) -> tuple[int, int] | None:
        """Size and free bytes of a file system, as an unprivileged user may fill it."""
        if self.foreign:
            return None
        try:
            found = os.statvfs(mount)
        except OSError:
            return None
        return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize

    def stamp(self, path: str) -> str:
        """Identify a file's present content: its real path, size and modification time."""
        try:
            real = os.path.realpath(self._real(path))
            found = os.stat(real)
            return f"{real} {found.st_size} {found.st_mtime_ns}"
        except OSError:
            return path

    def usable(self, path: str) -> bool:
        """Say whether this process may read and write a device node."""
        return os.access(self._real(path), os.R_OK | os.W_OK)

    def write(self, path: str, text: str) -> str | None:
        """Replace a file at once, for its owner alone. Gives None, or why it could not be done."""
        scratch = f"{path}.{os.getpid()}.tmp"
        try:
            os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
            handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(scratch, path)
        except (OSError, ValueError) as error:
            try:
                os.unlink(scratch)
            except (OSError, ValueError):
                pass
            return f"{_os_words(error)}: {path}"
        return None

    # Programs and processes

    def which(self, name: str) -> str | None:
        """Find a program: on PATH, or in the usual folders of a foreign tree. Gives a path to run."""
        if not self.foreign:
            return shutil.which(name)
        return shutil.which(os.path.basename(name), path=os.pathsep.join(f"{self.root}/{d}" for d in TREE_PATH))

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
        """Ask the running kernel for sysname, nodename, release or machine; None for a foreign root."""
        return None if self.foreign else getattr(os.uname(), what, None) or None

    def group(self, pgid: int) -> list[int]:
        """Name the processes of a group."""
        pids = [int(name) for name in self.list("/proc") if name.isascii() and name.isdigit()]
        return [pid for pid in pids if self._group_of(pid) == pgid]

    def _group_of(self, pid: int) -> int | None:
        if not self.foreign:  # a system call is twenty times as quick as reading stat of every process
            try:
                return os.getpgid(pid)
            except OSError:
                return None
        return parse_process(self.read(f"/proc/{pid}/stat") or "").get("pgrp")


# ---- 3 Parsers ------------------------------------------------------------------------------------------


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that counts: card2 before card10."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in parts]


def parse_int(text: str | None) -> int | None:
    """Read a decimal number, as sysfs prints it; None for anything else."""
    found = re.fullmatch(r"\s*(-?[0-9]{1,20})\s*", text or "", re.ASCII)
    return int(found.group(1)) if found else None


def parse_float(text: str | None) -> float | None:
    """Read a number of nvidia-smi; None for [N/A], [Not Supported] and other words."""
    found = re.fullmatch(r"\s*(-?[0-9]{1,15}(?:\.[0-9]{1,15})?)\s*", text or "", re.ASCII)
    return float(found.group(1)) if found else None


def parse_word(text: str | None) -> str | None:
    """Read a name on one line, without the NULs of a device tree; None when nothing printable is there."""
    line = (text or "").strip("\0\n\t ").split("\n")[0].strip()[:200]
    return line if line and line.isprintable() and "\ufffd" not in line else None


def parse_cpu_list(text: str | None) -> int | None:
    """Count the CPUs of a list such as "0-3,8,10-11"."""
    cpus: set[int] = set()
    for part in (text or "").strip().split(","):
        found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part.strip(), re.ASCII)
        if found is None:
            return None
        first, last = int(found.group(1)), int(found.group(2) or found.group(1))
        if last < first or last >= MAX_CPUS:
            return None
        cpus.update(range(first, last + 1))
    return len(cpus) or None


def parse_pairs(text: str, separator: str) -> list[dict[str, str]]:
    """Split "key SEPARATOR value" lines into blocks, at the empty lines between them."""
    blocks: list[dict[str, str]] = [{}]
    for line in text.splitlines():
        key, found, value = line.partition(separator)
        if found and key.strip():
            blocks[-1].setdefault(key.strip(), value.strip())
        elif not line.strip() and blocks[-1]:
            blocks.append({})
    return [block for block in blocks if block]


def parse_meminfo(text: str) -> dict[str, int]:
    """Read /proc/meminfo into bytes."""
    found = re.findall(r"^(\w+):\s+([0-9]{1,15}) kB$", text, re.MULTILINE | re.ASCII)
    return {name: int(value) * 1024 for name, value in found}


def parse_os_release(text: str) -> str | None:
    """Read PRETTY_NAME of os-release(5)."""
    found = re.search(r"^PRETTY_NAME=([\"']?)(.+)\1\s*$", text, re.MULTILINE)
    return parse_word(found.group(2)) if found else None


def parse_arm_core(block: Mapping[str, str]) -> str | None:
    """Name an Arm core by its implementer and part, for such kernels print no model name."""
    try:
        maker, part = int(block["CPU implementer"], 16), int(block["CPU part"], 16)
    except (KeyError, ValueError):
        return None
    return ARM_CORES.get((maker, part)) or f"{ARM_MAKERS.get(maker, f'Arm maker {maker:#x}')} part {part:#x}"


def parse_cgroup(text: str) -> list[tuple[str, str]]:
    """Read /proc/self/cgroup into (controllers, path); version 2 has no controllers named."""
    rows = (line.split(":", 2) for line in text.splitlines())
    return [(row[1], row[2]) for row in rows if len(row) == 3 and row[0].isdigit() and row[2].startswith("/")]


def parse_cgroup_mounts(text: str) -> list[tuple[str, str, str, str]]:
    """Read the control group mounts of mountinfo: (type, root, mount point, super options)."""
    rows = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        one, two = left.split(" "), right.split(" ")
        if len(one) >= 6 and len(two) >= 3 and two[0] in ("cgroup", "cgroup2"):
            rows.append((two[0], one[3], one[4], two[2]))
    return rows


def parse_mounts(text: str) -> list[tuple[str, str, str]]:
    """Read /proc/self/mounts into (device, mount point, type), escapes such as \\040 undone."""
    def plain(word: str) -> str:
        return re.sub(r"\\([0-3][0-7]{2})", lambda found: chr(int(found.group(1), 8)), word)

    rows = (line.split(" ") for line in text.splitlines())
    return [(plain(row[0]), plain(row[1]), row[2]) for row in rows if len(row) >= 4 and row[1].startswith("/")]


def parse_cpu_times(text: str) -> tuple[int, int] | None:
    """Read the first line of /proc/stat into (busy, all) ticks; guest time is inside user time."""
    found = re.match(r"cpu +((?:[0-9]{1,18} ){3,9}[0-9]{1,18})\n", text, re.ASCII)
    if found is None:
        return None
    ticks = [int(word) for word in found.group(1).split()][:8]
    return sum(ticks) - ticks[3] - (ticks[4] if len(ticks) > 4 else 0), sum(ticks)


def parse_process(text: str) -> dict[str, int]:
    """Read /proc/PID/stat: pgrp, ticks (with those of children waited for) and start, or nothing.

    A command's name may hold spaces and parentheses: the fields begin after the last one.
    """
    words = text.rpartition(")")[2].split()
    try:
        numbers = [int(word) for word in words[1:20]]
        return {"pgrp": numbers[1], "ticks": sum(numbers[10:14]), "start": numbers[18]}
    except (ValueError, IndexError):
        return {}


def parse_csv(text: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """Read nvidia-smi's csv,noheader,nounits; lines of another shape are left out."""
    rows = [[word.strip() for word in line.split(",")] for line in text.splitlines()]
    return [dict(zip(fields, row)) for row in rows if len(row) == len(fields) and len(row) > 1]


def parse_bad_field(text: str) -> str | None:
    """Name the field that this nvidia-smi does not know."""
    found = re.search(r'Field "([\w.]+)" is not a valid field', text)
    return found.group(1) if found else None


def parse_pci_address(text: str | None) -> str | None:
    """Write a PCI address as sysfs does: nvidia-smi says 00000000:3B:00.0."""
    found = re.fullmatch(r"(?:([0-9a-f]+):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", (text or "").strip().lower())
    return f"{int(found.group(1) or '0', 16):04x}:{found.group(2)}" if found else None


def parse_pci_name(text: str, vendor: str, device: str) -> str | None:
    """Find a device in pci.ids, the part in brackets being what people call it."""
    start = re.search(rf"^{re.escape(vendor)}  ", text, re.MULTILINE)
    if start is None:
        return None
    stop = re.compile(r"^[0-9a-f]", re.MULTILINE).search(text, start.end())
    found = re.compile(rf"^\t{re.escape(device)}  (.+)$", re.MULTILINE).search(
        text, start.end(), stop.start() if stop else len(text)
    )
    if found is None:
        return None
    inner = re.search(r"\[([^\]]+)\]", found.group(1))
    return parse_word(inner.group(1) if inner else found.group(1))


def parse_time_stamp(text: str | None) -> float | None:
    """Read nvidia-smi's "2023/05/17 14:23:11.123" into seconds; only differences of it mean anything."""
    try:
        moment = datetime.datetime.strptime((text or "").strip(), "%Y/%m/%d %H:%M:%S.%f")
    except ValueError:
        return None
    return moment.replace(tzinfo=datetime.timezone.utc).timestamp()


def parse_coders(text: str) -> set[str]:
    """Read the names of `ffmpeg -encoders` or `-filters`: the word after the flags."""
    return set(re.findall(r"^ [A-Z.|]{2,6} +([\w-]+) ", text, re.MULTILINE | re.ASCII))


def parse_version(text: str) -> str | None:
    """Read the version of FFmpeg's first line."""
    found = re.match(r"ffmpeg version (\S+)", text)
    return found.group(1) if found else None


GENERIC_WORDS = re.compile(
    r"Error (initializing|parsing|while opening|opening|submitting|sending)|Conversion failed|Nothing was written"
    r"|Device creation failed|Task finished|Terminating thread|Could not open encoder|\w+ \[info\]|Svt\[info\]"
)


def parse_failure(result: Result) -> str:
    """Choose the line of FFmpeg's own words that says most about why an encoder failed."""
    lines = [re.sub(r"^(\[[^\]]*\] *)+", "", line).strip() for line in result.stderr.splitlines()]
    telling = [line for line in lines if line and not GENERIC_WORDS.match(line)]
    words = (telling or [line for line in lines if line] or [""])[0][:160]
    if words:
        return words
    code = result.returncode or 0
    return f"ffmpeg was ended by signal {-code}" if code < 0 else f"ffmpeg gave exit code {code} and no words"


def parse_duration(text: str) -> float:
    """Read "10s", "0.5s", "200ms", "1m30s" or plain seconds; ValueError for anything else."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}
    if not re.fullmatch(r"([0-9]{1,9}(\.[0-9]{1,9})?(h|ms|m|s))+|[0-9]{1,9}(\.[0-9]{1,9})?", text, re.ASCII):
        raise ValueError(f"{text!r} is no duration such as 1s, 0.5s or 1m30s")
    return sum(float(n) * units[unit] for n, unit in re.findall(r"([0-9.]+)([a-z]*)", text))


# ---- 4 Detectors ----------------------------------------------------------------------------------------


def _known(hw: Hardware, name: str, value: str | None, reason: str) -> str | None:
    """Note why a value is unknown, and pass it on."""
    if value is None:
        hw.unknown[name] = reason
    return value


def _detect_system(host: Host, hw: Hardware) -> Hardware:
    """Name, kernel, operating system and board."""
    kernel = "/proc/sys/kernel/"
    name = parse_word(host.read(kernel + "hostname")) or parse_word(host.read("/etc/hostname"))
    kind = parse_word(host.read(kernel + "ostype")) or host.uname("sysname")
    release = parse_word(host.read(kernel + "osrelease")) or host.uname("release")
    told = [host.read(path) for path in ("/etc/os-release", "/usr/lib/os-release")]
    pretty = next(filter(None, (parse_os_release(text or "") for text in told)), None)
    return replace(
        hw,
        address=_known(hw, "address", name or host.uname("nodename"), host.why(kernel + "hostname")),
        os=_known(hw, "os", kind.lower() if kind else None, host.why(kernel + "ostype")),
        os_name=_known(hw, "os_name", pretty, host.why("/etc/os-release")),
        kernel=_known(hw, "kernel", release, host.why(kernel + "osrelease")),
        machine=_known(hw, "machine", _board(host), "neither DMI nor a device tree names the board"),
    )


def _board(host: Host) -> str | None:
    """Name the board: DMI on PCs and servers, the device tree elsewhere."""
    dmi = [parse_word(host.read(f"/sys/class/dmi/id/{name}")) for name in ("sys_vendor", "product_name")]
    return " ".join(word for word in dmi if word) or parse_word(host.read("/proc/device-tree/model"))


def _detect_cpu(host: Host, hw: Hardware) -> Hardware:
    """Model, flags and counts."""
    text = host.read("/proc/cpuinfo")
    why = host.why("/proc/cpuinfo")
    blocks = parse_pairs(text or "", ":")
    merged: dict[str, str] = {}
    for block in blocks:
        for key, value in block.items():
            merged.setdefault(key, value)
    cores, sockets = _topology(host, blocks)
    logical = (
        parse_cpu_list(host.read("/sys/devices/system/cpu/online"))
        or sum("processor" in block for block in blocks)
        or len(re.findall(r"^cpu[0-9]+ ", host.read("/proc/stat") or "", re.MULTILINE))
        or None
    )
    reason = f"no CPU numbers in /proc/cpuinfo or /sys/devices/system/cpu ({why})"
    for name, number in (("cpu_logical", logical), ("cpu_cores", cores), ("cpu_sockets", sockets)):
        if number is None:
            hw.unknown[name] = reason
    flags = set((merged.get("flags") or merged.get("Features") or merged.get("features") or "").split())
    mhz = _max_mhz(host)
    if mhz is None:
        hw.unknown["cpu_mhz_max"] = "no frequency scaling under /sys/devices/system/cpu/cpufreq"
    return replace(
        hw,
        cpu_model=_known(hw, "cpu_model", _cpu_model(merged), f"no model in /proc/cpuinfo ({why})"),
        cpu_vendor=_known(hw, "cpu_vendor", _cpu_vendor(merged), f"no vendor in /proc/cpuinfo ({why})"),
        cpu_logical=logical,
        cpu_cores=cores,
        cpu_sockets=sockets,
        cpu_flags=tuple(flag for flag in ENCODER_FLAGS if flag in flags),
        cpu_mhz_max=mhz,
        arch=_known(hw, "arch", _arch(host, merged, flags), f"no architecture in /proc ({why})"),
    )


def _cpu_model(merged: Mapping[str, str]) -> str | None:
    """Find the name under the keys that the kernel's architectures print; Arm64 has only numbers."""
    for key in ("model name", "cpu model", "cpu", "Processor"):
        word = parse_word(" ".join(merged.get(key, "").split()))
        if word and not word.startswith(("ARMv7", "AArch64")):
            return word
    return parse_arm_core(merged) or parse_word(merged.get("uarch")) or parse_word(merged.get("model name"))


def _cpu_vendor(merged: Mapping[str, str]) -> str | None:
    try:
        maker = ARM_MAKERS.get(int(merged.get("CPU implementer", ""), 16))
    except ValueError:
        maker = None
    return parse_word(merged.get("vendor_id")) or maker


def _arch(host: Host, merged: Mapping[str, str], flags: set[str]) -> str | None:
    """Give Go's name of the architecture; before Linux 6.1 /proc says it only by the shape of cpuinfo."""
    word = parse_word(host.read("/proc/sys/kernel/arch")) or host.uname("machine")
    if word:
        return GO_ARCH.get(word, word)
    if "CPU architecture" in merged:
        return "arm64" if "asimd" in flags else "arm"
    return ("amd64" if "lm" in flags else "386") if "fpu" in flags else None


def _topology(host: Host, blocks: Sequence[Mapping[str, str]]) -> tuple[int | None, int | None]:
    """Count cores and sockets: threads of one core name the same siblings."""
    cores, sockets = set(), set()
    base = "/sys/devices/system/cpu"
    for cpu in (name for name in host.list(base) if re.fullmatch(r"cpu[0-9]+", name, re.ASCII)):
        siblings = parse_word(host.read(f"{base}/{cpu}/topology/thread_siblings_list"))
        package = parse_int(host.read(f"{base}/{cpu}/topology/physical_package_id"))
        if siblings and parse_cpu_list(siblings):
            cores.add(siblings)
        if package is not None and package >= 0:
            sockets.add(package)
    if cores and sockets:
        return len(cores), len(sockets)
    pairs = {(b["physical id"], b["core id"]) for b in blocks if "physical id" in b and "core id" in b}
    return len(pairs) or len(cores) or None, len({pair[0] for pair in pairs}) or len(sockets) or None


def _max_mhz(host: Host) -> float | None:
    base = "/sys/devices/system/cpu/cpufreq"
    found = [parse_int(host.read(f"{base}/{name}/cpuinfo_max_freq")) for name in host.list(base)]
    return max((khz / 1000 for khz in found if khz is not None and khz > 0), default=None)


def _detect_limits(host: Host, hw: Hardware) -> Hardware:
    """Memory, control group, and what they leave to this process."""
    text = host.read("/proc/meminfo")
    info = parse_meminfo(text or "")
    memory = Memory(info.get("MemTotal"), info.get("MemAvailable"), info.get("SwapTotal"))
    group = cgroup_limits(host)
    if memory.total_bytes is None:
        hw.unknown["ram_bytes"] = f"no MemTotal ({host.why('/proc/meminfo')})"
    rams = [n for n in (memory.total_bytes, group.memory_bytes) if n is not None]
    status = parse_pairs(host.read("/proc/self/status") or "", ":")
    allowed = parse_cpu_list(next((b["Cpus_allowed_list"] for b in status if "Cpus_allowed_list" in b), None))
    limits = [hw.cpu_logical, allowed, None if group.cpus is None else max(1, math.ceil(group.cpus))]
    threads = min((n for n in limits if n is not None), default=None)
    if threads is None:
        hw.unknown["cpu_threads"] = "neither the CPUs nor this process's affinity can be read"
    ram = min(rams) if memory.total_bytes is not None else None
    return replace(hw, memory=memory, cgroup=group, ram_bytes=ram, cpu_threads=threads)


def cgroup_limits(host: Host) -> Cgroup:
    """Find the tightest CPU and memory limits from this process's control group up to its root.

    Documentation/admin-guide/cgroup-v2.rst (cpu.max, memory.max) and cgroup-v1 (cfs_quota_us).
    """
    mounts = parse_cgroup_mounts(host.read("/proc/self/mountinfo") or "")
    version, cpus, memory = None, [], []
    for names, path in parse_cgroup(host.read("/proc/self/cgroup") or ""):
        controllers = set(names.split(",")) & {"cpu", "memory"}
        if names and not controllers:
            continue
        version = max(version or 0, 1 if names else 2)
        for folder in _cgroup_folders(mounts, controllers, path):
            cpus.append(_cpu_quota(host, folder))
            memory += [parse_int(host.read(f"{folder}/memory.{name}")) for name in ("max", "limit_in_bytes")]
    # Version 1 says "no limit" with the largest multiple of a page below 2^63.
    bounded = [n for n in memory if n is not None and 0 < n < 2**62]
    return Cgroup(version, min((n for n in cpus if n is not None), default=None), min(bounded, default=None))


def _cgroup_folders(mounts: Sequence[tuple[str, str, str, str]], controllers: set[str], path: str) -> list[str]:
    """List the folders of a control group and its parents, below where its hierarchy is mounted."""
    points = [
        (root, point)
        for kind, root, point, options in mounts
        if (kind == "cgroup" and controllers & set(options.split(","))) or (kind == "cgroup2" and not controllers)
    ]
    usual = [("/", f"/sys/fs/cgroup/{name}") for name in sorted(controllers)] or [("/", "/sys/fs/cgroup")]
    folders = []
    for root, point in points or usual:
        inner = path[len(root):] if root != "/" and (path + "/").startswith(root + "/") else path
        # Inside a container the path may be the host's, which does not exist here: its parents still do.
        parts = [part for part in inner.split("/") if part not in ("", ".", "..")][:32]
        folders += ["/".join([point.rstrip("/"), *parts[:depth]]) for depth in range(len(parts), -1, -1)]
    return folders


def _cpu_quota(host: Host, folder: str) -> float | None:
    """Read a quota in CPUs; "max" and -1 mean none."""
    words = (host.read(f"{folder}/cpu.max") or "").split()
    quota, period = (parse_int(words[0]), parse_int(words[1])) if len(words) == 2 else (None, None)
    if quota is None:
        quota = parse_int(host.read(f"{folder}/cpu.cfs_quota_us"))
        period = parse_int(host.read(f"{folder}/cpu.cfs_period_us"))
    return quota / period if quota is not None and period and quota > 0 and period > 0 else None


def _detect_virtual(host: Host, hw: Hardware) -> Hardware:
    """Virtual machine and container, each null when there is none."""
    return replace(hw, virtual=virtual_kind(host), container=_container(host))


def virtual_kind(host: Host) -> str | None:
    """Name the kind of virtual machine, or None: bare metal, as far as the machine says."""
    if "microsoft" in (host.read("/proc/sys/kernel/osrelease") or "").lower():
        return "wsl"
    if host.read("/sys/hypervisor/type"):
        return parse_word(host.read("/sys/hypervisor/type"))
    if host.read("/proc/device-tree/hypervisor/compatible"):
        return "kvm"
    blocks = parse_pairs(host.read("/proc/cpuinfo") or "", ":")
    flags = next((block["flags"].split() for block in blocks if "flags" in block), None)
    if flags is not None and "hypervisor" not in flags:
        return None  # a rented bare machine has its cloud's name in DMI too
    board = (_board(host) or "").lower()
    kind = next((kind for words, kind in VIRTUAL_DMI if words in board), None)
    return kind or ("vm" if flags else None)


def _container(host: Host) -> str | None:
    kind = parse_word(host.read("/run/systemd/container"))
    if kind:
        return kind
    paths = " ".join(path for _, path in parse_cgroup(host.read("/proc/self/cgroup") or ""))
    found = (kind for path, kind in CONTAINER_FILES if host.exists(path))
    return next(found, None) or next((kind for word, kind in CONTAINER_PATHS if word in paths), None)


def _detect_batteries(host: Host, hw: Hardware) -> Hardware:
    """Batteries that power the machine: Documentation/ABI/testing/sysfs-class-power."""
    base = "/sys/class/power_supply"
    if not host.exists(base):
        hw.unknown["has_battery"] = f"missing: {base}"
        return replace(hw, has_battery=None)
    found = []
    for name in battery_names(host):
        status = parse_word(host.read(f"{base}/{name}/status"))
        charge = parse_int(host.read(f"{base}/{name}/capacity"))
        found.append(Battery(name, status, charge))
    return replace(hw, has_battery=bool(found), batteries=tuple(found))


def battery_names(host: Host) -> list[str]:
    """Name the batteries that are there and power the machine; scope Device is a mouse's."""
    base = "/sys/class/power_supply"

    def counts(name: str) -> bool:
        kind, scope, present = (parse_word(host.read(f"{base}/{name}/{f}")) for f in ("type", "scope", "present"))
        return kind == "Battery" and scope in (None, "System", "Unknown") and present != "0"

    return [name for name in host.list(base) if counts(name)]


def _detect_disks(host: Host, hw: Hardware) -> Hardware:
    """Local file systems with their room, one for each device."""
    text = host.read("/proc/self/mounts")
    if text is None:
        hw.unknown["disks"] = host.why("/proc/self/mounts")
    shortest: dict[str, tuple[str, str]] = {}
    for device, mount, kind in parse_mounts(text or ""):
        key = device if device.startswith("/") else f"{device} {mount}"
        if kind in LOCAL_FILESYSTEMS and len(mount) < len(shortest.get(key, (mount + "/", ""))[0]):
            shortest[key] = (mount, kind)
    disks = []
    for key, (mount, kind) in sorted(shortest.items(), key=lambda item: item[1]):
        device = key.split(" ")[0]
        size, free = host.space(mount) or (_block_bytes(host, device), None)
        if free is None:
            hw.unknown[f"disks.{mount}.free_bytes"] = "another root is read" if host.foreign else "not to be asked"
        if size is None:
            hw.unknown[f"disks.{mount}.size_bytes"] = f"no size of {device} under /sys/class/block"
        disks.append(Disk(mount, device, kind, size, free))
    return replace(hw, disks=tuple(disks))


def _block_bytes(host: Host, device: str) -> int | None:
    sectors = parse_int(host.read(f"/sys/class/block/{os.path.basename(device)}/size"))
    return None if sectors is None else sectors * 512  # in units of 512 bytes whatever the disk's own are


def _detect_gpus(host: Host, hw: Hardware) -> Hardware:
    """GPUs of the PCI bus and of boards, told more of by nvidia-smi."""
    seen = [*_pci_gpus(host), *_board_gpus(host)]
    rows, trouble = _ask_smi(host)
    named = {parse_pci_address(row.get("pci.bus_id")): row for row in rows}
    merged = [_with_smi(gpu, named.pop(gpu.pci, None)) if gpu.pci else gpu for gpu in seen]
    merged += [_with_smi(Gpu("NVIDIA", "GPU"), row) for row in named.values()]
    if any(gpu.vendor == "NVIDIA" for gpu in merged) and trouble:
        hw.problems.append(f"nvidia-smi: {trouble}")
    order = {"NVIDIA": 0, "AMD": 1, "Intel": 2}
    merged.sort(key=lambda gpu: (order.get(gpu.vendor, 3), bool(gpu.integrated)))
    names = list(dict.fromkeys(_gpu_title(gpu) for gpu in merged))
    if not merged and not (host.exists("/sys/bus/pci/devices") or host.exists("/sys/class/drm")):
        hw.unknown["gpus"] = "neither /sys/bus/pci nor /sys/class/drm is here"
    return replace(hw, gpus=tuple(merged), has_gpu=bool(merged), gpu_type=" + ".join(names) or None)


def _gpu_title(gpu: Gpu) -> str:
    return gpu.name if gpu.name.lower().startswith(gpu.vendor.lower()) else f"{gpu.vendor} {gpu.name}"


def _pci_gpus(host: Host) -> list[Gpu]:
    """Find display devices (class 0x03) of those who make encoders; one given to a guest is not ours."""
    found = []
    for address in host.list("/sys/bus/pci/devices"):
        path = f"/sys/bus/pci/devices/{address}"
        if not (host.read(f"{path}/class") or "").startswith("0x03"):
            continue
        vendor, device = (parse_word(host.read(f"{path}/{name}")) or "" for name in ("vendor", "device"))
        driver = host.link(f"{path}/driver")
        if vendor in GPU_VENDORS and driver != "vfio-pci":
            found.append(_pci_gpu(host, path, address, vendor, device, driver))
    return found


def _pci_gpu(host: Host, path: str, address: str, vendor: str, device: str, driver: str | None) -> Gpu:
    maker = GPU_VENDORS[vendor]
    ids = (host.read(f"/usr/share/{name}/pci.ids") or "" for name in ("misc", "hwdata"))
    named = (parse_pci_name(text, vendor[2:], device[2:]) for text in ids)
    own = parse_word(host.read(f"{path}/product_name"))
    if maker == "NVIDIA":
        told = parse_pairs(host.read(f"/proc/driver/nvidia/gpus/{address}/information") or "", ":")
        own = parse_word(told[0].get("Model")) if told else None
    nodes = [name for name in host.list(f"{path}/drm") if name.startswith("renderD")]
    # Documentation/gpu/amdgpu/thermal.rst: in1 (north bridge) is there on APUs alone.
    chips = host.list(f"{path}/hwmon")
    apu = any(host.read(f"{path}/hwmon/{chip}/in1_input") is not None for chip in chips)
    return Gpu(
        vendor=maker,
        name=own or next(filter(None, named), None) or f"GPU {vendor[2:]}:{device[2:]}",
        driver=driver,
        driver_version=parse_word(host.read(f"/sys/module/{driver}/version")) if driver else None,
        memory_bytes=parse_int(host.read(f"{path}/mem_info_vram_total")),
        pci=address,
        render_node=f"/dev/dri/{nodes[0]}" if nodes else None,
        integrated={"NVIDIA": False, "AMD": apu, "Intel": address.startswith("0000:00:")}[maker],
        path=path,
    )


def _board_gpus(host: Host) -> list[Gpu]:
    """Find GPUs that sit on no PCI bus by their driver."""
    found = []
    for card in host.list("/sys/class/drm"):
        path = f"/sys/class/drm/{card}/device"
        driver = host.link(f"{path}/driver") if re.fullmatch(r"card[0-9]+", card, re.ASCII) else None
        if driver in BOARD_GPUS:
            vendor, name = BOARD_GPUS[driver]
            nodes = [node for node in host.list(f"{path}/drm") if node.startswith("renderD")]
            node = f"/dev/dri/{nodes[0]}" if nodes else None
            found.append(Gpu(vendor, name, driver=driver, render_node=node, integrated=True, path=path))
    return found


def _ask_smi(host: Host) -> tuple[list[dict[str, str]], str | None]:
    """Ask nvidia-smi what the GPUs are. Gives its rows, and what went wrong."""
    program = host.which("nvidia-smi")
    if program is None:
        return [], "not installed: power, usage and memory of the NVIDIA GPU stay unknown"
    result = host.run(smi_argv(program, SMI_IDENTITY), PROGRAM_S)
    rows = parse_csv(result.stdout, SMI_IDENTITY)
    words = (result.stderr or result.stdout).strip().splitlines()
    return rows, None if rows else (words[0][:160] if words else f"exit code {result.returncode}, no words")


def smi_argv(program: str, fields: Sequence[str]) -> list[str]:
    return [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def _with_smi(gpu: Gpu, row: Mapping[str, str] | None) -> Gpu:
    """Add what nvidia-smi says of a GPU."""
    if row is None:
        return gpu
    mib = parse_float(row["memory.total"])
    return replace(
        gpu,
        name=parse_word(row["name"]) or gpu.name,
        index=parse_int(row["index"]),
        driver=gpu.driver or "nvidia",
        driver_version=parse_word(row["driver_version"]),
        memory_bytes=None if mib is None else int(mib * 2**20),
        power_limit_watts=parse_float(row["power.limit"]),
        uuid=parse_word(row["uuid"]),
        pci=gpu.pci or parse_pci_address(row["pci.bus_id"]),
        integrated=False,
    )


def _detect_rapl(host: Host, hw: Hardware) -> Hardware:
    """Energy counters, and whether this process may read them."""
    zones = rapl_zones(host)
    if not zones:
        hw.unknown["rapl"] = _why_no_rapl(host)
    for zone in zones:
        if not zone.readable:
            hw.unknown[f"rapl.{zone.name}"] = _why_unreadable(host, zone)
    return replace(hw, rapl=zones)


def _why_no_rapl(host: Host) -> str:
    kind = virtual_kind(host)
    if kind:
        return f"no RAPL: a virtual machine ({kind})"
    if host.exists("/sys/class/powercap"):
        return "no RAPL: /sys/class/powercap holds no intel-rapl zone (load the module intel_rapl_msr)"
    return "no RAPL: /sys/class/powercap is missing (no Intel or AMD processor, or it is hidden from here)"


def _why_unreadable(host: Host, zone: RaplZone) -> str:
    why = host.why(f"{POWERCAP}/{zone.zone}/energy_uj")
    return f"{why}; {RAPL_FIX}" if "permission denied" in why else why


POWERCAP = "/sys/class/powercap"
RAPL_KINDS = ("core", "uncore", "dram", "psys")


def rapl_zones(host: Host) -> tuple[RaplZone, ...]:
    """Find the zones under names of their own: "package-0", "dram-1".

    Sockets have zones of equal name, and intel-rapl-mmio repeats counters of intel-rapl: of a zone that
    is there twice the first readable one counts.
    """
    found: dict[str, RaplZone] = {}
    owner: dict[str, str] = {}  # zone id of a package -> what its parts end in
    for zone in host.list(POWERCAP):
        match = re.fullmatch(r"(intel-rapl(?:-mmio)?):([0-9]+)(?::([0-9]+))?", zone, re.ASCII)
        if match is None:
            continue
        word = parse_word(host.read(f"{POWERCAP}/{zone}/name")) or ""
        package = re.fullmatch(r"package-([0-9]+(?:-die-[0-9]+)?)", word, re.ASCII)
        kind = "package" if package else word if word in RAPL_KINDS else "other"
        top = ":".join(zone.split(":")[:2])
        if package:
            owner[zone] = package.group(1)
        name = word if kind in ("package", "psys") else f"{word or 'zone'}-{owner.get(top, match.group(2))}"
        text = host.read(f"{POWERCAP}/{zone}/energy_uj")
        span = parse_int(host.read(f"{POWERCAP}/{zone}/max_energy_range_uj"))
        new = RaplZone(name, kind, zone, span, parse_int(text) is not None)
        _add_zone(found, new)
    return _mark_mirrors(host, tuple(sorted(found.values(), key=lambda one: natural(one.name))))


def _add_zone(found: dict[str, RaplZone], new: RaplZone) -> None:
    old = found.get(new.name)
    if old is None:
        found[new.name] = new
    elif old.zone.split(":")[0] == new.zone.split(":")[0]:  # not a mirror: another zone of that name
        name = f"{new.name}#{new.zone.partition(':')[2]}"
        found[name] = replace(new, name=name)
    elif new.readable and not old.readable:
        found[new.name] = new


def _mark_mirrors(host: Host, zones: tuple[RaplZone, ...]) -> tuple[RaplZone, ...]:
    """Mark dies that show another die's counter, as some AMD processors of many dies do."""
    mirrors = mirrored(zones, *read_counters(host, zones)) if may_mirror(host, zones) else {}
    return tuple(replace(zone, mirror_of=mirrors.get(zone.name)) for zone in zones)


def may_mirror(host: Host, zones: Sequence[RaplZone]) -> bool:
    """Say whether packages may repeat each other: there are several, and they are not Intel's."""
    several = sum(zone.kind == "package" for zone in zones) > 1
    return several and "GenuineIntel" not in (host.read("/proc/cpuinfo") or "")[:SMALL_READ_BYTES]


def read_counters(host: Host, zones: Iterable[RaplZone]) -> tuple[dict[str, int], dict[str, int]]:
    """Read each counter in turn, then all again: only the same register can stay inside that bracket."""
    paths = {zone.name: f"{POWERCAP}/{zone.zone}/energy_uj" for zone in zones}
    first = {name: parse_int(host.read(path)) for name, path in paths.items()}
    again = {name: parse_int(host.read(path)) for name, path in paths.items()}
    return ({name: value for name, value in first.items() if value is not None},
            {name: value for name, value in again.items() if value is not None})  # fmt: skip


def mirrored(zones: Sequence[RaplZone], first: Mapping[str, int], again: Mapping[str, int]) -> dict[str, str]:
    """Give {zone: the earlier zone of its kind whose counter it shows}, by two readings of all (µJ)."""
    found: dict[str, str] = {}
    for at, zone in enumerate(zones):
        for other in zones[:at]:
            names = (zone.name, other.name)
            if zone.kind != other.kind or other.name in found or not all(n in first and n in again for n in names):
                continue
            span = zone.range_uj or 2**63
            ahead = (first[zone.name] - first[other.name]) % span
            if zone.range_uj == other.range_uj and ahead <= (again[other.name] - first[other.name]) % span:
                found[zone.name] = other.name
                break
    return found


def _detect_sensors(host: Host, hw: Hardware) -> Hardware:
    """Temperatures, power meters and fans."""
    found = (*_hwmon(host), *_thermal(host))
    if not found:
        hw.unknown["sensors"] = "neither /sys/class/hwmon nor /sys/class/thermal has a sensor"
    return replace(hw, sensors=found)


def _hwmon(host: Host) -> list[Sensor]:
    found = []
    for entry in host.list("/sys/class/hwmon"):
        base = f"/sys/class/hwmon/{entry}"
        chip = parse_word(host.read(f"{base}/name")) or entry
        names = host.list(base)
        for name in names:
            match = re.fullmatch(r"(temp|power|fan)([0-9]+)_(input|average)", name, re.ASCII)
            if match is None or (match.group(3) == "input" and f"{match.group(1)}{match.group(2)}_average" in names):
                continue
            value = parse_int(host.read(f"{base}/{name}"))
            unit, scale = SENSOR_UNITS[match.group(1)]
            stem = match.group(1) + match.group(2)
            label = (parse_word(host.read(f"{base}/{stem}_label")) if f"{stem}_label" in names else None) or stem
            if value is not None:
                found.append(Sensor(chip, label, unit, value * scale, f"{base}/{name}"))
    return found


def _thermal(host: Host) -> list[Sensor]:
    found = []
    for entry in host.list("/sys/class/thermal"):
        path = f"/sys/class/thermal/{entry}/temp"
        value = parse_int(host.read(path)) if entry.startswith("thermal_zone") else None
        if value is not None:
            chip = parse_word(host.read(f"/sys/class/thermal/{entry}/type")) or entry
            found.append(Sensor(chip, entry, "celsius", value / 1000, path))
    return found


def _detect_node_type(host: Host, hw: Hardware) -> Hardware:
    """Apply the seed's rule: laptop has a battery; server has many threads and much memory; else desktop."""
    big = (hw.cpu_threads or 0) > SERVER_THREADS and (hw.ram_bytes or 0) > SERVER_RAM_BYTES
    if not hw.has_battery and (hw.cpu_threads is None or hw.ram_bytes is None):
        hw.unknown["node_type"] = "called desktop, for threads or memory are unknown"
    return replace(hw, node_type="laptop" if hw.has_battery else "server" if big else "desktop")


# Order matters where a detector uses what an earlier one found (limits: CPUs; the node type: nearly all).
DETECTORS: tuple[tuple[str, Callable[[Host, Hardware], Hardware]], ...] = (
    ("system", _detect_system),
    ("cpu", _detect_cpu),
    ("limits", _detect_limits),
    ("virtual", _detect_virtual),
    ("batteries", _detect_batteries),
    ("gpus", _detect_gpus),
    ("rapl", _detect_rapl),
    ("sensors", _detect_sensors),
    ("disks", _detect_disks),
    ("node type", _detect_node_type),
)


def detect(
    host: Host, probe: bool = True, state_dir: str | None = None, ffmpeg: str | None = None
) -> Hardware:
    """Find out what the machine is. Never fails: what could not be found out has its reason.

    `probe` tries each encoder on a real frame (a few seconds, kept in `state_dir` for the next start);
    `ffmpeg` is a path or name instead of FFDIST_FFMPEG or the one on PATH.
    """
    def media(host: Host, hw: Hardware) -> Hardware:
        return _detect_ffmpeg(host, hw, probe, state_dir, ffmpeg)

    hw = Hardware()
    for name, detector in (*DETECTORS, ("ffmpeg", media)):
        try:
            hw = detector(host, hw)
        except Exception as error:  # isolated: one strange file must not cost the whole answer
            hw.problems.append(f"{name}: {type(error).__name__}: {str(error)[:160]}")
    for one in dataclasses.fields(hw):
        if getattr(hw, one.name) is None and one.name not in NONE_IS_AN_ANSWER:
            hw.unknown.setdefault(one.name, "its detector failed, see problems")
    return hw


def _detect_ffmpeg(host: Host, hw: Hardware, probe: bool, state_dir: str | None, wanted: str | None) -> Hardware:
    """FFmpeg, what it has, and which encoders work here."""
    wanted = wanted or (None if host.foreign else os.environ.get("FFDIST_FFMPEG")) or "ffmpeg"
    program = host.which(wanted)
    if program is None:
        for name in ("ffmpeg", "ffprobe", "ffmpeg_version", "encoders", "filters"):
            hw.unknown[name] = f"{wanted} is not installed or not on PATH"
        return hw
    beside = host.which(os.path.join(os.path.dirname(program), "ffprobe")) or host.which("ffprobe")
    hw = replace(
        hw,
        ffmpeg=program[len(host.root):] if host.foreign else program,
        ffprobe=_known(hw, "ffprobe", beside, "ffprobe is neither beside ffmpeg nor on PATH"),
    )
    if host.foreign:
        for name in ("ffmpeg_version", "encoders", "filters"):
            hw.unknown[name] = "another root is read: trying its FFmpeg here would tell of this machine"
        return replace(hw, ffprobe=beside[len(host.root):] if beside else None)
    told = host.run([program, "-hide_banner", "-version"], PROGRAM_S)
    version = parse_version(told.stdout)
    if version is None:
        for name in ("ffmpeg_version", "encoders", "filters"):
            hw.unknown[name] = f"{program} gives no version: {parse_failure(told)}"
        return hw
    filters = parse_coders(host.run([program, "-hide_banner", "-filters"], PROGRAM_S).stdout)
    hw = replace(hw, ffmpeg_version=version, filters=tuple(f for f in QUALITY_FILTERS if f in filters))
    if not probe:
        hw.unknown["encoders"] = "not tried: --no-probe"
        return hw
    return _remembered_encoders(host, hw, program, told.stdout, state_dir)


def _remembered_encoders(host: Host, hw: Hardware, program: str, version: str, state_dir: str | None) -> Hardware:
    """Probe once for each FFmpeg build and set of GPUs; timeouts are not remembered."""
    gpus = [[g.vendor, g.name, g.pci, g.driver, g.driver_version] for g in hw.gpus]
    nodes = [f"/dev/dri/{name}" for name in host.list("/dev/dri") if name.startswith("renderD")]
    nodes += [f"/dev/{name}" for name in host.list("/dev") if re.match(r"nvidia[0-9]|nvidiactl|video[0-9]", name)]
    key: dict[str, object] = {"ffmpeg": host.stamp(program), "version": version, "gpus": gpus,
                              "devices": [[node, host.usable(node)] for node in nodes]}  # fmt: skip
    path = os.path.join(os.path.abspath(state_dir), "encoders.json") if state_dir else None
    kept = _kept_encoders(host, path, key) if path else None
    if kept is not None:
        return replace(hw, encoders=kept[0], vaapi_device=kept[1])
    encoders, device = probe_encoders(host, program, hw.gpus)
    if not encoders:
        hw.unknown["encoders"] = f"{program} lists none of the known encoders"
    if path and encoders and not any((reason or "").startswith(UNDECIDED) for reason in encoders.values()):
        trouble = host.write(path, json.dumps({"key": key, "encoders": encoders, "vaapi_device": device}, indent=1))
        if trouble:
            hw.problems.append(f"the encoders found can't be kept: {trouble}")
    return replace(hw, encoders=encoders, vaapi_device=device)


UNDECIDED = "no answer within"  # how a reason begins that may not be remembered


def _kept_encoders(host: Host, path: str, key: object) -> tuple[dict[str, str | None], str | None] | None:
    """Read what an earlier probe found, if it was of the same FFmpeg and GPUs."""
    try:
        kept = json.loads(host.read(path) or "")
        if kept["key"] != key:
            return None
        encoders, device = kept["encoders"], kept["vaapi_device"]
        words = [*encoders, *(reason for reason in encoders.values() if reason is not None)]
        sound = all(isinstance(word, str) for word in [*words, device or ""])
        return (dict(encoders), device) if sound else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def probe_encoders(host: Host, ffmpeg: str, gpus: Sequence[Gpu]) -> tuple[dict[str, str | None], str | None]:
    """Encode one frame with each candidate that FFmpeg lists, side by side, within PROBE_TOTAL_S.

    Gives {name: None when proved, else one line why not} and the render node that proved VAAPI.
    """
    end = time.monotonic() + PROBE_TOTAL_S
    listed = parse_coders(host.run([ffmpeg, "-hide_banner", "-encoders"], PROBE_EACH_S).stdout)
    candidates = [encoder for encoder in ENCODERS if encoder.name in listed]
    nodes = [gpu.render_node for gpu in gpus if gpu.render_node and gpu.vendor != "NVIDIA"]
    proved_on: list[str] = []

    def attempt(encoder: Encoder) -> str | None:
        reason: str | None = None
        for node in (nodes or ["/dev/dri/renderD128"]) if encoder.drive == "vaapi" else [""]:
            left = min(PROBE_EACH_S, end - time.monotonic())
            if left <= 0:
                return f"{UNDECIDED} {PROBE_TOTAL_S} s for all encoders: try again when the machine is less busy"
            result = host.run(probe_argv(ffmpeg, encoder, node), left)
            if result.returncode == 0:
                proved_on.extend([node] if node else [])
                return None
            reason = reason or parse_failure(result)
        return reason

    with ThreadPoolExecutor(max_workers=max(4, min(8, os.cpu_count() or 4))) as pool:
        reasons = list(pool.map(attempt, candidates))
    answers = {encoder.name: reason for encoder, reason in zip(candidates, reasons)}
    return answers, min(proved_on, default=None)


def probe_argv(ffmpeg: str, encoder: Encoder, node: str = "/dev/dri/renderD128") -> list[str]:
    """Build the command that encodes one frame (NVENC refuses less than 256x256), or a short tone."""
    before, after = ([option.replace("{node}", node) for option in part] for part in DRIVES[encoder.drive])
    source, kind = ("sine=duration=0.1", "-c:a") if encoder.drive == "audio" else ("testsrc2=size=640x480", "-c:v")
    frame = [] if encoder.drive == "audio" else ["-frames:v", "1"]
    return [ffmpeg, "-hide_banner", "-nostdin", "-v", "error", *before, "-f", "lavfi", "-i", source,
            *after, kind, encoder.name, *encoder.fast, *frame, "-f", "null", "-"]  # fmt: skip


# ---- 5 Sampler ------------------------------------------------------------------------------------------


class _Integral:
    """Joules of a power that is read now and then: the mean of two neighbours times their distance."""

    def __init__(self) -> None:
        self.joules = 0.0
        self._last: tuple[float, float] | None = None

    def add(self, when: float, watts: float) -> float:
        if self._last is not None and when > self._last[0]:
            self.joules += (when - self._last[0]) * (watts + self._last[1]) / 2
        self._last = (when, watts)
        return self.joules


class _Rapl:
    """Previous counters of the zones, and the joules that they gave since the start."""

    def __init__(self, host: Host, zones: Sequence[RaplZone]) -> None:
        self._host, self._zones = host, {zone.name: zone for zone in zones}
        self._mirrors_possible = may_mirror(host, zones)
        self._counters: dict[str, int] = {}
        self._alike: dict[str, str] = {}  # zones that showed another's counter at the previous sample
        self._then: float | None = None
        self.zones: dict[str, float] = {}
        self.joules = 0.0

    def sample(self, now: float, unknown: dict[str, str]) -> float | None:
        """Add what came since the previous sample. Gives its watts, None when there is none yet."""
        first, again = self._read()
        zones = [zone for zone in self._zones.values() if zone.name in first]
        alike = mirrored(zones, first, again) if self._mirrors_possible else {}
        elapsed = now - self._then if self._then is not None else 0.0
        deltas = {zone.name: self._delta(zone, first[zone.name], elapsed, unknown) for zone in zones}
        moved = {name: joules for name, joules in deltas.items() if joules is not None}
        for name, other in alike.items():  # alike at both ends of an interval is no coincidence
            if self._alike.get(name) == other:
                moved.pop(name, None)
                if not self.zones.get(name):
                    self.zones.pop(name, None)
                unknown[f"zones.{name}"] = f"the same counter as {other}, counted once"
        for name in first:
            if f"zones.{name}" not in unknown or name in self.zones:
                self.zones[name] = self.zones.get(name, 0.0) + moved.get(name, 0.0)
        gained = self._total(moved, first)
        self.joules += gained
        self._counters.update(first)
        self._alike = alike
        self._then = now if moved or self._then is None else self._then
        return gained / elapsed if elapsed > 0 and moved else None

    def _read(self) -> tuple[dict[str, int], dict[str, int]]:
        if self._mirrors_possible:
            return read_counters(self._host, self._zones.values())
        found = {n: parse_int(self._host.read(f"{POWERCAP}/{z.zone}/energy_uj")) for n, z in self._zones.items()}
        first = {name: value for name, value in found.items() if value is not None}
        return first, first

    def _delta(self, zone: RaplZone, counter: int, elapsed: float, unknown: dict[str, str]) -> float | None:
        """Joules since the zone's previous reading; None without one, or when the counter was reset."""
        before = self._counters.get(zone.name)
        if before is None:
            return None
        moved = counter - before
        if moved < 0:
            wrapped = moved + (zone.range_uj or 0)
            if wrapped < 0 or (elapsed > 0 and wrapped / 1e6 / elapsed > COUNTER_RESET_W):
                unknown[f"zones.{zone.name}"] = "its counter was reset: the joules of one interval are missing"
                return None
            moved = wrapped
        return moved / 1e6

    def _total(self, moved: Mapping[str, float], counters: Mapping[str, int]) -> float:
        """Add up without counting twice: psys holds the packages, a package its cores; DRAM is apart.

        On boards that do not wire psys up it stands at zero for ever.
        """
        kinds = {name: self._zones[name].kind for name in moved}
        if any(kind == "psys" and counters[name] > 0 for name, kind in kinds.items()):
            return sum(joules for name, joules in moved.items() if kinds[name] == "psys")
        return sum(joules for name, joules in moved.items() if kinds[name] in ("package", "dram"))

    def counts(self) -> bool:
        """Say whether a zone that makes up the total has ever been read."""
        return any(self._zones[name].kind in ("package", "psys") for name in self._counters)

    def trouble(self) -> str:
        """Say why there is no total."""
        closed = [z for z in self._zones.values() if z.kind in ("package", "psys") and z.name not in self._counters]
        return _why_unreadable(self._host, closed[0]) if closed else _why_no_rapl(self._host)


class _Smi:
    """The long-running nvidia-smi, integrated over its own time stamps."""

    def __init__(self, host: Host, interval_ms: int) -> None:
        self._host, self._interval_ms = host, interval_ms
        self._fields = list(SMI_READING)
        self._energy: dict[int, _Integral] = {}
        self._rows: dict[int, dict[str, str]] = {}
        self._words = "nvidia-smi has not answered yet"
        self._said: list[str] = []
        self._program = host.which("nvidia-smi")
        self.stream: Stream | None = None
        self._start()

    def _start(self) -> None:
        if self._program is None:
            self._words = "nvidia-smi is not installed"
            return
        argv = [*smi_argv(self._program, self._fields), "-lms", str(self._interval_ms)]
        self.stream = self._host.stream(argv)
        if self.stream is None:
            self._words = "nvidia-smi does not start"

    def poll(self) -> None:
        """Take in what nvidia-smi said since the last time."""
        if self.stream is None:
            return
        ended = self.stream.ended
        lines = self.stream.lines()
        self._said = [*self._said, *lines][-5:]  # its last words may come a while before its end
        for row in parse_csv("\n".join(lines), self._fields):
            index, when = parse_int(row["index"]), parse_time_stamp(row["timestamp"])
            if index is None or when is None:
                continue
            self._rows[index] = row
            watts = parse_float(row["power.draw"])
            if watts is not None:
                self._energy.setdefault(index, _Integral()).add(when, watts)
        if ended:
            self._ended()

    def _ended(self) -> None:
        self.close()
        self._rows.clear()
        unknown = parse_bad_field("\n".join(self._said))
        if unknown in self._fields:  # an older driver: ask again without it
            self._said.clear()
            self._fields.remove(unknown)
            self._start()
            return
        self._words = f"nvidia-smi ended: {(self._said or ['no words'])[-1][:160]}"

    def reading(self, gpu: Gpu, key: str, unknown: dict[str, str]) -> GpuReading:
        row = self._rows.get(-1 if gpu.index is None else gpu.index)
        energy = self._energy.get(-1 if gpu.index is None else gpu.index)
        title = _gpu_title(gpu)
        if row is None:
            unknown[key] = self._words
            return GpuReading(title, gpu.index, energy_joules=energy.joules if energy else None)
        if parse_float(row["power.draw"]) is None:
            unknown[f"{key}.power_watts"] = f"nvidia-smi says {row['power.draw'] or 'nothing'}"
        mib = parse_float(row.get("memory.used"))
        return GpuReading(
            title,
            gpu.index,
            power_watts=parse_float(row["power.draw"]),
            energy_joules=energy.joules if energy else None,
            usage=parse_float(row.get("utilization.gpu")),
            encoder_usage=parse_float(row.get("utilization.encoder")),
            memory_used_bytes=None if mib is None else int(mib * 2**20),
            temperature_c=parse_float(row.get("temperature.gpu")),
            source="nvidia-smi",
        )

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None


class Sampler:
    """Take readings, each over the time since the previous one. Close it: nvidia-smi runs until then."""

    def __init__(
        self, host: Host, hardware: Hardware | None = None, gpu: bool = True, smi_interval_ms: int = SMI_INTERVAL_MS
    ) -> None:
        self._host = host
        hw = hardware or _detect_sensors(host, Hardware(rapl=rapl_zones(host)))
        if hardware is None and gpu:
            hw = _detect_gpus(host, hw)
        self._gpus = hw.gpus if gpu else ()
        self._smi = _Smi(host, smi_interval_ms) if any(g.vendor == "NVIDIA" for g in self._gpus) else None
        self._rapl = _Rapl(host, hw.rapl)
        self._meters = [s.path for s in hw.sensors if s.unit == "watts" and s.chip in MACHINE_POWER]
        self._temperatures = [s.path for s in hw.sensors if s.unit == "celsius" and s.chip in CPU_TEMPERATURE]
        self._batteries = battery_names(host)
        self._measured = {"hwmon": _Integral(), "battery": _Integral()}
        self._gpu_energy = [_Integral() for _ in self._gpus]
        self._gpu_counters: dict[int, tuple[float, int]] = {}
        self._cpu: tuple[int, int] | None = None

    def sample(self, now: float) -> Reading:
        """Read everything once; `now` in seconds of a monotonic clock."""
        unknown: dict[str, str] = {}
        source, watts, joules = self._power(now, unknown)
        info = parse_meminfo(self._host.read("/proc/meminfo") or "")
        used = info["MemTotal"] - info["MemAvailable"] if {"MemTotal", "MemAvailable"} <= set(info) else None
        if used is None:
            unknown["memory_used_bytes"] = f"no MemAvailable ({self._host.why('/proc/meminfo')})"
        heat = [value / 1000 for value in self._numbers(self._temperatures)]
        if not heat:
            unknown["temperature_c"] = "no sensor of the processor's temperature"
        return Reading(
            time=now,
            cpu_usage=self._usage(unknown),
            memory_used_bytes=used,
            power_watts=watts,
            energy_joules=joules,
            zones={name: round(joules, 6) for name, joules in self._rapl.zones.items()},
            power_source=source,
            gpus=self._read_gpus(now, unknown),
            temperature_c=max(heat, default=None),
            unknown=unknown,
        )

    def close(self) -> None:
        """End nvidia-smi, if it was started."""
        if self._smi is not None:
            self._smi.close()

    def _numbers(self, paths: Iterable[str]) -> list[int]:
        return [value for value in (parse_int(self._host.read(path)) for path in paths) if value is not None]

    def _usage(self, unknown: dict[str, str]) -> float | None:
        times = parse_cpu_times(self._host.read("/proc/stat") or "")
        before, self._cpu = self._cpu, times or self._cpu
        if times is None:
            unknown["cpu_usage"] = f"no CPU times ({self._host.why('/proc/stat')})"
        elif before is None:
            unknown["cpu_usage"] = "the first sample: a rate needs two"
        elif times[1] <= before[1]:
            unknown["cpu_usage"] = "no tick went by since the previous sample"
        else:
            return round(min(100.0, max(0.0, 100 * (times[0] - before[0]) / (times[1] - before[1]))), 3)
        return None

    def _power(self, now: float, unknown: dict[str, str]) -> tuple[str | None, float | None, float | None]:
        """Give (source, watts, joules) of the machine, from the best source that answers."""
        watts = self._rapl.sample(now, unknown)
        if self._rapl.counts():
            if watts is None:
                unknown["power_watts"] = "the first sample: a rate needs two"
            return "rapl", watts, round(self._rapl.joules, 6)
        for source, measure in (("hwmon", self._metered), ("battery", self._discharge)):
            drawn = measure()
            if drawn is not None:
                return source, drawn, round(self._measured[source].add(now, drawn), 6)
        reason = self._rapl.trouble()
        if self._batteries:
            reason += "; the battery tells only while it discharges"
        unknown["power_watts"] = unknown["energy_joules"] = reason
        return None, None, None

    def _metered(self) -> float | None:
        found = self._numbers(self._meters)
        return sum(found) / 1e6 if found else None

    def _discharge(self) -> float | None:
        """Watts that the batteries give; Documentation/ABI/testing/sysfs-class-power: µW, or µA and µV."""
        drawn = []
        for name in self._batteries:
            base = f"/sys/class/power_supply/{name}"
            if parse_word(self._host.read(f"{base}/status")) != "Discharging":
                continue
            power = parse_int(self._host.read(f"{base}/power_now"))
            pair = self._numbers([f"{base}/current_now", f"{base}/voltage_now"])
            if power is not None or len(pair) == 2:
                drawn.append(abs(power) / 1e6 if power is not None else abs(pair[0]) * pair[1] / 1e12)
        return sum(drawn) if drawn else None

    def _read_gpus(self, now: float, unknown: dict[str, str]) -> tuple[GpuReading, ...]:
        if self._smi is not None:
            self._smi.poll()
        found = []
        for at, gpu in enumerate(self._gpus):
            if gpu.vendor == "NVIDIA" and self._smi is not None:
                found.append(self._smi.reading(gpu, f"gpus.{at}", unknown))
            else:
                found.append(self._hwmon_gpu(at, gpu, now, unknown))
        return tuple(found)

    def _hwmon_gpu(self, at: int, gpu: Gpu, now: float, unknown: dict[str, str]) -> GpuReading:
        """Read an AMD or Intel GPU: Documentation/gpu/amdgpu/thermal.rst, sysfs-driver-intel-i915-hwmon."""
        chips = [f"{gpu.path}/hwmon/{chip}" for chip in self._host.list(f"{gpu.path}/hwmon")]

        def first(*names: str) -> int | None:
            return next(iter(self._numbers(f"{chip}/{name}" for chip in chips for name in names)), None)

        micro, counter, heat = first("power1_average", "power1_input"), first("energy1_input"), first("temp1_input")
        watts = None if micro is None else micro / 1e6
        energy = self._gpu_energy[at]
        if counter is not None:  # a counter knows better than an integral
            then, before = self._gpu_counters.get(at, (now, counter))
            energy.joules += max(0, counter - before) / 1e6
            watts = (counter - before) / 1e6 / (now - then) if now > then else watts
            self._gpu_counters[at] = (now, counter)
        elif watts is not None:
            energy.add(now, watts)
        else:
            inside = " of its own: it is inside the processor's package" if gpu.integrated else ""
            unknown[f"gpus.{at}.power_watts"] = f"no power sensor{inside}"
        measured = counter is not None or watts is not None
        return GpuReading(
            _gpu_title(gpu),
            power_watts=watts,
            energy_joules=round(energy.joules, 6) if measured else None,
            usage=next(iter(map(float, self._numbers([f"{gpu.path}/gpu_busy_percent"]))), None),
            memory_used_bytes=next(iter(self._numbers([f"{gpu.path}/mem_info_vram_used"])), None),
            temperature_c=None if heat is None else heat / 1000,
            source="hwmon" if measured else None,
            in_package=bool(gpu.integrated),
        )


def process_group(host: Host, pgid: int) -> ProcessUsage:
    """Add up a process group: CPU of its processes and of the children they waited for, memory now."""
    ticks, rss, pids = 0, 0, []
    for pid in host.group(pgid):
        found = parse_process(host.read(f"/proc/{pid}/stat") or "")
        if found.get("pgrp") != pgid:
            continue  # it ended, or left, since the list was made
        pids.append(pid)
        ticks += found["ticks"]
        held = re.search(r"^VmRSS:\s+([0-9]{1,15}) kB$", host.read(f"/proc/{pid}/status") or "", re.MULTILINE)
        rss += int(held.group(1)) * 1024 if held else 0
    return ProcessUsage(ticks / USER_HZ, rss, tuple(pids))


def process_started(host: Host, pid: int) -> int | None:
    """Give a process's start in clock ticks since boot; with its pid it is a name that is never reused."""
    return parse_process(host.read(f"/proc/{pid}/stat") or "").get("start")


# ---- 6 CLI ----------------------------------------------------------------------------------------------

EXAMPLES = """examples:
  python3 hwdetect.py                        what this machine is and which encoders work on it
  python3 hwdetect.py --json --no-probe      the same for programs, without trying encoders
  python3 hwdetect.py --watch 1s             power and load, once a second, until Ctrl-C
  sudo python3 hwdetect.py --record my.txt   a text archive of this machine for a bug report

Every flag has an environment variable (--state-dir: FFDIST_STATE_DIR); a flag beats it."""

# flag, what it takes (None: a switch), help
FLAGS: tuple[tuple[str, str | None, str], ...] = (
    ("--json", None, "print JSON; with --watch one object a line"),
    ("--root", "DIR", "read a tree instead of this machine"),
    ("--no-probe", None, "do not try the encoders"),
    ("--record", "FILE", "write the files that detection reads into one text archive (- for stdout)"),
    ("--watch", "INTERVAL", "print a reading every INTERVAL, such as 1s or 500ms"),
    ("--ffmpeg", "PROGRAM", "the ffmpeg to use (default: the one on PATH)"),
    ("--state-dir", "DIR", "where the encoders found are kept (default: ~/.local/state/ffdist)"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Gives the exit code: 0, 1 not possible, 2 wrong usage, 130 interrupted."""
    try:
        options = _options(argv)
        code = _command(options)
        sys.stdout.flush()
        return code
    except SystemExit as error:  # argparse has said what is wrong
        return error.code if isinstance(error.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hwdetect.py",
        description="Say what this machine is, which encoders work on it and what it draws.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flag, takes, help_text in FLAGS:
        value = os.environ.get("FFDIST_" + flag.strip("-").replace("-", "_").upper(), "")
        if takes is None:
            on = value.lower() not in ("", "0", "no", "false", "off")
            parser.add_argument(flag, action="store_true", default=on, help=help_text)
        else:
            parser.add_argument(flag, metavar=takes, default=value or None, help=help_text)
    options = parser.parse_args(argv)
    try:
        options.interval = None if options.watch is None else parse_duration(options.watch)
        if options.interval is not None and not 0.01 <= options.interval <= 86_400:
            raise ValueError("an interval is between 10ms and 24h")
    except ValueError as error:
        parser.error(f"--watch: {error}")
    if options.root is not None and not os.path.isdir(options.root):
        parser.error(f"--root: {options.root} is not a folder")
    return options


def _command(options: argparse.Namespace) -> int:
    host = Host(options.root or "/")
    if options.record is not None:
        return _record(host, options.record)
    if options.interval is not None:
        return _watch(host, options.interval, options.json)
    state_dir = options.state_dir or os.path.expanduser("~/.local/state/ffdist")
    hw = detect(host, not options.no_probe, state_dir, options.ffmpeg)
    print(json.dumps(hw.to_json(), indent=2) if options.json else page(hw))
    return 0


def _watch(host: Host, interval_s: float, as_json: bool) -> int:
    """Print readings until interrupted, at a fixed pace."""
    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)  # so that nvidia-smi is ended too
    sampler = Sampler(host)
    try:
        start = time.monotonic()
        for turn in range(1, sys.maxsize):
            reading = sampler.sample(time.monotonic())
            print(_watch_json(reading) if as_json else _watch_line(reading, turn == 1), flush=True)
            time.sleep(max(0.0, start + turn * interval_s - time.monotonic()))
    finally:
        sampler.close()
    return 0


def _watch_json(reading: Reading) -> str:
    moment = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    answer = {**dataclasses.asdict(reading), "time": moment.replace("+00:00", "Z")}
    first = ("time", "cpu_usage", "power_watts", "energy_joules", "zones", "unknown")
    return json.dumps({name: answer[name] for name in (*first, *sorted(set(answer) - set(first)))})


def _watch_line(reading: Reading, first: bool) -> str:
    def cell(value: float | None, unit: str) -> str:
        return f"{'-' if value is None else format(value, '.1f'):>9} {unit}"

    cells = [cell(reading.cpu_usage, "% CPU"), cell(reading.power_watts, "W"), cell(reading.energy_joules, "J")]
    cells += [cell(gpu.power_watts, f"W {gpu.name}") for gpu in reading.gpus]
    why = reading.unknown.get("energy_joules") if first else None
    return "".join(cells) + (f"   power unknown: {why}" if why else "")


def page(hw: Hardware) -> str:
    """Write what was found for people: one aligned line for each fact, unknown ones with their reason."""
    lines = []
    for title, name, text in _facts(hw):
        why = hw.unknown.get(name)
        lines.append(f"{title:<12} {text if text else 'unknown: ' + why if why else 'none'}")
    for title, rows in (("Encoders", _encoder_rows(hw)), ("Problems", hw.problems)):
        lines += ["", title] + [f"  {row}" for row in rows] if rows else []
    return "\n".join(lines)


def _facts(hw: Hardware) -> Iterable[tuple[str, str, str | None]]:
    """Give (title, field whose reason counts, text) for each line of the page."""
    def of(word: str, number: int | None) -> str:
        return f"{'?' if number is None else number} {word}{'' if number == 1 else 's'}"

    counts = f"{of('socket', hw.cpu_sockets)}, {of('core', hw.cpu_cores)}, {of('thread', hw.cpu_logical)}"
    limited = hw.cpu_threads is not None and hw.cpu_threads != hw.cpu_logical
    kind = " in ".join(word for word in (hw.container, hw.virtual) if word)
    yield "Machine", "address", f"{hw.address or '?'} ({hw.node_type}{', ' + kind if kind else ''})"
    yield "Board", "machine", hw.machine
    yield "System", "os", ", ".join(word for word in (hw.os_name, hw.kernel, hw.arch) if word) or None
    yield "Processor", "cpu_model", hw.cpu_model
    yield "", "cpu_threads", counts + (f"; {hw.cpu_threads} usable here" if limited else "")
    yield "Frequency", "cpu_mhz_max", f"up to {hw.cpu_mhz_max:.0f} MHz" if hw.cpu_mhz_max else None
    yield "Flags", "cpu_model", " ".join(hw.cpu_flags)
    yield "Memory", "ram_bytes", _size(hw.ram_bytes) if hw.ram_bytes else None
    yield "GPU", "gpus", "; ".join(_gpu_words(gpu) for gpu in hw.gpus)
    yield "Battery", "has_battery", "; ".join(f"{b.name} {b.charge_percent} % {b.status}" for b in hw.batteries)
    for zone in hw.rapl:
        state = f"mirrors {zone.mirror_of}" if zone.mirror_of else "readable" if zone.readable else None
        yield "Energy", f"rapl.{zone.name}", f"{zone.name}: {state}" if state else None
    if not hw.rapl:
        yield "Energy", "rapl", None
    for sensor in hw.sensors:
        yield "Sensor", "sensors", f"{sensor.chip} {sensor.label}: {sensor.value:.1f} {sensor.unit}"
    for disk in hw.disks:
        room = "free space unknown" if disk.free_bytes is None else f"{_size(disk.free_bytes)} free"
        size = "?" if disk.size_bytes is None else _size(disk.size_bytes)
        yield "Disk", "disks", f"{disk.mount} ({disk.filesystem} on {disk.device}): {room} of {size}"
    yield "FFmpeg", "ffmpeg", f"{hw.ffmpeg} {hw.ffmpeg_version or ''}" if hw.ffmpeg else None
    yield "ffprobe", "ffprobe", hw.ffprobe
    yield "Quality", "filters", " ".join(hw.filters)
    if not hw.encoders:
        yield "Encoders", "encoders", None


def _encoder_rows(hw: Hardware) -> list[str]:
    return [f"{name:<14} {'works' if reason is None else 'no: ' + reason}" for name, reason in hw.encoders.items()]


def _gpu_words(gpu: Gpu) -> str:
    words = [_gpu_title(gpu), _size(gpu.memory_bytes) if gpu.memory_bytes else "", gpu.driver or "no driver",
             gpu.driver_version or ""]  # fmt: skip
    return ", ".join(word for word in words if word)


def _size(number: int) -> str:
    """Write bytes in the largest fitting binary unit."""
    value, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.1f} {units[0]}"


class _Recorder(Host):
    """A host that remembers what was asked of it, under the real paths, with the links on the way."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.root)
        self.entries: dict[str, tuple[str, str]] = {}

    def _enter(self, path: str, kind: str, text: str) -> None:
        final, links = self.resolve(path)
        self.entries.update({link: ("link", target) for link, target in links})
        if self.entries.get(final, ("there", ""))[0] in ("there", "dir"):
            self.entries[final] = (kind, text)

    def read(self, path: str) -> str | None:
        text, why = super()._attempt(path)
        if path.startswith(("/proc/", "/sys/", "/etc/", "/run/", "/usr/lib/os-release")):
            if text is not None:
                self._enter(path, "file", scrub(path, text))
            elif not why.startswith(("missing", "not a directory")):
                self._enter(path, "refused", "")
        return text

    def list(self, path: str) -> list[str]:
        names = super().list(path)
        if names and path.startswith("/sys/"):
            self._enter(path, "dir", "")
            for name in names:  # a listed name must be there again, even when nobody opens it
                self.exists(f"{path}/{name}")
        return names

    def exists(self, path: str) -> bool:
        found = super().exists(path)
        parent, name = os.path.split(path)
        if found and path.startswith(("/sys/", "/.dockerenv", "/run/")):
            self.entries.setdefault(f"{self.resolve(parent)[0].rstrip('/')}/{name}", ("there", ""))
        return found

    def link(self, path: str) -> str | None:
        target = super().link(path)
        parent, name = os.path.split(path)
        if target is not None:
            self.entries[f"{self.resolve(parent)[0]}/{name}"] = ("link", f"../{target}")
        return target


def scrub(path: str, text: str) -> str:
    """Take out what names this one machine or its owner: serial numbers, UUIDs, mounts of others."""
    if path.endswith("/hostname"):
        return "recorded\n"
    if path.endswith(("/mounts", "/mountinfo")):
        keep = re.compile(r" (cgroup2?|%s) " % "|".join(LOCAL_FILESYSTEMS))
        return "".join(line + "\n" for line in text.splitlines() if keep.search(line))
    text = re.sub(r"(?im)^(serial|machine id|uuid)([\t ]*:).*$", r"\1\2 0", text)
    return re.sub(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "GPU-0", text)


def archive(entries: Mapping[str, tuple[str, str]]) -> str:
    """Write {path: (kind, text)} as one text: a line "=== KIND PATH" before each, ends escaped.

    Kinds: file; part (a file without a newline at its end); link (the text is its target); dir;
    refused (a file that could not be read); there (one that nobody read).
    """
    lines = []
    for path, (kind, text) in sorted(entries.items(), key=lambda item: natural(item[0])):
        kind = "part" if kind == "file" and not text.endswith("\n") else kind
        lines.append(f"=== {kind} {path}")
        body = text[:-1] if kind == "file" else text
        if body or kind == "file":
            lines += [_escape(line) for line in body.split("\n")]
    return "\n".join(lines) + "\n"


def _escape(line: str) -> str:
    line = "".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" if ord(c) < 256 else "?"
                   for c in line.replace("\\", "\\x5c"))  # fmt: skip
    return "\\x3d" + line[1:] if line.startswith("===") else line


def _record(host: Host, file: str) -> int:
    """Detect and sample once, and write down every file that this took."""
    recorder = _Recorder(host)
    hw = detect(recorder, probe=False)
    sampler = Sampler(recorder, hw, gpu=False)
    sampler.sample(0.0)
    program, fields = recorder.which("nvidia-smi"), dict.fromkeys((*SMI_IDENTITY, *SMI_READING))
    if program is not None:
        told = recorder.run(smi_argv(program, list(fields)), PROGRAM_S)
        text = f"{','.join(fields)}\n{scrub('', told.stdout)}{told.stderr}"
        recorder.entries["/recorded/nvidia-smi"] = ("file", text)
    text = archive(recorder.entries)
    if file == "-":
        print(text, end="")
        return 0
    trouble = host.write(file, text)
    if trouble:
        print(f"hwdetect.py: the archive can't be written: {trouble}", file=sys.stderr)
        return 1
    print(f"{file}: {len(recorder.entries)} files, no serial numbers; have a look before you send it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
