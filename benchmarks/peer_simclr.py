"""SimCLR by distssl and by lightly on the same photos, steps and probes, beside a random and a supervised network.

Command: python benchmarks/peer_simclr.py            (--help for the rest; run again, it goes on where it was)

Pretraining sees 8,038 photos at 64 px without labels, those of the clothing test senders among them; grocery's test
photos are not. The probes are distssl.downstream's, on frozen features, for every backbone alike. Every finished
contestant and seed is a JSON file in benchmarks/rows, trained and probed in a process of its own.
"""

from __future__ import annotations

import peer_table
import study

if __name__ == "__main__":
    study.main(__doc__, tuple(peer_table.NAMES), 3, peer_table.render)
