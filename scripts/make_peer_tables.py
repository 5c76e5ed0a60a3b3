#!/usr/bin/env python3
"""Writes tests/peers/*.json: what torch, transformers and PEFT compute for inputs of ours.

    scripts/make_peer_tables.py [schedule] [optim] [sampler] [targets]     (default: all)

Needs torch, transformers and peft from PyPI. The inputs come from fixed seeds, so another run differs only where a library does;
the versions are in each file.
"""
import json
import math
import pathlib
import sys

import peft
import torch
import transformers

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "peers"
VERSIONS = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__, "peft": peft.__version__}


def write(name, content):
    OUT.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"script": "scripts/make_peer_tables.py", "versions": VERSIONS, **content}, sort_keys=True)
    (OUT / f"{name}.json").write_text(text.replace("{\"", "{\n\"", 1).replace("}, {", "},\n{") + "\n", encoding="utf-8")
    print(f"{name}.json: {len(text)} bytes")


def floats(tensor):
    """f32 values, shortest text that reads back to them."""
    return [float(repr(x)) if not math.isfinite(x) else float(f"{x:.9g}") for x in tensor.double().flatten().tolist()]


# ---- learning rates ----

def schedule():
    from transformers import optimization as hf

    cases = []
    for steps, warmup in [(10, 0), (10, 3), (100, 7), (7, 6), (1, 0), (50, 50)]:
        for kind, ratio in [("constant", 0.0), ("linear", 0.0), ("cosine", 0.0), ("cosine", 0.1), ("cosine", 1.0)]:
            rate = 2e-4
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
            if kind == "constant":
                s = hf.get_constant_schedule_with_warmup(optimizer, warmup)
            elif kind == "linear":
                s = hf.get_linear_schedule_with_warmup(optimizer, warmup, steps)
            elif ratio == 0.0:
                s = hf.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
            else:
                s = hf.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr_rate=ratio)
            rates = []
            for _ in range(steps):
                rates.append(s.get_last_lr()[0])
                optimizer.step()
                s.step()
            cases.append({"kind": kind, "learning_rate": rate, "min_ratio": ratio, "warmup_steps": warmup, "steps": steps, "rates": rates})
    write("schedule", {"cases": cases})


# ---- optimizers ----

def pseudo(shape, number, scale):
    """Values that tests/trainers/test_optim.c makes in the same way, to the last bit."""
    n = shape[0] * shape[1]
    return torch.tensor([((i * 7919 + number * 104729) % 2001 - 1000) / 1000 * scale for i in range(n)], dtype=torch.float64).float().reshape(shape)


def optim():
    shapes, steps = [(3, 5), (7, 2), (1, 300)], 8
    cases = []
    for name, options, clip in [
        ("adamw", {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}, 0.0),
        ("adamw", {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}, 1.0),
        ("sgd", {"momentum": 0.0, "weight_decay": 0.0}, 0.0),
        ("sgd", {"momentum": 0.9, "weight_decay": 0.0}, 0.5),
        ("sgd", {"momentum": 0.5, "weight_decay": 0.05}, 0.0),
    ]:
        params = [torch.nn.Parameter(pseudo(s, i, 1.0)) for i, s in enumerate(shapes)]
        grads = [[pseudo(s, 100 * (step + 1) + i, 0.3) for i, s in enumerate(shapes)] for step in range(steps)]
        rates = [1e-2 * (1 + i % 3) for i in range(steps)]
        optimizer = (torch.optim.AdamW if name == "adamw" else torch.optim.SGD)(params, lr=1e-2, **options)
        norms, values = [], []
        for step in range(steps):
            for p, g in zip(params, grads[step]):
                p.grad = g.clone()
            norms.append(float(torch.nn.utils.clip_grad_norm_(params, clip if clip > 0 else math.inf)))
            optimizer.param_groups[0]["lr"] = rates[step]
            optimizer.step()
            values.append([floats(p.detach()) for p in params])
        states = {key: [floats(optimizer.state[p][key]) for p in params] for key in ("exp_avg", "exp_avg_sq", "momentum_buffer")
                  if isinstance(optimizer.state[params[0]].get(key), torch.Tensor)}
        betas = options.get("betas", (0.9, 0.999))
        cases.append({"name": name, "beta1": betas[0], "beta2": betas[1], "epsilon": options.get("eps", 1e-8),
                      "momentum": options.get("momentum", 0.0), "weight_decay": options["weight_decay"], "max_grad_norm": clip,
                      "learning_rates": rates, "shapes": shapes, "norms": norms, "values": [values[0], values[-1]], "states": states})
    write("optim", {"cases": cases})


# ---- sampling ----

def sampler():
    from transformers.generation import logits_process as hf

    vocab = 48
    logits = floats(torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 1.5)
    logits[10] = logits[11] = logits[20]  # ties
    seen = [4, 4, 10, 17, 33, 46, 4]
    cases = []
    for temperature, top_k, top_p, min_p, penalty in [
        (1.0, 0, 1.0, 0.0, 1.0), (0.7, 0, 1.0, 0.0, 1.0), (1.6, 0, 1.0, 0.0, 1.0), (1.0, 5, 1.0, 0.0, 1.0), (1.0, 1, 1.0, 0.0, 1.0),
        (1.0, 1000, 1.0, 0.0, 1.0), (1.0, 0, 0.9, 0.0, 1.0), (1.0, 0, 0.5, 0.0, 1.0), (1.0, 0, 0.01, 0.0, 1.0), (1.0, 0, 1.0, 0.1, 1.0),
        (1.0, 0, 1.0, 0.5, 1.0), (1.0, 0, 1.0, 0.0, 1.3), (1.0, 0, 1.0, 0.0, 0.7), (0.8, 20, 0.95, 0.05, 1.1), (2.0, 12, 0.7, 0.02, 1.2),
    ]:
        scores, ids = torch.tensor([logits]), torch.tensor([seen])
        steps = [hf.RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1.0 else []
        steps += [hf.TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
        steps += [hf.TopKLogitsWarper(top_k)] if top_k > 0 else []
        steps += [hf.TopPLogitsWarper(top_p)] if top_p < 1.0 else []
        steps += [hf.MinPLogitsWarper(min_p)] if min_p > 0.0 else []
        for step in steps:
            scores = step(ids, scores)
        probabilities = torch.softmax(scores.double(), dim=-1)[0]
        kept = [i for i in range(vocab) if probabilities[i] > 0]
        cases.append({"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": penalty, "ids": kept,
                      "probabilities": [float(f"{float(probabilities[i]):.12g}") for i in kept]})
    write("sampler", {"logits": logits, "seen": seen, "cases": cases})


# ---- target modules ----

PATHS = [
    "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.10.self_attn.q_proj", "model.layers.0.self_attn.v_proj",
    "model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj", "model.layers.3.mlp.down_proj", "model.embed_tokens", "lm_head",
    "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj", "transformer.h.11.mlp.c_fc", "q_proj", "xq_proj",
    "model.layers.0.self_attn.xq_proj", "0.q_proj", "layers.0.q_proj", "a.0.1.2.q_proj", "a.b.3.c.4.q_proj", "model.layers.0", "a.b.c.q_proj",
    "model.layers.1.q_proj.dense", "encoder.layers.2.x.layers.5.q_proj", "model.layers.007.q_proj", "model.layers.1x.q_proj", "a..3.q_proj",
    "model.layers.0.self_attn.q_proj\n",
]
TARGETS = [
    {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["self_attn.q_proj"]}, {"target_modules": ["proj"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj"]}, {"target_modules": ["c_proj"]}, {"target_modules": ["attn.c_proj", "c_fc"]},
    {"target_modules": r".*\.q_proj"}, {"target_modules": r".*q_proj"}, {"target_modules": r"model\.layers\.\d+\.self_attn\.[qv]_proj"},
    {"target_modules": r".*\.(0|3)\..*(q|v|gate|up)_proj$"}, {"target_modules": "q_proj"}, {"target_modules": r"(?!lm_head).*"},
    {"target_modules": r"a|model\.layers\.0.*"}, {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.1.self_attn.q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]}, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
    {"target_modules": ["q_proj"], "exclude_modules": "q_proj"}, {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0]}, {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "c_proj"], "layers_to_transform": [0, 1, 10]}, {"target_modules": ["q_proj"], "layers_to_transform": [3]},
    {"target_modules": ["q_proj"], "layers_to_transform": [4, 5, 7]}, {"target_modules": ["q_proj"], "layers_to_transform": [1, 2]},
    {"target_modules": ["q_proj", "model.layers.0.self_attn.v_proj", "layers.0.q_proj"], "layers_to_transform": [9]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 5], "layers_pattern": ["layers"]},
    {"target_modules": ["q_proj", "c_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
    {"target_modules": ["q_proj", "c_proj"], "layers_to_transform": [1, 4], "layers_pattern": ["h", "c"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [5], "layers_pattern": ["nothing"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [2, 5], "layers_pattern": ["x.layers"]},
]
PATTERNS = [
    {"q_proj": 4}, {"q_proj": 4, r"layers\.0.*": 8}, {r"layers\.0.*": 8, "q_proj": 4}, {r".*\.0\..*": 8, "self_attn.v_proj": 2},
    {r"^model\.layers\.3\.mlp\.up_proj": 16}, {"proj": 32}, {r"self_attn\.(q|v)_proj": 3, r"c_(attn|fc)": 5}, {"layers.3.mlp.gate_proj|c_fc": 6},
    {"model.layers.1": 9, "model.layers.10.self_attn.q_proj": 10},
]
ALL_LINEAR = ["llama", "gpt2", "qwen3"]


def tiny_model(kind):
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=8))
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
             "vocab_size": 16, "tie_word_embeddings": False}
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=4, **sizes))


def linears(model):
    from transformers.pytorch_utils import Conv1D
    return [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]


def targets():
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    def matches(options, path):
        if isinstance(options.get("target_modules"), str) and "layers_to_transform" in options:
            raise ValueError("PEFT refuses layers_to_transform beside a regular expression")
        return bool(check_target_module_exists(peft.LoraConfig(**options), path))

    cases = [{"options": options, "matches": [matches(options, path) for path in PATHS]} for options in TARGETS]
    patterns = [{"patterns": list(table.items()), "values": [table.get(get_pattern_key(table.keys(), path)) for path in PATHS]} for table in PATTERNS]
    models = []
    for kind in ALL_LINEAR:
        names = linears(tiny_model(kind))
        wrapped = peft.get_peft_model(tiny_model(kind), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        adapted = {name.removeprefix("base_model.model.") for name, module in wrapped.named_modules() if hasattr(module, "lora_A")}
        models.append({"kind": kind, "paths": names, "matches": [name in adapted for name in names]})
    write("targets", {"paths": PATHS, "cases": cases, "patterns": patterns, "all_linear": models})


def main():
    tables = {"schedule": schedule, "optim": optim, "sampler": sampler, "targets": targets}
    for name in sys.argv[1:] or tables:
        tables[name]()


if __name__ == "__main__":
    main()
