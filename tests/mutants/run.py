"""Mutation testing: run the tests on slightly wrong versions of the project, which they must detect.

The YAML files in this folder list the mutants by package. Each mutant is made in a copy of the project, and its tests
run there. A mutant is killed if a test fails, and survives if all pass.
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
FAILED = 1  # pytest's exit code if a test failed; others mean that tests could not run


@dataclass(frozen=True)
class Mutant:
    """One wrong version.

    Attributes:
        package: name of the YAML file.
        wrong: the fault in a few words.
        file: the changed file, relative to the root.
        old, new: a text that occurs once in the file, and its replacement.
        tests: files or node ids, separated by spaces.
    """

    package: str
    wrong: str
    file: str
    old: str
    new: str
    tests: str

    def text(self, root: Path) -> str:
        """The file's text with the fault. Raises ValueError unless `old` occurs once."""
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            count = text.count(self.old)
            raise ValueError(f"{self.file} contains {self.old!r} {count} times, want it once ({self.wrong})")
        return text.replace(self.old, self.new)


def read_mutants() -> list[Mutant]:
    """All mutants, in the order of the files."""
    return [
        Mutant(path.stem, **entry) for path in sorted(HERE.glob("*.yaml")) for entry in yaml.safe_load(path.read_text())
    ]


def run_tests(copy: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(copy), str(copy / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)


def verdict(copy: Path, mutant: Mutant) -> tuple[str, str]:
    """Test a mutant. Returns killed, survived or broken; and the first test that failed, or the error output."""
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
    parser.add_argument("--only", default="", help="only mutants whose list, file or fault contains this text")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 4), help="mutants tested in parallel")
    parser.add_argument("--skip_sound", action="store_true", help="skip the first run of the tests without a fault")
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
    """Run the tests without a fault: a test that fails here would kill every mutant."""
    tests = sorted({test for mutant in mutants for test in mutant.tests.split()})
    print(f"running {len(tests)} test files without a fault", flush=True)
    done = run_tests(copy, tests)
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\nthe tests fail without a fault; mend them first")


if __name__ == "__main__":
    sys.exit(main())
