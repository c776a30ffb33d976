"""Arrays of the public ops, and their judge."""

from __future__ import annotations

from tests.judging import cases
from tests.judging.frameworks import Named

SOFTMAXES = ("softmax", "log_softmax")


KINDS = ("hard", "hard weighted", "soft", "soft weighted")


def loss_arrays(kind: str, classes: int, dtype: str) -> tuple[Named, cases.Rows]:
    r = cases.rows(classes, dtype)
    arrays = {"input": r.x, "target": r.target if "hard" in kind else cases.soft(classes, dtype, len(r.x))}
    if "weighted" in kind:
        arrays["weight"] = cases.class_weight(classes, dtype)
        arrays["token_weight"] = cases.token_weight(len(r.x), dtype)
    return arrays, r
