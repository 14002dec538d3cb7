"""Where a program written in Go is looked for, here Helm, and what is said where it cannot be had."""

import stat

import pytest

from servingtiers.lab.binaries import SourceUnavailableError
from servingtiers.lab.go_programs import HELM, ProgramUnavailableError, locate_program


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """A machine without Helm."""
    monkeypatch.delenv("SERVINGTIERS_HELM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def _program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _no_build(_folder, _progress):
    raise AssertionError("it was built although it was there")


def test_the_named_program_wins_over_all_others(monkeypatch, tmp_path):
    """A developer says which."""
    named = _program(tmp_path / "named")
    monkeypatch.setenv("PATH", str(_program(tmp_path / "bin/helm").parent))
    monkeypatch.setenv("SERVINGTIERS_HELM", str(named))

    assert locate_program(HELM, cache=tmp_path, build=_no_build) == named


def test_a_named_program_that_is_none_is_an_error_and_not_passed_over(monkeypatch, tmp_path):
    """A typing error must not run another Helm."""
    monkeypatch.setenv("SERVINGTIERS_HELM", str(tmp_path / "gone"))

    with pytest.raises(ProgramUnavailableError, match="set it to helm's path"):
        locate_program(HELM, cache=tmp_path, build=_no_build)


def test_the_path_is_searched_before_anything_is_built(monkeypatch, tmp_path):
    """Most machines have it."""
    found = _program(tmp_path / "bin/helm")
    monkeypatch.setenv("PATH", str(found.parent))

    assert locate_program(HELM, cache=tmp_path, build=_no_build) == found


def test_it_is_built_once_and_then_found_in_the_cache(tmp_path):
    """The second call builds nothing."""
    built = locate_program(
        HELM, cache=tmp_path, build=lambda folder, _: _program(folder / "helm"), progress=lambda _: None
    )

    assert HELM.version in str(built)
    assert locate_program(HELM, cache=tmp_path, build=_no_build) == built
    assert locate_program(HELM, cache=tmp_path, may_build=False) == built


def test_a_build_that_fails_says_what_would_help_and_leaves_nothing_behind(tmp_path):
    """No half a program in the cache."""

    def fail(folder, _progress):
        (folder / "helm").write_text("half")
        raise SourceUnavailableError("Go is not installed")

    with pytest.raises(ProgramUnavailableError, match=r"install Helm .* or Go .*Go is not installed"):
        locate_program(HELM, cache=tmp_path, build=fail, progress=lambda _: None)
    assert not list((tmp_path / "helm").rglob("helm"))


def test_without_go_and_without_leave_to_build_the_mend_is_named(tmp_path):
    """The real build says that Go is missing; none at all says how to get one."""
    with pytest.raises(ProgramUnavailableError, match="Go is not installed"):
        locate_program(HELM, cache=tmp_path, progress=lambda _: None)
    with pytest.raises(ProgramUnavailableError, match=r"python -m servingtiers\.lab\.go_programs"):
        locate_program(HELM, cache=tmp_path, may_build=False)
