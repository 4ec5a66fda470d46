"""The papermill engine of the grid: nbclient with a kernel that is watched, and that ends with its parent."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine

from cxrkit.grid.store import KERNEL_FOLDER

__all__ = ["KernelEngine"]

_GOODBYE = 2.0  # seconds that a kernel has to end after its last cell
_MODULE = "cxrkit.grid.kernel"


class _Client(PapermillNotebookClient):
    """Tells the watch of the kernel's process, and notices within a tenth of a second when it has died."""

    def __init__(self, *args: Any, watch: Any, folder: str, **options: Any):
        super().__init__(*args, **options)
        self._watch, self._folder = watch, folder

    def start_new_kernel(self, **options: Any) -> None:
        super().start_new_kernel(**options)
        self._watch.begin(self.km.provisioner.process, self._folder)

    async def _async_poll_kernel_alive(self) -> None:
        while self.km.provisioner.process.poll() is None:
            await asyncio.sleep(0.1)
        try:
            await self._async_check_alive()
        except DeadKernelError:
            self.task_poll_for_reply.cancel()


class KernelEngine(NBClientEngine):
    """Registered with papermill as `cxrkit`."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man, kernel_name, watch, start_kernel, stdout_file, stderr_file, start_timeout=120, **ignored
    ):
        folder = tempfile.mkdtemp(prefix=KERNEL_FOLDER)
        arguments = ["-m", _MODULE, str(os.getpid()), "-f", "{connection_file}"]
        manager = AsyncKernelManager(connection_file=os.path.join(folder, "kernel.json"), kernel_name="python3")
        manager._kernel_spec = KernelSpec(argv=[sys.executable, *arguments], display_name="Python 3", language="python")
        if os.name == "posix":  # sockets in a folder of one's own, rather than ports that others may take meanwhile
            manager.transport, manager.ip = "ipc", os.path.join(folder, "k")
        client = _Client(
            nb_man,
            km=manager,
            watch=watch,
            folder=folder,
            timeout=None,
            startup_timeout=start_timeout,
            stdout_file=stdout_file,
            stderr_file=stderr_file,
        )
        try:
            return client.execute(**start_kernel)
        finally:
            _end(client, manager, watch)
            shutil.rmtree(folder, ignore_errors=True)


def _end(client: _Client, manager: AsyncKernelManager, watch: Any) -> None:
    process = manager.provisioner.process if manager.provisioner else None
    if process is not None and process.poll() is None and watch.reason is None:
        run_sync(manager.request_shutdown)()
        over = time.monotonic() + _GOODBYE
        while process.poll() is None and time.monotonic() < over:
            time.sleep(0.005)
    watch.end()
    if client.kc is not None:
        client.kc.stop_channels()
    run_sync(manager.cleanup_resources)()
