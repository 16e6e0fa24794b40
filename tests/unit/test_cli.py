"""The command line: precedence, forms, round trips, and the message of every kind of mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loqt_scale import cli
from loqt_scale.config import DataConfig, LoQTConfig, ModelConfig, OptimConfig, RunConfig
from loqt_scale.config.keys import setting_types
from loqt_scale.config.yaml import load_run_config, parse_run_config, save_run_config
from loqt_scale.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def message_of(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_run_config(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_arguments_are_the_defaults():
    assert parse_run_config([]) == RunConfig()


@pytest.mark.parametrize(
    "argv",
    [
        ["--config", "FILE", "--loqt.rank", "64"],
        ["--loqt.rank", "64", "--config", "FILE"],
        ["--loqt.rank=64", "--config=FILE"],
    ],
)
def test_overrides_win_wherever_they_stand(yaml_file, argv):
    path = yaml_file("loqt: {rank: 32, merge: {gap: 7}}\n")
    config = parse_run_config([word.replace("FILE", path) for word in argv])
    assert (config.loqt.rank, config.loqt.merge.gap) == (64, 7)


def test_later_config_files_win(yaml_file):
    first, second = yaml_file("loqt: {rank: 1, scale: 2.0}", "1.yaml"), yaml_file("loqt: {rank: 3}", "2.yaml")
    config = parse_run_config(["--config", first, "--config", second])
    assert (config.loqt.rank, config.loqt.scale) == (3, 2.0)


def test_empty_config_file_is_the_defaults(yaml_file):
    assert parse_run_config(["--config", yaml_file("# nothing yet\n")]) == RunConfig()


@pytest.mark.parametrize(
    ("argv", "files"),
    [
        (["--data.files", "[a.txt]"], ["a.txt"]),
        (["--data.files", '["a.txt", "b c.txt"]'], ["a.txt", "b c.txt"]),
        (["--data.files", "a.txt"], ["a.txt"]),
        (["--data.files=a.txt"], ["a.txt"]),
        (["--data.files", "a.txt", "b c.txt"], ["a.txt", "b c.txt"]),
        (["--data.files", "[ab]*.txt"], ["[ab]*.txt"]),
        (["--data.files", "[]"], []),
        (["--data.files", "a", "--data.files+=b.txt"], ["a", "b.txt"]),
        (["--data.files", "a", "--data.files+", "b", "c"], ["a", "b", "c"]),
    ],
)
def test_forms_of_a_list(argv, files):
    assert parse_run_config(argv).data.files == files


def test_append_to_the_list_of_the_file(yaml_file):
    path = yaml_file("data: {files: [a.txt]}")
    assert parse_run_config(["--data.files+=b.txt", "--config", path]).data.files == ["a.txt", "b.txt"]


@pytest.mark.parametrize("words", [["0.9", "0.95"], ["[0.9, 0.95]"]])
def test_forms_of_a_pair(words):
    assert parse_run_config(["--optim.betas", *words]).optim.betas == (0.9, 0.95)


def test_method_numbers_nulls_and_mappings():
    argv = ["--method", "full", "--optim.lr", "5e-3", "--data.dataset", "null", "--model.compile", "true"]
    config = parse_run_config(
        [*argv, "--model.overrides", "{num_hidden_layers: 4}", "--model.overrides.vocab_size", "9"]
    )
    assert (config.method, config.optim.lr, config.data.dataset, config.model.compile) == ("full", 0.005, None, True)
    assert config.model.overrides == {"num_hidden_layers": 4, "vocab_size": 9}


def test_whole_numbers_become_floats():
    assert isinstance(parse_run_config(["--loqt.scale", "1"]).loqt.scale, float)


@pytest.mark.parametrize("form", [["--local_rank", "1"], ["--local-rank", "1"], ["--local_rank=1"], ["--local-rank=1"]])
def test_local_rank_of_launchers_is_ignored(form):
    assert parse_run_config([*form, "--loqt.rank", "3"]).loqt.rank == 3
    assert parse_run_config(["--loqt.rank", "3", *form]).loqt.rank == 3


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--loqt.rnak", "3"], "unknown key 'loqt.rnak'; did you mean 'loqt.rank'?"),
        (["--steps", "3"], "unknown key 'steps'; did you mean 'train.steps'?"),
        (["--confg", "a"], "unknown key 'confg'; did you mean 'config'?"),
        (["--zzzzzz", "3"], "unknown key 'zzzzzz'; see --help for the list of settings"),
        (["--loqt.rank", "x"], "loqt.rank is 'x'; write a whole number"),
        (["--loqt.rank", "6.5"], "loqt.rank is '6.5'; write a whole number"),
        (["--loqt.rank", "null"], "loqt.rank is null; write a whole number"),
        (["--loqt.scale", "big"], "loqt.scale is 'big'; write a number"),
        (["--loqt.side", "left"], "loqt.side is 'left'; write one of auto, input, output"),
        (["--parallel.zero_stage", "4"], "parallel.zero_stage is 4; write one of 1, 2, 3 or null"),
        (["--parallel.zero_stage", "true"], "parallel.zero_stage is 'true'; write one of 1, 2, 3 or null"),
        (["--model.compile", "maybe"], "model.compile is 'maybe'; write true or false"),
        (["--optim.betas", "[0.9]"], "optim.betas is '[0.9]'; write a list of 2 numbers such as [0.9, 0.9]"),
        (["--model.overrides", "3"], "model.overrides is '3'; write a mapping such as {name: value}"),
        (["--loqt.rank"], "--loqt.rank has no value; write a whole number"),
        (["--model.compile"], "--model.compile has no value; write true or false"),
        (["--config"], "--config has no value; write a file"),
        (["--loqt.rank", "3", "4"], "unexpected argument '4' after --loqt.rank 3; write one value"),
        (["loqt.rank=3"], "unexpected argument 'loqt.rank=3'; settings are written --key value, e.g. --loqt.rank 64"),
        (["--loqt", "3"], "'loqt' is a group of settings; write one of them, e.g. --loqt.rank VALUE"),
        (["--loqt.rank+=3"], "--loqt.rank+ adds to a list, but loqt.rank is a whole number; write --loqt.rank VALUE"),
        (["--loqt.rank", "-3"], "loqt.rank is -3; write 1 or more"),
        (
            ["--optim.per_layer", "true"],
            "optim.per_layer is true, but optim.clip_norm is 1.0: the global norm is known only when all gradients are"
            "; write optim.clip_norm: 0, or optim.per_layer: false",
        ),
        (
            ["--optim.per_layer=true", "--optim.clip_norm=0", "--parallel.strategy=ddp"],
            "optim.per_layer is true, but ddp sums gradients in buckets that hold all of them; write "
            "parallel.strategy: fsdp, or optim.per_layer: false",
        ),
        (
            ["--optim.states=int8", "--loqt.rank=8"],
            "optim.states is int8, whose blocks are parts of a row, but loqt.rank is 8; write a "
            "rank from 32 to 256, a multiple of 32, or optim.states: float32",
        ),
        (
            [
                *("--parallel.strategy=zero", "--optim.states=int8", "--optim.per_layer=true", "--optim.clip_norm=0"),
                *("--model.dtype=bfloat16", "--model.trained_dtype=bfloat16"),
            ],
            "optim.per_layer: true, model.trained_dtype: bfloat16: DeepSpeed's ZeRO keeps float32 masters of what "
            "trains and updates them at the end of a step; write parallel.strategy: fsdp (or single), or leave it out",
        ),
        (
            ["--model.trained_dtype=bfloat16"],
            "model.trained_dtype is bfloat16, but model.dtype is not; write model.dtype: bfloat16",
        ),
        (["--config", "absent.yaml"], "config file 'absent.yaml' does not exist; write --config FILE"),
    ],
)
def test_messages_of_the_command_line(argv, expected):
    assert message_of(*argv) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loqt: {rnak: 3}", "unknown key 'loqt.rnak'; did you mean 'loqt.rank'?"),
        ("lopt: {rank: 3}", "unknown key 'lopt'; did you mean 'loqt'?"),
        ("loqt: {merge: {gpa: 3}}", "unknown key 'loqt.merge.gpa'; did you mean 'loqt.merge.gap'?"),
        ("loqt: 3", "'loqt' is 3, but it is a group of settings; write loqt: {...}, or leave the group out"),
        ("loqt: {merge:}", "'loqt.merge' is empty, but it is a group of settings; write merge: {...}, or"),
        ("loqt.rank: 3", "key 'loqt.rank' has a dot; in YAML write it nested: loqt: {rank: …}"),
        ("loqt: {rank: 3, rank: 4}", "key 'rank' is written twice (line 1); keep one of them"),
        ("[1, 2]", "it holds [1, 2]; write key: value lines"),
        ("a: {", "is not YAML"),
        ("loqt: {rank: abc}", "loqt.rank is 'abc'; write a whole number"),
        ("loqt: {rank: null}", "loqt.rank is null; write a whole number"),
        ("loqt: {rank: 0}", "loqt.rank is 0; write 1 or more"),
        ("data: {files: a.txt}", "data.files is 'a.txt'; write a list such as [a, b]"),
        ("data: {split: 3}", "data.split is '3'; write text (quote it if it is a number)"),
        ("method: half", "method is 'half'; write one of loqt, full"),
        ("data: {files: [a], dataset: b}", "data.files and data.dataset are both set; write one of them"),
    ],
)
def test_messages_of_yaml(yaml_file, text, expected):
    assert expected in message_of("--config", yaml_file(text))


def test_key_errors_of_yaml_name_the_file(yaml_file):
    path = yaml_file("loqt: {rnak: 3}")
    assert message_of("--config", path).startswith(path)


def test_config_that_cannot_be_read(tmp_path):
    assert f"config file '{tmp_path}' cannot be read" in message_of("--config", str(tmp_path))


def test_print_config_reads_back(capsys, yaml_file):
    argv = ["--print_config", "--loqt.rank", "7", "--data.files", "a.txt", "--optim.eps", "1e-9"]
    with pytest.raises(SystemExit) as caught:
        parse_run_config(argv)
    assert caught.value.code == 0
    assert parse_run_config(["--config", yaml_file(capsys.readouterr().out)]) == parse_run_config(argv[1:])


# no path: "$x" would be taken for a variable, "~" for a home
TEXTS = st.one_of(
    st.sampled_from(["null", "1e3", "12", "true", "", "a: b", "ψ × s", "[a]", "#x", "-", "1.0", "0x1f", "2024-01-01"]),
    st.text(
        st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="~$"), max_size=8
    ),
)
FLOATS = st.floats(min_value=1e-30, max_value=1e30)


@settings(max_examples=40)
@given(
    text=TEXTS, lr=FLOATS, items=st.lists(TEXTS.filter(bool), max_size=3), value=st.one_of(TEXTS, st.integers(), FLOATS)
)
def test_round_trip_is_exact(tmp_path_factory, text, lr, items, value):
    config = RunConfig(
        model=ModelConfig(overrides={"one": value, "two": {"three": [value]}}),
        data=DataConfig(files=items, split=text),
        loqt=LoQTConfig(rank=8, exclude_modules=items),
        optim=OptimConfig(lr=lr, betas=(0.9, 0.95), full_precision_lr=lr),
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    save_run_config(config, path)
    assert load_run_config(path) == config


def test_load_reports_what_parse_reports(yaml_file):
    with pytest.raises(ConfigError, match=r"did you mean 'loqt\.rank'"):
        load_run_config(yaml_file("loqt: {rnak: 3}"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_parses(path):
    config = load_run_config(path)
    assert path.stem in (config.model.preset, "quickstart")
    assert config.train.run_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_lean_overlay_fits_every_shipped_config(path):
    config = parse_run_config([f"--config={path}", f"--config={ROOT}/configs/overlays/lean.yaml"])
    assert (config.optim.name, config.optim.states, config.model.trained_dtype) == ("muon", "int8", "bfloat16")
    assert config.train.run_dir == f"runs/{path.stem}"


def test_there_are_shipped_configs():
    names = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert names >= {"quickstart", *(f"llama_{size}" for size in ("60m", "130m", "350m", "1b", "7b", "13b"))}


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"--{key}" in text for key in setting_types())
    assert "columns of P and B" in text  # from the docstring


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["trian"], "loqt-scale: error: unknown command 'trian'; did you mean 'train'?\n"),
        (["zzz"], "loqt-scale: error: unknown command 'zzz'; write one of: train\n"),
        (["train", "--loqt.rank", "0"], "loqt-scale train: error: loqt.rank is 0; write 1 or more\n"),
    ],
)
def test_main_fails_in_one_line(capsys, argv, expected, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if argv == ["zzz"]:
        expected = f"loqt-scale: error: unknown command 'zzz'; write one of: {', '.join(cli.COMMANDS)}\n"
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == expected


def test_main_without_command_and_with_help(capsys):
    assert cli.main([]) == 2
    assert "train" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    assert "train" in capsys.readouterr().out


def test_one_rank_of_a_host_reports_a_wrong_setting(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(["train", "--loqt.rank", "0"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(["train", "--loqt.rank", "0"]) == 2
    assert "[rank 5]: error: loqt.rank is 0" in capsys.readouterr().err


def test_entry_script_works_from_anywhere_without_torch(tmp_path):
    script = (
        "import runpy, sys; sys.argv = ['train.py', '--print_config']\n"
        f"try: runpy.run_path({str(ROOT / 'launch' / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("method: loqt\n")
