"""``servingtiers render``: the Kubernetes objects of a tier, without a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import click
import yaml
from pydantic import BaseModel, ValidationError

from servingtiers.api import API_VERSION, KIND
from servingtiers.api.spec import ServingTier
from servingtiers.catalog.accelerators import accelerators
from servingtiers.cli._options import InputError, OneLineCommand, input_errors
from servingtiers.core.config import AcceleratorBinding, OperatorConfig
from servingtiers.core.effective import pools_asked
from servingtiers.core.state import JsonObject
from servingtiers.policy import presets, problems
from servingtiers.render import tier_objects

__all__ = ["command", "objects_yaml", "render_tier"]


class _Dumper(yaml.SafeDumper):
    """Writes no anchors: kubectl reads them, people should not have to."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


def objects_yaml(objects: tuple[JsonObject, ...]) -> str:
    """Return objects as a stream of YAML documents."""
    return yaml.dump_all(
        objects, Dumper=_Dumper, sort_keys=False, width=110, explicit_start=True, allow_unicode=True
    )


def render_tier(tier: ServingTier, config: OperatorConfig) -> tuple[JsonObject, ...]:
    """Return the objects that the operator would create for a new tier: every pool at its least replicas.

    Raises:
        InputError: The tier cannot be accepted; one line for each problem.
    """
    blocking = [problem for problem in problems.find(tier, config) if problem.blocking]
    if blocking:
        raise InputError(
            "\n".join(f"{tier.metadata.name}: {problem.field}: {problem.message}" for problem in blocking)
        )
    with input_errors(tier.metadata.name):
        settings = presets.choose(tier, config)
        least = {pool.name: pool.spec.scaling.min_replicas for pool in pools_asked(tier.spec)}
        return tier_objects(tier, settings, least, config)


def _read(path: str, document: Any, model: type[BaseModel]) -> Any:
    """Return a document as a model, or say in a line for each error what is wrong where."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        lines = [
            f"{path}: {'.'.join(str(part) for part in entry['loc'])}: {entry['msg']}"
            for entry in error.errors()
        ]
        raise InputError("\n".join(lines)) from error


def _documents(stream: TextIO) -> list[Any]:
    try:
        return [document for document in yaml.safe_load_all(stream) if document is not None]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{stream.name}: no YAML: {text}") from error


def _tiers(stream: TextIO) -> Iterator[ServingTier]:
    found = _documents(stream)
    if not found:
        raise InputError(f"{stream.name}: holds no object: write a {KIND} into it")
    kinds = [document.get("kind") if isinstance(document, dict) else None for document in found]
    if set(kinds) == {"TierPool"}:
        raise InputError(f"{stream.name}: a TierPool has no objects of its own: render takes {KIND} objects")
    for kind, document in zip(kinds, found, strict=True):
        if kind == "TierPool":  # beside its tiers, as in one file for kubectl apply
            continue
        if kind != KIND:
            raise InputError(f"{stream.name}: holds a {kind or 'text'}: render takes {KIND} objects only")
        if document.get("apiVersion") != API_VERSION:
            raise InputError(f"{stream.name}: apiVersion must be {API_VERSION}")
        yield _read(stream.name, document, ServingTier)


def _config(path: Path | None) -> OperatorConfig:
    if path is None:
        click.echo("no --config: every accelerator of the catalogue is taken to be in the cluster", err=True)
        return OperatorConfig(accelerators={found.key: AcceleratorBinding() for found in accelerators()})
    with path.open(encoding="utf-8") as stream:
        (document, *_) = _documents(stream) or [{}]
    config: OperatorConfig = _read(str(path), document, OperatorConfig)
    return config


@click.command("render", cls=OneLineCommand)
@click.option(
    "-f",
    "--filename",
    "tiers",
    type=click.File(encoding="utf-8"),
    required=True,
    help="File with one or more ServingTier objects; - reads standard input.",
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Operator configuration, YAML: which accelerators the cluster has, images, metrics.",
)
@click.option("-o", "--output", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
def command(tiers: TextIO, config_path: Path | None, output: str) -> None:
    """Show the Kubernetes objects that the operator would make of a tier, without a cluster.

    Pools have their least replicas: how many they get is decided on live load. Objects have no owner, so they are to
    be read, or to be compared, rather than applied. Rules that the API server evaluates (CEL) are not checked here.
    """
    config = _config(config_path)
    objects = tuple(obj for tier in _tiers(tiers) for obj in render_tier(tier, config))
    if output == "json":
        click.echo(json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}, indent=2))
    else:
        click.echo(objects_yaml(objects), nl=False)
