"""Extension of the Jupyter server: messages large enough for a radiograph, which a widget sends whole."""

from __future__ import annotations

from typing import Any

__all__ = ["LARGEST_MESSAGE"]

LARGEST_MESSAGE = 320 * 2**20  # bytes: the largest file that the lab takes, and what goes with it; Tornado's own: 10 MB


def _load_jupyter_server_extension(app: Any) -> None:
    """The server calls this at its start; a higher limit of its own stays."""
    settings = app.web_app.settings
    settings["websocket_max_message_size"] = max(settings.get("websocket_max_message_size", 0), LARGEST_MESSAGE)
