"""What is shared among processes, when not all of them could make it; without starting any."""

from __future__ import annotations

import pickle

import pytest

from plot_align.errors import InputError
from plot_align.inference import dealing


def made() -> tuple[list[int], list[str]]:
    return [1], ["a"]


def test_a_process_drops_what_it_is_told_to():
    team = dealing._Team(1, 2, None)
    team._serve_one("share", 3, list, ())
    team._serve_one("share", 4, made, ())
    assert set(team.shared) == {(3, 0), (4, 0), (4, 1)}
    team._serve_one("drop", 4)
    assert set(team.shared) == {(3, 0)}


def test_where_one_fails_the_others_let_go_of_theirs(monkeypatch):
    """Else a model that rank 1 could not load would stay on rank 2 beside the next one."""
    sent = []
    monkeypatch.setattr(dealing._Team, "_send", lambda self, message: sent.append(pickle.loads(message)[1]))

    def gather(self, outcome):
        failed = dealing._Outcome(error=InputError("no memory")) if sent[-1][0] == "share" else dealing._Outcome()
        return [outcome, failed]

    monkeypatch.setattr(dealing._Team, "_gather", gather)
    team = dealing._Team(0, 2, None)
    with pytest.raises(InputError, match="no memory"):
        team.share(team.pack(("share", 7, made, ())), 7)
    assert [message[:2] for message in sent] == [("share", 7), ("drop", 7)]
    assert team.shared == {}
