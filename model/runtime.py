"""ONNX Runtime without its telemetry: what runs a plan does not report to the runtime's makers."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

# Official builds for Linux, macOS and Windows (seen with 1.31.1) make up an id of the device, keep it in the user's cache
# folder and send events over HTTPS, all from the moment they are imported. Only these variables, set by then, prevent it.
SILENCE = {"ORT_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1"}  # the latter as it was called at first
_importing = threading.Lock()


def load_onnxruntime() -> Any:
    """The module `onnxruntime`. The environment is as before afterwards, and what the host app has set in it counts."""
    with _importing:
        ours = [] if "onnxruntime" in sys.modules else [name for name in SILENCE if name not in os.environ]
        os.environ.update({name: SILENCE[name] for name in ours})
        try:
            import onnxruntime
        finally:
            for name in ours:
                del os.environ[name]
    return onnxruntime
