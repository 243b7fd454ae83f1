"""Hardware detection on eight machines, on damaged ones, and on this one; known joules from fed trees."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Sequence
from pathlib import Path
from typing import Callable
from unittest import mock

import hwdetect
from hwdetect import Host, Reading, Result, Sampler, detect
from tests import archive
from tests.fleet import interruptible

HERE = Path(__file__).resolve().parent
MACHINES = sorted((HERE / "hosts").glob("*.txt"))
SEED = int(os.environ.get("FFDIST_TEST_SEED", "20251229"))
DEADLINE_S = 10.0
RANGE_UJ = 262143328850


def until(ready: Callable[[], bool], what: str) -> None:
    """Wait for a state, never longer than the deadline."""
    end = time.monotonic() + DEADLINE_S
    while not ready():
        if time.monotonic() > end:
            raise AssertionError(f"not within {DEADLINE_S} s: {what}")
        time.sleep(0.005)


class TreeCase(unittest.TestCase):
    """A test with a tree of its own."""

    def setUp(self) -> None:
        folder = tempfile.mkdtemp(prefix="ffdist-hw-")
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        self.tree = Path(folder)

    def machine(self, name: str) -> list[str]:
        """Unpack a recorded machine; nvidia-smi is the stand-in where the recording holds its words."""
        paths = archive.unpack((HERE / "hosts" / f"{name}.txt").read_text(encoding="utf-8"), self.tree)
        if (self.tree / "recorded/nvidia-smi").exists():
            self.smi()
        return paths

    def smi(self) -> None:
        (self.tree / "usr/bin").mkdir(parents=True, exist_ok=True)
        (self.tree / "usr/bin/nvidia-smi").symlink_to(HERE / "bin/nvidia-smi")

    def put(self, path: str, text: object) -> None:
        """Replace a file at once, so that a reader never sees half of it."""
        place = self.tree / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.tree / "scratch"
        scratch.write_text(f"{text}\n", encoding="utf-8")
        os.replace(scratch, place)

    def zone(self, zone: str, name: str, counter: int, span: int = RANGE_UJ) -> None:
        base = f"/sys/class/powercap/{zone}"
        self.put(f"{base}/name", name)
        self.put(f"{base}/max_energy_range_uj", span)
        self.put(f"{base}/energy_uj", counter)

    def feed(self, **counters: int) -> None:
        """Set counters: rapl_0_1=5 is intel-rapl:0:1, mmio_0=5 is intel-rapl-mmio:0."""
        for key, counter in counters.items():
            kind, *numbers = key.split("_")
            zone = ":".join([{"rapl": "intel-rapl", "mmio": "intel-rapl-mmio"}[kind], *numbers])
            self.put(f"/sys/class/powercap/{zone}/energy_uj", counter)

    def sampler(self) -> Sampler:
        sampler = Sampler(Host(str(self.tree)), smi_interval_ms=10)
        self.addCleanup(sampler.close)
        return sampler


class Machines(TreeCase):
    """Each recorded machine gives its golden answer."""

    maxDiff = None

    def test_goldens(self) -> None:
        self.assertGreaterEqual(len(MACHINES), 8)
        for text in MACHINES:
            with self.subTest(machine=text.stem):
                self.setUp()
                self.machine(text.stem)
                found = json.dumps(detect(Host(str(self.tree))).to_json(), indent=1) + "\n"
                golden = text.with_suffix(".json")
                if os.environ.get("FFDIST_REWRITE_GOLDENS"):
                    golden.write_text(found, encoding="utf-8")
                self.assertEqual(json.loads(golden.read_text(encoding="utf-8")), json.loads(found))

    def test_what_people_would_say_of_them(self) -> None:
        """The goldens may be rewritten by a machine; these facts may not."""
        giga = 2**30
        facts = {
            "xeon-t4": ("server", 56, 56, 28, 2, "NVIDIA Tesla T4", None, 4),
            "epyc-mirrored": ("server", 32, 32, 16, 1, None, None, 8),
            "laptop-intel": ("laptop", 8, 8, 4, 1, "Intel Iris Xe Graphics", None, 4),
            "desktop-amdgpu": ("desktop", 16, 16, 8, 1, "AMD Radeon RX 6800/6800 XT / 6900 XT", None, 2),
            "arm-server": ("server", 20, 20, 20, 1, None, None, 0),
            "vm-bare": ("desktop", 4, 4, 4, 4, None, "kvm", 0),
            "container-quota": ("desktop", 2, 64, 32, 1, None, None, 1),
            "raspberry-pi-4": ("desktop", 3, 4, 4, 1, "Broadcom VideoCore", None, 0),
        }
        for name, expected in facts.items():
            with self.subTest(machine=name):
                self.setUp()
                self.machine(name)
                hw = detect(Host(str(self.tree)))
                self.assertEqual(
                    expected,
                    (
                        hw.node_type,
                        hw.cpu_threads,
                        hw.cpu_logical,
                        hw.cpu_cores,
                        hw.cpu_sockets,
                        hw.gpu_type,
                        hw.virtual,
                        len(hw.rapl),
                    ),
                )
                self.assertEqual([], hw.problems)
                if name == "container-quota":
                    self.assertEqual((4 * giga, "docker"), (hw.ram_bytes, hw.container))
                if name == "arm-server":
                    self.assertEqual("Arm Neoverse-N1", hw.cpu_model)
                if name == "epyc-mirrored":
                    mirrors = {zone.name for zone in hw.rapl if zone.mirror_of == "package-0-die-0"}
                    self.assertEqual({f"package-0-die-{die}" for die in (1, 2, 3)}, mirrors)
                if name == "laptop-intel":
                    self.assertEqual(["BAT0"], [battery.name for battery in hw.batteries])
                    self.assertIn("60-ffdist-rapl.rules", hw.unknown["rapl.package-0"])

    def test_registration_is_the_seed_s(self) -> None:
        self.machine("xeon-t4")
        hw = detect(Host(str(self.tree)))
        self.assertEqual(
            {
                "address": "enc-xeon-01",
                "type": "server",
                "cpu_threads": 56,
                "cpu_model": "Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz",
                "has_gpu": True,
                "gpu_type": "NVIDIA Tesla T4",
                "ram_bytes": 131912300 * 1024,
                "labels": {"node_type": "server", "os": "linux", "arch": "amd64"},
            },
            hw.registration(),
        )
        self.assertEqual(list(hw.registration()), list(hw.to_json())[:8])

    def test_any_file_deleted_truncated_or_garbled_gives_an_answer(self) -> None:
        """Whatever happens to one file, every field is there, unknown ones with a reason."""
        dice = random.Random(SEED)
        for text in MACHINES:
            self.setUp()
            paths = self.machine(text.stem)
            table = self.tree / "recorded/nvidia-smi"
            rows = table.read_text(encoding="utf-8").splitlines() if table.exists() else [",", ","]
            words = ",".join(rows[1].split(",")[: len(hwdetect.SMI_IDENTITY)])

            def run(argv: Sequence[str], timeout_s: float, words: str = words) -> Result:
                return Result(0, words[: dice.choice((len(words), 20))], "")

            kinds: dict[str, list[str]] = {}
            for path in paths:
                kinds.setdefault("".join(char for char in path if not char.isdigit()), []).append(path)
            # Of twenty CPUs' files of one kind, two tell as much.
            for path in (path for alike in kinds.values() for path in alike[:2]):
                place = self.tree / path.lstrip("/")
                whole = place.read_bytes()
                noise = bytes(dice.randrange(256) for _ in range(40))
                flipped = bytes(b ^ 21 if dice.random() < 0.02 else b for b in whole)
                for damage in (None, whole[: len(whole) // 2], dice.choice((noise, flipped))):
                    place.unlink()
                    if damage is not None:
                        place.write_bytes(damage)
                    with self.subTest(machine=text.stem, path=path, seed=SEED, damage=damage and damage[:40]):
                        self.check_answer(Host(str(self.tree), run))
                    place.write_bytes(whole)

    def check_answer(self, host: Host) -> None:
        hw = detect(host)
        answer = json.loads(json.dumps(hw.to_json(), allow_nan=False))
        self.assertIn(hw.node_type, ("laptop", "desktop", "server"))
        self.assertEqual([], [problem for problem in hw.problems if not problem.startswith("nvidia-smi: 0,")])
        for name, value in answer.items():
            if value is None and name not in hwdetect.NONE_IS_AN_ANSWER:
                self.assertTrue(hw.unknown.get(name), name)
        reading = Sampler(host, hw, gpu=False).sample(0.0)
        self.assertTrue(reading.energy_joules is not None or reading.unknown["energy_joules"])

    def test_a_failing_detector_costs_only_its_own_fields(self) -> None:
        class Broken(Host):
            def list(self, path: str) -> list[str]:
                if path == "/sys/class/hwmon":
                    raise RuntimeError("a strange driver")
                return super().list(path)

        self.machine("xeon-t4")
        hw = detect(Broken(str(self.tree)))
        self.assertEqual(["sensors: RuntimeError: a strange driver"], hw.problems)
        self.assertEqual((56, "server", 4), (hw.cpu_threads, hw.node_type, len(hw.rapl)))

    def test_each_field_has_one_detector(self) -> None:
        fields = [name for detector in hwdetect.DETECTORS for name in detector.fields]
        known = [row.name for row in dataclasses.fields(hwdetect.Hardware)]
        self.assertEqual(sorted({*known} - {"unknown", "problems"}), sorted(fields))
        self.machine("laptop-intel")
        survey = hwdetect.Survey(Host(str(self.tree)), hwdetect.Hardware(), False, None, None)
        for detector in hwdetect.DETECTORS:
            found = {name.partition(".")[0] for name in detector.detect(survey)} - {"problems"}
            self.assertLessEqual(found, {*detector.fields}, detector.name)

    def test_the_fields_of_a_detector_that_fails_say_so(self) -> None:
        class Broken(Host):
            def exists(self, path: str) -> bool:
                raise RuntimeError("a strange driver")

        hw = detect(Broken(str(self.tree)))
        self.assertIn("batteries: RuntimeError: a strange driver", hw.problems)
        self.assertEqual((None, ()), (hw.has_battery, hw.batteries))
        self.assertEqual(hwdetect.DETECTOR_FAILED, hw.unknown["has_battery"])

    def test_an_empty_tree_tells_nothing_of_this_machine(self) -> None:
        hw = detect(Host(str(self.tree)))
        for name in (
            "address",
            "cpu_model",
            "cpu_threads",
            "ram_bytes",
            "kernel",
            "arch",
            "ffmpeg",
            "has_battery",
        ):
            self.assertIsNone(getattr(hw, name), name)
            self.assertTrue(hw.unknown[name])
        self.assertEqual(((), False, "desktop"), (hw.disks, hw.has_gpu, hw.node_type))

    def test_links_do_not_lead_out_of_the_tree(self) -> None:
        (self.tree / "proc").mkdir()
        (self.tree / "proc/cpuinfo").symlink_to("/proc/cpuinfo")
        (self.tree / "proc/meminfo").symlink_to("../../../../../../../../proc/meminfo")
        (self.tree / "sys").symlink_to("/sys")
        hw = detect(Host(str(self.tree)))
        self.assertEqual((None, None, None), (hw.cpu_model, hw.cpu_logical, hw.ram_bytes))

    def test_node_type_is_more_than_the_limits_and_a_battery_must_power_the_machine(self) -> None:
        def kind(threads: int, gib: float, supply: str = "") -> str:
            self.setUp()
            self.put("/sys/devices/system/cpu/online", f"0-{threads - 1}")
            self.put("/proc/meminfo", f"MemTotal: {int(gib * 2**20)} kB")
            self.put("/sys/class/power_supply/AC/type", "Mains")
            for word in filter(None, supply.split(",")):
                self.put(f"/sys/class/power_supply/B/{word.split('=')[0]}", word.split("=")[1])
            return detect(Host(str(self.tree))).node_type

        self.assertEqual("server", kind(17, 32.1))
        self.assertEqual("desktop", kind(16, 64))
        self.assertEqual("desktop", kind(64, 32))
        self.assertEqual("laptop", kind(64, 64, "type=Battery"))
        self.assertEqual("laptop", kind(64, 64, "type=Battery,scope=System,present=1"))
        self.assertEqual("server", kind(64, 64, "type=Battery,scope=Device"))
        self.assertEqual("server", kind(64, 64, "type=Battery,present=0"))
        self.assertEqual("server", kind(64, 64, "type=UPS"))

    def test_affinity_and_quotas_of_every_level_count(self) -> None:
        self.put("/sys/devices/system/cpu/online", "0-63")
        self.put("/proc/self/status", "Name:\tx\nCpus_allowed_list:\t0-7,32-39")
        self.put("/proc/self/cgroup", "0::/a/b")
        self.put("/proc/self/mountinfo", "30 22 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
        self.assertEqual(16, detect(Host(str(self.tree))).cpu_threads)
        self.put("/sys/fs/cgroup/a/cpu.max", "250000 100000")
        self.put("/sys/fs/cgroup/a/b/cpu.max", "max 100000")
        self.assertEqual(3, detect(Host(str(self.tree))).cpu_threads)
        self.put("/sys/fs/cgroup/a/b/cpu.max", "5000 100000")
        self.assertEqual(1, detect(Host(str(self.tree))).cpu_threads)

    def test_two_nvidia_cards_and_an_intel_one(self) -> None:
        self.smi()
        self.put(
            "/recorded/nvidia-smi",
            ",".join(hwdetect.SMI_IDENTITY)
            + "\n"
            + "0, NVIDIA L4, GPU-0, 00000000:01:00.0, 550.1, 23034, 72.00\n"
            + "1, Tesla T4, GPU-1, 00000000:41:00.0, 550.1, [N/A], [Not Supported]",
        )
        for address, vendor in (
            ("0000:00:02.0", "0x8086"),
            ("0000:01:00.0", "0x10de"),
            ("0000:41:00.0", "0x10de"),
        ):
            self.put(f"/sys/bus/pci/devices/{address}/class", "0x030000")
            self.put(f"/sys/bus/pci/devices/{address}/vendor", vendor)
            self.put(f"/sys/bus/pci/devices/{address}/device", "0x1234")
        hw = detect(Host(str(self.tree)))
        self.assertEqual("NVIDIA L4 + NVIDIA Tesla T4 + Intel GPU 8086:1234", hw.gpu_type)
        self.assertEqual(
            [(0, 23034 * 2**20), (1, None), (None, None)], [(g.index, g.memory_bytes) for g in hw.gpus]
        )


class Energy(TreeCase):
    """Trees that the test feeds give the known joules."""

    def readings(self, *feeds: dict[str, int], step_s: float = 1.0) -> list[Reading]:
        sampler = self.sampler()
        found = [sampler.sample(0.0)]
        for at, counters in enumerate(feeds, 1):
            self.feed(**counters)
            found.append(sampler.sample(at * step_s))
        return found

    def test_two_sockets_with_dram(self) -> None:
        for socket in (0, 1):
            self.zone(f"intel-rapl:{socket}", f"package-{socket}", 1_000_000)
            self.zone(f"intel-rapl:{socket}:0", "core", 0)
            self.zone(f"intel-rapl:{socket}:1", "dram", 500)
        first, second = self.readings(
            dict(
                rapl_0=31_000_000,
                rapl_1=21_000_000,
                rapl_0_0=20_000_000,
                rapl_0_1=5_000_500,
                rapl_1_1=3_000_500,
            ),
            step_s=2.0,
        )
        self.assertEqual((0.0, None, "rapl"), (first.energy_joules, first.power_watts, first.power_source))
        self.assertIn("first sample", first.unknown["power_watts"])
        self.assertEqual((58.0, 29.0), (second.energy_joules, second.power_watts))
        self.assertEqual(
            {
                "package-0": 30.0,
                "package-1": 20.0,
                "core-0": 20.0,
                "core-1": 0.0,
                "dram-0": 5.0,
                "dram-1": 3.0,
            },
            second.zones,
        )

    def test_wrap_around(self) -> None:
        self.zone("intel-rapl:0", "package-0", RANGE_UJ - 3_000_000)
        *_, last = self.readings(dict(rapl_0=2_000_000), dict(rapl_0=4_000_000))
        self.assertEqual((7.0, 2.0), (last.energy_joules, last.power_watts))

    def test_a_counter_that_was_reset_is_not_a_wrap(self) -> None:
        self.zone("intel-rapl:0", "package-0", 9_000_000)
        _, reset, last = self.readings(dict(rapl_0=0), dict(rapl_0=4_000_000))
        self.assertIn("reset", reset.unknown["zones.package-0"])
        self.assertEqual(4.0, last.energy_joules)

    def test_a_counter_that_a_suspended_machine_begins_anew_is_no_wrap(self) -> None:
        """The counter stood near its end: as a wrap it would be 3,900 J in a second."""
        self.zone("intel-rapl:0", "package-0", RANGE_UJ - 3_940_000_000)
        used = [dict(rapl_0=RANGE_UJ - 3_940_000_000 + 20_000_000 * at) for at in (1, 2)]
        *_, reset, last = self.readings(*used, dict(rapl_0=1_000_000), dict(rapl_0=31_000_000))
        self.assertIn("reset", reset.unknown["zones.package-0"])
        self.assertEqual((70.0, 3.0, 30.0), (last.energy_joules, last.covered_s, last.power_watts))

    def test_a_counter_that_may_have_wrapped_twice_tells_nothing_of_that_time(self) -> None:
        """100 J at most, 60 J in each second: after a stop of 5 s it went round at least twice."""
        self.zone("intel-rapl:0", "package-0", 0, 100_000_000)
        sampler = self.sampler()
        sampler.sample(0.0)
        for now, counter in ((1.0, 60), (6.0, 60), (7.0, 20), (8.0, 80)):
            self.feed(rapl_0=counter * 1_000_000)
            last = sampler.sample(now)
            self.assertEqual(now == 6.0, "more than once" in last.unknown.get("zones.package-0", ""), now)
        self.assertEqual((180.0, 3.0), (last.energy_joules, last.covered_s))

    def test_a_small_counter_is_read_between_two_samples(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0, 400_000_000)
        self.assertEqual(hwdetect.POLL_MAX_S, hwdetect.Sampler(Host("/nowhere")).patience_s)
        sampler = self.sampler()
        self.assertEqual(0.4, sampler.patience_s)
        sampler.sample(0.0)
        for now, counter in ((0.3, 250), (0.6, 100), (0.9, 350)):  # round and round
            self.feed(rapl_0=counter * 1_000_000)
            sampler.between(now)
        self.feed(rapl_0=50_000_000)
        last = sampler.sample(1.0)
        self.assertEqual((850.0, 1.0, 850.0), (last.energy_joules, last.covered_s, last.power_watts))
        for now, counter in ((1.2, 0), (1.4, 90)):  # it was reset in between
            self.feed(rapl_0=counter * 1_000_000)
            with mock.patch("hwdetect.COUNTER_RESET_W", 1000):
                sampler.between(now)
        last = sampler.sample(2.0)
        self.assertEqual((None, 1.0), (last.power_watts, last.covered_s))

    def test_counters_that_never_move_count_nothing(self) -> None:
        self.zone("intel-rapl:0", "package-0", 5)
        *_, last = still = self.readings(*[dict(rapl_0=5)] * 4, step_s=4.0)
        self.assertEqual([0.0, 0.0, 0.0, None, None], [reading.energy_joules for reading in still])
        self.assertIn("stand still", last.unknown["energy_joules"])
        *_, late = self.readings(*[dict(rapl_0=5)] * 4, dict(rapl_0=8_000_005), step_s=4.0)
        self.assertEqual((8.0, 2.0, "rapl"), (late.energy_joules, late.power_watts, late.power_source))

    def test_zones_that_come_later_count_from_then_on(self) -> None:
        """A driver is loaded while it runs; a zone that goes away is still missed."""
        sampler = self.sampler()
        self.assertIn("powercap is missing", sampler.sample(0.0).unknown["energy_joules"])
        self.zone("intel-rapl:0", "package-0", 7_000_000)
        self.assertEqual(0.0, sampler.sample(1.0).energy_joules)
        self.feed(rapl_0=17_000_000)
        self.assertEqual((10.0, 10.0), (lambda r: (r.energy_joules, r.power_watts))(sampler.sample(2.0)))
        self.zone("intel-rapl:1", "package-1", 5_000_000)
        self.feed(rapl_0=27_000_000)
        half = sampler.sample(3.0)
        self.feed(rapl_0=37_000_000, rapl_1=9_000_000)
        last = sampler.sample(4.0)
        self.assertEqual((None, 14.0, 34.0, 2.0),
                         (half.power_watts, last.power_watts, last.energy_joules, last.covered_s))
        shutil.rmtree(self.tree / "sys/class/powercap/intel-rapl:1")
        self.assertIn("missing", sampler.sample(5.0).unknown["zones.package-1"])

    def test_psys_holds_the_package(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0)
        self.zone("intel-rapl:0:0", "dram", 0)
        self.zone("intel-rapl:1", "psys", 7)
        *_, last = self.readings(dict(rapl_0=5_000_000, rapl_0_0=1_000_000, rapl_1=12_000_007))
        self.assertEqual((12.0, 12.0), (last.energy_joules, last.power_watts))
        self.assertEqual({"dram-0": 1.0, "package-0": 5.0, "psys": 12.0}, last.zones)

    def test_psys_that_is_not_wired_up_does_not_count(self) -> None:
        self.zone("intel-rapl:0", "package-0", 10)
        self.zone("intel-rapl:1", "psys", 0)
        *_, last = self.readings(dict(rapl_0=5_000_010))
        self.assertEqual(5.0, last.energy_joules)

    def test_psys_of_another_socket_is_psys(self) -> None:
        """intel_rapl_common.c names it after the socket whose counter tells, when that is not the first."""
        for socket in (0, 1):
            self.zone(f"intel-rapl:{socket}", f"package-{socket}", socket)
        self.zone("intel-rapl:2", "psys-1", 9)
        *_, last = self.readings(dict(rapl_0=5_000_000, rapl_1=6_000_001, rapl_2=20_000_009))
        self.assertEqual((20.0, 20.0), (last.energy_joules, last.zones["psys-1"]))

    def test_mmio_repeats_the_package(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0)
        self.zone("intel-rapl-mmio:0", "package-0", 0)
        *_, last = self.readings(dict(rapl_0=5_000_000, mmio_0=4_999_000))
        self.assertEqual((5.0, {"package-0": 5.0}), (last.energy_joules, last.zones))

    def test_psys_below_what_it_should_hold_does_not_count(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0)
        self.zone("intel-rapl:1", "psys", 7)
        *_, last = self.readings(dict(rapl_0=9_000_000, rapl_1=2_000_007))
        self.assertEqual(9.0, last.energy_joules)

    def test_one_socket_of_two_is_no_total(self) -> None:
        for socket in (0, 1):
            self.zone(f"intel-rapl:{socket}", f"package-{socket}", 0)
        (self.tree / "sys/class/powercap/intel-rapl:1/energy_uj").chmod(0)
        *_, last = self.readings(dict(rapl_0=4_000_000))
        self.assertIsNone(last.energy_joules)
        self.assertIn("intel-rapl:1", last.unknown["energy_joules"])

    def test_what_measures_the_machine_holds_its_gpus(self) -> None:
        for psys, total in ((False, 41.0), (True, 12.0)):
            self.setUp()
            self.machine("desktop-amdgpu")
            self.zone("intel-rapl:0", "package-0", 0)
            self.feed(rapl_0=0)
            if psys:
                self.zone("intel-rapl:7", "psys", 7)
            *_, last = self.readings(dict(rapl_0=10_000_000, **({"rapl_7": 12_000_007} if psys else {})))
            self.assertEqual((total, [psys]), (last.total_watts, [gpu.in_package for gpu in last.gpus]))

    def test_mmio_alone_counts(self) -> None:
        self.zone("intel-rapl-mmio:0", "package-0", 0)
        *_, last = self.readings(dict(mmio_0=5_000_000))
        self.assertEqual(5.0, last.energy_joules)

    def test_mirrored_dies_are_one_die(self) -> None:
        for names in (("package-0", "package-1"), ("package-0-die-0", "package-0-die-1")):
            self.setUp()
            self.zone("intel-rapl:0", names[0], 1_000_000, 65532610987)
            self.zone("intel-rapl:1", names[1], 1_000_000, 65532610987)
            *_, last = self.readings(
                dict(rapl_0=4_000_000, rapl_1=4_000_000), dict(rapl_0=6_500_000, rapl_1=6_500_000)
            )
            self.assertEqual((5.5, {names[0]: 5.5}), (last.energy_joules, last.zones))
            self.assertIn(names[0], last.unknown[f"zones.{names[1]}"])

    def test_equal_counters_of_intel_sockets_are_two_sockets(self) -> None:
        self.put("/proc/cpuinfo", "vendor_id\t: GenuineIntel")
        for socket in (0, 1):
            self.zone(f"intel-rapl:{socket}", f"package-{socket}", 0)
        *_, last = self.readings(dict(rapl_0=4_000_000, rapl_1=4_000_000))
        self.assertEqual(8.0, last.energy_joules)

    def test_zones_of_one_name_are_kept_apart(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0)
        self.zone("intel-rapl:1", "package-0", 0)
        *_, last = self.readings(dict(rapl_0=4_000_000, rapl_1=1_000_000))
        self.assertEqual((5.0, [1.0, 4.0]), (last.energy_joules, sorted(last.zones.values())))

    def test_a_sample_that_could_not_be_read_is_made_up_for_by_the_next(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0)
        sampler = self.sampler()
        sampler.sample(0.0)
        (self.tree / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
        self.assertEqual((0.0, None), (sampler.sample(1.0).energy_joules, sampler.sample(2.0).power_watts))
        self.feed(rapl_0=6_000_000)
        last = sampler.sample(3.0)
        self.assertEqual((6.0, 2.0), (last.energy_joules, last.power_watts))

    def test_a_counter_that_goes_away_leaves_a_gap_until_it_is_back(self) -> None:
        """Half a machine is no figure of it: power is unknown, and the joules are of less time."""
        for socket in (0, 1):
            self.zone(f"intel-rapl:{socket}", f"package-{socket}", socket * 500)
        sampler = self.sampler()
        sampler.sample(0.0)
        self.feed(rapl_0=10_000_000, rapl_1=20_000_500)
        whole = sampler.sample(1.0)
        self.assertEqual((30.0, 30.0, 1.0), (whole.power_watts, whole.energy_joules, whole.covered_s))
        (self.tree / "sys/class/powercap/intel-rapl:1/energy_uj").unlink()
        self.feed(rapl_0=20_000_000)
        half = sampler.sample(2.0)
        self.assertEqual((None, 1.0), (half.power_watts, half.covered_s))
        self.assertIn("missing: /sys", half.unknown["zones.package-1"])
        self.feed(rapl_0=30_000_000, rapl_1=60_000_500)
        back = sampler.sample(3.0)
        self.assertEqual((30.0, 90.0, 3.0), (back.power_watts, back.energy_joules, back.covered_s))
        self.feed(rapl_0=31_000_000, rapl_1=0)
        reset = sampler.sample(4.0)
        self.assertEqual((None, 3.0), (reset.power_watts, reset.covered_s))
        self.feed(rapl_0=32_000_000, rapl_1=2_000_000)
        self.assertEqual((3.0, 4.0), (sampler.sample(5.0).power_watts, sampler.sample(5.0).covered_s))

    def test_permission_denied_names_the_lasting_fix(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0)
        (self.tree / "sys/class/powercap/intel-rapl:0/energy_uj").chmod(0)
        reading = self.sampler().sample(0.0)
        self.assertIsNone(reading.energy_joules)
        self.assertRegex(
            reading.unknown["energy_joules"], "permission denied: /sys/.*rules.d/60-ffdist-rapl.rules"
        )

    def test_a_power_meter_is_integrated(self) -> None:
        self.put("/sys/class/hwmon/hwmon0/name", "power_meter")
        self.put("/sys/class/hwmon/hwmon0/power1_average", 100_000_000)
        sampler = self.sampler()
        sampler.sample(0.0)
        self.put("/sys/class/hwmon/hwmon0/power1_average", 200_000_000)
        reading = sampler.sample(2.0)
        self.assertEqual(
            (300.0, 200.0, "hwmon"), (reading.energy_joules, reading.power_watts, reading.power_source)
        )

    def test_a_battery_tells_only_while_it_discharges(self) -> None:
        base = "/sys/class/power_supply/BAT0"
        for name, value in (
            ("type", "Battery"),
            ("status", "Discharging"),
            ("current_now", 1_000_000),
            ("voltage_now", 12_000_000),
        ):
            self.put(f"{base}/{name}", value)
        sampler = self.sampler()
        sampler.sample(0.0)
        reading = sampler.sample(10.0)
        self.assertEqual(
            (120.0, 12.0, "battery"), (reading.energy_joules, reading.power_watts, reading.power_source)
        )
        self.put(f"{base}/status", "Full")
        self.assertIn("only while it alone powers the machine", sampler.sample(11.0).unknown["energy_joules"])
        self.put(f"{base}/status", "Discharging")
        self.assertEqual(120.0, sampler.sample(71.0).energy_joules, "a minute on mains is no discharge")
        self.put(f"{base}/power_now", 20_000_000)
        self.assertEqual(136.0, sampler.sample(72.0).energy_joules)

    def test_a_battery_beside_mains_or_without_its_power_is_no_figure(self) -> None:
        for supply, name, value in (("AC", "type", "Mains"), ("AC", "online", 0), ("BAT0", "type", "Battery"),
                                    ("BAT0", "status", "Discharging"), ("BAT0", "power_now", 9_000_000),
                                    ("BAT1", "type", "Battery"), ("BAT1", "status", "Not charging")):
            self.put(f"/sys/class/power_supply/{supply}/{name}", value)
        sampler = self.sampler()
        told = [sampler.sample(0.0).power_watts]
        for at, (path, value) in enumerate((
                ("AC/online", 1), ("AC/online", 0), ("BAT0/power_now", 0), ("BAT0/current_now", -2_000_000),
                ("BAT0/voltage_now", 11_000_000), ("BAT1/status", "Discharging"),
                ("BAT1/power_now", 3_000_000)), 1):
            self.put(f"/sys/class/power_supply/{path}", value)
            told.append(sampler.sample(float(at)).power_watts)
        self.assertEqual([9.0, None, 9.0, None, None, 22.0, None, 25.0], told)

    def test_a_battery_that_tells_only_what_is_left_in_it(self) -> None:
        """Steps of 10 mWh, which are 36 J, every 3 s: 12 W."""
        base = "/sys/class/power_supply/BAT0"
        for name, value in (("type", "Battery"), ("status", "Discharging"), ("energy_now", 40_000_000)):
            self.put(f"{base}/{name}", value)
        sampler = self.sampler()
        first = sampler.sample(0.0)
        self.assertEqual((None, 0.0, "battery"), (first.power_watts, first.energy_joules, first.power_source))
        self.assertIn("what is left", first.unknown["power_watts"])
        told = []
        for at in range(1, 13):
            self.put(f"{base}/energy_now", 40_000_000 - 10_000 * ((at + 1) // 3))
            last = sampler.sample(float(at))
            told.append(last.power_watts and round(last.power_watts, 6))
        self.assertEqual([None] * 4 + [12.0] * 8, told)
        self.assertEqual((144.0, 12.0), (last.energy_joules, last.covered_s))
        self.put(f"{base}/status", "Charging")
        self.assertIsNone(sampler.sample(13.0).energy_joules)
        self.put(f"{base}/status", "Discharging")
        self.assertEqual((144.0, 12.0), (lambda r: (r.energy_joules, r.covered_s))(sampler.sample(14.0)))

    def test_a_power_meter_that_tells_nothing_or_zero_is_no_figure(self) -> None:
        for meter in (0, 1):
            self.put(f"/sys/class/hwmon/hwmon{meter}/name", "power_meter")
            self.put(f"/sys/class/hwmon/hwmon{meter}/power1_average", 100_000_000)
        sampler = self.sampler()
        self.assertEqual(200.0, sampler.sample(0.0).power_watts)
        for words in ("0", "", "unknown"):
            self.put("/sys/class/hwmon/hwmon1/power1_average", words)
            reading = sampler.sample(1.0)
            self.assertEqual((None, None), (reading.power_watts, reading.energy_joules), words)
            self.assertIn("has no reading now", reading.unknown["energy_joules"])

    def test_ina3221_of_a_whole_module_and_of_parts(self) -> None:
        """ina3221.rst: mV and mA of three channels, and in 4 the sum of the currents."""
        cases = {("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"): 15.0, ("VDD_CPU", "VDD_GPU", "NC"): None,
                 ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"): 24.0}
        for labels, watts in cases.items():
            self.setUp()
            base = "/sys/class/hwmon/hwmon3"
            self.put(f"{base}/name", "ina3221")
            for channel, (label, ma) in enumerate(zip(labels, (3000, 1000, 800)), 1):
                self.put(f"{base}/in{channel}_label", label)
                self.put(f"{base}/in{channel}_input", 5000)
                self.put(f"{base}/curr{channel}_input", ma)
            self.put("/sys/class/hwmon/hwmon1/name", "scmi_sensors")
            self.put("/sys/class/hwmon/hwmon1/energy1_input", 27_697_142)
            self.put("/sys/class/hwmon/hwmon1/energy1_label", "BIG")
            self.put(f"{base}/in7_label", "sum of shunt voltages")
            self.put(f"{base}/curr4_input", 4800)
            sampler = self.sampler()
            sampler.sample(0.0)
            last = sampler.sample(2.0)
            self.assertEqual((watts, watts and 2 * watts), (last.power_watts, last.energy_joules))
            if watts is None:
                words = "have sensors: scmi_sensors BIG, ina3221 VDD_CPU, ina3221"
                self.assertIn(words, last.unknown["energy_joules"])

    def test_a_model_only_where_it_is_given_and_nothing_tells(self) -> None:
        def sampled(model: tuple[float, float] | None) -> Reading:
            self.put("/proc/stat", "cpu  100 0 0 100 0 0 0 0 0 0")
            sampler = Sampler(Host(str(self.tree)), model=model)
            sampler.sample(0.0)
            self.put("/proc/stat", "cpu  150 0 0 250 0 0 0 0 0 0")  # 50 of 200 ticks
            return sampler.sample(4.0)

        self.assertIsNone(sampled(None).energy_joules)
        last = sampled((20.0, 100.0))
        self.assertEqual((40.0, 160.0, "model"), (last.power_watts, last.energy_joules, last.power_source))
        self.zone("intel-rapl:0", "package-0", 0)
        self.assertEqual("rapl", sampled((20.0, 100.0)).power_source)

    def test_the_first_source_that_answers_is_used_and_the_others_pause(self) -> None:
        """While the meter answers nobody asks the battery, whose joules then lack that time."""
        self.put("/sys/class/hwmon/hwmon0/name", "power_meter")
        meter = "/sys/class/hwmon/hwmon0/power1_average"
        base = "/sys/class/power_supply/BAT0"
        for name, value in (("type", "Battery"), ("status", "Discharging"), ("power_now", 9_000_000)):
            self.put(f"{base}/{name}", value)
        self.put(meter, 50_000_000)
        sampler = self.sampler()
        found = []
        for now, words in enumerate(("", "", 50_000_000, 50_000_000, "", "")):
            self.put(meter, words)
            reading = sampler.sample(float(now))
            found.append((reading.power_source, reading.power_watts, reading.energy_joules))
        self.assertEqual([
            ("battery", 9.0, 0.0), ("battery", 9.0, 9.0), ("hwmon", 50.0, 0.0), ("hwmon", 50.0, 50.0),
            ("battery", 9.0, 9.0), ("battery", 9.0, 18.0)], found)

    def test_a_source_is_a_class_and_a_row(self) -> None:
        class Plug(hwdetect.PowerSource):
            name = "plug"
            resolution = "a smart plug, once a second"

            def sample(self, now: float, cpu_percent: float | hwdetect.Unknown) -> hwdetect.PowerReading:
                return hwdetect.PowerReading(80 * now, 80.0, now)

        with mock.patch("hwdetect.MACHINE_SOURCES", (hwdetect.RaplSource, Plug)):
            reading = Sampler(Host(str(self.tree))).sample(3.0)
        self.assertEqual(("plug", 240.0, 80.0, 3.0), (reading.power_source, reading.energy_joules,
                                                      reading.power_watts, reading.covered_s))

    def test_throttling_by_heat_is_counted(self) -> None:
        sampler = self.sampler()
        self.assertIsNone(sampler.throttles())
        for cpu in (0, 1):
            base = f"/sys/devices/system/cpu/cpu{cpu}/thermal_throttle"
            self.put(f"{base}/core_throttle_count", 3 + cpu)
            self.put(f"{base}/package_throttle_count", 10)
        self.assertEqual(27, sampler.throttles())

    def test_cpu_memory_and_temperature(self) -> None:
        self.machine("desktop-amdgpu")
        sampler = self.sampler()
        first = sampler.sample(0.0)
        self.assertIn("first sample", first.unknown["cpu_usage"])
        self.assertEqual(
            (44.375, (32794112 - 28000000) * 1024), (first.temperature_c, first.memory_used_bytes)
        )
        self.put("/proc/stat", "cpu  180 0 80 99075 225 0 5 0 0 0")  # 100 busy of 200 ticks
        self.assertEqual(50.0, sampler.sample(1.0).cpu_usage)

    def test_amdgpu(self) -> None:
        self.machine("desktop-amdgpu")
        sampler = self.sampler()
        sampler.sample(0.0)
        gpu = sampler.sample(4.0).gpus[0]
        self.assertEqual(
            (31.0, 124.0, 3.0, 41.0, "gpu-hwmon", False),
            (gpu.power_watts, gpu.energy_joules, gpu.usage, gpu.temperature_c, gpu.source, gpu.in_package),
        )

    def test_intel_gpu_s_counter_of_the_card_or_else_of_its_package(self) -> None:
        card = "/sys/bus/pci/devices/0000:03:00.0"
        for name, text in (("class", "0x030000"), ("vendor", "0x8086"), ("device", "0x56a0")):
            self.put(f"{card}/{name}", text)
        for counters in ((2,), (2, 1)):
            for number in counters:  # the card's holds the package's
                self.put(f"{card}/hwmon/hwmon3/energy{number}_input", 1_000_000 * number)
            sampler = self.sampler()
            sampler.sample(0.0)
            self.put(f"{card}/hwmon/hwmon3/energy{counters[-1]}_input", 9_000_000)
            gpu = sampler.sample(2.0).gpus[0]
            self.assertEqual((9.0 - counters[-1], 2.0), (gpu.energy_joules, gpu.covered_s))
            self.put(f"{card}/hwmon/hwmon3/energy{counters[-1]}_input", 0)
            gpu = sampler.sample(4.0).gpus[0]
            self.assertEqual((9.0 - counters[-1], 2.0), (gpu.energy_joules, gpu.covered_s), "it was reset")

    def test_nvidia_over_its_own_time_stamps(self) -> None:
        self.smi()
        fields = (
            "index,name,uuid,pci.bus_id,driver_version,memory.total,power.limit,timestamp,power.draw,"
            "utilization.gpu,memory.used,temperature.gpu,clocks_throttle_reasons.active"
        )  # no utilization.encoder: an older driver

        def say(moment: str, watts: str) -> None:
            self.put(
                "/recorded/nvidia-smi",
                f"{fields}\n0, Tesla T4, GPU-0, 00000000:3B:00.0, 535, 15360, 70.00, "
                f"2023/05/17 14:23:{moment}, {watts}, 17, 100, 41, 0x0000000000000020",
            )

        say("11.000", "30.00")
        sampler = self.sampler()
        until(lambda: sampler.sample(0.0).gpus[0].energy_joules is not None, "a first line")
        say("13.000", "50.00")
        until(lambda: sampler.sample(0.0).gpus[0].energy_joules == 80.0, "2 s of 40 W in the mean")
        say("14.500", "[N/A]")
        until(lambda: sampler.sample(0.0).gpus[0].power_watts is None, "power not told")
        reading = sampler.sample(0.0)
        gpu = reading.gpus[0]
        self.assertEqual(
            (80.0, 2.0, 17.0, None, 100 * 2**20, True),
            (gpu.energy_joules, gpu.covered_s, gpu.usage, gpu.encoder_usage, gpu.memory_used_bytes,
             gpu.too_hot),
        )
        self.assertIn("[N/A]", reading.unknown["gpus.0.power_watts"])
        stream = sampler._graphics.smi.stream if sampler._graphics.smi else None
        assert stream is not None
        sampler.close()
        with self.assertRaises(ProcessLookupError):
            os.kill(stream.pid, 0)

    def smi_says(self, *rows: str) -> None:
        """Let the stand-in tell "index, stamp, watts" of each GPU, at 0000:3B:00.0 and so on."""
        lines = [f"{row.split(', ')[0]}, L4, GPU-0, 00000000:{0x3b + int(row[0]):X}:00.0, 535, 23034, 72.00, "
                 f"2023/05/17 14:{row.split(', ', 1)[1]}, 17, 0, 100, 41, 0x0" for row in rows]
        self.put("/recorded/nvidia-smi", "\n".join((
            "index,name,uuid,pci.bus_id,driver_version,memory.total,power.limit,timestamp,power.draw,"
            "utilization.gpu,utilization.encoder,memory.used,temperature.gpu,clocks_throttle_reasons.active",
            *lines)))

    def test_nvidia_rows_out_of_order_are_left_out(self) -> None:
        self.smi()
        self.smi_says("0, 23:10.000, 30.00")
        sampler = self.sampler()
        until(lambda: sampler.sample(0.0).gpus[0].power_watts == 30.0, "a first line")
        for row, watts in (("0, 23:08.000, 90.00", 90.0), ("0, 23:12.000, 30.01", 30.01)):
            self.smi_says(row)
            until(lambda watts=watts: sampler.sample(0.0).gpus[0].power_watts == watts, row)
        gpu = sampler.sample(0.0).gpus[0]
        self.assertEqual((60.01, 2.0), (round(gpu.energy_joules or 0, 3), gpu.covered_s))

    def test_an_nvidia_smi_that_hangs_tells_nothing_any_more(self) -> None:
        self.smi()
        self.smi_says("0, 23:10.000, 30.00")
        sampler = self.sampler()
        until(lambda: sampler.sample(0.0).gpus[0].power_watts == 30.0, "a first line")
        stream = sampler._graphics.smi.stream if sampler._graphics.smi else None
        assert stream is not None
        os.kill(stream.pid, signal.SIGSTOP)
        sampler.sample(1.0)
        reading = sampler.sample(20.0)
        self.assertEqual((None, None), (reading.gpus[0].power_watts, reading.gpus[0].source))
        self.assertIn("printed nothing for", reading.unknown["gpus.0"])
        os.kill(stream.pid, signal.SIGCONT)
        until(lambda: sampler.sample(21.0).gpus[0].power_watts == 30.0, "it goes on")

    def test_an_nvidia_driver_that_came_late_is_found_by_its_address(self) -> None:
        """When the machine was looked at nvidia-smi failed: its cards have no index."""
        self.smi()
        for address in ("0000:3b:00.0", "0000:3c:00.0"):
            for name, word in (("class", "0x030000"), ("vendor", "0x10de"), ("device", "0x1234")):
                self.put(f"/sys/bus/pci/devices/{address}/{name}", word)
        hw = detect(Host(str(self.tree)))
        self.assertEqual([None, None], [gpu.index for gpu in hw.gpus])
        self.smi_says("0, 23:10.000, 30.00", "1, 23:10.000, 70.00")
        sampler = Sampler(Host(str(self.tree)), hw, smi_interval_ms=10)
        self.addCleanup(sampler.close)
        until(lambda: [gpu.power_watts for gpu in sampler.sample(0.0).gpus] == [30.0, 70.0], "both")

    def test_nvidia_smi_whose_clock_is_set_or_that_ends(self) -> None:
        """Its stamps are local time: an hour that never was is not integrated. It is started anew."""
        self.smi()

        def say(moment: str, watts: str) -> None:
            fields = ("index,name,uuid,pci.bus_id,driver_version,memory.total,power.limit,timestamp,"
                      "power.draw,utilization.gpu,utilization.encoder,memory.used,temperature.gpu,"
                      "clocks_throttle_reasons.active")
            self.put("/recorded/nvidia-smi", f"{fields}\n0, T4, GPU-0, 00000000:3B:00.0, 535, 15360, 70.00, "
                     f"2023/03/26 {moment}, {watts}, 17, 0, 100, 41, 0x0")

        say("01:59:59.000", "30.00")
        sampler = self.sampler()
        until(lambda: sampler.sample(0.0).gpus[0].power_watts == 30.0, "a first line")
        say("03:00:00.000", "50.00")
        until(lambda: sampler.sample(0.0).gpus[0].power_watts == 50.0, "a line of summer time")
        say("03:00:02.000", "52.00")
        until(lambda: sampler.sample(0.0).gpus[0].power_watts == 52.0, "a line 2 s later")
        gpu = sampler.sample(0.0).gpus[0]
        self.assertEqual((102.0, 2.0), (gpu.energy_joules, gpu.covered_s))
        stream = sampler._graphics.smi.stream if sampler._graphics.smi else None
        assert stream is not None
        os.kill(stream.pid, 9)
        until(lambda: sampler.sample(1.0).gpus[0].source is None, "its end is noticed")
        self.assertIn("nvidia-smi ended", sampler.sample(2.0).unknown["gpus.0"])
        until(lambda: sampler.sample(62.0).gpus[0].source == "nvidia-smi", "it is started anew")
        self.assertEqual(102.0, sampler.sample(62.0).gpus[0].energy_joules)

    def test_watch_on_a_tree_that_is_fed(self) -> None:
        self.zone("intel-rapl:0", "package-0", RANGE_UJ - 1_000_000)
        argv = [
            sys.executable,
            "-W",
            "error",
            str(HERE.parent / "hwdetect.py"),
            "--root",
            str(self.tree),
            "--watch",
            "20ms",
            "--json",
        ]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   preexec_fn=interruptible)
        assert process.stdout is not None
        guard = threading.Timer(DEADLINE_S, process.kill)
        guard.start()
        try:
            first = json.loads(process.stdout.readline())
            self.assertEqual(
                ["time", "cpu_usage", "power_watts", "energy_joules", "zones", "unknown"], list(first)[:6]
            )
            self.assertRegex(first["time"], r"^\d{4}-\d\d-\d\dT[\d:.]+Z$")
            self.assertEqual(
                (0.0, None, {"package-0": 0.0}),
                tuple(first[name] for name in ("energy_joules", "power_watts", "zones")),
            )
            self.feed(rapl_0=4_000_000)
            for line in process.stdout:
                if json.loads(line)["energy_joules"] == 5.0:
                    break
            else:
                self.fail("the 5 joules never came")
            process.send_signal(2)
            process.stdout.read()
            self.assertEqual(("", 130), (process.stderr.read() if process.stderr else "", process.wait()))
        finally:
            guard.cancel()
            process.kill()
            process.communicate()


    def test_watch_makes_up_for_no_missed_turn(self) -> None:
        """After a stop of ten turns the next readings are a turn apart again, not all at once."""
        argv = [sys.executable, str(HERE.parent / "hwdetect.py"), "--root", str(self.tree), "--watch", "50ms",
                "--json"]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.5)
            process.send_signal(signal.SIGCONT)
            moments = [datetime.datetime.strptime(json.loads(process.stdout.readline())["time"],
                                                  "%Y-%m-%dT%H:%M:%S.%fZ") for _ in range(8)]
            self.assertGreater((moments[7] - moments[1]).total_seconds(), 5 * 0.05)
        finally:
            process.kill()
            process.communicate()


class Processes(TreeCase):
    """Process groups from /proc/PID/stat."""

    def process(
        self, pid: int, comm: str, group: int, ticks: Sequence[int] = (0, 0, 0, 0), start: int = 77
    ) -> None:
        numbers = [1, group, group, 0, -1, 4194304, 10, 0, 0, 0, *ticks, 20, 0, 1, 0, start, 999, 25]
        self.put(f"/proc/{pid}/stat", f"{pid} ({comm}) S " + " ".join(map(str, numbers)))
        self.put(f"/proc/{pid}/status", "Name:\tx\nVmRSS:\t    1024 kB")

    def test_a_group_is_summed_whatever_its_names(self) -> None:
        self.process(10, "ffmpeg", 10, (100, 50, 7, 3))
        self.process(11, "a) R 1 99 (b c", 10, (40, 0, 0, 0), start=1234)
        self.process(12, "other", 12, (999, 0, 0, 0))
        self.put("/proc/13/stat", "garbled")
        host = Host(str(self.tree))
        self.assertEqual(hwdetect.ProcessUsage(2.0, 2 * 2**20, (10, 11)), hwdetect.process_group(host, 10))
        self.assertEqual(
            (1234, None), (hwdetect.process_started(host, 11), hwdetect.process_started(host, 13))
        )
        self.assertEqual(hwdetect.ProcessUsage(0.0, 0, ()), hwdetect.process_group(host, 5))

    def test_a_real_group(self) -> None:
        code = "import sys; sum(range(3_000_000)); print('done', flush=True); sys.stdin.read()"
        with subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            usage = hwdetect.process_group(Host(), process.pid)
            self.assertEqual((process.pid,), usage.pids)
            self.assertGreater(usage.cpu_seconds, 0)
            self.assertGreater(usage.rss_bytes, 2**20)
            self.assertIsNotNone(hwdetect.process_started(Host(), process.pid))


class KernelStandIn(Host):
    """A tree in which making a folder gives it the files of a control group, as the kernel does."""

    FILES = ("cgroup.procs", "memory.max", "memory.swap.max", "cpu.max", "memory.events")

    def make(self, folder: str) -> bool:
        made = super().make(folder)
        for name in self.FILES if made else ():
            Path(self.tree.real(f"{folder}/{name}")).touch()
        return made

    def drop(self, folder: str) -> bool:
        shutil.rmtree(self.tree.real(folder), ignore_errors=True)
        return not self.exists(folder)


class ControlGroups(TreeCase):
    def version_2(self, subtree: str) -> KernelStandIn:
        """A tree of version 2, its process in a service; `subtree` is what the slice hands on."""
        self.put("/proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate")
        self.put("/proc/self/cgroup", "0::/system.slice/ffdist.service")
        self.put("/sys/fs/cgroup/system.slice/cgroup.controllers", "cpu memory")
        self.put("/sys/fs/cgroup/system.slice/cgroup.subtree_control", subtree)
        self.put("/sys/fs/cgroup/system.slice/ffdist.service/cgroup.controllers", "")
        self.put("/sys/fs/cgroup/system.slice/ffdist.service/memory.max", 900 << 20)
        return KernelStandIn(str(self.tree))

    def words(self, folder: str, name: str) -> str:
        return (self.tree / f"sys/fs/cgroup/{folder}/{name}").read_text(encoding="utf-8").strip()

    def test_version_2_of_a_stand_in_gets_one_group_beside_the_agents_own(self) -> None:
        group = hwdetect.ControlGroup(self.version_2("cpu memory"), "job-1")
        told = [group.limit("memory", 64 << 20), group.limit("cpu", 50_000)]
        self.assertEqual(told, ["cgroup v2", "cgroup v2"])
        told = [self.words("system.slice/ffdist-job-1", name) for name in KernelStandIn.FILES[1:4]]
        self.assertEqual(told, [str(64 << 20), "0", "50000 100000"])
        self.assertTrue(group.take("memory", 4711))
        self.assertEqual(self.words("system.slice/ffdist-job-1", "cgroup.procs"), "4711")
        self.assertIn("/sys/fs/cgroup/system.slice/ffdist-job-1", group.folders)
        self.assertFalse(group.killed())
        self.put("/sys/fs/cgroup/system.slice/ffdist-job-1/memory.events", "low 0\noom 1\noom_kill 1")
        self.assertTrue(group.killed())
        group.remove()
        self.assertFalse((self.tree / "sys/fs/cgroup/system.slice/ffdist-job-1").exists())

    def test_version_2_of_a_stand_in_is_asked_for_a_controller_and_keeps_the_agents_own_limit(self) -> None:
        group = hwdetect.ControlGroup(self.version_2("cpu"), "job-1")
        self.assertEqual("cgroup v2", group.limit("memory", 2000 << 20))
        self.assertEqual(self.words("system.slice", "cgroup.subtree_control")[:7], "+memory")
        self.assertEqual(self.words("system.slice/ffdist-job-1", "memory.max"), str(900 << 20))

    def test_a_limit_that_can_not_be_set_leaves_no_group(self) -> None:
        host = self.version_2("cpu memory")
        host.FILES = ("cgroup.procs",)
        group = hwdetect.ControlGroup(host, "job-1")
        self.assertEqual((None, None), (group.limit("memory", 64 << 20), group.limit("cpu", 50_000)))
        self.assertFalse(group.take("memory", 1))
        self.assertFalse((self.tree / "sys/fs/cgroup/system.slice/ffdist-job-1").exists())

    def test_a_machine_without_control_groups_has_none(self) -> None:
        group = hwdetect.ControlGroup(Host(str(self.tree)), "job-1")
        self.assertIsNone(group.limit("cpu", 50_000))
        self.assertFalse(group.take("cpu", 1))
        group.remove()

    def test_only_groups_of_ours_are_removed(self) -> None:
        for name in ("ffdist-job-1", "system.slice"):
            (self.tree / "sys/fs/cgroup" / name).mkdir(parents=True)
        hwdetect.remove_groups(Host(str(self.tree)),
                               ["/sys/fs/cgroup/ffdist-job-1", "/sys/fs/cgroup/system.slice"])
        self.assertEqual([path.name for path in (self.tree / "sys/fs/cgroup").iterdir()], ["system.slice"])

    def test_a_real_group_holds_a_process_and_is_removed_with_it(self) -> None:
        group = hwdetect.ControlGroup(Host(), f"test-{os.getpid()}")
        self.addCleanup(group.remove)
        if not group.limit("memory", 256 << 20):
            self.skipTest("no control group of memory can be made here (it needs root)")
        process = subprocess.Popen(["sleep", "600"])
        self.addCleanup(process.kill)
        self.assertTrue(group.take("memory", process.pid))
        threading.Thread(target=process.wait, daemon=True).start()  # reaped at once, as init does
        hwdetect.remove_groups(Host(), group.folders)
        self.assertEqual(process.wait(10), -signal.SIGKILL)
        self.assertEqual([folder for folder in group.folders if os.path.exists(folder)], [])


@unittest.skipUnless(shutil.which("ffmpeg"), "ffmpeg is not installed")
class Probe(TreeCase):
    """Encoders are tried for real."""

    def test_encoders_are_proved_and_kept(self) -> None:
        calls: list[Sequence[str]] = []

        def run(argv: Sequence[str], timeout_s: float) -> Result:
            calls.append(argv)
            return hwdetect.default_runner(argv, timeout_s)

        state = str(self.tree / "state")
        for name in ("PROBE_TOTAL_S", "PROBE_EACH_S"):  # on a busy machine the time for all may run out
            patch = mock.patch(f"hwdetect.{name}", 120.0)
            patch.start()
            self.addCleanup(patch.stop)
        hw = detect(Host("/", run), state_dir=state)
        self.assertIn("libx264", hw.proved())
        self.assertNotIn("libx264", hw.unknown)
        if "h264_nvenc" in hw.encoders and not hw.has_gpu:
            self.assertRegex(hw.encoders["h264_nvenc"].why, "^[^\\n\\[]{5,160}$")
        probed = sum("lavfi" in argv for argv in calls)
        self.assertEqual(len(hw.encoders), probed)
        again = detect(Host("/", run), state_dir=state)
        self.assertEqual(hw.encoders, again.encoders)
        self.assertEqual(probed, sum("lavfi" in argv for argv in calls))
        self.assertEqual(0o600, os.stat(Path(state) / "encoders.json").st_mode & 0o777)


class StandInProbe(TreeCase):
    """What is kept of a probe, with a stand-in ffmpeg."""

    def setUp(self) -> None:
        super().setUp()
        self.ffmpeg = self.tree / "ffmpeg"
        self.ffmpeg.write_text("#!/bin/sh\n", encoding="utf-8")
        self.ffmpeg.chmod(0o755)
        self.version, self.failure, self.tries = "9.1", Result(1, "", "[enc @ 0x1] No device"), 0

    def run_program(self, argv: Sequence[str], timeout_s: float) -> Result:
        if "-version" in argv:
            return Result(0, f"ffmpeg version {self.version} Copyright\n", "")
        if "-filters" in argv:
            return Result(0, " TS psnr   VV->V  x\n ... libvmaf  VV->V  y\n", "")
        if "-encoders" in argv:
            return Result(0, " V....D libx264   H.264\n V....D h264_vaapi   H.264\n", "")
        self.tries += 1
        return Result(0, "", "") if "libx264" in argv else self.failure

    def look(self) -> hwdetect.Hardware:
        return detect(
            Host("/", self.run_program), state_dir=str(self.tree / "state"), ffmpeg=str(self.ffmpeg)
        )

    def test_another_build_is_probed_again(self) -> None:
        hw = self.look()
        self.assertEqual({"libx264": None, "h264_vaapi": "No device"}, hw.encoder_reasons())
        self.assertEqual(("9.1", ("psnr", "libvmaf"), 2), (hw.ffmpeg_version, hw.filters, self.tries))
        self.look()
        self.assertEqual(2, self.tries)
        self.version = "9.2"
        self.look()
        self.assertEqual(4, self.tries)
        os.utime(self.ffmpeg, (1, 1))
        self.look()
        self.assertEqual(6, self.tries)

    def test_a_damaged_memory_is_probed_anew(self) -> None:
        self.look()
        kept = self.tree / "state/encoders.json"
        for text in (
            "",
            "[1]",
            "null",
            '{"key": 1}',
            kept.read_text(encoding="utf-8").replace('"No device"', "7"),
        ):
            kept.write_text(text, encoding="utf-8")
            self.assertEqual("No device", self.look().encoders["h264_vaapi"].why)

    def test_a_probe_that_ran_out_of_time_is_not_kept(self) -> None:
        self.failure = Result(None, "", "no answer within 4.0 s", timed_out=True)
        self.assertIn("no answer", str(self.look().encoders["h264_vaapi"]))
        self.look()
        self.assertEqual(4, self.tries)

    def test_state_that_can_not_be_written_is_a_problem_not_a_failure(self) -> None:
        (self.tree / "state").write_text("a file where the folder should be", encoding="utf-8")
        hw = self.look()
        self.assertIn("libx264", hw.proved())
        self.assertIn("cannot be kept", hw.problems[0])


class Commands(TreeCase):
    """The command line."""

    def call(self, *argv: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = hwdetect.main(argv)
        return code, out.getvalue(), err.getvalue()

    def process(self, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", str(HERE.parent / "hwdetect.py"), *argv],
            text=True,
            capture_output=True,
            timeout=30,
            env={**os.environ, **environment},
        )

    def test_json_of_a_real_process(self) -> None:
        done = self.process("--json", "--no-probe")
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        answer = json.loads(done.stdout)
        self.assertEqual(list(hwdetect.Hardware().registration()), list(answer)[:8])
        self.assertEqual(
            len(os.sched_getaffinity(0)) if answer["cgroup"]["cpus"] is None else answer["cpu_threads"],
            answer["cpu_threads"],
        )
        self.assertIn("no-probe", answer["unknown"].get("encoders", "no-probe"))

    def test_environment_and_flag(self) -> None:
        self.machine("vm-bare")
        done = self.process(FFDIST_ROOT=str(self.tree), FFDIST_JSON="1")
        self.assertEqual("vm-7", json.loads(done.stdout)["address"])
        other = tempfile.mkdtemp(dir=self.tree)
        done = self.process("--root", other, FFDIST_ROOT=str(self.tree), FFDIST_JSON="1")
        self.assertIsNone(json.loads(done.stdout)["address"])

    def test_page_of_every_machine(self) -> None:
        for text in MACHINES:
            with self.subTest(machine=text.stem):
                self.setUp()
                self.machine(text.stem)
                code, out, err = self.call("--root", str(self.tree))
                self.assertEqual((0, ""), (code, err))
                self.assertNotIn("None", out)
                self.assertRegex(out, r"(?m)^Processor    \S")

    def test_wrong_usage(self) -> None:
        for argv in (
            ["--watch", "soon"],
            ["--watch", "0s"],
            ["--root", "/no/such"],
            ["--nonsense"],
            ["word"],
        ):
            code, out, err = self.call(*argv)
            self.assertEqual((2, ""), (code, out), argv)
            self.assertNotIn("Traceback", err)
        self.assertEqual(0, self.call("--help")[0])

    def test_a_reader_that_goes_away(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0)
        argv = [sys.executable, str(HERE.parent / "hwdetect.py"), "--root", str(self.tree), "--watch", "10ms"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            self.assertEqual((0, b""), (process.wait(timeout=DEADLINE_S), process.stderr.read()))

    def test_a_recording_is_the_same_machine(self) -> None:
        """record, unpack, detect gives the same answer, but for names that are nobody's business."""
        for text in MACHINES:
            with self.subTest(machine=text.stem):
                self.setUp()
                self.machine(text.stem)
                shutil.rmtree(self.tree / "usr/share", ignore_errors=True)
                before = detect(Host(str(self.tree)))
                file = self.tree / "recorded.txt"
                code, out, err = self.call("--root", str(self.tree), "--record", str(file))
                self.assertEqual((0, ""), (code, err), out)
                recording = file.read_text(encoding="utf-8")
                self.setUp()
                archive.unpack(recording, self.tree)
                if (self.tree / "recorded/nvidia-smi").exists():
                    self.smi()
                after = detect(Host(str(self.tree)))
                self.assertEqual("recorded", after.address)
                self.assertEqual({**before.to_json(), "address": 0}, {**after.to_json(), "address": 0})

    def test_this_machine_can_be_recorded(self) -> None:
        done = self.process("--record", "-")
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        archive.unpack(done.stdout, self.tree)
        here, there = detect(Host(), probe=False), detect(Host(str(self.tree)))
        for name in (
            "cpu_model",
            "cpu_threads",
            "ram_bytes",
            "gpu_type",
            "node_type",
            "virtual",
            "cgroup",
            "arch",
        ):
            self.assertEqual(getattr(here, name), getattr(there, name), name)

    def test_serial_numbers_stay_at_home(self) -> None:
        text = hwdetect.scrub(
            "/proc/cpuinfo", "Revision\t: c03115\nSerial\t\t: 10000000abcdef12\nModel\t: Pi\n"
        )
        self.assertEqual("Revision\t: c03115\nSerial\t\t: 0\nModel\t: Pi\n", text)
        self.assertEqual("GPU-0", hwdetect.scrub("", "GPU-9c0ffee0-1111-2222-3333-444455556666"))
        self.assertEqual(
            "/dev/sda1 / ext4 rw 0 0\n",
            hwdetect.scrub("/proc/self/mounts", "/dev/sda1 / ext4 rw 0 0\nnas:/secret /mnt nfs4 rw 0 0\n"),
        )

    def test_archives_pack_as_they_unpack(self) -> None:
        for text in MACHINES:
            whole = text.read_text(encoding="utf-8")
            self.setUp()
            archive.unpack(whole, self.tree)
            self.assertEqual(hwdetect.parse_archive(whole), hwdetect.parse_archive(archive.pack(self.tree)))

    def test_a_recording_can_be_read_as_a_root(self) -> None:
        for name in ("xeon-t4", "laptop-intel"):
            place = HERE / "hosts" / f"{name}.txt"
            golden = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
            code, out, err = self.call("--root", str(place), "--json")
            self.assertEqual((0, ""), (code, err))
            for field in ("address", "gpus", "rapl", "ram_bytes", "node_type", "sensors", "batteries"):
                self.assertEqual(golden[field], json.loads(out)[field], field)

    def test_what_is_no_recording_is_told_in_a_sentence(self) -> None:
        for text, words in (
                ("hello", "not an archive of --record"), ("", "not an archive"),
                ("\0\xff", "not an archive"), ("=== link /a\n/etc\n=== file /a/b\nx\n", "exists")):
            self.put("/bad", "")
            (self.tree / "bad").write_text(text, encoding="utf-8")
            code, out, err = self.call("--root", str(self.tree / "bad"))
            self.assertEqual((2, ""), (code, out))
            self.assertIn(words, err)
            self.assertEqual(1, err.count("\n"))

    def test_an_archive_writes_nothing_outside(self) -> None:
        inside, outside = self.tree / "in", self.tree / "out"
        inside.mkdir()
        outside.mkdir()
        hwdetect.unpack(f"=== link /a\n{outside}\n=== there /b/../../out/c\n=== file /../out/d\nx\n",
                        str(inside))
        with contextlib.suppress(OSError):
            hwdetect.unpack(f"=== link /e\n{outside}\n=== there /e/f\n=== link /e/g\nx\n", str(inside))
        self.assertEqual([], os.listdir(outside))


class Pieces(unittest.TestCase):
    """Parsers, where their input is odd."""

    def test_durations(self) -> None:
        for text, seconds in (("1s", 1.0), ("500ms", 0.5), ("1m30s", 90.0), ("2", 2.0), ("0.5s", 0.5)):
            self.assertEqual(seconds, hwdetect.parse_duration(text))
        for text in ("", "s", "-1s", "1x", "1e3", "nan", "1 s"):
            with self.assertRaises(ValueError):
                hwdetect.parse_duration(text)

    def test_durations_and_sizes_for_people(self) -> None:
        for seconds, text in ((0.44, "0.4 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"),
                              (273_600, "3 d 4 h"), (None, "unknown")):
            self.assertEqual(text, hwdetect.duration_text(seconds))
        for count, text in ((812, "812 B"), (3.4 * 2**20, "3.4 MiB"), (1.5 * 2**40, "1.5 TiB")):
            self.assertEqual(text, hwdetect.size_text(count))
        self.assertEqual(64 * 2**20, hwdetect.size_bytes("64M"))

    def test_sizes_are_of_1024(self) -> None:
        """The kernel's kB and nvidia-smi's MiB are powers of two."""
        self.assertEqual({"VmRSS": 2048}, hwdetect.parse_sizes("VmRSS:\t       2 kB\n"))
        self.assertEqual(15_360 * 2**20, hwdetect.parse_mib("15360"))

    def test_cpu_lists(self) -> None:
        cases = {
            "0": 1,
            "0-3,8,10-11\n": 7,
            "0-3,2-5": 6,
            "3-1": None,
            "": None,
            "0-9999999999": None,
            "0-99999": None,
        }
        for text, count in cases.items():
            self.assertEqual(count, hwdetect.parse_cpu_list(text), text)

    def test_ffmpeg_s_own_words(self) -> None:
        said = "[h264_nvenc @ 0x55] Cannot load libcuda.so.1\nError initializing output stream 0:0 -- Error\n"
        self.assertEqual("Cannot load libcuda.so.1", hwdetect.parse_failure(Result(1, "", said)))
        self.assertEqual(
            "Device creation failed: -5.",
            hwdetect.parse_failure(Result(1, "", "Device creation failed: -5.")),
        )
        self.assertIn("signal 11", hwdetect.parse_failure(Result(-11, "", "")))

    def test_a_program_that_hangs_or_is_missing(self) -> None:
        begin = time.monotonic()
        result = Host().run([sys.executable, "-c", "import time; time.sleep(60)"], 0.3)
        self.assertLess(time.monotonic() - begin, 5)
        self.assertEqual((None, "no answer within 0.3 s"), (result.returncode, result.stderr))
        self.assertIn("does not start", Host().run(["/no/such/program"], 1).stderr)

    def test_peak_memory_of_a_program_is_in_bytes(self) -> None:
        """wait4(2) gives it in KiB."""
        code = "data = bytearray(64 << 20); data[::4096] = b'x' * len(data[::4096])"
        program = hwdetect.Program([sys.executable, "-c", code], HERE, str, str)
        self.assertTrue(program.ended.wait(DEADLINE_S))
        assert program.exit is not None
        self.assertEqual(0, program.exit.returncode)
        self.assertGreater(program.exit.peak_rss_bytes, 64 << 20)
        self.assertLess(program.exit.peak_rss_bytes, 256 << 20)

    def test_files_below_proc_sys_can_be_read(self) -> None:
        """Newer kernels refuse a read of 4 MiB there."""
        self.assertEqual(os.uname().release, (Host().read("/proc/sys/kernel/osrelease") or "").strip())

    def test_map_and_banners_agree(self) -> None:
        text = (HERE.parent / "hwdetect.py").read_text(encoding="utf-8")
        banners = [line[7:].rstrip("- ") for line in text.splitlines() if line.startswith("# ---- ")]
        mapped = [
            " ".join(line.split()[:2])
            for line in str(hwdetect.__doc__).splitlines()
            if line[:5].strip().isdigit()
        ]
        self.assertEqual(mapped, banners)
        self.assertEqual(1, len({len(line) for line in text.splitlines() if line.startswith("# ---- ")}))


if __name__ == "__main__":
    unittest.main()
