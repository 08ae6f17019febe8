"""PyTorch and transformers on a model shape with random bf16 weights on the GPU: decode by batch, prefill by prompt; beside Moesaic's
figures for the same cases where they are given.

    peer_transformers.py CONFIG_DIR [--layers N] [--batches 1,64,256] [--prompt 128] [--new 128] [--prefill 2048]
                         [--variants grouped_mm,batched_mm@1] [--seconds S] [--csv FILE] [--moesaic FILE]

A variant is transformers' way of computing experts (experts_implementation), with `+static` a cache of fixed size in place of a growing
one, and with `+compile` torch.compile over that (CUDA graphs); `@N` limits it to batches up to N. Decode: after the prompts, one token for every sequence a step, greedy;
at least 8 steps, until --new tokens or --seconds have passed. Prefill: one prompt to its first token, the median of 3.
--moesaic: the CSV of `moesaic bench`; the last table then has the ratios (its medians, to the fastest variant)."""
import argparse
import csv
import statistics
import sys
import time

WARM_UP_STEPS, LEAST_STEPS, PREFILL_RUNS = 3, 8, 3


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--batches", default="1,64,256")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--prefill", default="2048")
    parser.add_argument("--variants", default="grouped_mm,batched_mm@1,grouped_mm+compile@64")
    parser.add_argument("--seconds", type=float, default=10, help="of one decode at most, its warm-up not counted")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which no further case begins")
    parser.add_argument("--csv")
    parser.add_argument("--moesaic")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def numbers(text):
    return [int(n) for n in text.split(",") if n]


class Peer:
    def __init__(self, options):
        import torch
        import transformers
        self.torch, self.transformers, self.options = torch, transformers, options
        self.config = transformers.AutoConfig.from_pretrained(options.config)
        if options.layers:
            self.config.num_hidden_layers = options.layers
            if getattr(self.config, "layer_types", None):
                self.config.layer_types = self.config.layer_types[:options.layers]
        began = time.perf_counter()
        torch.manual_seed(1)
        torch.set_grad_enabled(False)
        with torch.device(options.device):
            self.model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16).eval()
        self.plain_forward = self.model.forward
        self.sync()
        parameters = sum(p.numel() for p in self.model.parameters())
        name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        print(f"torch {torch.__version__}, transformers {transformers.__version__}, {name}; {parameters / 1e9:.2f} G parameters, "
              f"made in {time.perf_counter() - began:.0f} s", flush=True)

    def sync(self):
        if self.options.device == "cuda":
            self.torch.cuda.synchronize()

    def ids(self, batch, length):
        generator = self.torch.Generator().manual_seed(batch * 65536 + length)
        return self.torch.randint(0, self.config.vocab_size, (batch, length), generator=generator).to(self.options.device)

    def choose(self, variant):
        """Sets the experts' implementation and the forward function; returns whether caches have a fixed size."""
        experts, *more = variant.split("+")
        self.model.set_experts_implementation(experts)
        self.torch.compiler.reset()
        self.compiled = "compile" in more
        self.decode_step = self.torch.compile(self.plain_forward, mode="reduce-overhead") if self.compiled else self.plain_forward
        return self.compiled or "static" in more

    def cache(self, static, batch, length):
        if not static:
            return self.transformers.DynamicCache(config=self.config)
        return self.transformers.StaticCache(config=self.config, max_cache_len=length)

    def forward(self, function, ids, cache, position):
        positions = self.torch.arange(position, position + ids.shape[1], device=ids.device)
        out = function(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, position_ids=positions[None])
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def decode(self, variant, batch):
        """(tokens, seconds)"""
        static, o = self.choose(variant), self.options
        cache = self.cache(static, batch, o.prompt + o.new)
        token = self.forward(self.plain_forward, self.ids(batch, o.prompt), cache, 0)
        at = o.prompt
        for _ in range(WARM_UP_STEPS):
            token = self.forward(self.decode_step, token.clone(), cache, at)
            at += 1
        self.sync()
        began, steps, seconds = time.perf_counter(), 0, 0.0
        while at < o.prompt + o.new and (steps < LEAST_STEPS or seconds < o.seconds):
            token = self.forward(self.decode_step, token.clone(), cache, at)
            at, steps = at + 1, steps + 1
            if steps % LEAST_STEPS == 0:
                self.sync()
                seconds = time.perf_counter() - began
        self.sync()
        return batch * steps, time.perf_counter() - began

    def prefill(self, variant, length):
        static, times = self.choose(variant), []
        for _ in range(PREFILL_RUNS + 1):
            cache = self.cache(static, 1, length + 1)
            ids = self.ids(1, length)
            self.sync()
            began = time.perf_counter()
            self.forward(self.plain_forward, ids, cache, 0)
            self.sync()
            times.append(time.perf_counter() - began)
        return length, statistics.median(times[1:])


def measure(peer, options):
    """Rows of dicts; a case that fails says so and is left out."""
    rows, began = [], time.perf_counter()
    for text in options.variants.split(","):
        variant, _, most = text.partition("@")
        cases = [("decode", n) for n in numbers(options.batches) if not most or n <= int(most)]
        cases += [("prefill", n) for n in numbers(options.prefill) if text == variant and "+" not in text]
        for phase, size in cases:
            if time.perf_counter() - began > options.budget:
                print(f"{variant} {phase} {size}: not run, the time of --budget is over", flush=True)
                continue
            try:
                tokens, seconds = (peer.decode if phase == "decode" else peer.prefill)(variant, size)
            except Exception as error:  # out of memory, or a variant that this version lacks
                print(f"{variant} {phase} {size}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                if options.device == "cuda":
                    peer.torch.cuda.empty_cache()
                continue
            rows.append({"variant": variant, "phase": phase, "size": size, "tokens": tokens, "seconds": f"{seconds:.6f}",
                         "tokens_per_second": f"{tokens / seconds:.2f}"})
            print(f"{variant} {phase} {size}: {tokens / seconds:.1f} tokens/s", flush=True)
    return rows


def medians_of(path):
    """{(phase, size): median tokens/s} of Moesaic with the experts in the engine's process."""
    figures = {}
    with open(path, encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            if row["experts"] != "inproc":
                continue
            size = int(row["prompt_tokens"] if row["phase"] == "prefill" else row["requests"])
            figures.setdefault((row["phase"], size), []).append(float(row["tokens_per_second"]))
    return {case: statistics.median(speeds) for case, speeds in figures.items()}


def report(rows, ours):
    print(f"\n{'':<14} {'transformers':>12}  {'variant':<20} {'moesaic':>10} {'ratio':>7}   tokens/s")
    for case in dict.fromkeys((r["phase"], r["size"]) for r in rows):
        best = max((r for r in rows if (r["phase"], r["size"]) == case), key=lambda r: float(r["tokens_per_second"]))
        speed, mine = float(best["tokens_per_second"]), ours.get(case)
        what = f"{case[0]} x{case[1]}" if case[0] == "decode" else f"{case[0]} {case[1]}"
        tail = f"{mine:>10.0f} {mine / speed:>7.2f}" if mine else f"{'-':>10} {'-':>7}"
        print(f"{what:<14} {speed:>12.1f}  {best['variant']:<20} {tail}")


def main():
    options = arguments()
    rows = measure(Peer(options), options)
    if options.csv:
        with open(options.csv, "w", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=["variant", "phase", "size", "tokens", "seconds", "tokens_per_second"])
            writer.writeheader()
            writer.writerows(rows)
    report(rows, medians_of(options.moesaic) if options.moesaic else {})
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
