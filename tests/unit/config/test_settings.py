"""Every setting: its help, its paths, YAML's words, and whatever anybody may write for it."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from loqt_scale import cli
from loqt_scale.checkpoint.changes import changes_between, of_another_run
from loqt_scale.config import (
    DataConfig,
    LoQTConfig,
    MergeConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SubspaceConfig,
    TrainConfig,
)
from loqt_scale.config.combinations import check_ranks
from loqt_scale.config.commands import (
    ExportOptions,
    GenerateOptions,
    PlanOptions,
    parse_options,
    split_checkpoint,
)
from loqt_scale.config.keys import setting_types
from loqt_scale.config.sizes import parse_size
from loqt_scale.config.yaml import dump_run_config, load_run_config, parse_run_config
from loqt_scale.errors import ConfigError
from loqt_scale.functional.merge_steps import merge_steps
from loqt_scale.optim import LearningRates

ROOT = Path(__file__).resolve().parents[3]


# ---- help ------------------------------------------------------------------------------------------------------------


def helps(cls: type) -> dict[str, str]:
    """What `--help` says of each option of a class, without what jsonargparse adds."""
    parser = ArgumentParser()
    parser.add_class_arguments(cls)
    return {
        action.dest: re.sub(r"\s*\((type|default|required).*$", "", (action.help or "").strip())
        for action in parser._actions
        if action.dest not in ("help",) and not any(dest.startswith(f"{action.dest}.") for dest in _dests(parser))
    }


def _dests(parser: ArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions]


@pytest.mark.parametrize("cls", [RunConfig, ExportOptions, GenerateOptions, PlanOptions])
def test_every_setting_has_a_sentence_that_ends(cls: type) -> None:
    said = helps(cls)
    assert set(said) >= (set(setting_types()) if cls is RunConfig else {item.name for item in fields(cls)})
    for key, text in said.items():
        assert len(text.split()) >= 2 and text.endswith("."), f"{key}: {text!r}"


def _classes(cls: type) -> list[type]:
    inner = [hint for hint in get_type_hints(cls).values() if is_dataclass(hint)]
    return [cls, *(deeper for one in inner for deeper in _classes(one))]


@pytest.mark.parametrize("cls", [*_classes(RunConfig), ExportOptions, GenerateOptions, PlanOptions])
def test_no_help_has_swallowed_that_of_another_setting(cls: type) -> None:
    """As a formatter did that joined two lines of a docstring."""
    names = "|".join(item.name for item in fields(cls))
    for name, text in helps(cls).items():
        assert not re.search(rf"[.]\s+({names}): ", text), f"{name}: {text!r}"


# ---- paths -----------------------------------------------------------------------------------------------------------

PATHS = ("model.path", "data.dataset", "data.tokenizer", "data.cache_dir", "parallel.zero_config", "train.run_dir")
PATHS = (*PATHS, "checkpoint.resume")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOT_SET", raising=False)
    return str(tmp_path / "home")


def value_of(config: RunConfig, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("key", PATHS)
def test_home_and_variables_are_expanded_in_every_path(home: str, tmp_path: Path, key: str) -> None:
    written = {"~/a": f"{home}/a", "$SCRATCH/b": "/scratch/me/b", "${SCRATCH}/$SCRATCH": "/scratch/me//scratch/me"}
    for text, expected in written.items():
        assert value_of(parse_run_config([f"--{key}={text}"]), key) == expected
        group, _, name = key.partition(".")
        (tmp_path / "c.yaml").write_text(f"{group}: {{{name}: '{text}'}}\n")
        assert value_of(parse_run_config([f"--config={tmp_path}/c.yaml"]), key) == expected
        assert value_of(load_run_config(tmp_path / "c.yaml"), key) == expected


def test_lists_of_paths_and_the_options_of_other_commands(home: str, tmp_path: Path) -> None:
    files = parse_run_config(["--data.files", "~/*.txt", "$SCRATCH/a.jsonl", "plain.txt"]).data.files
    assert files == [f"{home}/*.txt", "/scratch/me/a.jsonl", "plain.txt"]
    export = parse_options(ExportOptions, ["--checkpoint=~/run", "--out=$SCRATCH/out"], "export")
    assert (export.checkpoint, export.out) == (f"{home}/run", "/scratch/me/out")
    assert parse_options(GenerateOptions, ["--checkpoint=~/run"], "generate").checkpoint == f"{home}/run"
    assert split_checkpoint(["--checkpoint=~/run", "--data.files=a"]) == (f"{home}/run", ["--data.files=a"])
    Path(home).mkdir()
    Path(home, "c.yaml").write_text("loqt: {rank: 7}\n")
    assert parse_run_config(["--config=~/c.yaml"]).loqt.rank == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$NOT_SET/run", "train.run_dir is '$NOT_SET/run', but the variable NOT_SET is not set; set it"),
        ("~nobody-of-that-name/run", "but ~nobody-of-that-name is nobody's home here; write the path in full"),
        ("", "train.run_dir is empty; write a path, or leave it out"),
        ("/x/" + "a" * 300, "file systems take names of 255 bytes and paths of 4095: write a shorter one"),
        ("a/" * 3000, "write a shorter one"),
    ],
)
def test_paths_that_cannot_be_one_are_refused(home: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run_config([f"--train.run_dir={text}"])
    assert message in str(caught.value) and len(str(caught.value)) < 400


def test_a_file_of_that_very_name_wins(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~$NOT_SET.txt").touch()
    assert parse_run_config(["--data.files=~$NOT_SET.txt"]).data.files == ["~$NOT_SET.txt"]


# ---- YAML's words ----------------------------------------------------------------------------------------------------


def read(tmp_path: Path, text: str) -> RunConfig:
    (tmp_path / "c.yaml").write_text(text)
    config = parse_run_config([f"--config={tmp_path}/c.yaml"])
    assert load_run_config(tmp_path / "c.yaml") == config
    return config


def test_patterns_keep_their_order(tmp_path: Path) -> None:
    """The first that matches counts: from a file, and from what a run writes down; another order is another setting."""
    patterns = {"model.layers.0.*": 8, "*": 12}
    config = read(tmp_path, f"loqt: {{rank_pattern: {patterns}}}")
    again = read(tmp_path, dump_run_config(config))
    assert list(config.loqt.rank_pattern.items()) == list(again.loqt.rank_pattern.items()) == list(patterns.items())
    assert config.loqt.rank_of("model.layers.0.mlp.up_proj") == 8
    turned = replace(config, loqt=replace(config.loqt, rank_pattern=dict(reversed(patterns.items()))))
    assert list(changes_between(config, turned)) == ["loqt.rank_pattern"] and not changes_between(config, again)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (LoQTConfig, {"exclude_modules": "head"}, "loqt.exclude_modules is 'head'; write a list such as"),
        (LoQTConfig, {"side": "left"}, "loqt.side is 'left'; write one of auto, input, output"),
        (LoQTConfig, {"rank": True}, "loqt.rank is True; write a whole number"),
        (LoQTConfig, {"merge": {"gap": 5}}, "loqt.merge is .*; write MergeConfig"),
        (MergeConfig, {"optimizer_state": "rotate"}, "write one of keep, reset, transport"),
        (OptimConfig, {"betas": (0.9,)}, "write a list of 2 numbers"),
        (RunConfig, {"method": "lora"}, "method is 'lora'; write one of loqt, full"),
    ],
)
def test_types_are_looked_at_where_a_program_makes_settings_too(kind: Any, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        kind(**values)


def test_a_program_may_write_paths_tuples_and_whole_numbers(tmp_path: Path) -> None:
    written: dict[str, Any] = {"run_dir": tmp_path, "files": [tmp_path], "target_modules": ("*.q_proj",)}
    assert TrainConfig(run_dir=written["run_dir"]).run_dir == str(tmp_path)
    assert DataConfig(files=written["files"]).files == [str(tmp_path)]
    assert LoQTConfig(target_modules=written["target_modules"], scale=1).scale == 1


def test_what_only_memory_depends_on_may_change_in_a_run() -> None:
    smaller = RunConfig(model=ModelConfig(loss_chunk_tokens=64, activation_checkpointing=True))
    assert not changes_between(RunConfig(), smaller)


def test_sketches_may_become_narrower_in_a_run_and_full_rank_reads_nothing_of_the_method() -> None:
    """As they do where a run goes on, or is asked for again, with a version that has another default."""
    wide = LoQTConfig(subspace=SubspaceConfig(oversampling=1.0))
    changes = changes_between(RunConfig(loqt=wide), RunConfig())
    assert changes == {"loqt.subspace.oversampling": (1.0, 0.0)} and not of_another_run(changes)
    assert of_another_run(changes_between(RunConfig(loqt=LoQTConfig(rank=7)), RunConfig()))
    full = [RunConfig(method="full", loqt=loqt) for loqt in (LoQTConfig(rank=7), wide)]
    assert not changes_between(*full)
    assert changes_between(full[0], replace(full[1], method="loqt"))


def test_a_rank_is_a_whole_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="each value a whole number"):
        read(tmp_path, "loqt: {rank_pattern: {q: 1.5}}")


@pytest.mark.parametrize("word", ["off", "on"])
def test_off_and_on_are_the_choices_that_help_names(tmp_path: Path, word: str) -> None:
    assert read(tmp_path, f"train: {{progress: {word}}}").train.progress == word
    assert parse_run_config([f"--train.progress={word}"]).train.progress == word
    assert read(tmp_path, "train: {wire_counter: off}").train.wire_counter == "off"


def test_no_is_the_name_of_a_language_and_yes_is_true_where_that_is_meant(tmp_path: Path) -> None:
    config = read(tmp_path, "data: {dataset: allenai/c4, dataset_config: no, split: 'on'}\nmodel: {compile: yes}")
    assert (config.data.dataset_config, config.data.split, config.model.compile) == ("no", "on", True)
    for text, value in (("off", False), ("On", True), ("no", False), ("false", False)):
        assert read(tmp_path, f"model: {{compile: {text}}}").model.compile is value
        assert parse_run_config([f"--model.compile={text}"]).model.compile is value
    assert read(tmp_path, "model: {overrides: {attention_bias: yes}}").model.overrides == {"attention_bias": True}
    assert read(tmp_path, "data: {files: [no, yes.txt]}").data.files == ["no", "yes.txt"]


# ---- learning rates --------------------------------------------------------------------------------------------------

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_short_run_of_a_shipped_config_needs_no_other_warm_up(path: Path) -> None:
    config = parse_run_config([f"--config={path}", "--train.steps=30"])
    assert config.optim.warmup_of(30) == 3


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_config_names_the_rate_of_the_rest(path: Path) -> None:
    """Else it would be the factors' rate. 1e-2 was best at widths 64 to 256 (docs/quality.md); wider ones want less."""
    config = parse_run_config([f"--config={path}"])
    highest = 1e-2 if path.stem == "quickstart" else 5e-3
    assert config.optim.full_precision_lr is not None and config.optim.full_precision_lr <= highest


def test_warm_up_is_a_number_or_a_fraction(tmp_path: Path) -> None:
    for steps, fraction in ((100, 0.1), (0, 0.1), (100, 0.0)):
        both = rf"optim.warmup_steps is {steps} and optim.warmup_fraction is {fraction}; write one of them"
        with pytest.raises(ConfigError, match=both):
            parse_run_config([f"--optim.warmup_steps={steps}", f"--optim.warmup_fraction={fraction}"])
    over = parse_run_config(
        [f"--config={SHIPPED[0]}", "--optim.warmup_fraction=null", "--optim.warmup_steps=7", "--train.steps=1000"]
    )
    assert over.optim.warmup_of(1000) == 7
    assert parse_run_config([]).optim.warmup_of(1000) == 0
    assert read(tmp_path, "optim: {warmup_fraction: 0.25}").optim.warmup_of(1000) == 250


def test_a_decay_leaves_room_for_the_warm_up() -> None:
    with pytest.raises(ConfigError, match=r"optim.warmup_fraction 0.5 and optim.decay_fraction 0.6 are more than"):
        parse_run_config(["--optim.schedule=wsd", "--optim.warmup_fraction=0.5", "--optim.decay_fraction=0.6"])
    parse_run_config(["--optim.warmup_fraction=0.5", "--optim.decay_fraction=0.6"])  # a cosine has no decay


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["-5GB", "nanGB", "infGB", "1e400GB", "GB", "5", "5 XB", "", "5GBGB", "²GB"])
def test_a_gpu_of_no_size_is_refused_before_anything_is_planned(text: str) -> None:
    with pytest.raises(ConfigError, match="write a number above 0 and a unit"):
        parse_options(PlanOptions, [f"--gpu_memory={text}"], "plan")


def test_a_gpu_with_no_room_for_torch_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs 800 MiB for what torch does not count"):
        parse_size("500MB")
    with pytest.raises(ConfigError, match="needs 800 MiB"):
        parse_size("0GB")
    assert parse_size("24 gb") == 24 * 10**9


# ---- whatever may be written -----------------------------------------------------------------------------------------

ODD = st.sampled_from(
    [
        "", " ", "-1", "0", "1", "-0.0", "1e400", "-1e400", "1e-320", "1e308", ".inf", "-.inf", ".nan", "nan", "inf",
        "9" * 30, "-" + "9" * 30, "9" * 5000, "0x1f", "0b1", "1_000", "1:30", "2024-99-99", "null", "~", "true", "off",
        "yes", "No", "[", "]", "[]", "{}", "{a: }", "[[1]]", "{1: 2}", "a: b", "- a", "&a [*a]", "!!python/object:os",
        "'", '"', "\\", "$X", "${", "~x", "a\0b", "\ud800", "\udce9", "ψ × s", "x" * 5000, "a/" * 3000, "..", "/", "-",
        "--", "#", "%", "@", "`", "|", ">", "*", "?", "!", "\n", "\t", "\u2028", "1e5", "[0.9, .nan]", "[.inf, 1]",
    ]
)  # fmt: skip
VALUES = st.one_of(ODD, st.text(max_size=12), st.integers().map(str), st.floats().map(str))
MANY = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(config: RunConfig) -> None:
    """What every command does of a run's settings before it looks at a disk."""
    dump_run_config(config).encode("utf-8")
    steps, merge = config.train.steps, config.loqt.merge
    assert merge_steps(min(steps, 10**4), gap=merge.gap, schedule=merge.schedule, growth=merge.growth)[0] == 0
    assert LearningRates.of_run(config.optim, steps).factor(0) > 0.0


@MANY
@given(st.lists(st.tuples(st.sampled_from([*setting_types(), "model.overrides.x"]), VALUES), min_size=1, max_size=3))
def test_any_value_of_any_setting_is_taken_or_refused_in_one_line(pairs: list[tuple[str, str]]) -> None:
    try:
        config = parse_run_config([f"--{key}={value}" for key, value in pairs])
    except ConfigError as error:
        assert str(error) and len(str(error)) < 2000
        return
    check(config)


@MANY
@given(st.sampled_from(list(setting_types())), VALUES)
def test_any_yaml_is_taken_or_refused_in_one_line(tmp_path: Path, key: str, value: str) -> None:
    text = value
    for depth, part in enumerate(reversed(key.split("."))):
        text = f"{part}: {text}" if depth == 0 else f"{part}: {{{text}}}"
    (tmp_path / "c.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = parse_run_config([f"--config={tmp_path}/c.yaml"])
    except ConfigError as error:
        assert str(error) and len(str(error)) < 2000
        return
    check(config)


@MANY
@given(st.sampled_from([ExportOptions, GenerateOptions, PlanOptions]), st.data())
def test_any_option_of_the_other_commands_is_taken_or_refused_in_one_line(cls: type, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([item.name for item in fields(cls)]))
    required = ["--checkpoint=c", *(["--out=o"] if cls is ExportOptions else [])] if cls is not PlanOptions else []
    try:
        parse_options(cls, [*required, f"--{name}={data.draw(VALUES)}"], "prog")
    except ConfigError as error:
        assert str(error)


def test_a_wrong_value_is_one_short_line_whatever_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("\udce9", "x" * 10_000, "a\nb"):
        assert cli.main(["train", f"--loqt.rank={value}"]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and line.startswith("loqt-scale train") and len(line) < 300


@pytest.mark.parametrize(
    ("size", "ranks", "message"),
    [
        (3, 4, r"parallel\.shard_size is 3, which does not divide 4 rank\(s\); write one of 2, 4, or leave it out"),
        (2, 1, r"does not divide 1 rank\(s\); leave it out"),
    ],
)
def test_a_shard_size_divides_the_ranks(size, ranks, message):
    config = RunConfig(parallel=ParallelConfig(shard_size=size))
    with pytest.raises(ConfigError, match=message):
        check_ranks(config, ranks=ranks, passes=1)
    check_ranks(config, ranks=2 * size, passes=1)


def test_a_shard_size_is_for_fsdp_and_shards():
    with pytest.raises(ConfigError, match=r"but parallel\.strategy is 'ddp'; write parallel\.strategy: fsdp"):
        ParallelConfig(shard_size=2, strategy="ddp")
    with pytest.raises(ConfigError, match=r"parallel\.shard_size is 1; write 2 or more"):
        ParallelConfig(shard_size=1)
