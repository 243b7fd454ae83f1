"""What master and agent promise each other, one rule a test, on real processes and a bad network.

Each rule between agent and master, and where it is proved. Names without a
module stand here; A is test_api, J test_journal, E test_end_to_end, C test_chaos.

  one session       OneSession; every request of an older one: A.TestSessions
  one state folder  E.Starting.test_a_second_agent_on_the_same_state_folder_is_refused
  judging           A.TestSessions.test_the_first_registration…, …a_repeated_registration…;
                    OneSession.test_a_registration_whose_answer_was_lost…
  same node         E.Kills.test_a_killed_agent_leaves_no_orphan…;
                    A.TestSessions.test_a_restarted_agent…
  parked request    A.TestClaims, A.TestOrders
  claim repeated    LostMessages, Repeated; A.TestClaims.test_the_same_claim_word…;
                    J.TestKill (restart)
  orders            Orders; `seen`: A.TestOrders.test_an_order_persists_until_obeyed…
  reports           LostMessages; A.TestReports (returned, repeats, another status, late ones)
  submissions       Repeated.test_a_submission…; A.TestSubmissions, J.TestKill
  leaving, drain    Leaving; A.TestOrders.test_a_leaving_node…;
                    E.Kills.test_an_agent_that_is_told_to_stop…
  silence           Silence; A.TestSilence; J.TestKill.test_silence_counts_only…
  backoff           Silence.test_a_backoff_goes_on_after_a_restart
  before the commit J.TestFullDisk; FullDisk
  seed's agents     A.TestReports, A.TestSilence; E.TheSeedsMaster
  prefix ids        A.TestSubmissions.test_a_job_is_found_by_a_prefix…
  1 durable         J.TestKill, J.TestFullDisk    2 one lease     NodesGivenUp, A.TestSilence
  3 nothing lost    LostMessages, C               4 nothing left  NodesGivenUp, E.Kills, C
  5 no work lost    Silence, E.Kills              6, 7            test_agent, test_hwdetect; bench
"""
from __future__ import annotations

import http.client
import itertools
import os
import shutil
import signal
import threading
import time
import unittest
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import agent as wire
from tests.fleet import Agent, FleetCase, Master, Node, OneFleet, processes_under
from tests.proxy import BEFORE, Message, Once, Proxy, passing
from tests.support import call, need, small_disk, wait_for

CLAIM, BEAT = r"GET /jobs/next\?", r"POST /nodes/[^/]+/heartbeat"
PROGRESS, RESULT, REGISTER = (
    r"POST /jobs/[^/]+/progress",
    r"POST /results ",
    r"POST /nodes/register ",
)
SHORT = {"width": 64, "height": 36, "fps": 25, "duration": 0.4, "preset": "ultrafast"}


def has_job(answer: Any) -> Any:
    return answer.get("job")


def has_actions(answer: Any) -> Any:
    return answer.get("actions")


class BadNetwork(FleetCase):
    """A master, and agents that reach it only through a proxy."""

    def proxied(self, master: Master, rule: Any = None) -> Proxy:
        need("ffmpeg", "ffprobe")
        proxy = Proxy(master.port)
        self.addCleanup(proxy.end)
        if rule is not None:
            proxy.rule = rule
        return proxy

    def worker(self, proxy: Proxy, *flags: str, **more: Any) -> Agent:
        agent = Agent(self.folder, proxy.url, *flags, **more)
        self.addCleanup(agent.end)
        return agent

    def network(
        self, *flags: str, rule: Any = None, timeout: str = "90s"
    ) -> tuple[Master, Proxy, Agent]:
        """Start a master, a proxy and an agent that has registered."""
        master = self.master("--node-timeout", timeout)
        proxy = self.proxied(master, rule)
        agent = self.worker(proxy, *flags)
        wait_for(lambda: "registered with" in agent.words(), why="the agent registers")
        return master, proxy, agent

    def again(self, master: Master, *flags: str) -> Master:
        """Start a master on the folder and the port of one that is dead."""
        return self.master(*flags, port=master.port)

    def once_done(self, master: Master, job: Any, attempts: int = 1) -> Any:
        """Wait for a job; it must be completed by so many attempts, with one result."""
        done = master.finished(job["id"] if isinstance(job, dict) else job)
        self.assertEqual((done["status"], done["attempt"]), ("completed", attempts), done)
        accepted = [record for record in done["attempts"] if record["status"] == "completed"]
        self.assertEqual(len(accepted), 1, done)
        results = [
            result
            for result in master.get("/results?limit=1000&status=completed")["results"]
            if result["job_id"] == done["id"]
        ]
        self.assertEqual(len(results), 1, results)
        return done

    def counted(self, master: Master, metric: str) -> float:
        text = master.call("GET", "/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(metric))


class OneSession(BadNetwork):
    def test_an_older_agent_of_the_same_node_ends_and_says_why(self) -> None:
        master, _, agent = self.network()
        job = self.live(master, 60, output="o.mp4")
        self.encoding(agent)
        copy = self.folder / "copy-state"  # a machine that was cloned, its agent with it
        copy.mkdir(mode=0o700)
        shutil.copy(agent.state / "node.json", copy / "node.json")
        newer = Agent(self.folder, master.url, name="copy")
        self.addCleanup(newer.end)
        self.assertEqual(agent.wait(), 1, agent.words())
        self.assertIn("newer start of node", agent.words())
        self.assertEqual(master.get("/nodes")["count"], 1)
        self.assertTrue(agent.at_rest())
        self.encoding(newer)
        self.assertEqual(len(list((self.folder / "media").glob(".ffdist-*"))), 1, "the newer one's")
        shown = master.get(f"/jobs/{job}")
        self.assertEqual(
            (shown["attempt"], shown["retry_count"]), (2, 1), "the older one's lease was judged"
        )
        master.call("POST", f"/jobs/{job}/cancel")
        self.assertEqual(master.finished(job)["status"], "canceled")

    def test_a_registration_whose_answer_was_lost_is_repeated_and_is_one_node(self) -> None:
        master = self.master()
        rules = {fault: Once(fault, REGISTER) for fault in ("mute", "cut", "lose", "twice")}
        agents = [
            self.worker(self.proxied(master, rule), name=fault) for fault, rule in rules.items()
        ]
        for (fault, rule), agent in zip(rules.items(), agents):
            wait_for(rule.hit.is_set, why=f"the fault {fault}")
            wait_for(
                lambda agent=agent: "registered with" in agent.words(), why="it registers after all"
            )
        self.assertEqual(
            sorted(node["name"] for node in master.get("/nodes")["nodes"]), sorted(rules)
        )

    def test_an_agent_killed_before_it_heard_that_it_is_registered_is_the_same_node(self) -> None:
        lost = Once("mute", REGISTER)
        master = self.master()
        proxy = self.proxied(master, lost)
        agent = self.worker(proxy)
        wait_for(lost.hit.is_set, why="the answer is lost")
        agent.kill()
        again = self.worker(proxy)
        wait_for(lambda: again.words().count("registered with") == 1, why="it registers again")
        self.assertEqual(master.get("/nodes")["count"], 1)


class StateFolder(BadNetwork):
    def test_a_spool_that_somebody_removed_takes_the_next_report(self) -> None:
        spool = wire.Spool(self.folder / "state" / "spool")
        shutil.rmtree(self.folder / "state")
        spool.put({"job_id": "j", "attempt": 1})
        self.assertEqual(spool.waiting(), [("j", 1)])

    def test_a_result_that_is_no_json_is_a_failure_of_the_agent_and_holds_no_slot(self) -> None:
        """NaN is none: a thread that ended by it would keep the job running for ever."""
        state = wire.State(self.folder)
        state.identity = wire.Identity("n", "secret")
        link = wire.Link(mock.Mock(), state, "worker", mock.Mock())
        wire.Reporter(link, mock.Mock()).keep({"job_id": "j", "attempt": 2, "status": "completed",
                                               "metrics": {"psnr_db": float("nan")}})
        [(_, kept)] = state.spool.entries()
        self.assertEqual((kept["job_id"], kept["attempt"], kept["node_id"], kept["status"],
                          kept["failure_reason"]), ("j", 2, "n", "failed", "agent"))
        self.assertIn("worker failed itself", kept["error"])
        self.assertEqual(len(list((self.folder / "spool").iterdir())), 1)

    def test_an_identity_that_cannot_be_read_makes_a_new_node(self) -> None:
        master = self.master()
        for text in ("not JSON", "[]", '{"id": null}', '{"id": "worker"}', '{"id": 5}'):
            with self.subTest(text):
                file = self.folder / "agent-state" / "node.json"
                file.parent.mkdir(mode=0o700, exist_ok=True)
                file.write_text(text)
                self.assertIsNone(wire.read_identity(file))
        worker = self.agent(master)
        wait_for(lambda: "registered with" in worker.words(), why="it registers")
        identity = wire.read_identity(file)
        self.assertEqual(identity and identity.id, master.get("/nodes")["nodes"][0]["id"])


class LostMessages(OneFleet, BadNetwork):
    """Whatever is lost, cut or sent twice: one attempt does the job once, with one result."""

    flags: ClassVar[tuple[str, ...]] = ("--heartbeat-interval", "1s")
    proxy: ClassVar[Proxy]

    @classmethod
    def reached(cls, master: Master) -> str:
        cls.proxy = Proxy(master.port)
        cls.addClassCleanup(cls.proxy.end)
        return cls.proxy.url

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(setattr, self.proxy, "rule", passing)

    def survives(self, *lines: str, meant: Callable[[Any], Any] = lambda answer: True,
                 faults: tuple[str, ...] = ("mute", "cut"), seconds: float = 0.0) -> None:
        """Run a job under each fault on each kind of message."""
        (master, agent), proxy = self.fleet(), self.proxy
        for line, fault in itertools.product(lines, faults):
            with self.subTest(f"{fault} {line}"):
                proxy.rule = rule = Once(fault, line, meant)
                if (
                    line == CLAIM and fault in BEFORE
                ):  # the one that is parked now has passed already
                    wait_for(rule.hit.is_set, why=f"{fault} is met")
                more = {**SHORT, "duration": seconds, "realtime": True} if seconds else SHORT
                done = self.once_done(
                    master, master.submit("short", **more, output=f"{uuid.uuid4()}.mp4")
                )
                wait_for(
                    rule.hit.is_set, why=f"{fault} is met"
                )  # the proxy learns last that a job is done
                self.assertEqual((done["retry_count"], done["max_retries"]), (0, 3))
        self.assertEqual(self.counted(master, "ffdist_lost_leases"), 0)
        wait_for(lambda: not list((agent.state / "spool").iterdir()), why="the spool empties")
        self.nothing_left(agent)

    def test_a_claim_whose_answer_was_lost_gets_the_same_job_again(self) -> None:
        self.survives(CLAIM, meant=has_job)

    def test_a_claim_that_never_arrived_is_asked_again(self) -> None:
        self.survives(CLAIM, faults=("lose", "delay"))

    def test_a_result_whose_answer_was_lost_is_sent_again_and_counted_once(self) -> None:
        self.survives(RESULT, faults=("mute", "cut", "lose"))

    def test_progress_that_is_lost_ends_nothing(self) -> None:
        self.survives(PROGRESS, faults=("mute", "lose"), seconds=1.5)

    def test_readings_that_were_lost_come_with_the_next_progress_or_with_the_result(self) -> None:
        lost: list[str] = []

        def rule(asked: Message, answer: Message | None) -> str:
            taken = [sample["time"] for sample in (asked.body or {}).get("samples", ())]
            if answer is not None or not taken or "/progress" not in asked.line or len(lost) > 2:
                return "pass"
            lost.extend(taken)
            return "lose"
        (master, _), proxy = self.fleet(), self.proxy
        proxy.rule, before = rule, len(proxy.seen)
        job = self.live(master, 60)
        wait_for(lambda: len(lost) > 2, why="some readings are lost")
        master.call("POST", f"/jobs/{job}/cancel")
        self.assertEqual(master.finished(job)["result"].get("samples"), None, "the store has them")
        came = [
            sample["time"]
            for seen in proxy.seen[before:]
            if seen.answer and seen.answer.status == 200
            for sample in (seen.asked.body or {}).get("samples", ())
        ]
        first = list(dict.fromkeys(came))  # the report may repeat what a progress has just brought
        self.assertEqual(first[:len(set(lost))], sorted(set(lost)))

    def test_messages_that_arrive_twice_count_once(self) -> None:
        self.survives(CLAIM, RESULT, PROGRESS, faults=("twice",), seconds=0.8)

    def test_a_claim_that_arrives_again_after_it_was_answered_empty_leases_nothing_for_nobody(
        self,
    ) -> None:
        """The late copy is given a job; the agent, which has long asked again, must find it."""
        (master, _), proxy = self.fleet(), self.proxy
        stray: list[Any] = []

        def empty_first(asked: Message, answer: Message | None) -> str:
            if answer is None or stray or "/jobs/next" not in asked.line or answer.body.get("job"):
                return "pass"
            stray.append(master.submit("short", **SHORT))
            path = asked.line.split(" ")[1]
            taken = call(master.url, "GET", path.replace("wait=", "waited="))
            self.assertEqual(taken.body["job"]["id"], stray[0]["id"])
            return "pass"
        proxy.rule = empty_first
        wait_for(lambda: stray, why="a claim was answered empty")
        self.once_done(master, stray[0])
        self.once_done(master, master.submit("short", **SHORT))


class Repeated(BadNetwork):
    """What is sent again by a claim's word or under an id of its own."""

    def test_a_claim_word_that_is_spent_is_answered_at_once_and_says_so(self) -> None:
        master = self.master()
        node = Node(master)
        job = master.submit()
        self.assertEqual(node.claim(claim="w").body["job"]["id"], job["id"])
        master.call("POST", f"/jobs/{job['id']}/cancel")
        node.report({**job, "attempt": 1}, "canceled")
        waiting = master.submit()
        answer = node.claim(claim="w", wait=60).body
        self.assertEqual((answer["job"], answer["claim"]), (None, "spent"))
        self.assertEqual(node.claim(claim="v").body["job"]["id"], waiting["id"])

    def test_a_submission_whose_answer_was_lost_is_repeated_with_its_own_id_and_is_one_job(
        self,
    ) -> None:
        master = self.master()
        proxy = self.proxied(master)
        body = {"id": str(uuid.uuid4()), "scenario": "720p30-h264"}
        for fault in ("mute", "cut", "lose"):
            proxy.rule = Once(fault, "POST /jobs ")
            with self.assertRaises((OSError, http.client.HTTPException)):
                call(proxy.url, "POST", "/jobs", body)
        self.assertEqual(call(proxy.url, "POST", "/jobs", body).status, 200)
        self.assertEqual(master.get("/jobs")["total"], 1)
        bulk = [{"id": str(uuid.uuid4()), "scenario": "720p30-h264"} for _ in range(3)]
        proxy.rule = Once("mute", "POST /jobs ")
        with self.assertRaises((OSError, http.client.HTTPException)):
            call(proxy.url, "POST", "/jobs", bulk)
        self.assertEqual(call(proxy.url, "POST", "/jobs", bulk).status, 200)
        self.assertEqual(master.get("/jobs")["total"], 4)


class Orders(BadNetwork):
    def test_a_cancel_is_the_answer_to_the_request_that_was_parked_before_it(self) -> None:
        master, proxy, agent = self.network("--heartbeat-interval", "60s")
        job = self.live(master, 60)
        self.encoding(agent)
        wait_for(
            lambda: self.counted(master, "ffdist_parked_requests") == 1, why="the agent is parked"
        )
        before = len([seen for seen in proxy.seen if "/heartbeat" in seen.asked.line])
        master.call("POST", f"/jobs/{job}/cancel")
        self.assertEqual(master.finished(job)["status"], "canceled")
        beats = [seen for seen in proxy.seen if "/heartbeat" in seen.asked.line][before:]
        first = beats[0].answer
        assert first is not None
        self.assertEqual(first.body["actions"], [{"job_id": job, "attempt": 1, "action": "cancel"}])
        self.nothing_left(agent)

    def test_an_order_whose_answer_was_lost_is_given_again(self) -> None:
        master, proxy, agent = self.network()
        for fault in ("mute", "cut"):
            job = self.live(master, 60, output="o.mp4")
            self.encoding(agent)
            proxy.rule = lost = Once(fault, f"{BEAT}|{CLAIM}", has_actions)
            master.call("POST", f"/jobs/{job}/cancel")
            self.assertEqual(master.finished(job)["status"], "canceled")
            self.assertTrue(lost.hit.is_set())
            self.nothing_left(agent)

    def test_an_agent_told_to_cancel_what_it_does_not_hold_reports_it_canceled(self) -> None:
        master, proxy, _ = self.network("--heartbeat-interval", "1s", "--max-concurrent-jobs", "2")
        claims = wait_for(lambda: [seen for seen in proxy.seen if "/jobs/next" in seen.asked.line])
        query = dict(
            part.split("=") for part in claims[0].asked.line.split(" ")[1].split("?")[1].split("&")
        )
        proxy.split()  # a claim in this agent's name that it never hears of
        job = master.submit("720p30-h264")
        path = f"/jobs/next?node_id={query['node_id']}&session={query['session']}&claim=unheard"
        self.assertEqual(master.call("GET", path).body["job"]["id"], job["id"])
        master.call("POST", f"/jobs/{job['id']}/cancel")
        self.assertEqual(master.get(f"/jobs/{job['id']}")["status"], "running")
        proxy.mend()
        self.assertEqual(master.finished(job["id"])["status"], "canceled")

    def ordered_before_it_began(self, verb: str) -> tuple[Master, Agent, str]:
        """Give an order for a job whose claim was answered into the void, before the next claim."""
        placed = threading.Event()

        class Void(Once):
            def __call__(self, asked: Message, answer: Message | None) -> str:
                if self.hit.is_set() and asked.line.startswith("GET /jobs/next"):
                    placed.wait(60)
                return super().__call__(asked, answer)
        rule = Void("mute", CLAIM, has_job)
        master, _, agent = self.network(rule=rule)
        job = self.live(master, 1, output="o.mp4")
        self.assertTrue(rule.hit.wait(60))
        self.assertEqual(master.call("POST", f"/jobs/{job}/{verb}").status, 200)
        placed.set()
        return master, agent, job

    def test_a_job_that_was_canceled_before_its_agent_heard_of_it_is_not_begun(self) -> None:
        master, agent, job = self.ordered_before_it_began("cancel")
        self.assertEqual(master.finished(job)["status"], "canceled")
        self.nothing_left(agent)
        self.assertFalse((self.folder / "media" / "o.mp4").exists())
        self.assertNotIn("gave it to another node", agent.words())
        self.assertEqual(self.short(master), "completed")

    def test_a_job_that_was_paused_before_its_agent_heard_of_it_stands_still(self) -> None:
        master, _, job = self.ordered_before_it_began("pause")
        wait_for(lambda: (master.get(f"/jobs/{job}")["progress"] or {}).get("paused"),
                 why="the agent holds it, standing still")
        master.call("POST", f"/jobs/{job}/resume")
        self.once_done(master, job)

    def test_a_cancel_survives_a_split_network_and_the_masters_death(self) -> None:
        master, proxy, agent = self.network()
        job = self.live(master, 60, output="o.mp4")
        self.encoding(agent)
        proxy.split()
        asked = master.call("POST", f"/jobs/{job}/cancel").body
        self.assertEqual((asked["status"], asked["cancel_requested"]), ("running", True))
        master.kill()
        master = self.again(master)
        self.assertTrue(master.get(f"/jobs/{job}")["cancel_requested"])
        proxy.mend()
        self.assertEqual(master.finished(job)["status"], "canceled")
        self.nothing_left(agent)
        self.assertEqual(list((self.folder / "media").iterdir()), [])

    def test_a_cancel_of_a_job_whose_node_is_lost_ends_it_for_good(self) -> None:
        master, proxy, agent = self.network(timeout="2s")
        job = self.live(master, 60, output="o.mp4")
        self.encoding(agent)
        proxy.split()
        master.call("POST", f"/jobs/{job}/cancel")
        self.assertEqual(master.finished(job)["status"], "canceled")
        proxy.mend()
        self.assertEqual(self.short(master), "completed")
        wait_for(lambda: not self.left(agent), why="the agent ends what is no longer its own")
        self.assertEqual(master.get(f"/jobs/{job}")["attempt"], 1)

    def left(self, agent: Agent) -> list[Path]:
        hidden = list((self.folder / "media").glob(".ffdist-*"))
        return hidden + ([] if agent.at_rest() else [agent.work])

    def test_a_pause_survives_the_masters_death_and_so_does_a_resume(self) -> None:
        master, _, agent = self.network("--heartbeat-interval", "1s")
        job = self.live(master, 4)
        pids = self.encoding(agent)

        def states() -> set[str]:
            return {Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] for pid in pids}
        master.call("POST", f"/jobs/{job}/pause")
        wait_for(lambda: states() == {"T"}, why="FFmpeg stands still")
        master.kill()
        master = self.again(master)
        shown = master.get(f"/jobs/{job}")
        self.assertEqual((shown["status"], shown["attempt"]), ("paused", 1))
        wait_for(
            lambda: (master.get(f"/jobs/{job}")["progress"] or {}).get("paused"), why="it says so"
        )
        self.assertEqual(states(), {"T"})
        self.assertEqual(master.call("POST", f"/jobs/{job}/resume").body["status"], "running")
        master.kill()
        master = self.again(master)
        self.once_done(master, job)

    def test_a_paused_job_whose_attempt_failed_for_the_moment_stays_paused_and_may_go_on(
        self,
    ) -> None:
        master = self.master()
        node = Node(master)
        master.submit()
        job = node.claim().body["job"]
        master.call("POST", f"/jobs/{job['id']}/pause")
        self.assertEqual(
            node.report(job, "failed", failure_reason="killed", error="signal 9").status, 200
        )
        shown = master.get(f"/jobs/{job['id']}")
        self.assertEqual(
            (shown["status"], shown["retry_count"], shown["error"], shown["completed_at"]),
            ("paused", 1, "signal 9", None),
        )
        self.assertEqual(node.shown()["running"], 0)
        self.assertIsNone(node.claim().body["job"])
        self.assertEqual(master.call("POST", f"/jobs/{job['id']}/resume").body["status"], "pending")
        again = node.park(wait=60).answer().body["job"]
        self.assertEqual((again["id"], again["attempt"]), (job["id"], 2))
        self.assertEqual(node.report(again).status, 200)


class NodesGivenUp(BadNetwork):
    """A node that was out of reach for longer than the master waits, and comes back."""

    def given_up(
        self, seconds: float, output: str | None = "o.mp4"
    ) -> tuple[Master, Proxy, Agent, str]:
        """Let a node be given up with an encode that is held; self.pids are its processes."""
        master, proxy, agent = self.network(timeout="2s")
        job = self.live(master, seconds, output=output)
        self.pids = self.held(agent)
        proxy.split()
        wait_for(
            lambda: master.get(f"/jobs/{job}")["status"] == "pending", why="the node is given up"
        )
        self.assertEqual(master.get(f"/jobs/{job}")["retry_count"], 1)
        return master, proxy, agent, job

    def taken_back(self, master: Master, job: str, kept: bool = True) -> None:
        done = self.once_done(master, job)
        self.assertEqual((done["retry_count"], len(done["attempts"])), (0, 1))
        self.assertEqual((self.folder / "media" / "o.mp4").exists(), kept)

    def spooled(self, agent: Agent) -> None:
        wait_for(
            lambda: list((agent.state / "spool").glob("*.json")), why="the result is in the spool"
        )

    def test_before_another_claims_its_progress_takes_the_attempt_back(self) -> None:
        master, proxy, agent, job = self.given_up(1)
        proxy.mend()
        wait_for(lambda: master.get(f"/jobs/{job}")["status"] == "running", why="it takes it back")
        self.go_on(self.pids)
        self.assertEqual(master.get(f"/jobs/{job}")["attempt"], 1)
        self.taken_back(master, job)
        self.nothing_left(agent)

    def test_before_another_claims_its_result_takes_the_attempt_back(self) -> None:
        master, proxy, agent, job = self.given_up(1, output=None)
        self.go_on(self.pids)
        self.spooled(agent)
        proxy.rule = lambda asked, answer: (
            "pass" if asked.line.startswith("POST /results") else "lose"
        )
        proxy.mend()
        self.taken_back(master, job, kept=False)

    def test_before_another_claims_a_restarted_agents_holding_takes_the_attempt_back(self) -> None:
        master = self.master("--node-timeout", "2s")
        proxy = self.proxied(master)
        agent = self.worker(proxy)
        wait_for(lambda: master.get("/nodes")["count"])
        proxy.rule = lambda asked, answer: (
            "lose" if asked.line.startswith("POST /results") else "pass"
        )
        job = self.live(master, 0.5, output="o.mp4")
        self.spooled(agent)
        agent.kill()
        wait_for(
            lambda: master.get(f"/jobs/{job}")["status"] == "pending", why="the node is given up"
        )
        again = self.worker(proxy)
        wait_for(
            lambda: master.get(f"/jobs/{job}")["status"] == "running",
            why="its holding takes it back",
        )
        proxy.rule = lambda asked, answer: "pass"
        self.taken_back(master, job)
        wait_for(lambda: not list((again.state / "spool").iterdir()), why="the spool empties")

    def test_after_another_claimed_it_is_refused_and_its_output_gets_no_name(self) -> None:
        master, proxy, agent, job = self.given_up(3)
        self.go_on(self.pids)
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir()
        other = Agent(self.folder, master.url, "--media-root", str(elsewhere), name="other")
        self.addCleanup(other.end)
        done = self.once_done(master, job, attempts=2)
        self.assertEqual([record["status"] for record in done["attempts"]], ["lost", "completed"])
        self.assertEqual(done["result"]["node"], "other")
        partial = list((self.folder / "media").glob(".ffdist-*"))
        self.assertEqual(len(partial), 1, "after such a silence it waits for the master's word")
        proxy.mend()
        wait_for(lambda: agent.at_rest() and not list((self.folder / "media").iterdir()),
                 why=f"it removes all that it made: {agent.words()}")
        self.assertIn("gave it to another node", agent.words())
        self.assertTrue((elsewhere / "o.mp4").exists())
        self.assertEqual(master.get("/results")["total"], 1)
        self.assertEqual(list((agent.state / "spool").iterdir()), [])

    def test_an_answer_that_was_long_on_its_way_confirms_no_lease(self) -> None:
        """Its request was heard before the node was given up: it must not name the output."""
        late, over = threading.Event(), threading.Event()

        def slow(asked: Message, answer: Message | None) -> str:
            if over.is_set():
                return "pass"
            if answer is not None:
                late.wait(60)
            return "pass" if "/heartbeat" in asked.line else "lose"
        master, proxy, agent = self.network("--heartbeat-interval", "60s", timeout="2s")
        job = self.live(master, 1, output="o.mp4")
        pids = self.held(agent)
        proxy.rule = slow
        wait_for(
            lambda: master.get(f"/jobs/{job}")["status"] == "pending", why="the node is given up"
        )
        other = Node(master, "other")
        taken = wait_for(lambda: other.claim().body["job"], why="another claims it")
        self.go_on(pids)
        wait_for(lambda: not processes_under(agent.work), why="the encode is over")
        sent = len(proxy.seen)
        late.set()
        later = lambda: [seen.asked.line for seen in proxy.seen[sent:]]  # noqa: E731
        wait_for(
            lambda: (
                any("/results" in line for line in later())
                or sum("/progress" in line for line in later()) > 4
            ),
            why="it asks on whether it is its own",
        )
        self.assertEqual([line for line in later() if "/results" in line], [])
        self.assertFalse((self.folder / "media" / "o.mp4").exists())
        over.set()
        self.assertEqual(other.progress(taken, progress=1).status, 200)
        wait_for(lambda: other.beat() and agent.at_rest(), why="it learns that it is another's")
        self.assertEqual(list((self.folder / "media").iterdir()), [])
        self.assertEqual(other.report(taken).status, 200)

    def test_after_another_claimed_a_spooled_result_is_refused_and_leaves_the_spool(self) -> None:
        master, proxy, agent = self.network(timeout="2s")
        proxy.rule = lambda asked, answer: (
            "lose" if asked.line.startswith("POST /results") else "pass"
        )
        job = self.live(master, 0.5)
        self.spooled(agent)
        proxy.split()
        wait_for(
            lambda: master.get(f"/jobs/{job}")["status"] == "pending", why="the node is given up"
        )
        node = Node(master, "other")
        taken = wait_for(lambda: node.claim().body["job"], why="its backoff is over")
        self.assertEqual((taken["id"], taken["attempt"]), (job, 2))
        proxy.rule = lambda asked, answer: "pass"
        proxy.mend()
        wait_for(
            lambda: node.beat() and not list((agent.state / "spool").iterdir()), why="it is refused"
        )
        self.assertIn("result not taken", agent.words())
        self.assertEqual(master.get(f"/jobs/{job}")["status"], "running")
        self.assertEqual(node.report(taken).status, 200)
        self.once_done(master, job, attempts=2)


class Leaving(BadNetwork):
    def test_an_operators_drain_survives_the_agents_and_the_masters_restart(self) -> None:
        master, proxy, agent = self.network()
        node = master.get("/nodes")["nodes"][0]["id"]
        master.call("POST", f"/nodes/{node}/drain")
        job = master.submit("short", **SHORT)["id"]
        agent.kill()
        master.kill()
        master = self.again(master)
        registered = len(proxy.seen)
        self.worker(proxy)
        wait_for(lambda: any("/jobs/next" in seen.asked.line for seen in proxy.seen[registered:])
                 or self.counted(master, "ffdist_parked_requests"), why="the agent asks again")
        shown = master.get(f"/nodes/{node}")
        self.assertEqual(
            (shown["status"], master.get(f"/jobs/{job}")["status"]), ("draining", "pending")
        )
        master.call("POST", f"/nodes/{node}/resume")
        self.once_done(master, job)

    def test_an_agent_that_stops_while_the_network_is_down_gives_back_what_it_had(self) -> None:
        master, proxy, agent = self.network(timeout="2s")
        job = self.live(master, 60, output="o.mp4")
        self.encoding(agent)
        proxy.split()
        agent.end()
        self.nothing_left(agent)
        proxy.mend()
        again = self.worker(proxy)
        pids = self.encoding(again)
        self.assertTrue(pids)
        shown = master.get(f"/jobs/{job}")
        self.assertEqual((shown["status"], shown["attempt"]), ("running", 2))
        master.call("POST", f"/jobs/{job}/cancel")
        self.assertEqual(master.finished(job)["status"], "canceled")


class Silence(BadNetwork):
    def test_a_master_that_slept_or_was_dead_for_longer_than_the_nodes_time_loses_no_lease(
        self,
    ) -> None:
        master, _, agent = self.network(timeout="3s")
        job = self.live(master, 9)
        self.encoding(agent)
        os.kill(master.pid, signal.SIGSTOP)
        time.sleep(4)  # the silence itself: longer than the node's time
        os.kill(master.pid, signal.SIGCONT)
        wait_for(lambda: master.get(f"/jobs/{job}")["progress"], why="the master is awake")
        self.assertEqual(self.counted(master, "ffdist_lost_leases"), 0)
        master.kill()
        time.sleep(4)
        master = self.again(master, "--node-timeout", "3s")
        done = self.once_done(master, job)
        self.assertEqual((done["retry_count"], self.counted(master, "ffdist_lost_leases")), (0, 0))
        self.assertEqual(len(done["attempts"]), 1)
        self.nothing_left(agent)

    def test_a_backoff_goes_on_after_a_restart(self) -> None:
        master = self.master()
        node = Node(master)
        master.submit()
        job = node.claim().body["job"]
        node.report(job, "failed", failure_reason="killed", error="signal 9")
        shown = master.get(f"/jobs/{job['id']}")
        self.assertEqual((shown["status"], shown["retry_count"]), ("pending", 1))
        self.assertTrue(shown["not_before"])
        master.kill()
        node.master = master = self.again(master)
        self.assertEqual(master.get(f"/jobs/{job['id']}")["not_before"], shown["not_before"])
        again = node.park(wait=60).answer().body["job"]
        self.assertEqual((again["id"], again["attempt"]), (job["id"], 2))


class FullDisk(BadNetwork):
    def test_a_result_that_finds_the_masters_disk_full_waits_and_counts_once(self) -> None:
        ballast = small_disk(self, self.folder / "master") / "ballast"
        ballast.write_bytes(b"\0" * 400_000)
        full = threading.Event()

        def late(asked: Message, answer: Message | None) -> str:
            if asked.line.startswith("POST /results"):
                full.wait(60)
            return "pass"
        master, proxy, agent = self.network(rule=late)
        job = self.live(master, 1, output="o.mp4")
        wait_for(lambda: master.get(f"/jobs/{job}")["status"] == "running", why="it is claimed")
        for count in (50, 5, 1):
            while master.call("POST", "/jobs", [{"scenario": "x"}] * count).status == 201:
                pass
        full.set()
        wait_for(
            lambda: any(
                seen.asked.line.startswith("POST /results")
                and seen.answer is not None
                and seen.answer.status == 503
                for seen in proxy.seen
            ),
            why="the report gets 503",
        )
        self.assertEqual(len(list((agent.state / "spool").glob("*.json"))), 1)
        status = wait_for(lambda: (master.call("GET", f"/jobs/{job}").body or {}).get("status"))
        self.assertEqual(status, "running")
        wait_for(
            lambda: "full" in str(master.call("GET", "/ready").body.get("error")),
            why="/ready says so",
        )
        ballast.unlink()
        self.once_done(master, job)
        self.assertEqual(self.counted(master, "ffdist_lost_leases"), 0)


if __name__ == "__main__":
    unittest.main()
