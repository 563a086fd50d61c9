"""Publishing: the release gate, the model card and the folder that leaves the machine."""

from securetune.publishing.card import render_card
from securetune.publishing.gate import GateRefusal, check_gate, require_passed
from securetune.publishing.local import OutgoingFile, Published, publish, what_would_leave

__all__ = [
    "GateRefusal",
    "OutgoingFile",
    "Published",
    "check_gate",
    "publish",
    "render_card",
    "require_passed",
    "what_would_leave",
]
