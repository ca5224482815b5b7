"""What the documentation says is so: commands parse, links lead somewhere, tables and figures agree with code and results."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from pages import PAGES, ROOT, anchors, commands_in_prose, links, prose, section, shell_lines, table, text_of

import dnw
from dnw import cli
from dnw.cli._arguments import make_parser
from dnw.recipes import RECIPES

# --- links and commands ---


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for path, anchor in links(page):
        target = (folder / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page} links to {path}, which is not there"
        if anchor:
            name = str(target.relative_to(ROOT))
            assert anchor in anchors(name), f"{page} links to {path}#{anchor}; {name} has {sorted(anchors(name))}"


def test_every_page_is_in_the_readme():
    missing = set(PAGES) - {"README.md"} - {path for path, _ in links("README.md")}
    assert not missing, f"the table of pages in the README lacks {sorted(missing)}"


COMMANDS = list(dict.fromkeys(shell_lines() + commands_in_prose()))
PLACEHOLDERS = {"COMMAND", "...", "RUN...", "FILE.json"}
"""Words that stand for others: a command with one is read as far as its verb."""


def words_of(program: str) -> list[tuple[str, list[str]]]:
    """The arguments of the commands that run a program, each with its page."""
    found = []
    for page, command in COMMANDS:
        words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
        if words[0] == program:
            found.append((f"{page}: {command}", words[1:]))
    return found


@pytest.mark.parametrize(("command", "arguments"), words_of("dnw"), ids=[command for command, _ in words_of("dnw")])
def test_commands_of_dnw_parse(command, arguments, capsys):
    """Their settings are resolved, too, which needs neither data nor torch."""
    parser = make_parser()
    (verbs,) = [action.choices for action in parser._actions if action.choices]
    assert arguments[0] in {*verbs, "--help", *PLACEHOLDERS}, f"there is no verb {arguments[0]!r}"
    if len(arguments) == 1 or "--help" in arguments or PLACEHOLDERS & set(arguments):
        return
    parsed, rest = parser.parse_known_args(arguments)
    settings = [*getattr(parsed, "overrides", []), *rest]
    recipe = getattr(parsed, "recipe", getattr(parsed, "target", None))
    if arguments[0] == "resume":  # of some run
        assert all(re.fullmatch(r"epochs=\d+", setting) for setting in settings)
        return
    key, _, values = getattr(parsed, "over", "").partition("=")
    for last in [f"{key}={value}" for value in values.split(",")] if key else [None]:
        changed = [*settings, last] if last else settings
        if recipe in RECIPES or changed:
            assert cli.main(["train", recipe, *changed, "--print-config"]) == 0, capsys.readouterr().err


def test_targets_of_make_are_there():
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    asked = {word for _, words in words_of("make") for word in words}
    assert asked, "the pages ask for nothing of make"
    assert asked <= targets


def test_programs_are_there():
    for command, words in words_of("python"):
        assert (ROOT / words[0]).exists() or words[0] == "-m", command


def test_extras_are_those_of_the_package():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    extras = set(project["optional-dependencies"])
    listed = {
        row["`pip install`"].strip("`'").removeprefix(".[").rstrip("]") for row in table("docs/command.md", "`pip install`")
    }
    assert listed == extras - {"dev"}
    for page in PAGES:
        named = {extra for group in re.findall(r"(?:dnw|\.)\[([a-z,]+)\]", text_of(page)) for extra in group.split(",")}
        assert named <= extras, f"{page} speaks of the extras {named - extras}"


def test_recipes_that_are_named_are_there():
    for row in table("docs/command.md", "recipes"):
        for pattern in re.findall(r"`([\w*]+)`", row["recipes"]):
            assert any(re.fullmatch(pattern.replace("*", ".*"), name) for name in RECIPES), pattern


# --- the README ---


def test_the_number_of_rules_and_concepts_is_the_one_written():
    concepts = re.findall(r"^\*\*([^*]+)\.\*\* ", prose("docs/concepts.md"), re.MULTILINE)
    assert len(concepts) == 8, f"the README and docs/concepts.md speak of eight concepts; there are {concepts}"


def test_the_readme_is_short():
    assert 70 <= len(text_of("README.md").splitlines()) <= 90


@pytest.mark.parametrize("row", table("README.md", "", "measured"), ids=lambda row: row["in"])
def test_figures_of_the_readme_stand_in_the_results(row):
    page, anchor = re.fullmatch(r"\[.*\]\((.*)#(.*)\)", row["in"]).groups()
    found = section(page, anchor)
    missing = [number for number in re.findall(r"\d+[.,]\d+", row["measured"]) if number not in found]
    assert not missing, f"{missing} do not stand under #{anchor} of {page}"


# --- tables ---


@pytest.mark.parametrize("row", table("docs/graphs.md", "in `dnw.models`"), ids=lambda row: row["in `dnw.models`"])
def test_the_sizes_of_the_networks(row):
    graphs = dnw.count.graphs_of(getattr(dnw.models, row["in `dnw.models`"].strip("`"))()).values()
    candidates = sum(int(mask.count_nonzero()) for graph in graphs for mask in graph.edge_candidates().values())
    found = {"nodes": f"{sum(graph.num_nodes for graph in graphs):,}", "candidate edges": f"{candidates:,}"}
    assert found == {title: row[title] for title in found}


RULE_ROWS, FLAG_ROWS = table("docs/rules.md", "rule, with its settings"), table("docs/rules.md", "rule", "chosen by")


def written_call(row: dict[str, str]) -> ast.Call:
    call = ast.parse(row["rule, with its settings"].strip("`"), mode="eval").body
    assert isinstance(call, ast.Call)
    return call


@pytest.mark.parametrize("name", dnw.RULES)
def test_the_settings_of_every_rule_are_in_the_table(name):
    rule = dnw.RULES[name]
    settings = {f.name: f.default for f in dataclasses.fields(rule)}
    given = [setting for setting, default in settings.items() if default is dataclasses.MISSING]
    parts = [*given, *(f"{setting}={default!r}" for setting, default in settings.items() if setting not in given)]
    wanted = f"| `{rule.__name__}({', '.join(parts)})` | `{name}` |"
    rows = [row for row in RULE_ROWS if row["rule, with its settings"].startswith(f"`{rule.__name__}(")]
    where = f"docs/rules.md, first table: the row of {rule.__name__} should begin {wanted}"
    assert len(rows) == 1, where
    call = written_call(rows[0])
    written = {arg.id: dataclasses.MISSING for arg in call.args}  # type: ignore[attr-defined]
    written |= {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert written == settings, f"docs/rules.md, first table: the row of {rule.__name__} should begin {wanted}"
    assert rows[0]["in commands"] == f"`{name}`", (
        f"docs/rules.md, first table: the row of {rule.__name__} should begin {wanted}"
    )


def flags_in_words(rule: dnw.Rule) -> dict[str, tuple[str, str]]:
    """What the cell of each column has to say of a rule, as a pattern for its whole, and from which of the rule's flags."""
    patterns = {"N:M": dnw.NOfM(2, 4), "blocks": dnw.Blocks(2, 2), "channels": dnw.Channels()}
    fits = [word for word, pattern in patterns.items() if rule.fits(pattern)]
    words = "all" if len(fits) == len(patterns) else ", ".join(fits) or "none"
    chosen = [
        f"{'(?=' if flag else '(?!'}.*{word})"
        for word, flag in (
            ("gradient", rule.selects_by_gradient),
            ("momentum", rule.needs_momentum),
            ("never change", rule.fixed),
            ("between layers", rule.redistributes),
        )
    ]
    yes_or_no = {True: r"yes\b.*", False: r"no\b.*"}
    return {
        "chosen by": ("".join(chosen) + ".*", "selects_by_gradient, needs_momentum, fixed, redistributes"),
        "gradient of dormant edges": (yes_or_no[rule.needs_dormant_gradient], "needs_dormant_gradient"),
        "weights of their own": (yes_or_no[rule.has_latent_weights], "has_latent_weights"),
        "floor per target": (yes_or_no[rule.fits_floors], "fits_floors"),
        "patterns": (rf"{words}(;.*)?", "fits"),
        "evaluated on": (r".*\bsettled" if rule.settles else "as trained", "settle"),
    }


@pytest.mark.parametrize("name", dnw.RULES)
def test_the_flags_of_every_rule_are_as_the_table_says(name):
    rule = dnw.RULES[name]()
    rows = [row for row in FLAG_ROWS if row["rule"] == f"`{type(rule).__name__}`"]
    assert len(rows) == 1, f"docs/rules.md, second table: {len(rows)} rows of {type(rule).__name__}; expected one"
    for column, (pattern, flags) in flags_in_words(rule).items():
        said = rows[0][column]
        assert re.fullmatch(pattern, said), (
            f"docs/rules.md, second table, {type(rule).__name__}: column {column!r} says {said!r}; by the class ({flags}) it "
            f"should match {pattern!r}"
        )


def test_the_tables_name_no_other_rules():
    classes = {rule.__name__ for rule in dnw.RULES.values()}
    assert {written_call(row).func.id for row in RULE_ROWS} == classes  # type: ignore[attr-defined]
    assert {row["rule"].strip("`") for row in FLAG_ROWS} == classes


def test_fixed_rules_and_settled_ones_are_named():
    settled = [rule.__name__ for rule in dnw.RULES.values() if rule().settles]
    assert settled == ["TargetedDropout"], "README.md, docs/wiring.md and docs/choosing.md name targeted dropout alone"


# --- docs/choosing.md ---


def test_every_rule_can_be_chosen():
    advice = "\n".join(row["take"] for row in table("docs/choosing.md", "you want"))
    missing = [rule.__name__ for rule in dnw.RULES.values() if f"`{rule.__name__}(" not in advice and rule is not dnw.L1Anneal]
    assert not missing, f"docs/choosing.md has no need that leads to {missing}"


def test_what_was_measured_here_stands_in_the_results():
    results = text_of("docs/results.md")
    rows = [(row[first], row) for first in ("rule", "rule and settings") for row in table("docs/choosing.md", first)]
    cells = [(rule, cell) for rule, row in rows for title, cell in row.items() if title.startswith("here")]
    missing = [
        (rule, number) for rule, cell in cells for number in re.findall(r"\d+\.\d+", cell) if f"{number}%" not in results
    ]
    assert not missing, f"docs/results.md does not have {missing}"


def test_the_hooks_of_a_rule_are_in_the_tables():
    own = {name: value for name, value in vars(dnw.Rule).items() if not name.startswith("_")}
    derived = {name for name, value in own.items() if isinstance(value, property)}
    methods = {row["method"].strip("`").partition("(")[0] for row in table("docs/extending.md", "method")}
    flags = {row["flag"].strip("`"): row["default"] for row in table("docs/extending.md", "flag")}
    assert methods | set(flags) == set(own) - derived, "docs/extending.md: the tables of methods and flags of a rule"
    assert {name: own[name] for name in flags if name != "dormant"} == {
        name: ast.literal_eval(default.strip("`")) for name, default in flags.items() if name != "dormant"
    }


# --- tables from stored results ---


def test_the_table_of_transformers_is_that_of_the_stored_results():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "transformer.py", "--table"], capture_output=True, text=True, check=True
    )
    (shown,) = re.findall(r"<!-- table transformers -->\n(.*?)\n<!-- end -->", text_of("docs/circuits.md"), re.DOTALL)
    assert shown.strip() == done.stdout.strip()
