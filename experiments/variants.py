"""Models that exist for experiments only: attamba.py with one thing changed, in plain torch.

A variant is called as variant(corpus, config) and returns what train_tiny.train uses in place of
Attamba: something that makes a model from a config. `patched` swaps functions of attamba.py while a row runs.
"""
import contextlib
import dataclasses
import functools
import math
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

import attamba
from attamba import Attamba


# ---------------------------------------------------------------------------------------
# Other chunks

def set_chunk_size(model, P):
    """Another P in all layers; weights do not depend on it."""
    model.layer_configs = [dataclasses.replace(c, chunk_size=P) for c in model.layer_configs]
    for block, config in zip(model.blocks, model.layer_configs):
        block.attention.config = config


RANDOM_P = (2, 4, 8, 16, 32, 64)


class RandomP(Attamba):
    """P drawn anew for each training batch, from the batch itself: a resumed run draws the same."""

    def forward(self, tokens, *, cache=None, **options):
        P = self.config.chunk_size
        if torch.is_grad_enabled() and cache is None:
            P = RANDOM_P[int(tokens.sum()) % len(RANDOM_P)]
        if self.layer_configs[0].chunk_size != P:
            set_chunk_size(self, P)
        return super().forward(tokens, cache=cache, **options)


def whitespace(corpus, newlines_only):
    """Which tokens of the vocabulary end a chunk: those with a newline, or those with any whitespace. (vocab_size,) bool"""
    decode, n = corpus.tokenizer.decode_bytes, corpus.tokenizer.n_vocab
    return torch.tensor([any(c in decode([token]) for c in (b"\n" if newlines_only else b" \n\t")) for token in range(n)])


def mean_chunk(corpus, newlines_only):
    """Mean length of the chunks that whitespace() makes."""
    tokens = corpus.train[:10 ** 7].long()
    return len(tokens) / int(whitespace(corpus, newlines_only)[tokens].sum())


def at_whitespace(newlines_only, uniform=False):
    """Chunks that end at whitespace tokens; or (uniform) chunks of the same mean length, cut by counting:
    a chunk ends wherever the multiples of the mean, which is no whole number, are passed."""
    def variant(corpus, config):
        table, mean = whitespace(corpus, newlines_only), mean_chunk(corpus, newlines_only)

        class Cut(Attamba):
            def forward(self, tokens):
                ends = table.to(tokens.device)[tokens]
                if uniform:
                    t = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float64)
                    ends = (((t + 1) / mean).floor() > (t / mean).floor()).expand(tokens.shape)
                return super().forward(tokens, boundaries=ends)
        return Cut
    return variant


# ---------------------------------------------------------------------------------------
# Other mechanisms

def released_mixing(config):
    """The released code's fault: each token's position inside its chunk is passed as the kernel's seq_idx,
    "which sequence". Tokens interact only where it is equal, so token t meets t - P, t - 2P, ... and
    never a token of its own chunk. The decays between them are those of all tokens in between,
    and the convolution, which compares seq_idx too, sees the token alone."""
    P, scan, conv = config.chunk_size, attamba.ssm_scan, attamba.chunk_conv

    def strided_scan(u, dt, A, B, C, D, ends, h=None):
        l = u.shape[1]
        between = F.pad(dt, (0, 0, P - 1, 0)).unfold(1, P, 1).sum(-1)             # dt of the last P tokens

        def split(t):
            """(b, l, ...) -> (b P, l / P, ...): tokens P apart become neighbours"""
            t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, -l % P))
            return t.unflatten(1, (-1, P)).transpose(1, 2).flatten(0, 1)

        # h_t = exp(between A) h_{t-P} + dt u B^T, as a scan whose dt is `between` and whose u is u dt / between
        u_dt, B, C = split(u.float() * (dt / between)[..., None]), split(B), split(C)
        never = torch.zeros(1, u_dt.shape[1], dtype=torch.bool, device=u.device)
        y, h = scan(u_dt, split(between), A, B, C, torch.zeros_like(D), never)
        y = y.unflatten(0, (-1, P)).transpose(1, 2).flatten(1, 2)[:, :l]
        return y + D[:, None] * u.float(), h

    def lone_conv(x, weight, ends, tail=None):
        return conv(x, weight, torch.ones_like(ends), tail)
    return dict(ssm_scan=strided_scan, chunk_conv=lone_conv)


def no_reset(config):
    """The state is not forgotten at a boundary: an entry sums up everything so far."""
    mix = attamba.ssm_mix
    return dict(ssm_mix=lambda *inputs: mix(*inputs[:5], torch.zeros_like(inputs[5]), *inputs[6:]))


def phase_per_head(config):
    """Boundaries shifted per head (in place of per layer: use "uniform"); goes with no_reset, as one state serves all heads."""
    attend = attamba.attend

    def by_head(q, k, v, ends, L, *_):
        h, P = q.shape[1], config.chunk_size
        ends = torch.cat([ends.roll(-(i * P // h), 1) for i in range(h)])              # (h, l)
        ends = ends.repeat(len(q), 1)                                                  # (b h, l)
        q, k, v = (t.flatten(0, 1)[:, None] for t in (q, k, v))                        # (b h, 1, l, d)
        at = attamba.end_positions(ends)
        return attend(q, k, v, ends, L, at).unflatten(0, (-1, h))[:, :, 0]
    return {**no_reset(config), "attend": by_head}


def sink(config):
    """The first token always ends a chunk, so that every query sees it."""
    own_ends, own_count = attamba.chunk_ends, attamba.count_ends

    def chunk_ends(config, positions, *rest):
        return own_ends(config, positions, *rest) | (positions == 0)

    def count_ends(config, layer, length):
        first = own_ends(config, torch.zeros(1, dtype=torch.long), layer)
        return own_count(config, layer, length) + int(length > 0 and not first)
    return dict(chunk_ends=chunk_ends, count_ends=count_ends)


@contextlib.contextmanager
def patched(patch, config):
    with contextlib.ExitStack() as stack:
        for name, function in (patch(config) if patch else {}).items():
            stack.enter_context(mock.patch.object(attamba, name, function))
        yield


# ---------------------------------------------------------------------------------------
# Small changes of a layer, each a class put in front of a module's own

@functools.cache
def _mixed(front, own):
    return type(front.__name__, (front, own), {})


def mix(module, front):
    """module now is a `front`, whose methods call its own by super(). One class for all layers: they share a graph."""
    module.__class__ = _mixed(front, type(module))


def changed(*changes):
    """change(attention) for each layer and change."""
    def make(config):
        model = Attamba(config)
        for block in model.blocks:
            for change in changes:
                change(block.attention)
        return model
    return lambda corpus, config: make


class NormedSSM:
    def forward(self, *arguments, **named):
        out = super().forward(*arguments, **named)
        return [F.rms_norm(y, y.shape[-1:]) * g.to(y.dtype) for y, g in zip(out, self.gain)]


def ssm_norm(attention):
    """What each SSM adds to the residual is normalised, with a learned gain that starts at a half."""
    attention.ssm.gain = nn.Parameter(torch.full((2, attention.ssm.w_out.shape[1]), 0.5))
    mix(attention.ssm, NormedSSM)


def memory(low, high):
    """dt starts between low and high (log-uniform; attamba.py has 1e-3 and 1e-1) and A at 1: a state remembers 1 / dt tokens."""
    def change(attention):
        ssm = attention.ssm
        with torch.no_grad():
            dt = torch.exp(torch.empty_like(ssm.dt_bias).uniform_(math.log(low), math.log(high)))
            ssm.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            ssm.A_log.zero_()
    return change
