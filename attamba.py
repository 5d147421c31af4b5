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
forgotten (and the short convolution starts anew). The key and value of that token, made like all
others, stand for the whole chunk once the token has left the window. No key is seen twice.

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
                   which SSMs, attention and cache are told about chunks; a caller's own mask is
                   handed over as `boundaries`
at                 positions of these tokens, made from ends
W                  slots of a cache's window: L + 1, or all max_len tokens
a                  input of a layer
q k v              queries, keys, values
h                  state of an SSM
u dt B C, A D, z   its input, step size, input and output map; decay, skip; gate
H p n g            SSM heads (of both SSMs together), channels per head, state size, groups of
                   heads that share B and C (one for each SSM)
t s                position of a query, of a key
c                  the config

[1] Akhauri, Huda, Abdelfattah. Attamba: Attending To Multi-Token States. arXiv 2411.17685
[2] Dao, Gu. Transformers are SSMs (Mamba-2). arXiv 2405.21060
[3] Su et al. RoFormer (rotary positions, RoPE). arXiv 2104.09864
[4] Shazeer. GLU variants improve transformer (SwiGLU). arXiv 2002.05202
"""
import contextlib
import functools
import inspect
import math
import os
import sys
from dataclasses import dataclass, replace
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# ---------------------------------------------------------------------------------------
# What can be chosen? Three knobs, kv, chunk_size and leading_tokens, span the whole family
# from transformer to SSM.

@dataclass(unsafe_hash=True)
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
    ssm_heads: int | None = None               # heads of each SSM, one decay each; None: n_heads
    conv_size: int = 4                         # taps of the causal convolution
    qk_norm: bool = False                      # normalise queries and keys per head
    rope_theta: float = 1e4                    # base of the rotary positions
    tie_embeddings: bool = False               # output layer shares the embedding
    norm_eps: float = 1e-5                     # epsilon of every RMSNorm

    def __post_init__(self):
        complete_config(self)

    def of_layer(self, layer):
        """The same with chunk_size and leading_tokens of that layer."""
        def pick(value):
            return value[layer] if isinstance(value, (tuple, list)) else value
        return replace(self, chunk_size=pick(self.chunk_size),
                       leading_tokens=pick(self.leading_tokens))


# ---------------------------------------------------------------------------------------
# What is the model? A pre-norm transformer; only the attention inside is new.

class Attamba(nn.Module):
    """Language model: embedding, n_layers blocks, norm, output layer. The shapes of its weights do
    not depend on chunk_size, leading_tokens or chunking: a model with other values can load them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layer_configs = [config.of_layer(layer) for layer in range(config.n_layers)]
        self.embed = starting(nn.Embedding(config.vocab_size, config.dim))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = starting(nn.Linear(config.dim, config.vocab_size, bias=False))
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens, *, boundaries=None, cache=None, last=False):
        """tokens (b, l) int64 or int32 -> logits (b, l, vocab_size).

        boundaries: bool (b, l), True where a token ends its chunk, in all layers; default:
        config.chunking. cache: from new_cache; the tokens continue it and it advances in place,
        without gradients. last: logits (b, 1, vocab_size) of the last token alone.
        Raises ValueError for wrong dtypes, shapes, an empty sequence, a cache that is full or made
        for another config or batch size, IndexError for ids outside the vocabulary.
        """
        check_tokens(tokens, self.config.vocab_size)
        positions = positions_of(tokens, cache)                                   # (l,)
        rope = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        layers = [None] * len(self.blocks) if cache is None else cache.layers
        # First the chunks of all layers, checked: an error must not leave a cache half advanced.
        chunks = [Chunks.of(c, layer, positions, (len(tokens),), boundaries, layer_cache, tokens)
                  for layer, (c, layer_cache) in enumerate(zip(self.layer_configs, layers))]
        with calling(cache):
            x = self.embed(tokens)                                                # (b, l, d)
            for block, layer_chunks, layer_cache in zip(self.blocks, chunks, layers):
                x = block(x, boundaries=layer_chunks, cache=layer_cache, rope=rope)
            if last:
                x = x[:, -1:]
            return self.head(self.norm(x))                                # (b, l, vocab_size)

    def new_cache(self, batch_size, max_len, max_chunks=None, dtype=None, device=None):
        """Allocate everything that decoding up to max_len tokens needs, at once.

        max_chunks: entries for chunk ends in each layer; default: what config.chunking can need
        (a rule of your own could end a chunk at every token). Explicit boundaries may need it.
        dtype, device: default those of the first floating-point parameter.
        Raises ValueError for sizes below 1 (max_chunks: below 0).
        """
        like = first_float(self, dtype, device)
        return Cache([LayerCache(c, layer, batch_size, max_len, max_chunks, like)
                      for layer, c in enumerate(self.layer_configs)])

    def stream(self, tokens, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, seed=None,
               max_chunks=None, cuda_graph=False):
        """Continue tokens (b, l); yields (b, 1) int64 max_new_tokens times.

        temperature 0 takes the likeliest token; top_k and top_p (probability mass) cut the tail;
        seed repeats a sample; max_chunks: of the cache, see new_cache. Every token is a call of
        the model itself, so that hooks, wrappers and an overridden forward count. cuda_graph:
        record a step on a GPU and replay it for the others, for the length of this call; faster,
        but hooks fire only while it is recorded, and a chunking rule must not read values.
        Raises ValueError for a negative temperature or count, top_k below 1, top_p outside (0, 1],
        and what forward raises for tokens.
        """
        check_tokens(tokens, self.config.vocab_size)
        for name, value in dict(max_new_tokens=max_new_tokens, temperature=temperature).items():
            require(name, value, value >= 0, "at least 0")
        require("top_k", top_k, top_k is None or top_k >= 1, "at least 1, or None")
        require("top_p", top_p, top_p is None or 0 < top_p <= 1, "in (0, 1], or None")
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        cache = self.new_cache(len(tokens), tokens.shape[1] + max_new_tokens, max_chunks)
        # An overridden forward need not know `last`, which spares the logits of a whole prompt.
        last = {"last": True} if "last" in inspect.signature(self.forward).parameters else {}
        model = RecordedStep(self, cache) if cuda_graph and tokens.is_cuda else self

        def steps(tokens):  # a generator of its own: what is refused, is refused at the call
            for _ in range(max_new_tokens):
                logits = model(tokens, cache=cache, **last)[:, -1].float()        # (b, vocab_size)
                tokens = sample(logits, temperature, top_k, top_p, generator)     # (b, 1)
                yield tokens
        return steps(tokens)

    def generate(self, tokens, max_new_tokens, **options):
        """tokens (b, l) -> (b, l + max_new_tokens), sampled with the options of `stream`."""
        return torch.cat([tokens, *self.stream(tokens, max_new_tokens, **options)], 1)

    def no_weight_decay(self):
        """Names of the parameters that take no weight decay (norms, convolutions, A, dt, D)."""
        return undecayed(self)


class Block(nn.Module):
    """x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)). (b, l, d) -> (b, l, d) [1; 4]
    Options as those of AttambaAttention."""

    def __init__(self, config, layer):
        super().__init__()
        dim, hidden = config.dim, config.hidden_dim
        self.norm1 = nn.RMSNorm(dim, eps=config.norm_eps)
        self.attention = AttambaAttention(config, layer)
        self.norm2 = nn.RMSNorm(dim, eps=config.norm_eps)
        self.w_gate_up = starting(nn.Linear(dim, 2 * hidden, bias=False))
        self.w_down = starting(nn.Linear(hidden, dim, bias=False), small_start(config))

    def forward(self, x, **options):
        x = x + self.attention(self.norm1(x), **options)
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
    it, so that, with one P for P layers or more, every token ends a chunk in some.
    """

    def __init__(self, config, layer):
        super().__init__()
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

    def forward(self, a, *, boundaries=None, cache=None, rope=None):
        """a (b, l, d) -> (b, l, d).

        boundaries: bool (b, l) or (1, l), True where a token ends its chunk; default: by
        config.chunking. cache: from new_cache; a continues it and it advances in place, without
        gradients. rope: cos and sin (l, head_dim), or (1 or b, l, head_dim), of these l positions
        as from rope_angles; None: made here; False: none, for a model that adds positions of its
        own. Raises ValueError for an empty input, for a mask, angles or a cache that do not fit,
        for a chunking rule without a mask.
        """
        if a.dim() != 3 or a.numel() == 0:
            raise ValueError(f"the input must be of shape (batch, length, {self.config.dim}), not "
                             f"empty, but got {shape_of(a)}")
        c, positions = self.config, positions_of(a, cache)
        if not isinstance(boundaries, Chunks):                         # the model hands over Chunks
            boundaries = Chunks.of(c, self.layer, positions, (1, len(a)), boundaries, cache)
        ends, at, table = boundaries
        if rope is None:
            rope = rope_angles(positions, c.head_dim, c.rope_theta)
        elif rope:  # given
            check_rope(rope, *a.shape[:2], c.head_dim)

        with torch.set_grad_enabled(cache is None and torch.is_grad_enabled()):
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
            # (b, l, heads, head_dim) each
            q, k, v = (t.unflatten(-1, (-1, c.head_dim)) for t in (q, k, v))
            if c.qk_norm:  # in the weight's dtype also under autocast
                q, k = (norm(t.to(norm.weight.dtype))
                        for norm, t in ((self.q_norm, q), (self.k_norm, k)))
            if rope:
                q, k = rotate(q, *rope), rotate(k, *rope)
            # (b, heads, l, head_dim) each
            q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
            if cache is None:
                out = attend(q, k, v, ends, c.leading_tokens, at, table)
            else:
                out = cache.attend(q, k, v, ends)
            return self.wo(out.transpose(1, 2).flatten(2))

    def new_cache(self, batch_size, max_len, max_chunks=None, dtype=None, device=None):
        """Cache of this layer alone; see Attamba.new_cache."""
        return LayerCache(self.config, self.layer, batch_size, max_len, max_chunks,
                          first_float(self, dtype, device))

    def no_weight_decay(self):
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


def attend_ref(q, k, v, ends, leading_tokens, *_):
    """Attention through the dense mask: the definition, quadratic in time and memory.
    Arguments and result as in `attend`."""
    mask = attention_mask(ends, leading_tokens)[:, None, -q.shape[2]:]  # (b, 1, lq, l)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


# ---------------------------------------------------------------------------------------
# Where does a chunk end? A rule must look at one token and its position (and the layer), nothing
# else: so a prefix is cut the same way whatever follows, and cached calls see the same chunks.

def chunk_ends(config, positions, layer, tokens=None):
    """Which tokens end a chunk [1, section 3.2]: positions (l,) int64 -> bool
    (1, l), by a rule of your own (b, l).

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
        for value in (config.chunking_seed, layer, positions, 0, 0):  # two rounds more, to mix
            x = (((x >> 15) ^ x ^ value) * 0x2C1B3C6D + 0x3504F335) & 0x7FFFFFFF  # modulo 2^31
        ends = (x >> 4) % P == 0                                       # low bits mix the least
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
    return (length + phase(config, layer)) // config.chunk_size        # phase < P


class Chunks(NamedTuple):
    """The chunks of one layer, as the model hands them to it: the mask, and what attention makes
    of it. How many ends there are is read from values, which a compiled block cannot do: so all
    this is made before the blocks run."""
    ends: Tensor                   # (1 or b, l) bool, True where a token is the last of its chunk
    at: Tensor | None = None       # (1 or b, most) int64, see end_positions; none with a cache
    table: tuple | None = None     # the same for a GPU, see flex_table at the end of the file

    @classmethod
    def of(cls, config, layer, positions, rows, boundaries, cache, tokens=None):
        """By the caller's boundaries or by config.chunking (a rule needs tokens). rows: how many
        rows boundaries may have, the batch size last. Raises ValueError where they do not fit, and
        where the layer's cache has no room."""
        explicit, l = boundaries is not None, len(positions)
        # On a GPU the chunks of a named rule are kept (kept_chunks, at the end of the file).
        if not explicit and cache is None and are_kept(config, positions):
            return kept_chunks(config, layer, l, positions.device)
        if explicit:
            ends = check_mask(boundaries, rows, l)
        else:
            ends = chunk_ends(config, positions, layer, tokens)
        if cache is not None:
            cache.check(config, layer, rows[-1], ends, explicit)
            return cls(ends)
        at = end_positions(ends)
        return cls(ends, at, flex_table(at, config.leading_tokens, l, l))


def read(x, otherwise):
    """The number in x, or another one that will do where no number can be read: while compiling or
    recording a CUDA graph, under vmap, from meta and fake tensors."""
    recording = isinstance(x, Tensor) and x.is_cuda and torch.cuda.is_current_stream_capturing()
    if recording or torch.compiler.is_compiling():
        return otherwise
    try:
        return int(x)
    except RuntimeError:
        return otherwise


def end_positions(ends):
    """ends (rows, l) bool -> at (rows, most) int64: where the chunks end, in order; l where a row
    has fewer. most: of all rows; l where it cannot be read.

    >>> end_positions(torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 0, 0]]).bool()).tolist()
    [[1, 3, 4], [2, 5, 5]]
    """
    l = ends.shape[1]
    most = read(ends.sum(1).max(), otherwise=l)
    at = torch.arange(l, device=ends.device).masked_fill(~ends, l)      # (rows, l)
    return at.sort(1).values[:, :most]


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

    def __init__(self, config, dim_in, dim_out):
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
    def reset_parameters(self):
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
        if a.dim() == 3:  # both SSMs read the same: one product with W_in (2, e, d) as (2 e, d)
            x = F.linear(a, self.w_in.flatten(0, 1)).unflatten(-1, (2, -1))
        else:
            x = torch.einsum("blsd,sed->blse", a, self.w_in)            # (b, l, 2, z | dt | u B C)
        dt_bias, A_log, D = (t.to(float32_at_least(x)) for t in (self.dt_bias, self.A_log, self.D))
        state = () if cache is None else (cache.h, cache.conv)
        mix = ssm_mix if x.shape[1] > 1 or cache is None else ssm_mix_step
        if kernels_fit(x, self.w_conv, self.D.shape[1]):
            mix = ssm_mix_cuda                           # the same, at the end of the file
        y, h, conv = mix(x, self.w_conv, dt_bias, -A_log.exp(), D, ends, *state)  # (b, l, 2, inner)
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
    dt = F.softplus(dt + dt_bias)                                       # (b, l, 2, heads)
    # One scan for both SSMs: 2 * heads, in two groups, each with its B and C.
    u = u.unflatten(-1, (heads, -1)).flatten(2, 3)                      # (b, l, 2 heads, p)
    y, h = ssm_scan(u, dt.flatten(2), A.flatten(), B, C, D.flatten(), ends, h)
    return y.flatten(2).unflatten(-1, (2, -1)) * F.silu(z), h, conv


def ssm_mix_step(x, w_conv, dt_bias, A, D, ends, h, conv):
    """ssm_mix of one token that continues h and conv: the equations as they stand. x (b, 1, 2,
    z | dt | u B C); h, conv and the results as there."""
    (_, H, p, n), heads, width = h.shape, A.shape[1], w_conv.shape[2]
    z, dt, uBC = x.split((heads * p, heads, width), -1)                 # (b, 1, 2, ...)
    past, keep = torch.cat([conv.to(x.dtype), uBC], 1), ~ends[..., None, None]
    uBC = F.silu((past * w_conv.flip(0)).sum(1))                        # w_conv[0] is on the newest
    u, B, C = uBC.split((heads * p, n, n), -1)                          # (b, 2, ...)
    dt = F.softplus(dt[:, 0] + dt_bias).flatten(1)                      # (b, 2 heads)
    y, h = ssm_step(h, u.reshape(-1, H, p), dt, A.flatten(), B, C, D.flatten())
    return y.view(len(x), 1, 2, -1) * F.silu(z), h * keep, past[:, 1:] * keep


def ssm_step(h, u, dt, A, B, C, D):
    """One token of the recurrence [2, equation 1]:

        h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t^T,   y_t = h_t C_t + D u_t

    h (b, H, p, n), u (b, H, p), dt (b, H) positive, A (H,) negative, B and C (b, g, n), D (H,)
    -> y (b, H, p), and h after the token
    """
    b, H, p, n = h.shape
    # Heads and channels of a group side by side, so that its B and C broadcast.
    added = (dt[..., None] * u).view(b, B.shape[1], -1, 1) * B[:, :, None]        # (b, g, H/g p, n)
    h = torch.exp(dt * A)[..., None, None] * h + added.view_as(h)
    y = (h.view_as(added) * C[:, :, None]).sum(-1)                      # autocast leaves this alone
    return y.view_as(u) + D[:, None] * u, h


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
    # The number of each token's chunk: ends 0 1 0 0 1 -> 0 0 1 1 1; the tail lies in the first.
    chunk = F.pad(ends.cumsum(1) - ends.long(), (k - 1, 0))[:, :, None, None]
    y = weight[0] * x
    for j in range(1, k):
        back = slice(k - 1 - j, k - 1 - j + l)                          # the tokens t-j
        y = torch.addcmul(y, past[:, back], weight[j] * (chunk[:, back] == chunk[:, k - 1:]))
    # The last k - 1 inputs, but for those whose chunk has ended.
    return y.to(x.dtype), past[:, l:] * (chunk[:, l:] == ends.sum(1)[:, None, None, None])


def ssm_scan_ref(u, dt, A, B, C, D, ends, h=None):
    """The recurrence, token by token: the definition. After a boundary h is set to zero, which is
    the r_t = 0 of the next token.

    u (b, l, H, p), dt (b, l, H) positive, A (H,) negative, B and C (b, l, g, n), D (H,),
    ends (1 or b, l) bool, initial state h (b, H, p, n) or None for zero
    -> y (b, l, H, p) and the final state (b, H, p, n), both in at least float32.
    """
    u, dt, B, C = (t.to(float32_at_least(u)) for t in (u, dt, B, C))
    if h is None:
        h = u.new_zeros(len(u), *u.shape[2:], B.shape[-1])
    ys = []
    for u_t, dt_t, B_t, C_t, end_t in zip(*(t.unbind(1) for t in (u, dt, B, C, ends))):
        y_t, h = ssm_step(h, u_t, dt_t, A, B_t, C_t, D)
        h = h * ~end_t[:, None, None, None]
        ys.append(y_t)
    return torch.stack(ys, 1), h


def ssm_scan(u, dt, A, B, C, D, ends, h=None):
    """The same as ssm_scan_ref, in parallel. Written out, the recurrence is a masked matrix product
    [2, section 6]:

        y_i = sum_j M_ij (C_i . B_j) dt_j u_j + D u_i
        M_ij = exp(sum of dt A over j+1 ... i) where j <= i in the same chunk, else 0

    It is done inside blocks of `size` tokens (no matter where chunks end); from block to block
    goes the recurrence itself. A boundary is a zero in M, never a large negative number in a sum.
    """
    l, groups = u.shape[1], B.shape[2]
    size = min(l, 32)                                    # measured best, on a CPU

    def blocks(t):
        """(b, l, heads, ...) -> (b, blocks, g, heads / g, size, ...), zeros after the sequence: a
        token with dt = 0 has no effect."""
        in_dimension_1 = (0, 0) * (t.dim() - 2) + (0, -l % size)       # as F.pad wants it
        t = F.pad(t, in_dimension_1).unflatten(1, (-1, size))
        return t.transpose(2, 3).unflatten(2, (groups, -1))

    with torch.autocast("cpu" if u.is_meta else u.device.type, enabled=False):
        u, dt, B, C = (t.to(float32_at_least(u)) for t in (u, dt, B, C))
        x, B, C, log_a = blocks(u * dt[..., None]), blocks(B), blocks(C), blocks(dt * A)
        end = F.pad(ends, (0, -l % size)).unflatten(1, (-1, 1, 1, size))
        chunk = end.cumsum(-1) - end.long()              # number of each token's chunk in its block
        same = (chunk[..., :, None] == chunk[..., None, :]).tril()
        # between[i, j]: the log-decays of j+1 ... i. (A difference of two sums is less precise.)
        between = log_a[..., None].expand(*log_a.shape, size).tril(-1).cumsum(-2)
        M = torch.exp(between) * same                    # (b, blocks, g, H/g, size, size)
        y = (M * (C @ B.mT)) @ x                         # (b, blocks, g, H/g, size, p)
        # From block to block. added: what a block adds to the state that leaves it. left: what its
        # tokens still have of the state that entered it; passed: what leaves it of that state.
        added = (x * (M[..., -1, :] * ~end[..., -1:])[..., None]).mT @ B          # (..., p, n)
        left = torch.exp(log_a.cumsum(-1)) * (chunk == 0)                         # (..., size)
        passed = (left * ~end)[..., -1, None, None]
        h = torch.zeros_like(added[:, 0]) if h is None else h.to(u.dtype).view_as(added[:, 0])
        entered = []
        for passed_i, added_i in zip(passed.unbind(1), added.unbind(1)):
            entered.append(h)
            h = passed_i * h + added_i                   # (b, g, H/g, p, n)
        y = y + left[..., None] * (C @ torch.stack(entered, 1).mT)
        y = y.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :l]                  # (b, l, H, p)
        return y + D[:, None] * u, h.flatten(1, 2)


def positions_of(x, cache):
    """Of the tokens x (b, l, ...), which continue a cache if there is one: (l,) int64"""
    return torch.arange(x.shape[1], device=x.device) + (0 if cache is None else cache.position)


def float32_at_least(x):
    """The dtype of decays and states, whatever the model's."""
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------------------------------
# How is attention computed without an l x l map? By blocks of queries.

def attend(q, k, v, ends, leading_tokens, at=None, table=None):
    """Attention as attention_mask shows it. A block of queries sees little: the chunk ends before
    it, and its own tokens with the L before them. These keys are put side by side, and a small
    mask says who sees what.

    q (b, heads, lq, head_dim), k and v (b, kv heads, l, head_dim) with lq <= l: the queries are the
    last lq tokens. ends (1 or b, l) bool; at and table: see Chunks, None: made here
    -> (b, heads, lq, head_dim)
    """
    lq, l, L = q.shape[2], k.shape[2], leading_tokens
    if (L is None or L >= l - 1) and lq == l:  # the window holds everything: ordinary attention
        return F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                              enable_gqa=q.shape[1] != k.shape[1])
    at = end_positions(ends) if at is None else at                      # (1 or b, most)
    if flex_fits(q):
        return attend_flex(q, k, v, *(table or flex_table(at, L, lq, l)))
    L = l - 1 if L is None else min(L, l - 1)
    # Keys and values of all tokens, (2, b, heads, l, d), and of the chunk ends, (..., most, d).
    kv = torch.stack([k, v]).repeat_interleave(q.shape[1] // k.shape[1], 2)
    kv_ends = torch.take_along_dim(kv, at.clamp(max=l - 1)[None, :, None, :, None], 3)

    # At most some 64 blocks of queries, of at least L: no window reaches past the block before.
    size, start, out = max(128, L, l // 64), l - lq, []
    before = kv[..., :start, :]
    # Split, not sliced: the gradient of every slice would be as long as kv.
    for q_block, block in zip(q.split(size, 2), kv[..., start:, :].split(size, 3)):
        stop = start + q_block.shape[2]
        near = torch.cat([before[..., max(0, before.shape[3] - L):, :], block], 3)
        t = torch.arange(start, stop, device=q.device)[:, None]                   # queries
        s = torch.arange(stop - near.shape[3], stop, device=q.device)             # keys near them
        # The chunk ends past the last query's window; for earlier queries a mask hides some.
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
              window, the last W = L + 1 tokens in order, the newest at its end (a window of
              max_len is filled from the front); then the entries, oldest first
    ends      (b, W) bool: which tokens of the window end a chunk (unused in one of max_len, where
              all tokens are in the window of each)
    n_chunks  (b,) int64: entries in use
    h         (b, 2 SSM heads, p, n): states of the two SSMs, in at least float32
    conv      (b, conv_size - 1, 2, u B C): the last inputs of their convolutions

    One rule: a token that leaves the window keeps an entry if it ended a chunk.
    """

    def __init__(self, config, layer, batch_size, max_len, max_chunks, like):
        for name, value in dict(batch_size=batch_size, max_len=max_len).items():
            require(name, value, value >= 1, "at least 1")
        require("max_chunks", max_chunks, (max_chunks or 0) >= 0, "at least 0, or None")
        c, b, L = config, batch_size, config.leading_tokens
        self.config, self.layer, self.max_len, self.position = config, layer, max_len, 0
        self.window = W = max_len if L is None else min(L + 1, max_len)
        self.by_rule, most = max_chunks is None, max_len - W  # so many tokens can leave the window
        if self.by_rule:  # room for the chunk ends of config.chunking; None: any token may be one
            max_chunks = count_ends(c, layer, most)
        self.max_chunks = most if max_chunks is None else min(max_chunks, most)
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
        if read(self.position, otherwise=0) + ends.shape[1] > self.max_len:
            raise ValueError(f"the cache is full: it holds {self.position} tokens, "
                             f"{ends.shape[1]} more were given, and max_len is {self.max_len}")
        if self.max_chunks == self.max_len - self.window:  # room for any chunks
            return
        if self.by_rule and explicit:
            raise ValueError("boundaries may end more chunks than config.chunking: say how many "
                             "when the cache is made, new_cache(..., max_chunks=...)")
        # Else there is room: the rule's chunk ends were counted. (No recorded step comes here.)
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
        is read here: a GPU need not be waited for."""
        W, l, kv = self.window, kv.shape[3], kv.to(self.kv.dtype)
        if W == self.max_len:  # nothing ever leaves
            self.kv.index_copy_(3, self.position + torch.arange(l, device=kv.device), kv)
        else:
            kv, ends = torch.cat([self.kv[..., :W, :], kv], 3), self.join(ends)
            old, ended = kv[..., :l, :], ends[:, :l]                       # the tokens that leave
            # Those that ended a chunk go to the next free entries, the others (empty slots, too) to
            # slot 0, which is overwritten at once.
            slot = torch.where(ended, W - 1 + self.n_chunks[:, None] + ended.cumsum(1), 0)
            self.kv.scatter_(3, slot[:, None, None, :, None].expand_as(old), old)
            self.n_chunks += ended.sum(1)
            self.kv[..., :W, :], self.ends[:] = kv[..., l:, :], ends[:, l:]
        self.position = self.position + l

    def span(self):
        """The slots of the window in use: the first, and the one after the last."""
        if self.window == self.max_len:
            return 0, self.position
        # A step is recorded only when the window is full; then position is a tensor.
        return max(0, self.window - read(self.position, otherwise=self.window)), self.window

    def attend(self, q, k, v, ends):
        """Attention of the next l tokens over themselves and all that is remembered, which they
        join. q (b, heads, l, head_dim), k and v (b, kv heads, l, head_dim), ends (1 or b, l) bool
        -> (b, heads, l, head_dim)"""
        kv = torch.stack([k, v], 1)                                        # (b, 2, kv heads, l, d)
        if q.shape[2] > 1:
            # Entries, window and new tokens as one sequence. Entries are chunk ends, and there are
            # some only behind a full window: out of reach of the new tokens' windows, as before.
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
        stops, slots = stop + self.n_chunks, self.kv.shape[3]              # (b,)
        # In steps of 64 slots: libraries prepare themselves anew for each size that they see.
        most = min(-(-read(stops.max(), otherwise=slots) // 64) * 64, slots)
        slot = torch.arange(most, device=q.device)
        mask = slot < stops[:, None]                                       # (b, most)
        if first > 0:  # the window is not full yet
            mask = mask & (slot >= first)
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
    """A cache changes in place: a call with one makes no gradients, and blocks that were compiled
    for training run uncompiled."""
    if cache is None:
        yield
        return
    was_compiled = "torch._dynamo" in sys.modules          # if anything was
    with torch.no_grad(), (torch.compiler.set_stance("force_eager") if was_compiled
                           else contextlib.nullcontext()):
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
    """The module, its weight drawn from N(0, std^2). Its own reset_parameters is replaced, so that
    a trainer that calls it (after a start on the meta device, say) draws the same."""
    module.reset_parameters = functools.partial(draw_weight, module, std)
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


def complete_config(c):
    """Checks each field, fills in what is None by default, checks fields with each other."""
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
    for name, default in dict(n_kv_heads=c.n_heads, head_dim=c.dim // c.n_heads,
                              hidden_dim=3 * c.dim, ssm_inner=c.dim // 2 or 1,
                              ssm_heads=c.n_heads).items():
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
    (cos, sin), one = rope, (length, head_dim)
    if cos.shape not in (one, (1, *one), (rows, *one)) or sin.shape != cos.shape:
        raise ValueError(f"rope must be cos and sin of shape {one} or {(rows, *one)}, one row for "
                         f"each position of this call, but got {shape_of(cos)}, {shape_of(sin)}")


def shape_of(x):
    """For messages."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


# ---------------------------------------------------------------------------------------
# How does it look? python attamba.py

def demo():
    """Print what two layers see, and that two ways of computing agree."""
    config = AttambaConfig(vocab_size=256, dim=64, n_layers=2, n_heads=2,
                           chunk_size=4, leading_tokens=2)
    print("What a query (row) sees of each key (column), chunks of P = 4 tokens, L = 2:\n"
          "w in its window, C end of a chunk past the window, . nothing\n")
    for layer in range(2):
        print(f"layer {layer}")
        mask = attention_mask(chunk_ends(config, torch.arange(14), layer), 2)[0].tolist()
        for t, row in enumerate(mask):
            print("   ", *("." if not see else "w" if t - s <= 2 else "C"
                           for s, see in enumerate(row)))

    model, tokens = Attamba(config), torch.randint(256, (1, 100))
    cache = model.new_cache(1, 100)
    steps = torch.cat([model(t, cache=cache) for t in tokens.split(1, 1)], 1)
    print("\n100 tokens step by step (recurrent, cached) and all at once (parallel):\n"
          f"logits differ by at most {(steps - model(tokens)).abs().max().item():.1e}")


# ---------------------------------------------------------------------------------------
# The optional CUDA path: the same results, faster on a GPU. Everything above is complete without
# it; nothing below is needed to understand Attamba.

from torch.nn.attention.flex_attention import BlockMask, flex_attention  # noqa: E402

# Attention: the keys of the chunk ends, padded to whole tiles, are put in front of all tokens'
# keys. Then any chunks are one block-sparse mask, and FlexAttention computes it.

TILE = 128                                             # queries, and keys, of a tile of the mask


def flex_fits(q):
    """Whether attend_flex can take these queries."""
    return q.is_cuda and q.dtype != torch.float64 and q.shape[-1] >= 16


def are_kept(config, positions):
    """Chunks of a named rule depend on the length alone: on a GPU, where making them is many small
    kernels, those of the last lengths are kept. (Not of fake tensors, a class of their own.)"""
    return (type(positions) is Tensor and positions.is_cuda and not callable(config.chunking)
            and not torch.compiler.is_compiling())


@functools.lru_cache(maxsize=32)
def kept_chunks(config, layer, l, device):
    """Those of positions 0 ... l - 1. Inference tensors could not be trained with later."""
    with torch.inference_mode(False):
        ends = chunk_ends(config, torch.arange(l, device=device), layer)
        at = end_positions(ends)
        return Chunks(ends, at, flex_table(at, config.leading_tokens, l, l))


def flex_table(at, leading_tokens, lq, l):
    """What the last lq of l queries see of [chunk ends | tokens], by tiles. at (1 or b, most) as
    from end_positions -> at padded to whole tiles, and a BlockMask; None where it is not needed:
    on a CPU, and where the window holds everything."""
    L = l - 1 if leading_tokens is None else min(leading_tokens, l - 1)
    if not at.is_cuda or L == l - 1 and lq == l:
        return None
    return block_mask(F.pad(at, (0, -at.shape[1] % TILE), value=l).int(), L, lq, l)


def block_mask(at, L, lq, l):
    """flex_table on any device, for at that is padded."""
    rows, E, device = *at.shape, at.device
    low = torch.arange(l - lq, l, TILE, device=device)                 # first query of each tile
    high = (low + TILE).clamp(max=l) - 1                               # and its last

    def seen(t):
        """How many chunk ends the queries t see past their window: (rows, tiles)"""
        return torch.searchsorted(at, (t - L).int().expand(rows, -1).contiguous())

    # Tiles of keys (columns): chunk ends that all queries of a tile (rows) see need no mask.
    end, key = torch.arange(E // TILE, device=device), torch.arange(0, l, TILE, device=device)
    full = end < (seen(low) // TILE)[..., None]
    some = end < (-(-seen(high) // TILE))[..., None]
    near = (key <= high[:, None]) & (low[:, None] - key < L + TILE)    # (tiles of queries, of keys)
    full, some = F.pad(full, (0, len(key))), torch.cat([some, near.expand(rows, -1, -1)], 2)

    def listed(tiles):
        """-> how many in each row, and which first: (rows, 1, tiles), (rows, 1, tiles, tiles)"""
        order = torch.argsort(tiles.int(), dim=-1, descending=True, stable=True)
        return tiles.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]

    def mask_mod(b, h, i, j):
        """attention_mask, for query i and key j."""
        t, s = i + (l - lq), j - E
        window = (s >= 0) & (s <= t) & (t - s <= L)
        if E == 0:
            return window
        return window | (j < E) & (at[b if rows > 1 else 0, j.clamp(max=E - 1)] < t - L)

    return at.clamp(max=l - 1).long(), BlockMask.from_kv_blocks(
        *listed(some & ~full), *listed(full), BLOCK_SIZE=TILE, mask_mod=mask_mod,
        seq_lengths=(lq, E + l))


def attend_flex(q, k, v, at, table):
    """`attend`, from a flex_table."""
    def with_ends(t):
        index = at[:, None, :, None].expand(*t.shape[:2], -1, t.shape[3])
        return torch.cat([t.gather(2, index), t], 2)                   # (b, kv heads, E + l, d)

    options = dict(block_mask=table, enable_gqa=q.shape[1] != k.shape[1],
                   kernel_options=dict(BACKEND="TRITON", fwd_BLOCK_M=128, fwd_BLOCK_N=64))
    if torch.compiler.is_compiling():
        return flex_attention(q, with_ends(k), with_ends(v), **options)
    with torch.compiler.set_stance("default"):         # a call with a cache has "force_eager"
        return torch.compile(flex_attention)(q, with_ends(k), with_ends(v), **options)


# The SSMs by Triton kernels. The sequence is cut into tiles of Q tokens, no matter where chunks end
# [2, section 6]:
#   1. each tile's own state: what its tokens after the last chunk end leave behind;
#   2. from tile to tile, state = (decay of the tile) state + (own state): what enters each tile;
#   3. the output of each tile from its tokens and the state entering it.
# Backward the same from the last tile to the first, with the gradients of the states.

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
    from triton.language.extra import libdevice
except ImportError:
    triton = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels then run on a CPU: for tests


def kernels_fit(x, w_conv, heads):
    """Whether ssm_mix_cuda can take x (b, l, 2, z | dt | u B C)."""
    width = w_conv.shape[-1]
    inner = x.shape[-1] - heads - width
    p, n = inner // heads, (width - inner) // 2
    return (triton is not None and (x.is_cuda or INTERPRET) and x.dtype != torch.float64
            and {p, n} <= {16, 32, 64, 128} and p * n * x.element_size() <= 32768)


if triton is not None:
    FAST = constexpr(not INTERPRET)

    @triton.jit
    def _exp(x):
        """exp without care for denormal numbers: half the instructions."""
        return libdevice.fast_expf(x) if FAST else tl.exp(x)

    @triton.jit
    def _dot(a, b):
        return tl.dot(a, b, input_precision="tf32x3")

    @triton.jit
    def _rows(X, i, j, ok, stride):
        """Rows i and columns j of X: (rows, columns) in float32, zero in rows that are not ok."""
        at = X + i[:, None] * stride + j[None, :]
        return tl.load(at, mask=ok[:, None], other=0.0).to(tl.float32)

    @triton.jit
    def _put(X, i, j, ok, stride, x):
        """Store x where _rows would load it."""
        tl.store(X + i[:, None] * stride + j[None, :], x.to(X.dtype.element_ty), mask=ok[:, None])

    @triton.jit
    def _silu(X, i, j, ok, stride):
        """SiLU of what _rows loads, and its derivative."""
        x = _rows(X, i, j, ok, stride)
        e = 1 + _exp(-x)
        sigmoid = libdevice.fast_dividef(1.0, e) if FAST else 1 / e
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))

    @triton.jit
    def _conv_kernel(IN, OUT, X, W, DW, CHUNK, L, T, BACKWARD: constexpr, K: constexpr,
                     width: constexpr, stride: constexpr, to: constexpr, size: constexpr,
                     Q: constexpr, C: constexpr):
        """chunk_conv at Q tokens and C channels: IN (b, L, 2, width), CHUNK (b, L + 1) the number
        of each token's chunk -> OUT (b, L, 2, width). Backward: from the gradient IN that of X, to
        OUT, and these tokens' part of that of W, to DW (parts, K, 2, width). stride, to, size:
        distances between the SSMs of a token in IN, OUT and X."""
        tile, c, s = tl.program_id(0).to(tl.int64), tl.program_id(0) % T * Q, tl.program_id(1) % 2
        i, j = tl.arange(0, Q), tl.program_id(1) // 2 * C + tl.arange(0, C)
        row, inside = (tile // T * L + c) * 2 + s, c + i < L
        CHUNK += tile // T * (L + 1) + c
        chunk, out = tl.load(CHUNK + i, mask=inside, other=-1), tl.zeros((Q, C), tl.float32)
        if BACKWARD:
            x = _rows(X + row * size, i, j, inside, 2 * size)
        for k in tl.static_range(K):
            i_k, at = i + k if BACKWARD else i - k, (k * 2 + s) * width + j
            same = tl.load(CHUNK + i_k, mask=(c + i_k >= 0) & (c + i_k < L), other=-2) == chunk
            term = _rows(IN + row * stride, i_k, j, same, 2 * stride)
            out += tl.load(W + at).to(tl.float32)[None, :] * term
            if BACKWARD:
                tl.store(DW + tile * (K * 2 * width) + at, tl.sum(term * x, 0))
        _put(OUT + row * to, i, j, inside, 2 * to, out)

    @triton.jit
    def _ssm_kernel(DT, UBC, A, SKIP, CHUNK, STATE, GRAD, Y, OWN, TOTAL, DX, DUBC, SUMS, L, T,
                    STATES: constexpr, BACKWARD: constexpr, H: constexpr, p: constexpr,
                    n: constexpr, Q: constexpr):
        """One tile of one SSM. DT (b, L, 2, H) after softplus, UBC (b, L, 2, u B C) before SiLU.
        Either (STATES) the tile's own state, OWN (b, T, 2, H, p, n), and TOTAL (b, T, 2, H), its
        decay; backward the gradient of the state entering, the last tile first. Or, from the STATE
        entering, Y (b, L, 2, H p); backward, from its gradient, in Y, and GRAD, that of the state
        leaving, the gradients DX (b, L, 2, dt | .), DUBC and parts of those of dt_bias, A, D: SUMS
        (b T, 3, 2, H). Where no chunk crosses the edge of a tile, nothing is stored for it."""
        tile, c, s = tl.program_id(0).to(tl.int64), tl.program_id(0) % T, tl.program_id(1)
        inner: constexpr = H * p
        width: constexpr = inner + 2 * n
        i, nn = tl.arange(0, Q), tl.arange(0, n)
        inside, row = c * Q + i < L, (tile // T * L + c * Q) * 2 + s
        CHUNK += tile // T * (L + 1) + c * Q
        chunk = tl.load(CHUNK + i, mask=inside, other=-1)
        before = tl.load(CHUNK - tl.minimum(c, 1))  # h enters the first tile
        after = tl.load(CHUNK + tl.minimum(Q, L - c * Q))
        enters = tl.load(CHUNK) == before
        leaves = tl.load(CHUNK + tl.minimum(Q, L - c * Q) - 1) == after
        if STATES:
            if not (enters if BACKWARD else leaves):
                return
        UBC, DUBC, DX = UBC + row * width, DUBC + row * width, DX + row * (H + width)
        DT, Y = DT + row * H, Y + row * inner
        low = UBC.dtype.element_ty
        B, slope_B = _silu(UBC, i, inner + nn, inside, 2 * width)
        C, slope_C = _silu(UBC, i, inner + n + nn, inside, 2 * width)
        B, C = B.to(low), C.to(low)
        if not STATES:
            same = (i[:, None] >= i[None, :]) & (chunk[:, None] == chunk[None, :])
            dB, dC = tl.zeros((Q, n), tl.float32), tl.zeros((Q, n), tl.float32)
        for h in range(H):
            head, at, j = s * H + h, (tile * 2 + s) * H + h, h * p + tl.arange(0, p)
            slot = at + (T - 1 - 2 * c) * (2 * H) if BACKWARD else at  # of OWN, TOTAL, GRAD
            entries = (tl.arange(0, p) * n)[:, None] + nn[None, :]
            some = entries >= 0
            a, dt = tl.load(A + head), tl.load(DT + i * (2 * H) + h, mask=inside, other=0.0)
            log_a = tl.maximum(dt * a, -20.0)  # e^-20 is nothing; less would cost precision
            cum, total = tl.cumsum(log_a, 0), tl.sum(log_a)
            entry = tl.where(chunk == before, _exp(cum), 0.0)[:, None]  # decay since the start
            exit = tl.where(chunk == after, _exp(total - cum), 0.0)[:, None]    # and to the end
            through = tl.where(before == after, _exp(total), 0.0)                 # all of it
            u, slope_u = _silu(UBC, i, j, inside, 2 * width)
            x, skip = (u * dt[:, None]).to(low), tl.load(SKIP + head)
            if BACKWARD:
                dy = _rows(Y, i, j, inside, 2 * inner).to(low)
            if STATES:
                if BACKWARD:
                    own = _dot(tl.trans((dy * entry).to(low)), C)
                else:
                    own = _dot(tl.trans((x * exit).to(low)), B)
                tl.store(OWN + slot * (p * n) + entries, own.to(low))
                tl.store(TOTAL + slot, through)
            else:
                decay = tl.where(same, _exp(cum[:, None] - cum[None, :]), 0.0)
                M = (_dot(C, tl.trans(B)) * decay).to(low)  # C B^T again: saves registers
                state = tl.load(STATE + at * (p * n) + entries, mask=some & enters, other=0.0)
                scan = _dot(M, x) + _dot(C, tl.trans(state)) * entry
                if BACKWARD:
                    grad = tl.load(GRAD + slot * (p * n) + entries, mask=some & leaves, other=0.0)
                    left = _dot(B, tl.trans(grad)) * exit
                    dx = _dot(tl.trans(M), dy) + left
                    dM = (_dot(dy, tl.trans(x)) * decay).to(low)
                    dB += _dot(tl.trans(dM), C) + _dot(x, grad) * exit
                    dC += _dot(dM, B) + _dot(dy, state) * entry
                    # The gradient of log_a at i: all that flows from before token i (its past, or
                    # the state entering) to token i or later ones, or into the state leaving.
                    flow = tl.cumsum(tl.sum(dy * scan, 1) - tl.sum(dx * x, 1), 0, reverse=True)
                    flow += tl.sum(left * x) + tl.sum(state.to(tl.float32) * grad) * through
                    ddt = (tl.sum(dx * u, 1) + flow * a) * (1 - _exp(-dt))        # before softplus
                    tl.store(DX + i * (2 * (H + width)) + h, ddt.to(low), mask=inside)
                    _put(DUBC, i, j, inside, 2 * width, (dx * dt[:, None] + skip * dy) * slope_u)
                    SUM = SUMS + tile * (6 * H) + head
                    tl.store(SUM, tl.sum(ddt))
                    tl.store(SUM + 2 * H, tl.sum(flow * dt))
                    tl.store(SUM + 4 * H, tl.sum(dy * u))
                else:
                    _put(Y, i, j, inside, 2 * inner, scan + skip * u)
        if not STATES and BACKWARD:
            _put(DUBC, i, inner + nn, inside, 2 * width, dB * slope_B)
            _put(DUBC, i, inner + n + nn, inside, 2 * width, dC * slope_C)

    @triton.jit
    def _scan_kernel(OWN, TOTAL, FIRST, OUT, LAST, T, heads: constexpr, size: constexpr,
                     E: constexpr, N: constexpr):
        """From tile to tile, E entries of one head: OWN (b, T, heads, size), TOTAL (b, T, heads),
        -1 where OWN is zero and not stored, FIRST (b, heads, size) -> OUT (b, T, heads, size), the
        state before each tile where it is not zero, and LAST, that after all of them."""
        at = tl.program_id(0).to(tl.int64) * E
        e, FIRST, LAST, at = at % size + tl.arange(0, E), FIRST + at, LAST + at, at // size
        state = tl.load(FIRST + tl.arange(0, E))
        at, live = at // heads * T * heads + at % heads, T > 0
        for c in range(0, T, N):
            totals, owns = (), ()
            for k in tl.static_range(N):  # all loads first: they need not wait for each other
                totals += (tl.load(TOTAL + at + (c + k) * heads, mask=c + k < T, other=1.0),)
            for k in tl.static_range(N):
                ok = (c + k < T) & (totals[k] >= 0)
                own = tl.load(OWN + (at + (c + k) * heads) * size + e, mask=ok, other=0.0)
                owns += (own.to(tl.float32),)
            for k in tl.static_range(N):
                out = OUT + (at + (c + k) * heads) * size + e
                tl.store(out, state.to(OUT.dtype.element_ty), mask=(c + k < T) & live)
                live = totals[k] >= 0
                state = tl.maximum(totals[k], 0.0) * state + owns[k]
        tl.store(LAST + tl.arange(0, E), state)


def tile_size(x, p, n):
    """Tokens per tile: what the shared memory of a small GPU (99 kB) takes."""
    return 64 if p * n * x.element_size() <= 2048 else 32


@torch.library.custom_op(f"{__name__}::mix", mutates_args=())
def _mix(inputs: list[Tensor]) -> list[Tensor]:
    """x (b, l, 2, dt | u B C), w, bias, A, D, ends, h -> y before the gate, the final state, the
    states entering the tiles. With these states and the gradient of y after them, and that of the
    final state in place of h: the gradients of x, w, bias, A, D, h."""
    x, (w, bias, A, D, ends, h, *back) = inputs[0], (t.contiguous() for t in inputs[1:])
    (b, l), (K, _, width), (_, heads, p, n) = x.shape[:2], w.shape, h.shape
    H, Q, C = heads // 2, tile_size(x, p, n), min(width & -width, 64)
    T = triton.cdiv(l, Q)
    # The number of each token's chunk, and of the one that comes after the row; rows share none.
    chunk = F.pad(ends.expand(b, l), (1, 0), value=True).flatten().cumsum(0, dtype=torch.int32)
    dt = F.softplus(x[..., :H] + bias)
    ubc, own = x.new_empty(b, l, 2, width), x.new_empty(b, T, heads, p, n)
    total, last, passed = h.new_full((b, T, heads), -1), torch.empty_like(h), torch.empty_like(own)
    states, y = back or (passed, x.new_empty(b, l, 2, H * p))
    dx, dubc, dw, sums = (x.new_empty(x.shape), torch.empty_like(ubc), h.new_empty(b * T, *w.shape),
                          h.new_empty(b * T, 3, 2, H)) if back else (x, x, x, x)

    def conv(source, to, backward):
        _conv_kernel[(b * T, 2 * (width // C))](
            source, to, x[..., H:], w, dw, chunk, l, T, backward, K, width, source.stride(2),
            to.stride(2), x.stride(2), Q, C, num_warps=2)

    def tiles(states_only):
        _ssm_kernel[(b * T, 2)](
            dt, ubc, A, D, chunk, states, passed, y, own, total, dx, dubc, sums, l, T,
            states_only, bool(back), H, p, n, Q, num_warps=4, num_stages=Q // 32)
    conv(x[..., H:], ubc, False)
    tiles(True)
    N = min(triton.next_power_of_2(T), 64)
    _scan_kernel[(h.numel() // 128,)](own, total, h, passed, last, T, heads, p * n, 128, N)
    tiles(False)
    if not back:
        return [y, last, passed]
    conv(dubc, dx[..., H:], True)
    return [dx, dw.sum(0).to(w.dtype), *(t.clone() for t in sums.sum(0)), last]


@_mix.register_fake
def _(inputs):
    x, *_, h = inputs[:7]
    if len(inputs) > 7:
        return [t.new_empty(t.shape) for t in (*inputs[:5], h)]
    (b, l), (heads, p, n) = x.shape[:2], h.shape[1:]
    return [x.new_empty(b, l, 2, heads // 2 * p), torch.empty_like(h),
            x.new_empty(b, triton.cdiv(l, tile_size(x, p, n)), heads, p, n)]


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[0], output[2])


def _vjp(ctx, grads):
    *inputs, _, states = ctx.saved_tensors
    *grads, dh = _mix([*inputs, grads[1], states, grads[0]])
    return [*grads, None, dh]


_mix.register_autograd(_vjp, setup_context=_setup)


def ssm_mix_cuda(x, w_conv, dt_bias, A, D, ends, h=None, conv=None):
    """The same as ssm_mix, where kernels_fit; no gradient flows through the final states."""
    if x.is_cuda and x.shape[1] == 1 and h is not None:  # decoding: a few small kernels
        with torch.compiler.set_stance("default"):
            return torch.compile(ssm_mix_step)(x, w_conv, dt_bias, A, D, ends, h, conv)
    (b, l), (K, _, width), H = x.shape[:2], w_conv.shape, A.shape[1]
    z, x = x.contiguous().tensor_split((x.shape[-1] - H - width,), -1)
    inner, tail = z.shape[-1], x.new_zeros(b, K - 1, 2, width)
    if h is None:
        h = A.new_zeros(b, 2 * H, inner // H, (width - inner) // 2)
    if conv is not None:  # tokens in front of the others that leave h as it is: softplus(dt) = 0
        front = F.pad(conv.to(x.dtype), (H, 0), value=-3e4)
        x, ends, tail = torch.cat([front, x], 1), F.pad(ends, (K - 1, 0)), conv
    y, h, _ = _mix([x, w_conv, dt_bias, A, D, ends, h])
    tail = chunk_conv(x[:, 1 - K:, :, H:], w_conv, ends[:, 1 - K:], tail)[1]
    return y[:, -l:] * F.silu(z), h.detach(), tail.detach()


# Decoding: a step is many small kernels. Launched one by one they cost more than they compute.

class RecordedStep:
    """model(tokens, cache=cache), steps of one token as a CUDA graph that is replayed. A graph
    knows addresses, not tensors: it must not outlive a call of `stream`."""

    def __init__(self, model, cache):
        self.model, self.graph, self.logits = model, None, None
        # Once all windows that shift are full, only the position differs from step to step.
        self.full = max((layer.window for layer in cache.layers if layer.window < layer.max_len),
                        default=1)
        # A replayed step checks nothing: where chunks might not find room, each step runs itself.
        if not all(layer.by_rule or layer.max_chunks == layer.max_len - layer.window
                   for layer in cache.layers):
            self.full = math.inf

    def __call__(self, tokens, cache, **last):
        position, layers = cache.position, cache.layers
        ready = tokens.shape[1] == 1 and position >= self.full
        if not ready or self.graph is None:            # the first step readies the libraries
            self.graph = torch.cuda.CUDAGraph() if ready else None
            return self.model(tokens, cache=cache, **last)
        if self.logits is None:
            self.tokens, self.clock = tokens.clone(), torch.tensor(position, device=tokens.device)
            for layer in layers:
                layer.position = self.clock
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):
                self.logits = self.model(self.tokens, cache=cache, **last)
        self.tokens.copy_(tokens)
        self.clock.fill_(position)
        self.graph.replay()
        for layer in layers:
            layer.position = position + 1
        return self.logits.clone()


if __name__ == "__main__":
    demo()
