"""Auditing of private training: what its noise really holds back, beside the epsilon it claims."""

from turncoat.auditing.canaries import Diracs
from turncoat.auditing.evidence import Audited, Bound
from turncoat.auditing.federations import audit_federation
from turncoat.auditing.sampling import poisson_p_value
from turncoat.auditing.trainers import audit_trainer

__all__ = [
    "Audited",
    "Bound",
    "Diracs",
    "audit_federation",
    "audit_trainer",
    "poisson_p_value",
]
