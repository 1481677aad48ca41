# SPDX-License-Identifier: Apache-2.0
"""Loading, the configuration that a bundle keeps, adapters, and what trains."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

from recsys.core.components import get, names
from recsys.core.config import parse
from recsys.core.errors import ComponentError, ConfigError
from recsys.retrieval.backbones import lora
from tests.recsys.retrieval.backbones.tiny import DIM, KINDS, NO_PROMPT, TOKENS, build, config_of, histories, save

each_kind = pytest.mark.parametrize("kind", KINDS)
SEEN = torch.tensor([[0, 5], [3, 2], [1, 1]])
ADAPTED = {"t5": 3 * 3 + 2 * 6, "qwen2": 3 * 3}  # projections: of encoder layers, decoder layers with two attentions each


def outputs(backbone):
    return backbone(*histories(), SEEN)


def same(one, other):
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def again(backbone, max_length=6):
    """From what a bundle keeps: the configuration as JSON, and the state dict."""
    kept = json.loads(json.dumps(backbone.config.model_dump(mode="json")))
    cls = type(backbone)
    other = cls(parse(cls.Config, kept, source="bundle"), max_length)
    other.load_state_dict(backbone.state_dict(), strict=True)
    return other


def test_both_are_registered():
    assert set(KINDS) <= set(names("set_backbone"))


@each_kind
def test_the_weights_are_those_of_the_folder(tmp_path, kind):
    model = save(kind, tmp_path)
    backbone = build(kind, tmp_path)
    assert backbone.dim == DIM
    saved = model.base_model.state_dict() if kind == "qwen2" else model.state_dict()
    state = {name.removeprefix("model."): value for name, value in backbone.state_dict().items()}
    assert torch.equal(state.pop("prompt.weight"), model.get_input_embeddings().weight[[3, 5, 7, 9]])
    gone = {name for name in saved if "embed_tokens" in name or name in ("shared.weight", "lm_head.weight")}
    assert state.keys() == saved.keys() - gone
    for name, value in state.items():
        assert torch.equal(value, saved[name])


@each_kind
def test_the_tokens_of_the_prompt_are_the_tokenizers(folders, kind):
    config = build(kind, folders[kind]).config
    assert {name: getattr(config, name) for name in TOKENS} == TOKENS
    empty = build(kind, folders[kind], **NO_PROMPT).config
    assert empty.instruction_tokens == empty.response_tokens == ()


@each_kind
def test_given_tokens_come_before_the_text(folders, kind):
    config = build(kind, folders[kind], response_tokens=[4, 4]).config
    assert (config.instruction_tokens, config.response_tokens) == ((3, 7, 5), (4, 4))


@each_kind
def test_the_architecture_is_plain_and_complete(folders, kind):
    architecture = build(kind, folders[kind]).config.architecture
    assert json.loads(json.dumps(architecture)) == architecture
    assert str(folders[kind]) not in json.dumps(architecture)
    theirs, ours = config_of(kind).to_dict(), AutoConfig.for_model(**architecture).to_dict()
    ignored = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    assert {k: v for k, v in ours.items() if k not in ignored} == {k: v for k, v in theirs.items() if k not in ignored}


@each_kind
def test_configurations_as_older_files_have_them(tmp_path, kind):
    """With keys of other versions, some of which decide what the model computes."""
    save(kind, tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    content.pop("rope_parameters", None)
    older = {
        "qwen2": {"rope_theta": 1000.0, "use_mrope": False},
        "t5": {"n_positions": 512, "task_specific_params": {"t": {"num_beams": 4}}},
    }
    file.write_text(json.dumps({**content, **older[kind], "torch_dtype": "bfloat16"}))
    backbone = build(kind, tmp_path)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    same(outputs(again(backbone).eval()), outputs(backbone))
    if kind == "qwen2":
        rotary = backbone.model.rotary_emb.inv_freq
        torch.testing.assert_close(rotary, 1000.0 ** -(torch.arange(0, 4, 2) / 4))


@each_kind
@pytest.mark.parametrize("config", [{}, NO_PROMPT, {"release": True}, {"lora": {"rank": 2}}, {"lora": {}, "dtype": "bfloat16"}])
def test_configuration_and_state_rebuild_it_without_the_folder(tmp_path, kind, config):
    save(kind, tmp_path / "model")
    backbone = build(kind, tmp_path / "model", **config)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.01)
    shutil.rmtree(tmp_path / "model")
    other = again(backbone)
    assert other.config == backbone.config and other.config.pretrained == str(tmp_path / "model")
    assert other.training
    assert {n: p.requires_grad for n, p in other.named_parameters()} == {n: p.requires_grad for n, p in backbone.named_parameters()}
    assert {n: p.dtype for n, p in other.named_parameters()} == {n: p.dtype for n, p in backbone.named_parameters()}
    same(outputs(other.eval()), outputs(backbone))


@each_kind
def test_no_tensor_is_kept_twice(folders, kind):
    """As the files of a bundle demand."""
    state = build(kind, folders[kind]).state_dict()
    pointers = [value.data_ptr() for value in state.values() if value.numel()]
    assert len(set(pointers)) == len(pointers)


@each_kind
def test_an_architecture_alone_is_drawn_by_its_own_rule(kind):
    cls = get("set_backbone", kind)
    config = parse(cls.Config, {"architecture": config_of(kind).to_dict(), **TOKENS}, source="recipe")
    torch.manual_seed(0)
    one = cls(config, 6)
    torch.manual_seed(0)
    two = cls(config, 6)
    assert one.prompt.weight.shape == (4, DIM)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert outputs(one).isfinite().all()


@each_kind
def test_without_adapters_everything_trains(folders, kind):
    backbone = build(kind, folders[kind]).train()
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    outputs(backbone).square().sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert backbone.prompt.weight.grad.abs().sum(1).min() > 0


@each_kind
def test_a_built_backbone_is_in_training_mode(folders, kind):
    cls = get("set_backbone", kind)
    backbone = cls(parse(cls.Config, {"pretrained": str(folders[kind]), **NO_PROMPT}, source="recipe"), 6)
    assert all(module.training for module in backbone.modules())


@each_kind
@pytest.mark.parametrize("release", [False, True])
def test_gradients_reach_items_and_queries(kind, release):
    """Along a direction in all inputs, against central differences; of a T5 without kinks."""
    cls, architecture = get("set_backbone", kind), {**config_of(kind).to_dict(), "feed_forward_proj": "gated-gelu"}
    torch.manual_seed(0)
    backbone = cls(parse(cls.Config, {"architecture": architecture, **TOKENS, "release": release}, source="recipe"), 6).eval().double()
    inputs = [value.double().requires_grad_() for value in histories()]
    weights = torch.randn(3, 2, 3, DIM, dtype=torch.float64)
    directions = [torch.randn_like(value) for value in inputs]

    def value(step):
        moved = [x + step * d for x, d in zip(inputs, directions, strict=True)]
        return (backbone(*moved, SEEN) * weights).sum()

    gradients = torch.autograd.grad(value(0.0), inputs)
    with torch.no_grad():
        numeric = (value(1e-3) - value(-1e-3)) / 2e-3
    analytic = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    assert float(analytic) == pytest.approx(float(numeric), rel=1e-2)
    items = gradients[0].abs().sum((-1, -2)) > 0
    assert items.tolist() == [[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4]
    assert (gradients[1].abs().sum(-1) > 0).all()


# Adapters.


@each_kind
def test_adapters_change_nothing_at_first_and_alone_train(folders, kind):
    plain, adapted = build(kind, folders[kind]), build(kind, folders[kind], lora={"rank": 3})
    same(outputs(adapted), outputs(plain))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * ADAPTED[kind] and all(".lora_A." in name or ".lora_B." in name for name in trained)
    width = DIM * 2  # of every attended projection with its input, but for Qwen's grouped values
    narrow = 3 * 8 if kind == "qwen2" else 0
    assert sum(p.numel() for p in trained.values()) == 3 * (ADAPTED[kind] * width - narrow)
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(adapted.parameters(), 0.1)
    for _ in range(2):  # of the first step B alone has a gradient
        optimizer.zero_grad()
        outputs(adapted).square().mean().backward()
        optimizer.step()
    # In T5's decoder a query attends to itself alone: what makes the scores has no influence there.
    idle = {name for name in trained if "decoder" in name and "SelfAttention.q." in name}
    assert {name for name, p in trained.items() if p.grad.abs().max() < 1e-7} == idle
    for name, parameter in adapted.named_parameters():
        if name in frozen:
            assert parameter.grad is None and torch.equal(parameter, frozen[name])
    assert not torch.equal(outputs(adapted), outputs(plain))


@each_kind
def test_an_adapter_is_alpha_over_r_times_b_a(folders, kind):
    """Merged into the frozen weight by hand."""
    plain, adapted = build(kind, folders[kind]), build(kind, folders[kind], lora={"rank": 2, "alpha": 6.0})
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
        state = adapted.state_dict()
        merged = {}
        for name, value in state.items():
            if "lora_" in name:
                continue
            stem = name.removesuffix(".base_layer.weight")
            if stem != name:
                value = value + 3.0 * state[f"{stem}.lora_B.default.weight"] @ state[f"{stem}.lora_A.default.weight"]
            merged[name.replace(".base_layer", "")] = value
        plain.load_state_dict(merged, strict=True)
    torch.testing.assert_close(outputs(adapted), outputs(plain), atol=2e-5, rtol=1e-4)


def test_adapters_drop_out_in_training_only(folders):
    backbone = build("qwen2", folders["qwen2"], lora={"dropout": 0.5})
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    assert torch.equal(outputs(backbone), outputs(backbone))
    backbone.train()
    assert not torch.equal(outputs(backbone), outputs(backbone))


@each_kind
def test_adapters_go_where_they_are_wanted(folders, kind):
    target = {"t5": "wo", "qwen2": "down_proj"}[kind]
    backbone = build(kind, folders[kind], lora={"targets": [target]})
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained and all(f".{target}.lora_" in name for name in trained)
    with pytest.raises(ConfigError, match=r"lora\.targets: expected names among .*, got 'nowhere'"):
        build(kind, folders[kind], lora={"targets": [target, "nowhere"]})


@each_kind
def test_weights_in_bfloat16_under_adapters_in_float32(folders, kind):
    backbone = build(kind, folders[kind], lora={}, dtype="bfloat16")
    assert {(p.requires_grad, p.dtype) for p in backbone.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}
    exact, rounded = outputs(build(kind, folders[kind])), outputs(backbone)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.1 * exact.norm()
    rounded.square().sum().backward()


# Refusals.


def test_it_comes_from_somewhere():
    with pytest.raises(ConfigError, match="pretrained: expected a folder or a hub's name, or an architecture; got neither"):
        parse(get("set_backbone", "t5").Config, {"name": "t5"}, source="recipe")


def test_what_trains_is_float32():
    with pytest.raises(ConfigError, match="dtype: expected float32, since without lora"):
        parse(get("set_backbone", "t5").Config, {"pretrained": "t5-small", "dtype": "bfloat16"}, source="recipe")


@each_kind
def test_a_folder_without_a_model(tmp_path, kind):
    with pytest.raises(ComponentError, match=r"backbone\.pretrained: cannot load the model of .*nothing"):
        build(kind, tmp_path / "nothing", local_files_only=True)


@each_kind
def test_a_folder_without_weights(tmp_path, kind):
    config_of(kind).save_pretrained(tmp_path)
    with pytest.raises(ComponentError, match=r"backbone\.pretrained: cannot load the weights"):
        build(kind, tmp_path, **NO_PROMPT)


def test_a_folder_that_lacks_a_part(tmp_path):
    from transformers import T5EncoderModel

    T5EncoderModel(config_of("t5")).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"backbone\.pretrained: .* lacks \d+ weights, such as decoder\."):
        build("t5", tmp_path, **NO_PROMPT)


@each_kind
def test_a_prompt_without_a_tokenizer(tmp_path, kind):
    save(kind, tmp_path, with_tokenizer=False)
    with pytest.raises(
        (ComponentError, ConfigError), match=r"backbone\.(pretrained: cannot load the tokenizer|instruction: .* has no tokens)"
    ):
        build(kind, tmp_path)
    build(kind, tmp_path, **NO_PROMPT)
    build(kind, tmp_path, **TOKENS)
    cls = get("set_backbone", kind)
    with pytest.raises(ConfigError, match=r"backbone\.instruction: expected an empty text or instruction_tokens"):
        cls(parse(cls.Config, {"architecture": config_of(kind).to_dict()}, source="recipe"), 6)


@each_kind
def test_a_prompt_that_the_tokenizer_does_not_know(folders, kind):
    with pytest.raises(ConfigError, match=r"backbone\.response: .* has no tokens for 'λ'; expected another text, or response_tokens"):
        build(kind, folders[kind], response="λ")


@each_kind
def test_tokens_beyond_the_vocabulary(folders, kind):
    with pytest.raises(ConfigError, match=r"backbone\.pretrained: .* has 20 tokens; the prompt has token 20"):
        build(kind, folders[kind], response_tokens=[20])


@each_kind
def test_a_model_of_another_type(folders, kind):
    other = KINDS[1 - KINDS.index(kind)]
    with pytest.raises(ConfigError, match=rf"backbone\.pretrained: .*: expected a model of type '{kind}', got '{other}'"):
        build(kind, folders[other])
    cls = get("set_backbone", kind)
    with pytest.raises(ConfigError, match=rf"backbone\.architecture: expected a model of type '{kind}', got '{other}'"):
        cls(parse(cls.Config, {"architecture": config_of(other).to_dict(), **NO_PROMPT}, source="recipe"), 6)


@each_kind
def test_an_architecture_that_makes_no_sense(kind):
    cls = get("set_backbone", kind)
    architecture = {**config_of(kind).to_dict(), "num_hidden_layers": "many"}
    with pytest.raises(ConfigError, match=r"backbone\.architecture: cannot be built"):
        cls(parse(cls.Config, {"architecture": architecture, **NO_PROMPT}, source="recipe"), 6)


@pytest.mark.parametrize(("package", "module"), [("peft", lora), ("transformers", None)])
def test_a_package_that_is_not_installed(folders, monkeypatch, package, module):
    from recsys.retrieval.backbones import pretrained

    monkeypatch.setattr(module or pretrained, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(ComponentError, match=rf"needs {package}: install the extra \[text\]"):
        build("t5", folders["t5"], lora={})


def test_transformers_is_imported_when_a_backbone_is_built():
    check = (
        "import recsys.retrieval.models, recsys.retrieval.backbones, sys; print({'transformers', 'peft', 'accelerate'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
