"""The edge of the master to the network: who may connect, how long, with how much, and in what
order the answers come.

The service runs in this process, so that its limits can be made small; the clients are bare
sockets. What garbage may do: test_fuzz. A crowd of real size: bench.
"""
from __future__ import annotations

import contextlib
import gc
import json
import logging
import re
import resource
import socket
import threading
import time
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import ffdist
from agent import ApiError
from tests.fleet import Case, Master, Node
from tests.support import all_of, call, need, wait_for

LOG = logging.getLogger("ffdist.test-edge")
LOG.addHandler(logging.NullHandler())
LOG.propagate = False


def request(method: str, path: str, body: Any = None, headers: str = "") -> bytes:
    """Return the bytes of a request."""
    raw = b"" if body is None else json.dumps(body).encode()
    if raw:
        headers += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode() + raw


HEALTH = request("GET", "/health")
JOB = {"scenario": "720p30-h264", "parameters": {"duration": 1}}
LAST = request("GET", "/health", headers="Connection: close\r\n")


def answers(raw: bytes) -> list[tuple[int, Any]]:
    """Return (status, JSON) of each of the answers in a stream."""
    found = []
    while raw:
        head, _, rest = raw.partition(b"\r\n\r\n")
        length = int(re.findall(rb"Content-Length: (\d+)", head)[0])
        found.append((int(head[9:12]), json.loads(rest[:length])))
        raw = rest[length:]
    return found


class Edges(Case):
    """A service in this process, and clients of it."""

    def setUp(self) -> None:
        super().setUp()
        self.sockets = contextlib.ExitStack()
        self.addCleanup(self.sockets.close)

    def serve(self, **limits: Any) -> ffdist.Service:
        """Start a service with some constants of its own."""
        for name, value in limits.items():
            self.set(name, value)
        service = ffdist.Service(
            "127.0.0.1", 0, self.folder / "master", ffdist.Settings(), log=LOG)
        service.start()
        self.addCleanup(self.stop)
        self.service, self.is_stopped = service, False
        self.port = int(service.url.rpartition(":")[2])
        return service

    def stop(self) -> None:
        if not self.is_stopped:
            self.is_stopped = True
            self.service.stop()

    def set(self, name: str, value: Any) -> None:
        patch = mock.patch.object(ffdist, name, value)
        patch.start()
        self.addCleanup(patch.stop)

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        client = socket.create_connection(
            ("127.0.0.1", self.port), timeout=20, source_address=(source, 0))
        return self.sockets.enter_context(client)

    def exchange(self, *parts: bytes) -> list[tuple[int, Any]]:
        """Send parts one after the other, and return all answers until the end."""
        client = self.connect()
        for part in parts:
            client.sendall(part)
        return answers(all_of(client))

    def one_answer(self, client: socket.socket) -> tuple[int, Any]:
        """Return the next answer; the connection stays open."""
        raw = b""
        while b"\r\n\r\n" not in raw:
            raw += client.recv(65536)
        length = int(re.findall(rb"Content-Length: (\d+)", raw)[0])
        while len(raw.partition(b"\r\n\r\n")[2]) < length:
            raw += client.recv(65536)
        return answers(raw)[0]

    def node(self, name: str = "worker") -> dict[str, str]:
        body = {"address": name, "session": "s", "protocol": 1}
        node = call(self.service.url, "POST", "/nodes/register", body).body
        return {"node_id": node["id"], "session": "s"}

    def claim(self, node: dict[str, str], word: str, wait_s: float = 15) -> bytes:
        query = "&".join(f"{name}={value}" for name, value in node.items())
        return request("GET", f"/jobs/next?{query}&claim={word}&wait={wait_s}")

    def parked(self) -> int:
        return self.service.master.queries.snapshot().parked


class Order(Edges):
    """What comes over one connection is answered, once, in its order."""

    def test_pipelined_requests_are_answered_in_order(self) -> None:
        self.serve()
        # Of the pool, of the edge, of a commit, and refused ones.
        found = self.exchange(
            request("GET", "/nodes") + HEALTH + request("POST", "/jobs", JOB)
            + request("GET", "/nothing") + request("GET", "/jobs?limit=1") + LAST)
        self.assertEqual([status for status, _ in found], [200, 200, 201, 404, 200, 200])
        self.assertEqual(found[0][1]["nodes"], [])
        self.assertEqual(found[2][1]["id"], found[4][1]["jobs"][0]["id"], "it saw the job")

    def test_requests_that_come_byte_by_byte_are_whole(self) -> None:
        self.serve()
        raw = request("POST", "/jobs", JOB) + HEALTH + LAST
        client = self.connect()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(len(raw)):
            client.sendall(raw[number:number + 1])
        self.assertEqual([status for status, _ in answers(all_of(client))], [201, 200, 200])

    def test_requests_behind_a_parked_one_wait_for_it(self) -> None:
        self.serve()
        client = self.connect()
        client.sendall(self.claim(self.node(), "w") + LAST)
        wait_for(self.parked, why="the claim is parked")
        job = call(self.service.url, "POST", "/jobs", JOB).body
        [(_, claimed), (status, _)] = answers(all_of(client))
        self.assertEqual((claimed["job"]["id"], status), (job["id"], 200))

    def test_thousands_of_pipelined_requests_are_all_answered(self) -> None:
        self.serve()
        client = self.connect()
        count = 3000
        threading.Thread(target=client.sendall, args=(HEALTH * count + LAST,), daemon=True).start()
        self.assertEqual(len(answers(all_of(client))), count + 1)

    def test_a_large_body_is_taken_and_the_next_request_too(self) -> None:
        self.serve()
        jobs = [{**JOB, "note": "x" * 100}] * 1000
        found = self.exchange(request("POST", "/jobs", jobs), HEALTH, LAST)
        self.assertEqual([status for status, _ in found], [201, 200, 200])
        self.assertEqual(found[0][1]["count"], 1000)

    def test_a_client_that_stops_sending_gets_its_answer(self) -> None:
        self.serve()
        client = self.connect()
        client.sendall(request("GET", "/nodes"))
        client.shutdown(socket.SHUT_WR)
        self.assertEqual([status for status, _ in answers(all_of(client))], [200])


class Parked(Edges):
    """A parked request is no thread; it ends by news, by its time, or with its client."""

    def test_a_hang_up_of_a_parked_claim_hands_its_job_to_the_next(self) -> None:
        self.serve()
        first, second = self.connect(), self.connect()
        first.sendall(self.claim(self.node("first"), "a"))
        wait_for(self.parked, why="the first is parked")
        second.sendall(self.claim(self.node("second"), "b"))
        wait_for(lambda: self.parked() == 2, why="the second is parked")
        first.close()
        wait_for(lambda: self.parked() == 1, why="the hang-up is seen")
        job = call(self.service.url, "POST", "/jobs", JOB).body
        self.assertEqual(self.one_answer(second)[1]["job"]["id"], job["id"])

    def test_a_parked_claim_whose_time_is_up_is_answered_empty(self) -> None:
        self.serve()
        client = self.connect()
        client.sendall(self.claim(self.node(), "w", wait_s=0.3))
        self.assertEqual(self.one_answer(client), (200, {"job": None}))
        client.sendall(HEALTH)
        self.assertEqual(self.one_answer(client)[0], 200, "the connection is kept")

    def test_log_requests_are_woken_by_lines_by_the_end_and_by_their_time(self) -> None:
        service = self.serve()
        node = self.node()
        job = call(service.url, "POST", "/jobs", JOB).body
        claimed = call(service.url, "GET", f"/jobs/next?node_id={node['node_id']}&session=s").body
        own = {**node, "attempt": claimed["job"]["attempt"]}
        client = self.connect()
        path = f"/jobs/{job['id']}/logs?wait=15"
        client.sendall(request("GET", path))
        call(service.url, "POST", f"/jobs/{job['id']}/progress", {**own, "lines": ["one"]})
        self.assertEqual(self.one_answer(client)[1]["lines"], ["one"])
        client.sendall(request("GET", f"{path}&after=1"))
        report = {**own, "job_id": job["id"], "status": "completed"}
        call(service.url, "POST", "/results", report)
        self.assertEqual(self.one_answer(client)[1]["status"], "completed")
        other = call(service.url, "POST", "/jobs", JOB).body
        client.sendall(request("GET", f"/jobs/{other['id']}/logs?wait=0.3"))
        self.assertEqual(self.one_answer(client)[1], {"lines": [], "next": 0, "status": "pending"})

    def test_a_stop_answers_what_is_parked(self) -> None:
        service = self.serve()
        job = call(service.url, "POST", "/jobs", JOB).body
        call(service.url, "POST", f"/jobs/{job['id']}/pause")
        client, reader = self.connect(), self.connect()
        client.sendall(self.claim(self.node(), "w"))
        reader.sendall(request("GET", f"/jobs/{job['id']}/logs?wait=15"))
        wait_for(self.parked, why="the claim is parked")
        wait_for(lambda: [each.state for each in service._edge._connections].count(ffdist.PARKED)
                 == 2, why="both are parked")
        self.stop()
        self.assertEqual(answers(all_of(client)), [(200, {"job": None})])
        self.assertEqual(answers(all_of(reader))[0][1]["lines"], [])

    def test_a_failed_commit_is_the_answer_of_all_that_waited_for_it(self) -> None:
        service = self.serve()
        journal = service.master.journal
        with mock.patch.object(journal, "_check_place", side_effect=OSError("no disk")):
            found = self.exchange(request("POST", "/jobs", JOB) + LAST)
        self.assertEqual([status for status, _ in found], [503, 200])
        self.assertIn("no disk", found[0][1]["error"])
        wait_for(lambda: call(service.url, "POST", "/jobs", JOB).status == 201, why="it goes on")


    def test_looks_at_a_log_leave_nothing_behind(self) -> None:
        service = self.serve()
        job = call(service.url, "POST", "/jobs", JOB).body
        path = f"/jobs/{job['id']}/logs"
        for number in range(20):
            client = self.connect()
            client.sendall(request("GET", f"{path}?wait={15 if number % 2 else 0.1}"))
            if number % 2 == 0:
                self.one_answer(client)
            client.close()
        connections = service._edge._connections
        wait_for(lambda: not connections, why="all hang-ups are seen")
        self.assertEqual(service.master._transactions._watchers, {})
        gc.collect()
        left = [each for each in gc.get_objects() if isinstance(each, ffdist.Turn)]
        self.assertEqual(left, [])

    def test_a_parked_client_with_much_behind_its_request_is_let_go(self) -> None:
        self.serve()
        client = self.connect()
        client.sendall(self.claim(self.node(), "w") + b"x" * (1 << 20))
        client.settimeout(20)
        self.assertEqual([status for status, _ in answers(all_of(client))], [200])
        wait_for(lambda: self.service._edge._bounds.held_bytes == 0, why="nothing is held")

    def test_claims_meet_503_while_the_journal_cannot_be_written_and_are_heard(self) -> None:
        service = self.serve()
        node = self.node()
        call(service.url, "POST", "/jobs", JOB)
        query = f"/jobs/next?node_id={node['node_id']}&session=s&claim=w"
        with mock.patch.object(service.master.journal, "_check_place", side_effect=OSError("full")):
            self.assertEqual(call(service.url, "POST", "/jobs", JOB).status, 503)
            heard = call(service.url, "GET", f"/nodes/{node['node_id']}").body["last_heartbeat"]
            found = call(service.url, "GET", query)
            self.assertEqual(found.status, 503, "no job is leased")
            again = call(service.url, "GET", f"/nodes/{node['node_id']}").body["last_heartbeat"]
            self.assertGreater(again, heard)
            beat = call(service.url, "POST", f"/nodes/{node['node_id']}/heartbeat?session=s")
            self.assertEqual(beat.status, 200)
        wait_for(lambda: call(service.url, "GET", query).status == 200, why="it goes on")
        self.assertIsNotNone(call(service.url, "GET", query).body["job"])


class Outages(Edges):
    """A journal that cannot be written for a while."""

    def test_many_short_outages_lock_nobody_out(self) -> None:
        service = self.serve(REAP_S=0.001)
        state, journal = service.master, service.master.journal
        draft = ffdist.draft_of(JOB, 0)
        is_over = threading.Event()

        def look() -> None:
            while not is_over.is_set():
                with contextlib.suppress(ApiError):
                    state.queries.nodes()
                with contextlib.suppress(ApiError):
                    state.reap()
        readers = [threading.Thread(target=look, daemon=True) for _ in range(3)]
        for reader in readers:
            reader.start()
        self.addCleanup(is_over.set)
        for _ in range(150):
            away = mock.patch.object(journal, "_check_place", side_effect=OSError("gone"))
            with away, contextlib.suppress(ApiError):
                state.submit([draft])
            wait_for(lambda: self.accepts(draft), 20, "it can be written again")

    def accepts(self, draft: ffdist.Draft) -> bool:
        try:
            self.service.master.submit([draft])
        except ApiError:
            return False
        return True

    def test_a_node_that_comes_back_in_an_outage_costs_no_look_at_the_whole_journal(self) -> None:
        service = self.serve()
        node = self.node()
        url = f"/nodes/{node['node_id']}"
        beat = f"{url}/heartbeat?session=s"
        journal, transactions = service.master.journal, service.master._transactions
        with mock.patch.object(journal, "_check_place", side_effect=OSError("gone")):
            self.assertEqual(call(service.url, "POST", "/jobs", JOB).status, 503)
            wait_for(lambda: transactions._last_trouble, why="memory is what the journal holds")
            with transactions.glance() as state:
                state.nodes[node["node_id"]].offline_at = state.now.wall
            with mock.patch.object(transactions, "_load") as load:
                self.assertEqual(call(service.url, "POST", beat).status, 503)
                load.assert_not_called()
        wait_for(lambda: call(service.url, "POST", beat).status == 200)
        self.assertEqual(call(service.url, "GET", url).body["status"], "available")

    def test_a_commit_that_takes_too_long_is_told_by_ready(self) -> None:
        service = self.serve(STALL_S=0.05)
        journal = service.master.journal
        stuck = threading.Event()
        with mock.patch.object(journal, "_check_place", side_effect=lambda: stuck.wait(20)):
            client = self.connect()
            client.sendall(request("POST", "/jobs", JOB))
            wait_for(lambda: call(service.url, "GET", "/ready").status == 503)
            told = call(service.url, "GET", "/ready").body["error"]
            self.assertIn("the disk has not answered for", told)
            self.assertEqual(call(service.url, "GET", "/health").status, 200)
            stuck.set()
            self.assertEqual(self.one_answer(client)[0], 201)
        self.assertEqual(call(service.url, "GET", "/ready").status, 200)

    def test_more_stuck_uploads_than_are_ended_at_once_do_not_stop_the_sweep(self) -> None:
        service = self.serve(
            MAX_SWEPT=2, HEAD_S=0.3, BODY_S=0.1, SWEEP_S=0.1, MIN_BODY_RATE=1 << 30
        )
        stuck = threading.Event()
        self.addCleanup(stuck.set)
        large = request("POST", "/jobs", [{**JOB, "note": "x" * 100_000}])
        with mock.patch.object(ffdist.Connection, "file_body", lambda _: stuck.wait(30) and 0):
            for _ in range(4):
                client = self.connect()
                client.sendall(large[:90_000])
            connections = service._edge._connections
            wait_for(lambda: [each.state for each in connections] == [ffdist.FILING] * 4)
            slow = self.connect()
            slow.sendall(HEALTH[:20])
            self.assertEqual([status for status, _ in answers(all_of(slow))], [408])
            stuck.set()


class Limits(Edges):
    """Whoever takes too much, or too long, is told so; the others do not notice."""

    def has_answer(self, client: socket.socket) -> bool:
        client.settimeout(0)
        try:
            return len(client.recv(1, socket.MSG_PEEK)) > 0
        except OSError:
            return False
        finally:
            client.settimeout(20)

    def test_too_many_connections_of_one_address_get_503_and_others_none(self) -> None:
        self.serve()
        self.service._edge._bounds.max_connections = 10
        clients = [self.connect() for _ in range(5)]
        refused = all_of(self.connect())
        self.assertEqual(answers(refused)[0][0], 503)
        self.assertIn(b"Retry-After: ", refused)
        other = self.connect("127.0.0.2")
        for client in (*clients, other):
            client.sendall(HEALTH)
            self.assertEqual(self.one_answer(client)[0], 200)
        clients[0].close()
        wait_for(lambda: len(self.service._edge._connections) == 5, why="the end is seen")
        client = self.connect()
        client.sendall(HEALTH)
        self.assertEqual(self.one_answer(client)[0], 200, "there is room again")

    def test_connections_of_a_nodes_session_do_not_count_for_their_address(self) -> None:
        service = self.serve()
        node = self.node()
        service._edge._bounds.max_connections = 10
        clients = [self.connect() for _ in range(4)]
        for number, client in enumerate(clients):
            client.sendall(request("POST", f"/nodes/{node['node_id']}/heartbeat?session=s"))
            self.assertEqual(self.one_answer(client)[0], 200, number)
        for _ in range(5):
            client = self.connect()
            client.sendall(HEALTH)
            self.assertEqual(self.one_answer(client)[0], 200)
        self.assertEqual(answers(all_of(self.connect()))[0][0], 503)

    def test_a_node_has_so_many_connections_that_do_not_count_and_a_few_places_stay_free(
        self,
    ) -> None:
        service = self.serve(MAX_OF_NODE=3, FEW_CONNECTIONS=2)
        bounds = ffdist.Bounds(32, LOG)
        for _ in range(3):
            self.assertTrue(bounds.enter("a") and bounds.excuse("a", "n"))
        self.assertTrue(bounds.enter("a"))
        self.assertFalse(bounds.excuse("a", "n"), "it counts for its address")
        entered = sum(bounds.enter(address) for address in "ab" for _ in range(32))
        self.assertEqual(entered, 32 - 4 - 2, "the last places")
        self.assertTrue(bounds.enter("d") and bounds.enter("e"))
        self.assertFalse(bounds.enter("f"), "it is full")
        for _ in range(3):
            bounds.leave("a", "n")
        self.assertTrue(bounds.enter("f"))
        self.assertEqual(service._edge._bounds.held_bytes, 0)

    def test_the_disk_of_large_bodies_may_be_stuck_or_full(self) -> None:
        service = self.serve()
        large = request("POST", "/jobs", [{**JOB, "note": "x" * 100_000}])
        stuck = threading.Event()
        real = ffdist.tempfile.TemporaryFile

        def slow(**options: Any) -> Any:
            stuck.wait(20)
            return real(**options)
        with mock.patch.object(ffdist.tempfile, "TemporaryFile", slow):
            client = self.connect()
            client.sendall(large)
            states = service._edge._connections
            wait_for(lambda: [each.state for each in states] == [ffdist.FILING])
            self.assertEqual(call(service.url, "GET", "/health").status, 200)
            stuck.set()
            self.assertEqual(self.one_answer(client)[0], 201)
        full = mock.Mock(side_effect=OSError(28, "No space left on device"))
        with mock.patch.object(ffdist.tempfile, "TemporaryFile", full):
            [(status, told)] = answers(all_of(self.sent(large)))
        self.assertEqual(status, 503)
        self.assertIn("No space left on device", told["error"])
        self.assertEqual(service._edge._bounds.filed_bytes, 0)

    def sent(self, raw: bytes) -> socket.socket:
        client = self.connect()
        client.sendall(raw)
        return client

    def test_a_head_and_a_body_that_drip_are_given_up(self) -> None:
        self.serve(HEAD_S=0.3, BODY_S=0.6, SWEEP_S=0.1)
        head, body = self.connect(), self.connect()
        head.sendall(HEALTH[:20])
        body.sendall(request("POST", "/jobs", JOB)[:-5])
        self.assertEqual([status for status, _ in answers(all_of(head))], [408])
        [(status, told)] = answers(all_of(body))
        self.assertEqual(status, 408)
        self.assertRegex(told["error"], r"the body did not arrive: (\d+) of \d+ bytes came")

    def test_a_connection_is_kept_between_requests_longer_than_a_head_may_take(self) -> None:
        self.serve(HEAD_S=0.2, SWEEP_S=0.1)
        client = self.connect()
        # Of the pool, of the edge, of a commit; after bytes in pieces, and pipelined ones.
        noted = request("POST", "/jobs", {**JOB, "note": "x" * 5000})
        for raw in (request("GET", "/nodes"), HEALTH, request("POST", "/jobs", JOB), noted):
            client.sendall(raw[:10])
            client.sendall(raw[10:])
            self.assertIn(self.one_answer(client)[0], (200, 201))
            [connection] = self.service._edge._connections
            wait_for(lambda each=connection: each.state == ffdist.READING)
            self.assertGreater(connection.deadline - time.monotonic(), 200)

    def test_an_idle_connection_is_closed_after_its_time(self) -> None:
        self.serve(IDLE_S=0.3, SWEEP_S=0.1)
        client = self.connect()
        client.sendall(HEALTH)
        self.one_answer(client)
        self.assertEqual(all_of(client), b"")

    def test_a_reader_that_does_not_read_is_closed_and_holds_nobody_up(self) -> None:
        self.serve(SEND_S=0.5, SWEEP_S=0.1)
        jobs = [{**JOB, "note": "x" * 5000}] * 900
        call(self.service.url, "POST", "/jobs", jobs)
        client = self.connect()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(request("GET", "/jobs?limit=900") * 3)
        bounds = self.service._edge._bounds
        wait_for(lambda: bounds.unsent_bytes, why="an answer waits for its reader")
        self.assertEqual(call(self.service.url, "GET", "/health").status, 200)
        wait_for(lambda: not self.service._edge._connections, why="it is closed")
        self.assertEqual(bounds.unsent_bytes, 0)

    def test_the_bytes_of_unfinished_requests_are_bounded(self) -> None:
        self.serve(MAX_HELD_BYTES=100_000, MAX_FILED_BYTES=1_000_000)
        small = request("POST", "/jobs", [{**JOB, "note": "x" * 50_000}])[:-10]
        clients = [self.connect() for _ in range(3)]
        for client in clients:
            client.sendall(small)
        wait_for(lambda: any(map(self.has_answer, clients)), why="one is refused")
        refused = [answers(all_of(client)) for client in clients if self.has_answer(client)]
        self.assertEqual({found[0][0] for found in refused}, {503})
        self.assertLess(len(refused), 3, "the first may go on")
        bounds = self.service._edge._bounds
        self.assertLessEqual(bounds.held_bytes, 100_000)

        large = request("POST", "/jobs", [{**JOB, "note": "x" * 600_000}])[:-10]
        others = [self.connect() for _ in range(2)]
        with contextlib.suppress(OSError):
            for client in others:
                client.sendall(large)
        wait_for(lambda: any(map(self.has_answer, others)), why="one is refused")
        refused = [answers(all_of(client)) for client in others if self.has_answer(client)]
        self.assertEqual({found[0][0] for found in refused}, {503})
        self.assertEqual(call(self.service.url, "GET", "/health").status, 200)
        for client in (*clients, *others):
            client.close()
        wait_for(lambda: bounds.held_bytes == bounds.filed_bytes == 0, why="all is given back")

    def test_brackets_are_counted_before_a_body_is_parsed(self) -> None:
        self.serve()
        raw = b"[" + b"[]," * ffdist.MAX_BRACKETS + b"[]]"
        head = (f"POST /jobs HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: "
                f"application/json\r\nContent-Length: {len(raw)}\r\n\r\n").encode()
        [(status, told)] = self.exchange(head + raw)
        self.assertEqual(status, 400)
        self.assertIn("brackets", told["error"])

    def test_one_job_of_many_is_bounded_too(self) -> None:
        self.serve()
        jobs = [JOB, {**JOB, "note": "x" * (1 << 20)}]
        found = call(self.service.url, "POST", "/jobs", jobs)
        self.assertEqual(found.status, 400)
        self.assertEqual(found.body["error"], "job 1 of the array: a job is larger than 1.0 MiB")
        self.assertEqual(call(self.service.url, "GET", "/jobs").body["total"], 0)

    def test_how_deep_a_body_may_be(self) -> None:
        deep = ffdist.MAX_NESTING
        for good in (
            b"[" * deep + b"]" * deep,
            b'{"a":' * deep + b"1" + b"}" * deep,
            b'["' + b"[" * 1000 + b'\\"[[", 1]',
            b"[" + b",".join([b"[[]]"] * 1000) + b"]",
        ):
            ffdist.decode_json(good)
        for bad in (
            b"[" * (deep + 1) + b"]" * (deep + 1),
            b'[{"a":' * deep + b"1" + b"}]" * deep,
            b"[" * 5000,
        ):
            with self.assertRaisesRegex(ApiError, "nested deeper"):
                ffdist.decode_json(bad)


class Crowd(Case):
    """A real master under many connections that want nothing, or half of something."""

    def threads(self, master: Master) -> int:
        status = Path(f"/proc/{master.pid}/status").read_text()
        return int(re.findall(r"Threads:\s+(\d+)", status)[0])

    def test_a_thousand_idle_connections_and_half_bodies_beside_a_working_agent(self) -> None:
        need("ffmpeg", "ffprobe")
        files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, files[1]), files[1]))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, files)
        master = self.master()
        agent = self.agent(master)
        self.addCleanup(agent.end)
        before = self.threads(master)
        half = request("POST", "/jobs", [{**JOB, "note": "x" * 100_000}])[:60_000]
        with contextlib.ExitStack() as stack:
            for number in range(1100):
                client = stack.enter_context(socket.create_connection(("127.0.0.1", master.port)))
                if number % 11 == 0:
                    client.sendall(half)
            self.assertEqual(self.threads(master), before)
            job = master.finished(master.submit("64p25-h264", duration=0.2)["id"])
            self.assertEqual(job["status"], "completed")
            self.assertEqual(self.threads(master), before)
        self.assertEqual(master.get("/health"), {"status": "healthy"})

    def test_parked_agents_cost_no_threads(self) -> None:
        master = self.master()
        before = self.threads(master)
        nodes = [Node(master, f"worker-{number}") for number in range(40)]
        for node in nodes:
            node.park()
        self.assertEqual(self.threads(master), before)


if __name__ == "__main__":
    unittest.main()
