"""Opens ``d2scale://`` addresses in detectron2 and d2go wherever they open a file.

d2go reads ``--config-file`` before it imports the runner, so a runner cannot bring the prefix.
detectron2 offers a hook for that: set ``DETECTRON2_ENV_MODULE=d2scale.d2go.environment``.
"""

from __future__ import annotations

from typing import IO, Any

from iopath.common.file_io import PathHandler

from d2scale.config.loading import SHIPPED_PREFIX, resolve_config_path


class ShippedConfigHandler(PathHandler):
    """Maps ``d2scale://NAME.yaml`` to the file that comes with d2scale."""

    def _get_supported_prefixes(self) -> list[str]:
        return [SHIPPED_PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return resolve_config_path(path)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return True  # an unknown name raises, with the list of known ones

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return open(resolve_config_path(path), mode, buffering)


def setup_environment() -> None:
    """Register the prefix; detectron2 calls this when it is imported."""
    from detectron2.utils.file_io import PathManager

    PathManager.register_handler(ShippedConfigHandler(), allow_override=True)
