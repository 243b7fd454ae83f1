"""One attempt with the real FFmpeg: its output, the words of each failure, and nothing left."""
from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import uuid
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import agent
import hwdetect
from tests.fleet import interruptible, processes_under, run
from tests.support import (
    FILM,
    PATIENCE_S,
    TOP,
    control_groups,
    free_port,
    need,
    newer_ffmpeg,
    served,
    small_disk,
    wait_for,
)

SIZES = ("4K60", "4K30", "1080p60", "1080p30", "720p60", "720p30", "480p30")
SCENARIOS = [f"{size}-{codec}" for size in SIZES for codec in ("h264", "h265")]
SCENARIOS += ["480p60-h264", "1080p60-vp9", "720p30-vp9", "480p30-av1", "test-1080p"]
NGINX_RTMP = Path("/usr/lib/nginx/modules/ngx_rtmp_module.so")


def ffmpeg(*words: str) -> None:
    """Make a film for a test."""
    argv = ["ffmpeg", "-hide_banner", "-nostdin", "-v", "error", "-y", *words]
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise AssertionError(f"ffmpeg {' '.join(words)}: {done.stderr}")


def picture(
    size: str = "320x180", rate: str = "25", seconds: float = 1.0, more: str = ""
) -> list[str]:
    """Arguments of a moving test picture as an input."""
    return ["-f", "lavfi", "-i", f"testsrc2=size={size}:rate={rate}:duration={seconds}{more}"]


class NoGroups(hwdetect.Host):
    """This machine as an agent sees it that may make no control groups."""

    def make(self, folder: str) -> bool:
        return False


TONE = ["-f", "lavfi", "-i", "sine=frequency=300:duration=1"]


def streams(path: Path, kind: str = "v") -> list[dict[str, Any]]:
    """What ffprobe says of a film's streams, with their packets counted."""
    argv = ["ffprobe", "-v", "error", "-select_streams", kind, "-count_packets", "-show_streams",
            "-of", "json", "-i", f"file:{path}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["streams"]


@functools.lru_cache(maxsize=1)
def this_machine() -> tuple[hwdetect.Host, hwdetect.Hardware]:
    """This machine with its encoders tried, once for all tests."""
    host = hwdetect.Host()
    with tempfile.TemporaryDirectory(prefix="ffdist-test-") as state:
        return host, hwdetect.detect(host, True, state)


class RunCase(unittest.TestCase):
    """Attempts in one work folder and one media root; after each test both are checked."""

    root: ClassVar[Path]
    media: ClassVar[Path]
    work: ClassVar[Path]
    place: ClassVar[agent.Workplace]

    @classmethod
    def setUpClass(cls) -> None:
        need("ffmpeg", "ffprobe")
        cls.root = Path(tempfile.mkdtemp(prefix="ffdist-test-")).resolve()
        cls.addClassCleanup(shutil.rmtree, cls.root, ignore_errors=True)
        cls.media, cls.work = cls.root / "media", cls.root / "work"
        cls.media.mkdir()
        cls.work.mkdir()
        host, hardware = this_machine()
        options = agent.Options("", False, 10, 30, 1, cls.root / "state", cls.work, str(cls.media),
                                "worker-01", ())
        cls.place = agent.workplace(options, hardware, host, "worker-01")

    def setUp(self) -> None:
        self.folders: list[str] = []  # of this test's attempts
        self.addCleanup(self.nothing_left)

    def nothing_left(self) -> None:
        left = [path for path in self.work.iterdir() if path.name != "cache"]
        self.assertEqual(left, [], "the work folder must be empty at rest")
        self.assertEqual(
            [path for path in self.root.rglob(".ffdist-*")], [], "no hidden output may stay"
        )
        self.assertEqual(processes_under(self.work), set(), "no process may stay")
        mine = {f"ffdist-{folder}" for folder in self.folders}
        self.assertEqual(control_groups() & mine, set(), "no control group may stay")

    def film(self, name: str, *words: str) -> str:
        """Make a film in the media root unless it is there; return its name."""
        if not (self.media / name).exists():
            ffmpeg(
                *(words or (*picture(), *TONE, "-shortest", "-c:a", "aac")),
                f"file:{self.media / name}",
            )
        return name

    def attempt(self, scenario: str = "transcode-h264", place: agent.Workplace | None = None,
                **parameters: object) -> agent.Attempt:
        job = agent.Job(str(uuid.uuid4()), 1, scenario, parameters)
        self.folders.append(f"{job.id}-1")
        return agent.Attempt(job, place or self.place)

    def result(self, attempt: agent.Attempt) -> agent.Json:
        result = agent.result_of(attempt, attempt.run(), self.place.machine, time.time())
        json.dumps(result, allow_nan=False)
        return result

    def completes(self, scenario: str = "transcode-h264", place: agent.Workplace | None = None,
                  **parameters: object) -> agent.Json:
        attempt = self.attempt(scenario, place, **parameters)
        result = self.result(attempt)
        self.assertEqual(
            result["status"], "completed", f"{scenario} {parameters}: {result['error']}"
        )
        return result

    def fails(self, reason: str, *words: str, scenario: str = "transcode-h264",
              place: agent.Workplace | None = None, **parameters: object) -> agent.Json:
        """The job fails in this class, in one sentence with these words; it has no output."""
        output = parameters.get("output")
        kept = output is None or "://" in str(output) or os.path.exists(self.media / str(output))
        result = self.result(self.attempt(scenario, place, **parameters))
        error = str(result["error"])
        self.assertEqual((result["status"], result["failure_reason"]), ("failed", reason), error)
        for word in words:
            self.assertIn(word, error)
        self.assertNotRegex(error, r"Traceback|Errno|\n|\[error\]|0x[0-9a-f]{6}|\.part\b")
        self.assertLess(len(error), 900)
        if not kept:
            self.assertFalse(
                os.path.exists(self.media / str(output)), "a failed job leaves no output"
            )
        return result


class EveryScenario(RunCase):
    def test_each_scenario_of_the_seed_encodes_the_size_rate_and_codec_that_its_name_says(
        self,
    ) -> None:
        names = {"h264": "h264", "h265": "hevc", "vp9": "vp9", "av1": "av1"}
        with mock.patch("agent.GENERATED_CLIP_S", 0.05):
            for scenario in SCENARIOS:
                with self.subTest(scenario):
                    wanted = agent.resolve(scenario)
                    output = f"{scenario}.mkv"
                    length = (
                        0.05 if scenario.startswith("4K60") else 0.1 if "4K" in scenario else 0.2
                    )
                    result = self.completes(
                        scenario, output=output, duration=length, preset="ultrafast"
                    )
                    video = streams(self.media / output)[0]
                    self.assertEqual((video["codec_name"], video["width"], video["height"]),
                                     (names[wanted.codec], wanted.width, wanted.height))
                    frames = round(length * float(wanted.fps or 30))
                    self.assertEqual(int(video["nb_read_packets"]), frames)
                    self.assertEqual(result["metrics"]["frames"], frames)
                    (self.media / output).unlink()

    def test_the_documents_example_runs_as_it_stands_but_for_its_length(self) -> None:
        with mock.patch("agent.GENERATED_CLIP_S", 0.05):
            result = self.completes("4K60-h264", duration=0.05, bitrate="15000k")
        self.assertEqual((result["encode"]["rate"], result["metrics"]["frames"]), ("15000k", 3))
        self.assertEqual(result["analyzer_output"]["scenario"], "4K60-h264")
        self.assertIn(result["analyzer_output"]["recommendation"], agent.RECOMMENDATIONS)

    def test_the_metrics_of_a_real_run_are_plausible(self) -> None:
        metrics = self.completes("320p25-h264", duration=3)["metrics"]
        self.assertEqual(metrics["frames"], 75)
        self.assertAlmostEqual(metrics["output_seconds"], 3.0, delta=0.1)
        self.assertGreater(metrics["cpu_seconds"], 0)
        self.assertGreater(metrics["memory_usage"], 5)
        self.assertGreaterEqual(metrics["cpu_usage"], 0)
        self.assertLessEqual(metrics["cpu_usage"], 100)
        self.assertAlmostEqual(
            metrics["speed"], metrics["output_seconds"] / metrics["duration"], delta=0.1
        )
        self.assertAlmostEqual(
            metrics["bitrate_kbps"],
            metrics["output_bytes"] * 8 / 1000 / metrics["output_seconds"],
            delta=1,
        )


class GeneratedSources(RunCase):
    def worst_frame_db(self, film: Path, fps: str, clip_frames: int, frames: int) -> float:
        """PSNR of the worst frame against frame number k mod clip of the picture, made afresh."""
        graph = (
            f"[0:v]settb=1/1000,setpts=N,format=yuv420p[a];[1:v]trim=end_frame={clip_frames},"
            f"loop=-1:{clip_frames}:0,trim=end_frame={frames},settb=1/1000,setpts=N,"
            "format=yuv420p[b];"
            "[a][b]psnr=shortest=1"
        )
        done = subprocess.run(
            [
                "ffmpeg",
                "-hide_banner",
                "-nostdin",
                "-i",
                str(film),
                "-f",
                "lavfi",
                "-i",
                f"testsrc2=size=320x180:rate={fps}",
                "-lavfi",
                graph,
                "-f",
                "null",
                "-",
            ],
            capture_output=True,
            text=True,
        )
        found = re.search(r"PSNR .* min:([\d.]+|inf)", done.stderr)
        self.assertIsNotNone(found, done.stderr[-600:])
        return float(found[1]) if found else 0.0

    def test_looping_slips_no_frame_at_any_rate(self) -> None:
        for fps in ("24", "25", "30000/1001", "30", "60000/1001"):
            with self.subTest(fps):
                rate = agent.resolve("x", {"fps": fps}).fps or 0
                frames, clip = round(5 * rate), round(agent.GENERATED_CLIP_S * rate)
                name = f"loop-{fps.replace('/', '_')}.mkv"
                metrics = self.completes(
                    width=320,
                    height=180,
                    fps=fps,
                    duration=5,
                    crf=8,
                    preset="veryfast",
                    output=name,
                    quality=["psnr", "ssim"],
                )["metrics"]
                video = streams(self.media / name)[0]
                self.assertEqual(
                    (metrics["frames"], int(video["nb_read_packets"])), (frames, frames)
                )
                self.assertEqual((metrics["dropped_frames"], metrics["duplicated_frames"]), (0, 0))
                self.assertGreater(metrics["psnr_db"], 40)
                self.assertGreater(metrics["ssim"], 0.97)
                good = self.worst_frame_db(self.media / name, fps, clip, frames)
                slipped = self.worst_frame_db(self.media / name, fps, clip - 1, frames)
                self.assertGreater(good, 30)
                self.assertLess(slipped, good - 5, "this measure would not notice a slip")

    def test_the_sound_of_a_generated_source_lasts_as_long_as_its_picture(self) -> None:
        self.completes("180p25-h264", duration=5, output="tone.mp4")
        self.assertAlmostEqual(
            float(streams(self.media / "tone.mp4", "a")[0]["duration"]), 5, delta=0.1
        )

    def test_the_clip_is_made_once_and_kept_bounded(self) -> None:
        self.completes("64p25-h264", duration=0.2)
        cache = self.work / "cache"
        first = {path: path.stat().st_ino for path in cache.iterdir()}
        self.assertTrue(any("x64-" in path.name for path in first))
        self.completes("64p25-h265", duration=0.2)
        self.assertEqual({path: path.stat().st_ino for path in cache.iterdir()}, first)
        with mock.patch("agent.CACHE_LIMIT_BYTES", 1):
            self.completes("66p25-h264", duration=0.2)
        self.assertEqual(len(list(cache.iterdir())), 1)


class RealFilms(RunCase):
    def test_a_film_keeps_every_frame_its_length_and_its_sound(self) -> None:
        name = self.film("plain.mp4")
        for codec, output in (
            ("h264", "o.mp4"),
            ("h265", "o.mov"),
            ("vp9", "o.webm"),
            ("av1", "o.mkv"),
            ("h264", "o.flv"),
            ("h264", "o.ts"),
            ("h264", "o.m4v"),
        ):
            with self.subTest(output):
                metrics = self.completes(
                    f"transcode-{codec}",
                    input=name,
                    output=output,
                    preset="ultrafast",
                    quality=["psnr"],
                )["metrics"]
                self.assertEqual(metrics["frames"], 25)
                self.assertEqual(int(streams(self.media / output)[0]["nb_read_packets"]), 25)
                self.assertEqual(len(streams(self.media / output, "a")), 1)
                self.assertGreater(metrics["psnr_db"], 28)
                self.assertEqual(metrics["output_bytes"], (self.media / output).stat().st_size)

    def test_sound_is_dropped_where_asked(self) -> None:
        self.completes(input=self.film("plain.mp4"), output="mute.mp4", audio=False)
        self.assertEqual(streams(self.media / "mute.mp4", "a"), [])

    def test_two_passes_work_with_each_codec(self) -> None:
        name = self.film("plain.mp4")
        for codec, output in (
            ("h264", "2.mp4"),
            ("h265", "2.mp4"),
            ("vp9", "2.webm"),
            ("av1", "2.mkv"),
        ):
            with self.subTest(codec):
                result = self.completes(
                    f"transcode-{codec}",
                    input=name,
                    output=output,
                    two_pass=True,
                    width=160,
                    height=90,
                    bitrate="200k",
                    duration=0.4,
                    preset="ultrafast",
                    overwrite=True,
                )
                self.assertEqual(len(result["encode"]["commands"]), 2)
                self.assertEqual(int(streams(self.media / output)[0]["nb_read_packets"]), 10)

    def test_the_first_seconds_only(self) -> None:
        metrics = self.completes(input=self.film("plain.mp4"), duration=0.4)["metrics"]
        self.assertEqual(metrics["frames"], 10)

    def test_a_film_in_another_shape_keeps_its_shape(self) -> None:
        name = self.film(
            "square.mp4", *picture("240x240", more=",drawbox=t=fill:c=red"), "-c:v", "libx264"
        )
        self.completes(input=name, output="wide.mkv", width=320, height=180, crf=1)
        video = streams(self.media / "wide.mkv")[0]
        self.assertEqual((video["width"], video["height"]), (320, 180))
        self.assertEqual(video.get("sample_aspect_ratio"), "1:1")
        argv = ["ffmpeg", "-v", "error", "-i", str(self.media / "wide.mkv"), "-frames:v", "1",
                "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        raw = subprocess.run(argv, capture_output=True, check=True).stdout
        red = [raw[3 * (90 * 320 + x)] > 128 for x in range(320)]
        self.assertEqual(
            (red[10], red[75], red[160], red[245], red[310]), (False, True, True, True, False)
        )

    def test_names_that_look_like_something_else(self) -> None:
        source = self.film("plain.mp4")
        names = ("-dash.mp4", "a b 'q' \"d\".mp4", "co:lon.mp4", "film%d%03d.mp4", "100%.mp4",
                 "ünï 影片.mp4", "file:x.mp4", "concat:a|b.mp4", "#h?a=b&c.mp4", "[x],y;z.mp4",
                 "$(id)`x`\\n.mp4", "pipe:1.mp4")
        for name in names:
            with self.subTest(name):
                shutil.copy(self.media / source, self.media / name)
                self.completes(
                    input=name, output=f"{name}.out.mp4", duration=0.2, preset="ultrafast"
                )
                self.assertEqual(
                    int(streams(self.media / f"{name}.out.mp4")[0]["nb_read_packets"]), 5
                )

    def test_a_folder_with_a_strange_name(self) -> None:
        folder = self.media / "-d %d 'x': y"
        folder.mkdir()
        shutil.copy(self.media / self.film("plain.mp4"), folder / "in.mp4")
        self.completes(input=f"{folder.name}/in.mp4", output=f"{folder.name}/o.mp4", duration=0.2,
                       quality=["psnr"])

    def test_an_older_output_is_replaced_only_by_a_whole_new_one(self) -> None:
        old = self.media / "old.mp4"
        old.write_bytes(b"the older film")
        (self.media / "noise.mp4").write_bytes(os.urandom(5000))
        self.fails("input", "noise.mp4", input="noise.mp4", output="old.mp4")
        self.assertEqual(old.read_bytes(), b"the older film")
        name = self.film("plain.mp4")
        self.fails(
            "output", "old.mp4", "exists", "overwrite", input=name, output="old.mp4", duration=0.2
        )
        self.assertEqual(old.read_bytes(), b"the older film")
        self.completes(input=name, output="old.mp4", duration=0.2, overwrite=True)
        self.assertEqual(len(streams(old)), 1)

    def test_a_portrait_film_that_is_only_marked_as_rotated(self) -> None:
        plain = self.film("plain.mp4")
        turn = ("-c", "copy", "-metadata:s:v", "rotate=90")
        name = self.film("turned.mov", "-i", str(self.media / plain), *turn)
        metrics = self.completes(input=name, output="t.mp4", quality=["psnr"])["metrics"]
        video = streams(self.media / "t.mp4")[0]
        self.assertEqual((video["width"], video["height"]), (180, 320))
        self.assertNotIn("rotation", json.dumps(video))
        self.assertGreater(metrics["psnr_db"], 28)
        self.completes(input=name, output="t2.mp4", width=320, height=180)
        self.assertEqual(streams(self.media / "t2.mp4")[0]["height"], 180)

    def test_an_anamorphic_film_gets_square_pixels_and_its_true_shape(self) -> None:
        name = self.film("dv.mkv", *picture("360x288"), "-vf", "setsar=64/45", "-c:v", "libx264")
        metrics = self.completes(input=name, output="dv.mp4", quality=["psnr"])["metrics"]
        video = streams(self.media / "dv.mp4")[0]
        self.assertEqual(
            (video["width"], video["height"], video["sample_aspect_ratio"]), (512, 288, "1:1")
        )
        self.assertGreater(metrics["psnr_db"], 28)

    def test_a_ten_bit_film_stays_ten_bit(self) -> None:
        name = self.film("deep.mkv", *picture(), "-pix_fmt", "yuv420p10le", "-c:v", "libx265",
                         "-x265-params", "log-level=error")
        self.completes("transcode-h265", input=name, output="deep-o.mkv", preset="ultrafast")
        self.assertEqual(streams(self.media / "deep-o.mkv")[0]["pix_fmt"], "yuv420p10le")

    def test_a_film_of_changing_rate_loses_no_frame(self) -> None:
        pace = "settb=1/1000,setpts=if(lt(N\\,10)\\,N*40\\,400+(N-10)*100)"
        name = self.film(
            "vfr.mkv", *picture(), "-vf", pace, "-vsync", "vfr", "-c:v", "libx264", "-crf", "5"
        )
        self.assertEqual(int(streams(self.media / name)[0]["nb_read_packets"]), 25)
        for output in ("vfr.mp4", "vfr-o.mkv"):
            with self.subTest(output):
                metrics = self.completes(input=name, output=output, crf=5, quality=["psnr"])[
                    "metrics"
                ]
                self.assertEqual(int(streams(self.media / output)[0]["nb_read_packets"]), 25)
                self.assertAlmostEqual(metrics["output_seconds"], 1.9, delta=0.2)
                self.assertGreater(metrics["psnr_db"], 35)

    def test_a_film_that_begins_late_gets_no_frame_twice(self) -> None:
        plain = str(self.media / self.film("plain.mp4"))
        name = self.film("late.mkv", "-i", plain, "-c", "copy")
        self.assertGreater(float(streams(self.media / name)[0]["start_time"]), 0.01)
        metrics = self.completes(input=name, output="late.mp4", crf=5, quality=["psnr"])["metrics"]
        self.assertEqual((metrics["frames"], metrics["duplicated_frames"]), (25, 0))
        self.assertGreater(metrics["psnr_db"], 35, "frames must be compared with their own")

    def test_a_film_that_begins_seconds_late_is_whole(self) -> None:
        plain = str(self.media / self.film("plain.mp4"))
        name = self.film("later.mkv", "-itsoffset", "3", "-i", plain, "-c", "copy")
        for output in ("later.mp4", "later-o.mkv"):
            metrics = self.completes(input=name, output=output, preset="ultrafast")["metrics"]
            self.assertEqual(metrics["frames"], 25)
            self.assertAlmostEqual(metrics["output_seconds"], 1.0, delta=0.01)

    def changing(self, name: str, *more: str) -> str:
        """A lossless film of 100 frames at 10 per second, then 40 at 50; it seems to have 10."""
        pace = "settb=1/1000,setpts=if(lt(N\\,100)\\,N*100\\,9900+(N-99)*20)"
        return self.film(name, *picture("64x64", seconds=5.6), "-vf", pace, "-vsync", "vfr",
                         "-enc_time_base", "1/1000", "-c:v", "libx264", "-crf", "0", *more)

    def test_a_film_that_becomes_faster_loses_no_frame(self) -> None:
        name = self.changing("faster.mp4")
        self.assertEqual(streams(self.media / name)[0]["r_frame_rate"], "10/1")
        for codec, output in (("h264", "faster-o.mp4"), ("h265", "faster-o.mkv")):
            metrics = self.completes(
                f"x-{codec}",
                input=name,
                output=output,
                preset="ultrafast",
                quality=["psnr"],
                **({"crf": 0} if codec == "h264" else {}),
            )["metrics"]
            self.assertEqual((metrics["frames"], metrics["dropped_frames"]), (140, 0))
            self.assertAlmostEqual(metrics["output_seconds"], 10.72, delta=0.11)
            self.assertGreater(metrics["psnr_db"], 99 if codec == "h264" else 25)

    def test_a_film_of_changing_rate_gets_the_rate_that_it_only_claims(self) -> None:
        """37 frames over 2.92 s that Matroska calls 25 per second."""
        name = self.film(
            "claims.mkv",
            *picture("64x64", seconds=3),
            "-vf",
            "select='lt(t,1)+not(mod(n,4))'",
            "-vsync",
            "vfr",
            "-c:v",
            "libx264",
        )
        self.assertEqual(streams(self.media / name)[0]["avg_frame_rate"], "25/1")
        self.assertEqual(int(streams(self.media / name)[0]["nb_read_packets"]), 37)
        metrics = self.completes(input=name, fps=25, crf=0, preset="ultrafast", quality=["psnr"])[
            "metrics"
        ]
        self.assertEqual((metrics["frames"], metrics["psnr_min_db"]), (73, 100.0))

    def test_frames_that_were_dropped_leave_none_to_compare(self) -> None:
        """A transport stream tells nothing of a rate that changes later."""
        name = self.changing("faster.ts", "-f", "mpegts")
        metrics = self.completes(input=name, preset="ultrafast", quality=["psnr"])["metrics"]
        self.assertEqual(metrics["frames"] + metrics["dropped_frames"], 140)
        self.assertGreater(metrics["dropped_frames"], 20)
        self.assertIsNone(metrics["psnr_db"])
        self.assertIn("dropped or doubled", metrics["unknown"]["psnr_db"])

    def test_a_picture_smaller_than_ssim_needs_has_none(self) -> None:
        name = self.film(
            "tiny.mkv", *picture("16x16"), "-vf", "scale=2:90,setsar=1", "-c:v", "ffv1"
        )
        metrics = self.completes(input=name, quality=["psnr", "ssim"])["metrics"]
        self.assertIsNotNone(metrics["psnr_db"])
        self.assertIsNone(metrics["ssim"], "it would be far below -1")
        self.assertIn("2x90", metrics["unknown"]["ssim"])

    def test_a_film_of_one_frame(self) -> None:
        name = self.film("one.mp4", *picture(), "-frames:v", "1")
        self.assertEqual(self.completes(input=name, output="one-o.mp4")["metrics"]["frames"], 1)

    def test_an_odd_sized_film(self) -> None:
        name = self.film("odd.mkv", *picture("321x181"), "-pix_fmt", "yuv444p", "-c:v", "libx264")
        metrics = self.completes(input=name, output="odd.mp4", quality=["psnr"])["metrics"]
        video = streams(self.media / "odd.mp4")[0]
        self.assertEqual((video["width"], video["height"], video["pix_fmt"]), (320, 180, "yuv420p"))
        self.assertGreater(metrics["psnr_db"], 28)

    def test_subtitles_and_cover_pictures_do_not_disturb(self) -> None:
        (self.media / "s.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nwords\n")
        plain, subs = str(self.media / self.film("plain.mp4")), str(self.media / "s.srt")
        sub = self.film("sub.mkv", "-i", plain, "-i", subs, "-map", "0", "-map", "1", "-c", "copy")
        cover = str(self.media / self.film("cover.png", *picture("64x64"), "-frames:v", "1"))
        after = self.film(
            "after.mp4",
            "-i",
            plain,
            "-i",
            cover,
            "-map",
            "0",
            "-map",
            "1",
            "-c",
            "copy",
            "-disposition:v:1",
            "attached_pic",
        )
        before = self.film(
            "before.mp4",
            "-i",
            cover,
            "-i",
            plain,
            "-map",
            "0",
            "-map",
            "1",
            "-c",
            "copy",
            "-disposition:v:0",
            "attached_pic",
        )
        for name in (sub, after, before):
            with self.subTest(name):
                self.completes(input=name, output="clean.mp4", overwrite=True)
                kept = streams(self.media / "clean.mp4")
                self.assertEqual([video["width"] for video in kept], [320])
                self.assertEqual(int(kept[0]["nb_read_packets"]), 25)

    def test_a_fps_of_its_own_is_reached_by_whole_frames(self) -> None:
        metrics = self.completes(input=self.film("plain.mp4"), output="ntsc.mkv", fps="30000/1001")[
            "metrics"
        ]
        self.assertIn(metrics["frames"], (29, 30, 31))
        self.assertEqual(streams(self.media / "ntsc.mkv")[0]["avg_frame_rate"], "30000/1001")

    def test_crf_with_a_ceiling_works_with_each_software_encoder(self) -> None:
        for codec in agent.CODECS:
            with self.subTest(codec):
                self.completes(
                    f"transcode-{codec}",
                    input=self.film("plain.mp4"),
                    crf=30,
                    bitrate="300k",
                    duration=0.2,
                    preset="ultrafast",
                )

    def test_a_film_with_sound_and_few_key_frames(self) -> None:
        film = FILM if FILM.exists() else self.media / self.film(
            "long.mp4", "-f", "lavfi", "-i", "testsrc2=s=640x360:r=25:d=5.28", "-f", "lavfi", "-i",
            "sine=d=5.28", "-c:v", "libx264", "-g", "999", "-c:a", "aac")
        place = dataclasses.replace(self.place, places=agent.Places("worker-01", str(film.parent)))
        metrics = self.completes(place=place, input=film.name, preset="ultrafast",
                                 quality=["psnr", "ssim"])["metrics"]
        self.assertEqual(metrics["frames"], 132)
        self.assertGreater(metrics["psnr_db"], 30)


class BadInput(RunCase):
    def test_random_bytes(self) -> None:
        (self.media / "noise.mp4").write_bytes(os.urandom(20_000))
        self.fails(
            "input", "noise.mp4", "worker-01", "Invalid data", input="noise.mp4", output="o.mp4"
        )

    def test_text_that_says_it_is_a_film(self) -> None:
        (self.media / "text.mp4").write_text("I am a film\n" * 100)
        self.fails("input", "text.mp4", input="text.mp4", output="o.mp4")

    def test_a_damaged_film_is_explained_by_what_its_suffix_says_it_is(self) -> None:
        (self.media / "noise.mkv").write_bytes(os.urandom(20_000))
        (self.media / "text.mov").write_text("words " * 1000)
        self.fails("input", "noise.mkv", "EBML header parsing failed", input="noise.mkv")
        self.fails("input", "text.mov", "moov atom not found", input="text.mov")

    def test_an_empty_file(self) -> None:
        (self.media / "void.mp4").touch()
        self.fails("input", "void.mp4", "empty", "worker-01", input="void.mp4", output="o.mp4")

    def test_a_missing_file(self) -> None:
        self.fails("input", "nowhere.mp4", "does not exist", "worker-01", str(self.media),
                   input="nowhere.mp4", output="o.mp4")
        self.fails("input", "x" * 300, input="x" * 300 + ".mp4", output="o.mp4")
        self.fails("input", "plain.mp4/", input=self.film("plain.mp4") + "/x.mp4", output="o.mp4")

    def test_a_media_root_that_is_not_mounted_is_the_nodes_fault_and_no_films(self) -> None:
        hidden = self.media.with_name("unmounted")
        self.media.rename(hidden)
        try:
            self.fails("agent", str(self.media), "worker-01", "mounted", input="plain.mp4")
        finally:
            hidden.rename(self.media)

    def test_a_folder(self) -> None:
        (self.media / "folder.mp4").mkdir(exist_ok=True)
        self.fails("input", "folder.mp4", "not a regular file", input="folder.mp4", output="o.mp4")

    def test_a_pipe_does_not_hang(self) -> None:
        os.mkfifo(self.media / "pipe.mp4")
        self.addCleanup((self.media / "pipe.mp4").unlink)
        self.fails("input", "pipe.mp4", "not a regular file", input="pipe.mp4", output="o.mp4")

    def test_sound_without_picture(self) -> None:
        self.fails(
            "input", "sound.m4a", "no video", input=self.film("sound.m4a", *TONE), output="o.mp4"
        )

    def cut(self, name: str, part: float, *flags: str) -> str:
        whole = self.film(
            "whole.mp4", *picture("640x360", seconds=4), "-c:v", "libx264", "-g", "25"
        )
        ffmpeg("-i", str(self.media / whole), "-c", "copy", *flags, str(self.media / name))
        size = (self.media / name).stat().st_size
        os.truncate(self.media / name, int(size * part))
        return name

    def test_a_film_cut_before_its_index(self) -> None:
        self.fails(
            "input",
            "cut.mp4",
            "moov atom not found",
            input=self.cut("cut.mp4", 0.7),
            output="o.mp4",
        )

    def test_a_film_cut_in_the_middle_is_no_success(self) -> None:
        name = self.cut("half.mp4", 0.5, "-movflags", "+faststart")
        self.fails("input", "half.mp4", "of 4.0 s", "cut or damaged", input=name, output="o.mp4")
        self.fails("input", "half.mp4", "cut or damaged", input=name)
        self.completes(input=name, output="begin.mp4", duration=0.5)

    def test_a_film_damaged_in_the_middle_is_said_to_be(self) -> None:
        name = self.cut("damaged.mp4", 1.0)
        raw = bytearray((self.media / name).read_bytes())
        third = len(raw) // 3
        for at in range(third, third + 20_000):
            raw[at] = (at * 7919) % 251
        (self.media / name).write_bytes(raw)
        result = self.result(self.attempt(input=name, output="repaired.mp4"))
        if result["status"] == "completed":
            self.assertGreater(result["metrics"]["damaged_packets"], 0)
            self.assertEqual(result["analyzer_output"]["recommendation"], "check_input")
        else:
            self.assertIn(name, str(result["error"]))

    def test_a_whole_film_is_not_called_damaged(self) -> None:
        result = self.completes(input=self.film("plain.mp4"))
        self.assertEqual(result["metrics"]["damaged_packets"], 0)
        self.assertNotEqual(result["analyzer_output"]["recommendation"], "check_input")

    def test_paths_that_lead_out_of_the_media_root(self) -> None:
        outside = self.root / "outside.mp4"
        shutil.copy(self.media / self.film("plain.mp4"), outside)
        for name in ("../outside.mp4", str(outside), "a/../../outside.mp4", "/etc/passwd"):
            with self.subTest(name):
                self.fails("parameters", name, "outside the media root", input=name, output="o.mp4")
        before = outside.read_bytes()
        for name in ("../outside.mp4", "../media-2/o.mp4"):
            with self.subTest(name):
                self.fails("parameters", "begins with a dot", input="plain.mp4", output=name)
        self.fails("parameters", "outside the media root", input="plain.mp4", output=str(outside))
        self.assertEqual(outside.read_bytes(), before)

    def test_links_under_the_media_root_are_not_followed(self) -> None:
        outside = self.root / "outside.mp4"
        shutil.copy(self.media / self.film("plain.mp4"), outside)
        (self.media / "link.mp4").symlink_to(outside)
        (self.media / "linked").symlink_to(self.root)
        (self.media / "inner.mp4").symlink_to("plain.mp4")
        for name, link in (("link.mp4", "link.mp4"), ("linked/outside.mp4", "linked"),
                           ("inner.mp4", "inner.mp4")):
            with self.subTest(name):
                self.fails(
                    "input", f"through the link {link}", "worker-01", input=name, output="o.mp4"
                )
        before = outside.read_bytes()
        self.fails(
            "output", "link.mp4 is a link", input="plain.mp4", output="link.mp4", overwrite=True
        )
        self.fails(
            "output",
            "output linked/new.mp4 leads through the link linked on",
            input="plain.mp4",
            output="linked/new.mp4",
        )
        self.assertEqual(outside.read_bytes(), before)
        self.assertFalse((self.root / "new.mp4").exists())

    def test_a_playlist_does_not_lead_out_of_the_media_root(self) -> None:
        ffmpeg(*picture(), "-c:v", "libx264", "-f", "mpegts", str(self.root / "secret.ts"))
        head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\n"
        for name, text in (
            ("list.m3u8", f"{head}{self.root / 'secret.ts'}\n#EXT-X-ENDLIST\n"),
            ("up.m3u8", f"{head}../secret.ts\n#EXT-X-ENDLIST\n"),
            ("list.ffconcat", f"ffconcat version 1.0\nfile '{self.root / 'secret.ts'}'\n"),
        ):
            with self.subTest(name):
                (self.media / name).write_text(text)
                self.fails("input", name, "not a film", input=name, output="stolen.mp4")


class BadOutput(RunCase):
    def test_a_folder_that_is_missing(self) -> None:
        self.fails("output", "none/o.mp4", "no folder", "worker-01", input=self.film("plain.mp4"),
                   output="none/o.mp4")

    def test_a_folder_in_its_place(self) -> None:
        (self.media / "d.mp4").mkdir(exist_ok=True)
        self.fails("output", "d.mp4", "folder", input=self.film("plain.mp4"), output="d.mp4")

    def test_the_input_itself_is_never_overwritten(self) -> None:
        name = self.film("plain.mp4")
        before = (self.media / name).read_bytes()
        (self.media / "alias.mp4").symlink_to(self.media / name)
        os.link(self.media / name, self.media / "twin.mp4")
        self.addCleanup(os.unlink, self.media / "twin.mp4")
        for output in (name, f"./{name}", str(self.media / name), "twin.mp4"):
            with self.subTest(output):
                self.fails("parameters", "input itself", input=name, output=output, overwrite=True)
        self.fails("output", "is a link", input=name, output="alias.mp4", overwrite=True)
        self.assertEqual((self.media / name).read_bytes(), before)

    def test_a_name_that_is_too_long_is_told_before_the_work(self) -> None:
        output = "n" * 300 + ".mp4"
        result = self.fails("output", output[:50], input=self.film("plain.mp4"), output=output)
        self.assertNotIn("encode", result, "hours of encoding would be lost")

    def test_a_disk_that_fills_up(self) -> None:
        name = self.film("big.mkv", *picture("1280x720", seconds=2), "-c:v", "libx264", "-crf", "1")
        disk = small_disk(self, self.media / "disk")
        for output in ("disk/o.mp4", "disk/o.mkv", "disk/o.ts"):
            with self.subTest(output):
                self.fails(
                    "out_of_disk",
                    output,
                    "No space left on device",
                    input=name,
                    output=output,
                    crf=1,
                    preset="ultrafast",
                )
                self.assertEqual(list(disk.iterdir()), [])

    def test_a_work_folder_that_fills_up(self) -> None:
        disk = small_disk(self, self.root / "work-disk")
        place = dataclasses.replace(self.place, work_dir=disk)
        self.fails(
            "out_of_disk",
            "No space left on device",
            scenario="720p30-h264",
            place=place,
            duration=1,
        )
        name = self.film("big.mkv", *picture("1280x720", seconds=2), "-c:v", "libx264", "-crf", "1")
        self.fails("out_of_disk", "No space left on device", place=place, input=name, crf=1,
                   preset="ultrafast")
        self.assertLessEqual({path.name for path in disk.iterdir()}, {"cache"})
        self.assertEqual([path for path in (disk / "cache").rglob("*")], [])

    def test_a_disk_with_too_little_room_is_told_before_the_work(self) -> None:
        place = dataclasses.replace(self.place, min_free_bytes=512 << 10)
        disk = small_disk(self, self.media / "low")
        (disk / "fill").write_bytes(b"x" * (600 << 10))
        name = self.film("plain.mp4")
        result = self.fails(
            "out_of_disk",
            str(disk),
            "worker-01",
            "424.0 KiB free",
            "512.0 KiB are wanted",
            "--min-free",
            place=place,
            input=name,
            output="low/o.mp4",
        )
        self.assertNotIn("frames", [key for key, value in result["metrics"].items() if value])
        (disk / "fill").unlink()
        self.completes(place=place, input=name, output="low/o.mp4")
        self.fails(
            "out_of_disk", "are wanted", place=place, input=name, output="low/p.mp4", bitrate="8M"
        )
        self.fails("out_of_disk", str(disk), scenario="64p25-h264", duration=0.2,
                   place=dataclasses.replace(place, work_dir=disk, min_free_bytes=2 << 20))

    def test_a_disk_that_is_filled_by_others_ends_the_encode_before_it_is_full(self) -> None:
        disk = small_disk(self, self.media / "shared")
        place = dataclasses.replace(self.place, min_free_bytes=512 << 10)
        attempt = self.attempt(
            "64p25-h264", place, duration=60, realtime=True, output="shared/o.mkv"
        )
        results: list[agent.Json] = []
        worker = threading.Thread(target=lambda: results.append(self.result(attempt)))
        worker.start()
        try:
            wait_for(lambda: list(disk.glob(".ffdist-*")), 20, "the encode runs")
            (disk / "fill").write_bytes(b"x" * (700 << 10))
            worker.join(PATIENCE_S)
        finally:
            attempt.stop("canceled")
            worker.join(PATIENCE_S)
        self.assertEqual(
            (results[0]["status"], results[0]["failure_reason"]), ("failed", "out_of_disk")
        )
        self.assertIn(f"{disk} on worker-01 has", str(results[0]["error"]))
        self.assertEqual([path.name for path in disk.iterdir()], ["fill"])

    def test_a_folder_that_vanishes_is_no_fault_of_the_film(self) -> None:
        (self.media / "gone").mkdir()
        name, inside = self.film("plain.mp4"), agent.encode_once

        def late(task: agent.Task, *more: Any) -> agent.Outcome:
            shutil.rmtree(self.media / "gone")
            return inside(task, *more)
        with mock.patch("agent.encode_once", late):
            self.fails("output", "gone/o.mp4", "No such file", input=name, output="gone/o.mp4")

    def test_an_output_that_cannot_get_its_name_and_a_work_folder_that_is_closed(self) -> None:
        def closed_stand_in(place: str, *_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        name = self.film("plain.mp4")
        with mock.patch("agent.os.link", closed_stand_in):
            self.fails(
                "output", "o.mp4", "worker-01", "Permission denied", input=name, output="o.mp4"
            )
        with mock.patch("agent.make_folder", closed_stand_in):
            self.fails(
                "agent",
                str(self.work),
                "worker-01",
                "Permission denied",
                input=name,
                output="o.mp4",
            )

    def test_a_folder_without_permission(self) -> None:
        (self.media / "closed").mkdir(mode=0o500)
        closed_in = str(self.media / "closed")
        if not os.geteuid():  # root may write everywhere but on a file system that is read-only
            subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", closed_in], check=True)
            self.addCleanup(subprocess.run, ["umount", "-l", closed_in], check=True)
        why = "Permission denied" if os.geteuid() else "Read-only file system"
        self.fails("output", "closed/o.mp4", why, closed_in, input=self.film("plain.mp4"),
                   output="closed/o.mp4")


class JobLimits(RunCase):
    """max_memory_mb and max_cpu_percent: by real control groups as root, and by plain limits."""

    def grouped(self) -> str:
        """Return what enforces memory here; skip where no group can be made."""
        probe = hwdetect.ControlGroup(self.place.host, f"probe-{os.getpid()}")
        how = probe.limit("memory", 64 << 20) and probe.limit("cpu", 50_000)
        probe.remove()
        if not how:
            self.skipTest("no control groups of memory and CPU can be made here (it needs root)")
        return str(how)

    def plain(self) -> agent.Workplace:
        return dataclasses.replace(self.place, host=NoGroups())

    def test_an_encode_beyond_its_memory_is_ended_by_its_group_and_says_so(self) -> None:
        how = self.grouped()
        name = self.film("hd.mkv", *picture("1920x1080"), "-c:v", "libx264", "-preset", "ultrafast")
        result = self.fails("out_of_memory", "max_memory_mb of 100", how, "worker-01", input=name,
                            max_memory_mb=100, preset="medium", output="o.mp4")
        self.assertEqual(result["encode"]["limits"], {"memory": how})

    def test_an_encode_within_its_limits_is_whole_and_its_figures_are_right(self) -> None:
        how = self.grouped()
        self.completes("360p25-h264", duration=0.2)
        attempt = self.attempt("360p25-h264", duration=2, max_memory_mb=500, max_cpu_percent=50,
                               preset="slow")
        result = self.result(attempt)
        self.assertEqual(result["encode"]["limits"], {"memory": how, "cpu": how}, result["error"])
        self.assertIn(
            f"limits: memory by {how}, cpu by {how}", [line for _, line in attempt.log.lines]
        )
        metrics = result["metrics"]
        self.assertEqual((metrics["frames"], result["encode"]["threads"]), (50, 1))
        self.assertGreater(metrics["cpu_seconds"], 0)
        self.assertLess(
            metrics["cpu_seconds"], 0.5 * metrics["duration"] + 0.3, "half a core, and a period"
        )

    def test_where_no_group_may_be_made_plain_limits_hold(self) -> None:
        place = self.plain()
        result = self.completes(
            "180p25-h264", place, duration=0.2, max_memory_mb=4000, max_cpu_percent=50
        )
        self.assertEqual(result["encode"]["limits"], {"memory": "rlimit", "cpu": "affinity"})
        name = self.film("hd.mkv", *picture("1920x1080"), "-c:v", "libx264", "-preset", "ultrafast")
        for most in (16, 300, 400, 500):
            with self.subTest(most):
                self.fails(
                    "out_of_memory",
                    f"max_memory_mb of {most} (rlimit, which counts addresses",
                    place=place,
                    input=name,
                    max_memory_mb=most,
                    preset="medium",
                    output="o.mp4",
                )

    def test_affinity_is_of_as_many_cpus_as_the_quota_rounded_up(self) -> None:
        attempt = self.attempt(
            "64p25-h264", self.plain(), duration=60, realtime=True, max_cpu_percent=50
        )
        worker = threading.Thread(target=attempt.run)
        worker.start()
        try:
            pid = wait_for(
                lambda: attempt.progress.get("frame") and processes_under(self.work), 20
            ).pop()
            self.assertEqual(len(os.sched_getaffinity(pid)), 1)
        finally:
            attempt.stop("canceled")
            worker.join(20)

    def test_a_limit_that_nothing_enforces_fails_the_job_rather_than_run_it_without(self) -> None:
        for call, parameter in (("hwdetect.resource.prlimit", {"max_memory_mb": 500}),
                                ("hwdetect.os.sched_setaffinity", {"max_cpu_percent": 50})):
            with (
                self.subTest(call),
                mock.patch(call, side_effect=PermissionError(1, "not permitted")),
            ):
                self.fails(
                    "no_capability",
                    next(iter(parameter)),
                    "worker-01",
                    scenario="64p25-h264",
                    place=self.plain(),
                    duration=0.2,
                    **parameter,
                )

    def test_a_process_that_ended_before_it_could_be_limited_is_no_failure(self) -> None:
        folder = self.work / f"over-{os.getpid()}"
        folder.mkdir()
        self.addCleanup(agent.clear_work, self.work, self.place.host)
        over = subprocess.Popen(["true"])
        over.wait()
        for host in (self.place.host, NoGroups()):
            limits = hwdetect.Limits(host, folder, 100 << 20, 100)
            self.assertEqual((limits.take(over.pid), limits.enforced), ("", {}))

    def test_a_group_left_by_a_killed_agent_is_removed_with_what_runs_in_it(self) -> None:
        self.grouped()
        folder = self.work / "left-1"
        folder.mkdir()
        limits = hwdetect.Limits(self.place.host, folder, 100 << 20, 100)
        orphan = subprocess.Popen(["sleep", "600"])
        self.addCleanup(orphan.kill)
        limits.take(orphan.pid)
        self.assertIn("ffdist-left-1", control_groups())
        threading.Thread(target=orphan.wait, daemon=True).start()  # reaped at once, as init does
        self.assertEqual(agent.clear_work(self.work, self.place.host), 1)
        self.assertNotIn("ffdist-left-1", control_groups())
        self.assertEqual(orphan.wait(10), -signal.SIGKILL)


class SideBySide(RunCase):
    """Attempts on a node of one slot: what is not an encode runs beside another one's."""

    def setUp(self) -> None:
        super().setUp()
        self.place = dataclasses.replace(self.place, slots=agent.FreeSlots(), making={})
        self.outcomes: dict[agent.Attempt, agent.Outcome] = {}

    def begin(self, attempt: agent.Attempt) -> threading.Thread:
        def work() -> None:
            self.outcomes[attempt] = attempt.run()
        worker = threading.Thread(target=work)
        worker.start()
        self.addCleanup(worker.join, PATIENCE_S)
        self.addCleanup(attempt.stop, "canceled")
        return worker

    def encoding(self) -> agent.Attempt:
        """Begin an attempt that encodes until it is stopped."""
        attempt = self.attempt("64p25-h264", duration=600, realtime=True)
        self.begin(attempt)
        wait_for(lambda: attempt.progress.get("frame"), why="it encodes")
        return attempt

    def in_line(self, attempt: agent.Attempt) -> threading.Thread:
        worker = self.begin(attempt)
        wait_for(lambda: attempt.progress["phase"] == "waiting for a slot", why="it is in line")
        return worker

    def lines(self, attempt: agent.Attempt) -> list[str]:
        return [line.partition(":")[0] for _, line in list(attempt.log.lines)]

    def test_a_film_is_probed_while_another_encodes_and_finished_beside_the_next(self) -> None:
        first = self.encoding()
        finishing, may_end = threading.Event(), threading.Event()

        def confirm(output: agent.OutputFile, made: agent.Json) -> float:
            finishing.set()
            may_end.wait(PATIENCE_S)
            return float("inf")
        self.addCleanup(may_end.set)
        name = self.film("plain.mp4")
        job = agent.Job(str(uuid.uuid4()), 1, "x", {"input": name, "output": "beside.mp4"})
        second = agent.Attempt(job, self.place, confirm)
        worker = self.in_line(second)
        self.assertEqual(self.lines(second), ["plan"], "all but the encode is done")
        first.stop("canceled")
        self.assertTrue(finishing.wait(PATIENCE_S))
        self.assertFalse(second.slot.wanted)
        third = self.attempt(place=self.place, input=name)
        self.begin(third).join(PATIENCE_S)
        self.assertEqual(self.outcomes[third].status, "completed")
        self.assertNotIn(second, self.outcomes)
        may_end.set()
        worker.join(PATIENCE_S)
        done = self.outcomes[second]
        self.assertEqual((done.status, done.ledger.beside), ("completed", 0), done.error)
        self.assertTrue(done.output_bytes and done.output_s)
        self.assertTrue((self.media / "beside.mp4").exists())

    def finishing(self, **parameters: object) -> tuple[agent.Attempt, threading.Event]:
        """Begin an attempt that waits for the name of its output; the event lets it have that."""
        may_end = threading.Event()

        def confirm(output: agent.OutputFile, made: agent.Json) -> float:
            may_end.wait(PATIENCE_S)
            return float("inf")
        attempt = agent.Attempt(agent.Job(str(uuid.uuid4()), 1, "x", parameters), self.place,
                                confirm)
        self.begin(attempt)
        self.addCleanup(may_end.set)  # before its thread is waited for
        wait_for(lambda: not attempt.slot.wanted, why="its encode is over")
        return attempt, may_end

    def test_what_a_job_writes_is_there_for_the_next_to_read_or_to_replace(self) -> None:
        first, may_end = self.finishing(input=self.film("plain.mp4"), output="made.mp4")
        reads = self.attempt(place=self.place, input="./made.mp4", output="read.mp4")
        worker = self.begin(reads)
        wait_for(lambda: reads.progress["phase"] == "waiting for made.mp4", why="it waits")
        self.assertEqual(self.lines(reads), [])
        may_end.set()
        worker.join(PATIENCE_S)
        self.assertEqual(self.outcomes[reads].status, "completed", self.outcomes[reads].error)
        second, may_end = self.finishing(input="plain.mp4", output="made.mp4", overwrite=True)
        replaces = self.attempt(place=self.place, input="plain.mp4", output="made.mp4",
                                overwrite=True)
        worker = self.begin(replaces)
        wait_for(lambda: replaces.progress["phase"] == "waiting for made.mp4", why="it waits")
        may_end.set()
        worker.join(PATIENCE_S)
        self.assertEqual([self.outcomes[one].status for one in (first, second, replaces)],
                         ["completed"] * 3, self.outcomes[replaces].error)
        self.assertEqual(self.place.making, {})

    def test_a_job_that_waits_for_what_another_writes_obeys_orders(self) -> None:
        first, _ = self.finishing(input=self.film("plain.mp4"), output="wanted.mp4")
        reads = self.attempt(place=self.place, input="wanted.mp4")
        worker = self.begin(reads)
        wait_for(lambda: reads.progress["phase"] == "waiting for wanted.mp4", why="it waits")
        reads.stop("returned")
        worker.join(PATIENCE_S)
        self.assertEqual(self.outcomes[reads].status, "returned")
        self.assertIs(self.place.making["wanted.mp4"], first.slot)

    def test_a_job_in_line_obeys_orders(self) -> None:
        self.encoding()
        attempt = self.attempt(input=self.film("plain.mp4"), output="o.mp4")
        worker = self.in_line(attempt)
        attempt.stop("canceled")
        worker.join(PATIENCE_S)
        self.assertEqual(self.outcomes[attempt].status, "canceled")
        self.assertEqual(self.lines(attempt), ["plan"])

    def test_a_job_whose_slot_does_not_come_is_given_back(self) -> None:
        self.encoding()
        attempt = self.attempt(input=self.film("plain.mp4"), output="o.mp4")
        with mock.patch("agent.MAX_IN_LINE_S", 0.0):
            self.begin(attempt).join(PATIENCE_S)
        self.assertEqual(self.outcomes[attempt].status, "returned")
        self.assertEqual(list(self.work.glob(f"{attempt.job_id}*")), [])

    def test_a_source_is_made_in_turn_for_that_is_an_encode(self) -> None:
        self.encoding()
        attempt = self.attempt("66p25-h264", duration=0.2)
        self.in_line(attempt)
        self.assertEqual(list((self.work / "cache").glob("*x66*")), [])

    def test_a_slot_is_kept_until_quality_is_measured_and_after_a_failure_it_is_free(self) -> None:
        held: list[bool] = []
        compare = agent.compare_by

        def comparing(metric: str, task: agent.Task, *more: Any) -> Any:
            held.append(task.runner.slot._held)
            return compare(metric, task, *more)
        with mock.patch("agent.compare_by", comparing), \
                mock.patch("agent.probe_film", wraps=agent.probe_film) as probe:
            self.completes(place=self.place, input=self.film("plain.mp4"), quality=["psnr"])
        self.assertEqual(held, [True])
        self.assertEqual(probe.call_count, 2, "the output is looked at once")
        self.fails("input", place=self.place, input="none.mp4")
        self.assertTrue(self.place.slots.take(0))
        self.assertFalse(self.place.slots.take(0))

    def test_its_end_is_foreseen_once_and_not_where_the_slot_is_kept(self) -> None:
        for more, changes in (({}, 2), ({"quality": ["psnr"]}, 1), ({"cooldown": 0.01}, 1)):
            parameters = {"input": self.film("plain.mp4"), **more}
            job = agent.Job(str(uuid.uuid4()), 1, "x", parameters)
            changed = mock.Mock()
            attempt = agent.Attempt(job, self.place, slot_changed=changed)
            with self.subTest(more), mock.patch("agent.ends_soon", return_value=True):
                self.assertEqual(attempt.run().status, "completed")
                self.assertEqual(changed.call_count, changes)


class Watchdogs(RunCase):
    def disturbed(
        self,
        number: int,
        stall_limit_s: float = 300.0,
        frames: int = 1,
        remove: bool = False,
        **parameters: object,
    ) -> agent.Json:
        """Signal the FFmpeg of a live encode, its folder removed or not; return the result."""
        place = dataclasses.replace(self.place, stall_limit_s=stall_limit_s)
        attempt = self.attempt("64p25-h264", place, duration=60, realtime=True, **parameters)
        results: list[agent.Json] = []
        worker = threading.Thread(target=lambda: results.append(self.result(attempt)))
        worker.start()
        try:
            wait_for(lambda: (attempt.progress.get("frame") or 0) >= frames, why="the encode runs")
            pids = processes_under(self.work)
            if remove:
                shutil.rmtree(self.work / self.folders[-1])
            for pid in pids:
                os.kill(pid, number)
            worker.join(PATIENCE_S)
        finally:
            attempt.stop("canceled")
            worker.join(PATIENCE_S)
        return results[0]

    def test_a_work_folder_that_was_removed_is_no_fault_of_the_film(self) -> None:
        result = self.disturbed(signal.SIGKILL, remove=True)
        self.assertEqual(
            (result["status"], result["failure_reason"]), ("failed", "agent"), result["error"]
        )
        self.assertIn(f"{self.folders[-1]} on worker-01 was removed", str(result["error"]))

    def test_an_ffmpeg_that_stands_still_is_ended_as_stalled(self) -> None:
        result = self.disturbed(signal.SIGSTOP, 3.0, 30, output="o.mkv")
        self.assertEqual(
            (result["status"], result["failure_reason"]), ("failed", "stalled"), result["error"]
        )
        self.assertRegex(str(result["error"]), r"no new frame for \d+\.\d s on worker-01")
        self.nothing_left()

    def test_an_ffmpeg_that_others_ended_is_killed_and_no_fault_of_the_film(self) -> None:
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSEGV):
            with self.subTest(number):
                result = self.disturbed(number)
                self.assertEqual((result["status"], result["failure_reason"]), ("failed", "killed"),
                                 result["error"])
                self.assertIn("the generated source: ffmpeg ", str(result["error"]))


class Measured(unittest.TestCase):
    def test_the_peak_memory_of_a_program_is_in_bytes(self) -> None:
        """The kernel gives KiB: 64 MiB must not become 64 KiB."""
        with tempfile.TemporaryDirectory() as folder:
            words = ["python3", "-c", "held = b'x' * (64 << 20)"]
            program = hwdetect.Program(words, Path(folder), lambda line: None, lambda line: None)
            self.assertTrue(program.ended.wait(PATIENCE_S))
        assert program.exit is not None
        self.assertEqual(program.exit.returncode, 0)
        self.assertGreater(program.exit.peak_rss_bytes, 64 << 20)
        self.assertLess(program.exit.peak_rss_bytes, 256 << 20)


class Pausing(RunCase):
    """A pause stops the attempt's clock with its processes, whoever orders it and how often."""

    def in_parts(self) -> list[str]:
        """A command that works for about 2 s and notices a pause, unlike one long sleep."""
        return ["sh", "-c", "for part in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do "
                "sleep 0.1; done"]

    def test_orders_by_three_threads_and_a_slow_sampler_leave_the_time_of_the_work(self) -> None:
        sample = hwdetect.Sampler.sample

        def slow(sampler: hwdetect.Sampler, now: float) -> hwdetect.Reading:
            time.sleep(0.4)
            return sample(sampler, now)
        folder = self.work / "paused-1"
        folder.mkdir()
        self.addCleanup(agent.clear_work, self.work, self.place.host)
        runner = agent.Runner(self.place, folder)
        worker = threading.Thread(target=runner.execute_metered, args=(self.in_parts(),))
        with mock.patch("hwdetect.Sampler.sample", slow):
            began = time.monotonic()
            worker.start()
            wait_for(lambda: processes_under(self.work), 20, "it runs")
            for order in (runner.pause, runner.resume, runner.pause, runner.resume):
                orders = [threading.Thread(target=order) for _ in range(3)]
                for thread in orders:
                    thread.start()
                for thread in orders:
                    thread.join()
                self.assertEqual(runner.watch.paused, order == runner.pause)
                time.sleep(0.8 if order == runner.pause else 0.3)
            worker.join(PATIENCE_S)
            took_s = time.monotonic() - began
        worked_s = runner.watch.elapsed_s()
        self.assertGreater(took_s, worked_s + 1.6, "two pauses of 0.8 s, and two readings or more")
        self.assertGreater(worked_s, 1.9)
        self.assertFalse(processes_under(self.work))

    def test_the_timeout_of_a_job_stands_still_in_a_pause(self) -> None:
        attempt = self.attempt(
            "64p25-h264", duration=2, realtime=True, timeout=6, preset="ultrafast"
        )
        results: list[agent.Json] = []
        worker = threading.Thread(target=lambda: results.append(self.result(attempt)))
        worker.start()
        try:
            wait_for(lambda: attempt.progress.get("frame"), 20, "the encode runs")
            attempt.pause()
            time.sleep(6.5)
            self.assertTrue(worker.is_alive())
            attempt.resume()
            worker.join(PATIENCE_S)
        finally:
            attempt.stop("canceled")
            worker.join(PATIENCE_S)
        self.assertEqual((results[0]["status"], results[0]["error"]), ("completed", None))
        self.assertLess(results[0]["metrics"]["duration"], 6)


class Encoders(RunCase):
    def test_an_unknown_encoder_is_refused_with_the_nearest_name(self) -> None:
        self.fails(
            "parameters", "libx266", "did you mean libx26", encoder="libx266", output="o.mp4"
        )

    def test_hardware_that_is_not_there_is_named_with_its_own_words(self) -> None:
        broken = {name: proof.why for name, proof in self.place.machine.encoders.items()
                  if proof.why and name in agent.ENCODERS and agent.ENCODERS[name].hardware}
        if not broken:
            self.skipTest("every hardware encoder works here")
        name, why = next(iter(broken.items()))
        codec = agent.ENCODERS[name].codec
        self.fails(
            "no_capability",
            name,
            str(why)[:20],
            "worker-01",
            scenario=f"64p25-{codec}",
            encoder=name,
            duration=0.2,
        )

    def test_ffmpeg_that_is_not_there(self) -> None:
        machine = dataclasses.replace(self.place.machine, ffmpeg="ffmpeg-that-is-not-there")
        self.fails("no_capability", "ffmpeg-that-is-not-there", scenario="66p25-h264", duration=0.2,
                   place=dataclasses.replace(self.place, machine=machine))
        place = dataclasses.replace(
            self.place, machine=dataclasses.replace(machine, ffmpeg="/vanished")
        )
        with mock.patch("hwdetect.shutil.which", lambda name: name):
            self.fails(
                "no_capability", "/vanished", scenario="66p25-h264", duration=0.2, place=place
            )
        self.fails("no_capability", "ffprobe-not-there", input=self.film("plain.mp4"),
                   place=dataclasses.replace(self.place, ffprobe="ffprobe-not-there"))

    def test_a_metric_that_this_ffmpeg_lacks_is_unknown_with_the_reason(self) -> None:
        place = dataclasses.replace(self.place, filters=tuple(name for name in self.place.filters
                                                              if name != "libvmaf"))
        metrics = self.completes("64p25-h264", place, duration=0.2, quality=["vmaf", "psnr"])[
            "metrics"
        ]
        self.assertIsNone(metrics["vmaf"])
        self.assertIn("vmaf", metrics["unknown"]["vmaf"])
        self.assertGreater(metrics["psnr_db"], 20)


class Quality(RunCase):
    """Known pairs have their known scores, and what is off is noticed."""

    def flat(self, name: str, luma: int | str, pixel_format: str = "yuv420p") -> str:
        """A film of one grey, lossless."""
        words = (f"color=black:size=64x64:rate=25:duration=0.4,format={pixel_format},"
                 f"lutyuv=y={luma}:u=128:v=128")
        return self.film(name, "-f", "lavfi", "-i", words, "-c:v", "ffv1", "-pix_fmt", pixel_format)

    def compared(self, metric: str, encoded: str, source: str, pixel_format: str = "yuv420p",
                 ffmpeg: str = "ffmpeg") -> dict[str, float]:
        """Scores of one film against another, by the agent's own command."""
        film = agent.Source(str(self.media / source), 64, 64, 25.0, 0.4, pixel_format)
        machine = agent.Machine("m", ffmpeg, 2)
        made = agent.plan(
            agent.resolve("h264", {"input": source}), machine, film, str(self.media / encoded)
        )
        folder = Path(tempfile.mkdtemp(dir=self.root))
        argv = agent.quality_command(machine, metric, film, made)
        done = subprocess.run(
            argv, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        with open(folder / agent.FRAME_LOG) as frames:
            return agent.parse_scores(metric, done.stderr.splitlines(), frames)[0]

    def test_a_known_distortion_has_its_known_psnr(self) -> None:
        """Luma off by 10: a mean square error of 100 in four of six samples, 29.89 dB."""
        found = self.compared("psnr", self.flat("off.mkv", 110), self.flat("grey.mkv", 100))
        for value in found.values():
            self.assertAlmostEqual(value, 29.89, 2)

    def test_ten_bits_are_compared_as_ten(self) -> None:
        """One step of 1023 in the luma would be lost in eight bits: 61.96 dB."""
        source = self.flat("grey10.mkv", 400, "yuv420p10le")
        found = self.compared(
            "psnr", self.flat("off10.mkv", 401, "yuv420p10le"), source, "yuv420p10le"
        )
        self.assertAlmostEqual(found["psnr_db"], 61.96, 2)

    def test_a_film_that_is_encoded_without_loss_is_perfect_whatever_was_changed(self) -> None:
        self.film("moves.mp4", *picture("160x90", seconds=2))
        late = self.film("late.mkv", *picture("160x90"), *TONE, "-filter_complex",
                         "[0:v]setpts=PTS+0.3/TB[v]", "-map", "[v]", "-map", "1:a", "-c:a", "aac")
        stream = self.film("sound.ts", *picture("160x90"), *TONE, "-c:v", "libx264", "-c:a", "aac")
        for change in ({"width": 80}, {"fps": 10}, {"fps": 50}, {"duration": 0.72},
                       {"fps": 29.97, "height": 180}, {"input": late}, {"input": late, "fps": 10},
                       {"input": stream, "fps": 10, "audio": True}):
            with self.subTest(**change):
                metrics = self.completes(
                    **{
                        "input": "moves.mp4",
                        "crf": 0,
                        "audio": False,
                        "preset": "ultrafast",
                        "quality": ["psnr"],
                        **change,
                    }
                )["metrics"]
                found = [metrics[name] for name in ("psnr_db", "psnr_min_db", "psnr_harmonic_db")]
                self.assertEqual(found, [100.0, 100.0, 100.0], metrics["unknown"])

    def test_one_frame_shifted_is_noticed(self) -> None:
        source = self.film("walk.mkv", *picture("64x64", seconds=1), "-c:v", "ffv1")
        shifted = self.film(
            "shifted.mkv", *picture("64x64", seconds=1), "-vf", "trim=start_frame=1", "-c:v", "ffv1"
        )
        same, other = (self.compared("psnr", film, source) for film in (source, shifted))
        self.assertEqual(same["psnr_min_db"], 100.0)
        self.assertLess(other["psnr_db"], 40)

    def test_a_comparison_is_booked_to_nobody(self) -> None:
        """Neither to its own job nor to one beside it, for the meter knows of it."""
        joined: list[hwdetect.Ledger] = []
        join = hwdetect.Meter.join

        def noted(meter: hwdetect.Meter, ledger: hwdetect.Ledger) -> None:
            joined.append(ledger)
            join(meter, ledger)
        with mock.patch("hwdetect.Meter.join", noted):
            attempt = self.attempt(input=self.film("plain.mp4"), quality="psnr")
            outcome = attempt.run()
        self.assertEqual((len(joined), outcome.status), (2, "completed"))
        self.assertIs(outcome.ledger, joined[0])
        self.assertIsNot(outcome.ledger, joined[1])

    def test_a_source_with_fewer_frames_is_no_comparison(self) -> None:
        attempt = self.attempt(input=self.film("plain.mp4"), quality="psnr")
        with mock.patch(
            "agent.quality_command",
            side_effect=lambda *words: [
                word.replace("settb", "trim=end_frame=9,settb") for word in QUALITY_COMMAND(*words)
            ],
        ):
            metrics = self.result(attempt)["metrics"]
        self.assertIsNone(metrics["psnr_db"])
        self.assertIn("9 frames to compare with the output's 25", metrics["unknown"]["psnr_db"])

    def test_vmaf_and_xpsnr_where_this_ffmpeg_has_them(self) -> None:
        program = newer_ffmpeg()
        if program is None:
            self.skipTest(
                "no ffmpeg with libvmaf and xpsnr here (python3 -m tests --install fetches one)"
            )
        place = dataclasses.replace(self.place, filters=("psnr", "libvmaf", "xpsnr"),
                                    machine=dataclasses.replace(self.place.machine, ffmpeg=program))
        self.film("moving.mp4", *picture("640x360", seconds=2))
        worse = {}
        for crf in (0, 45):
            metrics = self.completes(
                "h264",
                place,
                input="moving.mp4",
                crf=crf,
                width=320,
                duration=0.6,
                quality=["vmaf", "xpsnr"],
                preset="ultrafast",
            )["metrics"]
            worse[crf] = metrics
            self.assertLessEqual(metrics["vmaf_min"], metrics["vmaf_harmonic"])
            self.assertLessEqual(metrics["vmaf_harmonic"], metrics["vmaf"] + 1e-6)
        self.assertEqual((worse[0]["xpsnr_db"], worse[0]["xpsnr_min_db"]), (100.0, 100.0))
        self.assertGreater(worse[0]["vmaf"], 95)
        self.assertLess(worse[45]["vmaf"], worse[0]["vmaf"] - 10)
        self.assertLess(worse[45]["xpsnr_db"], 40)
        source = self.film("walk.mkv", *picture("64x64", seconds=1), "-c:v", "ffv1")
        self.assertEqual(
            set(self.compared("xpsnr", source, source, ffmpeg=program).values()), {100.0}
        )


QUALITY_COMMAND = agent.quality_command


class Repeats(RunCase):
    def test_a_job_is_repeated_and_only_the_last_output_stays(self) -> None:
        parameters = {"duration": 0.2, "output": "again.mp4", "quality": "psnr"}
        job = agent.Job(str(uuid.uuid4()), 1, "64p25-h264", parameters, "medium")
        attempt = agent.Attempt(job, self.place)
        phases: set[str] = set()
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.01):
                phases.add(attempt.progress["phase"])
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            result = self.result(attempt)
        finally:
            done.set()
            watcher.join()
        self.assertEqual(result["status"], "completed", result["error"])
        repeats = result["repeats"]
        self.assertTrue(4 <= len(repeats) <= 11, repeats)
        self.assertEqual([row["warm_up"] for row in repeats], [True] + [False] * (len(repeats) - 1))
        mean = sum(row["duration"] for row in repeats[1:]) / (len(repeats) - 1)
        self.assertAlmostEqual(result["metrics"]["duration"], mean, 4)
        self.assertEqual(result["statistics"]["duration"]["n"], len(repeats) - 1)
        self.assertEqual(result["analyzer_output"]["runs"], len(repeats))
        self.assertEqual(int(streams(self.media / "again.mp4")[0]["nb_read_packets"]), 5)
        self.assertIn("run 3, encoding", phases)
        self.assertIsNotNone(result["metrics"]["psnr_db"])

    def test_a_baseline_encodes_nothing(self) -> None:
        result = self.completes("baseline", duration=0.5, settle=0.3, cooldown=0.3)
        metrics = result["metrics"]
        self.assertNotIn("encode", result)
        self.assertTrue(0.4 < metrics["duration"] < 5, metrics["duration"])
        self.assertEqual((metrics["frames"], metrics["fps"]), (None, None))
        self.assertEqual(metrics["unknown"]["frames"], "nothing was encoded")
        self.assertGreaterEqual(len(result["series"]["seconds"]), 1)
        self.assertEqual(len(result["series"]["seconds"]), len(result["series"]["power_watts"]))
        self.assertEqual(agent.resolve("idle-baseline").duration, 60)
        self.assertLessEqual(
            {name for name, _ in agent.result_rows(result)}, {"time", "CPU", "energy"}
        )

    def test_rest_is_not_measured(self) -> None:
        began = time.monotonic()
        metrics = self.completes("64p25-h264", duration=0.2, settle=0.75, cooldown=0.75)["metrics"]
        self.assertLess(metrics["duration"], time.monotonic() - began - 1.5)


class StandIns(RunCase):
    """Programs in FFmpeg's place that misbehave as a real one does only rarely."""

    def stand_in(self, name: str, script: str) -> agent.Workplace:
        path = self.root / f"ffmpeg-stand-in-{name}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        self.film("plain.mp4")
        machine = dataclasses.replace(self.place.machine, ffmpeg=str(path))
        return dataclasses.replace(self.place, machine=machine)

    END = "printf 'frame=25\\nout_time_us=1000000\\nprogress=end\\n'"
    LAST = 'for last; do :; done; target="${last#file:}"'

    def test_its_own_word_for_success_is_not_enough(self) -> None:
        self.fails("input", "plain.mp4", place=self.stand_in("nothing", f"{self.END}; exit 0"),
                   input="plain.mp4", output="o.mp4")
        rubbish = self.stand_in("rubbish", f"{self.LAST}; echo rubbish >\"$target\"; {self.END}")
        self.fails("encoder", "o.mp4", place=rubbish, input="plain.mp4", output="o.mp4")
        status = self.stand_in("status", f"{self.LAST}; echo x >\"$target\"; {self.END}; "
                               "echo '[error] broken heart' >&2; exit 1")
        self.fails(
            "encoder", "plain.mp4", "broken heart", place=status, input="plain.mp4", output="o.mp4"
        )

    def test_an_output_that_is_shorter_than_what_was_written_is_a_full_disk(self) -> None:
        """As over a quota, or on a full share: each write succeeds, the file lacks its end."""
        film = self.media / self.film("plain.mp4")
        for size, short in ((film.stat().st_size, False), (2 * film.stat().st_size, True)):
            said = f"printf 'frame=25\\nout_time_us=1000000\\ntotal_size={size}\\nprogress=end\\n'"
            place = self.stand_in(
                f"short-{short}", f"{self.LAST}; cat '{film}' >\"$target\"; {said}"
            )
            with self.subTest(short=short):
                if short:
                    self.fails("out_of_disk", "o.mp4", f"of the {size} bytes", place=place,
                               input="plain.mp4", output="o.mp4")
                else:
                    self.completes(place=place, input="plain.mp4", output="o.mp4", overwrite=True)
                    (self.media / "o.mp4").unlink()

    def test_a_killed_encode_may_be_tried_again(self) -> None:
        self.fails(
            "killed",
            "plain.mp4",
            "SIGKILL",
            "worker-01",
            place=self.stand_in(
                "killed",
                "echo '[h264 @ 0x5] [error] Invalid data found when processing input' >&2; "
                "kill -9 $$",
            ),
            input="plain.mp4",
            output="o.mp4",
        )

    def test_a_flood_of_words_does_not_hang_it(self) -> None:
        place = self.stand_in(
            "flood",
            'i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo "[info] $i '
            f'{"x" * 500}" >&2; echo "frame=$i"; done; '
            "echo '[error] flooded' >&2; exit 1",
        )
        attempt = self.attempt(place=place, input="plain.mp4")
        self.assertIn("flooded", str(self.result(attempt)["error"]))
        self.assertLessEqual(len(attempt.log.lines), agent.MAX_LOG_LINES)

    def test_a_child_that_outlives_it_is_ended_with_its_group(self) -> None:
        self.fails("encoder", "gone", place=self.stand_in(
            "parent", "sleep 600 & echo '[error] gone' >&2; exit 1"), input="plain.mp4")

    def stopped(self, place: agent.Workplace, why: str) -> None:
        attempt = self.attempt(place=place, input="plain.mp4", output="o.mp4")
        outcomes: list[agent.Outcome] = []
        worker = threading.Thread(target=lambda: outcomes.append(attempt.run()))
        worker.start()
        wait_for(lambda: any("ready" in line for _, line in list(attempt.log.lines)), 20)
        attempt.stop(why)
        worker.join(PATIENCE_S)
        self.assertEqual([outcome.status for outcome in outcomes], [why])
        self.nothing_left()

    def test_a_cancel_ends_even_what_ignores_the_polite_word(self) -> None:
        place = self.stand_in("stubborn", "trap '' TERM INT; sleep 600 & echo '[info] ready' >&2; "
                              "while :; do sleep 600; done")
        self.stopped(place, "canceled")

    def test_a_job_is_given_back_with_nothing_left(self) -> None:
        place = self.stand_in(
            "half", f"{self.LAST}; echo half >\"$target\"; echo '[info] ready' >&2; sleep 600"
        )
        self.stopped(place, "returned")

    def test_a_paused_process_group_is_ended_too(self) -> None:
        place = self.stand_in("paused", "echo '[info] ready' >&2; kill -STOP $$; sleep 600")
        self.stopped(place, "canceled")

    def test_a_timeout_ends_it_and_says_so(self) -> None:
        self.fails(
            "timeout",
            "timeout of 1.0 s",
            "worker-01",
            place=self.stand_in("slow", "sleep 600"),
            input="plain.mp4",
            output="o.mp4",
            timeout=1,
        )

    def test_a_lease_that_is_lost_at_the_end_gives_no_output_its_name(self) -> None:
        parameters = {"input": self.film("plain.mp4"), "output": "lost.mp4", "duration": 0.2}
        job = agent.Job(str(uuid.uuid4()), 1, "x", parameters)
        attempt = agent.Attempt(job, self.place, lambda output, made: None)
        self.assertEqual(attempt.run().status, "lost")
        self.assertFalse((self.media / "lost.mp4").exists())


class Network(RunCase):
    def local(self) -> agent.Workplace:
        places = dataclasses.replace(self.place.places, allow_address=("127.0.0.1",))
        return dataclasses.replace(self.place, places=places)

    def test_a_film_over_http(self) -> None:
        name = self.film("plain.mp4")
        with served(self.media) as url:
            metrics = self.completes(place=self.local(), input=f"{url}/{name}", quality=["psnr"])[
                "metrics"
            ]
            self.assertEqual(metrics["frames"], 25)
            self.assertGreater(metrics["psnr_db"], 28)
            self.fails("input", "none.mp4", "404", place=self.local(), input=f"{url}/none.mp4",
                       output="o.mp4")

    def test_loopback_is_closed_unless_allowed(self) -> None:
        with served(self.media) as url:
            self.fails("parameters", url, "127.0.0.1", "--allow-address", input=f"{url}/plain.mp4",
                       output="o.mp4")
        self.fails("parameters", "--allow-address", input=self.film("plain.mp4"),
                   output="rtmp://localhost/live/x")
        self.fails("parameters", "169.254.169.254", "--allow-address", output="o.mp4",
                   input="http://169.254.169.254/latest/meta-data")

    def test_nobody_there_is_a_transient_failure(self) -> None:
        port = free_port()
        self.fails("network", "refused", f"127.0.0.1:{port}", place=self.local(), output="o.mp4",
                   input=f"http://127.0.0.1:{port}/x.mp4")
        self.fails("network", "refused", f"rtmp://127.0.0.1:{port}", place=self.local(),
                   input=self.film("plain.mp4"), output=f"rtmp://127.0.0.1:{port}/live/x")
        self.fails(
            "network",
            "nohost.invalid",
            place=self.local(),
            input="http://nohost.invalid/x.mp4",
            output="o.mp4",
        )

    def test_a_film_whose_server_breaks_off_may_be_tried_again(self) -> None:
        cut = self.film(
            "index-first.mp4", *picture("640x360", seconds=4), "-movflags", "+faststart"
        )
        raw = (self.media / cut).read_bytes()
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer = listener.accept()[0]
                    with contextlib.suppress(OSError), peer:
                        peer.recv(65536)
                        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(raw)
                                     + raw[:len(raw) // 2])
        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/{cut}"
        self.fails("network", url, "of 4.0 s", place=self.local(), input=url, output="o.mp4")

    def rtmp_server(self) -> tuple[subprocess.Popen[bytes], int, Path]:
        need("nginx")
        if not NGINX_RTMP.exists():
            self.skipTest(f"{NGINX_RTMP} is not installed")
        folder = Path(tempfile.mkdtemp(prefix="ffdist-rtmp-"))
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o755)
        port = free_port()
        user = "" if os.geteuid() else "user root;"
        (folder / "conf").write_text(
            f"load_module {NGINX_RTMP};\ndaemon off;\npid {folder}/pid;\n{user}\n"
            "worker_processes 1;\nevents {}\n"
            f"rtmp {{ server {{ listen 127.0.0.1:{port}; application live {{ live on; record all; "
            f"record_path {folder}; record_suffix .flv; }} }} }}\n")
        server = subprocess.Popen(
            ["nginx", "-e", f"{folder}/log", "-c", f"{folder}/conf", "-p", str(folder)],
            stdin=subprocess.DEVNULL,
        )

        def stop() -> None:
            server.send_signal(signal.SIGTERM)
            server.wait(20)
        self.addCleanup(stop)
        wait_for(lambda: self.accepts(port), 20, "nginx listens")
        return server, port, folder

    @staticmethod
    def accepts(port: int) -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=2).close()
        except OSError:
            return False
        return True

    def test_a_stream_to_a_real_rtmp_server_has_picture_and_sound(self) -> None:
        _, port, folder = self.rtmp_server()
        url = f"rtmp://127.0.0.1:{port}/live/key"
        result = self.completes("180p25-h264", self.local(), duration=2, output=url)
        self.assertEqual(result["metrics"]["frames"], 50)
        self.assertIsNone(result["metrics"]["output_bytes"])
        self.assertTrue(result["metrics"]["unknown"]["output_bytes"])
        self.assertGreater(result["metrics"]["duration"], 1.5, "a live stream keeps to the clock")
        film = wait_for(lambda: next(iter(folder.glob("key*.flv")), None), 10)
        wait_for(lambda: film.stat().st_size > 5000, 10)
        self.assertEqual(streams(film)[0]["codec_name"], "h264")
        self.assertEqual(streams(film, "a")[0]["codec_name"], "aac")

    def test_an_rtmp_server_that_dies_is_a_transient_failure_that_names_it(self) -> None:
        server, port, _ = self.rtmp_server()
        url = f"rtmp://127.0.0.1:{port}/live/key"
        attempt = self.attempt("180p25-h264", self.local(), duration=60, output=url)
        results: list[agent.Json] = []
        worker = threading.Thread(target=lambda: results.append(self.result(attempt)))
        worker.start()
        try:
            wait_for(lambda: (attempt.progress.get("frame") or 0) > 5, 30, "the stream runs")
            server.send_signal(signal.SIGTERM)
            worker.join(PATIENCE_S)
        finally:
            attempt.stop("canceled")
            worker.join(PATIENCE_S)
        self.assertEqual(
            (results[0]["status"], results[0]["failure_reason"]),
            ("failed", "network"),
            results[0]["error"],
        )
        self.assertIn(url, str(results[0]["error"]))

    def test_a_stream_over_srt(self) -> None:
        known = subprocess.run(["ffmpeg", "-hide_banner", "-protocols"], capture_output=True).stdout
        if b" srt\n" not in known:
            self.skipTest("this ffmpeg has no srt")
        port, film = free_port(), self.root / "srt.ts"
        argv = [
            "ffmpeg",
            "-v",
            "quiet",
            "-y",
            "-i",
            f"srt://127.0.0.1:{port}?mode=listener",
            "-c",
            "copy",
            str(film),
        ]
        listener = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        self.addCleanup(listener.wait)
        self.addCleanup(listener.kill)
        wait_for(lambda: f":{port:04X} " in Path("/proc/net/udp").read_text(), 20, "the listener")
        self.completes("180p25-h264", self.local(), duration=3, output=f"srt://127.0.0.1:{port}")
        listener.wait(20)
        self.assertEqual(streams(film)[0]["codec_name"], "h264")
        self.assertEqual(len(streams(film, "a")), 1)


class ByHand(unittest.TestCase):
    """`agent.py run`, the single-node workflow."""

    @classmethod
    def setUpClass(cls) -> None:
        need("ffmpeg", "ffprobe")
        cls.folder = Path(tempfile.mkdtemp(prefix="ffdist-test-")).resolve()
        cls.addClassCleanup(shutil.rmtree, cls.folder, ignore_errors=True)
        ffmpeg(*picture(), *TONE, "-shortest", str(cls.folder / "in.mp4"))

    folder: ClassVar[Path]

    def run_agent(self, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        done = run(str(TOP / "agent.py"), "run", "--no-probe", *words, folder=self.folder, **more)
        self.assertNotIn("Traceback", done.stderr)
        left = [path.name for path in (self.folder / ".local").rglob("run*")]
        self.assertEqual([name for name in left if name != "run"], [], "its work folder is gone")
        return done

    def test_a_film_beside_the_user(self) -> None:
        done = self.run_agent("--input", "in.mp4", "--output", "out.mp4", "-p", "crf=25")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(int(streams(self.folder / "out.mp4")[0]["nb_read_packets"]), 25)
        for word in (
            "encoder",
            "libx264",
            "speed",
            "CPU",
            "memory",
            "energy",
            "quality",
            "verdict",
        ):
            self.assertIn(word, done.stdout)

    def test_the_result_as_json_is_alone_on_stdout(self) -> None:
        done = self.run_agent("64p25-h264", "-p", "duration=0.2", "--json")
        self.assertEqual(json.loads(done.stdout)["metrics"]["frames"], 5)

    def test_exit_codes_and_one_sentence_each(self) -> None:
        cases = (
            (("--input", "none.mp4"), 1, "none.mp4"),
            (("64p25-h264", "-p", "crf=99"), 2, "crf"),
            (("64p25-h264", "-p", "nonsense"), 2, "name=value"),
            (("a b",), 2, "scenario"),
            (("-p", "codec=h263"), 2, "codec"),
            (("--max-concurrent-jobs", "0"), 2, "--max-concurrent"),
        )
        for words, code, said in cases:
            with self.subTest(words):
                done = self.run_agent(*words)
                self.assertEqual(done.returncode, code, done.stderr)
                said_lines = [line for line in done.stderr.splitlines() if line.startswith("agent")]
                self.assertEqual(len(said_lines), 1, done.stderr)
                self.assertIn(said, said_lines[0])

    def test_an_error_of_the_agents_own_is_a_sentence_and_an_end(self) -> None:
        words = ("import agent, sys\n"
                 "def broken_stand_in(attempt): raise RuntimeError('a stand-in')\n"
                 "agent.Attempt.run = broken_stand_in\n"
                 "sys.exit(agent.main(['run', '64p25-h264', '--no-probe']))")
        done = run("-c", words, folder=self.folder, env={"PYTHONPATH": str(TOP)}, timeout=60)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("failed itself: RuntimeError: a stand-in", done.stderr)
        self.assertNotIn("Traceback", done.stderr)

    def test_without_ffmpeg_on_path(self) -> None:
        empty = self.folder / "empty-bin"
        empty.mkdir(exist_ok=True)
        done = self.run_agent("--input", "in.mp4", env={"PATH": str(empty)})
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, "ff(mpeg|probe) is not there")
        failed = self.run_agent("64p25-h264", "--json", env={"PATH": str(empty)})
        self.assertEqual(json.loads(failed.stdout)["failure_reason"], "no_capability")

    def test_an_interrupt_ends_it_with_130_and_nothing_left(self) -> None:
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 1)):
            with self.subTest(number):
                env = {
                    name: value
                    for name, value in os.environ.items()
                    if not name.startswith("FFDIST_")
                }
                argv = [sys.executable, str(TOP / "agent.py"), "run", "64p25-h264", "--no-probe",
                        "-p", "duration=60", "-p", "realtime=true", "-o", "long.mkv"]
                process = subprocess.Popen(
                    argv,
                    cwd=self.folder,
                    env={**env, "HOME": str(self.folder)},
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    preexec_fn=interruptible,
                )
                try:
                    wait_for(
                        lambda: list(self.folder.glob(".ffdist-*.part")), 30, "the encode has begun"
                    )
                    process.send_signal(number)
                    _, words = process.communicate(timeout=30)
                finally:
                    process.kill()
                    process.wait()
                self.assertEqual(process.returncode, code, words)
                self.assertNotIn(b"Traceback", words)
                self.assertEqual(list(self.folder.glob(".ffdist-*")), [])
                self.assertEqual(processes_under(self.folder), set())
                self.assertFalse((self.folder / "long.mkv").exists())


if __name__ == "__main__":
    unittest.main()
