"""The CSV files of `moesaic bench` in a folder as one short table of medians.   table.py FOLDER"""
import csv
import glob
import os
import statistics
import sys

STAGES = ("attention", "plan", "copy", "wire", "expert", "combine")


def cases(path):
    """{(phase, size): {column: median}} of one file; a column that a row leaves empty is left out."""
    groups = {}
    with open(path, encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            size = int(row["prompt_tokens"] if row["phase"] == "prefill" else row["requests"])
            groups.setdefault((row["phase"], size), []).append(row)
    return {case: {name: statistics.median(float(r[name]) for r in rows) for name in rows[0] if is_number(rows[0][name])}
            for case, rows in groups.items()}


def is_number(text):
    try:
        float(text)
        return True
    except ValueError:
        return False


def main():
    order = ["inproc", "ipc-exact", "ipc-partial", "shm-partial", "mps-exact", "mps-partial", "gpu2-exact", "gpu2-partial",
             "gpu2-shm-partial"]
    paths = {os.path.basename(p)[:-4]: p for p in glob.glob(os.path.join(sys.argv[1], "*.csv"))}
    print(f"{'experts':<16} {'case':<13} {'tokens/s':>9} {'ms/step':>9} {'of floor':>8} {'B/token':>8} {'chunks':>6}   us a layer: " +
          " ".join(f"{s:>9}" for s in STAGES))
    for name in [n for n in order if n in paths]:
        for (phase, size), v in cases(paths[name]).items():
            what = f"{phase} x{size}" if phase == "decode" else f"{phase} {size}"
            of = f"{100 * v['of_floor']:.1f}%" if "of_floor" in v else "-"
            stages = " ".join(f"{v[s + '_us']:>9.1f}" if s + "_us" in v else f"{'-':>9}" for s in STAGES)
            print(f"{name:<16} {what:<13} {v['tokens_per_second']:>9.0f} {v['step_ms']:>9.3f} {of:>8} {v['wire_bytes_per_token']:>8.0f} {v.get('pipeline_degree', 0):>6.1f}"
                  f"               {stages}")


main()
