"""What is encoded ahead equals what is encoded live, and survives a kill. Encoders: the shapes base."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from core.failures import DataError
from core.recipe import ConfigError
from models.components import load_vae
from models.latents import encode_images
from models.text import SD3TextEncoder
from pretrain.data.cache import fill_cache, main, read_data
from pretrain.data.config import CacheConfig, Resolution
from pretrain.data.encode import ShardEncoder
from pretrain.data.stream import BatchStream
from tests.pretrain.data.data_files import (
    config_of,
    edit_members,
    shapes_source,
    t2i_members,
    tar_source,
    write_tar,
)

ROOT = Path(__file__).parents[3]
BASE = ROOT / "recipes" / "shapes" / "base"


def encoded_config(tmp_path, *sources, **keys):
    cache = CacheConfig(
        latents=True, text=True, vae=str(BASE), text_encoders=str(BASE), max_sequence_length=12,
        text_dtype="float32", batch_size=4, samples_per_shard=8,
    )  # fmt: skip
    return config_of(tmp_path, *sources, **({"cache": cache} | keys))


def live(config, **cache):
    return replace(config, cache=replace(config.cache, **({"latents": False, "text": False} | cache)))


@pytest.fixture(scope="module")
def vae():
    return load_vae(BASE)


@pytest.fixture(scope="module")
def text_encoder():
    return SD3TextEncoder.from_pretrained(BASE, dtype=torch.float32, device="cpu", max_sequence_length=12)


def streams(*configs):
    return [BatchStream(config, seed=0, batch_size=4) for config in configs]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pictures of two shapes, one broken behind its header, and edits; at two resolutions; encoded."""
    tmp_path = tmp_path_factory.mktemp("encoded")
    members = t2i_members(9) | t2i_members(9, first=9, size=(80, 45))
    members["0004.png"] = members["0004.png"][: len(members["0004.png"]) // 2]
    members["0005.json"] = b'{"long": "a red circle"}'
    t2i = tar_source("t2i", write_tar(tmp_path / "t2i.tar", members), captions=["caption", "long"])
    edit = tar_source("edit", write_tar(tmp_path / "edit.tar", edit_members(9)))
    config = encoded_config(
        tmp_path,
        t2i,
        edit,
        resolution=[Resolution(until_step=8, side=32), Resolution(side=40)],
        prompt_dropout=0.3,
        reference_images=True,
        max_corrupt_share=0.1,
    )
    assert fill_cache(config, workers=1) == (3 + 2) * 3  # shards of 8; two sizes and texts
    return config


def test_cached_batches_equal_live_ones(files, vae, text_encoder):
    cached, plain = streams(files, live(files))
    for step in range(16):
        ahead, now = cached.batch(step), plain.batch(step)
        assert (ahead.task, ahead.height, ahead.width) == (now.task, now.height, now.width)
        assert ahead.prompts == now.prompts
        assert "caption 4" not in ahead.prompts  # broken: replaced by the same sample in both
        assert ahead.pixels is ahead.references is now.latents is now.prompt_embeds is None
        torch.testing.assert_close(ahead.latents, encode_images(vae, now.pixels), rtol=0, atol=1e-5)
        if ahead.task == "edit":
            references = encode_images(vae, now.references)
            torch.testing.assert_close(ahead.reference_latents, references, rtol=0, atol=1e-5)
            assert [p.tobytes() for p in ahead.reference_images] == [
                p.tobytes() for p in now.reference_images
            ]
        else:
            assert ahead.reference_latents is None
        embeds = text_encoder.encode(now.prompts)
        assert torch.equal(ahead.prompt_embeds, torch.stack([e.prompt_embeds for e in embeds]))
        assert torch.equal(ahead.pooled_prompt_embeds, torch.stack([e.pooled_prompt_embeds for e in embeds]))
    assert cached.skipped == plain.skipped == 1


def test_each_of_latents_and_texts_can_be_cached_alone(files):
    only_latents, only_text = streams(live(files, latents=True), live(files, text=True))
    batch = only_latents.batch(1)
    assert batch.latents is not None
    assert batch.prompt_embeds is batch.query_states is None
    batch = only_text.batch(1)
    assert batch.pixels is not None
    assert batch.latents is None
    assert batch.prompt_embeds is not None


def test_the_empty_prompt_is_cached_too(files, text_encoder):
    (stream,) = streams(files)
    batch = stream.batch(0, prompt_dropout=1.0)
    (expected,) = text_encoder.encode([""])
    assert set(batch.prompts) == {""}
    assert all(torch.equal(embeds, expected.prompt_embeds) for embeds in batch.prompt_embeds)
    assert all(torch.equal(pooled, expected.pooled_prompt_embeds) for pooled in batch.pooled_prompt_embeds)


def test_other_encoders_settings_or_data_have_shards_of_their_own(files, tmp_path):
    encoder = ShardEncoder(files)
    latents, text = encoder.jobs()[0], encoder.jobs()[-1]
    for change, moved in (
        ({"cache": replace(files.cache, max_sequence_length=8)}, (False, True)),
        ({"cache": replace(files.cache, text_dtype="bfloat16")}, (False, True)),
        ({"multiple": 16}, (True, False)),
        ({"aspect_buckets": False}, (True, False)),
        ({"cache": replace(files.cache, samples_per_shard=4)}, (True, True)),
        ({"prompt_dropout": 0.5}, (False, False)),
    ):
        other = ShardEncoder(replace(files, **change))
        assert (other.path(latents) != encoder.path(latents), other.path(text) != encoder.path(text)) == moved
    assert "latents-" in str(encoder.path(latents))
    copy = tmp_path / "vae"
    copy.mkdir()
    for file in (BASE / "vae").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    same = replace(files, cache=replace(files.cache, vae=str(tmp_path)))
    assert ShardEncoder(same).path(latents) == encoder.path(latents)
    weights = next(copy.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert ShardEncoder(same).path(latents) != encoder.path(latents)


def test_missing_shards_are_told_with_the_command_that_makes_them(tmp_path):
    config = encoded_config(tmp_path, shapes_source("t2i", 20))
    with pytest.raises(
        DataError, match=r"3 of 3 shards are not encoded yet.*python -m pretrain\.data\.cache RECIPE"
    ):
        streams(config)
    gone = replace(config, cache=replace(config.cache, vae=str(tmp_path)))
    with pytest.raises(DataError, match=r"vae: no such part of a model"):
        streams(gone)


def write_recipe(path, config):
    """A trainer's recipe, of which the command reads the data alone."""
    sources = [{"kind": s.kind, "task": s.task, "samples": s.samples} for s in config.sources]
    data = {
        "sources": sources, "edit_share": config.edit_share, "multiple": 8, "resolution": [{"side": 32}],
        "cache_dir": config.cache_dir, "cache": vars(config.cache),
    }  # fmt: skip
    path.write_text(yaml.safe_dump({"stage": "kontext", "steps": 5, "data": data}))
    return path


def test_a_killed_run_is_started_again_and_ends_with_the_shards_of_a_straight_one(
    tmp_path, worker_server, monkeypatch
):
    """Killed; then gone on with in two parts. The straight run is one of two processes."""
    config = encoded_config(tmp_path, shapes_source("t2i", 30), shapes_source("edit", 30))
    config.cache.samples_per_shard = 2
    recipe = write_recipe(tmp_path / "recipe.yaml", config)
    folder = Path(config.cache_dir) / "encoded"
    words = [sys.executable, "-m", "pretrain.data.cache", str(recipe)]
    worker_server.start()
    for name, value in worker_server.commands("pretrain.data.cache").items():
        monkeypatch.setenv(name, value)
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(words, cwd=ROOT, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + 300
        while not list(folder.rglob("*.safetensors")) and process.poll() is None:
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.wait(120)
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    encoder = ShardEncoder(config)
    assert 0 < len(kept) < len(encoder.jobs()) == 4 * 15
    assert main([str(recipe), "--part", "0/2"]) == main([str(recipe), "--part", "1/2"]) == 0
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert not list(folder.rglob("*.partial"))
    straight = replace(config, cache_dir=str(tmp_path / "straight"))
    assert fill_cache(straight, workers=2) == 4 * 15
    assert fill_cache(straight, workers=2) == 0
    straight_encoder = ShardEncoder(straight)
    for job in encoder.jobs():
        one, other = load_file(encoder.path(job)), load_file(straight_encoder.path(job))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            # Matrix products of two processes may differ in their last bits, also on one machine.
            atol = 1e-5 if tensor.is_floating_point() else 0
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=atol)


def test_too_many_broken_samples_are_named_and_stop_the_command(tmp_path, caplog):
    members = t2i_members(4, size=(60, 60))
    members["0002.png"] = members["0002.png"][: len(members["0002.png"]) // 2]
    config = encoded_config(tmp_path, tar_source("t2i", write_tar(tmp_path / "a.tar", members)))
    with pytest.raises(DataError, match=r"1 of 4 samples are corrupt, above data.max_corrupt_share=0.01"):
        fill_cache(config, workers=1)
    assert "a.tar: 0002: image is unreadable" in caplog.text


def test_the_command_reads_the_data_of_any_recipe_strictly(tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", encoded_config(tmp_path, shapes_source("t2i", 8)))
    data = read_data(recipe, ["data.cache.samples_per_shard=5", "steps=9"])
    assert data.cache.samples_per_shard == 5
    assert data.sources[0].samples == 8
    with pytest.raises(ConfigError) as caught:
        read_data(recipe, ["data.sources.0.wieght=2", "data.cache.vea=x", "dta.multiple=8"])
    for near in ("'data.sources[0].weight'", "'data.cache.vae'", "'data'"):
        assert f"did you mean {near}?" in str(caught.value)
    kontext = read_data("recipes/pretrain_kontext_sd35m.yaml", ["data.cache.latents=true"])
    assert [source.task for source in kontext.sources] == ["t2i", "edit"]
    assert main([str(recipe), "data.multiple=0"]) == 2
    assert "data.multiple=0 must be at least 1" in capsys.readouterr().err
    assert main([str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(recipe), "--part", "4/4"])
    assert "write it as 0/4 to 3/4" in capsys.readouterr().err
