"""The chart's values become the operator's configuration."""

import pytest
import yaml
from pydantic import ValidationError

from chart.rendering import CASES, CHART, NAMESPACE, case_objects, case_values, only, refusal, render
from servingtiers.catalog.accelerators import accelerators
from servingtiers.core.config import OperatorConfig
from servingtiers.handlers import load_source


def _config(objects):
    return yaml.safe_load(only(objects, "ConfigMap", "servingtiers-operator-config")["data"]["config.yaml"])


@pytest.mark.parametrize("case", [case for case in CASES if case != "own-rbac"])
def test_the_operator_takes_every_features_configuration(case):
    """The same model that the operator reads it with; also its telemetry can be made."""
    config = OperatorConfig.model_validate(_config(case_objects(case)))
    load_source(config)

    given = case_values(case).get("config", {})
    shown = config.model_dump(mode="json", by_alias=True)
    for key, value in given.items():
        if key != "accelerators":
            assert _contained(value, shown[key]), key


def _contained(wanted, found):
    """Tell whether every given value is in the configuration, in whatever form it is shown."""
    if isinstance(wanted, dict):
        return all(_contained(value, found[key]) for key, value in wanted.items())
    return str(wanted) == str(found)


def test_accelerators_are_bound_replaced_and_taken_away():
    """Helm merges maps; null takes a default away."""
    config = OperatorConfig.model_validate(_config(case_objects("hardware")))

    assert set(config.accelerators) == {"h100-sxm-80gb", "a100-sxm-80gb"}
    h100 = config.accelerators["h100-sxm-80gb"]
    assert h100.runtime_class_name == "nvidia"
    assert str(h100.price_per_hour) == "2.80"
    assert h100.tolerations[0].key == "nvidia.com/gpu"


def test_the_default_bindings_are_of_the_catalogue_and_on_different_nodes():
    """A tier of two accelerators must not find both on one kind of node."""
    config = OperatorConfig.model_validate(_config(render()))

    assert set(config.accelerators) <= {accelerator.key for accelerator in accelerators()}
    selectors = [tuple(binding.node_selector.items()) for binding in config.accelerators.values()]
    assert len(selectors) == len(set(selectors))


def test_the_chart_says_the_same_defaults_as_the_operator():
    """values.yaml shows them; the model decides them."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())["config"]
    shown = OperatorConfig().model_dump(mode="json", by_alias=True)

    assert _contained({key: value for key, value in values.items() if key != "accelerators"}, shown)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"routerServiceAccount": "servingtiers-router"}),
        ({"routers": {"sharedServiceAccount": False}}, {}),
        ({"mode": "cluster"}, {"clusterMode": True}),
        (
            {"watchNamespaces": ["a", "b"]},
            {"namespaces": ["a", "b"], "routerServiceAccount": "servingtiers-router"},
        ),
    ],
)
def test_the_mode_decides_what_is_watched_and_who_makes_the_routers_account(values, expected):
    """These three cannot be set by hand, so they cannot contradict the Roles."""
    config = _config(render(values))

    assert {
        key: config[key] for key in ("clusterMode", "namespaces", "routerServiceAccount") if key in config
    } == expected


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"surprise": 1}, "'surprise' not allowed"),
        ({"clusterMode": True}, "'clusterMode' not allowed"),
        ({"telemetry": {"source": "Guess"}}, "/config/telemetry/source"),
        ({"telemetry": {"interval": "15"}}, "/config/telemetry/interval"),
        ({"telemetry": {"prometheus": {"url": "prometheus:9090"}}}, "/config/telemetry/prometheus"),
        ({"accelerators": {"h100-sxm-80gb": {"price": 2}}}, "/config/accelerators/h100-sxm-80gb"),
        ({"accelerators": {"l4-24gb": {"tolerations": [{"effect": "Never"}]}}}, "/tolerations/0/effect"),
        ({"allowRemoteCode": "perhaps"}, "/config/allowRemoteCode"),
    ],
)
def test_helm_refuses_what_the_operator_would_refuse_and_names_the_place(config, place):
    """An operator that does not start for a typo is found out before it is installed."""
    assert place in refusal({"config": config})
    with pytest.raises(ValidationError):
        OperatorConfig.model_validate(config | {"namespaces": 1} if "clusterMode" in config else config)


def test_credentials_of_prometheus_are_mounted_and_never_copied():
    """The Secret is a volume; nothing reads it through the API."""
    objects = case_objects("prometheus")
    pod = only(objects, "Deployment")["spec"]["template"]["spec"]
    telemetry = OperatorConfig.model_validate(_config(objects)).telemetry.prometheus

    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert {"secretName": "prometheus-reader", "defaultMode": 0o440} in [
        v.get("secret") for v in pod["volumes"]
    ]
    assert telemetry.bearer_token_file.startswith(mounts["prometheus"])
    assert telemetry.ca_file.startswith(mounts["prometheus"])


def test_the_command_line_of_the_operator_takes_the_charts_arguments():
    """Every option that the Deployment sets exists, with a value it accepts."""
    from servingtiers.cli.operate import command

    for case in CASES:
        container = only(case_objects(case), "Deployment")["spec"]["template"]["spec"]["containers"][0]
        subcommand, config, *options = container["args"]
        assert (subcommand, config) == ("operator", "--config=/etc/servingtiers/config.yaml")
        context = command.make_context("operator", [*options, f"--namespace={NAMESPACE}"])
        assert context.params["health_port"] == container["ports"][0]["containerPort"]
        assert context.params["metrics_port"] == container["ports"][1]["containerPort"]
