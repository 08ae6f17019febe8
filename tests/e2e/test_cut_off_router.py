"""A router that Redis does not answer while experts move, with one replica of each: it hears of the new maps from the workers, at the
latest when one says that it no longer holds an expert. No failed request, no wrong token."""
import json
import os
import signal
import subprocess
import time

from harness import BIN, check, main
from nodes import Nodes, Streams, wait_for

MOVES = 6
LAYERS, EXPERTS = 6, 16


def holders(router, layer, expert):
    return json.loads(router.get("/debug/experts")[1])["layers"][layer]["replicas"][expert]


def move(nodes, layer, expert, source, target):
    run = subprocess.run([os.path.join(BIN, "moesaic"), "move", "--layer", str(layer), "--expert", str(expert), "--from", source, "--to", target,
                          "--router", f"ipc://{nodes.dir}/r0.sock"], capture_output=True, text=True, timeout=60)
    check(run.returncode == 0, f"move: {run.stderr}{run.stdout}")


def router_without_redis():
    with Nodes(2, routers=2, replicas=1, router_args=("--no-auto-placement",), own_redis_path=("r1",)) as nodes:
        first, second = nodes.routers
        wait_for(lambda: all(r.status()["ready"] for r in nodes.routers), "two routers")
        with Streams([second], 2) as streams:
            wait_for(lambda: streams.done >= 4, "load")
            nodes.redis_paths["r1"].hold("in", "out")
            wait_for(lambda: not second.status()["redis"]["up"], "the second router to miss Redis")
            wait_for(lambda: len(first.status()["routers"]) == 1, "the end of its lease")
            for i in range(MOVES):
                layer, expert = i % LAYERS, i
                source = holders(first, layer, expert)[0]
                target = "w1" if source == "w0" else "w0"
                if i >= MOVES // 2:  # it sleeps through this one, and the worker must tell it
                    second.signal(signal.SIGSTOP)
                move(nodes, layer, expert, source, target)
                second.signal(signal.SIGCONT)
                wait_for(lambda l=layer, e=expert, t=target: holders(second, l, e) == [t], "the new map at the second router", 10)
                streams.check()
            done = streams.done
            wait_for(lambda: streams.done >= done + 4, "requests over the moved experts")
            check(not second.status()["redis"]["up"], "the second router reached Redis")
            epoch = first.status()["epoch"]
            check(second.status()["epoch"] == epoch, f"epochs {second.status()['epoch']} and {epoch}")
            nodes.redis_paths["r1"].heal()
            wait_for(lambda: second.status()["redis"]["up"] and len(first.status()["routers"]) == 2, "the second router at Redis again")
            streams.check()
        streams.check()
        print(f"figure: {MOVES} moves behind the back of a router without Redis, one replica of each expert: {streams.done} requests, 0 failed")


main([router_without_redis])
