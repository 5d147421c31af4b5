"""Attamba: attending to multi-token states, in one file of PyTorch.

A transformer keeps one key and one value per token. Attamba [1] cuts the sequence into
chunks of P tokens and keeps one key and one value per *chunk*, made by two small
state-space models (SSMs, in the Mamba-2 form [2]) that take the place of the key and the
value projection. A query sees every finished chunk through that one entry, and itself
and its L most recent predecessors one by one. The KV cache of S tokens then holds about
S/P + L entries instead of S.

Three equations, all per layer, a its input (dt, u, B and C are made from a by one matrix, a short convolution
and nonlinearities: see ChunkSSM; A < 0 is learned; r_t = 0 on the first token of a chunk, else 1):

    state      h_t = r_t exp(dt_t A) h_{t-1} + dt_t u_t B_t^T,       SSM(a)_t = W_out (h_t C_t + ...)
    k, v, q    k_t = a_t + SSM_K(a)_t,    v_t = a_t + SSM_V(a)_t,    q_t = W_Q a_t
    attention  query t sees  { s <= t : t - s <= L  or  token s ends a chunk }

A chunk boundary is nothing but a zero in the decay: after the last token of a chunk the state is
forgotten, and the key and value of that token, made like all others, stand for the whole chunk
once that token has left the window. No key is seen twice.

    config = AttambaConfig(vocab_size=256, dim=128, n_layers=4, n_heads=4)
    model = Attamba(config)
    logits = model(torch.randint(256, (2, 100)))             # (2, 100, 256)
    text = model.generate(torch.randint(256, (2, 100)), max_new_tokens=20, seed=0)
    text.shape                                               # (2, 120), through the compressed cache

Names       paper  meaning
b l d              batch, length (of this call), width of the model
chunk_size    P    tokens per chunk (mean)
leading_tokens L   recent predecessors that a query sees one by one
boundaries, ends   bool, True where a token is the last one of its chunk
first              position of the first chunk end, where chunk ends have a fixed step P
a                  input of a layer
h                  state of an SSM
u dt B C, A D, z   its input, step size, input and output map; decay, skip; gate
H p n g            SSM heads, channels per head, state size, groups of heads that share B and C
c q                in ssm_scan: blocks of tokens (for computing, no matter where chunks end), tokens per block;
                   elsewhere c is the config, q the queries

[1] Akhauri, Huda, Abdelfattah. Attamba: Attending To Multi-Token States. arXiv 2411.17685
[2] Dao, Gu. Transformers are SSMs (Mamba-2). arXiv 2405.21060
[3] Su et al. RoFormer (rotary positions, RoPE). arXiv 2104.09864
[4] Shazeer. GLU variants improve transformer (SwiGLU). arXiv 2002.05202
[5] Liu, Zaharia, Abbeel. Ring attention (parts joined by log-sum-exp). arXiv 2310.01889
"""
import math
import sys
from dataclasses import dataclass, replace
from typing import Callable, Iterator, Optional, Union

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
    "linear"      1           any              transformer
    "linear"      None        L                sliding-window transformer
    "linear"      P           L                strided sparse attention
    "ssm"         P           L                Attamba
    "ssm"         P           None             "pseudo-chunking" [1]: SSMs, full attention
    "ssm"         1           any              full attention over SSMs without memory
    "ssm"         None        L                SSMs over the whole sequence, sliding window
    "ssm"         None        0                an SSM: each token sees its own value alone, W_O v_t
    "linear+ssm"  P           L                W_K and W_V kept: k = W_K a + SSM_K(W_K a) [1, ablation]

    chunk_size and leading_tokens may also be tuples with a value for each layer: for 8 layers
    chunk_size=(None, None, None, 2) * 2 measured better than one P for all. What is None by default is filled in
    at once: dataclasses.replace(config, dim=...) keeps the old head_dim, hidden_dim, ...
    Raises ValueError for a value out of range, naming the field and what is allowed.
    """
    vocab_size: int                            # number of token ids
    dim: int                                   # width of the model
    n_layers: int                              # number of blocks
    n_heads: int                               # query heads
    n_kv_heads: Optional[int] = None           # key and value heads (GQA); None: n_heads
    head_dim: Optional[int] = None             # channels per head; None: dim / n_heads
    hidden_dim: Optional[int] = None           # inner width of the SwiGLU; None: 3 * dim
    kv: str = "ssm"                            # "ssm", "linear" or "linear+ssm": what makes keys and values
    chunk_size: Union[int, tuple, None] = 8    # P, tokens per chunk; None: no chunk ever ends
    leading_tokens: Union[int, tuple, None] = 64  # L, recent predecessors seen one by one; None: all
    chunking: Union[str, Callable] = "cyclic"  # "uniform", "cyclic", "random" or rule(tokens, positions, layer)
    chunking_seed: int = 0                     # which chunks "random" makes
    ssm_inner: Optional[int] = None            # channels of each SSM; None: dim / 2
    ssm_state: int = 32                        # state size n of each channel
    ssm_heads: Optional[int] = None            # SSM heads, one decay each; None: n_heads
    conv_size: int = 4                         # taps of the causal convolution
    rope_theta: float = 1e4                    # base of the rotary positions
    tie_embeddings: bool = False               # output layer shares the embedding
    norm_eps: float = 1e-5                     # epsilon of every RMSNorm

    def __post_init__(self):
        _fill_and_check(self)

    def of_layer(self, layer: int) -> "AttambaConfig":
        """The same with chunk_size and leading_tokens of that layer."""
        P, L = (v[layer] if isinstance(v, tuple) else v for v in (self.chunk_size, self.leading_tokens))
        return replace(self, chunk_size=P, leading_tokens=L)


# ---------------------------------------------------------------------------------------
# What is the model? A pre-norm transformer; only the attention inside is new.

class Attamba(nn.Module):
    """Language model: embedding, n_layers blocks, norm, output layer. The shapes of
    its weights do not depend on chunk_size, leading_tokens or chunking: a model with other values can load them."""

    def __init__(self, config: AttambaConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, boundaries: Optional[Tensor] = None, cache: Optional["Cache"] = None) -> Tensor:
        """tokens (b, l) int64 -> logits (b, l, vocab_size).

        boundaries: bool (b, l), True where a token ends its chunk, in all layers; default: config.chunking.
        cache: from new_cache; the tokens continue it and it advances in place (no gradients then).
        Raises ValueError for wrong dtypes, shapes, an empty sequence, a cache that is full or made for another config or
        batch size, IndexError for ids outside the vocabulary (not checked inside torch.compile).
        """
        _check_tokens(self.config, tokens)
        return self._logits(tokens, boundaries, cache)

    def _logits(self, tokens, boundaries=None, cache=None):
        """`forward` for ids known to be good: checking them means waiting for the GPU at every step."""
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self._logits(tokens, boundaries, cache)
        masks = self._masks(tokens, boundaries, cache)
        if cache:  # all layers, before any of them changes
            for block, layer, mask in zip(self.blocks, cache.layers, masks):
                layer.check(block.attention, len(tokens), tokens.shape[1], mask)
            if boundaries is None and _graph_fits(self, tokens, cache):
                return _replay(self, tokens, cache)
        return self._run(tokens, masks, cache)

    def _masks(self, tokens, boundaries, cache) -> list[Optional[Tensor]]:
        """Chunk ends (b, l) for each layer; None where the layer's own rule decides."""
        (b, l), rule, n = tokens.shape, self.config.chunking, len(self.blocks)
        if boundaries is not None:
            return [_check_mask(boundaries, (b,), l)] * n
        if not callable(rule):
            return [None] * n
        positions = torch.arange(l, device=tokens.device) + (cache.position if cache else 0)
        return [_check_mask(rule(tokens, positions, layer), (b,), l, "what a chunking rule returns") for layer in range(n)]

    def _run(self, tokens, masks, cache):
        """Embedding to logits, all checked."""
        c, start = self.config, cache.position if cache else 0
        rope = rope_angles(start, tokens.shape[1], c.head_dim, c.rope_theta, tokens.device)
        x = self.embed(tokens)                                                    # (b, l, d)
        for i, block in enumerate(self.blocks):
            # Compiled blocks are for training; with a cache, which is handled in Python, a block runs as it is
            # (its forward is called, without hooks).
            x = block.forward(x, masks[i], cache.layers[i], rope) if cache else block(x, masks[i], None, rope)
        return self.head(self.norm(x))                                            # (b, l, vocab_size)

    def new_cache(self, batch_size: int, max_len: int, max_chunks: Optional[int] = None) -> "Cache":
        """Allocate everything that decoding up to max_len tokens needs, at once.

        max_chunks: chunk entries per layer; default: what max_len tokens need at most under config.chunking
        (a callable could end a chunk at every token). Explicit boundaries may need more: then say how many.
        Raises ValueError for sizes below 1 (max_chunks: below 0).
        """
        return Cache([block.attention.new_cache(batch_size, max_len, max_chunks) for block in self.blocks])

    def stream(self, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: Optional[int] = None,
               top_p: Optional[float] = None, seed: Optional[int] = None) -> Iterator[Tensor]:
        """Continue tokens (b, l); yields (b, 1) int64 max_new_tokens times. temperature 0 takes the
        likeliest token; top_k and top_p (probability mass) cut the tail; seed repeats a sample.
        Raises ValueError for a negative temperature or count, top_k below 1, top_p outside (0, 1]."""
        _check_sampling(max_new_tokens, temperature, top_k, top_p)
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        cache = self.new_cache(len(tokens), tokens.shape[1] + max_new_tokens)

        def steps(tokens):
            model = self                                                          # which checks the prompt
            for _ in range(max_new_tokens):
                logits = model(tokens, cache=cache)[:, -1].float()                # (b, vocab_size)
                tokens = sample(logits, temperature, top_k, top_p, generator)     # (b, 1)
                yield tokens
                model = self._logits                                              # its own tokens need no check
        return steps(tokens)

    def generate(self, tokens: Tensor, max_new_tokens: int, **options) -> Tensor:
        """tokens (b, l) -> (b, l + max_new_tokens), sampled with the options of `stream`."""
        return torch.cat([tokens, *self.stream(tokens, max_new_tokens, **options)], 1)


class Block(nn.Module):
    """x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)). (b, l, d) -> (b, l, d) [1, section 3; 4]"""

    def __init__(self, config: AttambaConfig, layer: int):
        super().__init__()
        dim, hidden = config.dim, config.hidden_dim
        self.norm1 = nn.RMSNorm(dim, eps=config.norm_eps)
        self.attention = AttambaAttention(config, layer)
        self.norm2 = nn.RMSNorm(dim, eps=config.norm_eps)
        self.w_gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.w_down = nn.Linear(hidden, dim, bias=False)
        nn.init.normal_(self.w_gate_up.weight, std=0.02)
        nn.init.normal_(self.w_down.weight, std=0.02 / math.sqrt(2 * config.n_layers))

    def forward(self, x: Tensor, boundaries: Optional[Tensor] = None, cache: Optional["LayerCache"] = None,
                rope: Optional[tuple[Tensor, Tensor]] = None) -> Tensor:
        x = x + self.attention(self.norm1(x), boundaries, cache, rope)
        gate, up = self.w_gate_up(self.norm2(x)).chunk(2, -1)                     # (b, l, hidden) each
        return x + self.w_down(F.silu(gate) * up)


# ---------------------------------------------------------------------------------------
# What replaces attention? The same attention, with keys and values that SSMs make.

class AttambaAttention(nn.Module):
    """Drop-in causal self-attention, (b, l, d) -> (b, l, d) [1, section 3].

        q_t = W_Q a_t,   k_t = a_t + SSM_K(a)_t,   v_t = a_t + SSM_V(a)_t     kv="ssm"
        q_t = W_Q a_t,   k_t = W_K a_t,            v_t = W_V a_t              kv="linear"
        with both, kv="linear+ssm":   k_t = W_K a_t + SSM_K(W_K a)_t,   v_t = W_V a_t + SSM_V(W_V a)_t
        out_t = W_O softmax(q_t k_s / sqrt(head_dim) over the s that t sees) v_s

    layer: index of the layer, 0 first: "cyclic" shifts the chunks by a phase that depends on
    it, so that, with P layers or more, every token ends a chunk in some.
    """

    def __init__(self, config: AttambaConfig, layer: int):
        super().__init__()
        if not 0 <= layer < config.n_layers:
            raise ValueError(f"layer must lie in 0 ... {config.n_layers - 1}, but it is {layer}")
        c = self.config = config.of_layer(layer)
        kv_dim = c.n_kv_heads * c.head_dim
        self.wq = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.wo = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)
        nn.init.normal_(self.wq.weight, std=0.02)
        nn.init.normal_(self.wo.weight, std=0.02 / math.sqrt(2 * c.n_layers))
        if "linear" in c.kv:
            self.wkv = nn.Linear(c.dim, 2 * kv_dim, bias=False)
            nn.init.normal_(self.wkv.weight, std=0.02)
        if "ssm" in c.kv:
            self.ssm = ChunkSSM(c, c.dim if c.kv == "ssm" else kv_dim, kv_dim)
        # Layer and first chunk end are data, not constants of the code, so that all layers share one compiled graph.
        # They stay on the CPU: reading them must not wait for a GPU.
        self.layer, first = torch.tensor(layer, device="cpu"), first_end(c, layer)
        self.first = None if first is None else torch.tensor(first, device="cpu")

    def boundaries(self, length: int, start: int = 0, device: Optional[torch.device] = None) -> Tensor:
        """Which of the tokens start ... start + length - 1 end a chunk, by the layer's own rule: bool (1, length).
        Raises ValueError if config.chunking is a callable, which needs the tokens."""
        if callable(self.config.chunking):
            raise ValueError("with a callable chunking the layer needs the mask: "
                             "pass boundaries=rule(tokens, positions, layer)")
        positions = start + torch.arange(length, device=device or self.wq.weight.device)
        return chunk_ends(self.config, positions, self.layer)[None]

    def new_cache(self, batch_size: int, max_len: int, max_chunks: Optional[int] = None) -> "LayerCache":
        """Cache of this layer alone; see Attamba.new_cache."""
        return LayerCache(self, batch_size, max_len, max_chunks)

    def forward(self, x: Tensor, boundaries: Optional[Tensor] = None, cache: Optional["LayerCache"] = None,
                rope: Union[tuple[Tensor, Tensor], bool, None] = None) -> Tensor:
        """x (b, l, d) -> (b, l, d). boundaries: bool (b, l) or (1, l), default config.chunking.
        cache: from new_cache; x continues it and it advances in place, without gradients. rope: cos and
        sin (l, head_dim), or (1 or b, l, head_dim), of these l positions as from rope_angles (one table can serve
        all layers); None or True: made here; False: none, for a model that adds positions of its own.
        Raises ValueError for an empty x, for a mask, angles or a cache that do not fit, for a callable chunking without
        a mask."""
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self.forward(x, boundaries, cache, rope)
        if x.dim() != 3 or x.numel() == 0:
            raise ValueError(f"x must be of shape (batch, length, {self.config.dim}), not empty, but got {tuple(x.shape)}")
        c, (b, l, _), start = self.config, x.shape, cache.position if cache else 0
        ends = self.boundaries(l, start) if boundaries is None else _check_mask(boundaries, (1, b), l)   # (1 or b, l)
        if cache and isinstance(start, int):  # for Attamba a second time (a tensor: while a CUDA graph is recorded)
            cache.check(self, b, l, boundaries)
            cache.rule_fits &= boundaries is None      # a mask may have taken more entries than the rule would have
        decoding = cache is not None and l == 1
        # With chunks of a fixed step from position 0 on, `first` gives their ends without reading the mask.
        first = self.first if boundaries is None and not decoding and not start else None
        q = self.wq(x).unflatten(-1, (c.n_heads, c.head_dim))                     # (b, l, heads, head_dim)
        k, v = (t.unflatten(-1, (c.n_kv_heads, c.head_dim)) for t in self.keys_values(x, ends, first, cache))
        dtype = q.dtype
        if rope is None or rope is True:
            rope = rope_angles(start, l, c.head_dim, c.rope_theta, x.device)
        if rope is not False:
            _check_rope(rope, b, l, c.head_dim)
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k, v))                # (b, heads, l, head_dim)
        if decoding:  # everything visible lies in the cache
            cache.append(k, v, ends)
            out = cache.attend(q).to(q.dtype)
        else:
            if cache:
                k, v, ends = cache.context(k, v, ends)                            # with the visible past in front
            out = attend(q, k, v, ends, c.leading_tokens, c.chunk_size, first)    # (b, heads, l, head_dim)
            if cache:
                cache.store(k, v, ends, l)
        return self.wo(out.transpose(1, 2).flatten(2))

    def keys_values(self, x: Tensor, ends: Tensor, first: Optional[Tensor] = None,
                    cache: Optional["LayerCache"] = None) -> list[Tensor]:
        """Key and value of each token, before RoPE. x (b, l, d) -> [keys, values], (b, l, kv_dim) each"""
        c = self.config
        if "linear" in c.kv:
            a = self.wkv(x).unflatten(-1, (2, -1))                                # (b, l, 2, kv_dim)
            base = a.unbind(2)
        else:  # the residual; with fewer key heads than query heads, the mean over each group
            a = mean = x
            if c.n_kv_heads != c.n_heads:
                mean = x.unflatten(-1, (c.n_kv_heads, -1, c.head_dim)).mean(-2).flatten(-2)
            base = mean, mean                                                     # the same for keys and values
        if "ssm" not in c.kv:
            return base
        state = (cache.h, cache.conv) if cache else (None, None)
        if cache and x.shape[1] == 1:
            out = self.ssm.step(a[:, 0], ends, *state)
        else:
            out, new = self.ssm(a, ends, first, *state)
            if cache:
                cache.h.copy_(new[0])
                cache.conv.copy_(new[1])
        return [residual + y for residual, y in zip(base, out)]


# ---------------------------------------------------------------------------------------
# Which keys does a query see? This is the definition; `attend`, below, is its fast form.

def attention_mask(boundaries: Tensor, leading_tokens: Optional[int]) -> Tensor:
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
    t = torch.arange(boundaries.shape[1], device=boundaries.device)
    past = t[None, :] <= t[:, None]                                               # (l, l), query by key
    window = past if leading_tokens is None else past & (t[:, None] - t[None, :] <= leading_tokens)
    return window | (past & boundaries[:, None, :])


def attend_ref(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, leading_tokens: Optional[int],
               chunk_size: Optional[int] = None, first: Optional[Tensor] = None) -> Tensor:
    """Attention through the dense mask: the definition, quadratic in time and memory.
    Arguments and result as in `attend`; chunk_size and first are not needed."""
    mask = attention_mask(boundaries, leading_tokens)[:, None, -q.shape[2]:]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


# ---------------------------------------------------------------------------------------
# Where does a chunk end? A rule looks at one token and its position, nothing else: so a
# prefix is cut the same way whatever follows, and cached calls see the same chunks.

def chunk_ends(config: AttambaConfig, positions: Tensor, layer: Union[int, Tensor]) -> Tensor:
    """The named rules [1, section 3.2]: which positions (l,) int64 end a chunk -> (l,) bool.
    config: that of the layer (see of_layer).

    uniform: (t + 1) % P == 0; cyclic: the same, earlier by a phase that grows with the layer;
    random: each token with probability 1 / P, a fixed function of seed, layer and position.

    >>> config = AttambaConfig(vocab_size=8, dim=8, n_layers=2, n_heads=2, chunk_size=4)
    >>> chunk_ends(config, torch.arange(9), layer=0).int().tolist()
    [0, 0, 0, 1, 0, 0, 0, 1, 0]
    >>> chunk_ends(config, torch.arange(9), layer=1).int().tolist()   # phase 1 * 4 // 2 = 2
    [0, 1, 0, 0, 0, 1, 0, 0, 0]
    """
    P = config.chunk_size
    if P is None:
        return torch.zeros_like(positions, dtype=torch.bool)
    if config.chunking == "random":
        x = torch.zeros_like(positions)
        for value in (config.chunking_seed, layer, positions, 0, 0):  # mix the bits: xor-shift, multiply, modulo 2^31
            x = (((x >> 15) ^ x ^ value) * 0x2C1B3C6D + 0x3504F335) & 0x7FFFFFFF
        return (x >> 4) % P == 0
    return (positions - first_end(config, layer)) % P == 0


NEVER = 2 ** 30                                        # first chunk end if no chunk ever ends: beyond any sequence


def first_end(config: AttambaConfig, layer: Union[int, Tensor]) -> Union[int, Tensor, None]:
    """Position of the first chunk end if chunks have a fixed step; NEVER if P is None; None under other rules. "cyclic"
    ends chunks floor(layer P / n_layers) earlier than "uniform"."""
    if config.chunk_size is None:
        return NEVER
    if config.chunking in ("uniform", "cyclic"):
        phase = layer * config.chunk_size // config.n_layers if config.chunking == "cyclic" else 0
        return config.chunk_size - 1 - phase


# ---------------------------------------------------------------------------------------
# What makes a chunk's key and value? A Mamba-2 SSM whose state restarts with every chunk.

class ChunkSSM(nn.Module):
    """The two SSMs of a layer, for keys and for values, side by side [1, section 3; 2]:

        z, dt, u, B, C = split(W_in a_t)
        u, B, C = SiLU(causal depthwise convolution), never across a chunk boundary
        dt = softplus(dt + dt_bias),   A = -exp(A_log)
        h_t = r_t exp(dt_t A) h_{t-1} + dt_t u_t B_t^T,   y_t = h_t C_t + D u_t
        out_t = W_out RMSNorm(y_t * SiLU(z_t))

    r_t is 0 on the first token of a chunk, else 1. The convolution has no bias and the norm no weight (W_out absorbs it):
    zero in, zero out.
    """

    def __init__(self, config: AttambaConfig, dim_in: int, dim_out: int):
        super().__init__()
        c = self.config = config
        self.sizes = (c.ssm_inner, c.ssm_heads, c.ssm_inner + 2 * c.ssm_state)    # z | dt | u B C
        self.w_in = nn.Parameter(torch.randn(2, sum(self.sizes), dim_in) * 0.02)
        conv = torch.empty(c.conv_size, 2, self.sizes[2]).uniform_(-1, 1)
        self.w_conv = nn.Parameter(conv / math.sqrt(c.conv_size))
        # A fresh state should remember on the order of a chunk: 1 / (dt |A|) is about 14 tokens in
        # the geometric mean, from 0.6 to 1000 over the heads. dt_bias is the inverse softplus of dt [2].
        dt = torch.exp(torch.empty(2, c.ssm_heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(2, c.ssm_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(2, c.ssm_heads))
        self.w_out = nn.Parameter(torch.randn(2, dim_out, c.ssm_inner) * 0.02)

    def forward(self, a: Tensor, boundaries: Tensor, first: Optional[Tensor] = None,
                h: Optional[Tensor] = None, conv: Optional[Tensor] = None):
        """a (b, l, dim_in) or, if W_K and W_V are kept, (b, l, 2, dim_in); boundaries (b or 1, l) bool; state as in
        LayerCache, None for the start -> [keys, values] (b, l, dim_out) each, and (h, conv) after the last token if a state
        was given.
        first: as in `attend`; the sequence must then start at position 0, where the state is zero."""
        c, P, l = self.config, self.config.chunk_size, a.shape[1]
        x, fixed = self._project(a), first is not None and P is not None          # (b, l, 2, z | dt | u B C)
        if fixed and _ssm_kernel_fits(x, c, P):
            y = _ssm(x, self.w_conv, *self._rates(x), first, P, c.ssm_inner).movedim(0, 2)
        elif fixed and P > 3 and not torch.compiler.is_compiling():
            # Each chunk is a sequence of its own, so they make a batch, without masks; the first lacks the `front` tokens
            # of its phase. (Slower for shorter chunks; and a compiled graph cannot ask for a size that depends on data.)
            front = P - 1 - int(first)
            chunks = F.pad(x, (0, 0, 0, 0, front, -(front + l) % P)).unflatten(1, (-1, P)).flatten(0, 1)
            y = self._mix(chunks)[0].unflatten(0, (len(x), -1)).flatten(1, 2)[:, front:front + l]
        else:
            y, h, conv = self._mix(x, boundaries, h, conv)                        # (b, l, 2, inner)
            return self._out(y, x.dtype), (h, conv)
        open_tokens = 0 if h is None else min(l, (l - 1 - int(first)) % P)        # since the last chunk end:
        if open_tokens:                                                           # they alone make the final state
            _, h, conv = self._mix(x[:, -open_tokens:], boundaries[:, -open_tokens:], h, conv)
        return self._out(y, x.dtype), (h, conv)

    def _project(self, a):
        """W_in: (..., dim_in) for both SSMs, or (..., 2, dim_in) -> (..., 2, z | dt | u B C)"""
        if "linear" in self.config.kv:
            return torch.einsum("...sd,sed->...se", a, self.w_in)
        return F.linear(a, self.w_in.flatten(0, 1)).unflatten(-1, (2, -1))

    def _rates(self, x):
        """dt_bias, A < 0 and D (2, heads), in at least float32 whatever the model's dtype."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self.dt_bias.to(dtype), -self.A_log.to(dtype).exp(), self.D.to(dtype)

    def _mix(self, x, boundaries=None, h=None, conv=None):
        """Convolution, scan and gate: x (b, l, 2, z | dt | u B C) -> y SiLU(z) (b, l, 2, inner), and the new state."""
        c, (dt_bias, A, D) = self.config, self._rates(x)
        z, dt, ubc = x.split(self.sizes, -1)
        ubc, conv = chunk_conv(ubc, self.w_conv, boundaries, conv)
        u, B, C = F.silu(ubc).split((c.ssm_inner, c.ssm_state, c.ssm_state), -1)
        dt = F.softplus(dt.to(A.dtype) + dt_bias)                                 # (b, l, 2, heads)
        # Both SSMs in one scan: 2 * heads, in two groups, each with its B and C.
        u = u.unflatten(-1, (c.ssm_heads, -1)).flatten(2, 3)                      # (b, l, 2 heads, p)
        y, h = ssm_scan(u, dt.flatten(2), A.flatten(), B, C, D.flatten(), boundaries, h)
        return y.flatten(2).unflatten(-1, (2, -1)) * F.silu(z), h, conv

    def _out(self, y, dtype):
        """The norm and W_out: y (b, l, 2, inner) -> keys, values (b, l, dim_out)"""
        y = F.rms_norm(y.movedim(2, 0), y.shape[-1:], eps=self.config.norm_eps).to(dtype)
        return torch.bmm(y.flatten(1, 2), self.w_out.mT).unflatten(1, y.shape[1:3]).unbind()

    def step(self, a: Tensor, boundary: Tensor, h: Tensor, conv: Tensor) -> tuple[Tensor, Tensor]:
        """One token: the recurrence as it stands. a (b, dim_in) or (b, 2, dim_in), boundary (b or 1, 1) bool,
        state as in LayerCache, updated in place -> keys, values (b, 1, dim_out)."""
        c, x = self.config, self._project(a)                                      # (b, 2, z | dt | u B C)
        if _ssm_kernel_fits(x, c):
            return torch.bmm(_ssm_step(x, self, boundary, h, conv), self.w_out.mT)[:, :, None].unbind()
        z, dt, ubc = x.split(self.sizes, -1)
        keep, (dt_bias, A, D) = ~boundary[:, :, None, None], self._rates(x)
        past = torch.cat([conv, ubc[:, None].to(conv.dtype)], 1)                  # (b, conv_size, 2, channels)
        ubc = F.silu((past * self.w_conv.flip(0)).sum(1))
        u, B, C = ubc.split((c.ssm_inner, c.ssm_state, c.ssm_state), -1)          # (b, 2, ...)
        u, dt = u.reshape(len(a), 2 * c.ssm_heads, -1), F.softplus(dt.to(h.dtype) + dt_bias).flatten(1)
        y, state = ssm_step(h, u.to(h.dtype), dt, A.flatten(), B.to(h.dtype), C.to(h.dtype), D.flatten())
        h.copy_(state * keep)
        conv.copy_(past[:, 1:] * keep)
        return self._out((y.view(len(a), 1, 2, -1) * F.silu(z)[:, None]), x.dtype)


def chunk_conv(x: Tensor, weight: Tensor, boundaries: Optional[Tensor] = None, tail: Optional[Tensor] = None):
    """Causal depthwise convolution that never reaches across a chunk boundary.

        y_t = sum_j weight[j] x_{t-j}     over j = 0 ... k-1 while t-j lies in t's chunk

    x (b, l, *c), weight (k, *c) with weight[0] on the token itself, boundaries (b or 1, l) bool, or None for
    none (without a tail only), tail (b, k - 1, *c) the last inputs before x, zero outside the current chunk
    -> y (b, l, *c), and the tail after x if one was given. Source: [1, section 3], [2].
    """
    k, l, ones = len(weight), x.shape[1], (1,) * (x.dim() - 2)
    past = F.pad(x, (0, 0) * len(ones) + (k - 1, 0)) if tail is None else torch.cat([tail.to(x.dtype), x], 1)
    y, same = weight[0] * x, True                                                 # past: (b, k-1+l, *c)
    goes_on = None if boundaries is None else ~F.pad(boundaries, (k - 1, 0))      # where no chunk ends; none in the tail
    for j in range(1, k):
        term = weight[j] * past[:, k - 1 - j:k - 1 - j + l]                       # x_{t-j}
        if boundaries is not None:  # t-j lies in t's chunk if none of t-j ... t-1 ends one
            same = same & goes_on[:, k - 1 - j:k - 1 - j + l]
            term = term * same.view(*same.shape, *ones)
        y = y + term
    if tail is not None:  # of the last inputs, those after the last boundary
        since = goes_on[:, l:].flip(1).cumprod(1).flip(1)
        tail = past[:, l:] * since.view(*since.shape, *ones)
    return y.to(x.dtype), tail


def ssm_step(h: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the recurrence [2, equation 1]:

        h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t^T,   y_t = h_t C_t + D u_t

    h (b, H, p, n), u (b, H, p), dt (b, H) positive, A (H,) negative, B and C (b, g, n), D (H,)
    -> y (b, H, p), the new state
    """
    b, H, p, n = h.shape
    x = (dt[..., None] * u).view(b, B.shape[1], -1, 1) * B[:, :, None]            # (b, g, H/g p, n)
    h = torch.exp(dt * A)[..., None, None] * h + x.view_as(h)
    y = h.view_as(x) @ C[..., None]                                               # (b, g, H/g p, 1)
    return y.view_as(u) + D[:, None] * u, h


def ssm_scan_ref(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
                 boundaries: Optional[Tensor] = None, h: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the definition. After a boundary h is set to zero, which is
    the r_t = 0 of the next token.

    u (b, l, H, p), dt (b, l, H) positive, A (H,) negative, B and C (b, l, g, n), D (H,),
    boundaries (b or 1, l) bool or None for none, initial state h (b, H, p, n) or None for zero
    -> y (b, l, H, p) and the final state (b, H, p, n), both in at least float32.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, dt, B, C = (t.to(dtype) for t in (u, dt, B, C))
    if h is None:
        h = u.new_zeros(u.shape[0], *u.shape[2:], B.shape[3])
    if boundaries is None:
        boundaries = torch.zeros(1, u.shape[1], dtype=torch.bool, device=u.device)
    ys = []
    for u_t, dt_t, B_t, C_t, end_t in zip(*(t.unbind(1) for t in (u, dt, B, C, boundaries))):
        y_t, h = ssm_step(h, u_t, dt_t, A, B_t, C_t, D)
        h = torch.where(end_t[:, None, None, None], 0, h)
        ys.append(y_t)
    return torch.stack(ys, 1), h


def ssm_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
             boundaries: Optional[Tensor] = None, h: Optional[Tensor] = None, block: Optional[int] = None) -> tuple[Tensor, Tensor]:
    """The same as ssm_scan_ref, in parallel. Written out, the recurrence is a masked matrix product [2, section 6]:

        y_i = sum_j M_ij (C_i . B_j) dt_j u_j,   M_ij = exp(sum of dt A over j+1 ... i)   j <= i, same chunk
                                                      = 0                                 otherwise

    It is done inside blocks of q tokens, then once more for the states between the blocks. A boundary is a zero in M,
    never a large negative number in a sum. block (q) changes the speed only; the default was measured best.
    """
    (b, l, H, p), (g, n) = u.shape, B.shape[2:]
    q, dtype = block or (64 if u.is_cuda else 16), torch.promote_types(u.dtype, torch.float32)
    while block is None and 8 * q * q < l:
        q *= 2
    q = l if l < q else q
    if boundaries is None:
        boundaries = torch.zeros(1, l, dtype=torch.bool, device=u.device)

    def blocks(t):
        """(b, l, heads, ...) -> (b, c, heads, q, ...), zeros after the sequence: a token with dt = 0 has no effect."""
        return F.pad(t, (0, 0) * (t.dim() - 2) + (0, -l % q)).unflatten(1, (-1, q)).transpose(2, 3)

    def decays(log_a, chunk):
        """M (..., q, q), from log-decays and chunk numbers (..., q). (A difference of two sums would lose precision.)"""
        log_m = log_a[..., None].expand(*log_a.shape, log_a.shape[-1]).tril(-1).cumsum(-2)
        return torch.exp(log_m) * (chunk[..., :, None] == chunk[..., None, :]).tril()

    with torch.autocast(u.device.type, enabled=False):
        u, dt, B, C = (t.to(dtype) for t in (u, dt, B, C))
        x, B, C = blocks(u * dt[..., None]), blocks(B), blocks(C)                 # (b, c, H, q, p); (b, c, g, q, n) twice
        log_a, ends = blocks(dt * A), blocks(boundaries[..., None])               # (b, c, H, q), (b, c, 1, q)
        chunk = ends.cumsum(-1) - ends.long()                                     # chunk ends before a token, in its block
        # 1. Inside a block.
        M = decays(log_a, chunk)                                                  # (b, c, H, q, q)
        y = (M.unflatten(2, (g, -1)) * (C @ B.mT)[:, :, :, None]).flatten(2, 3) @ x                   # (b, c, H, q, p)
        # 2. What a block leaves behind: the tokens after its last boundary, decayed as its last token sees them.
        left = x * (M[..., -1, :] * ~ends[..., -1:])[..., None]
        added = left.unflatten(2, (g, -1)).mT.flatten(3, 4) @ B                   # (b, c, g, H/g p, n)
        if h is None and l == q:  # a single block, and nothing enters it
            return y.transpose(2, 3).flatten(1, 2) + D[:, None] * u, added.view(b, H, p, n)
        # 3. From block to block, the same with blocks as tokens. (Nothing passes a block with a boundary in it, so that such
        # a block belongs to what comes after: its own ends are counted, unlike those of tokens.)
        h = u.new_zeros(b, H, 1, p * n) if h is None else h.to(dtype).view(b, H, 1, p * n)
        cum, resets = log_a.cumsum(-1), ends.any(-1).mT.cumsum(-1)                # (b, c, H, q), (b, 1, c)
        total, added = cum[..., -1].mT, added.view(b, -1, H, p * n).transpose(1, 2)                   # (b, H, c), (b, H, c, p n)
        after = decays(total, resets) @ added + (torch.exp(total.cumsum(-1)) * (resets == 0))[..., None] * h
        h = torch.cat([h, after], 2)                                              # (b, H, 1 + c, p n): what enters each block
        # 4. What enters a block, seen by the tokens up to its first boundary.
        seen = C @ h[:, :, :-1].transpose(1, 2).reshape(b, -1, g, H // g * p, n).mT                   # (b, c, g, q, H/g p)
        seen = seen.unflatten(-1, (-1, p)).transpose(3, 4).flatten(2, 3)          # (b, c, H, q, p)
        y = y + seen * (torch.exp(cum) * (chunk == 0))[..., None]
        y = y.transpose(2, 3).flatten(1, 2)[:, :l] + D[:, None] * u               # (b, l, H, p)
    return y, h[:, :, -1].view(b, H, p, n)


# ---------------------------------------------------------------------------------------
# How is attention computed without an l x l map? By blocks of queries.

def attend(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, leading_tokens: Optional[int],
           chunk_size: Optional[int] = None, first: Optional[Tensor] = None) -> Tensor:
    """Attention as attention_mask shows it. A block of queries sees little: the chunk ends before it, and its
    own tokens with the L before them. These keys are put side by side, and a small mask says who sees what.

    q (b, heads, lq, head_dim), k and v (b, kv heads, l, head_dim) with lq <= l: the queries are the last lq
    tokens. boundaries (b or 1, l) bool. first (0-d int64, on the CPU), if given, is used in their place: chunks end at
    first, first + chunk_size, ... (nowhere for chunk_size None). -> (b, heads, lq, head_dim)
    """
    L, lq, l, P, dev = leading_tokens, q.shape[2], k.shape[2], chunk_size or NEVER, q.device
    if (L is None or L >= l - 1) and lq == l:  # the window holds everything: ordinary causal attention
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    L = l - 1 if L is None else min(L, l - 1)
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if first is not None and lq == l and _kernels_fit(q):
        return _attend(*(t.transpose(1, 2).contiguous() for t in (q, k, v)), first, P, L)[0].transpose(1, 2)

    compiling = torch.compiler.is_compiling()          # then sizes must not depend on data: upper bounds
    # Which tokens end a chunk: (b or 1, count), l or more where a row has fewer.
    if first is None:
        count = l if compiling else max(boundaries.sum(1).tolist())
        end_at = torch.arange(l, device=dev).masked_fill(~boundaries, l).sort(1).values[:, :count]
    else:
        end_at = (first + torch.arange(0, l, P, device=dev))[None]
    at = end_at.clamp(max=l - 1)[:, None, :, None].expand(len(q), q.shape[1], -1, q.shape[3])
    end_k, end_v = k.gather(2, at), v.gather(2, at)                               # (b, heads, count, head_dim)

    size, off = max(128, L, l // 64), l - lq           # queries a block (64 blocks or so at most); keys before the first
    # The keys near a block: its own tokens and the last L of the block before (of the first block: of the cached keys).
    # They are split off, not sliced: the gradient of every slice would be as long as k.
    sizes = [min(L, off), *[size] * (lq // size), *[lq % size] * (lq % size > 0)]
    before, *blocks = zip(*(t[:, :, off - sizes[0]:].split(sizes, 2) for t in (k, v)))
    out, start = [], off
    for q_block, block in zip(q.split(size, 2), blocks):
        stop = start + q_block.shape[2]
        k_near, v_near = (torch.cat([x[:, :, max(0, x.shape[2] - L):], y], 2) for x, y in zip(before, block))
        if first is not None:  # how many chunk ends, at most, lie outside the window of the block's last query
            seen = len(range(0, stop - 1 - L, P))
        else:
            seen = max(0, stop - 1 - L) if compiling else int((end_at < stop - 1 - L).sum(1).max())
        t = torch.arange(start, stop, device=dev)[:, None]
        s = torch.arange(stop - k_near.shape[2], stop, device=dev)
        window = (s <= t) & (t - s <= L)                                          # (queries, keys)
        mask = torch.cat([end_at[:, None, :seen] < t - L, window.expand(len(end_at), -1, -1)], 2)
        k_seen, v_seen = torch.cat([end_k[:, :, :seen], k_near], 2), torch.cat([end_v[:, :, :seen], v_near], 2)
        out.append(F.scaled_dot_product_attention(q_block, k_seen, v_seen, attn_mask=mask[:, None]))
        before, start = block, stop
    return torch.cat(out, 2)


# ---------------------------------------------------------------------------------------
# How does a key know its place? Rotary positions [3]: a chunk's key carries the position of its last token.

def rope_angles(start: int, length: int, head_dim: int, theta: float, device) -> tuple[Tensor, Tensor]:
    """cos and sin (length, head_dim) float32 for positions start ... start + length - 1 [3]."""
    freq = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = (start + torch.arange(length, device=device)).float()[:, None] * freq
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + head_dim / 2) of x (b, l, heads, head_dim) by angles ([b,] l, head_dim) [3]."""
    left, right = x.chunk(2, -1)
    return x * cos.unsqueeze(-2) + torch.cat([-right, left], -1) * sin.unsqueeze(-2)


# ---------------------------------------------------------------------------------------
# What is remembered between calls? Per layer: a ring with the window, the entries of finished
# chunks, and the two SSMs' states. Only the entries in use grow with the context.

class LayerCache:
    """What one attention layer remembers. W = L + 1 slots of window (a token and its L
    predecessors), then slots for chunk ends; a token that leaves the window keeps a slot
    only if it ended a chunk. So what a query sees is always a prefix of the slots."""

    def __init__(self, attention: AttambaAttention, batch_size: int, max_len: int, max_chunks: Optional[int] = None):
        _require("batch_size", batch_size, batch_size >= 1, "at least 1")
        _require("max_len", max_len, max_len >= 1, "at least 1")
        _require("max_chunks", max_chunks, max_chunks is None or max_chunks >= 0, "at least 0, or None")
        c, b, L, weight = attention.config, batch_size, attention.config.leading_tokens, attention.wq.weight
        like = dict(dtype=weight.dtype, device=weight.device)
        self.config, self.layer, self.max_len = c, int(attention.layer), max_len
        self.position = 0                                                          # tokens seen so far
        self.window = W = max_len if L is None else min(L + 1, max_len)
        self.rule_fits = max_chunks is None            # made for config.chunking: enough, until a mask is used
        if max_chunks is None:  # only a token that has left the window needs an entry
            max_chunks = max_len - W if callable(c.chunking) else int(attention.boundaries(max_len - W, device="cpu").sum())
        self.max_chunks = max_chunks
        # A ring with the window, then chunk entries. Keys are stored rotated: the order of the slots does not matter.
        self.kv = torch.zeros(2, b, c.n_kv_heads, W + max_chunks, c.head_dim, **like)
        self.ends = torch.zeros(b, W, dtype=torch.bool, device=weight.device)      # which tokens of the ring end a chunk
        self.n_chunks = torch.zeros(b, dtype=torch.int64, device=weight.device)    # entries in use; rows may differ
        self.h = self.conv = None
        if "ssm" in c.kv:  # states of the two SSMs, and the last inputs of their convolutions
            self.h = torch.zeros(b, 2 * c.ssm_heads, c.ssm_inner // c.ssm_heads, c.ssm_state,
                                 dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
            self.conv = torch.zeros(b, c.conv_size - 1, 2, c.ssm_inner + 2 * c.ssm_state, **like)

    @property
    def nbytes(self) -> int:
        """Bytes really allocated: keys, values, chunk bookkeeping and SSM states."""
        tensors = self.kv, self.ends, self.n_chunks, self.h, self.conv
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def _order(self) -> Tensor:
        """Slots of the ring in use, the oldest token first."""
        in_use = min(self.position, self.window)
        return torch.arange(self.position - in_use, self.position, device=self.ends.device) % self.window

    def check(self, attention: AttambaAttention, rows: int, length: int, boundaries: Optional[Tensor] = None) -> None:
        """Raises ValueError unless this cache was made for that layer and has room for `length` more tokens, whose
        chunks end by boundaries (b or 1, length) or by the layer's rule. Changes nothing."""
        if (self.kv.shape[1], self.layer, self.config) != (rows, int(attention.layer), attention.config):
            raise ValueError(f"this cache was made for batch size {self.kv.shape[1]}, layer {self.layer} of {self.config}, "
                             f"but it is used with batch size {rows}, layer {attention.layer} of {attention.config}")
        if self.position + length > self.max_len:
            raise ValueError(f"the cache is full: it holds {self.position} tokens, {length} more were given, "
                             f"and max_len is {self.max_len}")
        if not (self.max_chunks >= self.max_len - self.window or boundaries is None and self.rule_fits):
            new = attention.boundaries(length, self.position) if boundaries is None else boundaries
            ends = torch.cat([self.ends[:, self._order()], new.expand(rows, -1)], 1)
            need = int((self.n_chunks + ends[:, :max(0, ends.shape[1] - self.window)].sum(1)).max())
            if need > self.max_chunks:
                raise ValueError(f"the cache is full: it needs {need} chunk entries, and max_chunks is "
                                 f"{self.max_chunks} (see new_cache)")

    def context(self, k: Tensor, v: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Entries, window and new tokens as one sequence; an entry is a token that ends a chunk.
        k, v (b, n_kv_heads, l, head_dim), boundaries (b or 1, l) -> the same for all e + w + l of them."""
        if self.position == 0:
            return k, v, boundaries
        e, device, order = int(self.n_chunks.max()), k.device, self._order()
        slots = torch.cat([torch.arange(self.window, self.window + e, device=device), order])
        valid = torch.arange(e, device=device) < self.n_chunks[:, None]           # (b, e)
        ends = torch.cat([valid, self.ends[:, order], boundaries.expand(len(valid), -1)], 1)
        k, v = (torch.cat([old[:, :, slots].to(new.dtype), new], 2) for old, new in zip(self.kv, (k, v)))
        return k, v, ends

    def store(self, k: Tensor, v: Tensor, boundaries: Tensor, l: int) -> None:
        """From `context`, whose last l tokens are new, keep the last W tokens and the chunk ends before them."""
        self.position += l
        new, order = torch.stack([k, v]).to(self.kv.dtype), self._order()         # (2, b, kv heads, e + w + l, head_dim)
        ends, w = boundaries.expand(len(self.ends), -1), len(order)
        self.kv[..., order, :], self.ends[:, order] = new[..., -w:, :], ends[:, -w:]
        old = ends[:, :-w]
        row, token = old.nonzero(as_tuple=True)
        self.kv[:, row, :, self.window - 1 + old.cumsum(1)[row, token]] = new[:, row, :, token]
        self.n_chunks.copy_(old.sum(1))

    def append(self, k: Tensor, v: Tensor, boundary: Tensor) -> None:
        """`store` for one new token, in place. k, v (b, n_kv_heads, 1, head_dim), boundary (b or 1, 1) bool. It reads no
        value from the device (whether a chunk ends): a GPU need not be waited for, and the step can be recorded."""
        slot = torch.as_tensor(self.position % self.window, device=self.ends.device).view(1)
        if self.max_chunks:  # the token that leaves its slot moves to the next free entry if it ended a chunk
            left = self.ends[:, slot]                                             # (b, 1)
            to = torch.where(left, self.n_chunks[:, None] + self.window, slot)    # else it stays: overwritten below
            old = self.kv[..., slot, :]                                           # (2, b, kv heads, 1, head_dim)
            self.kv.scatter_(3, to[None, :, None, :, None].expand_as(old), old)
            self.n_chunks += left[:, 0]
        self.kv.index_copy_(3, slot, torch.stack([k, v]).to(self.kv.dtype))
        self.ends.index_copy_(1, slot, boundary.expand(len(self.ends), -1))
        self.position = self.position + 1

    def attend(self, q: Tensor) -> Tensor:
        """Attention of the newest token over all that it sees. q (b, n_heads, 1, head_dim) -> same."""
        b, h, _, d = q.shape
        q = q.to(self.kv.dtype).view(b, self.kv.shape[2], -1, d)                  # (b, kv heads, h / kv heads, d)
        if _kernels_fit(q):
            position = torch.as_tensor(self.position, device=q.device)
            return _attend_cached(q, self.kv, position.clamp(max=self.window) + self.n_chunks).view(b, h, 1, d)
        lengths = self.n_chunks[:, None] + min(self.position, self.window)        # (b, 1) slots in use
        least, seen = (int(x) for x in lengths.aminmax())
        mask = None if least == seen else (torch.arange(seen, device=q.device) < lengths)[:, None, None]   # (b, 1, 1, seen)
        out = F.scaled_dot_product_attention(q, *self.kv[:, :, :, :seen], attn_mask=mask)
        return out.view(b, h, 1, d)


class Cache:
    """What a model remembers of the tokens it has seen: a LayerCache per layer.

    nbytes      bytes allocated, all layers, states included
    position    tokens seen so far
    """

    def __init__(self, layers: list[LayerCache]):
        self.layers, self.graph = layers, None         # graph: of one step, on a GPU

    nbytes = property(lambda self: sum(layer.nbytes for layer in self.layers))
    position = property(lambda self: self.layers[0].position)


def sample(logits: Tensor, temperature: float, top_k: Optional[int], top_p: Optional[float],
           generator: Optional[torch.Generator]) -> Tensor:
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
# Which input is refused?

def _require(name, value, ok, allowed):
    if not ok:
        raise ValueError(f"{name} must be {allowed}, but it is {value!r}")


def _fill_and_check(c):
    """Fill in what is None by default; ValueError for what is out of range."""
    def check(name, ok, allowed):
        _require(name, getattr(c, name), ok, allowed)

    def check_ints(names, least=1, none=False):
        for name in names.split():
            value = getattr(c, name)
            for v in value if isinstance(value, tuple) else [value]:
                whole = isinstance(v, int) and not isinstance(v, bool) and v >= least
                check(name, whole or none and v is None, f"an integer of at least {least}" + " or None" * none)

    for name in ("chunk_size", "leading_tokens"):
        if isinstance(getattr(c, name), (tuple, list)):
            setattr(c, name, tuple(getattr(c, name)))
            check(name, len(getattr(c, name)) == c.n_layers, f"one value, or one for each of the {c.n_layers} layers")
    check_ints("vocab_size dim n_layers n_heads ssm_state conv_size")
    check_ints("n_kv_heads head_dim hidden_dim ssm_inner ssm_heads chunk_size", none=True)
    check_ints("leading_tokens", 0, none=True)
    check_ints("chunking_seed", 0)
    check("kv", c.kv in ("ssm", "linear", "linear+ssm"), '"ssm", "linear" or "linear+ssm"')
    check("chunking", c.chunking in ("uniform", "cyclic", "random") or callable(c.chunking),
          '"uniform", "cyclic", "random" or a callable (tokens, positions, layer) -> bool (b, l)')
    for name in ("rope_theta", "norm_eps"):
        check(name, getattr(c, name) > 0, "positive")
    if c.head_dim is None:
        check("n_heads", c.dim % c.n_heads == 0, f"a divisor of dim ({c.dim})")
    for name, value in dict(n_kv_heads=c.n_heads, head_dim=c.dim // c.n_heads, hidden_dim=3 * c.dim,
                            ssm_inner=max(1, c.dim // 2), ssm_heads=c.n_heads).items():
        setattr(c, name, getattr(c, name) or value)
    check("n_kv_heads", c.n_heads % c.n_kv_heads == 0, f"a divisor of n_heads ({c.n_heads})")
    check("head_dim", c.head_dim % 2 == 0, "even (rotary positions turn pairs of channels)")
    if c.kv == "ssm":  # the residual k = a + SSM(a) needs a's head slices
        check("head_dim", c.head_dim * c.n_heads == c.dim,
              f'dim / n_heads ({c.dim / c.n_heads:g}) when kv="ssm"; thinner heads need kv="linear+ssm"')
    if "ssm" in c.kv:
        check("ssm_heads", c.ssm_inner % c.ssm_heads == 0, f"a divisor of ssm_inner ({c.ssm_inner})")


def _check_tokens(config, tokens):
    if tokens.dtype not in (torch.int64, torch.int32) or tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError("tokens must be int64 or int32 of shape (batch, length), not empty, "
                         f"but got {tokens.dtype} {tuple(tokens.shape)}")
    if not torch.compiler.is_compiling():
        low, high = torch.stack(tokens.aminmax()).tolist()
        if low < 0 or high >= config.vocab_size:
            raise IndexError(f"token ids must lie in 0 ... {config.vocab_size - 1}, "
                             f"but they range from {low} to {high}")


def _check_mask(mask, rows, length, name="boundaries"):
    """mask, if it is bool of shape (one of rows, length)"""
    tensor = isinstance(mask, Tensor)
    if not tensor or mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[0] not in rows or mask.shape[1] != length:
        raise ValueError(f"{name} must be bool of shape ({' or '.join(map(str, rows))}, {length}), "
                         f"but got {f'{mask.dtype} {tuple(mask.shape)}' if tensor else type(mask).__name__}")
    return mask


def _check_rope(rope, rows, length, head_dim):
    """Broadcasting would hide a table of another length or batch."""
    cos, sin = rope
    one = length, head_dim
    if cos.shape not in (one, (1, *one), (rows, *one)) or sin.shape != cos.shape:
        raise ValueError(f"rope must be cos and sin of shape {one} or {(rows, *one)}, one row for each position of this call, "
                         f"but got {tuple(cos.shape)} and {tuple(sin.shape)}")


def _check_sampling(max_new_tokens, temperature, top_k, top_p):
    _require("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0")
    _require("temperature", temperature, temperature >= 0, "at least 0")
    _require("top_k", top_k, top_k is None or top_k >= 1, "at least 1, or None")
    _require("top_p", top_p, top_p is None or 0 < top_p <= 1, "in (0, 1], or None")


# ---------------------------------------------------------------------------------------
# How does it look? python attamba.py, or python attamba.py some text

def demo(text: str) -> None:
    """Print what two layers see, what a chunk's last token remembers, that two ways of computing agree,
    how the cache grows, and where the chunks of a text end."""
    torch.manual_seed(0)
    config = AttambaConfig(vocab_size=256, dim=64, n_layers=2, n_heads=2, chunk_size=4, leading_tokens=2)
    print("What a query (row) sees of each key (column), chunks of P = 4 tokens, L = 2:")
    print("w in its window, C end of a chunk past the window, . nothing\n\nlayer 0" + " " * 27 + "layer 1")
    masks = [attention_mask(chunk_ends(config, torch.arange(14), layer)[None], 2)[0].tolist() for layer in range(2)]
    for t in range(14):
        rows = (" ".join(".wC"[see + (see and t - s > 2)] for s, see in enumerate(mask[t])) for mask in masks)
        print("       ".join(rows))

    ssm = AttambaAttention(config, 0).ssm
    dt, A = F.softplus(ssm.dt_bias), -ssm.A_log.exp()
    print("\nWhat a fresh state keeps, at the end of a chunk of 8, of each of its tokens:\n")
    for head, rate in enumerate((dt * A)[0].tolist()):
        print(f"head {head}   " + " ".join(f"{math.exp(rate * (7 - t)):5.2f}" for t in range(8)))

    model, tokens = Attamba(config), torch.randint(256, (1, 100))
    cache = model.new_cache(1, 100)
    steps = torch.cat([model(t, cache=cache) for t in tokens.split(1, 1)], 1)
    error = (steps - model(tokens)).abs().max().item()
    print("\n100 tokens step by step (recurrent, cached) and all at once (parallel):")
    print(f"logits differ by at most {error:.1e}")

    print("\nKV cache of one sequence, MB (dim 128, 4 layers, float32, P 8, L 64)\n\n tokens  transformer  Attamba  ratio")
    shape = dict(vocab_size=8, dim=128, n_layers=4, n_heads=4)
    models = [Attamba(AttambaConfig(**shape, **c)) for c in (dict(kv="linear", leading_tokens=None), {})]
    for t in (1, 64, 256, 1024, 4096, 16384):
        a, b = (m.new_cache(1, t).nbytes / 1e6 for m in models)
        print(f"{t:7}  {a:11.2f}  {b:7.2f}  {a / b:5.1f}")

    print("\nWhere chunks end (^) in a text: by position alone, elsewhere in each layer (P 8)\n")
    shown = "".join(c if c.isprintable() else " " for c in text[:76]) + (" ..." if len(text) > 76 else "")
    for layer in range(4):
        ends = chunk_ends(replace(config, chunk_size=8, n_layers=4), torch.arange(len(text[:76])), layer)
        print(shown, "".join(" ^"[end] for end in ends.tolist()).rstrip(), sep="\n")


# ---------------------------------------------------------------------------------------
# The optional CUDA path: the same results by Triton kernels, for chunks of a fixed step.
# Everything above is complete without it; nothing below is needed to understand Attamba.

import os  # noqa: E402

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:
    triton = None


def _triton_runs(x: Tensor) -> bool:
    types = torch.bfloat16, torch.float16, torch.float32
    return triton is not None and (x.is_cuda or INTERPRET) and x.dtype in types


def _kernels_fit(q: Tensor) -> bool:
    return _triton_runs(q) and q.shape[-1] in (16, 32, 64, 128)


def _ssm_kernel_fits(x: Tensor, config: AttambaConfig, tokens: int = 1) -> bool:
    p, n, h = config.ssm_inner // config.ssm_heads, config.ssm_state, config.ssm_heads
    return (_triton_runs(x) and tokens <= 64 and p in (16, 32, 64, 128) and n in (16, 32, 64, 128) and h & (h - 1) == 0)


# Queries and keys per tile, warps, pipeline stages: the fastest of those measured on an H200.
TILES = {"forward": (64, 64, 4, 2), "dq": (64, 64, 4, 2), "dkv window": (64, 64, 4, 2), "dkv chunks": (64, 64, 4, 3),
         "conv": (4, 64, 1, 1), "conv backward": (4, 64, 2, 8), "ssm": (16, 1)}
FOLD_FROM = 4096                                       # chunks; measured on an H200
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs the kernels on a CPU, slowly: for tests


if triton is not None:
    FAST = tl.constexpr(not INTERPRET)

    @triton.jit
    def _dot(a, b):
        return tl.dot(a, b, input_precision="tf32x3")

    @triton.jit
    def _rows(X, t, S, H: tl.constexpr, size: tl.constexpr, D: tl.constexpr):
        """The first D entries at tokens t of X (S, H, size) at one head: (t, D), zero outside 0 ... S - 1."""
        at = t[:, None] * (H * size) + tl.arange(0, D)[None, :]
        return tl.load(X + at, mask=((t >= 0) & (t < S))[:, None], other=0.0)

    @triton.jit
    def _put(X, t, S, H: tl.constexpr, size: tl.constexpr, D: tl.constexpr, x):
        """Store (t, D) where _rows would load it."""
        at = t[:, None] * (H * size) + tl.arange(0, D)[None, :]
        tl.store(X + at, x.to(X.dtype.element_ty), mask=((t >= 0) & (t < S))[:, None])

    @triton.jit
    def _seen(t, s, L, KIND: tl.constexpr):
        """Which tokens s the queries t see: in the window (KIND 0) or as chunk ends past it (1)."""
        far = t - s
        return (far > L if KIND else (far >= 0) & (far <= L)) & (s >= 0)

    @triton.jit
    def _see(q, t, j, K, V, S, L, first, m, z, acc, scale,
             KIND: tl.constexpr, P: tl.constexpr, H: tl.constexpr, D: tl.constexpr):
        """Online softmax over one more tile of keys: tokens j (KIND 0), chunk ends number j (1), all seen (2)."""
        s = first + j * P if KIND else j
        k, v = _rows(K, s, S, H, D, D), _rows(V, s, S, H, D, D)
        x = _dot(q, tl.trans(k)) * scale
        if KIND < 2:
            x = tl.where(_seen(t[:, None], s[None, :], L, KIND), x, -float("inf"))
        top = tl.maximum(m, tl.max(x, 1))
        p, shrink = tl.exp2(x - top[:, None]), tl.exp2(m - top)
        acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v)
        return top, z * shrink + tl.sum(p, 1), acc

    @triton.jit
    def _chunks_of(start, M, L, first, P, N):
        """Chunk ends that all of the queries start ... start + M - 1 see, in whole tiles of N; that any sees."""
        return tl.maximum(start - L - 1 - first + P, 0) // P // N * N, (start + M - 1 - L - 1 - first + P) // P

    @triton.jit
    def _attend_forward_kernel(Q, K, V, O, LSE, S, L, first, scale, P: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
                               M: tl.constexpr, N: tl.constexpr):
        """M consecutive queries against the window and the chunk ends before it. Scores in units of log(2)."""
        row, start = tl.program_id(1), (tl.num_programs(0) - 1 - tl.program_id(0)) * M
        base = (row // H).to(tl.int64) * S * H * D + (row % H) * D
        t = start + tl.arange(0, M)
        q = _rows(Q + base, t, S, H, D, D)
        m, z, acc = tl.full((M,), -1e30, tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M, D), tl.float32)
        for j in range(tl.maximum(start - L, 0) // N * N, start + M, N):
            m, z, acc = _see(q, t, j + tl.arange(0, N), K + base, V + base, S, L, first, m, z, acc, scale, 0, P, H, D)
        by_all, by_any = _chunks_of(start, M, L, first, P, N)
        for j in range(0, by_all, N):
            m, z, acc = _see(q, t, j + tl.arange(0, N), K + base, V + base, S, L, first, m, z, acc, scale, 2, P, H, D)
        for j in range(by_all, by_any, N):
            m, z, acc = _see(q, t, j + tl.arange(0, N), K + base, V + base, S, L, first, m, z, acc, scale, 1, P, H, D)
        _put(O + base, t, S, H, D, D, acc / z[:, None])
        tl.store(LSE + row.to(tl.int64) * S + t, (m + tl.log2(z)) * 0.6931471805599453, mask=t < S)

    @triton.jit
    def _see_dq(q, g, lse, delta, t, j, K, V, S, L, first, dq, scale,
                KIND: tl.constexpr, P: tl.constexpr, H: tl.constexpr, D: tl.constexpr):
        s = first + j * P if KIND else j
        k, v = _rows(K, s, S, H, D, D), _rows(V, s, S, H, D, D)
        p = tl.exp2(_dot(q, tl.trans(k)) * scale - lse[:, None])
        if KIND < 2:
            p = tl.where(_seen(t[:, None], s[None, :], L, KIND), p, 0.0)
        ds = p * (_dot(g, tl.trans(v)) - delta[:, None])
        return dq + _dot(ds.to(k.dtype), k)

    @triton.jit
    def _attend_dq_kernel(Q, K, V, O, G, LSE, DELTA, DQ, S, L, first, scale,
                          P: tl.constexpr, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        """Gradient of M consecutive queries; also stores delta = sum(out * grad), which the keys need."""
        row, start = tl.program_id(1), (tl.num_programs(0) - 1 - tl.program_id(0)) * M
        base = (row // H).to(tl.int64) * S * H * D + (row % H) * D
        t = start + tl.arange(0, M)
        q, g = _rows(Q + base, t, S, H, D, D), _rows(G + base, t, S, H, D, D)
        lse = tl.load(LSE + row.to(tl.int64) * S + t, mask=t < S, other=0.0) * 1.4426950408889634
        delta = tl.sum(_rows(O + base, t, S, H, D, D).to(tl.float32) * g, 1)
        tl.store(DELTA + row.to(tl.int64) * S + t, delta, mask=t < S)
        dq, n = tl.zeros((M, D), tl.float32), tl.arange(0, N)
        for j in range(tl.maximum(start - L, 0) // N * N, start + M, N):
            dq = _see_dq(q, g, lse, delta, t, j + n, K + base, V + base, S, L, first, dq, scale, 0, P, H, D)
        by_all, by_any = _chunks_of(start, M, L, first, P, N)
        for j in range(0, by_all, N):
            dq = _see_dq(q, g, lse, delta, t, j + n, K + base, V + base, S, L, first, dq, scale, 2, P, H, D)
        for j in range(by_all, by_any, N):
            dq = _see_dq(q, g, lse, delta, t, j + n, K + base, V + base, S, L, first, dq, scale, 1, P, H, D)
        _put(DQ + base, t, S, H, D, D, dq * scale * 0.6931471805599453)

    @triton.jit
    def _see_dkv(k, v, s, start, Q, G, LSE, DELTA, S, L, dk, dv, scale,
                 KIND: tl.constexpr, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
        t = start + tl.arange(0, M)
        q, g = _rows(Q, t, S, H, D, D), _rows(G, t, S, H, D, D)
        lse = tl.load(LSE + t, mask=t < S, other=float("inf")) * 1.4426950408889634
        delta = tl.load(DELTA + t, mask=t < S, other=0.0)
        p = tl.exp2(_dot(k, tl.trans(q)) * scale - lse[None, :])                  # (keys, queries)
        if KIND < 2:
            p = tl.where(_seen(t[None, :], s[:, None], L, KIND), p, 0.0)
        dv += _dot(p.to(g.dtype), g)
        ds = p * (_dot(v, tl.trans(g)) - delta[None, :])
        return dk + _dot(ds.to(q.dtype), q), dv

    @triton.jit
    def _attend_dkv_kernel(Q, K, V, G, LSE, DELTA, DK, DV, S, L, first, scale, KIND: tl.constexpr, P: tl.constexpr,
                           H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        """Gradient of N keys: tokens in the window (KIND 0), or chunk ends seen past it (1), added to the former."""
        row, j = tl.program_id(1), tl.program_id(0) * N + tl.arange(0, N)
        base, line = (row // H).to(tl.int64) * S * H * D + (row % H) * D, row.to(tl.int64) * S
        s = first + j * P if KIND else j
        k, v = _rows(K + base, s, S, H, D, D), _rows(V + base, s, S, H, D, D)
        Q, G, LSE, DELTA = Q + base, G + base, LSE + line, DELTA + line
        dk, dv = tl.zeros((N, D), tl.float32), tl.zeros((N, D), tl.float32)
        low = first + tl.program_id(0) * N * P + L + 1 if KIND else tl.program_id(0) * N
        high = S if KIND else tl.minimum(S, tl.program_id(0) * N + N + L)
        full = tl.minimum((low + (N - 1) * P + M - 1) // M * M, high) if KIND else high  # from here on all see all
        for start in range(low // M * M, full, M):
            dk, dv = _see_dkv(k, v, s, start, Q, G, LSE, DELTA, S, L, dk, dv, scale, KIND, H, D, M)
        if KIND:
            for start in range(full, high, M):
                dk, dv = _see_dkv(k, v, s, start, Q, G, LSE, DELTA, S, L, dk, dv, scale, 2, H, D, M)
        dk *= scale * 0.6931471805599453
        if KIND:
            dk += _rows(DK + base, s, S, H, D, D)
            dv += _rows(DV + base, s, S, H, D, D)
        _put(DK + base, s, S, H, D, D, dk)
        _put(DV + base, s, S, H, D, D, dv)

    @triton.jit
    def _attend_cached_kernel(Q, KV, LENGTHS, O, LSE, slots, scale,
                              H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        """One new token: the G queries (padded to M) that share a key head, over a part of the first LENGTHS slots."""
        row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
        length = tl.load(LENGTHS + row // H).to(tl.int32)
        each = tl.cdiv(tl.cdiv(length, parts), N) * N
        g, cols = tl.arange(0, M), tl.arange(0, D)[None, :]
        q = tl.load(Q + (row * G + g)[:, None] * D + cols, mask=(g < G)[:, None], other=0.0)
        K, V = KV + row * slots * D, KV + (tl.num_programs(0) + row) * slots * D
        m, z, acc = tl.full((M,), -1e30, tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M, D), tl.float32)
        for start in range(part * each, tl.minimum(part * each + each, length), N):
            j = start + tl.arange(0, N)
            k, v = _rows(K, j, length, 1, D, D), _rows(V, j, length, 1, D, D)
            x = tl.where((j < length)[None, :], _dot(q, tl.trans(k)) * scale, -float("inf"))
            top = tl.maximum(m, tl.max(x, 1))
            p, shrink = tl.exp2(x - top[:, None]), tl.exp2(m - top)
            m, z, acc = top, z * shrink + tl.sum(p, 1), acc * shrink[:, None] + _dot(p.to(v.dtype), v)
        at = (row * G + g) * parts + part
        tl.store(O + at[:, None] * D + cols, acc / tl.maximum(z, 1e-30)[:, None], mask=(g < G)[:, None])
        tl.store(LSE + at, m + tl.log2(z), mask=g < G)

    @triton.jit
    def _conv_kernel(X, W, Y, DY, DX, DW, S, front, BACKWARD: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
                     width: tl.constexpr, size: tl.constexpr, N: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr):
        """chunk_conv of C channels, walking through the P tokens of N chunks. X (b, S, 2, z | dt | u B C) -> Y
        (b, S, 2, u B C), W (K, 2, width). Backward: gradient of X to DX, and these tokens' part of that of W to DW."""
        b, s = tl.program_id(1).to(tl.int64), tl.program_id(2) % 2
        j = tl.program_id(2) // 2 * C + tl.arange(0, C)[None, :]
        x_at, y_at = (b * S * 2 + s) * size + (size - width) + j, (b * S * 2 + s) * width + j
        ws, dws = (), ()
        for k in tl.static_range(K):
            ws += (tl.load(W + k * (2 * width) + s * width + j, mask=j < width, other=0.0).to(tl.float32),)     # (1, C)
            dws += (tl.zeros((N, C), tl.float32),)
        for step in range(STEPS):
            start = ((tl.program_id(0) * STEPS + step) * N + tl.arange(0, N)[:, None]) * P - front     # (N, 1)
            xs, dys, sums = (), (), ()
            for i in tl.static_range(P):
                inside = (start + i >= 0) & (start + i < S) & (j < width)
                xs += (tl.load(X + x_at + (start + i) * (2 * size), mask=inside, other=0.0).to(tl.float32),)
                if BACKWARD:
                    dys += (tl.load(DY + y_at + (start + i) * (2 * width), mask=inside, other=0.0).to(tl.float32),)
                else:
                    y = ws[0] * xs[i]
                    for k in tl.static_range(1, K):
                        if k <= i:
                            y += ws[k] * xs[i - k]
                    tl.store(Y + y_at + (start + i) * (2 * width), y.to(Y.dtype.element_ty), mask=inside)
            if BACKWARD:
                for k in tl.static_range(K):
                    dw = dws[k]
                    for i in tl.static_range(P):
                        if i >= k:
                            dw += dys[i] * xs[i - k]
                    sums += (dw,)
                dws = sums
                for i in tl.static_range(P):
                    dx = ws[0] * dys[i]
                    for k in tl.static_range(1, K):
                        if i + k < P:
                            dx += ws[k] * dys[i + k]
                    inside = (start + i >= 0) & (start + i < S) & (j < width)
                    tl.store(DX + x_at + (start + i) * (2 * size), dx.to(DX.dtype.element_ty), mask=inside)
        if BACKWARD:
            part = b * tl.num_programs(0) + tl.program_id(0)
            for k in tl.static_range(K):
                tl.store(DW + (part * K + k) * (2 * width) + s * width + j, tl.sum(dws[k], 0)[None, :], mask=j < width)

    @triton.jit
    def _exp(x):
        """exp without care for denormal numbers: half the instructions."""
        return libdevice.fast_expf(x) if FAST else tl.exp(x)

    @triton.jit
    def _sigmoid(x):
        return libdevice.fast_dividef(1.0, 1.0 + _exp(-x)) if FAST else tl.sigmoid(x)

    @triton.jit
    def _silu(x):
        """SiLU(x) and its derivative, float32."""
        x = x.to(tl.float32)
        sigmoid = _sigmoid(x)
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))

    @triton.jit
    def _conv_step(X, W, CONV, keep, j, width: tl.constexpr, K: tl.constexpr):
        """SiLU of the convolution's newest output for the channels j; CONV (K - 1, 2, width) moves on by one."""
        x = tl.load(X + j).to(tl.float32)
        y = tl.load(W + j).to(tl.float32) * x
        for k in tl.static_range(1, K):  # from the newest back: read, then overwrite
            past = tl.load(CONV + (K - 1 - k) * (2 * width) + j).to(tl.float32)
            y += tl.load(W + k * (2 * width) + j).to(tl.float32) * past
            tl.debug_barrier()
            tl.store(CONV + (K - 1 - k) * (2 * width) + j, (x * keep).to(CONV.dtype.element_ty))
            x = past
        return _silu(y)[0]

    @triton.jit
    def _ssm_step_kernel(X, W, BIAS, A_LOG, SKIP, END, STATE, CONV, Y, rows, eps,
                         K: tl.constexpr, H: tl.constexpr, p: tl.constexpr, n: tl.constexpr):
        """ChunkSSM.step between W_in and W_out for one row and one SSM; STATE and CONV are updated in place."""
        b, s = tl.program_id(0), tl.program_id(1)
        inner: tl.constexpr = H * p
        width: tl.constexpr = inner + 2 * n
        r, c = tl.arange(0, inner), tl.arange(0, n)
        X += (b * 2 + s) * (inner + H + width)
        CONV += (b * (K - 1) * 2 + s) * width
        keep = 1.0 - tl.load(END + (b if rows > 1 else 0)).to(tl.float32)
        u = _conv_step(X + inner + H, W + s * width, CONV, keep, r, width, K)
        B = _conv_step(X + inner + H, W + s * width, CONV, keep, inner + c, width, K)
        C = _conv_step(X + inner + H, W + s * width, CONV, keep, inner + n + c, width, K)
        v = tl.load(X + inner + r // p).to(tl.float32) + tl.load(BIAS + s * H + r // p).to(tl.float32)
        dt = tl.where(v > 20.0, v, tl.log(1 + _exp(v)))
        decay = _exp(-dt * _exp(tl.load(A_LOG + s * H + r // p).to(tl.float32)))
        at = (b * 2 + s) * (inner * n) + r[:, None] * n + c[None, :]
        state = tl.load(STATE + at) * decay[:, None] + (dt * u)[:, None] * B[None, :]
        tl.store(STATE + at, state * keep)
        y = tl.sum(state * C[None, :], 1) + tl.load(SKIP + s * H + r // p).to(tl.float32) * u
        y *= _silu(tl.load(X + r))[0]
        y *= tl.rsqrt(tl.sum(y * y, 0) / inner + eps)
        tl.store(Y + (s * tl.num_programs(0) + b) * inner + r, y.to(Y.dtype.element_ty))

    @triton.jit
    def _ssm_kernel(X, UBC, BIAS, A, SKIP, Y, DY, DX, DUBC, SUMS, S, front, T, BACKWARD: tl.constexpr, P: tl.constexpr,
                    H: tl.constexpr, p: tl.constexpr, n: tl.constexpr, Q: tl.constexpr):
        """X (b, S, 2, z | dt | .) and UBC, the convolution's (b, S, 2, u B C) before its SiLU -> y SiLU(z)
        (2, b, S, H p), for T <= Q tokens, whole chunks of P, of one SSM: no state enters or leaves.
        SUMS (3, 2, H, parts): gradients of dt_bias, A, D."""
        b, s = tl.program_id(1).to(tl.int64), tl.program_id(2)
        width: tl.constexpr = H * p + 2 * n
        size: tl.constexpr = H * p + H + width
        i = tl.arange(0, Q)
        t = tl.where(i < T, tl.program_id(0) * T + i - front, -1)                 # token of each row of the tile
        inside = (t >= 0) & (t < S)
        same = (i[:, None] >= i[None, :]) & (i[:, None] // P == i[None, :] // P)
        x_row, c_row = (b * S * 2 + s) * size, (b * S * 2 + s) * width
        y_row = (s * tl.num_programs(1) + b) * S * (H * p)
        at_B = c_row + H * p
        CB = _dot(_silu(_rows(UBC + at_B + n, t, S, 2, width, n))[0].to(X.dtype.element_ty),
                    tl.trans(_silu(_rows(UBC + at_B, t, S, 2, width, n))[0].to(X.dtype.element_ty)))   # (Q, Q)
        dCB = tl.zeros((Q, Q), tl.float32)
        for h in range(H):
            a, skip = tl.load(A + s * H + h), tl.load(SKIP + s * H + h)
            at_z, at_dt = x_row + h * p, x_row + H * p + h + t * (2 * size)
            v = tl.load(X + at_dt, mask=inside, other=0.0).to(tl.float32) + tl.load(BIAS + s * H + h)
            dt = tl.where(inside, tl.where(v > 20.0, v, tl.log(1 + _exp(v))), 0.0)   # softplus
            cum = tl.cumsum(tl.maximum(dt * a, -30.0), 0)   # exp(-30) is nothing; less would cost its neighbours precision
            decay = tl.where(same, _exp(tl.minimum(cum[:, None] - cum[None, :], 0.0)), 0.0)
            u, slope_u = _silu(_rows(UBC + c_row + h * p, t, S, 2, width, p))
            gate, slope_z = _silu(_rows(X + at_z, t, S, 2, size, p))
            x, M = (u * dt[:, None]).to(X.dtype.element_ty), (CB * decay).to(X.dtype.element_ty)
            y = _dot(M, x) + skip * u
            if not BACKWARD:
                _put(Y + y_row + h * p, t, S, 1, H * p, p, y * gate)
            else:
                dout = _rows(DY + y_row + h * p, t, S, 1, H * p, p).to(tl.float32)
                _put(DX + at_z, t, S, 2, size, p, dout * y * slope_z)
                dy = dout * gate
                low = dy.to(X.dtype.element_ty)
                dM, dx = _dot(low, tl.trans(x)), _dot(tl.trans(M), low)
                flow = dM * CB * decay                                            # d loss / d (cum_i - cum_j)
                dlog_a = tl.cumsum(tl.sum(flow, 1) - tl.sum(flow, 0), 0, reverse=True)
                dv = tl.where(inside, (tl.sum(dx * u, 1) + dlog_a * a) * _sigmoid(v), 0.0)
                tl.store(DX + at_dt, dv.to(DX.dtype.element_ty), mask=inside)
                parts = tl.num_programs(0) * tl.num_programs(1)                   # sums over tokens: a part per tile
                SUM = SUMS + (s * H + h) * parts + b * tl.num_programs(0) + tl.program_id(0)
                tl.store(SUM, tl.sum(dv, 0))
                tl.store(SUM + 2 * H * parts, tl.sum(dlog_a * dt, 0))
                tl.store(SUM + 4 * H * parts, tl.sum(tl.sum(dy * u, 1), 0))
                _put(DUBC + c_row + h * p, t, S, 2, width, p, (dx * dt[:, None] + skip * dy) * slope_u)
                dCB += dM * decay
        if BACKWARD:
            low = dCB.to(X.dtype.element_ty)
            B, slope_B = _silu(_rows(UBC + at_B, t, S, 2, width, n))              # again: cheaper than to keep them
            C, slope_C = _silu(_rows(UBC + at_B + n, t, S, 2, width, n))
            _put(DUBC + at_B, t, S, 2, width, n, _dot(tl.trans(low), C.to(low.dtype)) * slope_B)
            _put(DUBC + at_B + n, t, S, 2, width, n, _dot(low, B.to(low.dtype)) * slope_C)


def _attend_cached(q, kv, lengths):
    """q (b, kv heads, g, d), kv (2, b, kv heads, slots, d), lengths (b,) -> (b, kv heads, g, d). With few
    rows each is cut into parts, so that all of the GPU reads; the parts are joined as in ring attention [5]."""
    b, h, g, d = q.shape
    parts, M = max(1, min(256 // (b * h), kv.shape[3] // 256)), max(16, triton.next_power_of_2(g))
    out, lse = (torch.empty(b, h, g, parts, n, dtype=torch.float32, device=q.device) for n in (d, 1))
    _attend_cached_kernel[(b * h, parts)](q.contiguous(), kv, lengths, out, lse, kv.shape[3],
                                          math.log2(math.e) / math.sqrt(d), h, g, d, M, 64, num_warps=4, num_stages=4)
    return (out[..., 0, :] if parts == 1 else (out * (lse * math.log(2)).softmax(-2)).sum(-2)).to(q.dtype)


# A step is many small kernels: launched one by one, they cost more than they compute. So the first step of
# a cache runs as it is, the second is recorded as a CUDA graph, and that is replayed from then on.

def _graph_fits(model: Attamba, tokens: Tensor, cache: Cache) -> bool:
    kv, rule_fits = cache.layers[0].kv, all(layer.rule_fits for layer in cache.layers)
    return (tokens.shape[1] == 1 and cache.position > 0 and rule_fits and _kernels_fit(kv) and kv.is_cuda
            and not (callable(model.config.chunking) or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda")))


def _replay(model: Attamba, tokens: Tensor, cache: Cache) -> Tensor:
    """model(tokens, cache=cache) for tokens (b, 1)."""
    position, layers = cache.position, [block.attention for block in model.blocks]
    if cache.graph is None:  # the kernels compile and the libraries allocate what they need
        cache.graph = "next"
        return model._run(tokens, [None] * len(layers), cache)
    if cache.graph == "next":
        graph, inputs, clock = torch.cuda.CUDAGraph(), tokens.clone(), torch.tensor(position, device=tokens.device)
        masks, grid = [None] * len(layers), None
        if model.config.chunking != "random":  # then one comparison says which layers end a chunk
            grid = torch.tensor([(int(a.first), a.config.chunk_size or NEVER) for a in layers], device=tokens.device)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            if grid is not None:
                masks = list((clock - grid[:, :1, None]) % grid[:, 1:, None] == 0)                    # (1, 1) each
            for layer in cache.layers:
                layer.position = clock
            logits = model._run(inputs, masks, cache)
        cache.graph = graph, inputs, clock, logits, grid                          # all that it reads must be kept
    graph, inputs, clock, logits, _ = cache.graph
    inputs.copy_(tokens)
    clock.fill_(position)
    graph.replay()
    for layer in cache.layers:
        layer.position = position + 1
    return logits.clone()


# Attention in training. On long sequences cuDNN's causal attention is faster than a kernel of our own, by more than it
# costs to join two parts. The fold: let t0 = first + L + 1 be the first query that sees a chunk end past its window,
# and write t = t0 + c P + p. Query t sees exactly the chunk ends 0 ... c, whatever its phase p: so for each of the P
# phases this is plain causal attention of length l / P, and all phases share their keys. It is joined with the window
# by the log-sum-exps [5]: the softmax over both is exp(score - lse) with the joined lse, so the backward of each,
# called with the joined out and lse, gives exact gradients.

def _fold_fits(q, first, step):
    return (q.is_cuda and q.dtype != torch.float32 and (q.shape[1] - first) // step >= FOLD_FROM
            and torch.cuda.get_device_capability(q.device) >= (9, 0))


def _fold(x, first, step, L, keys=False):
    """x (l, h, ...), padded -> a view (h, P, n, ...): the queries from t0 on, or the keys, the same for all phases"""
    n = (len(x) - first - L - 1) // step
    if keys:
        return x[first::step][:n].transpose(0, 1)[:, None].expand(-1, step, *[-1] * (x.dim() - 1))
    return x[len(x) - n * step:].unflatten(0, (n, step)).transpose(0, 2)


def _padded(first, step, L, *tensors):
    """(b, l, h, ...) with zeros after them, so that whole steps follow t0 = first + L + 1"""
    return (F.pad(t, (0, 0) * (t.dim() - 2) + (0, -(t.shape[1] - first - L - 1) % step)) for t in tensors)


@torch.library.custom_op(f"{__name__}::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, first: Tensor, step: int, L: int) -> tuple[Tensor, Tensor]:
    """q, k, v (b, l, h, d), the rest as in `attend` -> out (b, l, h, d), lse (b, h, l) float32"""
    (b, l, h, d), first, fold = q.shape, int(first), _fold_fits(q, int(first), step)
    out, lse = torch.empty_like(q), torch.empty(b, h, l, dtype=torch.float32, device=q.device)
    M, N, warps, stages = TILES["forward"]
    _attend_forward_kernel[(triton.cdiv(l, M), b * h)](
        q, k, v, out, lse, l, L, NEVER if fold else first, math.log2(math.e) / math.sqrt(d), step, h, d, M, N,
        num_warps=warps, num_stages=stages)
    if not fold:
        return out, lse
    where = first, step, L
    q, k, v, out, lse = _padded(*where, q, k, v, out, lse.mT)
    for i in range(b):  # one sequence at a time, without copies
        o, s, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            _fold(q[i], *where), _fold(k[i], *where, True), _fold(v[i], *where, True), None, True, 0.0, True)
        window = _fold(lse[i], *where)
        joined = torch.logaddexp(window, s.view(window.shape))
        _fold(out[i], *where).lerp_(o, torch.exp(s.view(window.shape) - joined)[..., None].to(o.dtype))
        window.copy_(joined)
    return out[:, :l].contiguous(), lse[:, :l].mT.contiguous()


@torch.library.custom_op(f"{__name__}::attend_backward", mutates_args=())
def _attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, first: Tensor, step: int,
                     L: int) -> tuple[Tensor, Tensor, Tensor]:
    (b, l, h, d), first, fold, grad = q.shape, int(first), _fold_fits(q, int(first), step), grad.contiguous()
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    scale, n_ends = math.log2(math.e) / math.sqrt(d), 0 if fold else max(0, (l - first - L - 2) // step + 1)
    M, N, warps, stages = TILES["dq"]
    _attend_dq_kernel[(triton.cdiv(l, M), b * h)](
        q, k, v, out, grad, lse, delta, dq, l, L, NEVER if fold else first, scale, step, h, d, M, N,
        num_warps=warps, num_stages=stages)
    for chunks, keys in ((0, l), (1, n_ends)):
        M, N, warps, stages = TILES["dkv chunks" if chunks else "dkv window"]
        if keys:
            _attend_dkv_kernel[(triton.cdiv(keys, N), b * h)](
                q, k, v, grad, lse, delta, dk, dv, l, L, first, scale, chunks, step, h, d, M, N,
                num_warps=warps, num_stages=stages)
    if not fold:
        return dq, dk, dv
    where = first, step, L
    grad, q, k, v, out, dq, dk, dv, lse = _padded(*where, grad, q, k, v, out, dq, dk, dv, lse.mT)
    zero = torch.zeros((), dtype=torch.long, device=q.device)
    for i in range(b):
        keys = _fold(k[i], *where, True)
        gq, gk, gv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            _fold(grad[i], *where), _fold(q[i], *where), keys, _fold(v[i], *where, True), _fold(out[i], *where),
            _fold(lse[i], *where)[..., None], zero, zero, None, None, None, keys.shape[2], keys.shape[2], 0.0, True)
        _fold(dq[i], *where).add_(gq)
        for whole, part in ((dk, gk), (dv, gv)):                                  # all phases' gradients of each key
            whole[i, first::step][:part.shape[2]].add_(part.sum(1).transpose(0, 1))
    return tuple(t[:, :l].contiguous() for t in (dq, dk, dv))


_attend.register_fake(lambda q, *_: (torch.empty_like(q), q.new_empty(q[..., 0].mT.shape, dtype=torch.float32)))
_attend_backward.register_fake(lambda grad, *qkv: tuple(torch.empty_like(t) for t in qkv[:3]))


def _attend_setup(ctx, inputs, output):
    *tensors, first, ctx.step, ctx.L = inputs
    ctx.save_for_backward(*tensors, *output, first)
    ctx.mark_non_differentiable(output[1])


def _attend_vjp(ctx, grad, _):
    return *_attend_backward(grad, *ctx.saved_tensors, ctx.step, ctx.L), None, None, None


_attend.register_autograd(_attend_vjp, setup_context=_attend_setup)


def _ssm_launch(x, w, bias, A, D, first, step, inner, dy=None):
    """y, or with dy the gradients of x, w, bias, A, D."""
    (b, l, _, size), (K, _, width), H = x.shape, w.shape, A.shape[1]
    x, w, front = x.contiguous(), w.contiguous(), step - 1 - int(first)           # front: what the first chunk lacks
    ubc = x.new_empty(b, l, 2, width)

    def conv(name, *tensors):
        N, C, warps, steps = TILES[name]
        _conv_kernel[(triton.cdiv(front + l, step * N * steps), b, 2 * triton.cdiv(width, C))](
            x, w, *tensors, l, front, name != "conv", step, K, width, size, N, C, steps, num_warps=warps)
    conv("conv", ubc, x, x, x)
    Q, warps = TILES["ssm"]
    Q = max(Q, triton.next_power_of_2(step))
    grid = (triton.cdiv(front + l, Q // step * step), b, 2)
    sizes = (l, front, Q // step * step), dict(P=step, H=H, p=inner // H, n=(width - inner) // 2, Q=Q, num_warps=warps)
    if dy is None:
        y = x.new_empty(2, b, l, inner)
        _ssm_kernel[grid](x, ubc, bias, A, D, y, y, y, y, y, *sizes[0], False, **sizes[1])
        return y
    dx, dubc = torch.empty_like(x), torch.empty_like(ubc)
    sums = torch.empty(3, 2, H, b * grid[0], dtype=torch.float32, device=x.device)
    N, _, _, steps = TILES["conv backward"]
    dw = torch.empty(b * triton.cdiv(front + l, step * N * steps), *w.shape, dtype=torch.float32, device=x.device)
    _ssm_kernel[grid](x, ubc, bias, A, D, x, dy.contiguous(), dx, dubc, sums, *sizes[0], True, **sizes[1])
    conv("conv backward", ubc, dubc, dx, dw)
    return dx, dw.sum(0).to(w.dtype), *(t.clone() for t in sums.sum(-1))


def _ssm_step(proj, ssm, boundary, h, conv):
    """ChunkSSM.step between W_in and W_out: proj (b, 2, z | dt | u B C) -> (2, b, inner)."""
    c, y = ssm.config, proj.new_empty(2, len(proj), ssm.config.ssm_inner)
    _ssm_step_kernel[(len(proj), 2)](
        proj.contiguous(), ssm.w_conv, ssm.dt_bias, ssm.A_log, ssm.D, boundary, h, conv, y, len(boundary), c.norm_eps,
        c.conv_size, c.ssm_heads, c.ssm_inner // c.ssm_heads, c.ssm_state, num_warps=8)
    return y


@torch.library.custom_op(f"{__name__}::ssm", mutates_args=())
def _ssm(x: Tensor, w: Tensor, bias: Tensor, A: Tensor, D: Tensor, first: Tensor, step: int, inner: int) -> Tensor:
    return _ssm_launch(x, w, bias, A, D, first, step, inner)


@torch.library.custom_op(f"{__name__}::ssm_backward", mutates_args=())
def _ssm_backward(x: Tensor, w: Tensor, bias: Tensor, A: Tensor, D: Tensor, first: Tensor, step: int, inner: int,
                  dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _ssm_launch(x, w, bias, A, D, first, step, inner, dy)


_ssm.register_fake(lambda x, w, bias, A, D, first, step, inner: x.new_empty(2, *x.shape[:2], inner))
_ssm_backward.register_fake(lambda *inputs: tuple(t.new_empty(t.shape) for t in inputs[:5]))


def _ssm_setup(ctx, inputs, output):
    *tensors, ctx.step, ctx.inner = inputs
    ctx.save_for_backward(*tensors)


def _ssm_vjp(ctx, dy):
    return *_ssm_backward(*ctx.saved_tensors, ctx.step, ctx.inner, dy), None, None, None


_ssm.register_autograd(_ssm_vjp, setup_context=_ssm_setup)


if __name__ == "__main__":
    demo(" ".join(sys.argv[1:]) or "Attamba reads a chunk token by token and keeps one key and one value of it.")
