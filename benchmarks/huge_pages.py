"""Built-in calls in a process of their own, whose large arrays lie in huge pages: THP_MEM_ALLOC_ENABLE=1.

PyTorch reads the variable once, when it allocates for the first time, so a call without it and one with it need two
processes. The other process waits while this one measures, and is told when its turn has come; that takes about 0.1 ms,
so only large calls are asked of it.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import sys
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.cases import Case
from benchmarks.heads import HeadCase
from benchmarks.timing import LARGE, Call, peak_bytes

VARIABLE = "THP_MEM_ALLOC_ENABLE"


def why_not(case: Case | HeadCase) -> str | None:
    """Why a case is not asked of the other process."""
    if sys.platform != "linux":
        return "Linux alone has them"
    return None if case.logits_bytes > LARGE else f"at {case} the arrays are too small for it to matter"


class Process:
    """The built-in calls of one case; the process ends with the object."""

    def __init__(self, door: str, case: Case | HeadCase) -> None:
        self._pipe, its = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(its, door, case), daemon=True)
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = "1"
        try:
            process.start()
        finally:
            del os.environ[VARIABLE]
            if before is not None:
                os.environ[VARIABLE] = before
        its.close()

    def call(self, op: str, like: Call) -> Call:
        """One op's call, for use as the same call made here; its answers are arrays of NumPy."""
        ask = partial(self._ask, op)
        return Call(
            run=(lambda _: ask("run")) if like.fresh else partial(ask, "run"),
            fresh=partial(ask, "fresh") if like.fresh else None,
            workspace=partial(ask, "workspace") if like.workspace else None,
            peak=partial(ask, "peak"),
            answers=partial(ask, "answers"),
        )

    def _ask(self, *question: Any) -> Any:
        self._pipe.send(question)
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(pipe: Connection, door: str, case: Case | HeadCase) -> None:
    """Answer until the other end is closed."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    module = importlib.import_module(door)
    on = module.Inputs(case)
    calls: dict[str, Call] = {}
    arguments: list[Any] = []
    gc.disable()
    while True:
        try:
            op, what, *words = pipe.recv()
        except EOFError:
            return
        try:
            if op not in calls:
                make, _, built_in = module.PARTS[op]
                calls[op] = make(built_in, on)
            pipe.send(_answer(module, calls[op], arguments, what, *words))
        except Exception as error:
            pipe.send(RuntimeError(f"with {VARIABLE}=1: {error!r}"))


def _answer(module: Any, call: Call, arguments: list[Any], what: str, *words: Any) -> Any:
    if what == "fresh":
        arguments.append(call.fresh and call.fresh())
    elif what == "run":  # what it returns is freed before the answer is sent, within the time
        call.run() if call.fresh is None else call.run(arguments.pop())
    elif what == "answers":
        return [module.numpy(answer) for answer in call()]
    elif what == "workspace":
        return call.workspace and call.workspace(*words)
    elif what == "peak":
        return peak_bytes(call)
    return None
