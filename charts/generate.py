"""Writes what is made from the chart's values and templates, and the chart's parts that are made from the code.

* ``values.schema.json``: types from ``values.yaml``, what ``# @schema`` adds, and under ``config`` the operator's own
  configuration model, so that ``helm install`` refuses what the operator would refuse;
* ``README.md`` of the chart and ``docs/reference/chart.md``: the table of values, from the ``# --`` comments;
* ``templates/crds/``: the CustomResourceDefinition behind the chart's switches;
* ``dashboards/``: from ``dashboard.py``;
* ``manifests/``: a kustomize base and overlays, rendered by Helm; the Argo CD health check as a patch.

``python charts/generate.py`` writes, ``--check`` fails where a file is out of step, ``--no-helm`` leaves ``manifests/``
alone.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dashboard  # type: ignore[import-not-found]  # a script beside this one, not a package
import yaml

from servingtiers.core.config import OperatorConfig
from servingtiers.lab.go_programs import HELM, ProgramUnavailableError, locate_program

ROOT = Path(__file__).parents[1]
CHART = ROOT / "charts/servingtiers"
MANIFESTS = ROOT / "manifests"
DERIVED = ("namespaces", "operatorNamespace", "clusterMode", "routerServiceAccount")
"""Configuration that the chart sets by its mode, or the operator by where it runs, and that is no value."""
RELEASE = "servingtiers"
BASE: dict[str, Any] = {}
OVERLAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "cluster": ("One operator for all namespaces.", {"mode": "cluster"}),
    "per-tier-accounts": (
        "The routers of each tier have an account of their own, which the operator makes.",
        {"routers": {"sharedServiceAccount": False}},
    ),
    "prometheus-operator": (
        "Load is read from Prometheus, which scrapes operator, engines and routers; alerts and dashboard.",
        {
            "config": {
                "telemetry": {
                    "source": "Prometheus",
                    "prometheus": {
                        "url": "http://prometheus-operated.monitoring:9090",
                        "scrapeInterval": "15s",
                    },
                }
            },
            "metrics": {
                name: {"enabled": True}
                for name in ("serviceMonitor", "podMonitor", "prometheusRule", "dashboards")
            },
        },
    ),
}
"""Name to purpose and values."""
_GENERATED = "Made by charts/generate.py; do not edit."
Json = dict[str, Any]


# -- values ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Value:
    """One documented key of values.yaml."""

    path: tuple[str, ...]
    default: Any
    description: str
    schema: Json = field(default_factory=dict)


def values(text: str) -> Iterator[Value]:
    """Yield every documented key, in order.

    Raises:
        ValueError: A key has neither a description nor documented keys of its own.
    """
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, above: tuple[str, ...]) -> Iterator[Value]:
        for key, value in node.value:
            path = (*above, key.value)
            description, schema = _comment(lines, key.start_mark.line)
            if path == ("config",):
                continue
            if description:
                yield Value(path, _construct(value), description, schema)
            elif isinstance(value, yaml.MappingNode) and value.value:
                yield from walk(value, path)
            else:
                raise ValueError(f"values.yaml: {'.'.join(path)} has no `# --` description")

    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)  # noqa: S101 - the file is ours
    return walk(root, ())


def _construct(node: yaml.Node) -> Any:
    return yaml.safe_load(yaml.serialize(node))


def _comment(lines: list[str], line: int) -> tuple[str, Json]:
    """Return description and schema from the comment directly above a line."""
    block: list[str] = []
    while line and lines[line - 1].strip().startswith("#"):
        line -= 1
        block.insert(0, lines[line].strip().removeprefix("#").strip())
    schema: Json = {}
    words: list[str] = []
    for part in block:
        if part.startswith("@schema"):
            schema |= json.loads(part.removeprefix("@schema"))
        elif part.startswith("--"):
            words = [part.removeprefix("--").strip()]
        elif words:
            words.append(part)
    return " ".join(words), schema


# -- schema ----------------------------------------------------------------------------------------------------


def schema(text: str) -> Json:
    """Return the JSON schema of the chart's values."""
    root: Json = {"type": "object", "properties": {}, "additionalProperties": False}
    for value in values(text):
        node = root
        for part in value.path[:-1]:
            node = node["properties"].setdefault(
                part, {"type": "object", "properties": {}, "additionalProperties": False}
            )
        node["properties"][value.path[-1]] = _leaf(value)
    config = _helm_schema(OperatorConfig.model_json_schema(by_alias=True))
    definitions = config.pop("$defs")
    for name in DERIVED:
        del config["properties"][name]
    root["properties"]["config"] = config
    root["properties"]["global"] = {"type": "object", "description": "Set by a parent chart; not used."}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "$defs": definitions, **root}


def _leaf(value: Value) -> Json:
    match value.default:
        case bool():
            kind = "boolean"
        case int():
            kind = "integer"
        case str():
            kind = "string"
        case list():
            kind = "array"
        case _:
            kind = "object"
    return {"description": value.description, "type": kind, **value.schema}


def _helm_schema(node: Any) -> Any:
    """Return pydantic's schema without what only Kubernetes reads, and with integers where text may be one."""
    if isinstance(node, list):
        return [_helm_schema(member) for member in node]
    if not isinstance(node, dict):
        return node
    kept = {
        key: _helm_schema(value)
        for key, value in node.items()
        if not key.startswith("x-kubernetes-") and not (key == "title" and isinstance(value, str))
    }
    if "x-kubernetes-int-or-string" in node:
        kept |= {"type": ["string", "integer"]}
    if isinstance(kept.get("description"), str):
        kept["description"] = " ".join(kept["description"].split())
    return kept


# -- reference -------------------------------------------------------------------------------------------------


def _cell(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value)}`".replace("|", "\\|")


def table(text: str) -> str:
    """Return the tables of all values, in Markdown."""
    rows = ["| Value | Default | Description |", "|---|---|---|"]
    for value in values(text):
        notes = value.description
        if "enum" in value.schema:
            notes += " One of " + ", ".join(f"`{member}`" for member in value.schema["enum"]) + "."
        rows.append(f"| `{'.'.join(value.path)}` | {_cell(value.default)} | {notes} |")
    given = yaml.safe_load(text)["config"]
    model = _helm_schema(OperatorConfig.model_json_schema(by_alias=True))
    rows += [
        "",
        "## Operator configuration",
        "",
        "The ConfigMap that the operator reads at start; a change restarts the operator and no engine.",
        "",
        "| Value | Default | Description |",
        "|---|---|---|",
    ]
    rows += _config_rows(model, model["$defs"], ("config",), given)
    return "\n".join(rows) + "\n"


def _config_rows(node: Json, definitions: Json, path: tuple[str, ...], given: Any) -> Iterator[str]:
    for name, child in node["properties"].items():
        if len(path) == 1 and name in DERIVED:
            continue
        where = (*path, name)
        value = given.get(name) if isinstance(given, dict) else None
        inner = _referenced(child, definitions)
        if inner is not None and "properties" in inner:
            yield from _config_rows(inner, definitions, where, value)
            continue
        members = _referenced(child.get("additionalProperties") or {}, definitions)
        shown = _cell(child.get("default") if value is None else value)
        if members is not None and value:
            shown = ", ".join(f"`{key}`" for key in value)
        yield f"| `{'.'.join(where)}` | {shown} | {child.get('description', '')} |"
        if members is not None:
            yield from _config_rows(members, definitions, (*where, "KEY"), None)


def _referenced(node: Json, definitions: Json) -> Json | None:
    """Return the definition a schema points to, alone or beside null."""
    for option in (node, *node.get("anyOf", ())):
        if "$ref" in option:
            found: Json = definitions[option["$ref"].rpartition("/")[2]]
            return None if found.get("description", "").startswith("Requests and limits") else found
    return None


def readme(text: str) -> str:
    """Return the chart's README."""
    meta = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    return f"""<!-- {_GENERATED} -->

# {meta["name"]}

{meta["description"]} Version {meta["version"]}, for Kubernetes {meta["kubeVersion"].removesuffix("-0")}.

```console
helm install servingtiers charts/servingtiers --namespace llm --create-namespace
helm test servingtiers --namespace llm
```

See [install](../../docs/how-to/install.md), [upgrade](../../docs/how-to/upgrade.md) and
[monitoring](../../docs/how-to/monitoring.md). `ci/` holds one file of values for each feature.

## Values

{table(text)}"""


def reference(text: str) -> str:
    """Return the reference page of the chart."""
    return f"""<!-- {_GENERATED} -->

# Helm chart

Every value of `charts/servingtiers`, with its default. `helm install` refuses what is not in this table, and what the
operator itself would refuse under `config`.

## Chart values

{table(text)}"""


# -- CRD -------------------------------------------------------------------------------------------------------


def crd_template(text: str) -> str:
    """Return a CustomResourceDefinition as a template behind the chart's switches.

    Raises:
        ValueError: Helm would take a part of it for its own, or its metadata is not as expected.
    """
    if "{{" in text:
        raise ValueError("the CRD contains {{, which Helm would read as its own: escape it here")
    body = text.partition("\n")[2]
    marked, count = re.subn(
        r"^metadata:\n  name: (\S+)\n",
        r"""metadata:
  name: \1
  labels:
    {{- include "servingtiers.labels" . | nindent 4 }}
  {{- if .Values.crds.keep }}
  annotations:
    helm.sh/resource-policy: keep
  {{- end }}
""",
        body,
        flags=re.MULTILINE,
    )
    if count != 1:
        raise ValueError("the CRD's metadata is not one name: adapt crd_template")
    return f"{{{{- /* {_GENERATED} */ -}}}}\n{{{{- if .Values.crds.enabled }}}}\n{marked}{{{{- end }}}}\n"


# -- manifests -------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Block texts as blocks, no anchors, lists indented as people write them."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002 - PyYAML's
        super().increase_indent(flow, indentless=False)


def _text(dumper: _Dumper, value: str) -> yaml.Node:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def dump(*documents: Json, about: str = "") -> str:
    """Return documents as YAML under the head of generated files."""
    head = f"# {_GENERATED}\n" + (f"# {about}\n" if about else "")
    return head + "---\n".join(map(_yaml, documents))


def _yaml(document: Json) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=118, allow_unicode=True)


def render(values_: Mapping[str, Any]) -> list[Json]:
    """Return the chart's objects under these values without what only Helm needs."""
    result = subprocess.run(
        [
            str(locate_program(HELM)),
            "template",
            RELEASE,
            str(CHART),
            "--namespace",
            RELEASE,
            "--skip-tests",
            "--values",
            "-",
        ],
        input=json.dumps({"crds": {"enabled": False}, **values_}),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise SystemExit(result.stderr.strip())
    objects = [document for document in yaml.safe_load_all(result.stdout) if document]
    for obj in objects:
        for name in ("helm.sh/chart", "app.kubernetes.io/managed-by"):
            obj["metadata"].get("labels", {}).pop(name, None)
        if obj["metadata"].get("annotations", {}).keys() == {"helm.sh/resource-policy"}:
            del obj["metadata"]["annotations"]
        if obj["kind"] == "Deployment":
            # kustomize names the ConfigMap by its content.
            template = obj["spec"]["template"]["metadata"]
            del template["annotations"]["checksum/config"]
            if not template["annotations"]:
                del template["annotations"]
    return objects


def identity(obj: Json) -> tuple[str, str]:
    """Return kind and name."""
    return obj["kind"], obj["metadata"]["name"]


def manifests() -> dict[Path, str]:
    """Return every file of the kustomize base and overlays."""
    files: dict[Path, str] = {}
    base = {identity(obj): obj for obj in render(BASE)}
    config = base.pop(("ConfigMap", f"{RELEASE}-operator-config"))
    generator = {"name": config["metadata"]["name"], "files": ["config.yaml"]}
    folder = MANIFESTS / "base"
    head = _head("How accelerators appear in this cluster, and where load is read: adapt both.")
    files[folder / "config.yaml"] = f"{head}{config['data']['config.yaml'].rstrip()}\n"
    names = []
    for kind in sorted({kind for kind, _ in base}):
        names.append(f"{kind.lower()}.yaml")
        files[folder / names[-1]] = dump(*(obj for key, obj in base.items() if key[0] == kind))
    files[folder / "kustomization.yaml"] = dump(
        {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": RELEASE,
            "resources": names,
            "configMapGenerator": [generator],
        },
        about="The CRD first: kubectl apply --server-side -f crds/. Then: kubectl apply -k manifests/base",
    )
    for name, (purpose, extra) in OVERLAYS.items():
        files |= _overlay(MANIFESTS / "overlays" / name, purpose, extra, base, config)
    return files


def _head(about: str) -> str:
    return f"# {_GENERATED}\n# {about}\n"


def _overlay(
    folder: Path, purpose: str, extra: Json, base: Mapping[tuple[str, str], Json], config: Json
) -> dict[Path, str]:
    """Return an overlay's files: what is new, what is patched and what is taken out."""
    objects = {identity(obj): obj for obj in render(extra)}
    wanted = objects.pop(identity(config))
    files: dict[Path, str] = {}
    kustomization: Json = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../../base"],
    }
    new = [obj for key, obj in objects.items() if key not in base]
    if new:
        kustomization["resources"].append("added.yaml")
        files[folder / "added.yaml"] = dump(*new)
    patches = [_patch(obj, base[name]) for name, obj in objects.items() if name in base and obj != base[name]]
    patches += [_head_of(obj) | {"$patch": "delete"} for name, obj in base.items() if name not in objects]
    if patches:
        # One entry each: kustomize 5.5 crashes on a file in which a deletion is not the last.
        kustomization["patches"] = [{"patch": _yaml(patch)} for patch in patches]
    if wanted["data"] != config["data"]:
        kustomization["configMapGenerator"] = [
            {
                "name": config["metadata"]["name"],
                "namespace": RELEASE,
                "behavior": "merge",
                "files": ["config.yaml"],
            }
        ]
        files[folder / "config.yaml"] = _head(purpose) + wanted["data"]["config.yaml"].rstrip() + "\n"
    files[folder / "kustomization.yaml"] = dump(kustomization, about=purpose)
    return files


def _head_of(obj: Json) -> Json:
    """Return what tells kustomize which object is meant."""
    meta = {key: obj["metadata"][key] for key in ("name", "namespace")}
    return {"apiVersion": obj["apiVersion"], "kind": obj["kind"], "metadata": meta}


def _patch(obj: Json, old: Json) -> Json:
    """Return the parts of an object that differ, for a strategic merge."""
    changed = {key: value for key, value in obj.items() if value != old.get(key)}
    return _head_of(obj) | changed


def argocd() -> dict[Path, str]:
    """Return the patch that gives Argo CD the health check."""
    folder = MANIFESTS / "gitops/argocd"
    lua = (folder / "health.lua").read_text(encoding="utf-8")
    document = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "argocd-cm", "namespace": "argocd"},
        "data": {"resource.customizations.health.servingtiers.io_ServingTier": lua},
    }
    return {
        folder / "argocd-cm.yaml": dump(
            document, about="kubectl patch configmap argocd-cm -n argocd --patch-file argocd-cm.yaml"
        )
    }


# -- all of it -------------------------------------------------------------------------------------------------


def chart_files() -> dict[Path, str]:
    """Return every generated file that needs no Helm."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    files = {
        CHART / "values.schema.json": json.dumps(schema(text), indent=1, ensure_ascii=False) + "\n",
        CHART / "README.md": readme(text),
        CHART / "dashboards/servingtiers.json": json.dumps(dashboard.document(), indent=1) + "\n",
        ROOT / "docs/reference/chart.md": reference(text),
        **argocd(),
    }
    for source in sorted((ROOT / "crds").glob("*.yaml")):
        files[CHART / "templates/crds" / source.name] = crd_template(source.read_text(encoding="utf-8"))
    return files


def _write(files: Mapping[Path, str]) -> None:
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


def stale(files: Mapping[Path, str]) -> list[str]:
    """Return the files that are out of step, also those that nothing makes any more."""
    folders = {
        path.parent
        for path in files
        if MANIFESTS / "gitops" not in path.parents and MANIFESTS in path.parents
    }
    orphans = {
        path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file()
    } - set(files)
    wrong = [
        path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    return sorted(str(path.relative_to(ROOT)) for path in {*wrong, *orphans})


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a file is out of step"
    )
    parser.add_argument("--no-helm", action="store_true", help="leave manifests/ alone")
    options = parser.parse_args()
    files = chart_files()
    if not options.check:
        _write(files)  # before Helm renders: it reads schema and CRD
    if not options.no_helm:
        try:
            rendered = manifests()
        except ProgramUnavailableError as error:
            print(f"error: {error}, or pass --no-helm", file=sys.stderr)
            return 1
        if not options.check:
            _write(rendered)
        files |= rendered
    wrong = stale(files)
    if wrong:
        print(f"error: {', '.join(wrong)} not in step: run make generate", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
