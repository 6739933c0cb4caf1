"""Kill training runs at random moments, resume them, and compare them with an uninterrupted run, on the CPU.

python tools/prepare_mnist.py data/mnist5k
python tools/kill_and_resume.py runs/killed --signal SIGKILL -- tools/train.py --config configs/kill_test.yaml
python tools/kill_and_resume.py runs/stopped --signal SIGTERM -- tools/train.py --config configs/kill_test.yaml
python tools/kill_and_resume.py runs/warned --signal SIGUSR1 -- tools/train.py --config configs/kill_test.yaml
"""

import argparse
import os
import signal
import sys
from collections import Counter
from pathlib import Path

from vim.console import plain_errors
from vim.console.interruption import NAMES
from vim.experiments.kill_test import KillTest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=os.path.expanduser, help="folder for the runs; must be new")
    parser.add_argument("--runs", type=int, default=20, help="number of runs to kill")
    parser.add_argument("--kills", type=int, default=2, help="signals to send to each run")
    parser.add_argument("--signal", choices=["SIGKILL", *NAMES], default="SIGKILL", help="signal to send")
    parser.add_argument("--jobs", type=int, default=2, help="runs in parallel")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments")
    parser.add_argument("command", nargs="+", help="training tool and its arguments, without --run_dir")
    args = parser.parse_args()
    if signal.getsignal(signal.Signals[args.signal]) == signal.SIG_IGN:
        parser.error(f"{args.signal} is ignored in this process, as under nohup, and in its children; do without nohup")
    with plain_errors():
        test = KillTest(args.command, Path(args.folder), signal.Signals[args.signal], args.kills, args.seed)
        print(f"uninterrupted run: {test.start_seconds:.1f} s to start, {test.run_seconds:.1f} s to run", flush=True)
        killed = test.run_all(args.runs, args.jobs)
    for index, run in enumerate(killed):
        print(f"run {index}: {args.signal} during {', '.join(run.moments)}: {run.differences or 'identical'}")
    identical = sum(not run.differences for run in killed)
    moments = Counter(moment for run in killed for moment in run.moments)
    print(f"{identical} of {len(killed)} identical; {sum(moments.values())} signals: {dict(moments)}")
    if args.signal != "SIGKILL":
        print(f"longest time from the signal to the end: {max(run.exit_seconds for run in killed):.1f} s")
    sys.exit(identical < len(killed))


if __name__ == "__main__":
    main()
