#!/usr/bin/env python3
"""PyTorch's attention at the shapes of bench_cuda.c, each backend: milliseconds and TFLOP/s, forward and backward. Needs torch."""
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = [(2, 2048, 32, 8, 128), (1, 8192, 32, 8, 128), (2, 2048, 32, 8, 64), (1, 8192, 32, 8, 64), (64, 512, 9, 3, 64),
          (8, 512, 32, 8, 128), (8, 512, 32, 8, 64), (8, 2048, 32, 8, 64)]


def timed(call, calls):
    begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls * 1e-3


def seconds(call):
    """As bench_cuda.c: the median of nine rounds that take some 10 ms each, for the GPU's clock falls as it works."""
    timed(call, 3)
    calls = int(1e-2 / timed(call, 3)) + 1
    return statistics.median(timed(call, calls) for _ in range(9))


def rows(batch, heads, length, dim):
    return torch.randn(batch, length, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()


print(torch.cuda.get_device_name(), torch.__version__)
for batch, length, heads, kv_heads, dim in SHAPES:
    q, k, v = rows(batch, heads, length, dim), rows(batch, kv_heads, length, dim), rows(batch, kv_heads, length, dim)
    flops = 2 * batch * length * length * dim * heads
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                def call():
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

                with torch.no_grad():
                    forward = seconds(call)
                out = call()
                d = torch.randn_like(out)
                backward = seconds(lambda: torch.autograd.grad(out, (q, k, v), d, retain_graph=True))
        except RuntimeError as error:
            print(f"{name}: {str(error)[:80]}")
            continue
        print(f"{name} B{batch} T{length} heads {heads}/{kv_heads} x {dim}: forward {forward * 1e3:.3f} ms, {flops / forward * 1e-12:.0f} TFLOP/s; "
              f"backward {backward * 1e3:.3f} ms, {2.5 * flops / backward * 1e-12:.0f} TFLOP/s", flush=True)
