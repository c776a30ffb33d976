"""Real text that every machine has: the Python standard library's sources, as subword tokens."""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 16_384
# Ten million bytes give every one of the 16,384 subwords its merges, in seconds on two cores.
MAX_BYTES = 10_000_000
# Installed packages live below the library folder but differ by machine; Linux distributions ship
# the tests apart.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def default_cache() -> Path:
    """Folder of the cached files: $XDG_CACHE_HOME/softmax-ext, else ~/.cache/softmax-ext."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softmax-ext"


def read_sources(max_bytes: int = MAX_BYTES) -> list[str]:
    """The standard library's modules in path order, whole files, until `max_bytes` are read.

    Raises:
        FileNotFoundError: this Python has no sources (a zipped or compiled-only library).
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = (p for p in root.rglob("*.py") if LEFT_OUT.isdisjoint(p.relative_to(root).parts))
    texts, size = [], 0
    for path in sorted(paths):
        if size >= max_bytes:
            break
        data = path.read_bytes()
        texts.append(data.decode("utf-8", errors="replace"))
        size += len(data)
    if not texts:
        raise FileNotFoundError(f"no Python sources below {root}")
    return texts


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with exactly `vocab` subwords.

    Raises:
        ValueError: the text is too small for that many subwords.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab:
        got = tokenizer.get_vocab_size()
        raise ValueError(f"the text holds only {got} of the {vocab} subwords asked for")
    return tokenizer


def tokens_file(vocab: int = VOCAB, max_bytes: int = MAX_BYTES, cache: Path | None = None) -> tuple[Path, Path]:
    """Makes the tokens, or finds them in the cache.

    The files' names hold the Python version, the vocabulary and a hash of the text, so a patched
    library never meets another one's tokens.

    Args:
        vocab: number of subwords, at least 256 (the bytes).
        max_bytes: amount of text.
        cache: folder; None means `default_cache()`.

    Returns:
        (tokens, tokenizer): a .npy file with one int32 array of ids in [0, vocab), and the
        tokenizer's .json file.
    """
    cache = default_cache() if cache is None else cache
    texts = read_sources(max_bytes)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    stem = f"stdlib-{platform.python_version()}-{vocab}-{digest}"
    tokens_path, tokenizer_path = cache / f"{stem}.npy", cache / f"{stem}.json"
    if not (tokens_path.exists() and tokenizer_path.exists()):
        tokenizer = train_tokenizer(texts, vocab)
        ids = [np.asarray(e.ids, dtype=np.int32) for e in tokenizer.encode_batch_fast(texts)]
        cache.mkdir(parents=True, exist_ok=True)
        _write_whole(tokenizer_path, lambda part: tokenizer.save(str(part)))
        _write_whole(tokens_path, lambda part: _save_array(part, np.concatenate(ids)))
    return tokens_path, tokenizer_path


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save on a path would append ".npy" to the name
        np.save(file, array)


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """All of the file or none of it, also when two demos start at once or one is interrupted."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
