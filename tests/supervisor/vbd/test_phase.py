"""The tables of a worker's phases: whole, and without a dead end."""

from __future__ import annotations

from tests.tools.diagrams import phases
from xenbackend.protocol.messages import Stage
from xenbackend.supervisor.vbd.phase import ATTACHED, FAILURES, LIMIT_S, MOVES, STANDINGS, Goal, Move, Phase


def test_every_phase_that_waits_for_the_worker_has_a_limit() -> None:
    """R23: a phase in which only the worker can go on is left by force in the end."""
    resting = {Phase.NONE, Phase.OPEN, Phase.SERVING, Phase.RESTING}

    assert set(Phase) - resting == set(LIMIT_S)


def test_every_goal_is_reached() -> None:
    """From each phase moves and answers lead to each goal; a worker that ends (or is killed) is at the beginning."""
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
    """One path, one worker."""
    assert {Phase.NONE} == {phase for (phase, _), (move, _) in MOVES.items() if move is Move.START}
    assert all(STANDINGS[phase] for (phase, _), (move, _) in MOVES.items() if move is not Move.START)


def test_rings_are_only_said_to_be_served_where_they_may_be() -> None:
    """A worker that says that it serves is believed where it was told to, or was inherited."""
    believed = {phase for phase, after in STANDINGS.items() if after.get(Stage.SERVING) is Phase.SERVING}

    assert {Phase.CONNECTING, Phase.SERVING, Phase.ADOPTING} == believed <= set(ATTACHED)
    assert {Phase.OPENING, Phase.CONNECTING} == {phase for phase, _ in FAILURES}


def test_the_diagram_shows_the_tables() -> None:
    """A row per phase for goals, and one for stages."""
    lines = phases().splitlines()
    rows = {line.split()[0]: line for line in lines[: 1 + len(Phase)]}

    assert 2 * (1 + len(Phase)) + 1 == len(lines)
    assert ["serving", "-", "close:", "closing", "leave:", "disconnecting"] == rows["serving"].split()[:6]
    assert "60 s" in rows["opening"]
    assert ["serving", "-", "-", "-", "serving", "-"] == lines[-6].split()
