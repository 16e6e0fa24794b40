"""`data.sources`: what may be written there, what is refused, and what a run may change of it later."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from loqt_scale.checkpoint.changes import changes_between, of_another_run
from loqt_scale.config import DataConfig, RunConfig
from loqt_scale.config.sources import ALWAYS, goes_on, read_sources, run_shares, shares_of, why_not
from loqt_scale.config.yaml import dump_run_config, load_run_config, override_run_config, parse_run_config
from loqt_scale.errors import ConfigError

WEB = {"name": "web", "files": ["web.txt"]}
CODE = {"name": "code", "dataset": "some/code", "weight": 0.25}
MATH = {
    "name": "math",
    "files": ["m1.txt", "m2.txt"],
    "weight": [{"from_step": 0, "weight": 0}, {"from_step": 9, "weight": 2}],
}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{**WEB, "weight": 0}], "'web': weight is 0; write a positive number"),
        ([{**WEB, "weight": -1.5}], "'web': weight is -1.5; write a positive number"),
        ([{**WEB, "weight": True}], "'web': weight is True; write a positive number"),
        ([{**WEB, "weight": "0.5%"}], "'web': weight is '0.5%'; write a positive number"),
        ([{**WEB, "weight": float("nan")}], "weight is nan; write a number"),
        ([{**WEB, "weight": []}], r"'web': weight has the steps \[\]; write them in ascending order"),
        ([{**WEB, "weight": [{"from_step": 3, "weight": 1}]}], "from_step: 0 first"),
        ([{**WEB, "weight": [{"step": 3, "weight": 1}]}], r"write a number, or \[{from_step: 0, weight: 1}"),
        ([{**WEB, "weight": [{"from_step": 0.5, "weight": 1}]}], "from_step is 0.5; write 0 to"),
        ([{**WEB, "weight": [{"from_step": 0, "weight": 0}]}], "'web': weight is 0 at every step"),
        ([MATH], "no source with a weight from step 0 on"),
        ([WEB, {**CODE, "name": "web"}], "two sources called 'web'"),
        ([{**WEB, "wieght": 2}], r"unknown key 'wieght' in data\.sources\[0\]; did you mean 'weight'"),
        ([WEB, {**CODE, "files": ["a.txt"]}], "'code': both files and dataset; write one"),
        ([{"name": "web"}], "'web': neither files and dataset; write one"),
        ([{**WEB, "split": "train"}], "'web': split is of a dataset, and it has files"),
        ([{"files": ["web.txt"]}], r"data\.sources\[0\] has no name; write one"),
        ([{**WEB, "name": "a/b"}], r"name is 'a/b'; write a letter and up to 63"),
        ([{**WEB, "files": "web.txt"}], r"files is 'web.txt'; write a list such as \[a.txt"),
        ([{**WEB, "text_field": 3}], "text_field is 3; write text"),
        (["web.txt"], r"data\.sources is \['web.txt'\]; write a list such as"),
    ],
)
def test_what_cannot_work_is_refused_by_name(sources: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(sources=sources)


def test_what_contradicts_other_settings_is_refused() -> None:
    for other in ({"files": ["a.txt"]}, {"dataset": "some/set"}):
        with pytest.raises(ConfigError, match=r"data\.sources and data\.\w+ are both set"):
            DataConfig(sources=[WEB], **other)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="bpe"):
        DataConfig(sources=[WEB, CODE], tokenizer="bpe")
    with pytest.raises(ConfigError, match=r"data\.streams is 4, but only a streamed"):
        DataConfig(sources=[WEB], streams=4)
    with pytest.raises(ConfigError, match=r"data\.streams is 5, which does not divide"):
        RunConfig(data=DataConfig(sources=[WEB, CODE], streams=5))


def test_what_a_source_leaves_out_is_that_of_data() -> None:
    data = DataConfig(sources=[WEB, {**CODE, "split": "dev"}], text_field="body", eval_split="test", streams=4)
    web, code = (data.of_source(source) for source in data.mixture)
    assert (web.files, web.dataset, web.text_field, web.streams) == (["web.txt"], None, "body", None)
    assert (code.dataset, code.split, code.eval_split, code.text_field, code.streams) == (
        "some/code",
        "dev",
        "test",
        "body",
        4,
    )


def test_yaml_the_command_line_and_a_saved_run_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTS", "/texts")
    file = tmp_path / "run.yaml"
    file.write_text(
        "data:\n  sources:\n"
        "    - {name: web, files: [$TEXTS/web.txt], weight: 5e-1}\n"
        "    - name: code\n      dataset: some/code\n"
        "      weight: [{from_step: 0, weight: 1}, {from_step: 10, weight: 3}]\n"
    )
    config = parse_run_config([f"--config={file}"])
    web, code = config.data.mixture
    assert (web.files, web.weight, code.weight) == (("/texts/web.txt",), ((0, 0.5),), ((0, 1.0), (10, 3.0)))
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_run_config(config))
    assert load_run_config(saved) == config == override_run_config(config, [], "x")
    line = "[{name: web, files: [/texts/web.txt], weight: 0.5}]"
    assert parse_run_config(["--data.sources", line]).data.mixture == (web,)
    assert parse_run_config([f"--config={file}", "--data.sources", "[]"]).data.mixture == ()
    with pytest.raises(ConfigError, match="did you mean 'weight'"):
        parse_run_config(["--data.sources", "[{name: web, files: [a.txt], wait: 1}]"])


def test_a_run_goes_on_with_sources_that_were_the_same_until_then(tmp_path: Path) -> None:
    def changed(*sources: dict[str, Any]) -> list[int]:
        """Steps done of `before` after which `sources` may take over."""
        return [done for done in (0, 5, 10, ALWAYS) if goes_on(before, read_sources(sources), done)]

    before = read_sources([WEB, CODE])
    assert changed(WEB, CODE) == changed({**WEB, "weight": 4}, {**CODE, "weight": 1}) == [0, 5, 10, ALWAYS]
    assert changed({**WEB, "files": [os.path.abspath("web.txt")]}, CODE) == [0, 5, 10, ALWAYS]
    assert changed({**WEB, "weight": 2}, CODE) == [0]
    assert changed({**WEB, "weight": [{"from_step": 0, "weight": 1}, {"from_step": 5, "weight": 9}]}, CODE) == [0, 5]
    assert changed(WEB, MATH, CODE) == [0, 5]  # it is read from step 9 on
    assert changed({**WEB, "files": ["other.txt"]}, CODE) == changed(CODE, WEB) == changed(WEB) == []
    assert [part.from_step for part in shares_of(read_sources([WEB, MATH]))] == [0, 9]


def test_what_cannot_change_says_what_to_write_and_that_works() -> None:
    """As the weights are written in the message, the run goes on."""

    def advice(*sources: dict[str, Any]) -> str:
        assert not goes_on(before, read_sources(sources), 7)
        return why_not(before, read_sources(sources), 7)

    def since_7(old: float, new: float) -> list[dict[str, float]]:
        return [{"from_step": 0, "weight": old}, {"from_step": 7, "weight": new}]

    before = read_sources([WEB, CODE])
    new = {**MATH, "weight": 2}
    heavier = {**WEB, "weight": 9}
    assert "weight of 'web' has changed" in advice(heavier, CODE)
    assert "write weight: [{from_step: 0, weight: 1}, {from_step: 7, weight: 9}]" in advice(heavier, CODE)
    assert goes_on(before, read_sources([{**WEB, "weight": since_7(1, 9)}, CODE]), 7)
    assert "'math' is new; write weight: [{from_step: 0, weight: 0}, {from_step: 7, weight: 2}]" in advice(
        WEB, CODE, new
    )
    assert goes_on(before, read_sources([WEB, CODE, {**new, "weight": since_7(0, 2)}]), 7)
    assert re.search(r"'web' is not there; put it back, with .*from_step: 7, weight: 0}", advice(CODE))
    assert goes_on(before, read_sources([{**WEB, "weight": since_7(1, 0)}, CODE]), 7)
    assert advice(CODE, WEB) == "write web, code in this order"
    assert "'web' names another text" in advice({**WEB, "files": ["other.txt"]}, CODE)
    sooner = [{"from_step": 0, "weight": 3}, {"from_step": 2, "weight": 1}]
    assert "weights of the first 7 steps have changed" in advice({**WEB, "weight": sooner}, CODE)


def test_what_may_change_when_a_run_goes_on_is_not_another_run() -> None:
    def run(*sources: dict[str, Any]) -> RunConfig:
        return RunConfig(data=DataConfig(sources=[*sources]))

    before = run(WEB, CODE)
    assert not changes_between(before, run({**WEB, "weight": 4}, {**CODE, "weight": 1}))
    later = run({**WEB, "weight": [{"from_step": 0, "weight": 1}, {"from_step": 5, "weight": 9}]}, CODE)
    for done, refused in ((5, False), (6, True), (None, True)):
        changes = changes_between(before, later, done=done)
        assert changes and bool(of_another_run(changes)) == refused
    assert list(of_another_run(changes_between(before, RunConfig(), done=0))) == ["data.sources"]


def test_shares_of_a_run_are_those_of_its_steps() -> None:
    sources = read_sources([WEB, MATH])
    assert run_shares((), 9) == {}
    assert run_shares(sources, 9) == {"web": 1.0, "math": 0.0}
    assert run_shares(sources, 12) == pytest.approx({"web": 10 / 12, "math": 2 / 12})
