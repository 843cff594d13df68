"""What a kind of device computes and sends, roughly: only ratios of these choose between ways to do the same."""

from dataclasses import dataclass
from enum import Enum


class Link(Enum):
    """Over what the ranks of a group meet. All of a group know it alike: its communicators are of one kind."""

    GLOO = "gloo"
    SHARED_MEMORY = "shared memory"
    NCCL = "nccl"


@dataclass(frozen=True, kw_only=True)
class LinkSpeed:
    """What one rank computes (operations/s) and sends (bytes/s), and what a message costs beside its bytes (s).

    `merge_bytes_per_s`: partial outputs that it merges by log-sum-exp, each read and written several times.
    `hidden`: the share of a transfer behind attention that costs it nothing; gloo copies on the cores that compute.
    `sort_s`: to sort rows by where they go and to learn how many come, whatever their number, and `sort_bytes_per_s`
    for each of them.
    """

    flops: float
    bytes_per_s: float
    latency_s: float
    merge_bytes_per_s: float
    hidden: float
    sort_s: float
    sort_bytes_per_s: float


#: Rough figures: only their ratios choose. One core with torch's attention over gloo, on one machine; one core with the
#: native attention in shared memory; one accelerator over NVLink.
LINKS = {
    Link.GLOO: LinkSpeed(
        flops=7e10,
        bytes_per_s=1e9,
        latency_s=2e-4,
        merge_bytes_per_s=6e8,
        hidden=0.0,
        sort_s=3e-4,
        sort_bytes_per_s=5e9,
    ),
    Link.SHARED_MEMORY: LinkSpeed(
        flops=7e10,
        bytes_per_s=5e9,
        latency_s=2e-5,
        merge_bytes_per_s=2e9,
        hidden=0.0,
        sort_s=3e-4,
        sort_bytes_per_s=5e9,
    ),
    Link.NCCL: LinkSpeed(
        flops=4e14,
        bytes_per_s=2e11,
        latency_s=2e-5,
        merge_bytes_per_s=4e11,
        hidden=1.0,
        sort_s=4e-5,
        sort_bytes_per_s=1e12,
    ),
}


@dataclass(frozen=True, kw_only=True)
class DeviceSpeed:
    """What a rank computes and reads for each unit it has, a core or an accelerator.

    `flops` of products and `key_flops` of attention that reads few rows (operations/s), `read_bytes_per_s` of one unit
    alone. The units of a host that has `n` of them read no more than `shared_reads * n` times that together, and no
    more than `host_bytes_per_s`.
    """

    flops: float
    key_flops: float
    read_bytes_per_s: float
    shared_reads: float
    host_bytes_per_s: float

    def reads(self, *, units: float, of: int) -> float:
        """Bytes/s that each of `units` gets that read at once, on a host that has `of`."""
        most = min(self.shared_reads * of * self.read_bytes_per_s, self.host_bytes_per_s)
        return min(self.read_bytes_per_s, max(most, self.read_bytes_per_s) / units)


#: Rough figures by kind of device: only their ratios choose. Cores of one host share its memory; accelerators do not.
DEVICES = {
    "cpu": DeviceSpeed(flops=9e10, key_flops=3e10, read_bytes_per_s=2.6e10, shared_reads=0.7, host_bytes_per_s=3e11),
    "cuda": DeviceSpeed(
        flops=4e14, key_flops=2e14, read_bytes_per_s=3e12, shared_reads=1.0, host_bytes_per_s=float("inf")
    ),
}
