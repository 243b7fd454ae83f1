"""The rules of the house, read from the source: layers, seams, section maps, sizes, the oldest
Python."""
from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import sysconfig
import unittest
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support import TOP

MODULES = ("ffdist", "agent", "hwdetect")
BANNER = re.compile(r"# ---- (\d+) ([A-Z][A-Za-z]*(?: [A-Z][A-Za-z]*)*) -+")
MAP_ROW = re.compile(r" +(\d+) ([A-Z]\S*(?: \S+)*)  +\S.*")
TOP_LEVEL = {"ffdist.py", "agent.py", "hwdetect.py", "tests", "README.md", "LICENSE"}
DOTFILES = {".ci", ".github", ".gitignore", ".ruff.toml", ".mypy.ini"}
SECTION_LINES = 650
CLASS_LINES = 300
CLASS_METHODS = 20
FUNCTION_LINES = 40
FUNCTION_BRANCHES = 12
TEST_FUNCTION_LINES = 70
COLUMNS = 100
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Section(NamedTuple):
    """One banner: its number, its title, the line it stands on."""

    number: int
    title: str
    line: int


class Source:
    """One module of ours: its text, its tree, its sections."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = (TOP / f"{name}.py").read_text(encoding="utf-8")
        self.tree = ast.parse(self.text, feature_version=(3, 9))
        self.sections = [Section(int(match[1]), match[2], number)
                         for number, line in enumerate(self.text.splitlines(), 1)
                         if (match := BANNER.fullmatch(line))]

    def section_of(self, line: int) -> Section:
        """Return the section that a line stands in (0 for what is above the first banner)."""
        return next((section for section in reversed(self.sections) if section.line <= line),
                    Section(0, "docstring and imports", 0))

    def statements(self) -> Iterator[tuple[Section, ast.stmt]]:
        """Return the statements of the module, each with its section."""
        for statement in self.tree.body:
            yield self.section_of(statement.lineno), statement

    def uses(self, found: Callable[[ast.AST], bool]) -> list[tuple[Section, str, int]]:
        """Return (section, name of the module's own function or class, line) of each node found."""
        return [(section, getattr(statement, "name", ""), node.lineno)
                for section, statement in self.statements() for node in ast.walk(statement)
                if isinstance(node, (ast.expr, ast.stmt)) and found(node)]

    def places(self, found: Callable[[ast.AST], bool]) -> set[str]:
        """Return the titles of the sections in which a node is found."""
        return {section.title for section, _, _ in self.uses(found)}


SOURCES = {name: Source(name) for name in MODULES}


def stored(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names that statements bind in their own scope, not in one that they open."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found |= {node.name, *stored(node.body)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif not isinstance(node, (*COMPREHENSIONS, ast.Lambda)):
            found |= stored(ast.iter_child_nodes(node))
    return found


def reads(node: ast.AST, bound: frozenset[str] = frozenset()) -> Iterator[tuple[str, int]]:
    """Yield (name, line) of what a statement reads of its module, in annotations too."""
    if isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load) and node.id not in bound:
            yield node.id, node.lineno
        return
    parts, inner = list(ast.iter_child_nodes(node)), bound
    if isinstance(node, (*FUNCTIONS, ast.Lambda)):
        body: list[ast.AST] = [node.body] if isinstance(node, ast.Lambda) else [*node.body]
        hints = [arg.annotation for arg in ast.walk(node.args)
                 if isinstance(arg, ast.arg) and arg.annotation]
        hints += [hint for hint in [getattr(node, "returns", None)] if hint]
        outside = [*node.args.defaults, *(value for value in node.args.kw_defaults if value),
                   *getattr(node, "decorator_list", ()), *hints]
        inner = (
            bound
            | {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
            | stored(body)
        )
        parts = body
        for part in outside:
            yield from reads(part, bound)
    elif isinstance(node, COMPREHENSIONS):
        inner = bound | stored(generator.target for generator in node.generators)
    elif isinstance(node, ast.AnnAssign):
        parts = [node.annotation, *([node.value] if node.value else [])]
    for part in parts:
        yield from reads(part, inner)


def imported(tree: ast.AST) -> set[str]:
    """Return the top-level names of the modules that are imported anywhere in a tree."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def is_standard(name: str) -> bool:
    """Tell whether a module comes with Python (3.9 has no list of them)."""
    if name in sys.builtin_module_names:
        return True
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin:
        return False
    if spec.origin in ("built-in", "frozen"):
        return True
    path = Path(spec.origin).resolve()
    homes = [Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib")]
    return "site-packages" not in path.parts and "dist-packages" not in path.parts and any(
        home in path.parents for home in homes)


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` of an attribute chain, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def calls(*patterns: str) -> Callable[[ast.AST], bool]:
    """Return a test for calls whose dotted name fits one of the patterns."""
    pattern = re.compile("|".join(patterns))
    return lambda node: isinstance(node, ast.Call) and bool(pattern.fullmatch(dotted(node.func)))


def branches(function: ast.AST) -> int:
    """Return the branches of a function, counted honestly: also ternaries, and/or, comprehension
    ifs."""
    count = 1
    for node in ast.walk(function):
        count += isinstance(node, (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp))
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += len(node.ifs)
    return count


def lines_of(node: ast.stmt) -> int:
    """Return how many lines a statement takes."""
    return (node.end_lineno or 0) - node.lineno + 1


def docstrings(tree: ast.AST) -> set[int]:
    """Return the ids of the constants that are docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(id(first.value))
    return found


def texts(source: Source, pattern: str) -> set[str]:
    """Return the sections with a text constant, no docstring, that holds a pattern."""
    skipped, wanted = docstrings(source.tree), re.compile(pattern)
    return source.places(lambda node: isinstance(node, ast.Constant) and isinstance(node.value, str)
                         and id(node) not in skipped and bool(wanted.search(node.value)))


class Layers(unittest.TestCase):
    def test_dependencies_run_one_way(self) -> None:
        ours = {name: imported(SOURCES[name].tree) & set(MODULES) for name in MODULES}
        self.assertEqual(ours, {"ffdist": {"agent"}, "agent": {"hwdetect"}, "hwdetect": set()})

    def test_standard_library_only(self) -> None:
        for path in sorted([*TOP.glob("*.py"), *(TOP / "tests").glob("*.py")]):
            with self.subTest(path.name):
                found = imported(ast.parse(path.read_text(encoding="utf-8"))) - {*MODULES, "tests"}
                self.assertEqual([name for name in sorted(found) if not is_standard(name)], [])

    def test_ffdist_uses_only_what_is_shared_of_agent_and_no_private_name(self) -> None:
        rooms = {
            "Wire",
            "Metrics",
            "Messages",
            "Words",
            "Client",
            "Catalogue",
            "Scenario",
            "Statistics",
        }
        shared = {
            name
            for section, statement in SOURCES["agent"].statements()
            if section.title in rooms
            for name in stored([statement])
        }
        shared |= {alias.name for node in SOURCES["agent"].tree.body
                   if isinstance(node, ast.ImportFrom) and node.module == "hwdetect"
                   for alias in node.names if alias.asname == alias.name}
        used = {node.attr for node in ast.walk(SOURCES["ffdist"].tree)
                if isinstance(node, ast.Attribute) and dotted(node.value) == "wire"}
        used |= {
            alias.name
            for node in ast.walk(SOURCES["ffdist"].tree)
            if isinstance(node, ast.ImportFrom) and node.module == "agent"
            for alias in node.names
        }
        self.assertTrue(used)
        self.assertEqual(
            sorted(name for name in used if name not in shared or name.startswith("_")), []
        )

    def test_agent_uses_no_private_name_of_hwdetect(self) -> None:
        used = {node.attr for node in ast.walk(SOURCES["agent"].tree)
                if isinstance(node, ast.Attribute) and dotted(node.value) == "hwdetect"}
        self.assertEqual(sorted(name for name in used if name.startswith("_")), [])

    def test_ffdist_knows_no_hwdetect(self) -> None:
        self.assertNotIn("hwdetect", {node.id for node in ast.walk(SOURCES["ffdist"].tree)
                                      if isinstance(node, ast.Name)})


class TopLevel(unittest.TestCase):
    def test_holds_exactly_what_it_should(self) -> None:
        visible = {path.name for path in TOP.iterdir() if not path.name.startswith(".")} - {
            "__pycache__"
        }
        self.assertEqual(visible, TOP_LEVEL)

    def test_tracked_dotfiles_are_known(self) -> None:
        if not (TOP / ".git").exists():
            hidden = {path.name for path in TOP.iterdir() if path.name.startswith(".")}
            self.assertEqual(hidden - DOTFILES - {".mypy_cache", ".ruff_cache"}, set())
            return
        try:
            listed = subprocess.run(
                ["git", "ls-files"], cwd=TOP, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            self.skipTest(f"git cannot list the files: {error}")
        tracked = {line.split("/")[0] for line in listed.stdout.splitlines()}
        self.assertEqual({name for name in tracked if name.startswith(".")} - DOTFILES, set())


class SectionMaps(unittest.TestCase):
    def test_docstring_maps_equal_the_banners(self) -> None:
        for name, source in SOURCES.items():
            with self.subTest(name):
                words = (ast.get_docstring(source.tree, clean=False) or "").splitlines()
                start = next(
                    number for number, line in enumerate(words) if line.startswith("Sections")
                )
                rows = [match for line in words[start:] if (match := MAP_ROW.fullmatch(line))]
                listed = [(int(match[1]), match[2]) for match in rows]
                self.assertEqual(
                    listed, [(section.number, section.title) for section in source.sections]
                )

    def test_banners_have_one_exact_form(self) -> None:
        for name, source in SOURCES.items():
            with self.subTest(name):
                like = [line for line in source.text.splitlines()
                        if re.match(r"\s*#\s*[-=]{3,}|\s*# -- |# \d+ [A-Z]", line)]
                self.assertEqual([line for line in like if not BANNER.fullmatch(line)], [])
                self.assertEqual(
                    len({len(line) for line in like}), 1, "banners of different lengths"
                )
                numbers = [section.number for section in source.sections]
                self.assertEqual(numbers, sorted(set(numbers)))

    def test_banners_are_alike_in_all_files(self) -> None:
        widths = {name: {len(line) for line in source.text.splitlines() if BANNER.fullmatch(line)}
                  for name, source in SOURCES.items()}
        self.assertEqual(len(set.union(*widths.values())), 1, widths)

    def test_sections_use_only_those_above_them(self) -> None:
        for name, source in SOURCES.items():
            home: dict[str, Section] = {}
            for section, statement in source.statements():
                home.update((word, section) for word in stored([statement]))
            downward = [
                f"{name}.py:{line}: {section.title} uses {word} of {home[word].title}"
                for section, statement in source.statements()
                for word, line in reads(statement)
                if word in home and home[word].number > section.number
            ]
            with self.subTest(name):
                self.assertEqual(downward, [])


    def test_no_name_is_bound_twice(self) -> None:
        """A second section that binds a name would silently change the first one's."""
        for name, source in SOURCES.items():
            bound = [word for statement in source.tree.body for word in stored([statement])
                     if not isinstance(statement, (ast.Import, ast.For, ast.If, ast.Try))]
            with self.subTest(name):
                self.assertEqual(sorted({word for word in bound if bound.count(word) > 1}), [])


class Seams(unittest.TestCase):
    """Each way out of the program has one place."""

    def test_sql_lives_in_the_journal(self) -> None:
        used = SOURCES["ffdist"].places(lambda node: dotted(node).startswith("sqlite3."))
        self.assertEqual(used, {"Store", "Journal"})
        words = (
            r"\b(SELECT .* FROM|INSERT (OR \w+ )?INTO|UPDATE \w+ SET|DELETE FROM|CREATE TABLE"
            r"|PRAGMA)\b"
        )
        self.assertEqual(texts(SOURCES["ffdist"], words), {"Store", "Journal"})
        for name in ("agent", "hwdetect"):
            self.assertEqual(texts(SOURCES[name], words), set())
            self.assertNotIn("sqlite3", imported(SOURCES[name].tree))

    def test_state_is_locked_only_by_its_owner(self) -> None:
        """A ticket's gate is a signal, let through once, and free slots are counted; a lock that
        guards state is held by `with`."""
        locks = calls(r"threading\.(R?Lock|Condition|(Bounded)?Semaphore)")
        for name, owners, signals in (("ffdist", {"Transactions"}, {"Ticket", "Connection"}),
                                     ("agent", {"Agent", "Stopwatch"}, {"FreeSlots"})):
            with self.subTest(name):
                made = {who for _, who, _ in SOURCES[name].uses(locks)}
                self.assertEqual(made - signals, owners)
                held = SOURCES[name].uses(lambda node: isinstance(node, ast.With) and any(
                    dotted(item.context_expr).endswith("_lock") and not dotted(
                        item.context_expr).endswith(".archive_lock") for item in node.items))
                self.assertEqual({who for _, who, _ in held}, owners)
                others = SOURCES[name].uses(lambda node: isinstance(node, ast.Attribute)
                                            and node.attr == "_lock")
                self.assertEqual({who for _, who, _ in others}, owners)

    def test_programs_are_started_in_one_section_of_each_file(self) -> None:
        starts = calls(
            r"subprocess\.(Popen|run|call|check_call|check_output|getoutput|getstatusoutput)",
            r"os\.(system|popen|fork|forkpty|exec\w*|spawn\w*|posix_spawn\w*)",
        )
        found = {name: sorted((section.title, who) for section, who, _ in source.uses(starts))
                 for name, source in SOURCES.items()}
        self.assertEqual(
            found,
            {
                "ffdist": [("Programs", "start_again"), ("Programs", "start_program")],
                "agent": [],
                "hwdetect": [("Host", "Child"), ("Host", "Program")],
            },
        )

    def test_no_shell_anywhere(self) -> None:
        for source in SOURCES.values():
            self.assertEqual(source.uses(lambda node: isinstance(node, ast.Call) and any(
                word.arg == "shell" for word in node.keywords)), [])

    def test_proc_and_sys_belong_to_hwdetect(self) -> None:
        for name in ("ffdist", "agent"):
            self.assertEqual(texts(SOURCES[name], r"(^|[^\w.])/?(proc|sys)/"), set(), name)

    def test_hwdetect_opens_files_only_in_its_host(self) -> None:
        opens = calls("open", r"os\.(open|listdir|scandir|readlink|walk)",
                      r".*\.(read_text|read_bytes|iterdir)")
        self.assertLessEqual(SOURCES["hwdetect"].places(opens), {"Host", "Archive", "CLI"})

    def test_sockets_are_opened_by_the_client_and_the_server_alone(self) -> None:
        reach = re.compile(
            r"(socket|socketserver|urllib\.(request|error)|http\.(client|server))\..*"
        )
        uses = SOURCES["agent"].places(lambda node: isinstance(node, ast.Attribute)
                                       and bool(reach.fullmatch(dotted(node))))
        self.assertEqual(uses, {"Client"})
        uses = SOURCES["ffdist"].places(lambda node: isinstance(node, ast.Attribute)
                                        and bool(reach.fullmatch(dotted(node))))
        self.assertEqual(
            uses - {"Service"}, {"Connections", "Edge"}, "Service tells why a port cannot be opened"
        )
        self.assertEqual(
            imported(SOURCES["hwdetect"].tree) & {"socket", "socketserver", "urllib", "http"}, set()
        )

    def test_what_is_pure_has_no_clock_and_no_files(self) -> None:
        outside = re.compile(
            r"(time\.(time|monotonic|sleep|perf_counter|time_ns)|open|os\.(open|environ|"
            r"path\.(exists|isfile|isdir|getsize|realpath))|"
            r"(subprocess|threading|random)\..*)"
        )
        pure = {
            "ffdist": {
                "Jobs",
                "Messages",
                "State",
                "Placement",
                "Leases",
                "Registry",
                "Fleet",
                "Metrics",
                "Tariff",
                "Pages",
                "HTTP",
                "Experiments",
                "Reports",
            },
            "agent": {
                "Wire",
                "Metrics",
                "Messages",
                "Catalogue",
                "Scenario",
                "Choices",
                "Command",
                "Output",
                "Statistics",
                "Analysis",
            },
            "hwdetect": {"Facts", "Parsers"},
        }
        for name, sections in pure.items():
            with self.subTest(name):
                found = [
                    (section.title, who, line)
                    for section, who, line in SOURCES[name].uses(
                        lambda node: (
                            isinstance(node, (ast.Call, ast.Attribute))
                            and bool(
                                outside.fullmatch(
                                    dotted(node.func if isinstance(node, ast.Call) else node)
                                )
                            )
                        )
                    )
                    if section.title in sections
                ]
                self.assertEqual(found, [])


class Room(unittest.TestCase):
    """How large things may be: what is beautiful at this size is what can be found."""

    def test_sections_have_room(self) -> None:
        for name, source in SOURCES.items():
            starts = [section.line for section in source.sections]
            ends = [*starts[1:], len(source.text.splitlines()) + 1]
            sizes = {
                section.title: end - section.line for section, end in zip(source.sections, ends)
            }
            with self.subTest(name):
                self.assertEqual(
                    {title: size for title, size in sizes.items() if size > SECTION_LINES}, {}
                )

    def test_classes_have_room(self) -> None:
        for name, source in SOURCES.items():
            large = {}
            for node in ast.walk(source.tree):
                if isinstance(node, ast.ClassDef):
                    methods = sum(isinstance(part, FUNCTIONS) for part in node.body)
                    if lines_of(node) > CLASS_LINES or methods > CLASS_METHODS:
                        large[node.name] = (lines_of(node), methods)
            with self.subTest(name):
                self.assertEqual(large, {})

    def test_functions_fit_a_screen_and_branch_little(self) -> None:
        for name, source in SOURCES.items():
            large = {}
            for node in ast.walk(source.tree):
                if isinstance(node, FUNCTIONS):
                    size = (lines_of(node), branches(node))
                    if size[0] > FUNCTION_LINES or size[1] > FUNCTION_BRANCHES:
                        large[f"{node.name}, line {node.lineno}"] = size
            with self.subTest(name):
                self.assertEqual(large, {}, "(lines, branches)")

    def test_no_ternary_stands_in_another(self) -> None:
        for name, source in SOURCES.items():
            nested = [node.lineno for node in ast.walk(source.tree) if isinstance(node, ast.IfExp)
                      and sum(isinstance(part, ast.IfExp) for part in ast.walk(node)) > 1]
            with self.subTest(name):
                self.assertEqual(nested, [])

    def test_lines_fit_100_columns(self) -> None:
        for path in sorted([*TOP.glob("*.py"), *(TOP / "tests").glob("*.py")]):
            rows = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            with self.subTest(path.name):
                self.assertEqual([number for number, row in rows if len(row) > COLUMNS], [])

    def test_tests_fit_a_screen_too(self) -> None:
        for path in sorted((TOP / "tests").glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            long = {f"{node.name}, line {node.lineno}": lines_of(node) for node in ast.walk(tree)
                    if isinstance(node, FUNCTIONS) and lines_of(node) > TEST_FUNCTION_LINES}
            with self.subTest(path.name):
                self.assertEqual(long, {})


class Shape(unittest.TestCase):
    def test_everything_is_in_the_grammar_of_python_3_9(self) -> None:
        for path in sorted([*TOP.glob("*.py"), *(TOP / "tests").glob("*.py")]):
            with self.subTest(path.name):
                text = path.read_text(encoding="utf-8")
                ast.parse(text, feature_version=(3, 9))
                if any(isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)
                       for node in ast.walk(ast.parse(text))):
                    self.assertIn("from __future__ import annotations", text)

    def test_nothing_is_put_off(self) -> None:
        for path in sorted(
            path
            for path in TOP.rglob("*")
            if path.suffix in (".py", ".md")
            and not any(part.startswith(".") for part in path.relative_to(TOP).parts)
        ):
            words = re.findall(
                r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b", path.read_text(encoding="utf-8")
            )
            self.assertEqual(words, [], path.name)

    def test_public_functions_and_classes_say_what_they_are(self) -> None:
        for name, source in SOURCES.items():
            silent = [f"{name}.py:{statement.lineno}: {statement.name}"
                      for _, statement in source.statements()
                      if isinstance(statement, (*FUNCTIONS, ast.ClassDef))
                      and not statement.name.startswith("_") and not ast.get_docstring(statement)]
            with self.subTest(name):
                self.assertEqual(silent, [])

    def test_main_is_the_last_function_and_takes_its_words(self) -> None:
        for name, source in SOURCES.items():
            with self.subTest(name):
                mains = [statement for statement in source.tree.body
                         if isinstance(statement, ast.FunctionDef) and statement.name == "main"]
                self.assertEqual([arg.arg for main in mains for arg in main.args.args], ["argv"])
                self.assertEqual(source.section_of(mains[0].lineno), source.sections[-1])


if __name__ == "__main__":
    unittest.main()
