"""Experts move while streams decode, and at a step of the move a process dies: each step of the leader's migration and of the workers'
loads and drops × the leader, the source, the destination, the other router (kill -9), Redis (stopped for a while). Two replicas.

After each cell, with the process started again: no request failed and no token was wrong (but for requests to a router while it is
dead); the move is finished or rolled back; every expert has two READY replicas on workers that live; no migration is left in Redis.
Short form: a seeded sample of the cells; MOESAIC_TEST_FULL=1: all. An argument "I/N" takes the I-th of N parts of them."""
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import time

from harness import BIN, FULL, check, main
from nodes import Nodes, Streams, wait_for

SEED = 20261122
SAMPLE = 10
WORKERS, LAYERS, EXPERTS = 4, 6, 16
CLIENTS = 3
REDIS_STOPPED_S = 1.2
CELL_TIMEOUT_S = 40

BY_LEADER = ("migrate-plan", "migrate-copy", "migrate-publish", "migrate-switch", "migrate-drain", "migrate-remove", "migrate-drop",
             "migrate-end", "map-written")
BY_DESTINATION = ("load-begin", "load-copy", "load-pack", "load-check", "load-end")
BY_SOURCE = ("drop",)
VICTIMS = ("leader", "router", "source", "destination", "redis")


class Clients(Streams):
    """Ask routers that are not known to be dead, as a front with health checks would."""

    def __init__(self, routers, clients):
        super().__init__(routers, clients)
        self.dead = set()

    def excused(self, router, error):
        cut_short = isinstance(error, (OSError, http.client.HTTPException)) or "the stream ended with" in str(error) and "error" not in str(error)
        return router in self.dead and cut_short

    def choose(self, number):
        return next(r for r in self.routers[number % 2:] + self.routers if r not in self.dead)


class Cell:
    def __init__(self, nodes, clients, number, point, victim):
        self.nodes, self.clients, self.point = nodes, clients, point
        self.name = f"{point} × {victim}"
        self.operation = f"cell-{number}"
        self.layer, self.expert = number % LAYERS, number % EXPERTS
        leader = next(r["id"] for r in nodes.routers[0].status()["routers"] if r["leader"])
        self.leader = nodes.node(leader)
        self.other = next(r for r in nodes.routers if r is not self.leader)
        holders = self.holders()
        self.source = nodes.node(holders[0])
        self.destination = next(w for w in nodes.workers if w.name not in holders)
        self.victim = {"leader": self.leader, "router": self.other, "source": self.source, "destination": self.destination,
                       "redis": nodes.redis}[victim]
        self.asked = self.other if self.victim is self.leader else self.leader

    def holders(self):
        return json.loads(self.nodes.routers[0].get("/debug/experts")[1])["layers"][self.layer]["replicas"][self.expert]

    def run(self):
        passes = self.leader if self.point in BY_LEADER else self.destination if self.point in BY_DESTINATION else self.source
        path = os.path.join(self.nodes.failpoints, f"{passes.name}.{self.point}")
        number = signal.SIGSTOP if self.victim is self.nodes.redis else signal.SIGKILL
        with open(path + ".new", "w", encoding="utf-8") as f:
            f.write(f"{self.victim.pid} {int(number)}\n")
        if self.victim in self.clients.routers:
            self.clients.dead.add(self.victim)
        os.rename(path + ".new", path)
        mover = subprocess.Popen([os.path.join(BIN, "moesaic"), "move", "--layer", str(self.layer), "--expert", str(self.expert), "--from",
                                  self.source.name, "--to", self.destination.name, "--operation", self.operation, "--router",
                                  f"ipc://{self.nodes.dir}/{self.asked.name}.sock"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: not os.path.exists(path), f"{self.name}: the step", 20, 0.005)
            self.bring_back()
            wait_for(self.at_rest, f"{self.name}: rest", CELL_TIMEOUT_S)
            self.clients.check()
        except BaseException:
            for router in self.nodes.routers:
                if router.alive():
                    print(f"--- {self.name}: {router.name}: {json.dumps(router.status())[:3000]}")
            raise
        finally:
            mover.kill()
            mover.wait()

    def bring_back(self):
        if self.victim is self.nodes.redis:
            time.sleep(REDIS_STOPPED_S)
            self.victim.signal(signal.SIGCONT)
            return
        self.victim.process.wait(5)
        self.victim.start()
        if self.victim in self.clients.routers:
            wait_for(lambda: self.victim.get("/readiness")[0] == 200, f"{self.victim.name} again")
            self.clients.dead.discard(self.victim)

    def at_rest(self):
        """Served by all as before, the move over one way or the other, and nothing left of it."""
        for router in self.nodes.routers:
            status = router.status()
            if not self.nodes.healed(router) or len(status["routers"]) != len(self.nodes.routers):
                return False
            operation = [o for o in status["operations"] if o["id"] == self.operation]
            if operation and operation[0]["state"] not in ("done", "failed"):
                return False
        return not self.nodes.redis_command("KEYS", "moe:*:mig:*") and self.map_is_sound()

    def map_is_sound(self):
        keys = self.nodes.redis_command("KEYS", "moe:*:meta").split()
        meta = json.loads(self.nodes.redis_command("GET", keys[0])) if len(keys) == 1 else {"epoch": 0}
        text = self.nodes.redis_command("GET", keys[0].replace(":meta", f":map:{meta['epoch']}")) if keys else ""
        if not text:
            return False
        entries = [entry for layer in json.loads(text)["layers"] for entry in layer]  # [digest, worker, state, worker, state, …]
        check(len(entries) == LAYERS * EXPERTS, f"{len(entries)} entries")
        held = {w["id"]: w["experts"] for w in self.nodes.routers[0].status()["workers"]}
        ready = [entry[2::2] for entry in entries]  # a move that was given up after its destination was published leaves three
        return all(len(states) >= 2 and set(states) == {1} for states in ready) and sum(held.values()) == sum(map(len, ready))


def cells():
    every = [(point, victim) for point in BY_LEADER + BY_DESTINATION + BY_SOURCE for victim in VICTIMS]
    random.Random(SEED).shuffle(every)
    part, parts = map(int, sys.argv[1].split("/")) if len(sys.argv) > 1 else (1, 1)
    return every[part - 1::parts] if FULL else every[:SAMPLE]


def crash_matrix():
    with Nodes(WORKERS, routers=2, router_args=("--no-auto-placement", "--copy-from", "peer")) as nodes:
        wait_for(lambda: all(nodes.healed(r) and len(r.status()["routers"]) == 2 for r in nodes.routers), "two replicas of every expert")
        with Clients(nodes.routers, CLIENTS) as clients:
            longest = 0.0
            for number, (point, victim) in enumerate(cells()):
                began = time.monotonic()
                Cell(nodes, clients, number, point, victim).run()
                longest = max(longest, time.monotonic() - began)
                print(f"{point} × {victim}: {time.monotonic() - began:.1f} s", flush=True)
        clients.check()
        check(clients.done > len(cells()), f"only {clients.done} requests ended")
        print(f"figure: migration crash matrix on real processes: {len(cells())} cells, all invariants held; {clients.done} requests, 0 failed; "
              f"the longest cell took {longest:.1f} s")


main([crash_matrix])
