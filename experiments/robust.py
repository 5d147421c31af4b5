"""What a run survives. Each command appends a JSON line to experiments/results/robust.jsonl and fails if anything is lost.

    python experiments/robust.py kills 50       # SIGKILL at random moments, half of them while a checkpoint is written
    python experiments/robust.py processes      # two processes under torchrun (gloo, CPU) against one
"""
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import torch  # noqa: E402

import train_tiny  # noqa: E402

SIZES = "--dim 16 --n_layers 2 --n_heads 2 --leading_tokens 8 --seq_len 32 --eval_tokens 99 --sample_tokens 1".split()


def digest(saved) -> str:
    """Of every byte of the weights and of the optimiser's state."""
    tensors = [*saved["model"].values(), *(t for state in saved["optimizer"].values() for t in state.values())]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def worker():
    """train_tiny.py, telling in the file events what it saves and how it ends; rank 1 gets the signal HIT in its 10th step."""
    rank, save, batch = os.environ.get("RANK", "0"), train_tiny.save, train_tiny.batch
    def tell(*words):
        with open("events", "a") as f:
            print(rank, *words, file=f)
    def told_save(path, data):
        save(path, data)
        if path.name == "checkpoint.pt":
            saved = train_tiny.load(path.parent)
            tell("saved", saved["step"], digest(saved))
    def told_batch(tokens, options, step, *rest):
        if rank == "1" and step == 9 and "HIT" in os.environ:
            tell("hit", time.time())
            os.kill(os.getpid(), signal.Signals[os.environ["HIT"]])
        return batch(tokens, options, step, *rest)
    train_tiny.save, train_tiny.batch = told_save, told_batch
    try:
        train_tiny.main()
    except SystemExit as e:
        tell("stopped", repr(str(e.__context__)))
        raise


def start(folder, *arguments, script=HERE.parent / "train_tiny.py", processes=0, **environment):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    command = [sys.executable, *launcher, script, *SIZES, "--device", "cpu", "--data", HERE.parent / "train_tiny.py", *arguments]
    return subprocess.Popen([*map(str, command)], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "ROBUST_WORKER": "1", **environment})


def events(folder, kind):
    return [line.split(maxsplit=2) for line in (folder / "events").read_text().splitlines() if line.split()[1] == kind]


def kills(folder, n=50, steps=300):
    """One run that is killed n times, resumed each time, against one that never stops: the checkpoint found after
    each kill and the last one must equal, bit by bit, that of the same step of the other."""
    r, out, options = random.Random(0), folder / "out", ["--steps", str(steps), "--batch_size", "2", "--save_every", "1"]
    whole = start(folder, *options, "--out", "whole", script=__file__)
    assert whole.wait() == 0, whole.stderr.read()
    expected = {int(step): value for _, _, rest in events(folder, "saved") for step, value in [rest.split()]}
    count, progress = dict(kills=0, writing=0, before_the_first_checkpoint=0, runs=0), 0
    log, temporary = out / "log.jsonl", out / "checkpoint.pt.tmp"
    while count["kills"] < n or progress < steps:
        for stale in [temporary, log][:1 + (progress == 0)]:                      # of the run before: not a sign of this one
            stale.unlink(missing_ok=True)
        process = start(folder, *options, *["--resume"] * (progress > 0), "--out", "out")
        if count["kills"] < n:
            before = log.stat().st_size if log.exists() else 0
            while process.poll() is None and not (log.exists() and log.stat().st_size > before):
                time.sleep(0.001)
            time.sleep(r.random() * steps / n / 100)                              # a step takes some 10 ms
            while count["kills"] % 2 and process.poll() is None and not temporary.exists():
                pass
            process.kill()
        code = process.wait()
        assert code in (0, -signal.SIGKILL), process.stderr.read()
        count["kills"] += code != 0
        count["writing"] += code != 0 and temporary.exists()
        if not (out / "checkpoint.pt").exists():
            count["before_the_first_checkpoint"] += 1
            continue
        saved = train_tiny.load(out)
        assert digest(saved) == expected[saved["step"]], f"other weights at step {saved['step']}"
        assert saved["step"] >= progress, "a checkpoint was lost"
        progress = saved["step"]
        if progress == steps and count["kills"] < n:                              # done: once more from the start
            count["runs"], progress = count["runs"] + 1, 0
    return dict(count, runs=count["runs"] + 1, identical=True)


def processes(folder, runs=4):
    """The same losses in two processes as in one, checkpoints saved once; Ctrl-C in one stops both there; a death ends the run."""
    curves, result = [], dict(runs=runs)
    for name, how in [("one", {}), ("two", dict(processes=2)), ("interrupted", dict(processes=2, HIT="SIGINT")),
                      ("died", dict(processes=2, HIT="SIGKILL"))][:runs]:
        (work := folder / name).mkdir()
        process = start(work, "--steps", "40", "--save_every", "20", "--warmup", "5", script=__file__, **how)
        code, error = process.wait(120), process.stderr.read()
        saved = events(work, "saved") if (work / "events").exists() else []
        steps = [int(rest.split()[0]) for _, _, rest in saved]
        assert len({*steps}) == len(steps), f"saved more than once: {saved}"
        if name in ("one", "two"):
            assert code == 0 and steps == [20, 40], error
            curves.append([json.loads(line)["loss"] for line in (work / "out/log.jsonl").read_text().splitlines()[:-1]])
        elif name == "interrupted":
            stopped = events(work, "stopped")
            assert len(stopped) == 2 and all("saved at step 10;" in text for _, _, text in stopped), (stopped, error)
            assert steps == [10] == [train_tiny.load(work / "out")["step"]], steps
        else:
            result["seconds_from_death_to_end"] = round(time.time() - float(events(work, "hit")[0][2]), 1)
            assert code != 0 and "SIGKILL" in error, error
    result["largest_difference_of_losses"] = max(abs(a - b) / b for a, b in zip(*curves))
    assert result["largest_difference_of_losses"] < 1e-5, curves
    return result


if __name__ == "__main__":
    if "ROBUST_WORKER" in os.environ:
        worker()
    else:
        begin, (name, *numbers) = time.time(), sys.argv[1:]
        results = Path(os.environ.get("RESULTS", HERE / "results"))
        with tempfile.TemporaryDirectory() as folder:
            found = {"kills": kills, "processes": processes}[name](Path(folder), *map(int, numbers))
        line = dict(test=name, **found, seconds=round(time.time() - begin), torch=torch.__version__)
        print(json.dumps(line))
        with open(results / "robust.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")
