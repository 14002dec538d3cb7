"""Renders the chart for tests: real Helm, parsed objects."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from servingtiers.lab.go_programs import HELM, GoProgram, ProgramUnavailableError, locate_program

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/servingtiers"
CASES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
NAMESPACE = "llm"
CLUSTER_SCOPED = {
    "ClusterRole",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
    "Namespace",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
}
Json = dict[str, Any]
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The same loader, in C where PyYAML has it: objects of a chart are read a hundred times."""


@functools.cache
def program(which: GoProgram) -> str:
    """Return a program's path, or skip where it cannot be had."""
    try:
        return str(locate_program(which))
    except ProgramUnavailableError as error:
        pytest.skip(str(error))


def helm() -> str:
    """Return Helm's path, or skip where it cannot be had."""
    return program(HELM)


def run(*arguments: str, values: Json | None = None) -> subprocess.CompletedProcess[str]:
    """Run Helm with values on standard input."""
    return subprocess.run(
        [helm(), *arguments, *(["--values", "-"] if values is not None else [])],
        input=json.dumps(values) if values is not None else None,
        capture_output=True,
        text=True,
        check=False,
    )


def render(values: Json | None = None, *options: str, release: str = "servingtiers") -> list[Json]:
    """Return the objects that the chart makes of these values."""
    result = run("template", release, str(CHART), "--namespace", NAMESPACE, *options, values=values or {})
    assert result.returncode == 0, result.stderr

    return [document for document in yaml.load_all(result.stdout, Loader=_LOADER) if document]


def refusal(values: Json) -> str:
    """Return why Helm refuses these values."""
    result = run("template", "servingtiers", str(CHART), "--namespace", NAMESPACE, values=values)
    assert result.returncode != 0, "Helm took the values"

    return result.stderr


def case_values(case: str) -> Json:
    """Return the values of a feature's file in ci/."""
    return yaml.safe_load((CHART / f"ci/{case}-values.yaml").read_text()) or {}


@functools.cache
def _case(case: str) -> str:
    return json.dumps(render(case_values(case)))


def case_objects(case: str) -> list[Json]:
    """Return the objects of a feature's file in ci/."""
    return json.loads(_case(case))


def of_kind(objects: list[Json], kind: str, name: str | None = None) -> list[Json]:
    """Return the objects of one kind."""
    return [o for o in objects if o["kind"] == kind and name in {None, o["metadata"]["name"]}]


def only(objects: list[Json], kind: str, name: str | None = None) -> Json:
    """Return the one object of a kind."""
    (found,) = of_kind(objects, kind, name)
    return found
