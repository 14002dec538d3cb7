"""The cluster, the product in it and one line of figures for each scenario."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from harness import prometheus as monitoring
from harness.existing import ExistingCluster
from harness.kind import KindCluster
from harness.kube import Kube
from harness.product import Product
from harness.tiers import remove_tiers
from onenode import images as built
from onenode import programs
from onenode.cluster import Cluster
from onenode.images import Images
from onenode.places import Places
from servingtiers.lab.binaries import file_lock, locate

_FIGURES: list[str] = []
_LONGEST_FIRST = ("2", "5", "7", "4", "6", "3", "11", "1", "10", "8", "9")
"""Scenarios in the order in which workers take them, so that they end together."""
_FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the choices of a cluster."""
    parser.addoption(
        "--cluster", choices=("onenode", "kind", "kubeconfig"), default="onenode", help="what to run on"
    )
    parser.addoption(
        "--image",
        action="append",
        default=[],
        metavar="PART=NAME",
        help="with --cluster=kubeconfig: image of operator, engine, router or prometheus that its nodes can pull",
    )
    parser.addoption(
        "--models", metavar="CLAIM", help="with --cluster=kubeconfig: a claim with the model in `tiny`"
    )
    parser.addoption(
        "--runtime-class",
        help="with --cluster=kubeconfig: a RuntimeClass that engines name, where one is needed",
    )
    parser.addoption("--gpus", type=int, default=6, help="accelerators that the node advertises")
    parser.addoption("--any-build", action="store_true", help="take cached images although sources changed")


def pytest_configure(config: pytest.Config) -> None:
    """Name our marker, and refuse to run side by side on a cluster that is not ours to make again."""
    config.addinivalue_line(
        "markers", "continues: begins with the tiers of the test before it, where that passed"
    )
    if config.getoption("numprocesses", None) and config.getoption("--cluster") != "onenode":
        raise pytest.UsageError("scenarios run side by side (-n) only on --cluster=onenode, one for each")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let workers begin with what takes longest."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _turn(item.path.name.split("_")[1]))


def _turn(scenario: str) -> int:
    return _LONGEST_FIRST.index(scenario) if scenario in _LONGEST_FIRST else len(_LONGEST_FIRST)


def _alone(places: Places) -> AbstractContextManager[None]:
    """Let one worker at a time build what they share."""
    return file_lock(places.cache / "lock", programs.say, "what all clusters share is being built")


_PARTS = ("operator", "engine", "router", "prometheus")
_AnyCluster = Cluster | KindCluster | ExistingCluster


@pytest.fixture(scope="session")
def images_of(request: pytest.FixtureRequest) -> dict[str, str]:
    """Return the names of the images in the cluster."""
    names = {
        "operator": built.OPERATOR,
        "engine": built.ENGINE,
        "router": built.ROUTER,
        "prometheus": built.PROMETHEUS,
    }
    given = dict(each.partition("=")[::2] for each in request.config.getoption("--image"))
    if unknown := given.keys() - names.keys():
        raise pytest.UsageError(f"--image {', '.join(unknown)}: the parts are {', '.join(_PARTS)}")
    if request.config.getoption("--cluster") == "kubeconfig" and not names.keys() <= given.keys():
        lacking = ", ".join(f"--image={part}=…" for part in _PARTS if part not in given)
        raise pytest.UsageError(f"an existing cluster pulls its images: give {lacking}")
    return names | given


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[_AnyCluster]:
    """Bring the cluster up, or find it up, and move this process into its network."""
    places = Places.default()
    found: _AnyCluster
    if request.config.getoption("--cluster") == "kubeconfig":
        kubeconfig = os.environ.get("KUBECONFIG")
        kubectl = shutil.which("kubectl") or locate(progress=programs.say).kubectl
        if not kubeconfig or kubectl is None:
            raise pytest.UsageError("--cluster=kubeconfig needs KUBECONFIG and kubectl")
        found = ExistingCluster(places, Path(kubeconfig), Path(kubectl))
        found.up()
    elif request.config.getoption("--cluster") == "kind":
        programs.engine(places)
        built.model(places)
        found = KindCluster(places)
        found.up()
        found.images()
    else:
        found = Cluster(places)
        with _alone(places):
            found.up()
            images = Images(places, rebuild=not request.config.getoption("--any-build"))
            for make in (images.base, images.operator, images.engine, images.router):
                image = make()
                if image.seconds:
                    programs.say(
                        f"image {image.name}: {image.size_mib:.0f} MiB, built in {image.seconds:.0f} s"
                    )
            built.model(places)
            # Here, because from inside the cluster's network no package index can be reached.
            programs.helm()
            wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
            if "prometheus" in wanted:
                images.prometheus()
            if "previous" in wanted:
                images.previous()
            if "rival" in wanted:
                images.keda()
    found.enter()
    yield found
    if isinstance(found, ExistingCluster):
        found.down()


@pytest.fixture(scope="session")
def kube(cluster: _AnyCluster) -> Kube:
    """Return the cluster as its administrator sees it."""
    if isinstance(cluster, KindCluster):
        return Kube(cluster.kubeconfig, cluster.kubectl_path)
    if isinstance(cluster, ExistingCluster):
        return Kube(cluster.kubeconfig, cluster.kubectl_path, proxy=cluster.proxy)
    kubectl = programs.prepare(cluster.places).control_plane.kubectl
    return Kube(cluster.places.kubeconfig, kubectl or Path("kubectl"))


@pytest.fixture(scope="session")
def product(
    request: pytest.FixtureRequest,
    cluster: _AnyCluster,
    kube: Kube,
    images_of: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Product:
    """Install the product by Helm into a restricted namespace."""
    theirs = isinstance(cluster, ExistingCluster)
    product = Product(
        kube,
        programs.helm(),
        images_of,
        tmp_path_factory.mktemp("product"),
        runtime_class=request.config.getoption("--runtime-class") if theirs else "vllm-cpu",
        build=Images(cluster.places).build_of(built.OPERATOR) if isinstance(cluster, Cluster) else "",
    )
    product.prepare_namespace()
    if theirs:
        product.make_model(request.config.getoption("--models"))
    else:
        product.mount_model(cluster.places.model)
    product.install()
    return product


@pytest.fixture(autouse=True)
def room(request: pytest.FixtureRequest, cluster: _AnyCluster, kube: Kube) -> Iterator[None]:
    """Begin with no tier and all accelerators; afterwards remove the tiers and wait until their pods are gone.

    An engine takes longer to start than many a test to run: one marked ``continues`` takes over what is there.
    """
    goes_on = request.node.get_closest_marker("continues") is not None
    if not goes_on and kube.listed("deployments", "servingtiers.io/tier"):  # of a run that was broken off
        remove_tiers(kube)
    cluster.set_accelerators(request.config.getoption("--gpus"))
    yield
    failed = request.node.stash.get(_FAILED, False)
    if failed:
        _tell(kube, cluster.places.cache / "failures" / f"{request.node.name}.txt")
    if not os.environ.get("KEEP") and (failed or not _is_continued(request)):
        remove_tiers(kube)


def _is_continued(request: pytest.FixtureRequest) -> bool:
    items = request.session.items
    following = items[items.index(request.node) + 1 :][:1]
    return any(
        item.path == request.node.path and item.get_closest_marker("continues") is not None
        for item in following
    )


@pytest.fixture(scope="session")
def dying_engine(cluster: _AnyCluster) -> str:
    """Return the image of an engine that dies on its first request."""
    if not isinstance(cluster, Cluster):
        pytest.skip("that image needs an environment that the node mounts")
    with _alone(cluster.places):
        Images(cluster.places).engine_dies()
    return built.ENGINE_DIES


@pytest.fixture(scope="session")
def previous(cluster: _AnyCluster, product: Product) -> tuple[Product, Path]:
    """Return the version before: as a product with the operator's image of then, and its chart."""
    if not isinstance(cluster, Cluster):
        pytest.skip("the image of the version before is built here and put on the node")
    with _alone(cluster.places):
        sources = Images(cluster.places).previous()
    if sources is None:
        pytest.skip(f"this clone's history does not reach back to {built.PREVIOUS[:12]}")
    before = replace(product, images={**product.images, "operator": built.OPERATOR_PREVIOUS})
    return before, sources / "charts" / "servingtiers"


@pytest.fixture(scope="session")
def prometheus(cluster: _AnyCluster, kube: Kube, images_of: dict[str, str]) -> monitoring.Prometheus:
    """Install Prometheus."""
    return monitoring.install(kube, images_of["prometheus"])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember whether the test itself failed."""
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    if report.failed:
        # The next scenario may take minutes: say now what went wrong.
        programs.say(f"{item.name} failed: {report.longreprtext[-1500:]}")
    return report


def _tell(kube: Kube, to: Path) -> None:
    """Write down what the cluster looked like."""
    to.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        kube.run("get", "pods,deployments,servingtiers,events", "-o=wide", check=False),
        kube.run("get", "servingtiers", "-o=yaml", check=False),
        kube.run("logs", "--selector=app.kubernetes.io/component=operator", "--tail=200", check=False),
        kube.run(
            "logs", "--selector=app.kubernetes.io/component=router", "--tail=200", "--prefix", check=False
        ),
        kube.run(
            "logs", "--selector=app.kubernetes.io/component=engine", "--tail=200", "--prefix", check=False
        ),
    ]
    to.write_text("\n".join(parts))
    programs.say(f"failed: what the cluster looked like is in {to}")


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that takes the scenario's line of figures."""

    def record(line: str) -> None:
        request.node.user_properties.append(("figures", f"{request.node.name}: {line}"))
        programs.say(f"{request.node.name}: {line}")

    return record


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the figures, also those of workers."""
    if report.when == "call":
        scenario = Path(report.location[0]).name
        _FIGURES.extend(
            f"{scenario.split('_')[1]:>2} {line}"
            for name, line in report.user_properties
            if name == "figures"
        )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures together."""
    if _FIGURES:
        terminalreporter.section("figures")
        for line in sorted(_FIGURES):
            terminalreporter.write_line(line)
