"""docs/leaderboard.md's tables: who has which feature, as `benchmarks.features` found it, and who was timed where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.features import Answer
from benchmarks.table import Line, machine, markdown

SAID = {"yes": "yes", "absent": "-", "error": "no", "wrong": "**wrong**"}
TIMED = {  # the benchmark's calls of a peer
    "softmax-ext, PyTorch": ("torch", ("ours",)),
    "softmax-ext, JAX": ("jax", ("ours",)),
    "torch: F.linear, F.cross_entropy": ("torch", ("torch", "F.linear + F.cross_entropy", "torch.compile")),
    "torch: F.linear_cross_entropy, chunked": (
        "torch",
        ("F.linear_cross_entropy, auto", "F.linear_cross_entropy, long chunks"),
    ),
    "cut-cross-entropy": ("torch", ("cut-cross-entropy",)),
    "optax": ("jax", ("optax", "optax(x @ W.T)", "jax.nn")),
    "tokamax": ("jax", ("tokamax",)),
}


def features(answers: Sequence[Answer]) -> str:
    """A feature a row, a peer a column, PyTorch's table before JAX's."""
    tables = []
    for door, title in (("torch", "PyTorch"), ("jax", "JAX")):
        mine = [answer for answer in answers if answer.door == door]
        peers = list(dict.fromkeys(answer.peer for answer in mine))
        found = {(answer.peer, answer.feature): SAID[answer.answer] for answer in mine}
        rows = [
            (feature, *(found.get((peer, feature), "") for peer in peers))
            for feature in dict.fromkeys(answer.feature for answer in mine)
        ]
        head = ("", *(peer.removeprefix("softmax-ext, ").replace(title, "softmax-ext") for peer in peers))
        tables.append(f"### {title}\n\n{markdown(head, rows)}")
    return "\n\n".join(tables)


def refusals(answers: Sequence[Answer]) -> str:
    """What a peer said or did where it has the option but not the answer."""
    rows = [
        (a.peer, a.feature, SAID[a.answer], f"`{_short(a.why)}`") for a in answers if a.answer in ("error", "wrong")
    ]
    return markdown(("", "feature", "", "what came"), rows)


def peers(answers: Sequence[Answer], machines: Iterable[Sequence[Line]]) -> str:
    """Every peer with its version, where it was timed, and its time by ours at the head's shape."""
    machines = list(machines)
    rows = []
    for peer, version in dict.fromkeys((answer.peer, answer.version) for answer in answers):
        door, calls = TIMED.get(peer, ("", ()))
        where = [machine(lines) for lines in machines if any(_is(line, door, calls) for line in lines)]
        rows.append((peer, version, "; ".join(where) or "not timed"))
    return markdown(("", "version asked", "timed on"), rows)


def _is(line: Line, door: str, calls: Sequence[str]) -> bool:
    return line.framework.startswith(door or "none") and line.call in calls


def _short(why: str) -> str:
    words = why.replace("|", "/").replace("`", "'")
    return words if len(words) <= 90 else f"{words[:87]}..."
