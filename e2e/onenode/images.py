"""Container images without a registry: Debian packages, the product's own Dockerfile, and three small ones.

Images are built with Buildah in a store of their own and loaded into the node's containerd.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onenode import programs
from onenode.places import Places
from onenode.programs import say
from servingtiers.lab.binaries import run_with_progress

__all__ = [
    "BASE",
    "ENGINE",
    "ENGINE_DIES",
    "KEDA",
    "OPERATOR",
    "OPERATOR_PREVIOUS",
    "PAUSE",
    "PREVIOUS",
    "PROMETHEUS",
    "ROUTER",
    "Image",
    "Images",
]

ROOT = Path(__file__).parents[2]
"""The repository."""
_FILES = Path(__file__).parent.parent / "images"
_DOCKERFILE = Path(os.environ.get("SERVINGTIERS_E2E_DOCKERFILE", ROOT / "Dockerfile"))

PAUSE = "localhost/pause:1"
BASE = "localhost/python:3.11-bookworm"
OPERATOR = "localhost/servingtiers/operator:e2e"
OPERATOR_PREVIOUS = "localhost/servingtiers/operator:previous"
PREVIOUS = "2561e66662bc62f6d91c55061dc694b06bb53cf2"
"""The version before, from which an upgrade is tried: a commit, as long as nothing is released."""
ENGINE = "localhost/servingtiers/vllm-cpu:v0.32.0"
ENGINE_DIES = "localhost/servingtiers/vllm-cpu-dies:v0.32.0"
"""An engine that dies on its first request."""
ROUTER = "localhost/servingtiers/vllm-router:v0.1.17"
PROMETHEUS = "localhost/prometheus:3"
KEDA = f"localhost/keda:{programs.KEDA_VERSION}"
"""KEDA's operator and its metrics adapter."""

_SUITE = "bookworm"
_PACKAGES = ("python3", "python3-venv", "python3-pip", "ca-certificates", "libnuma1")
_DEBIAN = "http://deb.debian.org/debian"


@dataclass(frozen=True, slots=True)
class Image:
    """An image that the node has."""

    name: str
    size_mib: float
    """Size of the archive, uncompressed, MiB."""
    seconds: float
    """Time to build it now; 0 where it was cached."""


class Images:
    """Builds what is out of date and loads it into containerd.

    Args:
        places: Where images and sockets are.
        rebuild: Whether an image whose sources changed is built again; otherwise any build of it will do.
    """

    def __init__(self, places: Places, *, rebuild: bool = True) -> None:
        self._places = places
        self._rebuild = rebuild
        self._folder = places.cache / "images"
        self._folder.mkdir(parents=True, exist_ok=True)

    # -- tools --------------------------------------------------------------------------------------------

    def _buildah(self, *arguments: str, doing: str | None = None, cwd: Path | None = None) -> str:
        command = [
            "buildah",
            *("--root", str(self._folder / "store"), "--runroot", str(self._places.run / "buildah")),
            *("--storage-driver", "overlay", *arguments),
        ]
        env = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
        if doing is not None:
            run_with_progress(command, progress=say, doing=doing, env=env, cwd=cwd)
            return ""
        done = subprocess.run(command, env=env, cwd=cwd, check=False, capture_output=True, text=True)
        if done.returncode:
            raise programs.ProgramsError(f"buildah {arguments[0]}: {done.stderr.strip()}")
        return done.stdout.strip()

    def _archive(self, name: str) -> Path:
        return self._folder / (name.rpartition("/")[2].replace(":", "-") + ".tar")

    def _build(self, name: str, key: str, make: Sequence[str]) -> Image:
        """Build ``name`` by ``buildah MAKE`` unless an archive for ``key`` is there; load it into the node."""
        archive = self._archive(name)
        stamp = archive.with_suffix(".key")
        begun = time.monotonic()
        fresh = archive.exists() and stamp.exists() and (not self._rebuild or stamp.read_text() == key)
        key = stamp.read_text() if fresh else key
        if not fresh:
            stamp.unlink(missing_ok=True)
            archive.unlink(missing_ok=True)
            self._buildah(*make, doing=f"building image {name}", cwd=ROOT)
            self._buildah("push", name, f"docker-archive:{archive}:{name}", doing=f"writing image {name}")
            stamp.write_text(key)
        seconds = 0.0 if fresh else time.monotonic() - begun
        self._load(name, archive, key)
        return Image(name, archive.stat().st_size / 2**20, seconds)

    def build_of(self, name: str) -> str:
        """Return what tells one build of an image from another of the same name; empty where there is none."""
        stamp = self._archive(name).with_suffix(".key")
        return stamp.read_text()[:16] if stamp.exists() else ""

    def _load(self, name: str, archive: Path, key: str) -> None:
        loaded = self._places.state / "images" / archive.with_suffix(".key").name
        if loaded.exists() and loaded.read_text() == key:
            return
        subprocess.run(
            [
                *("ctr", "-a", str(self._places.containerd_socket), "-n", "k8s.io"),
                *("images", "import", "--digests=false", str(archive)),
            ],
            check=True,
            capture_output=True,
        )
        loaded.parent.mkdir(parents=True, exist_ok=True)
        loaded.write_text(key)

    @staticmethod
    def _key(*parts: str, files: Iterable[Path] = ()) -> str:
        digest = hashlib.sha256("\0".join(parts).encode())
        for path in sorted(files):
            # Relative: the same sources in another checkout are the same image.
            digest.update(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()

    # -- images -------------------------------------------------------------------------------------------

    def pause(self) -> Image:
        """Build the sandbox image: a static program that sleeps and reaps."""
        source = _FILES / "pause.c"
        with tempfile.TemporaryDirectory() as scratch:
            binary = Path(scratch) / "pause"
            subprocess.run(["gcc", "-Os", "-static", "-o", str(binary), str(source)], check=True)
            shutil.copyfile(_FILES / "pause.Dockerfile", Path(scratch) / "Dockerfile")
            return self._build(PAUSE, self._key(files=[source]), ["bud", "--tag", PAUSE, scratch])

    def base(self) -> Image:
        """Build the image that stands in for ``python:3-slim``: Debian with Python."""
        rootfs = self._folder / "base-rootfs"
        key = self._key(_SUITE, *_PACKAGES)
        stamp = self._folder / "base-rootfs.key"
        if not stamp.exists() or stamp.read_text() != key:
            shutil.rmtree(rootfs, ignore_errors=True)
            run_with_progress(
                [
                    "debootstrap",
                    "--variant=minbase",
                    f"--include={','.join(_PACKAGES)}",
                    _SUITE,
                    str(rootfs),
                    _DEBIAN,
                ],
                progress=say,
                doing="putting Debian together",
            )
            for folder in (
                "var/cache/apt",
                "var/lib/apt/lists",
                "usr/share/doc",
                "usr/share/man",
                "usr/share/locale",
            ):
                shutil.rmtree(rootfs / folder, ignore_errors=True)
                (rootfs / folder).mkdir(parents=True)
            (rootfs / "usr/bin/python").unlink(missing_ok=True)
            (rootfs / "usr/bin/python").symlink_to("python3")
            # Debian guards its Python against pip; in an image the guard is only in the way.
            for guard in (rootfs / "usr/lib").glob("python3*/EXTERNALLY-MANAGED"):
                guard.unlink()
            stamp.write_text(key)
        shutil.copyfile(_FILES / "base.Dockerfile", self._folder / "base.Dockerfile")
        return self._build(
            BASE, key, ["bud", "--tag", BASE, "-f", str(self._folder / "base.Dockerfile"), str(rootfs)]
        )

    def operator(self) -> Image:
        """Build the product's image from the product's own Dockerfile, on our base."""
        sources = [
            _DOCKERFILE,
            ROOT / "pyproject.toml",
            *(ROOT / "requirements").glob("*.txt"),
            *(
                path
                for path in (ROOT / "operator").rglob("*")
                if path.is_file() and "__pycache__" not in path.parts
            ),
        ]
        return self._product(OPERATOR, self._key(BASE, files=sources), _DOCKERFILE, ROOT)

    def previous(self) -> Path | None:
        """Build the operator's image of the version before; return its sources, or None where history lacks them."""
        git = ("git", "-C", str(ROOT))
        if subprocess.run([*git, "cat-file", "-e", PREVIOUS], check=False, capture_output=True).returncode:
            return None

        def unpack(to: Path) -> None:
            packed = subprocess.run([*git, "archive", PREVIOUS], check=True, capture_output=True).stdout
            subprocess.run(["tar", "-x", "-C", str(to)], check=True, input=packed)

        sources = programs.made(self._folder / f"previous-{PREVIOUS[:12]}", "the version before", unpack)
        self._product(OPERATOR_PREVIOUS, self._key(BASE, PREVIOUS), sources / "Dockerfile", sources)
        return sources

    def _product(self, name: str, key: str, dockerfile: Path, context: Path) -> Image:
        # Inside the build the package index is reached as it is from here.
        passed = [
            f"--env={each}" for each in ("PIP_INDEX_URL", "PIP_CERT", "SSL_CERT_FILE") if each in os.environ
        ]
        bundle = os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
        return self._build(
            name,
            key,
            _bud(
                name, dockerfile, context, "--network", "host", *passed, "--volume", f"{bundle}:{bundle}:ro"
            ),
        )

    def engine(self) -> Image:
        """Build the engine's image: a shim, because the runtime mounts the 6 GB environment from the node."""
        programs.engine(self._places)
        return self._shim(ENGINE, "engine.Dockerfile", "vllm")

    def engine_dies(self) -> Image:
        """Build the image of an engine that dies on its first request."""
        return self._shim(ENGINE_DIES, "engine-dies.Dockerfile", "vllm-dies")

    def _shim(self, name: str, dockerfile: str, program: str) -> Image:
        files = [_FILES / dockerfile, _FILES / program, _FILES / "sitecustomize.py"]
        return self._build(
            name,
            self._key(BASE, files=files),
            _bud(name, files[0], _FILES),
        )

    def router(self) -> Image:
        """Build the image of vllm-router."""
        site = next((programs.router() / "lib").glob("python3*")) / "site-packages"
        files = [_FILES / "router.Dockerfile", _FILES / "vllm-router"]
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            context = Path(scratch)
            key = self._key(BASE, str(site), files=files)
            shutil.copytree(
                site, context / "site-packages", ignore=shutil.ignore_patterns("pip", "__pycache__")
            )
            for path in files:
                shutil.copy2(path, context / path.name)
            return self._build(ROUTER, key, _bud(ROUTER, context / "router.Dockerfile", context))

    def prometheus(self) -> Image:
        """Build an image of Prometheus with Kubernetes' discovery, which Debian's package lacks."""
        return self._of_programs(PROMETHEUS, "prometheus.Dockerfile", programs.prometheus(self._places))

    def keda(self) -> Image:
        """Build an image of KEDA's two programs."""
        return self._of_programs(KEDA, "keda.Dockerfile", programs.keda(self._places))

    def _of_programs(self, name: str, dockerfile: str, folder: Path) -> Image:
        """Build an image of programs that lie in ``folder``, whose name says their version."""
        file = _FILES / dockerfile
        return self._build(
            name,
            self._key(BASE, folder.name, files=[file]),
            _bud(name, file, folder),
        )


def _bud(name: str, dockerfile: Path, context: Path, *more: str) -> list[str]:
    """Return Buildah's arguments for an image on our base."""
    return [
        *("bud", "--tag", name, "--build-arg", f"BASE_IMAGE={BASE}", "--pull=false", *more),
        *("-f", str(dockerfile), str(context)),
    ]


def model(places: Places, name: str = "tiny", layers: int = 2, heads: int = 4) -> Path:
    """Return the folder of a tiny random model, made by the engine's own libraries where it is not there yet."""
    folder = places.model / name
    if not folder.exists():
        places.model.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).parent.parent / "tools" / "make_tiny_model.py"
        python = programs.engine(places) / "bin" / "python"
        run_with_progress(
            [str(python), str(script), str(folder), str(layers), str(heads)],
            progress=say,
            doing=f"making the model {name}",
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        # Engines run as another user.
        for path in (places.model, folder, *folder.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
    _remember_class(places, folder)
    return folder


def _remember_class(places: Places, folder: Path) -> None:
    """Let vLLM write down what it finds out about the model's class, for the engine's image to begin with."""
    cache = places.engine / "cache"
    if cache.exists():
        return
    subprocess.run(
        [
            str(places.engine / "bin" / "python"),
            "-c",
            "import sys; from vllm.config import ModelConfig; ModelConfig(sys.argv[1], dtype='float32')",
            str(folder),
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_TARGET_DEVICE": "cpu", "VLLM_CACHE_ROOT": str(cache)},
    )
    # Engines run as another user.
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


if sys.platform != "linux":
    raise ImportError("a node needs Linux: use kind, or an existing cluster by KUBECONFIG")
