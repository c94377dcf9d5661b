"""The tables of a worker's phases: complete, and without dead ends."""

from __future__ import annotations

from tests.tools.diagrams import phases
from xenbackend.protocol.messages import Stage
from xenbackend.supervisor.vbd.phase import ATTACHED, FAILURES, LIMIT_S, MOVES, STANDINGS, Goal, Move, Phase


def test_every_phase_that_waits_for_the_worker_has_a_limit() -> None:
    """R23: each phase in which only the worker can go on has a limit."""
    resting = {Phase.NONE, Phase.OPEN, Phase.SERVING, Phase.RESTING}

    assert set(Phase) - resting == set(LIMIT_S)


def test_every_goal_is_reached() -> None:
    """From each phase, moves and standings lead to each goal; after a worker's end all begins at NONE."""
    ends = {Goal.NONE: Phase.NONE, Goal.OPEN: Phase.OPEN, Goal.SERVE: Phase.SERVING}
    for goal, end in ends.items():
        for phase in Phase:
            seen, here = {phase}, [phase]
            while here:
                each = here.pop()
                after = {*STANDINGS[each].values(), MOVES.get((each, goal), (None, each))[1]}
                after |= {Phase.NONE} if each in (Phase.CLOSING, Phase.RETIRING, Phase.RESTING) else set()
                here += after - seen
                seen |= after
            assert end in seen, f"{goal} from {phase}"


def test_a_worker_is_started_where_there_is_none_and_closed_where_there_is_one() -> None:
    """A worker is started only in phase NONE, and every other move is made in a phase with a worker."""
    assert {Phase.NONE} == {phase for (phase, _), (move, _) in MOVES.items() if move is Move.START}
    assert all(STANDINGS[phase] for (phase, _), (move, _) in MOVES.items() if move is not Move.START)


def test_rings_are_only_said_to_be_served_where_they_may_be() -> None:
    """A worker that reports that it serves is believed only if it was told to, serves already, or was inherited."""
    believed = {phase for phase, after in STANDINGS.items() if after.get(Stage.SERVING) is Phase.SERVING}

    assert {Phase.CONNECTING, Phase.SERVING, Phase.ADOPTING} == believed <= set(ATTACHED)
    assert {Phase.OPENING, Phase.CONNECTING} == {phase for phase, _ in FAILURES}


def test_the_diagram_shows_the_tables() -> None:
    """The diagram has one row per phase for the goals, and one for the stages."""
    lines = phases().splitlines()
    rows = {line.split()[0]: line for line in lines[: 1 + len(Phase)]}

    assert 2 * (1 + len(Phase)) + 1 == len(lines)
    assert ["serving", "-", "close:", "closing", "leave:", "disconnecting"] == rows["serving"].split()[:6]
    assert "60 s" in rows["opening"]
    assert ["serving", "-", "-", "-", "serving", "-"] == lines[-6].split()
