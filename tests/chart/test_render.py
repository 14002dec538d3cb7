"""What the chart makes of every feature's values."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import kubernetes_validate
import pytest

from chart.rendering import (
    CASES,
    CHART,
    CLUSTER_SCOPED,
    NAMESPACE,
    case_objects,
    case_values,
    of_kind,
    only,
    program,
    refusal,
    render,
    run,
)
from kubernetes_schemas import assert_valid
from servingtiers.lab.go_programs import KUBECONFORM
from servingtiers.render import names

FOREIGN = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
"""Kinds whose schemas are not Kubernetes' own."""


@pytest.mark.parametrize("case", CASES)
def test_helm_lint_finds_nothing_in_any_feature(case):
    """Also with --strict."""
    result = run("lint", "--strict", str(CHART), values=case_values(case))

    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("case", CASES)
def test_every_object_of_every_feature_fits_the_kubernetes_schemas(case):
    """Strictly: a misspelt field is an error."""
    for obj in case_objects(case):
        if obj["kind"] not in FOREIGN:
            assert_valid(obj, "1.36")


@pytest.fixture(scope="module")
def kubeconform(tmp_path_factory):
    """Run kubeconform with the schemas that kubernetes-validate brings, so that nothing is fetched."""
    theirs = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / "v1.36.0-local-strict"
    schemas = tmp_path_factory.mktemp("schemas")
    for path in theirs.glob("*.json"):
        # In the package they are pages of a site; here they are the files beside each other that they were.
        schema = json.loads(path.read_text().replace('"/api/_definitions.json', '"_definitions.json'))
        schema.pop("$id", None)
        (schemas / path.name).write_text(json.dumps(schema))

    def check(*files):
        return subprocess.run(
            [
                *(program(KUBECONFORM), "-strict", "-verbose", "-output=json"),
                f"-schema-location={schemas}/{{{{ .ResourceKind }}}}{{{{ .KindSuffix }}}}.json",
                f"-skip={','.join(sorted(FOREIGN))}",
                *map(str, files),
            ],
            capture_output=True,
            text=True,
            check=False,
        )

    return check


@pytest.mark.xdist_group("kubeconform")
def test_kubeconform_finds_nothing_in_any_feature(kubeconform, tmp_path):
    """It also refuses keys that stand twice, which a parsed object no longer shows."""
    for case in CASES:
        text = run(
            "template", "servingtiers", str(CHART), "--namespace", NAMESPACE, values=case_values(case)
        ).stdout
        (tmp_path / f"{case}.yaml").write_text(text)
    # One run for all: reading the schemas takes it a hundred times as long as an object.
    result = kubeconform(*(tmp_path / f"{case}.yaml" for case in CASES))
    found = json.loads(result.stdout)["resources"]
    valid = Counter(Path(one["filename"]).stem for one in found if one["status"] == "statusValid")

    assert result.returncode == 0, [one for one in found if one.get("msg")]
    for case in CASES:
        assert valid[case] == len([obj for obj in case_objects(case) if obj["kind"] not in FOREIGN]), case


@pytest.mark.xdist_group("kubeconform")
def test_kubeconform_is_asked_strictly(kubeconform, tmp_path):
    """A misspelt field and a key that stands twice are errors."""
    account = "apiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: a\n"
    for name, more in (("right", ""), ("misspelt", "automount: true\n"), ("twice", "  name: b\n")):
        (tmp_path / f"{name}.yaml").write_text(account + more)
    result = kubeconform(*tmp_path.glob("*.yaml"))
    found = {Path(one["filename"]).stem: one["status"] for one in json.loads(result.stdout)["resources"]}

    assert result.returncode != 0
    assert found == {"right": "statusValid", "misspelt": "statusInvalid", "twice": "statusError"}


@pytest.mark.parametrize("case", CASES)
def test_no_two_objects_of_a_feature_have_one_name(case):
    """Helm would install only the last."""
    keys = [(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in case_objects(case)]

    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("case", CASES)
def test_every_namespaced_object_names_its_namespace_and_no_other_does(case):
    """`helm template | kubectl apply` must land where `helm install` does."""
    allowed = {NAMESPACE, *case_values(case).get("watchNamespaces", ())}
    for obj in case_objects(case):
        namespace = obj["metadata"].get("namespace")
        if obj["kind"] in CLUSTER_SCOPED:
            assert namespace is None, obj["metadata"]["name"]
        else:
            assert namespace in allowed, obj["metadata"]["name"]


@pytest.mark.parametrize("case", CASES)
def test_every_pod_fits_the_restricted_pod_security_standard(case):
    """The standard's list, field by field."""
    for obj in case_objects(case):
        spec = obj["spec"] if obj["kind"] == "Pod" else obj.get("spec", {}).get("template", {}).get("spec")
        if not spec or obj["kind"] not in {"Pod", "Deployment"}:
            continue
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == 65532
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert {next(iter(v.keys() - {"name"})) for v in spec.get("volumes", ())} <= {
            "configMap",
            "secret",
            "emptyDir",
        }
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_the_operators_pods_carry_the_labels_by_which_tiers_let_them_read_metrics():
    """NetworkPolicies of the tiers name these two labels; no value may change them."""
    pods = only(
        render({"operator": {"podLabels": {names.NAME_LABEL: "other", names.COMPONENT_LABEL: "other"}}}),
        "Deployment",
    )["spec"]["template"]["metadata"]["labels"]

    assert pods[names.NAME_LABEL] == names.MANAGED_BY
    assert pods[names.COMPONENT_LABEL] == names.OPERATOR


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_the_chart_is_taken_for_an_object_of_a_tier(case):
    """The operator deletes what it manages and no tier plans: the chart's objects must not look so."""
    for obj in case_objects(case):
        assert obj["metadata"].get("labels", {}).get(names.MANAGED_BY_LABEL) != names.MANAGED_BY


def test_a_changed_configuration_restarts_the_operator_and_an_unchanged_one_does_not():
    """The configuration is read at start."""

    def checksum(values):
        template = only(render(values), "Deployment")["spec"]["template"]
        return template["metadata"]["annotations"]["checksum/config"]

    assert checksum({}) == checksum({"operator": {"logLevel": "DEBUG"}})
    assert checksum({}) != checksum({"config": {"currency": "EUR"}})


def test_the_image_is_taken_by_digest_before_tag():
    """A digest cannot be moved."""
    digest = "sha256:" + "a" * 64

    def image(**values):
        return only(render({"image": values}), "Deployment")["spec"]["template"]["spec"]["containers"][0][
            "image"
        ]

    assert image() == "servingtiers/operator:0.1.0"
    assert image(tag="1.2") == "servingtiers/operator:1.2"
    assert image(tag="1.2", digest=digest) == f"servingtiers/operator@{digest}"


def test_the_disruption_budget_is_there_only_where_it_does_not_hold_up_a_drain_for_ever():
    """With one replica it would."""
    assert not of_kind(render({"operator": {"replicas": 1}}), "PodDisruptionBudget")
    assert only(render({"operator": {"replicas": 2}}), "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_the_crd_can_be_left_out_and_is_kept_on_uninstall_by_default():
    """Deleting the CRD deletes every tier of the cluster."""
    keep = {"helm.sh/resource-policy": "keep"}

    assert not of_kind(render({"crds": {"enabled": False}}), "CustomResourceDefinition")
    assert [o["metadata"]["annotations"] for o in of_kind(render(), "CustomResourceDefinition")] == [keep] * 2
    for crd in of_kind(render({"crds": {"keep": False}}), "CustomResourceDefinition"):
        assert "annotations" not in crd["metadata"]


def test_two_releases_of_one_cluster_share_no_name():
    """Namespaced mode is for several teams on one cluster."""
    with_policy = {"admission": {"routingLabels": {"enabled": True}}, "crds": {"enabled": False}}

    def cluster_scoped(objects):
        return {(o["kind"], o["metadata"]["name"]) for o in objects if o["kind"] in CLUSTER_SCOPED}

    first = cluster_scoped(render(with_policy))
    second = cluster_scoped(render(with_policy, "--namespace", "other"))

    assert first
    assert not first & second


@pytest.mark.parametrize(
    ("values", "mend"),
    [
        ({"mode": "cluster", "watchNamespaces": ["a"]}, "set mode: namespaced"),
        ({"config": {"telemetry": {"source": "Prometheus"}}}, "set config.telemetry.prometheus.url"),
        ({"operator": {"lease": {"retrySeconds": 12}}}, "retrySeconds must be below"),
        ({"metrics": {"podMonitor": {"enabled": True}}}, "set config.metricsNamespace"),
    ],
)
def test_values_that_contradict_each_other_are_refused_with_the_mend(values, mend):
    """The schema sees one value at a time; the templates see them all."""
    assert mend in refusal(values)


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"replicas": 2}, "'replicas' not allowed"),
        ({"mode": "everything"}, "/mode"),
        ({"operator": {"replicas": "2"}}, "/operator/replicas"),
        ({"operator": {"resyncSeconds": 5}}, "/operator/resyncSeconds"),
        ({"image": {"digest": "latest"}}, "/image/digest"),
        ({"watchNamespaces": ["Not_A_Name"]}, "/watchNamespaces/0"),
    ],
)
def test_the_schema_refuses_a_wrong_value_and_names_its_place(values, place):
    """A misspelt value must not be ignored."""
    assert place in refusal(values)


def test_the_network_policy_lets_the_operator_reach_what_it_reads_and_nothing_else():
    """Scrape: engines and routers; Prometheus: its port, whatever the address says."""

    def ports(values):
        egress = only(render(values), "NetworkPolicy", "servingtiers-operator")["spec"]["egress"]
        return {port["port"] for rule in egress for port in rule.get("ports", ())}

    def prometheus(url):
        return {"config": {"telemetry": {"source": "Prometheus", "prometheus": {"url": url}}}}

    base = {53, 5353, 443, 6443, 8443, 16443}

    assert ports({}) == base | {8000, 29000}
    assert ports(prometheus("http://prometheus.monitoring:9090/prefix")) == base | {9090}
    assert ports(prometheus("http://prometheus.monitoring")) == base | {80}
    assert ports(prometheus("https://[fd00::1]:9443")) == base | {9443}
    assert ports(prometheus("https://[fd00::9]")) == base


def test_the_metrics_port_of_engines_and_routers_is_the_one_that_the_policy_opens():
    """The numbers live in the renderers."""
    from servingtiers.render import engine, router

    egress = only(render(), "NetworkPolicy", "servingtiers-operator")["spec"]["egress"]
    scraped = next(rule for rule in egress if "to" in rule)

    assert [port["port"] for port in scraped["ports"]] == [engine.PORT, router.METRICS_PORT]
