"""A server in a thread of its own, for as long as a block runs."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from jaxrlhf.feedback.gate import App

GRACE = 5  # seconds that requests under way are given at the end


@contextlib.contextmanager
def listening(make: Callable[[], App], host: str, port: int, grace: int = GRACE) -> Iterator[str]:
    """What `make` gives, served from when it answers until the block ends; gives its address. Port 0: any that is free.

    Raises:
        ValueError: the extra `serve` is not installed.
        OSError: the port is taken, the host is not this machine's, or the server did not start.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError("a page in the browser needs starlette and uvicorn: pip install 'jaxrlhf[serve]'") from error
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as opened:
        config = uvicorn.Config(
            make(),  # pyright: ignore[reportArgumentType]
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            http="h11",
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=grace,
            limit_concurrency=2000,  # connections; requests have a limit of their own
            h11_max_incomplete_event_size=16_384,  # of a request's head
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, name="server", daemon=True)
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            if not server.started:
                raise OSError(f"the server at {host} did not start; what it printed says why")
            named = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
            named = f"[{named}]" if ":" in named else named
            yield f"http://{named}:{opened.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
