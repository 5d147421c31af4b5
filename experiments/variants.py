"""Models that exist for experiments only: attamba.py with one thing changed, in plain torch.

A variant is called as variant(corpus, config) and returns what train_tiny.train uses in place of
Attamba: something that makes a model from a config. `patched` swaps functions of attamba.py while a row runs.
Chunk ends other than attamba.py's own take its general path, which is slower; results do not depend on that.
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
    for layer, block in enumerate(model.blocks):
        attention = block.attention
        attention.config = attention.ssm.config = dataclasses.replace(attention.config, chunk_size=P)
        attention.first = torch.tensor(attamba.first_end(attention.config, layer), device="cpu")


RANDOM_P = (2, 4, 8, 16, 32, 64)


class RandomP(Attamba):
    """P drawn anew for each training batch, from the batch itself: a resumed run draws the same."""

    def forward(self, tokens, boundaries=None, cache=None):
        P = self.config.chunk_size
        if torch.is_grad_enabled():
            P = RANDOM_P[int(tokens.sum()) % len(RANDOM_P)]
        if self.blocks[0].attention.config.chunk_size != P:
            set_chunk_size(self, P)
        return super().forward(tokens, boundaries, cache)


def whitespace(corpus, newlines_only):
    """Which tokens of the vocabulary end a chunk: those with a newline, or those with any whitespace. (vocab_size,) bool"""
    decode, n = corpus.tokenizer.decode, corpus.tokenizer.vocab_size
    return torch.tensor([any(c in decode([token]) for c in ("\n" if newlines_only else " \n\t")) for token in range(n)])


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
            def forward(self, tokens, boundaries=None, cache=None):
                if uniform:
                    t = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float64)
                    ends = ((t + 1) / mean).floor() > (t / mean).floor()
                    return super().forward(tokens, ends.expand(tokens.shape).contiguous(), cache)
                return super().forward(tokens, table.to(tokens.device)[tokens], cache)
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

    def strided_scan(u, dt, A, B, C, D, boundaries=None, h=None):
        l = u.shape[1]
        between = F.pad(dt, (0, 0, P - 1, 0)).unfold(1, P, 1).sum(-1)             # dt of the last P tokens

        def split(t):
            """(b, l, ...) -> (b P, l / P, ...): tokens P apart become neighbours"""
            t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, -l % P))
            return t.unflatten(1, (-1, P)).transpose(1, 2).flatten(0, 1)

        # h_t = exp(between A) h_{t-P} + dt u B^T, as a scan whose dt is `between` and whose u is u dt / between
        y, h = scan(*map(split, (u.float() * (dt / between)[..., None], between)), A, split(B), split(C), torch.zeros_like(D))
        y = y.unflatten(0, (-1, P)).transpose(1, 2).flatten(1, 2)[:, :l]
        return y + D[:, None] * u.float(), h

    def lone_conv(x, weight, boundaries=None, tail=None):
        return conv(x, weight, torch.ones_like(boundaries), tail)
    return dict(ssm_scan=strided_scan, chunk_conv=lone_conv)


def no_reset(config):
    """The state is not forgotten at a boundary: an entry sums up everything so far."""
    scan, conv = attamba.ssm_scan, attamba.chunk_conv
    return dict(ssm_scan=lambda *a: scan(*a[:6], None, a[7]),
                chunk_conv=lambda x, weight, boundaries=None, tail=None: conv(x, weight, torch.zeros_like(boundaries), tail))


def phase_per_head(config):
    """Boundaries shifted per head (in place of per layer: use "uniform"); goes with no_reset, as one state serves all heads."""
    general = attamba.attend

    def by_head(q, k, v, boundaries, L, chunk_size=None, first=None):
        h = q.shape[1]
        ends = torch.cat([boundaries.roll(-(i * config.chunk_size // h), 1) for i in range(h)])      # (h, l)
        q, k, v = (t.flatten(0, 1)[:, None] for t in (q, k, v))                                       # (b h, 1, l, d)
        return general(q, k, v, ends.repeat(len(q) // h, 1), L).unflatten(0, (-1, h))[:, :, 0]
    return {**no_reset(config), "attend": by_head}


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


def general(attention):
    """Chunk ends as a mask, so that patched functions are called and not the kernels."""
    attention.first = None


class NormedQuery:
    def forward(self, x):
        return self.norm(super().forward(x).unflatten(-1, (-1, self.norm.normalized_shape[0]))).flatten(-2)


class NormedKey:
    def keys_values(self, *arguments):
        k, v = super().keys_values(*arguments)
        return [self.norm_k(k.unflatten(-1, (-1, self.config.head_dim))).flatten(-2), v]


def qk_norm(attention):
    """Queries and keys normalised per head, with a learned gain."""
    attention.norm_k = nn.RMSNorm(attention.config.head_dim)
    attention.wq.norm = nn.RMSNorm(attention.config.head_dim)
    mix(attention, NormedKey), mix(attention.wq, NormedQuery)


class NormedSSM:
    def forward(self, *arguments, **named):
        out, state = super().forward(*arguments, **named)
        return [F.rms_norm(y, y.shape[-1:]) * g.to(y.dtype) for y, g in zip(out, self.gain)], state


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


class Sink:
    def boundaries(self, length, start=0, device=None):
        ends = super().boundaries(length, start, device)
        return ends | (torch.arange(start, start + length, device=ends.device) == 0)


def sink(attention):
    """The first token always ends a chunk, so that every query sees it."""
    mix(attention, Sink), general(attention)
