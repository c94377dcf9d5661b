"""CI's table of steps, a commit's share of them, and what becomes of a step that fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.ci import blame, flaky, full, small, table
from tests.ci.runner import Runner
from tests.ci.share import command_of, number
from tests.ci.steps import CI_MINUTES, STEPS, Step
from tests.ci.table import Row

ROOT = Path(__file__).parents[2]
COMMITS = [f"{each:040x}" for each in range(200)]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """A runner that leaves pytest's own handling of signals alone."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return Runner()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with two commits, which is where we are; the file `fails` came with the second."""
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    for key, value in (("user.name", "Somebody"), ("user.email", "somebody@example.org"), ("commit.gpgsign", "false")):
        git("config", key, value)
    (tmp_path / "old").write_text("")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    (tmp_path / "fails").write_text("")
    git("add", ".")
    git("commit", "--quiet", "--message", "second")
    return tmp_path


def git(*arguments: str) -> str:
    """Run git where we are."""
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def nobody(_runner: Runner, _step: Step, _command: str) -> str:
    """Blame nobody."""
    return "looked into"


def test_ci_fits_into_its_time() -> None:
    """What the steps may take adds up to no more than CI may; a suite that is added takes it from the others."""
    assert sum(step.ci_minutes for step in STEPS) <= CI_MINUTES


def test_every_target_is_there() -> None:
    """Each command's target of make exists, and what runs in part in CI is run in full by `make test-all`."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for step in STEPS:
        assert set(re.findall(r"make ([\w-]+)", f"{step.ci} {step.full}")) <= targets
        assert step.full or step.name == "packages"
        assert "{part}" not in step.full


def test_a_suite_keeps_what_python_compiles() -> None:
    """What runs from the Makefile may write bytecode, also where the environment forbids it: it is compiled once."""
    show = "--eval=show: ; @echo [$$PYTHONDONTWRITEBYTECODE]"
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(["make", "-s", show, "show"], cwd=ROOT, env=environment, capture_output=True, check=True)

    assert b"[]\n" == done.stdout


def test_a_commit_has_its_share() -> None:
    """The same commit has the same numbers, and among some commits every part has its turn."""
    step = Step("images", "make it S={seed} PART={part}", 1.0, parts=7)
    commands = [command_of(step, commit) for commit in COMMITS]

    assert commands == [command_of(step, commit) for commit in COMMITS]
    assert {f"{each}/7" for each in range(1, 8)} == {command.partition("PART=")[2] for command in commands}
    assert len(set(commands)) == len(COMMITS)
    assert number(COMMITS[0], "images", 10**6) != number(COMMITS[0], "model", 10**6)


def test_ci_ends_with_the_first_failure(runner: Runner, capfd: pytest.CaptureFixture[str]) -> None:
    """What comes after a failure is not run; the table has what was, and the command that repeats the failure."""
    steps = [
        Step("one", "echo first", 1.0),
        Step("two", "false | cat {part}", 2.0),
        Step("three", "echo third", 3.0),
    ]
    status = small.run(runner, COMMITS[0], nobody, steps)
    out = capfd.readouterr().out

    assert 1 == status
    assert ["first"] == [line for line in out.splitlines() if line in ("first", "third")]
    assert "two failed; to repeat it: false | cat 1/1\nlooked into" in out
    assert re.search(r"^one +0:00  of 1:00    ok$", out, re.MULTILINE)
    assert re.search(r"^in all +0:00  of 3:00", out, re.MULTILINE)


def test_ci_succeeds(runner: Runner, capfd: pytest.CaptureFixture[str]) -> None:
    """Where every step passes, so does the whole; one for `make test-all` alone is neither run nor in the table."""
    steps = [Step("one", "true", 1.0), Step("long", "", 0.0, full="false"), Step("two", "true", 1.0)]

    assert 0 == small.run(runner, COMMITS[0], nobody, steps)
    assert "long" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("tests", "second", "status"),
    [(["a"], "true", 0), (["a"], "false", 1), (["a", "b"], "true", 1), ([], "true", 1)],
    ids=["passes then", "fails again", "two of them", "none that is known"],
)
def test_one_test_may_fail_by_chance(
    here: Path, runner: Runner, capfd: pytest.CaptureFixture[str], tests: list[str], second: str, status: int
) -> None:
    """One test in a run that passes when it is run once more is forgiven and told of; what an old run left is none."""
    (here / "left").write_text(json.dumps({"old": True}))
    (here / "failed").write_text(json.dumps(dict.fromkeys(tests, True)))
    (here / "try.sh").write_text(f'[ "$1" = FAILED=1 ] && {second} && exit; cp failed left; false')
    once = "bash try.sh"
    steps = [Step("one", once, 1.0, failed="left"), Step("two", once, 1.0, failed="left")]

    assert status == small.run(runner, COMMITS[0], nobody, steps[:1])
    out = capfd.readouterr().out
    assert (not status) == ("failed once and passed again: a: one" in out)
    assert 1 == small.run(runner, COMMITS[0], nobody, steps)  # one in a run, not one in a step
    assert 1 == small.run(runner, COMMITS[0], nobody, [Step("one", once, 1.0, failed="left", repeats=True)])


@pytest.mark.parametrize(("file", "sentence"), [("fails", "it is this commit's"), ("old", "not (only) this commit's")])
def test_a_failure_is_tried_on_the_parent(here: Path, runner: Runner, file: str, sentence: str) -> None:
    """Whether the parent fails as well is seen by running it there, and nothing of that stays."""
    said = blame.on_parent(runner, Step("x", "", 1.0), f"! [ -e {file} ]")

    assert sentence in said
    assert git("rev-parse", "HEAD^")[:10] in said
    assert not (here / blame.PLACE).exists()
    assert 1 == len(git("worktree", "list").splitlines())


def test_the_parent_runs_what_failed_alone(here: Path, runner: Runner) -> None:
    """The list of failed tests goes along, with the word that asks for these alone; what is new is this commit's."""
    (here / "build").mkdir()
    failed = here / "build/failed.json"
    step = Step("x", "", 1.0, failed="build/failed.json")
    command = "has() { [ $1 = FAILED=1 ] && ! grep -q new build/failed.json; }; has"
    (here / "test_old.py").write_text("def test_one(): ...")
    git("add", "test_old.py")
    git("commit", "--quiet", "--message", "third")
    git("commit", "--quiet", "--allow-empty", "--message", "fourth")

    failed.write_text('{"test_old.py::test_one[1]": true, "test_old.py::test_new": true}')
    assert "it is this commit's" in blame.on_parent(runner, step, command)
    assert "as well" in blame.on_parent(runner, step, "cat build/failed.json; false")
    failed.write_text('{"test_old.py::test_new": true, "test_new.py::test_one": true}')
    assert "does not have what failed" in blame.on_parent(runner, step, "false")


def test_a_commit_without_a_parent(here: Path, runner: Runner) -> None:
    """Where the parent is not there, that is said."""
    git("checkout", "--quiet", "HEAD^")

    assert "cannot be told" in blame.on_parent(runner, Step("x", "", 1.0), "false")


def test_what_has_passed_is_not_run_again(here: Path, runner: Runner, capfd: pytest.CaptureFixture[str]) -> None:
    """Every suite in full goes on where it was; a change in the code, but not in *.md, makes it begin anew."""
    steps = [Step("one", "", 1.0, full="echo ran one"), Step("two", "", 1.0, full="echo ran two; [ -e mended ]")]
    (here / ".gitignore").write_text("build/\nmended\n")

    def ran() -> tuple[int, list[str]]:
        status = full.run(runner, COMMITS[0], place=here / "build/all", steps=steps)
        return status, re.findall(r"^ran (\w+)$", capfd.readouterr().out, re.MULTILINE)

    first, second = ran(), ran()
    (here / "mended").write_text("")
    third, fourth = ran(), ran()
    (here / "README.md").write_text("more")
    fifth = ran()
    (here / "old").write_text("changed")
    sixth = ran()

    assert [(1, ["one", "two"]), (1, ["two"]), (0, ["two"]), (0, []), (0, []), (0, ["one", "two"])] == [
        first, second, third, fourth, fifth, sixth,
    ]  # fmt: skip
    report = (here / "build/all/report.txt").read_text()
    assert COMMITS[0][:10] in report
    assert re.search(r"^two +0:00 +ok +\d{4}-\d\d-\d\d \d\d:\d\d  echo ran two", report, re.MULTILINE)


def test_code_that_changes_meanwhile_has_not_passed(here: Path, runner: Runner) -> None:
    """What was edited while a step ran was tested neither before nor after: the step is run again."""
    step = Step("one", "", 1.0, full="echo changed >old")

    assert 1 == full.run(runner, COMMITS[0], place=here / "build/all", steps=[step])
    assert "changed" == json.loads((here / "build/all/one.json").read_text())["outcome"]


def test_a_result_that_cannot_be_read_is_none(here: Path, runner: Runner) -> None:
    """A file that an interrupted run left half written does not end the next one."""
    place = here / "all"
    place.mkdir()
    (place / "one.json").write_text('{"code": ')

    assert 0 == full.run(runner, COMMITS[0], place=place, steps=[Step("one", "", 1.0, full="true")])
    assert "ok" == json.loads((place / "one.json").read_text())["outcome"]


def test_the_table_adds_up() -> None:
    """Each step is a line with what it took, and of how much; the sum is the last."""
    assert [
        "one           1:05  of 2:00    ok",
        "two          60:00  of 0:30    failed",
        "in all       61:05  of 2:30",
    ] == table.text([Row("one", "ok", 65.2, 2.0), Row("two", "failed", 3600.0, 0.5)]).splitlines()


def test_the_list_of_chance_says_what_was_found() -> None:
    """Each test on it has a name of its own and some words about it; one in a run is forgiven, two are not."""
    assert all(flaky.known().values())
    assert (True, []) == flaky.judge({}, {})
    assert [True, False] == [flaky.judge(dict.fromkeys(tests, "no"), {})[0] for tests in (["a"], ["a", "b"])]
