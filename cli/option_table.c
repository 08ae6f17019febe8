#include "cli/option_table.h"

#include <stdint.h>

#include "expert-worker/cold.h"
#include "expert-worker/eviction.h"
#include "router/engine/pipeline.h"

#define GiB (1024.0 * 1024.0 * 1024.0)
#define MAX_BYTES 0x1p52

enum {
    SERVE = 1 << MOE_COMMAND_SERVE,
    ROUTER = 1 << MOE_COMMAND_ROUTER,
    WORKER = 1 << MOE_COMMAND_WORKER,
    CHAT = 1 << MOE_COMMAND_CHAT,
    STATUS = 1 << MOE_COMMAND_STATUS,
    EVAL = 1 << MOE_COMMAND_EVAL,
    TRAIN = 1 << MOE_COMMAND_TRAIN_PREGATE,
    TRACE = 1 << MOE_COMMAND_TRACE,
    REPLAY = 1 << MOE_COMMAND_TRACE_REPLAY,
    KEYGEN = 1 << MOE_COMMAND_KEYGEN,
    DIGEST = 1 << MOE_COMMAND_DIGEST,
    BENCH = 1 << MOE_COMMAND_BENCH,
    PLACEMENT = 1 << MOE_COMMAND_PLACEMENT,
    MOVE = 1 << MOE_COMMAND_MOVE,
    REPLICATE = 1 << MOE_COMMAND_REPLICATE,
    DRAIN = 1 << MOE_COMMAND_DRAIN,
    REBALANCE = 1 << MOE_COMMAND_REBALANCE,
    UNDRAIN = 1 << MOE_COMMAND_UNDRAIN,
    OPERATIONS = MOVE | REPLICATE | DRAIN | UNDRAIN | REBALANCE,
    OPERATORS = PLACEMENT | OPERATIONS,
    HEALTH = 1 << MOE_COMMAND_HEALTH,
    NODES = SERVE | ROUTER | WORKER,
    FRONTS = SERVE | ROUTER,
    TEXTS = EVAL | TRAIN | TRACE,
    MODELS = NODES | TEXTS | BENCH,
    ENGINES = SERVE | ROUTER | TEXTS | BENCH,
    ALL = (1 << MOE_COMMAND_COUNT) - 1
};

static const moe_command commands[MOE_COMMAND_COUNT] = {
    {"serve", "MODEL", "Serve a model from a whole cluster on this machine: Redis, a router, expert workers"},
    {"router", "MODEL", "Run one router of a cluster"},
    {"worker", "[MODEL]", "Run one expert worker of a cluster"},
    {"chat", NULL, "Talk to a served model in the terminal"},
    {"status", NULL, "Show a cluster's workers, experts and loads"},
    {"eval", "MODEL", "Loss and perplexity of a model over texts, by domain, as JSON"},
    {"train-pregate", "MODEL", "Train pre-gates for a model on texts, and show what they are worth"},
    {"trace", "MODEL", "Record which experts the tokens of texts are routed to"},
    {"trace replay", "FILE", "Show what eviction policies would make of a routing trace, at several budgets"},
    {"keygen", "DIR", "Make the key files that authenticate routers, workers and operators over tcp"},
    {"digest", "MODEL", "Hash every expert of a checkpoint into a manifest, by which routers refuse workers whose copy differs"},
    {"bench", "MODEL", "Speed of decode and prefill, with experts in process and in workers over shared memory, ipc and tcp"},
    {"placement", "plan", "Show what the placement policy would move now, and why, without moving it"},
    {"move", NULL, "Move one expert from a worker to another"},
    {"replicate", NULL, "Give one expert another replica"},
    {"drain", "WORKER", "Move all experts off a worker, so that it can be stopped"},
    {"undrain", "WORKER", "Take back a drain: the worker gets experts again"},
    {"rebalance", NULL, "Even out the load of the workers now"},
    {"health", "ROLE", "Whether ROLE serves, for health checks: this machine's router or worker, or cluster: no replica is missing"},
};

#define INT MOE_OPTION_INT
#define FLOAT MOE_OPTION_FLOAT
#define BYTES MOE_OPTION_BYTES
#define DURATION MOE_OPTION_DURATION
#define TEXT MOE_OPTION_TEXT
#define CHOICE MOE_OPTION_CHOICE
#define BOOL MOE_OPTION_BOOL

static const moe_option_row rows[] = {
    /* name, type, commands, group, default, min, max, choices, value, help */
    {"workers", INT, SERVE | BENCH, "Cluster", "2", 0, 60, NULL, "N",
     "expert workers to start; 0 keeps the experts in the router's process and needs no Redis"},
    {"replicas", INT, FRONTS, "Cluster", "1", 1, 8, NULL, "R", "workers that hold each expert"},
    {"initial-workers", INT, ROUTER, "Cluster", "0", 0, 256, NULL, "N",
     "workers that the first placement waits for; 0: as many as the replicas need, and 2 s without a join"},
    {"placement", TEXT, FRONTS, "Cluster", "balanced", 0, 0, NULL, "HOW",
     "how experts are laid out at first: balanced, random:SEED, or a JSON file of worker ids by layer and expert"},
    {"restart", CHOICE, SERVE, "Cluster", "all", 0, 0, "never|workers|all", NULL,
     "which processes are started again when they die"},
    {"run-dir", TEXT, SERVE, "Cluster", NULL, 0, 0, NULL, "DIR",
     "folder (mode 0700) for sockets and cluster.json; default: a fresh one below $XDG_RUNTIME_DIR or /tmp"},
    {"cluster", TEXT, WORKER | OPERATORS, "Cluster", NULL, 0, 0, NULL, "DIR",
     "run folder of a `moesaic serve` on this machine, to join or to ask"},
    {"store", TEXT, ROUTER | WORKER, "Cluster", NULL, 0, 0, NULL, "ADDRESS",
     "the cluster's Redis: host:port, unix:/path, or sentinel://host:port,host:port/master-name"},
    {"redis-username", TEXT, ROUTER | WORKER, "Cluster", NULL, 0, 0, NULL, "NAME", "Redis ACL user"},
    {"redis-password-file", TEXT, ROUTER | WORKER, "Cluster", NULL, 0, 0, NULL, "FILE",
     "file whose first line is the Redis password"},
    {"cluster-name", TEXT, ROUTER | WORKER, "Cluster", "default", 0, 0, NULL, "NAME", "prefix of the cluster's keys in Redis"},
    {"id", TEXT, ROUTER | WORKER, "Cluster", NULL, 0, 0, NULL, "NAME",
     "stable name of this process; default: made from host and process id"},
    {"state-dir", TEXT, ROUTER | WORKER, "Cluster", NULL, 0, 0, NULL, "DIR",
     "keep here what must outlive this process: a router's newest map, the highest epoch that a worker saw"},
    {"replica-wait", DURATION, ENGINES, "Cluster", "2s", 0, 3600, NULL, "TIME",
     "how long a step waits when an expert has no live replica, before its requests fail with 503"},

    {"host", TEXT, FRONTS | HEALTH, "Network", "127.0.0.1", 0, 0, NULL, "ADDRESS", "address of the HTTP API"},
    {"port", INT, FRONTS | HEALTH, "Network", "8000", 0, 65535, NULL, "P", "port of the HTTP API; 0 takes a free one"},
    {"api-key", TEXT, FRONTS, "Network", NULL, 0, 0, NULL, "KEY", "required of HTTP clients as a Bearer token"},
    {"api-key-file", TEXT, FRONTS, "Network", NULL, 0, 0, NULL, "FILE", "file whose first line is the --api-key"},
    {"ssl-certfile", TEXT, FRONTS | HEALTH, "Network", NULL, 0, 0, NULL, "FILE",
     "the HTTP API speaks TLS (1.2 or later) alone, with this certificate and those between it and its root, in PEM"},
    {"ssl-keyfile", TEXT, FRONTS, "Network", NULL, 0, 0, NULL, "FILE", "key of --ssl-certfile, in PEM; default: it is in that file"},
    {"transport", CHOICE, SERVE, "Network", "auto", 0, 0, "auto|inproc|shm|zmq", NULL,
     "how the router reaches workers: through shared memory (shm) or ZeroMQ (zmq: ipc sockets, or tcp with --listen); auto: shm, zmq "
     "with --listen, inproc with --workers 0"},
    {"listen", TEXT, NODES | HEALTH, "Network", NULL, 0, 0, NULL, "ENDPOINT",
     "RPC endpoint: shm:/path or ipc:///path on this host, or tcp://host:port, which needs --keys; port 0 takes a free one. "
     "serve: tcp://host:0 puts its workers on tcp"},
    {"advertise", TEXT, WORKER, "Network", NULL, 0, 0, NULL, "ENDPOINT",
     "endpoint that routers use, where it differs from --listen; default for tcp://0.0.0.0: this host's address"},
    {"keys", TEXT, NODES | OPERATORS | HEALTH, "Network", NULL, 0, 0, NULL, "DIR",
     "key folder of `moesaic keygen`; authenticates and encrypts tcp endpoints"},

    {"served-model-name", TEXT, FRONTS, "Model", NULL, 0, 0, NULL, "NAME", "name in the API; default: the model folder's"},
    {"expert-digests", TEXT, FRONTS, "Model", NULL, 0, 0, NULL, "FILE",
     "manifest of `moesaic digest`: workers whose experts differ from it are refused; default: MODEL/expert-digests.json, where it is "
     "there, else what is first reported counts"},
    {"load-format", CHOICE, MODELS, "Model", "auto", 0, 0, "auto|dummy", NULL,
     "where the weights come from; auto: MODEL's safetensors; dummy: random ones for MODEL's config.json, which alone is needed "
     "(with --skip-tokenizer-init)"},
    {"layers", INT, MODELS, "Model", "0", 0, 512, NULL, "N",
     "with --load-format dummy: the model's first N layers alone; 0: all"},
    {"seed", INT, CHAT | MODELS, "Model", NULL, 0, 9007199254740991.0, NULL, "N",
     "of --load-format dummy: other weights (default 0); chat: makes answers repeatable; train-pregate: another order of the "
     "samples"},
    {"max-model-len", INT, ENGINES, "Model", "0", 0, 1 << 24, NULL, "N", "tokens of prompt and output; 0: what the model allows"},
    {"skip-tokenizer-init", BOOL, FRONTS | BENCH, "Model", "false", 0, 0, NULL, NULL,
     "serve token ids alone, for checkpoints without a tokenizer"},
    {"chat-template-fallback", CHOICE, FRONTS, "Model", NULL, 0, 0, "chatml|llama2|llama3|mistral", NULL,
     "chat template where the model has none"},

    {"gating", CHOICE, ENGINES & ~TRAIN, "Experts", "gate", 0, 0, "gate|hint|pre-gate", NULL,
     "who chooses experts: each layer's gate; the gate, with a prediction sent ahead; or the pre-gate, one layer ahead"},
    {"dummy-routing", TEXT, ENGINES & ~TRAIN, "Experts", NULL, 0, 0, NULL, "HOW",
     "with --load-format dummy, whose gates route almost evenly: zipf:S chooses the experts instead, skewed by Zipf's exponent S, and "
     "each choice with probability P that of the token before; zipf:S,locality:P,recall:R,seed:N: P is 0.3 by default, R the part of "
     "hints that is right (1)"},
    {"pre-gates", TEXT, ENGINES, "Experts", NULL, 0, 0, NULL, "FILE",
     "pre-gates that `moesaic train-pregate` wrote, instead of the checkpoint's, or next-gate: the next layer's own gate, untrained"},
    {"combine", CHOICE, ENGINES, "Experts", "auto", 0, 0, "auto|exact|partial", NULL,
     "what workers return: a row per token and expert, or one weighted sum per token. auto: rows, but sums on GPUs without "
     "--deterministic"},
    {"local-steps", CHOICE, ENGINES, "Experts", "on", 0, 0, "on|off", NULL,
     "where the experts are in the router's process: compute a whole forward step at once, or, where routing must be seen or experts come "
     "and go, layer by layer in place, always combining as exact; off: over messages, as with other processes"},
    {"max-queued-calls", INT, SERVE | WORKER | BENCH, "Experts", "1024", 1, 65536, NULL, "N",
     "calls that a worker queues before it refuses"},
    {"max-batch-rows", INT, SERVE | WORKER | BENCH, "Experts", "16384", 1, 1 << 20, NULL, "N",
     "expert rows that a worker computes in one batch"},
    {"max-experts", INT, SERVE | WORKER, "Experts", "0", 0, 1 << 24, NULL, "N",
     "expert replicas that a worker takes, over all layers; 0: no limit"},
    {"copy-rate", BYTES, SERVE | WORKER, "Experts", "1GiB", 0, MAX_BYTES, NULL, "SIZE",
     "bytes a second that a worker copies from other workers at most; 0: no limit"},

    {"device-memory", TEXT, MODELS, "Residency", NULL, 0, 0, NULL, "SIZE",
     "memory for experts' weights on the device of a worker (or, with --workers 0, of the router): bytes, such as 8GiB, or a part of "
     "the share of experts that it holds, such as 25%. Experts that do not fit are copied when they are wanted. Default: all fit"},
    {"host-memory", TEXT, MODELS, "Residency", NULL, 0, 0, NULL, "SIZE",
     "with --device-memory: (pinned) host memory for packed experts, likewise; what does not fit is packed from the checkpoint when "
     "it is wanted. Default: all fit"},
    {"expert-budget", TEXT, (ENGINES & ~(TRAIN | TRACE)) | WORKER, "Residency", NULL, 0, 0, NULL, "X",
     "lossy: route tokens among a part of the experts alone, the most important ones, which change with the load: a percentage of "
     "all, such as 25%, or a number in each layer. Without --device-memory workers have device memory for those; give routers and "
     "workers the same"},
    {"eviction", CHOICE, MODELS, "Residency", "hint-aware", 0, 0, MOE_EVICTION_POLICIES, NULL,
     "with --device-memory: which expert makes room for another. lru: unused for longest; lfu-decay: fewest uses, old ones counting "
     "less; hint-aware: expected to be used last, by uses and the order of layers, and what a hint announced stays"},
    {"cold-experts", CHOICE, MODELS, "Residency", "fetch", 0, 0, MOE_COLD_EXPERTS_CHOICES, NULL,
     "with --device-memory: what becomes of an expert that a batch wants and that is not on the device. fetch: it is copied there; host: "
     "the host computes it while the device computes the others, and experts that are used most move to the device in the background; "
     "auto: of the two whichever is expected to end first, by measured times"},
    {"share", FLOAT, WORKER, "Residency", "1", 1e-6, 1, NULL, "X",
     "part of the model's experts that this worker is going to hold, which percentages of --device-memory are of; serve tells its "
     "workers"},

    {"auto-placement", BOOL, FRONTS, "Placement", "true", 0, 0, NULL, NULL,
     "move and replicate experts as their load asks, and replace what dead workers held; workers that leave hand over in any case"},
    {"rebalance-interval", DURATION, FRONTS, "Placement", "5s", 0.1, 86400, NULL, "TIME", "between two looks at the balance"},
    {"rebalance-hysteresis", FLOAT, FRONTS, "Placement", "0.1", 0.01, 10, NULL, "X",
     "the busiest worker of a layer may cost this part more than the mean before experts move"},
    {"rebalance-dwell", DURATION, FRONTS, "Placement", "30s", 0.1, 86400, NULL, "TIME",
     "an expert that has moved stays for so long"},
    {"load-half-life", DURATION, FRONTS, "Placement", "30s", 0.1, 86400, NULL, "TIME", "of the loads that placement goes by"},
    {"heal-after", DURATION, FRONTS, "Placement", "10s", 0.1, 86400, NULL, "TIME",
     "a worker that is gone for so long is replaced by replicas on others"},
    {"redundant-experts", INT, FRONTS, "Placement", "4", 0, 4096, NULL, "N",
     "replicas of hot experts above --replicas, in each layer at most"},
    {"max-moves", INT, FRONTS, "Placement", "16", 1, 64, NULL, "N", "experts that move at once, all of one layer"},
    {"copy-from", CHOICE, FRONTS, "Placement", "auto", 0, 0, "auto|file|peer", NULL,
     "where a worker gets an expert that moves to it; auto: from a worker on another machine, else from its own file"},

    {"backend", CHOICE, MODELS, "Performance", "cpu", 0, 0, "cpu|cpu-ref|cuda", NULL, "what computes"},
    {"devices", TEXT, MODELS, "Performance", "0", 0, 0, NULL, "LIST",
     "GPUs of --backend cuda, by number. serve and bench: worker i gets the i-th of them, in turn; worker: one expert worker for "
     "each, or auto: one GPU that no other worker has, by a lease in the store; otherwise the first counts"},
    {"router-device", INT, SERVE | BENCH, "Performance", NULL, 0, 63, NULL, "N",
     "GPU of the router or engine; default: the first of --devices"},
    {"deterministic", BOOL, MODELS, "Performance", "false", 0, 0, NULL, NULL,
     "--backend cuda: the same bits at every batch size (the CPU backends always do that)"},
    {"tune-file", TEXT, MODELS, "Performance", NULL, 0, 0, NULL, "FILE",
     "--backend cuda: thresholds between kernels as `bench --tune` measured them; default: those built in"},
    {"dtype", CHOICE, MODELS, "Performance", "auto", 0, 0, "auto|float32|bfloat16", NULL,
     "of activations, keys, values and what is sent; weights stay as stored, sums are float32. auto: float32 on the CPU, "
     "bfloat16 "
     "on a GPU. Routers and workers need the same"},
    {"threads", INT, MODELS | DIGEST, "Performance", "0", 0, 1024, NULL, "N",
     "compute threads of a process; 0: the machine's cores, shared out by serve"},
    {"cores", TEXT, WORKER, "Performance", NULL, 0, 0, NULL, "LIST",
     "cores that this process runs on, such as 0-3,8; default: all. serve binds each worker to its own where cores are few"},
    {"max-num-seqs", INT, ENGINES, "Performance", "64", 1, 4096, NULL, "N", "sequences computed at once"},
    {"max-num-batched-tokens", INT, ENGINES, "Performance", "512", 1, 65536, NULL, "N",
     "tokens of one micro-batch; longer prompts are prefilled in chunks"},
    {"max-waiting", INT, ENGINES, "Performance", "1024", 1, 1 << 20, NULL, "N",
     "requests queued before more are refused with 429"},
    {"micro-batches", INT, ENGINES, "Performance", "0", 0, 8, NULL, "N",
     "micro-batches in flight: while one waits for experts another computes attention; 0: 2, or 1 where the experts are in the "
     "router's process or, under serve, each process has less than two cores"},
    {"pipeline-degree", INT, ENGINES, "Performance", "0", 0, MOE_PIPELINE_MAX_DEGREE, NULL, "N",
     "chunks in which a layer's rows go to the workers, so that packing, wire and computation overlap; 0: tuned while serving, by the "
     "size of the layer"},
    {"poll-us", INT, MODELS, "Performance", "-1", -1, 1000000, NULL, "N",
     "microseconds that a wait for messages may poll before it sleeps, while messages come faster than that; 0: never; -1: 500 "
     "in "
     "the router on two cores or more, and in workers where each process has two"},
    {"kv-cache-memory", BYTES, ENGINES, "Performance", "256MiB", 1, MAX_BYTES, NULL, "SIZE", "memory for keys and values"},

    {"shutdown-timeout", DURATION, FRONTS, "Operation", "30s", 0, 86400, NULL, "TIME",
     "how long SIGTERM waits for requests in flight"},
    {"hand-over-timeout", DURATION, SERVE | WORKER, "Operation", "60s", 0, 86400, NULL, "TIME",
     "a worker that was told to stop waits so long for the next of its experts to be taken over, before it ends with what is left"},
    {"metrics-host", TEXT, WORKER, "Operation", "127.0.0.1", 0, 0, NULL, "ADDRESS",
     "address at which a worker serves /metrics and /health"},
    {"metrics-port", INT, WORKER, "Operation", NULL, 0, 65535, NULL, "P",
     "port of a worker's /metrics and /health, without a key; 0 takes a free one; default: they are not served"},
    {"metrics-compat", CHOICE, FRONTS, "Operation", "none", 0, 0, "none|vllm", NULL, "vllm: /metrics also has vLLM's names"},
    {"log-level", CHOICE, ALL, "Operation", "info", 0, 0, "debug|info|warn|error", NULL, "least severity logged"},
    {"config", TEXT, ALL, "Operation", NULL, 0, 0, NULL, "FILE", "YAML file of options, one `name: value` a line"},

    {"url", TEXT, CHAT | STATUS, "Client", "http://127.0.0.1:8000", 0, 0, NULL, "URL", "the API to talk to"},
    {"client-key", TEXT, CHAT | STATUS | HEALTH, "Client", NULL, 0, 0, NULL, "KEY", "the server's --api-key"},
    {"client-key-file", TEXT, CHAT | STATUS | HEALTH, "Client", NULL, 0, 0, NULL, "FILE", "file whose first line is the --client-key"},
    {"ssl-ca-certs", TEXT, CHAT | STATUS, "Client", NULL, 0, 0, NULL, "FILE",
     "certificates that an https server is trusted by, in PEM; default: the system's"},
    {"live", BOOL, HEALTH, "Client", "false", 0, 0, NULL, NULL,
     "of a router: whether the process answers, be it ready or not"},
    {"router", TEXT, OPERATORS, "Client", NULL, 0, 0, NULL, "ENDPOINT", "RPC endpoint of a router to ask, where not by --cluster"},
    {"operation", TEXT, OPERATIONS, "Client", NULL, 0, 0, NULL, "ID",
     "name of the operation; asking again with the same name does nothing more; default: made by the router"},
    {"layer", INT, MOVE | REPLICATE, "Client", "0", 0, 1 << 20, NULL, "L", "MoE layer of the expert, from 0"},
    {"expert", INT, MOVE | REPLICATE, "Client", "0", 0, 1 << 20, NULL, "E", "the expert, from 0"},
    {"from", TEXT, MOVE, "Client", NULL, 0, 0, NULL, "WORKER", "the worker that has it"},
    {"to", TEXT, MOVE | REPLICATE, "Client", NULL, 0, 0, NULL, "WORKER", "the worker to get it; replicate: default the least loaded"},
    {"wait", DURATION, OPERATIONS, "Client", "10m", 0, 86400, NULL, "TIME", "how long to wait for the end; 0: not at all"},
    {"json", BOOL, STATUS, "Client", "false", 0, 0, NULL, NULL, "print JSON"},
    {"system", TEXT, CHAT, "Client", NULL, 0, 0, NULL, "TEXT", "system message"},
    {"temperature", FLOAT, CHAT, "Client", NULL, 0, 10, NULL, "T", "sampling temperature; 0 is greedy; default: the model's"},
    {"max-tokens", INT, CHAT, "Client", "512", 1, 1 << 20, NULL, "N", "tokens of an answer at most"},

    {"data", TEXT, TEXTS, "Texts", NULL, 0, 0, NULL, "FILE",
     "texts, one {\"domain\", \"text\"} or {\"domain\", \"token_ids\"} a line; ids alone need no tokenizer (required)"},
    {"limit", INT, TEXTS, "Texts", "0", 0, 1e9, NULL, "N", "texts at most; 0: all"},
    {"output", TEXT, TRAIN | TRACE | DIGEST, "Texts", NULL, 0, 0, NULL, "FILE",
     "file to write, -o for short; train-pregate and trace: required; digest: default MODEL/expert-digests.json"},
    {"timeline", TEXT, TRACE, "Texts", NULL, 0, 0, NULL, "FILE",
     "instead of recording texts: draw what router, experts and copies do in the last steps of a short generation, as SVG; with --gating "
     "and --device-memory"},
    {"requests", INT, TRACE | REPLAY, "Texts", "1", 1, 1024, NULL, "N",
     "replay: texts of the trace that are decoded at once; --timeline: requests of the generation"},
    {"valid", TEXT, TRAIN, "Texts", NULL, 0, 0, NULL, "FILE",
     "texts on which the result is measured; default: those of --data that are held out, one of 20"},
    {"epochs", INT, TRAIN, "Texts", "10", 1, 1000, NULL, "N", "passes over the samples at most; fewer where they no longer help"},
    {"lr", FLOAT, TRAIN, "Texts", "0.001", 1e-8, 1, NULL, "X", "learning rate at the start"},
    {"sample-memory", BYTES, TRAIN, "Texts", "4GiB", 1, MAX_BYTES, NULL, "SIZE",
     "of the nameless file beside --output that keeps samples; of more tokens a random part is kept"},

    {"experts", TEXT, BENCH, "Benchmark", "inproc,shm,ipc,tcp", 0, 0, NULL, "LIST",
     "where the experts are, measured side by side: in the engine's process, in workers over shared memory, over ipc, over tcp with "
     "CURVE"},
    {"concurrency", TEXT, BENCH, "Benchmark", "1,8,32", 0, 0, NULL, "LIST", "requests decoded at once, one measurement each"},
    {"prompt-tokens", INT, BENCH, "Benchmark", "32", 1, 1 << 20, NULL, "N", "tokens of a prompt before its decode"},
    {"output-tokens", INT, BENCH, "Benchmark", "128", 2, 1 << 20, NULL, "N", "tokens decoded of each request"},
    {"prefill-tokens", TEXT, BENCH, "Benchmark", "512", 0, 0, NULL, "LIST",
     "tokens of a prompt whose prefill is measured, one measurement each"},
    {"measured-bandwidth", FLOAT, BENCH, "Benchmark", NULL, 0, 1e6, NULL, "GB/S",
     "of this machine's memory: with --measured-rate, results are shown beside the least time that their weights, keys and values "
     "take to be read and multiplied"},
    {"measured-rate", FLOAT, BENCH, "Benchmark", NULL, 0, 1e6, NULL, "TFLOP/S", "of this machine's largest matrix products"},
    {"sweep", TEXT, BENCH, "Benchmark", NULL, 0, 0, NULL, "LIST",
     "with --experts inproc: settings measured one after another with the model loaded once, such as \"gating=gate device-memory=100%; "
     "gating=pre-gate device-memory=25% cold-experts=auto dummy-routing=zipf:1.0\"; the options say what a setting does not name"},
    {"runs", INT, BENCH, "Benchmark", "5", 1, 101, NULL, "N", "rounds over all measurements, after one that warms up"},
    {"tune", BOOL, BENCH, "Benchmark", "false", 0, 0, NULL, NULL,
     "only measure which kernels suit this model's experts on the first of --devices, and put it into --tune-file"},
    {"csv", TEXT, BENCH, "Benchmark", NULL, 0, 0, NULL, "FILE", "write every measurement here, one a line"},
};

const moe_option_table *moe_option_table_get(void) {
    static const moe_option_table table = {"moesaic", commands, MOE_COMMAND_COUNT, rows, sizeof rows / sizeof *rows};
    return &table;
}
