"""The threads behind a master: the log beside the answers, loops that no error ends."""
from __future__ import annotations

import io
import logging
import threading
import time
import unittest
from unittest import mock

import ffdist
from agent import ApiError
from ffdist import LogWriter, Loop, write_log_behind
from tests.support import listening_log, wait_for


class SlowStream(io.StringIO):
    """A terminal that takes its time: each write waits until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0
        self.may_write = threading.Event()
        self.may_write.set()

    def write(self, text: str) -> int:
        self.may_write.wait()
        self.writes += 1
        return super().write(text)


class TestLogWriter(unittest.TestCase):
    def setUp(self) -> None:
        self.stream = SlowStream()
        self.log = logging.Logger("behind")
        target = logging.StreamHandler(self.stream)
        target.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        self.log.addHandler(target)
        [self.writer] = write_log_behind(self.log)
        self.addCleanup(self.writer.close)
        self.addCleanup(self.stream.may_write.set)

    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    def test_an_event_does_not_wait_for_the_stream(self) -> None:
        self.stream.may_write.clear()
        began = time.monotonic()
        for number in range(1000):
            self.log.info("job %d", number)
        self.assertLess(time.monotonic() - began, 5)
        self.assertEqual(self.lines(), [])
        self.stream.may_write.set()
        wait_for(lambda: len(self.lines()) == 1000)

    def test_a_stream_that_is_stuck_holds_nobody_up_and_lines_too_many_are_counted(self) -> None:
        self.stream.may_write.clear()
        with mock.patch.object(ffdist, "MAX_LOG_WAITING", 50):
            self.log.info("first")
            wait_for(lambda: not self.writer._records, why="the thread is stuck with it")
            for number in range(200):
                self.log.warning("job %d", number)
            self.stream.may_write.set()
            wait_for(lambda: len(self.lines()) == 52)
        self.assertEqual(self.lines()[-1], "150 lines of the log were dropped")

    def test_lines_keep_their_text_and_order_and_share_a_write(self) -> None:
        for number in range(500):
            self.log.info("job %d of %s", number, "node")
        wait_for(lambda: len(self.lines()) == 500)
        self.assertEqual(self.lines(), [f"INFO job {number} of node" for number in range(500)])
        self.assertLess(self.stream.writes, 250)

    def test_a_warning_is_written_at_once_after_all_before_it(self) -> None:
        self.log.info("first")
        self.log.warning("second")
        with mock.patch.object(ffdist, "LOG_DELAY_S", 60):
            wait_for(self.lines, why="nobody waits for others")
        self.assertEqual(self.lines(), ["INFO first", "WARNING second"])

    def test_a_close_leaves_nothing_unwritten(self) -> None:
        self.log.info("last words")
        self.writer.close()
        self.assertEqual(self.lines(), ["INFO last words"])

    def test_threads_lose_no_line(self) -> None:
        def work(name: int) -> None:
            for number in range(300):
                self.log.log(
                    logging.WARNING if number % 50 == 0 else logging.INFO, "%d %d", name, number
                )
        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.writer.close()
        found = [tuple(map(int, line.split()[1:])) for line in self.lines()]
        self.assertEqual(
            sorted(found), [(name, number) for name in range(8) for number in range(300)]
        )
        for name in range(8):
            own = [number for who, number in found if who == name]
            self.assertEqual(own, sorted(own), "each thread's lines are in its order")

    def test_a_stream_that_has_gone_and_a_line_that_cannot_be_made_cost_only_themselves(
        self,
    ) -> None:
        raising, logging.raiseExceptions = logging.raiseExceptions, False
        self.addCleanup(setattr, logging, "raiseExceptions", raising)
        self.log.warning("%d", "not a number")
        self.log.warning("good")
        wait_for(self.lines)
        self.assertEqual(self.lines(), ["WARNING good"])
        self.stream.close()
        self.log.warning("nobody reads this")

    def test_only_handlers_of_streams_are_replaced(self) -> None:
        log, messages = listening_log()
        self.assertEqual(write_log_behind(log), [])
        log.info("at once")
        self.assertEqual(messages, ["at once"])
        self.assertIsInstance(self.log.handlers[0], LogWriter)


class TestLoop(unittest.TestCase):
    def test_an_error_is_logged_once_and_the_loop_goes_on(self) -> None:
        log, messages = listening_log(logging.ERROR)
        calls: list[int] = []

        def step() -> None:
            calls.append(1)
            if len(calls) < 4:
                raise KeyError("x" if len(calls) < 3 else "y")
        loop = Loop("house", 0.001, step, log)
        loop.start()
        wait_for(lambda: len(calls) > 5)
        loop.end()
        loop.join()
        self.assertEqual(messages, ["house failed and goes on: KeyError: 'x'",
                                    "house failed and goes on: KeyError: 'y'"])

    def test_a_refusal_of_the_master_is_not_an_error_of_the_loop(self) -> None:
        log, messages = listening_log(logging.INFO)

        def refuse() -> None:
            raise ApiError(503, "the journal cannot be written")
        Loop("house", 1, refuse, log).step()
        self.assertEqual(messages, [])

    def test_the_end_does_not_wait_longer_than_its_patience(self) -> None:
        stuck = threading.Event()
        self.addCleanup(stuck.set)
        loop = Loop("stuck", 1, stuck.wait, logging.Logger("quiet"), patience_s=0.05)
        loop.start()
        loop.end()
        began = time.monotonic()
        loop.join()
        self.assertLess(time.monotonic() - began, 10)


if __name__ == "__main__":
    unittest.main()
