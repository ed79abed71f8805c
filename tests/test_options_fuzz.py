"""Every option of every training script with values that it does not take: one line, status 2, nothing touched."""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.base.errors import run_main

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("cifar10_resnet_test", "imagenet_resnet_test")
# Tried on every option; those that its type takes are left out.
VALUES = ("", "x", "-1", "0", "1.5", "nan", "inf", "1e999", "4294967296", "²", "[1]", "None;ls", "$(touch trap)")
# Files that options name, and that are not there.
FILES = ("resume", "teacher")


def bad_values(parser, action):
    for value in VALUES:
        try:
            parser._check_value(action, parser._get_value(action, value))
        except argparse.ArgumentError:
            yield value


def cases():
    for script in SCRIPTS:
        parser = importlib.import_module(script).parser()
        for action in parser._actions:
            if not action.option_strings or action.dest == "help":
                continue
            name = action.option_strings[0]
            if action.nargs == 0:
                yield script, [f"{name}=yes"]
                continue
            if action.nargs != "?":
                yield script, [name]
            for value in bad_values(parser, action):
                yield script, [f"{name}={value}"]
                if action.nargs == "+":
                    yield script, [name, "1", value]
            if action.dest in FILES:
                yield script, ["nowhere", name, "absent.pth.tar"]
                yield script, ["nowhere", name, "."]
        yield script, ["--no_such_option", "1"]
        yield script, ["nowhere/at/all", *(["--dataset", "folder"] if script.startswith("cifar") else [])]
        yield script, ["absent", "--save_path", __file__ + "/x"]


# What both scripts share is tried with one of them.
CASES = list({tuple(flags): (script, flags) for script, flags in cases()}.values())
assert len(CASES) >= 150


@pytest.fixture(scope="module")
def empty_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


@pytest.mark.parametrize(
    ("script", "flags"), CASES, ids=lambda value: " ".join(value) if isinstance(value, list) else value[:5]
)
def test_one_line_and_status_2(script, flags, empty_folder, monkeypatch, capsys):
    monkeypatch.chdir(empty_folder)
    main = importlib.import_module(script).main
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: main(flags))
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    assert "Traceback" not in printed.out + printed.err
    named = flags[0].partition("=")[0] if flags[0].startswith("--") else flags[2] if len(flags) == 3 else ""
    assert (f"'{named}'" if named in ("absent.pth.tar", ".") else named) in printed.err
    assert os.listdir(empty_folder) == []


def test_from_the_shell(tmp_path):
    command = [sys.executable, str(ROOT / "imagenet_resnet_test.py"), "--k", "nan"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []
