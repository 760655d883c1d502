"""Under DDP a search decides once for all ranks, and leaves no trace on either."""

from pathlib import Path

import pytest
import torch

from poprisk_integrations.lightning import PopRiskLearningRateFinder
from tests.integration import test_learning_rate_finder as single
from tests.integration.frameworks import FRAMEWORKS
from tests.integration.lightning import toy

pytestmark = [*toy.third_party_warnings, pytest.mark.distributed]


def searches(rank, world_size, folder):
    """A search with a run after it, and the run at its rate without a search."""
    found = {}
    for framework in FRAMEWORKS:
        options = {"tmp_path": Path(folder, framework), "batch": 4}
        if framework == "lightning":
            run, search = single.lightning_run, PopRiskLearningRateFinder(30, 8)
            options |= {"strategy": "ddp", "devices": 2}
        else:
            run, search = single.huggingface_run, 30
            options["ddp_backend"] = "gloo"
        suggestion, net, _ = run(single.LR, search, **options)
        found[framework] = {
            "rates": (suggestion.suggested, suggestion.low, suggestion.high),
            "losses": [candidate.loss for candidate in suggestion.candidates],
            "weights": net.state_dict(),
            "expected": run(suggestion.suggested, **options)[1].state_dict(),
        }
    return found


JOBS = {2: [searches]}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_one_rate_for_all_ranks(framework, results):
    first, second = (rank[framework] for rank in results(2, searches))
    assert first["rates"] == second["rates"]
    assert first["losses"] == second["losses"]
    for rank in (first, second):
        for name, weights in rank["weights"].items():
            assert torch.equal(weights, rank["expected"][name]), name
