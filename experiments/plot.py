"""Every figure of the README, from the committed results: python experiments/plot.py

Reads experiments/results/*.jsonl, writes assets/*.svg; a figure whose results are missing is left out.
"""
import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from matplotlib.patches import PathPatch  # noqa: E402
from matplotlib.path import Path as Path2D  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from attamba import AttambaConfig, attention_mask, chunk_ends  # noqa: E402

RESULTS, ASSETS = ROOT / "experiments/results", ROOT / "assets"
INK, GRID = "#24292f", "#d8dee4"
COLOURS = dict(transformer="#57606a", window="#0969da", narrowed="#8250df", strided="#bf8700", layout="#1a7f37", attamba="#cf222e",
               chunked="#6e0b1e", other="#e0727a")
plt.rcParams.update({  # an opaque light card: it reads the same on a light and on a dark page
    "figure.facecolor": "#fbfcfd", "axes.facecolor": "#fbfcfd", "savefig.facecolor": "#fbfcfd", "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": GRID, "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 10, "legend.frameon": False,
    "svg.hashsalt": "attamba", "svg.fonttype": "path", "figure.constrained_layout.use": True})


def read(name):
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in open(path)] if path.exists() else []


def save(figure, name):
    ASSETS.mkdir(exist_ok=True)
    figure.savefig(ASSETS / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    print(f"assets/{name}.svg")


def family(row):
    """Which series a trained model belongs to."""
    name = row["name"].partition("-parameters=")[0]                 # a baseline with as many parameters as another row
    if name.startswith("two-layers"):
        return "chunked"
    if "ssm" in name:
        return "other"
    if name.startswith("one-full-layer"):
        return "layout"
    for start, series in (("transformer", "transformer"), ("window", "window"), ("gqa", "narrowed"), ("thin", "narrowed"), ("strided", "strided")):
        if name.startswith(start):
            return series
    if name.startswith("attamba-p") and name.count("-") == 2:       # P and L only; variants are "other"
        return "attamba"
    return "other"


LABELS = dict(transformer="transformer", window="transformer, sliding window", narrowed="transformer, narrowed keys and values",
              strided="strided attention, no SSM", layout="transformer, one full layer", attamba="Attamba (P, L), 8 % more parameters",
              chunked="two chunked layers of eight", other="SSMs in other settings")


# What is written beside a point, and on which side there is room for it; beside Attamba's others, P and L on the right.
NAMES = {"transformer-parameters=p8": ("0 and 7 % more parameters", "left"), "transformer-parameters=ssm-keep": ("19 % more parameters", "left"),
         "gqa=p8-l64": ("2 of 8 key heads", "left"), "thin-heads=p8-l64": ("8 heads of 14 channels", "left"),
         "one-full-layer-rest-window-gqa": ("one full layer, 2 of 8 key heads", "right"),
         "one-full-layer-rest-window-parameters=ssm-keep": ("19 % more parameters", "left"),
         "one-full-layer-rest-window-ssm-keep": ("one full layer + SSMs (19 % more)", "low"),
         "two-layers-p2-rest-window-ssm": ("two chunked layers (8, 19 % more parameters)", "left"),
         "window-ssm-keep": ("windows, SSMs never reset (19 % more)", "left"), "pseudo-chunk-p8": ("8, all (pseudo-chunking)", "left"),
         "attamba-p8-l64-uniform": ("8, 64, uniform", "right"), "attamba-p8-l64-random": ("8, 64, random", "right"),
         "attamba-p8-l64-keep-wk-wv": ("8, 64, W_K and W_V kept", "left"), "attamba-p8-l64-state128": ("8, 64, state 128", "right"),
         "attamba-p8-l8-uniform": ("8, 8, uniform", "right"), "attamba-p8-l8-released-mixing": ("8, 8, the released code's mixing", "below"),
         "attamba-p8-l128": ("8, 128", "left"), "attamba-p16-l64": ("16, 64", "left"), "attamba-p16-l8": ("16, 8", "left"), "attamba-p4-l8": ("4, 8", "below")}
SIDES = dict(left=dict(xytext=(-6, -3), ha="right"), right=dict(xytext=(5, 3)), low=dict(xytext=(6, -5)), below=dict(xytext=(0, -12), ha="center"))


def kv_perplexity():
    """Perplexity against what the cache takes; a series per family, the mean over seeds. Python source, 1,024 tokens of
    context, all rows at learning rate 2e-3."""
    found = defaultdict(list)
    for row in read("sweep"):
        if row["seq_len"] == 1024 and row["group"] in ("claims", "open") and row["perplexity"] and row["config"]["lr"] == 2e-3:
            found[family(row), row["name"], row["kv_bytes"], row["tokens"]].append(row["perplexity"])
    tokens = max((key[3] for key in found), default=0)                                              # equal tokens only
    groups = {key: sum(v) / len(v) for key, v in found.items() if key[3] == tokens}
    if not groups:
        return
    figure, axes = plt.subplots(figsize=(7.4, 4.4))
    best = min(groups.values())
    for series in COLOURS:
        points = sorted((nbytes / 1e6, value, name) for (s, name, nbytes, _), value in groups.items() if s == series)
        points = [p for p in points if p[1] < 1.6 * best]            # a row that failed would flatten the others; the tables have it
        if not points:
            continue
        x, y, names = zip(*points)
        axes.plot(x, y, linestyle="-" if series == "window" else "none", marker="o", markersize=4 if series == "other" else 6,
                  color=COLOURS[series], label=LABELS[series])
        for i, label in enumerate(names):
            if label in NAMES or series == "attamba":
                text, side = NAMES.get(label) or (", ".join(part[1:] for part in label.split("-")[1:]), "right")
                axes.annotate(text, (x[i], y[i]), **SIDES[side], textcoords="offset points", fontsize=8, color=COLOURS[series])
    axes.set(xscale="log", xlabel="KV cache of one sequence, MB (allocated, SSM states included)", ylabel="held-out perplexity",
             title="Python source, 1024 tokens of context")
    ticks = [t for t in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    save(figure, "kv_perplexity")


def smooth_transition():
    """Two sets of weights at other P and L than in training, beside models trained there (the mean over seeds). Python
    source, 1,024 tokens of context; what lies above the axis is in the README's table."""
    rows = [r for r in read("sweep") if r["seq_len"] == 1024 and r["group"] in ("claims", "smooth") and r["config"]["lr"] == 2e-3]
    moved = {r["name"]: r["transfer"] for r in rows if "transfer" in r}
    if not moved:
        return
    place = lambda value: 1024 if value is None else value
    full = [r["perplexity"] for r in rows if r["name"] == "transformer"]
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.3), sharey=True)
    for axis, knob, fixed, ticks in ((axes[0], "P", dict(L=64), (1, 2, 4, 8, 16, 32, 64, 128)),
                                     (axes[1], "L", dict(P=8), (8, 16, 32, 64, 128, 256, 1024))):
        for name, colour, label in (("attamba-p8-l64", COLOURS["attamba"], "trained at P 8, L 64"),
                                    ("attamba-random-p-l64", COLOURS["narrowed"], "trained with P drawn from 2, 4, ..., 64")):
            points = sorted((place(t[knob]), t["perplexity"]) for t in moved.get(name, ()) if fixed.items() <= t.items() and t["chunking"] == "cyclic")
            axis.plot(*zip(*points), "o-", markersize=4, color=colour, label=label)
        there = defaultdict(list)
        for r in rows:
            at = dict(P=r["config"]["chunk_size"], L=r["config"]["leading_tokens"])
            if (family(r) == "attamba" or r["name"].startswith("pseudo-chunk")) and fixed.items() <= at.items():
                there[place(at[knob])].append(r["perplexity"])
        axis.plot(list(there), [sum(v) / len(v) for v in there.values()], "x", markersize=7, color=INK, label="trained at this P and L")
        axis.axhline(sum(full) / len(full), color=COLOURS["transformer"], linewidth=1, linestyle="--", label="transformer")
        axis.set(xscale="log", ylim=(4.8, 7.3), xlim=(0.8 * ticks[0], 1.25 * ticks[-1]), xlabel=f"{knob} at evaluation")
        axis.set_xticks(ticks, ["all" if t == 1024 else str(t) for t in ticks])
        axis.minorticks_off()
    axes[0].set(ylabel="held-out perplexity", title="L 64"), axes[1].set(title="P 8")
    axes[1].legend(fontsize=8)
    save(figure, "smooth_transition")


def speed_context():
    """Training speed of the models, and how much faster attention alone is, against the context."""
    latest = {}                                                     # the last measurement counts
    for r in read("bench"):
        if "attamba" in r:                                          # rows of before there were two
            r["paper"], r["paper ratio"] = r["attamba"], r["ratio"]
        section, _, length = r["name"].rpartition(", S ")
        if section in ("training", "attention alone, forward and backward") and length.isdecimal():
            latest.setdefault((r["hardware"], section), {})[int(length)] = r
    hardware = sorted({h for (h, section), rows in latest.items() if section == "training" and len(rows) > 1},
                      key=lambda h: (h.startswith("CPU"), h))
    if not hardware:
        return
    figure, axes = plt.subplots(1, 1 + len(hardware), figsize=(3.7 * (1 + len(hardware)), 3.5))

    def curve(axis, h, section, key, *style, **more):
        points = [(S, r[key]) for S, r in sorted(latest.get((h, section), {}).items()) if key in r]
        if points:
            axis.plot(*zip(*points), *style, **more)
    models = (("transformer", "transformer", COLOURS["transformer"]), ("paper", "Attamba P 8, L 64", COLOURS["attamba"]),
              ("recommended", "Attamba, P 2 in each fourth layer", COLOURS["chunked"]))
    for axis, h in zip(axes, hardware):
        for model, label, colour in models:
            curve(axis, h, "training", model, "o-", color=colour, label=label)
        axis.set(xscale="log", yscale="log", xlabel="context", title=f"training, thousand tokens/s\n{h}")
        low, high = (v / 1000 for v in axis.get_ylim())
        ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if low <= t <= high]
        axis.set_yticks([1000 * t for t in ticks], [str(t) for t in ticks])
        contexts(axis, sorted(latest[h, "training"]))
        axis.legend(fontsize=8.5)
    for h, style in zip(hardware, ("o-", "s--", "^:")):
        for model, note, colour in (("paper", "", COLOURS["attamba"]), ("recommended", ", P 2 in each fourth layer", COLOURS["chunked"])):
            curve(axes[-1], h, "attention alone, forward and backward", f"{model} ratio", style, color=colour, label=h + note)
    axes[-1].axhline(1, color=COLOURS["transformer"], linewidth=1)
    axes[-1].set(xscale="log", xlabel="context", title="attention alone, forward and backward\ntimes faster than full attention")
    contexts(axes[-1], sorted({s for line in axes[-1].get_lines()[:-1] for s in line.get_xdata()}))
    axes[-1].legend(fontsize=8.5)
    save(figure, "speed_context")


def contexts(axis, lengths):
    axis.set_xticks(lengths, [f"{s // 1024}k" if s >= 1024 else str(s) for s in lengths], fontsize=8)
    axis.minorticks_off()


def recall():
    """Accuracy by distance for each chunk size, one panel a task."""
    rows = read("recall")
    tasks = [t for t in ("recall", "copy") if any(r["task"] == t for r in rows)]
    if not tasks:
        return
    figure, axes = plt.subplots(1, len(tasks), figsize=(1.3 + 3.4 * len(tasks), 3.3), sharey=True, squeeze=False)
    order = ["transformer", "1", "4", "8", "16", "none", "window"]
    shades = dict(zip(order, (COLOURS["transformer"], "#f5a3a8", "#e8606a", "#cf222e", "#82071e", COLOURS["strided"], COLOURS["window"])))
    for axis, task in zip(axes[0], tasks):
        L = min(r["L"] for r in rows if r["L"] is not None)
        for row in sorted((r for r in rows if r["task"] == task and r["L"] in (L, None)), key=lambda r: order.index(r["model"])):
            points = [(b, a) for b, a in zip(row["buckets"], row["accuracy"]) if a is not None]
            label = {"window": f"window of {L} only", "transformer": "transformer", "1": "P 1 (sees all)", "none": f"SSM never reset, L {L}"}.get(row["model"], f"P {row['model']}, L {L}")
            axis.plot(*zip(*points), "o-", markersize=4, color=shades[row["model"]], label=label)
        axis.set(xscale="log", xlabel="distance of the answer, tokens up to", title={"recall": "associative recall", "copy": "copying"}[task], ylim=(-0.03, 1.03))
        contexts(axis, rows[0]["buckets"])
    axes[0, 0].set_ylabel("share of right answers")
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, "recall")


def mask():
    """What each query sees of each key in two layers, from attamba.py's own functions."""
    config = AttambaConfig(vocab_size=1, dim=16, n_layers=2, n_heads=2, chunk_size=4, leading_tokens=2)
    S, L = 16, config.leading_tokens
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 4.1))
    for layer, axis in enumerate(axes):
        ends = chunk_ends(config, torch.arange(S), layer)                                         # (1, S)
        seen = attention_mask(ends, L)[0]
        near = torch.arange(S)[:, None] - torch.arange(S)[None] <= L
        past = torch.ones(S, S).tril().bool()
        for cells, colour in ((seen & near, COLOURS["window"]), (seen & ~near, COLOURS["attamba"]), (past & ~seen, "#e6eaee")):
            squares = [Path2D([(s, t), (s + .9, t), (s + .9, t + .9), (s, t + .9), (s, t)]) for t, s in cells.nonzero().tolist()]
            axis.add_patch(PathPatch(Path2D.make_compound_path(*squares), facecolor=colour, linewidth=0))     # one shape a colour: a small file
        for s in ends[0].nonzero().flatten().tolist():
            axis.plot([s + 1, s + 1], [s + 1, S], color=INK, linewidth=.6, alpha=.5)                 # where a chunk ends
        axis.set(xlim=(0, S), ylim=(S, 0), aspect="equal", xlabel="key", title=f"layer {layer}")
        axis.grid(False)
        ticks = [t + .5 for t in range(0, S, 4)]
        axis.set_xticks(ticks, range(0, S, 4)), axis.set_yticks(ticks, range(0, S, 4))
        for side in axis.spines.values():
            side.set_visible(False)
    axes[0].set_ylabel("query")
    figure.suptitle("blue: the query and its L = 2 predecessors      red: states of finished chunks, P = 4", fontsize=9.5)
    save(figure, "mask")


def main():
    kv_perplexity(), smooth_transition(), speed_context(), recall(), mask()


if __name__ == "__main__":
    main()
