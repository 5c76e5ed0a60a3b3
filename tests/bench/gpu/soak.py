#!/usr/bin/env python3
"""A long run on the GPU beside one on the cpu: 2,000 steps of a golden model in fp32.

    soak.py [--tapeft FILE] [--golden FOLDER] [--steps N]

Exit status 1 unless the mean loss of the last 200 steps lies within 1 % of the cpu's, the GPU's memory stays what it is from a fifth to
four fifths of the run, and the process's own does not grow after a tenth. Nothing else may run on the GPU meanwhile.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[3]
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tapeft", default=str(ROOT / "build/tapeft"))
parser.add_argument("--golden", default=str(ROOT / "tests/golden"))
parser.add_argument("--steps", type=int, default=2000)
args = parser.parse_args()
golden = pathlib.Path(args.golden)


def gpu_bytes():
    out = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True)
    return int(out.stdout.split()[0])


def run(device, work):
    folder, out = golden / "curves/llama-lora", pathlib.Path(work, device)
    recipe = pathlib.Path(work, device + ".yaml")
    recipe.write_text("\n".join([f"base_model: {golden / 'models/llama'}", "adapter: lora", f"device: {device}", "precision: fp32",
                                 f"datasets:\n  - {{path: {folder / 'batches.safetensors'}, type: tokens}}", "learning_rate: 1e-3",
                                 "lr_scheduler: cosine", f"max_steps: {args.steps}", "seed: 3", f"output_dir: {out}"]) + "\n")
    process = subprocess.Popen([args.tapeft, "train", str(recipe), "--quiet"])
    used = []
    while process.poll() is None:
        if device == "cuda":
            used.append(gpu_bytes())
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"{device}: exit {process.returncode}")
    losses = [row["loss"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    peaks = [row["peak_bytes"] for row in map(json.loads, (out / "timing.jsonl").read_text().splitlines()) if "peak_bytes" in row]
    return statistics.mean(losses[-min(200, len(losses)) :]), used[len(used) // 5 : len(used) * 4 // 5], peaks


with tempfile.TemporaryDirectory() as work:
    cpu, _, _ = run("cpu", work)
    cuda, used, peaks = run("cuda", work)
same = abs(cuda - cpu) <= 0.01 * abs(cpu)
steady = (not used or max(used) == min(used)) and peaks[-1] - peaks[len(peaks) // 10] < 1 << 20
print(f"mean loss of the last 200 of {args.steps} steps: cpu {cpu:.6f}, cuda {cuda:.6f}; GPU memory {min(used, default=0)}..{max(used, default=0)} MiB, "
      f"process {peaks[len(peaks) // 10] / 2**20:.1f} -> {peaks[-1] / 2**20:.1f} MiB")
sys.exit(0 if same and steady else 1)
