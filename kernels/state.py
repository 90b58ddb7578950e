"""The counters of a compressed row, on the device: a state is int32 [batch, COLUMNS].

Two triples, of which each says how many tokens a dense region and a tier hold, so that one kernel reads both: first those of
the dense region and the tier, then those of the important tier, beside which there is no dense region.
"""

from __future__ import annotations

import triton.language as tl

COLUMNS = 6
OFFSET, NOT_FINITE, IN_TIER, NO_OFFSET, PINNED, IN_IMPORTANT = range(COLUMNS)
"""`length - OFFSET` tokens of the row are valid in its dense region; how many stored tokens hold NaN or inf; tokens in the
tier. Always 0; tokens at the front of the dense region that no flush moves; tokens in the important tier."""

STATE_COLUMNS = tl.constexpr(COLUMNS)
SECOND = tl.constexpr(NO_OFFSET)
