#!/usr/bin/env python3
"""Compares what a device computes with the reference data: logits of every golden model and LoRA case, curves, greedy text.

    fidelity.py [--tapeft FILE] [--golden FOLDER] [--device cuda] [--only WORD] [--precisions fp32,bf16,fp16]

For each case one line: the largest |difference| / max(1, |reference|), and its limit. Curves print the largest difference of a loss, and
the relative difference of step 1's gradients and of the final adapter. Greedy text is compared with the cpu's. Exit status 1 if anything
is above its limit. Needs nothing but Python.

Limits. fp32: 1e-4 of max(1, |logit|), as on the cpu; losses 1e-3 over fifty steps. bf16: the reference is computed in fp32, so what is
measured is the rounding of bf16 itself, eight bits, through two or three layers of these small models; the cpu's own bf16 is printed beside
it. There the figure is the 2-norm of the difference over the reference's; the limit is 0.03, about twice the worst that the cpu shows.
fp16 keeps three bits more: 0.004 for logits; its curves, whose losses, gradients and adapters are rounded in every step, are to stay within
0.02 of a loss, 0.02 of the gradient and 0.1 of the adapter, in the same norm.
"""
import argparse
import array
import json
import math
import os
import pathlib
import struct
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[3]
LOGITS_LIMITS = {"fp32": 1e-4, "bf16": 0.03, "fp16": 0.004}
CURVE_LIMITS = {"fp32": (1e-3, 1e-4, 1e-3), "fp16": (0.02, 0.02, 0.1)}  # of a loss, of step 1's gradients, of the final adapter

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tapeft", default=str(ROOT / "build/tapeft"))
parser.add_argument("--golden", default=str(ROOT / "tests/golden"))
parser.add_argument("--device", default="cuda")
parser.add_argument("--only", default="")
parser.add_argument("--precisions", default="fp32,bf16,fp16")
args = parser.parse_args()
golden = pathlib.Path(args.golden)
precisions = args.precisions.split(",")
failures = 0


def tensors(path):
    """name -> (shape, values) of a safetensors file with F32, F16-free, I64 and I32 tensors."""
    data = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    out = {}
    for name, entry in header.items():
        code = {"F32": "f", "I64": "q", "I32": "i"}.get(entry.get("dtype"))
        if name == "__metadata__" or code is None:
            continue
        begin, end = entry["data_offsets"]
        values = array.array(code)
        values.frombytes(data[8 + length + begin : 8 + length + end])
        out[name] = (entry["shape"], values)
    return out


def tapeft(*arguments):
    return subprocess.run([args.tapeft, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)


def judge(name, what, value, limit, note=""):
    global failures
    good = value <= limit  # false for NaN
    failures += not good
    print(f"{'ok  ' if good else 'FAIL'} {name:<40} {what:<22} {value:9.2e}  limit {limit:g} {note}", flush=True)


def worst_of(got, wanted, mask, columns):
    """Largest |difference| / max(1, |wanted|) over rows whose mask is set; NaN if there is any."""
    worst = 0.0
    for row in range(len(wanted) // columns):
        if mask is not None and mask[row] == 0:
            continue
        for i in range(row * columns, (row + 1) * columns):
            off = abs(got[i] - wanted[i]) / max(1.0, abs(wanted[i]))
            if not off <= worst:
                worst = off
            if math.isnan(worst):
                return worst
    return worst


def norm_of(got, wanted, mask, columns):
    """2-norm of the difference over the 2-norm of `wanted`, over rows whose mask is set."""
    difference = norm = 0.0
    for i, (x, y) in enumerate(zip(got, wanted)):
        if mask is None or mask[i // columns] != 0:
            difference += (x - y) ** 2
            norm += y * y
    return math.sqrt(difference / norm)


def logits(model, expect, device, precision, adapter=None):
    reference = tensors(expect)
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.safetensors"
        more = ["--adapter", adapter] if adapter else []
        done = tapeft("logits", model, "--in", expect, "--out", out, "--device", device, "--precision", precision, *more)
        if done.returncode:
            print(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
            return math.nan
        got = tensors(out)["logits"][1]
    shape, wanted = reference["logits"]
    mask = reference.get("attention_mask")
    return (worst_of if precision == "fp32" else norm_of)(got, wanted, mask[1] if mask else None, shape[-1])


def check_logits(name, model, expect, adapter=None):
    for precision in precisions:
        beside = precision == "bf16" and args.device != "cpu"
        judge(name, f"{precision} logits", logits(model, expect, args.device, precision, adapter), LOGITS_LIMITS[precision],
              f"(cpu {logits(model, expect, 'cpu', 'bf16', adapter):.2e})" if beside else "")


def relative(a, b):
    """2-norm of the difference of all tensors together, over the norm of b."""
    difference = norm = 0.0
    for name, (_, wanted) in b.items():
        got = a[name][1]
        difference += sum((x - y) ** 2 for x, y in zip(got, wanted))
        norm += sum(y * y for y in wanted)
    return math.sqrt(difference / norm) if len(a) == len(b) else math.nan


def check_curve(folder, precision):
    name, recipe, curve = f"curves/{folder.name} {precision}", json.loads((folder / "recipe.json").read_text()), json.loads((folder / "curve.json").read_text())
    with tempfile.TemporaryDirectory() as work:
        start, out, gradients = pathlib.Path(work, "start"), pathlib.Path(work, "out"), pathlib.Path(work, "gradients.safetensors")
        start.mkdir()
        (start / "adapter_config.json").write_text(json.dumps(recipe["peft_config"]))
        (start / "adapter_model.safetensors").write_bytes((folder / "init.safetensors").read_bytes())
        optimizer, schedule = recipe["optimizer"], recipe["schedule"]
        lines = [f"base_model: {golden / recipe['base']}", "adapter: lora", f"adapter_path: {start}", f"precision: {precision}", f"device: {args.device}",
                 f"datasets:\n  - {{path: {folder / 'batches.safetensors'}, type: tokens}}", "shuffle: false",
                 f"gradient_accumulation_steps: {recipe['gradient_accumulation']}", f"max_steps: {recipe['steps']}",
                 f"learning_rate: {optimizer['lr']:.9g}", f"lr_scheduler: {schedule['name']}", f"warmup_steps: {schedule.get('warmup_steps') or 0}",
                 f"optimizer: {optimizer['name']}", f"weight_decay: {optimizer.get('weight_decay') or 0:.9g}",
                 f"max_grad_norm: {recipe.get('max_grad_norm') or 0:.9g}", f"output_dir: {out}"]
        if optimizer["name"] == "sgd":
            lines.append(f"momentum: {optimizer.get('momentum') or 0:.9g}")
        pathlib.Path(work, "recipe.yaml").write_text("\n".join(lines) + "\n")
        done = tapeft("train", f"{work}/recipe.yaml", "--quiet", "--dump-gradients", gradients)
        if done.returncode:
            print(done.stderr.strip())
            judge(name, "training", math.nan, 0)
            return
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if "loss" in row]
        judge(name, f"losses of {len(losses)} steps", max(abs(a - b) for a, b in zip(losses, curve["loss"])) if len(losses) == len(curve["loss"]) else math.nan,
              CURVE_LIMITS[precision][0])
        judge(name, "gradients of step 1", relative(tensors(gradients), tensors(folder / "grads.safetensors")), CURVE_LIMITS[precision][1])
        judge(name, "final adapter", relative(tensors(out / "adapter/adapter_model.safetensors"), tensors(folder / "final.safetensors")), CURVE_LIMITS[precision][2])


def check_resume(precision):
    """Ten steps at once, and the same ten in two runs: the same bytes."""
    folder = golden / "curves/llama-lora"
    recipe = json.loads((folder / "recipe.json").read_text())
    with tempfile.TemporaryDirectory() as work:
        def run(name, steps, *more):
            text = "\n".join([f"base_model: {golden / recipe['base']}", "adapter: lora", "lora_dropout: 0.1", f"device: {args.device}", f"precision: {precision}",
                              f"datasets:\n  - {{path: {folder / 'batches.safetensors'}, type: tokens}}", "save_steps: 5", "seed: 7",
                              "learning_rate: 1e-3", "lr_scheduler: constant", "max_steps: 10", f"output_dir: {work}/{name}"])
            pathlib.Path(work, name + ".yaml").write_text(text + "\n")
            return tapeft("train", f"{work}/{name}.yaml", f"max_steps={steps}", "--quiet", *more)

        first = run("whole", 10)
        second = run("parts", 5)
        third = run("parts", 10, "--resume", "--accept", "recipe")
        for done in (first, second, third):
            if done.returncode:
                print(done.stderr.strip())
        same = all(pathlib.Path(work, "whole", f).read_bytes() == pathlib.Path(work, "parts", f).read_bytes()
                   for f in ("metrics.jsonl", "adapter/adapter_model.safetensors")) if not (first.returncode or second.returncode or third.returncode) else False
        judge(f"resume {precision}", "bytes that differ", 0 if same else math.nan, 0)


def write_batches(path):
    """Twelve micro-batches: of full rows, with rows of other lengths each time, and with labels for a part."""
    batches, rows, columns = 12, 4, 24
    values = {"attention_mask": [], "input_ids": [], "labels": []}
    for i in range(batches * rows * columns):
        batch, row, column = i // (rows * columns), i // columns % rows, i % columns
        there = not (batch % 3 == 1 and row > 0 and column >= 3 + (5 * batch + 7 * row) % 20)
        values["input_ids"].append(3 + (i * 7919 + batch) % 56)
        values["attention_mask"].append(int(there))
        values["labels"].append(values["input_ids"][-1] if there and not (batch % 3 == 2 and column < 4) else -100)
    size, header, data = 8 * batches * rows * columns, {}, b""
    for name, numbers in values.items():
        header[name] = {"dtype": "I64", "shape": [batches, rows, columns], "data_offsets": [len(data), len(data) + size]}
        data += struct.pack(f"<{len(numbers)}q", *numbers)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def check_replays(model, *lines):
    """Steps as recorded graphs, the same in two runs, and steps that are not recorded: the same bytes."""
    with tempfile.TemporaryDirectory() as work:
        write_batches(pathlib.Path(work, "batches.safetensors"))

        def run(name, graphs, *more):
            text = "\n".join([f"base_model: {golden}/models/{model}", "adapter: lora", "lora_target_modules: all-linear", f"device: {args.device}",
                              f"datasets:\n  - {{path: {work}/batches.safetensors, type: tokens}}", "shuffle: false", "max_steps: 30",
                              "learning_rate: 0.01", "lr_scheduler: constant", "save_steps: 13", f"output_dir: {work}/{name}", *lines])
            pathlib.Path(work, name + ".yaml").write_text(text + "\n")
            os.environ.pop("TAPEFT_NO_GRAPHS", None)
            if not graphs:
                os.environ["TAPEFT_NO_GRAPHS"] = "1"
            done = tapeft("train", f"{work}/{name}.yaml", "--quiet", *more)
            if done.returncode:
                print(done.stderr.strip())
            return done.returncode

        failed = run("plain", False) + run("whole", True) + run("parts", True, "max_steps=13") + run("parts", True, "--resume", "--accept", "recipe")
        same = not failed and all(pathlib.Path(work, "plain", f).read_bytes() == pathlib.Path(work, name, f).read_bytes()
                                  for name in ("whole", "parts") for f in ("metrics.jsonl", "adapter/adapter_model.safetensors"))
        judge(f"replays/{model}", "bytes that differ", 0 if same else math.nan, 0, " ".join(lines))


def check_samples(precision, *lines):
    """Samples and evaluations while training: with recordings, without, and with no more memory than the smallest plan says, the same
    bytes, or, recomputed in slices, the same within rounding; in fp32 the cpu's losses and texts."""
    rows = ["the cat and the hat", "one two three four five six", "a b c d e", "the end of the day and the night", "b c", "three two one", "and so on and on", "a hat"]
    with tempfile.TemporaryDirectory() as work:
        pathlib.Path(work, "rows.jsonl").write_text("".join(json.dumps({"text": " ".join([row] * (1 + i))}) + "\n" for i, row in enumerate(rows)))
        pathlib.Path(work, "held.jsonl").write_text("".join(json.dumps({"text": row + " and the cat"}) + "\n" for row in rows[:5]))

        def run(name, device, *more, graphs=True):
            text = "\n".join([f"base_model: {golden}/gguf/tiny_q4_0.gguf", "adapter: lora", "lora_target_modules: all-linear", f"device: {device}", f"precision: {precision}",
                              f"datasets:\n  - {{path: {work}/rows.jsonl, type: completion}}", f"test_datasets:\n  - {{path: {work}/held.jsonl, type: completion}}",
                              "sample_prompts: ['the cat', one, a b]", "sample_steps: 4", "eval_steps: 4", "micro_batch_size: 2", "max_steps: 24",
                              "learning_rate: 0.002", "lr_scheduler: constant", f"output_dir: {work}/{name}", *lines, *more])
            recipe = pathlib.Path(work, name + ".yaml")
            recipe.write_text(text + "\n")
            os.environ.pop("TAPEFT_NO_GRAPHS", None)
            if not graphs:
                os.environ["TAPEFT_NO_GRAPHS"] = "1"
            done = tapeft("train", recipe, "--quiet")
            if done.returncode:
                print(done.stderr.strip())
            return recipe

        def read(name, file):
            path = pathlib.Path(work, name, file)
            return path.read_bytes() if path.exists() else None

        def column(name, file, key):
            return [row[key] for row in map(json.loads, (read(name, file) or b"").decode().splitlines()) if key in row]

        recipe = run("graphs", args.device)
        plan = json.loads(tapeft("plan", recipe, "--json").stdout or "{}")
        run("plain", args.device, graphs=False)
        run("tight", args.device, f"memory_limit: {plan.get('peak_bytes', 0)}")
        run("least", args.device, f"memory_limit: {plan.get('least_bytes', 0)}")
        files = ("metrics.jsonl", "samples.jsonl", "adapter/adapter_model.safetensors")
        title, note = f"samples {precision}", " ".join(lines)
        for name in ("plain", "tight"):
            same = all(read("graphs", f) is not None and read("graphs", f) == read(name, f) for f in files)
            judge(title, f"{name}: bytes that differ", 0 if same else math.nan, 0, note)
        losses = column("graphs", "metrics.jsonl", "eval_loss")
        judge(title, "evaluations, samples missing", abs(len(losses) - 6) + abs(len(column("graphs", "samples.jsonl", "text")) - 18), 0)
        for name, limit in [("least", 1e-4 if precision == "fp32" else 0.05)] + ([("cpu", 1e-3)] if precision == "fp32" else []):
            if name == "cpu":
                run("cpu", "cpu")
            others = column(name, "metrics.jsonl", "eval_loss")
            judge(title, f"{name}: held-out losses", max(abs(a - b) for a, b in zip(losses, others)) if len(others) == len(losses) > 0 else math.nan, limit)
            if precision == "fp32":
                judge(title, f"{name}: texts that differ", sum(a != b for a, b in zip(column("graphs", "samples.jsonl", "text"), column(name, "samples.jsonl", "text"))), 0)


if __name__ == "__main__":
    for folder in sorted((golden / "models").iterdir()):
        if args.only in f"models/{folder.name}" and (folder / "expect.safetensors").exists():
            check_logits(f"models/{folder.name}", folder, folder / "expect.safetensors")
    for folder in sorted((golden / "adapters").iterdir()):
        if args.only in f"adapters/{folder.name}" and (folder / "expect.safetensors").exists():
            base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
            check_logits(f"adapters/{folder.name}", golden / base, folder / "expect.safetensors", folder)
    for folder in sorted((golden / "curves").iterdir()):
        if args.only in f"curves/{folder.name}" and (folder / "recipe.json").exists():
            for precision in set(precisions) & set(CURVE_LIMITS):
                check_curve(folder, precision)
    if args.only in "resume":
        for precision in set(precisions) & {"bf16", "fp16"}:
            check_resume(precision)
    if args.only in "replays":
        check_replays("llama", "precision: fp32", "lora_dropout: 0.1", "gradient_accumulation_steps: 2")
        check_replays("llama", "precision: bf16", "gradient_checkpointing: none")
        check_replays("qwen3", "precision: bf16", "lora_dropout: 0.2", "gradient_checkpointing: full")
        check_replays("gpt2", "precision: bf16")
        check_replays("llama", "precision: fp16", "lora_dropout: 0.1")
    if args.only in "samples":
        check_samples("fp32")
        check_samples("fp32", "lora_dropout: 0.1", "gradient_accumulation_steps: 2")
        check_samples("bf16")
        check_samples("bf16", "lora_dropout: 0.1", "packing: true", "max_seq_length: 64")
    print(f"{failures} above the limit")
    sys.exit(1 if failures else 0)
