"""`moesaic bench` on the demo model, tiny: sane figures for each place of the experts, in the table and in the CSV; sweeps."""
import csv
import glob
import os
import subprocess
import tempfile

from harness import BIN, DEMO, ROOT, check, main

MOESAIC = os.path.join(BIN, "moesaic")
REQUESTS, PROMPT, OUTPUT, PREFILL, RUNS = (1, 3), 8, 12, (40, 70), 2
BANDWIDTH_GBS, RATE_TFLOPS = 10, 0.2


def bench(folder, *arguments):
    env = dict(os.environ, XDG_RUNTIME_DIR=folder)
    return subprocess.run([MOESAIC, "bench", DEMO, *arguments], capture_output=True, text=True, timeout=300, env=env)


def check_row(row, phase):
    requests = int(row["requests"])
    expected = int(row["prompt_tokens"]) if phase == "prefill" else requests * (OUTPUT - 1)
    # tokens that came while not all requests were decoding are not counted
    check(0 < int(row["tokens"]) <= expected and (requests > 1 or int(row["tokens"]) == expected), f"tokens: {row}")
    speed, seconds = float(row["tokens_per_second"]), float(row["seconds"])
    check(seconds > 0 and abs(speed * seconds / int(row["tokens"]) - 1) < 0.01, f"speed and time differ: {row}")
    check(abs(float(row["ms_per_token"]) * speed / 1000 / requests - 1) < 0.01, f"speed and ms differ: {row}")
    stages = {name[:-3]: float(us) for name, us in row.items() if name.endswith("_us")}
    check(all(0 <= us < 10e6 for us in stages.values()), f"stages: {row}")
    check(stages["expert"] > 0 and stages["attention"] > 0, f"stages: {row}")
    if int(row["workers"]) > 0:  # otherwise a step is one job
        check(stages["expert"] <= stages["plan"] + stages["wait"] and stages["plan"] > 0 and stages["step"] == 0, f"stages: {row}")
    else:
        check(stages["plan"] == stages["wait"] == 0 and 6 * (stages["attention"] + stages["expert"]) <= stages["step"], f"stages: {row}")
    layer_us = sum(us for name, us in stages.items() if name != "step")  # which has the others in it, and may be all there is
    check(phase == "prefill" or layer_us < seconds * 1e6, f"one layer takes longer than all: {row}")
    check((float(row["pipeline_degree"]) >= 1) == (int(row["workers"]) > 0), f"pipeline degree: {row}")
    check(stages["wire"] <= stages["wait"] and (int(row["workers"]) > 0) == (float(row["wire_bytes_per_token"]) > 0), f"wire: {row}")
    check_floor(row, requests, phase)


def check_floor(row, requests, phase):
    """Bytes and FLOP are between those of one expert a layer and of all, and the floor is what takes longer of both, at least."""
    floor_s, weights, kv, flop = (float(row[name]) for name in ("floor_ms", "weight_bytes", "kv_bytes", "flop"))
    floor_s /= 1e3
    check(1 <= float(row["layer_experts"]) <= 16 and int(row["micro_batches"]) >= 1, f"experts: {row}")
    check(1e6 < weights < 50e6 and kv > 0 and flop > 1e6 * requests, f"work: {row}")
    least = max((weights + kv) / (BANDWIDTH_GBS * 1e9), flop / (RATE_TFLOPS * 1e12))
    check(0.999 * least <= floor_s <= 1.001 * ((weights + kv) / (BANDWIDTH_GBS * 1e9) + flop / (RATE_TFLOPS * 1e12)), f"floor: {row}")
    step_ms = float(row["step_ms"])
    check(abs(float(row["of_floor"]) * step_ms / 1e3 - floor_s) < 1e-3 * floor_s, f"part of the floor: {row}")
    expected = float(row["seconds"]) * 1e3 if phase == "prefill" else float(row["ms_per_token"])
    check(abs(step_ms / expected - 1) < 0.01, f"step: {row}")


def table_and_csv():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "bench.csv")
        run = bench(folder, "--runs", str(RUNS), "--concurrency", ",".join(map(str, REQUESTS)), "--prompt-tokens", str(PROMPT),
                    "--output-tokens", str(OUTPUT), "--prefill-tokens", ",".join(map(str, PREFILL)), "--csv", path,
                    "--measured-bandwidth", str(BANDWIDTH_GBS), "--measured-rate", str(RATE_TFLOPS))
        check(run.returncode == 0, f"bench ended with {run.returncode}: {run.stderr[-2000:]}")
        with open(path, encoding="utf-8", newline="") as f:
            rows = list(csv.DictReader(f))
        for experts, workers in (("inproc", 0), ("shm", 2), ("ipc", 2), ("tcp", 2)):
            mine = [r for r in rows if r["experts"] == experts]
            check(len(mine) == RUNS * (len(REQUESTS) + len(PREFILL)), f"{len(mine)} rows of {experts}")
            for row in mine:
                check(int(row["workers"]) == workers and int(row["threads"]) >= 1, f"processes: {row}")
                check_row(row, row["phase"])
            for what in [f"decode x{n}" for n in REQUESTS] + [f"prefill {n}" for n in PREFILL]:
                lines = [line for line in run.stdout.splitlines() if line.startswith(what) and line[len(what):].split()[0] == experts]
                check(len(lines) == 2 and "%" in lines[0], f"{what} {experts}: {run.stdout}")
        check(len(rows) == 4 * RUNS * (len(REQUESTS) + len(PREFILL)), f"{len(rows)} rows")
        check(not glob.glob(os.path.join(folder, "moesaic-*")), "a run folder is left")


def a_sweep():
    """Settings in one process: each with its own experts on the device, gating and routing, and the table made of it."""
    zipf = "zipf:1.5,seed:3"
    settings = [("gate", "100%", "", ""), ("gate", "25%", "", ""), ("pre-gate", "25%", "fetch", zipf), ("pre-gate", "100%", "", zipf),
                ("gate", "25%", "", zipf), ("pre-gate", "25%", "host", zipf), ("pre-gate", "25%", "auto", zipf)]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "sweep.csv")
        sweep = "; ".join(f"gating={g} device-memory={d}" + (f" cold-experts={c}" if c else "") + (f" dummy-routing={r}" if r else "")
                          for g, d, c, r in settings)
        run = bench(folder, "--load-format", "dummy", "--pre-gates", "next-gate", "--experts", "inproc", "--concurrency", "2", "--prompt-tokens", "8",
                    "--output-tokens", "8", "--prefill-tokens", "16", "--runs", "2", "--sweep", sweep, "--csv", path)
        check(run.returncode == 0, f"bench ended with {run.returncode}: {run.stderr[-2000:]}")
        with open(path, encoding="utf-8", newline="") as f:
            rows = list(csv.DictReader(f))
        check([(r["gating"], r["device_memory"], r["cold_experts"], r["dummy_routing"]) for r in rows] ==
              [(g, d, c or "fetch", r) for g, d, c, r in settings for _ in range(4)], "settings")
        for row in rows:
            hits, late, misses = (int(row[f"expert_{name}"]) for name in ("hits", "late_hits", "misses"))
            check(float(row["copy_gb_per_s"]) > 0 and hits + late + misses > 0 and int(row["moe_layers"]) == 6, f"copies: {row}")
            check((int(row["copied_bytes"]) == 0 and misses == 0) == (row["device_memory"] == "100%"), f"copies: {row}")
            check(int(row["host_experts"]) == 0 or row["cold_experts"] != "fetch", f"computed on the host: {row}")
            check(row["gating"] == "gate" and late == 0 or misses == int(row["first_misses"]), f"pre-gates foretell all but the first layer: {row}")
        check(sum(int(row["host_experts"]) for row in rows if row["cold_experts"] == "host") > 0, "nothing was computed on the host")
        table = subprocess.run(["python3", os.path.join(ROOT, "tests", "bench", "residency_table.py"), path], capture_output=True, text=True, timeout=60)
        lines = table.stdout.splitlines()
        check(table.returncode == 0 and lines[0].endswith("GB/s") and sum(line.startswith("| decode x2") for line in lines) == 8, f"table: {table}")
        check(sum("auto / better" in line for line in lines) == 1, f"table: {table}")
        for args, word in (((sweep, "ipc"), "inproc"), (("gating=gate device-memory=25%;gating=gate", "inproc"), "every setting"),
                           (("gating=gates", "inproc"), "pre-gate"), (("gating=gate device-memory=1%", "inproc"), "at least"), (("x=1", "inproc"), "none of"),
                           (("gating=gate device-memory=25% cold-experts=warm", "inproc"), "fetch, host and auto"),
                           (("device-memory=25% dummy-routing=zipf", "inproc"), "zipf:S")):
            run = bench(folder, "--load-format", "dummy", "--sweep", args[0], "--experts", args[1])
            check(run.returncode == 1 and word in run.stderr, f"{args}: {run.returncode} {run.stderr}")


def mistakes_are_told():
    with tempfile.TemporaryDirectory() as folder:
        for arguments, word in ((("--experts", "pigeon"), "pigeon"), (("--concurrency", "1,x"), "x"), (("--concurrency", "0"), "--max-num-seqs"),
                                (("--prefill-tokens", "8,x"), "--prefill-tokens"),
                                (("--workers", "0"), "--experts inproc")):
            run = bench(folder, *arguments)
            check(run.returncode != 0 and word in run.stderr, f"{arguments}: {run.returncode} {run.stderr}")


main([table_and_csv, a_sweep, mistakes_are_told])
