import inspect

import pytest

from poprisk_integrations.huggingface.optim_args import parse_optim_args, valid_keys
from poprisk_integrations.optim import PopRiskAdamW


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("", {}),
        ("gate=none", {"gate": "none"}),
        (
            "gate=soft,alpha=calibrated,false_open_rate=0.05,no_gate=embed|norm",
            {
                "gate": "soft",
                "alpha": "calibrated",
                "false_open_rate": 0.05,
                "no_gate": ("embed", "norm"),
            },
        ),
        ("alpha=1", {"alpha": 1.0}),
        (
            "noise_source=moments,granularity=row",
            {"noise_source": "moments", "granularity": "row"},
        ),
        ("gate_eps=1e-10", {"gate_eps": 1e-10}),  # for optim="poprisk_adamw_paper"
        ("alpha = 2e-1 , rho=0.9", {"alpha": 0.2, "rho": 0.9}),
        ("lambda_pop=none,foreach=None", {"lambda_pop": None, "foreach": None}),
        ("foreach=False,preserve_norm=true", {"foreach": False, "preserve_norm": True}),
        ("gate_warmup=10,dataset_size=1000", {"gate_warmup": 10, "dataset_size": 1000}),
        ("gate=hard,\n\talpha=0.2\n", {"gate": "hard", "alpha": 0.2}),  # folded in YAML
        ({"gate": "hard", "rho": 0.9, "alpha": "2e-1"}, {"gate": "hard", "rho": 0.9, "alpha": 0.2}),
        ({"no_gate": ["embed", "norm"]}, {"no_gate": ("embed", "norm")}),
        (["gate=hard", "alpha=0.2"], {"gate": "hard", "alpha": 0.2}),
    ],
)
def test_types_follow_the_signature(text, expected):
    parsed = parse_optim_args(text)
    assert parsed == expected
    assert {k: type(v) for k, v in parsed.items()} == {k: type(v) for k, v in expected.items()}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gates=soft", "unknown key 'gates' (did you mean 'gate'?)"),
        ("zzz=1", "unknown key 'zzz'"),
        ("gate", "'gate' is not of the form key=value"),
        ("gate=", "'gate=' is not of the form key=value"),
        ("=soft", "'=soft' is not of the form key=value"),
        ("alpha=1=2", "'alpha=1=2' is not of the form key=value"),
        ("alpha=1,", "'' is not of the form key=value"),
        ("alpha=1,,rho=0.9", "'' is not of the form key=value"),
        ("gate=soft,gate=hard", "'gate' is given twice"),
        ("rho=high", "rho='high' is not a valid float"),
        ("gate_warmup=1.5", "gate_warmup='1.5' is not a valid int"),
        ("preserve_norm=yes", "preserve_norm='yes' is not a valid bool"),
        ("lambda_pop=x", "lambda_pop='x' is not a valid float or none"),
        ("no_gate=embed||norm", "no_gate='embed||norm' is not a list"),
        ("lr=1e-3", "'lr' is set by TrainingArguments(learning_rate=...)"),
        ("betas=0.9", "'betas' is set by TrainingArguments(adam_beta1 and adam_beta2=...)"),
        ("weight_decay=0", "'weight_decay' is set by TrainingArguments(weight_decay=...)"),
    ],
)
def test_one_readable_line(text, said):
    with pytest.raises(ValueError, match="Invalid optim_args") as caught:
        parse_optim_args(text)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert "Valid keys: alpha, batch_size" in message


def test_keyword_options_are_checked_and_win():
    assert parse_optim_args("gate=soft,rho=0.9", gate="hard", no_gate=["embed"]) == {
        "gate": "hard",
        "rho": 0.9,
        "no_gate": ("embed",),
    }
    with pytest.raises(ValueError, match="unknown key 'gte'"):
        parse_optim_args(None, gte="hard")


def test_every_option_of_the_optimizer_is_a_key():
    parameters = inspect.signature(PopRiskAdamW.__init__).parameters
    keyword_only = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert len(keyword_only) >= 17  # contract section 2
    assert set(valid_keys()) == {*keyword_only, "no_gate"}
    defaults = {n: str(parameters[n].default) for n in keyword_only}
    assert parse_optim_args(",".join(f"{n}={v}" for n, v in defaults.items())) == {
        n: parameters[n].default for n in keyword_only
    }
