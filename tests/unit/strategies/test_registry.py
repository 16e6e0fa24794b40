"""Which strategies a name finds, and what is said where it finds none."""

from __future__ import annotations

from pathlib import Path

import pytest

from loqt_scale.config import ParallelConfig, RunConfig, strategy_names
from loqt_scale.config.yaml import load_run_config, parse_run_config, save_run_config
from loqt_scale.errors import ConfigError, UserError
from loqt_scale.strategies import SINGLE, StrategyKind, find_strategy, register_strategy, registry, resolve_strategy
from loqt_scale.strategies.hybrid import words

KIND = StrategyKind(name="theirs", create=SINGLE.create)


@pytest.fixture(autouse=True)
def _forgotten_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_kinds", dict(registry._kinds))
    monkeypatch.setattr(strategy_names, "_registered", set(strategy_names._registered))


def install(folder: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package whose entry point `theirs` is this."""
    about = folder / "their_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[loqt_scale.strategies]\ntheirs = {value}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_a_name_that_nobody_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"^parallel.strategy is 'fdsp'; write one of auto, single, ddp, fsdp, zero$"):
        parse_run_config(["--parallel.strategy=fdsp"])
    with pytest.raises(ConfigError, match="'fdsp'; write one of"):
        resolve_strategy(ParallelConfig(strategy="fdsp"), {})


def test_a_registered_strategy_is_a_setting() -> None:
    register_strategy(KIND)
    register_strategy(KIND)  # a module that is imported twice
    assert find_strategy("theirs") is KIND
    with pytest.raises(UserError, match="'theirs', but no launcher set RANK"):
        resolve_strategy(parse_run_config(["--parallel.strategy=theirs"]).parallel, {})
    for taken in ("theirs", "ddp", "auto"):
        with pytest.raises(ValueError, match=f"there is a strategy '{taken}' already"):
            register_strategy(StrategyKind(name=taken, create=SINGLE.create))


def test_options_are_for_those_that_take_them() -> None:
    parallel = parse_run_config(["--parallel.options.depth", "3"]).parallel
    assert parallel.options == {"depth": 3}
    with pytest.raises(ConfigError, match=r"parallel.options has depth, but the strategy 'single' takes no options"):
        resolve_strategy(parallel, {})


def test_an_installed_strategy_is_known_by_name_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "not_there:KIND", monkeypatch)
    assert parse_run_config(["--parallel.strategy=theirs"]).parallel.strategy == "theirs"
    with pytest.raises(ConfigError, match=r"fsdp, zero, theirs$"):
        parse_run_config(["--parallel.strategy=fdsp"])
    with pytest.raises(UserError, match=r"their-package's not_there:KIND cannot be loaded: .*No module named"):
        find_strategy("theirs")


def test_an_entry_point_that_is_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "loqt_scale.strategies:SINGLE", monkeypatch)
    with pytest.raises(UserError, match="is no StrategyKind of that name"):
        find_strategy("theirs")


def test_settings_of_a_run_are_read_where_its_strategy_is_not_installed(tmp_path: Path) -> None:
    config = RunConfig(parallel=ParallelConfig(strategy="elsewhere", options={"depth": 3}))
    save_run_config(config, tmp_path / "config.yaml")
    assert load_run_config(tmp_path / "config.yaml") == config


def test_copies_of_a_sharded_model_that_lie_on_several_hosts_are_told() -> None:
    block, cyclic = [*"aaaabbbb"], [*"abababab"]
    assert words(block, 4) == "2 x 4" and words(block, 2) == "4 x 2"
    assert words(cyclic, 4) == "2 x 4, each copy over 2 hosts"
    assert words([*"aabb" * 2], 4) == "2 x 4, each copy over 2 hosts"
