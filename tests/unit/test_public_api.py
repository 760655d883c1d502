"""Names, arguments and metadata that users rely on, as release 0.1 had them.

More may come; none may go, and no default may change by itself.
"""

import importlib
import inspect
import json
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch

import poprisk_integrations
from poprisk_integrations import PopRiskAdamW

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "signatures.json").read_text())
# Two names of one class, of which one is enough.
GONE = {"poprisk_integrations.huggingface.PopRiskLRCutCallback"}
# Accepted for one release, with a warning outside `PopRiskAdamW.paper`.
DEPRECATED = {"gate_eps": 1e-3, "noise_mean": "raw"}


@pytest.mark.parametrize("name", sorted(GOLDEN.keys() - GONE))
def test_nothing_is_lost(name):
    parts = name.split(".")
    depth = 1 if len(parts) == 2 or parts[1][:1].isupper() else 2
    found = importlib.import_module(".".join(parts[:depth]))
    assert parts[depth] in found.__all__
    for part in parts[depth:]:
        found = getattr(found, part)
    if GOLDEN[name] is None:
        return
    parameters = inspect.signature(found).parameters
    known = {name: repr(p.default) for name, p in parameters.items()}
    if "options" in known:  # forwarded to the optimizer
        optimizer = inspect.signature(PopRiskAdamW).parameters
        known |= {name: repr(p.default) for name, p in optimizer.items()}
    for argument, default in GOLDEN[name].items():
        if argument in DEPRECATED:
            continue
        assert argument in known, argument
        assert not default or known[argument] == default, argument


@pytest.mark.parametrize("name", DEPRECATED)
def test_options_of_the_published_rule_are_still_taken(name):
    params = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.warns(DeprecationWarning, match=rf"PopRiskAdamW\({name}=.*paper"):
        optimizer = PopRiskAdamW(params, **{name: DEPRECATED[name]})
    assert optimizer.param_groups[0][name] == DEPRECATED[name]
    paper = PopRiskAdamW.paper(params, **{name: DEPRECATED[name]})  # no warning, which is an error
    assert paper.param_groups[0][name] == DEPRECATED[name]
    with pytest.raises(ValueError, match=r"Invalid noise_source: 'moments'. Must be 'temporal'"):
        PopRiskAdamW.paper(params, noise_source="moments")
    with pytest.raises(TypeError, match="unexpected keyword argument 'gate_epsilon'"):
        PopRiskAdamW(params, gate_epsilon=1.0)


def test_all_but_what_adamw_takes_by_place_is_given_by_name():
    parameters = list(inspect.signature(PopRiskAdamW).parameters.values())
    assert [p.name for p in parameters[:5]] == ["params", "lr", "betas", "eps", "weight_decay"]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[5:-1])


def test_top_level():
    assert set(poprisk_integrations.__all__) == {"PopRiskAdamW", "__version__"}
    assert version("poprisk_integrations") == poprisk_integrations.__version__


def test_the_learning_rate_cut_has_one_meaning():
    """Same arguments, order and defaults in both frameworks."""
    import poprisk_integrations.huggingface as huggingface
    import poprisk_integrations.lightning as lightning

    arguments = [
        [(name, p.default, p.kind) for name, p in inspect.signature(cls).parameters.items()]
        for cls in (huggingface.PopRiskLRCut, lightning.PopRiskLRCut)
    ]
    assert arguments[0] == arguments[1]


def test_console_script():
    (script,) = (e for e in entry_points(group="console_scripts") if e.name == "poprisk")
    assert script.value == "poprisk_integrations.cli.main:main"
