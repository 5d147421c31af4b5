"""What can a chunk state hold? Two synthetic tasks, accuracy by distance and by chunk size P.

    python experiments/recall.py               # a few minutes a model on 2 CPU cores, seconds on a GPU
    python experiments/recall.py --tasks copy --sizes 8,16 --leading_tokens 8

recall  n pairs (key, value), then every key once more in random order: say its value (multi-query
        associative recall). Keys and values are other tokens in every sequence.
copy    n random tokens, all different, a separator, then the same tokens again.

Only the answers count for the loss. The distance of an answer is how many tokens back the token that
holds it lies; n varies, so distances do. Sizes: 1 is full attention, "none" has SSMs that are never
reset and no chunk ends, "window" sees only the window, without SSMs, and "transformer" is plain attention.
One line a (task, model) in experiments/results/recall.jsonl.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from attamba import Attamba, AttambaConfig  # noqa: E402
from train_tiny import learning_rate, make_optimizer  # noqa: E402

SYMBOLS = 32                        # keys, and as many values; one more token separates
PAIRS, LENGTH = 32, 64              # largest n of the two tasks: at most 128 tokens
BUCKETS = (8, 16, 32, 64, 128)      # distances up to ...


def recall(n, rows, generator):
    """Pairs k v k v ..., then k v k v ... in another order -> tokens, where the answers are, their distances."""
    keys = torch.rand(rows, SYMBOLS, generator=generator).argsort(1)[:, :n]                # (rows, n), all different
    values = SYMBOLS + torch.randint(SYMBOLS, (rows, n), generator=generator)
    order = torch.rand(rows, n, generator=generator).argsort(1)
    pairs = torch.stack([keys, values], 2)                                                # (rows, n, 2)
    tokens = torch.cat([pairs, pairs.gather(1, order[..., None].expand(-1, -1, 2))], 1).flatten(1)
    distance = torch.zeros_like(tokens)
    distance[:, 2 * n + 1::2] = 2 * (n + torch.arange(n) - order) - 1                     # from the asked key to the value
    return tokens, distance


def copy(n, rows, generator):
    """n tokens, a separator, the same n tokens -> tokens and distances, 0 where nothing is asked."""
    text = torch.rand(rows, 2 * SYMBOLS, generator=generator).argsort(1)[:, :n]           # all different: what follows is clear
    tokens = torch.cat([text, torch.full((rows, 1), 2 * SYMBOLS), text], 1)
    distance = torch.zeros_like(tokens)
    distance[:, n + 1:] = n                                # the asking token is the answer's predecessor
    return tokens, distance


# How it is made, largest n, largest n at first: pairs are learned sooner from short sequences, while short
# copies teach to count back n tokens, which is of no use at other lengths.
TASKS = {"recall": (recall, PAIRS, 4), "copy": (copy, LENGTH, LENGTH)}


def draw(task, n, generator, rows, device):
    """One batch: inputs, targets (-100 where nothing is asked), distances; all of one length."""
    tokens, distance = TASKS[task][0](n, rows, generator)
    targets = tokens.masked_fill(distance == 0, -100)
    return tokens[:, :-1].to(device), targets[:, 1:].to(device), distance[:, 1:]


def train(task, config, options, device):
    torch.manual_seed(options.seed)
    model = Attamba(config).to(device)
    optimizer, generator = make_optimizer(model, options), torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        _, most, first = TASKS[task]
        most = min(most, first + most * 4 * step // (3 * options.steps))
        n = int(torch.randint(max(2, most // 8), most + 1, (), generator=generator))
        x, y, _ = draw(task, n, generator, options.batch_size, device)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if options.verbose and (step + 1) % 100 == 0:
            print(f"  step {step + 1}  n {n}  loss {loss.item():.3f}", flush=True)
    return model


@torch.no_grad()
def accuracy(task, model, device):
    """Share of right answers by distance, over fresh sequences with n from small to large."""
    generator, most = torch.Generator().manual_seed(12345), TASKS[task][1]
    right, asked = [0] * len(BUCKETS), [0] * len(BUCKETS)
    for n in range(4, most + 1, most // 16):
        x, y, distance = draw(task, n, generator, 64, device)
        hit = (model(x).argmax(-1) == y).cpu()
        for i, (low, high) in enumerate(zip((0, *BUCKETS), BUCKETS)):
            here = (distance > low) & (distance <= high)
            right[i] += int(hit[here].sum())
            asked[i] += int(here.sum())
    return [round(r / a, 4) if a else None for r, a in zip(right, asked)], sum(right) / sum(asked)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="recall,copy")
    parser.add_argument("--sizes", default="transformer,1,4,8,16,none,window", help='chunk sizes, "none", "window" or "transformer"')
    parser.add_argument("--leading_tokens", default="8", help="comma-separated")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "experiments/results/recall.jsonl")
    options = parser.parse_args(arguments)
    options.warmup, options.weight_decay = max(1, options.steps // 20), 0.0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.results.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in open(options.results)] if options.results.exists() else []
    shape = dict(vocab_size=2 * SYMBOLS + 1, dim=options.dim, n_layers=2, n_heads=2, ssm_inner=options.dim)
    print(f"{'':<28}" + "".join(f"{'<= ' + str(b):>8}" for b in BUCKETS) + f"{'all':>8}   accuracy by distance")
    for task in options.tasks.split(","):
        for L in map(int, options.leading_tokens.split(",")):
            for size in options.sizes.split(","):
                if size == "transformer":
                    config = AttambaConfig(**shape, kv="linear", chunk_size=None, leading_tokens=None)
                else:
                    config = AttambaConfig(**shape, chunk_size=None if size in ("window", "none") else int(size), leading_tokens=L)
                    if size == "window":
                        config.kv = "linear"
                    elif size == "1":
                        config.leading_tokens = None               # all are seen anyway
                row = dict(task=task, model=size, P=config.chunk_size, L=config.leading_tokens, kv=config.kv,
                           steps=options.steps, seed=options.seed, dim=options.dim)
                if any(row.items() <= r.items() for r in done):
                    continue
                begin = time.time()
                model = train(task, config, options, device)
                row["buckets"], (row["accuracy"], row["mean"]) = BUCKETS, accuracy(task, model, device)
                row.update(seconds=round(time.time() - begin, 1), device=str(device))
                print(f"{f'{task}, {size}, L {config.leading_tokens}':<28}" + "".join(f"{'' if a is None else f'{a:.3f}':>8}"
                      for a in (*row["accuracy"], row["mean"])) + f"   {row['seconds']:.0f} s", flush=True)
                done.append(row)
                with open(options.results, "a") as f:
                    f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
