"""What a kind of device computes and sends, roughly: only ratios of these choose between ways to do the same."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LinkSpeed:
    """What one rank computes (operations/s) and sends (bytes/s), and what one more message costs (s)."""

    flops: float
    bytes_per_s: float
    latency_s: float


#: Rough figures by kind of device: only their ratios choose. One core over gloo; one accelerator over NVLink.
LINKS = {
    "cpu": LinkSpeed(flops=6e10, bytes_per_s=1.5e9, latency_s=5e-4),
    "cuda": LinkSpeed(flops=4e14, bytes_per_s=2e11, latency_s=2e-5),
}
