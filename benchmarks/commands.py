"""Time, CPU and peak memory of the commands on one model, each in a process of its own.

    python benchmarks/commands.py MODEL [--quantization q4f16_1] [--rounds 3] [--target iphone]

Prints the median wall and CPU seconds, and the largest resident set, of --help, convert_weight,
gen_config and compile.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mlc_compile.targets.profile import TARGETS

# Peak memory as the process itself sees it: ru_maxrss of a child counts its parent's at the fork.
WORKER = """
import atexit, os, sys
from mlc_compile.cli import main
def report():
    used = os.times()
    with open("/proc/self/status") as status:
        peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    print(used.user + used.system, int(peak) * 1024, file=sys.stderr)
atexit.register(report)
main.main(sys.argv[1:])
"""


def run(words: list[str]) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak MB) of one command."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", WORKER, *words], capture_output=True, text=True, check=True
    )
    wall = time.perf_counter() - started
    cpu, peak = done.stderr.strip().splitlines()[-1].split()
    return wall, float(cpu), int(peak) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--quantization", default="q4f16_1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--target", default="cpu", choices=list(TARGETS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out")
        target = options.target
        library = f"{out}/model{TARGETS[target].suffixes[0]}"
        common = [options.model, "--quantization", options.quantization, "-o", out, "--overwrite"]
        commands = {
            "--help": ["--help"],
            "convert_weight": ["convert_weight", *common],
            "gen_config": ["gen_config", *common],
            f"compile --target {target}": ["compile", out, "--target", target, "-o", library],
        }
        print("| command | wall s | CPU s | peak MB |\n| --- | --- | --- | --- |")
        for name, words in commands.items():
            wall, cpu, peak = zip(*(run(words) for _ in range(options.rounds)), strict=True)
            figures = statistics.median(wall), statistics.median(cpu), max(peak)
            print(f"| {name} | {figures[0]:.2f} | {figures[1]:.2f} | {figures[2]:.0f} |")


if __name__ == "__main__":
    main()
