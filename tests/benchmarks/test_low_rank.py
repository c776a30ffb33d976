"""LoRA on the head, measured: every way is judged and counted, a wrong one is seen, the page shows what was kept."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks import low_rank, records

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_every_way_is_timed_counted_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "low_rank.csv"
    assert low_rank.main(["--shape", "64x32@4000", "--rank", "4", "--seconds", "0", "--results", str(file)]) == 0
    lines = records.read(low_rank.LowRank, file)
    assert [line.call for line in lines] == list(low_rank.ways())
    assert lines[0].ratio == 1
    assert all(line.seconds > 0 and line.rounds >= 5 for line in lines)
    space = {line.call: line.workspace_bytes for line in lines}
    weight = 4 * 4000 * 32  # bytes: the joined weight, and its gradient, on the way to A's and B's
    assert space["W + BA as one weight, lean"] - space[f"{low_rank.OURS}, lean"] > weight
    assert capsys.readouterr().out.splitlines() == low_rank.markdown(lines)


@pytest.mark.parametrize("wrong", range(4))
def test_a_wrong_answer_is_seen(wrong: int) -> None:
    given = low_rank.arrays((5, 3, 11), 2)
    right = low_rank.answers(low_rank.ways()[low_rank.OURS], given)
    low_rank.check(right, right, "itself")
    for factor in (1.001, float("nan")):
        other = tuple(factor * a if i == wrong else a for i, a in enumerate(right))
        with pytest.raises(ValueError, match="apart"):
            low_rank.check(other, right, "another")


def test_the_page_shows_what_was_kept() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    for row in low_rank.markdown(records.read(low_rank.LowRank, ROOT / low_rank.RESULTS)):
        assert row in page
