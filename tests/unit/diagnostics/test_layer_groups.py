"""Names of parameters to layer groups."""

import pytest

from poprisk_integrations.diagnostics.layer_sample import (
    MOST_GROUPS,
    check_per_layer,
    layer_groups,
)


def llama(layers):
    yield "model.embed_tokens.weight"
    for i in range(layers):
        for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"):
            yield f"model.layers.{i}.{part}.weight"
    yield "model.norm.weight"
    yield "lm_head.weight"


def groups_of(names, *args):
    return list(dict.fromkeys(layer_groups(names, *args).values()))


def test_blocks_and_the_modules_outside_of_them():
    assert groups_of(llama(2)) == [
        *("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    ]
    assert groups_of(["0.weight", "2.bias", "scale"]) == ["0", "2", "scale"]


@pytest.mark.parametrize(("layers", "width"), [(27, 1), (28, 2), (54, 2), (80, 4), (126, 8)])
def test_a_deep_model_shows_ranges_of_its_depth(layers, width):
    found = groups_of(llama(layers))
    assert len(found) <= MOST_GROUPS
    second = found[2]
    assert second == ("model.layers.1" if width == 1 else f"model.layers.{width}-{2 * width - 1}")


def test_many_modules_without_numbers_are_cut_shorter():
    names = [f"{a}.{b}.weight" for a in "abcdef" for b in "abcdefg"]
    assert groups_of(names) == list("abcdef")
    flat = [f"p{chr(97 + i % 26)}{i // 26 * 'x'}" for i in range(50)]
    found = groups_of(flat)
    assert len(found) == MOST_GROUPS
    assert found[-1] == "rest"
    assert list(layer_groups(flat)) == flat


def test_wrappers_leave_no_trace():
    wrapped = "module._orig_mod.model._fsdp_wrapped_module.layers.3._checkpoint_wrapped_module.w"
    assert layer_groups([wrapped]) == {wrapped: "model.layers.3"}
    assert layer_groups(["my_module.w"]) == {"my_module.w": "my_module"}


def test_depth_and_function():
    assert groups_of(llama(2), 1) == ["model", "lm_head"]
    assert groups_of(llama(1), 9)[1] == "model.layers.0.self_attn.q_proj"
    assert groups_of(llama(2), lambda n: "mlp" if "mlp" in n else None) == ["mlp"]
    assert layer_groups(llama(2), False) == {}


@pytest.mark.parametrize("value", [0, -1, 1.5, "auto", None])
def test_refuses(value):
    with pytest.raises(ValueError, match="Invalid per_layer"):
        check_per_layer(value)
