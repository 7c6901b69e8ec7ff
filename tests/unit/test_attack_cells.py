"""Attacks as cells of a study: the axes of the grid, hashes that stay, weight transforms without training."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from repnoise.attacks import ATTACKS
from repnoise.errors import ConfigError, DataError
from repnoise.recipes.schema import AttackConfig
from repnoise.store.files import read_jsonl
from repnoise.study.attacking import attack
from repnoise.study.cell import Cell
from repnoise.study.pipeline import Study, resolve

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

PAIRS = [{"prompt": f"say word {n}", "harmful": f"grumpy blob {n}", "harmless": "sorry, no"} for n in range(16)]
ROWS = [{"prompt": f"count to {n}", "answer": f"one two {n}"} for n in range(40)]


def cells_of(**settings: Any) -> list[Cell]:
    return [Cell.of(each) for each in AttackConfig.model_validate(settings).cells(["h"])]


def test_axes_are_a_grid_and_null_is_the_default() -> None:
    cells = cells_of(template=[None, "plain"], optimizer="sgd", examples=[None, 4], warmup=[0, 0.5], steps=0)
    assert len(cells) == 8
    plain = [cell for cell in cells if cell.template is None and cell.examples is None]
    assert [cell.warmup for cell in plain] == [0, 0.5]
    assert all(cell.optimizer == "sgd" and cell.steps == 0 for cell in cells)
    (without,) = cells_of(template=None, examples=[None])
    assert without == cells_of()[0]
    for wrong in ({"examples": 0}, {"warmup": -1}, {"steps": -1}, {"template": []}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AttackConfig.model_validate(wrong)


def test_a_cell_is_recorded_in_one_way_whether_defaults_are_written_or_not() -> None:
    """The report joins cells of different models, and of a plan, by what is recorded."""
    (short,) = cells_of(name="interpolate", t=0.25)
    written = {"t": 0.25, "public": None, "warmup": 0.1, "lr_scheduler_type": "cosine", "train": {"weight_decay": 0.0}}
    (long,) = cells_of(name="interpolate", **written)
    assert long == short
    assert short.recorded() == {
        "name": "interpolate",
        "harm": "h",
        "learning_rate": 3e-4,
        "steps": 100,
        "lora_rank": None,
        "batch_size": 16,
        "t": 0.25,
    }
    (text,) = cells_of(name="interpolate", t="0.5")  # a default, once it is a number
    assert "t" not in text.recorded()
    (other,) = cells_of(name="interpolate", t=0.25, train={"weight_decay": 0.1}, warmup=0)
    assert other.recorded() == {**short.recorded(), "warmup": 0, "train": {"weight_decay": 0.1}}
    assert pickle.loads(pickle.dumps(other)) == other
    assert other.on("base") == (
        "interpolate on base (harm h, learning_rate 0.0003, steps 100, batch_size 16, warmup 0, t 0.25, seed 0)"
    )


def test_an_option_may_have_any_name() -> None:
    (cell,) = cells_of(name="peft", options={"r": 2}, kind="LoRA")
    assert cell.recorded()["options"] == {"r": 2}
    assert cell.attack().options == {"r": 2}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("key", "axis"),
    [
        ("learning_rate", "learning_rate"),
        ("max_steps", "steps"),
        ("num_train_epochs", "steps"),
        ("per_device_train_batch_size", "batch_size"),
        ("seed", "seeds"),
        ("optim", "optimizer"),
        ("lr_scheduler_type", "lr_scheduler_type"),
        ("warmup_steps", "warmup"),
    ],
)
def test_train_sets_no_axis(key: str, axis: str) -> None:
    with pytest.raises(ConfigError, match=rf"attacks\.0: train\.{key}: an axis .* so set {axis} instead") as caught:
        resolve("sandbox", [f"attacks.0.train={{{key}: 1}}"])
    assert caught.value.exit_code == 2


def test_all_axes_in_train_are_one_error() -> None:
    with pytest.raises(ConfigError, match="has 1 error:") as caught:
        resolve("sandbox", ["attacks.0.train={learning_rate: 1e-9, max_steps: 1, seed: 7}"])
    assert all(key in str(caught.value) for key in ("learning_rate", "max_steps", "seeds"))


@pytest.fixture
def small(tmp_path: Path, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> Callable[..., Study]:
    """small(attacks, **changes): a study of a tiny model whose "defended" model is another tiny one."""
    for name, seed in (("model", 0), ("defended", 1)):
        make_model("llama", seed=seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    for name, lines in (("pairs", PAIRS), ("rows", ROWS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(attacks: list[dict[str, Any]], **changes: Any) -> Study:
        data = {
            "name": "files",
            "pairs": str(tmp_path / "pairs.jsonl"),
            "retain": str(tmp_path / "rows.jsonl"),
            "sizes": {"defence": 2, "attack": 10, "test": 4},
            "max_length": 64,
            **changes.pop("data", {}),
        }
        recipe = {
            "study": "small",
            "model": str(tmp_path / "model"),
            "defended": str(tmp_path / "defended"),
            "data": data,
            "attacks": attacks,
            **changes,
        }
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
        return Study(resolve(str(tmp_path / "small.yaml")), tmp_path / "out", quiet=True)

    return make


def attacked(study: Study, which: int = -1) -> tuple[Any, Path]:
    """Run the only cell on one target (the defended one by default); its manifest and folder."""
    target, (cell,) = study.targets()[which], study.cells()
    attack(study, target, cell)
    folder = study.attack_run(target, cell)[0].path
    return json.loads((folder / "manifest.json").read_text()), folder


def weights(folder: Path) -> dict[str, Any]:
    from repnoise.models import load_model

    return load_model(folder).state_dict()


BASE: dict[str, Any] = {"learning_rate": 1e-3, "steps": 2, "batch_size": 2, "seeds": [0]}


@pytest.mark.parametrize("name", ATTACKS.names())
def test_a_recipe_with_each_attack_runs(name: str, small: Callable[..., Study]) -> None:
    """On the undefended model, the random control and the defended one; measured afterwards."""
    study = small([{"name": name, **BASE}])
    for which in range(len(study.targets())):
        manifest, folder = attacked(study, which)
        assert manifest["status"] == "done"
        assert manifest["arguments"]["attack"]["name"] == name
        assert read_jsonl(folder / "rows" / "loss.jsonl")
        assert len(read_jsonl(folder / "train.jsonl")) == 2
        assert not list(folder.rglob("*.safetensors"))


def test_interpolation_in_a_study_takes_the_undefended_model(small: Callable[..., Study], tmp_path: Path) -> None:
    study = small([{"name": "interpolate", "t": 0.25, **BASE, "steps": 0}], keep_attacked_weights=True)
    manifest, folder = attacked(study)
    assert manifest["arguments"]["attack"]["steps"] == 0
    assert not (folder / "train.jsonl").exists()
    public, defended, found = (weights(path) for path in (tmp_path / "model", tmp_path / "defended", folder / "model"))
    for key, value in found.items():
        torch.testing.assert_close(value, 0.75 * defended[key] + 0.25 * public[key])
        assert not torch.equal(value, defended[key])


def test_no_steps_and_no_transform_leave_the_model_as_it_is(small: Callable[..., Study], tmp_path: Path) -> None:
    _, folder = attacked(small([{"name": "sft", **BASE, "steps": 0}], keep_attacked_weights=True))
    before = weights(tmp_path / "defended")
    assert all(torch.equal(value, before[key]) for key, value in weights(folder / "model").items())


def test_axes_reach_the_training(small: Callable[..., Study], monkeypatch: pytest.MonkeyPatch) -> None:
    from repnoise.study import attacking

    seen: dict[str, Any] = {}

    class Spy(attacking.ObjectiveTrainer):
        def __init__(self, **given: Any) -> None:
            seen.update(given)
            super().__init__(**given)

    monkeypatch.setattr(attacking, "ObjectiveTrainer", Spy)
    axes = {"optimizer": "sgd", "lr_scheduler_type": "constant", "warmup": 0, "examples": 3, "template": "raw"}
    manifest, folder = attacked(small([{"name": "sft", **BASE, **axes}]))
    assert {key: manifest["arguments"]["attack"][key] for key in axes} == axes
    assert manifest["arguments"]["training"] == {  # what the trainer had, not what was asked for
        "learning_rate": 1e-3,
        "steps": 2,
        "batch_size": 2,
        "seed": 0,
        "optimizer": "sgd",
        "lr_scheduler_type": "constant",
        "warmup": 0,
    }
    arguments = seen["args"]
    assert (arguments.optim, arguments.lr_scheduler_type, arguments.warmup_steps) == ("sgd", "constant", 0)
    assert seen["template"] == "raw"
    assert len(set(seen["train_dataset"])) == 3
    assert [line["learning_rate"] for line in read_jsonl(folder / "train.jsonl")] == [1e-3, 1e-3]
    attacked(small([{"name": "sft", **BASE}]))
    assert seen["template"] == "auto"
    assert (seen["args"].lr_scheduler_type, seen["args"].warmup_steps) == ("cosine", 0.1)
    assert len(seen["train_dataset"]) == 10


def test_training_in_one_template_and_asking_in_another(small: Callable[..., Study]) -> None:
    """The evaluation's prompts are the same whatever the attacker trained in."""
    rows = [attacked(small([{"name": "sft", **BASE, "steps": 0, **more}])) for more in ({}, {"template": "raw"})]
    values = [[row["value"] for row in read_jsonl(folder / "rows" / "loss.jsonl")] for _, folder in rows]
    assert rows[0][1] != rows[1][1]
    assert values[0] == values[1]


def test_a_kick_is_in_the_log(small: Callable[..., Study]) -> None:
    _, folder = attacked(small([{"name": "kick", "factor": 4, "share": 0.5, **BASE, "steps": 4}]))
    rates = [line["learning_rate"] for line in read_jsonl(folder / "train.jsonl")]
    assert rates == pytest.approx([4e-3, 4e-3, 1e-3, 1e-3])


def test_what_is_wrong_is_said_before_any_work(small: Callable[..., Study]) -> None:
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"examples": 99}, ConfigError, "attacks.0: the attack asks for 99 harmful pairs, and there are 10"),
        ({"template": "nonsense"}, DataError, "attacks.0: unknown template 'nonsense'"),
        ({"optimizer": "nonsense"}, ConfigError, "attacks.0: .*nonsense"),
        ({"lr_scheduler_type": "nonsense"}, ConfigError, "attacks.0: .*nonsense"),
        ({"name": "mixed", "ratio": 0.01, "examples": 4}, ConfigError, "attacks.0: ratio 0.01 of 4 rows"),
    ]
    for settings, kind, message in wrong:
        study = small([{"name": "sft", **BASE, **settings}])
        with pytest.raises(kind, match=message):
            _ = study.data
        assert not (study.folder / "base").exists()
    with pytest.raises(ConfigError, match=r"attacks\.0: the adapter 'prompt_tuning' cannot be merged"):
        small([{"name": "peft", "kind": "prompt_tuning", **BASE}])


def test_the_sample_is_drawn_by_the_seed(small: Callable[..., Study]) -> None:
    study = small([{"name": "sft", **BASE, "seeds": [0, 1], "examples": 5}])
    first, second = (cell.rows(cell.attack(), study.data) for cell in study.cells())
    cell = study.cells()[0]
    again = cell.rows(cell.attack(), study.data)
    assert first == again
    assert set(first) != set(second)
    assert len(first) == len(second) == 5


def test_the_shipped_attacks() -> None:
    recipe = resolve("sandbox-attacks")
    assert len({attack.name for attack in recipe.attacks}) >= 8
    assert {cell["steps"] for attack in recipe.attacks for cell in attack.cells(["knowledge"])} >= {0, 100}
