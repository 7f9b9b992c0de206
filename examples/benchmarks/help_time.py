"""How long `dataflex --help` takes, beside an interpreter that imports typer, rich and pydantic and does nothing.

    python examples/benchmarks/help_time.py

Each is started 20 times, in turn, and the median is told. The aim: under twice the time of the imports. Where it is
missed, `python -X importtime -m dataflex --help` names the module that costs the time.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "import typer, rich, pydantic": ["-c", "import typer, rich, pydantic"],
    "dataflex --help": ["-m", "dataflex", "--help"],
}
STARTS = 20


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(STARTS):
        for name, arguments in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {1000 * median:.0f} ms")
    imports, shown = medians.values()
    print(f"ratio: {shown / imports:.2f}")


if __name__ == "__main__":
    main()
