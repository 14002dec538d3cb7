"""``python -m onenode up | down | images | status | kubectl …``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from onenode.cluster import Cluster, ClusterError
from onenode.images import Images, model
from onenode.processes import DaemonError
from onenode.programs import ProgramsError, say
from servingtiers.lab.binaries import SourceUnavailableError


def _images(cluster: Cluster) -> None:
    images = Images(cluster.places)
    for make in (images.base, images.operator, images.engine, images.router, images.prometheus):
        image = make()
        made = f"built in {image.seconds:.0f} s" if image.seconds else "cached"
        say(f"image {image.name}: {image.size_mib:.0f} MiB, {made}")
    model(cluster.places)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one thing with the cluster."""
    parser = argparse.ArgumentParser(prog="python -m onenode", description=__doc__)
    parser.add_argument("what", choices=("up", "images", "down", "status", "kubectl", "shell"))
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    cluster = Cluster()
    begun = time.monotonic()
    try:
        match options.what:
            case "up":
                cluster.up()
                _images(cluster)
                say(f"up in {time.monotonic() - begun:.0f} s")
            case "images":
                _images(cluster)
            case "down":
                for places in (cluster.places, *cluster.places.beside()):
                    Cluster(places).down()
            case "status":
                for name, daemon in cluster.daemons.items():
                    print(f"{name:26} {daemon.pid or 'not running'}")
            case "kubectl":
                print(cluster.kubectl(*options.rest), end="")
            case "shell":
                cluster.enter()
                os.environ["KUBECONFIG"] = str(cluster.places.kubeconfig)
                os.execvp(os.environ.get("SHELL", "/bin/sh"), ["sh"])  # noqa: S606 - the user asked for a shell
    except (ClusterError, DaemonError, ProgramsError, SourceUnavailableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
