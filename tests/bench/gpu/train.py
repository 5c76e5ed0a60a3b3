#!/usr/bin/env python3
"""Speed and memory of LoRA training (r=16 on all linears) on one GPU, for models with random weights: one line per setting.

    train.py [--tapeft FILE] [--work FOLDER] [--steps N] [--ceiling TFLOPS] [--precision bf16] [--tune] [--peers NAME,...] SETTING...

A setting is MODEL:SEQ:BATCH[:recompute or :LIMIT[+offload]], MODEL one of 135m, 1b, 8b; all of the issue's settings if none is given. With
a LIMIT, say 29GiB, the planner chooses what is computed again (memory_limit). Every token is labelled.
--peers trains the same adapter on the same files and GPU afterwards with others, of peft, compiled (the same through torch.compile) and
unsloth, as far as the Python that $TAPEFT_PEERS_PYTHON names, else this one, has them (scripts/peft_train.py); recomputation for a LIMIT.
Printed: the median of tokens/s over the steps after the first four, the share of ceiling / (4 N FLOPs per token) with N the weights
of linears and head, peak memory as nvidia-smi counts it (CUDA context included) and as planned, and the time from the start of
the process to the end of the first step. --kernels FILE.so puts kernel_times.c in, which slows launches; its table goes to stdout,
and before it the time of a step by families of kernels.
--share N measures each setting N times with its adapters and N times with one alone, on the first block's v_proj, in turns, and prints
the share of the step that goes with them: the gradient passes through the same blocks, and the linears have the same room for factors.
"""
import argparse
import json
import os
import pathlib
import random
import statistics
import struct
import subprocess
import sys
import threading
import time

import models

ROOT = pathlib.Path(__file__).resolve().parents[3]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tapeft", default=str(ROOT / "build/tapeft"))
parser.add_argument("--work", default="/tmp/tapeft-bench")
parser.add_argument("--steps", type=int, default=14)
parser.add_argument("--ceiling", type=float, default=0.0)
parser.add_argument("--kernels", default="")
parser.add_argument("--skip", default="0", help="records that the table of kernels leaves out")
parser.add_argument("--device", default="cuda")
parser.add_argument("--precision", default="bf16")
parser.add_argument("--share", type=int, default=0)
parser.add_argument("--tune", action="store_true", help="run `tapeft tune` on each recipe first; what it finds stays in the work folder")
parser.add_argument("--peers", default="", help="of peft, compiled, unsloth")
parser.add_argument("settings", nargs="*", default=["135m:512:64:12GiB", "1b:2048:8", "8b:2048:2:29GiB", "8b:2048:4:41GiB", "8b:2048:8:22GiB", "8b:2048:8:18.5GiB+offload"])
args = parser.parse_args()
work = pathlib.Path(args.work)
work.mkdir(parents=True, exist_ok=True)


def weights(c):
    """Of linears and head: each costs 2 FLOPs per token forward and 2 for the gradient of its input."""
    d, kv = c["hidden_size"], c["num_key_value_heads"] * c["head_dim"]
    layer = 2 * d * c["num_attention_heads"] * c["head_dim"] + 2 * d * kv + 3 * d * c["intermediate_size"]
    return c["num_hidden_layers"] * layer + d * c["vocab_size"]


def write_tokens(path, batch, seq, vocab):
    generator = random.Random(1)
    n = 4 * batch * seq
    ids = struct.pack(f"<{n}q", *(generator.randrange(3, vocab) for _ in range(n)))
    ones = struct.pack("<q", 1) * n
    header, at = {}, 0
    for name in ("attention_mask", "input_ids", "labels"):
        header[name] = {"dtype": "I64", "shape": [4, batch, seq], "data_offsets": [at, at + 8 * n]}
        at += 8 * n
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + ones + ids + ids)


FAMILIES = {  # by what the kernels' names contain; the first that fits
    "adapters: u, du, gradients of factors": ("stream", "thin", "skinny", "stream_cu", "add_kernel", "add_parts"),
    "adapters: packing and copies of u": ("pack_kernel", "scale_chunk"),
    "SwiGLU's gradient with factors": ("swiglu_factors",), "SwiGLU": ("swiglu",), "norms": ("norm",), "rope": ("rope",),
    "attention": ("attention", "fort_native", "fprop", "bprop", "sdpa", "delta", "cudnn"), "cross-entropy": ("entropy",),
    "optimizer": ("adamw", "clip", "square"), "products": ("nvjet", "gemm", "splitK", "cublas", "cutlass"), "copies": ("[copy", "[set")}


def print_families(table):
    """Milliseconds of a step; there are as many steps as launches of AdamW."""
    sums, steps, busy = {}, 1, 0.0
    for line in table:
        fields = line.split(None, 7)
        if len(fields) < 8 or fields[2] != "ms" or fields[4] != "x":
            continue
        name = fields[7]
        family = next((f for f, parts in FAMILIES.items() if any(part in name for part in parts)), "others")
        sums[family] = sums.get(family, 0.0) + float(fields[1])
        busy += float(fields[1])
        if "adamw" in name:
            steps = int(fields[3])
    print(f"a step, by families, of {steps} steps:", flush=True)
    for family, ms in sorted(sums.items(), key=lambda each: -each[1]):
        print(f"  {ms / steps:9.3f} ms {ms / busy:6.1%}  {family}", flush=True)


class MemoryWatch(threading.Thread):
    """Largest memory.used of the GPU, less what was used before."""

    def __init__(self):
        super().__init__(daemon=True)
        self.ended, self.most, self.before = False, 0, self.used()

    @staticmethod
    def used():
        try:
            out = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True)
            return int(out.stdout.split()[0])
        except (OSError, IndexError, ValueError):
            return 0

    def run(self):
        while not self.ended:
            self.most = max(self.most, self.used())
            time.sleep(0.1)

    def end(self):
        self.ended = True
        self.join()

    def gib(self):
        return (self.most - self.before) / 1024


def share(rate, config):
    """Of the rate that the ceiling would allow."""
    flops = rate * 4 * weights(config)
    return f"{flops / (args.ceiling * 1e12):.3f} of the floor" if args.ceiling else f"{flops * 1e-12:.0f} TFLOP/s of 4 N"


def measure_peer(peer, setting, config, model, tokens, recompute):
    """The same adapter, files and GPU by scripts/peft_train.py."""
    watch = MemoryWatch()
    watch.start()
    done = subprocess.run([os.environ.get("TAPEFT_PEERS_PYTHON", sys.executable), str(ROOT / "scripts/peft_train.py"), str(model), str(tokens), "--device", "cuda",
                           "--dtype", "bf16" if args.precision == "bf16" else "f32", "--steps", str(args.steps - 4), "--warmup", "4"]
                          + ["--recompute"] * recompute + {"peft": [], "compiled": ["--compile"], "unsloth": ["--unsloth"]}[peer],
                          capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"})
    watch.end()
    if done.returncode:
        print(f"{setting}: {peer}: exit {done.returncode}: {done.stderr.strip()[-300:]}", flush=True)
        return
    rate = json.loads(done.stdout.strip().splitlines()[-1])["tokens_per_second"]
    print(f"{setting + ' ' + peer:<20} {rate:9.0f} tok/s  {share(rate, config)}  {watch.gib():.2f} GiB", flush=True)


def measure(setting, targets="all-linear"):
    """The median of a step's seconds, or None."""
    parts = setting.split(":")
    name, seq, batch, how = parts[0], int(parts[1]), int(parts[2]), parts[3] if len(parts) > 3 else ""
    limit, _, offload = how.partition("+")
    memory = f"memory_limit: {limit}\nactivation_offloading: {'true' if offload else 'false'}" if limit.endswith("GiB") else f"gradient_checkpointing: {'full' if how == 'recompute' else 'none'}"
    config = models.MODELS[name]
    model = models.make(args.tapeft, work, name, config)
    tokens = work / f"tokens-{config['vocab_size']}-{seq}-{batch}.safetensors"
    if not tokens.exists():
        write_tokens(tokens, batch, seq, config["vocab_size"])
    out = work / "run"
    recipe = work / "recipe.yaml"
    recipe.write_text("\n".join([f"base_model: {model}", "adapter: lora", "lora_r: 16", f"lora_target_modules: {targets}", f"device: {args.device}",
                                 f"precision: {args.precision}", f"datasets:\n  - {{path: {tokens}, type: tokens}}", "shuffle: false", f"max_seq_length: {seq}",
                                 f"max_steps: {args.steps}", "learning_rate: 1e-4", "lr_scheduler: constant", "logging_steps: 1",
                                 memory, f"output_dir: {out}", "overwrite: true"]) + "\n")
    environment = dict(os.environ)
    if args.tune:
        environment["XDG_CACHE_HOME"] = str(work.resolve())
        subprocess.run([args.tapeft, "tune", str(recipe)], capture_output=True, env=environment, check=True)
    if args.kernels:
        environment |= {"CUDA_INJECTION64_PATH": args.kernels, "TAPEFT_KERNEL_TIMES_SKIP": args.skip}
    watch = MemoryWatch()
    watch.start()
    done = subprocess.run([args.tapeft, "train", str(recipe), "--quiet"], capture_output=True, text=True, env=environment)
    watch.end()
    if done.returncode:
        print(f"{setting}: exit {done.returncode}: {done.stderr.strip()[-600:]}", flush=True)
        return None
    rows = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if "seconds" in row][4:]
    losses = [row["loss"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    start = rows[0].get("start_seconds", 0) + rows[1].get("seconds", 0)
    rate = batch * seq / statistics.median(seconds)
    plan = json.loads(subprocess.run([args.tapeft, "plan", str(recipe), "--json"], capture_output=True, text=True).stdout or "{}")
    print(f"{setting:<20} {rate:9.0f} tok/s ({batch * seq / max(seconds):.0f}..{batch * seq / min(seconds):.0f})  {share(rate, config)}  "
          f"{watch.gib():.2f} GiB (planned {plan.get('peak_bytes', 0) / 2**30:.2f})  first step after {start:.2f} s  "
          f"loss {losses[0]:.4f} -> {losses[-1]:.4f}", flush=True)
    if args.kernels:
        print_families(done.stderr.splitlines())
        print("\n".join(line[:240] for line in done.stderr.splitlines()[:60]), flush=True)
    for peer in filter(None, args.peers.split(",")):
        measure_peer(peer, setting, config, model, tokens, recompute=how not in ("", "none"))
    return statistics.median(seconds)


def measure_share(setting):
    first_block = r"'.*\.0\.self_attn\.v_proj'"
    runs = [(measure(setting), measure(setting, first_block)) for _ in range(args.share)]
    if all(with_them and without for with_them, without in runs):
        with_them, without = (statistics.median(side) for side in zip(*runs))
        print(f"{setting:<20} {with_them * 1e3:.2f} ms a step, {without * 1e3:.2f} ms without: {1 - without / with_them:.1%} go with the adapters", flush=True)


for each in args.settings:
    measure_share(each) if args.share else measure(each)
