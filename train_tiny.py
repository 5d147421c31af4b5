"""Train a small Attamba on text, score it, sample from it, weigh its KV cache.

    python train_tiny.py                                      # the Python standard library's own source
    python train_tiny.py --data book.txt --out out/book       # a file, a folder, or .gz / .xz of text
    python train_tiny.py --kv linear --leading_tokens none    # the transformer of the same size
    python train_tiny.py --resume --out out/book              # go on where it stopped
    torchrun --nproc_per_node=2 train_tiny.py                 # data-parallel
    python train_tiny.py --help                               # every knob

Everything goes to the folder --out: checkpoint.pt, config.json, log.jsonl.
"""
import argparse
import dataclasses
import gzip
import hashlib
import inspect
import json
import lzma
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from attamba import Attamba, AttambaConfig


@dataclass
class TrainConfig:
    data: str = ""                   # text file, folder of text, .gz or .xz; default: the standard library's source
    valid_data: str = ""             # held-out text; default: a part of the data, chosen by hash
    tokenizer: str = "bytes"         # "bytes", a tiktoken name (gpt2, cl100k_base, ...) or a local tiktoken rank file
    out: str = "out"                 # folder for checkpoint.pt, config.json and log.jsonl
    device: str = "auto"             # "cpu", "cuda", ...; auto: a GPU if there is one
    steps: int = 700                 # optimiser steps
    batch_size: int = 8              # sequences per step, over all processes together
    seq_len: int = 256               # tokens per sequence
    lr: float = 3e-3                 # peak learning rate: linear warm-up, then cosine to a tenth
    warmup: int = 50                 # steps of warm-up
    weight_decay: float = 0.033      # AdamW's, on matrices only
    clip: float = 1.0                # largest gradient norm
    seed: int = 0                    # of weights, batches and sample
    eval_tokens: int = 100_000       # held-out tokens that are scored at the end
    save_every: int = 200            # steps between checkpoints
    compile: str = "auto"            # "yes", "no"; auto: yes on a GPU
    prompt: str = "def "             # how the sample starts
    sample_tokens: int = 300         # length of the sample
    temperature: float = 0.8         # of the sample; 0 takes the likeliest token


# What a device gets when nothing is said on the command line.
PRESETS = {
    "cpu": dict(dim=128, n_layers=4, n_heads=4),
    "cuda": dict(dim=512, n_layers=8, n_heads=8, seq_len=1024, batch_size=64, steps=900, lr=2e-3, warmup=100),
}


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


# ---------------------------------------------------------------------------------------
# Text to tokens

def read_text(path: Path) -> str:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as f:
            raw = f.read()
    except (OSError, EOFError, lzma.LZMAError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}")
    if b"\0" in raw:
        raise UserError(f"{path} is not text: it has zero bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start})")


def read_documents(source: str) -> tuple[list[str], list[str]]:
    """Training and held-out documents. Files of a folder are split by a hash of their path, documents
    of one file (between lines of <|endoftext|>) by a hash of their text; of a single document the end is held out."""
    path = Path(source or sysconfig.get_paths()["stdlib"])
    def held_out(key):
        return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 25 == 0
    if not path.exists():
        raise UserError(f"no such file or folder: {path}")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*" if source else "*.py") if p.is_file() and p.suffix != ".pyc"
                       and "site-packages" not in p.parts)
        pairs = []
        for p in files:
            try:
                pairs.append((held_out(p.relative_to(path).as_posix()), read_text(p)))
            except UserError:
                continue  # a folder may hold other things than text
    else:
        text = read_text(path)
        documents = re.split(r"^<\|endoftext\|>\n", text, flags=re.M)
        if len(documents) > 1:
            pairs = [(held_out(d), d) for d in documents]
        else:
            cut = len(text) - len(text) // 20
            pairs = [(False, text[:cut]), (True, text[cut:])]
    train, valid = ([d for h, d in pairs if h == want and d] for want in (False, True))
    if not train:
        raise UserError(f"no text found in {path}")
    return train, valid


class ByteTokenizer:
    """256 tokens; a zero byte separates documents."""
    vocab_size, separator, byte_lengths = 256, 0, np.ones(256, dtype=np.int64)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(t.encode(), dtype=np.uint8) for t in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class TiktokenTokenizer:
    """A tiktoken encoding by name, or from a local rank file (split as GPT-2 does)."""

    def __init__(self, name: str):
        import tiktoken
        import tiktoken.load
        if Path(name).exists():
            try:
                ranks = tiktoken.load.load_tiktoken_bpe(name)
            except Exception as e:
                raise UserError(f"{name} is not a tiktoken rank file ({type(e).__name__}: {e})")
            if any(bytes([i]) not in ranks for i in range(256)):
                raise UserError(f"{name} is not a usable rank file: it must hold all 256 single bytes")
            pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
            self.encoding = tiktoken.Encoding(Path(name).name, pat_str=pattern, mergeable_ranks=ranks,
                                              special_tokens={"<|endoftext|>": max(ranks.values()) + 1})
        elif name in tiktoken.list_encoding_names():
            try:
                self.encoding = tiktoken.get_encoding(name)
            except Exception as e:  # it downloads on first use
                raise UserError(f"tiktoken could not load {name!r} ({type(e).__name__}): it downloads on first use; go online once, "
                                f"set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bytes")
        else:
            raise UserError(f"unknown tokenizer {name!r}: bytes, a rank file, or one of {', '.join(tiktoken.list_encoding_names())}")
        self.vocab_size, self.separator = self.encoding.n_vocab, self.encoding.eot_token
        self.byte_lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token in self.encoding.token_byte_values():
            self.byte_lengths[self.encoding.encode_single_token(token)] = len(token)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.asarray(ids, dtype=np.int32) for ids in self.encoding.encode_ordinary_batch(texts)]

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)


@dataclass
class Corpus:
    train: torch.Tensor              # (n,) uint8 or int32 token ids, documents separated
    valid: torch.Tensor              # the same, held out
    tokenizer: object
    fingerprint: str                 # of the training tokens


def load_corpus(options: TrainConfig) -> Corpus:
    tokenizer = ByteTokenizer() if options.tokenizer == "bytes" else TiktokenTokenizer(options.tokenizer)
    train, valid = read_documents(options.data)
    if options.valid_data:
        a, b = read_documents(options.valid_data)
        valid = a + b
    def join(documents):
        parts = []
        for ids in tokenizer.encode(documents):
            parts += [ids, np.array([tokenizer.separator], dtype=ids.dtype)]
        return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.uint8)
    train, valid = join(train), join(valid)
    for name, tokens in (("training", train), ("held-out", valid)):
        if len(tokens) < options.seq_len + 1:
            raise UserError(f"the {name} text is too short: {len(tokens)} tokens, and one sequence needs {options.seq_len + 1}")
    return Corpus(train, valid, tokenizer, hashlib.sha256(train.numpy().tobytes()).hexdigest()[:16])


# ---------------------------------------------------------------------------------------
# Training

def batch(tokens, options, step, rank=0, world=1):
    """Inputs and targets (batch_size / world, seq_len). A function of seed and step alone: the data
    position needs no other memory, and n processes together see the batch that one would."""
    draw = np.random.default_rng((options.seed, step)).integers(0, len(tokens) - options.seq_len, options.batch_size)
    rows = torch.from_numpy(draw[rank::world, None] + np.arange(options.seq_len + 1))
    rows = tokens[rows].long()
    return rows[:, :-1], rows[:, 1:]


def learning_rate(options, step):
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def make_optimizer(model, options):
    matrices = [p for name, p in model.named_parameters() if p.dim() >= 2 and name.split(".")[-1] in ("weight", "w_in", "w_out")]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]  # norms, convolutions, dt_bias, A_log, D
    groups = [dict(params=matrices, weight_decay=options.weight_decay), dict(params=rest, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def evaluate(model, tokens, byte_lengths, options, device):
    """Held-out loss in nats per token, and in bits per byte of text."""
    n = max(1, min(options.eval_tokens, len(tokens) - 1) // options.seq_len)
    nats = count = nbytes = 0
    for i in range(0, n, options.batch_size):
        rows = torch.arange(i, min(i + options.batch_size, n))[:, None] * options.seq_len + torch.arange(options.seq_len + 1)
        rows = tokens[rows].long()
        with autocast(device):
            logits = model(rows[:, :-1].to(device))
        nats += F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten().to(device), reduction="sum").item()
        count += rows[:, 1:].numel()
        nbytes += int(byte_lengths[rows[:, 1:].numpy()].sum())
    return nats / count, nats / math.log(2) / nbytes


def autocast(device):
    """bfloat16 matrix products on a GPU; float32 on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def save(path: Path, checkpoint: dict) -> None:
    """All or nothing: a crash leaves the old checkpoint whole."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


class Progress:
    """One line that is rewritten on a terminal; some 20 plain lines elsewhere."""

    def __init__(self, steps, quiet):
        self.steps, self.quiet, self.tty = steps, quiet, sys.stdout.isatty()

    def __call__(self, step, loss, rate, left):
        every = 1 if self.tty else max(1, self.steps // 20)
        if self.quiet or (step % every and step != self.steps):
            return
        line = f"step {step}/{self.steps}  loss {loss:.3f}"
        if rate:  # not known after the first step
            line += f"  {rate / 1000:.1f}k tokens/s  {int(left) // 60}:{int(left) % 60:02d} left"
        if self.tty:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="\n" if step == self.steps else "", flush=True)
        else:
            print(line, flush=True)


def train(config: AttambaConfig, options: TrainConfig, corpus: Corpus, resume: bool = False, quiet: bool = False):
    """Train one model and score it. Returns (model, result dict); writes into options.out.
    Ctrl-C saves after the step at hand and raises KeyboardInterrupt."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", local if world > 1 else device.index or 0)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if options.batch_size % world:
        raise UserError(f"--batch_size {options.batch_size} cannot be split over {world} processes")
    out, quiet = Path(options.out), quiet or rank > 0
    torch.manual_seed(options.seed)
    model = Attamba(config).to(device)
    optimizer = make_optimizer(model, options)
    first = 0
    if resume:
        saved = torch.load(out / "checkpoint.pt", map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    if options.compile == "yes" or (options.compile == "auto" and device.type == "cuda"):
        for block in model.blocks:  # one block at a time: all share one compiled graph
            block.compile(fullgraph=True)
    run = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model

    stop = []
    def on_interrupt(*_):
        if stop:
            raise KeyboardInterrupt
        stop.append(True)
    def checkpoint(step):
        if rank == 0:
            save(out / "checkpoint.pt", dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                                             config=dataclasses.asdict(config)))
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(dict(
            model=dataclasses.asdict(config), train=dataclasses.asdict(options), corpus=corpus.fingerprint), indent=1) + "\n")
        log = open(out / "log.jsonl", "a" if resume else "w", buffering=1)
    previous = signal.signal(signal.SIGINT, on_interrupt)
    progress, begin, timed = Progress(options.steps, quiet), time.time(), None
    try:
        for step in range(first, options.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, step)
            x, y = (t.to(device, non_blocking=True) for t in batch(corpus.train, options, step, rank, world))
            with autocast(device):
                logits = run(x)                                               # (b, l, vocab_size)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()

            last = step + 1 == options.steps
            if last or stop or (step + 1) % 10 == 0 or step == first:
                loss = loss.detach()
                if world > 1:
                    torch.distributed.all_reduce(loss)                        # of the whole batch, as one process has it
                value = loss.item() / world
                if not math.isfinite(value):
                    raise UserError(f"the loss is {value} at step {step + 1}; the last good checkpoint is in {out}")
                now = time.time()
                timed = timed or (now, step)                                  # leave out the first step: it compiles
                rate = (step - timed[1]) * options.batch_size * options.seq_len / max(now - timed[0], 1e-9)
                progress(step + 1, value, rate, (options.steps - step - 1) * options.batch_size * options.seq_len / max(rate, 1))
                if rank == 0:
                    log.write(json.dumps(dict(step=step + 1, loss=value, lr=learning_rate(options, step),
                                              tokens=(step + 1) * options.batch_size * options.seq_len,
                                              tokens_per_second=rate, seconds=now - begin)) + "\n")
            if last or stop or (step + 1) % options.save_every == 0:
                checkpoint(step + 1)
            if stop:
                raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, previous)
    loss, bits = evaluate(model, corpus.valid, corpus.tokenizer.byte_lengths, options, device)
    result = dict(params=sum(p.numel() for p in model.parameters()), tokens=options.steps * options.batch_size * options.seq_len,
                  loss=loss, perplexity=math.exp(loss), bits_per_byte=bits, seconds=time.time() - begin,
                  tokens_per_second=rate if first < options.steps else 0.0)
    if rank == 0:
        log.write(json.dumps(dict(held_out=result)) + "\n")
    return model, result


# ---------------------------------------------------------------------------------------
# What comes out

def show_sample(model, tokenizer, options):
    device = next(model.parameters()).device
    prompt = torch.from_numpy(np.concatenate([[tokenizer.separator], tokenizer.encode([options.prompt])[0]])).long()[None].to(device)
    begin = time.time()
    ids = model.generate(prompt, options.sample_tokens, temperature=options.temperature, seed=options.seed)[0, 1:].tolist()
    seconds = time.time() - begin
    print(f"\nsample, {options.sample_tokens / seconds:.0f} tokens/s through the cache:\n")
    print(tokenizer.decode(ids))


def show_cache(model):
    """KV cache in bytes, as allocated, beside a transformer's of the same shape."""
    config, device = model.config, next(model.parameters()).device
    plain = Attamba(dataclasses.replace(config, kv="linear", leading_tokens=None)).to(device)
    print("\nKV cache of one sequence, allocated bytes (SSM states included)\n")
    print(f"{'context':>8} {'transformer':>12} {'this model':>12} {'smaller':>8}")
    for length in (256, 1024, 4096, 16384):
        a, b = plain.new_cache(1, length).nbytes, model.new_cache(1, length).nbytes
        print(f"{length:>8} {a:>12,} {b:>12,} {a / b:>7.1f}x")


# ---------------------------------------------------------------------------------------
# The command line: one option per field of the two dataclasses, its help the field's comment

def add_options(parser, cls, skip=()):
    for line in inspect.getsource(cls).splitlines():
        field = re.match(r"    (\w+): (.+?)(?: = .*?)?\s+# (.*)", line)
        if field and field[1] not in skip:
            kind = next((t for n, t in (("int", int), ("float", float), ("bool", bool)) if n in field[2]), str)
            def parse(text, kind=kind, optional="Optional" in field[2]):
                if optional and text.lower() == "none":
                    return None
                if kind is bool:
                    return {"true": True, "false": False}[text.lower()]
                return kind(text)
            parse.__name__ = kind.__name__
            parser.add_argument("--" + field[1], type=parse, default=argparse.SUPPRESS, help=field[3].replace("%", "%%"), metavar=kind.__name__)


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="go on from --out; options given now replace the saved ones")
    add_options(parser.add_argument_group("training"), TrainConfig)
    add_options(parser.add_argument_group("model (the defaults of AttambaConfig, small sizes)"), AttambaConfig, skip=("vocab_size",))
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume")
    out = Path(given.get("out", TrainConfig.out))
    saved = {}
    if resume:
        try:
            stored = json.loads((out / "config.json").read_text())
            saved = {**stored["model"], **stored["train"]}
        except (OSError, ValueError, KeyError):
            raise UserError(f"nothing to resume in {out}: no readable config.json")
        if not (out / "checkpoint.pt").exists():
            raise UserError(f"nothing to resume in {out}: no checkpoint.pt")
    device = given.get("device", saved.get("device", "auto"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"no device {device!r}: {str(e).splitlines()[0]}")
    values = {**PRESETS["cuda" if device.startswith("cuda") else "cpu"], **saved, **given, "device": device}
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    options = TrainConfig(**{k: v for k, v in values.items() if k in names})
    for name, least in (("steps", 1), ("batch_size", 1), ("seq_len", 1), ("warmup", 0), ("eval_tokens", 1), ("save_every", 1), ("sample_tokens", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} must be at least {least}, but it is {getattr(options, name)}")
    return options, {k: v for k, v in values.items() if k not in names and k != "vocab_size"}, resume


def main():
    options, model_values, resume = parse_arguments()
    distributed = "RANK" in os.environ
    if distributed:
        torch.distributed.init_process_group("nccl" if options.device.startswith("cuda") else "gloo")
    talk = print if int(os.environ.get("RANK", 0)) == 0 else lambda *_: None
    corpus = load_corpus(options)
    try:
        config = AttambaConfig(vocab_size=corpus.tokenizer.vocab_size, **model_values)
    except ValueError as e:
        raise UserError(str(e))
    talk(f"{len(corpus.train):,} training and {len(corpus.valid):,} held-out tokens of {options.data or 'the Python standard library'}; "
         f"{options.device}; P {config.chunk_size}, L {config.leading_tokens}, kv {config.kv}")
    try:
        model, result = train(config, options, corpus, resume)
    except KeyboardInterrupt:
        talk(f"\nstopped and saved; go on with: python train_tiny.py --resume --out {options.out}")
        raise SystemExit(130)
    if talk is print:
        print(f"{result['params']:,} parameters, {result['tokens']:,} tokens in {result['seconds']:.0f} s: held-out loss "
              f"{result['bits_per_byte']:.3f} bits per byte (perplexity {result['perplexity']:.2f} per token)")
        show_sample(model, corpus.tokenizer, options)
        show_cache(model)
        print(f"\nsaved to {options.out}: checkpoint.pt, config.json, log.jsonl")
    if distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"train_tiny.py: {e}", file=sys.stderr)
        raise SystemExit(2)
