"""What a kind of device computes and sends, roughly: only ratios of these choose between ways to do the same."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LinkSpeed:
    """What one rank computes (operations/s) and sends (bytes/s), and what one more message costs (s).

    `merge_bytes_per_s`: partial outputs that it merges by log-sum-exp, each read and written several times.
    `hidden`: the share of a transfer behind attention that costs it nothing; gloo copies on the cores that compute.
    """

    flops: float
    bytes_per_s: float
    latency_s: float
    merge_bytes_per_s: float
    hidden: float


#: Rough figures by kind of device: only their ratios choose. One core over gloo; one accelerator over NVLink.
LINKS = {
    "cpu": LinkSpeed(flops=7e10, bytes_per_s=1e9, latency_s=2.5e-4, merge_bytes_per_s=6e8, hidden=0.0),
    "cuda": LinkSpeed(flops=4e14, bytes_per_s=2e11, latency_s=2e-5, merge_bytes_per_s=4e11, hidden=1.0),
}
