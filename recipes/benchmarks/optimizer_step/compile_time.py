"""Seconds of the first fused step in a new process: with an empty compiler cache, then with it.

Usage: python recipes/benchmarks/optimizer_step/compile_time.py [--out DIR] [--quick]
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from reporting import result_name, write_csv

CASES = {"float32": None, "bfloat16 states": "bfloat16", "8-bit states": "8bit"}
STEP = """
import sys, time, torch
from poprisk_integrations import PopRiskAdamW
p = torch.nn.Parameter(torch.randn(600, 512))
p.grad = torch.randn(600, 512)
optimizer = PopRiskAdamW([p], fused=True, state_dtype=sys.argv[1] or None)
start = time.perf_counter()
optimizer.step()
print(optimizer.path, time.perf_counter() - start)
"""


def main() -> None:
    """Measure and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="float32 only, for tests")
    args = parser.parse_args()
    rows = []
    for name, state_dtype in list(CASES.items())[: 1 if args.quick else None]:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "filled"):
                done = subprocess.run(
                    [sys.executable, "-c", STEP, state_dtype or ""],
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                path, seconds = done.stdout.split()
                row = {"case": name, "cache": state, "path": path}
                rows.append({**row, "first_step_seconds": round(float(seconds), 1)})
                print(rows[-1], flush=True)
    write_csv(args.out / f"compile_time_{result_name()}.csv", rows)


if __name__ == "__main__":
    main()
