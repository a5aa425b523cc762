"""Routes below /tenuto/v1/. They are not behind --api-auth, so they read and nothing else."""

from __future__ import annotations

from typing import Any

from tenuto.resources import __version__

from . import accordion, artifacts, words


def on_app_started(demo: Any, app: Any) -> None:
    """Adds the routes to the host's server."""

    def status() -> dict[str, Any]:
        """What is attached, and what the last run did."""
        return {"version": __version__, **words.facts()}

    def listed() -> list[dict[str, Any]]:
        """The artifacts for the loaded checkpoint, by the names that the API takes."""
        built = [{"name": n, "precision": s} for n, s in artifacts.BUILT_INS.items()]
        found = [
            {
                "name": f.name, "precision": f.scheme, "hash": artifacts.mark(f),
                "family": f.header["family"], "route": "route" in f.header,
                "exported": bool(f.brings),
            }
            for f in artifacts.files(accordion.loaded())
        ]  # fmt: skip
        return [*built, *found]

    app.add_api_route("/tenuto/v1/status", status, methods=["GET"])
    app.add_api_route("/tenuto/v1/artifacts", listed, methods=["GET"])
