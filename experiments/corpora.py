"""The texts of sweep.py as tokens: made on first use, then kept in a folder.

python    the Python source of this machine, standard library and site-packages; each text once, split by file
english   prose from a folder: english_docs.train.txt.xz, english_docs.valid.txt.xz, and wikitext-2.test.txt to score

Each has a byte-level BPE of its own, in tiktoken's rank format, so that train_tiny.py reads it too
(--tokenizer .data/python/ranks.tiktoken).
"""
import base64
import functools
import hashlib
import os
import re
import shutil
import site
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from train_tiny import Corpus, get_tokenizer, read_text

VOCAB = 8192                       # ranks of the BPE and the end-of-text token


def python_documents():
    """Training and held-out Python source of this machine, by content: each text once, in the order of its hash."""
    paths = sysconfig.get_paths()
    roots = {Path(p).resolve() for p in (paths["stdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()) if Path(p).is_dir()}
    texts = {}
    for path in {p for root in roots for p in root.rglob("*.py")}:
        try:
            raw = path.read_bytes()
            if b"\0" not in raw and raw.strip():
                texts[hashlib.sha256(raw).hexdigest()] = raw.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
    split = {False: [], True: []}
    for key in sorted(texts):
        split[int(key[-8:], 16) % 40 == 0].append(texts[key])
    return {"train": split[False], "valid": split[True]}


def english_documents(folder):
    """Files of documents between lines of <|endoftext|>; the split is the files' own."""
    files = {"train": "english_docs.train.txt.xz", "valid": "english_docs.valid.txt.xz", "wikitext": "wikitext-2.test.txt"}
    return {name: [d for d in re.split(r"^<\|endoftext\|>\n", read_text(Path(folder) / file), flags=re.M) if d]
            for name, file in files.items()}


def train_bpe(documents, path, megabytes=30):
    """Byte-level BPE on some 30 MB drawn by hash, saved as tiktoken ranks: a token's rank is the order it was made in."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    sample, room = [], megabytes * 10 ** 6
    for text in sorted(documents, key=lambda d: hashlib.sha256(d[:1000].encode()).digest()):
        if room > 0:
            sample.append(text)
            room -= len(text)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)                     # splits like GPT-2
    bpe.train_from_iterator(sample, trainers.BpeTrainer(vocab_size=VOCAB - 1, show_progress=False,
                                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    # `tokenizers` writes each byte as a printable character: itself, or the next free one from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in printable}
    byte_of.update({chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(printable)))})
    with open(path, "wb") as f:
        for token, rank in sorted(bpe.get_vocab().items(), key=lambda item: item[1]):
            f.write(base64.b64encode(bytes(byte_of[c] for c in token)) + b" %d\n" % rank)


def encode(documents, tokenizer):
    """Documents to one uint16 array, separated; in threads, as tiktoken lets go of Python's lock."""
    end = np.array([tokenizer.eot_token], dtype=np.uint16)
    one = lambda text: tokenizer.encode_to_numpy(text, allowed_special=set(), disallowed_special=()).astype(np.uint16)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate([part for ids in pool.map(one, documents) for part in (ids, end)])


@functools.cache
def corpus(name, work, data):
    """The Corpus `python` or `english`, made on first use; English has the extra tokens .wikitext."""
    whole = Path(work) / name
    if not whole.exists():
        begin = time.time()
        folder = whole.with_name(f"{name}.{os.getpid()}.tmp")                                # it gets its name when all is there
        folder.mkdir(parents=True)
        documents = python_documents() if name == "python" else english_documents(data)
        train_bpe(documents["train"], folder / "ranks.tiktoken")
        tokenizer = get_tokenizer(str(folder / "ranks.tiktoken"))
        for part, texts in documents.items():
            np.save(folder / f"{part}.npy", encode(texts, tokenizer))
        size = sum(len(d) for d in documents["train"])
        fingerprint = hashlib.sha256(np.load(folder / "train.npy").tobytes()).hexdigest()[:16]
        (folder / "done").write_text(fingerprint)
        print(f"corpus {name}: {len(documents['train']):,} documents, {size / 1e6:.0f} M characters, made in {time.time() - begin:.0f} s", flush=True)
        try:
            folder.rename(whole)
        except OSError:                                                                      # another process was faster
            shutil.rmtree(folder)
    load = lambda part: torch.from_numpy(np.load(whole / f"{part}.npy").astype(np.int32))
    made = Corpus(load("train"), load("valid"), get_tokenizer(str(whole / "ranks.tiktoken")), (whole / "done").read_text())
    made.wikitext = load("wikitext") if name == "english" else None
    print(f"corpus {name} {made.fingerprint}: {len(made.train):,} training and {len(made.valid):,} held-out tokens", flush=True)
    return made
