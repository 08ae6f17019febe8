"""Redis as it is run for safety: each role's user can do what its process must and no more, and a cluster behind Sentinel serves on, and
places experts again, when the master dies and its replica takes over."""
import os
import shutil
import signal
import subprocess
import tempfile
import time

from harness import BIN, DEMO, Cluster, check, free_port, main
from load import Load, Process, Router

FAILOVER_S = 40
# No scripting, nothing beyond the prefix, nothing of the server's own.
DENIED = [["EVAL", "return 1", "0"], ["EVALSHA", "0" * 40, "0"], ["SCRIPT", "LOAD", "return 1"], ["FCALL", "f", "0"], ["FUNCTION", "LIST"],
          ["GET", "other:key"], ["SET", "other:key", "1"], ["DEL", "other:key"], ["KEYS", "*"], ["SCAN", "0"], ["FLUSHALL"],
          ["CONFIG", "GET", "dir"], ["ACL", "LIST"], ["SHUTDOWN", "NOSAVE"], ["CLIENT", "LIST"], ["MONITOR"], ["SAVE"],
          ["REPLICAOF", "NO", "ONE"]]
DENIED_OF = {"router": [], "worker": [["SET", "moe:{}:meta", "forged"], ["SET", "moe:{}:leader", "forged"], ["GET", "moe:{}:map:1"]],
             "operator": [["SET", "moe:{}:meta", "forged"], ["DEL", "moe:{}:meta"], ["SET", "moe:{}:worker:w9", "forged"]]}


def redis_cli(*args):
    run = subprocess.run(["redis-cli", "--no-auth-warning", *args], capture_output=True, text=True, timeout=10)
    return (run.stdout + run.stderr).strip()


def roles_can_do_what_they_must_and_no_more():
    with Cluster(workers=1) as cluster:
        socket = os.path.join(cluster.run_dir, "redis.sock")
        name = redis_cli("-s", socket, "KEYS", "moe:*:meta").split(":")[1]
        users = {field for line in redis_cli("-s", socket, "CLIENT", "LIST").splitlines() for field in line.split() if field.startswith("user=")}
        check({"user=router", "user=worker"} <= users, f"the processes are connected as {users}")
        check("WRONGPASS" in redis_cli("-s", socket, "--user", "router", "--pass", "guess", "PING"), "a guessed password")
        for role, more in DENIED_OF.items():
            path = os.path.join(cluster.run_dir, f"redis-{role}.password")
            check(os.stat(path).st_mode & 0o077 == 0, f"others can read {path}")
            with open(path, encoding="utf-8") as f:
                login = ["-s", socket, "--user", role, "--pass", f.readline().strip()]
            check('"epoch"' in redis_cli(*login, "GET", f"moe:{name}:meta"), f"{role} can't read meta")
            for command in DENIED + more:
                said = redis_cli(*login, *(word.replace("{}", name) for word in command))
                check("NOPERM" in said, f"{role}: {command}: {said}")


class Here:
    """Where a cluster's processes have their logs and sockets."""

    def __init__(self):
        self.dir = self.run_dir = tempfile.mkdtemp(prefix="moesaic-e2e-")


def start_redis(here, port, *args):
    return subprocess.Popen(["redis-server", *args, "--port", str(port), "--bind", "127.0.0.1", "--dir", here.dir],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition, what, timeout_s=FAILOVER_S):
    until = time.monotonic() + timeout_s
    while not condition():
        check(time.monotonic() < until, f"no {what} within {timeout_s} s")
        time.sleep(0.05)


def start_behind_sentinel(here, ports, processes):
    """Two Redis of which the second follows the first, a sentinel, two workers and a router; the router."""
    sentinel = os.path.join(here.dir, "sentinel.conf")
    with open(sentinel, "w", encoding="utf-8") as f:
        f.write(f"sentinel monitor main 127.0.0.1 {ports[0]} 1\nsentinel down-after-milliseconds main 1000\n")
    processes += [start_redis(here, ports[0], "--save", ""), start_redis(here, ports[1], "--save", "", "--replicaof", "127.0.0.1", str(ports[0]))]
    wait_for(lambda: "master_link_status:up" in redis_cli("-p", str(ports[1]), "INFO", "replication"), "replication")
    processes.append(start_redis(here, ports[2], sentinel, "--sentinel"))
    store = f"sentinel://127.0.0.1:{ports[2]}/main"
    workers = [Process(here, f"w{i}", "worker", DEMO, "--store", store, "--listen", f"ipc://{here.dir}/w{i}.sock", "--threads", "1") for i in range(2)]
    router = Router(here, "r0", "--replicas", "2", "--initial-workers", "2", store=store)
    processes += [w.process for w in workers] + [router.process]
    wait_for(router.ready, "readiness")
    return router


def sentinel_names_another_master():
    here, processes, ports = Here(), [], [free_port() for _ in range(3)]
    try:
        router = start_behind_sentinel(here, ports, processes)
        wait_for(lambda: f"slave0:name=127.0.0.1:{ports[1]}" in redis_cli("-p", str(ports[2]), "INFO", "sentinel") or
                 "slaves=1" in redis_cli("-p", str(ports[2]), "INFO", "sentinel"), "sentinel that knows the replica")
        epoch = router.status()["epoch"]
        with Load([router.port]) as load:
            wait_for(lambda: load.finished > 5, "load")
            processes[0].send_signal(signal.SIGKILL)
            began = time.monotonic()
            wait_for(lambda: "role:master" in redis_cli("-p", str(ports[1]), "INFO", "replication"), "failover")
            wait_for(lambda: router.status()["redis"]["up"], "store after the failover")
            took = time.monotonic() - began
            operation = subprocess.run([os.path.join(BIN, "moesaic"), "rebalance", "--router", f"ipc://{here.dir}/r0.sock"],
                                       capture_output=True, text=True, timeout=60)
            check(operation.returncode == 0 and "done" in operation.stdout, f"rebalance: {operation.stderr}{operation.stdout}")
            after = load.finished
            wait_for(lambda: load.finished > after + 5, "service")
        load.check()
        meta = redis_cli("-p", str(ports[1]), "GET", redis_cli("-p", str(ports[1]), "KEYS", "moe:*:meta"))
        check('"epoch"' in meta and router.status()["epoch"] >= epoch, f"the new master has {meta}")
        print(f"figure: Sentinel's failover: Redis was up again for the cluster after {took:.1f} s; {load.finished} requests, 0 failed")
    finally:
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(here.dir, ignore_errors=True)


if __name__ == "__main__":
    main([roles_can_do_what_they_must_and_no_more, sentinel_names_another_master])
