"""Train a small Attamba on text, score it, sample from it, weigh its KV cache.

    python train_tiny.py                                      # the Python standard library's own source
    python train_tiny.py --data book.txt --out out/book       # a file, a folder, or .gz / .xz of text
    python train_tiny.py --kv linear --leading_tokens none    # the transformer of the same shape
    python train_tiny.py --kv ssm --chunk_size 8 --leading_tokens 64   # Attamba as in the paper
    python train_tiny.py --resume --out out/book              # go on where it stopped
    torchrun --nproc_per_node=2 train_tiny.py                 # data-parallel
    python train_tiny.py --help                               # every knob

Everything goes to the folder --out: checkpoint.pt, config.json (to read, --resume needs only the checkpoint), log.jsonl.
Ctrl-C or SIGTERM saves after the step at hand. What the user can mend is one line and exit code 2.
"""
import argparse
import contextlib
import dataclasses
import functools
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
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
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
            raise ValueError(f'--compile must be "auto", "yes" or "no", but it is {self.compile!r}')
        counts = ("steps", "batch_size", "seq_len", "eval_tokens", "save_every")
        for name, value in vars(self).items():
            if not isinstance(getattr(TrainConfig, name), str) and not (name in counts) <= value < math.inf:
                raise ValueError(f"--{name} must be at least {name in counts:d}, but it is {value}")


# What a device gets when nothing is said on the command line.
PRESETS = {
    "cpu": dict(dim=128, n_layers=4, n_heads=4, kv="linear+ssm", leading_tokens=16),
    "cuda": dict(dim=512, n_layers=8, n_heads=8, kv="linear+ssm", leading_tokens=64,
                 seq_len=1024, batch_size=64, steps=900, lr=2e-3, warmup=100),
}


def preset_chunks(n_layers: int) -> tuple:
    """P of each layer, if nothing is said, as it measured well (README): the last layer, and every fourth before it, keeps
    chunks of two tokens; the others have a window, and SSMs that are never reset. The cache grows as with P 8."""
    return tuple(2 if i % 4 == 0 else None for i in reversed(range(n_layers)))


COMPILE = {"comprehensive_padding": False}  # padded rows would be copied again before the SSM kernel


class UserError(Exception):
    """Something the user can mend."""


# ---------------------------------------------------------------------------------------
# Text to tokens

def read_text(path: Path) -> str:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as f:
            raw = f.read()
        if b"\0" in raw:
            raise ValueError("it has zero bytes")
        return raw.decode("utf-8")
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as e:
        raise UserError(f"cannot read {path} as UTF-8 text: {e}")


def read_documents(source: str) -> tuple[list[str], list[str]]:
    """Training and held-out documents. Files of a folder are split by a hash of their path, documents
    of one file (between lines of <|endoftext|>) by a hash of their text; of a single document the end is held out."""
    path = Path(source or sysconfig.get_paths()["stdlib"])
    documents = []                                                                # what is hashed, text
    if path.is_dir():
        for file in sorted(path.rglob("*" if source else "*.py")):
            if file.is_file() and file.suffix != ".pyc" and "site-packages" not in file.parts:
                with contextlib.suppress(UserError):                              # it may hold other things than text
                    documents.append((file.relative_to(path).as_posix(), read_text(file)))
    elif path.is_file():
        text = read_text(path)
        documents = [(part, part) for part in re.split(r"^<\|endoftext\|>\n", text, flags=re.M)]
        if len(documents) == 1:
            cut = len(text) - len(text) // 20
            return [text[:cut]], [text[cut:]]
    else:
        raise UserError(f"no such file or folder: {path}")
    split = [], []
    for key, text in documents:
        split[int(hashlib.sha256(key.encode()).hexdigest(), 16) % 25 == 0].append(text)
    return split


class ByteTokenizer:
    """256 tokens; a zero byte separates documents."""
    vocab_size, separator, byte_lengths = 256, 0, np.ones(256, dtype=np.int64)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(t.encode(errors="surrogateescape"), dtype=np.uint8) for t in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class TiktokenTokenizer:
    """A tiktoken encoding by name, or from a local rank file (split as GPT-2 does)."""

    def __init__(self, name: str):
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe
        names = tiktoken.list_encoding_names()
        if not Path(name).is_file() and name not in names:
            raise UserError(f"unknown tokenizer {name!r}: bytes, a rank file, or one of {', '.join(names)}")
        try:
            if Path(name).is_file():
                ranks = load_tiktoken_bpe(name)
                if any(bytes([i]) not in ranks for i in range(256)):
                    raise ValueError("it lacks some of the 256 single bytes")
                pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
                self.encoding = tiktoken.Encoding(Path(name).name, pat_str=pattern, mergeable_ranks=ranks,
                                                  special_tokens={"<|endoftext|>": max(ranks.values()) + 1})
            else:
                self.encoding = tiktoken.get_encoding(name)
        except Exception as e:
            raise UserError(f"cannot use {name} as a tokenizer ({type(e).__name__}: {e}): it must be a tiktoken rank file, or a "
                            "name that tiktoken downloads on first use or finds in the folder TIKTOKEN_CACHE_DIR")
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
    def join(name, documents):
        parts = [part for ids in tokenizer.encode([text for text in documents if text])
                 for part in (ids, np.array([tokenizer.separator], dtype=ids.dtype))]
        n = sum(map(len, parts))
        if n <= options.seq_len:
            raise UserError(f"the {name} text is too short: {n} tokens, and one sequence needs {options.seq_len + 1}")
        return torch.from_numpy(np.concatenate(parts))
    train, valid = read_documents(options.data)
    if options.valid_data:
        valid = sum(read_documents(options.valid_data), [])
    train, valid = join("training", train), join("held-out", valid)
    return Corpus(train, valid, tokenizer, hashlib.sha256(train.numpy().tobytes()).hexdigest()[:16])


# ---------------------------------------------------------------------------------------
# Checkpoints

def save(path: Path, data: bytes) -> None:
    """All or nothing, even if the power fails: the old file stays until the new one is on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):  # the new name is on the disk when the folder is
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot save {path}: {e.strerror}; what was saved there before is kept")


def load(out: str) -> dict:
    """The checkpoint in a folder. Loading runs no code that a file may hold, and notices damage to any byte."""
    path = Path(out) / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"nothing to resume in {out}: no checkpoint.pt")
    try:
        with zipfile.ZipFile(path) as z:  # torch.load does not look at the checksums
            if z.testzip():
                raise ValueError("wrong checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        TrainConfig(**saved["train"]), AttambaConfig(**saved["config"])
        int(saved["step"]), saved["corpus"], saved["model"].items(), saved["optimizer"].items()
        return saved
    except Exception as e:
        raise UserError(f"{path} is damaged, or not a checkpoint of this program ({type(e).__name__}: {e})")


def restore(model, optimizer, saved) -> None:
    """Weights and optimiser state from load(). If they do not fit, says which fields and tensors differ."""
    there = saved["config"]
    want, have = ({(name, getattr(t, "shape", None)) for name, t in m.items()} for m in (model.state_dict(), saved["model"]))
    wrong = sorted({name for name, _ in want ^ have})
    if wrong:
        fields = [f"{name} is {value!r} and was {there.get(name)!r}"
                  for name, value in dataclasses.asdict(model.config).items() if value != there.get(name)]
        raise UserError(f"the checkpoint is of another model: {'; '.join(fields) or 'the same config'}; "
                        f"{len(wrong)} tensors differ: {', '.join(wrong[:3])}" + ", ..." * (len(wrong) > 3))
    model.load_state_dict(saved["model"])
    try:
        optimizer.load_state_dict(dict(state=saved["optimizer"], param_groups=optimizer.state_dict()["param_groups"]))
        assert all(optimizer.state[p][k].shape == p.shape for p in model.parameters() for k in ("exp_avg", "exp_avg_sq"))
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
        raise UserError("the checkpoint's optimizer state does not fit its weights")


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
    groups = {True: [], False: []}                 # matrices; norms, convolutions, dt_bias, A_log, D
    for name, p in model.named_parameters():
        groups[p.dim() >= 2 and name.split(".")[-1] in ("weight", "w_in", "w_out")].append(p)
    groups = [dict(params=groups[True], weight_decay=options.weight_decay), dict(params=groups[False], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)


def autocast(device):
    """bfloat16 matrix products on a GPU; float32 on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def evaluate(model, tokens, byte_lengths, options, device):
    """Held-out loss in nats per token, and in bits per byte of text."""
    n = max(1, min(options.eval_tokens, len(tokens) - 1) // options.seq_len)
    nats = nbytes = 0
    for rows in tokens.unfold(0, options.seq_len + 1, options.seq_len)[:n].split(options.batch_size):
        rows = rows.long()
        with autocast(device), torch.compiler.set_stance("force_eager"):              # seen once: not worth compiling
            logits = model(rows[:, :-1].to(device))
        nats += F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten().to(device), reduction="sum").item()
        nbytes += int(byte_lengths[rows[:, 1:].numpy()].sum())
    return nats / (n * options.seq_len), nats / math.log(2) / nbytes


def train(config: AttambaConfig, options: TrainConfig, corpus: Corpus, resume: dict | None = None, quiet: bool = False):
    """Train one model and score it. Returns (model, result dict); writes into options.out. resume: from load().
    Ctrl-C or SIGTERM saves after the step at hand, the same in all processes, and raises KeyboardInterrupt."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    device, out, first = torch.device(options.device), Path(options.out), resume["step"] if resume else 0
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.set_float32_matmul_precision("high")
    if options.batch_size % world:
        raise UserError(f"--batch_size {options.batch_size} cannot be split over {world} processes")
    torch.manual_seed(options.seed)
    model = Attamba(config).to(device)
    optimizer = make_optimizer(model, options)
    if resume:
        restore(model, optimizer, resume)
    if options.compile == "yes" or (options.compile == "auto" and device.type == "cuda"):
        for block in model.blocks:  # one block at a time: all share one compiled graph
            block.compile(fullgraph=True, options=COMPILE)
    net = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model

    facts = dict(config=dataclasses.asdict(config), train=dataclasses.asdict(options), corpus=corpus.fingerprint)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not resume:
            (out / "log.jsonl").unlink(missing_ok=True)
            if (out / "checkpoint.pt").exists():  # of another run
                os.replace(out / "checkpoint.pt", out / "checkpoint.old.pt")
        save(out / "config.json", json.dumps(facts, indent=1).encode())

    def log(**entry):
        if rank == 0:
            with open(out / "log.jsonl", "a") as f:
                f.write(json.dumps(entry) + "\n")

    def total(values):
        """Sum over all processes."""
        if world > 1:
            dist.all_reduce(values)
        return values

    interrupts, saved, losses = [], first, []
    def on_signal(*_):
        if interrupts and world == 1:  # twice: at once (but torchrun repeats a signal)
            raise KeyboardInterrupt
        interrupts.append(True)
    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    begin, timed, rate, size = time.time(), None, 0.0, options.batch_size * options.seq_len
    try:
        for step in range(first + 1, options.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, step - 1)
            x, y = (t.to(device, non_blocking=True) for t in batch(corpus.train, options, step - 1, rank, world))
            with autocast(device):
                logits = net(x)                                               # (b, l, vocab_size)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf)
            optimizer.step()

            losses.append(loss.detach())
            stop = total(torch.tensor(len(interrupts))) > 0                   # in all processes or in none
            keep = stop or step == options.steps or step % options.save_every == 0
            if keep or step % 10 == 0 or step == first + 1:
                losses = (total(torch.stack(losses)) / world).tolist()        # of the whole batch, as one process has it
                bad = [i for i, value in enumerate(losses, step - len(losses) + 1) if not math.isfinite(value)]
                if bad or keep and not all(p.isfinite().all() for p in model.parameters()):
                    raise UserError(f"the loss or a weight is no longer finite at step {bad[0] if bad else step}; "
                                    f"{f'the checkpoint of step {saved} is kept' if saved else 'nothing was saved yet'} in {out}")
                now = time.time()
                timed = timed or (now, step)                                  # leave out the first step: it compiles
                rate = (step - timed[1]) * size / max(now - timed[0], 1e-9)
                log(step=step, loss=losses[-1], lr=group["lr"], tokens=step * size, tokens_per_second=rate, seconds=now - begin)
                if rank == 0 and not quiet and (keep or step % (10 * max(1, options.steps // 200)) == 0):  # some 20 lines
                    minutes = (options.steps - step) * size / max(rate, 1) / 60
                    print(f"step {step}/{options.steps}  loss {losses[-1]:.3f}  {rate / 1000:.1f}k tokens/s  "
                          f"{minutes:.1f} min left", flush=True)
                losses = []
            if keep and rank == 0:
                data = io.BytesIO()
                torch.save(dict(facts, model=model.state_dict(), optimizer=optimizer.state_dict()["state"], step=step), data)
                save(out / "checkpoint.pt", data.getbuffer())
            saved = step if keep else saved
            if stop:
                raise KeyboardInterrupt(f"saved at step {step}; go on with: python train_tiny.py --resume --out {out}")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    loss, bits = evaluate(model, corpus.valid, corpus.tokenizer.byte_lengths, options, device)
    result = dict(params=sum(p.numel() for p in model.parameters()), tokens=options.steps * size, loss=loss, bits_per_byte=bits,
                  perplexity=math.exp(loss), seconds=time.time() - begin, tokens_per_second=rate)
    log(held_out=result)
    return model, result


# ---------------------------------------------------------------------------------------
# What comes out

def show_sample(model, tokenizer, options):
    device = next(model.parameters()).device
    prompt = torch.tensor([[tokenizer.separator, *tokenizer.encode([options.prompt])[0].tolist()]], device=device)
    begin = time.time()
    ids = model.generate(prompt, options.sample_tokens, temperature=options.temperature, seed=options.seed)[0, 1:].tolist()
    print(f"\nsample, {options.sample_tokens / (time.time() - begin):.0f} tokens/s through the cache:\n\n{tokenizer.decode(ids)}")


def show_cache(model):
    """KV cache in bytes, as allocated, beside a transformer's of the same shape."""
    plain = Attamba(dataclasses.replace(model.config, kv="linear", leading_tokens=None)).to(next(model.parameters()).device)
    print("\nKV cache of one sequence, allocated bytes (SSM states included)\n")
    print(f"{'context':>8} {'transformer':>12} {'this model':>12} {'smaller':>8}")
    for length in (256, 1024, 4096, 16384):
        a, b = plain.new_cache(1, length).nbytes, model.new_cache(1, length).nbytes
        print(f"{length:>8} {a:>12,} {b:>12,} {a / b:>7.1f}x")


# ---------------------------------------------------------------------------------------
# The command line: one option per field of the two dataclasses, its help the field's comment

def parse_value(text, kind, optional, layers):
    if layers and "," in text:  # one for each layer
        return tuple(parse_value(part, kind, optional, False) for part in text.split(","))
    if optional and text.lower() == "none":
        return None
    return ("false", "true").index(text.lower()) == 1 if kind is bool else kind(text)


def add_options(parser, cls):
    for line in inspect.getsource(cls).splitlines():
        field = re.match(r"    (\w+): (.+?)(?: = .*?)?\s+# (.*)", line)
        if field and field[1] != "vocab_size":
            kind = next((t for n, t in (("int", int), ("float", float), ("bool", bool)) if n in field[2]), str)
            parse = functools.partial(parse_value, kind=kind, optional="None" in field[2] or "Optional" in field[2], layers="tuple" in field[2])
            parse.__name__ = kind.__name__
            parser.add_argument("--" + field[1], type=parse, default=argparse.SUPPRESS, metavar=kind.__name__, help=field[3])


def parse_arguments():
    def error(message):
        raise UserError(f"{message} (see --help)")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = error
    parser.add_argument("--resume", action="store_true", help="go on from --out; options given now replace the saved ones")
    add_options(parser.add_argument_group("training"), TrainConfig)
    add_options(parser.add_argument_group("model (the defaults of AttambaConfig, small sizes)"), AttambaConfig)
    given = vars(parser.parse_args())
    resume = load(given.get("out", TrainConfig.out)) if given.pop("resume") else None
    device = given.pop("device", "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device += ":" + os.environ.get("LOCAL_RANK", "0")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"no device {device!r}: {str(e).splitlines()[0]}")
    saved = {**resume["config"], **resume["train"]} if resume else {}
    values = {**PRESETS["cuda" if device.startswith("cuda") else "cpu"], **saved, **given, "device": device}
    values.setdefault("chunk_size", preset_chunks(values["n_layers"]))
    options = TrainConfig(**{f.name: values.pop(f.name) for f in dataclasses.fields(TrainConfig) if f.name in values})
    corpus = load_corpus(options)
    return AttambaConfig(**{**values, "vocab_size": corpus.tokenizer.vocab_size}), options, corpus, resume


def run():
    try:
        config, options, corpus, resume = parse_arguments()
    except ValueError as e:  # a value out of range
        raise UserError(str(e))
    distributed, talk = "RANK" in os.environ, os.environ.get("RANK", "0") == "0"
    if distributed:  # gloo also on GPUs, for what the processes agree on
        dist.init_process_group("cpu:gloo,cuda:nccl" if options.device.startswith("cuda") else "gloo")
    if talk:
        source = options.data or "the Python standard library"
        print(f"{len(corpus.train):,} training and {len(corpus.valid):,} held-out tokens of {source}; "
              f"{options.device}; P {config.chunk_size}, L {config.leading_tokens}, kv {config.kv}")
        if resume and resume["corpus"] != corpus.fingerprint:
            print("note: this is not the text that the checkpoint was trained on")
    model, result = train(config, options, corpus, resume)
    if talk:
        print(f"{result['params']:,} parameters, {result['tokens']:,} tokens in {result['seconds']:.0f} s: held-out loss "
              f"{result['bits_per_byte']:.3f} bits per byte (perplexity {result['perplexity']:.2f} per token)")
        show_sample(model, corpus.tokenizer, options)
        show_cache(model)
        print(f"\nsaved to {options.out}: checkpoint.pt, config.json, log.jsonl")
    if distributed:
        dist.destroy_process_group()


def main():
    try:
        run()
    except (UserError, ImportError, OSError, MemoryError, torch.OutOfMemoryError) as e:
        hint = " (try a smaller --batch_size)" if isinstance(e, (MemoryError, torch.OutOfMemoryError)) else ""
        print("train_tiny.py:", " ".join(str(e).split()) + hint, file=sys.stderr)
        raise SystemExit(2)
    except KeyboardInterrupt as e:
        print(f"\ntrain_tiny.py: {e or 'stopped'}", file=sys.stderr)
        raise SystemExit(130)


if __name__ == "__main__":
    main()
