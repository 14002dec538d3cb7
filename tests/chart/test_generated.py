"""Generated files are in step with what they are made from."""

import importlib.util
import json
import shutil
import subprocess
import sys

import jsonschema
import pytest
import yaml

from chart.rendering import CASES, CHART, ROOT, case_values, helm
from servingtiers.core.config import OperatorConfig


@pytest.fixture(scope="module")
def generate():
    """The generator, as a module."""
    sys.path.insert(0, str(ROOT / "charts"))
    try:
        spec = importlib.util.spec_from_file_location("chart_generate", ROOT / "charts/generate.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(ROOT / "charts"))


def test_schema_reference_crd_dashboard_and_health_check_are_in_step(generate):
    """`make generate` changes nothing."""
    assert generate.stale(generate.chart_files()) == []


def test_the_kustomize_base_and_overlays_are_in_step(generate):
    """Rendered anew by Helm; a file that nothing makes any more counts too."""
    helm()

    assert generate.stale(generate.manifests()) == []


def test_a_file_out_of_step_is_found(generate, tmp_path):
    """Else the two tests above prove nothing."""
    files = generate.chart_files()
    path = CHART / "values.schema.json"

    assert generate.stale({**files, path: files[path] + " "}) == ["charts/servingtiers/values.schema.json"]


def test_a_value_without_description_is_refused(generate):
    """The reference is complete by construction."""
    with pytest.raises(ValueError, match=r"b\.c has no"):
        list(generate.values("# -- said\na: 1\nb:\n  c: 2\n"))


def test_comments_become_descriptions_and_schemas(generate):
    """Over several lines; a comment before `# --` is for readers of the file only."""
    (value,) = generate.values('# For readers.\n# -- One\n# two.\n# @schema {"minimum": 3}\na: 4\n')

    assert value.description == "One two."
    assert value.schema == {"minimum": 3}
    assert value.default == 4


@pytest.mark.parametrize("case", CASES)
def test_the_schema_takes_every_features_values(generate, case):
    """Also in a validator that is not Helm's."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    values = case_values(case)
    accelerators = values.get("config", {}).get("accelerators", {})
    for key in [key for key, value in accelerators.items() if value is None]:
        del accelerators[key]  # Helm takes these away before it validates

    jsonschema.validate(values, schema)


def test_the_schema_takes_every_field_of_the_operators_configuration(generate):
    """But those that the chart decides."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    fields = {field.alias for field in OperatorConfig.model_fields.values()}

    assert set(schema["properties"]["config"]["properties"]) == fields - set(generate.DERIVED)


def test_the_charts_crd_is_the_generated_one(generate):
    """Helm's template around the very same document."""
    from chart.rendering import of_kind, render

    rendered = {crd["metadata"]["name"]: crd["spec"] for crd in of_kind(render(), "CustomResourceDefinition")}
    sources = [yaml.safe_load(path.read_text()) for path in (ROOT / "crds").glob("*.yaml")]

    assert rendered == {source["metadata"]["name"]: source["spec"] for source in sources}


def test_a_crd_that_helm_would_misread_is_refused(generate):
    """A CEL message with braces would be taken for a template."""
    with pytest.raises(ValueError, match="escape"):
        generate.crd_template("# head\nmetadata:\n  name: a\n  x: '{{ }}'\n")


@pytest.mark.parametrize("overlay", ["base", "cluster", "per-tier-accounts", "prometheus-operator"])
def test_kustomize_builds_what_helm_renders(generate, overlay):
    """Two ways of installing, one result: but the ConfigMap's name, which kustomize makes from its content."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed: it builds kustomizations")
    folder = ROOT / "manifests" / ("base" if overlay == "base" else f"overlays/{overlay}")
    built = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=True).stdout
    values = {} if overlay == "base" else generate.OVERLAYS[overlay][1]
    wanted = {generate.identity(obj): obj for obj in generate.render(values)}
    found = {}
    for obj in yaml.safe_load_all(built):
        kind, name = generate.identity(obj)
        hashed = kind == "ConfigMap" and name.startswith("servingtiers-operator-config-")
        found[kind, "servingtiers-operator-config" if hashed else name] = obj

    assert found.keys() == wanted.keys()
    for key, obj in wanted.items():
        if key == ("ConfigMap", "servingtiers-operator-config"):
            text = found[key]["data"]["config.yaml"]
            assert yaml.safe_load(text) == yaml.safe_load(obj["data"]["config.yaml"])
        elif key[0] == "Deployment":
            volumes = found[key]["spec"]["template"]["spec"]["volumes"]
            assert volumes[0]["configMap"]["name"].startswith("servingtiers-operator-config-")
            volumes[0]["configMap"]["name"] = "servingtiers-operator-config"
            assert found[key] == obj
        else:
            assert found[key] == obj
