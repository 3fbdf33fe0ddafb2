"""What a sweep found, as text and as the table in the docs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tests.opinfo.judge import Outcome


def summary(found: Sequence[Outcome]) -> str:
    """Counts, and why padding was refused where it is safe."""
    kinds = Counter(outcome.kind for outcome in found)
    safe = [outcome for outcome in found if outcome.truly_safe]
    lines = [f"{len(found)} cases: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())]
    judged_safe = [outcome for outcome in safe if outcome.safe]
    lines.append(f"truly safe: {len(safe)}, of which judged safe: {len(judged_safe)} ({share(judged_safe, safe)})")
    reasons = Counter((outcome.operator, outcome.refusal) for outcome in safe if not outcome.safe)
    lines += [f"{count:6} {operator}: {reason}" for (operator, reason), count in reasons.most_common(70)]
    lines.append(f"wrong: {sum(outcome.wrong is not None for outcome in found)}")
    return "\n".join(lines)


def share(part: Sequence[object], whole: Sequence[object]) -> str:
    """Of ``whole``, the share of ``part``."""
    return f"{100 * len(part) / max(len(whole), 1):.1f} %"


def markdown(found: Sequence[Outcome], samples: int) -> str:
    return summary(found)
