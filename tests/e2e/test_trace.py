"""`moesaic trace` on the demo model, and what `moesaic trace replay` says of the trace; `--dummy-routing`, as traces show it;
timelines."""
import os
import re
import struct
import subprocess
import tempfile
import xml.etree.ElementTree

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


def read_trace(path):
    """Of each text its planes (gate, hint, pre-gate), as lists of experts by token, layer and choice."""
    with open(path, "rb") as f:
        data = f.read()
    version, layers, experts, top_k, planes, texts = struct.unpack_from("<6I", data, 8)
    at, out = 8 + 24 + 8, []
    for _ in range(texts):
        tokens = struct.unpack_from("<I", data, at)[0]
        at += 4
        count = tokens * layers * top_k
        out.append([list(struct.unpack_from(f"<{count}H", data, at + 2 * count * p)) for p in range(planes)])
        at += 2 * count * planes
    return version, layers, top_k, [text for text in out if text[0]]


def dummy_routing():
    """The same routes in batches of any size, by gates, hints and pre-gates; skewed and local, which a cache lives on."""
    with tempfile.TemporaryDirectory(prefix="moesaic-e2e-") as folder:
        def record(name, *args):
            out = os.path.join(folder, name)
            run = moesaic("trace", DEMO, "--data", os.path.join(ROOT, "tests/data/valid.jsonl"), "--limit", "8", "--load-format", "dummy",
                          "--pre-gates", "next-gate", "-o", out, *args)
            check(run.returncode == 0, f"trace {args} ended with {run.returncode}: {run.stderr}")
            return out

        def hits(trace):
            run = moesaic("trace", "replay", trace)
            return float(next(line for line in run.stdout.splitlines() if line.startswith("gate      lru")).split()[7])

        skewed = record("skewed", "--dummy-routing", "zipf:1.0,locality:0.6,seed:7")
        with open(skewed, "rb") as one, open(record("chunks", "--dummy-routing", "zipf:1.0,locality:0.6,seed:7",
                                                    "--max-num-batched-tokens", "7"), "rb") as other:
            check(one.read() == other.read(), "other batches are routed otherwise")
        version, layers, top_k, texts = read_trace(skewed)
        check(version == 1 and len(texts) == 8 and layers == 6, "not such a trace")
        for gate, hint, pre_gate in texts:
            check(gate == hint == pre_gate, "gatings are routed otherwise")
        gate, width = texts[0][0], layers * top_k
        kept = sum(gate[i] in gate[i - width - i % top_k:][:top_k] for i in range(width, len(gate))) / (len(gate) - width)
        check(0.6 < kept < 0.9, f"of each token's experts the one before has {kept}")
        wrong = [sum(a != b for a, b in zip(gate, hint)) for gate, hint, _ in
                 read_trace(record("wrong", "--dummy-routing", "zipf:1,recall:0.8"))[3]]
        check(all(wrong), "hints are never wrong")
        even, uneven = hits(record("even", "--dummy-routing", "zipf:0,locality:0")), hits(skewed)
        check(even < 30 < 40 < uneven, f"hits at 25 %: {even} % even, {uneven} % skewed")
    for args, says in ((("--dummy-routing", "zipf:1"), "--load-format dummy"),
                       (("--load-format", "dummy", "--dummy-routing", "zipf:1,locality:2"), "from 0 to 0.99")):
        run = moesaic("eval", DEMO, "--data", os.path.join(ROOT, "tests/data/valid.jsonl"), *args)
        check(run.returncode == 1 and says in run.stderr and "--dummy-routing" in run.stderr, f"{args}: {run.returncode}, {run.stderr}")


EVENT = re.compile(r"(segment|pass|host|stall|ahead|demand|given-up) (?:logits|layer (\d+)(?: experts? (\d+))?): (-?[\d.]+) to ([\d.]+) ms")


def read_events(path):
    """(kind, layer or None for logits, expert or number, begin, end) of every bar, by their titles."""
    tree = xml.etree.ElementTree.parse(path)
    titles = [title.text for title in tree.iter("{http://www.w3.org/2000/svg}title")]
    found = [EVENT.fullmatch(title) for title in titles]
    check(titles and all(found), f"titles: {titles}")
    return [(m[1], m[2] and int(m[2]), m[3] and int(m[3]), float(m[4]), float(m[5])) for m in found]


def timeline():
    """Two steps of the demo model at 25 %, as a picture: what runs when, and that it is what the metrics count."""
    with tempfile.TemporaryDirectory(prefix="moesaic-e2e-") as folder:
        def drawn(*args):
            out = os.path.join(folder, "t.svg")
            run = moesaic("trace", DEMO, "--timeline", out, "--device-memory", "25%", "--requests", "4", *args)
            check(run.returncode == 0, f"trace --timeline {args} ended with {run.returncode}: {run.stderr}")
            check(os.path.getsize(out) < 100_000, f"{os.path.getsize(out)} bytes")
            told = re.match(r"copies ahead (\d+), on demand (\d+), given up (\d+); waiting ([\d.]+) ms; by the metrics: (\d+) bytes copied, "
                            r"waiting ([\d.]+) ms", run.stdout)
            check(told, f"sums: {run.stdout}")
            return read_events(out), [float(x) for x in told.groups()]

        events, (ahead, demand, given_up, waited, copied, stalled) = drawn("--gating", "pre-gate")
        segments = [e for e in events if e[0] == "segment"]
        check([e[1] for e in segments] == [0, 1, 2, 3, 4, 5, None] * 2, f"segments: {segments}")
        for kinds in (("segment",), ("pass", "stall")):
            lane = sorted(e[3:] for e in events if e[0] in kinds)
            check(all(a[1] <= b[0] + 1e-4 for a, b in zip(lane, lane[1:])), f"{kinds} overlap: {lane}")
        for kind, layer, _, begin, end in events:
            check(begin <= end, f"{kind} ends before it begins")
            before = [e[1] for e in segments if e[3] <= begin]
            if kind in ("pass", "stall"):
                check(before[-1] == layer, f"{kind} of layer {layer} after segment {before}")
            if kind == "ahead" and before:  # announced with the dispatch of the layer before
                check(layer > 0 and before[-1] in (layer - 1, layer), f"ahead for layer {layer} after segment {before}")
        # of later layers nearly all come ahead, but for what a busy machine had not begun to copy when it was needed
        late = sum(1 for kind, layer, *_ in events if kind == "demand" and layer > 0)
        early = sum(1 for kind, *_ in events if kind == "ahead")
        check(late < early, f"{early} experts came ahead, {late} of layers that were announced came on demand")
        check(ahead > 0 and demand > 0 and given_up == 0, f"copies: {ahead} ahead, {demand} on demand, {given_up} given up")
        check(0 <= (ahead + demand) * 294912 - copied < 50 * 294912, f"{ahead} + {demand} copies, {copied} bytes")  # late ones are not told
        check(waited == stalled, f"waiting: {waited} ms drawn, {stalled} ms counted")
        events, (ahead, demand, *_) = drawn("--gating", "gate", "--cold-experts", "host")
        check(ahead == 0 and any(e[0] == "host" for e in events), f"by gates, experts on the host: {events}")
    for args in (("--data", "x", "-o", "y", "--gating", "gate"), ("--timeline",)):
        run = moesaic("trace", DEMO, *args)
        check(run.returncode == 2 and "--timeline" in run.stderr, f"{args}: {run.returncode}, {run.stderr}")


main([record_and_replay, dummy_routing, timeline])
