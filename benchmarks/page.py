"""How long the page takes with many cases in the pool.

    python benchmarks/page.py [--images 10000] [--labelled 500] [--asks 20] [--out FILE]

A real server over so many cases is asked for its first page, over and over. Prints a table and writes JSON, in
milliseconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / folder) for folder in (".", "sample-data", "tests/integration", "benchmarks")]

from active_learning import MODEL, fill  # noqa: E402
from server import Server  # noqa: E402


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--labelled", type=int, default=500)
    parser.add_argument("--asks", type=int, default=20)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "page.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {"models": MODEL})
        fill(server, options.images, options.labelled)
        server.start()
        try:
            seconds = [timed(server) for _ in range(options.asks + 1)]
        finally:
            server.stop()
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": psutil.cpu_count()},
        "images": options.images,
        "first_ms": round(seconds[0] * 1000, 1),
        "p50_ms": round(statistics.median(seconds[1:]) * 1000, 1),
        "max_ms": round(max(seconds[1:]) * 1000, 1),
    }
    print(f"{options.images} cases: first {result['first_ms']} ms, p50 {result['p50_ms']}, max {result['max_ms']}")
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def timed(server: Server) -> float:
    """Seconds until the page is there."""
    start = time.perf_counter()
    server.get("/").raise_for_status()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
