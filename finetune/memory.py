"""How many weights, how many GiB: arithmetic over a base's shape, line by line, each line with its reason.

An estimate from published sizes, never a measurement; it asks no machine, opens no file and knows no recipe. Bytes are
counted for a GPU in bf16; GiB is 2^30 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

GIB = 2**30
KEPT_BYTES = 68  # a hidden unit, layer and token, where no activation is computed twice: a guess
# nf4, double quantised [Dettmers et al. 2023]: 4 bits, one byte for 64 weights, one fp32 for 256 of those bytes
BYTES_A_WEIGHT = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0, "none": 2.0}
OPTIMIZER = {"adamw": 8.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0}  # bytes a trained weight: two moments
HEAD_BYTES, _A_LOGIT = 2**28, 14  # held at once for logits; bytes each: bf16, fp32, log p, gradient
_CONTEXT = 0.6  # GiB of a CUDA context, its libraries' workspaces and loose blocks: a guess
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind. `head`: width of one attention head; `tied`: the head shares the embedding table."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool = False

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(in, out) of every matrix of a layer."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        sizes = [(self.hidden, q), (self.hidden, kv), (self.hidden, kv), (q, self.hidden)]
        return dict(zip(MATRICES, [*sizes, *[(self.hidden, self.inner)] * 2, (self.inner, self.hidden)], strict=True))

    @property
    def in_layers(self) -> int:
        """Weights of all matrices of all layers: what is quantised."""
        return self.layers * sum(a * b for a, b in self.matrices.values())

    @property
    def outside(self) -> int:
        """Weights of the embedding table and the head: what is not."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def weights(self) -> int:
        """All of them, norms included."""
        return self.in_layers + self.outside + (2 * self.layers + 1) * self.hidden


# of their config.json; instruct and chat models of the same name have the same shape
WELL_KNOWN = {
    "mistral-7b-v0.1": Shape(4096, 14336, 32, 32, 8, 128, 32000),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 128, 32000),
    "meta-llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "qwen2.5-7b": Shape(3584, 18944, 28, 28, 4, 128, 152064),
}


def well_known(hub_id: str) -> Shape | None:
    """The shape behind a Hub id, from a small table; None for all others."""
    name = hub_id.rpartition("/")[2].lower()
    for variant in ("-instruct", "-chat", "-hf"):
        name = name.replace(variant, "")
    return WELL_KNOWN.get(name)


def adapter_weights(shape: Shape, rank: int, targets: Sequence[str], layers: int) -> int:
    """Weights of a LoRA adapter on `layers` layers: rank x (in + out) a matrix."""
    return layers * sum(rank * sum(shape.matrices[name]) for name in targets)


@dataclass(frozen=True)
class Load:
    """What a training puts on a GPU. `tokens`: of the largest micro-batch, padding included.

    `layers`: those with an adapter. `below`: lower ones whose work is done once, before training.
    """

    shape: Shape
    quantization: str
    adapter: int
    layers: int
    optimizer: str
    tokens: int
    checkpointing: bool
    below: int = 0

    @property
    def frozen(self) -> float:
        """Weights of the matrices that stay on the device."""
        return self.shape.in_layers * (1 - self.below / self.shape.layers)


@dataclass(frozen=True)
class Line:
    """One entry of the bill."""

    name: str
    gib: float
    reason: str


def bill(load: Load) -> list[Line]:
    """GiB line by line."""
    return [Line(name, size / GIB, reason) for name, size, reason in _bytes(load)]


def _bytes(load: Load) -> Iterator[tuple[str, float, str]]:
    shape, a_weight = load.shape, BYTES_A_WEIGHT[load.quantization]
    exact = "4 bits and 0.127 of double quantised scales" if load.quantization == "nf4" else f"{8 * a_weight:g} bits"
    where = f"the upper {shape.layers - load.below} layers" if load.below else "layers"
    yield "base", load.frozen * a_weight, f"{short(load.frozen)} weights in {where}, {exact} each"
    table = "one table for both" if shape.tied else "the head alone" if load.below else "a table each"
    outside = shape.vocabulary * shape.hidden if load.below else shape.outside
    yield "embeddings, head", 2.0 * outside, f"{short(outside)} weights, {table}, bf16"
    yield "adapter", 4.0 * load.adapter, f"{short(load.adapter)} weights, fp32"
    yield "gradients", 4.0 * load.adapter, "as many, fp32"
    state = OPTIMIZER[load.optimizer]
    yield "optimizer", state * load.adapter, f"{load.optimizer}: {state:g} bytes a trained weight"
    how = "one layer at a time, its input kept" if load.checkpointing else "of all layers"
    yield "activations", activations(load), f"{load.tokens:,} tokens a micro-batch, {how}"
    largest = max(a * b for a, b in shape.matrices.values())
    if load.quantization != "none":
        yield "one matrix in bf16", 2.0 * largest, f"the largest has {short(largest)} weights, unpacked when used"
    held = min(load.tokens, head_tokens(shape.vocabulary))
    yield "logits", float(_A_LOGIT * held * shape.vocabulary), f"{held:,} tokens x {shape.vocabulary:,} at once"
    yield "CUDA", _CONTEXT * GIB, "context, workspaces, loose blocks: a guess"


def head_tokens(vocabulary: int) -> int:
    """Positions whose logits training holds at once: a quarter of a GiB of them, at least 64."""
    return max(64, HEAD_BYTES // (_A_LOGIT * vocabulary))


def activations(load: Load) -> float:
    """Bytes kept for the backward pass; with checkpointing, each layer's fp32 input and one layer in full."""
    full = load.tokens * layer_bytes(load.shape)
    if load.checkpointing:
        return load.tokens * 4.0 * load.shape.hidden * load.layers + full
    return load.layers * full


def layer_bytes(shape: Shape) -> float:
    """Bytes a token and layer: fp32 residual and norms, bf16 inputs of seven LoRA matrices, sdpa, a gated MLP."""
    q, kv = shape.heads * shape.head, shape.kv_heads * shape.head
    norms, inputs = 16 * shape.hidden, 2 * (5 * shape.hidden + q)
    attention, gated = 2 * (2 * q + 2 * kv), 8 * shape.inner
    return norms + inputs + attention + gated


def guessed_checkpointing(shape: Shape, tokens: int, free_gib: float) -> bool:
    """What `auto` is likely to choose with so much memory free: the rule of `model.needs_checkpointing`."""
    return KEPT_BYTES * shape.hidden * shape.layers * tokens > free_gib * GIB / 2


def lower_layers(load: Load) -> float:
    """GiB of the lower layers, which come back to the device whenever a text is generated."""
    return (load.shape.in_layers - load.frozen) * BYTES_A_WEIGHT[load.quantization] / GIB


def prefix(load: Load, tokens: int) -> float:
    """GiB of stored activations of so many tokens: the fp32 stream."""
    return 4.0 * load.shape.hidden * tokens / GIB


def training_flops(load: Load, tokens: int) -> float:
    """Of a frozen base: 2 a weight and token forward, 2 backward, 2 more where the forward is done again."""
    return (6.0 if load.checkpointing else 4.0) * (load.frozen + load.shape.outside) * tokens


def short(count: float) -> str:
    """A large number in three digits: `7.24 B`, `41.9 M`, `812`."""
    for size, sign in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if count >= size:
            return f"{count / (size if size > 1e4 else 1e3):.3g}{sign}"
    return f"{count:,.0f}"


def gib(amount: float) -> str:
    """`4.02 GiB`, or `12.3 MiB` where that is nothing."""
    return f"{amount:.2f} GiB" if amount >= 0.1 else f"{amount * 1024:.1f} MiB"
