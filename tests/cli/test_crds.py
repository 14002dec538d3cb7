"""``servingtiers crds``, and that what is committed is what it writes."""

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from servingtiers.api.crd import crd_document, crd_documents
from servingtiers.cli.crds import command, crd_yaml

ROOT = Path(__file__).parents[2]
GENERATED = ["--output-dir", str(ROOT / "crds"), "--reference", str(ROOT / "docs" / "reference" / "api.md")]


def test_the_committed_crd_and_reference_page_are_in_step_with_the_models() -> None:
    """`make generate` mends it."""
    result = CliRunner().invoke(command, [*GENERATED, "--check"])

    assert result.exit_code == 0, result.output


def test_without_options_the_crd_is_printed() -> None:
    """So that it can be piped into kubectl."""
    result = CliRunner().invoke(command, [])

    assert result.exit_code == 0
    assert tuple(yaml.safe_load_all(result.output)) == crd_documents()


def test_the_yaml_has_no_anchors() -> None:
    """Pools share their schema in memory; people read the file."""
    for document in crd_documents():
        assert "&id" not in crd_yaml(document)
        assert "*id" not in crd_yaml(document)


def test_files_are_written_and_then_in_step(tmp_path: Path) -> None:
    """A stale file fails the check by name, and a check writes nothing."""
    options = ["--output-dir", str(tmp_path / "crds"), "--reference", str(tmp_path / "docs" / "api.md")]
    stale = CliRunner().invoke(command, [*options, "--check"])
    assert stale.exit_code == 1
    assert "api.md not in step with the models: run make generate" in stale.output
    assert list(tmp_path.iterdir()) == []

    assert CliRunner().invoke(command, options).exit_code == 0

    assert CliRunner().invoke(command, [*options, "--check"]).exit_code == 0
    (tmp_path / "docs" / "api.md").write_text("other")
    assert CliRunner().invoke(command, [*options, "--check"]).exit_code == 1


def test_a_check_of_nothing_is_a_usage_error() -> None:
    """It would otherwise pass for ever."""
    result = CliRunner().invoke(command, ["--check"])

    assert result.exit_code == 2
    assert "say what to check" in result.output


def test_a_release_is_compared_with_what_would_replace_it(tmp_path: Path) -> None:
    """The comparison fails by sentences, and passes on itself."""
    released = tmp_path / "released.yaml"
    released.write_text("---\n".join(map(crd_yaml, crd_documents())))
    same = CliRunner().invoke(command, ["--since", str(released)])
    assert (same.exit_code, same.output) == (0, "no breaking change\n")
    old = crd_document()
    spec = old["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    spec["properties"]["gone"] = {"type": "string"}
    released.write_text(yaml.safe_dump(old))

    result = CliRunner().invoke(command, ["--since", str(released)])

    assert result.exit_code == 1
    assert "v1alpha1.spec.gone: was removed" in result.output


@pytest.mark.parametrize("text", ["a: [", "just text", "{}", "[]"])
def test_comparing_with_something_else_says_so(tmp_path: Path, text: str) -> None:
    """One line, no traceback."""
    other = tmp_path / "other.yaml"
    other.write_text(text)

    result = CliRunner().invoke(command, ["--since", str(other)])

    assert result.exit_code == 1
    assert "is no CustomResourceDefinition" in result.output
