"""How many weights, how many GiB: arithmetic over a base's shape, line by line, each line with its reason.

An estimate from published sizes, never a measurement; it asks no machine, opens no file and knows no recipe. Bytes are
counted for a GPU in bf16; GiB is 2^30 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

GIB = 2**30
# nf4, double quantised [Dettmers et al. 2023]: 4 bits, one byte for 64 weights, one fp32 for 256 of those bytes
BYTES_A_WEIGHT = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0, "none": 2.0}
_OPTIMIZER = {"adamw": 8.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0}  # bytes a trained weight: two moments
_HEAD_BYTES, _A_LOGIT = 2**28, 14  # held at once for logits; bytes each, at most
_A_BACKWARD = 12.0  # of them, at the peak: log p, and the gradients of log p and of the logit, all fp32
_UNPACKED = {"nf4": 2.0 + 4 / 64, "int8": 4.0, "none": 0.0}  # bytes a weight of a matrix unpacked for the backward
_CONTEXT = 0.6  # GiB of a CUDA context and its libraries' workspaces: a guess
_FILLED = 0.95  # share of a card that is filled where fewer layers could be kept: its own size is a round number
_LOOSE = 0.1  # share of what comes and goes that an allocator may not find again: a guess
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
    """What a training puts on a GPU. `tokens`: of the largest micro-batch; nothing is padded.

    `layers`: those with an adapter; `recomputed`: of these the lowest, whose activations are computed twice. `below`:
    lower ones whose work is done once, before training. `accumulated`: a step has several micro-batches, so gradients
    wait while the next one is computed. `a_layer`: measured bytes kept a token and layer, where somebody did.
    """

    shape: Shape
    quantization: str
    adapter: int
    layers: int
    optimizer: str
    tokens: int
    recomputed: int
    below: int = 0
    targets: tuple[str, ...] = MATRICES
    accumulated: bool = False
    a_layer: float | None = None

    @property
    def frozen(self) -> float:
        """Weights of the matrices that stay on the device."""
        return self.shape.in_layers * (1 - self.below / self.shape.layers)

    @property
    def rank(self) -> float:
        """Of the adapter."""
        return self.adapter / adapter_weights(self.shape, 1, self.targets, self.layers)


@dataclass(frozen=True)
class Line:
    """One entry of the bill."""

    name: str
    gib: float
    reason: str


def bill(load: Load) -> list[Line]:
    """GiB line by line: what is there all the time, and then at the moment of a step that needs most."""
    return [Line(name, size / GIB, reason) for name, size, reason in _bytes(load)]


def total(load: Load) -> float:
    """GiB of all lines."""
    return sum(line.gib for line in bill(load))


def _bytes(load: Load) -> Iterator[tuple[str, float, str]]:
    shape, a_weight = load.shape, BYTES_A_WEIGHT[load.quantization]
    exact = "4 bits and 0.127 of double quantised scales" if load.quantization == "nf4" else f"{8 * a_weight:g} bits"
    where = f"the upper {shape.layers - load.below} layers" if load.below else "layers"
    yield "base", load.frozen * a_weight, f"{short(load.frozen)} weights in {where}, {exact} each"
    table = "one table for both" if shape.tied else "the head alone" if load.below else "a table each"
    outside = shape.vocabulary * shape.hidden if load.below else shape.outside
    norms = 4.0 * (2 * (shape.layers - load.below) + 1) * shape.hidden
    yield "embeddings, head", 2.0 * outside + norms, f"{short(outside)} weights, {table}, bf16; norms in fp32"
    yield "adapter", 4.0 * load.adapter, f"{short(load.adapter)} weights, fp32"
    state = _OPTIMIZER[load.optimizer]
    yield "optimizer", state * load.adapter, f"{load.optimizer}: {state:g} bytes a trained weight"
    most = max(_moments(load), key=lambda one: one.total)
    yield "activations", most.activations, most.kept
    yield "gradients", most.gradients, "fp32, of the weights that have one when most is needed"
    yield "work", most.work, f"most is needed {most.reason}"
    yield "CUDA", _CONTEXT * GIB, "context, workspaces: a guess, not measured on a GPU"
    yield (
        "margin",
        _LOOSE * most.total,
        f"{_LOOSE:.0%} of activations, gradients and work for loose blocks: a guess, not measured on a GPU",
    )


def head_tokens(vocabulary: int) -> int:
    """Positions whose logits training holds at once: a quarter of a GiB of them, at least 64."""
    return max(64, _HEAD_BYTES // (_A_LOGIT * vocabulary))


@dataclass(frozen=True)
class _Moment:
    """Bytes that come and go, at one moment of a step."""

    activations: float
    gradients: float
    work: float
    kept: str
    reason: str

    @property
    def total(self) -> float:
        return self.activations + self.gradients + self.work


def _moments(load: Load) -> Iterator[_Moment]:
    """Those that may need most: the backward of the head, of three layers or two, and AdamW's own step.

    On the way down activations go and gradients come, both evenly, so that nothing between is larger.
    """
    shape, tokens = load.shape, load.tokens
    a_layer, cast, waiting = tokens * _layer_bytes(load), 2.0 * load.adapter, 4.0 * load.adapter * load.accumulated
    held = min(tokens, head_tokens(shape.vocabulary))
    waits = 4.0 * shape.hidden * tokens if held < tokens else 0.0  # the stream, for the parts whose turn comes later
    logits = _A_BACKWARD * held * shape.vocabulary + waits
    why = f"where {held:,} tokens x {shape.vocabulary:,} go through the head at once"
    upper = load.layers - load.recomputed
    everything = activations(load) + cast * upper / load.layers
    kept = f"{tokens:,} tokens a micro-batch, {_how(load)}"
    yield _Moment(everything, waiting, logits, kept, why)
    again = a_layer + cast / load.layers if load.recomputed else 0.0
    back, why = _layer_backward(load), f"in the backward of {{}} layer; {_unpacked(load)}"
    yield _Moment(everything + (0.0 if upper else again), waiting, back, kept, why.format("the highest"))
    if upper and load.recomputed:
        inputs, done = activations(replace(load, layers=load.recomputed)), 4.0 * load.adapter * upper / load.layers
        yield _Moment(inputs + again, max(waiting, done), back, kept, why.format("the highest computed twice"))
    lowest = a_layer + cast / load.layers + 4.0 * shape.hidden * tokens
    kept = f"{tokens:,} tokens a micro-batch, of one layer: the others' are gone"
    others = max(waiting, 4.0 * load.adapter * (1 - 1 / load.layers))
    yield _Moment(lowest, others, back, kept, why.format("the lowest"))
    step = 4.0 * load.adapter if load.optimizer == "adamw" else 0.0
    yield _Moment(
        0.0, 4.0 * load.adapter, step, "none are left", "in the optimizer's step, for one copy of the adapter"
    )


def activations(load: Load) -> float:
    """Bytes kept for the backward pass: of layers in full or, where computed twice, the fp32 input of each."""
    kept = _layer_bytes(load) * (load.layers - load.recomputed) + 4.0 * load.shape.hidden * load.recomputed
    return load.tokens * (kept + 8.0 * load.shape.head)  # and the angles of all positions


def _how(load: Load) -> str:
    if load.recomputed in (0, load.layers):
        return "each layer's input alone, one layer at a time computed again" if load.recomputed else "of all layers"
    return f"of the upper {load.layers - load.recomputed} layers; of the others the input alone, computed again"


def recomputed(load: Load, room: float) -> int:
    """Layers that are computed twice to fit `room` GiB, a little less: as few as do, all of them where nothing does."""
    counts = range(load.layers + 1)
    return next((count for count in counts if total(replace(load, recomputed=count)) <= _FILLED * room), load.layers)


def standing(load: Load) -> float:
    """GiB of what is there before the first step: weights, adapter, CUDA itself."""
    there = ("base", "embeddings, head", "adapter", "CUDA")
    return sum(line.gib for line in bill(load) if line.name in there)


def _layer_bytes(load: Load) -> float:
    """Bytes a token and layer: the fp32 stream twice, what LoRA, attention and a gated MLP keep.

    Each adapted matrix keeps its input in bf16 once more, and gives fp32; attention keeps queries, keys, values and its
    answer in bf16; the MLP its gate, what the gate lets through, and the other half.
    """
    if load.a_layer is not None:
        return load.a_layer
    shape, targets = load.shape, load.targets
    q, kv = shape.heads * shape.head, shape.kv_heads * shape.head
    inputs = sum(2 * shape.matrices[name][0] + 2 * load.rank for name in targets)
    gate, up = (4 if name in targets else 2 for name in ("gate_proj", "up_proj"))
    attention, gated = 2 * (2 * q + 2 * kv) + 4 * shape.heads, (2 * gate + up) * shape.inner
    # int8 keeps the inputs of its own matrices too, in the stream's fp32
    int8 = 8 * shape.hidden + 4 * shape.inner if load.quantization == "int8" else 0
    return 8 * shape.hidden + 8 + inputs + attention + gated + int8


def _layer_backward(load: Load) -> float:
    """Bytes beside what is kept, where a layer's backward needs most: in its MLP.

    Either three fp32 gradients as wide as the MLP, its bf16 input just freed, or a matrix unpacked and half of them.
    """
    shape, free = load.shape, 2 if "down_proj" in load.targets else 0
    wide, stream = load.tokens * shape.inner, 4.0 * load.tokens * shape.hidden
    halves = 8 if load.quantization == "int8" else 6
    return stream + max((12 - free) * wide, _UNPACKED[load.quantization] * _largest(shape) + (halves - free) * wide)


def _unpacked(load: Load) -> str:
    if load.quantization == "none":
        return "no matrix is unpacked"
    return f"its largest matrix, {short(_largest(load.shape))} weights, is unpacked there"


def _largest(shape: Shape) -> int:
    return max(a * b for a, b in shape.matrices.values())


def lower_layers(load: Load) -> float:
    """GiB of the lower layers, which come back to the device whenever a text is generated."""
    return (load.shape.in_layers - load.frozen) * BYTES_A_WEIGHT[load.quantization] / GIB


def prefix(load: Load, tokens: int) -> float:
    """GiB of stored activations of so many tokens: the fp32 stream."""
    return 4.0 * load.shape.hidden * tokens / GIB


def training_flops(load: Load, tokens: float) -> float:
    """Of a frozen base: 2 a weight and token forward, 2 backward, 2 more where the forward is done again."""
    again = 2.0 * load.recomputed / load.layers
    return (4.0 + again) * (load.frozen + load.shape.outside) * tokens


def short(count: float) -> str:
    """A large number in three digits: `7.24 B`, `41.9 M`, `812`."""
    for size, sign in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if count >= size:
            return f"{count / (size if size > 1e4 else 1e3):.3g}{sign}"
    return f"{count:,.0f}"


def gib(amount: float) -> str:
    """`4.02 GiB`, or `12.3 MiB` where that is nothing."""
    return f"{amount:.2f} GiB" if amount >= 0.1 else f"{amount * 1024:.1f} MiB"
