"""What tests of several processes share."""

import socket


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def two_process_flags() -> list[str]:
    """Flags that make two commands one run on this host; each needs its --process_id too."""
    return [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
