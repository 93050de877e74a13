"""A language model as a transformers model: saving, loading, configuration, export, and errors a user can make."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import relative
from contract import STACKS, small_config, small_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from resonance_nn import RECIPES, ResonanceCache, ResonanceConfig, ResonanceForCausalLM, ResonanceModel
from resonance_nn.bench.models import check_causal
from resonance_nn.config import FORMAT_VERSION
from resonance_nn.mixers import MIXERS

stacks = pytest.mark.parametrize("mixers", STACKS.values(), ids=STACKS)


@stacks
def test_save_and_load(mixers: tuple[str, ...], tmp_path):
    model = small_model(mixers)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).mixers == mixers
    ids = torch.randint(0, 61, (1, 50))
    for auto in (AutoModelForCausalLM, ResonanceForCausalLM):
        loaded = auto.from_pretrained(tmp_path).eval()
        assert isinstance(loaded, ResonanceForCausalLM)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert loaded.lm_head.weight is loaded.model.embed.weight
    assert isinstance(AutoModel.from_pretrained(tmp_path), ResonanceModel)
    assert not list(tmp_path.glob("*.bin"))


def test_missing_weights_are_initialised_as_the_mixer_says(tmp_path):
    """from_pretrained fills what a file lacks from the mixers' own initial values, not from a normal distribution."""
    model = small_model(("spectral_gate", "resonance"))
    model.model.save_pretrained(tmp_path, state_dict={"embed.weight": model.model.embed.weight.clone()})
    loaded = ResonanceModel.from_pretrained(tmp_path)
    for block in loaded.backbone.blocks:
        for name, value in block.mixer.initial_values().items():
            assert relative(block.mixer.get_parameter(name), value.float()) < 1e-6
    assert relative(loaded.backbone.norm.weight, torch.ones(32)) == 0


def test_initial_loss_is_ln_v():
    model = ResonanceForCausalLM(ResonanceConfig.from_size("tiny", vocab_size=512, num_hidden_layers=2))
    ids = torch.randint(0, 512, (2, 200))
    assert abs(model(ids, labels=ids).loss.item() - math.log(512)) < 0.1


def test_untied_head_and_resized_vocabulary():
    model = small_model(("spectral_gate",), tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.embed.weight
    model.resize_token_embeddings(70)
    assert model(torch.tensor([[69, 3]])).logits.shape == (1, 2, 70)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixers": ("fourier",)}, "'fourier' is unknown; choose from resonance"),
        ({"num_heads": 5}, "num_heads = 5: must divide hidden_size = 32"),
        ({"vocab_size": 1}, "vocab_size = 1: must be an integer ≥ 2"),
        ({"hidden_size": 4}, "hidden_size = 4"),
        ({"dropout": 1.5}, "dropout = 1.5"),
        ({"filters": "all"}, "filters = 'all': must be 'head' or 'channel'"),
        ({"format_version": 99}, "upgrade"),
        ({"mixers": ()}, "one or more of"),
        ({"mixers": 5}, r"mixers = 5: must be names, such as \('spectral_gate',\)"),
        ({"modalities": 5}, r"modalities = 5: must be names, such as \('text', 'image'\)"),
        ({"modalities": [["text"]]}, "must be names"),
        ({"modalities": "smell"}, "must be one or more of text, image, audio"),
    ],
)
def test_config_errors(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        small_config(**{"mixers": ("spectral_gate",), **fields})
    with pytest.raises(ValueError, match="size = 'huge': must be one of tiny"):
        ResonanceConfig.from_size("huge")
    with pytest.raises(ValueError, match="no such field"):
        ResonanceConfig.from_size("tiny", hiden_size=3)
    with pytest.raises(ValueError, match="recipe = 'best': must be one of default"):
        ResonanceConfig.from_size("tiny", recipe="best")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe: str):
    config = ResonanceConfig.from_size("tiny", recipe=recipe, num_hidden_layers=2, hidden_size=32, num_heads=2)
    assert {name: getattr(config, name) for name in RECIPES[recipe]} == RECIPES[recipe]
    assert config.num_hidden_layers == 2
    check_causal(ResonanceForCausalLM(config), config.vocab_size)
    if recipe == "default":
        assert config.to_dict() == ResonanceConfig(num_hidden_layers=2, hidden_size=32, num_heads=2).to_dict()


def test_config_derives_from_the_overridden_width():
    config = ResonanceConfig.from_size("tiny", hidden_size=512)
    assert (config.num_heads, config.intermediate_size, config.num_modes) == (2, 2048, 64)
    assert config.shortest_context == 128
    spectral = ResonanceConfig.from_size("tiny", recipe="spectral", hidden_size=512)
    assert (spectral.num_heads, spectral.num_modes, spectral.shortest_context) == (8, 32, 4)
    both = ResonanceConfig(hidden_size=512, mixers=("spectral_gate", "holographic"))
    assert (both.num_heads, both.num_modes, both.shortest_context) == (8, 32, 4)
    assert ResonanceConfig(hidden_size=512, rotation="token").num_heads == 8  # half of the heads turn
    assert ResonanceConfig.from_size("tiny", hidden_size=512, mlp="swiglu").intermediate_size == 1408
    assert ResonanceConfig(num_attention_heads=6).num_heads == 6
    assert config.num_attention_heads == 2
    assert "attention" not in ResonanceConfig().mixers


def test_input_errors():
    model, ids = small_model(("spectral_gate",)), torch.randint(0, 61, (1, 5))
    with pytest.raises(ValueError, match="exactly one of"):
        model()
    with pytest.raises(ValueError, match="0 tokens"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 3\)"):
        model(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"reset of shape \(1, 4\)"):
        model(ids, reset=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"labels of shape \(5, 1\)"):
        model(ids, labels=ids.T)
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0]]), max_new_tokens=2)


def test_caches_of_other_models_are_refused(tmp_path):
    ids = torch.randint(0, 61, (1, 5))
    caches = {name: small_model((name,))(ids, use_cache=True).past_key_values for name in ("attention", "resonance")}
    for cache in caches.values():
        with pytest.raises(ValueError, match="use the cache with the model that made it"):
            small_model(("spectral_gate",))(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 states, this model has 3 blocks"):
        small_model(("resonance",), num_hidden_layers=3)(ids, past_key_values=caches["resonance"])
    ResonanceCache(2).save(tmp_path / "fresh")
    fresh, _ = ResonanceCache.load(tmp_path / "fresh")
    model = small_model(("attention",))
    assert torch.equal(model(ids, past_key_values=fresh).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@stacks
def test_half_precision_weights_keep_their_resonators(mixers: tuple[str, ...], dtype: torch.dtype, tmp_path):
    """Rounded frequencies and decays would be other filters: from_pretrained keeps them in float32."""
    small_model(mixers, initializer_range=0.1).save_pretrained(tmp_path)
    exact, half = (ResonanceForCausalLM.from_pretrained(tmp_path, dtype=d).eval() for d in (torch.float32, dtype))
    ids = torch.randint(0, 61, (1, 2000))
    with torch.no_grad():
        assert relative(half(ids).logits.float(), exact(ids).logits) < 0.05
    declared = {name for mixer in MIXERS.values() for name in mixer.float32_parameters}
    assert declared >= {"damping", "frequency", "gain", "phase", "step_bias", "step_proj", "energy"}
    for name, p in half.named_parameters():
        wide = not declared.isdisjoint(name.split("."))
        assert p.dtype == (torch.float32 if wide else dtype), name


def test_a_replaced_head_counts():
    """The loss is that of the logits the head computes, whatever wraps it."""
    model, ids = small_model(("spectral_gate",)), torch.randint(0, 61, (2, 30))

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    head = Doubled(32, 61, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert relative(model(ids, labels=ids).loss, expected) < 1e-5


def test_pickled_weights_are_not_loaded(tmp_path):
    model = small_model(("spectral_gate",))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for auto in (AutoModelForCausalLM, ResonanceForCausalLM):
        with pytest.raises(OSError, match="safetensors"):
            auto.from_pretrained(tmp_path)


def test_config_overrides_are_checked(tmp_path):
    small_config().save_pretrained(tmp_path)
    assert ResonanceConfig.from_pretrained(tmp_path, dropout=0.5, mixers=["attention"]).mixers == ("attention",)
    assert ResonanceConfig.from_pretrained(tmp_path, num_attention_heads=4).num_heads == 4
    for wrong in ({"num_heads": 5}, {"dropout": 3.0}, {"mixers": ["nope"]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ResonanceConfig.from_pretrained(tmp_path, **wrong)
    for wrong in ({"dropout": "0.1"}, {"format_version": "x"}, {"mixers": 5}, {"z_loss_weight": math.inf}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ResonanceConfig(**wrong)
    with pytest.raises(ValueError, match="one field; give one"):
        ResonanceConfig(hidden_size=32, num_heads=2, num_attention_heads=4)


def test_export_with_and_without_a_mask():
    """torch.export takes every causal stack, padding included, and computes the same."""
    ids, mask = torch.randint(0, 61, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    for mixers in STACKS.values():
        model = small_model(mixers)
        for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
            with torch.no_grad():
                exported = torch.export.export(model, (), kwargs={**inputs, "use_cache": False})
                result = exported.module()(**inputs, use_cache=False)
                assert relative(result.logits, model(**inputs).logits) < 1e-5


@pytest.mark.parametrize(("mixer", "rotation"), [("spectral_gate", "step"), ("holographic", "none")])
def test_configurations_of_format_1_keep_their_meaning(mixer: str, rotation: str, tmp_path):
    """What had no field then, or was left to the mixer, is what it was; a later save is of the present format."""
    common = {"mlp": "swiglu", "activate_values": True, "rotation": rotation, "num_groups": 2, "key_groups": None}
    config = small_config((mixer,), **common)
    model = ResonanceForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    old = {k: v for k, v in saved.items() if k not in ("mlp", "activate_values", "key_groups")}
    old["rotation"] = None
    (tmp_path / "config.json").write_text(json.dumps(old | {"format_version": 1}))
    loaded = ResonanceForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 61, (1, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.config.format_version, loaded.config.rotation) == (FORMAT_VERSION, rotation)


def test_gates_of_format_3_are_silu(tmp_path):
    config = small_config(("holographic",), output_gate="silu", initial_recall=0.0, shortest_context=4)
    model = ResonanceForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    old = {k: v for k, v in saved.items() if k not in ("output_gate", "initial_recall", "shortest_context")}
    (tmp_path / "config.json").write_text(json.dumps(old | {"format_version": 3}))
    loaded = ResonanceForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 61, (1, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.shortest_context == 4


def test_keys_of_format_2_are_a_heads_own(tmp_path):
    model = ResonanceForCausalLM(small_config(("holographic",), key_groups=None)).eval()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["key_groups"]
    (tmp_path / "config.json").write_text(json.dumps(saved | {"format_version": 2}))
    loaded = ResonanceForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 61, (1, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.format_version == FORMAT_VERSION


def test_a_configuration_of_format_1_that_meant_two_things_is_refused():
    old = {"format_version": 1, "mixers": ["spectral_gate", "holographic"], "rotation": None}
    with pytest.raises(ValueError, match="which one field cannot say"):
        ResonanceConfig.from_dict(old)
    assert ResonanceConfig.from_dict({"format_version": 1}).rotation == "step"


def test_loaded_weights_lie_as_new_ones_do(tmp_path):
    """Those of a mapped file begin anywhere, where some CPUs' kernels round otherwise."""
    config = ResonanceConfig.from_size("tiny", vocab_size=61, num_hidden_layers=1, hidden_size=32, num_heads=2)
    ResonanceForCausalLM(config).double().save_pretrained(tmp_path)
    loaded = ResonanceForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert not [name for name, tensor in loaded.state_dict().items() if tensor.data_ptr() % 64]
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    model, told = ResonanceForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert model.config.vocab_size == 61
