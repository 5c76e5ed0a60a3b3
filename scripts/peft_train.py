#!/usr/bin/env python3
"""Times LoRA training steps in Hugging Face PEFT; one JSON line {dtype, tokens_per_second, peak_rss_bytes, first_loss, last_loss}.

    peft_train.py MODEL_FOLDER BATCHES.safetensors --dtype f32|bf16 [--steps N] [--warmup N] [--threads N] [--rank N]
                  [--device cpu|cuda] [--recompute] [--compile] [--unsloth]

Rank 16 on all linears, AdamW, every token of the stored batches labelled as the file says. The median step counts.
bf16 computes under autocast with fp32 factors, as Hugging Face's Trainer does. --recompute is gradient checkpointing of every block. --unsloth trains with Unsloth's model and kernels, where that is installed.
"""
import argparse
import json
import resource
import statistics
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("batches")
parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--warmup", type=int, default=2)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
parser.add_argument("--recompute", action="store_true")
parser.add_argument("--compile", action="store_true")
parser.add_argument("--unsloth", action="store_true")
args = parser.parse_args()

if args.unsloth:
    from unsloth import FastLanguageModel  # before all others: it changes them
import torch  # noqa: E402  (after the arguments, so that --help is quick)
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def hugging_face(dtype):
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device)
    model.config.use_cache = False
    if args.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    return torch.compile(model) if args.compile else model


def unsloth(dtype, length):
    model, _ = FastLanguageModel.from_pretrained(args.model, max_seq_length=length, dtype=dtype, load_in_4bit=False)
    return FastLanguageModel.get_peft_model(model, r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0, bias="none", target_modules=LINEARS,
                                            use_gradient_checkpointing=args.recompute)


if args.device == "cpu":
    torch.set_num_threads(args.threads)
torch.manual_seed(42)
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
batches = load_file(args.batches, device=args.device)
ids, labels = batches["input_ids"].long(), batches["labels"].long()
model = unsloth(dtype, ids.shape[-1]) if args.unsloth else hugging_face(dtype)
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0)

seconds, losses = [], []
for step in range(args.warmup + args.steps):
    batch = step % len(ids)
    begin = time.perf_counter()
    with torch.autocast(args.device, torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = model(input_ids=ids[batch], labels=labels[batch]).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
    if step >= args.warmup:
        seconds.append(time.perf_counter() - begin)

print(json.dumps({
    "dtype": args.dtype,
    "tokens_per_second": round(ids[0].numel() / statistics.median(seconds), 1),
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "first_loss": round(losses[0], 5),
    "last_loss": round(losses[-1], 5),
}))
