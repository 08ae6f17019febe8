"""`moesaic trace` on the demo model, and what `moesaic trace replay` says of the trace."""
import os
import subprocess
import tempfile

from harness import BIN, DEMO, ROOT, check, main


def moesaic(*args):
    return subprocess.run([os.path.join(BIN, "moesaic"), *args], capture_output=True, text=True, timeout=300)


def record_and_replay():
    with tempfile.TemporaryDirectory(prefix="moesaic-e2e-") as folder:
        out = os.path.join(folder, "demo.trace")
        run = moesaic("trace", DEMO, "--data", os.path.join(ROOT, "tests/data/valid.jsonl"), "--limit", "40", "-o", out)
        check(run.returncode == 0, f"trace ended with {run.returncode}: {run.stderr}")
        run = moesaic("trace", "replay", out)
        check(run.returncode == 0, f"replay ended with {run.returncode}: {run.stderr}")
        print(run.stdout)
        rows = [line.split() for line in run.stdout.splitlines()[3:]]
        check([row[:2] for row in rows] == [[g, p] for g in ("gate", "hint", "pre-gate") for p in ("lru", "lfu-decay", "hint-aware")],
              f"rows {rows}")
        for row in rows:
            hits = [float(x) for x in row[2::5]]
            check(len(hits) == 4 and hits == sorted(hits) and hits[3] <= 100, f"more slots, fewer hits: {row}")
        by_name = {(row[0], row[1]): float(row[7]) for row in rows}  # hits at 25 %
        for policy in ("lru", "lfu-decay", "hint-aware"):
            check(by_name["pre-gate", policy] > by_name["hint", policy] > by_name["gate", policy], f"hints do not help: {by_name}")
        with open(out, "r+b") as f:
            f.truncate(os.path.getsize(out) - 1)
        run = moesaic("trace", "replay", out)
        check(run.returncode == 1 and "cut off" in run.stderr, f"a trace cut short: {run.returncode}, {run.stderr}")
    run = moesaic("trace", DEMO, "--data", "x")
    check(run.returncode == 2 and "-o FILE" in run.stderr, f"no output: {run.returncode}, {run.stderr}")
    run = moesaic("trace", "replay")
    check(run.returncode == 2 and "FILE" in run.stderr, f"no file: {run.returncode}, {run.stderr}")


main([record_and_replay])
