"""What a VLM was shown ahead trains as what it is shown live, and then no VLM is loaded."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from core.cluster.ranks import LocalRank
from models.metaquery.conditioner import MetaQueryConditioner
from models.metaquery.reading import QueryReader
from pretrain.data.cache import fill_cache
from pretrain.data.config import CacheConfig, Resolution
from pretrain.data.encode import ShardEncoder
from pretrain.data.stream import BatchStream
from pretrain.flow.config import ConnectorSection
from pretrain.flow.model import conditioner_config
from pretrain.flow.plan import describe
from pretrain.flow.previews import draw_previews
from pretrain.flow.rank import FlowRank
from tests.pretrain.data.data_files import config_of, edit_members, t2i_members, tar_source, write_tar
from tests.pretrain.flow.flow_runs import CONNECTOR, flow_recipe


@pytest.fixture(scope="module")
def reader(tiny_vlm):
    return QueryReader.from_pretrained(tiny_vlm)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, tiny_model, reader):
    """A folder with the conditioner whose queries are read."""
    from models.components import load_transformer

    folder = tmp_path_factory.mktemp("aligned")
    shape = load_transformer(tiny_model, dtype=torch.float32).config
    torch.manual_seed(5)
    config = conditioner_config(ConnectorSection(**CONNECTOR), reader.hidden_size, shape)
    MetaQueryConditioner(config).save_pretrained(folder / "conditioner")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_vlm, aligned):
    """Pictures with captions, edits of which one is broken behind its header, at two resolutions."""
    folder = tmp_path_factory.mktemp("files")
    members = edit_members(9)
    members["0003.source.png"] = members["0003.source.png"][: len(members["0003.source.png"]) // 2]
    config = config_of(
        folder,
        tar_source("t2i", write_tar(folder / "t2i.tar", t2i_members(6))),
        tar_source("edit", write_tar(folder / "edit.tar", members)),
        resolution=[Resolution(until_step=6, side=32), Resolution(side=48)],
        prompt_dropout=0.3,
        reference_images=True,
        max_corrupt_share=0.2,
        cache=CacheConfig(
            queries=True, vlm=str(tiny_vlm), conditioner=str(aligned), text_dtype="float32", batch_size=4,
            samples_per_shard=5,
        ),
    )  # fmt: skip
    # Two shards of texts; two of edits at each of two sizes.
    assert fill_cache(config, workers=1) == 2 + 2 * 2
    return config


def live(config):
    return replace(config, cache=replace(config.cache, queries=False))


def states_of(reader, aligned, batch):
    queries = MetaQueryConditioner.from_pretrained(aligned / "conditioner").meta_queries
    with torch.no_grad():
        return reader.hidden_states(
            queries, batch.prompts, batch.reference_images and [[one] for one in batch.reference_images]
        )


@pytest.mark.parametrize("dropout", [None, 1.0])
def test_cached_states_equal_those_of_the_vlm(files, reader, aligned, dropout):
    cached, plain = (BatchStream(config, seed=0, batch_size=4) for config in (files, live(files)))
    tasks = set()
    for step in range(12):
        ahead = cached.batch(step, prompt_dropout=dropout)
        now = plain.batch(step, prompt_dropout=dropout)
        assert ahead.prompts == now.prompts
        assert "instruction 3" not in ahead.prompts
        assert now.query_states is None
        torch.testing.assert_close(ahead.query_states, states_of(reader, aligned, now), rtol=1e-5, atol=1e-5)
        tasks.add((ahead.task, ahead.width))
    assert tasks == {("t2i", 32), ("edit", 32), ("t2i", 48), ("edit", 48)}


def test_a_text_alone_is_kept_once_and_an_edit_with_its_empty_prompt(files):
    encoder = ShardEncoder(files)
    shards = {job: load_file(encoder.path(job)) for job in encoder.jobs()}
    for job, shard in shards.items():
        if job.area:
            whole = int((shard["rows"][:, 0] >= 0).sum())
            assert shard["states"].shape[0] == 2 * whole
            assert shard["rows"][:, 0].unique().numel() == len(shard["rows"])
        else:
            assert set(shard["rows"][:, 0].tolist()) == {0}
            assert shard["states"].shape[0] == 1 + len(shard["rows"])


def test_a_caption_that_the_vlm_refuses_is_named_and_left_out(files, tmp_path, caplog):
    members = t2i_members(6) | {"0002.txt": b"a cat<|im_end|>"}
    source = tar_source("t2i", write_tar(tmp_path / "t2i.tar", members))
    config = replace(
        config_of(tmp_path, source, cache=files.cache), max_corrupt_share=0.2, reference_images=False
    )
    assert fill_cache(config, workers=1) == 2
    assert "t2i.tar: 0002" in caplog.text and "control tokens of the VLM: <|im_end|>" in caplog.text
    stream = BatchStream(config, seed=0, batch_size=4)
    shown = {prompt for step in range(6) for prompt in stream.batch(step).prompts}
    assert shown == {f"caption {number}" for number in (0, 1, 3, 4, 5)}
    assert stream.skipped == 1


def test_training_with_the_vlm_leaves_out_a_caption_that_it_refuses(tmp_path, tiny_model, tiny_vlm, caplog):
    """It must not end a run that has trained for a day; the sample is that which the cache leaves out."""
    path = write_tar(tmp_path / "t2i.tar", t2i_members(6) | {"0002.txt": b"a cat<|im_end|>"})
    source = {"kind": "webdataset", "task": "t2i", "paths": [str(path)]}
    recipe = flow_recipe(
        tmp_path, tiny_model, f"data.sources=[{json.dumps(source)}]", "data.edit_share=0",
        "data.max_corrupt_share=0.2", f"data.cache_dir={tmp_path / 'cache'}", vlm=tiny_vlm,
    )  # fmt: skip
    rank = LocalRank(partial(FlowRank, recipe)).rank
    figures = rank.advance(4)
    assert len(figures) == 4 and all(len(figure.losses) == 4 for figure in figures)
    assert rank.stream.skipped == 1
    assert "t2i.tar: 0002" in caplog.text and "control tokens of the VLM: <|im_end|>" in caplog.text


def test_what_changes_the_states_changes_where_they_are(files, aligned, tmp_path):
    path = ShardEncoder(files).path(ShardEncoder(files).jobs()[0])
    other = MetaQueryConditioner.from_pretrained(aligned / "conditioner")
    with torch.no_grad():
        other.meta_queries[0, 0] += 1
    other.save_pretrained(tmp_path / "conditioner")
    for change in (
        {"position_mode": "mrope"}, {"show_references": False}, {"text_dtype": "bfloat16"},
        {"conditioner": str(tmp_path)},
    ):  # fmt: skip
        moved = ShardEncoder(replace(files, cache=replace(files.cache, **change)))
        assert moved.path(moved.jobs()[0]) != path
    same = ShardEncoder(replace(files, prompt_dropout=0.0))
    assert same.path(same.jobs()[0]) == path


def test_training_on_cached_states_is_training_with_the_vlm_and_holds_none(
    tmp_path, tiny_model, tiny_vlm, aligned
):
    """Connector and transformer learn, queries do not; guided grids are drawn of the cache as well."""
    cache = [
        "data.cache.queries=true", f"data.cache_dir={tmp_path / 'cache'}", f"data.cache.vlm={tiny_vlm}",
        f"data.cache.conditioner={aligned}", "data.cache.text_dtype=float32",
    ]  # fmt: skip
    common = ["train.queries=false", f"model.conditioner={aligned}"]
    ahead = flow_recipe(tmp_path / "ahead", tiny_model, *common, *cache, vlm=tiny_vlm)
    now = flow_recipe(tmp_path / "now", tiny_model, *common, vlm=tiny_vlm)
    fill_cache(ahead.data, workers=1)
    ranks = {recipe.output_dir: LocalRank(partial(FlowRank, recipe)).rank for recipe in (ahead, now)}
    found = {}
    for folder, rank in ranks.items():
        figures = rank.advance(3)
        average = rank.average.whole(rank.model, keep=True)
        draw_previews(rank.recipe, rank.stream, rank.encoders, average, tmp_path / folder / "grids", step=3)
        found[folder] = (
            [one.losses for one in figures],
            average,
            sorted((tmp_path / folder / "grids").iterdir()),
        )
    (losses, weights, grids), (live_losses, live_weights, live_grids) = found.values()
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(live_losses), rtol=1e-5, atol=1e-5)
    assert weights.keys() == live_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, live_weights[name], rtol=1e-3, atol=1e-5)
    assert [path.name for path in grids] == [path.name for path in live_grids] and len(grids) == 2
    assert ranks[ahead.output_dir].encoders.reader is None
    assert ranks[now.output_dir].encoders.reader is not None
    assert any("not loaded: data.cache.queries" in line for line in describe(ahead))
    assert sum(f.flops for f in ranks[ahead.output_dir].advance(4)) < sum(
        f.flops for f in ranks[now.output_dir].advance(4)
    )
