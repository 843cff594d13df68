"""The checkpoint that a router serves, whole and checked."""

import logging
from dataclasses import dataclass

from parallel.checkpoint.contents import draft_layers
from parallel.checkpoint.fingerprint import fingerprint
from parallel.checkpoint.location import resolve_model
from parallel.models.description import ModelDescription
from router.errors import ClusterError
from router.model_check import check_model
from router.text import ModelText

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What the router itself needs of the model."""

    description: ModelDescription
    text: ModelText
    fingerprint: str


def load_served_model(model: str) -> ServedModel:
    """Blocking: the checkpoint that `model` names, fetched where it is on the hub, its warnings logged.

    ClusterError with every fault of it: a file may have changed since the check, and a hub's weights come only now.
    """
    try:
        folder = resolve_model(model)
        found = check_model(folder, weights=True)
        digest = "" if found.faults else fingerprint(folder)
    except (ValueError, OSError) as error:
        raise ClusterError(f"model {model}: {error}") from error
    if found.faults or found.description is None or found.text is None:
        raise ClusterError("\n".join(f"model {model}: {fault}" for fault in found.faults))
    for warning in found.warnings:
        logger.warning("%s", warning)
    skipped = draft_layers(folder, description=found.description)
    if skipped:
        logger.info("layers that draft further tokens are not read: model=%s layers=%s", folder, list(skipped))
    return ServedModel(description=found.description, text=found.text, fingerprint=digest)
