"""A dashboard on this machine with one job, whose log is read by Ray's own code; its connections can be broken."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import ray
from aiohttp import web
from ray.dashboard.modules.job.job_log_storage_client import JobLogStorageClient
from ray.dashboard.modules.job.job_manager import JobManager
from ray.job_submission import JobStatus

from distssl.on_ray import jobs

JOB = "mine-1"


class Logs(JobLogStorageClient):
    def __init__(self, path: Path) -> None:
        self.path = path

    def get_log_file_path(self, job_id: str) -> Any:
        return str(self.path)


class JobServer:
    """`job` is what it tells of its job, whose log is the file `log`. Use as a context manager.

    `cut` breaks its connections, new ones too, for a while. What is `mute`, "log" or "all", sends nothing more and says
    nothing about it, as when a router on the way has forgotten the connection: the log alone, whose connection is the
    oldest, or whatever it is asked. An upload takes `upload_s`.
    """

    LOG_TAIL_SLEEP_S = 0.05  # read by `JobManager.tail_job_logs`

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        self.log = folder / f"job-driver-{time.monotonic_ns()}.log"
        self.log.write_bytes(b"")
        self._log_client = Logs(self.log)
        self.host, self.port = host, port
        self.session = "session_1"
        self.job: dict[str, Any] = {
            "type": "SUBMISSION",
            "submission_id": JOB,
            "status": "RUNNING",
            "entrypoint": "python launch.py",
            "metadata": {"project": jobs.PROJECT, "kind": "work", jobs.NAME: "mine"},
        }
        self.mute: str | None = None
        self.upload_s = 0.0
        self.uploaded = 0  # bytes
        self.tails = 0  # how often the log was asked for
        self._down_until = 0.0
        self._transports: set[Any] = set()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def end_job(self, **details: Any) -> None:
        self.job = {**self.job, **details}

    def say(self, text: bytes) -> None:
        with open(self.log, "ab") as log:
            log.write(text)

    def cut(self, for_s: float) -> None:
        def abort() -> None:
            for transport in list(self._transports):
                transport.abort()

        self._down_until = time.monotonic() + for_s
        self._loop.call_soon_threadsafe(abort)

    def __enter__(self) -> JobServer:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(30)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(30)

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(middlewares=[self._broken], client_max_size=1 << 30)
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/jobs/", self._jobs)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get(f"/api/jobs/{JOB}", self._job)
        app.router.add_get(f"/api/jobs/{JOB}/logs", self._whole_log)
        app.router.add_get(f"/api/jobs/{JOB}/logs/tail", self._tail)
        app.router.add_get("/api/packages/gcs/{name}", self._package)
        app.router.add_put("/api/packages/gcs/{name}", self._upload)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, self.host, self.port)
        await site.start()
        self.port = runner.addresses[0][1]
        started.set()
        await self._over.wait()
        self.cut(0)
        await runner.cleanup()

    @web.middleware
    async def _broken(self, request: web.Request, handler: Any) -> web.StreamResponse:
        assert request.transport
        self._transports.add(request.transport)
        try:
            if time.monotonic() < self._down_until:
                request.transport.abort()
                return web.Response()
            await self._while_mute("all")
            return await handler(request)
        finally:
            self._transports.discard(request.transport)

    async def _while_mute(self, *what: str) -> None:
        while self.mute in what:
            await asyncio.sleep(0.02)

    async def _version(self, request: web.Request) -> web.Response:
        about = {"version": "4", "ray_version": ray.__version__, "ray_commit": "x", "session_name": self.session}
        return web.json_response(about)

    async def _jobs(self, request: web.Request) -> web.Response:
        return web.json_response([self.job])

    async def _submit(self, request: web.Request) -> web.Response:
        return web.json_response(dict.fromkeys(("job_id", "submission_id"), JOB))

    async def _job(self, request: web.Request) -> web.Response:
        return web.json_response(self.job)

    async def _whole_log(self, request: web.Request) -> web.Response:
        try:
            return web.json_response({"logs": self._log_client.get_logs(JOB)})
        except UnicodeDecodeError as error:
            return web.Response(text=f"Traceback (most recent call last):\n{error}", status=500)

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        self.tails += 1
        number = self.tails
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        try:
            async for piece in JobManager.tail_job_logs(self, JOB):  # type: ignore[arg-type]
                while self.mute == "log" and number == 1:
                    await asyncio.sleep(0.02)
                await self._while_mute("all")
                await socket.send_str(piece)
        except UnicodeDecodeError:
            pass  # the dashboard's two processes pass on the end of the agent's connection as one that was meant
        except ConnectionError:
            pass  # nobody reads it any more
        return socket

    async def get_job_status(self, job: str) -> JobStatus:
        """Asked by `JobManager.tail_job_logs`."""
        return JobStatus(self.job["status"])

    async def _package(self, request: web.Request) -> web.Response:
        return web.Response(status=404)

    async def _upload(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.upload_s)
        self.uploaded += len(await request.read())
        return web.Response()
