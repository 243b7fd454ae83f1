"""The agent's thinking: choices, plans, parsers, spool, client and shares; no encode, no master."""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import tracemalloc
import unittest
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import agent
import hwdetect
from agent import ENCODERS, ApiError, Failure, Machine, Settings, Source
from tests.fleet import run
from tests.support import free_port, need, wait_for

SOFTWARE = {
    "libx264": None,
    "libx265": None,
    "libsvtav1": None,
    "libaom-av1": None,
    "libvpx-vp9": None,
}
NO_CUDA = "Cannot load libcuda.so.1"
FILM = Source("/films/in.mp4", 1920, 1080, 25.0, 60.0, has_audio=True, codec="h264")
# What FFmpeg 5.1 really says on a machine without the hardware.
REFUSED = {"h264_nvenc": NO_CUDA, "hevc_nvenc": NO_CUDA,
           "h264_qsv": "Error initializing an internal MFX session: unsupported (-3)",
           "h264_vaapi": "No VA display found for device /dev/dri/renderD128."}


def machine(threads: int = 8, **encoders: str | None) -> Machine:
    """A machine with FFmpeg's software encoders proved, and more as given."""
    named = {name.replace("libaom_av1", "libaom-av1"): why for name, why in encoders.items()}
    proofs = {name: hwdetect.Proof("failed", why) if why else hwdetect.Proof("proved")
              for name, why in {**SOFTWARE, **named}.items()}
    return Machine("worker-01", "/usr/bin/ffmpeg", threads, 1, proofs)


def planned(scenario: str = "transcode", source: Source = FILM, on: Machine | None = None,
            **parameters: object) -> agent.Plan:
    settings = agent.resolve(scenario, {"input": "in.mp4", "output": "out.mp4", **parameters})
    return agent.plan(settings, on or machine(), source, settings.output or "/work/output")


def value_of(argv: tuple[str, ...], flag: str) -> str | None:
    """The word after a flag, None where the flag is not there."""
    return argv[argv.index(flag) + 1] if flag in argv else None


def frames(made: agent.Plan) -> int:
    return round((made.duration_s or 0) * made.fps)


class ChoosingAnEncoder(unittest.TestCase):
    def choose(
        self, on: Machine, scenario: str = "1080p30-h264", **parameters: object
    ) -> tuple[str, str]:
        return agent.choose_encoder(agent.resolve(scenario, parameters), on)

    def test_a_proved_hardware_encoder_is_taken(self) -> None:
        name, why = self.choose(machine(h264_nvenc=None))
        self.assertEqual(name, "h264_nvenc")
        self.assertIn("proved", why)

    def test_a_listed_but_refused_hardware_encoder_is_not_forced(self) -> None:
        name, why = self.choose(machine(**REFUSED))
        self.assertEqual(name, "libx264")
        for tried in ("h264_nvenc", "h264_qsv", "h264_vaapi"):
            self.assertIn(tried, why)
        self.assertNotIn("hevc_nvenc", why, "encoders of another codec are no reason")

    def test_each_codec_has_a_software_encoder(self) -> None:
        for codec, name in (("h264", "libx264"), ("h265", "libx265"), ("av1", "libsvtav1"),
                            ("vp9", "libvpx-vp9")):
            self.assertEqual(self.choose(machine(), f"720p30-{codec}")[0], name)

    def test_two_passes_go_to_software_even_beside_proved_hardware(self) -> None:
        for codec, hardware, name in (
            ("h264", "h264_nvenc", "libx264"),
            ("h265", "hevc_qsv", "libx265"),
            ("av1", "av1_nvenc", "libaom-av1"),
            ("vp9", "vp9_vaapi", "libvpx-vp9"),
        ):
            on = machine(**{hardware: None})
            chosen, why = self.choose(on, f"720p30-{codec}", two_pass=True, bitrate="1M")
            self.assertEqual(chosen, name)
            self.assertIn("two passes", why)

    def test_ten_bit_passes_by_hardware_that_has_none(self) -> None:
        self.assertEqual(
            self.choose(machine(h264_nvenc=None), pixel_format="yuv420p10le")[0], "libx264"
        )
        self.assertEqual(
            self.choose(machine(hevc_nvenc=None), "1080p30-h265", pixel_format="p010le")[0],
            "hevc_nvenc",
        )

    def test_an_encoder_that_failed_its_trial_is_refused_with_the_node_and_its_own_words(
        self,
    ) -> None:
        with self.assertRaises(Failure) as caught:
            self.choose(machine(**REFUSED), encoder="h264_nvenc")
        self.assertEqual(caught.exception.reason, "no_capability")
        for word in ("h264_nvenc", "worker-01", NO_CUDA):
            self.assertIn(word, caught.exception.message)

    def test_an_encoder_that_this_ffmpeg_lacks_is_refused(self) -> None:
        with self.assertRaises(Failure) as caught:
            self.choose(machine(), "720p30-av1", encoder="librav1e")
        self.assertIn("librav1e", caught.exception.message)
        self.assertIn("not built into this FFmpeg", caught.exception.message)

    def test_a_named_encoder_that_works_is_used_though_hardware_is_there(self) -> None:
        self.assertEqual(self.choose(machine(h264_nvenc=None), encoder="libx264")[0], "libx264")

    def test_no_encoder_at_all_names_the_codec_the_node_and_what_was_tried(self) -> None:
        bare = Machine("worker-01", "ffmpeg", 4, 1, {"libx264": hwdetect.Proof("proved")})
        with self.assertRaises(Failure) as caught:
            self.choose(bare, "720p30-av1")
        for word in ("av1", "worker-01", "libsvtav1"):
            self.assertIn(word, caught.exception.message)

    def test_without_a_probe_software_is_used_and_said_to_be_unproved(self) -> None:
        for codec, name in (("h264", "libx264"), ("h265", "libx265"), ("av1", "libsvtav1"),
                            ("vp9", "libvpx-vp9")):
            chosen, why = self.choose(Machine("w", "ffmpeg", 4), f"720p30-{codec}")
            self.assertEqual(chosen, name)
            self.assertIn("unproved", why)


class ChoosingAPreset(unittest.TestCase):
    def choose(
        self, name: str, pixels_per_s: float, threads: int, **parameters: object
    ) -> str | None:
        settings = agent.resolve("transcode", {"codec": ENCODERS[name].codec, **parameters})
        return agent.choose_preset(settings, name, pixels_per_s, threads)[0]

    def test_a_bigger_picture_or_fewer_threads_never_gives_a_slower_preset(self) -> None:
        order = agent.PRESET_WORDS
        for live in (False, True):
            for threads in (1, 2, 8, 64):
                words = [self.choose("libx264", load, threads, realtime=live)
                         for load in (1e6, 1e7, 3e7, 1e8, 5e8, 2e9)]
                places = [order.index(str(word)) for word in words]
                self.assertEqual(places, sorted(places, reverse=True), (live, threads, words))
        few, many = (order.index(str(self.choose("libx264", 6e7, n))) for n in (1, 16))
        self.assertLess(few, many)

    def test_a_live_encode_is_never_slower_than_a_batch_one(self) -> None:
        order = agent.PRESET_WORDS
        for load in (1e6, 1e7, 3e7, 1e8, 5e8):
            batch, live = (order.index(str(self.choose("libx264", load, 4, realtime=flag)))
                           for flag in (False, True))
            self.assertLessEqual(live, batch)

    def test_every_encoder_takes_every_common_word_in_its_own_words(self) -> None:
        for name, row in ENCODERS.items():
            for word in agent.PRESET_WORDS:
                chosen = self.choose(name, 1e7, 4, preset=word)
                if not row.presets:
                    self.assertIsNone(chosen, name)
                else:
                    self.assertRegex(str(chosen), f"^(?:{row.own})$", f"{name} {word}")

    def test_an_encoders_own_word_is_kept_and_a_strange_one_refused_by_name(self) -> None:
        self.assertEqual(self.choose("libsvtav1", 1e7, 4, preset=10), "10")
        self.assertEqual(self.choose("h264_nvenc", 1e7, 4, preset="p7"), "p7")
        with self.assertRaises(Failure) as caught:
            self.choose("libx264", 1e7, 4, preset="p7")
        self.assertEqual(caught.exception.reason, "parameters")
        self.assertIn("libx264", caught.exception.message)


    def test_a_preset_for_an_encoder_without_any_is_refused_or_said_to_be_ignored(self) -> None:
        for name, row in ENCODERS.items():
            if not row.presets:
                with self.assertRaises(agent.ApiError, msg=name) as caught:
                    agent.resolve(
                        "transcode", {"codec": row.codec, "encoder": name, "preset": "fast"}
                    )
                self.assertEqual(caught.exception.field, "parameters.preset")
                self.assertIn(f"{name}: it has no presets", caught.exception.message)
        made = planned(on=machine(h264_vaapi=None), preset="fast")
        self.assertIsNone(made.preset)
        self.assertIn("preset fast is ignored: h264_vaapi has no presets", made.reason)


class Planning(unittest.TestCase):
    def test_a_pixel_format_that_does_not_go_up_to_the_device_is_refused(self) -> None:
        for wanted in ("p010le", "yuv420p10le", "yuv444p"):
            with self.assertRaises(agent.ApiError) as caught:
                agent.resolve("transcode-h265", {"encoder": "hevc_vaapi", "pixel_format": wanted})
            self.assertEqual(caught.exception.field, "parameters.pixel_format")
        on = machine(hevc_vaapi=None)
        self.assertEqual(planned("transcode-h265", on=on, pixel_format="p010le").encoder, "libx265")
        deep = dataclasses.replace(FILM, pixel_format="yuv420p10le")
        made = planned("transcode-h265", deep, on, encoder="hevc_vaapi")
        self.assertIn("format=nv12,hwupload", str(value_of(made.passes[0], "-vf")))
        self.assertEqual(made.pixel_format, "yuv420p", "what is encoded")

    def test_a_sound_encoder_that_is_broken_here_fails_the_attempt_with_its_reason(self) -> None:
        on = machine(aac=NO_CUDA, libopus=None)
        with self.assertRaises(Failure) as caught:
            planned(on=on)
        self.assertEqual(caught.exception.reason, "no_capability")
        for word in ("aac", "worker-01", NO_CUDA, "audio=false"):
            self.assertIn(word, caught.exception.message)
        self.assertIn("libopus", planned("transcode-vp9", on=on, output="o.webm").passes[0])
        self.assertIn("-an", planned(on=on, audio=False).passes[0])
        late = {**machine().encoders, "aac": hwdetect.Proof("undecided", "no answer within 9 s")}
        busy = dataclasses.replace(machine(), encoders=late)
        self.assertIn("aac", planned(on=busy).passes[0])

    def test_a_film_in_another_shape_keeps_its_shape_inside_the_size_asked_for(self) -> None:
        made = planned("1080p30-h264", dataclasses.replace(FILM, width=1440, height=1080))
        self.assertEqual((made.width, made.height), (1920, 1080))
        self.assertIn("force_original_aspect_ratio=decrease", made.filters)
        self.assertIn("pad=1920:1080", made.filters)

    def test_one_side_alone_gives_the_other_in_the_films_shape_and_even(self) -> None:
        made = planned(source=dataclasses.replace(FILM, width=1440, height=1080), height=720)
        self.assertEqual((made.width, made.height), (960, 720))
        made = planned(source=dataclasses.replace(FILM, width=853, height=480), width=640)
        self.assertEqual((made.width, made.height % 2), (640, 0))

    def test_odd_sizes_become_even_without_scaling(self) -> None:
        made = planned(source=dataclasses.replace(FILM, width=1279, height=719))
        self.assertEqual((made.width, made.height), (1278, 718))
        self.assertIn("crop", made.filters)
        self.assertNotIn("scale", made.filters)

    def test_a_film_as_it_is_passes_through_no_filter(self) -> None:
        self.assertEqual(planned().filters, "")

    def test_a_ten_bit_film_stays_ten_bit_where_the_encoder_can(self) -> None:
        deep = dataclasses.replace(FILM, pixel_format="yuv420p10le")
        self.assertEqual(planned("transcode-h265", deep).pixel_format, "yuv420p10le")
        self.assertEqual(
            planned("transcode-h265", deep, machine(hevc_nvenc=None)).pixel_format, "p010le"
        )
        self.assertEqual(planned(source=deep, on=machine(h264_nvenc=None)).pixel_format, "yuv420p")
        self.assertEqual(
            planned("transcode-h265", deep, pixel_format="yuv420p").pixel_format, "yuv420p"
        )

    def test_ntsc_rates_are_exact_fractions_everywhere(self) -> None:
        for fps, word in (
            (29.97, "30000/1001"),
            (59.94, "60000/1001"),
            (23.976, "24000/1001"),
            (30000 / 1001, "30000/1001"),
            (24, "24"),
            (12.5, "12.5"),
            (119.88, "120000/1001"),
        ):
            self.assertEqual(agent.rational(fps), word)
            self.assertIn(f"fps={word}", planned(fps=fps).filters)
            clip = agent.clip_command("ffmpeg", agent.Picture(64, 64, fps), "libx264", "c.mov")
            self.assertIn(f":rate={word}", " ".join(clip))

    def test_a_steady_ntsc_film_at_its_own_rate_is_not_resampled_and_another_is(self) -> None:
        film = dataclasses.replace(FILM, fps=30000 / 1001, steady=True)
        self.assertEqual(planned(source=film, fps="30000/1001").filters, "")
        film = dataclasses.replace(film, steady=False)
        self.assertIn(",fps=30000/1001", planned(source=film, fps="30000/1001").filters)

    def test_a_film_of_changing_rate_has_a_finer_clock_that_its_beat_keeps_to(self) -> None:
        for beat, tick in (("25/2", "2/975"), ("24000/1001", "143/72000"), ("90000/1", "1/90000"),
                           ("30", "1/480"), ("0/0", None), ("", None)):
            made = planned(source=dataclasses.replace(FILM, base_fps=beat))
            self.assertEqual(value_of(made.passes[0], "-enc_time_base"), tick, beat)
            self.assertNotIn("-enc_time_base", planned(source=dataclasses.replace(
                FILM, base_fps=beat), fps=25).passes[0], "the frames come at a constant rate")

    def test_a_baseline_has_none_of_a_films_settings(self) -> None:
        told = agent.resolve("idle-baseline", {"settle": 1}).to_json()
        self.assertEqual(
            {name: value for name, value in told.items() if value is not None},
            {"scenario": "idle-baseline", "duration": 60, "settle": 1, "cooldown": 0.0},
        )
        self.assertEqual(agent.settings_text(told), "1 min 00 s")

    def test_the_first_seconds_are_of_the_film_and_so_are_less_of_a_picture_that_begins_late(
        self,
    ) -> None:
        late = dataclasses.replace(FILM, start_s=2.0)
        for asked, length in ((None, 60), (10, 8), (61, 59), (1000, 60)):
            made = planned(source=late, **({"duration": asked} if asked else {}))
            self.assertEqual(made.duration_s, length)
            self.assertEqual(value_of(made.passes[0], "-t"), str(asked) if asked else None)

    def test_a_live_output_reads_at_the_inputs_speed_with_a_bounded_rate_and_regular_key_frames(
        self,
    ) -> None:
        made = planned("1080p30-h264", output="rtmp://10.0.0.1/live/x")
        argv = made.passes[0]
        self.assertIn("-re", argv)
        self.assertEqual(value_of(argv, "-f"), "flv")
        self.assertEqual(value_of(argv, "-maxrate"), value_of(argv, "-b:v"))
        self.assertEqual(value_of(argv, "-g"), "60")
        self.assertEqual(argv[-1], "rtmp://10.0.0.1/live/x")
        self.assertEqual(value_of(argv, "-ar"), "44100")

    def test_a_live_source_is_not_slowed_down_a_second_time(self) -> None:
        made = planned(
            source=dataclasses.replace(FILM, url="rtmp://10.0.0.1/live/a", duration_s=None),
            output="rtmp://10.0.0.1/live/b",
        )
        self.assertNotIn("-re", made.passes[0])
        self.assertIsNone(made.duration_s)

    def test_a_live_vp9_encode_asks_for_the_realtime_deadline(self) -> None:
        live, batch = (planned("transcode-vp9", output="o.webm", realtime=flag).passes[0]
                       for flag in (True, False))
        self.assertEqual(value_of(live, "-deadline"), "realtime")
        self.assertEqual(value_of(batch, "-deadline"), "good")

    def test_webm_gets_opus_and_the_others_aac(self) -> None:
        self.assertEqual(
            value_of(planned("transcode-vp9", output="o.webm").passes[0], "-c:a"), "libopus"
        )
        self.assertEqual(value_of(planned().passes[0], "-c:a"), "aac")
        self.assertIn("-an", planned(audio=False).passes[0])
        self.assertIn("-an", planned(source=dataclasses.replace(FILM, has_audio=False)).passes[0])

    def test_only_files_get_the_index_at_their_front(self) -> None:
        self.assertEqual(value_of(planned(output="o.mov").passes[0], "-movflags"), "+faststart")
        for output in ("o.mkv", "rtmp://10.0.0.1/x"):
            self.assertNotIn("-movflags", planned(output=output).passes[0])

    def test_two_passes_share_one_log_and_only_the_second_writes_the_film(self) -> None:
        for codec, output in (
            ("h264", "o.mp4"),
            ("h265", "o.mp4"),
            ("vp9", "o.webm"),
            ("av1", "o.mkv"),
        ):
            first, second = planned(
                f"transcode-{codec}", two_pass=True, bitrate="1M", output=output
            ).passes
            self.assertEqual((first[-1], value_of(first, "-f")), ("-", "null"))
            self.assertIn("-an", first)
            self.assertEqual(second[-1], f"file:{output}")
            if codec == "h265":
                self.assertIn("pass=1", str(value_of(first, "-x265-params")))
                self.assertIn("pass=2", str(value_of(second, "-x265-params")))
            else:
                self.assertEqual((value_of(first, "-pass"), value_of(second, "-pass")), ("1", "2"))
                self.assertEqual(value_of(first, "-passlogfile"), value_of(second, "-passlogfile"))

    def test_crf_where_the_encoder_has_none_is_refused_by_name(self) -> None:
        for name in ("h264_v4l2m2m", "libopenh264"):
            with self.assertRaises(Failure) as caught:
                planned(on=machine(**{name: None}), encoder=name, crf=20)
            self.assertIn("parameters.crf", caught.exception.message)
            self.assertIn(name, caught.exception.message)
            self.assertIn("-b:v", planned(on=machine(**{name: None}), encoder=name).passes[0])

    def test_every_encoder_gets_a_rate_and_no_empty_template(self) -> None:
        for name, row in ENCODERS.items():
            output = "o.mkv"
            made = planned(
                f"transcode-{row.codec}", on=machine(**{name: None}), encoder=name, output=output
            )
            self.assertEqual(value_of(made.passes[0], "-c:v"), name)
            self.assertFalse(
                [word for word in made.passes[0] if "{" in word or word == "None"], made.passes
            )

    def test_a_bitrate_is_a_bitrate_and_with_crf_it_is_the_ceiling(self) -> None:
        argv = planned(bitrate="5M").passes[0]
        self.assertEqual((value_of(argv, "-b:v"), value_of(argv, "-crf")), ("5000k", None))
        argv = planned(bitrate="5M", crf=20).passes[0]
        self.assertEqual(
            (value_of(argv, "-crf"), value_of(argv, "-maxrate"), value_of(argv, "-b:v")),
            ("20", "5000k", None),
        )

    def test_paths_are_never_taken_for_options_or_protocols(self) -> None:
        made = planned(source=dataclasses.replace(FILM, url="-rf"), output="-o:x.mp4")
        self.assertEqual(value_of(made.passes[0], "-i"), "file:-rf")
        self.assertEqual(made.passes[0][-1], "file:-o:x.mp4")
        self.assertIn("-nostdin", made.passes[0])

    def test_a_local_film_may_not_lead_to_the_network_nor_a_url_to_files(self) -> None:
        local = agent.open_args("/films/a.m3u8", "", ())[1].split(",")
        remote = agent.open_args("http://10.0.0.1/a.m3u8", "", ())[1].split(",")
        self.assertFalse({"http", "tcp", "rtmp"} & set(local))
        self.assertNotIn("file", remote)

    def test_frames_expected_follow_from_the_shorter_of_film_and_asked(self) -> None:
        self.assertEqual(frames(planned(duration=2)), 50)
        self.assertEqual(frames(planned(duration=90)), 1500)
        self.assertEqual(frames(planned(duration=2, fps=60)), 120)

    def test_threads_are_what_the_picture_is_worth_shared_among_slots(self) -> None:
        self.assertEqual(planned(on=machine(threads=64)).threads, 16)
        shared = dataclasses.replace(machine(threads=8), slots=4)
        self.assertEqual(planned(on=shared).threads, 2)
        self.assertEqual(planned(on=dataclasses.replace(shared, slots=100)).threads, 1)
        self.assertEqual(planned(on=machine(threads=64), threads=3).threads, 3)

    def test_threads_follow_a_quota_rounded_up_unless_the_job_names_them(self) -> None:
        for percent, count in ((1, 1), (100, 1), (101, 2), (350, 4), (100000, 8)):
            self.assertEqual(
                planned("1080p30-h264", max_cpu_percent=percent).threads, count, percent
            )
        self.assertEqual(planned("1080p30-h264", max_cpu_percent=50, threads=3).threads, 3)

    def test_the_plan_says_why_in_words(self) -> None:
        reason = planned("1080p60-h265", on=machine(**REFUSED)).reason
        for word in ("libx265", "preset", "hevc_nvenc", "threads"):
            self.assertIn(word, reason)

    def test_a_vaapi_encode_uses_a_device_that_the_machine_was_proved_with(self) -> None:
        argv = planned(on=machine(h264_vaapi=None)).passes[0]
        self.assertIn("hwupload", str(value_of(argv, "-vf")))
        self.assertTrue(str(value_of(argv, "-vaapi_device")).startswith("/dev/dri/renderD"))


class ReadingProgress(unittest.TestCase):
    BLOCK = ("frame=132\nfps=61.50\nstream_0_0_q=-1.0\nbitrate= 871.1kbits/s\ntotal_size=48\n"
             "out_time_us=5280000\nout_time_ms=5280000\nout_time=00:00:05.280000\ndup_frames=0\n"
             "drop_frames=2\nspeed=2.46x\nprogress=continue\n")

    def fed(self, text: str) -> list[agent.Progress]:
        parser = agent.ProgressParser()
        return [block for block in (parser.feed(line) for line in text.split("\n")) if block]

    def test_a_block_of_ffmpeg(self) -> None:
        self.assertEqual(self.fed(self.BLOCK),
                         [agent.Progress(132, 61.5, 2.46, 5.28, 48, 2, 0, False)])
        self.assertTrue(self.fed(self.BLOCK.replace("continue", "end"))[0].ended)

    def test_unknown_figures_are_none_never_zero(self) -> None:
        first = self.fed(
            "frame=0\nfps=0.00\nbitrate=N/A\ntotal_size=N/A\nout_time_us=N/A\nspeed=N/A\n"
            "progress=continue"
        )[0]
        self.assertEqual((first.out_time_s, first.total_bytes, first.speed), (None, None, None))

    def test_huge_negatives_of_the_first_blocks_are_unknown(self) -> None:
        block = self.fed("out_time_us=-9223372036854775807\nspeed=-1x\nprogress=continue")[0]
        self.assertEqual((block.out_time_s, block.speed), (None, None))

    def test_garbage_is_passed_over(self) -> None:
        noise = "\x00\n====\nframe\nframe=twelve\nspeed=infx\nfps=nan\n= \nprogress"
        self.assertEqual(self.fed(noise), [])
        block = self.fed(noise + "\nprogress=end")[0]
        self.assertEqual((block.frame, block.speed, block.fps, block.ended), (0, None, None, True))

    def test_a_block_that_never_ends_takes_no_memory_without_bound(self) -> None:
        parser = agent.ProgressParser()
        for number in range(100_000):
            parser.feed(f"key{number}=1")
        self.assertLess(len(parser._block), 1000)

    def test_the_wire_form_spans_both_passes_and_is_json(self) -> None:
        done = agent.Progress(50, 25.0, 1.0, 2.0)
        first, second = (agent.progress_json(done, 4.0, step, 2, "x") for step in (0, 1))
        self.assertEqual((first["percent"], second["percent"]), (25.0, 75.0))
        self.assertEqual((first["eta_s"], second["eta_s"]), (6.0, 2.0))
        unknown = agent.progress_json(agent.Progress(), None, 0, 1, "x")
        self.assertEqual((unknown["percent"], unknown["eta_s"]), (None, None))
        json.dumps(unknown, allow_nan=False)
        beyond = agent.progress_json(agent.Progress(out_time_s=9.0, speed=0.0), 4.0, 0, 1, "x")
        self.assertEqual(beyond["percent"], 100.0)


# Lines as FFmpeg 5.1 printed them here -> words that a user must see, and the class of the failure.
REAL_WORDS = (
    (
        (
            "[mov,mp4,m4a,3gp,3g2,mj2 @ 0x55e063aaf8c0] [error] moov atom not found",
            "[error] cut.mp4: Invalid data found when processing input",
        ),
        "moov atom not found",
        "input",
    ),
    (("[error] nofile.mp4: No such file or directory",), "nofile.mp4: No such file", "input"),
    (("[error] /tmp: Is a directory",), "/tmp: Is a directory", "input"),
    (
        (
            "[h264_nvenc @ 0x56146161ffc0] [error] Cannot load libcuda.so.1",
            "[error] Error initializing output stream 0:0 -- Error while opening encoder for "
            "output stream #0:0 - "
            "maybe incorrect parameters such as bit_rate, rate, width or height",
            "[info] Conversion failed!",
        ),
        "Cannot load libcuda.so.1",
        "no_capability",
    ),
    (
        (
            "[h264_qsv @ 0x55dafcae7fc0] [error] Error initializing an internal MFX session: "
            "unsupported (-3)",
            "[error] Error initializing output stream 0:0 -- Error while opening encoder for "
            "output stream #0:0 - "
            "maybe incorrect parameters such as bit_rate, rate, width or height",
        ),
        "unsupported (-3)",
        "no_capability",
    ),
    (
        (
            "[AVHWDeviceContext @ 0x55616ff7da40] [error] No VA display found for device "
            "/dev/dri/renderD128.",
            "[error] Device creation failed: -22.",
            "[error] Failed to set value '/dev/dri/renderD128' for option 'vaapi_device': "
            "Invalid argument",
            "[fatal] Error parsing global options: Invalid argument",
        ),
        "No VA display found",
        "no_capability",
    ),
    (
        (
            "[info]       encoder         : Lavc59.37.100 libx264",
            "[fatal] Unknown encoder 'libnope'",
        ),
        "Unknown encoder 'libnope'",
        "no_capability",
    ),
    (
        (
            "[tcp @ 0x557fa3fe2c40] [error] Connection to tcp://127.0.0.1:1 failed: Connection "
            "refused",
            "[rtmp @ 0x557fa3fe3600] [error] Cannot open connection "
            "tcp://127.0.0.1:1?tcp_nodelay=0",
            "[error] rtmp://127.0.0.1:1/live/x: Connection refused",
        ),
        "Connection refused",
        "network",
    ),
    (
        (
            "[tcp @ 0x55f4a17efc40] [error] Failed to resolve hostname nohost.invalid: Name or "
            "service not known",
            "[error] rtmp://nohost.invalid/live/x: Input/output error",
        ),
        "nohost.invalid",
        "network",
    ),
    (
        (
            "[http @ 0x564b888c30c0] [warning] HTTP error 404 File not found",
            "[error] http://127.0.0.1:18999/none.mp4: Server returned 404 Not Found",
        ),
        "404 Not Found",
        "input",
    ),
    (
        (
            "[fatal] Stream map '0:V:0' matches no streams.",
            "To ignore this, add a trailing '?' to the map.",
        ),
        "matches no streams",
        "input",
    ),
    (
        (
            "[error] av_interleaved_write_frame(): No space left on device",
            "[error] Error writing trailer of /films/.ffdist-1.part: No space left on device",
            "[libx264 @ 0x55d159f6be00] [info] kb/s:871.10",
            "[info] Conversion failed!",
        ),
        "No space left on device",
        "out_of_disk",
    ),
    (("[error] /films/o.mp4: Permission denied",), "Permission denied", "output"),
    (
        (
            "[error] Could not write header for output file #0 (incorrect codec parameters ?): "
            "Invalid argument",
        ),
        "Could not write header",
        "output",
    ),
    (
        (
            "[srt @ 0x55d8c6f3af00] [error] Connection to srt://127.0.0.1:1 failed: Input/output "
            "error",
            "[error] srt://127.0.0.1:1: Input/output error",
        ),
        "srt://127.0.0.1:1",
        "network",
    ),
    (
        (
            "[http @ 0x557669b698c0] [error] Stream ends prematurely at 52224, should be 104418",
            "[error] http://127.0.0.1:56417/x.mp4: Input/output error",
        ),
        "Input/output error",
        "network",
    ),
    (
        (
            "[http @ 0x560b83c0e0c0] [warning] HTTP error 503 Service Unavailable",
            "[error] http://127.0.0.1:1/x.mp4: Server returned 5XX Server Error reply",
        ),
        "5XX",
        "network",
    ),
    (
        ("http://127.0.0.1:1/x.mp4: Server returned 4XX Client Error, but not one of 40{0,1,3,4}",),
        "4XX",
        "network",
    ),
    (
        ("[error] http://127.0.0.1:1/x.mp4: Server returned 403 Forbidden (access denied)",),
        "403",
        "input",
    ),
    (
        (
            "x264 [error]: invalid preset 'nope'",
            "[libx264 @ 0x5576e3a50840] [error] Error setting preset/tune nope/(null).",
            "[error] Error initializing output stream 0:0 -- Error while opening encoder for "
            "output stream #0:0 - "
            "maybe incorrect parameters such as bit_rate, rate, width or height",
        ),
        "nope",
        "parameters",
    ),
    (("[fatal] Unknown pixel format requested: nope.",), "nope", "parameters"),
    (("[fatal] Unrecognized hwaccel: nope.",), "nope", "parameters"),
    (
        (
            "[AVHWDeviceContext @ 0x55e492d1c580] [error] Could not dynamically load CUDA",
            "[error] Device creation failed: -1.",
            "[h264 @ 0x55e492d1d180] [error] No device available for decoder: device type cuda "
            "needed for codec",
        ),
        "CUDA",
        "no_capability",
    ),
    (
        (
            "x264 [error]: malloc of size 16386 failed",
            "[error] Error initializing output stream 0:0 -- Error while opening encoder for "
            "output stream #0:0 - "
            "maybe incorrect parameters such as bit_rate, rate, width or height",
        ),
        "malloc",
        "out_of_memory",
    ),
    (
        (
            "[error] Error while opening decoder for input stream #0:0 : Resource temporarily "
            "unavailable",
        ),
        "Resource temporarily unavailable",
        "out_of_memory",
    ),
)


class Patience(unittest.TestCase):
    def test_an_encode_that_shows_no_frame_is_given_up_later_where_frames_are_slow(self) -> None:
        self.assertEqual(agent.stall_limit_s(0, 0), 1800)
        self.assertEqual(agent.stall_limit_s(1000, 40), 300)
        self.assertEqual(agent.stall_limit_s(10, 100), 600)
        self.assertEqual(
            [agent.stall_limit_s(frames, 10, 4.0) for frames in (0, 1000, 100)], [24, 4, 6]
        )


    def test_the_end_of_an_encode_is_foreseen_shortly_before_and_only_where_frames_are_quick(
        self,
    ) -> None:
        def foreseen(out_time_s: float | None, elapsed_s: float, expected_s: float | None = 10.0,
                     fps: float = 100.0) -> bool:
            done = agent.Progress(round(fps * elapsed_s), out_time_s=out_time_s)
            return agent.ends_soon(done, elapsed_s, expected_s)

        self.assertEqual([foreseen(out_s, 10.0) for out_s in (9.0, 9.4, 10.0, 10.4)],
                         [False, True, True, True])
        self.assertFalse(foreseen(9.4, 20.0), "at half the speed there are 1.3 s left")
        self.assertFalse(foreseen(9.9, 10.0, fps=15.0), "the encoder holds frames for seconds")
        self.assertFalse(foreseen(99.9, 100.0, 100.0), "it is not worth it")
        for unknown in (foreseen(None, 10.0), foreseen(0.0, 10.0), foreseen(9.9, 10.0, None)):
            self.assertFalse(unknown)


class ReadingFfmpegsWords(unittest.TestCase):
    def test_the_reason_shown_is_ffmpegs_own_without_its_decoration(self) -> None:
        for lines, told, _ in REAL_WORDS:
            words = agent.last_words(lines)
            self.assertIn(told, words)
            self.assertNotRegex(words, r"0x[0-9a-f]|\[error\]|\[fatal\]|Conversion failed")

    def test_each_real_failure_has_its_class(self) -> None:
        for lines, _, reason in REAL_WORDS:
            self.assertEqual(agent.failure_reason(1, "\n".join(lines)), reason, lines)

    def test_a_process_that_was_killed_is_killed_whatever_it_had_said_before(self) -> None:
        self.assertEqual(agent.failure_reason(-signal.SIGKILL, ""), "killed")
        damaged = "[h264 @ 0x55] [error] Invalid data found when processing input"
        self.assertEqual(
            agent.failure_reason(-signal.SIGKILL, damaged),
            "killed",
            "the kernel's OOM killer is no fault of the film: it must be tried elsewhere",
        )

    def test_an_ffmpeg_that_others_told_to_end_was_killed(self) -> None:
        told = ["[swscaler @ 0x55] [warning] deprecated pixel format used",
                "[info] Exiting normally, received signal 15."]
        self.assertEqual(agent.failure_reason(255, "\n".join(agent.telling_lines(told))), "killed")
        self.assertEqual(agent.failure_reason(255, "[error] something new"), "encoder")

    def test_a_program_that_could_not_be_started_is_no_missing_film(self) -> None:
        missing = "nice: 'ffmpeg': No such file or directory"
        self.assertEqual(agent.failure_reason(127, missing), "no_capability")
        self.assertEqual(agent.failure_reason(1, ""), "no_capability", "no FFmpeg that works")
        self.assertEqual(
            agent.failure_reason(
                127,
                "ffmpeg: error while loading shared libraries: libx.so: "
                "failed to map segment from shared object",
            ),
            "out_of_memory",
        )

    def test_a_crash_is_no_network_trouble(self) -> None:
        self.assertEqual(agent.failure_reason(-signal.SIGSEGV, "[info] Stream mapping:"), "killed")
        self.assertEqual(agent.failure_reason(1, "[error] something new"), "encoder")

    def test_no_words_at_all(self) -> None:
        self.assertEqual(agent.last_words([]), "")
        self.assertEqual(agent.last_words(["", "  "]), "")
        self.assertEqual(agent.last_words(["[info] Conversion failed!"]), "Conversion failed!")

    def test_a_repeated_error_is_told_once(self) -> None:
        self.assertEqual(
            agent.last_words(["[error] broken"] * 40 + ["[error] gone"]), "broken; gone"
        )

    def test_scores_in_ffmpegs_words(self) -> None:
        frames = [
            "n:1 mse_avg:0.00 psnr_avg:inf psnr_y:inf ",
            "n:2 mse_avg:1.00 psnr_avg:25.00 psnr_y:9 ",
        ]
        words = [
            "[Parsed_psnr_2 @ 0x5] [info] PSNR y:40.1 u:44 v:44 average:41.25 min:39.0 max:45.1"
        ]
        self.assertEqual(agent.parse_scores("psnr", words, frames),
                         ({"psnr_db": 41.25, "psnr_min_db": 25.0, "psnr_harmonic_db": 40.0}, 2))
        same = agent.parse_scores(
            "psnr", ["[info] PSNR y:inf u:inf v:inf average:inf min:inf max:inf"], ["psnr_avg:inf"]
        )
        self.assertEqual(set(same[0].values()), {agent.PERFECT_PSNR_DB})
        near, _ = agent.parse_scores("psnr", ["[info] PSNR y:122.09 u:inf average:123.85 max:inf"],
                                     ["psnr_avg:inf", "psnr_avg:119.08", "psnr_avg:99.00"])
        self.assertEqual(
            (near["psnr_db"], near["psnr_min_db"]), (100.0, 99.0), "no better than identical"
        )
        found, _ = agent.parse_scores(
            "ssim",
            ["[Parsed_ssim_2 @ 0x5] [info] SSIM Y:0.98 (18.1) U:0.99 (20) All:0.985417 (18.4)"],
            [
                "n:1 Y:0.911767 U:0.953611 All:0.500000 (3.0)",
                "n:2 Y:1.0 U:1.0 V:1.0 All:1.000000 (inf)",
            ],
        )
        self.assertEqual(found, {"ssim": 0.985417, "ssim_min": 0.5, "ssim_harmonic": 0.666667})
        found, count = agent.parse_scores(
            "vmaf",
            ["[Parsed_libvmaf_0 @ 0x5] [info] VMAF score: 93.125"],
            ["Frame,integer_adm2,vmaf,", "0,0.9,0.000000,", "1,0.9,99.000000,"],
        )
        self.assertEqual(
            (found, count), ({"vmaf": 93.125, "vmaf_min": 0.0, "vmaf_harmonic": 0.980198}, 2)
        )
        found, _ = agent.parse_scores(
            "xpsnr",
            ["[info] XPSNR  y: 38.2  u: 41  v: 41  (minimum: 38.2)"],
            ["n:    1  XPSNR y: 31.8241  XPSNR u: 35.8520  XPSNR v: 34.8800"],
        )
        self.assertEqual((found["xpsnr_db"], found["xpsnr_min_db"]), (38.2, 31.8241))
        for metric in agent.SCORES:
            found = agent.parse_scores(metric, ["[error] no such filter", "PSNR", ""], ["", "n:1"])
            self.assertEqual(found, ({}, 0))

    def test_pictures_are_compared_in_the_depth_of_the_source(self) -> None:
        for source, compared in (
                ("yuv420p", "yuv420p"), ("yuvj420p", "yuv420p"), ("yuv420p10le", "yuv420p10le"),
                ("p010le", "yuv420p10le"), ("yuv422p", "yuv422p"), ("yuv444p12le", "yuv444p12le"),
                ("rgb24", "yuv420p"), ("gbrp10le", "yuv420p10le"), ("yuv422p16be", "yuv422p12le")):
            self.assertEqual(agent.comparison_format(source), compared, source)


class ReadingProbes(unittest.TestCase):
    VIDEO: ClassVar[agent.Json] = {
        "codec_type": "video",
        "codec_name": "h264",
        "width": 1280,
        "height": 720,
        "pix_fmt": "yuv420p",
        "avg_frame_rate": "25/1",
        "duration": "5.28",
    }

    def probe(self, *streams: object, **format_: object) -> Source:
        return agent.parse_probe(
            json.dumps({"streams": list(streams), "format": format_}), "in.mp4"
        )

    def test_a_common_film(self) -> None:
        film = self.probe(self.VIDEO, {"codec_type": "audio"})
        self.assertEqual((film.width, film.height, film.fps, film.duration_s, film.has_audio),
                         (1280, 720, 25.0, 5.28, True))

    def test_a_cover_picture_is_no_film(self) -> None:
        cover = {**self.VIDEO, "width": 300, "height": 300, "disposition": {"attached_pic": 1}}
        self.assertEqual(self.probe(cover, self.VIDEO).width, 1280)
        with self.assertRaises(Failure) as caught:
            self.probe(cover, {"codec_type": "audio"})
        self.assertEqual(caught.exception.reason, "input")
        self.assertIn("in.mp4", caught.exception.message)

    def test_a_rotated_film_is_as_it_is_seen(self) -> None:
        for turn in (90, -90, 270):
            film = self.probe({**self.VIDEO, "side_data_list": [{"rotation": turn}]})
            self.assertEqual((film.width, film.height), (720, 1280))
        self.assertEqual(self.probe({**self.VIDEO, "tags": {"rotate": "90"}}).width, 720)
        self.assertEqual(
            self.probe({**self.VIDEO, "side_data_list": [{"rotation": 180}]}).width, 1280
        )

    def test_pixels_that_are_not_square_count_in_the_width(self) -> None:
        film = self.probe(
            {**self.VIDEO, "width": 720, "height": 576, "sample_aspect_ratio": "64:45"}
        )
        self.assertEqual((film.width, film.height, film.square_pixels), (1024, 576, False))
        self.assertTrue(self.probe({**self.VIDEO, "sample_aspect_ratio": "0:1"}).square_pixels)
        turned = self.probe(
            {
                **self.VIDEO,
                "width": 320,
                "height": 180,
                "sample_aspect_ratio": "4:3",
                "side_data_list": [{"rotation": 90}],
            }
        )
        self.assertEqual(
            (turned.width, turned.height), (134, 320), "FFmpeg turns the shape of pixels too"
        )

    def test_a_picture_that_no_encoder_takes_is_said_to_be_too_small(self) -> None:
        for width, height in ((1, 1), (17, 1), (1, 100)):
            with self.assertRaisesRegex(Failure, f"in.mp4 is {width}x{height} pixels: too small"):
                self.probe({**self.VIDEO, "width": width, "height": height})

    def test_a_rate_is_steady_only_where_the_frames_were_counted(self) -> None:
        film = {**self.VIDEO, "r_frame_rate": "25/1", "nb_frames": "132"}
        for change, steady, beat in (
            ({}, True, ""),
            ({"nb_frames": "N/A"}, False, ""),
            ({"avg_frame_rate": "125/7", "r_frame_rate": "25/2"}, False, "25/2"),
            ({"avg_frame_rate": "0/0"}, True, ""),
            ({"r_frame_rate": "0/0"}, True, ""),
        ):
            found = self.probe({**film, **change})
            self.assertEqual((found.steady, found.base_fps), (steady, beat), change)

    def test_a_picture_that_begins_late_is_no_longer_for_it(self) -> None:
        """Matroska's word for the length is the time of the end; others tell the length."""
        bare = {name: value for name, value in self.VIDEO.items() if name != "duration"}
        late = {**bare, "start_time": "3.000000", "tags": {"DURATION": "00:00:05.000000000"}}
        film = self.probe(late, format_name="matroska,webm", start_time="2.977", duration="5.0")
        self.assertEqual((film.duration_s, round(film.start_s, 6)), (2.0, 0.023))
        film = self.probe(
            {**bare, "start_time": "3.0"}, format_name="matroska,webm", duration="5.0"
        )
        self.assertEqual(film.duration_s, 2.0)
        film = self.probe(
            {**self.VIDEO, "start_time": "0.5"}, format_name="mov", start_time="-0.25"
        )
        self.assertEqual((film.duration_s, film.start_s), (5.28, 0.75))
        film = self.probe(
            {**self.VIDEO, "start_time": "1.4"}, format_name="mpegts", start_time="N/A"
        )
        self.assertEqual(film.start_s, 1.4)

    def test_an_unknown_length_is_none_never_zero(self) -> None:
        bare = {name: value for name, value in self.VIDEO.items() if name != "duration"}
        self.assertIsNone(self.probe(bare).duration_s)
        self.assertIsNone(self.probe({**bare, "duration": "N/A"}).duration_s)
        self.assertEqual(
            self.probe({**bare, "tags": {"DURATION": "00:01:02.500000000"}}).duration_s, 62.5
        )
        self.assertEqual(self.probe(bare, duration="7.5").duration_s, 7.5)

    def test_hostile_answers_are_a_failure_or_a_film_and_never_an_error_of_ours(self) -> None:
        strange = (
            None,
            [],
            {},
            "x",
            -1,
            0,
            1e400,
            "1e999",
            "nan",
            "0/0",
            True,
            [[]],
            {"a": {}},
            "9" * 400,
        )
        texts = [
            "",
            "{",
            "null",
            "[]",
            "5",
            '"x"',
            "[" * 100_000,
            '{"streams": 5}',
            '{"streams": "abc"}',
            '{"streams": [null, 5, "x", []]}',
            '{"format": []}',
        ]
        texts += [
            json.dumps({"streams": [{**self.VIDEO, name: value}], "format": {}})
            for name in (
                *self.VIDEO,
                "sample_aspect_ratio",
                "disposition",
                "tags",
                "side_data_list",
                "r_frame_rate",
            )
            for value in strange
        ]
        texts += [json.dumps({"streams": [self.VIDEO], "format": value}) for value in strange]
        texts += [json.dumps({"streams": [{**self.VIDEO, "side_data_list": [{"rotation": value}]}]})
                  for value in strange]
        for text in texts:
            try:
                film = agent.parse_probe(text, "in.mp4")
            except Failure as failure:
                self.assertIn("in.mp4", failure.message)
            except Exception as error:
                self.fail(f"{type(error).__name__}: {error} for {text[:200]}")
            else:
                self.assertGreater(film.width, 0, text)
                self.assertGreater(film.fps, 0, text)


class ReadingWords(unittest.TestCase):
    def test_durations(self) -> None:
        for text, value in (
            ("10s", 10),
            ("0.5s", 0.5),
            ("1m30s", 90),
            ("2h", 7200),
            ("7", 7),
            (" 3s ", 3),
            ("1h1m1s", 3661),
        ):
            self.assertEqual(agent.parse_duration(text), value)
        for text in ("", "s", "-1", "10x", "1e3", "nan", "inf", "10 s s", "m", "1s1h"):
            with self.assertRaises(ValueError, msg=text):
                agent.parse_duration(text)

    def test_sizes(self) -> None:
        for text, size in (
            ("0", 0),
            ("1000", 1000),
            ("64M", 64 << 20),
            ("1.5g", 3 << 29),
            ("2GiB", 2 << 30),
            ("4kB", 4096),
            ("1T", 1 << 40),
        ):
            self.assertEqual(agent.size_bytes(text), size, text)
        for text in ("", "M", "-1", "lots", "1 000", "1e9", "64MM", "∞", "1.2345M"):
            with self.assertRaises(argparse.ArgumentTypeError, msg=text):
                agent.size_bytes(text)

    def test_a_duration_of_nothing_is_one_only_where_it_may_be(self) -> None:
        self.assertEqual((agent.seconds("0s", none=True), agent.seconds("2s")), (0, 2))
        for text, none in (("0s", False), ("31d", True), ("1000h", True)):
            with self.assertRaises(argparse.ArgumentTypeError, msg=text):
                agent.seconds(text, none=none)

    def test_a_duration_beyond_all_clocks_is_refused(self) -> None:
        with self.assertRaises((ValueError, agent.argparse.ArgumentTypeError)):
            agent.seconds("9" * 400)

    def test_parameters_of_a_command_line(self) -> None:
        self.assertEqual(
            agent.parameters_of(
                [
                    "duration=1m30s",
                    "bitrate=5M",
                    "two_pass=yes",
                    "crf=21",
                    "quality=psnr,ssim",
                    "codec=h265",
                    "fps=30000/1001",
                    "input=a=b.mp4",
                    "name_unknown=1",
                ]
            ),
            {
                "duration": 90.0,
                "bitrate": "5M",
                "two_pass": True,
                "crf": 21,
                "quality": ["psnr", "ssim"],
                "codec": "h265",
                "fps": "30000/1001",
                "input": "a=b.mp4",
                "name_unknown": "1",
            },
        )
        for word in ("duration", "=5", ""):
            with self.assertRaises(ValueError):
                agent.parameters_of([word])

    def test_what_a_command_line_gives_resolves_or_is_refused_with_its_field(self) -> None:
        for words in (["preset=8", "codec=av1"], ["bitrate=5000000"], ["threads=4"], ["fps=29.97"]):
            self.assertIsInstance(agent.resolve("transcode", agent.parameters_of(words)), Settings)
        for word, field in (("crf=low", "crf"), ("duration=-5", "duration"), ("fps=nan", "fps"),
                            ("bitrate=inf", "bitrate"), ("duration=9e999", "duration"),
                            ("width=1" + "0" * 400, "width"), ("two_pass=perhaps", "two_pass")):
            with self.assertRaises(agent.ApiError) as caught:
                agent.resolve("transcode", agent.parameters_of([word]))
            self.assertEqual(caught.exception.field, f"parameters.{field}", word)

    def test_places_that_no_file_system_takes_are_refused_at_once(self) -> None:
        for name, place in (("input", "\ud800.mp4"), ("output", "\ud800.mp4"), ("input", "a\x00b"),
                            ("output", "a\nb.mp4")):
            with self.assertRaises(agent.ApiError, msg=repr(place)) as caught:
                agent.resolve("transcode", {name: place})
            self.assertEqual(caught.exception.field, f"parameters.{name}")

    def test_loopback_and_link_local_are_opened_only_where_listed(self) -> None:
        closed = (
            "127.0.0.1",
            "127.8.8.8",
            "::1",
            "169.254.169.254",
            "fe80::1",
            "fe80::1%eth0",
            "0.0.0.0",
            "::",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "2002:7f00:1::1",
            "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe",
            "fd00:ec2::254",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "::ffff:168.63.129.16",
            "fd20:ce::254",
            "fd00:42::42",
            "fd00:c1::a9fe:a9fe",
            "fd00:ec2::23",
        )
        for address in closed:
            self.assertFalse(agent.address_allowed(address, "host", ()), address)
            self.assertFalse(
                agent.address_allowed(address, "host", ("10.0.0.0/8", "other", "")), address
            )
            self.assertTrue(agent.address_allowed(address, "Media", ("media",)), address)
        for address in ("8.8.8.8", "10.0.0.1", "2001:db8::1", "192.168.1.1", "fd00:ec2::253",
                        "64:ff9b::a00:1"):
            self.assertTrue(agent.address_allowed(address, "host", ()))
        self.assertTrue(agent.address_allowed("127.0.0.1", "localhost", ("127.0.0.0/8",)))
        self.assertTrue(agent.address_allowed("::ffff:127.0.0.1", "x", ("127.0.0.1",)))
        self.assertFalse(agent.address_allowed("127.0.0.2", "x", ("127.0.0.1",)))


class ShowingPeople(unittest.TestCase):
    def test_a_table_fits_and_wraps_its_last_column(self) -> None:
        text = agent.table_text([("why", "one two three four five six seven"), ("size", "1 B")], 26)
        self.assertEqual(text.split("\n")[0], "why   one two three four")
        for line in text.split("\n"):
            self.assertLessEqual(len(line), 26)
        self.assertEqual(agent.table_text([], 80), "")
        self.assertEqual(agent.table_text([("a", "")], 1), "a")
        self.assertIn("x" * 300, agent.table_text([("a", "x" * 300)], 40), "a long path is not cut")

    def test_a_wide_table_puts_what_has_no_room_below_its_row(self) -> None:
        rows = [("JOB", "STATUS", "COST", "NODE", "WHAT"),
                ("0a1b2c3d", "completed", "-", "node-1", "one two three four five six"),
                ("4e5f6a7b", "failed", "-", "n", "-")]
        wide = agent.table_text(rows, 80, heads=True).split("\n")
        self.assertEqual(
            wide[0], "JOB       STATUS     NODE    WHAT", "the column of which nothing is known"
        )
        self.assertEqual(len(wide), 3)
        wrapped = agent.table_text(rows, 49, heads=True).split("\n")
        self.assertEqual(wrapped[1:3], ["0a1b2c3d  completed  node-1  one two three four",
                                        " " * 29 + "five six"])
        self.assertEqual(agent.table_text(rows, 30, heads=True).split("\n"), [
            "JOB       STATUS     NODE", "  WHAT", "0a1b2c3d  completed  node-1",
            "  one two three four five six", "4e5f6a7b  failed     n", "  -"])
        self.assertEqual(agent.table_text(rows, 24, heads=True).split("\n")[2:5], [
            "0a1b2c3d  completed", "  node-1  one two three", "  four five six"])

    def test_a_path_that_has_no_room_beside_its_name_stands_below_it(self) -> None:
        text = agent.table_text([("settings", "a b"), ("output", "/films/" + "x" * 28)], 40)
        self.assertEqual(text.split("\n"), ["settings  a b", "output", "  /films/" + "x" * 28])

    def test_colours_do_not_move_columns(self) -> None:
        rows = [("completed", "x"), ("failed", "y")]
        plain, painted = agent.table_text(rows, 80), agent.table_text(rows, 80, {"failed": "31"})
        self.assertEqual(painted.replace("\x1b[31m", "").replace("\x1b[0m", ""), plain)
        self.assertIn("\x1b[31mfailed\x1b[0m", painted)

    def test_unknown_figures_are_shown_with_their_reason(self) -> None:
        rows = dict(agent.result_rows({"metrics": {
            "energy_joules": None, "duration": 1.0, "frames": 30,
            "unknown": {"energy_joules": "no RAPL: a virtual machine"}}}))
        self.assertIn("no RAPL: a virtual machine", rows["energy"])
        self.assertIn("unknown", rows["CPU"])
        self.assertNotIn("None", " ".join(rows.values()))

    def test_results_of_strangers_can_be_shown(self) -> None:
        for result in (
            {},
            {"metrics": None},
            {"metrics": {}},
            {"metrics": {"unknown": None}, "encode": None},
            {
                "metrics": {"cpu_usage": 75.5, "memory_usage": 2048, "duration": 5.0},
                "analyzer_output": {"scenario": "4K60-h264", "recommendation": "optimal"},
            },
        ):
            rows = agent.result_rows(result)
            self.assertTrue(all(isinstance(cell, str) for row in rows for cell in row))

    def test_quality_that_was_asked_for_and_could_not_be_taken_says_why(self) -> None:
        rows = dict(
            agent.result_rows(
                {
                    "metrics": {
                        "psnr_db": None,
                        "ssim": None,
                        "vmaf": None,
                        "xpsnr_db": None,
                        "unknown": {
                            "psnr_db": "not asked for",
                            "ssim": "not asked for",
                            "xpsnr_db": "not asked for",
                            "vmaf": "this FFmpeg has no vmaf filter",
                        },
                    }
                }
            )
        )
        self.assertIn("no vmaf filter", rows["quality"])

    def test_progress_for_people(self) -> None:
        self.assertEqual(agent.progress_text({}), "encoding")
        line = agent.progress_text(
            {"phase": "pass 1 of 2", "percent": 50.0, "fps": 61.7, "speed": 2.0, "eta_s": 75}
        )
        bar = "#" * 12 + "." * 12
        self.assertEqual(line, f"pass 1 of 2  [{bar}]  50 %  62 fps  2.00x  1 min 15 s left")
        for value in (None, "x", -5, 1e9):
            agent.progress_text({"percent": value, "fps": None, "speed": None, "eta_s": None})
        self.assertEqual(
            agent.progress_text({"percent": 0, "fps": 0.0, "speed": 1.2}).count(" %"), 1
        )
        for early in ({"fps": 0.0, "speed": 1.2}, {"fps": 3.0, "speed": 0.0}, {"fps": 3.0}):
            self.assertEqual(agent.progress_text({"phase": "starting", **early}), "starting")

    def test_the_bar_of_progress_gives_way_to_its_figures(self) -> None:
        told = {"phase": "pass 1 of 2", "percent": 50.0, "fps": 61.7, "speed": 2.0, "eta_s": 75}
        figures = "50 %  62 fps  2.00x  1 min 15 s left"
        for room in range(len("pass 1 of 2   ") + len(figures), 90):
            line = agent.progress_text(told, room)
            self.assertLessEqual(len(line), room)
            self.assertTrue(line.endswith(figures), line)
        self.assertIn("[##..]", agent.progress_text(told, 59))

    def test_counts_for_people(self) -> None:
        self.assertEqual([agent.count_text(count, "job") for count in (0, 1, 2)],
                         ["0 jobs", "1 job", "2 jobs"])

    def test_control_characters_cannot_steer_a_terminal(self) -> None:
        self.assertEqual(agent.printable("a\x1b[31mb\x07\u202ec\n"), "a?[31mb??c?")


class FolderCase(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.mkdtemp(prefix="ffdist-test-")
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        self.folder = Path(folder)


class Spooling(FolderCase):
    def setUp(self) -> None:
        super().setUp()
        self.spool = agent.Spool(self.folder / "spool")

    def put(self, *names: str) -> None:
        for name in names:
            self.spool.put({"job_id": name, "attempt": 1, "status": "completed"})

    def waiting(self) -> list[str]:
        return [result["job_id"] for _, result in agent.Spool(self.folder / "spool").entries()]

    def test_reports_come_back_in_their_order_after_a_restart(self) -> None:
        names = [f"job-{number}" for number in range(20)]
        self.put(*names)
        self.assertEqual(self.waiting(), names)

    def test_a_clock_that_is_set_back_does_not_change_their_order(self) -> None:
        for number, now in enumerate((2e9, 1e9, 3e9, 5e8)):
            with mock.patch("agent.time.time", lambda now=now: now), mock.patch(
                    "agent.time.time_ns", lambda now=now: int(now * 1e9)):
                self.spool = agent.Spool(self.folder / "spool") if number == 2 else self.spool
                self.put(f"job-{number}")
        self.assertEqual(self.waiting(), [f"job-{number}" for number in range(4)])

    def test_reports_are_for_their_owner_alone(self) -> None:
        self.put("a")
        for path in (self.folder / "spool").iterdir():
            self.assertEqual(path.stat().st_mode & 0o077, 0)
        self.assertEqual((self.folder / "spool").stat().st_mode & 0o077, 0)

    def test_torn_files_do_not_stop_the_others_and_are_kept_aside(self) -> None:
        self.put("a")
        torn = ('{"job_id": "x"', "", "[]", "null", '{"job_id": "x"}')
        for number, text in enumerate(torn):
            (self.folder / "spool" / f"{number}.json").write_text(text)
        (self.folder / "spool" / "5.json").write_bytes(b"\xff\xfe\x00")
        self.put("b")
        self.assertEqual(self.waiting(), ["a", "b"])
        self.assertEqual(self.waiting(), ["a", "b"])
        self.assertEqual(len(list((self.folder / "spool").glob("*.aside"))), 6)

    def test_a_write_that_was_cut_by_a_kill_is_no_report(self) -> None:
        (self.folder / "spool" / "7.tmp").write_text('{"job_id": "half"')
        self.assertEqual(self.waiting(), [])
        self.assertEqual(list((self.folder / "spool").iterdir()), [])

    def test_a_report_is_on_the_disk_before_it_has_its_name_and_its_name_too(self) -> None:
        done: list[object] = []
        fsync, replace = os.fsync, os.replace

        def noted_fsync(descriptor: int) -> None:
            found = os.fstat(descriptor)
            done.append("folder" if stat.S_ISDIR(found.st_mode) else found.st_size)
            fsync(descriptor)

        def noted_replace(old: Path, new: Path) -> None:
            done.append("name")
            replace(old, new)

        with (
            mock.patch("agent.os.fsync", noted_fsync),
            mock.patch("agent.os.replace", noted_replace),
        ):
            self.put("a")
        size = next((self.folder / "spool").glob("*.json")).stat().st_size
        self.assertEqual(done, [size, "name", "folder"])

    def test_a_full_disk_is_an_error_and_leaves_nothing_behind(self) -> None:
        def full_disk_stand_in(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with mock.patch("agent.os.fsync", full_disk_stand_in):
            for _ in range(3):
                with self.assertRaises(OSError):
                    self.put("a")
        self.assertEqual(
            list((self.folder / "spool").iterdir()), [], "each try would fill the disk further"
        )
        self.put("a")
        self.assertEqual(self.waiting(), ["a"])


class Timekeeping(unittest.TestCase):
    """The stopwatch of an attempt and what reads it, by a clock of the test's own."""

    def setUp(self) -> None:
        self.now = 100.0
        self.watch = agent.Stopwatch(lambda: self.now)
        self.signals: list[str] = []

    def pause(self) -> None:
        self.watch.pause(lambda: self.signals.append("stop"))

    def resume(self) -> None:
        self.watch.resume(lambda: self.signals.append("go on"))

    def after(self, seconds: float) -> float:
        self.now += seconds
        return self.watch.elapsed_s()

    def test_a_repeated_order_changes_nothing(self) -> None:
        self.resume()
        self.assertEqual(self.after(2), 2)
        for _ in range(3):
            self.pause()
            self.assertEqual(self.after(5), 2)
        for _ in range(3):
            self.resume()
        self.assertEqual(self.after(1), 3)
        self.assertEqual(self.signals, ["stop", "go on"])

    def test_a_pause_that_overlaps_with_a_reading_counts_once(self) -> None:
        with self.watch.reading():
            self.assertEqual(self.after(0.4), 0)
            self.pause()
            self.assertEqual(self.after(0.4), 0)
        self.assertEqual(self.after(3), 0, "still paused")
        with self.watch.reading():
            self.resume()
            self.assertEqual(self.after(0.4), 0, "still reading")
        self.assertEqual(self.after(1), 1)
        self.assertFalse(self.watch.paused)

    def test_a_signal_is_repeated_only_while_paused(self) -> None:
        self.assertFalse(self.watch.repeat_pause(lambda: self.signals.append("stop")))
        self.pause()
        self.assertTrue(self.watch.repeat_pause(lambda: self.signals.append("again")))
        self.assertEqual(self.signals, ["stop", "again"])

    def test_the_clock_stands_still_in_line(self) -> None:
        with self.watch.in_line():
            self.assertEqual(self.after(5), 0)
            self.assertFalse(self.watch.paused)
        self.assertEqual(self.after(1), 1)

    def test_neither_the_timeout_nor_the_stall_limit_runs_in_a_pause(self) -> None:
        watchdog = agent.Watchdog(self.watch, "worker-01")
        self.now += 50
        watchdog.start(10.0)
        watchdog.note_frame()
        watchdog.expect_frames(4.0)
        self.now += 3
        self.pause()
        self.now += 1000
        watchdog.check("a.mp4")
        self.assertEqual(watchdog.left_s(), 7)
        self.resume()
        self.now += 0.9
        watchdog.check("a.mp4")
        self.now += 0.2
        with self.assertRaises(Failure) as caught:
            watchdog.check("a.mp4")
        self.assertEqual(caught.exception.reason, "stalled")
        watchdog.expect_no_frames()
        self.now += 5.8
        watchdog.check("a.mp4")
        self.now += 0.2
        with self.assertRaises(Failure) as caught:
            watchdog.check("a.mp4")
        self.assertEqual(caught.exception.reason, "timeout")
        watchdog.lift_timeout()
        watchdog.check("a.mp4")


class TakingTurns(unittest.TestCase):
    """The slots of a node, and the attempts that wait for one."""

    def setUp(self) -> None:
        patch = mock.patch("agent.SLICE_S", 0.01)
        patch.start()
        self.addCleanup(patch.stop)
        self.free, self.changes = agent.FreeSlots(), 0

    def slot(self) -> agent.Slot:
        return agent.Slot(self.free, self.changed)

    def changed(self) -> None:
        self.changes += 1

    def test_one_waits_until_the_other_gives_it(self) -> None:
        first, second, order = self.slot(), self.slot(), list[str]()
        first.take(lambda: self.fail("it is free"))
        first.take(lambda: self.fail("it has it"))

        def waits() -> None:
            second.take(lambda: order.append("looks"))
            order.append("takes")

        worker = threading.Thread(target=waits)
        worker.start()
        wait_for(lambda: len(order) > 2, why="it waits, and looks in each slice of time")
        self.assertTrue(second.in_line and second.wanted)
        self.assertNotIn("takes", order)
        self.assertEqual(self.changes, 0)
        first.give()
        worker.join(60)
        self.assertEqual(order[-1], "takes")
        self.assertEqual((first.wanted, second.in_line, self.changes), (False, False, 1))

    def test_it_can_be_given_only_once(self) -> None:
        first, second, third = self.slot(), self.slot(), self.slot()
        first.take(lambda: None)
        for _ in range(3):
            first.give()
        second.take(lambda: None)
        with mock.patch("agent.MAX_IN_LINE_S", 0.0), self.assertRaises(agent.Stopped) as caught:
            third.take(lambda: None)
        self.assertEqual(caught.exception.args, ("returned",), "another node may have the job")
        third.give()
        with mock.patch("agent.MAX_IN_LINE_S", 0.0), self.assertRaises(agent.Stopped):
            self.slot().take(lambda: None)
        self.assertEqual(self.changes, 1)

    def test_an_order_reaches_one_that_waits(self) -> None:
        self.slot().take(lambda: None)
        waits = mock.Mock(side_effect=agent.Stopped("canceled"))
        with self.assertRaises(agent.Stopped) as caught:
            self.slot().take(waits)
        self.assertEqual((caught.exception.args, waits.call_count), (("canceled",), 1))


class Registering(FolderCase):
    def test_an_attempt_that_ends_meanwhile_is_held_all_the_same(self) -> None:
        """It leaves the runs for the spool: looking at the spool first would miss it."""
        options = agent.Options(
            "127.0.0.1:9",
            True,
            10,
            30,
            1,
            self.folder,
            self.folder,
            str(self.folder),
            "worker-01",
            (),
        )
        node = agent.Agent(options, hwdetect.Hardware(), hwdetect.Host(str(self.folder)),
                           logging.getLogger("ffdist.agent"))
        attempt = agent.Attempt(agent.Job("job-1", 3, None, None), node._place)
        node._running[attempt.key] = attempt
        spool = node._link.state.spool
        entries, sent = spool.entries, []

        def ends_after_the_look() -> list[tuple[Path, agent.Json]]:
            found = entries()
            if node._running.pop(attempt.key, None):
                spool.put({"job_id": "job-1", "attempt": 3, "status": "completed"})
            return found

        def register(body: agent.Json) -> agent.Registered:
            sent.append(body)
            return agent.Registered(None)
        with mock.patch.object(spool, "entries", ends_after_the_look), \
                mock.patch.object(node._client, "register", register):
            node._session.step(0.0)
        self.assertEqual(sent[0]["holding"], [{"job_id": "job-1", "attempt": 3}])


class StandInMaster:
    """What a Client would be, with answers of the test's own; an ApiError among them is raised."""

    url = "http://stand-in"

    def __init__(self) -> None:
        self.answers: dict[str, list[object]] = {}
        self.calls: list[tuple[str, agent.Json]] = []
        self.hook: Callable[[], object] = lambda: None

    def _answer(self, name: str, body: agent.Json, otherwise: object) -> Any:
        self.calls.append((name, body))
        self.hook()
        waiting = self.answers.get(name) or [otherwise]
        answer = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        if isinstance(answer, ApiError):
            raise answer
        return answer

    def register(self, body: agent.Json) -> agent.Registered:
        return self._answer("register", body, agent.Registered("node-1", 1, 90.0))

    def heartbeat(
        self, node_id: str, body: agent.Json, wait_s: float | None = None
    ) -> agent.Answer:
        return self._answer("heartbeat", body, agent.Answer())

    def claim(self, query: agent.Json, wait_s: float | None = None) -> agent.Answer:
        return self._answer("claim", query, agent.Answer())

    def progress(self, job_id: str, body: agent.Json) -> agent.Answer:
        return self._answer("progress", {**body, "job_id": job_id}, agent.Answer())

    def report(self, result: agent.Json) -> None:
        self._answer("report", result, None)

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def close(self) -> None:
        pass


class TalkCase(FolderCase):
    """A node that talks with a stand-in master: no threads, no processes, a clock of the test."""

    def setUp(self) -> None:
        super().setUp()
        self.master = StandInMaster()
        patches = (mock.patch("agent.Client", lambda url: self.master),
                   mock.patch("agent.random.uniform", lambda low, high: high),
                   mock.patch("agent.hwdetect.Meter", mock.MagicMock()))
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)
        options = agent.Options("", True, 10, 30, 2, self.folder, self.folder, str(self.folder),
                                "worker-01", ())
        log = logging.getLogger("ffdist.agent.test")
        log.addHandler(logging.NullHandler())
        log.propagate = False
        self.node = agent.Agent(options, hwdetect.Hardware(), hwdetect.Host(str(self.folder)), log)
        self.now = 1000.0
        self.link = self.node._link
        self.link.clock = lambda: self.now
        self.session, self.reporter = self.node._session, self.node._reporter
        self.meter = self.node._place.meter
        self.session._idle = self.meter.idle

    def steps(self, part: agent.Session | agent.Reporter, count: int) -> list[float]:
        """Step so often; return how long each wants to rest."""
        return [part.step(self.now).seconds for _ in range(count)]

    def running(self, job_id: str = "job-1", number: int = 1) -> agent.Attempt:
        attempt = agent.Attempt(agent.Job(job_id, number, None, None), self.node._place)
        self.node._running[attempt.key] = attempt
        return attempt

    def word_of(self, attempt: agent.Attempt) -> str | None:
        return attempt._runner.stop_word


class Sessions(TalkCase):
    """Registration, claims and heartbeats."""

    def test_tries_of_an_absent_master_come_less_and_less_often(self) -> None:
        away = ApiError(0, "no answer")
        self.master.answers = {"register": [away]}
        self.assertEqual(self.steps(self.session, 8), [0.5, 1, 2, 4, 8, 15, 15, 15])
        self.master.answers = {"claim": [away]}
        self.assertEqual(
            self.steps(self.session, 3), [0, 15, 15], "a registration alone is no recovery"
        )
        self.master.answers = {}
        self.steps(self.session, 1)
        self.master.answers = {"claim": [away]}
        self.assertEqual(self.steps(self.session, 3), [0.5, 1, 2], "an answer begins anew")

    def test_a_master_with_little_patience_is_tried_more_often(self) -> None:
        self.master.answers = {
            "register": [agent.Registered("node-1", 1, 9.0)],
            "claim": [ApiError(503, "")],
        }
        self.assertEqual(self.steps(self.session, 6), [0, 0.5, 1, 2, 3, 3])

    def test_an_attempt_that_the_master_does_not_confirm_by_its_number_is_stopped(self) -> None:
        first, second, other = (
            self.running("job-1", 1),
            self.running("job-2", 2),
            self.running("job-3", 1),
        )
        holding = frozenset({("job-1", 2), ("job-2", 2)})
        self.master.answers = {"register": [agent.Registered("node-1", 1, 90.0, holding)]}
        self.steps(self.session, 1)
        self.assertEqual([self.word_of(attempt) for attempt in (first, second, other)],
                         ["lost", None, "lost"])
        self.assertEqual(self.master.calls[0][1]["holding"], [
            {"job_id": "job-1", "attempt": 1}, {"job_id": "job-2", "attempt": 2},
            {"job_id": "job-3", "attempt": 1}])

    def test_a_master_that_forgot_the_node_hears_of_it_at_once_and_then_seldom(self) -> None:
        self.steps(self.session, 2)
        self.master.answers = {"claim": [ApiError(404, "unknown node")]}
        self.assertEqual(self.steps(self.session, 1), [0])
        self.master.answers = {"register": [ApiError(404, "no such path")]}
        self.assertEqual(self.steps(self.session, 2), [15, 15])
        self.assertEqual(
            self.master.names(), ["register", "claim", "claim", "register", "register"]
        )

    def test_another_start_of_this_node_ends_this_one(self) -> None:
        refusal = ApiError(409, "another start", "session")
        self.steps(self.session, 1)
        self.master.answers = {"claim": [refusal], "register": [refusal]}
        self.assertEqual(
            self.steps(self.session, 1), [0.5], "it may only have forgotten the session"
        )
        with self.assertRaises(agent.Superseded):
            self.session.step(self.now)

    def test_a_claim_keeps_its_word_until_an_answer_used_it_up(self) -> None:
        away = ApiError(0, "no answer")
        self.master.answers = {
            "claim": [away, agent.Answer(), agent.Answer(claim=True), agent.Answer()]
        }
        self.steps(self.session, 5)
        words = [body["claim"] for name, body in self.master.calls if name == "claim"]
        self.assertEqual(len(words), 4)
        self.assertEqual(len(set(words[:3])), 1)
        self.assertNotEqual(words[2], words[3])

    def test_a_master_that_says_it_parks_and_does_not_is_asked_once_a_second(self) -> None:
        self.assertEqual(self.steps(self.session, 9), [0] * 6 + [1] * 3)

        def parks() -> None:
            self.now += 20
        self.master.hook = parks
        self.assertEqual(self.steps(self.session, 2), [0, 0])

    def test_a_full_node_parks_in_its_heartbeat(self) -> None:
        self.running("job-1"), self.running("job-2")
        holding = frozenset({("job-1", 1), ("job-2", 1)})
        self.master.answers = {"register": [agent.Registered("node-1", 1, 90.0, holding)],
                               "heartbeat": [ApiError(0, "no answer")]}
        full: list[bool] = []
        self.master.hook = lambda: full.append(self.link.full)
        self.steps(self.session, 2)
        self.assertEqual(self.master.names(), ["register", "heartbeat"])
        self.assertEqual([*full, self.link.full], [False, True, False])
        self.assertFalse(self.master.calls[1][1]["leaving"])

    def test_the_wait_of_a_parked_request_has_jitter(self) -> None:
        bounds: list[tuple[float, float]] = []

        def uniform(low: float, high: float) -> float:
            bounds.append((low, high))
            return low
        waits: list[float | None] = []
        with mock.patch("agent.random.uniform", uniform), mock.patch.object(
                self.master, "claim", lambda query, wait_s: waits.append(wait_s) or agent.Answer()):
            self.steps(self.session, 2)
        self.assertEqual((bounds, waits), ([(22.5, 30.0)], [22.5]))

    def test_an_attempt_that_only_finishes_leaves_room_for_one(self) -> None:
        attempts = [self.running(f"job-{number}") for number in range(2)]
        rooms = [self.node.has_room()]
        for attempt in attempts:
            attempt.slot.give()
            rooms.append(self.node.has_room())
        self.assertEqual(rooms, [False, True, True])
        self.running("job-2")
        self.assertTrue(self.node.has_room())
        self.running("job-3")
        self.assertFalse(self.node.has_room())
        for attempt in self.node.attempts():
            attempt.slot.give()
        self.assertFalse(self.node.has_room(), "four finish on two slots: the master is away, say")

    def test_a_job_is_claimed_ahead_once_for_each_encode_that_ends_soon(self) -> None:
        first, _ = self.running("job-1"), self.running("job-2")
        holding = frozenset({("job-1", 1), ("job-2", 1)})
        waits: list[tuple[str, float | None]] = []

        def ask(name: str) -> Callable[[object, Any, float | None], agent.Answer]:
            def answer(*args: Any) -> agent.Answer:
                waits.append((name, args[-1]))
                return agent.Answer()
            return answer
        self.master.answers = {"register": [agent.Registered("node-1", 1, 90.0, holding)]}
        with mock.patch.object(self.master, "claim", ask("claim")), \
                mock.patch.object(self.master, "heartbeat", ask("heartbeat")):
            self.steps(self.session, 2)
            first.slot.foresee_end()
            self.steps(self.session, 2)
            self.assertEqual(waits, [("heartbeat", 30), ("claim", 0), ("heartbeat", 30)],
                             "it takes what nobody has taken, and waits for nothing")
            first.slot.foresee_end()
            self.running("job-3")
            self.steps(self.session, 1)
            self.assertEqual(waits[3:], [("heartbeat", 30)], "one waits for the slot already")

    def test_nothing_is_claimed_ahead_by_a_node_that_leaves_or_for_a_paused_job(self) -> None:
        attempts = [self.running("job-1"), self.running("job-2")]
        holding = frozenset(attempt.key for attempt in attempts)
        self.master.answers = {"register": [agent.Registered("node-1", 1, 90.0, holding)]}
        self.steps(self.session, 1)
        for attempt in attempts:
            attempt.slot.foresee_end()
        attempts[0].pause()
        attempts[1].pause()
        self.steps(self.session, 1)
        attempts[0].resume()
        self.link.events.leaving.set()
        self.steps(self.session, 1)
        self.assertEqual(self.master.names()[1:], ["heartbeat", "heartbeat"])

    def test_an_agent_that_stops_gives_back_what_waits_for_a_slot(self) -> None:
        encodes, waits = self.running("job-1"), self.running("job-2")
        waits.slot.in_line = True
        self.node.stop()
        self.node.stop()
        self.node._drain()
        self.assertEqual([self.word_of(encodes), self.word_of(waits)], [None, "returned"])

    def test_a_pause_that_the_master_asks_for_is_kept_up_to_a_third_of_the_nodes_time(self) -> None:
        self.master.answers = {
            "register": [ApiError(503, "too many connections", retry_after_s=7.0)],
        }
        self.assertEqual(self.steps(self.session, 2), [7 + 7, 7 + 7], "and as long again to spread")
        self.master.answers = {"register": [ApiError(503, "busy", retry_after_s=1e6)]}
        self.assertEqual(self.steps(self.session, 1), [30 + 30])

    def test_a_seeds_master_gets_heartbeats_and_polls_by_the_clock(self) -> None:
        self.master.answers = {"register": [agent.Registered("node-1")]}
        self.session._beat_at = self.now
        self.steps(self.session, 1)
        for passed, names in ((1, ["claim"]), (30, ["heartbeat", "claim"]), (1, ["claim"])):
            self.now += passed
            del self.master.calls[:]
            self.assertEqual(self.session.step(self.now), agent.Rest(10, wakeable=True))
            self.assertEqual(self.master.names(), names)

    def test_the_secret_goes_only_to_a_master_that_asks_for_it(self) -> None:
        self.master.answers = {"register": [ApiError(403, "prove it", "secret"),
                                            agent.Registered("node-1", 1, 90.0)]}
        self.steps(self.session, 1)
        bodies = [body for _, body in self.master.calls]
        self.assertEqual(["secret" in body for body in bodies], [False, True])

    def test_the_reporter_begins_when_the_registration_is_complete(self) -> None:
        seen: list[object] = []
        with mock.patch.object(self.link, "note_answer", lambda: seen.append(
                (self.link.protocol, self.link.node_id, self.link.node_timeout_s))):
            self.steps(self.session, 1)
        self.assertEqual(seen, [(1, "node-1", 90.0)])

    def test_a_new_idle_baseline_is_sent_until_the_master_has_it(self) -> None:
        self.steps(self.session, 2)
        self.meter.idle = mock.sentinel.newer
        self.master.answers = {
            "register": [ApiError(0, "no answer"), agent.Registered("node-1", 1, 90.0)]
        }
        self.steps(self.session, 3)
        self.assertEqual(
            self.master.names(), ["register", "claim", "register", "register", "claim"]
        )


class Reports(TalkCase):
    """Progress and results."""

    def setUp(self) -> None:
        super().setUp()
        self.steps(self.session, 1)
        del self.master.calls[:]

    def kept(self) -> list[str]:
        return [job_id for job_id, _ in self.link.state.spool.waiting()]

    def keep(self, *names: str) -> None:
        for name in names:
            self.reporter.keep({"job_id": name, "attempt": 1, "status": "completed"})

    def test_a_silent_master_is_tried_less_and_less_often(self) -> None:
        self.keep("a")
        self.master.answers = {"report": [ApiError(0, "no answer")]}
        self.assertEqual(self.steps(self.reporter, 7), [0.5, 1, 2, 4, 8, 15, 15])
        self.master.answers = {}
        self.assertEqual(self.steps(self.reporter, 1), [agent.IDLE_PROGRESS_S])
        self.assertEqual(self.kept(), [])

    def test_a_pause_that_the_master_asks_for_is_kept(self) -> None:
        self.keep("a")
        self.master.answers = {"report": [ApiError(503, "busy", retry_after_s=20.0)]}
        self.assertEqual(self.steps(self.reporter, 1), [20 + 20])

    def test_the_poller_of_a_full_node_hears_at_once_of_a_slot(self) -> None:
        """Its heartbeat is parked: another one answers it, and brings the orders that there are."""
        attempt, second = self.running("job-1"), self.running("job-2")
        self.link.full = True
        self.steps(self.reporter, 1)
        self.assertNotIn("heartbeat", self.master.names())
        order = agent.Order("cancel", "job-2", 1)
        self.master.answers = {"heartbeat": [agent.Answer(orders=(order,))]}
        attempt._runner.slot._held = True
        with mock.patch.object(attempt._runner.slot, "_changed", self.node._slot_changed):
            attempt.slot.give()
        self.assertTrue(self.link.events.news.is_set() and self.link.events.freed.is_set())
        self.steps(self.reporter, 2)
        self.assertEqual(self.master.names().count("heartbeat"), 1)
        self.assertEqual(self.word_of(second), "canceled")

    def test_the_poller_is_left_alone_where_it_waits_for_work_or_has_no_room(self) -> None:
        self.node._slot_changed()
        self.steps(self.reporter, 1)
        self.link.full = True
        self.running("job-1"), self.running("job-2")
        self.node._slot_changed()
        self.steps(self.reporter, 1)
        self.assertNotIn("heartbeat", self.master.names())

    def test_what_the_master_has_judged_leaves_the_spool_and_nothing_else(self) -> None:
        for error, left in (
            (None, []),
            (ApiError(404, "unknown job"), []),
            (ApiError(409, "lost"), []),
            (ApiError(400, "bad"), ["a", "b"]),
            (ApiError(503, "busy"), ["a", "b"]),
            (ApiError(409, "who?", "session"), ["a", "b"]),
            (ApiError(404, "who?", "node_id"), ["a", "b"]),
        ):
            with self.subTest(error=str(error)):
                for path, _ in self.link.state.spool.entries():
                    path.unlink()
                self.keep("a", "b")
                self.master.answers = {"report": [error]}
                self.steps(self.reporter, 1)
                self.assertEqual(self.kept(), left)

    def test_a_report_that_is_refused_does_not_hold_up_the_others(self) -> None:
        self.keep("a", "b")
        self.master.answers = {"report": [ApiError(413, "too long"), None]}
        self.steps(self.reporter, 1)
        self.assertEqual(self.kept(), ["a"])

    def test_a_lost_lease_stops_the_attempt(self) -> None:
        attempt = self.running()
        self.master.answers = {"progress": [ApiError(409, "another attempt")]}
        self.steps(self.reporter, 1)
        self.assertEqual(self.word_of(attempt), "lost")

    def test_readings_that_could_not_be_sent_go_with_the_next_progress(self) -> None:
        attempt = self.running()
        attempt.samples.rows.extend({"number": number} for number in range(3))
        attempt.log.add("a line")
        self.master.answers = {"progress": [ApiError(0, "no answer"), agent.Answer()]}
        self.steps(self.reporter, 3)
        bodies = [body for _, body in self.master.calls]
        self.assertEqual([len(body["samples"]) for body in bodies], [3, 3, 0])
        self.assertEqual([body["lines"] for body in bodies], [["a line"], ["a line"], []])
        self.assertEqual(attempt.leased_at, self.now)

    def test_the_master_says_when_it_wants_the_next_within_limits(self) -> None:
        self.running()
        for next_s, rest_s in ((None, 2.0), (7.5, 7.5), (0.001, 0.2), (1e9, 60.0)):
            self.master.answers = {"progress": [agent.Answer(next_s=next_s)]}
            self.assertEqual(self.steps(self.reporter, 1), [rest_s])

    def test_more_lines_than_one_message_holds_go_at_once(self) -> None:
        attempt = self.running()
        for number in range(agent.LINES_A_REPORT + 1):
            attempt.log.add(str(number))
        self.assertEqual(self.steps(self.reporter, 2), [0, agent.PROGRESS_S])
        self.assertEqual(
            [body["lines_from"] for _, body in self.master.calls], [0, agent.LINES_A_REPORT]
        )

    def test_an_order_for_an_attempt_that_is_not_here_is_answered_once(self) -> None:
        running = self.running("job-1", 2)
        answer = agent.Answer(
            orders=(agent.Order("cancel", "job-1", 1), agent.Order("pause", "job-9", 1))
        )
        for _ in range(2):
            self.node.obey(answer)
        self.assertEqual(self.link.state.spool.waiting(), [("job-1", 1)])
        self.assertIsNone(self.word_of(running), "it is another attempt")
        self.node.obey(agent.Answer(orders=(agent.Order("return", "job-1", 2),)))
        self.assertEqual(self.word_of(running), "returned")

    def test_a_permission_counts_from_its_request(self) -> None:
        attempt = self.running()

        def slow() -> None:
            self.now += 4
        self.master.hook = slow
        until = self.reporter.permit(attempt, mock.Mock(marked=False), {"bytes": 1})
        self.assertEqual(until, 1000.0 + agent.PUBLISH_S)
        self.assertEqual(self.master.calls[-1][1]["published"], {"bytes": 1})

    def test_while_the_master_is_away_only_a_marked_film_gets_its_name_while_the_lease_lasts(
        self,
    ) -> None:
        attempt = self.running()
        attempt.leased_at = self.now - 20
        self.master.answers = {"progress": [ApiError(0, "no answer")]}
        self.assertEqual(self.reporter.permit(attempt, mock.Mock(marked=True), {}), 1070.0)
        self.link.events.stopping.set()  # else it waits
        self.assertIsNone(self.reporter.permit(attempt, mock.Mock(marked=False), {}))
        self.now += 71
        self.assertIsNone(self.reporter.permit(attempt, mock.Mock(marked=True), {}))
        self.now -= 71
        self.master.answers = {"progress": [ApiError(409, "who?", "session")]}
        self.assertIsNone(self.reporter.permit(attempt, mock.Mock(marked=True), {}))


    def test_a_film_that_waits_for_its_name_asks_less_and_less_often(self) -> None:
        attempt, rests = self.running(), list[float]()

        def rest(attempt: agent.Attempt, seconds: float) -> bool:
            rests.append(round(seconds, 3))
            return len(rests) < 6
        self.master.answers = {"progress": [ApiError(503, "busy", retry_after_s=0.1)]}
        with mock.patch.object(self.reporter, "_rest", rest):
            self.assertIsNone(self.reporter.permit(attempt, mock.Mock(marked=False), {}))
        self.assertEqual(rests, [0.6, 1.1, 2.1, 4.1, 5.1, 5.1])

    def test_a_film_that_waits_for_its_name_hears_of_the_end(self) -> None:
        attempt = self.running()
        self.assertTrue(self.reporter._rest(attempt, 0.01))
        attempt.stop("canceled")
        self.assertFalse(self.reporter._rest(attempt, 3600))
        self.link.events.stopping.set()
        self.assertFalse(self.reporter._rest(self.running("job-2"), 3600))


class ClearingUp(FolderCase):
    """What a killed agent left in its work folder."""

    def left_behind(self, pid: int, started: object, name: str = "job-1") -> Path:
        folder = self.folder / "work" / name
        folder.mkdir(parents=True)
        (folder / "process").write_text(f"{pid} {started}")
        return folder

    def sleeper(self) -> subprocess.Popen[bytes]:
        need("ffmpeg")
        argv = ["ffmpeg", "-v", "quiet", "-re", "-f", "lavfi", "-i", "testsrc2", "-f", "null", "-"]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def test_an_orphan_ffmpeg_is_found_by_its_pid_and_start_and_ended(self) -> None:
        orphan = self.sleeper()
        folder = self.left_behind(orphan.pid, hwdetect.process_started(hwdetect.Host(), orphan.pid))
        name = f".ffdist-{'0' * 32}.part"
        partial = self.folder / "films" / name
        partial.parent.mkdir()
        partial.write_bytes(b"half a film")
        note = {"root": str(self.folder), "parts": ["films"], "hidden": name}
        (folder / agent.HIDDEN_NOTE).write_text(json.dumps(note))
        self.assertEqual(agent.clear_work(self.folder / "work", hwdetect.Host()), 1)
        self.assertEqual(orphan.wait(10), -signal.SIGKILL)
        self.assertFalse(partial.exists())
        self.assertEqual(list((self.folder / "work").iterdir()), [])

    def test_a_name_that_was_taken_where_there_are_no_links_is_free_again(self) -> None:
        films = self.folder / "films"
        films.mkdir()
        for name, content in (("mine.mp4", b""), ("theirs.mp4", b"")):
            (films / name).write_bytes(content)
            found = (films / "mine.mp4").stat()
            note = {
                "root": str(self.folder),
                "parts": ["films"],
                "hidden": f".ffdist-{'0' * 32}.part",
                "taken": name,
                "identity": [found.st_dev, found.st_ino, found.st_mtime_ns],
            }
            folder = self.left_behind(1, 1, f"job-{name[:4]}")
            (folder / agent.HIDDEN_NOTE).write_text(json.dumps(note))
        agent.clear_work(self.folder / "work", hwdetect.Host())
        self.assertEqual([path.name for path in films.iterdir()], ["theirs.mp4"])

    def test_a_stranger_with_the_same_pid_lives_on(self) -> None:
        stranger = self.sleeper()
        self.left_behind(stranger.pid, "12345")
        agent.clear_work(self.folder / "work", hwdetect.Host())
        with self.assertRaises(subprocess.TimeoutExpired, msg="the stranger was ended"):
            stranger.wait(0.5)
        self.assertEqual(list((self.folder / "work").iterdir()), [])

    def test_torn_notes_harm_nobody(self) -> None:
        precious = self.folder / "precious.mp4"
        precious.write_bytes(b"film")
        for number, text in enumerate(
            ("", "1 0", "0 0", "-1 5", "x y", "99999999 1", "\x00\x01", "1 2 3")
        ):
            folder = self.left_behind(1, 1, f"job-{number}")
            (folder / "process").write_text(text)
            note = {"root": str(self.folder), "parts": [[], ["none"], 5][number % 3],
                    "hidden": precious.name, "taken": [precious.name, 5, ".."][number % 3]}
            (folder / agent.HIDDEN_NOTE).write_text(json.dumps(note) if number else "torn")
        agent.clear_work(self.folder / "work", hwdetect.Host())
        self.assertTrue(precious.exists(), "only our own hidden names are removed")
        self.assertEqual(list((self.folder / "work").iterdir()), [])

    def test_the_cache_stays(self) -> None:
        (self.folder / "work" / "cache").mkdir(parents=True)
        (self.folder / "work" / "cache" / "clip.mov").write_bytes(b"x")
        self.assertEqual(agent.clear_work(self.folder / "work", hwdetect.Host()), 0)
        self.assertTrue((self.folder / "work" / "cache" / "clip.mov").exists())

    def test_the_cache_is_bounded_and_keeps_what_was_used_last(self) -> None:
        for age, name in enumerate(("newest", "middle", "oldest")):
            path = self.folder / f"{name}.mov"
            path.write_bytes(b"x" * 1000)
            os.utime(path, (1e9 - age, 1e9 - age))
        agent.bound_cache(self.folder, 2500)
        self.assertEqual({path.stem for path in self.folder.iterdir()}, {"newest", "middle"})
        agent.bound_cache(self.folder, 10)
        self.assertEqual(
            {path.stem for path in self.folder.iterdir()}, {"newest"}, "the one in use stays"
        )

    def test_a_run_by_hand_leaves_the_folder_that_it_was_given(self) -> None:
        mine = self.folder / "mine"
        mine.mkdir()
        (mine / "precious.mp4").write_bytes(b"film")
        done = run(
            agent.__file__,
            "run",
            "64p25-h264",
            "--no-probe",
            "--work-dir",
            str(mine),
            "--state-dir",
            str(self.folder / "state"),
            "--input",
            "nowhere.mp4",
            folder=self.folder,
        )
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertTrue((mine / "precious.mp4").exists())


class Metering(FolderCase):
    """Energy and CPU of attempts, from a fed tree of /proc and /sys: a machine with RAPL."""

    RANGE_UJ = 10_000_000_000

    def setUp(self) -> None:
        super().setUp()
        zone = "sys/class/powercap/intel-rapl:0"
        self.put(f"{zone}/name", "package-0")
        self.put(f"{zone}/max_energy_range_uj", self.RANGE_UJ)
        self.put("proc/meminfo", "MemTotal: 1000 kB\nMemFree: 500 kB\nMemAvailable: 600 kB")
        self.used_uj, self.busy, self.free, self.load, self.now = 5_000_000, 0, 0, 50, 1000.0
        self.energy(0)
        self.host = hwdetect.Host(str(self.folder))
        patch = mock.patch("hwdetect.SAMPLE_S", 3600)
        patch.start()
        self.addCleanup(patch.stop)
        self.hardware = hwdetect.Hardware(rapl=hwdetect.rapl_zones(self.host))
        self.meter = hwdetect.Meter(self.host, self.hardware, clock=lambda: self.now)

    def put(self, path: str, text: object) -> None:
        place = self.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{text}\n")

    def energy(self, joules: float, seconds: float = 1.0) -> None:
        """Let the machine have used so much more in so long."""
        self.now += seconds
        self.used_uj = (self.used_uj + int(joules * 1e6)) % self.RANGE_UJ
        self.busy, self.free = self.busy + self.load, self.free + 100 - self.load
        self.put("sys/class/powercap/intel-rapl:0/energy_uj", self.used_uj)
        self.put("proc/stat", f"cpu  {self.busy} 0 0 {self.free} 0 0 0 0 0 0")

    def process(self, pid: int, cpu_s: float) -> None:
        ticks = int(cpu_s * os.sysconf("SC_CLK_TCK"))
        self.put(f"proc/{pid}/stat",
                 f"{pid} (ffmpeg) R 1 {pid} {pid} 0 -1 0 0 0 0 0 {ticks} 0 0 0 20 0 1 0 77 0 0")
        self.put(f"proc/{pid}/status", "Name: ffmpeg\nVmRSS:     2048 kB")

    def ledger(self, pid: int) -> hwdetect.Ledger:
        ledger = hwdetect.Ledger()
        self.process(pid, 0)
        ledger.pgid = pid
        self.meter.join(ledger)
        return ledger

    def test_one_attempt_is_booked_what_the_machine_used(self) -> None:
        ledger = self.ledger(10)
        self.energy(30)
        self.meter.leave(ledger)
        self.assertAlmostEqual(ledger.energy_joules or 0, 30)
        self.assertEqual((ledger.power_source, ledger.beside), ("rapl", 0))
        self.assertEqual(ledger.peak_rss_bytes, 2 << 20)

    def test_energy_before_and_after_is_nobodys(self) -> None:
        self.energy(500)
        ledger = self.ledger(10)
        self.energy(7)
        self.meter.leave(ledger)
        self.energy(500)
        again = self.ledger(11)
        self.energy(3)
        self.meter.leave(again)
        self.assertAlmostEqual(ledger.energy_joules or 0, 7)
        self.assertAlmostEqual(again.energy_joules or 0, 3)

    def test_side_by_side_shares_follow_cpu_time_and_sum_to_the_machines(self) -> None:
        first = self.ledger(10)
        self.energy(10)
        second = self.ledger(20)
        self.process(10, 3.0)
        self.process(20, 1.0)
        self.energy(40)
        self.meter.leave(second)
        self.process(10, 4.0)
        self.energy(5)
        self.meter.leave(first)
        self.assertAlmostEqual(second.energy_joules or 0, 10, places=3)
        self.assertAlmostEqual(first.energy_joules or 0, 10 + 30 + 5, places=3)
        self.assertEqual((first.beside, second.beside), (1, 1))

    def test_a_program_that_is_no_run_takes_its_share_and_no_run_is_booked_it(self) -> None:
        """A probe of the next film beside an encode: a quarter of the CPU time, then a half."""
        ledger, probe = self.ledger(10), hwdetect.Ledger(pgid=20)
        self.process(20, 0)
        self.meter.aside(probe)
        self.process(10, 3.0)
        self.process(20, 1.0)
        self.energy(40)
        self.meter.join(ledger)  # a reading
        self.assertAlmostEqual(ledger.energy_joules or 0, 30)
        self.process(10, 4.0)
        shutil.rmtree(self.folder / "proc" / "20")
        probe.ended(2.0, 1 << 20)
        self.energy(40)
        self.meter.join(ledger)
        self.assertAlmostEqual(ledger.energy_joules or 0, 30 + 20)
        self.process(10, 5.0)
        self.energy(40)
        self.meter.leave(ledger)
        self.assertAlmostEqual(ledger.energy_joules or 0, 30 + 20 + 40, msg="it has ended")
        self.assertEqual((ledger.beside, probe.energy_joules), (0, None), "it is no job")

    def test_shares_without_any_cpu_time_are_even_and_still_sum(self) -> None:
        first, second, third = self.ledger(10), self.ledger(20), self.ledger(30)
        self.energy(30)
        for ledger in (first, second, third):
            self.meter.leave(ledger)
        total = sum(ledger.energy_joules or 0 for ledger in (first, second, third))
        self.assertAlmostEqual(total, 30, places=3)

    def test_idle_power_is_shared_like_the_gross_and_the_net_sums_too(self) -> None:
        self.meter._baseline.idle = hwdetect.Idle(10.0, 0.5, 0.0, "rapl")
        first, second = self.ledger(10), self.ledger(20)
        self.process(10, 3.0)
        self.process(20, 1.0)
        self.energy(500, 20)
        self.meter.leave(second)
        self.meter.leave(first)
        rows = [agent.metrics_of(agent.Outcome("completed", ledger=ledger, wall_s=20.0))
                for ledger in (first, second)]
        self.assertEqual([row["idle_joules"] for row in rows], [150.0, 50.0])
        self.assertEqual([row["net_energy_joules"] for row in rows], [225.0, 75.0])
        self.assertEqual([row["idle_watts"] for row in rows], [10.0, 10.0])
        self.assertEqual(
            (rows[0]["power_watts"], rows[0]["power_source"], rows[0]["energy_estimated"]),
            (18.75, "rapl", False),
        )
        self.assertTrue(rows[0]["power_resolution"])

    def test_without_a_baseline_net_is_unknown_and_gross_is_not(self) -> None:
        ledger = self.ledger(10)
        self.energy(500, 20)
        self.meter.leave(ledger)
        metrics = agent.metrics_of(agent.Outcome("completed", ledger=ledger, wall_s=20.0))
        self.assertEqual((metrics["energy_joules"], metrics["net_energy_joules"]), (500.0, None))
        self.assertIn("never idle", metrics["unknown"]["idle_watts"])

    def test_an_idle_baseline_of_something_else_is_none_of_this_run(self) -> None:
        gpu = hwdetect.GpuReading("T4", 0, 30.0, 5.0, source="nvidia-smi", covered_s=1.0)
        rows = [
            hwdetect.Reading(
                float(at), 5.0, None, 9.0, 9.0 * at, float(at), power_source="rapl", gpus=(gpu,)
            )
            for at in (0, 1)
        ]
        for idle, words in (
            (hwdetect.Idle(10.0, 0.5, 0.0, "model", 1), "of model, this run of rapl"),
            (hwdetect.Idle(10.0, 0.5, 0.0, "rapl"), "lacks a GPU"),
            (hwdetect.Idle(10.0, 0.5, 0.0, "rapl", 1), ""),
        ):
            baseline, ledger = hwdetect.Baseline(0.0), hwdetect.Ledger()
            baseline.idle = idle
            ledger.book(hwdetect.Interval(*rows), 1.0, baseline)
            self.assertEqual(ledger.idle_s, 0.0 if words else 1.0)
            self.assertIn(words, ledger.unknown.get("idle_watts", ""))

    def test_no_idle_power_is_measured_while_an_attempt_works_unmeasured(self) -> None:
        """It fetches, makes a clip or compares: its ledger is not joined then."""
        with mock.patch.object(hwdetect.Baseline, "wait_s", return_value=3600):  # its thread sleeps
            meter = hwdetect.Meter(self.host, self.hardware, clock=lambda: self.now)
        self.load, attempt, found = 1, mock.Mock(), []
        for works, rest_s in (
            (True, hwdetect.IDLE_REST_S),
            (False, 0.0),
            (None, hwdetect.IDLE_REST_S),
        ):
            if works is not None:
                meter.work(attempt, works)
            self.now += rest_s
            for _ in range(5):
                self.energy(10)
                meter._sample()
            found.append(meter.idle and meter.idle.watts)
        self.assertEqual(found, [None, None, 10.0])

    def test_sensors_stay_open_between_the_encodes_of_an_attempt_and_no_longer(self) -> None:
        attempt, found = mock.Mock(), []
        self.meter.work(attempt, True)
        for pid in (10, 11):
            self.meter.leave(self.ledger(pid))
            found.append(self.meter._sampler)
        self.assertIsNotNone(found[0])
        self.assertIs(found[0], found[1])
        self.meter.work(attempt, False)
        self.assertIsNone(self.meter._sampler)

    def test_a_counter_that_stands_still_is_no_energy(self) -> None:
        ledger = self.ledger(10)
        self.energy(0, 20)
        self.meter.leave(ledger)
        metrics = agent.metrics_of(agent.Outcome("completed", ledger=ledger, wall_s=20.0))
        self.assertEqual((metrics["energy_joules"], metrics["power_watts"]), (None, None))
        self.assertIn("stand still", metrics["unknown"]["energy_joules"])
        short = self.ledger(11)
        self.energy(0)
        self.meter.leave(short)
        self.assertIn("rapl counted nothing", hwdetect.energy_of(short).why)

    def test_each_gpu_s_energy_is_of_the_time_that_it_told(self) -> None:
        def reading(at: float, *told: tuple[float, float]) -> hwdetect.Reading:
            return hwdetect.Reading(
                at,
                50.0,
                None,
                9.0,
                9.0 * at,
                at,
                power_source="rapl",
                gpus=tuple(
                    hwdetect.GpuReading(
                        "L4", number, 30.0, joules, source="nvidia-smi", covered_s=covered_s
                    )
                    for number, (joules, covered_s) in enumerate(told)
                ),
            )
        for second, joules in (((200.0, 5.0), 90.0 + 300 + 400), ((80.0, 2.0), None)):
            ledger = hwdetect.Ledger(power_source="rapl")
            rows = reading(0.0, (0.0, 0.0), (0.0, 0.0)), reading(10.0, (300.0, 10.0), second)
            ledger.book(hwdetect.Interval(*rows), 1.0, hwdetect.Baseline(0.0))
            ledger.book_gpus(hwdetect.Interval(*rows), 1.0)
            self.assertEqual(hwdetect.energy_of(ledger).joules, joules)

    def test_a_paused_run_is_booked_nothing(self) -> None:
        first, second = self.ledger(10), self.ledger(20)
        self.energy(10)
        self.meter.pause(first, True)
        self.energy(40)
        self.meter.pause(first, False)
        self.energy(20)
        self.meter.leave(second)
        self.energy(7)
        self.meter.leave(first)
        self.assertEqual(
            (first.energy_joules, second.energy_joules), (5.0 + 10.0 + 7.0, 5.0 + 40.0 + 10.0)
        )
        self.assertEqual((first.measured_s, second.measured_s), (3.0, 3.0))

    def test_the_meter_measures_a_resting_machine_by_itself(self) -> None:
        """A clock that goes on by half a second at each look, and a machine that draws 10 W."""
        def clock() -> float:
            self.energy(5, 0.5)
            return self.now
        with mock.patch("hwdetect.SAMPLE_S", 0.001):
            busy = hwdetect.Meter(self.host, self.hardware, clock=clock)
            self.assertTrue(busy.rested.wait(20))
            self.assertIn("50 % busy", busy._baseline.why)
            self.assertIsNone(busy.idle)
        with mock.patch("hwdetect.SAMPLE_S", 0.001):
            self.load = 1
            meter = hwdetect.Meter(self.host, self.hardware, clock=clock)
            self.assertTrue(meter.rested.wait(20))
        self.assertEqual(meter.idle and meter.idle[:2], (10.0, 0.0))
        self.assertEqual(meter.facts()["idle_watts"], 10.0)
        self.assertIn("50 % busy", busy.facts()["idle_unknown"])

    def test_a_gpu_s_joules_go_to_those_who_use_it(self) -> None:
        def reading(now: float, gpu_joules: float, covered_s: float) -> hwdetect.Reading:
            gpu = hwdetect.GpuReading(
                "T4", 0, 30.0, gpu_joules, source="nvidia-smi", covered_s=covered_s
            )
            return hwdetect.Reading(now, 50.0, None, 100.0, now * 100.0, now, power_source="rapl",
                                    gpus=(gpu,))

        coder, other, late = (
            hwdetect.Ledger(uses_gpu=True),
            hwdetect.Ledger(),
            hwdetect.Ledger(uses_gpu=True),
        )
        coder.power_source = other.power_source = "rapl"
        shares = [gpu for _, gpu in hwdetect.take_shares(self.host, [coder, other])]
        self.assertEqual(
            (shares, hwdetect.take_shares(self.host, [other])), ([1.0, 0.0], [(1.0, 1.0)])
        )
        last, now = reading(0.0, 0.0, 0.0), reading(10.0, 240.0, 8.0)
        for ledger, share in zip((coder, other), shares):
            ledger.book(hwdetect.Interval(last, now), 0.5, hwdetect.Baseline(0.0))
            ledger.book_gpus(hwdetect.Interval(last, now), share)
        found = [hwdetect.energy_of(ledger) for ledger in (coder, other)]
        self.assertEqual(
            [row.joules for row in found], [500 + 300, 500], "8 s of 10 s stand for all"
        )
        self.assertEqual(found[0].source, "rapl+nvidia-smi")
        late.book(hwdetect.Interval(last, reading(10.0, 240.0, 2.0)), 1.0, hwdetect.Baseline(0.0))
        late.book_gpus(hwdetect.Interval(last, reading(10.0, 240.0, 2.0)), 1.0)
        self.assertIsNone(hwdetect.energy_of(late).joules)
        metrics = agent.metrics_of(agent.Outcome("completed", ledger=late, wall_s=10.0))
        self.assertIn("2.0 s of 10.0 s", metrics["unknown"]["gpu_energy_joules"])
        self.assertIn("GPU", metrics["unknown"]["energy_joules"])

    def test_a_gpu_that_does_not_tell_says_why(self) -> None:
        told = hwdetect.GpuReading(
            "T4", 0, 30.0, 5.0, source="nvidia-smi", in_package=True, covered_s=1.0
        )
        none = hwdetect.GpuReading("T4")
        small = hwdetect.GpuReading("UHD", in_package=True)
        for gpu, why, reasons in (
            (told, {}, ["energy_joules includes it", "no GPU with readings"]),
            (none, {"gpus.0": "nvidia-smi is not installed"}, ["nvidia-smi is not installed"] * 2),
            (
                small,
                {"gpus.0.power_watts": "no power sensor"},
                ["no power sensor", "no GPU with readings"],
            ),
        ):
            ledger = hwdetect.Ledger()
            now = hwdetect.Reading(1.0, gpus=(gpu,), unknown=why)
            ledger.unknown.update(now.unknown)
            ledger.book_gpus(hwdetect.Interval(now, now), 1.0)
            unknown = agent.metrics_of(agent.Outcome("completed", ledger=ledger, wall_s=1.0))[
                "unknown"
            ]
            self.assertEqual(
                [unknown[name] for name in ("gpu_energy_joules", "gpu_usage")], reasons
            )

    def test_a_gpu_is_shared_by_the_time_that_its_driver_counts(self) -> None:
        for words in (
            "drm-engine-enc:\t{} ns\ndrm-engine-capacity-enc:\t2",
            "drm-cycles-vcs:\t{}\ndrm-total-cycles-vcs:\t9000000000",
        ):  # of amdgpu and i915, of xe
            for pid, busy in ((10, 3_000_000_000), (20, 1_000_000_000)):
                self.process(pid, 1.0)
                for descriptor in (4, 5):  # two descriptors of one client
                    self.put(
                        f"proc/{pid}/fdinfo/{descriptor}",
                        f"pos:\t0\ndrm-pdev:\t0000:03:00.0\n"
                        f"drm-client-id:\t{pid}\n{words.format(busy)}",
                    )
            ledgers = [hwdetect.Ledger(uses_gpu=True), hwdetect.Ledger(uses_gpu=True)]
            ledgers[0].pgid, ledgers[1].pgid = 10, 20
            self.assertEqual(hwdetect.take_shares(self.host, ledgers), [(0.5, 0.75), (0.5, 0.25)])
            self.assertEqual([ledger.gpu_s for ledger in ledgers], [3.0, 1.0])

    def test_a_source_that_changes_is_no_energy(self) -> None:
        ledger = hwdetect.Ledger()
        rows = [hwdetect.Reading(0.0, 5.0, None, 9.0, 900.0, power_source="battery"),
                hwdetect.Reading(5.0, 5.0, None, 9.0, 3.0, power_source="hwmon"),
                hwdetect.Reading(10.0, 5.0, None, 9.0, 48.0, 5.0, power_source="hwmon")]
        for last, now in zip(rows, rows[1:]):
            ledger.book(hwdetect.Interval(last, now), 1.0, hwdetect.Baseline(0.0))
        self.assertEqual((ledger.energy_joules, hwdetect.energy_of(ledger).joules), (45.0, None))
        self.assertIn("5.0 s of the 10.0 s run", hwdetect.energy_of(ledger).why)

    def test_a_counter_that_goes_away_or_is_reset_during_a_run_is_no_energy(self) -> None:
        zone = self.folder / "sys/class/powercap/intel-rapl:0/energy_uj"
        for what in ("away", "reset"):
            self.energy(0)
            ledger = self.ledger(10)
            for _ in range(3):
                self.energy(30)
                self.meter.join(ledger)  # a reading
            self.energy(30)
            if what == "away":
                zone.unlink()
            else:
                self.put(str(zone.relative_to(self.folder)), 0)
            self.meter.leave(ledger)
            metrics = agent.metrics_of(agent.Outcome("completed", ledger=ledger, wall_s=4.0))
            self.assertIsNone(metrics["energy_joules"], what)
            self.assertIn("only 3.0 s of the 4.0 s run", metrics["unknown"]["energy_joules"])

    def test_a_second_of_twenty_that_was_not_told_counts_like_the_rest(self) -> None:
        ledger = self.ledger(10)
        for at in range(20):
            self.energy(30)
            if at == 7:
                self.used_uj = 1_000_000
                self.energy(0, 0)
            self.meter.join(ledger)  # a reading
        self.meter.leave(ledger)
        self.assertEqual((ledger.energy_joules, ledger.energy_s), (570.0, 19.0))
        self.assertAlmostEqual(hwdetect.energy_of(ledger).joules or 0, 600.0)

    def test_an_estimate_is_marked_wherever_it_is_shown(self) -> None:
        shutil.rmtree(self.folder / "sys")
        meter = hwdetect.Meter(self.host, hwdetect.Hardware(), (20.0, 100.0), lambda: self.now)
        ledger = hwdetect.Ledger()
        meter.join(ledger)
        self.busy += 50
        self.put("proc/stat", f"cpu  {self.busy} 0 0 {self.free} 0 0 0 0 0 0")
        self.now += 10
        meter.leave(ledger)
        metrics = agent.metrics_of(agent.Outcome("completed", ledger=ledger, wall_s=10.0,
                                                 progress=agent.Progress(100, out_time_s=4.0)))
        self.assertEqual(
            (metrics["energy_joules"], metrics["power_source"], metrics["energy_estimated"]),
            (1000.0, "model", True),
        )
        shown = dict(agent.result_rows({"metrics": metrics}))["energy"]
        self.assertEqual({row["power_source"] for row in ledger.samples}, {"model"})
        self.assertEqual(
            agent._history(agent.Outcome("completed", ledger=ledger))["series"]["power_source"],
            "model",
        )
        meter._baseline.idle = hwdetect.Idle(20.0, 0.0, 0.0, "model")
        self.assertEqual(
            (meter.facts()["idle_source"], meter.facts()["idle_estimated"]), ("model", True)
        )
        self.assertIn("about 1000 J", shown)
        self.assertIn("estimated", shown)

    def test_throttling_by_heat_during_the_run_is_told(self) -> None:
        place = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
        for after, told in ((7, False), (9, True)):
            self.put(place, 7)
            ledger = self.ledger(10)
            self.put(place, after)
            self.energy(4)
            self.meter.leave(ledger)
            self.assertEqual(ledger.throttled, told)

    def test_load_of_others_is_what_the_job_did_not_use(self) -> None:
        ledger = self.ledger(10)
        self.process(10, 0.25 * 10 * (os.cpu_count() or 1))
        self.energy(40, 10)  # half of the machine busy
        self.meter.leave(ledger)
        metrics = agent.metrics_of(agent.Outcome("completed", ledger=ledger, wall_s=10.0))
        self.assertEqual((metrics["cpu_usage"], metrics["background_cpu_percent"]), (50.0, 25.0))

    def test_a_counter_that_wraps_is_not_lost(self) -> None:
        self.energy((self.RANGE_UJ - self.used_uj) / 1e6 - 2)
        ledger = self.ledger(10)
        self.energy(6)
        self.meter.leave(ledger)
        self.assertAlmostEqual(ledger.energy_joules or 0, 6)

    def test_a_machine_without_counters_says_why_and_never_zero(self) -> None:
        shutil.rmtree(self.folder / "sys")
        meter = hwdetect.Meter(self.host, hwdetect.Hardware())
        ledger = hwdetect.Ledger()
        meter.join(ledger)
        meter.leave(ledger)
        metrics = agent.metrics_of(agent.Outcome("completed", ledger=ledger, wall_s=1.0))
        for name in ("energy_joules", "power_watts", "joules_per_frame", "idle_watts"):
            self.assertIsNone(metrics[name])
            self.assertTrue(metrics["unknown"][name])

    def test_a_sampler_that_breaks_does_not_hold_up_the_encode(self) -> None:
        ledger = self.ledger(10)
        with mock.patch.object(
            hwdetect.Sampler, "sample", side_effect=RuntimeError("a stand-in's fault")
        ):
            self.meter.leave(ledger)
        second = self.ledger(20)
        self.energy(4)
        self.meter.leave(second)
        self.assertAlmostEqual(
            second.energy_joules or 0, 4, msg="an attempt that left is not booked again"
        )

    def test_metrics_are_json_with_a_reason_for_each_unknown(self) -> None:
        for outcome in (
            agent.Outcome("completed"),
            agent.Outcome("completed", wall_s=0.0, progress=agent.Progress(5, out_time_s=0.0)),
            agent.Outcome(
                "completed",
                wall_s=2.0,
                progress=agent.Progress(50, out_time_s=2.0),
                output_bytes=1000,
                output_s=2.0,
            ),
        ):
            metrics = agent.metrics_of(outcome)
            json.dumps(metrics, allow_nan=False)
            for name, value in metrics.items():
                if value is None:
                    self.assertTrue(
                        metrics["unknown"].get(name), f"{name} is unknown without a reason"
                    )
            self.assertFalse([name for name in metrics["unknown"] if metrics[name] is not None])
            for name in ("cpu_usage", "memory_usage", "duration"):
                self.assertIn(name, metrics)


    def test_metrics_are_those_of_the_table(self) -> None:
        made = agent.metrics_of(agent.Outcome("completed", progress=agent.Progress(5)))
        own = [name for name, row in agent.METRICS.items() if not row.by_master]
        self.assertEqual([*made], [*own, "unknown"])
        for name, why in made["unknown"].items():
            self.assertNotIn("{", why, name)

    def test_repeats_merge_as_the_table_says(self) -> None:
        for how, merged in (("mean", 3.0), ("most", 4), ("last", 2)):
            self.assertEqual(agent._merged([4, 2], how), merged)
        self.assertEqual(agent._merged([None, 2], "last"), 2)
        self.assertIsNone(agent._merged([None, 2], "mean"))
        self.assertLessEqual(
            {row.repeats for row in agent.METRICS.values()}, {"mean", "most", "last"}
        )


class Resting(unittest.TestCase):
    """When idle power is measured, from readings with times of their own."""

    def feed(
        self, baseline: hwdetect.Baseline, start: float, watts: list[float], busy: float = 1.0
    ) -> bool:
        done, joules = False, 0.0
        for at, drawn in enumerate([0.0, *watts]):
            joules += drawn
            reading = hwdetect.Reading(start + at, busy, None, drawn, joules, power_source="rapl")
            done = baseline.take(reading, 7.0)
        return done

    def test_the_first_is_short_and_at_once_and_later_ones_wait_for_rest(self) -> None:
        baseline = hwdetect.Baseline(100.0)
        self.assertEqual(baseline.wait_s(100.0), 0.0)
        self.assertTrue(self.feed(baseline, 100.0, [12.0, 15.0, 18.0]))
        self.assertEqual(baseline.idle, hwdetect.Idle(15.0, 3.0, 7.0, "rapl"))
        self.assertEqual(baseline.wait_s(103.0), hwdetect.IDLE_EVERY_S)
        baseline.disturb(690.0)
        self.assertEqual(baseline.wait_s(690.0), hwdetect.IDLE_REST_S)
        self.assertFalse(self.feed(baseline, 720.0, [1.0] * 3), "later ones take longer")
        baseline.disturb(724.0)
        self.assertEqual(
            baseline.wait_s(724.0), hwdetect.IDLE_REST_S, "what was taken in part is void"
        )
        self.assertTrue(self.feed(baseline, 760.0, [20.0] * 10))
        self.assertEqual(baseline.idle, hwdetect.Idle(20.0, 0.0, 7.0, "rapl"))

    def test_a_busy_machine_is_not_called_idle(self) -> None:
        baseline = hwdetect.Baseline(0.0)
        self.assertTrue(self.feed(baseline, 0.0, [90.0] * 3, busy=60.0))
        self.assertIsNone(baseline.idle)
        self.assertIn("60 % busy", baseline.why)
        self.assertEqual(baseline.wait_s(3.0), hwdetect.IDLE_RETRY_S)

    def test_what_works_on_the_gpu_or_cannot_be_seen_is_not_called_idle(self) -> None:
        for busy, usage, source, words in (
                (1.0, 60.0, "rapl", "L4 was 60 % busy"), (None, 0.0, "rapl", "is unknown"),
                (1.0, None, "battery", "changed meanwhile: battery, rapl"), (1.0, 3.0, "rapl", "")):
            baseline = hwdetect.Baseline(0.0)
            for at in range(4):
                gpu = hwdetect.GpuReading("L4", 0, 20.0, 0.0, usage)
                baseline.take(hwdetect.Reading(float(at), busy, None, 9.0, 9.0, gpus=(gpu,),
                                               power_source=source if at == 2 else "rapl"), 7.0)
            self.assertIn(words, baseline.why)
            self.assertEqual(
                baseline.idle, None if words else hwdetect.Idle(29.0, 0.0, 7.0, "rapl", 1)
            )

    def test_readings_before_a_gpu_answers_are_left_out_of_idle_power(self) -> None:
        """nvidia-smi takes a while to start: until then a reading lacks the card."""
        baseline = hwdetect.Baseline(0.0)
        for at in range(4):
            gpu = hwdetect.GpuReading("L4", 0, 20.0 if at > 1 else None, 0.0, 1.0)
            baseline.take(hwdetect.Reading(float(at), 1.0, None, 9.0, 9.0, gpus=(gpu,),
                                           power_source="rapl"), 7.0)
        self.assertEqual(baseline.idle, hwdetect.Idle(29.0, 0.0, 7.0, "rapl", 1))

    def test_a_machine_that_tells_nothing_is_asked_once(self) -> None:
        baseline = hwdetect.Baseline(0.0)
        self.assertTrue(
            baseline.take(hwdetect.Reading(0.0, unknown={"energy_joules": "no RAPL"}), 7.0)
        )
        self.assertEqual((baseline.why, baseline.wait_s(0.0)), ("no RAPL", hwdetect.IDLE_EVERY_S))


class Counting(unittest.TestCase):
    """Intervals, outliers, the rule that ends the repeats."""

    def runs(self, *seconds: float, joules: float | None = None) -> list[agent.Outcome]:
        made = []
        for wall in seconds:
            ledger = hwdetect.Ledger()
            ledger.measured_s = ledger.energy_s = wall
            ledger.energy_joules = joules and joules * wall
            ledger.power_source = "rapl"
            made.append(agent.Outcome("completed", wall_s=wall, ledger=ledger))
        return made

    def test_the_interval_is_student_s(self) -> None:
        """Ten values of mean 5 and standard deviation 1: half the interval is 2.2622 / sqrt(10)."""
        values = [5 + (1 if at % 2 else -1) * (9 / 10) ** 0.5 for at in range(10)]
        found = agent.interval(values)
        self.assertAlmostEqual(found["stdev"], 1.0)
        self.assertAlmostEqual(found["ci95_high"] - found["mean"], 2.2622 / 10**0.5, places=4)
        self.assertAlmostEqual(found["relative"], 2.2622 / 10**0.5 / 5, places=4)
        for count, student in ((2, 12.7062), (12, 2.2010), (31, 2.0423), (121, 1.9799)):
            values = [float(at % 2) for at in range(count)]
            found = agent.interval(values)
            half = found["ci95_high"] - found["mean"]
            self.assertAlmostEqual(half * count**0.5 / found["stdev"], student, 3)

    def test_outliers_are_told_and_few_values_have_none(self) -> None:
        self.assertEqual(agent.outliers([10.0, 10.1, 9.9, 10.0, 14.0]), [False] * 4 + [True])
        self.assertEqual(agent.outliers([10.0, 10.0, 10.0, 10.001]), [False] * 4)
        self.assertEqual((agent.outliers([1.0, 9.0, 1.0]), agent.outliers([])), ([False] * 3, []))

    def test_repeats_end_when_the_interval_is_narrow_or_the_cap_is_reached(self) -> None:
        steady, wild = self.runs(30.0, 10.0, 10.1, 9.9), self.runs(30.0, 10.0, 15.0, 9.0)
        for confidence, runs, more in (
            ("auto", steady[:1], False),
            ("low", steady[:1], False),
            ("medium", steady[:1], True),
            ("medium", steady[:3], True),
            ("medium", steady, False),
            ("high", steady, True),
            ("medium", wild, True),
            ("medium", wild + wild * 2, False),
        ):
            self.assertEqual(
                agent.wants_another(confidence, runs, 60.0, 1e9), more, (confidence, len(runs))
            )
        self.assertFalse(
            agent.wants_another("high", steady, 3500.0, 1e9), "none ends after an hour"
        )
        self.assertFalse(
            agent.wants_another("high", steady, 60.0, 12.0), "nor after the job's timeout"
        )

    def test_energy_counts_where_it_is_known(self) -> None:
        runs = self.runs(10.0, 10.0, 10.0, 10.0, joules=5.0)
        runs[-1].ledger.energy_joules = 80.0  # type: ignore[union-attr]
        self.assertTrue(agent.wants_another("medium", runs, 60.0, 1e9))
        self.assertEqual(set(agent.intervals_of(runs)), {"duration", "energy_joules"})
        runs[-1].ledger.energy_joules = None  # type: ignore[union-attr]
        self.assertEqual(set(agent.intervals_of(runs)), {"duration"})

    def test_a_result_of_repeats_counts_all_but_the_warm_up(self) -> None:
        runs = self.runs(30.0, 10.0, 10.0, 11.0, 10.0, 20.0, joules=5.0)
        outcome = dataclasses.replace(runs[-1], runs=tuple(runs), confidence="high",
                                      progress=agent.Progress(122, out_time_s=61.0))
        metrics, told = agent.metrics_of(outcome), agent._history(outcome)
        self.assertAlmostEqual(metrics["duration"], 12.2)
        self.assertAlmostEqual(metrics["energy_joules"], 61.0)
        self.assertEqual(
            (metrics["fps"], metrics["speed"], metrics["power_watts"]), (10.0, 5.0, 5.0)
        )
        self.assertEqual([row["warm_up"] for row in told["repeats"]], [True] + [False] * 5)
        self.assertEqual(
            [row["outlier"] for row in told["repeats"]], [False] * 3 + [True, False, True]
        )
        self.assertEqual(told["statistics"]["duration"]["n"], 5)
        word, reasons = agent.confidence_reached(outcome)
        self.assertEqual(word, "low")
        self.assertIn("high confidence was not reached", reasons)
        shown = dict(agent.result_rows({"metrics": metrics, **told}))
        self.assertIn("30.00 s (warm-up)", shown["runs"])

    def test_one_run_is_as_good_as_its_samples(self) -> None:
        outcome = self.runs(20.0)[0]
        ledger = outcome.ledger or hwdetect.Ledger()
        outcome = dataclasses.replace(outcome, runs=(outcome,), confidence="auto")
        self.assertEqual(agent.confidence_reached(outcome)[0], "low", "no samples")
        for at in range(40):
            ledger.pace.add(at / 2, 50.0 + at % 2)
            ledger.series.add(at / 2, 100.0, 90.0)
        self.assertEqual(agent.confidence_reached(outcome)[0], "high")
        for at in range(40):
            ledger.series.add(20 + at / 2, 100.0 + 2 * at, 90.0)
        self.assertEqual(agent.confidence_reached(outcome)[0], "low", "power was not steady")
        outcome = dataclasses.replace(outcome, confidence="low")
        self.assertEqual(agent.confidence_reached(outcome), ("low", []))

    def test_a_series_keeps_its_span_and_its_mean_in_few_points(self) -> None:
        series = hwdetect.Series(240)
        for at in range(100_000):
            series.add(float(at), None if at % 2 else 30.0, float(at % 4))
        self.assertLessEqual(len(series.points), 240)
        self.assertGreater(len(series.points), 100)
        self.assertEqual({round(point[1] or 0) for point in series.points}, {30})
        self.assertEqual({point[2] for point in series.points}, {1.5})
        self.assertGreater(series.points[-1][0] or 0, 98_000)


class Units(unittest.TestCase):
    def test_memory_is_in_mib(self) -> None:
        ledger = hwdetect.Ledger(peak_rss_bytes=100 << 20, gpu_memory_bytes=50 << 20)
        metrics = agent.metrics_of(agent.Outcome("completed", ledger=ledger, wall_s=1.0))
        self.assertEqual((metrics["memory_usage"], metrics["gpu_memory_usage"]), (100.0, 50.0))


class Judging(unittest.TestCase):
    def test_formulas_are_what_they_say(self) -> None:
        """Each formula, read as Python would, gives the figure that is reported."""
        settings = agent.resolve("1080p30-h264", {"input": "in.mp4", "output": "out.mp4"})
        ledger = hwdetect.Ledger()
        ledger.measured_s = ledger.energy_s = ledger.idle_s = ledger.busy_s = 40.0
        ledger.energy_joules, ledger.idle_joules, ledger.idle_watts = 3000.0, 800.0, 20.0
        ledger.power_source = "rapl"
        made = agent.plan(settings, machine(), FILM, "out.mp4")
        metrics = agent.metrics_of(
            agent.Outcome(
                "completed",
                settings,
                made,
                ledger,
                agent.Progress(1500, out_time_s=60.0),
                40.0,
                9_000_000,
                60.0,
                quality={"vmaf": 93.0},
            )
        )
        facts = {**metrics, "width": made.width, "height": made.height, "quality": 93.0}
        for name, formula in agent.FORMULAS.items():
            self.assertAlmostEqual(metrics[name], eval(formula, {}, facts), 3, name)
        self.assertEqual(
            (metrics["speed"], metrics["net_energy_joules"], metrics["joules_per_frame"]),
            (1.5, 2200.0, 2.0),
        )
        self.assertIsNone(agent.evaluate("frames / duration", {"frames": 3, "duration": 0.0}))
        self.assertIsNone(agent.evaluate("frames - duration", {"frames": 3}))

    def test_too_little_evidence_is_said_to_be(self) -> None:
        good = {"speed": 0.5, "cpu_usage": 90.0, "duration": 30.0}
        for doubt, said in (
            ({"duration": 0.3}, "0.3 s"),
            ({"background_cpu_percent": 45.0}, "45 %"),
            ({"throttled": True}, "heat"),
            ({"speed": None}, "unknown"),
        ):
            told = self.judge({**good, **doubt}, preset="slow")
            self.assertEqual(told["recommendation"], "not_enough_evidence", doubt)
            self.assertIn(said, told["reasons"][0])
            self.assertIsNone(told["suggestion"])
        self.assertEqual(self.judge(good, preset="slow")["recommendation"], "faster_preset")

    def test_a_suggestion_is_the_whole_job(self) -> None:
        told = self.judge({"speed": 0.5}, preset="slow", crf=20)
        self.assertEqual(told["suggestion"]["parameters"],
                         {"input": "in.mp4", "output": "out.mp4", "preset": "medium", "crf": 20})
        told = self.judge(
            {"speed": 3.0}, machine(h264_nvenc=None), encoder="libx264", preset="placebo", threads=4
        )
        self.assertEqual(told["suggestion"]["parameters"],
                         {"input": "in.mp4", "output": "out.mp4", "encoder": "h264_nvenc"})

    def test_a_suggested_encoder_without_presets_takes_none_along(self) -> None:
        told = self.judge(
            {"speed": 3.0}, machine(h264_vaapi=None), encoder="libx264", preset="fast"
        )
        self.assertEqual(told["suggestion"]["parameters"]["encoder"], "h264_vaapi")
        self.assertNotIn("preset", told["suggestion"]["parameters"])
        agent.resolve(**told["suggestion"])

    def test_a_suggestion_can_be_done_and_changes_nothing_else(self) -> None:
        """Threads decide the preset that nobody names; not every format is one for hardware."""
        told = self.judge(
            {"speed": 2.0, "cpu_seconds": 22.0, "duration": 10.0}, machine(threads=16)
        )
        self.assertEqual(told["recommendation"], "fewer_threads")
        self.assertEqual(told["suggestion"]["parameters"]["preset"], "medium")
        for form, word in (("yuv420p", "hardware_encoder"), ("yuv444p", "optimal")):
            told = self.judge(
                {"speed": 3.0}, machine(h264_nvenc=None), encoder="libx264", pixel_format=form
            )
            self.assertEqual(told["recommendation"], word, form)

    def test_a_live_encode_is_late_by_ffmpegs_start_alone(self) -> None:
        for took, word in ((10.4, "optimal"), (11.2, "faster_preset")):
            found = {
                "speed": 10 / took,
                "duration": took,
                "output_seconds": 10.0,
                "cpu_usage": 10.0,
            }
            told = self.judge(found, realtime=True, preset="slow", threads=1)
            self.assertEqual(told["recommendation"], word)

    def judge(
        self, metrics: agent.Json, on: Machine | None = None, **parameters: object
    ) -> agent.Json:
        settings = agent.resolve(
            "1080p30-h264", {"input": "in.mp4", "output": "out.mp4", **parameters}
        )
        on = on or machine()
        given = {"input": "in.mp4", "output": "out.mp4", **parameters}
        return agent.analyze(
            settings, agent.plan(settings, on, FILM, "out.mp4"), metrics, on, given
        )

    def test_presets_that_are_numbers_are_compared_as_numbers(self) -> None:
        on = machine(libsvtav1=None, librav1e=None)
        for encoder, own, faster in (("libsvtav1", "3", "veryslow"), ("libsvtav1", "8", "faster"),
                                     ("librav1e", "7", "fast"), ("librav1e", "9", "superfast"),
                                     ("libsvtav1", "13", None), ("librav1e", "10", None)):
            with self.subTest(encoder, own=own):
                told = self.judge({"speed": 0.5}, on, codec="av1", encoder=encoder, preset=own)
                self.assertEqual(
                    told["recommendation"], "faster_preset" if faster else "other_node"
                )
                suggestion = told["suggestion"] or {"parameters": {"preset": None}}
                self.assertEqual(suggestion["parameters"]["preset"], faster)

    def test_every_word_is_a_documented_one_and_every_suggestion_can_be_submitted(self) -> None:
        cases = (
            ({"speed": 2.0, "cpu_usage": 90.0}, {}, None),
            ({"speed": 0.5}, {"preset": "slow"}, None),
            ({"damaged_packets": 3}, {}, None),
            ({"speed": 1.0}, {"encoder": "libx264"}, machine(h264_nvenc=None)),
            ({"speed": 2.0, "cpu_usage": 10.0}, {"threads": 1}, None),
            ({}, {}, None),
            ({"speed": 0.5}, {"preset": "ultrafast"}, None),
            ({"speed": 2.0, "cpu_seconds": 22.0, "duration": 10.0}, {"threads": 8}, None),
        )
        seen = set()
        for metrics, parameters, on in cases:
            told = self.judge(metrics, on, **parameters)
            seen.add(told["recommendation"])
            self.assertIn(told["recommendation"], agent.RECOMMENDATIONS)
            self.assertTrue(told["reasons"])
            if told["suggestion"]:
                agent.resolve(**told["suggestion"])
        self.assertEqual(seen, set(agent.RECOMMENDATIONS))


class StandInServer:
    """A raw socket that answers what a test hands it, for faults that no real master has.

    An empty answer closes the connection.
    """

    def __init__(self, *answers: bytes, close_after: bool = False) -> None:
        self.answers = list(answers)
        self.close_after = close_after
        self.connections = 0
        self.requests: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while self.answers:
                head = b""
                while b"\r\n\r\n" not in head:
                    data = connection.recv(65536)
                    if not data:
                        return
                    head += data
                self.requests.append(head)
                answer = self.answers.pop(0)
                connection.sendall(answer)
                if self.close_after or not answer:
                    return

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()


SOME_ID = "550e8400-e29b-41d4-a716-446655440000"


class Decoding(unittest.TestCase):
    """JSON at the edge: one reader of fields, and the types that come out."""

    def refused(self, read: Callable[[agent.Fields], object], value: object) -> agent.ApiError:
        with self.assertRaises(agent.ApiError, msg=repr(value)) as caught:
            read(agent.Fields({"x": value}, prefix="job."))
        return caught.exception

    def test_each_kind_of_field_takes_its_own_and_refuses_others_by_name(self) -> None:
        kinds: dict[Callable[[agent.Fields], object], tuple[object, Sequence[object], str]] = {
            lambda fields: fields.text("x", 5): (
                "word",
                ("", "longer", 5, ["a"], "a\nb"),
                "text|control",
            ),
            lambda fields: fields.words("x"): ("two\nlines", (5, {}), "text"),
            lambda fields: fields.number("x", 1, 9): (
                2.5,
                ("2", True, math.nan, math.inf, 10**400, 0, 10),
                "number|from 1 to 9",
            ),
            lambda fields: fields.whole("x"): (3.0, (2.5, "3", [3]), "number"),
            lambda fields: fields.flag("x"): (False, (0, "true"), "true or false"),
            lambda fields: fields.uuid("x"): (SOME_ID, ("abc", 4), "UUID|text"),
            lambda fields: fields.items("x"): ([1], ({}, "ab"), "list"),
            lambda fields: fields.mapping("x"): ({"y": 1}, ([], "ab"), "object"),
            lambda fields: [entry.values for entry in fields.entries("x")]: (
                [{"y": 1}],
                ([1], {}),
                "list",
            ),
        }
        for read, (good, wrong, words) in kinds.items():
            self.assertEqual(read(agent.Fields({"x": good})), good)
            self.assertFalse(read(agent.Fields({})))
            for value in wrong:
                error = self.refused(read, value)
                self.assertEqual((error.status, error.field), (400, "job.x"))
                self.assertRegex(error.message, f"^job.x must .*(?:{words})")
                self.assertFalse(read(agent.Fields({"x": value}, lenient=True)))

    def test_whole_limits_print_whole(self) -> None:
        for limits, words in (
            ((0.04, 30 * 86400.0), "must be from 0.04 to 2592000"),
            ((1, 2**53), "must be from 1 to 9007199254740992"),
            ((1, math.inf), "must be at least 1"),
        ):
            error = self.refused(lambda fields, limits=limits: fields.number("x", *limits), -1)
            self.assertTrue(error.message.endswith(words), error.message)

    def test_a_name_that_is_not_utf8_is_refused_with_the_next_step(self) -> None:
        """Such as a German name in Latin-1 on the command line."""
        name = os.fsdecode(b"K\xe4se.mp4")
        sentence = "job.x is not UTF-8: if it names a file, rename the file"
        for read in (lambda fields: fields.text("x"), agent.Fields.check_utf8):
            error = self.refused(read, name)
            self.assertEqual((error.status, error.field), (400, "job.x"))
            self.assertEqual(error.message, sentence)
        agent.Fields({"x": "Käse.mp4", "y": 5, "z": "a\nb"}).check_utf8()

    def test_numbers_of_a_query_are_texts(self) -> None:
        fields = agent.Fields({"limit": "20", "wait": "soon"}, texts=True)
        self.assertEqual(fields.whole("limit", 1, 1000), 20)
        with self.assertRaisesRegex(agent.ApiError, "wait must be a number"):
            fields.number("wait")

    def test_a_field_inside_another_is_named_with_its_place(self) -> None:
        fields = agent.Fields({"holding": [{"job_id": "a"}, {"job_id": 5}]})
        with self.assertRaises(agent.ApiError) as caught:
            [entry.required_text("job_id") for entry in fields.entries("holding")]
        self.assertEqual(caught.exception.field, "holding[1].job_id")

    def test_the_seeds_master_may_answer_with_the_bare_job(self) -> None:
        bare = {
            "id": "job-1",
            "scenario": "720p30-h264",
            "parameters": {"crf": 23},
            "engine": "auto",
        }
        for answer in (bare, {"job": bare}):
            made = agent.Answer.from_json(answer)
            assert made.job is not None
            self.assertEqual((made.job.key, made.job.parameters), (("job-1", 1), {"crf": 23}))
            self.assertTrue(made.claim)
        for nothing in ({"job": None}, {}, {"status": "ok"}):
            self.assertEqual(agent.Answer.from_json(nothing), agent.Answer())

    def test_an_answer_that_makes_no_sense_names_its_field(self) -> None:
        for answer, field in (({"job": {"scenario": "x"}}, "job.id"), ({"job": 5}, "job"),
                              ({"actions": [{"job_id": "a"}]}, "actions[0].action"),
                              ({"next_s": "soon"}, "next_s"), ({"orders": 0.5}, "orders")):
            with self.assertRaises(agent.ApiError) as caught:
                agent.Answer.from_json(answer)
            self.assertEqual((caught.exception.field, caught.exception.retryable), (field, True))

    def test_views_take_the_seeds_jobs_and_nodes_and_strange_results(self) -> None:
        job = agent.JobView.from_json({"id": "0123456789", "status": "running", "progress": 40})
        self.assertEqual((job.short_id, job.progress, job.attempts, job.result),
                         ("01234567", {"percent": 40}, (), None))
        node = agent.NodeView.from_json({"id": "n", "address": "worker-1", "ram_bytes": None})
        self.assertEqual(
            (node.name, node.slots, node.running, node.quarantine), ("worker-1", 1, 0, "")
        )
        strange = agent.ResultView.from_json({
            "job_id": "a", "metrics": {"fps": 5, "unknown": "x"}, "encode": [], "analyzer_output": {
                "recommendation": 5, "reasons": "x"}, "repeats": [1, {"duration": 2.0}]})
        self.assertEqual(
            (strange.metrics["fps"], strange.unknown, strange.encoder, strange.recommendation),
            (5, {}, "", ""),
        )
        self.assertEqual((strange.reasons, strange.repeats), ((), ({"duration": 2.0},)))
        for view in (agent.JobView, agent.NodeView):
            with self.assertRaises(agent.ApiError):
                view.from_json({"name": "without an id"})

    def test_a_listing_knows_its_page_or_all_that_it_holds(self) -> None:
        rows = [{"id": "a"}, {"id": "b"}]
        answer = {"jobs": rows, "count": 2, "total": 9, "next": "c"}
        page = agent.Listing.from_json(answer, "jobs", agent.JobView)
        self.assertEqual((page.count, page.total, page.next), (2, 9, "c"))
        seeds = agent.Listing.from_json({"jobs": rows}, "jobs", agent.JobView)
        self.assertEqual([job.id for job in seeds.items], ["a", "b"])
        self.assertEqual((seeds.count, seeds.total, seeds.next), (2, 2, None))
        for wrong in ({"jobs": {}}, {"jobs": [5]}, []):
            with self.assertRaises(agent.ApiError):
                agent.Listing.from_json(wrong, "jobs", agent.JobView)


def http_answer(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


class Calling(unittest.TestCase):
    """The client, against faults."""

    def setUp(self) -> None:
        self.patience = mock.patch("agent.CONNECT_S", 5.0)
        self.patience.start()
        self.addCleanup(self.patience.stop)

    @contextlib.contextmanager
    def server(self, *answers: bytes, **more: bool) -> Iterator[tuple[StandInServer, agent.Client]]:
        server = StandInServer(*answers, **more)
        client = agent.Client(server.url)
        try:
            yield server, client
        finally:
            client.close()
            server.close()

    def test_one_connection_serves_many_calls(self) -> None:
        with self.server(*[http_answer(b'{"nodes": []}')] * 5) as (server, client):
            for _ in range(5):
                self.assertEqual(client.nodes().json, {"nodes": []})
            self.assertEqual(server.connections, 1)

    def test_an_answer_takes_no_more_memory_than_it_has(self) -> None:
        """Python 3.9 fills a buffer of all that it may read: the limit of an answer is 256 MB."""
        with self.server(*[http_answer(b"{}")] * 2) as (_, client):
            client.nodes()
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            client.nodes()
            self.assertLess(tracemalloc.get_traced_memory()[1], 1 << 20)

    def test_a_connection_that_the_server_closed_while_idle_is_no_error(self) -> None:
        with self.server(*[http_answer(b"{}")] * 3, close_after=True) as (server, client):
            for _ in range(3):
                self.assertEqual(client.nodes().json, {})
            self.assertEqual(server.connections, 3)

    def test_nothing_that_may_have_been_done_is_sent_twice(self) -> None:
        """A connection that breaks after the request was sent: the master may have acted on it."""
        good = http_answer(b'{"id": "x"}')
        for ask in (
            lambda client: client.report({}),
            lambda client: client.submit({}),
            lambda client: client.heartbeat("n", {}),
            lambda client: client.order("j", "retry"),
            lambda client: client.forget_node("n"),
            lambda client: client.claim({"node_id": "n"}),
        ):
            with self.server(good, b"", good) as (server, client):
                client.nodes()
                with self.assertRaises(agent.ApiError) as caught:
                    ask(client)
                self.assertTrue(caught.exception.retryable)
                self.assertEqual(len(server.requests), 2)
                ask(client)
                self.assertEqual(len(server.requests), 3)

    def test_a_reading_request_is_repeated_once(self) -> None:
        good = http_answer(b"{}")
        with self.server(good, b"", good) as (server, client):
            client.nodes()
            client.jobs({})
            self.assertEqual((len(server.requests), server.connections), (3, 2))
        with self.server(good, b"", b"") as (server, client):
            client.nodes()
            with self.assertRaises(agent.ApiError):
                client.jobs({})

    def test_a_request_goes_out_on_a_new_connection_when_the_kept_one_was_closed(self) -> None:
        with self.server(*[http_answer(b"{}")] * 2, close_after=True) as (server, client):
            client.nodes()
            wait_for(lambda: client._handler._kept(client._handler._local.host) is None, 10)
            client.report({})
            self.assertEqual((len(server.requests), server.connections), (2, 2))

    def test_each_thread_has_its_own_connection(self) -> None:
        with self.server(*[http_answer(b"{}")] * 2) as (server, client):
            def elsewhere() -> None:
                client.nodes()
                client.close()
            client.nodes()
            other = threading.Thread(target=elsewhere, daemon=True)
            other.start()
            wait_for(lambda: server.connections == 2, 10)
            client.close()
            other.join(10)
            self.assertFalse(other.is_alive())

    def test_answers_that_are_no_json_object_are_told_in_a_sentence(self) -> None:
        for body in (
            b"<html>hello</html>",
            b"[]",
            b"5",
            b"null",
            b'"x"',
            b"{",
            b"\xff\xfe",
            b"[" * 100_000,
        ):
            with self.server(http_answer(body)) as (_, client):
                with self.assertRaises(agent.ApiError) as caught:
                    client.nodes()
                self.assertTrue(caught.exception.message)
                self.assertNotIn("Traceback", caught.exception.message)

    def test_refusals_keep_status_sentence_and_field(self) -> None:
        refusal = http_answer(b'{"error": "no such thing", "field": "id"}', "404 Not Found")
        with self.server(refusal) as (_, client):
            with self.assertRaises(agent.ApiError) as caught:
                client.job("abcd")
            error = caught.exception
            self.assertEqual((error.status, error.message, error.field, error.retryable),
                             (404, "no such thing", "id", False))
        for body in (b"<h1>Bad Gateway</h1>", b"", b"[]", b"null", b'{"error": 5}', b"[" * 100_000):
            with self.server(http_answer(body, "502 Bad Gateway")) as (_, client):
                with self.assertRaises(agent.ApiError) as caught:
                    client.nodes()
                self.assertEqual((caught.exception.status, caught.exception.retryable), (502, True))

    def test_a_refusal_may_name_a_pause_in_seconds(self) -> None:
        for pause, seconds in (("7", 7.0), ("0", 0.0), ("-5", 0.0), ("1e9", 0.0), ("", 0.0),
                               ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0), ("9" * 400, 0.0)):
            head = f"HTTP/1.1 503 Service Unavailable\r\nRetry-After: {pause}\r\n"
            for body in (b'{"error": "busy"}', b"<h1>busy</h1>"):
                answer = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
                with self.server(answer) as (_, client), self.subTest(pause, body=body):
                    with self.assertRaises(agent.ApiError) as caught:
                        client.nodes()
                    error = caught.exception
                    self.assertEqual((error.status, error.retryable), (503, True))
                    self.assertEqual(error.retry_after_s, seconds)

    def test_half_an_answer_is_no_answer_and_the_next_call_gets_its_own(self) -> None:
        cut = b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"nodes": ['
        with self.server(cut, http_answer(b'{"nodes": [{"id": "n"}]}'), close_after=True) as (
            _,
            client,
        ):
            with self.assertRaises(agent.ApiError) as caught:
                client.nodes()
            self.assertTrue(caught.exception.retryable)
            self.assertEqual([node.id for node in client.nodes().items], ["n"])

    def test_half_a_refusal_is_no_answer_and_retryable(self) -> None:
        """A body that does not come in time is a silence, not an error of the agent's own."""
        cut = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 500\r\n\r\n{"
        with self.server(cut, b"") as (_, client):
            client.patience_s = 0.2
            with self.assertRaises(agent.ApiError) as caught:
                client.nodes()
            self.assertEqual((caught.exception.status, caught.exception.retryable), (0, True))

    def test_the_rest_of_a_late_answer_is_not_taken_for_the_next_one(self) -> None:
        late = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"
        with self.server(late, http_answer(b'{"id": "x"}')) as (server, client):
            client.patience_s = 0.2
            with self.assertRaises(agent.ApiError):
                client.nodes()
            client.patience_s = 5.0
            self.assertEqual(client.submit({}).id, "x")
            self.assertEqual(server.connections, 2)

    def test_bytes_that_are_no_http_are_told_in_a_sentence(self) -> None:
        for raw in (
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"\r\n\r\n",
            b"HTTP/1.1 abc\r\n\r\n",
            b"\x00" * 100 + b"\r\n",
            b"\x1b[2J\x07\r\n",
        ):
            with self.subTest(raw[:20]), self.server(raw, raw, close_after=True) as (_, client):
                with self.assertRaises(agent.ApiError) as caught:
                    client.nodes()
                self.assertEqual((caught.exception.status, caught.exception.retryable), (0, True))
                self.assertEqual(
                    caught.exception.message,
                    f"no answer from the master at {client.url}: it does not speak HTTP",
                )

    def test_a_length_that_is_no_number_is_that_of_the_connection(self) -> None:
        raw = b'HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{"nodes": []}'
        with self.server(raw, close_after=True) as (_, client):
            self.assertEqual(client.nodes().json, {"nodes": []})

    def test_nobody_there_is_retryable_and_names_the_master(self) -> None:
        url = f"http://127.0.0.1:{free_port()}"
        with self.assertRaises(agent.ApiError) as caught:
            agent.Client(url).nodes()
        self.assertEqual((caught.exception.status, caught.exception.retryable), (0, True))
        self.assertIn(url, caught.exception.message)
        self.assertIn("refused", caught.exception.message)

    def test_addresses_that_are_none_are_refused_at_once(self) -> None:
        for url in ("ftp://x", "http://", "http://x:99999", "http://x:port", "://", ""):
            with self.assertRaises(ValueError, msg=url):
                agent.Client(url)
        self.assertEqual(agent.Client("master-ip:8080").url, "http://master-ip:8080")
        self.assertEqual(agent.Client("master-ip").url, "http://master-ip:8080")
        self.assertEqual(agent.Client("http://[::1]/fleet/").url, "http://[::1]:8080/fleet")
        self.assertEqual(agent.Client("http://proxy:80/fleet").url, "http://proxy:80/fleet")

    def test_ids_are_quoted_in_paths(self) -> None:
        with self.server(http_answer(b'{"id": "x"}')) as (server, client):
            client.job("../../x?y#z")
            wait_for(lambda: server.requests, 5)
            self.assertTrue(
                server.requests[0].startswith(b"GET /jobs/..%2F..%2Fx%3Fy%23z HTTP/1.1\r\n")
            )


if __name__ == "__main__":
    unittest.main()
