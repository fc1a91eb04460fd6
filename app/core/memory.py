"""How much memory a training job takes at its peak, computed from shapes alone. Pure: no torch, no worker.

What autograd keeps of a block is counted tensor by tensor, after Korthikanti et al. 2022, "Reducing
Activation Recomputation in Large Transformer Models", section 4, for the forward pass of `worker/training`:
flat batches without padding, attention whose matrix is never stored (Dao et al. 2022, "FlashAttention"),
logits at labels only, LoRA products that keep their input and the low-rank one (Hu et al. 2021). NF4 takes 4
bits a weight and two constants a block (Dettmers et al. 2023, "QLoRA", section 3); Adam two float32 moments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from heapq import nlargest

from app.core.shapes import Shape

FLOAT32 = 4
NF4 = (
    0.5 + 1 / 64 + FLOAT32 / (64 * 256)
)  # bytes a weight: its bits, a byte a block of 64, a float a 256 of these
TOKEN_LISTS = 48  # bytes of host memory a token of the files takes as Python's integers
# An idle trainer: Python, torch, transformers, peft and bitsandbytes on a CPU; CUDA's context on a GPU.
PROCESS_BYTES = {"cpu": 450 * 10**6, "cuda": 600 * 10**6}
# Tokens of one pass, where memory allows. On CPUs more than one example of the default max_length, so that
# rows which share a long prompt come together.
MOST_TOKENS = {"cpu": 3072, "cuda": 16_384}
LEAST_TOKENS = 1  # one example a pass
# Share of a device's memory. What is computed is what tensors hold; glibc's heap keeps more between passes: a
# 135M model on a CPU took 1 % more than predicted in a first pass of 2,048 tokens, 39 % more after several.
USABLE = {"cpu": 0.7, "cuda": 0.85}


@dataclass(frozen=True, slots=True)
class Device:
    """Where a job would run, as its worker says of itself."""

    kind: str = "cpu"  # or cuda
    number_bytes: int = FLOAT32  # of one number in products
    memory_bytes: int | None = None  # None: nobody knows


@dataclass(frozen=True, slots=True)
class Method:
    """What is trained."""

    adapter: str
    rank: int = 0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One example of the data."""

    tokens: int
    own: int  # tokens computed for it when the row before it in its pass is there
    labels: int
    branch: int = 0  # tokens that no other row has there; 0 where no row begins like it

    def cut(self, tokens: int) -> Row:
        """The row with at most so many tokens; what others begin with alike is cut last."""
        shared = self.tokens - self.own
        kept = min(self.tokens, tokens)
        return Row(kept, max(1, kept - shared), min(self.labels, kept), min(self.branch, kept))


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward and backward pass holds."""

    tokens: int = 0  # those that rows begin with alike, once
    labels: int = 0
    keys: int = 0  # tokens that rows with a shared beginning look at, each row's for itself
    cells: int = 0  # of the masks by which they do: own tokens times tokens

    def plus(self, row: Row) -> Pass:
        """The pass with one more row."""
        return Pass(
            self.tokens + (row.own if self.tokens else row.tokens),
            self.labels + row.labels,
            self.keys + (row.tokens if row.branch else 0),
            self.cells + row.branch * row.tokens,
        )


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes by what they are for."""

    process: int
    weights: int
    trained: int  # adapter or full weights' gradients and optimizer states, and the adapter itself
    data: int  # tokens of the files
    activations: int
    peak_of_pass: int  # logits and their gradients, or what the backward pass of one block needs beside
    saving: int  # copies while a checkpoint is written, when no pass is under way

    @property
    def total(self) -> int:
        """The peak."""
        standing = self.process + self.weights + self.trained + self.data
        return standing + max(self.activations + self.peak_of_pass, self.saving)


@dataclass(frozen=True, slots=True)
class Workload:
    """A job as far as its memory depends on it. `rows`: its examples, or those that decide about memory."""

    shape: Shape
    method: Method
    rows: tuple[Row, ...]
    batch_size: int
    file_tokens: int  # of all examples it reads

    def footprint(self, device: Device, *, most_tokens: int) -> Footprint:
        """What the job takes where one pass has at most so many tokens, or one example."""
        shape, method = self.shape, self.method
        is_full = method.adapter == "full"
        trained = shape.parameters if is_full else adapter_parameters(shape, method)
        adam = 2 * FLOAT32 * trained
        largest = largest_pass(self, device=device, most_tokens=most_tokens)
        return Footprint(
            process=PROCESS_BYTES[device.kind],
            weights=_weights(shape, method, device),
            trained=FLOAT32 * trained * (1 if is_full else 2) + adam,
            data=TOKEN_LISTS * self.file_tokens if device.kind == "cpu" else 0,
            activations=activation_bytes(shape, method, device=device, one=largest),
            peak_of_pass=max(
                largest.labels * label_bytes(shape), largest.tokens * _backward_bytes(shape, device)
            ),
            saving=adam if device.kind == "cpu" else 0,
        )

    def tokens_a_pass(self, device: Device) -> int:
        """Tokens of one pass: what is fast on that kind of device, halved until it fits into its memory."""
        most = MOST_TOKENS[device.kind]
        if device.memory_bytes is None:
            return most
        room = USABLE[device.kind] * device.memory_bytes
        while most > LEAST_TOKENS and self.footprint(device, most_tokens=most).total > room:
            most //= 2
        return most

    def peak_bytes(self, device: Device) -> int:
        """The predicted peak there."""
        return self.footprint(device, most_tokens=self.tokens_a_pass(device)).total

    def fits(self, device: Device) -> bool:
        """Whether the device has room for the job, if need be with one example a pass."""
        return device.memory_bytes is None or self.least_bytes(device) <= device.memory_bytes

    def least_bytes(self, device: Device) -> int:
        """The predicted peak with one example a pass."""
        return self.footprint(device, most_tokens=LEAST_TOKENS).total

    def cut(self, max_length: int) -> Workload:
        """The job with examples of at most so many tokens."""
        return replace(self, rows=tuple(row.cut(max_length) for row in self.rows))


def adapter_parameters(shape: Shape, method: Method) -> int:
    """Weights of both factors of every adapted layer."""
    layers = shape.adapted(method.target_modules)
    return sum(method.rank * (linear.inputs + linear.outputs) for linear in layers)


def activation_bytes(shape: Shape, method: Method, *, device: Device, one: Pass) -> int:
    """What the forward pass of `one` keeps for the backward one, logits apart."""
    attention = _attention_number_bytes(device)
    shared = 2 * attention * shape.heads * shape.head_size * one.keys + FLOAT32 * one.cells
    return one.tokens * _token_bytes(shape, method, device) + shape.layers * shared


def _token_bytes(shape: Shape, method: Method, device: Device) -> int:
    b, h, q = device.number_bytes, shape.hidden, shape.heads * shape.head_size
    attention = _attention_number_bytes(device)
    norms = FLOAT32 * (2 * h + 2) + 2 * b * h  # inputs and one number each, in float32; outputs
    # Queries and result of a segment, its keys and values, a logarithm a head; the result of all segments.
    heads = attention * 2 * (q + shape.key_heads * shape.head_size) + FLOAT32 * shape.heads + b * q
    mlp = b * shape.intermediate * (4 if shape.is_gated else 2)
    rotation = 2 * FLOAT32 * shape.head_size
    return shape.layers * (norms + heads + mlp) + rotation + _beside(shape, method, device)


def _attention_number_bytes(device: Device) -> int:
    return FLOAT32 if device.kind == "cpu" else device.number_bytes


def label_bytes(shape: Shape) -> int:
    """What a label takes between the passes: log-probabilities, their gradient, and that of the logits."""
    return 3 * FLOAT32 * shape.vocabulary


def _beside(shape: Shape, method: Method, device: Device) -> int:
    """What the method keeps for each token beside the frozen model's own."""
    if method.adapter == "full":  # what the norms' own weights are multiplied with
        return (2 * shape.layers + 2) * FLOAT32 * shape.hidden
    adapted = shape.adapted(method.target_modules)
    low = len(adapted) * method.rank * device.number_bytes
    if method.dropout == 0.0:
        return low
    return low + (FLOAT32 + 1) * sum(linear.inputs for linear in adapted)  # inputs of their own, and masks


def _backward_bytes(shape: Shape, device: Device) -> int:
    """Gradients that exist at once for each token while the last block's MLP goes backward."""
    return device.number_bytes * (shape.intermediate * (4 if shape.is_gated else 2) + 2 * shape.hidden)


def _weights(shape: Shape, method: Method, device: Device) -> int:
    if method.adapter == "full":  # in float32, and once more in the number type of the products
        copies = 0 if device.number_bytes == FLOAT32 else device.number_bytes * shape.linear_parameters
        return FLOAT32 * shape.parameters + copies
    if method.adapter == "qlora":
        linear = shape.linear_parameters
        largest = max((one.outputs * one.inputs for one in shape.linears), default=0)
        rest = (shape.parameters - linear + largest) * device.number_bytes  # one is unpacked at a time
        return round(linear * NF4) + rest
    return shape.parameters * device.number_bytes


def largest_pass(work: Workload, *, device: Device, most_tokens: int) -> Pass:
    """The most that one pass of a batch can hold; a row is never split."""
    shape = work.shape

    def bytes_of(one: Pass) -> int:
        kept = activation_bytes(shape, work.method, device=device, one=one)
        return kept + one.labels * label_bytes(shape)

    def weight(row: Row) -> int:
        return bytes_of(Pass().plus(row))

    found = Pass()
    for order in (weight, lambda row: weight(row) / max(1, row.own)):
        one = Pass()
        for row in nlargest(work.batch_size, work.rows, key=order):
            more = one.plus(row)
            if one.tokens == 0 or more.tokens <= most_tokens:
                one = more
        found = max(found, one, key=bytes_of)
    return found
