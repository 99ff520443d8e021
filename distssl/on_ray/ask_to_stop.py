"""On a cluster: ask the job of a name to save a checkpoint and stop; 1 where it has no ears for that."""

from __future__ import annotations

import sys

import ray

from distssl.on_ray import desk, place


def main(name: str) -> None:
    place.start()
    found = desk.find(name)
    if found is None:
        sys.exit(1)
    ray.get(found.ask_to_stop.remote())


if __name__ == "__main__":
    main(sys.argv[1])
