"""The report of a failure that several tests share."""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

@pytest.fixture(scope="module")
def server():
    raise RuntimeError("no server")

def test_a(server): ...
def test_b(server): ...
def test_c(): raise RuntimeError("alone")
def test_d(): raise RuntimeError("alone")
@pytest.mark.parametrize("number", [1, 2])
def test_e(server, number): ...
"""


def test_a_shared_failure_is_shown_once_and_every_test_fails(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "--rootdir", str(tmp_path), "-p", "shared_failures", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert re.search(r"= 2 failed, 4 errors in ", done.stdout), done.stdout
    shown = re.findall(r"^E +RuntimeError: (.*)$", done.stdout, re.M)
    assert sorted(shown) == ["alone", "alone", "no server"]
    assert done.stdout.count("\nthe same failure as in test_it.py::test_a\n") == 3
