"""What a `service` block may be is told before anything is sent."""

import pytest

from rewards.base import RewardSet, RewardSpec
from rewards.checks import check_rewards
from tests.fakes.service_process import served


def problems(spec):
    return check_rewards(RewardSet("set", "t2i", [spec]), probe=False)


@pytest.mark.parametrize(
    ("urls", "settings", "expected"),
    [
        ([], {}, "service.urls is empty"),
        (["localhost:8100"], {}, "localhost:8100: write it as http://host:port"),
        (["http://:8100"], {}, "write it as http://host:port"),
        (["http://h:99999"], {}, "Port out of range"),
        (["http://h:1?x=1"], {}, "leave out what follows"),
        (["http://h:1", "http://h:1/"], {}, "holds one URL twice"),
        (["http://h:1"], {"codec": "jpeg"}, "service.codec is 'jpeg'; choose one of png, raw"),
        (["http://h:1"], {"unavailable_s": 0.0}, "service.unavailable_s is 0"),
        (["http://h:1"], {"unavailable_s": float("nan")}, "service.unavailable_s is nan"),
        (
            ["http://h:1"],
            {"token_env": "NO_SUCH_TOKEN"},
            "variable NO_SUCH_TOKEN, which holds the bearer token",
        ),
    ],
)
def test_a_service_block_that_cannot_work_is_told_without_a_request(urls, settings, expected):
    (problem,) = problems(served(RewardSpec("no.such:reward"), *urls, **settings))
    assert expected in problem


def test_a_password_in_a_url_is_refused_and_not_shown(caplog):
    caplog.set_level("DEBUG")
    (problem,) = problems(served(RewardSpec("a:b"), "http://me:hunter2@h:99999"))
    assert "holds a user or password" in problem and "hunter2" not in problem + caplog.text


@pytest.mark.parametrize("token", ["secret\n", "two words", "sécret"])
def test_a_token_that_no_header_carries_is_refused_and_not_shown(token, monkeypatch):
    monkeypatch.setenv("SERVICE_TOKEN", token)
    (problem,) = problems(served(RewardSpec("a:b"), "http://h:1", token_env="SERVICE_TOKEN"))
    assert "SERVICE_TOKEN holds a space, a line end" in problem and token not in problem


def test_params_that_json_cannot_hold_are_refused():
    (problem,) = problems(served(RewardSpec("a:b", params={"x": {1}}), "http://h:1"))
    assert "params of a served reward must be plain JSON" in problem
