#!/usr/bin/env python3
"""Turns the GGUF of SmolLM2-135M-Instruct into a Hugging Face model folder.

    scripts/smollm2_to_hf.py "$(scripts/fetch_model)" OUT [--dtype f32|bf16]

The GGUF holds Q4_1 linears, a Q8_0 embedding and F32 norms. The folder holds their dequantized values: in float32 it is
exactly the same model, in bfloat16 the same up to rounding. Needs numpy and gguf.
"""
import argparse
import json
import os

import gguf
import numpy as np
from gguf import quants

NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def unpermute(w, heads):
    """GGUF stores llama q and k rows interleaved for its RoPE; Hugging Face wants the two halves apart."""
    d = w.shape[0] // heads
    return w.reshape(heads, d // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def f32_bytes(w):
    return np.ascontiguousarray(w, dtype=np.float32).tobytes()


def bf16_bytes(w):
    u = np.ascontiguousarray(w, dtype=np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def read_tensors(reader, heads, kv_heads):
    tensors = {}
    for t in reader.tensors:
        w = quants.dequantize(t.data, t.tensor_type).reshape([int(d) for d in t.shape[::-1]])
        part = t.name.split(".")
        if part[0] == "blk":
            if part[2] in ("attn_q", "attn_k"):
                w = unpermute(w, heads if part[2] == "attn_q" else kv_heads)
            name = f"model.layers.{part[1]}.{NAMES[part[2]]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[part[0]]
        tensors[name] = w
    return tensors


def write_safetensors(path, tensors, dtype):
    size, encode = {"f32": (4, f32_bytes), "bf16": (2, bf16_bytes)}[dtype]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        end = offset + tensors[name].size * size
        header[name] = {"dtype": dtype.upper(), "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for name in sorted(tensors):
            out.write(encode(tensors[name]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf")
    parser.add_argument("out")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    args = parser.parse_args()

    os.makedirs(args.out, exist_ok=True)
    reader = gguf.GGUFReader(args.gguf)
    f = {k: v.contents() for k, v in reader.fields.items()}
    heads, kv_heads = f["llama.attention.head_count"], f["llama.attention.head_count_kv"]
    write_safetensors(os.path.join(args.out, "model.safetensors"), read_tensors(reader, heads, kv_heads), args.dtype)

    def dump(name, value):
        with open(os.path.join(args.out, name), "w", encoding="utf-8") as out:
            json.dump(value, out, ensure_ascii=False, indent=2)

    tokens, types, merges = f["tokenizer.ggml.tokens"], f["tokenizer.ggml.token_type"], f["tokenizer.ggml.merges"]
    special = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
               for i, (t, kind) in enumerate(zip(tokens, types)) if kind == 3]
    bos, eos = f["tokenizer.ggml.bos_token_id"], f["tokenizer.ggml.eos_token_id"]
    dump("tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}})
    dump("tokenizer_config.json", {
        "tokenizer_class": "GPT2TokenizerFast", "bos_token": tokens[bos], "eos_token": tokens[eos], "pad_token": tokens[eos],
        "unk_token": tokens[0], "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "model_max_length": 8192, "chat_template": f["tokenizer.chat_template"]})
    dump("config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos, "hidden_act": "silu",
        "hidden_size": f["llama.embedding_length"], "initializer_range": 0.041666666666666664,
        "intermediate_size": f["llama.feed_forward_length"], "max_position_embeddings": f["llama.context_length"],
        "mlp_bias": False, "num_attention_heads": heads, "num_hidden_layers": f["llama.block_count"],
        "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": int(f["llama.rope.freq_base"]), "tie_word_embeddings": True,
        "torch_dtype": {"f32": "float32", "bf16": "bfloat16"}[args.dtype], "use_cache": True,
        "vocab_size": f["llama.vocab_size"]})
    dump("generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos})


if __name__ == "__main__":
    main()
