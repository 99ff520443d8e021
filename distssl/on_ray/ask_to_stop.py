"""On a cluster: ask the job of a name to save a checkpoint and stop; 1 where it has no ears for that.

It is the workers of a run that hear it: one that still waits for hosts has none.
"""

from __future__ import annotations

import sys

import ray

from distssl.on_ray import desk, place


def main(name: str) -> None:
    place.start()
    found = desk.find(name)
    if found is None or not ray.get(found.ask_to_stop.remote()):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
