"""Does DALI decode this image? Asked one image at a time, the only way to know which of a batch is at fault."""

# DALI's type stubs lack its enums and know no pipeline without a GPU.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportPrivateImportUsage=false

from __future__ import annotations

import threading

import numpy as np
from nvidia.dali import fn, pipeline_def, types


class Probe:
    """A batch-1 CPU pipeline; after a failed decode it goes on with the next image. Threads may share it."""

    def __init__(self) -> None:
        self._next: list[np.ndarray] = []
        self._lock = threading.Lock()
        pipeline = _decode_one(source=lambda: [self._next.pop()])
        pipeline.build()
        self._pipeline = pipeline

    def problem(self, data: bytes) -> str | None:
        """None where DALI decodes `data` to an RGB image, else why it does not, in one line."""
        if not data:
            return "zero bytes"  # DALI refuses an empty input outside the pipeline's error handling
        with self._lock:
            self._next.append(np.frombuffer(data, np.uint8))
            try:
                self._pipeline.run()
            except RuntimeError as error:  # DALI raises no other class, whatever went wrong
                return reason(error)
        return None


def reason(error: RuntimeError) -> str:
    """The line of a DALI error that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "encountered:" in lines[:-1]:
        return lines[lines.index("encountered:") + 1].removesuffix(" :")[:160]
    return lines[-1][:160] if lines else type(error).__name__


@pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
def _decode_one(source):
    encoded = fn.external_source(source=source, batch=True, dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, output_type=types.RGB)
