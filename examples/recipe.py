"""What all runs share: sizes, initial weights and batches, made by NumPy from one seed."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Weights = dict[str, np.ndarray]
SAMPLES = 64  # points a row of the sampled gradient, in PyTorch
# linear_cross_entropy works by this many chunks of the rows: its own choice would be one for a head this small.
CHUNKS = 8


@dataclass(frozen=True)
class Recipe:
    """A one-block causal transformer with a tied embedding, and how it is trained.

    The defaults give N = 1024 rows of V = 16,384 classes and D = 64 features, so that the loss
    and the matmuls around it are nearly all of a step.

    The optimizer is SGD with momentum: Adam divides by the gradient's size, and would train alike
    with a gradient that is wrong by a constant factor.

    Attributes:
        relabel: give every token another id. That is the same model, data and training up to the
            order of the sums over the vocabulary, so the curve may move by rounding only.
    """

    vocab: int = 16_384
    width: int = 64
    heads: int = 4
    length: int = 128
    batch: int = 8
    steps: int = 70
    learning_rate: float = 0.3
    momentum: float = 0.9
    seed: int = 0
    relabel: bool = False

    def new_ids(self) -> np.ndarray:
        """(V,) int32: the id that each token of the corpus has in this run."""
        ids = np.arange(self.vocab, dtype=np.int32)
        return np.random.default_rng(self.seed + 1).permutation(ids) if self.relabel else ids

    def initial_weights(self) -> Weights:
        """Float32 arrays by name; matrices are (out, in), as torch.nn.functional.linear."""
        rng = np.random.default_rng(self.seed)
        width = self.width

        def normal(*shape: int, scale: float) -> np.ndarray:
            return (scale * rng.standard_normal(shape)).astype(np.float32)

        embedding = np.empty((self.vocab, width), np.float32)
        embedding[self.new_ids()] = normal(self.vocab, width, scale=0.02)
        return {
            "embedding": embedding,
            "position": normal(self.length, width, scale=0.02),
            "qkv": normal(3 * width, width, scale=width**-0.5),
            "out": normal(width, width, scale=width**-0.5),
            "up": normal(4 * width, width, scale=width**-0.5),
            "down": normal(width, 4 * width, scale=(4 * width) ** -0.5),
        }

    def in_corpus_order(self, weights: Weights) -> Weights:
        """The weights with the embedding's rows in the order of the corpus's ids, whatever this run called them."""
        return weights | {"embedding": weights["embedding"][self.new_ids()]}

    def batches(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """`steps` arrays (batch, length + 1) int32: random windows of the corpus."""
        rng = np.random.default_rng(self.seed)
        new_ids = self.new_ids()
        window = np.arange(self.length + 1)
        for _ in range(self.steps):
            start = rng.integers(0, len(tokens) - self.length, size=(self.batch, 1))
            yield new_ids[tokens[start + window]]
