"""The endpoint that stands for GPT-4.1: instructions read back, and grades through the judge's own client over HTTP."""

import asyncio
import base64
import io
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from rewards.base import RewardOutput, RewardSpec
from rewards.editreward.__main__ import main
from rewards.editreward.data.shards import EditSample, read_shard, write_shard
from rewards.judge.protocols import HIGHEST_DIGIT
from rewards.loading import load_reward
from worlds.shapes.scenes.captions import TAGS, sample_t2i
from worlds.shapes.scenes.edits import KINDS, Edit, sample_edit
from worlds.shapes.scenes.instructions import UnknownRequest, parse_caption, parse_edit
from worlds.shapes.scenes.render import render
from worlds.shapes.scenes.world import Scene, Shape
from worlds.shapes.scoring.components import analyse
from worlds.shapes.scoring.judge_endpoint import ShapesJudge, base_url, make_server
from worlds.shapes.scoring.seeing import grade_edit, scene_in
from worlds.shapes.scoring.verifier import verify

PROMPTS = Path(__file__).resolve().parents[4] / "recipes" / "shapes" / "prompts"
CIRCLE, SQUARE, CROSS = (
    Shape("circle", "red", 8.0, 8.0),
    Shape("square", "blue", 24.0, 24.0),
    Shape("cross", "purple", 24.0, 8.0),
)
SOURCE = Scene("white", (CIRCLE, SQUARE, CROSS))
ASKED = "make the red circle green"
GREEN = replace(CIRCLE, color="green")
RESULTS = {
    "right": Scene("white", (GREEN, SQUARE, CROSS)),
    "partly: one of the others is lost": Scene("white", (GREEN, CROSS)),
    "unchanged": SOURCE,
    "wrong": Scene("white", (CIRCLE, replace(SQUARE, color="green"), CROSS)),
}


def picture(scene: Scene, noise: float = 0.0) -> Image.Image:
    error = np.random.default_rng(0).normal(0.0, noise, (32, 32, 3)) if noise else 0.0
    return Image.fromarray(np.clip(render(scene) + error, 0, 255).astype(np.uint8))


@pytest.fixture
def endpoint():
    """Starts judges, each behind its own port; returns the base_url."""
    servers = []

    def start(**settings) -> str:
        server = make_server(ShapesJudge(**settings))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return base_url(server)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def judged(
    url: str, protocol: str, results: list[Image.Image], instruction=ASKED, source=None
) -> RewardOutput:
    settings = {"model": "shapes", "base_url": url, "api_key_env": None, "attempts": 1, "concurrency": 4}
    loaded = load_reward(RewardSpec("judge", params={"protocol": protocol, **settings}))

    async def call() -> RewardOutput:
        try:
            return await loaded.owner.score(
                images=results,
                prompts=[instruction] * len(results),
                references=[[] if source is None else [source]] * len(results),
                metadata=[{}] * len(results),
            )
        finally:
            await loaded.owner._client.close()

    return asyncio.run(call())


def as_asked(edit: Edit) -> Edit:
    """Without the half pixel of a new object's place, which no instruction states."""
    if edit.kind != "add":
        return edit
    assert edit.result is not None
    return replace(edit, result=replace(edit.result, x=0.0, y=0.0))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_instruction_of_the_prompt_files_is_read_back(split):
    kinds = set()
    for line in (PROMPTS / f"edit_{split}.jsonl").read_text().splitlines():
        record = json.loads(line)
        edit, source = Edit.from_json(record["metadata"]["edit"])
        found = parse_edit(record["prompt"], source)
        assert as_asked(found) == as_asked(edit), record["prompt"]
        if edit.kind == "add" and not edit.anywhere:
            assert found.result.cell == edit.result.cell
        kinds.add(found.kind)
    assert kinds == set(KINDS)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_caption_of_the_prompt_files_is_read_back(split):
    tags = set()
    for line in (PROMPTS / f"t2i_{split}.jsonl").read_text().splitlines():
        record = json.loads(line)
        found = parse_caption(record["prompt"]).metadata()
        assert found.pop("prompt") == record["prompt"]
        assert found == record["metadata"]
        tags.add(found["tag"])
    assert tags == set(TAGS)


@pytest.mark.parametrize(
    "text", ["make it red", "remove the green cross", "remove the circle and smile", "add a mauve square", ""]
)
def test_what_is_no_request_about_the_source_is_refused(text):
    with pytest.raises(UnknownRequest):
        parse_edit(text, SOURCE)
    with pytest.raises(UnknownRequest):
        parse_caption("a photo of a cat")


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_alone_give_the_scores_that_the_metadata_give(kind):
    """The source is seen, not told: the verifier's two terms come out as with the exact scene, right and wrong."""
    for seed in range(12):
        example = sample_edit(seed, "heldout", kind)
        other = sample_edit(seed + 100, "heldout", kind)
        (seen,) = analyse(render(example.source)[None])
        assert sorted(scene_in(seen).content) == sorted(example.source.content)
        for result in (example.target, example.source, other.target):
            (after,) = analyse(render(result)[None])
            exact = verify(after, *Edit.from_json(example.metadata["edit"]))
            found = grade_edit(picture(example.source), picture(result), example.instruction)
            assert found.instruction == pytest.approx(exact.instruction, abs=0.06)
            assert found.preservation == pytest.approx(exact.preservation, abs=0.06)


def test_the_judge_reward_orders_edits_by_every_protocol(endpoint):
    url = endpoint()
    pictures = [picture(scene) for scene in RESULTS.values()] + [picture(RESULTS["right"], noise=90.0)]
    for protocol in ("structured", "viescore"):
        output = judged(url, protocol, pictures, source=picture(SOURCE))
        parts = output.components
        assert output.scores == pytest.approx([1.0, 0.5**0.5, 0.0, 0.0, output.scores[4]], abs=0.06)
        assert parts["success"][:4] == [10, 10, 0, 0]
        assert parts["preservation"][:4] == [10, 5, 10, 5]
        assert parts["cleanness"][:4] == [10] * 4 and parts["cleanness"][4] < 5, (
            "a noisy picture is not clean"
        )
    least = judged(url, "expected_score", pictures, source=picture(SOURCE)).scores
    assert least[:4] == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1 / HIGHEST_DIGIT / 2)


def test_text_to_image_is_graded_by_genevals_rules(endpoint):
    record, scene = sample_t2i(3, "heldout", "position")
    empty = replace(scene, objects=())
    output = judged(endpoint(), "structured", [picture(scene), picture(empty)], record["prompt"])
    assert output.scores[0] == 1.0 and output.components["content"][1] < 5


def test_a_request_it_cannot_judge_is_refused_and_never_a_number(endpoint):
    output = judged(endpoint(), "structured", [picture(SOURCE)], "make it pretty", picture(SOURCE))
    assert output.scores == [None] and output.components["refused"] == [1.0]


def test_a_run_may_begin_with_it(endpoint):
    settings = {"model": "shapes", "base_url": endpoint(), "api_key_env": None, "attempts": 1}
    loaded = load_reward(RewardSpec("judge", params={"protocol": "structured", **settings}))
    assert asyncio.run(loaded.owner.readiness()) == []


def test_noise_is_a_function_of_the_question_and_the_seeds(endpoint):
    pictures = [picture(example.target) for example in (sample_edit(s, "train", "add") for s in range(12))]
    urls = [endpoint(noise=1.5, seed=seed) for seed in (0, 0, 1)]
    grades = [judged(url, "viescore", pictures, source=picture(SOURCE)).components for url in urls]
    assert grades[0] == grades[1] != grades[2]
    exact = judged(endpoint(), "viescore", pictures, source=picture(SOURCE)).components
    spread = np.array(grades[0]["naturalness"]) - np.array(exact["naturalness"])
    assert 0.0 < np.abs(spread).max() <= 6.0
    assert all(value == int(value) and 0 <= value <= 10 for value in grades[0]["naturalness"])


def test_a_cautious_judge_prefers_the_source_to_what_was_asked(endpoint):
    pictures = [picture(RESULTS[name]) for name in ("right", "unchanged")]
    asked, left = judged(endpoint(cautious=True), "structured", pictures, source=picture(SOURCE)).scores
    assert asked == 0.0 and left > 0.9
    asked, left = judged(endpoint(), "structured", pictures, source=picture(SOURCE)).scores
    assert left == 0.0 and asked > 0.9


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"messages": []}, 400, "mean nothing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        ({"picture": b"no picture"}, 400, "cannot be read"),
        ({"names": ["beauty"]}, 400, "beauty"),
        ({"pictures": 1}, 400, "1 pictures"),
        ({"raw": b"{half"}, 400, "Expecting"),
        ({"raw": b"[]"}, 400, "not a JSON object"),
        ({"path": "/completions"}, 404, "nothing at"),
    ],
)
def test_a_malformed_request_gets_the_protocols_error(endpoint, change, status, told):
    file = io.BytesIO()
    picture(SOURCE).save(file, "png")
    data = base64.b64encode(change.get("picture", file.getvalue())).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    text = {"type": "text", "text": f"-----\n{ASKED}\n-----"}
    schema = {"properties": dict.fromkeys(change.get("names", ["success"]), {})}
    body = {
        "messages": [{"role": "user", "content": [image] * change.get("pictures", 2) + [text]}],
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
    }
    if "messages" in change:
        body = {"messages": change["messages"]}
    answer = httpx.post(
        endpoint() + change.get("path", "/chat/completions"), content=change.get("raw", json.dumps(body))
    )
    assert answer.status_code == status
    assert told in answer.json()["error"]["message"]


def test_label_gets_its_three_grades_from_it(endpoint, tmp_path):
    samples = [
        EditSample(f"{i:07d}-000", picture(SOURCE), picture(scene), ASKED, "recolour", {}, {"seed": i})
        for i, scene in enumerate(RESULTS.values())
    ]
    write_shard(tmp_path / "edits" / "edits-00000.tar", samples)
    judge = {"model": "shapes", "base_url": endpoint(), "api_key_env": None}
    section = {"shards": [str(tmp_path / "edits" / "*.tar")], "judge": judge, "second_opinions": 0.5}
    content = {"name": "run", "output_dir": str(tmp_path), "label": section, "generate": {"model": "x"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert main(["label", str(tmp_path / "recipe.yaml")]) == 0
    found = [s.scores for s in read_shard(tmp_path / "run" / "labelled" / "edits-00000.tar")]
    assert [scores["instruction"] for scores in found] == [10, 10, 0, 0]
    assert [scores["preservation"] for scores in found] == [10, 5, 10, 5]
    assert [scores["quality"] for scores in found] == [10] * 4


def test_the_command_writes_its_address_and_ends_on_a_signal(tmp_path):
    file = tmp_path / "url"
    command = [sys.executable, "-m", "worlds.shapes.scoring.judge_endpoint", "--port-file", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        output = judged(
            file.read_text().strip(), "structured", [picture(RESULTS["right"])], source=picture(SOURCE)
        )
        assert output.scores == [1.0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
