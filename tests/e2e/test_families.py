"""Every supported family's fixture served without a tokenizer, over workers: greedy tokens equal transformers' (switch_decoder's:
numpy's, tests/tools/make_switch_checkpoint.py)."""
import json
import os

from harness import ROOT, Cluster, check, main

CHECKPOINTS = os.path.join(ROOT, "tests", "data", "checkpoints")


def family(name, workers):
    def test():
        with open(os.path.join(CHECKPOINTS, name, "expected.json"), encoding="utf-8") as f:
            expected = json.load(f)
        with Cluster("--skip-tokenizer-init", model=os.path.join(CHECKPOINTS, name), workers=workers) as cluster:
            got = cluster.complete(expected["ids"], len(expected["greedy"]), ignore_eos=True)
            check(got == expected["greedy"], f"got {got}, expected {expected['greedy']}")
            status, _, body = cluster.post("/v1/completions", {"prompt": "text", "max_tokens": 1})
            check(status == 400 and "tokenizer" in body["error"]["message"], f"a text prompt without a tokenizer: {status} {body}")
            status, _, body = cluster.post("/v1/completions", {"prompt": [1, 999999], "max_tokens": 1})
            check(status == 400 and "999999" in body["error"]["message"], f"a token id outside the vocabulary: {status} {body}")
    test.__name__ = f"family_{name}"
    return test


main([family("qwen3_moe", 2), family("qwen2_moe", 2), family("mixtral", 3), family("olmoe", 2), family("llama_dense", 0),
      family("switch_decoder", 2)])
