"""The bench of served rewards runs and adds up."""

import argparse

import pytest

from bench import service


def test_the_table_holds_every_way(capsys):
    parser = argparse.ArgumentParser()
    service.add_arguments(parser)
    arguments = parser.parse_args(["--batch", "2", "--resolution", "16", "--warmup", "1", "--repeats", "2"])
    assert service.run(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("16 px, batch 2, loopback")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [row[0] for row in rows] == ["in process", "served, png", "served, raw"]
    for row in rows[1:]:
        _, added, codec, overhead, megabytes = map(float, row[1:])
        assert overhead == pytest.approx(added - codec, abs=0.011) and megabytes >= 0
    assert rows[2][5] == "0.00"  # 16 x 16 x 3 bytes


def test_its_reward_reads_the_first_pixel():
    images = service.pictures(2, 8)
    levels = service.first_level(images=images, prompts=["p"] * 2, references=[[]] * 2, metadata=[{}] * 2)
    assert levels == [image.getpixel((0, 0))[0] / 255 for image in images]
