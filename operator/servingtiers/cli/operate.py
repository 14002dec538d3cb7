"""``servingtiers operator``: run the operator."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import click

__all__ = ["command"]

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def _own_namespace() -> str:
    """Return the namespace the process runs in: given by the pod, mounted with its account, or ``default``."""
    if name := os.environ.get("POD_NAMESPACE"):
        return name
    return _NAMESPACE_FILE.read_text(encoding="utf-8").strip() if _NAMESPACE_FILE.exists() else "default"


@click.command("operator")
@click.option("--config", type=click.Path(exists=True, dir_okay=False), help="Operator configuration, YAML.")
@click.option(
    "--kubeconfig", type=click.Path(exists=True, dir_okay=False), help="Left out: as a pod, else as kubectl."
)
@click.option(
    "--namespace", default=_own_namespace, show_default="own", help="Namespace of the operator and its Lease."
)
@click.option(
    "--leader-elect/--no-leader-elect", default=True, show_default=True, help="Hold a Lease before writing."
)
@click.option("--lease-duration", default=15.0, show_default=True, help="Seconds until another takes over.")
@click.option(
    "--lease-renew-deadline", default=10.0, show_default=True, help="Seconds after which a holder stops."
)
@click.option("--lease-retry", default=2.0, show_default=True, help="Seconds between renewals.")
@click.option("--health-port", default=8080, show_default=True, help="Port of /healthz and /readyz; 0: none.")
@click.option("--metrics-port", default=8081, show_default=True, help="Port of /metrics; 0: none.")
@click.option("--workers", default=8, show_default=True, help="Tiers reconciled at a time.")
@click.option("--resync-seconds", default=300.0, show_default=True, help="Seconds between full relists.")
@click.option(
    "--log-level", default="INFO", show_default=True, type=click.Choice(["DEBUG", "INFO", "WARNING"])
)
def command(
    config: str | None,
    kubeconfig: str | None,
    namespace: str,
    leader_elect: bool,
    lease_duration: float,
    lease_renew_deadline: float,
    lease_retry: float,
    health_port: int,
    metrics_port: int,
    workers: int,
    resync_seconds: float,
    log_level: str,
) -> None:
    """Run the operator until it is stopped or loses its Lease."""
    from servingtiers.adapters.leadership import LeaseTimes
    from servingtiers.handlers import Options, load_config, run

    logging.basicConfig(level=log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("kopf").setLevel(logging.WARNING)
    try:
        options = Options(
            config=load_config(config),
            kubeconfig=kubeconfig,
            namespace=namespace,
            lease=LeaseTimes(lease_duration, lease_renew_deadline, lease_retry) if leader_elect else None,
            health_port=health_port or None,
            metrics_port=metrics_port or None,
            workers=workers,
            resync_seconds=resync_seconds,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    asyncio.run(run(options))
