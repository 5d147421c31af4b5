"""Tests of Attamba. Offline, on a CPU, in some two minutes: python -m pytest -q

One naive model, written from the paper's equations, is what the model is held to. The ways of
computing are held to each other, with gradients. Tests that need a GPU skip themselves.
    python test_attamba.py 1000            # a longer random search: seeds 0 ... 999
    python test_attamba.py 1000 5000       # seeds 1000 ... 4999
    python test_attamba.py --seed 17       # one case of it, in full
"""
import contextlib
import copy
import doctest
import gzip
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
import warnings
from base64 import b64encode
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import attamba
import train_tiny
from attamba import (Attamba, AttambaAttention, AttambaConfig, attend_ref, attention_mask,
                     chunk_ends, end_positions, rope_angles, ssm_scan, ssm_scan_ref)

HERE = Path(__file__).parent
# Any warning fails a test, but torch's own of compile and vmap.
pytestmark = [pytest.mark.filterwarnings(f) for f in (
    "error", "ignore:The .grad attribute", "ignore:.torch.jit.script",
    "ignore:There is a performance")]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(a, b, tolerance, least=1):
    """Largest difference, relative to the size of b where that is above `least`."""
    assert a.shape == b.shape
    error = ((a - b).abs().max() / b.abs().max().clamp(min=least)).item()
    assert error <= tolerance, f"differs by {error:.3g}, allowed {tolerance:g}"


def results(model, tokens, weights, mask=None):
    """Logits, and the gradients of a fixed weighting of them for each parameter, in float64."""
    device = next(model.parameters()).device
    logits = model(tokens.to(device), boundaries=None if mask is None else mask.to(device))
    grads = torch.autograd.grad((logits.double() * weights.to(device)).sum(), model.parameters())
    return [x.detach().cpu().double() for x in (logits, *grads)]


def in_calls(model, tokens, sizes, **options):
    """The outputs of cached calls of these sizes, one after the other."""
    cache = model.new_cache(*tokens.shape[:2])
    return torch.cat([model(part, cache=cache, **options) for part in tokens.split(sizes, 1)], 1)


def refuses(function, why, *bad, error=ValueError):
    for x in bad:
        with pytest.raises(error, match=why):
            function(x)


def small(**changes):
    base = dict(vocab_size=19, dim=16, n_layers=2, n_heads=2, ssm_state=4, chunk_size=4,
                leading_tokens=3)
    return AttambaConfig(**{**base, **changes})


def compiled(model, backend="aot_eager"):
    """A copy whose blocks are compiled."""
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    model.zero_grad()
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    return model


def tensors(*layers):
    """All that these layers' caches hold."""
    return [t for layer in layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]


def rule_of_all(tokens, positions, layer):
    """Chunk ends that depend on tokens (so rows of a batch differ), position and layer."""
    return (tokens * (positions + 1) + layer) % 3 == 0


# ---------------------------------------------------------------------------------------
# The model as equations: what everything fast is held to

def naive(c, weights, tokens, boundaries=None):
    """The paper's equations, in loops over layers, rows, SSMs, tokens and heads, sharing no code
    with attamba.py. c: config, weights: state_dict, tokens (b, l), boundaries: bool (b or 1, l),
    or None for the config's chunks -> logits (b, l, vocab_size), in the dtype of the weights."""
    def w(name):
        return weights[f"blocks.{layer}.{name}"]

    def norm(x, weight=1):
        return weight * x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()

    def ends_chunk(t):
        """Does token t end a chunk of P tokens?"""
        phase, x = layer * P // c.n_layers, 0
        for value in (c.chunking_seed, layer, t, 0, 0):
            x = ((x >> 15 ^ x ^ value) * 0x2C1B3C6D + 0x3504F335) % 2 ** 31
        rules = {"uniform": t + 1, "cyclic": t + 1 + phase, "random": x >> 4}
        return rules[c.chunking] % P == 0

    def ssm(s, a, ends):
        """SSM_K (s = 0) or SSM_V (s = 1) of a row: a (l, dim_in), ends (l,) -> out (l, dim_out)."""
        inner, n, H, out = c.ssm_inner, c.ssm_state, c.ssm_heads, []
        head = torch.arange(inner) // (inner // H)     # of each channel of u, y and z
        for t in range(l):
            if t == 0 or ends[t - 1]:  # a chunk's first token: r_t = 0, and no earlier inputs
                h, past = 0, []
            z, dt, x = (w("attention.ssm.w_in")[s] @ a[t]).split([inner, H, inner + 2 * n])
            past = [x, *past]                          # u, B, C of t, t - 1, ... in this chunk
            x = sum(tap * x for tap, x in zip(w("attention.ssm.w_conv")[:, s], past))
            u, B, C = F.silu(x).split([inner, n, n])
            dt = F.softplus(dt + w("attention.ssm.dt_bias")[s])[head]
            decay = torch.exp(-dt * w("attention.ssm.A_log")[s, head].exp())
            h = decay[:, None] * h + torch.outer(dt * u, B)
            y = h @ C + w("attention.ssm.D")[s, head] * u
            out.append(w("attention.ssm.w_out")[s] @ norm(y * F.silu(z)))
        return torch.stack(out)

    def rope(x):
        """x (l, heads, d): channels j, j + d/2 turned by t theta^(-2j/d), which is float32."""
        angle = torch.arange(l)[:, None] * c.rope_theta ** (torch.arange(0, -d, -2) / d)
        x = torch.complex(*x.chunk(2, -1)) * torch.complex(angle.cos(), angle.sin())[:, None]
        return torch.cat([x.real, x.imag], -1)

    def attention(a, ends):
        """Of a row: a (l, dim), ends (l,) -> (l, dim)."""
        kv = []
        for s in (0, 1):  # k_t = x_t + SSM_K(x)_t, where x is a or W_K a; then v_t
            x = a if c.kv == "ssm" else a @ w("attention.wkv.weight").chunk(2)[s].T
            residual = x.view(l, c.n_kv_heads, -1, d).mean(2)   # mean of the heads that share a key
            y = ssm(s, x, ends).view_as(residual) if "ssm" in c.kv else 0
            kv.append(residual + y)
        q, k, v = (a @ w("attention.wq.weight").T).view(l, -1, d), *kv
        if c.qk_norm:
            q = norm(q, w("attention.q_norm.weight"))
            k = norm(k, w("attention.k_norm.weight"))
        q, k, out = rope(q), rope(k), torch.zeros_like(q)
        for t in range(l):
            seen = [s for s in range(t + 1) if ends[s] or L is None or t - s <= L]
            for i in range(c.n_heads):
                j = i // (c.n_heads // c.n_kv_heads)   # query head i reads key head j
                out[t, i] = (k[seen, j] @ q[t, i] / math.sqrt(d)).softmax(0) @ v[seen, j]
        return out.flatten(1) @ w("attention.wo.weight").T

    l, d, x = tokens.shape[1], c.head_dim, weights["embed.weight"][tokens]         # x (b, l, dim)
    for layer in range(c.n_layers):
        P, L = (value[layer] if isinstance(value, tuple) else value
                for value in (c.chunk_size, c.leading_tokens))
        if boundaries is not None:
            ends = boundaries
        elif callable(c.chunking):
            ends = c.chunking(tokens, torch.arange(l), layer)
        else:
            ends = torch.tensor([[P is not None and ends_chunk(t) for t in range(l)]])
        a = norm(x, w("norm1.weight"))
        x = x + torch.stack([attention(*row) for row in zip(a, ends.expand_as(tokens))])
        gate, up = (norm(x, w("norm2.weight")) @ w("w_gate_up.weight").T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ w("w_down.weight").T
    head = weights["embed.weight" if c.tie_embeddings else "head.weight"]
    return norm(x, weights["norm.weight"]) @ head.T


# Of outputs and gradients. A gradient in bfloat16 is a sum over all tokens: the largest of some
# 1,200 cases 3.12e-2 (with the slow references: 99 % below 1.7e-2, as here).
TOLERANCE = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-4, 1e-4), torch.bfloat16: (3e-2, 4e-2)}


def check_case(seed):
    """A random model and text. The slow references must equal the equations; and forward, a prefix,
    cached calls of random sizes, compiled blocks (one seed in 50) and a GPU where there is one must
    agree with the references, gradients too. Raises AssertionError, naming the case."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    kv = r.choice(["ssm", "ssm", "linear", "linear+ssm"])
    d, layers = r.choice([2, 4, 6, 16]), r.choice([1, 2, 3])

    def one_or_each(*values):  # one for all layers, or one for each
        return r.choice([r.choice(values), tuple(r.choices(values, k=layers))])
    config = AttambaConfig(
        vocab_size=17, dim=4 * d if kv == "ssm" else 16, n_layers=layers, n_heads=4,
        n_kv_heads=r.choice([1, 2, 4]), head_dim=d, hidden_dim=20, kv=kv,
        chunk_size=one_or_each(None, 1, 2, 3, 5, 8, 20),
        leading_tokens=one_or_each(None, 0, 1, 2, 5, 64),
        chunking=r.choice(["uniform", "cyclic", "random", rule_of_all]),
        chunking_seed=r.randint(0, 9), ssm_inner=r.choice([4, 12, 64]),
        ssm_heads=r.choice([1, 2, 4]), ssm_state=r.choice([1, 3, 16]),
        conv_size=r.randint(1, 4), rope_theta=r.choice([10, 1e4]),
        norm_eps=r.choice([1e-5, 0.1]), tie_embeddings=r.random() < 0.2,
        # (A norm of 2 or 4 channels magnifies what bfloat16 rounds: the references are 5e-2 off.)
        qk_norm=r.random() < 0.3 and d > 4)
    dtype = r.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
    batch, length, mask = r.choice([1, 2, 3]), r.choice([1, 2, 7, 8, 9, 20, 31, 97]), None
    tokens, tolerance = torch.randint(17, (batch, length)), TOLERANCE[dtype]
    if r.random() < 0.2:
        mask = torch.rand(batch, length) < r.choice([0, 0.3, 1])

    def check_part(part, **options):
        """Tokens from one position to another, against the references."""
        ends = None if mask is None else mask[:, part].to(device)
        logits = model(tokens[:, part].to(device), boundaries=ends, **options)
        close(logits.cpu().double(), slow[0][:, part],
              max(tolerance[0], 1e-7 if device == "cuda" else 0))

    def tables(positions, *rest):  # RoPE's, from the CPU: a GPU's sine has another last bit
        return [t.to(positions.device) for t in rope_angles(positions.cpu(), *rest)]
    try:
        model = Attamba(config)
        for name, p in model.named_parameters() if dtype == torch.float64 else ():
            # Large enough for every part to matter: fresh norms are ones, states weigh little.
            torch.nn.init.normal_(p) if ".ssm." in name else p.data.mul_(2 + 4 * torch.rand_like(p))
        exact = copy.deepcopy(model.to(dtype)).double()
        weights = torch.randn(batch, length, 17, dtype=dtype).double()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attamba, "attend", attend_ref)
            patch.setattr(attamba, "ssm_scan", ssm_scan_ref)
            slow = results(exact, tokens, weights, mask)
        if length <= 20:
            close(slow[0], naive(config, exact.state_dict(), tokens, mask), 1e-9)
        ways = [results(model, tokens, weights, mask)]
        if seed % 50 == 3:
            ways.append(results(compiled(model), tokens, weights, mask))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(attamba, "rope_angles", tables)
            if device == "cuda":
                with torch.enable_grad():
                    ways.append(results(copy.deepcopy(model).cuda(), tokens, weights, mask))
            for i, way in enumerate(ways):
                for j, (a, b) in enumerate(zip(way, slow)):
                    close(a, b, max(tolerance[j > 0], 1e-7 if i else 0))
            model.to(device)
            check_part(slice(r.randint(1, length)))
            room = length + r.choice([0, 30])
            cache = model.new_cache(batch, room, None if mask is None else room)
            while (now := cache.position) < length:
                check_part(slice(now, now + r.choice([1, 1, 2, 5, 40])), cache=cache)
    except Exception as e:
        shape = f"{dtype}, tokens {batch} x {length}, mask {mask is not None}"
        raise AssertionError(f"{e}\npython test_attamba.py --seed {seed}: {config}, {shape}") from e


@pytest.mark.parametrize("seed", range(60))
def test_random_cases(seed):
    check_case(seed)


@pytest.mark.parametrize("low, high", [(1e-3, 1e-1), (1e-9, 1e-7), (1e-6, 1e7)])
def test_float32_error_of_a_chunk_of_20000_tokens(low, high):
    """Against float64, with gradients, for dt between low and high: fresh, never forgets, all."""
    l, found = 20_000, []
    u, weights, B, C = (torch.randn(1, l, *shape) for shape in ((4, 4), (4, 4), (1, 8), (1, 8)))
    dt = low * (high / low) ** torch.rand(1, l, 4)
    A, D = -torch.tensor([1.0, 2, 8, 16]), torch.ones(4)
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (u, dt, A, B, C, D)]
        y, _ = ssm_scan(*inputs, torch.zeros(1, l).bool())
        found.append([y, *torch.autograd.grad(y, inputs, weights.to(dtype))])
    for a, b in zip(*found):
        close(a, b, 1e-5, least=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_zero_and_huge_inputs(dtype):
    """No NaN or inf in gradients, and so in outputs, whatever the scale of the residual stream."""
    def check(module, x, **options):
        module(x, **options).float().square().mean().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())
    tokens, ends = torch.randint(19, (2, 50)), torch.rand(3, 50) < 0.3
    tokens[0] = 0
    x = 1e4 * torch.randn(3, 50, 16)
    x[0], x[1] = 0, 1e4
    for config in (small(), small(chunking=rule_of_all),
                   small(chunk_size=None, kv="linear+ssm", qk_norm=True)):
        for scale in (0, 1e-30, 1, 1e38):
            model = Attamba(config).to(dtype)
            model.embed.weight.data *= scale
            check(model, tokens)
        check(AttambaAttention(config, 1).to(dtype), x.to(dtype), boundaries=ends)


def test_autocast(monkeypatch):
    """Logits, gradients and cached calls against float64. The scan is float32, products too."""
    def spy(u, dt, A, *rest):
        assert dt.dtype == A.dtype == torch.float32
        y, h = ssm_scan(u, dt, A, *rest)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(y, ssm_scan(u, dt, A, *rest)[0])
        return y, h
    model = Attamba(small(chunking=rule_of_all, qk_norm=True))
    tokens, weights = torch.randint(19, (2, 60)), torch.randn(2, 60, 19)
    expected = results(copy.deepcopy(model).double(), tokens, weights)
    monkeypatch.setattr(attamba, "ssm_scan", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(results(model, tokens, weights), expected):
            close(a, b, 3e-2)
        close(in_calls(model, tokens, [30, 1, 1, 28]).double(), expected[0], 3e-2)
    model.bfloat16()(tokens)


def test_one_compiled_graph_serves_all_layers():
    """Chunks are made outside of the blocks: compiling each must not compile once per layer."""
    from torch._dynamo.testing import CompileCounterWithBackend
    model, tokens = Attamba(small(n_layers=3, chunk_size=5)), torch.randint(19, (2, 40))
    fast = compiled(model, counter := CompileCounterWithBackend("aot_eager"))
    close(fast(tokens), model(tokens), 1e-5)
    fast.generate(tokens, 3)                           # cached calls run uncompiled
    assert counter.frame_count == 1


def test_where_values_cannot_be_read():
    """Under vmap ids are not checked, and sizes are bounds."""
    model, tokens = Attamba(small()), torch.randint(19, (3, 40))
    close(torch.func.vmap(lambda row: model(row[None])[0])(tokens), model(tokens), 1e-6)


@pytest.mark.parametrize("reset", [False, True])
def test_how_weights_start(reset):
    """Drawn by the constructor, or by each reset_parameters after a start without memory."""
    config = AttambaConfig(vocab_size=99, dim=64, n_layers=8, n_heads=4, kv="linear+ssm",
                           qk_norm=True)
    with torch.device("meta" if reset else "cpu"):
        model = Attamba(config)
    if reset:
        model.to_empty(device="cpu")
        for module in model.modules():
            if [*module.parameters(recurse=False)]:
                module.reset_parameters()
    for name, p in model.named_parameters():
        kind = name.split(".")[-2 if name.endswith("weight") else -1]
        if "norm" in kind or kind == "D":
            assert (p == 1).all(), name
        elif kind not in ("dt_bias", "A_log"):
            std = {"wo": 0.005, "w_down": 0.005, "w_conv": 0.5 / math.sqrt(3)}.get(kind, 0.02)
            assert abs(p.std() / std - 1) < 0.15, name
    ssms = [block.attention.ssm for block in model.blocks]
    dt = F.softplus(torch.cat([ssm.dt_bias for ssm in ssms]))
    A = torch.cat([ssm.A_log for ssm in ssms]).exp()
    assert 0.99e-3 <= dt.min() and dt.max() <= 0.101 and 1 <= A.min() and A.max() <= 16
    assert 9 < (1 / (dt * A)).log().mean().exp() < 21  # tokens to decay to 1 / e: 14 on average


# ---------------------------------------------------------------------------------------
# The cache

def test_the_cache_is_smaller():
    """Measured from what is allocated, states and window included, at 4096 tokens."""
    def cache(length=4096, **more):
        config = AttambaConfig(vocab_size=32, dim=128, n_layers=2, n_heads=4, **more)
        return Attamba(config).new_cache(1, length)
    ours, plain = cache(), cache(kv="linear", leading_tokens=None).nbytes
    assert ours.nbytes == sum(t.nbytes for t in tensors(*ours.layers)) <= plain / 4
    assert plain >= 2 * 2 * 4096 * 128 * 4
    assert cache(10 ** 12, chunk_size=None).nbytes < 300_000  # the cost is what is allocated


def test_full_and_foreign_caches():
    """What is refused leaves every layer as it was."""
    model = Attamba(small(chunking=lambda tokens, positions, layer: tokens == layer))
    cache, ones = model.new_cache(1, 10, max_chunks=1), torch.ones(1, 12).long()

    def use(tokens):  # a 1 ends a chunk in layer 1 alone
        model(tokens, cache=cache)
    refuses(use, "max_len is 10", ones[:, :11])
    refuses(use, "max_chunks is 1", ones[:, :10])
    refuses(use, "batch size 1", torch.ones(2, 3).long())
    refuses(lambda other: other(ones, cache=cache), "cache was made for", Attamba(small()))
    assert all(layer.position == 0 and layer.h.abs().max() == 0 for layer in cache.layers)
    use(ones[:, :5])                                   # four in the window, one entry
    refuses(use, "max_chunks is 1", ones[:, :1])
    refuses(lambda sizes: model.new_cache(*sizes), "must be at least",
            (0, 10, None), (1, 0, None), (1, 10, -1))


def test_boundaries_need_max_chunks():
    """A cache made for config.chunking has room for any mask only if the window, or a rule of
    one's own, needs it."""
    tokens, ends = torch.randint(19, (1, 30)), torch.ones(1, 30).bool()

    def use(config, most=None):
        model = Attamba(config)
        cache = model.new_cache(1, 30, most)
        close(model(tokens, boundaries=ends, cache=cache), model(tokens, boundaries=ends), 1e-5)
    refuses(use, "max_chunks=", small())
    use(small(), 26)
    use(small(chunking=rule_of_all))
    use(small(leading_tokens=None))
    refuses(lambda most: Attamba(small()).generate(tokens, 2, max_chunks=most),
            "max_chunks is 3", 3)


def test_a_layer_alone():
    """As in somebody else's model: its own cache, with RoPE or without."""
    layer, x = AttambaAttention(small(), 1).double(), torch.randn(2, 20, 16).double()
    tables = rope_angles(torch.arange(20), 8, 1e4)
    for rope in (None, False):
        close(in_calls(layer, x, [7, 1, 1, 5, 6], rope=rope), layer(x, rope=rope), 1e-9)
    for same in (dict(rope=tables), dict(rope=[t.expand(2, 20, 8) for t in tables]),
                 dict(boundaries=chunk_ends(layer.config, torch.arange(20), 1))):
        assert torch.equal(layer(x, **same), layer(x))
    cache = layer.new_cache(2, 20)
    assert not any(t.requires_grad for t in (layer(x[:, :5], cache=cache), *tensors(cache)))
    refuses(lambda rope: layer(x[:, :2], rope=rope), "rope must be cos and sin of shape",
            [t[:1] for t in tables], [t[:2].expand(3, 2, 8) for t in tables])
    refuses(lambda mask: layer(x, boundaries=mask), "must be bool of shape .1 or 2, 20.",
            torch.zeros(3, 20).bool())
    refuses(layer, "the input must be of shape", x[:, :0], x[0])
    refuses(AttambaAttention(small(chunking=rule_of_all), 1), "callable chunking", x)
    refuses(lambda d: rope_angles(torch.arange(5), d, 1e4), "head_dim must be even", 3)


def test_a_cache_is_plain_tensors():
    """It is copied and its rows are permuted at any time."""
    model, tokens = Attamba(small(chunking=rule_of_all)).double(), torch.randint(19, (3, 40))
    cache, whole, order = model.new_cache(3, 40), model(tokens), torch.tensor([2, 0, 0])
    model(tokens[:, :20], cache=cache)
    copied = copy.deepcopy(cache)
    for t in tensors(*copied.layers):
        t.copy_(t[order])
    for now in range(20, 40):
        close(model(tokens[:, [now]], cache=cache), whole[:, [now]], 1e-9)
        close(model(tokens[order][:, [now]], cache=copied), whole[order][:, [now]], 1e-9)


def test_dtype_and_device_of_a_cache():
    """Those that are asked for, or of the first parameter that no quantiser made an integer."""
    model = Attamba(small())
    model.scales = nn.Parameter(torch.ones(1, dtype=torch.int8), requires_grad=False)
    assert model.new_cache(1, 9).layers[0].kv.dtype == torch.float32
    layer = model.new_cache(1, 9, dtype=torch.bfloat16, device="meta").layers[0]
    assert layer.kv.dtype == layer.conv.dtype == torch.bfloat16
    assert layer.h.dtype == torch.float32 and layer.h.is_meta


# ---------------------------------------------------------------------------------------
# Generation

def test_generate():
    model, prompt = Attamba(small()), torch.randint(19, (2, 9))

    def generate(n=20, **options):
        return model.generate(prompt, n, **options)
    expected = prompt
    for _ in range(20):  # without a cache
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    for same in (dict(temperature=0), dict(temperature=1e-40), dict(top_k=1), dict(top_p=1e-9)):
        assert torch.equal(generate(**same), expected)
    first, again, other = (generate(seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(generate(0), prompt)
    for bad in (dict(temperature=-1), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.1), dict(n=-1)):
        refuses(lambda bad: generate(**bad), [*bad][0], bad)
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2000, 1)
    taken = attamba.sample(logits, 1.0, None, 0.7, None)
    assert taken.unique().tolist() == [0, 1]           # top_p keeps the smallest set
    model.head.weight.data.zero_()                     # all alike: one generator for all steps
    assert len(generate(40, seed=0)[0, 9:].unique()) > 5


def test_every_token_is_a_call_of_the_model():
    """Hooks fire, an overridden forward counts, though it need not know `last`, and only the last
    token has logits."""
    class Shifted(Attamba):
        def forward(self, tokens, boundaries=None, cache=None):
            return super().forward(tokens, boundaries=boundaries, cache=cache).roll(1, -1)
    model, prompt, widths = Attamba(small()), torch.randint(19, (1, 30)), []
    for module in (model.blocks[1], model.head):
        module.register_forward_hook(lambda module, inputs, out: widths.append(out.shape[1]))
    likeliest = [t.item() for t in model.stream(prompt, 3, temperature=0)]
    assert widths == [30, 1, 1, 1, 1, 1]
    model.__class__ = Shifted
    assert next(model.stream(prompt, 3, temperature=0)).item() == (likeliest[0] + 1) % 19


# ---------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("field, value", [
    ("dim", -1), ("n_heads", 3), ("n_kv_heads", 3), ("head_dim", 4), ("kv", "mlp"),
    ("chunk_size", 2.5), ("chunk_size", (4, 0)), ("chunk_size", True), ("leading_tokens", -1),
    ("leading_tokens", (1, 2, 3)), ("chunking", "words"), ("ssm_heads", 3), ("rope_theta", 0.0)])
def test_bad_config_names_the_field(field, value):
    refuses(lambda value: small(**{field: value}), f"{field} must be", value)


def test_bad_tokens():
    model, good = Attamba(small()), torch.zeros(2, 5).long()
    for use in model, lambda prompt: model.generate(prompt, 2):
        refuses(use, "tokens must be int64 or int32",
                good.float(), good[0], good[:, :0], good[:0], [[1, 2]])
        refuses(use, "0 ... 18", good - 1, good + 19, error=IndexError)
    refuses(lambda mask: model(good, boundaries=mask), "boundaries must be bool of shape .2, 5.",
            good, good.bool()[:, :4], good.bool()[0], good.bool()[:1])
    refuses(lambda rule: Attamba(small(chunking=rule))(good), "chunking rule returns must be bool",
            lambda t, p, l: t, lambda t, p, l: p == 0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_of_a_long_layer():
    """Forward and backward at 16,384 tokens: one S x S map of one head alone would take 1 GB."""
    code = """if True:
        import re, torch
        from attamba import AttambaAttention, AttambaConfig
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        before = peak()
        for P in (8, None):
            config = AttambaConfig(vocab_size=8, dim=128, n_layers=1, n_heads=4, chunk_size=P)
            x = torch.randn(1, 16384, 128, requires_grad=True)
            AttambaAttention(config, 0)(x).sum().backward()
        print(peak() - before)"""
    output, error = start([sys.executable, "-c", code], HERE).communicate()
    assert int(output) * 1024 < 1.5e9, error


# ---------------------------------------------------------------------------------------
# train_tiny.py

LINES = "".join(f"line {i}: the quick brown fox jumps over the lazy dog\n" for i in range(2000))


def options_for(tmp_path, **changes):
    (tmp_path / "text.txt").write_text(LINES)
    base = dict(data=str(tmp_path / "text.txt"), out=str(tmp_path / "out"), device="cpu", steps=60,
                seq_len=64, warmup=10, lr=1e-2, save_every=20, eval_tokens=2000)
    return train_tiny.TrainConfig(**base | changes)


def train(options, resume=None):
    corpus = train_tiny.load_corpus(options)
    return train_tiny.train(small(vocab_size=256), options, corpus, resume)


def logged(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def at_step(number, act, patch):
    """Have training call act once it has done that many steps."""
    def batch(tokens, options, step, original=train_tiny.batch):
        if step == number:
            act()
        return original(tokens, options, step)
    patch.setattr(train_tiny, "batch", batch)


def rank_file(path, first=0):
    """A tiktoken rank file: the bytes from `first` on, b"qu", and a rank that nothing has."""
    tokens = [(bytes([i]), i) for i in range(first, 256)] + [(b"qu", 257)]
    path.write_text("".join(f"{b64encode(token).decode()} {i}\n" for token, i in tokens))
    return str(path)


# What is trained on, what is held out

def split_of(tmp_path, **changes):
    """Training and held-out text as load_corpus has them, without separators."""
    corpus = train_tiny.load_corpus(options_for(tmp_path, **changes))
    return [bytes(part[part > 0].tolist()).decode() for part in (corpus.train, corpus.valid)]


def test_text_is_trained_on_or_held_out(tmp_path):
    """Never both, never neither; with a held-out text of its own all of --data is trained on."""
    train, valid = split_of(tmp_path)
    assert train + valid == LINES and 0.04 < len(valid) / len(LINES) < 0.06
    (tmp_path / "other").write_text("another\n" * 99)
    assert split_of(tmp_path, valid_data=str(tmp_path / "other")) == [LINES, "another\n" * 99]
    (folder := tmp_path / "few").mkdir()
    for i in range(20):  # of few files the end of each
        (folder / f"chapter{i}.txt").write_text(f"<{i}>" + "word " * 400 + f"</{i}>")
    train, valid = split_of(tmp_path, data=str(folder))
    assert all((f"<{i}>" in train, f"<{i}>" in valid) == (True, False) and
               (f"</{i}>" in train, f"</{i}>" in valid) == (False, True) for i in range(20))


def test_memory_is_as_told(tmp_path):
    tracemalloc.start()
    train_tiny.load_corpus(options_for(tmp_path))
    assert tracemalloc.get_traced_memory()[1] < 3.2 * len(LINES)
    tracemalloc.stop()
    assert "3 bytes per byte" in train_tiny.__doc__


def test_documents_of_a_file(tmp_path):
    """Split at every marker with a line of its own, also the last; the same at every start."""
    texts = [f"document {i} with <|endoftext|> inside\n" for i in range(1000)]
    raw = "".join(text + "<|endoftext|> \r\n" for text in texts)
    (tmp_path / "docs").write_bytes(raw.removesuffix("\r\n").encode())
    assert [text for _, text in train_tiny.read_documents(tmp_path / "docs") if text] == texts
    train, valid = (text.split("\n") for text in split_of(tmp_path, data=str(tmp_path / "docs")))
    assert set(train) & set(valid) == {""} and len({*train, *valid}) == 1001
    assert {i for i in range(30) if texts[i].strip() in valid} == {20, 28, 29}


def test_what_a_folder_holds_is_counted(tmp_path, capsys):
    folder, text = tmp_path / "site-packages/book", b"text " * 999
    for name, content in {"a.txt": text, "b/c.md": text, ".git/config": text, ".env": text,
                          "b/site-packages/x": text, "latin": b"caf\xe9", "binary": b"\0"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert [key for key, _ in train_tiny.read_documents(folder)] == ["a.txt", "b/c.md"]
    assert ("2 files read; skipped 3 that are hidden or in site-packages and 2 that are not UTF-8"
            in capsys.readouterr().out)


def test_batches(tmp_path):
    """Each seed and step draws rows of its own."""
    tokens, options = torch.arange(500), [options_for(tmp_path, seed=seed) for seed in range(3)]
    batches = [train_tiny.batch(tokens, o, step) for o in options for step in range(40)]
    assert all((y == x + 1).all() for x, y in batches)
    assert len({x.numpy().tobytes() for x, _ in batches}) == len(batches)


# Optimising

def test_learning_rate_and_weight_decay():
    options = train_tiny.TrainConfig(steps=110, warmup=10, lr=1.0)
    for step, rate in ((0, 0.1), (9, 1.0), (10, 1.0), (60, 0.55), (110, 0.1)):  # ends at a tenth
        assert train_tiny.learning_rate(options, step) == pytest.approx(rate)
    model = Attamba(small(kv="linear+ssm", qk_norm=True))
    groups = train_tiny.make_optimizer(model, options).param_groups
    assert [group["weight_decay"] for group in groups] == [options.weight_decay, 0]
    decayed, bare = (set(group["params"]) for group in groups)
    for name, p in model.named_parameters():
        none = bool(re.search(r"norm|A_log|dt_bias|\.D|w_conv", name))
        assert (p in decayed, p in bare) == (not none, none), name


def test_clip_0_is_no_limit(tmp_path):
    (a, _), (b, _), (c, _) = (train(options_for(tmp_path, steps=3, clip=clip))
                              for clip in (0, 1e9, 1e-9))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_nan_stops_the_run_and_is_never_saved(tmp_path, monkeypatch):
    """An update that ruins the weights shows in the loss a step later: it must not be saved."""
    rate = lambda options, step: math.nan if step == 5 else 0.01
    monkeypatch.setattr(train_tiny, "learning_rate", rate)
    options = options_for(tmp_path, steps=20, save_every=2)
    with pytest.raises(train_tiny.UserError, match="no longer finite at step 6"):
        train(options)
    assert train_tiny.load(options.out)["step"] == 4


# Scoring

def test_bits_per_byte_by_hand(tmp_path):
    """To guess each of 259 tokens alike costs log2(259) bits a token; bytes are counted here."""
    options = options_for(tmp_path, tokenizer=rank_file(tmp_path / "ranks"), eval_tokens=640)
    corpus = train_tiny.load_corpus(options)
    assert LINES.startswith(corpus.tokenizer.decode(corpus.train[:500].tolist()))
    tokens = torch.tensor([113, 257] * 320 + [258])    # "q", "qu", the end of a document
    tokens[[0, 400]] = 258
    uniform, device = lambda x: torch.zeros(*x.shape, 259), torch.device("cpu")
    loss, bits = train_tiny.evaluate(uniform, tokens, corpus.tokenizer, options, device)
    assert loss == pytest.approx(math.log(259))
    assert bits == pytest.approx(640 * math.log2(259) / (318 + 2 * 320))


def test_a_sample_may_hold_unused_ids(tmp_path, capsys):
    tokenizer = train_tiny.get_tokenizer(rank_file(tmp_path / "ranks"))
    ids = torch.tensor([[258, *b"caf\xc3\xa9", 256, 33]])
    model = SimpleNamespace(generate=lambda *_, **__: ids)
    train_tiny.show_sample(model, tokenizer, options_for(tmp_path))
    assert capsys.readouterr().out.endswith("\n\ncaf\xe9!\n")


# What was saved

def test_training_and_resuming(tmp_path):
    """A run learns; one that was cut short ends in the same weights, each step once in its log."""
    steps = lambda: [(line["step"], line.get("loss")) for line in logged(options.out)]
    options = options_for(tmp_path, steps=60, save_every=25)
    (whole, result), expected = train(options), steps()
    assert result["bits_per_byte"] < 3  # measured 1.9; a uniform guess costs 8
    assert logged(options.out)[-1]["held_out"] == result
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_step(35, lambda: 1 / 0, patch)
        train(options)
    assert steps() == expected[:4]  # 10, 20, 25 and 30
    with open(tmp_path / "out/log.jsonl", "a") as f:
        f.write('{"step": 10, "lo')  # torn by a kill
    resumed, _ = train(options, train_tiny.load(options.out))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    assert steps() == expected


def test_a_run_never_costs_another(tmp_path, capsys):
    """A folder that holds a run takes another: the first is moved as it is, and where is told."""
    def run(seed):
        train(options_for(tmp_path, steps=1, seed=seed))
        return content(tmp_path / "out")

    def content(folder):
        names = "checkpoint.pt", "config.json", "log.jsonl"
        return [(Path(folder) / name).read_bytes() for name in names]
    first, second = run(0), run(1)
    moved, = re.findall("is now in (.+)", capsys.readouterr().out)
    assert content(moved) == first != second


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_costs_nothing_that_was_saved(tmp_path, monkeypatch, fails):
    path = tmp_path / "checkpoint.pt"
    train_tiny.save(path, b"old")
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left on device"):
        train_tiny.save(path, b"new")
    assert path.read_bytes() == b"old"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with the checkpoint of a short run. Nobody writes there."""
    options = options_for(tmp_path_factory.mktemp("trained"), steps=2)
    train(options)
    return Path(options.out)


def test_damaged_and_foreign_checkpoints(tmp_path, trained):
    """Cut, a bit flipped, made by others or made to run code: refused, or no loss at all."""
    raw, good = (trained / "checkpoint.pt").read_bytes(), train_tiny.load(trained)
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)
    def saved(thing):
        data = io.BytesIO()
        torch.save(thing, data)
        return data.getvalue()
    def load(content):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        return train_tiny.load(tmp_path)
    refuses(load, "cannot resume from .*checkpoint.pt", b"", raw[:len(raw) // 2], saved([1]),
            saved(good | {"step": Evil()}), error=train_tiny.UserError)
    assert not (tmp_path / "ran").exists()
    r = random.Random(0)
    for _ in range(100):
        flipped = bytearray(raw)
        flipped[r.randrange(len(raw))] ^= 1 << r.randrange(8)
        with contextlib.suppress(train_tiny.UserError):
            assert saved(load(flipped)) == saved(good)  # a byte of padding


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_after_the_step(tmp_path, monkeypatch, number):
    at_step(4, lambda: os.kill(os.getpid(), number), monkeypatch)
    options, handler = options_for(tmp_path, steps=9), signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="saved at step 5; go on with"):
        train(options)
    assert train_tiny.load(options.out)["step"] == 5 and signal.getsignal(number) == handler


def test_kills_and_processes(tmp_path):
    """One case each of what experiments/robust.py tries at length: nothing is lost or differs."""
    script = HERE / "experiments/robust.py"
    for run in [start([sys.executable, script, *case.split()], tmp_path, RESULTS=str(tmp_path))
                for case in ("kills 1 20", "processes 2")]:
        error = run.communicate()[1]
        assert run.returncode == 0, error
    assert len((tmp_path / "robust.jsonl").read_text().splitlines()) == 2


# The command line

def start(command, cwd, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}  # several run side by side
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


SIZES = ("--device cpu --data text.txt --dim 16 --n_layers 2 --n_heads 2 --batch_size 2 --steps 3 "
         "--seq_len 32 --eval_tokens 100 --sample_tokens 5").split()


def test_the_command_line_from_start_to_sample(tmp_path, monkeypatch, capsys):
    """Where not all characters can be shown; again with fewer steps than were done; with more."""
    options_for(tmp_path)
    more = "--leading_tokens none,4 --chunk_size none --prompt \u2192".split()
    run = start([sys.executable, HERE / "train_tiny.py", *SIZES, *more], tmp_path,
                PYTHONIOENCODING="ascii", PYTHONWARNINGS="error")
    output, error = run.communicate()
    assert run.returncode == 0, error
    assert "P None, L (None, 4)" in output and "bits per byte" in output
    assert "\n\n?" in output and "KV cache" in output
    monkeypatch.chdir(tmp_path)
    for steps, told in ((2, "nothing to train: the checkpoint is of step 3"), (4, "step 4/4")):
        arguments = f"train_tiny.py --resume --steps {steps} --device cpu"
        monkeypatch.setattr(sys, "argv", arguments.split())
        train_tiny.main()
        output = capsys.readouterr().out
        assert told in output and f" {max(steps, 3) * 64:,} tokens" in output


def test_bad_training_input(tmp_path, monkeypatch, capsys, trained):
    """One line, exit code 2 and no traceback."""
    options_for(tmp_path)
    for name, content in {"binary": b"a\0b", "latin": b"caf\xe9", "short": b"too short",
                          "cut.gz": gzip.compress(LINES.encode())[:-50]}.items():
        (tmp_path / name).write_bytes(content)
    rank_file(tmp_path / "few", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no",))
    for more, why in (
            ("--data missing", "No such file"), ("--data binary", "zero bytes"),
            ("--data latin", "can't decode byte 0xe9"), ("--data short", "--valid_data"),
            ("--data cut.gz", "cannot read"), ("--tokenizer missing", "Unknown encoding"),
            ("--tokenizer few", "256 single bytes"), ("--n_heads 7", "n_heads must be"),
            ("--tie_embeddings maybe", "--tie_embeddings"), ("--device cuda:99", "CUDA"),
            ("--steps 0", "--steps must be"), ("--lr nan", "--lr must be"),
            ("--compile maybe", "--compile must be"), ("--out text.txt/out", "text.txt"),
            ("--compile yes --kv linear", "No working C++ compiler"),
            (f"--resume --out {trained} --n_layers 3", "without {'n_layers': 3}")):
        monkeypatch.setattr(sys, "argv", ["train_tiny.py", *SIZES, *more.split()])
        with pytest.raises(SystemExit) as exit:
            train_tiny.main()
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error.count("\n") == 1 and why in error, error
    monkeypatch.setattr(train_tiny, "WORLD", 3)
    with pytest.raises(train_tiny.UserError, match="--batch_size 8 cannot be split over 3"):
        train(options_for(tmp_path))


# ---------------------------------------------------------------------------------------
# What the documents say

def test_docstring_examples():
    failed, tried = doctest.testmod(attamba)
    assert failed == 0 and tried >= 5


def test_the_file_alone(tmp_path):
    """Copied into another project: README's snippets run, and so does `python attamba.py`, in 80
    columns; its two ways of computing agree."""
    shutil.copy(HERE / "attamba.py", tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), flags=re.S)
    assert snippets
    each = "import sys\nfor code in sys.argv[1:]: exec(code, {})"
    for arguments in (["-c", each, *snippets], ["-W", "error", "attamba.py"]):
        run = start([sys.executable, *arguments], cwd=tmp_path)
        output, error = run.communicate(timeout=100)
        assert run.returncode == 0, error
    assert max(map(len, output.splitlines())) <= 80
    assert float(re.search(r"differ by at most (\S+)", output)[1]) < 1e-5


# ---------------------------------------------------------------------------------------
# The CUDA path

@pytest.mark.parametrize("case", range(24))
def test_tables_of_flex_attention(case):
    """What the listed tiles and the mask function show is attention_mask, each key once; and no
    tile is listed that nobody sees. On a CPU, with small tiles."""
    r = random.Random(case)
    l, L, rows = r.choice([1, 7, 16, 45, 64]), r.choice([0, 3, 20, None]), r.choice([1, 2])
    lq, ends = r.choice([l, r.randint(1, l)]), torch.rand(rows, l) < r.choice([0, 0.2, 1])
    at = end_positions(ends)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attamba, "TILE", T := 8)
        at = F.pad(at, (0, -at.shape[1] % T), value=l).int()
        at, table = attamba.block_mask(at, l if L is None else L, lq, l)

    def listed(count, index):
        """(rows, tiles of queries, tiles of keys): 1 where a tile is listed, else 0"""
        first = (torch.arange(index.shape[-1]) < count[..., None]).int()
        return torch.zeros_like(index).scatter(-1, index.long(), first)[:, 0]
    tiles = listed(table.kv_num_blocks, table.kv_indices)            # 1: seen in part, 2: in full
    tiles += 2 * listed(table.full_kv_num_blocks, table.full_kv_indices)
    E, row, i = at.shape[1], torch.arange(rows)[:, None, None], torch.arange(lq)[:, None]
    tile = tiles.repeat_interleave(T, 1).repeat_interleave(T, 2)[:, :lq, :E + l]
    seen = tile // 2 + tile % 2 * table.mask_mod(row, 0, i, torch.arange(E + l))
    by_token = seen[..., E:].scatter_add(2, at[:, None].expand(-1, lq, -1), seen[..., :E])
    assert torch.equal(by_token, attention_mask(ends, L)[:, -lq:].int())
    assert torch.equal(F.max_pool2d(seen.float(), T, ceil_mode=True) > 0, tiles > 0)


@pytest.mark.skipif(attamba.triton is None or not attamba.INTERPRET,
                    reason="needs triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize("more", [dict(chunk_size=5), dict(chunk_size=None, conv_size=3),
                                  dict(chunking=rule_of_all, kv="linear+ssm")])
def test_kernels_in_the_interpreter(more):
    """The SSM's kernels without a GPU, in float32: Triton 3.6's interpreter gets bfloat16 products
    wrong. float64, what they are held to, takes the plain path."""
    warnings.simplefilter("ignore")                    # the interpreter's own; pytest restores them
    model = Attamba(small(dim=48, n_heads=3, ssm_inner=48, ssm_state=16, **more))
    tokens, weights = torch.randint(19, (1, 70)), torch.randn(1, 70, 19)
    expected = results(copy.deepcopy(model).double(), tokens, weights)
    for a, b in zip(results(model, tokens, weights), expected):
        close(a, b, 1e-4, least=0)
    close(in_calls(model, tokens, [20, 1, 49]).double(), expected[0], 1e-4)


if __name__ == "__main__":
    if sys.argv[1] == "--seed":
        check_case(int(sys.argv[2]))
    else:
        failed, seeds = 0, range(*map(int, sys.argv[1:]))
        for seed in seeds:
            try:
                check_case(seed)
            except AssertionError as e:
                failed += 1
                print(e, flush=True)
        print(f"{len(seeds) - failed} of {len(seeds)} cases agree")
        raise SystemExit(failed > 0)
