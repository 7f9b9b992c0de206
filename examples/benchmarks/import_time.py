"""What each library costs a command at its start: seconds of its import in a fresh process, after those before it.

    .venv/bin/python examples/benchmarks/import_time.py

The median of --runs processes. The order is that in which a training command imports them; DeepSpeed comes last, since
only its own runs and transformers' Trainer ask for it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

LIBRARIES = [
    "typer, rich, pydantic",
    "numpy",
    "torch",
    "h5py",
    "datasets",
    "transformers.models.auto.modeling_auto",
    "peft",
    "transformers.trainer",
    "deepspeed",
]
TIMED = """
import json, sys, time
seconds = []
for names in json.loads(sys.argv[1]):
    started = time.perf_counter()
    exec(f"import {names}")
    seconds.append(time.perf_counter() - started)
print(json.dumps(seconds))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = []
    for _ in range(parser.parse_args().runs + 1):  # the first one warms the disk's cache
        command = [sys.executable, "-c", TIMED, json.dumps(LIBRARIES)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    print("| import | seconds |\n|---|---:|")
    for name, seconds in zip(LIBRARIES, zip(*runs[1:], strict=True), strict=True):
        print(f"| {name.partition('.')[0] if '.models' in name else name} | {statistics.median(seconds):.2f} |")


if __name__ == "__main__":
    main()
