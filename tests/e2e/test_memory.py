"""Memory and reading: what a worker and a router hold, which bytes of the checkpoint they read, and how long a start takes.

A process's reading is measured on a checkpoint whose pages were dropped from the page cache: then read_bytes of /proc/PID/io is what
the device delivered for that process. A worker is measured alone: it is killed once all experts are loaded and dropped from the
cache, and the one that takes its place reads its share while the others rest."""
import concurrent.futures
import glob
import json
import os
import shutil
import signal
import statistics
import struct
import subprocess
import tempfile
import time

from harness import BIN, DEMO, FULL, Cluster, check, main

MIB = 1 << 20
WORKERS = 4
KV_MIB = 64
WORKER_MARGIN = 64 * MIB
ROUTER_MARGIN = 96 * MIB
READ_MARGIN = 1.05
START_TARGET_S, START_BOUND_S = 2, 6  # the bound leaves room for a busy machine
BIG = ["--layers", "8", "--experts", "64", "--top-k", "4", "--hidden", "1024", "--intermediate", "656", "--heads", "16", "--kv-heads", "4"]
BIG_DISK_BYTES = 3 << 30


def shards(model):
    return sorted(glob.glob(os.path.join(model, "*.safetensors")))


def stored_bytes(model):
    """(bytes of all experts, number of experts, bytes of all other tensors), from the headers."""
    experts, others, count = 0, 0, 0
    for path in shards(model):
        with open(path, "rb") as f:
            header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            begin, end = tensor["data_offsets"]
            if ".experts." in name:
                experts += end - begin
                count += name.endswith("down_proj.weight")
            else:
                others += end - begin
    return experts, count, others


def drop_from_page_cache(model):
    for path in shards(model):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def resident_bytes(pid):
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("Rss:")) * 1024


def read_bytes(pid):
    with open(f"/proc/{pid}/io", encoding="ascii") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("read_bytes:"))


def mib(size):
    return f"{size / MIB:.1f} MiB"


def use(cluster):
    """Long prompts at once, so that buffers and KV blocks are touched."""
    prompts = [[(7 * i + 31 * n) % 8000 + 3 for i in range(600)] for n in range(6)]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        for reply in pool.map(lambda p: cluster.complete(p, 8, ignore_eos=True), prompts):
            check(len(reply) == 8, f"{len(reply)} tokens instead of 8")


def restarted_worker(cluster, model):
    """Kills the first worker once its share is out of the page cache; the pid of the one that took its place."""
    old = cluster.status()["workers"][0]
    drop_from_page_cache(model)
    os.kill(old["pid"], signal.SIGKILL)

    def is_back():
        status = cluster.status()
        now = status["workers"][0]
        return status["epoch"] >= 2 and now["pid"] not in (0, old["pid"]) and now["experts"] == old["experts"]
    cluster.wait_for(is_back, "the restarted worker")
    return cluster.status()["workers"][0]["pid"]


def expect_reads(who, read, own, at_least):
    if read == 0:
        print(f"figure: {who}: bytes read cannot be measured on this file system")
        return
    print(f"figure: {who} reads {mib(read)}, {read / own:.3f} of its own ranges ({mib(own)})")
    check(read <= READ_MARGIN * own, f"{who} read {read} bytes, its own ranges have {own}")
    check(read >= at_least * own, f"{who} read {read} bytes of {own}: the page cache was not dropped, so this measures nothing")


def expect_lean(model, name):
    expert_bytes, num_experts, base_bytes = stored_bytes(model)
    drop_from_page_cache(model)
    began = time.monotonic()
    with Cluster("--skip-tokenizer-init", "--no-auto-placement", "--kv-cache-memory", f"{KV_MIB}MiB", model=model, workers=WORKERS) as cluster:
        print(f"figure: {name}, {WORKERS} workers, cold page cache: ready in {time.monotonic() - began:.2f} s")
        router = json.load(open(os.path.join(cluster.run_dir, "cluster.json"), encoding="utf-8"))["pids"]["router"]
        expect_reads(f"{name}: the router", read_bytes(router), base_bytes, 0.5)
        use(cluster)
        bound = base_bytes + KV_MIB * MIB + ROUTER_MARGIN
        resident = resident_bytes(router)
        print(f"figure: {name}: the router holds {mib(resident)} (base weights {mib(base_bytes)}, KV budget {KV_MIB} MiB)")
        check(resident <= bound, f"the router holds {resident} bytes, more than {bound}")
        total = 0
        for worker in cluster.status()["workers"]:
            own = expert_bytes * worker["experts"] // num_experts
            total += own
            resident = resident_bytes(worker["pid"])
            print(f"figure: {name}: worker {worker['id']} holds {mib(resident)} ({worker['experts']} experts, {mib(own)} as stored)")
            check(resident <= own + WORKER_MARGIN, f"worker {worker['id']} holds {resident} bytes for {own} bytes of experts")
        check(total == expert_bytes, f"the workers hold {total} bytes of experts, the model has {expert_bytes}")
        own = expert_bytes * cluster.status()["workers"][0]["experts"] // num_experts
        expect_reads(f"{name}: a worker alone", read_bytes(restarted_worker(cluster, model)), own, 0.99)


def demo_model_is_lean():
    with tempfile.TemporaryDirectory(prefix="memory-", dir=os.path.dirname(BIN)) as folder:
        model = os.path.join(folder, "demo")
        os.mkdir(model)
        for path in shards(DEMO) + [os.path.join(DEMO, n) for n in ("config.json", "generation_config.json", "model.safetensors.index.json")]:
            shutil.copy(path, model)
        expect_lean(model, "demo")


def big_checkpoint_is_lean():
    with tempfile.TemporaryDirectory(prefix="memory-", dir=os.path.dirname(BIN)) as folder:
        free = shutil.disk_usage(folder).free
        check(free >= BIG_DISK_BYTES, f"{free} bytes are free for a checkpoint of 2 GiB at {folder}, {BIG_DISK_BYTES} are needed")
        model = os.path.join(folder, "big")
        subprocess.run([os.path.join(BIN, "..", "tests", "make_checkpoint"), model, *BIG], check=True, timeout=300)
        expect_lean(model, "2 GiB")


def demo_cluster_starts_quickly():
    times = []
    for _ in range(3):
        began = time.monotonic()
        with Cluster(workers=2):
            times.append(time.monotonic() - began)
    print(f"figure: serve models/demo --workers 2: ready in {statistics.median(times):.2f} s (median of 3; target {START_TARGET_S} s)")
    check(min(times) <= START_BOUND_S, f"starts took {times} s")


main([demo_cluster_starts_quickly, demo_model_is_lean] + ([big_checkpoint_is_lean] if FULL else []))
