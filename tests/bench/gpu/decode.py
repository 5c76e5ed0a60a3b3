#!/usr/bin/env python3
"""Speed of decoding on one GPU, models with random weights: one line per setting.

    decode.py [--tapeft FILE] [--bench FILE] [--work FOLDER] [MODEL[:TOKENS[:SEQUENCES[:TEMPERATURE[:RANK]]]]]...

MODEL is one of 135m, 1b, 8b, made by `tapeft init` where it is missing; the rest goes to bench_decode (see there), which prints the time of
a step and its share of what memory allows: copy bandwidth / bytes of the weights that a token reads. --kernels FILE.so puts
kernel_times.c in, which slows launches; its table goes to stdout.
"""
import argparse
import os
import pathlib
import subprocess

import models

ROOT = pathlib.Path(__file__).resolve().parents[3]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tapeft", default=str(ROOT / "build/tapeft"))
parser.add_argument("--bench", default=str(ROOT / "build/tests/bench/gpu/bench_decode"))
parser.add_argument("--work", default="/tmp/tapeft-bench")
parser.add_argument("--kernels", default="")
parser.add_argument("settings", nargs="*", default=["135m:512", "135m:512:8", "135m:512:1:1.0", "135m:512:1:0:16", "1b:256", "8b:128", "8b:128:8"])
args = parser.parse_args()
work = pathlib.Path(args.work)
work.mkdir(parents=True, exist_ok=True)

for setting in args.settings:
    name, *rest = setting.split(":")
    endless = {key: value for key, value in models.MODELS[name].items() if key != "eos_token_id"}  # no token ends a reply
    model = models.make(args.tapeft, work, name, endless)
    environment = dict(os.environ)
    if args.kernels:
        environment |= {"CUDA_INJECTION64_PATH": args.kernels, "TAPEFT_KERNEL_TIMES_SKIP": "0"}
    done = subprocess.run([args.bench, str(model), *(rest or ["256"])], capture_output=True, text=True, env=environment)
    print(done.stdout.strip(), flush=True)
    if done.returncode or args.kernels:
        print("\n".join(line[:200] for line in done.stderr.splitlines()[:40]), flush=True)
