#!/usr/bin/env python3
"""Speed of decoding on one GPU, models with random weights: one line per setting.

    decode.py [--tapeft FILE] [--bench FILE] [--work FOLDER] [MODEL[:TOKENS[:SEQUENCES[:TEMPERATURE]]]]...

MODEL is one of 135m, 1b, 8b, made by `tapeft init` where it is missing; the rest goes to bench_decode (see there), which prints the time of
a step and its share of what memory allows: copy bandwidth / bytes of the weights that a token reads. --kernels FILE.so puts
kernel_times.c in, which slows launches; its table goes to stdout.
"""
import argparse
import json
import os
import pathlib
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[3]
LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
COMMON = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "initializer_range": 0.02,
          "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "torch_dtype": "bfloat16"}
MODELS = {
    "135m": {**COMMON, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
             "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192, "rope_theta": 100000.0},
    "1b": {**COMMON, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True, "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "8b": {**COMMON, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False, "max_position_embeddings": 131072, "rope_theta": 500000.0,
           "rope_scaling": {**LLAMA3, "factor": 8.0}},
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tapeft", default=str(ROOT / "build/tapeft"))
parser.add_argument("--bench", default=str(ROOT / "build/tests/bench/gpu/bench_decode"))
parser.add_argument("--work", default="/tmp/tapeft-bench")
parser.add_argument("--kernels", default="")
parser.add_argument("settings", nargs="*", default=["135m:512", "135m:512:8", "135m:512:1:1.0", "1b:256", "8b:128", "8b:128:8"])
args = parser.parse_args()
work = pathlib.Path(args.work)
work.mkdir(parents=True, exist_ok=True)

for setting in args.settings:
    name, *rest = setting.split(":")
    model = work / name
    if not model.exists():
        (work / f"{name}.json").write_text(json.dumps(MODELS[name]))
        began = time.time()
        subprocess.run([args.tapeft, "init", str(work / f"{name}.json"), "--out", str(model)], check=True)
        print(f"init {name}: {time.time() - began:.1f} s", flush=True)
    environment = dict(os.environ)
    if args.kernels:
        environment |= {"CUDA_INJECTION64_PATH": args.kernels, "TAPEFT_KERNEL_TIMES_SKIP": "0"}
    done = subprocess.run([args.bench, str(model), *(rest or ["256"])], capture_output=True, text=True, env=environment)
    print(done.stdout.strip(), flush=True)
    if done.returncode or args.kernels:
        print("\n".join(line[:200] for line in done.stderr.splitlines()[:40]), flush=True)
