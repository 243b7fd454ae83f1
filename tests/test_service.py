"""The threads behind a master: loops that no error ends."""
from __future__ import annotations

import logging
import threading
import time
import unittest

from agent import ApiError
from ffdist import Loop
from tests.support import listening_log, wait_for


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

    def test_a_refusal_of_the_master_is_no_error_of_the_loop(self) -> None:
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
