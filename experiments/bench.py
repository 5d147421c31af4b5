"""Speed and memory of Attamba against the transformer of the same shape, in one run.

    python experiments/bench.py            # every section but the last
    python experiments/bench.py --quick    # short lengths only
    python experiments/bench.py --only training,decode
    python experiments/bench.py --only profile   # where the time goes, kernel by kernel

Three models: the transformer, which is the same code with kv="linear", leading_tokens=None, and
whose attention is PyTorch's own; Attamba as in the paper; Attamba in the layout that measured best,
every fourth layer with short chunks, the others with a window and SSMs that are never reset. Each
figure is a median over repeats after warm-up, the models taking turns; a ratio above 1 favours the
model over the first one. Rows are appended to experiments/results/bench.jsonl.
"""
import argparse
import inspect
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import attamba  # noqa: E402
from attamba import Attamba, AttambaConfig  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32         # of models that only decode
SIZES = (dict(vocab_size=8192, dim=512, n_layers=8, n_heads=8) if GPU else
         dict(vocab_size=256, dim=128, n_layers=4, n_heads=4))
MODELS = {"transformer": dict(kv="linear", leading_tokens=None),
          "paper": dict(kv="ssm", chunk_size=8, leading_tokens=64),
          "recommended": dict(kv="ssm", leading_tokens=64,
                              chunk_size=(None, None, None, 2) * (SIZES["n_layers"] // 4))}
STEPS = 20                           # of decoding, in one measurement
RATES = {}                           # measured at the start


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


def build(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return Attamba(AttambaConfig(**SIZES, **options)).to(DEVICE, dtype)


def random_tokens(batch, length):
    return torch.randint(SIZES["vocab_size"], (batch, length), device=DEVICE)


# ---------------------------------------------------------------------------------------
# Training. A section yields rows: a name, a unit, a value for each model, and what else is known.

class Training:
    """Steps of an optimiser on new tokens each, so that chunks made from tokens differ from step
    to step; on a GPU in bf16 autocast, loss and blocks (or the whole model) compiled."""

    def __init__(self, model, length, whole=False):
        self.model, self.length = model, length
        self.batch = max(1, (65536 if GPU else 4096) // length)
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        self.loss = torch.compile(self.loss_of) if GPU else self.loss_of
        if GPU:
            for part in [model] if whole else model.blocks:     # as train_tiny.py does
                part.compile(fullgraph=True, options={"comprehensive_padding": False})

    @staticmethod
    def loss_of(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def __call__(self, steps=1):
        for _ in range(steps):
            tokens = random_tokens(self.batch, self.length)
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=GPU):
                loss = self.loss(self.model(tokens), tokens)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def training(quick, models=MODELS, lengths=None, note=""):
    """Three steps in a row count as one measurement, as in a training loop, which waits for its
    GPU now and then only."""
    lengths = lengths or ([1024, 8192, 32768, 131072] if GPU else [256, 4096, 16384])
    for length in lengths[:(2 if GPU else 1) if quick else None]:
        row, steps, n = {}, {}, 3 if GPU else 1
        for name, options in models.items():
            if GPU:
                torch._dynamo.reset()
                torch.cuda.empty_cache()
            steps[name] = step = Training(build(**options), length)
            begin = time.perf_counter()
            step()
            sync()
            row[f"{name} first step s"] = time.perf_counter() - begin
            step()
            if GPU:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                own = sum(p.numel() * 12 for p in step.model.parameters())  # weights, optimiser
                peak = torch.cuda.max_memory_allocated() - before + own
                row[f"{name} peak GB"] = peak / 1e9
        repeats = 3 if quick or not GPU or length > 32768 else 5
        seconds = clock({name: lambda step=step: step(n) for name, step in steps.items()}, repeats)
        speed = {name: n * steps[name].batch * length / s for name, s in seconds.items()}
        for name, step in steps.items():
            rate = 3 * speed[name] * operations(step.model, length)
            row[f"{name} % of matrix rate"] = rate / RATES["matmul_tflop_s"] / 1e10
        yield f"training, S {length}{note}", "tokens/s", speed, {**row, "models": models}


def operations(model, length):
    """Matrix operations a token in a forward pass: two per weight, four per channel of each key
    that a query sees (on average)."""
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    seen = 0
    for c in model.layer_configs:
        L = length - 1 if c.leading_tokens is None else min(length - 1, c.leading_tokens)
        seen += L + 1 - L * (L + 1) / 2 / length                        # in the window
        if c.chunk_size is not None:
            seen += (length - 1 - L) ** 2 / 2 / c.chunk_size / length   # finished chunks
    return 2 * (matrices - model.embed.weight.numel()) + 4 * c.n_heads * c.head_dim * seen


def state128(quick):
    models = {name: {**options, "ssm_state": 128} for name, options in MODELS.items()}
    yield from training(quick, models, [1024, 8192] if GPU else [256], ", state 128")


def at_tokens(tokens, positions, layer):
    """A rule for chunks that are irregular, and others in each row: one token in eight ends one."""
    return tokens % 8 == 0


def irregular(quick):
    """The price of such chunks, against fixed ones of the same mean length."""
    fixed = MODELS["paper"]
    models = {"fixed": fixed, "irregular": {**fixed, "chunking": at_tokens}}
    length = (1024 if quick else 8192) if GPU else 256 if quick else 4096
    yield from training(quick, models, [length], ", chunks of mean length 8")


class NanoBlock(nn.Module):
    """A block as in nanoGPT (github.com/karpathy/nanoGPT): LayerNorm, one matrix for q, k and v,
    GELU. Its MLP has as many weights as our SwiGLU. Written here from its description; none of its
    code."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, hidden = heads, dim * 9 // 2
        self.norm1, self.norm2 = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for t in self.qkv(self.norm1(x)).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class NanoGPT(nn.Module):
    def __init__(self, length):
        super().__init__()
        dim, vocabulary = SIZES["dim"], SIZES["vocab_size"]
        self.embed = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(length, dim))
        self.blocks = nn.Sequential(*(NanoBlock(dim, SIZES["n_heads"])
                                      for _ in range(SIZES["n_layers"])))
        self.norm, self.head = nn.LayerNorm(dim, bias=False), nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.positions)))


def nanogpt(quick):
    """Is the transformer that all is compared with as fast as one should be? Training, against a
    model as nanoGPT builds it: no RoPE and no gate, so fewer elementwise operations, and compiled
    as a whole."""
    for length in ([1024, 8192] if GPU else [256, 4096])[:1 if quick else None]:
        torch._dynamo.reset()
        steps = {"nanoGPT's way": Training(NanoGPT(length).to(DEVICE), length, whole=True),
                 "transformer": Training(build(**MODELS["transformer"]), length)}
        seconds = clock({name: lambda step=step: step(3) for name, step in steps.items()},
                        3 if quick else 7)
        speed = {name: 3 * steps[name].batch * length / s for name, s in seconds.items()}
        yield f"our transformer, training, S {length}", "tokens/s", speed, {}


# ---------------------------------------------------------------------------------------
# Parts of a model, and models with a cache

ATTENTION_LENGTHS = [1024, 4096, 16384, 65536] if GPU else [256, 4096, 16384]


def attention_calls(length):
    """Attention alone, forward and backward, on sequences of `length`, for four layers in a row."""
    heads, d = SIZES["n_heads"], SIZES["dim"] // SIZES["n_heads"]
    batch, positions = ATTENTION_LENGTHS[-1] // length, torch.arange(length, device=DEVICE)
    q, k, v, grad = (torch.randn(batch, length, heads, d, device=DEVICE, dtype=DTYPE)
                     .transpose(1, 2).requires_grad_() for _ in range(4))

    def calls(options):
        layers = []
        for layer in range(4):
            c = AttambaConfig(**SIZES, **options).of_layer(layer)
            chunks = attamba.Chunks.of(c, layer, positions, (1, batch), None, None)
            layers.append((chunks.ends, c.leading_tokens, chunks.at))

        def run():
            for chunks in layers:
                torch.autograd.grad(attamba.attend(q, k, v, *chunks), (q, k, v), grad)
        return run
    return {name: calls(options) for name, options in MODELS.items()}


def attention(quick):
    for length in ATTENTION_LENGTHS[:(2 if GPU else 1) if quick else None]:
        seconds = clock(attention_calls(length), 3 if quick or not GPU else 7, 2 if GPU else 1)
        yield (f"attention alone, forward and backward, S {length}", "ms",
               {name: s * 1e3 / 4 for name, s in seconds.items()}, {})


def prefill_calls(length):
    tokens = random_tokens(1, length)
    models = {name: build(DTYPE, **options) for name, options in MODELS.items()}
    return {name: lambda m=m: m(tokens, cache=m.new_cache(1, length + 1), last=True)
            for name, m in models.items()}


def prefill(quick):
    length = (16384 if quick else 131072) if GPU else 1024 if quick else 16384
    seconds = clock(prefill_calls(length), 3)
    yield (f"prefill of {length}, batch 1", "tokens/s",
           {name: length / s for name, s in seconds.items()}, {})


def pretend(cache, context):
    """As if the cache had seen `context` tokens; which ones does not matter for a step's time."""
    for layer in cache.layers:
        layer.position, (c, i) = context, (layer.config, layer.layer)
        first, stop = layer.span()                                      # the window's slots in use
        window = torch.arange(context - (stop - first), context, device=DEVICE)
        layer.ends[:, first:stop] = attamba.chunk_ends(c, window, i)
        layer.n_chunks.fill_(attamba.count_ends(c, i, int(window[0])))


def decoding(model, cache):
    """A function that takes STEPS more greedy steps with the cache. All decoding here is done by
    Attamba.stream, that is, by model(tokens, cache=cache, last=True); where it can record a step
    as a CUDA graph, it does: once, in the calls that warm up, as the stream lives on."""
    graph = GPU and "cuda_graph" in inspect.signature(model.stream).parameters
    token = torch.zeros(len(cache.layers[0].kv), 1, dtype=torch.long, device=DEVICE)
    with mock.patch.object(model, "new_cache", lambda *sizes, **options: cache):
        stream = model.stream(token, cache.layers[0].max_len - cache.position, temperature=0,
                              **{"cuda_graph": True} if graph else {})
    return lambda: [next(stream) for _ in range(STEPS)]


def decode_calls(batch, context):
    """`decoding` for cached models that have seen `context` tokens; the caches' sizes, and the
    bytes that a step reads: all weights, and what is in use of the cache."""
    calls, sizes, read = {}, {}, {}
    for name, options in MODELS.items():
        model = build(DTYPE, **options)
        cache = model.new_cache(batch, context + 12 * STEPS)
        pretend(cache, context)
        calls[name], sizes[name] = decoding(model, cache), cache.nbytes
        read[name] = (sum(p.numel() * p.element_size() for p in model.parameters())
                      + cache.nbytes * context / (context + 12 * STEPS))
    return calls, sizes, read


def decode(quick):
    sizes = [(1, 1024), (64, 32768)] if GPU else [(1, 1024), (1, 8192), (1, 32768)]
    for batch, context in sizes[:1 if quick else None]:
        calls, nbytes, read = decode_calls(batch, context)
        seconds, row = clock(calls, 7, 2), {}
        for name in MODELS:
            rate = read[name] * STEPS / seconds[name] / 1e9
            row[f"{name} cache bytes"] = nbytes[name]
            row[f"{name} % of bandwidth"] = 100 * rate / RATES["copy_gb_s"]
        yield (f"decode, batch {batch}, context {context}", "tokens/s",
               {name: STEPS * batch / s for name, s in seconds.items()}, row)


def cache(quick):
    for context in (1024, 4096, 32768):
        yield (f"KV cache, context {context}, batch 1", "bytes",
               {name: build(DTYPE, **options).new_cache(1, context).nbytes
                for name, options in MODELS.items()}, {})


# ---------------------------------------------------------------------------------------
# Where does the time go? Kernel by kernel (on a CPU: by operator), in rows of the other sections.

def profile(quick):
    steps, length = {}, 1024 if GPU else 256
    for name, options in MODELS.items():
        torch._dynamo.reset()
        steps[name] = Training(build(**options), length)
        steps[name](2)                                                  # compiled
    yield kernel_times(f"a training step, S {length}", steps)
    for length in ATTENTION_LENGTHS[:1 if quick else None]:
        yield kernel_times(f"attention of four layers, S {length}", attention_calls(length))
    if not quick:
        length, batch = (131072, 64) if GPU else (16384, 1)
        yield kernel_times(f"prefill of {length}, batch 1", prefill_calls(length))
        yield kernel_times(f"{STEPS} steps of decoding, batch {batch}, context 32768",
                           decode_calls(batch, 32768)[0])


def kernel_times(what, functions, calls=3):
    total, activity = {}, torch.profiler.ProfilerActivity
    for name, function in functions.items():
        clock({name: function}, 1, 2)                                   # warm, its graph recorded
        with torch.profiler.profile(activities=[activity.CUDA if GPU else activity.CPU]) as p:
            for _ in range(calls):
                function()
            sync()
        rows = sorted(((e.self_device_time_total if GPU else e.self_cpu_time_total, e.count, e.key)
                       for e in p.key_averages()), reverse=True)
        total[name] = sum(us for us, _, _ in rows) / calls / 1e3
        print(f"{name}, {what}: {total[name]:.3f} ms in "
              f"{sum(n for _, n, _ in rows) / calls:.0f} kernels")
        for us, n, key in rows[:10]:
            print(f"{us / calls / 1e3:10.3f} ms {n / calls:6.0f} x {key[:80]}")
    return f"kernels of {what}", "ms", total, {}


def roofline():
    """Measured copy bandwidth (GB/s, read and write) and matrix rate (TFLOP/s)."""
    n, m = (2 ** 30, 8192) if GPU else (2 ** 26, 2048)
    x = torch.zeros(n, dtype=DTYPE, device=DEVICE)
    y, a = torch.empty_like(x), torch.randn(m, m, device=DEVICE, dtype=DTYPE)
    seconds = clock(dict(copy=lambda: y.copy_(x), matmul=lambda: a @ a), 10, 3)
    return dict(copy_gb_s=2 * x.nbytes / seconds["copy"] / 1e9,
                matmul_tflop_s=2 * m ** 3 / seconds["matmul"] / 1e12)


def main():
    sections = {f.__name__: f for f in (training, state128, irregular, nanogpt, attention, prefill,
                                        decode, cache, profile)}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default=",".join(s for s in sections if s != "profile"),
                        help="comma-separated: " + ", ".join(sections))
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/bench.jsonl")
    options = parser.parse_args()
    if GPU:
        torch.set_float32_matmul_precision("high")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                            text=True).stdout.strip()
    hardware = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    RATES.update(roofline())
    print(f"{hardware}, torch {torch.__version__}; copies {RATES['copy_gb_s']:.0f} GB/s, "
          f"matrix products {RATES['matmul_tflop_s']:.2f} TFLOP/s")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    names = None
    for section in options.only.split(","):
        for name, unit, values, more in sections[section](options.quick):
            first, *others = values
            if names != [*values]:
                names = [*values]
                print(f"\n{'':<58}" + "".join(f"{n:>14}" for n in names)
                      + "".join(f"{'ratio':>14}" for _ in others))
            sign = 1 if unit == "tokens/s" else -1
            ratios = {f"{n} ratio": (values[n] / values[first]) ** sign for n in others}
            table = [(f"{name}, {unit}", values.values(), ratios.values())]
            for what in [k.removeprefix(first) for k in more if k.startswith(first)]:
                row = [more[n + what] for n in names]
                table.append(("   " + what, row, [row[0] / value for value in row[1:]]))
            for what, numbers, against in table:
                print(f"{what:<58}" + "".join(f"{x:>14,.{0 if x >= 1000 else 2}f}" for x in numbers)
                      + "".join(f"{x:>14.2f}" for x in against), flush=True)
            line = dict(name=name, unit=unit, **values, **ratios, **more, sizes=SIZES,
                        hardware=hardware, torch=torch.__version__, **RATES, commit=commit,
                        quick=options.quick)
            line.setdefault("models", {n: MODELS.get(n) for n in names})
            with open(options.out, "a") as f:
                f.write(json.dumps(line, default=lambda rule: rule.__name__) + "\n")


if __name__ == "__main__":
    main()
