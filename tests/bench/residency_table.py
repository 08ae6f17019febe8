"""What a part of the experts on the device costs, and what pre-gating hides of it: the CSV of a `moesaic bench --sweep` as tables.
  residency_table.py FILE.csv...            every case, beside the run with all experts on the device
  residency_table.py --ratios FILE.csv...   T_copy / T_compute of each case alone

T        time of a step (of a prompt, for prefill), median of the runs
T_comp   that with all experts on the device, same routing
T_copy   bytes copied for a step / pace of large copies from host memory to the device, measured in the same process
T_dem    T of the same experts copied on demand (gating gate)
overlap  (T_dem - T) / min(T_comp, T_copy). On demand, what is there is computed while the rest comes: T_dem hides a part already
hidden   (T_comp + T_copy - T) / min(T_comp, T_copy): beside copying first and computing then; 1 where all that can be hidden is hidden
gating   +host, +auto: cold experts are not all copied; beside a table of `auto` as a part of the better of `fetch` and `host`
first    of T: waiting at the first MoE layer, whose experts nothing foretells"""
import csv
import statistics
import sys

RATIOS = (0.25, 0.5, 1, 2, 4)
WHOLE = "100%"


def read(paths):
    """{(case, routing, device memory, gating[+cold experts]): {column: median}}, in the order of the files."""
    groups = {}
    for path in paths:
        with open(path, encoding="utf-8", newline="") as f:
            for row in csv.DictReader(f):
                size = f"x{row['requests']}" if row["phase"] == "decode" else row["prompt_tokens"]
                gating = row["gating"] + ("" if row["cold_experts"] == "fetch" else "+" + row["cold_experts"])
                key = (f"{row['phase']} {size}", row["dummy_routing"], row["device_memory"], gating)
                groups.setdefault(key, []).append(row)
    return {key: measure(rows) for key, rows in groups.items()}


def measure(rows):
    def median(of):
        return statistics.median(of(row) for row in rows)

    def steps(row):  # of a prompt one, however many chunks it is cut into
        return 1 if row["phase"] == "prefill" else int(row["tokens"]) / int(row["requests"])

    seen = {name: sum(int(row[f"expert_{name}"]) for row in rows) for name in ("hits", "late_hits", "misses")}
    return {"speed": median(lambda r: float(r["tokens_per_second"])), "low": min(float(r["tokens_per_second"]) for r in rows),
            "high": max(float(r["tokens_per_second"]) for r in rows), "t": median(lambda r: float(r["step_ms"])),
            "mb": median(lambda r: int(r["copied_bytes"]) / steps(r) / 1e6), "wasted": median(lambda r: int(r["wasted_bytes"]) / steps(r) / 1e6),
            "pace": median(lambda r: float(r["copy_gb_per_s"])), "experts": max(sum(seen.values()), 1), **seen,
            "first": median(lambda r: float(r["first_stall_us"]) * int(r["micro_batches"]) / steps(r) / 1e3),
            "stall": median(lambda r: float(r["stall_us"]) * int(r["moe_layers"]) * int(r["micro_batches"]) / steps(r) / 1e3),
            "first_misses": sum(int(r["first_misses"]) for r in rows), "device": max(int(r["device_used_bytes"]) for r in rows)}


def compare(groups):
    """Each measurement with those that it is held against; `ratio` is None where nothing was measured with all experts there."""
    pace = max((m["pace"] for m in groups.values()), default=0)  # a short copy is slower than the link
    for (case, routing, memory, gating), m in groups.items():
        whole = groups.get((case, routing, WHOLE, gating.split("+")[0])) or groups.get((case, routing, WHOLE, "gate"))
        demand = groups.get((case, routing, memory, "gate"))
        m["compute"] = whole["t"] if whole else None
        m["copy"] = m["mb"] / pace if pace else None  # MB / (GB/s) = ms
        m["ratio"] = m["copy"] / m["compute"] if whole and pace else None
        m["demand"] = demand["t"] if demand else None
        m["of"] = m["speed"] / whole["speed"] if whole else None
        least = min(m["compute"], m["copy"]) if m["ratio"] is not None else 0
        m["hidden"] = (m["compute"] + m["copy"] - m["t"]) / least if least > 0 else None
        m["overlap"] = (m["demand"] - m["t"]) / least if demand and gating != "gate" and "+" not in gating and least > 0 else None
    return pace


def number(value, digits=2):
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value):
    return "-" if value is None else f"{100 * value:.0f} %"


HEADING = ("case", "routing", "device", "gating", "tokens/s (low - high)", "T ms", "T_comp", "T_copy", "copy/comp", "T_dem", "overlap", "hidden",
           "of all", "first ms", "stall ms", "MB/step", "wasted", "hits", "late", "misses", "GPU GiB")


def line(key, m):
    case, routing, memory, gating = key
    return (case, routing or "gates", memory, gating, f"{m['speed']:.0f} ({m['low']:.0f} - {m['high']:.0f})", number(m["t"], 3), number(m["compute"], 3),
            number(m["copy"], 3), number(m["ratio"]), number(m["demand"], 3), number(m["overlap"]), number(m["hidden"]), percent(m["of"]), number(m["first"], 3), number(m["stall"], 3),
            number(m["mb"], 1), number(m["wasted"], 1), percent(m["hits"] / m["experts"]), percent(m["late_hits"] / m["experts"]),
            percent(m["misses"] / m["experts"]), number(m["device"] / 2**30, 1) if m["device"] else "-")


def table(lines):
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    for at, row in enumerate(lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
        if at == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def nearest(groups):
    """For each of RATIOS the copying setting that comes nearest to it, on demand and ahead."""
    ahead = [(key, m) for key, m in groups.items() if m["hidden"] is not None and key[3] != "gate" and "+" not in key[3]]
    lines = [("T_copy / T_comp near", *HEADING)]
    for ratio in RATIOS:
        best = min(ahead, key=lambda one: max(one[1]["ratio"] / ratio, ratio / one[1]["ratio"]), default=None)
        if best:
            lines.append((str(ratio), *line(*best)))
    if len(lines) > 1:
        print("\nPoints")
        table(lines)


def cold_choices(groups):
    """How near `auto` is to the better of copying and computing on the host."""
    lines = [("case", "routing", "device", "gating", "fetch", "host", "auto", "auto / better")]
    for (case, routing, memory, gating), m in groups.items():
        host, auto = (groups.get((case, routing, memory, f"{gating}+{cold}")) for cold in ("host", "auto"))
        if not host or not auto:
            continue
        speeds = [of["speed"] for of in (m, host, auto)]
        lines.append((case, routing or "gates", memory, gating, *(f"{s:.0f}" for s in speeds), percent(speeds[2] / max(speeds[:2]))))
    if len(lines) > 1:
        print("\nCold experts, tokens/s")
        table(lines)


def main():
    ratios_alone = sys.argv[1] == "--ratios"
    groups = read(sys.argv[2:] if ratios_alone else sys.argv[1:])
    pace = compare(groups)
    print(f"copies of whole experts, host memory to device: {pace:.2f} GB/s")
    if ratios_alone:
        chosen = [(key, m) for key, m in groups.items() if m["ratio"] is not None and key[2] != WHOLE]
        table([("copy/comp", *HEADING[:4])] + [(number(m["ratio"]), key[0], key[1] or "gates", key[2], key[3])
                                              for key, m in sorted(chosen, key=lambda one: one[1]["ratio"])])
        return
    table([HEADING] + [line(key, m) for key, m in groups.items()])
    nearest(groups)
    cold_choices(groups)


main()
