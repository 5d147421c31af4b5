"""Attamba: attending to multi-token states, in one file of PyTorch.

A transformer keeps one key and one value per token. Attamba [1] cuts the sequence into chunks
of P tokens and keeps one key and one value per *chunk*, made by two small state-space models
(SSMs, in the Mamba-2 form [2]) that take the place of the key and the value projection. A query
sees every finished chunk through that one entry, and itself and its L most recent predecessors
one by one. The KV cache of S tokens then holds about S/P + L entries instead of S.

Three equations, all per layer; a is its input. (dt, u, B and C are made from a by one matrix, a
short convolution and nonlinearities: see ChunkSSM. A < 0 is learned. r_t is 0 on the first token
of a chunk, else 1.)

    state      h_t = r_t exp(dt_t A) h_{t-1} + dt_t u_t B_t^T,    SSM(a)_t = W_out (h_t C_t + ...)
    k, v, q    k_t = a_t + SSM_K(a)_t,   v_t = a_t + SSM_V(a)_t,   q_t = W_Q a_t
    attention  query t sees  { s <= t : t - s <= L  or  token s ends a chunk }

A chunk boundary is nothing but a zero in the decay: after the last token of a chunk the state is
forgotten. The key and value of that token, made like all others, stand for the whole chunk once
the token has left the window. No key is seen twice.

    config = AttambaConfig(vocab_size=256, dim=128, n_layers=4, n_heads=4)
    model = Attamba(config)
    logits = model(torch.randint(256, (2, 100)))             # (2, 100, 256)
    text = model.generate(torch.randint(256, (2, 100)), max_new_tokens=20, seed=0)
    text.shape                                               # (2, 120), through the small cache

Names       paper  meaning
b l d              batch, length (of this call), width of the model
chunk_size    P    tokens per chunk (mean)
leading_tokens L   recent predecessors that a query sees one by one
ends               bool (1 or b, l), True where a token is the last of its chunk: the one way in
                   which SSMs, attention and cache are told about chunks
at                 positions of these tokens, made from ends once for all layers that share them
a                  input of a layer
q k v              queries, keys, values
h                  state of an SSM
u dt B C, A D, z   its input, step size, input and output map; decay, skip; gate
H p n g            SSM heads, channels per head, state size, groups of heads that share B and C
c                  the config

[1] Akhauri, Huda, Abdelfattah. Attamba: Attending To Multi-Token States. arXiv 2411.17685
[2] Dao, Gu. Transformers are SSMs (Mamba-2). arXiv 2405.21060
[3] Su et al. RoFormer (rotary positions, RoPE). arXiv 2104.09864
[4] Shazeer. GLU variants improve transformer (SwiGLU). arXiv 2002.05202
"""
import contextlib
import inspect
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# ---------------------------------------------------------------------------------------
# What can be chosen? Three knobs, kv, chunk_size and leading_tokens, span the whole family
# from transformer to SSM.

@dataclass
class AttambaConfig:
    """Shape of a model. The defaults are the paper's mechanism [1, section 3].

    kv            chunk_size  leading_tokens   what it is
    "linear"      any         None             transformer
    "linear"      None        L                sliding-window transformer
    "linear"      P           L                strided sparse attention
    "ssm"         P           L                Attamba
    "ssm"         P           None             "pseudo-chunking" [1]: SSMs, full attention
    "ssm"         1           any              full attention over SSMs without memory
    "ssm"         None        L                SSMs over the whole sequence, sliding window
    "linear+ssm"  P           L                W_K and W_V kept: k = W_K a + SSM_K(W_K a) [1]

    chunk_size and leading_tokens may also be tuples with a value for each layer: for 8 layers
    chunk_size=(None, None, None, 2) * 2 measured better than one P for all. What is None by
    default is filled in at once: dataclasses.replace(config, dim=...) keeps the old head_dim,
    hidden_dim, ... Raises ValueError for a value out of range, naming the field, the value and
    what is allowed.
    """
    vocab_size: int                            # number of token ids
    dim: int                                   # width of the model
    n_layers: int                              # number of blocks
    n_heads: int                               # query heads
    n_kv_heads: int | None = None              # key and value heads (GQA); None: n_heads
    head_dim: int | None = None                # channels per head; None: dim / n_heads
    hidden_dim: int | None = None              # inner width of the SwiGLU; None: 3 * dim
    kv: str = "ssm"                            # what makes keys: "ssm", "linear" or "linear+ssm"
    chunk_size: int | tuple | None = 8         # P, tokens per chunk; None: no chunk ever ends
    leading_tokens: int | tuple | None = 64    # L, predecessors seen one by one; None: all
    chunking: str | Callable = "cyclic"        # or "uniform", "random", a rule (see chunk_ends)
    chunking_seed: int = 0                     # which chunks "random" makes
    ssm_inner: int | None = None               # channels of each SSM; None: dim / 2
    ssm_state: int = 32                        # state size n of each channel
    ssm_heads: int | None = None               # SSM heads, one decay each; None: n_heads
    conv_size: int = 4                         # taps of the causal convolution
    qk_norm: bool = False                      # normalise queries and keys per head
    rope_theta: float = 1e4                    # base of the rotary positions
    tie_embeddings: bool = False               # output layer shares the embedding
    norm_eps: float = 1e-5                     # epsilon of every RMSNorm

    def __post_init__(self):
        check_config(self)

    def of_layer(self, layer: int) -> "AttambaConfig":
        """The same with chunk_size and leading_tokens of that layer."""
        P, L = (value[layer] if isinstance(value, (tuple, list)) else value
                for value in (self.chunk_size, self.leading_tokens))
        return replace(self, chunk_size=P, leading_tokens=L)


# ---------------------------------------------------------------------------------------
# What is the model? A pre-norm transformer; only the attention inside is new.

class Attamba(nn.Module):
    """Language model: embedding, n_layers blocks, norm, output layer. The shapes of its weights do
    not depend on chunk_size, leading_tokens or chunking: a model with other values can load them.
    """

    def __init__(self, config: AttambaConfig):
        super().__init__()
        self.config = config
        self.layer_configs = [config.of_layer(layer) for layer in range(config.n_layers)]
        self.embed = starting(nn.Embedding(config.vocab_size, config.dim))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = starting(nn.Linear(config.dim, config.vocab_size, bias=False))
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, *, boundaries: Tensor | None = None,
                cache: "Cache | None" = None, last: bool = False) -> Tensor:
        """tokens (b, l) int64 or int32 -> logits (b, l, vocab_size).

        boundaries: bool (b, l), True where a token ends its chunk, in all layers; default:
        config.chunking. cache: from new_cache; the tokens continue it and it advances in place,
        without gradients. last: logits (b, 1, vocab_size) of the last token alone.
        Raises ValueError for wrong dtypes, shapes, an empty sequence, a cache that is full or made
        for another config or batch size, IndexError for ids outside the vocabulary.
        """
        check_tokens(tokens, self.config.vocab_size)
        start = 0 if cache is None else cache.position
        positions = start + torch.arange(tokens.shape[1], device=tokens.device)   # (l,)
        rope = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        layers = [None] * len(self.blocks) if cache is None else cache.layers
        # For all layers, before any of them changes: what is refused leaves a cache as it was.
        chunks = [Chunks.of(c, layer, positions, len(tokens), boundaries, layer_cache, tokens)
                  for layer, (c, layer_cache) in enumerate(zip(self.layer_configs, layers))]
        with calling(cache):
            x = self.embed(tokens)                                                # (b, l, d)
            for block, chunk, layer_cache in zip(self.blocks, chunks, layers):
                x = block(x, boundaries=chunk, cache=layer_cache, rope=rope)
            if last:
                x = x[:, -1:]
            return self.head(self.norm(x))                                # (b, l, vocab_size)

    def new_cache(self, batch_size: int, max_len: int, max_chunks: int | None = None,
                  dtype: torch.dtype | None = None, device=None) -> "Cache":
        """Allocate everything that decoding up to max_len tokens needs, at once.

        max_chunks: entries for chunk ends in each layer; default: what config.chunking can need
        (a rule of your own could end a chunk at every token). Explicit boundaries need it.
        dtype, device: default those of the first floating-point parameter.
        Raises ValueError for sizes below 1 (max_chunks: below 0).
        """
        like = first_float(self, dtype, device)
        return Cache([LayerCache(c, layer, batch_size, max_len, max_chunks, like)
                      for layer, c in enumerate(self.layer_configs)])

    def stream(self, tokens: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None,
               seed: int | None = None, max_chunks: int | None = None) -> Iterator[Tensor]:
        """Continue tokens (b, l); yields (b, 1) int64 max_new_tokens times.

        temperature 0 takes the likeliest token; top_k and top_p (probability mass) cut the tail;
        seed repeats a sample; max_chunks: of the cache, see new_cache. Every token is a call of
        the model itself, so that hooks, wrappers and an overridden forward count.
        Raises ValueError for a negative temperature or count, top_k below 1, top_p outside (0, 1],
        and what forward raises for tokens.
        """
        check_tokens(tokens, self.config.vocab_size)
        for name, value, ok, allowed in (
                ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0"),
                ("temperature", temperature, temperature >= 0, "at least 0"),
                ("top_k", top_k, top_k is None or top_k >= 1, "at least 1, or None"),
                ("top_p", top_p, top_p is None or 0 < top_p <= 1, "in (0, 1], or None")):
            require(name, value, ok, allowed)
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        cache = self.new_cache(len(tokens), tokens.shape[1] + max_new_tokens, max_chunks)
        # An overridden forward need not know `last`, which spares the logits of a whole prompt.
        last = {"last": True} if "last" in inspect.signature(self.forward).parameters else {}

        def steps(tokens):
            for _ in range(max_new_tokens):
                logits = self(tokens, cache=cache, **last)[:, -1].float()         # (b, vocab_size)
                tokens = sample(logits, temperature, top_k, top_p, generator)     # (b, 1)
                yield tokens
        return steps(tokens)

    def generate(self, tokens: Tensor, max_new_tokens: int, **options) -> Tensor:
        """tokens (b, l) -> (b, l + max_new_tokens), sampled with the options of `stream`."""
        return torch.cat([tokens, *self.stream(tokens, max_new_tokens, **options)], 1)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay (norms, convolutions, A, dt, D)."""
        return undecayed(self)


class Block(nn.Module):
    """x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)). (b, l, d) -> (b, l, d) [1; 4]
    Options as those of AttambaAttention."""

    def __init__(self, config: AttambaConfig, layer: int):
        super().__init__()
        dim, hidden = config.dim, config.hidden_dim
        self.norm1 = nn.RMSNorm(dim, eps=config.norm_eps)
        self.attention = AttambaAttention(config, layer)
        self.norm2 = nn.RMSNorm(dim, eps=config.norm_eps)
        self.w_gate_up = starting(nn.Linear(dim, 2 * hidden, bias=False))
        self.w_down = starting(nn.Linear(hidden, dim, bias=False), small_start(config))

    def forward(self, x: Tensor, *, boundaries=None, cache=None, rope=None) -> Tensor:
        x = x + self.attention(self.norm1(x), boundaries=boundaries, cache=cache, rope=rope)
        gate, up = self.w_gate_up(self.norm2(x)).chunk(2, -1)                     # (b, l, hidden)
        return x + self.w_down(F.silu(gate) * up)


# ---------------------------------------------------------------------------------------
# What replaces attention? The same attention, with keys and values that SSMs make.

class AttambaAttention(nn.Module):
    """Drop-in causal self-attention, (b, l, d) -> (b, l, d) [1, section 3].

        q_t = W_Q a_t,   k_t = a_t + SSM_K(a)_t,   v_t = a_t + SSM_V(a)_t     kv="ssm"
        q_t = W_Q a_t,   k_t = W_K a_t,            v_t = W_V a_t              kv="linear"
        with both, kv="linear+ssm":   k_t = W_K a_t + SSM_K(W_K a)_t,   v_t likewise
        out_t = W_O softmax(q_t k_s / sqrt(head_dim) over the s that t sees) v_s

    layer: index of the layer, 0 first: "cyclic" shifts the chunks by a phase that depends on
    it, so that, with P layers or more, every token ends a chunk in some.
    """

    def __init__(self, config: AttambaConfig, layer: int):
        super().__init__()
        require("layer", layer, 0 <= layer < config.n_layers, f"in 0 ... {config.n_layers - 1}")
        c = self.config = config.of_layer(layer)
        self.layer = layer
        q_dim, kv_dim = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.wq = starting(nn.Linear(c.dim, q_dim, bias=False))
        self.wo = starting(nn.Linear(q_dim, c.dim, bias=False), small_start(c))
        if "linear" in c.kv:
            self.wkv = starting(nn.Linear(c.dim, 2 * kv_dim, bias=False))   # W_K above W_V
        if "ssm" in c.kv:
            self.ssm = ChunkSSM(c, c.dim if c.kv == "ssm" else kv_dim, kv_dim)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps)

    def forward(self, a: Tensor, *, boundaries: "Tensor | Chunks | None" = None,
                cache: "LayerCache | None" = None,
                rope: tuple[Tensor, Tensor] | bool | None = None) -> Tensor:
        """a (b, l, d) -> (b, l, d).

        boundaries: bool (b, l) or (1, l), True where a token ends its chunk; default: by
        config.chunking. cache: from new_cache; a continues it and it advances in place, without
        gradients. rope: cos and sin (l, head_dim), or (1 or b, l, head_dim), of these l positions
        as from rope_angles; None or True: made here; False: none, for a model that adds positions
        of its own. Raises ValueError for an empty input, for a mask, angles or a cache that do not
        fit, for a chunking rule without a mask.
        """
        if a.dim() != 3 or a.numel() == 0:
            raise ValueError(f"the input must be of shape (batch, length, {self.config.dim}), not "
                             f"empty, but got {shape_of(a)}")
        c, start = self.config, 0 if cache is None else cache.position
        positions = start + torch.arange(a.shape[1], device=a.device)
        if not isinstance(boundaries, Chunks):
            boundaries = Chunks.of(c, self.layer, positions, len(a), boundaries, cache)
        ends, at = boundaries
        if rope is None or rope is True:
            rope = rope_angles(positions, c.head_dim, c.rope_theta)
        elif rope:
            check_rope(rope, *a.shape[:2], c.head_dim)

        with calling(cache):
            q = self.wq(a)                                             # q_t = W_Q a_t
            if "linear" in c.kv:
                k, v = self.wkv(a).chunk(2, -1)                        # (b, l, kv heads * head_dim)
            else:  # no W_K, no W_V: a's heads, or their mean where query heads share a key head
                k = v = a.unflatten(-1, (c.n_kv_heads, -1, c.head_dim)).mean(-2).flatten(-2)
            if "ssm" in c.kv:
                inputs = a if c.kv == "ssm" else torch.stack([k, v], 2)
                ssm_k, ssm_v = self.ssm(inputs, ends, cache)
                k = k + ssm_k                                          # k_t = a_t + SSM_K(a)_t
                v = v + ssm_v                                          # v_t = a_t + SSM_V(a)_t
            dtype = q.dtype
            q, k, v = (t.unflatten(-1, (-1, c.head_dim)) for t in (q, k, v))
            if c.qk_norm:                                              # (b, l, heads, head_dim)
                q, k = (norm(t.to(norm.weight.dtype))
                        for norm, t in ((self.q_norm, q), (self.k_norm, k)))
            if rope:
                q, k = rotate(q, *rope), rotate(k, *rope)
            q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
            if cache is None:                                          # (b, heads, l, head_dim)
                out = attend(q, k, v, ends, c.leading_tokens, at)
            else:
                out = cache.attend(q, k, v, ends)
            return self.wo(out.transpose(1, 2).flatten(2))

    def new_cache(self, batch_size: int, max_len: int, max_chunks: int | None = None,
                  dtype: torch.dtype | None = None, device=None) -> "LayerCache":
        """Cache of this layer alone; see Attamba.new_cache."""
        like = first_float(self, dtype, device)
        return LayerCache(self.config, self.layer, batch_size, max_len, max_chunks, like)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay."""
        return undecayed(self)


# ---------------------------------------------------------------------------------------
# Which keys does a query see? This is the definition; `attend`, below, is its fast form.

def attention_mask(ends, leading_tokens):
    """What each query sees, as a picture [1, figure 2]: (b, l) bool -> (b, l queries, l keys) bool.
    Every finished chunk through its last token, and the window: itself and L predecessors.

    >>> ends = torch.tensor([[0, 0, 1, 0, 0, 1, 0, 0]]).bool()
    >>> for row in attention_mask(ends, leading_tokens=1)[0].int().tolist(): print(*row)
    1 0 0 0 0 0 0 0
    1 1 0 0 0 0 0 0
    0 1 1 0 0 0 0 0
    0 0 1 1 0 0 0 0
    0 0 1 1 1 0 0 0
    0 0 1 0 1 1 0 0
    0 0 1 0 0 1 1 0
    0 0 1 0 0 1 1 1
    """
    t = torch.arange(ends.shape[1], device=ends.device)
    distance = t[:, None] - t[None, :]                                  # (l, l), query by key
    near = True if leading_tokens is None else distance <= leading_tokens
    return (distance >= 0) & (near | ends[:, None, :])


def attend_ref(q, k, v, ends, leading_tokens, at=None):
    """Attention through the dense mask: the definition, quadratic in time and memory.
    Arguments and result as in `attend`; at is not needed."""
    mask = attention_mask(ends, leading_tokens)[:, None, -q.shape[2]:]  # (b, 1, lq, l)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


# ---------------------------------------------------------------------------------------
# Where does a chunk end? A rule looks at one token and its position, nothing else: so a
# prefix is cut the same way whatever follows, and cached calls see the same chunks.

def chunk_ends(config, positions, layer, tokens=None):
    """Which tokens end a chunk [1, section 3.2]: positions (l,) int64 -> bool (1, l).

    config: that of the layer (of_layer). Its chunking is one of
      "uniform"  (t + 1) % P == 0
      "cyclic"   the same, earlier by a phase that grows with the layer
      "random"   each token with probability 1 / P, a fixed function of seed, layer and position
      a rule     chunking(tokens, positions, layer) -> bool (b, l), which needs tokens (b, l)
    Raises ValueError for a rule without tokens or that returns something else.

    >>> config = AttambaConfig(vocab_size=8, dim=8, n_layers=2, n_heads=2, chunk_size=4)
    >>> chunk_ends(config, torch.arange(9), layer=0)[0].int().tolist()
    [0, 0, 0, 1, 0, 0, 0, 1, 0]
    >>> chunk_ends(config, torch.arange(9), layer=1)[0].int().tolist()   # phase 1 * 4 // 2 = 2
    [0, 1, 0, 0, 0, 1, 0, 0, 0]
    """
    P, rule = config.chunk_size, config.chunking
    if callable(rule):
        if tokens is None:
            raise ValueError("with a callable chunking the layer needs the mask: "
                             "pass boundaries=rule(tokens, positions, layer)")
        return check_mask(rule(tokens, positions, layer), (len(tokens),), len(positions),
                          "what a chunking rule returns")
    if P is None:
        ends = torch.zeros_like(positions, dtype=torch.bool)
    elif rule == "random":
        x = torch.zeros_like(positions)
        for value in (config.chunking_seed, layer, positions, 0, 0):
            # Mix the bits: xor-shift, multiply, modulo 2^31.
            x = (((x >> 15) ^ x ^ value) * 0x2C1B3C6D + 0x3504F335) & 0x7FFFFFFF
        ends = (x >> 4) % P == 0
    else:
        ends = (positions + 1 + phase(config, layer)) % P == 0
    return ends[None]


def phase(config, layer):
    """How much earlier than "uniform" the layer ends its chunks: floor(layer P / n_layers)."""
    return layer * config.chunk_size // config.n_layers if config.chunking == "cyclic" else 0


def count_ends(config, layer, length):
    """How many of the first `length` tokens end a chunk; None if that depends on the tokens."""
    if callable(config.chunking):
        return None
    if config.chunk_size is None:
        return 0
    if config.chunking == "random":
        return int(chunk_ends(config, torch.arange(length), layer).sum())
    return (length + phase(config, layer)) // config.chunk_size


class Chunks(NamedTuple):
    """The chunks of one layer, as the model hands them to it: the mask, and what attention makes
    of it. They are made outside of the blocks, so that compiled blocks know their sizes."""
    ends: Tensor                   # (1 or b, l) bool, True where a token is the last of its chunk
    at: Tensor | None = None    # (1 or b, most) int64, see end_positions; none with a cache

    @classmethod
    def of(cls, config, layer, positions, b, boundaries, cache, tokens=None):
        """By the caller's boundaries, (b, l), for a lone layer also (1, l), or by config.chunking.
        Raises ValueError where they do not fit, and where the layer's cache has no room."""
        if boundaries is None:
            ends, most = chunk_ends(config, positions, layer, tokens), None
            if cache is None:
                most = count_ends(config, layer, len(positions))
        else:
            rows = (1, b) if tokens is None else (b,)
            ends, most = check_mask(boundaries, rows, len(positions)), None
        if cache is None:
            return cls(ends, end_positions(ends, most))
        cache.check(config, layer, b, ends, boundaries is not None)
        return cls(ends)


def end_positions(ends, most=None):
    """ends (rows, l) bool -> at (rows, most) int64: where the chunks end, in order; l where a row
    has fewer. most: the most ends in a row; None: it is read, or l where that cannot be.

    >>> end_positions(torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 0, 0]]).bool()).tolist()
    [[1, 3, 4], [2, 5, 5]]
    """
    l = ends.shape[1]
    if most is None:
        most = read(ends.sum(1).max(), otherwise=l)
    at = torch.arange(l, device=ends.device).masked_fill(~ends, l)      # (rows, l)
    return at.sort(1).values[:, :most]


def read(x, otherwise):
    """The number in x, or another one that will do where no number can be read: while compiling or
    recording a CUDA graph, under vmap, from meta and fake tensors."""
    if torch.compiler.is_compiling() or x.is_cuda and torch.cuda.is_current_stream_capturing():
        return otherwise
    try:
        return int(x)
    except RuntimeError:
        return otherwise


# ---------------------------------------------------------------------------------------
# What makes a chunk's key and value? A Mamba-2 SSM whose state restarts with every chunk.

class ChunkSSM(nn.Module):
    """The two SSMs of a layer, for keys and for values, side by side [1, section 3; 2]:

        z, dt, u, B, C = split(W_in a_t)
        u, B, C = SiLU(causal depthwise convolution), never across a chunk boundary
        dt = softplus(dt + dt_bias),   A = -exp(A_log)
        h_t = r_t exp(dt_t A) h_{t-1} + dt_t u_t B_t^T,   y_t = h_t C_t + D u_t
        out_t = W_out RMSNorm(y_t * SiLU(z_t))

    r_t is 0 on the first token of a chunk, else 1. The convolution has no bias and the norm no
    weight (W_out absorbs it): zero in, zero out.
    """

    def __init__(self, config: AttambaConfig, dim_in: int, dim_out: int):
        super().__init__()
        c = self.config = config
        conv_dim = c.ssm_inner + 2 * c.ssm_state                                  # u B C
        self.w_in = nn.Parameter(torch.empty(2, c.ssm_inner + c.ssm_heads + conv_dim, dim_in))
        self.w_conv = nn.Parameter(torch.empty(c.conv_size, 2, conv_dim))
        self.dt_bias = nn.Parameter(torch.empty(2, c.ssm_heads))
        self.A_log = nn.Parameter(torch.empty(2, c.ssm_heads))
        self.D = nn.Parameter(torch.empty(2, c.ssm_heads))
        self.w_out = nn.Parameter(torch.empty(2, dim_out, c.ssm_inner))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A fresh state should remember on the order of a chunk: 1 / (dt |A|) is about 14 tokens in
        the geometric mean, from 0.6 to 1000 over the heads [2]."""
        nn.init.normal_(self.w_in, std=0.02)
        nn.init.normal_(self.w_out, std=0.02)
        bound = 1 / math.sqrt(len(self.w_conv))
        self.w_conv.uniform_(-bound, bound)
        dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))                     # inverse softplus
        self.A_log.uniform_(1, 16).log_()
        self.D.fill_(1)

    def forward(self, a, ends, cache=None):
        """a (b, l, dim_in) or, if W_K and W_V are kept, (b, l, 2, dim_in); ends (1 or b, l) bool;
        cache: a LayerCache, whose states h and conv are continued, in place
        -> keys and values (b, l, dim_out) of all tokens, before residual and RoPE."""
        if a.dim() == 3:  # both SSMs read the same
            x = F.linear(a, self.w_in.flatten(0, 1)).unflatten(-1, (2, -1))
        else:
            x = torch.einsum("blsd,sed->blse", a, self.w_in)            # (b, l, 2, z | dt | u B C)
        rates = (t.to(float32_at_least(x)) for t in (self.dt_bias, -self.A_log.exp(), self.D))
        state = () if cache is None else (cache.h, cache.conv)
        y, h, conv = ssm_mix(x, self.w_conv, *rates, ends, *state)      # (b, l, 2, inner)
        if cache is not None:
            cache.h.copy_(h)
            cache.conv.copy_(conv)
        y = F.rms_norm(y, y.shape[-1:], eps=self.config.norm_eps).to(x.dtype)
        return torch.einsum("blsi,sei->sble", y, self.w_out).unbind()


def ssm_mix(x, w_conv, dt_bias, A, D, ends, h=None, conv=None):
    """Convolution, scan and gate of both SSMs: all of ChunkSSM between W_in and the norm.

    x (b, l, 2, z | dt | u B C), w_conv (k, 2, u B C), dt_bias, A and D (2, heads) in at least
    float32, ends (1 or b, l) bool, h (b, 2 heads, p, n) and conv (b, k - 1, 2, u B C) the states
    before x or None for zero -> y SiLU(z) (b, l, 2, inner), and h and conv after x.
    """
    heads, width = A.shape[1], w_conv.shape[2]
    inner = x.shape[3] - heads - width
    n = (width - inner) // 2
    z, dt, uBC = x.split((inner, heads, width), -1)
    uBC, conv = chunk_conv(uBC, w_conv, ends, conv)
    u, B, C = F.silu(uBC).split((inner, n, n), -1)
    dt = F.softplus(dt.to(A.dtype) + dt_bias)                           # (b, l, 2, heads)
    # One scan for both SSMs: 2 * heads, in two groups, each with its B and C.
    u = u.unflatten(-1, (heads, -1)).flatten(2, 3)                      # (b, l, 2 heads, p)
    scan = ssm_scan if x.shape[1] > 1 else ssm_scan_ref
    y, h = scan(u, dt.flatten(2), A.flatten(), B, C, D.flatten(), ends, h)
    return y.flatten(2).unflatten(-1, (2, -1)) * F.silu(z), h, conv


def chunk_conv(x, weight, ends, tail=None):
    """Causal depthwise convolution that never reaches across a chunk boundary.

        y_t = sum_j weight[j] x_{t-j}     over j = 0 ... k-1 while t-j lies in t's chunk

    x (b, l, 2, d), weight (k, 2, d) with weight[0] on the token itself, ends (1 or b, l) bool,
    tail (b, k - 1, 2, d) the last inputs before x, zero outside the current chunk; None: zero
    -> y (b, l, 2, d), and the tail after x. Source: [1, section 3], [2].
    """
    k, l = len(weight), x.shape[1]
    if tail is None:
        tail = x.new_zeros(len(x), k - 1, *x.shape[2:])
    past = torch.cat([tail.to(x.dtype), x], 1)                          # (b, k-1+l, 2, d)
    # The number of each token's chunk; the tail belongs to the first.
    chunk = F.pad(ends.cumsum(1) - ends.long(), (k - 1, 0))[:, :, None, None]
    y = weight[0] * x
    for j in range(1, k):
        back = slice(k - 1 - j, k - 1 - j + l)                          # the tokens t-j
        y = y + weight[j] * past[:, back] * (chunk[:, back] == chunk[:, k - 1:])
    still_open = chunk[:, l:] == ends.sum(1)[:, None, None, None]
    return y.to(x.dtype), past[:, l:] * still_open


def ssm_scan_ref(u, dt, A, B, C, D, ends, h=None):
    """The recurrence, token by token: the definition [2, equation 1].

        h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t^T,   y_t = h_t C_t + D u_t

    After a boundary h is set to zero, which is the r_t = 0 of the next token.

    u (b, l, H, p), dt (b, l, H) positive, A (H,) negative, B and C (b, l, g, n), D (H,),
    ends (1 or b, l) bool, initial state h (b, H, p, n) or None for zero
    -> y (b, l, H, p) and the final state (b, H, p, n), both in at least float32.
    """
    u, dt, B, C = (t.to(float32_at_least(u)) for t in (u, dt, B, C))
    B, C = (t.repeat_interleave(u.shape[2] // t.shape[2], 2) for t in (B, C))     # (b, l, H, n)
    if h is None:
        h = u.new_zeros(len(u), *u.shape[2:], B.shape[-1])
    ys = []
    for u_t, dt_t, B_t, C_t, end_t in zip(*(t.unbind(1) for t in (u, dt, B, C, ends))):
        added = (dt_t[..., None] * u_t)[..., None] * B_t[:, :, None]    # (b, H, p, n)
        h = torch.exp(dt_t * A)[..., None, None] * h + added
        ys.append((h @ C_t[..., None])[..., 0] + D[:, None] * u_t)      # (b, H, p)
        h = h * ~end_t[:, None, None, None]
    return torch.stack(ys, 1), h


def ssm_scan(u, dt, A, B, C, D, ends, h=None, size=None):
    """The same as ssm_scan_ref, in parallel. Written out, the recurrence is a masked matrix product
    [2, section 6]:

        y_i = sum_j M_ij (C_i . B_j) dt_j u_j + D u_i
        M_ij = exp(sum of dt A over j+1 ... i) where j <= i in the same chunk, else 0

    It is done inside blocks of `size` tokens (no matter where chunks end); from block to block
    goes the recurrence itself. A boundary is a zero in M, never a large negative number in a sum.
    size changes the speed only; the default was measured best.
    """
    l, groups = u.shape[1], B.shape[2]
    if size is None:
        size = 64 if u.is_cuda or l > 8192 else 32 if l > 2048 else 16
    size = min(size, l)

    def blocks(t):
        """(b, l, heads, ...) -> (b, blocks, g, heads / g, size, ...), zeros after the sequence: a
        token with dt = 0 has no effect."""
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, -l % size)).unflatten(1, (-1, size))
        return t.transpose(2, 3).unflatten(2, (groups, -1))

    with torch.autocast(u.device.type, enabled=False):
        u, dt, B, C = (t.to(float32_at_least(u)) for t in (u, dt, B, C))
        x, B, C, log_a = blocks(u * dt[..., None]), blocks(B), blocks(C), blocks(dt * A)
        end = F.pad(ends, (0, -l % size)).unflatten(1, (-1, 1, 1, size))
        chunk = end.cumsum(-1) - end.long()              # number of each token's chunk in its block
        same = (chunk[..., :, None] == chunk[..., None, :]).tril()
        # Log-decays summed between two tokens. (A difference of two sums would lose precision.)
        between = log_a[..., None].expand(*log_a.shape, size).tril(-1).cumsum(-2)
        M = torch.exp(between) * same                    # (b, blocks, g, H/g, size, size)
        y = (M * (C @ B.mT)) @ x                         # (b, blocks, g, H/g, size, p)
        # What a block adds to the state that leaves it, and what is left of one that enters it.
        added = (x * (M[..., -1, :] * ~end[..., -1:])[..., None]).mT @ B          # (..., p, n)
        left = torch.exp(log_a.cumsum(-1)) * (chunk == 0)                         # (..., size)
        passed = (left * ~end)[..., -1, None, None]
        h = torch.zeros_like(added[:, 0]) if h is None else h.view_as(added[:, 0])
        entered = []
        for passed_c, added_c in zip(passed.unbind(1), added.unbind(1)):
            entered.append(h)
            h = passed_c * h + added_c                   # (b, g, H/g, p, n)
        y = y + left[..., None] * (C @ torch.stack(entered, 1).mT)
        y = y.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :l]                  # (b, l, H, p)
        return y + D[:, None] * u, h.flatten(1, 2)


def float32_at_least(x):
    """The dtype of decays and states, whatever the model's."""
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------------------------------
# How is attention computed without an l x l map? By blocks of queries.

def attend(q, k, v, ends, leading_tokens, at=None):
    """Attention as attention_mask shows it. A block of queries sees little: the chunk ends before
    it, and its own tokens with the L before them. These keys are put side by side, and a small
    mask says who sees what.

    q (b, heads, lq, head_dim), k and v (b, kv heads, l, head_dim) with lq <= l: the queries are the
    last lq tokens. ends (1 or b, l) bool; at: as from end_positions(ends), None: made here
    -> (b, heads, lq, head_dim)
    """
    lq, l, L = q.shape[2], k.shape[2], leading_tokens
    if (L is None or L >= l - 1) and lq == l:  # the window holds everything: ordinary attention
        return F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                              enable_gqa=q.shape[1] != k.shape[1])
    L = l - 1 if L is None else min(L, l - 1)
    # Keys and values of all tokens, (2, b, heads, l, d), and of the chunk ends, (..., most, d).
    kv = torch.stack([k, v]).repeat_interleave(q.shape[1] // k.shape[1], 2)
    at = end_positions(ends) if at is None else at                      # (1 or b, most)
    kv_ends = torch.take_along_dim(kv, at.clamp(max=l - 1)[None, :, None, :, None], 3)

    size, start, out = max(128, L, l // 64), l - lq, []  # queries a block; at most some 64 blocks
    before = kv[..., :start, :]
    # Split, not sliced: the gradient of every slice would be as long as kv.
    for q_block, block in zip(q.split(size, 2), kv[..., start:, :].split(size, 3)):
        stop = start + q_block.shape[2]
        near = torch.cat([before[..., max(0, before.shape[3] - L):, :], block], 3)
        t = torch.arange(start, stop, device=q.device)[:, None]                   # queries
        s = torch.arange(stop - near.shape[3], stop, device=q.device)             # keys near them
        # The chunk ends past the last query's window; some are still near to other queries.
        most = read((at < stop - 1 - L).sum(1).max(), otherwise=at.shape[1])
        far = at[:, None, :most] < t - L                               # (1 or b, queries, most)
        window = ((s <= t) & (t - s <= L)).expand(len(at), -1, -1)     # (1 or b, queries, near)
        mask = torch.cat([far, window], 2)[:, None]
        seen = torch.cat([kv_ends[..., :most, :], near], 3)
        out.append(F.scaled_dot_product_attention(q_block, *seen, attn_mask=mask))
        before, start = block, stop
    return torch.cat(out, 2)


# ---------------------------------------------------------------------------------------
# How does a key know its place? Rotary positions [3]: a chunk's key carries that of its last token.

def rope_angles(positions, head_dim, theta):
    """positions (l,) -> cos and sin (l, head_dim) float32 [3]. float32 tells positions apart up to
    2^24. Raises ValueError for an odd head_dim: channels are turned in pairs."""
    require("head_dim", head_dim, head_dim % 2 == 0, "even: rotary positions turn channel pairs")
    exponent = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angle = positions.float()[:, None] * theta ** -exponent            # (l, head_dim / 2)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the channel pairs (i, i + head_dim / 2) of x (b, l, heads, head_dim) by the angles of
    cos and sin ([b,] l, head_dim) [3]."""
    left, right = x.chunk(2, -1)
    return x * cos.unsqueeze(-2) + torch.cat([-right, left], -1) * sin.unsqueeze(-2)


# ---------------------------------------------------------------------------------------
# What is remembered between calls? Per layer: the window, the entries of finished chunks, and
# the two SSMs' states. Only the entries in use grow with the context.

class LayerCache:
    """What one attention layer remembers, in tensors whose first dimension is the batch:

    kv        (b, 2, kv heads, W + max_chunks, head_dim): keys (rotated) and values. First the
              window, the last W = L + 1 tokens in order, the newest at its end (if L is None it
              has max_len slots and is filled from the front); then the entries, oldest first
    ends      (b, W) bool: which tokens of the window end a chunk
    n_chunks  (b,) int64: entries in use
    h         (b, 2 SSM heads, p, n): states of the two SSMs, in at least float32
    conv      (b, conv_size - 1, 2, u B C): the last inputs of their convolutions

    One rule: a token that leaves the window keeps an entry if it ended a chunk.
    """

    def __init__(self, config, layer, batch_size, max_len, max_chunks, like):
        require("batch_size", batch_size, batch_size >= 1, "at least 1")
        require("max_len", max_len, max_len >= 1, "at least 1")
        require("max_chunks", max_chunks, (max_chunks or 0) >= 0, "at least 0, or None")
        c, b, L = config, batch_size, config.leading_tokens
        self.config, self.layer, self.max_len, self.position = config, layer, max_len, 0
        self.window = W = max_len if L is None else min(L + 1, max_len)
        self.by_rule = max_chunks is None  # there is room for the rule's chunk ends, not for any
        if max_chunks is None:
            max_chunks = count_ends(c, layer, max_len - W)
        self.max_chunks = max_len - W if max_chunks is None else min(max_chunks, max_len - W)
        self.kv = like.new_zeros(b, 2, c.n_kv_heads, W + self.max_chunks, c.head_dim)
        self.ends = like.new_zeros(b, W, dtype=torch.bool)
        self.n_chunks = like.new_zeros(b, dtype=torch.int64)
        if "ssm" in c.kv:
            self.h = like.new_zeros(b, 2 * c.ssm_heads, c.ssm_inner // c.ssm_heads, c.ssm_state,
                                    dtype=float32_at_least(like))
            self.conv = like.new_zeros(b, c.conv_size - 1, 2, c.ssm_inner + 2 * c.ssm_state)

    @property
    def nbytes(self):
        """Bytes allocated: keys, values, chunk bookkeeping and SSM states."""
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))

    def check(self, config, layer, rows, ends, explicit):
        """Raises ValueError unless this cache was made for that layer and has room for tokens whose
        chunks end at ends (1 or rows, l); explicit: given by the caller. Changes nothing."""
        if (len(self.kv), self.layer, self.config) != (rows, layer, config):
            raise ValueError(f"this cache was made for batch size {len(self.kv)}, layer "
                             f"{self.layer} of {self.config}, but it is used with batch size "
                             f"{rows}, layer {layer} of {config}")
        if self.position + ends.shape[1] > self.max_len:
            raise ValueError(f"the cache is full: it holds {self.position} tokens, "
                             f"{ends.shape[1]} more were given, and max_len is {self.max_len}")
        if self.max_chunks == self.max_len - self.window:  # room for any chunks
            return
        if self.by_rule and explicit:
            raise ValueError("boundaries may end more chunks than config.chunking: say how many "
                             "when the cache is made, new_cache(..., max_chunks=...)")
        if not self.by_rule:
            leaving = self.join(ends)[:, :ends.shape[1]]
            need = int((self.n_chunks + leaving.sum(1)).max())
            if need > self.max_chunks:
                raise ValueError(f"the cache is full: it needs {need} chunk entries, and "
                                 f"max_chunks is {self.max_chunks} (see new_cache)")

    def join(self, ends):
        """ends (1 or b, l) of the next tokens -> with those of the window before them (b, W + l)"""
        return torch.cat([self.ends, ends.expand(len(self.ends), -1)], 1)

    def append(self, kv, ends):
        """Remember the next l tokens: kv (b, 2, kv heads, l, head_dim), ends (1 or b, l). No value
        is read from the device: a GPU need not be waited for."""
        W, l, kv = self.window, kv.shape[3], kv.to(self.kv.dtype)
        if W == self.max_len:  # nothing ever leaves
            self.kv.index_copy_(3, self.position + torch.arange(l, device=kv.device), kv)
        else:
            kv, ends = torch.cat([self.kv[..., :W, :], kv], 3), self.join(ends)
            old, ended = kv[..., :l, :], ends[:, :l]                       # the tokens that leave
            # Those that ended a chunk go to the next free entries, the others to slot 0, which is
            # overwritten at once.
            slot = torch.where(ended, W - 1 + self.n_chunks[:, None] + ended.cumsum(1), 0)
            self.kv.scatter_(3, slot[:, None, None, :, None].expand_as(old), old)
            self.n_chunks += ended.sum(1)
            self.kv[..., :W, :], self.ends[:] = kv[..., l:, :], ends[:, l:]
        self.position += l

    def span(self):
        """The slots of the window that are in use: the first, and the one after the last."""
        if self.window == self.max_len:
            return 0, self.position
        return max(0, self.window - self.position), self.window

    def attend(self, q, k, v, ends):
        """Attention of the next l tokens over themselves and all that is remembered, which they
        join. q (b, heads, l, head_dim), k and v (b, kv heads, l, head_dim), ends (1 or b, l) bool
        -> (b, heads, l, head_dim)"""
        kv = torch.stack([k, v], 1)                                        # (b, 2, kv heads, l, d)
        if q.shape[2] > 1:  # entries, window and new tokens as one sequence; entries are ends
            first, stop = self.span()
            entries = torch.arange(int(self.n_chunks.max()), device=q.device)
            window = torch.arange(first, stop, device=q.device)
            past = self.kv[..., torch.cat([stop + entries, window]), :].to(kv.dtype)
            all_ends = torch.cat([entries < self.n_chunks[:, None], self.ends[:, first:stop],
                                  ends.expand(len(q), -1)], 1)
            self.append(kv, ends)
            k, v = torch.cat([past, kv], 3).unbind(1)
            return attend(q, k, v, all_ends, self.config.leading_tokens)
        # All that one token sees is in the cache, once it is there itself.
        self.append(kv, ends)
        first, stop = self.span()
        stop = stop + self.n_chunks                                        # (b,)
        most = read(stop.max(), otherwise=self.kv.shape[3])
        slot = torch.arange(most, device=q.device)
        mask = (first <= slot) & (slot < stop[:, None])                    # (b, most)
        k, v = self.kv[..., :most, :].unbind(1)
        grouped = q.to(k.dtype).unflatten(1, (k.shape[1], -1)).squeeze(3)  # (b, kv heads, group, d)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask[:, None, None])
        return out.to(q.dtype).reshape(q.shape)


class Cache:
    """What a model remembers of the tokens it has seen: a LayerCache per layer. Plain tensors:
    copy.deepcopy copies it, and rows can be permuted at any time."""

    def __init__(self, layers):
        self.layers = layers

    @property
    def nbytes(self):
        """Bytes allocated, all layers, states included."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def position(self):
        """Tokens seen so far."""
        return self.layers[0].position


@contextlib.contextmanager
def calling(cache):
    """A cache changes in place: a call with one makes no gradients, and does not compile."""
    if cache is None:
        yield
    else:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield


def sample(logits, temperature, top_k, top_p, generator):
    """logits (b, vocab_size) -> token ids (b, 1) int64; the options are those of Attamba.stream."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, ids = logits.sort(-1, descending=True)
    probs = ((logits - logits[:, :1]) / temperature).softmax(-1)
    if top_k is not None:
        probs[:, top_k:] = 0
    if top_p is not None:  # drop a token when the likelier ones already hold top_p
        probs[probs.cumsum(-1) - probs >= top_p] = 0
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator))


# ---------------------------------------------------------------------------------------
# How do weights start? Each module that owns some starts them in its reset_parameters, whenever
# that is called: by its constructor, or by a trainer that builds the model without memory.

def starting(module, std=0.02):
    """The module, its weight drawn from N(0, std^2) now and at every reset_parameters()."""
    module.reset_parameters = partial(draw_weight, module, std)
    module.reset_parameters()
    return module


def draw_weight(module, std):
    """A function of its own, so that models can be pickled."""
    nn.init.normal_(module.weight, std=std)


def small_start(config):
    """For the 2 n_layers matrices that write to the residual stream: together they add as much
    as one would."""
    return 0.02 / math.sqrt(2 * config.n_layers)


def undecayed(module):
    """Names of parameters that are not matrices, though some have two dimensions or more."""
    return {name for name, p in module.named_parameters()
            if p.dim() < 2 or name.split(".")[-1] in ("w_conv", "dt_bias", "A_log", "D")}


def first_float(module, dtype, device):
    """An empty tensor with dtype and device; where None, with those of the module's first
    floating-point parameter (quantised weights are none)."""
    p = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return p.new_empty(0, dtype=dtype, device=device)


# ---------------------------------------------------------------------------------------
# Which input is refused?

def require(name, value, ok, allowed):
    """Raises ValueError unless ok."""
    if not ok:
        raise ValueError(f"{name} must be {allowed}, but it is {value!r}")


def check_config(c):
    """Fills in what is None by default; raises ValueError for a field that is out of range."""
    integers = (                           # fields, the least value, whether None is a value
        ("vocab_size dim n_layers n_heads ssm_state conv_size", 1, False),
        ("n_kv_heads head_dim hidden_dim ssm_inner ssm_heads chunk_size", 1, True),
        ("leading_tokens", 0, True), ("chunking_seed", 0, False))
    for names, least, optional in integers:
        for name in names.split():
            value, values = getattr(c, name), [getattr(c, name)]
            if name in ("chunk_size", "leading_tokens") and isinstance(value, (tuple, list)):
                values = value
                require(name, value, len(value) == c.n_layers,
                        f"one value, or one for each of the {c.n_layers} layers")
            for x in values:
                require(name, x, optional if x is None else type(x) is int and x >= least,
                        f"an integer of at least {least}" + " or None" * optional)
    require("n_heads", c.n_heads, c.head_dim or c.dim % c.n_heads == 0,
            f"a divisor of dim ({c.dim})")
    defaults = dict(n_kv_heads=c.n_heads, head_dim=c.dim // c.n_heads, hidden_dim=3 * c.dim,
                    ssm_inner=max(1, c.dim // 2), ssm_heads=c.n_heads)
    for name, default in defaults.items():
        setattr(c, name, getattr(c, name) or default)
    for name, ok, allowed in (
            ("kv", c.kv in ("ssm", "linear", "linear+ssm"), '"ssm", "linear" or "linear+ssm"'),
            ("chunking", callable(c.chunking) or c.chunking in ("uniform", "cyclic", "random"),
             '"uniform", "cyclic", "random" or a rule (tokens, positions, layer) -> bool (b, l)'),
            ("rope_theta", c.rope_theta > 0, "positive"), ("norm_eps", c.norm_eps > 0, "positive"),
            ("n_kv_heads", c.n_heads % c.n_kv_heads == 0, f"a divisor of n_heads ({c.n_heads})"),
            ("head_dim", c.kv != "ssm" or c.head_dim * c.n_heads == c.dim,
             f'dim / n_heads when kv="ssm": k = a + SSM(a) needs the head slices of a ({c.dim})'),
            ("ssm_heads", c.kv == "linear" or c.ssm_inner % c.ssm_heads == 0,
             f"a divisor of ssm_inner ({c.ssm_inner})")):
        require(name, getattr(c, name), ok, allowed)


def check_tokens(tokens, vocab_size):
    """ValueError for wrong dtypes and shapes, IndexError for ids that are out of range."""
    if (not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32)
            or tokens.dim() != 2 or tokens.numel() == 0):
        raise ValueError("tokens must be int64 or int32 of shape (batch, length), not empty, "
                         f"but got {shape_of(tokens)}")
    low, high = read(tokens.min(), otherwise=0), read(tokens.max(), otherwise=0)
    if low < 0 or high >= vocab_size:
        raise IndexError(f"token ids must lie in 0 ... {vocab_size - 1}, "
                         f"but they range from {low} to {high}")


def check_mask(mask, rows, length, name="boundaries"):
    """mask, if it is bool of shape (one of rows, length)"""
    if (not isinstance(mask, Tensor) or mask.dtype != torch.bool
            or mask.shape not in [(row, length) for row in rows]):
        raise ValueError(f"{name} must be bool of shape ({' or '.join(map(str, rows))}, {length}), "
                         f"but got {shape_of(mask)}")
    return mask


def check_rope(rope, rows, length, head_dim):
    """Broadcasting would hide a table of another length or batch."""
    cos, sin = rope
    one = length, head_dim
    if cos.shape not in (one, (1, *one), (rows, *one)) or sin.shape != cos.shape:
        raise ValueError(f"rope must be cos and sin of shape {one} or {(rows, *one)}, one row for "
                         f"each position of this call, but got {shape_of(cos)}, {shape_of(sin)}")


def shape_of(x):
    """For messages."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


# ---------------------------------------------------------------------------------------
# How does it look? python attamba.py

def demo():
    """Print what two layers see, that two ways of computing agree, and how the cache grows."""
    torch.manual_seed(0)
    config = AttambaConfig(vocab_size=256, dim=64, n_layers=2, n_heads=2,
                           chunk_size=4, leading_tokens=2)
    print("What a query (row) sees of each key (column), chunks of P = 4 tokens, L = 2:\n"
          "w in its window, C end of a chunk past the window, . nothing\n")
    for layer in range(2):
        print(f"layer {layer}")
        mask = attention_mask(chunk_ends(config, torch.arange(14), layer), 2)[0].tolist()
        for t, row in enumerate(mask):
            print("   ", " ".join(".wC"[see + (see and t - s > 2)] for s, see in enumerate(row)))

    model, tokens = Attamba(config), torch.randint(256, (1, 100))
    cache = model.new_cache(1, 100)
    steps = torch.cat([model(t, cache=cache) for t in tokens.split(1, 1)], 1)
    print("\n100 tokens step by step (recurrent, cached) and all at once (parallel):\n"
          f"logits differ by at most {(steps - model(tokens)).abs().max().item():.1e}")

    print("\nKV cache, bytes of one sequence\n\n tokens  transformer    Attamba  ratio")
    plain = Attamba(replace(config, kv="linear", leading_tokens=None))
    for length in (16, 256, 4096, 65536):
        a, b = (m.new_cache(1, length).nbytes for m in (plain, model))
        print(f"{length:7}  {a:11,}  {b:9,}  {a / b:5.1f}")


if __name__ == "__main__":
    demo()
