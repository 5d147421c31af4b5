"""Train a small Attamba on text, score it, sample from it, weigh its KV cache.

    python train_tiny.py                                      # Python's own standard library
    python train_tiny.py --data book.txt --out out/book       # a file, a folder, .gz or .xz of text
    python train_tiny.py --kv linear --leading_tokens none    # the transformer of the same shape
    python train_tiny.py --qk_norm false --chunk_size 8 --leading_tokens 64   # as in the paper
    python train_tiny.py --resume --out out/book              # go on where it stopped
    torchrun --nproc_per_node=2 train_tiny.py                 # data-parallel
    python train_tiny.py --help                               # every knob

Everything goes to the folder --out: checkpoint.pt, log.jsonl, and config.json (to read: --resume
needs only the checkpoint). A run that was there before is moved aside, not lost. Ctrl-C or SIGTERM
saves after the step at hand. What the user can mend is one line and exit code 2. All text is held
in memory while it is read: 3 bytes per byte, 6 if emoji are among it; with tiktoken 7 to 21.
"""
import argparse
import ast
import contextlib
import gzip
import hashlib
import inspect
import io
import json
import lzma
import math
import os
import re
import signal
import sys
import sysconfig
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from attamba import Attamba, AttambaConfig

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # from torchrun


class UserError(Exception):
    """Something the user can mend."""


@dataclass
class TrainConfig:
    data: str = ""                   # file or folder of text; default: Python's standard library
    valid_data: str = ""             # held-out text; default: a part of the data
    tokenizer: str = "bytes"         # or a tiktoken name (gpt2, ...: downloaded), or a rank file
    out: str = "out"                 # folder for checkpoint.pt, config.json and log.jsonl
    device: str = "auto"             # "cpu", "cuda", ...; auto: a GPU if there is one
    steps: int = 700                 # optimiser steps, counted from the start
    batch_size: int = 8              # sequences per step, over all processes together
    seq_len: int = 256               # tokens per sequence
    lr: float = 3e-3                 # peak learning rate: linear warm-up, then cosine to a tenth
    warmup: int = 50                 # steps of warm-up
    weight_decay: float = 0.033      # AdamW's, on matrices only
    clip: float = 1.0                # largest gradient norm; 0: no limit
    seed: int = 0                    # of weights, batches and sample
    eval_tokens: int = 100_000       # held-out tokens that are scored at the end
    save_every: int = 200            # steps between checkpoints
    compile: str = "auto"            # "yes", "no"; auto: yes on a GPU
    prompt: str = "def "             # how the sample starts
    sample_tokens: int = 300         # length of the sample
    temperature: float = 0.8         # of the sample; 0 takes the likeliest token

    def __post_init__(self):
        if self.compile not in ("auto", "yes", "no"):
            raise UserError(f'--compile must be "auto", "yes" or "no", but it is {self.compile!r}')
        for name, value in vars(self).items():
            least = name in ("steps", "batch_size", "seq_len", "eval_tokens", "save_every")
            if not isinstance(value, str) and not least <= value < math.inf:
                raise UserError(f"--{name} must be at least {least:d}, but it is {value}")


# What a device gets when nothing is said on the command line.
PRESETS = {
    "cpu": dict(qk_norm=True, dim=128, n_layers=4, n_heads=4, leading_tokens=16),
    "cuda": dict(qk_norm=True, dim=512, n_layers=8, n_heads=8, leading_tokens=64,
                 seq_len=1024, batch_size=64, steps=900, lr=2e-3, warmup=100),
}


def preset_chunks(n_layers):
    """P of each layer, as it measured well (README): the last layer, and every fourth before it,
    keeps chunks of two tokens; the others have a window, and SSMs that are never reset."""
    return tuple(2 if i % 4 == 0 else None for i in reversed(range(n_layers)))


def say(line):
    if RANK == 0:
        print(line, flush=True)


# ---------------------------------------------------------------------------------------
# Text to tokens

def read_text(path):
    try:
        with {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb") as f:
            text = f.read().decode("utf-8")
        if "\0" in text:
            raise ValueError("it has zero bytes")
        return text
    except Exception as e:  # each way of packing text has errors of its own
        raise UserError(f"cannot read {path} as UTF-8 text: {e}")


def read_documents(source):
    """[(key, text)]: the files of a folder, by their path; of a file, what lies between lines of
    <|endoftext|>, by itself."""
    path = Path(source or sysconfig.get_paths()["stdlib"])
    if not path.is_dir():
        parts = re.split(r"^<\|endoftext\|>[ \t\r]*(?:\n|\Z)", read_text(path), flags=re.M)
        return [(part, part) for part in parts]
    documents, left_out, unread = [], 0, 0
    for file in sorted(filter(Path.is_file, path.rglob("*" if source else "*.py"))):
        key = file.relative_to(path).as_posix()
        if re.search(r"(^|/)(\.|site-packages/)", key):
            left_out += 1
            continue
        try:
            documents.append((key, read_text(file)))
        except UserError:
            unread += 1
    say(f"{path}: {len(documents):,} files read; skipped {left_out:,} that are hidden or in "
        f"site-packages and {unread:,} that are not UTF-8 text")
    return documents


class ByteTokenizer:
    """256 tokens; a zero byte separates documents. The names are those of tiktoken.Encoding."""
    n_vocab, eot_token, decode_bytes = 256, 0, staticmethod(bytes)

    def encode_ordinary(self, text):
        return memoryview(text.encode(errors="surrogateescape"))


def get_tokenizer(name):
    """Bytes, an encoding that tiktoken downloads on first use, or one from a local rank file."""
    if name == "bytes":
        return ByteTokenizer()
    import tiktoken.load
    if not Path(name).is_file():
        return tiktoken.get_encoding(name)
    ranks = tiktoken.load.load_tiktoken_bpe(name)
    if any(bytes([i]) not in ranks for i in range(256)):
        raise UserError(f"{name} is no tokenizer: it lacks some of the 256 single bytes")
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # as GPT-2
    return tiktoken.Encoding(name, pat_str=words, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": max(ranks.values()) + 1})


@dataclass
class Corpus:
    train: torch.Tensor              # (n,) uint8 or int32 token ids, documents separated
    valid: torch.Tensor              # the same, held out
    tokenizer: object
    fingerprint: str                 # of the training tokens


def load_corpus(options):
    """Without --valid_data, a 25th of the documents is held out, by a hash of their key: the same
    at every start. Of few documents, where chance could hold out none, it is the end of each."""
    tokenizer, parts = get_tokenizer(options.tokenizer), ([], [])  # for training, held out
    end = np.array([tokenizer.eot_token], np.uint8 if tokenizer.n_vocab <= 256 else np.int32)

    def add(text, cut):
        for part, piece in zip(parts, (text[:cut], text[cut:])):
            if piece:
                part += np.asarray(tokenizer.encode_ordinary(piece), end.dtype), end

    documents = read_documents(options.data)
    for key, text in documents:
        if options.valid_data:
            add(text, len(text))
        elif len(documents) < 300:
            add(text, len(text) - len(text) // 20)
        else:
            held_out = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 25 == 0
            add(text, 0 if held_out else len(text))
    if options.valid_data:
        for _, text in read_documents(options.valid_data):
            add(text, 0)
    train, valid = (torch.from_numpy(np.concatenate([end[:0], *part])) for part in parts)
    if min(len(train), len(valid)) <= options.seq_len:
        raise UserError(f"too short: {len(train)} training and {len(valid)} held-out tokens, a "
                        f"sequence has {options.seq_len + 1}: see --data, --valid_data, --seq_len")
    return Corpus(train, valid, tokenizer, hashlib.sha256(train.numpy()).hexdigest()[:16])


# ---------------------------------------------------------------------------------------
# Checkpoints

def save(path, data):
    """All or nothing: the old file stays until the new one is on the disk."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load(out):
    """The checkpoint in a folder. Loading runs no code that a file may hold, and notices damage."""
    path = Path(out) / "checkpoint.pt"
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError("wrong checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        TrainConfig(**saved["train"]), AttambaConfig(**saved["config"])
        return saved
    except Exception as e:
        raise UserError(f"cannot resume from {path}: {e}")


def restore(model, optimizer, saved):
    """Weights and optimiser state from load(). Returns the step they are of."""
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError:
        new = dict(asdict(model.config).items() - saved["config"].items())
        raise UserError(f"the checkpoint is of another model, one without {new}")
    now = optimizer.state_dict()  # its groups have the options of this run
    optimizer.load_state_dict({**now, "state": saved["optimizer"]})
    return saved["step"]


def prepare_folder(out, step):
    """For a run that goes on from that step or, at 0, starts: another run's files are moved aside
    (last the one that tells there was a run), and the log ends where this one goes on."""
    out.mkdir(parents=True, exist_ok=True)
    if step == 0 and (out / "checkpoint.pt").exists():
        old = Path(tempfile.mkdtemp(prefix="run-", dir=out))
        for name in "log.jsonl", "config.json", "checkpoint.pt":
            if (out / name).exists():
                (out / name).rename(old / name)
        print(f"the run that was in {out} is now in {old}")
    log = out / "log.jsonl"
    log.touch()
    lines = re.findall(r'(\{"step": (\d+),.*\n)', log.read_text())
    save(log, "".join(line for line, at in lines if int(at) <= step).encode())


# ---------------------------------------------------------------------------------------
# Training

def batch(tokens, options, step):
    """Inputs and targets (batch_size / WORLD, seq_len). A function of seed and step alone: the data
    position needs no other memory, and n processes together see the batch that one would."""
    draw = np.random.default_rng((options.seed, step))
    starts = draw.integers(0, len(tokens) - options.seq_len, options.batch_size)[RANK::WORLD, None]
    rows = tokens[torch.from_numpy(starts + np.arange(options.seq_len + 1))].long()
    return rows[:, :-1], rows[:, 1:]


def learning_rate(options, step):
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / (options.steps - options.warmup)
    return options.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def make_optimizer(model, options):
    bare = model.no_weight_decay()
    groups = [dict(params=[], weight_decay=decay) for decay in (options.weight_decay, 0.0)]
    for name, p in model.named_parameters():
        groups[name in bare]["params"].append(p)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)  # lr: learning_rate's


def autocast(device):
    """bfloat16 matrix products on a GPU; float32 on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def total(values):
    """Sum over all processes."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values


@torch.no_grad()
def evaluate(model, tokens, tokenizer, options, device):
    """Held-out loss in nats per token, and in bits per byte of text (separators are none)."""
    rows = tokens.unfold(0, options.seq_len + 1, options.seq_len)  # (n, seq_len + 1)
    rows, nats = rows[:options.eval_tokens // options.seq_len or 1].long(), 0.0
    for part in rows.to(device).split(options.batch_size):
        with autocast(device), torch.compiler.set_stance("force_eager"):  # not worth compiling
            logits = model(part[:, :-1]).flatten(0, 1).float()
        nats += F.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum").item()
    seen = rows[:, 1:]
    nbytes = len(tokenizer.decode_bytes(seen[seen != tokenizer.eot_token].tolist()))
    return nats / seen.numel(), nats / math.log(2) / nbytes


def train(config, options, corpus, resume=None):
    """Train one model and score it. Returns (model, result dict); writes into options.out.
    resume: from load(). Ctrl-C or SIGTERM saves after the step at hand, the same in all processes,
    and raises KeyboardInterrupt."""
    if options.batch_size % WORLD:
        raise UserError(f"--batch_size {options.batch_size} cannot be split over {WORLD} processes")
    device, out = torch.device(options.device), Path(options.out)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(options.seed)
    model = Attamba(config).to(device)
    optimizer = make_optimizer(model, options)
    step = first = restore(model, optimizer, resume) if resume else 0
    if options.compile == "yes" or options.compile == "auto" and device.type == "cuda":
        for block in model.blocks:  # one at a time: all share one compiled graph
            # Without padding: padded rows would be copied again before the SSM kernel.
            block.compile(fullgraph=True, options={"comprehensive_padding": False})
    net = torch.nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model

    facts = dict(config=asdict(config), train=asdict(options), corpus=corpus.fingerprint)
    if RANK == 0:
        prepare_folder(out, first)
        save(out / "config.json", json.dumps(facts, indent=1).encode())

    def log(**entry):
        if RANK == 0:
            with open(out / "log.jsonl", "a") as f:
                f.write(json.dumps(entry) + "\n")

    interrupts = []
    def on_signal(*_):
        if interrupts and WORLD == 1:  # twice: at once (but torchrun repeats a signal)
            raise KeyboardInterrupt
        interrupts.append(True)
    handlers = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    size, begin = options.batch_size * options.seq_len, time.time()
    try:
        for step in range(first + 1, options.steps + 1):
            x, y = (t.to(device, non_blocking=True)
                    for t in batch(corpus.train, options, step - 1))
            with autocast(device):
                logits = net(x)  # (b, l, vocab_size)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, step - 1)
            optimizer.step()

            stop = total(torch.tensor(len(interrupts))) > 0  # in all processes or in none
            keep = stop or step == options.steps or step % options.save_every == 0
            if step == first + 1:
                start = time.time()  # the first step compiles: its time is not counted
            if keep or step % 10 == 0:
                value = total(loss.detach()).item() / WORLD
                if not all(p.isfinite().all() for p in model.parameters()):
                    raise UserError(f"weights are no longer finite at step {step}: try a smaller "
                                    f"--lr; what was saved in {out} before is kept")
                now = time.time()
                rate = (step - first - 1) * size / (now - start or 1)
                log(step=step, loss=value, lr=group["lr"], tokens_per_second=rate,
                    seconds=now - begin)
                minutes = (options.steps - step) * (now - begin) / (step - first) / 60
                say(f"step {step}/{options.steps}  loss {value:.3f}  {rate / 1000:.1f}k tokens/s  "
                    f"{minutes:.1f} min left")
            if keep and RANK == 0:
                data = io.BytesIO()
                torch.save(dict(facts, model=model.state_dict(), step=step,
                                optimizer=optimizer.state_dict()["state"]), data)
                save(out / "checkpoint.pt", data.getbuffer())
            if stop:
                raise KeyboardInterrupt(f"saved at step {step}; go on with: "
                                        f"python train_tiny.py --resume --out {out}")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    loss, bits = evaluate(model, corpus.valid, corpus.tokenizer, options, device)
    result = dict(params=sum(p.numel() for p in model.parameters()), tokens=step * size, loss=loss,
                  bits_per_byte=bits, perplexity=math.exp(loss), seconds=time.time() - begin)
    log(step=step, held_out=result)
    return model, result


# ---------------------------------------------------------------------------------------
# What comes out

def show_sample(model, tokenizer, options):
    ids = [tokenizer.eot_token, *tokenizer.encode_ordinary(options.prompt)]
    begin, text = time.time(), b""
    ids = model.generate(torch.tensor([ids], device=options.device), options.sample_tokens,
                         temperature=options.temperature, seed=options.seed,
                         cuda_graph=True)[0, 1:].tolist()  # on a CPU there is none
    speed = options.sample_tokens / (time.time() - begin)
    for token in ids:
        with contextlib.suppress(KeyError):  # an id that the vocabulary leaves unused
            text += tokenizer.decode_bytes([token])
    print(f"\nsample, {speed:.0f} tokens/s through the cache:\n\n{text.decode(errors='replace')}")


def show_cache(model):
    """KV cache in bytes, as allocated, beside a transformer's of the same shape."""
    plain = Attamba(replace(model.config, kv="linear", leading_tokens=None))
    print("\nKV cache of one sequence, allocated bytes (SSM states included)\n")
    print(f"{'context':>8} {'transformer':>12} {'this model':>12} {'smaller':>8}")
    for length in (256, 1024, 4096, 16384):
        a, b = plain.new_cache(1, length).nbytes, model.new_cache(1, length).nbytes
        print(f"{length:>8} {a:>12,} {b:>12,} {a / b:>7.1f}x")


# ---------------------------------------------------------------------------------------
# The command line: one option per field of the two dataclasses, its help the field's comment

def literal(text):
    """A number, none, true, false, or several with commas (one per layer); other text is text."""
    try:
        return ast.literal_eval(text.title())
    except (ValueError, SyntaxError):
        return text


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, usage=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true",
                        help="go on from --out; options given now replace the saved ones")
    for cls in TrainConfig, AttambaConfig:
        options = re.findall(r"^    (\w+): (.+?)(?: =.*?)? +# (.*)", inspect.getsource(cls), re.M)
        for name, kind, comment in options:
            if name != "vocab_size":
                parser.add_argument(
                    "--" + name, help=comment,
                    type=dict(int=int, float=float, str=str, bool=json.loads).get(kind, literal))
    return parser


def run(given):
    """From the options of the command line to the table that is printed last."""
    resume = load(given.get("out", TrainConfig.out)) if given.pop("resume", False) else None
    gpu = "cuda:" + os.environ.get("LOCAL_RANK", "0")
    device = given.get("device", "auto")
    device = dict(auto=gpu if torch.cuda.is_available() else "cpu", cuda=gpu).get(device, device)
    preset = PRESETS["cuda" if "cuda" in device else "cpu"]
    values = resume["config"] | resume["train"] if resume else preset
    values = values | given | {"device": device}
    values.setdefault("chunk_size", preset_chunks(values["n_layers"]))
    names = [name for name in values if hasattr(TrainConfig, name)]
    options = TrainConfig(**{name: values.pop(name) for name in names})
    try:
        torch.zeros(1, device=device).item()
        corpus = load_corpus(options)
        config = AttambaConfig(**values | {"vocab_size": corpus.tokenizer.n_vocab})
    except (AssertionError, RuntimeError, ValueError) as e:  # no such device, tokenizer, model
        raise UserError(e)

    if WORLD > 1:  # gloo also on GPUs, for what the processes agree on
        dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in device else "gloo")
    say(f"{len(corpus.train):,} training and {len(corpus.valid):,} held-out tokens; "
        f"{device}; P {config.chunk_size}, L {config.leading_tokens}, kv {config.kv}")
    if resume and resume["corpus"] != corpus.fingerprint:
        say("note: this is not the text that the checkpoint was trained on")
    if resume and resume["step"] >= options.steps:
        say(f"note: nothing to train: the checkpoint is of step {resume['step']}, "
            f"and --steps is {options.steps}")
    model, result = train(config, options, corpus, resume)
    if RANK == 0:
        print(f"{result['params']:,} parameters, {result['tokens']:,} tokens in "
              f"{result['seconds']:.0f} s: held-out loss {result['bits_per_byte']:.3f} bits per "
              f"byte (perplexity {result['perplexity']:.2f} per token)")
        show_sample(model, corpus.tokenizer, options)
        show_cache(model)
        print(f"\nsaved to {options.out}: checkpoint.pt, config.json, log.jsonl")
    if WORLD > 1:
        dist.destroy_process_group()


def main():
    sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show
    parser = make_parser()
    try:
        run(vars(parser.parse_args()))
    except KeyboardInterrupt as e:
        parser.exit(130, f"train_tiny.py: {e or 'stopped'}\n")
    except (UserError, ImportError, OSError, MemoryError, RuntimeError) as e:
        if type(e) is RuntimeError:  # a fault of the code; no memory, no compiler have own types
            raise
        parser.error((str(e) or repr(e)).splitlines()[0])


if __name__ == "__main__":
    main()
