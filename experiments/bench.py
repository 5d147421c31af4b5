"""Speed and memory of Attamba against the transformer of the same shape, in one run.

    python experiments/bench.py            # some 4 minutes on a GPU, 3 to 5 on a CPU
    python experiments/bench.py --quick    # short lengths only
    python experiments/bench.py --only training,decode
    python experiments/bench.py --only profile   # where the time goes: kernels of training, attention, prefill and decoding

The transformer is the same code with kv="linear", leading_tokens=None; its attention is PyTorch's
scaled_dot_product_attention, causal, without a mask. Each figure is a median over repeats after warm-up,
the two models taking turns. Rows are appended to experiments/results/bench.jsonl.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import attamba  # noqa: E402
from attamba import Attamba, AttambaConfig, attend  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
RATES = {}                           # measured at the start
SIZES = dict(vocab_size=8192, dim=512, n_layers=8, n_heads=8) if GPU else dict(vocab_size=256, dim=128, n_layers=4, n_heads=4)
P, L = 8, 64
STEPS = 20                           # of decoding, in one measurement
MODELS = {"transformer": dict(kv="linear", leading_tokens=None), "attamba": dict(chunk_size=P, leading_tokens=L, ssm_state=32)}
STATE128 = {**MODELS, "attamba": dict(MODELS["attamba"], ssm_state=128)}


def clock(functions, repeats, warmup=1):
    """Median seconds of each function, all taking turns."""
    times = {name: [] for name in functions}
    for i in range(warmup + repeats):
        for name, function in functions.items():
            sync()
            begin = time.perf_counter()
            function()
            sync()
            if i >= warmup:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(t) for name, t in times.items()}


def sync():
    if GPU:
        torch.cuda.synchronize()


def build(dtype=None, **options):
    torch.manual_seed(0)
    return Attamba(AttambaConfig(**SIZES, **options)).to(DEVICE, dtype)


class Training:
    """One optimiser step; on a GPU in bf16 autocast, loss and blocks (or the whole model) compiled."""

    def __init__(self, model, tokens, whole=False):
        self.model, self.tokens = model, tokens
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.loss = torch.compile(self.loss_of) if GPU else self.loss_of
        if GPU:
            for part in [model] if whole else model.blocks:
                part.compile(fullgraph=True, options={"comprehensive_padding": False})  # as train_tiny.py does

    @staticmethod
    def loss_of(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def __call__(self):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=GPU):
            loss = self.loss(self.model(self.tokens), self.tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def training(quick, models=MODELS, lengths=None, note=""):
    """Three steps in a row count as one measurement, as in a training loop, which waits for its GPU now and then only."""
    lengths = lengths or ((GPU and [1024, 8192, 32768, 131072]) or [256, 4096, 16384])[:(2 if GPU else 1) if quick else None]
    for length in lengths:
        per_step, row, steps = 65536 if GPU else 4096, {}, {}
        tokens = torch.randint(SIZES["vocab_size"], (max(1, per_step // length), length), device=DEVICE)
        for name, options in models.items():
            if GPU:
                torch._dynamo.reset()
                torch.cuda.empty_cache()
            step = Training(build(**options), tokens)
            begin = time.perf_counter()
            step()
            sync()
            row[f"{name} first step s"] = time.perf_counter() - begin
            step()
            if GPU:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                own = sum(p.numel() * 12 for p in step.model.parameters())    # weights and optimiser, fp32
                row[f"{name} peak GB"] = (torch.cuda.max_memory_allocated() - before + own) / 1e9
            steps[name] = lambda step=step: [step() for _ in range(3 if GPU else 1)]
        seconds = clock(steps, 3 if quick or not GPU or length > 32768 else 5)
        speed = {n: tokens.numel() * (3 if GPU else 1) / s for n, s in seconds.items()}
        for name, options in models.items():
            row[f"{name} % of matrix rate"] = 3 * speed[name] * operations(options, length) / RATES["matmul_tflop_s"] / 1e10
        yield f"training, S {length}{note}", "tokens/s", speed, {**row, "model": {**SIZES, **models["attamba"]}}


def operations(options, length):
    """Matrix operations a token in a forward pass: two per weight, four per channel of each visible key (on average)."""
    config = AttambaConfig(**SIZES, **options)
    weights = sum(p.numel() for p in build(**options).parameters() if p.dim() > 1) - config.vocab_size * config.dim
    seen = (length + 1) / 2
    if config.leading_tokens is not None:
        chunks = max(0, length - L) ** 2 / 2 / P / length
        seen = min(seen, L + 1) + chunks
    return 2 * weights + 4 * config.n_layers * config.n_heads * config.head_dim * seen


def state128(quick):
    yield from training(quick, STATE128, [1024, 8192] if GPU else [256], ", state 128")


class NanoBlock(nn.Module):
    """A block as in nanoGPT (github.com/karpathy/nanoGPT): LayerNorm, one matrix for q, k and v, GELU. Its MLP has as
    many weights as our SwiGLU. Written here from its description; none of its code."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, hidden = heads, dim * 9 // 2
        self.norm1, self.norm2 = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class NanoGPT(nn.Module):
    def __init__(self, length):
        super().__init__()
        dim, vocabulary = SIZES["dim"], SIZES["vocab_size"]
        self.embed, self.positions = nn.Embedding(vocabulary, dim), nn.Parameter(0.02 * torch.randn(length, dim))
        self.blocks = nn.Sequential(*(NanoBlock(dim, SIZES["n_heads"]) for _ in range(SIZES["n_layers"])))
        self.norm, self.head = nn.LayerNorm(dim, bias=False), nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.positions)))


def nanogpt(quick):
    """Is the transformer that all is compared with as fast as one should be? Training, against a model as nanoGPT
    builds it: no RoPE and no gate, so fewer elementwise operations, and compiled as a whole."""
    for length in ([1024, 8192] if GPU else [256, 4096])[:1 if quick else None]:
        tokens = torch.randint(SIZES["vocab_size"], ((65536 if GPU else 4096) // length, length), device=DEVICE)
        torch._dynamo.reset()
        steps = {"transformer": Training(NanoGPT(length).to(DEVICE), tokens, whole=True),
                 "attamba": Training(build(**MODELS["transformer"]), tokens)}
        seconds = clock({n: lambda step=step: [step() for _ in range(3)] for n, step in steps.items()}, 3 if quick else 7)
        yield (f"nanoGPT's way (left), our transformer (right), S {length}", "tokens/s",
               {n: 3 * tokens.numel() / s for n, s in seconds.items()}, {})


def released(quick):
    """Against the way of the released code in plain PyTorch, compiled: attention through a dense S x S mask, and the
    SSMs as one scan over the flattened batch, its matrices in memory (here with this project's boundaries)."""
    def dense(q, k, v, boundaries, leading, *_):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attamba.attention_mask(boundaries, leading)[:, None])

    def flat(u, dt, A, B, C, D, boundaries, h=None):
        b, l = u.shape[:2]
        ends = boundaries.expand(b, -1).reshape(1, -1)
        y, h = scan(*(t.flatten(0, 1)[None] for t in (u, dt)), A, *(t.flatten(0, 1)[None] for t in (B, C)), D, ends, h, 64)
        return y.view(b, l, *y.shape[2:]), h
    ours = attamba.attend, attamba.ssm_scan, attamba._ssm_kernel_fits
    scan = ours[1]
    for length in [1024, 16384]:
        rows = []
        for patch in (dense, flat, lambda *_: False), ours:
            attamba.attend, attamba.ssm_scan, attamba._ssm_kernel_fits = patch
            rows += training(quick, {"attamba": MODELS["attamba"]}, [length])
        (_, unit, slow, _), (name, _, fast, row) = rows
        yield f"against the released way: {name}", unit, {"transformer": slow["attamba"], **fast}, {}


ATTENTION_LENGTHS, ATTENTION_TOKENS = ([1024, 4096, 16384, 65536], 65536) if GPU else ([256, 4096, 16384], 16384)


def attention_calls(length, P=P, L=L):
    """One call of attention, forward and backward, on sequences of `length`: by full attention, by attend"""
    heads, d = SIZES["n_heads"], SIZES["dim"] // SIZES["n_heads"]
    q, k, v, g = (torch.randn(ATTENTION_TOKENS // length, length, heads, d, device=DEVICE, dtype=torch.bfloat16 if GPU else torch.float32)
                  .transpose(1, 2).requires_grad_() for _ in range(4))
    first = P - 1 if P else attamba.NEVER
    ends, first = ((torch.arange(length, device=DEVICE) - first) % (P or attamba.NEVER) == 0)[None], torch.tensor(first, device="cpu")
    return {"transformer": lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), g),
            "attamba": lambda: torch.autograd.grad(attend(q, k, v, ends, L, P, first), (q, k, v), g)}


def attention(quick):
    for length in ATTENTION_LENGTHS[:(2 if GPU else 1) if quick else None]:
        calls = 10 if GPU else 1  # in a row, as in training: the GPU then waits for nobody
        rows = {n: lambda one=one: [one() for _ in range(calls)] for n, one in attention_calls(length).items()}
        seconds = clock(rows, 3 if quick or not GPU else 7, 2)
        yield f"attention alone, forward and backward, S {length}", "ms", {n: s * 1e3 / calls for n, s in seconds.items()}, {}


def prefill_calls(length):
    tokens = torch.randint(SIZES["vocab_size"], (1, length), device=DEVICE)
    models = {name: build(torch.bfloat16 if GPU else None, **options) for name, options in MODELS.items()}
    return {n: lambda m=m: m(tokens, cache=m.new_cache(1, length + 1)) for n, m in models.items()}


def prefill(quick):
    length = (131072 if not quick else 16384) if GPU else (16384 if not quick else 1024)
    seconds = clock(prefill_calls(length), 3)
    yield f"prefill of {length}, batch 1", "tokens/s", {n: length / s for n, s in seconds.items()}, {}


def kernels(function, calls=5):
    """Milliseconds of a call by kernel (on a CPU: by operator), the longest first."""
    activity = torch.profiler.ProfilerActivity.CUDA if GPU else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(calls):
            function()
        sync()
    time_of = lambda e: e.self_device_time_total if GPU else e.self_cpu_time_total
    return sorted(((time_of(e) / calls / 1e3, e.count / calls, e.key) for e in profiler.key_averages()), reverse=True)


def profile(quick):
    """Where the time goes, kernel by kernel, in the rows of the other sections."""
    length, total = (1024, 65536) if GPU else (256, 4096)
    tokens, steps = torch.randint(SIZES["vocab_size"], (total // length, length), device=DEVICE), {}
    for name, options in MODELS.items():
        torch._dynamo.reset()
        steps[name] = Training(build(**options), tokens)
        begin = time.perf_counter()
        steps[name]()
        sync()
        if GPU:  # phases of compilation, nested: the sums overlap
            phases = zip(*torch._dynamo.utils.compile_times(repr="csv", aggregate=True))
            print(f"{name}: first step {time.perf_counter() - begin:.1f} s, of which, in s, nested: " + ", ".join(
                f"{phase} {float(s):.1f}" for phase, s in sorted(phases, key=lambda p: -float(p[1]))[:12]))
        steps[name]()
    yield kernel_times(f"a training step, S {length}", steps)
    for length in ATTENTION_LENGTHS[:1 if quick else None]:
        yield kernel_times(f"attention, S {length}", attention_calls(length))
        if GPU:  # the same kernels at the transformer's work: what is lost to their rate
            window = attention_calls(length, None, length - 2)               # all keys but one
            yield kernel_times(f"attention, S {length}, a window of {length - 2} in place of chunks", window)
    if not quick:
        length, batch = (131072, 64) if GPU else (16384, 1)
        yield kernel_times(f"prefill of {length}, batch 1", prefill_calls(length))
        yield kernel_times(f"{STEPS} steps of decoding, batch {batch}, context 32768", decode_calls(batch, 32768)[0])


def kernel_times(what, functions):
    times = {}
    for name, function in functions.items():
        clock({name: function}, 1, 2)                                             # compiled, and its graph recorded
        rows = kernels(function)
        times[name] = sum(ms for ms, _, _ in rows)
        print(f"{name}, {what}: {times[name]:.3f} ms in {sum(n for _, n, _ in rows):.0f} kernels")
        for ms, n, key in rows[:10]:
            print(f"{ms:10.3f} ms {n:6.0f} x {key[:100]}")
    return f"kernels of {what}", "ms", times, {}


def pretend(model, cache, context):
    """As if the cache had seen `context` tokens; what they were does not matter for the time of a step."""
    for block, layer in zip(model.blocks, cache.layers):
        layer.position = context
        layer.n_chunks.fill_(int(block.attention.boundaries(max(0, context - layer.window)).sum()))


def decode_calls(batch, context):
    """STEPS greedy steps of cached models that have seen `context` tokens; the bytes of their caches; those a step reads."""
    token, steps, taken, read = torch.zeros(batch, 1, dtype=torch.long, device=DEVICE), {}, {}, {}
    for name, options in MODELS.items():
        model = build(torch.bfloat16 if GPU else None, **options)
        before = torch.cuda.memory_allocated() if GPU else 0
        cache = model.new_cache(batch, context + 200)
        taken[name] = torch.cuda.memory_allocated() - before if GPU else cache.nbytes
        read[name] = sum(p.numel() * p.element_size() for p in model.parameters()) + cache.nbytes * context / (context + 200)
        pretend(model, cache, context)

        def greedy(model=model, cache=cache, token=token):                            # as Attamba.stream does it
            for _ in range(STEPS):
                token = model._logits(token, cache=cache)[:, -1].argmax(-1, keepdim=True)
        steps[name] = greedy
    return steps, taken, read


def decode(quick):
    for batch, context in ([(1, 1024), (64, 32768)] if GPU else [(1, 1024), (1, 8192), (1, 32768)])[:1 if quick else None]:
        (steps, taken, read), row = decode_calls(batch, context), {}
        seconds = clock(steps, 7)
        for name in MODELS:
            row[f"{name} cache bytes"] = taken[name]
            row[f"{name} % of bandwidth"] = 100 * read[name] / (seconds[name] / STEPS) / RATES["copy_gb_s"] / 1e9
        yield f"decode, batch {batch}, context {context}", "tokens/s", {n: STEPS * batch / s for n, s in seconds.items()}, row


def cache(quick):
    for context in (1024, 4096, 32768):
        sizes = {name: build(torch.bfloat16 if GPU else None, **options).new_cache(1, context).nbytes for name, options in MODELS.items()}
        yield f"KV cache, context {context}, batch 1", "bytes", sizes, {}


def roofline():
    """Measured copy bandwidth (GB/s, read and write) and matrix rate (TFLOP/s)."""
    dtype, n, m = (torch.bfloat16, 2 ** 30, 8192) if GPU else (torch.float32, 2 ** 26, 2048)
    x = torch.zeros(n, dtype=dtype, device=DEVICE)
    y, a = torch.empty_like(x), torch.randn(m, m, device=DEVICE, dtype=dtype)
    seconds = clock(dict(copy=lambda: y.copy_(x), matmul=lambda: a @ a), 10, 3)
    return dict(copy_gb_s=2 * x.numel() * x.element_size() / seconds["copy"] / 1e9, matmul_tflop_s=2 * m ** 3 / seconds["matmul"] / 1e12)


def main():
    sections = dict(training=training, state128=state128, nanogpt=nanogpt, released=released, attention=attention, prefill=prefill, decode=decode, cache=cache, profile=profile)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default=",".join(s for s in sections if s != "profile" and (GPU or s != "released")), help="comma-separated: " + ", ".join(sections))
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/bench.jsonl")
    options = parser.parse_args()
    if GPU:
        torch.set_float32_matmul_precision("high")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    hardware = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    RATES.update(roofline())
    print(f"{hardware}, torch {torch.__version__}; copies {RATES['copy_gb_s']:.0f} GB/s, matrix products {RATES['matmul_tflop_s']:.2f} TFLOP/s; "
          f"dim {SIZES['dim']}, {SIZES['n_layers']} layers, P {P}, L {L}\n")
    print(f"{'':<52}{'transformer':>13}{'attamba':>13}{'ratio':>8}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for section in options.only.split(","):
        for name, unit, values, more in sections[section](options.quick):
            a, b = values["transformer"], values["attamba"]
            ratio = b / a if unit == "tokens/s" else a / b
            digits = 2 if unit == "ms" else 0
            print(f"{name + ', ' + unit:<52}{a:>13,.{digits}f}{b:>13,.{digits}f}{ratio:>8.2f}", flush=True)
            model = more.pop("model", {**SIZES, **MODELS["attamba"]})
            for key in more:
                if key.startswith("attamba"):
                    other = more[key.replace("attamba", "transformer")]
                    print(f"{'    ' + key.removeprefix('attamba '):<52}{other:>13,.1f}{more[key]:>13,.1f}{other / more[key]:>8.2f}", flush=True)
            with open(options.out, "a") as f:
                f.write(json.dumps(dict(name=name, unit=unit, **values, ratio=ratio, **more, model=model,
                                        hardware=hardware, torch=torch.__version__, **RATES,
                                        commit=commit, quick=options.quick)) + "\n")


if __name__ == "__main__":
    main()
