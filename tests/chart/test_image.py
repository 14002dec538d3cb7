"""The operator's Dockerfile and its lock: what is put into the image, and how it runs."""

import re
import tomllib

from chart.rendering import ROOT, only, render

DOCKERFILE = (ROOT / "Dockerfile").read_text()
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)


def _pins(name):
    return {
        project.lower(): version
        for project, version in _PIN.findall((ROOT / f"requirements/{name}.txt").read_text())
    }


def test_the_image_runs_as_the_user_that_the_chart_sets():
    """Kubernetes refuses runAsNonRoot for an image whose user it cannot tell."""
    security = only(render(), "Deployment")["spec"]["template"]["spec"]["securityContext"]

    assert f"USER {security['runAsUser']}:{security['runAsGroup']}" in DOCKERFILE


def test_the_images_lock_is_what_the_tests_run_with():
    """The same versions, every one of them by hash."""
    locked, tested = _pins("operator"), _pins("dev")

    assert locked.items() <= tested.items()
    text = (ROOT / "requirements/operator.txt").read_text()
    assert all(
        "--hash=sha256:" in part for part in re.split(r"^(?=\w)", text, flags=re.MULTILINE) if "==" in part
    )


def test_the_image_holds_every_dependency_and_none_of_the_extras():
    """The simulator's compiler alone would double its size."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements):
        return {re.match(r"[A-Za-z0-9_-]+", requirement)[0].lower() for requirement in requirements}

    extras = set().union(*map(names, project["optional-dependencies"].values()))
    locked = _pins("operator").keys()
    assert names(project["dependencies"]) <= locked
    assert not extras & locked


def test_the_build_can_build_and_copies_only_what_is_in_the_context():
    """What .dockerignore leaves out cannot be copied."""
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, flags=re.MULTILINE)
        for word in line.split()[:-1]
    }

    assert copied == allowed
    assert "hatchling" in _pins("build")


def test_no_file_of_the_image_names_a_package_index():
    """Where packages come from is the builder's business."""
    for path in (ROOT / "Dockerfile", *(ROOT / "requirements").glob("*.txt")):
        assert "index-url" not in path.read_text()
