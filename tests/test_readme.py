"""The README has all there is, and its commands can be typed as they are."""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shlex
import unittest
from collections.abc import Iterator, Sequence

import agent
import ffdist
import hwdetect
from tests import __main__ as suite
from tests.support import TOP

TEXT = (TOP / "README.md").read_text(encoding="utf-8")
CODE = set(re.findall(r"`([^`\n]+)`", TEXT))


def blocks(*languages: str) -> Iterator[str]:
    """Yield the fenced blocks of some languages."""
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL):
        if language in languages:
            yield body


def commands() -> Iterator[list[str]]:
    """Yield the commands of the shell blocks as words."""
    for block in blocks("sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def rows(head: str) -> list[list[str]]:
    """Return the cells of the table whose first head cell is `head`."""
    lines = TEXT.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {head} |"))
    found = []
    for line in lines[start + 2:]:
        if not line.startswith("|"):
            break
        found.append(re.split(r"\s*\|\s*", line.strip())[1:-1])
    return found


def names_of(cells: Sequence[Sequence[str]], column: int = 0) -> set[str]:
    """Return what stands in backticks in one column, without what follows a name."""
    return {word.split()[0] for row in cells for word in re.findall(r"`([^`]+)`", row[column])}


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the long flags of a parser and of its subcommands."""
    found: set[str] = set()
    for action in parser._actions:
        found |= {
            flag for flag in action.option_strings if flag.startswith("--") and flag != "--help"
        }
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                found |= flags_of(sub)
    return found


def all_or_none(
    test: unittest.TestCase, parser: argparse.ArgumentParser, words: Sequence[str]
) -> None:
    """Let a real parser read a command."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            parser.parse_args(words)
    except SystemExit:
        test.fail(f"{shlex.join(words)}: {heard.getvalue()}")


class Complete(unittest.TestCase):
    def test_every_subcommand(self) -> None:
        self.assertEqual(names_of(rows("Command")), set(ffdist.COMMANDS))

    def test_every_flag_of_ffdist(self) -> None:
        listed = {flag for flag in names_of(rows("Flag of ffdist.py")) if flag.startswith("--")}
        self.assertEqual(listed, flags_of(ffdist.build_parser()))

    def test_every_flag_stands_beside_its_commands(self) -> None:
        listed: dict[str, set[str]] = {}
        for row in rows("Flag of ffdist.py"):
            words = set(row[1].replace("all but ", "").replace(" and ", ", ").split(", "))
            named = set(ffdist.COMMANDS) - words if row[1].startswith("all but") else words
            for flag in names_of([row]):
                listed[flag] = listed.get(flag, set()) | named
        for flag in {known.name for command in ffdist.COMMANDS.values() for known in command.flags}:
            having = {name for name, command in ffdist.COMMANDS.items()
                      if flag in {known.name for known in command.flags}}
            self.assertEqual(listed[flag], having, flag)

    def test_every_flag_of_the_agent(self) -> None:
        listed = {flag for flag in names_of(rows("Flag of agent.py")) if flag.startswith("--")}
        self.assertEqual(listed, flags_of(agent.build_parser(False)))
        for flag in flags_of(agent.build_parser(True)):
            self.assertIn(flag, CODE)

    def test_the_tests_take_no_abbreviated_flag(self) -> None:
        heard = io.StringIO()
        with contextlib.redirect_stderr(heard), self.assertRaises(SystemExit):
            suite.build_parser().parse_args(["--slo"])
        self.assertIn("unrecognized arguments: --slo", heard.getvalue())

    def test_every_flag_of_hwdetect(self) -> None:
        self.assertEqual(names_of(rows("Flag of hwdetect.py")),
                         {"--version", *(flag.name for flag in hwdetect.FLAGS)})

    def test_defaults_of_flags(self) -> None:
        known = {flag.name: flag for flag in (*agent.COMMON_FLAGS, *agent.AGENT_FLAGS)}
        for name, default, *_ in rows("Flag of agent.py"):
            for flag in re.findall(r"`(--[a-z-]+)`", name):
                value = known[flag].default if flag in known else None
                if isinstance(value, str) and value:
                    self.assertIn(f"`{value}`", default, flag)

    def test_every_route(self) -> None:
        listed = [(row[0], row[1].strip("`")) for row in rows("Method")]
        self.assertEqual(listed, [(route.method, route.path) for route in ffdist.ROUTES])

    def test_every_parameter_with_its_limits_and_words(self) -> None:
        table = rows("Parameter")
        self.assertEqual(names_of(table), set(agent.PARAMETERS))
        for row in table:
            for name in names_of([row]):
                rule = agent.PARAMETERS[name]
                for word in rule.words:
                    self.assertIn(f"`{word}`", row[1], name)
                if rule.kind in ("whole", "size", "rate"):
                    self.assertIn(f"{rule.low:g} to {rule.high:.0f}", row[1], name)

    def test_every_metric_of_a_result(self) -> None:
        made = agent.metrics_of(agent.Outcome("completed"))
        listed = names_of([row for row in rows("Metric") if row]) | names_of(rows("Figure"))
        self.assertEqual(listed, set(made) - {"unknown"})

    def test_every_formula(self) -> None:
        listed = {row[0].strip("`"): row[1].strip("`") for row in rows("Figure")}
        self.assertEqual(listed, agent.FORMULAS)

    def test_limits_of_measuring(self) -> None:
        self.assertEqual(
            (
                hwdetect.IDLE_FIRST_S,
                hwdetect.IDLE_S,
                hwdetect.IDLE_REST_S,
                hwdetect.IDLE_EVERY_S,
                hwdetect.IDLE_BUSY_PERCENT,
            ),
            (3, 10, 30, 600, 10),
        )
        self.assertEqual((agent.MIN_RUNS, agent.MAX_RUNS, agent.MAX_INTERVAL, agent.REPEATS_S),
                         (3, {"medium": 10, "high": 20}, {"medium": 0.05, "high": 0.02}, 3600))
        self.assertEqual((hwdetect.MAX_SERIES, agent.BASELINE_S), (240, 60))

    def test_every_metric_that_the_master_adds(self) -> None:
        self.assertEqual(names_of(rows("Added by the master")), set(ffdist.PRICED))

    def test_every_field_of_an_experiment(self) -> None:
        self.assertEqual(names_of([[row[0]] for row in rows("Field of an experiment")]),
                         set(ffdist.EXPERIMENT_FIELDS))

    def test_every_recommendation(self) -> None:
        listed = {row[0].strip("`"): row[1] for row in rows("Recommendation")}
        self.assertEqual(listed, agent.RECOMMENDATIONS)

    def test_every_metric_of_the_master(self) -> None:
        listed = re.findall(r"^\| `(ffdist_\w+)` \| (.+?) \| (.+?) \| (.+) \|$", TEXT, re.MULTILINE)
        self.assertEqual(listed, [(metric.name, metric.kind, metric.place, metric.about)
                                  for metric in ffdist.METRICS])

    def test_every_alert(self) -> None:
        self.assertEqual(
            [row[0] for row in rows("Alert")], [f"`Ffdist{rule.name}`" for rule in ffdist.RULES]
        )

    def test_every_status_and_reason(self) -> None:
        for word in (*ffdist.STATUSES, *ffdist.TRANSIENT, *ffdist.CONFIDENCES):
            self.assertIn(word, CODE)

    def test_exit_codes(self) -> None:
        self.assertEqual([row[0] for row in rows("Exit code")], ["0", "1", "2", "3", "130"])
        codes = {status: ffdist.exit_code_of(agent.ApiError(status, "")) for status in
                 (0, 400, 401, 403, 404, 409, 413, 503)}
        self.assertEqual(codes, {0: 3, 400: 2, 401: 3, 403: 3, 404: 1, 409: 1, 413: 2, 503: 1})


class Exact(unittest.TestCase):
    """What the README shows is accepted by the program as it stands."""

    def test_json_examples_are_accepted(self) -> None:
        experiment, job, node, result = (json.loads(block) for block in blocks("json"))
        self.assertEqual(len(ffdist.experiment_of(experiment, "codecs").jobs), 102)
        self.assertEqual(ffdist.draft_of(job, 3).scenario, "4K60-h264")
        self.assertEqual(ffdist.registration_of(node).name, "worker-01")
        self.assertEqual(ffdist.report_of(result).status, "completed")

    def test_commands_are_read_by_the_real_parsers(self) -> None:
        seen = 0
        for words in commands():
            with self.subTest(shlex.join(words)):
                if words[:2] == ["python3", "ffdist.py"]:
                    all_or_none(self, ffdist.build_parser(), words[2:])
                elif words[:3] == ["python3", "agent.py", "run"]:
                    all_or_none(self, agent.build_parser(True), words[3:])
                elif words[:2] == ["python3", "agent.py"]:
                    all_or_none(self, agent.build_parser(False), words[2:])
                elif words[:3] == ["python3", "-m", "tests"]:
                    all_or_none(self, suite.build_parser(), words[3:])
                elif words[:2] == ["python3", "hwdetect.py"]:
                    all_or_none(self, hwdetect.build_parser(), words[2:])
                else:
                    self.assertIn(words[0], ("curl", "scp", "ping", "ss", "ssh", "python3"))
                seen += 1
        self.assertGreater(seen, 20)

    def test_examples_of_help_are_read_by_the_real_parser(self) -> None:
        for name in ffdist.COMMANDS:
            lines = re.findall(r"^  python3 ffdist.py (.*)$", ffdist.epilog_of(name), re.MULTILINE)
            self.assertTrue(lines, name)
            for line in lines:
                all_or_none(self, ffdist.build_parser(), shlex.split(line))

    def test_submissions_resolve(self) -> None:
        for words in commands():
            if words[:3] == ["python3", "ffdist.py", "submit"]:
                args = ffdist.build_parser().parse_args(words[2:])
                parameters = agent.parameters_of(args.parameters)
                places = {"input": args.input, "output": args.output}
                agent.resolve(
                    args.scenario,
                    {**parameters, **{name: place for name, place in places.items() if place}},
                )

    def test_curl_lines_name_routes_and_send_json(self) -> None:
        for words in commands():
            if words[0] != "curl":
                continue
            url = next(word for word in words if word.startswith("http://"))
            method = words[words.index("-X") + 1] if "-X" in words else "GET"
            ffdist.route_of(method, re.sub(r"^http://[^/]+", "", url).partition("?")[0])
            if "-d" in words:
                ffdist.draft_of(json.loads(words[words.index("-d") + 1]), 3)

    def test_scenarios_named_in_the_text_resolve(self) -> None:
        section = TEXT.split("## Scenarios and parameters")[1].split("```")[0]
        named = re.findall(r"`([A-Za-z0-9]+(?:-[A-Za-z0-9]+)+|transcode|4K60|720p)`", section)
        self.assertIn("4K60-h264", named)
        for word in named:
            agent.resolve(word)

    def test_limits_are_those_of_the_code(self) -> None:
        self.assertEqual(
            (ffdist.BODY_LIMIT_BYTES, ffdist.BULK_LIMIT_BYTES, ffdist.HEAD_LIMIT_BYTES),
            (1 << 20, 10 << 20, 32 << 10),
        )
        self.assertEqual(
            (
                ffdist.MAX_HEADERS,
                ffdist.HEAD_S,
                ffdist.MAX_NESTING,
                ffdist.MAX_LOG_LINES,
                ffdist.MAX_BULK,
                ffdist.MAX_PAGE,
            ),
            (100, 10, 64, 20_000, 10_000, 1000),
        )
        self.assertEqual(
            (
                ffdist.BODY_S,
                ffdist.MAX_BRACKETS,
                ffdist.SEND_S,
                ffdist.IDLE_S,
                ffdist.FILES_WANTED,
                ffdist.FILES_KEPT,
            ),
            (60, 200_000, 60, 300, 65_536, 256),
        )
        settings = ffdist.Settings()
        self.assertEqual((settings.retry_delay_s, settings.retry_delay_most_s), (1, 300))


if __name__ == "__main__":
    unittest.main()
