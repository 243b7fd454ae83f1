"""Hardware detection on eight recorded machines, on damaged ones, and on this one; known joules."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import hwdetect
from hwdetect import Host, Reading, Result, Sampler, detect
from tests import archive
from tests.fleet import interruptible
from tests.support import TOP, wait_for

HERE = Path(__file__).resolve().parent
MACHINES = sorted((HERE / "hosts").glob("*.txt"))
SEED = int(os.environ.get("FFDIST_TEST_SEED", "20251229"))
DEADLINE_S = 10.0
RANGE_UJ = 262143328850


def stream_of(sampler: Sampler) -> hwdetect.Stream:
    """Return the nvidia-smi that a sampler reads."""
    smi = sampler._graphics.smi
    assert smi is not None and smi.stream is not None
    return smi.stream


class TreeCase(unittest.TestCase):
    """A test with a tree of its own."""

    def setUp(self) -> None:
        folder = tempfile.mkdtemp(prefix="ffdist-hw-")
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        self.tree = Path(folder)

    def machine(self, name: str) -> list[str]:
        """Unpack a recorded machine, with the stand-in nvidia-smi if it had one."""
        paths = archive.unpack(
            (HERE / "hosts" / f"{name}.txt").read_text(encoding="utf-8"), self.tree
        )
        if (self.tree / "recorded/nvidia-smi").exists():
            self.smi()
        return paths

    def smi(self) -> None:
        """Put the stand-in nvidia-smi into the tree."""
        place = self.tree / "usr/bin/nvidia-smi"
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(HERE / "bin/nvidia-smi")

    def pci(self, address: str, vendor: str, device: str) -> None:
        """Put a display on the PCI bus."""
        for name, word in (("class", "0x030000"), ("vendor", vendor), ("device", device)):
            self.put(f"/sys/bus/pci/devices/{address}/{name}", word)

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

    def host(self) -> Host:
        return Host(str(self.tree))

    def detect(self) -> hwdetect.Hardware:
        return detect(self.host())

    def expect(self, found: object, **fields: object) -> None:
        """Compare some fields of an answer."""
        self.assertEqual({name: getattr(found, name) for name in fields}, fields)

    def sampler(self) -> Sampler:
        sampler = Sampler(self.host(), smi_interval_ms=10)
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
                found = json.dumps(self.detect().to_json(), indent=1) + "\n"
                golden = text.with_suffix(".json")
                if os.environ.get("FFDIST_REWRITE_GOLDENS"):
                    golden.write_text(found, encoding="utf-8")
                self.assertEqual(json.loads(found), json.loads(golden.read_text(encoding="utf-8")))

    def test_facts_of_each_machine(self) -> None:
        """The goldens may be rewritten by a machine; these facts may not."""
        columns = ("node_type", "cpu_threads", "cpu_logical", "cpu_cores", "cpu_sockets", "virtual")
        facts = {
            "xeon-t4": ("server", 56, 56, 28, 2, None),
            "epyc-mirrored": ("server", 32, 32, 16, 1, None),
            "laptop-intel": ("laptop", 8, 8, 4, 1, None),
            "desktop-amdgpu": ("desktop", 16, 16, 8, 1, None),
            "arm-server": ("server", 20, 20, 20, 1, None),
            "vm-bare": ("desktop", 4, 4, 4, 4, "kvm"),
            "container-quota": ("desktop", 2, 64, 32, 1, None),
            "raspberry-pi-4": ("desktop", 3, 4, 4, 1, None),
        }
        gpus = {
            "xeon-t4": "NVIDIA Tesla T4",
            "laptop-intel": "Intel Iris Xe Graphics",
            "desktop-amdgpu": "AMD Radeon RX 6800/6800 XT / 6900 XT",
            "raspberry-pi-4": "Broadcom VideoCore",
        }
        zones = {"xeon-t4": 4, "epyc-mirrored": 8, "laptop-intel": 4, "desktop-amdgpu": 2}
        zones["container-quota"] = 1
        for name, expected in facts.items():
            with self.subTest(machine=name):
                self.setUp()
                self.machine(name)
                hw = self.detect()
                self.expect(hw, **dict(zip(columns, expected)))
                self.expect(hw, gpu_type=gpus.get(name), problems=[])
                self.assertEqual(len(hw.rapl), zones.get(name, 0))

    def test_the_container_the_arm_core_the_mirrors_and_the_battery(self) -> None:
        self.machine("container-quota")
        self.expect(self.detect(), ram_bytes=4 * 2**30, container="docker")
        self.setUp()
        self.machine("arm-server")
        self.expect(self.detect(), cpu_model="Arm Neoverse-N1")
        self.setUp()
        self.machine("epyc-mirrored")
        zones = self.detect().rapl
        mirrors = {zone.name for zone in zones if zone.mirror_of == "package-0-die-0"}
        self.assertEqual(mirrors, {f"package-0-die-{die}" for die in (1, 2, 3)})
        self.setUp()
        self.machine("laptop-intel")
        hw = self.detect()
        self.assertEqual([battery.name for battery in hw.batteries], ["BAT0"])
        self.assertIn("60-ffdist-rapl.rules", hw.unknown["rapl.package-0"])

    def test_registration_is_the_seed_s(self) -> None:
        self.machine("xeon-t4")
        hw = self.detect()
        self.assertEqual(
            hw.registration(),
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
        )
        self.assertEqual(list(hw.to_json())[:8], list(hw.registration()))

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
                kinds.setdefault("".join(char for char in path if not char.isdigit()), []).append(
                    path
                )
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
                    with self.subTest(
                        machine=text.stem, path=path, seed=SEED, damage=damage and damage[:40]
                    ):
                        self.check_answer(Host(str(self.tree), run))
                    place.write_bytes(whole)

    def check_answer(self, host: Host) -> None:
        hw = detect(host)
        answer = json.loads(json.dumps(hw.to_json(), allow_nan=False))
        self.assertIn(hw.node_type, ("laptop", "desktop", "server"))
        self.assertEqual(
            [problem for problem in hw.problems if not problem.startswith("nvidia-smi: 0,")], []
        )
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
        self.assertEqual(hw.problems, ["sensors: RuntimeError: a strange driver"])
        self.assertEqual((hw.cpu_threads, hw.node_type, len(hw.rapl)), (56, "server", 4))

    def test_each_field_has_one_detector(self) -> None:
        fields = [name for detector in hwdetect.DETECTORS for name in detector.fields]
        known = [row.name for row in dataclasses.fields(hwdetect.Hardware)]
        self.assertEqual(sorted(fields), sorted({*known} - {"unknown", "problems"}))
        self.machine("laptop-intel")
        survey = hwdetect.Survey(self.host(), hwdetect.Hardware(), False, None, None)
        for detector in hwdetect.DETECTORS:
            found = {name.partition(".")[0] for name in detector.detect(survey)} - {"problems"}
            self.assertLessEqual(found, {*detector.fields}, detector.name)

    def test_the_fields_of_a_detector_that_fails_say_so(self) -> None:
        class Broken(Host):
            def exists(self, path: str) -> bool:
                raise RuntimeError("a strange driver")

        hw = detect(Broken(str(self.tree)))
        self.assertIn("batteries: RuntimeError: a strange driver", hw.problems)
        self.expect(hw, has_battery=None, batteries=())
        self.assertEqual(hw.unknown["has_battery"], hwdetect.DETECTOR_FAILED)

    def test_nothing_of_this_machine_gets_into_an_empty_tree(self) -> None:
        hw = self.detect()
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
        self.expect(hw, disks=(), has_gpu=False, node_type="desktop")

    def test_links_do_not_lead_out_of_the_tree(self) -> None:
        (self.tree / "proc").mkdir()
        (self.tree / "proc/cpuinfo").symlink_to("/proc/cpuinfo")
        (self.tree / "proc/meminfo").symlink_to("../../../../../../../../proc/meminfo")
        (self.tree / "sys").symlink_to("/sys")
        hw = self.detect()
        self.expect(hw, cpu_model=None, cpu_logical=None, ram_bytes=None)

    def test_node_type_is_more_than_the_limits_and_a_battery_must_power_the_machine(self) -> None:
        def kind(threads: int, gib: float, supply: str = "") -> str:
            self.setUp()
            self.put("/sys/devices/system/cpu/online", f"0-{threads - 1}")
            self.put("/proc/meminfo", f"MemTotal: {int(gib * 2**20)} kB")
            self.put("/sys/class/power_supply/AC/type", "Mains")
            for word in filter(None, supply.split(",")):
                self.put(f"/sys/class/power_supply/B/{word.split('=')[0]}", word.split("=")[1])
            return self.detect().node_type

        self.assertEqual(kind(17, 32.1), "server")
        self.assertEqual(kind(16, 64), "desktop")
        self.assertEqual(kind(64, 32), "desktop")
        self.assertEqual(kind(64, 64, "type=Battery"), "laptop")
        self.assertEqual(kind(64, 64, "type=Battery,scope=System,present=1"), "laptop")
        self.assertEqual(kind(64, 64, "type=Battery,scope=Device"), "server")
        self.assertEqual(kind(64, 64, "type=Battery,present=0"), "server")
        self.assertEqual(kind(64, 64, "type=UPS"), "server")

    def test_affinity_and_quotas_of_every_level_count(self) -> None:
        self.put("/sys/devices/system/cpu/online", "0-63")
        self.put("/proc/self/status", "Name:\tx\nCpus_allowed_list:\t0-7,32-39")
        self.put("/proc/self/cgroup", "0::/a/b")
        self.put("/proc/self/mountinfo", "30 22 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
        self.assertEqual(self.detect().cpu_threads, 16)
        self.put("/sys/fs/cgroup/a/cpu.max", "250000 100000")
        self.put("/sys/fs/cgroup/a/b/cpu.max", "max 100000")
        self.assertEqual(self.detect().cpu_threads, 3)
        self.put("/sys/fs/cgroup/a/b/cpu.max", "5000 100000")
        self.assertEqual(self.detect().cpu_threads, 1)

    def test_two_nvidia_cards_and_an_intel_one(self) -> None:
        self.smi()
        self.put(
            "/recorded/nvidia-smi",
            ",".join(hwdetect.SMI_IDENTITY)
            + "\n"
            + "0, NVIDIA L4, GPU-0, 00000000:01:00.0, 550.1, 23034, 72.00\n"
            + "1, Tesla T4, GPU-1, 00000000:41:00.0, 550.1, [N/A], [Not Supported]",
        )
        self.pci("0000:00:02.0", "0x8086", "0x1234")
        self.pci("0000:01:00.0", "0x10de", "0x1234")
        self.pci("0000:41:00.0", "0x10de", "0x1234")
        hw = self.detect()
        self.assertEqual(hw.gpu_type, "NVIDIA L4 + NVIDIA Tesla T4 + Intel GPU 8086:1234")
        self.assertEqual(
            [(g.index, g.memory_bytes) for g in hw.gpus],
            [(0, 23034 * 2**20), (1, None), (None, None)],
        )


class Energy(TreeCase):
    """RAPL counters of trees that the test feeds give the known joules."""

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
        self.expect(first, energy_joules=0.0, power_watts=None, power_source="rapl")
        self.assertIn("first sample", first.unknown["power_watts"])
        self.expect(second, energy_joules=58.0, power_watts=29.0)
        self.assertEqual(
            second.zones,
            {
                "package-0": 30.0,
                "package-1": 20.0,
                "core-0": 20.0,
                "core-1": 0.0,
                "dram-0": 5.0,
                "dram-1": 3.0,
            },
        )

    def test_wrap_around(self) -> None:
        self.zone("intel-rapl:0", "package-0", RANGE_UJ - 3_000_000)
        *_, last = self.readings(dict(rapl_0=2_000_000), dict(rapl_0=4_000_000))
        self.expect(last, energy_joules=7.0, power_watts=2.0)

    def test_a_counter_that_was_reset_is_not_a_wrap(self) -> None:
        self.zone("intel-rapl:0", "package-0", 9_000_000)
        _, reset, last = self.readings(dict(rapl_0=0), dict(rapl_0=4_000_000))
        self.assertIn("reset", reset.unknown["zones.package-0"])
        self.assertEqual(last.energy_joules, 4.0)

    def test_a_counter_that_suspending_resets_is_not_a_wrap(self) -> None:
        """The counter stood near its end: as a wrap it would be 3,900 J in a second."""
        self.zone("intel-rapl:0", "package-0", RANGE_UJ - 3_940_000_000)
        used = [dict(rapl_0=RANGE_UJ - 3_940_000_000 + 20_000_000 * at) for at in (1, 2)]
        *_, reset, last = self.readings(*used, dict(rapl_0=1_000_000), dict(rapl_0=31_000_000))
        self.assertIn("reset", reset.unknown["zones.package-0"])
        self.expect(last, energy_joules=70.0, covered_s=3.0, power_watts=30.0)

    def test_a_counter_that_may_have_wrapped_twice_leaves_a_gap(self) -> None:
        """100 J at most, 60 J in each second: after a stop of 5 s it went round at least twice."""
        self.zone("intel-rapl:0", "package-0", 0, 100_000_000)
        sampler = self.sampler()
        sampler.sample(0.0)
        for now, counter in ((1.0, 60), (6.0, 60), (7.0, 20), (8.0, 80)):
            self.feed(rapl_0=counter * 1_000_000)
            last = sampler.sample(now)
            self.assertEqual(
                "more than once" in last.unknown.get("zones.package-0", ""), now == 6.0, now
            )
        self.expect(last, energy_joules=180.0, covered_s=3.0)

    def test_a_small_counter_is_read_between_two_samples(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0, 400_000_000)
        self.assertEqual(hwdetect.Sampler(Host("/nowhere")).patience_s, hwdetect.POLL_MAX_S)
        sampler = self.sampler()
        self.assertEqual(sampler.patience_s, 0.4)
        sampler.sample(0.0)
        for now, counter in ((0.3, 250), (0.6, 100), (0.9, 350)):  # round and round
            self.feed(rapl_0=counter * 1_000_000)
            sampler.between(now)
        self.feed(rapl_0=50_000_000)
        last = sampler.sample(1.0)
        self.expect(last, energy_joules=850.0, covered_s=1.0, power_watts=850.0)
        for now, counter in ((1.2, 0), (1.4, 90)):  # it was reset in between
            self.feed(rapl_0=counter * 1_000_000)
            with mock.patch("hwdetect.COUNTER_RESET_W", 1000):
                sampler.between(now)
        last = sampler.sample(2.0)
        self.expect(last, power_watts=None, covered_s=1.0)

    def test_counters_that_never_move_count_nothing(self) -> None:
        self.zone("intel-rapl:0", "package-0", 5)
        *_, last = still = self.readings(*[dict(rapl_0=5)] * 4, step_s=4.0)
        self.assertEqual([reading.energy_joules for reading in still], [0.0, 0.0, 0.0, None, None])
        self.assertIn("stand still", last.unknown["energy_joules"])
        *_, late = self.readings(*[dict(rapl_0=5)] * 4, dict(rapl_0=8_000_005), step_s=4.0)
        self.expect(late, energy_joules=8.0, power_watts=2.0, power_source="rapl")

    def test_zones_that_come_later_count_from_then_on(self) -> None:
        """A driver is loaded while it runs; a zone that goes away is still missed."""
        sampler = self.sampler()
        self.assertIn("powercap is missing", sampler.sample(0.0).unknown["energy_joules"])
        self.zone("intel-rapl:0", "package-0", 7_000_000)
        self.assertEqual(sampler.sample(1.0).energy_joules, 0.0)
        self.feed(rapl_0=17_000_000)
        self.assertEqual(
            (lambda r: (r.energy_joules, r.power_watts))(sampler.sample(2.0)), (10.0, 10.0)
        )
        self.zone("intel-rapl:1", "package-1", 5_000_000)
        self.feed(rapl_0=27_000_000)
        half = sampler.sample(3.0)
        self.feed(rapl_0=37_000_000, rapl_1=9_000_000)
        last = sampler.sample(4.0)
        self.assertEqual(
            (half.power_watts, last.power_watts, last.energy_joules, last.covered_s),
            (None, 14.0, 34.0, 2.0),
        )
        shutil.rmtree(self.tree / "sys/class/powercap/intel-rapl:1")
        self.assertIn("missing", sampler.sample(5.0).unknown["zones.package-1"])

    def test_psys_includes_the_package(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0)
        self.zone("intel-rapl:0:0", "dram", 0)
        self.zone("intel-rapl:1", "psys", 7)
        *_, last = self.readings(dict(rapl_0=5_000_000, rapl_0_0=1_000_000, rapl_1=12_000_007))
        self.expect(last, energy_joules=12.0, power_watts=12.0)
        self.assertEqual(last.zones, {"dram-0": 1.0, "package-0": 5.0, "psys": 12.0})

    def test_psys_that_is_not_wired_up_does_not_count(self) -> None:
        self.zone("intel-rapl:0", "package-0", 10)
        self.zone("intel-rapl:1", "psys", 0)
        *_, last = self.readings(dict(rapl_0=5_000_010))
        self.assertEqual(last.energy_joules, 5.0)

    def test_psys_of_another_socket_is_psys(self) -> None:
        """intel_rapl_common.c names it after the socket that has it, if that is not the first."""
        for socket in (0, 1):
            self.zone(f"intel-rapl:{socket}", f"package-{socket}", socket)
        self.zone("intel-rapl:2", "psys-1", 9)
        *_, last = self.readings(dict(rapl_0=5_000_000, rapl_1=6_000_001, rapl_2=20_000_009))
        self.assertEqual((last.energy_joules, last.zones["psys-1"]), (20.0, 20.0))

    def test_mmio_repeats_the_package(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0)
        self.zone("intel-rapl-mmio:0", "package-0", 0)
        *_, last = self.readings(dict(rapl_0=5_000_000, mmio_0=4_999_000))
        self.expect(last, energy_joules=5.0, zones={"package-0": 5.0})

    def test_psys_below_its_parts_does_not_count(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0)
        self.zone("intel-rapl:1", "psys", 7)
        *_, last = self.readings(dict(rapl_0=9_000_000, rapl_1=2_000_007))
        self.assertEqual(last.energy_joules, 9.0)

    def test_one_socket_of_two_is_not_a_total(self) -> None:
        for socket in (0, 1):
            self.zone(f"intel-rapl:{socket}", f"package-{socket}", 0)
        (self.tree / "sys/class/powercap/intel-rapl:1/energy_uj").chmod(0)
        *_, last = self.readings(dict(rapl_0=4_000_000))
        self.assertIsNone(last.energy_joules)
        self.assertIn("intel-rapl:1", last.unknown["energy_joules"])

    def test_psys_alone_that_cannot_be_read_is_not_a_total(self) -> None:
        self.zone("intel-rapl:0", "psys", 7)
        (self.tree / "sys/class/powercap/intel-rapl:0/energy_uj").chmod(0)
        reading = self.sampler().sample(0.0)
        self.assertIsNone(reading.energy_joules)
        self.assertIn("permission denied", reading.unknown["energy_joules"])

    def test_a_figure_of_the_whole_machine_includes_its_gpus(self) -> None:
        for psys, total in ((False, 41.0), (True, 12.0)):
            self.setUp()
            self.machine("desktop-amdgpu")
            self.zone("intel-rapl:0", "package-0", 0)
            self.feed(rapl_0=0)
            if psys:
                self.zone("intel-rapl:7", "psys", 7)
            *_, last = self.readings(
                dict(rapl_0=10_000_000, **({"rapl_7": 12_000_007} if psys else {}))
            )
            self.assertEqual(
                (last.total_watts, [gpu.in_package for gpu in last.gpus]), (total, [psys])
            )

    def test_mmio_alone_counts(self) -> None:
        self.zone("intel-rapl-mmio:0", "package-0", 0)
        *_, last = self.readings(dict(mmio_0=5_000_000))
        self.assertEqual(last.energy_joules, 5.0)

    def test_mirrored_dies_are_one_die(self) -> None:
        for names in (("package-0", "package-1"), ("package-0-die-0", "package-0-die-1")):
            self.setUp()
            self.zone("intel-rapl:0", names[0], 1_000_000, 65532610987)
            self.zone("intel-rapl:1", names[1], 1_000_000, 65532610987)
            *_, last = self.readings(
                dict(rapl_0=4_000_000, rapl_1=4_000_000), dict(rapl_0=6_500_000, rapl_1=6_500_000)
            )
            self.expect(last, energy_joules=5.5, zones={names[0]: 5.5})
            self.assertIn(names[0], last.unknown[f"zones.{names[1]}"])

    def test_equal_counters_of_intel_sockets_are_two_sockets(self) -> None:
        self.put("/proc/cpuinfo", "vendor_id\t: GenuineIntel")
        for socket in (0, 1):
            self.zone(f"intel-rapl:{socket}", f"package-{socket}", 0)
        *_, last = self.readings(dict(rapl_0=4_000_000, rapl_1=4_000_000))
        self.assertEqual(last.energy_joules, 8.0)

    def test_zones_of_one_name_are_kept_apart(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0)
        self.zone("intel-rapl:1", "package-0", 0)
        *_, last = self.readings(dict(rapl_0=4_000_000, rapl_1=1_000_000))
        self.assertEqual((last.energy_joules, sorted(last.zones.values())), (5.0, [1.0, 4.0]))

    def test_a_sample_that_could_not_be_read_is_made_up_for_by_the_next(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0)
        sampler = self.sampler()
        sampler.sample(0.0)
        (self.tree / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
        self.assertEqual(
            (sampler.sample(1.0).energy_joules, sampler.sample(2.0).power_watts), (0.0, None)
        )
        self.feed(rapl_0=6_000_000)
        last = sampler.sample(3.0)
        self.expect(last, energy_joules=6.0, power_watts=2.0)

    def test_a_counter_that_goes_away_leaves_a_gap_until_it_is_back(self) -> None:
        """Half a machine is no figure of it: power is unknown, and the joules are of less time."""
        for socket in (0, 1):
            self.zone(f"intel-rapl:{socket}", f"package-{socket}", socket * 500)
        sampler = self.sampler()
        sampler.sample(0.0)
        self.feed(rapl_0=10_000_000, rapl_1=20_000_500)
        whole = sampler.sample(1.0)
        self.expect(whole, power_watts=30.0, energy_joules=30.0, covered_s=1.0)
        (self.tree / "sys/class/powercap/intel-rapl:1/energy_uj").unlink()
        self.feed(rapl_0=20_000_000)
        half = sampler.sample(2.0)
        self.expect(half, power_watts=None, covered_s=1.0)
        self.assertIn("missing: /sys", half.unknown["zones.package-1"])
        self.feed(rapl_0=30_000_000, rapl_1=60_000_500)
        back = sampler.sample(3.0)
        self.expect(back, power_watts=30.0, energy_joules=90.0, covered_s=3.0)
        self.feed(rapl_0=31_000_000, rapl_1=0)
        reset = sampler.sample(4.0)
        self.expect(reset, power_watts=None, covered_s=3.0)
        self.feed(rapl_0=32_000_000, rapl_1=2_000_000)
        self.assertEqual(
            (sampler.sample(5.0).power_watts, sampler.sample(5.0).covered_s), (3.0, 4.0)
        )

    def test_permission_denied_names_the_lasting_fix(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0)
        (self.tree / "sys/class/powercap/intel-rapl:0/energy_uj").chmod(0)
        reading = self.sampler().sample(0.0)
        self.assertIsNone(reading.energy_joules)
        self.assertRegex(
            reading.unknown["energy_joules"],
            "permission denied: /sys/.*rules.d/60-ffdist-rapl.rules",
        )


class OtherSources(TreeCase):
    """Power of machines without RAPL, and the load of all."""

    def test_a_power_meter_is_integrated(self) -> None:
        self.put("/sys/class/hwmon/hwmon0/name", "power_meter")
        self.put("/sys/class/hwmon/hwmon0/power1_average", 100_000_000)
        sampler = self.sampler()
        sampler.sample(0.0)
        self.put("/sys/class/hwmon/hwmon0/power1_average", 200_000_000)
        reading = sampler.sample(2.0)
        self.expect(reading, energy_joules=300.0, power_watts=200.0, power_source="hwmon")

    def test_a_battery_measures_only_while_it_discharges(self) -> None:
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
        self.expect(reading, energy_joules=120.0, power_watts=12.0, power_source="battery")
        self.put(f"{base}/status", "Full")
        self.assertIn(
            "only while it alone powers the machine", sampler.sample(11.0).unknown["energy_joules"]
        )
        self.put(f"{base}/status", "Discharging")
        self.assertEqual(
            sampler.sample(71.0).energy_joules, 120.0, "a minute on mains is no discharge"
        )
        self.put(f"{base}/power_now", 20_000_000)
        self.assertEqual(sampler.sample(72.0).energy_joules, 136.0)

    def test_a_battery_beside_mains_or_without_a_reading_does_not_count(self) -> None:
        for supply, name, value in (
            ("AC", "type", "Mains"),
            ("AC", "online", 0),
            ("BAT0", "type", "Battery"),
            ("BAT0", "status", "Discharging"),
            ("BAT0", "power_now", 9_000_000),
            ("BAT1", "type", "Battery"),
            ("BAT1", "status", "Not charging"),
        ):
            self.put(f"/sys/class/power_supply/{supply}/{name}", value)
        sampler = self.sampler()
        found = [sampler.sample(0.0).power_watts]
        for at, (path, value) in enumerate(
            (
                ("AC/online", 1),
                ("AC/online", 0),
                ("BAT0/power_now", 0),
                ("BAT0/current_now", -2_000_000),
                ("BAT0/voltage_now", 11_000_000),
                ("BAT1/status", "Discharging"),
                ("BAT1/power_now", 3_000_000),
            ),
            1,
        ):
            self.put(f"/sys/class/power_supply/{path}", value)
            found.append(sampler.sample(float(at)).power_watts)
        self.assertEqual(found, [9.0, None, 9.0, None, None, 22.0, None, 25.0])

    def test_a_battery_that_shows_only_its_charge(self) -> None:
        """Steps of 10 mWh, which are 36 J, every 3 s: 12 W."""
        base = "/sys/class/power_supply/BAT0"
        for name, value in (
            ("type", "Battery"),
            ("status", "Discharging"),
            ("energy_now", 40_000_000),
        ):
            self.put(f"{base}/{name}", value)
        sampler = self.sampler()
        first = sampler.sample(0.0)
        self.expect(first, power_watts=None, energy_joules=0.0, power_source="battery")
        self.assertIn("what is left", first.unknown["power_watts"])
        found = []
        for at in range(1, 13):
            self.put(f"{base}/energy_now", 40_000_000 - 10_000 * ((at + 1) // 3))
            last = sampler.sample(float(at))
            found.append(last.power_watts and round(last.power_watts, 6))
        self.assertEqual(found, [None] * 4 + [12.0] * 8)
        self.expect(last, energy_joules=144.0, covered_s=12.0)
        self.put(f"{base}/status", "Charging")
        self.assertIsNone(sampler.sample(13.0).energy_joules)
        self.put(f"{base}/status", "Discharging")
        self.assertEqual(
            (lambda r: (r.energy_joules, r.covered_s))(sampler.sample(14.0)), (144.0, 12.0)
        )

    def test_a_power_meter_without_a_reading_or_of_zero_does_not_count(self) -> None:
        for meter in (0, 1):
            self.put(f"/sys/class/hwmon/hwmon{meter}/name", "power_meter")
            self.put(f"/sys/class/hwmon/hwmon{meter}/power1_average", 100_000_000)
        sampler = self.sampler()
        self.assertEqual(sampler.sample(0.0).power_watts, 200.0)
        for words in ("0", "", "unknown"):
            self.put("/sys/class/hwmon/hwmon1/power1_average", words)
            reading = sampler.sample(1.0)
            self.assertEqual((reading.power_watts, reading.energy_joules), (None, None), words)
            self.assertIn("has no reading now", reading.unknown["energy_joules"])

    def test_ina3221_of_a_whole_module_and_of_parts(self) -> None:
        """ina3221.rst: mV and mA of three channels, and in 4 the sum of the currents."""
        cases = {
            ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"): 15.0,
            ("VDD_CPU", "VDD_GPU", "NC"): None,
            ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"): 24.0,
        }
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
            self.expect(last, power_watts=watts, energy_joules=watts and 2 * watts)
            if watts is None:
                words = "have sensors: scmi_sensors BIG, ina3221 VDD_CPU, ina3221"
                self.assertIn(words, last.unknown["energy_joules"])

    def test_a_model_is_used_only_where_it_is_given_and_nothing_measures(self) -> None:
        def sampled(model: tuple[float, float] | None) -> Reading:
            self.put("/proc/stat", "cpu  100 0 0 100 0 0 0 0 0 0")
            sampler = Sampler(self.host(), model=model)
            sampler.sample(0.0)
            self.put("/proc/stat", "cpu  150 0 0 250 0 0 0 0 0 0")  # 50 of 200 ticks
            return sampler.sample(4.0)

        self.assertIsNone(sampled(None).energy_joules)
        last = sampled((20.0, 100.0))
        self.expect(last, power_watts=40.0, energy_joules=160.0, power_source="model")
        self.zone("intel-rapl:0", "package-0", 0)
        self.assertEqual(sampled((20.0, 100.0)).power_source, "rapl")

    def test_the_first_source_that_answers_is_used_and_the_others_pause(self) -> None:
        """While the meter answers nobody asks the battery, whose joules then lack that time."""
        self.put("/sys/class/hwmon/hwmon0/name", "power_meter")
        meter = "/sys/class/hwmon/hwmon0/power1_average"
        base = "/sys/class/power_supply/BAT0"
        for name, value in (
            ("type", "Battery"),
            ("status", "Discharging"),
            ("power_now", 9_000_000),
        ):
            self.put(f"{base}/{name}", value)
        self.put(meter, 50_000_000)
        sampler = self.sampler()
        found = []
        for now, words in enumerate(("", "", 50_000_000, 50_000_000, "", "")):
            self.put(meter, words)
            reading = sampler.sample(float(now))
            found.append((reading.power_source, reading.power_watts, reading.energy_joules))
        self.assertEqual(
            found,
            [
                ("battery", 9.0, 0.0),
                ("battery", 9.0, 9.0),
                ("hwmon", 50.0, 0.0),
                ("hwmon", 50.0, 50.0),
                ("battery", 9.0, 9.0),
                ("battery", 9.0, 18.0),
            ],
        )

    def test_a_source_is_a_class_and_a_row(self) -> None:
        class Plug(hwdetect.PowerSource):
            name = "plug"
            resolution = "a smart plug, once a second"

            def sample(
                self, now: float, cpu_percent: float | hwdetect.Unknown
            ) -> hwdetect.PowerReading:
                return hwdetect.PowerReading(80 * now, 80.0, now)

        with mock.patch("hwdetect.MACHINE_SOURCES", (hwdetect.RaplSource, Plug)):
            reading = Sampler(self.host()).sample(3.0)
        self.expect(
            reading, power_source="plug", energy_joules=240.0, power_watts=80.0, covered_s=3.0
        )

    def test_throttling_by_heat_is_counted(self) -> None:
        sampler = self.sampler()
        self.assertIsNone(sampler.throttles())
        for cpu in (0, 1):
            base = f"/sys/devices/system/cpu/cpu{cpu}/thermal_throttle"
            self.put(f"{base}/core_throttle_count", 3 + cpu)
            self.put(f"{base}/package_throttle_count", 10)
        self.assertEqual(sampler.throttles(), 27)

    def test_cpu_memory_and_temperature(self) -> None:
        self.machine("desktop-amdgpu")
        sampler = self.sampler()
        first = sampler.sample(0.0)
        self.assertIn("first sample", first.unknown["cpu_usage"])
        self.expect(first, temperature_c=44.375, memory_used_bytes=(32794112 - 28000000) * 1024)
        self.put("/proc/stat", "cpu  180 0 80 99075 225 0 5 0 0 0")  # 100 busy of 200 ticks
        self.assertEqual(sampler.sample(1.0).cpu_usage, 50.0)


class Graphics(TreeCase):
    """Power and load of GPUs."""

    def test_amdgpu(self) -> None:
        self.machine("desktop-amdgpu")
        sampler = self.sampler()
        sampler.sample(0.0)
        gpu = sampler.sample(4.0).gpus[0]
        self.expect(
            gpu,
            power_watts=31.0,
            energy_joules=124.0,
            usage=3.0,
            temperature_c=41.0,
            source="gpu-hwmon",
            in_package=False,
        )

    def test_intel_gpu_s_counter_of_the_card_or_else_of_its_package(self) -> None:
        card = "/sys/bus/pci/devices/0000:03:00.0"
        self.pci("0000:03:00.0", "0x8086", "0x56a0")
        for counters in ((2,), (2, 1)):
            for number in counters:  # the card's holds the package's
                self.put(f"{card}/hwmon/hwmon3/energy{number}_input", 1_000_000 * number)
            sampler = self.sampler()
            sampler.sample(0.0)
            self.put(f"{card}/hwmon/hwmon3/energy{counters[-1]}_input", 9_000_000)
            gpu = sampler.sample(2.0).gpus[0]
            self.expect(gpu, energy_joules=9.0 - counters[-1], covered_s=2.0)
            self.put(f"{card}/hwmon/hwmon3/energy{counters[-1]}_input", 0)
            gpu = sampler.sample(4.0).gpus[0]
            self.assertEqual(
                (gpu.energy_joules, gpu.covered_s), (9.0 - counters[-1], 2.0), "it was reset"
            )

    def test_nvidia_over_its_own_time_stamps(self) -> None:
        """An older driver, which does not know utilization.encoder."""
        row = {"temperature.gpu": "41", "clocks_throttle_reasons.active": "0x0000000000000020"}
        self.smi_prints(row, stamp="14:23:11.000", watts="30.00", without="utilization.encoder")
        sampler = self.sampler()
        wait_for(lambda: self.gpu(sampler).energy_joules is not None, why="a first line")
        self.smi_prints(row, stamp="14:23:13.000", watts="50.00", without="utilization.encoder")
        wait_for(lambda: self.gpu(sampler).energy_joules == 80.0, why="2 s of 40 W in the mean")
        self.smi_prints(row, stamp="14:23:14.500", watts="[N/A]", without="utilization.encoder")
        wait_for(lambda: self.gpu(sampler).power_watts is None, why="power unknown")
        reading = sampler.sample(0.0)
        self.expect(
            reading.gpus[0],
            energy_joules=80.0,
            covered_s=2.0,
            usage=17.0,
            encoder_usage=None,
            memory_used_bytes=100 * 2**20,
            too_hot=True,
        )
        self.assertIn("[N/A]", reading.unknown["gpus.0.power_watts"])
        stream = stream_of(sampler)
        sampler.close()
        with self.assertRaises(ProcessLookupError):
            os.kill(stream.pid, 0)

    def gpu(self, sampler: Sampler, now: float = 0.0) -> hwdetect.GpuReading:
        return sampler.sample(now).gpus[0]

    def smi_prints(
        self, *gpus: dict[str, str], stamp: str, watts: str, without: str = "", day: str = "05/17"
    ) -> None:
        """Let the stand-in print a line for each GPU, at 0000:3B:00.0 and so on."""
        self.smi()
        table: list[str] = []
        for index, gpu in enumerate(gpus or ({},)):
            row = {
                "index": str(index),
                "name": "L4",
                "uuid": "GPU-0",
                "pci.bus_id": f"00000000:{0x3B + index:X}:00.0",
                "driver_version": "535",
                "memory.total": "23034",
                "power.limit": "72.00",
                "timestamp": f"2023/{day} {stamp}",
                "power.draw": watts,
                "utilization.gpu": "17",
                "utilization.encoder": "0",
                "memory.used": "100",
                "temperature.gpu": "41",
                "clocks_throttle_reasons.active": "0x0",
                **gpu,
            }
            row.pop(without, None)
            table = table or [",".join(row)]
            table.append(", ".join(row.values()))
        self.put("/recorded/nvidia-smi", "\n".join(table))

    def test_a_driver_without_power_is_asked_no_more(self) -> None:
        """Without a field that is needed there is nothing to ask for."""
        self.smi_prints(stamp="14:23:11.000", watts="30.00", without="power.draw")
        sampler = self.sampler()
        ended = "nvidia-smi ended: Field"
        wait_for(lambda: ended in sampler.sample(0.0).unknown["gpus.0"], why="its end is noticed")
        self.expect(self.gpu(sampler, 1.0), power_watts=None, source=None)
        with self.assertRaises(AssertionError):
            stream_of(sampler)

    def test_nvidia_rows_out_of_order_are_left_out(self) -> None:
        self.smi_prints(stamp="14:23:10.000", watts="30.00")
        sampler = self.sampler()
        wait_for(lambda: self.gpu(sampler).power_watts == 30.0, why="a first line")
        for stamp, watts in (("14:23:08.000", 90.0), ("14:23:12.000", 30.01)):
            self.smi_prints(stamp=stamp, watts=f"{watts:.2f}")
            wait_for(lambda watts=watts: self.gpu(sampler).power_watts == watts, why=stamp)
        gpu = self.gpu(sampler)
        self.assertEqual((round(gpu.energy_joules or 0, 3), gpu.covered_s), (60.01, 2.0))

    def test_the_figures_of_an_nvidia_smi_that_hangs_expire(self) -> None:
        self.smi_prints(stamp="14:23:10.000", watts="30.00")
        sampler = self.sampler()
        wait_for(lambda: self.gpu(sampler).power_watts == 30.0, why="a first line")
        stream = stream_of(sampler)
        os.kill(stream.pid, signal.SIGSTOP)
        sampler.sample(1.0)
        reading = sampler.sample(20.0)
        self.expect(reading.gpus[0], power_watts=None, source=None)
        self.assertIn("printed nothing for", reading.unknown["gpus.0"])
        os.kill(stream.pid, signal.SIGCONT)
        wait_for(lambda: self.gpu(sampler, 21.0).power_watts == 30.0, why="it goes on")

    def test_an_nvidia_driver_that_came_late_is_found_by_its_address(self) -> None:
        """nvidia-smi failed when the machine was detected, so its cards have no index."""
        for address in ("0000:3b:00.0", "0000:3c:00.0"):
            self.pci(address, "0x10de", "0x1234")
        hw = self.detect()
        self.assertEqual([gpu.index for gpu in hw.gpus], [None, None])
        self.smi_prints({}, {"power.draw": "70.00"}, stamp="14:23:10.000", watts="30.00")
        sampler = Sampler(self.host(), hw, smi_interval_ms=10)
        self.addCleanup(sampler.close)
        wait_for(
            lambda: [gpu.power_watts for gpu in sampler.sample(0.0).gpus] == [30.0, 70.0],
            why="both",
        )

    def test_nvidia_smi_whose_clock_is_set_or_that_ends(self) -> None:
        """Its stamps are local time: the hour that summer time skips is not integrated."""
        self.smi_prints(stamp="01:59:59.000", watts="30.00", day="03/26")
        sampler = self.sampler()
        wait_for(lambda: self.gpu(sampler).power_watts == 30.0, why="a first line")
        self.smi_prints(stamp="03:00:00.000", watts="50.00", day="03/26")
        wait_for(lambda: self.gpu(sampler).power_watts == 50.0, why="a line of summer time")
        self.smi_prints(stamp="03:00:02.000", watts="52.00", day="03/26")
        wait_for(lambda: self.gpu(sampler).power_watts == 52.0, why="a line 2 s later")
        self.expect(self.gpu(sampler), energy_joules=102.0, covered_s=2.0)

        os.kill(stream_of(sampler).pid, signal.SIGKILL)
        wait_for(lambda: self.gpu(sampler, 1.0).source is None, why="its end is noticed")
        self.assertIn("nvidia-smi ended", sampler.sample(2.0).unknown["gpus.0"])
        wait_for(lambda: self.gpu(sampler, 62.0).source == "nvidia-smi", why="it is started again")
        self.assertEqual(self.gpu(sampler, 62.0).energy_joules, 102.0)


class Watch(TreeCase):
    """`hwdetect.py --watch` as a process."""

    def watch(self, interval: str) -> subprocess.Popen[str]:
        """Start it on the tree; it is killed at the deadline, or when the test ends."""
        argv = [sys.executable, "-W", "error", str(TOP / "hwdetect.py"), "--root", str(self.tree)]
        process = subprocess.Popen(
            [*argv, "--watch", interval, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=interruptible,
        )
        guard = threading.Timer(DEADLINE_S, process.kill)
        guard.start()
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        self.addCleanup(guard.cancel)
        return process

    def readings(self, process: subprocess.Popen[str]) -> Iterator[dict[str, object]]:
        assert process.stdout is not None
        return map(json.loads, process.stdout)

    def test_a_tree_that_is_fed(self) -> None:
        self.zone("intel-rapl:0", "package-0", RANGE_UJ - 1_000_000)
        process = self.watch("20ms")
        readings = self.readings(process)
        first = next(readings)
        names = ["time", "cpu_usage", "power_watts", "energy_joules", "zones", "unknown"]
        self.assertEqual(list(first)[:6], names)
        self.assertRegex(str(first["time"]), r"^\d{4}-\d\d-\d\dT[\d:.]+Z$")
        self.assertEqual((first["energy_joules"], first["power_watts"]), (0.0, None))
        self.assertEqual(first["zones"], {"package-0": 0.0})

        self.feed(rapl_0=4_000_000)
        found = (reading for reading in readings if reading["energy_joules"] == 5.0)
        self.assertIsNotNone(next(found, None), "the 5 joules never came")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        self.assertEqual((process.returncode, errors), (130, ""))

    def test_missed_turns_are_left_out(self) -> None:
        """After a stop of ten turns the next readings are a turn apart again, not all at once."""
        process = self.watch("50ms")
        readings = self.readings(process)
        next(readings)
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        times = [str(next(readings)["time"]) for _ in range(8)]
        moments = [datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ") for text in times]
        self.assertGreater((moments[7] - moments[1]).total_seconds(), 5 * 0.05)


class Processes(TreeCase):
    """Process groups from /proc/PID/stat."""

    def process(
        self, pid: int, comm: str, group: int, ticks: Sequence[int] = (0, 0, 0, 0), start: int = 77
    ) -> None:
        numbers = [
            1,
            group,
            group,
            0,
            -1,
            4194304,
            10,
            0,
            0,
            0,
            *ticks,
            20,
            0,
            1,
            0,
            start,
            999,
            25,
        ]
        self.put(f"/proc/{pid}/stat", f"{pid} ({comm}) S " + " ".join(map(str, numbers)))
        self.put(f"/proc/{pid}/status", "Name:\tx\nVmRSS:\t    1024 kB")

    def test_a_group_is_summed_whatever_its_names(self) -> None:
        self.process(10, "ffmpeg", 10, (100, 50, 7, 3))
        self.process(11, "a) R 1 99 (b c", 10, (40, 0, 0, 0), start=1234)
        self.process(12, "other", 12, (999, 0, 0, 0))
        self.put("/proc/13/stat", "garbled")
        host = self.host()
        self.assertEqual(
            hwdetect.process_group(host, 10), hwdetect.ProcessUsage(2.0, 2 * 2**20, (10, 11))
        )
        self.assertEqual(
            (hwdetect.process_started(host, 11), hwdetect.process_started(host, 13)), (1234, None)
        )
        self.assertEqual(hwdetect.process_group(host, 5), hwdetect.ProcessUsage(0.0, 0, ()))

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
            self.assertEqual(usage.pids, (process.pid,))
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
        self.put(
            "/proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate"
        )
        self.put("/proc/self/cgroup", "0::/system.slice/ffdist.service")
        self.put("/sys/fs/cgroup/system.slice/cgroup.controllers", "cpu memory")
        self.put("/sys/fs/cgroup/system.slice/cgroup.subtree_control", subtree)
        self.put("/sys/fs/cgroup/system.slice/ffdist.service/cgroup.controllers", "")
        self.put("/sys/fs/cgroup/system.slice/ffdist.service/memory.max", 900 << 20)
        return KernelStandIn(str(self.tree))

    def words(self, folder: str, name: str) -> str:
        return (self.tree / f"sys/fs/cgroup/{folder}/{name}").read_text(encoding="utf-8").strip()

    def test_version_2_has_one_group_beside_the_agents_own(self) -> None:
        group = hwdetect.ControlGroup(self.version_2("cpu memory"), "job-1")
        found = [group.limit("memory", 64 << 20), group.limit("cpu", 50_000)]
        self.assertEqual(found, ["cgroup v2", "cgroup v2"])
        found = [self.words("system.slice/ffdist-job-1", name) for name in KernelStandIn.FILES[1:4]]
        self.assertEqual(found, [str(64 << 20), "0", "50000 100000"])
        self.assertTrue(group.take("memory", 4711))
        self.assertEqual(self.words("system.slice/ffdist-job-1", "cgroup.procs"), "4711")
        self.assertIn("/sys/fs/cgroup/system.slice/ffdist-job-1", group.folders)
        self.assertFalse(group.killed())
        self.put(
            "/sys/fs/cgroup/system.slice/ffdist-job-1/memory.events", "low 0\noom 1\noom_kill 1"
        )
        self.assertTrue(group.killed())
        group.remove()
        self.assertFalse((self.tree / "sys/fs/cgroup/system.slice/ffdist-job-1").exists())

    def test_version_2_enables_a_controller_and_keeps_the_agents_own_limit(self) -> None:
        group = hwdetect.ControlGroup(self.version_2("cpu"), "job-1")
        self.assertEqual(group.limit("memory", 2000 << 20), "cgroup v2")
        self.assertEqual(self.words("system.slice", "cgroup.subtree_control")[:7], "+memory")
        self.assertEqual(self.words("system.slice/ffdist-job-1", "memory.max"), str(900 << 20))

    def test_a_limit_that_cannot_be_set_leaves_no_group(self) -> None:
        host = self.version_2("cpu memory")
        host.FILES = ("cgroup.procs",)
        group = hwdetect.ControlGroup(host, "job-1")
        self.assertEqual(
            (group.limit("memory", 64 << 20), group.limit("cpu", 50_000)), (None, None)
        )
        self.assertFalse(group.take("memory", 1))
        self.assertFalse((self.tree / "sys/fs/cgroup/system.slice/ffdist-job-1").exists())

    def test_a_machine_without_control_groups_has_none(self) -> None:
        group = hwdetect.ControlGroup(self.host(), "job-1")
        self.assertIsNone(group.limit("cpu", 50_000))
        self.assertFalse(group.take("cpu", 1))
        group.remove()

    def test_only_groups_of_ours_are_removed(self) -> None:
        for name in ("ffdist-job-1", "system.slice"):
            (self.tree / "sys/fs/cgroup" / name).mkdir(parents=True)
        hwdetect.remove_groups(
            self.host(), ["/sys/fs/cgroup/ffdist-job-1", "/sys/fs/cgroup/system.slice"]
        )
        self.assertEqual(
            [path.name for path in (self.tree / "sys/fs/cgroup").iterdir()], ["system.slice"]
        )

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
        for name in (
            "PROBE_TOTAL_S",
            "PROBE_EACH_S",
        ):  # on a busy machine the time for all may run out
            patch = mock.patch(f"hwdetect.{name}", 120.0)
            patch.start()
            self.addCleanup(patch.stop)
        hw = detect(Host("/", run), state_dir=state)
        self.assertIn("libx264", hw.proved())
        self.assertNotIn("libx264", hw.unknown)
        if "h264_nvenc" in hw.encoders and not hw.has_gpu:
            self.assertRegex(hw.encoders["h264_nvenc"].why, "^[^\\n\\[]{5,160}$")
        probed = sum("lavfi" in argv for argv in calls)
        self.assertEqual(probed, len(hw.encoders))
        again = detect(Host("/", run), state_dir=state)
        self.assertEqual(again.encoders, hw.encoders)
        self.assertEqual(sum("lavfi" in argv for argv in calls), probed)
        self.assertEqual(os.stat(Path(state) / "encoders.json").st_mode & 0o777, 0o600)


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
        self.assertEqual(hw.encoder_reasons(), {"libx264": None, "h264_vaapi": "No device"})
        self.assertEqual(
            (hw.ffmpeg_version, hw.filters, self.tries), ("9.1", ("psnr", "libvmaf"), 2)
        )
        self.look()
        self.assertEqual(self.tries, 2)
        self.version = "9.2"
        self.look()
        self.assertEqual(self.tries, 4)
        os.utime(self.ffmpeg, (1, 1))
        self.look()
        self.assertEqual(self.tries, 6)

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
            self.assertEqual(self.look().encoders["h264_vaapi"].why, "No device")

    def test_a_probe_that_ran_out_of_time_is_not_kept(self) -> None:
        self.failure = Result(None, "", "no answer within 4.0 s", timed_out=True)
        self.assertIn("no answer", str(self.look().encoders["h264_vaapi"]))
        self.look()
        self.assertEqual(self.tries, 4)

    def test_a_state_folder_that_cannot_be_written_is_a_problem(self) -> None:
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
            [sys.executable, "-W", "error", str(TOP / "hwdetect.py"), *argv],
            text=True,
            capture_output=True,
            timeout=30,
            env={**os.environ, **environment},
        )

    def test_json_of_a_real_process(self) -> None:
        done = self.process("--json", "--no-probe")
        self.expect(done, returncode=0, stderr="")
        answer = json.loads(done.stdout)
        self.assertEqual(list(answer)[:8], list(hwdetect.Hardware().registration()))
        self.assertEqual(
            answer["cpu_threads"],
            len(os.sched_getaffinity(0))
            if answer["cgroup"]["cpus"] is None
            else answer["cpu_threads"],
        )
        self.assertIn("no-probe", answer["unknown"].get("encoders", "no-probe"))

    def test_environment_and_flag(self) -> None:
        self.machine("vm-bare")
        done = self.process(FFDIST_ROOT=str(self.tree), FFDIST_JSON="1")
        self.assertEqual(json.loads(done.stdout)["address"], "vm-7")
        other = tempfile.mkdtemp(dir=self.tree)
        done = self.process("--root", other, FFDIST_ROOT=str(self.tree), FFDIST_JSON="1")
        self.assertIsNone(json.loads(done.stdout)["address"])

    def test_page_of_every_machine(self) -> None:
        for text in MACHINES:
            with self.subTest(machine=text.stem):
                self.setUp()
                self.machine(text.stem)
                code, out, err = self.call("--root", str(self.tree))
                self.assertEqual((code, err), (0, ""))
                self.assertNotIn("None", out)
                self.assertRegex(out, r"(?m)^Processor    \S")

    def test_intervals(self) -> None:
        """--watch alone takes milliseconds, and each refusal is the same sentence."""
        for text, seconds in (("500ms", 0.5), ("10ms", 0.01), ("1m30s", 90.0), ("1d", 86400.0)):
            self.assertEqual(hwdetect.interval(text), seconds)
        for text in ("0", "1ms", "25h", "soon", "-1s", "ms"):
            with self.assertRaises(argparse.ArgumentTypeError) as caught:
                hwdetect.interval(text)
            self.assertEqual(
                str(caught.exception),
                f"invalid interval '{text}': expected 10ms to 1d, such as 1s or 500ms",
            )

    def test_help_names_its_values_as_the_readme_does(self) -> None:
        code, out, err = self.call("--help")
        self.assertEqual((code, err), (0, ""))
        rows = re.findall(r"(?m)^\| `(--[a-z-]+ [A-Z]+)` \|", (TOP / "README.md").read_text())
        self.assertIn("--watch INTERVAL", rows)
        for row in rows:
            self.assertIn(f"[{row}]", out)

    def test_an_answer_that_cannot_be_written_is_an_error_in_a_sentence(self) -> None:
        full = "hwdetect.py: standard output: no space left on device\n"
        closed = "hwdetect.py: standard output: it is closed: send it to a file, or to /dev/null\n"
        modes = ("--json --no-probe", "--no-probe", "--record -", "--watch 10ms")
        for mode in modes:
            for redirection, sentence in ((">/dev/full", full), (">&-", closed)):
                line = f"exec {sys.executable} {TOP / 'hwdetect.py'} {mode} {redirection}"
                done = subprocess.run(
                    ["sh", "-c", line], stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S
                )
                self.assertEqual((done.returncode, done.stderr), (1, sentence), line)

    def test_record_makes_no_folder_and_excludes_watch(self) -> None:
        missing = self.tree / "missing"
        code, out, err = self.call("--record", str(missing / "my.txt"))
        self.assertEqual((code, out), (2, ""))
        self.assertIn(f"no such folder: {missing}: make it first", err)
        self.assertFalse(missing.exists())

        code, out, err = self.call("--record", str(self.tree / "my.txt"), "--watch", "1s")
        self.assertEqual((code, out), (2, ""))
        self.assertIn("--record and --watch exclude each other", err)
        self.assertFalse((self.tree / "my.txt").exists())

    def test_wrong_usage(self) -> None:
        for argv in (
            ["--watch", "soon"],
            ["--watch", "0s"],
            ["--root", "/no/such"],
            ["--nonsense"],
            ["word"],
        ):
            code, out, err = self.call(*argv)
            self.assertEqual((code, out), (2, ""), argv)
            self.assertNotIn("Traceback", err)
        self.assertEqual(self.call("--help")[0], 0)

    def test_a_reader_that_goes_away(self) -> None:
        self.zone("intel-rapl:0", "package-0", 0)
        argv = [
            sys.executable,
            str(TOP / "hwdetect.py"),
            "--root",
            str(self.tree),
            "--watch",
            "10ms",
        ]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            self.assertEqual((process.wait(timeout=DEADLINE_S), process.stderr.read()), (0, b""))

    def test_a_recording_is_the_same_machine(self) -> None:
        """record, unpack, detect gives the same answer, except for the host name."""
        for text in MACHINES:
            with self.subTest(machine=text.stem):
                self.setUp()
                self.machine(text.stem)
                shutil.rmtree(self.tree / "usr/share", ignore_errors=True)
                before = self.detect()
                file = self.tree / "recorded.txt"
                code, out, err = self.call("--root", str(self.tree), "--record", str(file))
                self.assertEqual((code, err), (0, ""), out)
                recording = file.read_text(encoding="utf-8")
                self.setUp()
                archive.unpack(recording, self.tree)
                if (self.tree / "recorded/nvidia-smi").exists():
                    self.smi()
                after = self.detect()
                self.assertEqual(after.address, "recorded")
                self.assertEqual(
                    {**after.to_json(), "address": 0}, {**before.to_json(), "address": 0}
                )

    def test_this_machine_can_be_recorded(self) -> None:
        done = self.process("--record", "-")
        self.expect(done, returncode=0, stderr="")
        archive.unpack(done.stdout, self.tree)
        here = detect(Host(), probe=False).to_json()
        there = self.detect().to_json()
        # A recording holds neither the name nor the programs, and some values change meanwhile.
        programs = {"ffmpeg", "ffmpeg_version", "ffprobe", "filters", "encoders", "vaapi_device"}
        changing = {"memory_available_bytes", "sensors", "batteries"}
        apart = {"address", "disks", "unknown", *programs, *changing}
        for name in here.keys() - apart:
            self.assertEqual(there[name], here[name], name)
        lost = there["unknown"].keys() - here["unknown"].keys() - programs
        self.assertEqual([name for name in lost if not name.startswith("disks.")], [])

    def test_the_size_of_a_recorded_disk_is_that_of_its_device(self) -> None:
        """A machine gives the size of the file system; a recording needs that of the device."""
        self.put("/proc/self/mounts", "/dev/vda / ext4 rw 0 0\n")
        self.put("/sys/devices/virtio1/block/vda/size", "536870912\n")
        (self.tree / "sys/class/block").mkdir(parents=True)
        (self.tree / "sys/class/block/vda").symlink_to("../../devices/virtio1/block/vda")
        recorder = hwdetect.Recorder(self.host())
        recorder.foreign = False  # as on a machine itself, whose kernel answers statvfs(2)
        detect(recorder, probe=False)
        self.setUp()
        archive.unpack(hwdetect.archive(recorder.entries), self.tree)
        (disk,) = self.detect().disks
        self.assertEqual(disk.size_bytes, 256 * 2**30)

    def test_serial_numbers_stay_at_home(self) -> None:
        text = hwdetect.scrub(
            "/proc/cpuinfo", "Revision\t: c03115\nSerial\t\t: 10000000abcdef12\nModel\t: Pi\n"
        )
        self.assertEqual(text, "Revision\t: c03115\nSerial\t\t: 0\nModel\t: Pi\n")
        self.assertEqual(hwdetect.scrub("", "GPU-9c0ffee0-1111-2222-3333-444455556666"), "GPU-0")
        self.assertEqual(
            hwdetect.scrub(
                "/proc/self/mounts", "/dev/sda1 / ext4 rw 0 0\nnas:/secret /mnt nfs4 rw 0 0\n"
            ),
            "/dev/sda1 / ext4 rw 0 0\n",
        )

    def test_archives_pack_as_they_unpack(self) -> None:
        for text in MACHINES:
            whole = text.read_text(encoding="utf-8")
            self.setUp()
            archive.unpack(whole, self.tree)
            self.assertEqual(
                hwdetect.parse_archive(archive.pack(self.tree)), hwdetect.parse_archive(whole)
            )

    def test_a_recording_can_be_read_as_a_root(self) -> None:
        for name in ("xeon-t4", "laptop-intel"):
            place = HERE / "hosts" / f"{name}.txt"
            golden = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
            code, out, err = self.call("--root", str(place), "--json")
            self.assertEqual((code, err), (0, ""))
            for field in (
                "address",
                "gpus",
                "rapl",
                "ram_bytes",
                "node_type",
                "sensors",
                "batteries",
            ):
                self.assertEqual(json.loads(out)[field], golden[field], field)

    def test_a_file_that_is_not_a_recording_is_refused_in_a_sentence(self) -> None:
        for text, words in (
            ("hello", "not an archive of --record"),
            ("", "not an archive"),
            ("\0\xff", "not an archive"),
            ("=== link /a\n/etc\n=== file /a/b\nx\n", "exists"),
        ):
            self.put("/bad", "")
            (self.tree / "bad").write_text(text, encoding="utf-8")
            code, out, err = self.call("--root", str(self.tree / "bad"))
            self.assertEqual((code, out), (2, ""))
            self.assertIn(words, err)
            self.assertEqual(err.count("\n"), 1)

    def test_an_archive_writes_nothing_outside(self) -> None:
        inside, outside = self.tree / "in", self.tree / "out"
        inside.mkdir()
        outside.mkdir()
        hwdetect.unpack(
            f"=== link /a\n{outside}\n=== there /b/../../out/c\n=== file /../out/d\nx\n",
            str(inside),
        )
        with contextlib.suppress(OSError):
            hwdetect.unpack(
                f"=== link /e\n{outside}\n=== there /e/f\n=== link /e/g\nx\n", str(inside)
            )
        self.assertEqual(os.listdir(outside), [])


class Pieces(unittest.TestCase):
    """Parsers, where their input is odd."""

    def test_durations(self) -> None:
        for text, seconds in (
            ("1s", 1.0),
            ("1m30s", 90.0),
            ("2", 2.0),
            ("0.5s", 0.5),
        ):
            self.assertEqual(hwdetect.parse_duration(text), seconds)
        for text in ("", "s", "-1s", "1x", "1e3", "nan", "1 s", "1ms"):
            with self.assertRaises(ValueError):
                hwdetect.parse_duration(text)

    def test_durations_and_sizes_for_people(self) -> None:
        for seconds, text in (
            (0.44, "0.4 s"),
            (59.4, "59 s"),
            (185, "3 min 05 s"),
            (7800, "2 h 10 min"),
            (273_600, "3 d 4 h"),
            (None, "unknown"),
        ):
            self.assertEqual(hwdetect.duration_text(seconds), text)
        for count, text in ((812, "812 B"), (3.4 * 2**20, "3.4 MiB"), (1.5 * 2**40, "1.5 TiB")):
            self.assertEqual(hwdetect.size_text(count), text)
        self.assertEqual(hwdetect.size_bytes("64M"), 64 * 2**20)

    def test_sizes_are_of_1024(self) -> None:
        """The kernel's kB and nvidia-smi's MiB are powers of two."""
        self.assertEqual(hwdetect.parse_sizes("VmRSS:\t       2 kB\n"), {"VmRSS": 2048})
        self.assertEqual(hwdetect.parse_mib("15360"), 15_360 * 2**20)

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
            self.assertEqual(hwdetect.parse_cpu_list(text), count, text)

    def test_ffmpeg_s_own_words(self) -> None:
        said = "[h264_nvenc @ 0x55] Cannot load libcuda.so.1\n"
        said += "Error initializing output stream 0:0 -- Error\n"
        self.assertEqual(hwdetect.parse_failure(Result(1, "", said)), "Cannot load libcuda.so.1")
        self.assertEqual(
            hwdetect.parse_failure(Result(1, "", "Device creation failed: -5.")),
            "Device creation failed: -5.",
        )
        self.assertIn("signal 11", hwdetect.parse_failure(Result(-11, "", "")))

    def test_a_program_that_hangs_or_is_missing(self) -> None:
        begin = time.monotonic()
        result = Host().run([sys.executable, "-c", "import time; time.sleep(60)"], 0.3)
        self.assertLess(time.monotonic() - begin, 5)
        self.assertEqual((result.stderr, result.timed_out), ("no answer within 0.3 s", True))
        self.assertIn("does not start", Host().run(["/no/such/program"], 1).stderr)

    def test_peak_memory_of_a_program_is_in_bytes(self) -> None:
        """wait4(2) gives it in KiB."""
        code = "data = bytearray(64 << 20); data[::4096] = b'x' * len(data[::4096])"
        program = hwdetect.Program([sys.executable, "-c", code], HERE, str, str)
        self.assertTrue(program.ended.wait(DEADLINE_S))
        assert program.exit is not None
        self.assertEqual(program.exit.returncode, 0)
        self.assertGreater(program.exit.peak_rss_bytes, 64 << 20)
        self.assertLess(program.exit.peak_rss_bytes, 256 << 20)

    def test_files_below_proc_sys_can_be_read(self) -> None:
        """Newer kernels refuse a read of 4 MiB there."""
        self.assertEqual(
            (Host().read("/proc/sys/kernel/osrelease") or "").strip(), os.uname().release
        )

    def test_map_and_banners_agree(self) -> None:
        text = (TOP / "hwdetect.py").read_text(encoding="utf-8")
        banners = [
            line[7:].rstrip("- ") for line in text.splitlines() if line.startswith("# ---- ")
        ]
        mapped = [
            " ".join(line.split()[:2])
            for line in str(hwdetect.__doc__).splitlines()
            if line[:5].strip().isdigit()
        ]
        self.assertEqual(banners, mapped)
        self.assertEqual(
            len({len(line) for line in text.splitlines() if line.startswith("# ---- ")}), 1
        )


if __name__ == "__main__":
    unittest.main()
