#!/usr/bin/env python3
"""Opens an adapter folder written by tapeft in Hugging Face PEFT and compares the logits, both sides in fp32 over the same model folder.

    check_peft.py MODEL_FOLDER ADAPTER_FOLDER [--ids FILE.safetensors]

The figure is the largest |difference| / max(1, |logit|); exit status 1 above 1e-4. Without --ids: two rows of 96 tokens of the repository's
held-out problems. Beside it stand the distances of both from PEFT in fp64: what fp32 itself can promise with this model. (Of random tokens
a real model makes logits that are ill-conditioned: there fp32 in torch is off by 1e-3.)
Needs torch, transformers, peft, safetensors, tokenizers; $TAPEFT names the command (build/tapeft).
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

LIMIT = 1e-4

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("adapter")
parser.add_argument("--ids")
args = parser.parse_args()

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

root = pathlib.Path(__file__).resolve().parent.parent
tapeft = os.environ.get("TAPEFT") or str(root / "build" / "tapeft")
base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

with tempfile.TemporaryDirectory() as folder:
    ids_path, out_path = args.ids or f"{folder}/ids.safetensors", f"{folder}/logits.safetensors"
    if not args.ids:
        tokenizer, tokens = Tokenizer.from_file(f"{args.model}/tokenizer.json"), []
        for line in (root / "recipes/data/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            tokens += tokenizer.encode(row["question"] + "\n" + row["answer"] + "\n").ids
        ids = torch.tensor(tokens[: 2 * 96]).reshape(2, 96)
        save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids_path)
    subprocess.run([tapeft, "logits", args.model, "--in", ids_path, "--out", out_path, "--adapter", args.adapter, "--precision", "fp32", "--force"], check=True)
    inputs, ours = load_file(ids_path), load_file(out_path)["logits"]

ids = inputs["input_ids"].long()
mask = inputs.get("attention_mask", torch.ones_like(ids)).long()
with torch.no_grad():
    without = base(input_ids=ids, attention_mask=mask).logits
    theirs = PeftModel.from_pretrained(base, args.adapter).eval()(input_ids=ids, attention_mask=mask).logits
    exactly = PeftModel.from_pretrained(base.double(), args.adapter).eval().double()(input_ids=ids, attention_mask=mask).logits
rows = mask.bool()
if ours.shape != theirs.shape:
    sys.exit(f"check_peft: our logits have shape {list(ours.shape)}, PEFT's {list(theirs.shape)}")


def largest(a, b):
    return float(((a - b).abs() / b.abs().clamp(min=1.0))[rows].max())


difference = largest(ours, theirs)
change = float((theirs - without).abs()[rows].max())
print(f"largest difference / max(1, |logit|): {difference:.2e} (limit {LIMIT:.0e}); the adapter moves the logits by up to {change:.2f}")
print(f"from fp64: ours {largest(ours.double(), exactly):.2e}, PEFT's fp32 {largest(theirs.double(), exactly):.2e}")
# Written so that NaN fails; an adapter that does nothing would prove nothing.
sys.exit(0 if difference <= LIMIT and change > 0.0 else 1)
