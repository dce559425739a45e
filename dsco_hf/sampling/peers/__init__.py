"""Methods of others as baselines on one bench, each one file, written from its description and named here."""

from .best_of_n import BestOfN
from .d3hr import D3HR
from .d4m import D4M, DDOQ
from .dmgd import DMGD
from .igd import IGD
from .mgd3 import MGD3
from .s3 import S3
from .statistics import ClassStatistics
from .uag import UAG


PEERS: dict[str, type[BestOfN | UAG | D4M | MGD3 | S3 | DMGD | D3HR | IGD]] = {
    peer.name: peer for peer in (BestOfN, UAG, D4M, DDOQ, MGD3, S3, DMGD, D3HR, IGD)
}
"""By name, in the order of tables."""

__all__ = ["BestOfN", "ClassStatistics", "D3HR", "D4M", "DDOQ", "DMGD", "IGD", "MGD3", "PEERS", "S3", "UAG"]
