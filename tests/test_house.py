"""The house: rooms import downwards only, one name stands for one thing, --help loads what it needs."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# From the ground up; rooms on one floor do not import each other.
FLOORS = {"AHSG_HT": 0, "utils.base": 0, "data": 1, "models": 1, "utils.small": 2, "utils.prune": 3, "utils.train": 4}
FLOORS |= {"utils.tables": 5, "utils.bench": 5}
TOP = 6  # scripts and commands
# What every script and command has, and names whose meaning is the same wherever they stand.
COMMON = {"main", "parser", "settings", "parse_args", "load_images", "build_network", "load", "bench"}
FILES = [*ROOT.glob("*.py"), *(path for room in ("data", "models", "utils") for path in (ROOT / room).rglob("*.py"))]


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    return next((room for room in FLOORS if module == room or module.startswith(f"{room}.")), None)


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_imports_go_down():
    wrong, seen = [], 0
    for path in FILES:
        own = room_of(module_of(path))
        for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
            room = room_of(module)
            is_ours = room or module.split(".")[0] in ("utils", "cifar10_resnet_test", "imagenet_resnet_test")
            seen += bool(is_ours)
            if is_ours and own != room and FLOORS.get(room, TOP) >= FLOORS.get(own, TOP):
                wrong.append(f"{path.name} imports {module}")
    assert not wrong and seen > 200


def test_one_name_stands_for_one_thing():
    where = defaultdict(set)
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in COMMON:
                where[node.name].add(path.name)
    assert {name: files for name, files in where.items() if len(files) > 1} == {}
    names = [path.name for path in FILES if path.name != "__init__.py"]
    assert len(names) == len(set(names))


def test_help_loads_neither_scipy_nor_matplotlib():
    code = "import sys, cifar10_resnet_test as s; s.parser().format_help(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = found.stdout.split()
    assert "utils.train.trainer" in modules and not {"scipy", "matplotlib"} & set(modules)
