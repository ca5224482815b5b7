"""The floors of the house: imports point downwards, the core needs torch alone, the command starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dnw

ROOT = Path(dnw.__file__).parent
FLOORS = [
    ["_checks", "_files"],
    ["_selection/layout", "_selection/shards"],
    ["_selection/budgets", "_selection/patterns", "_selection/top_k"],
    ["_selection/schedules"],
    ["_rules/layer"],
    ["_rules/pool", "_rules/dormant"],
    ["_rules/rule"],
    ["_rules/estimators", "_rules/thresholds"],
    ["_rules/pruning", "_rules/fixed"],
    ["_rules/prune_and_grow"],
    ["_rules/growing"],
    ["kernels"],
    ["graphs"],
    ["_wiring"],
    ["models", "count"],
    ["compile", "data"],
    ["view"],
    ["circuits"],
    ["recipes"],
    ["train"],
    ["cli"],
]
"""From the ground up: a room imports only from floors below its own."""
CORE = {"_checks", "_files", "_selection", "_rules", "_wiring", "kernels", "graphs", "models", "count", "compile"}
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
FREE = {"__init__", "__main__"}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room that a file is in: the file itself or its folder, whichever has a floor."""
    return room_named(".".join(("dnw", *path.relative_to(ROOT).with_suffix("").parts)))


def room_named(module: str) -> str:
    parts = module.split(".")[1:]
    whole = "/".join(parts[:2])
    return whole if whole in FLOOR else parts[0] if parts else "__init__"


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names of what a file imports, for its annotations alone as well."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def test_every_room_has_a_floor():
    faces = {"_selection", "_rules"}  # the lists of folders whose files have floors of their own
    assert {room_of(path) for path in FILES} - FREE - faces == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    room = room_of(path)
    if room not in FLOOR:
        return
    for name in imports(path):
        other = room_named(name) if name.split(".")[0] == "dnw" else room
        if other in FLOOR and other != room:
            assert FLOOR[other] < FLOOR[room], f"{path.relative_to(ROOT)} imports {name}, which is not below it"


def test_no_cycles_between_files():
    names = {".".join(["dnw", *p.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): p for p in FILES}
    del names["dnw"]  # what is public is listed there, for whoever uses it
    edges = {}
    for name, path in names.items():
        targets = {t if t in names else t.rpartition(".")[0] for t in imports(path, top_level_only=True)}
        edges[name] = {t for t in targets if t in names and t != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in edges[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in names:
        visit(name, ())


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.relative_to(ROOT).parts[0].removesuffix(".py") in CORE],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_the_core_needs_torch_alone(path):
    outside = {name.split(".")[0] for name in imports(path, top_level_only=True)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "dnw"}


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after running some code."""
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


COMMANDS = [
    ["--help"],
    ["recipes"],
    ["recipes", "cifar10"],
    ["completion", "bash"],
    ["train", "--help"],
    ["train", "digits", "--print-config"],
    ["train", "digits", "optim.lr=x"],
    ["train", "digits", "optim.lrr=1"],
    ["train", "mnist", "--data-dir", "/nowhere"],
    ["train", "cifar10", "--data-dir", "/nowhere"],
]


def test_the_command_starts_without_torch():
    """One interpreter runs them all: whatever one of them loads stays loaded, and the first that loads torch is named."""
    code = f"""
import dnw.cli
for arguments in {COMMANDS}:
    try:
        dnw.cli.main(arguments)
    except SystemExit:
        pass
    if "torch" in sys.modules:
        sys.exit(f"{{arguments}} loads torch")
"""
    assert "torch" not in loaded_by(code)


def test_the_core_works_where_nothing_but_torch_is_installed():
    blocked = ["numpy", "pydantic", "lightning_fabric", "rich", "PIL", "scipy", "networkx"]
    code = "\n".join(
        [
            "import warnings; warnings.simplefilter('ignore')",
            f"for name in {blocked}: sys.modules[name] = None",
            "import torch, dnw, dnw.count",
            "model = dnw.models.tiny_digits()",
            "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)",
            "wiring = dnw.wire(model, optimizer, num_edges=100)",
            "model(torch.zeros(2, 1, 8, 8)).sum().backward()",
            "optimizer.step()",
            "assert wiring.num_active == 100, wiring",
            "dnw.count.num_live_nodes(model, wiring); wiring.to_json(); print(wiring.summary())",
        ]
    )
    assert "dnw._wiring.wiring" in loaded_by(code)


@pytest.mark.parametrize("room", dnw._ROOMS)
def test_what_a_room_imports_for_its_users_is_what_it_lists(room):
    tree = ast.parse((ROOT / room / "__init__.py").read_text())
    shown = {alias.asname or alias.name for node in ast.walk(tree) if from_dnw(node) for alias in node.names}
    assert shown == set(getattr(dnw, room).__all__)


def from_dnw(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and str(node.module).startswith("dnw.")


@pytest.mark.parametrize("face", [dnw, dnw.train], ids=lambda m: m.__name__)
def test_a_name_that_is_not_public_is_not_found(face):
    with pytest.raises(AttributeError, match=f"module '{face.__name__}' has no attribute 'nothing'"):
        _ = face.nothing


@pytest.mark.parametrize("face", [dnw, dnw.train], ids=lambda m: m.__name__)
def test_the_two_lists_of_what_is_public_agree(face):
    tree = ast.parse(Path(face.__file__).read_text())
    (checking,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in ast.walk(checking) if isinstance(node, ast.ImportFrom) for alias in node.names}
    listed = {**face._PUBLIC, **dict.fromkeys(getattr(face, "_ROOMS", ()), "dnw")}
    assert seen == listed, "what type checkers see of it is not what is loaded when it is used"


def test_every_rule_is_public():
    missing = [rule.__name__ for rule in dnw.RULES.values() if getattr(dnw, rule.__name__, None) is not rule]
    assert not missing, f"add {missing} to the two lists of dnw/__init__.py"
