"""The pure lifecycle of a job, and what a submission resolves to: no socket, no disk, no clock.

The lifecycle is checked twice: every (state, event) pair by the table, and random walks by a model
that knows only what README promises of a job, not how advance() does it.
"""
from __future__ import annotations

import json
import math
import os
import random
import unittest
from typing import Any

import ffdist
from agent import PARAMETERS, ApiError, resolve
from ffdist import FINAL, LEASED, TRANSITIONS, Job, advance, draft_of, job_detail_json, job_json

SEED = int(os.environ.get("FFDIST_TEST_SEED", "20251229"))
STATES = ("blocked", "pending", "running", "stopped", "canceling", "paused", "completed", "failed",
          "canceled")
EVENTS = tuple(sorted({event for _, event in TRANSITIONS}))
ID = "550e8400-e29b-41d4-a716-446655440000"


def new_job(**state: Any) -> Job:
    spec = draft_of({"scenario": "720p30-h264"}, 3).spec
    return Job(1, ID, "720p30-h264", spec, 1.0, **state)


def job_in(state: str) -> Job:
    """Return a job that came to a state on a legal way."""
    ways = {
        "blocked": (),
        "pending": (),
        "running": ("claim",),
        "stopped": ("claim", "pause"),
        "canceling": ("claim", "cancel"),
        "paused": ("pause",),
        "completed": ("claim", "complete"),
        "failed": ("claim", "fail"),
        "canceled": ("cancel",),
    }
    job = new_job(state="blocked" if state == "blocked" else "pending")
    for at, event in enumerate(ways[state]):
        job = advance(job, event, 10.0 + at, node_id="n1", claim="word", error="broken")
    return job


class TestTable(unittest.TestCase):
    """Every pair of a state and an event."""

    def test_the_table_speaks_only_of_known_states_and_knows_every_event_of_an_agent(self) -> None:
        self.assertLessEqual(
            {state for state, _ in TRANSITIONS} | set(TRANSITIONS.values()), set(STATES)
        )
        self.assertLessEqual(
            {
                *ffdist.EVENT_OF_REPORT.values(),
                "claim",
                "reclaim",
                "lose",
                "exhaust",
                "cancel",
                "retry",
                "pause",
                "resume",
            },
            set(EVENTS),
        )

    def test_every_state_is_shown_as_a_status_of_the_api(self) -> None:
        for state in STATES:
            self.assertIn(job_in(state).status, ffdist.STATUSES)
        self.assertEqual(job_in("stopped").status, "paused")
        self.assertEqual(job_in("canceling").status, "running")

    def test_every_legal_event_leads_where_the_table_says(self) -> None:
        for (state, event), target in TRANSITIONS.items():
            with self.subTest(state=state, event=event):
                job = job_in(state)
                if event == "reclaim":
                    job = advance(job_in("running"), "lose", 20.0)
                self.assertEqual(advance(job, event, 30.0, node_id="n2").state, target)

    def test_every_other_event_is_a_409_that_names_job_state_and_event(self) -> None:
        for state in STATES:
            for event in (*EVENTS, "explode", ""):
                if (state, event) in TRANSITIONS:
                    continue
                with self.subTest(state=state, event=event):
                    job = job_in(state)
                    before = job.state_json()
                    with self.assertRaises(ApiError) as caught:
                        advance(job, event, 30.0)
                    self.assertEqual(caught.exception.status, 409)
                    for word in (ID, job.status, event):
                        self.assertIn(word, caught.exception.message)
                    self.assertEqual(job.state_json(), before)

    def test_a_final_job_leaves_its_state_only_by_retry(self) -> None:
        for (state, event), target in TRANSITIONS.items():
            if state in FINAL:
                self.assertEqual((event, target), ("retry", "pending"))

    def test_a_job_is_canceled_from_every_state_that_is_not_final(self) -> None:
        for state in STATES:
            self.assertEqual((state, "cancel") in TRANSITIONS, state not in FINAL, state)

    def test_a_job_that_is_being_canceled_never_goes_back_to_pending(self) -> None:
        reached, waiting = set(), ["canceling"]
        while waiting:
            state = waiting.pop()
            if state in reached:
                continue
            reached.add(state)
            waiting += [target for (source, event), target in TRANSITIONS.items()
                        if source == state and event != "retry"]
        self.assertEqual(reached, {"canceling", "canceled", "completed"})

    def test_completed_is_reached_only_by_a_report(self) -> None:
        events = {event for (_, event), target in TRANSITIONS.items() if target == "completed"}
        self.assertEqual(events, {"complete"})


class TestLife(unittest.TestCase):
    """What an event leaves in the job."""

    def test_advance_leaves_the_job_it_was_given_alone(self) -> None:
        job = new_job()
        before = job.state_json()
        advance(job, "claim", 5.0, "n1")
        self.assertEqual(job.state_json(), before)

    def test_a_claim_numbers_the_attempt_and_names_the_node(self) -> None:
        job = advance(new_job(), "claim", 5.0, "n1", "word")
        self.assertEqual(
            (job.attempt, job.node_id, job.claim, job.started_at), (1, "n1", "word", 5.0)
        )
        self.assertEqual([(record["attempt"], record["node_id"], record["status"])
                          for record in job.attempts], [(1, "n1", "running")])

    def test_each_attempt_has_the_next_number_and_keeps_how_it_ended(self) -> None:
        job = advance(new_job(), "claim", 5.0, "n1")
        job = advance(job, "lose", 6.0, error="silent", reason="node_lost")
        job = advance(job, "claim", 7.0, "n2")
        job = advance(job, "return", 8.0, reported="returned")
        job = advance(job, "claim", 9.0, "n3")
        job = advance(job, "complete", 10.0, reported="completed")
        self.assertEqual(
            [
                (record["attempt"], record["node_id"], record["status"], record["ended_at"])
                for record in job.attempts
            ],
            [(1, "n1", "lost", 6.0), (2, "n2", "returned", 8.0), (3, "n3", "completed", 10.0)],
        )

    def test_a_lost_node_counts_as_a_retry_and_is_remembered(self) -> None:
        job = advance(advance(new_job(), "claim", 5.0, "n1", "word"), "lose", 6.0, error="silent",
                      reason="node_lost", not_before=6.5)
        self.assertEqual((job.state, job.retry_count, job.given_up, job.node_id, job.not_before),
                         ("pending", 1, "n1", None, 6.5))
        self.assertEqual((job.failure_reason, job.error), ("node_lost", "silent"))

    def test_a_returned_job_is_pending_and_no_retry_is_counted(self) -> None:
        job = advance(advance(new_job(), "claim", 5.0, "n1"), "return", 6.0, reported="returned")
        self.assertEqual(
            (job.state, job.retry_count, job.given_up, job.node_id), ("pending", 0, None, None)
        )

    def test_a_taken_back_job_is_the_same_attempt_and_the_retry_is_not_counted(self) -> None:
        claimed = advance(new_job(), "claim", 5.0, "n1", "word")
        job = advance(
            advance(claimed, "lose", 6.0, error="silent", reason="node_lost", not_before=9.0),
            "reclaim",
            7.0,
        )
        self.assertEqual(
            (job.state, job.attempt, job.node_id, job.retry_count, job.given_up, job.not_before),
            ("running", 1, "n1", 0, None, None),
        )
        self.assertEqual((job.error, job.failure_reason, job.retry_reason), (None, None, None))
        self.assertEqual([record["status"] for record in job.attempts], ["running"])

    def test_a_taken_back_job_keeps_the_time_it_was_started(self) -> None:
        claimed = advance(new_job(), "claim", 5.0, "n1", "word")
        job = advance(
            advance(claimed, "lose", 6.0, error="silent", reason="node_lost"), "reclaim", 7.0
        )
        self.assertEqual(job.started_at, 5.0)
        self.assertEqual(
            {
                name: job.attempts[0].get(name)
                for name in ("started_at", "ended_at", "error", "failure_reason")
            },
            {"started_at": 5.0, "ended_at": None, "error": None, "failure_reason": None},
        )

    def test_any_event_after_a_loss_ends_the_right_to_take_back(self) -> None:
        lost = advance(advance(new_job(), "claim", 5.0, "n1"), "lose", 6.0, reason="node_lost")
        for event in ("claim", "cancel", "pause"):
            self.assertIsNone(advance(lost, event, 7.0, "n2").given_up, event)

    def test_retries_exhausted_is_failed_with_the_reason(self) -> None:
        job = advance(advance(new_job(), "claim", 5.0, "n1"), "exhaust", 6.0, error="silent",
                      reason="node_lost")
        self.assertEqual((job.state, job.failure_reason, job.error, job.completed_at),
                         ("failed", "node_lost", "silent", 6.0))
        self.assertEqual(job.attempts[-1]["status"], "lost")

    def test_a_paused_job_whose_node_is_lost_stays_paused_without_a_lease(self) -> None:
        for event in ("lose", "exhaust", "return"):
            job = advance(job_in("stopped"), event, 20.0)
            self.assertEqual(
                (job.state, job.node_id, job.started_at), ("paused", None, None), event
            )

    def test_a_failed_job_keeps_error_and_reason_and_a_completed_one_has_none(self) -> None:
        running = advance(new_job(), "claim", 5.0, "n1")
        failed = advance(
            running, "fail", 6.0, error="no such file", reason="bad_input", reported="failed"
        )
        self.assertEqual((failed.error, failed.failure_reason, failed.node_id),
                         ("no such file", "bad_input", "n1"))
        done = advance(running, "complete", 6.0, error="a word", reason="x", reported="completed")
        self.assertEqual((done.error, done.failure_reason, done.completed_at), (None, None, 6.0))

    def test_retry_by_a_person_starts_afresh_but_keeps_the_attempts(self) -> None:
        job = advance(job_in("failed"), "retry", 50.0)
        self.assertEqual((job.state, job.retry_count, job.error, job.completed_at, job.started_at,
                          job.node_id), ("pending", 0, None, None, None, None))
        self.assertEqual(len(job.attempts), 1)
        again = advance(job, "claim", 51.0, "n2")
        self.assertEqual((again.attempt, len(again.attempts)), (2, 2))

    def test_the_history_has_each_change_of_state_with_its_time(self) -> None:
        job = new_job(history=((1.0, "pending", None),))
        for at, (event, reason) in enumerate((("claim", None), ("cancel", "cancel was asked for"),
                                              ("cancel", None), ("end", None)), 5):
            job = advance(job, event, float(at), "n1", reason=reason)
        self.assertEqual(
            list(job.history),
            [
                (1.0, "pending", None),
                (5.0, "running", None),
                (6.0, "running", "cancel was asked for"),
                (8.0, "canceled", None),
            ],
        )

    def test_history_and_attempts_are_bounded_however_long_a_job_lives(self) -> None:
        job = new_job()
        for at in range(300):
            job = advance(
                advance(job, "claim", float(at), "n1"), "return", float(at), reported="returned"
            )
        self.assertEqual(job.attempt, 300)
        self.assertLessEqual(len(job.history), ffdist.MAX_HISTORY + 1)
        self.assertLessEqual(len(job.attempts), 50)
        self.assertEqual(job.attempts[-1]["attempt"], 300)

    def test_a_job_comes_back_from_its_record_as_it_was(self) -> None:
        for state in STATES:
            job = job_in(state)
            back = ffdist.job_of_row((job.seq, job.id, job.scenario, job.spec, job.state_json()))
            self.assertEqual(json.loads(back.state_json()), json.loads(job.state_json()), state)
            self.assertEqual(job_json(back), job_json(job), state)
            self.assertEqual(job_detail_json(back), job_detail_json(job), state)

    def test_a_record_that_lacks_newer_fields_is_read(self) -> None:
        record = json.loads(job_in("failed").state_json())
        job = ffdist.job_of_row((1, ID, "x", new_job().spec, json.dumps(record[:3])))
        self.assertEqual((job.created_at, job.status, list(job.attempts), job.retry_count),
                         (1.0, "failed", [], 0))

    def test_the_api_shows_all_that_design_lists_and_times_in_utc(self) -> None:
        shown = job_json(advance(new_job(), "claim", 1735501500.25, "n1"))
        for name in (
            "id",
            "scenario",
            "confidence",
            "parameters",
            "settings",
            "attempt",
            "status",
            "node_id",
            "error",
            "failure_reason",
            "retry_count",
            "created_at",
            "started_at",
            "completed_at",
        ):
            self.assertIn(name, shown)
        self.assertEqual(shown["started_at"], "2024-12-29T19:45:00.250Z")

    def test_cancel_requested_is_shown_while_the_agent_has_not_reported(self) -> None:
        job = job_in("canceling")
        self.assertTrue(job_json(job)["cancel_requested"])
        self.assertFalse(job_json(advance(job, "end", 20.0))["cancel_requested"])


class TestModel(unittest.TestCase):
    """Random walks, legal and illegal, against what README promises alone."""

    def test_random_events_never_break_a_promise(self) -> None:
        for walk in range(400):
            source = random.Random(SEED + walk)
            with self.subTest(seed=SEED + walk):
                self._walk(source)

    def _walk(self, source: random.Random) -> None:
        job, retries = new_job(state=source.choice(("pending", "blocked"))), 0
        for step in range(40):
            event = source.choice(EVENTS)
            before, frozen = job, job.state_json()
            node = source.choice(("n1", "n2"))
            if event == "reclaim" and job.given_up is None:
                continue  # the master asks for it only where given_up names the node
            try:
                job = advance(job, event, 10.0 + step, node, f"word{step}", error="an error",
                              reason="a reason")
            except ApiError as error:
                self.assertEqual(error.status, 409)
                self.assertNotIn((before.state, event), TRANSITIONS)
                self.assertEqual(before.state_json(), frozen)
                continue
            self.assertEqual(before.state_json(), frozen, "advance() changed what it was given")
            retries = self._retries(before, event, job, retries)
            self._check(before, event, job, retries)

    @staticmethod
    def _retries(before: Job, event: str, after: Job, retries: int) -> int:
        if event == "retry":
            return 0
        if event == "reclaim":
            return retries - 1
        return retries + (event == "requeue" or (before.state, event) == ("running", "lose"))

    def _check(self, before: Job, event: str, after: Job, retries: int) -> None:
        leased = after.state in LEASED
        self.assertEqual(after.retry_count, retries)
        self.assertEqual(after.attempt, before.attempt + (event == "claim"))
        self.assertEqual(sum(record["ended_at"] is None for record in after.attempts), int(leased),
                         "one lease: one open attempt while leased, none otherwise")
        self.assertEqual(leased and after.node_id is None, False)
        if after.state in ("pending", "paused", "blocked"):
            self.assertIsNone(after.node_id)
            self.assertIsNone(after.started_at)
            self.assertIsNone(after.completed_at)
        if leased:
            self.assertIsNotNone(after.started_at)
        self.assertEqual(after.completed_at is not None, after.state in FINAL)
        self.assertEqual(after.given_up is not None, (before.state, event) == ("running", "lose"))
        if before.state == "canceling":
            self.assertIn(after.state, ("canceling", "canceled", "completed"))
        if after.state != before.state:
            self.assertEqual(after.history[-1][1], after.status)
        numbers = [record["attempt"] for record in after.attempts]
        self.assertEqual(numbers, sorted(set(numbers)))


SIZES = {"4K60": (3840, 2160, 60), "4K30": (3840, 2160, 30), "1080p60": (1920, 1080, 60),
         "1080p30": (1920, 1080, 30), "720p60": (1280, 720, 60), "720p30": (1280, 720, 30),
         "480p30": (854, 480, 30)}


class TestScenario(unittest.TestCase):
    """What a scenario's words mean."""

    def check(self, scenario: str, codec: str, width: int, height: int, fps: int) -> None:
        found = resolve(scenario)
        self.assertEqual((found.scenario, found.codec, found.width, found.height, found.fps),
                         (scenario, codec, width, height, fps))

    def test_every_size_of_the_seed_with_h264_and_h265(self) -> None:
        for name, (width, height, fps) in SIZES.items():
            for codec in ("h264", "h265"):
                with self.subTest(scenario=f"{name}-{codec}"):
                    self.check(f"{name}-{codec}", codec, width, height, fps)
            with self.subTest(scenario=name):
                self.check(name, "h264", width, height, fps)

    def test_the_other_scenarios_of_the_seed(self) -> None:
        self.check("480p60-h264", "h264", 854, 480, 60)
        self.check("1080p60-vp9", "vp9", 1920, 1080, 60)
        self.check("720p30-vp9", "vp9", 1280, 720, 30)
        self.check("480p30-av1", "av1", 854, 480, 30)
        self.check("4K60-h264", "h264", 3840, 2160, 60)
        self.check("test-1080p", "h264", 1920, 1080, 30)
        self.check("transcode", "h264", 1280, 720, 30)

    def test_codec_words_have_their_usual_other_names_and_any_case(self) -> None:
        for scenario, codec in (
            ("1080p30-hevc", "h265"),
            ("1080p30-H264", "h264"),
            ("x265-1080p", "h265"),
            ("AV1-720p", "av1"),
            ("my_film.v2-vp9", "vp9"),
        ):
            self.assertEqual(resolve(scenario).codec, codec, scenario)
        self.check("4k60-h264", "h264", 3840, 2160, 60)

    def test_nothing_said_is_a_720p_clip_of_ten_seconds(self) -> None:
        found = resolve("transcode")
        self.assertEqual(
            (found.width, found.height, found.fps, found.duration), (1280, 720, 30, 10)
        )

    def test_with_an_input_nothing_said_is_as_the_input_is(self) -> None:
        found = resolve("transcode", {"input": "film.mov"})
        self.assertEqual((found.width, found.height, found.fps, found.duration, found.input),
                         (None, None, None, None, "film.mov"))
        self.assertEqual(resolve("1080p30", {"input": "film.mov"}).height, 1080)

    def test_parameters_override_the_scenario(self) -> None:
        found = resolve("4K60-h264", {"codec": "h265", "width": 640, "height": 360, "fps": 25,
                                      "duration": 2.5})
        self.assertEqual((found.codec, found.width, found.height, found.fps, found.duration),
                         ("h265", 640, 360, 25, 2.5))

    def test_the_seeds_own_example(self) -> None:
        found = resolve("4K60-h264", {"duration": 300, "bitrate": "15000k"})
        self.assertEqual((found.duration, found.bitrate), (300, 15_000_000))
        self.assertEqual(found.to_json()["bitrate"], "15000k")

    def test_one_side_of_the_size_gives_the_other_at_16_to_9_and_even(self) -> None:
        for given in ({"height": 480}, {"width": 854}, {"height": 1080}, {"width": 426}):
            found = resolve("x", given)
            self.assertEqual((found.width or 1) % 2 + (found.height or 1) % 2, 0)
            self.assertAlmostEqual((found.width or 0) / (found.height or 1), 16 / 9, delta=0.02)

    def test_a_bad_scenario_is_refused_by_name(self) -> None:
        for value in (None, 5, True, [], {}, "", "a b", "a/b", "x" * 65, "ä", "a\n", "1080p30-720p",
                      "h264-vp9", "1080p0", "1080p481", "99999p", "17p", "1081p"):
            with self.subTest(scenario=value), self.assertRaises(ApiError) as caught:
                resolve(value)
            self.assertEqual((caught.exception.status, caught.exception.field), (400, "scenario"))
        self.assertEqual(resolve("x" * 64).scenario, "x" * 64)


class TestParameters(unittest.TestCase):
    """Each parameter: what it takes, and that a refusal names it."""

    def refused(self, field: str, parameters: Any, scenario: str = "x") -> ApiError:
        with self.assertRaises(ApiError, msg=repr(parameters)) as caught:
            resolve(scenario, parameters)
        self.assertEqual(
            (caught.exception.status, caught.exception.field), (400, field), repr(parameters)
        )
        self.assertLess(len(caught.exception.message), 1000)
        return caught.exception

    def test_the_wrong_type_is_refused_for_every_parameter(self) -> None:
        wrong: dict[str, tuple[Any, ...]] = {
            "number": ("fast", True, [], {}, "5 s"),
            "whole": ("x", True, [1], {}, 1.5),
            "size": ("x", False, [], {}, 100.5, 101),
            "rate": ("x", True, [], {}, "30/0", "1/2/3"),
            "bitrate": ("fast", True, [], {}, "-5M", "5MM", ""),
            "bool": ("yes", 1, 0, [], {}),
            "word": (5, True, [], {}, "", "mp3"),
            "words": (5, True, {}, [5]),
            "name": (5, True, [], {}, "", "a b", "$(reboot)", "x" * 65),
            "preset": (True, 1.5, [], {}, "", "quick", "p8"),
            "place": (5, True, [], {}, "", "a\0b", "a\nb"),
        }
        for name, rule in PARAMETERS.items():
            for value in wrong[rule.kind]:
                if name == "extra_args" and not value:
                    continue
                with self.subTest(parameter=name, value=value):
                    self.refused(f"parameters.{name}", {name: value})

    def test_negative_nan_infinite_and_huge_numbers_are_refused(self) -> None:
        for name, rule in PARAMETERS.items():
            if rule.kind not in ("number", "whole", "size", "rate", "bitrate"):
                continue
            for value in (
                -1,
                -0.5,
                math.nan,
                math.inf,
                -math.inf,
                1e300,
                10**18,
                10**400,
                -(10**400),
            ):
                with self.subTest(parameter=name, value=str(value)[:20]):
                    self.refused(f"parameters.{name}", {name: value})

    def test_the_limits_themselves_are_taken(self) -> None:
        for name, rule in PARAMETERS.items():
            if rule.kind in ("number", "whole", "size") and name != "crf":
                for value in (rule.low, rule.high):
                    with self.subTest(parameter=name, value=value):
                        resolve("x", {name: value})
        self.assertEqual(resolve("x", {"crf": 51}).crf, 51)
        self.assertEqual(resolve("x-vp9", {"crf": 63}).crf, 63)
        self.refused("parameters.crf", {"crf": 52})

    def test_an_unknown_name_is_refused_with_the_nearest_known_one(self) -> None:
        for typo, meant in (
            ("bitrat", "bitrate"),
            ("heigth", "height"),
            ("pixelformat", "pixel_format"),
            ("twopass", "two_pass"),
            ("codecs", "codec"),
            ("Duration", "duration"),
        ):
            error = self.refused(f"parameters.{typo}", {typo: 1})
            self.assertRegex(error.message, rf"did you mean .*\b{meant}\b")
        self.assertIn("bitrate", self.refused("parameters.zzz", {"zzz": 1}).message)
        self.refused("parameters.", {"": 1})
        self.refused(f"parameters.{'x' * 64}", {"x" * 5000: 1})

    def test_parameters_must_be_an_object(self) -> None:
        for value in (5, "x", [], True, 1.5):
            self.refused("parameters", value)
        self.assertEqual(resolve("x", {}), resolve("x", None))

    def test_null_means_not_said(self) -> None:
        self.assertEqual(resolve("x", dict.fromkeys(PARAMETERS)), resolve("x"))

    def test_bitrates_in_every_spelling(self) -> None:
        for text, bits in (
            ("15000k", 15_000_000),
            ("5M", 5_000_000),
            ("2.5M", 2_500_000),
            (800000, 800_000),
            ("1500 kbps", 1_500_000),
            ("1G", 1_000_000_000),
            ("64000", 64_000),
        ):
            self.assertEqual(resolve("x", {"bitrate": text}).bitrate, bits, text)

    def test_frame_rates_as_numbers_and_fractions(self) -> None:
        for value, rate in ((25, 25), (29.97, 29.97), ("30", 30), ("29.97", 29.97),
                            ("30000/1001", 30000 / 1001)):
            self.assertAlmostEqual(resolve("x", {"fps": value}).fps or 0, rate)

    def test_a_frame_rate_with_an_exponent_is_refused_without_computing_it(self) -> None:
        for text in ("1e400", "1e-400", "3e2/1e5"):
            self.refused("parameters.fps", {"fps": text})

    def test_the_aliases_of_the_seeds_code(self) -> None:
        found = resolve("x", {"resolution": "1920x1080", "frame_rate": 60})
        self.assertEqual((found.width, found.height, found.fps), (1920, 1080, 60))
        self.assertEqual(resolve("x", {"resolution": "720p"}).width, 1280)
        found = resolve(
            "x", {"output_mode": "rtmp", "rtmp_url": "rtmp://host/live/", "stream_key": "key"}
        )
        self.assertEqual((found.output, found.container), ("rtmp://host/live/key", "flv"))
        self.assertEqual(resolve("x", {"rtmp_url": "rtmp://host/live"}).output, "rtmp://host/live")
        self.assertIsNone(resolve("x", {"output_mode": "file"}).output)
        for field, given in (
            ("resolution", {"resolution": "big"}),
            ("resolution", {"resolution": 5}),
            ("output_mode", {"output_mode": "carrier pigeon"}),
            ("rtmp_url", {"output_mode": "rtmp"}),
            ("rtmp_url", {"rtmp_url": 5}),
        ):
            self.refused(f"parameters.{field}", given)

    def test_an_alias_never_beats_the_name_itself(self) -> None:
        found = resolve("x", {"resolution": "1920x1080", "height": 720, "width": 1280})
        self.assertEqual((found.width, found.height), (1280, 720))

    def test_the_container_follows_from_the_output(self) -> None:
        for output, container in (("a.mp4", "mp4"), ("a.MKV", "matroska"), ("a.mov", "mov"),
                                  ("a.ts", "mpegts"), ("rtmp://h/a/b", "flv"),
                                  ("srt://h:9000", "mpegts"), ("a.flv", "flv")):
            self.assertEqual(resolve("x", {"output": output}).container, container, output)
        self.assertEqual(resolve("x-vp9", {"output": "a.webm"}).container, "webm")
        self.refused("parameters.output", {"output": "film"})
        self.refused("parameters.output", {"output": "film.exe"})

    def test_an_output_ends_with_the_suffix_of_its_container(self) -> None:
        for output in ("film", "authorized_keys", "a.py", "a.mp4.sh", "mp4", "a.mp4/", "a.mp4/b",
                       "a.m\u212av", "a.mp4\u200b"):
            self.refused("parameters.output", {"output": output, "container": "mkv"})
        for output, container in (("a.mp4", "mkv"), ("a.mov", "mp4"), ("a.mkv", "webm")):
            self.refused("parameters.container", {"output": output, "container": container})
        for output, container in (("a.mp4", "mp4"), ("a.mkv", "matroska"), ("a.M4V", "mp4")):
            self.assertEqual(
                resolve("x", {"output": output, "container": container}).container, container
            )
        self.assertEqual(
            resolve("x", {"output": "rtmp://h/a", "container": "flv"}).container, "flv"
        )

    def test_no_part_of_an_output_begins_with_a_dot(self) -> None:
        for output in (
            ".ssh/a.mkv",
            "a/.b/c.mp4",
            ".a.mp4",
            "/srv/.x/a.mp4",
            "../a.mp4",
            "a/../b.mp4",
            ".ffdist-1.part.mp4",
        ):
            self.assertIn("dot", self.refused("parameters.output", {"output": output}).message)
            resolve("x", {"input": output})
        self.assertEqual(resolve("x", {"output": "./a/./b.mp4"}).container, "mp4")
        self.assertEqual(
            resolve("x", {"output": "/home/me/.films/a.mp4"}, own_paths=True).container, "mp4"
        )

    def test_a_codec_that_its_container_cannot_hold_is_refused_at_once(self) -> None:
        for codec, output in (
            ("h264", "a.webm"),
            ("vp9", "a.mov"),
            ("h265", "rtmp://h/a"),
            ("av1", "a.ts"),
        ):
            error = self.refused("parameters.codec", {"codec": codec, "output": output})
            self.assertIn(codec, error.message)
        self.refused("parameters.container", {"codec": "h264", "container": "webm"})

    def test_an_encoder_must_be_known_and_of_the_codec(self) -> None:
        self.assertEqual(resolve("x", {"encoder": "libx265"}).codec, "h265")
        self.assertIn(
            "libx264", self.refused("parameters.encoder", {"encoder": "libx264x"}).message
        )
        self.refused("parameters.encoder", {"encoder": "libx265", "codec": "h264"})
        self.refused(
            "parameters.two_pass", {"two_pass": True, "encoder": "h264_nvenc", "bitrate": "1M"}
        )
        self.refused("parameters.two_pass", {"two_pass": True, "crf": 20})

    def test_places_are_paths_or_urls_of_known_schemes_with_a_host(self) -> None:
        for value in (
            "file:///etc/passwd",
            "concat://a|b",
            "gopher://x/",
            "http://",
            "http://h:99999/x",
            "http://h:port/x",
            "http://[::1/x",
        ):
            self.refused("parameters.input", {"input": value})
        self.assertEqual(resolve("x", {"input": "HTTP://host/a.mp4"}).input, "http://host/a.mp4")

    def test_a_url_is_the_same_host_to_every_parser(self) -> None:
        for value in (
            "http://169.254.169.254:80[2001:db8::1]/a",
            "http://a[::1]/x",
            "http://[::1]x/a",
            "http://good@evil@host/x",
            "http://host\\@evil/x",
            "http://ho st/x",
            "http://h:1:2/x",
            "http://[::1%25eth0]/x",
            "http://[127.0.0.1]/x",
            "http://h%6fst/x",
            "http://:80/x",
            "http://user@/x",
            "http://h:0/x",
            "http://h:-1/x",
            "http://h;x/",
            "http://[/x",
        ):
            for name in ("input", "output"):
                self.refused(f"parameters.{name}", {name: value})
        for value, wanted in (
            (
                "HTTPS://User:p%40ss@Host.Example:443/A?b=c#d",
                "https://User:p%40ss@host.example:443/A?b=c#d",
            ),
            ("http://[2001:DB8:0::1]:8080/x", "http://[2001:db8::1]:8080/x"),
            ("http://host:/x", "http://host/x"),
            ("http://host?x=1", "http://host?x=1"),
            ("http://b\u00fccher.example/x", "http://xn--bcher-kva.example/x"),
            ("rtmp://h_1/app/key?a=[b]@c", "rtmp://h_1/app/key?a=[b]@c"),
        ):
            self.assertEqual(resolve("x", {"input": value}).input, wanted)

    def test_srt_calls_and_never_listens(self) -> None:
        for query in ("?mode=listener", "?latency=1&mode=listener", "?MODE=rendezvous", "?mode=",
                      "?mode=caller&mode=listener", "?mode=caller2", "?a=1?mode=listener"):
            self.refused("parameters.output", {"output": f"srt://host:9000{query}"})
            self.refused("parameters.input", {"input": f"srt://host:9000{query}"})
        for query in ("", "?mode=caller", "?mode=caller&latency=200", "?streamid=x"):
            self.assertEqual(resolve("x", {"output": f"srt://host:9000{query}"}).output,
                             f"srt://host:9000{query}")

    def test_extra_arguments_are_not_allowed(self) -> None:
        self.refused("parameters.extra_args", {"extra_args": ["-f", "null"]})
        resolve("x", {"extra_args": []})

    def test_settings_are_json_that_says_what_will_be_done(self) -> None:
        found = resolve("1080p30-h264", {"quality": "psnr,ssim", "crf": 23})
        settings = json.loads(json.dumps(found.to_json()))
        self.assertEqual((settings["quality"], settings["crf"], settings["width"]),
                         (["psnr", "ssim"], 23, 1920))


class TestDraft(unittest.TestCase):
    """One submission."""

    def refused(self, field: str | None, value: Any) -> None:
        with self.assertRaises(ApiError, msg=repr(value)) as caught:
            draft_of(value, 3)
        self.assertEqual(
            (caught.exception.status, caught.exception.field), (400, field), repr(value)
        )

    def test_what_was_given_and_what_was_resolved_are_both_kept(self) -> None:
        draft = draft_of(
            {"scenario": "4K60-h264", "confidence": "high", "parameters": {"bitrate": "15M"}}, 3
        )
        spec = json.loads(draft.spec)
        self.assertEqual(spec["parameters"], {"bitrate": "15M"})
        self.assertEqual((spec["settings"]["bitrate"], spec["confidence"]), ("15000k", "high"))
        self.assertEqual((draft.id, draft.scenario, draft.max_retries), (None, "4K60-h264", 3))

    def test_unknown_fields_beside_the_known_ones_are_no_error_and_forge_nothing(self) -> None:
        body = {
            "scenario": "x",
            "priority": "high",
            "queue": "live",
            "engine": "auto",
            "classification": {},
            "status": "completed",
            "node_id": "me",
            "result": {},
            "settings": {"codec": "mine"},
            "attempt": 7,
        }
        spec = json.loads(draft_of(body, 3).spec)
        self.assertEqual((spec["priority"], spec["settings"]["codec"]), ("high", "h264"))
        shown = job_json(Job(1, ID, "x", json.dumps(spec), 1.0))
        self.assertEqual(
            (shown["status"], shown["node_id"], shown["attempt"]), ("pending", None, 0)
        )

    def test_each_field_is_checked_by_name(self) -> None:
        for value in (None, 5, "x", [], True):
            self.refused(None, value)
        self.refused("scenario", {})
        for confidence in ("sure", 5, None, [], {}):
            self.refused("confidence", {"scenario": "x", "confidence": confidence})
        for job_id in (5, "", "abc", "x" * 500, [], ID + "0"):
            self.refused("id", {"scenario": "x", "id": job_id})
        for retries in (-1, 101, 1.5, True, [], math.nan, 10 ** 400):
            self.refused("max_retries", {"scenario": "x", "max_retries": retries})
        self.refused("parameters.bitrate", {"scenario": "x", "parameters": {"bitrate": "fast"}})

    def test_a_clients_own_id_is_taken_in_any_usual_form(self) -> None:
        for text in (ID, ID.upper(), "{" + ID + "}", ID.replace("-", ""), f"urn:uuid:{ID}"):
            self.assertEqual(draft_of({"id": text, "scenario": "x"}, 3).id, ID)

    def test_max_retries_is_the_masters_unless_said(self) -> None:
        self.assertEqual(draft_of({"scenario": "x"}, 7).max_retries, 7)
        self.assertEqual(draft_of({"scenario": "x", "max_retries": 0}, 7).max_retries, 0)


if __name__ == "__main__":
    unittest.main()
