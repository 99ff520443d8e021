"""What there is of a cluster, said for people: hosts and what they cost, and why it cannot be used as it is."""

from __future__ import annotations

import collections
from typing import Any

from distssl import prices
from distssl.on_ray import aws, head
from distssl.on_ray.cluster_file import ClusterFile
from distssl.on_ray.head import Found

Hosts = list[dict[str, Any]]


def hosts(file: ClusterFile) -> Hosts | None:
    """Those that there are, as `aws.instances` has them; None where that is not known."""
    return aws.instances(file) if file.provider == "aws" else None


def price(file: ClusterFile, hosts: Hosts | None) -> str:
    """What hosts cost, for people; "" where that is not known. Those without a "state" run."""
    if hosts is None:
        return ""
    kinds = collections.Counter(one["type"] for one in hosts if one.get("state", aws.UP[0]) in aws.UP)
    bill = prices.bill(file.config, kinds)
    num = sum(kinds.values())
    of = f"list prices of {prices.table().date}"
    known = f"{num} host{'s' if num != 1 else ''}, about {bill.usd_per_hour:.2f} USD an hour ({of})"
    known += f", without {', '.join(bill.unknown)}, whose price is not known" if bill.unknown else ""
    num_stopped = sum(one.get("state") in aws.STOPPED for one in hosts)
    return known + (f", and {num_stopped} stopped, whose volumes cost" if num_stopped else "")


def trouble(file: ClusterFile, found: Found, cut_off: bool) -> str:
    """Why a cluster can neither be used nor be brought up, and what to do about it.

    cut_off: whether a command of this machine was cut off while it brought the cluster up.
    """
    if found.state == head.HEADLESS:
        who, what = f"hosts of {file.name} are there without a head", f"end them: {file.ends}"
    elif found.state == head.SETTING_UP and cut_off:
        who, what = f"the command that set up the head of {file.name} was cut off", f"end it: {file.ends}"
    elif found.state == head.SETTING_UP:
        who = f"the head of {file.name} is still being set up ({found.status}), or a command that did so was cut off"
        what = f"try again, or end it: {file.ends}"
    elif found.state == head.UNREACHABLE:
        who, what = "the head does not answer SSH", "try again" + (f", or end it: {file.ends}" if found.hosts else "")
    else:
        who = f"the head of {file.name} is there, and Ray does not answer"
        what = f"try again, or end it: {file.ends}"
    costs = f" ({price(file, found.hosts)})" if found.hosts else ""
    return f"{file.path}: {who}{costs}; nothing was changed, {what}"
