"""Self-supervised pretraining of vision backbones whose science does not depend on the machines."""

import sys

if sys.platform != "linux":
    raise ImportError(f"distssl needs Linux: NVIDIA DALI has no wheel for {sys.platform}; use a container or WSL2")
