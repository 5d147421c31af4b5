"""Quality: named configurations, trained by train_tiny.py's own training function, at equal tokens seen.

    python experiments/sweep.py list                     # every row: parameters, KV entries and bytes, done or not
    python experiments/sweep.py lr claims                # train the rows of these groups that are not done yet
    python experiments/sweep.py claims --only 'attamba*' # of them, those with such names
    python experiments/sweep.py english --data FOLDER    # the folder with english_docs.*.txt.xz, wikitext-2.test.txt
    python experiments/sweep.py claims --minutes 9       # start no row that would end later
    python experiments/sweep.py recall                   # the synthetic tasks of recall.py (takes its options)
    python experiments/sweep.py open --laptop            # the rows of 1,024 tokens at the size of train_tiny.py on a CPU, two seeds
    python experiments/sweep.py claims --quick           # tiny shapes, to try the script on a CPU

Groups: lr, claims, claims4096, smooth, english, open, open4096. Appends one line a run to experiments/results/sweep.jsonl
and skips what is there with the same learning rate; a run that was stopped goes on from its checkpoint when the same command is given again.
Corpora (Python source of this machine, English) are made on first use and kept in --work.
"""
import argparse
import bisect
import contextlib
import dataclasses
import fnmatch
import functools
import json
import re
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import train_tiny  # noqa: E402
import variants as V  # noqa: E402
from attamba import Attamba, AttambaConfig  # noqa: E402
from corpora import VOCAB, corpus  # noqa: E402
from train_tiny import TrainConfig, UserError  # noqa: E402

# The best of three for transformer and window in the group lr, runs of a quarter of the tokens. There Attamba favoured 4e-3
# by 0.7 %; over all tokens 2e-3 is better for it too, by 1.1 % at S 1024 and 3.0 % at 4096 (rows in sweep.jsonl).
LR = 2e-3
FULL = dict(shape=dict(vocab_size=VOCAB, dim=512, n_layers=8, n_heads=8), tokens_per_step=65536, steps=2136, eval_tokens=2 ** 21, shrink=1)    # 140 M tokens
LAPTOP = dict(shape=dict(vocab_size=256, dim=128, n_layers=4, n_heads=4), tokens_per_step=2048, steps=700, eval_tokens=100_000, shrink=4)       # bytes
QUICK = dict(shape=dict(vocab_size=VOCAB, dim=64, n_layers=2, n_heads=2), tokens_per_step=512, steps=20, eval_tokens=8192, shrink=8)


# ---------------------------------------------------------------------------------------
# What a model costs

def kv_cost(config, S, variant=None, patch=None, max_chunks=None):
    """Entries per layer (mean) and cache.nbytes of one sequence of S tokens: bf16, states in float32."""
    with V.patched(patch, config):
        with torch.device("meta"):                                 # shapes count here, not numbers
            model = (variant(None, config) if variant else Attamba)(config).to(torch.bfloat16)
        cache = model.new_cache(1, S, max_chunks)
    return sum(layer.kv.shape[3] for layer in cache.layers) / len(cache.layers), cache.nbytes


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in Attamba(config).parameters())


def fitted(values, nbytes, bound):
    """The largest of increasing values whose cache is at most `bound` bytes."""
    return values[max(0, bisect.bisect_right(values, bound, key=nbytes) - 1)]


# ---------------------------------------------------------------------------------------
# The rows

@dataclass
class Row:
    group: str
    name: str
    model: object                                  # changes of AttambaConfig, or a function that finds them
    seq_len: int = 1024
    corpus: str = "python"
    seeds: tuple = (0,)
    lr: float = LR
    part: float = 1.0                              # of the usual tokens
    variant: object = None                         # see variants.py
    patch: object = None
    chunk_mean: object = None                      # mean chunk length, where the text decides it: a function of the corpus
    transfer: bool = False                         # also evaluate the weights at other P and L


def rows(shape, shrink=1):
    """Every row, by group, the most important first. shrink: divide lengths.
    Fitting one cache to another takes a while: models that need it are functions, called for the rows that are wanted."""
    def config(**changes):
        return AttambaConfig(**{**shape, **changes})

    @functools.cache
    def size_of(S, changes):
        return kv_cost(config(**dict(changes)), S)[1]

    def size(S, changes):
        return size_of(S, tuple(sorted(changes.items())))

    transformer = dict(kv="linear", chunk_size=None, leading_tokens=None)
    attamba = lambda P, L, **more: dict(chunk_size=P, leading_tokens=L, **more)

    def equal_leading(like, S, **changes):
        """The model whose cache is that of `like`, or less than one entry smaller: as many leading tokens as fit."""
        return lambda: dict(changes, leading_tokens=fitted(range(S), lambda L: size(S, dict(changes, leading_tokens=L)), size(S, like)))

    def equal_window(like, S):
        return equal_leading(like, S, kv="linear", chunk_size=None)

    def equal_layers(like, S, sizes, **changes):
        """The same for layers of different kinds: sizes(L) -> (P, L) of each layer."""
        def model(L):
            P, L = zip(*sizes(L))
            return dict(changes, chunk_size=P, leading_tokens=L)
        return lambda: model(fitted(range(S), lambda L: size(S, model(L)), size(S, like)))

    def narrowed(like, S, heads):
        """A transformer with `heads` key heads, as thick as fits (an even number of channels, to the nearest)."""
        def model():
            thick = lambda d: dict(transformer, n_kv_heads=heads, head_dim=d)
            target, evens = size(S, like), range(2, 1 + 2 * shape["dim"] // shape["n_heads"], 2)
            d = fitted(evens, lambda d: size(S, thick(d)), target)
            return thick(min((d, d + 2), key=lambda d: abs(size(S, thick(d)) - target)))
        return model

    def equal_parameters(like):
        """The transformer with its SwiGLUs as wide as the parameters of `like` allow."""
        hidden = range(16, 16 * shape["dim"], 16)
        return lambda: dict(transformer, hidden_dim=fitted(hidden, lambda h: parameters(config(**transformer, hidden_dim=h)), parameters(config(**like))))

    n, table = shape["n_layers"], []
    s1, s4 = 1024 // shrink, 4096 // shrink
    main = attamba(8, 64 // shrink)
    l8, l64 = 8 // min(shrink, 4), 64 // shrink

    def add(group, name, model, **more):
        table.append(Row(group, name, model, **{"seq_len": s1, **more}))

    for lr in (2e-3, 1e-3, 4e-3):
        add("lr", f"lr {lr:g} transformer", transformer, lr=lr, part=0.25)
        add("lr", f"lr {lr:g} window=p8-l64", equal_window(main, s1), lr=lr, part=0.25)
        add("lr", f"lr {lr:g} attamba-p8-l64", main, lr=lr, part=0.25)

    two = dict(seeds=(0, 1))
    add("claims", "transformer", transformer, **two)
    add("claims", "attamba-p8-l64", main, transfer=True, **two)
    add("claims", "window=p8-l64", equal_window(main, s1), **two)
    add("claims", "attamba-p8-l8", attamba(8, l8))
    add("claims", "window=p8-l8", equal_window(attamba(8, l8), s1))
    add("claims", "attamba-p8-l8-released-mixing", attamba(8, l8), patch=V.released_mixing)
    add("claims", "pseudo-chunk-p8", attamba(8, None))
    add("claims", "transformer-parameters=p8", equal_parameters(main))
    add("claims", "strided-p8-l64", attamba(8, l64, kv="linear"))
    add("claims", "attamba-p4-l64", attamba(4, l64), **two)
    add("claims", "window=p4-l64", equal_window(attamba(4, l64), s1), **two)
    add("claims", "attamba-p16-l64", attamba(16, l64))
    add("claims", "window=p16-l64", equal_window(attamba(16, l64), s1))
    add("claims", "gqa=p8-l64", narrowed(main, s1, max(1, shape["n_heads"] // 4)))
    add("claims", "thin-heads=p8-l64", narrowed(main, s1, shape["n_heads"]))
    add("claims", "attamba-p8-l64-uniform", attamba(8, l64, chunking="uniform"))
    add("claims", "attamba-p8-l64-random", attamba(8, l64, chunking="random"))
    add("claims", "attamba-p8-l64-keep-wk-wv", attamba(8, l64, kv="linear+ssm"))
    add("claims", "attamba-p8-l64-state128", attamba(8, l64, ssm_state=128))
    add("claims", "attamba-p4-l8", attamba(4, l8))
    add("claims", "attamba-p16-l8", attamba(16, l8))
    add("claims", "attamba-p8-l128", attamba(8, 128 // shrink))
    add("claims", "attamba-p64-l64", attamba(64, l64))
    add("claims", "attamba-p8-l8-uniform", attamba(8, l8, chunking="uniform"))

    for group, S, text in (("claims4096", s4, "python"), ("english", s1, "english")):
        at = dict(seq_len=S, corpus=text)
        add(group, "transformer", transformer, **at)
        add(group, "attamba-p8-l64", main, **at)
        add(group, "window=p8-l64", equal_window(main, S), **at)
    add("english", "gqa=p8-l64", narrowed(main, s1, max(1, shape["n_heads"] // 4)), corpus="english")

    # A line of Python is a chunk of some 10 tokens, a word one of 2 or 3: each against cuts by counting.
    add("smooth", "attamba-random-p-l64", main, variant=lambda c, config: V.RandomP, transfer=True)
    for name, lines in (("lines", True), ("words", False)):
        mean = functools.partial(V.mean_chunk, newlines_only=lines)
        add("smooth", f"attamba-{name}-l64", main, variant=V.at_whitespace(lines), chunk_mean=mean)
        add("smooth", f"attamba-mean-of-{name}-l64", main, variant=V.at_whitespace(lines, uniform=True), chunk_mean=mean)

    # The open problem: one idea at a time against attamba-p8-l64, with its cache unless the name says otherwise.
    thin = dict(kv="linear+ssm", chunk_size=8)
    mixed = lambda *chunks: equal_layers(main, s1, lambda L: [(chunks[i * len(chunks) // n if len(chunks) < n else i], L) for i in range(n)])
    # One layer keeps every token; its SSMs are still reset, every P tokens, where P is not None.
    whole = lambda L, P=8: [(P, None) if i == n // 2 else (None, L) for i in range(n)]
    quarter = lambda L: [(2, L) if i % 4 == 3 else (None, L) for i in range(n)]            # a quarter of them keeps every second token

    def layered(name, sizes, **changes):
        add("open", name, equal_layers(main, s1, sizes, **changes))
        add("open4096", name, equal_layers(main, s4, sizes, **changes), seq_len=s4)

    keep = dict(kv="linear+ssm", chunk_size=None)
    layout = lambda S: equal_layers(main, S, lambda L: whole(L, None), kv="linear")
    for group, S, text in (("open", s1, "python"), ("open4096", s4, "python"), ("english", s1, "english")):
        at = dict(seq_len=S, corpus=text)
        add(group, "one-full-layer-rest-window", layout(S), **at)
        add(group, "transformer-parameters=ssm-keep", equal_parameters(keep), **at)         # what the SSMs' parameters would do elsewhere
        add(group, "one-full-layer-rest-window-parameters=ssm-keep",
            lambda S=S: dict(layout(S)(), hidden_dim=equal_parameters(keep)()["hidden_dim"]), **at)
    beside = equal_layers(main, s1, whole, kv="linear+ssm")                                 # the layout with SSMs beside W_K and W_V
    add("english", "one-full-layer-rest-window-ssm-keep", beside, corpus="english")
    normed = lambda model: lambda: dict(model() if callable(model) else model, qk_norm=True)
    few = dict(n_kv_heads=max(1, shape["n_heads"] // 4))                                    # as many entries, a quarter of the bytes
    add("open", "one-full-layer-rest-window-gqa", lambda: dict(layout(s1)(), **few))
    add("open", "one-full-layer-rest-window-ssm-keep-gqa", lambda: dict(beside(), **few))
    add("open", "full-attention-ssm-keep", dict(keep, leading_tokens=None))                 # and the SSMs without a smaller cache
    for kv, note in (("linear+ssm", "-keep"), ("ssm", "")):
        layered("one-full-layer-rest-window-ssm" + note, whole, kv=kv)
        layered("one-full-layer-rest-window-ssm-no-reset" + note, lambda L: whole(L, None), kv=kv)
        layered("two-layers-p2-rest-window-ssm" + note, quarter, kv=kv)
        layered("every-other-layer-p4-window-ssm" + note, lambda L: [(4 if i % 2 else None, L) for i in range(n)], kv=kv)
        layered("window-ssm" + note, lambda L: [(None, L)] * n, kv=kv)
    for name, model, more in (
            ("no-reset", main, dict(patch=V.no_reset)),
            ("phase-per-head", attamba(8, l64, chunking="uniform"), dict(patch=V.phase_per_head)),
            ("qk-norm", normed(main), {}),
            ("qk-norm-transformer", normed(transformer), {}),
            ("qk-norm-window", normed(equal_window(main, s1)), {}),
            ("qk-norm-no-reset", normed(main), dict(patch=V.no_reset)),
            ("qk-norm-one-full-layer-rest-window", normed(layout(s1)), {}),
            ("qk-norm-two-layers-p2-rest-window-ssm-keep", normed(equal_layers(main, s1, quarter, kv="linear+ssm")), {}),
            ("qk-norm-one-full-layer-rest-window-ssm-keep", normed(beside), {}),
            ("ssm-norm", main, dict(variant=V.changed(V.ssm_norm))),
            ("memory-8", main, dict(variant=V.changed(V.memory(0.03, 0.5)))),
            ("memory-100", main, dict(variant=V.changed(V.memory(0.001, 0.05)))),
            ("sink", main, dict(patch=V.sink)),
            ("inner-dim", equal_leading(main, s1, chunk_size=8, ssm_inner=shape["dim"]), {}),
            ("inner-quarter", equal_leading(main, s1, chunk_size=8, ssm_inner=shape["dim"] // 4), {}),
            ("state16", equal_leading(main, s1, chunk_size=8, ssm_state=16), {}),
            ("state64", equal_leading(main, s1, chunk_size=8, ssm_state=64), {}),
            ("keep-wk-wv", equal_leading(main, s1, **thin), {}),
            ("keep-small-wk-wv", equal_leading(main, s1, **thin, n_kv_heads=shape["n_heads"] // 2), {}),
            ("fewer-kv-heads", equal_leading(main, s1, chunk_size=8, n_kv_heads=shape["n_heads"] // 2), {}),
            ("p16-wider-window", equal_leading(main, s1, chunk_size=16), {}),
            ("p32-wider-window", equal_leading(main, s1, chunk_size=32), {}),
            ("every-other-layer-window-only", mixed(*[8, None] * (n // 2)), {}),
            ("lower-half-window-only", mixed(None, 4), {}),
            ("p4-below-p16-above", mixed(4, 16), {}),
            ("p16-below-p4-above", mixed(16, 4), {})):
        add("open", name, model, **more)
    return table


# ---------------------------------------------------------------------------------------
# Running one row

def transferred(model, config, options, text, device):
    """The same weights at other P, L and chunkings."""
    settings = [(P, config.leading_tokens, config.chunking) for P in (1, 2, 4, 8, 16, 32, 64, 128)]
    settings += [(config.chunk_size, L, config.chunking) for L in (0, 8, 16, 32, 128, 256, None)]
    settings += [(config.chunk_size, config.leading_tokens, rule) for rule in ("uniform", "random")]
    out = []
    for P, L, rule in settings:
        other = Attamba(dataclasses.replace(config, chunk_size=P, leading_tokens=L, chunking=rule)).to(device)
        other.load_state_dict(model.state_dict())
        loss, _ = train_tiny.evaluate(other, text.valid, text.tokenizer, options, device)
        out.append(dict(P=P, L=L, chunking=rule, perplexity=float(np.exp(loss))))
    return out


def run(row, seed, text, options, keep, lr, commit):
    """Train and score one row; returns its line. Goes on from a checkpoint of exactly the same run."""
    torch._dynamo.reset()
    config = AttambaConfig(**row.model)
    make = row.variant(text, config) if row.variant else Attamba
    out = Path(options.out)
    now = dict(config=dataclasses.asdict(config), train=dataclasses.asdict(options), corpus=text.fingerprint)
    try:
        resume = train_tiny.load(options.out)
        resume = resume if all(resume[k] == v for k, v in now.items()) else None
    except UserError:
        resume = None
    max_chunks = None
    if row.chunk_mean:                                             # on average; config.leading_tokens + 1 need no entry
        max_chunks = int(np.ceil((row.seq_len - config.leading_tokens - 1) / row.chunk_mean(text)))
    entries, nbytes = kv_cost(config, row.seq_len, row.variant if not row.chunk_mean else None, row.patch, max_chunks)
    device = torch.device(options.device)
    line = dict(name=row.name, config={**dataclasses.asdict(config), "lr": options.lr, "batch_size": options.batch_size},
                corpus=text.fingerprint, tokens=options.steps * options.batch_size * options.seq_len, seq_len=options.seq_len, seed=seed,
                params=None, loss=None, perplexity=None, bits_per_byte=None, kv_entries=entries, kv_bytes=nbytes, tokens_per_second=None,
                device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu", commit=commit, group=row.group)
    with V.patched(row.patch, config), mock.patch.object(train_tiny, "Attamba", make):
        try:
            with contextlib.nullcontext() if sys.stdout.isatty() else contextlib.redirect_stdout(None):
                model, result = train_tiny.train(config, options, text, resume)
        except UserError as error:
            if "no longer finite" not in str(error):
                raise
            print(f"{row.name}: {error}", flush=True)                                      # diverged: a result, too
            return line
        extra = {}
        if row.transfer and seed == 0:
            extra["transfer"] = transferred(model, config, options, text, device)
        if text.wikitext is not None:
            loss, bits = train_tiny.evaluate(model, text.wikitext, text.tokenizer, options, device)
            extra.update(wikitext_perplexity=float(np.exp(loss)), wikitext_bits_per_byte=bits)
    speeds = [json.loads(l).get("tokens_per_second", 0) for l in open(out / "log.jsonl")]
    result["tokens_per_second"] = next((s for s in reversed(speeds) if s), 0.0)
    if not keep:
        shutil.rmtree(out)
    return {**line, **{k: result[k] for k in ("params", "loss", "perplexity", "bits_per_byte", "tokens_per_second")}, **extra}


@functools.cache
def laptop_text():
    """What train_tiny.py trains on if nothing is said."""
    text = train_tiny.load_corpus(TrainConfig())
    text.wikitext = None
    return text


def key(line):
    return *(line[k] for k in ("name", "corpus", "tokens", "seed", "seq_len")), line["config"]["lr"]


def main():
    if sys.argv[1:2] == ["recall"]:
        import recall
        return recall.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", help="list, lr, claims, claims4096, smooth, english, open, open4096, recall")
    parser.add_argument("--only", default="*", help="comma-separated patterns of names")
    parser.add_argument("--seeds", default="0,1", help="of those that a row has")
    parser.add_argument("--data", default=str(ROOT.parent / "shared/data"), help="folder of the English texts")
    parser.add_argument("--work", type=Path, default=ROOT / ".data", help="corpora and checkpoints")
    parser.add_argument("--results", type=Path, help="default: experiments/results/sweep.jsonl (--quick: in --work)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no row that would end later")
    parser.add_argument("--steps", type=int, help="in place of 2136")
    parser.add_argument("--lr", type=float, help="in place of each row's own")
    parser.add_argument("--commit", help="default: asks git")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--laptop", action="store_true", help="small: the standard library's bytes, S 256, 1.4 M tokens, seeds 0 and 1")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    a = parser.parse_args()
    begin, scale = time.time(), QUICK if a.quick else LAPTOP if a.laptop else FULL
    commit = a.commit or subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    a.results = a.results or (a.work / "quick.jsonl" if a.quick else ROOT / "experiments/results/sweep.jsonl")
    a.results.parent.mkdir(parents=True, exist_ok=True)
    results = [json.loads(l) for l in open(a.results)] if a.results.exists() else []
    table = rows(scale["shape"], scale["shrink"])
    wanted = [r for r in table if any(fnmatch.fnmatchcase(r.name, pattern) for pattern in a.only.split(","))]
    if a.groups != ["list"]:
        unknown = set(a.groups) - {r.group for r in table}
        if unknown:
            raise UserError(f"unknown group {', '.join(unknown)}")
        wanted = [r for g in a.groups for r in wanted if r.group == g]
    if a.laptop:
        wanted = [dataclasses.replace(r, seeds=(0, 1), lr=TrainConfig.lr) for r in wanted
                  if r.seq_len == 1024 // scale["shrink"] and r.corpus == "python" and r.group != "lr"]
    for row in wanted:
        row.model = {**scale["shape"], **(row.model() if callable(row.model) else row.model)}
    if a.groups == ["list"]:
        return show(wanted, results)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch._dynamo.config.recompile_limit = 64                      # RandomP has a graph for each P
    failed, pace = 0, 0.0                                          # seconds per token of the last row
    for row, seed in [(r, s) for s in map(int, a.seeds.split(",")) for r in wanted if s in r.seeds]:
        text = laptop_text() if a.laptop else corpus(row.corpus, a.work, a.data)
        rows_a_step = max(1, scale["tokens_per_step"] // row.seq_len)
        steps = max(1, round((a.steps or scale["steps"]) * row.part))
        options = TrainConfig(device=device, steps=steps, batch_size=rows_a_step, seq_len=row.seq_len, warmup=min(100, steps // 10), seed=seed,
                              lr=a.lr or row.lr, save_every=400, eval_tokens=scale["eval_tokens"])
        tokens = steps * rows_a_step * row.seq_len
        ident = (row.name, text.fingerprint, tokens, seed, row.seq_len, options.lr)
        if ident in map(key, results):
            continue
        options.out = str(a.work / "runs" / re.sub(r"[^\w=.-]", "_", "-".join(map(str, ident))))
        if time.time() - begin + pace * tokens > a.minutes * 60:
            print(f"{row.name} would end after {a.minutes:g} minutes: not started")
            break
        start = time.time()
        try:
            line = run(row, seed, text, options, a.keep, options.lr, commit)
        except KeyboardInterrupt:
            print("\nstopped and saved; the same command goes on from here")
            raise SystemExit(130)
        except Exception:                                          # one bad row must not cost the others
            traceback.print_exc()
            failed += 1
            continue
        pace = (time.time() - start) / tokens
        results.append(line)
        with open(a.results, "a") as f:
            f.write(json.dumps(line) + "\n")
        if line["loss"]:
            print(f"{row.name}, S {row.seq_len}, seed {seed}: perplexity {line['perplexity']:.3f}, {line['bits_per_byte']:.4f} bits per byte, "
                  f"{line['kv_entries']:g} entries, {line['kv_bytes']:,} bytes, {line['tokens_per_second']:,.0f} tokens/s, {time.time() - start:.0f} s", flush=True)
    raise SystemExit(1 if failed else 0)


def show(wanted, results):
    print(f"{'group':<11}{'name':<48}{'S':>6}{'parameters':>12}{'entries':>9}{'KV bytes':>12}   seeds done, perplexity")
    for row in wanted:
        config = AttambaConfig(**row.model)
        entries, nbytes = (float("nan"), 0) if row.chunk_mean else kv_cost(config, row.seq_len, row.variant, row.patch)
        done = [f"{r['seed']}: {r['perplexity'] or float('nan'):.3f}" + f" at {r['config']['lr']:g}" * (r["config"]["lr"] != row.lr)
                for r in results if (r["name"], r["seq_len"], r["group"]) == (row.name, row.seq_len, row.group)]
        print(f"{row.group:<11}{row.name:<48}{row.seq_len:>6}{parameters(config):>12,}{entries:>9.1f}{nbytes:>12,}   "
              f"{', '.join(done) or '-'}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"sweep.py: {e}", file=sys.stderr)
        raise SystemExit(2)
