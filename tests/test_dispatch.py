"""The rules of the fleet, without a master: lanes, exclusive jobs, jobs after jobs, thousands of
events.

Fleet has no clock, lock or disk, so a test is a list of events and what must be true after each.
The same over HTTP and on disk: TestOverHttp here, test_model, test_journal.
"""
from __future__ import annotations

import json
import os
import random
import unittest
import uuid
from typing import Any

import ffdist
from agent import ApiError
from ffdist import Fleet, Job, Moment, draft_of
from tests.fleet import Case
from tests.test_api import Node

SEED = int(os.environ.get("FFDIST_TEST_SEED", "20251229"))


class Rows:
    """The rows of a journal in memory: what the writes of a fleet leave behind."""

    def __init__(self) -> None:
        self.jobs: dict[int, list[Any]] = {}
        self.nodes: dict[str, str] = {}
        self.claims: dict[str, str] = {}
        self.owners: dict[str, str] = {}
        self.totals: dict[Any, int] = {}
        self.results: dict[int, str] = {}

    def take(self, writes: list[ffdist.Write]) -> None:
        for kind, values in writes:
            if kind == "job":
                seq, job_id, status, scenario, _, spec, state = values
                self.jobs[seq] = [job_id, scenario, spec, status, state]
            elif kind == "state":
                self.jobs[values[4]][3:] = [values[0], values[2]]
            elif kind == "node":
                self.nodes[values[0]] = values[1]
            elif kind == "forget":
                self.nodes.pop(values[0], None)
            elif kind == "claims":
                self.claims[values[0]] = values[1]
            elif kind == "owner":
                self.owners[values[0]] = values[1]
            elif kind == "result":
                self.results[values[0]] = values[4]
            elif kind == "total":
                self.totals[values[0]] = values[1]

    def stored(self) -> ffdist.Stored:
        """Return what a master would read of them at its start."""
        live = [ffdist.job_of_row((seq, job_id, scenario, spec, state))
                for seq, (job_id, scenario, spec, status, state) in sorted(self.jobs.items())
                if status in ("blocked", "pending", "running", "paused")]
        nodes = [(node_id, json.loads(record), json.loads(self.claims.get(node_id, "[]")))
                 for node_id, record in self.nodes.items()]
        totals = {key: count for key, count in self.totals.items() if count}
        return ffdist.Stored(nodes, dict(self.owners), max(self.jobs, default=0),
                             max(self.results, default=0), totals, live, {})


class Alone(unittest.TestCase):
    """A fleet and the rows of its journal; time is a number that the test moves."""

    def setUp(self) -> None:
        self.now = 1000.0
        self.rows = Rows()
        self.fleet = Fleet(ffdist.Settings(), dict.fromkeys(ffdist.COUNTS, 0), lambda: 0.0)
        self.words = 0
        self.notes: list[str] = []

    def moment(self) -> Moment:
        return Moment(self.now, self.now + 1e9)

    def apply(self, event: Any) -> Any:
        outcome = self.fleet.apply(event, self.moment())
        self.rows.take(outcome.effects.writes)
        self.wakes = outcome.effects.wakes
        self.notes += [note.message % note.values for note in outcome.effects.notes]
        if outcome.error is not None:
            raise outcome.error
        return outcome.answer

    def node(self, name: str, slots: int = 1) -> str:
        checked = ffdist.registration_of({"address": name, "max_concurrent_jobs": slots})
        self.apply(ffdist.Registered(checked._replace(id=name), "unused"))
        return name

    def submit(self, *bodies: dict[str, Any], **body: Any) -> list[Job]:
        drafts = [draft_of({"scenario": "720p", **one}, 3) for one in bodies or (body,)]
        named = [draft if draft.id else draft._replace(id=str(uuid.uuid4())) for draft in drafts]
        fresh = {draft.id for draft in named} - {draft.id for draft in drafts}
        event = ffdist.Submitted(named, fresh, {}, {})
        accepted = self.apply(event)
        if accepted.unresolved:  # the journal knows them, or not
            status_of = {row[0]: row[3] for row in self.rows.jobs.values()}
            event = event._replace(
                archived=dict.fromkeys(accepted.unresolved),
                statuses={one: status_of.get(one) for one in accepted.unresolved},
            )
            accepted = self.apply(event)
        return list(accepted.jobs)

    def ask(self, node: str, *, wait: bool = False) -> ffdist.Reply:
        self.words += 1
        asked = ffdist.Asked(node, None, 0, f"word {self.words}", False, True)
        reply: ffdist.Reply = self.apply(ffdist.Arrived(asked, wait))
        self.asked = asked
        return reply

    def claim(self, node: str) -> Job | None:
        job: Job | None = self.ask(node).answer.get("job")
        return job

    def claimed(self, node: str) -> str | None:
        job = self.claim(node)
        return None if job is None else job.id

    def end(self, job: Job, node: str, status: str = "completed", **more: Any) -> None:
        body = {"node_id": node, "attempt": job.attempt, "status": status, **more}
        self.assertTrue(self.apply(ffdist.Finished(job.id, ffdist.report_of(body), body)))

    def status(self, job: Job) -> str:
        return str(self.rows.jobs[job.seq][3])

    def last(self, job: Job) -> Job:
        return ffdist.job_of_row(
            (job.seq, job.id, job.scenario, job.spec, self.rows.jobs[job.seq][4])
        )


DAY_S = 24 * 3600.0
HOUR_S = 3600.0


class TestStrangers(Alone):
    """A node that never ran a job is forgotten after a day offline; one that did stays."""

    def pass_s(self, seconds: float) -> None:
        """Let time pass in steps of an hour at most, as the timer of a master does."""
        while seconds > 0:
            self.now += min(seconds, HOUR_S)
            seconds -= HOUR_S
            self.apply(ffdist.Ticked(0.0))

    def restart(self, down_s: float = 0.0) -> None:
        """Go on with another fleet, made of the journal's rows; its monotonic clock is another."""
        self.now += down_s
        self.fleet = Fleet(ffdist.Settings(), dict.fromkeys(ffdist.COUNTS, 0), lambda: 0.0)
        self.fleet.load(self.rows.stored(), self.moment())

    def run_one(self, node: str) -> None:
        self.submit()
        job = self.claim(node)
        assert job is not None
        self.end(job, node)

    def known(self) -> set[str]:
        self.assertEqual(set(self.fleet.state.nodes), set(self.rows.nodes))
        return set(self.rows.nodes)

    def test_it_is_forgotten_and_the_log_says_so(self) -> None:
        self.node("idle")
        self.run_one(self.node("worker"))
        self.pass_s(100)
        self.assertTrue(self.fleet.state.nodes["idle"].offline)
        self.pass_s(DAY_S - 1)
        self.assertEqual(self.known(), {"idle", "worker"})
        self.pass_s(2)
        self.assertEqual(self.known(), {"worker"})
        self.assertIn("node idle (idle) is forgotten: it never ran a job and was offline for 24 h",
                      self.notes)
        self.pass_s(30 * DAY_S)
        self.assertEqual(self.known(), {"worker"})

    def test_a_job_that_ends_as_lost_is_one_that_ran(self) -> None:
        self.node("worker")
        self.submit()
        self.claim("worker")
        self.pass_s(2 * DAY_S)
        self.assertEqual(self.known(), {"worker"})

    def test_a_node_that_has_left_is_offline_too(self) -> None:
        self.node("idle")
        asked = ffdist.Asked("idle", None, 0, None, leaving=True, for_work=False)
        self.apply(ffdist.Arrived(asked, may_wait=False))
        self.pass_s(DAY_S + 1)
        self.assertEqual(self.known(), set())

    def test_a_sign_of_life_begins_the_day_anew(self) -> None:
        self.node("idle")
        self.pass_s(DAY_S - HOUR_S)
        self.assertIsNone(self.claim("idle"))
        self.pass_s(DAY_S - HOUR_S)
        self.assertEqual(self.known(), {"idle"})
        self.pass_s(2 * HOUR_S)
        self.assertEqual(self.known(), set())

    def test_a_restart_keeps_who_ran_a_job_and_since_when_a_node_is_offline(self) -> None:
        self.node("idle")
        self.run_one(self.node("worker"))
        self.pass_s(100)
        for _ in range(6):
            self.pass_s(4 * HOUR_S - 10)
            self.restart()
        self.assertEqual(self.known(), {"idle", "worker"})
        self.pass_s(2 * HOUR_S)
        self.assertEqual(self.known(), {"worker"})

    def test_who_ran_a_job_is_known_when_all_of_it_has_expired(self) -> None:
        self.run_one(self.node("worker"))
        self.rows.totals.clear()
        self.rows.claims.clear()
        self.restart()
        self.pass_s(2 * DAY_S)
        self.assertEqual(self.known(), {"worker"})

    def test_of_a_node_of_format_4_its_claims_and_jobs_tell_whether_it_ran_one(self) -> None:
        for name in ("idle", "claims", "jobs"):
            self.node(name)
        self.pass_s(100)
        for name in self.rows.nodes:
            record = json.loads(self.rows.nodes[name])
            del record["has_run"], record["offline_at"]
            self.rows.nodes[name] = json.dumps({**record, "offline": True})
        self.rows.claims["claims"] = '["a word"]'
        self.rows.totals["jobs", "failed", "a", "jobs"] = 1
        self.restart()
        self.pass_s(DAY_S)
        self.assertEqual(self.known(), {"claims", "jobs"})

    def test_after_a_start_a_node_has_an_hour_to_come_back(self) -> None:
        self.node("idle")
        self.pass_s(100)
        self.restart(down_s=3 * DAY_S)
        self.pass_s(HOUR_S - 10)
        self.assertEqual(self.known(), {"idle"})
        self.pass_s(20)
        self.assertEqual(self.known(), set())

    def test_a_drained_node_stays_for_that_is_an_order(self) -> None:
        self.node("idle")
        self.apply(ffdist.NodeOrder("drain", "idle"))
        self.pass_s(2 * DAY_S)
        self.assertEqual(self.known(), {"idle"})

    def test_a_forgotten_node_that_ran_jobs_and_comes_back_stays(self) -> None:
        self.run_one(self.node("worker"))
        self.apply(ffdist.NodeOrder("forget", "worker"))
        self.assertEqual(self.known(), set())
        self.node("worker")
        self.pass_s(2 * DAY_S)
        self.assertEqual(self.known(), {"worker"})

    def test_a_large_fleet_goes_in_parts(self) -> None:
        for number in range(ffdist.MAX_STRANGERS + 1):
            self.node(f"idle {number}")
        self.pass_s(100)
        self.now += DAY_S
        self.apply(ffdist.Ticked(0.0))
        self.assertEqual(len(self.known()), 1)
        self.apply(ffdist.Ticked(0.0))
        self.assertEqual(self.known(), set())


class TestAfter(Alone):
    """Jobs that wait for jobs."""

    def test_a_job_is_blocked_until_all_have_ended_however_they_did(self) -> None:
        node = self.node("n")
        ids = [str(uuid.uuid4()) for _ in range(3)]
        good, bad, last = self.submit(
            {"id": ids[0]}, {"id": ids[1]}, {"id": ids[2], "after": ids[:2]}
        )
        self.assertEqual(last.status, "blocked")
        first = self.claim(node)
        assert first is not None
        self.end(first, node)
        self.assertEqual((first.id, self.status(last)), (good.id, "blocked"))
        second = self.claim(node)
        assert second is not None
        self.assertIsNone(self.claim(node), "a blocked job is not handed out")
        self.end(second, node, "failed", failure_reason="input", error="no film")
        self.assertEqual((second.id, self.status(last)), (bad.id, "pending"))
        self.assertEqual(self.claimed(node), last.id)

    def test_after_ok_cancels_what_was_built_on_a_failure_and_says_whose_it_is(self) -> None:
        ids = [str(uuid.uuid4()) for _ in range(4)]
        jobs = self.submit({"id": ids[0]}, {"id": ids[1], "after_ok": [ids[0]]},
                           {"id": ids[2], "after_ok": [ids[1]]}, {"id": ids[3], "after": [ids[2]]})
        self.apply(ffdist.Ordered(jobs[0], "cancel"))
        self.assertEqual([self.status(job) for job in jobs], ["canceled"] * 3 + ["pending"])
        self.assertIn(f"job {ids[0]} is canceled", self.last(jobs[1]).error or "")
        self.assertIn(f"job {ids[1]} is canceled", self.last(jobs[2]).error or "")

    def test_a_job_may_come_after_one_that_has_ended_already(self) -> None:
        node = self.node("n")
        done, failed = self.submit({}, {})
        for status, more in (("completed", {}), ("failed", {"failure_reason": "input"})):
            job = self.claim(node)
            assert job is not None
            self.end(job, node, status, **more)
        self.assertEqual(self.submit(after=[done.id, failed.id])[0].status, "pending")
        self.assertEqual(self.submit(after_ok=[done.id])[0].status, "pending")
        late = self.submit(after_ok=[done.id, failed.id])[0]
        self.assertEqual(late.status, "canceled")
        self.assertIn(failed.id, late.error or "")

    def test_what_is_canceled_as_it_comes_cancels_what_stands_behind_it(self) -> None:
        failed = self.submit()[0]
        self.apply(ffdist.Ordered(failed, "cancel"))
        ids = [str(uuid.uuid4()) for _ in range(3)]
        jobs = self.submit({"id": ids[0], "after_ok": [failed.id]},
                           {"id": ids[1], "after_ok": [ids[0]]}, {"id": ids[2], "after": [ids[1]]})
        self.assertEqual([self.status(job) for job in jobs], ["canceled", "canceled", "pending"])

    def test_unknown_ids_and_later_ones_are_refused_and_nothing_is_accepted(self) -> None:
        ids = [str(uuid.uuid4()) for _ in range(2)]
        for field in ("after", "after_ok"):
            for bodies in (({field: [ids[0]]},),  # nobody knows it
                           ({"id": ids[0], field: [ids[1]]}, {"id": ids[1]}),  # it stands behind
                           ({"id": ids[0], field: [ids[0]]},)):  # itself
                with self.subTest(bodies=bodies), self.assertRaises(ApiError) as caught:
                    self.submit(*bodies)
                self.assertEqual((caught.exception.status, caught.exception.field), (400, field))
                self.assertEqual(self.rows.jobs, {})

    def test_a_long_chain_is_settled_in_one_step(self) -> None:
        ids = [str(uuid.uuid4()) for _ in range(5000)]
        jobs = self.submit(*({"id": one, **({"after_ok": [before]} if before else {})}
                             for before, one in zip(["", *ids], ids)))
        self.apply(ffdist.Ordered(jobs[0], "cancel"))
        self.assertEqual({self.status(job) for job in jobs}, {"canceled"})

    def test_a_blocked_job_can_be_canceled_and_a_canceled_one_retried(self) -> None:
        first = self.submit()[0]
        blocked = self.submit(after=[first.id])[0]
        self.apply(ffdist.Ordered(blocked, "cancel"))
        self.assertEqual(self.status(blocked), "canceled")
        self.apply(ffdist.Ordered(self.last(blocked), "retry"))
        self.assertEqual(self.status(blocked), "blocked", "what it waits for still runs")
        self.apply(ffdist.Ordered(first, "cancel"))
        self.assertEqual(self.status(blocked), "pending")

    def test_a_job_is_retried_after_the_one_that_it_needs(self) -> None:
        first = self.submit()[0]
        second = self.submit(after_ok=[first.id])[0]
        self.apply(ffdist.Ordered(first, "cancel"))
        statuses = {first.id: "canceled"}
        with self.assertRaises(ApiError) as caught:
            self.apply(ffdist.Ordered(self.last(second), "retry", statuses))
        self.assertEqual(caught.exception.status, 409)
        self.assertIn(f"{first.id} to be completed (after_ok), which is canceled",
                      caught.exception.message)
        self.apply(ffdist.Ordered(self.last(first), "retry"))
        self.apply(ffdist.Ordered(self.last(second), "retry", statuses))
        self.assertEqual(self.status(second), "blocked")
        node = self.node("n")
        again = self.claim(node)
        assert again is not None
        self.end(again, node)
        self.assertEqual(self.claimed(node), second.id)

    def test_a_restart_forgets_no_dependency_and_a_lost_job_blocks_nobody(self) -> None:
        first, second = self.submit({}, {})
        blocked = self.submit(after=[first.id, second.id])[0]
        del self.rows.jobs[second.seq]  # a damaged journal lost it
        self.fleet = Fleet(ffdist.Settings(), self.fleet.state.counts, lambda: 0.0)
        self.fleet.load(self.rows.stored(), self.moment())
        self.apply(ffdist.Ticked(0.0))
        self.assertEqual(self.status(blocked), "blocked")
        self.apply(ffdist.Ordered(first, "cancel"))
        self.assertEqual(self.status(blocked), "pending")


class TestExclusive(Alone):
    """Jobs that run alone."""

    def test_nothing_begins_beside_an_exclusive_job(self) -> None:
        node = self.node("n", slots=3)
        alone, other = self.submit({"exclusive": True}, {})
        self.assertEqual(self.claimed(node), alone.id)
        self.assertIsNone(self.claim(node))
        self.end(self.last(alone), node)
        self.assertEqual(self.claimed(node), other.id)

    def test_it_waits_until_the_node_is_empty_and_cannot_starve(self) -> None:
        node = self.node("n", slots=2)
        before = self.submit({}, {})
        alone, after = self.submit({"exclusive": True}, {})
        running = [self.claim(node), self.claim(node)]
        for job in running:
            assert job is not None
            self.assertIn(job.id, [one.id for one in before])
            self.assertIsNone(self.claim(node), "it is the oldest: nothing overtakes it")
            self.end(job, node)
        self.assertEqual(self.claimed(node), alone.id)
        self.end(self.last(alone), node)
        self.assertEqual(self.claimed(node), after.id)

    def test_an_empty_node_takes_it_while_a_busy_one_would_have_to_wait(self) -> None:
        busy, empty = self.node("busy", slots=2), self.node("empty")
        self.submit()
        self.claim(busy)
        alone = self.submit(exclusive=True)[0]
        self.assertIsNone(self.claim(busy))
        self.assertEqual(self.claimed(empty), alone.id)

    def test_a_parked_node_is_woken_when_it_becomes_empty(self) -> None:
        node = self.node("n", slots=2)
        self.submit()
        first = self.claim(node)
        assert first is not None
        waiting = self.ask(node, wait=True)
        assert waiting.serial is not None
        asked = self.asked
        alone = self.submit(exclusive=True)[0]
        self.assertNotIn(node, self.wakes)
        self.end(first, node)
        self.assertIn(node, self.wakes)
        reply = self.apply(ffdist.Looked(asked, waiting.serial, True, True))
        self.assertEqual(reply.answer["job"].id, alone.id)


    def test_younger_jobs_go_on_when_the_exclusive_one_before_them_is_gone(self) -> None:
        for end in ("claim", "cancel", "pause"):
            with self.subTest(end):
                self.setUp()
                busy, empty = self.node("busy", slots=2), self.node("empty")
                self.submit()
                self.claim(busy)
                alone = self.submit(exclusive=True)[0]
                waiting = self.ask(busy, wait=True)
                assert waiting.serial is not None
                asked = self.asked
                younger = self.submit()[0]
                self.assertNotIn(busy, self.wakes, "the older one keeps it from this one")
                if end == "claim":
                    self.assertEqual(self.claimed(empty), alone.id)
                else:
                    self.apply(ffdist.Ordered(alone, end))
                self.assertIn(busy, self.wakes)
                reply = self.apply(ffdist.Looked(asked, waiting.serial, True, True))
                self.assertEqual(reply.answer["job"].id, younger.id)

    def test_a_silent_node_may_still_run_what_it_was_given_up_for(self) -> None:
        for first_is_alone in (True, False):
            with self.subTest(first_is_alone=first_is_alone):
                self.setUp()
                node = self.node("n", slots=2)
                lost = self.submit(exclusive=first_is_alone, max_retries=3)[0]
                self.claim(node)
                other = self.submit(exclusive=not first_is_alone)[0]
                self.now += 100
                self.apply(ffdist.Ticked(0.0))
                self.assertEqual(self.status(lost), "pending")
                self.now += 1
                self.fleet.state.lanes.put_later(self.now + 50, lost.seq)  # its backoff
                self.assertIsNone(self.claim(node))
                report = ffdist.report_of({"node_id": node, "attempt": 1}, progress=True)
                self.assertIsNotNone(self.apply(ffdist.Progressed(lost.id, report)), "taken back")
                self.end(self.last(lost), node)
                self.assertEqual(self.claimed(node), other.id)

    def test_a_burst_wakes_as_many_nodes_as_it_needs(self) -> None:
        nodes = [self.node(f"n{number}") for number in range(5)]
        waiting = {}
        for node in nodes:
            reply = self.ask(node, wait=True)
            waiting[node] = (self.asked, reply.serial)
        self.submit(*({"node": None} for _ in range(5)))
        todo, got = list(self.wakes), 0
        while todo:
            asked, serial = waiting[todo.pop(0)]
            got += "job" in self.apply(ffdist.Looked(asked, serial, True, True)).answer
            todo += [node for node in self.wakes if node not in todo]
        self.assertEqual(got, 5)


    def test_one_tick_is_enough_for_all_nodes_that_may_take_jobs_again(self) -> None:
        nodes = [self.node(name) for name in ("a", "b", "c")]
        spare = self.node("spare")
        self.fleet.state.settings = ffdist.Settings(quarantine_after=0)
        self.submit(*({"max_retries": 10} for _ in nodes))
        for node in nodes:
            for _ in nodes:
                job = self.claim(node)
                assert job is not None
                self.end(job, node, "failed", failure_reason="killed", error="killed")
        waiting = {}
        for node in nodes:
            reply = self.ask(node, wait=True)
            waiting[node] = (self.asked, reply.serial)
        self.assertNotIn(None, [serial for _, serial in waiting.values()], "the spare one is left")
        self.apply(ffdist.NodeOrder("drain", spare))
        self.apply(ffdist.Ticked(0.0))
        todo, got = list(self.wakes), 0
        while todo:
            asked, serial = waiting[todo.pop(0)]
            got += "job" in self.apply(ffdist.Looked(asked, serial, True, True)).answer
            todo += self.wakes
        self.assertEqual(got, 3)


class TestWalk(Alone):
    """Random events, thousands a second: what must hold after each, and a rebuild that equals the
    state."""

    EVENTS = 20_000

    def view(self, state: ffdist.State) -> dict[str, Any]:
        jobs = {seq: job.state_json() for seq, job in state.jobs.items()}
        return {"jobs": jobs, "totals": state.totals.counts,
                "last": (state.last_job, state.last_result),
                "leases": {node.id: sorted(node.leases) for node in state.nodes.values()},
                "claims": {node.id: list(node.claims) for node in state.nodes.values()},
                "lines": sorted(state.jobs[seq].seq for seq in state.jobs
                                if state.jobs[seq].state == "blocked")}

    def check(self) -> None:
        state = self.fleet.state
        leased = [seq for node in state.nodes.values() for seq in node.leases]
        self.assertEqual(len(leased), len(set(leased)), "one lease a job")
        self.assertEqual(sorted(leased), sorted(state.leases))
        for node in state.nodes.values():
            alone = [seq for seq in node.leases if state.jobs[seq].exclusive]
            self.assertTrue(not alone or len(node.leases) == 1, "an exclusive job runs alone")
        for job in state.jobs.values():
            self.assertEqual(job.state == "blocked", bool(job.after or job.after_ok), job)
            self.assertEqual(job.state == "blocked", job.seq in state.blockers, job)

    def rebuilt(self) -> Fleet:
        again = Fleet(ffdist.Settings(), dict.fromkeys(ffdist.COUNTS, 0), lambda: 0.0)
        stored = self.rows.stored()
        again.load(stored._replace(live_jobs=list(stored.live_jobs)), self.moment())
        return again

    def step(self, chance: random.Random, nodes: list[str]) -> None:
        state = self.fleet.state
        node = chance.choice(nodes)
        kind = chance.choice(
            ("submit", "submit", "claim", "claim", "claim", "end", "end", "order", "tick")
        )
        if kind == "submit" and len(state.jobs) < 60:
            live = [job.id for job in state.jobs.values()]
            after = chance.sample(live, min(len(live), chance.choice((0, 0, 1, 3))))
            field = chance.choice(("after", "after_ok"))
            self.submit(**{field: after}, exclusive=chance.random() < 0.2,
                        **({"node": node} if chance.random() < 0.1 else {}))
        elif kind == "claim" and len(state.nodes[node].leases) < 3:
            self.claim(node)
        elif kind == "end" and state.nodes[node].leases:
            job = state.jobs[chance.choice(sorted(state.nodes[node].leases))]
            status = chance.choice(("completed", "completed", "failed", "returned", "canceled"))
            reason = (
                chance.choice(("input", "killed", "network", None)) if status == "failed" else None
            )
            self.end(job, node, status, failure_reason=reason)
        elif kind == "order" and state.jobs:
            job = chance.choice(list(state.jobs.values()))
            try:
                self.apply(ffdist.Ordered(job, chance.choice(("cancel", "pause", "resume"))))
            except ApiError as error:
                self.assertEqual(error.status, 409)
        elif kind == "tick":
            self.now += chance.choice((1, 5, 40))
            for one in nodes:
                if chance.random() < 0.8:
                    asked = ffdist.Asked(one, None, 0, None, False, False)
                    self.apply(ffdist.Arrived(asked, False))
            self.apply(ffdist.Ticked(0.0))

    def test_every_promise_holds_after_every_event(self) -> None:
        chance = random.Random(SEED)
        nodes = [self.node(name, slots=3) for name in ("a", "b", "c")]
        for number in range(self.EVENTS):
            self.step(chance, nodes)
            self.check()
            if number % 500 == 0:
                self.assertEqual(self.view(self.rebuilt().state), self.view(self.fleet.state),
                                 f"seed {SEED}, event {number}")
        for _ in range(400):  # nothing is lost and nothing starves: all jobs come to an end
            self.now += 700
            for node in nodes:
                for seq in sorted(self.fleet.state.nodes[node].leases):
                    job = self.fleet.state.jobs[seq]
                    if job.state == "stopped":
                        self.apply(ffdist.Ordered(job, "resume"))
                    self.end(self.fleet.state.jobs[seq], node)
                while self.claim(node) is not None:
                    pass
            self.apply(ffdist.Ticked(700.0))
            for job in list(self.fleet.state.jobs.values()):
                if job.state == "paused":
                    self.apply(ffdist.Ordered(job, "resume"))
        self.assertEqual(self.fleet.state.jobs, {}, f"seed {SEED}")


class TestOverHttp(Case):
    """The same over a socket, with a journal."""

    def test_an_array_with_its_order_and_a_kill(self) -> None:
        master = self.master()
        node = Node(master, "worker", max_concurrent_jobs=2)
        ids = [str(uuid.uuid4()) for _ in range(3)]
        array = [{"scenario": "a", "id": ids[0], "exclusive": True},
                 {"scenario": "a", "id": ids[1], "after_ok": [ids[0]], "exclusive": True},
                 {"scenario": "a", "id": ids[2], "after": [ids[1]]}]
        self.assertEqual(master.call("POST", "/jobs", array).status, 201)
        self.assertEqual(master.call("POST", "/jobs", array).status, 200, "it is safe to repeat")
        first = node.claim().body["job"]
        self.assertEqual((first["id"], first["exclusive"]), (ids[0], True))
        master.kill()
        node.master = master = self.master(port=master.port)
        self.assertIsNone(node.claim().body["job"])
        self.assertEqual(master.get("/jobs?status=blocked")["total"], 2)
        self.assertEqual(
            master.get(f"/jobs/{ids[1]}")["waiting_for"], f"the end of job {ids[0][:8]}"
        )
        node.report(first)
        self.assertEqual(node.claim().body["job"]["id"], ids[1])
        master.call("POST", f"/jobs/{ids[1]}/cancel")
        self.assertEqual(master.get(f"/jobs/{ids[2]}")["status"], "blocked", "it has not ended yet")
        self.assertEqual(master.get(f"/jobs/{ids[2]}")["after"], [ids[1]])

    def test_ids_are_looked_up_in_the_journal(self) -> None:
        master = self.master()
        node = Node(master)
        done = master.submit("a")
        node.report(node.claim().body["job"])
        answer = master.call("POST", "/jobs", {"scenario": "a", "after_ok": [done["id"]]})
        self.assertEqual((answer.status, answer.body["status"]), (201, "pending"))
        for field, value in (
            ("after", [str(uuid.uuid4())]),
            ("after", ["abcd"]),
            ("after_ok", "x"),
            ("after", [done["id"]] * 1001),
            ("exclusive", 1),
            ("exclusive", "yes"),
        ):
            answer = master.call("POST", "/jobs", {"scenario": "a", field: value})
            self.assertEqual((answer.status, answer.body["field"]), (400, field), value)
        self.assertEqual(master.get("/jobs")["total"], 2)

    def test_an_array_may_repeat_a_job_that_has_ended_and_build_on_it(self) -> None:
        master = self.master()
        node = Node(master)
        first = {"scenario": "a", "id": str(uuid.uuid4())}
        master.call("POST", "/jobs", [first])
        node.report(node.claim().body["job"])
        array = [first, {"scenario": "a", "after_ok": [first["id"]]}]
        answer = master.call("POST", "/jobs", array)
        self.assertEqual(answer.status, 201, answer.body)
        self.assertEqual([job["status"] for job in answer.body["jobs"]], ["completed", "pending"])


if __name__ == "__main__":
    unittest.main()
