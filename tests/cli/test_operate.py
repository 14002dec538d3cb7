"""The operator as a process."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time

import pytest
from aiohttp import web

LEASE = {
    "apiVersion": "coordination.k8s.io/v1",
    "kind": "Lease",
    "metadata": {"name": "servingtiers-operator", "namespace": "llm", "resourceVersion": "1"},
    "spec": {
        "holderIdentity": "another",
        "leaseDurationSeconds": 60,
        "acquireTime": "2026-01-01T00:00:00.000000Z",
        "renewTime": "2026-01-01T00:00:00.000000Z",
    },
}


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
async def test_an_operator_that_waits_for_the_lease_goes_when_it_is_told_to(sent, tmp_path):
    """Else every standby takes its whole grace period, and may win the Lease while it is being stopped."""
    asked, writes = asyncio.Event(), []

    async def answer(request: web.Request) -> web.Response:
        if request.method != "GET":
            writes.append(request.method)
        asked.set()
        return web.json_response(LEASE)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "a",
                "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
                "clusters": [{"name": "a", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
                "users": [{"name": "a", "user": {"token": "t"}}],
            }
        )
    )
    options = [f"--kubeconfig={kubeconfig}", "--namespace=llm", "--health-port=0", "--metrics-port=0"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "servingtiers.cli", "operator", *options, stderr=asyncio.subprocess.PIPE
    )
    try:
        await asyncio.wait_for(asked.wait(), 60)
        began = time.monotonic()
        process.send_signal(sent)
        _, errors = await asyncio.wait_for(process.communicate(), 5)

        assert process.returncode == 0, errors.decode()
        assert time.monotonic() - began < 5
        assert "Traceback" not in errors.decode()
        assert not writes
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await runner.cleanup()
