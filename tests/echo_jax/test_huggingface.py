"""Checkpoints both ways: key styles, shards, round trips, full sizes, and everything that must be refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForMultimodalLM,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from echo_jax import huggingface, huggingface_tensors
from echo_jax.arrays import init_params, is_spec
from echo_jax.model import thinker
from echo_jax.model.config import AudioConfig, TextConfig, ThinkerConfig
from tests import parity

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, Qwen2_5OmniThinkerForConditionalGeneration]:
    """A thinker as transformers saves it, and the model itself."""
    directory = tmp_path_factory.mktemp("reference")
    model = parity.reference_model(parity.CASES[0])
    model.save_pretrained(directory)
    return directory, model


@pytest.fixture
def checkpoint(reference, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(reference[0], tmp_path / "checkpoint"))


def small_config(tied: bool = False) -> ThinkerConfig:
    return ThinkerConfig(
        audio=AudioConfig(num_layers=2, d_model=24, num_heads=3, ffn_dim=20, output_dim=28),
        text=TextConfig(
            vocab_size=64,
            hidden_size=28,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=10,
            ffn_dim=36,
            tie_embeddings=tied,
        ),
        im_start_id=0,
        im_end_id=1,
        audio_token_id=2,
        audio_bos_id=3,
        audio_eos_id=4,
        pad_id=5,
    )


def random_params(config: ThinkerConfig):
    return init_params(thinker.param_specs(config), jax.random.key(0))


def assert_same_bits(tree, other) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def edit(checkpoint: Path, change) -> None:
    file = checkpoint / "model.safetensors"
    stored = load_file(file)
    change(stored)
    save_file(stored, file)


# ---------------------------------------------------------------------------------------- both ways


def test_round_trip_keeps_every_bit(reference, tmp_path):
    directory, _ = reference
    config, params = huggingface.load_pretrained(directory)
    huggingface.save_pretrained(tmp_path, config, params)
    config_again, params_again = huggingface.load_pretrained(tmp_path)
    assert_same_bits(params, params_again)
    assert dataclasses.replace(config_again, vision_json=config.vision_json) == config
    ours, theirs = (
        load_file(tmp_path / "model.safetensors"),
        load_file(directory / "model.safetensors"),
    )
    assert set(ours) == {key for key in theirs if not key.startswith("visual.")}
    for key, array in ours.items():
        np.testing.assert_array_equal(array, theirs[key], err_msg=key)


@pytest.mark.parametrize("case", parity.CASES[:2], ids=lambda case: case.name)
@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
def test_transformers_loads_what_we_save(case, max_shard_bytes, tmp_path):
    model = parity.reference_model(case)
    model.save_pretrained(tmp_path / "theirs")
    config, params = huggingface.load_pretrained(tmp_path / "theirs")
    ours = huggingface.save_pretrained(
        tmp_path / "ours", config, params, max_shard_bytes=max_shard_bytes
    )
    assert (ours / INDEX).exists() == (max_shard_bytes < 2**30)

    again, info = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        ours, output_loading_info=True
    )
    assert all(".visual." in key for key in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    tokens = torch.arange(6, 40)[None]
    audio = torch.randn(1, case.mels, 330, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 330, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=tokens).logits, model(input_ids=tokens).logits)
        heard, expected = (
            m.get_audio_features(audio, feature_attention_mask=mask).pooler_output
            for m in (again, model)
        )
    assert torch.equal(heard, expected)


def test_our_own_configuration_loads_in_transformers(tmp_path):
    """Without a config.json of theirs to start from, through the Auto classes, with the same logits."""
    config = small_config(tied=True)
    params = random_params(config)
    huggingface.save_pretrained(tmp_path, config, params)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), Qwen2_5OmniThinkerConfig)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert (extractor.feature_size, extractor.n_samples) == (128, 300 * 16_000)
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path).eval()
    assert isinstance(model, Qwen2_5OmniThinkerForConditionalGeneration)
    assert model.generation_config.eos_token_id == config.im_end_id

    tokens = np.random.default_rng(0).integers(6, 64, size=(2, 9)).astype(np.int32)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
    ours = np.asarray(thinker.forward(config, params, tokens))
    assert parity.relative_error(ours, expected) < 1e-4
    assert huggingface.load_pretrained(tmp_path)[0] == config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(dtype, tmp_path):
    config = small_config()
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(config))
    huggingface.save_pretrained(tmp_path, config, params)
    assert_same_bits(huggingface.load_pretrained(tmp_path, dtype=np.dtype(dtype))[1], params)
    widened = huggingface.load_pretrained(tmp_path)[1]
    assert_same_bits(widened, jax.tree.map(lambda x: np.asarray(x, np.float32), params))
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path)
    assert model.lm_head.weight.dtype == getattr(torch, dtype)


def test_a_whole_omni_checkpoint_loads(checkpoint):
    """Prefixed keys, parts that the thinker does not need, sizes below thinker_config; sharded."""
    _, expected = huggingface.load_pretrained(checkpoint)
    stored = {f"thinker.{key}": a for key, a in load_file(checkpoint / "model.safetensors").items()}
    stored["talker.codec_head.weight"] = np.zeros((2, 3), np.float32)
    stored["token2wav.code2wav_dit_model.x"] = np.zeros(3, np.float32)
    (checkpoint / "model.safetensors").unlink()
    write_shards(checkpoint, stored, shards=3)
    config_file = checkpoint / "config.json"
    thinker_config = json.loads(config_file.read_text())
    config_file.write_text(
        json.dumps({"model_type": "qwen2_5_omni", "thinker_config": thinker_config})
    )
    assert_same_bits(huggingface.load_pretrained(checkpoint)[1], expected)


def test_shards_without_thinker_tensors_need_not_be_there(checkpoint):
    _, expected = huggingface.load_pretrained(checkpoint)
    stored = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    write_shards(checkpoint, stored, shards=2)
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"]["talker.codec_head.weight"] = "model-9.safetensors"
    (checkpoint / INDEX).write_text(json.dumps(index))
    assert_same_bits(huggingface.load_pretrained(checkpoint)[1], expected)


def write_shards(directory: Path, stored: dict[str, np.ndarray], shards: int) -> None:
    weight_map = {}
    for number in range(shards):
        part = dict(list(stored.items())[number::shards])
        save_file(part, directory / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_saving_again_leaves_nothing_stale(tmp_path):
    config = small_config()
    params = random_params(config)
    huggingface.save_pretrained(tmp_path, config, params, max_shard_bytes=5_000)
    huggingface.save_pretrained(tmp_path, config, params)
    assert {file.name for file in tmp_path.glob("model*")} == {"model.safetensors"}
    huggingface.save_pretrained(tmp_path, config, params, max_shard_bytes=50_000)
    assert_same_bits(huggingface.load_pretrained(tmp_path)[1], params)
    sizes = [file.stat().st_size for file in tmp_path.glob("model-*.safetensors")]
    assert max(sizes) < 60_000


def test_an_interrupted_save_is_not_a_model(tmp_path):
    class Tokenizer:
        def save(self, directory: Path) -> None:
            assert (directory / "model.safetensors").exists()
            raise KeyboardInterrupt

    config = small_config()
    params = random_params(config)
    huggingface.save_pretrained(tmp_path, config, params)
    with pytest.raises(KeyboardInterrupt):
        huggingface.save_pretrained(tmp_path, config, params, Tokenizer())
    with pytest.raises(FileNotFoundError, match="holds no model"):
        huggingface.load_pretrained(tmp_path)


def test_the_tokenizer_is_saved_with_the_model(tmp_path):
    class Tokenizer:
        def save(self, directory: Path) -> None:
            (directory / "tokenizer.json").write_text("{}")

    config = small_config()
    huggingface.save_pretrained(tmp_path, config, random_params(config), tokenizer=Tokenizer())
    assert (tmp_path / "tokenizer.json").exists()


# ---------------------------------------------------------------------------------------- full size


@pytest.mark.parametrize("preset", ["qwen2.5-omni-7b", "qwen2.5-omni-3b"])
def test_every_array_of_the_released_sizes_has_its_tensor(preset):
    """Both ways, on abstract shapes: no weights are made."""
    config = ThinkerConfig.preset(preset)
    with torch.device("meta"):
        model = Qwen2_5OmniThinkerForConditionalGeneration(
            Qwen2_5OmniThinkerConfig(**config.to_hf())
        )
    theirs = {
        name_on_disk(key): tuple(array.shape)
        for key, array in model.state_dict().items()
        if not key.startswith("model.visual.")
    }
    ours = {
        key: tensor.shape_on_disk for key, tensor in huggingface_tensors.tensors(config).items()
    }
    assert ours == theirs
    # The other way: the tensors of a leaf fill it exactly.
    leaves = jax.tree_util.tree_flatten_with_path(thinker.param_specs(config), is_leaf=is_spec)[0]
    for path, spec in leaves:
        keys = tuple(entry.key for entry in path)
        layers = [t for t in huggingface_tensors.tensors(config).values() if t.path == keys]
        stacked = layers[0].layer is not None
        assert [t.layer for t in layers] == (list(range(spec.shape[0])) if stacked else [None])
        for tensor in layers:
            assert (
                (len(layers), *tensor.shape) == spec.shape
                if stacked
                else tensor.shape == spec.shape
            )


def name_on_disk(key: str) -> str:
    """transformers' name in memory -> its name in a file."""
    for prefix, on_disk in (
        ("model.audio_tower.", "audio_tower."),
        ("model.language_model.", "model."),
    ):
        if key.startswith(prefix):
            return on_disk + key.removeprefix(prefix)
    return key


def test_released_sizes():
    """Parameter counts, against the sizes the checkpoints are known by."""
    seven = huggingface_tensors.tensors(ThinkerConfig.preset("qwen2.5-omni-7b"))
    assert seven["lm_head.weight"].shape_on_disk == (152_064, 3584)
    assert seven["model.layers.27.self_attn.k_proj.weight"].shape_on_disk == (512, 3584)
    assert seven["audio_tower.conv1.weight"].shape_on_disk == (1280, 128, 3)
    three = huggingface_tensors.tensors(ThinkerConfig.preset("qwen2.5-omni-3b"))
    assert three["audio_tower.proj.weight"].shape_on_disk == (2048, 1280)
    assert "model.layers.35.mlp.down_proj.weight" in three


# ---------------------------------------------------------------------------------------- refusals


def test_a_missing_tensor_is_named(checkpoint):
    edit(checkpoint, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"missing.*model\.layers\.1\.mlp\.up_proj\.weight"):
        huggingface.load_pretrained(checkpoint)


@pytest.mark.parametrize(
    "key", ["model.layers.3.mlp.up_proj.weight", "audio_tower.extra", "thinker.talker.x", "x"]
)
def test_an_unknown_tensor_is_named(checkpoint, key):
    edit(checkpoint, lambda t: t.update({key: np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match=f"unknown tensor {key}"):
        huggingface.load_pretrained(checkpoint)


def test_a_tensor_in_both_key_styles_is_named(checkpoint):
    edit(checkpoint, lambda t: t.update({"thinker.model.norm.weight": t["model.norm.weight"]}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is present twice"):
        huggingface.load_pretrained(checkpoint)


def test_a_tensor_in_two_shards_is_named(checkpoint):
    stored = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    write_shards(checkpoint, stored, shards=2)
    with safe_open(checkpoint / "model-0.safetensors", "numpy") as file:
        twice = next(key for key in file.keys() if key.startswith("model."))  # noqa: SIM118
    second = checkpoint / "model-1.safetensors"
    save_file({**load_file(second), twice: stored[twice]}, second)
    with pytest.raises(ValueError, match=f"{twice} is present twice.*model-0.*model-1"):
        huggingface.load_pretrained(checkpoint)


def test_a_wrong_shape_is_named_with_both_shapes(checkpoint):
    key = "model.layers.0.self_attn.k_proj.weight"
    edit(checkpoint, lambda t: t.update({key: t[key][:, :-1].copy()}))
    with pytest.raises(ValueError, match=rf"{key} has shape \(32, 79\).*\(32, 80\)"):
        huggingface.load_pretrained(checkpoint)


def test_a_head_beside_tied_embeddings_is_refused(checkpoint):
    content = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**content, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"lm_head\.weight.*tie_word_embeddings"):
        huggingface.load_pretrained(checkpoint)


def test_a_missing_shard_and_a_wrong_index_are_named(checkpoint):
    stored = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        huggingface.load_pretrained(checkpoint)
    write_shards(checkpoint, stored, shards=2)
    second = load_file(checkpoint / "model-1.safetensors")
    gone = sorted(second)[0]
    save_file(
        {key: a for key, a in second.items() if key != gone}, checkpoint / "model-1.safetensors"
    )
    with pytest.raises(ValueError, match=f"model-1.safetensors lacks {gone}"):
        huggingface.load_pretrained(checkpoint)
    (checkpoint / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1\.safetensors is missing"):
        huggingface.load_pretrained(checkpoint)
    (checkpoint / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        huggingface.load_pretrained(checkpoint)


def test_a_broken_file_is_named(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable"):
        huggingface.load_pretrained(checkpoint)


@pytest.mark.parametrize(
    "content",
    ["[]", "3", "{", '{"thinker_config": null}', '{"audio_config": [], "text_config": []}', "{}"],
)
def test_a_config_that_is_none_is_named(checkpoint, content):
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"checkpoint/config\.json (is not|has no)"):
        huggingface.load_pretrained(checkpoint)


def test_a_word_where_a_number_belongs_is_named(checkpoint):
    content = json.loads((checkpoint / "config.json").read_text())
    content["text_config"]["num_attention_heads"] = "four"
    (checkpoint / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"checkpoint/config\.json is damaged"):
        huggingface.load_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("text_config", "use_sliding_window", True),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
        ("audio_config", "activation_function", "relu"),
    ],
)
def test_settings_that_we_do_not_compute_are_refused(checkpoint, section, field, value):
    content = json.loads((checkpoint / "config.json").read_text())
    content[section][field] = value
    (checkpoint / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json.*not supported"):
        huggingface.load_pretrained(checkpoint)


def test_saving_a_wrong_tree_is_refused(tmp_path):
    config = small_config()
    params = random_params(config)
    del params["audio_tower"]["proj"]["bias"]
    with pytest.raises(ValueError, match="lacks array audio_tower/proj/bias"):
        huggingface.save_pretrained(tmp_path, config, params)
    params = random_params(config)
    params["language_model"]["final_norm"]["scale"] = np.zeros(5, np.float32)
    with pytest.raises(ValueError, match=r"final_norm/scale has shape \(5,\).*\(28,\)"):
        huggingface.save_pretrained(tmp_path, config, params)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- finding


def test_resolve_takes_a_model_or_a_finished_workdir(tmp_path):
    export = tmp_path / "workdir" / "export"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    assert huggingface.resolve(export) == export
    assert huggingface.resolve(tmp_path / "workdir") == export


def test_resolve_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        huggingface.resolve(tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(FileNotFoundError, match="is a file"):
        huggingface.resolve(file)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        huggingface.resolve(tmp_path / "nowhere")


def test_an_unreachable_repository_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nobody/nothing: no such directory, and") as info:
        huggingface.resolve("nobody/nothing")
    assert "\n" not in str(info.value)
