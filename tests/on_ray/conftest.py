"""Fixtures of the tests of clusters that need no hosts."""

from tests.on_ray.account import account, moto  # noqa: F401
