# SPDX-License-Identifier: Apache-2.0
"""UniMixing-Lite (Kuaishou, arXiv 2604.00590)."""

from typing import Literal

from recsys.core.components import register
from recsys.ranking.mixers import UniMixingLite
from recsys.ranking.models.unimixer import UniMixer


@register("ranker", "unimixing_lite")
class UniMixingLiteRanker(UniMixer):
    """UniMixing-Lite (arXiv 2604.00590, §4.6): `UniMixer` with `UniMixingLite` for its mixer.

    The paper's tables sweep b over 2, 4, 8 and r over 2, 64, 128, 256, and 2 to 8 blocks. What holds of `UniMixer` holds here, warm-up
    in two stages included.
    """

    class Config(UniMixer.Config):
        """Defaults of the paper, small."""

        name: Literal["unimixing_lite"] = "unimixing_lite"  # type: ignore[assignment]
        mixer: UniMixingLite.Config = UniMixingLite.Config()  # type: ignore[assignment]
