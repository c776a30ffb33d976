"""The demo's corpus, made once a file. Imports stand inside: this is loaded where the demo's packages are absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def tokens_path(tmp_path_factory) -> Path:
    from examples import corpus
    from tests.demo.small import TINY

    return corpus.tokens_file(TINY.vocab, 50_000, tmp_path_factory.mktemp("cache"))[0]


@pytest.fixture(scope="module")
def tokens(tokens_path) -> np.ndarray:
    """The corpus without the last class, so that a loss may wrongly drop that column."""
    from tests.demo.small import TINY

    ids = np.load(tokens_path)
    return np.where(ids == TINY.vocab - 1, 0, ids)
