"""Scenarios: tiers with the settings chosen for them, from ``tests/golden``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from servingtiers.api.spec import ServingTier
from servingtiers.core.config import OperatorConfig
from servingtiers.core.effective import TierSettings
from servingtiers.core.state import JsonObject
from servingtiers.render import tier_objects

GOLDEN = Path(__file__).parents[1] / "golden"
_SETTINGS = TypeAdapter(TierSettings)


@dataclass(frozen=True)
class Scenario:
    """What rendering is called with, and what came of it."""

    folder: Path
    tier: ServingTier
    settings: TierSettings
    config: OperatorConfig
    replicas: dict[str, int | None]
    surge: dict[str, bool]
    objects: tuple[JsonObject, ...]

    def of_kind(self, kind: str) -> list[JsonObject]:
        """Return the objects of a kind."""
        return [obj for obj in self.objects if obj["kind"] == kind]


def load_scenario(folder: Path) -> Scenario:
    """Read one folder of ``tests/golden`` and render it."""
    tier = ServingTier.model_validate(yaml.safe_load((folder / "tier.yaml").read_text()))
    given = yaml.safe_load((folder / "settings.yaml").read_text())
    settings = _SETTINGS.validate_python(given["settings"])
    operator = folder / "operator.yaml"
    config = OperatorConfig.model_validate(yaml.safe_load(operator.read_text()) if operator.exists() else {})
    surge = given.get("surge", {})
    objects = tier_objects(tier, settings, given["replicas"], config, surge=surge)
    return Scenario(folder, tier, settings, config, given["replicas"], surge, objects)


FOLDERS = sorted(folder for folder in GOLDEN.iterdir() if (folder / "tier.yaml").exists())


@pytest.fixture(params=FOLDERS, ids=[folder.name for folder in FOLDERS])
def scenario(request: pytest.FixtureRequest) -> Scenario:
    """Every scenario in turn."""
    return load_scenario(request.param)
