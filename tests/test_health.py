"""Nodes that fail by themselves, and the way back: quarantine, trials, drains with a deadline,
pinned jobs.

The master's own state runs in this process with a clock that the test turns; the agents are
stand-ins that say what a real one says. The same on real processes: test_end_to_end.
"""
from __future__ import annotations

import itertools
import logging
import unittest
import uuid
from typing import Any

import ffdist
from agent import ApiError
from ffdist import Ask, Job, Master, Settings, Turn, backoff_most_s, blames_node, draft_of
from tests.fleet import Case

LOG = logging.getLogger("ffdist.test-health")
LOG.addHandler(logging.NullHandler())
LOG.propagate = False


class Fleet(Case):
    """A master whose clock the test turns, and nodes that it speaks for."""

    settings = Settings(node_timeout_s=90.0)

    def setUp(self) -> None:
        super().setUp()
        self.now = 1000.0
        self.offset = 1e9
        self.words = itertools.count()
        self.sessions: dict[str, str] = {}
        self.master = self.start()
        self.addCleanup(lambda: self.master.close())
        self.sick, self.well = self.node("sick"), self.node("well")

    def start(self) -> Master:
        return Master(self.folder / "master", self.settings, LOG, lambda: self.now,
                      lambda: self.now + self.offset)

    def restart(self) -> None:
        self.master.close()
        self.master = self.start()

    def node(self, name: str, **more: Any) -> str:
        node_id = str(uuid.uuid5(uuid.NAMESPACE_DNS, name))
        self.sessions[node_id] = more.get("session", f"session of {name}")
        self.master.register({"address": name, "id": node_id, "session": self.sessions[node_id],
                              "secret": "s", "protocol": 1, "holding": [], **more})
        return node_id

    def ask(self, node_id: str, seen: int = 0, **more: Any) -> dict[str, Any]:
        ask = Ask(
            node_id,
            self.sessions[node_id],
            0.0,
            seen,
            f"word {next(self.words)}",
            False,
        )
        return self.master.claim(ask._replace(**more))

    def claim(self, node_id: str) -> Job | None:
        return self.ask(node_id).get("job")

    def beat(self) -> None:
        for node_id, session in self.sessions.items():
            self.master.heartbeat(Ask(node_id, session, 0.0, 0, None, False))

    def submit(self, **more: Any) -> Job:
        return self.master.submit([draft_of({"scenario": "720p30-h264", **more}, 3)])[1][0]

    def report(self, job: Job, node_id: str, status: str = "completed", **more: Any) -> None:
        own = {"node_id": node_id, "session": self.sessions[node_id], "attempt": job.attempt}
        self.master.report({"job_id": job.id, "status": status, **own, **more})

    def end_badly(self, node_id: str, reason: str = "killed") -> Job | None:
        """Let a node fail the next job that it gets, at once; return the job."""
        job = self.claim(node_id)
        if job is not None:
            self.report(job, node_id, "failed", failure_reason=reason, error=f"ffmpeg: {reason}")
        return job

    def turn(self, seconds: float) -> None:
        """Let time go by in steps in which every node gives a sign of life."""
        for _ in range(round(seconds)):
            self.now += 1
            self.beat()
            self.master.reap()

    def turn_without_beats(self, seconds: float) -> None:
        for _ in range(round(seconds)):
            self.now += 1
            self.master.reap()

    def status(self, node_id: str) -> str:
        return str(self.master.queries.node(node_id)["status"])


class Asking:
    """A claim that is parked at the master."""

    def __init__(self, master: Master, ask: Ask) -> None:
        self._master = master
        self._ask = ask
        self._is_woken = False
        self._turn = Turn(self._wake, lambda: True)
        assert master.claim(ask, self._turn) is None, "it is parked"

    def _wake(self, turn: Turn) -> None:
        self._is_woken = True

    def answer(self) -> dict[str, Any] | None:
        """Return what it gets since it was woken; None where it was not, or is parked again."""
        if not self._is_woken:
            return None
        self._is_woken = False
        return self._master.claim(self._ask, self._turn)


class TestQuarantine(Fleet):
    def make_sick(self) -> None:
        for _ in range(3):
            self.submit()
            self.assertIsNotNone(self.end_badly(self.sick, "out_of_disk"))

    def test_three_failures_in_a_row_put_a_node_in_quarantine_with_the_reason_shown(self) -> None:
        self.make_sick()
        node = self.master.queries.node(self.sick)
        self.assertEqual(node["status"], "quarantined")
        self.assertIn("3 failures in a row", node["quarantine"]["reason"])
        self.assertIn("ffmpeg: out_of_disk", node["quarantine"]["reason"])
        self.assertTrue(node["quarantine"]["next_trial"].endswith("Z"))
        fresh = [self.submit().id for _ in range(2)]
        self.assertIsNone(
            self.claim(self.sick), "it gets no work, though there is some that it never failed"
        )
        self.assertIn(getattr(self.claim(self.well), "id", None), fresh)

    def test_a_success_between_failures_begins_the_count_anew(self) -> None:
        for _ in range(2):
            self.submit()
            self.end_badly(self.sick)
        self.submit()
        job = self.claim(self.sick)
        assert job is not None
        self.report(job, self.sick)
        for _ in range(2):
            self.submit()
            self.end_badly(self.sick)
        self.assertEqual(self.status(self.sick), "available")

    def test_input_and_parameters_say_nothing_of_a_node(self) -> None:
        for reason in ("input", "parameters", "input", "output", "timeout", "parameters"):
            self.submit()
            self.end_badly(self.sick, reason)
        self.assertEqual(self.status(self.sick), "available")

    def test_a_failure_without_a_reason_is_not_judged(self) -> None:
        for _ in range(4):
            self.submit()
            job = self.claim(self.sick)
            assert job is not None
            self.report(job, self.sick, "failed")
        self.assertEqual(self.status(self.sick), "available")

    def test_slow_failures_say_nothing_of_a_node(self) -> None:
        for _ in range(4):
            self.submit()
            job = self.claim(self.sick)
            assert job is not None
            self.turn(ffdist.FAST_FAILURE_S + 1)
            self.report(job, self.sick, "failed", failure_reason="killed", error="killed")
        self.assertEqual(self.status(self.sick), "available")

    def test_a_job_that_fails_alike_elsewhere_is_to_blame_itself(self) -> None:
        for _ in range(4):
            self.submit()
            self.end_badly(self.sick)
            self.turn(5)
            self.end_badly(self.well)
            self.turn(5)
        self.assertEqual(
            (self.status(self.sick), self.status(self.well)), ("available", "available")
        )

    def test_the_network_is_a_nodes_own_only_where_the_job_was_completed_elsewhere(self) -> None:
        for _ in range(4):  # their host is down, and nobody else has a slot to find that out
            self.submit(max_retries=0)
            self.end_badly(self.sick, "network")
        self.assertEqual(self.status(self.sick), "available")
        for _ in range(3):
            self.submit()
            self.end_badly(self.sick, "network")
            self.turn(5)
            job = self.claim(self.well)
            assert job is not None
            self.report(job, self.well)
        self.assertEqual(
            (self.status(self.sick), self.status(self.well)), ("quarantined", "available")
        )
        reason = self.master.queries.node(self.sick)["quarantine"]["reason"]
        self.assertIn("(network): ffmpeg: network", reason)

    def test_an_old_failure_of_the_network_is_not_counted_again(self) -> None:
        job = self.submit()
        self.end_badly(self.sick, "network")
        self.turn(5)
        for _ in range(4):
            taken = self.claim(self.well)
            assert taken is not None
            self.report(taken, self.well)
            self.master.order(job.id, "retry")
        self.assertEqual(self.status(self.sick), "available")

    def test_where_most_nodes_fail_alike_none_is_taken_out(self) -> None:
        third = self.node("third")
        for node_id in (self.sick, self.well, third) * 4:
            self.submit(max_retries=0)
            self.end_badly(node_id, "network")
        self.assertEqual({self.status(one) for one in (self.sick, self.well, third)}, {"available"})

    def trial(self, node_id: str) -> Job:
        """Return the job that tries whether a node in quarantine is well again, as soon as there is
        one."""
        for _ in range(1300):
            job = self.claim(node_id)
            if job is not None:
                return job
            self.turn(1)
        self.fail("no job tried the node")


    def test_one_real_job_tries_a_node_after_a_pause_and_its_success_closes_the_circuit(
        self,
    ) -> None:
        self.make_sick()
        for _ in range(3):
            self.submit()
        self.assertIsNone(self.claim(self.sick))
        self.turn(ffdist.TRIAL_FIRST_S + 1)
        trial = self.claim(self.sick)
        assert trial is not None
        self.assertIsNone(self.claim(self.sick), "one job tries it, not two")
        self.assertEqual(self.status(self.sick), "quarantined")
        self.report(trial, self.sick, metrics={"duration": 1})
        self.assertEqual(
            (self.status(self.sick), self.master.queries.node(self.sick)["quarantine"]),
            ("available", None),
        )
        self.assertEqual(self.master.queries.job(trial.id)["status"], "completed")
        self.assertIsNotNone(self.claim(self.sick))

    def test_a_trial_that_fails_is_not_charged_to_the_job_and_doubles_the_pause(self) -> None:
        self.make_sick()
        pauses = []
        for _ in range(8):
            job = self.submit(max_retries=0)
            while (taken := self.claim(self.well)) is not None and taken.id != job.id:
                self.report(taken, self.well)  # what is older
            if taken is not None:
                self.report(taken, self.well, "returned")
            began = self.now
            while (trial := self.claim(self.sick)) is None:
                self.turn(1)
            pauses.append(self.now - began)
            self.report(
                trial, self.sick, "failed", failure_reason="out_of_disk", error="still full"
            )
            shown = self.master.queries.job(job.id)
            self.assertEqual((shown["status"], shown["retry_count"]), ("pending", 0))
            while (taken := self.claim(self.well)) is not None:
                self.report(taken, self.well)
            self.assertEqual(self.master.queries.job(job.id)["status"], "completed")
        self.assertEqual(pauses, sorted(pauses))
        self.assertAlmostEqual(pauses[0], 10, delta=1)
        self.assertAlmostEqual(pauses[3], 80, delta=1)
        self.assertAlmostEqual(pauses[-1], ffdist.MAX_TRIAL_S, delta=1)
        self.assertRegex(self.master.queries.node(self.sick)["quarantine"]["reason"],
                         r"job .* failed \(out_of_disk\): still full")

    def test_a_job_that_fails_everywhere_is_excused_once_by_each_node(self) -> None:
        self.make_sick()
        for job in self.master.journal.reader.live_jobs():
            self.master.order(job.id, "cancel")
        self.master.drain(self.well, None)
        job = self.submit(max_retries=0)
        for expected in ("pending", "failed"):
            trial = self.trial(self.sick)
            self.assertEqual(trial.id, job.id)
            self.report(trial, self.sick, "failed", failure_reason="killed", error="again")
            self.assertEqual(self.master.queries.job(job.id)["status"], expected)

    def test_a_trial_that_says_nothing_of_the_node_is_followed_by_another(self) -> None:
        self.make_sick()
        for reason in ("input", "parameters"):
            self.submit()
            trial = self.trial(self.sick)
            self.report(trial, self.sick, "failed", failure_reason=reason, error="no such file")
            self.assertEqual(self.status(self.sick), "quarantined")
            self.submit()
            self.assertIsNotNone(self.end_badly(self.sick, "input"), "at once")

    def test_a_trial_that_fails_by_the_network_is_not_charged_either(self) -> None:
        self.make_sick()
        job = self.submit(max_retries=0)
        trial = self.trial(self.sick)
        self.assertEqual(trial.id, job.id)
        self.report(trial, self.sick, "failed", failure_reason="network", error="no route")
        self.assertEqual(self.master.queries.job(job.id)["status"], "pending")
        quarantine = self.master.queries.node(self.sick)["quarantine"]
        self.assertEqual(quarantine["trials_failed"], 1)

    def test_a_paused_trial_lets_another_job_try(self) -> None:
        self.make_sick()
        self.submit()
        paused = self.trial(self.sick)
        self.master.order(paused.id, "pause")
        self.submit()
        self.assertIsNotNone(self.claim(self.sick))

    def test_one_failure_elsewhere_does_not_excuse_a_node_that_fails_always(self) -> None:
        self.submit(max_retries=0)
        self.end_badly(self.well, "out_of_disk")
        for _ in range(3):
            self.submit(max_retries=0)
            self.end_badly(self.sick, "out_of_disk")
        self.assertEqual((self.status(self.sick), self.status(self.well)),
                         ("quarantined", "available"))

    def test_failures_in_a_row_survive_a_restart_of_the_master(self) -> None:
        for number in range(3):
            self.submit()
            self.end_badly(self.sick, "out_of_disk")
            if number < 2:
                self.restart()
        self.assertEqual(self.status(self.sick), "quarantined")

    def test_quarantine_and_its_trial_survive_a_restart_of_the_master(self) -> None:
        self.make_sick()
        self.submit()
        self.submit()
        self.restart()
        self.assertEqual(self.status(self.sick), "quarantined")
        self.turn(ffdist.TRIAL_FIRST_S + 1)
        self.restart()
        self.turn(1)
        trial = self.claim(self.sick)
        assert trial is not None
        self.restart()
        self.assertIsNone(self.claim(self.sick), "one job tries it")
        self.report(trial, self.sick)
        self.assertEqual(self.status(self.sick), "available")

    def test_a_lost_trial_is_followed_by_another(self) -> None:
        self.make_sick()
        self.submit()
        trial = self.trial(self.sick)
        for _ in range(95):
            self.now += 1
            self.master.reap()
        self.assertEqual(self.status(self.sick), "offline")
        self.turn(60)
        self.assertEqual(self.status(self.sick), "quarantined")
        self.submit()
        again = self.trial(self.sick)
        self.assertNotEqual((again.id, again.attempt), (trial.id, trial.attempt))

    def test_a_person_lets_a_node_out(self) -> None:
        self.make_sick()
        self.submit()
        self.assertEqual(self.master.resume_node(self.sick)["status"], "available")
        self.assertIsNotNone(self.claim(self.sick))

    def test_a_node_that_was_restarted_is_tried_at_once(self) -> None:
        self.make_sick()
        self.submit()
        self.node("sick", session="session of sick, again")
        self.assertEqual(self.status(self.sick), "quarantined")
        self.assertIsNotNone(self.claim(self.sick))
        self.assertIsNone(self.claim(self.sick))

    def test_a_parked_node_is_woken_when_its_pause_ends(self) -> None:
        self.make_sick()
        while (job := self.claim(self.well)) is not None:
            self.report(job, self.well)
        self.master.drain(self.well, None)
        self.submit()
        waiting = Asking(
            self.master,
            Ask(self.sick, self.sessions[self.sick], 60.0, 0, "parked", False),
        )
        self.turn_without_beats(ffdist.TRIAL_FIRST_S + 2)
        self.assertIn("job", waiting.answer() or {})

    def test_it_can_be_turned_off(self) -> None:
        self.settings = Settings(quarantine_after=0)
        self.restart()
        for _ in range(5):
            self.submit()
            self.end_badly(self.sick)
        self.assertEqual(self.status(self.sick), "available")


class TestBlame(unittest.TestCase):
    """The pure judgement: whose fault was it?"""

    def job(self, *ends: tuple[str, str], **settings: Any) -> Job:
        job = Job(
            1,
            str(uuid.uuid4()),
            "a",
            draft_of({"scenario": "a", "parameters": settings}, 3).spec,
            1.0,
        )
        for node_id, reason in ends:
            job = ffdist.advance(job, "claim", 2.0, node_id)
            job = ffdist.advance(
                job, "requeue", 3.0, reason=reason, error=reason, reported="failed"
            )
        return ffdist.advance(job, "claim", 4.0, "here")

    def test_a_failure_of_its_own_blames_the_node(self) -> None:
        self.assertTrue(blames_node(self.job(), "here", "killed"))
        self.assertTrue(blames_node(self.job(("other", "network")), "here", "killed"))

    def test_the_jobs_own_reasons_and_those_met_elsewhere_do_not(self) -> None:
        for reason in ("input", "parameters"):
            self.assertFalse(blames_node(self.job(), "here", reason))
        self.assertFalse(blames_node(self.job(("other", "killed")), "here", "killed"))

    def test_a_job_that_failed_on_many_nodes_blames_none(self) -> None:
        self.assertFalse(
            blames_node(self.job(("a", "network"), ("b", "stalled")), "here", "killed")
        )

    def test_an_encoder_or_a_limit_that_the_job_named_is_the_jobs_choice(self) -> None:
        self.assertTrue(blames_node(self.job(), "here", "no_capability"))
        self.assertFalse(blames_node(self.job(encoder="h264_nvenc"), "here", "no_capability"))
        self.assertTrue(blames_node(self.job(), "here", "out_of_memory"))
        self.assertFalse(blames_node(self.job(max_memory_mb=64), "here", "out_of_memory"))

    def test_what_the_job_chose_itself_is_not_tried_again(self) -> None:
        for settings, event in (({}, "requeue"), ({"max_memory_mb": 64}, "fail")):
            job = self.job(**settings)
            self.assertEqual(ffdist.event_of_report(job, "failed", "out_of_memory", True), event)
        job = self.job(encoder="h264_nvenc")
        self.assertEqual([ffdist.event_of_report(job, "failed", "no_capability", elsewhere)
                          for elsewhere in (True, False)], ["requeue", "fail"])

    def test_backoff_doubles_up_to_its_limit(self) -> None:
        settings = Settings(retry_delay_s=2.0, retry_delay_most_s=60.0)
        self.assertEqual(
            [backoff_most_s(count, settings) for count in range(7)], [2, 4, 8, 16, 32, 60, 60]
        )
        self.assertEqual(backoff_most_s(10**6, settings), 60)


class TestElsewhere(Fleet):
    def test_a_lack_that_another_node_may_not_have_is_tried_there_and_then_no_more(self) -> None:
        job = self.submit(parameters={"encoder": "h264_nvenc"})
        self.end_badly(self.sick, "no_capability")
        self.assertEqual(self.master.queries.job(job.id)["status"], "pending")
        self.turn(2)
        self.assertIsNone(self.claim(self.sick))
        self.end_badly(self.well, "no_capability")
        shown = self.master.queries.job(job.id)
        self.assertEqual((shown["status"], shown["failure_reason"]), ("failed", "no_capability"))
        self.assertEqual([record["error"] for record in shown["attempts"]],
                         ["ffmpeg: no_capability"] * 2)


class TestDrainDeadline(Fleet):
    def test_what_runs_past_the_deadline_is_asked_back(self) -> None:
        job = self.submit()
        taken = self.claim(self.sick)
        assert taken is not None
        self.assertEqual(self.master.drain(self.sick, 5.0)["status"], "draining")
        self.turn(4)
        self.assertNotIn("actions", self.ask(self.sick))
        self.turn(2)
        answer = self.ask(self.sick)
        self.assertEqual(answer["actions"], [{"job_id": job.id, "attempt": 1, "action": "return"}])
        self.assertIn(
            "actions", self.ask(self.sick, seen=answer["orders"]), "it stands until it is obeyed"
        )
        self.report(taken, self.sick, "returned")
        shown = self.master.queries.job(job.id)
        self.assertEqual((shown["status"], shown["retry_count"]), ("pending", 0))
        self.assertIsNone(self.claim(self.sick))

    def test_a_cancel_goes_before_and_a_restart_keeps_the_deadline(self) -> None:
        job = self.submit()
        self.claim(self.sick)
        self.master.drain(self.sick, 5.0)
        self.restart()
        self.turn(7)
        self.assertEqual(self.ask(self.sick)["actions"][0]["action"], "return")
        self.master.order(job.id, "cancel")
        self.assertEqual(self.ask(self.sick)["actions"][0]["action"], "cancel")

    def test_a_node_that_works_again_has_no_deadline(self) -> None:
        self.submit()
        self.claim(self.sick)
        self.master.drain(self.sick, 5.0)
        self.assertIsNone(self.master.resume_node(self.sick)["drain_deadline"])
        self.turn(7)
        self.assertNotIn("actions", self.ask(self.sick))

    def test_without_a_deadline_it_finishes_what_runs(self) -> None:
        self.submit()
        self.claim(self.sick)
        self.master.drain(self.sick, None)
        self.turn(500)
        self.assertNotIn("actions", self.ask(self.sick))


class TestPinned(Fleet):
    def test_a_pinned_job_runs_on_its_node_alone_and_blocks_nobody(self) -> None:
        pinned, free = self.submit(node="well"), self.submit()
        self.assertEqual(getattr(self.claim(self.sick), "id", None), free.id)
        self.assertIsNone(self.claim(self.sick))
        self.assertEqual(getattr(self.claim(self.well), "id", None), pinned.id)

    def test_it_is_tried_again_on_its_node_where_it_failed(self) -> None:
        pinned = self.submit(node=self.well)
        self.end_badly(self.well)
        self.turn(3)
        self.assertIsNone(self.claim(self.sick))
        self.assertEqual(getattr(self.claim(self.well), "id", None), pinned.id)

    def test_an_unknown_node_is_refused_and_nothing_is_accepted(self) -> None:
        drafts = [draft_of({"scenario": "a"}, 3), draft_of({"scenario": "a", "node": "nowhere"}, 3)]
        with self.assertRaises(ApiError) as caught:
            self.master.submit(drafts)
        self.assertEqual((caught.exception.status, caught.exception.field), (400, "node"))
        self.assertEqual(self.master.queries.jobs({}, None, 10).total, 0)

    def test_a_restart_keeps_the_pin(self) -> None:
        self.submit(node="well")
        self.restart()
        self.assertIsNone(self.claim(self.sick))
        self.assertIsNotNone(self.claim(self.well))


if __name__ == "__main__":
    unittest.main()
