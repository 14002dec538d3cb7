"""Finding the control-plane programs."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from servingtiers.lab import binaries
from servingtiers.lab.binaries import BinariesError, ChecksumError, SourceUnavailableError, locate

PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("KUBEBUILDER_ASSETS", "SERVINGTIERS_CONTROLPLANE_SOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(binaries.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(binaries.platform, "system", lambda: "Linux")


def fill(folder: Path, names=PROGRAMS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"#!/bin/sh\necho {name}\n")
        (folder / name).chmod(0o755)


def never_fetch(url: str, timeout: float) -> Iterator[bytes]:
    raise OSError("no network in this test")


def never_build(folder: Path, progress) -> None:
    raise AssertionError("must not build")


class Site:
    """The release sites, in memory."""

    def __init__(self, *, corrupt: str = "") -> None:
        self.asked: list[str] = []
        self.corrupt = corrupt
        self.files = {name: f"the real {name}".encode() for name in PROGRAMS}
        archive = io.BytesIO()
        base = f"etcd-{binaries.ETCD_VERSION}-linux-amd64"
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            info = tarfile.TarInfo(f"{base}/etcd")
            info.size = len(self.files["etcd"])
            tar.addfile(info, io.BytesIO(self.files["etcd"]))
        self.files[f"{base}.tar.gz"] = archive.getvalue()

    def __call__(self, url: str, timeout: float) -> Iterator[bytes]:
        self.asked.append(url)
        name = url.rsplit("/", 1)[-1]
        if name == "SHA256SUMS":
            archive = next(one for one in self.files if one.endswith(".tar.gz"))
            yield f"{hashlib.sha256(self.files[archive]).hexdigest()}  {archive}\n".encode()
        elif name.endswith(".sha256"):
            yield hashlib.sha256(self.files[name.removesuffix(".sha256")]).hexdigest().encode()
        else:
            content = self.files[name]
            yield content[:5]
            yield content[5:] + (b"!" if name == self.corrupt else b"")


def test_kubebuilder_assets_win_over_everything(tmp_path, monkeypatch):
    fill(tmp_path / "assets")
    fill(tmp_path / "cache" / "controlplane" / "anything")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path / "assets"))
    found = locate(cache=tmp_path / "cache", fetch=never_fetch, build=never_build)
    assert found.etcd == tmp_path / "assets" / "etcd"
    assert found.kubectl == tmp_path / "assets" / "kubectl"


def test_assets_without_a_scheduler_are_passed_over_with_a_word(tmp_path, monkeypatch):
    fill(tmp_path / "assets", ("etcd", "kube-apiserver", "kubectl"))
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path / "assets"))
    said: list[str] = []
    built = locate(
        cache=tmp_path / "cache", fetch=never_fetch, build=lambda to, _: fill(to), progress=said.append
    )
    assert built.source == "build"
    assert "lacks kube-controller-manager, kube-scheduler" in said[0]


def test_a_download_fills_the_cache_once_and_holds_what_was_published(tmp_path):
    site = Site()
    first = locate(cache=tmp_path, fetch=site, build=never_build, progress=lambda _: None)
    assert first.source == "download"
    assert first.etcd.read_bytes() == b"the real etcd"
    assert first.kube_scheduler.read_bytes() == b"the real kube-scheduler"
    asked = len(site.asked)
    second = locate(cache=tmp_path, fetch=site, build=never_build)
    assert (second.source, second.etcd, len(site.asked)) == ("cache", first.etcd, asked)


@pytest.mark.parametrize("name", ["kube-apiserver", f"etcd-{binaries.ETCD_VERSION}-linux-amd64.tar.gz"])
def test_a_file_with_another_checksum_is_refused_and_nothing_is_cached(tmp_path, name):
    with pytest.raises(ChecksumError, match="SERVINGTIERS_CONTROLPLANE_SOURCE=build"):
        locate(cache=tmp_path, fetch=Site(corrupt=name), build=never_build, progress=lambda _: None)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []


def test_an_unreachable_site_falls_through_to_the_build(tmp_path):
    said: list[str] = []
    found = locate(cache=tmp_path, fetch=never_fetch, build=lambda to, _: fill(to), progress=said.append)
    assert found.source == "build"
    assert any("cannot be reached" in line for line in said)


def test_half_a_build_is_not_published_and_the_error_says_the_mend(tmp_path):
    with pytest.raises(BinariesError, match=r"install Go .* KUBEBUILDER_ASSETS .* made no kube-scheduler"):
        locate(
            cache=tmp_path,
            fetch=never_fetch,
            build=lambda to, _: fill(to, PROGRAMS[:3]),
            progress=lambda _: None,
        )
    assert not list((tmp_path / "controlplane").glob("v*"))


def test_a_failing_command_is_reported_with_its_last_words():
    with pytest.raises(SourceUnavailableError, match="trying failed with exit status 3: out of luck"):
        binaries.run_with_progress(
            ["sh", "-c", "echo out of luck; exit 3"], progress=lambda _: None, doing="trying"
        )


def test_the_go_module_pins_the_versions_the_code_names():
    text = (Path(binaries.__file__).parent / "gotools" / "go.mod").read_text()
    assert f"k8s.io/kubernetes {binaries.KUBERNETES_VERSION}" in text
    assert f"go.etcd.io/etcd/server/v3 {binaries.ETCD_VERSION}" in text
    staging = set(re.findall(r"=> k8s\.io/\S+ (v\S+)", text))
    assert staging == {binaries.KUBERNETES_VERSION.replace("v1.", "v0.")}
