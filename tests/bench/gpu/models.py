"""Models with random weights, of the shapes that the benchmarks of this folder name."""
import json
import subprocess
import time

LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
COMMON = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "initializer_range": 0.02,
          "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}
MODELS = {
    "135m": {**COMMON, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
             "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192, "rope_theta": 100000.0},
    "1b": {**COMMON, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True, "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "8b": {**COMMON, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False, "max_position_embeddings": 131072, "rope_theta": 500000.0,
           "rope_scaling": {**LLAMA3, "factor": 8.0}},
}


def make(tapeft, work, name, config):
    """The folder work/name, made by `tapeft init` unless it is there."""
    model = work / name
    if not model.exists():
        (work / f"{name}.json").write_text(json.dumps(config))
        began = time.time()
        subprocess.run([tapeft, "init", str(work / f"{name}.json"), "--out", str(model)], check=True)
        print(f"init {name}: {time.time() - began:.1f} s", flush=True)
    return model
