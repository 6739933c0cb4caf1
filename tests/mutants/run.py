"""Small wrong versions of the project, each of which a test must fail: a suite that passes one cannot be believed.

The YAML files beside this one list them by package. Each is made in a copy of the project, and the tests that stand
beside it are run there: it is killed if one of them fails. One whose tests pass has survived.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COPIED = ("vim", "kernels", "tools", "configs", "tests", "pyproject.toml")
FAILED = 1  # pytest's exit code where a test failed; others are of tests that could not be collected


@dataclass(frozen=True)
class Mutant:
    """One wrong version.

    Attributes:
        package: the name of its list.
        wrong: what it does, in a few words.
        file: that it changes, from the root.
        old, new: a text that the file has once, and the one that takes its place.
        tests: files or node ids, space between them.
    """

    package: str
    wrong: str
    file: str
    old: str
    new: str
    tests: str

    def text(self, root: Path) -> str:
        """The file's text with the fault in it. Raises ValueError unless the old one is there once."""
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {text.count(self.old)} times {self.old!r}, want it once ({self.wrong})")
        return text.replace(self.old, self.new)


def read_mutants() -> list[Mutant]:
    """All of them, in the order of the lists."""
    return [
        Mutant(path.stem, **entry) for path in sorted(HERE.glob("*.yaml")) for entry in yaml.safe_load(path.read_text())
    ]


def run_tests(copy: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(copy), str(copy / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)


def verdict(copy: Path, mutant: Mutant) -> tuple[str, str]:
    """What became of a mutant: killed, survived or broken; and the first test that failed or what went wrong."""
    file = copy / mutant.file
    sound = file.read_text()
    file.write_text(mutant.text(copy))
    try:
        done = run_tests(copy, mutant.tests.split())
    finally:
        file.write_text(sound)
    failed = [line.split(" - ")[0].split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if done.returncode == FAILED and failed:
        return "killed", failed[0]
    if done.returncode == 0:
        return "survived", ""
    return "broken", (done.stdout + done.stderr)[-1000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those whose list, file or fault holds this text")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 4), help="mutants at a time")
    parser.add_argument("--skip_sound", action="store_true", help="do not first run all their tests without a fault")
    options = parser.parse_args()
    mutants = [m for m in read_mutants() if options.only in f"{m.package} {m.file} {m.wrong}"]
    for mutant in mutants:
        mutant.text(ROOT)
    copies: queue.Queue[Path] = queue.Queue()
    begin, counts = time.monotonic(), {"killed": 0, "survived": 0, "broken": 0}
    with tempfile.TemporaryDirectory() as folder:
        for worker in range(options.workers):
            copy = copy_project(Path(folder) / str(worker))
            if worker == 0 and not options.skip_sound:
                check_sound(copy, mutants)
            copies.put(copy)

        def judge(mutant: Mutant) -> tuple[str, str]:
            copy = copies.get()
            try:
                return verdict(copy, mutant)
            finally:
                copies.put(copy)

        print("| package | wrong version | verdict | by |\n|---|---|---|---|", flush=True)
        with ThreadPoolExecutor(options.workers) as pool:
            for mutant, (what, by) in zip(mutants, pool.map(judge, mutants), strict=True):
                counts[what] += 1
                print(f"| {mutant.package} | {mutant.wrong} | {what} | {by} |", flush=True)
    print(", ".join(f"{count} {what}" for what, count in counts.items()), f"in {time.monotonic() - begin:.0f} s")
    return int(counts["killed"] < len(mutants))


def copy_project(copy: Path) -> Path:
    copy.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


def check_sound(copy: Path, mutants: list[Mutant]) -> None:
    """A test that fails without a fault would kill anything."""
    tests = sorted({test for mutant in mutants for test in mutant.tests.split()})
    print(f"running {len(tests)} test files without a fault", flush=True)
    done = run_tests(copy, tests)
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\nthe tests do not pass without a fault, so they would judge nothing")


if __name__ == "__main__":
    sys.exit(main())
